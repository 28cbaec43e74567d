"""What a run compiles before its first frame."""

from __future__ import annotations

import logging
import threading

import numpy as np
import pytest
from msgspec import structs

from triage.backends import open_backend
from triage.backends.lz4 import decode_bslz4
from triage.cli import assembly
from triage.cli.assembly import _empty_chunk, _warm_up_frames
from triage.records import Frame, Series

DECTRIS = {
    *(("bslz4", kind) for kind in ("|u1", "<u2", "<u4")),
    *(("raw", kind) for kind in ("|u1", "<u2", "<u4")),
    ("lz4", "<u2"),
}
SIGNED = {(encoding, kind) for encoding in ("bslz4", "raw") for kind in ("<i2", "<i4")}


@pytest.mark.parametrize(
    ("protocol", "sent"),
    [
        ("auto", DECTRIS),
        ("jungfraujoch", DECTRIS | SIGNED | {("bszstd", "<u2")}),
        ("karabo", DECTRIS | {("raw", "<f4"), ("raw", "<i2")}),
    ],
)
def test_the_frames_of_the_warm_up_are_read(protocol: str, sent: set[tuple[str, str]]) -> None:
    """All that a protocol sends, in sound chunks of zeros: what fails early compiles little."""
    frames = _warm_up_frames(protocol)
    assert {(frame.encoding, frame.dtype.str) for frame in frames} == sent
    backend = open_backend("cpu")
    for frame in frames:
        assert not backend.decode(frame).any()
        views = backend.prepare([frame])
        assert views.errors == (None,)
        assert int(views.count.sum()) == 64 * 64


def test_a_start_that_compiles_says_so() -> None:
    """Once it takes long, and not before."""
    said: list[str] = []
    heard = threading.Event()

    class Hearing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())
            heard.set()

    handler = Hearing()
    assembly.log.addHandler(handler)
    try:
        with assembly._told_when_slow(3600.0):
            pass
        assert said == []
        with assembly._told_when_slow(0.0):
            assert heard.wait(60.0)
    finally:
        assembly.log.removeHandler(handler)
    assert len(said) == 1
    assert "compiling" in said[0]


def test_what_holds_the_bytes_compiles_nothing_anew() -> None:
    """Bytes of the warm-up, and a message's memory, which may be written to: one type."""
    payload = _empty_chunk(64 * 64 * 2)
    backend = open_backend("cpu")
    dtype = np.dtype("<u2")
    frame = Frame(
        series=Series(), image_id=0, encoding="bslz4", dtype=dtype, shape=(64, 64), payload=payload
    )
    backend.decode(frame)
    compiled = set(decode_bslz4.signatures)
    backend.decode(structs.replace(frame, payload=memoryview(bytearray(payload))))
    assert set(decode_bslz4.signatures) == compiled

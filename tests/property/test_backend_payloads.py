"""Whatever bytes come, a backend gives the right frame or DecodeError, and stays in its memory."""

from __future__ import annotations

import struct

import h5py
import hdf5plugin
import numpy as np
import pytest
import reference
from host_cuda import KINDS, make_backend

from triage.backends import Backend, lz4
from triage.errors import DecodeError
from triage.records import Frame, Recipe, Series

SHAPE = (13, 11)
MUTATIONS = 1500
GUARD = 64


@pytest.fixture(scope="module", params=KINDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return make_backend(request.param, Recipe(grid=16))


def good_payload(encoding: str, dtype: str) -> bytes:
    """Blocks of 64 bytes, so that a small frame has several, and a raw tail."""
    pixels = np.random.default_rng(11).poisson(2.0, SHAPE).astype(dtype)
    pixels[4:8] = 3
    item = pixels.dtype.itemsize
    options = (
        hdf5plugin.LZ4(nbytes=64)
        if encoding == "lz4"
        else hdf5plugin.Bitshuffle(nelems=64 // item, cname="zstd" if "zstd" in encoding else "lz4")
    )
    with h5py.File("good", "w", driver="core", backing_store=False) as file:
        dataset = file.create_dataset("d", data=pixels, chunks=SHAPE, **options)
        return bytes(dataset.id.read_direct_chunk((0, 0))[1])


def mutated(payload: bytes, rng: np.random.Generator, first: int) -> bytes:
    """One to three changes behind byte ``first``: values, cuts, insertions, moved pieces."""
    data = bytearray(payload)
    for _ in range(rng.integers(1, 4)):
        if len(data) <= first + 1:
            break
        at = int(rng.integers(first, len(data)))
        kind = int(rng.integers(6))
        if kind == 0:
            data[at] = int(rng.integers(256))
        elif kind == 1:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            data[at] = int(rng.choice([0, 1, 0x0F, 0xF0, 0xFF]))
        elif kind == 3:
            del data[at : at + int(rng.integers(1, 20))]
        elif kind == 4:
            data[at:at] = rng.bytes(int(rng.integers(1, 8)))
        else:
            source = int(rng.integers(first, len(data)))
            length = int(rng.integers(1, 16))
            data[at : at + length] = data[source : source + length]
    if rng.integers(8) == 0:
        del data[int(rng.integers(first, len(data) + 1)) :]
    return bytes(data)


def twin(encoding: str, payload: bytes, dtype: str) -> np.ndarray | None:
    """What the slow decoder makes of it; None where it is corrupt."""
    try:
        return reference.decode(encoding, payload, dtype, SHAPE)
    except (ValueError, struct.error):
        return None


def frame_of(encoding: str, payload: bytes, dtype: str) -> Frame:
    return Frame(
        series=Series(),
        image_id=0,
        encoding=encoding,
        dtype=np.dtype(dtype),
        shape=SHAPE,
        payload=payload,
    )


@pytest.mark.parametrize(
    ("encoding", "dtype"), [("bslz4", "<u2"), ("bslz4", "<u4"), ("bslz4", "u1"), ("lz4", "<u2")]
)
def test_mutated_blocks_decode_as_the_twin_says(
    backend: Backend, encoding: str, dtype: str
) -> None:
    """Corrupt for the twin is DecodeError, anything else the twin's pixels."""
    good = good_payload(encoding, dtype)
    rng = np.random.default_rng(2)
    outcomes = {True: 0, False: 0}
    for _ in range(MUTATIONS):
        payload = mutated(good, rng, first=12)
        wanted = twin(encoding, payload, dtype)
        outcomes[wanted is None] += 1
        frame = frame_of(encoding, payload, dtype)
        if wanted is None:
            with pytest.raises(DecodeError):
                backend.decode(frame)
        else:
            np.testing.assert_array_equal(backend.decode(frame), wanted)
    assert min(outcomes.values()) > MUTATIONS // 20


@pytest.mark.parametrize("encoding", ["bslz4", "lz4", "bszstd"])
def test_mutated_headers_are_contained(backend: Backend, encoding: str) -> None:
    """With header bytes changed too: a frame or DecodeError, never anything else."""
    good = good_payload(encoding, "<u2")
    rng = np.random.default_rng(3)
    refused = 0
    rounds = 200 if encoding == "bszstd" else MUTATIONS
    for i in range(rounds):
        payload = mutated(good, rng, first=0 if i % 2 else 12)
        try:
            assert backend.decode(frame_of(encoding, payload, "<u2")).shape == SHAPE
        except DecodeError:
            refused += 1
    assert refused > rounds // 4


@pytest.mark.parametrize(("dtype", "item"), [("u1", 1), ("<u2", 2), ("<u4", 4)])
def test_the_cpu_kernels_stay_in_their_buffers(dtype: str, item: int) -> None:
    """Bytes round the output and the scratch block are untouched, whatever the payload."""
    size = SHAPE[0] * SHAPE[1] * item
    rng = np.random.default_rng(4)
    for encoding in ("bslz4", "lz4"):
        good = good_payload(encoding, dtype)
        for _ in range(MUTATIONS):
            data = np.frombuffer(mutated(good, rng, first=12), np.uint8)
            memory = np.full(size + 2 * GUARD, 0xA5, np.uint8)
            scratch = np.full(64 + 2 * GUARD, 0xA5, np.uint8)
            out = memory[GUARD:-GUARD]
            if encoding == "lz4":
                lz4.decode_lz4(data, 12, 64, out)
            else:
                lz4.decode_bslz4(data, 12, item, 64, scratch[GUARD:-GUARD], out)
            for buffer in (memory, scratch):
                assert (buffer[:GUARD] == 0xA5).all()
                assert (buffer[-GUARD:] == 0xA5).all()

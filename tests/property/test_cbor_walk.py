"""The walk of messages: against cbor2, and the compiled walk against the one in Python."""

from __future__ import annotations

import math
from typing import Any

import cbor2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulators.detectors import stream2
from simulators.detectors.frames import SimFrame, StreamInfo, compressed
from triage.errors import MalformedMessage
from triage.ingest import cbor
from triage.ingest.cbor import Tagged, read_map, read_map_in_python

IMAGE = np.random.default_rng(3).poisson(1.0, (20, 30)).astype(np.uint16)
INFO = StreamInfo(shape=IMAGE.shape, number_of_images=2, channels=("threshold_1", "difference"))
MESSAGES = [
    stream2.start_message(INFO, header_detail="all"),
    stream2.end_message(INFO),
    *(
        stream2.image_message(
            INFO,
            SimFrame(
                payload=compressed(IMAGE, encoding),
                encoding=encoding,
                dtype=IMAGE.dtype,
                shape=IMAGE.shape,
                truth={"n_visible": 3.0},
            ),
            image_id,
        )
        for encoding, image_id in (("bslz4", 7), ("lz4", 70_000), ("raw", 2**33))
    ),
]


def plain(value: Any) -> Any:
    """What can be compared: bytes for views, and one NaN that equals itself."""
    if isinstance(value, memoryview):
        return ("bytes", bytes(value))
    if isinstance(value, Tagged):
        return ("tag", value.tag, plain(value.value))
    if isinstance(value, cbor2.CBORTag):
        return ("tag", value.tag, plain(value.value))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    return (type(value).__name__, value)


def outcome(read: Any, message: bytes) -> tuple[Any, str]:
    """What was read, and the error if there was one."""
    fields: dict[Any, Any] = {}
    try:
        read(memoryview(message), fields)
    except MalformedMessage as err:
        return plain(fields), str(err)
    return plain(fields), ""


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_reads_as_cbor2_reads_it(message: bytes) -> None:
    """Every key and value; cbor2 turns date texts into dates, which are compared as texts."""
    for read in (read_map, read_map_in_python):
        fields: dict[Any, Any] = {}
        read(memoryview(message), fields)
        expected = cbor2.loads(message[3:])
        for name in ("arm_date", "series_date"):
            if name in expected:
                assert isinstance(fields.pop(name), str)
                del expected[name]
        assert plain(fields) == plain(expected)


def test_byte_strings_are_not_copied() -> None:
    """A payload is a window on the message itself, and keeps it alive."""
    message = bytearray(cbor2.dumps({"type": "image", "data": {"a": b"pixels"}}))
    for read in (read_map, read_map_in_python):
        fields: dict[Any, Any] = {}
        read(memoryview(message), fields)
        window = fields["data"]["a"]
        assert isinstance(window, memoryview)
        assert bytes(window) == b"pixels"
        at = message.index(b"pixels")
        message[at] = ord("P")
        assert bytes(window) == b"Pixels"
        message[at] = ord("p")


ITEMS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64 - 1)
    | st.floats()
    | st.floats(width=32)
    | st.text(max_size=30)
    | st.binary(max_size=30),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(max_size=5) | st.integers(0, 300), inner, max_size=5)
        | st.builds(cbor2.CBORTag, st.integers(40, 2**40).filter(lambda t: t != 55799), inner)
    ),
    max_leaves=20,
)


@pytest.mark.skipif(cbor._compiled is None, reason="the compiled walk was not built")
@given(st.dictionaries(st.text(max_size=12), ITEMS, max_size=8), st.booleans(), st.booleans())
def test_any_map_reads_alike(fields: dict[str, Any], magic: bool, canonical: bool) -> None:
    """Whatever an encoder writes: half floats, big integers, keys that are no text, tags."""
    message = cbor.MAGIC * magic + cbor2.dumps(fields, canonical=canonical)
    assert outcome(read_map, message) == outcome(read_map_in_python, message)


@pytest.mark.skipif(cbor._compiled is None, reason="the compiled walk was not built")
@given(st.data())
def test_any_damage_is_told_alike(data: st.DataObject) -> None:
    """Changed, cut and arbitrary bytes give the same fields and the same error."""
    message = bytearray(data.draw(st.sampled_from(MESSAGES) | st.binary(max_size=60)))
    head = min(len(message), 300)
    for _ in range(data.draw(st.integers(0, 6)) if head else 0):
        message[data.draw(st.integers(0, head - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(message[: data.draw(st.integers(0, len(message)))])
    for each in (bytes(message), cut):
        assert outcome(read_map, each) == outcome(read_map_in_python, each)


@pytest.mark.skipif(cbor._compiled is None, reason="the compiled walk was not built")
def test_a_great_many_damaged_messages_are_told_alike() -> None:
    """A hundred thousand messages with changed bytes and lengths of every size that CBOR has."""
    rng = np.random.default_rng(11)
    bases = [np.frombuffer(m[:280] + m[-40:], np.uint8) for m in MESSAGES]
    telling = np.frombuffer(
        b"\x00\x17\x18\x19\x1a\x1b\x1f\x3b\x5b\x5f\x7b\x7f\x9b\x9f\xbb\xbf\xd8"
        b"\xdb\xe0\xf4\xf7\xf8\xf9\xfa\xfb\xff\x80\xa0\x60\x40",
        np.uint8,
    )
    for number in range(100_000):
        message = bases[number % len(bases)].copy()
        places = rng.integers(0, len(message), 1 + number % 5)
        message[places] = rng.choice(telling, len(places))
        each = message.tobytes()
        found: dict[Any, Any] | None = cbor._compiled.walk(memoryview(each), Tagged)
        if found is not None or number % 50 == 0:
            assert outcome(read_map, each) == outcome(read_map_in_python, each)


@pytest.mark.skipif(cbor._compiled is None, reason="the compiled walk was not built")
@pytest.mark.parametrize("depth", [30, 31, 32, 33, 5000])
@pytest.mark.parametrize("opening", [b"\x81", b"\xa1\x61a", b"\xd8\x40"])
def test_depth_is_bounded_alike(opening: bytes, depth: int) -> None:
    """Arrays, maps and tags within each other, up to and beyond what is read."""
    message = b"\xa1\x61x" + opening * depth + b"\x00"
    assert outcome(read_map, message) == outcome(read_map_in_python, message)

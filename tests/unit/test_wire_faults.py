"""Messages that are wrong, each contained, the next one unharmed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import cbor2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulators.detectors import stream1, stream2
from simulators.detectors.detector import series_messages
from simulators.detectors.faults import FAULTS
from simulators.detectors.frames import SimFrame, StreamInfo, compressed
from triage.backends import open_backend
from triage.ingest.series import SeriesBook
from triage.ingest.stream1 import Stream1Parser
from triage.ingest.stream2 import Stream2Parser
from triage.records import Message

IMAGE = np.random.default_rng(3).poisson(1.0, (70, 90)).astype(np.uint16)
FRAME = SimFrame(
    payload=compressed(IMAGE, "bslz4"), encoding="bslz4", dtype=IMAGE.dtype, shape=IMAGE.shape
)
INFO = StreamInfo(
    shape=IMAGE.shape,
    number_of_images=5,
    beam_center_x_px=44.5,
    beam_center_y_px=30.0,
    detector_distance_m=0.1,
    incident_wavelength_angstrom=1.0,
    series_id=12,
)


def parse_all(protocol: str, faults: dict[int, str]) -> list[Message]:
    book = SeriesBook()
    parsers: dict[str, Any] = {
        "stream2": Stream2Parser(book=book),
        "stream1": Stream1Parser(book=book),
    }
    messages = []
    for sent in series_messages(INFO, [FRAME], protocol=protocol, faults=faults):
        json_first = sent.parts[0][:1] == b"{"
        parser = parsers["stream1" if json_first else "stream2"]
        messages.append(parser.parse(sent.parts, 0))
    return messages


def outcomes(messages: Sequence[Message]) -> list[tuple[str, int, str]]:
    """(kind, image_id, fault) of each message, decoding what claims to be sound."""
    backend = open_backend("cpu")
    found = []
    for message in messages:
        frame = message.frame
        fault = ""
        if frame is not None:
            fault = frame.fault.value if frame.fault else ""
            if frame.fault is None and backend.prepare([frame]).errors[0] is not None:
                fault = "undecodable"
            if frame.duplicate:
                fault += "duplicate"
        found.append((message.kind.value, frame.image_id if frame else -1, fault))
    return found


SOUND = [
    ("start", -1, ""),
    *(("image", i, "") for i in range(5)),
    ("end", -1, ""),
]


def with_image(image_id: int, *instead: tuple[str, int, str]) -> list[tuple[str, int, str]]:
    at = image_id + 1
    return [*SOUND[:at], *instead, *SOUND[at + 1 :]]


EXPECTED = {
    "truncated": with_image(2, ("image", 2, "undecodable")),
    "wrong_tag": with_image(2, ("image", 2, "malformed")),
    "wrong_dtype": with_image(2, ("image", 2, "malformed")),
    "duplicate": with_image(2, ("image", 2, ""), ("image", 2, "duplicate")),
    "gap": with_image(2),
    "garbage": with_image(2, ("malformed", -1, ""), ("image", 2, "")),
    "big_json": with_image(2, ("malformed", -1, ""), ("image", 2, "")),
    "missing_end": SOUND[:-1],
    "changed_size": with_image(2, ("image", 2, "geometry_changed")),
    "image_before_start": [
        ("image", 0, "geometry_changed"), SOUND[0], *SOUND[2:],
    ],
}  # fmt: skip


@pytest.mark.parametrize("protocol", ["stream2", "stream1"])
@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_each_fault_is_contained(protocol: str, fault: str) -> None:
    """The faulty image is what it should be, every other message as if nothing had been."""
    expected = list(EXPECTED[fault])
    if protocol == "stream2" and fault == "truncated":
        expected[3] = ("image", 2, "malformed")
    if protocol == "stream1" and fault == "wrong_tag":
        expected[3] = ("image", 2, "unknown_encoding")
    assert outcomes(parse_all(protocol, {2: fault})) == expected


def test_a_cut_at_every_byte_is_contained() -> None:
    """A V2 image cut anywhere is malformed or an image that is kept, and never an exception."""
    message = stream2.image_message(INFO, FRAME, 3)
    for length in range(len(message)):
        parser = Stream2Parser()
        parsed = parser.parse([message[:length]], 0)
        assert parsed.kind.value in ("malformed", "image")
        if parsed.frame is not None:
            assert parsed.frame.fault is not None


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        b"\xd9\xd9\xf7",
        b"\xa1",
        b"\x81" * 5000,
        b"\xa1\x00" * 5000,
        b"\xbb\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\xa1\x64type\x5b\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\xa1\x64type\x9b\x00\x00\x00\xff\xff\xff\xff\xff",
        b"\xa1\x64type\x62\xff\xfe",
        cbor2.dumps({"type": 7}),
        cbor2.dumps([1, 2]),
        cbor2.dumps({"type": "start", "channels": 5, "goniometer": [1], "image_size_x": -3}),
        cbor2.dumps({"type": "image", "data": {"a": cbor2.CBORTag(40, [[1], b""])}}),
        cbor2.dumps({"type": "image", "image_id": 2**70, "data": None}),
    ],
)
def test_hostile_bytes_are_contained(hostile: bytes) -> None:
    """Claimed lengths, depth and wrong types are not believed; the next message is unharmed."""
    parser = Stream2Parser()
    parsed = parser.parse([hostile], 0)
    assert parsed.kind.value in ("malformed", "image", "start")
    parser.parse([stream2.start_message(INFO)], 0)
    after = parser.parse([stream2.image_message(INFO, FRAME, 0)], 0)
    assert after.frame is not None
    assert after.frame.fault is None


@given(st.binary(max_size=200))
def test_any_bytes_are_contained(data: bytes) -> None:
    """Neither parser raises on anything."""
    Stream2Parser().parse([data], 0)
    Stream1Parser().parse([data, data, data], 0)


@given(st.data())
def test_mutated_messages_are_contained(data: st.DataObject) -> None:
    """A start or image with some bytes changed gives a message, and never an exception."""
    good = data.draw(
        st.sampled_from([stream2.start_message(INFO), stream2.image_message(INFO, FRAME, 1)[:300]])
    )
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at] = data.draw(st.integers(0, 255))
    assert Stream2Parser().parse([bytes(changed)], 0).kind is not None


def test_extra_keys_missing_magic_and_late_type_are_accepted() -> None:
    """Unknown keys, nulls, integers for floats and `type` at the end are read all the same."""
    parser = Stream2Parser()
    start = cbor2.loads(stream2.start_message(INFO)[3:])
    kind = start.pop("type")
    changed = {**start, "novel": [1, {"x": None}], "count_time": None, "beam_center_x": 44}
    message = parser.parse([cbor2.dumps({**changed, "type": kind})], 0)
    assert message.kind == "start"
    assert message.series is not None
    assert message.series.geometry is not None
    assert message.series.geometry.beam_center_x_px == 44.0


def test_jungfraujochs_additions_are_read() -> None:
    """Signed pixels, an error value, a scalar distance, the channel `default`, other types."""
    parser = Stream2Parser()
    start = cbor2.loads(stream2.start_message(INFO)[3:])
    start |= {
        "channels": ["default"], "error_value": -(2**31), "detector_translation": 0.25,
        "magic_number": 7,
    }  # fmt: skip
    series = parser.parse([cbor2.dumps(start)], 0).series
    assert series is not None
    assert series.error_value == -(2**31)
    assert series.geometry is not None
    assert series.geometry.detector_distance_m == 0.25
    assert parser.parse([cbor2.dumps({"type": "calibration"})], 0).kind == "control"
    pixels = np.array([[-(2**31), -1], [3, 4]], "<i4")
    array = cbor2.CBORTag(40, [[2, 2], cbor2.CBORTag(78, pixels.tobytes())])
    image = {
        "type": "image", "series_id": 12, "series_unique_id": INFO.series_unique_id,
        "image_id": 0, "data": {"default": array},
    }  # fmt: skip
    frame = parser.parse([cbor2.dumps(image)], 0).frame
    assert frame is not None
    assert np.array_equal(open_backend("cpu").decode(frame), pixels)


def test_the_configured_channel_is_scored() -> None:
    """Several channels: the named one, else the first that the series lists."""
    info = StreamInfo(
        shape=IMAGE.shape, number_of_images=1, channels=("threshold_1", "threshold_2")
    )
    for wanted, scored in (("threshold_2", "threshold_2"), ("", "threshold_1")):
        parser = Stream2Parser(wanted)
        parser.parse([stream2.start_message(info)], 0)
        frame = parser.parse([stream2.image_message(info, FRAME, 0)], 0).frame
        assert frame is not None
        assert frame.channel == scored


@pytest.mark.parametrize(
    ("channel", "named", "sent", "fault"),
    [
        ("threshold_2", ("threshold_1", "threshold_2"), ("threshold_1",), "malformed"),
        ("threshold_2", (), ("threshold_1",), "malformed"),
        ("", ("threshold_1", "threshold_2"), ("threshold_2",), "malformed"),
        ("", ("1",), ("threshold_1",), ""),  # as an emulator names them
        ("", (), ("threshold_1",), ""),
        ("", ("threshold_1", "threshold_2"), ("threshold_2", "threshold_1"), ""),
    ],
)
def test_no_channel_is_scored_in_place_of_another(
    channel: str, named: tuple[str, ...], sent: tuple[str, ...], fault: str
) -> None:
    """An image that lacks the channel goes on unscored; names that nobody knows are taken."""
    parser = Stream2Parser(channel)
    start = replace(INFO, channels=named)
    parser.parse([stream2.start_message(start)], 0)
    image = stream2.image_message(replace(INFO, channels=sent), FRAME, 0)
    frame = parser.parse([image], 0).frame
    assert frame is not None
    assert (frame.fault.value if frame.fault else "") == fault
    assert frame.image_id == 0


def test_the_header_mask_is_used_where_it_fits() -> None:
    """header_detail all: V2 and V1 give the mask that was sent."""
    mask = np.zeros(IMAGE.shape, np.uint32)
    mask[3, 5] = 1
    info = StreamInfo(shape=IMAGE.shape, number_of_images=1, pixel_mask=mask)
    v2 = Stream2Parser().parse([stream2.start_message(info, header_detail="all")], 0).series
    v1 = Stream1Parser().parse(stream1.header_parts(info, header_detail="all"), 0).series
    for series in (v2, v1):
        assert series is not None
        assert series.pixel_mask is not None
        assert np.array_equal(series.pixel_mask, mask)


def test_both_protocols_say_the_same_of_a_series() -> None:
    """Geometry is bit for bit the same, whatever carried it."""
    v2 = Stream2Parser().parse([stream2.start_message(INFO)], 0).series
    v1 = Stream1Parser().parse(stream1.header_parts(INFO), 0).series
    assert v1 is not None
    assert v2 is not None
    assert v1.geometry == v2.geometry
    assert v1.geometry is not None
    assert (v1.saturation_value, v1.number_of_images) == (v2.saturation_value, v2.number_of_images)

"""What a start message says beside its numbers: masks, flatfields, appendices, error values."""

from __future__ import annotations

import json
from typing import Any

import cbor2
import numpy as np
import pytest
from numpy.typing import NDArray

from simulators.detectors.frames import compressed
from triage.backends import open_backend
from triage.ingest.stream1 import Stream1Parser
from triage.ingest.stream2 import Stream2Parser
from triage.records import Reason, Series

Y, X = 16, 24
MASK = np.zeros((Y, X), np.uint32)
MASK[0, 1] = 1
FLATFIELD = np.ones((Y, X), np.float32)
FLATFIELD[2, 3] = np.nan
FLATFIELD[4, 5] = 0.0
FLATFIELD[6, 7] = -1.0
FLATFIELD[8, 9] = np.inf
FLATFIELD[10, 11] = 1.37
LEFT_OUT = {(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)}


def array(values: NDArray[Any], encoding: str = "raw") -> cbor2.CBORTag:
    tag = {"<u4": 70, "<f4": 85, "<u2": 69}[values.dtype.str]
    content: Any = compressed(values, encoding)
    if encoding != "raw":
        content = cbor2.CBORTag(56500, [encoding, values.dtype.itemsize, content])
    return cbor2.CBORTag(40, [list(values.shape), cbor2.CBORTag(tag, content)])


def stream2_series(channel: str = "", **fields: Any) -> Series:
    start = {
        "type": "start", "series_id": 3, "series_unique_id": "A", "channels": ["a", "b"],
        "image_size_x": X, "image_size_y": Y, **fields,
    }  # fmt: skip
    series = Stream2Parser(channel).parse([cbor2.dumps(start)], 0).series
    assert series is not None
    return series


def part(**document: Any) -> bytes:
    return json.dumps(document).encode()


def stream1_header(*more: bytes, detail: str = "all") -> list[bytes]:
    return [
        part(htype="dheader-1.0", series=3, header_detail=detail),
        part(x_pixels_in_detector=X, y_pixels_in_detector=Y, wavelength=1.0),
        *more,
    ]


def stream1_series(*more: bytes, detail: str = "all") -> Series:
    series = Stream1Parser().parse(stream1_header(*more, detail=detail), 0).series
    assert series is not None
    return series


def left_out(series: Series) -> set[tuple[int, int]]:
    assert series.pixel_mask is not None
    assert series.pixel_mask.dtype == np.uint32
    return {(int(y), int(x)) for y, x in np.argwhere(series.pixel_mask & 0xFFFF)}


@pytest.mark.parametrize("encoding", ["raw", "bslz4", "lz4", "bszstd"])
def test_stream2_mask_and_flatfield_leave_pixels_out(encoding: str) -> None:
    """Masked pixels and those with a correction that is no positive number, however packed."""
    series = stream2_series(
        pixel_mask={"a": array(MASK, encoding)}, flatfield={"a": array(FLATFIELD, encoding)}
    )
    assert left_out(series) == LEFT_OUT


def test_stream1_mask_and_flatfield_leave_pixels_out() -> None:
    """The same from the raw parts of a V1 header, by either spelling of their type."""
    for prefix in ("d", ""):
        series = stream1_series(
            part(htype=f"{prefix}flatfield-1.0", shape=[X, Y], type="float32"),
            FLATFIELD.tobytes(),
            part(htype=f"{prefix}pixelmask-1.0", shape=[X, Y], type="uint32"),
            MASK.tobytes(),
            part(htype="dcountrate_table-1.0", shape=[2, 2], type="float32"),
            bytes(16),
            b"\x00an appendix",
        )
        assert left_out(series) == LEFT_OUT


def test_the_mask_is_that_of_the_scored_channel() -> None:
    """Every channel has a mask of its own."""
    other = MASK.T.reshape(MASK.shape).copy()
    masks = {"a": array(MASK), "b": array(other)}
    assert left_out(stream2_series("b", pixel_mask=masks)) == {
        (int(y), int(x)) for y, x in np.argwhere(other)
    }
    assert left_out(stream2_series(pixel_mask=masks)) == {(0, 1)}


def test_a_flatfield_of_zeros_is_none() -> None:
    """Emulators send zeros for a flatfield; that must not mask the detector."""
    assert stream2_series(flatfield={"a": array(np.zeros((Y, X), np.float32))}).pixel_mask is None


def test_maps_that_do_not_fit_are_left_out() -> None:
    """Another shape, another type, text for bytes, or a header that lies about its size."""
    lying = bytearray(compressed(MASK, "bslz4"))
    lying[0] = 0x7F
    wrong: list[Any] = [
        array(MASK[:-1]),
        array(MASK.astype(np.uint16)),
        "FIX",
        cbor2.CBORTag(
            40, [[Y, X], cbor2.CBORTag(70, cbor2.CBORTag(56500, ["bslz4", 4, bytes(lying)]))]
        ),
    ]
    for value in wrong:
        assert stream2_series(pixel_mask={"a": value}, flatfield={"a": value}).pixel_mask is None


def test_counts_are_not_multiplied_by_the_flatfield() -> None:
    """The pixels that the network sees are the integers that were counted."""
    parser = Stream2Parser()
    start = {
        "type": "start", "series_id": 3, "series_unique_id": "A", "channels": ["a"],
        "image_size_x": X, "image_size_y": Y, "flatfield_enabled": False,
        "flatfield": {"a": array(FLATFIELD)},
    }  # fmt: skip
    parser.parse([cbor2.dumps(start)], 0)
    pixels = np.full((Y, X), 10, np.uint16)
    image = {
        "type": "image", "series_id": 3, "series_unique_id": "A", "image_id": 0,
        "data": {"a": array(pixels)},
    }  # fmt: skip
    frame = parser.parse([cbor2.dumps(image)], 0).frame
    assert frame is not None
    views = open_backend("cpu").prepare([frame])
    assert int(views.count.sum()) == Y * X - 4
    assert int(views.total.sum()) == 10 * (Y * X - 4)
    assert int(views.maximum.max()) == 10


def test_a_header_without_details_may_have_an_appendix() -> None:
    """header_detail none: the second part is any bytes, and the series has begun."""
    parser = Stream1Parser()
    header = part(htype="dheader-1.0", series=3, header_detail="none")
    for appendix in (b"\xff\x00", b'{"x_pixels_in_detector": 7}'):
        message = parser.parse([header, appendix], 0)
        assert message.kind == "start"
        assert message.series is not None
        assert message.series.started
        assert message.series.image_size_x_px == 0


def test_an_appendix_behind_a_basic_header_changes_nothing() -> None:
    """Two parts are read, a third is the user's."""
    series = stream1_series(b'{"acqID": "test_1"}', detail="basic")
    assert (series.image_size_y_px, series.image_size_x_px) == (Y, X)
    assert series.pixel_mask is None


@pytest.mark.parametrize(
    "content",
    [["trpx", b"\x00\x01"], ["trpx", 2, b"\x00\x01"], ["trpx"], ["novel", {"level": 3}, b""]],
)
def test_unknown_compressions_go_on_unscored(content: list[Any]) -> None:
    """Whatever fields an algorithm has that is not known here."""
    parser = Stream2Parser()
    typed = cbor2.CBORTag(69, cbor2.CBORTag(56500, content))
    image = {
        "type": "image", "series_id": 3, "series_unique_id": "A", "image_id": 0,
        "data": {"a": cbor2.CBORTag(40, [[Y, X], typed])},
    }  # fmt: skip
    message = parser.parse([cbor2.dumps(image)], 0)
    assert message.kind == "image"
    assert message.frame is not None
    assert message.frame.fault is Reason.UNKNOWN_ENCODING


def test_columns_first_go_on_unscored() -> None:
    """Tag 1040 is right by RFC 8746 and not read here."""
    array_1040 = cbor2.CBORTag(1040, array(MASK).value)
    image = {
        "type": "image", "series_id": 3, "series_unique_id": "A", "image_id": 0,
        "data": {"a": array_1040},
    }  # fmt: skip
    frame = Stream2Parser().parse([cbor2.dumps(image)], 0).frame
    assert frame is not None
    assert frame.fault is Reason.UNKNOWN_ENCODING


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"magic_number": 9, "image_dtype": "int16"}, -(2**15)),
        ({"magic_number": 9, "image_dtype": "int32"}, -(2**31)),
        ({"magic_number": 9, "image_dtype": "int32", "error_value": -7}, -7),
        ({"magic_number": 9, "image_dtype": "uint16"}, None),
        ({"image_dtype": "int32"}, None),
        ({"error_value": None}, None),
    ],
)
def test_the_error_value_of_signed_pixels(fields: dict[str, Any], expected: int | None) -> None:
    """Told, or by Jungfraujoch's custom the lowest value; PILATUS-like data has none."""
    assert stream2_series(**fields).error_value == expected

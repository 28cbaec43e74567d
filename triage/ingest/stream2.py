"""DECTRIS Stream V2 (CBOR), and what Jungfraujoch adds to it.

One message is one ZeroMQ part. What a detector should send and what emulators do send differ, so
every field is optional here, unknown ones are passed over, and the pixel type is the one that
the typed array names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triage.errors import MalformedMessage, UnsupportedEncoding, WireError
from triage.ingest.cbor import Tagged, read_map
from triage.ingest.series import (
    SeriesBook,
    decoded_map,
    number,
    usable_pixels,
    whole_number,
)
from triage.records import Channel, Frame, Geometry, Message, MessageKind, Reason, Series

__all__ = ["Stream2Parser", "separated"]

_ARRAY = 40
_COLUMN_MAJOR_ARRAY = 1040
_COMPRESSION = 56500
_HC_EV_ANGSTROM = 12398.419843320026
"""Planck's constant times the speed of light (exact SI values), in eV angstrom."""

_PIXEL_TYPES = {
    tag: np.dtype(name)
    for tag, name in {
        64: "u1", 65: ">u2", 66: ">u4", 67: ">u8", 68: "u1", 69: "<u2", 70: "<u4", 71: "<u8",
        72: "i1", 73: ">i2", 74: ">i4", 75: ">i8", 77: "<i2", 78: "<i4", 79: "<i8",
        80: ">f2", 81: ">f4", 82: ">f8", 84: "<f2", 85: "<f4", 86: "<f8",
    }.items()
}  # fmt: skip
"""Typed arrays of RFC 8746 by tag."""

_SHUFFLED = ("bslz4", "bszstd")
_ALGORITHMS = (*_SHUFFLED, "lz4")


def separated(parts: Sequence[Any]) -> list[Sequence[Any]]:
    """The messages in one ZeroMQ message: one, but for senders that join what they have queued.

    A message is one part. tickit sends what waits as the parts of one message; read as one, all
    but the first would be lost.
    """
    if len(parts) == 1 or not all(_opens_message(part) for part in parts):
        return [parts]
    return [(part,) for part in parts]


def _opens_message(part: Any) -> bool:
    head = bytes(memoryview(part)[:4])
    # A map, after the tag of self-described CBOR where it is there.
    return b"\xa0" <= head.removeprefix(b"\xd9\xd9\xf7")[:1] <= b"\xbf"


class Stream2Parser:
    """Turns messages into :class:`triage.records.Message`; never raises on what it is sent.

    Args:
        channel: the channel to score; "" for the first one that the series names.
        book: the series of the stream, shared by the parsers of all its lanes.
        lane: index of the socket that is read.
    """

    def __init__(self, channel: str = "", book: SeriesBook | None = None, lane: int = 0) -> None:
        self._channel = channel
        self._lane = lane
        self._book = book or SeriesBook()

    def parse(self, parts: Sequence[Any], received_ns: int) -> Message:
        """The meaning of one message; its parts are handed on as they are."""
        buffer = memoryview(parts[0])
        size = buffer.nbytes
        if len(parts) > 1:
            size = sum(memoryview(part).nbytes for part in parts)
        fields: dict[Any, Any] = {}
        cut_short = ""
        try:
            read_map(buffer, fields)
        except MalformedMessage as err:
            cut_short = str(err)
        kind = fields.get("type")
        if kind == "image":
            return Message(
                kind=MessageKind.IMAGE,
                parts=tuple(parts),
                received_ns=received_ns,
                frame=self._frame(fields, received_ns, size, cut_short),
                size_bytes=size,
                lane=self._lane,
            )
        common: dict[str, Any] = {
            "parts": tuple(parts),
            "received_ns": received_ns,
            "size_bytes": size,
            "lane": self._lane,
        }
        if cut_short:
            return Message(kind=MessageKind.MALFORMED, detail=cut_short, **common)
        if kind == "start":
            series = self._book.start(_series(fields, self._channel), self._lane)
            return Message(kind=MessageKind.START, series=series, **common)
        if kind == "end":
            series = self._book.find(*_identity(fields))
            return Message(kind=MessageKind.END, series=series, **common)
        if isinstance(kind, str):
            return Message(kind=MessageKind.CONTROL, detail=f"type {kind[:64]!r}", **common)
        return Message(kind=MessageKind.MALFORMED, detail="a map without a type", **common)

    def _frame(
        self, fields: Mapping[Any, Any], received_ns: int, size: int, cut_short: str
    ) -> Frame:
        series = self._book.find(*_identity(fields))
        image_id = whole_number(fields.get("image_id"))
        try:
            if cut_short:
                raise MalformedMessage(cut_short)
            data = _channels(fields)
            channel, value = self._scored(data, series)
            shape, dtype, encoding, payload = _typed_array(value)
        except WireError as err:
            unknown = isinstance(err, UnsupportedEncoding)
            return self._book.enter(
                series,
                image_id,
                fault=Reason.UNKNOWN_ENCODING if unknown else Reason.MALFORMED,
                fault_detail=str(err),
                received_ns=received_ns,
                size_bytes=size,
            )
        return self._book.enter(
            series,
            image_id,
            shape=shape,
            channel=str(channel),
            dtype=dtype,
            encoding=encoding,
            payload=payload,
            others=_others(data, channel) if len(data) > 1 else (),
            received_ns=received_ns,
            size_bytes=size,
        )

    def _scored(self, data: Mapping[Any, Any], series: Series) -> tuple[Any, object]:
        """The channel to score and what it holds.

        The one that is set, else the first of the series. Another one in its place would be
        scored by the wrong mask. Only where the image has none that the series names is the
        image's own name for it taken.
        """
        wanted = self._channel or next(iter(series.channels), "")
        if wanted in data:
            return wanted, data[wanted]
        if self._channel or any(name in data for name in series.channels):
            raise MalformedMessage(
                f"an image without channel {wanted[:32]!r}; it has "
                f"{', '.join(repr(str(name)[:32]) for name in list(data)[:4])}; "
                "set [source] channel to one that every image has"
            )
        return next(iter(data.items()))


def _channels(fields: Mapping[Any, Any]) -> Mapping[Any, Any]:
    data = fields.get("data")
    if not isinstance(data, dict) or not data:
        raise MalformedMessage("an image without data; expected a map of channels")
    return data


def _others(data: Mapping[Any, Any], scored: object) -> tuple[Channel, ...]:
    """The channels beside the scored one; one that cannot be read does not spoil the frame."""
    others = []
    for name, value in data.items():
        if name == scored:
            continue
        try:
            shape, dtype, encoding, payload = _typed_array(value)
        except WireError:
            others.append(Channel(name=str(name)))
            continue
        others.append(
            Channel(name=str(name), encoding=encoding, dtype=dtype, shape=shape, payload=payload)
        )
    return tuple(others)


def _identity(fields: Mapping[Any, Any]) -> tuple[int, str]:
    unique = fields.get("series_unique_id")
    return whole_number(fields.get("series_id")), unique if isinstance(unique, str) else ""


def _typed_array(value: object) -> tuple[tuple[int, int], np.dtype[Any], str, Any]:
    """Shape (y, x), pixel type, encoding and bytes of a tag 40 array."""
    if isinstance(value, Tagged) and value.tag == _COLUMN_MAJOR_ARRAY:
        raise UnsupportedEncoding(f"pixels column by column (tag 1040); expected tag {_ARRAY}")
    if not isinstance(value, Tagged) or value.tag != _ARRAY:
        found = f"tag {value.tag}" if isinstance(value, Tagged) else type(value).__name__
        raise MalformedMessage(f"image data under {found}; expected tag {_ARRAY}")
    size, typed = _pair(value.value)
    rows, columns = _pair(size)
    # A boolean is an int to isinstance.
    if not (type(rows) is int and type(columns) is int and isinstance(typed, Tagged)):
        raise MalformedMessage("tag 40 without [[rows, columns], typed array]")
    if not (0 < rows < 2**31 and 0 < columns < 2**31):
        raise MalformedMessage(f"an array of {rows} x {columns}; expected at least 1 x 1")
    tag, content = typed.tag, typed.value
    dtype = _PIXEL_TYPES.get(tag)
    if dtype is None:
        raise UnsupportedEncoding(f"pixels under tag {tag}; expected a typed array of RFC 8746")
    if isinstance(content, memoryview):
        return (rows, columns), dtype, "raw", content
    if not (isinstance(content, Tagged) and content.tag == _COMPRESSION):
        raise MalformedMessage(f"no bytes under tag {tag}; expected them, or tag 56500")
    compressed = content.value
    if not (isinstance(compressed, list) and compressed and isinstance(compressed[0], str)):
        raise MalformedMessage(f"no bytes under tag {tag}; expected them, or tag 56500")
    algorithm = compressed[0]
    if algorithm not in _ALGORITHMS:
        # What an algorithm that is not known takes, is not known either.
        raise UnsupportedEncoding(f"compression {algorithm[:32]!r}; expected bslz4, lz4 or bszstd")
    element_bytes, data = _pair(compressed[1:])
    if not (isinstance(element_bytes, int) and isinstance(data, memoryview)):
        raise MalformedMessage(f"no bytes under tag {tag}; expected them, or tag 56500")
    if algorithm in _SHUFFLED and element_bytes != dtype.itemsize:
        raise MalformedMessage(
            f"{algorithm} of {element_bytes}-byte elements; expected {dtype.itemsize} for tag {tag}"
        )
    return (rows, columns), dtype, algorithm, data


def _pair(value: object) -> tuple[object, object]:
    """Both items of a list of two; nothing that anybody expects for anything else."""
    return (value[0], value[1]) if isinstance(value, list) and len(value) == 2 else (None, None)


def _series(fields: Mapping[Any, Any], channel: str) -> Series:
    series_id, unique = _identity(fields)
    channels = fields.get("channels")
    names = tuple(c for c in channels if isinstance(c, str)) if isinstance(channels, list) else ()
    size = (
        whole_number(fields.get("image_size_y"), 0),
        whole_number(fields.get("image_size_x"), 0),
    )
    saturation = whole_number(fields.get("saturation_value"))
    return Series(
        series_id=series_id,
        series_unique_id=unique,
        channels=names,
        image_size_y_px=max(0, size[0]),
        image_size_x_px=max(0, size[1]),
        number_of_images=whole_number(fields.get("number_of_images")),
        saturation_value=saturation if saturation > 0 else None,
        error_value=_error_value(fields),
        pixel_mask=usable_pixels(
            _map(fields.get("pixel_mask"), channel, names, size, "<u4"),
            _map(fields.get("flatfield"), channel, names, size, "<f4"),
        ),
        geometry=_geometry(fields),
        increments_deg=_angles(fields.get("goniometer"), "increment"),
        starts_deg=_angles(fields.get("goniometer"), "start"),
        count_time_s=number(fields.get("count_time")),
        frame_time_s=number(fields.get("frame_time")),
        detector_description=_text(fields.get("detector_description")),
        detector_serial_number=_text(fields.get("detector_serial_number")),
        sensor_material=_text(fields.get("sensor_material")),
        sensor_thickness_m=number(fields.get("sensor_thickness")),
    )


def _error_value(fields: Mapping[Any, Any]) -> int | None:
    """What marks a bad pixel; Jungfraujoch's signed data has the lowest value where none is told.

    A start message of Jungfraujoch is known by its ``magic_number``.
    """
    error = fields.get("error_value")
    if isinstance(error, int) and not isinstance(error, bool):
        return error
    dtype = fields.get("image_dtype")
    if "magic_number" in fields and dtype in ("int8", "int16", "int32"):
        return int(np.iinfo(dtype).min)
    return None


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _geometry(fields: Mapping[Any, Any]) -> Geometry | None:
    distance = number(fields.get("detector_distance"))
    translation = fields.get("detector_translation")
    if math.isnan(distance) or distance == 0:
        # An array of three, or the distance alone as Jungfraujoch once sent it.
        last = translation[-1] if isinstance(translation, list) and translation else translation
        distance = number(last)
    wavelength = number(fields.get("incident_wavelength"))
    energy = number(fields.get("incident_energy"))
    if not wavelength > 0 and energy > 0:
        wavelength = _HC_EV_ANGSTROM / energy
    return Geometry.from_values(
        beam_center_x_px=number(fields.get("beam_center_x")),
        beam_center_y_px=number(fields.get("beam_center_y")),
        pixel_size_x_m=number(fields.get("pixel_size_x")),
        pixel_size_y_m=number(fields.get("pixel_size_y")),
        detector_distance_m=distance,
        incident_wavelength_angstrom=wavelength,
    )


def _angles(goniometer: object, which: str) -> dict[str, float]:
    if not isinstance(goniometer, dict):
        return {}
    return {
        str(axis): number(values.get(which))
        for axis, values in goniometer.items()
        if isinstance(values, dict)
    }


def _map(
    maps: object, channel: str, channels: tuple[str, ...], size: tuple[int, int], dtype: str
) -> NDArray[Any] | None:
    """The map of the scored channel; one that does not fit the image is left out."""
    if not isinstance(maps, dict) or not maps:
        return None
    name = next((n for n in (channel, *channels) if n in maps), next(iter(maps)))
    try:
        shape, found, encoding, payload = _typed_array(maps[name])
    except WireError:
        return None
    if found != np.dtype(dtype) or shape != size:
        return None
    return decoded_map(payload, encoding, shape, dtype)

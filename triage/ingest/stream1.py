"""DECTRIS Stream V1: multipart JSON with raw blobs, as sent by firmware 1.6 to 1.8.

The header is two to nine parts, or the first two come as messages of their own; a blob may or
may not begin with its 12-byte header. Shapes are [x, y] on this wire.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triage.errors import MalformedMessage, UnsupportedEncoding, WireError
from triage.ingest.json_text import parsed_object
from triage.ingest.series import (
    SeriesBook,
    decoded_map,
    number,
    plain_text,
    usable_pixels,
    whole_number,
)
from triage.records import Geometry, Message, MessageKind, Reason, Series

__all__ = ["Stream1Parser", "separated"]

_MAX_JSON_BYTES = 1 << 20
"""A recorded header is 1.4 kB; a JSON part beyond this is not one."""

_IMAGE_PARTS = 4
"""Parts of an image message without its appendix."""

_OPENING = ("dheader-", "dimage-", "dseries_end-")
"""How the ``htype`` of a message's first part begins."""

_ENCODING = re.compile(r"(?:bs(?P<bits>8|16|32))?-?(?P<lz4>lz4)?(?P<order>[<>])")
_PIXEL_TYPES = ("uint8", "uint16", "uint32", "int16", "int32", "float32")
_HC_EV_ANGSTROM = 12398.419843320026
_AXES = ("chi", "kappa", "omega", "phi", "two_theta")


def separated(parts: Sequence[Any]) -> list[Sequence[Any]]:
    """The messages in one ZeroMQ message: one, but for senders that join what they have queued.

    tickit sends its header and first image as one. Taken for a header, it would hide the image.
    """
    if len(parts) <= _IMAGE_PARTS:
        return [parts]
    first = [0, *(i for i in range(1, len(parts)) if _opens_message(parts[i]))]
    return [parts[a:b] for a, b in zip(first, (*first[1:], len(parts)), strict=True)]


def _opens_message(part: Any) -> bool:
    view = memoryview(part)
    # The first part of a message says its type, series and number, and nothing long.
    if view.nbytes > 1024 or bytes(view[:1]) != b"{":
        return False
    try:
        return str(_json(view).get("htype", "")).startswith(_OPENING)
    except MalformedMessage:
        return False


class Stream1Parser:
    """Turns messages into :class:`triage.records.Message`; never raises on what it is sent.

    Args:
        book: the series of the stream, shared by the parsers of all its lanes.
        lane: index of the socket that is read.
    """

    def __init__(self, book: SeriesBook | None = None, lane: int = 0) -> None:
        self._book = book or SeriesBook()
        self._lane = lane
        self._header_id: int | None = None

    def parse(self, parts: Sequence[Any], received_ns: int) -> Message:
        """The meaning of one message; its parts are handed on as they are."""
        size = sum(memoryview(part).nbytes for part in parts)
        common: dict[str, Any] = {
            "parts": tuple(parts),
            "received_ns": received_ns,
            "size_bytes": size,
            "lane": self._lane,
        }
        try:
            first = _json(parts[0])
        except MalformedMessage as err:
            return Message(kind=MessageKind.MALFORMED, detail=str(err), **common)
        kind = str(first.get("htype", ""))[:64].rpartition("-")[0]
        if kind == "dimage":
            return self._image(first, parts, received_ns, size, common)
        if kind == "dheader":
            return self._header(first, parts, common)
        if kind == "dseries_end":
            series = self._book.find(whole_number(first.get("series")), "")
            return Message(kind=MessageKind.END, series=series, **common)
        if not kind and self._header_id is not None:
            # libertem's emulator sends the configuration as a message of its own.
            series_id, self._header_id = self._header_id, None
            series = self._book.start(_series(series_id, first, parts[1:]), self._lane)
            return Message(kind=MessageKind.START, series=series, **common)
        return Message(
            kind=MessageKind.CONTROL if kind else MessageKind.MALFORMED,
            detail=f"htype {first.get('htype')!r}"[:80],
            **common,
        )

    def _header(
        self, first: Mapping[str, Any], parts: Sequence[Any], common: dict[str, Any]
    ) -> Message:
        series_id = whole_number(first.get("series"))
        self._header_id = None
        configuration: Mapping[str, Any] = {}
        if first.get("header_detail") == "none":
            # What follows is an appendix, of any bytes.
            parts = parts[:1]
        elif len(parts) > 1:
            try:
                configuration = _json(parts[1])
            except MalformedMessage as err:
                return Message(kind=MessageKind.MALFORMED, detail=str(err), **common)
            if "htype" in configuration:
                configuration = {}
        else:
            self._header_id = series_id
        series = self._book.start(_series(series_id, configuration, parts[2:]), self._lane)
        return Message(kind=MessageKind.START, series=series, **common)

    def _image(
        self,
        first: Mapping[str, Any],
        parts: Sequence[Any],
        received_ns: int,
        size: int,
        common: dict[str, Any],
    ) -> Message:
        self._header_id = None
        values: dict[str, Any] = {
            "series": self._book.find(whole_number(first.get("series")), ""),
            "image_id": whole_number(first.get("frame")),
            "received_ns": received_ns,
            "size_bytes": size,
        }
        try:
            if len(parts) < 3:
                raise MalformedMessage(f"an image of {len(parts)} parts; expected 3 to 5")
            values |= _pixels(_json(parts[1]), memoryview(parts[2]).cast("B"))
        except WireError as err:
            unknown = isinstance(err, UnsupportedEncoding)
            values["fault"] = Reason.UNKNOWN_ENCODING if unknown else Reason.MALFORMED
            values["fault_detail"] = str(err)
        frame = self._book.enter(**values)
        return Message(kind=MessageKind.IMAGE, frame=frame, **common)


def _json(part: Any) -> Mapping[str, Any]:
    return parsed_object(part, _MAX_JSON_BYTES)


def _pixels(described: Mapping[str, Any], blob: memoryview) -> dict[str, Any]:
    """Frame fields from the image's description and blob."""
    match described.get("shape"):
        case [int(x), int(y)] if (
            0 < x < 2**31 and 0 < y < 2**31 and not isinstance(x, bool) and not isinstance(y, bool)
        ):
            shape = (y, x)
        case other:
            raise MalformedMessage(f"shape {str(other)[:40]}; expected [x, y]")
    kind = str(described.get("type"))[:32]
    if kind not in _PIXEL_TYPES:
        raise UnsupportedEncoding(f"type {kind!r}; expected one of {', '.join(_PIXEL_TYPES)}")
    text = str(described.get("encoding", ""))[:32]
    grammar = _ENCODING.fullmatch(text)
    if grammar is None:
        raise UnsupportedEncoding(f"encoding {text!r}; expected such as bs16-lz4<, lz4< or <")
    dtype = np.dtype(kind).newbyteorder("<" if grammar["order"] == "<" else ">")
    size = shape[0] * shape[1] * dtype.itemsize
    values: dict[str, Any] = {"shape": shape, "dtype": dtype, "payload": blob}
    if grammar["lz4"] is None:
        if grammar["bits"] is not None:
            raise UnsupportedEncoding(f"encoding {text!r}: bitshuffle without LZ4")
        return values | {"encoding": "raw"}
    if grammar["bits"] is None:
        return values | _with_header(values, "lz4", size, bare_is_normal=True)
    if int(grammar["bits"]) != 8 * dtype.itemsize:
        raise MalformedMessage(f"encoding {text!r} of {kind}; expected the pixels' width")
    return values | _with_header(values, "bslz4", size, bare_is_normal=False)


def _with_header(
    values: Mapping[str, Any], encoding: str, size: int, *, bare_is_normal: bool
) -> dict[str, Any]:
    """Whether the blob begins with the 12-byte header; emulators send it zeroed or not at all."""
    blob = values["payload"]
    if int.from_bytes(blob[:8], "big") == size:
        return {"encoding": encoding, "framed": True}
    if not bare_is_normal and bytes(blob[:12]) == bytes(12):
        return {"encoding": encoding, "framed": False, "payload": blob[12:]}
    return {"encoding": encoding, "framed": False}


def _series(series_id: int, configuration: Mapping[str, Any], parts: Sequence[Any]) -> Series:
    c = configuration
    size = (
        max(0, whole_number(c.get("y_pixels_in_detector"), 0)),
        max(0, whole_number(c.get("x_pixels_in_detector"), 0)),
    )
    cutoff = whole_number(c.get("countrate_correction_count_cutoff"))
    increments = {axis: number(c.get(f"{axis}_increment")) for axis in _AXES}
    starts = {axis: number(c.get(f"{axis}_start")) for axis in _AXES}
    return Series(
        series_id=series_id,
        image_size_y_px=size[0],
        image_size_x_px=size[1],
        number_of_images=_number_of_images(c),
        saturation_value=cutoff if cutoff > 0 else None,
        pixel_mask=usable_pixels(
            _map(parts, ("dpixelmask", "pixelmask"), size, "<u4"),
            _map(parts, ("dflatfield", "flatfield"), size, "<f4"),
        ),
        geometry=_geometry(c),
        increments_deg={axis: value for axis, value in increments.items() if value == value},
        starts_deg={axis: value for axis, value in starts.items() if value == value},
        rotation_told=bool(c),
        count_time_s=number(c.get("count_time")),
        frame_time_s=number(c.get("frame_time")),
        detector_description=plain_text(c.get("description", ""), 256),
        detector_serial_number=plain_text(c.get("detector_number", ""), 256),
        sensor_material=plain_text(c.get("sensor_material", ""), 64),
        sensor_thickness_m=number(c.get("sensor_thickness")),
    )


def _number_of_images(c: Mapping[str, Any]) -> int:
    """nimages per trigger for internal and external series, one per trigger for the others."""
    triggers = whole_number(c.get("ntrigger"), 1)
    if c.get("trigger_mode") in ("inte", "exte"):
        return triggers
    images = whole_number(c.get("nimages"))
    return images * triggers if images >= 0 else -1


def _geometry(c: Mapping[str, Any]) -> Geometry | None:
    distance = number(c.get("detector_distance"))
    translation = c.get("detector_translation")
    if not distance > 0 and isinstance(translation, list) and translation:
        distance = number(translation[-1])
    wavelength = number(c.get("wavelength"))
    energy = number(c.get("photon_energy"))
    if not wavelength > 0 and energy > 0:
        wavelength = _HC_EV_ANGSTROM / energy
    return Geometry.from_values(
        beam_center_x_px=number(c.get("beam_center_x")),
        beam_center_y_px=number(c.get("beam_center_y")),
        pixel_size_x_m=number(c.get("x_pixel_size")),
        pixel_size_y_m=number(c.get("y_pixel_size")),
        detector_distance_m=distance,
        incident_wavelength_angstrom=wavelength,
    )


def _map(
    parts: Sequence[Any], htypes: tuple[str, str], size: tuple[int, int], dtype: str
) -> NDArray[Any] | None:
    """The map of that type among the parts of a header with all details, where it fits the image.

    Args:
        htypes: how its type begins: as documented, and as an emulator writes it.
    """
    for described, blob in itertools.pairwise(parts):
        try:
            header = _json(described)
        except MalformedMessage:
            continue
        if str(header.get("htype", "")).startswith(htypes):
            return decoded_map(blob, "raw", size, dtype)
    return None

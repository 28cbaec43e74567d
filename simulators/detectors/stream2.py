"""Stream V2 messages as a detector sends them.

Written from the vendor's description: self-describing tag first, a map of definite length with
``type`` as its first key, floats always as floats, no nulls, rationals for times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import cbor2
import numpy as np
from numpy.typing import NDArray

from simulators.detectors.frames import SimFrame, StreamInfo

__all__ = [
    "array",
    "end_fields",
    "end_message",
    "image_fields",
    "image_message",
    "message",
    "start_fields",
    "start_message",
]

_TYPED_ARRAY = {"u1": 64, "u2": 69, "u4": 70, "i1": 72, "i2": 77, "i4": 78, "f4": 85}
_CLOCK_HZ = 50_000_000
_DATE = "2024-01-15T10:00:00.000+01:00"


def message(fields: Mapping[str, Any]) -> bytes:
    """A map as one message; its first key must be ``type``."""
    return cbor2.dumps(cbor2.CBORTag(55799, dict(fields)))


def array(image: NDArray[Any]) -> cbor2.CBORTag:
    """An uncompressed typed array of RFC 8746, (y, x)."""
    tag = _TYPED_ARRAY[image.dtype.str[1:]]
    return cbor2.CBORTag(40, [list(image.shape), cbor2.CBORTag(tag, image.tobytes())])


def start_message(info: StreamInfo, *, header_detail: str = "basic") -> bytes:
    """The start message; mask and flatfield only where ``header_detail`` is ``all``."""
    return message(start_fields(info, header_detail=header_detail))


def start_fields(info: StreamInfo, *, header_detail: str = "basic") -> dict[str, Any]:
    """What :func:`start_message` says."""
    fields: dict[str, Any] = {
        "type": "start",
        "series_id": info.series_id,
        "series_unique_id": info.series_unique_id,
        "arm_date": cbor2.CBORTag(0, _DATE),
        "beam_center_x": float(info.beam_center_x_px),
        "beam_center_y": float(info.beam_center_y_px),
        "channels": list(info.channels),
        "count_time": float(info.count_time_s),
        "countrate_correction_enabled": False,
        "detector_description": "Simulated EIGER",
        "detector_serial_number": "S-00-0000",
        "detector_translation": [0.0, 0.0, float(info.detector_distance_m)],
        "flatfield_enabled": False,
        "frame_time": float(info.count_time_s),
        "goniometer": {"omega": {"start": 0.0, "increment": float(info.omega_increment_deg)}},
        "image_dtype": np.dtype(info.dtype).name,
        "image_size_x": info.shape[1],
        "image_size_y": info.shape[0],
        "incident_energy": 12398.419843320026 / info.incident_wavelength_angstrom,
        "incident_wavelength": float(info.incident_wavelength_angstrom),
        "number_of_images": info.number_of_images,
        "pixel_mask_enabled": header_detail == "all",
        "pixel_size_x": float(info.pixel_size_x_m),
        "pixel_size_y": float(info.pixel_size_y_m),
        "saturation_value": info.saturation_value,
        "sensor_material": "Si",
        "sensor_thickness": 4.5e-4,
        "threshold_energy": dict.fromkeys(info.channels, 6199.2),
        "virtual_pixel_interpolation_enabled": False,
    }
    if header_detail == "all":
        flatfield = np.ones(info.shape, np.float32)
        mask = info.pixel_mask
        if mask is None:
            mask = np.zeros(info.shape, np.uint32)
        fields["flatfield"] = {name: array(flatfield) for name in info.channels}
        fields["pixel_mask"] = {name: array(mask) for name in info.channels}
    return fields


def image_message(
    info: StreamInfo, frame: SimFrame, image_id: int, user_data: object | None = None
) -> bytes:
    """One image message; every channel carries the same pixels."""
    return message(image_fields(info, frame, image_id, user_data))


def image_fields(
    info: StreamInfo, frame: SimFrame, image_id: int, user_data: object | None = None
) -> dict[str, Any]:
    """What :func:`image_message` says."""
    ticks = max(1, round(info.count_time_s * _CLOCK_HZ))
    array_tag = _TYPED_ARRAY[frame.dtype.str[1:]]
    content: Any = frame.payload
    if frame.encoding != "raw":
        modifier = 0 if frame.encoding == "lz4" else frame.dtype.itemsize
        content = cbor2.CBORTag(56500, [frame.encoding, modifier, frame.payload])
    data = cbor2.CBORTag(40, [list(frame.shape), cbor2.CBORTag(array_tag, content)])
    fields: dict[str, Any] = {
        "type": "image",
        "series_id": info.series_id,
        "series_unique_id": info.series_unique_id,
        "image_id": image_id,
        "real_time": [ticks, _CLOCK_HZ],
        "series_date": cbor2.CBORTag(0, _DATE),
        "start_time": [image_id * ticks, _CLOCK_HZ],
        "stop_time": [(image_id + 1) * ticks, _CLOCK_HZ],
    }
    if user_data is None and frame.truth:
        known = {name: float(v) for name, v in frame.truth.items() if not math.isnan(v)}
        user_data = {"truth": known}
    if user_data is not None:
        fields["user_data"] = user_data
    fields["data"] = dict.fromkeys(info.channels, data)
    return fields


def end_message(info: StreamInfo) -> bytes:
    """The end message."""
    return message(end_fields(info))


def end_fields(info: StreamInfo) -> dict[str, Any]:
    """What :func:`end_message` says."""
    return {
        "type": "end",
        "series_id": info.series_id,
        "series_unique_id": info.series_unique_id,
    }

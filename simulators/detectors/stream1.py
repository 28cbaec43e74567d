"""Stream V1 messages as firmware 1.8 sends them: lists of ZeroMQ parts."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from simulators.detectors.frames import SimFrame, StreamInfo

__all__ = ["end_parts", "header_parts", "image_parts"]


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document).encode()


def header_parts(info: StreamInfo, *, header_detail: str = "basic") -> list[bytes]:
    """The header: 1, 2 or 8 parts for ``none``, ``basic`` and ``all``."""
    parts = [
        _json({"htype": "dheader-1.0", "series": info.series_id, "header_detail": header_detail})
    ]
    if header_detail == "none":
        return parts
    y, x = info.shape
    parts.append(
        _json(
            {
                "auto_summation": True,
                "beam_center_x": info.beam_center_x_px,
                "beam_center_y": info.beam_center_y_px,
                "bit_depth_image": 8 * info.dtype.itemsize,
                "bit_depth_readout": 16,
                "chi_increment": 0.0,
                "chi_start": 0.0,
                "compression": "bslz4",
                "count_time": info.count_time_s,
                "countrate_correction_applied": False,
                "countrate_correction_count_cutoff": info.saturation_value,
                "data_collection_date": "2024-01-15T10:00:00.000+01:00",
                "description": "Simulated EIGER",
                "detector_distance": info.detector_distance_m,
                "detector_number": "S-00-0000",
                "detector_translation": [0.0, 0.0, info.detector_distance_m],
                "frame_time": info.count_time_s,
                "nimages": info.number_of_images,
                "ntrigger": 1,
                "omega_increment": info.omega_increment_deg,
                "omega_start": 0.0,
                "photon_energy": 12398.419843320026 / info.incident_wavelength_angstrom,
                "pixel_mask_applied": False,
                "sensor_material": "Si",
                "sensor_thickness": 4.5e-4,
                "trigger_mode": "ints",
                "wavelength": info.incident_wavelength_angstrom,
                "x_pixel_size": info.pixel_size_x_m,
                "x_pixels_in_detector": x,
                "y_pixel_size": info.pixel_size_y_m,
                "y_pixels_in_detector": y,
            }
        )
    )
    if header_detail == "basic":
        return parts
    mask = info.pixel_mask
    if mask is None:
        mask = np.zeros(info.shape, np.uint32)
    table = np.ones((1000, 2), np.float32)
    for htype, content, kind, shape in (
        ("dflatfield-1.0", np.ones(info.shape, np.float32), "float32", [x, y]),
        ("dpixelmask-1.0", mask, "uint32", [x, y]),
        ("dcountrate_table-1.0", table, "float32", [2, 1000]),
    ):
        parts += [_json({"htype": htype, "shape": shape, "type": kind}), content.tobytes()]
    return parts


def image_parts(
    info: StreamInfo, frame: SimFrame, image_id: int, appendix: object | None = None
) -> list[bytes]:
    """One image: 4 parts, 5 with an appendix. LZ4 alone travels as one bare block.

    Raises:
        ValueError: the frame's encoding has no form on this wire.
    """
    blob = frame.payload
    if frame.encoding == "bslz4":
        encoding = f"bs{8 * frame.dtype.itemsize}-lz4<"
    elif frame.encoding == "raw":
        encoding = "<"
    elif frame.encoding == "lz4" and int.from_bytes(blob[8:12], "big") >= len(blob):
        # One HDF5 block holds the whole image: without its 16 bytes of header it is bare.
        encoding, blob = "lz4<", blob[16:]
    else:
        raise ValueError(f"{frame.encoding} cannot travel in Stream V1; use bslz4 or raw")
    ticks_ns = round(info.count_time_s * 1e9)
    parts = [
        _json(
            {
                "htype": "dimage-1.0",
                "series": info.series_id,
                "frame": image_id,
                "hash": hashlib.md5(blob, usedforsecurity=False).hexdigest(),
            }
        ),
        _json(
            {
                "htype": "dimage_d-1.0",
                "shape": [frame.shape[1], frame.shape[0]],
                "type": frame.dtype.name,
                "encoding": encoding,
                "size": len(blob),
            }
        ),
        blob,
        _json(
            {
                "htype": "dconfig-1.0",
                "start_time": image_id * ticks_ns,
                "stop_time": (image_id + 1) * ticks_ns,
                "real_time": ticks_ns,
            }
        ),
    ]
    if appendix is not None:
        parts.append(json.dumps(appendix).encode())
    return parts


def end_parts(info: StreamInfo) -> list[bytes]:
    """The end of the series."""
    return [_json({"htype": "dseries_end-1.0", "series": info.series_id})]

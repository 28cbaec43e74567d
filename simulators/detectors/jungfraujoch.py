"""Messages of Jungfraujoch (PSI): Stream V2 with additions, over one socket or several.

Start and end go to every socket, the calibration to the first, which is told to write the master
file; images are split by the number of the file that they belong to. Fields beyond those of Stream
V2 are what its documentation, its clients and its REST models name; a reader goes by key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import cbor2
import numpy as np

from simulators.detectors import stream2
from simulators.detectors.faults import Sent
from simulators.detectors.frames import SimFrame, StreamInfo

__all__ = ["image", "series"]

_INTERFACE_VERSION = 5
_ENCODINGS = ("bslz4", "bszstd", "raw")
_BUNDLED = 100
"""Images that one metadata message speaks of."""


def series(
    info: StreamInfo,
    frames: Sequence[SimFrame],
    *,
    lanes: int = 1,
    images_per_file: int = 1000,
    header_detail: str = "basic",
    one_distance: bool = False,
) -> Iterator[Sent]:
    """One series over ``lanes`` sockets, cycling through ``frames``.

    Args:
        one_distance: ``detector_translation`` as one number, as versions before 2025-10 send it.
    """
    named = _named(info)
    for lane in range(lanes):
        yield _start(named, lane, images_per_file, header_detail, one_distance=one_distance)
    yield _calibration(named)
    for image_id in range(info.number_of_images):
        lane = image_id // images_per_file % lanes
        yield image(info, frames[image_id % len(frames)], image_id, lane=lane)
        if image_id % _BUNDLED == _BUNDLED - 1:
            yield _metadata(named, range(image_id + 1 - _BUNDLED, image_id + 1))
    for lane in range(lanes):
        yield _end(named, lane)


def _named(info: StreamInfo) -> StreamInfo:
    """The run's name: number, colon, prefix."""
    return replace(
        info, series_unique_id=f"{info.series_id}:run{info.series_id}", channels=("default",)
    )


def _start(
    info: StreamInfo, lane: int, images_per_file: int, header_detail: str, *, one_distance: bool
) -> Sent:
    distance = float(info.detector_distance_m)
    fields = stream2.start_fields(info, header_detail=header_detail) | {
        "magic_number": _INTERFACE_VERSION,
        "detector_distance": distance,
        "detector_translation": distance if one_distance else [0.0, 0.0, distance],
        "images_per_file": images_per_file,
        "write_master_file": lane == 0,
        "user_data": {"file_prefix": f"run{info.series_id}", "user": {"sample": "simulated"}},
    }
    if info.error_value is not None:
        fields["error_value"] = info.error_value
    return Sent(kind="start", parts=(stream2.message(fields),), lane=lane)


def _calibration(info: StreamInfo) -> Sent:
    pedestal = stream2.array(np.full(info.shape, 2500, np.uint16))
    fields = {"type": "calibration", "data": {"pedestal_G0": pedestal}}
    return Sent(kind="control", parts=(stream2.message(fields),))


def image(info: StreamInfo, frame: SimFrame, image_id: int, *, lane: int = 0) -> Sent:
    """One image with what the analysis on board says of it.

    Raises:
        ValueError: an encoding that Jungfraujoch does not send.
    """
    if frame.encoding not in _ENCODINGS:
        raise ValueError(f"{frame.encoding} is not sent by Jungfraujoch; use bslz4 or bszstd")
    packets = info.shape[0] * info.shape[1] // 4096
    truth = {name: float(value) for name, value in frame.truth.items() if value == value}
    fields = stream2.image_fields(_named(info), frame, image_id, {"user": {"truth": truth}}) | {
        "packets_expected": packets,
        "packets_received": packets,
        "bkg_estimate": 0.5,
        "ice_ring_score": 1.0,
        "spots": [{"x": 10.5, "y": 20.5, "I": 30.0}],
        "spot_count": 1,
        "indexing_result": False,
        "xfel_pulse_id": image_id,
    }
    return Sent(kind="image", parts=(stream2.message(fields),), image_id=image_id, lane=lane)


def _metadata(info: StreamInfo, image_ids: Sequence[int]) -> Sent:
    """What is known of several images, without their pixels."""
    fields = {
        "type": "metadata",
        "series_id": info.series_id,
        "series_unique_id": info.series_unique_id,
        "images": [{"image_id": image_id, "spot_count": 1} for image_id in image_ids],
    }
    return Sent(kind="control", parts=(stream2.message(fields),))


def _end(info: StreamInfo, lane: int) -> Sent:
    fields = stream2.end_fields(info) | {
        "end_date": cbor2.CBORTag(0, "2024-01-15T10:00:01.000+01:00"),
        "max_image_number": info.number_of_images,
    }
    return Sent(kind="end", parts=(stream2.message(fields),), lane=lane)

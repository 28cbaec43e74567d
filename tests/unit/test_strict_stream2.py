"""Our Stream V2 messages against a reader as strict as the vendor's C example."""

from __future__ import annotations

import cbor2
import numpy as np
import pytest
from pictures import on_the_wire
from strict_reader import array, strictly

from simulators.detectors import stream2
from simulators.detectors.detector import series_messages, unique_id
from simulators.detectors.frames import StreamInfo


@pytest.mark.parametrize("header_detail", ["basic", "all"])
@pytest.mark.parametrize("encoding", ["bslz4", "lz4", "raw"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_a_strict_client_reads_every_message(dtype: str, encoding: str, header_detail: str) -> None:
    """start, images of three channels, end: accepted whole, pixels as they were made."""
    image = np.random.default_rng(1).poisson(3.0, (40, 56)).astype(dtype)
    frame = on_the_wire(image, encoding, truth={"n_visible": 3.0, "ice": float("nan")})
    info = StreamInfo(
        series_id=3,
        series_unique_id=unique_id(3, 0),
        shape=image.shape,
        dtype=image.dtype,
        number_of_images=2,
        channels=("threshold_1", "threshold_2", "difference"),
        saturation_value=200,
        # Whole numbers are where an encoder would be tempted to write an integer.
        beam_center_x_px=24,
        beam_center_y_px=20,
        detector_distance_m=1,
        count_time_s=1,
    )
    messages = [
        strictly(sent.parts[0])
        for sent in series_messages(info, [frame], header_detail=header_detail)
    ]
    assert [m["type"] for m in messages] == ["start", "image", "image", "end"]
    start, first, _, end = messages
    assert len(start["series_unique_id"]) == len(end["series_unique_id"]) == 26
    assert [type(v) for v in start["detector_translation"]] == [float] * 3
    assert (start["image_size_y"], start["image_size_x"]) == image.shape
    assert ("pixel_mask" in start) == (header_detail == "all")
    for masks in (start.get("pixel_mask", {}), start.get("flatfield", {})):
        assert all(array(mask).shape == image.shape for mask in masks.values())
    assert list(first["data"]) == start["channels"]
    assert all(np.array_equal(array(data), image) for data in first["data"].values())
    assert first["user_data"] == {"truth": {"n_visible": 3.0}}


def test_the_strict_reader_would_notice() -> None:
    """Each deviation that the vendor's client refuses is refused here too."""
    good = cbor2.loads(stream2.start_message(StreamInfo(shape=(4, 4)))[3:])
    magic = b"\xd9\xd9\xf7"
    strictly(magic + cbor2.dumps(good))
    deviations = (
        cbor2.dumps(good),
        magic + cbor2.dumps({k: good[k] for k in reversed(good)}),
        magic + cbor2.dumps({**good, "count_time": 1}),
        magic + cbor2.dumps({**good, "sensor_material": None}),
        magic + cbor2.dumps({**good, "saturation_value": -1}),
        magic + cbor2.dumps({**good, "type": "calibration"}),
    )
    for message in deviations:
        with pytest.raises(AssertionError):
            strictly(message)

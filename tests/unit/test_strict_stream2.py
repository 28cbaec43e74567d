"""Our Stream V2 messages against a reader as strict as the vendor's C example.

That client refuses a message without the self-describing tag, with ``type`` elsewhere than
first, with an integer where a float is due, with a null, a negative saturation value, an
unknown type, or compressed bytes without their HDF5 framing.
"""

from __future__ import annotations

from typing import Any

import cbor2
import h5py
import hdf5plugin
import numpy as np
import pytest

from simulators.detectors import stream2
from simulators.detectors.detector import series_messages, unique_id
from simulators.detectors.frames import SimFrame, StreamInfo, compressed

FLOATS = (
    "beam_center_x", "beam_center_y", "count_time", "frame_time", "incident_energy",
    "incident_wavelength", "pixel_size_x", "pixel_size_y", "sensor_thickness",
)  # fmt: skip
UNSIGNED = (
    "series_id", "image_id", "number_of_images", "image_size_x", "image_size_y",
    "saturation_value",
)  # fmt: skip
BOOLEANS = (
    "countrate_correction_enabled", "flatfield_enabled", "pixel_mask_enabled",
    "virtual_pixel_interpolation_enabled",
)  # fmt: skip
SIZES = {64: 1, 69: 2, 70: 4, 85: 4}
TYPES = {64: "<u1", 69: "<u2", 70: "<u4", 85: "<f4"}


def strictly(message: bytes) -> dict[str, Any]:
    """The message as a map, or the complaint of a client that accepts nothing unusual."""
    assert message[:3] == b"\xd9\xd9\xf7", "no self-describing tag"
    assert message[3] >> 5 == 5, "no map"
    assert message[3] != 0xBF, "a map of indefinite length"
    fields = cbor2.loads(message[3:])
    assert next(iter(fields)) == "type", "type is not the first key"
    assert fields["type"] in ("start", "image", "end"), "unknown type"
    for name, value in fields.items():
        assert value is not None, f"{name} is null"
        if name in FLOATS:
            assert type(value) is float, f"{name} is no float"
        elif name in UNSIGNED:
            assert type(value) is int, f"{name} is no integer"
            assert value >= 0, f"{name} is negative"
        elif name in BOOLEANS:
            assert type(value) is bool, f"{name} is no boolean"
    for name in ("real_time", "start_time", "stop_time"):
        if name in fields:
            assert [type(part) for part in fields[name]] == [int, int], f"{name} is no rational"
    return dict(fields)


def array(value: Any) -> np.ndarray[Any, Any]:
    """A tag 40 array decoded by HDF5's own filters."""
    assert value.tag == 40
    (rows, columns), typed = value.value
    assert typed.tag in SIZES
    content = typed.value
    dtype = np.dtype(TYPES[typed.tag])
    if isinstance(content, bytes):
        return np.frombuffer(content, dtype).reshape(rows, columns)
    assert content.tag == 56500
    algorithm, modifier, payload = content.value
    assert algorithm in ("bslz4", "lz4")
    assert modifier == (SIZES[typed.tag] if algorithm == "bslz4" else 0)
    assert int.from_bytes(payload[:8], "big") == rows * columns * SIZES[typed.tag]
    assert int.from_bytes(payload[8:12], "big") > 0
    options = hdf5plugin.LZ4() if algorithm == "lz4" else hdf5plugin.Bitshuffle(cname="lz4")
    with h5py.File.in_memory() as file:
        shape = (rows, columns)
        dataset = file.create_dataset("d", shape, dtype, chunks=shape, **options)
        dataset.id.write_direct_chunk((0, 0), payload)
        decoded: np.ndarray[Any, Any] = dataset[()]
    return decoded


@pytest.mark.parametrize("header_detail", ["basic", "all"])
@pytest.mark.parametrize("encoding", ["bslz4", "lz4", "raw"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_a_strict_client_reads_every_message(dtype: str, encoding: str, header_detail: str) -> None:
    """start, images of three channels, end: accepted whole, pixels as they were made."""
    image = np.random.default_rng(1).poisson(3.0, (40, 56)).astype(dtype)
    frame = SimFrame(
        payload=compressed(image, encoding),
        encoding=encoding,
        dtype=image.dtype,
        shape=image.shape,
        truth={"n_visible": 3.0, "ice": float("nan")},
    )
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

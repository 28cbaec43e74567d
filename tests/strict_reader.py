"""A Stream V2 reader as strict as the vendor's C example.

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

"""Pictures for tests of backends, and payloads of them that another encoder wrote."""

from __future__ import annotations

from typing import Any

import h5py
import hdf5plugin
import numpy as np

from simulators.detectors.frames import SimFrame, compressed


def encode(pixels: np.ndarray, encoding: str, block_bytes: int = 0) -> bytes:
    """A framed payload by hdf5plugin's encoders, or the plain bytes."""
    if encoding == "raw":
        return pixels.tobytes()
    item = pixels.dtype.itemsize
    options = {
        "bslz4": lambda: hdf5plugin.Bitshuffle(nelems=block_bytes // item, cname="lz4"),
        "bszstd": lambda: hdf5plugin.Bitshuffle(nelems=block_bytes // item, cname="zstd"),
        "lz4": lambda: hdf5plugin.LZ4(nbytes=block_bytes),
    }[encoding]()
    with h5py.File("encode", "w", driver="core", backing_store=False) as file:
        dataset = file.create_dataset("d", data=pixels, chunks=pixels.shape, **options)
        return bytes(dataset.id.read_direct_chunk((0, 0))[1])


def on_the_wire(image: np.ndarray, encoding: str, **more: Any) -> SimFrame:
    """An image as a simulated detector sends it."""
    return SimFrame(
        payload=compressed(image, encoding),
        encoding=encoding,
        dtype=image.dtype,
        shape=image.shape,
        **more,
    )


def picture(dtype: str, shape: tuple[int, int], seed: int = 7) -> np.ndarray:
    """Weak background, spots, and the values that mark bad pixels or overflow."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    values = rng.poisson(1.5, shape).astype(np.float64)
    spots = rng.random(shape) < 0.02
    values[spots] = rng.integers(5, 100, int(spots.sum()))
    if kind.kind == "f":
        values += rng.choice([0.0, 0.25, 0.5], shape)
        for odd in (np.nan, np.inf, -np.inf, -3.5, -0.4, 2.0**31, 2.0**32, 1e30):
            values[rng.integers(shape[0]), rng.integers(shape[1])] = odd
        return values.astype(kind)
    info = np.iinfo(kind)
    pixels = values.astype(kind)
    odd_ones = [info.max, info.max - 1, info.max - 2, info.max - 3]
    if kind.kind == "i":
        odd_ones += [info.min, -1, -2, info.min + 1]
    for odd_one in odd_ones * 3:
        pixels[rng.integers(shape[0]), rng.integers(shape[1])] = odd_one
    return pixels

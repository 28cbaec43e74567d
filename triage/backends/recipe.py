"""The parts of the input recipe that every backend shares: bounds, bins and places.

Everything here is a pure function of shape, dtype, series or integers that all backends agree
on bit for bit, so it runs on the host for each of them.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triage.errors import DecodeError, UnsupportedEncoding
from triage.records import Frame, Geometry, Recipe, Series

__all__ = [
    "EXPECTED_MAXIMUM",
    "SPOT_EXCESS",
    "Limits",
    "SeriesMaps",
    "checked_size_bytes",
    "limits",
    "tile_places",
]

EXPECTED_MAXIMUM = {2: 1.03, 4: 1.77, 8: 2.37, 16: 2.83, 32: 3.24}
"""Expected largest of k^2 standard normals, by simulation (order statistics tables agree)."""

SPOT_EXCESS = 4.0
"""Cells whose maximum stands this many sigma out hold a spot and are left out of the rings."""

_LARGEST_FRAME_BYTES = 1 << 30
_LZ4_LARGEST_RATIO = 255
_DTYPES = ("u1", "u2", "u4", "i2", "i4", "f4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Which values of a frame are measurements.

    A value v counts when ``v <= high``, ``v != error`` and, where ``negative_is_invalid``,
    ``v >= 0``; a negative value that counts, counts as 0.
    """

    high: int
    error: int
    negative_is_invalid: bool


NO_ERROR_VALUE = -(2**62)
"""Stands for "none" in :attr:`Limits.error`: no pixel type reaches it."""


def limits(dtype: np.dtype[Any], series: Series) -> Limits:
    """The bounds of valid counts.

    The largest value of an integer type is the vendors' "no data", and the one below it marks
    defects unless the series declares a saturation value. Signed pixels without an error value
    are PILATUS-like: negative means gap or dead. With one they are Jungfraujoch's, where
    negative is noise around zero.
    """
    saturation = series.saturation_value
    if dtype.kind == "f":
        high = 2**31 if saturation is None else min(saturation, 2**31)
        return Limits(high=high, error=NO_ERROR_VALUE, negative_is_invalid=False)
    top = int(np.iinfo(dtype).max)
    high = top - 2 if saturation is None else min(saturation, top - 1)
    error = series.error_value
    return Limits(
        high=high,
        error=NO_ERROR_VALUE if error is None else error,
        negative_is_invalid=dtype.kind == "i" and error is None,
    )


def checked_size_bytes(frame: Frame, payload_bytes: int) -> int:
    """The decoded size, once it is known to be sane; nothing is allocated before this.

    Raises:
        UnsupportedEncoding: a pixel type that is not read.
        DecodeError: a size that the payload cannot hold.
    """
    if frame.dtype.str[1:] not in _DTYPES:
        raise UnsupportedEncoding(
            f"image {frame.image_id}: pixel type {frame.dtype.str}; expected one of "
            f"{', '.join(_DTYPES)}; the frame goes on unscored"
        )
    y, x = frame.shape
    size = y * x * frame.dtype.itemsize
    if min(y, x) < 1 or size > _LARGEST_FRAME_BYTES:
        raise DecodeError(
            f"image {frame.image_id}: shape {frame.shape} of {frame.dtype.str}; "
            f"expected 1 byte to {_LARGEST_FRAME_BYTES} bytes"
        )
    ratio = 1 if frame.encoding == "raw" else _LZ4_LARGEST_RATIO
    if frame.encoding != "bszstd" and size > ratio * payload_bytes:
        raise DecodeError(
            f"image {frame.image_id}: {payload_bytes} bytes of {frame.encoding} cannot hold "
            f"shape {frame.shape} of {frame.dtype.str} ({size} bytes)"
        )
    return size


class SeriesMaps:
    """What depends on a series or geometry alone, kept for the last few of them."""

    def __init__(self, recipe: Recipe, keep: int = 4) -> None:
        self._recipe = recipe
        self._keep = keep
        self._masks: OrderedDict[int, tuple[Series, NDArray[np.uint8]]] = OrderedDict()
        self._bins: OrderedDict[tuple[Any, ...], NDArray[np.int32]] = OrderedDict()

    def invalid(self, frame: Frame) -> NDArray[np.uint8]:
        """(y, x) uint8, 1 where the mask leaves a pixel out; (0, 0) when there is no mask.

        Raises:
            DecodeError: the mask has another shape than the frame.
        """
        series = frame.series
        if series.pixel_mask is None:
            return _NO_MASK
        if series.pixel_mask.shape != frame.shape:
            raise DecodeError(
                f"image {frame.image_id}: shape {frame.shape}, but the pixel mask of series "
                f"{series.series_id} has {series.pixel_mask.shape}; expected the same"
            )
        found = self._masks.get(id(series))
        if found is None or found[0] is not series:
            # NXmx: the low 16 bits say why a pixel is not to be used.
            found = (series, ((series.pixel_mask & 0xFFFF) != 0).astype(np.uint8))
            self._masks[id(series)] = found
            while len(self._masks) > self._keep:
                self._masks.popitem(last=False)
        return found[1]

    def radial_bins(self, shape: tuple[int, int], k: int, geometry: Geometry) -> NDArray[np.int32]:
        """(grid, grid) int32: sector * radial_bins + bin of each cell, -1 outside.

        By the cell's centre: 1/d^2 = (2 sin(theta) / lambda)^2 with tan(2 theta) = r / D.
        """
        key = (shape, k, geometry)
        bins = self._bins.get(key)
        if bins is None:
            bins = self._bins[key] = _radial_bins(shape, k, geometry, self._recipe)
            while len(self._bins) > self._keep:
                self._bins.popitem(last=False)
        return bins


_NO_MASK = np.zeros((0, 0), np.uint8)


def _radial_bins(
    shape: tuple[int, int], k: int, geometry: Geometry, recipe: Recipe
) -> NDArray[np.int32]:
    centre = (np.arange(recipe.grid) + 0.5) * k
    dx = (centre[None, :] - geometry.beam_center_x_px) * geometry.pixel_size_x_m
    dy = (centre[:, None] - geometry.beam_center_y_px) * geometry.pixel_size_y_m
    two_theta = np.arctan2(np.hypot(dx, dy), geometry.detector_distance_m)
    s = (2.0 * np.sin(0.5 * two_theta) / geometry.incident_wavelength_angstrom) ** 2
    ring = np.floor(s / recipe.s_max_inverse_angstrom2 * recipe.radial_bins).astype(np.int64)
    turn = (np.arctan2(dy, dx) / (2.0 * math.pi)) % 1.0
    sector = np.minimum((turn * recipe.sectors).astype(np.int64), recipe.sectors - 1)
    bins = np.where(ring < recipe.radial_bins, sector * recipe.radial_bins + ring, -1)
    bins[-(-shape[0] // k) :, :] = -1
    bins[:, -(-shape[1] // k) :] = -1
    return bins.astype(np.int32)


def tile_places(
    excess: NDArray[np.float32], count: NDArray[np.uint16], k: int, recipe: Recipe
) -> list[tuple[int, int]]:
    """(y, x) cells of the strongest excess, each at least a tile away from the stronger ones.

    Equal cells are taken in row-major order. At most ``recipe.tiles`` of them.
    """
    left = np.where(count > 0, excess, np.float32(-np.inf))
    reach = -(-recipe.tile_px // k) - 1
    places: list[tuple[int, int]] = []
    while len(places) < recipe.tiles:
        y, x = divmod(int(np.argmax(left)), left.shape[1])
        if left[y, x] == -np.inf:
            break
        places.append((y, x))
        left[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1] = -np.inf
    return places

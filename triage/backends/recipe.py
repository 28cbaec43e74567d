"""The parts of the input recipe that every backend shares: bounds, bins and places.

Everything here is a pure function of shape, dtype, series or integers that all backends agree
on bit for bit, so it runs on the host for each of them.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numba as nb
import numpy as np
from numpy.typing import NDArray

from triage.errors import ConfigError, DecodeError, UnsupportedEncoding
from triage.records import EXPECTED_MAXIMUM, Frame, Geometry, Recipe, Series, Views

__all__ = [
    "ANSCOMBE",
    "CLIP_SIGMA",
    "SPOT_EXCESS",
    "Limits",
    "SeriesMaps",
    "as_photons",
    "bin_factor",
    "check_recipe",
    "limits",
    "measured",
    "tile_corners",
]

ANSCOMBE = np.float32(0.375)
"""2 sqrt(n + 3/8) of a Poisson count n has a variance near one (Anscombe, 1948)."""

SPOT_EXCESS = np.float32(4.0)
"""Cells whose maximum stands this many sigma out hold a spot and are left out of the rings."""

CLIP_SIGMA = 3.0
"""By so many of Poisson's sigma a cell may exceed its ring; it is clipped to that. So the light of
spots that are wider than a cell counts for less, whose maximum does not stand out. In double
precision, because totals have more digits than a float."""

NO_ERROR_VALUE = -(2**62)
"""Stands for "none" in :attr:`Limits.error`: no pixel type reaches it."""

_LARGEST_PHOTONS = 2**31
"""Float pixels above this are no counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Which values of a frame are measurements.

    A value v counts when ``v <= high``, ``v != error`` and, where ``negative_is_invalid``,
    ``v >= 0``; a negative value that counts, counts as 0.
    """

    high: int
    error: int
    negative_is_invalid: bool


def limits(dtype: np.dtype[Any], series: Series) -> Limits:
    """The bounds of valid counts.

    The largest value of an integer type is the vendors' "no data", and the one below it marks
    defects unless the series declares a saturation value. Signed pixels without an error value
    are PILATUS-like: negative means gap or dead. With one they are Jungfraujoch's, where
    negative is noise around zero. Declared values beyond any pixel type are brought to its edge.
    """
    saturation = series.saturation_value
    signed = dtype.kind == "i"
    if dtype.kind == "f":
        high = _LARGEST_PHOTONS if saturation is None else min(saturation, _LARGEST_PHOTONS)
    else:
        top = int(np.iinfo(dtype).max)
        high = top - 2 if saturation is None else min(saturation, top - 1)
    error = NO_ERROR_VALUE
    if signed and series.error_value is not None and abs(series.error_value) < 2**32:
        error = series.error_value
    return Limits(
        high=max(high, -(2**33)),
        error=error,
        negative_is_invalid=signed and series.error_value is None,
    )


class SeriesMaps:
    """What depends on a mask or geometry alone, kept for the last few of them.

    Series that follow each other have the very same mask where it did not change.
    """

    def __init__(self, recipe: Recipe, keep: int = 4) -> None:
        self._recipe = recipe
        self._keep = keep
        self._masks: OrderedDict[int, tuple[NDArray[Any], NDArray[np.uint8]]] = OrderedDict()
        self._cells: OrderedDict[tuple[Any, ...], tuple[Any, ...]] = OrderedDict()
        self._bins: OrderedDict[tuple[Any, ...], tuple[NDArray[np.int32], ...]] = OrderedDict()
        self._rings: OrderedDict[tuple[Any, ...], NDArray[np.float32]] = OrderedDict()

    def invalid(self, frame: Frame) -> NDArray[np.uint8]:
        """(y, x) uint8, 1 where the mask leaves a pixel out; (0, 0) when there is no mask.

        Raises:
            DecodeError: the mask has another shape than the frame.
        """
        mask = _mask_of(frame)
        if mask is None:
            return _NO_MASK
        found = self._masks.get(id(mask))
        if found is None or found[0] is not mask:
            found = (mask, _masked(mask).astype(np.uint8))
            self._put(self._masks, id(mask), found)
        return found[1]

    def cells(self, frame: Frame, k: int) -> tuple[NDArray[np.uint8] | None, NDArray[np.uint16]]:
        """What the mask lets through: as bits, and counted per cell of k x k pixels.

        The bits stand in the order of the pixels, the first in the lowest bit of a byte, with 64
        bytes more behind them; None where there is no mask. The counts are
        (ceil(y / k), grid) uint16.

        Raises:
            DecodeError: the mask has another shape than the frame.
        """
        mask, shape = _mask_of(frame), frame.shape
        key = id(mask), shape, k
        found = self._cells.get(key)
        if found is None or found[0] is not mask:
            valid = np.ones(shape, np.bool_) if mask is None else ~_masked(mask)
            bits = None
            if mask is not None:
                bits = np.zeros(-(-valid.size // 8) + 64, np.uint8)
                bits[: -(-valid.size // 8)] = np.packbits(valid, bitorder="little")
            found = (mask, bits, _valid_per_cell(valid, k, self._recipe.grid))
            self._put(self._cells, key, found)
        return found[1], found[2]

    def radial_bins(
        self, shape: tuple[int, int], k: int, geometry: Geometry
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Where each cell counts, and how many cells count there.

        (grid, grid) int32: sector * radial_bins + bin of each cell, -1 outside; by the cell's
        centre, 1/d^2 = (2 sin(theta) / lambda)^2 with tan(2 theta) = r / D. (sectors *
        radial_bins,) int32: the number of cells of each.
        """
        key = (shape, k, geometry)
        found = self._bins.get(key)
        if found is None:
            bins = _radial_bins(shape, k, geometry, self._recipe)
            places = self._recipe.sectors * self._recipe.radial_bins
            found = bins, np.bincount(bins[bins >= 0], minlength=places).astype(np.int32)
            self._put(self._bins, key, found)
        return found[0], found[1]

    def rings(
        self, shape: tuple[int, int], k: int, geometry: Geometry | None
    ) -> NDArray[np.float32]:
        """(ceil(y / k), ceil(x / k)) distance of each cell's middle from the beam, in cells; (0, 0)
        where the geometry is not known."""
        if geometry is None:
            return _NO_RINGS
        key = (shape, k, geometry)
        found = self._rings.get(key)
        if found is None:
            found = _rings(shape, k, geometry)
            self._put(self._rings, key, found)
        return found

    def _put(self, kept: OrderedDict[Any, Any], key: Any, value: Any) -> None:
        kept[key] = value
        while len(kept) > self._keep:
            kept.popitem(last=False)


_NO_MASK = np.zeros((0, 0), np.uint8)
_NO_RINGS = np.zeros((0, 0), np.float32)
_FARTHEST_CELLS = 1e5


def _mask_of(frame: Frame) -> NDArray[Any] | None:
    """The series' mask, seen to fit the frame."""
    mask = frame.series.pixel_mask
    if mask is not None and mask.shape != frame.shape:
        raise DecodeError(
            f"image {frame.image_id}: shape {frame.shape}, but the pixel mask of series "
            f"{frame.series.series_id} has {mask.shape}; expected the same"
        )
    return mask


def _masked(mask: NDArray[Any]) -> NDArray[np.bool_]:
    """NXmx: the low 16 bits say why a pixel is not to be used."""
    out: NDArray[np.bool_] = (mask & 0xFFFF) != 0
    return out


def _valid_per_cell(valid: NDArray[np.bool_], k: int, grid: int) -> NDArray[np.uint16]:
    rows, columns = -(-valid.shape[0] // k), -(-valid.shape[1] // k)
    padded = np.zeros((rows * k, columns * k), np.uint16)
    padded[: valid.shape[0], : valid.shape[1]] = valid
    counts = np.zeros((rows, grid), np.uint16)
    counts[:, :columns] = padded.reshape(rows, k, columns, k).sum((1, 3), dtype=np.uint16)
    return counts


def _rings(shape: tuple[int, int], k: int, geometry: Geometry) -> NDArray[np.float32]:
    y, x = (np.arange(-(-side // k)) + 0.5 for side in shape)
    dx = x - geometry.beam_center_x_px / k
    dy = (y - geometry.beam_center_y_px / k) * geometry.pixel_size_y_m / geometry.pixel_size_x_m
    # A centre that is far off, or is no number, gives rings that say nothing, and no more of them
    # than this.
    away: NDArray[np.float64] = np.fmin(np.hypot(dx[None, :], dy[:, None]), _FARTHEST_CELLS)
    return away.astype(np.float32)


def _radial_bins(
    shape: tuple[int, int], k: int, geometry: Geometry, recipe: Recipe
) -> NDArray[np.int32]:
    centre = (np.arange(recipe.grid) + 0.5) * k
    s = geometry.inverse_d(centre[None, :], centre[:, None]) ** 2
    dx = (centre[None, :] - geometry.beam_center_x_px) * geometry.pixel_size_x_m
    dy = (centre[:, None] - geometry.beam_center_y_px) * geometry.pixel_size_y_m
    ring = np.floor(s / recipe.s_max_inverse_angstrom2 * recipe.radial_bins).astype(np.int64)
    turn = (np.arctan2(dy, dx) / (2.0 * math.pi)) % 1.0
    sector = np.minimum((turn * recipe.sectors).astype(np.int64), recipe.sectors - 1)
    bins = np.where(ring < recipe.radial_bins, sector * recipe.radial_bins + ring, -1)
    bins[-(-shape[0] // k) :, :] = -1
    bins[:, -(-shape[1] // k) :] = -1
    return bins.astype(np.int32)


def check_recipe(recipe: Recipe) -> None:
    """See that every bin factor of the recipe is one whose noise is known.

    Raises:
        ConfigError: it is not.
    """
    unknown = [k for k in recipe.bin_factors if k not in EXPECTED_MAXIMUM]
    if unknown or not recipe.bin_factors:
        raise ConfigError(
            f"recipe: bin_factors {recipe.bin_factors}; expected some of {tuple(EXPECTED_MAXIMUM)}"
        )


def bin_factor(recipe: Recipe, frame: Frame) -> int:
    """The recipe's bin factor for this frame.

    Raises:
        UnsupportedEncoding: the frame is too large for the recipe.
    """
    try:
        return recipe.bin_factor(frame.shape)
    except ValueError as err:
        raise UnsupportedEncoding(f"image {frame.image_id}: {err}") from err


def as_photons(pixels: NDArray[Any], bounds: Limits) -> NDArray[Any]:
    """Integer pixels as they are; float32 ones rounded half to even, as int64.

    What is not finite, or beyond ``bounds.high`` once rounded, becomes ``bounds.high + 1`` and
    so stays invalid.
    """
    if pixels.dtype.kind != "f":
        return pixels
    photons = np.empty(pixels.shape, np.int64)
    _round_to(pixels, float(bounds.high), photons)
    return photons


@nb.njit(nogil=True, cache=True)
def _round_to(pixels: NDArray[Any], high: float, photons: NDArray[np.int64]) -> None:
    beyond = np.int64(high) + 1
    for y in range(pixels.shape[0]):
        for x in range(pixels.shape[1]):
            v = np.float64(np.rint(pixels[y, x]))
            # Nothing compares with NaN, so it is beyond too.
            usable = (v <= high) & (v > -np.inf)
            photons[y, x] = np.int64(max(v, 0.0)) if usable else beyond


def measured(frame: Frame, pixels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Counts of a decoded frame, (y, x), and True where they are a measurement.

    Raises:
        DecodeError: the mask has another shape than the frame.
    """
    bounds = limits(frame.dtype, frame.series)
    counts = as_photons(pixels, bounds)
    valid = (counts <= bounds.high) & (counts != bounds.error)
    if bounds.negative_is_invalid:
        valid &= counts >= 0
    mask = _mask_of(frame)
    if mask is not None:
        valid &= ~_masked(mask)
    return counts, valid


def tile_corners(views: Views, row: int, shape: tuple[int, int], recipe: Recipe) -> NDArray[Any]:
    """(places, 2) int32, top and left pixel of each tile of frame ``row``, best first.

    Cells are ranked by excess, equal ones in row-major order, and taken when their centre is at
    least ``tile_px`` pixels (the larger of both axes) from those taken before; at most
    ``recipe.tiles`` of them. A window over the edge is moved inside where the frame is large
    enough.
    """
    if recipe.tiles == 0:
        return np.empty((0, 2), np.int32)
    k, size = int(views.bin_factor[row]), recipe.tile_px
    cells = np.empty((recipe.tiles, 2), np.int64)
    found = _separate_cells(
        views.maximum[row],
        views.total[row],
        views.count[row],
        -(-shape[0] // k),
        -(-shape[1] // k),
        EXPECTED_MAXIMUM[k],
        -(-size // k) - 1,
        cells,
    )
    first = cells[:found] * k + k // 2 - size // 2
    edge = np.maximum(np.array(shape, np.int64) - size, 0)
    return np.clip(first, 0, edge).astype(np.int32)


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _separate_cells(
    maximum: NDArray[np.uint32],
    total: NDArray[np.uint64],
    count: NDArray[np.uint16],
    rows: int,
    columns: int,
    expected: np.float32,
    reach: int,
    cells: NDArray[np.int64],
) -> int:
    """Fill ``cells`` with (y, x) of the cells that stand out most; how many there are.

    The excess is that of the kernels, computed in the same order; ranked by it and not by the
    overview's compressed channel, whose rounding makes ties of its own. A cell rules out those
    within ``reach`` of it.
    """
    nothing = np.float32(-np.inf)
    excess = np.empty((rows, columns), np.float32)
    best = np.empty(rows, np.float32)
    for y in range(rows):
        highest = nothing
        for x in range(columns):
            largest = np.float32(maximum[y, x])
            others = np.float32(max(int(count[y, x]) - 1, 1))
            rest = np.float32(total[y, x] - np.uint64(maximum[y, x]))
            mean = rest / others if count[y, x] > 1 else largest
            gap = np.sqrt(largest + ANSCOMBE) - np.sqrt(mean + ANSCOMBE)
            e = np.float32(np.float32(2.0) * gap - expected) if count[y, x] > 0 else nothing
            excess[y, x] = e
            highest = max(highest, e)
        best[y] = highest
    for found in range(cells.shape[0]):
        y = int(np.argmax(best))
        if best[y] == nothing:
            return int(found)
        x = int(np.argmax(excess[y]))
        cells[found] = y, x
        for near in range(max(0, y - reach), min(rows, y + reach + 1)):
            excess[near, max(0, x - reach) : x + reach + 1] = nothing
            best[near] = excess[near].max()
    return int(cells.shape[0])

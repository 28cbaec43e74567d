"""The list of spots of a frame, measured in pixels as fine as show them.

The frame is filtered at four scales, each binning two by two what the one before it looks at. A
local maximum that stands out of its surroundings is the centre of a spot, as wide as the scale that
shows it best. From the strongest on, each gathers the connected pixels above a cut, and what is
gathered belongs to no later one. A Gaussian is fitted to each of those that are listed. One
function for every backend, on the host: the same cells and pixels give the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba as nb
import numpy as np
from numpy.typing import NDArray

from triage.backends.lz4 import load1, load2, load4, load8
from triage.backends.recipe import ANSCOMBE, Limits
from triage.records import Spot, Views

__all__ = ["SpotFinder"]

_CELL_REACHES = (2, 4)
"""Cells to each side that make a cell's background, for the finer scales and for the coarser."""
_COARSE_SCALE = 2
_RING_BESIDE = 2
_BESIDE_AS_PX = 64.0
"""Rings to each side whose mean counts as so many pixels of a ring."""
_NO_BOUND = 1e100
_RING_TRIMS = 12
_STEADY = 0.9
"""Times at most that what is too bright for its ring is cut down, as long as that leaves less than
this share of some ring."""

_SCALES = 4
_BESIDE = 3
"""Places from a maximum to those that a ring or an edge would run on to."""
_STRIP_PX = 256
"""Rows that are filtered at a time, so that they stay in the cache."""
_HALO_PX = (_BESIDE + 1) << (_SCALES - 1)
"""What the filter and the search for maxima see beyond them."""
_BLOCK = 16
"""Places to each side that share the mean and the scatter of the filtered background."""
_UNIT_PX = _BLOCK << (_SCALES - 1)
"""Pixels of a block at the coarsest scale: what is filtered is whole ones."""
_STRUCTURED = 1.3
"""Scatter in Poisson's from which a block is looked at for a background that is curved ..."""
_FLATTER = 0.8
"""... and is without it, where that leaves so much of the scatter at most."""
_LEAST_CURVED = 0.25
"""Of the squares of a block, what the first step to such a surface explains at least; of white
noise the fiftieth."""
_LEVELLINGS = 8
"""Steps to that surface; what stands out is cut at each."""
_MIDDLE = 0.5 * (_BLOCK - 1)
_SQUARE = (_BLOCK * _BLOCK - 1) / 12.0
_LINEAR = _SQUARE * _BLOCK
_CURVED = _LINEAR * (_BLOCK * _BLOCK - 4) / 15.0
"""Of a row of a block: its middle, the mean square of x from there, and the sums of the squares of
x and of x^2 less its mean."""
_LEAST_WHOLE = 0.75
"""Of a block, what has to be measured: gaps are flat."""
_MOST_SIGMA = 4.0
"""So far out at most a place counts for that mean and scatter."""
_LEAST_SCATTER, _MOST_SCATTER = 0.2, 4.0
"""Of that scatter, in Poisson's: a CCD's offset has no noise, and structure is more than noise."""
_SURE_COUNTS = 20.0
"""Counts under the filter from which a scatter below Poisson's is believed."""
_SHARE_OF_SUM = 2.25
"""Sum over sum of squares of the filter (1 2 1) x (1 2 1): what makes a sum's variance its mean."""
_LEAST_PEAK = 3.5
"""Sigma by which a maximum stands out."""
_MOST_PEAKS = 32768
_MEASURED = (512, 384, 256, 128)
"""Of the maxima of each scale, so many are measured, the surest."""
_FINE_SIGMA = 5.0
"""A spot is measured in pixels so fine that it would stand out by this much in each of the scales
passed over."""

_RING_REACH, _CORE_REACH = 8, 3
"""Pixels to each side of a centre that make its background, without those as near as the second."""
_COARSE_REACH, _COARSE_CORE_REACH = 4, 2
"""The same in bins, at the coarser scales."""
_LEAST_RING = 20
_MOST_CLIPS = 10
_SLOPING = 1.15
"""Of Poisson's scatter in a ring: above, a slope of the background is looked for."""
_FEW_COUNTS = 3.0
"""Below so many counts in a pixel the scatter of a ring says less of its noise than its mean does.
Above, the mean may hold an offset, which has no noise."""
_CUT_SIGMA = 2.0
_CUT_SHARE = 0.1
_MOST_PIXELS = 1024
_MOST_WIDTHS, _MOST_COARSE_WIDTHS = 8, 3
"""Of the filter that showed it best, so far to each side a spot reaches; the second where it is
measured in bins."""
_COARSER = 0.85
"""By this much a scale's sigma counts for less than those of the next finer one when centres are
ordered. One spot loses a fifth from its own scale to the next; a crowd of spots loses more."""
_APART_SIGMA = 2.5
_BESIDE_SHARE = 0.02
"""What light leaves around the brightest pixel at least: a lone one is no spot."""

_FIT_STEPS = 4
_FIT_STEP = 0.6
"""Share of the way to what is measured that a fit goes at a step: at five sigma the moments of one
spot scatter by a third."""
_FIT_VARIANCES_PX2 = (0.16, 64.0, 100.0)
"""Of a fitted Gaussian at least, and at most across and along its long axis. The least is that
whose area is a pixel: a reflection as sharp as it may be has more, a hot pixel has not."""
_FIT_REACH_PX = 12
_FIT_EXPONENT = 12.0
"""To where a Gaussian is followed: squared distance in its widths."""
_LEAST_VARIANCE = 0.01
"""Of a background pixel, counts^2."""

_Y, _X, _INTENSITY = int(Spot.Y_PX), int(Spot.X_PX), int(Spot.INTENSITY)
_BACKGROUND, _NOISE, _SNR = int(Spot.BACKGROUND), int(Spot.NOISE), int(Spot.SNR)
_PIXELS, _YY, _YX, _XX = int(Spot.PIXELS), int(Spot.YY), int(Spot.YX), int(Spot.XX)
_PEAK, _CUT, _PEAKS, _LONE = int(Spot.PEAK), int(Spot.CUT), int(Spot.PEAKS), int(Spot.LONE)
_SATURATED, _AT_GAP, _VALID = int(Spot.SATURATED), int(Spot.AT_GAP), int(Spot.VALID)
_MATCHED, _WIDTH_PX = int(Spot.MATCHED), int(Spot.WIDTH_PX)
_FITTED, _FITTED_PX2 = int(Spot.FITTED), int(Spot.FITTED_PX2)
_BRIGHTEST = int(Spot.BRIGHTEST)

_GAP, _BEYOND = np.int64(-1), np.int64(-2)
"""What stands for a count where there is none: masked or outside, and beyond saturation."""
_LARGEST = np.int64(2**31 - 1)


class _Pixels(NamedTuple):
    """A decoded frame as its bytes, and which of its values are measurements.

    Of one type, whatever the pixels are, so that what measures them is compiled once. Pixels are
    turned to counts near the maxima only; what looks at all of them has the strips.
    """

    raw: NDArray[np.uint8]
    item: int
    sign: int
    rows: int
    columns: int
    invalid: NDArray[np.uint8]
    high: int
    error: int
    negative_is_invalid: bool


class _Surface(NamedTuple):
    """A surface of the second degree under a block, and the step to the next one: (6,) by a
    constant, y, x, y^2, yx and x^2, the squares less their mean over the block."""

    at: NDArray[np.float64]
    step: NDArray[np.float64]


class _Ground(NamedTuple):
    """The background around a place, a plane: counts per pixel, and how they rise per pixel."""

    mean: float
    y: float
    x: float
    rise_y: float
    rise_x: float


_PerScale = tuple[NDArray[np.float32], ...]
"""Whole arrays of their own, so that their rows become vectors."""


class SpotFinder:
    """Finds the spots of one frame after another; for one thread."""

    def __init__(self) -> None:
        self._owner = np.zeros((0, 0), np.int32)
        self._rows = _room_for(0)
        self._peaks = np.empty((_MOST_PEAKS, 3), np.int64)
        self._sigma, self._spread = np.empty(_MOST_PEAKS), np.empty(_MOST_PEAKS)

    def find(
        self,
        photons: NDArray[Any],
        invalid: NDArray[np.uint8],
        bounds: Limits,
        views: Views,
        row: int,
        rings: NDArray[np.float32],
        out: NDArray[np.float32],
    ) -> None:
        """Fill ``out``, (MOST_SPOTS, len(Spot)), with the spots of a frame.

        Args:
            photons: (y, x) decoded pixels, as ``recipe.as_photons`` gives them.
            invalid: (y, x), 1 where masked; (0, 0) without a mask.
            bounds: which values are measurements.
            views: of a batch; ``row`` is the frame's.
            rings: as ``SeriesMaps.rings`` gives them; (0, 0) where the geometry is not known.
        """
        k = int(views.bin_factor[row])
        ny, nx = photons.shape
        levels = np.empty((2, -(-ny // k), -(-nx // k)), np.float64)
        _levels(views.total[row], views.count[row], rings, levels)
        if self._owner.shape != photons.shape:
            self._owner = np.zeros(photons.shape, np.int32)
            self._rows = _room_for(nx)
        item = photons.dtype.itemsize
        # One type for the compiled code, whatever holds the pixels.
        photons = photons.view()
        photons.flags.writeable = False
        raw = photons.reshape(-1).view(np.uint8)
        pixels = _Pixels(
            raw=raw,
            item=item,
            sign=1 << (8 * item - 1) if photons.dtype.kind == "i" and item < 8 else 0,
            rows=ny,
            columns=nx,
            invalid=invalid,
            high=bounds.high,
            error=bounds.error,
            negative_is_invalid=bounds.negative_is_invalid,
        )
        edges = _edges(bounds, photons.dtype.itemsize)
        whole = _summed_up(views.count[row], *levels.shape[1:])
        found = 0
        for top in range(0, ny, _STRIP_PX):
            rows = min(_STRIP_PX, -(-(ny - top) // _UNIT_PX) * _UNIT_PX) + 2 * _HALO_PX
            strips, sigmas = (
                tuple(room[: rows >> scale] for scale, room in enumerate(rooms))
                for rooms in self._rows
            )
            _strip(photons, invalid, edges, k, levels[0], top, strips[0])
            _filter_all(strips, k, levels, top, sigmas)
            found = _peaks(
                sigmas, nx, ny, k, levels, whole, top, self._peaks, self._sigma, self._spread, found
            )
        _find(
            pixels, k, self._peaks[:found], self._sigma[:found], self._spread[:found], levels[1],
            self._owner, out,
        )  # fmt: skip


def _edges(bounds: Limits, item: int) -> NDArray[Any]:
    """Lowest and highest count and error value, in 32 bits for pixels of 16 and fewer."""
    kind: type[np.signedinteger[Any]] = np.int32 if item <= 2 else np.int64
    lowest = 0 if bounds.negative_is_invalid else np.iinfo(kind).min
    limits = np.iinfo(kind)
    values = (lowest, bounds.high, bounds.error)
    return np.array([min(max(v, int(limits.min)), int(limits.max)) for v in values], kind)


def _room_for(columns: int) -> tuple[_PerScale, _PerScale]:
    """Room for a strip of a frame with so many columns at each scale, and for its sigma there."""
    wide = -(-columns // _UNIT_PX) * _UNIT_PX + 2 * _HALO_PX
    rows = _STRIP_PX + 2 * _HALO_PX
    strips, sigmas = (
        tuple(np.empty((rows >> scale, wide >> scale), np.float32) for scale in range(_SCALES))
        for _ in range(2)
    )
    return strips, sigmas


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _box_sum(x: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """Sum over a square of 2 reach + 1, nothing beyond the edge; ``reach`` is 2 or 4.

    Each from its own numbers: what a running sum has left over where there is nothing is not zero.
    """
    rows, columns = x.shape
    out = np.empty_like(x)
    padded = np.zeros(columns + 2 * reach)
    sums = padded[reach : reach + columns]
    for y in range(rows):
        sums[:] = 0.0
        for v in range(max(0, y - reach), min(rows, y + reach + 1)):
            for i in range(columns):
                sums[i] += x[v, i]
        along = out[y]
        # Along the row in one expression, which becomes vectors.
        if reach == 2:
            for i in range(columns):
                near = (padded[i] + padded[i + 1]) + (padded[i + 3] + padded[i + 4])
                along[i] = near + padded[i + 2]
        else:
            for i in range(columns):
                near = (padded[i] + padded[i + 1]) + (padded[i + 2] + padded[i + 3])
                far = (padded[i + 5] + padded[i + 6]) + (padded[i + 7] + padded[i + 8])
                along[i] = near + far + padded[i + 4]
    return out


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _levels(
    total: NDArray[np.uint64],
    count: NDArray[np.uint16],
    rings: NDArray[np.float32],
    levels: NDArray[np.float64],
) -> None:
    """Fill ``levels``, (2, y, x) of cells, with the mean background per pixel around each.

    Of the nearer and of the farther cells; where ``rings`` says how far a cell lies from the beam,
    it is that of its ring times what the cells around have of theirs, so that a ring of solvent or
    powder is no wider around than it is.
    """
    _, rows, columns = levels.shape
    pixels, counts = np.empty((rows, columns)), np.empty((rows, columns))
    for y in range(rows):
        for x in range(columns):
            pixels[y, x], counts[y, x] = float(count[y, x]), float(total[y, x])
    of_ring = np.ones((rows, columns))
    _ring_means(counts, pixels, rings, of_ring)
    expected = of_ring * pixels
    area, summed = _box_sum(expected, _CELL_REACHES[1]), _box_sum(counts, _CELL_REACHES[1])
    # Once more without what stands out, so that a spot does not hide its neighbour or itself.
    for y in range(rows):
        for x in range(columns):
            mean = _share(summed[y, x], area[y, x]) * expected[y, x]
            counts[y, x] = min(counts[y, x], mean + 3.0 * np.sqrt(mean + 0.5))
    _ring_means(counts, pixels, rings, of_ring)
    expected = of_ring * pixels
    for which in range(2):
        area = _box_sum(expected, _CELL_REACHES[which])
        summed = _box_sum(counts, _CELL_REACHES[which])
        for y in range(rows):
            for x in range(columns):
                levels[which, y, x] = _share(summed[y, x], area[y, x]) * of_ring[y, x]


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _ring_means(
    counts: NDArray[np.float64],
    pixels: NDArray[np.float64],
    rings: NDArray[np.float32],
    out: NDArray[np.float64],
) -> None:
    """Fill ``out`` with the mean counts per pixel at each cell's distance from the beam, between
    the middles of rings a cell wide; nothing without ``rings``.

    Cells far brighter than their ring count as no more than three times its mean, again and again
    while that lowers it: a hot pixel is in no background, and is worth more than a ring of it.
    """
    if rings.size == 0:
        return
    rows, columns = out.shape
    farthest = 0.0
    for y in range(rows):
        for x in range(columns):
            farthest = max(farthest, rings[y, x])
    n = int(farthest) + 2
    total, of, most = np.zeros(n), np.zeros(n), np.full(n, _NO_BOUND)
    for y in range(rows):
        for x in range(columns):
            of[int(rings[y, x])] += pixels[y, x]
    for trim in range(_RING_TRIMS):
        before = total.copy()
        total[:] = 0.0
        for y in range(rows):
            for x in range(columns):
                i = int(rings[y, x])
                # Of few counts one more is nothing that stands out.
                total[i] += min(counts[y, x], 3.0 * (most[i] * pixels[y, x]) + 3.0)
        is_steady = trim > 0
        for i in range(n):
            is_steady = is_steady and total[i] >= _STEADY * before[i]
            most[i] = total[i] / of[i] if of[i] > 0.0 else 0.0
        if is_steady:
            break
    _smoothed(total, of, most)
    for y in range(rows):
        for x in range(columns):
            at = max(np.float64(rings[y, x]) - 0.5, 0.0)
            i = int(at)
            out[y, x] = most[i] + (at - i) * (most[i + 1] - most[i])


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _smoothed(
    total: NDArray[np.float64], of: NDArray[np.float64], out: NDArray[np.float64]
) -> None:
    """Fill ``out`` with the mean of each ring, of few pixels as those beside it say; of none, as
    the nearest one with some says."""
    n = out.size
    known = -1
    for i in range(n):
        beside, area = 0.0, 0.0
        for j in range(max(0, i - _RING_BESIDE), min(n, i + _RING_BESIDE + 1)):
            beside += total[j]
            area += of[j]
        if of[i] > 0.0:
            out[i] = (total[i] + _BESIDE_AS_PX * (beside / area)) / (of[i] + _BESIDE_AS_PX)
            for j in range(known + 1, i):
                is_nearer = known >= 0 and j - known <= i - j
                out[j] = out[known] if is_nearer else out[i]
            known = i
    for j in range(known + 1, n):
        out[j] = out[known] if known >= 0 else 0.0


@nb.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0.0 else 0.0


@nb.njit(nogil=True, cache=True)
def _summed_up(count: NDArray[np.uint16], rows: int, columns: int) -> NDArray[np.int64]:
    """(rows + 1, columns + 1) valid pixels in all cells above and to the left."""
    out = np.zeros((rows + 1, columns + 1), np.int64)
    for y in range(rows):
        along = np.int64(0)
        for x in range(columns):
            along += count[y, x]
            out[y + 1, x + 1] = out[y, x + 1] + along
    return out


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _strip(
    photons: NDArray[Any],
    invalid: NDArray[np.uint8],
    edges: NDArray[Any],
    k: int,
    level: NDArray[np.float64],
    top: int,
    out: NDArray[np.float32],
) -> None:
    """Fill ``out`` with counts, and with the level around where there is no count.

    It begins ``_HALO_PX`` rows above ``top`` and as many columns beside the frame. ``edges``: the
    lowest and the highest count and what is an error, of the type in which they are compared.
    """
    ny, nx = photons.shape
    nothing, room = np.zeros(nx, np.uint8), np.empty(nx, edges.dtype)
    least, most = level.shape[0] - 1, level.shape[1] - 1
    fill = np.empty(out.shape[1], np.float32)
    of_column = np.empty(out.shape[1], np.int32)
    for x in range(fill.size):
        of_column[x] = min(max((x - _HALO_PX) // k, 0), most)
    filled = -1
    for i in range(out.shape[0]):
        y, row = top - _HALO_PX + i, out[i]
        cell = min(max(y // k, 0), least)
        if cell != filled:
            filled = cell
            cells = level[cell]
            for x in range(fill.size):
                fill[x] = cells[of_column[x]]
        if y < 0 or y >= ny:
            row[:] = fill
            continue
        row[:_HALO_PX] = fill[:_HALO_PX]
        row[_HALO_PX + nx :] = fill[_HALO_PX + nx :]
        masked = invalid[y] if invalid.size > 0 else nothing
        _counts(photons[y], masked, edges, fill[_HALO_PX:], room, row[_HALO_PX:])


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _counts(
    photons: NDArray[Any],
    masked: NDArray[np.uint8],
    edges: NDArray[Any],
    beside: NDArray[np.float32],
    room: NDArray[Any],
    out: NDArray[np.float32],
) -> None:
    """Fill ``out`` with a row of counts, ``beside`` where there is none; ``room`` is of the type of
    ``edges``."""
    lowest, highest, error = edges
    for x in range(photons.size):
        room[x] = photons[x]
    for x in range(photons.size):
        v = room[x]
        is_none = (v > highest) | (v < lowest) | (v == error) | (masked[x] != 0)
        out[x] = beside[x] if is_none else np.float32(max(v, 0))


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _filter_all(
    strips: _PerScale, k: int, levels: NDArray[np.float64], top: int, sigmas: _PerScale
) -> None:
    """Bin the first of ``strips``, which begins ``_HALO_PX`` rows above ``top``, and filter all."""
    for scale in range(_SCALES):
        bins = strips[scale]
        if scale:
            finer = strips[scale - 1]
            for y in range(bins.shape[0]):
                upper, lower, to = finer[2 * y], finer[2 * y + 1], bins[y]
                for x in range(to.size):
                    to[x] = (upper[2 * x] + upper[2 * x + 1]) + (lower[2 * x] + lower[2 * x + 1])
        level = levels[0] if scale < _COARSE_SCALE else levels[1]
        _filter(bins, k, level, top, scale, sigmas[scale])


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _peaks(
    sigmas: _PerScale,
    nx: int,
    ny: int,
    k: int,
    levels: NDArray[np.float64],
    whole: NDArray[np.int64],
    top: int,
    peaks: NDArray[np.int64],
    by: NDArray[np.float64],
    spread: NDArray[np.float64],
    found: int,
) -> int:
    """Add (y, x, scale) of the local maxima of a strip to ``peaks``, their sigma to ``by``,
    and to ``spread`` the scatter that it was divided by.

    How many there are then. y and x count bins of 2^scale pixels. ``whole``: as
    :func:`_summed_up` gives it.
    """
    for scale in range(_SCALES):
        level = levels[0] if scale < _COARSE_SCALE else levels[1]
        found = _maxima(
            sigmas[scale], nx, ny, k, level, whole, top, scale, peaks, by, spread, found
        )
    return found


@nb.njit(nogil=True, cache=True, error_model="numpy", fastmath={"nnan", "nsz"})
def _filtered_row(
    above: NDArray[np.float32],
    here: NDArray[np.float32],
    below: NDArray[np.float32],
    root: NDArray[np.float32],
    column: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """Sigma by which (1 2 1) x (1 2 1) exceeds its background, in Poisson's noise.

    ``root``: of that background and 3/8; ``column`` is room. After Anscombe, Biometrika 35, 246
    (1948).
    """
    two, share, add = np.float32(2.0), np.float32(1.0 / _SHARE_OF_SUM), np.float32(ANSCOMBE)
    for x in range(here.size):
        column[x] = (above[x] + below[x]) + two * here[x]
    for x in range(1, here.size - 1):
        total = (column[x - 1] + column[x + 1]) + two * column[x]
        out[x] = two * (np.sqrt(total * share + add) - root[x])


@nb.njit(nogil=True, cache=True, error_model="numpy", fastmath={"nnan", "nsz"})
def _add_row(
    row: NDArray[np.float32],
    total: NDArray[np.float32],
    squares: NDArray[np.float32],
    highest: NDArray[np.float32],
) -> None:
    """Take a row of sigma into the sums, the sums of squares and the highest of its columns."""
    most = np.float32(_MOST_SIGMA)
    for x in range(row.size):
        v = row[x]
        bounded = min(max(v, -most), most)
        total[x] += bounded
        squares[x] += bounded * bounded
        highest[x] = max(highest[x], v)


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _filter(
    bins: NDArray[np.float32],
    k: int,
    level: NDArray[np.float64],
    top: int,
    scale: int,
    sigma: NDArray[np.float32],
) -> None:
    """Fill ``sigma`` with by how much each bin of a strip stands out, as far as that is asked."""
    size, halo = 1 << scale, _HALO_PX >> scale
    rows, columns = bins.shape
    share = 16.0 * size * size / _SHARE_OF_SUM
    least, most = level.shape[0] - 1, level.shape[1] - 1
    # Between the middles of cells in a straight line, or a slope would be a staircase.
    before, part = np.empty(columns, np.int32), np.empty(columns, np.float32)
    for x in range(columns):
        at = ((x - halo) * size + 0.5 * size) / k - 0.5
        before[x] = min(max(np.int64(np.floor(at)) + 1, 0), most + 1)
        part[x] = at - np.floor(at)
    of_cells = np.empty(most + 3, np.float32)
    upper, lower = np.empty(columns, np.float32), np.empty(columns, np.float32)
    root, column = np.empty(columns, np.float32), np.empty(columns, np.float32)
    of_row = np.int64(-(1 << 31))
    for y in range(halo - _BESIDE, rows - halo + _BESIDE):
        at = (top + (y - halo) * size + 0.5 * size) / k - 0.5
        row = np.int64(np.floor(at))
        # From one row of cells to the next the lower end becomes the upper one.
        for end in range(2 if row > of_row + 1 else row - of_row):
            upper, lower = lower, upper
            ahead = 1 if row == of_row + 1 else end
            cells = level[min(max(row + ahead, 0), least)]
            for x in range(most + 3):
                of_cells[x] = np.sqrt(cells[min(max(x - 1, 0), most)] * share + ANSCOMBE)
            for x in range(columns):
                left = before[x]
                lower[x] = of_cells[left] + part[x] * (of_cells[left + 1] - of_cells[left])
        of_row = row
        share_below = np.float32(at - row)
        for x in range(columns):
            root[x] = upper[x] + share_below * (lower[x] - upper[x])
        _filtered_row(bins[y - 1], bins[y], bins[y + 1], root, column, sigma[y])


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _maxima(
    sigma: NDArray[np.float32],
    nx: int,
    ny: int,
    k: int,
    level: NDArray[np.float64],
    whole: NDArray[np.int64],
    top: int,
    scale: int,
    peaks: NDArray[np.int64],
    by: NDArray[np.float64],
    spread: NDArray[np.float64],
    found: int,
) -> int:
    """What :func:`_peaks` adds of one scale."""
    size, halo = 1 << scale, _HALO_PX >> scale
    rows, columns = sigma.shape
    share = 16.0 * size * size / _SHARE_OF_SUM
    total, squares = np.empty(columns, np.float32), np.empty(columns, np.float32)
    highest = np.empty(columns, np.float32)
    around = np.empty((_BLOCK + 2 * _BESIDE, _BLOCK + 2 * _BESIDE), np.float32)
    surface = _Surface(np.empty(6), np.empty(6))
    for start in range(halo, rows - halo, _BLOCK):
        first_y = top + (start - halo) * size
        if first_y >= ny:
            break
        total[:], squares[:], highest[:] = 0.0, 0.0, -np.inf
        for y in range(start, start + _BLOCK):
            _add_row(sigma[y], total, squares, highest)
        upper, lower = first_y // k, min(-(-(first_y + _BLOCK * size) // k), whole.shape[0] - 1)
        for left in range(halo, columns - halo, _BLOCK):
            best = highest[left]
            for x in range(left, left + _BLOCK):
                best = max(best, highest[x])
            # A block that lies below its background has no spot, however low the rest of it is.
            if best < _LEAST_PEAK * _LEAST_SCATTER:
                continue
            first_x = (left - halo) * size
            if first_x >= nx:
                break
            added, squared = 0.0, 0.0
            for x in range(left, left + _BLOCK):
                added += total[x]
                squared += squares[x]
            before = first_x // k
            after = min(-(-(first_x + _BLOCK * size) // k), whole.shape[1] - 1)
            valid = whole[lower, after] - whole[upper, after]
            valid += whole[upper, before] - whole[lower, before]
            # Gaps are filled with the level, and neither rise nor scatter.
            n = max(min(valid / (size * size), 1.0 * _BLOCK * _BLOCK), 0.1 * _BLOCK * _BLOCK)
            mean = added / n
            scatter = np.sqrt(max(squared / n - mean * mean, 0.0))
            # Of few counts the scatter is that of single ones, or none.
            sure = level[(upper + lower) // 2, (before + after) // 2] * share >= _SURE_COUNTS
            scatter = min(max(scatter, _LEAST_SCATTER if sure else 1.0), _MOST_SCATTER)
            if best <= mean + _LEAST_PEAK * min(scatter, _STRUCTURED):
                continue
            is_curved = (
                scatter > _STRUCTURED
                and n >= _LEAST_WHOLE * _BLOCK * _BLOCK
                and _is_curved(sigma, start, left, mean, surface)
            )
            if not is_curved and best <= mean + _LEAST_PEAK * scatter:
                continue
            for i in range(around.shape[0]):
                for j in range(around.shape[1]):
                    around[i, j] = sigma[start - _BESIDE + i, left - _BESIDE + j]
            if is_curved:
                scatter = _levelled(around, mean, scatter, n, surface)
                scatter = min(max(scatter, _LEAST_SCATTER if sure else 1.0), _MOST_SCATTER)
            least_here = mean + _LEAST_PEAK * scatter
            for i in range(_BESIDE, _BESIDE + _BLOCK):
                for j in range(_BESIDE, _BESIDE + _BLOCK):
                    v = around[i, j]
                    # Of equal neighbours the first one.
                    if (
                        v <= least_here
                        or v <= around[i - 1, j - 1]
                        or v <= around[i - 1, j]
                        or v <= around[i - 1, j + 1]
                        or v <= around[i, j - 1]
                        or v < around[i, j + 1]
                        or v < around[i + 1, j - 1]
                        or v < around[i + 1, j]
                        or v < around[i + 1, j + 1]
                    ):
                        continue
                    v = (v - mean - max(_running_on(around, i, j) - mean, 0.0)) / scatter
                    if v <= _LEAST_PEAK:
                        continue
                    if found == by.size:
                        return found
                    peaks[found, 0] = top // size + start - halo + i - _BESIDE
                    peaks[found, 1] = left - halo + j - _BESIDE
                    peaks[found, 2] = scale
                    by[found], spread[found] = v, scatter
                    found += 1
    return found


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _levelled(
    around: NDArray[np.float32], mean: float, scatter: float, n: float, surface: _Surface
) -> float:
    """Take from a block and its margin the curved surface under the block, but for its mean; the
    scatter of what is left. Where it scatters hardly less, nothing is taken.

    What stands out of the surface is cut, and moves it step by step less (Huber, Ann. Math.
    Statist. 35, 73, 1964). ``n``: places of the block that are measured.
    """
    side = around.shape[0]
    cut, found = _MOST_SIGMA, np.inf
    surface.at[:] = 0.0
    surface.at[0] = mean
    for _ in range(_LEVELLINGS):
        squares = _step_to_surface(around, _BESIDE, _BESIDE, cut, surface)
        for i in range(surface.step.size):
            surface.at[i] += surface.step[i]
        found = np.sqrt(squares / n)
        cut = min(_MOST_SIGMA, max(3.0 * found, 1.0))
    if found > _FLATTER * scatter:
        return scatter
    c, cy, cx, cyy, cyx, cxx = surface.at
    for i in range(side):
        y = i - _BESIDE - _MIDDLE
        start, rise = c + cy * y + cyy * (y * y - _SQUARE) - cxx * _SQUARE, cx + cyx * y
        for j in range(side):
            x = j - _BESIDE - _MIDDLE
            around[i, j] -= start + (rise + cxx * x) * x - mean
    return float(found)


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _is_curved(
    sigma: NDArray[np.float32], top: int, left: int, mean: float, surface: _Surface
) -> bool:
    """Whether the first step to a surface explains more of a block than it would of noise."""
    surface.at[:] = 0.0
    surface.at[0] = mean
    squares = _step_to_surface(sigma, top, left, _MOST_SIGMA, surface)
    s, y, x, yy, yx, xx = surface.step
    explained = s * s * _BLOCK * _BLOCK + (y * y + x * x) * _LINEAR * _BLOCK
    explained += (yy * yy + xx * xx) * _CURVED * _BLOCK + yx * yx * _LINEAR * _LINEAR
    return bool(explained >= _LEAST_CURVED * squares)


@nb.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nnan", "nsz"})
def _step_to_surface(
    sigma: NDArray[np.float32], top: int, left: int, cut: float, surface: _Surface
) -> float:
    """Fill ``surface.step`` with what brings the surface nearer to the block whose first place is
    (top, left); the sum of the squares of what lies between them, each cut at ``cut``.

    The polynomials are orthogonal on the block, so that each has its coefficient from one sum.
    """
    c, cy, cx, cyy, cyx, cxx = surface.at
    s, sy, sx, syy, syx, sxx, squares = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(_BLOCK):
        y = i - _MIDDLE
        yy = y * y - _SQUARE
        start, rise = c + cy * y + cyy * yy - cxx * _SQUARE, cx + cyx * y
        row = sigma[top + i, left : left + _BLOCK]
        # Sums of one row at a time, which become vectors.
        of, x_of, xx_of, squares_of = 0.0, 0.0, 0.0, 0.0
        for j in range(_BLOCK):
            x = j - _MIDDLE
            over = min(max(row[j] - (start + (rise + cxx * x) * x), -cut), cut)
            of += over
            x_of += over * x
            xx_of += over * x * x
            squares_of += over * over
        s += of
        sy += of * y
        syy += of * yy
        sx += x_of
        syx += x_of * y
        sxx += xx_of - of * _SQUARE
        squares += squares_of
    surface.step[0] = s / (_BLOCK * _BLOCK)
    surface.step[1], surface.step[2] = sy / (_LINEAR * _BLOCK), sx / (_LINEAR * _BLOCK)
    surface.step[3], surface.step[5] = syy / (_CURVED * _BLOCK), sxx / (_CURVED * _BLOCK)
    surface.step[4] = syx / (_LINEAR * _LINEAR)
    return squares


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _running_on(sigma: NDArray[np.float32], y: int, x: int) -> float:
    """What both sides of a place have at least, in that of four directions where it is most."""
    n = _BESIDE
    along = max(min(sigma[y, x - n], sigma[y, x + n]), min(sigma[y - n, x], sigma[y + n, x]))
    falling = min(sigma[y - n, x - n], sigma[y + n, x + n])
    rising = min(sigma[y - n, x + n], sigma[y + n, x - n])
    return float(max(along, max(falling, rising)))


@nb.njit(nogil=True, cache=True, inline="always")
def _value_at(p: _Pixels, at: Any) -> Any:
    """Pixel ``at`` of the frame as a number of 64 bits."""
    if p.item == 2:
        v = load2(p.raw, 2 * at)
    elif p.item == 1:
        v = load1(p.raw, at)
    elif p.item == 4:
        v = load4(p.raw, 4 * at)
    else:
        v = np.int64(load8(p.raw, 8 * at))
    # The bit of the sign, 0 where there is none, extended.
    return (v ^ p.sign) - p.sign


@nb.njit(nogil=True, cache=True, inline="always")
def _count_of(p: _Pixels, v: Any, masked: Any) -> Any:
    gap = (v == p.error) | ((v < 0) & p.negative_is_invalid) | (masked != 0)
    count = min(max(v, np.int64(0)), _LARGEST) if v <= p.high else _BEYOND
    return _GAP if gap else count


@nb.njit(nogil=True, cache=True)
def _rows(p: _Pixels, top: int, left: int, out: NDArray[np.float64]) -> None:
    """Fill ``out``, (y, x), with what the pixels from (top, left) on count as.

    ``_GAP`` or ``_BEYOND`` where there is no count; outside of the frame is a gap.
    """
    height, width = out.shape
    is_inside = min(top, left) >= 0 and top + height <= p.rows and left + width <= p.columns
    # Numbers of 64 bits would lose digits on their way through ``out``.
    if not is_inside or p.item == 8:
        for i in range(height):
            for j in range(width):
                out[i, j] = float(_count_at(p, top + i, left + j))
        return
    for i in range(height):
        at = (top + i) * p.columns + left
        # Loops that become vectors: the kind of the pixels first, for most of them.
        if p.item == 2:
            for j in range(width):
                out[i, j] = float((load2(p.raw, 2 * (at + j)) ^ p.sign) - p.sign)
        else:
            for j in range(width):
                out[i, j] = float(_value_at(p, at + j))
        if p.invalid.size > 0:
            for j in range(width):
                masked = p.invalid[top + i, left + j]
                out[i, j] = float(_count_of(p, np.int64(out[i, j]), masked))
        else:
            for j in range(width):
                out[i, j] = float(_count_of(p, np.int64(out[i, j]), np.uint8(0)))


@nb.njit(nogil=True, cache=True)
def _count_at(p: _Pixels, y: int, x: int) -> np.int64:
    """The count of a pixel; outside of the frame is a gap."""
    if y < 0 or x < 0 or y >= p.rows or x >= p.columns:
        return _GAP
    masked = p.invalid[y, x] if p.invalid.size > 0 else np.uint8(0)
    return np.int64(_count_of(p, _value_at(p, y * p.columns + x), masked))


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _sum_of_nine(
    pixels: _Pixels,
    y: int,
    x: int,
    level: float,
) -> float:
    """Counts of the 3 x 3 pixels around, the background where there is no count."""
    total = 0.0
    for i in range(y - 1, y + 2):
        for j in range(x - 1, x + 2):
            v = _count_at(pixels, i, j)
            total += float(v) if v >= 0 else level
    return total


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _sum_of_bin(p: _Pixels, size: int, y: int, x: int) -> float:
    """Counts of bin (y, x) of size x size pixels, as many as it would have were all measured.

    A gap, or beyond, where fewer than half are.
    """
    if size == 1:
        return float(_count_at(p, y, x))
    total, used, beyond = 0.0, 0, 0
    for i in range(y * size, y * size + size):
        for j in range(x * size, x * size + size):
            v = _count_at(p, i, j)
            if v >= 0:
                total += float(v)
                used += 1
            elif v == _BEYOND:
                beyond += 1
    if 2 * used < size * size:
        return float(_BEYOND) if beyond > 0 else float(_GAP)
    return total * (size * size / used)


@nb.njit(nogil=True, cache=True, inline="always")
def _under(ground: _Ground, size: int, y: int, x: int) -> float:
    """Background counts of a pixel of bin (y, x) of size x size pixels."""
    rise = (size * (y + 0.5) - ground.y) * ground.rise_y
    return ground.mean + rise + (size * (x + 0.5) - ground.x) * ground.rise_x


@nb.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
def _background(
    pixels: _Pixels,
    size: int,
    y: int,
    x: int,
    level: float,
) -> tuple[_Ground, float, float]:
    """Background around bin (y, x) and sigma of one of its pixels, spots left out by clipping.

    And that sigma of a bin over Poisson's, which is one where that is all that is known of it.

    From a ring of bins alone: the cells around reach so far that a slope of the background would
    pass for a spot as large as itself. Where the ring scatters by more than its counts do it may
    slope itself, and is taken for a plane.
    """
    reach, core = _RING_REACH, _CORE_REACH
    if size > 1:
        reach, core = _COARSE_REACH, _COARSE_CORE_REACH
    side = 2 * reach + 1
    values = np.empty((side, side))
    if size == 1:
        _rows(pixels, y - reach, x - reach, values)
    else:
        for i in range(side):
            for j in range(side):
                if max(abs(i - reach), abs(j - reach)) > core:
                    values[i, j] = _sum_of_bin(pixels, size, y - reach + i, x - reach + j)
    for i in range(side):
        for j in range(side):
            values[i, j] = values[i, j] if values[i, j] >= 0 else np.nan
    values[reach - core : reach + core + 1, reach - core : reach + core + 1] = np.nan
    flat = values.reshape(values.size)
    n = 0
    for i in range(flat.size):
        # What is no number equals nothing, and is below nothing.
        n += flat[i] == flat[i]
    middle_y, middle_x = size * (y + 0.5), size * (x + 0.5)
    if n < _LEAST_RING:
        noise = np.sqrt(max(level, 1.0 / _LEAST_RING))
        return _Ground(level, middle_y, middle_x, 0.0, 0.0), noise, 1.0
    mean, noise, highest, used_before, over = 0.0, 0.0, np.inf, n + 1, 1.0
    for _ in range(_MOST_CLIPS):
        used, total, squares = 0, 0.0, 0.0
        for i in range(flat.size):
            is_used = flat[i] <= highest
            value = flat[i] if is_used else 0.0
            used += is_used
            total += value
            squares += value * value
        if used == used_before:
            break
        used_before = used
        mean = total / used
        variance = max(squares / used - mean * mean, 0.0)
        noise, over = _scatter(variance, (total + 1.0) / used, mean)
        # A single count never is too many: in the dark sigma is small and counts are whole.
        highest = mean + 3.0 * noise + 1.0
    rise_y, rise_x = 0.0, 0.0
    if over > _SLOPING:
        mean, rise_y, rise_x, noise, over = _plane(values, mean, noise, over)
    of_pixel = 1.0 / (size * size)
    ground = _Ground(
        mean * of_pixel, middle_y, middle_x, rise_y * of_pixel / size, rise_x * of_pixel / size
    )
    return ground, noise / size, over


@nb.njit(nogil=True, cache=True, inline="always")
def _scatter(variance: float, poisson: float, mean: float) -> tuple[float, float]:
    """Sigma of a bin, and over Poisson's, of the variance of a ring of bins."""
    noise = np.sqrt(max(variance, min(poisson, _FEW_COUNTS)))
    # Of few counts the scatter is that of single ones, or none.
    is_sure = mean * 16.0 / _SHARE_OF_SUM >= _SURE_COUNTS
    return noise, max(np.sqrt(variance / poisson), _LEAST_SCATTER if is_sure else 1.0)


@nb.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
def _plane(
    values: NDArray[np.float64], mean: float, noise: float, over: float
) -> tuple[float, float, float, float, float]:
    """Mean in the middle of a square of bins, rise per bin down and along, sigma and that over
    Poisson's; as they came where no plane can be told. What is no number is left out."""
    side = values.shape[0]
    reach = side // 2
    level, rise_y, rise_x, highest, used_before = mean, 0.0, 0.0, np.inf, side * side + 1
    for _ in range(_MOST_CLIPS):
        n, sy, sx, syy, syx, sxx = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        sv, svy, svx, svv = 0.0, 0.0, 0.0, 0.0
        for i in range(side):
            dy = float(i - reach)
            start = level + dy * rise_y
            rn, rx, rxx, rv, rvx, rvv = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
            for j in range(side):
                dx = float(j - reach)
                v = values[i, j]
                is_used = v - (start + dx * rise_x) <= highest
                one = 1.0 if is_used else 0.0
                v = v - mean if is_used else 0.0
                rn += one
                rx += one * dx
                rxx += one * dx * dx
                rv += v
                rvx += v * dx
                rvv += v * v
            n, sx, sxx, sv, svx, svv = n + rn, sx + rx, sxx + rxx, sv + rv, svx + rvx, svv + rvv
            sy += rn * dy
            syy += rn * dy * dy
            syx += rx * dy
            svy += rv * dy
        if n == used_before or n < _LEAST_RING:
            break
        used_before = n
        # Normal equations about the middle of what is used.
        my, mx, mv = sy / n, sx / n, sv / n
        cyy, cyx, cxx = syy / n - my * my, syx / n - my * mx, sxx / n - mx * mx
        cvy, cvx = svy / n - mv * my, svx / n - mv * mx
        determinant = cyy * cxx - cyx * cyx
        if determinant < 0.05 * cyy * cxx or determinant <= 0.0:
            break
        rise_y = (cvy * cxx - cvx * cyx) / determinant
        rise_x = (cvx * cyy - cvy * cyx) / determinant
        level = mean + mv - rise_y * my - rise_x * mx
        variance = max(svv / n - mv * mv - rise_y * cvy - rise_x * cvx, 0.0)
        noise, over = _scatter(variance, mean + mv + 1.0 / n, mean + mv)
        highest = 3.0 * noise + 1.0
    return max(level, 0.0), rise_y, rise_x, noise, over


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _of_the_rest(
    p: _Pixels, owner: NDArray[np.int32], size: int, y: int, x: int, ground: _Ground
) -> float:
    """Sigma of the filter at bin (y, x) without the pixels that are owned, in Poisson's noise."""
    total, background = 0.0, 0.0
    for i in range(max(0, (y - 1) * size), min(p.rows, (y + 2) * size)):
        of_row = 2.0 if y * size <= i < (y + 1) * size else 1.0
        for j in range(max(0, (x - 1) * size), min(p.columns, (x + 2) * size)):
            weight = of_row * (2.0 if x * size <= j < (x + 1) * size else 1.0)
            v, mean = _count_at(p, i, j), max(_under(ground, 1, i, j), 0.0)
            is_free = v >= 0 and owner[i, j] == 0
            total += weight * (float(v) if is_free else mean)
            background += weight * mean
    over = np.sqrt(total / _SHARE_OF_SUM + ANSCOMBE)
    return float(2.0 * (over - np.sqrt(background / _SHARE_OF_SUM + ANSCOMBE)))


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _is_apart(
    pixels: _Pixels,
    y: int,
    x: int,
    to_y: int,
    to_x: int,
    level: float,
) -> bool:
    """Whether a dip that is no chance lies between two local maxima."""
    steps = max(abs(to_y - y), abs(to_x - x))
    own = _sum_of_nine(pixels, y, x, level)
    for step in range(1, steps):
        i = int(np.rint(y + (to_y - y) * step / steps))
        j = int(np.rint(x + (to_x - x) * step / steps))
        between = _sum_of_nine(pixels, i, j, level)
        if 2.0 * (np.sqrt(own + ANSCOMBE) - np.sqrt(between + ANSCOMBE)) > _APART_SIGMA:
            return True
    return False


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _find(
    pixels: _Pixels,
    k: int,
    peaks: NDArray[np.int64],
    sigma: NDArray[np.float64],
    spread: NDArray[np.float64],
    level: NDArray[np.float64],
    owner: NDArray[np.int32],
    out: NDArray[np.float32],
) -> None:
    """Fill ``out`` with the spots; ``owner``, zero everywhere, is left so."""
    out[:] = 0
    order = _chosen(peaks, sigma)
    spots = np.zeros((order.size, out.shape[1]), np.float32)
    first = np.empty((order.size, 2), np.int64)
    rises = np.empty((order.size, 2))
    taken = np.empty((_MOST_PIXELS, 2), np.int64)
    touched = np.empty((1 << 16, 3), np.int64)
    n_spots, n_touched = 0, 0
    for number in order:
        width = 1 << peaks[number, 2]
        # Where it is brightest, in the finest pixels in which it still stands out.
        size = width
        while size > 1 and sigma[number] >= _FINE_SIGMA * (2 * width // size):
            size //= 2
        y, x, steps = peaks[number, 0], peaks[number, 1], width // size
        brightest, by, bx = -1.0, y, x
        for i in range((y - 1) * steps + steps // 2, (y + 2) * steps - steps // 2):
            for j in range((x - 1) * steps + steps // 2, (x + 2) * steps - steps // 2):
                v = _sum_of_bin(pixels, size, i, j)
                if v > brightest:
                    brightest, by, bx = v, i, j
        if brightest < 1.0:
            continue
        middle_y, middle_x = by * size + size // 2, bx * size + size // 2
        if middle_y >= pixels.rows or middle_x >= pixels.columns:
            continue
        mean = level[middle_y // k, middle_x // k]
        whose = owner[middle_y, middle_x]
        if whose != 0:
            spot = whose - 1
            to_y, to_x = first[spot, 0], first[spot, 1]
            if width == 1 and (y, x) != (to_y, to_x) and _is_apart(pixels, y, x, to_y, to_x, mean):
                spots[spot, _PEAKS] += np.float32(1.0)
            continue
        ground, noise, over = _background(pixels, width, y, x, mean)
        # What a finer spot owns is none of this one, and what is near says more of the noise than
        # what lies as far as a block does.
        rest = _of_the_rest(pixels, owner, width, y, x, ground)
        matched = min(sigma[number] * spread[number], rest) / over
        if matched < _LEAST_PEAK:
            continue
        per_bin = float(size * size)
        peak = brightest - _under(ground, size, by, bx) * per_bin
        cut = max(_CUT_SIGMA * noise * size, _CUT_SHARE * peak)
        if peak < cut:
            continue
        widths = _MOST_WIDTHS if size == 1 else _MOST_COARSE_WIDTHS
        n = _gather(
            pixels, size, by, bx, widths * steps, ground, cut, n_spots + 1, owner, taken,
        )  # fmt: skip
        for i in range(n):
            if n_touched < touched.shape[0]:
                touched[n_touched, 0], touched[n_touched, 1] = taken[i, 0], taken[i, 1]
                touched[n_touched, 2] = size
                n_touched += 1
            else:
                _own(owner, size, taken[i, 0], taken[i, 1], 0)
        first[n_spots, 0], first[n_spots, 1] = y * width, x * width
        _measure(pixels, size, taken[:n], ground, noise, cut, by, bx, spots[n_spots])
        rises[n_spots, 0], rises[n_spots, 1] = ground.rise_y, ground.rise_x
        spots[n_spots, _MATCHED], spots[n_spots, _WIDTH_PX] = matched, width
        n_spots += 1
    for i in range(n_touched):
        _own(owner, touched[i, 2], touched[i, 0], touched[i, 1], 0)
    ranked = np.argsort(-spots[:n_spots, _MATCHED], kind="mergesort")
    for place in range(min(n_spots, out.shape[0])):
        out[place] = spots[ranked[place]]
        _fit(pixels, rises[ranked[place]], out[place])


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _chosen(peaks: NDArray[np.int64], sigma: NDArray[np.float64]) -> NDArray[np.int64]:
    """Which peaks are measured, in the order in which they are."""
    taken = np.zeros(_SCALES, np.int64)
    kept = np.empty(sigma.size, np.int64)
    n = 0
    for number in np.argsort(-sigma, kind="mergesort"):
        scale = peaks[number, 2]
        if taken[scale] < _MEASURED[scale]:
            taken[scale] += 1
            kept[n] = number
            n += 1
    kept = kept[:n]
    counted = np.empty(n)
    for i in range(n):
        counted[i] = sigma[kept[i]] * _COARSER ** peaks[kept[i], 2]
    return kept[np.argsort(-counted, kind="mergesort")]


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _own(owner: NDArray[np.int32], size: int, y: int, x: int, number: int) -> None:
    """Give the pixels of bin (y, x) to a spot."""
    for i in range(y * size, min(y * size + size, owner.shape[0])):
        for j in range(x * size, min(x * size + size, owner.shape[1])):
            owner[i, j] = number


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _is_free(owner: NDArray[np.int32], size: int, y: int, x: int) -> bool:
    """Whether no pixel of bin (y, x) is owned."""
    for i in range(y * size, min(y * size + size, owner.shape[0])):
        for j in range(x * size, min(x * size + size, owner.shape[1])):
            if owner[i, j] != 0:
                return False
    return True


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _gather(
    pixels: _Pixels,
    size: int,
    y: int,
    x: int,
    reach: int,
    ground: _Ground,
    cut: float,
    number: int,
    owner: NDArray[np.int32],
    taken: NDArray[np.int64],
) -> int:
    """Fill ``taken`` with the connected bins above the cut within reach; how many."""
    _own(owner, size, y, x, number)
    per_bin = float(size * size)
    taken[0, 0], taken[0, 1] = y, x
    n, at = 1, 0
    while at < n:
        cy, cx = taken[at, 0], taken[at, 1]
        at += 1
        for i in range(max(cy - 1, y - reach), min(cy + 2, y + reach + 1)):
            for j in range(max(cx - 1, x - reach), min(cx + 2, x + reach + 1)):
                v = _sum_of_bin(pixels, size, i, j)
                if v < 0 or v < _under(ground, size, i, j) * per_bin + cut:
                    continue
                if not _is_free(owner, size, i, j):
                    continue
                if n == taken.shape[0]:
                    return n
                _own(owner, size, i, j, number)
                taken[n, 0], taken[n, 1] = i, j
                n += 1
    return n


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _measure(
    pixels: _Pixels,
    size: int,
    taken: NDArray[np.int64],
    ground: _Ground,
    noise: float,
    cut: float,
    brightest_y: int,
    brightest_x: int,
    spot: NDArray[np.float32],
) -> None:
    """Fill the columns of a spot whose bins are ``taken``; the noise is a pixel's."""
    n = taken.shape[0]
    per_bin = float(size * size)
    total, sum_y, sum_x, yy, yx, xx, peak = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    at_gap, saturated, highest = 0.0, 0.0, np.int64(0)
    for i in range(n):
        y, x = taken[i, 0], taken[i, 1]
        # Relative to the brightest bin, so that squares lose no digits.
        dy, dx = float(y - brightest_y), float(x - brightest_x)
        net = _sum_of_bin(pixels, size, y, x) - _under(ground, size, y, x) * per_bin
        total += net
        sum_y += net * dy
        sum_x += net * dx
        yy += net * dy * dy
        yx += net * dy * dx
        xx += net * dx * dx
        peak = max(peak, net)
        for a in range(size * y, size * y + size):
            for b in range(size * x, size * x + size):
                highest = max(highest, _count_at(pixels, a, b))
        for a in range(y - 1, y + 2):
            for b in range(x - 1, x + 2):
                v = _sum_of_bin(pixels, size, a, b)
                at_gap = 1.0 if v == _GAP else at_gap
                saturated = 1.0 if v == _BEYOND else saturated
    my, mx = sum_y / total, sum_x / total
    beside, others = 0.0, 0
    for a in range(brightest_y - 1, brightest_y + 2):
        for b in range(brightest_x - 1, brightest_x + 2):
            v = _sum_of_bin(pixels, size, a, b)
            if v >= 0 and (a != brightest_y or b != brightest_x):
                beside += v - _under(ground, size, a, b) * per_bin
                others += 1
    variance = per_bin * noise * noise
    least = max(_CUT_SIGMA * np.sqrt(others * variance + 1.0), _BESIDE_SHARE * peak)
    spot[_Y] = size * (brightest_y + 0.5 + my)
    spot[_X] = size * (brightest_x + 0.5 + mx)
    spot[_INTENSITY], spot[_NOISE] = total, noise
    spot[_BACKGROUND] = max(_under(ground, size, brightest_y, brightest_x), 0.0)
    spot[_SNR] = total / np.sqrt(total + n * variance)
    spot[_PIXELS] = n * per_bin
    # What bins are wider than pixels is no width of the spot (Sheppard's correction).
    wider = (per_bin - 1.0) / 12.0
    spot[_YY] = max(per_bin * (yy / total - my * my) - wider, 0.0)
    spot[_YX] = per_bin * (yx / total - my * mx)
    spot[_XX] = max(per_bin * (xx / total - mx * mx) - wider, 0.0)
    spot[_PEAK], spot[_CUT] = peak, cut / peak
    spot[_PEAKS] = 1.0
    spot[_LONE] = 1.0 if beside < least else 0.0
    spot[_SATURATED], spot[_AT_GAP], spot[_VALID] = saturated, at_gap, 1.0
    spot[_BRIGHTEST] = 1.0 if saturated > 0.0 else highest / max(pixels.high, 1)


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _fit(pixels: _Pixels, rises: NDArray[np.float64], spot: NDArray[np.float32]) -> None:
    """Fill the columns of the Gaussian that fits a spot, and its place and widths, which are those
    of its pixels before; the others are measured already.

    ``rises``: of the background, counts per pixel down and along.

    Moments weighted by the Gaussian of the step before, which are half its variances where it fits
    (Bernstein and Jarvis, Astron. J. 123, 583, 2002). Of all steps the one counts that stands out
    by most. Pixels above a cut only begin it: near the noise they hold much of a spot's light, or
    none of it. Above a cut f a Gaussian has 1 + f ln f / (1 - f) of its second moment.
    """
    background, noise = float(spot[_BACKGROUND]), float(spot[_NOISE])
    variance = max(noise * noise, background, _LEAST_VARIANCE)
    y, x = float(spot[_Y]) - 0.5, float(spot[_X]) - 0.5
    first_y, first_x = y, x
    cut = min(max(float(spot[_CUT]), 0.005), 0.8)
    kept = 1.0 + cut * np.log(cut) / (1.0 - cut)
    least, most_across, most_along = _FIT_VARIANCES_PX2
    yy, xx, yx = float(spot[_YY]) / kept, float(spot[_XX]) / kept, float(spot[_YX]) / kept
    surest, photons, area = 0.0, 0.0, 0.0
    best = y, x, yy, yx, xx
    for _ in range(_FIT_STEPS + 1):
        half, mean = np.sqrt(0.25 * (xx - yy) ** 2 + yx * yx), 0.5 * (xx + yy)
        along = min(max(mean + half, least), most_along)
        across = min(max(mean - half, least), most_across)
        # The same axes with the variances that are allowed.
        c2, s2 = 1.0, 0.0
        if half > 0.0:
            c2, s2 = 0.5 * (xx - yy) / half, yx / half
        mean, half = 0.5 * (along + across), 0.5 * (along - across)
        xx, yy, yx = mean + half * c2, mean - half * c2, half * s2
        determinant = along * across
        reach = int(min(3.0 * np.sqrt(along) + 1.5, _FIT_REACH_PX))
        total, squares = 0.0, 0.0
        sum_y, sum_x, sum_yy, sum_yx, sum_xx = 0.0, 0.0, 0.0, 0.0, 0.0
        middle_y, middle_x = int(np.rint(y)), int(np.rint(x))
        for i in range(middle_y - reach, middle_y + reach + 1):
            for j in range(middle_x - reach, middle_x + reach + 1):
                dy, dx = i - y, j - x
                far = (yy * dx * dx - 2.0 * yx * dx * dy + xx * dy * dy) / determinant
                if far > _FIT_EXPONENT:
                    continue
                v = _count_at(pixels, i, j)
                if v < 0:
                    continue
                weight = np.exp(-0.5 * far)
                rise = (i - first_y) * rises[0] + (j - first_x) * rises[1]
                net = weight * (float(v) - background - rise)
                total += net
                squares += weight * weight
                sum_y += net * dy
                sum_x += net * dx
                sum_yy += net * dy * dy
                sum_yx += net * dy * dx
                sum_xx += net * dx * dx
        if squares <= 0.0 or total <= 0.0:
            break
        sigma = total / np.sqrt(squares * variance)
        if sigma > surest:
            surest, area = sigma, np.sqrt(determinant)
            best = y, x, yy, yx, xx
            photons = total / squares * 2.0 * np.pi * area
        my, mx = sum_y / total, sum_x / total
        to_yy = min(max(2.0 * (sum_yy / total - my * my), 0.25 * yy), 3.0 * yy)
        to_xx = min(max(2.0 * (sum_xx / total - mx * mx), 0.25 * xx), 3.0 * xx)
        to_yx = 2.0 * (sum_yx / total - my * mx)
        yy += _FIT_STEP * (to_yy - yy)
        xx += _FIT_STEP * (to_xx - xx)
        yx += _FIT_STEP * (to_yx - yx)
        most = 0.95 * np.sqrt(yy * xx)
        yx = min(max(yx, -most), most)
        y += min(max(my, -1.0), 1.0)
        x += min(max(mx, -1.0), 1.0)
    spot[_Y], spot[_X] = best[0] + 0.5, best[1] + 0.5
    spot[_YY], spot[_YX], spot[_XX] = best[2], best[3], best[4]
    under = max(4.0, 4.0 * np.pi * area)
    spot[_FITTED] = photons / np.sqrt(photons + under * noise * noise + 1e-9)
    spot[_FITTED_PX2] = area

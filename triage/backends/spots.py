"""The list of spots of a frame, measured in its native pixels.

Cells that stand out say where to look. There the local maxima of sums over 3 x 3 pixels are the
centres of spots; from the strongest on, each gathers the connected pixels above a cut into a
spot, and what is gathered belongs to no later one. One function for every backend, on the host:
the same cells and pixels give the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba as nb
import numpy as np
from numpy.typing import NDArray

from triage.backends.lz4 import load1, load2, load4, load8
from triage.backends.recipe import ANSCOMBE, Limits
from triage.records import EXPECTED_MAXIMUM, LEAST_SPOT_SNR, Spot, Views

__all__ = ["SpotFinder"]

_MOST_CELLS = 1024
"""Cells that are looked into."""
_LEAST_CELL = 2.0
"""Sigma by which such a cell stands out."""
_CELL_REACH = 4
"""Cells to each side that make a cell's background."""
_NOISE_REACH = 8
"""Cells to each side that make its noise."""
_LEAST_NOISE, _MOST_NOISE = 0.25, 2.0
"""Of that noise, in Poisson's: among spots side by side it is no noise that scatters."""
_ABSOLUTE = 0.8
"""Mean absolute deviation of a normal variable, in sigma."""
_MOST_CENTRES = 4096
_LEAST_CENTRE = 2.5
"""Sigma by which a sum over 3 x 3 pixels exceeds its background at a spot's centre."""
_RING_REACH = 8
"""Pixels to each side of a centre that make its background, ..."""
_CORE_REACH = 3
"""... without those as near as this."""
_RING_SIDE = 2 * _RING_REACH + 1
_CORE_FROM, _CORE_TO = _RING_REACH - _CORE_REACH, _RING_REACH + _CORE_REACH + 1
_LEAST_RING = 20
_MOST_CLIPS = 10
_CUT_SIGMA = 2.0
_CUT_SHARE = 0.1
_MOST_PIXELS = 1024
_APART_SIGMA = 2.5
_BESIDE_SHARE = 0.02
"""What light leaves around the brightest pixel at least: a lone one is no spot."""

_Y, _X, _INTENSITY = int(Spot.Y_PX), int(Spot.X_PX), int(Spot.INTENSITY)
_BACKGROUND, _NOISE, _SNR = int(Spot.BACKGROUND), int(Spot.NOISE), int(Spot.SNR)
_PIXELS, _YY, _YX, _XX = int(Spot.PIXELS), int(Spot.YY), int(Spot.YX), int(Spot.XX)
_PEAK, _CUT, _PEAKS, _LONE = int(Spot.PEAK), int(Spot.CUT), int(Spot.PEAKS), int(Spot.LONE)
_SATURATED, _AT_GAP, _VALID = int(Spot.SATURATED), int(Spot.AT_GAP), int(Spot.VALID)

_GAP, _BEYOND = np.int64(-1), np.int64(-2)
"""What stands for a count where there is none: masked or outside, and beyond saturation."""
_LARGEST = np.int64(2**31 - 1)


class _Pixels(NamedTuple):
    """A decoded frame as its bytes, and which of its values are measurements.

    Of one type, whatever the pixels are, so that what looks at them is compiled once. Pixels are
    turned to counts where they are looked at, which is near some of the cells only.
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


class SpotFinder:
    """Finds the spots of one frame after another; for one thread."""

    def __init__(self) -> None:
        self._owner = np.zeros((0, 0), np.int32)

    def find(
        self,
        photons: NDArray[Any],
        invalid: NDArray[np.uint8],
        bounds: Limits,
        views: Views,
        row: int,
        out: NDArray[np.float32],
    ) -> None:
        """Fill ``out``, (MOST_SPOTS, len(Spot)), with the spots of a frame.

        Args:
            photons: (y, x) decoded pixels, as ``recipe.as_photons`` gives them.
            invalid: (y, x), 1 where masked; (0, 0) without a mask.
            bounds: which values are measurements.
            views: of a batch; ``row`` is the frame's.
        """
        k = int(views.bin_factor[row])
        ny, nx = photons.shape
        rows, columns = -(-ny // k), -(-nx // k)
        cells = np.empty((_MOST_CELLS, 2), np.int64)
        level = np.empty((rows, columns), np.float64)
        found = _cells_that_stand_out(
            views.maximum[row],
            views.total[row],
            views.count[row],
            float(EXPECTED_MAXIMUM[k]),
            level,
            cells,
        )
        if self._owner.shape != photons.shape:
            self._owner = np.zeros(photons.shape, np.int32)
        item = photons.dtype.itemsize
        raw = photons.reshape(-1).view(np.uint8)
        raw.flags.writeable = False  # one type for the compiled code, whatever holds the pixels
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
        _find(pixels, k, cells[:found], level, self._owner, out)


@nb.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _sum_of_eight(x: NDArray[np.float64], i: int) -> Any:
    near = (x[i] + x[i + 1]) + (x[i + 2] + x[i + 3])
    return near + ((x[i + 4] + x[i + 5]) + (x[i + 6] + x[i + 7]))


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _box_sum(x: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """Sum over a square of 2 reach + 1, nothing beyond the edge; ``reach`` is 4 or 8."""
    rows, columns = x.shape
    out = np.empty_like(x)
    padded = np.zeros(columns + 2 * reach)
    sums = padded[reach : reach + columns]
    for y in range(min(reach, rows)):
        for i in range(columns):
            sums[i] += x[y, i]
    for y in range(rows):
        if y + reach < rows:
            for i in range(columns):
                sums[i] += x[y + reach, i]
        if y > reach:
            for i in range(columns):
                sums[i] -= x[y - reach - 1, i]
        # Along the row in one expression, which becomes vectors.
        along = out[y]
        if reach == 4:
            for i in range(columns):
                along[i] = _sum_of_eight(padded, i) + padded[i + 8]
        else:
            for i in range(columns):
                near = _sum_of_eight(padded, i) + _sum_of_eight(padded, i + 8)
                along[i] = near + padded[i + 16]
    return out


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _in_local_noise(
    sigma: NDArray[np.float64], inside: NDArray[np.float64], near: NDArray[np.float64]
) -> None:
    """Divide by the scatter of the cells around, within bounds."""
    size = np.empty_like(sigma)
    for y in range(sigma.shape[0]):
        for x in range(sigma.shape[1]):
            size[y, x] = min(abs(sigma[y, x]), 6.0) * inside[y, x]
    scatter = _box_sum(size, _NOISE_REACH)
    for y in range(sigma.shape[0]):
        for x in range(sigma.shape[1]):
            around = scatter[y, x] / max(near[y, x], 1.0) / _ABSOLUTE
            sigma[y, x] /= min(max(around, _LEAST_NOISE), _MOST_NOISE)


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _cells_that_stand_out(
    maximum: NDArray[np.uint32],
    total: NDArray[np.uint64],
    count: NDArray[np.uint16],
    expected: float,
    level: NDArray[np.float64],
    cells: NDArray[np.int64],
) -> int:
    """Fill ``cells`` with (y, x) of the cells that stand out most, best first; how many.

    By how many sigma the brightest pixel exceeds the cell's others, or the cell's sum exceeds
    the background around it and, in any of four directions, one of its two neighbours: a ring or
    an edge runs on to both sides. ``level``: mean background per pixel around each cell.
    """
    rows, columns = level.shape
    inside = np.empty((rows, columns))
    pixels = np.empty((rows, columns))
    counts = np.empty((rows, columns))
    excess = np.empty((rows, columns))
    for y in range(rows):
        for x in range(columns):
            n, largest, added = float(count[y, x]), float(maximum[y, x]), float(total[y, x])
            inside[y, x] = 1.0 if n > 0 else 0.0
            pixels[y, x] = n
            counts[y, x] = added
            mean = (added - largest) / (n - 1.0) if n > 1 else largest
            gap = np.sqrt(largest + ANSCOMBE) - np.sqrt(mean + ANSCOMBE)
            excess[y, x] = (2.0 * gap - expected) * inside[y, x]
    area = _box_sum(pixels, _CELL_REACH)
    near = _box_sum(inside, _NOISE_REACH)
    summed = _box_sum(counts, _CELL_REACH)
    # Once more without what stands out, so that a spot does not hide its neighbour or itself.
    for y in range(rows):
        for x in range(columns):
            mean = max(summed[y, x], 0.0) / max(area[y, x], 1.0) * pixels[y, x]
            counts[y, x] = min(counts[y, x], mean + 3.0 * np.sqrt(mean + 0.5))
    summed = _box_sum(counts, _CELL_REACH)
    whole = np.empty((rows, columns))
    for y in range(rows):
        for x in range(columns):
            level[y, x] = max(summed[y, x], 0.0) / max(area[y, x], 1.0)
            background = level[y, x] * pixels[y, x]
            over = np.sqrt(float(total[y, x]) + ANSCOMBE) - np.sqrt(background + ANSCOMBE)
            whole[y, x] = 2.0 * over * inside[y, x]
    _in_local_noise(excess, inside, near)
    _in_local_noise(whole, inside, near)
    score = np.empty(rows * columns)
    place = np.empty(rows * columns, np.int64)
    found = 0
    for y in range(rows):
        for x in range(columns):
            best = excess[y, x]
            # What neighbours take from the whole makes it no better.
            if inside[y, x] == 0 or max(best, whole[y, x]) <= _LEAST_CELL:
                continue
            if whole[y, x] > best:
                beside = 0.0
                if y > 0 and y + 1 < rows:
                    beside = max(beside, min(whole[y - 1, x], whole[y + 1, x]))
                    if x > 0 and x + 1 < columns:
                        falling = min(whole[y - 1, x - 1], whole[y + 1, x + 1])
                        rising = min(whole[y - 1, x + 1], whole[y + 1, x - 1])
                        beside = max(beside, max(falling, rising))
                if x > 0 and x + 1 < columns:
                    beside = max(beside, min(whole[y, x - 1], whole[y, x + 1]))
                best = max(best, whole[y, x] - beside)
            if best > _LEAST_CELL:
                score[found] = best
                place[found] = y * columns + x
                found += 1
    order = np.argsort(-score[:found], kind="mergesort")
    taken = min(found, cells.shape[0])
    for i in range(taken):
        cells[i, 0] = place[order[i]] // columns
        cells[i, 1] = place[order[i]] % columns
    return int(taken)


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
def _centres(
    pixels: _Pixels,
    k: int,
    cells: NDArray[np.int64],
    level: NDArray[np.float64],
    centres: NDArray[np.int64],
    sigma: NDArray[np.float64],
) -> int:
    """Fill ``centres`` with (y, x) of local maxima in and next to ``cells``; how many.

    ``sigma``: by how much each stands out. One that two cells share comes twice.
    """
    side = k + 4
    sums = np.empty((side, side))
    values = np.empty((side + 2, side + 2))
    found = 0
    for n in range(cells.shape[0]):
        background = level[cells[n, 0], cells[n, 1]]
        base = 2.0 * np.sqrt(9.0 * background + ANSCOMBE)
        # Below this a sum surely is no centre, and no root need be drawn.
        least = (1.0 - 1e-9) * ((0.5 * (base + _LEAST_CENTRE)) ** 2 - ANSCOMBE)
        top, left = cells[n, 0] * k - 2, cells[n, 1] * k - 2
        _rows(pixels, top - 1, left - 1, values)
        for i in range(side + 2):
            for j in range(side + 2):
                values[i, j] = values[i, j] if values[i, j] >= 0 else background
        for i in range(side):
            for j in range(side):
                sums[i, j] = (
                    (values[i, j] + values[i, j + 1] + values[i, j + 2])
                    + (values[i + 1, j] + values[i + 1, j + 1] + values[i + 1, j + 2])
                    + (values[i + 2, j] + values[i + 2, j + 1] + values[i + 2, j + 2])
                )
        for i in range(1, side - 1):
            for j in range(1, side - 1):
                own = sums[i, j]
                if own < least:
                    continue
                over = 2.0 * np.sqrt(own + ANSCOMBE) - base
                if over < _LEAST_CENTRE:
                    continue
                # Of equal neighbours the first one.
                if (
                    own <= sums[i - 1, j - 1]
                    or own <= sums[i - 1, j]
                    or own <= sums[i - 1, j + 1]
                    or own <= sums[i, j - 1]
                    or own < sums[i, j + 1]
                    or own < sums[i + 1, j - 1]
                    or own < sums[i + 1, j]
                    or own < sums[i + 1, j + 1]
                ):
                    continue
                if found == centres.shape[0]:
                    return found
                centres[found, 0] = top + i
                centres[found, 1] = left + j
                sigma[found] = over
                found += 1
    return found


@nb.njit(nogil=True, cache=True)
def _drop_repeated(centres: NDArray[np.int64], sigma: NDArray[np.float64], width: int) -> None:
    """Set ``sigma`` of a centre to -1 where the same one stands earlier."""
    place = (centres[:, 0] + 2) * (width + 4) + centres[:, 1] + 2
    order = np.argsort(place, kind="mergesort")
    for i in range(1, order.size):
        if place[order[i]] == place[order[i - 1]]:
            sigma[order[i]] = -1.0


@nb.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
def _background(
    pixels: _Pixels,
    y: int,
    x: int,
    level: float,
) -> tuple[float, float]:
    """Mean and sigma of a background pixel around (y, x), spots left out by clipping.

    From the ring alone: the cells around reach so far that a slope of the background would pass
    for a spot as large as itself.
    """
    values = np.empty((_RING_SIDE, _RING_SIDE))
    _rows(pixels, y - _RING_REACH, x - _RING_REACH, values)
    for i in range(_RING_SIDE):
        for j in range(_RING_SIDE):
            values[i, j] = values[i, j] if values[i, j] >= 0 else np.nan
    values[_CORE_FROM:_CORE_TO, _CORE_FROM:_CORE_TO] = np.nan
    flat = values.reshape(values.size)
    n = 0
    for i in range(flat.size):
        # What is no number equals nothing, and is below nothing.
        n += flat[i] == flat[i]
    if n < _LEAST_RING:
        return level, np.sqrt(max(level, 1.0 / _LEAST_RING))
    mean, noise, highest, used_before = 0.0, 0.0, np.inf, n + 1
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
        variance = max(squares / used - mean * mean, mean)
        noise = np.sqrt(max(variance, (total + 1.0) / used))
        # A single count never is too many: in the dark sigma is small and counts are whole.
        highest = mean + 3.0 * noise + 1.0
    return mean, noise


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
    cells: NDArray[np.int64],
    level: NDArray[np.float64],
    owner: NDArray[np.int32],
    out: NDArray[np.float32],
) -> None:
    """Fill ``out`` with the spots; ``owner``, zero everywhere, is left so."""
    out[:] = 0
    centres = np.empty((_MOST_CENTRES, 2), np.int64)
    sigma = np.empty(_MOST_CENTRES)
    found = _centres(pixels, k, cells, level, centres, sigma)
    _drop_repeated(centres[:found], sigma[:found], pixels.columns)
    order = np.argsort(-sigma[:found], kind="mergesort")
    spots = np.zeros((found, out.shape[1]))
    first = np.empty((found, 2), np.int64)
    taken = np.empty((_MOST_PIXELS, 2), np.int64)
    touched = np.empty((1 << 16, 2), np.int64)
    n_spots, n_touched = 0, 0
    for number in order:
        if sigma[number] < 0.0:
            break
        y, x = centres[number, 0], centres[number, 1]
        if y < 0 or x < 0 or y >= pixels.rows or x >= pixels.columns:
            continue
        mean = level[y // k, x // k]
        # The brightest pixel of the nine, of equal ones the first.
        brightest, by, bx = np.int64(-1), y, x
        for i in range(y - 1, y + 2):
            for j in range(x - 1, x + 2):
                v = _count_at(pixels, i, j)
                if v > brightest:
                    brightest, by, bx = v, i, j
        if brightest < 1:
            continue
        whose = owner[by, bx]
        if whose != 0:
            spot = whose - 1
            to_y, to_x = first[spot, 0], first[spot, 1]
            if (y, x) != (to_y, to_x) and _is_apart(pixels, y, x, to_y, to_x, mean):
                spots[spot, _PEAKS] += 1.0
            continue
        mean, noise = _background(pixels, y, x, mean)
        peak = float(brightest) - mean
        cut = max(_CUT_SIGMA * noise, _CUT_SHARE * peak)
        if peak < cut:
            continue
        n = _gather(pixels, by, bx, mean + cut, n_spots + 1, owner, taken)
        for i in range(n):
            if n_touched < touched.shape[0]:
                touched[n_touched] = taken[i]
                n_touched += 1
            else:
                owner[taken[i, 0], taken[i, 1]] = 0
        first[n_spots, 0], first[n_spots, 1] = y, x
        _measure(pixels, taken[:n], mean, noise, cut, by, bx, spots[n_spots])
        n_spots += 1
    for i in range(n_touched):
        owner[touched[i, 0], touched[i, 1]] = 0
    ranked = np.argsort(-spots[:n_spots, _SNR], kind="mergesort")
    for place in range(min(n_spots, out.shape[0])):
        spot = spots[ranked[place]]
        if spot[_SNR] < LEAST_SPOT_SNR:
            return
        for column in range(out.shape[1]):
            out[place, column] = np.float32(spot[column])


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _gather(
    pixels: _Pixels,
    y: int,
    x: int,
    least: float,
    number: int,
    owner: NDArray[np.int32],
    taken: NDArray[np.int64],
) -> int:
    """Fill ``taken`` with the connected pixels of at least ``least``; how many."""
    owner[y, x] = number
    taken[0, 0], taken[0, 1] = y, x
    n, at = 1, 0
    while at < n:
        cy, cx = taken[at, 0], taken[at, 1]
        at += 1
        for i in range(cy - 1, cy + 2):
            for j in range(cx - 1, cx + 2):
                v = _count_at(pixels, i, j)
                if v < 0 or float(v) < least or owner[i, j] != 0:
                    continue
                if n == taken.shape[0]:
                    return n
                owner[i, j] = number
                taken[n, 0], taken[n, 1] = i, j
                n += 1
    return n


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _measure(
    pixels: _Pixels,
    taken: NDArray[np.int64],
    mean: float,
    noise: float,
    cut: float,
    brightest_y: int,
    brightest_x: int,
    spot: NDArray[np.float64],
) -> None:
    """Fill the columns of a spot whose pixels are ``taken``."""
    n = taken.shape[0]
    total, sum_y, sum_x, yy, yx, xx, peak = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    at_gap, saturated = 0.0, 0.0
    for i in range(n):
        y, x = taken[i, 0], taken[i, 1]
        # Relative to the brightest pixel, so that squares lose no digits.
        dy, dx = float(y - brightest_y), float(x - brightest_x)
        net = float(_count_at(pixels, y, x)) - mean
        total += net
        sum_y += net * dy
        sum_x += net * dx
        yy += net * dy * dy
        yx += net * dy * dx
        xx += net * dx * dx
        peak = max(peak, net)
        for a in range(y - 1, y + 2):
            for b in range(x - 1, x + 2):
                v = _count_at(pixels, a, b)
                at_gap = 1.0 if v == _GAP else at_gap
                saturated = 1.0 if v == _BEYOND else saturated
    my, mx = sum_y / total, sum_x / total
    beside, others = 0.0, 0
    for a in range(brightest_y - 1, brightest_y + 2):
        for b in range(brightest_x - 1, brightest_x + 2):
            v = _count_at(pixels, a, b)
            if v >= 0 and (a != brightest_y or b != brightest_x):
                beside += float(v) - mean
                others += 1
    least = max(_CUT_SIGMA * np.sqrt(others * noise * noise + 1.0), _BESIDE_SHARE * peak)
    spot[_Y], spot[_X] = brightest_y + 0.5 + my, brightest_x + 0.5 + mx
    spot[_INTENSITY], spot[_BACKGROUND], spot[_NOISE] = total, mean, noise
    spot[_SNR] = total / np.sqrt(total + n * noise * noise)
    spot[_PIXELS] = n
    spot[_YY] = max(yy / total - my * my, 0.0)
    spot[_YX] = yx / total - my * mx
    spot[_XX] = max(xx / total - mx * mx, 0.0)
    spot[_PEAK], spot[_CUT] = peak, cut / peak
    spot[_PEAKS] += 1.0
    spot[_LONE] = 1.0 if beside < least else 0.0
    spot[_SATURATED], spot[_AT_GAP], spot[_VALID] = saturated, at_gap, 1.0

"""A spot finder that shares nothing with the network: signal to noise at native pixels.

A hit is defined by visible spots, those with I / sqrt(I + B n) > 5, so that is what is looked
for: squares of three sizes whose counts exceed the ring around them by five sigma. Two more
conditions keep out what an audit must not take for a spot: a hot pixel is brighter than all of
its neighbours together, and along an edge, a ring, a streak or a row of large pixels some
direction leads on at the same height.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import numba as nb
import numpy as np
from numpy.typing import NDArray

from triage.records import ICE_D_ANGSTROM, Geometry

__all__ = ["Spots", "crystal_spots", "find_spots"]

_LEAST_SIGMA = 5.0
_BESIDE_SIGMA = 3.0
"""By how much a spot exceeds the better of two opposite neighbours, in each of 8 directions."""
_REACHES_PX = (1, 2, 4)
"""Half sizes of the squares: 3, 5 and 9 pixels, from a photon counter's spot to a smeared one."""
_LARGEST = 2**24
"""Counts are cut here; an overload is a spot long before."""

_ICE_TOLERANCE = 0.01
"""Share of d to each side of a line."""
_LARGEST_D_ANGSTROM = 25.0
_BLOCKS = 10
_MOST_PER_BLOCK = 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spots:
    """Spots of one frame, the clearest first.

    Attributes:
        x_px, y_px: (n,) float64, centre of the counts over the background, from the outer corner:
            0.5 is the middle of the first pixel.
        square_x, square_y: (n,) int64, middle pixel of the square that was summed.
        reach_px: (n,) int64, half size of the square.
        photons: (n,) float64, counts of the square over the background, in photons.
        sigma: (n,) float64, signal to noise.
    """

    x_px: NDArray[np.float64]
    y_px: NDArray[np.float64]
    square_x: NDArray[np.int64]
    square_y: NDArray[np.int64]
    reach_px: NDArray[np.int64]
    photons: NDArray[np.float64]
    sigma: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.x_px)

    def where(self, chosen: NDArray[np.bool_]) -> Spots:
        """Those that are chosen."""
        return Spots(
            x_px=self.x_px[chosen],
            y_px=self.y_px[chosen],
            square_x=self.square_x[chosen],
            square_y=self.square_y[chosen],
            reach_px=self.reach_px[chosen],
            photons=self.photons[chosen],
            sigma=self.sigma[chosen],
        )


def find_spots(counts: NDArray[Any], valid: NDArray[np.bool_]) -> Spots:
    """Places that stand out of the ring around them, none inside another.

    The gain is the frame's own: the median over small windows of variance over mean, at least 1.
    On a photon counter it is 1, on a CCD the counts that a photon gives.

    Args:
        counts: (y, x) of any integer or float type; negative values count as 0.
        valid: (y, x) True where a pixel is a measurement.
    """
    shape = counts.shape[0], counts.shape[1]
    whole, total, pixels = _room_for(shape)
    whole[...] = np.clip(counts, 0, _LARGEST)
    used = np.ascontiguousarray(valid)
    _fill_tables(whole, used, total, pixels)
    gain = _gain(whole, used)
    found = [_candidates(whole, used, total, pixels, gain, reach) for reach in _REACHES_PX]
    table = np.concatenate(found)
    # Clearest first; of the same clearness the first in the frame, so that the order is one.
    table = table[np.lexsort((table[:, 1], table[:, 0], -table[:, 4]))]
    table = table[_apart(table, *whole.shape)]
    squares = table[:, :3].astype(np.int64)
    centre = _centres(whole, used, squares, table[:, 5])
    return Spots(
        x_px=centre[:, 1],
        y_px=centre[:, 0],
        square_x=squares[:, 1],
        square_y=squares[:, 0],
        reach_px=squares[:, 2],
        photons=table[:, 3] / gain,
        sigma=table[:, 4],
    )


def crystal_spots(spots: Spots, shape: tuple[int, int], geometry: Geometry | None) -> int:
    """How many of the spots speak for a crystal.

    Left out are, where the geometry is known, those on a powder line of ice and those at the
    smallest angles, where slits and windows scatter. Of a tenth by a tenth of the frame at most
    two count: reflections lie all over a frame; tracks, flares and clusters of bad pixels do not.
    """
    if geometry is not None:
        inverse_d = geometry.inverse_d(spots.x_px, spots.y_px)
        off_ice = np.abs(inverse_d[:, None] * np.array(ICE_D_ANGSTROM) - 1.0) > _ICE_TOLERANCE
        spots = spots.where(off_ice.all(1) & (inverse_d > 1.0 / _LARGEST_D_ANGSTROM))
    row = (spots.y_px * _BLOCKS / shape[0]).astype(np.int64)
    column = (spots.x_px * _BLOCKS / shape[1]).astype(np.int64)
    per_block = np.bincount(row * _BLOCKS + column, minlength=_BLOCKS**2)
    return int(np.minimum(per_block, _MOST_PER_BLOCK).sum())


class _Room(NamedTuple):
    """What a thread works in: 24 bytes a pixel, 108 MB at 4M."""

    whole: NDArray[np.int64]
    total: NDArray[np.int64]
    pixels: NDArray[np.int64]


_kept = threading.local()


def _room_for(shape: tuple[int, int]) -> _Room:
    """The arrays of this thread for frames of one shape; held for the next frame.

    Made anew for each, they would make the memory of a run rise and fall by their size, and the
    operating system clear thirty thousand pages a frame while the other threads ask for theirs.
    """
    room: _Room | None = getattr(_kept, "room", None)
    if room is None or room.whole.shape != shape:
        _kept.room = None  # let go before as much is asked for
        table = shape[0] + 1, shape[1] + 1
        room = _Room(
            np.empty(shape, np.int64), np.zeros(table, np.int64), np.zeros(table, np.int64)
        )
        _kept.room = room
    return room


@nb.njit(cache=True, nogil=True)
def _fill_tables(
    counts: NDArray[np.int64],
    valid: NDArray[np.bool_],
    total: NDArray[np.int64],
    pixels: NDArray[np.int64],
) -> None:
    # Summed-area tables of counts and of valid pixels; the first row and column stay 0.
    ny, nx = counts.shape
    for y in range(ny):
        row_total, row_pixels = np.int64(0), np.int64(0)
        for x in range(nx):
            if valid[y, x]:
                row_total += counts[y, x]
                row_pixels += 1
            total[y + 1, x + 1] = total[y, x + 1] + row_total
            pixels[y + 1, x + 1] = pixels[y, x + 1] + row_pixels


@nb.njit(cache=True, nogil=True)
def _square(table: NDArray[np.int64], y: int, x: int, reach: int) -> int:
    # Over the square of 2 reach + 1 pixels, as far as it is inside.
    y0, y1 = max(0, y - reach), min(table.shape[0] - 1, y + reach + 1)
    x0, x1 = max(0, x - reach), min(table.shape[1] - 1, x + reach + 1)
    if y1 <= y0 or x1 <= x0:
        return 0
    return int(table[y1, x1] - table[y0, x1] - table[y1, x0] + table[y0, x0])


@nb.njit(cache=True, nogil=True)
def _gain(counts: NDArray[np.int64], valid: NDArray[np.bool_]) -> float:
    side = 7
    ratios = []
    for y0 in range(0, counts.shape[0] - side + 1, side):
        for x0 in range(0, counts.shape[1] - side + 1, side):
            n, total, squares = 0, 0.0, 0.0
            for y in range(y0, y0 + side):
                for x in range(x0, x0 + side):
                    if valid[y, x]:
                        n += 1
                        total += counts[y, x]
                        squares += float(counts[y, x]) ** 2
            if n > 24 and total > 0:
                ratios.append((squares - total * total / n) / (n - 1) * n / total)
    if len(ratios) < 10:
        return 1.0
    return max(1.0, float(np.median(np.array(ratios))))


@nb.njit(cache=True, nogil=True)
def _candidates(
    counts: NDArray[np.int64],
    valid: NDArray[np.bool_],
    total: NDArray[np.int64],
    pixels: NDArray[np.int64],
    gain: float,
    reach: int,
) -> NDArray[np.float64]:
    # One row per place: y, x, reach, counts over the background, sigma, background per pixel.
    rows = []
    side = 2 * reach + 1
    ring, hole = 2 * reach + 3, reach + 1
    for y in range(counts.shape[0]):
        for x in range(counts.shape[1]):
            if not valid[y, x] or counts[y, x] == 0:
                continue
            inner = _square(total, y, x, reach)
            if inner < _LEAST_SIGMA**2 * gain:
                continue
            n = _square(pixels, y, x, reach)
            if 2 * n <= side * side:
                continue
            ring_n = _square(pixels, y, x, ring) - _square(pixels, y, x, hole)
            if ring_n < 16:
                continue
            around = (_square(total, y, x, ring) - _square(total, y, x, hole)) / ring_n
            net = inner - around * n
            sigma = net / np.sqrt(gain * (inner + around * n * n / ring_n))
            if sigma <= _LEAST_SIGMA or net <= _LEAST_SIGMA**2 * gain:
                continue
            if not _stands_alone(total, pixels, y, x, reach, inner / n, n, gain):
                continue
            if _is_hot(counts, valid, y, x, reach, inner, around, n, gain):
                continue
            rows.append((float(y), float(x), float(reach), net, sigma, around))
    out = np.empty((len(rows), 6))
    for i, row in enumerate(rows):
        for j in range(6):
            out[i, j] = row[j]
    return out


@nb.njit(cache=True, nogil=True)
def _stands_alone(
    total: NDArray[np.int64],
    pixels: NDArray[np.int64],
    y: int,
    x: int,
    reach: int,
    level: float,
    n: int,
    gain: float,
) -> bool:
    distance = 2 * reach + 3
    directions = 0
    for turn in range(8):
        dy = round(distance * np.sin(turn * np.pi / 8))
        dx = round(distance * np.cos(turn * np.pi / 8))
        rival, rival_n = 0.0, 0
        for sign in (-1, 1):
            ty, tx = y + sign * dy, x + sign * dx
            m = _square(pixels, ty, tx, reach)
            if 2 * m <= n:
                continue
            beside = _square(total, ty, tx, reach) / m
            if rival_n == 0 or beside > rival:
                rival, rival_n = beside, m
        if rival_n == 0:
            continue
        directions += 1
        if level - rival <= _BESIDE_SIGMA * np.sqrt(gain * (level / n + rival / rival_n)):
            return False
    return directions >= 6


@nb.njit(cache=True, nogil=True)
def _is_hot(
    counts: NDArray[np.int64],
    valid: NDArray[np.bool_],
    y: int,
    x: int,
    reach: int,
    inner: int,
    around: float,
    n: int,
    gain: float,
) -> bool:
    # What is left without the brightest pixel must itself be more than chance.
    highest = np.int64(0)
    for ty in range(max(0, y - reach), min(counts.shape[0], y + reach + 1)):
        for tx in range(max(0, x - reach), min(counts.shape[1], x + reach + 1)):
            if valid[ty, tx]:
                highest = max(highest, counts[ty, tx])
    rest = inner - highest - around * (n - 1)
    return bool(rest <= 0.1 * highest or rest <= 2.5 * np.sqrt(gain * (around * n + 1.0)))


@nb.njit(cache=True, nogil=True)
def _apart(table: NDArray[np.float64], ny: int, nx: int) -> NDArray[np.bool_]:
    # In the order given: none whose square, and a pixel around it, touches that of one before.
    taken = np.zeros((ny, nx), np.bool_)
    out = np.zeros(table.shape[0], np.bool_)
    for i in range(table.shape[0]):
        y, x, reach = int(table[i, 0]), int(table[i, 1]), int(table[i, 2])
        y0, y1 = max(0, y - reach - 1), min(ny, y + reach + 2)
        x0, x1 = max(0, x - reach - 1), min(nx, x + reach + 2)
        if not taken[y0:y1, x0:x1].any():
            out[i] = True
            taken[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1] = True
    return out


@nb.njit(cache=True, nogil=True)
def _centres(
    counts: NDArray[np.int64],
    valid: NDArray[np.bool_],
    squares: NDArray[np.int64],
    around: NDArray[np.float64],
) -> NDArray[np.float64]:
    # (n, 2) y, x of the counts over the background in each square.
    out = np.empty((squares.shape[0], 2))
    for i in range(squares.shape[0]):
        y, x, reach = squares[i, 0], squares[i, 1], squares[i, 2]
        weight, at_y, at_x = 0.0, 0.0, 0.0
        for py in range(max(0, y - reach), min(counts.shape[0], y + reach + 1)):
            for px in range(max(0, x - reach), min(counts.shape[1], x + reach + 1)):
                net = counts[py, px] - around[i]
                if valid[py, px] and net > 0:
                    weight += net
                    at_y += net * (py + 0.5)
                    at_x += net * (px + 0.5)
        out[i, 0], out[i, 1] = at_y / weight, at_x / weight
    return out

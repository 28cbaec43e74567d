"""The fast exit's maps, counts and candidates on a CPU: the numbers of ``triagenet.evidence``.

``triagenet.evidence`` is the description and runs on any device; this is what a CPU runs on every
frame, one at a time. There are two programs of it: ``_evidence.c``, in vectors, where it was built,
and its twin below. All agree to rounding, and of the cells that stand out equally the first in the
frame comes first.
"""

from __future__ import annotations

import importlib
import math
import weakref
from collections import deque
from typing import Any

import numba as nb
import numpy as np
import torch
from numpy.typing import NDArray

from triage.nets.triagenet import (
    _AROUND,
    CANDIDATES,
    COUNTS,
    LEAST,
    LOCAL_REACH,
    MAPS,
    NEAR_REACH,
    PEAKS,
    THRESHOLDS,
    Evidence,
)
from triage.records import EXPECTED_MAXIMUM

__all__ = ["LANES", "evidence_on_cpu"]

_compiled: Any
try:
    _compiled = importlib.import_module("triage.nets._evidence")
except ImportError:
    _compiled = None

LANES: tuple[int, ...] = (*(_compiled.LANES if _compiled else ()), 0)
"""Widths of vector that this processor has a compiled program for, widest first; 0 is the twin."""

_FLOORS = np.array(THRESHOLDS, np.float32) - np.float32(0.25)
"""Where the soft steps of the thresholds begin."""
_SEEN = MAPS + 1 + 9 * len(_AROUND)


def evidence_on_cpu(
    overview: NDArray[np.float32], bin_factor: int, *, lanes: int = LANES[0]
) -> Evidence:
    """What stands out in one frame.

    Args:
        overview: (3, Y, X) float32, rows contiguous, Y and X multiples of 32, zero outside the
            frame; a corner of a larger array will do.
        bin_factor: pixels per cell side.
        lanes: one of :data:`LANES`.
    """
    _, height, width = overview.shape
    planes = _lent.array((MAPS + 1, height, width))
    counts = np.empty(COUNTS, np.float32)
    candidates = np.empty((CANDIDATES, _SEEN), np.float32)
    places = np.empty(CANDIDATES, np.int64)
    chance = float(EXPECTED_MAXIMUM[bin_factor])
    filled = (planes, counts, candidates, places)
    if lanes:
        _compiled.evidence(overview, bin_factor, chance, _FLOORS, LEAST, *filled, lanes)
    else:
        _twin(overview, bin_factor, chance, *filled)
    tensors = [torch.from_numpy(each[None]) for each in filled]
    return Evidence(planes=tensors[0], counts=tensors[1], candidates=tensors[2], places=tensors[3])


class _Lent:
    """Memory that the planes of frames take turns in.

    A scorer keeps the planes of a batch, and to be given as much memory anew for every batch costs
    more than the maps themselves.
    """

    def __init__(self, keep: int = 64, shapes: int = 4) -> None:
        self._keep, self._shapes = keep, shapes
        self._returned: dict[tuple[int, ...], deque[bytearray]] = {}

    def array(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """An array, not filled, that starts where a cache line does."""
        returned = self._returned.get(shape)
        if returned is None:
            if len(self._returned) >= self._shapes:
                self._returned.clear()
            returned = self._returned.setdefault(shape, deque(maxlen=self._keep))
        size = math.prod(shape)
        try:
            block = returned.pop()
        except IndexError:
            block = bytearray(4 * size + _LINE_BYTES)
        whole = np.frombuffer(block, np.uint8)
        first = -whole.ctypes.data % _LINE_BYTES
        floats = np.frombuffer(block, np.float32, size, first)
        # Every view of it, a tensor's too, holds this very array: the last one returns the block.
        weakref.finalize(floats, returned.append, block).atexit = False
        return floats.reshape(shape)


_LINE_BYTES = 64
_lent = _Lent()


def _twin(
    overview: NDArray[np.float32],
    bin_factor: int,
    chance: float,
    planes: NDArray[np.float32],
    counts: NDArray[np.float32],
    candidates: NDArray[np.float32],
    places: NDArray[np.int64],
) -> None:
    # All numbers go in as arguments: compiled code is kept, and would keep old constants too.
    _evidence(
        np.ascontiguousarray(overview),
        bin_factor,
        chance,
        _FLOORS,
        NEAR_REACH,
        LOCAL_REACH,
        planes,
        counts,
    )
    keys = np.empty(planes[0].size, np.uint64)
    found = keys[: _strong(planes, _PEAKS, LEAST, keys)]
    if found.size < CANDIDATES:  # a quiet frame: the order goes on below what counts
        found = keys[: _strong(planes, _PEAKS, -np.inf, keys)]
    if found.size > CANDIDATES:
        found = np.partition(found, CANDIDATES - 1)[:CANDIDATES]
    _gather(planes, np.sort(found), _PEAKS, _NEIGHBOURS, LEAST, candidates, places)


_PEAKS = np.array(PEAKS)
_NEIGHBOURS = np.array(_AROUND)
_FAST: Any = {"reassoc", "contract", "nsz"}


@nb.njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def _box(x: NDArray[np.float32], reach: int, out: NDArray[np.float32]) -> None:
    # Sum over a square of 2 reach + 1 cells, zeros beyond the edge. Running sums in double
    # precision, so that what left the window leaves nothing behind.
    height, width = x.shape
    column = np.zeros(width)
    for y in range(min(reach, height)):
        for i in range(width):
            column[i] += x[y, i]
    for y in range(height):
        if y + reach < height:
            for i in range(width):
                column[i] += x[y + reach, i]
        if y - reach - 1 >= 0:
            for i in range(width):
                column[i] -= x[y - reach - 1, i]
        run = 0.0
        for i in range(min(reach, width)):
            run += column[i]
        for i in range(width):
            if i + reach < width:
                run += column[i + reach]
            if i - reach - 1 >= 0:
                run -= column[i - reach - 1]
            out[y, i] = run


@nb.njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def _expanded(c: np.float32) -> np.float32:
    square = c * c
    e = np.float32(0.5) * (square + np.sqrt(square * square + np.float32(4.0) * square))
    return np.float32(e if c >= 0 else -e)


@nb.njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def _own_noise(
    sigma: NDArray[np.float32], inside: NDArray[np.float32], cells: float, out: NDArray[np.float32]
) -> float:
    # Into ``out`` in units of the frame's scatter; its log over Poisson's.
    height, width = sigma.shape
    total = 0.0
    for y in range(height):
        for x in range(width):
            total += min(max(sigma[y, x], np.float32(-3.0)), np.float32(6.0)) * inside[y, x]
    middle = np.float32(max(total / cells, 0.0))
    near, far = 0.0, 0.0
    for y in range(height):
        for x in range(width):
            away = abs(sigma[y, x] - middle) * inside[y, x]
            near += min(away, np.float32(6.0))
            far += min(away, np.float32(100.0))
    scale = np.float32(1.0 / max(near / cells / 0.8, 1.0))
    for y in range(height):
        for x in range(width):
            out[y, x] = (sigma[y, x] - middle) * scale * inside[y, x]
    return float(np.log(far / cells + 0.1))


@nb.njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def _local_noise(
    sigma: NDArray[np.float32],
    inside: NDArray[np.float32],
    around: NDArray[np.float32],
    reach: int,
    spare: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    height, width = sigma.shape
    for y in range(height):
        for x in range(width):
            spare[y, x] = min(abs(sigma[y, x]), np.float32(6.0)) * inside[y, x]
    _box(spare, reach, out)
    for y in range(height):
        for x in range(width):
            scatter = out[y, x] / max(around[y, x], np.float32(1.0))
            out[y, x] = (
                sigma[y, x] / max(scatter / np.float32(0.8), np.float32(0.25)) * inside[y, x]
            )


@nb.njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def _blob(sigma: NDArray[np.float32], distance: int, out: NDArray[np.float32]) -> None:
    # Over the better of two opposite neighbours, in the worst of four directions: over the best
    # of all eight.
    height, width = sigma.shape
    none = np.zeros(width, np.float32)
    ends, best = np.empty(width, np.float32), np.zeros(width + 2 * distance, np.float32)
    for y in range(height):
        above = sigma[y - distance] if y >= distance else none
        below = sigma[y + distance] if y + distance < height else none
        for x in range(width):
            ends[x] = max(above[x], below[x])
            best[x + distance] = max(ends[x], sigma[y, x])
        for x in range(width):
            level = max(max(best[x], best[x + 2 * distance]), ends[x])
            out[y, x] = sigma[y, x] - level


@nb.njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def _evidence(
    overview: NDArray[np.float32],
    k: int,
    expected_maximum: float,
    floors: NDArray[np.float32],
    near: int,
    local: int,
    planes: NDArray[np.float32],
    counts: NDArray[np.float32],
) -> None:
    _, height, width = overview.shape
    f = np.float32
    shape = (height, width)
    inside, pixels = np.empty(shape, f), np.empty(shape, f)
    excess, dimmer, total = np.empty(shape, f), np.empty(shape, f), np.empty(shape, f)
    cells, bright = 0.0, 0.0
    for y in range(height):
        for x in range(width):
            share = overview[2, y, x]
            there = f(1.0) if share > 0 else f(0.0)
            n = share * f(k * k)
            e, u = _expanded(overview[0, y, x]), _expanded(overview[1, y, x])
            half = f(0.5) * u
            rest = max(half * half - f(0.375), f(0.0)) * max(n - f(1.0), f(0.0)) * there
            top = f(0.5) * (e + f(expected_maximum) + u)
            inside[y, x], pixels[y, x] = there, n
            excess[y, x], dimmer[y, x] = e, rest
            total[y, x] = rest + max(top * top - f(0.375), f(0.0)) * there
            level = overview[1, y, x] * there
            planes[-1, y, x] = level
            cells += float(there)
            bright += float(level)
    cells = max(cells, 1.0)

    area, around, spare = np.empty(shape, f), np.empty(shape, f), np.empty(shape, f)
    _box(pixels, near, area)
    _box(total, near, around)
    for y in range(height):
        for x in range(width):
            area[y, x] = max(area[y, x], f(1e-3))
            mean = around[y, x] / area[y, x] * pixels[y, x]
            # Once more without what stands out: a spot must not hide its neighbour or itself.
            spare[y, x] = min(total[y, x], mean + f(3.0) * np.sqrt(mean + f(0.5)))
    _box(spare, near, around)
    whole, rest_sigma = np.empty(shape, f), np.empty(shape, f)
    for y in range(height):
        for x in range(width):
            mean, n, there = around[y, x] / area[y, x], pixels[y, x], inside[y, x]
            others = max(n - f(1.0), f(0.0))
            c = f(0.375)
            whole[y, x] = f(2.0) * (np.sqrt(total[y, x] + c) - np.sqrt(mean * n + c)) * there
            rest_sigma[y, x] = (
                f(2.0) * (np.sqrt(dimmer[y, x] + c) - np.sqrt(mean * others + c)) * there
            )
    maps = planes.shape[0] - 1
    last = maps * floors.size
    counts[last] = bright / cells
    counts[last + 1], counts[last + 2] = np.log(f(k)), np.log(cells)
    counts[last + 3] = _own_noise(excess, inside, cells, planes[0])
    counts[last + 4] = _own_noise(rest_sigma, inside, cells, planes[1])
    counts[last + 5] = _own_noise(whole, inside, cells, planes[3])
    _box(inside, local, around)
    _local_noise(excess, inside, around, local, spare, planes[6])
    _local_noise(rest_sigma, inside, around, local, spare, planes[7])
    for y in range(height):
        for x in range(width):
            planes[2, y, x] = min(planes[0, y, x], planes[1, y, x])
            planes[8, y, x] = min(planes[6, y, x], planes[7, y, x])
    _blob(planes[3], 1, planes[4])
    _blob(planes[3], 2, planes[5])
    _blob(planes[7], 1, planes[9])
    _blob(planes[7], 2, planes[10])
    for i in range(maps):
        found = np.zeros(floors.size)
        for y in range(height):
            for x in range(width):
                e = planes[i, y, x]
                planes[i, y, x] = e / np.sqrt(f(1.0) + abs(e)) * inside[y, x]
            for j in range(floors.size):
                part = f(0.0)
                for x in range(width):
                    part += min(max(planes[i, y, x] - floors[j], f(0.0)), f(0.5))
                if part == 0:
                    break  # and above the next ones are none either
                found[j] += part
        for j in range(floors.size):
            counts[i * floors.size + j] = np.log1p(2.0 * found[j])


@nb.njit(cache=True, nogil=True)
def _strong(
    planes: NDArray[np.float32], peaks: NDArray[np.int64], least: float, keys: NDArray[np.uint64]
) -> int:
    # Keys of the cells that stand out by more than ``least``; they ascend from the strongest, of
    # equals from the first in the frame.
    _, height, width = planes.shape
    row = np.empty(width, np.float32)
    bits = row.view(np.uint32)
    n = 0
    for y in range(height):
        row[:] = planes[peaks[0], y]
        for i in peaks[1:]:
            for x in range(width):
                row[x] = max(row[x], planes[i, y, x])
        for x in range(width):
            if row[x] > least:
                row[x] += np.float32(0.0)
                key = bits[x] if row[x] < 0 else np.uint32(0x7FFFFFFF) - bits[x]
                keys[n] = (np.uint64(key) << np.uint64(32)) | np.uint64(y * width + x)
                n += 1
    return n


@nb.njit(cache=True, nogil=True)
def _gather(
    planes: NDArray[np.float32],
    keys: NDArray[np.uint64],
    peaks: NDArray[np.int64],
    neighbours: NDArray[np.int64],
    least: float,
    candidates: NDArray[np.float32],
    places: NDArray[np.int64],
) -> None:
    # All planes of each cell, and of some the 3 x 3 cells around; zeros for those below ``least``.
    maps, height, width = planes.shape
    candidates[:] = 0.0
    places[:] = 0
    for i in range(keys.size):
        at = np.int64(keys[i] & np.uint64(0xFFFFFFFF))
        y, x = at // width, at % width
        places[i] = at
        peak = planes[peaks[0], y, x]
        for j in peaks[1:]:
            peak = max(peak, planes[j, y, x])
        if not peak > least:
            continue
        candidates[i, :maps] = planes[:, y, x]
        next_one = maps
        for j in neighbours:
            for v in range(y - 1, y + 2):
                for u in range(x - 1, x + 2):
                    if 0 <= v < height and 0 <= u < width:
                        candidates[i, next_one] = planes[j, v, u]
                    next_one += 1

"""Poisson counts, exact and fast: a sum of Poisson numbers is Poisson of the sum of their means.

A mean is split into a multiple of 8, a multiple of 0.1 and a rest below 0.1. The first two are
drawn from tables by Walker's alias method, one random number each; the rest is nearly always
nothing. Random numbers are xoshiro256+ (Blackman and Vigna 2021).
"""

from __future__ import annotations

import functools
import math

import numba as nb
import numpy as np
from numpy.typing import NDArray

__all__ = ["poisson"]

_COARSE, _FINE = 8.0, 0.1
_COARSE_TABLES, _FINE_TABLES = 80, 80


def poisson(expected: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Counts (y, x), whole numbers as float64, of the means ``expected`` (y, x)."""
    return _draw(np.ascontiguousarray(expected), seed, *_tables())


@functools.cache
def _tables() -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Start, length and first count of each table; shares kept; counts taken otherwise."""
    means = [_COARSE * i for i in range(_COARSE_TABLES)] + [_FINE * i for i in range(_FINE_TABLES)]
    index, shares, others = np.zeros((len(means), 3), np.int64), [], []
    start = 0
    for i, mean in enumerate(means):
        # Counts beyond have less than 1e-12 of the weight.
        reach = 8.0 * math.sqrt(mean) + 16.0
        first, last = max(0, int(mean - reach)), int(mean + reach)
        counts = np.arange(first, last + 1)
        log_factorial = np.array([math.lgamma(n + 1.0) for n in counts])
        weights = np.where(counts == 0, 1.0, 0.0)
        if mean > 0:
            weights = np.exp(counts * math.log(mean) - mean - log_factorial)
        kept, other = _alias(weights / weights.sum())
        index[i] = start, len(counts), first
        start += len(counts)
        shares.append(kept)
        others.append(other.astype(np.float64))
    return index, np.concatenate(shares), np.concatenate(others)


def _alias(weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """For each slot the share that is its own, and whose the remainder is (Vose 1991)."""
    scaled = weights * len(weights)
    kept, other = np.ones(len(weights)), np.arange(len(weights))
    small = [i for i, value in enumerate(scaled) if value < 1.0]
    large = [i for i, value in enumerate(scaled) if value >= 1.0]
    while small and large:
        low, high = small.pop(), large[-1]
        kept[low], other[low] = scaled[low], high
        scaled[high] -= 1.0 - scaled[low]
        if scaled[high] < 1.0:
            small.append(large.pop())
    return kept, other


@nb.njit(cache=True, inline="always")
def _rotated(value: np.uint64, by: int) -> np.uint64:
    return (value << np.uint64(by)) | (value >> np.uint64(64 - by))


@nb.njit(cache=True)
def _random(state: NDArray[np.uint64]) -> float:
    # In [0, 1), 53 bits.
    result = state[0] + state[3]
    t = state[1] << np.uint64(17)
    state[2] ^= state[0]
    state[3] ^= state[1]
    state[1] ^= state[2]
    state[0] ^= state[3]
    state[2] ^= t
    state[3] = _rotated(state[3], 45)
    drawn: float = np.float64(result >> np.uint64(11)) * (1.0 / 9007199254740992.0)
    return drawn


@nb.njit(cache=True)
def _draw(
    expected: NDArray[np.float64],
    seed: int,
    index: NDArray[np.int64],
    kept: NDArray[np.float64],
    other: NDArray[np.float64],
) -> NDArray[np.float64]:
    # splitmix64 fills the state.
    state = np.empty(4, np.uint64)
    mixing = np.uint64(seed)
    for i in range(4):
        mixing += np.uint64(0x9E3779B97F4A7C15)
        z = mixing
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state[i] = z ^ (z >> np.uint64(31))
    np.random.seed(seed)
    out = np.empty(expected.shape)
    flat, values = out.ravel(), expected.ravel()
    highest = _COARSE * _COARSE_TABLES
    for i in range(values.size):
        mean = values[i]
        if mean >= highest:
            flat[i] = np.random.poisson(mean)
            continue
        count = 0.0
        coarse = int(mean * (1.0 / _COARSE))
        if coarse > 0:
            mean -= _COARSE * coarse
            count += _from_table(state, index[coarse], kept, other)
        fine = min(int(mean * (1.0 / _FINE)), _FINE_TABLES - 1)
        if fine > 0:
            mean -= _FINE * fine
            count += _from_table(state, index[_COARSE_TABLES + fine], kept, other)
        u = _random(state)
        if u >= 1.0 - mean:
            term = math.exp(-mean)
            total = term
            n = 0.0
            while u > total and n < 30.0:
                n += 1.0
                term *= mean / n
                total += term
            count += n
        flat[i] = count
    return out


@nb.njit(cache=True)
def _from_table(
    state: NDArray[np.uint64],
    row: NDArray[np.int64],
    kept: NDArray[np.float64],
    other: NDArray[np.float64],
) -> float:
    at = _random(state) * row[1]
    slot = int(at)
    where = row[0] + slot
    drawn: float = float(slot) if at - slot < kept[where] else other[where]
    return drawn + float(row[2])

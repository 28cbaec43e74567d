"""Figures of merit, each with what a sceptic asks for next to it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["auroc", "clopper_pearson"]


def auroc(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """Chance that a positive scores above a negative, ties counted half (Mann-Whitney)."""
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        return math.nan
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    rank = (last - (counts - 1) / 2.0)[inverse]
    wins = rank[positive].sum() - n_positive * (n_positive + 1) / 2.0
    return float(wins / (n_positive * n_negative))


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact binomial interval (Clopper and Pearson 1934), by bisection on the tail sums."""
    if trials == 0:
        return 0.0, 1.0
    tail = 0.5 * (1.0 - confidence)
    low = 0.0 if successes == 0 else _solve(lambda p: 1.0 - _cdf(successes - 1, trials, p), tail)
    high = (
        1.0 if successes == trials else _solve(lambda p: 1.0 - _cdf(successes, trials, p), 1 - tail)
    )
    return low, high


def _cdf(k: int, n: int, p: float) -> float:
    """P(X <= k) for X ~ Binomial(n, p), 0 < p < 1."""
    logs = [
        math.lgamma(n + 1)
        - math.lgamma(i + 1)
        - math.lgamma(n - i + 1)
        + i * math.log(p)
        + (n - i) * math.log1p(-p)
        for i in range(k + 1)
    ]
    return min(1.0, math.fsum(math.exp(value) for value in logs))


def _solve(rising: Callable[[float], float], target: float) -> float:
    """Where a function that rises from 0 to 1 reaches ``target``."""
    low, high = 1e-15, 1.0 - 1e-15
    for _ in range(200):
        middle = 0.5 * (low + high)
        if rising(middle) < target:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)

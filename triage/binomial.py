"""Exact binomial bounds (Clopper and Pearson 1934), by bisection on the tail sums."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["clopper_pearson", "lower_bound"]


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The two-sided interval of a share; (0, 1) of no trials."""
    if trials == 0:
        return 0.0, 1.0
    tail = 0.5 * (1.0 - confidence)
    low = lower_bound(successes, trials, 1.0 - tail)
    high = (
        1.0 if successes == trials else _solve(lambda p: 1.0 - _cdf(successes, trials, p), 1 - tail)
    )
    return low, high


def lower_bound(successes: int, trials: int, confidence: float) -> float:
    """The one-sided bound: a smaller share shows so many successes at most 1 - confidence often."""
    if successes == 0:
        return 0.0
    return _solve(lambda p: 1.0 - _cdf(successes - 1, trials, p), 1.0 - confidence)


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
    for _ in range(60):
        middle = 0.5 * (low + high)
        if rising(middle) < target:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)

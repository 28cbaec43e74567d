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
    """P(X <= k) for X ~ Binomial(n, p), 0 <= k < n, 0 < p < 1: an incomplete beta function."""
    return _incomplete_beta(float(n - k), float(k + 1), 1.0 - p)


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b) by its continued fraction (DLMF 8.17.22), evaluated after Lentz (1976)."""
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - _incomplete_beta(b, a, 1.0 - x)
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front += a * math.log(x) + b * math.log1p(-x)
    tiny = 1e-300
    c, d = 1.0, 1.0 / _not_zero(1.0 - (a + b) * x / (a + 1.0), tiny)
    fraction = d
    for m in range(1, 10_000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / _not_zero(1.0 + term * d, tiny)
            c = _not_zero(1.0 + term / c, tiny)
            fraction *= c * d
        if abs(c * d - 1.0) < 1e-14:
            break
    return math.exp(front) * fraction / a


def _not_zero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny


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

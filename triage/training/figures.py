"""Figures of merit."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["auroc", "auroc_interval", "balanced_accuracy", "calibration_error", "spearman"]


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


def auroc_interval(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> list[float]:
    """95 % interval of :func:`auroc` by DeLong, DeLong and Clarke-Pearson (1988), within 0..1.

    It has no width where the classes are apart altogether: there it says nothing.
    """
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if n_positive < 2 or n_negative < 2:
        return [0.0, 1.0]
    up, down = np.sort(scores[positive]), np.sort(scores[~positive])
    # For each frame the share of the other class on its right side, ties half.
    above = (np.searchsorted(down, up, "left") + np.searchsorted(down, up, "right")) / 2
    below = (
        n_positive - (np.searchsorted(up, down, "left") + np.searchsorted(up, down, "right")) / 2
    )
    v_up, v_down = above / n_negative, below / n_positive
    variance = v_up.var(ddof=1) / n_positive + v_down.var(ddof=1) / n_negative
    half = 1.959964 * math.sqrt(variance)
    middle = float(v_up.mean())
    return [max(0.0, middle - half), min(1.0, middle + half)]


def balanced_accuracy(called: NDArray[np.bool_], positive: NDArray[np.bool_]) -> float:
    """Mean of the shares of positives and of negatives that are called right."""
    if positive.all() or not positive.any():
        return math.nan
    return float(0.5 * (called[positive].mean() + (~called[~positive]).mean()))


def calibration_error(p: NDArray[np.float64], positive: NDArray[np.bool_], bins: int = 15) -> float:
    """Mean distance of stated and found probability over equal bins, weighted by frames (ECE)."""
    if not p.size:
        return math.nan
    place = np.minimum((p * bins).astype(int), bins - 1)
    stated = np.bincount(place, p, bins)
    found = np.bincount(place, positive.astype(float), bins)
    return float(np.abs(stated - found).sum() / p.size)


def spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Correlation of ranks, ties at their mean."""

    def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        last = np.cumsum(counts)
        mean: NDArray[np.float64] = (last - (counts - 1) / 2.0)[inverse]
        return mean

    if a.size < 2:
        return math.nan
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])

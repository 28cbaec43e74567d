"""Figures of merit, and their 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from triage.binomial import clopper_pearson

__all__ = [
    "auroc",
    "auroc_interval",
    "average_precision",
    "balanced_accuracy",
    "balanced_accuracy_interval",
    "balancing_threshold",
    "bootstrap_interval",
    "calibration_error",
    "exit_thresholds",
    "kendall_tau_b",
    "median_interval",
    "spearman",
    "spearman_interval",
    "veto_threshold",
]

_NORMAL_95 = 1.959964
_OF_THE_FAST_EXIT = 0.1
"""Share of what is promised of both exits."""


def auroc(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """Chance that a positive scores above a negative, ties counted half (Mann-Whitney)."""
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        return math.nan
    wins = _ranks(scores)[positive].sum() - n_positive * (n_positive + 1) / 2.0
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
    half = _NORMAL_95 * math.sqrt(variance)
    middle = float(v_up.mean())
    return [max(0.0, middle - half), min(1.0, middle + half)]


def average_precision(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """Mean precision over the positives, each at its own score; frames of one score share it."""
    if not positive.any():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)
    found = np.cumsum(positive[order])[last]
    called = (np.flatnonzero(last) + 1).astype(np.float64)
    gained = np.diff(np.append(0, found))
    return float((gained * found / called).sum() / positive.sum())


def balanced_accuracy(called: NDArray[np.bool_], positive: NDArray[np.bool_]) -> float:
    """Mean of the shares of positives and of negatives that are called right."""
    if positive.all() or not positive.any():
        return math.nan
    return float(0.5 * (called[positive].mean() + (~called[~positive]).mean()))


def balanced_accuracy_interval(
    called: NDArray[np.bool_], positive: NDArray[np.bool_]
) -> list[float]:
    """95 % interval of :func:`balanced_accuracy` from the exact intervals of both shares.

    The two are put together as Zou and Donner (2008) do for a sum, so that it has a width where
    every frame is called right.
    """
    low, high = 0.0, 0.0
    for right in (called[positive], ~called[~positive]):
        if not right.size:
            return [0.0, 1.0]
        share = float(right.mean())
        least, most = clopper_pearson(int(right.sum()), right.size)
        low += (share - least) ** 2
        high += (most - share) ** 2
    middle = balanced_accuracy(called, positive)
    return [max(0.0, middle - 0.5 * math.sqrt(low)), min(1.0, middle + 0.5 * math.sqrt(high))]


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
    if a.size < 2:
        return math.nan
    ranks = _ranks(a), _ranks(b)
    if any(np.ptp(each) == 0 for each in ranks):
        return math.nan
    return float(np.corrcoef(*ranks)[0, 1])


def spearman_interval(rho: float, n: int) -> list[float]:
    """95 % interval of :func:`spearman` of n pairs, after Bonett and Wright (2000)."""
    if n < 4 or not math.isfinite(rho):
        return [-1.0, 1.0]
    bounded = min(max(rho, -1.0 + 1e-12), 1.0 - 1e-12)
    half = _NORMAL_95 * math.sqrt((1.0 + 0.5 * rho**2) / (n - 3))
    return [math.tanh(math.atanh(bounded) + sign * half) for sign in (-1.0, 1.0)]


def kendall_tau_b(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Pairs in the same order less pairs in the other, over both sets' untied pairs (1945)."""
    first, second = np.triu_indices(a.size, 1)
    up_a, up_b = np.sign(a[first] - a[second]), np.sign(b[first] - b[second])
    untied = math.sqrt(float((up_a != 0).sum()) * float((up_b != 0).sum()))
    return float((up_a * up_b).sum() / untied) if untied else math.nan


def median_interval(values: NDArray[np.float64]) -> list[float]:
    """95 % interval of a median: the order statistics that hold it by the binomial law."""
    n = values.size
    if n < 6:
        return [float(values.min()), float(values.max())] if n else [math.nan, math.nan]
    ordered = np.sort(values)
    if n > 1000:
        low = math.floor(0.5 * n - 0.5 * _NORMAL_95 * math.sqrt(n)) - 1
    else:
        # The most values that lie below the median in no more than 2.5 % of all samples.
        low, tail, term = -1, 0.5**n, 0.5**n
        while tail <= 0.025:
            low += 1
            term *= (n - low) / (low + 1)
            tail += term
    return [float(ordered[low]), float(ordered[n - 1 - low])]


def bootstrap_interval(
    figure: Callable[..., float], *columns: NDArray[np.generic], draws: int = 400, seed: int = 0
) -> list[float]:
    """2.5 and 97.5 % quantile of a figure over frames drawn anew with repetition.

    Args:
        figure: of the columns, each (n,).
    """
    n = columns[0].size
    if not n:
        return [math.nan, math.nan]
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        rows = rng.integers(n, size=n)
        found.append(figure(*(column[rows] for column in columns)))
    known = np.array([each for each in found if math.isfinite(each)])
    if not known.size:
        return [math.nan, math.nan]
    return [float(q) for q in np.quantile(known, (0.025, 0.975))]


def veto_threshold(p_blank: NDArray[np.float64], labels: NDArray[np.float64], goal: float) -> float:
    """The lowest threshold that can be promised to veto at most ``goal`` of such hits.

    The 95 % interval of the share that it vetoes of these ends at the goal at most, so that more
    hits to judge by leave more to veto. Of too few for that, none is vetoed.

    Args:
        labels: (n,) 1 blank, 0 hit, NaN neither.
    """
    hits = np.sort(p_blank[(labels == 0.0) & np.isfinite(p_blank)])[::-1]
    if not hits.size:
        return 1.0
    allowed = 0
    while allowed < hits.size - 1 and clopper_pearson(allowed + 1, hits.size)[1] <= goal:
        allowed += 1
    return float(min(1.0, np.nextafter(hits[allowed], 2.0)))


def exit_thresholds(
    fast: NDArray[np.float64],
    full: NDArray[np.float64],
    labels: NDArray[np.float64],
    goal: float,
) -> tuple[float, float]:
    """``p_blank_sure`` and ``p_blank_veto``: where the fast exit is believed, and where is vetoed.

    Of the fast exit, which sees less, a tenth of the goal is promised: where that allows no false
    veto, it is sure above every hit of the set. The full exit answers for the others, and what is
    promised of both together is left to it: the veto begins where :func:`veto_threshold` has it.
    What the fast exit is sure of is vetoed, so it is sure from there on at the earliest.

    Args:
        fast, full: (n,) p_blank of either exit.
        labels: (n,) 1 blank, 0 hit, NaN neither.
        goal: share of such hits that is promised.
    """
    sure = veto_threshold(fast, labels, _OF_THE_FAST_EXIT * goal)
    while True:
        # A step up sends more frames to the full exit, so there are at most n.
        veto = veto_threshold(np.where(fast >= sure, fast, full), labels, goal)
        if veto <= sure:
            return sure, veto
        sure = veto


def balancing_threshold(p: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """The threshold with the best :func:`balanced_accuracy`: the middle of the gap it lies in."""
    if positive.all() or not positive.any():
        return 0.5
    order = np.argsort(p, kind="stable")
    ordered, yes = p[order], positive[order]
    # Cut before place i: all from i on are called.
    hits = np.append(yes[::-1].cumsum()[::-1], 0) / yes.sum()
    rejected = np.append(0, (~yes).cumsum()) / (~yes).sum()
    edges = np.concatenate([[-np.inf], ordered, [np.inf]])
    between = edges[1:] > edges[:-1]
    best = int(np.argmax(np.where(between, hits + rejected, -1.0)))
    low, high = max(edges[best], 0.0), min(edges[best + 1], 1.0)
    return float(0.5 * (low + high))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """From 1, ties at their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: NDArray[np.float64] = (last - (counts - 1) / 2.0)[inverse]
    return ranks

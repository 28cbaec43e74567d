"""Figures of a model's answers: of each head, and of the veto by what kind of hit it was.

A head is judged on every frame whose label is defined. Where it gave no answer there, the frame
stands at the worst rank, is called wrong and is counted as ``unanswered``: silence never helps.
Shares have their exact (Clopper-Pearson) intervals; every interval is of 95 %.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triage.binomial import clopper_pearson
from triage.nets.triagenet import Head
from triage.records import HIT_SPOTS
from triage.training.answers import FAST_EXIT, Answers
from triage.training.figures import (
    auroc,
    auroc_interval,
    average_precision,
    balanced_accuracy,
    balanced_accuracy_interval,
    bootstrap_interval,
    calibration_error,
    median_interval,
    spearman,
    spearman_interval,
)

__all__ = [
    "WEAK_SPOTS",
    "VetoFigures",
    "binary_figures",
    "head_tables",
    "ordinal_figures",
    "quality_figures",
    "ranked",
    "regression_figures",
    "share_of",
    "veto_tables",
]

WEAK_SPOTS = (10, 30)
"""Visible spots of a weak hit, both ends included."""

_STRATA = {
    "visible spots": ("n_visible", (10, 31, 101, 1001), ""),
    "median signal to noise": ("median_snr", (5, 8, 15, 50), ""),
    "resolution": ("d_vis_angstrom", (0, 2, 3, 5), "angstrom"),
}
"""Title to label, lower ends of the bins, and unit."""

_VISIBLE_SPOTS = (0, 1, *_STRATA["visible spots"][1])
"""Lower ends of the parts by which heads are judged: no spot, too few for a hit, and the veto's."""
_ICE_SIGMA = (5, 8, 20, 100)
"""Lower ends of the parts by the strength of ice; the first is where ice begins."""


def share_of(yes: NDArray[np.bool_], name: str) -> dict[str, Any]:
    """A share with its exact interval, under ``name`` and ``name_interval_95``; None of none."""
    n, found = int(yes.size), int(yes.sum())
    return {
        name: found / n if n else None,
        f"{name}_interval_95": list(clopper_pearson(found, n)),
    }


def ranked(p: NDArray[np.float64], positive: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Scores of 0..1 with what is NaN at the worst rank: below 0 of a positive, else above 1."""
    return np.where(np.isfinite(p), p, np.where(positive, -1.0, 2.0))


def binary_figures(
    p: NDArray[np.float64], labels: NDArray[np.float64], threshold: float
) -> dict[str, Any]:
    """Of a probability (n,) against a label (n,) of 1, 0 or NaN for not asked.

    Args:
        threshold: from which a frame is called; fixed on other frames.
    """
    asked = np.isfinite(labels)
    yes = labels[asked] > 0.5
    p = p[asked]
    answered = np.isfinite(p)
    figures: dict[str, Any] = {
        "frames": int(yes.size),
        "positives": int(yes.sum()),
        "unanswered": int((~answered).sum()),
        "threshold": threshold,
    }
    if not answered.any():
        return figures
    score = ranked(p, yes)
    # Above 1 is called, below 0 is not: what was not answered is wrong either way.
    called = score >= threshold
    return figures | {
        "auroc": auroc(score, yes),
        "auroc_interval_95": auroc_interval(score, yes),
        "average_precision": average_precision(score, yes),
        "balanced_accuracy": balanced_accuracy(called, yes),
        "balanced_accuracy_interval_95": balanced_accuracy_interval(called, yes),
        **share_of(called[yes], "recall"),
        **share_of(~called[~yes], "specificity"),
        "expected_calibration_error": calibration_error(p[answered], yes[answered]),
        "expected_calibration_error_interval_95": bootstrap_interval(
            calibration_error, p[answered], yes[answered]
        ),
        "confusion": [
            [int((~called & ~yes).sum()), int((called & ~yes).sum())],
            [int((~called & yes).sum()), int((called & yes).sum())],
        ],
    }


def ordinal_figures(
    values: NDArray[np.float64], labels: NDArray[np.float64], head: Head
) -> dict[str, Any]:
    """Of an expected level (n,) against the level; no answer is more than one level off."""
    last = round(head.highest)
    # A blank frame has no lattice to count, and a level that the head does not have is none.
    asked = np.isfinite(labels) & (labels >= head.first) & (labels <= last)
    values, known = values[asked], np.rint(labels[asked] - head.first).astype(int)
    answered = np.isfinite(values)
    figures: dict[str, Any] = {
        "frames": int(known.size),
        "unanswered": int((~answered).sum()),
    }
    if not answered.any():
        return figures
    level = np.rint(np.where(answered, values, math.inf) - head.first)
    levels = 1 + last - round(head.first)
    table = np.zeros((levels, levels), int)
    called = np.clip(level[answered], 0, levels - 1).astype(int)
    np.add.at(table, (known[answered], called), 1)
    return figures | {
        **share_of(level == known, "accuracy"),
        **share_of(np.abs(level - known) <= 1, "off_by_one"),
        "confusion": table.tolist(),
    }


def quality_figures(answers: Answers, head: Head) -> dict[str, Any]:
    """The quality grade; frames that lie close to a bound are left out, and their share stated."""
    labels, margin = answers.label("quality"), answers.label("quality_margin")
    graded = np.isfinite(labels)
    near = graded & (margin == 1.0)
    values = answers.value("quality")
    return ordinal_figures(values, np.where(near, math.nan, labels), head) | {
        "near_a_bound": int(near.sum()),
        **share_of(near[graded], "near_a_bound_share"),
        "with_those_near_a_bound": ordinal_figures(values, labels, head),
    }


def regression_figures(values: NDArray[np.float64], labels: NDArray[np.float64]) -> dict[str, Any]:
    """Of a positive quantity (n,) against its truth (n,), NaN where it is not asked for."""
    asked = np.isfinite(labels)
    values, truth = values[asked], labels[asked]
    answered = np.isfinite(values)
    figures: dict[str, Any] = {
        "frames": int(truth.size),
        "unanswered": int((~answered).sum()),
    }
    if not answered.any():
        return figures
    error = np.where(answered, np.abs(values / truth - 1.0), math.inf)
    # The worst rank lies at the far end: of a small truth the top, of a large one the bottom.
    far = np.where(truth > np.median(truth), -math.inf, math.inf)
    order = np.where(answered, values, far)
    rho = spearman(order, truth)
    return figures | {
        "median_relative_error": float(np.median(error)),
        "median_relative_error_interval_95": median_interval(error),
        "spearman": rho,
        "spearman_interval_95": spearman_interval(rho, truth.size),
        "median_ratio": float(np.median(values[answered] / truth[answered])),
    }


def head_tables(
    heads: Sequence[Head], answers: Answers, thresholds: Mapping[str, float]
) -> dict[str, Any]:
    """Figures by label; what both exits answer is one, whichever has the last word on a frame.

    Args:
        thresholds: by binary head; 0.5 of the calibrated probability where there is none.
    """
    tables: dict[str, Any] = {}
    for head in heads:
        if head.answers:
            continue
        values, labels = answers.value(head.name), answers.label(head.name)
        if head.kind == "binary":
            tables[head.name] = binary_figures(values, labels, thresholds.get(head.name, 0.5))
            tables[head.name]["calibration_error_by_family"] = _by_family(
                answers,
                lambda part, name=head.name: _calibration(part, name),  # type: ignore[misc]
            )
            # Of blank the spots are the label; the veto's strata say where hits are lost.
            if head.name != "blank":
                tables[head.name]["by_visible_spots"] = _by_visible_spots(
                    answers,
                    lambda part, name=head.name: _separation(part, name),  # type: ignore[misc]
                )
            if head.name in ("ice", "bad_ice"):
                tables[head.name]["by_kind_of_ice"] = _by_kind_of_ice(answers, head.name)
            if head.name == "ice":
                tables[head.name]["by_strength_of_ice"] = _by_strength_of_ice(answers)
        elif head.name == "quality":
            tables[head.name] = quality_figures(answers, head)
            tables[head.name]["by_visible_spots"] = _by_visible_spots(
                answers,
                lambda part, head=head: _accuracy(part, head),  # type: ignore[misc]
            )
        elif head.kind == "ordinal":
            tables[head.name] = ordinal_figures(values, labels, head)
        elif head.name == "mosaicity_deg":
            seen = answers.label("mosaicity_measurable") == 1.0
            tables[head.name] = {
                "measurable": regression_figures(values, np.where(seen, labels, math.nan)),
                "others": regression_figures(values, np.where(seen, math.nan, labels)),
            }
        else:
            tables[head.name] = regression_figures(values, labels)
    return tables


def _calibration(part: Answers, name: str) -> dict[str, Any]:
    p, labels = part.value(name), part.label(name)
    known = np.isfinite(p) & np.isfinite(labels)
    return {
        "frames": int(known.sum()),
        "expected_calibration_error": calibration_error(p[known], labels[known] > 0.5),
    }


def _separation(part: Answers, name: str) -> dict[str, Any]:
    """How well a part's positives are told from its negatives."""
    p, labels = part.value(name), part.label(name)
    known = np.isfinite(labels)
    yes = labels[known] > 0.5
    score = ranked(p[known], yes)
    return {
        "frames": int(yes.size),
        "positives": int(yes.sum()),
        "auroc": auroc(score, yes),
        "auroc_interval_95": auroc_interval(score, yes),
    }


def _by_kind_of_ice(answers: Answers, name: str) -> dict[str, dict[str, Any]]:
    """Smooth rings, and single grains without a crystal's spots and among them: each kind against
    the frames without ice that have as many spots. Nothing where the kind is not known."""
    grains, visible = answers.label("ice_grains"), answers.label("n_visible")
    without = answers.label(name) == 0.0
    anywhere = np.full(len(answers), True)
    kinds = {
        "rings": (grains == 0.0, anywhere),
        f"grains, fewer than {HIT_SPOTS} spots": (grains > 0.0, visible < HIT_SPOTS),
        f"grains, {HIT_SPOTS} spots and more": (grains > 0.0, visible >= HIT_SPOTS),
    }
    found = {}
    for title, (kind, among) in kinds.items():
        figures = _separation(answers.where(among & (kind | without)), name)
        if figures["positives"]:
            found[title] = figures
    return found


def _by_strength_of_ice(answers: Answers) -> dict[str, dict[str, Any]]:
    """Ice of so many sigma against every frame without it; and all of it against those alone that
    come no nearer to it than half way, for ice just short of the bound is called as often as ice
    just beyond. Nothing where the strength is not known."""
    sigma, ice = answers.label("ice_snr"), answers.label("ice")
    parts = {}
    for low, high in itertools.pairwise((*_ICE_SIGMA, math.inf)):
        title = f"{low} to {high} sigma" if math.isfinite(high) else f"{low} sigma and more"
        parts[title] = (ice == 0.0) | ((sigma >= low) & (sigma < high))
    least = _ICE_SIGMA[0]
    parts[f"without {least / 2:g} to {least} sigma"] = (ice == 1.0) | (sigma < least / 2)
    found = {title: _separation(answers.where(part), "ice") for title, part in parts.items()}
    known = bool(np.isfinite(sigma).any())
    return {title: row for title, row in found.items() if known and row["positives"]}


def _accuracy(part: Answers, head: Head) -> dict[str, Any]:
    """Of the grade, on the frames of a part that do not lie near a bound."""
    labels = np.where(part.label("quality_margin") == 1.0, math.nan, part.label("quality"))
    figures = ordinal_figures(part.value("quality"), labels, head)
    return {
        name: figures[name]
        for name in ("frames", "accuracy", "accuracy_interval_95")
        if name in figures
    }


def _by_visible_spots(
    answers: Answers, of: Callable[[Answers], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Figures of the frames with so many visible spots, parts without any frame left out."""
    visible, found = answers.label("n_visible"), {}
    for low, high in zip(_VISIBLE_SPOTS, (*_VISIBLE_SPOTS[1:], math.inf), strict=True):
        figures = of(answers.where((visible >= low) & (visible < high)))
        if figures["frames"]:
            found[_spots_named(low, high)] = figures
    return found


def _spots_named(low: float, high: float) -> str:
    """Spots from ``low`` to below ``high``; as they are counted, both ends are named."""
    if not math.isfinite(high):
        return f"{low:g} and more"
    return f"{low:g}" if high == low + 1 else f"{low:g} to {high - 1:g}"


def _by_family(answers: Answers, of: Callable[[Answers], dict[str, Any]]) -> dict[str, Any]:
    names = np.unique(answers.family)
    return {str(name): of(answers.where(answers.family == name)) for name in names}


@dataclass(frozen=True, slots=True, eq=False)
class VetoFigures:
    """Figures of the veto over any part of a set.

    Attributes:
        vetoed: (n,) whether the frame would be vetoed.
        score: (n,) p_blank, NaN where a frame was not scored.
        labels: (n,) 1 blank, 0 hit, NaN neither.
    """

    vetoed: NDArray[np.bool_]
    score: NDArray[np.float64]
    labels: NDArray[np.float64]

    def of(
        self,
        hits_too: NDArray[np.bool_] | None = None,
        blanks_too: NDArray[np.bool_] | None = None,
    ) -> dict[str, Any]:
        """Counts, AUROC, false veto and vetoed blanks, with intervals.

        Args:
            hits_too, blanks_too: (n,) further conditions on either; None for all of them.
        """
        hits, blanks = self.labels == 0.0, self.labels == 1.0
        if hits_too is not None:
            hits = hits & hits_too
        if blanks_too is not None:
            blanks = blanks & blanks_too
        either = hits | blanks
        score = ranked(self.score[either], blanks[either])
        n, wrong = int(hits.sum()), int((self.vetoed & hits).sum())
        return {
            "hits": n,
            "blanks": int(blanks.sum()),
            "unanswered": int((~np.isfinite(self.score[either])).sum()),
            "auroc": auroc(score, blanks[either]),
            "auroc_interval_95": auroc_interval(score, blanks[either]),
            "false_vetoes": wrong,
            "false_veto_rate": wrong / max(1, n),
            "false_veto_interval_95": list(clopper_pearson(wrong, n)),
            **share_of(self.vetoed[blanks], "blanks_vetoed_share"),
        }


def veto_tables(answers: Answers, threshold: float, sure: float = 0.0) -> dict[str, Any]:
    """The veto over all frames, on weak hits alone, by stratum, and of 1 to 9 spots apart.

    And the fast exit alone: its AUROC, and what it vetoes by itself.

    Args:
        sure: p_blank from which the fast exit has the last word; 0 where it has it always.
    """
    p = answers.value("blank")
    vetoed = (p >= threshold) & ~answers.ood
    veto = VetoFigures(vetoed, p, answers.label("blank"))
    visible = answers.label("n_visible")
    few = (visible > 0) & (visible < HIT_SPOTS)
    weak = (visible >= WEAK_SPOTS[0]) & (visible <= WEAK_SPOTS[1])
    strata: dict[str, dict[str, Any]] = {}
    for title, (name, bounds, unit) in _STRATA.items():
        values = answers.label(name)
        rows: dict[str, Any] = {}
        for low, high in zip(bounds, (*bounds[1:], math.inf), strict=True):
            if name == "n_visible":
                part = _spots_named(low, high)
            else:
                part = f"{low:g} to {high:g}" if math.isfinite(high) else f"{low:g} and more"
            rows[f"{part} {unit}".strip()] = veto.of((values >= low) & (values < high))
        strata[title] = rows
    strata["detector family"] = {
        str(name): veto.of(answers.family == name, answers.family == name)
        for name in np.unique(answers.family)
    }
    if "ice" in answers.labels:
        ice = answers.label("ice")
        strata["ice"] = {
            title: veto.of(ice == value, ice == value)
            for title, value in (("without ice", 0.0), ("with ice", 1.0))
        }
    fast = answers.value(FAST_EXIT)
    alone = VetoFigures((fast >= max(threshold, sure)) & ~answers.ood, fast, veto.labels)
    return {
        "threshold": threshold,
        "all": veto.of(),
        "weak_hits": veto.of(weak),
        "fast_exit": {
            "sure_from": sure,
            "all": alone.of(),
            "weak_hits": alone.of(weak),
            **share_of(fast[veto.labels == 1.0] < sure, "blanks_to_the_full_exit_share"),
        },
        "strata": strata,
        "few_spots": {
            "frames": int(few.sum()),
            "vetoed": int((vetoed & few).sum()),
            **share_of(vetoed[few], "vetoed_share"),
        },
        "out_of_distribution": int(answers.ood.sum()),
    }

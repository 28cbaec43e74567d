"""What is asked of a model, line by line, and whether an evaluation shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["requirements"]

_BINARY = ("blank", "ice", "bad_ice", "multilattice")

_LEAST_HITS, _LEAST_BLANKS, _LEAST_WEAK_SHARE = 10_000, 3_000, 0.3

_ASKED: tuple[tuple[str, str, str, str, float], ...] = (
    ("test set", "hits", "set.hits", ">=", _LEAST_HITS),
    ("test set", "blanks", "set.blanks", ">=", _LEAST_BLANKS),
    ("test set", "share of hits with 10 to 30 spots", "set.weak_share", ">=", _LEAST_WEAK_SHARE),
    ("blank", "AUROC", "veto.all.auroc", ">=", 0.995),
    ("blank", "false-veto rate", "veto.all.false_veto_rate", "<=", 0.001),
    ("blank", "blanks vetoed", "veto.all.blanks_vetoed_share", ">=", 0.95),
    ("blank, weak hits", "AUROC", "veto.weak_hits.auroc", ">=", 0.98),
    ("quality", "accuracy", "heads.quality.accuracy", ">=", 0.985),
    ("quality", "off by one at most", "heads.quality.off_by_one", ">=", 0.999),
    ("quality", "share near a bound", "heads.quality.near_a_bound_share", "<=", 0.2),
    ("ice", "AUROC", "heads.ice.auroc", ">=", 0.99),
    ("ice", "balanced accuracy", "heads.ice.balanced_accuracy", ">=", 0.95),
    ("bad ice", "AUROC", "heads.bad_ice.auroc", ">=", 0.99),
    ("multilattice", "AUROC", "heads.multilattice.auroc", ">=", 0.97),
    ("multilattice", "balanced accuracy", "heads.multilattice.balanced_accuracy", ">=", 0.92),
    (
        "mosaicity, measurable",
        "median relative error",
        "heads.mosaicity_deg.measurable.median_relative_error",
        "<=",
        0.15,
    ),
    ("mosaicity, measurable", "Spearman", "heads.mosaicity_deg.measurable.spearman", ">=", 0.95),
    *(
        (
            name.replace("_", " "),
            "expected calibration error",
            f"heads.{name}.expected_calibration_error",
            "<=",
            0.02,
        )
        for name in _BINARY
    ),
    ("real frames", "mx_hit frames kept", "real.kept.mx_hit.share", ">=", 1.0),
    ("real frames", "xfel_hit frames kept", "real.kept.xfel_hit.share", ">=", 1.0),
    ("real frames", "worst blank source vetoed", "real.worst_blank_source.share", ">=", 0.9),
    ("real frames", "powder frames called ice", "real.powder.called_ice", "<=", 0),
    ("real frames", "quality along the scan, tau-b", "real.scan.tau_b", ">=", 0.9),
    ("composites", "multilattice AUROC", "real.lattices.auroc", ">=", 0.9),
    ("composites", "ice of 10 % on blanks, recall", "real.ice.blank_10.recall", ">=", 0.95),
    ("composites", "ice of 20 % on hits, recall", "real.ice.hit_20.recall", ">=", 0.95),
)
"""What, figure, where it stands in the report, and its bound."""


def requirements(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per line: value, interval, bound, and whether it is met; None = not measured."""
    rows = []
    for what, figure, place, sign, bound in _ASKED:
        value = _at(report, place)
        interval = _at(report, f"{place}_interval_95")
        if interval is None and place.endswith("_rate"):
            interval = _at(report, f"{place.removesuffix('_rate')}_interval_95")
        rows.append(_row(what, figure, value, interval, sign, bound))
    rows.append(_beats_the_spot_count(report))
    return rows


def _beats_the_spot_count(report: Mapping[str, Any]) -> dict[str, Any]:
    """On weak hits the model must do better than counting spots, on the same frames."""
    of = _at(report, "baselines.labels.blank, weak hits.spot count")
    own, other = _at(of or {}, "model_on_the_same"), _at(of or {}, "auroc")
    margin = None if own is None or other is None else own - other
    return _row("blank, weak hits", "AUROC over the spot count's", margin, None, ">=", 0.0)


def _row(
    what: str, figure: str, value: Any, interval: Any, sign: str, bound: float
) -> dict[str, Any]:
    known = isinstance(value, int | float) and math.isfinite(value)
    met = None
    if known:
        met = value >= bound if sign == ">=" else value <= bound
    return {
        "what": what,
        "figure": figure,
        "must": f"{sign} {bound:g}",
        "value": value if known else None,
        "interval_95": interval,
        "met": met,
    }


def _at(report: Mapping[str, Any], place: str) -> Any:
    found: Any = report
    for name in place.split("."):
        if not isinstance(found, Mapping) or name not in found:
            return None
        found = found[name]
    return found

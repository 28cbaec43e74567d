"""The report of an evaluation in words and tables: Markdown."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["as_text"]

_PARTS = ("visible_spots", "kind_of_ice", "strength_of_ice")
"""What heads are looked at by."""
_TITLES = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "balanced_accuracy": "balanced accuracy",
    "recall": "recall",
    "specificity": "specificity",
    "expected_calibration_error": "expected calibration error",
    "accuracy": "accuracy",
    "off_by_one": "off by one at most",
    "near_a_bound_share": "share near a bound, left out",
    "median_relative_error": "median relative error",
    "spearman": "Spearman",
    "median_ratio": "median of answer over truth",
}
"""Figures of a head that are shown, in this order."""


def as_text(report: Mapping[str, Any]) -> str:
    """All of it that a reader wants; the rest stands in ``report.json``."""
    lines = [f"# {report['model_id']}", "", "Intervals are of 95 %."]
    if "set" in report:
        lines += _set_lines(report)
    if report["heads_absent"]:
        lines += ["", "The model has no head for: " + ", ".join(report["heads_absent"]) + "."]
    lines += ["", "## What is asked", ""]
    lines += _table(
        ("of", "figure", "must", "value", "interval", "met"),
        (
            (
                row["what"],
                row["figure"],
                row["must"],
                _number(row["value"]),
                _number(row["interval_95"]),
                {True: "yes", False: "**no**", None: "not measured"}[row["met"]],
            )
            for row in report["requirements"]
        ),
    )
    if "set" in report:
        lines += _veto_lines(report)
        lines += ["", "## Heads", ""]
        lines += _table(
            ("head", "frames", "figure", "value", "interval"),
            (row for name, figures in report["heads"].items() for row in _head_rows(name, figures)),
        )
        lines += _part_lines(report["heads"])
        lines += _baseline_lines(report["baselines"])
    if "real" in report:
        lines += _real_lines(report["real"])
    return "\n".join(lines) + "\n"


def _set_lines(report: Mapping[str, Any]) -> list[str]:
    of = report["set"]
    thresholds = ", ".join(f"{name} {value:.4f}" for name, value in report["thresholds"].items())
    return [
        "",
        (
            f"{of['frames']} labelled frames: {of['hits']} hits, {of['blanks']} blanks, "
            f"{of['few']} with 1 to 9 visible spots; {_percent(of['weak_share'])} of the hits "
            f"have 10 to 30. Frames {report['data_hash']}, {_made_with(report['shards'])}."
        ),
        "",
        f"Thresholds ({_fixed(report['thresholds_fixed_on'])}): {thresholds}.",
    ]


def _veto_lines(report: Mapping[str, Any]) -> list[str]:
    veto = report["veto"]
    titles = ("part", "hits", "blanks", "AUROC", "false vetoes", "interval", "blanks vetoed")
    rows = [_veto_row("all", veto["all"]), _veto_row("weak hits, 10 to 30", veto["weak_hits"])]
    for title, parts in veto["strata"].items():
        rows += [_veto_row(f"{title} {part}", row) for part, row in parts.items()]
    other = report["veto_at_the_cards_threshold"]
    rows.append(_veto_row(f"all, at the card's {other['threshold']:.4f}", other))
    fast = veto["fast_exit"]
    rows.append(_veto_row("all, by the fast exit alone", fast["all"]))
    rows.append(_veto_row("weak hits, by the fast exit alone", fast["weak_hits"]))
    few = veto["few_spots"]
    return [
        "",
        "## Veto",
        "",
        *_table(titles, rows),
        "",
        (
            f"The fast exit has the last word from {_number(fast['sure_from'])} on; "
            f"{_percent(fast['blanks_to_the_full_exit_share'])} of the blanks lie below and pay "
            "for the full exit."
        ),
        "",
        (
            f"Frames with 1 to 9 visible spots, neither blank nor hit: {few['frames']}, of them "
            f"{few['vetoed']} vetoed ({_percent(few['vetoed_share'])}). Unlike anything trained "
            f"on, and therefore kept: {veto['out_of_distribution']}."
        ),
    ]


def _veto_row(title: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = row["false_veto_interval_95"]
    return (
        title,
        str(row["hits"]),
        str(row["blanks"]),
        _number(row["auroc"]),
        f"{row['false_vetoes']} ({row['false_veto_rate']:.2%})" if row["hits"] else "",
        f"{low:.2%} to {high:.2%}" if row["hits"] else "",
        _percent(row["blanks_vetoed_share"]),
    )


def _head_rows(name: str, figures: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    if "measurable" in figures:
        for part in ("measurable", "others"):
            yield from _head_rows(f"{name}, {part}", figures[part])
        return
    answered = figures["frames"] - figures["unanswered"]
    frames = f"{answered} of {figures['frames']}" if figures["unanswered"] else str(answered)
    for key, title in _TITLES.items():
        if key in figures:
            interval = figures.get(f"{key}_interval_95")
            yield name, frames, title, _number(figures[key]), _number(interval)


def _part_lines(heads: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where each head is good and where it is not."""
    rows = []
    for name, figures in heads.items():
        parts = [figures.get(f"by_{what}", {}) for what in _PARTS]
        for part, row in itertools.chain.from_iterable(each.items() for each in parts):
            key = "auroc" if "auroc" in row else "accuracy"
            if row.get(key) is None:
                continue
            frames = f"{row['positives']} of {row['frames']}" if key == "auroc" else row["frames"]
            rows.append(
                (
                    name,
                    part,
                    str(frames),
                    _TITLES[key],
                    _number(row[key]),
                    _number(row[f"{key}_interval_95"]),
                )
            )
    if not rows:
        return []
    titles = ("head", "part", "frames", "figure", "value", "interval")
    return ["", "### By visible spots, and by kind and strength of ice", "", *_table(titles, rows)]


def _baseline_lines(baselines: Mapping[str, Any]) -> list[str]:
    lines = [
        "",
        "## Baselines on the same frames",
        "",
        (
            f"On {baselines['shards']} of the {baselines['of_shards']} shards, drawn at random: "
            f"{baselines['frames']} frames; slow ones on fewer of them. Those that learn did so "
            f"from {baselines['learned_from_shards']} shards ("
            f"{_made_with(baselines['learned_from'] or {})})."
        ),
        "",
    ]
    rows = [
        (
            label,
            who,
            f"{row['positives']} of {row['frames']}",
            _number(row["auroc"]),
            _number(row["auroc_interval_95"]),
            _number(row["model_on_the_same"]),
            _number(row["model_on_the_same_interval_95"]),
        )
        for label, of in baselines["labels"].items()
        for who, row in of.items()
    ]
    titles = ("label", "who", "positives", "AUROC", "interval", "model on the same", "interval")
    return [*lines, *_table(titles, rows)]


def _real_lines(real: Mapping[str, Any]) -> list[str]:
    lines = ["", "## Real frames, never trained on", ""]
    lines += [
        (
            f"{real['frames']} frames at the card's threshold {real['threshold']:.4f}. `vetoed` is "
            "what a run does, with sweeps kept whatever their score; `by score` is the score alone."
        ),
        "",
    ]
    lines += _table(
        ("source", "kind", "label", "frames", "vetoed", "by score", "ood", "p_blank, median"),
        (
            (
                row["source"],
                row["kind"],
                row["label"],
                str(row["frames"]),
                str(row["vetoed"]),
                str(row["vetoed_by_score"]),
                str(row["out_of_distribution"]),
                _number(row["p_blank_median"]),
            )
            for row in real["sources"]
        ),
    )
    scan, ice = real["scan"], real["false_ice"]
    if "tau_b" in scan:
        lines += [
            "",
            (
                f"Quality along the scan `{scan['source']}`, {scan['frames']} frames: Kendall "
                f"tau-b against the spots of the manifest {_number(scan['tau_b'])} "
                f"({_number(scan['tau_b_interval_95'])})."
            ),
        ]
    lines += ["", (f"Called ice, of {ice['frames']} frames with geometry and without ice: "
              f"{ice['called']}.")]  # fmt: skip
    sigma = {row["file"]: row["sigma"] for row in real["own_ice"]}
    lines += [
        (
            f"`{row['file']}` shows the lines of ice, by {sigma[row['file']]:.1f} sigma over lines "
            f"that are moved, and is not among them; p_ice {_number(row['p_ice'])}."
        )
        for row in ice["showing_ice"]
    ]
    if real["powder"]["rows"]:
        lines += ["", "Powders, their geometry fitted from the rings:", ""]
        lines += _table(
            ("file", "powder", "agreement of the fit", "d at the corner", "p_ice"),
            (
                (
                    row["file"],
                    row["powder"],
                    _number(row["agreement"]),
                    f"{row['d_at_corner_angstrom']:.2f}",
                    _number(row["p_ice"]),
                )
                for row in real["powder"]["rows"]
            ),
        )
    dose = real["dose"]
    lines += [
        "",
        (
            f"Strong hits at lower doses: of {dose['with_ten_spots']} frames that still show ten "
            f"spots {dose['of_these_vetoed']} vetoed."
        ),
        "",
        *_table(
            ("dose", "frames", "with ten spots", "kept", "quality", "d_vis over full dose"),
            (
                (
                    part,
                    str(row["frames"]),
                    str(row["with_ten_spots"]),
                    str(row["kept"]),
                    _number(row["quality_median"]),
                    _number(row["d_vis_over_full_dose"]),
                )
                for part, row in dose["by_dose"].items()
            ),
        ),
    ]
    if "by_contrast" in real["ice"]:
        ice = real["ice"]
        lines += [
            "",
            (
                f"Rings of ice added to real frames; the threshold {ice['threshold']:.4f} lets "
                f"{ice['false_alarms']:.0%} of {ice['without_ice']} frames without ice be called, "
                f"and {ice['called_at_half_without_ice']} of them reach 0.5."
            ),
            "",
            *_table(
                ("frames and contrast", "frames", "recall", "interval", "recall at 0.5"),
                (
                    (
                        part,
                        str(row["frames"]),
                        _number(row["recall"]),
                        _number(row["recall_interval_95"]),
                        _number(row["recall_at_half"]),
                    )
                    for part, row in ice["by_contrast"].items()
                ),
            ),
        ]
    if "auroc" in real["lattices"]:
        two = real["lattices"]
        lines += [
            "",
            (
                f"Two lattices made of hits of `{two['source']}`, {two['two_lattices']} against "
                f"{two['one_lattice']} with one: AUROC {_number(two['auroc'])} "
                f"({_number(two['auroc_interval_95'])})."
            ),
        ]
    return lines


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(titles) + " |",
        "|---" * len(titles) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _made_with(shards: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in shards.items()) or "maker unknown"


def _fixed(on: Mapping[str, Any]) -> str:
    if on["set"] == "card":
        return "the card's, others 0.5"
    return f"fixed on {on['frames']} other frames, {on['data_hash']}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _number(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(_number(each) for each in value)
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4f}"

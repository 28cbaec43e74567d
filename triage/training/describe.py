"""What a labelled set holds: how much of each label, and which labels go together.

A head learns what its label goes together with; where two labels that are independent in nature
are correlated in the set, the network learns the one from the other.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from triage.training.dataset import labels_and_family
from triage.training.figures import spearman

__all__ = ["described"]

_STEPS = {
    "n_visible": (0, 1, 10, 31, 101, 1001),
    "median_snr": (0, 5, 8, 15, 50),
    "mosaicity_deg": (0, 0.05, 0.1, 0.2, 0.5, 1.0),
    "d_vis_angstrom": (0, 1.5, 2, 3, 5, 10),
    "ice_snr": (0, 3, 5, 8, 30, 300),
}
"""Lower ends of the bins of labels that are no classes."""


def described(paths: Sequence[Path]) -> str:
    """Tables in Markdown: frames by detector, each label's histogram, rank correlations."""
    columns: dict[str, list[NDArray[np.float64]]] = {}
    families: Counter[str] = Counter()
    for path in paths:
        labels, family = labels_and_family(path)
        for name, values in labels.items():
            columns.setdefault(name, []).append(values)
            frames = len(values)
        families[family] += frames
    tables = {name: np.concatenate(parts) for name, parts in columns.items()}
    total = sum(families.values())
    lines = [f"{total} frames in {len(paths)} shards", ""]
    lines += ["| detector | frames | share |", "|---|---|---|"]
    lines += [f"| {name} | {n} | {n / total:.1%} |" for name, n in families.most_common()]
    lines += ["", "| label | value | frames | share of known |", "|---|---|---|---|"]
    for name, values in tables.items():
        for title, n, share in _histogram(name, values):
            lines.append(f"| {name} | {title} | {n} | {share} |")
    names = list(tables)
    lines += ["", "Spearman correlation, where both are known:", ""]
    lines += ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for a in names:
        cells = [_correlation(tables[a], tables[b]) if a != b else "" for b in names]
        lines.append(f"| {a} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _histogram(name: str, values: NDArray[np.float64]) -> list[tuple[str, int, str]]:
    known = values[np.isfinite(values)]
    rows = []
    if name in _STEPS:
        ends = (*_STEPS[name], np.inf)
        for low, high in itertools.pairwise(ends):
            title = f"{low:g} to {high:g}" if np.isfinite(high) else f"{low:g} and more"
            rows.append((title, int(((known >= low) & (known < high)).sum())))
    else:
        rows = [(f"{value:g}", int((known == value).sum())) for value in np.unique(known)]
    shown = [(title, n, f"{n / max(1, known.size):.1%}") for title, n in rows]
    return [*shown, ("not defined", int(values.size - known.size), "")]


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> str:
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    if a.size < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return "-"
    return f"{spearman(a, b):+.2f}"

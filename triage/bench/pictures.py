"""Pictures of records: how far each stage stands above its floor, and each figure from its goal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt

from triage.bench.record import Record
from triage.bench.tables import number
from triage.errors import ConfigError

__all__ = ["draw"]

_OURS, _FLOOR, _MISSED = "#2b6cb0", "#a0aec0", "#c05621"


def draw(record: Record, folder: Path) -> Path:
    """A picture ``bench_NAME.png`` of what the record holds.

    Raises:
        ConfigError: a record without goals or stages.
    """
    if "goals" in record.tables:
        figure = _goals([row for row in record.tables["goals"] if row["value"] is not None])
    elif "stages" in record.tables:
        figure = _stages(record.tables["stages"])
    else:
        raise ConfigError(
            f"record {record.name}: nothing to draw; expected one of triage bench goals or stages"
        )
    machine = record.machine
    figure.suptitle(
        f"{record.name}: {machine.get('processor', '')}, {machine.get('cores', '?')} cores",
        fontsize=9,
    )
    path = folder / f"bench_{record.name}.png"
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path


def _goals(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Figures over what they must be, on a log scale; 1 is the bound, whichever way is better."""
    figure, axes = plt.subplots(figsize=(9, 0.36 * len(rows) + 1.3), layout="constrained")
    for place, row in enumerate(reversed(rows)):
        # From what must be reached, cost upwards: a rate twice as high is half the cost.
        is_rate = row["stretch"] > row["must"]
        share = row["must"] / row["value"] if is_rate else row["value"] / row["must"]
        stretch = row["must"] / row["stretch"] if is_rate else row["stretch"] / row["must"]
        axes.barh(place, share, color=_OURS if share <= 1 else _MISSED, height=0.6)
        axes.plot([stretch, stretch], [place - 0.4, place + 0.4], color="black", lw=1.2)
        axes.text(share, place, f" {number(row['value'])}", va="center", fontsize=8)
    axes.axvline(1.0, color="black", lw=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [row["figure"] for row in reversed(rows)], fontsize=8)
    axes.set_xlabel("cost over the most it may be (line: 1; ticks: stretch); shorter is better")
    axes.margins(x=0.12)
    return figure


def _stages(rows: Sequence[Mapping[str, Any]]) -> Any:
    """For each kind of frame, stages with their floors, CPU ms on a log scale."""
    kinds = list(dict.fromkeys(row["frames"] for row in rows))
    shown = [kind for kind in kinds if kind.endswith("u16 typ")] or kinds
    figure, grid = plt.subplots(
        1, len(shown), figsize=(2.9 * len(shown) + 1.5, 4.2), sharey=True, layout="constrained"
    )
    panels = [grid] if len(shown) == 1 else list(grid)
    for axes, kind in zip(panels, shown, strict=True):
        stages = [row for row in rows if row["frames"] == kind][::-1]
        for place, row in enumerate(stages):
            has_floor = row["floor_ms"] is not None
            axes.barh(place, row["ms"], color=_OURS if has_floor else _FLOOR, height=0.6)
            if has_floor:
                axes.plot([row["floor_ms"]] * 2, [place - 0.4, place + 0.4], color="black", lw=1.5)
            label = f" {number(row['ms'])}"
            if has_floor:
                label += f" ({number(row['over_floor'])}x)"
            axes.text(row["ms"], place, label, va="center", fontsize=7)
        longest = max(row["ms"] for row in stages)
        axes.set_xscale("log")
        # Room for the labels on the right; what costs less than a microsecond is all one.
        axes.set_xlim(1e-4, longest * (longest / 1e-4) ** 0.45)
        axes.set_title(kind, fontsize=9)
        axes.set_yticks(range(len(stages)), [row["stage"] for row in stages], fontsize=8)
        axes.set_xlabel("CPU ms; line: floor", fontsize=8)
    return figure

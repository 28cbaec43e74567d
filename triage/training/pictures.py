"""Pictures of an evaluation and of an explanation, drawn from their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from triage.binomial import clopper_pearson
from triage.errors import EnvironmentLacksError
from triage.records import ICE_D_ANGSTROM
from triage.training.figures import calibration_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from triage.training.explain import Explanation

__all__ = [
    "draw_confusions",
    "draw_curves",
    "draw_explanation",
    "draw_feature_maps",
    "draw_filters",
    "draw_real",
    "draw_reliability",
    "draw_scatter",
    "draw_strata",
]

_BINS = 15
_SHOWN_CELLS = 200


def draw_curves(
    path: Path, title: str, scores: Mapping[str, tuple[NDArray[np.float64], NDArray[np.bool_]]]
) -> None:
    """ROC and precision-recall side by side, one line per score; the first is drawn thick.

    Args:
        scores: by the name of who gives them, (scores, positive), each (n,).
    """
    figure, axes = _figure(1, 2)
    roc, pr = axes
    for number, (name, (score, positive)) in enumerate(scores.items()):
        order = np.argsort(-score, kind="stable")
        # Ties share a point: a curve through their middle would flatter the order they came in.
        last = np.append(np.diff(score[order]) != 0, True)
        hits = np.cumsum(positive[order])[last]
        false = np.cumsum(~positive[order])[last]
        width = 2.0 if number == 0 else 1.0
        roc.plot(
            np.append(0.0, false / max(1, (~positive).sum())),
            np.append(0.0, hits / max(1, positive.sum())),
            linewidth=width,
            label=name,
        )
        pr.plot(hits / max(1, positive.sum()), hits / (hits + false), linewidth=width, label=name)
    roc.set(xlabel="false positive rate", ylabel="true positive rate", title=f"{title}: ROC")
    pr.set(xlabel="recall", ylabel="precision", title=f"{title}: precision and recall")
    for axis in axes:
        axis.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
        axis.grid(alpha=0.3)
        axis.legend(loc="lower center")
    _save(figure, path)


def draw_reliability(
    path: Path, heads: Mapping[str, tuple[NDArray[np.float64], NDArray[np.bool_]]]
) -> None:
    """Stated against found probability with the frames per bin, one panel per (p, positive).

    The bars of a bin are exact 95 % intervals of what was found in it.
    """
    figure, axes = _grid(len(heads))
    for axis, (name, (p, positive)) in zip(axes, heads.items(), strict=False):
        place = np.minimum((p * _BINS).astype(int), _BINS - 1)
        frames = np.bincount(place, minlength=_BINS)
        used = np.flatnonzero(frames)
        stated = np.bincount(place, p, _BINS)[used] / frames[used]
        yes = np.bincount(place, positive.astype(float), _BINS)[used]
        found = yes / frames[used]
        ends = np.array(
            [clopper_pearson(int(k), int(n)) for k, n in zip(yes, frames[used], strict=True)]
        )
        bars = np.abs(ends.T - found)
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        axis.errorbar(stated, found, yerr=bars, marker="o", capsize=2, linewidth=1)
        counts = axis.twinx()
        counts.bar((np.arange(_BINS) + 0.5) / _BINS, frames, 0.9 / _BINS, alpha=0.15, color="0.3")
        counts.set(ylabel="frames", yscale="log")
        axis.set(xlabel="stated probability", ylabel="found share")
        error = calibration_error(p, positive, _BINS)
        axis.set(title=f"{name}: calibration error {error:.3f}")
        axis.grid(alpha=0.3)
    _save(figure, path)


def draw_confusions(
    path: Path, tables: Mapping[str, tuple[Sequence[Sequence[int]], float]]
) -> None:
    """Confusion matrices, rows are truth, shaded by the share of their row.

    Args:
        tables: by head (matrix, first level).
    """
    figure, axes = _grid(len(tables))
    for axis, (name, (rows, first)) in zip(axes, tables.items(), strict=False):
        table = np.array(rows)
        share = table / np.maximum(table.sum(1, keepdims=True), 1)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for y, x in np.ndindex(*table.shape):
            axis.text(
                x,
                y,
                str(table[y, x]),
                ha="center",
                va="center",
                color="white" if share[y, x] > 0.5 else "black",
            )
        ticks = range(len(table))
        levels = [f"{first + i:g}" for i in ticks]
        axis.set_xticks(ticks, levels)
        axis.set_yticks(ticks, levels)
        axis.set(xlabel="answer", ylabel="truth", title=name)
    _save(figure, path)


def draw_scatter(
    path: Path, heads: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64], str]]
) -> None:
    """Answer against truth on logarithmic axes, one panel per (truth, answer, unit)."""
    figure, axes = _grid(len(heads))
    for axis, (name, (truth, answer, unit)) in zip(axes, heads.items(), strict=False):
        both = np.concatenate([truth, answer])
        ends = [float(both.min()), float(both.max())] if both.size else [0.1, 1.0]
        axis.plot(ends, ends, color="0.7", linewidth=1)
        axis.scatter(truth, answer, s=6, alpha=0.4, linewidths=0)
        axis.set(xscale="log", yscale="log", title=f"{name}, {truth.size} frames")
        axis.set(xlabel=f"truth / {unit}", ylabel=f"answer / {unit}")
        axis.tick_params(which="both", labelsize=7)
        axis.grid(alpha=0.3)
    _save(figure, path)


def draw_strata(path: Path, strata: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """False vetoes of each part with their intervals, one panel per kind of part."""
    figure, axes = _grid(len(strata))
    for axis, (title, parts) in zip(axes, strata.items(), strict=False):
        names = [name for name, row in parts.items() if row["hits"]]
        rate = np.array([parts[name]["false_veto_rate"] for name in names])
        ends = np.array([parts[name]["false_veto_interval_95"] for name in names]).reshape(-1, 2)
        places = np.arange(len(names))
        bars = np.abs(ends.T - rate)
        axis.errorbar(100 * rate, places, xerr=100 * bars, fmt="o", capsize=3)
        axis.axvline(0.1, color="0.6", linewidth=1, linestyle="--")
        axis.set_yticks(places, [f"{name}\n{parts[name]['hits']} hits" for name in names])
        axis.set(xlabel="hits vetoed / %", title=f"by {title}", ylim=(len(names) - 0.5, -0.5))
        # Linear close to none, so that none is seen.
        axis.set_xscale("symlog", linthresh=0.1)
        axis.set_xlim(left=0.0)
        axis.grid(alpha=0.3)
    _save(figure, path)


def draw_real(path: Path, real: Mapping[str, Any]) -> None:
    """Real frames: p_blank by source, the scan, dose series, ice by contrast, pairs of lattices."""
    figure, axes = _grid(5)
    sources, scan, dose, ice, lattices = axes[:5]
    names = list(dict.fromkeys(f"{row['source']}, {row['label']}" for row in real["rows"]))
    for row in real["rows"]:
        place = names.index(f"{row['source']}, {row['label']}")
        if row["p_blank"] is not None:
            colour = "tab:red" if row["label"] == "blank" else "tab:blue"
            sources.plot(row["p_blank"], place, "|", color=colour, markersize=9)
    sources.axvline(real["threshold"], color="0.4", linestyle="--", linewidth=1)
    sources.set_yticks(range(len(names)), names, fontsize=6)
    sources.set(xlabel="p_blank", title="real frames; blanks red, veto right of the line")
    if "quality" in real["scan"]:
        scan.plot(real["scan"]["spots"], real["scan"]["quality"], "o")
        scan.set_xscale("symlog", linthresh=1.0)
        scan.set(xlabel="spots by the manifest", ylabel="quality")
        scan.set(title=f"scan of {real['scan']['source']}")
    for name in dict.fromkeys(row["file"] for row in real["dose"]["rows"]):
        rows = [r for r in real["dose"]["rows"] if r["file"] == name and r["p_blank"] is not None]
        dose.plot([r["dose"] for r in rows], [r["p_blank"] for r in rows], marker=".", label=name)
    dose.axhline(real["threshold"], color="0.4", linestyle="--", linewidth=1)
    dose.set(xscale="log", xlabel="dose", ylabel="p_blank", title="strong hits, thinned")
    if real["dose"]["rows"]:
        dose.legend(fontsize=5)
    for kind, colour in (("blank", "tab:red"), ("hit", "tab:blue")):
        rows = [
            (float(part.split()[1]), row)
            for part, row in real["ice"].get("by_contrast", {}).items()
            if part.startswith(kind)
        ]
        if rows:
            recall = np.array([row["recall"] for _, row in rows])
            ends = np.array([row["recall_interval_95"] for _, row in rows])
            bars = np.abs(ends.T - recall)
            ice.errorbar(
                [c for c, _ in rows], recall, yerr=bars, marker="o", color=colour, label=kind
            )
            ice.set_xscale("log")
            ice.legend()
    ice.set(xlabel="contrast", ylabel="recall at 1 % false alarms", title="rings of ice added")
    if "two" in real["lattices"]:
        bins = [i / 20 for i in range(21)]
        lattices.hist(real["lattices"]["one"], bins, alpha=0.6, label="one lattice")
        lattices.hist(real["lattices"]["two"], bins, alpha=0.6, label="two lattices")
        lattices.legend()
    lattices.set(xlabel="p_multilattice", ylabel="frames", title="sums of real frames")
    for axis in axes[:5]:
        axis.grid(alpha=0.3)
    _save(figure, path)


def draw_explanation(path: Path, title: str, of: Explanation) -> None:
    """The frame with what spoke for a crystal, the spots and where the full exit looked, and the
    rings."""
    figure, (cells, looked, rings) = _figure(1, 3)
    k = of.cell_px
    extent = (0.0, of.level.shape[1] * k, of.level.shape[0] * k, 0.0)
    root = np.sqrt(of.level)
    seen = np.isfinite(root)
    top = float(np.quantile(root[seen], 0.995)) if seen.any() else 1.0
    for axis in (cells, looked):
        axis.imshow(root, cmap="gray", vmin=0.0, vmax=max(top, 1e-6), extent=extent)
        axis.set(xlabel="x / px", ylabel="y / px")
    chosen = slice(0, _SHOWN_CELLS)
    evidence = of.evidence[chosen]
    cells.scatter(
        (of.cell_x[chosen] + 0.5) * k,
        (of.cell_y[chosen] + 0.5) * k,
        s=8.0 + 60.0 * np.clip(evidence, 0.0, 1.0),
        facecolors="none",
        edgecolors=np.where(evidence > 0, "tab:red", "tab:blue").tolist(),
        linewidths=0.8,
    )
    cells.set(title=f"{title}\nred speaks for a crystal, blue against")
    if of.attention.any():
        looked.imshow(of.attention, cmap="inferno", alpha=0.45, extent=extent)
    for y, x in of.tile_px:
        side = of.tile_side_px
        looked.plot(
            [x, x + side, x + side, x, x], [y, y, y + side, y + side, y], "c-", linewidth=0.8
        )
    own = of.spot_log_odds > 0
    for these, marker, colour in ((own, "o", "tab:green"), (~own, "s", "tab:orange")):
        looked.scatter(
            of.spot_x_px[these],
            of.spot_y_px[these],
            s=26.0,
            marker=marker,
            facecolors="none",
            edgecolors=colour,
            linewidths=0.8,
        )
    seen_by = f"; Grad-CAM of {of.head}, native tiles" if of.attention.any() else ""
    looked.set(
        title=f"{len(own)} spots{seen_by}\ngreen is like a crystal's ({own.sum()}), orange is not"
    )
    if of.has_geometry:
        rings.plot(of.inverse_d2, of.radial, linewidth=1.0)
        for d in ICE_D_ANGSTROM:
            if d**-2 <= of.inverse_d2[-1]:
                rings.axvline(d**-2, color="tab:blue", alpha=0.3)
        rings.set(xlabel="1/d^2 / angstrom^-2", ylabel="photons per pixel, spots left out")
        rings.set(title="radial profile; lines of ice in blue")
        rings.grid(alpha=0.3)
    else:
        rings.text(0.5, 0.5, "no geometry: ice is not scored", ha="center", va="center")
        rings.set_axis_off()
    _save(figure, path)


def draw_feature_maps(path: Path, maps: Mapping[str, NDArray[np.float32]], shown: int = 8) -> None:
    """The strongest channels of each stage, one row per stage."""
    figure, axes = _figure(len(maps), shown, side=1.8)
    for axis in axes:
        axis.set_axis_off()
    for row, (name, channels) in enumerate(maps.items()):
        strongest = np.argsort(-channels.max((1, 2)), kind="stable")[:shown]
        for column, channel in enumerate(strongest):
            axis = axes[row * shown + column]
            axis.imshow(channels[channel], cmap="viridis")
            axis.set_title(f"{name}, {channel}", fontsize=7)
    _save(figure, path)


def draw_filters(path: Path, weights: NDArray[np.float32]) -> None:
    """First-layer filters (out, in, 3, 3): one row per filter, one column per plane it reads."""
    rows, columns = weights.shape[:2]
    largest = float(np.abs(weights).max()) or 1.0
    # One picture: a cell of 3 x 3 each, with a line between.
    sheet = np.full((rows * 4 - 1, columns * 4 - 1), np.nan)
    for y, x in np.ndindex(rows, columns):
        sheet[4 * y : 4 * y + 3, 4 * x : 4 * x + 3] = weights[y, x]
    figure, (axis,) = _figure(1, 1, side=6.5)
    axis.imshow(sheet, cmap="RdBu", vmin=-largest, vmax=largest)
    axis.set_xticks(np.arange(columns) * 4 + 1, [str(i) for i in range(columns)])
    axis.set_yticks(np.arange(rows) * 4 + 1, [str(i) for i in range(rows)])
    axis.set(xlabel="plane", ylabel="filter", title="first convolution of the overview")
    _save(figure, path)


def _figure(rows: int, columns: int, side: float = 4.7) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as err:
        raise EnvironmentLacksError("pictures need matplotlib; install the extra 'train'") from err
    figure = Figure(figsize=(side * columns, side * rows), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    made: Any = figure.subplots(rows, columns, squeeze=False)
    return figure, list(made.ravel())


def _grid(panels: int, columns: int = 4) -> tuple[Figure, list[Axes]]:
    """At least so many panels, those that are left over empty."""
    columns = 3 if panels in (5, 6) else max(1, min(columns, panels))
    rows = max(1, -(-panels // columns))
    figure, axes = _figure(rows, columns)
    for axis in axes[panels:]:
        axis.set_axis_off()
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path)

"""What a model says of labelled frames, and the figures that a sceptic asks for.

Every figure stands with how many frames it is of; shares have their exact interval.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triage.binomial import clopper_pearson
from triage.machine import machine, versions
from triage.nets.model import Card, Model
from triage.nets.scorer import head_values
from triage.nets.triagenet import Features, Head, TriageNet
from triage.records import HIT_SPOTS, Recipe
from triage.training.baselines import boosted_trees, radial_statistics, spot_statistics
from triage.training.dataset import (
    Example,
    data_hash,
    disturbed,
    load_examples,
    shard_paths,
    shards_made_with,
)
from triage.training.figures import (
    auroc,
    auroc_interval,
    balanced_accuracy,
    calibration_error,
    spearman,
)
from triage.training.pictures import (
    draw_confusions,
    draw_curves,
    draw_reliability,
    draw_scatter,
)

__all__ = [
    "VetoFigures",
    "assess",
    "blank_probability",
    "cells",
    "evaluate",
    "figures_of",
    "head_figures",
    "labels_of",
    "predict",
    "share",
    "stacked",
    "veto_tables",
]


def cells(example: Example) -> int:
    """Numbers in its overview, by which frames of like size are found; 0 without one."""
    return 0 if example.overview is None else example.overview.size


def stacked(
    net: TriageNet, batch: Sequence[Example], rng: np.random.Generator | None
) -> tuple[Features, Tensor, Tensor]:
    """Features, tiles and spots of a batch, padded to the largest; turned and disturbed by rng."""
    views = [e.overview for e in batch if e.overview is not None]
    tiles = [e.tiles for e in batch if e.tiles is not None]
    if rng is not None:
        views = [_turned(disturbed(v, rng) if rng.random() < 0.3 else v, rng) for v in views]
    y, x = (max(v.shape[axis] for v in views) for axis in (1, 2))
    overview = np.zeros((len(batch), 3, y, x), np.float32)
    for i, view in enumerate(views):
        overview[i, :, : view.shape[1], : view.shape[2]] = view
    with torch.no_grad():
        features = net.features(
            torch.from_numpy(overview),
            torch.from_numpy(np.stack([e.radial for e in batch])),
            torch.tensor([float(e.bin_factor) for e in batch]),
        )
    spots = np.stack([e.spots for e in batch if e.spots is not None])
    return features, torch.from_numpy(np.stack(tiles).astype(np.float32)), torch.from_numpy(spots)


def _turned(view: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """One of the eight turns and mirrors of a square."""
    if rng.random() < 0.5:
        view = view[:, :, ::-1]
    return np.rot90(view, int(rng.integers(4)), (1, 2))


def predict(
    net: TriageNet, examples: Sequence[Example], *, full: bool = True
) -> dict[str, np.ndarray[Any, Any]]:
    """Raw outputs (N, head.outputs) of every head, in the order of ``examples``.

    NaN for heads of the full exit where a frame has nothing for it, and all of them unless
    ``full``.
    """
    net.eval()
    n = len(examples)
    outputs = {h.name: np.full((n, h.outputs), math.nan) for h in net.heads}
    with torch.inference_mode():
        for first in range(0, n, 256):
            batch = examples[first : first + 256]
            counts = torch.from_numpy(np.stack([e.counts[0] for e in batch]))
            candidates = torch.from_numpy(np.stack([e.candidates[0] for e in batch])).float()
            rings = net.rings(torch.from_numpy(np.stack([e.radial for e in batch])))
            answers = net.members(net.standardised(counts), candidates, rings)
            for name, raw in answers.items():
                outputs[name][first : first + 256] = raw.mean(1).numpy()
        rows = [i for i in range(n) if full and examples[i].overview is not None]
        rows.sort(key=lambda i: cells(examples[i]))
        for first in range(0, len(rows), 16):
            chosen = rows[first : first + 16]
            features, tiles, spots = stacked(net, [examples[i] for i in chosen], None)
            for name, raw in net.full(features, tiles, spots).items():
                outputs[name][chosen] = raw.numpy()
    return outputs


def labels_of(examples: Sequence[Example], name: str) -> np.ndarray[Any, Any]:
    """One label of each example (n,), NaN where undefined."""
    return np.array([e.labels.get(name, math.nan) for e in examples])


def blank_probability(
    outputs: Mapping[str, np.ndarray[Any, Any]], calibration: Mapping[str, tuple[float, float]]
) -> np.ndarray[Any, Any]:
    """Calibrated p_blank (n,) of raw outputs."""
    temperature, bias = calibration.get("blank", (1.0, 0.0))
    return np.asarray(1.0 / (1.0 + np.exp(-(outputs["blank"][:, 0] / temperature + bias))))


def share(yes: NDArray[np.bool_]) -> float | None:
    """Share of those that are; None of none (JSON knows no NaN)."""
    return float(yes.mean()) if yes.size else None


def assess(
    net: TriageNet,
    paths: Sequence[Path],
    recipe: Recipe,
    calibration: Mapping[str, tuple[float, float]],
    threshold: float,
    threads: int = 1,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A card's validation and tables, from shards that took no part in anything before.

    Returns:
        Counts, threshold and false-veto rate with its interval; and figures by stratum and head.
    """
    examples = list(load_examples(paths, recipe, threads=threads))
    outputs = predict(net, examples)
    veto, tables = figures_of(net.heads, examples, outputs, calibration, threshold)
    validation = {
        "data_hash": data_hash(paths),
        "frames": len(examples),
        "threshold": threshold,
        **veto,
    }
    return validation, tables


def figures_of(
    heads: Sequence[Head],
    examples: Sequence[Example],
    outputs: Mapping[str, NDArray[np.float64]],
    calibration: Mapping[str, tuple[float, float]],
    threshold: float,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of the veto over all examples; and tables by stratum and by head."""
    p = blank_probability(outputs, calibration)
    veto = VetoFigures(p >= threshold, p, labels_of(examples, "blank"))
    tables = veto_tables(veto, examples)
    tables["heads"] = {
        head.name: head_figures(
            head, outputs[head.name], labels_of(examples, head.name), calibration
        )
        for head in heads
    }
    return veto.of(), tables


@dataclass(frozen=True, slots=True, eq=False)
class VetoFigures:
    """Figures of the veto over any part of a set.

    Attributes:
        vetoed: (n,) whether p_blank reaches the threshold.
        score: (n,) the higher, the blanker.
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
        """Counts, AUROC, false veto with its interval, and vetoed blanks.

        Args:
            hits_too, blanks_too: (n,) further conditions on either; None for all of them.
        """
        hits, blanks = self.labels == 0.0, self.labels == 1.0
        if hits_too is not None:
            hits = hits & hits_too
        if blanks_too is not None:
            blanks = blanks & blanks_too
        either = hits | blanks
        n, wrong = int(hits.sum()), int((self.vetoed & hits).sum())
        return {
            "hits": n,
            "blanks": int(blanks.sum()),
            "auroc": auroc(self.score[either], blanks[either]),
            "auroc_interval_95": auroc_interval(self.score[either], blanks[either]),
            "false_vetoes": wrong,
            "false_veto_rate": wrong / max(1, n),
            "false_veto_interval_95": list(clopper_pearson(wrong, n)),
            "blanks_vetoed_share": share(self.vetoed[blanks]),
        }


def veto_tables(veto: VetoFigures, examples: Sequence[Example]) -> dict[str, Any]:
    """The veto by visible spots, signal to noise and resolution of hits, and by detector."""
    visible = np.nan_to_num(labels_of(examples, "n_visible"))
    family = np.array([e.family for e in examples])
    few = (visible > 0) & (visible < HIT_SPOTS)

    def by(name: str, bounds: Sequence[float], unit: str = "") -> dict[str, Any]:
        values = labels_of(examples, name)
        rows = {}
        for low, high in zip(bounds, (*bounds[1:], math.inf), strict=True):
            title = f"{low:g} to {high:g}" if math.isfinite(high) else f"{low:g} and more"
            rows[(title + " " + unit).strip()] = veto.of((values >= low) & (values < high))
        return rows

    return {
        "blank_by_visible_spots": by("n_visible", (10, 31, 101, 1001)),
        "blank_by_median_snr": by("median_snr", (5, 8, 15, 50)),
        "blank_by_resolution": by("d_vis_angstrom", (0, 2, 3, 5), "angstrom"),
        "blank_by_family": {
            str(name): veto.of(family == name, family == name) for name in np.unique(family)
        },
        "few_spots": {"frames": int(few.sum()), "vetoed": int((veto.vetoed & few).sum())},
    }


def head_figures(
    head: Head,
    raw: NDArray[np.float64],
    labels: NDArray[np.float64],
    calibration: Mapping[str, tuple[float, float]],
) -> dict[str, Any]:
    """Figures of one head over the frames whose label is known and that it was asked about.

    Frames without an answer are left out of the figures and counted as ``unanswered``.
    """
    asked = np.isfinite(labels)
    if head.kind == "ordinal":
        # A blank frame has no lattice to count, and a level that the head does not have is none.
        asked &= (labels >= head.first) & (labels <= head.first + head.levels - 1)
    answered = asked & np.isfinite(raw).all(1)
    figures: dict[str, Any] = {
        "frames": int(asked.sum()),
        "unanswered": int((asked & ~answered).sum()),
    }
    if not answered.any():
        return figures
    values = head_values(head, raw[answered], calibration)
    truth = labels[answered]
    if head.kind == "binary":
        yes = truth > 0.5
        return figures | {
            "positives": int(yes.sum()),
            "auroc": auroc(raw[answered, 0], yes),
            "auroc_interval_95": auroc_interval(raw[answered, 0], yes),
            "balanced_accuracy": balanced_accuracy(values >= 0.5, yes),
            "expected_calibration_error": calibration_error(values, yes),
        }
    if head.kind == "ordinal":
        level = np.rint(values - head.first).astype(int)
        known = np.rint(truth - head.first).astype(int)
        table = np.zeros((head.levels, head.levels), int)
        np.add.at(table, (known, np.clip(level, 0, head.levels - 1)), 1)
        return figures | {
            "accuracy": float((level == known).mean()),
            "off_by_one": float((np.abs(level - known) <= 1).mean()),
            "confusion": table.tolist(),
        }
    return figures | {
        "median_relative_error": float(np.median(np.abs(values / truth - 1.0))),
        "spearman": spearman(values, truth),
    }


def evaluate(
    model: Model,
    shards: Path,
    out: Path,
    *,
    baselines_from: Path | None = None,
    threads: int = 1,
    command: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Report, tables and pictures of a model on labelled shards, written into ``out``.

    Args:
        baselines_from: shards that the boosted trees learn from; None for the spot count alone.

    Returns:
        What ``report.json`` holds.

    Raises:
        UnreadableFile: no shards.
        EnvironmentLacksError: matplotlib or scikit-learn is missing.
    """
    card, net = model.card, model.net
    paths = shard_paths(shards)
    threshold = card.thresholds["p_blank_veto"]
    hashed = data_hash(paths)
    if hashed == card.training.get("data_hash"):
        say(f"WARNING: {card.model_id} was trained on these very frames; its figures mean nothing")
    say(f"preparing {len(paths)} shards")
    examples = list(load_examples(paths, card.recipe, threads=threads))
    say("scoring")
    outputs = predict(net, examples)
    veto, tables = figures_of(net.heads, examples, outputs, card.calibration, threshold)
    say("spot finder")
    spots = spot_statistics(paths, threads=threads)
    rivals: dict[str, dict[str, NDArray[np.float64]]] = {"blank": {"spot count": -spots[:, 0]}}
    if baselines_from is not None:
        say("boosted trees")
        for name, score in _trees(card, baselines_from, examples, spots, threads).items():
            rivals.setdefault(name, {})["boosted trees"] = score
    report = {
        "name": "evaluate",
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "model_id": card.model_id,
        "threshold": threshold,
        "data_hash": hashed,
        "shards": shards_made_with(shards),
        "baselines_from": shards_made_with(baselines_from) if baselines_from else None,
        "frames": len(examples),
        "veto": veto,
        **tables,
        "baselines": {
            name: {
                rival: _rival_figures(score, labels_of(examples, name))
                for rival, score in of.items()
            }
            for name, of in rivals.items()
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    report = {key: _without_nan(value) for key, value in report.items()}
    (out / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    (out / "report.md").write_text(_as_text(report))
    _draw(out, net.heads, card, examples, outputs, rivals, report)
    return report


def _without_nan(value: Any) -> Any:
    """The same with None for what is no number: JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _trees(
    card: Card,
    learned_from: Path,
    examples: Sequence[Example],
    spots: NDArray[np.float64],
    threads: int,
) -> dict[str, NDArray[np.float64]]:
    paths = shard_paths(learned_from)
    learned = list(load_examples(paths, card.recipe, full=False, threads=threads))
    known = np.concatenate([spot_statistics(paths, threads=threads), radial_statistics(learned)], 1)
    return boosted_trees(
        known,
        {h.name: labels_of(learned, h.name) for h in card.heads if h.kind == "binary"},
        np.concatenate([spots, radial_statistics(examples)], 1),
    )


def _rival_figures(score: NDArray[np.float64], labels: NDArray[np.float64]) -> dict[str, Any]:
    known = np.isfinite(labels)
    yes = labels[known] > 0.5
    return {
        "frames": int(known.sum()),
        "auroc": auroc(score[known], yes),
        "auroc_interval_95": auroc_interval(score[known], yes),
    }


def _draw(
    out: Path,
    heads: Sequence[Head],
    card: Card,
    examples: Sequence[Example],
    outputs: Mapping[str, NDArray[np.float64]],
    rivals: Mapping[str, Mapping[str, NDArray[np.float64]]],
    report: Mapping[str, Any],
) -> None:
    reliable, confusions, scatters = {}, {}, {}
    for head in heads:
        labels, raw = labels_of(examples, head.name), outputs[head.name]
        known = np.isfinite(labels) & np.isfinite(raw).all(1)
        if not known.any():
            continue
        values = head_values(head, raw[known], card.calibration)
        if head.kind == "binary":
            yes = labels[known] > 0.5
            others = {name: score[known] for name, score in rivals.get(head.name, {}).items()}
            draw_curves(
                out / f"curves_{head.name}.png", head.name, yes, {"model": values, **others}
            )
            reliable[head.name] = (values, yes)
        elif head.kind == "ordinal":
            figures = report["heads"][head.name]
            if "confusion" in figures:
                confusions[head.name] = (figures["confusion"], head.first)
        else:
            scatters[head.name] = (labels[known], values, head.unit)
    if reliable:
        draw_reliability(out / "reliability.png", reliable)
    if confusions:
        draw_confusions(out / "confusion.png", confusions)
    if scatters:
        draw_scatter(out / "regressions.png", scatters)


def _as_text(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        f"# {report['model_id']} on {report['frames']} frames",
        "",
        f"Threshold {report['threshold']:.4f}; frames {report['data_hash']}, {report['shards']}.",
        "",
        "## Veto",
        "",
        "| part | hits | blanks | AUROC | false vetoes | 95 % interval | blanks vetoed |",
        "|---|---|---|---|---|---|---|",
        _veto_row("all", report["veto"]),
    ]
    for title in ("visible_spots", "median_snr", "resolution", "family"):
        name = title.replace("_", " ")
        lines += [
            _veto_row(f"{name} {part}", row) for part, row in report[f"blank_by_{title}"].items()
        ]
    few = report["few_spots"]
    lines += [
        "",
        f"Frames with 1 to 9 visible spots: {few['frames']}, of them vetoed {few['vetoed']}.",
        "",
        "## Heads",
        "",
        "| head | frames | figure | value |",
        "|---|---|---|---|",
    ]
    for name, figures in report["heads"].items():
        for figure, value in figures.items():
            if figure not in ("frames", "confusion", "unanswered"):
                answered = figures["frames"] - figures["unanswered"]
                lines.append(f"| {name} | {answered} | {figure} | {_number(value)} |")
    lines += ["", "## Baselines on the same frames", "", "| label | who | AUROC | 95 % interval |"]
    lines.append("|---|---|---|---|")
    for name, rivals in report["baselines"].items():
        own = report["heads"].get(name, {})
        if "auroc" in own:
            rivals = {"model": own, **rivals}
        lines += [
            f"| {name} | {who} | {_number(row['auroc'])} | {_number(row['auroc_interval_95'])} |"
            for who, row in rivals.items()
        ]
    return "\n".join(lines) + "\n"


def _veto_row(title: str, row: Mapping[str, Any]) -> str:
    vetoed = row["blanks_vetoed_share"]
    low, high = row["false_veto_interval_95"]
    return (
        f"| {title} | {row['hits']} | {row['blanks']} | {_number(row['auroc'])} | "
        f"{row['false_vetoes']} | {low:.2%} to {high:.2%} | "
        f"{'' if vetoed is None else f'{vetoed:.1%}'} |"
    )


def _number(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(_number(each) for each in value)
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4f}"

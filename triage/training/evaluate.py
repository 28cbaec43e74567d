"""What a model is worth: one report of everything that a sceptic asks for.

The figures are of frames that no training saw. Thresholds come from the card or from a further
set, never from the frames that are judged. Baselines answer for the same frames in the same run;
those that take long answer for some of the shards, drawn at random, and the model's figure beside
theirs is of the same shards.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triage import __version__
from triage.errors import EnvironmentLacksError
from triage.machine import machine, versions
from triage.nets.model import Card, Model
from triage.nets.spot_features import SPOT_FEATURES
from triage.nets.triagenet import Head, TriageNet
from triage.records import Recipe
from triage.training.answers import Answers, answers_of
from triage.training.baselines import BASELINES
from triage.training.dataset import data_hash, shard_paths, shards_made_with
from triage.training.figures import auroc, auroc_interval, balancing_threshold, veto_threshold
from triage.training.pictures import (
    draw_confusions,
    draw_curves,
    draw_real,
    draw_reliability,
    draw_scatter,
    draw_strata,
)
from triage.training.real_frames import real_figures
from triage.training.report import as_text
from triage.training.requirements import requirements
from triage.training.tables import WEAK_SPOTS, head_tables, ranked, veto_tables

__all__ = ["assess", "evaluate", "thresholds_from"]

FALSE_VETO_GOAL = 0.001
"""Share of hits that a threshold is promised to veto at most, see ``figures.veto_threshold``."""

SLOW_FRAMES = 600
"""Frames that a slow baseline is asked about at most, of those of the shards drawn."""


def assess(
    net: TriageNet,
    paths: Sequence[Path],
    recipe: Recipe,
    calibration: Mapping[str, tuple[float, float]],
    beside_weights: Mapping[str, tuple[float, ...]],
    thresholds: Mapping[str, float],
    threads: int = 1,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A card's validation and tables, from shards that took no part in anything before.

    Returns:
        Counts, threshold and false-veto rate with its interval; and figures by stratum and head.
    """
    card = Card(
        model_id="",
        weights_sha256="",
        recipe=recipe,
        heads=net.heads,
        spot_features=SPOT_FEATURES,
        thresholds=thresholds,
        calibration=calibration,
        beside_weights=beside_weights,
    )
    threshold = thresholds["p_blank_veto"]
    answers = answers_of(Model(net=net, card=card), paths, threads=threads)
    veto = veto_tables(answers, threshold, card.p_blank_sure)
    validation = {
        "data_hash": data_hash(paths),
        "frames": len(answers),
        "threshold": threshold,
        **veto.pop("all"),
    }
    tables = {"veto": veto, "heads": head_tables(net.heads, answers, {})}
    return _without_nan(validation), _without_nan(tables)


def thresholds_from(heads: Sequence[Head], answers: Answers) -> dict[str, float]:
    """Thresholds by binary head, fixed on the frames given.

    A veto asks for few false ones, so blanks are called from where :data:`FALSE_VETO_GOAL` holds;
    the other heads from where both classes are called right most often.
    """
    found = {}
    for head in heads:
        p, labels = answers.value(head.name), answers.label(head.name)
        if head.kind != "binary" or head.answers:
            continue
        if head.name == "blank":
            found["blank"] = veto_threshold(p, labels, FALSE_VETO_GOAL)
            continue
        known = np.isfinite(p) & np.isfinite(labels)
        found[head.name] = balancing_threshold(p[known], labels[known] > 0.5)
    return found


def evaluate(
    model: Model,
    shards: Path | None,
    out: Path,
    *,
    calibration: Path | None = None,
    real: Path | None = None,
    baselines_from: Path | None = None,
    baseline_shards: int = 64,
    threads: int = 1,
    command: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Report, tables and pictures of a model, written into ``out``.

    An interrupted run goes on where it stopped: what was answered lies in ``out/answers``.

    Args:
        shards: labelled shards that the model is judged by; None for the real frames alone.
        calibration: shards on which thresholds are fixed; None takes the card's for the veto and
            0.5 of the calibrated probability for the other heads.
        real: folder of real frames with a ``manifest.csv``.
        baselines_from: shards that the learned baselines learn from; None for those that need no
            learning.
        baseline_shards: the baselines answer for so many of the shards, and learn from so many.

    Returns:
        What ``report.json`` holds.

    Raises:
        UnreadableFile: no shards.
        EnvironmentLacksError: matplotlib or scikit-learn is missing.
    """
    card = model.card
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "answers"
    kept.mkdir(exist_ok=True)
    report: dict[str, Any] = {
        "name": "evaluate",
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "model_id": card.model_id,
        "heads_absent": sorted(
            {"blank", "ice", "bad_ice", "multilattice", "mosaicity_deg", "quality"}
            - {head.name for head in card.heads}
        ),
    }
    answers = None
    if shards is not None:
        paths = shard_paths(shards)
        hashed = data_hash(paths)
        if hashed in (card.training.get("data_hash"), card.training.get("calibration_hash")):
            say(f"WARNING: {card.model_id} was made with these very frames; they prove nothing")
        thresholds = {"blank": card.thresholds["p_blank_veto"]}
        fixed_on: dict[str, Any] = {"set": "card"}
        if calibration is not None:
            thresholds, fixed_on = _fixed_on(model, calibration, kept, threads, say)
            if fixed_on["data_hash"] == hashed:
                say("WARNING: thresholds are fixed on the frames that they are tested on")
        say(f"test set {shards.name}")
        answers = answers_of(model, paths, kept, threads=threads, say=say)
        report |= {
            "data_hash": hashed,
            "shards": shards_made_with(shards),
            **_figures(card, answers, thresholds, fixed_on),
        }
        asked = _drawn(paths, baseline_shards)
        some = np.isin(answers.shard, [paths.index(path) for path in asked])
        learned_from = (
            [] if baselines_from is None else _drawn(shard_paths(baselines_from), baseline_shards)
        )
        rivals = _rivals(asked, answers.where(some), learned_from, kept, threads, say)
        report["baselines"] = {
            "shards": len(asked),
            "of_shards": len(paths),
            "frames": int(some.sum()),
            "learned_from": shards_made_with(baselines_from) if baselines_from else None,
            "learned_from_shards": len(learned_from),
            "labels": _compared(answers.where(some), rivals),
        }
    if real is not None:
        say(f"real frames {real.name}")
        report["real"] = _kept_real(model, real, kept, say)
    report["requirements"] = requirements(report)
    report = _without_nan(report)
    (out / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    (out / "report.md").write_text(as_text(report))
    if answers is not None:
        _draw(out, card.heads, answers, some, rivals, report)
    if real is not None:
        draw_real(out / "real.png", report["real"])
    return report


def _fixed_on(
    model: Model, calibration: Path, kept: Path, threads: int, say: Callable[[str], None]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Thresholds, and what they were fixed on."""
    say(f"calibration set {calibration.name}")
    paths = shard_paths(calibration)
    answers = answers_of(model, paths, kept, threads=threads, say=say)
    return thresholds_from(model.card.heads, answers), {
        "set": "calibration",
        "data_hash": data_hash(paths),
        "shards": shards_made_with(calibration),
        "frames": len(answers),
        "false_veto_goal": FALSE_VETO_GOAL,
    }


def _figures(
    card: Card, answers: Answers, thresholds: Mapping[str, float], fixed_on: Mapping[str, Any]
) -> dict[str, Any]:
    """All figures of a labelled set."""
    own = card.thresholds["p_blank_veto"]
    return {
        "thresholds": dict(thresholds),
        "thresholds_fixed_on": dict(fixed_on),
        "set": _described(answers),
        "veto": veto_tables(answers, thresholds["blank"], card.p_blank_sure),
        "veto_at_the_cards_threshold": veto_tables(answers, own)["all"] | {"threshold": own},
        "heads": head_tables(card.heads, answers, thresholds),
    }


def _described(answers: Answers) -> dict[str, Any]:
    """How many frames of which kind."""
    blank, visible = answers.label("blank"), answers.label("n_visible")
    hits = blank == 0.0
    weak = hits & (visible >= WEAK_SPOTS[0]) & (visible <= WEAK_SPOTS[1])
    names, frames = np.unique(answers.family, return_counts=True)
    return {
        "frames": len(answers),
        "hits": int(hits.sum()),
        "blanks": int((blank == 1.0).sum()),
        "few": int((~np.isfinite(blank)).sum()),
        "weak_share": float(weak.sum() / max(1, hits.sum())),
        "families": {str(n): int(k) for n, k in zip(names, frames, strict=True)},
    }


def _drawn(paths: Sequence[Path], most: int) -> list[Path]:
    """At most so many of the shards, at random, in their order."""
    rows = np.random.default_rng(0).permutation(len(paths))[:most]
    return [paths[i] for i in np.sort(rows)]


def _rivals(
    asked: Sequence[Path],
    answers: Answers,
    learned_from: Sequence[Path],
    kept: Path,
    threads: int,
    say: Callable[[str], None],
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """By label and baseline, (n,) scores of the frames asked; NaN where it was not asked.

    What a baseline answered does not depend on the model, and is kept for the next one.
    """
    found: dict[str, dict[str, NDArray[np.float64]]] = {}
    if not len(answers):
        return found
    drawn = np.random.default_rng(1).permutation(len(answers))[:SLOW_FRAMES]
    sets = f"{__version__} {data_hash(asked)} {data_hash(learned_from)}"
    for baseline in BASELINES:
        rows = np.sort(drawn) if baseline.slow else np.arange(len(answers))
        digest = hashlib.sha256(f"{baseline.name} {rows.size} {sets}".encode()).hexdigest()
        file = kept / f"baseline-{digest[:16]}.npz"
        if file.exists():
            with np.load(file) as before:
                scores = {name: before[name] for name in before.files}
        else:
            say(f"baseline {baseline.name}")
            try:
                scores = baseline.score(
                    learned_from,
                    asked,
                    rows=rows if baseline.slow else None,
                    threads=threads,
                    say=say,
                )
            except EnvironmentLacksError as err:
                say(f"{baseline.name} is left out: {err}")
                continue
            part = file.with_suffix(".part.npz")
            np.savez(part, allow_pickle=False, **scores)
            part.replace(file)
        for label, score in scores.items():
            whole = np.full(len(answers), math.nan)
            whole[rows] = score
            found.setdefault(label, {})[baseline.name] = whole
    return found


def _compared(
    answers: Answers, rivals: Mapping[str, Mapping[str, NDArray[np.float64]]]
) -> dict[str, Any]:
    """By label, AUROC of each baseline, and the model's on the same frames."""
    visible = answers.label("n_visible")
    weak = ~((visible > WEAK_SPOTS[1]) & (answers.label("blank") == 0.0))
    tables: dict[str, Any] = {}
    for name, of in rivals.items():
        parts = {name: np.full(len(answers), True)}
        if name == "blank":
            parts["blank, weak hits"] = weak
        for title, part in parts.items():
            labels = np.where(part, answers.label(name), math.nan)
            tables[title] = {
                who: _side_by_side(answers.value(name), score, labels) for who, score in of.items()
            }
    return tables


def _side_by_side(
    own: NDArray[np.float64], score: NDArray[np.float64], labels: NDArray[np.float64]
) -> dict[str, Any]:
    known = np.isfinite(labels) & np.isfinite(score)
    yes = labels[known] > 0.5
    mine = ranked(own[known], yes)
    return {
        "frames": int(yes.size),
        "positives": int(yes.sum()),
        "auroc": auroc(score[known], yes),
        "auroc_interval_95": auroc_interval(score[known], yes),
        "model_on_the_same": auroc(mine, yes) if np.isfinite(own[known]).any() else None,
        "model_on_the_same_interval_95": auroc_interval(mine, yes),
    }


def _kept_real(
    model: Model, folder: Path, kept: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """The figures of real frames, from before where model and files are the same."""
    files = [(p.name, p.stat().st_size) for p in sorted(folder.iterdir()) if p.is_file()]
    asked = f"{__version__} {model.card.weights_sha256} {model.card.heads} "
    asked += f"{model.card.calibration} {dict(model.card.thresholds)} {files}"
    file = kept / f"real-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.json"
    if file.exists():
        before: dict[str, Any] = json.loads(file.read_text())
        return before
    found: dict[str, Any] = _without_nan(real_figures(model, folder, say=say))
    file.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    return found


def _without_nan(value: Any) -> Any:
    """The same with None for what is no number: JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _draw(
    out: Path,
    heads: Sequence[Head],
    answers: Answers,
    some: NDArray[np.bool_],
    rivals: Mapping[str, Mapping[str, NDArray[np.float64]]],
    report: Mapping[str, Any],
) -> None:
    reliable: dict[str, tuple[NDArray[np.float64], NDArray[np.bool_]]] = {}
    confusions: dict[str, tuple[Sequence[Sequence[int]], float]] = {}
    scatters: dict[str, tuple[NDArray[np.float64], NDArray[np.float64], str]] = {}
    for head in heads:
        labels, values = answers.label(head.name), answers.value(head.name)
        known = np.isfinite(labels) & np.isfinite(values)
        if not known.any():
            continue
        figures = report["heads"][head.name]
        if "confusion" in figures:
            confusions[head.name] = (figures["confusion"], head.first)
        if head.kind == "binary":
            reliable[head.name] = (values[known], labels[known] > 0.5)
            curves = {"model": (values[known], labels[known] > 0.5)}
            for who, score in rivals.get(head.name, {}).items():
                asked = np.isfinite(labels[some]) & np.isfinite(score)
                curves[who] = (score[asked], labels[some][asked] > 0.5)
            draw_curves(out / f"curves_{head.name}.png", head.name, curves)
        elif head.name == "mosaicity_deg":
            seen = answers.label("mosaicity_measurable") == 1.0
            for title, part in (("measurable", seen), ("others", ~seen)):
                rows = known & part
                scatters[f"mosaicity, {title}"] = (labels[rows], values[rows], head.unit)
        elif head.kind == "regression":
            scatters[head.name] = (labels[known], values[known], head.unit)
    if reliable:
        draw_reliability(out / "reliability.png", reliable)
    if confusions:
        draw_confusions(out / "confusion.png", confusions)
    if scatters:
        draw_scatter(out / "regressions.png", scatters)
    draw_strata(out / "false_veto.png", report["veto"]["strata"])

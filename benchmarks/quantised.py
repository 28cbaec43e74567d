"""What the deployed network loses against the reference, head by head, and what it gains.

    python benchmarks/quantised.py SHARDS --model DIR --record quantised.json

Every frame is scored three times: by the network as described, in torch; by the compiled fast exit
with the full exit by OpenVINO in single precision; and with the full exit in 8-bit integers. The
full exit runs on every frame that is not labelled blank. Times are CPU times of one thread, the
three in turn on each frame. The shards are those of the model's validation, and neither training
nor calibration saw them. The last line of output is the record as one JSON document.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from triage.backends import open_backend
from triage.machine import machine, versions
from triage.nets.model import load_model
from triage.nets.scorer import Scorer
from triage.records import SCORE_NAMES
from triage.training.dataset import (
    data_hash,
    frames_of,
    labels_and_family,
    shard_paths,
    shards_made_with,
)
from triage.training.figures import auroc, spearman

CHUNK_FRAMES = 8

HEADS = {
    "p_blank": ("blank", "auroc", 0),
    "p_ice": ("ice", "auroc", 0),
    "p_multilattice": ("multilattice", "auroc", 0),
    "quality": ("quality", "accuracy", 0),
    "n_lattices": ("n_lattices", "accuracy", 1),
    "mosaicity_deg": ("mosaicity_deg", "spearman", 0),
    "d_vis_angstrom": ("d_vis_angstrom", "spearman", 0),
}
"""Column of the score: its label, the figure that judges it, and the lowest level."""


def main() -> None:
    """Score, compare, print, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    scorers = {
        "torch": Scorer(model, "torch"),
        "openvino": Scorer(replace(model, quantised=None), "openvino"),
        "int8": Scorer(model, "openvino"),
    }
    paths = shard_paths(arguments.shards)
    values, labels, times = scored(scorers, paths, model.card.recipe)
    threshold = model.card.thresholds["p_blank_veto"]
    vetoed = {name: found["p_blank"] >= threshold for name, found in values.items()}
    record = {
        "name": "quantised",
        "command": f"python benchmarks/quantised.py {arguments.shards}",
        "model_id": model.card.model_id,
        "threshold": threshold,
        "shards": shards_made_with(arguments.shards),
        "data_hash": data_hash(paths),
        "frames": len(labels["blank"]),
        "heads": {
            column: compared(
                {name: found[column] for name, found in values.items()},
                labels[label],
                figure,
                first,
            )
            for column, (label, figure, first) in HEADS.items()
        },
        "verdicts_changed": {
            name: int(np.sum(vetoed[name] != vetoed["torch"])) for name in ("openvino", "int8")
        },
        "cpu_ms_per_frame": {
            exit_: {name: float(np.mean(each)) * 1e3 for name, each in of_exit.items()}
            for exit_, of_exit in times.items()
        },
        "machine": machine(),
        "versions": versions(),
    }
    record["figures"] = {
        "full_int8_speedup_over_openvino": ratio(times["full"], "openvino", "int8"),
        "full_openvino_speedup_over_torch": ratio(times["full"], "torch", "openvino"),
        "fast_speedup_over_torch": ratio(times["fast"], "torch", "openvino"),
    }
    if arguments.record:
        arguments.record.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def scored(
    scorers: dict[str, Scorer], paths: list[Path], recipe: Any
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Scores by scorer and column, labels by name, CPU seconds by exit and scorer."""
    backend = open_backend("cpu", recipe)
    values: dict[str, Any] = {name: defaultdict(list) for name in scorers}
    labels: dict[str, Any] = defaultdict(list)
    times: dict[str, Any] = {"fast": defaultdict(list), "full": defaultdict(list)}
    for scorer in scorers.values():
        scorer.warm_up()
    for path in paths:
        known, _ = labels_and_family(path)
        for name, each in known.items():
            labels[name].append(each)
        frames = frames_of(path)
        for first in range(0, len(frames), CHUNK_FRAMES):
            batch = frames[first : first + CHUNK_FRAMES]
            views = backend.prepare(batch)
            rows = [i for i in range(len(batch)) if known["blank"][first + i] != 1.0]
            close_ups = backend.close_ups(batch, views, rows)
            for name, scorer in scorers.items():
                began = time.thread_time()
                scores = scorer.fast(views)
                between = time.thread_time()
                times["fast"][name].append((between - began) / len(batch))
                if rows:
                    scores = scorer.full(views, close_ups, rows, scores)
                    times["full"][name].append((time.thread_time() - between) / len(rows))
                for column in SCORE_NAMES:
                    values[name][column] += [getattr(score, column) for score in scores]
    return (
        {name: {c: np.array(v) for c, v in found.items()} for name, found in values.items()},
        {name: np.concatenate(each) for name, each in labels.items()},
        times,
    )


def compared(of: dict[str, Any], labels: Any, figure: str, first: int) -> dict[str, Any]:
    """The head's figure by each scorer, its change, and how far the values part."""
    asked = np.isfinite(labels) & np.isfinite(of["torch"])
    if figure == "accuracy":
        # A level that the head does not have, such as no lattice at all, is not asked of it.
        asked &= np.rint(labels) >= first
    found: dict[str, Any] = {"frames": int(asked.sum()), "figure": figure}
    for name, values in of.items():
        x, truth = values[asked], labels[asked]
        if figure == "auroc":
            found[name] = auroc(x, truth > 0.5)
        elif figure == "spearman":
            found[name] = spearman(x, truth)
        else:
            found[name] = float(np.mean(np.rint(x) == np.rint(truth)))
    for name in of:
        if name != "torch":
            apart = np.abs(of[name] - of["torch"])
            found[f"{name}_change"] = found[name] - found["torch"]
            found[f"{name}_largest_difference"] = float(np.nanmax(apart))
            found[f"{name}_mean_difference"] = float(np.nanmean(apart))
            found[f"{name}_frames_apart_by_1e-3"] = int(np.sum(apart > 1e-3))
    return found


def ratio(times: dict[str, list[float]], slow: str, quick: str) -> float:
    """Median over the batches, which each had all scorers in turn."""
    return float(np.median(np.array(times[slow]) / np.array(times[quick])))


if __name__ == "__main__":
    main()

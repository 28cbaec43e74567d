"""What a frame's list of spots would be worth if it were better, on labelled shards.

    python benchmarks/spot_lists.py shards/test --record benchmarks/records/spot_lists.json

The same boosted trees read the same numbers of three lists of each frame, and answer for frames of
shards they did not learn from: the list as it is found, what a model's judge leaves of it, and what
would be left of it if one knew where the crystal's reflections lie. What the last has over the
second is lost to spots that are none of the crystal's and look as if they were; what it lacks
itself is lost to reflections that are not found, and to errors of what is measured of a spot.

How much that is, a fourth list says: every reflection that is told of, seen or not, its signal to
noise measured with the error that counting photons leaves, which is one. Of that list trees read
only how many reflections lie above each of :data:`STEPS`. What is wrong then the picture does not
say; what is right then and wrong before is there to be had. The same is asked of ice, whose
strongest feature is taken as measured with errors of one to three times that.
"""

from __future__ import annotations

import argparse
import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier

from simulators.diffraction.truth import BOUNDS
from triage.backends import open_backend
from triage.binomial import clopper_pearson
from triage.machine import machine, versions
from triage.nets.lattices import lattice_features
from triage.nets.model import load_model
from triage.nets.spot_judge import SpotJudge, crystal_and_rest
from triage.nets.spot_marks import spot_marks
from triage.nets.spot_shapes import shape_features
from triage.records import Recipe, Spot
from triage.training.dataset import (
    by_shard,
    frames_of,
    frames_with_reflections,
    labels_and_family,
    reflections_of,
    shard_paths,
    shards_made_with,
)
from triage.training.figures import auroc, auroc_interval, balanced_accuracy
from triage.training.judging import lies_on_a_reflection

LISTS = ("found", "judged", "told", "measured")
STEPS = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 7.0, 8.0, 10.0, 15.0, 20.0, 40.0)
"""Signals to noise above which measured reflections are counted."""
ICE_ERRORS = (1.0, 2.0, 3.0)
"""Of the measured strength of ice, in units of its noise."""
FOLDS = 4
AT_ONCE = 8
VISIBLE = ((10, 30), (31, 100), (101, 1000), (1001, 10**9))
_VALID, _MATCHED = int(Spot.VALID), int(Spot.MATCHED)
_Row = tuple[list[NDArray[np.float32]], dict[str, float]]


def main() -> None:
    """Read, learn, answer, print, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--most-shards", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    paths = [path for path in shard_paths(arguments.shards) if frames_with_reflections(path)]
    paths = paths[: arguments.most_shards]
    if len(paths) < FOLDS:
        parser.error(f"{len(paths)} shards that tell reflections; expected at least {FOLDS}")
    job = functools.partial(rows_of, judge=model.net.judge.fixed())
    found = list(by_shard(job, paths, arguments.threads))
    fold = np.repeat(np.arange(len(found)) % FOLDS, [len(rows) for rows in found])
    rows = [row for of_shard in found for row in of_shard]
    known = {name: np.array([said[name] for _, said in rows]) for name in rows[0][1]}
    figures: dict[str, Any] = {"spots": spots_told_apart(known)}
    for place, name in enumerate(LISTS):
        numbers = np.stack([lists[place] for lists, _ in rows])
        figures[name] = figures_of(numbers, known, fold)
        if name != "measured":
            figures[name] |= several_of(numbers, known, fold)
        print(name, json.dumps(figures[name]))
    figures["ice_measured"] = ice_measured(known)
    record = {
        "name": "spot_lists",
        "command": f"python benchmarks/spot_lists.py {arguments.shards} "
        f"--most-shards {arguments.most_shards}",
        "model_id": model.card.model_id,
        "shards": shards_made_with(arguments.shards),
        "frames": len(rows),
        "figures": figures,
        "machine": machine(),
        "versions": versions(),
    }
    if arguments.record:
        arguments.record.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def rows_of(number: int, path: Path, *, judge: SpotJudge) -> list[_Row]:
    """Of each frame of a shard the numbers of its four lists, and what is known of it."""
    rng = np.random.default_rng(number)
    backend = open_backend("cpu", replace(Recipe(), tiles=0))
    frames, reflections = frames_of(path), reflections_of(path) or []
    labels, family = labels_and_family(path)
    rows = []
    for first in range(0, len(frames), AT_ONCE):
        batch = frames[first : first + AT_ONCE]
        close_ups = backend.close_ups(batch, backend.prepare(batch), range(len(batch)))
        for i, spots in enumerate(close_ups.spots):
            place = close_ups.geometry[i], batch[i].shape
            own = lies_on_a_reflection(spots, reflections[first + i])
            odds = judge.log_odds(spot_marks(spots, *place))
            listed = (
                spots,
                crystal_and_rest(spots, odds)[0],
                crystal_and_rest(spots, np.where(own, 1.0, -1.0))[0],
            )
            numbers = [
                np.concatenate([lattice_features(each, *place), shape_features(each, *place)])
                for each in listed
            ]
            snr = reflections[first + i][:, 3]
            numbers.append(counted(snr + rng.standard_normal(len(snr))))
            there = spots[:, _VALID] != 0
            said = {name: float(values[first + i]) for name, values in labels.items()}
            said |= {
                "ccd": float(family == "ccd"),
                "listed": float(there.sum()),
                "own": float(own[there].sum()),
                "by_judge": told_apart(odds[there], own[there]),
                "by_sigma": told_apart(spots[there, _MATCHED], own[there]),
            }
            rows.append((numbers, said))
    return rows


def counted(snr: NDArray[np.float64]) -> NDArray[np.float32]:
    """(len(STEPS),) logarithms of how many reflections lie above each of them."""
    above = (snr[:, None] > np.array(STEPS)).sum(0)
    return np.asarray(np.log1p(above), np.float32)


def told_apart(scores: NDArray[np.float32], own: NDArray[np.bool_]) -> float:
    """AUROC within one frame; NaN where its spots are all of one kind."""
    return auroc(scores.astype(np.float64), own) if own.any() and not own.all() else float("nan")


def spots_told_apart(known: dict[str, NDArray[np.float64]]) -> dict[str, Any]:
    """How many spots of a hit's list are its crystal's, and how well they are told from others."""
    hits = known["blank"] == 0.0
    return {
        "hits": int(hits.sum()),
        "listed_median": float(np.median(known["listed"][hits])),
        "own_share": float(known["own"][hits].sum() / known["listed"][hits].sum()),
        **{
            f"auroc_in_a_frame_{by}_median{suffix}": float(np.nanmedian(known[by][some]))
            for by in ("by_judge", "by_sigma")
            for suffix, some in (("", hits), ("_ccd", hits & (known["ccd"] == 1.0)))
        },
    }


def figures_of(
    numbers: NDArray[np.float32], known: dict[str, NDArray[np.float64]], fold: NDArray[np.int64]
) -> dict[str, Any]:
    """How well hits are graded, and told from blanks, from one kind of list."""
    blank = known["blank"]
    clear = (blank == 0.0) & (known["quality_margin"] == 0.0)
    grades = np.where(clear, known["quality"], np.nan)
    graded = np.isfinite(grades)
    called = np.unique(grades[graded])[answered(numbers, grades, fold)[graded].argmax(1)]
    p_blank, told = answered(numbers, blank, fold)[:, 1], np.isfinite(blank)
    weak = told & ((blank == 1.0) | (known["n_visible"] <= VISIBLE[0][1]))
    right = called == grades[graded]
    return {
        "quality_of_hits_accuracy": float(right.mean()),
        "quality_of_hits_accuracy_interval_95": list(clopper_pearson(int(right.sum()), right.size)),
        "blank_auroc": auroc(p_blank[told], blank[told] == 1.0),
        "blank_auroc_weak_hits": auroc(p_blank[weak], blank[weak] == 1.0),
    }


def several_of(
    numbers: NDArray[np.float32], known: dict[str, NDArray[np.float64]], fold: NDArray[np.int64]
) -> dict[str, Any]:
    """How well several lattices are told from one."""
    several, visible = known["multilattice"], known["n_visible"]
    p = answered(numbers, several, fold)[:, 1]
    defined = np.isfinite(several)
    return {
        "multilattice_auroc": auroc(p[defined], several[defined] == 1.0),
        "multilattice_auroc_interval_95": auroc_interval(p[defined], several[defined] == 1.0),
        "multilattice_auroc_by_visible": {
            f"{low}..{high}": auroc(p[some], several[some] == 1.0)
            for low, high in VISIBLE
            for some in [defined & (visible >= low) & (visible <= high)]
        },
    }


def ice_measured(known: dict[str, NDArray[np.float64]]) -> dict[str, dict[str, float]]:
    """How well ice is told by its strength, measured with each error and called at its bound."""
    ice = known["ice"]
    told = np.isfinite(ice)
    present, strength = ice[told] == 1.0, known["ice_snr"][told]
    noise = np.random.default_rng(0).standard_normal(strength.size)
    figures = {}
    for error in ICE_ERRORS:
        measured = strength + error * noise
        called = measured >= BOUNDS["ice"]["snr"]
        figures[f"{error:g}"] = {
            "auroc": auroc(measured, present),
            "balanced_accuracy": balanced_accuracy(called, present),
        }
    return figures


def answered(
    numbers: NDArray[np.float32], labels: NDArray[np.float64], fold: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(n, classes) probabilities of each frame, by trees that learned from the other folds."""
    defined = np.isfinite(labels)
    out = np.full((len(labels), len(np.unique(labels[defined]))), np.nan)
    for each in range(FOLDS):
        trees = HistGradientBoostingClassifier(max_iter=150, learning_rate=0.07, random_state=0)
        learned, asked = defined & (fold != each), fold == each
        trees.fit(numbers[learned], labels[learned])
        out[asked] = trees.predict_proba(numbers[asked])
    return out


if __name__ == "__main__":
    main()

"""What a model answers on labelled shards, frame by frame, the way it is served.

Frames go through backend and scorer as they do live, so an evaluation judges what runs: the
compiled fast exit, the full exit in 8-bit integers where the model has one, and what the policy
reads beside the score. Every frame gets both exits, whatever the first says.

Answers are written down by shard. A run that was interrupted goes on where it stopped, and one
that asks the same model again for the same frames is done at once.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triage import __version__
from triage.backends import Backend, open_backend
from triage.nets.model import Model
from triage.nets.scorer import Scorer
from triage.records import Frame, Scores
from triage.training.dataset import data_hash, frames_of, ice_grains_of, labels_and_family

__all__ = ["COLUMNS", "FAST_EXIT", "Answers", "answers_of", "both_exits"]

COLUMNS = {
    "blank": "p_blank",
    "ice": "p_ice",
    "bad_ice": "p_bad_ice",
    "multilattice": "p_multilattice",
    "quality": "quality",
    "n_lattices": "n_lattices",
    "mosaicity_deg": "mosaicity_deg",
    "d_vis_angstrom": "d_vis_angstrom",
}
"""Label to the score that answers it."""

FAST_EXIT = "blank by the fast exit"
"""Name of the value that is the fast exit's own p_blank, whoever has the last word."""

_AT_ONCE = 8
_SECONDS_PER_LINE = 10.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answers:
    """Answers and labels of n frames, in the order of their shards.

    Attributes:
        values: by label, (n,) float64 in the unit of the table of decisions; NaN = not scored.
        ood: (n,) unlike anything trained on, and therefore kept.
        labels: by label, (n,) float64, NaN where undefined; and ``ice_grains``, where it is known
            of how many grains the ice is.
        family: (n,) of the detector.
        shard: (n,) which of the shards it lies in, from 0.
    """

    values: dict[str, NDArray[np.float64]]
    ood: NDArray[np.bool_]
    labels: dict[str, NDArray[np.float64]]
    family: NDArray[np.str_]
    shard: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ood)

    def label(self, name: str) -> NDArray[np.float64]:
        """(n,) one label; NaN throughout where the shards do not have it."""
        return self.labels.get(name, np.full(len(self), math.nan))

    def value(self, name: str) -> NDArray[np.float64]:
        """(n,) the answer to one label; NaN throughout where the model has no such head."""
        return self.values.get(name, np.full(len(self), math.nan))

    def where(self, chosen: NDArray[np.bool_]) -> Answers:
        """Those that are chosen."""
        return Answers(
            values={name: each[chosen] for name, each in self.values.items()},
            ood=self.ood[chosen],
            labels={name: each[chosen] for name, each in self.labels.items()},
            family=self.family[chosen],
            shard=self.shard[chosen],
        )


def both_exits(
    backend: Backend, scorer: Scorer, frames: Sequence[Frame]
) -> tuple[list[Scores], list[float]]:
    """Scores of both exits, NOT_SCORED where a frame could not be prepared; and the p_blank of the
    fast exit alone."""
    views = backend.prepare(frames)
    fast = scorer.fast(views)
    rows = [i for i, error in enumerate(views.errors) if error is None]
    scores = scorer.full(views, backend.close_ups(frames, views, rows), rows, fast)
    return scores, [each.p_blank for each in fast]


def answers_of(
    model: Model,
    paths: Sequence[Path],
    kept_in: Path | None = None,
    *,
    threads: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> Answers:
    """Answers of a model to every frame of the shards.

    Args:
        kept_in: folder of what was answered before, by model and shard; what is new is added.
            None keeps nothing.
        threads: shards at a time; the answers do not depend on it.
        say: told how far it is.
    """
    if kept_in is not None:
        kept_in.mkdir(parents=True, exist_ok=True)
    first = Scorer(model)
    first.warm_up()
    own = threading.local()
    done, began, told = 0, time.monotonic(), time.monotonic()
    heads = {head.name for head in model.card.heads}

    def scored(path: Path) -> dict[str, NDArray[Any]]:
        if not hasattr(own, "scorer"):
            own.scorer = first.clone()
            own.backend = open_backend("cpu", model.card.recipe)
        frames = frames_of(path)
        scores: list[Scores] = []
        fast: list[float] = []
        for start in range(0, len(frames), _AT_ONCE):
            some = both_exits(own.backend, own.scorer, frames[start : start + _AT_ONCE])
            scores += some[0]
            fast += some[1]
        ood = np.array([each.ood for each in scores], np.bool_)
        return {"ood": ood, FAST_EXIT: np.array(fast, np.float64)} | {
            name: np.array([getattr(each, column) for each in scores], np.float64)
            for name, column in COLUMNS.items()
            if name in heads
        }

    def of(path: Path) -> Answers:
        file = None if kept_in is None else kept_in / f"{_key(model, first.runtime, path)}.npz"
        if file is not None and file.exists():
            with np.load(file) as kept:
                values = {name: kept[name] for name in kept.files}
        else:
            values = scored(path)
            if file is not None:
                part = file.with_suffix(".part.npz")
                np.savez(part, allow_pickle=False, **values)
                part.replace(file)
        labels, family = labels_and_family(path)
        grains = ice_grains_of(path)
        if grains is not None:
            labels["ice_grains"] = grains
        ood = values.pop("ood")
        return Answers(
            values=values,
            ood=ood,
            labels=labels,
            family=np.full(len(ood), family),
            shard=np.zeros(len(ood), np.int64),
        )

    parts: list[Answers] = []
    with ThreadPoolExecutor(threads) as pool:
        for part in pool.map(of, paths):
            parts.append(part)
            done += len(part)
            now = time.monotonic()
            if now - told > _SECONDS_PER_LINE or len(parts) == len(paths):
                told, left = now, (now - began) * (len(paths) / len(parts) - 1.0)
                say(
                    f"{len(parts)} of {len(paths)} shards, {done} frames, "
                    f"{done / max(now - began, 1e-3):.0f} a second, {left / 60:.0f} min left"
                )
    names = sorted({name for part in parts for name in part.labels})
    return Answers(
        values={name: np.concatenate([p.value(name) for p in parts]) for name in parts[0].values},
        ood=np.concatenate([p.ood for p in parts]),
        labels={name: np.concatenate([p.label(name) for p in parts]) for name in names},
        family=np.concatenate([p.family for p in parts]),
        shard=np.repeat(np.arange(len(parts)), [len(p) for p in parts]),
    )


def _key(model: Model, runtime: str, path: Path) -> str:
    """Names what was asked of whom: a changed shard or model has no answers yet."""
    card, quantised = model.card, model.quantised
    digest = hashlib.sha256(
        f"{__version__} {card.weights_sha256} {card.heads} {card.calibration} "
        f"{card.beside_weights} "
        f"{card.p_blank_sure} {runtime} {data_hash([path])}".encode()
    )
    if quantised is not None:
        digest.update(quantised.graph + quantised.weights)
    return digest.hexdigest()[:16]

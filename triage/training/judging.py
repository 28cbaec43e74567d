"""Learns which spots of a list are a crystal's, from frames whose reflections are known.

Every listed spot of a simulated frame either lies on a reflection of its crystal or is something
else. A thousand frames hold two hundred thousand such answers, where they hold a thousand to what
is asked of a frame; so this is learned first, and by itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numba as nb
import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from torch import Tensor, nn

from triage.backends import open_backend
from triage.nets.spot_marks import spot_marks
from triage.nets.triagenet import JudgeLayers
from triage.records import Recipe, Spot
from triage.training.dataset import (
    by_shard,
    frames_of,
    frames_with_reflections,
    reflections_of,
    without_geometry,
)
from triage.training.figures import auroc

__all__ = ["learn_judge", "lies_on_a_reflection"]

_MOST_FRAMES = 24000
"""They hold four million spots."""
_APART = 10
"""Every tenth of the shards says how good the judge is; of fewer the last."""
_UNPLACED_SHARE = 0.25
"""Share of the frames that are shown without their geometry."""
_LEAST_REACH_PX, _REACH_SIGMA = 2.0, 1.2
"""So near to a reflection a spot is that reflection."""
_AT_ONCE = 8
_BATCH = 24
"""Frames of a step."""
_EPOCHS = 12
_RATE = 4e-3
_LEAST_SPOTS = 20.0

_Y, _X, _VALID = int(Spot.Y_PX), int(Spot.X_PX), int(Spot.VALID)
_Listed = tuple[NDArray[np.float16], NDArray[np.bool_]]
"""Marks (n, len(SPOT_MARKS)) of the spots of one frame, and which of them are a crystal's (n,)."""


def learn_judge(
    layers: JudgeLayers,
    paths: Sequence[Path],
    recipe: Recipe,
    *,
    seed: int = 0,
    workers: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Learn the judge of spots from shards that hold reflections.

    A spot counts by the root of how many its frame has, so that frames with many do not rule.

    Returns:
        How well it tells the spots of frames kept apart: ``auroc``, ``spots`` and ``frames``.
        Nothing where it could not be learned, because no shard holds reflections or because there
        are not both kinds of spots; the layers are then as they were.
    """
    listed = _listed(paths, recipe, seed, workers)
    learned, apart = [[each for of in some for each in of] for some in _parted(listed)]
    if not _has_both_kinds(learned) or not _has_both_kinds(apart):
        return {}
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    for layer in layers.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    steps = max(1, len(learned) // _BATCH)
    optimizer = torch.optim.AdamW(layers.parameters(), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=_RATE, total_steps=_EPOCHS * steps + 1
    )
    for epoch in range(_EPOCHS):
        losses = []
        order = generator.permutation(len(learned))
        for step in range(steps):
            batch = [learned[i] for i in order[step * _BATCH : (step + 1) * _BATCH]]
            loss = _loss(layers, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        say(f"judge of spots epoch {epoch} loss {np.mean(losses):.4g}")
    own = np.concatenate([each for _, each in apart])
    with torch.inference_mode():
        odds = layers(*_of_frames(apart)).double().numpy()
    figures = {
        "auroc": auroc(odds, own),
        "spots": float(len(own)),
        "frames": float(len(apart)),
    }
    say("judge of spots " + " ".join(f"{name} {value:.6g}" for name, value in figures.items()))
    return figures


def lies_on_a_reflection(
    spots: NDArray[np.float32], reflections: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """(n,) which of the spots (n, len(Spot)) lie on one of the reflections (m, 4), see
    ``dataset.reflections_of``."""
    return _near(
        np.ascontiguousarray(spots[:, [_Y, _X]], np.float32),
        np.ascontiguousarray(reflections[np.argsort(reflections[:, 0], kind="stable")]),
    )


@nb.njit(cache=True, nogil=True)
def _near(places: NDArray[np.float32], ordered: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Of places (n, 2) and reflections (m, 4) by rising y."""
    found = np.zeros(len(places), np.bool_)
    widest = np.float32(0.0)
    for i in range(len(ordered)):
        widest = max(widest, ordered[i, 2])
    most = max(_LEAST_REACH_PX, _REACH_SIGMA * widest)
    for i in range(len(places)):
        y, x = places[i]
        at = np.searchsorted(ordered[:, 0], y - most)
        while at < len(ordered) and ordered[at, 0] <= y + most:
            reach = max(_LEAST_REACH_PX, _REACH_SIGMA * ordered[at, 2])
            if (ordered[at, 0] - y) ** 2 + (ordered[at, 1] - x) ** 2 < reach * reach:
                found[i] = True
                break
            at += 1
    return found


def _listed(paths: Sequence[Path], recipe: Recipe, seed: int, workers: int) -> list[list[_Listed]]:
    """The spots of the frames of shards that hold reflections, shard by shard."""
    told = {path: frames_with_reflections(path) for path in paths}
    known = [path for path in paths if told[path]]
    # All along the set, whose shards are of one detector each.
    chosen = known[:: math.ceil(sum(told.values()) / _MOST_FRAMES)] if known else []
    job = functools.partial(_listed_of, recipe=replace(recipe, tiles=0), seed=seed)
    return list(by_shard(job, chosen, workers))


def _listed_of(number: int, path: Path, *, recipe: Recipe, seed: int) -> list[_Listed]:
    """The spots of the frames of one shard."""
    generator = np.random.default_rng([seed, number])
    backend = open_backend("cpu", recipe)
    frames, reflections = frames_of(path), reflections_of(path) or []
    found = []
    for first in range(0, len(frames), _AT_ONCE):
        batch = [
            frame if generator.random() >= _UNPLACED_SHARE else without_geometry(frame)
            for frame in frames[first : first + _AT_ONCE]
        ]
        close_ups = backend.close_ups(batch, backend.prepare(batch), range(len(batch)))
        for row, frame in enumerate(batch):
            spots = close_ups.spots[row]
            there = spots[:, _VALID] != 0
            marks = spot_marks(spots, close_ups.geometry[row], frame.shape)
            own = lies_on_a_reflection(spots[there], reflections[first + row])
            found.append((marks[there].astype(np.float16), own))
    return found


def _parted(
    listed: Sequence[list[_Listed]],
) -> tuple[list[list[_Listed]], list[list[_Listed]]]:
    """The shards to learn from, and those kept apart."""
    kept = set(range(_APART - 1, len(listed), _APART)) or {len(listed) - 1}
    apart = [each for i, each in enumerate(listed) if i in kept]
    return [each for i, each in enumerate(listed) if i not in kept], apart


def _has_both_kinds(listed: Sequence[_Listed]) -> bool:
    return any(own.any() for _, own in listed) and any(not own.all() for _, own in listed)


def _of_frames(listed: Sequence[_Listed]) -> tuple[Tensor, Tensor, int]:
    """Marks of the spots of some frames, which frame each is of, and how many there are."""
    marks = torch.from_numpy(np.concatenate([m for m, _ in listed])).float()
    frame = np.repeat(np.arange(len(listed)), [len(m) for m, _ in listed])
    return marks, torch.from_numpy(frame), len(listed)


def _loss(layers: JudgeLayers, batch: Sequence[_Listed]) -> Tensor:
    own = torch.from_numpy(np.concatenate([each for _, each in batch])).float()
    weights = [np.full(len(each), max(len(each), _LEAST_SPOTS) ** -0.5) for _, each in batch]
    weight = torch.from_numpy(np.concatenate(weights)).float()
    odds = layers(*_of_frames(batch))
    losses = nnf.binary_cross_entropy_with_logits(odds, own, reduction="none")
    return (losses * weight).sum() / weight.sum().clamp(min=1e-6)

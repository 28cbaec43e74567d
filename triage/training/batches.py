"""Prepared frames in batches: what a network answers to them while it is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triage.nets.model import BLANK_BY_SPOTS
from triage.nets.scorer import head_values, joined, said_beside
from triage.nets.triagenet import Features, Head, TriageNet
from triage.records import HIT_SPOTS
from triage.training.dataset import Example, disturbed

__all__ = [
    "NO_CRYSTAL",
    "QUALITY_SPOTS",
    "QUALITY_STEPS",
    "blank_probabilities",
    "cells",
    "labels_of",
    "levels_of",
    "predict",
    "share",
    "stacked",
]

NO_CRYSTAL = 1.0
"""The quality grade of a frame of background alone."""
QUALITY_SPOTS = (
    *(HIT_SPOTS, 20, 40, 90, 200, 450, 700),
    *(1000, 1400, 2000, 2800, 4000, 5600, 8000),
)
"""Visible spots from which a hit is in the next level of quality."""
QUALITY_STEPS = (
    *(1.0, 1.0, 0.25, 0.5, 0.5, 0.5, 0.05),
    *(0.05, 0.03, 0.03, 0.03, 0.02, 0.02, 0.01, 0.01),
)
"""What the levels add to the grade: the bounds between grades lie half way between two levels."""


def cells(example: Example) -> int:
    """Numbers in its overview, by which frames of like size are found; 0 without one."""
    return 0 if example.overview is None else example.overview.size


def stacked(
    net: TriageNet, batch: Sequence[Example], rng: np.random.Generator | None
) -> tuple[Features, Tensor, Tensor]:
    """Features, tiles and spots' numbers of a batch of examples with an overview.

    Padded to its largest frame; turned and disturbed by rng.
    """
    views = [e.overview for e in batch if e.overview is not None]
    tiles = [e.tiles for e in batch if e.tiles is not None]
    if rng is not None:
        views = [_turned(disturbed(v, rng) if rng.random() < 0.3 else v, rng) for v in views]
    y, x = (max(v.shape[axis] for v in views) for axis in (1, 2))
    overview = np.zeros((len(batch), 3, y, x), np.float32)
    for i, view in enumerate(views):
        overview[i, :, : view.shape[1], : view.shape[2]] = view
    device = net.counts_mean.device
    with torch.no_grad():
        features = net.features(
            torch.from_numpy(overview).to(device),
            torch.from_numpy(np.stack([e.radial for e in batch])).to(device),
            torch.tensor([float(e.bin_factor) for e in batch], device=device),
        )
    close = torch.from_numpy(np.stack(tiles).astype(np.float32)).to(device)
    spots = torch.from_numpy(np.stack([e.spots for e in batch if e.spots is not None])).to(device)
    return features, close, spots


def _turned(view: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """One of the eight turns and mirrors of a square."""
    if rng.random() < 0.5:
        view = view[:, :, ::-1]
    return np.rot90(view, int(rng.integers(4)), (1, 2))


def predict(
    net: TriageNet, examples: Sequence[Example], *, full: bool = True
) -> dict[str, np.ndarray[Any, Any]]:
    """Raw outputs (N, head.outputs) of every head, in the order of ``examples``.

    NaN for heads of the full exit that read its convolutions where a frame has nothing for them,
    and for all of them unless ``full``.
    """
    net.eval()
    n, device = len(examples), net.counts_mean.device
    outputs = {h.name: np.full((n, h.outputs), math.nan) for h in net.heads}
    with torch.inference_mode():
        for first in range(0, n, 256):
            batch = examples[first : first + 256]
            rows = slice(first, first + len(batch))
            counts = torch.from_numpy(np.stack([e.counts[0] for e in batch])).to(device)
            counts = net.standardised(counts)
            radial = torch.from_numpy(np.stack([e.radial for e in batch])).to(device)
            planes = net.rings.planes(radial)
            candidates = torch.from_numpy(np.stack([e.candidates[0] for e in batch])).to(device)
            for name, raw in net.members(counts, candidates.float(), net.rings(planes)).items():
                outputs[name][rows] = raw.mean(1).cpu().numpy()
            if full and (net.by_spots or not net.convolutions):
                spots = torch.from_numpy(
                    np.stack([e.spots for e in batch if e.spots is not None])
                ).to(device)
                found = {}
                if not net.convolutions:
                    found = net.full_answers(counts, planes, spots, None)
                elif net.by_spots:
                    found = {BLANK_BY_SPOTS: net.blank_members(counts, spots).mean(1)}
                for name, raw in found.items():
                    outputs[name][rows] = raw.cpu().numpy()
        if full and net.convolutions:
            chosen = [i for i in range(n) if examples[i].overview is not None]
            chosen.sort(key=lambda i: cells(examples[i]))
            for first in range(0, len(chosen), 16):
                some = chosen[first : first + 16]
                for name, raw in net.full(*stacked(net, [examples[i] for i in some], None)).items():
                    outputs[name][some] = raw.cpu().numpy()
    return outputs


def labels_of(examples: Sequence[Example], name: str) -> np.ndarray[Any, Any]:
    """One label of each example (n,), NaN where undefined."""
    return np.array([e.labels.get(name, math.nan) for e in examples])


def levels_of(examples: Sequence[Example], head: Head) -> np.ndarray[Any, Any]:
    """What a head is to answer (n,), in its own levels; NaN where undefined.

    The quality grades of hits are divided further, by how many spots are visible.
    """
    labels = labels_of(examples, head.label)
    if head.label == "quality" and head.steps:
        hits = labels > NO_CRYSTAL
        visible = labels_of(examples, "n_visible")[hits]
        labels[hits] = NO_CRYSTAL + np.digitize(visible, QUALITY_SPOTS)
    return labels


def blank_probabilities(
    heads: Sequence[Head],
    outputs: Mapping[str, NDArray[np.float64]],
    calibration: Mapping[str, tuple[float, float]],
    beside_weights: Mapping[str, Sequence[float]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Calibrated p_blank (n,) of raw outputs: by the fast exit, and by the full one."""
    by_name = {head.name: head for head in heads}
    own = by_name[BLANK_BY_SPOTS]
    fast, spots = (
        head_values(by_name[name], outputs[name], calibration) for name in ("blank", own.name)
    )
    weights = beside_weights.get(own.name, ())
    if any(weights):
        others = [
            said_beside(by_name[each.head], each.step, outputs[each.head], calibration).tolist()
            for each in own.beside
        ]
        rows = zip(spots.tolist(), zip(*others, strict=True), strict=True)
        spots = np.array([joined(own, p, said, weights) for p, said in rows])
    return fast, spots


def share(yes: NDArray[np.bool_]) -> float | None:
    """Share of those that are; None of none (JSON knows no NaN)."""
    return float(yes.mean()) if yes.size else None

"""What a head learns from, and that the loop can learn at all."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from triage.nets.triagenet import TriageNet
from triage.records import Recipe
from triage.training.dataset import Example
from triage.training.train import HEADS, _fit, _step, predict


def example(seed: int, *, blank: bool, **labels: float) -> Example:
    """A 64 x 64 overview of noise; a hit has twelve cells that stand out in maximum and mean."""
    rng = np.random.default_rng(seed)
    overview = np.stack(
        [rng.normal(0.0, 0.3, (64, 64)), np.full((64, 64), 1.2), np.ones((64, 64))]
    ).astype(np.float16)
    if not blank:
        y, x = rng.integers(64, size=12), rng.integers(64, size=12)
        overview[0, y, x], overview[1, y, x] = 3.0, 2.0
    recipe = Recipe()
    return Example(
        overview=overview,
        radial=np.zeros((3, recipe.sectors, recipe.radial_bins), np.float32),
        bin_factor=4,
        tiles=np.zeros((recipe.tiles, 2, 64, 64), np.float16),
        labels={"blank": float(blank), **labels},
    )


def test_a_head_without_labels_gets_no_gradient() -> None:
    """NaN and absent labels are the same: no loss, no gradient; the head beside it learns."""
    torch.manual_seed(0)
    net = TriageNet(HEADS, radial_bins=Recipe().radial_bins)
    batch = [example(i, blank=bool(i % 2), ice=math.nan) for i in range(4)]
    loss = _step(net, batch, {}, np.random.default_rng(0))
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    for head in HEADS:
        gradient = net.outs[head.name].weight.grad
        if head.name == "blank":
            assert gradient is not None
            assert float(gradient.abs().sum()) > 0.0
        else:
            assert gradient is None


def test_one_unlabelled_frame_does_not_change_what_the_others_teach() -> None:
    """The loss over two frames is the same when a third has NaN for every label."""
    net = TriageNet(HEADS, radial_bins=Recipe().radial_bins)
    known = [example(1, blank=True), example(2, blank=False)]
    unknown = example(3, blank=False)
    unknown.labels["blank"] = math.nan
    # A generator of the same seed augments the first two frames alike in both batches.
    alone = _step(net, known, {}, np.random.default_rng(5))
    beside = _step(net, [*known, unknown], {}, np.random.default_rng(5))
    assert torch.allclose(alone, beside, rtol=1e-5)


def test_eight_frames_are_learned_by_heart(tmp_path: Path) -> None:
    """Four hits and four blanks are told apart after a few dozen steps."""
    torch.manual_seed(0)
    net = TriageNet(HEADS, radial_bins=Recipe().radial_bins)
    frames = [example(i, blank=bool(i % 2)) for i in range(8)]
    _fit(net, frames, frames, 30, 8, 3e-3, 0, tmp_path, lambda line: None)
    net.eval()
    logits = predict(net, frames)["blank"][:, 0]
    assert logits[1::2].min() > logits[0::2].max() + 2.0

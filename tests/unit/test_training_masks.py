"""What a head learns from, and that the loops can learn at all."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from triage.audit.drift import INPUTS
from triage.nets.spot_features import SPOT_FEATURES
from triage.nets.triagenet import TriageNet, evidence
from triage.records import Recipe
from triage.training.batches import predict
from triage.training.dataset import Example, disturbed
from triage.training.train import HEADS, _fit_fast, _targets, full_loss


def overview(seed: int, *, blank: bool) -> NDArray[np.float32]:
    """64 x 64 cells of noise; a hit has twelve cells that stand out in maximum and mean."""
    rng = np.random.default_rng(seed)
    view = np.stack([rng.normal(0.0, 0.3, (64, 64)), np.full((64, 64), 1.2), np.ones((64, 64))])
    if not blank:
        y, x = rng.integers(64, size=12), rng.integers(64, size=12)
        view[0, y, x], view[1, y, x] = 3.0, 2.0
    return view.astype(np.float32)


def example(seed: int, *, blank: bool, **labels: float) -> Example:
    recipe = Recipe()
    view = overview(seed, blank=blank)
    found = evidence(torch.from_numpy(view)[None], torch.tensor([4.0]))
    return Example(
        counts=found.counts.numpy(),
        candidates=found.candidates.half().numpy(),
        overview=view,
        radial=np.zeros((3, recipe.sectors, recipe.radial_bins), np.float32),
        bin_factor=4,
        tiles=np.zeros((recipe.tiles, 2, 64, 64), np.float16),
        spots=np.zeros(len(SPOT_FEATURES), np.float32),
        labels={"blank": float(blank), **labels},
        inputs=np.zeros(len(INPUTS)),
    )


def untrained() -> TriageNet:
    torch.manual_seed(0)
    return TriageNet(HEADS, radial_bins=Recipe().radial_bins)


def test_a_head_without_labels_gets_no_gradient() -> None:
    """NaN and absent labels are the same: no loss, no gradient; the head beside it learns."""
    net = untrained()
    batch = [example(i, blank=False, quality=math.nan, multilattice=i % 2) for i in range(4)]
    loss = full_loss(net, batch, {}, np.random.default_rng(0))
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    for head in HEADS:
        if head.exit != "full":
            continue
        gradient = net.outs[head.name].weight.grad
        if head.name == "multilattice":
            assert gradient is not None
            assert float(gradient.abs().sum()) > 0.0
        else:
            assert gradient is None


def test_the_full_exit_leaves_the_fast_one_alone() -> None:
    """No gradient reaches what the veto is made of."""
    net = untrained()
    batch = [example(i, blank=False, multilattice=i % 2) for i in range(4)]
    full_loss(net, batch, {}, np.random.default_rng(0)).backward()
    for parameter in [*net.panels.parameters(), *net.rings.parameters()]:
        assert parameter.grad is None


def test_one_unlabelled_frame_does_not_change_what_the_others_teach() -> None:
    """The loss over two frames is the same when a third has NaN for every label."""
    net = untrained()
    known = [example(i, blank=False, multilattice=i) for i in (0, 1)]
    unknown = example(3, blank=False)
    # A generator of the same seed augments the first two frames alike in both batches.
    alone = full_loss(net, known, {}, np.random.default_rng(5))
    beside = full_loss(net, [*known, unknown], {}, np.random.default_rng(5))
    assert torch.allclose(alone, beside, rtol=1e-5)


def test_a_few_visible_spots_count_as_a_part_of_a_hit() -> None:
    """Three of the ten that make a hit: no hit for the figures, three tenths of one to learn."""
    batch = [
        example(0, blank=True, n_visible=0.0),
        example(1, blank=False, n_visible=40.0),
        example(2, blank=False, n_visible=3.0),
        example(3, blank=False, n_visible=0.0),
    ]
    batch[2].labels["blank"] = batch[3].labels["blank"] = math.nan
    (blank,) = (head for head in HEADS if head.name == "blank")
    labels, weights = _targets(batch, blank)
    assert weights.tolist() == pytest.approx([1.0, 1.0, 0.3, 0.0])
    assert labels.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_eight_frames_are_learned_by_heart(tmp_path: Path) -> None:
    """Four hits and four blanks are told apart after a few dozen steps."""
    net = untrained()
    frames = [example(i, blank=bool(i % 2)) for i in range(8)]
    net.standardise(torch.from_numpy(np.concatenate([e.counts for e in frames])))
    _fit_fast(net, frames, frames, 30, 0, tmp_path / "fast.pt", lambda line: None)
    net.eval()
    logits = predict(net, frames, full=False)["blank"][:, 0]
    assert logits[1::2].min() > logits[0::2].max() + 2.0


def test_a_disturbed_copy_loses_a_corner_or_gains_hot_cells_and_nothing_else() -> None:
    """Twenty seeds: the original stays; at most a tenth goes dark; some cells get a maximum."""
    view = overview(1, blank=False)
    before = view.copy()
    dark, hot = 0, 0
    for seed in range(20):
        copy = disturbed(view, np.random.default_rng(seed))
        assert np.array_equal(view, before)
        lost = copy[2] == 0.0
        assert lost.mean() <= 0.1
        assert not copy[:, lost].any()
        assert np.array_equal(copy[1:, ~lost], view[1:, ~lost])
        assert (copy[0, ~lost] >= view[0, ~lost]).all()
        dark += bool(lost.any())
        hot += bool((copy[0, ~lost] > view[0, ~lost]).any())
    assert 0 < dark < 20
    assert 0 < hot < 20

"""What a head learns from, and that the loops can learn at all."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from triage.audit.drift import INPUTS
from triage.nets.model import BLANK_BY_SPOTS
from triage.nets.scorer import head_value
from triage.nets.spot_features import SPOT_FEATURES
from triage.nets.spot_marks import MARKED, SPOT_MARKS
from triage.nets.triagenet import Head, JudgeLayers, TriageNet, evidence
from triage.records import Recipe
from triage.training.batches import levels_of, predict
from triage.training.calibration import calibrated
from triage.training.dataset import Example, disturbed
from triage.training.processes import Processes
from triage.training.targets import HEADS, class_weights, drawing_shares, targets
from triage.training.train import Settings, _best_of, _Run, _veto_logit, full_loss

WIDTH = len(SPOT_FEATURES) + MARKED * len(SPOT_MARKS)


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
        radial=np.zeros((5, recipe.sectors, recipe.radial_bins), np.float32),
        bin_factor=4,
        tiles=np.zeros((recipe.tiles, 2, 64, 64), np.float16),
        spots=np.full(WIDTH, 0.0 if blank else 1.0, np.float32),
        unplaced_spots=np.full(WIDTH, 0.0 if blank else 1.0, np.float32),
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
    for head, member in itertools.product(net.full_heads, net.full_members):
        gradient = member.outs[head.name].last.weight.grad
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
    veto = (net.panels, net.rings, net.by_spots)
    for parameter in itertools.chain.from_iterable(part.parameters() for part in veto):
        assert parameter.grad is None


def test_one_unlabelled_frame_does_not_change_what_the_others_teach() -> None:
    """The loss over two frames is the same when a third has NaN for every label."""
    # What dropout leaves out depends on the size of a batch.
    net = untrained().eval()
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
    labels, weights = targets(batch, blank)
    assert weights.tolist() == pytest.approx([1.0, 1.0, 0.3, 0.0])
    assert labels.tolist() == [1.0, 0.0, 0.0, 0.0]


def head(name: str) -> Head:
    (found,) = (head for head in HEADS if head.name == name)
    return found


def test_what_cannot_be_said_of_a_frame_is_not_learned_from_it() -> None:
    """Mosaicity that cannot be measured, lattices of a blank: 0. A grade near a bound: 0.3."""
    frames = [
        example(0, blank=False, mosaicity_deg=0.2, mosaicity_measurable=1.0, quality=2.0),
        example(1, blank=False, mosaicity_deg=0.2, mosaicity_measurable=0.0, quality=3.0),
        example(2, blank=True, quality=0.0, n_lattices=0.0),
    ]
    frames[0].labels.update(n_lattices=2.0, quality_margin=0.0)
    frames[1].labels.update(n_lattices=math.nan, quality_margin=1.0)
    assert targets(frames, head("mosaicity_deg"))[1].tolist() == [1.0, 0.0, 0.0]
    assert targets(frames, head("n_lattices"))[1].tolist() == [1.0, 0.0, 0.0]
    assert targets(frames, head("quality"))[1].tolist() == pytest.approx([1.0, 0.3, 1.0])


def test_classes_weigh_alike_however_many_frames_they_have() -> None:
    """One positive of four, all drawn alike: 4 / (2 * 1) = 2 for it and 4 / (2 * 3) for others."""
    labels, weights = torch.tensor([1.0, 0, 0, 0]), torch.ones(4)
    found = class_weights(head("ice"), labels, weights, np.full(4, 0.25))
    assert found.tolist() == pytest.approx([2.0, 2 / 3, 2 / 3, 2 / 3])
    # Drawn three times as often as each other one, it is half of what is seen, and counts once.
    drawn = class_weights(head("ice"), labels, weights, np.array([0.5, 1 / 6, 1 / 6, 1 / 6]))
    assert drawn.tolist() == pytest.approx([1.0] * 4)
    # A hit is 0, and to blank by spots it is five times what else it would be.
    vetoing = class_weights(head(BLANK_BY_SPOTS), labels, weights, np.full(4, 0.25))
    assert vetoing.tolist() == pytest.approx([2.0, 10 / 3, 10 / 3, 10 / 3])


def test_rare_kinds_of_frames_are_drawn_more_often() -> None:
    """Four blanks and one strong hit: 1 / sqrt(4) each against 1; a weak hit half as much more."""
    frames = [example(i, blank=True, n_visible=0.0, ice=0.0) for i in range(4)]
    frames += [example(4, blank=False, n_visible=500.0, ice=0.0)]
    frames += [example(5, blank=False, n_visible=12.0, ice=0.0)]
    shares = drawing_shares(frames)
    assert shares.sum() == pytest.approx(1.0)
    assert shares[0] / shares[4] == pytest.approx(0.5)
    assert shares[5] / shares[4] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("grade", "visible", "level"),
    [
        (0, 0, 0), (1, 0, 1), (2, 10, 2), (2, 19, 2), (2, 20, 3), (2, 39, 3), (3, 40, 4),
        (3, 89, 4), (3, 90, 5), (3, 199, 5), (4, 200, 6), (4, 450, 7), (4, 700, 8), (4, 1000, 9),
        (4, 1399, 9), (4, 1400, 10), (4, 2000, 11), (4, 2800, 12), (4, 4000, 13), (4, 5600, 14),
        (4, 8000, 15),
    ],
)  # fmt: skip
def test_levels_of_quality_round_to_the_grade(grade: int, visible: int, level: int) -> None:
    """Grades have their bounds at 10, 40 and 200 visible spots; a level more is never less, and
    half sure of the level that begins a grade is half way between two grades."""
    frame = replace(example(0, blank=False), labels={"quality": grade, "n_visible": visible})
    assert levels_of([frame], head("quality")).tolist() == [level]
    unknown = replace(frame, labels={"quality": math.nan, "n_visible": visible})
    assert np.isnan(levels_of([unknown], head("quality"))).all()

    def value(raw: list[float]) -> float:
        return head_value(head("quality"), raw, {})

    sure = [99.0] * level + [-99.0] * (15 - level)
    assert round(value(sure)) == grade
    if level:
        half = [99.0] * (level - 1) + [0.0] + [-99.0] * (15 - level)
        assert value(half) < value(sure) <= 4.0
        if visible in (0, 10, 40, 200):
            assert value(half) == pytest.approx(grade - 0.5)


def test_blank_by_spots_is_compared_where_it_vetoes_one_hit_in_500() -> None:
    """Two of a thousand hits, wherever the blanks lie; without a hit at even odds."""
    hits = np.random.default_rng(2).permutation(1000).astype(np.float64) - 700.0
    logits, blank = np.append(hits, [400.0] * 50), np.append(np.zeros(1000), np.ones(50))
    assert (hits > _veto_logit(logits, blank)).sum() == 2
    assert _veto_logit(logits[1000:], blank[1000:]) == 0.0


def test_the_best_epoch_is_that_of_the_smoothed_figure() -> None:
    """One lucky epoch early on is worth less than five good ones later; a NaN is none."""
    figures = [0.1, 0.9, 0.2, 0.2, 0.2, 0.5, 0.6, 0.6, 0.6, 0.6, 0.4]
    assert _best_of([{"figure": figure} for figure in figures]) == 9
    assert _best_of([{"figure": 0.3}, {"figure": math.nan}]) == 0
    assert _best_of([{"figure": math.nan}] * 3) == 2


def test_a_temperature_is_found_again() -> None:
    """Labels drawn from sigmoid(x), logits told as 3 x - 1.5: temperature 3, bias 0.5."""
    rng = np.random.default_rng(0)
    x = rng.normal(0.0, 2.0, 4000)
    frames = [example(0, blank=True)] * len(x)
    frames = [
        replace(frames[0], labels={"ice": float(rng.random() < 1 / (1 + math.exp(-v)))}) for v in x
    ]
    found, _ = calibrated([head("ice")], {"ice": (3.0 * x - 1.5)[:, None]}, frames)
    assert found["ice"][0] == pytest.approx(3.0, rel=0.1)
    assert found["ice"][1] == pytest.approx(0.5, abs=0.1)


def run(frames: list[Example], out: Path) -> _Run:
    return _Run(frames, frames, out, Processes(), lambda line: None, None, JudgeLayers())


def test_eight_frames_are_learned_by_heart(tmp_path: Path) -> None:
    """Four hits and four blanks are told apart after a few dozen steps, by either exit."""
    frames = [
        replace(
            example(i, blank=bool(i % 2), quality=2.0 * ((i + 1) % 2), n_visible=12.0), tiles=None
        )
        for i in range(8)
    ]
    settings = Settings(fast_epochs=30, epochs=40, batch_size=8)
    net, tables = run(frames, tmp_path).whole(settings)
    outputs = predict(net, frames)
    logits = outputs["blank"][:, 0]
    assert logits[1::2].min() > logits[0::2].max() + 2.0
    by_spots = outputs[BLANK_BY_SPOTS][:, 0]
    assert by_spots[1::2].min() > by_spots[0::2].max() + 2.0
    # The second of the cumulative answers asks for grade 2 or better.
    quality = outputs["quality"][:, 1]
    assert quality[0::2].min() > quality[1::2].max() + 2.0
    assert tables["history"][-1]["figure"] > 0.9


def test_what_the_full_exit_learns_does_not_change_the_veto(tmp_path: Path) -> None:
    """The fast exit's answers are the same bits before and behind the full exit's training."""
    frames = [example(i, blank=bool(i % 2), quality=float(i % 3)) for i in range(8)]
    whole = run(frames, tmp_path)
    settings = Settings(fast_epochs=2, epochs=3, batch_size=8)
    net = whole._begun(settings)
    whole._fast(net, settings, None)
    before = predict(net, frames, full=False)["blank"].copy()
    whole._full(net, settings, None)
    assert np.array_equal(predict(net, frames, full=False)["blank"], before)


def test_the_full_exit_is_shown_some_frames_as_if_their_geometry_were_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those have the other list of spots and no rings, all others their own list and their rings;
    of 480 draws at one in eight between 30 and 90 are such, which is four sigma either way."""
    frames = [
        replace(
            each,
            radial=np.ones_like(each.radial),
            unplaced_spots=np.full(WIDTH, -7.0, np.float32),
        )
        for each in (example(i, blank=bool(i % 2), quality=float(i % 3)) for i in range(48))
    ]
    whole = run(frames, tmp_path)
    settings = Settings(epochs=10, batch_size=48)
    net = whole._begun(settings)
    rings = [
        net.rings.planes(torch.full((1, *frames[0].radial.shape), level))[0] for level in (0.0, 1.0)
    ]
    assert not torch.equal(*rings)
    unplaced: list[bool] = []
    members = TriageNet.members_of_full

    def seen(net: TriageNet, counts: Tensor, planes: Tensor, spots: Tensor, more: Any) -> Any:
        if net.training:
            for one, listed in zip(planes, spots, strict=True):
                without = bool((listed == -7.0).all())
                assert without or not (listed == -7.0).any()
                assert torch.equal(one, rings[0 if without else 1])
                unplaced.append(without)
        return members(net, counts, planes, spots, more)

    monkeypatch.setattr(TriageNet, "members_of_full", seen)
    whole._full(net, settings, None)
    assert len(unplaced) == 480
    assert 30 < sum(unplaced) < 90


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

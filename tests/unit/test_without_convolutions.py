"""A model whose full exit has no convolutions is served, explained and saved like any other."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from untrained import GEOMETRY, untrained_model

from triage.backends import open_backend
from triage.errors import ModelError
from triage.nets.device_scorer import DeviceScorer
from triage.nets.model import Model
from triage.nets.scorer import Scorer
from triage.nets.triagenet import COUNTS, TriageNet
from triage.records import Frame, Recipe, Scores, Series
from triage.training.explain import explain
from triage.training.quantise import quantise
from triage.training.targets import HEADS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    return untrained_model(folder, {"blank": (2.0, 0.5), "quality": (1.5, 0.1)})


def frame() -> Frame:
    made = np.random.default_rng(2).poisson(1.0, (300, 400)).astype(np.uint16)
    for i in range(8):
        made[29 + 30 * i : 32 + 30 * i, 39 + 40 * i : 42 + 40 * i] += 40
    series = Series(geometry=GEOMETRY)
    return Frame(
        series=series, image_id=0, dtype=made.dtype, shape=made.shape, payload=made.tobytes()
    )


def scores(model: Model, scorer: Scorer) -> Scores:
    backend = open_backend("cpu", model.card.recipe)
    views = backend.prepare([frame()])
    close_ups = backend.close_ups([frame()], views, [0])
    return scorer.full(views, close_ups, [0], scorer.fast(views))[0]


def test_every_runtime_gives_the_scores_of_the_reference(model: Model) -> None:
    """Torch as described, compiled, and as on a device: every column finite and the same."""
    expected = dataclasses.asdict(scores(model, Scorer(model, "torch")))
    for other in (Scorer(model, "auto"), DeviceScorer(model, "cpu")):
        found = dataclasses.asdict(scores(model, other))
        for name, value in expected.items():
            assert np.isfinite(value), name
            assert found[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name


def test_no_tiles_are_cut_that_nothing_looks_at(model: Model) -> None:
    """The card asks for none, and the spots are those that are found beside tiles."""
    seen = []
    for recipe in (model.card.recipe, Recipe()):
        backend = open_backend("cpu", recipe)
        seen.append(backend.close_ups([frame()], backend.prepare([frame()]), [0]))
    bare, full = seen
    assert (bare.tiles.shape[:2], full.tiles.shape[:2]) == ((1, 0), (1, 8))
    assert np.array_equal(bare.spots, full.spots)


def test_members_that_contradict_each_other_are_unsure(model: Model) -> None:
    """Two that are sure of blank and two of the contrary: one bit. All sure of blank: none."""
    scorer = Scorer(model, "torch")
    said = {"p_blank": 0.5}
    torn = scorer._with_doubt(said, {"members": [60, 60, -60, -60], "strangeness": [0.0]})
    sure = scorer._with_doubt(said, {"members": [60, 60, 60, 60], "strangeness": [1.5]})
    assert torn.uncertainty == pytest.approx(1.0)
    assert not torn.ood
    assert sure.uncertainty == pytest.approx(0.0, abs=1e-6)
    assert sure.ood


def test_one_frame_in_a_hundred_is_unlike_the_rest() -> None:
    """Counts of 2000 frames, normal and correlated: at a share of 0.01, twenty lie outside; a frame
    against the correlation does, though each of its counts is usual."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=(2000, 1))
    counts = torch.from_numpy(common + 0.2 * rng.normal(size=(2000, COUNTS))).float()
    net = TriageNet(HEADS, radial_bins=Recipe().radial_bins, convolutions=False)
    net.standardise(counts)
    net.bound_the_usual(counts, 0.01)
    strange = net.strangeness(net.standardised(counts))[:, 0] > 1.0
    assert 18 <= int(strange.sum()) <= 21
    against = torch.ones(1, COUNTS)
    against[:, ::2] = -1.0
    assert float(net.strangeness(net.standardised(against))) > 1.0
    assert float(net.strangeness(net.standardised(torch.ones(1, COUNTS)))) < 1.0


def test_it_is_explained_without_attention(model: Model) -> None:
    """Nowhere to look at; the maps are those that the fast exit reads."""
    found = explain(model, open_backend("cpu", model.card.recipe), frame())
    assert found.tile_px.shape == (0, 2)
    assert not found.attention.any()
    assert list(found.feature_maps) == ["maps"]


def test_there_is_nothing_to_quantise(model: Model, tmp_path: Path) -> None:
    """Said before any frame is read."""
    with pytest.raises(ModelError, match="convolution"):
        quantise(model, tmp_path, tmp_path)

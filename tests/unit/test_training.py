"""Training learns, resumes, and its figures are right."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from simulators.diffraction import write_shards
from triage.binomial import clopper_pearson
from triage.errors import ModelError, UnreadableFile
from triage.nets.model import load_model
from triage.records import Recipe
from triage.training.dataset import data_hash, load_examples, shard_paths
from triage.training.figures import (
    auroc,
    auroc_interval,
    balanced_accuracy,
    calibration_error,
    spearman,
)
from triage.training.search import searched
from triage.training.train import Settings, train


def test_auroc_counts_ties_half() -> None:
    """Pairs by hand: (0.9, 0.1), (0.9, 0.4), (0.4, 0.1) won, (0.4, 0.4) tied = 3.5 of 4."""
    scores = np.array([0.1, 0.4, 0.4, 0.9])
    assert auroc(scores, np.array([False, False, True, True])) == 3.5 / 4
    assert math.isnan(auroc(scores, np.zeros(4, bool)))


def test_the_interval_of_auroc_is_that_of_all_pairs() -> None:
    """DeLong's variance from the matrix of wins, one pair at a time; some scores are tied."""
    rng = np.random.default_rng(1)
    positive = rng.random(60) < 0.4
    scores = np.round(rng.normal(positive * 1.0, 1.0), 1)
    up, down = scores[positive], scores[~positive]
    wins = [[1.0 if a > b else 0.5 if a == b else 0.0 for b in down] for a in up]
    by_up, by_down = np.mean(wins, axis=1), np.mean(wins, axis=0)
    se = math.sqrt(np.var(by_up, ddof=1) / len(up) + np.var(by_down, ddof=1) / len(down))
    low, high = auroc_interval(scores, positive)
    assert 0.5 * (low + high) == pytest.approx(auroc(scores, positive))
    assert high - low == pytest.approx(2 * 1.959964 * se)


def test_figures_by_hand() -> None:
    """Four frames each."""
    yes = np.array([True, True, False, False])
    # One of two positives and both negatives are right.
    assert balanced_accuracy(np.array([True, False, False, False]), yes) == 0.75
    # Two bins: (0.2, 0.4) stated 0.3 found 0.5; (0.6, 0.8) stated 0.7 found 0.5.
    p = np.array([0.2, 0.6, 0.4, 0.8])
    assert calibration_error(p, yes, bins=2) == pytest.approx(0.2)
    # Ranks 1 2 3 4 against 1 2 4 3: 1 - 6 * 2 / (4 * 15) = 0.8.
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([10.0, 20, 40, 30])) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # 0 of n: the upper end is 1 - 0.025 ** (1 / n). 1 of 10 and 5 of 10: published tables.
        (0, 100, 0.0, 1 - 0.025**0.01),
        (1, 10, 0.0025, 0.4450),
        (5, 10, 0.1871, 0.8129),
        (10, 10, 1 - (1 - 0.025**0.1), 1.0),
    ],
)
def test_clopper_pearson_gives_the_tabled_interval(
    successes: int, trials: int, low: float, high: float
) -> None:
    """Exact binomial 95 % intervals."""
    found = clopper_pearson(successes, trials)
    assert found[0] == pytest.approx(low, abs=6e-5)
    assert found[1] == pytest.approx(high, abs=6e-5)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, frames=20, seed=4, frames_per_shard=2, progress=False)
    return folder


def test_as_many_processes_as_one_likes_prepare_the_same_frames(shards: Path) -> None:
    """Changed copies and coarser bins are drawn by the shard, not by who prepares it."""
    paths = shard_paths(shards)[:3]
    asked = {"coarser_share": 0.5, "variants": 1, "seed": 3}
    alone = list(load_examples(paths, Recipe(), workers=1, **asked))  # type: ignore[arg-type]
    together = list(load_examples(paths, Recipe(), workers=2, **asked))  # type: ignore[arg-type]
    # As text, because no NaN equals another.
    assert [str(e.labels) for e in together] == [str(e.labels) for e in alone]
    assert len({e.counts.tobytes() for e in alone}) == 6
    for one, other in zip(alone, together, strict=True):
        for name in ("counts", "candidates", "radial", "spots", "unplaced_spots", "inputs"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_a_training_run_gives_a_model_that_loads(shards: Path, tmp_path: Path) -> None:
    """A few epochs on twenty frames: card, hash, threshold, calibration; no claim of quality."""
    said: list[str] = []
    settings = Settings(epochs=2, fast_epochs=2)
    model_id = train(shards, tmp_path, settings=settings, threads=1, say=said.append, command="c")
    card = load_model(tmp_path).card
    assert card.model_id == model_id
    assert card.training["frames"] == 20
    assert card.training["data_hash"] == data_hash(shard_paths(shards))
    assert card.training["shards"]["seed"] == 4
    assert not card.convolutions
    if importlib.util.find_spec("tensorboard"):
        assert list((tmp_path / "tensorboard" / "fast").glob("events*"))
    learned = torch.load(tmp_path / "judge.pt", weights_only=True)
    assert card.tables["judge"] == learned["figures"]
    assert learned["figures"]["spots"] > 0
    for name, array in load_model(tmp_path).net.judge.state_dict().items():
        assert torch.equal(array, learned["judge"][name])
    assert not card.validation
    assert 0.0 <= card.thresholds["p_blank_veto"] <= 1.0
    assert sum(line.startswith("fast epoch") for line in said) == 2
    assert sum(line.startswith("full epoch") for line in said) == 2
    # A finished run resumes at its end: nothing is trained again, the model is the same.
    assert train(shards, tmp_path, settings=settings, threads=1, command="c") == model_id
    # A run with other settings must not go on from its states.
    with pytest.raises(ModelError, match="another folder"):
        train(shards, tmp_path, settings=Settings(epochs=3, fast_epochs=2), threads=1)


def test_a_training_begins_with_the_weights_it_is_given(shards: Path, tmp_path: Path) -> None:
    """With convolutions, from a model without: all that both have is taken over."""
    first = Settings(epochs=1, fast_epochs=1)
    train(shards, tmp_path / "first", settings=first, threads=1)
    said: list[str] = []
    second = Settings(epochs=1, fast_epochs=1, convolution_epochs=1)
    train(
        shards,
        tmp_path / "second",
        settings=second,
        start=tmp_path / "first",
        threads=1,
        say=said.append,
    )
    (line,) = (line for line in said if line.startswith("began with"))
    taken, there = (int(word) for word in line.split() if word.isdigit())
    assert 0 < taken < there
    assert load_model(tmp_path / "second").card.convolutions


def test_a_search_chooses_nothing_worse_and_goes_on(tmp_path: Path) -> None:
    """The figure falls with the distance from a decay of 0.3: the best of six is nearer than the
    settings as they are. Asked again for six, nothing is tried any more."""
    pytest.importorskip("optuna")
    tried: list[Settings] = []

    def worth(settings: Settings) -> float:
        tried.append(settings)
        return -abs(math.log(settings.full_decay / 0.3))

    found = searched(worth, Settings(), tmp_path / "s.db", 6, lambda line: None)
    assert tried[0] == Settings()
    assert len(tried) == 6
    assert worth(found) == max(map(worth, tried[:6]))
    count = len(tried)
    assert searched(worth, Settings(), tmp_path / "s.db", 6, lambda line: None) == found
    assert len(tried) == count


def test_too_few_shards_are_refused(tmp_path: Path) -> None:
    """Without a part kept apart there is no threshold."""
    with pytest.raises(UnreadableFile, match="triage-sim frames"):
        train(tmp_path, tmp_path / "m")
    write_shards(tmp_path, frames=2, seed=1, frames_per_shard=1, progress=False)
    with pytest.raises(ModelError, match="at least 10"):
        train(tmp_path, tmp_path / "m")

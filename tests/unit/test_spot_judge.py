"""Which spots are a crystal's: what lies on a reflection, what is learned, what it changes."""

from __future__ import annotations

import math
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from simulators.diffraction import write_shards
from triage.backends import open_backend
from triage.nets.lattices import LATTICE_FEATURES
from triage.nets.spot_features import SPOT_FEATURES, spot_features
from triage.nets.spot_judge import InCompany, SpotJudge, crystal_and_rest
from triage.nets.spot_marks import LOG_ODDS, MARKED, SPOT_MARKS
from triage.nets.spot_shapes import SHAPE_FEATURES, line_features
from triage.nets.triagenet import JudgeLayers
from triage.records import MOST_SPOTS, CloseUps, Recipe, Spot
from triage.training.dataset import frames_of, reflections_of
from triage.training.judging import learn_judge, lies_on_a_reflection

WHOLE = len(SPOT_FEATURES)
LATTICES, SHAPES = len(LATTICE_FEATURES), len(SHAPE_FEATURES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shards")
    # The shard that is kept apart has hits and blanks with this seed.
    write_shards(made, frames=48, seed=14, frames_per_shard=4, progress=False)
    return made


@pytest.fixture(scope="module")
def shown(folder: Path) -> CloseUps:
    """Frames with spots enough, as the full exit is given them."""
    backend = open_backend("cpu")
    frames = frames_of(folder / "shard_00000.h5") + frames_of(folder / "shard_00001.h5")
    close_ups = backend.close_ups(frames, backend.prepare(frames), range(len(frames)))
    assert max(each[:, Spot.VALID].sum() for each in close_ups.spots) > 20
    return close_ups


def one_that_reads(mark: str, weight: float, bias: float) -> SpotJudge:
    """A judge whose log odds are a straight line over one mark."""
    weights = np.zeros((1, len(SPOT_MARKS)), np.float32)
    weights[0, SPOT_MARKS.index(mark)] = weight
    return SpotJudge(weights=(weights,), biases=(np.full(1, bias, np.float32),))


def test_a_spot_lies_on_a_reflection_within_two_pixels_or_the_reflections_width() -> None:
    """Reflections at (10, 10) and (50, 50), the second of sigma 5, which reaches 6 pixels."""
    spots = np.zeros((6, len(Spot)), np.float32)
    places = [(10, 11.9), (10, 12.1), (50, 55.9), (50, 56.1), (54, 54), (10, 50)]
    spots[:, [Spot.Y_PX, Spot.X_PX]] = places
    reflections = np.array([[50, 50, 5.0, 9.0], [10, 10, 0.5, 9.0]], np.float32)
    wanted = [True, False, True, False, True, False]
    assert lies_on_a_reflection(spots, reflections).tolist() == wanted
    assert not lies_on_a_reflection(spots, reflections[:0]).any()


def test_odds_by_hand() -> None:
    """One hidden number max(0, 2 x - 1); three of it less a half are the odds, at most 6."""
    judge = SpotJudge(
        weights=(np.array([[2.0, 0.0]], np.float32), np.array([[3.0]], np.float32)),
        biases=(np.array([-1.0], np.float32), np.array([-0.5], np.float32)),
    )
    marks = np.array([[2.0, 9.0], [0.5, 9.0], [0.0, 9.0]], np.float32)
    assert judge.log_odds(marks).tolist() == [6.0, -0.5, -0.5]
    marks[0, 0] = 1.5
    assert judge.log_odds(marks)[0] == 5.5


def test_odds_in_company_by_hand() -> None:
    """One group that every spot is half of; what it is like is the half of their sum over one and
    a half, or over two for three spots and one that is none; the odds are the spot's own number,
    ten times the group's mean, and its size."""
    company = InCompany(
        groups=(np.zeros((1, 1), np.float32), np.zeros(1, np.float32)),
        own=(np.ones((1, 1), np.float32), np.zeros(1, np.float32)),
        whole=np.array([[10.0, 1.0]], np.float32),
    )
    judge = SpotJudge(
        weights=(np.array([[1.0, 0.0]], np.float32), np.ones((1, 1), np.float32)),
        biases=(np.zeros(1, np.float32), np.full(1, -2.0, np.float32)),
        company=(company,),
    )
    one = np.array([[0.3, 1.0]], np.float32)
    assert judge.log_odds(one)[0] == pytest.approx(0.3 + 10 * 0.15 / 1.5 + math.log(1.5) - 2, 1e-5)
    some = np.array([[0.3, 1.0], [0.1, 1.0], [0.0, 0.0]], np.float32)
    whole = 10 * 0.2 / 2.0 + math.log(2.0) - 2.0
    assert judge.log_odds(some)[:2].tolist() == pytest.approx([0.3 + whole, 0.1 + whole], 1e-5)


def test_the_layers_and_what_serves_them_agree() -> None:
    """Frame by frame, of frames that were judged together."""
    torch.manual_seed(3)
    layers = JudgeLayers()
    marks = torch.randn(40, len(SPOT_MARKS))
    marks[:, -1] = 1.0
    # Before it is learned every spot is a crystal's.
    assert (layers.fixed().log_odds(marks.numpy()) == 1.0).all()
    layers.last.reset_parameters()
    frame = torch.tensor([0] * 25 + [2] * 15)
    with torch.inference_mode():
        wanted = layers(marks, frame, 3).numpy()
    assert wanted.std() > 0.01
    for number in (0, 2):
        rows = (frame == number).numpy()
        found = layers.fixed().log_odds(marks.numpy()[rows])
        np.testing.assert_allclose(found, wanted[rows], atol=1e-5)
    assert np.abs(layers.fixed().log_odds(marks.numpy())[:25] - wanted[:25]).max() > 1e-4


def test_odds_do_not_depend_on_the_order_of_a_list_or_on_rows_that_are_no_spots() -> None:
    torch.manual_seed(4)
    layers = JudgeLayers()
    layers.last.reset_parameters()
    judge = layers.fixed()
    marks = np.zeros((30, len(SPOT_MARKS)), np.float32)
    marks[:20] = torch.randn(20, len(SPOT_MARKS)).numpy()
    marks[:20, -1] = 1.0
    wanted = judge.log_odds(marks[:20])
    order = np.random.default_rng(5).permutation(30)
    found = judge.log_odds(marks[order])
    np.testing.assert_allclose(found[np.argsort(order)][:20], wanted, atol=1e-5)


def test_both_parts_of_a_list_keep_its_order() -> None:
    spots = np.zeros((MOST_SPOTS, len(Spot)), np.float32)
    spots[:4, Spot.VALID], spots[:4, Spot.MATCHED] = 1.0, [9.0, 8.0, 7.0, 6.0]
    odds = np.ones(MOST_SPOTS, np.float32)
    odds[[0, 2]] = -1.0
    crystal, rest = crystal_and_rest(spots, odds)
    assert crystal.shape == rest.shape == spots.shape
    assert crystal[:, Spot.MATCHED].tolist() == [8.0, 6.0, *[0.0] * (MOST_SPOTS - 2)]
    assert rest[:, Spot.MATCHED].tolist() == [9.0, 7.0, *[0.0] * (MOST_SPOTS - 2)]


def test_lattices_and_shapes_of_a_crystal_are_those_of_the_spots_that_are_left(
    shown: CloseUps,
) -> None:
    """The shapes of all spots stay; the others are as if the surest alone had been listed, and
    what is not a crystal's is asked about the lines of ice."""
    judge = one_that_reads("sigma", 1.0, -1.0)
    found = spot_features(shown, judge)
    as_they_are = spot_features(shown)
    parts = [crystal_and_rest(each, each[:, Spot.MATCHED] - 6.0) for each in shown.spots]
    surest = CloseUps(
        tiles=shown.tiles,
        spots=np.stack([crystal for crystal, _ in parts]),
        geometry=shown.geometry,
        shape=shown.shape,
    )
    wanted = spot_features(surest)
    shapes = slice(LATTICES, LATTICES + SHAPES)
    crystal = slice(LATTICES + SHAPES, LATTICES + 2 * SHAPES)
    other = slice(LATTICES + 2 * SHAPES, WHOLE)
    np.testing.assert_array_equal(found[:, :LATTICES], wanted[:, :LATTICES])
    np.testing.assert_array_equal(found[:, crystal], wanted[:, crystal])
    np.testing.assert_array_equal(found[:, shapes], as_they_are[:, shapes])
    assert (found[:, crystal] != as_they_are[:, crystal]).any()
    rests = [rest for _, rest in parts]
    for part, lists in ((found, rests), (as_they_are, [each[:0] for each in rests])):
        numbers = [line_features(*each) for each in zip(lists, shown.geometry, strict=True)]
        np.testing.assert_array_equal(part[:, other], numbers)
    assert (found[:, other] != as_they_are[:, other]).any()


def test_each_spots_odds_are_among_its_marks_and_no_spot_has_any(shown: CloseUps) -> None:
    marks = spot_features(shown, one_that_reads("sigma", 1.0, 0.25))[:, WHOLE:]
    marks = marks.reshape(-1, MARKED, len(SPOT_MARKS))
    there = marks[:, :, -1] > 0
    assert there.any()
    assert not there.all()
    sigma = marks[:, :, SPOT_MARKS.index("sigma")]
    assert np.abs(sigma).max() <= 4.0
    np.testing.assert_allclose(marks[there][:, LOG_ODDS], sigma[there] + 0.25, atol=1e-6)
    assert not marks[~there].any()
    none = spot_features(shown)[:, WHOLE:].reshape(marks.shape)
    assert not none[:, :, LOG_ODDS].any()


def test_odds_that_are_no_number_leave_the_frame_with_numbers(shown: CloseUps) -> None:
    assert np.isfinite(spot_features(shown, one_that_reads("sigma", math.inf, 0.0))).all()
    assert np.isfinite(spot_features(shown, one_that_reads("sigma", math.nan, 0.0))).all()


def test_what_is_learned_tells_reflections_from_the_rest(folder: Path) -> None:
    """Better than how sure a spot is, and the same from the same seed, whoever reads the shards:
    on one thread, since two add up in no fixed order."""
    torch.set_num_threads(1)
    paths = sorted(folder.glob("shard_*.h5"))
    once, again = JudgeLayers(), JudgeLayers()
    figures = learn_judge(once, paths, Recipe(), seed=5)
    assert learn_judge(again, paths, Recipe(), seed=5, workers=2) == figures
    for one, other in zip(once.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert figures["frames"] == 4.0
    assert figures["auroc"] > 0.75


def test_without_reflections_every_spot_stays_a_crystals(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "shard_00000.h5"
    path.write_bytes((folder / "shard_00000.h5").read_bytes())
    with h5py.File(path, "r+") as shard:
        del shard["reflections"]
    assert reflections_of(path) is None
    layers = JudgeLayers()
    assert learn_judge(layers, [path], Recipe()) == {}
    assert (layers.fixed().log_odds(np.ones((3, len(SPOT_MARKS)), np.float32)) == 1.0).all()

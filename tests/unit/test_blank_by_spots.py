"""Blank is said by the fast exit where it is sure, and by the full exit elsewhere."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from untrained import GEOMETRY, untrained_model

from simulators.diffraction import write_shards
from triage.backends import open_backend
from triage.errors import ModelError
from triage.nets.device_scorer import DeviceScorer
from triage.nets.model import BLANK_BY_SPOTS, Card, Model, load_model, save_model
from triage.nets.scorer import Scorer, joined, said_beside
from triage.nets.spot_features import SPOT_FEATURES, spot_features
from triage.nets.triagenet import Beside, Head, TriageNet
from triage.records import Frame, Recipe, Scores, Series
from triage.training.calibration import calibrated
from triage.training.dataset import shard_paths
from triage.training.explain import explain
from triage.training.figures import exit_thresholds, veto_threshold
from triage.training.targets import HEADS
from triage.training.train import Settings, train

WITHOUT_TILES = replace(Recipe(), tiles=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return untrained_model(
        tmp_path_factory.mktemp("model"),
        {"blank": (2.0, 0.5), BLANK_BY_SPOTS: (1.5, 0.25), "quality": (0.8, -0.1)},
        beside_weights={BLANK_BY_SPOTS: (0.5, 0.125), "ice_by_spots": (0.25,)},
    )


def with_sure(model: Model, sure: float) -> Model:
    thresholds = {"p_blank_veto": 0.5, "p_blank_sure": sure}
    return replace(model, card=replace(model.card, thresholds=thresholds))


def frames() -> list[Frame]:
    rng = np.random.default_rng(2)
    made = []
    for spots in range(4):
        image = rng.poisson(1.0, (300, 400)).astype(np.uint16)
        for i in range(3 * spots):
            image[29 + 28 * i : 32 + 28 * i, 39 + 40 * i : 42 + 40 * i] += 40
        made.append(
            Frame(
                series=Series(geometry=GEOMETRY),
                image_id=spots,
                dtype=image.dtype,
                shape=image.shape,
                payload=image.tobytes(),
            )
        )
    return made


def both(scorer: Scorer, batch: list[Frame]) -> tuple[list[Scores], list[Scores]]:
    backend = open_backend("cpu", WITHOUT_TILES)
    views = backend.prepare(batch)
    rows = range(len(batch))
    fast = scorer.fast(views)
    return fast, scorer.full(views, backend.close_ups(batch, views, rows), rows, fast)


def test_where_the_fast_exit_is_sure_its_word_stands(model: Model) -> None:
    """Sure from the middle one on: those below are provisional and then the full exit's; the
    others keep theirs to the bit, and with a bound above all of them every one is the full's."""
    batch = frames()
    alone, by_spots = both(Scorer(with_sure(model, math.inf)), batch)
    assert all(score.provisional for score in alone)
    assert not any(score.provisional for score in by_spots)
    said = [score.p_blank for score in alone]
    sure = sorted(said)[2]
    fast, final = both(Scorer(with_sure(model, sure)), batch)
    for i, p in enumerate(said):
        assert fast[i].p_blank == p
        assert fast[i].provisional == (p < sure)
        assert final[i].p_blank == (p if p >= sure else by_spots[i].p_blank)
        assert final[i].p_ice == (alone[i].p_ice if p >= sure else by_spots[i].p_ice)
        assert final[i].p_bad_ice == (alone[i].p_bad_ice if p >= sure else by_spots[i].p_bad_ice)
        assert not final[i].provisional
        assert final[i].mosaicity_deg >= 0.0
    for name in ("p_blank", "p_ice", "p_bad_ice"):
        assert any(getattr(f, name) != getattr(a, name) for f, a in zip(final, alone, strict=True))


def test_every_runtime_says_the_same(model: Model) -> None:
    """Torch as described, compiled, and as on a device: p_blank by spots and its uncertainty."""
    _, expected = both(Scorer(model, "torch"), frames())
    for other in (Scorer(model, "auto"), DeviceScorer(model, "cpu")):
        _, found = both(other, frames())
        for a, b in zip(expected, found, strict=True):
            assert b.p_blank == pytest.approx(a.p_blank, abs=2e-4)
            assert b.uncertainty == pytest.approx(a.uncertainty, abs=2e-3)
            assert not b.provisional


def test_the_card_joins_what_answers_stand_beside_each_other(model: Model) -> None:
    """Logit of blank by spots over 1.5 plus 0.25, less half the calibrated logit of more than no
    crystal, plus an eighth of the fast exit's: computed here from what the network puts out."""
    batch = frames()[:1]
    fast, final = both(Scorer(model, "torch"), batch)
    plain = {**model.card.calibration, BLANK_BY_SPOTS: (1.0, 0.0)}
    card = replace(model.card, calibration=plain, beside_weights={})
    _, bare = both(Scorer(replace(model, card=card), "torch"), batch)
    raw = math.log(bare[0].p_blank / (1.0 - bare[0].p_blank))
    # Levels are told by cumulative answers; the second parts no crystal from some.
    backend = open_backend("cpu", WITHOUT_TILES)
    views = backend.prepare(batch)
    close_ups = backend.close_ups(batch, views, [0])
    with torch.inference_mode():
        answers = model.net.full(
            model.net.features(
                torch.from_numpy(views.overview),
                torch.from_numpy(views.radial),
                torch.from_numpy(views.bin_factor.astype(np.float32)),
            ),
            torch.from_numpy(close_ups.tiles),
            torch.from_numpy(spot_features(close_ups, model.net.judge.fixed())),
        )
    beside = float(answers["quality"][0, 1]) / 0.8 - 0.1
    of_fast = math.log(fast[0].p_blank / (1.0 - fast[0].p_blank))
    logit = raw / 1.5 + 0.25 - 0.5 * beside + 0.125 * of_fast
    expected = 1.0 / (1.0 + math.exp(-logit))
    assert final[0].p_blank == pytest.approx(expected, rel=1e-4)
    assert abs(final[0].p_blank - bare[0].p_blank) > 1e-3
    # Ice has a quarter of it beside its own; bad ice has none.
    of_fast, of_full = (math.log(p / (1.0 - p)) for p in (fast[0].p_ice, bare[0].p_ice))
    expected = 1.0 / (1.0 + math.exp(-of_full - 0.25 * of_fast))
    assert final[0].p_ice == pytest.approx(expected, rel=1e-9)
    assert final[0].p_ice != bare[0].p_ice
    assert final[0].p_bad_ice == bare[0].p_bad_ice != fast[0].p_bad_ice


def test_a_full_exit_that_gives_nan_leaves_no_score(model: Model) -> None:
    """Fail open: the fast exit's word does not stand in for it."""
    broken = TriageNet(HEADS, radial_bins=Recipe().radial_bins, convolutions=False).eval()
    broken.load_state_dict(model.net.state_dict())
    for parameter in broken.by_spots.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    _, final = both(Scorer(replace(model, net=broken), "torch"), frames())
    assert all(math.isnan(score.p_blank) for score in final)


def test_a_card_without_the_head_leaves_blank_to_the_fast_exit(tmp_path: Path) -> None:
    """No score is provisional, and the full exit changes no p_blank."""
    torch.manual_seed(1)
    heads = [head for head in HEADS if head.name != BLANK_BY_SPOTS]
    net = TriageNet(heads, radial_bins=Recipe().radial_bins, convolutions=False).eval()
    save_model(tmp_path, net, "test", {"recipe": Recipe(), "thresholds": {"p_blank_veto": 0.5}})
    fast, final = both(Scorer(load_model(tmp_path)), frames())
    assert not any(score.provisional for score in fast)
    assert [score.p_blank for score in final] == [score.p_blank for score in fast]


def test_an_explanation_says_who_decided(model: Model) -> None:
    """By the bound of the card."""
    backend, frame = open_backend("cpu", WITHOUT_TILES), frames()[0]
    by_spots = explain(with_sure(model, 2.0), backend, frame)
    assert "so the full exit decided" in by_spots.as_text()
    assert by_spots.scores.p_blank != by_spots.p_blank_of_fast_exit
    fast = explain(with_sure(model, 0.0), backend, frame)
    assert "decided" not in fast.as_text()
    assert fast.scores.p_blank == fast.p_blank_of_fast_exit


def test_the_weights_of_logits_add_up() -> None:
    """Odds of 1 and of 4 to the power of a half: 2, so two thirds; NaN stays NaN. What stands
    beside is no surer than e to the power of 5 to one, either way, and blank by itself, where it is
    asked beside others, than e to the power of 3."""
    ice, blank = (Head(name=name, kind="binary", exit="full") for name in ("ice", "blank"))
    assert joined(ice, 0.5, [math.log(4.0)], [0.5]) == pytest.approx(2.0 / 3.0)
    assert joined(ice, 0.5, [1.0, math.log(4.0)], [0.0, 0.5]) == pytest.approx(2.0 / 3.0)
    assert joined(blank, 0.999, [2.0], [0.0]) == 0.999
    for p, other in ((math.nan, 1.0), (0.5, math.nan)):
        assert math.isnan(joined(blank, p, [other], [0.5]))
        assert math.isnan(joined(ice, p, [other], [0.5]))
    for said, weight, logit in ((30.0, 1.0, 5.0), (-30.0, 2.0, -10.0)):
        p = 1.0 / (1.0 + math.exp(-logit))
        assert joined(ice, 0.5, [said], [weight]) == pytest.approx(p)
    p = 1.0 / (1.0 + math.exp(-3.0 + 0.5))
    assert joined(blank, 1.0 - 1e-9, [-1.0], [0.5]) == pytest.approx(p)
    assert joined(blank, 1e-9, [-1.0], [0.5]) == pytest.approx(6e-10, rel=0.02)


def test_what_is_said_beside_is_that_a_level_is_not_passed() -> None:
    """Of a row, and of many: the logit over the temperature and with the bias, its sign turned
    where it says that a level lies higher."""
    blank = Head(name="blank", kind="binary", exit="fast")
    quality = Head(name="quality", kind="ordinal", exit="full", levels=3)
    told = {"blank": (2.0, 0.25), "quality": (0.5, -1.0)}
    assert said_beside(blank, 0, [1.0], told) == 0.75
    assert said_beside(quality, 1, [7.0, 1.0], told) == -1.0
    rows = np.array([[7.0, 1.0], [0.0, -20.0], [0.0, math.nan]])
    np.testing.assert_array_equal(said_beside(quality, 1, rows, told), [-1.0, 5.0, math.nan])


def test_no_reader_drops_a_frame_alone() -> None:
    """However sure blank by spots is, and the fast exit, of the included model: where another says
    nothing or the contrary, the frame is kept."""
    card = load_model().card
    head = next(head for head in card.heads if head.name == BLANK_BY_SPOTS)
    weights = card.beside_weights[head.name]
    for others in ([0.0, 0.0], [-9.0, -9.0], [-9.0, 9.0], [0.0, -9.0]):
        assert joined(head, 1.0 - 1e-9, others, weights) < card.thresholds["p_blank_veto"]
    assert joined(head, 1e-3, [9.0, 9.0], weights) < card.thresholds["p_blank_veto"]


def test_the_fast_exit_is_sure_above_every_hit_and_the_goal_is_left_to_the_full_one() -> None:
    """Of 4 hits one may go: its interval ends at 81 %. Fast: hits up to 0.8, so it is sure of the
    blank at 0.9 alone. Of the full exit's hits 0.7 is the highest and may go: the veto begins
    above the next, 0.4."""
    labels = np.array([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, np.nan])
    fast = np.array([0.8, 0.1, 0.2, 0.3, 0.9, 0.5, 0.7, 0.95])
    full = np.array([0.1, 0.7, 0.4, 0.2, 0.0, 0.6, 0.3, 0.99])
    sure, veto = exit_thresholds(fast, full, labels, 0.81)
    assert 0.8 < sure < 0.8001
    assert 0.4 < veto < 0.4001
    # Below its goal, the full exit's second hit stands above what the fast exit was sure of.
    sure, veto = exit_thresholds(fast, np.where(labels == 0.0, 0.85, full), labels, 0.81)
    assert sure == veto
    assert 0.85 < veto < 0.8501
    vetoed = np.where(fast >= sure, fast, full) >= veto
    assert not vetoed[labels == 0.0].any()
    assert sure > veto_threshold(fast, labels, 0.0)


def test_the_fast_exit_gets_a_tenth_of_the_goal() -> None:
    """Of 10,000 hits at a goal of 1 %: 3, whose interval ends at 8.8 in 10,000, where that of 4
    ends at 10.2 (Poisson's, 97.5 %)."""
    labels = np.zeros(10_000)
    fast = np.linspace(0.0, 0.999, 10_000)
    sure, _ = exit_thresholds(fast, np.zeros(10_000), labels, 0.01)
    assert (fast >= sure).sum() == 3


def test_a_weight_is_fitted_for_each_that_stands_beside() -> None:
    """Labels drawn from logit a + 0.5 b + 1, and from that plus 0.25 c: temperature 1, bias 1 and
    the weights come back, where b is another exit's logit, and where less b is the logit of a level
    that lies above. What has no labels weighs nothing. Judged where b and c count in full."""
    rng = np.random.default_rng(4)
    a, b, c = rng.normal(size=(3, 20_000)) * 2.0

    def drawn(logit: Any) -> Any:
        return rng.random(20_000) < 1.0 / (1.0 + np.exp(-logit))

    ice, blank = drawn(a + 0.5 * b + 1.0), drawn(a + 0.5 * b + 0.25 * c + 1.0)
    level = 1.0 + drawn(-b)

    class Labelled:
        def __init__(self, ice: bool, blank: bool, level: float) -> None:
            self.labels = {"ice": float(ice), "blank": float(blank), "quality": level}

    told = zip(ice.tolist(), blank.tolist(), level.tolist(), strict=True)
    examples: Any = [Labelled(*of) for of in told]
    heads = [
        *(head for head in HEADS if head.name in {"blank", "ice", BLANK_BY_SPOTS}),
        Head(
            name="ice_by_spots",
            kind="binary",
            exit="full",
            answers="ice",
            beside=(Beside("bad_ice"), Beside("ice")),
        ),
        Head(name="quality", kind="ordinal", exit="full", levels=3),
    ]
    outputs = {
        "blank": c[:, None],
        "ice": b[:, None],
        "bad_ice": b[:, None],
        "ice_by_spots": a[:, None],
        BLANK_BY_SPOTS: a[:, None],
        "quality": np.stack([np.full_like(b, 30.0), -b], 1),
    }
    found, weights = calibrated(heads, outputs, examples)
    assert weights.keys() == {BLANK_BY_SPOTS, "ice_by_spots"}

    def logit_of(name: str, raw: Any, sign: float = 1.0) -> Any:
        temperature, bias = found[name]
        return sign * (raw / temperature + bias)

    of_quality, of_fast = weights[BLANK_BY_SPOTS]
    joined = logit_of(BLANK_BY_SPOTS, a) + of_quality * logit_of("quality", -b, -1.0)
    joined += of_fast * logit_of("blank", c)
    full = (np.abs(b) < 4.0) & (np.abs(c) < 4.0)
    assert np.allclose(joined[full], (a + 0.5 * b + 0.25 * c + 1.0)[full], atol=0.5)
    of_bad_ice, of_ice = weights["ice_by_spots"]
    assert of_bad_ice == 0.0
    joined = logit_of("ice_by_spots", a) + of_ice * logit_of("ice", b)
    assert np.allclose(joined[full], (a + 0.5 * b + 1.0)[full], atol=0.3)


def test_a_card_keeps_what_joins_the_exits(tmp_path: Path, model: Model) -> None:
    """Weights and thresholds come back as they were written, and what has none with 0."""
    thresholds = {"p_blank_veto": 0.9, "p_blank_sure": 0.97}
    weights = {BLANK_BY_SPOTS: (0.25, 0.5)}
    made: dict[str, Any] = {
        "recipe": Recipe(), "thresholds": thresholds, "beside_weights": weights
    }  # fmt: skip
    save_model(tmp_path, model.net, "test", made)
    card = load_model(tmp_path).card
    assert card.p_blank_sure == 0.97
    assert card.beside_weights == weights | {"ice_by_spots": (0.0,), "bad_ice_by_spots": (0.0,)}
    bare = dataclasses.replace(card, heads=tuple(h for h in HEADS if h.name != BLANK_BY_SPOTS))
    assert isinstance(bare, Card)
    assert bare.p_blank_sure == 0.0


def of_head(card: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (head for head in card["heads"] if head["name"] == name)
    return found


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda c: c.pop("beside_weights"), "beside_weights"),
        (lambda c: c["beside_weights"].pop(BLANK_BY_SPOTS), "one for each answer beside it"),
        (lambda c: c["beside_weights"].update({BLANK_BY_SPOTS: []}), "one for each"),
        (lambda c: c["beside_weights"].update({BLANK_BY_SPOTS: "12"}), "a list of numbers"),
        (lambda c: c["beside_weights"].update({BLANK_BY_SPOTS: [math.nan, 0.1]}), "from 0 to 10"),
        (lambda c: c["beside_weights"].update({BLANK_BY_SPOTS: [math.inf, 0.1]}), "from 0 to 10"),
        (lambda c: c["beside_weights"].update({BLANK_BY_SPOTS: [-3.0, 0.1]}), "from 0 to 10"),
        (lambda c: c["beside_weights"].update(blank=[0.1]), "one for each answer beside it"),
        (lambda c: of_head(c, BLANK_BY_SPOTS)["beside"][0].update(step=1.9), "a whole number"),
        (lambda c: of_head(c, BLANK_BY_SPOTS)["beside"][0].update(step=99), "expected one from 0"),
        (
            lambda c: of_head(c, BLANK_BY_SPOTS)["beside"][0].update(head="multilattice"),
            "answers 'blank' too",
        ),
        (
            lambda c: of_head(c, BLANK_BY_SPOTS)["beside"][0].update(head="mosaicity_deg"),
            "answers 'blank' too",
        ),
        (
            lambda c: of_head(c, "n_lattices").update(beside=[{"head": "blank", "step": 0}]),
            "expected a binary one of the full exit",
        ),
        (
            lambda c: of_head(c, "ice").update(beside=[{"head": "bad_ice", "step": 0}]),
            "expected a binary one of the full exit",
        ),
        (lambda c: c["calibration"].update(blank=[0.0, 0.0]), "a temperature above 0"),
        (lambda c: c["calibration"].update(blank=[1.0, math.nan]), "a temperature above 0"),
        (lambda c: c["thresholds"].update(p_blank_veto=math.nan), "expected a number from 0"),
    ],
)
def test_a_card_that_cannot_be_decided_by_is_refused(
    tmp_path: Path, model: Model, spoil: Callable[[dict[str, Any]], object], said: str
) -> None:
    """With what was expected and what to do, before any frame is judged by it."""
    save_model(tmp_path, model.net, "test", {"recipe": Recipe(), "thresholds": {"p_blank_veto": 1}})
    card = json.loads((tmp_path / "card.json").read_text())
    spoil(card)
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.raises(ModelError, match=said) as raised:
        load_model(tmp_path)
    assert "copy the model again" in str(raised.value)


def test_a_finished_fast_exit_is_trained_no_further(tmp_path: Path) -> None:
    """Its state in an empty folder, with arrays of another full exit: the same panels come out,
    and the full exit is trained from the beginning."""
    folder = tmp_path / "shards"
    write_shards(folder, frames=20, seed=4, frames_per_shard=2, progress=False)
    settings = Settings(epochs=1, fast_epochs=1)
    train(folder, tmp_path / "first", settings=settings, threads=1)
    state = torch.load(tmp_path / "first" / "fast.pt", weights_only=True)
    for arrays in (state["net"], state["best"]):
        arrays["spots_mean"] = torch.full((3,), 7.0)
        for name in [name for name in arrays if name.startswith("by_spots")]:
            del arrays[name]
    (tmp_path / "second").mkdir()
    torch.save(state, tmp_path / "second" / "fast.pt")
    said: list[str] = []
    train(folder, tmp_path / "second", settings=settings, threads=1, say=said.append)
    assert not any(line.startswith("fast epoch") for line in said)
    assert any(line.startswith("full epoch") for line in said)
    assert any(line.startswith("blank epoch") for line in said)
    first, second = (load_model(tmp_path / name).net.state_dict() for name in ("first", "second"))
    for name, array in first.items():
        assert torch.equal(array, second[name]), name
    assert len(shard_paths(folder)) == 10


def test_a_model_reads_the_numbers_that_its_card_names(tmp_path: Path) -> None:
    """Three of them, in the card's order; a name that this program does not compute is refused."""
    names = ("shape_log_lone", "shape_log_spots", "lattice_spots_log")
    torch.manual_seed(2)
    width = {"radial_bins": Recipe().radial_bins, "spot_features": 3}
    net = TriageNet(HEADS, convolutions=False, **width).eval()
    card = {"recipe": Recipe(), "thresholds": {"p_blank_veto": 0.5}, "spot_features": names}
    save_model(tmp_path, net, "test", card)
    model = load_model(tmp_path)
    assert model.card.spot_features == names
    backend = open_backend("cpu", WITHOUT_TILES)
    views = backend.prepare(frames())
    close_ups = backend.close_ups(frames(), views, range(4))
    whole, first = spot_features(close_ups), len(SPOT_FEATURES)
    chosen = whole[:, [*map(SPOT_FEATURES.index, names), *range(first, whole.shape[1])]]
    assert np.array_equal(spot_features(close_ups, names=names), chosen)
    expected = [score.quality for score in both(Scorer(model, "torch"), frames())[1]]
    for other in (Scorer(model, "auto"), DeviceScorer(model, "cpu")):
        found = [score.quality for score in both(other, frames())[1]]
        assert found == pytest.approx(expected, abs=2e-4)
    text = (tmp_path / "card.json").read_text()
    (tmp_path / "card.json").write_text(text.replace("shape_log_lone", "shape_of_yesterday"))
    with pytest.raises(ModelError, match="shape_of_yesterday"):
        load_model(tmp_path)

"""The figures of an evaluation, each by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from simulators.diffraction import write_shards
from triage.nets.model import Model, load_model, save_model
from triage.nets.triagenet import Head, TriageNet
from triage.records import Recipe
from triage.training.answers import Answers, answers_of
from triage.training.baselines import (
    SpotCount,
    boosted_trees,
    radial_statistics,
    spot_statistics,
)
from triage.training.dataset import load_examples, shard_paths
from triage.training.describe import described
from triage.training.evaluate import assess, evaluate, thresholds_from
from triage.training.requirements import requirements
from triage.training.tables import (
    VetoFigures,
    binary_figures,
    head_tables,
    ordinal_figures,
    quality_figures,
    regression_figures,
    veto_tables,
)
from triage.training.train import HEADS

QUALITY = Head(name="quality", kind="ordinal", exit="full", levels=5)


def answers(values: dict[str, list[float]], labels: dict[str, list[float]]) -> Answers:
    n = len(next(iter(labels.values())))
    return Answers(
        values={name: np.array(each, np.float64) for name, each in values.items()},
        ood=np.zeros(n, bool),
        labels={name: np.array(each, np.float64) for name, each in labels.items()},
        family=np.array(["eiger", "ccd"] * n)[:n],
        shard=np.zeros(n, np.int64),
    )


def test_the_veto_figures_count_hits_and_blanks_and_leave_out_the_rest() -> None:
    """Three hits (one vetoed), two blanks (one vetoed), one frame that is neither."""
    score = np.array([0.1, 0.2, 0.95, 0.99, 0.5, 0.97])
    labels = np.array([0.0, 0.0, 0.0, 1.0, 1.0, math.nan])
    veto = VetoFigures(score >= 0.9, score, labels)
    figures = veto.of()
    assert (figures["hits"], figures["blanks"], figures["false_vetoes"]) == (3, 2, 1)
    assert figures["false_veto_rate"] == pytest.approx(1 / 3)
    assert figures["blanks_vetoed_share"] == 0.5
    assert figures["auroc"] == pytest.approx(5 / 6)  # of six pairs only (0.5, 0.95) is lost
    first = np.array([True, True, False, False, False, False])
    part = veto.of(first, None)
    assert (part["hits"], part["blanks"], part["false_vetoes"]) == (2, 2, 0)
    assert veto.of(first, first)["blanks_vetoed_share"] is None


def test_a_hit_without_a_score_has_the_worst_rank() -> None:
    """Hits 0.1 and none, blanks 0.9 and none: of four pairs only (0.9, 0.1) is won."""
    score = np.array([0.1, math.nan, 0.9, math.nan])
    labels = np.array([0.0, 0.0, 1.0, 1.0])
    figures = VetoFigures(score >= 0.5, score, labels).of()
    assert figures["auroc"] == 0.25
    assert figures["unanswered"] == 2
    assert (figures["false_vetoes"], figures["blanks_vetoed_share"]) == (0, 0.5)
    # Of every head: the positive without an answer is below all, the negative above all.
    figures = binary_figures(np.array([math.nan, 0.8, math.nan, 0.3]), labels[::-1], 0.5)
    assert figures["auroc"] == 0.0 + 1 / 4
    assert figures["confusion"] == [[1, 1], [1, 1]]


def test_the_veto_by_strata_and_few_spots_apart() -> None:
    """Hits of 10, 30, 31 and 2000 spots, a frame of 5 spots, two blanks; threshold 0.5."""
    nan = math.nan
    tables = veto_tables(
        answers(
            {"blank": [0.6, 0.1, 0.2, 0.7, 0.9, 0.8, 0.4]},
            {
                "blank": [0, 0, 0, 0, nan, 1, 1],
                "n_visible": [10, 30, 31, 2000, 5, 0, 0],
                "median_snr": [6, 6, 60, 60, 6, nan, nan],
                "d_vis_angstrom": [2.5, 2.5, 1.5, 1.5, nan, nan, nan],
            },
        ),
        0.5,
    )
    assert (tables["weak_hits"]["hits"], tables["weak_hits"]["false_vetoes"]) == (2, 1)
    strata = tables["strata"]
    assert [row["false_vetoes"] for row in strata["visible spots"].values()] == [1, 0, 0, 1]
    assert [row["hits"] for row in strata["visible spots"].values()] == [2, 1, 0, 1]
    assert strata["median signal to noise"]["50 and more"]["hits"] == 2
    assert strata["resolution"]["2 to 3 angstrom"]["false_vetoes"] == 1
    assert sum(row["blanks"] for row in strata["detector family"].values()) == 2
    few = tables["few_spots"]
    assert (few["frames"], few["vetoed"]) == (1, 1)


def test_what_is_out_of_distribution_is_never_vetoed() -> None:
    """As the policy keeps it."""
    of = answers({"blank": [0.9, 0.9]}, {"blank": [0, 0], "n_visible": [20, 20]})
    of.ood[0] = True
    assert veto_tables(of, 0.5)["all"]["false_vetoes"] == 1


def test_a_binary_head_at_its_threshold() -> None:
    """p 0.2, 0.6, 0.7, 0.9 with the last two true, at 0.65: all right; at 0.5 one is not."""
    p = np.array([0.2, 0.6, 0.7, 0.9, 0.5])
    labels = np.array([0.0, 0.0, 1.0, 1.0, math.nan])
    figures = binary_figures(p, labels, 0.65)
    assert (figures["frames"], figures["positives"], figures["unanswered"]) == (4, 2, 0)
    assert (figures["auroc"], figures["balanced_accuracy"]) == (1.0, 1.0)
    assert binary_figures(p, labels, 0.5)["balanced_accuracy"] == 0.75
    # Each p in a bin of its own.
    assert figures["expected_calibration_error"] == pytest.approx((0.2 + 0.6 + 0.3 + 0.1) / 4)


def test_an_ordinal_head_by_its_confusion() -> None:
    """Grades 0, 1, 2, 4 called 0, 2, 2, 2, one without an answer, one that is no grade."""
    values = np.array([0.1, 1.6, 2.2, 2.4, math.nan, 1.0])
    labels = np.array([0.0, 1.0, 2.0, 4.0, 3.0, 7.0])
    figures = ordinal_figures(values, labels, QUALITY)
    assert (figures["frames"], figures["unanswered"]) == (5, 1)
    assert figures["accuracy"] == 2 / 5
    assert figures["off_by_one"] == 3 / 5
    assert figures["confusion"][1][2] == figures["confusion"][4][2] == 1


def test_frames_near_a_bound_are_left_out_of_the_grade_and_stated() -> None:
    """Of five graded frames two lie near a bound; one of these is called wrong."""
    nan = math.nan
    figures = quality_figures(
        answers(
            {"quality": [2.0, 2.0, 3.0, 4.0, 3.0, 0.0]},
            {"quality": [2, 3, 3, 4, 3, nan], "quality_margin": [0, 1, 0, 0, 1, nan]},
        ),
        QUALITY,
    )
    assert (figures["frames"], figures["accuracy"]) == (3, 1.0)
    assert figures["near_a_bound_share"] == 2 / 5
    assert figures["with_those_near_a_bound"]["accuracy"] == 4 / 5


def test_a_regression_in_its_own_unit() -> None:
    """0.1, 0.2, 0.6 called 0.1, 0.3, 0.45: errors 0, 50, 25 %. No answer is the worst one."""
    truth = np.array([0.1, 0.2, 0.6])
    figures = regression_figures(np.array([0.1, 0.3, 0.45]), truth)
    assert figures["median_relative_error"] == pytest.approx(0.25)
    assert figures["spearman"] == pytest.approx(1.0)
    silent = regression_figures(np.array([0.1, 0.3, math.nan]), truth)
    # Errors 0, 0.5, infinite; ranks 2, 3, 1 against 1, 2, 3.
    assert silent["median_relative_error"] == pytest.approx(0.5)
    assert silent["spearman"] == pytest.approx(-0.5)
    assert silent["unanswered"] == 1


def test_mosaicity_is_judged_where_it_can_be_measured_and_elsewhere_apart() -> None:
    """Two frames of each kind; the head that is not there has no figures."""
    head = Head(name="mosaicity_deg", kind="regression", exit="full", transform="log")
    of = answers(
        {"mosaicity_deg": [0.1, 0.2, 0.3, 0.4]},
        {"mosaicity_deg": [0.1, 0.25, 0.1, 0.1], "mosaicity_measurable": [1, 1, 0, 0]},
    )
    tables = head_tables([head], of, {})["mosaicity_deg"]
    assert tables["measurable"]["median_relative_error"] == pytest.approx(0.1)
    assert tables["others"]["median_relative_error"] == pytest.approx(2.5)
    ice = Head(name="ice", kind="binary", exit="fast")
    assert head_tables([ice], of, {})["ice"]["frames"] == 0


def test_heads_are_judged_by_visible_spots() -> None:
    """Ice: right without spots, wrong with 10 to 30, one class alone above. Quality: one of two
    right with 31 and 100 spots, and the frame near a bound left out."""
    nan = math.nan
    of = answers(
        {"ice": [0.9, 0.1, 0.2, 0.8, 0.5, nan], "quality": [0.0, 1.0, 2.0, 3.2, 2.0, 2.0]},
        {
            "n_visible": [0, 0, 10, 30, 31, 100],
            "ice": [1, 0, 1, 0, 1, 1],
            "quality": [0, 1, 2, 3, 3, 2],
            "quality_margin": [0, 0, 1, 1, 0, 0],
        },
    )
    ice = Head(name="ice", kind="binary", exit="fast")
    quality = Head(name="quality", kind="ordinal", exit="full", levels=5)
    tables = head_tables([ice, quality], of, {})
    parts = tables["ice"]["by_visible_spots"]
    assert list(parts) == ["0", "10 to 30", "31 to 100"]
    assert [parts[part]["auroc"] for part in ("0", "10 to 30")] == [1.0, 0.0]
    assert math.isnan(parts["31 to 100"]["auroc"])
    assert (parts["31 to 100"]["frames"], parts["31 to 100"]["positives"]) == (2, 2)
    parts = tables["quality"]["by_visible_spots"]
    assert {part: row["accuracy"] for part, row in parts.items()} == {"0": 1.0, "31 to 100": 0.5}


def test_ice_is_judged_by_its_kind() -> None:
    """Rings above both frames without ice; a grain alone on its frame above the one without spots;
    a grain among spots below the one with them."""
    of = answers(
        {"ice": [0.9, 0.8, 0.1, 0.2, 0.3]},
        {
            "n_visible": [0, 0, 40, 0, 40],
            "ice": [1, 1, 1, 0, 0],
            "ice_grains": [0, 7, 7, 0, 0],
        },
    )
    ice = Head(name="ice", kind="binary", exit="fast")
    parts = head_tables([ice], of, {})["ice"]["by_kind_of_ice"]
    assert {part: (row["frames"], row["auroc"]) for part, row in parts.items()} == {
        "rings": (3, 1.0),
        "grains, fewer than 10 spots": (2, 1.0),
        "grains, 10 spots and more": (2, 0.0),
    }


def test_ice_is_judged_by_its_strength() -> None:
    """Rings of 6 sigma above one of two frames without, of 50 above both; the frame that is as sure
    as the first has ice of 4 sigma, and is none to be held against it."""
    of = answers(
        {"ice": [0.5, 0.9, 0.6, 0.1]},
        {"n_visible": [0] * 4, "ice": [1, 1, 0, 0], "ice_snr": [6.0, 50.0, 4.0, 0.0]},
    )
    ice = Head(name="ice", kind="binary", exit="fast")
    parts = head_tables([ice], of, {})["ice"]["by_strength_of_ice"]
    assert {part: (row["frames"], row["auroc"]) for part, row in parts.items()} == {
        "5 to 8 sigma": (3, 0.5),
        "20 to 100 sigma": (3, 1.0),
        "without 2.5 to 5 sigma": (3, 1.0),
    }


def test_thresholds_are_fixed_on_what_is_given() -> None:
    """Ten hits, none to lose: above the highest. Ice: the middle of the gap."""
    heads = [Head(name="blank", kind="binary", exit="fast")]
    heads += [Head(name="ice", kind="binary", exit="fast"), QUALITY]
    p = [i / 20 for i in range(10)]
    of = answers(
        {"blank": [*p, 0.9], "ice": [0.1] * 6 + [0.7] * 5},
        {"blank": [0] * 10 + [1], "ice": [0] * 6 + [1] * 5},
    )
    found = thresholds_from(heads, of)
    assert set(found) == {"blank", "ice"}
    assert found["blank"] == pytest.approx(0.45)
    assert found["blank"] > 0.45
    assert found["ice"] == pytest.approx(0.4)


def test_each_requirement_is_met_missed_or_not_measured() -> None:
    """Bounds as asked: AUROC of ice just above, a calibration error just above its own."""
    report = {
        "heads": {"ice": {"auroc": 0.991, "expected_calibration_error": 0.021}},
        "real": {"powder": {"called_ice": 0}, "kept": {"mx_hit": {"share": 0.99}}},
        "baselines": {
            "labels": {"blank, weak hits": {"spot count": {"auroc": 0.9, "model_on_the_same": 0.8}}}
        },
    }
    met = {(row["what"], row["figure"]): row["met"] for row in requirements(report)}
    assert met["ice", "AUROC"] is True
    assert met["ice", "expected calibration error"] is False
    assert met["bad ice", "AUROC"] is None
    assert met["real frames", "powder frames called ice"] is True
    assert met["real frames", "mx_hit frames kept"] is False
    assert met["blank, weak hits", "AUROC over the spot count's"] is False


# Frames of large detectors among them: minutes where the processor is shared.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, frames=18, seed=6, frames_per_shard=3, progress=False)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Model:
    torch.manual_seed(0)
    net = TriageNet(HEADS, radial_bins=Recipe().radial_bins).eval()
    card = {"recipe": Recipe(), "thresholds": {"p_blank_veto": 0.5}, "calibration": {}}
    save_model(tmp_path / "model", net, "test", card)
    return load_model(tmp_path / "model")


def test_an_evaluation_reports_the_frames_it_was_given(
    model: Model, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts are those of the shards' own labels; every picture and both reports are there."""
    pytest.importorskip("matplotlib", reason="pictures need the extra 'train'")
    # The others take minutes; their own tests are elsewhere.
    monkeypatch.setattr("triage.training.evaluate.BASELINES", (SpotCount(),))
    out = tmp_path / "report"
    said: list[str] = []
    evaluate(
        model, shards, out, calibration=shards, baseline_shards=1,
        say=said.append,
    )  # fmt: skip
    assert any("tested on" in line for line in said)
    blank = []
    for path in shard_paths(shards):
        with h5py.File(path) as shard:
            blank.append(shard["labels/blank"][()])
    labels = np.concatenate(blank)
    report = json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["set"]["frames"] == 18
    veto = report["veto"]["all"]
    assert (veto["hits"], veto["blanks"]) == ((labels == 0).sum(), (labels == 1).sum())
    families = report["veto"]["strata"]["detector family"]
    assert sum(row["hits"] for row in families.values()) == (labels == 0).sum()
    assert report["baselines"]["frames"] == 3
    assert set(report["baselines"]["labels"]["blank"]) == {"spot count"}
    # Not one hit of few may be lost where the threshold was fixed.
    assert veto["false_vetoes"] == 0
    assert report["veto_at_the_cards_threshold"]["threshold"] == 0.5
    text = (out / "report.md").read_text()
    assert f"| all | {veto['hits']} | {veto['blanks']} |" in text
    for name in ("curves_blank", "reliability", "confusion", "regressions", "false_veto"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_answers_are_those_of_serving_and_are_kept(
    model: Model, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the threads; a second run asks nobody, a card's figures come of the same."""
    paths = shard_paths(shards)
    found = answers_of(model, paths, tmp_path / "kept", threads=3)
    validation, tables = assess(model.net, paths, Recipe(), {}, {}, {"p_blank_veto": 0.5})
    monkeypatch.setattr("triage.training.answers.both_exits", None)
    again = answers_of(model, paths, tmp_path / "kept")
    for name, values in found.values.items():
        assert np.array_equal(values, again.values[name], equal_nan=True)
        assert np.isfinite(values).all(), name
    assert validation["hits"] == (found.label("blank") == 0).sum()
    assert validation["false_vetoes"] == int(
        ((found.value("blank") >= 0.5) & (found.label("blank") == 0)).sum()
    )
    assert tables["heads"]["quality"]["frames"] > 0
    assert found.shard.tolist() == [i // 3 for i in range(18)]


def test_the_statistics_stand_in_the_order_of_the_frames(shards: Path) -> None:
    """Whatever the threads; as many rows as frames, and hits have more spots than blanks."""
    paths = shard_paths(shards)
    spots = spot_statistics(paths)
    assert np.array_equal(spots, spot_statistics(paths, threads=3))
    examples = list(load_examples(paths, Recipe(), full=False))
    radial = radial_statistics(examples)
    assert spots.shape == (18, 7)
    assert radial.shape == (18, 40)
    labels = np.array([e.labels["blank"] for e in examples])
    assert np.median(spots[labels == 0, 0]) > np.median(spots[labels == 1, 0])


def test_trees_leave_out_what_cannot_be_learned() -> None:
    """A label with one class, or none known, is no question."""
    pytest.importorskip("sklearn", reason="boosted trees need the extra 'train'")
    x = np.arange(40.0)[:, None]
    answers = boosted_trees(
        x, {"a": (x[:, 0] > 20).astype(float), "b": np.ones(40), "c": np.full(40, math.nan)}, x
    )
    assert set(answers) == {"a"}
    assert answers["a"].shape == (40,)


def test_a_set_is_described_by_its_labels(tmp_path: Path) -> None:
    """Counts of a shard written by hand; labels that follow each other are said to."""
    import hdf5plugin

    with h5py.File(tmp_path / "shard_00000.h5", "w") as shard:
        pixels = np.zeros((4, 64, 64), np.uint16)
        shard.create_dataset("data", data=pixels, chunks=(1, 64, 64), **hdf5plugin.Bitshuffle())
        shard["mask"] = np.zeros((64, 64), np.uint32)
        shard.attrs.update({"saturation_value": 1000, "family": "eiger"})
        for name in (
            "beam_center_x_px", "beam_center_y_px", "pixel_size_x_m", "pixel_size_y_m",
            "detector_distance_m", "incident_wavelength_angstrom",
        ):  # fmt: skip
            shard[f"geometry/{name}"] = np.ones(4)
        shard["labels/blank"] = np.array([1, 0, 0, math.nan], np.float32)
        shard["labels/n_visible"] = np.array([0, 12, 40, 3], np.float32)
        shard["labels/ice"] = np.array([0, 0, 1, 1], np.float32)
    text = described(shard_paths(tmp_path))
    assert "4 frames in 1 shards" in text
    assert "| eiger | 4 | 100.0% |" in text
    for line in (
        "| blank | 0 | 2 | 66.7% |",
        "| blank | not defined | 1 |  |",
        "| n_visible | 10 to 31 | 1 | 25.0% |",
        "| n_visible | 1 to 10 | 1 | 25.0% |",
        "| ice | 1 | 2 | 50.0% |",
    ):
        assert line in text
    # Ranks of blank (2.5 is tied): 3 1.5 1.5 against 1 2 3: -0.87.
    row = next(line for line in text.splitlines() if line.startswith("| blank |  |"))
    assert "-0.87" in row

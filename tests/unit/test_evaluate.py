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
from triage.nets.model import load_model, save_model
from triage.nets.triagenet import Head, TriageNet
from triage.records import Recipe
from triage.training.baselines import boosted_trees, radial_statistics, spot_statistics
from triage.training.dataset import load_examples, shard_paths
from triage.training.describe import described
from triage.training.evaluate import VetoFigures, evaluate, head_figures
from triage.training.train import HEADS


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


def test_a_binary_head_is_judged_after_calibration() -> None:
    """Temperature 2 and bias 1: logits -4, -1, 1, 6 are p 0.27, 0.62, 0.82, 0.98."""
    head = Head(name="ice", kind="binary", exit="fast")
    raw = np.array([[-4.0], [-1.0], [1.0], [6.0], [0.0]])
    labels = np.array([0.0, 0.0, 1.0, 1.0, math.nan])
    figures = head_figures(head, raw, labels, {"ice": (2.0, 1.0)})
    assert (figures["frames"], figures["positives"], figures["unanswered"]) == (4, 2, 0)
    assert figures["auroc"] == 1.0
    assert figures["balanced_accuracy"] == 0.75
    p = [1 / (1 + math.exp(-(x / 2 + 1))) for x in (-4, -1, 1, 6)]
    # Each p in a bin of its own but the last two, which share none either.
    expected = sum(abs(a - b) for a, b in zip(p, (0, 0, 1, 1), strict=True)) / 4
    assert figures["expected_calibration_error"] == pytest.approx(expected)


def test_an_ordinal_head_by_its_confusion() -> None:
    """Grades 0, 1, 2, 4 called 0, 2, 2, 2; one frame has no answer and is said to have none."""
    head = Head(name="quality", kind="ordinal", exit="full", levels=5)
    calls = [0, 2, 2, 2]
    raw = np.array([[9.0 if step < call else -9.0 for step in range(4)] for call in calls])
    raw = np.vstack([raw, np.full(4, math.nan)])
    labels = np.array([0.0, 1.0, 2.0, 4.0, 3.0])
    assert head_figures(head, raw, np.array([0.0, 1.0, 2.0, 7.0, 3.0]), {})["frames"] == 4
    figures = head_figures(head, raw, labels, {})
    assert (figures["frames"], figures["unanswered"]) == (5, 1)
    assert figures["accuracy"] == 0.5
    assert figures["off_by_one"] == 0.75
    assert figures["confusion"][1][2] == figures["confusion"][4][2] == 1


def test_a_regression_in_its_own_unit() -> None:
    """Log of degrees: 0.1, 0.2, 0.6 called 0.1, 0.3, 0.45: errors 0, 50, 25 %."""
    head = Head(name="mosaicity_deg", kind="regression", exit="full", transform="log")
    raw = np.log(np.array([[0.1], [0.3], [0.45]]))
    figures = head_figures(head, raw, np.array([0.1, 0.2, 0.6]), {})
    assert figures["median_relative_error"] == pytest.approx(0.25)
    assert figures["spearman"] == pytest.approx(1.0)


def test_a_head_without_labels_has_no_figures() -> None:
    """And no division by nothing."""
    head = Head(name="ice", kind="binary", exit="fast")
    assert head_figures(head, np.ones((2, 1)), np.full(2, math.nan), {}) == {
        "frames": 0,
        "unanswered": 0,
    }


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, frames=48, seed=6, frames_per_shard=6, progress=False)
    return folder


def test_an_evaluation_reports_the_frames_it_was_given(shards: Path, tmp_path: Path) -> None:
    """Counts are those of the shards' own labels; every picture and both reports are there."""
    pytest.importorskip("matplotlib", reason="pictures need the extra 'train'")
    pytest.importorskip("sklearn", reason="boosted trees need the extra 'train'")
    torch.manual_seed(0)
    net = TriageNet(HEADS, radial_bins=Recipe().radial_bins).eval()
    card = {"recipe": Recipe(), "thresholds": {"p_blank_veto": 0.5}, "calibration": {}}
    save_model(tmp_path / "model", net, "test", card)
    out = tmp_path / "report"
    evaluate(load_model(tmp_path / "model"), shards, out, baselines_from=shards)
    blank = []
    for path in shard_paths(shards):
        with h5py.File(path) as shard:
            blank.append(shard["labels/blank"][()])
    labels = np.concatenate(blank)
    report = json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["frames"] == 48
    assert report["veto"]["hits"] == (labels == 0).sum()
    assert report["veto"]["blanks"] == (labels == 1).sum()
    assert sum(row["hits"] for row in report["blank_by_family"].values()) == (labels == 0).sum()
    assert set(report["baselines"]["blank"]) == {"spot count", "boosted trees"}
    # Trees know the frames they learned from.
    assert report["baselines"]["blank"]["boosted trees"]["auroc"] > 0.95
    text = (out / "report.md").read_text()
    assert f"| all | {report['veto']['hits']} | {report['veto']['blanks']} |" in text
    for name in ("curves_blank", "reliability", "confusion", "regressions"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_the_statistics_stand_in_the_order_of_the_frames(shards: Path) -> None:
    """Whatever the threads; as many rows as frames, and hits have more spots than blanks."""
    paths = shard_paths(shards)
    spots = spot_statistics(paths)
    assert np.array_equal(spots, spot_statistics(paths, threads=3))
    examples = list(load_examples(paths, Recipe(), full=False))
    radial = radial_statistics(examples)
    assert spots.shape == (48, 7)
    assert radial.shape == (48, 40)
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

"""The deployed network against the network as described."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import triage.nets.scorer as scorer_module
from triage.backends import open_backend
from triage.errors import EnvironmentLacksError, ModelError
from triage.nets.fast_exit import LANES, FastExit, ring_planes
from triage.nets.full_exit import full_exit_graph
from triage.nets.model import (
    BLANK_BY_SPOTS,
    Model,
    Quantised,
    load_model,
    save_model,
    save_quantised,
)
from triage.nets.scorer import Scorer, head_value, occupied_cells
from triage.nets.spot_features import spot_features
from triage.nets.triagenet import CANDIDATES, COUNTS, Head, TriageNet
from triage.records import (
    NOT_SCORED,
    SCORE_NAMES,
    CloseUps,
    Frame,
    Geometry,
    Recipe,
    Scores,
    Series,
    Views,
)
from triage.training.train import HEADS

pytest.importorskip("openvino", reason="the extra 'fast' is not installed")

GEOMETRY = Geometry(
    beam_center_x_px=150.0,
    beam_center_y_px=120.0,
    pixel_size_x_m=75e-6,
    pixel_size_y_m=75e-6,
    detector_distance_m=0.02,
    incident_wavelength_angstrom=1.0,
)


def lively() -> TriageNet:
    """Random weights, large enough that every part of the network moves every answer."""
    torch.manual_seed(1)
    net = TriageNet(HEADS, radial_bins=Recipe().radial_bins).eval()
    net.standardise(torch.randn(64, COUNTS) + 1.0)
    # Numbers of few values and of many, and some that are all the same.
    numbers = torch.randn(64, net.spots_width)
    numbers[:, ::3] = numbers[:, ::3].round()
    numbers[:, ::50] = 0.0
    net.standardise_spots(numbers, torch.ones(64, dtype=torch.bool))
    # As it begins, a signal shrinks with every convolution.
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data *= 2.0
    return net


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("model")
    card = {"recipe": Recipe(), "thresholds": {"p_blank_veto": 0.5}}
    save_model(folder, lively(), "test", card)
    return {"shipped": load_model(quantised=False), "random": load_model(folder)}


def frame(image: NDArray[Any], *, geometry: Geometry | None = GEOMETRY) -> Frame:
    return Frame(
        series=Series(geometry=geometry),
        image_id=0,
        dtype=image.dtype,
        shape=(image.shape[0], image.shape[1]),
        payload=image.tobytes(),
    )


def views_of_every_kind() -> tuple[list[Frame], Views, CloseUps]:
    """Blank, spots, no photon, full of strong pixels, tiny, large and coarse, no geometry."""
    rng = np.random.default_rng(7)
    blank = rng.poisson(0.6, (300, 340)).astype(np.uint16)
    spots = rng.poisson(0.6, (700, 500)).astype(np.uint16)
    for y, x in rng.integers(5, 490, (60, 2)):
        spots[y : y + 3, x : x + 3] += rng.integers(3, 200, (3, 3)).astype(np.uint16)
    strong = rng.poisson(3000.0, (256, 256)).astype(np.uint16)
    gaps = rng.poisson(2.0, (1000, 1100)).astype(np.uint16)
    gaps[:, 300:320] = gaps[400:430] = 65535
    frames = [
        frame(blank),
        frame(spots),
        frame(np.zeros((300, 300), np.uint16)),
        frame(strong),
        frame(rng.poisson(1.0, (40, 50)).astype(np.uint16)),
        frame(gaps),
        frame(rng.poisson(0.05, (2100, 2000)).astype(np.uint32)),
        frame(spots, geometry=None),
    ]
    backend = open_backend("cpu")
    views = backend.prepare(frames)
    assert views.errors == (None,) * len(frames)
    return frames, views, backend.close_ups(frames, views, range(len(frames)))


@pytest.fixture(scope="module")
def every_kind() -> tuple[list[Frame], Views, CloseUps]:
    return views_of_every_kind()


def scores_by(scorer: Scorer, views: Views, close_ups: CloseUps) -> list[Scores]:
    return scorer.full(views, close_ups, range(len(views.errors)), scorer.fast(views))


def table(scores: list[Scores]) -> NDArray[np.float64]:
    return np.array([[getattr(score, name) for name in SCORE_NAMES] for score in scores])


@pytest.mark.parametrize("which", ["shipped", "random"])
@pytest.mark.parametrize("runtime", ["openvino", "auto without openvino"])
def test_the_deployed_network_gives_the_scores_of_the_description(
    models: dict[str, Model],
    every_kind: tuple[list[Frame], Views, CloseUps],
    which: str,
    runtime: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Probabilities to 1e-4, levels and quantities to 1e-3 of their value; NaN where it is NaN."""
    _, views, close_ups = every_kind
    model = models[which]
    if runtime != "openvino":
        monkeypatch.setattr(scorer_module, "openvino_is_installed", lambda: False)
        runtime = "auto"
    expected = table(scores_by(Scorer(model, "torch"), views, close_ups))
    found = table(scores_by(Scorer(model, runtime), views, close_ups))
    assert np.isfinite(expected[:, 0]).all()
    assert np.isnan(expected[7, 1])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_random_weights_reach_every_score(
    models: dict[str, Model], every_kind: tuple[list[Frame], Views, CloseUps]
) -> None:
    """Planes, rings, tiles and spots each move every head that reads them, and no other: a graph
    that lost one is found. Blank by spots reads counts and spots alone."""
    _, views, close_ups = every_kind
    exits = Scorer(models["random"], "openvino")._exits
    y, x = occupied_cells(views.count[1])
    overview = np.ascontiguousarray(views.overview[1, :, :y, :x])
    _, found = exits.fast(overview, int(views.bin_factor[1]), views.radial[1])
    given = (
        found.evidence.planes.numpy(),
        found.share,
        found.answer.counts[None],
        # Of random weights the rings are so small that an answer hardly moves with them.
        100.0 * ring_planes(views.radial[1])[None],
        close_ups.tiles[1],
        spot_features(close_ups)[1:2],
    )
    whole = exits._full(*given)  # type: ignore[attr-defined]
    read = {head.name: {*head.reads} for head in HEADS} | {BLANK_BY_SPOTS: {"counts", "spots"}}
    for missing, part in ((0, "seen"), (2, "counts"), (3, "rings"), (4, "seen"), (5, "spots")):
        changed = [np.zeros_like(v) if i == missing else v for i, v in enumerate(given)]
        without = exits._full(*changed)  # type: ignore[attr-defined]
        moved = {name for name in whole if np.abs(without[name] - whole[name]).max() > 1e-4}
        assert moved == {name for name in whole if part in read[name]}


def test_clones_in_threads_give_the_bits_of_one(
    models: dict[str, Model], every_kind: tuple[list[Frame], Views, CloseUps]
) -> None:
    """Four threads, each with a clone, several rounds beside each other."""
    _, views, close_ups = every_kind
    first = Scorer(models["shipped"])
    alone = table(scores_by(first, views, close_ups)).tobytes()
    clones = [first.clone() for _ in range(4)]

    def rounds(scorer: Scorer) -> set[bytes]:
        return {table(scores_by(scorer, views, close_ups)).tobytes() for _ in range(3)}

    with ThreadPoolExecutor(4) as pool:
        assert set().union(*pool.map(rounds, clones)) == {alone}


_SIGNALLED = """
import gc, os, signal, threading
from triage.nets.model import load_model
from triage.nets.scorer import Scorer

held = [Scorer(load_model())]
came = []
signal.signal(signal.SIGHUP, lambda number, frame: came.append(number))

def let_go():
    held.clear()
    gc.collect()

last_user = threading.Thread(target=let_go)
last_user.start()
last_user.join()
for _ in range(3):
    os.kill(os.getpid(), signal.SIGHUP)
assert len(came) == 3
"""


def test_a_signal_after_the_last_scorer_went_in_a_thread_harms_nothing() -> None:
    """A reload or the end of a run must not kill the process; a CPU without AMX cannot fail."""
    done = subprocess.run([sys.executable, "-c", _SIGNALLED], timeout=280)
    assert done.returncode == 0


_THREADS = """
import torch
from threadpoolctl import threadpool_info
from triage.nets.model import load_model
from triage.nets.scorer import Scorer

scorer = Scorer(load_model())
pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
assert pools
print(torch.get_num_threads(), *(pool["num_threads"] for pool in pools))
"""


def test_a_frame_is_scored_on_the_thread_that_asks() -> None:
    """Whatever the environment offers; a machine of one core cannot fail."""
    offered = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "2")
    done = subprocess.run(
        [sys.executable, "-c", _THREADS],
        env=os.environ | offered,
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
    )
    assert set(done.stdout.split()) == {"1"}


@pytest.mark.parametrize("view", ["overview", "radial"])
def test_a_nan_is_not_scored_and_harms_no_neighbour(
    models: dict[str, Model],
    every_kind: tuple[list[Frame], Views, CloseUps],
    view: str,
) -> None:
    """A NaN among the cells: no score. One in the radial view: no ice score, blank as before."""
    _, views, _ = every_kind
    scorer = Scorer(models["shipped"])
    good = scorer.fast(views)
    broken = getattr(views, view).copy()
    broken[1, 0, 3, 4] = math.nan
    bad = scorer.fast(replace(views, **{view: broken}))
    if view == "overview":
        assert bad[1] is NOT_SCORED
    else:
        assert math.isnan(bad[1].p_ice)
        assert bad[1].p_blank == good[1].p_blank
    assert table(bad[2:]).tobytes() == table(good[2:]).tobytes()


@pytest.mark.parametrize("lanes", LANES)
def test_a_nan_among_candidates_comes_out(models: dict[str, Model], lanes: int) -> None:
    """Bounds and rectifiers let it pass."""
    net = models["random"].net
    rng = np.random.default_rng(3)
    counts = rng.random(COUNTS, np.float32)
    candidates = rng.random((CANDIDATES, 39), np.float32)
    radial = rng.random((5, 8, Recipe().radial_bins), np.float32)
    fast = FastExit(net, lanes=lanes)
    assert math.isfinite(fast(counts, candidates, radial).raw["blank"][0])
    candidates[100, 7] = math.nan
    assert math.isnan(fast(counts, candidates, radial).raw["blank"][0])


def radial_view(rng: np.random.Generator) -> NDArray[np.float32]:
    """(5, 8, 160) of a background that falls, with rings, gaps, spots left out and noise."""
    at = np.arange(Recipe().radial_bins)
    expected = 2000.0 * np.exp(-at / 30.0) + 5.0 * np.exp(-0.5 * ((at - 60.0) / 1.5) ** 2)
    pixels = rng.integers(50, 900, (8, at.size)) * (rng.random((8, at.size)) > 0.1)
    mean = rng.poisson(3.0 * expected * pixels) / np.maximum(pixels, 1)
    share, lost = rng.random((2, 8, at.size)) ** 0.2
    clipped = mean * rng.uniform(0.9, 1.0, mean.shape)
    return np.stack([mean, share, 1.0 - lost, pixels, clipped]).astype(np.float32)


@pytest.mark.parametrize("lanes", LANES)
def test_every_width_of_vector_gives_the_answer_of_the_description(
    models: dict[str, Model], lanes: int
) -> None:
    """From candidates that count for nothing, in part and in full, up to far out."""
    net = models["random"].net
    rng = np.random.default_rng(5)
    candidates = rng.normal(0.0, 2.0, (CANDIDATES, 39)).astype(np.float32)
    candidates[:100] *= 0.3
    candidates[100:110] *= 30.0
    candidates[400:] = 0.0
    counts = rng.normal(1.0, 1.0, COUNTS).astype(np.float32)
    radial = radial_view(rng)
    with torch.inference_mode():
        known = net.standardised(torch.from_numpy(counts)[None])
        planes = net.rings.planes(torch.from_numpy(radial)[None])
        rings = net.rings(planes)
        expected = net.members(known, torch.from_numpy(candidates)[None], rings)
    fast = FastExit(net, lanes=lanes)
    found = fast(counts, candidates, radial)
    for name, raw in expected.items():
        np.testing.assert_allclose(found.raw[name], raw[0].mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fast._rings_of(radial), rings[0], rtol=1e-4, atol=1e-5)
    # Differences of large sums, of which each takes its own order.
    np.testing.assert_allclose(ring_planes(radial), planes[0], rtol=1e-4, atol=2e-3)


@pytest.mark.skipif(len(LANES) == 1, reason="the C extension was not built")
def test_the_compiled_exit_refuses_arrays_of_another_shape(models: dict[str, Model]) -> None:
    """Before anything is read: too few, too many, of another width, not contiguous."""
    fast = FastExit(models["random"].net)
    counts, radial = np.zeros(COUNTS, np.float32), np.ones((5, 8, 160), np.float32)
    candidates = np.zeros((CANDIDATES, 39), np.float32)
    assert math.isfinite(fast(counts, candidates, radial).raw["blank"][0])
    for wrong in (
        candidates[1:],
        np.zeros((CANDIDATES, 40), np.float32),
        np.zeros((CANDIDATES, 78), np.float32)[:, ::2],
        np.zeros((8192, 39), np.float32),
    ):
        with pytest.raises((ValueError, BufferError)):
            fast(counts, wrong, radial)
    for wrong in (
        np.ones((5, 8, 156), np.float32),
        np.ones((5, 20, 160), np.float32),
        np.ones((5, 8, 320), np.float32)[:, :, ::2],
        np.ones((5, 0, 160), np.float32),
    ):
        with pytest.raises((ValueError, BufferError)):
            fast(counts, candidates, wrong)
    with pytest.raises(ValueError, match="lanes"):
        FastExit(models["random"].net, lanes=3)(counts, candidates, radial)


def test_without_openvino_auto_falls_back_and_openvino_says_what_to_install(
    models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remedy names the extra."""
    monkeypatch.setattr(scorer_module, "openvino_is_installed", lambda: False)
    assert Scorer(models["random"]).runtime == "torch"
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(EnvironmentLacksError, match="extra 'fast'"):
        Scorer(models["random"], "openvino")


def quantised_model(folder: Path) -> None:
    """A model with a graph beside it; that it holds no integers does not matter to its files."""
    import openvino

    save_model(folder, lively(), "test", {"recipe": Recipe(), "thresholds": {"p_blank_veto": 0.5}})
    model = load_model(folder)
    openvino.save_model(full_exit_graph(model.net, Recipe()), folder / "graph.xml", False)
    quantised = Quantised(
        graph=(folder / "graph.xml").read_bytes(), weights=(folder / "graph.bin").read_bytes()
    )
    save_quantised(folder, quantised, model.card, {"command": "by hand"})


def test_a_quantised_graph_is_served_where_it_lies(
    tmp_path: Path, every_kind: tuple[list[Frame], Views, CloseUps]
) -> None:
    """It is named as such, and can be left out."""
    quantised_model(tmp_path)
    _, views, close_ups = every_kind
    served, plain = Scorer(load_model(tmp_path)), Scorer(load_model(tmp_path, quantised=False))
    assert (served.runtime, plain.runtime) == ("openvino int8", "openvino")
    assert table(scores_by(served, views, close_ups)).tobytes() == (
        table(scores_by(plain, views, close_ups)).tobytes()
    )


@pytest.mark.parametrize(
    "harm", ["changed", "cut", "missing", "other weights", "other format", "no card"]
)
def test_a_quantised_graph_that_does_not_belong_is_refused(tmp_path: Path, harm: str) -> None:
    """At load, with the next step; without it the model loads."""
    quantised_model(tmp_path)
    graph, card = tmp_path / "full_int8.bin", tmp_path / "int8.json"
    good = graph.read_bytes()
    if harm == "changed":
        graph.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif harm == "cut":
        graph.write_bytes(good[:100])
    elif harm == "missing":
        graph.unlink()
    elif harm == "no card":
        card.write_text("[]")
    else:
        entry = {"other weights": {"weights_sha256": "0"}, "other format": {"format": 9}}[harm]
        card.write_text(json.dumps(json.loads(card.read_text()) | entry))
    with pytest.raises(ModelError, match="triage quantize"):
        load_model(tmp_path)
    card.unlink()
    assert load_model(tmp_path).quantised is None


def test_training_anew_takes_the_old_graph_away(tmp_path: Path) -> None:
    """It would be refused, and is of no use."""
    quantised_model(tmp_path)
    save_model(tmp_path, lively(), "test", {"recipe": Recipe(), "thresholds": {"p_blank_veto": 1}})
    assert not list(tmp_path.glob("*int8*"))


@pytest.mark.parametrize(
    ("kind", "transform", "raw", "value"),
    [
        ("binary", "", [0.6], 0.5),  # 0.6 / 2 - 0.3 = 0
        ("binary", "", [4000.0], 1.0),
        ("binary", "", [-4000.0], 0.0),
        ("ordinal", "", [800.0, 0.6, -800.0], 2.5),  # first level 1, one and a half steps up
        ("regression", "log", [math.log(3.0)], 3.0),
        ("regression", "log", [99.0], math.exp(4.0)),
        ("regression", "inverse_square", [0.25], 2.0),
        ("regression", "inverse_square", [-1.0], 100.0),
        ("regression", "", [7.5], 7.5),
    ],
)
def test_raw_outputs_become_quantities(
    kind: str, transform: str, raw: list[float], value: float
) -> None:
    """By hand, and NaN for NaN."""
    head = Head(name="x", kind=kind, exit="full", levels=4, first=1.0, transform=transform)
    calibration = {"x": (2.0, -0.3)}
    assert head_value(head, raw, calibration) == pytest.approx(value, abs=1e-12)
    assert math.isnan(head_value(head, [math.nan] * len(raw), calibration))


def test_levels_of_a_head_may_count_for_less_than_one() -> None:
    """Sure of two of three levels that add 1, 0.5 and 0.25; and one step for each level."""
    head = Head(name="x", kind="ordinal", exit="full", levels=4, steps=(1.0, 0.5, 0.25))
    assert head_value(head, [800.0, 800.0, -800.0], {}) == pytest.approx(1.5)
    assert head_value(head, [800.0, 800.0, 0.0], {}) == pytest.approx(1.625)
    assert head.highest == 1.75
    assert math.isnan(head_value(head, [math.nan] * 3, {}))


def test_occupied_cells_end_with_the_last_valid_one() -> None:
    """In steps of 32, one at least."""
    count = np.zeros((320, 320), np.uint16)
    assert occupied_cells(count) == (32, 32)
    count[70, 3] = count[2, 159] = 1
    assert occupied_cells(count) == (96, 160)
    count[5, 160] = 1
    assert occupied_cells(count) == (96, 192)

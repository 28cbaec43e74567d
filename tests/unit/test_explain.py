"""An explanation says what the network did, checked against leaving out and against captum."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from triage.backends import open_backend
from triage.errors import ConfigError, DecodeError
from triage.nets.model import Model, load_model, save_model
from triage.nets.scorer import Scorer
from triage.nets.spot_features import spot_features
from triage.nets.triagenet import Features, TriageNet
from triage.records import Frame, Recipe, Series
from triage.training.explain import candidate_evidence, explain, grad_cam
from triage.training.train import HEADS


def untrained() -> TriageNet:
    torch.manual_seed(5)
    return TriageNet(HEADS, radial_bins=Recipe().radial_bins).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    card = {
        "recipe": Recipe(),
        "thresholds": {"p_blank_veto": 0.5},
        "calibration": {"blank": (2.0, 0.5)},
    }
    save_model(folder, untrained(), "test", card)
    return load_model(folder)


def image() -> NDArray[np.uint16]:
    made = np.random.default_rng(2).poisson(1.0, (300, 400)).astype(np.uint16)
    for i in range(8):
        made[29 + 30 * i : 32 + 30 * i, 39 + 40 * i : 42 + 40 * i] += 10
        made[30 + 30 * i, 40 + 40 * i] += 60
    return made


def frame(payload: bytes | None = None) -> Frame:
    made = image()
    return Frame(
        series=Series(),
        image_id=0,
        dtype=made.dtype,
        shape=made.shape,
        payload=made.tobytes() if payload is None else payload,
    )


def features(net: TriageNet) -> tuple[Features, torch.Tensor, torch.Tensor]:
    backend = open_backend("cpu")
    views = backend.prepare([frame()])
    close_ups = backend.close_ups([frame()], views, [0])
    found = net.features(
        torch.from_numpy(views.overview),
        torch.from_numpy(views.radial),
        torch.tensor([float(views.bin_factor[0])]),
    )
    spots = torch.from_numpy(spot_features(close_ups))
    return found, torch.from_numpy(close_ups.tiles), spots


def test_the_scores_are_those_of_the_scorer(model: Model) -> None:
    """An explanation of other numbers would explain nothing."""
    backend = open_backend("cpu")
    views = backend.prepare([frame()])
    scorer = Scorer(model)
    close_ups = backend.close_ups([frame()], views, [0])
    expected = scorer.full(views, close_ups, [0], scorer.fast(views))[0]
    found = explain(model, backend, frame())
    assert repr(found.scores) == repr(expected)
    assert found.vetoed == (expected.p_blank >= 0.5)
    assert f"p_blank {expected.p_blank:.4g}," in found.as_text()
    assert "rotation" not in found.as_text()
    assert "not scored" in found.as_text()  # ice, without geometry
    assert not found.has_geometry


def test_the_places_are_in_the_frame_and_hold_the_spots(model: Model) -> None:
    """Each of the eight spots is among the cells that were looked at; the first tile has one."""
    found = explain(model, open_backend("cpu"), frame())
    k = found.cell_px
    looked = set(zip((found.cell_y * k).tolist(), (found.cell_x * k).tolist(), strict=True))
    for i in range(8):
        y, x = 30 + 30 * i, 40 + 40 * i
        assert any(abs(cy - y) <= k and abs(cx - x) <= k for cy, cx in looked)
    (ty, tx), side = found.tile_px[0], found.tile_side_px
    assert any(ty <= 30 + 30 * i < ty + side and tx <= 40 + 40 * i < tx + side for i in range(8))
    assert found.level.shape == found.attention.shape
    assert (found.attention >= 0).all()
    assert found.attention.max() <= 1.0
    assert (np.diff(found.evidence) <= 0).all()


def test_the_spots_are_those_of_the_list_and_count_for_what_the_model_takes_them(
    model: Model,
) -> None:
    """Eight were drawn. An untrained judge takes each for a crystal's, one that is sure of the
    contrary none."""
    found = explain(model, open_backend("cpu"), frame())
    drawn = [(30.5 + 30 * i, 40.5 + 40 * i) for i in range(8)]
    places = list(zip(found.spot_y_px.tolist(), found.spot_x_px.tolist(), strict=True))
    for y, x in drawn:
        assert any(abs(at - y) < 1 and abs(across - x) < 1 for at, across in places[:8])
    n = len(places)
    assert found.spot_log_odds.tolist() == [1.0] * n
    assert f"{n} spots are listed, {n} of them look like" in found.as_text()
    net = copy.deepcopy(model.net)
    torch.nn.init.constant_(net.judge.last.bias, -1.0)
    unlike = explain(replace(model, net=net), open_backend("cpu"), frame())
    assert f"{n} spots are listed, 0 of them look like" in unlike.as_text()


def test_evidence_is_what_leaving_one_cell_out_changes() -> None:
    """By hand for the first, a middle and the last cell."""
    net = untrained()
    with torch.inference_mode():
        found, _, _ = features(net)
        at, rise, bare = candidate_evidence(net, found)
        cells, places = found.evidence.candidates, found.evidence.places[0].tolist()

        def logit(candidates: torch.Tensor) -> float:
            answers = net.members(found.counts, candidates, net.rings(found.ring_planes))
            return float(answers["blank"].mean())

        whole = logit(cells)
        assert bare == pytest.approx(logit(torch.zeros_like(cells)), abs=1e-6)
        for number in (0, len(at) // 2, len(at) - 1):
            without = cells.clone()
            without[0, places.index(at[number])] = 0.0
            assert rise[number] == pytest.approx(logit(without) - whole, abs=1e-5)


def test_attention_is_the_gradient_weighted_sum_of_the_last_maps() -> None:
    """The same by finite differences: each channel's weight from moving the whole channel."""
    net = untrained().double()
    single, tiles, spots = features(untrained())
    found = Features(
        evidence=type(single.evidence)(
            planes=single.evidence.planes.double(),
            counts=single.evidence.counts.double(),
            candidates=single.evidence.candidates.double(),
            places=single.evidence.places,
        ),
        share=single.share.double(),
        counts=single.counts.double(),
        ring_planes=single.ring_planes.double(),
    )
    attention, maps = grad_cam(net, found, tiles.double(), spots.double(), "d_vis_angstrom")
    block = maps["block"]
    step, weights = 1e-6, []
    for channel in range(len(block)):
        moved = []
        for sign in (-1.0, 1.0):

            def push(
                module: torch.nn.Module,
                inputs: object,
                output: torch.Tensor,
                channel: int = channel,
                sign: float = sign,
            ) -> torch.Tensor:
                pushed = output.clone()
                pushed[:, channel] += sign * step
                return pushed

            handle = net.block.register_forward_hook(push)
            with torch.no_grad():
                answers = net.full(found, tiles.double(), spots.double())
                moved.append(float(answers["d_vis_angstrom"][0, 0]))
            handle.remove()
        # Moving a channel by h moves the answer by h times the sum of its gradient.
        weights.append((moved[1] - moved[0]) / (2 * step) / block[channel].size)
    cam = np.maximum(np.tensordot(np.array(weights), block, 1), 0.0)
    scale = attention.shape[0] // cam.shape[0]
    if cam.max() > 0:
        cam /= cam.max()
    assert np.allclose(attention[::scale, ::scale], cam, atol=1e-3)
    assert not np.allclose(attention, attention.mean())


def test_what_cannot_be_explained_is_an_error(model: Model) -> None:
    """An unknown head, one of the fast exit, a frame that does not decode."""
    backend = open_backend("cpu")
    for head in ("nonsense", "blank"):
        with pytest.raises(ConfigError, match="multilattice"):
            explain(model, backend, frame(), head)
    with pytest.raises(DecodeError):
        explain(model, backend, frame(b"short"))


def test_the_command_leaves_pictures_and_says_why(tmp_path: Path, model: Model) -> None:
    """On a TIFF; a frame that is not there is an error that says how many are."""
    pytest.importorskip("matplotlib", reason="pictures need the extra 'train'")
    import fabio
    from typer.testing import CliRunner

    from triage.cli import app

    fabio.tifimage.TifImage(data=image()).write(str(tmp_path / "a.tif"))
    save_model(
        tmp_path / "model",
        untrained(),
        "test",
        {"recipe": Recipe(), "thresholds": {"p_blank_veto": 0.5}, "calibration": {}},
    )
    arguments = ["explain", str(tmp_path / "a.tif"), "--model", str(tmp_path / "model")]
    arguments += ["--out", str(tmp_path / "out")]
    answer = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    assert answer.stdout.startswith("verdict ")
    assert (tmp_path / "out" / "explanation.txt").read_text() == answer.stdout
    for name in ("frame", "feature_maps", "filters"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    from triage.errors import UnreadableFile

    with pytest.raises(UnreadableFile, match="it holds 1"):
        CliRunner().invoke(app, [*arguments, "--frame", "7"], catch_exceptions=False)
    assert math.isfinite(float(answer.stdout.split("p_blank ")[1].split(",")[0]))

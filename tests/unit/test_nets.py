"""Network, model files and scorer."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from triage.backends import open_backend
from triage.errors import ModelError
from triage.nets.model import Model, load_model, save_model
from triage.nets.scorer import Scorer
from triage.nets.triagenet import TriageNet
from triage.records import NOT_SCORED, Frame, Geometry, Recipe, Series
from triage.training.train import HEADS, head_loss

GEOMETRY = Geometry(
    beam_center_x_px=150.0,
    beam_center_y_px=120.0,
    pixel_size_x_m=75e-6,
    pixel_size_y_m=75e-6,
    detector_distance_m=0.02,
    incident_wavelength_angstrom=1.0,
)


def untrained() -> TriageNet:
    torch.manual_seed(0)
    return TriageNet(HEADS, radial_bins=Recipe().radial_bins).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    save(folder)
    return load_model(folder)


def save(folder: Path) -> str:
    return save_model(
        folder,
        untrained(),
        "test",
        {"recipe": Recipe(), "thresholds": {"p_blank_veto": 0.5}, "calibration": {}},
    )


def frames(n: int, *, geometry: Geometry | None = GEOMETRY) -> list[Frame]:
    rng = np.random.default_rng(2)
    made = []
    for i in range(n):
        shape = (240 + 40 * i, 300 + 17 * i)
        image = rng.poisson(0.5 + i, shape).astype(np.uint16)
        image[rng.integers(shape[0], size=20), rng.integers(shape[1], size=20)] += 60
        made.append(
            Frame(
                series=Series(geometry=geometry),
                image_id=i,
                dtype=image.dtype,
                shape=shape,
                payload=image.tobytes(),
            )
        )
    return made


def scored(model: Model, batch: list[Frame]) -> list[Any]:
    backend, scorer = open_backend("cpu"), Scorer(model)
    views = backend.prepare(batch)
    fast = scorer.fast(views)
    rows = [i for i, error in enumerate(views.errors) if error is None]
    return scorer.full(views, backend.tiles(batch, views, rows), rows, fast)


def test_scores_do_not_depend_on_the_batch(model: Model) -> None:
    """Alone, first, last or among others: the same bits."""
    batch = frames(5)
    together = scored(model, batch)
    for i in range(5):
        (alone,) = scored(model, [batch[i]])
        assert repr(alone) == repr(together[i])
    backwards = scored(model, batch[::-1])[::-1]
    assert repr(backwards) == repr(together)


def test_padding_changes_nothing_but_the_last_bits() -> None:
    """A frame cut to its cells and the same frame on the whole grid score alike."""
    net = untrained()
    views = open_backend("cpu").prepare(frames(1))
    whole = torch.from_numpy(views.overview)
    radial, k = torch.from_numpy(views.radial), torch.tensor([2.0])
    with torch.inference_mode():
        cut = net.fast(*net.features(whole[:, :, :128, :160], radial, k))
        full = net.fast(*net.features(whole, radial, k))
    for name in cut:
        assert torch.allclose(cut[name], full[name], atol=1e-4)


def test_ice_is_not_scored_without_geometry(model: Model) -> None:
    """NaN, and the other heads are there all the same."""
    (score,) = scored(model, frames(1, geometry=None))
    assert math.isnan(score.p_ice)
    assert 0.0 <= score.p_blank <= 1.0
    assert score.mosaicity_deg > 0.0
    assert 1.0 <= score.n_lattices <= 4.0


def test_a_frame_that_was_not_prepared_is_not_scored(model: Model) -> None:
    """Its neighbours are."""
    good = frames(1)[0]
    bad = replace(good, payload=b"short")
    first, second = scored(model, [bad, good])
    assert first is NOT_SCORED
    assert math.isfinite(second.p_blank)


def test_a_network_that_gives_nan_gives_no_score(model: Model) -> None:
    """NaN weights must not veto."""
    net = untrained()
    with torch.no_grad():
        net.outs["blank"].bias.fill_(math.nan)
    broken = Model(net=net, card=model.card)
    backend = open_backend("cpu")
    assert Scorer(broken).fast(backend.prepare(frames(1))) == [NOT_SCORED]


def test_the_fast_exit_is_small() -> None:
    """Under 3 million parameters, and about 0.1 GMAC on the largest grid."""
    net = untrained()
    assert sum(p.numel() for p in net.parameters()) < 3_000_000
    macs = 0

    def count(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal macs
        if isinstance(module, torch.nn.Conv2d):
            kernel = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
            macs += output.numel() * kernel
        elif isinstance(module, torch.nn.Linear):
            macs += output.numel() * module.in_features

    for module in net.modules():
        module.register_forward_hook(count)
    with torch.inference_mode():
        net.fast(*net.features(torch.zeros(1, 3, 320, 320), torch.zeros(1, 3, 8, 160),
                               torch.ones(1)))  # fmt: skip
    assert macs < 130e6


def test_a_model_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    """Weights, heads and thresholds; the name carries the weights' hash."""
    model_id = save(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.card.model_id == model_id
    assert loaded.card.heads == HEADS
    for name, value in untrained().state_dict().items():
        assert torch.equal(loaded.net.state_dict()[name], value)


def edit(folder: Path, **fields: Any) -> None:
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | fields))


def test_models_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    """Other weights, another recipe, another format, no card."""
    save(tmp_path)
    with pytest.raises(ModelError, match=r"card\.json"):
        load_model(tmp_path / "nowhere")
    weights = tmp_path / "weights.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ModelError, match="weights are not those"):
        load_model(tmp_path)
    weights.write_bytes(good)
    edit(tmp_path, recipe_fingerprint="0" * 16)
    with pytest.raises(ModelError, match="recipe"):
        load_model(tmp_path)
    save(tmp_path)
    edit(tmp_path, format=99)
    with pytest.raises(ModelError, match="format"):
        load_model(tmp_path)
    (tmp_path / "card.json").write_text("[]")
    with pytest.raises(ModelError, match="not a model card"):
        load_model(tmp_path)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.name)
def test_the_loss_of_a_perfect_answer_is_small(head: Any) -> None:
    """For each kind of head the right raw output costs less than a wrong one."""
    label = {"mosaicity_deg": 0.5, "quality": 3.0, "n_lattices": 2.0, "d_vis_angstrom": 2.0}.get(
        head.name, 1.0
    )
    labels = torch.tensor([label])
    if head.kind == "binary":
        right = torch.tensor([[8.0]])
    elif head.kind == "ordinal":
        steps = torch.arange(1, head.levels) + head.first - 0.5
        right = torch.where(labels[:, None] > steps, 8.0, -8.0)
    else:
        raw = math.log(label) if head.transform == "log" else label**-2
        right = torch.tensor([[raw]])
    assert head_loss(head, right, labels) < 1e-2
    assert head_loss(head, -right - 2.0, labels) > 0.1


def test_the_shipped_model_loads_and_may_enforce() -> None:
    """It is small, made for this recipe, and validated on crystals it never saw."""
    card = load_model().card
    assert card.recipe == Recipe()
    assert {"blank", "ice", "multilattice", "mosaicity_deg"} <= {h.name for h in card.heads}
    assert card.validation["hits"] > 0
    assert card.validation["threshold"] == card.thresholds["p_blank_veto"]
    assert card.training["command"]
    folder = Path(__file__).resolve().parents[2] / "triage" / "nets" / "default"
    assert sum(p.stat().st_size for p in folder.iterdir()) < 20e6


def test_naming_the_package_imports_no_torch() -> None:
    """Only the scorer needs it."""
    code = "import sys, triage.nets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

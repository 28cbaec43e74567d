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
from msgspec import structs
from numpy.typing import NDArray

from triage.backends import open_backend
from triage.errors import ModelError
from triage.nets.model import Model, load_model, save_model
from triage.nets.scorer import Scorer
from triage.nets.triagenet import (
    RING_WIDTHS,
    SIGMA_SCALE,
    TriageNet,
    _box,
    _expanded,
    _Ranks,
    evidence,
)
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
    return scorer.full(views, backend.close_ups(batch, views, rows), rows, fast)


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
        cut = net.fast(net.features(whole[:, :, :128, :160], radial, k))
        full = net.fast(net.features(whole, radial, k))
    for name in cut:
        assert torch.allclose(cut[name], full[name], atol=1e-4)


def test_ice_and_resolution_are_not_scored_without_geometry(model: Model) -> None:
    """NaN, and the other heads are there all the same."""
    (score,) = scored(model, frames(1, geometry=None))
    assert math.isnan(score.p_ice)
    assert math.isnan(score.d_vis_angstrom)
    assert 0.0 <= score.p_blank <= 1.0
    assert score.mosaicity_deg > 0.0
    assert 1.0 <= score.n_lattices <= 4.0


def test_a_frame_that_was_not_prepared_is_not_scored(model: Model) -> None:
    """Its neighbours are."""
    good = frames(1)[0]
    bad = structs.replace(good, payload=b"short")
    first, second = scored(model, [bad, good])
    assert first is NOT_SCORED
    assert math.isfinite(second.p_blank)


def test_a_network_that_gives_nan_gives_no_score(model: Model) -> None:
    """NaN weights must not veto."""
    net = untrained()
    with torch.no_grad():
        net.counts_mean.fill_(math.nan)
    broken = Model(net=net, card=model.card)
    backend = open_backend("cpu")
    assert Scorer(broken).fast(backend.prepare(frames(1))) == [NOT_SCORED]


def test_the_fast_exit_is_small() -> None:
    """Under 3 million parameters; what is learned costs the fast exit under 10 million MACs."""
    net = untrained()
    assert sum(p.numel() for p in net.parameters()) < 3_000_000
    macs = 0

    def count(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal macs
        if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d):
            macs += output.numel() * module.in_channels * math.prod(module.kernel_size)
        elif isinstance(module, torch.nn.Linear):
            macs += output.numel() * module.in_features

    for module in net.modules():
        module.register_forward_hook(count)
    with torch.inference_mode():
        net.fast(net.features(torch.zeros(1, 3, 320, 320), torch.zeros(1, 5, 8, 160),
                              torch.full((1,), 4.0)))  # fmt: skip
    assert 1e6 < macs < 1e7


@pytest.mark.parametrize("reach", [1, 4, 8])
def test_the_fast_window_sum_is_the_plain_one(reach: int) -> None:
    """Sums of sums against one addition per cell of the window."""
    x = np.random.default_rng(1).integers(0, 50, (2, 1, 23, 37)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (0, 0), (reach, reach), (reach, reach)))
    side = 2 * reach + 1
    plain = sum(
        padded[:, :, dy : dy + 23, dx : dx + 37] for dy in range(side) for dx in range(side)
    )
    assert np.array_equal(_box(torch.from_numpy(x), reach).numpy(), plain)


def mapped(image: NDArray[np.uint16]) -> NDArray[np.float32]:
    """(11, 256, 256) maps of one frame, in sigma."""
    frame = Frame(series=Series(), image_id=0, dtype=image.dtype, shape=image.shape,
                  payload=image.tobytes())  # fmt: skip
    views = open_backend("cpu").prepare([frame])
    found = evidence(torch.from_numpy(views.overview), torch.tensor([float(views.bin_factor[0])]))
    return _expanded(found.planes[0, :11, :256, :256]).numpy()


def noise() -> NDArray[np.uint16]:
    """512 x 512 pixels of two photons: 256 x 256 cells of 2 x 2."""
    return np.random.default_rng(3).poisson(2.0, (512, 512)).astype(np.uint16)


def test_a_spot_stands_out_in_every_map() -> None:
    """42 photons in a cell where 8 are expected: 2 (sqrt(42.4) - sqrt(8.4)) = 7.2 sigma.

    Without the brightest of its pixels 18 are left, of 6: 2 (sqrt(18.4) - sqrt(6.4)) = 3.5 sigma,
    and somewhat less in units of the frame's scatter, as every cell has lost its brightest pixel.
    """
    image = noise()
    image[200:202, 300:302] = 6
    image[201, 300] = 24
    found = mapped(image)[:, 100, 150]
    assert (found > 1.5).all()
    assert found[3] == pytest.approx(7.2, abs=0.3)
    assert 2.5 < found[1] < 3.5


def test_a_hot_pixel_is_no_spot() -> None:
    """It stands far out as a maximum; what is left of its cell does not."""
    image = noise()
    image[201, 301] = 500
    maximum, rest, both, whole = mapped(image)[:4, 100, 150]
    assert maximum > 20.0
    assert whole > 20.0
    assert rest < 2.0
    assert both < 2.0


def test_a_ring_is_no_spot() -> None:
    """A ring of twice the background stands out along it; no cell of it over its neighbours."""
    image = noise()
    y, x = np.ogrid[:512, :512]
    on_ring = np.abs(np.hypot(y - 256, x - 256) - 150.0) < 2.0
    image[on_ring] += np.random.default_rng(4).poisson(8.0, int(on_ring.sum())).astype(np.uint16)
    planes = mapped(image)
    inside = on_ring.reshape(256, 2, 256, 2).all((1, 3))
    whole, blob = planes[3][inside], planes[4][inside]
    assert np.median(whole) > 2.5
    assert np.median(blob) < 0.5
    # No more cells pass for a blob than a fifth of those that stand out.
    assert (blob > 2.5).sum() < 0.2 * (whole > 2.5).sum()


def ring_channels(mean: NDArray[Any], pixels: NDArray[Any]) -> list[tuple[Any, Any, Any]]:
    """For each width (sigma, chi2 of the sectors over the frame's, ratio), (bins) each."""
    with torch.no_grad():
        parts = [torch.from_numpy(each.astype(np.float32))[None] for each in (mean, pixels)]
        found = untrained().rings._in_sigma(*parts)[0]
    sigma = _expanded(found[0::3] / SIGMA_SCALE).numpy()
    disagreement, ratio = torch.expm1(found[1::3]).numpy(), (found[2::3] / 4.0).numpy()
    return list(zip(sigma, disagreement, ratio, strict=True))


def by_least_squares(
    mean: NDArray[Any], pixels: NDArray[Any], at: int, core: int, reach: int
) -> tuple[float, float, float]:
    """Excess, variance and mean of the window of one bin of one sector (bins)."""
    near = np.arange(max(at - reach, 0), min(at + reach + 1, mean.size))
    near = near[pixels[near] > 0]
    beside, inside = near[np.abs(near - at) > core], near[np.abs(near - at) <= core]
    n, m = pixels[beside], pixels[inside]
    design = np.stack([(beside - at) ** power for power in range(3)], 1).astype(float)
    solve = np.linalg.inv(design.T @ (n[:, None] * design)) @ (design * n[:, None]).T
    middle = np.array([(m * (inside - at) ** power).sum() / m.sum() for power in range(3)])
    weights = middle @ solve  # of the bins beside the core
    level = ((pixels * mean)[near].sum() + 1.0) / (pixels[near].sum() + 1.0)
    excess = (m * mean[inside]).sum() / m.sum() - weights @ mean[beside]
    return float(excess), float(level * (1.0 / m.sum() + (weights**2 / n).sum())), float(level)


def test_a_ring_over_a_flat_background_stands_out_by_its_sigma() -> None:
    """Ten counts in each of 100 pixels, one more in a ring of one bin that eight sectors see.

    Beside the core lie the places +-1/4 .. +-1, whose mean square is a2 = 15/32 and mean fourth
    power a4 = 177/512. A parabola's value in the middle has the variance of a mean of the 800
    pixels there, times a4 / (a4 - a2^2) = 118/43.
    """
    mean, pixels = np.full((8, 160), 10.0), np.full((8, 160), 100.0)
    mean[:, 80] += 1.0
    sigma, disagreement, ratio = ring_channels(mean, pixels)[0]
    level = (9000.0 + 100.0 + 1.0) / 901.0
    variance = level * (1.0 / 100.0 + 118.0 / 43.0 / 800.0) / 8.0
    assert sigma[80] == pytest.approx(1.0 / math.sqrt(variance), rel=1e-3)
    assert ratio[80] == pytest.approx(1.0 / level, rel=1e-3)
    assert np.abs(sigma[:76]).max() < 1e-3
    assert disagreement.max() < 1e-3


@pytest.mark.parametrize("width", range(len(RING_WIDTHS)))
def test_a_background_that_bends_is_no_ring(width: int) -> None:
    """A parabola of a million counts a bin, where pixels are missing too, leaves nothing over."""
    rng = np.random.default_rng(2)
    at = np.arange(160) / 160.0
    pixels = np.where(rng.random((8, 160)) < 0.2, 0.0, rng.integers(100, 3000, (8, 160)))
    mean = (1500.0 - 2000.0 * at + 900.0 * at**2) * (pixels > 0)
    sigma, _, _ = ring_channels(mean, pixels)[width]
    assert np.abs(sigma).max() < 0.05


@pytest.mark.parametrize("width", range(len(RING_WIDTHS)))
def test_sectors_weigh_by_their_variance(width: int) -> None:
    """The description's numbers are those of least squares, sector by sector."""
    rng = np.random.default_rng(3)
    core, reach = RING_WIDTHS[width]
    pixels = np.where(rng.random((8, 160)) < 0.1, 0, rng.integers(20, 400, (8, 160)))
    pixels[1] = 0
    expected = 3.0 + 0.02 * np.arange(160)
    mean = rng.poisson(expected * pixels) / np.maximum(pixels, 1)
    found = ring_channels(mean, pixels)
    for at in (20, 90, 150):
        seen = [
            by_least_squares(mean[s], pixels[s], at, core, reach)
            for s in range(8)
            if pixels[s, max(at - core, 0) : at + core + 1].any()
        ]
        excess, variance, level = np.array(seen).T
        weight = 1.0 / variance
        together = (weight * excess).sum() / weight.sum()
        chi2 = (weight * (excess - together) ** 2).sum() / (len(seen) - 1)
        # The frame's scatter divides both; of Poisson's noise it is about 1.
        sigma, disagreement, ratio = (each[at] for each in found[width])
        assert ratio == pytest.approx(
            (weight * excess).sum() / (weight * level).sum(), rel=1e-3, abs=1e-6
        )
        scatter = chi2 / disagreement
        assert 1.0 <= scatter < 1.4
        assert sigma * math.sqrt(scatter) == pytest.approx(
            together * math.sqrt(weight.sum()), rel=1e-2, abs=1e-3
        )


@pytest.mark.parametrize("gain", [1.0, 9.0])
def test_sigma_is_that_of_the_frames_own_noise(gain: float) -> None:
    """Counts of a detector with so many for a photon scatter by its root more than Poisson's."""
    rng = np.random.default_rng(4)
    pixels = np.full((8, 160), 500.0)
    mean = gain * rng.poisson(5.0 * pixels) / pixels
    for sigma, _, _ in ring_channels(mean, pixels):
        assert 0.8 < sigma[10:150].std() < 1.2


def test_where_no_parabola_can_be_drawn_nothing_is_said() -> None:
    """At the ends, where bins lie to one side only, and where nothing is seen."""
    mean, pixels = np.full((8, 160), 10.0), np.full((8, 160), 100.0)
    mean[:, 0] = mean[:, 159] = 100.0
    pixels[:, 70:100] = 0.0
    mean[:, 70:100] = 0.0
    for sigma, disagreement, ratio in ring_channels(mean, pixels):
        for each in (sigma, disagreement, ratio):
            assert not each[[0, 159]].any()
            assert not each[74:96].any()


def test_candidates_are_the_cells_that_stand_out_with_what_is_around() -> None:
    """The first is the spot; its 3 x 3 of the maximum's map is that of the planes."""
    image = noise()
    image[200:203, 300:303] += 60
    frame = Frame(series=Series(), image_id=0, dtype=image.dtype, shape=image.shape,
                  payload=image.tobytes())  # fmt: skip
    views = open_backend("cpu").prepare([frame])
    found = evidence(torch.from_numpy(views.overview), torch.tensor([2.0]))
    planes, first = found.planes[0].numpy(), found.candidates[0, 0].numpy()
    places = [(y, x) for y in (100, 101) for x in (150, 151)]
    matching = [(y, x) for y, x in places if np.array_equal(planes[:, y, x], first[:12])]
    assert len(matching) == 1
    ((y, x),) = matching
    assert np.array_equal(first[12:21].reshape(3, 3), planes[0, y - 1 : y + 2, x - 1 : x + 2])
    # Cells that stand out little are none.
    quiet = evidence(torch.zeros(1, 3, 64, 64), torch.tensor([2.0]))
    assert not quiet.candidates.any()


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


def test_a_head_may_read_only_what_there_is(tmp_path: Path) -> None:
    """A part of no known name, none at all, and what convolutions saw where there are none."""
    save_model(
        tmp_path,
        TriageNet(HEADS, radial_bins=Recipe().radial_bins, convolutions=False),
        "test",
        {"recipe": Recipe(), "thresholds": {"p_blank_veto": 0.5}},
    )
    heads = json.loads((tmp_path / "card.json").read_text())["heads"]
    load_model(tmp_path)
    for reads in (["spots", "colour"], [], ["seen"]):
        edit(tmp_path, heads=[*heads[:-1], heads[-1] | {"reads": reads}])
        with pytest.raises(ModelError, match="reads"):
            load_model(tmp_path)


def test_numbers_are_read_as_their_ranks_among_the_hits() -> None:
    """Among 0 to 1600, and among 1 with 1, 1, 1 and 5: half way up is the middle, equal numbers
    share the middle of their ranks, and what lies outside counts as the outermost."""
    hits = torch.zeros((1601, 3))
    hits[:, 0] = torch.arange(1601.0)
    hits[:, 1] = 1.0
    hits[1201:, 1] = 5.0
    ranks = _Ranks(3)
    ranks.learn(hits)
    asked = torch.tensor([[800.0, 1.0, 0.0], [1200.0, 5.0, 7.0], [-9.0, 0.0, 0.0], [2e9, 9.0, 0.0]])
    # Of the 17 quantiles of the second number 13 are 1 and 4 are 5.
    share = [[0.5, 6 / 16], [0.75, 14.5 / 16], [0.0, 6 / 16], [1.0, 14.5 / 16]]
    wanted = torch.tensor([[math.sqrt(12.0) * (s - 0.5) for s in row] for row in share])
    torch.testing.assert_close(ranks(asked)[:, :2], wanted, rtol=1e-5, atol=1e-6)
    assert len({*ranks(asked)[:, 2].tolist()}) == 1
    knots, steepness, rises = map(torch.from_numpy, ranks.steps())
    part = ((asked[:, :, None] - knots) * steepness).clamp(0.0, 1.0)
    summed = ranks.ranks[:, 0] + (part * rises).sum(2)
    torch.testing.assert_close(summed, ranks(asked), rtol=1e-5, atol=1e-5)


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
    assert card.recipe == replace(Recipe(), tiles=8 if card.convolutions else 0)
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

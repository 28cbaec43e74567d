"""The simulator against closed forms and an independent program."""

from __future__ import annotations

import ast
import csv
import itertools
import math
from dataclasses import replace
from pathlib import Path

import h5py
import hdf5plugin  # noqa: F401 - registers the filters
import numpy as np
import pytest

from simulators.diffraction import Camera, draw_spec, render, write_shards
from simulators.diffraction.crystals import (
    CELLS,
    drawn_cell,
    random_rotation,
    reciprocal_axes,
    reflections,
)
from simulators.diffraction.frames import FrameSpec, _turn
from simulators.diffraction.poisson import poisson

CAMERA = Camera(family="eiger", shape=(400, 500), pixel_m=75e-6)


def test_cells_give_their_own_edges_back() -> None:
    """The inverse of the reciprocal axes has the cell's edges and angles."""
    for cell in CELLS:
        direct = np.linalg.inv(reciprocal_axes(cell)).T
        lengths = np.linalg.norm(direct, axis=1)
        assert lengths == pytest.approx(cell.edges_angstrom, rel=1e-9)
        cosines = [
            direct[i] @ direct[j] / lengths[i] / lengths[j] for i, j in ((1, 2), (0, 2), (0, 1))
        ]
        assert np.degrees(np.arccos(cosines)) == pytest.approx(cell.angles_deg, abs=1e-6)


def test_drawn_cells_are_of_every_kind_and_none_that_is_held_out() -> None:
    """Every lattice and angle occurs; volume over reach cubed stays within what frames can hold;
    and the edges of no held-out cell, in any order, are all met within a twentieth."""
    rng = np.random.default_rng(3)
    for small, low, high in ((False, 30.0, 320.0), (True, 4.5, 18.0)):
        cells = [drawn_cell(rng, small=small) for _ in range(600)]
        assert {cell.centring for cell in cells} == {"P", "C", "I", "F"}
        oblique = [sum(angle != 90.0 for angle in cell.angles_deg) for cell in cells]
        assert set(oblique) == {0, 1, 3}
        assert {len(set(cell.edges_angstrom)) for cell in cells} == {1, 2, 3}
        for cell in cells:
            a, b, c = cell.edges_angstrom
            assert low <= min(a, b, c) <= max(a, b, c) <= high
            ca, cb, cg = np.cos(np.radians(cell.angles_deg))
            volume = a * b * c * math.sqrt(1 - ca**2 - cb**2 - cg**2 + 2 * ca * cb * cg)
            assert volume / cell.d_min_angstrom**3 < 2.0001e5
            for other in (known for known in CELLS if known.held_out):
                apart = np.sort(cell.edges_angstrom) / np.sort(other.edges_angstrom)
                assert np.abs(apart - 1.0).max() > 0.047


def test_reflections_obey_bragg_and_the_centring() -> None:
    """Each beam leaves at twice the Bragg angle of its hkl; an I cell has h + k + l even."""
    cell = next(c for c in CELLS if c.centring == "I")
    wavelength = 1.0
    axes = reciprocal_axes(cell) @ random_rotation(np.random.default_rng(1)).T
    found = reflections(
        axes, centring="I", wavelength_angstrom=wavelength, d_min_angstrom=2.0,
        mosaicity_fwhm_deg=0.05, domain_angstrom=5000.0, bandwidth=1e-4, divergence_rad=1e-4,
    )  # fmt: skip
    assert len(found.hkl) > 50
    assert (found.hkl.sum(1) % 2 == 0).all()
    d = 1.0 / np.linalg.norm(found.hkl @ axes, axis=1)
    two_theta = np.arccos(found.direction[:, 2])
    assert two_theta == pytest.approx(2 * np.arcsin(wavelength / (2 * d)), abs=2e-3)
    assert found.s_inverse_angstrom2 == pytest.approx(d**-2, rel=1e-9)


def test_no_reflection_in_reach_is_missed() -> None:
    """A search over every hkl finds the same ones near the sphere."""
    cell = next(c for c in CELLS if c.name == "glycine")
    axes = reciprocal_axes(cell) @ random_rotation(np.random.default_rng(2)).T
    found = reflections(
        axes, centring="P", wavelength_angstrom=0.9, d_min_angstrom=0.8,
        mosaicity_fwhm_deg=0.5, domain_angstrom=500.0, bandwidth=1e-3, divergence_rad=1e-3,
    )  # fmt: skip
    span = np.arange(-16, 17)
    hkl = np.array(np.meshgrid(span, span, span)).reshape(3, -1).T
    g = hkl @ axes
    length = np.linalg.norm(g, axis=1)
    s1 = g + np.array([0.0, 0.0, 1 / 0.9])
    miss = np.linalg.norm(s1, axis=1) - 1 / 0.9
    # Well inside the width that every reflection has at least.
    near = (length > 0) & (length < 1 / 0.8) & (np.abs(miss) < 5e-4) & (s1[:, 2] > 0)
    assert near.sum() >= 3
    assert {tuple(h) for h in hkl[near]} <= {tuple(h) for h in found.hkl}


def test_poisson_counts_have_the_mean_and_variance_of_poisson() -> None:
    """From sparse to strong, within five standard errors of 200,000 draws."""
    n = 200_000
    for mean in (0.003, 0.5, 4.0, 7.95, 12.1, 40.0, 300.0, 700.0):
        counts = poisson(np.full((n, 1), mean), 7)
        assert abs(counts.mean() - mean) < 5 * math.sqrt(mean / n)
        # The variance of a sample variance of n Poisson draws is about (2 m^2 + m) / n.
        assert abs(counts.var() - mean) < 5 * math.sqrt((2 * mean**2 + mean) / n)


def test_the_same_specification_gives_the_same_frame() -> None:
    """And another seed another one."""
    spec = draw_spec(np.random.default_rng(3), camera=CAMERA)
    first, second = render(spec), render(spec)
    assert first.image.tobytes() == second.image.tobytes()
    assert render(replace(spec, seed=spec.seed + 1)).image.tobytes() != first.image.tobytes()


def test_hits_show_about_as_many_spots_as_were_asked_for() -> None:
    """Visible spots stand out of the background where the truth says they are."""
    rng = np.random.default_rng(5)
    seen = 0
    while seen < 5:
        spec = draw_spec(rng, camera=CAMERA, blank_share=0.0, between_share=0.0)
        if spec.mean_background > 5:
            continue
        rendered = render(replace(spec, hot_pixels=0, tracks=0, shadow=0.0))
        if rendered.truth["n_visible"] < 10:
            continue
        seen += 1
        assert rendered.truth["blank"] == 0.0
        visible = rendered.reflections[rendered.reflections["snr"] > 5.0]
        assert len(visible) == rendered.truth["n_visible"] < len(rendered.reflections)
        x, y = visible["x_px"].astype(int), visible["y_px"].astype(int)
        at_spots = [
            rendered.image[max(0, b - 1) : b + 2, max(0, a - 1) : a + 2].max()
            for a, b in zip(x, y, strict=True)
        ]
        assert np.mean(at_spots) > 1.5 * np.median(rendered.image)


def test_a_hit_has_the_spots_that_were_wanted_and_none_in_full_shadow() -> None:
    """Exposure is set by count of visible spots; what a holder hides is not one of them."""
    rng = np.random.default_rng(15)
    checked = 0
    while checked < 4:
        spec = draw_spec(rng, camera=CAMERA, blank_share=0.0, between_share=0.0)
        spec = replace(spec, overexposure=1.0, shadow=1.0, spots_wanted=20.0, mean_background=0.5)
        spec = replace(spec, hot_pixels=0, tracks=0, tube_px=0.0, flare=0.0, smear=1.0)
        # A cell with many times as many reflections as are wanted.
        spec = replace(spec, cell=CELLS[2], wavelength_angstrom=1.0, mosaicity_deg=0.5)
        rendered = render(replace(spec, distance_m=0.1, beam_px=(250.0, 200.0)))
        checked += 1
        assert rendered.truth["n_visible"] == pytest.approx(20, abs=1)
        lit = np.flatnonzero(rendered.image.any(0))[-1] + 1
        assert lit < 0.96 * CAMERA.shape[1]
        assert rendered.reflections["x_px"].max() < lit


def test_a_flare_is_bright_at_the_beamstop_and_nowhere_else() -> None:
    """Fall-off 5 px and streaks of at most 80: nothing 8 times as far out, much at the rim."""
    camera = Camera(family="eiger", shape=(1600, 1600), pixel_m=75e-6)
    spec = FrameSpec(
        camera=camera,
        kind="blank",
        seed=3,
        wavelength_angstrom=1.0,
        distance_m=0.3,
        beam_px=(800.0, 800.0),
        mean_background=0.01,
        beamstop_px=20.0,
        arm_rad=math.nan,
    )
    plain = render(spec).image.astype(int)
    flared = render(replace(spec, flare=50.0, flare_px=5.0))
    y, x = np.ogrid[:1600, :1600]
    radius = np.hypot(y + 0.5 - 800, x + 0.5 - 800)
    image = flared.image.astype(int)
    assert flared.truth["blank"] == 1.0
    assert image[(radius > 20) & (radius < 30)].mean() > 1.0
    assert plain[(radius > 20) & (radius < 30)].mean() < 0.5
    assert image[radius < 18].mean() < 2.0
    assert image[radius > 670].mean() == pytest.approx(plain[radius > 670].mean(), rel=0.05)


def test_zingers_are_blurred_by_the_chip() -> None:
    """No pixel of a zinger holds all of its light; most hold a fifth to three fifths."""
    camera = Camera(family="ccd", shape=(1200, 1200), pixel_m=80e-6)
    spec = FrameSpec(
        camera=camera, kind="blank", seed=5, wavelength_angstrom=1.0, distance_m=0.2,
        beam_px=(600.0, 600.0), mean_background=0.0, zingers=200, zinger_sigma_px=0.35,
    )  # fmt: skip
    image = render(spec).image.astype(float)
    bright = np.argwhere(image > 200)
    bright = bright[((bright > 4) & (bright < 1195)).all(1)]
    assert len(bright) > 30
    shares = []
    for y, x in bright:
        around = image[y - 3 : y + 4, x - 3 : x + 4]
        if image[y, x] == around.max():
            shares.append(image[y, x] / around.sum())
    # A Gaussian of 0.35 pixels in the middle of a pixel leaves (2 Phi(0.5 / 0.35) - 1)^2 = 0.72.
    assert max(shares) < 0.75
    assert 0.2 < np.median(shares) < 0.6
    assert (image >= 0).all()


def test_blank_frames_have_no_spots_and_say_so() -> None:
    """Whatever else is on them."""
    rng = np.random.default_rng(6)
    for _ in range(10):
        rendered = render(draw_spec(rng, camera=CAMERA, blank_share=1.0))
        assert rendered.truth["blank"] == 1.0
        assert rendered.truth["n_visible"] == 0.0
        assert math.isnan(rendered.truth["mosaicity_deg"])


def test_shards_are_the_same_whoever_makes_them(tmp_path: Path) -> None:
    """One worker or two, at once or resumed: the same bytes of pixels and labels."""
    write_shards(tmp_path / "a", frames=5, seed=8, frames_per_shard=2, progress=False)
    write_shards(tmp_path / "b", frames=5, seed=8, frames_per_shard=2, workers=2, progress=False)
    (tmp_path / "b" / "shard_00001.h5").unlink()
    write_shards(tmp_path / "b", frames=5, seed=8, frames_per_shard=2, progress=False)
    for path in sorted((tmp_path / "a").glob("*.h5")):
        with h5py.File(path) as one, h5py.File(tmp_path / "b" / path.name) as two:
            assert one["data"][()].tobytes() == two["data"][()].tobytes()
            for name in one["labels"]:
                assert one["labels"][name][()].tobytes() == two["labels"][name][()].tobytes()
            for name in one["reflections"]:
                kept = one["reflections"][name][()]
                assert kept.tobytes() == two["reflections"][name][()].tobytes()
    with pytest.raises(ValueError, match="another folder"):
        write_shards(tmp_path / "a", frames=5, seed=9, frames_per_shard=2, progress=False)


def test_a_shard_tells_each_frames_reflections(tmp_path: Path) -> None:
    """As many visible ones as its label says, brighter than what is around them, none on blanks."""
    write_shards(tmp_path, frames=12, seed=3, frames_per_shard=12, progress=False)
    with h5py.File(tmp_path / "shard_00000.h5") as shard:
        first, snr = shard["reflections/first"][()], shard["reflections/snr"][()]
        visible = [int((snr[a:b] > 5.0).sum()) for a, b in itertools.pairwise(first)]
        wanted = shard["labels/n_visible"][()]
        # The last of those that were wanted lies on the bound, and floats are short.
        np.testing.assert_allclose(visible, wanted, atol=1)
        assert (snr > 1.5).all()
        assert first[-1] == len(snr) > wanted.sum() > 0
        assert (np.diff(first)[wanted == 0] == 0).all()
        ny, nx = shard["data"].shape[1:]
        assert shard["reflections/y_px"][()].max() < ny
        assert shard["reflections/x_px"][()].max() < nx


def test_presets_share_neither_crystal_nor_detector() -> None:
    """What is tested was never trained on."""
    from simulators.diffraction.cameras import CAMERAS

    for things in (CELLS, CAMERAS):
        trained = {
            (getattr(t, "name", ""), getattr(t, "shape", ())) for t in things if not t.held_out
        }
        tested = {(getattr(t, "name", ""), getattr(t, "shape", ())) for t in things if t.held_out}
        assert trained
        assert tested
        assert not trained & tested


@pytest.mark.shared
@pytest.mark.parametrize("number", ["00203", "00671", "01124", "01115"])
def test_spots_of_an_independent_simulator_are_where_ours_are(shared: Path, number: str) -> None:
    """nanoBragg frames: most of the brightest pixels lie within 1.5 px of our reflections, and
    few do when the crystal is turned by three degrees. Hot pixels are not masked there."""
    folder = shared / "nanobragg"
    with (folder / "labels.csv").open() as lines:
        rows = {row["file"]: row for row in csv.DictReader(lines)}
    row = rows[f"ref_{number}_master.h5"]
    # Their beam is along +x, fast along +z, slow along -y; ours along z, x and y.
    a = np.array(ast.literal_eval(row["A_matrix"])).reshape(3, 3)
    axes = np.column_stack([a[:, 2], -a[:, 1], a[:, 0]])
    with h5py.File(folder / row["file"]) as file:
        image = file["entry/data/data"][0].astype(float)
    image[image >= 65534] = 0.0
    ys, xs = np.unravel_index(np.argsort(image, axis=None)[-60:], image.shape)
    close = []
    for turn_deg in (0.0, 3.0):
        turned = axes @ _turn(np.array([0.6, 0.8, 0.0]), math.radians(turn_deg)).T
        found = reflections(
            turned,
            centring="P",
            wavelength_angstrom=float(row["wavelength_A"]),
            d_min_angstrom=2.2,
            mosaicity_fwhm_deg=float(row["mosaicity_fwhm_deg"]),
            domain_angstrom=700.0,
            bandwidth=float(row["dispersion_pct"]) / 235.5,
            divergence_rad=float(row["divergence_mrad"]) * 5e-4,
        )
        excited = found.partiality > 0.05
        forward = float(row["distance_mm"]) * 1e-3 / 75e-6
        towards = found.direction[excited]
        x = float(row["beam_x"]) + forward * towards[:, 0] / towards[:, 2]
        y = float(row["beam_y"]) + forward * towards[:, 1] / towards[:, 2]
        miss_px = np.array(
            [np.hypot(x - (i + 0.5), y - (j + 0.5)).min() for i, j in zip(xs, ys, strict=True)]
        )
        close.append(float((miss_px < 1.5).mean()))
    assert close[0] > 0.7
    assert close[1] < 0.3

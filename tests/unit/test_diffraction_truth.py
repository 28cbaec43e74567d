"""The simulator's labels, and its physics against closed forms and an independent program."""

from __future__ import annotations

import ast
import csv
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import hdf5plugin  # noqa: F401 - registers the filters
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import nnls

from simulators.diffraction import Camera, draw_spec, load_recipe, render
from simulators.diffraction.crystals import CELLS, random_rotation, reciprocal_axes, reflections
from simulators.diffraction.frames import (
    ICE_D_ANGSTROM,
    FrameSpec,
    _draw_spots,
    _ice_lines,
    _lattice_table,
    _turn,
    scatter,
)
from simulators.diffraction.truth import SPOT, crystal_truth, ice_truth

CAMERA = Camera(family="eiger", shape=(400, 500), pixel_m=75e-6)


def spots(n: int, lattice: int = 0, photons: float = 100.0) -> NDArray[np.void]:
    """Sharp spots of one lattice: 1 px wide, of no mosaicity."""
    rows = np.zeros(n, SPOT)
    rows["lattice"], rows["photons"], rows["s"] = lattice, photons, 0.1
    rows["own"] = rows["other"] = 1.0 / 2.355
    rows["ring"] = (0.0, 0.0, 300.0)
    return rows


def truth_of(
    *parts: NDArray[np.void], turn_deg: float = 10.0, mosaicity_deg: float = 0.1
) -> dict[str, float]:
    table = np.concatenate(parts)
    turned = _turn(np.array([0.0, 0.0, 1.0]), math.radians(turn_deg))
    return crystal_truth(
        table,
        np.full(len(table), 8.0),
        mosaicity_deg=mosaicity_deg,
        orientations=[np.eye(3), turned],
        background_photons=1.0,
    )


def test_a_second_lattice_counts_from_a_tenth_of_the_first() -> None:
    """In visible intensity; below a twentieth it is not there; in between nobody says."""
    for share, expected in ((0.11, 1.0), (0.07, math.nan), (0.04, 0.0)):
        second = spots(20, 1, photons=100.0 * share)
        found = truth_of(spots(20), second)
        assert found["multilattice"] == pytest.approx(expected, nan_ok=True)
        assert found["n_lattices"] == pytest.approx(1.0 + expected, nan_ok=True)
    # The stronger one is the first, whichever was drawn first.
    assert truth_of(spots(20, 0, 11.0), spots(20, 1))["multilattice"] == 1.0


def test_a_lattice_of_which_nothing_is_visible_is_no_lattice() -> None:
    """However far it is turned, and however little."""
    for turn_deg in (0.1, 10.0):
        found = truth_of(spots(20), turn_deg=turn_deg)
        assert found["multilattice"] == 0.0
        assert found["n_lattices"] == 1.0


def test_a_split_counts_where_it_can_be_seen() -> None:
    """300 px from the beam 0.1 degree is 0.52 px, 0.3 degree 1.6 px, of spots 1 px wide."""
    for turn_deg, mosaicity_deg, expected in (
        (0.3, 0.1, 1.0),
        (0.1, 0.02, math.nan),  # apart, but by less than the spot
        (0.3, 0.25, math.nan),  # between 1 and 1.5 mosaic widths
        (0.3, 0.4, 0.0),  # within the mosaic spread: one crystal
    ):
        found = truth_of(spots(20), spots(20, 1), turn_deg=turn_deg, mosaicity_deg=mosaicity_deg)
        assert found["multilattice"] == pytest.approx(expected, nan_ok=True)
    # Four spots of its own are too few to tell.
    assert math.isnan(truth_of(spots(20), spots(4, 1))["multilattice"])


def test_smear_counts_where_it_is_wider_than_the_spot() -> None:
    """By more than a pixel, on ten reflections."""
    for sigma_px, n, expected in ((0.5, 10, 1.0), (0.5, 9, math.nan), (0.3, 10, math.nan)):
        rows = spots(20)
        rows["smear"][:n] = sigma_px
        assert truth_of(rows)["multilattice"] == pytest.approx(expected, nan_ok=True)


def test_grades_go_by_visible_spots_and_light() -> None:
    """0 no light, 1 background, 2 from 10 spots, 3 from 40, 4 from 200; margins of 15 %."""
    for n, grade, margin in (
        (10, 2.0, 1.0), (12, 2.0, 0.0), (34, 2.0, 0.0), (35, 2.0, 1.0), (40, 3.0, 1.0),
        (47, 3.0, 0.0), (199, 3.0, 1.0), (200, 4.0, 1.0), (231, 4.0, 0.0), (5, math.nan, math.nan),
    ):  # fmt: skip
        found = truth_of(spots(n))
        assert found["quality"] == pytest.approx(grade, nan_ok=True)
        assert found["quality_margin"] == pytest.approx(margin, nan_ok=True)
        assert found["blank"] == pytest.approx(0.0 if n >= 10 else math.nan, nan_ok=True)
    for light, grade, margin in ((0.0, 0.0, 0.0), (0.0019, 0.0, 1.0), (0.003, 1.0, 0.0)):
        found = crystal_truth(
            spots(0), np.zeros(0), mosaicity_deg=0.1, orientations=[], background_photons=light
        )
        assert (found["blank"], found["quality"], found["quality_margin"]) == (1.0, grade, margin)


def test_mosaicity_is_measurable_on_thirty_spots_that_it_widens_most() -> None:
    """A pixel of mosaic broadening (FWHM), more than anything else, and no lattice close by."""
    rows = spots(40)
    rows["mosaic"][:30] = 1.01 / 2.355
    assert truth_of(rows)["mosaicity_measurable"] == 1.0
    rows["mosaic"][0] = 0.99 / 2.355
    assert truth_of(rows)["mosaicity_measurable"] == 0.0
    rows["mosaic"] = 2.0 / 2.355
    assert truth_of(rows)["mosaicity_measurable"] == 1.0
    assert truth_of(rows, spots(9, 1, 10.0), turn_deg=0.1)["mosaicity_measurable"] == 1.0
    assert truth_of(rows, spots(9, 1), turn_deg=0.1)["mosaicity_measurable"] == 0.0
    rows["other"] = 2.1 / 2.355
    assert truth_of(rows)["mosaicity_measurable"] == 0.0


def test_ice_is_present_from_five_sigma_and_bad_by_height() -> None:
    """Of a ring or of one grain; bad at 0.9 of the background or at half of saturation."""
    assert ice_truth(4.9, 4.9, 3.0, 1.0) == {"ice": 0.0, "bad_ice": 0.0, "ice_snr": 4.9}
    assert ice_truth(0.0, 5.0, 0.89, 0.49) == {"ice": 1.0, "bad_ice": 0.0, "ice_snr": 5.0}
    assert ice_truth(5.0, 0.0, 0.9, 0.0)["bad_ice"] == 1.0
    assert ice_truth(0.0, 9.0, 0.0, 0.5)["bad_ice"] == 1.0


def test_ice_of_a_frame_is_what_its_counts_show() -> None:
    """A ring of 20 % over 1 photon a pixel is plain, one of 0.02 % is not, and no ring is none."""
    spec = FrameSpec(
        camera=CAMERA, kind="blank", seed=4, wavelength_angstrom=1.0, distance_m=0.05,
        beam_px=(250.0, 200.0), mean_background=1.0,
    )  # fmt: skip
    for contrast, expected in ((0.2, 1.0), (2e-4, 0.0), (0.0, 0.0)):
        assert render(replace(spec, ice_contrast=contrast)).truth["ice"] == expected
    assert render(replace(spec, ice_contrast=1.2)).truth["bad_ice"] == 1.0
    one = replace(spec, ice_contrast=1.0, ice_grains=1, ice_grain_boost=300.0)
    frames = [render(replace(one, seed=seed)) for seed in range(6)]
    for rendered in frames:
        on_frame = rendered.image.max() > 30
        assert rendered.truth["ice"] == float(on_frame)


def test_a_grain_of_ice_on_next_to_nothing_has_the_root_of_its_photons() -> None:
    """S/N is I / sqrt(I + B n); with B = 1e-4 and all of I on the frame that is sqrt(I)."""
    spec = FrameSpec(
        camera=CAMERA, kind="blank", seed=4, wavelength_angstrom=1.0, distance_m=0.05,
        beam_px=(250.0, 200.0), mean_background=1e-4,
        ice_contrast=1.0, ice_grains=1, ice_grain_boost=300.0,
    )  # fmt: skip
    seen = 0
    for seed in range(12):
        rendered = render(replace(spec, seed=seed))
        counts = float(rendered.image[rendered.mask == 0].sum())
        if counts < 200:
            continue
        seen += 1
        # The background adds some 20 counts, and Poisson the root of all.
        assert rendered.truth["ice_snr"] ** 2 == pytest.approx(counts, abs=40 + 4 * counts**0.5)
    assert seen >= 3


def test_grains_above_their_ring_are_bad_ice_without_a_crystal_too() -> None:
    """Of 200 grains some 22 lie on each line, of 60 x 2 x 1.05 photons on the strongest: 2,800,
    over a ring of 2,000 pixels with a photon each; a twentieth of that is no bad ice."""
    spec = FrameSpec(
        camera=CAMERA, kind="blank", seed=4, wavelength_angstrom=1.0, distance_m=0.05,
        beam_px=(250.0, 200.0), mean_background=1.0, water_share=0.0, halo_share=0.0,
        ice_contrast=1.0, ice_grains=200, ice_grain_boost=2.0,
    )  # fmt: skip
    assert render(spec).truth["bad_ice"] == 1.0
    assert render(replace(spec, ice_grain_boost=0.1)).truth["bad_ice"] == 0.0


def test_grains_of_salt_lie_at_the_spacings_of_salt_and_are_no_ice() -> None:
    """Every bright pixel within 1 % and the spot's own width of a line of NaCl, a = 5.640."""
    spec = FrameSpec(
        camera=CAMERA, kind="blank", seed=4, wavelength_angstrom=1.0, distance_m=0.05,
        beam_px=(250.0, 200.0), mean_background=0.02, water_share=0.0, halo_share=0.0,
        other_lines=((3.26, 1.0), (2.82, 1.0), (1.99, 1.0), (1.70, 1.0), (1.63, 1.0)),
        other_contrast=4.0, other_grains=60, other_grain_boost=300.0,
    )  # fmt: skip
    rendered = render(spec)
    y, x = np.nonzero((rendered.image > 50) & (rendered.mask == 0))
    assert len(y) > 100
    lines = [5.640 / math.sqrt(n) for n in (3, 4, 8, 11, 12)]  # 111, 200, 220, 311, 222
    radii = [spec.distance_m / CAMERA.pixel_m * math.tan(2.0 * math.asin(0.5 / d)) for d in lines]
    away = np.abs(np.hypot(x + 0.5 - 250.0, y + 0.5 - 200.0)[:, None] - radii)
    assert (away - 0.01 * np.array(radii) < 8.0).any(1).all()
    assert rendered.truth["ice"] == 0.0
    assert rendered.truth["blank"] == 1.0


def test_a_ring_of_another_powder_is_as_high_as_it_says_and_no_ice() -> None:
    """On a line of ice, at half the strength of the brightest: contrast 3 is 1.5 there, and 3 at
    the brightest, over what lies between the two. The mean of the frame stays."""
    spec = FrameSpec(
        camera=CAMERA, kind="blank", seed=4, wavelength_angstrom=1.0, distance_m=0.05,
        beam_px=(250.0, 200.0), mean_background=40.0, water_share=0.0, halo_share=0.0,
    )  # fmt: skip
    lines = ((ICE_D_ANGSTROM[0], 0.5), (3.2, 1.0))
    with_rings = replace(spec, other_lines=lines, other_width=0.003, other_contrast=3.0)
    plain, ringed = render(spec), render(with_rings)
    y, x = np.indices(plain.image.shape)
    radius = np.hypot(x + 0.5 - 250.0, y + 0.5 - 200.0) * CAMERA.pixel_m
    inverse_d = 2.0 * np.sin(0.5 * np.arctan2(radius, spec.distance_m))
    usable = (plain.mask == 0) & (ringed.mask == 0)

    def over_plain(at: float) -> float:
        on = usable & (np.abs(inverse_d - at) < 0.0004)
        return float(ringed.image[on].sum() / plain.image[on].sum())

    between = over_plain(0.285)
    assert over_plain(1.0 / lines[0][0]) == pytest.approx(2.5 * between, rel=0.04)
    assert over_plain(1.0 / lines[1][0]) == pytest.approx(4.0 * between, rel=0.04)
    assert ringed.image[usable].mean() == pytest.approx(plain.image[usable].mean(), rel=0.02)
    assert ringed.truth["ice"] == 0.0


def test_training_draws_powders_that_nothing_is_made_of() -> None:
    """Of any width, their brightest line of strength 1; the recipe of tests has known ones only."""
    rng = np.random.default_rng(8)

    def powders(name: str) -> list[FrameSpec]:
        recipe = load_recipe(name)
        drawn = [draw_spec(rng, camera=CAMERA, recipe=recipe) for _ in range(600)]
        return [each for each in drawn if each.other_lines]

    known = {each.other_lines for each in powders("test")}
    assert 3 <= len(known) <= 5
    assert {strength for lines in known for _, strength in lines} == {1.0}
    train = powders("train")
    own = [each for each in train if each.other_width != 0.004]
    assert 0.5 < len(own) / len(train) < 0.85
    assert {max(strength for _, strength in each.other_lines) for each in own} == {1.0}
    assert all(0.0006 <= each.other_width <= 0.006 for each in own)
    places = {tuple(d for d, _ in lines) for lines in known}
    anywhere = [each for each in own if tuple(d for d, _ in each.other_lines) not in places]
    assert 0.3 < len(anywhere) / len(own) < 0.7
    assert all(0.9 <= d <= 10.0 for each in anywhere for d, _ in each.other_lines)


def test_ice_lines_are_those_of_the_two_cells() -> None:
    """Hexagonal a 4.50, c 7.33 angstrom; cubic a 6.36: from 1/d^2 of their cells, to 0.4 %."""
    a, c = 4.497, 7.325
    hexagonal = [
        1.0 / math.sqrt(4.0 / 3.0 * (h * h + h * k + k * k) / a**2 + l * l / c**2)
        for h, k, l in (  # noqa: E741 - Miller indices
            (1, 0, 0), (0, 0, 2), (1, 0, 1), (1, 0, 2), (1, 1, 0),
            (1, 0, 3), (2, 0, 0), (1, 1, 2), (2, 0, 1),
        )
    ]  # fmt: skip
    assert pytest.approx(hexagonal, rel=4e-3) == ICE_D_ANGSTROM
    cubic = [6.36 / math.sqrt(n) for n in (3, 8, 11)]  # 111, 220, 311
    assert [d for d, _, _ in _ice_lines(1.0)] == pytest.approx(cubic, rel=4e-3)
    mixed, pure = _ice_lines(0.5), _ice_lines(0.0)
    assert mixed[1] == pure[1]
    assert mixed[0][1] < 0.5 * pure[0][1]


def test_intensities_obey_wilson() -> None:
    """Acentric: <I^2> = 2 <I>^2; and the logarithm of the mean falls with B / 2 per 1/d^2."""
    spec = draw_spec(np.random.default_rng(1), camera=CAMERA, blank_share=0.0, between_share=0.0)
    spec = replace(
        spec, cell=CELLS[2], b_factor=30.0, lattice_weights=(1.0,), lattice_turn_deg=(0.0,),
        mosaicity_deg=1.0, distance_m=0.05, beam_px=(250.0, 200.0), wavelength_angstrom=1.0,
        domain_angstrom=1000.0, bandwidth=1e-4, divergence_rad=1e-4, rotation_deg=0.0,
    )  # fmt: skip
    intensity, s = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        table, (turned,) = _lattice_table(spec, rng)
        found = reflections(
            reciprocal_axes(CELLS[2]) @ turned.T, centring="P", wavelength_angstrom=1.0,
            d_min_angstrom=float(1.0 / math.sqrt(table["s"].max())) * 0.999999,
            mosaicity_fwhm_deg=1.0, domain_angstrom=1000.0, bandwidth=1e-4, divergence_rad=1e-4,
        )  # fmt: skip
        assert len(found.partiality) == len(table)
        intensity.append(table["photons"] / found.partiality)
        s.append(table["s"])
    intensities, ss = np.concatenate(intensity), np.concatenate(s)
    n = len(ss)
    slope, _ = np.polyfit(ss, np.log(intensities), 1)
    # The logarithm of an exponential has a standard deviation of pi / sqrt(6).
    error = math.pi / math.sqrt(6.0) / (ss.std() * math.sqrt(n))
    assert slope == pytest.approx(-15.0, abs=4.0 * error)
    normal = intensities * np.exp(15.0 * ss)
    # <I^2> / <I>^2 of n exponentials has a standard error of about sqrt(4 / n).
    assert (normal**2).mean() / normal.mean() ** 2 == pytest.approx(2.0, abs=5 * math.sqrt(4 / n))


@pytest.mark.parametrize(
    "widths",
    [
        {"mosaicity_fwhm_deg": 0.05, "bandwidth": 1e-4, "divergence_rad": 1e-4},
        {"mosaicity_fwhm_deg": 1.0, "bandwidth": 1e-4, "divergence_rad": 1e-4},
        {"mosaicity_fwhm_deg": 0.05, "bandwidth": 1e-2, "divergence_rad": 1e-3},
        {"mosaicity_fwhm_deg": 0.1, "bandwidth": 1e-4, "divergence_rad": 1e-4, "rotation_deg": 1.0},
    ],
)
def test_what_widens_a_reflection_weakens_it(widths: dict[str, float]) -> None:
    """A reflection gives as much in all whatever its width: over many orientations the sum of
    partialities is the shell's share of the sphere, sqrt(2 pi) 0.376 / domain over its spacing."""
    cell = CELLS[1]
    rng = np.random.default_rng(3)
    low, high, domain = 1.0 / 8.0, 1.0 / 4.0, 1500.0
    sums = []
    for _ in range(60):
        found = reflections(
            reciprocal_axes(cell) @ random_rotation(rng).T, centring="I", wavelength_angstrom=1.0,
            d_min_angstrom=4.0, domain_angstrom=domain, **widths,
        )  # fmt: skip
        shell = found.s_inverse_angstrom2 >= low**2
        sums.append(float(found.partiality[shell].sum()))
    # Lattice points within dz of the sphere: the area of the sphere's zone between the two
    # resolutions is pi (high^2 - low^2); an I cell has two points in a cell's reciprocal volume.
    density = 78.9**3 / 2.0
    expected = math.pi * (high**2 - low**2) * density * math.sqrt(2 * math.pi) * 0.376 / domain
    error = float(np.std(sums)) / math.sqrt(len(sums))
    assert np.mean(sums) == pytest.approx(expected, abs=4 * error + 0.02 * expected)


def test_a_spot_has_its_photons_however_narrow() -> None:
    """Anywhere within a pixel, to 1 %; and a wide one too."""
    for sigma, places in ((0.42, (0.0, 0.3, 0.5)), (0.8, (0.1,)), (6.0, (0.2,))):
        for place in places:
            image = np.zeros((81, 81))
            one = [
                np.array([value]) for value in (40.0 + place, 40.5, 1.5 * sigma, sigma, 0.4, 1000.0)
            ]
            _draw_spots(image, *one)
            assert image.sum() == pytest.approx(1000.0, rel=0.01)


def test_exposures_span_what_beamlines_see() -> None:
    """From 0.003 to 500 photons a pixel, and a frame has the mean that was drawn for it."""
    rng = np.random.default_rng(5)
    drawn = [draw_spec(rng, camera=CAMERA, blank_share=0.0).mean_background for _ in range(400)]
    assert min(drawn) < 0.01
    assert max(drawn) > 200.0
    assert 0.003 <= min(drawn) <= max(drawn) <= 500.0
    for mean in (0.01, 3.0, 400.0):
        spec = FrameSpec(
            camera=CAMERA, kind="blank", seed=9, wavelength_angstrom=1.0, distance_m=0.1,
            beam_px=(250.0, 200.0), mean_background=mean,
        )  # fmt: skip
        image = render(spec).image
        assert image.mean() == pytest.approx(mean, abs=5 * math.sqrt(mean / image.size))


def test_recipes_leave_tests_their_own_wavelengths() -> None:
    """No band of the one touches a band of the other; a key too many is an error."""
    train, test = load_recipe("train"), load_recipe("test")
    for low, high in train.beam["wavelength_angstrom"]:
        for other_low, other_high in test.beam["wavelength_angstrom"]:
            assert other_high < low or high < other_low
    assert test.who["held_out"]
    assert not train.who["held_out"]
    assert train.fingerprint != test.fingerprint


def test_a_recipe_with_an_unknown_key_or_a_range_turned_round_is_refused(tmp_path: Path) -> None:
    """And the message names the place."""
    import simulators.diffraction.recipes as module

    text = (Path(module.__file__).parent / "recipes/test.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(text)
    assert load_recipe(path).fingerprint == load_recipe("test").fingerprint
    path.write_text(text.replace("small_share = 0.1", "small_share = 0.1\ndrawn_cells_share = 0.5"))
    assert load_recipe(path).crystal["drawn_cells_share"] == 0.5
    path.write_text(text.replace("[ice]", "[ice]\ndrawn_cells_share = 0.5"))
    with pytest.raises(ValueError, match="ice"):
        load_recipe(path)
    path.write_text(text.replace("small_share", "smal_share"))
    with pytest.raises(ValueError, match="crystal"):
        load_recipe(path)
    path.write_text(text.replace("b_factor = [5.0, 120.0]", "b_factor = [120.0, 5.0]"))
    with pytest.raises(ValueError, match="b_factor"):
        load_recipe(path)


def independent_frames(shared: Path) -> Iterator[tuple[dict[str, str], NDArray[np.float64]]]:
    """Each nanoBragg frame: its row of labels, and counts with NaN where there are none."""
    folder = shared / "nanobragg"
    with (folder / "labels.csv").open() as lines:
        for row in csv.DictReader(lines):
            with h5py.File(folder / row["file"]) as file:
                image = file["entry/data/data"][0].astype(float)
            image[image >= 65534] = np.nan
            yield row, image


def measured_spots(row: dict[str, str], image: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, 6) of isolated strong spots: distance [px] of the centroid from where we predict it,
    outwards and along the ring, and the sigmas measured and predicted in both directions."""
    # Their beam is along +x, fast along +z, slow along -y; ours along z, x and y.
    a = np.array(ast.literal_eval(row["A_matrix"])).reshape(3, 3)
    edges = 1.0 / np.linalg.norm(a, axis=1)
    forward = float(row["distance_mm"]) / 0.075
    found = reflections(
        np.column_stack([a[:, 2], -a[:, 1], a[:, 0]]),
        centring="P",
        wavelength_angstrom=float(row["wavelength_A"]),
        d_min_angstrom=1.8,
        mosaicity_fwhm_deg=float(row["mosaicity_fwhm_deg"]),
        domain_angstrom=float(np.mean(edges * ast.literal_eval(row["ncells"]))),
        # Both are full widths of even spreads there.
        bandwidth=float(row["dispersion_pct"]) / 100.0 / math.sqrt(12.0),
        divergence_rad=float(row["divergence_mrad"]) * 1e-3 / math.sqrt(12.0),
    )
    down = found.direction[:, 2]
    dx, dy = (forward * found.direction[:, i] / down for i in (0, 1))
    x, y = float(row["beam_x"]) + dx, float(row["beam_y"]) + dy
    blur = (float(row["psf_fwhm_px"]) / 2.355) ** 2 + 1.0 / 12.0
    radial = np.sqrt(found.covariance_rad2[:, 0] * (forward / down**2) ** 2 + blur)
    along = np.sqrt(found.covariance_rad2[:, 1] * (forward / down) ** 2 + blur)
    ny, nx = image.shape
    rows = []
    for i in np.nonzero(found.partiality > 0.02 * found.partiality.max())[0]:
        reach = int(3.5 * max(radial[i], along[i]) + 2)
        if not (reach < x[i] < nx - reach - 1 and reach < y[i] < ny - reach - 1):
            continue
        apart = np.hypot(x - x[i], y - y[i])
        apart[i] = np.inf
        here = np.s_[
            int(y[i]) - reach : int(y[i]) + reach + 1, int(x[i]) - reach : int(x[i]) + reach + 1
        ]
        counts = image[here]
        if (apart < 1.6 * reach).any() or np.isnan(counts).any():
            continue
        py, px = np.mgrid[here]
        px, py = px + 0.5 - x[i], py + 0.5 - y[i]
        c, s = dx[i] / math.hypot(dx[i], dy[i]), dy[i] / math.hypot(dx[i], dy[i])
        out, ring = px * c + py * s, py * c - px * s
        z = (out / radial[i]) ** 2 + (ring / along[i]) ** 2
        level = counts[z >= 12].mean()
        net, out, ring = counts[z < 9] - level, out[z < 9], ring[z < 9]
        total = net.sum()
        hot = net.max() > 0.5 * total
        if total < 100 or hot or total < 10 * math.sqrt(total + level * net.size):
            continue
        mean_out, mean_ring = (net * out).sum() / total, (net * ring).sum() / total
        var_out = (net * out**2).sum() / total - mean_out**2
        var_ring = (net * ring**2).sum() / total - mean_ring**2
        if min(var_out, var_ring) > 0:
            rows.append(
                (mean_out, mean_ring, math.sqrt(var_out), radial[i], math.sqrt(var_ring), along[i])
            )
    return np.array(rows).reshape(-1, 6)


@pytest.mark.shared
def test_spots_of_an_independent_simulator_have_our_places_and_widths(shared: Path) -> None:
    """nanoBragg's 14 frames: isolated strong spots lie where we say, and are as wide.

    Outwards within 0.3 px (median), as mosaic blocks do not change the Bragg angle. Along the ring
    within 1.5 px for most: their crystals have few blocks, whose mean is not the crystal's. Their
    widths in the ring's direction, where mosaicity acts, within 20 % on each frame.
    """
    near, outwards, ratios = [], [], []
    for row, image in independent_frames(shared):
        found = measured_spots(row, image)
        if len(found) < 8:
            continue
        near.append(float((np.hypot(found[:, 0], found[:, 1]) < 1.5).mean()))
        outwards.append(float(np.median(np.abs(found[:, 0]))))
        ratios.append((np.median(found[:, 2] / found[:, 3]), np.median(found[:, 4] / found[:, 5])))
    assert len(near) >= 12
    assert min(near) > 0.8
    assert np.mean(near) > 0.93
    assert max(outwards) < 0.3
    radial, along = np.array(ratios).T
    assert along.min() > 0.78
    assert along.max() < 1.15
    assert 0.9 < np.median(along) < 1.05
    # Outwards we are wider than they are where divergence and bandwidth lead.
    assert radial.min() > 0.6
    assert radial.max() < 1.15


@pytest.mark.shared
def test_the_background_falls_like_that_of_an_independent_simulator(shared: Path) -> None:
    """Air and water of ours fit their radial profile to 10 % (median over 1/d), with the water
    ring between 3.1 and 3.7 angstrom where it is strong and the frame reaches beyond it."""
    rings, misfits = 0, []
    for row, image in independent_frames(shared):
        wavelength = float(row["wavelength_A"])
        yy, xx = np.mgrid[: image.shape[0], : image.shape[1]]
        radius = np.hypot(xx + 0.5 - float(row["beam_x"]), yy + 0.5 - float(row["beam_y"]))
        two_theta = np.arctan2(radius * 0.075, float(row["distance_mm"]))
        q = 2.0 * np.sin(0.5 * two_theta) / wavelength
        middles, profile = [], []
        for low in np.arange(0.06, q.max(), 0.01):
            values = image[(q >= low) & (q < low + 0.01)]
            values = values[np.isfinite(values)]
            if len(values) >= 400:
                # Spots and hot pixels are the highest.
                middles.append(low + 0.005)
                profile.append(values[values <= np.quantile(values, 0.98)].mean())
        at, level = np.array(middles), np.array(profile)
        oblique = np.cos(2.0 * np.arcsin(0.5 * wavelength * at)) ** 3
        fits = []
        for water_d in np.arange(2.8, 4.2, 0.05):
            shapes = np.array([scatter(each, water_d)[:2] for each in at]) * oblique[:, None]
            shares, rest = nnls(shapes / level[:, None], np.ones(len(at)))
            fits.append((rest, water_d, shares, np.abs(shapes @ shares / level - 1.0)))
        _, water_d, shares, misfit = min(fits, key=lambda fit: fit[0])
        misfits.append(float(np.median(misfit)))
        if shares[1] > 0.2 * shares[0] and at.max() > 0.38:
            rings += 1
            assert 3.1 <= water_d <= 3.7
    assert max(misfits) < 0.1
    assert np.median(misfits) < 0.05
    assert rings >= 8

"""Numbers about a crystal from a list of its spots: made by hand, widths known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from triage.nets.spot_shapes import SHAPE_FEATURES, shape_features
from triage.records import MOST_SPOTS, Geometry, Spot

SHAPE = (1000, 1200)
GEOMETRY = Geometry(
    beam_center_x_px=610.0,
    beam_center_y_px=480.0,
    pixel_size_x_m=75e-6,
    pixel_size_y_m=75e-6,
    detector_distance_m=0.1,
    incident_wavelength_angstrom=1.0,
)
FWHM = 2.0 * math.sqrt(2.0 * math.log(2.0))


def _named(spots: NDArray[np.float32], geometry: Geometry | None = GEOMETRY) -> dict[str, float]:
    found = shape_features(spots, geometry, SHAPE)
    assert found.dtype == np.float32
    assert found.shape == (len(SHAPE_FEATURES),)
    return dict(zip(SHAPE_FEATURES, found.tolist(), strict=True))


def _px_per_radian(y_px: float, x_px: float) -> float:
    """How far along its ring a turn of the crystal moves a spot: D |g| lambda / cos(2 theta)."""
    dy, dx = (y_px - 480.0) * 75e-6, (x_px - 610.0) * 75e-6
    beam = np.array([dx, dy, 0.1]) / math.sqrt(dx * dx + dy * dy + 0.01)
    g = beam - np.array([0.0, 0.0, 1.0])
    outward = np.array([dx, dy, 0.0]) / math.hypot(dx, dy)
    aside = np.array([-outward[1], outward[0], 0.0])
    moved = beam + 1e-6 * float(np.linalg.norm(g)) * aside
    on_detector = moved[:2] / moved[2] - beam[:2] / beam[2]
    return float(np.linalg.norm(on_detector)) * 0.1 / 75e-6 / 1e-6


def _crystal(
    fwhm_deg: float, own_px2: float, *, n: int = 60, snr: float = 20.0, cut: float = 0.1
) -> NDArray[np.float32]:
    """``n`` spots all over the frame, of a crystal of that mosaicity."""
    rng = np.random.default_rng(4)
    spots = np.zeros((MOST_SPOTS, len(Spot)), np.float32)
    for spot in spots[:n]:
        y, x = rng.uniform(20, 980), rng.uniform(20, 1180)
        angle = math.atan2(y - 480.0, x - 610.0)
        c, s = math.cos(angle), math.sin(angle)
        along = own_px2 + (math.radians(fwhm_deg) / FWHM * _px_per_radian(y, x)) ** 2
        spot[Spot.Y_PX], spot[Spot.X_PX], spot[Spot.VALID] = y, x, 1.0
        spot[Spot.YY] = s * s * own_px2 + c * c * along
        spot[Spot.XX] = c * c * own_px2 + s * s * along
        spot[Spot.YX] = c * s * (own_px2 - along)
        spot[Spot.CUT], spot[Spot.PEAKS] = cut, 1.0
        spot[Spot.PIXELS] = 2.0 * math.pi * math.sqrt(own_px2 * along) * math.log(1.0 / cut) + 3
        # No background: the signal to noise is the root of the photons.
        spot[Spot.SNR], spot[Spot.INTENSITY] = snr, snr * snr * (1.0 - cut)
        spot[Spot.MATCHED], spot[Spot.WIDTH_PX] = 2.0 * snr, 1.0
    return spots


@pytest.mark.parametrize("fwhm_deg", [0.15, 0.4, 1.7])
@pytest.mark.parametrize("own_px2", [0.3, 1.5])
def test_spots_of_known_width_give_the_mosaicity_back(fwhm_deg: float, own_px2: float) -> None:
    """Whatever the spots' own width, both fits give the spread of the blocks to 2 %."""
    found = _named(_crystal(fwhm_deg, own_px2))
    for name in ("line_log_deg", "line_seen_log_deg", "clear_line_log_deg"):
        assert math.exp(found[name]) == pytest.approx(fwhm_deg, rel=0.02)
    assert math.exp(found["line_own_log_px2"]) == pytest.approx(own_px2, rel=0.1)


def test_where_pixels_are_cut_does_not_matter() -> None:
    """A higher cut takes pixels and counts of a Gaussian away, and the mosaicity stays."""
    high, low = _named(_crystal(0.5, 0.5, cut=0.5)), _named(_crystal(0.5, 0.5, cut=0.02))
    assert high["line_log_deg"] == pytest.approx(low["line_log_deg"], abs=0.01)


def test_false_spots_do_not_bend_the_line() -> None:
    """A third as many sharp spots as reflections, as of zingers, change it by less than 10 %."""
    spots = _crystal(1.0, 0.5, n=80)
    rng = np.random.default_rng(8)
    for spot in spots[60:80]:
        spot[Spot.YY], spot[Spot.XX], spot[Spot.YX] = rng.uniform(0.1, 0.5, 3) * (1, 1, 0)
    assert math.exp(_named(spots)["line_log_deg"]) == pytest.approx(1.0, rel=0.1)


def test_a_perfect_crystal_has_next_to_no_mosaicity() -> None:
    """Round spots of one size everywhere give a spread too small to be seen."""
    found = _named(_crystal(0.0, 0.6))
    assert math.exp(found["line_log_deg"]) < 0.06
    assert found["line_seen_loss_excess"] > 1.0


def test_spots_are_counted_above_ratios_of_signal_to_noise() -> None:
    """Sixty of 20 are above 15 and not above 25; lone pixels are counted apart. So they are by the
    filter, which gives them 40."""
    spots = _crystal(0.5, 0.5)
    spots[:7, Spot.LONE] = 1.0
    found = _named(spots)
    assert found["log_over_15"] == pytest.approx(math.log(54.0))
    assert found["log_over_25"] == 0.0
    assert found["log_lone"] == pytest.approx(math.log(8.0))
    assert found["log_spots"] == pytest.approx(math.log(61.0))
    assert found["log_matched_over_25"] == pytest.approx(math.log(54.0))
    assert found["log_matched_over_50"] == 0.0
    assert found["lone_log_matched_over_8"] == pytest.approx(math.log(8.0))


def test_resolution_is_that_of_the_geometry() -> None:
    """The largest 1/d^2 is that of the outermost spot."""
    spots = _crystal(0.5, 0.5)
    used = spots[:60]
    inverse_d = GEOMETRY.inverse_d(used[:, Spot.X_PX], used[:, Spot.Y_PX])
    found = _named(spots)
    assert found["s_q100"] == pytest.approx(float(inverse_d.max()) ** 2, rel=1e-5)
    assert found["s_q50"] == pytest.approx(float(np.median(inverse_d**2)), rel=1e-5)


def test_without_geometry_sizes_and_counts_remain() -> None:
    """What needs the beam's place is zero, the rest as it is with it."""
    spots = _crystal(0.5, 0.5)
    with_it, without = _named(spots), _named(spots, None)
    assert (with_it["has_geometry"], without["has_geometry"]) == (1.0, 0.0)
    assert without["line_log_deg"] == without["s_q90"] == 0.0
    for name in ("log_over_5", "log_major_px2_q50", "log_ratio_q75"):
        assert without[name] == with_it[name] != 0.0


def test_numbers_are_finite_whatever_the_list_holds() -> None:
    """No list of spots, and none of nonsense, gives a number that is not finite or over 1e3."""
    rng = np.random.default_rng(2)
    lists = [np.zeros((MOST_SPOTS, len(Spot)), np.float32)]
    for scale in (1e-6, 1.0, 1e6, 1e30):
        wild = (rng.normal(size=lists[0].shape) * scale).astype(np.float32)
        wild[:, Spot.VALID] = rng.random(MOST_SPOTS) < 0.7
        lists.append(wild)
    one = lists[0].copy()
    one[0] = _crystal(0.5, 0.5)[0]
    lists.append(one)
    for spots in lists:
        for geometry in (GEOMETRY, None):
            found = shape_features(spots, geometry, SHAPE)
            assert np.isfinite(found).all()
            assert np.abs(found).max() <= 1e3


def test_the_order_of_what_came_before_does_not_matter() -> None:
    """The same list gives the same bits after another one."""
    spots = _crystal(0.8, 0.4)
    first = shape_features(spots, GEOMETRY, SHAPE)
    shape_features(_crystal(0.1, 2.0, n=300), GEOMETRY, SHAPE)
    assert shape_features(spots, GEOMETRY, SHAPE).tobytes() == first.tobytes()


def test_a_frame_on_its_side_says_the_same() -> None:
    """A quarter turn about the beam changes nothing that does not depend on the frame's blocks."""
    spots = _crystal(0.8, 0.4)
    turned = spots.copy()
    turned[:60, Spot.Y_PX] = 480.0 + (spots[:60, Spot.X_PX] - 610.0)
    turned[:60, Spot.X_PX] = 610.0 - (spots[:60, Spot.Y_PX] - 480.0)
    turned[:, Spot.YY], turned[:, Spot.XX] = spots[:, Spot.XX], spots[:, Spot.YY]
    turned[:, Spot.YX] = -spots[:, Spot.YX]
    was, now = _named(spots), _named(turned)
    blocks = {name for name in SHAPE_FEATURES if "spread_over" in name or "blocks_over" in name}
    assert len(blocks) == 3
    for name in set(SHAPE_FEATURES) - blocks:
        assert now[name] == pytest.approx(was[name], abs=1e-3)


def test_only_spots_of_a_crystal_are_clean() -> None:
    """Twelve round spots far apart, of sigma 3.25, 3.75, ... 8.75: ranked and counted by hand, the
    wide ones beside, the narrow ones by how blunt they are. A lone pixel, a spot at a gap, a
    saturated one, two of too many pixels, a streak and two side by side, surer all of them, change
    nothing."""
    spots = np.zeros((MOST_SPOTS, len(Spot)), np.float32)
    for i, spot in enumerate(spots[:12]):
        spot[Spot.Y_PX], spot[Spot.X_PX] = 900.0, 20.0 + 50.0 * i
        spot[Spot.PIXELS], spot[Spot.YY], spot[Spot.XX] = 5.0 + i, 0.8, 0.8
        spot[Spot.MATCHED], spot[Spot.INTENSITY], spot[Spot.PEAK] = 3.25 + 0.5 * i, 40.0, 10.0
        spot[Spot.WIDTH_PX], spot[Spot.FITTED] = 1.0, 12.25 - i
        spot[Spot.VALID], spot[Spot.PEAKS] = 1.0, 1.0
    spots[11, Spot.WIDTH_PX], spots[10, Spot.WIDTH_PX] = 4.0, 2.0
    spots[9, Spot.PEAK] = 30.0
    others = spots[12:20]
    others[:] = spots[0]
    others[:, Spot.MATCHED] = others[:, Spot.FITTED] = 90.0
    others[:, Spot.Y_PX] = 100.0 + 60.0 * np.arange(8)
    others[0, Spot.LONE] = others[1, Spot.AT_GAP] = others[2, Spot.SATURATED] = 1.0
    others[3, Spot.PIXELS], others[4, Spot.PIXELS] = 200.0, 700.0
    others[4, Spot.WIDTH_PX] = 2.0
    others[5, Spot.YY], others[5, Spot.XX] = 9.0, 0.2
    others[7, Spot.Y_PX] = others[6, Spot.Y_PX] + 4.0
    alone = spots.copy()
    alone[12:] = 0.0
    for given in (spots, alone):
        found = _named(given, None)
        assert found["clean_log_sigma_1"] == pytest.approx(math.log(8.75))
        assert found["clean_log_sigma_10"] == pytest.approx(math.log(4.25))
        assert found["clean_log_sigma_14"] == pytest.approx(math.log(2.0))
        assert found["clean_log_over_3.5"] == pytest.approx(math.log(1 + 11))
        assert found["clean_log_over_6"] == pytest.approx(math.log(1 + 6))
        of_kinds = {"sharp": 1, "blunt": 3, "wide": 1, "widest": 1}
        for kind, n in of_kinds.items():
            assert found[f"clean_{kind}_log_over_6"] == pytest.approx(math.log(1 + n))
        # x of those over 5: 220 to 570 in blocks of 200: the second and the third.
        assert found["clean_log_blocks_over_5"] == pytest.approx(math.log(1 + 2))
        # Of 12.25, 11.25 ... 1.25.
        assert found["clean_log_fitted_3"] == pytest.approx(math.log(10.25))
        assert found["clean_log_fitted_14"] == pytest.approx(math.log(2.0))
        assert found["clean_log_fitted_over_5.5"] == pytest.approx(math.log(1 + 7))
        # What is fitted is counted without lone pixels alone: seven others have much of it.
        of_others = 7 if given is spots else 0
        assert found["log_fitted_over_5.5"] == pytest.approx(math.log(1 + 7 + of_others))
        assert found["clean_pixels"] == pytest.approx(11.5)
        assert found["clean_peak_share"] == pytest.approx(0.25)
        assert found["log_area"] == pytest.approx(math.log(1 + SHAPE[0] * SHAPE[1]))


def test_a_spot_on_a_line_of_ice_is_not_clean() -> None:
    """At 3.90 angstrom of the geometry, and 2 % beside it."""
    for d, clean in ((3.90, False), (3.98, True)):
        radius_m = 0.1 * math.tan(2.0 * math.asin(1.0 / (2.0 * d)))
        spots = np.zeros((MOST_SPOTS, len(Spot)), np.float32)
        spot = spots[0]
        spot[Spot.Y_PX], spot[Spot.X_PX] = 480.0 + radius_m / 75e-6, 610.0
        spot[Spot.PIXELS], spot[Spot.YY], spot[Spot.XX], spot[Spot.VALID] = 9.0, 0.8, 0.8, 1.0
        spot[Spot.MATCHED], spot[Spot.INTENSITY], spot[Spot.PEAK] = 20.0, 400.0, 90.0
        spot[Spot.WIDTH_PX] = 1.0
        expected = math.log(20.0) if clean else math.log(2.0)
        assert _named(spots)["clean_log_sigma_1"] == pytest.approx(expected)


def test_spots_on_the_lines_of_ice_are_counted_beside_those_next_to_them() -> None:
    """Three spots on the second line, one of them faint; three 1.2 to 2.2 % beside it, which stand
    for one in three of what a line is wide; drawn out along the ring or across it. Of those on the
    line one comes over half of saturation, of those beside it two."""
    shares = (0.0, 0.003, -0.004, 0.012, -0.016, 0.022)
    brightest = (0.1, 0.75, 0.9, 0.3, 0.5, 1.0)
    for drawn_out in (False, True):
        spots = np.zeros((MOST_SPOTS, len(Spot)), np.float32)
        for i, share in enumerate(shares):
            spot = spots[i]
            radius_m = 0.1 * math.tan(2.0 * math.asin(1.0 / (2.0 * 3.67 * (1.0 + share))))
            spot[Spot.Y_PX], spot[Spot.X_PX] = 480.0 + radius_m / 75e-6, 610.0
            # Below the beam the ring runs along x.
            spot[Spot.YY], spot[Spot.XX] = (0.5, 4.5) if drawn_out else (4.5, 0.5)
            spot[Spot.MATCHED], spot[Spot.VALID] = 5.0 + i, 1.0
            spot[Spot.BRIGHTEST] = brightest[i]
        spots[2, Spot.MATCHED] = 3.9
        found = _named(spots)
        counted = [found[f"log_on_line_{i}"] for i in range(9)]
        assert counted == [0.0, pytest.approx(math.log(3.0)), *[0.0] * 7]
        # 0.5 % of d on either side of the line, and 0.75 to 2.5 % beside it.
        beside = 3 * 0.5 / (2.5 - 0.75)
        assert found["log_beside_line_1"] == pytest.approx(math.log(1.0 + beside))
        assert found["log_on_lines_sigma"] == pytest.approx(math.log(7.0))
        assert found["log_beside_lines_sigma"] == pytest.approx(math.log(11.0))
        assert found["on_lines_along"] == pytest.approx(0.9 if drawn_out else 0.1, abs=1e-3)
        assert found["on_lines_log_brightest"] == pytest.approx(math.log(1.5))
        assert found["beside_lines_log_brightest"] == pytest.approx(math.log(2.0))
        assert found["log_on_lines_bright"] == pytest.approx(math.log(2.0))
        assert found["log_beside_lines_bright"] == pytest.approx(math.log(1.0 + beside * 2 / 3))

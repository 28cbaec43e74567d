"""Numbers of each spot, against values worked out by hand and against what must not change them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from triage.nets.spot_marks import MARKED, SPOT_MARKS, spot_marks
from triage.nets.triagenet import TriageNet
from triage.records import ICE_D_ANGSTROM, MOST_SPOTS, Geometry, Recipe, Spot
from triage.training.targets import HEADS

PLACED = SPOT_MARKS[SPOT_MARKS.index("placed") : SPOT_MARKS.index("log_brightest")]
GEOMETRY = Geometry.from_values(
    beam_center_x_px=500.0,
    beam_center_y_px=400.0,
    pixel_size_x_m=1e-4,
    pixel_size_y_m=1e-4,
    detector_distance_m=0.1,
    incident_wavelength_angstrom=1.0,
)
SHAPE = (900, 1000)


def a_list(*spots: dict[str, float]) -> NDArray[np.float32]:
    """A list of spots with some of their columns given."""
    out = np.zeros((MOST_SPOTS, len(Spot)), np.float32)
    common = {"MATCHED": 6.0, "WIDTH_PX": 1.0, "INTENSITY": 50.0, "PEAK": 20.0, "SNR": 5.0}
    for row, spot in enumerate(spots):
        for name, value in {**common, "VALID": 1.0, **spot}.items():
            out[row, Spot[name]] = value
    return out


def marks_of(
    spots: NDArray[np.float32],
    geometry: Geometry | None = GEOMETRY,
    shape: tuple[int, int] = SHAPE,
) -> list[dict[str, float]]:
    """Marks of the spots by name."""
    rows = spot_marks(spots, geometry, shape)
    return [dict(zip(SPOT_MARKS, row.tolist(), strict=True)) for row in rows]


def test_a_spot_of_which_all_is_known() -> None:
    """1,000 pixels right of the beam, at 45 degree: sin(22.5 degree) / 0.5 is 1/d."""
    (spot, other, none, *_) = marks_of(
        a_list(
            {
                "Y_PX": 400.0,
                "X_PX": 1500.0,
                "MATCHED": 8.0,
                "WIDTH_PX": 2.0,
                "PIXELS": 9.0,
                "BACKGROUND": 3.0,
                "NOISE": 2.0,
                "YY": 4.0,
                "XX": 1.0,
                "CUT": 0.25,
                "PEAKS": 2.0,
                "FITTED": 7.0,
                "FITTED_PX2": 2.4,
                "BRIGHTEST": 0.25,
            },
            {"Y_PX": 400.0, "X_PX": 1512.0, "LONE": 1.0},
        ),
        shape=(900, 2000),
    )
    assert none == dict.fromkeys(SPOT_MARKS, 0.0)
    inverse_d = 2.0 * math.sin(math.radians(22.5))
    wanted = {
        "log_sigma": math.log(8.0),
        "sigma": 3.0,
        "log_fitted": math.log(7.0),
        "fitted": 2.0,
        "log_fitted_px2": 0.5 * math.log(2.5),
        "width_1": 0.0,
        "width_2": 1.0,
        "log_snr": math.log(5.0),
        "log_pixels": 0.5 * math.log(10.0),
        "log_intensity": 0.3 * math.log(51.0),
        "log_background": 0.3 * math.log(3.01),
        "log_noise_over_poisson": math.log(4.01 / 3.01),
        "log_peak_share": math.log(0.4),
        "cut": 0.25,
        "peaks": 0.6,
        "lone": 0.0,
        "log_major_px2": 0.5 * math.log(4.0),
        "log_minor_px2": 0.0,
        "log_edge_px": 0.2 * math.log(401.0),
        "log_neighbour_px": 0.2 * math.log(144.25),
        "neighbours": 0.25,
        "place_in_list": 0.0,
        # The ring runs along y here.
        "log_along_over_across": math.log(4.1 / 1.1),
        "inverse_d": 3.0 * inverse_d,
        "log_radius_px": 0.2 * math.log(1001.0),
        "log_brightest": math.log(0.5),
        "valid": 1.0,
    }
    wanted["inverse_d"] = min(wanted["inverse_d"], 3.0)
    for name, value in wanted.items():
        assert spot[name] == pytest.approx(value, abs=1e-5), name
    assert other["lone"] == other["width_1"] == 1.0
    assert other["place_in_list"] == pytest.approx(1.0 / (MOST_SPOTS - 1))


@pytest.mark.parametrize("line", range(len(ICE_D_ANGSTROM)))
def test_a_spot_on_a_line_of_ice_is_told_from_one_beside_it(line: int) -> None:
    """At the radius that Bragg's law gives the line, and a twentieth farther out."""
    d = ICE_D_ANGSTROM[line]
    radius_px = 1000.0 * math.tan(2.0 * math.asin(0.5 / d))
    there, outside = (
        marks_of(a_list({"Y_PX": 400.0 + r, "X_PX": 500.0}))[0]
        for r in (radius_px, 1.004 * radius_px)
    )
    assert there["on_line"] == pytest.approx(1.0, abs=1e-4)
    assert there["line"] == pytest.approx(0.2 * line)
    assert there["off_line"] == pytest.approx(0.0, abs=1e-3)
    assert 0.1 < outside["off_line"] < 0.25
    assert outside["on_line"] < 0.5 < outside["near_line"]


def test_spots_of_a_streak_are_in_a_row() -> None:
    """Five on a line through the beam, on both sides of it; one as near beside it; one 200 pixels
    on."""
    line = [(400.0 + 0.6 * r, 500.0 + 0.8 * r) for r in (-15.0, 55.0, 70.0, 85.0, 100.0, 300.0)]
    beside = (line[2][0] - 0.8 * 20.0, line[2][1] + 0.6 * 20.0)
    marks = marks_of(a_list(*({"Y_PX": y, "X_PX": x} for y, x in [*line, beside])))
    by_chance = 4.0 * 3.0 / (math.pi * 120.0)
    for one in marks[:5]:
        assert one["in_row"] == pytest.approx(math.log(5.0 / (1.0 + 5.0 * by_chance)), abs=1e-5)
    assert marks[5]["in_row"] == 0.0
    assert marks[6]["in_row"] == pytest.approx(-math.log(1.0 + 5.0 * by_chance), abs=1e-5)


def test_grains_of_a_powder_are_on_a_ring() -> None:
    """Four at 199 or 200 pixels from the beam, wherever on the ring; those at 211, 221 and 250 see
    others around, and none on their own ring."""
    ring = [(400.0, 700.0), (599.0, 500.0), (400.0, 301.0), (280.0, 340.0)]
    outside = [(400.0, 711.0), (400.0, 279.0), (400.0, 750.0)]
    marks = marks_of(a_list(*({"Y_PX": y, "X_PX": x} for y, x in [*ring, *outside])))
    by_chance = 2.5 / 40.0
    for one in marks[:4]:
        assert one["on_ring"] == pytest.approx(math.log(4.0 / (1.0 + 5.0 * by_chance)), abs=1e-5)
    assert marks[4]["on_ring"] == pytest.approx(-math.log(1.0 + 6.0 * by_chance), abs=1e-5)
    assert marks[5]["on_ring"] == pytest.approx(-math.log(1.0 + 6.0 * by_chance), abs=1e-5)
    assert marks[6]["on_ring"] == pytest.approx(-math.log(1.0 + 2.0 * by_chance), abs=1e-5)


def test_without_geometry_nothing_is_said_of_places_and_all_else_stays() -> None:
    spots = a_list({"Y_PX": 100.0, "X_PX": 200.0, "YY": 2.0}, {"Y_PX": 300.0, "X_PX": 20.0})
    for with_, without in zip(marks_of(spots), marks_of(spots, None), strict=True):
        assert without == {k: 0.0 if k in PLACED else v for k, v in with_.items()}


def test_a_quarter_turn_changes_no_mark() -> None:
    """Of the frame with its spots and its beam; variances along y become those along x."""
    rng = np.random.default_rng(5)
    spots = a_list(
        *(
            {
                "Y_PX": float(rng.uniform(5, 595)),
                "X_PX": float(rng.uniform(5, 595)),
                "YY": float(rng.uniform(1, 3)),
                "XX": float(rng.uniform(1, 3)),
                "YX": float(rng.uniform(-0.5, 0.5)),
            }
            for _ in range(20)
        )
    )
    turned = spots.copy()
    turned[:20, Spot.Y_PX], turned[:20, Spot.X_PX] = (
        spots[:20, Spot.X_PX],
        600 - spots[:20, Spot.Y_PX],
    )
    turned[:20, Spot.YY], turned[:20, Spot.XX] = spots[:20, Spot.XX], spots[:20, Spot.YY]
    turned[:20, Spot.YX] = -spots[:20, Spot.YX]
    there = replace(GEOMETRY, beam_center_y_px=320.0, beam_center_x_px=250.0)
    turned_beam = replace(GEOMETRY, beam_center_y_px=250.0, beam_center_x_px=280.0)
    np.testing.assert_allclose(
        spot_marks(spots, there, (600, 600)), spot_marks(turned, turned_beam, (600, 600)), atol=1e-4
    )


def test_what_is_no_number_stays_within_its_spot_and_is_none_there() -> None:
    spots = a_list({"Y_PX": 10.0, "X_PX": 10.0}, {"Y_PX": 90.0, "X_PX": 90.0})
    sound = spot_marks(spots, GEOMETRY, SHAPE)
    spots[0, [Spot.INTENSITY, Spot.YY]] = np.nan
    spots[0, [Spot.SNR, Spot.NOISE]] = np.inf
    found = spot_marks(spots, GEOMETRY, SHAPE)
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= 10.0
    np.testing.assert_array_equal(found[1:], sound[1:])


def test_kinds_are_counted_in_any_order_and_without_rows_that_are_no_spots() -> None:
    """30 spots, and the same in another order and at other places: the same counts."""
    torch.manual_seed(3)
    net = TriageNet(HEADS, radial_bins=Recipe().radial_bins, convolutions=False).eval()
    marks = torch.zeros((2, MARKED, len(SPOT_MARKS)))
    marks[0, :30] = torch.randn((30, len(SPOT_MARKS)))
    marks[:, :, -1] = 0.0
    marks[0, :30, -1] = 1.0
    marks[1, torch.randperm(MARKED)[:30]] = marks[0, :30]
    with torch.inference_mode():
        counted = net.full_members[0].kinds
        one, other = counted(marks)
        kinds = torch.sigmoid(counted.kind(marks[0, :30])).double()
    torch.testing.assert_close(one, other)
    wanted = torch.cat([torch.log1p(kinds.sum(0)), torch.log1p((kinds**3).sum(0))])
    torch.testing.assert_close(one.double(), wanted, rtol=1e-4, atol=1e-5)

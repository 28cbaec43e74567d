"""One lattice or several, from lattices made by hand: positions by closed-form Bragg geometry."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from triage.nets.lattices import LATTICE_FEATURES, lattice_features
from triage.records import MOST_SPOTS, Geometry, Spot

SHAPE = (1000, 1000)
PIXEL_M, DISTANCE_M, WAVELENGTH = 100e-6, 0.15, 1.0
BEAM_PX = 500.0
CELL = (62.0, 71.0, 84.0)
GEOMETRY = Geometry.from_values(
    beam_center_x_px=BEAM_PX,
    beam_center_y_px=BEAM_PX,
    pixel_size_x_m=PIXEL_M,
    pixel_size_y_m=PIXEL_M,
    detector_distance_m=DISTANCE_M,
    incident_wavelength_angstrom=WAVELENGTH,
)


def turned(axis: tuple[float, float, float], angle_deg: float) -> NDArray[np.float64]:
    """Rotation matrix about an axis (Rodrigues)."""
    x, y, z = np.array(axis) / np.linalg.norm(axis)
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    a = math.radians(angle_deg)
    matrix: NDArray[np.float64] = (
        np.eye(3) + math.sin(a) * cross + (1.0 - math.cos(a)) * cross @ cross
    )
    return matrix


SETTING = turned((0.3, -0.5, 0.8), 37.0)


def reflections(
    orientation: NDArray[np.float64],
    thick: float = 4e-4,
    cell: tuple[float, float, float] = CELL,
) -> NDArray[np.float64]:
    """(n, 2) y, x [px] of the points of an orthorhombic lattice next to the Ewald sphere."""
    index = np.arange(-26, 27)
    h, k, l = np.meshgrid(index, index, index, indexing="ij")  # noqa: E741 - Miller indices
    hkl = np.column_stack([h.ravel(), k.ravel(), l.ravel()])
    g = (hkl / np.array(cell)) @ orientation.T
    length = np.linalg.norm(g, axis=1)
    beam = g + np.array([0.0, 0.0, 1.0 / WAVELENGTH])
    miss = np.linalg.norm(beam, axis=1) - 1.0 / WAVELENGTH
    beam = beam[(np.abs(miss) < thick) & (length > 0.03) & (length < 0.3)]
    to_px = DISTANCE_M / PIXEL_M / beam[:, 2]
    yx = BEAM_PX + np.column_stack([beam[:, 1] * to_px, beam[:, 0] * to_px])
    return yx[((yx > 0) & (yx < 1000)).all(1)]


def listed(
    yx: NDArray[np.float64], *, moments: tuple[float, float, float] = (1.0, 0.0, 1.0), seed: int = 0
) -> NDArray[np.float32]:
    """A list of spots, shuffled: yy, yx, xx as given, signal to noise from 40 down to 6."""
    rng = np.random.default_rng(seed)
    yx = yx[rng.permutation(len(yx))][:MOST_SPOTS]
    spots = np.zeros((MOST_SPOTS, len(Spot)), np.float32)
    n = len(yx)
    spots[:n, [Spot.Y_PX, Spot.X_PX]] = yx + rng.normal(0.0, 0.1, yx.shape)
    spots[:n, Spot.SNR] = np.geomspace(40.0, 6.0, n) if n else 0.0
    spots[:n, Spot.INTENSITY] = 10.0 * spots[:n, Spot.SNR]
    spots[:n, Spot.PIXELS] = 9
    spots[:n, Spot.YY], spots[:n, Spot.YX], spots[:n, Spot.XX] = moments
    spots[:n, Spot.PEAKS] = 1
    spots[:n, Spot.VALID] = 1
    return spots


def named(spots: NDArray[np.float32], geometry: Geometry | None = GEOMETRY) -> dict[str, float]:
    values = lattice_features(spots, geometry, SHAPE)
    assert values.dtype == np.float32
    assert np.isfinite(values).all()
    return dict(zip(LATTICE_FEATURES, values.tolist(), strict=True))


def test_one_lattice_is_explained_and_its_cell_is_right() -> None:
    """Every spot of one lattice is on it, and its cell has the volume that was put in."""
    seen = named(listed(reflections(SETTING)))
    assert seen["explained_share"] > 0.97
    assert seen["left_log"] < math.log(1 + 3)
    assert math.exp(seen["volume_log"]) == pytest.approx(math.prod(CELL), rel=0.03)


@pytest.mark.parametrize("tilt_deg", [0.0, 1.0, 2.0, 8.0])
def test_vectors_across_a_zone_leave_room_for_one_along_it(tilt_deg: float) -> None:
    """Seen along c, a short square net makes dozens of vectors that all the spots agree on."""
    cell = (42.0, 42.0, 95.0)
    spots = listed(reflections(turned((1.0, 0.3, 0.0), tilt_deg), cell=cell))
    seen = named(spots)
    assert seen["explained_share"] > 0.95
    assert math.exp(seen["volume_log"]) == pytest.approx(math.prod(cell), rel=0.03)


def test_twelve_spots_of_one_lattice_are_enough() -> None:
    """A weak hit is explained as well."""
    seen = named(listed(reflections(SETTING)[::9][:12]))
    assert seen["explained_share"] > 0.9


def test_a_second_lattice_is_left_over_and_is_one_itself() -> None:
    """Of two crystals one is explained; the rest is a lattice of the same volume."""
    first = reflections(SETTING)
    second = reflections(turned((1.0, 0.2, 0.4), 33.0) @ SETTING)
    seen = named(listed(np.concatenate([first, second])))
    share = len(first) / (len(first) + len(second))
    assert min(share, 1 - share) - 0.1 < seen["explained_share"] < max(share, 1 - share) + 0.1
    assert seen["second_share"] > 0.9
    assert abs(seen["second_volume_ratio"]) < 0.05


def test_a_weak_second_lattice_shows_in_what_is_left() -> None:
    """Ten spots of a second crystal beside a hundred are the ten that are left."""
    first = reflections(SETTING)
    second = reflections(turned((1.0, 0.2, 0.4), 33.0) @ SETTING)[::7][:10]
    seen = named(listed(np.concatenate([first, second])))
    assert math.expm1(seen["left_log"]) == pytest.approx(10, abs=3)


def test_strays_are_left_over_and_no_second_lattice() -> None:
    """Spots anywhere, as of zingers, make no second lattice worth the name."""
    strays = np.random.default_rng(5).uniform(30, 970, (40, 2))
    first = reflections(SETTING)
    seen = named(listed(np.concatenate([first, strays])))
    second = reflections(turned((1.0, 0.2, 0.4), 33.0) @ SETTING)[:40]
    other = named(listed(np.concatenate([first, second])))
    assert math.expm1(seen["left_log"]) == pytest.approx(40, abs=6)
    assert seen["second_gain_per_spot"] < 0.5 * other["second_gain_per_spot"]


def test_a_split_crystal_has_neighbours_on_the_ring() -> None:
    """Half a degree of turn about the beam sets each spot beside itself on its ring."""
    first = reflections(SETTING)
    second = reflections(turned((0.0, 0.0, 1.0), 0.5) @ SETTING)
    one, split = named(listed(first)), named(listed(np.concatenate([first, second])))
    assert one["near_share"] < 0.05 < 0.2 < split["near_share"]
    assert split["ring_pairs_excess"] > one["ring_pairs_excess"] + 1.0


def test_streaks_that_lean_are_told_from_wide_spots() -> None:
    """Spots drawn out along the ring are elongated, and lean only if they lie aslant to it."""
    yx = reflections(SETTING)
    dy, dx = (yx - BEAM_PX).T
    azimuth = np.arctan2(dy, dx)
    shapes = {}
    for name, aslant in (("along", 0.0), ("leaning", 0.5)):
        streak = azimuth + 0.5 * math.pi + aslant
        c, s = np.cos(streak), np.sin(streak)
        rows = []
        for place, cc, ss in zip(yx, c, s, strict=True):
            moments = (9.0 * ss * ss + cc * cc, 8.0 * ss * cc, 9.0 * cc * cc + ss * ss)
            rows.append(listed(place[None], moments=moments)[0])
        spots = np.zeros((MOST_SPOTS, len(Spot)), np.float32)
        spots[: len(rows)] = rows
        shapes[name] = named(spots)
    round_ = named(listed(yx))
    assert abs(round_["elongation"]) < 0.1
    # 9 and 1 px^2, and 0.08 for a pixel's own width.
    assert shapes["along"]["elongation"] == pytest.approx(math.log(9.08 / 1.08), abs=0.05)
    assert shapes["along"]["lean"] < 0.02
    # 2 (9 - 1) sin cos / (9 + 1 + 0.16)
    assert shapes["leaning"]["lean"] == pytest.approx(
        16.0 * math.sin(0.5) * math.cos(0.5) / 10.16, abs=0.02
    )


def test_hot_pixels_are_not_looked_at() -> None:
    """What stands in one pixel alone changes nothing."""
    first = listed(reflections(SETTING)[:60])
    spots = first.copy()
    spots[60:80, :] = spots[:20, :]
    spots[60:80, [Spot.Y_PX, Spot.X_PX]] = np.random.default_rng(3).uniform(0, 1000, (20, 2))
    spots[60:80, Spot.LONE] = 1
    assert named(spots) == named(first)


def test_grains_of_ice_are_set_apart() -> None:
    """Spots on the lines of ice are counted as such and not as strays."""
    radii = [
        DISTANCE_M / PIXEL_M * math.tan(2.0 * math.asin(WAVELENGTH / (2.0 * d)))
        for d in (3.90, 3.67, 3.44)
    ]
    rng = np.random.default_rng(2)
    angle = rng.uniform(0, 2 * math.pi, 45)
    radius = np.repeat(radii, 15)
    ice = BEAM_PX + np.column_stack([radius * np.sin(angle), radius * np.cos(angle)])
    seen = named(listed(np.concatenate([reflections(SETTING), ice])))
    assert math.expm1(seen["ice_spots_log"]) >= 40
    assert seen["explained_share"] > 0.9


def test_without_geometry_nothing_is_said() -> None:
    """No geometry: all zero, the flag with it."""
    assert not lattice_features(listed(reflections(SETTING)), None, SHAPE).any()


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 6, 7])
def test_few_spots_are_no_lattice_but_an_answer(n: int) -> None:
    """Lists from empty to barely enough give finite numbers."""
    seen = named(listed(reflections(SETTING)[:n]))
    assert seen["has_geometry"] == 1.0
    assert seen["spots_log"] == pytest.approx(math.log(1 + n), abs=1e-6)


def test_absurd_lists_give_finite_numbers() -> None:
    """Equal places, the beam's centre, a line, huge and negative values."""
    rng = np.random.default_rng(1)
    for kind in range(6):
        spots = listed(rng.uniform(0, 1000, (200, 2)))
        if kind == 0:
            spots[:200, [Spot.Y_PX, Spot.X_PX]] = BEAM_PX
        elif kind == 1:
            spots[:200, [Spot.Y_PX, Spot.X_PX]] = 10.0
        elif kind == 2:
            spots[:200, Spot.Y_PX] = BEAM_PX
        elif kind == 3:
            spots[:200, Spot.INTENSITY] = 1e30
        elif kind == 4:
            spots[:200, Spot.XX] = -5.0
        else:
            spots[:200, Spot.SNR] = 1e20
        named(spots)


def test_the_same_list_gives_the_same_numbers() -> None:
    """Whatever ran in between."""
    spots = listed(reflections(SETTING))
    first = lattice_features(spots, GEOMETRY, SHAPE)
    lattice_features(listed(reflections(np.eye(3)), seed=4), GEOMETRY, SHAPE)
    np.testing.assert_array_equal(first, lattice_features(spots, GEOMETRY, SHAPE))


FRESH = """
import json
import sys
import numpy as np
from triage.nets import lattices, spot_shapes
from triage.nets.spot_features import spot_features, warm_up_spot_features
from triage.records import CloseUps, Geometry

def compiled():
    return {
        f"{module.__name__}.{name}": len(each.signatures)
        for module in (lattices, spot_shapes)
        for name, each in vars(module).items()
        if hasattr(each, "signatures")
    }

geometry = Geometry(**json.loads(sys.argv[2]))
spots = np.load(sys.argv[1])[None]
warm_up_spot_features()
before = compiled()
shown = CloseUps(
    tiles=np.zeros((1, 1, 2, 8, 8)), spots=spots, geometry=(geometry,), shape=((1000, 1000),)
)
gain = spot_features(shown)[0, lattices.LATTICE_FEATURES.index("second_gain")]
print("a second lattice" if gain > 0 else "none")
print(*(name for name, types in compiled().items() if types != before[name]))
"""


def test_no_frame_waits_for_a_compiler(tmp_path: Path) -> None:
    """In a new process, a frame with two lattices, whose list takes every way, compiles nothing
    after the warm-up."""
    other = reflections(turned((0.1, 0.9, 0.2), 20.0) @ SETTING)
    both = listed(np.concatenate([reflections(SETTING), other]))
    spots = np.zeros((MOST_SPOTS, len(Spot)), np.float32)
    spots[: len(both)] = both[:MOST_SPOTS]
    np.save(tmp_path / "spots.npy", spots)
    assert GEOMETRY is not None
    said = subprocess.run(
        [sys.executable, "-c", FRESH, tmp_path / "spots.npy", json.dumps(asdict(GEOMETRY))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.splitlines() == ["a second lattice", ""]

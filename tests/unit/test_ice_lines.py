"""Ice that a frame shows itself, told from its profile."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from triage.records import ICE_D_ANGSTROM, Geometry
from triage.training.ice_lines import ice_lines

SHAPE = (700, 700)
VALID = np.ones(SHAPE, np.bool_)


def _geometry(distance_m: float = 0.12) -> Geometry:
    return Geometry.from_values(
        beam_center_x_px=352.3,
        beam_center_y_px=347.6,
        pixel_size_x_m=172e-6,
        pixel_size_y_m=172e-6,
        detector_distance_m=distance_m,
        incident_wavelength_angstrom=1.0,
    )


def _frame(
    contrast: float, *, scale: float = 1.0, level: float = 0.3, seed: int = 3
) -> NDArray[np.int64]:
    """A background that falls outwards, with rings at the spacings of ice times ``1 / scale``."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]] + 0.5
    # Bragg's law by hand, in pixels of 172 um at 0.12 m and 1 angstrom.
    two_theta = np.arctan(np.hypot(x - 352.3, y - 347.6) * 172e-6 / 0.12)
    inverse_d = 2.0 * np.sin(0.5 * two_theta)
    rate = level * np.exp(-2.0 * inverse_d)
    rings = sum(np.exp(-0.5 * ((inverse_d - scale / d) / 0.003) ** 2) for d in ICE_D_ANGSTROM)
    return np.random.default_rng(seed).poisson(rate * (1.0 + contrast * rings)).astype(np.int64)


def test_faint_rings_are_found_that_no_pixel_shows() -> None:
    found = ice_lines(_frame(0.2, level=0.6), VALID, _geometry())
    assert found is not None
    assert found.are_there
    assert found.as_high == 0.0
    assert len(found.of_lines) == len(ICE_D_ANGSTROM)
    assert np.nanmean(found.of_lines) > 2.0


@pytest.mark.parametrize("seed", range(4))
def test_a_smooth_background_shows_none(seed: int) -> None:
    found = ice_lines(_frame(0.0, seed=seed), VALID, _geometry())
    assert found is not None
    assert not found.are_there


@pytest.mark.parametrize("scale", [0.95, 1.06])
def test_as_strong_rings_elsewhere_are_none(scale: float) -> None:
    found = ice_lines(_frame(0.2, scale=scale, level=0.6), VALID, _geometry())
    assert found is not None
    assert not found.are_there
    assert found.as_high > 0.0


def test_one_bright_ring_of_the_nine_is_none() -> None:
    counts = _frame(0.0)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]] + 0.5
    inverse_d = 2.0 * np.sin(0.5 * np.arctan(np.hypot(x - 352.3, y - 347.6) * 172e-6 / 0.12))
    counts[np.abs(inverse_d - 1.0 / 3.67) < 0.002] += 1
    found = ice_lines(counts, VALID, _geometry())
    assert found is not None
    assert not found.are_there


def test_spots_on_the_lines_do_not_count_as_rings() -> None:
    counts = _frame(0.0)
    rng = np.random.default_rng(8)
    for d in ICE_D_ANGSTROM:
        radius = 0.12 / 172e-6 * np.tan(2.0 * np.arcsin(0.5 / d))
        for angle in rng.uniform(0.0, 2.0 * np.pi, 3):
            y, x = int(347.6 + radius * np.sin(angle)), int(352.3 + radius * np.cos(angle))
            if 2 <= y < SHAPE[0] - 2 and 2 <= x < SHAPE[1] - 2:
                counts[y - 1 : y + 2, x - 1 : x + 2] += 20
    found = ice_lines(counts, VALID, _geometry())
    assert found is not None
    assert not found.are_there


def test_three_lines_are_enough_though_one_lies_at_the_edge() -> None:
    """From 3.906 to 3.125 angstrom: moved inwards by 0.2 % the first line is off the frame."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]] + 0.5
    inverse_d = _geometry().inverse_d(x, y)
    valid = (inverse_d >= 0.2560) & (inverse_d < 0.32)
    found = ice_lines(_frame(0.2, level=0.6), valid, _geometry())
    assert found is not None
    assert np.isfinite(found.of_lines).tolist() == [True] * 3 + [False] * 6
    assert np.isfinite(found.sigma)


def test_where_lines_do_not_lie_on_the_frame_nothing_is_said() -> None:
    assert ice_lines(_frame(0.1), VALID, _geometry(distance_m=2.0)) is None
    assert ice_lines(_frame(0.1), np.zeros(SHAPE, np.bool_), _geometry()) is None

"""Geometry from powder rings."""

from __future__ import annotations

import math

import numpy as np
import pytest

from triage.training.powder import POWDERS, fit_rings


def test_the_lines_are_the_tabled_ones() -> None:
    """Ceria by NIST SRM 674b, in angstrom; silver behenate's are fractions of its first."""
    assert POWDERS["ceo2"].d_angstrom[:5] == pytest.approx(
        (3.1244, 2.7058, 1.9133, 1.6317, 1.5622), abs=1e-4
    )
    assert POWDERS["agbe"].d_angstrom[2] == pytest.approx(19.46)


def test_rings_tell_where_the_beam_is_and_how_far_the_detector() -> None:
    """Seven rings of ceria on a falling background, Poisson counts, a gap, the beam off centre."""
    rng = np.random.default_rng(0)
    pixel_m, distance_m, wavelength = 2e-4, 0.1, 0.4133
    y, x = np.indices((300, 260))
    radius_px = np.hypot(y + 0.5 - 141.3, x + 0.5 - 90.8)
    rate = 200.0 / (1.0 + radius_px / 80.0)
    for d in (3.1244, 2.7058, 1.9133, 1.6317, 1.5622, 1.3529, 1.2415):
        two_theta = 2.0 * math.asin(wavelength / (2.0 * d))
        at = distance_m * math.tan(two_theta) / pixel_m
        rate += 150.0 * np.exp(-0.5 * ((radius_px - at) / 1.5) ** 2)
    valid = np.ones(rate.shape, bool)
    valid[150:160] = False
    fitted = fit_rings(
        rng.poisson(rate).astype(np.float64),
        valid,
        POWDERS["ceo2"],
        pixel_m=pixel_m,
        wavelength_angstrom=wavelength,
    )
    geometry = fitted.geometry
    assert geometry.beam_center_x_px == pytest.approx(90.8, abs=0.7)
    assert geometry.beam_center_y_px == pytest.approx(141.3, abs=0.7)
    assert geometry.detector_distance_m == pytest.approx(distance_m, rel=5e-3)
    assert fitted.agreement > 0.5

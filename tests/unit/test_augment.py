"""Changed copies of frames are frames that could have been measured, with labels still true."""

from __future__ import annotations

import math

import numpy as np
import pytest

from triage.backends import open_backend
from triage.backends.recipe import measured
from triage.records import Frame, Geometry, Series
from triage.training.augment import added, changed, rescaled, shifted, thinned, turned

BEAM = (10.5, 4.5)
"""x, y of the middle of one pixel."""


def geometry(pixel_y_m: float = 1e-4) -> Geometry:
    return Geometry(
        beam_center_x_px=BEAM[0],
        beam_center_y_px=BEAM[1],
        pixel_size_x_m=1e-4,
        pixel_size_y_m=pixel_y_m,
        detector_distance_m=0.1,
        incident_wavelength_angstrom=1.0,
    )


def with_beam_marked() -> tuple[np.ndarray, np.ndarray]:
    """24 x 40 pixels; the one under the beam holds 7."""
    counts = np.zeros((24, 40), np.int64)
    counts[4, 10] = 7
    return counts, np.ones(counts.shape, bool)


def labels(**known: float) -> dict[str, float]:
    """Of a strong hit without ice."""
    return {
        "blank": 0.0, "ice": 0.0, "bad_ice": 0.0, "ice_snr": 0.0, "n_visible": 400.0,
        "median_snr": 20.0, "quality": 4.0, "multilattice": 1.0, "n_lattices": 2.0,
        "mosaicity_deg": 0.1, "mosaicity_measurable": 1.0, "d_vis_angstrom": 2.0, **known,
    }  # fmt: skip


@pytest.mark.parametrize("which", range(8))
def test_the_beam_turns_with_the_frame(which: int) -> None:
    """Whatever the turn, the marked pixel is the one that the beam centre lies in."""
    counts, valid, found = turned(*with_beam_marked(), geometry(), which)
    assert found is not None
    assert counts[int(found.beam_center_y_px), int(found.beam_center_x_px)] == 7
    assert valid.shape == counts.shape == ((24, 40) if which % 2 == 0 else (40, 24))


def test_oblong_pixels_are_not_turned_on_their_side() -> None:
    """A quarter turn would make another detector of them."""
    for which in range(8):
        counts, _, _ = turned(*with_beam_marked(), geometry(2e-4), which)
        assert counts.shape == (24, 40)


def test_a_shift_moves_the_beam_and_masks_what_comes_in() -> None:
    """A 200 x 100 frame, one pixel marked; twenty shifts of at most 6 and 3 pixels."""
    counts = np.zeros((200, 100), np.int64)
    counts[100, 50] = 7
    start = Geometry.from_values(
        beam_center_x_px=50.5, beam_center_y_px=100.5, pixel_size_x_m=1e-4, pixel_size_y_m=1e-4,
        detector_distance_m=0.1, incident_wavelength_angstrom=1.0,
    )  # fmt: skip
    for seed in range(20):
        rng = np.random.default_rng(seed)
        moved, there, found = shifted(counts, np.ones(counts.shape, bool), start, rng)
        assert found is not None
        down, right = found.beam_center_y_px - 100.5, found.beam_center_x_px - 50.5
        assert abs(down) <= 6
        assert abs(right) <= 3
        assert moved[100 + int(down), 50 + int(right)] == 7
        assert there.sum() == (200 - abs(down)) * (100 - abs(right))


def test_a_thinned_frame_has_the_counts_of_a_shorter_exposure() -> None:
    """Mean and variance of a quarter of Poisson counts of 8: both 2."""
    rng = np.random.default_rng(1)
    fewer, _ = thinned(rng.poisson(8.0, (300, 300)), labels(), 0.25, rng)
    assert fewer.mean() == pytest.approx(2.0, rel=0.02)
    assert fewer.var() == pytest.approx(2.0, rel=0.03)


def test_a_shorter_exposure_says_nothing_that_may_have_become_untrue() -> None:
    """At half the photons signal to noise falls by 1.41. Grade and resolution are never said. Of
    40 spots half stay: no second lattice to be sure of; of 18, no hit; spots of 6 sigma may all
    have gone. Ice of 6 sigma is not visible any more, ice of 8 is. A blank stays one."""
    rng, counts = np.random.default_rng(0), np.ones((4, 4), np.int64)

    def left(**known: float) -> dict[str, float]:
        return thinned(counts, labels(**known), 0.5, rng)[1]

    strong, weak, faint = left(), left(n_visible=40.0), left(median_snr=6.0)
    assert math.isnan(strong["quality"])
    assert math.isnan(strong["d_vis_angstrom"])
    assert strong["blank"] == 0.0
    assert strong["multilattice"] == 1.0
    assert weak["blank"] == 0.0
    assert math.isnan(weak["multilattice"])
    assert math.isnan(left(n_visible=18.0)["blank"])
    assert math.isnan(faint["blank"])
    assert left(ice=1.0, ice_snr=6.0)["ice"] == 0.0
    assert left(ice=1.0, ice_snr=8.0)["ice"] == 1.0
    assert left(blank=1.0, n_visible=0.0, median_snr=math.nan)["blank"] == 1.0


def test_the_sum_of_two_blanks_is_blank_and_has_the_masks_of_both() -> None:
    """Counts add up; ice that one of them has is no longer said."""
    counts, valid = np.full((3, 3), 2), np.ones((3, 3), bool)
    masked = valid.copy()
    masked[0, 0] = False
    iced = labels(blank=1.0, ice=1.0)
    total, both, found = added(counts, valid, labels(blank=1.0), (counts, masked, iced))
    assert (total == 4).all()
    assert np.array_equal(both, masked)
    assert found["blank"] == 1.0
    assert math.isnan(found["ice"])


def test_another_gain_scales_counts() -> None:
    """Whole counts of 1.5 times as much."""
    assert rescaled(np.array([0, 2, 5]), 1.5).tolist() == [0, 3, 8]


def test_a_changed_copy_is_read_like_any_frame() -> None:
    """Forty copies of a frame through the backend: shape of the pixels, masked pixels invalid, and
    the frame it was made of as it was."""
    rng = np.random.default_rng(3)
    counts = rng.poisson(2.0, (96, 128)).astype(np.uint16)
    valid = np.ones(counts.shape, bool)
    valid[:, 60:64] = False
    frame = Frame(
        series=Series(geometry=geometry(), saturation_value=60000),
        image_id=0, dtype=counts.dtype, shape=counts.shape, payload=counts.tobytes(),
    )  # fmt: skip
    other = (counts, valid, labels(blank=1.0))
    backend = open_backend("cpu")
    for _ in range(40):
        copy, said = changed(frame, counts, valid, labels(blank=1.0), other, scales=True, rng=rng)
        decoded, there = measured(copy, backend.decode(copy))
        assert decoded.shape == copy.shape
        assert there.sum() <= valid.sum()
        assert said["blank"] == 1.0
    assert frame.series.pixel_mask is None

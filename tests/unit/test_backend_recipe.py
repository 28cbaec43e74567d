"""Numbers of the recipe that have a source outside the program."""

from __future__ import annotations

import math

import numpy as np
import pytest
from msgspec import structs

from triage.backends.recipe import SeriesMaps, measured
from triage.errors import DecodeError
from triage.records import EXPECTED_MAXIMUM, Frame, Geometry, Recipe, Series


@pytest.mark.parametrize("k", [2, 4, 8, 16, 32])
def test_expected_maximum_is_that_of_k_squared_normals(k: int) -> None:
    """The mean of the largest order statistic, integrated, is the constant to 0.03 sigma."""
    n = k * k
    x = np.linspace(-9.0, 9.0, 36001)
    density = np.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    below = np.array([0.5 * math.erfc(-v / math.sqrt(2.0)) for v in x])
    mean = float(np.sum(n * x * density * below ** (n - 1)) * (x[1] - x[0]))
    assert float(EXPECTED_MAXIMUM[k]) == pytest.approx(mean, abs=0.03)


def test_bins_follow_the_geometry() -> None:
    """A cell on +x at 2 theta = 45 deg, and its mirrors, worked out by hand.

    Cells of 2 px of 1 mm, the beam on the corner of cells (4, 4), D = 7 mm: the centre of cell
    (4, 7) lies 7 mm right of and 1 mm below the beam.
    """
    recipe = Recipe(grid=8, radial_bins=100, sectors=4, s_max_inverse_angstrom2=1.0)
    geometry = Geometry(
        beam_center_x_px=8.0,
        beam_center_y_px=8.0,
        pixel_size_x_m=0.001,
        pixel_size_y_m=0.001,
        detector_distance_m=0.007,
        incident_wavelength_angstrom=1.0,
    )
    two_theta = math.atan(math.sqrt(50.0) / 7.0)
    ring = int((2.0 * math.sin(two_theta / 2.0)) ** 2 * 100)
    bins, cells = SeriesMaps(recipe).radial_bins((16, 16), 2, geometry)
    # Sectors begin at +x and turn towards +y.
    assert bins[4, 7] == ring
    assert bins[7, 3] == 100 + ring
    assert bins[3, 0] == 200 + ring
    assert bins[0, 4] == 300 + ring
    # In each sector the cells 7 and 1 mm, 1 and 7 mm, and 5 and 5 mm away have this radius.
    assert [cells[100 * sector + ring] for sector in range(4)] == [3, 3, 3, 3]


def test_cells_outside_the_frame_or_the_range_are_not_used() -> None:
    """Cells of the padding, and those past the largest 1/d^2, have no bin."""
    geometry = Geometry(
        beam_center_x_px=1.0,
        beam_center_y_px=1.0,
        pixel_size_x_m=0.001,
        pixel_size_y_m=0.001,
        detector_distance_m=0.1,
        incident_wavelength_angstrom=1.0,
    )
    recipe = Recipe(grid=8, radial_bins=100, sectors=4, s_max_inverse_angstrom2=0.001)
    bins, cells = SeriesMaps(recipe).radial_bins((5, 9), 2, geometry)
    assert cells.sum() == (bins >= 0).sum()
    assert (bins[3:] == -1).all()
    assert (bins[:, 5:] == -1).all()
    assert bins[0, 0] >= 0
    assert bins[0, 1] >= 0
    # 4 px = 4 mm at 100 mm: 1/d^2 = 0.0016 > 0.001.
    assert bins[0, 2] == -1


@pytest.mark.parametrize(
    ("dtype", "series", "values", "valid"),
    [
        # uint16: the largest is no data, the one below a defect, unless saturation says more.
        ("<u2", {}, [0, 65533, 65534, 65535], [True, True, False, False]),
        ("<u2", {"saturation_value": 1000}, [0, 1000, 1001, 65535], [True, True, False, False]),
        # int32 without an error value: negative is a gap.
        ("<i4", {}, [-2, -1, 0, 7], [False, False, True, True]),
        # With one it is noise around zero, and the error value alone is out.
        ("<i4", {"error_value": -9}, [-9, -1, 0, 7], [False, True, True, True]),
        # float32 photons: not a number is not measured.
        ("<f4", {}, [np.nan, 0.0, 2.6, np.inf], [False, True, True, False]),
    ],
)
def test_measured_pixels_are_those_that_count(
    dtype: str, series: dict[str, int], values: list[float], valid: list[bool]
) -> None:
    """By hand for each kind of pixel; the mask takes out what the values do not."""
    pixels = np.array([values], np.dtype(dtype))
    frame = Frame(series=Series(**series), image_id=0, dtype=pixels.dtype, shape=(1, 4))
    counts, found = measured(frame, pixels)
    assert found.tolist() == [valid]
    assert counts.shape == (1, 4)
    mask = np.array([[0, 0, 1, 0]], np.uint32)
    masked = structs.replace(frame, series=Series(**series, pixel_mask=mask))
    assert measured(masked, pixels)[1].tolist() == [[*valid[:2], False, valid[3]]]
    with pytest.raises(DecodeError, match="pixel mask"):
        measured(
            structs.replace(frame, series=Series(pixel_mask=np.zeros((2, 2), np.uint32))), pixels
        )


def test_series_with_one_mask_share_what_is_made_of_it() -> None:
    """A detector sends the same mask with every series; another one counts at once."""
    maps, mask = SeriesMaps(Recipe()), np.array([[0, 0, 1, 0]], np.uint32)

    def frame(series_id: int, mask: np.ndarray) -> Frame:
        series = Series(series_id=series_id, pixel_mask=mask)
        return Frame(series=series, image_id=0, dtype=np.dtype("<u2"), shape=mask.shape)

    first, again = frame(1, mask), frame(2, mask)
    assert maps.invalid(again) is maps.invalid(first)
    assert all(a is b for a, b in zip(maps.cells(again, 2), maps.cells(first, 2), strict=True))
    other = frame(3, 1 - mask)
    assert maps.invalid(other).tolist() == [[1, 1, 0, 1]]
    bits, count = maps.cells(other, 2)
    assert bits is not None
    assert (bits[0], count[0, :2].tolist()) == (0b0100, [0, 1])

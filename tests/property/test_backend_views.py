"""Random small frames: the views are the slow twin's, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from host_cuda import KINDS, make_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from triage.backends import Backend
from triage.records import Frame, Geometry, Recipe, Series

RECIPE = Recipe(grid=8, radial_bins=6, sectors=4, tiles=2, tile_px=6)

# Values near the ends of the type and near zero are as likely as all others together.
INTEGERS = st.sampled_from(["u1", "<u2", "<u4", "i1", "<i2", "<i4"]).flatmap(
    lambda name: hnp.arrays(
        name,
        st.tuples(st.integers(1, 24), st.integers(1, 24)),
        elements=st.one_of(
            hnp.from_dtype(np.dtype(name)),
            st.integers(0, 5),
            st.integers(int(np.iinfo(name).max) - 4, int(np.iinfo(name).max)),
        ),
    )
)
FLOATS = hnp.arrays(
    "<f4",
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    elements=hnp.from_dtype(np.dtype("<f4")),
)


@pytest.fixture(scope="module", params=KINDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return make_backend(request.param, RECIPE)


@settings(max_examples=100)
@given(
    pixels=st.one_of(INTEGERS, FLOATS),
    saturation=st.one_of(st.none(), st.integers(0, 2**32)),
    error=st.one_of(st.none(), st.integers(-(2**31), 2**31)),
    masked_share=st.sampled_from([None, 0.0, 0.2, 0.9]),
    seed=st.integers(0, 100),
    beam=st.tuples(st.floats(-20, 40), st.floats(-20, 40)),
)
def test_views_of_random_frames(
    backend: Backend,
    pixels: np.ndarray,
    saturation: int | None,
    error: int | None,
    masked_share: float | None,
    seed: int,
    beam: tuple[float, float],
) -> None:
    """Every number of the overview, the radial view and the tiles."""
    mask = None
    if masked_share is not None:
        chance = np.random.default_rng(seed).random(pixels.shape)
        mask = np.where(chance < masked_share, 1, 0x30000).astype(np.uint32)
    # A beam centre off every line of symmetry: no cell lies exactly between two sectors.
    geometry = Geometry(
        beam_center_x_px=round(beam[0]) + 0.3141,
        beam_center_y_px=round(beam[1]) + 0.2718,
        pixel_size_x_m=0.002,
        pixel_size_y_m=0.0021,
        detector_distance_m=0.1,
        incident_wavelength_angstrom=1.0,
    )
    series = Series(
        saturation_value=saturation, error_value=error, pixel_mask=mask, geometry=geometry
    )
    frame = Frame(
        series=series,
        image_id=0,
        dtype=pixels.dtype,
        shape=pixels.shape,
        payload=pixels.tobytes(),
    )
    k = RECIPE.bin_factor(pixels.shape)
    wanted = reference.cells(pixels, k, RECIPE.grid, mask, saturation, error)
    views = backend.prepare([frame])
    np.testing.assert_array_equal(views.maximum[0], wanted.maximum)
    np.testing.assert_array_equal(views.total[0], wanted.total)
    np.testing.assert_array_equal(views.count[0], wanted.count)
    np.testing.assert_array_equal(views.overview[0], reference.overview(wanted, k))
    radial = reference.radial(wanted, pixels.shape, k, geometry, RECIPE)
    np.testing.assert_array_equal(views.radial[0], radial)
    tiles = backend.close_ups([frame], views, [0]).tiles[0]
    np.testing.assert_array_equal(tiles, reference.tiles(wanted, k, RECIPE))

"""The list of spots: by hand on drawn spots, and against the slow twin on noise and spots."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import spot_twin
from host_cuda import KINDS, make_backend
from pictures import encode

from triage.backends import Backend, open_backend
from triage.records import MOST_SPOTS, Frame, Geometry, Recipe, Series, Spot

RECIPE = Recipe(grid=32)


@pytest.fixture(scope="module", params=KINDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return make_backend(request.param, RECIPE)


def frame_of(pixels: np.ndarray, series: Series | None = None, encoding: str = "bslz4") -> Frame:
    return Frame(
        series=series or Series(),
        image_id=1,
        encoding=encoding,
        dtype=pixels.dtype,
        shape=pixels.shape,
        payload=encode(pixels, encoding, 0),
    )


def listed(backend: Backend, pixels: np.ndarray, series: Series | None = None) -> np.ndarray:
    """The valid rows of the list."""
    frame = frame_of(pixels, series)
    (spots,) = backend.close_ups([frame], backend.prepare([frame]), [0]).spots
    assert spots.dtype == np.float32
    assert spots.shape == (MOST_SPOTS, len(Spot))
    valid = spots[:, Spot.VALID] == 1
    assert not spots[~valid].any()
    assert not valid[valid.sum() :].any()
    return spots[valid]


def around(y_px: float, x_px: float) -> Geometry:
    """A detector that the beam meets there."""
    return Geometry(
        beam_center_x_px=x_px, beam_center_y_px=y_px, pixel_size_x_m=1e-4, pixel_size_y_m=1e-4,
        detector_distance_m=0.1, incident_wavelength_angstrom=1.0,
    )  # fmt: skip


def drawn(
    shape: tuple[int, int],
    background: float,
    seed: int,
    spots: int,
    widest: float = 1.8,
    rise: float = 0.0,
) -> np.ndarray:
    """Poisson noise with Gaussian spots of many widths and brightnesses; ``rise`` is a pixel's."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    mean = background + rise * x
    for _ in range(spots):
        sy, sx = rng.uniform(0.5, widest, 2)
        cy, cx = rng.uniform(0, shape[0]), rng.uniform(0, shape[1])
        light = np.exp(-0.5 * (((y - cy) / sy) ** 2 + ((x - cx) / sx) ** 2))
        mean += widest / 1.8 * rng.uniform(10, 400) * light / (2 * math.pi * sy * sx)
    return rng.poisson(mean).astype("<u2")


def test_a_drawn_spot_is_measured_as_drawn(backend: Backend) -> None:
    """Net counts, background and shares of pixels written by hand, on an even field."""
    pixels = np.full((64, 64), 4, "<u2")
    pixels[20, 30:33] = 104, 204, 104
    pixels[21, 31] = 104
    (spot,) = listed(backend, pixels)
    expected = {
        Spot.X_PX: 31.5,  # as its left and its right are alike
        Spot.INTENSITY: 500,
        Spot.BACKGROUND: 4,
        Spot.PIXELS: 4,
        Spot.YX: 0,
        Spot.PEAK: 200,
        Spot.CUT: 20 / 200,
        Spot.PEAKS: 1,
        Spot.LONE: 0,
        Spot.SATURATED: 0,
        Spot.AT_GAP: 0,
    }
    for column, value in expected.items():
        assert spot[column] == pytest.approx(value, abs=1e-5), column
    # The field has no scatter; three counts of a bin of 2 x 2 pixels are trusted to have Poisson's.
    assert spot[Spot.WIDTH_PX] == 2
    assert spot[Spot.NOISE] == pytest.approx(math.sqrt(3 / 4), rel=1e-6)
    assert spot[Spot.SNR] == pytest.approx(500 / math.sqrt(500 + 4 * 3 / 4), rel=1e-6)


def test_a_drawn_gaussian_has_its_place_and_variances(backend: Backend) -> None:
    """Light of known centre and covariance, round and aslant, on a level field and on a slope."""
    y, x = np.mgrid[:160, :160] + 0.5
    wanted = [
        (40.3, 40.7, 1.2, 0.0, 1.2), (40.6, 120.1, 4.0, -1.5, 2.0),
        (120.2, 40.5, 1.0, 0.5, 3.0), (120.5, 120.9, 9.0, 0.0, 2.5),
    ]  # fmt: skip
    for rise in (0.0, 2.0):
        counts = 200 + rise * x
        for cy, cx, yy, yx, xx in wanted:
            form = (xx * (y - cy) ** 2 - 2 * yx * (y - cy) * (x - cx) + yy * (x - cx) ** 2) / (
                yy * xx - yx * yx
            )
            counts += 2000 * np.exp(-0.5 * form)
        found = listed(backend, np.rint(counts).astype("<u2"))
        for place in wanted:
            near = np.hypot(found[:, Spot.Y_PX] - place[0], found[:, Spot.X_PX] - place[1])
            spot = found[near < 3][0]
            columns = [Spot.Y_PX, Spot.X_PX, Spot.YY, Spot.YX, Spot.XX]
            assert spot[columns] == pytest.approx(place, rel=0.03, abs=0.03)


def test_weak_spots_on_a_steep_background_are_found(backend: Backend) -> None:
    """Near the beam, where the air's light falls by a hundredth per pixel: nine in ten of 8
    sigma, and little beside them."""
    rng = np.random.default_rng(12)
    y, x = np.mgrid[:480, :480] + 0.5
    mean = 6000.0 * np.exp(-np.hypot(y - 240, x - 240) / 90)
    places = [(cy, cx) for cy in range(30, 480, 60) for cx in range(30, 480, 60)]
    for cy, cx in places:
        under = mean[cy, cx]
        light = 32 + math.sqrt(32**2 + 64 * under * 4 * math.pi)
        mean += light * np.exp(-0.5 * ((y - cy) ** 2 + (x - cx) ** 2)) / (2 * math.pi)
    found = listed(backend, rng.poisson(mean).astype("<u2"))
    away = [np.hypot(found[:, Spot.Y_PX] - cy, found[:, Spot.X_PX] - cx).min() for cy, cx in places]
    assert np.mean(np.array(away) < 2) > 0.9
    assert len(found) < 2 * len(places)


def test_a_known_beam_shows_spots_on_a_narrow_ring() -> None:
    """Of 6 pixels' width and four times as bright as what is beside it: most spots of 8 sigma are
    found where the ring can be told, and fewer where it cannot."""
    backend = open_backend("cpu", Recipe())
    rng = np.random.default_rng(14)
    y, x = np.mgrid[:480, :480] + 0.5
    mean = 20 + 60 * np.exp(-0.5 * ((np.hypot(y - 230, x - 250) - 150) / 6) ** 2)
    turns = 2 * math.pi * (np.arange(24) + rng.uniform(0, 0.5, 24)) / 24
    places = [(230 + 150 * math.sin(turn), 250 + 150 * math.cos(turn)) for turn in turns]
    for cy, cx in places:
        under = mean[int(cy), int(cx)]
        light = 32 + math.sqrt(32**2 + 64 * under * 4 * math.pi)
        mean += light * np.exp(-0.5 * ((y - cy) ** 2 + (x - cx) ** 2)) / (2 * math.pi)
    pixels, shares = rng.poisson(mean).astype("<u2"), []
    for geometry in (around(230, 250), None):
        found = listed(backend, pixels, Series(geometry=geometry))
        away = [np.hypot(found[:, Spot.Y_PX] - i, found[:, Spot.X_PX] - j).min() for i, j in places]
        shares.append(np.mean(np.array(away) < 2))
        assert len(found) < 2 * len(places)
    assert shares[0] > 0.75 > 0.7 > shares[1]


def brighten(mean: np.ndarray, cy: np.ndarray, cx: np.ndarray) -> None:
    """Add to ``mean`` spots of signal to noise 8 there."""
    y, x = np.mgrid[: mean.shape[0], : mean.shape[1]] + 0.5
    for i, j in zip(cy, cx, strict=True):
        under = mean[int(i), int(j)]
        light = 32 + math.sqrt(32**2 + 64 * under * 4 * math.pi)
        mean += light * np.exp(-0.5 * ((y - i) ** 2 + (x - j) ** 2)) / (2 * math.pi)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("what", ["hot pixels", "a stop", "a corner", "a dead module"])
def test_a_known_beam_costs_no_spot(what: str, seed: int) -> None:
    """Whatever lies in the rings around it: what is found without it is found with it."""
    rng = np.random.default_rng(seed)
    backend, beam, side = open_backend("cpu", Recipe()), (251.3, 262.4), 512
    y, x = np.mgrid[:side, :side] + 0.5
    away = np.hypot(y - beam[0], x - beam[1])
    mean, mask = 1 + 100 * np.exp(-0.5 * (away / 60) ** 2), np.zeros((side, side), np.uint32)
    turns, radius = 2 * math.pi * (np.arange(16) + rng.uniform(0, 0.5, 16)) / 16, np.full(16, 150.0)
    if what == "a stop":
        mask[away < 20], radius = 1, rng.uniform(25, 35, 16)
    if what == "a dead module":
        mask[100:230], radius = 1, rng.uniform(70, 230, 16)
    cy, cx = beam[0] + radius * np.sin(turns), beam[1] + radius * np.cos(turns)
    if what == "a corner":
        cy, cx = rng.uniform(5, 40, (2, 16))
        cx[8:], cy[::2] = side - cx[8:], side - cy[::2]
    brighten(mean, cy, cx)
    pixels = rng.poisson(mean).astype("<u4")
    if what in ("hot pixels", "a dead module"):
        pixels[tuple(rng.integers(0, side, (2, 40)))] = 10**6
    seen = [(i, j) for i, j in zip(cy, cx, strict=True) if not mask[int(i), int(j)]]
    shares, others = [], []
    for geometry in (None, around(*beam)):
        spots = listed(backend, pixels, Series(pixel_mask=mask, geometry=geometry))
        far = [np.hypot(spots[:, Spot.Y_PX] - i, spots[:, Spot.X_PX] - j).min() for i, j in seen]
        shares.append(np.mean(np.array(far) < 2))
        others.append(len(spots) - np.count_nonzero(np.array(far) < 2))
    assert shares[1] > max(0.7, shares[0] - 0.07)
    assert others[1] < others[0] + 8


def test_a_hot_pixel_is_sharper_than_a_reflection(backend: Backend) -> None:
    """Light that half a pixel spreads, wherever in its pixel it falls, and pixels alone."""
    counts = np.full((160, 160), 40.0)
    edges = np.arange(161.0)
    shares = np.linspace(0.05, 0.95, 5)
    places, hot = [], []
    for i, j in np.ndindex(5, 5):
        place = 20 + 30 * i + shares[i], 20 + 30 * j + shares[j]
        falls = [np.diff([math.erf((e - at) / math.sqrt(0.5)) / 2 for e in edges]) for at in place]
        counts += 4000 * np.outer(*falls)
        counts[5 + 30 * i, 5 + 30 * j] += 800
        places.append(place)
        hot.append((5.5 + 30 * i, 5.5 + 30 * j))
    found = listed(backend, np.rint(counts).astype("<u2"))

    def areas(of: list[tuple[float, float]]) -> list[float]:
        return [
            found[np.hypot(found[:, Spot.Y_PX] - y, found[:, Spot.X_PX] - x).argmin()][
                Spot.FITTED_PX2
            ]
            for y, x in of
        ]

    assert max(areas(hot)) < 0.7 * min(areas(places))


def test_weak_spots_on_an_offset_without_noise_are_found(backend: Backend) -> None:
    """A CCD's forty counts that scatter by two: spots of ten of those sigma are all there."""
    rng = np.random.default_rng(13)
    y, x = np.mgrid[:480, :480] + 0.5
    counts = rng.normal(40.0, 2.0, y.shape)
    places = [(cy, cx) for cy in range(24, 480, 48) for cx in range(24, 480, 48)]
    for cy, cx in places:
        light = 10 * 2.0 * math.sqrt(4 * math.pi) * 1.2
        counts += (
            light * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * 1.44)) / (2 * math.pi * 1.44)
        )
    found = listed(backend, np.rint(counts).astype("<u2"))
    away = [np.hypot(found[:, Spot.Y_PX] - cy, found[:, Spot.X_PX] - cx).min() for cy, cx in places]
    assert np.mean(np.array(away) < 2) > 0.97


def test_what_a_spot_touches_is_said(backend: Backend) -> None:
    """A hot pixel is lone; spots at the mask, at the edge and at a saturated pixel are marked, and
    how near to saturation each comes."""
    pixels = np.full((64, 64), 1, "<u2")
    cross = np.array([[20, 60, 20], [60, 90, 60], [20, 60, 20]])
    for y, x in ((10, 10), (10, 40), (40, 10), (63, 40)):
        part = cross[: min(3, 65 - y)]
        pixels[y - 1 : y + 2, x - 1 : x + 2] = part
    pixels[30, 50] = 500
    pixels[40, 12] = 5000
    mask = np.zeros((64, 64), np.uint32)
    mask[:, 42] = 1
    found = listed(backend, pixels, Series(pixel_mask=mask, saturation_value=1000))
    said = {
        (int(s[Spot.Y_PX]), int(s[Spot.X_PX])): (
            s[Spot.LONE], s[Spot.SATURATED], s[Spot.AT_GAP], round(float(s[Spot.BRIGHTEST]), 6)
        )
        for s in found
    }  # fmt: skip
    assert said == {
        (10, 10): (0, 0, 0, 0.09),
        (10, 40): (0, 0, 1, 0.09),
        (40, 10): (0, 1, 0, 1.0),
        (63, 40): (0, 0, 1, 0.09),
        (30, 50): (1, 0, 0, 0.5),
    }


@pytest.mark.parametrize("kind", ["|u1", "<u2", ">u2", "<u4", "|i1", "<i2", "<i4", "<f4"])
def test_the_kind_of_the_pixels_makes_no_difference(backend: Backend, kind: str) -> None:
    """A gap that is masked, negative or not a number, and a saturated pixel, are what they are."""
    rng = np.random.default_rng(7)
    counts = rng.poisson(3.0, (64, 64)).astype(np.int64)
    for y, x in ((1, 1), (10, 40), (40, 10), (63, 62), (30, 30)):
        counts[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] += 20
        counts[y, x] += 40
    counts[40, 11] = 125
    mask = np.zeros((64, 64), np.uint32)
    mask[20:24, 50:54] = mask[10, 42] = 1
    expected = listed(backend, counts.astype("<u4"), Series(pixel_mask=mask, saturation_value=120))
    assert len(expected) >= 5
    pixels = counts.astype(kind)
    if pixels.dtype.kind != "u":
        # These say themselves what is no measurement.
        pixels[mask != 0] = np.nan if pixels.dtype.kind == "f" else -1
        mask = np.zeros_like(mask)
    found = listed(backend, pixels, Series(pixel_mask=mask, saturation_value=120))
    saturated = [int(Spot.SATURATED), int(Spot.AT_GAP), int(Spot.BRIGHTEST)]
    if pixels.dtype.kind == "f":
        # What is not a number is taken for beyond saturation.
        found, expected = (np.delete(spots, saturated, axis=1) for spots in (found, expected))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("kind", ["|i1", "<i2", "<i4"])
def test_with_an_error_value_only_it_is_a_gap(backend: Backend, kind: str) -> None:
    """As Jungfraujoch sends it: what is below zero beside it is noise, and counts nothing."""
    rng = np.random.default_rng(8)
    pixels = rng.poisson(2.0, (64, 64)).astype(kind)
    for y, x in ((10, 40), (40, 10), (30, 30)):
        pixels[y - 1 : y + 2, x - 1 : x + 2] += 20
        pixels[y, x] += 40
    counts, mask = pixels.astype("<u4"), np.zeros((64, 64), np.uint32)
    pixels[8:13, 37], counts[8:13, 37] = -3, 0
    error = int(np.iinfo(kind).min)
    pixels[30, 32], mask[30, 32] = error, 1
    expected = listed(backend, counts, Series(pixel_mask=mask, saturation_value=120))
    assert len(expected) >= 3
    found = listed(backend, pixels, Series(error_value=error, saturation_value=120))
    assert np.array_equal(found, expected)


def test_spots_that_touch_are_one_with_two_peaks(backend: Backend) -> None:
    """A split spot is one set of pixels that says so; two that do not touch are two."""
    pixels = np.full((64, 64), 2, "<u2")
    blob = np.array([[40, 80, 40], [80, 160, 80], [40, 80, 40]])
    pixels[20:23, 20:23] = blob
    pixels[20:23, 24:27] = blob
    pixels[21, 23] = 30
    pixels[40:43, 20:23] = blob
    pixels[40:43, 28:31] = blob
    found = listed(backend, pixels)
    assert sorted((int(s[Spot.Y_PX]), int(s[Spot.X_PX]), int(s[Spot.PEAKS])) for s in found) == [
        (21, 23, 2), (41, 21, 1), (41, 29, 1)
    ]  # fmt: skip


def test_nothing_is_found_where_nothing_is(backend: Backend) -> None:
    """An empty frame, an even one, one that is masked whole, and a frame with an error."""
    assert not len(listed(backend, np.zeros((64, 48), "<u2")))
    assert not len(listed(backend, np.full((64, 48), 7, "<u2")))
    mask = np.ones((64, 48), np.uint32)
    noise = drawn((64, 48), 3.0, 1, 5)
    assert not len(listed(backend, noise, Series(pixel_mask=mask)))
    good = frame_of(noise)
    bad = Frame(
        series=Series(), image_id=2, encoding="bslz4", dtype=good.dtype, shape=good.shape,
        payload=good.payload[:-1],
    )  # fmt: skip
    frames = [good, bad, good]
    spots = backend.close_ups(frames, backend.prepare(frames), [2, 1]).spots
    assert spots[0].any()
    assert not spots[1].any()


@pytest.mark.parametrize(
    ("shape", "background", "rise", "widest", "dtype", "beam"),
    [
        ((64, 60), 0.05, 0.0, 1.8, "<u2", None),
        ((60, 64), 2.0, 0.0, 1.8, "<u4", (20.5, 31.2)),
        ((125, 101), 0.5, 0.0, 1.8, "<i4", None),
        ((230, 190), 12.0, 0.0, 7.0, "<u2", None),
        ((290, 130), 0.4, 0.0, 4.0, "<u2", (-60.0, 80.0)),
        ((40, 33), 15.0, 0.0, 1.8, "<f4", None),
        ((70, 64), 6.0, 1.0, 1.8, "<u2", None),
        ((120, 110), 6.0, 0.5, 1.8, "<u2", (70.0, 50.0)),
        ((140, 60), 6.0, 0.5, 1.8, "<u2", (20.0, 3e7)),
    ],
)
def test_the_list_is_the_twins(
    backend: Backend,
    shape: tuple[int, int],
    background: float,
    rise: float,
    widest: float,
    dtype: str,
    beam: tuple[float, float] | None,
) -> None:
    """On noise with spots of all widths, gaps as wide as a module and saturated pixels, of several
    types and sizes, on an even background and on a slope, with and without a beam."""
    pixels, mask, wanted = twins_list(shape, background, rise, widest, dtype, beam)
    assert len(wanted) > 4
    geometry = None if beam is None else around(*beam)
    series = Series(pixel_mask=mask, saturation_value=90, geometry=geometry)
    found = listed(backend, pixels, series)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


@functools.cache
def twins_list(
    shape: tuple[int, int],
    background: float,
    rise: float,
    widest: float,
    dtype: str,
    beam: tuple[float, float] | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels, mask, and the valid rows of the twin's list."""
    pixels = drawn(shape, background, shape[0], 25, widest, rise).astype(dtype)
    mask = np.zeros(shape, np.uint32)
    mask[shape[0] // 2 : shape[0] // 2 + (3 if shape[0] < 100 else shape[0] // 3)] = 1
    mask[:, shape[1] // 3] = 1
    counts = np.where(pixels > 90, spot_twin.BEYOND, pixels.astype(np.int64))
    counts[mask > 0] = spot_twin.GAP
    wanted = spot_twin.spots(counts, RECIPE.bin_factor(shape), 90, beam)
    return pixels, mask, wanted[wanted[:, Spot.VALID] == 1]


def test_the_list_is_that_of_the_frame_alone(backend: Backend) -> None:
    """Other frames before it and beside it change no bit, nor does the encoding."""
    frames = [
        frame_of(drawn((64, 60), 0.2, 1, 20)),
        frame_of(drawn((120, 90), 4.0, 2, 40)),
        frame_of(drawn((64, 60), 5.0, 3, 20), encoding="raw"),
    ]
    together = backend.close_ups(frames, backend.prepare(frames), [2, 0, 1]).spots
    again = [
        frame_of(drawn((64, 60), 0.2, 1, 20), encoding="raw"),
        frame_of(drawn((120, 90), 4.0, 2, 40), encoding="lz4"),
        frame_of(drawn((64, 60), 5.0, 3, 20)),
    ]
    for place, row in enumerate([2, 0, 1]):
        (alone,) = backend.close_ups([again[row]], backend.prepare([again[row]]), [0]).spots
        assert alone.tobytes() == together[place].tobytes()


@pytest.mark.parametrize(("sy", "sx"), [(0.8, 0.8), (1.0, 2.5), (3.0, 1.2)])
def test_a_fitted_gaussian_has_the_signal_to_noise_that_was_drawn(
    backend: Backend, sy: float, sx: float
) -> None:
    """Spots of 8 sigma on 50 counts, by the definition of visibility: I / sqrt(I + B 4 pi s s)."""
    rng = np.random.default_rng(11)
    y, x = np.mgrid[:480, :480] + 0.5
    under = 4 * math.pi * sy * sx
    light = 32 + math.sqrt(32**2 + 64 * 50 * under)  # I^2 = 64 (I + 50 under)
    mean = np.full(y.shape, 50.0)
    for cy in range(24, 480, 48):
        for cx in range(24, 480, 48):
            far = ((y - cy - rng.uniform()) / sy) ** 2 + ((x - cx - rng.uniform()) / sx) ** 2
            mean += light * np.exp(-0.5 * far) / (2 * math.pi * sy * sx)
    found = listed(backend, rng.poisson(mean).astype("<u2"))
    off = np.abs((found[:, [Spot.Y_PX, Spot.X_PX]] % 48) - 24.5).max(1)
    spots = found[off < 3]
    assert len(spots) > 90
    assert np.median(spots[:, Spot.FITTED]) == pytest.approx(8.0, rel=0.1)
    assert np.median(spots[:, Spot.FITTED_PX2]) == pytest.approx(sy * sx, rel=0.25)


def test_of_many_spots_the_strongest_are_listed(backend: Backend) -> None:
    """A frame with more spots than the list holds: full, the surest first."""
    pixels = np.ones((512, 512), "<u2")
    rng = np.random.default_rng(5)
    for y in range(8, 504, 16):
        for x in range(8, 504, 16):
            pixels[y - 1 : y + 2, x - 1 : x + 2] += int(rng.integers(20, 200))
    found = listed(backend, pixels)
    assert len(found) == MOST_SPOTS
    assert (np.diff(found[:, Spot.MATCHED]) <= 0).all()
    heights = sorted(int(h) - 1 for h in pixels[8:504:16, 8:504:16].flat)
    assert found[-1, Spot.PEAK] >= heights[-MOST_SPOTS] - 0.5


def test_a_slope_of_the_background_is_no_spot(backend: Backend) -> None:
    """Thousand counts that rise by two thirds over the frame: spots are found as drawn on it."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:400, :400]
    mean = 1000.0 + 1.7 * x
    places = [(60 + 70 * i, 50 + 60 * j) for i in range(5) for j in range(6)]
    for cy, cx in places:
        mean += 500.0 * np.exp(-0.5 * ((y - cy) ** 2 + (x - cx) ** 2))
    found = listed(backend, rng.poisson(mean).astype("<u2"))
    clear = found[found[:, Spot.SNR] > 10]
    at = {(int(s[Spot.Y_PX]), int(s[Spot.X_PX])) for s in clear}
    assert at == set(places)
    assert (clear[:, Spot.PIXELS] < 30).all()

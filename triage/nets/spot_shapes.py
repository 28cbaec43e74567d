"""What the shapes, the strengths and the places of a frame's spots say of its crystal.

One vector of numbers from the list of spots, for mosaicity, quality grade and resolution:

* A crystal of mosaic blocks widens a reflection along its Debye-Scherrer ring by |g| times the
  spread of the blocks, and hardly away from the beam: what leaves the Ewald sphere in that
  direction does not diffract. Everything else that widens a spot (optics, pixel, domains,
  divergence) does so by the same angle all over the frame. So the variance along the ring [px^2]
  is a straight line over the square of u = |g| times the path to the detector, which is the
  number of pixels per radian of turn, and its slope is the spread's square (compare the
  mosaic-block model of Nave, Acta Cryst. D54, 848, 1998). The line is searched over a grid with
  a loss that saturates, so that false spots do not bend it, and then refined.
* Spots are counted above several ratios of signal to noise: I / sqrt(I + B n), with n the 4 pi
  sigma sigma pixels under a Gaussian spot and I what it has in all.
* Quantiles of 1/d^2 say how far out there are spots.
* A blank frame has spots too: ice, hot pixels, pixels of double size beside a gap, tracks. Those
  that are like none of these, clean ones, are counted and ranked apart.

"""

from __future__ import annotations

import math

import numba as nb
import numpy as np
from numpy.typing import NDArray

from triage.records import ICE_D_ANGSTROM, Geometry, Spot

__all__ = [
    "LINE_FEATURES",
    "SHAPE_FEATURES",
    "line_features",
    "log_brightest",
    "place_of",
    "shape_features",
]

_COUNTED = (3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 25.0, 50.0, 100.0)
"""Signal to noise above which spots are counted."""
_QUANTILES = (0.25, 0.5, 0.75, 0.9)
_REACHES = (0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
_MATCHED_COUNTED = (3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 7.0, 8.0, 10.0, 15.0, 25.0, 50.0)
"""Sigma of the filter that fits above which spots are counted."""
_RANKS = (1, 2, 3, 5, 7, 10, 14, 20, 30, 50)
_CLEAN_COUNTED = (3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 7.0, 8.0)
_FITTED_COUNTED = (3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 8.0, 10.0, 15.0)
_CLEAN_KINDS = ("sharp", "blunt", "wide", "widest")
_BLUNT = 0.45
"""Share of a spot's light in its brightest pixel, below which it is blunt."""
_CLEAN_SPREAD = (4.0, 5.0)
"""Sigma above which blocks with a clean spot are counted; the first also of medians."""
_CLEAN_BLOCKS = 6
_CLEAN_PIXELS = 150.0
"""Most pixels, of a filter of one pixel."""
_CLEAN_RATIO = 8.0
"""Largest ratio of the variances along a spot's axes, each with a tenth of a pixel more."""
_CLEAN_APART_PX = 6.0
_NO_SNR = 2.0
"""What a spot has that is not there: less than any that is listed."""
_VISIBLE = 5.0
_CLEAR = 8.0
_BLOCKS = 10
_PER_BLOCK = 2
_LARGEST_D_ANGSTROM = 25.0
_ICE_TOLERANCE = 0.01
_ON_LINE, _BESIDE_LINE, _ICE_SIGMA = 0.005, 0.025, 4.0
"""Share of d within which a spot lies on a line of ice, the share it lies beside it, and the sigma
of those that are counted."""
_BRIGHT, _LEAST_BRIGHT = 0.5, 0.02
"""Shares of saturation: from the first on ice is bad, and below the second all is alike."""
_FWHM = 2.0 * math.sqrt(2.0 * math.log(2.0))
_SPREADS_DEG = tuple(float(v) for v in 0.02 * 1.25 ** np.arange(24))
"""FWHM of the grid, up to 3.4 degree."""
_OWN_PX2 = tuple(float(v) for v in 0.12 * 1.8 ** np.arange(8))
"""Variance without mosaicity of the grid, up to 7.3 px^2."""
_LIMIT = 1e3

_LINE = (
    "log_deg",
    "seen_log_deg",
    "own_log_px2",
    "seen_own_log_px2",
    "loss",
    "seen_loss_excess",
    "error",
    "log_spots",
)
LINE_FEATURES: tuple[str, ...] = (
    *(f"log_on_line_{i}" for i in range(len(ICE_D_ANGSTROM))),
    *(f"log_beside_line_{i}" for i in range(len(ICE_D_ANGSTROM))),
    "log_on_lines_sigma",
    "log_beside_lines_sigma",
    "on_lines_along",
    "on_lines_log_brightest",
    "beside_lines_log_brightest",
    "log_on_lines_bright",
    "log_beside_lines_bright",
)
SHAPE_FEATURES: tuple[str, ...] = (
    "has_geometry",
    "log_spots",
    "log_lone",
    "log_cut_off",
    "is_full",
    "log_last_sigma",
    *(f"log_over_{int(bound)}" for bound in _COUNTED),
    "log_listed_over_5",
    "log_maxima_over_5",
    "log_off_ice_over_5",
    "log_spread_over_5",
    *(f"log_snr_q{round(100 * q)}" for q in _QUANTILES),
    "log_background",
    "log_noise_over_poisson",
    "log_neighbour_px",
    "log_near_neighbour_px",
    "log_pixels",
    *(f"log_major_px2_q{round(100 * q)}" for q in _QUANTILES),
    *(f"log_minor_px2_q{round(100 * q)}" for q in _QUANTILES),
    *(f"log_ratio_q{round(100 * q)}" for q in _QUANTILES),
    "along_ring",
    *(f"s_q{round(100 * q)}" for q in _REACHES),
    *(f"clear_s_q{round(100 * q)}" for q in _REACHES),
    *(f"tangential_log_px2_q{round(100 * q)}" for q in _QUANTILES),
    *(f"radial_log_px2_q{round(100 * q)}" for q in _QUANTILES),
    "near_tangential_log_px2",
    "far_tangential_log_px2",
    "near_radial_log_px2",
    "far_radial_log_px2",
    *(f"spread_log_deg_q{round(100 * q)}" for q in _QUANTILES),
    *(f"far_spread_log_deg_q{round(100 * q)}" for q in _QUANTILES),
    "log_px_per_deg",
    "far_log_px_per_deg",
    *(f"line_{name}" for name in _LINE),
    *(f"clear_line_{name}" for name in _LINE),
    *LINE_FEATURES,
    *(f"log_matched_over_{bound:g}" for bound in _MATCHED_COUNTED),
    *(f"lone_log_matched_over_{bound:g}" for bound in _CLEAN_COUNTED),
    *(f"clean_log_sigma_{rank}" for rank in _RANKS),
    *(f"clean_log_over_{bound:g}" for bound in _CLEAN_COUNTED),
    *(f"clean_{kind}_log_over_{bound:g}" for kind in _CLEAN_KINDS for bound in _CLEAN_COUNTED),
    *(f"clean_log_blocks_over_{bound:g}" for bound in _CLEAN_SPREAD),
    "clean_pixels",
    "clean_peak_share",
    *(f"log_fitted_over_{bound:g}" for bound in _FITTED_COUNTED),
    *(f"clean_log_fitted_over_{bound:g}" for bound in _FITTED_COUNTED),
    *(f"clean_log_fitted_{rank}" for rank in _RANKS),
    "log_area",
)
"""What each number is. ``log``: natural; counts as log(1 + n). ``line``: of the straight line;
``seen``: with a spread that widens the spots farthest out by a pixel at least; ``clear``: of spots
of signal to noise over 8; ``near``, ``far``: the thirds of the spots that a turn of the crystal
moves least and most; ``s``: 1/d^2, 1/angstrom^2; ``px_per_deg``: pixels along the ring that a turn
by a degree moves a spot; ``on_line``: spots on each line of ice, ``beside_line``: as many as that
would be by those beside it, ``sigma``: the surest of them all, ``along``: how much of their lengths
lies along the ring, ``brightest``: the brightest pixel of them all over half of saturation,
``bright``: as many as have one above that; ``matched``: by the filter that fits; ``lone``: of lone
pixels; ``clean``: of spots that are whole, round, off the lines of ice and by themselves;
``sharp``, ``blunt``: with much or little of their light in one pixel, ``wide``, ``widest``: that
filters of 2 and of more pixels fit; ``sigma_3``: of the third surest, ``fitted``: signal to noise
of the Gaussian that fits a spot, ``area``: pixels of the frame.
Zero where there is nothing to say, but ``brightest`` of no spot at all is its least."""

_Y, _X, _INTENSITY = int(Spot.Y_PX), int(Spot.X_PX), int(Spot.INTENSITY)
_BACKGROUND, _NOISE, _SNR = int(Spot.BACKGROUND), int(Spot.NOISE), int(Spot.SNR)
_PIXELS, _YY, _YX, _XX = int(Spot.PIXELS), int(Spot.YY), int(Spot.YX), int(Spot.XX)
_CUT, _PEAKS, _LONE = int(Spot.CUT), int(Spot.PEAKS), int(Spot.LONE)
_PEAK = int(Spot.PEAK)
_SATURATED, _AT_GAP, _VALID = int(Spot.SATURATED), int(Spot.AT_GAP), int(Spot.VALID)
_MATCHED, _WIDTH_PX = int(Spot.MATCHED), int(Spot.WIDTH_PX)
_FITTED = int(Spot.FITTED)
_BRIGHTEST = int(Spot.BRIGHTEST)


def place_of(geometry: Geometry | None) -> NDArray[np.float64]:
    """(6,) beam's y and x [px], pixel's height and width [m], distance [m], wavelength [angstrom].

    Zeros where it is not known.
    """
    place = np.zeros(6)
    if geometry is not None:
        place[:] = (
            geometry.beam_center_y_px,
            geometry.beam_center_x_px,
            geometry.pixel_size_y_m,
            geometry.pixel_size_x_m,
            geometry.detector_distance_m,
            geometry.incident_wavelength_angstrom,
        )
    return place


def shape_features(
    spots: NDArray[np.float32], geometry: Geometry | None, shape: tuple[int, int]
) -> NDArray[np.float32]:
    """The numbers of :data:`SHAPE_FEATURES`, float32, all finite.

    Args:
        spots: (MOST_SPOTS, len(Spot)) of one frame; rows that are no spots are zero.
        geometry: None where it is not known; what needs it is then zero.
        shape: (y, x) of the frame in pixels.
    """
    out = np.zeros(len(SHAPE_FEATURES))
    place = place_of(geometry)
    _features(np.ascontiguousarray(spots, np.float32), place, float(shape[0]), float(shape[1]), out)
    np.nan_to_num(out, copy=False, nan=0.0, posinf=_LIMIT, neginf=-_LIMIT)
    np.clip(out, -_LIMIT, _LIMIT, out)
    return out.astype(np.float32)


def line_features(spots: NDArray[np.float32], geometry: Geometry | None) -> NDArray[np.float32]:
    """The numbers of :data:`LINE_FEATURES` alone, float32, all finite; zeros without a geometry.

    Args:
        spots: (n, len(Spot)); rows that are no spots are zero.
    """
    out = np.zeros(len(LINE_FEATURES))
    if geometry is not None:
        _ice_lines(np.ascontiguousarray(spots, np.float32), place_of(geometry), out, 0)
    np.nan_to_num(out, copy=False, nan=0.0, posinf=_LIMIT, neginf=-_LIMIT)
    return out.astype(np.float32)


_COUNTED_A = np.array(_COUNTED)
_QUANTILES_A = np.array(_QUANTILES)
_REACHES_A = np.array(_REACHES)
_ICE_A = np.array(ICE_D_ANGSTROM)
_SPREADS_A = np.array(_SPREADS_DEG)
_OWN_A = np.array(_OWN_PX2)
_RANKS_A = np.array(_RANKS)
_CLEAN_COUNTED_A = np.array(_CLEAN_COUNTED)
_CLEAN_SPREAD_A = np.array(_CLEAN_SPREAD)
_MATCHED_COUNTED_A = np.array(_MATCHED_COUNTED)
_FITTED_COUNTED_A = np.array(_FITTED_COUNTED)
_OF_CLEAN = (
    len(_MATCHED_COUNTED)
    + 2 * len(_FITTED_COUNTED)
    + len(_RANKS)
    + (2 + len(_CLEAN_KINDS)) * len(_CLEAN_COUNTED)
    + len(_RANKS)
    + len(_CLEAN_SPREAD)
    + 3
)
_OF_LINES = len(LINE_FEATURES)


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _quantiles(
    values: NDArray[np.float64], at: NDArray[np.float64], out: NDArray[np.float64], first: int
) -> int:
    """Write quantiles from place ``first`` on, zeros if there is no value; the place after them."""
    if values.size > 0:
        ordered = np.sort(values)
        for i in range(at.size):
            place = at[i] * (ordered.size - 1)
            low = int(place)
            high = min(low + 1, ordered.size - 1)
            out[first + i] = ordered[low] + (place - low) * (ordered[high] - ordered[low])
    return first + at.size


@nb.njit(cache=True, nogil=True, error_model="numpy")
def log_brightest(share: float) -> float:
    """Logarithm of a share of saturation over half of it, from -3.2 to 0.7."""
    return float(math.log(min(max(share, _LEAST_BRIGHT), 1.0) / _BRIGHT))


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _median(values: NDArray[np.float64]) -> float:
    return float(np.median(values)) if values.size > 0 else 0.0


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _is_regular(y: float, x: float, place: NDArray[np.float64]) -> bool:
    """Whether a place lies off the lines of ice and away from the beam; so does all if unknown."""
    if place[4] <= 0.0:
        return True
    dy, dx = (y - place[0]) * place[2], (x - place[1]) * place[3]
    chord = 2.0 * math.sin(0.5 * math.atan2(math.sqrt(dy * dy + dx * dx), place[4]))
    regular = chord * _LARGEST_D_ANGSTROM > place[5]
    for j in range(_ICE_A.size):
        regular = regular and abs(_ICE_A[j] * chord / place[5] - 1.0) > _ICE_TOLERANCE
    return bool(regular)


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _clean_spots(
    spots: NDArray[np.float32],
    place: NDArray[np.float64],
    ny: float,
    nx: float,
    out: NDArray[np.float64],
    at: int,
) -> None:
    """Write the numbers of sure and of clean spots, and of the frame's area, from ``at`` on."""
    most = spots.shape[0]
    for only_lone in (False, True):
        counted = _CLEAN_COUNTED_A if only_lone else _MATCHED_COUNTED_A
        for bound in counted:
            over = 0
            for i in range(most):
                if spots[i, _VALID] != 0 and (spots[i, _LONE] != 0) == only_lone:
                    over += spots[i, _MATCHED] > bound
            out[at] = math.log(1.0 + over)
            at += 1
    snr, pixels, peak = np.empty(most), np.empty(most), np.empty(most)
    kind, fitted = np.empty(most), np.empty(most)
    blocks = np.zeros((_CLEAN_SPREAD_A.size, _CLEAN_BLOCKS, _CLEAN_BLOCKS))
    n = 0
    for i in range(most):
        spot = spots[i]
        if spot[_VALID] == 0 or spot[_LONE] != 0 or spot[_SATURATED] != 0 or spot[_AT_GAP] != 0:
            continue
        if spot[_PIXELS] >= _CLEAN_PIXELS * spot[_WIDTH_PX] ** 2:
            continue
        y, x = float(spot[_Y]), float(spot[_X])
        yy, yx, xx = float(spot[_YY]), float(spot[_YX]), float(spot[_XX])
        half, mean = math.sqrt(0.25 * (yy - xx) ** 2 + yx * yx), 0.5 * (yy + xx)
        if mean + half + 0.1 >= _CLEAN_RATIO * (max(mean - half, 0.0) + 0.1):
            continue
        if not _is_regular(y, x, place):
            continue
        alone = True
        for j in range(most):
            if j != i and spots[j, _VALID] != 0:
                apart = (float(spots[j, _Y]) - y) ** 2 + (float(spots[j, _X]) - x) ** 2
                if apart < _CLEAN_APART_PX**2:
                    alone = False
                    break
        if not alone:
            continue
        snr[n], pixels[n], fitted[n] = spot[_MATCHED], spot[_PIXELS], spot[_FITTED]
        peak[n] = spot[_PEAK] / max(float(spot[_INTENSITY]), 1e-3)
        kind[n] = 2.0 if spot[_WIDTH_PX] == 2.0 else 3.0
        if spot[_WIDTH_PX] == 1.0:
            kind[n] = 1.0 if peak[n] < _BLUNT else 0.0
        row = min(max(int(y * _CLEAN_BLOCKS / ny), 0), _CLEAN_BLOCKS - 1)
        column = min(max(int(x * _CLEAN_BLOCKS / nx), 0), _CLEAN_BLOCKS - 1)
        for k in range(_CLEAN_SPREAD_A.size):
            if snr[n] > _CLEAN_SPREAD_A[k]:
                blocks[k, row, column] = 1.0
        n += 1
    ranked = np.sort(snr[:n])[::-1]
    for i in range(_RANKS_A.size):
        rank = _RANKS_A[i]
        out[at] = math.log(ranked[rank - 1] if rank <= n else _NO_SNR)
        at += 1
    for i in range(_CLEAN_COUNTED_A.size):
        out[at] = math.log(1.0 + float(np.sum(ranked > _CLEAN_COUNTED_A[i])))
        at += 1
    for which in range(len(_CLEAN_KINDS)):
        chosen = snr[:n][kind[:n] == which]
        for bound in _CLEAN_COUNTED_A:
            out[at] = math.log(1.0 + float(np.sum(chosen > bound)))
            at += 1
    for k in range(_CLEAN_SPREAD_A.size):
        out[at] = math.log(1.0 + float(np.sum(blocks[k])))
        at += 1
    strong = snr[:n] > _CLEAN_SPREAD_A[0]
    out[at], out[at + 1] = _median(pixels[:n][strong]), _median(peak[:n][strong])
    at += 2
    for bound in _FITTED_COUNTED_A:
        over = 0
        for i in range(most):
            if spots[i, _VALID] != 0 and spots[i, _LONE] == 0:
                over += spots[i, _FITTED] > bound
        out[at] = math.log(1.0 + over)
        at += 1
    ranked = np.sort(fitted[:n])[::-1]
    for bound in _FITTED_COUNTED_A:
        out[at] = math.log(1.0 + float(np.sum(ranked > bound)))
        at += 1
    for rank in _RANKS_A:
        out[at] = math.log(max(ranked[rank - 1], _NO_SNR) if rank <= n else _NO_SNR)
        at += 1
    out[at] = math.log(1.0 + ny * nx)


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _ice_lines(
    spots: NDArray[np.float32], place: NDArray[np.float64], out: NDArray[np.float64], at: int
) -> None:
    """Write how many spots lie on the lines of ice, and how many beside them, from ``at`` on."""
    lines = _ICE_A.size
    on, beside = np.zeros(lines), np.zeros(lines)
    surest_on, surest_beside, along, whole = 0.0, 0.0, 0.0, 0.0
    brightest_on, brightest_beside, bright_on, bright_beside = 0.0, 0.0, 0.0, 0.0
    # Beside a line is from one and a half widths on.
    share = _ON_LINE / (_BESIDE_LINE - 1.5 * _ON_LINE)
    for i in range(spots.shape[0]):
        spot = spots[i]
        if spot[_VALID] == 0 or spot[_LONE] != 0 or spot[_MATCHED] < _ICE_SIGMA:
            continue
        dy, dx = (spot[_Y] - place[0]) * place[2], (spot[_X] - place[1]) * place[3]
        radius = math.sqrt(dy * dy + dx * dx) + 1e-12
        chord = 2.0 * math.sin(0.5 * math.atan2(radius, place[4]))
        nearest, line = 1.0, 0
        for j in range(lines):
            off = abs(_ICE_A[j] * chord / place[5] - 1.0)
            if off < nearest:
                nearest, line = off, j
        if nearest <= _ON_LINE:
            on[line] += 1.0
            surest_on = max(surest_on, spot[_MATCHED])
            brightest_on = max(brightest_on, spot[_BRIGHTEST])
            bright_on += spot[_BRIGHTEST] >= _BRIGHT
            c, s = dx / radius, dy / radius
            yy, yx, xx = spot[_YY], spot[_YX], spot[_XX]
            along += s * s * xx - 2.0 * c * s * yx + c * c * yy
            whole += yy + xx
        elif 1.5 * _ON_LINE < nearest <= _BESIDE_LINE:
            beside[line] += share
            surest_beside = max(surest_beside, spot[_MATCHED])
            brightest_beside = max(brightest_beside, spot[_BRIGHTEST])
            bright_beside += share * (spot[_BRIGHTEST] >= _BRIGHT)
    for j in range(lines):
        out[at + j], out[at + lines + j] = math.log(1.0 + on[j]), math.log(1.0 + beside[j])
    at += 2 * lines
    out[at], out[at + 1] = math.log(1.0 + surest_on), math.log(1.0 + surest_beside)
    out[at + 2] = along / (whole + 1e-3)
    out[at + 3], out[at + 4] = log_brightest(brightest_on), log_brightest(brightest_beside)
    out[at + 5], out[at + 6] = math.log(1.0 + bright_on), math.log(1.0 + bright_beside)


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _features(
    spots: NDArray[np.float32],
    place: NDArray[np.float64],
    ny: float,
    nx: float,
    out: NDArray[np.float64],
) -> None:
    known = place[4] > 0.0
    out[0] = 1.0 if known else 0.0
    most = spots.shape[0]
    _clean_spots(spots, place, ny, nx, out, out.size - _OF_CLEAN)
    if known:
        _ice_lines(spots, place, out, out.size - _OF_CLEAN - _OF_LINES)
    # Of each spot that is not a lone pixel: truth-like signal to noise, variances, and place.
    snr, listed = np.empty(most), np.empty(most)
    y, x = np.empty(most), np.empty(most)
    yy, yx, xx = np.empty(most), np.empty(most), np.empty(most)
    pixels, background, noise = np.empty(most), np.empty(most), np.empty(most)
    whole = np.empty(most, np.bool_)
    n, rows, lone, cut_off, maxima = 0, 0, 0, 0, 0.0
    last = 0.0
    for i in range(most):
        spot = spots[i]
        if spot[_VALID] == 0:
            continue
        rows += 1
        last = float(spot[_MATCHED])
        if spot[_LONE] != 0:
            lone += 1
            continue
        yy[n], yx[n], xx[n] = spot[_YY], spot[_YX], spot[_XX]
        area = math.sqrt(max(yy[n] * xx[n] - yx[n] * yx[n], 0.01))
        intensity = spot[_INTENSITY] / (1.0 - min(float(spot[_CUT]), 0.6))
        under = max(4.0, 4.0 * math.pi * area)
        background[n], noise[n] = spot[_BACKGROUND], spot[_NOISE]
        snr[n] = intensity / math.sqrt(max(intensity, 0.0) + under * noise[n] ** 2 + 1e-9)
        listed[n], pixels[n] = spot[_SNR], spot[_PIXELS]
        y[n], x[n] = spot[_Y], spot[_X]
        whole[n] = spot[_SATURATED] == 0 and spot[_AT_GAP] == 0 and spot[_PIXELS] >= 3
        cut_off += 0 if whole[n] else 1
        if listed[n] > _VISIBLE:
            maxima += spot[_PEAKS]
        n += 1
    out[1], out[2], out[3] = math.log(1.0 + rows), math.log(1.0 + lone), math.log(1.0 + cut_off)
    out[4] = 1.0 if rows == most else 0.0
    out[5] = math.log(1.0 + last)
    at = 6
    for i in range(_COUNTED_A.size):
        out[at] = math.log(1.0 + float(np.sum(snr[:n] > _COUNTED_A[i])))
        at += 1
    out[at] = math.log(1.0 + float(np.sum(listed[:n] > _VISIBLE)))
    out[at + 1] = math.log(1.0 + maxima)

    # u: pixels along the ring per radian of turn; the cosine and sine of the outward direction.
    u, s, c_out, s_out = np.ones(most), np.zeros(most), np.zeros(most), np.zeros(most)
    off_ice, spread = 0, 0
    per_block = np.zeros((_BLOCKS, _BLOCKS), np.int64)
    for i in range(n):
        regular = True
        if known:
            dy, dx = (y[i] - place[0]) * place[2], (x[i] - place[1]) * place[3]
            radius = math.sqrt(dy * dy + dx * dx) + 1e-12
            c_out[i], s_out[i] = dx / radius, dy / radius
            two_theta = math.atan2(radius, place[4])
            path = math.sqrt(radius * radius + place[4] * place[4])
            chord = 2.0 * math.sin(0.5 * two_theta)
            s[i] = (chord / place[5]) ** 2
            # A pixel's pitch along the ring.
            pitch = math.sqrt((s_out[i] * place[3]) ** 2 + (c_out[i] * place[2]) ** 2)
            u[i] = max(chord * path / pitch, 1e-3)
            d = place[5] / chord if chord > 0 else 1e6
            regular = d < _LARGEST_D_ANGSTROM
            for j in range(_ICE_A.size):
                regular = regular and abs(_ICE_A[j] / d - 1.0) > _ICE_TOLERANCE
        if snr[i] > _VISIBLE and regular:
            off_ice += 1
            row = min(max(int(y[i] * _BLOCKS / ny), 0), _BLOCKS - 1)
            column = min(max(int(x[i] * _BLOCKS / nx), 0), _BLOCKS - 1)
            if per_block[row, column] < _PER_BLOCK:
                per_block[row, column] += 1
                spread += 1
    out[at + 2], out[at + 3] = math.log(1.0 + off_ice), math.log(1.0 + spread)
    at += 4

    visible = snr[:n] > _VISIBLE
    at = _quantiles(np.log(snr[:n][visible]), _QUANTILES_A, out, at)
    level = np.log(np.maximum(background[:n], 0.0) + 1e-3)
    over = np.log((noise[:n] ** 2 + 1e-3) / (np.maximum(background[:n], 0.0) + 1e-3))
    out[at], out[at + 1] = _median(level), _median(over)
    nearest = np.full(n, 1e12)
    for i in range(n):
        if visible[i]:
            for j in range(i):
                if visible[j]:
                    apart = (y[i] - y[j]) ** 2 + (x[i] - x[j]) ** 2
                    nearest[i] = min(nearest[i], apart)
                    nearest[j] = min(nearest[j], apart)
    close = 0.5 * np.log(nearest[nearest < 1e11] + 0.25)
    if close.size > 0:
        ordered = np.sort(close)
        out[at + 2], out[at + 3] = ordered[ordered.size // 2], ordered[ordered.size // 10]
    good = visible & whole[:n]
    out[at + 4] = _median(np.log(pixels[:n][visible]))
    at += 5

    yy, yx, xx = yy[:n], yx[:n], xx[:n]
    half, mean = np.sqrt(0.25 * (yy - xx) ** 2 + yx * yx), 0.5 * (yy + xx)
    major = np.log(np.maximum(mean + half, 0.05))
    minor = np.log(np.maximum(mean - half, 0.05))
    at = _quantiles(major[good], _QUANTILES_A, out, at)
    at = _quantiles(minor[good], _QUANTILES_A, out, at)
    at = _quantiles((major - minor)[good], _QUANTILES_A, out, at)
    if not known:
        return

    c_out, s_out, u, s = c_out[:n], s_out[:n], u[:n], s[:n]
    across = c_out * c_out * xx + 2.0 * c_out * s_out * yx + s_out * s_out * yy
    along = s_out * s_out * xx - 2.0 * c_out * s_out * yx + c_out * c_out * yy
    longer, both = 0.0, 0.0
    for i in range(n):
        if good[i]:
            longer += along[i] - across[i]
            both += 2.0 * half[i]
    out[at] = longer / (both + 1e-3)
    at += 1
    at = _quantiles(s[visible], _REACHES_A, out, at)
    at = _quantiles(s[snr[:n] > _CLEAR], _REACHES_A, out, at)
    log_along = np.log(np.maximum(along, 0.05))
    log_across = np.log(np.maximum(across, 0.05))
    at = _quantiles(log_along[good], _QUANTILES_A, out, at)
    at = _quantiles(log_across[good], _QUANTILES_A, out, at)
    log_u = np.log(u)
    ends = np.zeros(2)
    _quantiles(log_u[good], np.array([1.0 / 3.0, 2.0 / 3.0]), ends, 0)
    near, far = good & (log_u <= ends[0]), good & (log_u >= ends[1])
    out[at], out[at + 1] = _median(log_along[near]), _median(log_along[far])
    out[at + 2], out[at + 3] = _median(log_across[near]), _median(log_across[far])
    at += 4
    to_deg = math.log(_FWHM * 180.0 / math.pi)
    single = 0.5 * np.log(np.maximum(along - across, 0.02)) - log_u + to_deg
    at = _quantiles(single[good], _QUANTILES_A, out, at)
    at = _quantiles(single[far], _QUANTILES_A, out, at)
    out[at] = _median(log_u[good]) + math.log(math.pi / 180.0)
    out[at + 1] = _median(log_u[far]) + math.log(math.pi / 180.0)
    at += 2
    clear = good & (snr[:n] > _CLEAR)
    at = _line(log_along[good], u[good] ** 2, snr[:n][good], pixels[:n][good], out, at)
    _line(log_along[clear], u[clear] ** 2, snr[:n][clear], pixels[:n][clear], out, at)


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _line(
    measured: NDArray[np.float64],
    squares: NDArray[np.float64],
    snr: NDArray[np.float64],
    pixels: NDArray[np.float64],
    out: NDArray[np.float64],
    at: int,
) -> int:
    """Fit exp(measured) = own + spread^2 squares, and write the numbers of ``_LINE``.

    In the logarithm, where a spot's error is the same whatever its size. The loss is
    z^2 / (1 + z^2 / 4) (Geman and McClure, Bull. Int. Stat. Inst. 52, 5, 1987).
    """
    n = measured.size
    after = at + 8
    if n < 4:
        return after
    to_rad = math.pi / 180.0 / _FWHM
    weight = 1.0 / ((2.0 / snr) ** 2 + 0.5 / pixels + 0.02)
    ordered = np.sort(squares)
    # FWHM of a pixel at the spots farthest out.
    least = 1.0 / math.sqrt(ordered[(9 * (n - 1)) // 10]) / to_rad / _FWHM
    best, seen_best = 1e300, 1e300
    spread, own, seen_spread, seen_own = _SPREADS_A[0], _OWN_A[0], least, _OWN_A[0]
    for i in range(_SPREADS_A.size):
        slope = (_SPREADS_A[i] * to_rad) ** 2
        for j in range(_OWN_A.size):
            loss = 0.0
            for k in range(n):
                z = measured[k] - math.log(_OWN_A[j] + slope * squares[k])
                z = z * z * weight[k]
                loss += z / (1.0 + 0.25 * z)
            if loss < best:
                best, spread, own = loss, _SPREADS_A[i], _OWN_A[j]
            if loss < seen_best and _SPREADS_A[i] >= least:
                seen_best, seen_spread, seen_own = loss, _SPREADS_A[i], _OWN_A[j]
    spread, own, best, error = _refined(measured, squares, weight, spread, own, _SPREADS_A[0])
    seen_spread, seen_own, seen_best, _ = _refined(
        measured, squares, weight, seen_spread, seen_own, least
    )
    out[at], out[at + 1] = math.log(spread), math.log(seen_spread)
    out[at + 2], out[at + 3] = math.log(own), math.log(seen_own)
    out[at + 4], out[at + 5] = best / n, (seen_best - best) / math.sqrt(n)
    out[at + 6], out[at + 7] = error, math.log(1.0 + n)
    return after


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _refined(
    measured: NDArray[np.float64],
    squares: NDArray[np.float64],
    weight: NDArray[np.float64],
    spread: float,
    own: float,
    least: float,
) -> tuple[float, float, float, float]:
    """Reweighted Gauss-Newton in log spread and log own from a start on.

    Spread, own, loss, and the standard error of log spread.
    """
    to_rad = math.pi / 180.0 / _FWHM
    p, q = math.log(spread), math.log(own)
    error, loss = 0.0, 0.0
    for step in range(13):
        pp, pq, qq, p1, q1, loss = 1e-3, 0.0, 1e-1, 0.0, 0.0, 0.0
        slope, flat = (math.exp(p) * to_rad) ** 2, math.exp(q)
        for k in range(measured.size):
            model = flat + slope * squares[k]
            r = measured[k] - math.log(model)
            z = r * r * weight[k]
            w = weight[k] / (1.0 + 0.25 * z) ** 2
            dp, dq = 2.0 * slope * squares[k] / model, flat / model
            pp += w * dp * dp
            pq += w * dp * dq
            qq += w * dq * dq
            p1 += w * dp * r
            q1 += w * dq * r
            loss += z / (1.0 + 0.25 * z)
        det = pp * qq - pq * pq
        error = min(math.sqrt(max(qq / det, 0.0)), 3.0) if det > 0 else 3.0
        if step == 12 or det <= 0:
            break
        up, uq = (p1 * qq - q1 * pq) / det, (q1 * pp - p1 * pq) / det
        p = min(max(p + min(max(up, -0.3), 0.3), math.log(least)), math.log(6.0))
        q = min(max(q + min(max(uq, -0.5), 0.5), math.log(0.08)), math.log(20.0))
    return math.exp(p), math.exp(q), loss, error

"""What is known of each spot of a list: a row of numbers for every one of them.

Nothing here is learned; the place of what is, ``log_odds``, is left empty. Numbers of the whole
list say how many spots are of one kind or another, and the kinds are ours; from the spots one by
one a network learns kinds of its own. A zinger is as sure as a reflection and narrower, a grain of
ice lies on a line and along it, pixels of one track are each other's neighbours.
"""

from __future__ import annotations

import math

import numba as nb
import numpy as np
from numpy.typing import NDArray

from triage.nets.spot_shapes import log_brightest, place_of
from triage.records import ICE_D_ANGSTROM, Geometry, Spot

__all__ = ["LOG_ODDS", "MARKED", "SPOT_MARKS", "spot_marks"]

MARKED = 256
"""Spots of which each is looked at by the network, the surest of a list."""

SPOT_MARKS = (
    "log_sigma",
    "sigma",
    "width_1",
    "width_2",
    "width_4",
    "width_8",
    "log_snr",
    "log_pixels",
    "log_intensity",
    "log_background",
    "log_noise_over_poisson",
    "log_peak_share",
    "cut",
    "peaks",
    "lone",
    "saturated",
    "at_gap",
    "log_major_px2",
    "log_minor_px2",
    "log_edge_px",
    "log_neighbour_px",
    "neighbours",
    "place_in_list",
    "log_fitted",
    "fitted",
    "log_fitted_px2",
    "placed",
    "log_along_over_across",
    "on_line",
    "near_line",
    "off_line",
    "line",
    "inverse_d",
    "log_radius_px",
    "in_row",
    "on_ring",
    "log_brightest",
    "log_odds",
    "valid",
)
"""What each number of a spot says, scaled to be of the order of one. ``sigma``: of the filter that
fits; ``width``: which that is; ``edge``: the frame's; ``neighbours``: spots within 20 pixels.
``fitted``: signal to noise of the Gaussian that fits, and its area.
What follows ``placed``, up to ``on_ring``, needs the geometry and is zero without it: variance
along the ring over that across, nearness to the next line of ice and how far to its outside, which
line that is, 1/d, pixels from the beam, and how many spots lie with it on one line through the
beam and on one ring around it, over as many as by chance would: those of a streak, and the grains
of a powder. ``brightest``: its brightest pixel over half of saturation. ``log_odds``, that the spot
is a crystal's, is zero until a judge has said so. A row that is no spot is zero."""

LOG_ODDS = SPOT_MARKS.index("log_odds")

_Y, _X, _INTENSITY = int(Spot.Y_PX), int(Spot.X_PX), int(Spot.INTENSITY)
_BACKGROUND, _NOISE, _SNR = int(Spot.BACKGROUND), int(Spot.NOISE), int(Spot.SNR)
_PIXELS, _YY, _YX, _XX = int(Spot.PIXELS), int(Spot.YY), int(Spot.YX), int(Spot.XX)
_PEAK, _CUT, _PEAKS, _LONE = int(Spot.PEAK), int(Spot.CUT), int(Spot.PEAKS), int(Spot.LONE)
_SATURATED, _AT_GAP, _VALID = int(Spot.SATURATED), int(Spot.AT_GAP), int(Spot.VALID)
_MATCHED, _WIDTH_PX = int(Spot.MATCHED), int(Spot.WIDTH_PX)
_FITTED, _FITTED_PX2 = int(Spot.FITTED), int(Spot.FITTED_PX2)
_BRIGHTEST = int(Spot.BRIGHTEST)

_SURE = 5.0
_NEAR_PX, _MOST_NEIGHBOURS = 20.0, 12
_ON_LINE, _NEAR_LINE, _OFF_LINE = 0.003, 0.012, 0.02
"""Shares of d by which nearness to a line of ice falls off, and to which the distance is held."""
_ROW_PX, _ROW_REACH_PX = 3.0, 120.0
"""From the line through the beam and a spot, and from that spot, within which others lie on it."""
_ROW_SHARE = 4.0 * _ROW_PX / (math.pi * _ROW_REACH_PX)
"""Of the spots within that reach so many lie there by chance."""
_RING_PX, _RING_REACH_PX = 2.5, 40.0
"""In distance from the beam, within which others lie on the ring of a spot and around it."""
_RING_SHARE = _RING_PX / _RING_REACH_PX
_LEAST_PX2 = 0.05
_LIMIT = 10.0
_ICE_A = np.array(ICE_D_ANGSTROM)


def spot_marks(
    spots: NDArray[np.float32], geometry: Geometry | None, shape: tuple[int, int]
) -> NDArray[np.float32]:
    """(n, len(SPOT_MARKS)) float32, finite: the spots of a frame, one by one.

    Args:
        spots: (n, len(Spot)) of one frame, surest first; rows that are no spots are zero.
        geometry: None where it is not known.
        shape: (y, x) of the frame in pixels.
    """
    out = np.zeros((len(spots), len(SPOT_MARKS)), np.float32)
    listed = np.ascontiguousarray(spots, np.float64)
    _fill(listed, place_of(geometry), float(shape[0]), float(shape[1]), out)
    return out


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _fill(
    spots: NDArray[np.float64],
    place: NDArray[np.float64],
    ny: float,
    nx: float,
    out: NDArray[np.float32],
) -> None:
    known = place[4] > 0.0
    row, radii = np.empty(out.shape[1]), np.zeros(spots.shape[0])
    for i in range(spots.shape[0]):
        dy, dx = spots[i, _Y] - place[0], spots[i, _X] - place[1]
        radii[i] = math.sqrt(dy * dy + dx * dx)
    for i in range(spots.shape[0]):
        spot = spots[i]
        if spot[_VALID] == 0:
            continue
        row[:] = 0.0
        y, x = spot[_Y], spot[_X]
        sigma, width = spot[_MATCHED], spot[_WIDTH_PX]
        row[0], row[1] = math.log(max(sigma, 1.0)), min(max(sigma - _SURE, -2.0), 4.0)
        for k in range(4):
            row[2 + k] = 1.0 if width == 1 << k else 0.0
        background, noise = max(spot[_BACKGROUND], 0.0), spot[_NOISE]
        row[6], row[7] = math.log(max(spot[_SNR], 0.5)), 0.5 * math.log1p(spot[_PIXELS])
        row[8] = 0.3 * math.log1p(max(spot[_INTENSITY], 0.0))
        row[9] = 0.3 * math.log(background + 1e-2)
        over = math.log((noise * noise + 1e-2) / (background + 1e-2))
        row[10] = min(max(over, -4.0), 4.0)
        peak = math.log(max(spot[_PEAK], 1e-3) / max(spot[_INTENSITY], 1e-3))
        row[11] = min(max(peak, -4.0), 0.0)
        row[12], row[13] = spot[_CUT], 0.3 * min(spot[_PEAKS], 5.0)
        row[14], row[15], row[16] = spot[_LONE], spot[_SATURATED], spot[_AT_GAP]
        yy, yx, xx = spot[_YY], spot[_YX], spot[_XX]
        half, mean = math.sqrt(0.25 * (yy - xx) ** 2 + yx * yx), 0.5 * (yy + xx)
        row[17] = 0.5 * math.log(max(mean + half, _LEAST_PX2))
        row[18] = 0.5 * math.log(max(mean - half, _LEAST_PX2))
        row[19] = 0.2 * math.log1p(max(min(min(y, ny - y), min(x, nx - x)), 0.0))
        nearest, neighbours, around, in_row, near_ring, on_ring = 1e6, 0, 0, 0, 0, 0
        out_y, out_x = y - place[0], x - place[1]
        beside = _ROW_PX * (radii[i] + 1e-9)
        for j in range(spots.shape[0]):
            if j != i and spots[j, _VALID] != 0:
                dy, dx = spots[j, _Y] - y, spots[j, _X] - x
                apart = dy * dy + dx * dx
                nearest = min(nearest, apart)
                neighbours += apart < _NEAR_PX * _NEAR_PX
                if known and apart < _ROW_REACH_PX * _ROW_REACH_PX:
                    around += 1
                    in_row += abs(out_y * dx - out_x * dy) < beside
                further = abs(radii[j] - radii[i])
                near_ring += further < _RING_REACH_PX
                on_ring += further < _RING_PX
        row[20] = 0.2 * math.log(nearest + 0.25)
        row[21] = 0.25 * min(neighbours, _MOST_NEIGHBOURS)
        row[22] = i / (spots.shape[0] - 1.0)
        fitted = spot[_FITTED]
        row[23], row[24] = math.log(max(fitted, 0.5)), min(max(fitted - _SURE, -3.0), 4.0)
        row[25] = 0.5 * math.log(spot[_FITTED_PX2] + 0.1)
        if known:
            row[26] = 1.0
            _place(y, x, yy, yx, xx, place, row)
            row[34] = math.log((1.0 + in_row) / (1.0 + _ROW_SHARE * around))
            row[35] = math.log((1.0 + on_ring) / (1.0 + _RING_SHARE * near_ring))
        row[36] = log_brightest(spot[_BRIGHTEST])
        row[38] = 1.0
        for k in range(row.size):
            # What is no number is below nothing and above nothing.
            held = min(max(row[k], -_LIMIT), _LIMIT) if row[k] == row[k] else 0.0
            out[i, k] = np.float32(held)


@nb.njit(cache=True, nogil=True, error_model="numpy")
def _place(
    y: float,
    x: float,
    yy: float,
    yx: float,
    xx: float,
    place: NDArray[np.float64],
    row: NDArray[np.float64],
) -> None:
    """Fill what needs the geometry, of a spot at (y, x) with these variances."""
    dy, dx = (y - place[0]) * place[2], (x - place[1]) * place[3]
    radius = math.sqrt(dy * dy + dx * dx) + 1e-9
    c, s = dx / radius, dy / radius
    across = c * c * xx + 2.0 * c * s * yx + s * s * yy
    along = s * s * xx - 2.0 * c * s * yx + c * c * yy
    row[27] = min(max(math.log((along + 0.1) / (across + 0.1)), -3.0), 3.0)
    inverse_d = 2.0 * math.sin(0.5 * math.atan2(radius, place[4])) / place[5]
    off, line = 1e6, 0
    for j in range(_ICE_A.size):
        away = inverse_d * _ICE_A[j] - 1.0
        if abs(away) < abs(off):
            off, line = away, j
    row[28] = math.exp(-((off / _ON_LINE) ** 2))
    row[29] = math.exp(-((off / _NEAR_LINE) ** 2))
    row[30] = min(max(off / _OFF_LINE, -2.0), 2.0)
    row[31] = 0.2 * line
    row[32] = min(3.0 * inverse_d, 3.0)
    row[33] = 0.2 * math.log1p(radius / place[2])

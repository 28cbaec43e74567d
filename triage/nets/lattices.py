"""One lattice or several: what a frame's list of spots says.

Spots become reciprocal vectors on the Ewald sphere. The real-space vectors v whose phases v.q are
whole numbers for many spots are searched over a half ball of a grid, as in the vector searches of
MOSFLM, DIALS and XGANDALF; three of them make a lattice. Which three is decided by likelihood: a
spot lies within its errors of a lattice point, or anywhere. The errors are small along the
Debye-Scherrer ring and in resolution, and wide across both, where mosaic spread, rotation and the
width of reflections move a point onto the sphere; so a lattice is told from chance by few spots,
whatever the cell. What the first lattice leaves is searched once more.

A crystal that is split by less than a spacing, or smeared, is one lattice by that account. Of it
speak the distances along the ring from the lattice's points, neighbours on the same ring, and the
shape of the spots.
"""

from __future__ import annotations

import math
from typing import Any

import numba as nb
import numpy as np
from llvmlite import ir
from numba import extending
from numba.core import cgutils
from numpy.typing import NDArray

from triage.records import ICE_D_ANGSTROM, MOST_SPOTS, Geometry, Spot

__all__ = ["LATTICE_FEATURES", "lattice_features", "warm_up"]

LATTICE_FEATURES: tuple[str, ...] = (
    "has_geometry",
    "spots_log",
    "ice_spots_log",
    "searched_log",
    "coherence_1",
    "coherence_3",
    "coherence_6",
    "gain_per_spot",
    "explained_searched",
    "explained_share",
    "explained_by_intensity",
    "explained_by_snr",
    "explained_strong",
    "left_log",
    "left_clear_log",
    "left_intensity_log",
    "near_share",
    "near_log",
    "shared_index_log",
    "shared_index_share",
    "ring_offset_px",
    "ring_offset_wide_px",
    "resolution_offset_px",
    "spread_log",
    "band_log",
    "volume_log",
    "chance_log",
    "second_spots_log",
    "second_coherence",
    "second_gain",
    "second_gain_per_spot",
    "second_explained_log",
    "second_share",
    "second_volume_ratio",
    "second_chance_log",
    "elongation",
    "elongation_spread",
    "lean",
    "lean_spread",
    "lean_second_harmonic",
    "elongation_by_radius",
    "ring_width_log",
    "radial_width_log",
    "several_peaks_share",
    "ring_pairs_log",
    "ring_pairs_excess",
    "close_pairs_log",
)
"""Names of what :func:`lattice_features` gives, in order; logarithms are log(1 + x) of counts."""

_intrinsic: Any = extending.intrinsic
_cgutils: Any = cgutils

_N = len(LATTICE_FEATURES)
_Y, _X, _INTENSITY, _SNR, _PIXELS = (
    int(Spot.Y_PX),
    int(Spot.X_PX),
    int(Spot.INTENSITY),
    int(Spot.SNR),
    int(Spot.PIXELS),
)
_YY, _YX, _XX, _PEAKS, _LONE = (
    int(Spot.YY),
    int(Spot.YX),
    int(Spot.XX),
    int(Spot.PEAKS),
    int(Spot.LONE),
)
_SATURATED, _AT_GAP, _VALID = int(Spot.SATURATED), int(Spot.AT_GAP), int(Spot.VALID)

_VISIBLE_SNR = 5.0
_MOST_PIXELS = 1000.0
"""Of a spot; more are a ring or a streak of the instrument."""
_ICE_TOLERANCE = 0.008
"""Share of d to each side of a line of ice."""
_ICE_LINES = np.array(ICE_D_ANGSTROM)

_LEAST = 6
"""Spots from which a lattice is looked for."""
_SEARCHED = 48
_SEARCHED_SECOND = 32
_POINTS = 600_000.0
_POINTS_SECOND = 250_000.0
"""Of the grid of real-space vectors; its reach follows."""
_LONGEST_ANGSTROM = 250.0
_SHORTEST_ANGSTROM = 3.0
_PER_CYCLE = 2.6
"""Grid points in the shortest period of the sum over spots."""
_LEAST_PHASE = 0.45
"""Cycles, root mean square over the spots: below it a vector is too short to tell anything."""
_PEAKS_KEPT = 80
_COMBINED = 15
"""The best of them, of which any three may be the lattice."""
_MOST_TIMES = 4
"""Whole multiples of two vectors whose sums say nothing new."""
_STRAY = 0.15
"""Share of spots that are on no lattice, before anything is known of the frame."""
_PIXEL = 0.35
"""Error of a centre along either axis [px], beside that of counting."""
_ERRORS = np.array([[6e-4, 3e-4], [2e-3, 3e-4], [7e-3, 3e-4], [2e-3, 3e-3], [5e-3, 9e-3]])
"""What may be true of a frame: sigma [rad] by which points are turned onto the sphere, and relative
sigma of the wavelength."""
_NARROWEST = np.array([2e-4, 1e-4])
_WIDEST = np.array([0.03, 0.02])
_LOOSE = (2.0, 2.0, 1.4, 1.0, 1.0, 1.0)
"""Errors of spots in the rounds of refinement, as multiples of what they are."""
_REFINED = 160
"""Spots that a lattice is refined against."""
_POOR = 0.7
"""Share explained below which the search is made again with the spots nearest to the beam."""
_POOL = 160
_MOST = 1e3


def lattice_features(
    spots: NDArray[np.float32], geometry: Geometry | None, shape: tuple[int, int]
) -> NDArray[np.float32]:
    """What tells one lattice from several.

    Args:
        spots: (n, columns of :class:`triage.records.Spot`) float32, by falling signal to noise;
            rows that are no spot are zero.
        geometry: without one all is zero.
        shape: (y, x) of the frame, px.

    Returns:
        (len(LATTICE_FEATURES),) float32, finite, in that order. The same list gives the same
        values.
    """
    out = np.zeros(_N, np.float32)
    if geometry is None:
        return out
    values = np.array(
        [
            geometry.beam_center_x_px,
            geometry.beam_center_y_px,
            geometry.pixel_size_x_m,
            geometry.pixel_size_y_m,
            geometry.detector_distance_m,
            geometry.incident_wavelength_angstrom,
        ]
    )
    _features(np.ascontiguousarray(spots[:MOST_SPOTS], np.float32), values, out)
    return out


def warm_up() -> None:
    """Run all that :func:`lattice_features` calls once, so that no frame waits for a compiler."""
    n = _LEAST
    spots = np.ones((n, len(Spot)), np.float32)
    spots[:, _X] = 100.0 * np.arange(1, n + 1)
    table, used, ice = np.empty((n, 22)), np.arange(n), np.zeros(n, np.bool_)
    out, fit, errors = np.zeros(_N, np.float32), np.zeros((n, 7)), _ERRORS[0].copy()
    _reciprocal(spots, np.array([0.0, 0.0, 1e-4, 1e-4, 0.1, 1.0]), table)
    _on_ice(spots, table, ice)
    _shapes(spots, table, used, out)
    _pairs(table, used, out)
    peaks = np.zeros((_PEAKS_KEPT, 4))
    _vectors(table, used, _search(table, used, 1e3, peaks), peaks)
    real, reciprocal = 50.0 * np.eye(3), np.eye(3) / 50.0
    peaks[:3, 1:] = real
    _combined(table, used, peaks, _independent(peaks, 3), real, errors)
    _refine(table, used, real, reciprocal, errors, fit)
    _first(spots, table, used, real, reciprocal, errors, 1.0, fit, out)
    _determinant(real)
    _chance(table, used, reciprocal, errors)


@nb.njit(cache=True, nogil=True)
def _reciprocal(
    spots: NDArray[np.float32], geometry: NDArray[np.float64], table: NDArray[np.float64]
) -> None:
    # Per spot: q (0-2), unit vectors along the ring (3-5), along q (6-8) and across both (9-11),
    # 1/angstrom of a pixel along the ring (12) and radially (13), errors along the ring (14) and
    # radially (15), length of q (16), variance [px^2] along the ring (17), radially (18),
    # covariance (19), radius [px] (20), azimuth (21).
    bx, by, px, py, distance, wavelength = geometry
    pixel = 0.5 * (px + py)
    for i in range(spots.shape[0]):
        x, y = (spots[i, _X] - bx) * px, (spots[i, _Y] - by) * py
        r = math.sqrt(x * x + y * y) + 1e-9
        far = math.sqrt(r * r + distance * distance)
        row = table[i]
        row[0], row[1] = x / far / wavelength, y / far / wavelength
        row[2] = (distance / far - 1.0) / wavelength
        g = math.sqrt(row[0] ** 2 + row[1] ** 2 + row[2] ** 2) + 1e-12
        c, s = x / r, y / r
        row[3], row[4], row[5] = -s, c, 0.0
        row[6], row[7], row[8] = row[0] / g, row[1] / g, row[2] / g
        row[9] = row[4] * row[8]
        row[10] = -row[3] * row[8]
        row[11] = row[3] * row[7] - row[4] * row[6]
        row[12] = pixel / far / wavelength
        cos_theta = math.sqrt(max(0.0, 1.0 - (0.5 * g * wavelength) ** 2))
        row[13] = pixel * distance / (far * far) * cos_theta / wavelength
        xx, yy, xy = spots[i, _XX], spots[i, _YY], spots[i, _YX]
        row[17] = s * s * xx + c * c * yy - 2.0 * s * c * xy
        row[18] = c * c * xx + s * s * yy + 2.0 * s * c * xy
        row[19] = s * c * (yy - xx) + (c * c - s * s) * xy
        snr2 = max(float(spots[i, _SNR]), 3.0) ** 2
        row[14] = row[12] * math.sqrt(_PIXEL**2 + 2.0 * max(row[17], 0.0) / snr2)
        radial = math.sqrt(_PIXEL**2 + 2.0 * max(row[18], 0.0) / snr2)
        row[15] = row[13] * radial
        row[16], row[20], row[21] = g, r / pixel, math.atan2(y, x)


@_intrinsic  # type: ignore[untyped-decorator]
def _add_waves(
    typing_context: Any, waves: Any, at: Any, n: Any, turns: Any, sums: Any, to: Any, stride: Any
) -> Any:
    """Sums over n spots for sixteen columns of four rows of the grid, and for their opposites.

    From ``waves[at]`` on stand, for each spot, its cosines and its sines in those columns;
    ``turns`` (8, n) holds real and imaginary parts of each spot's wave at the start of each row.
    The sums go to ``sums[to]`` and on, ``stride`` apart: of the columns of each row, then of the
    opposite ones. Written out because a loop over columns that is made into vectors keeps no sum
    in a register, and takes several times as long.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector, index = ir.VectorType(ir.FloatType(), 16), ir.IntType(64)
        data = [
            context.make_array(kind)(context, builder, array).data if at in (0, 3, 4) else array
            for at, (kind, array) in enumerate(zip(signature.args, args, strict=True))
        ]
        waves, at, n, turns, sums, to, stride = data
        totals = [_cgutils.alloca_once_value(builder, vector(None)) for _ in range(8)]

        def sixteen(array: Any, place: Any) -> Any:
            return builder.bitcast(builder.gep(array, [place]), vector.as_pointer())

        def constant(value: int) -> Any:
            return index(value)

        with _cgutils.for_range(builder, n) as loop:
            here = builder.add(at, builder.mul(loop.index, constant(32)))
            cos = builder.load(sixteen(waves, here), align=4)
            sin = builder.load(sixteen(waves, builder.add(here, constant(16))), align=4)
            for row in range(8):
                place = builder.add(builder.mul(n, constant(row)), loop.index)
                turn = builder.load(builder.gep(turns, [place]))
                one = builder.insert_element(vector(ir.Undefined), turn, ir.IntType(32)(0))
                all_ = builder.shuffle_vector(
                    one, vector(ir.Undefined), ir.VectorType(ir.IntType(32), 16)(None)
                )
                more = builder.fmul(all_, cos if row < 4 else sin, flags=("contract",))
                total = builder.fadd(builder.load(totals[row]), more, flags=("contract",))
                builder.store(total, totals[row])
        for row in range(4):
            even, odd = builder.load(totals[row]), builder.load(totals[4 + row])
            for side, both in ((0, builder.fsub(even, odd)), (4, builder.fadd(even, odd))):
                place = builder.add(to, builder.mul(stride, constant(row + side)))
                builder.store(both, sixteen(sums, place), align=4)
        return context.get_dummy_value()

    whole = nb.int64
    return nb.void(waves, whole, whole, turns, sums, whole, whole), build


@nb.njit(cache=True, nogil=True, fastmath=True)
def _highest(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    highest = np.float32(-1e30)
    for x in range(one.shape[0]):
        highest = max(highest, max(one[x], other[x]))
    return float(highest)


@nb.njit(cache=True, nogil=True)
def _keep_peaks(
    row: NDArray[np.float32],
    y: float,
    z: float,
    steps: tuple[float, float],
    moment: NDArray[np.float64],
    floor: float,
    best: NDArray[np.float64],
    found: int,
) -> tuple[int, float]:
    # Puts the peaks of a row of the grid among the best; gives their number and what is too low.
    step, step_z = steps
    half = row.shape[0] // 2
    last = row.shape[0] - 1
    for j in range(last + 1):
        height = row[j]
        if height <= floor:
            continue
        if (j > 0 and row[j - 1] > height) or (j < last and row[j + 1] >= height):
            continue
        v = (j - half) * step
        spread = (
            moment[0, 0] * v * v
            + moment[1, 1] * y * y
            + moment[2, 2] * z * z
            + 2.0 * (moment[0, 1] * v * y + moment[0, 2] * v * z + moment[1, 2] * y * z)
        )
        if spread < _LEAST_PHASE**2:
            continue
        # One peak of a kind: its neighbours on the grid, and its opposite, are itself.
        same, beaten = -1, False
        for m in range(found):
            plus = (
                ((best[m, 1] - v) / step) ** 2
                + ((best[m, 2] - y) / step) ** 2
                + ((best[m, 3] - z) / step_z) ** 2
            )
            minus = (
                ((best[m, 1] + v) / step) ** 2
                + ((best[m, 2] + y) / step) ** 2
                + ((best[m, 3] + z) / step_z) ** 2
            )
            if min(plus, minus) < 2.6:
                if best[m, 0] >= height:
                    beaten = True
                    break
                same = m
        if beaten:
            continue
        place = same
        if place < 0:
            if found < best.shape[0]:
                place, found = found, found + 1
            else:
                place = found - 1
        while place > 0 and best[place - 1, 0] < height:
            for a in range(4):
                best[place, a] = best[place - 1, a]
            place -= 1
        best[place, 0], best[place, 1], best[place, 2], best[place, 3] = height, v, y, z
        if found == best.shape[0]:
            floor = max(floor, best[found - 1, 0])
    return found, floor


@nb.njit(cache=True, nogil=True)
def _search(
    table: NDArray[np.float64], chosen: NDArray[np.int64], points: float, best: NDArray[np.float64]
) -> int:
    # Peaks of the sum over spots of cos(2 pi v.q) over a half ball of v: rows of `best` are the
    # sum and v, highest first. Gives how many there are.
    n = chosen.shape[0]
    across, along = 1e-6, 1e-6
    moment = np.zeros((3, 3))
    for i in chosen:
        for a in range(3):
            for b in range(3):
                moment[a, b] += table[i, a] * table[i, b] / n
        across = max(across, abs(table[i, 0]), abs(table[i, 1]))
        along = max(along, abs(table[i, 2]))
    along = max(along, across / 30.0)
    step, step_z = 1.0 / (_PER_CYCLE * across), 1.0 / (_PER_CYCLE * along)
    reach = min(_LONGEST_ANGSTROM, (points * step * step * step_z / 2.1) ** (1.0 / 3.0))
    nx, nz = int(reach / step), int(reach / step_z)
    blocks = nx // 16 + 1
    wide = 16 * blocks
    waves = np.zeros((blocks, n, 2, 16), np.float32)
    cos_z, sin_z = np.empty((nz + 1, n)), np.empty((nz + 1, n))
    for k in range(n):
        turn = 2.0 * math.pi * table[chosen[k], 0] * step
        for x in range(nx + 1):
            waves[x // 16, k, 0, x % 16] = math.cos(turn * x)
            waves[x // 16, k, 1, x % 16] = math.sin(turn * x)
        turn = 2.0 * math.pi * table[chosen[k], 2] * step_z
        for iz in range(nz + 1):
            cos_z[iz, k], sin_z[iz, k] = math.cos(turn * iz), math.sin(turn * iz)
    sums, row = np.empty((8, wide), np.float32), np.empty(2 * nx + 1, np.float32)
    cos_y, sin_y = np.empty(n), np.empty(n)
    turns = np.zeros((8, n), np.float32)
    all_waves, all_turns, all_sums = waves.reshape(-1), turns.reshape(-1), sums.reshape(-1)
    halves = np.empty(4, np.int64)
    found = 0
    # Chance alone gives sums of sigma sqrt(n / 2).
    floor = max(0.3 * n, 2.5 * math.sqrt(0.5 * n))
    for iy in range(nx + 1):
        y = iy * step
        for k in range(n):
            phase = 2.0 * math.pi * table[chosen[k], 1] * y
            cos_y[k], sin_y[k] = math.cos(phase), math.sin(phase)
        for first in range(0 if iy == 0 else -nz, nz + 1, 4):
            for r in range(4):
                iz = first + r
                left = reach * reach - y * y - (iz * step_z) ** 2
                halves[r] = int(math.sqrt(left) / step) if left >= 0.0 and iz <= nz else -1
            longest = halves.max()
            if longest < 0:
                continue
            for r in range(4):
                sign = 1.0 if first + r >= 0 else -1.0
                cos, sin = cos_z[min(abs(first + r), nz)], sin_z[min(abs(first + r), nz)]
                for k in range(n):
                    turns[r, k] = cos_y[k] * cos[k] - sign * (sin_y[k] * sin[k])
                    turns[4 + r, k] = sign * (cos_y[k] * sin[k]) + sin_y[k] * cos[k]
            for block in range(longest // 16 + 1):
                _add_waves(all_waves, block * n * 32, n, all_turns, all_sums, block * 16, wide)
            for r in range(4):
                half = halves[r]
                if half < 0:
                    continue
                after, before = sums[r, : half + 1], sums[4 + r, : half + 1]
                if _highest(after, before) <= floor:
                    continue
                line = row[: 2 * half + 1]
                for x in range(half + 1):
                    line[half - x], line[half + x] = before[x], after[x]
                z = (first + r) * step_z
                found, floor = _keep_peaks(line, y, z, (step, step_z), moment, floor, best, found)
    return found


@nb.njit(cache=True, nogil=True)
def _solve(a: NDArray[np.float64], b: NDArray[np.float64], x: NDArray[np.float64]) -> bool:
    # Of three equations.
    m0 = a[1, 1] * a[2, 2] - a[1, 2] * a[2, 1]
    m1 = a[1, 0] * a[2, 2] - a[1, 2] * a[2, 0]
    m2 = a[1, 0] * a[2, 1] - a[1, 1] * a[2, 0]
    det = a[0, 0] * m0 - a[0, 1] * m1 + a[0, 2] * m2
    if abs(det) < 1e-30:
        return False
    x[0] = (
        b[0] * m0
        - a[0, 1] * (b[1] * a[2, 2] - a[1, 2] * b[2])
        + a[0, 2] * (b[1] * a[2, 1] - a[1, 1] * b[2])
    ) / det
    x[1] = (
        a[0, 0] * (b[1] * a[2, 2] - a[1, 2] * b[2])
        - b[0] * m1
        + a[0, 2] * (a[1, 0] * b[2] - b[1] * a[2, 0])
    ) / det
    x[2] = (
        a[0, 0] * (a[1, 1] * b[2] - b[1] * a[2, 1])
        - a[0, 1] * (a[1, 0] * b[2] - b[1] * a[2, 0])
        + b[0] * m2
    ) / det
    return True


@nb.njit(cache=True, nogil=True)
def _invert(a: NDArray[np.float64], out: NDArray[np.float64]) -> float:
    # Gives the determinant; with 0 there is no inverse.
    c0 = a[1, 1] * a[2, 2] - a[1, 2] * a[2, 1]
    c1 = a[1, 2] * a[2, 0] - a[1, 0] * a[2, 2]
    c2 = a[1, 0] * a[2, 1] - a[1, 1] * a[2, 0]
    det = a[0, 0] * c0 + a[0, 1] * c1 + a[0, 2] * c2
    if abs(det) < 1e-9:
        return 0.0
    out[0, 0], out[1, 0], out[2, 0] = c0 / det, c1 / det, c2 / det
    out[0, 1] = (a[0, 2] * a[2, 1] - a[0, 1] * a[2, 2]) / det
    out[1, 1] = (a[0, 0] * a[2, 2] - a[0, 2] * a[2, 0]) / det
    out[2, 1] = (a[0, 1] * a[2, 0] - a[0, 0] * a[2, 1]) / det
    out[0, 2] = (a[0, 1] * a[1, 2] - a[0, 2] * a[1, 1]) / det
    out[1, 2] = (a[0, 2] * a[1, 0] - a[0, 0] * a[1, 2]) / det
    out[2, 2] = (a[0, 0] * a[1, 1] - a[0, 1] * a[1, 0]) / det
    return float(det)


@nb.njit(cache=True, nogil=True)
def _refine_vector(
    v: NDArray[np.float64],
    table: NDArray[np.float64],
    chosen: NDArray[np.int64],
    weights: NDArray[np.float64],
    errors: NDArray[np.float64],
    wide: float,
    rounds: int,
) -> None:
    # Least squares of v.q against whole numbers, spots that are far from one counting less.
    a, b, change = np.zeros((3, 3)), np.zeros(3), np.zeros(3)
    for _ in range(rounds):
        a[:], b[:] = 0.0, 0.0
        length2 = v[0] ** 2 + v[1] ** 2 + v[2] ** 2
        for k in range(chosen.shape[0]):
            row = table[chosen[k]]
            phase = v[0] * row[0] + v[1] * row[1] + v[2] * row[2]
            off = phase - round(phase)
            turned = (v[0] * row[9] + v[1] * row[10] + v[2] * row[11]) * errors[0] * row[16]
            banded = phase * errors[1]
            variance = length2 * row[14] * row[15] + turned * turned + banded * banded + 2e-5
            weight = weights[k] * math.exp(-0.5 * off * off / (variance + wide * wide)) / variance
            for i in range(3):
                b[i] -= weight * off * row[i]
                for j in range(3):
                    a[i, j] += weight * row[i] * row[j]
        trace = a[0, 0] + a[1, 1] + a[2, 2]
        for i in range(3):
            a[i, i] += 1e-6 * trace
        if not _solve(a, b, change):
            return
        step = math.sqrt(change[0] ** 2 + change[1] ** 2 + change[2] ** 2)
        most = 0.1 * math.sqrt(length2) + 1.0
        scale = 1.0 if step < most else most / step
        for i in range(3):
            v[i] += scale * change[i]


@nb.njit(cache=True, nogil=True)
def _coherence(
    v: NDArray[np.float64], table: NDArray[np.float64], chosen: NDArray[np.int64]
) -> float:
    total = 0.0
    for i in chosen:
        total += math.cos(
            2.0 * math.pi * (v[0] * table[i, 0] + v[1] * table[i, 1] + v[2] * table[i, 2])
        )
    return float(total / max(1, chosen.shape[0]))


@nb.njit(cache=True, nogil=True)
def _place(
    real: NDArray[np.float64],
    reciprocal: NDArray[np.float64],
    table: NDArray[np.float64],
    chosen: NDArray[np.int64],
    fit: NDArray[np.float64],
) -> None:
    # The point of the lattice next to each spot. Columns of `fit`: indices (1-3), and the distance
    # of the spot from the point along the ring, along q and across both (4-6).
    for k in range(chosen.shape[0]):
        row = table[chosen[k]]
        q0, q1, q2 = row[0], row[1], row[2]
        h = round(real[0, 0] * q0 + real[0, 1] * q1 + real[0, 2] * q2)
        i = round(real[1, 0] * q0 + real[1, 1] * q1 + real[1, 2] * q2)
        j = round(real[2, 0] * q0 + real[2, 1] * q1 + real[2, 2] * q2)
        d0 = q0 - (reciprocal[0, 0] * h + reciprocal[0, 1] * i + reciprocal[0, 2] * j)
        d1 = q1 - (reciprocal[1, 0] * h + reciprocal[1, 1] * i + reciprocal[1, 2] * j)
        d2 = q2 - (reciprocal[2, 0] * h + reciprocal[2, 1] * i + reciprocal[2, 2] * j)
        fit[k, 1], fit[k, 2], fit[k, 3] = h, i, j
        fit[k, 4] = d0 * row[3] + d1 * row[4]
        fit[k, 5] = d0 * row[6] + d1 * row[7] + d2 * row[8]
        fit[k, 6] = d0 * row[9] + d1 * row[10] + d2 * row[11]


@nb.njit(cache=True, nogil=True)
def _sharpen(
    table: NDArray[np.float64],
    chosen: NDArray[np.int64],
    errors: NDArray[np.float64],
    loose: float,
    sharp: NDArray[np.float64],
) -> None:
    # Per spot: one over the variance along the ring, along q and across both (0-2), the density
    # of a lattice's spots per volume of its cell at no distance (3), and its logarithm (4).
    for k in range(chosen.shape[0]):
        row = table[chosen[k]]
        ring = (loose * row[14]) ** 2
        radial = (loose * row[15]) ** 2 + (errors[1] * row[16]) ** 2
        across = (errors[0] * row[16]) ** 2 + ring
        sharp[k, 0], sharp[k, 1], sharp[k, 2] = 1.0 / ring, 1.0 / radial, 1.0 / across
        sharp[k, 3] = 1.0 / (15.75 * math.sqrt(ring * radial * across))
        sharp[k, 4] = math.log(sharp[k, 3])


@nb.njit(cache=True, nogil=True)
def _likelihood(
    volume: float, sharp: NDArray[np.float64], fit: NDArray[np.float64], n: int, least: float
) -> float:
    # Log likelihood that n spots lie on the lattice or, as strays do, anywhere, once they are
    # placed; column 0 of `fit` is the probability of being on it. What cannot reach `least` any
    # more is left unfinished.
    log_volume = math.log(max(volume, 1e-300))
    most = 0.0
    if least > 0.0:
        for k in range(n):
            most += max(0.0, log_volume + sharp[k, 4])
    total, product = 0.0, 1.0
    for k in range(n):
        ring, radial, across = fit[k, 4], fit[k, 5], fit[k, 6]
        chi2 = ring * ring * sharp[k, 0] + radial * radial * sharp[k, 1]
        chi2 += across * across * sharp[k, 2]
        # Density of a lattice's spots against that of strays, one per cell.
        on = 0.0
        if chi2 < 60.0 and (fit[k, 1] != 0.0 or fit[k, 2] != 0.0 or fit[k, 3] != 0.0):
            on = (1.0 - _STRAY) * volume * sharp[k, 3] * math.exp(-0.5 * chi2)
        fit[k, 0] = on / (_STRAY + on)
        product *= _STRAY + on
        if least > 0.0:
            most -= max(0.0, log_volume + sharp[k, 4])
        if k % 8 == 7:
            total += math.log(product)
            product = 1.0
            if least > 0.0 and total + most < least:
                return -1e9
    return total + math.log(product)


@nb.njit(cache=True, nogil=True)
def _explain(
    real: NDArray[np.float64],
    reciprocal: NDArray[np.float64],
    table: NDArray[np.float64],
    chosen: NDArray[np.int64],
    errors: NDArray[np.float64],
    loose: float,
    fit: NDArray[np.float64],
) -> float:
    # Log likelihood of a lattice; rows of `fit` are as of the two steps.
    sharp = np.empty((chosen.shape[0], 5))
    _place(real, reciprocal, table, chosen, fit)
    _sharpen(table, chosen, errors, loose, sharp)
    volume = abs(_determinant(reciprocal))
    return _likelihood(volume, sharp, fit, chosen.shape[0], -1e9)


@nb.njit(cache=True, nogil=True)
def _determinant(a: NDArray[np.float64]) -> float:
    return float(
        a[0, 0] * (a[1, 1] * a[2, 2] - a[1, 2] * a[2, 1])
        - a[0, 1] * (a[1, 0] * a[2, 2] - a[1, 2] * a[2, 0])
        + a[0, 2] * (a[1, 0] * a[2, 1] - a[1, 1] * a[2, 0])
    )


@nb.njit(cache=True, nogil=True)
def _vectors(
    table: NDArray[np.float64],
    chosen: NDArray[np.int64],
    found: int,
    peaks: NDArray[np.float64],
) -> int:
    # The peaks that a search found, refined: the most coherent first.
    ones = np.ones(chosen.shape[0])
    kept = 0
    for m in range(found):
        v = peaks[m, 1:].copy()
        _refine_vector(v, table, chosen, ones, _ERRORS[1], 0.08, 3)
        length = math.sqrt(v[0] ** 2 + v[1] ** 2 + v[2] ** 2)
        if length < _SHORTEST_ANGSTROM:
            continue
        height = _coherence(v, table, chosen)
        apart = 0.02 * length + 0.3
        same = False
        for p in range(kept):
            plus = math.sqrt(
                (peaks[p, 1] - v[0]) ** 2 + (peaks[p, 2] - v[1]) ** 2 + (peaks[p, 3] - v[2]) ** 2
            )
            minus = math.sqrt(
                (peaks[p, 1] + v[0]) ** 2 + (peaks[p, 2] + v[1]) ** 2 + (peaks[p, 3] + v[2]) ** 2
            )
            if min(plus, minus) < apart:
                same = True
                break
        if same:
            continue
        place = kept
        kept += 1
        while place > 0 and peaks[place - 1, 0] < height:
            peaks[place] = peaks[place - 1]
            place -= 1
        peaks[place, 0] = height
        peaks[place, 1:] = v
    return kept


@nb.njit(cache=True, nogil=True)
def _is_sum(v: NDArray[np.float64], peaks: NDArray[np.float64], chosen: int) -> bool:
    # Whether a peak is a sum of multiples of one or two of the first, or of their opposites.
    apart = 0.02 * math.sqrt(v[1] ** 2 + v[2] ** 2 + v[3] ** 2) + 0.6
    for p in range(chosen):
        for q in range(p, chosen):
            for i in range(_MOST_TIMES + 1):
                for j in range(-_MOST_TIMES, _MOST_TIMES + 1):
                    if i == 0 and j == 0:
                        continue
                    d0 = i * peaks[p, 1] + j * peaks[q, 1]
                    d1 = i * peaks[p, 2] + j * peaks[q, 2]
                    d2 = i * peaks[p, 3] + j * peaks[q, 3]
                    plus = (d0 - v[1]) ** 2 + (d1 - v[2]) ** 2 + (d2 - v[3]) ** 2
                    minus = (d0 + v[1]) ** 2 + (d1 + v[2]) ** 2 + (d2 + v[3]) ** 2
                    if min(plus, minus) < apart * apart:
                        return True
    return False


@nb.njit(cache=True, nogil=True)
def _independent(peaks: NDArray[np.float64], kept: int) -> int:
    # Moves to the front what is no sum of multiples of two better vectors; how many, at most those
    # that are combined. Spots that lie about in a plane make all vectors across it coherent, and
    # they would leave no room for any out of it.
    chosen = 0
    for m in range(kept):
        if _is_sum(peaks[m], peaks, chosen):
            continue
        peaks[chosen] = peaks[m]
        chosen += 1
        if chosen == _COMBINED:
            break
    return chosen


@nb.njit(cache=True, nogil=True)
def _combined(
    table: NDArray[np.float64],
    chosen: NDArray[np.int64],
    peaks: NDArray[np.float64],
    kept: int,
    real: NDArray[np.float64],
    errors: NDArray[np.float64],
) -> float:
    # The three vectors that make the most likely lattice, and its errors; 0 where there is none.
    best = 0.0
    a, b = np.empty((3, 3)), np.empty((3, 3))
    n = chosen.shape[0]
    some = np.empty((n, 7))
    sharp = np.empty((_ERRORS.shape[0], n, 5))
    for each in range(_ERRORS.shape[0]):
        _sharpen(table, chosen, _ERRORS[each], 2.0, sharp[each])
    top = min(kept, _COMBINED)
    for i in range(2, top):
        for j in range(1, i):
            for k in range(j):
                a[0], a[1], a[2] = peaks[i, 1:], peaks[j, 1:], peaks[k, 1:]
                cell = abs(_invert(a, b))
                edges = 1.0
                for m in range(3):
                    edges *= math.sqrt(a[m, 0] ** 2 + a[m, 1] ** 2 + a[m, 2] ** 2)
                if cell < 0.15 * edges:
                    continue
                _place(a, b, table, chosen, some)
                volume = abs(_determinant(b))
                for each in range(_ERRORS.shape[0]):
                    likely = _likelihood(volume, sharp[each], some, n, best)
                    if likely > best:
                        best = likely
                        errors[:] = _ERRORS[each]
                        real[:] = a
    return best


@nb.njit(cache=True, nogil=True)
def _refine(
    table: NDArray[np.float64],
    many: NDArray[np.int64],
    real: NDArray[np.float64],
    reciprocal: NDArray[np.float64],
    errors: NDArray[np.float64],
    fit: NDArray[np.float64],
) -> float:
    # Cell, setting and errors against many spots, from wide to narrow; gives the log likelihood.
    n = many.shape[0]
    a, b = np.empty((3, 3)), np.empty((3, 3))
    weights, some, sharp = np.empty(n), np.empty((n, 7)), np.empty((n, 5))
    tried, better_errors = np.empty(2), np.empty(2)
    _invert(real, reciprocal)
    best = 0.0
    for loose in _LOOSE:
        best = _explain(real, reciprocal, table, many, errors, loose, fit)
        a[:] = real
        for k in range(n):
            weights[k] = fit[k, 0]
        for m in range(3):
            _refine_vector(a[m], table, many, weights, errors, 0.15, 1)
        if _invert(a, b) == 0.0:
            break
        better = best
        _place(a, b, table, many, some)
        volume = abs(_determinant(b))
        for turned in (0.6, 1.0, 1.6):
            for banded in (0.5, 1.0, 2.0):
                tried[0] = min(max(errors[0] * turned, _NARROWEST[0]), _WIDEST[0])
                tried[1] = min(max(errors[1] * banded, _NARROWEST[1]), _WIDEST[1])
                _sharpen(table, many, tried, loose, sharp)
                likely = _likelihood(volume, sharp, some, n, better)
                if likely > better:
                    better = likely
                    better_errors[:] = tried
        if better > best:
            real[:], reciprocal[:] = a, b
            errors[:] = better_errors
            best = better
    return _explain(real, reciprocal, table, many, errors, 1.0, fit)


def _nearest(table: NDArray[np.float64], pool: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    # Those with the shortest q.
    return np.ascontiguousarray(pool[np.argsort(table[pool, 16])[:n]])


# This and the functions that call it are no compiled code: what a compiled function calls is
# compiled once more with it, which would take as long again.
def _lattice(
    table: NDArray[np.float64],
    used: NDArray[np.int64],
    most: int,
    points: float,
    real: NDArray[np.float64],
    reciprocal: NDArray[np.float64],
    errors: NDArray[np.float64],
    fit: NDArray[np.float64],
    coherences: NDArray[np.float64],
) -> float:
    # The best lattice of the spots: log likelihood, 0 where there is none. Sought with the
    # clearest; where they make none, as of a large cell, with those next to the beam, among which
    # longer vectors can be told apart.
    many = used[: min(used.shape[0], _REFINED)]
    best = 0.0
    peaks = np.zeros((_PEAKS_KEPT, 4))
    a, b, e = np.zeros((3, 3)), np.zeros((3, 3)), np.zeros(2)
    for again in range(2):
        if again == 1:
            if used.shape[0] < 1.5 * most:
                break
            if best > 0.0 and fit[: many.shape[0], 0].mean() > _POOR:
                break
            chosen = _nearest(table, used[: min(used.shape[0], _POOL)], most)
        else:
            chosen = used[: min(used.shape[0], most)]
        kept = _vectors(table, chosen, _search(table, chosen, points, peaks), peaks)
        if again == 0 and kept:
            for m in range(coherences.shape[0]):
                coherences[m] = peaks[min(m, kept - 1), 0]
        kept = _independent(peaks, kept)
        if kept < 3 or _combined(table, chosen, peaks, kept, a, e) <= 0.0:
            continue
        some = np.empty((many.shape[0], 7))
        likely = _refine(table, many, a, b, e, some)
        if likely > best:
            best = likely
            real[:], reciprocal[:], errors[:] = a, b, e
            fit[: many.shape[0]] = some
    return best


@nb.njit(cache=True, nogil=True)
def _chance(
    table: NDArray[np.float64],
    chosen: NDArray[np.int64],
    reciprocal: NDArray[np.float64],
    errors: NDArray[np.float64],
) -> float:
    # Share of strays that fall within 2.5 errors of a point of the lattice.
    volume = abs(_determinant(reciprocal))
    total = 0.0
    for i in chosen:
        across = math.sqrt((errors[0] * table[i, 16]) ** 2 + table[i, 14] ** 2)
        radial = math.sqrt((errors[1] * table[i, 16]) ** 2 + table[i, 15] ** 2)
        total += min(1.0, 65.0 * table[i, 14] * radial * across / max(volume, 1e-12))
    return float(total / max(1, chosen.shape[0]))


@nb.njit(cache=True, nogil=True)
def _on_ice(spots: NDArray[np.float32], table: NDArray[np.float64], ice: NDArray[np.bool_]) -> int:
    # Marks what lies on the lines of ice where more lies there than beside them.
    n = spots.shape[0]
    on, beside = 0, 0
    for i in range(n):
        nearest = 1.0
        for d in _ICE_LINES:
            nearest = min(nearest, abs(table[i, 16] * d - 1.0))
        if nearest < _ICE_TOLERANCE:
            on += 1
            ice[i] = True
        elif nearest < 3.0 * _ICE_TOLERANCE:
            beside += 1
    expected = 0.6 * beside
    if on <= expected + 2.0 * math.sqrt(expected + 1.0) + 2.0:
        ice[:] = False
        return 0
    return on


@nb.njit(cache=True, nogil=True)
def _median(values: NDArray[np.float64]) -> float:
    return float(np.median(values)) if values.shape[0] else 0.0


@nb.njit(cache=True, nogil=True)
def _shapes(
    spots: NDArray[np.float32],
    table: NDArray[np.float64],
    used: NDArray[np.int64],
    out: NDArray[np.float32],
) -> None:
    # Elongation along the ring: what smears a crystal widens all spots alike and may lean; mosaic
    # spread widens with the radius and never leans.
    elongation, lean = np.empty(used.shape[0]), np.empty(used.shape[0])
    ring_width, radial_width, radius = (
        np.empty(used.shape[0]),
        np.empty(used.shape[0]),
        np.empty(used.shape[0]),
    )
    n, several = 0, 0
    harmonic_c, harmonic_s = 0.0, 0.0
    for i in used:
        if spots[i, _PEAKS] > 1.5:
            several += 1
        if spots[i, _AT_GAP] > 0 or spots[i, _SATURATED] > 0 or spots[i, _PIXELS] < 3:
            continue
        # A pixel's own width is in it.
        ring, radial = max(table[i, 17], 0.0) + 0.08, max(table[i, 18], 0.0) + 0.08
        elongation[n] = math.log(ring / radial)
        lean[n] = 2.0 * table[i, 19] / (ring + radial)
        ring_width[n], radial_width[n] = 0.5 * math.log(ring), 0.5 * math.log(radial)
        radius[n] = math.log(table[i, 20] + 1.0)
        harmonic_c += lean[n] * math.cos(2.0 * table[i, 21])
        harmonic_s += lean[n] * math.sin(2.0 * table[i, 21])
        n += 1
    out[43] = several / max(1, used.shape[0])
    if n < 4:
        return
    middle = _median(elongation[:n])
    out[35] = middle
    out[36] = _median(np.abs(elongation[:n] - middle))
    mean_lean = _median(lean[:n])
    out[37] = abs(mean_lean)
    out[38] = _median(np.abs(lean[:n] - mean_lean))
    out[39] = math.sqrt(harmonic_c**2 + harmonic_s**2) / n
    r0, e0 = radius[:n].mean(), ring_width[:n].mean()
    up, down = 0.0, 0.0
    for k in range(n):
        up += (radius[k] - r0) * (ring_width[k] - e0)
        down += (radius[k] - r0) ** 2
    out[40] = up / (down + 0.02 * n)
    out[41], out[42] = _median(ring_width[:n]), _median(radial_width[:n])


@nb.njit(cache=True, nogil=True)
def _pairs(table: NDArray[np.float64], used: NDArray[np.int64], out: NDArray[np.float32]) -> None:
    # Neighbours on the same ring, against neighbours as near on the next ones.
    n = min(used.shape[0], 200)
    same, other, close = 0, 0, 0
    for a in range(n):
        i = used[a]
        for b in range(a):
            j = used[b]
            radial = abs(table[i, 20] - table[j, 20])
            if radial > 10.0:
                continue
            turn = abs(table[i, 21] - table[j, 21])
            turn = min(turn, 2.0 * math.pi - turn)
            along = turn * 0.5 * (table[i, 20] + table[j, 20])
            if along > 25.0:
                continue
            if radial < 2.0:
                same += 1
            elif radial > 4.0:
                other += 1
            if radial * radial + along * along < 64.0:
                close += 1
    out[44] = math.log(1.0 + same)
    out[45] = math.log((1.0 + same) / (1.0 + other / 3.0))
    out[46] = math.log(1.0 + close)


def _features(
    spots: NDArray[np.float32], geometry: NDArray[np.float64], out: NDArray[np.float32]
) -> None:
    count = int(np.argmin(np.append(spots[:, _VALID] > 0, False)))
    out[0] = 1.0
    if count == 0:
        return
    spots = spots[:count]
    table = np.empty((count, 22))
    _reciprocal(spots, geometry, table)
    ice = np.zeros(count, np.bool_)
    out[2] = math.log(1.0 + _on_ice(spots, table, ice))
    used = np.flatnonzero(
        (spots[:, _SNR] >= _VISIBLE_SNR)
        & (spots[:, _LONE] == 0)
        & (spots[:, _PIXELS] < _MOST_PIXELS)
        & ~ice
        & (table[:, 20] > 3.0)
    )
    n = used.size
    out[1] = math.log(1.0 + n)
    _shapes(spots, table, used, out)
    _pairs(table, used, out)
    if n < _LEAST:
        return
    out[3] = math.log(1.0 + min(n, _SEARCHED))
    real, reciprocal, errors = np.zeros((3, 3)), np.zeros((3, 3)), np.zeros(2)
    fit = np.zeros((count, 7))
    coherences = np.zeros(6)
    likely = _lattice(table, used, _SEARCHED, _POINTS, real, reciprocal, errors, fit, coherences)
    out[4], out[5], out[6] = coherences[0], coherences[2], coherences[5]
    left = used
    if likely > 0.0:
        left = _first(spots, table, used, real, reciprocal, errors, likely, fit, out)
    out[27] = math.log(1.0 + left.shape[0])
    if likely > 0.0 and left.shape[0] >= _LEAST - 1:
        first_volume = abs(_determinant(real))
        likely = _lattice(
            table,
            left,
            _SEARCHED_SECOND,
            _POINTS_SECOND,
            real,
            reciprocal,
            errors,
            fit,
            coherences,
        )
        out[28] = coherences[0]
        if likely > 0.0:
            some = min(left.shape[0], _REFINED)
            explained = fit[:some, 0].sum()
            out[29], out[30] = math.log(1.0 + likely), likely / some
            out[31] = math.log(1.0 + explained)
            out[32] = explained / some
            out[33] = math.log(abs(_determinant(real)) / first_volume)
            out[34] = math.log(_chance(table, left, reciprocal, errors) + 1e-6)
    np.clip(out, -_MOST, _MOST, out)


@nb.njit(cache=True, nogil=True)
def _first(
    spots: NDArray[np.float32],
    table: NDArray[np.float64],
    used: NDArray[np.int64],
    real: NDArray[np.float64],
    reciprocal: NDArray[np.float64],
    errors: NDArray[np.float64],
    likely: float,
    fit: NDArray[np.float64],
    out: NDArray[np.float32],
) -> NDArray[np.int64]:
    # What the first lattice explains of all spots; gives those it does not.
    n = used.shape[0]
    many, searched = min(n, _REFINED), min(n, _SEARCHED)
    out[7] = likely / many
    _explain(real, reciprocal, table, used, errors, 1.0, fit)
    out[8] = fit[:searched, 0].mean()
    left = np.empty(n, np.int64)
    rest, near, clear = 0, 0, 0
    intensity_on, intensity_off, snr_on, snr_off = 0.0, 0.0, 0.0, 0.0
    ring, radial = np.empty(n), np.empty(n)
    on = 0
    for k in range(n):
        i = used[k]
        p = fit[k, 0]
        intensity_on += p * spots[i, _INTENSITY]
        intensity_off += (1.0 - p) * spots[i, _INTENSITY]
        snr_on += p * spots[i, _SNR]
        snr_off += (1.0 - p) * spots[i, _SNR]
        if p > 0.5:
            ring[on] = abs(fit[k, 4] / table[i, 12])
            radial[on] = abs(fit[k, 5] / table[i, 13])
            on += 1
            continue
        if abs(fit[k, 4]) < 10.0 * table[i, 12] and abs(fit[k, 5]) < 3.0 * math.sqrt(
            table[i, 15] ** 2 + (errors[1] * table[i, 16]) ** 2
        ):
            near += 1
        if spots[i, _SNR] > 8.0:
            clear += 1
        left[rest] = i
        rest += 1
    out[9] = fit[:n, 0].mean()
    out[10] = intensity_on / (intensity_on + intensity_off + 1e-9)
    out[11] = snr_on / (snr_on + snr_off + 1e-9)
    out[12] = fit[: min(n, 10), 0].mean()
    out[13], out[14] = math.log(1.0 + rest), math.log(1.0 + clear)
    out[15] = math.log((intensity_off + 1e-3) / (intensity_on + 1e-3) + 1e-4)
    out[16], out[17] = near / n, math.log(1.0 + near)
    shared = 0
    for k in range(n):
        if fit[k, 0] < 0.5:
            continue
        for m in range(k):
            if (
                fit[m, 0] > 0.5
                and fit[m, 1] == fit[k, 1]
                and fit[m, 2] == fit[k, 2]
                and fit[m, 3] == fit[k, 3]
            ):
                shared += 1
                break
    out[18], out[19] = math.log(1.0 + shared), shared / n
    if on:
        out[20] = np.median(ring[:on])
        out[21] = np.sort(ring[:on])[int(0.9 * (on - 1))]
        out[22] = np.median(radial[:on])
    out[23], out[24] = math.log(errors[0]), math.log(errors[1])
    out[25] = math.log(abs(_determinant(real)) + 1.0)
    out[26] = math.log(_chance(table, used, reciprocal, errors) + 1e-6)
    return left[:rest]

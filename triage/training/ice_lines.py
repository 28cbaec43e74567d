"""Whether a frame shows the lines of hexagonal ice itself, told without a network.

A person who labels a frame sees a ring where it is strong against single pixels. A ring of a tenth
of a background of 0.1 counts is not, and yet plain in the mean of all pixels around the beam. Here
each line is measured in such a profile, and the sum of all lines is held against the same sum at
lines that are moved together to where ice has none: what a frame's spots and shadows do to a
profile, they do there as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from triage.records import ICE_D_ANGSTROM, Geometry

__all__ = ["IceLines", "ice_lines"]

_EDGES = np.linspace(0.2, 0.56, 721)
"""Of the profile's bins, 1/angstrom."""
_CORE, _GAP, _REACH = 2, 8, 30
"""Bins to each side that make a line, those left out beside it, and the last of its continuum."""
_BRIGHT_SHARE, _BESIDE_BRIGHT_PX = 1e-3, 2
"""Pixels that are left out, the brightest, and how far around each: spots."""
_LEAST_PIXELS = 50
_LIMITS = (-3.0, 8.0)
"""Sigma for which one line counts at least and at most: one alone, or a spot on it, is no ice."""
_NEAR = np.array([0.998, 0.999, 1.0, 1.001, 1.002])
_MOVED = np.concatenate([np.linspace(0.9, 0.988, 89), np.linspace(1.012, 1.1, 89)])
"""Scales of 1/d: of ice, as well as a geometry is known; and of the lines that are moved."""
_LEAST_LINES = 3
_SIGMA = 4.0
"""From which the lines are there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IceLines:
    """How much the lines of ice stand out.

    Attributes:
        of_lines: sigma of each line of ``ICE_D_ANGSTROM``, NaN where it is not on the frame.
        sigma: by how much their sum exceeds that of moved lines, in the scatter of the latter.
        as_high: share of the moved lines whose sum is as high.
    """

    of_lines: tuple[float, ...]
    sigma: float
    as_high: float

    @property
    def are_there(self) -> bool:
        """The frame shows ice: no moved lines come near."""
        return self.sigma >= _SIGMA and self.as_high == 0.0


def ice_lines(
    counts: NDArray[np.int64], valid: NDArray[np.bool_], geometry: Geometry
) -> IceLines | None:
    """The lines of ice of a frame; None where fewer than three lie on it.

    Args:
        counts, valid: (y, x).
    """
    sigma = _sigma(*_profile(counts, valid, geometry))
    lines = 1.0 / np.array(ICE_D_ANGSTROM)
    of_lines = _at(sigma, lines)
    if np.isfinite(of_lines).sum() < _LEAST_LINES:
        return None
    near, moved = (
        np.array([_sum(_at(sigma, lines * scale)) for scale in scales])
        for scales in (_NEAR, _MOVED)
    )
    # At the frame's edge a scale may leave too few lines on it; ice as it is has enough.
    found, moved = np.nanmax(near), moved[np.isfinite(moved)]
    if moved.size < 2:
        return None
    return IceLines(
        of_lines=tuple(float(each) for each in of_lines),
        sigma=float((found - moved.mean()) / max(moved.std(), 1e-9)),
        as_high=float((moved >= found).mean()),
    )


def _profile(
    counts: NDArray[np.int64], valid: NDArray[np.bool_], geometry: Geometry
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Counts and pixels of each bin, without spots."""
    used = valid.copy()
    if valid.any():
        bright = valid & (counts > max(np.quantile(counts[valid], 1.0 - _BRIGHT_SHARE), 3.0))
        for y, x in np.argwhere(bright):
            top, left = max(y - _BESIDE_BRIGHT_PX, 0), max(x - _BESIDE_BRIGHT_PX, 0)
            used[top : y + _BESIDE_BRIGHT_PX + 1, left : x + _BESIDE_BRIGHT_PX + 1] = False
    y, x = np.nonzero(used)
    place = np.digitize(geometry.inverse_d(x + 0.5, y + 0.5), _EDGES) - 1
    on = (place >= 0) & (place < _EDGES.size - 1)
    pixels = np.bincount(place[on], minlength=_EDGES.size - 1).astype(np.float64)
    total = np.bincount(place[on], counts[used][on], _EDGES.size - 1).astype(np.float64)
    return total, pixels


def _sigma(total: NDArray[np.float64], pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """(bins,) by how much each bin and those beside it exceed a parabola through the bins around.

    In units of Poisson's noise and of what the bins around scatter; NaN where too few are seen.
    """
    n = pixels.size
    at = np.arange(n)
    mean = np.where(pixels >= _LEAST_PIXELS, total / np.maximum(pixels, 1.0), np.nan)
    sigma = np.full(n, np.nan)
    for i in range(n):
        away = np.abs(at - i)
        beside = (away >= _GAP) & (away <= _REACH) & np.isfinite(mean)
        core = away <= _CORE
        under = pixels[core].sum()
        if beside.sum() < _REACH - _GAP or under < _LEAST_PIXELS or not np.isfinite(mean[i]):
            continue
        place = (at[beside] - i) / _REACH
        curve = np.polyfit(place, mean[beside], 2)
        scatter = float(np.var(mean[beside] - np.polyval(curve, place)))
        variance = max(curve[2], 0.0) / under + scatter / beside.sum()
        if variance > 0.0:
            sigma[i] = (total[core].sum() / under - curve[2]) / np.sqrt(variance)
    return sigma


def _at(sigma: NDArray[np.float64], inverse_d: NDArray[np.float64]) -> NDArray[np.float64]:
    place = np.digitize(inverse_d, _EDGES) - 1
    on = (place >= 0) & (place < sigma.size)
    return np.where(on, sigma[np.clip(place, 0, sigma.size - 1)], np.nan)


def _sum(of_lines: NDArray[np.float64]) -> float:
    seen = of_lines[np.isfinite(of_lines)]
    if seen.size < _LEAST_LINES:
        return float("nan")
    return float(np.clip(seen, *_LIMITS).sum() / np.sqrt(seen.size))

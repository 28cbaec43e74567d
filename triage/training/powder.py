"""Geometry from the rings of a known powder, for frames that come without one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from triage.records import Geometry

__all__ = ["POWDERS", "FittedRings", "Powder", "fit_rings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Powder:
    """A calibrant.

    Attributes:
        d_angstrom: spacings of its lines, the largest first.
    """

    name: str
    d_angstrom: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedRings:
    """What a fit found.

    Attributes:
        agreement: correlation of the radial profile with the lines at their places, 0..1.
    """

    geometry: Geometry
    agreement: float


def _cubic_f(a_angstrom: float, largest: int) -> tuple[float, ...]:
    """Lines of a face-centred cubic lattice: h, k, l all odd or all even."""
    squares = {
        h * h + k * k + l * l
        for h in range(largest)
        for k in range(h + 1)
        for l in range(k + 1)  # noqa: E741 - the third Miller index has this name
        if h and h % 2 == k % 2 == l % 2
    }
    return tuple(a_angstrom / math.sqrt(n) for n in sorted(squares))


POWDERS: Mapping[str, Powder] = MappingProxyType(
    {
        # Huang, Toraya, Blanton and Wu (1993): first order of silver behenate.
        "agbe": Powder(name="silver behenate", d_angstrom=tuple(58.380 / n for n in range(1, 16))),
        # NIST Standard Reference Material 674b.
        "ceo2": Powder(name="ceria", d_angstrom=_cubic_f(5.4116, 9)),
    }
)
"""By the start of the name of a file of theirs."""

_COARSE_CELLS = 160
_DISTANCES_M = (0.03, 10.0)
_WIDTH_PX = 3.0
"""Sigma of a line in the model of a profile."""


def fit_rings(
    counts: NDArray[np.float64],
    valid: NDArray[np.bool_],
    powder: Powder,
    *,
    pixel_m: float,
    wavelength_angstrom: float,
) -> FittedRings:
    """Beam centre and distance for which a frame's rings are the powder's.

    The centre is where the rings are sharpest: where the means over circles scatter most. The
    distance is the one at which lines and profile agree best, and a line that is not there counts
    as much against it as a ring that is no line.

    Args:
        counts, valid: (y, x).
    """
    level = _without_trend(np.where(valid, np.log1p(np.maximum(counts, 0.0)), 0.0), valid)
    centre = _sharpest_centre(level, valid)
    profile, pixels = _profile(level, valid, _radius(level.shape, centre))
    half_angle = np.arcsin(np.minimum(0.5 * wavelength_angstrom / np.array(powder.d_angstrom), 1.0))
    slope = np.tan(np.minimum(2.0 * half_angle, 1.4)) / pixel_m

    def best_of(distances_m: NDArray[np.float64]) -> tuple[float, float]:
        return max((_agreement(profile, pixels, d * slope), float(d)) for d in distances_m)

    _, distance_m = best_of(np.geomspace(*_DISTANCES_M, 3000))
    agreement, distance_m = best_of(distance_m * (1.0 + np.linspace(-3e-3, 3e-3, 61)))
    return FittedRings(
        geometry=Geometry(
            beam_center_x_px=float(np.float32(centre[1])),
            beam_center_y_px=float(np.float32(centre[0])),
            pixel_size_x_m=float(np.float32(pixel_m)),
            pixel_size_y_m=float(np.float32(pixel_m)),
            detector_distance_m=float(np.float32(distance_m)),
            incident_wavelength_angstrom=float(np.float32(wavelength_angstrom)),
        ),
        agreement=agreement,
    )


def _sharpest_centre(level: NDArray[np.float64], valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(y, x) in pixels: from a coarse grid, also a little off the frame, by ever smaller steps."""
    k = max(1, math.ceil(max(level.shape) / _COARSE_CELLS))
    small, small_valid = _binned(level, valid, k)

    def sharpness(centre: tuple[float, float], scale: int) -> float:
        image, used = (small, small_valid) if scale > 1 else (level, valid)
        return _sharpness(image, used, np.array(centre) / scale)

    step = max(level.shape) / 24.0
    grid = np.arange(-14, 15) * step
    middle = level.shape[0] / 2.0, level.shape[1] / 2.0
    centre = max(
        ((middle[0] + dy, middle[1] + dx) for dy in grid for dx in grid),
        key=lambda each: sharpness(each, k),
    )
    while step > 0.3:
        step *= 0.5
        scale = k if step > 0.5 * k else 1
        reached = sharpness(centre, scale)
        while True:
            beside = [
                (centre[0] + dy * step, centre[1] + dx * step)
                for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1))
            ]
            found, there = max((sharpness(each, scale), each) for each in beside)
            if found <= reached:
                break
            reached, centre = found, there
    return np.array(centre)


def _without_trend(level: NDArray[np.float64], valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    """``level`` less its mean over a box of a sixteenth of the frame, 0 where not valid."""
    reach = max(level.shape) // 32
    total, number = (_boxed(each, reach) for each in (level * valid, valid.astype(np.float64)))
    return np.where(valid, level - total / np.maximum(number, 1.0), 0.0)


def _boxed(image: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    for axis in (0, 1):
        table = np.insert(np.cumsum(image, axis), 0, 0.0, axis)
        n = image.shape[axis]
        high = np.minimum(np.arange(n) + reach + 1, n)
        low = np.maximum(np.arange(n) - reach, 0)
        image = np.take(table, high, axis) - np.take(table, low, axis)
    return image


def _binned(
    level: NDArray[np.float64], valid: NDArray[np.bool_], k: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    ny, nx = (side // k * k for side in level.shape)
    cells = (ny // k, k, nx // k, k)
    number = valid[:ny, :nx].reshape(cells).sum((1, 3))
    total = (level * valid)[:ny, :nx].reshape(cells).sum((1, 3))
    return total / np.maximum(number, 1), number > 0.5 * k * k


def _radius(shape: tuple[int, ...], centre: NDArray[np.float64]) -> NDArray[np.float64]:
    y, x = np.ogrid[: shape[0], : shape[1]]
    radius: NDArray[np.float64] = np.hypot(y + 0.5 - centre[0], x + 0.5 - centre[1])
    return radius


def _profile(
    level: NDArray[np.float64], valid: NDArray[np.bool_], radius: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    ring = radius[valid].astype(np.int64)
    pixels = np.bincount(ring).astype(np.float64)
    return np.bincount(ring, level[valid]) / np.maximum(pixels, 1.0), pixels


def _sharpness(
    level: NDArray[np.float64], valid: NDArray[np.bool_], centre: NDArray[np.float64]
) -> float:
    profile, pixels = _profile(level, valid, _radius(level.shape, centre))
    return float((pixels * profile**2).sum())


def _agreement(
    profile: NDArray[np.float64], pixels: NDArray[np.float64], at: NDArray[np.float64]
) -> float:
    inside = at < profile.size
    if inside.sum() < 2:
        return -1.0
    place = np.arange(profile.size) + 0.5
    away = (place[:, None] - at[None, inside]) / _WIDTH_PX
    lines = np.exp(-0.5 * away**2).max(1)
    weight = pixels * (place > 0.5 * at.min())
    weight /= weight.sum()
    a = profile - (weight * profile).sum()
    b = lines - (weight * lines).sum()
    spread = math.sqrt(float((weight * a * a).sum() * (weight * b * b).sum()))
    return float((weight * a * b).sum() / spread) if spread > 0 else -1.0

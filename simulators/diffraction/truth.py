"""What is true of a frame, as far as it can be seen: labels by the bounds of ``bounds.toml``."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BOUNDS",
    "REFLECTION",
    "SPOT",
    "crystal_truth",
    "ice_truth",
    "is_visible",
    "signal_to_noise",
]

BOUNDS: dict[str, Any] = tomllib.loads(
    resources.files("simulators.diffraction").joinpath("bounds.toml").read_text()
)
"""The tables of ``bounds.toml``."""

FWHM = 2.355
"""Full width at half maximum of a Gaussian of sigma 1."""

SPOT = np.dtype(
    [
        ("x", "f8"),
        ("y", "f8"),
        ("photons", "f8"),
        ("along", "f8"),
        ("across", "f8"),
        ("angle", "f8"),
        ("pixels", "f8"),
        ("lattice", "i8"),
        ("s", "f8"),
        ("mosaic", "f8"),
        ("other", "f8"),
        ("smear", "f8"),
        ("own", "f8"),
        ("ring", "f8", (3,)),
    ]
)
"""One reflection: place [px], photons, sigma along and across its long axis [px], that axis'
angle, pixels under it, its lattice, 1/d^2; sigma [px] of the mosaic spread, of the widest other
cause but smear, of the smear, and of the spot along the ring without smear; and how far
[px] along the ring turns of the crystal about x, y and z move it, per radian."""

REFLECTION = np.dtype([("y_px", "f4"), ("x_px", "f4"), ("snr", "f8"), ("sigma_px", "f4")])
"""What is told of a reflection: its place [px from the outer corner], its true signal to noise, and
sigma along its long axis."""


def signal_to_noise(
    photons: NDArray[np.float64], noise: NDArray[np.float64]
) -> NDArray[np.float64]:
    """I / sqrt(I + B n), of photons I and variance B n under the spot."""
    ratio: NDArray[np.float64] = photons / np.sqrt(photons + noise + 1e-9)
    return ratio


def is_visible(photons: NDArray[np.float64], noise: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Signal to noise above the bound; without background that asks for its square in photons."""
    return np.asarray(signal_to_noise(photons, noise) > BOUNDS["visible"]["snr"], np.bool_)


def crystal_truth(
    spots: NDArray[Any],
    snr: NDArray[np.float64],
    *,
    mosaicity_deg: float,
    orientations: Sequence[NDArray[np.float64]],
    background_photons: float,
) -> dict[str, float]:
    """Labels of whatever crystal there is, NaN where undefined.

    Args:
        spots: (n,) of :data:`SPOT`, the visible ones.
        snr: (n,) theirs.
        orientations: (3, 3) rotation of each lattice, all from the same setting.
        background_photons: mean of a pixel.
    """
    n = len(spots)
    truth = dict.fromkeys(
        ("multilattice", "mosaicity_deg", "mosaicity_measurable", "n_lattices", "d_vis_angstrom"),
        math.nan,
    )
    hit = n >= BOUNDS["visible"]["hit_spots"]
    truth |= {
        "n_visible": float(n),
        "median_snr": float(np.median(snr)) if n else math.nan,
        "blank": 1.0 if n == 0 else 0.0 if hit else math.nan,
    }
    truth |= _quality(n, background_photons)
    if n == 0:
        truth["n_lattices"] = 0.0
    if not hit:
        return truth
    sums = [float(spots["photons"][spots["lattice"] == i].sum()) for i in range(len(orientations))]
    first = int(np.argmax(sums))
    turns = [_turn_vector(each @ orientations[first].T) for each in orientations]
    widths = [math.degrees(float(np.linalg.norm(turn))) / mosaicity_deg for turn in turns]
    seen = [
        _lattice_seen(
            spots[spots["lattice"] == i],
            spots[spots["lattice"] == first],
            sums[i] / sums[first],
            turns[i],
            widths[i],
        )
        if i != first
        else 0.0
        for i in range(len(orientations))
    ]
    smeared = _smeared(spots)
    truth["n_lattices"] = math.nan if any(map(math.isnan, seen)) else 1.0 + sum(seen)
    answers = [*seen, smeared]
    if 1.0 in answers:
        truth["multilattice"] = 1.0
    elif not any(map(math.isnan, answers)):
        truth["multilattice"] = 0.0
    bounds = BOUNDS["mosaicity"]
    fits = (FWHM * spots["mosaic"] >= bounds["px"]) & (
        spots["mosaic"] > np.maximum(spots["other"], spots["smear"])
    )
    merged = any(
        bounds["merged_widths"][0] < wide < bounds["merged_widths"][1]
        and total > BOUNDS["multilattice"]["unseen_share"] * sums[first]
        for wide, total in zip(widths, sums, strict=True)
    )
    truth |= {
        "mosaicity_deg": mosaicity_deg,
        # Lattices that run into one another are wider than each of them.
        "mosaicity_measurable": float(fits.sum() >= bounds["spots"] and not merged),
        "d_vis_angstrom": float(1.0 / math.sqrt(np.quantile(spots["s"], 0.9))),
    }
    return truth


def _quality(n_visible: int, background_photons: float) -> dict[str, float]:
    bounds, hit_spots = BOUNDS["quality"], BOUNDS["visible"]["hit_spots"]
    if 0 < n_visible < hit_spots:
        return {"quality": math.nan, "quality_margin": math.nan}
    if n_visible == 0:
        near = _near(background_photons, bounds["no_crystal_photons"])
        grade = float(background_photons >= bounds["no_crystal_photons"])
        return {"quality": grade, "quality_margin": float(near)}
    steps = (hit_spots, bounds["good_spots"], bounds["strong_spots"])
    return {
        "quality": 1.0 + sum(n_visible >= step for step in steps),
        "quality_margin": float(any(_near(n_visible, step) for step in steps)),
    }


def _near(value: float, bound: float) -> bool:
    margin = 1.0 + float(BOUNDS["margin"])
    return bound / margin <= value <= bound * margin


def _lattice_seen(
    own: NDArray[Any],
    first: NDArray[Any],
    share: float,
    turn_rad: NDArray[np.float64],
    widths: float,
) -> float:
    """1 where a lattice beside the first one counts, 0 where it is not there, else NaN."""
    bounds = BOUNDS["multilattice"]
    if share < bounds["unseen_share"] or widths < bounds["one_crystal_widths"]:
        return 0.0
    distinct = len(own)
    if math.degrees(float(np.linalg.norm(turn_rad))) <= bounds["plain_deg"]:
        apart = np.abs(own["ring"] @ turn_rad)
        distinct = int((apart > np.maximum(bounds["apart_px"], FWHM * own["own"])).sum())
    enough = min(distinct, len(first)) >= bounds["spots"]
    counts = share >= bounds["share"] and widths > bounds["widths"] and enough
    return 1.0 if counts else math.nan


def _turn_vector(rotation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Axis times angle [rad] of a rotation matrix."""
    angle = math.acos(min(1.0, max(-1.0, 0.5 * (float(np.trace(rotation)) - 1.0))))
    axis = np.array(
        [
            rotation[2, 1] - rotation[1, 2],
            rotation[0, 2] - rotation[2, 0],
            rotation[1, 0] - rotation[0, 1],
        ]
    )
    length = float(np.linalg.norm(axis))
    # At half a turn the axis is lost; such turns are only asked for their size.
    vector: NDArray[np.float64] = (
        axis * (angle / length) if length > 1e-9 else np.array([angle, 0.0, 0.0])
    )
    return vector


def _smeared(spots: NDArray[Any]) -> float:
    bounds = BOUNDS["multilattice"]
    if not spots["smear"].any():
        return 0.0
    wide = FWHM * spots["smear"] > np.maximum(bounds["smeared_px"], FWHM * spots["own"])
    return 1.0 if wide.sum() >= bounds["smeared_spots"] else math.nan


def ice_truth(
    ring_snr: float, grain_snr: float, contrast: float, photons: float
) -> dict[str, float]:
    """Labels of ice.

    Args:
        ring_snr: of the strongest ring in the noise-free radial profile.
        grain_snr: of the strongest spot of a grain.
        contrast: of the highest ring that is present, over the background under it.
        photons: of the brightest pixel of ice, as a share of saturation.
    """
    bounds = BOUNDS["ice"]
    strongest = max(ring_snr, grain_snr)
    present = strongest >= bounds["snr"]
    high = contrast >= bounds["bad_contrast"] or photons >= bounds["bad_saturation"]
    return {"ice": float(present), "bad_ice": float(present and high), "ice_snr": strongest}

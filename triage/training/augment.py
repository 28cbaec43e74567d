"""Changed copies of labelled frames: another mounting, exposure or detector, on counts alone.

Nothing is interpolated and no background is made up, so a copy is a frame that could have been
measured. Labels that a change may have made untrue become NaN; nothing is learned from them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from triage.records import HIT_SPOTS, Frame, Geometry

__all__ = ["added", "changed", "dropped", "rescaled", "shifted", "thinned", "turned"]

_LOST = 0.03
"""Most that a shift of the centre takes of a side."""
_ICE_SIGMA = _VISIBLE_SIGMA = 5.0
"""Where ice and spots begin to be visible, by definition of the labels."""

_Labels = dict[str, float]


def changed(
    frame: Frame,
    counts: NDArray[Any],
    valid: NDArray[np.bool_],
    labels: _Labels,
    other: tuple[NDArray[Any], NDArray[np.bool_], _Labels],
    *,
    scales: bool,
    rng: np.random.Generator,
) -> tuple[Frame, _Labels]:
    """A copy of a frame with some of the changes of this module, and its labels.

    Args:
        counts, valid: (y, x) of the frame, decoded.
        other: counts, validity and labels of another frame of the same detector.
        scales: whether the detector counts in a unit that is no photon, so that its gain may vary.
    """
    geometry, labels = frame.series.geometry, dict(labels)
    if rng.random() < 0.4:
        counts, labels = thinned(counts, labels, rng.uniform(0.4, 1.0), rng)
    if rng.random() < 0.3 and labels["blank"] == other[2]["blank"] == 1.0:
        counts, valid, labels = added(counts, valid, labels, other)
    if scales and rng.random() < 0.5:
        counts = rescaled(counts, math.exp(rng.uniform(-0.3, 0.3)))
    counts, valid, geometry = turned(counts, valid, geometry, int(rng.integers(8)))
    if rng.random() < 0.5:
        counts, valid, geometry = shifted(counts, valid, geometry, rng)
    if rng.random() < 0.3:
        valid = dropped(valid, rng)
    series = replace(
        frame.series,
        pixel_mask=(~valid).astype(np.uint32),
        geometry=geometry,
        image_size_x_px=0,
        image_size_y_px=0,
    )
    kept = np.ascontiguousarray(np.where(valid, counts, 0).astype(frame.dtype))
    copy = structs.replace(
        frame, series=series, encoding="raw", framed=False, shape=kept.shape, payload=kept.tobytes()
    )
    return copy, labels


def thinned(
    counts: NDArray[Any], labels: _Labels, share: float, rng: np.random.Generator
) -> tuple[NDArray[Any], _Labels]:
    """A shorter exposure: each photon is kept with the chance ``share``.

    I / sqrt(I + B n) falls by the root of ``share``. So where the median spot stays visible, half
    of the spots do at the least; where it does not, nothing is said of the crystal.
    """
    fewer = rng.binomial(np.maximum(counts, 0).astype(np.int64), share)
    labels, fall = dict(labels), math.sqrt(share)
    labels |= dict.fromkeys(("quality", "d_vis_angstrom"), math.nan)
    labels["ice_snr"] *= fall
    labels["ice"] = float(labels["ice_snr"] >= _ICE_SIGMA)
    if labels["bad_ice"] == 1.0:
        # It may have been that for its brightness.
        labels["bad_ice"] = math.nan if labels["ice"] else 0.0
    if labels["blank"] == 1.0:
        return fewer, labels
    stay = labels["median_snr"] * fall >= _VISIBLE_SIGMA
    left = 0.5 * labels["n_visible"] if stay else math.nan
    labels |= {"median_snr": math.nan, "n_visible": left}
    if not left >= HIT_SPOTS:
        labels["blank"] = math.nan
    if not left >= 3 * HIT_SPOTS:
        unknown = ("multilattice", "n_lattices", "mosaicity_deg", "mosaicity_measurable")
        labels |= dict.fromkeys(unknown, math.nan)
    return fewer, labels


def added(
    counts: NDArray[Any],
    valid: NDArray[np.bool_],
    labels: _Labels,
    other: tuple[NDArray[Any], NDArray[np.bool_], _Labels],
) -> tuple[NDArray[Any], NDArray[np.bool_], _Labels]:
    """The sum of two blank frames, which is the blank of a longer exposure.

    A ring is where both have it only if they share their geometry, so ice is not said.
    """
    unknown = dict.fromkeys(("ice", "bad_ice", "quality"), math.nan)
    if labels["ice"] == other[2]["ice"] == 0.0:
        unknown |= {"ice": 0.0, "bad_ice": 0.0}
    return counts + other[0], valid & other[1], labels | unknown


def rescaled(counts: NDArray[Any], gain: float) -> NDArray[Any]:
    """Another gain: counts of a detector that counts no single photons."""
    return np.rint(counts * gain).astype(np.int64)


def turned(
    counts: NDArray[Any], valid: NDArray[np.bool_], geometry: Geometry | None, which: int
) -> tuple[NDArray[Any], NDArray[np.bool_], Geometry | None]:
    """One of the eight turns and mirrors of a square; of oblong pixels, of those that keep them."""
    square = geometry is None or geometry.pixel_size_x_m == geometry.pixel_size_y_m
    quarters, mirrored = which % 4, which >= 4
    if not square:
        quarters -= quarters % 2
    for _ in range(quarters):
        # To the left: what was right of the middle comes to lie above it.
        width = counts.shape[1]
        counts, valid = np.rot90(counts), np.rot90(valid)
        if geometry is not None:
            geometry = replace(
                geometry,
                beam_center_x_px=geometry.beam_center_y_px,
                beam_center_y_px=width - geometry.beam_center_x_px,
            )
    if mirrored:
        counts, valid = counts[:, ::-1], valid[:, ::-1]
        if geometry is not None:
            geometry = replace(
                geometry, beam_center_x_px=counts.shape[1] - geometry.beam_center_x_px
            )
    return counts, valid, geometry


def shifted(
    counts: NDArray[Any],
    valid: NDArray[np.bool_],
    geometry: Geometry | None,
    rng: np.random.Generator,
) -> tuple[NDArray[Any], NDArray[np.bool_], Geometry | None]:
    """The detector moved by whole pixels; what comes in from beyond its edge is masked."""
    most = [int(_LOST * extent) for extent in counts.shape]
    down, right = (int(rng.integers(-each, each + 1)) for each in most)
    moved, there = np.zeros_like(counts), np.zeros_like(valid)
    into = tuple(
        slice(max(0, by), extent + min(0, by))
        for by, extent in zip((down, right), counts.shape, strict=True)
    )
    out_of = tuple(
        slice(max(0, -by), extent + min(0, -by))
        for by, extent in zip((down, right), counts.shape, strict=True)
    )
    moved[into], there[into] = counts[out_of], valid[out_of]
    if geometry is not None:
        geometry = replace(
            geometry,
            beam_center_x_px=geometry.beam_center_x_px + right,
            beam_center_y_px=geometry.beam_center_y_px + down,
        )
    return moved, there, geometry


def dropped(valid: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.bool_]:
    """A dead module: a rectangle of at most a tenth of the frame becomes invalid."""
    height, width = (int(extent * rng.uniform(0.05, 0.3)) for extent in valid.shape)
    y, x = int(rng.integers(valid.shape[0] - height)), int(rng.integers(valid.shape[1] - width))
    left = valid.copy()
    left[y : y + height, x : x + width] = False
    return left

"""What a model is measured against: a spot count, and boosted trees on spots and radial profile.

Both see the same frames; neither shares code with the network's maps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from triage.audit.finder import crystal_spots, find_spots
from triage.backends import open_backend
from triage.backends.recipe import measured
from triage.errors import EnvironmentLacksError
from triage.training.dataset import Example, frames_of

__all__ = ["boosted_trees", "radial_statistics", "spot_statistics"]

_SPOT_QUANTILES = (0.5, 0.9, 1.0)
_RADIAL_GROUPS = 20


def spot_statistics(paths: Sequence[Path], *, threads: int = 1) -> NDArray[np.float64]:
    """(frames, 7) by the audit's finder, at native pixels, in the order of the shards.

    Spots that speak for a crystal, all spots, three quantiles of their signal to noise, mean
    count, and valid pixels.
    """

    def of(path: Path) -> list[list[float]]:
        backend = open_backend("cpu")
        rows = []
        for frame in frames_of(path):
            counts, valid = measured(frame, backend.decode(frame))
            spots = find_spots(counts, valid)
            sigma = spots.sigma if len(spots) else np.zeros(1)
            rows.append(
                [
                    float(crystal_spots(spots, frame.shape, frame.series.geometry)),
                    float(len(spots)),
                    *(float(q) for q in np.quantile(sigma, _SPOT_QUANTILES)),
                    math.log(float(counts[valid].mean()) + 1e-4) if valid.any() else 0.0,
                    float(valid.sum()),
                ]
            )
        return rows

    with ThreadPoolExecutor(threads) as pool:
        return np.array([row for rows in pool.map(of, paths) for row in rows])


def radial_statistics(examples: Sequence[Example]) -> NDArray[np.float64]:
    """(frames, 40): level over the smooth trend and spread between sectors, by groups of bins."""
    radial = np.stack([e.radial for e in examples]).astype(np.float64)
    valid = radial[:, 1] > 0.3
    level = np.where(valid, np.log(radial[:, 0] + 1e-3), np.nan)
    n, _, bins = level.shape
    groups = level.transpose(0, 2, 1).reshape(n, _RADIAL_GROUPS, bins // _RADIAL_GROUPS, -1)
    seen = np.isfinite(groups).any(3)
    with np.errstate(invalid="ignore"):
        per_bin = np.where(seen, np.nan_to_num(groups).sum(3), np.nan) / np.maximum(
            np.isfinite(groups).sum(3), 1
        )
    peak = _largest(per_bin) - _middle(per_bin)
    spread = _largest(per_bin) + _largest(-per_bin)
    return np.concatenate([peak, spread], 1)


def _largest(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the last axis, NaN left out; NaN where nothing is left."""
    filled = np.where(np.isfinite(values), values, -np.inf).max(-1)
    return np.where(np.isfinite(filled), filled, np.nan)


def _middle(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median over the last axis likewise."""
    ordered = np.sort(values, -1)  # NaN last
    count = np.isfinite(values).sum(-1)
    at = np.maximum(count - 1, 0) // 2
    return np.take_along_axis(ordered, at[..., None], -1)[..., 0]


def boosted_trees(
    learned: NDArray[np.float64],
    labels: Mapping[str, NDArray[np.float64]],
    asked: NDArray[np.float64],
    *,
    seed: int = 0,
) -> dict[str, NDArray[np.float64]]:
    """Probability of each binary label on ``asked`` (n, F), learned from ``learned`` (m, F).

    Args:
        labels: by name, (m,) 0, 1 or NaN; those without both classes are left out.

    Raises:
        EnvironmentLacksError: scikit-learn is not installed.
    """
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
    except ImportError as err:
        raise EnvironmentLacksError(
            "the baseline of boosted trees needs scikit-learn; install the extra 'train'"
        ) from err
    found = {}
    for name, values in labels.items():
        known = np.isfinite(values)
        if np.unique(values[known]).size < 2:
            continue
        trees = HistGradientBoostingClassifier(max_iter=200, random_state=seed)
        trees.fit(learned[known], values[known] > 0.5)
        found[name] = trees.predict_proba(asked)[:, 1]
    return found

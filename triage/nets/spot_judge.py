"""Which spots of a list are a crystal's: the odds of each, by a small network that reads its marks.

A fifth of the spots of a hit are none of its reflections: noise, ice, hot pixels, tracks, powder.
How sure a spot is says little of that, its other marks together nearly all. What is asked of a
whole list, one lattice or two, weak or strong, is asked of those spots that are left.

The network is part of a model and is learned by :mod:`triage.training.judging`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from triage.records import Spot

__all__ = ["SpotJudge", "crystal_and_rest"]

_VALID = int(Spot.VALID)
_MOST = np.float32(6.0)


@dataclass(frozen=True, slots=True, eq=False)
class SpotJudge:
    """The network's layers, first to last, with rectifiers between them.

    Attributes:
        weights: (outputs, inputs) float32 of each layer; the last one has one output.
        biases: (outputs,) float32 of each.
    """

    weights: tuple[NDArray[np.float32], ...]
    biases: tuple[NDArray[np.float32], ...]

    def log_odds(self, marks: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n,) float32 natural logarithm of the odds that a spot is a reflection of a crystal.

        Within 6 of even; what is no number is even.

        Args:
            marks: (n, len(SPOT_MARKS)) float32, as ``spot_marks`` gives them.
        """
        inner = marks
        with np.errstate(invalid="ignore", over="ignore"):
            for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
                inner = np.maximum(inner @ weight.T + bias, np.float32(0.0))
            odds = (inner @ self.weights[-1].T + self.biases[-1])[:, 0]
        found: NDArray[np.float32] = np.clip(np.nan_to_num(odds, nan=0.0), -_MOST, _MOST)
        return found


def crystal_and_rest(
    spots: NDArray[np.float32], log_odds: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The list in two of the same shape: what is more likely a crystal's than not, and the rest.

    Args:
        spots: (n, len(Spot)); rows that are no spots are zero and come last.
        log_odds: (n,) of each.
    """
    there, likely = spots[:, _VALID] != 0, log_odds > 0.0
    crystal, rest = np.zeros_like(spots), np.zeros_like(spots)
    for out, kept in ((crystal, spots[there & likely]), (rest, spots[there & ~likely])):
        out[: len(kept)] = kept
    return crystal, rest

"""Which spots of a list are a crystal's: the odds of each, by a small network that reads its marks.

A fifth of the spots of a hit are none of its reflections: noise, ice, hot pixels, tracks, powder.
How sure a spot is says little of that, its other marks nearly all, and what company it is in much
of the rest: a wide spot is a reflection among others as wide. So the network reads each spot by
itself first, and then with what the whole list is like, told by means over groups of it that are
learned too (inducing points: Lee et al., Set Transformer, ICML 2019). What is asked of a whole
list, one lattice or two, weak or strong, is asked of those spots that are left.

The network is part of a model and is learned by :mod:`triage.training.judging`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from triage.records import Spot

__all__ = ["InCompany", "SpotJudge", "crystal_and_rest"]

_VALID = int(Spot.VALID)
_MOST = np.float32(6.0)


@dataclass(frozen=True, slots=True, eq=False)
class InCompany:
    """A layer that sees a list as groups: how much each spot is of each of G, what the spots of a
    group are like on average, and how many there are.

    Attributes:
        groups: (G, W) and (G,) float32 of the layer that says how much a spot is of a group.
        own: (W, W) and (W,) of the spot itself.
        whole: (W, G W + G) of the groups' means, and of the logarithms of one more than their
            sizes.
    """

    groups: tuple[NDArray[np.float32], NDArray[np.float32]]
    own: tuple[NDArray[np.float32], NDArray[np.float32]]
    whole: NDArray[np.float32]

    def __call__(
        self, inner: NDArray[np.float32], there: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """(n, W) float32 of (n, W), before the rectifier; ``there`` (n, 1) is 0 of what is no
        spot."""
        weight, bias = self.groups
        share = there / (np.float32(1.0) + np.exp(-(inner @ weight.T + bias)))  # (n, G)
        size = share.sum(0)
        means = (share.T @ inner) / (size + np.float32(1.0))[:, None]
        whole = np.concatenate([means.reshape(-1), np.log1p(size)])
        weight, bias = self.own
        out: NDArray[np.float32] = inner @ weight.T + (bias + self.whole @ whole)
        return out


@dataclass(frozen=True, slots=True, eq=False)
class SpotJudge:
    """The network's layers, first to last, with rectifiers between them.

    Attributes:
        weights: (outputs, inputs) float32 of each layer; the last one has one output.
        biases: (outputs,) float32 of each.
        company: what lies before the last of them.
    """

    weights: tuple[NDArray[np.float32], ...]
    biases: tuple[NDArray[np.float32], ...]
    company: tuple[InCompany, ...] = ()

    def log_odds(self, marks: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n,) float32 natural logarithm of the odds that a spot is a reflection of a crystal.

        Within 6 of even; what is no number is even.

        Args:
            marks: (n, len(SPOT_MARKS)) float32 of one frame, as ``spot_marks`` gives them.
        """
        inner = marks
        with np.errstate(invalid="ignore", over="ignore"):
            for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
                inner = np.maximum(inner @ weight.T + bias, np.float32(0.0))
            for layer in self.company:
                inner = np.maximum(layer(inner, marks[:, -1:]), np.float32(0.0))
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

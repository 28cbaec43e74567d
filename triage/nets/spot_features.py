"""What the full exit reads of a list of spots: one vector for each frame.

First numbers of the whole list, then those of its surest spots one by one. The parts know the
crystal and the detector, the network only what comes of it. All that is learned here is which spots
are a crystal's (``spot_judge.py``): of those alone lattices are asked, and shapes once more; of the
others, whether they lie on the lines of ice.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from triage.nets import lattices
from triage.nets.lattices import LATTICE_FEATURES, lattice_features
from triage.nets.spot_judge import SpotJudge, crystal_and_rest
from triage.nets.spot_marks import LOG_ODDS, MARKED, SPOT_MARKS, spot_marks
from triage.nets.spot_shapes import (
    LINE_FEATURES,
    SHAPE_FEATURES,
    line_features,
    shape_features,
)
from triage.records import MOST_SPOTS, WARM_UP_GEOMETRY, CloseUps, Spot

__all__ = ["SPOT_FEATURES", "spot_features", "warm_up_spot_features"]

SPOT_FEATURES = (
    *(f"lattice_{name}" for name in LATTICE_FEATURES),
    *(f"shape_{name}" for name in SHAPE_FEATURES),
    *(f"crystal_{name}" for name in SHAPE_FEATURES),
    *(f"other_{name}" for name in LINE_FEATURES),
)
"""What each number of the whole list says; a model holds for those it was trained with. ``shape``
is of all spots, ``lattice`` and ``crystal`` are of those that are a crystal's, ``other`` of those
that are not."""


_VALID = int(Spot.VALID)
_PLACES = {name: place for place, name in enumerate(SPOT_FEATURES)}


def spot_features(
    close_ups: CloseUps,
    judge: SpotJudge | None = None,
    names: tuple[str, ...] = SPOT_FEATURES,
) -> NDArray[np.float32]:
    """(N, len(names) + MARKED * len(SPOT_MARKS)) float32, finite: each frame's spots in numbers.

    Args:
        judge: of the model that reads them; without one every spot is taken for a crystal's.
        names: those of the whole list that a model reads, some of :data:`SPOT_FEATURES`. The marks
            of the spots, spot by spot, follow them.
    """
    whole = np.zeros(len(SPOT_FEATURES), np.float32)
    shapes = len(LATTICE_FEATURES)
    crystals = shapes + len(SHAPE_FEATURES)
    others = crystals + len(SHAPE_FEATURES)
    chosen = None if names == SPOT_FEATURES else [_PLACES[name] for name in names]
    first = len(names)
    out = np.zeros((len(close_ups.spots), first + MARKED * len(SPOT_MARKS)), np.float32)
    for row, (spots, geometry, shape) in enumerate(
        zip(close_ups.spots, close_ups.geometry, close_ups.shape, strict=True)
    ):
        marks = spot_marks(spots, geometry, shape)
        listed, rest = spots, spots[:0]
        if judge is not None:
            # Rows behind the last spot say nothing, and most lists are short.
            n = int(np.count_nonzero(spots[:, _VALID]))
            odds = marks[:, LOG_ODDS]
            odds[:n] = judge.log_odds(marks[:n])
            listed, rest = crystal_and_rest(spots, odds)
        whole[:shapes] = lattice_features(listed, geometry, shape)
        whole[shapes:crystals] = shape_features(spots, geometry, shape)
        whole[crystals:others] = shape_features(listed, geometry, shape)
        whole[others:] = line_features(rest, geometry)
        out[row, :first] = whole if chosen is None else whole[chosen]
        out[row, first:] = marks[:MARKED].reshape(-1)
    return out


def warm_up_spot_features() -> None:
    """Run all that :func:`spot_features` calls once, so that no frame waits for a compiler."""
    lattices.warm_up()
    nothing = np.zeros((MOST_SPOTS, len(Spot)), np.float32)
    for geometry in (None, WARM_UP_GEOMETRY):
        shape_features(nothing, geometry, (64, 64))
        line_features(nothing, geometry)
        spot_marks(nothing, geometry, (64, 64))

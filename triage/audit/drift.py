"""Drift: do the frames that come now look like those that the model was made with?

A sample of the scored frames is compared with the distributions in the model's card. Nothing
here changes a verdict: a beamline that has drifted away from the training data is told so, and
decides itself.

Two things are evidence of drift. A quantity of the input that lies beyond the middle 99 % of the
card's frames more often than it should; and scores that are neither blank nor hit more often than
they were on the card's frames. Both hold however many frames are blank, which differs from run to
run and is no drift. How far two distributions lie apart (Kolmogorov and Smirnov's distance) is
shown beside them, without a judgement.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from triage.binomial import lower_bound
from triage.records import Drifted, DriftReport, Frame, Scores, Views

__all__ = ["INPUTS", "UNSURE_ABOVE", "Drift", "inputs_of", "reference_of"]

log = logging.getLogger(__name__)

INPUTS = ("counts_per_px", "valid_share", "brightest_cell", "empty_cells_share")
"""Quantities of a frame, in the order of :func:`inputs_of`."""

UNSURE_ABOVE = 0.05
"""p_blank from which a frame is no plain hit; below the threshold of a veto it is no blank."""

_LOOK_AT_EACH = 16
"""One frame in so many is looked at: the sums over a frame's cells cost a share of a network."""
_WINDOW = 500
_JUDGE_EVERY = 100
_CONFIDENCE = 0.9999
_OUTSIDE_LIMIT = 0.05
"""Share of frames outside the middle 99 % that is drift: five times what chance gives."""
_UNSURE_FACTOR = 3.0
_SHARE_MARGIN = 0.01
_COUNT_MARGIN = 1.5
"""Beyond the middle 99 %: a mask is the same on every frame of a beamline, and one that leaves a
pixel in a thousand less than any that was trained with is no drift. Counts span decades."""
_LEVELS = np.linspace(0.0, 1.0, 201)


class DriftMetrics(Protocol):
    """Where drift is shown; ``triage.metrics.Metrics`` is one."""

    def drift(self, report: DriftReport) -> None: ...


def inputs_of(views: Views, row: int) -> NDArray[np.float64]:
    """What a frame looks like, whatever is on it: (4,), see :data:`INPUTS`; NaN without pixels.

    Counts per valid pixel, valid share of the pixels in occupied cells, largest valid count, and
    share of the cells with valid pixels in which nothing was counted.
    """
    count, total = views.count[row], views.total[row]
    valid_px = int(count.sum(dtype=np.int64))
    seen = count > 0
    cells = int(seen.sum())
    if not cells:
        return np.full(len(INPUTS), math.nan)
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    spanned = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    k = int(views.bin_factor[row])
    return np.array(
        [
            float(total.sum(dtype=np.float64)) / valid_px,
            valid_px / (int(spanned) * k * k),
            float(views.maximum[row].max()),
            float((total[seen] == 0).sum()) / cells,
        ]
    )


def reference_of(
    inputs: NDArray[np.float64], p_blank: NDArray[np.float64], p_blank_veto: float
) -> dict[str, Any]:
    """What a card says of its frames: 201 quantiles of each quantity, and the share of unsure ones.

    Args:
        inputs: (n, 4), see :func:`inputs_of`.
        p_blank: (n,).
        p_blank_veto: the card's threshold.
    """
    columns = dict(zip(INPUTS, inputs.T, strict=True)) | {"p_blank": p_blank}
    unsure = (p_blank > UNSURE_ABOVE) & (p_blank < p_blank_veto)
    return {
        "frames": len(inputs),
        "unsure_share": float(unsure.mean()),
        "quantiles": {
            name: [float(v) for v in np.quantile(column[np.isfinite(column)], _LEVELS)]
            for name, column in columns.items()
        },
    }


class Drift:
    """Watches a sample of scored frames. Every method may be called from any thread.

    Args:
        reference: as made by :func:`reference_of`.
        p_blank_veto: threshold below which a frame is unsure, the card's.
        metrics: told after each hundred frames.

    Raises:
        KeyError, TypeError, ValueError: a reference of another form.
    """

    def __init__(
        self,
        reference: Mapping[str, Any],
        p_blank_veto: float,
        metrics: DriftMetrics | None = None,
    ) -> None:
        self._quantiles = {
            name: np.asarray(reference["quantiles"][name], np.float64)
            for name in (*INPUTS, "p_blank")
        }
        if any(q.shape != _LEVELS.shape for q in self._quantiles.values()):
            raise ValueError(f"quantiles of a drift reference; expected {len(_LEVELS)} of each")
        self._unsure_share = float(reference["unsure_share"])
        self._p_blank_veto = p_blank_veto
        self._metrics = metrics
        self._lock = threading.Lock()
        self._recent: deque[NDArray[np.float64]] = deque(maxlen=_WINDOW)
        self._looked_at = 0
        self._told: frozenset[str] = frozenset()

    def look(self, frames: Sequence[Frame], views: Views, scores: Sequence[Scores]) -> None:
        """Take one frame in sixteen, by its number, of a scored batch into the sample."""
        for row, (frame, score) in enumerate(zip(frames, scores, strict=True)):
            if frame.ordinal % _LOOK_AT_EACH or not math.isfinite(score.p_blank):
                continue
            self.add(inputs_of(views, row), score.p_blank)

    def add(self, inputs: NDArray[np.float64], p_blank: float) -> None:
        """Enter one frame of the sample."""
        with self._lock:
            self._recent.append(np.append(inputs, p_blank))
            self._looked_at += 1
            due = self._looked_at % _JUDGE_EVERY == 0
        if due:
            self._judge()

    def report(self) -> DriftReport:
        """The last 500 frames of the sample against the card's."""
        with self._lock:
            looked_at = self._looked_at
            recent = np.array(self._recent).reshape(-1, len(INPUTS) + 1)
        quantities = []
        for name, values in zip((*INPUTS, "p_blank"), recent.T, strict=True):
            values = values[np.isfinite(values)]
            quantities.append(self._compared(name, values))
        return DriftReport(frames=looked_at, quantities=tuple(quantities))

    def _compared(self, name: str, values: NDArray[np.float64]) -> Drifted:
        known = self._quantiles[name]
        if name == "p_blank":
            strange = (values > UNSURE_ABOVE) & (values < self._p_blank_veto)
            limit = max(_OUTSIDE_LIMIT, _UNSURE_FACTOR * self._unsure_share)
        else:
            low, high = _margins(name, float(known[1]), float(known[-2]))
            strange = (values < low) | (values > high)
            limit = _OUTSIDE_LIMIT
        n, found = len(values), int(strange.sum())
        return Drifted(
            quantity=name,
            distance=_distance(values, known),
            strange_share=found / n if n else math.nan,
            limit=limit,
            drifted=n >= _JUDGE_EVERY and lower_bound(found, n, _CONFIDENCE) > limit,
        )

    def _judge(self) -> None:
        report = self.report()
        if self._metrics is not None:
            self._metrics.drift(report)
        drifted = frozenset(q.quantity for q in report.quantities if q.drifted)
        for q in report.quantities:
            if q.quantity in drifted - self._told:
                log.warning(
                    "drift: %.0f %% of the last frames have %s; expected at most %.0f %% of "
                    "frames like those the model was made with; look at the frames and at the "
                    "audit before anything is dropped",
                    100.0 * q.strange_share,
                    "a p_blank between hit and blank"
                    if q.quantity == "p_blank"
                    else f"{q.quantity} outside what the model knows",
                    100.0 * q.limit,
                )
        self._told = drifted


def _margins(name: str, low: float, high: float) -> tuple[float, float]:
    if name.endswith("_share"):
        return low - _SHARE_MARGIN, high + _SHARE_MARGIN
    return low / _COUNT_MARGIN, high * _COUNT_MARGIN


def _distance(values: NDArray[np.float64], quantiles: NDArray[np.float64]) -> float:
    """Largest distance of two distribution functions, 0..1, at the quantiles of one of them."""
    if not len(values):
        return math.nan
    ordered = np.sort(values)
    # Where the reference repeats a value its function jumps: both sides of the jump count.
    upto = np.searchsorted(ordered, quantiles, "right") / len(values)
    below = np.searchsorted(ordered, quantiles, "left") / len(values)
    top = np.searchsorted(quantiles, quantiles, "right") / len(quantiles)
    bottom = np.searchsorted(quantiles, quantiles, "left") / len(quantiles)
    return float(max(np.abs(upto - top).max(), np.abs(below - bottom).max()))

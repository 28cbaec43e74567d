"""Runs a model over prepared frames.

Each frame goes through the network alone, cut to the cells it occupies. That makes its scores
independent of its neighbours bit for bit, whatever kernels a batch size would choose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triage.errors import ModelError
from triage.nets.evidence import evidence_on_cpu
from triage.nets.model import Model
from triage.nets.triagenet import Features, Head
from triage.records import NOT_SCORED, Scores, Views

__all__ = ["Scorer", "head_values", "occupied_cells"]

_CELLS_PER_STEP = 32
"""The network halves four times; sides are multiples of 32 so that all stages divide."""

_COLUMNS = {
    "blank": "p_blank",
    "ice": "p_ice",
    "bad_ice": "p_bad_ice",
    "multilattice": "p_multilattice",
}
"""Heads whose column has another name."""

_NEEDS_GEOMETRY = ("ice", "bad_ice")


def occupied_cells(count: NDArray[np.uint16]) -> tuple[int, int]:
    """(Y, X) of the corner that holds every cell with a valid pixel, in steps of 32."""
    rows = np.flatnonzero(count.any(1))
    columns = np.flatnonzero(count.any(0))
    y = int(rows[-1]) + 1 if rows.size else 1
    x = int(columns[-1]) + 1 if columns.size else 1
    step = _CELLS_PER_STEP
    return -(-y // step) * step, -(-x // step) * step


def head_values(head: Head, raw: Tensor, calibration: Mapping[str, tuple[float, float]]) -> Tensor:
    """Raw outputs (N, head.outputs) as the quantity of the table: (N,)."""
    if head.kind == "binary":
        temperature, bias = calibration.get(head.name, (1.0, 0.0))
        return torch.sigmoid(raw[:, 0] / temperature + bias)
    if head.kind == "ordinal":
        return head.first + torch.sigmoid(raw).sum(1)
    if head.transform == "log":
        return torch.exp(raw[:, 0].clamp(-7.0, 4.0))
    if head.transform == "inverse_square":
        return raw[:, 0].clamp(1e-4, 4.0).rsqrt()
    return raw[:, 0]


class Scorer:
    """A model ready to score, on the CPU with one thread inside an operation.

    Raises:
        ModelError: a head that has no column.
    """

    def __init__(self, model: Model) -> None:
        torch.set_num_threads(1)
        self._net = model.net
        self._card = model.card
        for head in model.card.heads:
            column = _COLUMNS.get(head.name, head.name)
            if not hasattr(NOT_SCORED, column):
                raise ModelError(
                    f"model {model.card.model_id}: head {head.name!r} has no column in the "
                    "table of decisions"
                )
        # The features of the last batch serve its full exit; the key is the batch itself.
        self._views: Views | None = None
        self._features: dict[int, Features] = {}

    def warm_up(self) -> None:
        """Run once, so that the first frame pays no set-up."""
        recipe = self._card.recipe
        with torch.inference_mode():
            empty = np.zeros((3, recipe.grid, recipe.grid), np.float32)
            features = self._net.features_of(
                evidence_on_cpu(empty, recipe.bin_factors[0]),
                torch.from_numpy(empty[None, 2:3]),
                torch.zeros(1, 3, recipe.sectors, recipe.radial_bins),
            )
            self._net.fast(features)
            side = recipe.tile_px
            self._net.full(features, torch.zeros(1, recipe.tiles, 2, side, side))

    def fast(self, views: Views) -> list[Scores]:
        """Scores of the fast exit; NOT_SCORED where a frame could not be prepared.

        A network that gives NaN gives no score.
        """
        self._views, self._features = views, {}
        return [
            NOT_SCORED if error is not None else self._score_fast(views, row)
            for row, error in enumerate(views.errors)
        ]

    def _score_fast(self, views: Views, row: int) -> Scores:
        y, x = occupied_cells(views.count[row])
        overview = np.ascontiguousarray(views.overview[row, :, :y, :x])
        radial = torch.from_numpy(views.radial[row])[None]
        found = evidence_on_cpu(overview, int(views.bin_factor[row]))
        with torch.inference_mode():
            share = torch.from_numpy(overview[None, 2:3])
            features = self._net.features_of(found, share, radial)
            raw = self._net.fast(features)
        self._features[row] = features
        values = self._values(raw, bool(views.has_geometry[row]))
        p = values.get("p_blank", math.nan)
        if not math.isfinite(p):
            return NOT_SCORED
        return replace(NOT_SCORED, **values, uncertainty=_binary_entropy(p))

    def full(
        self,
        views: Views,
        tiles: NDArray[np.float32],
        rows: Sequence[int],
        scores: list[Scores],
    ) -> list[Scores]:
        """``scores`` with the heads of the full exit filled in for ``rows``.

        Args:
            views: the batch last given to :meth:`fast`.
            tiles: (len(rows), tiles, 2, tile_px, tile_px).
        """
        if views is not self._views:
            raise ModelError("full(): expected the batch that fast() was last called with")
        completed = list(scores)
        for number, row in enumerate(rows):
            with torch.inference_mode():
                raw = self._net.full(self._features[row], torch.from_numpy(tiles[number])[None])
            values = self._values(raw, bool(views.has_geometry[row]))
            completed[row] = replace(completed[row], **values)
        return completed

    def _values(self, raw: Mapping[str, Tensor], has_geometry: bool) -> dict[str, Any]:
        """Scores by column; ``Any`` because one keyword among them is no float."""
        values: dict[str, Any] = {}
        for head in self._card.heads:
            if head.name in raw and (has_geometry or head.name not in _NEEDS_GEOMETRY):
                value = head_values(head, raw[head.name], self._card.calibration)
                values[_COLUMNS.get(head.name, head.name)] = float(value[0])
        return values


def _binary_entropy(p: float) -> float:
    """Entropy of a yes-no answer in bits: 0 when sure, 1 at p = 0.5."""
    if p <= 0.0 or p >= 1.0:
        return 0.0
    return -(p * math.log2(p) + (1.0 - p) * math.log2(1.0 - p))

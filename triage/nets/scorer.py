"""Runs a model over prepared frames.

Each frame goes through the network alone, cut to the cells it occupies. That makes its scores
independent of its neighbours bit for bit, whatever kernels a batch size would choose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numba as nb
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import threadpool_limits

from triage.errors import ModelError
from triage.nets.evidence import evidence_on_cpu
from triage.nets.fast_exit import FastAnswer, FastExit, ring_planes
from triage.nets.full_exit import FullExit, graph_of, openvino_is_installed
from triage.nets.model import Model
from triage.nets.spot_features import spot_features, warm_up_spot_features
from triage.nets.triagenet import Evidence, Features, Head, TriageNet
from triage.records import (
    NOT_SCORED,
    CloseUps,
    Scores,
    Views,
)

__all__ = [
    "MOST_ALONE",
    "MOST_BESIDE",
    "Scorer",
    "binary_entropy",
    "compute_on_one_thread",
    "head_value",
    "head_values",
    "joined",
    "occupied_cells",
    "said_beside",
]

_CELLS_PER_STEP = 32
"""The network halves four times; sides are multiples of 32 so that all stages divide."""

_COLUMNS = {
    "blank": "p_blank",
    "ice": "p_ice",
    "bad_ice": "p_bad_ice",
    "multilattice": "p_multilattice",
}
"""Labels whose column has another name."""

MOST_BESIDE, MOST_ALONE = 5.0, 3.0
"""To so large a logit, odds of 148, an answer counts that stands beside another, and to odds of 20
blank counts by itself where others stand beside it: on frames unlike those it has learned from
each may be sure and wrong, and must not drop them alone. No simulated hit is given more by it."""

_NEEDS_GEOMETRY = ("ice", "bad_ice", "d_vis_angstrom")


def occupied_cells(count: NDArray[np.uint16]) -> tuple[int, int]:
    """(Y, X) of the corner that holds every cell with a valid pixel, in steps of 32."""
    y, x = _occupied(count)
    step = _CELLS_PER_STEP
    return -(-y // step) * step, -(-x // step) * step


@nb.njit(cache=True, nogil=True)
def _occupied(count: NDArray[np.uint16]) -> tuple[int, int]:
    bottom, right = 1, 1
    columns = np.zeros(count.shape[1], np.uint16)
    for y in range(count.shape[0]):
        row, some = count[y], np.uint16(0)
        # Without a way out, so that it runs on vectors.
        for x in range(columns.size):
            columns[x] |= row[x]
            some |= row[x]
        if some:
            bottom = y + 1
    for x in range(columns.size):
        if columns[x]:
            right = x + 1
    return bottom, right


def head_value(
    head: Head, raw: Sequence[float], calibration: Mapping[str, tuple[float, float]]
) -> float:
    """Raw outputs of a head (head.outputs,) as the quantity of the table; NaN for NaN."""
    first = float(raw[0])
    if head.kind != "regression":
        temperature, bias = calibration.get(head.name, (1.0, 0.0))
        above = [_sigmoid(float(each) / temperature + bias) for each in raw]
        if head.steps:
            above = [step * each for step, each in zip(head.steps, above, strict=True)]
        return sum(above, head.first if head.kind == "ordinal" else 0.0)
    # The order of the arguments lets a NaN through.
    if head.transform == "log":
        return math.exp(min(max(first, -7.0), 4.0))
    if head.transform == "inverse_square":
        return 1.0 / math.sqrt(min(max(first, 1e-4), 4.0))
    return first


def said_beside(
    other: Head, step: int, raw: ArrayLike, calibration: Mapping[str, tuple[float, float]]
) -> NDArray[np.float64]:
    """Logit (...) of what ``other`` says to the label of a head that it stands beside, as far as
    it counts; NaN for NaN.

    Args:
        step: which of its cumulative answers is asked; see :class:`~triage.nets.triagenet.Beside`.
        raw: (..., other.outputs).
    """
    temperature, bias = calibration.get(other.name, (1.0, 0.0))
    logit = np.asarray(raw, np.float64)[..., step] / temperature + bias
    bounded: NDArray[np.float64] = np.clip(logit, -MOST_BESIDE, MOST_BESIDE)
    return -bounded if other.kind == "ordinal" else bounded


def joined(head: Head, p: float, others: Sequence[float], weights: Sequence[float]) -> float:
    """Probability of a label by ``p`` of its own head and by what is said beside it: their logits,
    added up with the weights of the card. NaN for NaN.

    Args:
        others: logits of :func:`said_beside`, in the order of ``head.beside``.
        weights: likewise; 0 is not asked.
    """
    if not any(weights):
        return p
    logit = _logit(p)
    if head.label == "blank":
        # In this order a NaN comes through, here and below.
        logit = min(logit, MOST_ALONE)
    for other, weight in zip(others, weights, strict=True):
        if weight:
            logit += weight * min(max(other, -MOST_BESIDE), MOST_BESIDE)
    return _sigmoid(logit) if math.isfinite(logit) else math.nan


def head_values(
    head: Head, raw: NDArray[np.float64], calibration: Mapping[str, tuple[float, float]]
) -> NDArray[np.float64]:
    """:func:`head_value` of each row of (N, head.outputs): (N,)."""
    return np.array([head_value(head, row, calibration) for row in raw.tolist()], np.float64)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-min(max(x, -700.0), 700.0)))


@nb.njit(cache=True, nogil=True, fastmath={"reassoc"})
def _is_finite(view: NDArray[np.float32], height: int, width: int) -> bool:
    # The corner of (3, Y, X). What is no number less itself is none.
    nothing = np.float32(0.0)
    for c in range(view.shape[0]):
        for y in range(height):
            for x in range(width):
                nothing += view[c, y, x] - view[c, y, x]
    return bool(nothing == 0)


def compute_on_one_thread() -> None:
    """Have torch and numpy compute on the thread that asks, in this whole process.

    Frames run beside each other, a core each. A second thread for one product of small matrices
    mostly spins while it waits for the next, so that a frame costs twice; and how a sum is shared
    among threads changes its last bits.
    """
    torch.set_num_threads(1)
    threadpool_limits(1, user_api="blas")


class Scorer:
    """A model ready to score on the CPU, for one thread.

    For several threads give each a :meth:`clone`: clones share the weights and nothing that is
    written to, give the same bits, and do not wait for each other.

    Args:
        model: network and card.
        runtime: ``torch`` runs the network of the description as it stands, which is the
            reference and several times slower; ``openvino`` the compiled fast exit and the full
            exit by OpenVINO; ``auto`` the same, with the full exit by torch where OpenVINO is
            not installed.

    Raises:
        ModelError: a head that has no column.
        EnvironmentLacksError: ``openvino`` without OpenVINO.
    """

    def __init__(self, model: Model, runtime: str = "auto") -> None:
        compute_on_one_thread()
        self._model = model
        self._runtime = runtime
        for head in model.card.heads:
            if not hasattr(NOT_SCORED, _column(head)):
                raise ModelError(
                    f"model {model.card.model_id}: head {head.name!r} has no column in the "
                    "table of decisions"
                )
        self._exits: _Exits = _exits_of(model, runtime)
        self._heads = [(head, _column(head)) for head in model.card.heads]
        self._said_by_the_fast_exit = {c for head, c in self._heads if head.exit == "fast"}
        self._judge = model.net.judge.fixed()
        self._sure = model.card.p_blank_sure
        by_name = {head.name: head for head in model.card.heads}
        weights = model.card.beside_weights
        self._beside = [
            (column, head, [(by_name[each.head], each.step) for each in head.beside], of_others)
            for head, column in self._heads
            if any(of_others := weights.get(head.name, ()))
        ]
        # What the fast exit found serves the full one; the key is the batch itself.
        self._views: Views | None = None
        self._found: dict[int, Any] = {}

    @property
    def runtime(self) -> str:
        """What runs the full exit: ``torch``, ``openvino`` or ``openvino int8``."""
        return self._exits.name

    def clone(self) -> Scorer:
        """Another one of the same model, for another thread."""
        twin = Scorer.__new__(Scorer)
        twin.__dict__ |= self.__dict__
        twin._exits = self._exits.clone()
        twin._views, twin._found = None, {}
        return twin

    def warm_up(self) -> None:
        """Run once, so that the first frame pays no set-up."""
        recipe = self._model.card.recipe
        empty = np.zeros((3, recipe.grid, recipe.grid), np.float32)
        radial = np.zeros((5, recipe.sectors, recipe.radial_bins), np.float32)
        _, found = self._exits.fast(empty, recipe.bin_factors[0], radial)
        side = recipe.tile_px
        tiles = np.zeros((1, recipe.tiles, 2, side, side), np.float32)
        spots = np.zeros(self._model.net.spots_width, np.float32)
        self._exits.full(found, tiles[0], spots)
        warm_up_spot_features()
        occupied_cells(np.zeros((recipe.grid, recipe.grid), np.uint16))
        _is_finite(empty, 1, 1)

    def fast(self, views: Views) -> list[Scores]:
        """Scores of the fast exit; NOT_SCORED where a frame could not be prepared.

        A network that gives NaN gives no score.
        """
        self._views, self._found = views, {}
        return [
            NOT_SCORED if error is not None else self._score_fast(views, row)
            for row, error in enumerate(views.errors)
        ]

    def _score_fast(self, views: Views, row: int) -> Scores:
        y, x = occupied_cells(views.count[row])
        if not _is_finite(views.overview[row], y, x):
            return NOT_SCORED
        raw, self._found[row] = self._exits.fast(
            views.overview[row, :, :y, :x], int(views.bin_factor[row]), views.radial[row]
        )
        values = self._values(raw, bool(views.has_geometry[row]))
        return self._with_doubt(values, raw)

    def full(
        self,
        views: Views,
        close_ups: CloseUps,
        rows: Sequence[int],
        scores: list[Scores],
    ) -> list[Scores]:
        """``scores`` with the heads of the full exit filled in for ``rows``.

        Args:
            views: the batch last given to :meth:`fast`.
            close_ups: of the frames at ``rows``.
            rows: frames that it scored; others stay as they are.
        """
        if views is not self._views:
            raise ModelError("full(): expected the batch that fast() was last called with")
        completed = list(scores)
        spots = spot_features(close_ups, self._judge, self._model.card.spot_features)
        for number, row in enumerate(rows):
            if row not in self._found:
                continue
            raw = self._exits.full(self._found[row], close_ups.tiles[number], spots[number])
            values = self._values(raw, bool(views.has_geometry[row]))
            completed[row] = self._completed(completed[row], values, raw)
        return completed

    def _with_doubt(self, values: dict[str, Any], raw: Mapping[str, Sequence[float]]) -> Scores:
        """Scores of the fast exit with how sure they are; none where blank has no number.

        Uncertainty is the entropy of the members' mean probability: 0 when all are sure and agree,
        1 when they know nothing or half of them say the contrary of the others.
        """
        if not math.isfinite(values.get("p_blank", math.nan)):
            return NOT_SCORED
        temperature, bias = self._model.card.calibration.get("blank", (1.0, 0.0))
        members = [_sigmoid(each / temperature + bias) for each in raw["members"]]
        return Scores(
            **values,
            uncertainty=binary_entropy(sum(members) / len(members)),
            ood=raw["strangeness"][0] > 1.0,
            provisional=values["p_blank"] < self._sure,
        )

    def _completed(
        self, score: Scores, values: Mapping[str, Any], raw: Mapping[str, Sequence[float]]
    ) -> Scores:
        """What the fast exit said, with what the full one says, by column.

        The word of the fast exit stands where it is sure: such frames have no full exit when they
        are served. Elsewhere the full exit says what it has an answer to, joined with what stands
        beside it; where it gives no number for blank, the frame has no score.
        """
        if not score.provisional:
            said = self._said_by_the_fast_exit
            return replace(score, **{c: value for c, value in values.items() if c not in said})
        answers = dict(values)
        calibration = self._model.card.calibration
        for column, head, asked, weights in self._beside:
            if column in values:
                others = [
                    float(said_beside(other, step, raw[other.name], calibration))
                    if other.name in raw
                    else _logit(getattr(score, _column(other)))
                    for other, step in asked
                ]
                answers[column] = joined(head, values[column], others, weights)
        if not math.isfinite(answers["p_blank"]):
            return NOT_SCORED
        doubt = binary_entropy(answers["p_blank"])
        return replace(score, **answers, uncertainty=doubt, provisional=False)

    def _values(self, raw: Mapping[str, Sequence[float]], has_geometry: bool) -> dict[str, Any]:
        """Scores by column; ``Any`` because one keyword among them is no float."""
        calibration = self._model.card.calibration
        return {
            column: head_value(head, raw[head.name], calibration)
            for head, column in self._heads
            if head.name in raw and (has_geometry or head.label not in _NEEDS_GEOMETRY)
        }


class _Exits(Protocol):
    """Both exits of a network for one frame; ``found`` is what the first hands to the second."""

    name: str

    def fast(
        self, overview: NDArray[np.float32], bin_factor: int, radial: NDArray[np.float32]
    ) -> tuple[Mapping[str, Sequence[float]], Any]: ...

    def full(
        self, found: Any, tiles: NDArray[np.float32], spots: NDArray[np.float32]
    ) -> Mapping[str, Sequence[float]]: ...

    def clone(self) -> _Exits: ...


def _exits_of(model: Model, runtime: str) -> _Exits:
    if runtime == "torch":
        return _Reference(model.net)
    if runtime == "auto" and not openvino_is_installed():
        return _Compiled(model.net, FastExit(model.net), None, "torch")
    name = "openvino" if model.quantised is None else "openvino int8"
    return _Compiled(model.net, FastExit(model.net), graph_of(model), name)


class _Reference:
    """The network of the description, evidence included."""

    name = "torch"

    def __init__(self, net: TriageNet) -> None:
        self._net = net

    def fast(
        self, overview: NDArray[np.float32], bin_factor: int, radial: NDArray[np.float32]
    ) -> tuple[Mapping[str, Sequence[float]], Features]:
        with torch.inference_mode():
            features = self._net.features(
                torch.from_numpy(overview)[None],
                torch.from_numpy(radial)[None],
                torch.tensor([float(bin_factor)]),
            )
            return _numbers(self._net.fast(features)), features

    def full(
        self, found: Features, tiles: NDArray[np.float32], spots: NDArray[np.float32]
    ) -> Mapping[str, Sequence[float]]:
        with torch.inference_mode():
            given = torch.from_numpy(tiles)[None], torch.from_numpy(spots)[None]
            return _numbers(self._net.full(found, *given))

    def clone(self) -> _Reference:
        return self


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    evidence: Evidence
    share: NDArray[np.float32]
    radial: NDArray[np.float32]
    answer: FastAnswer


class _Compiled:
    """The compiled fast exit; the full exit by OpenVINO, or by torch without a graph."""

    def __init__(self, net: TriageNet, fast: FastExit, graph: Any, name: str) -> None:
        self._net, self._fast, self._graph, self.name = net, fast, graph, name
        self._full = None if graph is None else FullExit(graph)

    def fast(
        self, overview: NDArray[np.float32], bin_factor: int, radial: NDArray[np.float32]
    ) -> tuple[Mapping[str, Sequence[float]], _Found]:
        evidence = evidence_on_cpu(overview, bin_factor)
        answer = self._fast(evidence.counts.numpy()[0], evidence.candidates.numpy()[0], radial)
        raw = {name: each.tolist() for name, each in answer.raw.items()}
        return raw, _Found(evidence, overview[None, 2:3], radial, answer)

    def full(
        self, found: _Found, tiles: NDArray[np.float32], spots: NDArray[np.float32]
    ) -> Mapping[str, Sequence[float]]:
        counts, rings = found.answer.counts[None], ring_planes(found.radial)[None]
        if self._full is not None:
            planes = found.evidence.planes.numpy()
            answers = self._full(planes, found.share, counts, rings, tiles, spots[None])
            return {name: each.tolist() for name, each in answers.items()}
        features = Features(
            evidence=found.evidence,
            share=torch.from_numpy(found.share),
            counts=torch.from_numpy(counts),
            ring_planes=torch.from_numpy(rings),
        )
        with torch.inference_mode():
            given = torch.from_numpy(tiles)[None], torch.from_numpy(spots)[None]
            return _numbers(self._net.full(features, *given))

    def clone(self) -> _Compiled:
        return _Compiled(self._net, self._fast, self._graph, self.name)


def _numbers(raw: Mapping[str, torch.Tensor]) -> dict[str, Sequence[float]]:
    return {name: each[0].tolist() for name, each in raw.items()}


def _column(head: Head) -> str:
    return _COLUMNS.get(head.label, head.label)


def _logit(p: float) -> float:
    bounded = min(max(p, 1e-12), 1.0 - 1e-12)
    # A NaN lets no comparison hold; it has to come through.
    return math.log(bounded / (1.0 - bounded)) if math.isfinite(p) else p


def binary_entropy(p: float) -> float:
    """Entropy of a yes-no answer in bits: 0 when sure, 1 at p = 0.5."""
    if p <= 0.0 or p >= 1.0:
        return 0.0
    return -(p * math.log2(p) + (1.0 - p) * math.log2(1.0 - p))

"""The full exit on a CPU by OpenVINO: the numbers of ``TriageNet.full``.

The network is written down here once more, operation by operation, because tracing the torch
module would need a tracer at every start. Only this module imports OpenVINO; without it the torch
network serves. One thread inside an operation, and no thread is pinned: the frames run beside
each other.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from triage.errors import EnvironmentLacksError, ModelError
from triage.nets.model import BLANK_BY_SPOTS
from triage.nets.spot_marks import MARKED, SPOT_MARKS
from triage.nets.triagenet import COUNTS, FULL_MEMBERS, MAPS, RING_PLANES, SPOT_RANGE

if TYPE_CHECKING:
    import openvino
    import torch
    from torch import nn

    from triage.nets.model import Model
    from triage.nets.triagenet import TriageNet
    from triage.records import Recipe

__all__ = [
    "INPUTS",
    "IN_FLOATS",
    "FullExit",
    "full_exit_graph",
    "graph_of",
    "openvino_is_installed",
]

INPUTS = ("planes", "share", "counts", "ring_planes", "tiles", "spots")
"""What the full exit looks at, in the order of :meth:`FullExit.__call__`."""

IN_FLOATS = (
    *("fine_detectors", "coarse_detectors", "tiles_0", "tiles_1", "tiles_2"),
    *(f"rings_{member}_{layer}" for member in range(FULL_MEMBERS) for layer in range(3)),
)
"""Convolutions that stay in floats when a graph is quantised. Tiles hold counts from one to the
saturation value, and detectors steer a steep sigmoid: both lose by it more than they gain. Those
over the radial view are a hundredth of the work."""

_Floats = NDArray[np.float32]

_COMPILED_WITH = {
    "INFERENCE_NUM_THREADS": 1,
    "NUM_STREAMS": 1,
    "ENABLE_CPU_PINNING": False,
    # Never a shorter float by itself: the same scores on a processor that has bfloat16.
    "INFERENCE_PRECISION_HINT": "f32",
}


def openvino_is_installed() -> bool:
    """Whether the extra ``fast`` is there."""
    return importlib.util.find_spec("openvino") is not None


class FullExit:
    """A graph of the full exit, compiled, with the memory for one call at a time.

    One object serves one thread. Several of the same graph share nothing, because calls into one
    compiled graph wait for each other.

    Args:
        graph: of :func:`graph_of`.

    Raises:
        EnvironmentLacksError: OpenVINO is not installed.
    """

    def __init__(self, graph: openvino.Model) -> None:
        ov = _openvino()
        self._tensor = ov.Tensor
        self._compiled = _core().compile_model(graph, "CPU", _COMPILED_WITH)
        self._request = self._compiled.create_infer_request()
        self._names = [output.get_any_name() for output in self._compiled.outputs]

    def __call__(
        self,
        planes: _Floats,
        share: _Floats,
        counts: _Floats,
        ring_planes: _Floats,
        tiles: _Floats,
        spots: _Floats,
    ) -> dict[str, _Floats]:
        """Raw outputs (head.outputs,) by head; releases the GIL.

        Args:
            planes: (1, 12, Y, X), Y and X multiples of 32.
            share: (1, 1, Y, X).
            counts: (1, 105), standardised.
            ring_planes: (1, 24, bins).
            tiles: (tiles, 2, P, P).
            spots: (1, S), as ``spot_features`` gives them.
        """
        # Read where they are, so they must live until the call is over.
        given = [
            np.ascontiguousarray(x) for x in (planes, share, counts, ring_planes, tiles, spots)
        ]
        for number, values in enumerate(given):
            self._request.set_input_tensor(number, self._tensor(values, shared_memory=True))
        self._request.infer()
        return {
            name: self._request.get_output_tensor(number).data[0].copy()
            for number, name in enumerate(self._names)
        }


def graph_of(model: Model) -> openvino.Model:
    """The full exit of a model: quantised where it was, else in single precision.

    Raises:
        EnvironmentLacksError: OpenVINO is not installed.
        ModelError: this OpenVINO does not read the quantised graph.
    """
    if model.quantised is None:
        return full_exit_graph(model.net, model.card.recipe)
    try:
        return _core().read_model(model.quantised.graph, model.quantised.weights)
    except RuntimeError as err:
        raise ModelError(
            f"model {model.card.model_id}: OpenVINO does not read its quantised graph: "
            f"{str(err)[:200]}; quantise it again with 'triage quantize'"
        ) from err


def full_exit_graph(net: TriageNet, recipe: Recipe) -> openvino.Model:
    """The full exit with the weights of ``net`` in single precision, for frames of any size.

    Raises:
        EnvironmentLacksError: OpenVINO is not installed.
    """
    return _Graph(net, recipe).model


@functools.cache
def _core() -> Any:
    """The one OpenVINO of this process, never closed.

    On processors with AMX its plug-in gives the thread that opens it another stack for signals,
    and unmaps that stack when the last user goes, in whatever thread. A signal that comes to the
    first thread after that kills the process or overwrites what is mapped there now.
    """
    return _openvino().Core()


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as err:
        raise EnvironmentLacksError(
            f"[model] runtime = 'openvino': {err}; expected OpenVINO; install the extra 'fast', "
            "or choose runtime = 'auto'"
        ) from err
    return openvino


class _Graph:
    """Builds the graph of ``TriageNet.full``, whose comments hold here too."""

    def __init__(self, net: TriageNet, recipe: Recipe) -> None:
        ov = _openvino()
        from openvino import opset15 as op

        self._op: Any = op
        side = recipe.tile_px
        # Without convolutions nothing depends on how many tiles there are.
        tiles = recipe.tiles if net.convolutions else -1
        shapes: Mapping[str, list[int]] = {
            "planes": [1, MAPS + 1, -1, -1],
            "share": [1, 1, -1, -1],
            "counts": [1, COUNTS],
            "ring_planes": [1, RING_PLANES, recipe.radial_bins],
            "tiles": [tiles, 2, side, side],
            "spots": [1, net.spots_width],
        }
        given = {
            name: op.parameter(ov.PartialShape(shapes[name]), np.float32, name=name)
            for name in INPUTS
        }
        for name, parameter in given.items():
            parameter.output(0).set_names({name})
        whole, marks = op.variadic_split(
            given["spots"], self._axes([1]), self._axes([net.spots_mean.numel(), -1])
        ).outputs()
        marks = op.reshape(marks, self._axes([MARKED, len(SPOT_MARKS)]), False)
        parts = {
            "counts": [given["counts"]],
            "seen": self._seen(net, given, side),
            "spots": [self._ranks(net.among_hits, whole)],
        }
        each: dict[str, list[Any]] = {head.name: [] for head in net.full_heads}
        for number, member in enumerate(cast("Any", net.full_members)):
            if member.rings is not None:
                parts["rings"] = [self._rings(member.rings, given["ring_planes"], number)]
            if member.kinds is not None:
                parts["kinds"] = [self._kinds(member.kinds, marks)]
            for name, layers in member.outs.items():
                read = op.concat([x for part in member.reads[name] for x in parts[part]], 1)
                inner = op.relu(self._linear(read, layers.first))
                inner = op.relu(self._linear(inner, layers.second))
                each[name].append(self._linear(inner, layers.last))
        answers = [self._mean(name, of_members) for name, of_members in each.items()]
        if net.by_spots:
            answers.append(self._blank(net, given["counts"], whole, marks))
        self.model: openvino.Model = ov.Model(answers, list(given.values()), "full exit")

    def _kinds(self, kinds: Any, marks: Any) -> Any:
        """The spots (MARKED, marks) counted by kind: (1, 2 * KINDS)."""
        op = self._op
        *hidden, last = kinds.kind
        inner = marks
        for layer in hidden[::2]:
            inner = op.relu(self._linear(inner, layer))
        valid = op.gather(marks, self._axes([len(SPOT_MARKS) - 1]), op.constant(np.int64(1)))
        found = op.multiply(op.sigmoid(self._linear(inner, last)), valid)
        cubed = op.multiply(op.multiply(found, found), found)
        counted = [op.reduce_sum(each, self._axes([0]), True) for each in (found, cubed)]
        # Not a sum, which would be quantised: by this frames are dropped.
        return op.log(op.subtract(op.concat(counted, 1), self._number(-1.0)))

    def _rings(self, layers: Any, planes: Any, member: int) -> Any:
        """Planes (1, RING_PLANES, bins) as one member reads them: (1, RINGS)."""
        op, x = self._op, planes
        for number, layer in enumerate((layers.first, layers.second, layers.third)):
            bias = op.constant(_values(layer.bias).reshape(1, -1, 1))
            (stride,), (padding,) = layer.stride, layer.padding
            weight = op.constant(_values(layer.weight))
            convolved = op.convolution(x, weight, [stride], [padding], [padding], [1])
            convolved.set_friendly_name(f"rings_{member}_{number}")
            x = op.relu(op.add(convolved, bias))
        flat = op.reshape(x, self._axes([1, -1]), False)
        return op.relu(self._linear(flat, layers.flat))

    def _ranks(self, ranks: Any, numbers: Any) -> Any:
        """Numbers (1, F) as ranks: what each step adds, over all steps."""
        op = self._op
        knots, steepness, rises = (op.constant(each) for each in ranks.steps())
        column = op.unsqueeze(op.squeeze(numbers, self._axes([0])), self._axes([1]))  # (F, 1)
        part = op.clamp(op.multiply(op.subtract(column, knots), steepness), 0.0, 1.0)
        # Not a sum of two, which would be quantised.
        lowest = op.constant(-_values(ranks.ranks)[:, 0])
        risen = op.reduce_sum(op.multiply(part, rises), self._axes([1]), False)
        return op.unsqueeze(op.subtract(risen, lowest), self._axes([0]))

    def _blank(self, net: TriageNet, counts: Any, whole: Any, marks: Any) -> Any:
        """The mean of the members of blank by spots."""
        op = self._op
        whole = op.divide(
            op.subtract(whole, op.constant(_values(net.spots_mean)[None])),
            op.constant(_values(net.spots_scale)[None]),
        )
        x = op.concat([counts, op.clamp(whole, -SPOT_RANGE, SPOT_RANGE)], 1)
        answers = []
        for each in net.by_spots:
            member = cast("Any", each)
            first, _, _, second, _, last = member.answer
            read = op.concat([x, self._kinds(member.kinds, marks)], 1)
            inner = op.relu(self._linear(op.relu(self._linear(read, first)), second))
            answers.append(self._linear(inner, last))
        return self._mean(BLANK_BY_SPOTS, answers)

    def _mean(self, name: str, answers: list[Any]) -> Any:
        """The mean of the members' answers (1, outputs) to a head."""
        op = self._op
        # Not a sum of pairs, which would be quantised: by this frames are dropped.
        stacked = op.concat([op.unsqueeze(each, self._axes([0])) for each in answers], 0)
        total = op.reduce_sum(stacked, self._axes([0]), False)
        mean = op.multiply(total, self._number(1.0 / len(answers)))
        mean.output(0).set_names({name})
        return mean

    def _seen(self, net: TriageNet, given: Mapping[str, Any], side: int) -> list[Any]:
        """What the convolutions see; nothing without them."""
        if not net.convolutions:
            return []
        pixels = (side // 2 ** len(net.tile_stages)) ** 2
        return [
            *self._convolved(net, given["planes"], given["share"]),
            *self._tiled(net, given["tiles"], pixels=pixels),
        ]

    def _convolved(self, net: TriageNet, planes: Any, share: Any) -> list[Any]:
        op = self._op
        x, inside, fine = op.concat([planes, share], 1), None, None
        for number, stage in enumerate(net.stages):
            share = op.avg_pool(share, [2, 2], [0, 0], [0, 0], [2, 2], False, "floor")
            inside = op.convert(op.greater(share, self._number(0.0)), "f32")
            x = op.multiply(op.relu(self._convolution(x, cast("Any", stage).conv)), inside)
            if number == 1:
                fine = self._count(
                    self._convolution(x, net.fine_detectors, "fine_detectors"), inside
                )
        block = net.block
        inner = op.multiply(op.relu(self._convolution(x, block.first)), inside)
        x = op.multiply(op.add(x, self._convolution(inner, block.second)), inside)
        weight = op.maximum(self._sum(share, [2, 3]), self._number(1e-6))
        mean = op.divide(self._sum(op.multiply(x, share), [2, 3]), weight)
        outside = op.multiply(self._number(1e4), op.subtract(self._number(1.0), inside))
        largest = op.reduce_max(op.subtract(x, outside), self._axes([2, 3]), False)
        coarse = self._count(self._convolution(x, net.coarse_detectors, "coarse_detectors"), inside)
        return [mean, op.maximum(largest, self._number(-1e3)), fine, coarse]

    def _tiled(self, net: TriageNet, tiles: Any, pixels: int) -> list[Any]:
        op = self._op
        valid = op.gather(tiles, op.constant(np.int64(1)), op.constant(np.int64(1)))
        valid = op.unsqueeze(op.reduce_max(valid, self._axes([1, 2]), False), self._axes([1]))
        used = op.convert(op.greater(valid, self._number(0.0)), "f32")  # (tiles, 1)
        x = tiles
        for number, layer in enumerate(net.tile_stages):
            x = op.relu(self._convolution(x, cast("nn.Conv2d", layer), f"tiles_{number}"))
        mean = op.multiply(self._sum(x, [2, 3]), self._number(1.0 / pixels))
        each = op.concat([mean, op.reduce_max(x, self._axes([2, 3]), False)], 1)
        each = op.multiply(each, used)
        first = self._axes([0])
        number = op.maximum(op.reduce_sum(used, first, True), self._number(1.0))
        return [
            op.divide(op.reduce_sum(each, first, True), number),
            op.reduce_max(each, first, True),
        ]

    def _count(self, evidence: Any, inside: Any) -> Any:
        op = self._op
        steep = op.subtract(op.multiply(evidence, self._number(4.0)), self._number(5.0))
        there = self._sum(op.multiply(op.sigmoid(steep), inside), [2, 3])
        return op.log(op.add(there, self._number(1.0)))

    def _convolution(self, x: Any, layer: nn.Conv2d, name: str = "") -> Any:
        op = self._op
        bias = _values(cast("torch.Tensor", layer.bias)).reshape(1, -1, 1, 1)
        stride, padding = list(layer.stride), [int(each) for each in layer.padding]
        weight = op.constant(_values(layer.weight))
        convolved = op.convolution(x, weight, stride, padding, padding, [1, 1])
        if name:
            convolved.set_friendly_name(name)
        return op.add(convolved, op.constant(bias))

    def _linear(self, x: Any, layer: nn.Linear) -> Any:
        op = self._op
        weight, bias = op.constant(_values(layer.weight)), op.constant(_values(layer.bias)[None])
        return op.add(op.matmul(x, weight, False, True), bias)

    def _sum(self, x: Any, axes: list[int]) -> Any:
        return self._op.reduce_sum(x, self._axes(axes), False)

    def _axes(self, axes: list[int]) -> Any:
        return self._op.constant(np.array(axes, np.int64))

    def _number(self, value: float) -> Any:
        return self._op.constant(np.float32(value))


def _values(tensor: torch.Tensor) -> _Floats:
    values: _Floats = tensor.detach().float().cpu().contiguous().numpy()
    return values

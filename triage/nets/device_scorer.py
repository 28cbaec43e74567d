"""Runs a model on a CUDA device, over views that the backend left there.

Always on the same number of frames, the missing ones empty: which kernels a library takes depends
on the size of a batch and not on what is in it, so a frame's scores do not depend on its
neighbours. The one size also lets each exit be captured as a CUDA graph, and hundreds of
small kernels are then one launch.

In single precision. Half precision would serve the learned layers alone, which are the smaller
part beside the fixed maps: these need the range. On 48 synthetic frames it moved p_blank by up to
0.001 and no verdict, which is little to lose for next to nothing to gain.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from triage.errors import DeviceError
from triage.nets.model import Model
from triage.nets.scorer import Scorer
from triage.nets.spot_features import spot_features, warm_up_spot_features
from triage.nets.triagenet import MEMBERS
from triage.records import NOT_SCORED, CloseUps, Scores, Views

__all__ = ["DeviceScorer", "scorer_for", "unavailable"]

_ROWS = 16
"""Frames that the network takes at a time."""
_EMPTY_FACTOR = 2.0
_WARM_UPS = 3
"""Runs before a capture: libraries choose their kernels and allocate in the first ones."""


def unavailable() -> str | None:
    """Why torch can use no CUDA device, or None when it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def scorer_for(model: Model, runtime: str, *, on_device: bool) -> Scorer:
    """What scores the views of a backend: on its device where torch can, else on the CPU.

    Args:
        model: network and card.
        runtime: as of :class:`triage.nets.scorer.Scorer`; only ``auto`` leaves the CPU.
        on_device: whether the backend's views lie on a CUDA device.
    """
    if on_device and runtime == "auto" and unavailable() is None:
        return DeviceScorer(model)
    return Scorer(model, runtime)


class DeviceScorer(Scorer):
    """A scorer whose network runs on a device; scores as :class:`Scorer` gives, to rounding.

    What comes back to the host is the raw outputs, some dozen numbers a frame. Views without
    :attr:`triage.records.Views.on_device` are copied there.

    Args:
        model: network and card.
        device: ``cuda``, or ``cpu`` for the same without graphs.

    Raises:
        ModelError: a head that has no column.
        DeviceError: from any method, the device failed.
    """

    def __init__(self, model: Model, device: str = "cuda") -> None:
        super().__init__(model, "torch")
        self._device = torch.device(device)
        self._net = copy.deepcopy(model.net).to(self._device)
        fast = [head for head in model.card.heads if head.exit == "fast"]
        full = [head for head in model.card.heads if head.exit != "fast"]
        self._fast_outputs = [(head.name, head.outputs) for head in fast]
        self._fast_outputs += [("members", MEMBERS), ("strangeness", 1)]
        self._full_outputs = [(head.name, head.outputs) for head in full]
        self._fast_exit: _Captured | None = None
        self._full_exit: _Captured | None = None

    @property
    def runtime(self) -> str:
        """What runs the full exit."""
        return f"torch {self._device.type}"

    def clone(self) -> DeviceScorer:
        """Another one of the same model, for another thread."""
        return DeviceScorer(self._model, self._device.type)

    def warm_up(self) -> None:
        """Capture both exits, so that the first frame pays no set-up."""
        self._exits_on_device()
        warm_up_spot_features()

    def fast(self, views: Views) -> list[Scores]:
        """Scores of the fast exit; NOT_SCORED where a frame could not be prepared.

        A network that gives NaN gives no score.
        """
        with self._guarded(), self._stream_of(views):
            exit_, _ = self._exits_on_device()
            raw = exit_(self._tensors(views, None))
        # Read behind the scores: reading waits for the device.
        return [
            NOT_SCORED if error is not None else self._fast_scores(views, row, raw[row])
            for row, error in enumerate(views.errors)
        ]

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
        with self._guarded(), self._stream_of(views):
            _, exit_ = self._exits_on_device()
            named = self._model.card.spot_features
            given = close_ups.tiles, spot_features(close_ups, self._judge, named)
            close = [torch.from_numpy(array) for array in given]
            raw = exit_((*self._tensors(views, list(rows)), *close))
        completed = list(scores)
        for number, row in enumerate(rows):
            if not math.isfinite(scores[row].p_blank):
                continue
            outputs = _by_head(self._full_outputs, raw[number])
            values = self._values(outputs, bool(views.has_geometry[row]))
            completed[row] = self._completed(completed[row], values, outputs)
        return completed

    def _fast_scores(self, views: Views, row: int, raw: list[float]) -> Scores:
        outputs = _by_head(self._fast_outputs, raw)
        values = self._values(outputs, bool(views.has_geometry[row]))
        return self._with_doubt(values, outputs)

    def _tensors(self, views: Views, rows: list[int] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Overview, radial view and bin factor of ``rows``, or of all frames."""
        if views.on_device is not None:
            there = views.on_device
            found = [from_dlpack(a) for a in (there.overview, there.radial, there.bin_factor)]
        else:
            factor = np.maximum(views.bin_factor, _EMPTY_FACTOR).astype(np.float32)
            found = [torch.from_numpy(a) for a in (views.overview, views.radial, factor)]
        if rows is not None:
            found = [each[torch.tensor(rows, device=each.device)] for each in found]
        overview, radial, factor_ = found
        return overview, radial, factor_

    def _stream_of(self, views: Views) -> AbstractContextManager[Any]:
        """The stream on which the views are made: what is queued there need not wait for them."""
        if self._device.type != "cuda" or views.on_device is None:
            return nullcontext()
        stream = torch.cuda.ExternalStream(views.on_device.stream)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(stream)

    def _exits_on_device(self) -> tuple[_Captured, _Captured]:
        if self._fast_exit is None or self._full_exit is None:
            r, net = self._model.card.recipe, self._net
            overview = (3, r.grid, r.grid)
            shapes = [overview, (5, r.sectors, r.radial_bins), ()]

            def fast(overview: Tensor, radial: Tensor, factor: Tensor) -> Tensor:
                raw = net.fast(net.features(overview, radial, factor))
                return torch.cat([raw[name] for name, _ in self._fast_outputs], 1)

            def full(
                overview: Tensor, radial: Tensor, factor: Tensor, tiles: Tensor, spots: Tensor
            ) -> Tensor:
                raw = net.full(net.features(overview, radial, factor), tiles, spots)
                return torch.cat([raw[name] for name, _ in self._full_outputs], 1)

            with self._guarded():
                self._fast_exit = _Captured(fast, shapes, self._device)
                tiles = (r.tiles, 2, r.tile_px, r.tile_px)
                spots = (net.spots_width,)
                self._full_exit = _Captured(full, [*shapes, tiles, spots], self._device)
        return self._fast_exit, self._full_exit

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turn the device's failures into DeviceError."""
        try:
            yield
        except RuntimeError as err:  # what torch raises for whatever the device reports
            raise DeviceError(
                f"{self._device} device, scoring: {err}; expected a working device with free "
                "memory; frames go on unscored until the process is started again"
            ) from err


class _Captured:
    """A function of tensors of fixed shapes; on CUDA captured as a graph.

    Args:
        function: of one tensor for each shape, the frame first; gives (frames, outputs).
        shapes: of one frame.
        device: where it runs.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        shapes: Sequence[tuple[int, ...]],
        device: torch.device,
    ) -> None:
        self._function = function
        self._inputs = [torch.zeros((_ROWS, *shape), device=device) for shape in shapes]
        self._factor = shapes.index(())
        self._clear(0)
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._capture()

    def __call__(self, inputs: Sequence[Tensor]) -> list[list[float]]:
        """The outputs for any number of frames, on the host."""
        n = len(inputs[0])
        outputs = []
        with torch.inference_mode():
            for first in range(0, n, _ROWS):
                rows = min(_ROWS, n - first)
                for held, given in zip(self._inputs, inputs, strict=True):
                    held[:rows].copy_(given[first : first + rows], non_blocking=True)
                self._clear(rows)
                outputs.append(self._run()[:rows].clone())
            if not outputs:
                return []
            return torch.cat(outputs).cpu().tolist()

    def _clear(self, first: int) -> None:
        """Empty the rows from ``first`` on."""
        for held in self._inputs:
            held[first:].zero_()
        self._inputs[self._factor][first:].fill_(_EMPTY_FACTOR)

    def _run(self) -> Tensor:
        if self._graph is None:
            return self._function(*self._inputs)
        self._graph.replay()
        return self._output

    def _capture(self) -> None:
        # The convolutions in full single precision: kernels are chosen here, once and for all.
        exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), exact:
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UPS):
                    self._function(*self._inputs)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._output = self._function(*self._inputs)
            self._graph = graph
        # The first replay may come on another stream.
        torch.cuda.synchronize()


def _by_head(
    outputs: Sequence[tuple[str, int]], raw: Sequence[float]
) -> dict[str, Sequence[float]]:
    """One frame's outputs, split by head."""
    found = {}
    at = 0
    for name, width in outputs:
        found[name] = raw[at : at + width]
        at += width
    return found

"""The full exit in 8-bit integers, calibrated on labelled frames.

The convolutions over the overview are quantised and nothing else: they are nearly all of the
work. The fast exit and blank by spots are not, because by them above all frames are dropped; what
quality has to say in that reads the convolutions.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triage.backends import open_backend
from triage.errors import EnvironmentLacksError, ModelError, UnreadableFile
from triage.machine import versions
from triage.nets.evidence import evidence_on_cpu
from triage.nets.fast_exit import FastExit, ring_planes
from triage.nets.full_exit import IN_FLOATS, INPUTS, full_exit_graph
from triage.nets.model import Model, Quantised, save_quantised
from triage.nets.scorer import occupied_cells
from triage.nets.spot_features import spot_features
from triage.training.dataset import (
    data_hash,
    frames_of,
    labels_and_family,
    shard_paths,
    shards_made_with,
)

__all__ = ["quantise"]

_FRAMES_PER_SHARD = 2

_LEFT_IN_FLOATS = (
    *("AvgPool", "Multiply", "Subtract", "Divide", "Maximum", "Sigmoid", "Log"),
    *("ReduceSum", "ReduceMax", "Gather", "MatMul"),
)
"""What would be quantised along the way and gains nothing: masks, means and dense layers."""


def quantise(
    model: Model,
    shards: Path,
    out: Path,
    *,
    frames: int = 256,
    command: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Quantise the full exit of ``model`` and write it into ``out``, where the model lies.

    Args:
        shards: labelled frames that the ranges of the activations are taken from; none that the
            result will be judged by.
        frames: how many of them, spread over all shards; blank frames, of which the convolutions
            have nothing to say, are left out.

    Raises:
        ModelError: the model has no convolutions, and nothing else would gain by it.
        EnvironmentLacksError: nncf or OpenVINO is missing.
        UnreadableFile: no shards, or only blank frames in them.
    """
    if not model.net.convolutions:
        raise ModelError(
            f"model {model.card.model_id}: its full exit has no convolutions; expected some to "
            "quantise: serve it as it is, or train one with --convolution-epochs"
        )
    nncf = _nncf()
    graph = full_exit_graph(model.net, model.card.recipe)
    paths = shard_paths(shards)
    say(f"preparing {frames} frames of {len(paths)} shards")
    given = list(_calibration(model, paths, frames))
    if not given:
        raise UnreadableFile(
            f"{shards}: no frame that is not blank; expected hits to calibrate the full exit with"
        )
    say(f"quantising with {len(given)} frames")
    quantised = nncf.quantize(
        graph,
        nncf.Dataset(given),
        subset_size=len(given),
        ignored_scope=nncf.IgnoredScope(
            names=list(IN_FLOATS), types=list(_LEFT_IN_FLOATS), validate=False
        ),
    )
    save_quantised(
        out,
        _as_bytes(quantised),
        model.card,
        {
            "command": command,
            "calibration": {
                "data_hash": data_hash(paths),
                "frames": len(given),
                "shards": shards_made_with(shards),
            },
            "versions": {**versions(), "nncf": nncf.__version__},
        },
    )


def _nncf() -> Any:
    # Without this nncf reports its use to its makers over the network.
    os.environ.setdefault("NNCF_CI", "1")
    try:
        import nncf
    except ImportError as err:
        raise EnvironmentLacksError(
            f"quantize: {err}; expected nncf; install the extra 'train'"
        ) from err
    nncf.set_log_level(logging.WARNING)
    return nncf


def _calibration(
    model: Model, paths: list[Path], wanted: int
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """What the full exit looks at in ``wanted`` frames that are not blank."""
    backend = open_backend("cpu", model.card.recipe)
    fast_exit, judge = FastExit(model.net), model.net.judge.fixed()
    shards_used = -(-wanted // _FRAMES_PER_SHARD)
    for number in np.unique(np.linspace(0, len(paths) - 1, shards_used).astype(int)):
        labels, _ = labels_and_family(paths[number])
        rows = np.flatnonzero(labels["blank"] != 1.0)[:_FRAMES_PER_SHARD]
        chosen = frames_of(paths[number])
        batch = [chosen[row] for row in rows]
        if not batch:
            continue
        views = backend.prepare(batch)
        close_ups = backend.close_ups(batch, views, range(len(batch)))
        spots = spot_features(close_ups, judge, model.card.spot_features)
        for i in range(len(batch)):
            y, x = occupied_cells(views.count[i])
            overview = np.ascontiguousarray(views.overview[i, :, :y, :x])
            found = evidence_on_cpu(overview, int(views.bin_factor[i]))
            answer = fast_exit(
                found.counts.numpy()[0], found.candidates.numpy()[0], views.radial[i]
            )
            values = (
                found.planes.numpy(),
                overview[None, 2:3],
                answer.counts[None],
                ring_planes(views.radial[i])[None],
                close_ups.tiles[i],
                spots[i : i + 1],
            )
            yield {
                name: np.ascontiguousarray(value)
                for name, value in zip(INPUTS, values, strict=True)
            }


def _as_bytes(graph: Any) -> Quantised:
    """A graph as OpenVINO writes it to disk."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.xml"
        openvino.save_model(graph, path, compress_to_fp16=False)
        return Quantised(graph=path.read_bytes(), weights=path.with_suffix(".bin").read_bytes())

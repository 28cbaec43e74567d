"""The full exit in 8-bit integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from simulators.diffraction import write_shards
from triage.backends import open_backend
from triage.nets.model import load_model, save_model
from triage.nets.scorer import Scorer
from triage.nets.triagenet import TriageNet
from triage.records import Recipe
from triage.training.dataset import frames_of, shard_paths
from triage.training.quantise import quantise
from triage.training.train import HEADS

pytest.importorskip("nncf", reason="the extra 'train' is not installed")


def test_a_quantised_model_scores_almost_as_before(tmp_path: Path) -> None:
    """Convolutions in integers: near the floats, not equal to them; blank, and ice by the fast
    exit, to the bit."""
    write_shards(tmp_path, frames=24, seed=6, frames_per_shard=2, progress=False)
    torch.manual_seed(4)
    net = TriageNet(HEADS, radial_bins=Recipe().radial_bins).eval()
    # As it begins, a signal shrinks with every convolution.
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data *= 2.0
    folder = tmp_path / "model"
    save_model(folder, net, "test", {"recipe": Recipe(), "thresholds": {"p_blank_veto": 0.5}})
    # All of them: what a range was not fixed on is cut off at its ends.
    quantise(load_model(folder), tmp_path, folder, frames=24)

    integers, floats = Scorer(load_model(folder)), Scorer(load_model(folder, quantised=False))
    assert integers.runtime == "openvino int8"
    batch = [frame for path in shard_paths(tmp_path) for frame in frames_of(path)][:12]
    backend = open_backend("cpu")
    views = backend.prepare(batch)
    rows = range(len(batch))
    close_ups = backend.close_ups(batch, views, rows)
    fast, fast_expected = integers.fast(views), floats.fast(views)
    assert [repr(s.p_ice) for s in fast] == [repr(s.p_ice) for s in fast_expected]
    found = integers.full(views, close_ups, rows, fast)
    expected = floats.full(views, close_ups, rows, fast_expected)
    assert [repr(s.p_blank) for s in found] == [repr(s.p_blank) for s in expected]
    change = np.abs([a.p_ice - b.p_ice for a, b in zip(found, expected, strict=True)])
    # Of weights at random, which now and then hang by one number, a single frame says little.
    assert np.median(change) < 0.01
    assert change.max() < 0.2
    quality = np.array([[s.quality for s in found], [s.quality for s in expected]])
    assert not np.array_equal(quality[0], quality[1])
    assert np.abs(quality[0] - quality[1]).max() < 0.1

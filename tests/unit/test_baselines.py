"""What a model is measured against."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from simulators.diffraction import write_shards
from triage.training.baselines import (
    BASELINES,
    ImageNetwork,
    _ke_image,
    _ke_network,
    _reduced,
    _vgg16,
    _vgg_image,
)
from triage.training.dataset import shard_paths


def parameters(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_networks_have_the_size_of_their_papers() -> None:
    """Ke et al.: about 7 thousand. VGG16 has 138,357,544 for three colours and 1000 classes: less
    2 * 64 * 9 for the colours and 4097 * 996 for the classes with four answers."""
    assert 6_500 < parameters(_ke_network(4)) < 8_000
    with torch.device("meta"):
        assert parameters(_vgg16(4)) == 138_357_544 - 2 * 64 * 9 - 4097 * 996


def test_cells_hold_sums_of_valid_pixels() -> None:
    """5 x 4 pixels in 3 x 3 cells of two: a masked pixel adds to neither sum nor number."""
    counts = np.arange(20).reshape(5, 4)
    valid = np.ones((5, 4), bool)
    valid[0, 1] = False
    sums, pixels = _reduced(counts, valid, 3)
    assert sums.tolist() == [
        [0 + 4 + 5, 2 + 3 + 6 + 7, 0],
        [8 + 9 + 12 + 13, 10 + 11 + 14 + 15, 0],
        [16 + 17, 18 + 19, 0],
    ]
    assert pixels.tolist() == [[3, 4, 0], [4, 4, 0], [2, 2, 0]]


def test_eight_bits_lose_what_is_weak() -> None:
    """A mean of 0.4 becomes nothing, 300 becomes 255."""
    counts = np.zeros((1024, 1024))
    counts[0, 0], counts[10, 10] = 1.6, 1200.0
    image = _vgg_image(counts, np.ones(counts.shape, bool))
    assert image.shape == (512, 512)
    assert image[0, 0] == 0.0
    assert image[5, 5] == 1.0


def test_local_contrast_does_not_know_the_brightness() -> None:
    """A spot on a background of 10 gives what one ten times as bright on 100 gives."""
    rng = np.random.default_rng(0)
    counts = rng.random((720, 720)) * 10.0
    counts[300, 300] = 500.0
    valid = np.ones(counts.shape, bool)
    dim, bright = _ke_image(counts, valid), _ke_image(10.0 * counts, valid)
    assert np.abs(dim.astype(float) - bright.astype(float)).max() < 0.1
    assert np.unravel_index(dim.argmax(), dim.shape) == (300, 300)


def test_an_image_network_answers_for_the_frames_it_is_asked_about(tmp_path: Path) -> None:
    """Three of six frames of two shards, four heads: finite, and the same when asked alone."""
    write_shards(tmp_path, frames=6, seed=3, frames_per_shard=3, progress=False)
    paths = shard_paths(tmp_path)
    network = ImageNetwork(
        name="small",
        built=_ke_network,
        seen=_ke_image,
        seconds=60.0,
        frames=4,
        epochs=1,
        batch_size=2,
        learning_rate=1e-3,
    )
    said: list[str] = []

    def answers(rows: list[int]) -> dict[str, np.ndarray]:
        chosen = np.array(rows)
        return network.score(paths, paths, rows=chosen, threads=1, say=said.append)

    three, one = answers([1, 3, 5]), answers([3])
    assert set(three) == {"blank", "ice", "bad_ice", "multilattice"}
    for name, each in three.items():
        assert each.shape == (3,)
        assert np.isfinite(each).all()
        assert one[name][0] == pytest.approx(each[1], rel=1e-4, abs=1e-5)
    assert network.score([], paths, rows=None, threads=1, say=said.append) == {}
    assert "steps" in said[0]


def test_baselines_are_named_once_and_answer_for_known_heads() -> None:
    """Each name is its own, and each answers for labels that shards have."""
    names = [each.name for each in BASELINES]
    assert len(set(names)) == len(names)
    known = {"blank", "ice", "bad_ice", "multilattice"}
    assert all(set(each.heads) <= known for each in BASELINES)

"""Labelled shards, prepared by the serving backend."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from triage.backends import open_backend
from triage.errors import UnreadableFile
from triage.nets.scorer import occupied_cells
from triage.records import Frame, Geometry, Recipe, Series, Views

__all__ = ["Example", "data_hash", "load_examples", "shard_paths"]

_CHUNK = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """One prepared frame with its labels.

    Attributes:
        overview: (3, Y, X) float16, cut to the occupied cells.
        radial: (3, sectors, bins) float32.
        bin_factor: pixels per cell side.
        tiles: (tiles, 2, P, P) float16; None where the full exit has nothing to learn.
        labels: by name, NaN where undefined.
    """

    overview: NDArray[np.float16]
    radial: NDArray[np.float32]
    bin_factor: int
    tiles: NDArray[np.float16] | None
    labels: dict[str, float]


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a folder in order.

    Raises:
        UnreadableFile: there are none.
    """
    paths = sorted(folder.glob("shard_*.h5"))
    if not paths:
        raise UnreadableFile(
            f"{folder}: no shard_*.h5; expected labelled shards; make some with 'triage-sim frames'"
        )
    return paths


def data_hash(paths: Sequence[Path]) -> str:
    """16 hex digits over pixels' chunks and labels, in order: what a model was trained on."""
    import h5py

    digest = hashlib.sha256()
    for path in paths:
        with h5py.File(path) as shard:
            data = shard["data"]
            for i in range(data.shape[0]):
                digest.update(data.id.read_direct_chunk((i, 0, 0))[1])
            for name in sorted(shard["labels"]):
                digest.update(name.encode())
                digest.update(shard["labels"][name][()].tobytes())
    return digest.hexdigest()[:16]


def load_examples(
    paths: Sequence[Path], recipe: Recipe, *, coarser_share: float = 0.0, seed: int = 0
) -> Iterator[Example]:
    """Every frame of the shards, prepared.

    Args:
        coarser_share: share of frames that are binned twice as far as their size asks for: the
            statistics of large detectors, learned from small frames.
        seed: of that choice.
    """
    backend = open_backend("cpu", recipe)
    coarser = open_backend("cpu", replace(recipe, bin_factors=recipe.bin_factors[1:]))
    coarsest = open_backend("cpu", replace(recipe, bin_factors=recipe.bin_factors[2:]))
    rng = np.random.default_rng(seed)
    for path in paths:
        frames, labels = _read_shard(path)
        choice = rng.random(len(frames))
        levels = np.where(choice < 0.25 * coarser_share, 2, np.where(choice < coarser_share, 1, 0))
        for first in range(0, len(frames), _CHUNK):
            for level, chosen in enumerate((backend, coarser, coarsest)):
                rows = [
                    i for i in range(first, min(first + _CHUNK, len(frames))) if levels[i] == level
                ]
                if not rows:
                    continue
                batch = [frames[i] for i in rows]
                views = chosen.prepare(batch)
                full = [j for j, i in enumerate(rows) if labels[i].get("blank") != 1.0]
                tiles = dict(zip(full, chosen.tiles(batch, views, full), strict=True))
                for j, i in enumerate(rows):
                    yield _example(views, j, tiles.get(j), labels[i])


def _example(
    views: Views, row: int, tiles: NDArray[np.float32] | None, labels: dict[str, float]
) -> Example:
    error = views.errors[row]
    if error is not None:
        raise error
    y, x = occupied_cells(views.count[row])
    return Example(
        overview=views.overview[row, :, :y, :x].astype(np.float16),
        radial=views.radial[row],
        bin_factor=int(views.bin_factor[row]),
        tiles=None if tiles is None else np.minimum(tiles, 6e4).astype(np.float16),
        labels=labels,
    )


def _read_shard(path: Path) -> tuple[list[Frame], list[dict[str, float]]]:
    """The frames of a shard, still compressed, and their labels."""
    import h5py

    try:
        with h5py.File(path) as shard:
            data = shard["data"]
            mask = shard["mask"][()]
            geometry = {name: shard["geometry"][name][()] for name in shard["geometry"]}
            labels = {name: shard["labels"][name][()] for name in shard["labels"]}
            saturation = int(shard.attrs["saturation_value"])
            chunks = [data.id.read_direct_chunk((i, 0, 0))[1] for i in range(data.shape[0])]
            dtype, shape = data.dtype, (int(data.shape[1]), int(data.shape[2]))
    except (OSError, KeyError, RuntimeError) as err:
        raise UnreadableFile(
            f"shard {path}: {err}; expected data, mask, geometry and labels; remove the file "
            "and make it again"
        ) from err
    frames = [
        Frame(
            series=Series(
                pixel_mask=mask,
                saturation_value=saturation,
                geometry=Geometry.from_values(**{k: float(v[i]) for k, v in geometry.items()}),
            ),
            image_id=i,
            encoding="bslz4",
            dtype=dtype,
            shape=shape,
            payload=chunk,
        )
        for i, chunk in enumerate(chunks)
    ]
    rows = [{name: float(values[i]) for name, values in labels.items()} for i in range(len(chunks))]
    return frames, rows

"""Labelled shards, prepared by the serving backend."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from msgspec import structs
from numpy.typing import NDArray

from triage.audit.drift import inputs_of
from triage.backends import open_backend
from triage.backends.recipe import measured
from triage.errors import UnreadableFile
from triage.nets.evidence import evidence_on_cpu
from triage.nets.scorer import compute_on_one_thread, occupied_cells
from triage.nets.spot_features import spot_features
from triage.nets.spot_judge import SpotJudge
from triage.records import Frame, Geometry, Recipe, Series, Views
from triage.training.augment import changed

__all__ = [
    "Example",
    "by_shard",
    "data_hash",
    "disturbed",
    "frames_of",
    "frames_with_reflections",
    "ice_grains_of",
    "labels_and_family",
    "load_examples",
    "reflections_of",
    "shard_paths",
    "shards_made_with",
    "without_geometry",
]

_CHUNK = 8
_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """One prepared frame with its labels.

    Attributes:
        counts: (variants, 105) float32, what the fast exit reads: of the frame as it is, and of
            changed copies that have the same labels.
        candidates: (variants, 512, 39) float16, likewise.
        radial: (5, sectors, bins) float32.
        bin_factor: pixels per cell side.
        spots: (S,) float32, what the full exit reads of its list of spots; None without it.
        unplaced_spots: (S,) the same where the geometry is not known.
        overview: (3, Y, X) float32, cut to the occupied cells; None where the convolutions of the
            full exit have nothing to learn.
        tiles: (tiles, 2, P, P) float16; None likewise.
        labels: by name, NaN where undefined.
        family: of the detector.
        inputs: (4,) float64, what the frame looks like, see ``triage.audit.drift.inputs_of``.
    """

    counts: NDArray[np.float32]
    candidates: NDArray[np.float16]
    radial: NDArray[np.float32]
    bin_factor: int
    spots: NDArray[np.float32] | None
    unplaced_spots: NDArray[np.float32] | None
    overview: NDArray[np.float32] | None
    tiles: NDArray[np.float16] | None
    labels: dict[str, float]
    inputs: NDArray[np.float64]
    family: str = ""


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


def shards_made_with(folder: Path) -> dict[str, Any]:
    """What the maker of a folder of shards wrote down (seed, recipe, version); empty if nothing."""
    try:
        made: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}
    return made


def data_hash(paths: Sequence[Path]) -> str:
    """16 hex digits over pixels' chunks, labels and reflections, in order: what a model was trained
    on."""
    import h5py

    digest = hashlib.sha256()
    for path in paths:
        with h5py.File(path) as shard:
            data = shard["data"]
            for i in range(data.shape[0]):
                digest.update(data.id.read_direct_chunk((i, 0, 0))[1])
            for group in ("labels", "reflections"):
                for name in sorted(shard.get(group, ())):
                    digest.update(name.encode())
                    digest.update(shard[group][name][()].tobytes())
    return digest.hexdigest()[:16]


def load_examples(
    paths: Sequence[Path],
    recipe: Recipe,
    *,
    coarser_share: float = 0.0,
    variants: int = 0,
    copies: float = 0.0,
    full: bool = True,
    convolutions: bool = False,
    judge: SpotJudge | None = None,
    seed: int = 0,
    workers: int = 1,
) -> Iterator[Example]:
    """Every frame of the shards, prepared, in order.

    Args:
        coarser_share: share of frames that are binned further than their size asks for: the
            statistics of large detectors, learned from small frames.
        variants: changed copies of each frame that the fast exit also learns from.
        copies: changed copies of whole frames, for each frame so many on average; see
            ``triage.training.augment``. They follow the frames of their shard.
        full: also what the full exit reads of the spots.
        convolutions: and what its convolutions look at, of frames that are not blank.
        judge: of the spots; without one every spot is taken for a crystal's.
        seed: of those choices, with the number of the shard.
        workers: processes that prepare shards; the result does not depend on it.
    """
    jobs = functools.partial(
        _prepared_shard,
        recipe=recipe,
        shares=(coarser_share, variants, copies),
        full=full,
        convolutions=convolutions,
        judge=judge,
        seed=seed,
    )
    for examples in by_shard(jobs, paths, workers):
        yield from examples


def by_shard(
    job: Callable[[int, Path], _Made], paths: Sequence[Path], workers: int
) -> Iterator[_Made]:
    """What ``job`` makes of each shard, given its number in ``paths`` and its path, in order.

    Args:
        workers: processes; with more than one, job and result are pickled.
    """
    if workers <= 1:
        yield from map(job, range(len(paths)), paths)
        return
    # Not forked: the threads of numba and torch do not live on in a copy of a process.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, compute_on_one_thread) as pool:
        yield from pool.map(job, range(len(paths)), paths)


def _prepared_shard(
    number: int,
    path: Path,
    *,
    recipe: Recipe,
    shares: tuple[float, int, float],
    full: bool,
    convolutions: bool,
    judge: SpotJudge | None,
    seed: int,
) -> list[Example]:
    """The examples of one shard, each number with a seed of its own."""
    rng = np.random.default_rng([seed, number])
    return list(_prepare_shard(path, recipe, *shares, full, convolutions, judge, rng))


def _prepare_shard(
    path: Path,
    recipe: Recipe,
    coarser_share: float,
    variants: int,
    copies: float,
    full: bool,
    convolutions: bool,
    judge: SpotJudge | None,
    rng: np.random.Generator,
) -> Iterator[Example]:
    backends = [
        open_backend("cpu", replace(recipe, bin_factors=recipe.bin_factors[level:]))
        for level in range(3)
    ]
    frames, labels, family = _read_shard(path)
    if copies:
        for frame, known in _copies(frames, labels, family, copies, rng):
            frames.append(frame)
            labels.append(known)
    choice = rng.random(len(frames))
    levels = np.where(choice < 0.25 * coarser_share, 2, np.where(choice < coarser_share, 1, 0))
    for first in range(0, len(frames), _CHUNK):
        for level, backend in enumerate(backends):
            rows = [i for i in range(first, min(first + _CHUNK, len(frames))) if levels[i] == level]
            if not rows:
                continue
            batch = [frames[i] for i in rows]
            views = backend.prepare(batch)
            wanted = list(range(len(rows))) if full else []
            close_ups = backend.close_ups(batch, views, wanted)
            unplaced = backend.close_ups([without_geometry(f) for f in batch], views, wanted)
            seen = zip(
                close_ups.tiles,
                spot_features(close_ups, judge),
                spot_features(unplaced, judge),
                strict=True,
            )
            close = dict(zip(wanted, seen, strict=True))
            for j, i in enumerate(rows):
                example = _example(views, j, close.get(j), labels[i], family, variants, rng)
                if not convolutions or labels[i].get("blank") == 1.0:
                    example = replace(example, overview=None, tiles=None)
                yield example


def without_geometry(frame: Frame) -> Frame:
    """The frame as it is where nobody says how the detector stands."""
    return structs.replace(frame, series=replace(frame.series, geometry=None))


def _copies(
    frames: Sequence[Frame],
    labels: Sequence[dict[str, float]],
    family: str,
    copies: float,
    rng: np.random.Generator,
) -> list[tuple[Frame, dict[str, float]]]:
    """Changed copies of frames of one shard, drawn at random."""
    backend = open_backend("cpu")
    made = []
    for _ in range(int(rng.poisson(copies * len(frames)))):
        one, other = (int(i) for i in rng.integers(len(frames), size=2))
        pixels, beside = (measured(frames[i], backend.decode(frames[i])) for i in (one, other))
        copy = changed(
            frames[one],
            *pixels,
            labels[one],
            (*beside, labels[other]),
            scales=family == "ccd",
            rng=rng,
        )
        made.append(copy)
    return made


def _example(
    views: Views,
    row: int,
    close: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]] | None,
    labels: dict[str, float],
    family: str,
    variants: int,
    rng: np.random.Generator,
) -> Example:
    error = views.errors[row]
    if error is not None:
        raise error
    y, x = occupied_cells(views.count[row])
    overview = views.overview[row, :, :y, :x].copy()
    copies = [overview, *(disturbed(overview, rng) for _ in range(variants))]
    bin_factor = int(views.bin_factor[row])
    found = [evidence_on_cpu(copy, bin_factor) for copy in copies]
    return Example(
        counts=torch.cat([each.counts for each in found]).numpy(),
        candidates=torch.cat([each.candidates for each in found]).half().numpy(),
        radial=views.radial[row].copy(),
        bin_factor=bin_factor,
        overview=None if close is None else overview,
        tiles=None if close is None else np.minimum(close[0], 6e4).astype(np.float16),
        spots=None if close is None else close[1],
        unplaced_spots=None if close is None else close[2],
        labels=labels,
        inputs=inputs_of(views, row),
        family=family,
    )


def disturbed(view: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """A copy of an overview (3, Y, X) with a dead rectangle or lone hot cells, or both.

    Either leaves the labels as they are: a hot pixel is no crystal, and a hit with a hot pixel
    stays one. The rectangle takes at most a tenth of the frame.
    """
    view = view.copy()
    ny, nx = view.shape[1:]
    if rng.random() < 0.5:
        h, w = int(ny * rng.uniform(0.05, 0.3)), int(nx * rng.uniform(0.05, 0.3))
        y, x = int(rng.integers(ny - h)), int(rng.integers(nx - w))
        view[:, y : y + h, x : x + w] = 0.0
    if rng.random() < 0.4:
        n = int(math.exp(rng.uniform(0.0, math.log(60.0))))
        ys, xs = rng.integers(ny, size=n), rng.integers(nx, size=n)
        there = view[2, ys, xs] > 0
        # Excess of 2..500 sigma in the compressed scale e / sqrt(1 + |e|).
        sigma = np.exp(rng.uniform(math.log(2.0), math.log(500.0), n))
        hot = (sigma / np.sqrt(1.0 + sigma)).astype(np.float32)
        view[0, ys[there], xs[there]] = np.maximum(view[0, ys[there], xs[there]], hot[there])
    return view


def labels_and_family(path: Path) -> tuple[dict[str, NDArray[np.float64]], str]:
    """Every label of a shard by name, (N,) with NaN where undefined, and the detector's family."""
    with _opened(path) as shard:
        labels = {name: shard["labels"][name][()].astype(np.float64) for name in shard["labels"]}
        return labels, str(shard.attrs["family"])


def ice_grains_of(path: Path) -> NDArray[np.float64] | None:
    """(N,) grains that the ice of each frame was drawn as, 0 for smooth rings; None where the
    shard's maker does not say."""
    with _opened(path) as shard:
        if "nominal/ice_grains" not in shard:
            return None
        grains: NDArray[np.float64] = shard["nominal/ice_grains"][()].astype(np.float64)
        return grains


def frames_with_reflections(path: Path) -> int:
    """Of how many frames a shard tells the reflections: of all, or of none."""
    with _opened(path) as shard:
        return len(shard["reflections/first"]) - 1 if "reflections/first" in shard else 0


def reflections_of(path: Path) -> list[NDArray[np.float32]] | None:
    """Per frame the reflections of its crystal, (n, 4): y and x [px], sigma along their long axis
    [px], and signal to noise; None where the shard's maker does not say."""
    with _opened(path) as shard:
        if "reflections/first" not in shard:
            return None
        first = shard["reflections/first"][()]
        columns = [shard[f"reflections/{name}"][()] for name in ("y_px", "x_px", "sigma_px", "snr")]
        table = np.stack(columns, 1).astype(np.float32)
        return [table[a:b] for a, b in itertools.pairwise(first)]


def frames_of(path: Path) -> list[Frame]:
    """The frames of a shard, still compressed."""
    return _read_shard(path)[0]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A shard as h5py gives it; what it lacks is an error that says how to mend it."""
    import h5py

    try:
        with h5py.File(path) as shard:
            yield shard
    except (OSError, KeyError, RuntimeError) as err:
        raise UnreadableFile(
            f"shard {path}: {err}; expected data, mask, geometry and labels; remove the file "
            "and make it again"
        ) from err


def _read_shard(path: Path) -> tuple[list[Frame], list[dict[str, float]], str]:
    """The frames of a shard, still compressed, their labels, and the detector's family."""
    with _opened(path) as shard:
        data = shard["data"]
        mask = shard["mask"][()]
        geometry = {name: shard["geometry"][name][()] for name in shard["geometry"]}
        labels = {name: shard["labels"][name][()] for name in shard["labels"]}
        saturation = int(shard.attrs["saturation_value"])
        family = str(shard.attrs["family"])
        chunks = [data.id.read_direct_chunk((i, 0, 0))[1] for i in range(data.shape[0])]
        dtype, shape = data.dtype, (int(data.shape[1]), int(data.shape[2]))
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
    return frames, rows, family

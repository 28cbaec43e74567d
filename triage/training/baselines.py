"""What a model is measured against: spot counts, boosted trees, and networks of others.

All see the same frames; none shares code with the network's maps. Each answers for the heads it
can speak of, the higher the more positive the label. Those that learn are given shards to learn
from, and say how far they came in their time.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import torch
import torch.nn.functional as nnf
from msgspec import structs
from numpy.typing import NDArray
from torch import Tensor, nn

from triage.audit.finder import crystal_spots, find_spots
from triage.backends import open_backend
from triage.backends.recipe import measured
from triage.errors import EnvironmentLacksError
from triage.records import Frame, Recipe
from triage.sinks.nxmx import KeptWriter
from triage.training.dataset import Example, frames_of, labels_and_family, load_examples

__all__ = [
    "BASELINES",
    "Baseline",
    "BoostedTrees",
    "DialsSpotCount",
    "ImageNetwork",
    "SpotCount",
    "boosted_trees",
    "radial_statistics",
    "spot_statistics",
]

_SPOT_QUANTILES = (0.5, 0.9, 1.0)
_RADIAL_GROUPS = 20
_YES_OR_NO = ("blank", "ice", "bad_ice", "multilattice")

Say = Callable[[str], None]


class Baseline(Protocol):
    """One of those a model is measured against.

    Attributes:
        name: as reports show it.
        heads: labels that it answers for.
        slow: whether it should only be asked about some of the frames.
    """

    @property
    def name(self) -> str: ...

    @property
    def heads(self) -> tuple[str, ...]: ...

    @property
    def slow(self) -> bool: ...

    def score(
        self,
        learned_from: Sequence[Path],
        asked: Sequence[Path],
        *,
        rows: NDArray[np.int64] | None,
        threads: int,
        say: Say,
    ) -> dict[str, NDArray[np.float64]]:
        """By head, (n,) scores of the frames of the shards ``asked``, or of those at ``rows``.

        NaN where it has none. Heads that it cannot answer for are left out, all of them where it
        needs shards to learn from and has none.

        Raises:
            EnvironmentLacksError: a program or library is missing.
        """
        ...


@dataclass(frozen=True, slots=True)
class SpotCount:
    """Minus the number of spots that speak for a crystal, by the audit's dispersion finder."""

    name: str = "spot count"
    heads: tuple[str, ...] = ("blank",)
    slow: bool = False

    def score(
        self,
        learned_from: Sequence[Path],
        asked: Sequence[Path],
        *,
        rows: NDArray[np.int64] | None,
        threads: int,
        say: Say,
    ) -> dict[str, NDArray[np.float64]]:
        """As :meth:`Baseline.score`; nothing is learned."""
        found = _spot_statistics(tuple(asked), threads)
        return {"blank": -(found if rows is None else found[rows])[:, 0]}


@dataclass(frozen=True, slots=True)
class DialsSpotCount:
    """Minus the number of spots that ``dials.find_spots`` finds with its own settings."""

    name: str = "DIALS spot count"
    heads: tuple[str, ...] = ("blank",)
    slow: bool = True

    def score(
        self,
        learned_from: Sequence[Path],
        asked: Sequence[Path],
        *,
        rows: NDArray[np.int64] | None,
        threads: int,
        say: Say,
    ) -> dict[str, NDArray[np.float64]]:
        """As :meth:`Baseline.score`; nothing is learned."""
        if shutil.which("dials.find_spots") is None:
            raise EnvironmentLacksError(
                "the baseline of DIALS needs dials.find_spots; install the system's package 'dials'"
            )
        found = []
        for path, chosen in _by_shard(asked, rows):
            found += _dials_counts([frames_of(path)[i] for i in chosen])
            say(f"{self.name}: {len(found)} frames")
        return {"blank": -np.array(found, np.float64)}


@dataclass(frozen=True, slots=True)
class BoostedTrees:
    """Boosted trees on the statistics of spots and of the radial profile."""

    name: str = "boosted trees"
    heads: tuple[str, ...] = _YES_OR_NO
    slow: bool = False

    def score(
        self,
        learned_from: Sequence[Path],
        asked: Sequence[Path],
        *,
        rows: NDArray[np.int64] | None,
        threads: int,
        say: Say,
    ) -> dict[str, NDArray[np.float64]]:
        """As :meth:`Baseline.score`."""
        if not learned_from:
            return {}
        known, unknown = (_statistics(paths, threads) for paths in (learned_from, asked))
        answers = boosted_trees(known, _labels(learned_from), unknown)
        return {name: each if rows is None else each[rows] for name, each in answers.items()}


@dataclass(frozen=True, slots=True)
class ImageNetwork:
    """A network on whole frames as images, trained for a stated time from random weights.

    Attributes:
        built: the network for so many answers.
        seen: a frame's photons and which of its pixels are valid, as the network's image.
        seconds: how long it learns at most, preparation apart.
        frames: how many frames it learns from at most.
        epochs: how often it sees them at most.
        batch_size: frames of a step.
        learning_rate: of Adam.
    """

    name: str
    built: Callable[[int], nn.Module]
    seen: Callable[[NDArray[Any], NDArray[np.bool_]], NDArray[np.float16]]
    seconds: float
    frames: int
    epochs: int
    batch_size: int
    learning_rate: float
    heads: tuple[str, ...] = _YES_OR_NO
    slow: bool = True

    def score(
        self,
        learned_from: Sequence[Path],
        asked: Sequence[Path],
        *,
        rows: NDArray[np.int64] | None,
        threads: int,
        say: Say,
    ) -> dict[str, NDArray[np.float64]]:
        """As :meth:`Baseline.score`."""
        if not learned_from:
            return {}
        labels = _labels(learned_from)
        total = len(next(iter(labels.values())))
        rng = np.random.default_rng(0)
        chosen = np.sort(rng.permutation(total)[: self.frames])
        table = np.stack([labels[name][chosen] for name in self.heads], 1)
        images = np.stack(list(_images(learned_from, chosen, self.seen, threads)))
        torch.manual_seed(0)
        before = torch.get_num_threads()
        torch.set_num_threads(max(1, threads))
        try:
            net = self.built(len(self.heads))
            steps = self._learn(net, images, torch.from_numpy(table).float(), rng)
            say(
                f"{self.name}: {sum(p.numel() for p in net.parameters())} parameters, "
                f"{steps} steps of {self.batch_size} on {len(chosen)} frames, "
                f"at most {self.seconds:.0f} s"
            )
            del images
            answers = self._answers(net, _images(asked, rows, self.seen, threads))
        finally:
            torch.set_num_threads(before)
        return {name: answers[:, i] for i, name in enumerate(self.heads)}

    def _learn(
        self,
        net: nn.Module,
        images: NDArray[np.float16],
        labels: Tensor,
        rng: np.random.Generator,
    ) -> int:
        """Steps that fitted into the time; each label that is known counts alike."""
        optimizer = torch.optim.Adam(net.parameters(), lr=self.learning_rate)
        net.train()
        began, steps = time.monotonic(), 0
        for _ in range(self.epochs):
            order = rng.permutation(len(images))
            for first in range(0, len(order), self.batch_size):
                rows = order[first : first + self.batch_size]
                known = torch.isfinite(labels[rows])
                # A single frame has no statistics of a batch.
                if len(rows) < 2 or not known.any():
                    continue
                if time.monotonic() - began > self.seconds:
                    return steps
                raw = net(torch.from_numpy(_turned(images[rows], rng)).float()[:, None])
                loss = nnf.binary_cross_entropy_with_logits(raw[known], labels[rows][known])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                steps += 1
        return steps

    def _answers(
        self, net: nn.Module, images: Iterator[NDArray[np.float16]]
    ) -> NDArray[np.float64]:
        net.eval()
        with torch.inference_mode():
            rows = [net(torch.from_numpy(image).float()[None, None])[0].numpy() for image in images]
        return np.array(rows, np.float64).reshape(-1, len(self.heads))


_KE_SIDE = 720
_VGG_SIDE = 512
_VGG = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
"""Channels of its convolutions; 0 halves the image (Simonyan and Zisserman, ICLR 2015, D)."""


def _ke_network(outputs: int) -> nn.Module:
    """Four convolutions of 4 to 32 channels, as Ke et al., J. Synchrotron Rad. 25 (2018) 655."""
    layers: list[nn.Module] = []
    before = 1
    for channels, width in ((4, 7), (8, 3), (16, 3), (32, 3)):
        convolution = nn.Conv2d(before, channels, width, stride=2, padding=width // 2)
        layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)]
        before = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, outputs))


def _ke_image(counts: NDArray[Any], valid: NDArray[np.bool_]) -> NDArray[np.float16]:
    """Summed to 720 pixels a side at most, then each pixel over the scatter of the 25 around it."""
    sums, _ = _reduced(counts, valid, _KE_SIDE)
    image = torch.from_numpy(sums).float()[None, None]
    padded = nnf.pad(image, (2, 2, 2, 2), mode="reflect")
    mean = nnf.avg_pool2d(padded, 5, 1)
    spread = (nnf.avg_pool2d(padded.square(), 5, 1) - mean.square()).clamp(min=0.0).sqrt()
    return np.asarray(((image - mean) / (spread + 1e-2))[0, 0].half().numpy())


def _vgg16(outputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    before = 1
    for channels in _VGG:
        if channels:
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
            before = channels
        else:
            layers.append(nn.MaxPool2d(2))
    net = nn.Sequential(
        *layers,
        nn.AdaptiveAvgPool2d(7),
        nn.Flatten(),
        nn.Linear(512 * 49, 4096),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(4096, outputs),
    )
    for layer in net.modules():
        # Sixteen layers without it let nothing through at first.
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return net


def _vgg_image(counts: NDArray[Any], valid: NDArray[np.bool_]) -> NDArray[np.float16]:
    """Averaged to 512 pixels a side at most and cut to 8 bits, as images of counts are stored."""
    sums, pixels = _reduced(counts, valid, _VGG_SIDE)
    mean = np.clip(np.rint(sums / np.maximum(pixels, 1)), 0, 255)
    return (mean / 255.0).astype(np.float16)


def _reduced(
    counts: NDArray[Any], valid: NDArray[np.bool_], side: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Valid counts and valid pixels of k x k cells, padded to ``side``; k as small as fits."""
    k = max(1, math.ceil(max(counts.shape) / side))
    room = [(0, k * side - extent) for extent in counts.shape]
    there = np.pad(valid, room)
    kept = np.pad(np.where(valid, counts, 0), room)
    cells = (side, k, side, k)
    sums = kept.reshape(cells).sum((1, 3), dtype=np.float64)
    return sums, there.reshape(cells).sum((1, 3), dtype=np.int64)


def _turned(images: NDArray[np.float16], rng: np.random.Generator) -> NDArray[np.float16]:
    """All of them in one of the eight turns and mirrors of a square."""
    if rng.random() < 0.5:
        images = images[:, :, ::-1]
    return np.ascontiguousarray(np.rot90(images, int(rng.integers(4)), (1, 2)))


def _by_shard(
    paths: Sequence[Path], rows: NDArray[np.int64] | None
) -> Iterator[tuple[Path, list[int]]]:
    """Each shard with the frames of it that are at ``rows`` of all frames in order."""
    first = 0
    for path in paths:
        here = len(frames_of(path))
        inside = range(here)
        if rows is None:
            yield path, list(inside)
        else:
            yield path, [int(r) - first for r in rows if first <= r < first + here]
        first += here


def _images(
    paths: Sequence[Path],
    rows: NDArray[np.int64] | None,
    seen: Callable[[NDArray[Any], NDArray[np.bool_]], NDArray[np.float16]],
    threads: int,
) -> Iterator[NDArray[np.float16]]:
    """The images of frames in order, shard by shard; ``rows`` ascend."""

    def of(job: tuple[Path, list[int]]) -> list[NDArray[np.float16]]:
        path, chosen = job
        backend, frames = open_backend("cpu"), frames_of(path)
        return [seen(*measured(frames[i], backend.decode(frames[i]))) for i in chosen]

    jobs = list(_by_shard(paths, rows))
    with ThreadPoolExecutor(threads) as pool:
        # As many shards at a time as there are threads, or all images would lie in memory.
        for first in range(0, len(jobs), threads):
            for images in pool.map(of, jobs[first : first + threads]):
                yield from images


def _dials_counts(frames: Sequence[Frame]) -> list[int]:
    """Spots that ``dials.find_spots`` finds on each frame, of frames of one detector.

    All are written with the geometry of the first: the finder does not ask where the beam is.
    """
    if not frames:
        return []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        writer = KeptWriter(folder)
        for i, frame in enumerate(frames):
            writer.write(structs.replace(frame, series=frames[0].series, image_id=i))
        master, *_ = writer.close()
        _run_dials(folder, "dials.import", master.name)
        _run_dials(folder, "dials.find_spots", "imported.expt", "nproc=1")
        found = folder / "strong.refl"
        if not found.exists():
            return [0] * len(frames)
        table = msgspec.msgpack.decode(found.read_bytes())[2]
    rows, packed = table["data"]["xyzobs.px.value"][1]
    middles = np.frombuffer(packed, "<f8").reshape(rows, 3)
    # Along the run, a spot of frame i lies at i + 0.5.
    counted = np.bincount(middles[:, 2].astype(np.int64), minlength=len(frames))
    return [int(n) for n in counted]


def _run_dials(folder: Path, *command: str) -> None:
    import hdf5plugin

    # DIALS runs on the system's Python: this one must not leak into it.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))}
    environment |= {"PATH": "/usr/bin:/bin", "HDF5_PLUGIN_PATH": hdf5plugin.PLUGIN_PATH}
    answer = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if answer.returncode:
        last = answer.stdout.strip().splitlines()[-1:] or [""]
        raise EnvironmentLacksError(
            f"the baseline of DIALS: {command[0]}: {last[0]}; expected a DIALS that reads NXmx"
        )


def _labels(paths: Sequence[Path]) -> dict[str, NDArray[np.float64]]:
    """The labels that are yes or no, of all frames in order."""
    found: dict[str, list[NDArray[np.float64]]] = {name: [] for name in _YES_OR_NO}
    for path in paths:
        table = labels_and_family(path)[0]
        unknown = np.full(len(table["blank"]), math.nan)
        for name, columns in found.items():
            columns.append(table.get(name, unknown))
    return {name: np.concatenate(columns) for name, columns in found.items()}


def _statistics(paths: Sequence[Path], threads: int) -> NDArray[np.float64]:
    """What the trees read: (frames, 47)."""
    examples = list(load_examples(paths, Recipe(), full=False, workers=threads))
    spots = _spot_statistics(tuple(paths), threads)
    return np.concatenate([spots, radial_statistics(examples)], 1)


@functools.lru_cache(maxsize=4)
def _spot_statistics(paths: tuple[Path, ...], threads: int) -> NDArray[np.float64]:
    """Kept, because the count and the trees both ask, and it takes longest."""
    return spot_statistics(paths, threads=threads)


def spot_statistics(paths: Sequence[Path], *, threads: int = 1) -> NDArray[np.float64]:
    """(frames, 7) by the audit's finder, at native pixels, in the order of the shards.

    Spots that speak for a crystal, all spots, three quantiles of their signal to noise, mean
    count, and valid pixels.
    """

    def of(path: Path) -> list[list[float]]:
        backend = open_backend("cpu")
        rows = []
        for frame in frames_of(path):
            counts, valid = measured(frame, backend.decode(frame))
            spots = find_spots(counts, valid)
            sigma = spots.sigma if len(spots) else np.zeros(1)
            rows.append(
                [
                    float(crystal_spots(spots, frame.shape, frame.series.geometry)),
                    float(len(spots)),
                    *(float(q) for q in np.quantile(sigma, _SPOT_QUANTILES)),
                    math.log(float(counts[valid].mean()) + 1e-4) if valid.any() else 0.0,
                    float(valid.sum()),
                ]
            )
        return rows

    with ThreadPoolExecutor(threads) as pool:
        return np.array([row for rows in pool.map(of, paths) for row in rows])


def radial_statistics(examples: Sequence[Example]) -> NDArray[np.float64]:
    """(frames, 40): level over the smooth trend and spread between sectors, by groups of bins."""
    radial = np.stack([e.radial for e in examples]).astype(np.float64)
    valid = radial[:, 1] > 0.3
    level = np.where(valid, np.log(radial[:, 0] + 1e-3), np.nan)
    n, _, bins = level.shape
    groups = level.transpose(0, 2, 1).reshape(n, _RADIAL_GROUPS, bins // _RADIAL_GROUPS, -1)
    seen = np.isfinite(groups).any(3)
    with np.errstate(invalid="ignore"):
        per_bin = np.where(seen, np.nan_to_num(groups).sum(3), np.nan) / np.maximum(
            np.isfinite(groups).sum(3), 1
        )
    peak = _largest(per_bin) - _middle(per_bin)
    spread = _largest(per_bin) + _largest(-per_bin)
    return np.concatenate([peak, spread], 1)


def _largest(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the last axis, NaN left out; NaN where nothing is left."""
    filled = np.where(np.isfinite(values), values, -np.inf).max(-1)
    return np.where(np.isfinite(filled), filled, np.nan)


def _middle(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median over the last axis likewise."""
    ordered = np.sort(values, -1)  # NaN last
    count = np.isfinite(values).sum(-1)
    at = np.maximum(count - 1, 0) // 2
    return np.take_along_axis(ordered, at[..., None], -1)[..., 0]


def boosted_trees(
    learned: NDArray[np.float64],
    labels: Mapping[str, NDArray[np.float64]],
    asked: NDArray[np.float64],
    *,
    seed: int = 0,
) -> dict[str, NDArray[np.float64]]:
    """Probability of each binary label on ``asked`` (n, F), learned from ``learned`` (m, F).

    Args:
        labels: by name, (m,) 0, 1 or NaN; those without both classes are left out.

    Raises:
        EnvironmentLacksError: scikit-learn is not installed.
    """
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
    except ImportError as err:
        raise EnvironmentLacksError(
            "the baseline of boosted trees needs scikit-learn; install the extra 'train'"
        ) from err
    found = {}
    for name, values in labels.items():
        known = np.isfinite(values)
        if np.unique(values[known]).size < 2:
            continue
        trees = HistGradientBoostingClassifier(max_iter=200, random_state=seed)
        trees.fit(learned[known], values[known] > 0.5)
        found[name] = trees.predict_proba(asked)[:, 1]
    return found


BASELINES: tuple[Baseline, ...] = (
    SpotCount(),
    DialsSpotCount(),
    BoostedTrees(),
    ImageNetwork(
        name="7 k network of Ke et al.",
        built=_ke_network,
        seen=_ke_image,
        seconds=600.0,
        frames=2000,
        epochs=12,
        batch_size=16,
        learning_rate=2e-3,
    ),
    ImageNetwork(
        name="VGG16 on 8-bit images",
        built=_vgg16,
        seen=_vgg_image,
        seconds=1200.0,
        frames=2000,
        epochs=30,
        batch_size=4,
        learning_rate=1e-4,
    ),
)
"""What ``triage evaluate`` measures a model against."""

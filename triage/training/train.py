"""Trains the default kind of model: one loop, masked losses, a card at the end.

Labels may be missing (NaN): a head learns only from frames where its label is defined, and each
head's loss is divided by its own running mean, so none drowns the others.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from triage import __version__
from triage.errors import ModelError
from triage.nets.model import save_model
from triage.nets.triagenet import Head, TriageNet
from triage.records import Recipe
from triage.training.dataset import Example, data_hash, load_examples, shard_paths
from triage.training.figures import auroc, clopper_pearson

__all__ = ["HEADS", "train"]

HEADS = (
    Head(name="blank", kind="binary", exit="fast"),
    Head(name="ice", kind="binary", exit="fast"),
    Head(name="multilattice", kind="binary", exit="full"),
    Head(name="mosaicity_deg", kind="regression", exit="full", unit="deg", transform="log"),
    Head(name="quality", kind="ordinal", exit="full", levels=5),
    Head(name="n_lattices", kind="ordinal", exit="full", levels=4, first=1.0),
    Head(
        name="d_vis_angstrom",
        kind="regression",
        exit="full",
        unit="angstrom",
        transform="inverse_square",
    ),
)

FALSE_VETO_GOAL = 0.01
"""Share of hits that the threshold may veto, on frames kept apart for setting it. Looser than a
beamline wants: a hundred hits, as a small training set keeps apart, cannot resolve 0.001."""

_WEIGHT = {"blank": 4.0}
"""Blank decides what is dropped; the other heads describe."""


def train(
    shards: Path,
    out: Path,
    *,
    test: Path | None = None,
    epochs: int = 12,
    seed: int = 0,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    threads: int = 2,
    name: str = "triagenet",
    command: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Train, calibrate, set the threshold, and write model and card into ``out``.

    Every tenth shard is kept apart for calibration and threshold. ``test``, a folder of shards
    with other crystals and detectors, is looked at once, at the end, for the card's validation.

    Args:
        epochs: passes over the shards; a finished epoch is resumed from ``out/state.pt``.
        say: told one line per epoch.

    Returns:
        The model_id.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    recipe = Recipe()
    paths = shard_paths(shards)
    apart = [path for i, path in enumerate(paths) if i % 10 == 9]
    if not apart:
        raise ModelError(
            f"{shards}: {len(paths)} shards; expected at least 10, as one in ten is kept apart "
            "for calibration"
        )
    learned = [path for path in paths if path not in set(apart)]
    say(f"preparing {len(learned)} + {len(apart)} shards")
    examples = list(load_examples(learned, recipe, coarser_share=0.45, seed=seed))
    held = list(load_examples(apart, recipe, coarser_share=0.25, seed=seed + 1))
    net = TriageNet(HEADS, radial_bins=recipe.radial_bins)
    history = _fit(net, examples, held, epochs, batch_size, learning_rate, seed, out, say)
    net.eval()
    outputs = predict(net, held)
    calibration = {
        head.name: _temperature(outputs[head.name][:, 0], _labels(held, head.name))
        for head in HEADS
        if head.kind == "binary"
    }
    threshold = _threshold(_p_blank(outputs, calibration), _labels(held, "blank"))
    say(f"threshold {threshold:.4f}, calibration {calibration}")
    validation: dict[str, Any] = {}
    tables: dict[str, Any] = {"history": history}
    if test is not None:
        test_paths = shard_paths(test)
        validation, more = _validate(net, test_paths, recipe, calibration, threshold)
        tables |= more
        say(json.dumps(validation))
    return save_model(
        out,
        net,
        name,
        {
            "recipe": recipe,
            "thresholds": {"p_blank_veto": threshold},
            "calibration": calibration,
            "training": {
                "command": command,
                "seed": seed,
                "epochs": epochs,
                "frames": len(examples) + len(held),
                "data_hash": data_hash(paths),
            },
            "validation": validation,
            "tables": tables,
            "versions": {
                "braggtriage": __version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        },
    )


def _fit(
    net: TriageNet,
    examples: Sequence[Example],
    held: Sequence[Example],
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    out: Path,
    say: Callable[[str], None],
) -> list[dict[str, float]]:
    steps = epochs * math.ceil(len(examples) / batch_size)
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=steps + 1, pct_start=0.15
    )
    running: dict[str, float] = {}
    history: list[dict[str, float]] = []
    state_path = out / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        running, history = dict(state["running"]), list(state["history"])
        say(f"resuming after epoch {len(history)}")
    out.mkdir(parents=True, exist_ok=True)
    for epoch in range(len(history), epochs):
        began = time.monotonic()
        # Each epoch draws from its own seed, so a resumed run equals an uninterrupted one.
        rng = np.random.default_rng([seed, epoch])
        net.train()
        losses = []
        for batch in _batches(examples, batch_size, rng):
            loss = _step(net, batch, running, rng)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        net.eval()
        outputs = predict(net, held)
        record = {"epoch": float(epoch), "loss": float(np.mean(losses))}
        for head in HEADS:
            if head.kind == "binary":
                labels = _labels(held, head.name)
                known = np.isfinite(labels)
                record[f"auroc_{head.name}"] = auroc(
                    outputs[head.name][known, 0], labels[known] > 0.5
                )
        record["seconds"] = time.monotonic() - began
        history.append(record)
        say(" ".join(f"{k} {v:.4f}" for k, v in record.items()))
        torch.save(
            {
                "net": net.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "running": running,
                "history": history,
            },
            state_path,
        )
    return history


def _batches(
    examples: Sequence[Example], batch_size: int, rng: np.random.Generator
) -> list[list[Example]]:
    """Batches of frames of like size, so that little is padded; in random order."""
    order = rng.permutation(len(examples))
    pool = 16 * batch_size
    batches = []
    for first in range(0, len(order), pool):
        near = sorted(order[first : first + pool], key=lambda i: examples[i].overview.size)
        batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    return [[examples[i] for i in batches[j]] for j in rng.permutation(len(batches))]


def _stack(
    batch: Sequence[Example], rng: np.random.Generator | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Overview, radial, bin factor and tiles of a batch, padded to its largest frame."""
    y = max(e.overview.shape[1] for e in batch)
    x = max(e.overview.shape[2] for e in batch)
    side = max(y, x) if rng is not None else 0
    overview = np.zeros((len(batch), 3, max(y, side), max(x, side)), np.float32)
    radial = np.stack([e.radial for e in batch])
    tile_shape = next((e.tiles.shape for e in batch if e.tiles is not None), (1, 2, 64, 64))
    tiles = np.zeros((len(batch), *tile_shape), np.float32)
    for i, example in enumerate(batch):
        view = example.overview.astype(np.float32)
        if rng is not None:
            view = _augmented(view, rng)
        overview[i, :, : view.shape[1], : view.shape[2]] = view
        if example.tiles is not None:
            tiles[i] = example.tiles
    return (
        torch.from_numpy(overview),
        torch.from_numpy(radial),
        torch.tensor([float(e.bin_factor) for e in batch]),
        torch.from_numpy(tiles),
    )


def _augmented(view: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Turns and mirrors, missing rectangles (shadows, dead modules) and lone hot cells.

    All of them leave the label as it is: a hot pixel is no crystal, and a hit with a hot pixel
    stays one. A rectangle takes at most a tenth of the frame.
    """
    if rng.random() < 0.5:
        view = view[:, :, ::-1]
    view = np.rot90(view, int(rng.integers(4)), (1, 2)).copy()
    ny, nx = view.shape[1:]
    if rng.random() < 0.2:
        h, w = int(ny * rng.uniform(0.05, 0.3)), int(nx * rng.uniform(0.05, 0.3))
        y, x = int(rng.integers(ny - h)), int(rng.integers(nx - w))
        view[:, y : y + h, x : x + w] = 0.0
    if rng.random() < 0.15:
        n = int(math.exp(rng.uniform(0.0, math.log(60.0))))
        ys, xs = rng.integers(ny, size=n), rng.integers(nx, size=n)
        there = view[2, ys, xs] > 0
        # Excess of 2..500 sigma in the compressed scale e / sqrt(1 + |e|).
        sigma = np.exp(rng.uniform(math.log(2.0), math.log(500.0), n))
        hot = sigma / np.sqrt(1.0 + sigma)
        view[0, ys[there], xs[there]] = np.maximum(view[0, ys[there], xs[there]], hot[there])
    return view


def _step(
    net: TriageNet,
    batch: Sequence[Example],
    running: dict[str, float],
    rng: np.random.Generator,
) -> Tensor:
    outputs = net(*_stack(batch, rng))
    total = torch.zeros(())
    for head in HEADS:
        labels = torch.tensor([e.labels.get(head.name, math.nan) for e in batch])
        known = torch.isfinite(labels)
        if head.exit == "full":
            known &= torch.tensor([e.tiles is not None for e in batch])
        if not known.any():
            continue
        loss = head_loss(head, outputs[head.name][known], labels[known].float())
        value = float(loss.detach())
        running[head.name] = 0.98 * running.get(head.name, value) + 0.02 * value
        total = total + _WEIGHT.get(head.name, 1.0) * loss / max(running[head.name], 1e-3) ** 0.5
    return total


def head_loss(head: Head, raw: Tensor, labels: Tensor) -> Tensor:
    """Mean loss of one head over frames whose label is known.

    Binary and cumulative (ordinal) heads: cross entropy. Regressions: Huber loss on the
    transformed quantity, as the tails of simulated labels are long.
    """
    if head.kind == "binary":
        return nnf.binary_cross_entropy_with_logits(raw[:, 0], labels)
    if head.kind == "ordinal":
        steps = torch.arange(1, head.levels) + head.first - 0.5
        return nnf.binary_cross_entropy_with_logits(raw, (labels[:, None] > steps).float())
    if head.transform == "log":
        labels = labels.clamp(min=1e-3).log()
    elif head.transform == "inverse_square":
        labels = labels.clamp(min=0.5).pow(-2)
        return nnf.smooth_l1_loss(raw[:, 0] * 10.0, labels * 10.0)
    return nnf.smooth_l1_loss(raw[:, 0], labels)


def predict(net: TriageNet, examples: Sequence[Example]) -> dict[str, np.ndarray[Any, Any]]:
    """Raw outputs (N, head.outputs) of every head, in the order of ``examples``."""
    parts: dict[str, list[Tensor]] = {head.name: [] for head in net.heads}
    order = sorted(range(len(examples)), key=lambda i: examples[i].overview.size)
    with torch.inference_mode():
        for first in range(0, len(order), 16):
            batch = [examples[i] for i in order[first : first + 16]]
            for name, raw in net(*_stack(batch, None)).items():
                parts[name].append(raw)
    back = np.argsort(order)
    return {name: torch.cat(raw).double().numpy()[back] for name, raw in parts.items()}


def _labels(examples: Sequence[Example], name: str) -> np.ndarray[Any, Any]:
    return np.array([e.labels.get(name, math.nan) for e in examples])


def _temperature(logits: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Temperature and bias that make sigmoid(logit / t + b) fit held-out labels best."""
    known = np.isfinite(labels)
    x = torch.tensor(logits[known])
    y = torch.tensor(labels[known])
    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scale, bias], max_iter=100)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nnf.binary_cross_entropy_with_logits(x * torch.exp(-scale) + bias, y)
        loss = loss + 1e-3 * (scale**2 + bias**2)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return float(torch.exp(scale.detach())), float(bias.detach())


def _p_blank(
    outputs: dict[str, np.ndarray[Any, Any]], calibration: dict[str, tuple[float, float]]
) -> np.ndarray[Any, Any]:
    temperature, bias = calibration["blank"]
    return np.asarray(1.0 / (1.0 + np.exp(-(outputs["blank"][:, 0] / temperature + bias))))


def _threshold(p_blank: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    """The lowest threshold that vetoes at most the goal's share of the held-out hits."""
    hits = np.sort(p_blank[labels == 0.0])[::-1]
    if not hits.size:
        return 1.0
    allowed = int(FALSE_VETO_GOAL * hits.size)
    return float(min(1.0, np.nextafter(hits[allowed], 2.0)))


def _validate(
    net: TriageNet,
    paths: Sequence[Path],
    recipe: Recipe,
    calibration: dict[str, tuple[float, float]],
    threshold: float,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The card's validation and tables, from shards that took no part in anything before."""
    examples = list(load_examples(paths, recipe))
    outputs = predict(net, examples)
    p_blank = _p_blank(outputs, calibration)
    labels = _labels(examples, "blank")
    hits, blanks = labels == 0.0, labels == 1.0
    vetoed = p_blank >= threshold
    false_vetoes = int((vetoed & hits).sum())
    visible = _labels(examples, "n_visible")
    strata = {}
    for low, high in ((10, 30), (30, 100), (100, 10**9)):
        chosen = hits & (visible >= low) & (visible < high)
        strata[f"{low}+"] = {
            "hits": int(chosen.sum()),
            "false_vetoes": int((vetoed & chosen).sum()),
            "auroc": auroc(p_blank[chosen | blanks], blanks[chosen | blanks]),
        }
    tables: dict[str, Any] = {"blank_by_visible_spots": strata}
    for head in HEADS:
        if head.kind == "binary":
            known = np.isfinite(_labels(examples, head.name))
            if head.exit == "full":
                known &= np.array([e.tiles is not None for e in examples])
            tables[f"auroc_{head.name}"] = auroc(
                outputs[head.name][known, 0], _labels(examples, head.name)[known] > 0.5
            )
    validation = {
        "data_hash": data_hash(paths),
        "frames": len(examples),
        "hits": int(hits.sum()),
        "blanks": int(blanks.sum()),
        "threshold": threshold,
        "auroc": auroc(p_blank[hits | blanks], blanks[hits | blanks]),
        "false_vetoes": false_vetoes,
        "false_veto_rate": false_vetoes / max(1, int(hits.sum())),
        "false_veto_interval_95": list(clopper_pearson(false_vetoes, int(hits.sum()))),
        "blanks_vetoed_share": float(vetoed[blanks].mean()) if blanks.any() else math.nan,
    }
    return validation, tables

"""Trains the default kind of model: the fast exit, then the full one, and a card at the end.

Labels may be missing (NaN): a head learns only from frames where its label is defined, and each
head's loss is divided by its own running mean, so none drowns the others.

The fast exit comes first, because what the full exit learns must not change it.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from triage import __version__
from triage.audit.drift import reference_of
from triage.errors import ModelError
from triage.nets.model import save_model
from triage.nets.triagenet import Head, TriageNet
from triage.records import HIT_SPOTS, Recipe
from triage.training.batches import (
    blank_probability,
    cells,
    labels_of,
    predict,
    share,
    stacked,
)
from triage.training.dataset import (
    Example,
    data_hash,
    load_examples,
    shard_paths,
    shards_made_with,
)
from triage.training.evaluate import assess
from triage.training.figures import auroc

__all__ = ["HEADS", "full_loss", "head_loss", "train"]

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

FALSE_VETO_GOAL = 0.001
"""Share of hits that the threshold may veto, on frames kept apart for setting it."""

_APART = 5
"""Every fifth shard is kept apart: 0.001 of the hits asks for a thousand of them."""

_FAST_BATCH = 64
_FAST_LEARNING_RATE = 2e-3
_COARSER_SHARE = 0.4


def train(
    shards: Path,
    out: Path,
    *,
    test: Path | None = None,
    epochs: int = 8,
    fast_epochs: int = 40,
    seed: int = 0,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    threads: int = 2,
    name: str = "triagenet",
    command: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Train, calibrate, set the threshold, and write model and card into ``out``.

    Every fifth shard is kept apart for calibration and threshold. ``test``, a folder of shards
    with other crystals and detectors, is looked at once, at the end, for the card's validation.

    Args:
        epochs: passes of the full exit; a finished epoch is resumed from ``out/full.pt``.
        fast_epochs: passes of the fast exit, likewise from ``out/fast.pt``.
        say: told one line per epoch.

    Returns:
        The model_id.

    Raises:
        ModelError: too few shards, or ``out`` holds a run with other data or settings.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    recipe = Recipe()
    paths = shard_paths(shards)
    apart = paths[_APART - 1 :: _APART]
    if len(paths) < 2 * _APART:
        raise ModelError(
            f"{shards}: {len(paths)} shards; expected at least {2 * _APART}, as one in {_APART} "
            "is kept apart for calibration"
        )
    learned = [path for path in paths if path not in set(apart)]
    trained_on = data_hash(paths)
    _claim(
        out,
        {
            "data_hash": trained_on,
            "seed": seed,
            "epochs": epochs,
            "fast_epochs": fast_epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
        },
    )
    say(f"preparing {len(learned)} + {len(apart)} shards")
    examples, held = (
        list(
            load_examples(
                chosen,
                recipe,
                coarser_share=_COARSER_SHARE,
                variants=variants,
                seed=seed + part,
                threads=threads,
            )
        )
        for part, (chosen, variants) in enumerate(((learned, 2), (apart, 0)))
    )
    net = TriageNet(HEADS, radial_bins=recipe.radial_bins)
    net.standardise(torch.from_numpy(np.concatenate([e.counts for e in examples])))
    seen = [e.spots for e in examples if e.spots is not None]
    if seen:
        net.standardise_spots(torch.from_numpy(np.stack(seen)))
    fast_history = _fit_fast(net, examples, held, fast_epochs, seed, out / "fast.pt", say)
    history = _fit_full(
        net, examples, held, epochs, batch_size, learning_rate, seed, out / "full.pt", say
    )
    net.eval()
    outputs = predict(net, held)
    calibration = {
        head.name: _temperature(outputs[head.name][:, 0], labels_of(held, head.name))
        for head in HEADS
        if head.kind == "binary"
    }
    p_blank, labels = blank_probability(outputs, calibration), labels_of(held, "blank")
    threshold = _threshold(p_blank, labels)
    say(f"threshold {threshold:.4f}, calibration {calibration}")
    validation: dict[str, Any] = {}
    tables: dict[str, Any] = {
        "fast_history": fast_history,
        "history": history,
        "apart": {
            "hits": int((labels == 0.0).sum()),
            "blanks": int((labels == 1.0).sum()),
            "blanks_vetoed_share": share(p_blank[labels == 1.0] >= threshold),
        },
    }
    if test is not None:
        test_paths = shard_paths(test)
        validation, more = assess(net, test_paths, recipe, calibration, threshold, threads)
        validation["shards"] = shards_made_with(test)
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
                "fast_epochs": fast_epochs,
                "frames": len(examples) + len(held),
                "data_hash": trained_on,
                "shards": shards_made_with(shards),
            },
            "validation": validation,
            "tables": tables,
            "reference": reference_of(np.stack([e.inputs for e in held]), p_blank, threshold),
            "versions": {
                "braggtriage": __version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        },
    )


def _claim(out: Path, meant: dict[str, Any]) -> None:
    """Mark ``out`` as this run's, so that no other resumes from its states."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "run.json"
    if path.exists():
        found = json.loads(path.read_text())
        if found != meant:
            raise ModelError(
                f"{out}: holds a training run with {found}, asked for {meant}; use another folder, "
                "or empty it"
            )
    path.write_text(json.dumps(meant, indent=1) + "\n")


def _fit_fast(
    net: TriageNet,
    examples: Sequence[Example],
    held: Sequence[Example],
    epochs: int,
    seed: int,
    state_path: Path,
    say: Callable[[str], None],
) -> list[dict[str, float]]:
    """Panels and rings, from counts, candidates and radial views."""
    counts = torch.from_numpy(np.stack([e.counts for e in examples]))  # (N, variants, E)
    candidates = torch.from_numpy(np.stack([e.candidates for e in examples]))
    radial = torch.from_numpy(np.stack([e.radial for e in examples]))
    targets = {h.name: _targets(examples, h) for h in net.heads if h.exit == "fast"}
    ringed = [panel for name, panel in net.panels.items() if name != "blank"]
    optimizer = torch.optim.AdamW(
        [
            {"params": [*net.panels["blank"].parameters()], "weight_decay": 0.05},
            # The radial view is many numbers for few rings, and is learned by heart otherwise.
            {
                "params": [p for part in (net.rings, *ringed) for p in part.parameters()],
                "weight_decay": 0.5,
            },
        ],
        lr=_FAST_LEARNING_RATE,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs))

    def epoch_losses(rng: np.random.Generator) -> Iterator[float]:
        order = rng.permutation(len(examples))
        for first in range(0, len(order), _FAST_BATCH):
            rows = order[first : first + _FAST_BATCH]
            variant = rng.integers(counts.shape[1], size=len(rows))
            answers = net.members(
                net.standardised(counts[rows, variant]),
                candidates[rows, variant].float(),
                net.rings(_without_some_sectors(radial[rows], rng)),
            )
            total = torch.zeros(())
            for head in net.heads:
                if head.exit != "fast":
                    continue
                labels, weights = (t[rows] for t in targets[head.name])
                known = weights > 0
                if known.any():
                    # Each member answers for itself, or they would learn to lean on each other.
                    for raw in answers[head.name][known].unbind(1):
                        total = total + head_loss(head, raw, labels[known], weights[known])
            if not total.requires_grad:
                continue
            optimizer.zero_grad(set_to_none=True)
            total.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            yield float(total.detach())
        schedule.step()

    return _epochs(net, held, epochs, seed, epoch_losses, optimizer, schedule, state_path, say)


def _fit_full(
    net: TriageNet,
    examples: Sequence[Example],
    held: Sequence[Example],
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    state_path: Path,
    say: Callable[[str], None],
) -> list[dict[str, float]]:
    """Convolutions, tiles and trunk; the fast exit stays as it is."""
    chosen = [e for e in examples if e.overview is not None]
    fixed = {id(p) for p in [*net.panels.parameters(), *net.rings.parameters()]}
    parameters = [p for p in net.parameters() if id(p) not in fixed]
    steps = max(1, epochs * math.ceil(len(chosen) / batch_size))
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=steps + 1, pct_start=0.15
    )
    running: dict[str, float] = {}

    def epoch_losses(rng: np.random.Generator) -> Iterator[float]:
        for batch in _batches(chosen, batch_size, rng):
            loss = full_loss(net, batch, running, rng)
            if not loss.requires_grad:
                continue
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            schedule.step()
            yield float(loss.detach())

    return _epochs(
        net, held, epochs, seed, epoch_losses, optimizer, schedule, state_path, say, running
    )


def _epochs(
    net: TriageNet,
    held: Sequence[Example],
    epochs: int,
    seed: int,
    epoch_losses: Callable[[np.random.Generator], Iterator[float]],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    state_path: Path,
    say: Callable[[str], None],
    running: dict[str, float] | None = None,
) -> list[dict[str, float]]:
    """Run the epochs that ``state_path`` does not have yet; one record of figures for each."""
    running = {} if running is None else running
    history: list[dict[str, float]] = []
    phase = state_path.stem
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        running.update(state["running"])
        history = list(state["history"])
        say(f"{phase}: resuming after epoch {len(history)}")
    for epoch in range(len(history), epochs):
        began = time.monotonic()
        # Each epoch draws from its own seed, so a resumed run equals an uninterrupted one.
        rng = np.random.default_rng([seed, epoch])
        torch.manual_seed(int(rng.integers(2**31)))
        net.train()
        losses = list(epoch_losses(rng))
        net.eval()
        record = {"epoch": float(epoch), "loss": float(np.mean(losses)) if losses else math.nan}
        record |= _figures(net, held, full=phase == "full")
        record["seconds"] = time.monotonic() - began
        history.append(record)
        say(f"{phase} " + " ".join(f"{k} {v:.4g}" for k, v in record.items()))
        _show_on_board(state_path.parent / "tensorboard" / phase, record)
        part = state_path.with_suffix(".part")
        torch.save(
            {
                "net": net.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "running": running,
                "history": history,
            },
            part,
        )
        part.replace(state_path)
    return history


def _show_on_board(folder: Path, record: dict[str, float]) -> None:
    """Add an epoch to what TensorBoard shows, where it is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return
    with SummaryWriter(str(folder)) as board:
        for name, value in record.items():
            if name != "epoch":
                board.add_scalar(name, value, int(record["epoch"]))


def _figures(net: TriageNet, held: Sequence[Example], *, full: bool) -> dict[str, float]:
    """AUROC of the binary heads of one exit on the frames kept apart."""
    outputs = predict(net, held, full=full)
    figures = {}
    for head in net.heads:
        if head.kind == "binary" and (head.exit == "full") == full:
            labels, raw = labels_of(held, head.name), outputs[head.name][:, 0]
            known = np.isfinite(labels) & np.isfinite(raw)
            figures[f"auroc_{head.name}"] = auroc(raw[known], labels[known] > 0.5)
    return figures


def _targets(examples: Sequence[Example], head: Head) -> tuple[Tensor, Tensor]:
    """Labels and weights (N,) of a head; weight 0 where there is nothing to learn.

    A frame with a few visible spots is neither blank nor hit for the figures, but some of its
    crystal is there: to the blank head it is part of a hit, the more spots the larger.
    """
    labels = labels_of(examples, head.name)
    weights = np.isfinite(labels).astype(np.float64)
    if head.name == "blank":
        visible = np.nan_to_num(labels_of(examples, "n_visible"))
        part = ~np.isfinite(labels) & (visible > 0)
        weights[part] = np.minimum(1.0, visible[part] / HIT_SPOTS)
        labels[part] = 0.0
    return torch.from_numpy(np.nan_to_num(labels)).float(), torch.from_numpy(weights).float()


def _batches(
    examples: Sequence[Example], batch_size: int, rng: np.random.Generator
) -> list[list[Example]]:
    """Batches of frames of like size, so that little is padded; in random order."""
    order = rng.permutation(len(examples))
    pool = 16 * batch_size
    batches = []
    for first in range(0, len(order), pool):
        near = sorted(order[first : first + pool], key=lambda i: cells(examples[i]))
        batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    return [[examples[i] for i in batches[j]] for j in rng.permutation(len(batches))]


def _without_some_sectors(radial: Tensor, rng: np.random.Generator) -> Tensor:
    """A copy of (N, 3, sectors, bins) with up to half of each frame's sectors marked unseen."""
    n, _, sectors, _ = radial.shape
    share = 0.5 * rng.random((n, 1, 1, 1))
    return radial * torch.from_numpy(rng.random((n, 1, sectors, 1)) >= share).float()


def full_loss(
    net: TriageNet,
    batch: Sequence[Example],
    running: dict[str, float],
    rng: np.random.Generator,
) -> Tensor:
    """Sum over the heads of the full exit, each by its running mean, which is updated."""
    features, tiles, spots = stacked(net, batch, rng)
    outputs = net.full(features, tiles, spots)
    total = torch.zeros(())
    for head in net.heads:
        if head.exit != "full":
            continue
        labels, weights = _targets(batch, head)
        known = weights > 0
        if not known.any():
            continue
        loss = head_loss(head, outputs[head.name][known], labels[known])
        value = float(loss.detach())
        running[head.name] = 0.98 * running.get(head.name, value) + 0.02 * value
        total = total + loss / max(running[head.name], 1e-3) ** 0.5
    return total


def head_loss(head: Head, raw: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean loss of one head over frames whose label is known.

    Binary and cumulative (ordinal) heads: cross entropy, of binary heads weighted by frame.
    Regressions: Huber loss on the transformed quantity, as the tails of simulated labels are long.
    """
    if head.kind == "binary":
        return nnf.binary_cross_entropy_with_logits(raw[:, 0], labels, weights)
    if head.kind == "ordinal":
        steps = torch.arange(1, head.levels) + head.first - 0.5
        return nnf.binary_cross_entropy_with_logits(raw, (labels[:, None] > steps).float())
    if head.transform == "log":
        labels = labels.clamp(min=1e-3).log()
    elif head.transform == "inverse_square":
        labels = labels.clamp(min=0.5).pow(-2)
        return nnf.smooth_l1_loss(raw[:, 0] * 10.0, labels * 10.0)
    return nnf.smooth_l1_loss(raw[:, 0], labels)


def _temperature(logits: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Temperature and bias that make sigmoid(logit / t + b) fit held-out labels best."""
    known = np.isfinite(labels) & np.isfinite(logits)
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


def _threshold(p_blank: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    """The lowest threshold that vetoes at most the goal's share of the held-out hits."""
    hits = np.sort(p_blank[labels == 0.0])[::-1]
    if not hits.size:
        return 1.0
    allowed = int(FALSE_VETO_GOAL * hits.size)
    return float(min(1.0, np.nextafter(hits[allowed], 2.0)))

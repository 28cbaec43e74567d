"""Trains the default kind of model: the judge of spots, the fast exit, the full one, blank by its
spots, and a card at the end.

What the network reads of a frame is computed once and kept: maps, counts and lists of spots are
not learned, so an epoch is a few matrices a frame. The fast exit comes first, because what the
full exit learns must not change it.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from triage import __version__
from triage.audit.drift import reference_of
from triage.errors import ModelError
from triage.nets.model import BLANK_BY_SPOTS, load_model, save_model
from triage.nets.scorer import head_values
from triage.nets.triagenet import Head, JudgeLayers, TriageNet
from triage.records import Recipe
from triage.training.batches import (
    blank_probabilities,
    cells,
    labels_of,
    predict,
    share,
    stacked,
)
from triage.training.calibration import calibrated
from triage.training.dataset import (
    Example,
    data_hash,
    load_examples,
    shard_paths,
    shards_made_with,
)
from triage.training.evaluate import FALSE_VETO_GOAL, assess
from triage.training.figures import auroc, exit_thresholds, veto_threshold
from triage.training.judging import learn_judge
from triage.training.processes import Processes
from triage.training.targets import HEADS, class_weights, drawing_shares, head_loss, targets

__all__ = ["HEADS", "Settings", "full_loss", "train"]

_APART = 5
"""Every fifth shard is kept apart: 0.001 of the hits asks for a thousand of them."""
_APART_TO_STOP = 10
"""Every tenth, where another set gives calibration and threshold."""

_COARSER_SHARE = 0.4
_VARIANTS = 2
"""Changed copies of each frame."""
_PATIENCE = 12
"""Epochs without a better figure after which a phase ends."""
_SMOOTHED = 5
"""Epochs whose mean is that figure: one alone says more of the frames kept apart, which are few."""
_UNPLACED_SHARE = 0.25
"""Share of the frames that are shown to blank by spots without their geometry: it must not take
what is then missing for no crystal."""
_UNPLACED_SHARE_OF_FULL = 0.125
"""The same of the full exit, whose answers on most such frames are of less worth."""
_WOULD_VETO = 0.002
"""Share of the hits that blank by spots may call blank where its epochs are compared."""
_UNUSUAL = 0.001
"""Share of the training frames that the network is to call unlike them."""
_CONVOLUTION_BATCH = 16
_CONVOLUTION_RATE = 3e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What can be chosen of a training beside its frames; what a search chooses.

    Attributes:
        epochs, fast_epochs: most passes of the full exit and of the fast one.
        learning_rate, batch_size: of both.
        blank_decay, rings_decay, full_decay, spots_decay: weight decay of the parts, the last of
            blank by spots. The radial view is many numbers for few rings, and is learned by heart
            without much of it.
        convolution_epochs: passes of the convolutions, before what follows them; 0 = the full exit
            has none.
        copies: changed copies of whole frames to learn from, for each frame so many on average.
        seed: of everything drawn.
    """

    epochs: int = 60
    fast_epochs: int = 40
    learning_rate: float = 2e-3
    batch_size: int = 64
    blank_decay: float = 0.05
    rings_decay: float = 0.5
    full_decay: float = 0.2
    spots_decay: float = 0.5
    convolution_epochs: int = 0
    copies: float = 0.0
    seed: int = 0


def train(
    shards: Path,
    out: Path,
    *,
    settings: Settings | None = None,
    calibration: Path | None = None,
    test: Path | None = None,
    start: Path | None = None,
    search: int = 0,
    threads: int = 2,
    name: str = "triagenet",
    command: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Train, calibrate, set the threshold, and write model and card into ``out``.

    Interrupted runs go on after the last finished epoch. Under torchrun the processes share the
    frames, and the first one writes.

    Args:
        calibration: shards for temperatures and threshold, of other crystals and detectors;
            without them every fifth training shard is kept apart for that.
        test: shards that are looked at once, at the end, for the card's validation.
        start: folder of a model whose weights are the beginning, where they fit.
        search: trials of other settings before the training, by Optuna.
        say: told one line per epoch.

    Returns:
        The model_id.

    Raises:
        ModelError: too few shards, or ``out`` holds a run with other data or settings.
        EnvironmentLacksError: a search without Optuna.
    """
    settings = settings or Settings()
    processes = Processes.joined()
    if search and processes.number > 1:
        processes.leave()
        raise ModelError(
            f"a search by {processes.number} processes; expected one: search alone, then train "
            "with the settings it found"
        )
    if not processes.first:
        say = _silent
    try:
        torch.manual_seed(settings.seed)
        torch.set_num_threads(threads)
        paths = shard_paths(shards)
        each = _APART if calibration is None else _APART_TO_STOP
        if len(paths) < 2 * each:
            raise ModelError(
                f"{shards}: {len(paths)} shards; expected at least {2 * each}, as one in {each} "
                "is kept apart"
            )
        apart = paths[each - 1 :: each]
        learned = [path for path in paths if path not in set(apart)]
        trained_on = data_hash(paths)
        claim: dict[str, Any] = {"data_hash": trained_on, "processes": processes.number}
        claim |= asdict(settings) | {
            "search": search,
            "from": None if start is None else str(start),
        }
        if processes.first:
            _claim(out, claim)
        mine = learned[processes.rank :: processes.number]
        say(f"preparing {len(learned)} + {len(apart)} shards")
        convolutions = bool(settings.convolution_epochs)
        recipe = Recipe() if convolutions else replace(Recipe(), tiles=0)
        judge, told_apart = _judge(
            learned, recipe, settings, out / "judge.pt", processes, threads, say
        )

        def prepared(
            chosen: Sequence[Path],
            seed: int,
            coarser_share: float,
            variants: int = 0,
            copies: float = 0.0,
        ) -> list[Example]:
            return list(
                load_examples(
                    chosen,
                    recipe,
                    coarser_share=coarser_share,
                    variants=variants,
                    copies=copies,
                    convolutions=convolutions,
                    judge=judge.fixed(),
                    seed=seed,
                    workers=threads,
                )
            )

        seed = 1000 * settings.seed
        examples = prepared(mine, seed + processes.rank, _COARSER_SHARE, _VARIANTS, settings.copies)
        held = prepared(apart, seed + 999, _COARSER_SHARE)
        frames = processes.total(len(examples)) + len(held)
        run = _Run(examples, held, out, processes, say, start, judge)
        if search:
            from triage.training.search import searched

            settings = searched(run.trial, settings, out / "search.db", search, say)
        net, tables = run.whole(settings)
        tables["judge"] = told_apart
        if not processes.first:
            return ""
        fixing = held
        if calibration is not None:
            # As they are served.
            fixing = prepared(shard_paths(calibration), seed, 0.0)
        outputs = predict(net, fixing)
        temperatures, weights = calibrated(HEADS, outputs, fixing)
        labels = labels_of(fixing, "blank")
        fast, spots = blank_probabilities(HEADS, outputs, temperatures, weights)
        sure, threshold = exit_thresholds(fast, spots, labels, FALSE_VETO_GOAL)
        p_blank = np.where(fast >= sure, fast, spots)
        alone = veto_threshold(fast, labels, FALSE_VETO_GOAL)
        thresholds = {"p_blank_veto": threshold, "p_blank_sure": sure}
        say(f"thresholds {thresholds}, calibration {temperatures}, beside weigh {weights}")
        blank = labels == 1.0
        tables["apart"] = {
            "hits": int((labels == 0.0).sum()),
            "blanks": int(blank.sum()),
            "blanks_vetoed_share": share(p_blank[blank] >= threshold),
            "blanks_vetoed_by_the_fast_exit_alone_share": share(fast[blank] >= alone),
            "blanks_to_the_full_exit_share": share(fast[blank] < sure),
        }
        training = {
            "command": command,
            "settings": asdict(settings),
            "seed": settings.seed,
            "frames": frames,
            "data_hash": trained_on,
            "shards": shards_made_with(shards),
        }
        if calibration is not None:
            training["calibration_hash"] = data_hash(shard_paths(calibration))
            training["calibration_shards"] = shards_made_with(calibration)
        if start is not None:
            training["from"] = load_model(start, quantised=False).card.model_id
        validation: dict[str, Any] = {}
        if test is not None:
            validation, more = assess(
                net, shard_paths(test), recipe, temperatures, weights, thresholds, threads
            )
            validation["shards"] = shards_made_with(test)
            tables |= more
            say(json.dumps(validation))
        return save_model(
            out,
            net,
            name,
            {
                "recipe": recipe,
                "thresholds": thresholds,
                "calibration": temperatures,
                "beside_weights": weights,
                "training": training,
                "validation": validation,
                "tables": tables,
                "reference": reference_of(np.stack([e.inputs for e in fixing]), p_blank, threshold),
                "versions": {
                    "braggtriage": __version__,
                    "torch": torch.__version__,
                    "numpy": np.__version__,
                    "python": platform.python_version(),
                },
            },
        )
    finally:
        processes.leave()


def _silent(line: str) -> None:
    """What processes but the first say."""


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


def _judge(
    paths: Sequence[Path],
    recipe: Recipe,
    settings: Settings,
    state: Path,
    processes: Processes,
    threads: int,
    say: Callable[[str], None],
) -> tuple[JudgeLayers, dict[str, float]]:
    """The judge of spots, the same in every process, and its figures, which the first one has."""
    judge, figures = JudgeLayers(), {}
    if processes.first and state.exists():
        kept = torch.load(state, weights_only=True)
        judge.load_state_dict(kept["judge"])
        figures = dict(kept["figures"])
    elif processes.first:
        figures = learn_judge(judge, paths, recipe, seed=settings.seed, workers=threads, say=say)
        if not figures:
            say("no shard tells reflections: every spot is taken for a crystal's")
        part = state.with_suffix(".part")
        torch.save({"judge": judge.state_dict(), "figures": figures}, part)
        part.replace(state)
    judge.to(processes.device)
    processes.share([*judge.parameters()])
    return judge.cpu(), figures


_Answers = dict[str, Tensor]
"""By head, (rows, members, head.outputs): each member answers for itself, or they would learn to
lean on each other."""


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """Frames, and where a training of them leaves its states.

    Attributes:
        examples: this process's frames.
        held: frames kept apart, the same in every process.
        judge: by which the spots of all frames were judged.
    """

    examples: Sequence[Example]
    held: Sequence[Example]
    out: Path
    processes: Processes
    say: Callable[[str], None]
    start: Path | None
    judge: JudgeLayers

    def whole(self, settings: Settings) -> tuple[TriageNet, dict[str, Any]]:
        """The network after all phases, on the CPU, and the figures of their epochs."""
        net = self._begun(settings)
        tables: dict[str, Any] = {"fast_history": self._fast(net, settings, self.out / "fast.pt")}
        if settings.convolution_epochs:
            tables["convolutions_history"] = self._convolutions(
                net, settings, self.out / "convolutions.pt"
            )
        tables["history"] = self._full(net, settings, self.out / "full.pt")
        tables["blank_history"] = self._blank(net, settings, self.out / "blank.pt")
        net.eval()
        return net.cpu(), tables

    def trial(self, settings: Settings) -> float:
        """Mean of the phases' best figures, after short ones that leave nothing behind."""
        short = replace(
            settings,
            convolution_epochs=0,
            fast_epochs=max(1, settings.fast_epochs // 4),
            epochs=max(1, settings.epochs // 4),
        )
        net = self._begun(short)
        phases = (self._fast, self._full, self._blank)
        histories = [phase(net, short, None) for phase in phases]
        return float(np.mean([max(each["figure"] for each in history) for history in histories]))

    def _begun(self, settings: Settings) -> TriageNet:
        torch.manual_seed(settings.seed)
        net = TriageNet(
            HEADS, radial_bins=Recipe().radial_bins, convolutions=bool(settings.convolution_epochs)
        )
        counts = torch.from_numpy(np.concatenate([e.counts for e in self.examples]))
        listed = [e for e in self.examples if e.spots is not None]
        spots = torch.from_numpy(np.array([e.spots for e in listed], np.float32))
        net.standardise(counts)
        net.standardise_spots(spots, torch.from_numpy(labels_of(listed, "blank") == 0.0))
        net.bound_the_usual(counts, _UNUSUAL)
        if self.start is not None:
            taken = _taken_over(net, load_model(self.start, quantised=False).net)
            self.say(f"began with {taken} of {len(net.state_dict())} arrays of {self.start}")
        # Whatever it began with, these frames were judged by this one.
        net.judge.load_state_dict(self.judge.state_dict())
        net.to(self.processes.device)
        self.processes.share([*net.parameters(), *net.buffers()])
        return net

    def _fast(
        self, net: TriageNet, settings: Settings, state: Path | None
    ) -> list[dict[str, float]]:
        """Panels and rings, from counts, candidates and radial views."""
        device = self.processes.device
        counts = torch.from_numpy(np.stack([e.counts for e in self.examples]))
        candidates = torch.from_numpy(np.stack([e.candidates for e in self.examples]))
        radial = torch.from_numpy(np.stack([e.radial for e in self.examples]))
        ringed = [panel for name, panel in net.panels.items() if name != "blank"]
        groups = [
            {"params": [*net.panels["blank"].parameters()], "weight_decay": settings.blank_decay},
            {
                "params": [p for part in (net.rings, *ringed) for p in part.parameters()],
                "weight_decay": settings.rings_decay,
            },
        ]

        def answers(rows: NDArray[np.int64], rng: np.random.Generator) -> _Answers:
            variant = rng.integers(counts.shape[1], size=len(rows))
            rings = net.rings(net.rings.planes(_without_some_sectors(radial[rows], rng).to(device)))
            return net.members(
                net.standardised(counts[rows, variant].to(device)),
                candidates[rows, variant].to(device).float(),
                rings,
            )

        heads = [head for head in net.heads if head.exit == "fast"]
        parts = ("panels.", "rings.", "counts_", "unusual")
        phase = _Phase("fast", heads, groups, settings.fast_epochs, settings, parts)
        return self._learn(net, phase, range(len(self.examples)), answers, state)

    def _full(
        self, net: TriageNet, settings: Settings, state: Path | None
    ) -> list[dict[str, float]]:
        """The members of the full exit, from what lies before them; of some frames as if their
        geometry were not known, when nothing is told of rings."""
        device = self.processes.device
        chosen = [
            i
            for i, e in enumerate(self.examples)
            if e.spots is not None and (e.overview is not None or not net.convolutions)
        ]
        examples = [self.examples[i] for i in chosen]
        counts = torch.from_numpy(np.stack([e.counts for e in examples]))
        spots = _both_lists(examples)
        net.eval()
        radial = torch.from_numpy(np.stack([e.radial for e in examples]))
        with torch.no_grad():
            seen = self._seen(net, examples) if net.convolutions else None

        def answers(rows: NDArray[np.int64], rng: np.random.Generator) -> _Answers:
            variant = rng.integers(counts.shape[1], size=len(rows))
            unplaced = rng.random(len(rows)) < _UNPLACED_SHARE_OF_FULL
            rings = radial[rows]
            rings[torch.from_numpy(unplaced)] = 0.0
            return net.members_of_full(
                net.standardised(counts[rows, variant].to(device)),
                net.rings.planes(rings.to(device)),
                spots[rows, unplaced.astype(np.int64)].to(device),
                None if seen is None else seen[rows].to(device),
            )

        named = [*net.full_members.named_parameters()]
        groups = [
            {"params": [p for name, p in named if (".rings." in name) == ringed], "weight_decay": d}
            for ringed, d in ((True, settings.rings_decay), (False, settings.full_decay))
        ]
        phase = _Phase("full", net.full_heads, groups, settings.epochs, settings)
        return self._learn(net, phase, chosen, answers, state)

    def _blank(
        self, net: TriageNet, settings: Settings, state: Path | None
    ) -> list[dict[str, float]]:
        """Blank by spots, of all frames; of some as if their geometry were not known."""
        device = self.processes.device
        counts = torch.from_numpy(np.stack([e.counts for e in self.examples]))
        spots = _both_lists(self.examples)

        def answers(rows: NDArray[np.int64], rng: np.random.Generator) -> _Answers:
            variant = rng.integers(counts.shape[1], size=len(rows))
            unplaced = (rng.random(len(rows)) < _UNPLACED_SHARE).astype(np.int64)
            members = net.blank_members(
                net.standardised(counts[rows, variant].to(device)),
                spots[rows, unplaced].to(device),
            )
            return {BLANK_BY_SPOTS: members}

        heads = [head for head in net.heads if head.name == BLANK_BY_SPOTS]
        groups = [{"params": [*net.by_spots.parameters()], "weight_decay": settings.spots_decay}]
        phase = _Phase("blank", heads, groups, settings.epochs, settings)
        return self._learn(net, phase, range(len(self.examples)), answers, state)

    def _seen(self, net: TriageNet, examples: Sequence[Example]) -> Tensor:
        """(N, width) what the convolutions say, on the CPU."""
        order = sorted(range(len(examples)), key=lambda i: cells(examples[i]))
        found: list[Tensor] = [torch.empty(0)] * len(examples)
        for first in range(0, len(order), _CONVOLUTION_BATCH):
            rows = order[first : first + _CONVOLUTION_BATCH]
            features, tiles, _ = stacked(net, [examples[i] for i in rows], None)
            for i, each in zip(rows, net.seen(features, tiles).cpu(), strict=True):
                found[i] = each.clone()
        return torch.stack(found)

    def _learn(
        self,
        net: TriageNet,
        phase: _Phase,
        chosen: Sequence[int],
        answers: Callable[[NDArray[np.int64], np.random.Generator], _Answers],
        state: Path | None,
    ) -> list[dict[str, float]]:
        """Epochs of frames drawn by stratum, each head with its own loss.

        Args:
            chosen: which of the examples the rows of ``answers`` are.
        """
        processes, batch_size = self.processes, phase.settings.batch_size
        examples = [self.examples[i] for i in chosen]
        shares = drawing_shares(examples)
        known: dict[str, tuple[Tensor, Tensor]] = {}
        for head in phase.heads:
            labels, weights = targets(examples, head)
            weights = class_weights(head, labels, weights, shares)
            known[head.name] = labels.to(processes.device), weights.to(processes.device)
        parameters = [p for group in phase.groups for p in group["params"]]
        optimizer = torch.optim.AdamW(phase.groups, lr=phase.settings.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, phase.epochs))
        steps = max(1, math.ceil(processes.total(len(examples)) / (batch_size * processes.number)))

        def losses(rng: np.random.Generator) -> Iterator[float]:
            drawn = rng.choice(len(examples), size=(steps, batch_size), p=shares)
            for rows in drawn:
                found, total = answers(rows, rng), torch.zeros((), device=processes.device)
                for head in phase.heads:
                    labels, weights = (each[rows] for each in known[head.name])
                    there = weights > 0
                    if there.any():
                        for raw in found[head.name][there].unbind(1):
                            total = total + head_loss(head, raw, labels[there], weights[there])
                optimizer.zero_grad(set_to_none=True)
                if total.requires_grad:
                    total.backward()  # type: ignore[no-untyped-call]
                processes.average(parameters)
                optimizer.step()
                yield float(total.detach())
            schedule.step()

        return self._epochs(net, phase, losses, optimizer, schedule, state)

    def _convolutions(
        self, net: TriageNet, settings: Settings, state: Path
    ) -> list[dict[str, float]]:
        """The convolutions, with the members that the next phase learns further."""
        chosen = [e for e in self.examples if e.overview is not None]
        fixed = {id(p) for p in [*net.panels.parameters(), *net.rings.parameters()]}
        parameters = [p for p in net.parameters() if id(p) not in fixed]
        epochs = settings.convolution_epochs
        processes = self.processes
        each = _CONVOLUTION_BATCH * processes.number
        steps = max(1, math.ceil(processes.total(len(chosen)) / each))
        optimizer = torch.optim.AdamW(parameters, lr=_CONVOLUTION_RATE, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=_CONVOLUTION_RATE, total_steps=epochs * steps + 1, pct_start=0.15
        )
        running: dict[str, float] = {}

        def losses(rng: np.random.Generator) -> Iterator[float]:
            for batch in itertools.islice(_batches(chosen, rng), steps):
                loss = full_loss(net, batch, running, rng)
                optimizer.zero_grad(set_to_none=True)
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
                processes.average(parameters)
                nn.utils.clip_grad_norm_(parameters, 5.0)
                optimizer.step()
                schedule.step()
                yield float(loss.detach())

        phase = _Phase("convolutions", net.full_heads, [], epochs, settings)
        return self._epochs(net, phase, losses, optimizer, schedule, state, running)

    def _epochs(
        self,
        net: TriageNet,
        phase: _Phase,
        losses: Callable[[np.random.Generator], Iterator[float]],
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        state_path: Path | None,
        running: dict[str, float] | None = None,
    ) -> list[dict[str, float]]:
        """The epochs that ``state_path`` does not have yet, until the figure gets no better.

        ``net`` ends with the weights of the best epoch; what is returned has one record of
        figures for each.
        """
        processes, running = self.processes, {} if running is None else running
        history: list[dict[str, float]] = []
        best = copy.deepcopy(net.state_dict())
        if state_path is not None and state_path.exists():
            state = torch.load(state_path, weights_only=True, map_location=processes.device)
            _resume(net, state["net"], phase.parts)
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            running.update(state["running"])
            history, best = list(state["history"]), copy.deepcopy(net.state_dict())
            best |= _of_parts(state["best"], phase.parts)
            self.say(f"{phase.name}: resuming after epoch {len(history)}")
        for epoch in range(len(history), phase.epochs):
            if epoch - _best_of(history) > _PATIENCE:
                self.say(f"{phase.name}: no better for {_PATIENCE} epochs")
                break
            began = time.monotonic()
            # Each epoch draws from its own seed, so a resumed run equals an uninterrupted one.
            rng = np.random.default_rng([phase.settings.seed, epoch, processes.rank])
            torch.manual_seed(int(rng.integers(2**31)))
            net.train()
            found = list(losses(rng))
            net.eval()
            record = {"epoch": float(epoch), "loss": float(np.mean(found)) if found else math.nan}
            record |= _figures(net, self.held, phase.heads)
            record["figure"] = processes.from_first(record["figure"])
            record["seconds"] = time.monotonic() - began
            history.append(record)
            if _best_of(history) == epoch:
                best = copy.deepcopy(net.state_dict())
            self.say(f"{phase.name} " + " ".join(f"{k} {v:.4g}" for k, v in record.items()))
            if state_path is not None and processes.first:
                _show_on_board(state_path.parent / "tensorboard" / phase.name, record)
                part = state_path.with_suffix(".part")
                torch.save(
                    {
                        "net": net.state_dict(),
                        "best": best,
                        "optimizer": optimizer.state_dict(),
                        "schedule": schedule.state_dict(),
                        "running": running,
                        "history": history,
                    },
                    part,
                )
                part.replace(state_path)
        net.load_state_dict(best)
        return history


@dataclass(frozen=True, slots=True, eq=False)
class _Phase:
    """One part of a training: what learns, by which heads, and for how long.

    ``parts`` are beginnings of the names of the arrays that a state of it is asked for, so that
    one serves whatever comes after it; () for all.
    """

    name: str
    heads: Sequence[Head]
    groups: list[dict[str, Any]]
    epochs: int
    settings: Settings
    parts: tuple[str, ...] = ()


def _both_lists(examples: Sequence[Example]) -> Tensor:
    """(N, 2, S) float32 numbers of their spots, with and without their geometry."""
    both = [(e.spots, e.unplaced_spots) for e in examples]
    return torch.from_numpy(np.array(both, np.float32))


def _of_parts(state: Mapping[str, Tensor], parts: tuple[str, ...]) -> dict[str, Tensor]:
    """The arrays whose names begin with one of ``parts``; all for ()."""
    return {name: a for name, a in state.items() if not parts or name.startswith(parts)}


def _resume(net: TriageNet, state: Mapping[str, Tensor], parts: tuple[str, ...]) -> None:
    """Load the arrays of some parts; the others stay as they are."""
    net.load_state_dict(net.state_dict() | _of_parts(state, parts))


def _best_of(history: Sequence[Mapping[str, float]]) -> int:
    """Number of the epoch with the best smoothed figure, of equals the last; of none the last."""
    single = [each["figure"] for each in history]
    figures = [
        float(np.mean(single[max(0, i + 1 - _SMOOTHED) : i + 1])) for i in range(len(single))
    ]
    known = [i for i, figure in enumerate(figures) if math.isfinite(figure)]
    return max(known, key=lambda i: (figures[i], i)) if known else len(figures) - 1


def _taken_over(net: TriageNet, other: TriageNet) -> int:
    """Copy the weights of ``other`` that have a place of their shape in ``net``; how many."""
    own, theirs = net.state_dict(), other.state_dict()
    fitting = {k: v for k, v in theirs.items() if k in own and own[k].shape == v.shape}
    net.load_state_dict(fitting, strict=False)
    return len(fitting)


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


def _figures(net: TriageNet, held: Sequence[Example], heads: Sequence[Head]) -> dict[str, float]:
    """Figures of some heads on the frames kept apart.

    ``figure``, which says when to stop, is the mean over the heads of F1, averaged over classes,
    and of one less the median relative error of regressions. F1 of blank by spots is that of frames
    it would veto, if it might veto one hit in 500: at even odds it is right of nearly all.
    """
    outputs = predict(net, held, full=heads[0].exit == "full")
    figures: dict[str, float] = {}
    worth = []
    for head in heads:
        labels, weights = (each.numpy() for each in targets(held, head))
        raw = outputs[head.name]
        known = (weights > 0) & np.isfinite(raw).all(1)
        if head.label == "blank":
            known &= np.isfinite(labels_of(held, "blank"))
        if not known.any():
            continue
        # In grades, whatever levels it learns.
        truth = labels_of(held, head.label)[known] if head.steps else labels[known]
        values, truth = head_values(head, raw[known], {}), truth.astype(np.float64)
        if head.kind == "regression":
            error = float(np.median(np.abs(values / truth - 1.0)))
            figures[f"error_{head.name}"] = error
            worth.append(max(0.0, 1.0 - error))
            continue
        if head.kind == "binary":
            figures[f"auroc_{head.name}"] = auroc(raw[known, 0], truth > 0.5)
        called = np.rint(values)
        if head.name == BLANK_BY_SPOTS:
            called = (raw[known, 0] > _veto_logit(raw[known, 0], truth)).astype(np.float64)
        figures[f"f1_{head.name}"] = _macro_f1(called, truth)
        worth.append(figures[f"f1_{head.name}"])
    return figures | {"figure": float(np.mean(worth)) if worth else math.nan}


def _veto_logit(logits: NDArray[np.float64], blank: NDArray[np.float64]) -> float:
    """The logit above which frames are called blank, so that a stated share of the hits are."""
    hits = logits[blank < 0.5]
    return float(np.quantile(hits, 1.0 - _WOULD_VETO)) if hits.size else 0.0


def _macro_f1(called: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
    """Mean over the classes that occur of 2 TP / (2 TP + FP + FN)."""
    found = []
    for each in np.unique(truth):
        hit = float(((called == each) & (truth == each)).sum())
        found.append(2.0 * hit / float((called == each).sum() + (truth == each).sum()))
    return float(np.mean(found))


def _batches(examples: Sequence[Example], rng: np.random.Generator) -> Iterator[list[Example]]:
    """Batches of frames of like size, so that little is padded; in random order, without end."""
    pool, size = 16 * _CONVOLUTION_BATCH, _CONVOLUTION_BATCH
    while examples:
        order = rng.permutation(len(examples))
        batches = []
        for first in range(0, len(order), pool):
            near = sorted(order[first : first + pool], key=lambda i: cells(examples[i]))
            batches += [near[i : i + size] for i in range(0, len(near), size)]
        for j in rng.permutation(len(batches)):
            yield [examples[i] for i in batches[j]]


def _without_some_sectors(radial: Tensor, rng: np.random.Generator) -> Tensor:
    """A copy of (N, 5, sectors, bins) with up to half of each frame's sectors marked unseen."""
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
    device = net.counts_mean.device
    total = torch.zeros((), device=device)
    for head in net.full_heads:
        labels, weights = (each.to(device) for each in targets(batch, head))
        known = weights > 0
        if not known.any():
            continue
        loss = head_loss(head, outputs[head.name][known], labels[known], weights[known])
        value = float(loss.detach())
        running[head.name] = 0.98 * running.get(head.name, value) + 0.02 * value
        total = total + loss / max(running[head.name], 1e-3) ** 0.5
    return total

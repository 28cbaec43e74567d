"""What is measured of this program: the one place that knows how its parts are called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from triage.backends import Backend, open_backend
from triage.backends.cpu import CpuBackend
from triage.bench.frames import Pool, stamped
from triage.bench.measure import Call
from triage.errors import ConfigError, TriageError
from triage.ingest.files import Files
from triage.ingest.stream2 import Stream2Parser
from triage.metrics import Metrics
from triage.nets.model import Model, load_model
from triage.nets.scorer import Scorer
from triage.pipeline import Decider
from triage.policy import Policy
from triage.records import (
    MOST_SPOTS,
    CloseUps,
    Frame,
    Reason,
    Recipe,
    Scores,
    Spot,
    Views,
)

__all__ = [
    "VETO_FROM",
    "Ours",
    "decide",
    "decide_by_fast_exit",
    "decide_frames",
    "kernels",
    "multiply_adds",
    "opened",
    "parse",
    "prepare",
    "prepared",
    "read_through",
    "recorded_frames",
    "reduce_integers",
    "started_parser",
    "wants_full_exit",
]


VETO_FROM = 0.5
"""``p_blank`` from which a synthetic frame is vetoed here: frames with spots lie far below it and
frames without far above, whatever their size, so that a mix of 90 % blanks is one to the pipeline.
The threshold of the card is stricter than some large synthetic blanks pass."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ours:
    """Backend, scorer and policy of one worker, as ``triage run`` builds them."""

    model: Model
    backend: Backend
    scorer: Scorer
    policy: Policy

    @property
    def recipe(self) -> Recipe:
        """The model's input."""
        return self.model.card.recipe


def opened(runtime: str = "auto") -> Ours:
    """The default model, warmed up; no audit, no heads beyond need, :data:`VETO_FROM`."""
    model = load_model()
    scorer = Scorer(model, runtime=runtime)
    scorer.warm_up()
    return Ours(
        model=model,
        backend=open_backend("cpu", model.card.recipe, recycle=True),
        scorer=scorer,
        policy=Policy(p_blank_veto=VETO_FROM, audit_fraction=0.0),
    )


def kernels(recipe: Recipe, kind: str = "auto") -> CpuBackend:
    """A backend whose reduction is by ``c``, by ``numba``, or by the better of what is there."""
    return CpuBackend(recipe, kernels=kind, recycle=True)


def started_parser(pool: Pool) -> Stream2Parser:
    """A parser that has seen the pool's start message as series 1.

    Raises:
        ConfigError: the message is not understood.
    """
    parser = Stream2Parser()
    message = parser.parse([stamped(pool.start, 1)], 0)
    if message.series is None:
        raise ConfigError(f"start message of {pool.spec.name}: {message.detail}")
    return parser


def numbered(pool: Pool) -> list[bytes]:
    """The image messages of series 1."""
    return [stamped(template, 1, i) for i, template in enumerate(pool.templates)]


def parse(pool: Pool) -> Call:
    """The message walk and the book of series, on image message i."""
    parser, messages = started_parser(pool), numbered(pool)
    return lambda i: parser.parse([messages[i]], 0)


def reduce_integers(pool: Pool, backend: CpuBackend) -> Call:
    """Payload i to the recipe's integers: masked maximum, exact sum and count of each cell."""
    return lambda i: backend.reduce(pool.frames[i])


def prepare(pool: Pool, subject: Ours) -> Call:
    """Payload i to the network's views."""
    return lambda i: subject.backend.prepare([pool.frames[i]])


def prepared(recipe: Recipe, frames: Sequence[Frame]) -> list[Views]:
    """The views of every frame, each in a batch and in memory of its own."""
    backend = CpuBackend(recipe)
    return [backend.prepare([frame]) for frame in frames]


def decide(pool: Pool, subject: Ours) -> Call:
    """Message i to decision by the pipeline's own decider: with the full exit where it is asked.

    That is for frames that are kept, and for those of which the fast exit is not sure.
    """
    parser, messages = started_parser(pool), numbered(pool)
    decide_one = _decider_of(subject, pool.frames)
    return lambda i: decide_one(_frame_of(parser, messages[i]))


def decide_by_fast_exit(pool: Pool, subject: Ours) -> Call:
    """Message i through parse, reduce, fast exit and policy, which is no decision where the fast
    exit is not sure."""
    parser, messages = started_parser(pool), numbered(pool)

    def decided(i: int) -> object:
        frame = _frame_of(parser, messages[i])
        scores = subject.scorer.fast(subject.backend.prepare([frame]))
        return subject.policy.judge(frame, scores[0])

    return decided


def decide_frames(frames: Sequence[Frame], subject: Ours) -> Call:
    """Frame i through the pipeline's own decider."""
    decide_one = _decider_of(subject, frames)
    return lambda i: decide_one(frames[i])


def _decider_of(subject: Ours, frames: Sequence[Frame]) -> Callable[[Frame], object]:
    """A decider that scores these frames: one that fails open is fast, and not what is measured.

    Raises:
        TriageError: a frame is decided without a score.
    """
    decider = Decider(subject.backend, subject.scorer, subject.policy, Metrics())
    for judgement in decider.decide(frames):
        if judgement.reason is not Reason.SCORE:
            raise TriageError(f"bench: a frame is not scored: {judgement.detail}")
    return lambda frame: decider.decide([frame])


def wants_full_exit(subject: Ours, frame: Frame, scores: Scores) -> bool:
    """Whether the policy asks for the full exit on a frame with these scores of the fast one."""
    verdict, _ = subject.policy.judge(frame, scores)
    return subject.policy.wants_full_exit(verdict, audited=False)


def recorded_frames(master: Path, count: int) -> list[Frame]:
    """The first frames of a recorded run, compressed, with memory of their own."""
    source = Files([master])
    try:
        frames: list[Frame] = []
        while len(frames) < count and not source.exhausted:
            frames += [m.frame for m in source.receive(0) if m.frame is not None]
        return frames[:count]
    finally:
        source.close()


def read_through(master: Path) -> int:
    """Read every frame of a recorded run as the pipeline does; how many there were."""
    source = Files([master])
    try:
        frames = 0
        while not source.exhausted:
            frames += sum(message.frame is not None for message in source.receive(0))
        return frames
    finally:
        source.close()


def _frame_of(parser: Stream2Parser, message: bytes) -> Frame:
    parsed = parser.parse([message], 0)
    if parsed.frame is None or parsed.frame.fault is not None:
        raise ConfigError(f"image message: {parsed.detail}; expected a frame without fault")
    return parsed.frame


def multiply_adds(model: Model, views: Views) -> tuple[int, int]:
    """Multiply-adds of the convolutions and matrix products of either exit on one frame."""
    import torch
    from torch import nn

    counted = [0, 0]
    at = 0

    def count(module: Any, _inputs: Any, output: torch.Tensor) -> None:
        weight: torch.Tensor = module.weight
        counted[at] += output.numel() * weight.numel() // weight.shape[0]

    layers = (nn.Conv1d, nn.Conv2d, nn.Linear)
    hooks = [
        module.register_forward_hook(count)
        for module in model.net.modules()
        if isinstance(module, layers)
    ]
    try:
        reference = Scorer(model, runtime="torch")
        scores = reference.fast(views)
        at = 1
        r = model.card.recipe
        close_ups = CloseUps(
            tiles=np.zeros((1, r.tiles, 2, r.tile_px, r.tile_px), np.float32),
            spots=np.zeros((1, MOST_SPOTS, len(Spot)), np.float32),
            geometry=(None,),
            shape=((1, 1),),
        )
        reference.full(views, close_ups, [0], scores)
    finally:
        for hook in hooks:
            hook.remove()
    return counted[0], counted[1]

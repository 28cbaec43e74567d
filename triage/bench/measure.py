"""Times several ways of doing the same thing, in turns, by the CPU's clock.

Wall time on a shared machine says how busy the neighbours are, and two runs one after the other
say how much the machine has drifted between them. So every candidate takes its turn on every
frame, its CPU time is added up over the frames, and ratios are taken round by round.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Call", "Ratio", "Samples", "SelfTimed", "alternate", "load_average", "ratio"]

_SHORTEST_SAMPLE_S = 200e-6
"""Reading the clock costs about a microsecond; shorter work is repeated inside a sample."""

_LEAST_ROUNDS = 5
_MOST_ROUNDS = 400

Call = Callable[[int], object]
"""Does the work on frame i."""


@dataclass(frozen=True, slots=True)
class SelfTimed:
    """Work in another process, which says itself how many CPU seconds frame i took."""

    seconds: Callable[[int], float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """CPU seconds per frame of one candidate, one number a round."""

    per_frame_s: NDArray[np.float64]

    @property
    def median_s(self) -> float:
        """The figure to quote."""
        return float(np.median(self.per_frame_s))

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """A quarter of the rounds lies below the first and above the second."""
        low, high = np.quantile(self.per_frame_s, [0.25, 0.75])
        return float(low), float(high)

    def __add__(self, other: Samples) -> Samples:
        """Both one after the other, round by round of the same measurement."""
        return Samples(per_frame_s=self.per_frame_s + other.per_frame_s)

    @property
    def rounds(self) -> int:
        """How often every frame was timed."""
        return int(self.per_frame_s.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One candidate over another: median and quartiles of the ratio by round.

    By round, because both sides of a round saw the machine in the same mood.
    """

    value: float
    low: float
    high: float
    rounds: int


def alternate(
    candidates: Mapping[str, Call | SelfTimed],
    frames: int,
    *,
    budget_s: float,
    clock: Callable[[], float] = time.thread_time,
    wall: Callable[[], float] = time.monotonic,
) -> dict[str, Samples]:
    """CPU time of each candidate per frame, candidates taking turns on every frame.

    Args:
        candidates: by name; each is called once per frame outside the timing first, so that
            compiling and first allocations are not counted.
        frames: a round is frames 0 to ``frames`` - 1.
        budget_s: wall seconds after which no round begins; at least five are done all the same.
        clock: CPU time of this thread, or ``time.process_time`` where a candidate works in
            threads of its own.
    """
    repeats = {name: _warmed_up(call, frames, clock) for name, call in candidates.items()}
    names = list(candidates)
    rounds: dict[str, list[float]] = {name: [] for name in names}
    until_s = wall() + budget_s
    with _no_garbage_collection():
        while len(rounds[names[0]]) < _MOST_ROUNDS:
            if len(rounds[names[0]]) >= _LEAST_ROUNDS and wall() >= until_s:
                break
            spent = dict.fromkeys(names, 0.0)
            for i in range(frames):
                # Who goes first changes from frame to frame: what one leaves in the cache
                # helps or harms each of the others as often.
                for name in names[i % len(names) :] + names[: i % len(names)]:
                    spent[name] += _timed(candidates[name], i, repeats[name], clock)
            for name in names:
                rounds[name].append(spent[name] / frames)
    return {name: Samples(per_frame_s=np.array(values)) for name, values in rounds.items()}


def ratio(of: Samples, over: Samples) -> Ratio:
    """``of`` over ``over``, which were measured in the same rounds."""
    by_round = of.per_frame_s / over.per_frame_s
    low, value, high = np.quantile(by_round, [0.25, 0.5, 0.75])
    return Ratio(value=float(value), low=float(low), high=float(high), rounds=by_round.size)


def load_average() -> float | None:
    """Processes that wanted to run over the last minute; None where the system does not tell."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def _timed(call: Call | SelfTimed, i: int, repeat: int, clock: Callable[[], float]) -> float:
    if isinstance(call, SelfTimed):
        return call.seconds(i)
    began = clock()
    for _ in range(repeat):
        call(i)
    return (clock() - began) / repeat


def _warmed_up(call: Call | SelfTimed, frames: int, clock: Callable[[], float]) -> int:
    """Call once per frame; how many calls make a sample long enough to time."""
    if isinstance(call, SelfTimed):
        for i in range(frames):
            call.seconds(i)
        return 1
    shortest_s = float("inf")
    for i in range(max(frames, 3)):
        began = clock()
        call(i % frames)
        shortest_s = min(shortest_s, clock() - began)
    return max(1, min(1000, round(_SHORTEST_SAMPLE_S / max(shortest_s, 1e-7))))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()

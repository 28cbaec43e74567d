"""What state a run is in, and what is wrong with it: one word, and reasons from a closed set.

A reason is given by whoever sees the trouble and taken back by whoever sees it gone. Troubles
that show in the counts of frames alone are found by :meth:`Health.watch`, which costs the way of
a frame nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from enum import StrEnum
from time import monotonic_ns
from typing import Protocol

from triage.records import Reason

__all__ = ["STATES", "Health", "HealthMetrics", "Trouble"]

log = logging.getLogger(__name__)

STATES = ("starting", "ready", "armed", "degraded", "draining", "stopped")

_QUIET_NS = 5_000_000_000
"""Without a frame of a reason for so long, its trouble is over."""

_JOINED = -1
"""Stands for the lane of a series that was joined in its middle."""


class Trouble(StrEnum):
    """Why a run is degraded. Frames go on in all of them."""

    NO_DETECTOR = "no_detector"
    """Nobody is connected at the source's address, or at one of several."""
    NO_WRITER = "no_writer"
    """Nobody is connected at the forwarder's address, or at one of several."""
    PORT_SILENT = "port_silent"
    """Some ports of a detector are dead: frames are decided by what the others send."""
    WRITER_LOST = "writer_lost"
    """One of several writers is left out, and the others go on."""
    WRITER_STALLED = "writer_stalled"
    """The writer takes no messages; frames queue up to the byte budget."""
    OVERLOAD = "overload"
    """More comes than can be scored."""
    LATE = "late"
    """Scores come after the deadline, or not at all."""
    SCORER_FAILING = "scorer_failing"
    """The network or what feeds it fails."""
    DEVICE_LOST = "device_lost"
    """The accelerator fails."""
    WORKER_LOST = "worker_lost"
    """A thread has ended."""
    WORKERS_HUNG = "workers_hung"
    """Every thread that decides hangs."""
    JOURNAL_FAILING = "journal_failing"
    """Drops cannot be written down, so nothing is dropped."""
    OUTPUT_FAILING = "output_failing"
    """The table or the file of kept frames cannot be written."""
    GATE_OPEN = "gate_open"
    """Nothing is dropped: the audit found harm, or an operator asked for it."""
    SHADOW_HELD = "shadow_held"
    """Nothing is dropped, whatever mode is set: an operator asked for it."""


_BY_REASON = {
    Reason.OVERLOAD: Trouble.OVERLOAD,
    Reason.LATE: Trouble.LATE,
    Reason.SCORER_ERROR: Trouble.SCORER_FAILING,
    Reason.DEVICE_LOST: Trouble.DEVICE_LOST,
}


class HealthMetrics(Protocol):
    """Where the state is shown; ``triage.metrics.Metrics`` is one."""

    def state(self, state: str) -> None: ...

    def degraded(self, reasons: Collection[str]) -> None: ...

    def series_running(self, count: int) -> None: ...


class Health:
    """The state of one run. Every method may be called from any thread, none from a signal
    handler.

    Args:
        metrics: told of each change.
    """

    def __init__(
        self, metrics: HealthMetrics | None = None, clock: Callable[[], int] = monotonic_ns
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._lock = threading.RLock()
        self._phase = "starting"
        self._series: dict[int, tuple[int, str]] = {}
        self._troubles: dict[Trouble, str] = {}
        self._counts: dict[Reason, int] = {}
        self._last_ns: dict[Reason, int] = {}
        self._scored_then: dict[Reason, int] = {}
        self._show()

    @property
    def state(self) -> str:
        """One of :data:`STATES`: ``armed`` while a series runs, ``degraded`` while anything is
        wrong."""
        with self._lock:
            if self._phase != "ready":
                return self._phase
            if self._troubles:
                return "degraded"
            return "armed" if self._series else "ready"

    @property
    def series(self) -> list[tuple[int, str]]:
        """The series that are running: (series_id, series_unique_id)."""
        with self._lock:
            return list(dict.fromkeys(self._series.values()))

    @property
    def troubles(self) -> dict[str, str]:
        """What is wrong now: reason and what was seen."""
        with self._lock:
            return {trouble.value: detail for trouble, detail in self._troubles.items()}

    def enter(self, phase: str) -> None:
        """Say where the run stands: ``ready`` to receive, ``draining`` or ``stopped``."""
        with self._lock:
            # A drain may be asked for before the run has begun: there is no way back from it.
            if STATES.index(phase) > STATES.index(self._phase):
                self._phase = phase
                self._show()

    def started(self, lane: int, key: tuple[int, str]) -> None:
        """A series runs on a lane; what ran there before has ended, told or not."""
        with self._lock:
            self._series.pop(_JOINED, None)
            self._series[lane] = key
            self._show()

    def joined(self, key: tuple[int, str]) -> None:
        """Frames come of a series whose start was not seen."""
        with self._lock:
            self._series[_JOINED] = key
            self._show()

    def ended(self, key: tuple[int, str]) -> None:
        """A series has ended."""
        with self._lock:
            self._series = {lane: other for lane, other in self._series.items() if other != key}
            self._show()

    def add(self, trouble: Trouble, detail: str) -> None:
        """Something is wrong; said once, until it is cleared."""
        with self._lock:
            known = trouble in self._troubles
            self._troubles[trouble] = detail
            if known:
                return
            self._show()
        log.warning("degraded, %s: %s", trouble.value, detail)

    def clear(self, trouble: Trouble) -> None:
        """It is wrong no more."""
        if trouble not in self._troubles:
            return
        with self._lock:
            detail = self._troubles.pop(trouble, None)
            self._show()
        if detail is not None:
            log.warning("no longer degraded, %s", trouble.value)

    def watch(self, counts: Mapping[Reason, int]) -> None:
        """Find and clear what shows in the counts of frames by reason.

        A trouble is cleared when there has been no further such frame for five seconds, and,
        where it means that scores fail, a frame was scored since.

        Args:
            counts: frames released so far.
        """
        with self._lock:
            now_ns = self._clock()
            scored = counts.get(Reason.SCORE, 0)
            for reason, trouble in _BY_REASON.items():
                count = counts.get(reason, 0)
                new = count - self._counts.get(reason, 0)
                if new > 0:
                    self._counts[reason], self._last_ns[reason] = count, now_ns
                    self._scored_then[reason] = scored
                    self.add(
                        trouble, f"frames go on unscored, {new} more with reason {reason.value!r}"
                    )
                elif trouble in self._troubles and now_ns - self._last_ns[reason] >= _QUIET_NS:
                    recovered = scored > self._scored_then[reason]
                    if recovered or reason is Reason.OVERLOAD:
                        self.clear(trouble)

    def _show(self) -> None:
        if self._metrics is not None:
            self._metrics.state(self.state)
            self._metrics.degraded(frozenset(self._troubles))
            self._metrics.series_running(len(self.series))

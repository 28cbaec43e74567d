"""The audit: a sample of vetoed frames, looked at once more by a spot finder of its own.

What the network drops is gone, so its word is checked by something that shares nothing with it,
off the way of the frames. When the sample shows that hits are being vetoed, the gate opens, and
from then on nothing is dropped until a person has looked and said so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from triage.audit.finder import Spots, crystal_spots, find_spots
from triage.binomial import clopper_pearson, lower_bound
from triage.errors import TriageError
from triage.records import HIT_SPOTS, LEAST_VALID, AuditReport, Frame, Geometry

__all__ = ["Audit", "AuditMetrics", "Watch"]

log = logging.getLogger(__name__)

_LOOK_EVERY = 100
_CONFIDENCE = 0.9999
_RECENT = 500
_QUEUE_BYTES = 256 << 20

_NICENESS = 10
"""A tenth of the share of a thread that decides, where both want a core; all of an idle one."""

_BLOCK_FRAMES = 16
"""Frames of one size that are judged together, so that bad pixels can be told from spots."""
_LASTING_FRAMES = 5
"""A place that shows a spot on so many frames of a block is a bad pixel."""
_SIZES_KEPT = 4
"""Frame sizes whose bad pixels are remembered; of more the oldest is forgotten."""
_NEAR = np.array([(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)])


class AuditMetrics(Protocol):
    """Where the audit's counts are shown; ``triage.metrics.Metrics`` is one."""

    def audit(self, report: AuditReport) -> None: ...


class Watch:
    """Counts what the finder says of vetoed frames, and decides when that is evidence of harm.

    After every 100 audited frames the gate opens when the one-sided 99.99 % lower bound of the
    share of hits exceeds ``limit``: of all frames so far, or of the last 500, so that harm that
    begins late in a long run is not averaged away. It does not close again.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.audited = 0
        self.hits = 0
        self.gate_open = False
        self._recent: deque[bool] = deque(maxlen=_RECENT)

    def add(self, is_hit: bool) -> None:
        """Enter one audited frame."""
        self.audited += 1
        self.hits += is_hit
        self._recent.append(is_hit)
        if self.gate_open or self.audited % _LOOK_EVERY:
            return
        self.gate_open = (
            max(
                lower_bound(self.hits, self.audited, _CONFIDENCE),
                lower_bound(sum(self._recent), len(self._recent), _CONFIDENCE),
            )
            > self.limit
        )


@dataclass(slots=True, eq=False)
class _Block:
    """Frames of one size that are judged together, and the bad pixels of the block before."""

    shape: tuple[int, int]
    bad: NDArray[np.bool_]
    held: list[tuple[Spots, Geometry | None]] = field(default_factory=list)

    def judged(self) -> list[bool]:
        """Which of the held frames are hits; they are let go.

        A place that shows a spot on five of them is a bad pixel: no crystal repeats itself.
        """
        held, self.held = self.held, []
        seen = np.zeros(self.shape, np.uint8)
        for spots, _ in held:
            y, x = _pixels(spots)
            # A spot's middle may move by a pixel from frame to frame.
            near_y = np.clip(y[:, None] + _NEAR[:, 0], 0, self.shape[0] - 1)
            near_x = np.clip(x[:, None] + _NEAR[:, 1], 0, self.shape[1] - 1)
            seen.ravel()[np.unique(near_y * self.shape[1] + near_x)] += 1
        lasting = seen >= _LASTING_FRAMES
        bad = lasting | self.bad
        if len(held) == _BLOCK_FRAMES:
            self.bad = lasting
        return [
            crystal_spots(spots.where(~bad[_pixels(spots)]), self.shape, geometry) >= HIT_SPOTS
            for spots, geometry in held
        ]


def _stand_back() -> None:
    """Let the frames have the processor first: a finder takes half a second for 4M pixels.

    On Linux a thread has a niceness of its own. Elsewhere, or where it may not be set, the audit
    runs as it is.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):
            least = os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS
            os.setpriority(os.PRIO_PROCESS, thread, min(least, 19))


def _pixels(spots: Spots) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return spots.y_px.astype(np.int64), spots.x_px.astype(np.int64)


class Audit:
    """Finds spots on offered frames in a thread of its own, off the way of the frames.

    Args:
        measured: (counts, valid) of a frame, both (y, x); called from the audit's thread only.
        limit: share of hits among vetoed frames that is harm, 0..1.
        metrics: told after each block of frames.
        patient: look at each frame before :meth:`offer` returns, and skip none; for recorded
            runs, so that the same run always ends alike.
    """

    def __init__(
        self,
        measured: Callable[[Frame], tuple[NDArray[Any], NDArray[np.bool_]]],
        *,
        limit: float,
        metrics: AuditMetrics | None = None,
        patient: bool = False,
    ) -> None:
        self._measured = measured
        self._metrics = metrics
        self._patient = patient
        self._watch = Watch(limit)
        self._blocks: dict[tuple[int, int], _Block] = {}
        self._changed = threading.Condition()
        self._waiting: deque[Frame] = deque()
        self._waiting_bytes = 0
        self._busy = False
        self._skipped = 0
        self._unreadable = 0
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="audit", daemon=True)
        self._thread.start()

    @property
    def gate_open(self) -> bool:
        """Whether the sample showed harm; then nothing may be dropped."""
        return self._watch.gate_open

    def set_limit(self, share: float) -> None:
        """Judge harm by another limit from the next look on; an open gate stays open."""
        with self._changed:
            self._watch.limit = share

    def offer(self, frame: Frame) -> None:
        """Take one vetoed frame into the sample; it is skipped when too much waits already."""
        size = frame.size_bytes
        with self._changed:
            if self._closing or (self._waiting and not self._fits(size)):
                self._skipped += 1
                return
            self._waiting.append(frame)
            self._waiting_bytes += size
            self._changed.notify_all()
        while self._patient and self._thread.is_alive() and not self.wait(1.0):
            pass

    def _fits(self, size: int) -> bool:
        return self._waiting_bytes + size <= _QUEUE_BYTES

    def report(self) -> AuditReport:
        """The counts now, with the 95 % interval of the share of hits."""
        with self._changed:
            watch = self._watch
            audited, hits, is_open = watch.audited, watch.hits, watch.gate_open
            skipped, unreadable = self._skipped, self._unreadable
        low, high = clopper_pearson(hits, audited)
        return AuditReport(
            audited=audited,
            hits=hits,
            hit_share_low=low,
            hit_share_high=high,
            skipped=skipped,
            unreadable=unreadable,
            limit=watch.limit,
            gate_open=is_open,
        )

    def wait(self, timeout_s: float) -> bool:
        """Wait until nothing is waiting to be looked at; False when the time was too short."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._closing or (not self._waiting and not self._busy), timeout_s
            )

    def finish(self) -> AuditReport:
        """Judge what was looked at, count the rest as skipped; the report of the whole run."""
        self.close()
        if self._thread.is_alive():
            with self._changed:
                self._skipped += self._busy + sum(len(b.held) for b in self._blocks.values())
        else:
            for block in self._blocks.values():
                self._judge(block)
        return self.report()

    def close(self) -> None:
        """Stop; frames still waiting count as skipped. May be called twice."""
        with self._changed:
            self._closing = True
            self._skipped += len(self._waiting)
            self._waiting.clear()
            self._waiting_bytes = 0
            self._changed.notify_all()
        self._thread.join(timeout=5.0)

    def _work(self) -> None:
        if not self._patient:
            _stand_back()
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                frame = self._waiting.popleft()
                self._waiting_bytes -= frame.size_bytes
                self._busy = True
            self._look(frame)

    def _look(self, frame: Frame) -> None:
        try:
            counts, valid = self._measured(frame)
            usable = bool(valid.mean() >= LEAST_VALID) if valid.size else False
            spots = find_spots(counts, valid)
        except Exception as err:  # the audit must outlive any one frame
            usable = False
            if not isinstance(err, TriageError):
                log.exception("audit: image %d could not be looked at", frame.image_id)
        if not usable:
            with self._changed:
                self._unreadable += 1
            return
        block = self._of_size((int(counts.shape[0]), int(counts.shape[1])))
        block.held.append((spots, frame.series.geometry))
        if len(block.held) == _BLOCK_FRAMES:
            self._judge(block)

    def _of_size(self, shape: tuple[int, int]) -> _Block:
        block = self._blocks.get(shape)
        if block is None:
            if len(self._blocks) == _SIZES_KEPT:
                self._judge(self._blocks.pop(next(iter(self._blocks))))
            block = self._blocks[shape] = _Block(shape, np.zeros(shape, np.bool_))
        return block

    def _judge(self, block: _Block) -> None:
        answers = block.judged()
        was_open = self._watch.gate_open
        with self._changed:
            for is_hit in answers:
                self._watch.add(is_hit)
        report = self.report()
        if self._metrics is not None:
            self._metrics.audit(report)
        if report.gate_open and not was_open:
            log.error(
                "audit: %d of %d vetoed frames look like hits, more than the limit of %.2f %%; "
                "from here on nothing is dropped; look at the vetoed frames, raise the threshold "
                "or change the model, and start again",
                report.hits,
                report.audited,
                100.0 * report.limit,
            )

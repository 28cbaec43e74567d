"""The audit: a sample of vetoed frames, looked at once more by a spot finder of its own.

What the network drops is gone, so its word is checked by something that shares nothing with it,
off the way of the frames. When the sample shows that hits are being vetoed, the gate opens, and
from then on nothing is dropped until a person has looked and started the run anew.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from triage.audit.finder import HIT_SPOTS, Spots, crystal_spots, find_spots
from triage.binomial import clopper_pearson, lower_bound
from triage.errors import TriageError
from triage.records import AuditReport, Frame, Geometry

__all__ = ["Audit", "AuditMetrics", "Watch"]

log = logging.getLogger(__name__)

_LOOK_EVERY = 100
_CONFIDENCE = 0.9999
_RECENT = 500
_QUEUE_BYTES = 256 << 20

_LASTING_FRAMES = 5
_LASTING_SHARE = 0.3
"""A place that shows a spot in so many and such a share of the sampled frames is a bad pixel."""
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
class _Lasting:
    """Which places of one frame size show a spot again and again.

    The first frames are held until there are enough of them to tell.
    """

    shape: tuple[int, int]
    seen: NDArray[np.uint16]
    frames: int = 0
    held: list[tuple[Spots, Geometry | None]] = field(default_factory=list)

    def enter(self, spots: Spots) -> None:
        """Count the places of one more frame."""
        self.frames += 1
        y, x = self._pixels(spots)
        # A spot's middle may move by a pixel from frame to frame.
        near_y = np.clip(y[:, None] + _NEAR[:, 0], 0, self.shape[0] - 1)
        near_x = np.clip(x[:, None] + _NEAR[:, 1], 0, self.shape[1] - 1)
        places = np.unique(near_y * self.shape[1] + near_x)
        seen = self.seen.ravel()
        seen[places] = np.minimum(seen[places], 65_534) + 1

    def lasts(self, spots: Spots) -> NDArray[np.bool_]:
        """(n,) True where a spot is at such a place; few frames tell nothing."""
        often: NDArray[np.bool_] = self.seen[self._pixels(spots)] >= max(
            _LASTING_FRAMES, _LASTING_SHARE * self.frames
        )
        return often

    @staticmethod
    def _pixels(spots: Spots) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return spots.y_px.astype(np.int64), spots.x_px.astype(np.int64)


class Audit:
    """Finds spots on offered frames in a thread of its own; never holds the caller up.

    Args:
        measured: (counts, valid) of a frame, both (y, x); called from the audit's thread only.
        limit: share of hits among vetoed frames that is harm, 0..1.
        metrics: told after each frame.
        patient: wait for room instead of skipping a frame; for recorded runs.
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
        self._lasting: dict[tuple[int, int], _Lasting] = {}
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

    def offer(self, frame: Frame) -> None:
        """Take one vetoed frame into the sample; it is skipped when too much waits already."""
        size = frame.size_bytes
        with self._changed:
            while self._patient and self._waiting and not self._fits(size) and not self._closing:
                self._changed.wait(0.1)
            if self._closing or (self._waiting and not self._fits(size)):
                self._skipped += 1
                return
            self._waiting.append(frame)
            self._waiting_bytes += size
            self._changed.notify_all()

    def _fits(self, size: int) -> bool:
        return self._waiting_bytes + size <= _QUEUE_BYTES

    def report(self) -> AuditReport:
        """The counts now, with the 95 % interval of the share of hits."""
        with self._changed:
            watch = self._watch
            low, high = clopper_pearson(watch.hits, watch.audited)
            return AuditReport(
                audited=watch.audited,
                hits=watch.hits,
                hit_share_low=low,
                hit_share_high=high,
                skipped=self._skipped,
                unreadable=self._unreadable,
                limit=watch.limit,
                gate_open=watch.gate_open,
            )

    def finish(self, timeout_s: float) -> AuditReport:
        """Wait for what was taken in to be looked at, at most so long; the counts then."""
        with self._changed:
            idle = self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout_s)
        if idle:
            for lasting in self._lasting.values():
                self._judge_held(lasting)
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
            spots = find_spots(counts, valid)
            shape = (int(counts.shape[0]), int(counts.shape[1]))
            lasting = self._of_size(shape)
            lasting.enter(spots)
            lasting.held.append((spots, frame.series.geometry))
        except Exception as err:  # the audit must outlive any one frame
            with self._changed:
                self._unreadable += 1
            if not isinstance(err, TriageError):
                log.exception("audit: image %d could not be looked at", frame.image_id)
            return
        if lasting.frames >= _LASTING_FRAMES:
            self._judge_held(lasting)

    def _of_size(self, shape: tuple[int, int]) -> _Lasting:
        lasting = self._lasting.get(shape)
        if lasting is None:
            if len(self._lasting) == _SIZES_KEPT:
                self._judge_held(self._lasting.pop(next(iter(self._lasting))))
            lasting = self._lasting[shape] = _Lasting(shape, np.zeros(shape, np.uint16))
        return lasting

    def _judge_held(self, lasting: _Lasting) -> None:
        """Judge frames that waited until bad pixels could be told from spots."""
        held, lasting.held = lasting.held, []
        for spots, geometry in held:
            fresh = spots.where(~lasting.lasts(spots))
            is_hit = crystal_spots(fresh, lasting.shape, geometry) >= HIT_SPOTS
            with self._changed:
                was_open = self._watch.gate_open
                self._watch.add(is_hit)
            report = self.report()
            if self._metrics is not None:
                self._metrics.audit(report)
            if report.gate_open and not was_open:
                log.error(
                    "audit: %d of %d vetoed frames look like hits, more than the limit of "
                    "%.2f %%; from here on nothing is dropped; look at the vetoed frames, lower "
                    "the share that is vetoed or change the model, and start again",
                    report.hits,
                    report.audited,
                    100.0 * report.limit,
                )

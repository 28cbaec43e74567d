"""One frame's way from receipt to verdict to writer: the only orchestration.

::

    receive   source ──► Message, payload still compressed
                  == line: every message in the order received, bounded by bytes ==
    compute   workers, each: frames ──► backend ──► scorer ──► policy          Judgement
    publish   head of the line ──► audit, journal, forward, publish, table, kept file, ledger

Every message stands in one line from receipt to release, and only its head is released, so
order holds by construction, whichever worker is done first. A worker writes judgements into
entries of the line; when the head has none at its deadline, the publish thread writes ``late``
into it and goes on. A hung network or device therefore delays the frames that one worker holds
by ``deadline_ms`` and loses none, and the other workers go on.

Threads talk through the line alone, under one lock. Each stage takes from it, and gives to it,
as much as there is at a time: what a lock, a wake-up and a count cost is paid once for many
frames when there are many. ``Pipeline.step`` runs one turn of all three stages on the caller's
thread and is the same code.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import monotonic, monotonic_ns, thread_time
from typing import Any, NamedTuple, Protocol

import numpy as np
from msgspec import structs

from triage.backends import Backend
from triage.errors import DecodeError, DeviceError, TriageError, UnsupportedEncoding
from triage.health import Health, Trouble
from triage.ingest import ContinuingSource, HoldingSource, Source
from triage.ledger import Ledger
from triage.machine import give_back_memory
from triage.metrics import Metrics
from triage.policy import Policy
from triage.records import (
    LEAST_VALID,
    NOT_SCORED,
    AuditReport,
    Begun,
    CloseUps,
    Decision,
    Frame,
    Message,
    MessageKind,
    Override,
    Reason,
    Scores,
    Series,
    SeriesReport,
    Verdict,
    Views,
)
from triage.sinks.aside import Aside

__all__ = [
    "Decider",
    "Decides",
    "Judgement",
    "Outputs",
    "Pipeline",
    "PipelineOptions",
    "Snapshot",
]

log = logging.getLogger(__name__)

_POLL_MS = 100
"""How often a waiting thread looks whether it should stop; no frame waits for it."""

_REPLAY_AHEAD_BYTES = 64 << 20
_REPLAY_AHEAD_FRAMES = 1024
"""Recorded frames are read ahead of the decision up to either, so that no worker waits."""

_RELEASED_AT_ONCE = 64
"""Messages that are released as one: few enough that their bytes are soon free again."""

_STALL_OVER_NS = 5_000_000_000
"""A writer that kept no message waiting for a poll for so long is stalled no more."""

_SINK_ERRORS_KEPT = 100
"""Messages of failed sinks kept for the report; the metric counts them all."""

_LATENCY_WINDOW = 2048
"""Frames over which the progress line's percentiles are taken."""

_ROWS_SUMMED = 16
"""Rows of cells that are summed at a time when valid pixels are counted."""

_JOURNAL_LEAST_S = 0.02
"""A drop waits at least so long for its journal, however late it is: a write takes 20 us."""

_ASIDE_SHARE = 4
"""The line's bytes over those that may wait for a disk."""

_BOOKED_TOGETHER = 128
"""Frames of a turn that are handed on before the books know of it. A killed process leaves those
in doubt, and the state file names the last few hundred that ZeroMQ was given."""

_ROW_BYTES = 1024
"""About what a decision holds in memory."""

_ASIDE_END_S = 30.0
"""How long the end of a run waits for a disk that hangs."""

_BACKLOG_BYTES = 64 << 20
_GIVE_BACK_EVERY_NS = 10_000_000_000
"""A line that held so much and holds little now leaves memory free; it is given back, at most so
often: it takes some tens of milliseconds, in which a thread that wants memory may wait."""

_BATCHES_AVERAGED = 8
"""Over about so many the time that a batch takes is averaged."""

_NO_TIME = "too little of its time was left to score it"

_BLIND = "less than a tenth of the pixels are valid: look at mask and saturation value"

_SETTLE_NS = 1_000_000_000
"""When no frame came for so long, rows and kept frames of those that did are put on disk."""

_MOST_UNENDED = 16
"""Series that may be waiting for their end: of each a file of kept frames is open."""

_AUDIT_END_S = {True: 10.0, False: 600.0}
"""How long the end of a live and of a recorded run waits for the audit to look at its sample."""


class FrameScorer(Protocol):
    """What the decider asks of the network; ``triage.nets.scorer.Scorer`` is one."""

    def fast(self, views: Views) -> list[Scores]: ...

    def full(
        self, views: Views, close_ups: CloseUps, rows: Sequence[int], scores: list[Scores]
    ) -> list[Scores]: ...


class KeptSink(Protocol):
    """What the pipeline asks of a writer of kept frames.

    ``as_messages`` counts frames that are kept as messages, for want of a place in its files.
    """

    @property
    def as_messages(self) -> int: ...

    def start(self, series: Series, message: Message) -> None: ...

    def write(self, frame: Frame, decision: Decision, message: Message) -> None: ...

    def settle(self) -> None: ...

    def end(self, key: tuple[int, str], report: SeriesReport) -> Any: ...

    def close(self, reports: Mapping[tuple[int, str], SeriesReport]) -> Any: ...


class DecisionSink(Protocol):
    """What the pipeline asks of a table or list of decisions."""

    def add(self, decisions: Sequence[Decision]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class MessageSink(Protocol):
    """What the pipeline asks of a forwarder.

    ``send`` is given the same message again until it was taken. ``trouble`` says which writers
    are left out while others go on, "" for none; ``catch_up`` looks whether they are back.
    """

    @property
    def trouble(self) -> str: ...

    def send(self, message: Message, timeout_ms: int) -> bool: ...

    def catch_up(self) -> None: ...


class MessageAnnotator(Protocol):
    """What writes decisions into messages; ``triage.annotation.Annotator`` is one."""

    placeholders: bool

    def kept(self, message: Message, decision: Decision) -> Message: ...

    def placeholder(self, message: Message, decision: Decision) -> Message: ...

    def ended(self, message: Message, report: SeriesReport) -> Message: ...


class DropSink(Protocol):
    """What the pipeline asks of the journal of drops."""

    def dropped(self, decisions: Sequence[Decision]) -> int: ...

    def withdrawn(self, decisions: Sequence[Decision]) -> None: ...


class AuditSink(Protocol):
    """What the pipeline asks of the audit; ``triage.audit.Audit`` is one."""

    @property
    def gate_open(self) -> bool: ...

    def offer(self, frame: Frame) -> None: ...

    def wait(self, timeout_s: float) -> bool: ...

    def finish(self) -> AuditReport: ...


class DriftSink(Protocol):
    """What the decider asks of the watch for drift; ``triage.audit.drift.Drift`` is one."""

    def look(self, frames: Sequence[Frame], views: Views, scores: Sequence[Scores]) -> None: ...


class OfferingSink(Protocol):
    """What the pipeline asks of an endpoint where others fetch kept frames; it never waits."""

    def series_started(self, series: Series) -> None: ...

    def offer(self, frames: Sequence[Frame], decisions: Sequence[Decision]) -> None: ...

    def report(self) -> Any: ...


class AnnouncingSink(Protocol):
    """What the pipeline asks of the decision publisher; ``gate_open`` is told in its greeting."""

    gate_open: bool

    def greet_newcomers(self) -> None: ...

    def hello(self) -> None: ...

    def tell(self, decisions: Sequence[Decision]) -> None: ...

    def series_report(self, report: SeriesReport) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judgement:
    """What the compute stage says of one frame.

    Attributes:
        audited: the frame is in the audit's sample of vetoed frames.
        policy_id: the policy that judged it; "" for the one in force.
    """

    verdict: Verdict
    reason: Reason
    scores: Scores = NOT_SCORED
    decided_ns: int = 0
    detail: str = ""
    audited: bool = False
    policy_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Where released frames go; None where a sink is not wanted.

    Attributes:
        ledger: one that outlives the process, and goes on with what an earlier one counted.
    """

    forwarder: MessageSink | None = None
    annotator: MessageAnnotator | None = None
    publisher: AnnouncingSink | None = None
    journal: DropSink | None = None
    table: DecisionSink | None = None
    kept: KeptSink | None = None
    crystfel: OfferingSink | None = None
    audit: AuditSink | None = None
    ledger: Ledger | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineOptions:
    """How the pipeline runs.

    Attributes:
        live: deadlines and overload apply; recorded input waits instead.
        deadline_ns: receipt to release of a frame without a score.
        queue_bytes: bytes of messages that may stand in the line.
        batch_size: most frames per call of backend and network.
        batch_px: pixels from which a batch is full, 0 for no such bound; the frame that
            reaches it is in the batch.
        batch_wait_ns: how long a batch may wait to fill, where a fuller one costs less.
        tee: messages are forwarded by the receive thread before anything else is done with
            them, and go on whatever fails later. Only in shadow mode.
    """

    live: bool = True
    deadline_ns: int = 500_000_000
    queue_bytes: int = 2 << 30
    batch_size: int = 8
    batch_px: int = 0
    batch_wait_ns: int = 0
    tee: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The state of a run, for a progress line."""

    totals: SeriesReport
    latency_p50_us: float
    latency_p99_us: float
    queue_frames: int
    queue_bytes: int
    state: str
    troubles: tuple[str, ...]


class Decides(Protocol):
    """What a worker asks of its decider; called from one thread at a time.

    ``policy`` may be replaced at any moment: a batch is judged by the one it began with.
    """

    policy: Policy

    def decide(self, frames: Sequence[Frame]) -> list[Judgement]: ...


class Decider:
    """Backend, network and policy over one batch of frames (stops 4 to 6).

    Every failure stays with the frames it concerns and becomes a keep with its reason.
    """

    def __init__(
        self,
        backend: Backend,
        scorer: FrameScorer,
        policy: Policy,
        metrics: Metrics,
        clock: Callable[[], int] = monotonic_ns,
        *,
        drift: DriftSink | None = None,
    ) -> None:
        self._backend = backend
        self._scorer = scorer
        self._drift = drift
        self.policy = policy
        self._metrics = metrics
        self._clock = clock

    def decide(self, frames: Sequence[Frame]) -> list[Judgement]:
        """One judgement per frame, in order."""
        usable = [i for i, frame in enumerate(frames) if frame.fault is None]
        judgements = [self._faulted(frame) for frame in frames]
        if usable:
            batch = [frames[i] for i in usable]
            for i, judgement in zip(usable, self._decide_usable(batch), strict=True):
                judgements[i] = judgement
        return judgements

    def _faulted(self, frame: Frame) -> Judgement:
        return Judgement(
            verdict=Verdict.KEEP,
            reason=frame.fault or Reason.SCORER_ERROR,
            decided_ns=self._clock(),
            detail=frame.fault_detail,
        )

    def _decide_usable(self, frames: Sequence[Frame]) -> list[Judgement]:
        try:
            return self._score(frames)
        except DeviceError as err:
            log.warning("device lost, %d frames kept unscored: %s", len(frames), err)
            return self._kept_unscored(frames, Reason.DEVICE_LOST, str(err))
        except Exception as err:  # fail open: whatever breaks, the frame goes on
            log.exception("scoring failed, %d frames kept unscored", len(frames))
            return self._kept_unscored(frames, Reason.SCORER_ERROR, f"{type(err).__name__}: {err}")

    def _kept_unscored(
        self, frames: Sequence[Frame], reason: Reason, detail: str
    ) -> list[Judgement]:
        now = self._clock()
        return [
            Judgement(verdict=Verdict.KEEP, reason=reason, decided_ns=now, detail=detail)
            for _ in frames
        ]

    def _score(self, frames: Sequence[Frame]) -> list[Judgement]:
        began = self._clock()
        views = self._backend.prepare(frames)
        prepared = self._clock()
        self._metrics.stage("prepare", (prepared - began) * 1e-9)
        scores = self._scorer.fast(views)
        self._metrics.stage("score_fast", (self._clock() - prepared) * 1e-9)
        blind = [_is_blind(frame, views, i) for i, frame in enumerate(frames)]
        scores = [NOT_SCORED if b else s for b, s in zip(blind, scores, strict=True)]
        policy = self.policy
        judged = [policy.judge(f, s) for f, s in zip(frames, scores, strict=True)]
        audited = [
            verdict is Verdict.VETO and policy.is_audited(frame)
            for frame, (verdict, _) in zip(frames, judged, strict=True)
        ]
        rows = [
            i
            for i, score in enumerate(scores)
            if views.errors[i] is None
            and math.isfinite(score.p_blank)
            and policy.wants_full_exit(judged[i][0], audited=audited[i])
        ]
        if rows:
            full_began = self._clock()
            close_ups = self._backend.close_ups(frames, views, rows)
            provisional = [row for row in rows if scores[row].provisional]
            scores = self._scorer.full(views, close_ups, rows, scores)
            self._metrics.stage("score_full", (self._clock() - full_began) * 1e-9)
            for i in provisional:
                judged[i] = policy.judge(frames[i], scores[i])
                audited[i] = judged[i][0] is Verdict.VETO and policy.is_audited(frames[i])
        if self._drift is not None:
            self._drift.look(frames, views, scores)
        now, policy_id = self._clock(), policy.policy_id
        return [
            Judgement(
                verdict=judged[i][0],
                reason=judged[i][1],
                scores=scores[i],
                decided_ns=now,
                detail=_BLIND if blind[i] else "",
                audited=audited[i],
                policy_id=policy_id,
            )
            if error is None
            else _undecodable(error, now)
            for i, error in enumerate(views.errors)
        ]


def _undecodable(error: TriageError, now_ns: int) -> Judgement:
    """A frame of which the backend made nothing goes on, with the reason."""
    if isinstance(error, UnsupportedEncoding):
        reason = Reason.UNKNOWN_ENCODING
    elif isinstance(error, DecodeError):
        reason = Reason.MALFORMED
    elif isinstance(error, DeviceError):
        reason = Reason.DEVICE_LOST
    else:
        reason = Reason.SCORER_ERROR
    return Judgement(verdict=Verdict.KEEP, reason=reason, decided_ns=now_ns, detail=str(error))


def _is_blind(frame: Frame, views: Views, row: int) -> bool:
    """Whether so little of a frame is valid that nothing can be said of it.

    A wrong mask or saturation value makes any frame look empty; it must not be taken for blank.
    """
    pixels = frame.shape[0] * frame.shape[1]
    if views.errors[row] is not None or not pixels:
        return False
    if views.valid_px is not None:
        return int(views.valid_px[row]) < LEAST_VALID * pixels
    count, valid = views.count[row], 0
    for first in range(0, len(count), _ROWS_SUMMED):
        # Most frames have a tenth of their pixels in the first cells already.
        valid += int(count[first : first + _ROWS_SUMMED].sum(dtype=np.int64))
        if valid >= LEAST_VALID * pixels:
            return False
    return True


class _Drop(NamedTuple):
    """A frame to be dropped: its message, what goes on in its place, and the decision."""

    message: Message
    instead: Message | None
    frame: Frame
    decision: Decision


class _Entry:
    """One message in the line, and its judgement once there is one."""

    __slots__ = ("awaits", "judgement", "message")

    def __init__(self, message: Message) -> None:
        self.message = message
        self.judgement: Judgement | None = None
        self.awaits = message.frame is not None

    def judge(self, judgement: Judgement) -> None:
        """The first judgement counts: what went on late is not judged again."""
        if self.awaits:
            self.judgement, self.awaits = judgement, False


class _Line:
    """What the threads share, all of it under ``lock``.

    Attributes:
        idle: what wakes each worker that waits for frames, the last to fall idle last: it is
            woken first, because its caches are warm.
        ready: told when the head may go; the publish thread waits for it.
        room: told when the line may grow again; the receive thread waits for it.
        entries: every message received and not yet released.
        most_bytes: the most that they held since memory was given back.
        pending: those entries, in order, that no worker has taken.
    """

    def __init__(self, workers: int) -> None:
        self.lock = threading.RLock()
        self.idle: list[threading.Condition] = []
        self.ready = threading.Condition(self.lock)
        self.room = threading.Condition(self.lock)
        self.entries: deque[_Entry] = deque()
        self.pending: deque[_Entry] = deque()
        self.entry_bytes = 0
        self.most_bytes = 0
        self.pending_bytes = 0
        self.room_wanted = False
        self.input_closed = False
        self.stopping = False
        self.abandoned = False
        self.workers = workers
        self.workers_failed = ""

    def wake_workers(self, most: int) -> None:
        for _ in range(min(most, len(self.idle))):
            self.idle.pop().notify()

    def wake_all(self) -> None:
        self.wake_workers(len(self.idle))
        self.ready.notify_all()
        self.room.notify_all()


class _Released:
    """Frames of one turn that went on or were dropped; those before ``booked`` are in the books."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.frames: list[Frame] = []
        self.decisions: list[Decision] = []
        self._booked = 0

    def add(self, message: Message, frame: Frame, decision: Decision) -> None:
        self.messages.append(message)
        self.frames.append(frame)
        self.decisions.append(decision)

    def due(self) -> bool:
        """Whether so many are not in the books that they must not wait for the end of the turn."""
        return len(self.decisions) - self._booked >= _BOOKED_TOGETHER

    def unbooked(self) -> tuple[list[Message], list[Frame], list[Decision]]:
        """What was added since the last call; the messages are those received."""
        first, self._booked = self._booked, len(self.decisions)
        return self.messages[first:], self.frames[first:], self.decisions[first:]


class Pipeline:
    """Runs a source through deciders into the outputs, and keeps the ledger.

    Use either :meth:`run` (threads until the source is exhausted or :meth:`stop`) or
    :meth:`step` (one turn on the caller's thread). The pipeline closes nothing that it was
    given except the series in ``outputs.kept``, the table, and a live source once it is drained.

    Args:
        deciders: one per worker thread, all of one policy; which of them decides a frame must
            not matter to its score.

    Attributes:
        health: what state the run is in, and what is wrong.
        policies: those that were in force, the one that is last.
    """

    def __init__(
        self,
        source: Source,
        deciders: Decides | Sequence[Decides],
        outputs: Outputs,
        options: PipelineOptions,
        metrics: Metrics,
        *,
        model_id: str = "",
        clock: Callable[[], int] = monotonic_ns,
    ) -> None:
        self.ledger = outputs.ledger or Ledger()
        self.failure: BaseException | None = None
        self.sink_errors: list[str] = []
        self.audit_report: AuditReport | None = None
        self._source = source
        self._deciders = tuple(deciders) if isinstance(deciders, Sequence) else (deciders,)
        self._policy = self._deciders[0].policy
        self.policies = [self._policy]
        self._gate_held_open = False
        self._greeting_due = False
        self.health = Health(metrics, clock)
        self._go_on_with(self.ledger.begun)
        self._outputs = outputs
        self._options = options
        self._metrics = metrics
        self._model_id = model_id
        self._clock = clock
        self._line = _Line(len(self._deciders))
        self._released = _Released()
        self._latencies_us: deque[float] = deque(maxlen=_LATENCY_WINDOW)
        self._reported: set[tuple[int, str]] = set()
        self._unsettled_ns: int | None = None
        self._unended: dict[tuple[int, str], Series] = {}
        self._heard: set[tuple[int, str]] = set()
        self._broken_sinks: set[str] = set()
        self._failing_sinks: set[str] = set()
        self._joined: tuple[int, str] | None = None
        self._alive_ns: dict[str, int] = {}
        self._busy_ns: dict[int, int] = {}
        self._batch_took_ns = 0
        self._gave_back_ns = -_GIVE_BACK_EVERY_NS
        self._stalled_ns: int | None = None
        self._writer_trouble = ""
        self._asides: dict[str, Aside] = {}
        self._unreleased: list[_Entry] = []
        self._tee = outputs.forwarder if options.tee else None
        self._forwarder = None if options.tee else outputs.forwarder

    def _go_on_with(self, begun: Sequence[Begun]) -> None:
        """Let the source know series whose beginning an earlier process received."""
        if not isinstance(self._source, ContinuingSource):
            return
        self._source.go_on_with(begun)
        for series in begun:
            for lane in series.lanes:
                self.health.started(lane, series.key)

    # -- life ----------------------------------------------------------------------------------

    def run(self) -> None:
        """Run until the source is exhausted or stopped, and everything received is released.

        ``failure`` holds what broke a thread, if anything did; ``audit_report`` what the audit
        found.
        """
        self.health.enter("ready")
        self._open_asides()
        receive, publish = (
            self._thread(name, body)
            for name, body in (("receive", self._receive_loop), ("publish", self._publish_loop))
        )
        workers = [
            self._thread(f"compute-{i}", self._compute_loop, decider)
            for i, decider in enumerate(self._deciders)
        ]
        for thread in (*workers, publish, receive):
            thread.start()
        receive.join()
        publish.join()
        # A hung network must not hold the end of the run: its frames have gone on as late.
        until_s = monotonic() + self._options.deadline_ns * 1e-9
        for worker in workers:
            if self._options.live:
                worker.join(max(0.0, until_s - monotonic()))
            while worker.is_alive() and not (self._options.live or self._line.abandoned):
                worker.join(_POLL_MS * 1e-3)
        self._finish()

    def _thread(self, name: str, body: Callable[..., None], *args: Any) -> threading.Thread:
        return threading.Thread(target=self._guard, args=(body, *args), name=name, daemon=True)

    def stop(self) -> None:
        """Take no more input; decide and release what was received. A second call gives up on
        what is not yet released."""
        line = self._line
        line.abandoned = line.stopping
        line.stopping = True
        self.health.enter("draining")

    def drain(self) -> None:
        """As :meth:`stop`, but a second call changes nothing."""
        if not self._line.stopping:
            self.stop()

    def give_up(self, error: TriageError) -> None:
        """Drain, and end the run as failed."""
        self.failure = self.failure or error
        self.drain()

    @property
    def sends_on(self) -> bool:
        """Whether there is a writer: without one nothing leaves, whatever is not dropped."""
        return self._outputs.forwarder is not None

    @property
    def policy(self) -> Policy:
        """What decides now."""
        return self._policy

    def apply(self, policy: Policy) -> None:
        """Judge by another policy from the next batch on, and tell the listeners.

        Batches that are being judged, and frames judged already, keep the verdict and the
        ``policy_id`` they have. What is done with a veto follows the mode in force when the frame
        is released, so nothing is dropped any more once ``shadow`` is applied.
        """
        with self._line.lock:
            self._policy = policy
            self.policies.append(policy)
            for decider in self._deciders:
                decider.policy = policy
            self._greeting_due = True
        self._metrics.model(self._model_id, policy.policy_id, policy.mode)

    def hold_gate_open(self, why: str) -> None:
        """Drop nothing more, whatever is decided (override ``gate_open``)."""
        self._gate_held_open = True
        self._metrics.gate_held_open(True)
        self.health.add(Trouble.GATE_OPEN, why)

    def let_gate_go(self) -> None:
        """Drop again what is decided, unless the audit opened the gate."""
        self._gate_held_open = False
        self._metrics.gate_held_open(False)
        self.health.clear(Trouble.GATE_OPEN)

    @property
    def gate_open(self) -> bool:
        """Whether drops are stopped, by the audit or by an operator."""
        return self._gate_held_open or self.audit_opened

    @property
    def audit_opened(self) -> bool:
        """Whether the audit of this run found harm."""
        audit = self._outputs.audit
        return audit is not None and audit.gate_open

    def watch(self) -> None:
        """Look for troubles that show in counts only; called now and then, by any thread."""
        self.health.watch(self._metrics.frames_by_reason())
        stalled_ns = self._stalled_ns
        # A slow writer takes a message now and then, which is no end of it.
        if stalled_ns is not None and self._clock() - stalled_ns >= _STALL_OVER_NS:
            self._stalled_ns = None
            self.health.clear(Trouble.WRITER_STALLED)
        if self.gate_open and not self._gate_held_open:
            self.health.add(Trouble.GATE_OPEN, "the audit found that hits are being vetoed")
        self._give_back_memory()

    def _give_back_memory(self) -> None:
        """After frames had to wait: the C library keeps what they held, for months if need be."""
        line, now_ns = self._line, self._clock()
        with line.lock:
            if line.most_bytes < max(_BACKLOG_BYTES, 4 * line.entry_bytes):
                return
            if now_ns - self._gave_back_ns < _GIVE_BACK_EVERY_NS:
                return
            line.most_bytes = line.entry_bytes
        self._gave_back_ns = now_ns
        give_back_memory()

    def hung(self, for_ns: int) -> list[str]:
        """The stages that showed no life for so long: ``receive``, ``publish``, ``compute``.

        A stage that waits for something to do is alive, and so is one that waits for the writer.
        ``compute`` hangs when all of its workers do. What hangs behind a tee is not told: the
        frames go on without it, and would not if somebody ended this process for it.
        """
        before_ns = self._clock() - for_ns
        stages = [name for name, at_ns in list(self._alive_ns.items()) if at_ns < before_ns]
        busy = list(self._busy_ns.values())
        if busy and len(busy) >= self._line.workers and max(busy) < before_ns:
            stages.append("compute")
        return stages if self._tee is None else [name for name in stages if name == "receive"]

    def step(self) -> list[Decision]:
        """One turn of all three stages on the caller's thread; what was released by it."""
        self._take_in(self._source.receive(0))
        while batch := self._take(None):
            self._decide(self._deciders[0], batch)
        decisions: list[Decision] = []
        while heads := self._take_heads(wait=False):
            decisions += self._release(heads)
        return decisions

    def snapshot(self) -> Snapshot:
        """The counts and latencies now."""
        latencies = sorted(self._latencies_us)
        with self._line.lock:
            frames, size = len(self._line.entries), self._line.entry_bytes
        self.watch()
        return Snapshot(
            totals=self.ledger.totals(),
            latency_p50_us=_quantile(latencies, 0.50),
            latency_p99_us=_quantile(latencies, 0.99),
            queue_frames=frames,
            queue_bytes=size,
            state=self.health.state,
            troubles=tuple(self.health.troubles),
        )

    def _guard(self, body: Callable[..., None], *args: Any) -> None:
        """The outermost frame of a thread: nothing dies unseen."""
        try:
            body(*args)
        except Exception as err:  # reported by run() and the exit code
            name = threading.current_thread().name
            log.exception("the %s thread failed", name)
            self.health.add(Trouble.WORKER_LOST, f"the {name} thread ended: {err}")
            line = self._line
            with line.lock:
                if name.startswith("compute"):
                    line.workers_failed = f"{type(err).__name__}: {err}"
                elif name == "publish" and self._tee is not None:
                    self._go_on_blindly(err)
                else:
                    self.failure = err
                    line.stopping = True
                    line.input_closed = True
                    line.abandoned = name == "publish"
                line.wake_all()
        finally:
            self._alive_ns.pop(threading.current_thread().name, None)

    def _go_on_blindly(self, err: BaseException) -> None:
        """What stands behind a tee failed: frames go on, and are not looked at any more."""
        if self.failure is not None:
            return
        self.failure = err
        log.error(
            "the tee goes on and nothing is decided any more: stop and start triage again",
            exc_info=err,
        )
        self.health.add(Trouble.WORKER_LOST, f"nothing is decided any more: {err}")

    def _open_asides(self) -> None:
        """A thread for each sink that could hold up live frames: a disk may be slow or hang."""
        if not self._options.live:
            return
        outputs = self._outputs
        wanted: list[tuple[str, object]] = [
            ("decision table", outputs.table),
            ("journal", outputs.journal),
        ]
        if outputs.forwarder is not None:
            # Without a forwarder the kept file is all that there is: then the detector waits.
            wanted.append(("kept file", outputs.kept))
        for name, sink in wanted:
            if sink is not None:
                most = self._options.queue_bytes // _ASIDE_SHARE
                self._asides[name] = Aside(name, most_bytes=most)

    def _close_asides(self) -> None:
        until_s = monotonic() + _ASIDE_END_S
        asides, self._asides = self._asides, {}
        for name, aside in asides.items():
            while not (closed := aside.close(_POLL_MS * 1e-3)):
                if self._line.abandoned or monotonic() > until_s:
                    break
            if not closed:
                self._note_sink_error(name, "it hangs; what waits for it is not written")

    def _finish(self) -> None:
        if self._tee is not None and self.failure is not None:
            self._book_unseen([entry.message for entry in (*self._unreleased, *self._line.entries)])
        self._mind_writers()
        if self._writer_trouble:
            self._note_sink_error("forwarder", f"{self._writer_trouble} at the end of the run")
        reports = {(r.series_id, r.series_unique_id): r for r in self.ledger.reports()}
        for key, report in reports.items():
            if key not in self._reported:
                self._report_series(key, report)
        if (kept := self._outputs.kept) is not None:
            self._beside("kept file", lambda: kept.close(reports))
        if (table := self._outputs.table) is not None:
            self._beside("decision table", table.close)
        self._close_asides()
        if (audit := self._outputs.audit) is not None:
            until_s = monotonic() + _AUDIT_END_S[self._options.live]
            while not (audit.wait(0.2) or self._line.abandoned or monotonic() > until_s):
                pass
            self.audit_report = audit.finish()
        self.health.enter("stopped")

    # -- receive -------------------------------------------------------------------------------

    def _receive_loop(self) -> None:
        line, live = self._line, self._options.live
        try:
            for _ in self._turns("receive"):
                if line.stopping:
                    break
                if self._tee is not None or self._wait_for_room():
                    self._take_in(self._source.receive(_POLL_MS))
                if self._source.exhausted:
                    break
            if live and not line.abandoned:
                self._drain_source()
        finally:
            if live:
                # Until the outputs are closed may take minutes. A socket would go on taking
                # messages from the detector that nobody reads any more.
                self._source.close()
        if live and not line.abandoned and isinstance(self._source, HoldingSource):
            self._take_in(self._source.flush())
        with line.lock:
            line.input_closed = True
            line.wake_all()

    def _drain_source(self) -> None:
        """Take what already reached this machine; a detector still sending is cut off here."""
        until_ns = self._clock() + self._options.deadline_ns
        while self._clock() < until_ns and not self._line.abandoned:
            self._alive_ns["receive"] = self._clock()
            messages = self._source.receive(0)
            if not messages:
                break
            self._take_in(messages)

    def _take_in(self, messages: Sequence[Message]) -> None:
        """Let messages join the line; with a tee they go to the writer first."""
        if self._tee is None:
            self._admit(messages)
            return
        messages = self._handed_on(self._tee, messages)
        try:
            self.ledger.received(messages)
            self._metrics.received(messages)
            if self.failure is None:
                self._join_line(self._with_room(messages))
            else:
                self._book_unseen(messages)
        except Exception as err:  # noqa: BLE001 - fail open: the next messages go on
            self._go_on_blindly(err)

    def _handed_on(self, tee: MessageSink, messages: Sequence[Message]) -> Sequence[Message]:
        """Send messages to the writer, in order; those that went."""
        for i, message in enumerate(messages):
            if not message.parts or tee.send(message, 0):
                continue
            if not self._wait_for_writer(tee, message, "receive"):
                left = len(messages) - i
                self._note_sink_error("tee", f"{left} messages came and did not reach the writer")
                return messages[:i]
        return messages

    def _with_room(self, messages: Sequence[Message]) -> Sequence[Message]:
        """What may join the line behind a tee: all while it has room; then no more images.

        Nothing that is not decided fast enough may hold the detector back.
        """
        with self._line.lock:
            if not self._is_full():
                return messages
        self._book_unseen(messages)
        return [
            structs.replace(message, parts=(), followed_by=(), size_bytes=0)
            for message in messages
            if message.frame is None
        ]

    def _book_unseen(self, messages: Sequence[Message]) -> None:
        """Enter images that a tee handed on and that nothing here will look at."""
        reason, detail = Reason.OVERLOAD, "the line was full behind the tee"
        if self.failure is not None:
            reason, detail = Reason.SCORER_ERROR, f"nothing is decided any more: {self.failure}"
        judgement = self._unscored(reason, detail)
        decisions = [
            self._decision(message.frame, judgement)
            for message in messages
            if message.frame is not None
        ]
        self.ledger.released(decisions, in_order=False)
        self._metrics.released(decisions)

    def _wait_for_room(self) -> bool:
        """True when the line may grow; waits a moment when not, which holds the detector back."""
        line = self._line
        with line.lock:
            if not self._is_full():
                return True
            line.room_wanted = True
            line.room.wait(_POLL_MS * 1e-3)
            line.room_wanted = False
            return not self._is_full()

    def _is_full(self, share: float = 1.0) -> bool:
        """Whether the line holds that share of what may be in it."""
        line = self._line
        if line.entry_bytes >= self._options.queue_bytes:
            return True
        if self._options.live or len(line.pending) < 2 * len(self._deciders):
            return False
        return (
            line.pending_bytes >= share * _REPLAY_AHEAD_BYTES
            or len(line.pending) >= share * _REPLAY_AHEAD_FRAMES
        )

    def _offer_room(self) -> None:
        """Let a reader that waits go on once there is room for more than a moment's work."""
        line = self._line
        if line.room_wanted and not self._is_full(0.5):
            line.room.notify()

    def _admit(self, messages: Sequence[Message]) -> None:
        if messages:
            self.ledger.received(messages)
            self._metrics.received(messages)
            self._join_line(messages)

    def _join_line(self, messages: Sequence[Message]) -> None:
        if not messages:
            return
        entries = [_Entry(message) for message in messages]
        for entry in entries:
            frame = entry.message.frame
            if frame is not None and frame.fault is not None:
                entry.judge(self._unscored(frame.fault, frame.fault_detail))
        awaiting = [entry for entry in entries if entry.awaits]
        line, live = self._line, self._options.live
        with line.lock:
            was_empty = not line.entries
            line.entries += entries
            line.entry_bytes += sum(message.size_bytes for message in messages)
            line.most_bytes = max(line.most_bytes, line.entry_bytes)
            line.pending += awaiting
            line.pending_bytes += sum(entry.message.size_bytes for entry in awaiting)
            if live:
                self._shed_overload()
            line.wake_workers(len(awaiting))
            # A publish thread that waits for nothing in particular must not sleep through the
            # deadline of a frame that came meanwhile.
            short = live and was_empty and self._options.deadline_ns < _POLL_MS * 1_000_000
            if short or not line.entries[0].awaits:
                line.ready.notify()
            depths = len(line.entries), len(line.pending), line.entry_bytes
        self._metrics.queue(*depths)

    def _shed_overload(self) -> None:
        """When half the budget waits for a score, the oldest frame goes on without one."""
        line = self._line
        while line.pending_bytes > self._options.queue_bytes // 2 and len(line.pending) > 1:
            oldest = line.pending.popleft()
            line.pending_bytes -= oldest.message.size_bytes
            oldest.judge(self._unscored(Reason.OVERLOAD))

    def _unscored(self, reason: Reason, detail: str = "") -> Judgement:
        return Judgement(
            verdict=Verdict.KEEP, reason=reason, decided_ns=self._clock(), detail=detail
        )

    def _turns(self, stage: str) -> Iterator[None]:
        """Turns of a thread's loop; the CPU time of each is entered for its stage."""
        before_s = thread_time()
        while True:
            if stage != "compute":
                self._alive_ns[stage] = self._clock()
            yield
            now_s = thread_time()
            self._metrics.cpu(stage, now_s - before_s)
            before_s = now_s

    # -- compute -------------------------------------------------------------------------------

    def _compute_loop(self, decider: Decides) -> None:
        wake = threading.Condition(self._line.lock)
        worker = threading.get_ident()
        try:
            for _ in self._turns("compute"):
                batch = self._take(wake)
                self._busy_ns[worker] = self._clock()
                if not self._decide(decider, batch):
                    return
                self._busy_ns.pop(worker, None)
        finally:
            self._busy_ns.pop(worker, None)
            with self._line.lock:
                self._line.workers -= 1
                self._line.ready.notify()

    def _decide(self, decider: Decides, batch: Sequence[_Entry]) -> bool:
        """Judge a batch, whatever its decider does; False when there is none."""
        if not batch:
            return False
        judged: list[tuple[_Entry, Judgement]] = []
        why = "the worker ended"
        began_ns = self._clock()
        try:
            frames = [entry.message.frame for entry in batch if entry.message.frame is not None]
            judged = list(zip(batch, decider.decide(frames), strict=True))
        except Exception as err:  # fail open: the frames go on, and so does the worker
            why = f"{type(err).__name__}: {err}"
            log.exception("deciding failed, %d frames kept unscored", len(batch))
        finally:
            line = self._line
            with line.lock:
                for entry, judgement in judged:
                    entry.judge(judgement)
                if not judged:
                    for entry in batch:
                        entry.judge(self._unscored(Reason.SCORER_ERROR, why))
                took_ns = self._clock() - began_ns
                self._batch_took_ns += (took_ns - self._batch_took_ns) // _BATCHES_AVERAGED
                if line.entries and not line.entries[0].awaits:
                    line.ready.notify()
        return True

    def _take(self, wake: threading.Condition | None) -> list[_Entry]:
        """Frames that still await a score, for one worker; empty when none will come.

        Args:
            wake: what the worker sleeps on until there are some; None to take what is there.
        """
        line, options = self._line, self._options
        with line.lock:
            while not line.abandoned:
                if line.pending:
                    if wake is not None and options.live and options.batch_wait_ns:
                        self._let_batch_fill(wake)
                    batch = self._batch()
                    if line.pending:
                        # What is left may have come while this worker was waiting in their place.
                        line.wake_workers(1)
                    self._offer_room()
                    if batch:
                        return batch
                elif wake is None or line.input_closed:
                    break
                else:
                    line.idle.append(wake)
                    wake.wait()
        return []

    def _let_batch_fill(self, wake: threading.Condition) -> None:
        line, options = self._line, self._options
        until_ns = self._clock() + options.batch_wait_ns
        while len(line.pending) < options.batch_size and not line.input_closed:
            left_ns = until_ns - self._clock()
            if left_ns <= 0:
                return
            line.idle.append(wake)
            if not wake.wait(left_ns * 1e-9) and wake in line.idle:
                line.idle.remove(wake)

    def _batch(self) -> list[_Entry]:
        """The oldest frames, at most a full batch; where none waits to be full, a fair share."""
        line, options = self._line, self._options
        most = options.batch_size
        if not (options.live and options.batch_wait_ns):
            most = min(most, -(-len(line.pending) // line.workers))
        batch: list[_Entry] = []
        pixels = 0
        out_of_time_ns = self._out_of_time_ns()
        while line.pending and len(batch) < most:
            entry = line.pending.popleft()
            line.pending_bytes -= entry.message.size_bytes
            frame = entry.message.frame
            if not entry.awaits or frame is None:
                continue
            if entry.message.received_ns < out_of_time_ns:
                entry.judge(self._unscored(Reason.LATE, _NO_TIME))
                if entry is line.entries[0]:
                    line.ready.notify()
                continue
            batch.append(entry)
            pixels += frame.shape[0] * frame.shape[1]
            if 0 < options.batch_px <= pixels:
                break
        return batch

    def _out_of_time_ns(self) -> int:
        """Frames received before this moment would be scored too late.

        A worker that took them nevertheless would take those behind them too late as well: with
        a little more to do than it can, it would be done in time with next to none. However long
        batches took, a frame with half of its time left is tried: they may be quicker again.
        """
        options = self._options
        if not options.live:
            return 0
        needs_ns = min(self._batch_took_ns, options.deadline_ns // 2)
        return self._clock() + needs_ns - options.deadline_ns

    # -- publish -------------------------------------------------------------------------------

    def _publish_loop(self) -> None:
        for _ in self._turns("publish"):
            self._release(self._take_heads(wait=True))
            with self._line.lock:
                line = self._line
                if line.abandoned or (line.input_closed and not line.entries):
                    return

    def _take_heads(self, *, wait: bool) -> list[_Entry]:
        """The messages at the head of the line that may go; none after a moment's wait."""
        line = self._line
        with line.lock:
            heads = self._heads()
            if wait and not heads and not (line.input_closed and not line.entries):
                line.ready.wait(self._patience_s())
                heads = self._heads()
        return heads

    def _heads(self) -> list[_Entry]:
        line = self._line
        heads: list[_Entry] = []
        while line.entries and len(heads) < _RELEASED_AT_ONCE and not line.abandoned:
            head = line.entries[0]
            if head.awaits and not self._has_given_up(head):
                break
            heads.append(line.entries.popleft())
        return heads

    def _has_given_up(self, head: _Entry) -> bool:
        """Judge a head for which no score will come, or none in time."""
        line = self._line
        if line.workers == 0:
            head.judge(self._unscored(Reason.SCORER_ERROR, line.workers_failed))
        elif self._options.live and self._left_ns(head) <= 0:
            head.judge(self._unscored(Reason.LATE))
        else:
            return False
        if line.pending and line.pending[0] is head:
            line.pending.popleft()
            line.pending_bytes -= head.message.size_bytes
        return True

    def _left_ns(self, head: _Entry) -> int:
        return head.message.received_ns + self._options.deadline_ns - self._clock()

    def _patience_s(self) -> float:
        """How long the publish thread may sleep before it looks at the head again."""
        wait_s = _POLL_MS * 1e-3
        if self._options.live and self._line.entries:
            wait_s = min(wait_s, max(0.0, self._left_ns(self._line.entries[0]) * 1e-9))
        return wait_s

    def _release(self, entries: list[_Entry]) -> list[Decision]:
        """Do with messages what was decided, in order, and enter it in the books."""
        if not entries:
            self._greet_newcomers()
            self._mind_writers()
            self._settle()
            return []
        size = sum(entry.message.size_bytes for entry in entries)
        try:
            self._greet_newcomers()
            drops: list[_Drop] = []
            annotator = self._outputs.annotator
            for entry in entries:
                message, frame, judgement = entry.message, entry.message.frame, entry.judgement
                if frame is None or judgement is None:
                    if not (self._write_off(drops) and self._pass_on(message)):
                        break
                    continue
                decision, goes_on = self._decision(frame, judgement), message
                if annotator is not None:
                    goes_on, decision = self._annotated(annotator, message, decision)
                if not decision.forwarded:
                    instead = goes_on if goes_on is not message else None
                    drops.append(_Drop(message, instead, frame, decision))
                    continue
                if not (self._write_off(drops) and self._forward(goes_on)):
                    break
                self._released.add(message, frame, decision)
                if self._released.due():
                    self._enter_in_books()
            else:
                self._write_off(drops)
        except Exception:
            # They went on already where a tee is; the others are what is undecided.
            booked = self._released.frames
            self._unreleased = [e for e in entries if e.message.frame not in booked]
            raise
        finally:
            self._enter_in_books()
            decisions = self._released.decisions
            self._released = _Released()
            self._mind_writers()
            # Nothing here may hold on to payloads while the thread waits for the next ones.
            entries.clear()
            line = self._line
            with line.lock:
                line.entry_bytes -= size
                self._offer_room()
        return decisions

    def _decision(self, frame: Frame, judgement: Judgement) -> Decision:
        forwarded, override = self._policy.dispose(judgement.verdict, audited=judgement.audited)
        if judgement.verdict is Verdict.VETO:
            if judgement.audited and self._outputs.audit is not None:
                self._outputs.audit.offer(frame)
            if not forwarded and self._tee is not None:
                forwarded, override = True, Override.SHADOW
            if not forwarded and self.gate_open:
                forwarded, override = True, Override.GATE_OPEN
        return Decision(
            series_id=frame.series.series_id,
            series_unique_id=frame.series.series_unique_id,
            image_id=frame.image_id,
            file=frame.file,
            frame=frame.frame,
            ordinal=frame.ordinal,
            verdict=judgement.verdict,
            reason=judgement.reason,
            forwarded=forwarded,
            override=override,
            scores=judgement.scores,
            model_id=self._model_id,
            policy_id=judgement.policy_id or self._policy.policy_id,
            latency_us=max(0, judgement.decided_ns - frame.received_ns) * 1e-3,
            decided_ns=judgement.decided_ns,
            duplicate=frame.duplicate,
            detail=judgement.detail,
        )

    def _annotated(
        self, annotator: MessageAnnotator, message: Message, decision: Decision
    ) -> tuple[Message, Decision]:
        """What goes on of an image, and the decision, which is to keep it where that fails."""
        dropped = not decision.forwarded
        if not message.parts or (dropped and not annotator.placeholders):
            return message, decision
        try:
            if dropped:
                return annotator.placeholder(message, decision), decision
            return annotator.kept(message, decision), decision
        except Exception as err:  # fail open: the image goes on as it came
            if not isinstance(err, TriageError):
                log.exception("an image could not be written into")
            what = "no placeholder could be made" if dropped else "no verdict could be written"
            self._note_sink_error("annotation", f"{what}; the image went on as it came: {err}")
        if dropped:
            decision = replace(decision, forwarded=True, override=Override.GATE_OPEN)
        return message, decision

    def _write_off(self, drops: list[_Drop]) -> bool:
        """Drop frames, each once it is written down; False when abandoned.

        A drop that is not written down must not happen.
        """
        if not drops:
            return True
        written = self._written_down(drops)
        self._metrics.journalled(written)
        if written == len(drops):
            self.health.clear(Trouble.JOURNAL_FAILING)
        else:
            self.health.add(
                Trouble.JOURNAL_FAILING, "drops cannot be written down, so these frames go on"
            )
        for drop in drops[:written]:
            self._released.add(drop.message, drop.frame, drop.decision)
        for drop in drops[:written]:
            if drop.instead is not None and not self._forward(drop.instead):
                return False
        for message, _, frame, decision in drops[written:]:
            self._note_sink_error("journal", "a drop could not be written; the frame went on")
            kept = replace(decision, forwarded=True, override=Override.GATE_OPEN)
            goes_on = message
            if (annotator := self._outputs.annotator) is not None:
                goes_on, kept = self._annotated(annotator, message, kept)
            if not self._forward(goes_on):
                return False
            self._released.add(message, frame, kept)
        drops.clear()
        return True

    def _written_down(self, drops: Sequence[_Drop]) -> int:
        """How many drops are on record; none of those whose journal does not answer in time."""
        journal, aside = self._outputs.journal, self._asides.get("journal")
        if journal is None:
            return 0
        decisions = [drop.decision for drop in drops]
        if aside is None:
            return journal.dropped(decisions)
        due_ns = min(drop.frame.received_ns for drop in drops) + self._options.deadline_ns
        answered, written = aside.ask(
            lambda: journal.dropped(decisions),
            max(_JOURNAL_LEAST_S, (due_ns - self._clock()) * 1e-9),
            lambda count: journal.withdrawn(decisions[:count]),
        )
        return int(written) if answered else 0

    def _enter_in_books(self) -> None:
        """Tell ledger and listeners of what was released since the last time."""
        messages, frames, decisions = self._released.unbooked()
        if not decisions:
            return
        self._unsettled_ns = self._clock()
        self.ledger.released(decisions)
        self._metrics.released(decisions)
        if not (series := frames[-1].series).started and series.key != self._joined:
            self._joined = series.key
            self.health.joined(series.key)
        self._latencies_us.extend([decision.latency_us for decision in decisions])
        if (publisher := self._outputs.publisher) is not None:
            self._shield("publisher", lambda: publisher.tell(decisions))
        if (table := self._outputs.table) is not None:
            self._beside(
                "decision table", lambda: table.add(decisions), _ROW_BYTES * len(decisions)
            )
        if self._outputs.crystfel is not None:
            self._outputs.crystfel.offer(frames, decisions)
        if self._outputs.kept is not None:
            for message, frame, decision in zip(messages, frames, decisions, strict=True):
                self._write_kept(self._outputs.kept, message, frame, decision)
        heard: Series | None = None
        for frame in frames:
            if frame.series is not heard:
                heard = frame.series
                self._hear_of(heard)

    def _write_kept(
        self, kept: KeptSink, message: Message, frame: Frame, decision: Decision
    ) -> None:
        """Live, the kept file holds what was forwarded. Recorded frames are safe where they
        are, so there it holds what the policy keeps, whatever the mode."""
        wanted = decision.forwarded
        if not self._options.live:
            wanted = decision.verdict is Verdict.KEEP or decision.override is Override.AUDIT
        if not wanted or (not self._options.live and frame.frame < 0):
            return
        self._beside("kept file", lambda: kept.write(frame, decision, message), message.size_bytes)

    def _settle(self) -> None:
        """A detector may pause for hours, and this process be killed meanwhile."""
        since_ns = self._unsettled_ns
        if since_ns is None or self._clock() - since_ns < _SETTLE_NS:
            return
        self._unsettled_ns = None
        if (table := self._outputs.table) is not None:
            self._beside("decision table", table.flush)
        if (kept := self._outputs.kept) is not None:
            self._beside("kept file", kept.settle)

    def _pass_on(self, message: Message) -> bool:
        """Send on what is no frame, and do what a start or an end asks for."""
        if not self._forward(self._with_totals(message)):
            return False
        self._enter_in_books()
        if message.series is not None and message.kind is MessageKind.START:
            self.health.started(message.lane, message.series.key)
            known = self._unended.get(message.series.key)
            if known is None:
                self._end_those_left()
                self._heard.clear()
            self._hear_of(message.series)
            if known is not message.series:
                # The header of a series that comes on one more socket is the same object.
                self._unended[message.series.key] = message.series
                self._series_started(message.series, message)
        elif message.series is not None and message.kind is MessageKind.END:
            self.health.ended(message.series.key)
            self._series_ended(message.series, self.ledger.ended(message.series))
            self._end_those_left()
        return True

    def _hear_of(self, series: Series) -> None:
        """Something of a series goes on."""
        key = series.key
        self._heard.add(key)
        if key not in self._unended:
            self._unended[key] = series
            self._reported.discard(key)
            if len(self._unended) > _MOST_UNENDED:
                running = self.health.series
                oldest = min(self._unended, key=running.__contains__)
                self._series_left(self._unended[oldest])

    def _end_those_left(self) -> None:
        """End series whose end never came: another one runs where they ran, and nothing of them
        went on since that began."""
        if not self._unended:
            return
        running = self.health.series
        left = [s for key, s in self._unended.items() if key not in (*self._heard, *running)]
        for series in left:
            self._series_left(series)

    def _series_left(self, series: Series) -> None:
        # Of one that ended, images may come behind the end.
        if not self.ledger.report(series.key).ended:
            log.warning(
                "series %d %s: its end never came; it is taken for over",
                series.series_id,
                series.series_unique_id,
            )
        self._series_ended(series, self.ledger.left(series))

    def _with_totals(self, message: Message) -> Message:
        """The end of a series with its ledger, where that is asked for."""
        annotator = self._outputs.annotator
        if annotator is None or message.kind is not MessageKind.END or message.series is None:
            return message
        self._enter_in_books()
        try:
            return annotator.ended(message, self.ledger.next_end(message.series.key))
        except Exception as err:  # fail open: the end goes on as it came
            log.exception("the totals of a series could not be written into its end")
            self._note_sink_error("annotation", f"an end went on without totals: {err}")
            return message

    def _mind_writers(self) -> None:
        """Say when a writer is left out, and when none is any more."""
        forwarder = self._forwarder
        if forwarder is None or not (forwarder.trouble or self._writer_trouble):
            return
        forwarder.catch_up()
        if forwarder.trouble == self._writer_trouble:
            return
        self._writer_trouble = forwarder.trouble
        if self._writer_trouble:
            self.health.add(Trouble.WRITER_LOST, self._writer_trouble)
        else:
            self.health.clear(Trouble.WRITER_LOST)

    def _forward(self, message: Message) -> bool:
        """Send the parts on, waiting for the writer as long as it takes; False when abandoned."""
        forwarder = self._forwarder
        if forwarder is None or not message.parts or forwarder.send(message, 0):
            return True
        self._enter_in_books()
        return self._wait_for_writer(forwarder, message, "publish")

    def _wait_for_writer(self, forwarder: MessageSink, message: Message, stage: str) -> bool:
        """Offer a message until it is taken; False when abandoned."""
        while not forwarder.send(message, _POLL_MS):
            if self._line.abandoned:
                return False
            self._alive_ns[stage] = self._stalled_ns = self._clock()
            self.health.add(
                Trouble.WRITER_STALLED,
                f"the writer kept a message waiting for {_POLL_MS} ms or more; frames are queued "
                "up to the byte budget",
            )
            if stage == "publish":
                self._greet_newcomers()
        return True

    def _greet_newcomers(self) -> None:
        if (publisher := self._outputs.publisher) is None:
            return
        if publisher.gate_open != self.gate_open:
            publisher.gate_open = self.gate_open
            self._greeting_due = True
        if self._greeting_due:
            # Before any decision by what is new is told.
            self._greeting_due = False
            publisher.hello()
        publisher.greet_newcomers()

    def _series_started(self, series: Series, message: Message) -> None:
        self._reported.discard(series.key)
        log.info("series %d %s started", series.series_id, series.series_unique_id)
        if (kept := self._outputs.kept) is not None:
            self._beside("kept file", lambda: kept.start(series, message), message.size_bytes)
        if self._outputs.crystfel is not None:
            self._outputs.crystfel.series_started(series)
        if self._outputs.publisher is not None:
            self._outputs.publisher.hello()

    def _series_ended(self, series: Series, report: SeriesReport) -> None:
        self._unended.pop(series.key, None)
        self._heard.discard(series.key)
        if series.key not in self._reported:
            self._report_series(series.key, report)
        if (kept := self._outputs.kept) is not None:
            self._beside("kept file", lambda: kept.end(series.key, report))
        if (table := self._outputs.table) is not None:
            self._beside("decision table", table.flush)

    def _report_series(self, key: tuple[int, str], report: SeriesReport) -> None:
        self._reported.add(key)
        self._metrics.series(report)
        if (publisher := self._outputs.publisher) is not None:
            self._shield("publisher", lambda: publisher.series_report(report))
        say = log.info if report.balanced else log.error
        say(
            "series %d %s: received %d = %s %d + dropped %d + undecided %d; missing %d%s",
            report.series_id,
            report.series_unique_id,
            report.received,
            "forwarded" if self.sends_on else "not dropped",
            report.forwarded,
            report.dropped,
            report.undecided,
            report.missing,
            "" if report.balanced else "  DOES NOT BALANCE",
        )
        if report.restarts:
            log.error(
                "series %d %s: the program was started anew %d times while it ran; of what was "
                "forwarded at most %d did not reach the writer",
                report.series_id,
                report.series_unique_id,
                report.restarts,
                report.in_doubt,
            )

    def _beside(self, sink: str, action: Callable[[], object], size_bytes: int = 0) -> None:
        """Run a sink that may fail or hang without harm to frames."""
        aside = self._asides.get(sink)
        if aside is None:
            self._shield(sink, action)
        elif not aside.post(lambda: self._shield(sink, action), size_bytes):
            self._note_sink_error(sink, "it does not keep up; this is left out of it")
            self._failing_sinks.add(sink)
            self.health.add(Trouble.OUTPUT_FAILING, f"{sink}: it does not keep up")

    def _shield(self, sink: str, action: Callable[[], object]) -> None:
        """Run a sink that may fail without harm to frames; say so once, count always."""
        try:
            action()
        except Exception as err:  # fail open: the frames are not harmed
            if not isinstance(err, TriageError | OSError):
                log.exception("%s failed", sink)
            self._note_sink_error(sink, str(err) or type(err).__name__)
            self._failing_sinks.add(sink)
            self.health.add(Trouble.OUTPUT_FAILING, f"{sink}: {err}")
            return
        if sink in self._failing_sinks:
            self._failing_sinks.discard(sink)
            if not self._failing_sinks:
                self.health.clear(Trouble.OUTPUT_FAILING)

    def _note_sink_error(self, sink: str, what: str) -> None:
        self._metrics.sink_error(sink)
        if len(self.sink_errors) < _SINK_ERRORS_KEPT:
            self.sink_errors.append(f"{sink}: {what}")
        if sink not in self._broken_sinks:
            self._broken_sinks.add(sink)
            log.error("%s: %s", sink, what)


def _quantile(ordered: Sequence[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else math.nan

"""One frame's way from receipt to verdict to writer: the only orchestration.

::

    receive   source ──► Message, payload still compressed
                  == line: every message in the order received, bounded by bytes ==
    compute   batch ──► backend ──► scorer ──► policy          Judgement
    publish   head of the line ──► audit, journal, forward, publish, table, kept file, ledger

Every message stands in one line from receipt to release, and only its head is released, so
order holds by construction. The compute thread writes a judgement into entries of the line;
when the head has none at its deadline, the publish thread writes ``late`` into it and goes on.
A hung network or device therefore delays a frame by ``deadline_ms`` and loses none.

Threads talk through the line alone, under one condition variable. ``Pipeline.step`` runs one
turn of all three stages on the caller's thread and is the same code.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic, monotonic_ns
from typing import Any, Protocol

import numpy as np

from triage.backends import Backend
from triage.errors import DecodeError, DeviceError, TriageError, UnsupportedEncoding
from triage.ingest import Source
from triage.ledger import Ledger
from triage.metrics import Metrics
from triage.policy import Policy
from triage.records import (
    LEAST_VALID,
    NOT_SCORED,
    AuditReport,
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

__all__ = ["Decider", "Judgement", "Outputs", "Pipeline", "PipelineOptions", "Snapshot"]

log = logging.getLogger(__name__)

_POLL_MS = 100
"""How often a waiting thread looks whether it should stop; no frame waits for it."""

_REPLAY_AHEAD_FRAMES = 64
"""Recorded frames read ahead of the decision: enough to keep batches full."""

_SINK_ERRORS_KEPT = 100
"""Messages of failed sinks kept for the report; the metric counts them all."""

_LATENCY_WINDOW = 2048
"""Frames over which the progress line's percentiles are taken."""


_BLIND = "less than a tenth of the pixels are valid: look at mask and saturation value"

_AUDIT_END_S = {True: 10.0, False: 600.0}
"""How long the end of a live and of a recorded run waits for the audit to look at its sample."""


class FrameScorer(Protocol):
    """What the decider asks of the network; ``triage.nets.scorer.Scorer`` is one."""

    def fast(self, views: Views) -> list[Scores]: ...

    def full(
        self, views: Views, tiles: Any, rows: Sequence[int], scores: list[Scores]
    ) -> list[Scores]: ...


class KeptSink(Protocol):
    """What the pipeline asks of a writer of kept frames."""

    def start(self, series: Series) -> None: ...

    def write(self, frame: Frame, scores: Scores | None) -> None: ...

    def end(self, key: tuple[int, str]) -> list[Any]: ...

    def close(self) -> Any: ...


class DecisionSink(Protocol):
    """What the pipeline asks of a table or list of decisions."""

    def add(self, decision: Decision) -> None: ...


class MessageSink(Protocol):
    """What the pipeline asks of a forwarder."""

    def send(self, parts: Sequence[Any], timeout_ms: int) -> bool: ...


class DropSink(Protocol):
    """What the pipeline asks of the journal of drops."""

    def dropped(self, decision: Decision) -> bool: ...


class AuditSink(Protocol):
    """What the pipeline asks of the audit; ``triage.audit.Audit`` is one."""

    @property
    def gate_open(self) -> bool: ...

    def offer(self, frame: Frame) -> None: ...

    def wait(self, timeout_s: float) -> bool: ...

    def finish(self) -> AuditReport: ...


class AnnouncingSink(Protocol):
    """What the pipeline asks of the decision publisher."""

    def greet_newcomers(self) -> None: ...

    def hello(self) -> None: ...

    def decision(self, decision: Decision) -> None: ...

    def series_report(self, report: SeriesReport) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judgement:
    """What the compute stage says of one frame."""

    verdict: Verdict
    reason: Reason
    scores: Scores = NOT_SCORED
    decided_ns: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Where released frames go; None where a sink is not wanted."""

    forwarder: MessageSink | None = None
    publisher: AnnouncingSink | None = None
    journal: DropSink | None = None
    table: DecisionSink | None = None
    kept: KeptSink | None = None
    audit: AuditSink | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineOptions:
    """How the pipeline runs.

    Attributes:
        live: deadlines and overload apply; recorded input waits instead.
        deadline_ns: receipt to release of a frame without a score.
        queue_bytes: bytes of messages that may stand in the line.
        batch_size: frames per call of backend and network.
        batch_wait_ns: how long a batch may wait to fill.
    """

    live: bool = True
    deadline_ns: int = 500_000_000
    queue_bytes: int = 2 << 30
    batch_size: int = 8
    batch_wait_ns: int = 5_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The state of a run, for a progress line."""

    totals: SeriesReport
    latency_p50_us: float
    latency_p99_us: float
    queue_frames: int
    queue_bytes: int
    state: str


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
    ) -> None:
        self._backend = backend
        self._scorer = scorer
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
        judged = [self.policy.judge(f, s) for f, s in zip(frames, scores, strict=True)]
        rows = [
            i
            for i, frame in enumerate(frames)
            if views.errors[i] is None
            and math.isfinite(scores[i].p_blank)
            and self.policy.wants_full_exit(frame, judged[i][0])
        ]
        if rows:
            full_began = self._clock()
            tiles = self._backend.tiles(frames, views, rows)
            scores = self._scorer.full(views, tiles, rows, scores)
            self._metrics.stage("score_full", (self._clock() - full_began) * 1e-9)
        now = self._clock()
        return [
            self._judgement(judged[i], scores[i], views.errors[i], now, _BLIND if blind[i] else "")
            for i in range(len(frames))
        ]

    @staticmethod
    def _judgement(
        judged: tuple[Verdict, Reason],
        scores: Scores,
        error: TriageError | None,
        now_ns: int,
        detail: str = "",
    ) -> Judgement:
        verdict, reason = judged
        if error is None:
            return Judgement(
                verdict=verdict, reason=reason, scores=scores, decided_ns=now_ns, detail=detail
            )
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
    return int(views.count[row].sum(dtype=np.int64)) < LEAST_VALID * pixels


@dataclass(slots=True, eq=False)
class _Entry:
    """One message in the line, and its judgement once there is one."""

    message: Message
    judgement: Judgement | None = None

    @property
    def awaits(self) -> bool:
        return self.message.kind is MessageKind.IMAGE and self.judgement is None


@dataclass(slots=True)
class _Line:
    """What the threads share, all of it under ``changed``."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    entries: deque[_Entry] = field(default_factory=deque)
    pending: deque[_Entry] = field(default_factory=deque)
    entry_bytes: int = 0
    pending_bytes: int = 0
    input_closed: bool = False
    stopping: bool = False
    abandoned: bool = False
    compute_failed: str = ""


class Pipeline:
    """Runs a source through the decider into the outputs, and keeps the ledger.

    Use either :meth:`run` (three threads until the source is exhausted or :meth:`stop`) or
    :meth:`step` (one turn on the caller's thread). The pipeline closes nothing that it was
    given except the series in ``outputs.kept``.
    """

    def __init__(
        self,
        source: Source,
        decider: Decider,
        outputs: Outputs,
        options: PipelineOptions,
        metrics: Metrics,
        *,
        model_id: str = "",
        clock: Callable[[], int] = monotonic_ns,
    ) -> None:
        self.ledger = Ledger()
        self.failure: BaseException | None = None
        self.sink_errors: list[str] = []
        self.audit_report: AuditReport | None = None
        self._source = source
        self._decider = decider
        self._policy = decider.policy
        self._outputs = outputs
        self._options = options
        self._metrics = metrics
        self._model_id = model_id
        self._clock = clock
        self._line = _Line()
        self._latencies_us: deque[float] = deque(maxlen=_LATENCY_WINDOW)
        self._reported: set[tuple[int, str]] = set()
        self._writing: set[tuple[int, str]] = set()
        self._broken_sinks: set[str] = set()
        self._stalled = False

    # -- life ----------------------------------------------------------------------------------

    def run(self) -> None:
        """Run until the source is exhausted or stopped, and everything received is released.

        ``failure`` holds what broke a thread, if anything did; ``audit_report`` what the audit
        found.
        """
        self._metrics.state("ready")
        threads = [
            threading.Thread(target=self._guard, args=(body,), name=name, daemon=True)
            for name, body in (
                ("receive", self._receive_loop),
                ("compute", self._compute_loop),
                ("publish", self._publish_loop),
            )
        ]
        for thread in threads:
            thread.start()
        receive, compute, publish = threads
        receive.join()
        publish.join()
        # A hung network must not hold the end of the run: its frames have gone on as late.
        compute.join(timeout=self._options.deadline_ns * 1e-9 if self._options.live else None)
        self._finish()

    def stop(self) -> None:
        """Take no more input; decide and release what was received. Safe in a signal handler's
        thread; a second call gives up on what is not yet released."""
        line = self._line
        line.abandoned = line.stopping
        line.stopping = True
        self._metrics.state("draining")

    def step(self) -> list[Decision]:
        """One turn of all three stages on the caller's thread; what was released by it."""
        self._admit(self._source.receive(0))
        while self._compute_batch(wait=False):
            pass
        decisions: list[Decision] = []
        while (entry := self._next_release(block=False)) is not None:
            decision = self._release(entry)
            if decision is not None:
                decisions.append(decision)
        return decisions

    def snapshot(self) -> Snapshot:
        """The counts and latencies now."""
        latencies = sorted(self._latencies_us)
        with self._line.changed:
            frames, size = len(self._line.entries), self._line.entry_bytes
        state = "draining" if self._line.stopping else "running"
        if self._outputs.audit is not None and self._outputs.audit.gate_open:
            state = "gate open"
        if self._stalled:
            state = "writer stalled"
        return Snapshot(
            totals=self.ledger.totals(),
            latency_p50_us=_quantile(latencies, 0.50),
            latency_p99_us=_quantile(latencies, 0.99),
            queue_frames=frames,
            queue_bytes=size,
            state=state,
        )

    def _guard(self, body: Callable[[], None]) -> None:
        """The outermost frame of a thread: nothing dies unseen."""
        try:
            body()
        except Exception as err:  # reported by run() and the exit code
            name = threading.current_thread().name
            log.exception("the %s thread failed", name)
            self._metrics.state("degraded")
            with self._line.changed:
                if name == "compute":
                    self._line.compute_failed = f"{type(err).__name__}: {err}"
                else:
                    self.failure = err
                    self._line.stopping = True
                    self._line.input_closed = True
                    self._line.abandoned = name == "publish"
                self._line.changed.notify_all()

    def _finish(self) -> None:
        for report in self.ledger.reports():
            key = (report.series_id, report.series_unique_id)
            if key not in self._reported:
                self._report_series(key, report)
        if self._outputs.kept is not None:
            self._shield("kept file", self._outputs.kept.close)
        if (audit := self._outputs.audit) is not None:
            until_s = monotonic() + _AUDIT_END_S[self._options.live]
            while not (audit.wait(0.2) or self._line.abandoned or monotonic() > until_s):
                pass
            self.audit_report = audit.finish()
        self._metrics.state("stopped")

    # -- receive -------------------------------------------------------------------------------

    def _receive_loop(self) -> None:
        line = self._line
        while not line.stopping:
            if self._wait_for_room():
                self._admit(self._source.receive(_POLL_MS))
            if self._source.exhausted:
                break
        if self._options.live and not line.abandoned:
            self._drain_source()
        with line.changed:
            line.input_closed = True
            line.changed.notify_all()

    def _drain_source(self) -> None:
        """Take what already reached this machine; a detector still sending is cut off here."""
        until_ns = self._clock() + self._options.deadline_ns
        while self._clock() < until_ns and not self._line.abandoned:
            messages = self._source.receive(0)
            if not messages:
                return
            self._admit(messages)

    def _wait_for_room(self) -> bool:
        """True when the line may grow; waits a moment when not, which holds the detector back."""
        line, options = self._line, self._options
        with line.changed:
            full = line.entry_bytes >= options.queue_bytes or (
                not options.live and len(line.pending) >= _REPLAY_AHEAD_FRAMES
            )
            if not full:
                return True
            line.changed.wait(_POLL_MS * 1e-3)
            return False

    def _admit(self, messages: Sequence[Message]) -> None:
        line = self._line
        for message in messages:
            self.ledger.received(message)
            self._metrics.message(message.kind)
            entry = _Entry(message)
            frame = message.frame
            if frame is not None and frame.fault is not None:
                entry.judgement = Judgement(
                    verdict=Verdict.KEEP,
                    reason=frame.fault,
                    decided_ns=self._clock(),
                    detail=frame.fault_detail,
                )
            with line.changed:
                line.entries.append(entry)
                line.entry_bytes += message.size_bytes
                if entry.awaits:
                    line.pending.append(entry)
                    line.pending_bytes += message.size_bytes
                    self._shed_overload()
                line.changed.notify_all()
        if messages:
            self._metrics.queue("line", len(line.entries))
            self._metrics.queue("pending", len(line.pending))
            self._metrics.queue_bytes(line.entry_bytes)

    def _shed_overload(self) -> None:
        """When half the budget waits for a score, the oldest frame goes on without one."""
        line = self._line
        if not self._options.live:
            return
        while line.pending_bytes > self._options.queue_bytes // 2 and len(line.pending) > 1:
            oldest = line.pending.popleft()
            line.pending_bytes -= oldest.message.size_bytes
            if oldest.awaits:
                oldest.judgement = self._unscored(Reason.OVERLOAD)

    def _unscored(self, reason: Reason, detail: str = "") -> Judgement:
        return Judgement(
            verdict=Verdict.KEEP, reason=reason, decided_ns=self._clock(), detail=detail
        )

    # -- compute -------------------------------------------------------------------------------

    def _compute_loop(self) -> None:
        line = self._line
        while not line.abandoned:
            decided = self._compute_batch(wait=True)
            if not decided and line.input_closed and not line.pending:
                return

    def _compute_batch(self, *, wait: bool) -> bool:
        """Decide one batch; False when no frame awaits a score."""
        batch = self._next_batch(wait=wait)
        if not batch:
            return False
        judgements = self._decider.decide([e.message.frame for e in batch if e.message.frame])
        with self._line.changed:
            for entry, judgement in zip(batch, judgements, strict=True):
                if entry.judgement is None:
                    entry.judgement = judgement
            self._line.changed.notify_all()
        return True

    def _next_batch(self, *, wait: bool) -> list[_Entry]:
        """Frames that still await a score: a full batch, or what came in ``batch_wait_ns``."""
        line, options = self._line, self._options
        with line.changed:
            while wait and not line.pending and not line.input_closed and not line.abandoned:
                line.changed.wait()
            if wait and options.live:
                until_ns = self._clock() + options.batch_wait_ns
                while len(line.pending) < options.batch_size and not line.input_closed:
                    left_ns = until_ns - self._clock()
                    if left_ns <= 0:
                        break
                    line.changed.wait(left_ns * 1e-9)
            batch: list[_Entry] = []
            while line.pending and len(batch) < options.batch_size and not line.abandoned:
                entry = line.pending.popleft()
                line.pending_bytes -= entry.message.size_bytes
                if entry.awaits:
                    batch.append(entry)
            line.changed.notify_all()
        return batch

    # -- publish -------------------------------------------------------------------------------

    def _publish_loop(self) -> None:
        while (entry := self._next_release(block=True)) is not None:
            self._release(entry)

    def _next_release(self, *, block: bool) -> _Entry | None:
        """The head of the line once it may go; None when there is none to wait for."""
        line = self._line
        with line.changed:
            while not line.abandoned:
                if not line.entries:
                    if not block or line.input_closed:
                        return None
                    line.changed.wait(_POLL_MS * 1e-3)
                    self._greet_newcomers()
                    continue
                head = line.entries[0]
                if head.awaits and not self._settle(head):
                    if not block:
                        return None
                    continue
                return line.entries.popleft()
            return None

    def _settle(self, head: _Entry) -> bool:
        """Give an unjudged head its judgement when its time is up; else wait a little."""
        line, options = self._line, self._options
        if line.compute_failed:
            head.judgement = self._unscored(Reason.SCORER_ERROR, line.compute_failed)
            return True
        wait_s = _POLL_MS * 1e-3
        if options.live:
            left_ns = head.message.received_ns + options.deadline_ns - self._clock()
            if left_ns <= 0:
                head.judgement = self._unscored(Reason.LATE)
                return True
            wait_s = min(wait_s, left_ns * 1e-9)
        line.changed.wait(wait_s)
        return False

    def _release(self, entry: _Entry) -> Decision | None:
        """Do with one message what was decided, and enter it in the books."""
        message = entry.message
        decision: Decision | None = None
        self._greet_newcomers()
        if message.frame is not None and entry.judgement is not None:
            decision = self._release_frame(message, message.frame, entry.judgement)
        else:
            self._forward(message)
            if message.series is not None and message.kind is MessageKind.START:
                self._series_started(message.series)
            elif message.series is not None and message.kind is MessageKind.END:
                self._series_ended(message.series)
        line = self._line
        with line.changed:
            line.entry_bytes -= message.size_bytes
            line.changed.notify_all()
        return decision

    def _release_frame(
        self, message: Message, frame: Frame, judgement: Judgement
    ) -> Decision | None:
        forwarded, override = self._policy.dispose(frame, judgement.verdict)
        audit = self._outputs.audit
        if audit is not None and judgement.verdict is Verdict.VETO:
            if self._policy.is_audited(frame):
                audit.offer(frame)
            if not forwarded and audit.gate_open:
                forwarded, override = True, Override.GATE_OPEN
        decision = Decision(
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
            policy_id=self._policy.policy_id,
            latency_us=max(0, judgement.decided_ns - frame.received_ns) * 1e-3,
            decided_ns=judgement.decided_ns,
            duplicate=frame.duplicate,
            detail=judgement.detail,
        )
        journal = self._outputs.journal
        if not forwarded and (journal is None or not journal.dropped(decision)):
            # A drop that is not written down must not happen.
            self._note_sink_error("journal", "a drop could not be written; the frame went on")
            decision = replace(decision, forwarded=True, override=Override.GATE_OPEN)
        if decision.forwarded and not self._forward(message):
            return None
        self.ledger.released(decision)
        self._metrics.decision(decision)
        self._latencies_us.append(decision.latency_us)
        if self._outputs.publisher is not None:
            self._outputs.publisher.decision(decision)
        if (table := self._outputs.table) is not None:
            self._shield("decision table", lambda: table.add(decision))
        self._write_kept(frame, decision)
        return decision

    def _write_kept(self, frame: Frame, decision: Decision) -> None:
        """Live, the kept file holds what was forwarded. Recorded frames are safe where they
        are, so there it holds what the policy keeps, whatever the mode."""
        kept = self._outputs.kept
        wanted = decision.forwarded
        if not self._options.live:
            wanted = decision.verdict is Verdict.KEEP or decision.override is Override.AUDIT
        if kept is None or not wanted or (not self._options.live and frame.frame < 0):
            return
        if frame.series.key not in self._writing:
            self._writing.add(frame.series.key)
            self._shield("kept file", lambda: kept.start(frame.series))
        self._shield("kept file", lambda: kept.write(frame, decision.scores))

    def _forward(self, message: Message) -> bool:
        """Send the parts on, waiting for the writer as long as it takes; False when abandoned."""
        forwarder = self._outputs.forwarder
        if forwarder is None or not message.parts:
            return True
        while not forwarder.send(message.parts, _POLL_MS):
            if self._line.abandoned:
                return False
            if not self._stalled:
                self._stalled = True
                self._metrics.state("degraded")
                log.warning("the writer takes no messages; frames are queued up to the byte budget")
            self._greet_newcomers()
        if self._stalled:
            self._stalled = False
            self._metrics.state("draining" if self._line.stopping else "ready")
            log.warning("the writer takes messages again")
        return True

    def _greet_newcomers(self) -> None:
        if self._outputs.publisher is not None:
            self._outputs.publisher.greet_newcomers()

    def _series_started(self, series: Series) -> None:
        self._reported.discard(series.key)
        log.info("series %d %s started", series.series_id, series.series_unique_id)
        if self._outputs.publisher is not None:
            self._outputs.publisher.hello()

    def _series_ended(self, series: Series) -> None:
        report = self.ledger.ended(series)
        if series.key not in self._reported:
            self._report_series(series.key, report)
        kept = self._outputs.kept
        if kept is not None and series.key in self._writing:
            self._writing.discard(series.key)
            self._shield("kept file", lambda: kept.end(series.key))

    def _report_series(self, key: tuple[int, str], report: SeriesReport) -> None:
        self._reported.add(key)
        self._metrics.series(report)
        if self._outputs.publisher is not None:
            self._outputs.publisher.series_report(report)
        say = log.info if report.balanced else log.error
        say(
            "series %d %s: received %d = forwarded %d + dropped %d + undecided %d; missing %d%s",
            report.series_id,
            report.series_unique_id,
            report.received,
            report.forwarded,
            report.dropped,
            report.undecided,
            report.missing,
            "" if report.balanced else "  DOES NOT BALANCE",
        )

    def _shield(self, sink: str, action: Callable[[], object]) -> None:
        """Run a sink that may fail without harm to frames; say so once, count always."""
        try:
            action()
        except (TriageError, OSError) as err:
            self._note_sink_error(sink, str(err))

    def _note_sink_error(self, sink: str, what: str) -> None:
        self._metrics.sink_error(sink)
        if len(self.sink_errors) < _SINK_ERRORS_KEPT:
            self.sink_errors.append(f"{sink}: {what}")
        if sink not in self._broken_sinks:
            self._broken_sinks.add(sink)
            log.error("%s: %s", sink, what)


def _quantile(ordered: Sequence[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else math.nan

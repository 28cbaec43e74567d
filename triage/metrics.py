"""Every Prometheus series, and the only module that knows prometheus_client.

Names carry their unit. Label values come from closed sets, never from series or image ids. One
:class:`Metrics` has one registry, so two runs in a process do not mix.
"""

from __future__ import annotations

import json
import threading
from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from triage.health import STATES, Trouble
from triage.records import (
    AuditReport,
    Decision,
    DriftReport,
    Message,
    MessageKind,
    Override,
    Reason,
    SeriesReport,
    Verdict,
)

__all__ = ["Metrics", "MetricsServer"]

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


_Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class MetricsServer:
    """The HTTP endpoint; ``port`` is 0 when it is switched off.

    ``/health`` is for those who only want to know whether frames go on: JSON, status 200 in the
    states ready, armed and degraded, 503 in the others. Every other path gives the metrics.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        host: str,
        port: int,
        health: Callable[[], tuple[str, list[str]]],
    ) -> None:
        self.port = 0
        self._server = None
        if port:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
            self.port = self._server.server_port
            self._server.set_app(_with_health(self._server.get_app(), health))

    def close(self) -> None:
        """Stop serving; may be called twice."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _with_health(app: _Wsgi | None, health: Callable[[], tuple[str, list[str]]]) -> _Wsgi:
    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environ.get("PATH_INFO") != "/health" and app is not None:
            return app(environ, start)
        state, degraded = health()
        fit = state in ("ready", "armed", "degraded")
        start(
            "200 OK" if fit else "503 Service Unavailable", [("Content-Type", "application/json")]
        )
        return [json.dumps({"state": state, "degraded": degraded}).encode() + b"\n"]

    return answer


class _Histogram:
    """Counts by bucket; not locked."""

    __slots__ = ("_counts", "_sum")

    def __init__(self) -> None:
        self._counts = [0] * (len(_SECONDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(_SECONDS, seconds)] += 1
        self._sum += seconds

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts by upper bound, and the sum, as Prometheus wants them."""
        total, found = 0, []
        bounds = (*(str(bound) for bound in _SECONDS), "+Inf")
        for bound, count in zip(bounds, self._counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found, self._sum


class _FrameCounts(Collector):
    """What is counted for every message and frame: plain numbers under one lock a batch.

    A call into prometheus_client costs microseconds, and a frame would need ten of them.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.messages: Tally[MessageKind] = Tally(dict.fromkeys(MessageKind, 0))
        # Each is there from the start: Prometheus does not see the first step of a series that
        # begins with it, and no alert on it would come.
        self.frames: Tally[tuple[Verdict, Reason]] = Tally(
            {(Verdict.KEEP, reason): 0 for reason in Reason} | {(Verdict.VETO, Reason.SCORE): 0}
        )
        self.released: Tally[bool] = Tally({True: 0, False: 0})
        self.overrides: Tally[Override] = Tally(
            {override: 0 for override in Override if override is not Override.NONE}
        )
        self.duplicates = 0
        self.journalled = 0
        self.queue = (0, 0, 0)
        self.decision_seconds = _Histogram()
        self.stage_seconds: dict[str, _Histogram] = {}
        self.cpu_seconds: dict[str, float] = {}

    def collect(self) -> Iterator[Metric]:
        with self.lock:
            families = list(self._families())
        yield from families

    def _families(self) -> Iterator[Metric]:
        messages = CounterMetricFamily("triage_messages", "Messages received.", labels=["kind"])
        for kind, n in self.messages.items():
            messages.add_metric([kind.value], n)
        yield messages
        frames = CounterMetricFamily(
            "triage_frames", "Frames decided.", labels=["verdict", "reason"]
        )
        for (verdict, reason), n in self.frames.items():
            frames.add_metric([verdict.value, reason.value], n)
        yield frames
        released = CounterMetricFamily(
            "triage_released", "Frames let go: forwarded or dropped.", labels=["how"]
        )
        for forwarded, n in self.released.items():
            released.add_metric(["forwarded" if forwarded else "dropped"], n)
        yield released
        overrides = CounterMetricFamily(
            "triage_overrides", "Vetoed frames that were forwarded.", labels=["override"]
        )
        for override, n in self.overrides.items():
            overrides.add_metric([override.value], n)
        yield overrides
        yield CounterMetricFamily(
            "triage_journalled",
            "Drops that stand in the journal; never fewer than were dropped.",
            value=self.journalled,
        )
        yield CounterMetricFamily("triage_duplicates", "Frames seen before.", value=self.duplicates)
        yield GaugeMetricFamily(
            "triage_undecided",
            "Frames received and not yet released.",
            value=self.messages[MessageKind.IMAGE] - sum(self.released.values()),
        )
        depth = GaugeMetricFamily(
            "triage_queue_depth", "Messages in line and frames awaiting a score.", labels=["stage"]
        )
        line, pending, line_bytes = self.queue
        depth.add_metric(["line"], line)
        depth.add_metric(["pending"], pending)
        yield depth
        yield GaugeMetricFamily("triage_queue_bytes", "Bytes in line.", value=line_bytes)
        decisions = HistogramMetricFamily("triage_decision_seconds", "Receipt to decision.")
        decisions.add_metric([], *self.decision_seconds.buckets())
        yield decisions
        stages = HistogramMetricFamily(
            "triage_stage_seconds", "One batch in one stage.", labels=["stage"]
        )
        for stage, histogram in self.stage_seconds.items():
            stages.add_metric([stage], *histogram.buckets())
        yield stages
        cpu = CounterMetricFamily(
            "triage_cpu_seconds", "CPU time of the threads of a stage.", labels=["stage"]
        )
        for stage, seconds in self.cpu_seconds.items():
            cpu.add_metric([stage], seconds)
        yield cpu


class Metrics:
    """Counts of one run. Every method may be called from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self._counts = _FrameCounts()
        r.register(self._counts)
        self._writers = Gauge(
            "triage_writer_taking",
            "1 while a writer takes messages, 0 while the others go on without it.",
            ["writer"],
            registry=r,
        )
        self._forgotten = Counter(
            "triage_writer_forgotten",
            "Messages for all writers that one which was left out will never hear.",
            ["writer"],
            registry=r,
        )
        self._missing = Counter("triage_missing", "Gaps in image_id of ended series.", registry=r)
        self._series = Counter(
            "triage_series",
            "Series reported, by whether the ledger balanced.",
            ["balanced"],
            registry=r,
        )
        self._restarts = Gauge(
            "triage_restarts",
            "Times that this program was started anew while a series ran that it goes on with.",
            registry=r,
        )
        self._lost = Gauge(
            "triage_lost",
            "Frames of series gone on with that a process which died had: undecided, or in doubt "
            "because ZeroMQ may have held them.",
            ["how"],
            registry=r,
        )
        self._sink_errors = Counter(
            "triage_sink_errors", "Outputs that failed.", ["sink"], registry=r
        )
        self._state = Gauge("triage_state", "1 for the state now.", ["state"], registry=r)
        self._degraded = Gauge(
            "triage_degraded", "1 for each reason why the run is degraded.", ["reason"], registry=r
        )
        self._series_running = Gauge(
            "triage_series_running", "Series that have begun and not ended.", registry=r
        )
        self._model = Gauge(
            "triage_model_info",
            "The model that decides.",
            ["model_id", "policy_id", "mode"],
            registry=r,
        )
        self._audited = Gauge(
            "triage_audited",
            "Vetoed frames that the audit looked at, by what its finder says.",
            ["found"],
            registry=r,
        )
        self._audit_missed = Gauge(
            "triage_audit_missed", "Frames of the sample that were not looked at.", registry=r
        )
        self._audit_share = Gauge(
            "triage_audit_hit_share",
            "Share of hits among audited vetoes: 95 % interval and limit.",
            ["bound"],
            registry=r,
        )
        self._crystfel = Gauge(
            "triage_crystfel_frames",
            "Kept frames at the endpoint for CrystFEL, by what became of them.",
            ["how"],
            registry=r,
        )
        self._source_resets = Counter(
            "triage_source_resets", "Times a source that did not answer was asked anew.", registry=r
        )
        self._incomplete = Counter(
            "triage_incomplete_frames", "Frames that lacked the part of a port.", registry=r
        )
        self._late_parts = Counter(
            "triage_late_parts", "Parts of frames that came after their frame.", registry=r
        )
        self._gate_open = Gauge(
            "triage_gate_open", "1 when audit or operator stopped all drops.", registry=r
        )
        self._drift_distance = Gauge(
            "triage_drift_distance",
            "Distance of recent frames' distribution from that of the model's card, 0 to 1.",
            ["quantity"],
            registry=r,
        )
        self._drift_strange = Gauge(
            "triage_drift_strange_share",
            "Share of recent frames that the card's frames hardly show.",
            ["quantity"],
            registry=r,
        )
        self._drifted = Gauge(
            "triage_drifted",
            "1 where that share is too large beyond doubt.",
            ["quantity"],
            registry=r,
        )
        for balanced in ("yes", "no"):
            self._series.labels(balanced)
        self._missing_told: dict[tuple[int, str], int] = {}
        self._gate_held_open = False
        self._health: tuple[str, list[str]] = ("starting", [])
        self.state("starting")
        self.degraded(frozenset())

    def serve(self, host: str, port: int) -> MetricsServer:
        """Answer scrapes at ``http://host:port/metrics``, and ``/health``; port 0 = do not.

        Raises:
            ConfigError: the address cannot be bound.
        """
        from triage.errors import ConfigError

        try:
            return MetricsServer(self.registry, host, port, lambda: self._health)
        except OSError as err:
            raise ConfigError(
                f"[metrics] port = {port}: {err.strerror or err}; expected a free port of "
                f"{host}, or 0 for no endpoint"
            ) from err

    def received(self, messages: Iterable[Message]) -> None:
        """Messages were received."""
        counts = self._counts
        with counts.lock:
            for message in messages:
                counts.messages[message.kind] += 1

    def released(self, decisions: Iterable[Decision]) -> None:
        """Frames were decided and released."""
        counts = self._counts
        with counts.lock:
            for decision in decisions:
                counts.frames[decision.verdict, decision.reason] += 1
                counts.released[decision.forwarded] += 1
                if decision.override is not Override.NONE:
                    counts.overrides[decision.override] += 1
                counts.duplicates += decision.duplicate
                counts.decision_seconds.observe(decision.latency_us * 1e-6)

    def journalled(self, drops: int) -> None:
        """So many drops more stand in the journal."""
        counts = self._counts
        with counts.lock:
            counts.journalled += drops

    def stage(self, stage: str, seconds: float) -> None:
        """One batch took this long in a stage."""
        counts = self._counts
        with counts.lock:
            histogram = counts.stage_seconds.get(stage)
            if histogram is None:
                histogram = counts.stage_seconds[stage] = _Histogram()
            histogram.observe(seconds)

    def cpu(self, stage: str, seconds: float) -> None:
        """A thread of a stage used so much CPU time more."""
        with self._counts.lock:
            cpu = self._counts.cpu_seconds
            cpu[stage] = cpu.get(stage, 0.0) + seconds

    @property
    def cpu_seconds(self) -> dict[str, float]:
        """CPU time by stage so far: ``receive``, ``compute``, ``publish``."""
        with self._counts.lock:
            return dict(self._counts.cpu_seconds)

    def queue(self, line: int, pending: int, line_bytes: int) -> None:
        """How many messages stand in line and frames await a score now, and bytes in line."""
        self._counts.queue = (line, pending, line_bytes)

    def audit(self, report: AuditReport) -> None:
        """The audit looked at one more frame."""
        self._audited.labels("hit").set(report.hits)
        self._audited.labels("blank").set(report.audited - report.hits)
        self._audit_missed.set(report.skipped + report.unreadable)
        self._audit_share.labels("low").set(report.hit_share_low)
        self._audit_share.labels("high").set(report.hit_share_high)
        self._audit_share.labels("limit").set(report.limit)
        self._gate_open.set(float(report.gate_open or self._gate_held_open))

    def gate_held_open(self, held: bool) -> None:
        """All drops are stopped, whatever the audit finds; or are so no more."""
        self._gate_held_open = held
        self._gate_open.set(float(held))

    def drift(self, report: DriftReport) -> None:
        """The watch for drift judged its sample anew."""
        for q in report.quantities:
            self._drift_distance.labels(q.quantity).set(q.distance)
            self._drift_strange.labels(q.quantity).set(q.strange_share)
            self._drifted.labels(q.quantity).set(float(q.drifted))

    def crystfel(self, counts: Mapping[str, int]) -> None:
        """What became of kept frames at the endpoint for CrystFEL."""
        for how, n in counts.items():
            self._crystfel.labels(how).set(n)

    def writer(self, number: int, *, taking: bool) -> None:
        """Whether a writer, by its place in the setting, takes messages."""
        self._writers.labels(str(number)).set(float(taking))

    def writer_forgot(self, number: int, messages: int) -> None:
        """So many messages for all writers will not reach this one."""
        self._forgotten.labels(str(number)).inc(messages)

    def series(self, report: SeriesReport) -> None:
        """A series was reported."""
        self._series.labels("yes" if report.balanced else "no").inc()
        if report.missing:
            # The report of an identity that is used again holds the gaps of the series before.
            key = report.series_id, report.series_unique_id
            self._missing.inc(max(0, report.missing - self._missing_told.get(key, 0)))
            self._missing_told[key] = report.missing

    def continued(self, totals: SeriesReport) -> None:
        """What this run goes on with; told at its start."""
        self._restarts.set(totals.restarts)
        self._lost.labels("undecided").set(totals.undecided)
        self._lost.labels("in_doubt").set(totals.in_doubt)

    def sink_error(self, sink: str) -> None:
        """An output failed once."""
        self._sink_errors.labels(sink).inc()

    def source_reset(self) -> None:
        """A source that did not answer is asked anew, over a new connection."""
        self._source_resets.inc()

    def parts(self, incomplete: int, late: int) -> None:
        """So many frames went on without all their ports, so many parts came after theirs."""
        self._incomplete.inc(incomplete)
        self._late_parts.inc(late)

    def state(self, state: str) -> None:
        """What the process is doing; one of ``triage.health.STATES``."""
        self._health = (state, self._health[1])
        for name in STATES:
            self._state.labels(name).set(1.0 if name == state else 0.0)

    def degraded(self, reasons: Collection[str]) -> None:
        """What is wrong; values of ``triage.health.Trouble``."""
        self._health = (self._health[0], sorted(str(reason) for reason in reasons))
        for trouble in Trouble:
            self._degraded.labels(trouble.value).set(float(trouble.value in reasons))

    def series_running(self, count: int) -> None:
        """How many series have begun and not ended."""
        self._series_running.set(float(count))

    def frames_by_reason(self) -> dict[Reason, int]:
        """Frames released so far."""
        counts, by_reason = self._counts, Tally[Reason]()
        with counts.lock:
            for (_, reason), n in counts.frames.items():
                by_reason[reason] += n
        return dict(by_reason)

    def model(self, model_id: str, policy_id: str, mode: str) -> None:
        """Which model decides, and how; what was told before holds no more."""
        self._model.clear()
        self._model.labels(model_id, policy_id, mode).set(1.0)

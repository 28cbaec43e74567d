"""Every Prometheus series, and the only module that knows prometheus_client.

Names carry their unit. Label values come from closed sets, never from series or image ids. One
:class:`Metrics` has one registry, so two runs in a process do not mix.
"""

from __future__ import annotations

from types import TracebackType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from triage.records import AuditReport, Decision, MessageKind, SeriesReport

__all__ = ["STATES", "Metrics", "MetricsServer"]

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)

STATES = ("starting", "ready", "degraded", "draining", "stopped")


class MetricsServer:
    """The HTTP endpoint; ``port`` is 0 when it is switched off."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        self.port = 0
        self._server = None
        if port:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
            self.port = self._server.server_port

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


class Metrics:
    """Counts of one run. Every method may be called from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self._messages = Counter("triage_messages", "Messages received.", ["kind"], registry=r)
        self._frames = Counter(
            "triage_frames", "Frames decided.", ["verdict", "reason"], registry=r
        )
        self._released = Counter(
            "triage_released", "Frames let go: forwarded or dropped.", ["how"], registry=r
        )
        self._overrides = Counter(
            "triage_overrides", "Vetoed frames that were forwarded.", ["override"], registry=r
        )
        self._duplicates = Counter("triage_duplicates", "Frames seen before.", registry=r)
        self._missing = Counter("triage_missing", "Gaps in image_id of ended series.", registry=r)
        self._series = Counter(
            "triage_series",
            "Series reported, by whether the ledger balanced.",
            ["balanced"],
            registry=r,
        )
        self._sink_errors = Counter(
            "triage_sink_errors", "Outputs that failed.", ["sink"], registry=r
        )
        self._queue_depth = Gauge(
            "triage_queue_depth",
            "Messages in line and frames awaiting a score.",
            ["stage"],
            registry=r,
        )
        self._queue_bytes = Gauge("triage_queue_bytes", "Bytes in line.", registry=r)
        self._undecided = Gauge(
            "triage_undecided", "Frames received and not yet released.", registry=r
        )
        self._state = Gauge("triage_state", "1 for the state now.", ["state"], registry=r)
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
        self._gate_open = Gauge(
            "triage_gate_open", "1 when the audit stopped all drops.", registry=r
        )
        self._decision_seconds = Histogram(
            "triage_decision_seconds", "Receipt to decision.", registry=r, buckets=_SECONDS
        )
        self._stage_seconds = Histogram(
            "triage_stage_seconds",
            "One batch in one stage.",
            ["stage"],
            registry=r,
            buckets=_SECONDS,
        )
        for kind in MessageKind:
            self._messages.labels(kind.value)
        for how in ("forwarded", "dropped"):
            self._released.labels(how)
        self.state("starting")

    def serve(self, host: str, port: int) -> MetricsServer:
        """Answer scrapes at ``http://host:port/metrics``; port 0 = do not.

        Raises:
            ConfigError: the address cannot be bound.
        """
        from triage.errors import ConfigError

        try:
            return MetricsServer(self.registry, host, port)
        except OSError as err:
            raise ConfigError(
                f"[metrics] port = {port}: {err.strerror or err}; expected a free port of "
                f"{host}, or 0 for no endpoint"
            ) from err

    def message(self, kind: MessageKind) -> None:
        """One message was received."""
        self._messages.labels(kind.value).inc()
        if kind is MessageKind.IMAGE:
            self._undecided.inc()

    def decision(self, decision: Decision) -> None:
        """One frame was decided and released."""
        self._frames.labels(decision.verdict.value, decision.reason.value).inc()
        self._released.labels("forwarded" if decision.forwarded else "dropped").inc()
        self._undecided.dec()
        if decision.override:
            self._overrides.labels(decision.override.value).inc()
        if decision.duplicate:
            self._duplicates.inc()
        self._decision_seconds.observe(decision.latency_us * 1e-6)

    def stage(self, stage: str, seconds: float) -> None:
        """One batch took this long in a stage."""
        self._stage_seconds.labels(stage).observe(seconds)

    def queue(self, stage: str, depth: int) -> None:
        """How many stand in a queue now."""
        self._queue_depth.labels(stage).set(depth)

    def queue_bytes(self, size: int) -> None:
        """Bytes in line now."""
        self._queue_bytes.set(size)

    def audit(self, report: AuditReport) -> None:
        """The audit looked at one more frame."""
        self._audited.labels("hit").set(report.hits)
        self._audited.labels("blank").set(report.audited - report.hits)
        self._audit_missed.set(report.skipped + report.unreadable)
        self._audit_share.labels("low").set(report.hit_share_low)
        self._audit_share.labels("high").set(report.hit_share_high)
        self._audit_share.labels("limit").set(report.limit)
        self._gate_open.set(float(report.gate_open))

    def series(self, report: SeriesReport) -> None:
        """A series was reported."""
        self._series.labels("yes" if report.balanced else "no").inc()
        self._missing.inc(report.missing)

    def sink_error(self, sink: str) -> None:
        """An output failed once."""
        self._sink_errors.labels(sink).inc()

    def state(self, state: str) -> None:
        """What the process is doing; one of :data:`STATES`."""
        for name in STATES:
            self._state.labels(name).set(1.0 if name == state else 0.0)

    def model(self, model_id: str, policy_id: str, mode: str) -> None:
        """Which model decides."""
        self._model.labels(model_id, policy_id, mode).set(1.0)

"""What Prometheus scrapes."""

from __future__ import annotations

import http.client
import json
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from triage.errors import ConfigError
from triage.metrics import Metrics
from triage.records import (
    NOT_SCORED,
    AuditReport,
    Decision,
    Message,
    MessageKind,
    Override,
    Reason,
    SeriesReport,
    Verdict,
)


def decision(verdict: Verdict, *, forwarded: bool, override: Override) -> Decision:
    return Decision(
        series_id=1, series_unique_id="", image_id=0, file="", frame=-1, ordinal=0,
        verdict=verdict, reason=Reason.SCORE, forwarded=forwarded, override=override,
        scores=NOT_SCORED, model_id="", policy_id="", latency_us=3000.0,
    )  # fmt: skip


def test_a_scrape_gives_the_counts_of_the_run() -> None:
    """Read back over HTTP by the vendor's own parser."""
    metrics = Metrics()
    for _ in range(3):
        metrics.received([Message(kind=MessageKind.IMAGE)])
    metrics.released([decision(Verdict.KEEP, forwarded=True, override=Override.NONE)])
    metrics.released([decision(Verdict.VETO, forwarded=True, override=Override.SHADOW)])
    metrics.stage("prepare", 0.02)
    metrics.audit(
        AuditReport(
            audited=200, hits=3, hit_share_low=0.003, hit_share_high=0.043, skipped=4,
            unreadable=1, limit=0.005, gate_open=True,
        )
    )  # fmt: skip
    metrics.state("ready")
    free = Metrics().serve("127.0.0.1", 0)
    assert free.port == 0
    with metrics.serve("127.0.0.1", _free_port()) as server:
        url = f"http://127.0.0.1:{server.port}/metrics"
        with urllib.request.urlopen(url, timeout=20) as answer:
            text = answer.read().decode()
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples[("triage_messages_total", "image")] == 3
    assert samples[("triage_frames_total", "keep", "score")] == 1
    assert samples[("triage_frames_total", "score", "veto")] == 1
    assert samples[("triage_released_total", "forwarded")] == 2
    assert samples[("triage_overrides_total", "shadow")] == 1
    assert samples[("triage_undecided",)] == 1
    assert samples[("triage_audited", "hit")] == 3
    assert samples[("triage_audited", "blank")] == 197
    assert samples[("triage_audit_missed",)] == 5
    assert samples[("triage_audit_hit_share", "high")] == 0.043
    assert samples[("triage_gate_open",)] == 1
    assert samples[("triage_state", "ready")] == 1
    assert samples[("triage_decision_seconds_bucket", "0.005")] == 2
    assert samples[("triage_decision_seconds_bucket", "0.002")] == 0


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("state", "degraded", "status"),
    [
        ("starting", [], 503),
        ("ready", [], 200),
        ("armed", [], 200),
        ("degraded", ["late", "writer_stalled"], 200),
        ("draining", [], 503),
        ("stopped", [], 503),
    ],
)
def test_health_is_one_word_and_a_status_for_those_who_need_no_more(
    state: str, degraded: list[str], status: int
) -> None:
    """A degraded run passes frames on, so nobody should end it for that."""
    metrics = Metrics()
    metrics.state(state)
    metrics.degraded(degraded)
    with metrics.serve("127.0.0.1", _free_port()) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        connection.request("GET", "/health")
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())) == (
            status,
            {"state": state, "degraded": degraded},
        )
        connection.close()


def test_gaps_of_an_identity_that_is_used_again_count_once() -> None:
    """The account goes on: two gaps at the first end, the same two at the second, then five."""
    metrics = Metrics()
    for missing, total in ((2, 2), (2, 2), (5, 5)):
        metrics.series(
            SeriesReport(
                series_id=1, series_unique_id="", received=9, forwarded=9, dropped=0,
                undecided=0, missing=missing, duplicates=0, control=0, malformed=0, kept=9,
                vetoed=0, by_reason={}, by_override={}, ended=True,
            )
        )  # fmt: skip
        assert metrics.registry.get_sample_value("triage_missing_total") == total


def test_a_port_in_use_is_a_configuration_error() -> None:
    """The message names the key."""
    first = Metrics().serve("127.0.0.1", _free_port())
    with pytest.raises(ConfigError, match="port"):
        Metrics().serve("127.0.0.1", first.port)
    first.close()
    first.close()

"""The files in deploy/ name what exists: metrics, labels, states, commands and settings."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from triage.control import COMMANDS
from triage.health import STATES, Trouble
from triage.metrics import Metrics
from triage.operation import LIVE_KEYS
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
from triage.sinks import forwarder

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "triage.rules.yml"
DASHBOARD = DEPLOY / "grafana" / "triage.json"
UNIT = DEPLOY / "triage@.service"

_SELECTOR = re.compile(r"\b(triage_[a-z_]+)\b(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
_GROUPING = re.compile(r"\b(?:by|on|ignoring|without)\s*\(([^)]*)\)")
_LEGEND = re.compile(r"\{\{ ?\$?(?:labels\.)?(\w+) ?[|}]")
_FROM_PROMETHEUS = {"instance", "job", "le"}


def exported() -> dict[str, dict[str, set[str]]]:
    """Every sample name, and the values seen of each of its labels, after one of everything."""
    metrics = Metrics()
    metrics.received([Message(kind=kind) for kind in MessageKind])
    metrics.released(
        [
            Decision(
                series_id=1, series_unique_id="", image_id=0, file="", frame=-1, ordinal=0,
                verdict=verdict, reason=reason, forwarded=override is not Override.NONE,
                override=override, scores=NOT_SCORED, model_id="", policy_id="", latency_us=1.0,
            )
            for verdict in Verdict for reason in Reason for override in Override
        ]
    )  # fmt: skip
    metrics.stage("prepare", 0.1)
    metrics.cpu("receive", 0.1)
    metrics.model("m", "p", "shadow")
    metrics.sink_error("journal")
    metrics.writer(0, taking=True)
    metrics.writer_forgot(0, 1)
    metrics.audit(
        AuditReport(
            audited=1, hits=0, hit_share_low=0.0, hit_share_high=1.0, skipped=0, unreadable=0,
            limit=0.005, gate_open=False,
        )
    )  # fmt: skip
    for undecided in (0, 1):
        metrics.series(
            SeriesReport(
                series_id=1, series_unique_id="", received=1, forwarded=0, dropped=0,
                undecided=undecided, missing=0, duplicates=0, control=0, malformed=0, kept=0,
                vetoed=0, by_reason={}, by_override={}, ended=True,
            )
        )  # fmt: skip
    found: dict[str, dict[str, set[str]]] = {}
    for family in metrics.registry.collect():
        # A family with labels has no sample before something is counted.
        suffix = "_total" if family.type == "counter" else ""
        found.setdefault(family.name + suffix, defaultdict(set))
        for sample in family.samples:
            labels = found.setdefault(sample.name, defaultdict(set))
            for name, value in sample.labels.items():
                labels[name].add(value)
    return found


def troubles_of(expression: str) -> list[str]:
    """What an expression names that is not exported."""
    known, wrong = exported(), []
    for name, selector in _SELECTOR.findall(expression):
        if name not in known:
            wrong.append(name)
            continue
        for label, how, value in _MATCHER.findall(selector):
            if label in _FROM_PROMETHEUS:
                continue
            if label not in known[name]:
                wrong.append(f"{name} has no label {label}")
            values = value.split("|") if how in ("=~", "!~") else [value]
            if label in known[name]:
                wrong += [f"{label}={v}" for v in values if v not in known[name][label]]
    labels = {label for series in known.values() for label in series} | _FROM_PROMETHEUS
    for names in _GROUPING.findall(expression):
        wrong += [n for part in names.split(",") if (n := part.strip()) and n not in labels]
    return wrong


def rules() -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    document = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    return [rule for group in document["groups"] for rule in group["rules"]]


@pytest.mark.parametrize(
    ("expression", "wrong"),
    [
        ("rate(triage_frames_total[5m])", []),
        ("triage_frame_total > 0", ["triage_frame_total"]),
        ('triage_state{state="broken"} == 1', ["state=broken"]),
        ('triage_state{status="ready"}', ["triage_state has no label status"]),
        ('triage_degraded{reason=~"late|tired"}', ["reason=tired"]),
        ("sum by (verdicts) (triage_frames_total)", ["verdicts"]),
    ],
)
def test_the_comparison_finds_names_that_do_not_exist(expression: str, wrong: list[str]) -> None:
    """A metric, a label, a value, one among alternatives, a grouping."""
    assert troubles_of(expression) == wrong


def test_every_state_and_reason_is_exported() -> None:
    """Before any of them has come: an alert on a series that is not there never fires."""
    known = exported()
    assert known["triage_state"]["state"] == set(STATES)
    assert known["triage_degraded"]["reason"] == {trouble.value for trouble in Trouble}


def test_what_alerts_count_is_there_before_it_is_counted() -> None:
    """A counter that appears with its first step has not increased for Prometheus."""
    families = {family.name: family for family in Metrics().registry.collect()}
    for name, label, values in (
        ("triage_series", "balanced", {"yes", "no"}),
        ("triage_frames", "reason", {reason.value for reason in Reason}),
        ("triage_released", "how", {"forwarded", "dropped"}),
        ("triage_messages", "kind", {kind.value for kind in MessageKind}),
    ):
        found = {
            sample.labels[label] for sample in families[name].samples if label in sample.labels
        }
        assert found == values, name


def test_alert_rules_name_metrics_that_exist() -> None:
    """Names, labels and values; each says what happened and how bad it is."""
    found = rules()
    assert {rule["alert"]: troubles_of(rule["expr"]) for rule in found} == {
        rule["alert"]: [] for rule in found
    }
    for rule in found:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description"}


def test_what_must_wake_somebody_has_a_rule() -> None:
    """Drops without journal, gate, writer, false vetoes, missing, ledger, silence while armed."""
    text = " ".join(rule["expr"] for rule in rules())
    for name in (
        "triage_journalled_total",
        "triage_gate_open",
        "writer_stalled",
        "writer_lost",
        "triage_audit_hit_share",
        "triage_missing_total",
        'triage_series_total{balanced="no"}',
        "triage_series_running",
    ):
        assert name in text, name


@pytest.mark.interop
def test_prometheus_grammar_takes_every_expression() -> None:
    """By a parser of PromQL that others wrote."""
    parser = pytest.importorskip("promql_parser", reason="promql-parser is not installed")
    for expression in [rule["expr"] for rule in rules()] + [e for _, e in panels()]:
        plain = expression.replace("$__rate_interval", "1m").replace("$instance", ".*")
        parser.parse(plain)


def panels() -> list[tuple[str, str]]:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return [
        (panel["title"], target["expr"]) for panel in board["panels"] for target in panel["targets"]
    ]


def test_the_dashboard_names_metrics_that_exist() -> None:
    """Expressions and the labels in legends; no panel lies upon another."""
    assert {title: troubles_of(expression) for title, expression in panels()} == {
        title: [] for title, _ in panels()
    }
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    labels = {label for series in exported().values() for label in series} | {"quantity"}
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        for target in panel["targets"]:
            assert set(_LEGEND.findall(target["legendFormat"])) <= labels, panel["title"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(UNIT, encoding="utf-8")
    return parser


def test_the_unit_waits_for_ready_watches_and_reloads() -> None:
    """The watchdog is longer than the writer is waited for at the end of a run, the time to stop
    longer still; what a restart does not mend is not restarted."""
    service = unit()["Service"]
    assert service["Type"] == "notify"
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert service["KillSignal"] == "SIGTERM"
    watchdog_s, stop_s = int(service["WatchdogSec"]), int(service["TimeoutStopSec"])
    assert forwarder._LINGER_MS / 1000 < watchdog_s < stop_s
    assert set(service["RestartPreventExitStatus"].split()) == {"2", "4"}
    assert service["Restart"] == "on-failure"
    assert service["SuccessExitStatus"] == "3"
    assert service["ExecStart"].split()[1] == "run"


@pytest.mark.interop
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """`systemd-analyze verify`, with a program and a user that are here."""
    text = UNIT.read_text().replace("/opt/triage/bin/triage", "/bin/true")
    file = tmp_path / "triage@i04.service"
    file.write_text(re.sub(r"^User=.*$", "User=root", text, flags=re.MULTILINE))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(file)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_page_on_operation_names_every_state_reason_and_key() -> None:
    """And no other reason in its table."""
    page = (DEPLOY.parent / "docs" / "operation.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_.]+)`", page))
    assert set(STATES) <= named
    assert named >= LIVE_KEYS
    assert set(COMMANDS) <= named
    table = re.search(r"\| reason \|.*?\n\n", page, re.DOTALL)
    assert table is not None
    assert set(re.findall(r"^\| `([a-z_]+)`", table[0], re.MULTILINE)) == {
        trouble.value for trouble in Trouble
    }

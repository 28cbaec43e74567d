"""What systemd, Prometheus and an operator are told of a run, and what they may ask of it."""

from __future__ import annotations

import io
import json
import os
import queue
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from rich.console import Console

from triage.audit import Audit
from triage.cli.assembly import Signals, run_to_end
from triage.config import Settings, load_settings
from triage.control import Answer, Control, Request, State, ask, schema
from triage.errors import ConfigError, TriageError
from triage.health import STATES, Health, Trouble
from triage.metrics import Metrics
from triage.operation import LIVE_KEYS, Operation, Run
from triage.pipeline import Decider, Outputs, Pipeline, PipelineOptions
from triage.policy import Policy
from triage.records import (
    Decision,
    Frame,
    Message,
    MessageKind,
    Reason,
    Recipe,
    Scores,
    Series,
    SeriesReport,
    Views,
)
from triage.sinks.orders import StandingOrders, orders_in
from triage.systemd import Notifier

SCHEMA_FILE = Path(__file__).resolve().parents[2] / "docs" / "schema" / "control-v1.json"
SERIES = Series(series_id=1, series_unique_id="U")
SECOND_NS = 1_000_000_000


class Clock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.now_ns = 1000 * SECOND_NS

    def __call__(self) -> int:
        return self.now_ns

    def pass_s(self, seconds: float) -> None:
        self.now_ns += round(seconds * SECOND_NS)


class FakeManager:
    """The socket that systemd would listen on."""

    def __init__(self, address: str | bytes) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.setblocking(False)

    def heard(self) -> list[str]:
        """Every datagram that is there."""
        found = []
        while True:
            try:
                found.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return found


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[FakeManager]:
    fake = FakeManager(str(tmp_path / "notify"))
    yield fake
    fake.socket.close()


@pytest.fixture
def notifier(tmp_path: Path) -> Iterator[Notifier]:
    """Watched, every 20 seconds."""
    made = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "20000000"})
    yield made
    made.close()


# -- sd_notify -----------------------------------------------------------------------------------


def test_each_word_of_the_protocol_is_said_as_systemd_reads_it(
    notifier: Notifier, manager: FakeManager
) -> None:
    """One datagram each; a status only when it changes, on one line."""
    assert notifier.watchdog_s == 20.0
    notifier.ready()
    notifier.status("all\nis well")
    notifier.status("all\nis well")
    notifier.watchdog()
    notifier.stopping()
    assert manager.heard() == ["READY=1", "STATUS=all is well", "WATCHDOG=1", "STOPPING=1"]
    before_us = _monotonic_us()
    notifier.reloading()
    first, second = manager.heard()[0].split("\n")
    assert first == "RELOADING=1"
    key, _, value = second.partition("=")
    assert key == "MONOTONIC_USEC"
    assert before_us <= int(value) <= _monotonic_us()
    notifier.close()
    notifier.close()


def _monotonic_us() -> int:
    import time

    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_an_address_that_begins_with_an_at_is_abstract() -> None:
    """As systemd gives it to services in a container."""
    name = f"braggtriage-test-{threading.get_native_id()}"
    fake = FakeManager(f"\0{name}".encode())
    notifier = Notifier({"NOTIFY_SOCKET": f"@{name}"})
    notifier.ready()
    assert fake.heard() == ["READY=1"]
    notifier.close()
    fake.socket.close()


@pytest.mark.parametrize(
    "environ",
    [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "relative"}, {"NOTIFY_SOCKET": "/nowhere/s"}],
)
def test_nobody_who_listens_is_no_trouble(environ: dict[str, str]) -> None:
    """No socket, no right address, nobody there: nothing is sent and nothing raised."""
    notifier = Notifier(environ)
    notifier.ready()
    notifier.status("here")
    notifier.close()


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({"WATCHDOG_USEC": "5000000", "WATCHDOG_PID": "1"}, 0.0),
        ({"WATCHDOG_USEC": "soon"}, 0.0),
        ({}, 0.0),
        ({"WATCHDOG_USEC": "500000"}, 0.5),
    ],
)
def test_a_watchdog_for_another_process_is_not_ours(
    environ: dict[str, str], seconds: float
) -> None:
    """WATCHDOG_PID names whom it is for."""
    assert Notifier(environ).watchdog_s == seconds


# -- states --------------------------------------------------------------------------------------


def test_the_states_of_a_run_from_start_to_end() -> None:
    """armed while a series runs, degraded while anything is wrong, and never back from stopped."""
    health = Health()
    seen = [health.state]
    health.enter("ready")
    seen.append(health.state)
    health.started(0, (1, "a"))
    seen.append(health.state)
    health.add(Trouble.WRITER_STALLED, "no room")
    seen.append(health.state)
    health.clear(Trouble.WRITER_STALLED)
    seen.append(health.state)
    health.ended((1, "a"))
    seen.append(health.state)
    health.enter("draining")
    health.enter("stopped")
    health.enter("draining")
    seen.append(health.state)
    assert seen == ["starting", "ready", "armed", "degraded", "armed", "ready", "stopped"]
    assert set(seen) <= set(STATES)


def test_a_run_that_is_to_drain_before_it_has_begun_is_never_ready() -> None:
    """The control socket answers before the threads of the run have started."""
    health = Health()
    health.enter("draining")
    health.enter("ready")
    assert health.state == "draining"


def test_a_start_takes_the_place_of_the_series_before_it_on_its_lane() -> None:
    """A detector that died never sends the end; other lanes run on; a series joined in its middle
    is over with the next start."""
    health = Health()
    health.joined((9, "late"))
    assert health.series == [(9, "late")]
    health.started(0, (1, "a"))
    health.started(1, (1, "a"))
    assert health.series == [(1, "a")]
    health.started(0, (2, "b"))
    assert health.series == [(2, "b"), (1, "a")]
    health.ended((1, "a"))
    assert health.series == [(2, "b")]


@pytest.mark.parametrize(
    ("reason", "trouble", "needs_score"),
    [
        (Reason.OVERLOAD, "overload", False),
        (Reason.LATE, "late", True),
        (Reason.SCORER_ERROR, "scorer_failing", True),
        (Reason.DEVICE_LOST, "device_lost", True),
    ],
)
def test_troubles_that_show_in_counts_come_and_go(
    reason: Reason, trouble: str, needs_score: bool
) -> None:
    """Found at the first such frame; over after five quiet seconds, and once a frame was scored
    where the trouble is that frames are not."""
    clock = Clock()
    health = Health(clock=clock)
    health.watch({Reason.SCORE: 5})
    assert health.troubles == {}
    health.watch({Reason.SCORE: 5, reason: 2})
    assert list(health.troubles) == [trouble]
    clock.pass_s(4.9)
    health.watch({Reason.SCORE: 6, reason: 2})
    assert list(health.troubles) == [trouble]
    health.watch({Reason.SCORE: 6, reason: 3})
    clock.pass_s(5.1)
    health.watch({Reason.SCORE: 6, reason: 3})
    assert list(health.troubles) == ([trouble] if needs_score else [])
    health.watch({Reason.SCORE: 7, reason: 3})
    assert health.troubles == {}


def test_the_gauges_show_one_state_and_every_reason() -> None:
    """On the metrics registry: exactly one state is 1, and each reason has its own series."""
    metrics = Metrics()
    health = Health(metrics)
    health.enter("ready")
    health.started(0, (1, ""))
    health.add(Trouble.GATE_OPEN, "")

    def sample(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, labels)

    assert {state: sample("triage_state", state=state) for state in STATES} == {
        **dict.fromkeys(STATES, 0.0),
        "degraded": 1.0,
    }
    found = {trouble.value: sample("triage_degraded", reason=trouble.value) for trouble in Trouble}
    assert found == {**{trouble.value: 0.0 for trouble in Trouble}, "gate_open": 1.0}
    assert sample("triage_series_running") == 1.0


# -- a pipeline to operate on --------------------------------------------------------------------


class Feed:
    """Hands out messages as they are put in."""

    def __init__(self) -> None:
        self.messages: queue.SimpleQueue[list[Message]] = queue.SimpleQueue()

    def receive(self, timeout_ms: int) -> list[Message]:
        try:
            return self.messages.get(timeout=timeout_ms * 1e-3)
        except queue.Empty:
            return []

    @property
    def exhausted(self) -> bool:
        return False

    def close(self) -> None:
        pass


class Backend:
    """Views that hold nothing but the image_id."""

    name = "stub"
    recipe = Recipe()

    def prepare(self, frames: Sequence[Frame]) -> Views:
        n = len(frames)
        empty = np.zeros((n, 1, 1))
        return Views(
            maximum=empty.astype(np.uint32),
            total=empty.astype(np.uint64),
            count=empty.astype(np.uint16),
            bin_factor=np.array([frame.image_id for frame in frames], np.int32),
            overview=empty.astype(np.float32),
            radial=empty.astype(np.float32),
            has_geometry=np.zeros(n, np.bool_),
            errors=(None,) * n,
            valid_px=np.full(n, 16, np.int64),
        )

    def close_ups(self, frames: Sequence[Frame], views: Views, rows: Sequence[int]) -> Any:
        return np.zeros((len(rows), 1))

    def decode(self, frame: Frame) -> Any:
        raise NotImplementedError


class Scorer:
    """p_blank 0.6 for every frame; what is set here runs while a batch is with the network."""

    def __init__(self) -> None:
        self.before: Callable[[], None] = lambda: None
        self.in_full: Callable[[], None] = lambda: None

    def fast(self, views: Views) -> list[Scores]:
        self.before()
        return [Scores(p_blank=0.6) for _ in views.bin_factor]

    def full(self, views: Views, close_ups: Any, rows: Any, scores: list[Scores]) -> list[Scores]:
        self.in_full()
        return scores


class Journal:
    """Writes nothing down, and says so or not."""

    def __init__(self) -> None:
        self.works = True

    def dropped(self, decisions: Sequence[Decision]) -> int:
        return len(decisions) if self.works else 0


class Publisher:
    """Notes what is told, in order."""

    def __init__(self) -> None:
        self.said: list[str] = []

    gate_open = False

    def greet_newcomers(self) -> None:
        pass

    def hello(self) -> None:
        self.said.append("hello")

    def tell(self, decisions: Sequence[Decision]) -> None:
        self.said += [decision.policy_id for decision in decisions]

    def series_report(self, report: SeriesReport) -> None:
        self.said.append("report")


class FoundHarm:
    """An audit whose gate is open."""

    gate_open = True

    def set_limit(self, share: float) -> None:
        pass

    def offer(self, frame: Frame) -> None:
        pass


class Bench:
    """A pipeline run by ``step``, and an operation on it that reads settings from a dict."""

    def __init__(
        self,
        *,
        settings: dict[str, Any] | None = None,
        notifier: Notifier | None = None,
        connected: Callable[[], tuple[int, int]] | None = None,
        writers: Callable[[], tuple[int, int]] | None = None,
        workers: int = 1,
        audit: Audit | None = None,
        folder: Path | None = None,
        ports: Callable[[], str] | None = None,
    ) -> None:
        self.clock, self.feed, self.scorer = Clock(), Feed(), Scorer()
        self.journal, self.publisher, self.metrics = Journal(), Publisher(), Metrics()
        self.values: dict[str, Any] = {
            "policy.mode": "enforce",
            "policy.p_blank_veto": 0.5,
            "policy.audit_fraction": 0.0,
            **(settings or {}),
        }
        first = load_settings(None, self.values)
        threshold = first.policy.p_blank_veto
        policy = Policy(
            mode=first.policy.mode,
            p_blank_veto=0.9 if threshold is None else threshold,
            audit_fraction=0.0,
            all_heads=first.policy.all_heads,
        )
        self.levels: list[str] = []
        self.drive_is_there = threading.Event()
        self.drive_is_there.set()
        self.pipeline = Pipeline(
            self.feed,
            [
                Decider(Backend(), self.scorer, policy, self.metrics, self.clock)
                for _ in range(workers)
            ],
            Outputs(journal=self.journal, publisher=self.publisher, audit=audit),
            PipelineOptions(deadline_ns=SECOND_NS),
            self.metrics,
            model_id="m",
            clock=self.clock,
        )
        self.operation = Operation(
            self.pipeline,
            Run(
                settings=first,
                read=self._read,
                p_blank_veto=0.9,
                model_id="m",
                audit=audit,
                detectors=connected,
                writers=writers,
                ports=ports,
                level=self.levels.append,
                orders=StandingOrders(folder) if folder is not None else None,
            ),
            notifier or Notifier({}),
            self.clock,
        )

    def _read(self) -> Settings:
        assert self.drive_is_there.wait(60)
        return load_settings(None, self.values)

    def frames(self, *ids: int) -> list[Decision]:
        """Put images in and do one turn."""
        self.put(*ids)
        return self.pipeline.step()

    def put(self, *ids: int) -> None:
        self.feed.messages.put(
            [
                Message(
                    kind=MessageKind.IMAGE,
                    parts=(b"x",),
                    received_ns=self.clock(),
                    frame=Frame(
                        series=SERIES,
                        image_id=i,
                        shape=(4, 4),
                        received_ns=self.clock(),
                        size_bytes=1,
                    ),
                    size_bytes=1,
                )
                for i in ids
            ]
        )


# -- reload --------------------------------------------------------------------------------------


def test_a_new_threshold_holds_from_the_next_batch_on() -> None:
    """Each decision names the policy that judged it; the greeting comes before the first that
    the new one judged."""
    bench = Bench()
    old_id = bench.pipeline.policy.policy_id
    (before,) = bench.frames(0)
    bench.values["policy.p_blank_veto"] = 0.7
    assert bench.operation.reload() == ["policy.p_blank_veto"]
    (after,) = bench.frames(1)
    new_id = bench.pipeline.policy.policy_id
    assert new_id != old_id
    assert [(d.verdict.value, d.policy_id) for d in (before, after)] == [
        ("veto", old_id),
        ("keep", new_id),
    ]
    assert bench.publisher.said == [old_id, "hello", new_id]


@pytest.mark.parametrize("moment", ["before", "in_full"])
def test_a_batch_is_judged_by_one_policy_whenever_the_reload_comes(moment: str) -> None:
    """Verdict and policy_id are of the new one when it comes before the verdict, else of the old;
    never one of each."""
    bench = Bench(settings={"policy.all_heads": True})
    old_id = bench.pipeline.policy.policy_id
    new = Policy(mode="enforce", p_blank_veto=0.7, audit_fraction=0.0)
    setattr(bench.scorer, moment, lambda: bench.pipeline.apply(new))
    decisions = bench.frames(0, 1, 2)
    expected = ("keep", new.policy_id) if moment == "before" else ("veto", old_id)
    assert {(d.verdict.value, d.policy_id) for d in decisions} == {expected}
    (later,) = bench.frames(3)
    assert (later.verdict.value, later.policy_id) == ("keep", new.policy_id)
    assert bench.pipeline.ledger.totals().balanced


def test_reloads_under_way_lose_and_mix_nothing() -> None:
    """Two workers judge a stream while the threshold goes up and down: every frame is released
    once and in order, with the verdict that belongs to the policy it names."""
    bench = Bench(workers=2)
    low, high = (Policy(mode="enforce", p_blank_veto=t, audit_fraction=0.0) for t in (0.5, 0.7))
    released: list[Decision] = []

    class Table:
        def add(self, decisions: Sequence[Decision]) -> None:
            released.extend(decisions)

        def close(self) -> None:
            pass

    bench.pipeline._outputs = Outputs(journal=bench.journal, table=Table())
    runner = threading.Thread(target=bench.pipeline.run)
    runner.start()
    try:
        for turn in range(100):
            bench.put(*range(turn * 20, turn * 20 + 20))
            bench.values["policy.p_blank_veto"] = (0.5, 0.7)[turn % 2]
            bench.operation.reload()
            _until(bench.feed.messages.empty)
    finally:
        bench.pipeline.drain()
        runner.join(60)
    assert not runner.is_alive()
    assert [decision.image_id for decision in released] == list(range(2000))
    judged = {(d.policy_id, d.verdict.value, d.forwarded) for d in released}
    assert judged == {(low.policy_id, "veto", False), (high.policy_id, "keep", True)}
    totals = bench.pipeline.ledger.totals()
    assert (totals.received, totals.undecided, totals.missing) == (2000, 0, 0)


def test_shadow_stops_drops_of_frames_that_are_judged_already() -> None:
    """What is done with a veto follows the mode at release."""
    bench = Bench(settings={"policy.all_heads": True})
    bench.scorer.in_full = bench.operation.shadow
    (decision,) = bench.frames(0)
    assert (decision.verdict.value, decision.forwarded, decision.override.value) == (
        "veto",
        True,
        "shadow",
    )


def test_shadow_can_be_loaded_and_enforce_cannot() -> None:
    """Dropping needs a run that was started to drop: journal, validation, an operator's word."""
    bench = Bench()
    bench.values["policy.mode"] = "shadow"
    assert bench.operation.reload() == ["policy.mode"]
    assert bench.frames(0)[0].forwarded
    bench.values["policy.mode"] = "enforce"
    with pytest.raises(ConfigError, match="shadow to enforce"):
        bench.operation.reload()
    assert bench.pipeline.policy.mode == "shadow"


def test_an_operators_shadow_outlives_a_reload_of_other_keys() -> None:
    """The file still says enforce; only an operator lets it drop again."""
    bench = Bench()
    bench.operation.shadow()
    bench.values["policy.p_blank_veto"] = 0.4
    bench.operation.reload()
    assert bench.pipeline.policy == Policy(mode="shadow", p_blank_veto=0.4, audit_fraction=0.0)


def test_drops_stop_while_a_reload_waits_for_a_drive_that_is_lost(
    control: tuple[Control, Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reload is refused after a while and changes nothing, however often it is asked for by
    one thread that waits; every other command is answered; later a reload works again."""
    monkeypatch.setattr("triage.operation._READ_S", 0.01)
    served, bench = control
    bench.drive_is_there.clear()
    bench.values["policy.p_blank_veto"] = 0.4
    threads = threading.active_count()
    for _ in range(3):
        with pytest.raises(TriageError, match="could not be read"):
            bench.operation.reload()
    assert threading.active_count() == threads + 1
    for _ in range(3):
        answer = msgspec.json.decode(ask(served.endpoint, "shadow", timeout_s=60), type=Answer)
        assert answer.ok
    assert [policy.mode for policy in bench.pipeline.policies] == ["enforce", "shadow"]
    assert bench.pipeline.policy.p_blank_veto == 0.5
    monkeypatch.undo()
    bench.drive_is_there.set()
    for thread in threading.enumerate():
        if thread.name == "settings":
            thread.join(60)
    assert bench.operation.reload() == ["policy.p_blank_veto"]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("publish.endpoint", "tcp://127.0.0.1:9", "publish.endpoint"),
        ("pipeline.deadline_ms", 7, "pipeline.deadline_ms"),
        ("policy.audit_fraction", 0.5, "started without an audit"),
        ("policy.p_blank_veto", 1.5, "p_blank_veto"),
        ("policy.p_blank", 0.5, "is no key"),
        ("policy.mode", "drop", "mode"),
    ],
)
def test_a_reload_that_cannot_be_changes_nothing_and_names_the_key(
    key: str, value: object, said: str
) -> None:
    """Checked whole: the threshold beside it does not change either."""
    bench = Bench()
    before = bench.pipeline.policy
    bench.values |= {"policy.p_blank_veto": 0.7, key: value}
    with pytest.raises(ConfigError, match=said):
        bench.operation.reload()
    assert bench.pipeline.policy is before
    assert bench.levels == []


def test_what_else_may_change_does() -> None:
    """All heads, the level of the log, and back to the model's own threshold."""
    bench = Bench()
    del bench.values["policy.p_blank_veto"]
    bench.values |= {"policy.all_heads": True, "log.level": "debug"}
    changed = bench.operation.reload()
    assert set(changed) == {"policy.p_blank_veto", "policy.all_heads", "log.level"}
    assert set(changed) < LIVE_KEYS
    assert bench.pipeline.policy.all_heads
    assert bench.pipeline.policy.p_blank_veto == 0.9
    assert bench.levels == ["debug"]
    bench.values["policy.p_blank_veto"] = 0.8
    bench.operation.reload()
    values = {
        labels["policy_id"]: value
        for metric in bench.metrics.registry.collect()
        for _, labels, value, *_ in metric.samples
        if metric.name == "triage_model_info"
    }
    assert values == {bench.pipeline.policy.policy_id: 1.0}, "the old policy is still shown"


def test_the_audit_goes_on_with_another_fraction_and_limit() -> None:
    """Of a run that was started with an audit; the sample that is there stays."""
    audit = Audit(lambda frame: (np.zeros((1, 1)), np.zeros((1, 1), np.bool_)), limit=0.005)
    try:
        bench = Bench(audit=audit)
        bench.values |= {"policy.audit_fraction": 1.0, "policy.audit_limit": 0.25}
        assert bench.operation.reload() == ["policy.audit_fraction", "policy.audit_limit"]
        assert audit.report().limit == 0.25
        assert bench.frames(0)[0].override.value == "audit"
    finally:
        audit.close()


def test_an_open_gate_forwards_every_veto_from_then_on() -> None:
    """Override gate_open, shown as a trouble and on the gauge."""
    bench = Bench()
    assert not bench.frames(0)[0].forwarded
    bench.operation.open_gate()
    assert bench.frames(1)[0].override.value == "gate_open"
    assert list(bench.pipeline.health.troubles) == ["gate_open"]
    assert bench.metrics.registry.get_sample_value("triage_gate_open") == 1.0


def test_orders_stand_until_they_are_taken_back(tmp_path: Path) -> None:
    """Each is in the folder once it is answered, with who gave it; a run that begins there shows
    it as a trouble; what is set holds again once they are taken back, here and for the next."""
    bench = Bench(folder=tmp_path)
    bench.operation.shadow()
    assert list(orders_in(tmp_path)) == ["shadow"]
    bench.operation.open_gate()
    assert set(orders_in(tmp_path)) == {"shadow", "gate_open"}
    told = Bench(folder=tmp_path).pipeline
    assert set(told.health.troubles) == {"shadow_held", "gate_open"}
    assert all("an operator asked" in why for why in told.health.troubles.values())
    assert told.gate_open
    bench.operation.resume()
    assert orders_in(tmp_path) == {}
    assert bench.pipeline.health.troubles == {}
    assert bench.metrics.registry.get_sample_value("triage_gate_open") == 0.0
    assert not bench.frames(0)[0].forwarded
    assert not Bench(folder=tmp_path).frames(0)[0].forwarded


def test_what_is_set_meanwhile_holds_once_orders_are_taken_back(tmp_path: Path) -> None:
    """Shadow by the settings is shadow without the order."""
    bench = Bench(folder=tmp_path)
    bench.operation.shadow()
    bench.values |= {"policy.mode": "shadow", "policy.p_blank_veto": 0.4}
    bench.operation.reload()
    bench.operation.resume()
    assert bench.pipeline.policy == Policy(mode="shadow", p_blank_veto=0.4, audit_fraction=0.0)


def test_an_order_that_cannot_be_kept_is_in_force_and_said(tmp_path: Path) -> None:
    """The answer says that the next run would drop; one that cannot be taken back stands."""
    folder = tmp_path / "out"
    folder.mkdir()
    bench = Bench(folder=folder)
    shutil.rmtree(folder)
    with pytest.raises(TriageError, match=r"override\.json: No such file.*mode = 'shadow'"):
        bench.operation.shadow()
    assert bench.frames(0)[0].override.value == "shadow"
    (folder / "override.json").mkdir(parents=True)
    with pytest.raises(TriageError, match="drops stay stopped"):
        bench.operation.resume()
    assert bench.frames(1)[0].override.value == "shadow"


def test_an_order_is_in_force_while_its_disk_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is answered after a while, and kept once the disk works again; taking it back on such a
    disk changes nothing."""
    monkeypatch.setattr("triage.operation._READ_S", 0.01)
    bench = Bench(folder=tmp_path)
    works, write = threading.Event(), StandingOrders.write

    def slow(self: StandingOrders, orders: Any) -> None:
        assert works.wait(60)
        write(self, orders)

    monkeypatch.setattr(StandingOrders, "write", slow)
    with pytest.raises(TriageError, match="its disk takes nothing"):
        bench.operation.shadow()
    assert bench.frames(0)[0].override.value == "shadow"
    with pytest.raises(TriageError, match="drops stay stopped"):
        bench.operation.resume()
    works.set()
    for thread in threading.enumerate():
        if thread.name == "orders":
            thread.join(60)
    assert list(orders_in(tmp_path)) == ["shadow"]
    assert bench.frames(1)[0].override.value == "shadow"


def test_what_the_audit_found_stands_for_the_next_run(tmp_path: Path) -> None:
    """It is written down at the next look, and cannot be taken back in the run that found it."""
    audit = FoundHarm()
    bench = Bench(folder=tmp_path, audit=audit)  # type: ignore[arg-type]
    bench.operation.tick()
    _until(lambda: "gate_open" in orders_in(tmp_path))
    assert "the audit found" in orders_in(tmp_path)["gate_open"]
    with pytest.raises(ConfigError, match="the audit of this run found"):
        bench.operation.resume()
    assert bench.frames(0)[0].override.value == "gate_open"
    after = Bench(folder=tmp_path)
    assert after.frames(0)[0].override.value == "gate_open"
    after.operation.resume()
    assert not after.frames(1)[0].forwarded


def test_listeners_are_greeted_anew_when_the_gate_opens(tmp_path: Path) -> None:
    """Before the next decision is told."""
    bench = Bench(folder=tmp_path)
    bench.frames(0)
    bench.operation.open_gate()
    bench.frames(1)
    assert bench.publisher.said[-2] == "hello"
    assert bench.publisher.gate_open


def test_a_journal_that_fails_is_a_trouble_until_it_works_again() -> None:
    """The frames go on meanwhile; what stands in the journal is counted beside what is dropped."""
    bench = Bench()
    bench.journal.works = False
    assert bench.frames(0)[0].forwarded
    assert list(bench.pipeline.health.troubles) == ["journal_failing"]
    bench.journal.works = True
    assert not bench.frames(1)[0].forwarded
    assert bench.pipeline.health.troubles == {}
    sample = bench.metrics.registry.get_sample_value
    assert sample("triage_journalled_total") == 1.0
    assert sample("triage_released_total", {"how": "dropped"}) == 1.0


# -- progress ------------------------------------------------------------------------------------


def test_an_idle_run_is_alive_and_a_hung_stage_is_not(
    notifier: Notifier, manager: FakeManager
) -> None:
    """Threads that wait for frames show life; one that hangs in a sink ends the pings."""
    bench = Bench(notifier=notifier)
    hangs, hung = threading.Event(), threading.Event()

    class HangingPublisher(Publisher):
        def tell(self, decisions: Sequence[Decision]) -> None:
            hung.set()
            hangs.wait(60)

    bench.pipeline._outputs = Outputs(journal=bench.journal, publisher=HangingPublisher())
    runner = threading.Thread(target=bench.pipeline.run)
    runner.start()
    try:
        for _ in range(3):
            bench.clock.pass_s(30.0)
            _until(lambda: not bench.pipeline.hung(20 * SECOND_NS))
            bench.operation.tick()
        assert manager.heard().count("WATCHDOG=1") == 3
        bench.put(0)
        assert hung.wait(60)
        bench.clock.pass_s(30.0)
        _until(lambda: bench.pipeline.hung(20 * SECOND_NS) == ["publish"])
        bench.operation.tick()
        assert "WATCHDOG=1" not in manager.heard()
        hangs.set()
        _until(lambda: not bench.pipeline.hung(20 * SECOND_NS))
        bench.operation.tick()
        assert "WATCHDOG=1" in manager.heard()
    finally:
        hangs.set()
        bench.pipeline.stop()
        runner.join(60)
    assert not runner.is_alive()


def test_hung_workers_end_a_supervised_run_by_a_drain(
    notifier: Notifier, manager: FakeManager
) -> None:
    """The frame goes on late, pings go on, and the run ends as failed, to be started anew."""
    bench = Bench(notifier=notifier)
    hangs, hung = threading.Event(), threading.Event()

    def hang() -> None:
        hung.set()
        hangs.wait(60)

    bench.scorer.before = hang
    runner = threading.Thread(target=bench.pipeline.run)
    runner.start()
    try:
        bench.put(0)
        assert hung.wait(60)
        bench.clock.pass_s(30.0)
        _until(lambda: bench.pipeline.hung(20 * SECOND_NS) == ["compute"])
        bench.operation.tick()
        assert "WATCHDOG=1" in manager.heard()
        assert "workers_hung" in bench.pipeline.health.troubles
        runner.join(60)
        assert not runner.is_alive()
    finally:
        hangs.set()
    assert isinstance(bench.pipeline.failure, TriageError)
    totals = bench.pipeline.ledger.totals()
    assert (totals.received, totals.forwarded, totals.by_reason) == (1, 1, {"late": 1})


def _until(condition: Callable[[], bool]) -> None:
    """Wait for another thread, for a minute at most."""
    turn = threading.Event()
    for _ in range(6000):
        if condition():
            return
        turn.wait(0.01)
    raise AssertionError("did not come about in a minute")


def test_a_detector_that_never_connects_is_said_after_some_seconds(
    notifier: Notifier, manager: FakeManager
) -> None:
    """In the state, in STATUS; taken back when it connects, and said otherwise when it goes."""
    peers, sockets = 0, 1
    bench = Bench(
        notifier=notifier,
        connected=lambda: (peers, sockets),
        settings={"source.endpoint": "tcp://127.0.0.1:7"},
    )
    bench.pipeline.health.enter("ready")
    bench.operation.tick()
    assert bench.pipeline.health.state == "ready"
    bench.clock.pass_s(5.1)
    bench.operation.tick()
    assert bench.pipeline.health.state == "degraded"
    said = manager.heard()
    assert said[0] == "READY=1"
    assert "no detector has connected at tcp://127.0.0.1:7" in said[-1]
    peers = 1
    bench.operation.tick()
    assert bench.pipeline.health.state == "ready"
    peers = 0
    bench.clock.pass_s(5.1)
    bench.operation.tick()
    assert "connection at tcp://127.0.0.1:7 is gone" in manager.heard()[-1]
    peers, sockets = 3, 4
    bench.clock.pass_s(1.1)
    bench.operation.tick()
    assert "1 of 4 sockets at tcp://127.0.0.1:7 have no detector" in manager.heard()[-1]


def test_a_writer_that_is_not_there_is_said_before_the_first_frame_waits_for_it() -> None:
    """In the state; the detector is another matter."""
    peers = 0
    bench = Bench(
        connected=lambda: (1, 1),
        writers=lambda: (peers, 1),
        settings={"forward.endpoint": "tcp://127.0.0.1:8"},
    )
    bench.clock.pass_s(5.1)
    bench.operation.tick()
    assert list(bench.pipeline.health.troubles) == ["no_writer"]
    assert (
        "no writer has connected at tcp://127.0.0.1:8"
        in bench.pipeline.health.troubles["no_writer"]
    )
    peers = 1
    bench.operation.tick()
    assert bench.pipeline.health.troubles == {}


def test_ports_that_are_silent_are_said_while_they_are() -> None:
    """A dead port of a detector that sends on all others."""
    ports = ["2 ports (row, column) are silent: (0, 1), (1, 1)"]
    bench = Bench(ports=lambda: ports[0])
    bench.operation.tick()
    assert bench.pipeline.health.troubles == {"port_silent": ports[0]}
    ports[0] = ""
    bench.operation.tick()
    assert bench.pipeline.health.troubles == {}


def test_what_went_on_without_a_writer_is_not_called_forwarded() -> None:
    """Nothing was sent on."""
    bench = Bench()
    bench.frames(0)
    status = bench.operation.status(bench.pipeline.snapshot())
    assert "1 received, 0 not dropped, 1 dropped" in status
    assert "forwarded" not in status


def test_a_writer_that_is_slow_is_stalled_until_it_keeps_up_for_five_seconds() -> None:
    """One message every 200 ms for a minute is one stall; its end is said five seconds after the
    last message that waited."""
    bench = Bench()
    waits = [1]

    class Slow:
        trouble = ""

        def send(self, message: Message, timeout_ms: int) -> bool:
            bench.clock.pass_s(timeout_ms * 1e-3)
            waits[0] -= bool(timeout_ms)
            return waits[0] < 0

        def catch_up(self) -> None:
            pass

    pipeline = bench.pipeline
    states = set()
    message = Message(kind=MessageKind.CONTROL, parts=(b"x",))
    for _ in range(300):
        waits[0] = 1
        assert pipeline._wait_for_writer(Slow(), message, "publish")
        pipeline.watch()
        states.add(tuple(pipeline.health.troubles))
    assert states == {("writer_stalled",)}
    bench.clock.pass_s(4.8)
    pipeline.watch()
    assert list(pipeline.health.troubles) == ["writer_stalled"]
    bench.clock.pass_s(0.2)
    pipeline.watch()
    assert pipeline.health.troubles == {}


def test_a_signal_that_came_before_the_run_began_drains_it() -> None:
    """Caught before there is a source, it is heeded once the run goes; handlers are put back."""
    before = signal.getsignal(signal.SIGTERM)
    signals = Signals(hangup=True)
    os.kill(os.getpid(), signal.SIGTERM)
    bench = Bench()
    console = Console(file=io.StringIO())
    run_to_end(bench.pipeline, console, quiet=True, operation=bench.operation, signals=signals)
    assert bench.pipeline.health.state == "stopped"
    assert not bench.pipeline._line.abandoned
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_thread_that_breaks_ends_the_run_as_an_error_of_ours() -> None:
    """Exit code 1 with one line, and a traceback in the log only."""
    bench = Bench()

    def broken(timeout_ms: int) -> list[Message]:
        raise RuntimeError("no such luck")

    bench.feed.receive = broken  # type: ignore[method-assign]
    with pytest.raises(TriageError, match="RuntimeError: no such luck"):
        run_to_end(bench.pipeline, Console(quiet=True), quiet=True, operation=bench.operation)
    assert bench.pipeline.health.state == "stopped"


@pytest.mark.parametrize("on_terminal", [False, True])
def test_a_hangup_reloads_a_service_and_drains_a_run_on_a_terminal(on_terminal: bool) -> None:
    """A terminal that is gone must not leave a run behind that nobody sees, nor cost a frame."""
    bench = Bench()
    bench.values["policy.p_blank_veto"] = 0.7
    asked: list[int] = []

    def ask_when_running() -> None:
        _until(lambda: bench.pipeline.health.state == "ready")
        os.kill(os.getpid(), signal.SIGHUP)
        if not on_terminal:
            _until(lambda: bench.pipeline.policy.p_blank_veto == 0.7)
            asked.append(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    helper = threading.Thread(target=ask_when_running)
    helper.start()
    console = Console(file=io.StringIO(), force_terminal=on_terminal)
    run_to_end(bench.pipeline, console, quiet=True, operation=bench.operation)
    helper.join(60)
    assert bench.pipeline.health.state == "stopped"
    assert not bench.pipeline._line.abandoned
    assert asked == ([] if on_terminal else [signal.SIGTERM])


# -- the control socket --------------------------------------------------------------------------


@pytest.fixture
def control() -> Iterator[tuple[Control, Bench]]:
    bench = Bench()
    served = Control("tcp://127.0.0.1:*", bench.operation)
    yield served, bench
    served.close()
    served.close()


def test_every_command_answers_with_the_state_after_it(control: tuple[Control, Bench]) -> None:
    """And does what it says."""
    served, bench = control
    bench.frames(0, 1)

    def asked(command: str) -> State:
        text = ask(served.endpoint, command, timeout_s=60)
        assert list(json.loads(text))[:2] == ["v", "type"]
        answer = msgspec.json.decode(text, type=Answer)
        assert answer.ok, answer.error
        assert answer.state is not None
        return answer.state

    state = asked("state")
    assert (state.mode, state.received, state.dropped, state.undecided) == ("enforce", 2, 2, 0)
    assert state.latency_p50_us == 0.0
    bench.values["policy.p_blank_veto"] = 0.7
    assert asked("reload").p_blank_veto == 0.7
    assert asked("shadow").mode == "shadow"
    assert asked("open_gate").gate_open
    resumed = asked("resume")
    assert (resumed.mode, resumed.gate_open) == ("enforce", False)
    assert asked("drain").state == "draining"
    # A drain asked for twice is still a drain: nothing is abandoned.
    assert asked("drain").state == "draining"
    assert not bench.pipeline._line.abandoned


def test_who_sends_more_than_a_request_is_disconnected(control: tuple[Control, Bench]) -> None:
    """Before it takes memory here; others are answered."""
    served, _ = control
    context: zmq.Context[Any] = zmq.Context()
    sender = context.socket(zmq.REQ)
    monitor = sender.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    sender.connect(served.endpoint)
    sender.send(bytes(1 << 20))
    assert monitor.poll(60_000)
    assert msgspec.json.decode(ask(served.endpoint, "state", timeout_s=60), type=Answer).ok
    sender.disable_monitor()
    monitor.close()
    sender.close(linger=0)
    context.term()


def test_a_refused_reload_is_answered_with_the_reason(control: tuple[Control, Bench]) -> None:
    """The state is not told with it, and nothing has changed."""
    served, bench = control
    bench.values["source.endpoint"] = "tcp://127.0.0.1:9"
    text = ask(served.endpoint, "reload", timeout_s=60)
    answer = msgspec.json.decode(text, type=Answer)
    assert (answer.ok, answer.state) == (False, None)
    assert "source.endpoint" in answer.error


@pytest.mark.parametrize(
    "request_parts",
    [
        [b""],
        [b"{"],
        [b"[]"],
        [b"null"],
        [b'{"v":1}'],
        [b'{"v":2,"type":"state"}'],
        [b'{"v":1,"type":"state","more":1}'],
        [b'{"v":1,"type":"reboot"}'],
        [b'{"v":1,"type":["state"]}'],
        [b"\xff\xfe\x00"],
        [b'{"v":1,"type":"state"}', b""],
        [b" " * 5000 + b'{"v":1,"type":"state"}'],
        [b"[" * 4000],
    ],
)
def test_a_request_that_is_not_right_gets_an_error_and_harms_nothing(
    control: tuple[Control, Bench], request_parts: list[bytes]
) -> None:
    """The answer says what was expected, in bounded words; the next request is answered."""
    served, _ = control
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.REQ)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(served.endpoint)
    socket.send_multipart(request_parts)
    assert socket.poll(60_000)
    answer = msgspec.json.decode(socket.recv(), type=Answer)
    assert (answer.ok, answer.type) == (False, "malformed")
    assert "expected one JSON object" in answer.error
    assert len(answer.error) <= 500
    socket.send(b'{"v":1,"type":"state"}')
    assert socket.poll(60_000)
    assert msgspec.json.decode(socket.recv(), type=Answer).ok
    socket.close()
    context.term()


def test_nobody_there_is_an_error_that_names_the_address() -> None:
    """After the time that was given."""
    with pytest.raises(TriageError, match=r"tcp://127.0.0.1:1: no answer in 0.05 s"):
        ask("tcp://127.0.0.1:1", "state", timeout_s=0.05)
    with pytest.raises(ConfigError, match="expected an address"):
        ask("nonsense", "state", timeout_s=0.05)


def test_the_schema_of_the_control_socket_is_the_one_in_the_documentation() -> None:
    """docs/schema/control-v1.json is what the code speaks."""
    assert json.loads(SCHEMA_FILE.read_text()) == schema()
    assert msgspec.json.decode(b'{"v":1,"type":"drain"}', type=Request).type == "drain"

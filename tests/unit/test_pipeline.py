"""The pipeline with hand-made stages: what is promised of order, deadlines and the ledger."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from triage.errors import DecodeError, DeviceError, TriageError, UnsupportedEncoding
from triage.metrics import Metrics
from triage.pipeline import Decider, Outputs, Pipeline, PipelineOptions
from triage.policy import Policy
from triage.records import (
    NOT_SCORED,
    AuditReport,
    Decision,
    Frame,
    Message,
    MessageKind,
    Override,
    Reason,
    Recipe,
    Scores,
    Series,
    Verdict,
    Views,
)

SERIES = Series(series_id=1, series_unique_id="U")


class Clock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000_000

    def __call__(self) -> int:
        return self.now_ns


class ListSource:
    """Hands out prepared messages, some per call."""

    def __init__(self, messages: Sequence[Message], per_call: int = 4) -> None:
        self._messages = list(messages)
        self._per_call = per_call

    def receive(self, timeout_ms: int) -> list[Message]:
        batch, self._messages = (
            self._messages[: self._per_call],
            self._messages[self._per_call :],
        )
        return batch

    @property
    def exhausted(self) -> bool:
        return not self._messages

    def close(self) -> None:
        pass


class StubBackend:
    """Views without pixels; ``errors`` maps an image_id to what its decoding raises."""

    name = "stub"
    recipe = Recipe()

    def __init__(self, errors: dict[int, TriageError] | None = None) -> None:
        self.errors = errors or {}
        self.seen: list[list[int]] = []

    def prepare(self, frames: Sequence[Frame]) -> Views:
        self.seen.append([f.image_id for f in frames])
        n = len(frames)
        empty = np.zeros((n, 1, 1))
        return Views(
            maximum=empty.astype(np.uint32),
            total=empty.astype(np.uint64),
            count=empty.astype(np.uint16),
            bin_factor=np.array([f.image_id for f in frames], np.int32),
            overview=empty.astype(np.float32),
            radial=empty.astype(np.float32),
            has_geometry=np.zeros(n, np.bool_),
            errors=tuple(self.errors.get(f.image_id) for f in frames),
        )

    def close_ups(self, frames: Sequence[Frame], views: Views, rows: Sequence[int]) -> Any:
        return np.zeros((len(rows), 1))

    def decode(self, frame: Frame) -> Any:
        raise NotImplementedError


class StubScorer:
    """Odd image_ids are blank."""

    def __init__(self) -> None:
        self.full_ids: list[int] = []

    def fast(self, views: Views) -> list[Scores]:
        return [
            NOT_SCORED if error is not None else Scores(p_blank=float(image_id % 2))
            for image_id, error in zip(views.bin_factor, views.errors, strict=True)
        ]

    def full(
        self, views: Views, close_ups: Any, rows: Sequence[int], scores: list[Scores]
    ) -> list[Scores]:
        self.full_ids += [int(views.bin_factor[row]) for row in rows]
        return [
            Scores(p_blank=s.p_blank, mosaicity_deg=0.5) if i in rows else s
            for i, s in enumerate(scores)
        ]


class Recorder:
    """Every sink in one, writing down what it was told."""

    def __init__(self, journal_works: bool = True) -> None:
        self.sent: list[tuple[Any, ...]] = []
        self.decisions: list[Decision] = []
        self.journal: list[int] = []
        self.reports: list[Any] = []
        self.journal_works = journal_works

    trouble = ""

    def send(self, message: Message, timeout_ms: int) -> bool:
        self.sent.append(message.parts)
        return True

    def add(self, decisions: Sequence[Decision]) -> None:
        self.decisions += decisions

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def dropped(self, decisions: Sequence[Decision]) -> int:
        self.journal += [decision.image_id for decision in decisions]
        return len(decisions) if self.journal_works else 0

    gate_open = False

    def greet_newcomers(self) -> None:
        pass

    def hello(self) -> None:
        pass

    def tell(self, decisions: Sequence[Decision]) -> None:
        pass

    def series_report(self, report: Any) -> None:
        self.reports.append(report)


def image(image_id: int, clock: Clock, series: Series = SERIES, **fields: Any) -> Message:
    frame = Frame(series=series, image_id=image_id, received_ns=clock(), **fields)
    return Message(
        kind=MessageKind.IMAGE,
        parts=(b"image %d" % image_id,),
        frame=frame,
        received_ns=clock(),
        size_bytes=100,
    )


def start(clock: Clock, series: Series = SERIES) -> Message:
    return Message(kind=MessageKind.START, parts=(b"start",), series=series, received_ns=clock())


def end(clock: Clock, series: Series = SERIES) -> Message:
    return Message(kind=MessageKind.END, parts=(b"end",), series=series, received_ns=clock())


def build(
    messages: Sequence[Message] | ListSource,
    clock: Clock,
    *,
    mode: str = "enforce",
    backend: Any = None,
    scorer: Any = None,
    recorder: Recorder | None = None,
    all_heads: bool = False,
    audit: Any = None,
    audit_fraction: float = 0.0,
    kept: Any = None,
    **options: Any,
) -> tuple[Pipeline, Recorder]:
    recorder = recorder or Recorder()
    policy = Policy(mode=mode, p_blank_veto=0.5, audit_fraction=audit_fraction, all_heads=all_heads)
    metrics = Metrics()
    decider = Decider(backend or StubBackend(), scorer or StubScorer(), policy, metrics, clock)
    pipeline = Pipeline(
        messages
        if isinstance(messages, ListSource)
        else ListSource(messages, per_call=options.pop("per_call", 100)),
        decider,
        Outputs(
            forwarder=recorder,
            publisher=recorder,
            journal=recorder,
            table=recorder,
            audit=audit,
            kept=kept,
        ),
        PipelineOptions(**options),
        metrics,
        clock=clock,
    )
    return pipeline, recorder


def test_kept_messages_go_on_in_order_and_blank_ones_are_dropped() -> None:
    """start, even images and end are forwarded in the order received; odd images are not."""
    clock = Clock()
    messages = [start(clock), *(image(i, clock) for i in range(5)), end(clock)]
    pipeline, out = build(messages, clock)
    pipeline.step()
    assert out.sent == [(b"start",), (b"image 0",), (b"image 2",), (b"image 4",), (b"end",)]
    assert out.journal == [1, 3]
    (report,) = out.reports
    assert (report.received, report.forwarded, report.dropped, report.undecided) == (5, 3, 2, 0)


def test_shadow_forwards_what_enforce_drops_and_says_the_same_verdict() -> None:
    """The verdict column does not depend on the mode; forwarded and override do."""
    rows = {}
    for mode in ("shadow", "enforce"):
        clock = Clock()
        pipeline, _ = build([image(i, clock) for i in range(4)], clock, mode=mode)
        rows[mode] = pipeline.step()
    assert [d.verdict for d in rows["shadow"]] == ["keep", "veto", "keep", "veto"]
    assert [d.verdict for d in rows["enforce"]] == ["keep", "veto", "keep", "veto"]
    assert [d.forwarded for d in rows["shadow"]] == [True] * 4
    assert [d.override for d in rows["shadow"]] == ["", "shadow", "", "shadow"]
    assert [d.forwarded for d in rows["enforce"]] == [True, False, True, False]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DecodeError("x"), Reason.MALFORMED),
        (UnsupportedEncoding("x"), Reason.UNKNOWN_ENCODING),
        (DeviceError("x"), Reason.DEVICE_LOST),
    ],
)
def test_a_frame_that_does_not_decode_is_kept_and_its_neighbours_are_scored(
    error: TriageError, reason: Reason
) -> None:
    """An error of one frame is that frame's reason alone."""
    clock = Clock()
    backend = StubBackend({1: error})
    pipeline, _ = build([image(i, clock) for i in range(3)], clock, backend=backend)
    decisions = pipeline.step()
    assert [(d.verdict, d.reason) for d in decisions] == [
        ("keep", "score"),
        ("keep", reason),
        ("keep", "score"),
    ]


@pytest.mark.parametrize(
    ("error", "reason"),
    [(DeviceError("gone"), "device_lost"), (ValueError("bug"), "scorer_error")],
)
def test_a_failing_stage_keeps_the_whole_batch(error: Exception, reason: str) -> None:
    """Whatever backend or scorer raise, no frame is lost."""

    class Broken(StubBackend):
        def prepare(self, frames: Sequence[Frame]) -> Views:
            raise error

    clock = Clock()
    pipeline, out = build([image(i, clock) for i in range(3)], clock, backend=Broken())
    assert {(d.verdict.value, d.reason.value) for d in pipeline.step()} == {("keep", reason)}
    assert len(out.sent) == 3


def test_a_frame_with_hardly_a_valid_pixel_is_not_taken_for_blank() -> None:
    """A wrong mask or saturation value makes every frame look empty: kept, and it says why."""

    class Masked(StubBackend):
        def prepare(self, frames: Sequence[Frame]) -> Views:
            views = super().prepare(frames)
            valid = np.array([[[9]], [[10]], [[0]]], np.uint16)
            return replace(views, count=valid[: len(frames)])

    clock = Clock()
    messages = [image(i, clock, shape=(10, 10)) for i in (1, 3, 5)]
    pipeline, _ = build(messages, clock, backend=Masked())
    first, second, third = pipeline.step()
    assert [d.verdict for d in (first, second, third)] == ["keep", "veto", "keep"]
    assert first.reason is Reason.SCORER_ERROR
    assert "mask" in first.detail
    assert second.detail == ""


def test_a_nan_score_keeps_the_frame() -> None:
    """A network that returns NaN vetoes nothing."""

    class Silent(StubScorer):
        def fast(self, views: Views) -> list[Scores]:
            return [NOT_SCORED for _ in views.errors]

    clock = Clock()
    pipeline, _ = build([image(1, clock)], clock, scorer=Silent())
    (decision,) = pipeline.step()
    assert (decision.verdict, decision.reason) == ("keep", "scorer_error")


def test_a_faulted_frame_is_never_scored() -> None:
    """What ingest marked as faulted reaches neither backend nor network."""
    clock = Clock()
    backend = StubBackend()
    messages = [image(1, clock, fault=Reason.MALFORMED, fault_detail="cut"), image(3, clock)]
    pipeline, _ = build(messages, clock, backend=backend)
    first, second = pipeline.step()
    assert (first.verdict, first.reason, first.detail) == ("keep", "malformed", "cut")
    assert (second.verdict, second.reason) == ("veto", "score")
    assert backend.seen == [[3]]


def test_the_full_exit_runs_only_on_frames_that_are_kept() -> None:
    """A vetoed frame has NaN in the columns of the full exit, unless all heads are asked for."""
    clock = Clock()
    scorer = StubScorer()
    pipeline, _ = build([image(i, clock) for i in range(4)], clock, scorer=scorer)
    decisions = pipeline.step()
    assert scorer.full_ids == [0, 2]
    assert [d.scores.mosaicity_deg == 0.5 for d in decisions] == [True, False, True, False]

    scorer = StubScorer()
    pipeline, _ = build([image(i, clock) for i in range(4)], clock, scorer=scorer, all_heads=True)
    pipeline.step()
    assert scorer.full_ids == [0, 1, 2, 3]


class Unsure(StubScorer):
    """The fast exit says blank of all and is sure of the last alone; the full exit of odd ones."""

    sure = 3

    def fast(self, views: Views) -> list[Scores]:
        return [Scores(p_blank=1.0, provisional=int(i) != self.sure) for i in views.bin_factor]

    def full(
        self, views: Views, close_ups: Any, rows: Sequence[int], scores: list[Scores]
    ) -> list[Scores]:
        self.full_ids += [int(views.bin_factor[row]) for row in rows]
        said = list(scores)
        for row in rows:
            p = float(views.bin_factor[row] % 2) if said[row].provisional else said[row].p_blank
            said[row] = Scores(p_blank=p, mosaicity_deg=0.5)
        return said


@pytest.mark.parametrize("all_heads", [False, True])
def test_where_the_fast_exit_is_not_sure_the_full_one_decides(all_heads: bool) -> None:
    """Verdicts by its word, the same whether all heads are asked for or not; a frame that the fast
    exit is sure of pays for no spots."""
    clock = Clock()
    scorer = Unsure()
    messages = [image(i, clock) for i in range(4)]
    pipeline, out = build(messages, clock, scorer=scorer, all_heads=all_heads)
    decisions = pipeline.step()
    assert [d.verdict for d in decisions] == ["keep", "veto", "keep", "veto"]
    assert [d.scores.p_blank for d in decisions] == [0.0, 1.0, 0.0, 1.0]
    assert scorer.full_ids == [0, 1, 2, 3][: 4 if all_heads else 3]
    assert out.journal == [1, 3]


def test_a_failing_full_exit_vetoes_nothing() -> None:
    """What the fast exit alone says of an unsure frame is no ground to drop it."""

    class Failing(Unsure):
        def full(self, *given: Any) -> list[Scores]:
            raise ValueError("no spots")

    class Silent(Unsure):
        def full(self, *given: Any) -> list[Scores]:
            return [NOT_SCORED for _ in given[3]]

    for scorer in (Failing(), Silent()):
        clock = Clock()
        pipeline, out = build([image(i, clock) for i in range(3)], clock, scorer=scorer)
        assert {(d.verdict, d.reason) for d in pipeline.step()} == {("keep", "scorer_error")}
        assert out.journal == []


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_a_frame_vetoed_by_its_spots_may_be_audited(fraction: float) -> None:
    """The sample is drawn of all vetoed frames, whichever exit vetoed them."""
    clock = Clock()
    messages = [image(i, clock) for i in range(4)]
    pipeline, _ = build(messages, clock, scorer=Unsure(), audit_fraction=fraction)
    audited = [d.override == "audit" for d in pipeline.step()]
    assert audited == [False, bool(fraction), False, bool(fraction)]


def test_a_drop_that_cannot_be_written_down_does_not_happen() -> None:
    """Without its line in the journal a vetoed frame goes on."""
    clock = Clock()
    pipeline, out = build([image(1, clock)], clock, recorder=Recorder(journal_works=False))
    (decision,) = pipeline.step()
    assert (decision.verdict, decision.forwarded) == ("veto", True)
    assert decision.override is Override.GATE_OPEN
    assert out.sent == [(b"image 1",)]


class StubAudit:
    """Takes what it is offered; its gate opens at the third frame."""

    def __init__(self) -> None:
        self.offered: list[int] = []
        self.waits = 0

    @property
    def gate_open(self) -> bool:
        return len(self.offered) >= 3

    def offer(self, frame: Frame) -> None:
        self.offered.append(frame.image_id)

    def wait(self, timeout_s: float) -> bool:
        self.waits += 1
        return self.waits == 3

    def finish(self) -> AuditReport:
        return AuditReport(
            audited=len(self.offered), hits=0, hit_share_low=0.0, hit_share_high=1.0, skipped=0,
            unreadable=0, limit=0.005, gate_open=self.gate_open,
        )  # fmt: skip


@pytest.mark.parametrize("mode", ["shadow", "enforce"])
def test_the_audit_is_offered_vetoed_frames_only(mode: str) -> None:
    """Odd images are vetoed; with a fraction of one all of them are offered, none with zero."""
    for fraction, offered in ((1.0, [1, 3, 5]), (0.0, [])):
        clock, audit = Clock(), StubAudit()
        messages = [image(i, clock) for i in range(6)]
        pipeline, _ = build(messages, clock, mode=mode, audit=audit, audit_fraction=fraction)
        decisions = pipeline.step()
        assert audit.offered == offered
        expected = {"shadow": "shadow", "enforce": "audit" if offered else ""}[mode]
        assert [d.override for d in decisions if d.verdict is Verdict.VETO] == [expected] * 3


def test_an_open_gate_drops_nothing() -> None:
    """Frames after the evidence go on, verdict and reason as before; the sample goes on too."""
    clock, audit = Clock(), StubAudit()
    messages = [image(2 * i + 1, clock) for i in range(200)]
    pipeline, out = build(messages, clock, audit=audit, audit_fraction=0.1)
    decisions = pipeline.step()
    assert {d.verdict for d in decisions} == {Verdict.VETO}
    third = [d.image_id for d in decisions].index(audit.offered[2])
    before, after = decisions[:third], decisions[third:]
    assert {d.override for d in before} == {Override.NONE, Override.AUDIT}
    assert {d.override for d in after} == {Override.GATE_OPEN, Override.AUDIT}
    assert all(d.forwarded for d in after)
    assert len(out.sent) == 2 + len(after)
    assert len(audit.offered) > 5
    assert pipeline.snapshot().troubles == ("gate_open",)
    report = pipeline.ledger.totals()
    assert report.balanced
    assert report.by_override["gate_open"] + report.by_override["audit"] == report.forwarded


def test_the_end_of_a_run_waits_for_the_audit() -> None:
    """So that the report holds the whole sample; a second stop gives up on it."""
    for stops, waits in ((0, 3), (2, 1)):
        clock, audit = Clock(), StubAudit()
        messages = [image(1, clock)]
        pipeline, _ = build(messages, clock, audit=audit, audit_fraction=1.0, live=False)
        pipeline.step()
        for _ in range(stops):
            pipeline.stop()
        pipeline._finish()
        assert audit.waits == waits
        assert pipeline.audit_report is not None
        assert pipeline.audit_report.audited == 1


def test_rotation_frames_are_scored_and_kept() -> None:
    """A sweep is never thinned, its scores are still in the table."""
    clock = Clock()
    sweep = Series(series_id=3, increments_deg={"omega": 0.1})
    pipeline, _ = build([image(1, clock, sweep)], clock)
    (decision,) = pipeline.step()
    assert (decision.verdict, decision.reason) == ("keep", "rotation")
    assert decision.scores.p_blank == 1.0


def test_a_full_queue_lets_the_oldest_frame_go_unscored() -> None:
    """A budget of 500 bytes holds 250 bytes of unscored frames: of five, three are shed."""
    clock = Clock()
    pipeline, _ = build([image(i, clock) for i in range(5)], clock, queue_bytes=500)
    decisions = pipeline.step()
    assert [d.reason.value for d in decisions] == ["overload"] * 3 + ["score"] * 2
    assert [d.image_id for d in decisions] == [0, 1, 2, 3, 4]


class HangingScorer(StubScorer):
    """Never answers until released."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.release = threading.Event()

    def fast(self, views: Views) -> list[Scores]:
        self.entered.set()
        self.release.wait(30)
        return super().fast(views)


def test_a_hung_network_delays_frames_to_the_deadline_and_loses_none() -> None:
    """With a scorer that never answers every frame goes on as late, and the run ends."""

    class Ticking(Clock):
        """Real time is not waited for: each look at the clock is 1 ms later."""

        def __call__(self) -> int:
            self.now_ns += 1_000_000
            return self.now_ns

    clock = Ticking()
    scorer = HangingScorer()
    messages = [start(clock), *(image(i, clock) for i in range(4)), end(clock)]
    pipeline, out = build(messages, clock, scorer=scorer, deadline_ns=200_000_000)
    pipeline.run()
    scorer.release.set()
    assert scorer.entered.is_set()
    assert [d.reason.value for d in out.decisions] == ["late"] * 4
    assert len(out.sent) == 6
    assert pipeline.ledger.totals().balanced


def test_frames_that_went_on_late_are_not_scored_any_more() -> None:
    """A thousand frames that went on while the network hung cost it nothing afterwards."""

    scorer = HangingScorer()

    class Ticking(Clock):
        """Stands until the network hangs; then each look at it is a tenth of the deadline later."""

        def __call__(self) -> int:
            self.now_ns += 100_000 * scorer.entered.is_set()
            return self.now_ns

    clock = Ticking()
    backend = StubBackend()
    messages = [image(i, clock) for i in range(2000)]
    pipeline, out = build(
        messages, clock, scorer=scorer, backend=backend, per_call=50, deadline_ns=1_000_000
    )
    runner = threading.Thread(target=pipeline.run)
    runner.start()
    assert scorer.entered.wait(20)
    runner.join(30)
    scorer.release.set()
    assert not runner.is_alive()
    assert pipeline.failure is None
    assert [d.image_id for d in out.decisions] == list(range(2000))
    assert pipeline.ledger.totals().balanced
    assert sum(len(batch) for batch in backend.seen) < 2000


@pytest.mark.parametrize(("took_ms", "scored"), [(1, 4), (40, 2), (400, 2)])
def test_a_worker_leaves_out_what_it_would_score_too_late(took_ms: int, scored: int) -> None:
    """What has less time left than batches took goes on at once, and the next ones are in time.

    Frames 10 ms apart with 100 ms each: those of 95, 85, 35 and 25 ms ago have 5, 15, 65 and 75 ms
    left. After batches of 40 ms two are worth trying; after batches of four times the deadline
    those with half of it left still are, so that one slow batch does not end all scoring.
    """

    class Slow(StubScorer):
        def fast(self, views: Views) -> list[Scores]:
            clock.now_ns += took_ms * 1_000_000
            return super().fast(views)

    clock = Clock()
    before = [image(number, clock) for number in range(100)]
    aged = [image(100 + number, clock) for number in range(4)]
    pipeline, out = build(before, clock, scorer=Slow(), deadline_ns=100_000_000)

    def turn(messages: Sequence[Message]) -> None:
        pipeline._take_in(messages)
        while batch := pipeline._take(None):
            pipeline._decide(pipeline._deciders[0], batch)
        while heads := pipeline._take_heads(wait=False):
            pipeline._release(heads)

    for message in before:
        turn([_received_now(message, clock.now_ns)])
    turn(
        [
            _received_now(message, clock.now_ns - ago_ms * 1_000_000)
            for message, ago_ms in zip(aged, (95, 85, 35, 25), strict=True)
        ]
    )
    reasons = [decision.reason.value for decision in out.decisions[100:]]
    assert reasons == ["late"] * (4 - scored) + ["score"] * scored
    assert pipeline.ledger.totals().balanced


def test_memory_is_given_back_once_frames_that_had_to_wait_are_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not while they wait, not for a few, once for each backlog, and not all the time."""
    given_back: list[int] = []
    monkeypatch.setattr("triage.pipeline.give_back_memory", lambda: given_back.append(1))
    clock = Clock()
    pipeline, _ = build([], clock, deadline_ns=60_000_000_000)

    def backlog(messages: int) -> list[int]:
        big = [structs.replace(image(0, clock), size_bytes=1 << 20) for _ in range(messages)]
        pipeline._take_in(big)
        pipeline.watch()
        before = len(given_back)
        while batch := pipeline._take(None):
            pipeline._decide(pipeline._deciders[0], batch)
        while heads := pipeline._take_heads(wait=False):
            pipeline._release(heads)
        for _ in range(3):
            pipeline.watch()
        return [before, len(given_back)]

    assert backlog(60) == [0, 0]
    assert backlog(70) == [0, 1]
    assert backlog(70) == [1, 1]
    clock.now_ns += 10_000_000_000
    pipeline.watch()
    assert len(given_back) == 2
    clock.now_ns += 10_000_000_000
    assert backlog(3) == [2, 2]


def test_threads_and_steps_decide_alike() -> None:
    """run() with its threads gives the decisions and the order of step()."""
    from time import monotonic_ns

    outcomes = []
    for threaded in (False, True):
        clock = Clock()
        messages = [start(clock), *(image(i, clock) for i in range(50)), end(clock)]
        if threaded:
            messages = [_received_now(m, monotonic_ns()) for m in messages]
        pipeline, out = build(messages, clock, per_call=7, deadline_ns=60_000_000_000)
        if threaded:
            pipeline._clock = monotonic_ns
            pipeline.run()
        else:
            while not pipeline._source.exhausted:
                pipeline.step()
        assert pipeline.failure is None
        outcomes.append((out.sent, [(d.image_id, d.verdict, d.reason) for d in out.decisions]))
    assert outcomes[0] == outcomes[1]


def _received_now(message: Message, now_ns: int) -> Message:

    return structs.replace(message, received_ns=now_ns)


def test_recorded_input_is_never_late_or_shed() -> None:
    """Replay waits: neither an old receipt nor a small budget leaves a frame unscored."""
    clock = Clock()
    messages = [image(i, clock) for i in range(300)]
    clock.now_ns += 10**12
    pipeline, out = build(messages, clock, per_call=10, live=False, queue_bytes=500)
    pipeline.run()
    assert [d.reason.value for d in out.decisions] == ["score"] * 300


def test_a_second_stop_gives_up_and_the_ledger_says_so() -> None:
    """With a writer that takes nothing, the frame in hand ends as undecided, not as lost."""

    class Stalled(Recorder):
        def __init__(self) -> None:
            super().__init__()
            self.tried = threading.Event()

        def send(self, message: Message, timeout_ms: int) -> bool:
            self.tried.set()
            return False

    clock = Clock()
    stalled = Stalled()
    pipeline, _ = build([image(0, clock), image(2, clock)], clock, recorder=stalled)
    runner = threading.Thread(target=pipeline.run)
    runner.start()
    assert stalled.tried.wait(20)
    pipeline.stop()
    pipeline.stop()
    runner.join(20)
    assert not runner.is_alive()
    totals = pipeline.ledger.totals()
    assert (totals.received, totals.forwarded, totals.undecided) == (2, 0, 2)
    assert not totals.balanced


def test_a_run_that_ends_takes_nothing_that_nobody_will_read() -> None:
    """The detector goes on sending while a slow writer holds up the end of the run: the socket is
    closed as soon as it was read for the last time, so what comes then stays with its sender."""
    clock = Clock()

    class Socket(ListSource):
        exhausted = False  # type: ignore[assignment]
        closed = threading.Event()

        def close(self) -> None:
            self.closed.set()

    source = Socket([start(clock), image(0, clock), image(2, clock)])

    class Slow(Recorder):
        def send(self, message: Message, timeout_ms: int) -> bool:
            return source.closed.is_set() and super().send(message, timeout_ms)

    pipeline, recorder = build(source, clock, recorder=Slow())
    runner = threading.Thread(target=pipeline.run, daemon=True)
    runner.start()
    pipeline.stop()
    runner.join(20)
    over = not runner.is_alive()
    source.closed.set()
    runner.join(20)
    assert over, "the source was not closed"
    assert recorder.sent == [(b"start",), (b"image 0",), (b"image 2",)]


def test_a_duplicate_end_is_forwarded_but_reported_once() -> None:
    """Emulators send end twice; listeners get one report, the writer both messages."""
    clock = Clock()
    pipeline, out = build([start(clock), image(0, clock), end(clock), end(clock)], clock)
    pipeline.step()
    assert len(out.reports) == 1
    assert out.sent.count((b"end",)) == 2


def test_listeners_are_told_who_decides_at_each_start() -> None:
    """Once a series, before its first decision."""
    said: list[Any] = []

    class Publisher(Recorder):
        def hello(self) -> None:
            said.append("hello")

        def tell(self, decisions: Sequence[Decision]) -> None:
            said.extend(decision.image_id for decision in decisions)

    clock = Clock()
    messages: list[Message] = []
    for number in (1, 2):
        series = Series(series_id=number)
        messages += [start(clock, series), image(number, clock, series), end(clock, series)]
    build(messages, clock, recorder=Publisher())[0].step()
    assert said == ["hello", 1, "hello", 2]


def test_a_broken_table_does_not_stop_frames() -> None:
    """A sink that fails is reported; forwarding and the ledger go on."""

    class FullDisk(Recorder):
        def add(self, decisions: Sequence[Decision]) -> None:
            raise TriageError("disk full")

    clock = Clock()
    pipeline, out = build([image(0, clock)], clock, recorder=FullDisk())
    pipeline.step()
    assert out.sent == [(b"image 0",)]
    assert pipeline.sink_errors == ["decision table: disk full"]
    assert pipeline.ledger.totals().balanced


def stepped(pipeline: Pipeline, turns: int) -> None:
    for _ in range(turns):
        pipeline.step()


def test_a_series_whose_end_never_comes_is_over_when_the_next_one_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A detector dies in the middle of one; it is reported once, behind the next one's."""
    clock = Clock()
    died, lived = Series(series_id=1, series_unique_id="A"), Series(series_id=2)
    messages = [
        *(start(clock, died), image(0, clock, died), image(1, clock, died)),
        *(start(clock, lived), image(0, clock, lived), end(clock, lived)),
    ]
    pipeline, recorder = build(messages, clock, per_call=1)
    stepped(pipeline, 5)
    assert recorder.reports == []
    stepped(pipeline, 1)
    assert [r.series_id for r in recorder.reports] == [2, 1]
    assert all(r.balanced for r in recorder.reports)
    assert "series 1 A: its end never came" in caplog.text


def test_an_image_behind_the_end_of_its_series_takes_no_end_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The series is told of once more when the next one is over, and nobody is alarmed."""
    clock = Clock()
    a, b = Series(series_id=1), Series(series_id=2)
    messages = [
        *(start(clock, a), image(0, clock, a), end(clock, a), image(1, clock, a)),
        *(start(clock, b), end(clock, b)),
    ]
    pipeline, recorder = build(messages, clock, per_call=1)
    stepped(pipeline, 6)
    assert [(r.series_id, r.received) for r in recorder.reports] == [(1, 1), (2, 0), (1, 2)]
    assert "never came" not in caplog.text


def test_two_series_that_come_in_turns_both_run_until_their_ends() -> None:
    """As from two detectors on one socket: neither is taken for over, and one that is heard of
    again after it was is reported again."""
    clock = Clock()
    a, b, c = (Series(series_id=i) for i in (1, 2, 3))
    messages = [
        *(start(clock, a), start(clock, b), image(0, clock, a), image(0, clock, b)),
        *(end(clock, b), image(2, clock, a)),
        *(start(clock, c), end(clock, c), image(4, clock, a), end(clock, a)),
    ]
    pipeline, recorder = build(messages, clock, per_call=1)
    stepped(pipeline, 7)
    assert [(r.series_id, r.received) for r in recorder.reports] == [(2, 1)]
    stepped(pipeline, 3)
    told = [(r.series_id, r.received) for r in recorder.reports]
    assert told == [(2, 1), (3, 0), (1, 2), (1, 3)]


def test_a_header_on_one_more_socket_begins_no_second_file() -> None:
    """It comes behind images of the first socket; a series that is armed anew begins one."""
    clock = Clock()
    began: list[Series] = []

    class Kept:
        as_messages = 0

        def start(self, series: Series, _: Any) -> None:
            began.append(series)

        def write(self, *_: Any) -> None: ...
        def end(self, *_: Any) -> None: ...
        def close(self, _: Any) -> None: ...

    series, anew = Series(series_id=1), Series(series_id=1)
    messages = [
        *(start(clock, series), image(0, clock, series), start(clock, series)),
        *(image(2, clock, series), start(clock, anew), image(0, clock, anew), start(clock, anew)),
    ]
    pipeline, recorder = build(messages, clock, kept=Kept())
    pipeline.step()
    assert [id(each) for each in began] == [id(series), id(anew)]
    assert recorder.sent.count((b"start",)) == 4


def test_rows_and_kept_frames_are_settled_when_none_comes_for_a_second() -> None:
    """Once, at the first turn of the publish thread after that; a kill then loses none of them."""
    clock = Clock()
    settled: list[int] = []
    flushed: list[int] = []

    class Table(Recorder):
        def flush(self) -> None:
            flushed.append(clock.now_ns)

    class Kept:
        as_messages = 0

        def start(self, *_: Any) -> None: ...
        def write(self, *_: Any) -> None: ...
        def end(self, *_: Any) -> None: ...
        def close(self, _: Any) -> None: ...

        def settle(self) -> None:
            settled.append(clock.now_ns)

    pipeline, _ = build([start(clock), image(0, clock)], clock, kept=Kept(), recorder=Table())
    pipeline.step()
    turns = (999_999_999, 1, 5_000_000_000)
    for passed_ns in turns:
        clock.now_ns += passed_ns
        pipeline._release([])
    assert settled == flushed == [2_000_000_000]


def test_series_that_nobody_starts_or_ends_are_not_kept_open_for_ever() -> None:
    """Forty of one image each: each file of kept frames would stay open."""
    clock = Clock()
    ended: list[int] = []

    class Kept:
        as_messages = 0

        def start(self, *_: Any) -> None: ...
        def write(self, *_: Any) -> None: ...

        def end(self, key: tuple[int, str], _: Any) -> None:
            ended.append(key[0])

        def close(self, _: Any) -> None: ...

    messages = [image(0, clock, Series(series_id=i, started=False)) for i in range(40)]
    pipeline, recorder = build(messages, clock, per_call=1, kept=Kept())
    stepped(pipeline, 40)
    assert ended == list(range(24))
    assert len(recorder.reports) == 24

"""Several workers on one line: what one does, or fails to do, must not be felt by the others."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from triage.metrics import Metrics
from triage.pipeline import Judgement, Outputs, Pipeline, PipelineOptions
from triage.policy import Policy
from triage.records import Decision, Frame, Message, MessageKind, Reason, Series, Verdict

SERIES = Series(series_id=1, series_unique_id="U")
POLICY = Policy(mode="enforce", p_blank_veto=0.5, audit_fraction=0.0)
FAR_NS = 60_000_000_000


def image(image_id: int, received_ns: int = 0, shape: tuple[int, int] = (0, 0)) -> Message:
    frame = Frame(series=SERIES, image_id=image_id, received_ns=received_ns, shape=shape)
    return Message(
        kind=MessageKind.IMAGE,
        parts=(b"%d" % image_id,),
        frame=frame,
        received_ns=received_ns,
        size_bytes=100,
    )


class Source:
    """Hands out prepared messages, some per call, and ends."""

    def __init__(self, messages: Sequence[Message], per_call: int = 5) -> None:
        self._left = list(messages)
        self._per_call = per_call

    def receive(self, timeout_ms: int) -> list[Message]:
        batch, self._left = self._left[: self._per_call], self._left[self._per_call :]
        return batch

    @property
    def exhausted(self) -> bool:
        return not self._left

    def close(self) -> None:
        pass


class Decider:
    """Odd images are blank; ``during`` is called with each batch before it is judged."""

    policy = POLICY

    def __init__(self, during: Callable[[Sequence[Frame]], None] = lambda frames: None) -> None:
        self._during = during
        self.seen: list[int] = []

    def decide(self, frames: Sequence[Frame]) -> list[Judgement]:
        self.seen += [frame.image_id for frame in frames]
        self._during(frames)
        return [
            Judgement(
                verdict=Verdict.VETO if frame.image_id % 2 else Verdict.KEEP, reason=Reason.SCORE
            )
            for frame in frames
        ]


class Sinks:
    """Forwarder, journal and table, writing down what they were told."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.journal: list[int] = []
        self.decisions: list[Decision] = []

    trouble = ""

    def send(self, message: Message, timeout_ms: int) -> bool:
        self.sent.append(message.parts[0])
        return True

    def dropped(self, decisions: Sequence[Decision]) -> int:
        self.journal += [decision.image_id for decision in decisions]
        return len(decisions)

    def add(self, decisions: Sequence[Decision]) -> None:
        self.decisions += decisions

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def run(
    deciders: Sequence[Decider],
    messages: Sequence[Message],
    clock: Callable[[], int] = lambda: 0,
    **options: Any,
) -> tuple[Pipeline, Sinks]:
    sinks = Sinks()
    pipeline = Pipeline(
        Source(messages),
        deciders,
        Outputs(forwarder=sinks, journal=sinks, table=sinks),
        PipelineOptions(**{"deadline_ns": FAR_NS, "batch_size": 3, **options}),
        Metrics(),
        clock=clock,
    )
    runner = threading.Thread(target=pipeline.run)
    runner.start()
    runner.join(60)
    assert not runner.is_alive()
    assert pipeline.failure is None
    return pipeline, sinks


@pytest.mark.parametrize("live", [True, False])
def test_workers_that_overtake_each_other_keep_order_and_balance(live: bool) -> None:
    """Of three batches in hand one is let go, drawn by lot: the order received is kept."""
    lot = random.Random(7)
    gate = threading.Condition()
    waiting: list[int] = []

    def all_taken() -> bool:
        return sum(len(decider.seen) for decider in deciders) == 200

    def shuffle(frames: Sequence[Frame]) -> None:
        mine = frames[0].image_id
        with gate:
            waiting.append(mine)
            while mine in waiting and not all_taken():
                if len(waiting) == 3:
                    waiting.remove(lot.choice(waiting))
                    gate.notify_all()
                else:
                    gate.wait(30)
            gate.notify_all()

    deciders = [Decider(shuffle) for _ in range(3)]
    pipeline, sinks = run(deciders, [image(i) for i in range(200)], live=live)
    assert [d.image_id for d in sinks.decisions] == list(range(200))
    assert sinks.sent == [b"%d" % i for i in range(0, 200, 2)]
    assert sinks.journal == list(range(1, 200, 2))
    assert sorted(i for d in deciders for i in d.seen) == list(range(200))
    totals = pipeline.ledger.totals()
    assert totals.balanced
    assert (totals.forwarded, totals.dropped) == (100, 100)


def test_two_workers_decide_at_the_same_time() -> None:
    """Two frames stand in line: each worker takes one, and neither waits for a fuller batch."""
    both = threading.Barrier(2, timeout=30)
    deciders = [Decider(lambda frames: both.wait() and None) for _ in range(2)]
    pipeline, sinks = run(deciders, [image(0), image(1)])
    assert [d.seen for d in sorted(deciders, key=lambda d: d.seen)] == [[0], [1]]
    assert [d.image_id for d in sinks.decisions] == [0, 1]
    assert pipeline.ledger.totals().balanced


class Ticking:
    """Real time is not waited for: each look at the clock is 1 ms later."""

    def __init__(self) -> None:
        self._now_ns = 0

    def __call__(self) -> int:
        self._now_ns += 1_000_000
        return self._now_ns


def test_a_hung_worker_delays_its_own_frames_only() -> None:
    """The frames that it holds go on as late, all others are scored by the other worker."""
    release, entered, others_done = threading.Event(), threading.Event(), threading.Event()
    hung: list[int] = []

    def hang(frames: Sequence[Frame]) -> None:
        hung.extend(frame.image_id for frame in frames)
        entered.set()
        release.wait(60)

    def go_on(frames: Sequence[Frame]) -> None:
        entered.wait(30)
        if frames[-1].image_id == 40:
            others_done.set()

    class Patient(Ticking):
        """Time stands still until the other worker has judged all before the last frame."""

        def __call__(self) -> int:
            return super().__call__() if others_done.is_set() else 0

    # The last frame comes much later, so that its own deadline is out of sight.
    messages = [*(image(i) for i in range(40)), image(40, received_ns=FAR_NS)]
    deciders = [Decider(hang), Decider(go_on)]
    pipeline, sinks = run(deciders, messages, Patient(), deadline_ns=5_000_000, batch_size=1)
    release.set()
    assert len(hung) == 1
    assert [d.image_id for d in sinks.decisions] == list(range(41))
    late = [d.image_id for d in sinks.decisions if d.reason is Reason.LATE]
    assert late == hung
    assert {d.reason for d in sinks.decisions if d.image_id not in hung} == {Reason.SCORE}
    assert pipeline.ledger.totals().balanced


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_worker_that_breaks_keeps_its_frames_and_the_others_go_on(
    live: bool, error: type[BaseException]
) -> None:
    """An error is survived; what ends the thread leaves its frames to go on unscored at once."""
    broken: list[int] = []
    taken = threading.Event()

    def fail(frames: Sequence[Frame]) -> None:
        broken.extend(frame.image_id for frame in frames)
        taken.set()
        raise error("broken")

    well = Decider(lambda frames: taken.wait(30) and None)
    pipeline, sinks = run([Decider(fail), well], [image(i) for i in range(60)], live=live)
    assert [d.image_id for d in sinks.decisions] == list(range(60))
    by_reason = {d.image_id: d.reason for d in sinks.decisions}
    assert broken
    assert {by_reason[i] for i in broken} == {Reason.SCORER_ERROR}
    assert all(by_reason[i] is Reason.SCORE for i in well.seen)
    assert sorted(broken + well.seen) == list(range(60))
    assert pipeline.ledger.totals().balanced


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_without_a_worker_left_frames_go_on_unscored() -> None:
    """All workers gone: recorded input ends, nothing waits for a deadline that does not exist."""

    def leave(frames: Sequence[Frame]) -> None:
        raise SystemExit

    pipeline, sinks = run(
        [Decider(leave), Decider(leave)], [image(i) for i in range(50)], live=False
    )
    assert [d.image_id for d in sinks.decisions] == list(range(50))
    assert {(d.verdict, d.reason) for d in sinks.decisions} == {(Verdict.KEEP, Reason.SCORER_ERROR)}
    assert pipeline.ledger.totals().balanced


def test_a_stop_drains_what_every_worker_holds() -> None:
    """stop() while both workers are at work: what was received is scored and released."""
    both = threading.Barrier(3, timeout=30)

    class Endless(Source):
        """Sends nothing more, and never ends by itself."""

        @property
        def exhausted(self) -> bool:
            return False

    deciders = [Decider(lambda frames: both.wait() and None) for _ in range(2)]
    sinks = Sinks()
    pipeline = Pipeline(
        Endless([image(0), image(1)]),
        deciders,
        Outputs(forwarder=sinks, journal=sinks, table=sinks),
        PipelineOptions(deadline_ns=FAR_NS),
        Metrics(),
        clock=lambda: 0,
    )
    runner = threading.Thread(target=pipeline.run)
    runner.start()
    pipeline.stop()
    both.wait()
    runner.join(60)
    assert not runner.is_alive()
    assert [(d.image_id, d.reason) for d in sinks.decisions] == [
        (0, Reason.SCORE),
        (1, Reason.SCORE),
    ]
    assert pipeline.ledger.totals().balanced


def test_a_batch_ends_with_the_frame_that_fills_it() -> None:
    """Of large frames each is a batch; of small ones a batch holds as many as it may."""
    for side_px, batches in ((1000, [1] * 6), (100, [3, 3])):
        sizes: list[int] = []
        decider = Decider(lambda frames, sizes=sizes: sizes.append(len(frames)))  # type: ignore[misc]
        messages = [image(i, shape=(side_px, side_px)) for i in range(6)]
        pipeline = Pipeline(
            Source(messages, per_call=6),
            decider,
            Outputs(),
            PipelineOptions(batch_size=3, batch_px=1_000_000),
            Metrics(),
            clock=lambda: 0,
        )
        assert len(pipeline.step()) == 6
        assert sizes == batches


def test_a_batch_waits_to_fill_where_that_is_asked_for() -> None:
    """Frames come one by one: with a wait that does not end they are decided together."""
    sizes: list[int] = []
    sinks = Sinks()
    pipeline = Pipeline(
        Source([image(i) for i in range(6)], per_call=1),
        Decider(lambda frames: sizes.append(len(frames))),
        Outputs(journal=sinks, table=sinks),
        PipelineOptions(deadline_ns=FAR_NS, batch_size=3, batch_wait_ns=FAR_NS),
        Metrics(),
        clock=lambda: 0,
    )
    runner = threading.Thread(target=pipeline.run)
    runner.start()
    runner.join(30)
    assert not runner.is_alive()
    assert sizes == [3, 3]
    assert [d.image_id for d in sinks.decisions] == list(range(6))


def test_the_worker_that_fell_idle_last_is_woken_first() -> None:
    """Frames that come one at a time all go to one worker, whose caches hold what it needs."""
    released = threading.Semaphore(0)

    class OneByOne(Source):
        """Hands out the next message once the one before was released and its worker rests."""

        def receive(self, timeout_ms: int) -> list[Message]:
            if self.sent:
                assert released.acquire(timeout=30)
            line = pipeline._line
            while len(line.idle) < 2:
                with line.lock:
                    line.room.wait(0.001)
            self.sent = True
            return super().receive(timeout_ms)

        sent = False

    class Counting(Sinks):
        def add(self, decisions: Sequence[Decision]) -> None:
            super().add(decisions)
            for _ in decisions:
                released.release()

    sinks = Counting()
    deciders = [Decider(), Decider()]
    pipeline = Pipeline(
        OneByOne([image(i) for i in range(12)], per_call=1),
        deciders,
        Outputs(journal=sinks, table=sinks),
        PipelineOptions(deadline_ns=FAR_NS),
        Metrics(),
        clock=lambda: 0,
    )
    runner = threading.Thread(target=pipeline.run)
    runner.start()
    runner.join(60)
    assert not runner.is_alive()
    assert [d.image_id for d in sinks.decisions] == list(range(12))
    assert sorted(len(decider.seen) for decider in deciders) == [0, 12]


def test_of_two_workers_one_that_waits_for_a_full_batch_takes_it_whole() -> None:
    """Where a fuller batch costs less, what was waited for is not shared out again."""
    sizes: list[int] = []
    both = [Decider(lambda frames: sizes.append(len(frames))) for _ in range(2)]
    run(both, [image(i) for i in range(6)], batch_wait_ns=FAR_NS)
    assert sizes == [3, 3]


def test_frames_behind_a_full_batch_wake_the_next_worker() -> None:
    """While one worker is stuck with a batch that it waited for, the other takes what is left."""
    stuck, go_on = threading.Event(), threading.Event()
    others: list[int] = []

    def first_hangs(frames: Sequence[Frame]) -> None:
        if not stuck.is_set():
            stuck.set()
            go_on.wait(30)
            return
        others.extend(frame.image_id for frame in frames)
        if len(others) == 3:
            go_on.set()

    both = [Decider(first_hangs) for _ in range(2)]
    _, sinks = run(both, [image(i) for i in range(6)], batch_wait_ns=FAR_NS)
    assert others == [3, 4, 5]
    assert [d.reason for d in sinks.decisions] == [Reason.SCORE] * 6


def test_a_second_stop_ends_a_replay_whose_worker_hangs() -> None:
    """Nothing else would: recorded frames have no deadline."""
    stuck, let_go = threading.Event(), threading.Event()

    def hang(frames: Sequence[Frame]) -> None:
        stuck.set()
        let_go.wait(60)

    pipeline = Pipeline(
        Source([image(0)]), Decider(hang), Outputs(), PipelineOptions(live=False), Metrics()
    )
    runner = threading.Thread(target=pipeline.run)
    runner.start()
    assert stuck.wait(30)
    pipeline.stop()
    pipeline.stop()
    runner.join(30)
    has_ended = not runner.is_alive()
    let_go.set()
    runner.join(30)
    assert has_ended

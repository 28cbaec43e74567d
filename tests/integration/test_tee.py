"""A tee beside an existing writer: whatever happens behind it, the stream is as without us."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import zmq

from simulators.detectors.detector import series_messages
from simulators.detectors.frames import SimFrame, StreamInfo
from triage.ingest.subscriber import Subscriber
from triage.metrics import Metrics
from triage.pipeline import Judgement, Outputs, Pipeline, PipelineOptions
from triage.policy import Policy
from triage.records import Decision, Frame, Message, Reason, Scores, SeriesReport, Verdict
from triage.sinks.forwarder import Forwarder

PATIENCE_S = 120.0
HOUR_NS = 3_600_000_000_000
IMAGES = 60
SIDE_PX = 128
PIXELS = SimFrame(
    payload=np.random.default_rng(1).bytes(2 * SIDE_PX * SIDE_PX),
    encoding="raw",
    dtype=np.dtype("<u2"),
    shape=(SIDE_PX, SIDE_PX),
)
INFO = StreamInfo(shape=(SIDE_PX, SIDE_PX), number_of_images=IMAGES, series_id=6)


class Decider:
    """Vetoes everything, after a moment of whatever it is given to do."""

    def __init__(self, during: Callable[[], object] = lambda: None, mode: str = "shadow") -> None:
        self.policy = Policy(mode=mode, p_blank_veto=0.5, audit_fraction=0.0)
        self._during = during

    def decide(self, frames: Sequence[Frame]) -> list[Judgement]:
        self._during()
        blank = Scores(p_blank=1.0)
        return [Judgement(verdict=Verdict.VETO, reason=Reason.SCORE, scores=blank) for _ in frames]


class Listener:
    """Takes the place of the decision publisher."""

    def __init__(
        self,
        when_told: Callable[[], object] = lambda: None,
        when_started: Callable[[], object] = lambda: None,
    ) -> None:
        self._when_told = when_told
        self._when_started = when_started
        self.told = 0

    gate_open = False

    def greet_newcomers(self) -> None:
        pass

    def hello(self) -> None:
        self._when_started()

    def tell(self, decisions: Sequence[Decision]) -> None:
        self.told += len(decisions)
        self._when_told()

    def series_report(self, report: SeriesReport) -> None:
        pass


class UntilEnd:
    """A subscriber that ends with the series."""

    def __init__(self, source: Subscriber) -> None:
        self._source = source
        self.exhausted = False
        self.taken = 0

    def receive(self, timeout_ms: int) -> list[Message]:
        messages = self._source.receive(timeout_ms)
        self.taken += len(messages)
        self.exhausted = any(message.kind == "end" for message in messages)
        return messages

    def close(self) -> None:
        self._source.close()


class Chain:
    """Detector's socket, pipeline with a tee, writer's socket."""

    def __init__(self, context: Any, folder: str) -> None:
        self._context = context
        self._folder = folder
        self.detector = context.socket(zmq.PUSH)
        self.detector.setsockopt(zmq.SNDHWM, 1000)
        self.detector.setsockopt(zmq.LINGER, 0)
        port = self.detector.bind_to_random_port("tcp://127.0.0.1")
        self.source = UntilEnd(Subscriber(f"tcp://127.0.0.1:{port}", context=context))
        self._writer_at = "tcp://127.0.0.1:*"
        self.find_writer()
        self.forwarder = Forwarder(self._writer_at, context=context)
        self.sent = [[bytes(p) for p in one.parts] for one in series_messages(INFO, [PIXELS])]

    def find_writer(self) -> None:
        self.writer = self._context.socket(zmq.PULL)
        self.writer.setsockopt(zmq.RCVTIMEO, int(PATIENCE_S * 1000))
        self.writer.bind(self._writer_at)
        self._writer_at = self.writer.getsockopt_string(zmq.LAST_ENDPOINT)

    def lose_writer(self) -> None:
        """Before anything is sent: nobody is at the writer's address until one is found.

        It is one where nobody ever was: a socket goes on listening for a while after its close,
        and takes what it is sent along.
        """
        self.forwarder.close(abandon=True)
        self.writer.close()
        self._writer_at = f"ipc://{self._folder}/writer"
        self.forwarder = Forwarder(self._writer_at, context=self._context)

    def start(
        self, deciders: Sequence[Decider], listener: Listener | None = None, **options: Any
    ) -> Pipeline:
        pipeline = Pipeline(
            self.source,
            deciders,
            Outputs(forwarder=self.forwarder, publisher=listener),
            PipelineOptions(**{"deadline_ns": 50_000_000, "tee": True, **options}),
            Metrics(),
        )
        self.runner = threading.Thread(target=pipeline.run)
        self.runner.start()
        return pipeline

    def send(self, first: int = 0, last: int | None = None) -> None:
        for parts in self.sent[first:last]:
            self.detector.send_multipart(parts)

    def written(self, messages: int) -> list[list[bytes]]:
        return [self.writer.recv_multipart() for _ in range(messages)]

    def join(self) -> None:
        self.runner.join(PATIENCE_S)
        assert not self.runner.is_alive()

    def close(self) -> None:
        self.forwarder.close(abandon=True)
        self.source.close()
        self.writer.close()
        self.detector.close()


@pytest.fixture
def chain() -> Iterator[Chain]:
    context: zmq.Context[Any] = zmq.Context()
    # Not pytest's folder: its name is too long for the address of a socket.
    with tempfile.TemporaryDirectory(prefix="tee-") as folder:
        opened = Chain(context, folder)
        yield opened
        opened.close()
        context.destroy(linger=0)


def until(reached: Callable[[], bool]) -> None:
    moment = threading.Event()
    for _ in range(int(PATIENCE_S * 100)):
        if reached():
            return
        moment.wait(0.01)
    pytest.fail("it did not come to that")


def fail() -> None:
    raise RuntimeError("broken")


def leave() -> None:
    raise SystemExit


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("during", [lambda: None, fail, leave])
def test_scoring_that_fails_or_ends_changes_nothing_of_the_stream(
    chain: Chain, during: Callable[[], object]
) -> None:
    """Every message arrives bit for bit, in order; every image is booked as forwarded."""
    pipeline = chain.start([Decider(during), Decider(during)])
    chain.send()
    assert chain.written(len(chain.sent)) == chain.sent
    chain.join()
    totals = pipeline.ledger.totals()
    assert totals.balanced
    assert (totals.received, totals.forwarded, totals.missing) == (IMAGES, IMAGES, 0)


def test_the_writer_has_every_message_while_scoring_hangs(chain: Chain) -> None:
    """Nothing waits for a verdict, nor for a deadline: the one here is an hour."""
    let_go = threading.Event()
    pipeline = chain.start([Decider(let_go.wait)], deadline_ns=HOUR_NS)
    chain.send()
    assert chain.written(len(chain.sent)) == chain.sent
    assert pipeline.ledger.totals().forwarded == 0
    let_go.set()
    chain.join()
    totals = pipeline.ledger.totals()
    assert totals.balanced
    assert totals.by_override == {"shadow": IMAGES}


def test_a_hung_listener_fills_the_line_and_the_stream_goes_on(chain: Chain) -> None:
    """What finds no room is booked as forwarded without a score; the end is still reported."""
    let_go = threading.Event()
    listener = Listener(let_go.wait)
    pipeline = chain.start([Decider()], listener, queue_bytes=20 * len(PIXELS.payload))
    chain.send(0, 10)
    assert chain.written(10) == chain.sent[:10]
    chain.send(10)
    assert chain.written(len(chain.sent) - 10) == chain.sent[10:]
    let_go.set()
    chain.join()
    totals = pipeline.ledger.totals()
    assert totals.balanced
    assert (totals.forwarded, totals.ended) == (IMAGES, True)
    unseen = IMAGES - listener.told
    assert totals.by_reason["overload"] >= unseen > 0


@pytest.mark.parametrize("where", ["between messages", "with messages in hand"])
def test_a_publish_thread_that_ends_takes_nothing_with_it(
    chain: Chain, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is a failure and the stream does not notice; the ledger still balances."""
    listener = Listener()
    if where == "between messages":
        listener = Listener(when_started=fail)
    pipeline = chain.start([Decider()], listener)
    if where == "with messages in hand":
        monkeypatch.setattr(pipeline, "_forward", lambda message: fail())
    chain.send(0, 5)
    assert chain.written(5) == chain.sent[:5]
    until(lambda: pipeline.failure is not None)
    assert isinstance(pipeline.failure, RuntimeError)
    chain.send(5)
    assert chain.written(len(chain.sent) - 5) == chain.sent[5:]
    chain.join()
    totals = pipeline.ledger.totals()
    assert totals.balanced
    assert (totals.received, totals.forwarded) == (IMAGES, IMAGES)
    assert totals.by_reason["scorer_error"] >= IMAGES - 5
    assert pipeline.snapshot().troubles


@pytest.mark.parametrize("books", ["ledger", "_metrics"])
def test_books_that_fail_take_nothing_with_them(
    chain: Chain, books: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever breaks on the receiving thread itself, the writer has every message."""
    pipeline = chain.start([Decider()])

    def broken(messages: Sequence[Message]) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(getattr(pipeline, books), "received", broken)
    chain.send()
    assert chain.written(len(chain.sent)) == chain.sent
    chain.join()
    assert isinstance(pipeline.failure, RuntimeError)
    assert "worker_lost" in pipeline.health.troubles


def test_a_stalled_writer_holds_the_detector_back_as_without_us(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is taken from the detector that the writer has no room for; nothing is lost."""
    chain.lose_writer()
    offers: list[Message] = []
    send = chain.forwarder.send

    def offered(message: Message, timeout_ms: int) -> bool:
        offers.append(message)
        return send(message, timeout_ms)

    monkeypatch.setattr(chain.forwarder, "send", offered)
    pipeline = chain.start([Decider()])
    chain.send(0, 10)
    until(lambda: "writer_stalled" in pipeline.snapshot().troubles)
    taken, tries = chain.source.taken, len(offers)
    assert 0 < taken <= 10
    assert pipeline.ledger.totals().received == 0
    chain.send(10)
    until(lambda: len(offers) > tries + 3)
    assert all(message is offers[0] for message in offers)
    assert chain.source.taken == taken
    chain.find_writer()
    assert chain.written(len(chain.sent)) == chain.sent
    chain.join()
    assert pipeline.ledger.totals().forwarded == IMAGES
    monkeypatch.setattr("triage.pipeline._STALL_OVER_NS", 0)
    assert "writer_stalled" not in pipeline.snapshot().troubles


def test_a_policy_that_drops_drops_nothing_behind_a_tee(chain: Chain) -> None:
    """Also one that comes at run time: the books say what was done."""
    pipeline = chain.start([Decider(mode="enforce")], deadline_ns=HOUR_NS)
    chain.send()
    assert chain.written(len(chain.sent)) == chain.sent
    chain.join()
    totals = pipeline.ledger.totals()
    assert (totals.forwarded, totals.dropped) == (IMAGES, 0)
    assert totals.by_override == {"shadow": IMAGES}


def test_a_second_stop_says_what_never_reached_the_writer(chain: Chain) -> None:
    """Messages that were taken and could not be handed on are not booked as forwarded."""
    chain.lose_writer()
    pipeline = chain.start([Decider()])
    chain.send()
    until(lambda: "writer_stalled" in pipeline.snapshot().troubles)
    pipeline.stop()
    pipeline.stop()
    chain.join()
    assert pipeline.ledger.totals().forwarded == 0
    assert any(f"{chain.source.taken} messages" in line for line in pipeline.sink_errors)

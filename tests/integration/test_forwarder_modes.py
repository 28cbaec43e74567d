"""Where messages go over real sockets: several writers, lanes, verdicts, placeholders."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import zmq
from prometheus_client import generate_latest
from strict_reader import array, strictly

from simulators.detectors.detector import series_messages
from simulators.detectors.frames import SimFrame, StreamInfo, compressed
from triage.annotation import Annotator
from triage.ingest.subscriber import Subscriber
from triage.metrics import Metrics
from triage.pipeline import Judgement, Outputs, Pipeline, PipelineOptions
from triage.policy import Policy
from triage.records import Decision, Frame, Message, MessageKind, Reason, Scores, Verdict
from triage.sinks.forwarder import Forwarder

START, IMAGE, END, CONTROL = (
    MessageKind.START,
    MessageKind.IMAGE,
    MessageKind.END,
    MessageKind.CONTROL,
)
PATIENCE_S = 90.0
FILLER = bytes(200_000)
"""So large that what the kernel holds for a writer is a few images."""


class Clock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


class Writer:
    """A PULL socket read by a thread of its own while ``reading`` is set."""

    def __init__(self, address: str = "tcp://127.0.0.1:*") -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, 1)
        self._socket.setsockopt(zmq.RCVBUF, 4096)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address)
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.reading = threading.Event()
        self.reading.set()
        self.heard: list[list[bytes]] = []
        self._more = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while not self._closing:
            if not self.reading.wait(0.05) or not self._socket.poll(50):
                continue
            if self.reading.is_set():
                parts = self._socket.recv_multipart()
                with self._more:
                    self.heard.append(parts)
                    self._more.notify_all()

    @property
    def names(self) -> list[str]:
        """The first part of each message heard, without its filler."""
        return [parts[0].rstrip(b"\0").decode("latin-1") for parts in self.heard]

    def wait_for(self, reached: Callable[[list[str]], bool]) -> list[str]:
        with self._more:
            assert self._more.wait_for(lambda: reached(self.names), PATIENCE_S), self.names
            return self.names

    def close(self) -> None:
        self._closing = True
        self._thread.join(PATIENCE_S)
        self._socket.close()
        self._context.term()


@pytest.fixture
def opened_writers() -> Iterator[list[Writer]]:
    opened: list[Writer] = []
    yield opened
    for writer in opened:
        writer.close()


@pytest.fixture
def writers(opened_writers: list[Writer]) -> list[Writer]:
    opened_writers += [Writer(), Writer(), Writer()]
    return opened_writers


@pytest.fixture
def context() -> Iterator[Any]:
    ctx: zmq.Context[Any] = zmq.Context()
    yield ctx
    ctx.destroy(linger=0)


def message(kind: MessageKind, name: str, lane: int = 0, ports: int = 1) -> Message:
    return Message(
        kind=kind,
        parts=(name.encode() + (FILLER if kind is IMAGE else b""),),
        followed_by=tuple((f"{name}+{port}".encode() + FILLER,) for port in range(1, ports)),
        lane=lane,
    )


def forwarder_to(context: Any, writers: Sequence[Writer | str], **options: Any) -> Forwarder:
    addresses = [writer.endpoint if isinstance(writer, Writer) else writer for writer in writers]
    return Forwarder(", ".join(addresses), context=context, held_bytes=1, **options)


def send(forwarder: Forwarder, *messages: Message) -> None:
    for one in messages:
        assert forwarder.send(one, int(PATIENCE_S * 1000)), one.parts[0][:20]


def until(reached: Callable[[], bool]) -> None:
    moment = threading.Event()
    for _ in range(int(PATIENCE_S * 100)):
        if reached():
            return
        moment.wait(0.01)
    pytest.fail("it did not come to that")


def catch_up(forwarder: Forwarder) -> None:
    """As the pipeline does between messages."""

    def caught_up() -> bool:
        forwarder.catch_up()
        return not forwarder.trouble

    until(caught_up)


def images(first: int, last: int, **options: Any) -> list[Message]:
    return [message(IMAGE, f"i{n}", **options) for n in range(first, last)]


def numbers(names: Sequence[str]) -> list[int]:
    """The images among them, by number; a further port of one counts for nothing."""
    return [int(name[1:]) for name in names if name[0] == "i" and "+" not in name]


def metric(metrics: Metrics, name: str, writer: int) -> float:
    line = f'{name}{{writer="{writer}"}} '
    text = generate_latest(metrics.registry).decode()
    return float(text.split(line)[1].split("\n")[0])


def test_images_take_turns_and_all_else_goes_to_every_writer(
    context: Any, writers: list[Writer]
) -> None:
    """Each image once, with all its ports in one place; start, control and end to all."""
    forwarder = forwarder_to(context, writers)
    send(forwarder, message(START, "start"), *images(0, 50, ports=2))
    send(forwarder, message(CONTROL, "calibration"), *images(50, 99, ports=2), message(END, "end"))
    for writer in writers:
        names = writer.wait_for(lambda names: "end" in names)
        assert (names[0], names[-1], names.count("calibration")) == ("start", "end", 1)
        assert numbers(names) == sorted(numbers(names))
        at = names.index("calibration")
        assert all(n < 50 for n in numbers(names[:at]))
        assert all(n >= 50 for n in numbers(names[at:]))
        whole = [name for name in names if name[0] == "i"]
        assert [f"{name}+1" for name in whole[::2]] == whole[1::2]
        assert numbers(names)
    assert sorted(n for writer in writers for n in numbers(writer.names)) == list(range(99))
    forwarder.close()


def test_one_writer_for_each_lane(context: Any, writers: list[Writer]) -> None:
    """What came on socket i goes to writer i and to nobody else, start and end too."""
    forwarder = forwarder_to(context, writers, distribute="lane")
    for kind, name in ((START, "start"), (IMAGE, "i0"), (IMAGE, "i1"), (END, "end")):
        send(forwarder, *(message(kind, name, lane=lane) for lane in range(3)))
    for writer in writers:
        assert writer.wait_for(lambda names: len(names) == 4) == ["start", "i0", "i1", "end"]
    forwarder.close()


def test_a_stalled_writer_is_left_out_and_told_when_it_comes_back(
    context: Any, writers: list[Writer]
) -> None:
    """The others go on; nobody hears anything twice; it hears the end of the series that it
    was in, nothing of one that it missed, and the new start before images."""
    clock, metrics = Clock(), Metrics()
    forwarder = forwarder_to(context, writers[:2], metrics=metrics, clock=clock)
    well, stalled = writers[:2]
    send(forwarder, message(START, "start"))
    stalled.wait_for(lambda names: names == ["start"])
    stalled.reading.clear()
    send(forwarder, *images(0, 150))
    end = message(END, "end")
    assert not forwarder.send(end, 0)
    assert not forwarder.send(end, 10)
    well.wait_for(lambda names: "end" in names[-1:])
    assert forwarder.trouble == ""
    clock.now_ns += 11_000_000_000
    assert forwarder.send(end, 0)
    assert stalled.endpoint in forwarder.trouble
    assert [metric(metrics, "triage_writer_taking", n) for n in (0, 1)] == [1, 0]
    send(forwarder, message(START, "unheard"), *images(150, 160), message(END, "of it"))
    send(forwarder, message(START, "again"), *images(160, 170))
    assert metric(metrics, "triage_writer_forgotten_total", 1) == 2
    stalled.reading.set()
    last = 170
    while forwarder.trouble:
        send(forwarder, *images(last, last + 1))
        last += 1
        assert last < 10_000
    send(forwarder, *images(last, last + 10), message(END, "end"))
    for writer in (well, stalled):
        writer.wait_for(lambda names: "end" in names[-1:] and "again" in names)
    heard = ["start", "end", "unheard", "of it", "again", "end"]
    assert [n for n in well.names if n[0] != "i"] == heard
    assert [n for n in stalled.names if n[0] != "i"] == ["start", "end", "again", "end"]
    at = stalled.names.index("again")
    assert all(n < 150 for n in numbers(stalled.names[:at]))
    assert numbers(stalled.names[at:])
    assert all(n >= 170 for n in numbers(stalled.names[at:]))
    everything = sorted(numbers(well.names) + numbers(stalled.names))
    assert everything == list(range(last + 10))
    assert metric(metrics, "triage_writer_taking", 1) == 1
    forwarder.close()


def test_a_writer_that_starts_late_hears_the_start_first(
    context: Any, opened_writers: list[Writer]
) -> None:
    """Nobody at its address: all images go to the other one, until somebody is there."""
    clock = Clock()
    opened_writers.append(well := Writer())
    opened_writers.append(late := Writer())
    address = late.endpoint
    opened_writers.pop().close()
    forwarder = forwarder_to(context, [address, well], clock=clock)
    start = message(START, "start")
    assert not forwarder.send(start, 10)
    clock.now_ns += 11_000_000_000
    send(forwarder, start, *images(0, 20))
    assert address in forwarder.trouble
    opened_writers.append(late := Writer(address))
    last = 20
    while forwarder.trouble:
        send(forwarder, *images(last, last + 1))
        last += 1
    send(forwarder, message(END, "end"))
    for writer in (late, well):
        writer.wait_for(lambda names: "end" in names[-1:])
        assert [n for n in writer.names if n[0] != "i"] == ["start", "end"]
    assert late.names[0] == "start"
    assert sorted(numbers(late.names) + numbers(well.names)) == list(range(last))
    forwarder.close()


def test_a_writer_that_is_back_hears_what_it_missed_though_nothing_comes(
    context: Any, opened_writers: list[Writer]
) -> None:
    """Between series, too, and after the last one."""
    clock = Clock()
    opened_writers += [Writer(), Writer()]
    address = opened_writers[1].endpoint
    opened_writers.pop().close()
    forwarder = forwarder_to(context, [opened_writers[0], address], clock=clock)
    start = message(START, "start")
    assert not forwarder.send(start, 10)
    clock.now_ns += 11_000_000_000
    send(forwarder, start, *images(0, 3), message(END, "end"))
    opened_writers.append(late := Writer(address))
    catch_up(forwarder)
    assert late.wait_for(lambda names: "end" in names) == ["start", "end"]
    forwarder.close()


def test_a_writer_that_missed_nothing_is_back_once_it_has_room(
    context: Any, writers: list[Writer]
) -> None:
    """Left out in the middle of a series because it took no image: when it reads again it is no
    longer said to be gone, though nothing more comes."""
    clock, metrics = Clock(), Metrics()
    forwarder = forwarder_to(context, writers[:2], metrics=metrics, clock=clock)
    send(forwarder, message(START, "start"))
    stalled = writers[1]
    stalled.wait_for(lambda names: names == ["start"])
    stalled.reading.clear()
    send(forwarder, *images(0, 150))
    clock.now_ns += 11_000_000_000
    send(forwarder, *images(150, 152))
    forwarder.catch_up()
    assert stalled.endpoint in forwarder.trouble
    stalled.reading.set()
    catch_up(forwarder)
    assert metric(metrics, "triage_writer_taking", 1) == 1
    forwarder.close()


def test_the_pipeline_looks_for_writers_while_nothing_comes() -> None:
    """Without a message it asks the forwarder to catch up, and says when nobody is left out."""

    class Forgetful:
        """A writer is left out until the forwarder is asked to look for it."""

        trouble = "left out: somebody"

        def send(self, message: Message, timeout_ms: int) -> bool:
            return True

        def catch_up(self) -> None:
            self.trouble = ""

    sink = Forgetful()

    class Silent(Given):
        """Ends when nobody is left out."""

        def receive(self, timeout_ms: int) -> list[Message]:
            self.exhausted = not sink.trouble
            return []

    options = PipelineOptions(deadline_ns=60_000_000_000)
    pipeline = Pipeline(Silent([]), [OddIsBlank()], Outputs(forwarder=sink), options, Metrics())
    runner = threading.Thread(target=pipeline.run, daemon=True)
    runner.start()
    runner.join(PATIENCE_S)
    assert not runner.is_alive()
    assert not pipeline.health.troubles
    assert not pipeline.sink_errors


def test_a_writer_that_dies_takes_nothing_more_with_it(
    context: Any, opened_writers: list[Writer]
) -> None:
    """What was sent after its end is with the other one, once and in order."""
    clock = Clock()
    opened_writers.append(well := Writer())
    dying = Writer()
    forwarder = forwarder_to(context, [dying, well], clock=clock)
    send(forwarder, message(START, "start"), *images(0, 10))
    until(lambda: len(numbers(dying.names)) + len(numbers(well.names)) == 10)
    dying.close()
    until(lambda: not forwarder._writers[0].socket.poll(0, zmq.POLLOUT))
    send(forwarder, *images(10, 40))
    end = message(END, "end")
    assert not forwarder.send(end, 0)
    clock.now_ns += 11_000_000_000
    send(forwarder, end)
    names = well.wait_for(lambda names: "end" in names[-1:])
    assert [n for n in numbers(names) if n >= 10] == list(range(10, 40))
    forwarder.close(abandon=True)


def test_writers_that_come_and_go_hear_nothing_twice_and_in_order(
    context: Any, writers: list[Writer]
) -> None:
    """Two of three are stopped, let go, killed and started anew at random moments."""
    lot = random.Random(8)
    addresses = [writer.endpoint for writer in writers]
    everybody, stop = list(writers), threading.Event()

    def trouble() -> None:
        while not stop.wait(lot.uniform(0.01, 0.1)):
            n = lot.randrange(1, 3)
            match lot.choice(["kill", "stall", "go"]):
                case "kill":
                    writers[n].close()
                    writers[n] = Writer(addresses[n])
                    everybody.append(writers[n])
                case "stall":
                    writers[n].reading.clear()
                case _:
                    writers[n].reading.set()

    forwarder = forwarder_to(context, addresses, writer_timeout_s=0.05)
    troublemaker = threading.Thread(target=trouble)
    troublemaker.start()
    sent = 0
    for series in range(6):
        more = lot.randrange(50, 120)
        send(forwarder, message(START, f"{series}-0"), *images(sent, sent + more))
        send(forwarder, message(END, f"{series}-1"))
        sent += more
    stop.set()
    troublemaker.join()
    for writer in writers:
        writer.reading.set()
    send(forwarder, message(END, "6-1"))
    catch_up(forwarder)
    for writer in writers:
        writer.wait_for(lambda names: "6-1" in names)
    seen: list[int] = []
    for writer in everybody:
        seen += numbers(writer.names)
        assert numbers(writer.names) == sorted(numbers(writer.names))
        others = [name for name in writer.names if name[0] != "i"]
        assert others == sorted(set(others))
    assert len(seen) == len(set(seen))
    if len(everybody) == 3:
        assert sorted(seen) == list(range(sent))
    forwarder.close(abandon=True)


def test_without_any_writer_the_caller_waits_however_long(context: Any) -> None:
    """The last one is never left out: nothing may be thrown away for a timeout."""
    clock = Clock()
    forwarder = forwarder_to(context, ["tcp://127.0.0.1:9", "tcp://127.0.0.1:19"], clock=clock)
    for kind in (START, IMAGE):
        one = message(kind, "x")
        for _ in range(3):
            assert not forwarder.send(one, 0)
            clock.now_ns += 3_600_000_000_000
    assert forwarder.trouble == ""
    forwarder.close(abandon=True)


def test_the_run_says_which_writer_it_went_on_without(context: Any, writers: list[Writer]) -> None:
    """One of two was never there: state, trouble and the list of what failed name it."""
    forwarder = forwarder_to(context, [writers[0], "tcp://127.0.0.1:9"], writer_timeout_s=0.05)
    pipeline = Pipeline(
        Given([message(START, "start"), *images(0, 5), message(END, "end")]),
        [OddIsBlank()],
        Outputs(forwarder=forwarder),
        PipelineOptions(deadline_ns=60_000_000_000),
        Metrics(),
    )
    pipeline.run()
    assert writers[0].wait_for(lambda names: len(names) == 7)[-1] == "end"
    assert pipeline.failure is None
    assert pipeline.health.troubles["writer_lost"] == "left out: tcp://127.0.0.1:9"
    assert any("tcp://127.0.0.1:9" in line for line in pipeline.sink_errors)
    forwarder.close(abandon=True)


def test_a_frame_half_taken_goes_whole_to_another_writer(
    context: Any, writers: list[Writer]
) -> None:
    """Its ports stay together: the writer that stalls in the middle gets no more of them."""
    clock = Clock()
    stalled, well = writers[:2]
    stalled.reading.clear()
    forwarder = forwarder_to(context, [stalled, well], clock=clock)
    until(lambda: forwarder.connected() == (2, 2))
    (frame,) = images(0, 1, ports=200)
    for _ in range(3):
        assert not forwarder.send(frame, 50)
    assert well.names == []
    clock.now_ns += 11_000_000_000
    send(forwarder, frame)
    assert well.wait_for(lambda names: len(names) == 200) == (
        ["i0", *(f"i0+{port}" for port in range(1, 200))]
    )
    stalled.reading.set()
    send(forwarder, message(END, "end"))
    catch_up(forwarder)
    names = stalled.wait_for(lambda names: "end" in names[-1:])
    assert names[:-1] == ["i0", *(f"i0+{port}" for port in range(1, len(names) - 1))]
    assert len(names) < 150
    forwarder.close()


def test_a_frame_of_several_messages_goes_past_a_writer_that_has_no_room(
    context: Any, writers: list[Writer]
) -> None:
    """At once, as any image does: of a frame that it has no part of it is not waited for."""
    full, well = writers[:2]
    full.reading.clear()
    clock = Clock()
    forwarder = forwarder_to(context, [full, well], clock=clock)
    until(lambda: forwarder.connected() == (2, 2))
    for filler in images(0, 1000):
        if not forwarder._writers[0].take(filler, 1000):
            break
    send(forwarder, *images(1000, 1002, ports=2))
    assert well.wait_for(lambda names: len(names) == 4) == [
        "i1000",
        "i1000+1",
        "i1001",
        "i1001+1",
    ]
    forwarder.close(abandon=True)


def test_a_writer_that_was_left_out_in_the_middle_of_a_frame_gets_no_part_twice(
    context: Any, writers: list[Writer]
) -> None:
    """It takes messages again while no other has room: the frame waits for one of the others."""
    clock = Clock()
    stalled, full = writers[:2]
    for writer in (stalled, full):
        writer.reading.clear()
    forwarder = forwarder_to(context, [stalled, full], clock=clock)
    until(lambda: forwarder.connected() == (2, 2))
    (frame,) = images(1000, 1001, ports=200)
    assert not forwarder.send(frame, 1000)
    for filler in images(0, 1000):
        if not forwarder._writers[1].take(filler, 1000):
            break
    clock.now_ns += 11_000_000_000
    assert not forwarder.send(frame, 0)
    assert stalled.endpoint in forwarder.trouble
    stalled.reading.set()
    stalled.wait_for(lambda names: len(names) > 4)
    for _ in range(20):
        assert not forwarder.send(frame, 10)
    full.reading.set()
    send(forwarder, frame, message(END, "end"))
    for writer in (stalled, full):
        writer.wait_for(lambda names: "end" in names[-1:])
    assert stalled.names.count("i1000") == 1
    assert [name for name in full.names if name.startswith("i1000")] == (
        ["i1000", *(f"i1000+{port}" for port in range(1, 200))]
    )
    forwarder.close()


IMAGE_PX = np.random.default_rng(4).poisson(1.0, (64, 72)).astype(np.uint16)
PIXELS = SimFrame(
    payload=compressed(IMAGE_PX, "bslz4"),
    encoding="bslz4",
    dtype=IMAGE_PX.dtype,
    shape=IMAGE_PX.shape,
)
INFO = StreamInfo(
    shape=IMAGE_PX.shape,
    dtype=IMAGE_PX.dtype,
    series_id=5,
    series_unique_id="01ABC",
    number_of_images=40,
)


class OddIsBlank:
    """Vetoes images of odd number."""

    policy = Policy(mode="enforce", p_blank_veto=0.5, audit_fraction=0.0)

    def decide(self, frames: Sequence[Frame]) -> list[Judgement]:
        return [
            Judgement(
                verdict=Verdict.VETO if frame.image_id % 2 else Verdict.KEEP,
                reason=Reason.SCORE,
                scores=Scores(p_blank=float(frame.image_id % 2)),
            )
            for frame in frames
        ]


class Journal:
    """Writes drops down, until told to fail."""

    def __init__(self) -> None:
        self.dropped_ids: list[int] = []
        self.most = 1000

    def dropped(self, decisions: Sequence[Decision]) -> int:
        fits = decisions[: max(0, self.most - len(self.dropped_ids))]
        self.dropped_ids += [decision.image_id for decision in fits]
        return len(fits)


class Given:
    """Hands out messages, all at once."""

    exhausted = False

    def __init__(self, messages: Sequence[Message]) -> None:
        self._messages = list(messages)

    def receive(self, timeout_ms: int) -> list[Message]:
        given, self._messages, self.exhausted = self._messages, [], True
        return given

    def close(self) -> None:
        pass


class UntilEnd:
    """A subscriber that ends with the series."""

    def __init__(self, source: Subscriber) -> None:
        self._source = source
        self.exhausted = False

    def receive(self, timeout_ms: int) -> list[Message]:
        messages = self._source.receive(timeout_ms)
        self.exhausted = any(message.kind is END for message in messages)
        return messages

    def close(self) -> None:
        self._source.close()


def through(context: Any, writer: Writer, protocol: str, **wanted: bool) -> tuple[Any, Journal]:
    """One series from a detector's socket to a writer's; what was sent, and the journal."""
    detector = context.socket(zmq.PUSH)
    port = detector.bind_to_random_port("tcp://127.0.0.1")
    source = UntilEnd(Subscriber(f"tcp://127.0.0.1:{port}", context=context))
    forwarder = Forwarder(writer.endpoint, context=context)
    journal = Journal()
    journal.most = 15
    pipeline = Pipeline(
        source,
        [OddIsBlank(), OddIsBlank()],
        Outputs(forwarder=forwarder, journal=journal, annotator=Annotator(**wanted)),
        PipelineOptions(deadline_ns=60_000_000_000),
        Metrics(),
        model_id="m-1",
    )
    runner = threading.Thread(target=pipeline.run)
    runner.start()
    sent = [list(one.parts) for one in series_messages(INFO, [PIXELS], protocol=protocol)]
    for parts in sent:
        detector.send_multipart(parts)
    runner.join(PATIENCE_S)
    assert pipeline.failure is None
    totals = pipeline.ledger.totals()
    assert totals.balanced
    assert (totals.received, totals.dropped) == (40, 15)
    assert journal.dropped_ids == list(range(1, 31, 2))
    # Every image goes on in some form.
    placeholders = wanted["placeholders"]
    writer.wait_for(lambda names: len(names) == (42 if placeholders else 27))
    forwarder.close()
    source.close()
    detector.close()
    return sent, journal


def test_placeholders_keep_every_id_in_its_place(context: Any, writers: list[Writer]) -> None:
    """Odd images are eight bytes; those not written down go on whole; kept ones untouched."""
    writer = writers[0]
    sent, journal = through(context, writer, "stream2", verdicts=False, placeholders=True)
    for n, (parts, before) in enumerate(zip(writer.heard, sent, strict=True)):
        if n - 1 not in journal.dropped_ids:
            assert parts == before
            continue
        fields, original = strictly(parts[0]), strictly(before[0])
        for name in ("series_id", "series_unique_id", "image_id", "start_time", "real_time"):
            assert fields[name] == original[name]
        assert [array(data).tobytes() for data in fields["data"].values()] == [b"SKIPPED\0"]
        assert fields["user_data"]["triage"]["verdict"] == "veto"
        assert fields["user_data"]["triage"]["model_id"] == "m-1"


def test_kept_images_tell_their_verdict_and_the_end_tells_the_totals(
    context: Any, writers: list[Writer]
) -> None:
    """A strict reader finds pixels bit for bit, verdicts, and a sum that it can check."""
    writer = writers[0]
    sent, journal = through(context, writer, "stream2", verdicts=True, placeholders=False)
    by_id = {strictly(parts[0])["image_id"]: parts[0] for parts in sent[1:-1]}
    assert writer.heard[0] == sent[0]
    seen = []
    for (part,) in writer.heard[1:-1]:
        fields = strictly(part)
        seen.append(fields["image_id"])
        veto = fields["image_id"] % 2 == 1
        told = fields["user_data"]["triage"]
        assert (told["verdict"], told["p_blank"]) == ("veto" if veto else "keep", float(veto))
        assert told["override"] == ("gate_open" if veto else "")
        (data,) = fields["data"].values()
        assert np.array_equal(array(data), IMAGE_PX)
        assert PIXELS.payload in part
        assert part.endswith(by_id[fields["image_id"]][-len(PIXELS.payload) :])
    assert seen == [n for n in range(40) if n not in journal.dropped_ids]
    totals = strictly(writer.heard[-1][0])["user_data"]["triage"]
    assert (totals["received"], totals["forwarded"], totals["dropped"]) == (40, 25, 15)
    assert (totals["missing"], totals["dropped_as"]) == (0, "nothing")


def test_stream1_tells_in_an_appendix_and_skips_in_place(
    context: Any, writers: list[Writer]
) -> None:
    """Kept: the four parts as sent and a fifth; dropped: ids as sent and eight bytes."""
    writer = writers[0]
    sent, journal = through(context, writer, "stream1", verdicts=True, placeholders=True)
    for n, (parts, before) in enumerate(zip(writer.heard, sent, strict=True)):
        if n in (0, 41):
            assert parts == before
        elif n - 1 in journal.dropped_ids:
            assert (parts[2], parts[3]) == (b"SKIPPED\0", before[3])
            ids, sent_ids = json.loads(parts[0]), json.loads(before[0])
            assert (ids["series"], ids["frame"]) == (sent_ids["series"], sent_ids["frame"])
        else:
            assert parts[:4] == before
            assert b'"verdict"' in parts[4]

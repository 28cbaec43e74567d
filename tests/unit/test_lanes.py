"""One series over several sockets: fair reading, and ends that overtake nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import zmq

from simulators.detectors import jungfraujoch, stream2
from simulators.detectors.faults import Sent, with_faults
from simulators.detectors.frames import SimFrame, StreamInfo
from triage.config import addresses
from triage.errors import ConfigError
from triage.ingest.subscriber import Subscriber
from triage.ledger import Ledger
from triage.records import Message, MessageKind

SHAPE = (8, 8)
FRAME = SimFrame(payload=bytes(8 * 8 * 4), encoding="raw", dtype=np.dtype("<i4"), shape=SHAPE)
SECOND_NS = 1_000_000_000
DEADLINE_S = 20.0


def info(series_id: int = 1, images: int = 6) -> StreamInfo:
    return StreamInfo(
        shape=SHAPE, dtype=np.dtype("<i4"), series_id=series_id, number_of_images=images
    )


def series(lanes: int, series_id: int = 1, images: int = 6) -> list[Sent]:
    """Two images to a file."""
    return list(
        jungfraujoch.series(info(series_id, images), [FRAME], lanes=lanes, images_per_file=2)
    )


class Rig:
    """PUSH sockets and a source that reads them, with a clock that stands still."""

    def __init__(self, lanes: int) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.sockets = [self.context.socket(zmq.PUSH) for _ in range(lanes)]
        for socket in self.sockets:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDTIMEO, 20_000)
            socket.bind("tcp://127.0.0.1:*")
        endpoint = ",".join(s.getsockopt_string(zmq.LAST_ENDPOINT) for s in self.sockets)
        self.now_ns = SECOND_NS
        self.source = Subscriber(endpoint, clock=lambda: self.now_ns)

    def send(self, sent: Sequence[Sent]) -> None:
        for one in sent:
            self.sockets[one.lane].send_multipart(one.parts)

    def read(self, until: Callable[[list[Message]], bool]) -> list[Message]:
        """Messages until they are enough, the clock standing still."""
        messages: list[Message] = []
        limit_s = time.monotonic() + DEADLINE_S
        while not until(messages) and time.monotonic() < limit_s:
            messages += self.source.receive(20)
        return messages

    def read_count(self, count: int) -> list[Message]:
        return self.read(lambda messages: len(messages) >= count)

    def wait(self, seconds: float) -> list[Message]:
        """Messages while the clock goes on, a fifth of a second at a time."""
        messages: list[Message] = []
        for _ in range(round(5 * seconds)):
            self.now_ns += SECOND_NS // 5
            messages += self.source.receive(1)
        return messages

    def close(self) -> None:
        self.source.close()
        self.context.destroy(linger=0)


@pytest.fixture
def two() -> Iterator[Rig]:
    rig = Rig(2)
    yield rig
    rig.close()


def kinds(messages: Sequence[Message]) -> list[str]:
    return [message.kind.value for message in messages]


def ids(messages: Sequence[Message]) -> list[int]:
    return [m.frame.image_id for m in messages if m.frame is not None]


def test_no_end_overtakes_an_image_of_another_lane(two: Rig) -> None:
    """The lane that has ended waits for the one that is still at it; then both ends come."""
    first, second = ([s for s in series(2) if s.lane == lane] for lane in (0, 1))
    two.send(first)
    early = two.read_count(len(first) - 1)
    assert "end" not in kinds(early)
    assert two.source.receive(20) == []
    two.send(second)
    rest = two.read_count(len(second) + 1)
    assert kinds(rest)[-2:] == ["end", "end"]
    assert [m.lane for m in rest[-2:]] == [0, 1]
    assert sorted(ids([*early, *rest])) == [0, 1, 2, 3, 4, 5]


def test_a_lane_that_never_ends_is_given_up_after_two_seconds(two: Rig) -> None:
    """Fail open: the end goes on, and the next series does not wait for that lane again."""
    two.send([s for s in series(2) if s.lane == 0])
    assert "end" not in kinds(two.read(lambda messages: len(ids(messages)) == 4))
    assert "end" not in kinds(two.wait(1.8))
    assert kinds(two.wait(0.4)) == ["end"]
    two.send([s for s in series(2, series_id=2) if s.lane == 0])
    assert kinds(two.read(lambda messages: "end" in kinds(messages)))[-1] == "end"


def test_a_lane_that_is_slow_is_waited_for(two: Rig) -> None:
    """Two seconds count from the last that was heard of it."""
    first, second = ([s for s in series(2) if s.lane == lane] for lane in (0, 1))
    two.send(first)
    two.read(lambda messages: len(ids(messages)) == 4)
    for one in second[:-1]:
        assert "end" not in kinds(two.wait(1.6))
        two.send([one])
        assert kinds(two.read_count(1)) == [one.kind]
    two.send(second[-1:])
    assert kinds(two.read_count(2)) == ["end", "end"]


def test_time_in_which_nobody_reads_does_not_count(two: Rig) -> None:
    """A reader that was held back itself for ten seconds gives no lane up."""
    two.send([s for s in series(2) if s.lane == 0])
    two.read(lambda messages: len(ids(messages)) == 4)
    two.source.receive(1)
    two.now_ns += 10 * SECOND_NS
    assert two.source.receive(1) == []
    assert kinds(two.wait(2.2)) == ["end"]


def test_a_lane_that_went_on_to_another_series_is_not_waited_for(two: Rig) -> None:
    """Its end was lost; a new start says that the old series is over there."""
    two.send([s for s in series(2) if s.lane == 0])
    two.read(lambda messages: len(ids(messages)) == 4)
    two.send([s for s in series(2, series_id=2) if s.lane == 1 and s.kind == "start"])
    messages = two.read_count(2)
    assert kinds(messages) == ["start", "end"]
    assert messages[1].series is not None
    assert messages[1].series.series_id == 1


def test_a_lane_keeps_its_order(two: Rig) -> None:
    """The start of a next series waits behind an end that waits."""
    two.send([s for s in series(2) if s.lane == 0])
    two.send([s for s in series(2, series_id=2) if s.lane == 0])
    early = two.read(lambda messages: len(ids(messages)) == 4)
    assert [m.series.series_id for m in early if m.kind == "start" and m.series] == [1]
    two.send([s for s in series(2) if s.lane == 1])
    rest = two.read(lambda messages: len(ids(messages)) == 6)
    on_first = [m.kind.value for m in rest if m.lane == 0]
    assert on_first == ["end", "start", "control", *["image"] * 4]


def test_a_further_end_goes_on_at_once(two: Rig) -> None:
    """Some detectors end twice; nothing is left to wait for."""
    sent = series(2)
    two.send(sent)
    two.read(lambda messages: kinds(messages).count("end") == 2)
    two.send(sent[-2:-1])
    assert kinds(two.read_count(1)) == ["end"]


def test_what_waits_is_given_out_at_the_end_of_the_run(two: Rig) -> None:
    """A stop in mid-series loses no end."""
    two.send([s for s in series(2) if s.lane == 0])
    two.read(lambda messages: len(ids(messages)) == 4)
    two.source.receive(20)
    assert kinds(two.source.flush()) == ["end"]
    assert two.source.flush() == []


def test_lanes_are_read_in_turn(two: Rig) -> None:
    """A lane with much to say does not keep another waiting."""
    many = [s for s in series(2, images=400) if s.kind == "image"]
    for lane in (0, 1):
        two.send([s for s in many if s.lane == lane])
    seen: list[Message] = []
    while len(ids(seen)) < 200:
        seen += two.source.receive(1000)
    per_lane = [sum(m.lane == lane for m in seen) for lane in (0, 1)]
    assert min(per_lane) >= 60


def test_counts_are_right_over_lanes() -> None:
    """Starts on three lanes are one series; a gap is missing, a repetition a duplicate."""
    rig = Rig(3)
    sent = list(with_faults(series(3, images=12), {3: "gap", 8: "duplicate"}))
    rig.send(sent)
    messages = rig.read(lambda found: kinds(found).count("end") == 3)
    rig.close()
    ledger = Ledger()
    ledger.received(messages)
    report = ledger.report((1, "1:run1"))
    assert (report.received, report.missing, report.duplicates) == (12, 1, 1)
    assert len(ledger.reports()) == 1
    assert {m.frame.fault for m in messages if m.frame is not None} == {None}
    started = {id(m.series) for m in messages if m.kind is MessageKind.START}
    assert len(started) == 1


def test_a_second_start_on_a_lane_begins_anew(two: Rig) -> None:
    """A detector that was armed twice under one identity sends image 0 twice, no duplicate."""
    start = series(1)[0]
    image = jungfraujoch.image(info(), FRAME, 0)
    two.send([start, image, start, image])
    messages = two.read_count(4)
    assert [m.frame.duplicate for m in messages if m.frame is not None] == [False, False]


def test_stream2_over_lanes_is_read_too() -> None:
    """Fan-out of a DECTRIS stream: start and end to all, images to one each."""
    rig = Rig(2)
    plain = StreamInfo(shape=SHAPE, dtype=np.dtype("<i4"), number_of_images=4)
    for lane in (0, 1):
        rig.send([Sent(kind="start", parts=(stream2.start_message(plain),), lane=lane)])
        for image_id in (lane, lane + 2):
            image = stream2.image_message(plain, FRAME, image_id)
            rig.send([Sent(kind="image", parts=(image,), lane=lane)])
        rig.send([Sent(kind="end", parts=(stream2.end_message(plain),), lane=lane)])
    messages = rig.read_count(8)
    rig.close()
    assert kinds(messages)[-2:] == ["end", "end"]
    assert sorted(ids(messages)) == [0, 1, 2, 3]


@pytest.mark.parametrize("endpoint", ["", "tcp://a:1,", "tcp://a:1,tcp://a:1", ",tcp://a:1"])
def test_addresses_are_each_named_once(endpoint: str) -> None:
    """An empty address or one that comes twice is a mistake in the settings."""
    with pytest.raises(ConfigError, match="separated by commas"):
        addresses(endpoint)


def test_an_end_waits_for_a_socket_that_is_a_series_behind(two: Rig) -> None:
    """The second socket has sent two series before the first has begun the first one: no end of
    a series comes before an image of it, and each series has both its ends."""
    both = [*series(2, 1), *series(2, 2)]
    two.send([m for m in both if m.lane == 1])
    early = two.read_count(3)
    assert "end" not in kinds(early)
    two.send([m for m in both if m.lane == 0])
    read = [*early, *two.read(lambda messages: kinds(messages).count("end") == 4)]
    over: list[int] = []
    for message in read:
        if message.kind is MessageKind.END and message.series is not None:
            over.append(message.series.series_id)
        elif message.frame is not None:
            assert message.frame.series.series_id not in over
    assert sorted(over) == [1, 1, 2, 2]

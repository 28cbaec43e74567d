"""Messages that a sender joined into one: each is read as itself."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import zmq

from simulators.detectors import stream1, stream2
from simulators.detectors.frames import SimFrame, StreamInfo, compressed
from triage.ingest.dectris import DectrisStream
from triage.ingest.series import SeriesBook
from triage.ingest.stream1 import separated
from triage.ingest.stream2 import Stream2Parser
from triage.ingest.subscriber import Subscriber
from triage.records import Message

IMAGE = np.random.default_rng(3).poisson(1.0, (70, 90)).astype(np.uint16)
FRAME = SimFrame(
    payload=compressed(IMAGE, "bslz4"), encoding="bslz4", dtype=IMAGE.dtype, shape=IMAGE.shape
)
INFO = StreamInfo(shape=IMAGE.shape, number_of_images=3, series_id=12)

HEADER = stream1.header_parts(INFO)
WHOLE_HEADER = stream1.header_parts(INFO, header_detail="all")
IMAGES = [stream1.image_parts(INFO, FRAME, n) for n in range(3)]
APPENDED = stream1.image_parts(INFO, FRAME, 0, {"n_visible": 12.0})
END = stream1.end_parts(INFO)


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param([HEADER, IMAGES[0]], id="header and image, as tickit sends them"),
        pytest.param([WHOLE_HEADER, IMAGES[0]], id="header with mask and image"),
        pytest.param([IMAGES[0], IMAGES[1]], id="two images"),
        pytest.param([IMAGES[0], END], id="image and end"),
        pytest.param([HEADER, *IMAGES, END], id="a whole series"),
        pytest.param([WHOLE_HEADER], id="one header"),
        pytest.param([APPENDED], id="one image with an appendix"),
        pytest.param([APPENDED, END], id="an image with an appendix, and end"),
    ],
)
def test_joined_messages_come_apart_where_they_were_joined(
    messages: Sequence[Sequence[bytes]],
) -> None:
    """Whatever was joined, each message has its own parts again; one alone stays whole."""
    joined = [part for message in messages for part in message]
    assert [list(m) for m in separated(joined)] == [list(m) for m in messages]


@pytest.fixture
def wire() -> Iterator[tuple[zmq.Socket[bytes], Subscriber]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sender = context.socket(zmq.PUSH)
    port = sender.bind_to_random_port("tcp://127.0.0.1")
    source = Subscriber(f"tcp://127.0.0.1:{port}")
    yield sender, source
    source.close()
    sender.close(0)
    context.term()


START2 = [stream2.start_message(INFO)]
IMAGES2 = [[stream2.image_message(INFO, FRAME, n)] for n in range(2)]


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param([HEADER, *IMAGES[:2]], id="stream1"),
        pytest.param([START2, *IMAGES2], id="stream2"),
    ],
)
def test_no_image_hides_behind_a_header(
    wire: tuple[zmq.Socket[bytes], Subscriber], sent: Sequence[Sequence[bytes]]
) -> None:
    """A header and its first image in one ZeroMQ message: both are received, with their bytes."""
    sender, source = wire
    sender.send_multipart([*sent[0], *sent[1]])
    sender.send_multipart(sent[2])
    messages: list[Message] = []
    until = time.monotonic() + 20
    while len(messages) < 3 and time.monotonic() < until:
        messages += source.receive(100)
    assert [m.kind.value for m in messages] == ["start", "image", "image"]
    assert [m.frame.image_id for m in messages if m.frame is not None] == [0, 1]
    assert all(m.frame.fault is None for m in messages if m.frame is not None)
    assert [[bytes(p.buffer) for p in m.parts] for m in messages] == [list(s) for s in sent]


def test_a_part_that_is_no_message_stays_with_its_own(
    wire: tuple[zmq.Socket[bytes], Subscriber],
) -> None:
    """A Stream V2 image with something after it is one image, forwarded with what came."""
    sender, source = wire
    sender.send_multipart([*START2])
    sender.send_multipart([*IMAGES2[0], b"{}"])
    messages: list[Message] = []
    until = time.monotonic() + 20
    while len(messages) < 2 and time.monotonic() < until:
        messages += source.receive(100)
    assert [m.kind.value for m in messages] == ["start", "image"]
    assert [bytes(p.buffer) for p in messages[1].parts] == [*IMAGES2[0], b"{}"]


def test_a_parser_that_fails_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error that no parser foresaw: the message goes on as it came, the next one is read."""
    stream = DectrisStream(1, SeriesBook())

    def fails(self: Stream2Parser, parts: Sequence[bytes], received_ns: int) -> Message:
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as broken:
        broken.setattr(Stream2Parser, "parse", fails)
        (message,) = stream.take(IMAGES2[0], 7)
    assert message.kind == "malformed"
    assert (message.parts, message.received_ns) == (tuple(IMAGES2[0]), 7)
    assert message.size_bytes == len(IMAGES2[0][0])
    assert "a bug" in message.detail
    assert "could not be read" in caplog.text
    assert [m.kind.value for m in stream.take(IMAGES2[1], 8)] == ["image"]

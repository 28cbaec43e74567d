"""What every live source promises, whichever protocol it speaks.

A protocol joins with one :class:`Wire`: what a detector of its own kind sends, socket by socket.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from simulators.detectors import karabo
from simulators.detectors.detector import series_messages
from simulators.detectors.frames import SimFrame, StreamInfo, compressed
from simulators.detectors.slsdetector import Layout, acquisition
from triage.config import Settings, load_settings
from triage.errors import ConfigError
from triage.ingest import HoldingSource, LiveSource, Reader, open_reader, open_source
from triage.metrics import Metrics
from triage.records import Message, MessageKind

FRAMES = 6
SHAPE = (64, 96)
RNG = np.random.default_rng(5)
IMAGES = [RNG.poisson(2.0, SHAPE).astype(np.uint16) for _ in range(3)]
DEADLINE_S = 20.0

Sent = tuple[int, tuple[bytes, ...]]


@dataclass(frozen=True, kw_only=True)
class Wire:
    """One protocol.

    Attributes:
        sends: the detector's kind of socket: ``push``, ``pub`` or ``rep``.
        series: (lane, ZeroMQ parts) of one series of FRAMES images, in the order sent.
        splits: an image comes in parts over the lanes.
        told: an image that is cut short can still be told for one.
    """

    protocol: str
    sends: str
    series: Callable[[], list[Sent]]
    lanes: int = 1
    splits: bool = False
    told: bool = True


def played(protocol: str, dtype: str = "<u2", lanes: int = 1) -> list[Sent]:
    frames = [
        SimFrame(
            payload=compressed(image.astype(dtype), "bslz4"),
            encoding="bslz4",
            dtype=np.dtype(dtype),
            shape=SHAPE,
        )
        for image in IMAGES
    ]
    info = StreamInfo(shape=SHAPE, dtype=np.dtype(dtype), number_of_images=FRAMES)
    sent = series_messages(info, frames, protocol=protocol, lanes=lanes, images_per_file=2)
    return [(one.lane, one.parts) for one in sent]


def trains(version: str) -> list[Sent]:
    pixels = np.stack(IMAGES).astype(np.float32)
    made = [
        karabo.Train(train_id=karabo.FIRST_TRAIN + i, pixels=pixels)
        for i in range(FRAMES // len(IMAGES))
    ]
    return [(0, tuple(karabo.train_parts(train, version=version))) for train in made]


def modules() -> list[Sent]:
    layout = Layout(detector="eiger", ports=(2, 1), bits=16)
    image = RNG.poisson(2.0, (512, 512)).astype(np.uint16)
    return [(port, parts) for _, port, parts in acquisition([image], layout, frames=FRAMES)]


WIRES = {
    "stream2": Wire(protocol="stream2", sends="push", series=lambda: played("stream2")),
    "stream1": Wire(protocol="stream1", sends="push", series=lambda: played("stream1")),
    "auto": Wire(protocol="auto", sends="pub", series=lambda: played("stream1")),
    "jungfraujoch": Wire(
        protocol="jungfraujoch",
        sends="push",
        lanes=3,
        series=lambda: played("jungfraujoch", "<i4", lanes=3),
    ),
    "karabo": Wire(protocol="karabo", sends="rep", series=lambda: trains("2.2")),
    "karabo 1.0": Wire(protocol="karabo", sends="rep", series=lambda: trains("1.0"), told=False),
    "slsdetector": Wire(protocol="slsdetector", sends="pub", lanes=2, series=modules, splits=True),
}
every_wire = pytest.mark.parametrize("wire", WIRES.values(), ids=list(WIRES))


def settings_for(wire: Wire, endpoint: str = "tcp://127.0.0.1:1") -> Settings:
    overrides: dict[str, Any] = {
        "source.protocol": wire.protocol,
        "source.endpoint": endpoint,
        "source.socket": "sub" if wire.sends == "pub" else "pull",
        "pipeline.queue_bytes": 1 << 30,
        "source.message_bytes": 1 << 20,
    }
    return load_settings(overrides=overrides)


def reader_of(wire: Wire) -> Reader:
    return open_reader(settings_for(wire), wire.protocol, wire.lanes)


def read(reader: Reader, sent: Sequence[Sent]) -> list[Message]:
    """What is made of messages that come without sockets."""
    messages = [m for lane, parts in sent for m in reader.take(parts, 1, lane)]
    return [*messages, *reader.flush()]


def holders(message: Message) -> tuple[tuple[Any, ...], ...]:
    """The ZeroMQ messages that a message goes on as."""
    return (message.parts, *message.followed_by)


def bytes_of(messages: Sequence[Message]) -> list[bytes]:
    """Every part that goes on, in order."""
    return [bytes(part) for message in messages for parts in holders(message) for part in parts]


def sent_bytes(sent: Sequence[Sent]) -> list[bytes]:
    return [part for _, parts in sent for part in parts]


def images_of(messages: Sequence[Message]) -> list[Message]:
    return [message for message in messages if message.kind is MessageKind.IMAGE]


@contextmanager
def detector(wire: Wire, sent: Sequence[Sent]) -> Iterator[tuple[str, threading.Event]]:
    """Sockets of a detector; what is to be sent goes out once the event is set."""
    context: zmq.Context[Any] = zmq.Context()
    kind = {"push": zmq.PUSH, "pub": zmq.XPUB, "rep": zmq.REP}[wire.sends]
    sockets = [context.socket(kind) for _ in range(wire.lanes)]
    for socket in sockets:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDTIMEO, int(DEADLINE_S * 1000))
        socket.setsockopt(zmq.RCVTIMEO, int(DEADLINE_S * 1000))
        socket.bind("tcp://127.0.0.1:*")
    endpoint = ",".join(socket.getsockopt_string(zmq.LAST_ENDPOINT) for socket in sockets)
    begin = threading.Event()

    def play() -> None:
        begin.wait(DEADLINE_S)
        if wire.sends == "pub":
            for socket in sockets:
                socket.recv()
        for lane, parts in sent:
            if wire.sends == "rep":
                sockets[lane].recv()
            sockets[lane].send_multipart(parts)

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    try:
        yield endpoint, begin
        begin.set()
        thread.join(DEADLINE_S)
    finally:
        context.destroy(linger=0)


def received(source: LiveSource, parts: int) -> list[Message]:
    """Messages until so many parts came, and what the source then still keeps back."""
    messages: list[Message] = []
    until = time.monotonic() + DEADLINE_S
    while len(bytes_of(messages)) < parts and time.monotonic() < until:
        messages += source.receive(50)
    if isinstance(source, HoldingSource):
        messages += source.flush()
    return messages


def same_bytes(wire: Wire, messages: Sequence[Message], sent: Sequence[Sent]) -> bool:
    """One socket: the parts in order. Several: the parts of each, whichever came first."""
    if wire.lanes == 1:
        return bytes_of(messages) == sent_bytes(sent)
    return Counter(bytes_of(messages)) == Counter(sent_bytes(sent))


@every_wire
def test_a_series_comes_through_sockets(wire: Wire) -> None:
    """Every image once, in order and sound, its times after its sending, its bytes untouched."""
    sent = wire.series()
    with detector(wire, sent) as (endpoint, begin):
        source = open_source(settings_for(wire, endpoint), Metrics())
        assert source.endpoint == endpoint
        assert not source.exhausted
        began_ns = time.monotonic_ns()
        begin.set()
        messages = received(source, len(sent_bytes(sent)))
        source.close()
    images = images_of(messages)
    frames = [m.frame for m in images if m.frame is not None]
    assert len(frames) == len(images) == FRAMES
    assert sorted(f.image_id for f in frames) == list(range(FRAMES))
    for lane in range(wire.lanes):
        ids = [m.frame.image_id for m in images if m.frame is not None and m.lane == lane]
        assert ids == sorted(ids)
    assert {f.fault for f in frames} == {None}
    assert not any(f.duplicate for f in frames)
    assert all(began_ns <= m.received_ns <= time.monotonic_ns() for m in images)
    assert same_bytes(wire, messages, sent)
    assert {f.series.key for f in frames} == {frames[0].series.key}


@every_wire
def test_the_end_comes_after_the_images(wire: Wire) -> None:
    """On every way, a series starts before its first image and ends after its last."""
    sent = wire.series()
    with detector(wire, sent) as (endpoint, begin):
        source = open_source(settings_for(wire, endpoint), Metrics())
        begin.set()
        messages = received(source, len(sent_bytes(sent)))
        source.close()
    kinds = [message.kind for message in messages]
    last_image = max(i for i, kind in enumerate(kinds) if kind is MessageKind.IMAGE)
    assert MessageKind.END in kinds[last_image:]
    assert MessageKind.END not in kinds[:last_image]
    assert MessageKind.START in kinds[: kinds.index(MessageKind.IMAGE)]


@every_wire
def test_nothing_comes_of_nothing(wire: Wire) -> None:
    """Without messages a source gives none, again and again, and is closed twice."""
    with detector(wire, []) as (endpoint, _):
        source = open_source(settings_for(wire, endpoint), Metrics())
        assert [list(source.receive(timeout_ms)) for timeout_ms in (0, 10, 10, 0)] == [[]] * 4
        if isinstance(source, HoldingSource):
            assert list(source.flush()) == []
        source.close()
        source.close()


@every_wire
def test_an_address_that_is_none_is_refused(wire: Wire) -> None:
    """A ConfigError that shows the setting."""
    for endpoint in ("nonsense", "tcp://127.0.0.1:port"):
        with pytest.raises(ConfigError, match="endpoint"):
            open_source(settings_for(wire, endpoint), Metrics())


@every_wire
def test_a_cut_image_is_an_image(wire: Wire) -> None:
    """Its largest part ends half way: it is counted, it goes on, and the others are unharmed."""
    sent = wire.series()
    carried = [parts for m in images_of(read(reader_of(wire), sent)) for parts in holders(m)]
    carriers = {id(part) for parts in carried for part in parts}
    for at, (lane, parts) in enumerate(sent):
        if not any(id(part) in carriers for part in parts):
            continue
        cut = max(range(len(parts)), key=lambda i: len(parts[i]))
        halved = [part[: len(part) // 2] if i == cut else part for i, part in enumerate(parts)]
        damaged = [*sent[:at], (lane, tuple(halved)), *sent[at + 1 :]]
        messages = read(reader_of(wire), damaged)
        without = len(images_of(read(reader_of(wire), [*sent[:at], *sent[at + 1 :]])))
        # Parts of one image count as one; of a train that is cut nothing but that is known.
        assert len(images_of(messages)) == (FRAMES if wire.splits else without + wire.told)
        assert Counter(bytes_of(messages)) == Counter(sent_bytes(damaged))


HOSTILE = [
    (b"",),
    (b"\x00",),
    (b"{", b"}"),
    (b"{}",),
    (b"[]", b"", b""),
    (b'{"htype": "dimage-1.0"}',),
    (b'{"htype": "dimage-1.0", "series": "x", "frame": []}', b"{}", b"1", b"2", b"3"),
    (b"\xd9\xd9\xf7\xa1dtypeeimage",),
    (b"\xa1dtypeestart",),
    (b"\x9f" * 5000,),
    (b"\x91" * 5000, b"\x91" * 5000),
    (b"\xdf\xff\xff\xff\xff", b""),
    (b"\x82\xa6source\xa1a\xa7content\xa5array", b"abc"),
    (b'{"jsonversion": 5, "data": 1, "shape": [9, 9]}\n', b"abc"),
    (b'{"jsonversion": 5, "data": 1, "frameNumber": 1e400}\n', b"", b""),
    (bytes(range(256)) * 64,),
    tuple([b"x"] * 300),
]


@every_wire
def test_hostile_messages_go_on(wire: Wire) -> None:
    """Bytes of no protocol, and of others, raise nothing and go on as they came."""
    others = [(0, parts) for other in WIRES.values() for _, parts in other.series()[:3]]
    hostile = [(0, parts) for parts in HOSTILE]
    sent = [*hostile, *others]
    messages = read(reader_of(wire), sent)
    assert Counter(bytes_of(messages)) == Counter(sent_bytes(sent))
    assert all(
        (message.kind is MessageKind.IMAGE) == (message.frame is not None) for message in messages
    )


@every_wire
def test_a_series_is_unharmed_by_what_came_before(wire: Wire) -> None:
    """After hostile messages the next series is read as if nothing had been."""
    reader = reader_of(wire)
    for parts in HOSTILE:
        reader.take(parts, 1, 0)
    reader.flush()
    messages = read(reader, wire.series())
    frames = [m.frame for m in images_of(messages) if m.frame is not None]
    assert sorted(f.image_id for f in frames) == list(range(FRAMES))
    assert {f.fault for f in frames} == {None}


@every_wire
@given(data=st.data())
def test_mutated_messages_go_on(wire: Wire, data: st.DataObject) -> None:
    """Any bytes changed in any part, or the part cut: nothing is raised, nothing is lost."""
    sent = [list(parts) for _, parts in SERIES[wire.protocol, wire.lanes]]
    lanes = [lane for lane, _ in SERIES[wire.protocol, wire.lanes]]
    for _ in range(data.draw(st.integers(1, 3))):
        parts = data.draw(st.sampled_from(sent))
        which = data.draw(st.integers(0, len(parts) - 1))
        part = bytearray(parts[which])
        # What says what a part is stands near its beginning.
        at = data.draw(st.integers(0, min(len(part), 400)))
        part[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=6))
        parts[which] = bytes(part)
    changed = [(lane, tuple(parts)) for lane, parts in zip(lanes, sent, strict=True)]
    messages = read(reader_of(wire), changed)
    assert Counter(bytes_of(messages)) == Counter(sent_bytes(changed))


SERIES = {(wire.protocol, wire.lanes): wire.series() for wire in WIRES.values()}

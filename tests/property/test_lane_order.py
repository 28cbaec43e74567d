"""Several sockets: whatever the network does to them, ends come last and nothing is lost."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from simulators.detectors import jungfraujoch
from simulators.detectors.faults import Sent
from simulators.detectors.frames import SimFrame, StreamInfo
from triage.ingest.subscriber import Subscriber
from triage.records import Message

SHAPE = (4, 4)
FRAME = SimFrame(payload=bytes(64), encoding="raw", dtype=np.dtype("<i4"), shape=SHAPE)
DEADLINE_S = 20.0


def run_of(lanes: int, images: list[int], per_file: int) -> list[list[Sent]]:
    """What each lane sends, of series one after the other."""
    sent: list[list[Sent]] = [[] for _ in range(lanes)]
    for number, count in enumerate(images):
        info = StreamInfo(
            shape=SHAPE, dtype=np.dtype("<i4"), series_id=number + 1, number_of_images=count
        )
        for one in jungfraujoch.series(info, [FRAME], lanes=lanes, images_per_file=per_file):
            sent[one.lane].append(one)
    return sent


@settings(max_examples=40, deadline=None)
@given(
    lanes=st.integers(2, 4),
    images=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    per_file=st.integers(1, 4),
    data=st.data(),
)
def test_ends_come_after_every_image(
    lanes: int, images: list[int], per_file: int, data: st.DataObject
) -> None:
    """Lanes run ahead of each other by any number of messages, sent one by one or joined; each
    keeps its own order."""
    queues = run_of(lanes, images, per_file)
    expected = [[bytes(one.parts[0]) for one in queue] for queue in queues]
    context: zmq.Context[Any] = zmq.Context()
    sockets = [context.socket(zmq.PUSH) for _ in range(lanes)]
    for socket in sockets:
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind("tcp://127.0.0.1:*")
    source = Subscriber(
        ",".join(s.getsockopt_string(zmq.LAST_ENDPOINT) for s in sockets), clock=lambda: 1
    )
    received: list[Message] = []
    try:
        while any(queues):
            lane = data.draw(st.sampled_from([i for i in range(lanes) if queues[i]]))
            count = min(data.draw(st.integers(1, 12)), len(queues[lane]))
            some = [queues[lane].pop(0).parts for _ in range(count)]
            if data.draw(st.booleans()):
                # As a sender does that joins what it has queued.
                some = [tuple(part for parts in some for part in parts)]
            for parts in some:
                sockets[lane].send_multipart(parts)
            received += source.receive(data.draw(st.sampled_from([0, 1, 2])))
        until = time.monotonic() + DEADLINE_S
        while len(received) < sum(map(len, expected)) and time.monotonic() < until:
            received += source.receive(10)
    finally:
        source.close()
        context.destroy(linger=0)

    for lane in range(lanes):
        assert [bytes(m.parts[0]) for m in received if m.lane == lane] == expected[lane]
    ended: set[int] = set()
    for message in received:
        series = message.series if message.frame is None else message.frame.series
        if series is None:
            continue
        if message.kind == "end":
            ended.add(series.series_id)
        elif message.kind == "image":
            assert series.series_id not in ended
            assert message.frame is not None
            assert message.frame.fault is None
            assert not message.frame.duplicate

"""Payloads on their way from the detector's socket to the writer's: seen, and never copied."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import zmq

from simulators.detectors import stream1, stream2
from simulators.detectors.frames import SimFrame, StreamInfo
from triage.ingest.subscriber import Subscriber
from triage.metrics import Metrics
from triage.pipeline import Judgement, Outputs, Pipeline, PipelineOptions
from triage.policy import Policy
from triage.records import Frame, Message, Reason, Verdict
from triage.sinks.forwarder import Forwarder

SIDE_PX = 1024
PAYLOAD = np.random.default_rng(5).bytes(2 * SIDE_PX * SIDE_PX)
IMAGES = 12
INFO = StreamInfo(shape=(SIDE_PX, SIDE_PX), number_of_images=IMAGES, series_id=3)
FRAME = SimFrame(payload=PAYLOAD, encoding="raw", dtype=np.dtype("<u2"), shape=(SIDE_PX, SIDE_PX))


def sent(protocol: str) -> list[list[bytes]]:
    if protocol == "stream2":
        images = [[stream2.image_message(INFO, FRAME, i)] for i in range(IMAGES)]
        return [[stream2.start_message(INFO)], *images, [stream2.end_message(INFO)]]
    return [
        [bytes(part) for part in parts]
        for parts in (
            stream1.header_parts(INFO),
            *(stream1.image_parts(INFO, FRAME, i, None) for i in range(IMAGES)),
            stream1.end_parts(INFO),
        )
    ]


class UntilEnd:
    """A subscriber that ends with the series, and keeps what it gave."""

    def __init__(self, source: Subscriber) -> None:
        self._source = source
        self.messages: list[Message] = []

    def receive(self, timeout_ms: int) -> list[Message]:
        messages = self._source.receive(timeout_ms)
        self.messages += messages
        return messages

    @property
    def exhausted(self) -> bool:
        return any(message.kind == "end" for message in self.messages)

    def close(self) -> None:
        self._source.close()


class Keep:
    """Keeps every frame without a look at its pixels."""

    policy = Policy(audit_fraction=0.0)

    def decide(self, frames: Sequence[Frame]) -> list[Judgement]:
        return [Judgement(verdict=Verdict.KEEP, reason=Reason.SCORE) for _ in frames]


@pytest.fixture
def context() -> Iterator[Any]:
    ctx: zmq.Context[Any] = zmq.Context()
    yield ctx
    ctx.destroy(linger=0)


@pytest.mark.parametrize("protocol", ["stream2", "stream1"])
def test_a_payload_is_not_copied_on_its_way(context: Any, protocol: str) -> None:
    """Twelve messages of 2 MiB pass while Python's memory never grows by half of one."""
    messages = sent(protocol)
    detector = context.socket(zmq.PUSH)
    port = detector.bind_to_random_port("tcp://127.0.0.1")
    writer = context.socket(zmq.PULL)
    writer.setsockopt(zmq.RCVHWM, 2 * IMAGES)
    writer.setsockopt(zmq.RCVTIMEO, 20_000)
    forwarder = Forwarder(
        f"tcp://127.0.0.1:{writer.bind_to_random_port('tcp://127.0.0.1')}", context=context
    )
    source = UntilEnd(Subscriber(f"tcp://127.0.0.1:{port}", context=context))
    pipeline = Pipeline(
        source,
        [Keep(), Keep()],
        Outputs(forwarder=forwarder),
        PipelineOptions(deadline_ns=60_000_000_000),
        Metrics(),
    )
    runner = threading.Thread(target=pipeline.run)
    tracemalloc.start()
    try:
        runner.start()
        for message in messages:
            detector.send_multipart(message, copy=False)
        received = [writer.recv_multipart(copy=False) for _ in messages]
        runner.join(20)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert pipeline.failure is None
    assert pipeline.ledger.totals().balanced
    assert peak_bytes < len(PAYLOAD) // 2
    for message in source.messages:
        if message.frame is not None:
            assert isinstance(message.frame.payload, memoryview)
            assert any(message.frame.payload.obj is part for part in message.parts)
    assert [[part.bytes for part in parts] for parts in received] == messages
    forwarder.close()
    source.close()
    writer.close()
    detector.close()

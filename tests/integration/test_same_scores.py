"""The same pixels, mask and geometry get the same scores, whichever way they came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from simulators.detectors.detector import Detector, series_messages
from simulators.detectors.frames import SimFrame, StreamInfo, simulated_frames
from triage.backends import open_backend
from triage.ingest.files import Files
from triage.ingest.stream1 import Stream1Parser
from triage.ingest.stream2 import Stream2Parser
from triage.ingest.subscriber import Subscriber
from triage.metrics import Metrics
from triage.nets.model import load_model
from triage.nets.scorer import Scorer
from triage.pipeline import Decider, Outputs, Pipeline, PipelineOptions
from triage.policy import Policy
from triage.records import Frame, Message, Scores
from triage.sinks.nxmx import KeptWriter

FRAMES = 6


@pytest.fixture(scope="module")
def stream() -> tuple[StreamInfo, list[SimFrame]]:
    info, frames = simulated_frames(shape=(512, 700), count=FRAMES, seed=11, blank_share=0.5)
    return replace(info, number_of_images=FRAMES), frames


class Listed:
    """A source of messages that are there already."""

    def __init__(self, messages: Sequence[Message], per_call: int) -> None:
        self._messages, self._per_call = list(messages), per_call

    def receive(self, timeout_ms: int) -> list[Message]:
        now, self._messages = self._messages[: self._per_call], self._messages[self._per_call :]
        return now

    @property
    def exhausted(self) -> bool:
        return not self._messages

    def close(self) -> None:
        pass


def scores_of(source: Any, batch_size: int = 8) -> dict[int, Scores]:
    """image_id -> scores, by steps on this thread, all heads on every frame."""
    metrics = Metrics()
    scorer = Scorer(load_model())
    decider = Decider(open_backend("cpu"), scorer, Policy(all_heads=True), metrics)
    options = PipelineOptions(batch_size=batch_size, live=False)
    pipeline = Pipeline(source, decider, Outputs(), options, metrics)
    decided: dict[int, Scores] = {}
    while not source.exhausted:
        for decision in pipeline.step():
            decided[decision.image_id] = decision.scores
    return decided


def parsed(info: StreamInfo, frames: list[SimFrame], protocol: str) -> list[Message]:
    parser: Any = Stream2Parser() if protocol == "stream2" else Stream1Parser()
    sent = series_messages(info, frames, protocol=protocol, header_detail="all")
    return [parser.parse(message.parts, 0) for message in sent]


def test_stream_file_and_batch_make_no_difference(
    stream: tuple[StreamInfo, list[SimFrame]], tmp_path: Path
) -> None:
    """V2, V1, a kept NXmx file, one frame at a time or eight: every score the same bits."""
    info, frames = stream
    messages = parsed(info, frames, "stream2")
    expected = scores_of(Listed(messages, per_call=100))
    assert sorted(expected) == list(range(FRAMES))
    assert len({repr(s) for s in expected.values()}) > 1
    writer = KeptWriter(tmp_path)
    for message in messages:
        if message.frame is not None:
            writer.write(message.frame, None)
    writer.close()
    ways = {
        "one at a time": scores_of(Listed(messages, per_call=1), batch_size=1),
        "stream1": scores_of(Listed(parsed(info, frames, "stream1"), per_call=100)),
        "replay": scores_of(Files([tmp_path])),
    }
    for way, scores in ways.items():
        assert {i: repr(s) for i, s in scores.items()} == {
            i: repr(s) for i, s in expected.items()
        }, way


def test_a_live_socket_makes_no_difference(stream: tuple[StreamInfo, list[SimFrame]]) -> None:
    """Through ZeroMQ and a running pipeline the scores are those of a step."""
    info, frames = stream
    expected = scores_of(Listed(parsed(info, frames, "stream2"), per_call=100))
    detector = Detector()
    source = Subscriber(detector.endpoint)
    assert detector.wait_for_peer(20)
    detector.run(info, frames, header_detail="all")
    received: list[Message] = []
    while not received or received[-1].kind != "end":
        received += source.receive(10_000)
    live = scores_of(Listed(received, per_call=3))
    assert {i: repr(s) for i, s in live.items()} == {i: repr(s) for i, s in expected.items()}
    source.close()
    detector.close()


def test_payloads_are_not_copied_between_socket_and_decoder(
    stream: tuple[StreamInfo, list[SimFrame]],
) -> None:
    """The frame's payload is a window into the received ZeroMQ part."""
    info, frames = stream
    detector = Detector()
    source = Subscriber(detector.endpoint)
    assert detector.wait_for_peer(20)
    detector.run(info, frames)
    received: list[Message] = []
    while not received or received[-1].kind != "end":
        received += source.receive(10_000)
    images: list[tuple[Message, Frame]] = [(m, m.frame) for m in received if m.frame is not None]
    assert len(images) == FRAMES
    for message, frame in images:
        part = memoryview(message.parts[0])
        inside = frame.payload
        assert isinstance(inside, memoryview)
        assert bytes(inside) in bytes(part)
        assert inside.obj is part.obj or inside.obj is message.parts[0]
    source.close()
    detector.close()

"""Each fault through ingest, backend, policy and forwarder: counted, kept, and balanced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from simulators.detectors.detector import series_messages
from simulators.detectors.faults import FAULTS
from simulators.detectors.frames import SimFrame, StreamInfo, compressed
from triage.backends import open_backend
from triage.ingest.series import SeriesBook
from triage.ingest.stream1 import Stream1Parser
from triage.ingest.stream2 import Stream2Parser
from triage.metrics import Metrics
from triage.pipeline import Decider, Outputs, Pipeline, PipelineOptions
from triage.policy import Policy
from triage.records import NOT_SCORED, Message, Scores, Views

IMAGE = np.random.default_rng(3).poisson(1.0, (70, 90)).astype(np.uint16)
FRAME = SimFrame(
    payload=compressed(IMAGE, "bslz4"), encoding="bslz4", dtype=IMAGE.dtype, shape=IMAGE.shape
)
IMAGES = 5


class AllBlank:
    """Scores everything as blank: whatever is kept, is kept for another reason."""

    def fast(self, views: Views) -> list[Scores]:
        return [NOT_SCORED if e is not None else Scores(p_blank=1.0) for e in views.errors]

    def full(self, views: Views, tiles: Any, rows: Any, scores: list[Scores]) -> list[Scores]:
        return scores


class Wire:
    """Parses prepared messages on demand, and takes what is forwarded and dropped."""

    def __init__(self, messages: Sequence[Sequence[bytes]]) -> None:
        book = SeriesBook()
        self._v1, self._v2 = Stream1Parser(book), Stream2Parser(book=book)
        self._messages = list(messages)
        self.forwarded: list[tuple[bytes, ...]] = []
        self.dropped_ids: list[int] = []

    def receive(self, timeout_ms: int) -> list[Message]:
        now, self._messages = self._messages[:2], self._messages[2:]
        return [(self._v1 if m[0][:1] == b"{" else self._v2).parse(m, 0) for m in now]

    @property
    def exhausted(self) -> bool:
        return not self._messages

    def close(self) -> None:
        pass

    trouble = ""

    def send(self, message: Message, timeout_ms: int) -> bool:
        self.forwarded.append(message.parts)
        return True

    def dropped(self, decisions: Sequence[Any]) -> int:
        self.dropped_ids += [decision.image_id for decision in decisions]
        return len(decisions)


@pytest.mark.parametrize("protocol", ["stream2", "stream1"])
@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_every_fault_is_accounted_for_and_fails_open(protocol: str, fault: str) -> None:
    """With a scorer that calls all blank: sound images are dropped, the faulty one goes on."""
    info = StreamInfo(shape=IMAGE.shape, number_of_images=IMAGES, series_id=4)
    sent = [
        message.parts
        for message in series_messages(info, [FRAME], protocol=protocol, faults={2: fault})
    ]
    wire = Wire(sent)
    metrics = Metrics()
    policy = Policy(mode="enforce", p_blank_veto=0.5, audit_fraction=0.0)
    decider = Decider(open_backend("cpu"), AllBlank(), policy, metrics)
    outputs = Outputs(forwarder=wire, journal=wire)
    pipeline = Pipeline(wire, decider, outputs, PipelineOptions(live=False), metrics)
    decisions = []
    while not wire.exhausted:
        decisions += pipeline.step()

    totals = pipeline.ledger.totals()
    assert totals.balanced
    assert totals.received == len(decisions)
    images = {"duplicate": IMAGES + 1, "gap": IMAGES - 1}.get(fault, IMAGES)
    assert totals.received == images
    assert totals.missing == (1 if fault == "gap" else 0)
    assert totals.duplicates == (1 if fault == "duplicate" else 0)
    assert totals.malformed == (1 if fault in ("garbage", "big_json") else 0)

    harmless = ("duplicate", "gap", "garbage", "big_json", "missing_end")
    kept = [d.image_id for d in decisions if d.verdict == "keep"]
    faulty = [] if fault in harmless else [0 if fault == "image_before_start" else 2]
    assert kept == faulty
    assert all(d.reason != "score" for d in decisions if d.verdict == "keep")
    # What is forwarded is what was sent, less the drops, in order and byte for byte.
    dropped = {id(parts) for parts in sent} - {
        id(parts) for parts in sent if tuple(parts) in wire.forwarded
    }
    assert [tuple(p) for p in sent if id(p) not in dropped] == wire.forwarded
    assert len(sent) - len(wire.forwarded) == len(wire.dropped_ids)


def test_a_series_joined_late_is_kept_whole() -> None:
    """Without a start nobody knows mask or rotation: nothing is vetoed."""
    info = StreamInfo(shape=IMAGE.shape, number_of_images=IMAGES)
    sent = [m.parts for m in series_messages(info, [FRAME])][1:]
    wire = Wire(sent)
    metrics = Metrics()
    policy = Policy(mode="enforce", p_blank_veto=0.5, audit_fraction=0.0)
    decider = Decider(open_backend("cpu"), AllBlank(), policy, metrics)
    pipeline = Pipeline(
        wire, decider, Outputs(forwarder=wire, journal=wire), PipelineOptions(live=False), metrics
    )
    while not wire.exhausted:
        pipeline.step()
    assert wire.forwarded == [tuple(parts) for parts in sent]
    assert pipeline.ledger.totals().by_reason == {"geometry_changed": IMAGES}


def test_two_series_in_a_row_are_reported_apart() -> None:
    """A start without the end of the one before begins a series of its own."""
    infos = [
        StreamInfo(shape=IMAGE.shape, number_of_images=2, series_id=i, series_unique_id=f"U{i}")
        for i in (1, 2)
    ]
    sent = [m.parts for info in infos for m in series_messages(info, [FRAME]) if m.kind != "end"]
    wire = Wire(sent)
    metrics = Metrics()
    decider = Decider(open_backend("cpu"), AllBlank(), replace(Policy(), p_blank_veto=0.5), metrics)
    pipeline = Pipeline(
        wire, decider, Outputs(forwarder=wire), PipelineOptions(live=False), metrics
    )
    while not wire.exhausted:
        pipeline.step()
    reports = pipeline.ledger.reports()
    assert [(r.series_id, r.received, r.forwarded, r.ended) for r in reports] == [
        (1, 2, 2, False),
        (2, 2, 2, False),
    ]

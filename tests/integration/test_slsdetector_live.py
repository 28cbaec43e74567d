"""The twin of SLS receivers over real sockets, through the pipeline, to a writer's socket."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from simulators.detectors.slsdetector import Layout, Receivers, SlsFaults, SlsMaps, acquisition
from triage.backends import open_backend
from triage.config import load_settings
from triage.ingest import open_source
from triage.metrics import Metrics
from triage.pipeline import Decider, Outputs, Pipeline, PipelineOptions
from triage.policy import Policy
from triage.records import (
    NOT_SCORED,
    Decision,
    Message,
    MessageKind,
    Scores,
    SeriesReport,
    Views,
)
from triage.sinks.forwarder import Forwarder

SHAPE = (64, 48)
FRAMES = 12
SPOT_COUNTS = 60
PATIENCE_S = 60.0

RNG = np.random.default_rng(11)
IMAGES = [RNG.poisson(1.0, SHAPE).astype(np.uint16) for _ in range(FRAMES)]
HITS = (2, 5, 9)
for hit in HITS:
    # In the upper port's part.
    IMAGES[hit][10, 20] = SPOT_COUNTS


class SpotOrBlank:
    """A frame whose brightest pixel is the spot is a hit; every other is blank."""

    def fast(self, views: Views) -> list[Scores]:
        return [
            NOT_SCORED
            if error is not None
            else Scores(p_blank=float(views.maximum[i].max() != SPOT_COUNTS))
            for i, error in enumerate(views.errors)
        ]

    def full(self, views: Views, tiles: Any, rows: Any, scores: list[Scores]) -> list[Scores]:
        return scores


class Journal:
    """Drops, as written down."""

    def __init__(self) -> None:
        self.image_ids: list[int] = []

    def dropped(self, decisions: Sequence[Decision]) -> int:
        self.image_ids += [decision.image_id for decision in decisions]
        return len(decisions)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run gave: what the writer saw, the drops, the ledger and the decisions' reasons."""

    written: list[tuple[bytes, ...]]
    dropped: list[int]
    totals: SeriesReport
    reports: list[SeriesReport]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A writer's socket, and what it saw."""

    context: zmq.Context[Any]
    writer: zmq.Socket[bytes]
    address: str

    def read_until(self, last: tuple[bytes, ...]) -> list[tuple[bytes, ...]]:
        """What comes before that message."""
        written: list[tuple[bytes, ...]] = []
        while self.writer.poll(round(1000 * PATIENCE_S)):
            written.append(tuple(self.writer.recv_multipart()))
            if written[-1] == last:
                return written[:-1]
        raise TimeoutError(f"{len(written)} messages and no end of them")


@pytest.fixture
def bench() -> Iterator[Bench]:
    context: zmq.Context[Any] = zmq.Context()
    writer = context.socket(zmq.PULL)
    writer.setsockopt(zmq.LINGER, 0)
    writer.bind("tcp://127.0.0.1:*")
    yield Bench(
        context=context,
        writer=writer,
        address=writer.getsockopt_string(zmq.LAST_ENDPOINT),
    )
    context.destroy(linger=0)


def run(
    bench: Bench,
    layout: Layout,
    acquisitions: Sequence[dict[str, Any]],
    **overrides: Any,
) -> tuple[Outcome, list[list[tuple[int, int, tuple[bytes, ...]]]]]:
    """Play acquisitions to a pipeline that enforces; what came of it, and what was sent."""
    sent = [list(acquisition(IMAGES, layout, **one)) for one in acquisitions]
    receivers = Receivers(ports=layout.ports[0] * layout.ports[1])
    settings = load_settings(
        overrides={
            "source.protocol": "slsdetector",
            "source.endpoint": ",".join(receivers.endpoints),
            "source.part_wait_ms": 200,
            **overrides,
        }
    )
    metrics = Metrics()
    source = open_source(settings, metrics)
    policy = Policy(mode="enforce", p_blank_veto=0.5, audit_fraction=0.0)
    deciders = [Decider(open_backend("cpu"), SpotOrBlank(), policy, metrics) for _ in range(2)]
    forwarder = Forwarder(bench.address)
    journal = Journal()
    pipeline = Pipeline(
        source,
        deciders,
        Outputs(forwarder=forwarder, journal=journal),
        PipelineOptions(live=True, deadline_ns=30_000_000_000),
        metrics,
    )
    runner = threading.Thread(target=pipeline.run, daemon=True)
    try:
        assert receivers.wait_for_peer(PATIENCE_S)
        runner.start()
        for messages in sent:
            receivers.send(iter(messages))
        until_s = time.monotonic() + PATIENCE_S
        while _ended(pipeline) < len(acquisitions) and time.monotonic() < until_s:
            runner.join(0.01)
        pipeline.stop()
        runner.join(PATIENCE_S)
        over = (b"over",)
        assert forwarder.send(Message(kind=MessageKind.CONTROL, parts=over), 1000 * 60)
        written = bench.read_until(over)
    finally:
        pipeline.stop()
        forwarder.close()
        source.close()
        receivers.close(0.0)
    assert pipeline.failure is None
    outcome = Outcome(
        written=written,
        dropped=journal.image_ids,
        totals=pipeline.ledger.totals(),
        reports=pipeline.ledger.reports(),
    )
    return outcome, sent


def _ended(pipeline: Pipeline) -> int:
    return sum(report.ended for report in pipeline.ledger.reports())


def expected(
    sent: Sequence[tuple[int, int, tuple[bytes, ...]]], kept: Sequence[int]
) -> list[tuple[bytes, ...]]:
    """What a writer should see of one acquisition, in any order of ports."""
    return sorted(parts for frame, _, parts in sent if frame < 0 or frame in kept)


def test_only_hits_and_ends_reach_the_writer(bench: Bench) -> None:
    """EIGER counts over four ports, one series after another: every drop is journalled, the rest
    is byte for byte what was sent."""
    layout = Layout(detector="eiger", ports=(2, 2))
    outcome, sent = run(bench, layout, [{"file_index": 1}, {"file_index": 2, "first_number": 13}])
    blanks = [n for n in range(FRAMES) if n not in HITS]
    assert outcome.dropped == blanks * 2
    assert sorted(outcome.written) == sorted(expected(sent[0], HITS) + expected(sent[1], HITS))
    assert outcome.totals.balanced
    assert outcome.totals.received == 2 * FRAMES
    assert outcome.totals.missing == 0
    assert outcome.totals.by_reason == {"score": 2 * FRAMES}
    told = [json.loads(parts[0]) for parts in outcome.written]
    numbers = [header["frameNumber"] for header in told if header["data"]]
    assert numbers == sorted(numbers)
    assert [report.series_id for report in outcome.reports] == [1, 2]


def test_jungfrau_words_are_scored_as_photons(bench: Bench, tmp_path: Path) -> None:
    """Raw words with maps from a file, ports that lag: the spots are found, the blanks go."""
    maps = SlsMaps.drawn(SHAPE, 12.398419843320026, seed=4)
    maps.save(tmp_path / "maps.npz")
    outcome, sent = run(
        bench,
        Layout(detector="jungfrau", ports=(2, 1)),
        [{"maps": maps, "faults": SlsFaults(skew=3)}],
        **{
            "source.pedestal_file": str(tmp_path / "maps.npz"),
            "source.gain_file": str(tmp_path / "maps.npz"),
            "geometry.incident_wavelength_angstrom": 1.0,
        },
    )
    assert outcome.dropped == [n for n in range(FRAMES) if n not in HITS]
    assert sorted(outcome.written) == expected(sent[0], HITS)
    assert outcome.totals.balanced


def test_jungfrau_words_without_maps_are_all_kept(bench: Bench) -> None:
    """Nobody knows what they count: nothing is dropped, with the reason."""
    maps = SlsMaps.drawn(SHAPE, 12.4, seed=4)
    outcome, sent = run(bench, Layout(detector="jungfrau", ports=(2, 1)), [{"maps": maps}])
    assert outcome.dropped == []
    assert sorted(outcome.written) == expected(sent[0], range(FRAMES))
    assert outcome.totals.by_reason == {"unknown_encoding": FRAMES}


def test_lost_parts_and_packets_are_tolerated(bench: Bench) -> None:
    """A frame without one port's part goes on unscored; a frame lost whole is missing; of one
    whose packets the receiver lost the rest is scored."""
    faults = SlsFaults(
        lost=frozenset({(1, 0), (2, 1), (7, 0), (7, 1)}),
        incomplete=frozenset({(4, 1), (5, 1)}),
    )
    layout = Layout(detector="eiger", ports=(2, 1))
    outcome, sent = run(bench, layout, [{"faults": faults}])
    assert outcome.dropped == [n for n in range(FRAMES) if n not in (*HITS, 1, 7)]
    assert sorted(outcome.written) == expected(sent[0], (*HITS, 1))
    assert outcome.totals.balanced
    assert outcome.totals.received == FRAMES - 1
    assert outcome.totals.missing == 1
    assert outcome.totals.by_reason == {"score": FRAMES - 3, "malformed": 2}


def test_a_frame_whose_spot_was_in_a_lost_part_goes_on(bench: Bench) -> None:
    """The rest is blank, but nobody here has seen the whole."""
    faults = SlsFaults(lost=frozenset({(2, 0)}))
    layout = Layout(detector="eiger", ports=(2, 1))
    outcome, _ = run(bench, layout, [{"faults": faults}])
    assert outcome.dropped == [n for n in range(FRAMES) if n not in HITS]
    assert outcome.totals.by_reason == {"score": FRAMES - 1, "malformed": 1}
    assert outcome.totals.balanced


def test_a_dead_port_holds_nothing_back(bench: Bench) -> None:
    """Every frame goes on without it, unscored as long as it may only be late; the series ends."""
    layout = Layout(detector="eiger", ports=(2, 1))
    outcome, sent = run(bench, layout, [{"faults": SlsFaults(dead=frozenset({1}))}])
    assert outcome.dropped == []
    assert sorted(outcome.written) == expected(sent[0], range(FRAMES))
    assert outcome.totals.by_reason == {"malformed": FRAMES}
    assert outcome.totals.balanced
    assert outcome.totals.ended


def test_a_port_that_dies_before_its_end_holds_nothing_back(bench: Bench) -> None:
    """Another acquisition says that its own is over: what came is decided, and nothing is lost."""
    layout = Layout(detector="eiger", ports=(2, 1))
    faults = SlsFaults(lost=frozenset((n, 1) for n in range(6, FRAMES)), endless=frozenset({0, 1}))
    outcome, sent = run(
        bench,
        layout,
        [{"faults": faults}, {"file_index": 3}],
        **{"source.part_wait_ms": 60_000},
    )
    blanks = [n for n in range(FRAMES) if n not in HITS]
    assert outcome.dropped == [n for n in blanks if n < 6] + blanks
    kept = expected(sent[0], (*HITS, *range(6, FRAMES))) + expected(sent[1], HITS)
    assert sorted(outcome.written) == sorted(kept)
    assert outcome.totals.balanced

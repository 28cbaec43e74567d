"""Trains of a bridge, and a series over several sockets, through a run to the writers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import zmq

from simulators.detectors.detector import Detector
from simulators.detectors.frames import SimFrame, StreamInfo, compressed
from simulators.detectors.karabo import FAULTS, FIRST_TRAIN, Bridge, Train, train_parts
from triage.backends import open_backend
from triage.ingest import Source
from triage.ingest.karabo import KaraboBridge
from triage.ingest.subscriber import Subscriber
from triage.metrics import Metrics
from triage.pipeline import Decider, Outputs, Pipeline, PipelineOptions
from triage.policy import Policy
from triage.records import NOT_SCORED, Scores, SeriesReport, Views
from triage.sinks.forwarder import Forwarder

DEADLINE_S = 90.0
SHAPE = (64, 96)
PULSES, TRAINS = 3, 6
PIXELS = np.random.default_rng(4).poisson(2.0, (PULSES, *SHAPE)).astype(np.float32)


class AllBlank:
    """Scores everything as blank: in shadow mode it goes on all the same."""

    def fast(self, views: Views) -> list[Scores]:
        return [NOT_SCORED if e is not None else Scores(p_blank=1.0) for e in views.errors]

    def full(self, views: Views, tiles: Any, rows: Any, scores: list[Scores]) -> list[Scores]:
        return scores


class Run:
    """A pipeline in a thread, from a source to writers that keep what they get."""

    def __init__(self, source: Source, writers: int = 1, metrics: Metrics | None = None) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.sockets = [self.context.socket(zmq.PULL) for _ in range(writers)]
        self.written: list[list[tuple[bytes, ...]]] = [[] for _ in range(writers)]
        self.metrics = metrics or Metrics()
        self.source = source
        for socket in self.sockets:
            socket.bind("tcp://127.0.0.1:*")
        endpoint = ",".join(s.getsockopt_string(zmq.LAST_ENDPOINT) for s in self.sockets)
        self.forwarder = Forwarder(endpoint, distribute="lane" if writers > 1 else "round_robin")
        policy = Policy(mode="shadow", p_blank_veto=0.5, audit_fraction=0.0)
        decider = Decider(open_backend("cpu"), AllBlank(), policy, self.metrics)
        options = PipelineOptions(deadline_ns=20_000_000_000)
        self.pipeline = Pipeline(
            source, decider, Outputs(forwarder=self.forwarder), options, self.metrics
        )
        self.thread = threading.Thread(target=self.pipeline.run, daemon=True)
        self.thread.start()

    def write_until(self, enough: Callable[[], bool]) -> None:
        poller = zmq.Poller()
        for socket in self.sockets:
            poller.register(socket, zmq.POLLIN)
        until = time.monotonic() + DEADLINE_S
        while not enough() and time.monotonic() < until:
            for socket, _ in poller.poll(100):
                parts = tuple(socket.recv_multipart())
                self.written[self.sockets.index(socket)].append(parts)

    def finish(self) -> SeriesReport:
        self.pipeline.stop()
        self.thread.join(DEADLINE_S)
        self.source.close()
        self.forwarder.close(abandon=True)
        self.context.destroy(linger=0)
        assert not self.thread.is_alive()
        assert self.pipeline.failure is None
        return self.pipeline.ledger.totals()


def played(trains: Sequence[Train], faults: dict[int, str], **options: Any) -> Run:
    """A run behind a bridge, once every train that is sent has been written."""
    bridge = Bridge()
    metrics = Metrics()
    source = KaraboBridge(bridge.endpoint, answer_ns=300_000_000, metrics=metrics)
    run = Run(source, metrics=metrics)
    totals = []
    playing = threading.Thread(
        target=lambda: totals.append(bridge.run(trains, faults=faults, **options)), daemon=True
    )
    playing.start()
    run.write_until(lambda: bool(totals) and len(run.written[0]) >= totals[0].messages)
    playing.join(DEADLINE_S)
    bridge.close(0.0)
    return run


@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_every_train_goes_on_whole_and_is_accounted_for(fault: str) -> None:
    """Bytes as sent, whatever is wrong with the third train; counts by hand."""
    trains = [Train(train_id=FIRST_TRAIN + i, pixels=PIXELS) for i in range(TRAINS)]
    run = played(trains, {} if fault == "none" else {2: fault})
    report = run.finish()
    assert report.balanced
    assert report.dropped == 0

    sent = [tuple(train_parts(train)) for train in trains]
    sent[2:3] = {
        "gap": [],
        "duplicate": [sent[2], sent[2]],
        "garbage": [(b"\xc1no train",), sent[2]],
        "none": [sent[2]],
        "silent": [sent[2]],
    }.get(fault, [tuple(train_parts(trains[2], fault=fault))])
    assert run.written[0] == sent

    whole = TRAINS * PULSES
    # A train that cannot be cut into frames is one image; one without its array is none.
    received = {
        "gap": whole - PULSES, "no_array": whole - PULSES, "duplicate": whole + PULSES,
        "truncated": whole - PULSES + 1, "wrong_dtype": whole - PULSES + 1,
    }.get(fault, whole)  # fmt: skip
    lost = ("gap", "no_array", "truncated", "wrong_dtype")
    assert report.received == received
    assert report.missing == (PULSES if fault in lost else 0)
    assert report.duplicates == (PULSES if fault == "duplicate" else 0)
    assert report.malformed == (1 if fault == "garbage" else 0)
    assert report.control == (1 if fault == "no_array" else 0)
    unscored = {"truncated": "malformed", "wrong_dtype": "unknown_encoding"}.get(fault)
    assert dict(report.by_reason) == {
        "score": received - (unscored is not None),
        **({unscored: 1} if unscored else {}),
    }
    resets = run.metrics.registry.get_sample_value("triage_source_resets_total")
    assert bool(resets) >= (fault == "silent")


@pytest.mark.parametrize("writers", [1, 3])
def test_a_series_over_three_sockets_reaches_its_writers(writers: int) -> None:
    """As many writers as sockets: each gets its own, in order. One: all, the ends last."""
    images, lanes = 12, 3
    pixels = np.random.default_rng(8).poisson(2.0, SHAPE).astype(np.int32)
    frame = SimFrame(
        payload=compressed(pixels, "bszstd"), encoding="bszstd", dtype=pixels.dtype, shape=SHAPE
    )
    info = StreamInfo(
        shape=SHAPE, dtype=pixels.dtype, number_of_images=images, error_value=-(2**31)
    )
    detector = Detector(",".join(["tcp://127.0.0.1:*"] * lanes))
    run = Run(Subscriber(detector.endpoint), writers)
    assert detector.wait_for_peer(DEADLINE_S)
    total = detector.run(
        info, [frame], protocol="jungfraujoch", images_per_file=2, faults={5: "gap"}
    ).messages
    run.write_until(lambda: sum(map(len, run.written)) >= total)
    report = run.finish()
    detector.close(0.0)
    assert report.balanced
    assert (report.received, report.missing, report.duplicates) == (images - 1, 1, 0)
    assert dict(report.by_reason) == {"score": images - 1}
    assert report.control == 1
    assert report.ended

    def of_type(written: Sequence[tuple[bytes, ...]]) -> list[str]:
        return [
            next(name for name in ("start", "calibration", "image", "end") if name in head)
            for head in (bytes(parts[0][:24]).decode("latin-1") for parts in written)
        ]

    if writers == 1:
        types = of_type(run.written[0])
        assert types[-3:] == ["end"] * 3
        assert types.count("start") == 3
        assert types.count("image") == images - 1
    else:
        assert [of_type(written) for written in run.written] == [
            ["start", "calibration", *["image"] * 4, "end"],
            ["start", *["image"] * 4, "end"],
            ["start", *["image"] * 3, "end"],
        ]

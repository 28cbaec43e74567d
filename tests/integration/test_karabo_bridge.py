"""The Karabo bridge's own Python package on both ends of our wire, and a train through a run."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import zmq

from simulators.detectors.frames import SimFrame, StreamInfo
from simulators.detectors.karabo import DETECTOR, FIRST_TRAIN, Bridge, Train, stack
from triage.backends import open_backend
from triage.config import load_settings
from triage.ingest import LiveSource, open_source
from triage.metrics import Metrics
from triage.records import Message

karabo_bridge = pytest.importorskip(
    "karabo_bridge", reason="needs karabo-bridge: pip install karabo-bridge"
)
from karabo_bridge.server import ServerInThread, SimServer  # noqa: E402

pytestmark = pytest.mark.interop

DEADLINE_S = 90.0


def opened(endpoint: str, **source: str) -> LiveSource:
    overrides = {"source.protocol": "karabo", "source.endpoint": endpoint}
    overrides |= {f"source.{name}": value for name, value in source.items()}
    return open_source(load_settings(overrides=overrides), Metrics())


def frames_of(source: LiveSource, count: int) -> list[Message]:
    """Messages up to so many frames."""
    messages: list[Message] = []
    until = time.monotonic() + DEADLINE_S
    while sum(m.frame is not None for m in messages) < count and time.monotonic() < until:
        messages += source.receive(100)
    return messages


@contextmanager
def simulated(**options: Any) -> Iterator[str]:
    """Its simulator of an AGIPD module: 64 pulses of 512 x 128 per train."""
    server = SimServer(
        "tcp://127.0.0.1:*", detector="AGIPDModule", raw=True, debug=False, **options
    )
    thread = threading.Thread(target=server.loop, daemon=True)
    thread.start()
    try:
        yield server.server_socket.getsockopt_string(zmq.LAST_ENDPOINT)
    finally:
        server.stopper_w.send(b"")
        thread.join(DEADLINE_S)
        server.zmq_context.destroy(linger=0)


@pytest.mark.parametrize("order", ["file", "online"])
@pytest.mark.parametrize(
    ("its_socket", "ours", "version"),
    [("REP", "req", "2.2"), ("REP", "req", "1.0"), ("PUB", "sub", "2.2"), ("PUSH", "pull", "2.2")],
)
def test_its_simulator_is_read(order: str, its_socket: str, ours: str, version: str) -> None:
    """Trains count up, 64 frames each, counts between 1500 and 1600 as its generator draws."""
    with simulated(sock=its_socket, protocol_version=version, data_like=order) as endpoint:
        source = opened(endpoint, karabo_socket=ours, karabo_order=order)
        messages = frames_of(source, 128)
        source.close()
    frames = [m.frame for m in messages if m.frame is not None]
    assert {f.shape for f in frames} == {(512, 128)}
    assert {f.fault for f in frames} == {None}
    assert {f.series.detector_description for f in frames} == {"SPB_DET_AGIPD1M-1/DET/0CH0:xtdf"}
    ids = [f.image_id for f in frames]
    assert ids[:64] == list(range(64))
    assert all(late > early for early, late in itertools.pairwise(ids))
    pixels = open_backend("cpu").decode(frames[-1])
    assert pixels.dtype == np.uint16
    assert 1500 <= pixels.min() < pixels.max() < 1600


@pytest.mark.parametrize("version", ["2.2", "1.0"])
def test_what_it_serves_is_what_we_read(version: str) -> None:
    """Known arrays of two modules through its server: our pixels are those, laid out in rows."""
    data = np.random.default_rng(2).poisson(3.0, (3, 2, 8, 12)).astype(np.float32)
    data[1, 0, 2, 3] = np.nan
    values = {"image.data": data, "image.cellId": np.arange(3, dtype=np.uint16)}
    metadata = {"DET": {"source": "DET", "timestamp.tid": 77}}
    with ServerInThread("tcp://127.0.0.1:*", protocol_version=version) as server:
        endpoint = server.server_socket.getsockopt_string(zmq.LAST_ENDPOINT)
        source = opened(endpoint, karabo_source="DET", karabo_path="image.data")
        server.feed({"DET": values}, metadata)
        messages = frames_of(source, 3)
        source.close()
    frames = [m.frame for m in messages if m.frame is not None]
    assert [f.image_id for f in frames] == [0, 1, 2]
    assert {f.series.series_id for f in frames} == {77}
    for pulse, frame in enumerate(frames):
        expected = np.concatenate(list(data[pulse]), axis=0)
        assert frame.shape == (16, 12)
        assert np.array_equal(open_backend("cpu").decode(frame), expected, equal_nan=True)


def made_trains(count: int, modules: int = 1) -> list[Train]:
    images = [np.random.default_rng(i).poisson(2.0, (16, 24)).astype(np.uint16) for i in range(4)]
    frames = [
        SimFrame(payload=i.tobytes(), encoding="raw", dtype=i.dtype, shape=i.shape) for i in images
    ]
    mask = np.zeros((16, 24), np.uint32)
    mask[0, 0] = 1
    info = StreamInfo(shape=(16, 24), pixel_mask=mask)
    pixels = stack(info, frames, pulses=4, modules=modules)
    return [Train(train_id=FIRST_TRAIN + i, pixels=pixels) for i in range(count)]


@pytest.mark.parametrize("version", ["2.2", "1.0"])
@pytest.mark.parametrize(("ours", "its"), [("rep", "REQ"), ("pub", "SUB"), ("push", "PULL")])
def test_its_client_reads_our_bridge(ours: str, its: str, version: str) -> None:
    """Source, train id, plain values and every pixel."""
    trains = made_trains(2, modules=2)
    bridge = Bridge(socket=ours)
    client = karabo_bridge.Client(bridge.endpoint, sock=its, timeout=DEADLINE_S)
    playing = threading.Thread(
        target=lambda: (bridge.wait_for_peer(DEADLINE_S), bridge.run(trains, version=version)),
        daemon=True,
    )
    playing.start()
    received = [client.next() for _ in trains]
    playing.join(DEADLINE_S)
    bridge.close()
    client._context.destroy(linger=0)
    for train, (data, metadata) in zip(trains, received, strict=True):
        assert metadata[DETECTOR]["timestamp.tid"] == train.train_id
        assert data[DETECTOR]["image.passport"]
        assert np.array_equal(data[DETECTOR]["image.data"], train.pixels, equal_nan=True)
        assert np.isnan(data[DETECTOR]["image.data"][0, 0, 0, 0])

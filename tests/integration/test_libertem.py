"""libertem-dectris, the most used Stream V1 program in Python, on both ends of our wire."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulators.detectors.detector import Detector
from simulators.detectors.frames import SimFrame, StreamInfo, compressed
from triage.backends import open_backend
from triage.ingest.subscriber import Subscriber
from triage.records import Message

libertem = pytest.importorskip(
    "libertem_dectris", reason="needs libertem-dectris: pip install libertem-dectris"
)
pytestmark = pytest.mark.interop


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def received(source: Subscriber, seconds: float) -> list[Message]:
    """Messages up to the end of the series."""
    messages: list[Message] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until and not any(m.kind == "end" for m in messages):
        messages += source.receive(100)
    return messages


def play(emulator: Any) -> threading.Thread:
    def send() -> None:
        emulator.send_headers()
        emulator.send_frames()
        emulator.send_footer()

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def test_its_emulator_is_read(tmp_path: Path) -> None:
    """Mock data: n frames, frame i constant i; header and configuration come apart."""
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    emulator = libertem.DectrisSim.new_mocked(endpoint, 5, dwelltime=None, random_port=False)
    source = Subscriber(endpoint)
    thread = play(emulator)
    messages = received(source, 30)
    thread.join(90)
    source.close()
    frames = [m.frame for m in messages if m.frame is not None]
    assert [f.image_id for f in frames] == list(range(5))
    backend = open_backend("cpu")
    for i, frame in enumerate(frames):
        assert frame.fault is None
        pixels = backend.decode(frame)
        assert pixels.shape == (512, 512)
        assert (pixels == i).all()


@pytest.mark.shared
def test_its_replay_of_a_real_eiger_is_read(shared: Path, tmp_path: Path) -> None:
    """The odin recording, rebuilt as its dump format: three frames of 2167 x 2070."""
    folder = shared / "samples" / "stream1_odin"

    def part(number: int) -> bytes:
        return (folder / f"streamfile_{number}").read_bytes()

    header = json.dumps({**json.loads(part(1)), "header_detail": "basic"}).encode()
    configuration = {**json.loads(part(2)), "bit_depth_image": 16, "nimages": 3}
    entries = [header, json.dumps(configuration).encode()]
    entries += [part(n) for n in range(10, 22)] + [part(22).rstrip(b"\n")]
    dump = tmp_path / "odin.lt_dump"
    dump.write_bytes(b"".join(len(e).to_bytes(8, "little") + e for e in entries))
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    emulator = libertem.DectrisSim(endpoint, str(dump), dwelltime=50000, random_port=False)
    source = Subscriber(endpoint)
    thread = play(emulator)
    messages = received(source, 30)
    thread.join(90)
    source.close()
    frames = [m.frame for m in messages if m.frame is not None]
    assert len(frames) == 3
    backend = open_backend("cpu")
    for frame in frames:
        pixels = backend.decode(frame)
        assert int((pixels == 65535).sum()) == 251297
        assert int(pixels[pixels < 65534].sum(dtype=np.int64)) == 4609824


def test_its_receiver_reads_our_detector(tmp_path: Path) -> None:
    """Every frame that we send in Stream V1 comes out with its pixels."""
    shape = (256, 320)
    images = [np.random.default_rng(i).poisson(2.0, shape).astype(np.uint16) for i in range(4)]
    frames = [
        SimFrame(payload=compressed(i, "bslz4"), encoding="bslz4", dtype=i.dtype, shape=shape)
        for i in images
    ]
    info = StreamInfo(
        shape=shape, number_of_images=len(images), detector_distance_m=0.1, count_time_s=0.001
    )
    detector = Detector()
    connection = libertem.DectrisConnection(
        uri=detector.endpoint,
        handle_path=str(tmp_path / "handle"),
        frame_stack_size=1,
        num_slots=16,
        bytes_per_frame=images[0].nbytes,
        huge=False,
    )
    try:
        connection.start_passive()
        assert detector.wait_for_peer(20)
        detector.run(info, frames, protocol="stream1")
        configuration, _ = connection.wait_for_arm(20.0) or (None, None)
        assert configuration is not None
        client = libertem.CamClient(connection.get_socket_path())
        got = []
        while (stack := connection.get_next_stack(max_size=1)) is not None:
            out = np.zeros((1, *shape), np.uint16)
            client.decode_range_into_buffer(stack, out, 0, len(stack))
            client.done(stack)
            got.append(out[0])
        client.close()
    finally:
        connection.close()
        detector.close()
    assert len(got) == len(images)
    assert all(np.array_equal(a, b) for a, b in zip(got, images, strict=True))

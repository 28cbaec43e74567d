"""A stream on the wire, into a capture, and on the wire again: the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import zmq
from typer.testing import CliRunner

from simulators.detectors.detector import Detector, series_messages
from simulators.detectors.frames import SimFrame, StreamInfo, compressed
from triage.cli import app

IMAGE = np.random.default_rng(0).poisson(1.0, (70, 90)).astype(np.uint16)
FRAME = SimFrame(
    payload=compressed(IMAGE, "bslz4"), encoding="bslz4", dtype=IMAGE.dtype, shape=IMAGE.shape
)
INFO = StreamInfo(shape=IMAGE.shape, number_of_images=4, series_id=3)


def sent_by(detector: Detector, protocol: str) -> threading.Thread:
    def play() -> None:
        assert detector.wait_for_peer(30)
        detector.run(INFO, [FRAME], protocol=protocol)

    thread = threading.Thread(target=play)
    thread.start()
    return thread


@pytest.mark.parametrize("protocol", ["stream2", "stream1"])
def test_what_is_played_is_what_was_recorded(tmp_path: Path, protocol: str) -> None:
    """`triage record` of a series, then `triage-sim play`: a reader gets the sent messages."""
    file = tmp_path / "run.zcap"
    detector = Detector()
    thread = sent_by(detector, protocol)
    arguments = ["record", detector.endpoint, str(file), "--socket", "pull", "--series", "1"]
    result = CliRunner().invoke(app, arguments)
    thread.join(20)
    detector.close()
    assert result.exit_code == 0, result.output
    assert "6 messages" in result.output

    playing = subprocess.Popen(
        [sys.executable, "-m", "simulators", "play", str(file), "--rate", "0"],
        stdout=subprocess.PIPE,
    )
    assert playing.stdout is not None
    endpoint = json.loads(playing.stdout.readline())["endpoint"]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    reader = context.socket(zmq.PULL)
    reader.setsockopt(zmq.RCVTIMEO, 20_000)
    reader.connect(endpoint)
    received = [tuple(reader.recv_multipart()) for _ in range(6)]
    assert playing.wait(20) == 0
    playing.stdout.close()
    reader.close(0)
    context.term()
    from dataclasses import replace

    from simulators.detectors.detector import unique_id

    armed = replace(INFO, series_unique_id=unique_id(3, 0))
    expected = [m.parts for m in series_messages(armed, [FRAME], protocol=protocol)]
    assert received == [tuple(bytes(part) for part in parts) for parts in expected]


def test_nothing_on_the_stream_is_an_error(tmp_path: Path) -> None:
    """A detector that is not armed: exit code 1, and a hint."""
    detector = Detector()
    file = tmp_path / "run.zcap"
    result = CliRunner().invoke(app, ["record", detector.endpoint, str(file), "--seconds", "0.3"])
    detector.close(0.0)
    assert result.exit_code == 1
    assert "armed" in result.output


def test_a_recording_is_not_overwritten(tmp_path: Path) -> None:
    """A name that is taken: refused before any socket takes a message."""
    file = tmp_path / "run.zcap"
    file.write_bytes(b"precious")
    result = CliRunner().invoke(app, ["record", "tcp://127.0.0.1:9", str(file)])
    assert result.exception is not None
    assert "is there already" in str(result.exception)
    assert file.read_bytes() == b"precious"

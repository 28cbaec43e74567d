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

from simulators.__main__ import app as simulators_app
from simulators.detectors.detector import Detector, series_messages
from simulators.detectors.frames import SimFrame, StreamInfo, compressed
from simulators.detectors.karabo import FIRST_TRAIN, Bridge, Train
from simulators.detectors.slsdetector import Layout, Receivers, SlsFaults, acquisition
from triage.cli import app
from triage.errors import ConfigError
from triage.ingest.capture import Capture, Recorder
from triage.ingest.dectris import DectrisStream
from triage.ingest.series import SeriesBook

IMAGE = np.random.default_rng(0).poisson(1.0, (70, 90)).astype(np.uint16)
FRAME = SimFrame(
    payload=compressed(IMAGE, "bslz4"), encoding="bslz4", dtype=IMAGE.dtype, shape=IMAGE.shape
)
INFO = StreamInfo(shape=IMAGE.shape, number_of_images=4, series_id=3)


def sent_by(detector: Detector, protocol: str) -> threading.Thread:
    def play() -> None:
        assert detector.wait_for_peer(90)
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
    thread.join(90)
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
    reader.setsockopt(zmq.RCVTIMEO, 90_000)
    reader.connect(endpoint)
    received = [tuple(reader.recv_multipart()) for _ in range(6)]
    assert playing.wait(90) == 0
    playing.stdout.close()
    reader.close(0)
    context.term()
    from dataclasses import replace

    from simulators.detectors.detector import unique_id

    armed = replace(INFO, series_unique_id=unique_id(3, 0))
    expected = [m.parts for m in series_messages(armed, [FRAME], protocol=protocol)]
    assert received == [tuple(bytes(part) for part in parts) for parts in expected]


def test_a_publisher_that_plays_a_capture_loses_nothing(tmp_path: Path) -> None:
    """A reader that is slower than the disk: the sender waits for it."""
    file = tmp_path / "run.zcap"
    recorder = Recorder(file, protocol="auto")
    for number in range(300):
        recorder.write([number.to_bytes(2, "big") + bytes(200_000)], number)
    recorder.close()
    playing = Detector(socket="pub", waits=True)
    thread = threading.Thread(
        target=lambda: playing.wait_for_peer(90) and playing.play(file, rate_hz=0.0)
    )
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    reader = context.socket(zmq.SUB)
    reader.setsockopt(zmq.RCVTIMEO, 90_000)
    reader.setsockopt(zmq.RCVHWM, 2)
    reader.setsockopt(zmq.SUBSCRIBE, b"")
    reader.connect(playing.endpoint)
    thread.start()
    # With its marks full a sender that does not wait would be done with the file.
    thread.join(0.5)
    received = [int.from_bytes(reader.recv()[:2], "big") for _ in range(300)]
    thread.join(90)
    reader.close(0)
    playing.close(0.0)
    context.term()
    assert received == list(range(300))


def test_parts_that_wait_for_others_are_recorded_too(tmp_path: Path) -> None:
    """One port of two is silent, and the recording ends before it is given up: what came of the
    other is in the file, behind nothing else."""
    image = np.zeros((4, 4), np.uint16)
    sent = list(
        acquisition(
            [image] * 3,
            Layout(detector="eiger"),
            faults=SlsFaults(dead=frozenset({1}), endless=frozenset({0})),
        )
    )
    receivers = Receivers(ports=2)

    def send() -> None:
        assert receivers.wait_for_peer(90)
        receivers.send(iter(sent))

    thread = threading.Thread(target=send)
    thread.start()
    file = tmp_path / "run.zcap"
    arguments = ["record", ",".join(receivers.endpoints), str(file), "--seconds", "5"]
    arguments += ["--protocol", "slsdetector", "--set=source.part_wait_ms=60000"]
    result = CliRunner().invoke(app, arguments)
    thread.join(90)
    receivers.close(0.0)
    assert result.exit_code == 0, result.output
    assert [c.parts for c in Capture(file).messages()] == [parts for _, _, parts in sent]


def test_a_series_over_two_sockets_is_one_series(tmp_path: Path) -> None:
    """`--series 2`: two ends on each socket are two series, and both ends of each are there."""
    image = np.zeros((4, 4), np.int32)
    frame = SimFrame(
        payload=compressed(image, "bslz4"), encoding="bslz4", dtype=image.dtype, shape=image.shape
    )
    info = StreamInfo(shape=image.shape, dtype=image.dtype, number_of_images=4)
    detector = Detector("tcp://127.0.0.1:*,tcp://127.0.0.1:*")

    def play() -> None:
        assert detector.wait_for_peer(90)
        detector.run(info, [frame], series=3, protocol="jungfraujoch", images_per_file=1)

    thread = threading.Thread(target=play)
    thread.start()
    file = tmp_path / "run.zcap"
    arguments = ["record", detector.endpoint, str(file), "--socket", "pull", "--series", "2"]
    result = CliRunner().invoke(app, arguments)
    # What the recording left waits for the next reader, and so may the sending of it.
    with zmq.Context() as context, context.socket(zmq.PULL) as next_reader:
        next_reader.setsockopt(zmq.LINGER, 0)
        for address in detector.endpoint.split(","):
            next_reader.connect(address)
        thread.join(90)
    detector.close(0.0)
    assert result.exit_code == 0, result.output
    stream = DectrisStream(2, SeriesBook())
    messages = [
        m for c in Capture(file).messages() for m in stream.take(c.parts, c.received_ns, c.lane)
    ]
    ends = [m.series.series_id for m in messages if m.kind == "end" and m.series is not None]
    assert ends == [info.series_id] * 2 + [info.series_id + 1] * 2
    assert sum(m.kind == "image" for m in messages) >= 8


@pytest.mark.parametrize("command", ["glimpse", "record"])
def test_a_bridge_that_publishes_is_listened_to(tmp_path: Path, command: str) -> None:
    """`--socket` means the bridge's socket where the protocol is Karabo's."""
    bridge = Bridge(socket="pub")
    trains = [Train(train_id=FIRST_TRAIN + n, pixels=np.zeros((2, 4, 4), "f4")) for n in range(2)]

    def send() -> None:
        assert bridge.wait_for_peer(90)
        bridge.run(trains)

    thread = threading.Thread(target=send)
    thread.start()
    file = [str(tmp_path / "run.zcap")] if command == "record" else []
    arguments = [command, bridge.endpoint, *file, "--protocol", "karabo", "--socket", "sub"]
    result = CliRunner().invoke(app, [*arguments, "--messages", "2", "--seconds", "20"])
    thread.join(90)
    bridge.close(0.0)
    assert result.exit_code == 0, result.output
    assert "2 messages" in result.output


@pytest.mark.parametrize(
    ("protocol", "socket"), [("stream2", "req"), ("slsdetector", "pull"), ("karabo", "push")]
)
def test_a_socket_that_the_protocol_does_not_have_is_refused(protocol: str, socket: str) -> None:
    """Before anything is opened."""
    arguments = ["glimpse", "tcp://127.0.0.1:9", "--protocol", protocol, "--socket", socket]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ConfigError)
    assert f"--socket {socket} with {protocol}" in str(result.exception)


def test_nothing_on_the_stream_is_an_error(tmp_path: Path) -> None:
    """A detector that is not armed: exit code 1, and a hint."""
    detector = Detector()
    file = tmp_path / "run.zcap"
    result = CliRunner().invoke(app, ["record", detector.endpoint, str(file), "--seconds", "0.3"])
    detector.close(0.0)
    assert result.exit_code == 1
    assert "--socket pull" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_recording_is_not_overwritten(tmp_path: Path) -> None:
    """A name that is taken: refused before any socket takes a message."""
    file = tmp_path / "run.zcap"
    file.write_bytes(b"precious")
    result = CliRunner().invoke(app, ["record", "tcp://127.0.0.1:9", str(file)])
    assert result.exception is not None
    assert "is there already" in str(result.exception)
    assert file.read_bytes() == b"precious"


def test_a_file_that_is_no_capture_is_refused_before_anybody_waits(tmp_path: Path) -> None:
    """At once, by its name and with what is expected; no reader is waited for."""
    file = tmp_path / "notes.txt"
    file.write_text("cd /somewhere; these are no messages")
    answer = CliRunner().invoke(simulators_app, ["play", str(file)])
    assert answer.exit_code == 2
    assert "notes.txt: ends within a message; expected a capture" in answer.stderr
    assert answer.stdout == ""

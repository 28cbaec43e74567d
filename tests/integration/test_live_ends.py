"""Live runs whose standard error nobody takes, and signals that come while outputs are closed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from simulators.detectors.detector import series_messages
from simulators.detectors.frames import SimFrame, StreamInfo
from triage.control import ask

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 90
PATIENCE_MS = PATIENCE_S * 1000
SIDE_PX = 1024
"""Frames of two megabytes: more of them than the network holds wait in ZeroMQ."""


@pytest.fixture
def ends() -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]:
    """A detector and a writer, not bound yet."""
    context: zmq.Context[Any] = zmq.Context()
    detector, writer = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    yield detector, writer
    detector.close(linger=0)
    writer.close(linger=0)
    context.term()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def a_series(images: int) -> list[tuple[bytes, ...]]:
    image = np.random.default_rng(1).integers(0, 9, (SIDE_PX, SIDE_PX)).astype("<u2")
    frame = SimFrame(payload=image.tobytes(), encoding="raw", dtype=image.dtype, shape=image.shape)
    info = StreamInfo(
        series_id=1, series_unique_id="01J", number_of_images=images, shape=image.shape
    )
    return [tuple(sent.parts) for sent in series_messages(info, [frame])]


def started(folder: Path, detector: str, writer: str, stderr: Any, *more: str) -> Any:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "triage", "run", "--endpoint", detector, "--forward", writer),
            *("--out", str(folder / "out"), "--set", "metrics.port=0"),
            *("--set", "policy.audit_fraction=0", "--set", "compute.workers=1", *more),
        ],
        cwd=ROOT,
        # The variable is no setting, so that there is something to say before anything is read.
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "TRIAGE_SITE": "i04",
        },
        stderr=stderr,
    )


@contextlib.contextmanager
def untaken(how: str) -> Iterator[int]:
    """A file descriptor that takes no text."""
    if how == "full disk":
        with open("/dev/full", "wb", buffering=0) as file:
            yield file.fileno()
        return
    out, into = os.pipe()
    if how == "reader gone":
        os.close(out)
        yield into
        os.close(into)
        return
    os.set_blocking(into, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(into, bytes(4096))
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(into, b"\0")
    os.set_blocking(into, True)
    yield into
    os.close(into)
    os.close(out)


@pytest.mark.parametrize("how", ["full disk", "reader gone", "reader asleep"])
def test_a_run_whose_words_nobody_takes_goes_on_and_ends_in_order(
    tmp_path: Path, ends: tuple[zmq.Socket[bytes], zmq.Socket[bytes]], how: str
) -> None:
    """Every message reaches the writer, SIGTERM drains, and the exit code is that of a run
    without a fault."""
    detector, writer = ends
    source = f"tcp://127.0.0.1:{detector.bind_to_random_port('tcp://127.0.0.1')}"
    target = f"tcp://127.0.0.1:{writer.bind_to_random_port('tcp://127.0.0.1')}"
    sent = a_series(2)
    with untaken(how) as stderr:
        triage = started(tmp_path, source, target, stderr)
        try:
            for message in sent:
                detector.send_multipart(message)
            for message in sent:
                assert writer.poll(PATIENCE_MS)
                assert tuple(writer.recv_multipart()) == message
            triage.send_signal(signal.SIGTERM)
            assert triage.wait(PATIENCE_S) == 0
        finally:
            triage.kill()
            triage.wait(PATIENCE_S)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_after_a_drain_takes_nothing_from_the_writer(
    tmp_path: Path, ends: tuple[zmq.Socket[bytes], zmq.Socket[bytes]], number: signal.Signals
) -> None:
    """An operator drained; the service is stopped or reloaded while ZeroMQ still holds messages
    for a slow writer: all of them arrive, and the report is written."""
    detector, writer = ends
    source = f"tcp://127.0.0.1:{detector.bind_to_random_port('tcp://127.0.0.1')}"
    writer.setsockopt(zmq.RCVHWM, 1)
    writer.setsockopt(zmq.RCVBUF, 65536)
    target = f"tcp://127.0.0.1:{writer.bind_to_random_port('tcp://127.0.0.1')}"
    control = f"tcp://127.0.0.1:{free_port()}"
    sent = a_series(10)
    more = ("--set", f"control.endpoint={control}")
    triage = started(tmp_path, source, target, subprocess.DEVNULL, *more)
    try:
        for message in sent:
            detector.send_multipart(message)
        until_s = time.monotonic() + PATIENCE_S
        while json.loads(ask(control, "state", timeout_s=PATIENCE_S))["state"]["forwarded"] < 10:
            assert time.monotonic() < until_s
        ask(control, "drain", timeout_s=PATIENCE_S)
        while not (tmp_path / "out" / "decisions.parquet").exists():
            assert time.monotonic() < until_s
            assert triage.poll() is None
        triage.send_signal(number)
        for message in sent:
            assert writer.poll(PATIENCE_MS)
            assert tuple(writer.recv_multipart()) == message
        assert triage.wait(PATIENCE_S) == 0
    finally:
        triage.kill()
        triage.wait(PATIENCE_S)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["totals"]["forwarded"] == 10

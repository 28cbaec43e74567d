"""The real process under a service manager's eyes: from start to exit code."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
import pytest
import zmq

from simulators.detectors.detector import series_messages
from simulators.detectors.frames import SimFrame, StreamInfo, compressed
from triage.control import Answer, State, ask

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0
IMAGES = 4


class Manager:
    """Hears what a service tells systemd; keeps what was heard."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heard: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))

    def wait_for(self, text: str, triage: Triage) -> str:
        """The next datagram that holds ``text``, of a process that lives."""
        self._socket.settimeout(1.0)
        until_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.heard.append(self._socket.recv(4096).decode())
            except TimeoutError:
                assert triage.process.poll() is None, triage.ended()
                assert time.monotonic() < until_s, f"{text!r} not told, but {self.heard}"
                continue
            if text in self.heard[-1]:
                return self.heard[-1]

    def rest(self) -> list[str]:
        """What is there after the process has ended."""
        self._socket.setblocking(False)
        while True:
            try:
                self.heard.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                return self.heard

    def close(self) -> None:
        self._socket.close()


class Triage:
    """`triage run` with the settings of a file, and what it says."""

    def __init__(self, file: Path, environ: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "triage", "run", "--quiet", "-c", str(file)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environ},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        self.said: list[str] = []
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, args=(self.process.stderr,))
        self._reader.start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.put(line)

    def wait_for(self, text: str) -> str:
        """The next line on stderr that holds ``text``."""
        until_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.said.append(self._lines.get(timeout=max(0.01, until_s - time.monotonic())))
            except queue.Empty:
                raise AssertionError(f"{text!r} not said, but {''.join(self.said)}") from None
            if text in self.said[-1]:
                return self.said[-1]

    def ended(self) -> tuple[int, str]:
        """Exit code and everything said."""
        code = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        while not self._lines.empty():
            self.said.append(self._lines.get())
        return code, "".join(self.said)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def detector() -> Iterator[zmq.Socket[bytes]]:
    """Not bound yet."""
    context: zmq.Context[Any] = zmq.Context()
    made = context.socket(zmq.PUSH)
    yield made
    made.close(linger=0)
    context.term()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def a_series() -> list[tuple[bytes, ...]]:
    """Start, four images, end."""
    image = np.random.default_rng(1).poisson(1.0, (64, 64)).astype("<u2")
    frame = SimFrame(
        payload=compressed(image, "bslz4"), encoding="bslz4", dtype=image.dtype, shape=image.shape
    )
    info = StreamInfo(
        series_id=1, series_unique_id="01J", number_of_images=IMAGES, shape=image.shape
    )
    return [tuple(sent.parts) for sent in series_messages(info, [frame])]


class Site:
    """Settings in a file, and the addresses in them."""

    def __init__(self, folder: Path, **sections: dict[str, Any]) -> None:
        self.detector, self.control = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
        self.file = folder / "i04.toml"
        self.sections: dict[str, dict[str, Any]] = {
            "source": {"endpoint": self.detector},
            "control": {"endpoint": self.control},
            "metrics": {"port": 0},
            "output": {"directory": str(folder / "out")},
            "policy": {"audit_fraction": 0.0, "p_blank_veto": 0.5},
            "compute": {"workers": 1},
            **sections,
        }
        self.write()

    def write(self) -> None:
        self.file.write_text(
            "\n".join(
                f"[{section}]\n"
                + "\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items())
                for section, values in self.sections.items()
            )
        )

    def asked(self, command: str = "state") -> State:
        answer = msgspec.json.decode(ask(self.control, command, timeout_s=PATIENCE_S), type=Answer)
        assert answer.state is not None, answer.error
        return answer.state

    def until(self, condition: Callable[[State], bool]) -> State:
        """Ask for the state until it is as wanted."""
        turn, until_s = threading.Event(), time.monotonic() + PATIENCE_S
        while not condition(state := self.asked()):
            assert time.monotonic() < until_s, state
            turn.wait(0.05)
        return state


def test_a_service_from_a_start_without_detector_to_a_clean_stop(
    tmp_path: Path, detector: zmq.Socket[bytes], manager: Manager
) -> None:
    """READY once all is bound; no detector is said; armed while a series runs; SIGHUP changes the
    threshold between frames of one series and refuses a broken file; SIGTERM drains, exit 0."""
    site = Site(tmp_path)
    triage = Triage(site.file, {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "4000000"})
    try:
        manager.wait_for("READY=1", triage)
        assert "no detector has connected" in manager.wait_for("degraded (no_detector", triage)
        triage.wait_for("no detector has connected")
        detector.bind(site.detector)
        site.until(lambda state: state.state == "ready")

        series = a_series()
        for parts in series[:3]:
            detector.send_multipart(parts)
        before = site.until(lambda state: state.forwarded == 2)
        assert (before.state, before.series, before.p_blank_veto) == ("armed", ["1 01J"], 0.5)

        site.sections["policy"]["p_blank_veto"] = 0.25
        site.write()
        triage.process.send_signal(signal.SIGHUP)
        assert "MONOTONIC_USEC=" in manager.wait_for("RELOADING=1", triage)
        manager.wait_for("READY=1", triage)
        assert site.asked().p_blank_veto == 0.25
        detector.send_multipart(series[3])
        site.until(lambda state: state.forwarded == 3)

        site.file.write_text("[policy]\np_blank_veto = 7\n")
        triage.process.send_signal(signal.SIGHUP)
        triage.wait_for("the settings stay as they were")
        assert site.asked().p_blank_veto == 0.25

        for parts in series[4:]:
            detector.send_multipart(parts)
        after = site.until(lambda state: state.state == "ready")
        assert (after.forwarded, after.missing, after.series) == (IMAGES, 0, [])
        assert after.policy_id != before.policy_id

        triage.process.send_signal(signal.SIGTERM)
        code, said = triage.ended()
    finally:
        triage.close()
    assert code == 0, said
    assert "ledger balanced: 4 received" in said
    heard = manager.rest()
    assert heard[0].startswith("STATUS=starting")
    assert heard.count("WATCHDOG=1") >= 2
    assert heard.count("STOPPING=1") == 1
    assert _policies(tmp_path) == [before.policy_id] * 2 + [after.policy_id] * 2


def _policies(folder: Path) -> list[str]:
    import pyarrow.parquet as pq

    rows = pq.read_table(folder / "out" / "decisions.parquet").to_pylist()
    assert [row["image_id"] for row in rows] == list(range(IMAGES))
    return [row["policy_id"] for row in rows]


def test_an_operators_word_outlives_a_kill(tmp_path: Path, detector: zmq.Socket[bytes]) -> None:
    """Killed and started anew with settings that drop, a run that was told to stop all drops
    forwards, and says so at its start and in its state, until it is told to drop again."""
    site = Site(tmp_path, policy={"mode": "enforce", "audit_fraction": 0.0, "p_blank_veto": 0.0})
    detector.bind(site.detector)
    series = a_series()
    triage = Triage(site.file, {})
    try:
        site.until(lambda state: state.mode == "enforce")
        assert site.asked("shadow").mode == "shadow"
        triage.process.kill()
    finally:
        triage.close()
    triage = Triage(site.file, {})
    try:
        assert "an operator asked" in triage.wait_for("degraded, shadow_held")
        assert "-> shadow, model" in triage.wait_for("triage: pull")
        for parts in series[:3]:
            detector.send_multipart(parts)
        state = site.until(lambda state: state.forwarded == 2)
        assert (state.mode, state.dropped, state.state) == ("shadow", 0, "degraded")
        assert "resume" in state.degraded["shadow_held"]
        assert site.asked("resume").mode == "enforce"
        for parts in series[3:]:
            detector.send_multipart(parts)
        site.until(lambda state: state.dropped == IMAGES - 2)
        triage.process.send_signal(signal.SIGTERM)
        code, said = triage.ended()
    finally:
        triage.close()
    assert code == 0, said


def test_a_second_signal_gives_up_and_says_what_was_not_released(
    tmp_path: Path, detector: zmq.Socket[bytes]
) -> None:
    """The writer is not there, so a drain cannot end: neither an operator's nor that of SIGINT;
    SIGTERM after it does not wait. Exit code 3, and the report counts what was received and not
    released as undecided."""
    site = Site(tmp_path, forward={"endpoint": f"tcp://127.0.0.1:{free_port()}"})
    triage = Triage(site.file, {})
    try:
        detector.bind(site.detector)
        for parts in a_series():
            detector.send_multipart(parts)
        triage.wait_for("degraded, writer_stalled")
        site.until(lambda state: state.received == IMAGES)
        assert site.asked("drain").state == "draining"
        triage.process.send_signal(signal.SIGINT)
        triage.wait_for("a second signal gives up")
        assert site.asked().undecided == IMAGES
        triage.process.send_signal(signal.SIGTERM)
        code, said = triage.ended()
    finally:
        triage.close()
    assert code == 3, said
    assert "LEDGER DOES NOT BALANCE" in said
    assert "4 received = 0 forwarded + 0 dropped + 4 undecided" in said
    totals = json.loads((tmp_path / "out" / "report.json").read_text())["totals"]
    assert (totals["received"], totals["forwarded"], totals["undecided"]) == (IMAGES, 0, IMAGES)

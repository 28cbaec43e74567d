"""A detector process and a ``triage run`` process on loopback, and what they cost.

Latency is taken from outside: from the moment the detector hands an image to its socket to the
moment its decision arrives at a listener, all on the clock that the processes of a machine share.
CPU time and memory are the operating system's figures of the triage process.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

from triage.bench.frames import PoolSpec
from triage.bench.ours import VETO_FROM
from triage.errors import EnvironmentLacksError

__all__ = ["PLAIN_SETTINGS", "Chain", "Series", "opened_chain"]

_START_S = 180.0
"""Until both processes stand: frames are drawn, kernels compiled, a model loaded."""

_END_S = 60.0
"""Until the report of a series comes after its last image was sent."""

_BEHIND_S = 0.1
"""A detector that lags by more has been held back, and its rate was not reached."""

PLAIN_SETTINGS = ("policy.audit_fraction=0", f"policy.p_blank_veto={VETO_FROM}")
"""For processes whose cost is taken: no spot finder beside, and blank frames are vetoed."""


class _Decision(msgspec.Struct):
    image_id: int
    reason: str


class _Report(msgspec.Struct):
    received: int
    forwarded: int
    dropped: int
    undecided: int
    missing: int
    kept: int
    vetoed: int
    balanced: bool
    by_reason: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Series:
    """What came of one series.

    Attributes:
        behind_s: by how much the detector fell behind its own rate.
        scored: images decided by a score.
        forwarded, dropped, missing: of the ledger of the series.
        balanced: it balanced.
        lost: images sent and not received, or not decided.
        latencies_ms: of each image that was heard of, send to decision.
        cpu_s: CPU time of the triage process from before the first image to after the report.
        by_reason: decisions by reason.
    """

    images: int
    rate_hz: float
    behind_s: float
    scored: int
    forwarded: int
    dropped: int
    missing: int
    balanced: bool
    lost: int
    vetoed: int
    latencies_ms: NDArray[np.float64]
    cpu_s: float
    by_reason: Mapping[str, int]

    @property
    def is_complete(self) -> bool:
        """Every image was sent when due and decided; none went on because time ran out."""
        hurried = sum(self.by_reason.get(reason, 0) for reason in ("late", "overload"))
        return self.lost == 0 and not hurried and self.behind_s < _BEHIND_S

    @property
    def is_on_time(self) -> bool:
        """The same, and every image was decided by its score."""
        return self.is_complete and self.scored == self.images

    def latency_ms(self, share: float) -> float:
        """The latency that this share of images does not exceed; NaN without any."""
        if not self.latencies_ms.size:
            return float("nan")
        return float(np.quantile(self.latencies_ms, share))


class Chain:
    """Both processes; made by :func:`opened_chain`."""

    def __init__(
        self,
        detector: subprocess.Popen[str],
        triage: subprocess.Popen[str],
        listener: zmq.Socket[Any],
        writer: _Writer | None = None,
    ) -> None:
        self._detector = detector
        self._triage = triage
        self._listener = listener
        self._writer = writer
        self._last_series = 0
        self._told_messages = 0

    @property
    def told_messages(self) -> int:
        """Messages that triage says it forwarded so far, starts and ends among them."""
        return self._told_messages

    @property
    def forwarded_messages(self) -> int:
        """Messages that the writer took so far, starts and ends among them."""
        return self._writer.messages if self._writer is not None else 0

    @property
    def resident_bytes(self) -> int:
        """Memory of the triage process."""
        return _resident_bytes(self._triage.pid)

    @property
    def open_files(self) -> int:
        """File handles of the triage process, sockets among them."""
        return _entries(self._triage.pid, "fd")

    @property
    def threads(self) -> int:
        """Threads of the triage process."""
        return _entries(self._triage.pid, "task")

    def send(self, frames: int, rate_hz: float, *, started: bool = True) -> Series:
        """Send one series and wait for its ledger.

        Args:
            started: with a start message; without one its frames go on unscored.

        Raises:
            EnvironmentLacksError: a process ended, or the ledger does not come.
        """
        self._last_series += 1
        series_id = self._last_series
        began_cpu_s = _cpu_s(self._triage.pid)
        order = {"series_id": series_id, "frames": frames, "rate_hz": rate_hz, "started": started}
        answers: queue.Queue[str] = queue.Queue()
        stdin, stdout = self._detector.stdin, self._detector.stdout
        if stdin is None or stdout is None:
            raise EnvironmentLacksError("bench: the detector process has no pipes")
        stdin.write(json.dumps(order) + "\n")
        stdin.flush()
        reader = threading.Thread(target=lambda: answers.put(stdout.readline()), daemon=True)
        reader.start()
        heard, report = self._listen(series_id, frames / rate_hz + _END_S)
        cpu_s = _cpu_s(self._triage.pid) - began_cpu_s
        self._told_messages += report.forwarded + started + 1
        try:
            sent = json.loads(answers.get(timeout=_END_S))
        except (queue.Empty, ValueError) as err:
            raise EnvironmentLacksError("bench: the detector process gave no answer") from err
        sent_ns = np.array(sent["sent_ns"], np.int64)
        latencies = np.array([at - sent_ns[i] for i, at in heard.items()], np.float64) * 1e-6
        return Series(
            images=frames,
            rate_hz=frames / sent["elapsed_s"] if sent["elapsed_s"] else rate_hz,
            behind_s=sent["behind_s"],
            scored=report.by_reason.get("score", 0),
            forwarded=report.forwarded,
            dropped=report.dropped,
            missing=report.missing,
            balanced=report.balanced,
            lost=frames - report.forwarded - report.dropped,
            vetoed=report.vetoed,
            latencies_ms=latencies,
            cpu_s=cpu_s,
            by_reason=report.by_reason,
        )

    def _listen(self, series_id: int, seconds: float) -> tuple[dict[int, int], _Report]:
        """Arrival of each decision, and the series' ledger."""
        decisions: dict[int, int] = {}
        read_decision = msgspec.json.Decoder(_Decision).decode
        end = b"series_report/1/%d/" % series_id
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            if self._triage.poll() is not None:
                break
            if not self._listener.poll(200):
                continue
            topic, body = self._listener.recv_multipart()
            now_ns = time.monotonic_ns()
            if topic == end:
                return decisions, msgspec.json.decode(body, type=_Report)
            if topic.startswith(b"decision/"):
                decisions[read_decision(body).image_id] = now_ns
        raise EnvironmentLacksError(
            f"bench: no ledger of series {series_id} within {seconds:.0f} s; heard of "
            f"{len(decisions)} decisions; run triage run by hand to see why"
        )


@contextlib.contextmanager
def opened_chain(spec: PoolSpec, settings: Sequence[str] = (), *, writer: bool) -> Iterator[Chain]:
    """Start a detector of ``spec`` and a ``triage run`` that reads it; stop both at the end.

    Args:
        settings: as for ``--set``.
        writer: frames are forwarded, and a thread of this process takes them.

    Raises:
        EnvironmentLacksError: a process does not start, or this is not Linux.
    """
    if not Path("/proc/self/stat").exists():
        raise EnvironmentLacksError("bench live: CPU time of another process needs Linux's /proc")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="triage-bench-"))
        detector = stack.enter_context(_process(_detector_command(spec)))
        endpoint = json.loads(_first_line(detector))["endpoint"]
        context: zmq.Context[Any] = zmq.Context()
        stack.callback(context.term)
        announced = f"ipc://{folder}/decisions"
        command = [
            *(sys.executable, "-m", "triage", "run", "--quiet", "--endpoint", endpoint),
            *("--set", f"publish.endpoint={announced}", "--set", "metrics.port=0"),
        ]
        taking = None
        if writer:
            taking = stack.enter_context(_Writer(context))
            command += ["--forward", taking.endpoint]
        for setting in settings:
            command += ["--set", setting]
        triage = stack.enter_context(_process(command))
        listener = context.socket(zmq.SUB)
        stack.callback(listener.close)
        listener.setsockopt(zmq.RCVHWM, 0)
        listener.setsockopt(zmq.SUBSCRIBE, b"")
        listener.connect(announced)
        _wait_for_hello(listener, triage)
        yield Chain(detector, triage, listener, taking)


def _detector_command(spec: PoolSpec) -> list[str]:
    return [sys.executable, "-m", "triage.bench.detector", json.dumps(asdict(spec))]


@contextlib.contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # A Ctrl-C is for this process, which then ends the others in order.
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class _Writer:
    """A PULL socket that takes all that is forwarded, and counts."""

    def __init__(self, context: zmq.Context[Any]) -> None:
        self._socket = context.socket(zmq.PULL)
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self.messages = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._take, name="writer")

    def _take(self) -> None:
        while not self._stop.is_set():
            while self._socket.poll(100):
                self._socket.recv(copy=False)
                self.messages += 1

    def __enter__(self) -> _Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._socket.close()


def _first_line(process: subprocess.Popen[str]) -> str:
    line = process.stdout.readline() if process.stdout is not None else ""
    if not line:
        raise EnvironmentLacksError(
            f"bench: {process.args!r} ended before it was ready; run it by hand to see why"
        )
    return line


def _wait_for_hello(listener: zmq.Socket[Any], triage: subprocess.Popen[str]) -> None:
    """Greeted means: the pipeline runs and our subscription has reached it."""
    until_s = time.monotonic() + _START_S
    while time.monotonic() < until_s and triage.poll() is None:
        if listener.poll(200):
            listener.recv_multipart()
            return
    raise EnvironmentLacksError(
        f"bench: {triage.args!r} sends no greeting; run it by hand to see why"
    )


def _cpu_s(pid: int) -> float:
    """User and system time of a process, all threads, to a hundredth of a second."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError as err:
        raise EnvironmentLacksError(f"bench: process {pid} is gone: {err}") from err
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _entries(pid: int, what: str) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/{what}"))
    except OSError as err:
        raise EnvironmentLacksError(f"bench: process {pid} is gone: {err}") from err


def _resident_bytes(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError as err:
        raise EnvironmentLacksError(f"bench: process {pid} is gone: {err}") from err
    return pages * os.sysconf("SC_PAGE_SIZE")

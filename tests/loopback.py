"""Three processes on loopback: ``triage-sim``, ``triage run`` and a writer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import zmq

__all__ = ["Writer", "run_chain"]

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


class Writer:
    """Takes whatever comes on a PULL socket until told to stop."""

    def __init__(self) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self.messages: list[tuple[bytes, ...]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._receive)
        self._thread.start()

    def _receive(self) -> None:
        while True:
            if self._socket.poll(100):
                self.messages.append(tuple(self._socket.recv_multipart()))
            elif self._stop.is_set():
                return

    def close(self) -> None:
        self._stop.set()
        self._thread.join(30)
        self._socket.close()
        self._context.term()


def run_chain(out: Path, detector: list[str], triage: list[str]) -> tuple[dict[str, Any], str]:
    """One series through ``triage run``, stopped by SIGTERM when all was sent.

    Args:
        detector, triage: further options of either.

    Returns:
        The report in ``out``, and what triage said.
    """
    sender = subprocess.Popen(
        [*(sys.executable, "-m", "simulators", "detector", "--wait-for-peer", "90"), *detector],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert sender.stdout is not None
    endpoint = json.loads(sender.stdout.readline())["endpoint"]
    running = subprocess.Popen(
        [
            *(sys.executable, "-m", "triage", "run", "--quiet", "--endpoint", endpoint),
            *("--out", str(out), "--set", "pipeline.deadline_ms=20000"),
            *("--set", "metrics.port=0", *triage),
        ],
        cwd=ROOT,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    sender.wait(100)
    sender.stdout.close()
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=280)
    assert running.returncode == 0, said
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report, said

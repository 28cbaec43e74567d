"""``triage run`` as a process, with what [forward] asks for, between a detector and writers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from strict_reader import array, strictly

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
FRAMES = 24


class Writer:
    """Takes whatever comes on a PULL socket until told to stop."""

    def __init__(self) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self.messages: list[bytes] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._receive)
        self._thread.start()

    def _receive(self) -> None:
        while True:
            if self._socket.poll(100):
                self.messages.append(self._socket.recv())
            elif self._stop.is_set():
                return

    def close(self) -> None:
        self._stop.set()
        self._thread.join(30)
        self._socket.close()
        self._context.term()


@pytest.fixture
def writers() -> Iterator[list[Writer]]:
    running = [Writer(), Writer()]
    yield running
    for writer in running:
        writer.close()


def run(tmp_path: Path, *settings: str) -> dict[str, Any]:
    """A series from ``triage-sim`` through ``triage run``; its report."""
    detector = subprocess.Popen(
        [
            *(sys.executable, "-m", "simulators", "detector", "--wait-for-peer", "90"),
            *("--frames", str(FRAMES), "--rate", "40", "--shape", "512", "512"),
            *("--blank-share", "0.7", "--seed", "5"),
        ],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert detector.stdout is not None
    endpoint = json.loads(detector.stdout.readline())["endpoint"]
    options = [part for setting in settings for part in ("--set", setting)]
    triage = subprocess.Popen(
        [
            *(sys.executable, "-m", "triage", "run", "--quiet", "--endpoint", endpoint),
            *("--out", str(tmp_path / "out"), "--set", "pipeline.deadline_ms=20000"),
            *("--set", "metrics.port=0", "--set", "policy.p_blank_veto=0.5", *options),
        ],
        cwd=ROOT,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    detector.wait(100)
    detector.stdout.close()
    triage.send_signal(signal.SIGTERM)
    _, said = triage.communicate(timeout=60)
    assert triage.returncode == 0, said
    report: dict[str, Any] = json.loads((tmp_path / "out" / "report.json").read_text())
    return report


def test_two_writers_share_a_series_of_verdicts_and_placeholders(
    tmp_path: Path, writers: list[Writer]
) -> None:
    """Every id reaches one of them, dropped ones as placeholders; both hear start and totals."""
    endpoint = ",".join(writer.endpoint for writer in writers)
    report = run(
        tmp_path,
        f"forward.endpoint={endpoint}",
        "forward.vetoed=placeholder",
        "forward.verdict=user_data",
        "policy.mode=enforce",
        "policy.audit_fraction=0",
    )
    totals, seen, skipped = report["totals"], [], []
    for writer in writers:
        start, *images, end = [strictly(message) for message in writer.messages]
        assert (start["type"], end["type"]) == ("start", "end")
        told = end["user_data"]["triage"]
        assert (told["received"], told["dropped"]) == (FRAMES, totals["dropped"])
        assert images
        for image in images:
            seen.append(image["image_id"])
            verdict = image["user_data"]["triage"]["verdict"]
            (pixels,) = (array(data) for data in image["data"].values())
            if pixels.shape == (1, 8):
                skipped.append(image["image_id"])
                assert (pixels.tobytes(), verdict) == (b"SKIPPED\0", "veto")
            else:
                assert (pixels.shape, verdict) == ((512, 512), "keep")
            assert "truth" in image["user_data"]["user_data"]
    assert sorted(seen) == list(range(FRAMES))
    journal = (tmp_path / "out" / "journal.jsonl").read_text().splitlines()
    assert sorted(skipped) == sorted(json.loads(line)["image_id"] for line in journal)
    assert len(skipped) == totals["dropped"] > 0


def test_a_tee_writes_everything_and_decides_beside(tmp_path: Path, writers: list[Writer]) -> None:
    """The writer has the series whole; the report has verdicts, and all of it forwarded."""
    writer = writers[0]
    report = run(tmp_path, f"forward.endpoint={writer.endpoint}", "forward.tee=true")
    read = [strictly(message) for message in writer.messages]
    assert [m["type"] for m in read] == ["start", *["image"] * FRAMES, "end"]
    assert [m["image_id"] for m in read[1:-1]] == list(range(FRAMES))
    totals = report["totals"]
    assert (totals["received"], totals["forwarded"]) == (FRAMES, FRAMES)
    assert totals["by_override"]["shadow"] == totals["vetoed"] > 0

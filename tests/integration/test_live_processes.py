"""Three processes on loopback: detector, triage, and a writer that is a plain PULL socket."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cbor2
import pyarrow.parquet as pq
import pytest
import zmq

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
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


@pytest.fixture
def writer() -> Iterator[Writer]:
    running = Writer()
    yield running
    running.close()


def read_zcap(path: Path) -> list[tuple[bytes, ...]]:
    """Messages of a capture: u32 parts, then u64 length and bytes per part, little-endian."""
    data, at, messages = path.read_bytes(), 0, []
    while at < len(data):
        (count,) = struct.unpack_from("<I", data, at)
        at += 4
        parts = []
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", data, at)
            at += 8
            parts.append(data[at : at + length])
            at += length
        messages.append(tuple(parts))
    return messages


def run_chain(tmp_path: Path, writer: Writer, *detector_options: str) -> dict[str, Any]:
    """Detector -> triage run (enforce) -> writer; stops triage by SIGTERM when all was sent."""
    detector = subprocess.Popen(
        [
            *(sys.executable, "-m", "simulators", "detector"),
            *("--wait-for-peer", "90", "--record", str(tmp_path / "sent.zcap")),
            *detector_options,
        ],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert detector.stdout is not None
    endpoint = json.loads(detector.stdout.readline())["endpoint"]
    triage = subprocess.Popen(
        [
            *(sys.executable, "-m", "triage", "run", "--quiet", "--mode", "enforce"),
            *("--endpoint", endpoint, "--forward", writer.endpoint),
            *("--out", str(tmp_path / "out"), "--set", "pipeline.deadline_ms=20000"),
            *("--set", "metrics.port=0"),
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
    assert "ledger balanced" in said
    report: dict[str, Any] = json.loads((tmp_path / "out" / "report.json").read_text())
    return report


def body(message: tuple[bytes, ...]) -> dict[str, Any]:
    decoded = cbor2.loads(message[0].removeprefix(b"\xd9\xd9\xf7"))
    assert isinstance(decoded, dict)
    return decoded


@pytest.mark.shared
@pytest.mark.skipif(not (SHARED / "real").is_dir(), reason="needs ../shared/real")
def test_real_eiger_frames_pass_byte_for_byte_and_drops_are_accounted(
    tmp_path: Path, writer: Writer
) -> None:
    """What the writer gets is what was sent, less the drops in the journal, in order."""
    real = SHARED / "real"
    report = run_chain(
        tmp_path,
        writer,
        *("--frames", "30", "--rate", "5"),
        *("--from", str(real / "eiger4M_dark_hotpixels_lz4.h5")),
        *("--from", str(real / "eiger4M_hdf5plugin_bitshuffle.h5")),
    )
    sent = read_zcap(tmp_path / "sent.zcap")
    journal_path = tmp_path / "out" / "journal.jsonl"
    dropped = {json.loads(line)["image_id"] for line in journal_path.read_text().splitlines()}
    expected = [m for m in sent if body(m)["type"] != "image" or body(m)["image_id"] not in dropped]
    assert writer.messages == expected
    kinds = [body(m)["type"] for m in writer.messages]
    assert (kinds[0], kinds[-1]) == ("start", "end")
    assert (kinds.count("start"), kinds.count("end")) == (1, 1)
    totals = report["totals"]
    assert (totals["received"], totals["dropped"]) == (30, len(dropped))
    assert totals["forwarded"] == kinds.count("image") == 30 - len(dropped)
    rows = pq.read_table(tmp_path / "out" / "decisions.parquet").to_pylist()
    assert [r["image_id"] for r in rows] == list(range(30))
    assert {r["image_id"] for r in rows if not r["forwarded"]} == dropped


@pytest.mark.parametrize("protocol", ["stream2", "stream1"])
def test_simulated_frames_pass_through_both_protocols(
    tmp_path: Path, writer: Writer, protocol: str
) -> None:
    """Every part of every forwarded message is one of those sent, in the order sent."""
    report = run_chain(
        tmp_path,
        writer,
        *("--protocol", protocol, "--frames", "24", "--rate", "20"),
        *("--shape", "512", "512", "--seed", "3"),
    )
    sent = read_zcap(tmp_path / "sent.zcap")
    remaining = iter(sent)
    assert all(message in remaining for message in writer.messages), "order or bytes differ"
    assert report["totals"]["received"] == 24
    assert len(writer.messages) == len(sent) - report["totals"]["dropped"]

"""tickit-devices' EIGER, Diamond's emulator with the detector's own REST interface, Stream V1.

It needs cbor2 < 6 and so an environment of its own; its command ``tickit`` is found on PATH or
named by the variable ``TRIAGE_TICKIT``.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from triage.backends import open_backend
from triage.ingest.subscriber import Subscriber
from triage.records import Message

TICKIT = os.environ.get("TRIAGE_TICKIT") or shutil.which("tickit")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        TICKIT is None, reason="needs tickit-devices in an environment of its own: TRIAGE_TICKIT"
    ),
]


def free_ports(n: int) -> list[int]:
    probes = [socket.socket() for _ in range(n)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Emulator:
    """The process, and its REST interface."""

    def __init__(self, folder: Path) -> None:
        self.port, self.stream1_port, cbor_port = free_ports(3)
        (folder / "eiger.yaml").write_text(
            "- type: tickit_devices.eiger.Eiger\n  inputs: {}\n  name: eiger\n"
            f"  host: 127.0.0.1\n  port: {self.port}\n  stream_host: 127.0.0.1\n"
            f"  stream_legacy_port: {self.stream1_port}\n  stream_cbor_port: {cbor_port}\n"
        )
        self._process = subprocess.Popen(
            [str(TICKIT), "all", "eiger.yaml"],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def put(self, path: str, value: object = None) -> bool:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{path}",
            data=None if value is None else json.dumps({"value": value}).encode(),
            method="PUT",
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as err:
            err.close()
            return False
        except OSError:
            return False

    def close(self) -> None:
        self._process.kill()
        self._process.wait(20)


@pytest.fixture
def emulator(tmp_path: Path) -> Iterator[Emulator]:
    running = Emulator(tmp_path)
    yield running
    running.close()


def test_a_series_of_a_16m_eiger_is_read(emulator: Emulator) -> None:
    """Armed and triggered over REST: three frames with the vendor file's masked pixels."""
    until = time.monotonic() + 60
    while not emulator.put("detector/api/1.8.0/command/initialize"):
        assert time.monotonic() < until, "tickit did not answer"
    source = Subscriber(f"tcp://127.0.0.1:{emulator.stream1_port}")
    assert emulator.put("detector/api/1.8.0/config/trigger_mode", "ints")
    assert emulator.put("detector/api/1.8.0/config/nimages", 3)
    assert emulator.put("stream/api/1.8.0/config/mode", "enabled")
    messages: list[Message] = []
    # One run in three to another receiver got nothing for no known reason: arm twice at most.
    for _ in range(2):
        assert emulator.put("detector/api/1.8.0/command/arm")
        assert emulator.put("detector/api/1.8.0/command/trigger")
        until = time.monotonic() + 20
        while time.monotonic() < until and not any(m.kind == "end" for m in messages):
            messages += source.receive(100)
        if messages:
            break
    source.close()
    frames = [m.frame for m in messages if m.frame is not None]
    assert [f.image_id for f in frames] == [0, 1, 2]
    for frame in frames:
        assert frame.fault is None
        pixels = open_backend("cpu").decode(frame)
        assert pixels.shape == (4362, 4148)
        assert int((pixels == 65535).sum()) == 1253074
        assert int(pixels[pixels < 65534].sum()) == 9876

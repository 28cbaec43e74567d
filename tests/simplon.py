"""Emulators of a detector's control unit: a process, driven as a beamline drives the detector."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from triage.ingest.subscriber import Subscriber
from triage.records import Message


def free_ports(n: int) -> list[int]:
    """TCP ports of loopback that nobody listens on."""
    probes = [socket.socket() for _ in range(n)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Emulator:
    """A SIMPLON emulator as a process, with its REST interface of version ``api`` on ``port``."""

    def __init__(self, command: Sequence[str], folder: Path, port: int, api: str) -> None:
        self._base = f"http://127.0.0.1:{port}"
        self._api = api
        self._process = subprocess.Popen(
            list(command), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def put(self, path: str, value: object = None) -> bool:
        """Whether ``subsystem/...`` took a command, or a value."""
        subsystem, _, rest = path.partition("/")
        request = urllib.request.Request(
            f"{self._base}/{subsystem}/api/{self._api}/{rest}",
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

    def initialize(self) -> None:
        """Wait until the process answers."""
        until = time.monotonic() + 60
        while not self.put("detector/command/initialize"):
            assert time.monotonic() < until, "the emulator did not answer"

    def series(self, source: Subscriber, images: int) -> list[Message]:
        """Arm, trigger, and receive up to the end of a series of so many images."""
        messages: list[Message] = []
        # One run in three to another receiver got nothing for no known reason, and on a loaded
        # machine series lacked their beginning or two of three images: arm three times at most.
        for _ in range(3):
            messages = []
            assert self.put("detector/command/arm")
            assert self.put("detector/command/trigger")
            until = time.monotonic() + 20
            while time.monotonic() < until and not any(m.kind == "end" for m in messages):
                messages += source.receive(100)
                while messages and messages[0].kind != "start":
                    # Of the series before, or of one whose beginning was lost.
                    messages.pop(0)
            if [m.kind for m in messages].count("image") == images and messages[-1].kind == "end":
                break
        return messages

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait(20)

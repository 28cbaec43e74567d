"""Emulators of a detector's control unit: a process, driven as a beamline drives the detector."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import closing
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
        self._command = list(command)
        self._folder = folder
        self._base = f"http://127.0.0.1:{port}"
        self._api = api

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

    def series(self, set_up: Callable[[Emulator], Subscriber], images: int) -> list[Message]:
        """The messages of one series of so many images, from beginning to end.

        ``set_up`` configures a process that was just started, and opens its stream. On a loaded
        machine emulators leave out the beginning or some of the images, or never end, one series
        in twenty, and a process that did so once goes on doing it: five are tried at most.
        """
        messages: list[Message] = []
        for _ in range(5):
            process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                with closing(set_up(self)) as source:
                    messages = self._run_one(source)
            finally:
                process.kill()
                process.wait(20)
            kinds = [m.kind.value for m in messages]
            if kinds.count("image") == images and kinds[-1] == "end":
                break
        return messages

    def _run_one(self, source: Subscriber) -> list[Message]:
        """Arm, trigger, and receive from the beginning of a series to its end."""
        messages: list[Message] = []
        if self.put("detector/command/arm") and self.put("detector/command/trigger"):
            until = time.monotonic() + 20
            while time.monotonic() < until and not any(m.kind == "end" for m in messages):
                messages += source.receive(100)
                while messages and messages[0].kind != "start":
                    messages.pop(0)
        return messages

"""Tells the service manager what a process is doing: the protocol of sd_notify(3).

A datagram of ``KEY=value`` lines to the socket named by ``NOTIFY_SOCKET``. Without that variable
nothing is sent, and a message that cannot be sent is left out: a service manager that does not
listen must not hold up a frame.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

__all__ = ["Notifier"]


class Notifier:
    """The end of the notification socket that belongs to the service. Used from one thread.

    Args:
        environ: where ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID`` stand.

    Attributes:
        watchdog_s: seconds within which :meth:`watchdog` must be called, or the service manager
            ends the process; 0 when it does not watch.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self.watchdog_s = _watchdog_s(environ)
        self._status = ""
        address = environ.get("NOTIFY_SOCKET", "")
        self._socket: socket.socket | None = None
        if address.startswith(("/", "@")) and len(address) > 1:
            # A name that begins with @ is in the abstract space, where it begins with a zero.
            self._address = "\0" + address[1:] if address[0] == "@" else address
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)

    @property
    def supervised(self) -> bool:
        """Whether a service manager listens."""
        return self._socket is not None

    def ready(self) -> None:
        """Start or reload is complete."""
        self._send("READY=1")

    def status(self, text: str) -> None:
        """One line for people, as ``systemctl status`` shows it; sent when it changed."""
        if text != self._status:
            self._status = text
            self._send(f"STATUS={' '.join(text.split())}")

    def reloading(self) -> None:
        """A reload begins; :meth:`ready` ends it."""
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send(f"RELOADING=1\nMONOTONIC_USEC={now_us}")

    def stopping(self) -> None:
        """The process is on its way out."""
        self._send("STOPPING=1")

    def watchdog(self) -> None:
        """The process makes progress."""
        if self.watchdog_s:
            self._send("WATCHDOG=1")

    def _send(self, text: str) -> None:
        if self._socket is not None:
            try:
                self._socket.sendto(text.encode(), self._address)
            except OSError:
                return

    def close(self) -> None:
        """Send no more; may be called twice."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _watchdog_s(environ: Mapping[str, str]) -> float:
    usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not usec.isdecimal() or (pid and pid != str(os.getpid())):
        return 0.0
    return int(usec) * 1e-6

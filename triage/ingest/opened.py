"""The sockets of a source that reads several in one way, until it is closed."""

from __future__ import annotations

from typing import Any

import zmq

from triage.errors import ConfigError
from triage.records import LARGEST_MESSAGE_BYTES
from triage.sockets import Connections

__all__ = ["OpenedSockets"]


class OpenedSockets:
    """What is the same for every live source with a socket for each address.

    Args:
        context: of the sockets; None for one of its own.
        io_threads: threads of ZeroMQ that read connections; without effect on a given context.
    """

    def __init__(self, context: zmq.Context[Any] | None, io_threads: int) -> None:
        self._own_context = context is None
        self._context = context or zmq.Context(io_threads)
        self._sockets: list[zmq.Socket[bytes]] = []
        self._connections = Connections()

    def _open(
        self, address: str, kind: int, held: int, *, bind: bool = False, expected: str
    ) -> zmq.Socket[bytes]:
        """One more socket; a SUB one hears all.

        Args:
            held: messages that ZeroMQ may hold of it.
            expected: an address, in words, for the error.

        Raises:
            ConfigError: the address cannot be used; all sockets are closed then.
        """
        opened: zmq.Socket[bytes] = self._context.socket(kind)
        self._sockets.append(opened)
        # Read at connect or bind: set first.
        opened.setsockopt(zmq.RCVHWM, held)
        # The library makes room for what a peer announces, before any of it came.
        opened.setsockopt(zmq.MAXMSGSIZE, LARGEST_MESSAGE_BYTES)
        opened.setsockopt(zmq.RCVTIMEO, 0)
        opened.setsockopt(zmq.LINGER, 0)
        self._connections.watch(opened)
        if kind == zmq.SUB:
            opened.setsockopt(zmq.SUBSCRIBE, b"")
        try:
            if bind:
                opened.bind(address)
            else:
                opened.connect(address)
        except zmq.ZMQError as err:
            self.close()
            raise ConfigError(
                f"[source] endpoint = {address!r}: {err}; expected {expected}"
            ) from err
        return opened

    def connected(self) -> tuple[int, int]:
        """How many sockets have a peer now, and how many there are; asked by one thread, any."""
        return self._connections.connected()

    @property
    def exhausted(self) -> bool:
        """Never: a detector may arm again."""
        return False

    def close(self) -> None:
        """Close the sockets; may be called twice."""
        self._connections.close()
        for socket in self._sockets:
            socket.close()
        if self._own_context:
            self._context.term()

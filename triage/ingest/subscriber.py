"""Receives a detector's stream over ZeroMQ, without copying payloads.

PUSH is no tee: a PULL socket takes messages away from every other reader, and a second PULL
steals start messages. SUB never steals, and loses without telling: gaps in image_id show it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import zmq

from triage.errors import ConfigError
from triage.ingest.series import SeriesBook
from triage.ingest.stream1 import Stream1Parser
from triage.ingest.stream2 import Stream2Parser
from triage.records import Message

__all__ = ["Subscriber"]

_MESSAGES_PER_CALL = 32
_SOCKETS = {"pull": zmq.PULL, "sub": zmq.SUB}
_PROTOCOLS = ("auto", "stream2", "stream1")


class Subscriber:
    """A live source: one socket, either DECTRIS protocol.

    Args:
        endpoint: detector's address, or where to bind.
        socket: ``pull`` or ``sub``.
        bind: bind instead of connect; the detector then connects to us.
        protocol: ``auto`` tells each message by its first byte.
        channel: Stream V2 channel to score, "" for the first.
        queue_bytes: twice what ZeroMQ may hold before a PULL holds the detector back.
        message_bytes: largest message expected: marks count messages, not bytes. They are set
            once, because libzmq may stall for good when a mark is raised on a full connection.
        io_threads: threads of ZeroMQ that read connections; without effect on a given context.

    Raises:
        ConfigError: an address or kind of socket that cannot be used.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        socket: str = "pull",
        bind: bool = False,
        protocol: str = "auto",
        channel: str = "",
        queue_bytes: int = 2 << 30,
        message_bytes: int = 16 << 20,
        io_threads: int = 1,
        clock: Callable[[], int] = time.monotonic_ns,
        context: zmq.Context[Any] | None = None,
    ) -> None:
        if socket not in _SOCKETS or protocol not in _PROTOCOLS:
            raise ConfigError(
                f"[source] socket = {socket!r}, protocol = {protocol!r}; expected pull or sub, "
                f"and one of {', '.join(_PROTOCOLS)}"
            )
        self._clock = clock
        self._protocol = protocol
        book = SeriesBook()
        self._stream1 = Stream1Parser(book)
        self._stream2 = Stream2Parser(channel, book)
        self._own_context = context is None
        self._context = context or zmq.Context(io_threads)
        self._socket = self._context.socket(_SOCKETS[socket])
        # Read at connect or bind: set first.
        self._socket.setsockopt(zmq.RCVHWM, max(4, queue_bytes // 2 // message_bytes))
        self._timeout_ms = 0
        self._socket.setsockopt(zmq.RCVTIMEO, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        if socket == "sub":
            self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        try:
            if bind:
                self._socket.bind(endpoint)
            else:
                self._socket.connect(endpoint)
        except zmq.ZMQError as err:
            self.close()
            raise ConfigError(
                f"[source] endpoint = {endpoint!r}: {err}; expected an address to "
                f"{'bind' if bind else 'connect to'} such as tcp://127.0.0.1:31001"
            ) from err
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def receive(self, timeout_ms: int) -> list[Message]:
        """What is there, waiting up to ``timeout_ms`` for the first message."""
        if timeout_ms != self._timeout_ms:
            self._socket.setsockopt(zmq.RCVTIMEO, timeout_ms)
            self._timeout_ms = timeout_ms
        received: list[tuple[list[zmq.Frame], int]] = []
        flags = 0
        try:
            while len(received) < _MESSAGES_PER_CALL:
                parts = [self._socket.recv(flags, copy=False)]
                while parts[-1].more:
                    parts.append(self._socket.recv(flags, copy=False))
                received.append((parts, self._clock()))
                flags = zmq.NOBLOCK
        except zmq.Again:
            pass
        return [self._parsed(parts, received_ns) for parts, received_ns in received]

    def _parsed(self, parts: list[zmq.Frame], received_ns: int) -> Message:
        json_first = bytes(parts[0].buffer[:1]) == b"{"
        if self._protocol == "stream1" or (self._protocol == "auto" and json_first):
            return self._stream1.parse(parts, received_ns)
        return self._stream2.parse(parts, received_ns)

    @property
    def exhausted(self) -> bool:
        """Never: a detector may arm again."""
        return False

    def close(self) -> None:
        """Close the socket; may be called twice."""
        self._socket.close()
        if self._own_context:
            self._context.term()

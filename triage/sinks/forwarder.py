"""Sends messages on to the file writer: PUSH, the parts as received, in order.

Invariant: a message handed to :meth:`Forwarder.send` is either accepted by ZeroMQ whole, or
still the caller's. Nothing is buffered here; when the writer stalls, the caller's queue grows
to the byte budget and the detector is held back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import zmq

from triage.errors import ConfigError

__all__ = ["Forwarder"]

_LINGER_MS = 30_000
"""How long a close waits for the writer to take what ZeroMQ still holds."""


class Forwarder:
    """A PUSH socket to one writer. Used from one thread.

    Args:
        endpoint: where the writer listens, or where to bind for it.
        bind: bind instead of connect.
        held_bytes: what ZeroMQ may hold beside the byte budget of the line.
        message_bytes: largest message expected: marks count messages, not bytes.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        bind: bool = False,
        held_bytes: int = 256 << 20,
        message_bytes: int = 16 << 20,
        context: zmq.Context[Any] | None = None,
    ) -> None:
        self._own_context = context is None
        self._context = context or zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, max(4, held_bytes // message_bytes))
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        # Without this, a connecting PUSH queues for a writer that is not there.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        try:
            if bind:
                self._socket.bind(endpoint)
            else:
                self._socket.connect(endpoint)
        except zmq.ZMQError as err:
            self.close(abandon=True)
            raise ConfigError(
                f"[forward] endpoint = {endpoint!r}: {err}; expected an address to "
                f"{'bind' if bind else 'connect to'} such as tcp://127.0.0.1:31003"
            ) from err
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def send(self, parts: Sequence[Any], timeout_ms: int) -> bool:
        """Hand one message to ZeroMQ, without copying it.

        False when no writer could take it in ``timeout_ms``.
        """
        if self._sent(parts):
            return True
        # A wait costs more than a try that succeeds, so it comes second.
        return bool(self._socket.poll(timeout_ms, zmq.POLLOUT)) and self._sent(parts)

    def _sent(self, parts: Sequence[Any]) -> bool:
        last = len(parts) - 1
        try:
            for i, part in enumerate(parts):
                # What follows a part that was taken is taken.
                flags = zmq.NOBLOCK if i == last else zmq.NOBLOCK | zmq.SNDMORE
                self._socket.send(part, flags, copy=False)
        except zmq.Again:
            return False
        return True

    def close(self, *, abandon: bool = False) -> None:
        """Close, waiting for the writer to take what is queued unless ``abandon``."""
        self._socket.close(linger=0 if abandon else None)
        if self._own_context:
            self._context.term()

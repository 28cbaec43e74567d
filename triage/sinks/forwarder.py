"""Sends messages on to the file writers: PUSH, the parts as received, in order.

Invariant: a message handed to :meth:`Forwarder.send` is either with ZeroMQ, once for each writer
that it is meant for, or still the caller's. No image is buffered here.

What happens when a writer takes nothing any more:

- One writer, or ``lane``: the message stays with the caller, however long it takes. The line
  grows to its byte budget, then the detector is held back; nothing is lost.
- ``round_robin``: images go to the writers that take them. What every writer must hear (start,
  end, and whatever is no image) is owed to one that does not take it: it gets that first, in
  order, and no image before. ``send`` waits for it for ``writer_timeout_s`` since it last took
  anything; then it is left out, loudly, and the others go on without waiting for it. When it takes
  messages again it is told what it missed, less the series that it missed whole, and gets images
  again. The last writer that takes messages is never left out: with none, the caller waits as with
  one.

What ZeroMQ took for a writer that then dies is lost with it, as it would be without us; ZeroMQ
is therefore given little to hold.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic_ns
from typing import Any, Protocol

import zmq

from triage.config import addresses
from triage.errors import ConfigError
from triage.metrics import Metrics
from triage.records import Message, MessageKind
from triage.sockets import Connections

__all__ = ["Forwarder", "GivenNotes", "high_water_marks"]

log = logging.getLogger(__name__)

_LINGER_MS = 30_000
"""How long a close waits for the writers to take what ZeroMQ still holds."""

_OWED_AT_MOST = 64
"""Messages kept for a writer that is left out."""


class GivenNotes(Protocol):
    """What is told of each message that a socket is given, because a killed process takes along
    what ZeroMQ holds; ``triage.ledger.state.Handed`` is one."""

    def handing(self, message: Message) -> None: ...

    def handed(self) -> None: ...


def high_water_marks(endpoint: str, held_bytes: int, message_bytes: int) -> list[int]:
    """Messages that ZeroMQ may hold for each writer that ``endpoint`` names; "" for none."""
    if not endpoint:
        return []
    writers = len(addresses(endpoint))
    return [max(4, held_bytes // message_bytes // max(1, writers))] * writers


class _Writer:
    """One PUSH socket, how far its current message got, and what it must hear first.

    Attributes:
        owed: messages that go to every writer and that this one has not taken yet.
        refused_ns: since when it takes nothing; None while it does.
        left_out: the others do not wait for it.
    """

    def __init__(
        self, number: int, address: str, socket: zmq.Socket[Any], given: GivenNotes | None = None
    ) -> None:
        self.number = number
        self.address = address
        self.socket = socket
        self.owed: deque[Message] = deque()
        self.refused_ns: int | None = None
        self.left_out = False
        self._given = given
        self._partly: Message | None = None
        self._taken = 0

    def take(self, message: Message, timeout_ms: int) -> bool:
        """Hand a message to ZeroMQ whole, without copying it; goes on where it last stopped."""
        if self._given is None:
            return self._take(message, timeout_ms)
        self._given.handing(message)
        taken = self._take(message, timeout_ms)
        if taken:
            self._given.handed()
        return taken

    def _take(self, message: Message, timeout_ms: int) -> bool:
        if not message.followed_by:
            return self._pushed(message.parts) or self._sent_in_time(message.parts, timeout_ms)
        if not self.holds_part_of(message):
            self._partly, self._taken = message, 0
        for parts in (message.parts, *message.followed_by)[self._taken :]:
            if not (self._pushed(parts) or self._sent_in_time(parts, timeout_ms)):
                return False
            self._taken += 1
        self._partly = None
        return True

    def holds_part_of(self, message: Message) -> bool:
        """Whether it was given some of the ZeroMQ messages of ``message`` and not all."""
        return self._partly is message and self._taken > 0

    def pay(self) -> bool:
        """Send what is owed; True when nothing is any more."""
        while self.owed:
            if not self.take(self.owed[0], 0):
                return False
            self.owed.popleft()
        return True

    def owe(self, message: Message) -> int:
        """Note what it must hear; how many older messages it will never hear."""
        before = len(self.owed)
        if self.left_out and message.kind is MessageKind.START:
            # The series that it is in must end. Those that it never heard of have no images for
            # it, and their starts may be large.
            while any(owed.kind is MessageKind.START for owed in self.owed):
                self.owed.pop()
        elif self.left_out and before >= _OWED_AT_MOST:
            del self.owed[1]
        self.owed.append(message)
        return before + 1 - len(self.owed)

    def _sent_in_time(self, parts: Sequence[Any], timeout_ms: int) -> bool:
        """After a try that failed: a wait costs more than one that succeeds."""
        return bool(timeout_ms and self.socket.poll(timeout_ms, zmq.POLLOUT)) and self._pushed(
            parts
        )

    def _pushed(self, parts: Sequence[Any]) -> bool:
        last = len(parts) - 1
        try:
            for i, part in enumerate(parts):
                # What follows a part that was taken is taken.
                flags = zmq.NOBLOCK if i == last else zmq.NOBLOCK | zmq.SNDMORE
                self.socket.send(part, flags, copy=False)
        except zmq.Again:
            return False
        return True


class Forwarder:
    """A PUSH socket for each writer. Used from one thread.

    Args:
        endpoint: where the writers listen, or where to bind for them; commas between several.
        bind: bind instead of connect.
        distribute: with several writers, ``round_robin`` sends each image to the next in turn
            that can take it and all else to all; ``lane`` sends what came on socket i to writer i.
        writer_timeout_s: how long the others wait for one that must hear of a start or an end;
            0 = for ever. Only for ``round_robin``.
        held_bytes: what ZeroMQ may hold beside the byte budget of the line.
        message_bytes: largest message expected: marks count messages, not bytes.
        metrics: told which writers take messages.
        given: for each writer, what notes the messages that ZeroMQ is given for it.

    Raises:
        ConfigError: an address that cannot be used.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        bind: bool = False,
        distribute: str = "round_robin",
        writer_timeout_s: float = 10.0,
        held_bytes: int = 256 << 20,
        message_bytes: int = 16 << 20,
        metrics: Metrics | None = None,
        given: Sequence[GivenNotes] = (),
        clock: Callable[[], int] = monotonic_ns,
        context: zmq.Context[Any] | None = None,
    ) -> None:
        self._own_context = context is None
        self._context = context or zmq.Context()
        self._by_lane = distribute == "lane"
        self._timeout_ns = int(writer_timeout_s * 1e9)
        self._metrics = metrics
        self._clock = clock
        self._writers: list[_Writer] = []
        self._turn = 0
        self._connections = Connections()
        self._announced: Message | None = None
        self.trouble = ""
        """Which writers are left out, "" while none is."""
        named = addresses(endpoint)
        marks = high_water_marks(endpoint, held_bytes, message_bytes)
        for number, address in enumerate(named):
            socket = self._context.socket(zmq.PUSH)
            self._writers.append(_Writer(number, address, socket, given[number] if given else None))
            socket.setsockopt(zmq.SNDHWM, marks[number])
            socket.setsockopt(zmq.LINGER, _LINGER_MS)
            # Without this, a connecting PUSH queues for a writer that is not there.
            socket.setsockopt(zmq.IMMEDIATE, 1)
            self._connections.watch(socket)
            try:
                if bind:
                    socket.bind(address)
                else:
                    socket.connect(address)
            except zmq.ZMQError as err:
                self.close(abandon=True)
                raise ConfigError(
                    f"[forward] endpoint = {address!r}: {err}; expected an address to "
                    f"{'bind' if bind else 'connect to'} such as tcp://127.0.0.1:31003"
                ) from err
            self._say(number, taking=True)
        self._alone = self._writers[0] if len(named) == 1 else None
        self.endpoints = tuple(
            writer.socket.getsockopt_string(zmq.LAST_ENDPOINT) for writer in self._writers
        )

    def send(self, message: Message, timeout_ms: int) -> bool:
        """Hand one message to ZeroMQ, without copying it.

        False when a writer that it is meant for took nothing for ``timeout_ms``. The same message
        given again goes on where it stopped: nobody gets anything twice.
        """
        if self._alone is not None:
            return self._alone.take(message, timeout_ms)
        if self._by_lane:
            return self._writers[message.lane % len(self._writers)].take(message, timeout_ms)
        if message.kind is MessageKind.IMAGE:
            return self._to_one(message, timeout_ms)
        return self._to_all(message, timeout_ms)

    def connected(self) -> tuple[int, int]:
        """How many sockets have a writer now, and how many there are; asked by one thread, any."""
        return self._connections.connected()

    def catch_up(self) -> None:
        """Give writers that take messages again what they are owed; never waits."""
        if not self.trouble:
            return
        self._unpaid()
        for writer in self._writers:
            if writer.left_out and not writer.owed and writer.socket.poll(0, zmq.POLLOUT):
                self._took(writer)

    def _to_one(self, message: Message, timeout_ms: int) -> bool:
        while not self._is_placed(message):
            begun = [w for w in self._writers if w.holds_part_of(message)]
            waiting = [w for w in begun if not w.left_out]
            if not waiting:
                waiting = [w for w in self._writers if w not in begun]
            if not _any_ready(waiting, timeout_ms):
                return False
        return True

    def _is_placed(self, message: Message) -> bool:
        """Offer an image to the writers, the next in turn first."""
        writers, first = self._writers, self._turn
        order = [*writers[first:], *writers[:first]]
        if message.followed_by:
            begun = next((w for w in writers if w.holds_part_of(message)), None)
            if begun is not None and not self._is_given_up(begun):
                order = [begun]
            elif begun is not None:
                # The others get the frame whole; a part of it helps nobody.
                order.remove(begun)
        for writer in order:
            if writer.pay() and writer.take(message, 0):
                self._turn = (writer.number + 1) % len(writers)
                self._took(writer)
                return True
            self._refused(writer)
            if writer.holds_part_of(message):
                return False
        return False

    def _to_all(self, message: Message, timeout_ms: int) -> bool:
        if message is not self._announced:
            self._announced = message
            for writer in self._writers:
                if (forgotten := writer.owe(message)) and self._metrics is not None:
                    self._metrics.writer_forgot(writer.number, forgotten)
        while waiting := self._unpaid():
            if not _any_ready(waiting, timeout_ms):
                return False
        self._announced = None
        return True

    def _unpaid(self) -> list[_Writer]:
        """Pay the writers; those that must still be waited for."""
        for writer in self._writers:
            if not writer.owed:
                continue
            if writer.pay():
                self._took(writer)
            else:
                self._refused(writer)
        return [w for w in self._writers if w.owed and not self._is_given_up(w)]

    def _is_given_up(self, writer: _Writer) -> bool:
        """Leave a writer out once it took nothing for too long and another one does."""
        if writer.left_out or writer.refused_ns is None or not self._timeout_ns:
            return writer.left_out
        if self._clock() - writer.refused_ns < self._timeout_ns:
            return False
        if all(w.refused_ns is not None for w in self._writers):
            return False
        writer.left_out = True
        self._say(writer.number, taking=False)
        log.error(
            "writer %d at %s took nothing for %.0f s and is left out; the others go on: "
            "look at that writer",
            writer.number,
            writer.address,
            self._timeout_ns * 1e-9,
        )
        return True

    def _refused(self, writer: _Writer) -> None:
        if writer.refused_ns is None:
            writer.refused_ns = self._clock()
        else:
            self._is_given_up(writer)

    def _took(self, writer: _Writer) -> None:
        writer.refused_ns = None
        if writer.left_out:
            writer.left_out = False
            self._say(writer.number, taking=True)
            log.warning("writer %d at %s takes messages again", writer.number, writer.address)

    def _say(self, number: int, *, taking: bool) -> None:
        if self._metrics is not None:
            self._metrics.writer(number, taking=taking)
        missing = [w.address for w in self._writers if w.left_out]
        self.trouble = f"left out: {', '.join(missing)}" if missing else ""

    def close(self, *, abandon: bool = False) -> None:
        """Close, waiting for the writers to take what is queued unless ``abandon``."""
        self._connections.close()
        for writer in self._writers:
            if not (abandon or writer.pay()):
                log.error(
                    "writer %d at %s never took %d messages for all writers",
                    writer.number,
                    writer.address,
                    len(writer.owed),
                )
            writer.socket.close(linger=0 if abandon else None)
        if self._own_context:
            self._context.term()


def _any_ready(writers: Sequence[_Writer], timeout_ms: int) -> bool:
    """Whether ZeroMQ would take a message for one of them, at the latest after ``timeout_ms``."""
    if not timeout_ms:
        return False
    poller = zmq.Poller()
    for writer in writers:
        poller.register(writer.socket, zmq.POLLOUT)
    return bool(poller.poll(timeout_ms))

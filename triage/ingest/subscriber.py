"""Receives a detector's stream over ZeroMQ, without copying payloads.

PUSH is no tee: a PULL socket takes messages away from every other reader, and a second PULL
steals start messages. SUB never steals, and loses without telling: gaps in image_id show it.

A detector may send one series over several sockets, here called lanes: start and end on each,
every image on one of them. The lanes are read fairly, and no end goes before the images of other
lanes. See :class:`_Ends` for when a lane is waited for.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import zmq

from triage.config import addresses
from triage.errors import ConfigError
from triage.ingest.dectris import PROTOCOLS, DectrisStream
from triage.ingest.opened import OpenedSockets
from triage.ingest.series import SeriesBook
from triage.records import Begun, Message, MessageKind, Series

__all__ = ["Subscriber"]

_MESSAGES_PER_CALL = 32
_SOCKETS = {"pull": zmq.PULL, "sub": zmq.SUB}

_PATIENCE_NS = 2_000_000_000
"""How long a lane may be silent before the end of a series goes on without its own.

Longer than a network stalls, shorter than what the other lanes' sockets hold in the meantime.
"""

_ABSENCE_NS = 500_000_000
"""A caller that was away for so long was held back itself, and no lane is to blame."""


class Subscriber(OpenedSockets):
    """A live source: one socket or several, any protocol that CBOR or JSON tells apart.

    Args:
        endpoint: detector's address, or where to bind; several are separated by commas.
        socket: ``pull`` or ``sub``.
        bind: bind instead of connect; the detector then connects to us.
        protocol: ``auto`` tells each message by its first byte; ``jungfraujoch`` is read as
            ``stream2``, which it extends.
        channel: Stream V2 channel to score, "" for the first.
        queue_bytes: four times what ZeroMQ may hold before a PULL holds the detector back.
        message_bytes: largest message expected: marks count messages, not bytes. They are set
            once, because libzmq may stall for good when a mark is raised on a full connection.
        io_threads: threads of ZeroMQ that read connections; without effect on a given context.
        book: the series of the stream, and what the stream does not tell of them.

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
        book: SeriesBook | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        context: zmq.Context[Any] | None = None,
    ) -> None:
        if socket not in _SOCKETS or protocol not in PROTOCOLS:
            raise ConfigError(
                f"[source] socket = {socket!r}, protocol = {protocol!r}; expected pull or sub, "
                f"and one of {', '.join(PROTOCOLS)}"
            )
        named = addresses(endpoint)
        self._clock = clock
        self._book = book = book or SeriesBook()
        self._stream = DectrisStream(len(named), book, protocol=protocol, channel=channel)
        self._ends = _Ends(len(named))
        self._behind: list[deque[Message]] = [deque() for _ in named]
        self._turn = 0
        self._timeout_ms = 0
        super().__init__(context, io_threads)
        held = max(4, queue_bytes // 4 // message_bytes // len(named))
        expected = f"an address to {'bind' if bind else 'connect to'} such as tcp://127.0.0.1:31001"
        for address in named:
            self._open(address, _SOCKETS[socket], held, bind=bind, expected=expected)
        self.endpoint = ",".join(
            opened.getsockopt_string(zmq.LAST_ENDPOINT) for opened in self._sockets
        )

    def receive(self, timeout_ms: int) -> list[Message]:
        """What is there, waiting up to ``timeout_ms`` for the first message."""
        if len(self._sockets) > 1:
            return self._receive_lanes(timeout_ms)
        socket = self._sockets[0]
        if timeout_ms != self._timeout_ms:
            socket.setsockopt(zmq.RCVTIMEO, timeout_ms)
            self._timeout_ms = timeout_ms
        received = list(self._taken(socket, _MESSAGES_PER_CALL, 0))
        return [m for parts, received_ns in received for m in self._stream.take(parts, received_ns)]

    def _taken(
        self, socket: zmq.Socket[bytes], most: int, flags: int
    ) -> Iterator[tuple[list[zmq.Frame], int]]:
        """Up to ``most`` messages that are there, each with the time of its receipt."""
        try:
            for _ in range(most):
                parts = [socket.recv(flags, copy=False)]
                while parts[-1].more:
                    parts.append(socket.recv(flags, copy=False))
                yield parts, self._clock()
                flags = zmq.NOBLOCK
        except zmq.Again:
            return

    def _receive_lanes(self, timeout_ms: int) -> list[Message]:
        """As :meth:`receive`, from each lane in turn; lanes whose end waits are not read."""
        sockets, ends = self._sockets, self._ends
        ends.called(self._clock())
        open_lanes = [lane for lane in range(len(sockets)) if not ends.holds(lane)]
        poller = zmq.Poller()
        for lane in open_lanes:
            poller.register(sockets[lane], zmq.POLLIN)
        there = dict(poller.poll(min(timeout_ms, ends.patience_ms(self._clock()))))
        self._turn += 1
        start = self._turn % len(open_lanes)
        share = max(1, _MESSAGES_PER_CALL // len(open_lanes))
        received: list[Message] = []
        for lane in (*open_lanes[start:], *open_lanes[:start]):
            if sockets[lane] not in there:
                continue
            for parts, received_ns in self._taken(sockets[lane], share, zmq.NOBLOCK):
                self._behind[lane].extend(self._stream.take(parts, received_ns, lane))
                received += self._up_to_an_end(lane)
                if ends.holds(lane):
                    break
        while ready := ends.released(self._clock()):
            received += ready
            for end in ready:
                received += self._up_to_an_end(end.lane)
        return received

    def _up_to_an_end(self, lane: int) -> Iterator[Message]:
        """What came on a lane and does not stand behind an end that waits."""
        behind, ends = self._behind[lane], self._ends
        while behind and not ends.holds(lane):
            message = behind.popleft()
            if message.kind is MessageKind.END:
                ends.hold(message)
            else:
                ends.seen(message)
                yield message

    def go_on_with(self, series: Sequence[Begun]) -> None:
        """Know series that an earlier process received the beginning of; before the first call
        of :meth:`receive`."""
        for begun in series:
            if begun.start:
                for lane in begun.lanes:
                    self._stream.take(begun.start, self._clock(), min(lane, len(self._sockets) - 1))
            self._book.go_on_with(begun.key, begun.seen)

    def flush(self) -> list[Message]:
        """The ends that still wait for those of other lanes, and what a sender joined to them."""
        left = self._ends.all()
        for behind in self._behind:
            left += behind
            behind.clear()
        return left


def _has_come_to(series: Series | None, other: Series | None) -> bool:
    """Whether a lane in the first series has the other one behind it: identities count up."""
    return series is None or other is None or series.series_id >= other.series_id


class _Ends:
    """Ends of series that wait for the other lanes, so that none overtakes an image.

    A lane with an end that waits is not read, which keeps its own order and holds its sender
    back. The end goes on when every other lane has ended too, has begun or continued a later
    series since, or was silent for two seconds. A lane that was silent for so long is not waited
    for again until something comes on it: a socket that nobody sends on costs that time once.
    A further end of a series that is over goes on at once.
    """

    def __init__(self, lanes: int) -> None:
        self._held: dict[int, tuple[Message, set[int]]] = {}
        self._absent: set[int] = set()
        self._lanes = range(lanes)
        self._heard_ns = dict.fromkeys(self._lanes, 0)
        self._called_ns = 0
        self._over: deque[tuple[int, str]] = deque(maxlen=16)

    def called(self, now_ns: int) -> None:
        """Say that the lanes are being read; silence counts only while they are."""
        if now_ns - self._called_ns > _ABSENCE_NS:
            self._heard_ns = dict.fromkeys(self._lanes, now_ns)
        self._called_ns = now_ns

    def holds(self, lane: int) -> bool:
        """Whether the end of that lane waits."""
        return lane in self._held

    def seen(self, message: Message) -> None:
        """Take note of a message that is no end."""
        lane = message.lane
        self._heard_ns[lane] = message.received_ns
        self._absent.discard(lane)
        series = message.series if message.frame is None else message.frame.series
        if series is None:
            return
        if message.kind is MessageKind.START and series.key in self._over:
            self._over.remove(series.key)
        for end, awaited in self._held.values():
            is_this = end.series is not None and end.series.key == series.key
            if not is_this and _has_come_to(series, end.series):
                awaited.discard(lane)

    def hold(self, message: Message) -> None:
        """Keep an end until it is its turn."""
        lane = message.lane
        self._absent.discard(lane)
        for end, awaited in self._held.values():
            if _has_come_to(message.series, end.series):
                awaited.discard(lane)
        ended = {
            n for n, (end, _) in self._held.items() if _has_come_to(end.series, message.series)
        }
        awaited = set(self._lanes) - ended - self._absent - {lane}
        if message.series is not None and message.series.key in self._over:
            awaited = set()
        for other in awaited:
            self._heard_ns[other] = max(self._heard_ns[other], message.received_ns)
        self._held[lane] = message, awaited

    def released(self, now_ns: int) -> list[Message]:
        """Ends whose turn has come, in the order received."""
        if not self._held:
            return []
        for _, awaited in self._held.values():
            silent = {n for n in awaited if now_ns - self._heard_ns[n] >= _PATIENCE_NS}
            self._absent |= silent
            awaited -= silent
        ready = [lane for lane, (_, awaited) in self._held.items() if not awaited]
        ends = [self._held.pop(lane)[0] for lane in ready]
        self._over.extend(end.series.key for end in ends if end.series is not None)
        return ends

    def all(self) -> list[Message]:
        """Every end that waits, whatever it waits for."""
        ends = [message for message, _ in self._held.values()]
        self._held.clear()
        return ends

    def patience_ms(self, now_ns: int) -> int:
        """How long to wait for messages before an end may be due."""
        if not self._held:
            return 1 << 30
        heard = min(self._heard_ns[n] for _, awaited in self._held.values() for n in awaited)
        return max(0, (heard + _PATIENCE_NS - now_ns) // 1_000_000 + 1)

"""Messages of a DECTRIS stream, of either protocol, from one socket or several."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from triage.ingest.series import SeriesBook, unread
from triage.ingest.stream1 import Stream1Parser
from triage.ingest.stream1 import separated as separated_json
from triage.ingest.stream2 import Stream2Parser
from triage.ingest.stream2 import separated as separated_cbor
from triage.records import Message

__all__ = ["PROTOCOLS", "DectrisStream"]

log = logging.getLogger(__name__)

PROTOCOLS = ("auto", "stream2", "stream1", "jungfraujoch")


class DectrisStream:
    """Turns ZeroMQ messages into :class:`triage.records.Message`; never raises on what it is sent.

    Args:
        lanes: sockets that are read.
        book: the series of the stream, shared by all lanes.
        protocol: one of :data:`PROTOCOLS`; ``auto`` tells each message by its first byte;
            ``jungfraujoch`` is read as ``stream2``, which it extends.
        channel: Stream V2 channel to score, "" for the first.
    """

    def __init__(
        self, lanes: int, book: SeriesBook, *, protocol: str = "auto", channel: str = ""
    ) -> None:
        self._protocol = protocol
        self._parsers = [
            (Stream1Parser(book, lane), Stream2Parser(channel, book, lane)) for lane in range(lanes)
        ]

    def take(self, parts: Sequence[Any], received_ns: int, lane: int = 0) -> Sequence[Message]:
        """What one ZeroMQ message says: one message, or several where its sender joined them."""
        try:
            return self._read(parts, received_ns, lane)
        except Exception as err:  # fail open: what no parser foresaw goes on as it came
            log.exception("a message could not be read")
            return [unread(parts, received_ns, lane, err)]

    def _read(self, parts: Sequence[Any], received_ns: int, lane: int) -> Sequence[Message]:
        stream1, stream2 = self._parsers[lane]
        json_first = bytes(memoryview(parts[0])[:1]) == b"{"
        if self._protocol == "stream1" or (self._protocol == "auto" and json_first):
            return [stream1.parse(message, received_ns) for message in separated_json(parts)]
        if len(parts) == 1:
            return (stream2.parse(parts, received_ns),)
        return [stream2.parse(message, received_ns) for message in separated_cbor(parts)]

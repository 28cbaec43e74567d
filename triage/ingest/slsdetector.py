"""slsDetectorPackage receivers (JUNGFRAU, EIGER): a PUB socket and a part of the image per port.

A message is a JSON header and the raw pixels of one port; parts of one ``frameNumber`` make a
frame, which is one decision and one :class:`triage.records.Message`. There is no start message: a
series begins with its first frame, and ends with the empty message that every port sends.

Publishers drop what a reader does not take, each port for itself, so a part may never come. Each
port sends in order: one that has gone on to a later frame will not send the earlier one any more,
and a frame is complete when every port has sent it or passed it. Only a port that says nothing at
all is waited for, and once: from then on frames go without it until it is heard again.

A frame without a part that its port may have sent is not scored: what nobody here has seen may
hold the spots. A port that has been silent for good is another matter. It is then like a masked
module, and frames are decided by what the other ports send. Packets that a receiver itself lost
are in nobody's data, so their pixels are left out and the frame is scored.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import zmq

from triage.config import addresses
from triage.errors import ConfigError, MalformedMessage
from triage.ingest.calibration import Maps
from triage.ingest.json_text import parsed_object
from triage.ingest.opened import OpenedSockets
from triage.ingest.series import SeriesBook, plain_text, unread, whole_number
from triage.metrics import Metrics
from triage.records import (
    Begun,
    Frame,
    Message,
    MessageKind,
    Piece,
    Reason,
    Series,
)

__all__ = ["SlsAssembler", "SlsReceivers", "port_addresses"]

log = logging.getLogger(__name__)

_MAX_JSON_BYTES = 1 << 16
"""The package's own client reads headers of up to 1000 bytes."""

_MAX_PORTS = 1024
"""Bounds what is allocated for a frame to so many times what one port has sent."""

_MAX_SIDE_PX = 1 << 16
_MAX_WAITING = 4096
_MAX_AWAITED = 1 << 18
"""Frames that wait, and parts that they wait for: headers alone must not cost memory."""

_NAMES_KEPT = 1024
_ENDED_KEPT = 16
"""Series that are over, of which a port that lags may still send parts."""

_MESSAGES_PER_CALL = 64

_SILENT_AT_END_NS = 2_000_000_000
"""How long nothing comes of a port before the others' end messages are taken for its own.

Longer than a port of a slow detector pauses between frames.
"""

_DEAD_NS = 10_000_000_000
_DEAD_FRAMES = 100
"""A port without which all frames came for so long, and so many of them in a row, is dead.

Longer than a receiver is started anew or a network is away, and enough frames that losses on
either side of a pause do not count as silence.
"""

_PORTS_SHOWN = 8

_PART_BYTES = (1 << 20) + (1 << 14)
"""The largest part, a JUNGFRAU module, and its header."""

_MODULE_PX = (512, 1024)
"""Rows and columns of a module of either kind, however many ports send it."""

_EIGER, _JUNGFRAU = 1, 3
_COUNTING = (-1, 0, _EIGER)
"""Types of detector whose pixels are counts; -1 where none is told."""

_DTYPES = {4: np.uint8, 8: np.uint8, 12: np.uint16, 16: np.uint16, 32: np.uint32}
_SATURATION = {4: 14, 8: 254, 12: 4094}
"""Largest valid count where the counter has fewer values than the pixel type is used to; the
largest one stands for an overflow and for a lost packet."""


class _Header(NamedTuple):
    """What is read of a port's header; -1 where a number was not told."""

    number: int
    frame_index: int
    key: tuple[int, str]
    port: tuple[int, int]
    ports: tuple[int, int]
    shape: tuple[int, int]
    bits: int
    detector_type: int
    flipped: bool


@dataclass(slots=True, eq=False)
class _Part:
    header: _Header
    parts: tuple[Any, ...]
    received_ns: int
    lane: int
    size_bytes: int

    @property
    def origin(self) -> int | None:
        """The frame number that the port counts its frames from."""
        header = self.header
        return header.number - header.frame_index if header.frame_index >= 0 else None


@dataclass(slots=True, eq=False)
class _Port:
    """What was last heard of a port in one acquisition."""

    lane: int
    origin: int | None
    number: int
    heard_ns: int


@dataclass(slots=True, eq=False)
class _Silence:
    """Frames in a row that went on without a port of which nothing came meanwhile.

    Attributes:
        since_ns: when the first of them began.
        for_good: they are so many that nothing is expected of it any more.
    """

    since_ns: int
    frames: int = 0
    for_good: bool = False


@dataclass(slots=True, eq=False)
class _Waiting:
    """A frame that is being put together."""

    first_ns: int
    missing: set[tuple[int, int]]
    parts: dict[tuple[int, int], _Part] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Acquisition:
    """One series while it runs.

    Attributes:
        expected: every port there should be, (row, column).
        ports: those that were heard.
        over: those that have ended it or gone on to the next one.
        gone: those that are not waited for: over, or silent.
        released: the last frame number that has gone on.
        ends: the end messages that have come, with their size.
        ending_ns: when a sign came that it is over, or when that was last looked at.
    """

    key: tuple[int, str]
    expected: frozenset[tuple[int, int]]
    origin: int
    ports: dict[tuple[int, int], _Port] = field(default_factory=dict)
    over: set[tuple[int, int]] = field(default_factory=set)
    gone: set[tuple[int, int]] = field(default_factory=set)
    waiting: dict[int, _Waiting] = field(default_factory=dict)
    released: int = -1
    series: Series | None = None
    ends: list[tuple[tuple[Any, ...], int]] = field(default_factory=list)
    ends_by_lane: Counter[int] = field(default_factory=Counter)
    ending_ns: int | None = None
    incomplete: int = 0
    late: int = 0

    def continues(self, part: _Part) -> bool:
        """Whether a part is a further one of a port that was heard."""
        port = self.ports.get(part.header.port)
        if port is None or part.header.key != self.key or part.header.port in self.over:
            return False
        began_again = None not in (part.origin, port.origin) and part.origin != port.origin
        return not began_again and part.header.number >= port.number

    def may_begin(self, part: _Part) -> bool:
        """Whether a part can be the first one of a port that was not heard yet."""
        port = part.header.port
        return port not in self.ports and port not in self.over and part.header.key == self.key

    def was_left_by(self, part: _Part) -> bool:
        """Whether a part is of this acquisition, which ended without waiting for its port."""
        number, port = part.header.number, self.ports.get(part.header.port)
        if part.header.key != self.key or number < self.origin:
            return False
        if port is not None and (number < port.number or self.has_ended_on(port.lane)):
            return False
        counts_from = self.origin if port is None or port.origin is None else port.origin
        if part.origin is None:
            return number <= self.released
        return part.origin == counts_from

    def has_ended_on(self, lane: int) -> bool:
        """Whether all ports of a lane that were heard have said that it is over."""
        on_lane = sum(port.lane == lane for port in self.ports.values())
        return self.ends_by_lane[lane] >= max(1, on_lane)

    def is_left_by(self, port: tuple[int, int]) -> None:
        """The port will send nothing more of this."""
        self.over.add(port)
        self.gone.add(port)

    def last(self, port: tuple[int, int]) -> int:
        """The last frame number heard of a port, -1 when it was not heard."""
        heard = self.ports.get(port)
        return -1 if heard is None else heard.number

    @property
    def front(self) -> float:
        """No port that is waited for will send a frame up to this one any more."""
        return min(map(self.last, self.expected - self.gone), default=math.inf)


class SlsAssembler:
    """Turns the messages of all ports into frames; never raises on what it is sent.

    Args:
        lanes: sockets that are read.
        book: the series of the stream, and what the stream does not tell of them.
        maps: of a charge-integrating detector; None where there are none.
        gap_px: rows and columns between modules.
        wait_ns: how long a frame waits for a port that says nothing.
        held_bytes: most bytes of parts that wait for others.

    Attributes:
        incomplete: frames that went on without all their ports, so far.
        late: parts that came after their frame.
    """

    def __init__(
        self,
        lanes: int = 1,
        book: SeriesBook | None = None,
        *,
        maps: Maps | None = None,
        gap_px: tuple[int, int] = (0, 0),
        wait_ns: int = 100_000_000,
        held_bytes: int = 256 << 20,
    ) -> None:
        self.incomplete = 0
        self.late = 0
        self._lanes = lanes
        self._book = book or SeriesBook()
        self._maps = maps
        self._gap_px = gap_px
        self._wait_ns = wait_ns
        self._most_bytes = held_bytes
        self._held_bytes = 0
        self._held_frames = 0
        self._running: list[_Acquisition] = []
        self._ended: deque[_Acquisition] = deque(maxlen=_ENDED_KEPT)
        self._silences: dict[tuple[int, int], _Silence] = {}
        self.trouble = ""
        """Which ports are silent while others send, "" while none is."""
        self._names: dict[tuple[int, str], int] = {}
        self._continued: dict[tuple[int, str], tuple[tuple[int, int], ...]] = {}
        self._arrays = 0
        self._array: tuple[Series, int] | None = None

    def take(self, parts: Sequence[Any], received_ns: int, lane: int = 0) -> list[Message]:
        """What can go on now that this message has come."""
        whole = tuple(parts)
        size = sum(memoryview(part).nbytes for part in whole)
        common: dict[str, Any] = {
            "parts": whole,
            "received_ns": received_ns,
            "size_bytes": size,
            "lane": lane,
        }
        try:
            told = parsed_object(whole[0], _MAX_JSON_BYTES, trailing=b"\0")
            if str(told.get("htype", ""))[:16].startswith("array-1."):
                return self._array_frame(told, common)
            if len(whole) == 1 and not told.get("data"):
                if "htype" in told or "data" not in told:
                    detail = f"htype {told.get('htype')!r}"[:80]
                    return [Message(kind=MessageKind.CONTROL, detail=detail, **common)]
                return self._port_ended(common)
            header = _header(told, whole)
        except MalformedMessage as err:
            return [Message(kind=MessageKind.MALFORMED, detail=str(err), **common)]
        self._is_heard(header.port)
        part = _Part(header, whole, received_ns, lane, size)
        found = self._acquisition(part)
        if found is None:
            return [Message(kind=MessageKind.CONTROL, detail="a part that came late", **common)]
        acquisition, messages = found
        messages += self._enter(acquisition, part, common)
        return messages + self._relieved()

    def due(self, now_ns: int) -> list[Message]:
        """What has waited long enough."""
        messages: list[Message] = []
        if (due_ns := self.due_ns) is None or now_ns < due_ns:
            return messages
        while self._running:
            head = self._running[0]
            for number in sorted(head.waiting):
                waiting = head.waiting.get(number)
                if waiting is None:
                    continue
                if now_ns - waiting.first_ns < self._wait_ns:
                    break
                head.gone |= {port for port in waiting.missing if head.last(port) < number}
                messages += self._settled(head)
            silent_ns = self._patience_at_end_ns(head)
            if head.ending_ns is not None and now_ns >= self._looked_at_end_ns(head) + silent_ns:
                head.ending_ns = now_ns
                for port in head.expected - head.gone:
                    heard = head.ports.get(port)
                    if heard is None or now_ns - heard.heard_ns >= silent_ns:
                        head.gone.add(port)
                messages += self._settled(head)
            if not self._is_over(head):
                break
            messages += self._end(head)
        return messages

    @property
    def due_ns(self) -> int | None:
        """When :meth:`due` may have something; None when nothing waits."""
        if not self._running:
            return None
        head = self._running[0]
        due = []
        if head.waiting:
            due.append(head.waiting[min(head.waiting)].first_ns + self._wait_ns)
        if head.ending_ns is not None:
            due.append(self._looked_at_end_ns(head) + self._patience_at_end_ns(head))
        return min(due, default=None)

    def _behind(self) -> Mapping[int, _Waiting]:
        """Frames of the next acquisition, which wait for the end of the one before."""
        return self._running[1].waiting if len(self._running) > 1 else {}

    def _patience_at_end_ns(self, head: _Acquisition) -> int:
        """How long a port may be silent before its end is taken as said: not long where frames
        wait for it."""
        return min(_SILENT_AT_END_NS, self._wait_ns) if self._behind() else _SILENT_AT_END_NS

    def _looked_at_end_ns(self, head: _Acquisition) -> int:
        """From when that counts."""
        behind = self._behind()
        first_ns = behind[min(behind)].first_ns if behind else 0
        return max(head.ending_ns or 0, first_ns)

    def go_on_with(self, series: Sequence[Begun]) -> None:
        """Know series whose beginning an earlier process received: they do not begin again."""
        for begun in series:
            series_id, name = begun.key
            plain, _, again = name.rpartition("#")
            if plain and again.isdigit():
                self._names[series_id, plain] = int(again) - 1
            self._continued[begun.key] = begun.seen

    def flush(self) -> list[Message]:
        """Everything that waits, as it stands."""
        messages: list[Message] = []
        for acquisition in list(self._running):
            acquisition.gone |= acquisition.expected
            messages += self._settled(acquisition)
            if acquisition.ends or acquisition is not self._running[-1]:
                messages += self._end(acquisition)
        return messages

    # -- which series a part is of -----------------------------------------------------------------

    def _acquisition(self, part: _Part) -> tuple[_Acquisition, list[Message]] | None:
        """The acquisition of a part, begun where it is the first; None when that is over."""
        for running in self._running:
            if running.continues(part):
                return running, []
        for ended in self._ended:
            if ended.was_left_by(part):
                ended.late += 1
                self.late += 1
                return None
        open_to_it = [running for running in self._running if running.may_begin(part)]
        if open_to_it:
            # The numbers of two acquisitions may begin at the same one: then it is the later.
            origin = part.header.number if part.origin is None else part.origin
            return min(reversed(open_to_it), key=lambda a: abs(a.origin - origin)), []
        messages: list[Message] = []
        while len(self._running) > 1:
            messages += self._end(self._running[0])
        rows, columns = part.header.ports
        begun = _Acquisition(
            key=part.header.key,
            expected=frozenset((y, x) for y in range(rows) for x in range(columns)),
            origin=part.header.number if part.origin is None else part.origin,
        )
        self._running.append(begun)
        self._silences = {p: s for p, s in self._silences.items() if p in begun.expected}
        self._say_silent()
        return begun, messages

    def _is_heard(self, port: tuple[int, int]) -> None:
        """A part of that port came, be it late."""
        silence = self._silences.pop(port, None)
        if silence is not None and silence.for_good:
            log.warning("port %s (row, column) is heard again", port)
            self._say_silent()

    def _lost(self, missing: set[tuple[int, int]], first_ns: int) -> list[tuple[int, int]]:
        """The ports of which a frame that goes on lacks what they may have sent."""
        lost, dead = [], []
        for port in missing:
            silence = self._silences.get(port)
            if silence is None:
                silence = self._silences[port] = _Silence(first_ns)
            silence.frames += 1
            if silence.for_good:
                continue
            if silence.frames > _DEAD_FRAMES and first_ns - silence.since_ns >= _DEAD_NS:
                silence.for_good = True
                dead.append(port)
            else:
                lost.append(port)
        if dead:
            log.warning(
                "%d ports (row, column) are silent, %s among them: frames are decided by what the "
                "other ports send, until they are heard again",
                len(dead),
                min(dead),
            )
            self._say_silent()
        return lost

    def _say_silent(self) -> None:
        silent = sorted(port for port, silence in self._silences.items() if silence.for_good)
        shown = ", ".join(map(str, silent[:_PORTS_SHOWN]))
        if len(silent) > _PORTS_SHOWN:
            shown += " and others"
        what = f"{len(silent)} ports (row, column) are silent: {shown}"
        self.trouble = f"{what}; frames are decided by what the others send" if silent else ""

    def _left(self, acquisition: _Acquisition, part: _Part) -> list[Message]:
        """A port has gone on to another acquisition."""
        acquisition.is_left_by(part.header.port)
        if acquisition.ending_ns is None:
            acquisition.ending_ns = part.received_ns
        messages = self._settled(acquisition)
        return messages + (self._end(acquisition) if self._is_over(acquisition) else [])

    # -- parts and ends ----------------------------------------------------------------------------

    def _enter(
        self, acquisition: _Acquisition, part: _Part, common: Mapping[str, Any]
    ) -> list[Message]:
        header = part.header
        messages: list[Message] = []
        if self._running and acquisition is not self._running[0]:
            head = self._running[0]
            if header.port in head.expected and header.port not in head.over:
                messages += self._left(head, part)
        known = acquisition.ports.get(header.port)
        if known is None:
            if all(port.lane != part.lane for port in acquisition.ports.values()):
                # An end that came before the first part was not of this.
                acquisition.ends_by_lane[part.lane] = 0
            acquisition.ports[header.port] = _Port(
                part.lane, part.origin, header.number, part.received_ns
            )
        else:
            known.lane, known.number = part.lane, max(known.number, header.number)
            known.heard_ns = part.received_ns
        if header.port not in acquisition.over:
            acquisition.gone.discard(header.port)
        waiting = acquisition.waiting.get(header.number)
        is_new = waiting is None
        if waiting is None:
            if header.number <= acquisition.released:
                acquisition.late += 1
                self.late += 1
                late = Message(kind=MessageKind.CONTROL, detail="a part that came late", **common)
                return [*messages, late]
            waiting = _Waiting(part.received_ns, set(acquisition.expected))
            acquisition.waiting[header.number] = waiting
            self._held_frames += 1
        elif header.port in waiting.parts:
            twice = Message(kind=MessageKind.CONTROL, detail="a part that came twice", **common)
            return [*messages, twice]
        waiting.parts[header.port] = part
        waiting.missing.discard(header.port)
        self._held_bytes += part.size_bytes
        if not self._running or acquisition is not self._running[0]:
            return messages
        if waiting.missing <= acquisition.gone or (is_new and len(acquisition.waiting) > 1):
            messages += self._settled(acquisition)
        return messages

    def _relieved(self) -> list[Message]:
        """The oldest frames, as they stand, while too much waits."""
        messages: list[Message] = []
        while self._held_frames:
            head = self._running[0]
            most = min(_MAX_WAITING, _MAX_AWAITED // len(head.expected))
            if self._held_bytes <= self._most_bytes and self._held_frames <= most:
                break
            if head.waiting:
                messages += self._released(head, min(head.waiting))
            else:
                messages += self._end(head)
        return messages

    def _port_ended(self, common: Mapping[str, Any]) -> list[Message]:
        """The end message of a port: it names none, so it is for those heard on its lane."""
        lane = common["lane"]

        def unended(acquisition: _Acquisition) -> list[tuple[int, int]]:
            on_lane = [at for at, port in acquisition.ports.items() if port.lane == lane]
            return [at for at in on_lane if at not in acquisition.over]

        acquisition = next((a for a in reversed(self._running) if unended(a)), None)
        if acquisition is None:
            # Of a port that lags, or that sent nothing, or a second time.
            lagging = (a for a in (*self._ended, *self._running[-1:]) if not a.has_ended_on(lane))
            if (left := next(lagging, None)) is not None:
                left.ends_by_lane[lane] += 1
            detail = "an end of a port that was not heard"
            return [Message(kind=MessageKind.CONTROL, detail=detail, **common)]
        acquisition.ends_by_lane[lane] += 1
        acquisition.ends.append((common["parts"], common["size_bytes"]))
        if acquisition.ending_ns is None:
            acquisition.ending_ns = common["received_ns"]
        if acquisition.has_ended_on(lane):
            for port in unended(acquisition):
                acquisition.is_left_by(port)
        ends, on_lane = (
            acquisition.ends_by_lane,
            Counter(p.lane for p in acquisition.ports.values()),
        )
        if all(ends[n] >= max(1, on_lane[n]) for n in range(self._lanes)):
            for port in acquisition.expected:
                acquisition.is_left_by(port)
        if acquisition is not self._running[0]:
            return []
        messages = self._settled(acquisition)
        while self._running and self._is_over(self._running[0]):
            messages += self._end(self._running[0])
        return messages

    # -- what goes on ------------------------------------------------------------------------------

    def _settled(self, acquisition: _Acquisition) -> list[Message]:
        """Frames of which nothing more will come, in order."""
        front = acquisition.front
        ready = sorted(number for number in acquisition.waiting if number <= front)
        messages: list[Message] = []
        for number in ready:
            messages += self._released(acquisition, number)
        return messages

    def _is_over(self, acquisition: _Acquisition) -> bool:
        return acquisition.ending_ns is not None and acquisition.expected <= acquisition.gone

    def _end(self, acquisition: _Acquisition) -> list[Message]:
        """The rest of an acquisition and its end, which holds every port's end message."""
        messages: list[Message] = []
        for number in sorted(acquisition.waiting):
            messages += self._released(acquisition, number)
        self._running.remove(acquisition)
        self._ended.append(acquisition)
        parts = [parts for parts, _ in acquisition.ends]
        messages.append(
            Message(
                kind=MessageKind.END,
                parts=parts[0] if parts else (),
                followed_by=tuple(parts[1:]),
                received_ns=acquisition.ending_ns or 0,
                series=acquisition.series,
                size_bytes=sum(size for _, size in acquisition.ends),
            )
        )
        if acquisition.incomplete or acquisition.late:
            log.warning(
                "series %d: %d frames went on without all their ports, and %d parts came after "
                "their frame; expected [source] part_wait_ms longer than ports lag behind each "
                "other, and a publisher that need not drop",
                acquisition.key[0],
                acquisition.incomplete,
                acquisition.late,
            )
        if self._running:
            messages += self._settled(self._running[0])
        return messages

    def _released(self, acquisition: _Acquisition, number: int) -> list[Message]:
        """A frame as it stands, behind the start of its series where it is the first."""
        waiting = acquisition.waiting.pop(number)
        parts = list(waiting.parts.values())
        size = sum(part.size_bytes for part in parts)
        self._held_bytes -= size
        self._held_frames -= 1
        acquisition.released = max(acquisition.released, number)
        acquisition.incomplete += bool(waiting.missing)
        self.incomplete += bool(waiting.missing)
        lost = self._lost(waiting.missing, waiting.first_ns) if waiting.missing else []
        messages: list[Message] = []
        series = acquisition.series
        if series is None:
            origins = [part.origin for part in parts if part.origin is not None]
            acquisition.origin = min(origins, default=number)
            series = self._begun(acquisition, parts[0].header)
            seen = self._continued.pop(series.key, None)
            while seen and number - acquisition.origin <= seen[0][0]:
                # It begins where the earlier process saw it begin: another one of the same name.
                series = self._begun(acquisition, parts[0].header)
                seen = self._continued.pop(series.key, None)
            acquisition.series = series
            if seen is not None:
                self._book.go_on_with(series.key, seen)
            else:
                messages.append(
                    Message(
                        kind=MessageKind.START,
                        received_ns=waiting.first_ns,
                        series=series,
                        lane=parts[0].lane,
                    )
                )
        frame = self._frame(acquisition, series, number, parts, lost, waiting.first_ns, size)
        messages.append(
            Message(
                kind=MessageKind.IMAGE,
                parts=parts[0].parts,
                followed_by=tuple(part.parts for part in parts[1:]),
                received_ns=waiting.first_ns,
                frame=frame,
                size_bytes=size,
                lane=parts[0].lane,
            )
        )
        return messages

    def _begun(self, acquisition: _Acquisition, header: _Header) -> Series:
        file_index, file_name = acquisition.key
        key = (max(0, file_index), f"{file_name}@{acquisition.origin}")
        # File index, name and numbers all stay when nobody sets them anew.
        again = self._names.pop(key, 0) + 1
        self._names[key] = again
        while len(self._names) > _NAMES_KEPT:
            self._names.pop(next(iter(self._names)))
        shape = self._shape(header)
        integrating = header.detector_type == _JUNGFRAU
        maps = None
        if self._maps is not None and integrating:
            rows, columns = (
                np.arange(n * side) + np.arange(n * side) // module * gap
                for n, side, module, gap in zip(
                    header.ports, header.shape, _MODULE_PX, self._gap_px, strict=True
                )
            )
            maps = self._maps.fitting(shape, rows, columns)
        return self._book.start(
            Series(
                series_id=key[0],
                series_unique_id=key[1] if again == 1 else f"{key[1]}#{again}",
                image_size_y_px=shape[0],
                image_size_x_px=shape[1],
                saturation_value=None if integrating else _SATURATION.get(header.bits),
                calibration=maps,
                detector_description={_EIGER: "EIGER", _JUNGFRAU: "JUNGFRAU"}.get(
                    header.detector_type, ""
                ),
            )
        )

    def _shape(self, header: _Header) -> tuple[int, int]:
        """(y, x) of a frame, gaps included."""
        top, left = self._place(header, (header.ports[0] - 1, header.ports[1] - 1))
        return top + header.shape[0], left + header.shape[1]

    def _place(self, header: _Header, port: tuple[int, int]) -> tuple[int, int]:
        """Row and column of the first pixel of a port."""
        top, left = port[0] * header.shape[0], port[1] * header.shape[1]
        return (
            top + top // _MODULE_PX[0] * self._gap_px[0],
            left + left // _MODULE_PX[1] * self._gap_px[1],
        )

    def _frame(
        self,
        acquisition: _Acquisition,
        series: Series,
        number: int,
        parts: Sequence[_Part],
        lost: Sequence[tuple[int, int]],
        first_ns: int,
        size: int,
    ) -> Frame:
        first = parts[0].header
        integrating = first.detector_type == _JUNGFRAU
        fault, why = self._fault(acquisition, series, parts, lost)
        return self._book.enter(
            series,
            max(-1, number - acquisition.origin),
            shape=self._shape(first),
            fault=fault,
            fault_detail=why,
            encoding="raw",
            framed=False,
            dtype=np.dtype(_DTYPES.get(first.bits, np.uint16)),
            pieces=tuple(
                Piece(
                    payload=memoryview(part.parts[1]),
                    top=top,
                    left=left,
                    shape=part.header.shape,
                    bits=part.header.bits,
                    flipped=part.header.flipped and not integrating,
                    is_adc=integrating,
                )
                for part in parts
                for top, left in (self._place(first, part.header.port),)
            ),
            received_ns=first_ns,
            size_bytes=size,
        )

    def _fault(
        self,
        acquisition: _Acquisition,
        series: Series,
        parts: Sequence[_Part],
        lost: Sequence[tuple[int, int]],
    ) -> tuple[Reason | None, str]:
        """Why a frame cannot be scored, if it cannot."""
        first = parts[0].header
        for part in parts:
            header = part.header
            alike = (header.shape, header.bits, header.detector_type, header.ports)
            if alike != (first.shape, first.bits, first.detector_type, first.ports):
                return Reason.MALFORMED, f"port {header.port}: {alike}, unlike port {first.port}"
            if header.port not in acquisition.expected:
                return Reason.MALFORMED, f"port {header.port} (row, column) outside {header.ports}"
            came = memoryview(part.parts[1]).nbytes
            if 8 * came != header.shape[0] * header.shape[1] * header.bits:
                return Reason.MALFORMED, (
                    f"port {header.port}: {came} bytes for {header.shape} pixels (y, x) of "
                    f"{header.bits} bits"
                )
        if first.bits not in _DTYPES:
            return Reason.UNKNOWN_ENCODING, (
                f"bitmode {first.bits}; expected one of {', '.join(map(str, _DTYPES))}"
            )
        if first.detector_type == _JUNGFRAU:
            if first.bits != 16:
                return Reason.UNKNOWN_ENCODING, f"JUNGFRAU words of {first.bits} bits; expected 16"
            if series.calibration is None:
                why = self._maps.why_not if self._maps is not None else ""
                return Reason.UNKNOWN_ENCODING, why or (
                    "JUNGFRAU words are no photons; expected [source] pedestal_file and "
                    "gain_file, and the wavelength in [geometry]"
                )
        elif first.detector_type not in _COUNTING:
            return Reason.UNKNOWN_ENCODING, (
                f"detType {first.detector_type}; expected EIGER ({_EIGER}) or JUNGFRAU "
                f"({_JUNGFRAU})"
            )
        if lost:
            return Reason.MALFORMED, (
                f"{len(lost)} of {len(acquisition.expected)} parts did not come, that of port "
                f"{min(lost)} (row, column) among them"
            )
        return None, ""

    def _array_frame(self, told: Mapping[str, Any], common: Mapping[str, Any]) -> list[Message]:
        """PSI's older family: a whole frame in one message, shape from slow to fast."""
        parts = common["parts"]
        number, kind = whole_number(told.get("frame")), str(told.get("type"))[:16]
        sides = told.get("shape")
        shape = tuple(map(whole_number, sides)) if isinstance(sides, list) else ()
        if len(shape) < 2 or min(shape) < 1 or math.prod(shape[:-2]) != 1:
            raise MalformedMessage(f"shape {str(sides)[:40]}; expected [y, x]")
        if kind not in ("uint8", "uint16", "uint32", "int16", "int32", "float32"):
            raise MalformedMessage(f"type {kind!r}; expected such as uint16")
        if len(parts) != 2:
            raise MalformedMessage(f"an image of {len(parts)} parts; expected 2")
        messages: list[Message] = []
        if self._array is None or number <= self._array[1]:
            self._arrays += 1
            series = Series(
                series_id=self._arrays,
                series_unique_id=f"array@{number}",
                image_size_y_px=shape[-2],
                image_size_x_px=shape[-1],
            )
            if self._array is not None:
                messages.append(Message(kind=MessageKind.END, series=self._array[0]))
            self._book.start(series)
            messages.append(Message(kind=MessageKind.START, series=series))
        else:
            series = self._array[0]
        self._array = series, number
        frame = self._book.enter(
            series,
            number,
            shape=(shape[-2], shape[-1]),
            encoding="raw",
            framed=False,
            dtype=np.dtype(kind).newbyteorder(">" if told.get("endianness") == "big" else "<"),
            payload=memoryview(parts[1]),
            received_ns=common["received_ns"],
            size_bytes=common["size_bytes"],
        )
        return [*messages, Message(kind=MessageKind.IMAGE, frame=frame, **common)]


def _header(told: Mapping[str, Any], parts: Sequence[Any]) -> _Header:
    """What a port says of its part.

    Raises:
        MalformedMessage: it cannot be said of which frame, or of how many ports, it is a part.
    """
    number = -1
    for name in ("frameNumber", "acqIndex", "frameIndex"):
        number = number if number >= 0 else whole_number(told.get(name))
    if number < 0:
        raise MalformedMessage("no frameNumber, acqIndex or frameIndex; expected one")
    if len(parts) != 2:
        raise MalformedMessage(f"an image of {len(parts)} parts; expected a header and pixels")
    shape = _pair(told, "shape", _MAX_SIDE_PX)
    ports = _pair(told, "detshape", _MAX_PORTS) if "detshape" in told else (1, 1)
    if ports[0] * ports[1] > _MAX_PORTS:
        raise MalformedMessage(f"detshape {ports} (y, x); expected at most {_MAX_PORTS} ports")
    if max(ports[0] * shape[0], ports[1] * shape[1]) > _MAX_SIDE_PX:
        raise MalformedMessage(
            f"{ports} ports of {shape} pixels (y, x); expected at most {_MAX_SIDE_PX} a side"
        )
    size = memoryview(parts[1]).nbytes
    pixels = shape[0] * shape[1]
    return _Header(
        number=number,
        frame_index=whole_number(told.get("frameIndex")),
        key=(whole_number(told.get("fileIndex")), plain_text(told.get("fname", ""), 256)),
        port=(whole_number(told.get("row"), 0), whole_number(told.get("column"), 0)),
        ports=ports,
        shape=shape,
        bits=whole_number(told.get("bitmode"), 8 * size // pixels),
        detector_type=whole_number(told.get("detType")),
        flipped=whole_number(told.get("flipRows"), 0) > 0,
    )


def _pair(told: Mapping[str, Any], name: str, most: int) -> tuple[int, int]:
    """(y, x) of a field that is sent as [x, y]."""
    match told.get(name):
        case [x, y] if 0 < whole_number(x) <= most and 0 < whole_number(y) <= most:
            return whole_number(y), whole_number(x)
        case other:
            raise MalformedMessage(f"{name} {str(other)[:40]}; expected [x, y], each 1 to {most}")


_RANGE = re.compile(r"(?P<host>.*:)(?P<first>\d{1,5})-(?P<last>\d{1,5})")


def port_addresses(endpoint: str) -> list[str]:
    """The addresses that a setting names; ``tcp://host:30001-30016`` names sixteen.

    Raises:
        ConfigError: an address is empty, named twice, or a range runs backwards.
    """
    found: list[str] = []
    for address in endpoint.split(","):
        named = _RANGE.fullmatch(address.strip())
        if named is None:
            found.append(address.strip())
            continue
        first, last = int(named["first"]), int(named["last"])
        if not 0 < first <= last < 65536 or last - first >= _MAX_PORTS:
            raise ConfigError(
                f"[source] endpoint = {address.strip()!r}: expected ports from low to high, at "
                f"most {_MAX_PORTS}, such as tcp://127.0.0.1:30001-30016"
            )
        found += [f"{named['host']}{port}" for port in range(first, last + 1)]
    return addresses(",".join(found))


class SlsReceivers(OpenedSockets):
    """A live source: a SUB socket for each port of the receivers.

    Args:
        endpoint: addresses, separated by commas, with ranges of ports.
        assembler: puts the frames together.
        queue_bytes, message_bytes: four times what ZeroMQ may hold on all sockets, and the largest
            message expected, at most that of a module; see
            :class:`triage.ingest.subscriber.Subscriber`.
        wait_ns: the assembler's; a caller that was away for longer is given it anew.

    Raises:
        ConfigError: an address that cannot be used.
    """

    def __init__(
        self,
        endpoint: str,
        assembler: Callable[[int], SlsAssembler],
        *,
        queue_bytes: int = 2 << 30,
        message_bytes: int = 1 << 20,
        io_threads: int = 1,
        wait_ns: int = 100_000_000,
        metrics: Metrics | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        context: zmq.Context[Any] | None = None,
    ) -> None:
        named = port_addresses(endpoint)
        # The setting may be for whole frames: then a port would be allowed too few of its parts.
        message_bytes = min(message_bytes, _PART_BYTES)
        self._assembler = assembler(len(named))
        self._metrics = metrics
        self._counted = 0, 0
        self._clock = clock
        self._wait_ns = wait_ns
        self._called_ns = clock()
        self._not_before_ns = 0
        super().__init__(context, io_threads)
        self._poller = zmq.Poller()
        held = max(4, queue_bytes // 4 // message_bytes // len(named))
        expected = "the address of a receiver's stream such as tcp://127.0.0.1:30001"
        for address in named:
            opened = self._open(address, zmq.SUB, held, expected=expected)
            self._poller.register(opened, zmq.POLLIN)
        self.endpoint = ",".join(named)

    def receive(self, timeout_ms: int) -> list[Message]:
        """What can go on, waiting up to ``timeout_ms`` for it."""
        now = self._clock()
        if now - self._called_ns > self._wait_ns:
            # What the ports sent meanwhile is still in the sockets: no port is silent.
            self._not_before_ns = now + self._wait_ns
        messages, left_ms = self._taken(), timeout_ms
        until = now + timeout_ms * 1_000_000
        while not messages and left_ms > 0:
            due = self._assembler.due_ns
            wait_ms = left_ms
            if due is not None:
                due = max(due, self._not_before_ns)
                wait_ms = min(left_ms, max(1, -(-(due - now) // 1_000_000)))
            self._poller.poll(wait_ms)
            messages = self._taken()
            now = self._clock()
            left_ms = (until - now) // 1_000_000
        self._called_ns = self._clock()
        counts = self._assembler.incomplete, self._assembler.late
        if self._metrics is not None and counts != self._counted:
            self._metrics.parts(counts[0] - self._counted[0], counts[1] - self._counted[1])
            self._counted = counts
        return messages

    def _taken(self) -> list[Message]:
        """What the messages that are there complete, and what has waited long enough.

        One message of each socket at a time: ports that are read evenly need not wait.
        """
        messages: list[Message] = []
        for _ in range(max(1, _MESSAGES_PER_CALL // len(self._sockets))):
            there = False
            for lane, socket in enumerate(self._sockets):
                try:
                    parts = [socket.recv(zmq.NOBLOCK, copy=False)]
                    while parts[-1].more:
                        parts.append(socket.recv(zmq.NOBLOCK, copy=False))
                except zmq.Again:
                    continue
                there = True
                received_ns = self._clock()
                try:
                    messages += self._assembler.take(parts, received_ns, lane)
                except Exception as err:  # fail open: the part goes on as it came
                    log.exception("a part could not be read")
                    messages.append(unread(parts, received_ns, lane, err))
            if not there:
                break
        now = self._clock()
        if now >= self._not_before_ns:
            messages += self._assembler.due(now)
        return messages

    def go_on_with(self, series: Sequence[Begun]) -> None:
        """Know series that an earlier process received the beginning of; before the first call
        of :meth:`receive`."""
        self._assembler.go_on_with(series)

    def flush(self) -> list[Message]:
        """Frames that still wait for parts, and ends that wait for other ports."""
        return self._assembler.flush()

    @property
    def trouble(self) -> str:
        """Which ports are silent while others send, "" while none is; asked by any thread."""
        return self._assembler.trouble

"""The ledger in a file that outlives the process, so that a killed run is gone on with.

A mapped file: what was stored in it is with the operating system, whatever becomes of the process.
Nothing is ever flushed, so a machine that loses power, or is rebooted where the file lies in
memory, loses it; the run then begins with empty books.

::

    header   version, what follows where; one word that says that the run ended in order
    slots    one for each running series: identity, then its account twice
    ring     frames as they were received: series, image_id, ordinal
    writers  for each socket of the forwarder the messages it was given last
    seen     for each slot a bit for each image_id

Order makes it sound, because a process may be killed between any two stores. An account is
written in turn over the older one of its two places, with a number and a checksum: a reader takes
the newest whole one. A frame stands in the ring before an account counts it; the bit of its
image_id is set afterwards, and a reader adds those of the ring. A frame that is in no account was
lost like one that never left the detector: its image_id is a gap. Frames are released in the order
received, so those that an account has received and not released are the last ones of its series
in the ring. A message is noted for a writer before it is given to ZeroMQ. ZeroMQ tells nobody what
has left the process; what may not have is bounded by what it may hold: the high-water mark of the
socket, and 8 KiB that are on their way to the kernel; more for a socket that binds and has several
readers, which each have that much. What the kernel has is sent. Of frames that no account has
released yet all that ZeroMQ was given are in doubt, for nothing else tells of them. Behind a tee a
message is with the writer before it is received here: one killed in between is called missing and
is there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import struct
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from triage.errors import TriageError
from triage.ledger.account import COUNTS, Account
from triage.records import Begun, Decision, Message, MessageKind, Reason

__all__ = [
    "Handed",
    "Lasting",
    "LedgerState",
    "Recovered",
    "StateError",
    "begun",
    "ranges",
    "recovered",
]

log = logging.getLogger(__name__)

_MAGIC = b"TRIAGELG"
_VERSION = 1
_HEAD = struct.Struct("<8sIII")
_HEAD_BYTES = 4096
_ENDED_AT = _HEAD_BYTES - 8

_SLOT_BYTES = 2048
_ACCOUNTS_AT = (512, 1280)
_IDENTITY = struct.Struct("<QqI")
_UNIQUE_ID_BYTES = _ACCOUNTS_AT[0] - _IDENTITY.size - 4
_UNIQUE_ID_CHARACTERS = _UNIQUE_ID_BYTES // 4
"""Detectors send 26; of a longer one this much is kept."""

_ACCOUNT = struct.Struct(f"<QQqqqq{len(COUNTS)}q")
_CRC = struct.Struct("<I")

_FRAME = struct.Struct("<QqQ")
_FRAME_BYTES = _FRAME.size
_pack_frame = _FRAME.pack_into
_GIVEN = struct.Struct("<QQqQQ")

_ENGINE_BYTES = 8192
"""libzmq puts messages together up to so many bytes before it gives them to the kernel."""

_LEAST_MESSAGE_BYTES = 16
_NOT_AN_IMAGE = -2
_START = -3
_LANES = 62


class StateError(TriageError):
    """A state file that cannot be read; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Where things are.

    Attributes:
        frames: places in the ring.
        slots: series that are kept at a time.
        seen: image_ids of each that are kept, from 0; a multiple of 8.
        marks: high-water mark of each writer's socket.
    """

    frames: int
    slots: int
    seen: int
    marks: tuple[int, ...]

    @property
    def ring_at(self) -> int:
        return _HEAD_BYTES + self.slots * _SLOT_BYTES

    def writer_at(self, writer: int) -> int:
        """Its count of messages; their places follow."""
        before = sum(8 + self.places(w) * _GIVEN.size for w in range(writer))
        return self.ring_at + self.frames * _FRAME.size + before

    def places(self, writer: int) -> int:
        return self.marks[writer] + 2 + _ENGINE_BYTES // _LEAST_MESSAGE_BYTES

    def seen_at(self, slot: int) -> int:
        return self.writer_at(len(self.marks)) + slot * (self.seen // 8)

    @property
    def size(self) -> int:
        return self.seen_at(self.slots)


@dataclass(slots=True, eq=False)
class _Slot:
    """A series that is kept.

    Attributes:
        serial: of all series that were ever kept.
        version: of its account.
        last_ordinal: of the last frame of this process, -1 for none.
        since: ordinals from here on are of frames after its last start message.
        lanes: bits of those that its start came on.
        over: it has ended, or another one has begun in its place.
        high: bytes of its bits that may not be 0.
        seen_at: where they are.
    """

    index: int
    serial: int
    key: tuple[int, str]
    version: int = 0
    last_ordinal: int = -1
    since: int = 0
    lanes: int = 0
    over: bool = False
    high: int = 0
    seen_at: int = 0


@dataclass(slots=True, eq=False)
class Lasting:
    """A series as a state file has it.

    Attributes:
        account: as the process left it.
        waiting: (ordinal, image_id) of the frames received and not released, in order; the oldest
            are not there when there were more than the ring holds.
        in_doubt: (ordinal, image_id) of those given to ZeroMQ that may not have left the process,
            or that were not released.
        start_in_doubt: the same may be so of its start message.
        lanes: indices of the sockets that its start came on.
        over: it had ended, or another one had begun in its place.
        seen: runs of image_ids that came, (first, last), ascending.
    """

    serial: int
    key: tuple[int, str]
    account: Account
    waiting: list[tuple[int, int]] = field(default_factory=list)
    in_doubt: list[tuple[int, int]] = field(default_factory=list)
    start_in_doubt: bool = False
    lanes: tuple[int, ...] = ()
    over: bool = False
    seen: list[tuple[int, int]] = field(default_factory=list)

    def settle(self, dropped: Mapping[int, Reason]) -> None:
        """Enter what became of the frames when the process ended.

        Args:
            dropped: ordinals of frames that stand in the decision journal, and why.
        """
        account = self.account
        for ordinal, _ in self.waiting:
            if ordinal in dropped:
                account.dropped += 1
                account.vetoed += 1
                account.by_reason[dropped[ordinal]] += 1
        self.waiting = [each for each in self.waiting if each[0] not in dropped]
        self.in_doubt = [each for each in self.in_doubt if each[0] not in dropped]
        account.lost += account.waiting
        account.in_doubt += len(self.in_doubt)
        if not self.over:
            account.restarts += 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recovered:
    """What a state file says of the run that wrote it.

    Attributes:
        ended: the run ended in order and has reported its series.
        series: in the order in which they began.
    """

    run_id: str
    ended: bool
    series: list[Lasting]


class Handed:
    """Notes what one socket is given. Used from one thread."""

    def __init__(self, state: LedgerState, at: int, places: int) -> None:
        self._state = state
        self._map = state.map
        self._at = at
        self._places = places
        self._count = 0
        self._size_of_word = struct.Struct("<Q")

    def handing(self, message: Message) -> None:
        """ZeroMQ is about to be given a message; again, when it did not take it."""
        frame, series = message.frame, message.series
        ordinal, image_id, serial = 0, _NOT_AN_IMAGE, 0
        if frame is not None:
            ordinal, image_id = frame.ordinal, frame.image_id
            serial = self._state.serial(frame.series.key)
        elif series is not None:
            serial = self._state.serial(series.key)
            if message.kind is MessageKind.START:
                image_id = _START
        count = self._count
        place = self._at + 8 + count % self._places * _GIVEN.size
        _GIVEN.pack_into(self._map, place, count + 1, serial, image_id, ordinal, message.size_bytes)

    def handed(self) -> None:
        """It took that message."""
        self._count += 1
        self._size_of_word.pack_into(self._map, self._at, self._count)


class LedgerState:
    """Writes the file; a :class:`triage.ledger.Ledger` tells it what to keep.

    Args:
        folder: where it lies, as ``ledger.state``, beside the start messages of running series.
            Memory of the system such as ``/dev/shm`` never keeps frames waiting.
        run_id: of this run.
        marks: high-water mark of each socket of the forwarder.
        earlier: series to go on with, settled, as an earlier file has them.
        frames: places in the ring: of more that are waiting, the oldest are counted only.
        slots: series that are kept; of more the oldest is forgotten.
        seen: image_ids from 0 of each series that are kept to know a duplicate again.

    Raises:
        OSError: the file cannot be made, or there is no room for it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        run_id: str,
        marks: Sequence[int] = (),
        earlier: Sequence[Lasting] = (),
        frames: int = 1 << 15,
        slots: int = 8,
        seen: int = 1 << 21,
    ) -> None:
        self.path = folder / "ledger.state"
        self._folder = folder
        self.writers = len(marks)
        self._layout = _Layout(frames=frames, slots=slots, seen=seen, marks=tuple(marks))
        self._slots: dict[tuple[int, str], _Slot] = {}
        self._serial = max((series.serial for series in earlier), default=0)
        self._starts_failing = False
        new = self.path.with_name(self.path.name + ".new")
        self.map = self._made(new, run_id)
        for series in earlier[-slots:]:
            self._go_on_with(series)
        self._remove_starts(keep={series.serial for series in earlier})
        # The earlier file stays until this one holds all that it held.
        new.replace(self.path)

    def _made(self, path: Path, run_id: str) -> mmap.mmap:
        layout = self._layout
        about = {
            "run_id": run_id,
            "frames": layout.frames,
            "slots": layout.slots,
            "seen": layout.seen,
            "marks": list(layout.marks),
            "counts": list(COUNTS),
        }
        text = json.dumps(about).encode()
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        fd = os.open(path, flags, 0o600)
        try:
            # Reserved now: a mapped page that the disk has no room for ends the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, layout.size)
            else:
                os.truncate(fd, layout.size)
            mapped = mmap.mmap(fd, layout.size)
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(fd)
        mapped[_HEAD.size : _HEAD.size + len(text)] = text
        _HEAD.pack_into(mapped, 0, _MAGIC, _VERSION, len(text), zlib.crc32(text))
        return mapped

    def _go_on_with(self, series: Lasting) -> None:
        slot = self._open(series.key, series.serial)
        slot.lanes = sum(1 << lane for lane in series.lanes)
        slot.over = series.over
        at = self._layout.seen_at(slot.index)
        bits = np.zeros(self._layout.seen, np.bool_)
        for first, last in series.seen:
            bits[first : last + 1] = True
        packed = np.packbits(bits, bitorder="little")
        slot.high = int(packed.nonzero()[0].max(initial=-1)) + 1
        self.map[at : at + slot.high] = packed[: slot.high].tobytes()
        self._commit(slot, series.account)

    # -- what the ledger tells -----------------------------------------------------------------

    def received(
        self, messages: Sequence[Message], accounts: Mapping[tuple[int, str], Account]
    ) -> None:
        """Keep frames that came, and what begins and ends with other messages."""
        mapped, at, places, pack = self.map, self._layout.ring_at, self._layout.frames, _pack_frame
        changed: set[_Slot] = set()
        came: list[tuple[_Slot, int]] = []
        limit, series, slot = self._layout.seen, None, None
        for message in messages:
            frame = message.frame
            if frame is None:
                changed.update(self._other(message))
                slot = None
                continue
            if slot is None or frame.series is not series:
                series = frame.series
                slot = self._slots.get(series.key) or self._begin(series.key)
                slot.over = False
                changed.add(slot)
            ordinal, image_id, duplicate = frame.ordinal, frame.image_id, frame.duplicate
            place = at + ordinal % places * _FRAME_BYTES
            pack(mapped, place, slot.serial << 1 | duplicate, image_id, ordinal)
            slot.last_ordinal = ordinal
            if 0 <= image_id < limit and not duplicate:
                came.append((slot, image_id))
        for each in changed:
            # A series of an earlier run that nothing was heard of has none.
            if self._slots.get(each.key) is each and (account := accounts.get(each.key)):
                self._commit(each, account)
        for each, image_id in came:
            byte = image_id >> 3
            mapped[each.seen_at + byte] |= 1 << (image_id & 7)
            if byte >= each.high:
                each.high = byte + 1

    def released(
        self,
        decisions: Sequence[Decision],
        accounts: Mapping[tuple[int, str], Account],
        *,
        in_order: bool = True,
    ) -> None:
        """Keep what was done with frames."""
        if not in_order:
            at, places = self._layout.ring_at, self._layout.frames
            for decision in decisions:
                _FRAME.pack_into(self.map, at + decision.ordinal % places * _FRAME.size, 0, 0, 0)
        keys = {(decision.series_id, decision.series_unique_id) for decision in decisions}
        for key in keys:
            if (slot := self._slots.get(key)) is not None:
                self._commit(slot, accounts[key])

    def ended(self, key: tuple[int, str], account: Account) -> None:
        """A series has ended."""
        if (slot := self._slots.get(key)) is not None:
            slot.over = True
            self._commit(slot, account)

    def serial(self, key: tuple[int, str]) -> int:
        """Of a series, 0 for one that is not kept."""
        slot = self._slots.get(key)
        return 0 if slot is None else slot.serial

    def handed(self, writer: int) -> Handed:
        """What notes the messages that one socket of the forwarder is given."""
        return Handed(self, self._layout.writer_at(writer), self._layout.places(writer))

    def close(self, *, sent: bool) -> None:
        """Say that the run ended in order; to be called last.

        Args:
            sent: ZeroMQ holds nothing any more.
        """
        # A start that failed has no series: nothing is in doubt, however it ended.
        sent = sent or not self._slots
        if sent:
            struct.pack_into("<Q", self.map, _ENDED_AT, 1)
        running = any(not slot.over for slot in self._slots.values())
        self.map.close()
        if sent and not running:
            self._remove_starts(keep=())
            self.path.unlink(missing_ok=True)

    # -- series --------------------------------------------------------------------------------

    def _other(self, message: Message) -> Iterable[_Slot]:
        """Series whose account a message changes that is no image."""
        if message.kind is MessageKind.START and message.series is not None:
            self._start(message, message.series.key)
        elif message.kind is MessageKind.END:
            return ()
        return self._slots.values()

    def _start(self, message: Message, key: tuple[int, str]) -> None:
        slot = self._slots.get(key)
        lane = 1 << min(message.lane, _LANES)
        if slot is None:
            slot = self._begin(key)
        if slot.lanes & lane or not slot.lanes:
            # It begins anew: a source forgets which of its images came before.
            self.map[slot.seen_at : slot.seen_at + slot.high] = bytes(slot.high)
            slot.high = slot.lanes = 0
            slot.since = slot.last_ordinal + 1
            self._write_start(slot.serial, message.parts)
        slot.lanes |= lane
        slot.over = False
        for other in self._slots.values():
            if other is not slot:
                other.lanes &= ~lane
                other.over = other.over or not other.lanes

    def _begin(self, key: tuple[int, str]) -> _Slot:
        for other in self._slots.values():
            # Where no start messages come, the frames of one series end the one before.
            other.over = other.over or not other.lanes
        self._serial += 1
        return self._open(key, self._serial)

    def _open(self, key: tuple[int, str], serial: int) -> _Slot:
        slots = self._layout.slots
        if len(self._slots) >= slots:
            oldest = min(self._slots.values(), key=lambda slot: (not slot.over, slot.serial))
            del self._slots[oldest.key]
            self._start_path(oldest.serial).unlink(missing_ok=True)
            index, high = oldest.index, oldest.high
        else:
            index, high = len(self._slots), 0
        at = _HEAD_BYTES + index * _SLOT_BYTES
        self.map[at : at + 8] = bytes(8)
        seen_at = self._layout.seen_at(index)
        self.map[seen_at : seen_at + high] = bytes(high)
        unique = key[1][:_UNIQUE_ID_CHARACTERS].encode("utf-8", "surrogatepass")
        identity = _IDENTITY.pack(serial, key[0], len(unique)) + unique
        body = identity + _CRC.pack(zlib.crc32(identity))
        self.map[at : at + len(body)] = body
        slot = _Slot(index=index, serial=serial, key=key, seen_at=seen_at)
        self._slots[key] = slot
        return slot

    def _commit(self, slot: _Slot, account: Account) -> None:
        """Write an account over the older one of its two places."""
        slot.version += 1
        body = _ACCOUNT.pack(
            slot.serial,
            slot.version,
            slot.last_ordinal,
            slot.since,
            slot.lanes,
            slot.over,
            *account.numbers(),
        )
        at = _HEAD_BYTES + slot.index * _SLOT_BYTES + _ACCOUNTS_AT[slot.version & 1]
        self.map[at : at + len(body) + 4] = body + _CRC.pack(zlib.crc32(body))

    def _write_start(self, serial: int, parts: Sequence[Any]) -> None:
        if not parts:
            return
        path = self._start_path(serial)
        pieces: list[Any] = [struct.pack("<I", len(parts))]
        for part in parts:
            view = memoryview(part).cast("B")
            pieces += (struct.pack("<Q", view.nbytes), view)
        new = path.with_suffix(".new")
        try:
            with new.open("wb") as file:
                file.writelines(pieces)
            new.replace(path)
        except OSError as err:
            path.unlink(missing_ok=True)
            if not self._starts_failing:
                log.error(
                    "start message %s: %s; if this process is killed, the frames of that series "
                    "go on unscored",
                    path,
                    err.strerror,
                )
            self._starts_failing = True

    def _start_path(self, serial: int) -> Path:
        return _start_path(self._folder, serial)

    def _remove_starts(self, keep: Collection[int]) -> None:
        kept = {self._start_path(serial).name for serial in keep}
        for path in self._folder.glob("start-*"):
            if path.name not in kept:
                path.unlink(missing_ok=True)


def _start_path(folder: Path, serial: int) -> Path:
    return folder / f"start-{serial}.zcap"


def begun(folder: Path, series: Lasting) -> Begun:
    """A series of the file in ``folder`` for a source that is to go on with it."""
    return Begun(
        key=series.key,
        start=_read_start(_start_path(folder, series.serial)),
        lanes=series.lanes or (0,),
        seen=tuple(series.seen),
    )


def _read_start(path: Path) -> tuple[bytes, ...]:
    """The parts; () where there are none, or a part of it is not there."""
    try:
        data = path.read_bytes()
        (count,) = struct.unpack_from("<I", data)
        at, parts = 4, []
        for _ in range(count):
            (size,) = struct.unpack_from("<Q", data, at)
            part = data[at + 8 : at + 8 + size]
            if len(part) < size:
                return ()
            parts.append(part)
            at += 8 + size
    except (OSError, struct.error):
        return ()
    return tuple(parts)


# -- reading -----------------------------------------------------------------------------------


def recovered(folder: Path) -> Recovered | None:
    """What the file in ``folder`` says; None when there is none.

    Raises:
        StateError: it is no state file, is cut off, or was written by another version.
    """
    path = folder / "ledger.state"
    try:
        if path.stat().st_uid != os.geteuid():
            raise StateError(f"{path}: belongs to another user; expected one of our own")
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as err:
        raise StateError(f"{path}: {err.strerror}") from err
    about, layout = _read_head(path, data)
    reader = _Reader(data, layout)
    return Recovered(
        run_id=str(about["run_id"]),
        ended=data[_ENDED_AT] == 1,
        series=reader.series(given=data[_ENDED_AT] != 1),
    )


def _read_head(path: Path, data: bytes) -> tuple[dict[str, Any], _Layout]:
    if len(data) < _HEAD_BYTES:
        raise StateError(f"{path}: {len(data)} bytes; expected at least {_HEAD_BYTES}")
    magic, version, size, crc = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise StateError(f"{path}: begins with {magic!r}; expected {_MAGIC!r}")
    if version != _VERSION:
        raise StateError(f"{path}: of version {version}; expected {_VERSION}")
    text = data[_HEAD.size : _HEAD.size + size]
    if zlib.crc32(text) != crc:
        raise StateError(f"{path}: its header is not whole")
    try:
        about = json.loads(text)
        layout = _Layout(
            frames=int(about["frames"]),
            slots=int(about["slots"]),
            seen=int(about["seen"]),
            marks=tuple(int(mark) for mark in about["marks"]),
        )
        if tuple(about["counts"]) != COUNTS:
            raise StateError(f"{path}: counts other things than this version")
    except (KeyError, TypeError, ValueError) as err:
        raise StateError(f"{path}: its header is not one: {err!r}") from err
    if len(data) != layout.size:
        raise StateError(f"{path}: {len(data)} bytes; expected {layout.size}")
    return about, layout


class _Reader:
    """The parts of a file whose header is right."""

    def __init__(self, data: bytes, layout: _Layout) -> None:
        self._data = data
        self._layout = layout

    def series(self, *, given: bool) -> list[Lasting]:
        """Every series; with what may not have left the process when ``given``."""
        found: dict[int, Lasting] = {}
        for index in range(self._layout.slots):
            if (read := self._slot(index)) is None:
                continue
            series, last_ordinal, since = read
            frames = self._frames(series.serial, last_ordinal)
            waiting = series.account.waiting
            series.waiting = [(o, i) for o, i, _ in frames[max(0, len(frames) - waiting) :]]
            came = [i for o, i, again in frames if o >= since and not again and i >= 0]
            series.seen = self._seen(index, came)
            found[series.serial] = series
        if given:
            unreleased = {key: set(lasting.waiting) for key, lasting in found.items()}
            for (serial, ordinal, image_id), gone in self._given().items():
                if (lasting := found.get(serial)) is None or image_id == _NOT_AN_IMAGE:
                    continue
                if image_id == _START:
                    lasting.start_in_doubt = lasting.start_in_doubt or not gone
                elif not gone or (ordinal, image_id) in unreleased[serial]:
                    lasting.in_doubt.append((ordinal, image_id))
        return [found[serial] for serial in sorted(found)]

    def _slot(self, index: int) -> tuple[Lasting, int, int] | None:
        """A series, its last ordinal, and the first one since its start; None for none."""
        at = _HEAD_BYTES + index * _SLOT_BYTES
        serial, series_id, size = _IDENTITY.unpack_from(self._data, at)
        end = at + _IDENTITY.size + size
        if not serial or size > _UNIQUE_ID_BYTES:
            return None
        if zlib.crc32(self._data[at:end]) != _CRC.unpack_from(self._data, end)[0]:
            return None
        versions = []
        for place in _ACCOUNTS_AT:
            body = self._data[at + place : at + place + _ACCOUNT.size]
            crc = _CRC.unpack_from(self._data, at + place + _ACCOUNT.size)[0]
            numbers = _ACCOUNT.unpack(body)
            if zlib.crc32(body) == crc and numbers[0] == serial:
                versions.append(numbers)
        if not versions:
            return None
        _, _, last_ordinal, since, lanes, over, *counts = max(
            versions, key=lambda numbers: numbers[1]
        )
        unique = self._data[at + _IDENTITY.size : end].decode("utf-8", "surrogatepass")
        lasting = Lasting(
            serial=serial,
            key=(series_id, unique),
            account=Account.of_numbers(counts),
            lanes=tuple(lane for lane in range(_LANES + 1) if lanes >> lane & 1),
            over=bool(over),
        )
        return lasting, last_ordinal, since

    def _frames(self, serial: int, last_ordinal: int) -> list[tuple[int, int, bool]]:
        """(ordinal, image_id, duplicate) of the frames of a series in the ring, in order."""
        ring = np.frombuffer(
            self._data,
            np.dtype([("serial", "<u8"), ("image_id", "<i8"), ("ordinal", "<u8")]),
            self._layout.frames,
            self._layout.ring_at,
        )
        mine = ring[
            (ring["serial"] >> 1 == serial) & (ring["ordinal"].astype("i8") <= last_ordinal)
        ]
        mine = mine[np.argsort(mine["ordinal"])]
        return [(int(o), int(i), bool(s & 1)) for s, i, o in mine.tolist()]

    def _seen(self, index: int, image_ids: Sequence[int]) -> list[tuple[int, int]]:
        at, limit = self._layout.seen_at(index), self._layout.seen
        bits = np.unpackbits(
            np.frombuffer(self._data, np.uint8, limit // 8, at), bitorder="little"
        ).astype(np.int8)
        bits[[i for i in image_ids if i < limit]] = 1
        edges = np.flatnonzero(np.diff(bits, prepend=0, append=0))
        runs = [(int(a), int(b) - 1) for a, b in zip(edges[::2], edges[1::2], strict=True)]
        return runs + ranges(i for i in image_ids if i >= limit)

    def _given(self) -> dict[tuple[int, int, int], bool]:
        """(serial, ordinal, image_id) of the messages that ZeroMQ was given last, and whether it
        can have held them no more."""
        given: dict[tuple[int, int, int], bool] = {}
        for writer, mark in enumerate(self._layout.marks):
            at, places = self._layout.writer_at(writer), self._layout.places(writer)
            (count,) = struct.unpack_from("<Q", self._data, at)
            held = engine_bytes = 0
            # The newest one may have been given and not noted as taken.
            for number in range(count + 1, max(0, count + 1 - places), -1):
                gone = held > mark + 1 and engine_bytes >= _ENGINE_BYTES
                place = at + 8 + (number - 1) % places * _GIVEN.size
                noted, serial, image_id, ordinal, size = _GIVEN.unpack_from(self._data, place)
                held += 1
                if noted != number:
                    continue
                if held > mark + 1:
                    engine_bytes += size
                message = (serial, ordinal, image_id)
                # One writer may hold still what another one has taken.
                given[message] = gone and given.get(message, True)
        return given


def ranges(image_ids: Iterable[int]) -> list[tuple[int, int]]:
    """Image_ids as runs of consecutive ones, (first, last), ascending."""
    runs: list[tuple[int, int]] = []
    for image_id in sorted(set(image_ids)):
        if runs and image_id == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], image_id)
        else:
            runs.append((image_id, image_id))
    return runs

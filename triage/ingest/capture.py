"""Captures: the messages of a stream as they came, in a file, to be looked at or decided again.

A capture (``.zcap``) repeats, for each ZeroMQ message, u32 LE number of parts, then for each part
u64 LE length and bytes; it holds nothing else, so that other programs read it. Beside it lies
``NAME.zcap.index``, with what the messages themselves do not say: a line of JSON with the
protocol, and for each message a line with its time of receipt in ns and the socket it came on. A
capture without an index is a DECTRIS stream of one socket.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from triage.errors import ConfigError, UnreadableFile
from triage.ingest import KNOWN_PROTOCOLS
from triage.ingest.dectris import PROTOCOLS

__all__ = ["CAPTURE_SUFFIX", "Capture", "Captured", "Recorder"]

CAPTURE_SUFFIX = ".zcap"
_FORMAT = 1
_MOST_PARTS = 1 << 16
"""A train of the Karabo bridge has some hundred parts; more than this is no capture."""

_APPENDING = os.O_WRONLY | os.O_CREAT | os.O_APPEND
_PIECES_AT_ONCE = 512
"""Buffers that one call of the system may take; POSIX promises 16, Linux has 1024."""


class Recorder:
    """Writes a capture and its index. Used from one thread.

    Args:
        path: to be made; a file that is there already is not touched.
        protocol: of the messages, as in ``[source] protocol``.
        lanes: sockets they come on.

    Raises:
        ConfigError: the file is there, or cannot be made.
    """

    def __init__(self, path: Path, *, protocol: str, lanes: int = 1) -> None:
        self.messages = 0
        self.size_bytes = 0
        self.path = path
        self.lanes = lanes
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # At the end of what is there, be it cut off after an error; and not buffered: what
            # a process that is killed has recorded can be read.
            self._fd = os.open(path, _APPENDING | os.O_EXCL, 0o644)
            self._index_fd = os.open(_index_of(path), _APPENDING | os.O_TRUNC, 0o644)
            told = {"format": _FORMAT, "protocol": protocol, "lanes": lanes}
            self._index_bytes = self._append_line(json.dumps(told))
        except FileExistsError:
            raise ConfigError(
                f"capture {path}: is there already; expected a new file; name another one"
            ) from None
        except OSError as err:
            raise ConfigError(
                f"capture {path}: {err.strerror}; expected a file that can be written"
            ) from err

    def write(self, parts: Sequence[Any], received_ns: int, lane: int = 0) -> None:
        """Append one message, without copying it.

        Raises:
            OSError: it could not be written; nothing of it is in the file then.
        """
        pieces: list[Any] = [struct.pack("<I", len(parts))]
        for part in parts:
            view = memoryview(part).cast("B")
            pieces += (struct.pack("<Q", view.nbytes), view)
        try:
            written = self._append(pieces)
            line_bytes = self._append_line(f"{received_ns} {lane}")
        except OSError:
            os.ftruncate(self._fd, self.size_bytes)
            os.ftruncate(self._index_fd, self._index_bytes)
            raise
        self.messages += 1
        self.size_bytes += written
        self._index_bytes += line_bytes

    def _append(self, pieces: Sequence[Any]) -> int:
        written = 0
        for first in range(0, len(pieces), _PIECES_AT_ONCE):
            some = list(pieces[first : first + _PIECES_AT_ONCE])
            while some:
                n = os.writev(self._fd, some)
                written += n
                # The system may take less than it is given: begin again where it left off.
                while some and n >= len(some[0]):
                    n -= len(some.pop(0))
                if n:
                    some[0] = memoryview(some[0])[n:]
        return written

    def _append_line(self, line: str) -> int:
        data = f"{line}\n".encode()
        if os.write(self._index_fd, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(data)

    def close(self) -> None:
        """Close both files; may be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            os.close(self._index_fd)
            self._fd = self._index_fd = -1

    def discard(self) -> None:
        """Close and remove both files."""
        self.close()
        for path in (self.path, _index_of(self.path)):
            path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Captured:
    """One message of a capture.

    Attributes:
        received_ns: of the run that recorded it; 0 where the index does not say.
        lane: index of the socket it came on.
    """

    parts: tuple[bytes, ...]
    received_ns: int = 0
    lane: int = 0


class Capture:
    """A capture to read, from the start as often as wanted.

    Attributes:
        protocol: ``auto`` where the index does not say.
        lanes: sockets that the messages came on.
        cut_short: where the file ends within a message, after :meth:`messages` came to its end;
            "" otherwise.

    Raises:
        UnreadableFile: there is no such file, or its index is of another form.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.protocol = "auto"
        self.lanes = 1
        self.cut_short = ""
        self._has_index = _index_of(path).exists()
        try:
            self._size_bytes = path.stat().st_size
            if self._has_index:
                with _index_of(path).open() as index:
                    told = json.loads(index.readline(1024))
                self.protocol, self.lanes = str(told["protocol"]), int(told["lanes"])
                if told["format"] != _FORMAT or not 0 < self.lanes <= 4096:
                    raise ValueError(f"format {told['format']}, lanes {self.lanes}")
                if self.protocol not in KNOWN_PROTOCOLS:
                    raise ValueError(f"protocol {self.protocol[:40]}")
        except OSError as err:
            raise UnreadableFile(f"capture {err.filename}: {err.strerror}") from err
        except (ValueError, KeyError, TypeError, RecursionError) as err:
            raise UnreadableFile(
                f"capture {_index_of(path)}: {err!r}; expected the index that 'triage record' "
                "writes; without that file the capture is read as a DECTRIS stream"
            ) from err

    def read_as(self, named: str) -> str:
        """The protocol to read it by, where the settings name one for what comes live.

        What it was recorded as counts; a DECTRIS stream of any kind may be named more closely,
        and one without an index has to be.
        """
        if not self._has_index or (self.protocol == "auto" and named in PROTOCOLS):
            return named
        return self.protocol

    def messages(self) -> Iterator[Captured]:
        """Every message in order, up to the end of the file or to where it is cut short."""
        told = self._told()
        with self.path.open("rb") as file:
            while head := file.read(4):
                parts = self._parts(file, head)
                if parts is None:
                    return
                received_ns, lane = next(told, (0, 0))
                yield Captured(parts=parts, received_ns=received_ns, lane=lane)

    def _parts(self, file: BinaryIO, head: bytes) -> tuple[bytes, ...] | None:
        began = file.tell() - len(head)
        number = int.from_bytes(head, "little")
        if len(head) < 4 or not 0 < number <= _MOST_PARTS:
            self.cut_short = f"at byte {began}: no number of parts"
            return None
        parts = []
        for _ in range(number):
            length = file.read(8)
            size = int.from_bytes(length, "little")
            # Looked at before it is read: a length that lies must not cost memory.
            if len(length) < 8 or size > self._size_bytes - file.tell():
                self.cut_short = f"at byte {began}: the file ends within a message"
                return None
            parts.append(file.read(size))
        return tuple(parts)

    def _told(self) -> Iterator[tuple[int, int]]:
        """Time and lane of each message, as far as the index says them."""
        if not self._has_index:
            return
        with _index_of(self.path).open() as index:
            index.readline(1024)
            while line := index.readline(64):
                received, _, lane = line.partition(" ")
                try:
                    yield int(received), min(max(0, int(lane)), self.lanes - 1)
                except ValueError:
                    return


def _index_of(path: Path) -> Path:
    return path.with_name(path.name + ".index")

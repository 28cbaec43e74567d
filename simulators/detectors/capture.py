"""Captures (``.zcap``) to send once more: each message as it was, at its time or at a rate."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

__all__ = ["captured", "lanes_of"]


def captured(path: Path) -> Iterator[tuple[list[bytes], int, int]]:
    """Parts, time in ns and socket of each message; times and sockets 0 where none are known.

    Raises:
        ValueError: the file ends within a message.
    """
    told = _told(path)
    with path.open("rb") as file:
        while head := file.read(4):
            parts = []
            for _ in range(struct.unpack("<I", head.ljust(4, b"\0"))[0]):
                length = file.read(8)
                size = struct.unpack("<Q", length)[0] if len(length) == 8 else -1
                part = file.read(size) if 0 <= size <= path.stat().st_size else b""
                if len(part) != size:
                    raise ValueError(
                        f"{path}: ends within a message; expected a capture that "
                        "'triage record' or --record made"
                    )
                parts.append(part)
            time_ns, lane = next(told, (0, 0))
            yield parts, time_ns, lane


def lanes_of(path: Path) -> int:
    """Sockets that the messages came on, as far as the index beside the capture says."""
    return 1 + max((lane for _, lane in _told(path)), default=0)


def _told(path: Path) -> Iterator[tuple[int, int]]:
    index = path.with_name(path.name + ".index")
    if not index.exists():
        return
    with index.open() as lines:
        next(lines, "")
        for line in lines:
            time_ns, _, lane = line.partition(" ")
            if not (time_ns.isdecimal() and lane.strip().isdecimal()):
                return
            yield int(time_ns), int(lane)

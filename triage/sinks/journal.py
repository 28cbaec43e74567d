"""The decision journal: one line per dropped frame, on disk before the frame is let go.

It is one file for all runs in a folder, only ever added to; ``run_id`` and ``ordinal`` tell which
run dropped a frame and as which of those it received. A frame is dropped when its whole line is
there and no later one says that this was withdrawn.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from triage.errors import ConfigError
from triage.records import Decision, Reason

__all__ = ["Journal", "dropped_by"]

log = logging.getLogger(__name__)

_READ_BYTES = 4 << 20
"""Of the end of a journal; the drops of one turn, 64, are some ten thousand bytes."""


class Journal:
    """Appends drops to ``journal.jsonl``; the operating system has a line when write returns.

    A machine that loses power may lose the last lines, unless ``fsync``; a process that is killed
    does not. A line that a kill cut off is removed when the file is opened again: its frame was
    never dropped.

    Args:
        run_id: of this run.
        fsync: wait for the disk at each write.
    """

    def __init__(self, path: Path, run_id: str = "", *, fsync: bool = False) -> None:
        self.path = path
        self._run_id = run_id
        self._fsync = fsync
        self._end: int | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._remove_torn_line()
        except OSError as err:
            raise ConfigError(
                f"decision journal {path}: {err.strerror}; expected a file that can be "
                "written; set [output] directory to a writable folder"
            ) from err

    def dropped(self, decisions: Sequence[Decision]) -> int:
        """Write drops down, in order, by one write; how many are on record, from the first on.

        Those that are not must go on.
        """
        lines = [_line(decision, self._run_id) for decision in decisions]
        data = b"".join(lines)
        try:
            if self._end is not None:
                self._cut(self._end)
            before = os.lseek(self._fd, 0, os.SEEK_END)
            try:
                written = os.write(self._fd, data)
                if written < len(data):
                    # A torn line would join the next one. A full disk still takes bytes back.
                    written = data.rfind(b"\n", 0, written) + 1
                    self._cut(before + written)
                if self._fsync:
                    os.fdatasync(self._fd)
            except OSError:
                # Nobody may read of drops that are not carried out.
                self._cut(before)
                return 0
        except OSError:
            return 0
        return data.count(b"\n", 0, written)

    def _cut(self, end: int) -> None:
        """End the file there, now or before anything else is written."""
        self._end = end
        os.ftruncate(self._fd, end)
        self._end = None

    def _remove_torn_line(self) -> None:
        """Cut the file off behind its last whole line."""
        size = end = os.lseek(self._fd, 0, os.SEEK_END)
        while end > 0:
            first = max(0, end - _READ_BYTES)
            data = os.pread(self._fd, end - first, first)
            if (at := data.rfind(b"\n")) >= 0:
                end = first + at + 1
                break
            end = first
        if end < size:
            log.warning("%s: a line that was cut off is removed (%d bytes)", self.path, size - end)
            os.ftruncate(self._fd, end)

    def withdrawn(self, decisions: Sequence[Decision]) -> None:
        """Say of drops on record that they were not carried out: their frames went on.

        For lines that a disk took so late that nobody waited for them any more. Where this one
        fails too, a frame that went on stands as dropped, never the other way round.
        """
        lines = [
            _encode(
                {
                    "series_id": decision.series_id,
                    "series_unique_id": decision.series_unique_id,
                    "image_id": decision.image_id,
                    "run_id": self._run_id,
                    "ordinal": decision.ordinal,
                    "withdrawn": True,
                }
            )
            + b"\n"
            for decision in decisions
        ]
        with contextlib.suppress(OSError):
            os.write(self._fd, b"".join(lines))

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


_encode = msgspec.json.Encoder().encode


def dropped_by(path: Path, run_id: str) -> dict[int, Reason]:
    """Ordinals of the frames that a run dropped last, and why; lines that are none are left out.

    Raises:
        OSError: the journal is there and cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _READ_BYTES))
            data = file.read()
    except FileNotFoundError:
        return {}
    # What follows the last line end was never finished.
    data = data[: data.rfind(b"\n") + 1]
    found: dict[int, Reason] = {}
    for text in data.splitlines():
        try:
            line = json.loads(text)
            if line["run_id"] != run_id:
                continue
            if line.get("withdrawn"):
                found.pop(line["ordinal"], None)
            else:
                found[int(line["ordinal"])] = Reason(line["reason"])
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _line(decision: Decision, run_id: str) -> bytes:
    p_blank = decision.scores.p_blank
    return (
        _encode(
            {
                "series_id": decision.series_id,
                "series_unique_id": decision.series_unique_id,
                "image_id": decision.image_id,
                "file": decision.file,
                "frame": decision.frame,
                "reason": decision.reason.value,
                "p_blank": round(p_blank, 6) if math.isfinite(p_blank) else None,
                "model_id": decision.model_id,
                "policy_id": decision.policy_id,
                "run_id": run_id,
                "ordinal": decision.ordinal,
            }
        )
        + b"\n"
    )

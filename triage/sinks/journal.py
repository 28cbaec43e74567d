"""The decision journal: one line per dropped frame, on disk before the frame is let go.

The journal is what remains when the process is killed: received ids that are neither with the
writer nor in the journal were never decided.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from triage.errors import ConfigError
from triage.records import Decision

__all__ = ["Journal"]


class Journal:
    """Appends drops to ``journal.jsonl``; the operating system has a line when write returns.

    A machine that loses power may lose the last lines; a process that is killed does not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as err:
            raise ConfigError(
                f"decision journal {path}: {err.strerror}; expected a file that can be "
                "written; set [output] directory to a writable folder"
            ) from err

    def dropped(self, decisions: Sequence[Decision]) -> int:
        """Write drops down, in order, by one write; how many are on record, from the first on.

        Those that are not must go on.
        """
        lines = [_line(decision) for decision in decisions]
        data = b"".join(lines)
        try:
            written = os.write(self._fd, data)
            if written == len(data):
                return len(lines)
            # A torn line would join the next one: end it, so that only this one is lost.
            os.write(self._fd, b"\n")
        except OSError:
            return 0
        return data.count(b"\n", 0, written)

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


def _line(decision: Decision) -> bytes:
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
            }
        )
        + b"\n"
    )

"""The decision journal: one line per dropped frame, on disk before the frame is let go.

The journal is what remains when the process is killed: received ids that are neither with the
writer nor in the journal were never decided.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

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

    def dropped(self, decision: Decision) -> bool:
        """Write one drop down. False when it could not be: the frame must then go on."""
        p_blank = decision.scores.p_blank
        line = json.dumps(
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
            },
            separators=(",", ":"),
        )
        data = line.encode() + b"\n"
        try:
            written = os.write(self._fd, data)
            if written == len(data):
                return True
            # A torn line would join the next one: end it, so that only this one is lost.
            os.write(self._fd, b"\n")
        except OSError:
            return False
        return False

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

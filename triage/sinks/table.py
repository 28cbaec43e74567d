"""``decisions.parquet``: one row per frame, in frame order."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from triage.errors import TriageError
from triage.records import SCORE_NAMES, Decision

__all__ = ["COLUMNS", "DecisionTable", "row"]

COLUMNS: dict[str, str] = {
    "series_id": "int64",
    "series_unique_id": "string",
    "image_id": "int64",
    "file": "string",
    "frame": "int64",
    "verdict": "string",
    "reason": "string",
    "forwarded": "bool",
    "override": "string",
    **dict.fromkeys(SCORE_NAMES, "float32"),
    "ood": "bool",
    "model_id": "string",
    "policy_id": "string",
    "latency_us": "float32",
    "duplicate": "bool",
    "detail": "string",
}
"""Columns and their Arrow types, in order. The last two say more and may be ignored."""

_ROWS_PER_GROUP = 8192
"""About 2 MB of rows held in memory, small beside one frame."""


def row(decision: Decision) -> dict[str, Any]:
    """One decision as plain values under the names of :data:`COLUMNS`."""
    values: dict[str, Any] = {
        "series_id": decision.series_id,
        "series_unique_id": decision.series_unique_id,
        "image_id": decision.image_id,
        "file": decision.file,
        "frame": decision.frame,
        "verdict": decision.verdict.value,
        "reason": decision.reason.value,
        "forwarded": decision.forwarded,
        "override": decision.override.value,
        "ood": decision.scores.ood,
        "model_id": decision.model_id,
        "policy_id": decision.policy_id,
        "latency_us": decision.latency_us,
        "duplicate": decision.duplicate,
        "detail": decision.detail,
    }
    for name in SCORE_NAMES:
        values[name] = getattr(decision.scores, name)
    return values


class DecisionTable:
    """Writes the table while frames come; it is readable once :meth:`close` returned.

    Rows go to ``decisions.parquet.part``, renamed at close, so that a table under its own name
    is always whole.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        self._pa = pa
        types = {
            "int64": pa.int64(),
            "string": pa.string(),
            "bool": pa.bool_(),
            "float32": pa.float32(),
        }
        self._schema = pa.schema([(name, types[kind]) for name, kind in COLUMNS.items()])
        self._part = path.with_name(path.name + ".part")
        self._rows: list[dict[str, Any]] = []
        self._writer: Any = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._part, self._schema)
        except OSError as err:
            raise TriageError(
                f"decision table {path}: {err}; expected a folder that can be written"
            ) from err

    def add(self, decision: Decision) -> None:
        """Append one row.

        Raises:
            TriageError: the disk refused it.
        """
        self._rows.append(row(decision))
        if len(self._rows) >= _ROWS_PER_GROUP:
            self._flush()

    def close(self) -> None:
        """Finish the file under its name; may be called twice."""
        if self._writer is None:
            return
        self._flush()
        writer, self._writer = self._writer, None
        try:
            writer.close()
            self._part.replace(self.path)
        except OSError as err:
            raise TriageError(f"decision table {self.path}: {err}") from err

    def abandon(self) -> None:
        """Let go without finishing."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer = None

    def _flush(self) -> None:
        if not self._rows:
            return
        columns = {name: [r[name] for r in self._rows] for name in COLUMNS}
        self._rows = []
        try:
            self._writer.write_table(self._pa.table(columns, schema=self._schema))
        except OSError as err:
            raise TriageError(
                f"decision table {self.path}: {err}; rows of this group are lost, "
                "the forwarded frames and the journal are not"
            ) from err

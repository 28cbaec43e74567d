"""``decisions.parquet``: one row per frame, in frame order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from triage.errors import TriageError
from triage.records import SCORE_NAMES, Decision

__all__ = ["COLUMNS", "DecisionTable"]

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

_ROWS_PER_TURN = 512
"""Rows made into columns at once: a millisecond's work, so that no frame waits for more."""


def _getter(name: str) -> Callable[[Decision], Any]:
    if name in SCORE_NAMES or name == "ood":
        return attrgetter(f"scores.{name}")
    return attrgetter(name)


_GETTERS = {name: _getter(name) for name in COLUMNS}


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
        self._rows: list[Decision] = []
        self._batches: list[Any] = []
        self._writer: Any = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._part, self._schema)
        except OSError as err:
            raise TriageError(
                f"decision table {path}: {err}; expected a folder that can be written"
            ) from err

    def add(self, decisions: Sequence[Decision]) -> None:
        """Append rows.

        Raises:
            TriageError: the disk refused them.
        """
        self._rows += decisions
        if len(self._rows) >= _ROWS_PER_TURN:
            self._make_columns()
            if len(self._batches) * _ROWS_PER_TURN >= _ROWS_PER_GROUP:
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

    def _make_columns(self) -> None:
        pa, rows = self._pa, self._rows
        self._rows = []
        # Verdicts and reasons are members of a StrEnum, and so strings to Arrow.
        columns = [
            pa.array(list(map(_GETTERS[field.name], rows)), type=field.type)
            for field in self._schema
        ]
        self._batches.append(pa.RecordBatch.from_arrays(columns, schema=self._schema))

    def _flush(self) -> None:
        if self._rows:
            self._make_columns()
        if not self._batches:
            return
        table = self._pa.Table.from_batches(self._batches, schema=self._schema).combine_chunks()
        self._batches = []
        try:
            self._writer.write_table(table)
        except OSError as err:
            raise TriageError(
                f"decision table {self.path}: {err}; rows of this group are lost, "
                "the forwarded frames and the journal are not"
            ) from err

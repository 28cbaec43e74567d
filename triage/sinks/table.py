"""``decisions.parquet``: one row per frame, in frame order.

While a run is on, its rows are in ``decisions.arrows`` beside it, an Arrow stream that is readable
up to its last whole batch whatever happens to the process. The end of the run makes the table of
it; what a killed run left is made into a table when the next one begins. Tables of earlier runs in
the same folder keep their rows under a number: ``decisions_1.parquet`` is the oldest, and
``report_1.json`` its report.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from triage.errors import TriageError
from triage.records import SCORE_NAMES, Decision

__all__ = [
    "COLUMNS",
    "DecisionTable",
    "earlier_tables",
    "report_of",
    "rows_on_disk",
    "stored_batches",
]

log = logging.getLogger(__name__)

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

_ROWS_PER_TURN = 512
"""Rows made into columns at once: a millisecond's work, so that no frame waits for more."""

_HELD_NS = 1_000_000_000
"""How long rows may wait in memory while frames come; a killed process loses no more."""


def _getter(name: str) -> Callable[[Decision], Any]:
    if name in SCORE_NAMES or name == "ood":
        return attrgetter(f"scores.{name}")
    return attrgetter(name)


_GETTERS = {name: _getter(name) for name in COLUMNS}


def rows_on_disk(table: Path) -> Path:
    """Where the rows of ``table`` are while its run is on, or after it was killed."""
    return table.with_suffix(".arrows")


def report_of(table: Path) -> Path:
    """The report of the run that made ``table``: ``report_3.json`` of ``decisions_3.parquet``."""
    return table.with_name("report" + table.stem.removeprefix("decisions") + ".json")


class DecisionTable:
    """Writes rows while frames come; the table is there once :meth:`close` returned.

    Args:
        run_id: of this run, for the metadata of the table.
        clock: monotonic, ns.

    Raises:
        TriageError: the folder cannot be written.
    """

    def __init__(
        self, path: Path, run_id: str = "", *, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        import pyarrow as pa

        self.path = path
        self._pa = pa
        self._clock = clock
        self._schema = _schema().with_metadata({"run_id": run_id})
        self._rows: list[Decision] = []
        self._written_ns = clock()
        self._size = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _set_aside(path)
            self._fd = os.open(rows_on_disk(path), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            self._append(self._schema.serialize())
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
        now = self._clock()
        if len(self._rows) >= _ROWS_PER_TURN or now - self._written_ns >= _HELD_NS:
            self.flush()

    def flush(self) -> None:
        """Put every row so far on disk.

        Raises:
            TriageError: the disk refused them; they are lost.
        """
        rows, self._rows = self._rows, []
        self._written_ns = self._clock()
        if not rows:
            return
        pa = self._pa
        # Verdicts and reasons are members of a StrEnum, and so strings to Arrow.
        columns = [
            pa.array(list(map(_GETTERS[field.name], rows)), type=field.type)
            for field in self._schema
        ]
        try:
            self._append(pa.RecordBatch.from_arrays(columns, schema=self._schema).serialize())
        except OSError as err:
            raise TriageError(
                f"decision table {self.path}: {err}; {len(rows)} rows are lost, "
                "the forwarded frames and the journal are not"
            ) from err

    def close(self) -> None:
        """Make the table; may be called twice.

        Raises:
            TriageError: the disk refused a part of it; the rows are where they were.
        """
        if self._fd < 0:
            return
        failed: TriageError | None = None
        try:
            self.flush()
        except TriageError as err:
            failed = err
        try:
            _make_table(rows_on_disk(self.path), self.path)
            rows_on_disk(self.path).unlink()
        except OSError as err:
            raise TriageError(
                f"decision table {self.path}: {err}; its rows are in "
                f"{rows_on_disk(self.path).name}: the next run makes a table of them, and "
                "'triage export' reads them"
            ) from err
        finally:
            os.close(self._fd)
            self._fd = -1
        if failed is not None:
            raise failed

    def _append(self, message: Any) -> None:
        """Write one message of the stream, or nothing of it."""
        view = memoryview(message)
        done = 0
        try:
            while done < view.nbytes:
                done += os.write(self._fd, view[done:])
        except OSError:
            with contextlib.suppress(OSError):
                # What follows half a message could not be read.
                os.ftruncate(self._fd, self._size)
                os.lseek(self._fd, self._size, os.SEEK_SET)
            raise
        self._size += done


def _set_aside(table: Path) -> None:
    """Give what earlier runs left in the folder the next free number: a table with its report,
    or the rows of a run that was killed, as a table."""
    number = 1 + max((_number(earlier) for earlier in earlier_tables(table)), default=0)
    aside = table.with_stem(f"{table.stem}_{number}")
    if table.exists():
        report = report_of(table)
        if report.exists():
            report.replace(report_of(aside))
        table.replace(aside)
        log.warning("%s is there from an earlier run: it is %s now", table, aside.name)
    rows = rows_on_disk(table)
    if rows.exists() and any(True for _ in stored_batches(rows)):
        if aside.exists():
            aside = table.with_stem(f"{table.stem}_{number + 1}")
        _make_table(rows, aside)
        log.warning("%s: a run ended without its table; it is %s now", rows, aside.name)


def earlier_tables(table: Path) -> list[Path]:
    """The tables of earlier runs beside ``table``, the oldest first."""
    found = table.parent.glob(f"{table.stem}_*{table.suffix}")
    return sorted((each for each in found if _number(each)), key=_number)


def _number(table: Path) -> int:
    """Of an earlier table; 0 for what is none."""
    number = table.stem.rpartition("_")[2]
    return int(number) if number.isdecimal() else 0


def stored_batches(rows: Path) -> Iterator[Any]:
    """The whole batches of a stream of rows, in order; its end may be missing."""
    import pyarrow as pa

    with rows.open("rb") as file, contextlib.suppress(pa.ArrowInvalid, OSError):
        yield from pa.ipc.open_stream(file)


def _make_table(rows: Path, table: Path) -> None:
    """Write a stream of rows as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    part = table.with_name(table.name + ".part")
    try:
        with pq.ParquetWriter(part, _stored_schema(rows)) as writer:
            held: list[Any] = []
            for batch in stored_batches(rows):
                held.append(batch)
                if sum(each.num_rows for each in held) >= _ROWS_PER_GROUP:
                    writer.write_table(pa.Table.from_batches(held).combine_chunks())
                    held = []
            if held:
                writer.write_table(pa.Table.from_batches(held).combine_chunks())
        part.replace(table)
    finally:
        part.unlink(missing_ok=True)


def _stored_schema(rows: Path) -> Any:
    """That of the stream, with its run's metadata."""
    import pyarrow as pa

    with rows.open("rb") as file:
        return pa.ipc.open_stream(file).schema


def _schema() -> Any:
    import pyarrow as pa

    types = {
        "int64": pa.int64(),
        "string": pa.string(),
        "bool": pa.bool_(),
        "float32": pa.float32(),
    }
    return pa.schema([(name, types[kind]) for name, kind in COLUMNS.items()])

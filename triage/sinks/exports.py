"""The decisions of a run in the form that the next program wants.

A veto becomes an exclusion and a keep becomes an entry, by the policy's verdict, whatever the
mode of the run was. Image numbers are those that the program counts by: from 1 in a file of many
frames, and the number in the name of a file that holds one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triage.errors import ConfigError, TriageError, UnreadableFile

__all__ = ["FORMATS", "export"]

_HDF5_SUFFIXES = {".h5", ".hdf5", ".hdf", ".nxs", ".cxi"}


@dataclass(frozen=True, slots=True)
class _Row:
    """What an export needs of one decision."""

    series: tuple[int, str]
    file: str
    frame: int
    image_id: int
    vetoed: bool

    @property
    def in_stack(self) -> bool:
        return Path(self.file).suffix.lower() in _HDF5_SUFFIXES

    @property
    def number(self) -> int:
        """What DIALS and XDS call this image."""
        return self.frame + 1 if self.in_stack else self.image_id


def export(table: Path, to: str, out: Path) -> list[Path]:
    """Write the decisions of ``table`` into the folder ``out`` in the form of ``to``.

    Args:
        table: ``decisions.parquet``, or the folder that holds it.
        to: one of :data:`FORMATS`.

    Returns:
        The files written.

    Raises:
        UnreadableFile: no table, or one without frames that this format can name.
        ConfigError: an unknown format.
        TriageError: ``out`` cannot be written.
    """
    if to not in FORMATS:
        raise ConfigError(f"--to {to}: expected one of {', '.join(FORMATS)}")
    path = table / "decisions.parquet" if table.is_dir() else table
    decisions = _read(path)
    try:
        out.mkdir(parents=True, exist_ok=True)
        return FORMATS[to](path, decisions, out)
    except OSError as err:
        raise TriageError(f"export to {out}: {err}; expected a folder that can be written") from err


def _read(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as err:
        raise UnreadableFile(
            f"{path}: {err}; expected the decisions.parquet of a finished run"
        ) from err


def _rows(path: Path, decisions: Any) -> list[_Row]:
    """Recorded frames in order, each once; those that could not be read have no number."""
    names = ("series_id", "series_unique_id", "file", "frame", "image_id", "verdict", "duplicate")
    columns = (decisions.column(name).to_pylist() for name in names)
    rows = [
        _Row((series_id, unique_id), file, frame, image_id, verdict == "veto")
        for series_id, unique_id, file, frame, image_id, verdict, duplicate in zip(
            *columns, strict=True
        )
        if file and frame >= 0 and not duplicate
    ]
    if not rows:
        raise UnreadableFile(
            f"{path}: no frame of a recorded file; a live run names none: replay what the writer "
            "wrote, and export that"
        )
    return rows


def _series(rows: Sequence[_Row]) -> Iterator[tuple[_Row, list[_Row]]]:
    """What a program imports as one data set: a file of many frames, or a numbered series."""
    for _, members in itertools.groupby(rows, lambda r: (r.series, r.in_stack and r.file)):
        of_one = list(members)
        yield of_one[0], of_one


def _vetoed_ranges(rows: Sequence[_Row]) -> list[tuple[int, int]]:
    """Runs of vetoed image numbers, both ends included."""
    ranges: list[tuple[int, int]] = []
    for number in sorted({row.number for row in rows if row.vetoed}):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges


def _to_crystfel(path: Path, decisions: Any, out: Path) -> list[Path]:
    """``kept.lst``: one event a line; ``//N`` is frame N, from 0, of a stack."""
    made = out / "kept.lst"
    with made.open("w", encoding="utf-8") as lines:
        for row in _rows(path, decisions):
            if not row.vetoed:
                lines.write(f"{row.file} //{row.frame}\n" if row.in_stack else f"{row.file}\n")
    return [made]


def _to_dials(path: Path, decisions: Any, out: Path) -> list[Path]:
    """``exclude.phil``: a parameter file; experiments count in the order of the run's inputs."""
    made = out / "exclude.phil"
    with made.open("w", encoding="utf-8") as lines:
        for number, (_, rows) in enumerate(_series(_rows(path, decisions))):
            for first, last in _vetoed_ranges(rows):
                lines.write(f"exclude_images = {number}:{first}:{last}\n")
    return [made]


def _to_xds(path: Path, decisions: Any, out: Path) -> list[Path]:
    """One file of ``EXCLUDE_DATA_RANGE`` lines per data set, to go into its XDS.INP."""
    made = []
    for number, (first_row, rows) in enumerate(_series(_rows(path, decisions))):
        name = out / f"{number:03d}_{Path(first_row.file).name}.inp"
        with name.open("w", encoding="utf-8") as lines:
            lines.write(f"! vetoed images of {first_row.file}\n")
            for first, last in _vetoed_ranges(rows):
                lines.write(f"EXCLUDE_DATA_RANGE= {first} {last}\n")
        made.append(name)
    return made


def _to_csv(path: Path, decisions: Any, out: Path) -> list[Path]:
    """``decisions.csv``: the whole table; what was not scored is empty."""
    import pyarrow.compute as pc
    from pyarrow import csv

    for i, field in enumerate(decisions.schema):
        if str(field.type) == "float":
            column = decisions.column(i)
            unscored = pc.is_nan(column)
            decisions = decisions.set_column(
                i, field, pc.if_else(unscored, None, column).cast(field.type)
            )
    made = out / "decisions.csv"
    csv.write_csv(decisions, made)
    return [made]


def _to_nexus(path: Path, decisions: Any, out: Path) -> list[Path]:
    """``decisions.nxs``: every column as a dataset of ``/entry/triage``."""
    import h5py

    made = out / "decisions.nxs"
    with h5py.File(made, "w") as file:
        entry = file.create_group("entry")
        entry.attrs["NX_class"] = "NXentry"
        group = entry.create_group("triage")
        group.attrs["NX_class"] = "NXcollection"
        for name in decisions.column_names:
            values = decisions.column(name)
            if str(values.type) == "string":
                group.create_dataset(name, data=values.to_pylist(), dtype=h5py.string_dtype())
            else:
                group.create_dataset(name, data=values.to_numpy())
            if name.endswith("_deg"):
                group[name].attrs["units"] = "deg"
            elif name.endswith("_angstrom"):
                group[name].attrs["units"] = "angstrom"
            elif name.endswith("_us"):
                group[name].attrs["units"] = "us"
    return [made]


FORMATS = {
    "crystfel": _to_crystfel,
    "dials": _to_dials,
    "xds": _to_xds,
    "csv": _to_csv,
    "nexus": _to_nexus,
}
"""What :func:`export` writes, by the name of the program or form."""

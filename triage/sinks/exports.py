"""The decisions of a run in the form that the next program wants.

CrystFEL gets the events that the policy keeps, whatever the mode of the run was. DIALS and XDS
exclude images of a sweep and know no exclusion of stills, and a sweep is never thinned by the
policy: what they get are the images of sweeps whose score alone would have been a veto. Image
numbers are those that the program counts by: from 1 in a file of many frames, and the number in
the name of a file that holds one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triage.errors import ConfigError, TriageError, UnreadableFile

__all__ = ["FORMATS", "export"]

_NEEDED = (
    *("series_id", "series_unique_id", "file", "frame", "image_id", "verdict"),
    *("duplicate", "reason", "p_blank"),
)
_HDF5_SUFFIXES = {".h5", ".hdf5", ".hdf", ".nxs", ".cxi"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """What an export needs of one decision."""

    series: tuple[int, str]
    file: str
    frame: int
    image_id: int
    vetoed: bool
    is_rotation: bool
    p_blank: float

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
        table = pq.read_table(path)
        missing = [name for name in _NEEDED if name not in table.column_names]
        if missing:
            raise UnreadableFile(
                f"{path}: has no column {', '.join(missing)}; expected the table of a run"
            )
        return table
    except (OSError, pa.ArrowInvalid) as err:
        raise UnreadableFile(
            f"cannot read {path}: {type(err).__name__}; expected the decisions.parquet of a "
            "finished run, or its folder"
        ) from err


def _rows(path: Path, decisions: Any) -> list[_Row]:
    """Recorded frames in order, each once, without those that could not be read."""
    rows = [
        _Row(
            series=(row["series_id"], row["series_unique_id"]),
            file=row["file"],
            frame=row["frame"],
            image_id=row["image_id"],
            vetoed=row["verdict"] == "veto",
            is_rotation=row["reason"] == "rotation",
            p_blank=row["p_blank"],
        )
        for row in decisions.select(_NEEDED).to_pylist()
        if row["file"] and row["frame"] >= 0
        if not row["duplicate"] and row["reason"] != "malformed"
    ]
    if not rows:
        raise UnreadableFile(
            f"{path}: names no readable frame of a recorded file (a live run names none); expected "
            "the table of a replay; replay what the writer wrote, and export that"
        )
    return rows


def _series(rows: Sequence[_Row]) -> Iterator[tuple[_Row, list[_Row]]]:
    """What a program imports as one data set: a file of many frames, or a numbered series."""
    for _, members in itertools.groupby(rows, lambda r: (r.series, r.in_stack and r.file)):
        of_one = list(members)
        yield of_one[0], of_one


def _threshold(path: Path) -> float:
    """The run's threshold, from the report beside its table."""
    report = path.with_name("report.json")
    try:
        return float(json.loads(report.read_text())["thresholds"]["p_blank_veto"])
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise UnreadableFile(
            f"cannot read {report}: {type(err).__name__}; expected the run's report beside its "
            "table, with the threshold that its scores are compared with"
        ) from err


def _blank_ranges(rows: Sequence[_Row], threshold: float) -> list[tuple[int, int]]:
    """Runs of image numbers whose score would have been a veto, both ends included."""
    ranges: list[tuple[int, int]] = []
    for number in sorted({row.number for row in rows if row.p_blank >= threshold}):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges


def _to_crystfel(path: Path, decisions: Any, out: Path) -> list[Path]:
    """``kept.lst``: one event a line; ``//N`` is frame N, from 0, of a stack."""
    rows = _rows(path, decisions)
    for file in {row.file for row in rows if row.in_stack}:
        _refuse_links(Path(file))
    lines = [
        f"{row.file} //{row.frame}" if row.in_stack else row.file for row in rows if not row.vetoed
    ]
    return [_written(out / "kept.lst", lines)]


def _refuse_links(file: Path) -> None:
    """A master that only links its data files has no stack that an event could count in."""
    import h5py

    try:
        with h5py.File(file) as opened:
            data = opened.get("entry/data")
            linked = isinstance(data, h5py.Group) and "data" not in data and len(data) > 1
    except OSError:
        return  # no longer here: the list is as good as the table
    if linked:
        raise UnreadableFile(
            f"{file}: links several data files, and its frames are numbered over all of them, "
            "which CrystFEL cannot; replay the data files themselves, and export that"
        )


def _to_dials(path: Path, decisions: Any, out: Path) -> list[Path]:
    """``exclude.phil``: a parameter file; experiments count in the order of the run's inputs."""
    threshold, lines = _threshold(path), []
    for number, (first_row, rows) in enumerate(_series(_rows(path, decisions))):
        lines.append(f"# experiment {number} is {first_row.file}, if imported in this order")
        if not first_row.is_rotation:
            lines.append("# stills: DIALS excludes none; import what --write-kept wrote instead")
            continue
        lines += [
            f"exclude_images = {number}:{first}:{last}"
            for first, last in _blank_ranges(rows, threshold)
        ]
    return [_written(out / "exclude.phil", lines)]


def _to_xds(path: Path, decisions: Any, out: Path) -> list[Path]:
    """One file of ``EXCLUDE_DATA_RANGE`` lines per sweep, to go into its XDS.INP."""
    threshold, made = _threshold(path), []
    for number, (first_row, rows) in enumerate(_series(_rows(path, decisions))):
        if not first_row.is_rotation:
            continue
        lines = [f"! images of {first_row.file} that look blank"]
        lines += [
            f"EXCLUDE_DATA_RANGE= {first} {last}" for first, last in _blank_ranges(rows, threshold)
        ]
        made.append(_written(out / f"{number:03d}_{Path(first_row.file).name}.inp", lines))
    if not made:
        raise UnreadableFile(f"{path}: holds stills only; XDS processes sweeps")
    return made


def _written(path: Path, lines: Sequence[str]) -> Path:
    with _whole(path) as part:
        part.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A place to write to: ``path`` is whole at the end, or stays what it was before."""
    part = path.with_name(path.name + ".part")
    yield part
    part.replace(path)


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
    with _whole(made) as part:
        csv.write_csv(decisions, part)
    return [made]


def _to_nexus(path: Path, decisions: Any, out: Path) -> list[Path]:
    """``decisions.nxs``: every column as a dataset of ``/entry/triage``."""
    import h5py

    made = out / "decisions.nxs"
    with _whole(made) as part, h5py.File(part, "w") as file:
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

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
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from triage.errors import ConfigError, FileError, TriageError, UnreadableFile
from triage.records import Series
from triage.sinks.crystfel import file_geometry
from triage.sinks.nxmx import storable
from triage.sinks.table import earlier_tables, report_of, rows_on_disk, stored_batches

__all__ = ["FORMATS", "export"]

log = logging.getLogger(__name__)

_NEEDED = (
    *("series_id", "series_unique_id", "file", "frame", "image_id", "verdict"),
    *("duplicate", "reason", "p_blank", "ood"),
)
_HDF5_SUFFIXES = {".h5", ".hdf5", ".hdf", ".nxs", ".cxi"}
_READ_BY_CRYSTFEL = (*sorted(_HDF5_SUFFIXES), ".cbf", ".cbf.gz")
_CAPTURE = ".zcap"
"""Messages of a stream, which no other program reads."""


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
    ood: bool

    @property
    def in_stack(self) -> bool:
        return Path(self.file).suffix.lower() in _HDF5_SUFFIXES

    @property
    def number(self) -> int:
        """What DIALS and XDS call this image."""
        return self.frame + 1 if self.in_stack else self.image_id


class PlaceLike(Protocol):
    """Where consecutive frames of a file are; ``triage.ingest.files.Place`` is one."""

    @property
    def file(self) -> Path: ...
    @property
    def dataset(self) -> str: ...
    @property
    def first(self) -> int: ...
    @property
    def frames(self) -> int: ...
    @property
    def in_stack(self) -> bool: ...


class RecordedLike(Protocol):
    """What is known of a recorded file; ``triage.ingest.files.Recorded`` is one."""

    @property
    def series(self) -> Series: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def places(self) -> Sequence[PlaceLike]: ...
    @property
    def mask(self) -> tuple[Path, str] | None: ...


Describes = Callable[[Path], RecordedLike]
"""Says where the frames of a recorded file are; raises FileError where it cannot be opened."""


def export(table: Path, to: str, out: Path, describe: Describes) -> list[Path]:
    """Write the decisions of ``table`` into the folder ``out`` in the form of ``to``.

    Of the folder of a live run it is the rows of every run in it, in order: one that was started
    anew goes on in a table of its own. A replay decides its inputs whole, so that of several in a
    folder only the last counts; the log names the tables that are left out.

    Args:
        table: ``decisions.parquet``, or the folder that holds it.
        to: one of :data:`FORMATS`.
        describe: see :data:`Describes`.

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
    if table.is_dir():
        decisions = _with_earlier(path, decisions)
    try:
        out.mkdir(parents=True, exist_ok=True)
        return FORMATS[to](path, decisions, out, describe)
    except OSError as err:
        raise TriageError(f"export to {out}: {err}; expected a folder that can be written") from err


def _read(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.exists() or not rows_on_disk(path).exists():
            table = pq.read_table(path)
        else:
            # The run is still on, or was killed.
            batches = list(stored_batches(rows_on_disk(path)))
            table = pa.Table.from_batches(batches) if batches else pq.read_table(path)
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


def _with_earlier(path: Path, decisions: Any) -> Any:
    """The rows of the tables of earlier live runs in the folder, and ``decisions``, if live."""
    import pyarrow as pa

    found = earlier_tables(path)
    if not found:
        return decisions
    used, left_out = [], [earlier.name for earlier in found]
    if not _is_recorded(decisions):
        read = {earlier.name: _read(earlier) for earlier in found}
        used = [name for name, rows in read.items() if not _is_recorded(rows)]
        left_out = [name for name in read if name not in used]
        parts = [*(read[name] for name in used), decisions]
        decisions = pa.concat_tables(parts, promote_options="default")
    if used:
        log.warning("from %s and %s", ", ".join(used), path.name)
    if left_out:
        log.warning(
            "%s: of other runs in this folder, and left out; name one to export it",
            ", ".join(left_out),
        )
    return decisions


def _is_recorded(decisions: Any) -> bool:
    """Whether rows are of a replay: those name files."""
    import pyarrow.compute as pc

    return bool(pc.any(pc.not_equal(decisions["file"], "")).as_py())


def _rows(path: Path, decisions: Any) -> list[_Row]:
    """Frames of recorded files in order, each once, without those that could not be read."""
    rows = [
        _Row(
            series=(row["series_id"], row["series_unique_id"]),
            file=row["file"],
            frame=row["frame"],
            image_id=row["image_id"],
            vetoed=row["verdict"] == "veto",
            is_rotation=row["reason"] == "rotation",
            p_blank=row["p_blank"],
            ood=row["ood"],
        )
        for row in decisions.select(_NEEDED).to_pylist()
        if row["file"] and row["frame"] >= 0 and not row["file"].endswith(_CAPTURE)
        if not row["duplicate"] and row["reason"] != "malformed"
    ]
    if not rows:
        raise UnreadableFile(
            f"{path}: names no readable frame of a recorded file (a live run names none, and a "
            "capture is read by triage alone); expected the table of a replay; replay what the "
            "writer wrote, and export that"
        )
    return rows


def _series(rows: Sequence[_Row]) -> Iterator[tuple[_Row, list[_Row]]]:
    """What a program imports as one data set: a file of many frames, or a numbered series."""
    for _, members in itertools.groupby(rows, lambda r: (r.series, r.in_stack and r.file)):
        of_one = list(members)
        yield of_one[0], of_one


def _threshold(path: Path) -> float:
    """The run's threshold, from the report beside its table."""
    report = report_of(path)
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
    vetoed = {row.number for row in rows if row.p_blank >= threshold and not row.ood}
    for number in sorted(vetoed):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Found:
    """A recorded file as CrystFEL must be told of it.

    Attributes:
        path: absolute.
        places: empty where it could not be opened.
        geometry: text of a geometry file, "" where the geometry is not known.
    """

    path: Path
    places: tuple[PlaceLike, ...] = ()
    geometry: str = ""

    def event(self, row: _Row) -> str:
        """The line of a list that names a frame."""
        number = row.frame
        for place in self.places:
            if number < place.frames:
                file = os.path.abspath(place.file)
                return f"{file} //{place.first + number}" if place.in_stack else file
            number -= place.frames
        return f"{self.path} //{row.frame}" if row.in_stack else str(self.path)


def _to_crystfel(path: Path, decisions: Any, out: Path, describe: Describes) -> list[Path]:
    """``kept.lst`` with ``kept.geom``; of inputs of several geometries ``kept_2.lst`` and so on.

    One event a line, by absolute path; ``//N`` is frame N, from 0, of a stack in HDF5. Links and
    virtual datasets are resolved, since events count within one file.
    """
    rows = _rows(path, decisions)
    base = _directory(path)
    unread = {row.file for row in rows if not row.vetoed}
    unread = {file for file in unread if not file.lower().endswith(_READ_BY_CRYSTFEL)}
    if unread:
        log.warning(
            "%d files that are kept, such as %s, are listed and cannot be read by CrystFEL: it "
            "reads HDF5 and CBF; convert them, and export a replay of what they became",
            len(unread),
            min(unread),
        )
    found = {file: _found(base / file, describe) for file in {row.file for row in rows}}
    lists: dict[str, list[str]] = {}
    for row in rows:
        lines = lists.setdefault(found[row.file].geometry, [])
        if not row.vetoed:
            lines.append(found[row.file].event(row))
    made = []
    for number, (geometry, lines) in enumerate(lists.items(), 1):
        name = "kept" if number == 1 else f"kept_{number}"
        made.append(_written(out / f"{name}.lst", lines))
        if geometry:
            made.append(_written(out / f"{name}.geom", geometry.splitlines()))
        else:
            (out / f"{name}.geom").unlink(missing_ok=True)
    return made


def _found(file: Path, describe: Describes) -> _Found:
    path = Path(os.path.abspath(file))
    try:
        recorded = describe(path)
    except (FileError, OSError):
        return _Found(path=path)  # no longer here: the list is as good as the table
    series, places = recorded.series, tuple(recorded.places)
    if series.geometry is None or not places:
        return _Found(path=path, places=places)
    mask = recorded.mask
    geometry = file_geometry(
        series.geometry,
        recorded.shape,
        dtype=recorded.dtype,
        dataset=places[0].dataset,
        in_stack=places[0].in_stack,
        mask=None if mask is None else (Path(os.path.abspath(mask[0])), mask[1]),
        saturation_value=series.saturation_value,
        error_value=series.error_value,
    )
    return _Found(path=path, places=places, geometry=geometry)


def _directory(path: Path) -> Path:
    """Where relative names of the table start: where the run was, else where we are."""
    try:
        return Path(json.loads(report_of(path).read_text())["directory"])
    except (OSError, ValueError, KeyError, TypeError):
        return Path.cwd()


def _to_dials(path: Path, decisions: Any, out: Path, describe: Describes) -> list[Path]:
    """``exclude.phil``: a parameter file; experiments count in the order of the run's inputs."""
    threshold, lines = _threshold(path), []
    for number, (first_row, rows) in enumerate(_series(_rows(path, decisions))):
        lines.append(f"# experiment {number} is {first_row.file}, if imported in this order")
        if not any(row.is_rotation for row in rows):
            lines.append("# stills: DIALS excludes none; import what --write-kept wrote instead")
            continue
        lines += [
            f"exclude_images = {number}:{first}:{last}"
            for first, last in _blank_ranges(rows, threshold)
        ]
    return [_written(out / "exclude.phil", lines)]


def _to_xds(path: Path, decisions: Any, out: Path, describe: Describes) -> list[Path]:
    """One file of ``EXCLUDE_DATA_RANGE`` lines per sweep, to go into its XDS.INP."""
    threshold, made = _threshold(path), []
    for number, (first_row, rows) in enumerate(_series(_rows(path, decisions))):
        if not any(row.is_rotation for row in rows):
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
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _to_csv(path: Path, decisions: Any, out: Path, describe: Describes) -> list[Path]:
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


def _to_nexus(path: Path, decisions: Any, out: Path, describe: Describes) -> list[Path]:
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
                texts = [storable(text) for text in values.to_pylist()]
                group.create_dataset(name, data=texts, dtype=h5py.string_dtype())
            else:
                group.create_dataset(name, data=values.to_numpy())
            if name.endswith("_deg"):
                group[name].attrs["units"] = "deg"
            elif name.endswith("_angstrom"):
                group[name].attrs["units"] = "angstrom"
            elif name.endswith("_us"):
                group[name].attrs["units"] = "us"
    return [made]


def _to_trains(path: Path, decisions: Any, out: Path, describe: Describes) -> list[Path]:
    """``trains_<series_id>.h5`` for each series of trains: which frames of each to keep.

    ``trainId`` (n) uint64, ``nFrame`` (n) uint16, ``dataFramePattern`` (n, frames) bool, True for
    a frame to keep. A frame that is not in the table is to be kept: it was never decided.
    """
    patterns: dict[tuple[int, str], dict[int, dict[int, bool]]] = {}
    counts: dict[tuple[int, str], int] = {}
    for row in decisions.select(_NEEDED).to_pylist():
        series = (row["series_id"], row["series_unique_id"])
        frames = _TRAINS.match(series[1])
        if frames is None or row["image_id"] < 0 or row["duplicate"]:
            continue
        counts[series] = int(frames[1])
        train, place = divmod(row["image_id"], counts[series])
        kept = patterns.setdefault(series, {}).setdefault(series[0] + train, {})
        kept[place] = row["verdict"] != "veto"
    if not patterns:
        raise UnreadableFile(
            f"{path}: names no frame of a train; expected the table of a run whose source was a "
            "Karabo bridge"
        )
    return [_pattern_file(out, s, counts[s], trains) for s, trains in patterns.items()]


_TRAINS = re.compile(r"(\d+)x ")
_LEAST_CELLS = 352
"""Memory cells of AGIPD, and the width of the pattern that the facility's programs exchange."""


def _pattern_file(
    out: Path, series: tuple[int, str], frames: int, trains: dict[int, dict[int, bool]]
) -> Path:
    import h5py

    numbers = sorted(trains)
    pattern = np.zeros((len(numbers), max(frames, _LEAST_CELLS)), np.bool_)
    pattern[:, :frames] = True
    for row, train in enumerate(numbers):
        for place, is_kept in trains[train].items():
            pattern[row, place] = is_kept
    made = out / f"trains_{series[0]}.h5"
    with _whole(made) as part, h5py.File(part, "w") as file:
        file.attrs["series_unique_id"] = series[1]
        file["trainId"] = np.array(numbers, np.uint64)
        file["nFrame"] = np.full(len(numbers), frames, np.uint16)
        file["dataFramePattern"] = pattern
    return made


FORMATS = {
    "crystfel": _to_crystfel,
    "dials": _to_dials,
    "xds": _to_xds,
    "trains": _to_trains,
    "csv": _to_csv,
    "nexus": _to_nexus,
}
"""What :func:`export` writes, by the name of the program or form."""

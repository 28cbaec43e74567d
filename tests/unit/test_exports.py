"""Exports: verdicts in the words of other programs, written by hand here."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from triage.errors import ConfigError, UnreadableFile
from triage.records import NOT_SCORED, Decision, Override, Reason, Scores, Verdict
from triage.sinks.exports import FORMATS, export
from triage.sinks.table import COLUMNS, DecisionTable


def in_sweep(made: Decision) -> Decision:
    """The same of a sweep: kept whatever the score."""
    return replace(made, verdict=Verdict.KEEP, reason=Reason.ROTATION, override=Override.NONE)


def decision(file: str, frame: int, image_id: int, *, veto: bool, series_id: int = 0) -> Decision:
    return Decision(
        series_id=series_id, series_unique_id="u", image_id=image_id, file=file, frame=frame,
        ordinal=0, verdict=Verdict.VETO if veto else Verdict.KEEP, reason=Reason.SCORE,
        forwarded=True, override=Override.SHADOW if veto else Override.NONE,
        scores=Scores(p_blank=0.99 if veto else 0.25), model_id="m", policy_id="p",
        latency_us=10.0,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A master of eight frames, 1 to 3 and 6 vetoed; images 7, 8, 10 in files, 8 and 10 vetoed."""
    table = DecisionTable(tmp_path / "run" / "decisions.parquet")
    for frame in range(8):
        table.add([decision("a/x_master.h5", frame, 100 + frame, veto=frame in (1, 2, 3, 6))])
    for number, veto in ((7, False), (8, True), (10, True)):
        made = decision(f"b/y_{number:04d}.cbf", 0, number, veto=veto, series_id=1)
        table.add([made])
    # A frame that came twice and a file that did not open are no further images.
    table.add([replace(decision("a/x_master.h5", 0, 100, veto=True), duplicate=True)])
    table.add([replace(decision("c/broken.h5", -1, -1, veto=False), scores=NOT_SCORED)])
    table.add([replace(decision("c/fake.cbf", 0, 0, veto=False), reason=Reason.MALFORMED)])
    table.close()
    return tmp_path / "run"


@pytest.fixture
def sweeps(run: Path) -> Path:
    """The same frames as sweeps, behind a still."""
    table = DecisionTable(run.parent / "sweeps" / "decisions.parquet")
    table.add([decision("a/still.h5", 0, 0, veto=True, series_id=5)])
    for frame in range(8):
        made = decision("a/x_master.h5", frame, 100 + frame, veto=frame in (1, 2, 3, 6))
        table.add([in_sweep(made)])
    for number, veto in ((7, False), (8, True), (10, True)):
        made = decision(f"b/y_{number:04d}.cbf", 0, number, veto=veto, series_id=1)
        table.add([in_sweep(made)])
    table.close()
    report = {"thresholds": {"p_blank_veto": 0.9}}
    (run.parent / "sweeps" / "report.json").write_text(json.dumps(report))
    return run.parent / "sweeps"


def test_crystfel_gets_the_kept_events(run: Path, tmp_path: Path) -> None:
    """Frame numbers from 0 behind two slashes; a file of one image stands alone."""
    (made,) = export(run, "crystfel", tmp_path / "out")
    assert made.read_text().splitlines() == [
        "a/x_master.h5 //0",
        "a/x_master.h5 //4",
        "a/x_master.h5 //5",
        "a/x_master.h5 //7",
        "b/y_0007.cbf",
    ]


def test_dials_gets_what_looks_blank_in_sweeps(sweeps: Path, tmp_path: Path) -> None:
    """Frames 1 to 3 are images 2 to 4; files count by the number in their name; no stills."""
    (made,) = export(sweeps / "decisions.parquet", "dials", tmp_path / "out")
    assert made.read_text().splitlines() == [
        "# experiment 0 is a/still.h5, if imported in this order",
        "# stills: DIALS excludes none; import what --write-kept wrote instead",
        "# experiment 1 is a/x_master.h5, if imported in this order",
        "exclude_images = 1:2:4",
        "exclude_images = 1:7:7",
        "# experiment 2 is b/y_0007.cbf, if imported in this order",
        "exclude_images = 2:8:8",
        "exclude_images = 2:10:10",
    ]
    (sweeps / "report.json").unlink()
    with pytest.raises(UnreadableFile, match=r"report\.json"):
        export(sweeps, "dials", tmp_path / "out")


@pytest.mark.interop
def test_dials_itself_reads_the_file(sweeps: Path, tmp_path: Path) -> None:
    """Its parameter parser takes every line."""
    program = shutil.which("libtbx.python") or shutil.which("dials.python")
    if program is None:
        pytest.skip("DIALS is not installed")
    (made,) = export(sweeps, "dials", tmp_path / "out")
    code = (
        "import sys, iotbx.phil\n"
        "from dials.util.exclude_images import phil_scope\n"
        "found = phil_scope.fetch(iotbx.phil.parse(file_name=sys.argv[1])).extract()\n"
        "print([x for line in found.exclude_images if line for x in line])\n"
    )
    done = subprocess.run(
        [program, "-c", code, str(made)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['1:2:4', '1:7:7', '2:8:8', '2:10:10']"


def test_xds_gets_one_file_per_sweep(sweeps: Path, run: Path, tmp_path: Path) -> None:
    """Lines for XDS.INP; a comment says of which files. Stills are no data for XDS."""
    first, second = export(sweeps, "xds", tmp_path / "out")
    assert first.read_text().splitlines() == [
        "! images of a/x_master.h5 that look blank",
        "EXCLUDE_DATA_RANGE= 2 4",
        "EXCLUDE_DATA_RANGE= 7 7",
    ]
    assert second.read_text().splitlines()[1:] == [
        "EXCLUDE_DATA_RANGE= 8 8",
        "EXCLUDE_DATA_RANGE= 10 10",
    ]
    shutil.copy(sweeps / "report.json", run / "report.json")
    with pytest.raises(UnreadableFile, match="stills only"):
        export(run, "xds", tmp_path / "out")


def test_a_master_of_links_is_no_stack_for_crystfel(tmp_path: Path) -> None:
    """Its frame 4 is frame 1 of the second file: no event names that."""
    for number in (1, 2):
        with h5py.File(tmp_path / f"d_{number}.h5", "w") as file:
            file["entry/data/data"] = np.zeros((3, 4, 4))
    with h5py.File(tmp_path / "x_master.h5", "w") as file:
        for number in (1, 2):
            link = h5py.ExternalLink(f"d_{number}.h5", "entry/data/data")
            file.require_group("entry/data")[f"data_{number:06d}"] = link
    table = DecisionTable(tmp_path / "run" / "decisions.parquet")
    table.add([decision(str(tmp_path / "x_master.h5"), 4, 4, veto=False)])
    table.close()
    with pytest.raises(UnreadableFile, match="links several"):
        export(tmp_path / "run", "crystfel", tmp_path / "out")


def test_the_table_as_csv_and_nexus_is_the_table(run: Path, tmp_path: Path) -> None:
    """Every row and column; NaN is empty in CSV and NaN in NeXus."""
    (made,) = export(run, "csv", tmp_path / "out")
    with made.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 14
    assert list(rows[0]) == list(COLUMNS)
    assert [row["verdict"] for row in rows[:4]] == ["keep", "veto", "veto", "veto"]
    assert float(rows[1]["p_blank"]) == pytest.approx(0.99)
    assert rows[1]["p_ice"] == rows[12]["p_blank"] == ""
    (nexus,) = export(run, "nexus", tmp_path / "out")
    with h5py.File(nexus) as file:
        group = file["entry/triage"]
        assert file["entry"].attrs["NX_class"] == "NXentry"
        assert set(group) == set(COLUMNS)
        assert group["image_id"][:3].tolist() == [100, 101, 102]
        assert group["file"].asstr()[8] == "b/y_0007.cbf"
        assert np.isnan(group["p_ice"][0])
        assert group["mosaicity_deg"].attrs["units"] == "deg"


def test_what_cannot_be_exported_is_an_error(run: Path, tmp_path: Path) -> None:
    """Unknown forms, no table, a live run whose frames are in no file."""
    with pytest.raises(ConfigError, match="crystfel, dials"):
        export(run, "mosflm", tmp_path)
    with pytest.raises(UnreadableFile, match=r"decisions\.parquet"):
        export(tmp_path / "nowhere", "csv", tmp_path)
    table = DecisionTable(tmp_path / "live" / "decisions.parquet")
    table.add([decision("", -1, 5, veto=True)])
    table.close()
    other = pa.table({"file": ["a.h5"], "frame": [0]})
    pq.write_table(other, tmp_path / "other.parquet")
    with pytest.raises(UnreadableFile, match="no column series_id"):
        export(tmp_path / "other.parquet", "crystfel", tmp_path)
    (tmp_path / "live" / "report.json").write_text('{"thresholds": {"p_blank_veto": 0.9}}')
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.lst").write_text("of an earlier run")
    for form in ("crystfel", "dials", "xds"):
        with pytest.raises(UnreadableFile, match="live"):
            export(tmp_path / "live", form, tmp_path / "out")
    assert (tmp_path / "out" / "kept.lst").read_text() == "of an earlier run"
    assert len(list((tmp_path / "out").iterdir())) == 1
    assert set(FORMATS) == {"crystfel", "dials", "xds", "csv", "nexus"}
    assert export(tmp_path / "live", "csv", tmp_path / "out")

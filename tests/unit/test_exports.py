"""Exports: verdicts in the words of other programs, written by hand here."""

from __future__ import annotations

import csv
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from triage.errors import ConfigError, UnreadableFile
from triage.records import NOT_SCORED, Decision, Override, Reason, Scores, Verdict
from triage.sinks.exports import FORMATS, export
from triage.sinks.table import COLUMNS, DecisionTable


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
        table.add(decision("a/x_master.h5", frame, 100 + frame, veto=frame in (1, 2, 3, 6)))
    for number, veto in ((7, False), (8, True), (10, True)):
        made = decision(f"b/y_{number:04d}.cbf", 0, number, veto=veto, series_id=1)
        table.add(made)
    # A frame that came twice and a file that did not open are no further images.
    table.add(replace(decision("a/x_master.h5", 0, 100, veto=True), duplicate=True))
    table.add(replace(decision("c/broken.h5", -1, -1, veto=False), scores=NOT_SCORED))
    table.close()
    return tmp_path / "run"


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


def test_dials_gets_ranges_from_one_by_experiment(run: Path, tmp_path: Path) -> None:
    """Frames 1 to 3 are images 2 to 4; files count by the number in their name."""
    (made,) = export(run / "decisions.parquet", "dials", tmp_path / "out")
    assert made.read_text().splitlines() == [
        "exclude_images = 0:2:4",
        "exclude_images = 0:7:7",
        "exclude_images = 1:8:8",
        "exclude_images = 1:10:10",
    ]


@pytest.mark.interop
def test_dials_itself_reads_the_file(run: Path, tmp_path: Path) -> None:
    """Its parameter parser takes every line."""
    program = shutil.which("libtbx.python") or shutil.which("dials.python")
    if program is None:
        pytest.skip("DIALS is not installed")
    (made,) = export(run, "dials", tmp_path / "out")
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
    assert done.stdout.strip() == "['0:2:4', '0:7:7', '1:8:8', '1:10:10']"


def test_xds_gets_one_file_per_data_set(run: Path, tmp_path: Path) -> None:
    """Lines for XDS.INP; a comment says of which files."""
    first, second = export(run, "xds", tmp_path / "out")
    assert first.read_text().splitlines() == [
        "! vetoed images of a/x_master.h5",
        "EXCLUDE_DATA_RANGE= 2 4",
        "EXCLUDE_DATA_RANGE= 7 7",
    ]
    assert second.read_text().splitlines()[1:] == [
        "EXCLUDE_DATA_RANGE= 8 8",
        "EXCLUDE_DATA_RANGE= 10 10",
    ]


def test_the_table_as_csv_and_nexus_is_the_table(run: Path, tmp_path: Path) -> None:
    """Every row and column; NaN is empty in CSV and NaN in NeXus."""
    (made,) = export(run, "csv", tmp_path / "out")
    with made.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 13
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
    table.add(decision("", -1, 5, veto=True))
    table.close()
    for form in ("crystfel", "dials", "xds"):
        with pytest.raises(UnreadableFile, match="live"):
            export(tmp_path / "live", form, tmp_path / "out")
    assert set(FORMATS) == {"crystfel", "dials", "xds", "csv", "nexus"}
    assert export(tmp_path / "live", "csv", tmp_path / "out")

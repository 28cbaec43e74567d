"""Exports: verdicts in the words of other programs, written by hand here."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from triage.errors import ConfigError, TriageError, UnreadableFile
from triage.ingest.files import recorded
from triage.records import (
    NOT_SCORED,
    Decision,
    Frame,
    Geometry,
    Override,
    Reason,
    Scores,
    Series,
    Verdict,
)
from triage.sinks.exports import FORMATS, export
from triage.sinks.nxmx import KeptWriter
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
    """Frame numbers from 0 behind two slashes; a file of one image stands alone; names of files
    that are gone start where the run was."""
    (run / "report.json").write_text(json.dumps({"directory": "/data/visit"}))
    (made,) = export(run, "crystfel", tmp_path / "out", recorded)
    assert made.read_text().splitlines() == [
        "/data/visit/a/x_master.h5 //0",
        "/data/visit/a/x_master.h5 //4",
        "/data/visit/a/x_master.h5 //5",
        "/data/visit/a/x_master.h5 //7",
        "/data/visit/b/y_0007.cbf",
    ]


def test_what_crystfel_cannot_read_is_said(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By number and name of the kept files; of those of the run, which it reads, nothing is."""
    export(run, "crystfel", tmp_path / "readable", recorded)
    assert not caplog.records
    table = DecisionTable(tmp_path / "mixed" / "decisions.parquet")
    for number, name in enumerate(("c.tif", "a.IMG.bz2", "b.cbf.gz", "d.tiff")):
        table.add([decision(name, 0, number, veto=name == "d.tiff")])
    table.close()
    (made,) = export(tmp_path / "mixed", "crystfel", tmp_path / "out", recorded)
    assert len(made.read_text().splitlines()) == 3
    assert "2 files that are kept, such as a.IMG.bz2" in caplog.text


def kept_frames(folder: Path, shape: tuple[int, int], *image_ids: int) -> Path:
    """A kept master with a geometry, two frames a data file."""
    mask = np.zeros(shape, np.uint32)
    mask[0, 0] = 1
    series = Series(
        series_id=shape[0],
        geometry=Geometry(
            beam_center_x_px=31.5,
            beam_center_y_px=22.25,
            pixel_size_x_m=75e-6,
            pixel_size_y_m=75e-6,
            detector_distance_m=0.125,
            incident_wavelength_angstrom=1.0,
        ),
        pixel_mask=mask,
        saturation_value=60000,
    )
    writer = KeptWriter(folder, frames_per_file=2)
    for image_id in image_ids:
        made = Frame(
            series=series,
            image_id=image_id,
            shape=shape,
            payload=np.full(shape, image_id, np.uint16).tobytes(),
        )
        writer.write(made)
    master, *_ = writer.close()
    return master


def test_events_of_links_are_named_in_the_files_that_hold_them(tmp_path: Path) -> None:
    """Frame 4 of a master of links is frame 0 of its third file; the geometry file names dataset,
    mask and values that are no measurement; other geometry, other list."""
    first = kept_frames(tmp_path / "data", (48, 64), *range(5))
    second = kept_frames(tmp_path / "data", (64, 48), 8, 9)
    table = DecisionTable(tmp_path / "run" / "decisions.parquet")
    for frame in range(5):
        table.add([decision(str(first), frame, frame, veto=frame == 1)])
    table.add([decision(str(second), 1, 9, veto=False, series_id=1)])
    table.close()
    made = export(tmp_path / "run", "crystfel", tmp_path / "out", recorded)
    assert [path.name for path in made] == ["kept.lst", "kept.geom", "kept_2.lst", "kept_2.geom"]
    stem = tmp_path / "data" / "kept_48_data_00000"
    assert made[0].read_text().splitlines() == [
        f"{stem}1.h5 //0",
        f"{stem}2.h5 //0",
        f"{stem}2.h5 //1",
        f"{stem}3.h5 //0",
    ]
    other = tmp_path / "data" / "kept_64_data_000001.h5"
    assert made[2].read_text().splitlines() == [f"{other} //1"]
    lines = dict(re.findall(r"^([\w/]+) = (.*)$", made[1].read_text(), re.M))
    assert (lines["data"], lines["dim0"]) == ("/entry/data/data", "%")
    assert lines["mask0_file"] == str(first)
    assert lines["mask0_data"] == "/entry/instrument/detector/pixel_mask"
    assert lines["flag_morethan"] == "60000"
    assert (lines["p0/max_fs"], lines["p0/max_ss"]) == ("63", "47")
    with h5py.File(lines["mask0_file"]) as file:
        assert file[lines["mask0_data"]].shape == (48, 64)


def test_events_of_a_virtual_dataset_count_from_where_it_begins(tmp_path: Path) -> None:
    """Frame 1 of one that shows frames 2 to 4 of a file is frame 3 of that file."""
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["entry/data/data"] = np.zeros((6, 48, 64), np.uint16)
    with h5py.File(tmp_path / "master.h5", "w") as file:
        layout = h5py.VirtualLayout((3, 48, 64), np.uint16)
        source = h5py.VirtualSource("data.h5", "entry/data/data", (6, 48, 64))
        layout[:] = source[2:5]
        file.require_group("entry/data").create_virtual_dataset("data", layout)
    table = DecisionTable(tmp_path / "run" / "decisions.parquet")
    table.add([decision(str(tmp_path / "master.h5"), 1, 1, veto=False)])
    table.close()
    (made,) = export(tmp_path / "run", "crystfel", tmp_path / "out", recorded)
    assert made.read_text().splitlines() == [f"{tmp_path}/data.h5 //3"]


def test_a_file_of_one_image_without_a_stack_has_no_event(tmp_path: Path) -> None:
    """Two dimensions in HDF5: the name alone, and a geometry without a placeholder."""
    path = tmp_path / "single.h5"
    with h5py.File(path, "w") as file:
        file["entry/data/data"] = np.zeros((48, 64), np.uint16)
    table = DecisionTable(tmp_path / "run" / "decisions.parquet")
    table.add([decision(str(path), 0, 0, veto=False)])
    table.close()
    (made,) = export(tmp_path / "run", "crystfel", tmp_path / "out", recorded)
    assert made.read_text().splitlines() == [str(path)]


def test_trains_get_a_pattern_each(tmp_path: Path) -> None:
    """Frame 5 of 4 a train is frame 1 of the second train: 1001. What was not decided is kept."""
    table = DecisionTable(tmp_path / "run" / "decisions.parquet")
    for image_id, veto in ((0, True), (1, False), (2, True), (3, False), (5, True)):
        made = decision("", -1, image_id, veto=veto, series_id=1000)
        table.add([replace(made, series_unique_id="4x SPB/DET image.data")])
    table.add([decision("a.h5", 0, 0, veto=True)])
    table.close()
    (path,) = export(tmp_path / "run", "trains", tmp_path / "out", recorded)
    assert path.name == "trains_1000.h5"
    with h5py.File(path) as file:
        assert file["trainId"][:].tolist() == [1000, 1001]
        assert file["nFrame"][:].tolist() == [4, 4]
        pattern = file["dataFramePattern"]
        assert (pattern.dtype, pattern.shape) == (np.bool_, (2, 352))
        assert pattern[:, :4].tolist() == [
            [False, True, False, True],
            [True, False, True, True],
        ]
        assert not pattern[:, 4:].any()


def test_dials_gets_what_looks_blank_in_sweeps(sweeps: Path, tmp_path: Path) -> None:
    """Frames 1 to 3 are images 2 to 4; files count by the number in their name; no stills."""
    (made,) = export(sweeps / "decisions.parquet", "dials", tmp_path / "out", recorded)
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
        export(sweeps, "dials", tmp_path / "out", recorded)


@pytest.mark.interop
def test_dials_itself_reads_the_file(sweeps: Path, tmp_path: Path) -> None:
    """Its parameter parser takes every line."""
    program = shutil.which("libtbx.python") or shutil.which("dials.python")
    if program is None:
        pytest.skip("DIALS is not installed")
    (made,) = export(sweeps, "dials", tmp_path / "out", recorded)
    code = (
        "import sys, iotbx.phil\n"
        "from dials.util.exclude_images import phil_scope\n"
        "found = phil_scope.fetch(iotbx.phil.parse(file_name=sys.argv[1])).extract()\n"
        "print([x for line in found.exclude_images if line for x in line])\n"
    )
    done = subprocess.run(
        [program, "-c", code, str(made)], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['1:2:4', '1:7:7', '2:8:8', '2:10:10']"


def test_xds_gets_one_file_per_sweep(sweeps: Path, run: Path, tmp_path: Path) -> None:
    """Lines for XDS.INP; a comment says of which files. Stills are no data for XDS."""
    first, second = export(sweeps, "xds", tmp_path / "out", recorded)
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
        export(run, "xds", tmp_path / "out", recorded)


def test_the_table_as_csv_and_nexus_is_the_table(run: Path, tmp_path: Path) -> None:
    """Every row and column; NaN is empty in CSV and NaN in NeXus."""
    (made,) = export(run, "csv", tmp_path / "out", recorded)
    with made.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 14
    assert list(rows[0]) == list(COLUMNS)
    assert [row["verdict"] for row in rows[:4]] == ["keep", "veto", "veto", "veto"]
    assert float(rows[1]["p_blank"]) == pytest.approx(0.99)
    assert rows[1]["p_ice"] == rows[12]["p_blank"] == ""
    (nexus,) = export(run, "nexus", tmp_path / "out", recorded)
    with h5py.File(nexus) as file:
        group = file["entry/triage"]
        assert file["entry"].attrs["NX_class"] == "NXentry"
        assert set(group) == set(COLUMNS)
        assert group["image_id"][:3].tolist() == [100, 101, 102]
        assert group["file"].asstr()[8] == "b/y_0007.cbf"
        assert np.isnan(group["p_ice"][0])
        assert group["mosaicity_deg"].attrs["units"] == "deg"


def test_a_name_with_a_zero_in_it_is_exported(tmp_path: Path) -> None:
    """HDF5 takes no zero in a text; a stream may send one."""
    table = DecisionTable(tmp_path / "decisions.parquet")
    table.add([replace(decision("", -1, 0, veto=False), series_unique_id="A\0B\0")])
    table.close()
    (made,) = export(tmp_path, "nexus", tmp_path / "out", recorded)
    with h5py.File(made) as file:
        assert file["entry/triage/series_unique_id"].asstr()[0] == "A\ufffdB"


@pytest.mark.parametrize("to", ["dials", "xds"])
def test_a_sweep_is_one_whatever_came_of_its_first_image(tmp_path: Path, to: str) -> None:
    """The first was not scored; the second looks blank and unlike anything known, so that a score
    would not have vetoed it; the third looks blank."""
    table = DecisionTable(tmp_path / "decisions.parquet")
    first, second, third = (decision("x.h5", n, n, veto=True) for n in range(3))
    unscored = replace(first, verdict=Verdict.KEEP, reason=Reason.SCORER_ERROR, scores=NOT_SCORED)
    strange = in_sweep(replace(second, scores=Scores(p_blank=0.99, ood=True)))
    table.add([unscored, strange, in_sweep(third)])
    table.close()
    (tmp_path / "report.json").write_text('{"thresholds": {"p_blank_veto": 0.9}}')
    (made,) = export(tmp_path, to, tmp_path / "out", recorded)
    wanted = {"dials": "exclude_images = 0:3:3", "xds": "EXCLUDE_DATA_RANGE= 3 3"}
    assert made.read_text().splitlines()[1:] == [wanted[to]]


@pytest.mark.parametrize("to", ["crystfel", "dials", "xds"])
def test_frames_of_a_capture_are_told_to_nobody_else(tmp_path: Path, to: str) -> None:
    """Other programs cannot read one."""
    captured = [decision("s.zcap", n, n, veto=False, series_id=9) for n in range(2)]
    table = DecisionTable(tmp_path / "alone" / "decisions.parquet")
    table.add(captured)
    table.close()
    with pytest.raises(UnreadableFile, match="capture"):
        export(tmp_path / "alone", to, tmp_path / "out", recorded)


def test_a_full_disk_leaves_no_half_of_an_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there before stays as it was."""
    (tmp_path / "kept.lst").write_text("as it was")

    def full(self: Path, *args: object, **more: object) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(TriageError, match="No space left"):
        export(run, "crystfel", tmp_path, recorded)
    assert (tmp_path / "kept.lst").read_bytes() == b"as it was"
    assert not list(tmp_path.glob("*.part"))


def test_what_cannot_be_exported_is_an_error(run: Path, tmp_path: Path) -> None:
    """Unknown forms, no table, a live run whose frames are in no file."""
    with pytest.raises(ConfigError, match="crystfel, dials"):
        export(run, "mosflm", tmp_path, recorded)
    with pytest.raises(UnreadableFile, match=r"decisions\.parquet"):
        export(tmp_path / "nowhere", "csv", tmp_path, recorded)
    table = DecisionTable(tmp_path / "live" / "decisions.parquet")
    table.add([decision("", -1, 5, veto=True)])
    table.close()
    other = pa.table({"file": ["a.h5"], "frame": [0]})
    pq.write_table(other, tmp_path / "other.parquet")
    with pytest.raises(UnreadableFile, match="no column series_id"):
        export(tmp_path / "other.parquet", "crystfel", tmp_path, recorded)
    (tmp_path / "live" / "report.json").write_text('{"thresholds": {"p_blank_veto": 0.9}}')
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.lst").write_text("of an earlier run")
    with pytest.raises(UnreadableFile, match="Karabo"):
        export(tmp_path / "live", "trains", tmp_path / "out", recorded)
    for form in ("crystfel", "dials", "xds"):
        with pytest.raises(UnreadableFile, match="live"):
            export(tmp_path / "live", form, tmp_path / "out", recorded)
    assert (tmp_path / "out" / "kept.lst").read_text() == "of an earlier run"
    assert len(list((tmp_path / "out").iterdir())) == 1
    assert set(FORMATS) == {"crystfel", "dials", "xds", "trains", "csv", "nexus"}
    assert export(tmp_path / "live", "csv", tmp_path / "out", recorded)


def test_a_run_that_was_started_anew_is_exported_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The rows of every live run in the folder, the killed one's too; those of a replay in it are
    left out and named; a table that is named is exported alone."""
    path = tmp_path / "decisions.parquet"

    def run_of(file: str, *image_ids: int) -> DecisionTable:
        table = DecisionTable(path)
        table.add([decision(file, -1 if not file else i, i, veto=False) for i in image_ids])
        table.flush()
        return table

    run_of("x.h5", 90, 91).close()
    run_of("", 1, 2).close()
    for first in (3, 5, 7, 9, 11, 13, 15, 17):
        os.close(run_of("", first, first + 1)._fd)  # killed
    run_of("", 19).close()
    (made,) = export(tmp_path, "csv", tmp_path / "out", recorded)
    with made.open() as file:
        assert [int(row["image_id"]) for row in csv.DictReader(file)] == list(range(1, 20))
    said = [record.getMessage() for record in caplog.records][-2:]
    assert said[0].endswith("decisions_9.parquet, decisions_10.parquet and decisions.parquet")
    assert said[1].startswith("decisions_1.parquet: of other runs")
    (made,) = export(tmp_path / "decisions_2.parquet", "csv", tmp_path / "out", recorded)
    with made.open() as file:
        assert [int(row["image_id"]) for row in csv.DictReader(file)] == [1, 2]


def test_of_several_replays_the_last_is_exported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each decided its inputs whole; the other one is named."""
    for image_id in (1, 2):
        table = DecisionTable(tmp_path / "decisions.parquet")
        table.add([decision("x.h5", 0, image_id, veto=False)])
        table.close()
    (made,) = export(tmp_path, "csv", tmp_path / "out", recorded)
    with made.open() as file:
        assert [row["image_id"] for row in csv.DictReader(file)] == ["2"]
    assert caplog.records[-1].getMessage().startswith("decisions_1.parquet: of other runs")

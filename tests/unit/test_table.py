"""The decision table through kills, full disks, and several runs in one folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from triage.errors import TriageError
from triage.ingest.files import recorded
from triage.records import Decision, Override, Reason, Scores, Verdict
from triage.sinks.exports import export
from triage.sinks.table import DecisionTable

ROOT = Path(__file__).resolve().parents[2]


def decision(image_id: int) -> Decision:
    return Decision(
        series_id=1, series_unique_id="u", image_id=image_id, file="", frame=-1, ordinal=image_id,
        verdict=Verdict.KEEP, reason=Reason.SCORE, forwarded=True, override=Override.NONE,
        scores=Scores(p_blank=image_id / 1000), model_id="m", policy_id="p", latency_us=1.0,
    )  # fmt: skip


def ids(path: Path) -> list[int]:
    found: list[int] = pq.read_table(path)["image_id"].to_pylist()
    return found


class Clock:
    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


KILLED = """
import os, signal, sys
from pathlib import Path
import test_table as t
table = t.DecisionTable(Path(sys.argv[1]), "killed")
for image_id in range(1100):
    table.add([t.decision(image_id)])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_rows_of_a_killed_run_are_read_and_become_a_table(tmp_path: Path) -> None:
    """Every whole turn of 512 rows is there, though the stream ends in half a batch: for an
    export at once, under a number when the next run begins."""
    path = tmp_path / "decisions.parquet"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests/unit"},
        timeout=280,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert not path.exists()
    rows = tmp_path / "decisions.arrows"
    rows.write_bytes(rows.read_bytes()[:-7])
    (made,) = export(tmp_path, "csv", tmp_path / "out", recorded)
    assert len(made.read_text().splitlines()) == 1 + 512
    table = DecisionTable(path, "next")
    table.add([decision(7)])
    table.close()
    assert ids(tmp_path / "decisions_1.parquet") == list(range(512))
    assert ids(path) == [7]
    assert pq.read_schema(tmp_path / "decisions_1.parquet").metadata[b"run_id"] == b"killed"
    assert pq.read_schema(path).metadata[b"run_id"] == b"next"
    assert not rows.exists()


def test_each_run_in_a_folder_keeps_its_table_and_its_report(tmp_path: Path) -> None:
    """The oldest is number 1; the report goes with its table, and an export finds it."""
    path = tmp_path / "decisions.parquet"
    for run in range(3):
        table = DecisionTable(path)
        table.add([decision(run)])
        table.close()
        (tmp_path / "report.json").write_text(json.dumps({"run": run}))
    assert [ids(tmp_path / f"decisions{n}.parquet") for n in ("_1", "_2", "")] == [[0], [1], [2]]
    reports = [json.loads((tmp_path / f"report{n}.json").read_text()) for n in ("_1", "_2", "")]
    assert [report["run"] for report in reports] == [0, 1, 2]


def test_rows_wait_a_second_at_most(tmp_path: Path) -> None:
    """While frames come; and the end of a series does not wait."""
    clock = Clock()
    table = DecisionTable(tmp_path / "decisions.parquet", clock=clock)
    rows = tmp_path / "decisions.arrows"
    empty = rows.stat().st_size
    table.add([decision(1)])
    assert rows.stat().st_size == empty
    clock.now_ns = 1_000_000_000
    table.add([decision(2)])
    second = rows.stat().st_size
    assert second > empty
    table.add([decision(3)])
    assert rows.stat().st_size == second
    table.flush()
    assert rows.stat().st_size > second
    table.close()
    assert ids(tmp_path / "decisions.parquet") == [1, 2, 3]


FULL = """
import resource, sys
from pathlib import Path
import test_table as t
table = t.DecisionTable(Path(sys.argv[1]))
table.add([t.decision(1)] * 512)
size = (Path(sys.argv[1]).with_suffix(".arrows")).stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20_000, resource.RLIM_INFINITY))
try:
    table.add([t.decision(2)] * 512)
except t.TriageError as err:
    print(err)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
table.add([t.decision(3)])
table.close()
"""


def test_a_disk_that_is_full_for_a_while_costs_those_rows_only(tmp_path: Path) -> None:
    """What was half written is taken back, so what follows, though shorter, can be read."""
    path = tmp_path / "decisions.parquet"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests/unit"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "512 rows are lost" in done.stdout
    assert ids(path) == [1] * 512 + [3]


FULL_AT_THE_END = """
import resource, sys
from pathlib import Path
import test_table as t
table = t.DecisionTable(Path(sys.argv[1]))
table.add([t.decision(n) for n in range(512)])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    table.close()
except t.TriageError as err:
    print(err)
table.close()
"""


def test_a_disk_that_is_full_at_the_end_costs_no_row(tmp_path: Path) -> None:
    """There is no table, and no half of one; an export reads the rows, and so does the next
    run."""
    path = tmp_path / "decisions.parquet"
    done = subprocess.run(
        [sys.executable, "-c", FULL_AT_THE_END, str(path)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests/unit"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "decisions.arrows" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["decisions.arrows"]
    (made,) = export(tmp_path, "csv", tmp_path / "out", recorded)
    assert len(made.read_text().splitlines()) == 1 + 512
    DecisionTable(path).close()
    assert ids(tmp_path / "decisions_1.parquet") == list(range(512))


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    """It names the table."""
    (tmp_path / "file").write_text("")
    with pytest.raises(TriageError, match="decision table"):
        DecisionTable(tmp_path / "file" / "decisions.parquet")

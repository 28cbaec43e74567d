"""One run at a time in a folder, journals of whole lines, and what a source goes on with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulators.detectors.detector import series_messages
from simulators.detectors.frames import SimFrame, StreamInfo
from triage.errors import ConfigError
from triage.ingest.subscriber import Subscriber
from triage.records import (
    Begun,
    Decision,
    Message,
    MessageKind,
    Override,
    Reason,
    Scores,
    Verdict,
)
from triage.sinks import journal as journal_module
from triage.sinks.folder import RunFolder, note_policy, policies_before, state_folder
from triage.sinks.journal import Journal, dropped_by

ROOT = Path(__file__).resolve().parents[2]


def drop(ordinal: int) -> Decision:
    return Decision(
        series_id=7,
        series_unique_id="A",
        image_id=100 + ordinal,
        file="",
        frame=-1,
        ordinal=ordinal,
        verdict=Verdict.VETO,
        reason=Reason.SCORE,
        forwarded=False,
        override=Override.NONE,
        scores=Scores(p_blank=0.99),
        model_id="m",
        policy_id="p",
        latency_us=1.0,
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_a_second_process_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    """Until the first one is done; then the folder is free, whatever it left in it."""
    first = RunFolder(tmp_path)
    with pytest.raises(ConfigError, match=rf"process {os.getpid()}, run {first.run_id}"):
        RunFolder(tmp_path)
    first.close()
    second = RunFolder(tmp_path)
    assert second.run_id != first.run_id
    second.close()


def test_a_wall_clock_that_steps_back_mixes_no_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It only names runs, and two of one second have different names."""
    found = set()
    for now_s in (1_000_000_000, 1_000_000_000, 999_990_000):
        monkeypatch.setattr(
            "time.gmtime", lambda s=now_s: datetime.fromtimestamp(s, UTC).timetuple()
        )
        folder = RunFolder(tmp_path)
        found.add(folder.run_id)
        folder.close()
    assert len(found) == 3
    asked = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "triage").rglob("*.py")
        if re.search(r"\btime\.time\(|\btime_ns\(|\.now\(|\butcnow\(|gmtime\(", path.read_text())
    ]
    assert asked == ["triage/sinks/folder.py"], "decisions and counts go by the monotonic clock"


def test_triage_replay_ends_with_2_where_another_run_writes(tmp_path: Path) -> None:
    """The command line says who is there, and ends as for a wrong configuration."""
    holder = RunFolder(tmp_path / "out")
    capture = tmp_path / "none.zcap"
    capture.write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "-m", "triage", "replay", str(capture), "--out", str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRIAGE_POLICY__AUDIT_FRACTION": "0"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    holder.close()
    assert done.returncode == 2, done.stderr
    assert "another triage writes into it" in done.stderr


def test_states_of_folders_that_are_gone_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory of the system is not filled by runs whose output somebody deleted."""
    memory = tmp_path / "shm"
    memory.mkdir()
    real = Path

    def redirected(*parts: Any) -> Path:
        return memory if parts == ("/dev/shm",) else real(*parts)

    monkeypatch.setattr("triage.sinks.folder.Path", redirected)
    out = tmp_path / "a"
    out.mkdir()
    first = state_folder(out, "")
    assert first.parent.parent == memory
    (first / "ledger.state").write_bytes(b"x")
    other = tmp_path / "b"
    other.mkdir()
    assert state_folder(other, "") != first
    assert first.exists()
    out.rmdir()
    state_folder(other, "")
    assert not first.exists()


def test_lines_name_their_run_and_only_its_drops_are_found(tmp_path: Path) -> None:
    """Ordinals begin anew in each run; a drop that was withdrawn did not happen."""
    path = tmp_path / "journal.jsonl"
    for run_id in ("R1", "R2"):
        journal = Journal(path, run_id)
        assert journal.dropped([drop(0), drop(1)]) == 2
        journal.withdrawn([drop(1)] if run_id == "R2" else [])
        journal.close()
    assert dropped_by(path, "R1") == {0: Reason.SCORE, 1: Reason.SCORE}
    assert dropped_by(path, "R2") == {0: Reason.SCORE}
    assert dropped_by(path, "R3") == {}
    assert dropped_by(tmp_path / "none", "R1") == {}
    assert [line["image_id"] for line in lines(path)[:2]] == [100, 101]


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_a_line_that_a_kill_cut_off_is_removed(tmp_path: Path, kept: int) -> None:
    """It may be cut anywhere, before its line end too; the next line is whole."""
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, "R1")
    journal.dropped([drop(0), drop(1)])
    journal.close()
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:kept])
    assert dropped_by(path, "R1") == {0: Reason.SCORE}
    journal = Journal(path, "R2")
    journal.dropped([drop(5)])
    journal.close()
    assert [(line["run_id"], line["ordinal"]) for line in lines(path)] == [("R1", 0), ("R2", 5)]


def test_a_journal_without_a_whole_line_begins_anew(tmp_path: Path) -> None:
    """Killed in the first write of all."""
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"series_id":')
    Journal(path, "R1").close()
    assert path.read_bytes() == b""


def test_lines_that_are_none_are_passed_over(tmp_path: Path) -> None:
    """Whatever somebody wrote between them."""
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, "R1")
    journal.dropped([drop(0)])
    with path.open("ab") as other:
        other.write(b'\x00\xff\n[]\n"text"\n{"run_id": "R1"}\n{"run_id": "R1", "ordinal": 3}\n')
    journal.dropped([drop(1)])
    journal.close()
    assert dropped_by(path, "R1") == {0: Reason.SCORE, 1: Reason.SCORE}


def test_a_disk_that_takes_a_part_keeps_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that it took whole are drops; the others go on, and nothing of them is left."""
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, "R1")
    journal.dropped([drop(0)])
    size = path.stat().st_size
    real = os.write
    monkeypatch.setattr(journal_module.os, "write", lambda fd, data: real(fd, data[: size + 9]))
    assert journal.dropped([drop(1), drop(2), drop(3)]) == 1
    monkeypatch.undo()
    assert journal.dropped([drop(4)]) == 1
    journal.close()
    assert [line["ordinal"] for line in lines(path)] == [0, 1, 4]


def test_drops_that_the_disk_did_not_confirm_are_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fsync a line is a drop once the disk has it; else the frame goes on, and no line
    says otherwise."""
    path = tmp_path / "journal.jsonl"
    asked = []

    def refuse(fd: int) -> None:
        asked.append(fd)
        if len(asked) == 2:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(journal_module.os, "fdatasync", refuse)
    journal = Journal(path, "R1", fsync=True)
    assert [journal.dropped([drop(i)]) for i in range(3)] == [1, 0, 1]
    journal.close()
    assert [line["ordinal"] for line in lines(path)] == [0, 2]


def test_a_journal_that_cannot_take_back_takes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it can: a line behind a torn one would not be read."""
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, "R1")
    real = os.write

    def refuse(fd: int, size: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(journal_module.os, "write", lambda fd, data: real(fd, data[:10]))
    monkeypatch.setattr(journal_module.os, "ftruncate", refuse)
    assert journal.dropped([drop(0)]) == 0
    assert journal.dropped([drop(1)]) == 0
    monkeypatch.undo()
    assert journal.dropped([drop(2)]) == 1
    journal.close()
    assert [line["ordinal"] for line in lines(path)] == [2]


# -- what a source goes on with ------------------------------------------------------------------

FRAME = SimFrame(payload=bytes(2 * 8 * 9), encoding="raw", dtype=np.dtype("<u2"), shape=(8, 9))


def sent(protocol: str, images: int = 6) -> list[tuple[bytes, ...]]:
    info = StreamInfo(
        shape=(8, 9),
        number_of_images=images,
        series_id=3,
        series_unique_id="U3",
        omega_increment_deg=0.1,
        beam_center_x_px=4.0,
        beam_center_y_px=3.0,
        pixel_size_x_m=75e-6,
        pixel_size_y_m=75e-6,
        detector_distance_m=0.2,
        incident_wavelength_angstrom=1.0,
    )
    return [m.parts for m in series_messages(info, [FRAME], protocol=protocol)]


def fed(source: Subscriber, messages: list[tuple[bytes, ...]]) -> list[Message]:
    return [m for parts in messages for m in source._stream.take(parts, 0)]


@pytest.mark.parametrize("protocol", ["stream2", "stream1"])
def test_a_source_knows_the_header_that_came_before_it_was_started(protocol: str) -> None:
    """Frames are sound, have the geometry and rotation of the start, and are told from those
    that came already."""
    messages = sent(protocol)
    source = Subscriber("tcp://127.0.0.1:1")
    key = (3, "U3") if protocol == "stream2" else (3, "")
    source.go_on_with([Begun(key=key, start=messages[0], seen=((0, 1),))])
    frames = [m.frame for m in fed(source, messages[3:-1])]
    source.close()
    assert [f.image_id for f in frames if f is not None] == [2, 3, 4, 5]
    for frame in frames:
        assert frame is not None
        assert (frame.fault, frame.duplicate, frame.series.key) == (None, False, key)
        assert frame.series.started
        assert frame.series.geometry is not None
        assert frame.series.is_rotation


def test_a_series_without_its_start_message_goes_on_unscored() -> None:
    """As one that was joined late; which images came is known all the same."""
    messages = sent("stream2")
    source = Subscriber("tcp://127.0.0.1:1")
    source.go_on_with([Begun(key=(3, "U3"), seen=((0, 2),))])
    frames = [m.frame for m in fed(source, messages[3:-1])]
    source.close()
    assert [f.duplicate for f in frames if f is not None] == [True, False, False, False]
    assert {f.fault for f in frames if f is not None} == {Reason.GEOMETRY_CHANGED}


def test_a_new_series_under_the_old_name_is_not_scored_by_the_old_header() -> None:
    """Its start was sent while nobody was there: an image that came already gives it away. With
    its own start it is scored again."""
    messages = sent("stream2")
    source = Subscriber("tcp://127.0.0.1:1")
    source.go_on_with([Begun(key=(3, "U3"), start=messages[0], seen=((0, 3),))])
    again = [m.frame for m in fed(source, messages[1:-1])]
    assert {f.fault for f in again if f is not None} == {Reason.GEOMETRY_CHANGED}
    started = fed(source, messages[:3])
    source.close()
    assert [m.kind for m in started] == [MessageKind.START, MessageKind.IMAGE, MessageKind.IMAGE]
    assert [(m.frame.fault, m.frame.duplicate) for m in started if m.frame is not None] == [
        (None, False),
        (None, False),
    ]


def test_policies_of_the_runs_that_are_gone_on_with_are_found(tmp_path: Path) -> None:
    """Of the second run and the one that it went on with, not of the one before; a line that a
    kill cut off is passed over."""
    assert policies_before(tmp_path, "d") == []
    note_policy(tmp_path, {"policy_id": "0"}, run_id="a")
    note_policy(tmp_path, {"policy_id": "1"}, run_id="b")
    note_policy(tmp_path, {"policy_id": "2"}, run_id="b")
    note_policy(tmp_path, {"policy_id": "3"}, run_id="c", goes_on_with="b")
    with (tmp_path / "policies.jsonl").open("a") as file:
        file.write('{"run_id": "c", "policy\n')
    note_policy(tmp_path, {"policy_id": "4"}, run_id="d", goes_on_with="c")
    found = [(each["run_id"], each["policy_id"]) for each in policies_before(tmp_path, "d")]
    assert found == [("b", "1"), ("b", "2"), ("c", "3")]
    assert policies_before(tmp_path, "a") == []

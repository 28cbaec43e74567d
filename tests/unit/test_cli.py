"""The commands as a user meets them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def triage(*arguments: str, module: str = "triage") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.parametrize("module", ["triage.cli", "simulators.__main__"])
def test_help_loads_nothing_heavy(module: str) -> None:
    """Neither command line imports torch, numba, cupy or h5py to say what it can do."""
    code = (
        f"import sys, {module}; "
        "print([m for m in ('torch', 'numba', 'cupy', 'h5py', 'zmq') if m in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


def test_every_command_is_listed_and_documented() -> None:
    """`--help` names them, and the README uses no other."""
    listed = triage("--help").stdout
    commands = {
        "demo",
        "run",
        "replay",
        "record",
        "bench",
        "export",
        "train",
        "evaluate",
        "quantize",
        "explain",
        "doctor",
        "glimpse",
        "config",
        "ctl",
        "keygen",
    }
    for command in commands:
        assert re.search(rf"^\W*{command}\b", listed, re.MULTILINE), command
    readme = (ROOT / "README.md").read_text()
    assert set(re.findall(r"`triage ([a-z]+)", readme)) <= commands
    simulated = triage("--help", module="simulators").stdout
    for command in re.findall(r"`triage-sim ([a-z]+)", readme):
        assert command in simulated


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["config", "check", "nowhere.toml"], 2, "nowhere.toml"),
        (["run", "--set", "policy.modee=1"], 2, "did you mean mode"),
        (["run", "--mode", "enforce", "--set", "metrics.port=0"], 2, "directory"),
        (["run", "--endpoint", "nonsense", "--set", "metrics.port=0"], 2, "endpoint"),
        (["run", "--set", "model.path=nowhere", "--set", "metrics.port=0"], 4, "nowhere"),
        (["run", "--set", "metrics.host=0.0.0.0"], 2, "allow_plain"),
        (
            ["run", "--set", "control.endpoint=tcp://127.0.0.1", "--set", "metrics.port=0"],
            2,
            "control",
        ),
        (["ctl", "tcp://127.0.0.1:1", "reboot"], 2, "expected one of"),
        (["ctl", "tcp://127.0.0.1:1", "state", "--seconds", "0.1"], 1, "no answer"),
        (["keygen", "/proc/none"], 2, "/proc/none"),
        (["replay", "nowhere.h5", "--out", "x"], 1, "no such file"),
        (["run", "--no-such-option"], 2, "No such option"),
    ],
)
def test_errors_say_what_to_do_and_show_no_traceback(
    arguments: list[str], code: int, said: str
) -> None:
    """Exit code and one message."""
    answer = triage(*arguments)
    assert answer.returncode == code, answer.stderr
    assert said in answer.stderr
    assert "Traceback" not in answer.stderr


def test_config_init_writes_a_file_that_checks(tmp_path: Path) -> None:
    """And refuses to overwrite it."""
    file = tmp_path / "t.toml"
    assert triage("config", "init", str(file)).returncode == 0
    assert triage("config", "check", str(file)).returncode == 0
    assert triage("config", "init", str(file)).returncode == 2
    shown = triage("config", "show", "-c", str(file), "--set", "policy.mode=enforce").stdout
    assert re.search(r'mode = "enforce"\s+# flag', shown)


def test_a_replay_of_no_image_is_a_failure(tmp_path: Path) -> None:
    """A folder of notes: exit code 1, and the report says what was skipped."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("no image")
    done = triage("replay", str(tmp_path / "notes"), "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "no image found" in done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["skipped"]) == 1


def test_the_doctor_finds_this_machine_fit() -> None:
    """Every check answers, none fails, each has a subject."""
    answer = triage("doctor", "--json")
    findings = json.loads(answer.stdout)
    assert answer.returncode == 0, findings
    assert {f["subject"] for f in findings} >= {"python", "torch", "hdf5", "decoder", "model"}
    assert all(f["state"] in ("ok", "note") for f in findings)


def test_an_hdf5_plugin_path_for_other_programs_does_no_harm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DIALS users have it set, to the very folder that our filters come from."""
    import hdf5plugin

    monkeypatch.setenv("HDF5_PLUGIN_PATH", hdf5plugin.PLUGIN_PATH)
    answer = triage("doctor", "--json")
    assert answer.returncode == 0, answer.stdout


def test_glimpse_shows_a_simulated_stream() -> None:
    """Kinds, ids, shapes and encodings of what a detector sends."""
    detector = subprocess.Popen(
        [
            *(sys.executable, "-m", "simulators", "detector", "--frames", "3", "--rate", "0"),
            *("--shape", "96", "128", "--socket", "pub", "--wait-for-peer", "60"),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert detector.stdout is not None
    endpoint = json.loads(detector.stdout.readline())["endpoint"]
    shown = triage("glimpse", endpoint, "--messages", "5", "--seconds", "60").stdout
    detector.wait(60)
    detector.stdout.close()
    lines = shown.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["start", "image", "image", "image", "end"]
    assert "image 2 threshold_1 96x128 <u2 bslz4" in lines[3]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bind", "tcp://0.0.0.0:*"], "loopback"),
        (["--fault", "unheard:1"], "expected one of"),
        (["--protocol", "stream3"], "--protocol"),
    ],
)
def test_the_simulator_refuses_what_it_should(arguments: list[str], said: str) -> None:
    """Usage errors are one line and exit code 2."""
    answer = triage("detector", "--frames", "1", *arguments, module="simulators")
    assert answer.returncode == 2
    assert said in answer.stderr


def test_help_answers_at_once() -> None:
    """Recorded, not judged: a generous bound against a gross mistake such as importing torch."""
    began = time.monotonic()
    assert triage("--help").returncode == 0
    assert time.monotonic() - began < 30

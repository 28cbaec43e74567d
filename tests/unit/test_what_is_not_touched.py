"""Commands that leave alone what they do not own: folders of runs, streams that others read."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from triage.cli import demo, glimpse
from triage.errors import ConfigError
from triage.sinks.folder import RunFolder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder of a demo that has ended."""
    folder = tmp_path / "out"
    (folder / "kept").mkdir(parents=True)
    for name in ("sent.zcap", "decisions.parquet", "journal.jsonl", "triage.lock"):
        (folder / name).write_bytes(b"x")
    return folder


def test_a_demo_replaces_what_a_demo_left(out: Path, tmp_path: Path) -> None:
    """And begins in a folder that is new or empty."""
    found = {path.name for path in demo._earlier_demo(out)}
    assert found == {"kept", "sent.zcap", "decisions.parquet", "journal.jsonl", "triage.lock"}
    assert demo._earlier_demo(tmp_path / "new") == []
    (tmp_path / "empty").mkdir()
    assert demo._earlier_demo(tmp_path / "empty") == []


@pytest.mark.parametrize("other", ["notes.txt", "decisions_1.parquet", "override.json"])
def test_a_demo_refuses_a_folder_that_holds_something_else(out: Path, other: str) -> None:
    """It names what is there, and removes nothing."""
    (out / other).write_text("mine")
    with pytest.raises(ConfigError, match=f"holds {other}, .* with --out"):
        demo._earlier_demo(out)
    assert (out / "decisions.parquet").exists()


def test_a_demo_refuses_the_folder_of_a_run(out: Path) -> None:
    """One that is no demo's, and one that is being written into."""
    (out / "sent.zcap").unlink()
    with pytest.raises(ConfigError, match=r"holds decisions\.parquet"):
        demo._earlier_demo(out)
    (out / "sent.zcap").write_bytes(b"")
    held = RunFolder(out)
    with pytest.raises(ConfigError, match="which no demo that has ended left there"):
        demo._earlier_demo(out)
    held.close()


def test_a_look_at_a_stream_does_not_take_it_from_its_reader() -> None:
    """Unless it is said that there is none."""
    with pytest.raises(ConfigError, match="expected --take"):
        glimpse.glimpse(
            "tcp://127.0.0.1:1", socket="pull", take=False, messages=1, seconds=0.1,
            channel=None, protocol=None, config=None, set_=None,
        )  # fmt: skip
    from triage.cli import app

    answer = CliRunner().invoke(
        app,
        ["glimpse", "tcp://127.0.0.1:1", "--socket", "pull", "--take", "--seconds", "0.1"],
    )
    assert answer.exit_code == 1
    assert "--socket pull --take" in answer.output

"""Where compiled code is kept, for users who may write nowhere."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from triage import cli


@pytest.fixture
def nothing_writable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a service's user under ProtectSystem and ProtectHome."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    # To be restored, since what is tested sets them.
    for name in ("NUMBA_CACHE_DIR", "CUPY_CACHE_DIR"):
        monkeypatch.setenv(name, "")


@pytest.mark.usefixtures("nothing_writable")
def test_a_user_who_may_write_nowhere_has_a_folder_of_this_process(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Numba refuses to run without one; nobody else may put code there, and the log says so."""
    cli._keep_compiled_code()
    folder = Path(os.environ["NUMBA_CACHE_DIR"])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert "set NUMBA_CACHE_DIR to a folder" in caplog.text


def test_a_folder_that_is_named_and_can_be_made_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the unit in deploy/ names it, before the first start has made it."""
    named = {name: str(tmp_path / "a" / name) for name in ("NUMBA_CACHE_DIR", "CUPY_CACHE_DIR")}
    for name, folder in named.items():
        monkeypatch.setenv(name, folder)
    cli._keep_compiled_code()
    assert {name: os.environ[name] for name in named} == named
    assert not caplog.records


def test_a_home_that_may_not_be_looked_into_is_no_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As root's is for the service's user: the system refuses to say what is there."""
    closed = str(tmp_path)

    def refusing(call: Any) -> Any:
        def looked(path: Any, *args: Any, **named: Any) -> Any:
            if os.fspath(path).startswith(closed + "/"):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return call(path, *args, **named)

        return looked

    for name in ("stat", "lstat"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) != closed)
    assert not cli._may_write(tmp_path / "home" / ".cache")
    assert cli._may_write(tmp_path.parent)

"""The folder that a run writes into: one run at a time.

``journal.jsonl``, ``recoveries.jsonl`` and ``policies.jsonl`` are those of all runs in the folder,
only ever added to; each line names its run.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from triage.errors import ConfigError

__all__ = ["RunFolder", "is_held", "note_policy", "policies_before", "state_folder", "utc_now"]

log = logging.getLogger(__name__)

_LOCK = "triage.lock"
_POLICIES = "policies.jsonl"
_OF = "directory"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class RunFolder:
    """A folder, held by this process until :meth:`close`, or until it dies.

    Attributes:
        path: the folder.
        run_id: time of the start in UTC, and four digits against chance.
        is_new: nothing was in it; one of its name may have been deleted, or not be mounted.

    Raises:
        ConfigError: another process holds it, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run_id = f"{utc_now()}-{secrets.token_hex(2)}"
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.is_new = not any(path.iterdir())
            self._fd = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as err:
            raise ConfigError(
                f"[output] directory {path}: {err.strerror}; expected a folder that can be written"
            ) from err
        self._lock()
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps({"run_id": self.run_id, "pid": os.getpid()}).encode(), 0)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            if err.errno in _NO_LOCKS:
                log.warning(
                    "%s: this file system has no locks; see that no two runs share it", self.path
                )
                return
            holder = _read(self._fd)
            os.close(self._fd)
            raise ConfigError(
                f"[output] directory {self.path}: another triage writes into it (process "
                f"{holder.get('pid', 'unknown')}, run {holder.get('run_id', 'unknown')}); expected "
                "a folder of its own for each; name another one, or stop that one first"
            ) from err

    def note_recovery(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write down what was found of a run that did not end in order.

        Of several lines about the same run and series the last counts: whoever wrote the ones
        before was killed before it had taken over.

        Raises:
            OSError: the disk refused it.
        """
        with (self.path / "recoveries.jsonl").open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def close(self) -> None:
        """Let go of it; may be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def utc_now() -> str:
    """The wall clock, to name things for people: it may step."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())


def is_held(folder: Path) -> bool:
    """Whether a run writes into a folder now; it is left as it is."""
    try:
        fd = os.open(folder / _LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as err:
        return err.errno not in _NO_LOCKS
    finally:
        os.close(fd)
    return False


def note_policy(
    folder: Path, policy: Mapping[str, Any], *, run_id: str, goes_on_with: str = ""
) -> None:
    """Write down what decides from here on, for the report of whoever goes on with this run.

    Args:
        goes_on_with: the run before, where series of it are gone on with.
    """
    line = {"run_id": run_id, "goes_on_with": goes_on_with, **policy}
    try:
        with (folder / _POLICIES).open("a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as err:
        log.error("%s: %s; a report of a later run lacks this policy", folder / _POLICIES, err)


def policies_before(folder: Path, run_id: str) -> list[dict[str, Any]]:
    """What decided in the runs that this run went on with, in order, each with its ``run_id``."""
    noted: dict[str, list[dict[str, Any]]] = {}
    before: dict[str, str] = {}
    try:
        text = (folder / _POLICIES).read_text(errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            policy = json.loads(line)  # a kill may have cut it off
            run = str(policy["run_id"])
            if came_after := policy.pop("goes_on_with", ""):
                before[run] = str(came_after)
            noted.setdefault(run, []).append(policy)
    found: list[dict[str, Any]] = []
    while (run_id := before.pop(run_id, "")) != "":
        found = noted.get(run_id, []) + found
    return found


def _read(fd: int) -> dict[str, Any]:
    try:
        content = json.loads(os.pread(fd, 4096, 0))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def state_folder(directory: Path, setting: str, *, is_new: bool = False) -> Path:
    """Where the state of runs in ``directory`` lies; made when it is not there.

    Args:
        setting: a folder; "" for memory of the system, which no disk holds up.
        is_new: what is there is of a folder of that name that is no longer there; it is put
            aside, to the same name with ``.before`` behind it.

    Raises:
        OSError: it cannot be made.
    """
    if setting:
        parent = Path(setting)
    else:
        memory = Path("/dev/shm")
        parent = (memory if memory.is_dir() else Path(tempfile.gettempdir())) / (
            f"triage-{os.geteuid()}"
        )
    name = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:16]
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if parent.stat().st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, f"{parent} belongs to another user")
    if not setting:
        _remove_orphans(parent)
    folder = parent / name
    if is_new and folder.exists():
        aside = folder.with_name(f"{name}.before")
        log.warning(
            "%s is empty: the run begins anew; what was noted of runs in a folder of that name is "
            "in %s. Were they not deleted, see that the folder is mounted, stop, and move it back "
            "to %s",
            directory,
            aside,
            folder,
        )
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / _OF).write_bytes(os.fsencode(directory.resolve()))
    return folder


def _remove_orphans(parent: Path) -> None:
    """Free the memory of runs whose folders were deleted."""
    for note in parent.glob(f"*/{_OF}"):
        with contextlib.suppress(OSError):
            if not Path(os.fsdecode(note.read_bytes())).exists():
                shutil.rmtree(note.parent)

"""Builds a C module of the product under sanitizers, and runs Python with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

__all__ = ["ROOT", "build_sanitized", "run_sanitized"]

ROOT = Path(__file__).resolve().parent.parent


def build_sanitized(source: str, folder: Path) -> None:
    """Compile ``source`` of the repository to an extension in ``folder``; skip without a compiler.

    It is found there under its own name, without its package.
    """
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("needs gcc on Linux")
    headers = Path(sysconfig.get_path("include"))
    if not _library().is_absolute() or not (headers / "Python.h").exists():
        pytest.skip("no sanitizer or no headers of Python")
    file = ROOT / source
    command = [
        *("gcc", "-O1", "-g", "-std=gnu11", "-fno-strict-aliasing", "-ffp-contract=off"),
        *("-Wno-psabi", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"),
        *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        *("-DPy_LIMITED_API=0x030B0000", f"-I{headers}", f"-I{file.parent}"),
        *(str(file), "-lm", "-o", str(folder / f"{file.stem}.abi3.so")),
    ]
    subprocess.run(command, check=True)


def run_sanitized(program: str, folder: Path, *arguments: str) -> str:
    """What ``program`` prints, with the modules of ``folder`` at hand; it must end well.

    Every object gets memory of its own, so that a step beyond one is seen.
    """
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path.insert(0, sys.argv[1])\n{program}",
         str(folder), *arguments],
        env=os.environ
        | {
            "LD_PRELOAD": str(_library()),
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONMALLOC": "malloc",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        },
        capture_output=True,
        text=True,
        timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def _library() -> Path:
    found = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    return Path(found.stdout.strip())

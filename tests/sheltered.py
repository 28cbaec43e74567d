"""Runs a piece of Python in a process of its own, which may not have more memory than it is given.

Input that a fault turns into gigabytes, or into a step beyond a buffer, then ends that process and
not the tests.
"""

from __future__ import annotations

import os
import subprocess
import sys

__all__ = ["run_sheltered"]

_BEFORE = """
import resource, sys
def bound(extra_bytes):
    pages = int(open("/proc/self/statm").read().split()[0])
    most = pages * resource.getpagesize() + extra_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    return peak()
def peak():
    # Of this process alone: the other measure is the parent's where it forked.
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
"""


def run_sheltered(
    program: str, *arguments: str, timeout_s: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run ``program``, with ``bound(bytes)`` and ``peak()`` at hand; it must end well.

    ``bound`` lets the process grow by so many bytes from there on, and gives what it has used at
    most so far, as ``peak`` does.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _BEFORE + program, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"ended with {done.returncode}:\n{done.stderr[-3000:]}"
    return done

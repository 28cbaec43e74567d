"""Memory that a long run frees goes back to the machine."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from triage.machine import keep_large_blocks_apart

def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

keep_large_blocks_apart()
size = 24 << 20
# glibc learns from a block that is freed, and puts the next one among the small ones.
first = bytearray(size)
del first
second = bytearray(size)
behind = bytearray(100_000)
before = resident_bytes()
del second
print(before - resident_bytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the C library of GNU")
def test_a_large_block_goes_though_a_small_one_lies_behind_it() -> None:
    """As a mask and a message do. Without the call the block stays with the process."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=280, check=True
    )
    assert int(done.stdout) >= 23 << 20

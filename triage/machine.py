"""The machine: which one, and with which versions, for every record; and its memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from triage import __version__

__all__ = ["give_back_memory", "keep_large_blocks_apart", "machine", "versions"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""
_LARGE_BYTES = 16 << 20
"""More than a compressed frame has, less than a decoded mask of one of 4 million pixels."""

_PROGRAMS = (
    "torch",
    "numpy",
    "numba",
    "openvino",
    "pyzmq",
    "cbor2",
    "msgspec",
    "h5py",
    "hdf5plugin",
    "pyarrow",
    "dectris-compression",
    "cupy-cuda13x",
)
"""Distributions whose version moves a figure."""


def keep_large_blocks_apart() -> None:
    """Have the C library map blocks of more than 16 MiB one by one, so that they go when freed.

    Left to itself glibc puts them among the messages once one was freed, and where a message has
    taken a part of the place the next mask needs another: a process that runs for months grows
    by a mask now and then. Only glibc can be told.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        # The rule of glibc's own, which ends with the line above; else every free frame would
        # be given back at once.
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE_BYTES)


def give_back_memory() -> None:
    """Let the operating system have what the C library holds free; only glibc can be asked to."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory and system; nothing that names the host."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else _cores(),
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Versions of this program, of Python, and of what is installed of :data:`_PROGRAMS`."""
    found = {"braggtriage": __version__, "python": platform.python_version()}
    for name in _PROGRAMS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = dict(line.partition(":")[::2] for line in lines if ":" in line)
    known = {name.strip(): value.strip() for name, value in fields.items()}
    if "model name" not in known:
        return platform.processor() or platform.machine()
    # Virtual machines hide the name of the processor; family and model still tell it.
    numbers = ", ".join(
        f"{name} {known[name]}" for name in ("cpu family", "model", "stepping") if name in known
    )
    return f"{known['model name']} ({numbers})"


def _cores() -> int:
    return os.cpu_count() or 1


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return 0

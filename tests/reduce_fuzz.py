"""What the test and the long run of tests/fuzz_reduce.c share: how it is built, and on what."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
from pictures import encode, picture

HERE = Path(__file__).resolve().parent

Case = tuple[str, tuple[int, int], int, int]
CASES: list[Case] = [
    # pixel type, shape (y, x), bytes of a block, bin factor
    ("<u2", (37, 53), 512, 4),
    ("<u2", (70, 131), 8192, 8),
    ("u1", (64, 64), 1024, 16),
    ("<u4", (45, 61), 2048, 2),
    ("<i4", (66, 129), 4096, 32),
    ("<i2", (9, 200), 128, 8),
]


def build(program: Path, optimise: str = "-O1") -> subprocess.CompletedProcess[str]:
    """Compile to ``program`` under address and undefined-behaviour sanitizers."""
    command = [
        *("gcc", optimise, "-g", "-std=gnu11", "-fsanitize=address,undefined"),
        *("-fno-sanitize-recover=all", "-Wno-psabi"),
        *(f"-I{HERE.parent / 'triage' / 'backends'}", str(HERE / "fuzz_reduce.c")),
        *("-o", str(program)),
    ]
    return subprocess.run(command, capture_output=True, text=True)


def run(
    program: Path, case: Case, folder: Path, *, rounds: int, seed: int, timeout_s: float | None
) -> subprocess.CompletedProcess[str]:
    """Change the payload of a case so many times; what came of it is printed or an exit status."""
    dtype, shape, block_bytes, k = case
    pixels = picture(dtype, shape)
    kind = pixels.dtype
    payload = folder / "payload"
    payload.write_bytes(encode(pixels, "bslz4", block_bytes)[12:])
    command = [
        *(program, payload, 8 * kind.itemsize, int(kind.kind == "i"), *shape, block_bytes, k),
        *(np.iinfo(kind).max - 2, rounds, seed),
    ]
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=timeout_s
    )


def counted(output: str) -> tuple[int, int]:
    """Rounds, and payloads that were accepted, from what the program printed."""
    rounds, accepted = (int(word) for word in output.split() if word.isdigit())
    return rounds, accepted

"""The C reduction under sanitizers, and what it refuses.

The kernels are compiled with a small program that changes payloads at random; every buffer ends
where the kernels may write or read last, so that a step beyond it ends the program.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import encode, picture

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "triage" / "backends"
CASES = [
    # pixels, shape, block bytes, k
    ("<u2", (37, 53), 512, 4),
    ("<u2", (70, 131), 8192, 8),
    ("u1", (64, 64), 1024, 16),
    ("<u4", (45, 61), 2048, 2),
    ("<i4", (66, 129), 4096, 32),
    ("<i2", (9, 200), 128, 8),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc")
    made = tmp_path_factory.mktemp("fuzz") / "fuzz_reduce"
    command = [
        *(compiler, "-O1", "-g", "-std=gnu11", "-fsanitize=address,undefined"),
        *("-fno-sanitize-recover=all", "-Wno-psabi", f"-I{SOURCES}"),
        *(str(HERE.parent / "fuzz_reduce.c"), "-o", str(made)),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in built.stderr:
        pytest.skip("gcc without sanitizers")
    assert built.returncode == 0, built.stderr
    return made


@pytest.mark.parametrize(("dtype", "shape", "block_bytes", "k"), CASES)
def test_no_payload_leads_beyond_its_buffers(
    program: Path, tmp_path: Path, dtype: str, shape: tuple[int, int], block_bytes: int, k: int
) -> None:
    """Thousands of changed payloads: no access beyond a buffer, and all kernels agree on each."""
    pixels = picture(dtype, shape)
    payload = tmp_path / "payload"
    payload.write_bytes(encode(pixels, "bslz4", block_bytes)[12:])
    kind = pixels.dtype
    arguments: list[Any] = [
        *(payload, 8 * kind.itemsize, int(kind.kind == "i"), *shape, block_bytes, k),
        *(np.iinfo(kind).max - 2, 1500, 11),
    ]
    done = subprocess.run(
        [str(program), *map(str, arguments)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    rounds, accepted = (int(word) for word in done.stdout.split() if word.isdigit())
    assert rounds == 1500
    # A change within literals makes another frame, not a corrupt one.
    assert 0 < accepted < rounds


def call(**changed: Any) -> int:
    """_reduce.reduce on a good frame of 16 x 24 pixels, with some arguments changed."""
    compiled = pytest.importorskip("triage.backends._reduce", reason="the C was not built")
    pixels = picture("<u2", (16, 24))
    arguments: dict[str, Any] = {
        "payload": encode(pixels, "bslz4"),
        "at": 12,
        "bits": 16,
        "is_signed": False,
        "big_endian": False,
        "ny": 16,
        "nx": 24,
        "block_bytes": 8192,
        "k": 8,
        "high": 65533,
        "error": -1,
        "negative_is_invalid": False,
        "valid": None,
        "valid_count": np.full((2, 3), 64, np.uint16),
        "workspace": np.empty(compiled.workspace_bytes(16, 24, 8, 8192), np.uint8),
        "maximum": np.zeros((2, 3), np.uint32),
        "total": np.zeros((2, 3), np.uint64),
        "count": np.zeros((2, 3), np.uint16),
    }
    arguments |= changed
    code: int = compiled.reduce(*arguments.values())
    return code


def test_a_good_call_passes() -> None:
    """The arguments that the next test changes are good ones."""
    assert call() == 0


@pytest.mark.parametrize(
    "changed",
    [
        {"at": -1},
        {"at": 1 << 40},
        {"bits": 64},
        {"bits": 12},
        {"ny": 0},
        {"nx": -5},
        {"ny": 1 << 40},
        {"block_bytes": 0},
        {"block_bytes": 8200},
        {"block_bytes": 1 << 30},
        {"k": 3},
        {"k": 0},
        {"high": 65536},
        {"high": -1},
        {"valid": np.zeros(48 + 63, np.uint8)},
        {"workspace": np.empty(100, np.uint8)},
        {"maximum": np.zeros((1, 3), np.uint32)},
        {"total": np.zeros((2, 2), np.uint64)},
        {"count": np.zeros((2, 2), np.uint16)},
        {"valid_count": np.zeros((2, 2), np.uint16)},
        {"count": np.zeros(0, np.uint16)},
    ],
)
def test_numbers_that_contradict_each_other_are_refused(changed: dict[str, Any]) -> None:
    """Sizes are checked against each other before a byte is touched."""
    with pytest.raises(ValueError, match=r"reduce\(\)"):
        call(**changed)

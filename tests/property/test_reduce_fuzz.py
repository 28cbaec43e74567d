"""The C reduction under sanitizers, and what it refuses.

The kernels are compiled with a small program that changes payloads at random; every buffer ends
where the kernels may write or read last, so that a step beyond it ends the program.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reduce_fuzz
from pictures import encode, picture


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    made = tmp_path_factory.mktemp("fuzz") / "fuzz_reduce"
    built = reduce_fuzz.build(made)
    if "cannot find" in built.stderr:
        pytest.skip("gcc without sanitizers")
    assert built.returncode == 0, built.stderr
    return made


@pytest.mark.parametrize("case", reduce_fuzz.CASES, ids=str)
def test_no_payload_leads_beyond_its_buffers(
    program: Path, tmp_path: Path, case: reduce_fuzz.Case
) -> None:
    """Thousands of changed payloads: no access beyond a buffer, and all kernels agree on each."""
    done = reduce_fuzz.run(program, case, tmp_path, rounds=1500, seed=11, timeout_s=100)
    assert done.returncode == 0, done.stderr
    rounds, accepted = reduce_fuzz.counted(done.stdout)
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

"""The C modules under the address and undefined-behaviour sanitizers, on what should break them.

The reduction has a program of its own (fuzz_reduce.c), the evidence its test beside its numbers.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fuzz_grammar import read_capture
from fuzz_targets import CborTarget
from sanitized import ROOT, build_sanitized, run_sanitized

WALKED = """
import random
from pathlib import Path
import numpy as np
import _cbor
import fuzz_grammar as grammar
class Tagged:
    def __init__(self, tag, value):
        self.tag, self.value = tag, value
rng, walked, number = random.Random(7), 0, 0
sound = [file.read_bytes() for file in sorted(Path(sys.argv[2]).iterdir())]
def walk(message):
    # An array of numpy ends where its bytes end; a byte string has one more.
    held = np.frombuffer(message, np.uint8).copy()
    return _cbor.walk(memoryview(held), Tagged) is not None
for message in sound:
    assert walk(message)
    for length in range(0, min(len(message), 700)):
        walk(message[:length])
for number in range(int(sys.argv[3])):
    message = rng.choice(sound)
    for _ in range(rng.choice([1, 1, 2, 3])):
        message = grammar.changed_cbor(message, rng)
    walked += walk(message[: 1 << 16])
for deep in (31, 32, 33, 100_000):
    for opening in (b"\\x81", b"\\xa1\\x61a", b"\\xd8\\x40"):
        walk(b"\\xa1\\x61x" + opening * deep + b"\\x00")
print(number + 1, walked)
"""


def messages_in(folder: Path) -> Path:
    """Sound messages, a file each."""
    messages = folder / "messages"
    messages.mkdir()
    for number, seed in enumerate(CborTarget().seeds[:6]):
        for place, parts in enumerate(read_capture(seed)):
            (messages / f"{number}-{place}").write_bytes(parts[0])
    return messages


def test_the_walk_of_messages_stays_in_its_buffer(tmp_path: Path) -> None:
    """Thousands of changed messages, and every cut of sound ones, none read beyond its end."""
    build_sanitized("triage/ingest/_cbor.c", tmp_path)
    walked = run_sanitized(WALKED, tmp_path, str(messages_in(tmp_path)), "6000").split()
    assert int(walked[0]) == 6000
    # Most changes leave a message that is well-formed, and some do not.
    assert 1000 < int(walked[1]) < 6000


CALLED = """
import numpy as np
import _fast_exit as c
rng, outcomes = np.random.default_rng(3), {"done": 0, "refused": 0}
done = {"seen": 0, "rings": 0, "answer": 0}
def numbers(*shape):
    scale = rng.choice([0.0, 1.0, 1e30, np.nan, np.inf])
    with np.errstate(all="ignore"):
        return (rng.normal(0, 1, shape) * scale).astype(np.float32)
def spoilt(arrays):
    # One array a number short or long, or read-only, or of another type, now and then.
    if rng.random() < 0.5:
        return arrays
    at, arrays = rng.integers(len(arrays)), list(arrays)
    flat = arrays[at].reshape(-1)
    kind = rng.integers(4)
    if kind == 0:
        arrays[at] = flat[:-1].copy()
    elif kind == 1:
        arrays[at] = np.append(flat, np.float32(0))
    elif kind == 2:
        arrays[at] = np.empty(0, np.float32)
    else:
        arrays[at] = np.frombuffer(flat.tobytes() + b"xyz", np.uint8)[1:]
    return arrays
def call(function, arrays, *rest):
    try:
        function(*spoilt(arrays), *rest)
        outcomes["done"] += 1
        done[function.__name__] += 1
    except (ValueError, BufferError, TypeError):
        outcomes["refused"] += 1
for round_ in range(int(sys.argv[2])):
    lanes = int(rng.choice([*c.LANES, *c.LANES, 5]))
    members = int(rng.integers(1, 4))
    k = int(rng.choice([0, 8, 16, 24, 40, 7, 4096, 4104]))
    call(c.seen, [numbers(k, 39), numbers(6), numbers(members, 39, 32), numbers(members, 32, 6),
                  numbers(members, 32), numbers(members, 32, 16), numbers(members, 16),
                  np.empty((members, 24), np.float32)], 0.8, lanes)
    sectors = int(rng.choice([1, 3, 8, 16, 17, 0]))
    bins = int(rng.choice([4, 8, 160, 20, 6, 512, 516]))
    call(c.rings, [numbers(5, sectors, bins), numbers(24, 5, 24), numbers(24), numbers(24, 5, 24),
                   numbers(24), numbers(24, 5, 12), numbers(12), numbers(12 * (bins // 4), 64),
                   numbers(64), np.empty(64, np.float32)], sectors, lanes)
    known, more = int(rng.integers(0, 200)), int(rng.choice([0, 1, 24, 88, 130]))
    call(c.answer, [numbers(known), numbers(int(rng.choice([1, members])), more),
                    numbers(members, known + more, 64), numbers(members, 64),
                    numbers(members, 64, 32), numbers(members, 32), numbers(members, 32, 16),
                    numbers(members, 16), np.empty(int(rng.integers(1, 18)), np.float32)], lanes)
print(outcomes["done"], outcomes["refused"], min(done.values()))
"""


def test_the_fast_exit_stays_in_its_buffers(tmp_path: Path) -> None:
    """Sizes at every bound, buffers too short, too long and crooked: done or refused."""
    build_sanitized("triage/nets/_fast_exit.c", tmp_path)
    words = run_sanitized(CALLED, tmp_path, "120").split()
    done, refused, fewest = (int(word) for word in words)
    assert done + refused == 360
    assert done > 60
    assert refused > 60
    # None of the three is always refused.
    assert fewest >= 5


SPOILT = [
    (
        "triage/ingest/_cbor.c",
        "    if (length > (uint64_t)left(w))\n        return NULL;\n    PyObject *found",
        "    PyObject *found",
        WALKED,
    ),
    ("triage/nets/_fast_exit.c", "number % TOGETHER || number > MOST", "number % TOGETHER", CALLED),
]


@pytest.mark.parametrize(("source", "check", "without", "program"), SPOILT, ids=["cbor", "fast"])
def test_the_sanitizers_see_a_step_beyond(
    tmp_path: Path, source: str, check: str, without: str, program: str
) -> None:
    """A module that lacks one of its checks is caught by the very programs above."""
    text = (ROOT / source).read_text()
    assert text.count(check) == 1
    for header in (ROOT / source).parent.glob("*.h"):
        shutil.copy(header, tmp_path)
    spoilt = tmp_path / Path(source).name
    spoilt.write_text(text.replace(check, without))
    build_sanitized(str(spoilt), tmp_path)
    arguments = ["120"]
    if program == WALKED:
        arguments = [str(messages_in(tmp_path)), "3000"]
    with pytest.raises(AssertionError, match=r"AddressSanitizer|runtime error"):
        run_sanitized(program, tmp_path, *arguments)

"""Each fuzzed way in, for some hundred inputs that are always the same.

benchmarks/fuzz.py runs the same targets for as long as there is time, led by coverage.
"""

from __future__ import annotations

import contextlib
import random

import fuzz_grammar as grammar
import pytest
from fuzz_base import Target
from fuzz_targets import TARGETS

INPUTS = {"cbor": 400, "json": 600, "chunk": 1500, "nxmx": 60, "config": 250}
"""About two seconds of each; the first of them are the sound ones."""


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_no_promise_is_broken(name: str) -> None:
    """Nothing raises, each image is one message, oracles agree, and the next input is unharmed."""
    target = TARGETS[name]()
    with contextlib.closing(target):
        _run(target, name)


def _run(target: Target, name: str) -> None:
    rng = random.Random(2024)
    inputs = list(target.seeds)
    for seed in target.seeds:
        target.check(seed)
    for number in range(INPUTS.get(name, 100)):
        data = rng.choice(inputs)
        for _ in range(rng.choice([1, 1, 2, 4])):
            data = target.changed(data, rng)
        if number % 10 == 0:
            inputs.append(data)
        try:
            target.check(data)
        except Exception as err:
            err.add_note(f"input {number} of {name}: {data[:200]!r}")
            raise


def test_a_tree_of_cbor_is_written_as_it_was_read() -> None:
    """The fuzzer's own codec keeps messages as they are, so that what it changes is all that is."""
    for seed in TARGETS["cbor"]().seeds:
        for parts in grammar.read_capture(seed):
            plain = parts[0].removeprefix(b"\xd9\xd9\xf7")
            # Floats and simple values are kept as bytes; lengths are the shortest, as detectors'.
            assert grammar.write_cbor(grammar.read_cbor(plain)) == plain


def test_a_capture_is_read_as_it_was_written() -> None:
    """Messages, parts and empty parts come back."""
    messages = [[b"a", b"", b"bc"], [b""], [bytes(300)]]
    assert grammar.read_capture(grammar.write_capture(messages)) == messages

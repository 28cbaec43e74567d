"""``triage-sim detector`` in each protocol, read by the source that the settings open for it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triage.backends import open_backend
from triage.config import load_settings
from triage.ingest import open_source
from triage.metrics import Metrics
from triage.records import Message

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 90.0
FRAMES = 6


def simulated(protocol: str, *options: str) -> tuple[list[Message], dict[str, Any]]:
    """What our source makes of it, and what the detector says it sent."""
    command = [
        sys.executable, "-m", "simulators", "detector", "--protocol", protocol,
        "--frames", str(FRAMES), "--rate", "0", "--shape", "600", "128", *options,
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        endpoint = json.loads(process.stdout.readline())["endpoint"]
        overrides = {"source.protocol": protocol, "source.endpoint": endpoint}
        if "--online" in options:
            overrides["source.karabo_order"] = "online"
        source = open_source(load_settings(overrides=overrides), Metrics())
        messages: list[Message] = []
        until = time.monotonic() + DEADLINE_S
        while count(messages) < FRAMES and time.monotonic() < until:
            messages += source.receive(100)
        while not ended(protocol, messages) and time.monotonic() < until:
            messages += source.receive(100)
        said = json.loads(process.stdout.readline())
        source.close()
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.communicate()
    return messages, said


def count(messages: Sequence[Message]) -> int:
    return sum(message.frame is not None for message in messages)


def ended(protocol: str, messages: Sequence[Message]) -> bool:
    """A bridge says no end; Jungfraujoch one on each of two sockets."""
    return protocol == "karabo" or sum(m.kind.value == "end" for m in messages) == 2


def check(messages: Sequence[Message], said: dict[str, Any], left_out: Any) -> None:
    frames = sorted((m.frame for m in messages if m.frame), key=lambda f: f.image_id)
    assert said["images"] == FRAMES
    assert [f.image_id for f in frames] == list(range(FRAMES))
    assert {f.fault for f in frames} == {None}
    assert said["bytes"] == sum(len(bytes(part)) for m in messages for part in m.parts)
    pixels = open_backend("cpu").decode(frames[0])
    counts = pixels[~left_out(pixels)]
    # 37 of the 600 rows lie between two modules.
    assert 0.90 < counts.size / pixels.size <= 563 / 600
    assert counts.min() >= 0


def test_jungfraujoch_over_two_sockets() -> None:
    """Signed pixels, the lowest value where there is none, start and end on both sockets."""
    messages, said = simulated(
        "jungfraujoch", "--bind", "tcp://127.0.0.1:*,tcp://127.0.0.1:*", "--images-per-file", "2"
    )
    assert {m.lane for m in messages} == {0, 1}
    first = next(m.frame for m in messages if m.frame is not None)
    assert first.series.error_value == -(2**31)
    assert first.series.geometry is not None
    check(messages, said, lambda pixels: pixels == -(2**31))


@pytest.mark.parametrize(
    "options",
    [(), ("--online",), ("--bridge-version", "1.0"), ("--train-modules", "2")],
    ids=["file", "online", "1.0", "modules"],
)
def test_trains_of_a_bridge(options: tuple[str, ...]) -> None:
    """Calibrated photons, NaN where there is no pixel, in whole trains."""
    messages, said = simulated("karabo", "--pulses", "3", *options)
    assert said["sent"] == 2
    # Two modules of 300 x 128 stand side by side, which is squarer than on top of each other.
    shape = (300, 256) if "--train-modules" in options else (600, 128)
    assert {m.frame.shape for m in messages if m.frame is not None} == {shape}
    check(messages, said, np.isnan)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--protocol", "karabo", "--fault", "wrong_tag:1"), "expected one of truncated"),
        (("--protocol", "karabo", "--record", "x"), "not with karabo"),
        (("--protocol", "karabo", "--bridge-version", "3"), "2.2 or 1.0"),
        (("--protocol", "stream2", "--socket", "rep"), "expected push or pub"),
        (("--bind", "tcp://127.0.0.1:*,tcp://127.0.0.1:*"), "only with jungfraujoch"),
        (("--protocol", "jungfraujoch", "--bind", "tcp://127.0.0.1:*,tcp://*:9"), "allow-remote"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: tuple[str, ...], why: str) -> None:
    """Exit code 2 and what was expected."""
    command = [sys.executable, "-m", "simulators", "detector", *options]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S)
    assert answer.returncode == 2, answer.stderr
    assert why in answer.stderr

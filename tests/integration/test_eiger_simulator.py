"""eiger-simulator, ALBA's emulator of a SIMPLON 1.6 detector, Stream V1.

Its blobs have no header, its hashes are empty and its times count from 1970. It brings a web
framework of its own, so it lives in an environment of its own: its command ``eiger-simulator``
is found on PATH or named by the variable ``TRIAGE_EIGER_SIMULATOR``.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from simplon import Emulator, free_ports

from triage.backends import open_backend
from triage.ingest.subscriber import Subscriber

SIMULATOR = os.environ.get("TRIAGE_EIGER_SIMULATOR") or shutil.which("eiger-simulator")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        SIMULATOR is None,
        reason="needs eiger-simulator in an environment of its own: TRIAGE_EIGER_SIMULATOR",
    ),
]

SHAPE = (514, 1030)
IMAGES = [np.random.default_rng(seed).poisson(0.3, SHAPE).astype(np.uint16) for seed in range(2)]


@pytest.fixture
def ports() -> list[int]:
    return free_ports(2)


@pytest.fixture
def emulator(tmp_path: Path, ports: list[int]) -> Emulator:
    with h5py.File(tmp_path / "sim_master.h5", "w") as master:
        master["entry/data/data_000001"] = np.stack(IMAGES)
    command = [
        str(SIMULATOR),
        "--host=127.0.0.1",
        f"--port={ports[0]}",
        f"--zmq=tcp://127.0.0.1:{ports[1]}",
        "--dataset=sim_master.h5",
    ]
    return Emulator(command, tmp_path, ports[0], "1.6.0")


@pytest.mark.parametrize("compression", ["bslz4", "lz4"])
def test_its_frames_are_read(emulator: Emulator, ports: list[int], compression: str) -> None:
    """Four frames, two images in turn, with exactly the pixels of its dataset."""

    def set_up(emulator: Emulator) -> Subscriber:
        emulator.initialize()
        for name, value in (
            ("x_pixels_in_detector", SHAPE[1]),
            ("y_pixels_in_detector", SHAPE[0]),
            ("compression", compression),
            ("nimages", 4),
            ("count_time", 0.01),
            ("frame_time", 0.01),
        ):
            assert emulator.put(f"detector/config/{name}", value), name
        # What its images say of themselves is settled here, not at the arm.
        emulator.initialize()
        assert emulator.put("stream/config/mode", "enabled")
        source = Subscriber(f"tcp://127.0.0.1:{ports[1]}")
        assert emulator.put("stream/command/initialize")
        return source

    messages = emulator.series(set_up, images=4)
    assert [m.kind.value for m in messages] == ["start", *4 * ["image"], "end"]
    frames = [m.frame for m in messages if m.frame is not None]
    assert [f.image_id for f in frames] == [0, 1, 2, 3]
    backend = open_backend("cpu")
    for i, frame in enumerate(frames):
        assert frame.fault is None, frame.fault_detail
        np.testing.assert_array_equal(backend.decode(frame), IMAGES[i % 2])

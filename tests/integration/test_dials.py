"""DIALS, as it comes with Debian, reads what we keep."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import hdf5plugin
import pytest
from msgspec import structs

from triage.ingest.files import Files
from triage.sinks.nxmx import KeptWriter

pytestmark = [
    pytest.mark.interop,
    pytest.mark.shared,
    pytest.mark.skipif(
        shutil.which("dials.import") is None,
        reason="needs DIALS: apt-get install dials",
    ),
]

SENSOR = ("Si", 4.5e-4)
"""DIALS opens no file without it."""


def dials(folder: Path, *command: str) -> str:
    # DIALS runs on the system's Python: ours must not leak into it.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))}
    environment["HDF5_PLUGIN_PATH"] = hdf5plugin.PLUGIN_PATH
    environment["PATH"] = "/usr/bin:/bin"
    answer = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout
    return answer.stdout


def test_dials_imports_kept_frames_and_finds_their_spots(shared: Path, tmp_path: Path) -> None:
    """FormatNXmx takes the master; the spot finder finds what nanoBragg drew (91 spots of 5
    sigma and more by its label)."""
    writer = KeptWriter(tmp_path, sensor=SENSOR)
    source = Files([shared / "nanobragg" / "ref_01085_master.h5"])
    for message in source.receive(0):
        if message.frame is not None:
            writer.write(message.frame, None)
    master, *_ = writer.close()
    imported = dials(tmp_path, "dials.import", master.name)
    assert "FormatNXmx" in imported
    assert "num images: 1" in imported
    found = dials(tmp_path, "dials.find_spots", "imported.expt", "nproc=1")
    saved = [line for line in found.splitlines() if "Saved" in line and "reflections" in line]
    assert int(saved[-1].split()[1]) > 30


def spots(folder: Path, master: Path) -> int:
    """How many reflections its spot finder saves of what a master holds."""
    dials(folder, "dials.import", master.name, "output.experiments=all.expt")
    found = dials(folder, "dials.find_spots", "all.expt", "nproc=1")
    saved = [line for line in found.splitlines() if "Saved" in line and "reflections" in line]
    return int(saved[-1].split()[1])


def test_dials_reads_every_frame_of_several_data_files(shared: Path, tmp_path: Path) -> None:
    """One frame kept five times, two in a file: five times its spots, through the virtual
    dataset."""
    one, five = (
        KeptWriter(tmp_path, sensor=SENSOR),
        KeptWriter(tmp_path, frames_per_file=2, sensor=SENSOR),
    )
    source = Files([shared / "nanobragg" / "ref_01085_master.h5"])
    (frame,) = [m.frame for m in source.receive(0) if m.frame is not None]
    one.write(frame)
    alone, *_ = one.close()
    for image_id in range(5):
        five.write(structs.replace(frame, image_id=image_id))
    several, *data = five.close()
    assert len(data) == 3
    assert spots(tmp_path, several) == 5 * spots(tmp_path, alone)

"""CrystFEL's own indexamajig fetches kept frames from the endpoint."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import hdf5plugin
import numpy as np
import pyarrow.parquet as pq
import pytest
from msgspec import structs

from simulators.detectors.frames import compressed
from triage.ingest.files import recorded
from triage.records import (
    Decision,
    Frame,
    Geometry,
    Override,
    Reason,
    Scores,
    Series,
    Verdict,
)
from triage.sinks.crystfel import CrystfelEndpoint, CrystfelReport, Looked
from triage.sinks.exports import export
from triage.sinks.nxmx import KeptWriter
from triage.sinks.table import DecisionTable

PROGRAM = os.environ.get("TRIAGE_INDEXAMAJIG") or shutil.which("indexamajig")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        PROGRAM is None, reason="needs CrystFEL's indexamajig, on PATH or named TRIAGE_INDEXAMAJIG"
    ),
]

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (96, 128)
SERIES = Series(
    series_id=7,
    series_unique_id="u",
    image_size_y_px=SHAPE[0],
    image_size_x_px=SHAPE[1],
    geometry=Geometry(
        beam_center_x_px=60.5,
        beam_center_y_px=50.25,
        pixel_size_x_m=75e-6,
        pixel_size_y_m=75e-6,
        detector_distance_m=0.125,
        incident_wavelength_angstrom=1.0,
    ),
)
FRAMES = 12


def peaks(image_id: int) -> list[tuple[int, int, int]]:
    """Row, column and counts of the spots of one image."""
    random = np.random.default_rng(image_id)
    return [(8 + 16 * k, int(random.integers(5, 120)), 100 * (k + 1)) for k in range(5)]


def look(frame: Frame) -> Looked:
    """The spots as pixels and as a list, and a masked corner that is brighter than any."""
    pixels = np.zeros(SHAPE, np.uint16)
    rows, columns, counts = np.array(peaks(frame.image_id)).T
    pixels[rows, columns] = counts
    pixels[:4, :4] = 65535
    valid = pixels != 65535
    return Looked(
        pixels=pixels, valid=valid, x_px=columns + 0.5, y_px=rows + 0.5, photons=counts * 1.0
    )


def decided(image_id: int, verdict: Verdict = Verdict.KEEP) -> tuple[Frame, Decision]:
    frame = Frame(
        series=SERIES,
        image_id=image_id,
        shape=SHAPE,
        payload=compressed(np.zeros(SHAPE, np.uint16), "bslz4"),
        size_bytes=1000,
    )
    decision = Decision(
        series_id=7, series_unique_id="u", image_id=image_id, file="", frame=-1, ordinal=image_id,
        verdict=verdict, reason=Reason.SCORE, forwarded=True, override=Override.NONE,
        scores=Scores(p_blank=0.125), model_id="m", policy_id="p", latency_us=1.0,
    )  # fmt: skip
    return frame, decision


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[CrystfelEndpoint]:
    opened = CrystfelEndpoint("tcp://127.0.0.1:*", look, directory=tmp_path, threads=2)
    yield opened
    opened.close()


class Indexamajig:
    """The program at work on what the endpoint gives, without indexing."""

    def __init__(self, endpoint: str, geometry: Path, folder: Path, *options: str) -> None:
        assert PROGRAM is not None
        self.stream = folder / "out.stream"
        self._log = (folder / "indexamajig.log").open("w+")
        self._process = subprocess.Popen(
            [
                PROGRAM,
                f"--zmq-input={endpoint}",
                *("--zmq-request=next", "--data-format=msgpack", "--indexing=none"),
                *("-g", str(geometry), "-o", str(self.stream), f"--temp-dir={folder}"),
                *("--copy-header=image_id", "--copy-header=p_blank", *options),
            ],
            cwd=folder,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            # Its workers are processes too, and may outlive it.
            start_new_session=True,
        )

    def chunks(self) -> list[str]:
        """What it wrote of each image so far."""
        text = self.stream.read_text() if self.stream.exists() else ""
        return re.findall(r"----- Begin chunk -----\n(.*?)----- End chunk -----", text, re.S)

    def wait_for(self, images: int) -> list[str]:
        until_s = time.monotonic() + 60
        while len(self.chunks()) < images and time.monotonic() < until_s:
            assert self._process.poll() is None, self.said()
            threading.Event().wait(0.05)
        return self.chunks()

    def said(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def close(self) -> None:
        """Nothing on the wire ends it: it goes on asking until it is told by a signal."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._log.close()


def geometry_of(endpoint: CrystfelEndpoint, folder: Path) -> Path:
    endpoint.series_started(SERIES)
    path = folder / "crystfel_7.geom"
    until_s = time.monotonic() + 60
    while not path.exists() and time.monotonic() < until_s:
        threading.Event().wait(0.01)
    return path


def header(chunk: str, name: str) -> str:
    found = re.search(rf"{name} = (\S+)", chunk)
    assert found, chunk
    return found.group(1)


def table(chunk: str) -> list[list[float]]:
    """fs, ss, 1/d and intensity of each peak."""
    found = re.search(r"Peaks from peak search\n[^\n]*\n(.*?)End of peak list", chunk, re.S)
    assert found, chunk
    return [[float(word) for word in row.split()[:4]] for row in found.group(1).splitlines()]


@pytest.mark.parametrize("workers", [1, 3])
def test_every_kept_frame_is_processed_once_with_our_peaks(
    endpoint: CrystfelEndpoint, tmp_path: Path, workers: int
) -> None:
    """Each image_id once, whoever of the workers got it; vetoed ones not; peaks, photon energy
    and distance as they are; 12398.42 eV is 1 angstrom."""
    program = Indexamajig(
        endpoint.endpoint, geometry_of(endpoint, tmp_path), tmp_path,
        "--peaks=msgpack", "-j", str(workers),
    )  # fmt: skip
    try:
        for image_id in range(FRAMES):
            frame, decision = decided(image_id)
            endpoint.offer([frame], [decision])
            endpoint.offer(*([x] for x in decided(100 + image_id, Verdict.VETO)))
        chunks = program.wait_for(FRAMES)
        assert len(chunks) == FRAMES, program.said()
    finally:
        program.close()
    assert endpoint.report() == CrystfelReport(offered=FRAMES, served=FRAMES)
    assert sorted(int(header(c, "image_id")) for c in chunks) == list(range(FRAMES))
    for chunk in chunks:
        expected = sorted(peaks(int(header(chunk, "image_id"))))
        found = sorted((p[1], p[0], p[3]) for p in table(chunk))
        assert [(y - 0.5, x - 0.5, counts) for y, x, counts in found] == expected
        assert float(header(chunk, "photon_energy_eV")) == pytest.approx(12398.42, abs=0.01)
        assert float(header(chunk, "average_camera_length")) == pytest.approx(0.125, abs=1e-6)
        assert float(header(chunk, "p_blank")) == 0.125


def test_its_own_search_sees_the_pixels_and_not_the_masked_ones(
    endpoint: CrystfelEndpoint, tmp_path: Path
) -> None:
    """A threshold finds the spots of the pixels that were sent, none in the masked corner, and
    the place of each is its distance from the beam: 1/d = 2 sin(theta) / lambda."""
    program = Indexamajig(
        endpoint.endpoint, geometry_of(endpoint, tmp_path), tmp_path,
        "--peaks=zaef", "--threshold=50", "--min-squared-gradient=100", "--min-snr=1",
        "--peak-radius=2,3,4",
    )  # fmt: skip
    try:
        frame, decision = decided(3)
        endpoint.offer([frame], [decision])
        (chunk,) = program.wait_for(1)
    finally:
        program.close()
    found = sorted((round(p[1] - 0.5), round(p[0] - 0.5)) for p in table(chunk))
    assert found == [(y, x) for y, x, _ in sorted(peaks(3))]
    assert SERIES.geometry is not None
    for x_px, y_px, inverse_d_per_nm, _ in table(chunk):
        ours = SERIES.geometry.inverse_d(np.array([x_px]), np.array([y_px]))[0]
        assert inverse_d_per_nm == pytest.approx(10 * ours, abs=0.011)


def kept_run(folder: Path) -> Path:
    """Five kept frames in data files of two, a master, and the table of a replay of it."""
    mask = np.zeros(SHAPE, np.uint32)
    mask[:4, :4] = 1
    series = replace(SERIES, pixel_mask=mask, saturation_value=60000)
    writer = KeptWriter(folder, frames_per_file=2)
    rows = DecisionTable(folder / "decisions.parquet")
    for image_id in range(5):
        frame, decision = decided(image_id)
        pixels = look(frame).pixels
        pixels[:4, :4] = 7000
        pixels[50, 50] = 65535
        payload = compressed(pixels, "bslz4")
        writer.write(structs.replace(frame, series=series, encoding="bslz4", payload=payload))
        rows.add([replace(decision, file=str(folder / "kept_7_master.h5"), frame=image_id)])
    rows.close()
    writer.close()
    return folder


def test_it_reads_kept_files_by_the_exported_list(tmp_path: Path) -> None:
    """Every kept frame once, by list and geometry file, from another folder; neither masked nor
    saturated pixels are peaks."""
    assert PROGRAM is not None
    linked = subprocess.run(["ldd", PROGRAM], capture_output=True, text=True, check=False)
    if "libhdf5" not in linked.stdout:
        pytest.skip("this indexamajig was built without HDF5")
    run = kept_run(tmp_path / "run")
    events, geometry = export(run, "crystfel", tmp_path / "lists", recorded)
    answer = subprocess.run(
        [
            *(PROGRAM, "-i", str(events), "-g", str(geometry), "-o", "out.stream"),
            *("--indexing=none", "--peaks=zaef", "--threshold=50", "--min-squared-gradient=100"),
            *("--min-snr=1", "--peak-radius=2,3,4"),
        ],
        cwd=tmp_path,
        env={**os.environ, "HDF5_PLUGIN_PATH": hdf5plugin.PLUGIN_PATH},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    text = (tmp_path / "out.stream").read_text()
    chunks = re.findall(r"----- Begin chunk -----\n(.*?)----- End chunk -----", text, re.S)
    assert re.findall(r"^Event: (.*)$", text, re.M) == ["//0", "//1", "//0", "//1", "//0"]
    for image_id, chunk in enumerate(chunks):
        found = sorted((round(p[1] - 0.5), round(p[0] - 0.5)) for p in table(chunk))
        assert found == [(y, x) for y, x, _ in sorted(peaks(image_id))]


def test_it_gets_what_a_live_run_keeps(tmp_path: Path) -> None:
    """Detector, triage and indexamajig as processes: the frames with verdict keep, each once, and
    the report says so."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    detector = subprocess.Popen(
        [
            *(sys.executable, "-m", "simulators", "detector", "--wait-for-peer", "90"),
            *("--frames", "24", "--rate", "20", "--shape", "512", "512", "--seed", "3"),
        ],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert detector.stdout is not None
    source = json.loads(detector.stdout.readline())["endpoint"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    out = tmp_path / "out"
    triage = subprocess.Popen(
        [
            *(sys.executable, "-m", "triage", "run", "--quiet", "--mode", "enforce"),
            *("--endpoint", source, "--out", str(out), "--set", "metrics.port=0"),
            *("--set", "pipeline.deadline_ms=20000", "--set", f"crystfel.endpoint={address}"),
        ],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    program = None
    try:
        until_s = time.monotonic() + 90
        while not (geometry := next(out.glob("crystfel_*.geom"), None)):
            assert time.monotonic() < until_s
            assert triage.poll() is None
            threading.Event().wait(0.05)
        program = Indexamajig(address, geometry, tmp_path, "--peaks=msgpack")
        program.wait_for(1)
        detector.wait(60)
        # It goes on answering while somebody asks, until there is nothing left.
        triage.send_signal(signal.SIGTERM)
        _, said = triage.communicate(timeout=280)
        assert triage.returncode == 0, said
        report = json.loads((out / "report.json").read_text())
        chunks = program.wait_for(report["crystfel"]["served"])
    finally:
        triage.kill()
        detector.kill()
        detector.stdout.close()
        if program is not None:
            program.close()
    rows = pq.read_table(out / "decisions.parquet").to_pylist()
    kept = [row["image_id"] for row in rows if row["verdict"] == "keep"]
    assert len(kept) > 0
    assert report["crystfel"] == {
        "offered": len(kept), "served": len(kept), "displaced": 0, "unreadable": 0, "left": 0,
    }  # fmt: skip
    assert sorted(int(header(c, "image_id")) for c in chunks) == kept
    assert max(len(table(chunk)) for chunk in chunks) >= 10

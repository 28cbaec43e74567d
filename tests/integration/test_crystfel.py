"""CrystFEL's own indexamajig fetches kept frames from the endpoint."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from simulators.detectors.frames import compressed
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

PROGRAM = os.environ.get("TRIAGE_INDEXAMAJIG") or shutil.which("indexamajig")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        PROGRAM is None, reason="needs CrystFEL's indexamajig, on PATH or named TRIAGE_INDEXAMAJIG"
    ),
]

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
        self._log.close()


def geometry_of(endpoint: CrystfelEndpoint, folder: Path) -> Path:
    endpoint.series_started(SERIES)
    path = folder / "crystfel_7.geom"
    until_s = time.monotonic() + 10
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

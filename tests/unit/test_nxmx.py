"""Kept frames: the chunks as they came, opened by plain h5py, fabio, nexusformat and our own
reader, and by the rules of the plug-in that XDS uses."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import fabio
import h5py
import hdf5plugin  # noqa: F401 - registers the filters that plain h5py needs
import numpy as np
import pytest
from msgspec import structs

from simulators.detectors.frames import SimFrame, StreamInfo, compressed
from simulators.detectors.stream2 import image_message, start_message
from triage.backends import open_backend
from triage.errors import TriageError
from triage.ingest.capture import Capture, Recorder
from triage.ingest.files import Files
from triage.ingest.stream2 import Stream2Parser
from triage.records import (
    Calibration,
    Channel,
    Decision,
    Frame,
    Geometry,
    Message,
    MessageKind,
    Override,
    Reason,
    Scores,
    Series,
    SeriesReport,
    Verdict,
)
from triage.sinks.nxmx import KeptWriter

GEOMETRY = Geometry(
    beam_center_x_px=31.5,
    beam_center_y_px=22.25,
    pixel_size_x_m=float(np.float32(75e-6)),
    pixel_size_y_m=float(np.float32(75e-6)),
    detector_distance_m=float(np.float32(0.1)),
    incident_wavelength_angstrom=1.0,
)
MASK = np.zeros((48, 64), np.uint32)
MASK[0, :5] = 1
ROOT = Path(__file__).resolve().parents[2]
SERIES = Series(
    series_id=7,
    series_unique_id="U",
    geometry=GEOMETRY,
    saturation_value=60000,
    pixel_mask=MASK,
    count_time_s=0.01,
    increments_deg={"omega": 0.0},
)


def frame(image_id: int, encoding: str = "bslz4", series: Series = SERIES, **other: Any) -> Frame:
    image = np.random.default_rng(image_id).poisson(1.0, (48, 64)).astype(np.uint16)
    fields: dict[str, Any] = {
        "series": series,
        "image_id": image_id,
        "encoding": encoding,
        "dtype": image.dtype,
        "shape": image.shape,
        "payload": compressed(image, encoding),
    }
    return Frame(**{**fields, **other})


def decided(image_id: int, **other: Any) -> Decision:
    fields: dict[str, Any] = {
        "verdict": Verdict.KEEP,
        "override": Override.NONE,
        "scores": Scores(p_blank=image_id / 100),
    }
    return Decision(
        series_id=7,
        series_unique_id="U",
        image_id=image_id,
        file="",
        frame=-1,
        ordinal=0,
        reason=Reason.SCORE,
        forwarded=True,
        model_id="m",
        policy_id="p1",
        latency_us=1.0,
        **{**fields, **other},
    )


def pixels(image_id: int) -> Any:
    return np.random.default_rng(image_id).poisson(1.0, (48, 64)).astype(np.uint16)


def test_a_sensor_that_nobody_tells_is_not_made_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is written of it, and that is said once; what is set stands in for what a detector
    does not tell, and does not overrule it."""
    told = replace(SERIES, series_id=8, sensor_material="CdTe", sensor_thickness_m=7.5e-4)
    for folder, sensor, series, found in (
        ("a", ("", 0.0), SERIES, (None, None)),
        ("b", ("Si", 3.2e-4), SERIES, (b"Si", 3.2e-4)),
        ("c", ("Si", 3.2e-4), told, (b"CdTe", 7.5e-4)),
        ("d", ("Si", 0.0), SERIES, (b"Si", None)),
    ):
        caplog.clear()
        writer = KeptWriter(tmp_path / folder, sensor=sensor)
        writer.write(frame(0, series=series))
        writer.write(frame(0, series=replace(series, series_id=9)))
        master, *_ = writer.close()
        with h5py.File(master) as file:
            detector = file["entry/instrument/detector"]
            held = [detector.get(name) for name in ("sensor_material", "sensor_thickness")]
            assert tuple(None if h is None else h[()] for h in held) == found
        said = [r for r in caplog.records if "sensor_material" in r.getMessage()]
        assert len(said) == (None in found)


@pytest.mark.parametrize("encoding", ["bslz4", "bszstd", "lz4", "raw"])
def test_chunks_are_written_through_under_their_ids(tmp_path: Path, encoding: str) -> None:
    """Stored chunks are the payloads; links and virtual dataset give the pixels."""
    writer = KeptWriter(tmp_path, frames_per_file=2)
    writer.start(SERIES)
    ids = [3, 9, 8, 20, 21]
    for image_id in ids:
        writer.write(frame(image_id, encoding), decided(image_id))
    master_path, *data_paths = writer.end(SERIES.key)
    assert len(data_paths) == 3
    with h5py.File(master_path) as master:
        assert list(master["entry/triage/image_id"]) == ids
        assert master["entry/triage/p_blank"][2] == np.float32(0.08)
        assert master["entry/data/data"].shape == (5, 48, 64)
        for row, image_id in enumerate(ids):
            assert np.array_equal(master["entry/data/data"][row], pixels(image_id))
            stored = master[f"entry/data/data_{row // 2 + 1:06d}"]
            chunk = stored.id.read_direct_chunk((row % 2, 0, 0))[1]
            assert chunk == frame(image_id, encoding).payload
    assert writer.close() == []


def test_forms_without_a_header_get_the_one_that_hdf5_wants(tmp_path: Path) -> None:
    """Stream V1's bare LZ4 block, and bitshuffle blocks without their 12 bytes."""
    block = bytes([0x1F, 0, 1, 0, 225, 0x50, 0, 0, 0, 0, 0])
    bare = frame(0, framed=False, payload=block, shape=(5, 25), encoding="lz4")
    shuffled = frame(1, payload=frame(1).payload[12:], framed=False)
    writer = KeptWriter(tmp_path)
    writer.write(bare, None)
    writer.write(shuffled, None)
    master_path, *_ = writer.end(SERIES.key)
    with h5py.File(master_path) as master:
        assert not master["entry/data/data"][0].any()
    with h5py.File(tmp_path / "kept_7_2_master.h5") as master:
        assert np.array_equal(master["entry/data/data_000001"][0], pixels(1))
        assert list(master["entry/triage/image_id"]) == [1]


def test_our_reader_gives_frames_ids_and_geometry_back(tmp_path: Path) -> None:
    """Replay of kept frames: original image_ids, the same geometry and mask bit for bit."""
    writer = KeptWriter(tmp_path)
    for image_id in (5, 11):
        writer.write(frame(image_id), None)
    writer.close()
    source = Files([tmp_path])
    read = [m.frame for m in source.receive(0) if m.frame is not None]
    assert [f.image_id for f in read] == [5, 11]
    assert all(f.payload == frame(f.image_id).payload for f in read)
    series = read[0].series
    assert series.geometry == GEOMETRY
    assert series.saturation_value == 60000
    assert series.pixel_mask is not None
    assert np.array_equal(series.pixel_mask, MASK)
    assert not series.is_rotation


def test_signed_pixels_keep_the_value_that_marks_errors(tmp_path: Path) -> None:
    """What is left out of a live frame is left out of the kept one."""
    signed = replace(SERIES, error_value=-32768, pixel_mask=None)
    image = np.full((48, 64), 7, np.int16)
    image[0, :9] = -32768
    made = frame(1, payload=compressed(image, "bslz4"), dtype=image.dtype, series=signed)
    writer = KeptWriter(tmp_path)
    writer.write(made)
    writer.close()
    (read,) = [m.frame for m in Files([tmp_path]).receive(0) if m.frame is not None]
    assert read.series.error_value == -32768
    backend = open_backend("cpu")
    one, two = backend.prepare([made]), backend.prepare([read])
    assert int(one.count.sum()) == 48 * 64 - 9
    assert one.overview.tobytes() == two.overview.tobytes()


def test_texts_that_end_in_zeros_are_kept_without_them(tmp_path: Path) -> None:
    """Senders fill up fields of fixed length; HDF5 takes no zero in a text."""
    series = replace(
        SERIES,
        series_unique_id="U\0V",
        detector_description="EIGER2\0\0",
        detector_serial_number="E-32\0",
        sensor_material="Si\0",
    )
    writer = KeptWriter(tmp_path)
    writer.write(frame(0, series=series, channel="threshold_1\0"), decided(0))
    master, _ = writer.end(series.key)
    with h5py.File(master) as file:
        detector = file["entry/instrument/detector"]
        texts = [detector[name].asstr()[()] for name in ("description", "detector_number")]
        assert texts == ["EIGER2", "E-32"]
        assert detector["sensor_material"].asstr()[()] == "Si"
        assert file["entry/triage/series_unique_id"].asstr()[()] == "U\ufffdV"


def test_words_of_a_converter_are_not_kept_as_counts(tmp_path: Path) -> None:
    """Readers of NXmx would take a pedestal for photons: the message is kept instead."""
    calibration = Calibration(
        pedestal=np.zeros((3, 48, 64), np.float32),
        photons_per_adu=np.ones((3, 48, 64), np.float32),
    )
    writer = KeptWriter(tmp_path, open_messages=Messages)
    words = frame(1, series=replace(SERIES, calibration=calibration))
    writer.write(words, None, Message(kind=MessageKind.IMAGE, parts=(b"m",)))
    assert writer.as_messages == 1
    assert [path.suffix for path in writer.close()] == [".zcap"]


def test_axes_and_units_are_those_of_nxmx(tmp_path: Path) -> None:
    """In McStas' laboratory, x to the left along the beam and y up: pixel (0, 0) is to the left of
    the beam and above it, both pixel directions lead back, and the detector is behind the sample.
    The spindle is the one that DIALS and EIGER writers assume."""
    writer = KeptWriter(tmp_path)
    writer.write(frame(0), None)
    master_path, *_ = writer.end(SERIES.key)
    px = GEOMETRY.pixel_size_x_m
    with h5py.File(master_path) as master:
        detector = master["entry/instrument/detector"]
        for name, vector in (("fast", [-1, 0, 0]), ("slow", [0, -1, 0])):
            direction = detector[f"module/{name}_pixel_direction"]
            assert (direction[()], direction.attrs["units"]) == (px, "m")
            assert list(direction.attrs["vector"]) == vector
            assert list(direction.attrs["offset"]) == [31.5 * px, 22.25 * px, 0.0]
            assert direction.attrs["offset_units"] == "m"
        det_z = master[detector["depends_on"].asstr()[()]]
        assert (det_z[0], det_z.attrs["units"]) == (GEOMETRY.detector_distance_m, "m")
        assert list(det_z.attrs["vector"]) == [0, 0, 1]
        omega = master["entry/sample/transformations/omega"]
        assert list(omega.attrs["vector"]) == [-1, 0, 0]
        assert (omega.attrs["units"], omega.attrs["transformation_type"]) == ("deg", "rotation")
        wavelength = master["entry/instrument/beam/incident_wavelength"]
        assert (wavelength[()], wavelength.attrs["units"]) == (1.0, "angstrom")


def test_a_sweep_keeps_the_angles_of_its_numbers(tmp_path: Path) -> None:
    """Images 10 and 12 of a sweep of 0.5 degree that begins at 90 stand at 95 and 96 degrees; an
    axis of which nothing is told does not hide the one that turns."""
    sweep = Series(
        series_id=1,
        increments_deg={"chi": math.nan, "omega": 0.5, "phi": 0.0},
        starts_deg={"chi": 40.0, "omega": 90.0},
        geometry=GEOMETRY,
    )
    writer = KeptWriter(tmp_path)
    for image_id in (10, 12):
        writer.write(frame(image_id, series=sweep), None)
    master_path, *_ = writer.end(sweep.key)
    with h5py.File(master_path) as master:
        assert list(master["entry/sample/transformations/omega"]) == [95.0, 96.0]


def test_fabio_opens_the_data_file(tmp_path: Path) -> None:
    """A reader that is not ours sees the same pixels."""
    writer = KeptWriter(tmp_path)
    writer.write(frame(4), None)
    _, data_path = writer.end(SERIES.key)
    with fabio.open(f"{data_path}::/entry/data/data") as opened:
        assert np.array_equal(np.squeeze(opened.data), pixels(4))


def test_a_frame_that_cannot_be_stored_leaves_the_others(tmp_path: Path) -> None:
    """An encoding without a filter is an error of that frame."""
    writer = KeptWriter(tmp_path)
    writer.write(frame(1), None)
    with pytest.raises(TriageError, match="image 2"):
        writer.write(frame(2, encoding="raw", payload=b"x"), None)
    with pytest.raises(TriageError, match="trpx"):
        writer.write(structs.replace(frame(3), encoding="trpx"), None)
    writer.write(frame(4), None)
    master_path, *_ = writer.end(SERIES.key)
    with h5py.File(master_path) as master:
        assert list(master["entry/triage/image_id"]) == [1, 4]
        assert np.array_equal(master["entry/data/data_000001"][1], pixels(4))


def test_scores_of_a_kept_frame_are_those_of_the_original(tmp_path: Path) -> None:
    """The backend prepares the same bits from the stream and from the kept file."""
    original = frame(6)
    writer = KeptWriter(tmp_path)
    writer.write(original, None)
    writer.close()
    (read,) = [m.frame for m in Files([tmp_path]).receive(0) if m.frame is not None]
    backend = open_backend("cpu")
    one, two = backend.prepare([original]), backend.prepare([read])
    assert one.overview.tobytes() == two.overview.tobytes()
    assert one.radial.tobytes() == two.radial.tobytes()


def test_decisions_and_the_ledger_lie_beside_the_frames(tmp_path: Path) -> None:
    """Per frame verdict, reason, override, policy and scores; the counts of the whole series as
    integers; who decided."""
    writer = KeptWriter(tmp_path, about={"mode": "enforce", "model_id": "m", "version": "1"})
    writer.start(SERIES)
    writer.write(frame(4), decided(4))
    veto = decided(5, verdict=Verdict.VETO, override=Override.AUDIT, scores=Scores(ood=True))
    writer.write(frame(5), veto)
    report = SeriesReport(
        series_id=7, series_unique_id="U", received=9, forwarded=2, dropped=6, undecided=1,
        missing=3, duplicates=0, control=1, malformed=0, kept=1, vetoed=7,
        by_reason={"score": 8}, by_override={"audit": 1}, ended=True,
    )  # fmt: skip
    master_path, *_ = writer.end(SERIES.key, report)
    with h5py.File(master_path) as master:
        triage = master["entry/triage"]
        said = {name: triage[name].asstr()[()] for name in ("mode", "model_id", "version")}
        assert said == {"mode": "enforce", "model_id": "m", "version": "1"}
        for name, words in (
            ("verdict", ["keep", "veto"]),
            ("reason", ["score", "score"]),
            ("override", ["", "audit"]),
            ("policy_id", ["p1", "p1"]),
        ):
            assert list(triage[name].asstr()) == words
        assert triage["ood"][:].tolist() == [False, True]
        assert np.isnan(triage["p_blank"][1])
        ledger = triage["ledger"]
        counts = {name: int(ledger[name][()]) for name in ("received", "forwarded", "dropped")}
        assert counts == {"received": 9, "forwarded": 2, "dropped": 6}
        assert (ledger["undecided"][()], ledger["missing"][()]) == (1, 3)
        assert ledger["received"].dtype.kind == "i"
        assert ledger["by_reason/score"][()] == 8
        assert ledger["by_override/audit"][()] == 1
        assert not ledger["balanced"][()]


class Messages:
    """A file of messages, in memory."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self.written: list[tuple[Any, ...]] = []
        self.closed = False

    def write(self, parts: Any, received_ns: int, lane: int = 0) -> None:
        self.written.append((*parts, received_ns, lane))

    def close(self) -> None:
        self.closed = True


def test_what_hdf5_cannot_hold_is_kept_as_it_came(tmp_path: Path) -> None:
    """An unknown encoding, pieces, no pixels at all: the messages, behind the series' start; the
    frame that can be stored is."""
    opened: list[Messages] = []

    def open_messages(path: Path) -> Messages:
        opened.append(Messages(path))
        return opened[-1]

    writer = KeptWriter(tmp_path, open_messages=open_messages)
    start = Message(kind=MessageKind.START, parts=(b"start",), received_ns=1, series=SERIES)
    writer.start(SERIES, start)
    writer.write(frame(1), decided(1), Message(kind=MessageKind.IMAGE, parts=(b"1",)))
    odd = structs.replace(frame(2), encoding="trpx")
    writer.write(
        odd, decided(2), Message(kind=MessageKind.IMAGE, parts=(b"a", b"b"), received_ns=2, lane=3)
    )
    broken = structs.replace(frame(3), fault=Reason.MALFORMED, payload=b"")
    pieces = Message(kind=MessageKind.IMAGE, parts=(b"c",), followed_by=((b"d",),), received_ns=4)
    writer.write(broken, decided(3), pieces)
    assert writer.as_messages == 2
    written = writer.end(SERIES.key)
    assert [path.name for path in written] == [
        "kept_7_master.h5",
        "kept_7_data_000001.h5",
        "kept_7_2_messages.zcap",
    ]
    (messages,) = opened
    assert messages.closed
    assert messages.written == [
        (b"start", 1, 0),
        (b"a", b"b", 2, 3),
        (b"c", 4, 0),
        (b"d", 4, 0),
    ]
    with h5py.File(written[0]) as master:
        assert list(master["entry/triage/image_id"]) == [1]
        assert master["entry/triage/frames_as_messages"][()] == 2


def test_frames_of_another_size_get_a_master_of_their_own(tmp_path: Path) -> None:
    """Each master holds one size, and its frames in order, however they alternate; what is a
    ninth form is no longer written to HDF5."""
    writer = KeptWriter(tmp_path)
    small = np.ones((8, 16), np.uint16)
    for image_id in range(6):
        if image_id % 2:
            other = compressed(small * image_id, "bslz4")
            writer.write(frame(image_id, payload=other, shape=small.shape), decided(image_id))
        else:
            writer.write(frame(image_id), decided(image_id))
    for rows in range(1, 7):
        made = frame(9, "raw", payload=bytes(2 * rows), shape=(rows, 1))
        writer.write(made, decided(9))
    with pytest.raises(TriageError, match="8 forms"):
        writer.write(frame(9, "raw", payload=bytes(4), shape=(1, 2)), decided(9))
    masters = [path for path in writer.close() if path.name.endswith("_master.h5")]
    assert len(masters) == 8
    for path, ids, total in ((masters[0], [0, 2, 4], None), (masters[1], [1, 3, 5], 128)):
        with h5py.File(path) as master:
            assert list(master["entry/triage/image_id"]) == ids
            data = master["entry/data/data"]
            for row, image_id in enumerate(ids):
                expected = pixels(image_id).sum() if total is None else total * image_id
                assert data[row].sum() == expected


KILLED = """
import os, signal, sys
from pathlib import Path
import test_nxmx as t
writer = t.KeptWriter(Path(sys.argv[1]), frames_per_file=40)
for image_id in range(100, 175):
    writer.write(t.frame(image_id, series=t.SWEEP), t.decided(image_id))
os.kill(os.getpid(), signal.SIGKILL)
"""
SWEEP = replace(SERIES, increments_deg={"omega": 0.5})


def test_what_a_killed_run_kept_is_made_whole_by_the_next(tmp_path: Path) -> None:
    """40 frames of the full file and the first 32 of the other: under their numbers and angles,
    with mask and geometry, for plain h5py, XDS and our reader. A second look finds nothing."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests/unit"},
        timeout=280,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("*_master.h5"))
    writer = KeptWriter(tmp_path)
    (master_path,) = writer.recover()
    assert writer.recover() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "kept_7_data_000001.h5",
        "kept_7_data_000002.h5",
        "kept_7_master.h5",
    ]
    ids = list(range(100, 172))
    with h5py.File(master_path) as master:
        assert list(master["entry/triage/image_id"]) == ids
        assert master["entry/sample/transformations/omega"][-1] == 0.5 * 171
    assert [image[1:].tolist() for image in neggia(master_path)] == [
        pixels(image_id)[1:].tolist() for image_id in ids
    ]
    source, read = Files([master_path]), []
    while not source.exhausted:
        read += [m.frame for m in source.receive(0) if m.frame is not None]
    assert [f.image_id for f in read] == ids
    assert read[0].series.geometry == GEOMETRY
    writer.write(frame(200), decided(200))
    assert next(path.name for path in writer.close()) == "kept_7_2_master.h5"


def test_a_master_that_cannot_be_made_whole_is_left(tmp_path: Path) -> None:
    """What is no HDF5 stays as it is, and the next run goes on."""
    (tmp_path / "kept_1_master.part").write_bytes(b"torn")
    writer = KeptWriter(tmp_path)
    assert writer.recover() == []
    assert (tmp_path / "kept_1_master.part").read_bytes() == b"torn"


def test_frames_are_on_disk_after_a_second(tmp_path: Path) -> None:
    """While frames come, however few: what a copy of the file shows is what a kill would leave."""
    now_ns = 0
    writer = KeptWriter(tmp_path, clock=lambda: now_ns)

    def on_disk() -> int:
        copy = tmp_path / "copy.bin"
        copy.write_bytes((tmp_path / "kept_7_data_000001.h5").read_bytes())
        with h5py.File(copy) as file:
            return len(file["entry/triage/image_id"])

    writer.write(frame(1))
    now_ns = 1_000_000_000
    writer.write(frame(2))
    assert on_disk() == 2
    writer.write(frame(3))
    assert on_disk() == 2
    now_ns = 2_000_000_000
    writer.write(frame(4))
    assert on_disk() == 4
    writer.write(frame(5))
    writer.settle()
    assert on_disk() == 5
    writer.write(frame(6))
    writer.start(replace(SERIES, series_id=8))
    assert on_disk() == 6
    writer.close()


def test_the_channels_that_are_not_scored_are_kept_too(tmp_path: Path) -> None:
    """A group for each, with links and a virtual dataset; a frame with a channel that cannot be
    stored is not stored in part."""
    small = np.arange(48 * 64, dtype=np.uint8).reshape(48, 64)
    second = Channel(
        name="threshold_2",
        encoding="bslz4",
        dtype=np.dtype("<u4"),
        shape=(48, 64),
        payload=compressed(pixels(1).astype(np.uint32), "bslz4"),
    )
    third = Channel(name="a/b", dtype=small.dtype, shape=(48, 64), encoding="raw", payload=small)
    writer = KeptWriter(tmp_path, frames_per_file=1)
    for image_id in (1, 2):
        writer.write(frame(image_id, channel="threshold_1", others=(second, third)))
    with pytest.raises(TriageError, match="image 3"):
        writer.write(frame(3, channel="threshold_1", others=(second, Channel(name="odd"))))
    master_path, *_ = writer.end(SERIES.key)
    with h5py.File(master_path) as master:
        names = list(master["entry/triage/channels"].asstr())
        assert names == ["threshold_1", "threshold_2", "a/b"]
        assert np.array_equal(master["entry/data/data"][1], pixels(2))
        assert master["entry/data_threshold_2/data"].dtype == np.uint32
        assert np.array_equal(master["entry/data_threshold_2/data"][1], pixels(1))
        assert np.array_equal(master["entry/data_threshold_2/data_000002"][0], pixels(1))
        assert np.array_equal(master["entry/data_a_b/data"][0], small)
    read = [m.frame for m in Files([tmp_path]).receive(0) if m.frame is not None]
    assert [f.payload for f in read] == [frame(1).payload, frame(2).payload]


@pytest.mark.shared
@pytest.mark.parametrize("name", ["bslz4_16bit", "lz4_16bit"])
def test_every_channel_of_the_vendors_images_is_kept(
    shared: Path, tmp_path: Path, name: str
) -> None:
    """DECTRIS' recorded messages, which have three channels: what plain h5py reads has the sums
    of the README, masked pixels left out."""
    sums = {
        "bslz4_16bit": ((909218, 908375, 305475), (909218, 908375, 305467)),
        "lz4_16bit": ((909298, 909365, 304536), (909298, 909365, 304514)),
    }[name]
    folder = shared / "samples" / "stream2_dectris" / f"r500k_bm_{name}"
    parser, writer = Stream2Parser("threshold_1"), KeptWriter(tmp_path)
    for number in (1, 2):
        message = parser.parse([(folder / f"{number:06d}.cbor").read_bytes()], 0)
        assert message.frame is not None
        writer.write(message.frame, None, message)
    master_path, *_ = writer.close()
    with h5py.File(master_path) as master:
        for group, expected in zip(
            ("data", "data_threshold_2", "data_difference"), zip(*sums, strict=True), strict=True
        ):
            images = master[f"entry/{group}/data"][()]
            top = np.iinfo(images.dtype).max
            found = [int(image[image < top - 1].sum(dtype=np.int64)) for image in images]
            assert found == list(expected)


def neggia(master_path: Path) -> list[np.ndarray[Any, Any]]:
    """Every image as dectris-neggia gives it to XDS, by its rules, and no looser.

    The master has an integer mask of the frame's size, a number of images above 0, and links
    data_000001 upwards, each of whose datasets has one frame a chunk; image N is frame
    (N - 1) % F of link (N - 1) // F + 1, F being the frames of the first. One filter at most,
    LZ4 or bitshuffle with LZ4; unsigned pixels of 1, 2 or 4 bytes, of which the largest value is
    -1; mask bit 0 is -1, bits 1 to 4 are -2. Pixel sizes are floating point.
    """
    images = []
    with h5py.File(master_path) as master:
        detector = master["entry/instrument/detector"]
        mask = detector["detectorSpecific/pixel_mask"]
        assert mask.dtype.kind in "ui"
        assert mask.ndim == 2
        assert mask.chunks is None
        total = int(detector["detectorSpecific/nimages"][()])
        assert total > 0
        assert int(detector["detectorSpecific/ntrigger"][()]) == 1
        for name in ("x_pixel_size", "y_pixel_size"):
            assert detector[name].dtype.kind == "f"
        first = master["entry/data/data_000001"]
        for number in range(total):
            name = f"entry/data/data_{number // len(first) + 1:06d}"
            link = master.get(name, getlink=True)
            assert isinstance(link, h5py.ExternalLink)
            assert "/" not in link.filename
            dataset = master[name]
            assert dataset.dtype == first.dtype
            assert dataset.dtype.kind == "u"
            assert dataset.dtype.itemsize in (1, 2, 4)
            assert dataset.shape[1:] == mask.shape
            assert dataset.chunks == (1, *mask.shape)
            plist = dataset.id.get_create_plist()
            assert plist.get_nfilters() <= 1
            if plist.get_nfilters():
                code, _, options, _ = plist.get_filter(0)
                assert code in (32004, 32008)
                assert code == 32004 or (options[2], options[4]) == (dataset.dtype.itemsize, 2)
            image = dataset[number % len(first)].astype(np.int64)
            image[image == np.iinfo(dataset.dtype).max] = -1
            image[(mask[:] & 0x1E) != 0] = -2
            image[(mask[:] & 1) != 0] = -1
            images.append(image)
    return images


@pytest.mark.parametrize("encoding", ["bslz4", "lz4", "raw"])
@pytest.mark.parametrize("series", [SERIES, replace(SERIES, pixel_mask=None)])
def test_xds_finds_every_image_by_the_rules_of_its_plug_in(
    tmp_path: Path, encoding: str, series: Series
) -> None:
    """Three files of two frames, the last with one; bslz4, LZ4 or raw."""
    writer = KeptWriter(tmp_path, frames_per_file=2)
    for image_id in range(5):
        writer.write(frame(image_id, encoding, series), decided(image_id))
    master_path, *_ = writer.end(series.key)
    images = neggia(master_path)
    assert len(images) == 5
    for image_id, image in enumerate(images):
        expected = pixels(image_id).astype(np.int64)
        if series.pixel_mask is not None:
            expected[0, :5] = -1
        assert np.array_equal(image, expected)


@pytest.mark.interop
@pytest.mark.parametrize("encoding", ["bslz4", "lz4", "raw"])
def test_the_plug_in_itself_reads_every_image(tmp_path: Path, encoding: str) -> None:
    """dectris-neggia through the calls that XDS makes."""
    library = os.environ.get("TRIAGE_NEGGIA")
    if not library:
        pytest.skip("needs dectris-neggia.so, named TRIAGE_NEGGIA")
    writer = KeptWriter(tmp_path, frames_per_file=2)
    for image_id in range(5):
        writer.write(frame(image_id, encoding), decided(image_id))
    master_path, *_ = writer.end(SERIES.key)
    plugin = ctypes.CDLL(library)
    info, error = (ctypes.c_int * 1024)(), ctypes.c_int()
    plugin.plugin_open(str(master_path).encode(), info, ctypes.byref(error))
    try:
        numbers = [ctypes.c_int() for _ in range(3)]
        sizes = [ctypes.c_float() for _ in range(2)]
        total = ctypes.c_int()
        plugin.plugin_get_header(
            *(ctypes.byref(n) for n in (*numbers, *sizes, total)), info, ctypes.byref(error)
        )
        assert error.value == 0
        assert [n.value for n in (*numbers, total)] == [64, 48, 2, 5]
        for number in range(5):
            image = np.zeros((48, 64), np.int32)
            plugin.plugin_get_data(
                ctypes.byref(ctypes.c_int(number + 1)),
                *(ctypes.byref(n) for n in numbers[:2]),
                image.ctypes.data_as(ctypes.c_void_p),
                info,
                ctypes.byref(error),
            )
            assert error.value == 0
            assert np.array_equal(image, neggia(master_path)[number])
    finally:
        plugin.plugin_close(ctypes.byref(error))


@pytest.mark.interop
def test_nexusformat_opens_the_master(tmp_path: Path) -> None:
    """The tree by its classes, the signal with every frame, the decisions beside it."""
    nexus = pytest.importorskip(
        "nexusformat.nexus", reason="needs nexusformat: pip install nexusformat"
    )
    writer = KeptWriter(tmp_path, frames_per_file=2)
    for image_id in range(3):
        writer.write(frame(image_id), decided(image_id))
    master_path, *_ = writer.end(SERIES.key)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = nexus.nxload(str(master_path))
        assert root.entry.nxclass == "NXentry"
        assert str(root.entry.definition) == "NXmx"
        assert root.entry.instrument.detector.nxclass == "NXdetector"
        # It takes each source of a virtual dataset for one frame, so it reads by the links.
        assert root.plottable_data.nxpath == "/entry/data"
        assert np.array_equal(root.entry.data["data_000002"].nxvalue[0], pixels(2))
        assert root.entry.triage.image_id.nxvalue.tolist() == [0, 1, 2]


def test_a_full_disk_is_an_error_of_the_file_and_of_nothing_else(tmp_path: Path) -> None:
    """A process whose files may not grow: each frame that does not fit is a TriageError, so is
    the end of the series, and the process ends as it should. A master names the frames that
    are there and no others."""
    code = """
import resource, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import test_nxmx as t
resource.setrlimit(resource.RLIMIT_FSIZE, (350_000, 350_000))
writer = t.KeptWriter(Path(sys.argv[1]))
failed = 0
for image_id in range(200):
    try:
        writer.write(t.frame(image_id, "raw", payload=bytes(6144)), t.decided(image_id))
    except t.TriageError:
        failed += 1
try:
    writer.close()
except t.TriageError:
    failed += 1
print("failed", failed > 0, flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "failed True" in done.stdout, done.stderr
    assert done.returncode == 0, done.stderr
    masters = list(tmp_path.glob("*_master.h5"))
    assert masters
    for path in masters:
        with h5py.File(path) as master:
            ids, data = master["entry/triage/image_id"][()], master["entry/data"]
            stored = sum(len(data[name]) for name in data if name != "data")
            assert len(ids) == len(data["data"]) == stored > 0
            assert len(master["entry/triage/verdict"]) == stored


def test_a_file_of_messages_is_replayed(tmp_path: Path) -> None:
    """An encoding that nobody here knows: the capture gives the series with its header and
    the images back, byte for byte."""
    info = StreamInfo(shape=(48, 64), series_id=7, detector_distance_m=0.1)
    sent = [start_message(info)]
    for image_id in (4, 6):
        odd = SimFrame(
            payload=b"odd" * image_id, encoding="trpx", dtype=np.dtype("<u2"), shape=(48, 64)
        )
        sent.append(image_message(info, odd, image_id))
    parser = Stream2Parser()
    writer = KeptWriter(tmp_path, open_messages=partial(Recorder, protocol="stream2"))
    for data in sent:
        message = parser.parse([data], 0)
        if message.series is not None:
            writer.start(message.series, message)
        if message.frame is not None:
            assert message.frame.fault is Reason.UNKNOWN_ENCODING
            writer.write(message.frame, None, message)
    (path,) = writer.close()
    assert [captured.parts for captured in Capture(path).messages()] == [(data,) for data in sent]
    source, read = Files([path]), []
    while not source.exhausted:
        read += [m.frame for m in source.receive(0) if m.frame is not None]
    assert [f.image_id for f in read] == [4, 6]
    assert read[0].series.started
    assert read[0].series.detector_description == "Simulated EIGER"

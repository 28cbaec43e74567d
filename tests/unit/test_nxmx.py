"""Kept frames: the chunks as they came, opened by plain h5py, fabio, and our own reader."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import fabio
import h5py
import hdf5plugin  # noqa: F401 - registers the filters that plain h5py needs
import numpy as np
import pytest

from simulators.detectors.frames import compressed
from triage.backends import open_backend
from triage.errors import TriageError
from triage.ingest.files import Files
from triage.records import Frame, Geometry, Scores, Series
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


def pixels(image_id: int) -> Any:
    return np.random.default_rng(image_id).poisson(1.0, (48, 64)).astype(np.uint16)


@pytest.mark.parametrize("encoding", ["bslz4", "bszstd", "lz4", "raw"])
def test_chunks_are_written_through_under_their_ids(tmp_path: Path, encoding: str) -> None:
    """Stored chunks are the payloads; links and virtual dataset give the pixels."""
    writer = KeptWriter(tmp_path, frames_per_file=2)
    writer.start(SERIES)
    ids = [3, 8, 9, 20, 21]
    for image_id in ids:
        writer.write(frame(image_id, encoding), Scores(p_blank=image_id / 100))
    master_path, *data_paths = writer.end(SERIES.key)
    assert len(data_paths) == 3
    with h5py.File(master_path) as master:
        assert list(master["entry/triage/image_id"]) == ids
        assert master["entry/triage/p_blank"][2] == np.float32(0.09)
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
        assert not master["entry/data/data_000001"][0].any()
        assert np.array_equal(master["entry/data/data_000002"][0], pixels(1))


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


def test_a_sweep_keeps_the_angles_of_its_numbers(tmp_path: Path) -> None:
    """Images 10 and 12 of a sweep of 0.5 degree stand at 5 and 6 degrees."""
    sweep = Series(series_id=1, increments_deg={"omega": 0.5}, geometry=GEOMETRY)
    writer = KeptWriter(tmp_path)
    for image_id in (10, 12):
        writer.write(frame(image_id, series=sweep), None)
    master_path, *_ = writer.end(sweep.key)
    with h5py.File(master_path) as master:
        assert list(master["entry/sample/transformations/omega"]) == [5.0, 6.0]


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
        writer.write(replace(frame(3), encoding="trpx"), None)
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

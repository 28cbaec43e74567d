"""Recorded runs: every layout gives each frame once, and bad files stay their own affair."""

from __future__ import annotations

import bz2
import gzip
from pathlib import Path
from typing import Any

import fabio
import h5py
import hdf5plugin
import numpy as np
import pytest
from numpy.typing import NDArray

from triage.backends import open_backend
from triage.errors import UnreadableFile
from triage.ingest.files import Files, recorded
from triage.records import Frame, MessageKind, Reason

BITSHUFFLE = hdf5plugin.Bitshuffle(cname="lz4")


def pictures(n: int, seed: int = 0) -> NDArray[np.uint16]:
    return np.random.default_rng(seed).poisson(1.0, (n, 48, 64)).astype(np.uint16)


def frames_of(*inputs: Path) -> tuple[Files, list[Frame]]:
    source = Files(list(inputs))
    frames = []
    while not source.exhausted:
        frames += [m.frame for m in source.receive(0) if m.frame is not None]
    assert source.total_frames == len(frames)
    return source, frames


def decoded(frames: list[Frame]) -> NDArray[Any]:
    backend = open_backend("cpu")
    return np.stack([backend.decode(frame) for frame in frames])


def write_data(path: Path, images: NDArray[Any], **options: Any) -> None:
    with h5py.File(path, "w") as file:
        chunks = options.pop("chunks", (1, *images.shape[1:]))
        file.create_dataset(
            "entry/data/data", data=images, chunks=chunks, **(options or BITSHUFFLE)
        )


def write_run(folder: Path, images: NDArray[Any], *, links: bool, virtual: bool) -> Path:
    """A master and two data files: ``links``, a virtual dataset, or both."""
    half = len(images) // 2
    parts = {"run_data_000001.h5": images[:half], "run_data_000002.h5": images[half:]}
    for name, part in parts.items():
        write_data(folder / name, part)
    master = folder / "run_master.h5"
    with h5py.File(master, "w") as file:
        group = file.create_group("entry/data")
        if links:
            for number, name in enumerate(parts, 1):
                group[f"data_{number:06d}"] = h5py.ExternalLink(name, "/entry/data/data")
        if virtual:
            layout = h5py.VirtualLayout(images.shape, images.dtype)
            at = 0
            for name, part in parts.items():
                layout[at : at + len(part)] = h5py.VirtualSource(
                    name, "/entry/data/data", part.shape
                )
                at += len(part)
            group.create_virtual_dataset("data", layout)
    return master


@pytest.mark.parametrize(("links", "virtual"), [(True, False), (False, True), (True, True)])
def test_a_master_gives_each_frame_once(tmp_path: Path, links: bool, virtual: bool) -> None:
    """Links, a virtual dataset, or both: the frames in order, still compressed."""
    images = pictures(6)
    master = write_run(tmp_path, images, links=links, virtual=virtual)
    _, frames = frames_of(master)
    assert np.array_equal(decoded(frames), images)
    assert [f.frame for f in frames] == list(range(6))
    assert {f.encoding for f in frames} == {"bslz4"}
    assert {f.file for f in frames} == {str(master)}


def virtual_run(folder: Path, images: NDArray[Any], parts: dict[str, Any], **options: Any) -> Path:
    """A virtual dataset of ``images``: by file, where its images lie in it; in that order."""
    layout = h5py.VirtualLayout(images.shape, images.dtype)
    for name, where in parts.items():
        write_data(folder / name, images[where], **options)
        layout[where] = h5py.VirtualSource(name, "/entry/data/data", images[where].shape)
    with h5py.File(folder / "run.h5", "w") as file:
        file.create_group("entry/data").create_virtual_dataset("data", layout)
    return folder / "run.h5"


def test_images_follow_the_virtual_dataset_and_not_its_sources(tmp_path: Path) -> None:
    """The source of the last images is named first; the frames keep their bytes."""
    images = pictures(6)
    _, frames = frames_of(
        virtual_run(tmp_path, images, {"b.h5": np.s_[4:6], "c.h5": np.s_[0:1], "a.h5": np.s_[1:4]})
    )
    assert np.array_equal(decoded(frames), images)
    assert {f.encoding for f in frames} == {"bslz4"}


@pytest.mark.parametrize(
    "turns",
    [
        {"a.h5": np.s_[0::2], "b.h5": np.s_[1::2]},
        {"b.h5": np.s_[1::3], "a.h5": np.s_[0::3], "c.h5": np.s_[2::3]},
    ],
    ids=["two", "three"],
)
def test_images_of_files_written_in_turns_come_in_order(tmp_path: Path, turns: Any) -> None:
    """As of several writers of one detector, of which each takes every second or third image."""
    images = pictures(7)
    _, frames = frames_of(virtual_run(tmp_path, images, turns))
    assert np.array_equal(decoded(frames), images)


def test_an_image_that_one_of_several_writers_lost_is_a_fault(tmp_path: Path) -> None:
    """The other images of that file, and those of the other writers, are sound."""
    images = pictures(6)
    run = virtual_run(tmp_path, images, {"a.h5": np.s_[0::2], "b.h5": np.s_[1::2]})
    with h5py.File(tmp_path / "b.h5", "w") as file:
        data = file.create_dataset(
            "entry/data/data", (3, *images.shape[1:]), images.dtype, chunks=(1, *images.shape[1:])
        )
        data[0], data[2] = images[1], images[5]
    _, frames = frames_of(run)
    assert [f.fault is None for f in frames] == [True, True, True, False, True, True]
    assert np.array_equal(decoded([f for f in frames if f.fault is None]), images[[0, 1, 2, 4, 5]])


def test_halves_of_a_detector_in_two_files_make_whole_images(tmp_path: Path) -> None:
    """Each source holds one half of every image."""
    images = pictures(3)
    middle = images.shape[1] // 2
    halves = {"a.h5": np.s_[:, :middle], "b.h5": np.s_[:, middle:]}
    _, frames = frames_of(virtual_run(tmp_path, images, halves))
    assert np.array_equal(decoded(frames), images)


def test_a_source_that_cannot_be_opened_costs_its_own_images_only(tmp_path: Path) -> None:
    """The frames of the other file go on with their bytes."""
    images = pictures(4)
    run = virtual_run(tmp_path, images, {"a.h5": np.s_[0:2], "b.h5": np.s_[2:4]})
    (tmp_path / "a.h5").write_bytes(b"no HDF5 file")
    _, frames = frames_of(run)
    assert [f.fault is None for f in frames] == [False, False, True, True]
    assert np.array_equal(decoded(frames[2:]), images[2:])
    assert {f.encoding for f in frames[2:]} == {"bslz4"}


def test_a_source_that_is_gone_costs_no_other_its_place(tmp_path: Path) -> None:
    """What other programs are told: all places in order, and shape and type of those there are."""
    images = pictures(4)
    master = virtual_run(tmp_path, images, {"a.h5": np.s_[0:3], "b.h5": np.s_[3:4]})
    (tmp_path / "a.h5").unlink()
    found = recorded(master)
    assert [(p.file.name, p.dataset, p.first, p.frames, p.in_stack) for p in found.places] == [
        ("a.h5", "/entry/data/data", 0, 3, True),
        ("b.h5", "/entry/data/data", 0, 1, True),
    ]
    assert (found.shape, found.dtype) == (images.shape[1:], images.dtype)
    (tmp_path / "b.h5").unlink()
    with pytest.raises(UnreadableFile, match=r"run\.h5: none of the files"):
        recorded(master)


def test_a_run_of_more_sources_than_are_kept_open_is_read(tmp_path: Path) -> None:
    """One file for each image, each asked for twice, in an order that opens every one anew."""
    images = np.concatenate([pictures(40)] * 2)
    layout = h5py.VirtualLayout(images.shape, images.dtype)
    for n in range(40):
        write_data(tmp_path / f"d{n}.h5", images[n : n + 1])
        for at in (n, n + 40):
            layout[at] = h5py.VirtualSource(f"d{n}.h5", "/entry/data/data", (1, *images.shape[1:]))[
                0
            ]
    with h5py.File(tmp_path / "run.h5", "w") as file:
        # Stored as another type than the sources, so that the library makes the images.
        layout.dtype = np.dtype(np.uint32)
        file.create_group("entry/data").create_virtual_dataset("data", layout)
    _, frames = frames_of(tmp_path / "run.h5")
    assert np.array_equal(decoded(frames), images)


def test_a_master_named_with_its_data_files_counts_once(tmp_path: Path) -> None:
    """In any order, and for the folder that holds them."""
    images = pictures(4)
    master = write_run(tmp_path, images, links=True, virtual=True)
    data = sorted(tmp_path.glob("run_data_*.h5"))
    for inputs in ([master, *data], [*data, master], [tmp_path]):
        _, frames = frames_of(*inputs)
        assert len(frames) == 4
        assert {f.file for f in frames} == {str(master)}


def test_a_master_of_one_data_file_wins_over_it(tmp_path: Path) -> None:
    """Also where master and data file reach exactly the same frames."""
    images = pictures(3)
    write_data(tmp_path / "one_data_000001.h5", images)
    with h5py.File(tmp_path / "one_master.h5", "w") as file:
        file.create_group("entry/data")["data_000001"] = h5py.ExternalLink(
            "one_data_000001.h5", "/entry/data/data"
        )
    _, frames = frames_of(tmp_path)
    assert len(frames) == 3
    assert {Path(f.file).name for f in frames} == {"one_master.h5"}


@pytest.mark.parametrize("place", ["data", "entry_1/data_1/data", "some/where/else", "entry/data"])
def test_bare_files_and_cxi_are_found(tmp_path: Path, place: str) -> None:
    """Known places, and the largest stack of images elsewhere."""
    images = pictures(3)
    path = tmp_path / "run.cxi"
    with h5py.File(path, "w") as file:
        file.create_dataset(place, data=images, chunks=(1, 48, 64), **BITSHUFFLE)
        file["table"] = np.arange(100)
    _, frames = frames_of(path)
    assert np.array_equal(decoded(frames), images)


@pytest.mark.parametrize(
    "options",
    [
        {"chunks": (2, 48, 64), **BITSHUFFLE},
        {"compression": "gzip"},
        {"chunks": (1, 48, 64), "shuffle": True, "compression": "lzf"},
        dict(hdf5plugin.LZ4()),
        dict(hdf5plugin.Bitshuffle(cname="zstd")),
    ],
)
def test_every_layout_gives_the_pixels(tmp_path: Path, options: dict[str, Any]) -> None:
    """Chunks that go through as they are, and those that h5py has to read."""
    images = pictures(4)
    write_data(tmp_path / "x.h5", images, **options)
    _, frames = frames_of(tmp_path / "x.h5")
    assert np.array_equal(decoded(frames), images)


@pytest.mark.parametrize("userblock_bytes", [0, 512])
def test_a_chunk_is_handed_on_as_it_is_stored(tmp_path: Path, userblock_bytes: int) -> None:
    """The payload is what HDF5 itself gives for the chunk, also behind a block of the user's."""
    path = tmp_path / "u.h5"
    with h5py.File(path, "w", userblock_size=userblock_bytes) as file:
        file.create_dataset("data", data=pictures(3), chunks=(1, 48, 64), **BITSHUFFLE)
    with h5py.File(path) as file:
        stored = [file["data"].id.read_direct_chunk((i, 0, 0))[1] for i in range(3)]
    _, frames = frames_of(path)
    assert [(frame.encoding, bytes(frame.payload)) for frame in frames] == [
        ("bslz4", chunk) for chunk in stored
    ]


def test_a_chunk_stored_without_its_filter_gives_the_pixels(tmp_path: Path) -> None:
    """A writer may leave the filter out for one chunk; that frame is read by HDF5."""
    images = pictures(2)
    path = tmp_path / "f.h5"
    write_data(path, images)
    with h5py.File(path, "r+") as file:
        file["entry/data/data"].id.write_direct_chunk((1, 0, 0), images[1].tobytes(), 1)
    _, frames = frames_of(path)
    assert [frame.encoding for frame in frames] == ["bslz4", "raw"]
    assert np.array_equal(decoded(frames), images)


def test_images_of_other_formats_are_read(tmp_path: Path) -> None:
    """CBF, TIFF and EDF, packed or not; a numbered row of them is one series."""
    image = pictures(1)[0].astype(np.int32)
    image[3, 4] = -1
    for number in (1, 2):
        fabio.cbfimage.CbfImage(data=image).write(str(tmp_path / f"scan_{number:05d}.cbf"))
    fabio.tifimage.TifImage(data=image).write(str(tmp_path / "other.tif"))
    raw = (tmp_path / "scan_00001.cbf").read_bytes()
    (tmp_path / "z_packed.cbf.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "z_packed2.cbf.bz2").write_bytes(bz2.compress(raw))
    _, frames = frames_of(tmp_path)
    assert len(frames) == 5
    assert all(np.array_equal(pixels, image) for pixels in decoded(frames))
    scan = [f for f in frames if "scan_" in f.file]
    assert [f.image_id for f in scan] == [1, 2]
    assert len({f.series.series_id for f in scan}) == 1


def test_what_is_no_image_is_listed_and_changes_nothing(tmp_path: Path) -> None:
    """Text, tables and HDF5 without images beside a run."""
    write_data(tmp_path / "a.h5", pictures(2))
    (tmp_path / "README.md").write_text("notes")
    (tmp_path / "list.csv").write_text("1,2")
    with h5py.File(tmp_path / "table.h5", "w") as file:
        file["table"] = np.arange(10)
    source, frames = frames_of(tmp_path)
    assert len(frames) == 2
    assert sorted(path.name for path, _ in source.skipped) == ["README.md", "list.csv", "table.h5"]
    assert not source.unreadable


def test_a_file_that_does_not_open_is_one_kept_row(tmp_path: Path) -> None:
    """A cut HDF5 file and a broken CBF: frame -1 or a fault, the good run unharmed."""
    write_data(tmp_path / "good.h5", pictures(2))
    whole = (tmp_path / "good.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[:100])
    (tmp_path / "broken.cbf").write_bytes(b"###CBF: VERSION 1.5\r\n no image")
    source, frames = frames_of(tmp_path)
    faulted = {Path(f.file).name: f for f in frames if f.fault is not None}
    assert set(faulted) == {"cut.h5", "broken.cbf"}
    assert faulted["cut.h5"].frame == -1
    assert all(f.fault is Reason.MALFORMED for f in faulted.values())
    assert sum(f.fault is None for f in frames) == 2
    assert [path.name for path, _ in source.unreadable] == ["cut.h5"]


def test_a_missing_input_is_told_at_once(tmp_path: Path) -> None:
    """A name that is mistyped must not look like an empty run."""
    with pytest.raises(UnreadableFile, match="no such file"):
        Files([tmp_path / "none.h5"])


def test_a_corrupt_chunk_is_the_fault_of_its_frame(tmp_path: Path) -> None:
    """The chunk travels as it is; the decoder refuses it, its neighbours are fine."""
    images = pictures(3)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        data = file.create_dataset(
            "data", images.shape, images.dtype, chunks=(1, 48, 64), **BITSHUFFLE
        )
        data[...] = images
        data.id.write_direct_chunk((1, 0, 0), b"\x00" * 40)
    _, frames = frames_of(tmp_path / "x.h5")
    errors = open_backend("cpu").prepare(frames).errors
    assert [error is None for error in errors] == [True, False, True]


def test_header_geometry_mask_and_rotation_are_read(tmp_path: Path) -> None:
    """Units are converted: millimetres, a beam centre in metres, kiloelectronvolts."""
    path = tmp_path / "x_master.h5"
    write_data(path, pictures(3))
    mask = np.zeros((48, 64), np.uint32)
    mask[1, 2] = 2
    with h5py.File(path, "a") as file:
        detector = file.create_group("entry/instrument/detector")
        for name, value, units in (
            ("x_pixel_size", 0.075, "mm"), ("y_pixel_size", 75e-6, "m"),
            ("beam_center_x", 0.0024, "m"), ("beam_center_y", 20.5, "pixel"),
            ("detector_distance", 120.0, "mm"),
        ):  # fmt: skip
            detector.create_dataset(name, data=value).attrs["units"] = units
        detector["pixel_mask"] = mask
        detector["saturation_value"] = 5000
        beam = file.create_group("entry/instrument/beam")
        beam.create_dataset("incident_energy", data=12.398419843320026).attrs["units"] = "keV"
        omega = file.create_dataset("entry/sample/transformations/omega", data=[0.0, 0.1, 0.2])
        omega.attrs["units"] = "deg"
    _, frames = frames_of(path)
    series = frames[0].series
    geometry = series.geometry
    assert geometry is not None
    assert geometry.beam_center_x_px == pytest.approx(32.0, rel=1e-6)
    assert geometry.beam_center_y_px == 20.5
    assert geometry.detector_distance_m == pytest.approx(0.12, rel=1e-6)
    assert geometry.incident_wavelength_angstrom == 1.0
    assert series.saturation_value == 5000
    assert series.pixel_mask is not None
    assert np.array_equal(series.pixel_mask, mask)
    assert series.is_rotation


@pytest.mark.parametrize("place", ["goniometer", "transformations"])
def test_angles_count_from_those_of_the_file(tmp_path: Path, place: str) -> None:
    """Of image 0: told, or what the first angle says of a frame with a number of its own, with
    the step between frames whose numbers have a gap."""
    plain, kept = tmp_path / "plain.h5", tmp_path / "kept.h5"
    for path in (plain, kept):
        write_data(path, pictures(3))
        with h5py.File(path, "r+") as file:
            file.create_group("entry/instrument/detector")
    with h5py.File(plain, "r+") as file:
        file[f"entry/sample/{place}/omega"] = [90.0, 90.5, 91.0]
        file[f"entry/sample/{place}/chi_start"] = 40.0
    _, frames = frames_of(plain)
    assert frames[0].series.starts_deg == {"omega": 90.0, "chi": 40.0}
    assert frames[0].series.increments_deg["omega"] == 0.5
    with h5py.File(kept, "r+") as file:
        file["entry/triage/image_id"] = [10, 14, 15]
        file[f"entry/sample/{place}/omega"] = [95.0, 97.0, 97.5]
    _, frames = frames_of(kept)
    assert [frame.image_id for frame in frames] == [10, 14, 15]
    assert frames[0].series.starts_deg == {"omega": 90.0}
    assert frames[0].series.increments_deg["omega"] == 0.5


def test_a_pilatus_header_tells_angle_and_sensor(tmp_path: Path) -> None:
    """The angle is of that image, number 3 of its sweep; the sensor as NXmx calls it."""
    path = tmp_path / "x_0003.cbf"
    path.write_bytes(
        b"###CBF: VERSION 1.5\r\n# Silicon sensor, thickness 0.000320 m\r\n"
        b"# Start_angle 90.3000 deg.\r\n# Angle_increment 0.1000 deg.\r\n"
    )
    _, frames = frames_of(path)
    series = frames[0].series
    assert series.starts_deg["omega"] == pytest.approx(90.0)
    assert (series.sensor_material, series.sensor_thickness_m) == ("Si", 3.2e-4)


def test_each_run_begins_and_ends_once(tmp_path: Path) -> None:
    """start, its frames, end; and the next."""
    for name in ("a.h5", "b.h5"):
        write_data(tmp_path / name, pictures(2))
    source = Files([tmp_path])
    kinds = []
    while not source.exhausted:
        kinds += [m.kind for m in source.receive(0)]
    one = [MessageKind.START, MessageKind.IMAGE, MessageKind.IMAGE, MessageKind.END]
    assert kinds == one * 2


@pytest.mark.shared
def test_every_real_frame_is_read_as_its_manifest_says(shared: Path) -> None:
    """One frame per row, of the manifest's shape and type; the two text files are skipped."""
    import csv

    with (shared / "real" / "manifest.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    source, frames = frames_of(shared / "real")
    found = sorted((Path(f.file).name, f"{f.shape[0]}x{f.shape[1]}", f.dtype.name) for f in frames)
    assert found == sorted((r["file"], r["shape"], r["dtype"]) for r in rows)
    assert not [f for f in frames if f.fault]
    assert len(source.skipped) == 2


@pytest.mark.shared
def test_dectris_files_give_the_vendors_sums(shared: Path) -> None:
    """Frame 0 of each recorded data file, all pixels: the README figures of the samples."""
    expected = {
        "eiger1_testmode10_2datafiles_4images_bslz4": 2511479273,
        "eiger1_testmode10_2datafiles_4images_lz4": 2511479273,
        "eiger2_simread7_2datafiles_4images_bslz4": 3648540,
        "eiger2_simread7_2datafiles_4images_bslz4_uint8": 3648540,
        "eiger2_simread7_2datafiles_4images_bslz4_uint32": 21891240,
    }
    for name, total in expected.items():
        path = shared / "samples" / "dectris_h5" / f"{name}_data_000001.h5"
        _, frames = frames_of(path)
        pixels = decoded(frames[:1])
        assert int(pixels.sum(dtype=np.int64)) == total

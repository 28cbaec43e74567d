"""Kept frames as NXmx: compressed chunks written through, never compressed again.

Data files hold the frames; a master written at the end of the series links to them and maps
them as one virtual dataset, with the geometry that DIALS, XDS readers and nxmx look for. Layout:
NXmx (NeXus application definition) as EIGER file writers use it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from triage.errors import TriageError
from triage.records import SCORE_NAMES, Frame, Scores, Series

__all__ = ["KeptWriter"]

_BITSHUFFLE, _LZ4 = 32008, 32004
_BLOCK_BYTES = 8192
_FLUSH_EVERY = 32
"""Frames after which a killed process loses no more of the data file than these."""


@dataclass(slots=True, eq=False)
class _DataFile:
    """One data file: frames of one shape, type and encoding."""

    path: Path
    file: Any
    dataset: Any
    signature: tuple[Any, ...]
    frames: int = 0


@dataclass(slots=True, eq=False)
class _Kept:
    """A series while it is being written."""

    series: Series
    stem: str
    files: list[_DataFile] = field(default_factory=list)
    image_ids: list[int] = field(default_factory=list)
    scores: list[Scores | None] = field(default_factory=list)


class KeptWriter:
    """Writes frames of one or more series into a folder. Used from one thread.

    Args:
        directory: made when it is not there.
        frames_per_file: frames in one data file.
    """

    def __init__(self, directory: Path, *, frames_per_file: int = 1000) -> None:
        self._directory = directory
        self._frames_per_file = frames_per_file
        self._open: dict[tuple[int, str], _Kept] = {}
        self._stems: set[str] = set()

    def start(self, series: Series) -> None:
        """Begin a series; one that is open under the same identity is finished first."""
        if series.key in self._open:
            self.end(series.key)
        stem = base = f"kept_{max(0, series.series_id)}"
        number = 1
        while stem in self._stems or (self._directory / f"{stem}_master.h5").exists():
            number += 1
            stem = f"{base}_{number}"
        self._stems.add(stem)
        self._open[series.key] = _Kept(series=series, stem=stem)

    def write(self, frame: Frame, scores: Scores | None) -> None:
        """Append one frame as it came.

        Raises:
            TriageError: the frame has no pixels that can be stored, or the disk refused it.
        """
        if frame.series.key not in self._open:
            self.start(frame.series)
        kept = self._open[frame.series.key]
        try:
            chunk, encoding = _stored_form(frame)
            data = self._data_file(kept, frame, encoding)
            data.dataset.resize(data.frames + 1, axis=0)
            data.dataset.id.write_direct_chunk((data.frames, 0, 0), chunk)
            data.frames += 1
            if data.frames % _FLUSH_EVERY == 0:
                data.file.flush()
        except (OSError, RuntimeError, ValueError) as err:
            raise TriageError(
                f"kept file of series {frame.series.series_id}, image {frame.image_id}: {err}"
            ) from err
        kept.image_ids.append(frame.image_id)
        kept.scores.append(scores)

    def end(self, key: tuple[int, str]) -> list[Path]:
        """Finish a series: the master and its data files, master first; empty when no frame
        was written."""
        kept = self._open.pop(key, None)
        if kept is None or not kept.files:
            return []
        try:
            for data in kept.files:
                data.file.close()
            master = self._directory / f"{kept.stem}_master.h5"
            part = master.with_suffix(".part")
            _write_master(part, kept)
            part.replace(master)
        except (OSError, RuntimeError, ValueError) as err:
            raise TriageError(f"kept master of series {key[0]}: {err}") from err
        return [master, *(data.path for data in kept.files)]

    def close(self) -> list[Path]:
        """Finish every series that is open; may be called twice."""
        written: list[Path] = []
        for key in list(self._open):
            written += self.end(key)
        return written

    def _data_file(self, kept: _Kept, frame: Frame, encoding: str) -> _DataFile:
        signature = (frame.shape, frame.dtype.str, encoding)
        last = kept.files[-1] if kept.files else None
        if last and last.signature == signature and last.frames < self._frames_per_file:
            return last
        import h5py

        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"{kept.stem}_data_{len(kept.files) + 1:06d}.h5"
        file = h5py.File(path, "w")
        file.attrs["NX_class"] = "NXroot"
        group = _group(file, "entry", "NXentry")
        data = _group(group, "data", "NXdata")
        dataset = data.create_dataset(
            "data",
            (0, *frame.shape),
            maxshape=(None, *frame.shape),
            chunks=(1, *frame.shape),
            dtype=frame.dtype,
            **_filter(encoding, frame.dtype.itemsize),
        )
        opened = _DataFile(path=path, file=file, dataset=dataset, signature=signature)
        kept.files.append(opened)
        return opened


def _filter(encoding: str, itemsize: int) -> dict[str, Any]:
    import hdf5plugin

    if encoding == "bslz4":
        return dict(hdf5plugin.Bitshuffle(cname="lz4"))
    if encoding == "bszstd":
        return dict(hdf5plugin.Bitshuffle(cname="zstd"))
    return dict(hdf5plugin.LZ4()) if encoding == "lz4" else {}


def _stored_form(frame: Frame) -> tuple[bytes, str]:
    """The chunk as HDF5's filters expect it, and its encoding.

    Raises:
        ValueError: pixels in no encoding that HDF5 has a filter for.
    """
    if frame.encoding not in ("bslz4", "bszstd", "lz4", "raw") or min(frame.shape) < 1:
        raise ValueError(
            f"encoding {frame.encoding!r} of shape {frame.shape}; expected bslz4, bszstd, lz4 "
            "or raw: the frame was forwarded but not written"
        )
    payload = bytes(frame.payload)
    size = frame.shape[0] * frame.shape[1] * frame.dtype.itemsize
    if frame.encoding == "raw" and len(payload) != size:
        raise ValueError(f"{len(payload)} raw bytes; expected {size} for shape {frame.shape}")
    if frame.encoding == "raw" or frame.framed:
        return payload, frame.encoding
    if frame.encoding == "lz4":
        # Stream V1 sends one bare block; the filter wants it in a frame of one block.
        head = size.to_bytes(8, "big") + size.to_bytes(4, "big") + len(payload).to_bytes(4, "big")
        return head + payload, "lz4"
    return size.to_bytes(8, "big") + _BLOCK_BYTES.to_bytes(4, "big") + payload, frame.encoding


def _group(parent: Any, name: str, nx_class: str) -> Any:
    group = parent.create_group(name)
    group.attrs["NX_class"] = nx_class
    return group


def _quantity(group: Any, name: str, value: float, units: str) -> None:
    if math.isfinite(value):
        group.create_dataset(name, data=value).attrs["units"] = units


def _write_master(path: Path, kept: _Kept) -> None:
    import h5py

    # Readers in the field are linked with HDF5 1.10, which cannot read newer selections.
    with h5py.File(path, "w", libver=("earliest", "v110")) as master:
        master.attrs.update(NX_class="NXroot", default="entry")
        entry = _group(master, "entry", "NXentry")
        entry.attrs["default"] = "data"
        entry["definition"] = "NXmx"
        _write_data(entry, kept)
        _write_sample(entry, kept)
        _write_instrument(entry, kept)
        _write_triage(entry, kept)


def _write_data(entry: Any, kept: _Kept) -> None:
    import h5py

    data = _group(entry, "data", "NXdata")
    data.attrs["signal"] = "data"
    for number, file in enumerate(kept.files, 1):
        data[f"data_{number:06d}"] = h5py.ExternalLink(file.path.name, "/entry/data/data")
    first = kept.files[0].signature
    alike = [f for f in kept.files if f.signature[:2] == first[:2]]
    if len(alike) < len(kept.files):
        # Frames of several shapes or types cannot be one dataset; the links hold them all.
        return
    shape, dtype, _ = first
    total = sum(f.frames for f in alike)
    layout = h5py.VirtualLayout((total, *shape), dtype)
    at = 0
    for file in alike:
        source = h5py.VirtualSource(file.path.name, "/entry/data/data", (file.frames, *shape))
        layout[at : at + file.frames] = source
        at += file.frames
    data.create_virtual_dataset("data", layout)


def _write_sample(entry: Any, kept: _Kept) -> None:
    sample = _group(entry, "sample", "NXsample")
    sample["name"] = "unknown"
    sample["depends_on"] = "/entry/sample/transformations/omega"
    transformations = _group(sample, "transformations", "NXtransformations")
    increments = kept.series.increments_deg
    axis = max(increments, key=lambda name: abs(increments[name]), default="omega")
    step = increments.get(axis, 0.0)
    step = step if math.isfinite(step) else 0.0
    # Angles follow the original numbering, so a gap in image_ids is a gap in angle.
    angles = transformations.create_dataset(
        "omega", data=np.asarray(kept.image_ids, np.float64) * step
    )
    angles.attrs.update(
        transformation_type="rotation", units="deg", vector=(-1.0, 0.0, 0.0), depends_on="."
    )
    source = _group(entry, "source", "NXsource")
    source["name"] = "unknown"


def _write_instrument(entry: Any, kept: _Kept) -> None:
    series = kept.series
    geometry = series.geometry
    shape = kept.files[0].signature[0]
    instrument = _group(entry, "instrument", "NXinstrument")
    instrument["name"] = "unknown"
    beam = _group(instrument, "beam", "NXbeam")
    detector = _group(instrument, "detector", "NXdetector")
    detector["description"] = series.detector_description or "unknown"
    detector["detector_number"] = series.detector_serial_number
    detector["sensor_material"] = series.sensor_material or "Si"
    thickness = series.sensor_thickness_m
    _quantity(detector, "sensor_thickness", thickness if thickness > 0 else 4.5e-4, "m")
    _quantity(detector, "count_time", series.count_time_s, "s")
    _quantity(detector, "frame_time", series.frame_time_s, "s")
    if series.saturation_value is not None:
        detector["saturation_value"] = series.saturation_value
    if series.pixel_mask is not None:
        detector["pixel_mask"] = series.pixel_mask
    detector["depends_on"] = "/entry/instrument/detector/transformations/det_z"
    transformations = _group(detector, "transformations", "NXtransformations")
    distance = geometry.detector_distance_m if geometry else 1.0
    det_z = transformations.create_dataset("det_z", data=[distance])
    det_z.attrs.update(
        transformation_type="translation", units="m", vector=(0.0, 0.0, 1.0), depends_on="."
    )
    if geometry is None:
        return
    beam.create_dataset("incident_wavelength", data=geometry.incident_wavelength_angstrom).attrs[
        "units"
    ] = "angstrom"
    _quantity(detector, "beam_center_x", geometry.beam_center_x_px, "pixel")
    _quantity(detector, "beam_center_y", geometry.beam_center_y_px, "pixel")
    _quantity(detector, "x_pixel_size", geometry.pixel_size_x_m, "m")
    _quantity(detector, "y_pixel_size", geometry.pixel_size_y_m, "m")
    _quantity(detector, "distance", geometry.detector_distance_m, "m")
    _quantity(detector, "detector_distance", geometry.detector_distance_m, "m")
    module = _group(detector, "module", "NXdetector_module")
    module["data_origin"] = np.zeros(2, np.int64)
    module["data_size"] = np.asarray(shape, np.int64)
    offset = (
        -geometry.beam_center_x_px * geometry.pixel_size_x_m,
        -geometry.beam_center_y_px * geometry.pixel_size_y_m,
        0.0,
    )
    # McStas axes, as NeXus has them: x to the left seen along the beam, y up, z with the beam.
    for name, size, vector in (
        ("fast_pixel_direction", geometry.pixel_size_x_m, (-1.0, 0.0, 0.0)),
        ("slow_pixel_direction", geometry.pixel_size_y_m, (0.0, -1.0, 0.0)),
    ):
        direction = module.create_dataset(name, data=size)
        direction.attrs.update(
            transformation_type="translation",
            units="m",
            vector=vector,
            offset=(-offset[0], -offset[1], 0.0),
            offset_units="m",
            depends_on="/entry/instrument/detector/transformations/det_z",
        )


def _write_triage(entry: Any, kept: _Kept) -> None:
    """Original numbers and scores of the kept frames, aligned with the data."""
    triage = _group(entry, "triage", "NXcollection")
    triage["image_id"] = np.asarray(kept.image_ids, np.int64)
    triage["series_id"] = kept.series.series_id
    triage["series_unique_id"] = kept.series.series_unique_id
    if any(scores is not None for scores in kept.scores):
        for name in SCORE_NAMES:
            triage[name] = np.array(
                [math.nan if s is None else getattr(s, name) for s in kept.scores], np.float32
            )

"""Kept frames as NXmx: compressed chunks written through, never compressed again.

Data files hold the frames; a master written at the end of the series links to them and maps
them as one virtual dataset, with what DIALS, XDS (by the rules of its plug-in dectris-neggia) and
nxmx look for. Layout: NXmx (NeXus application definition) as EIGER file writers use it. Beside
it, ``/entry/triage`` says what was decided of each frame, and holds the ledger of the series.

Frames of one shape, pixel type and encoding have one master; of a series that changes there are
several. What HDF5 cannot store as it came lies beside them as the messages that were received.
What a killed run left is made whole by the next one.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shutil
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from triage.errors import TriageError
from triage.records import (
    NOT_SCORED,
    SCORE_NAMES,
    Channel,
    Decision,
    Frame,
    Message,
    Reason,
    Series,
    SeriesReport,
)

__all__ = ["KeptWriter", "MessageFile", "storable"]

log = logging.getLogger(__name__)

_BLOCK_BYTES = 8192
_FLUSH_EVERY = 32
_HELD_NS = 1_000_000_000
"""Frames, and time while frames come, that a killed process loses of a data file at most; when
none come they are put on disk by :meth:`KeptWriter.settle`."""
_NUMBERS_PER_CHUNK = 1024
_UNITS = {"deg": "deg", "angstrom": "angstrom"}
_WORDS = ("verdict", "reason", "override", "policy_id")
_TRY_AGAIN_S = 10.0
"""After a full disk."""
_MOST_FORMS = 8
"""Shapes, pixel types and encodings of one series that are written at a time; the rest goes into
the file of messages: a stream that is another one each time must not open a file each time."""


class MessageFile(Protocol):
    """Where messages are written as they came; ``triage.ingest.capture.Recorder`` is one."""

    def write(self, parts: Sequence[Any], received_ns: int, lane: int = 0) -> None: ...

    def close(self) -> None: ...


class _NotStorable(ValueError):
    """HDF5 has no place for these bytes; they are what they were all the same."""


class _Disk:
    """The file below HDF5: what the disk refuses is noted, not raised.

    HDF5 that is told of a failed write in its own books does not get over it, and takes the
    process with it when it ends. So it is told that all is well; from the first failure on
    nothing more is written, and the file stays as it was flushed last.

    Attributes:
        failed: why the disk refused, None while it did not.
    """

    def __init__(self, path: Path, *, anew: bool = True) -> None:
        self.failed: OSError | None = None
        self._fd = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_TRUNC if anew else 0), 0o644)
        self._at, self._end = 0, os.fstat(self._fd).st_size

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._end)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        buffer = bytearray(size)
        self.readinto(buffer)
        return bytes(buffer)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        done = 0
        while done < view.nbytes:
            read = os.preadv(self._fd, [view[done:]], self._at + done)
            if read == 0:
                # Never written: HDF5 takes it for what it is, an empty place.
                view[done:] = bytes(view.nbytes - done)
                break
            done += read
        self._at += view.nbytes
        return view.nbytes

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        try:
            while self.failed is None and done < view.nbytes:
                done += os.pwrite(self._fd, view[done:], self._at + done)
        except OSError as err:
            self.failed = err
        self._at += view.nbytes
        self._end = max(self._end, self._at)
        return view.nbytes

    def truncate(self, size: int | None = None) -> int:
        self._end = self._at if size is None else size
        try:
            if self.failed is None:
                os.ftruncate(self._fd, self._end)
        except OSError as err:
            self.failed = err
        return self._end

    def flush(self) -> None:
        """Nothing is held back here."""

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@contextlib.contextmanager
def _master_file(path: Path, mode: str) -> Iterator[Any]:
    """A master to be written (``w``) or completed (``r+``), closed at the end.

    Raises:
        OSError: the disk refused a part of it.
    """
    import h5py

    disk = _Disk(path, anew=mode == "w")
    try:
        # Readers in the field are linked with HDF5 1.10, which cannot read newer selections.
        with h5py.File(disk, mode, libver=("earliest", "v110")) as file:
            yield file
        if disk.failed is not None:
            raise disk.failed
    finally:
        disk.close()


@dataclass(slots=True, eq=False)
class _DataFile:
    """One data file.

    Attributes:
        frames: frames in it.
        safe: those of them that are on disk, whatever happens.
        due_ns: when the others must be.
    """

    path: Path
    disk: _Disk
    file: Any
    datasets: tuple[Any, ...]
    numbers: Any
    frames: int = 0
    safe: int = 0
    due_ns: int = 0
    closed: bool = False


class _Rows:
    """What is known of frames, in columns: a long series has millions."""

    def __init__(self) -> None:
        self.image_id = array("q")
        self.decided = array("b")
        self.ood = array("b")
        self.scores = {name: array("f") for name in SCORE_NAMES}
        # References to a few strings.
        self.words: dict[str, list[str]] = {name: [] for name in _WORDS}

    def __len__(self) -> int:
        return len(self.image_id)

    def add(self, image_id: int, decision: Decision | None) -> None:
        scores = NOT_SCORED if decision is None else decision.scores
        self.image_id.append(image_id)
        self.decided.append(decision is not None)
        self.ood.append(scores.ood)
        for name, column in self.scores.items():
            column.append(getattr(scores, name))
        for name, words in self.words.items():
            words.append("" if decision is None else getattr(decision, name))

    def cut(self, length: int) -> None:
        columns: tuple[array[Any], ...] = (self.image_id, self.decided, self.ood)
        for column in (*columns, *self.scores.values()):
            del column[length:]
        for words in self.words.values():
            del words[length:]


@dataclass(frozen=True, slots=True)
class _Layer:
    """One channel as it is stored."""

    channel: str
    shape: tuple[int, int]
    dtype: str
    encoding: str

    @property
    def group(self) -> str:
        """Where a further channel lies, beside ``data`` where the scored one is."""
        return "data_" + re.sub(r"\W", "_", storable(self.channel))


@dataclass(slots=True, eq=False)
class _Kept:
    """Frames of a series that have one form, while they are being written.

    Attributes:
        layers: of a frame: the scored channel, then the others.
    """

    series: Series
    stem: str
    layers: tuple[_Layer, ...]
    files: list[_DataFile] = field(default_factory=list)
    rows: _Rows = field(default_factory=_Rows)


@dataclass(slots=True, eq=False)
class _Open:
    """A series while it is being written.

    Attributes:
        start: the message that began it.
        forms: frames of each shape, pixel type and encoding.
        given_up: what a full disk cut short.
        as_messages: frames in the file of messages.
    """

    series: Series
    start: Message | None
    forms: dict[tuple[Any, ...], _Kept] = field(default_factory=dict)
    given_up: list[_Kept] = field(default_factory=list)
    messages: MessageFile | None = None
    messages_path: Path | None = None
    as_messages: int = 0


class KeptWriter:
    """Writes frames of one or more series into a folder. Used from one thread.

    Args:
        directory: made when it is not there.
        frames_per_file: frames in one data file.
        about: what ``/entry/triage`` says of the run, such as its mode and the model.
        whole: puts a frame together that came in pieces; without it they are not storable.
        open_messages: opens the file for messages that HDF5 cannot hold; without it such frames
            are errors.
        sensor: material and thickness in metres of detectors that do not tell theirs; "" and 0
            where they are not known.
        clock: monotonic, ns.

    Attributes:
        as_messages: frames that lie in files of messages so far.
    """

    def __init__(
        self,
        directory: Path,
        *,
        frames_per_file: int = 1000,
        about: Mapping[str, str] | None = None,
        whole: Callable[[Frame], Frame] | None = None,
        open_messages: Callable[[Path], MessageFile] | None = None,
        sensor: tuple[str, float] = ("", 0.0),
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.as_messages = 0
        self._sensor = sensor
        self._sensor_missed = False
        self._directory = directory
        self._frames_per_file = frames_per_file
        self._about = dict(about or {})
        self._whole = whole
        self._open_messages = open_messages
        self._clock = clock
        self._refused_ns: int | None = None
        self._open: dict[tuple[int, str], _Open] = {}
        self._stems: set[str] = set()

    def start(self, series: Series, message: Message | None = None) -> None:
        """Begin a series; one that is open under the same identity is finished first."""
        try:
            if series.key in self._open:
                self.end(series.key)
            self.settle()
        finally:
            self._open[series.key] = _Open(series=self._with_sensor(series), start=message)

    def settle(self) -> None:
        """Put on disk what is not: no frame came for a while, and none may come for long.

        Raises:
            TriageError: the disk refused a part of it, which is lost.
        """
        failed: BaseException | None = None
        for opened in self._open.values():
            for kept in list(opened.forms.values()):
                if not kept.files or kept.files[-1].safe == kept.files[-1].frames:
                    continue
                try:
                    _flush(kept)
                    if (refused := kept.files[-1].disk.failed) is not None:
                        raise refused
                except (OSError, RuntimeError, ValueError) as err:
                    self._give_up(opened, kept)
                    failed = err
        if failed is not None:
            raise TriageError(f"kept files: {failed}") from failed

    def _with_sensor(self, series: Series) -> Series:
        """The series with the sensor that is set, where its detector tells none."""
        material, thickness_m = self._sensor
        if not series.sensor_material:
            series = replace(series, sensor_material=material)
        if not series.sensor_thickness_m > 0:
            series = replace(series, sensor_thickness_m=thickness_m)
        known = series.sensor_material and series.sensor_thickness_m > 0
        if not known and not self._sensor_missed:
            self._sensor_missed = True
            log.warning(
                "kept file of series %d: neither detector nor settings tell material and thickness "
                "of its sensor, so it does not hold both, and DIALS asks for them: set [geometry] "
                "sensor_material and sensor_thickness_m",
                series.series_id,
            )
        return series

    def write(
        self, frame: Frame, decision: Decision | None = None, message: Message | None = None
    ) -> None:
        """Append one frame as it came.

        Args:
            decision: what was decided of it, where anything was.
            message: what it came in; written where HDF5 cannot hold the frame.

        Raises:
            TriageError: the frame could not be stored in either way, or the disk refused it.
        """
        if frame.series.key not in self._open:
            self.start(frame.series)
        opened = self._open[frame.series.key]
        try:
            self._refuse_while_full()
            try:
                frame = self._in_one_piece(frame)
                chunks, layers = _stored_form(frame)
                kept = self._form(opened, layers)
            except _NotStorable:
                if message is None or not message.parts or self._open_messages is None:
                    raise
                self._write_message(opened, message, self._open_messages)
            else:
                self._append(opened, kept, chunks, frame.image_id, decision)
        except (OSError, RuntimeError, ValueError) as err:
            raise TriageError(
                f"kept file of series {frame.series.series_id}, image {frame.image_id}: {err}"
            ) from err

    def _in_one_piece(self, frame: Frame) -> Frame:
        if self._whole is None or not frame.pieces or frame.fault is not None:
            return frame
        try:
            return self._whole(frame)
        except TriageError as err:
            raise _NotStorable(str(err)) from err

    def end(self, key: tuple[int, str], report: SeriesReport | None = None) -> list[Path]:
        """Finish a series: each master with its data files behind it, then the file of messages;
        empty when no frame was written.

        Args:
            report: the ledger of the series, for ``/entry/triage/ledger``.

        Raises:
            TriageError: the disk refused a part of it; the rest is finished all the same.
        """
        opened = self._open.pop(key, None)
        if opened is None:
            return []
        written: list[Path] = []
        failed: BaseException | None = None
        for kept in (*opened.given_up, *opened.forms.values()):
            try:
                self._close_last(kept)
            except (OSError, RuntimeError, ValueError) as err:
                failed = err
            try:
                written += self._finish(kept, report, opened.as_messages)
            except (OSError, RuntimeError, ValueError) as err:
                failed = err
        if opened.messages is not None and opened.messages_path is not None:
            opened.messages.close()
            written.append(opened.messages_path)
        if failed is not None:
            raise TriageError(f"kept file of series {key[0]}: {failed}") from failed
        return written

    def close(self, reports: Mapping[tuple[int, str], SeriesReport] | None = None) -> list[Path]:
        """Finish every series that is open; may be called twice."""
        written: list[Path] = []
        failed: TriageError | None = None
        for key in list(self._open):
            try:
                written += self.end(key, (reports or {}).get(key))
            except TriageError as err:
                failed = err
        if failed is not None:
            raise failed
        return written

    def _refuse_while_full(self) -> None:
        """A disk that was full is left alone for a while: each try costs time."""
        if self._refused_ns is None:
            return
        since_s = (self._clock() - self._refused_ns) * 1e-9
        if since_s < _TRY_AGAIN_S:
            raise OSError(f"the disk refused a write {since_s:.0f} s ago")
        self._refused_ns = None

    def _append(
        self,
        opened: _Open,
        kept: _Kept,
        chunks: Sequence[bytes],
        image_id: int,
        decision: Decision | None,
    ) -> None:
        """Store a frame behind the others, a chunk for each channel.

        Raises:
            OSError: the disk refused it. What is not safe of the file is lost with it; the next
                frame begins a new one, under a master of its own.
        """
        data = self._data_file(kept)
        try:
            for dataset, chunk in zip(data.datasets, chunks, strict=True):
                dataset.resize(data.frames + 1, axis=0)
                dataset.id.write_direct_chunk((data.frames, 0, 0), chunk)
            data.frames += 1
            kept.rows.add(image_id, decision)
            if data.frames - data.safe >= _FLUSH_EVERY or self._clock() >= data.due_ns:
                _flush(kept)
                data.due_ns = self._clock() + _HELD_NS
            if data.disk.failed is not None:
                raise data.disk.failed
        except (OSError, RuntimeError, ValueError):
            self._give_up(opened, kept)
            raise

    def _give_up(self, opened: _Open, kept: _Kept) -> None:
        """The disk refused a part of a file: nothing more goes into it."""
        self._refused_ns = self._clock()
        del opened.forms[kept.layers]
        opened.given_up.append(kept)
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            self._close_last(kept)

    def _data_file(self, kept: _Kept) -> _DataFile:
        if kept.files and kept.files[-1].frames < self._frames_per_file:
            return kept.files[-1]
        import h5py

        self._close_last(kept)
        self._directory.mkdir(parents=True, exist_ok=True)
        if not kept.files:
            with _master_file(self._part(kept.stem), "w") as master:
                _begin_master(master, kept)
        path = self._directory / f"{kept.stem}_data_{len(kept.files) + 1:06d}.h5"
        disk = _Disk(path)
        file = h5py.File(disk, "w")
        file.attrs["NX_class"] = "NXroot"
        entry = _group(file, "entry", "NXentry")
        datasets = []
        for number, layer in enumerate(kept.layers):
            group = _group(entry, layer.group if number else "data", "NXdata")
            datasets.append(
                group.create_dataset(
                    "data",
                    (0, *layer.shape),
                    maxshape=(None, *layer.shape),
                    chunks=(1, *layer.shape),
                    dtype=layer.dtype,
                    **_filter(layer.encoding),
                )
            )
        # Frames that a killed process leaves without a master keep their numbers.
        numbers = _group(entry, "triage", "NXcollection").create_dataset(
            "image_id", (0,), maxshape=(None,), chunks=(_NUMBERS_PER_CHUNK,), dtype=np.int64
        )
        kept.files.append(
            _DataFile(
                path=path,
                disk=disk,
                file=file,
                datasets=tuple(datasets),
                numbers=numbers,
                due_ns=self._clock() + _HELD_NS,
            )
        )
        return kept.files[-1]

    def _close_last(self, kept: _Kept) -> None:
        """Close the data file that is written to, if any.

        Raises:
            OSError: the disk refused a part of it; what is safe remains.
        """
        if not kept.files or kept.files[-1].closed:
            return
        data = kept.files[-1]
        data.closed = True
        before = sum(file.frames for file in kept.files[:-1])
        try:
            _flush(kept)
            data.file.close()
            if data.disk.failed is not None:
                raise data.disk.failed
        except (OSError, RuntimeError, ValueError):
            data.frames = data.safe
            kept.rows.cut(before + data.safe)
            if not data.safe:
                kept.files.pop()
                data.path.unlink(missing_ok=True)
            raise
        finally:
            data.disk.close()

    def _finish(self, kept: _Kept, report: SeriesReport | None, as_messages: int) -> list[Path]:
        if not len(kept.rows):
            self._part(kept.stem).unlink(missing_ok=True)
            return []
        about = {**self._about, "frames_as_messages": as_messages}
        files = [(data.path.name, data.frames) for data in kept.files]
        with self._completing(kept.stem) as (path, master):
            _complete_master(master, kept.layers, files, kept.rows.image_id)
            _write_decisions(master["entry/triage"], kept.rows, about, report)
        return [path, *(data.path for data in kept.files)]

    def _part(self, stem: str) -> Path:
        return self._directory / f"{stem}_master.part"

    @contextlib.contextmanager
    def _completing(self, stem: str) -> Iterator[tuple[Path, Any]]:
        """Where the master will be, and the file to complete; what was begun stays as it was
        until the master is whole."""
        part, path = self._part(stem), self._directory / f"{stem}_master.h5"
        whole = part.with_suffix(".tmp")
        try:
            shutil.copyfile(part, whole)
            with _master_file(whole, "r+") as master:
                yield path, master
            whole.replace(path)
        finally:
            whole.unlink(missing_ok=True)
        part.unlink()

    def recover(self) -> list[Path]:
        """Complete the masters that a killed run left in the folder, as far as their data files
        go; the decisions on their frames are in that run's table. Call it before the first frame.
        """
        made = []
        for part in sorted(self._directory.glob("kept_*_master.part")):
            stem = part.name.removesuffix("_master.part")
            try:
                if (master := self._recovered(part, stem)) is not None:
                    log.warning("%s: a run ended without it; it is complete now", master)
                    made.append(master)
            except (OSError, RuntimeError, ValueError, KeyError) as err:
                log.warning("%s: cannot be completed: %s", part, err)
        return made

    def _recovered(self, part: Path, stem: str) -> Path | None:
        import h5py

        files: list[tuple[str, int]] = []
        image_ids = array("q")
        layers: tuple[_Layer, ...] = ()
        with h5py.File(part) as master:
            channels = list(master["entry/triage/channels"].asstr())
        for path in sorted(self._directory.glob(f"{stem}_data_*.h5")):
            with h5py.File(path) as file:
                stored = [_Layer(name, (0, 0), "", "") for name in channels]
                found = [
                    file[f"entry/{layer.group if number else 'data'}/data"]
                    for number, layer in enumerate(stored)
                ]
                numbers = file["entry/triage/image_id"][()]
                frames = min(len(numbers), *(len(dataset) for dataset in found))
                layers = layers or tuple(
                    replace(layer, shape=dataset.shape[1:], dtype=dataset.dtype.str)
                    for layer, dataset in zip(stored, found, strict=True)
                )
            if frames:
                files.append((path.name, frames))
                image_ids.extend(numbers[:frames].tolist())
        if not files:
            part.unlink()
            return None
        with self._completing(stem) as (path, master):
            _complete_master(master, layers, files, image_ids)
        return path

    def _write_message(
        self, opened: _Open, message: Message, open_messages: Callable[[Path], MessageFile]
    ) -> None:
        if opened.messages is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            path = self._directory / f"{self._free_stem(opened.series)}_messages.zcap"
            opened.messages = open_messages(path)
            opened.messages_path = path
            if opened.start is not None and opened.start.parts:
                opened.messages.write(opened.start.parts, opened.start.received_ns)
        for parts in (message.parts, *message.followed_by):
            opened.messages.write(parts, message.received_ns, message.lane)
        opened.as_messages += 1
        self.as_messages += 1

    def _free_stem(self, series: Series) -> str:
        stem = base = f"kept_{max(0, series.series_id)}"
        number = 1
        while stem in self._stems or any(self._directory.glob(f"{stem}_[dm]*")):
            number += 1
            stem = f"{base}_{number}"
        self._stems.add(stem)
        return stem

    def _form(self, opened: _Open, layers: tuple[_Layer, ...]) -> _Kept:
        kept = opened.forms.get(layers)
        if kept is None:
            if len(opened.forms) >= _MOST_FORMS:
                raise _NotStorable(f"the series has had {_MOST_FORMS} forms of image already")
            stem = self._free_stem(opened.series)
            kept = opened.forms[layers] = _Kept(series=opened.series, stem=stem, layers=layers)
        return kept


def _flush(kept: _Kept) -> None:
    """Write down what the last data file holds, its numbers first."""
    data = kept.files[-1]
    known, before = len(data.numbers), sum(file.frames for file in kept.files[:-1])
    numbers = kept.rows.image_id[before + known :]
    data.numbers.resize(known + len(numbers), axis=0)
    data.numbers[known:] = numbers
    data.file.flush()
    if data.disk.failed is None:
        data.safe = data.frames


def _filter(encoding: str) -> dict[str, Any]:
    import hdf5plugin

    if encoding == "bslz4":
        return dict(hdf5plugin.Bitshuffle(cname="lz4"))
    if encoding == "bszstd":
        return dict(hdf5plugin.Bitshuffle(cname="zstd"))
    return dict(hdf5plugin.LZ4()) if encoding == "lz4" else {}


def _stored_form(frame: Frame) -> tuple[list[bytes], tuple[_Layer, ...]]:
    """A chunk for each channel as HDF5's filters expect it, and what they are.

    Raises:
        _NotStorable: no pixels, or in no encoding that HDF5 has a filter for.
    """
    if frame.pieces:
        raise _NotStorable("the frame came in several messages; expected one that holds it")
    if frame.series.calibration is not None:
        raise _NotStorable(
            "pixels are words of a converter; expected counts, as readers of NXmx do"
        )
    if frame.fault in (Reason.MALFORMED, Reason.UNKNOWN_ENCODING):
        raise _NotStorable(f"{frame.fault_detail or frame.fault}: nothing that HDF5 could store")
    parts: list[tuple[str, Frame | Channel]] = [(frame.channel, frame)]
    parts += [(other.name, other) for other in frame.others]
    chunks = [_chunk(part) for _, part in parts]
    layers = [_Layer(name, part.shape, part.dtype.str, part.encoding) for name, part in parts]
    if len({layer.group for layer in layers}) < len(layers):
        raise _NotStorable(
            f"channels {', '.join(layer.channel for layer in layers)}: alike in HDF5"
        )
    return chunks, tuple(layers)


def _chunk(part: Frame | Channel) -> bytes:
    if part.encoding not in ("bslz4", "bszstd", "lz4", "raw") or min(part.shape) < 1:
        raise _NotStorable(
            f"encoding {part.encoding!r} of shape {part.shape}; expected bslz4, bszstd, lz4 "
            "or raw: the frame was forwarded but not written"
        )
    payload = bytes(part.payload)
    size = part.shape[0] * part.shape[1] * part.dtype.itemsize
    if part.encoding == "raw" and len(payload) != size:
        raise _NotStorable(f"{len(payload)} raw bytes; expected {size} for shape {part.shape}")
    if part.framed and part.encoding != "raw" and int.from_bytes(payload[:8], "big") != size:
        raise _NotStorable(f"the payload names another size than {size} for shape {part.shape}")
    if part.encoding == "raw" or part.framed:
        return payload
    if part.encoding == "lz4":
        # Stream V1 sends one bare block; the filter wants it in a frame of one block.
        head = size.to_bytes(8, "big") + size.to_bytes(4, "big") + len(payload).to_bytes(4, "big")
        return head + payload
    return size.to_bytes(8, "big") + _BLOCK_BYTES.to_bytes(4, "big") + payload


def _group(parent: Any, name: str, nx_class: str) -> Any:
    group = parent.create_group(name)
    group.attrs["NX_class"] = nx_class
    return group


def storable(text: str) -> str:
    """A text as HDF5 can hold it: without the zeros that a field of fixed length is filled up
    with, and with a mark for one that stands elsewhere."""
    return text.rstrip("\0").replace("\0", "\ufffd")


def _quantity(group: Any, name: str, value: float, units: str) -> None:
    if math.isfinite(value):
        group.create_dataset(name, data=value).attrs["units"] = units


def _begin_master(master: Any, kept: _Kept) -> None:
    """What is known of a series before its frames."""
    import h5py

    master.attrs.update(NX_class="NXroot", default="entry")
    entry = _group(master, "entry", "NXentry")
    entry.attrs["default"] = "data"
    entry["definition"] = "NXmx"
    _group(entry, "source", "NXsource")["name"] = "unknown"
    sample = _group(entry, "sample", "NXsample")
    sample["name"] = "unknown"
    sample["depends_on"] = "/entry/sample/transformations/omega"
    told = kept.series.increments_deg.items()
    increments = {name: step for name, step in told if math.isfinite(step)}
    axis = max(increments, key=lambda name: abs(increments[name]), default="omega")
    step, first = increments.get(axis, 0.0), kept.series.starts_deg.get(axis, 0.0)
    transformations = _group(sample, "transformations", "NXtransformations")
    transformations.attrs["omega_increment_deg"] = step
    transformations.attrs["omega_start_deg"] = first if math.isfinite(first) else 0.0
    _write_instrument(entry, kept)
    triage = _group(entry, "triage", "NXcollection")
    triage["series_id"] = kept.series.series_id
    triage["series_unique_id"] = storable(kept.series.series_unique_id)
    channels = [storable(layer.channel) for layer in kept.layers]
    triage.create_dataset("channels", data=channels, dtype=h5py.string_dtype())


def _complete_master(
    master: Any,
    layers: Sequence[_Layer],
    files: Sequence[tuple[str, int]],
    image_ids: Sequence[int],
) -> None:
    """Links to the frames, and what follows from their numbers.

    Args:
        files: name and number of frames of each data file.
    """
    import h5py

    entry = master["entry"]
    for number, layer in enumerate(layers):
        name = layer.group if number else "data"
        data = _group(entry, name, "NXdata")
        data.attrs["signal"] = "data"
        layout = h5py.VirtualLayout((len(image_ids), *layer.shape), layer.dtype)
        inside, at = f"/entry/{name}/data", 0
        for count, (file, frames) in enumerate(files, 1):
            data[f"data_{count:06d}"] = h5py.ExternalLink(file, inside)
            layout[at : at + frames] = h5py.VirtualSource(file, inside, (frames, *layer.shape))
            at += frames
        data.create_virtual_dataset("data", layout)
    entry["instrument/detector/detectorSpecific/nimages"] = len(image_ids)
    entry["triage/image_id"] = np.asarray(image_ids, np.int64)
    transformations = entry["sample/transformations"]
    step = transformations.attrs["omega_increment_deg"]
    first = transformations.attrs.get("omega_start_deg", 0.0)
    # Angles follow the original numbering, so a gap in image_ids is a gap in angle.
    transformations["omega"] = first + np.asarray(image_ids, np.float64) * step
    transformations["omega"].attrs.update(
        transformation_type="rotation", units="deg", vector=(-1.0, 0.0, 0.0), depends_on="."
    )


def _write_instrument(entry: Any, kept: _Kept) -> None:
    series = kept.series
    geometry = series.geometry
    shape, dtype = kept.layers[0].shape, np.dtype(kept.layers[0].dtype)
    instrument = _group(entry, "instrument", "NXinstrument")
    instrument["name"] = "unknown"
    beam = _group(instrument, "beam", "NXbeam")
    detector = _group(instrument, "detector", "NXdetector")
    detector["description"] = storable(series.detector_description) or "unknown"
    detector["detector_number"] = storable(series.detector_serial_number)
    if material := storable(series.sensor_material):
        detector["sensor_material"] = material
    if series.sensor_thickness_m > 0:
        _quantity(detector, "sensor_thickness", series.sensor_thickness_m, "m")
    _quantity(detector, "count_time", series.count_time_s, "s")
    _quantity(detector, "frame_time", series.frame_time_s, "s")
    if series.saturation_value is not None:
        detector["saturation_value"] = series.saturation_value
    if series.error_value is not None:
        detector["error_value"] = series.error_value
    mask = series.pixel_mask
    if mask is None or mask.shape != shape:
        mask = np.zeros(shape, np.uint32)
    detector["pixel_mask"] = mask
    detector["bit_depth_image"] = 8 * dtype.itemsize
    # XDS by dectris-neggia: the mask is the frame's size, and image number / images of the first
    # file is the number of the link.
    specific = _group(detector, "detectorSpecific", "NXcollection")
    specific["pixel_mask"] = detector["pixel_mask"]
    specific["ntrigger"] = 1
    specific["x_pixels_in_detector"] = shape[1]
    specific["y_pixels_in_detector"] = shape[0]
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


def _write_decisions(
    triage: Any, rows: _Rows, about: Mapping[str, Any], report: SeriesReport | None
) -> None:
    """Who decided what of each frame, aligned with the data; the ledger."""
    import h5py

    for name, value in about.items():
        triage[name] = value
    if any(rows.decided):
        for name, column in rows.scores.items():
            triage[name] = np.asarray(column, np.float32)
            if unit := _UNITS.get(name.rpartition("_")[2]):
                triage[name].attrs["units"] = unit
        text = h5py.string_dtype()
        for name, words in rows.words.items():
            triage.create_dataset(name, data=[str(word) for word in words], dtype=text)
        triage["ood"] = np.asarray(rows.ood, np.int8).astype(bool)
    if report is not None:
        _write_ledger(triage, report)


def _write_ledger(triage: Any, report: SeriesReport) -> None:
    """Every count of the series, whatever was kept of it."""
    ledger = _group(triage, "ledger", "NXcollection")
    for name, value in asdict(report).items():
        if isinstance(value, Mapping):
            counts = _group(ledger, name, "NXcollection")
            for label, count in value.items():
                # A name in HDF5 cannot be empty.
                counts[str(label) or "none"] = count
        elif name not in ("series_id", "series_unique_id"):
            ledger[name] = value
    ledger["balanced"] = report.balanced

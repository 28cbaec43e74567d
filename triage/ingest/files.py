"""Recorded runs as a source: NXmx and EIGER masters, bare HDF5, CXI, captures, what fabio reads.

Compressed HDF5 chunks are read as they are and go the way of live payloads. A run's frames are
counted once, however many ways lead to them: external links, a virtual dataset, data files that
are named beside their master. A file that cannot be read is one frame that is kept; a file that
is no image is listed and changes nothing.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import logging
import math
import mmap
import os
import re
import tempfile
import time
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from triage.errors import FileError, NotAnImage, UnreadableFile
from triage.ingest import Reader, open_reader
from triage.ingest.capture import CAPTURE_SUFFIX, Capture
from triage.ingest.hdf5 import (
    LIBRARY_ERRORS,
    MOST_FRAMES,
    SafeImages,
    datasets,
    first_value,
    first_values,
    open_dataset,
    virtual_parts,
)
from triage.ingest.series import SeriesBook, number
from triage.records import (
    LARGEST_FRAME_BYTES,
    Frame,
    Geometry,
    Message,
    MessageKind,
    Reason,
    Series,
)

__all__ = ["Files", "Place", "Recorded", "read_frame", "recorded"]

_HDF5_SUFFIXES = (".h5", ".hdf5", ".nxs", ".cxi")
_IMAGE_SUFFIXES = (".cbf", ".tif", ".tiff", ".img", ".edf", ".mccd", ".mar3450", ".osc", ".sfrm")
_PACKED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open}
_BITSHUFFLE, _LZ4 = 32008, 32004
_BITSHUFFLE_KIND = {2: "bslz4", 3: "bszstd"}
_CBF_STARTS = b"\x0c\x1a\x04\xd5"
"""Stands before the pixels of a CBF (imgCIF dictionary, Bernstein and Hammersley, 2005)."""

_LEAST_SIDE_PX = 32
"""A dataset with a shorter side is a table or a thumbnail, not a detector image."""

_FRAMES_PER_CALL = 4
_HC_EV_ANGSTROM = 12398.419843320026
_KNOWN_PATHS = (
    "entry/data/data",
    "entry/instrument/detector/data",
    "entry_1/data_1/data",
    "entry_1/instrument_1/detector_1/data",
    "entry_0000/measurement/data",
    "data",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stack:
    """Images in one dataset of one file: ``frames`` of them, from ``first`` on."""

    file: Path
    dataset: str
    first: int
    frames: int


@dataclass(slots=True, kw_only=True)
class _Run:
    """One series of the call.

    Attributes:
        name: as named by the user.
        stacks: HDF5 datasets, in order; empty for single images.
        images: image files, in order, with their numbers.
        capture: messages of a stream; how many frames they hold is not known beforehand.
        failure: why the run could not be opened.
    """

    name: Path
    series: Series
    stacks: list[_Stack] = field(default_factory=list)
    images: list[tuple[Path, int]] = field(default_factory=list)
    capture: Capture | None = None
    image_ids: NDArray[np.int64] | None = None
    failure: str = ""

    @property
    def frames(self) -> int:
        if self.failure:
            return 1
        return sum(stack.frames for stack in self.stacks) + len(self.images)


class Files:
    """Recorded input; see :class:`triage.ingest.Source`.

    Args:
        inputs: files or folders, in the order in which their frames shall come.
        reader: makes what reads a capture's messages; None for default settings.

    Attributes:
        skipped: files that are no image, with the reason.
        unreadable: files that should hold frames and do not open, with the reason.
        total_frames: rows that the table will have; None where a capture is among the inputs.

    Raises:
        UnreadableFile: a named input does not exist.
    """

    def __init__(
        self,
        inputs: Sequence[Path],
        *,
        reader: Callable[[Capture], Reader] | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._reader = reader or _plain_reader
        self.skipped: list[tuple[Path, str]] = []
        self.unreadable: list[tuple[Path, str]] = []
        self._clock = clock
        self._book = SeriesBook()
        self._runs = self._find_runs(inputs)
        self.total_frames = (
            sum(run.frames for run in self._runs)
            if all(run.capture is None for run in self._runs)
            else None
        )
        self._messages = self._all_messages()
        self._exhausted = False

    def receive(self, timeout_ms: int) -> list[Message]:
        """The next few messages; never waits."""
        messages: list[Message] = []
        for message in self._messages:
            messages.append(message)
            if len(messages) == _FRAMES_PER_CALL:
                return messages
        self._exhausted = True
        return messages

    @property
    def exhausted(self) -> bool:
        """True once the last frame was handed out."""
        return self._exhausted

    def close(self) -> None:
        """Stop reading."""
        self._messages.close()
        self._exhausted = True

    # -- what is there -------------------------------------------------------------------------

    def _find_runs(self, inputs: Sequence[Path]) -> list[_Run]:
        named: list[tuple[Path, bool]] = []
        for path in inputs:
            if path.is_dir():
                files = (p for p in path.rglob("*") if p.is_file())
                named += [(p, True) for p in sorted(files, key=_natural)]
            elif path.exists():
                named.append((path, False))
            else:
                raise UnreadableFile(
                    f"{path}: no such file or folder; expected a recorded run or a folder"
                )
        runs: list[_Run] = []
        for path, in_folder in _without_repeats(named):
            try:
                runs.append(self._open(path))
            except NotAnImage as err:
                self.skipped.append((path, str(err)))
            except (FileError, *LIBRARY_ERRORS) as err:
                if in_folder and not _may_hold_images(path):
                    self.skipped.append((path, str(err)))
                    continue
                self.unreadable.append((path, str(err)))
                runs.append(_Run(name=path, series=Series(), failure=str(err)))
        return _numbered(_joined(_masters_win(runs)))

    @staticmethod
    def _open(path: Path) -> _Run:
        kind = _kind(path)
        if kind == "capture":
            return _Run(name=path, series=Series(), capture=Capture(path))
        if kind == "hdf5":
            return _open_hdf5(path)
        if kind == "image":
            return _open_image(path)
        raise NotAnImage(f"{path.suffix or 'no suffix'}: not a format of detector images")

    # -- reading -------------------------------------------------------------------------------

    def _all_messages(self) -> Generator[Message, None, None]:
        for run in self._runs:
            if run.capture is not None:
                yield from self._captured(run.capture)
                continue
            now = self._clock()
            series = self._book.start(run.series)
            yield Message(kind=MessageKind.START, series=series, received_ns=now)
            for frame in self._frames(run):
                yield Message(
                    kind=MessageKind.IMAGE,
                    frame=frame,
                    received_ns=frame.received_ns,
                    size_bytes=frame.size_bytes,
                )
            yield Message(kind=MessageKind.END, series=series, received_ns=self._clock())

    def _captured(self, capture: Capture) -> Iterator[Message]:
        """The messages of a capture as a live source would have made them, numbered as frames."""
        reader, number = self._reader(capture), 0
        for captured in capture.messages():
            messages = list(reader.due(captured.received_ns))
            messages += reader.take(captured.parts, captured.received_ns, captured.lane)
            for message in messages:
                number += message.frame is not None
                yield self._recorded(message, capture, number - 1)
        for message in reader.flush():
            number += message.frame is not None
            yield self._recorded(message, capture, number - 1)
        if capture.cut_short:
            self.unreadable.append((capture.path, capture.cut_short))

    def _recorded(self, message: Message, capture: Capture, number: int) -> Message:
        """A message without the parts to forward, its frame with file, number and time of read."""
        now = self._clock()
        frame = message.frame
        if frame is not None:
            frame = structs.replace(
                frame,
                file=str(capture.path),
                frame=number,
                received_ns=now,
                ordinal=next(self._book.ordinals),
            )
        return structs.replace(message, frame=frame, parts=(), followed_by=(), received_ns=now)

    def _frames(self, run: _Run) -> Iterator[Frame]:
        common: dict[str, Any] = {"series": run.series, "file": str(run.name)}
        if run.failure:
            yield self._book.enter(
                image_id=-1,
                fault=Reason.MALFORMED,
                fault_detail=run.failure,
                received_ns=self._clock(),
                **common,
            )
            return
        position = 0
        for stack in run.stacks:
            for values in _read_stack(stack):
                image_id = position
                if run.image_ids is not None and position < len(run.image_ids):
                    image_id = int(run.image_ids[position])
                yield self._book.enter(
                    image_id=image_id,
                    frame=position,
                    received_ns=self._clock(),
                    **common,
                    **values,
                )
                position += 1
        for path, image_id in run.images:
            yield self._book.enter(
                image_id=image_id,
                frame=0,
                received_ns=self._clock(),
                series=run.series,
                file=str(path),
                **_read_image(path),
            )


def _plain_reader(capture: Capture) -> Reader:
    from triage.config import Settings

    return open_reader(Settings(), capture.protocol, capture.lanes)


def read_frame(path: Path, number: int = 0) -> Frame:
    """One frame of a recorded run, counted from 0.

    Raises:
        UnreadableFile: there is no such frame.
    """
    source = Files([path])
    try:
        while not source.exhausted:
            for message in source.receive(0):
                if message.frame is not None and message.frame.frame == number:
                    return message.frame
    finally:
        source.close()
    raise UnreadableFile(
        f"{path}: no frame {number}, counted from 0"
        + (f"; it holds {source.total_frames}" if source.total_frames is not None else "")
    )


def _natural(path: Path) -> list[Any]:
    """Sorts image_10 behind image_9."""
    return [
        (1, int(part)) if part.isdigit() else (0, part) for part in re.split(r"(\d+)", str(path))
    ]


def _without_repeats(named: Sequence[tuple[Path, bool]]) -> list[tuple[Path, bool]]:
    seen: set[Path] = set()
    kept = []
    for path, in_folder in named:
        real = path.resolve()
        if real not in seen:
            seen.add(real)
            kept.append((path, in_folder))
    return kept


def _kind(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    if not suffixes:
        return ""
    if suffixes[-1] in _HDF5_SUFFIXES:
        return "hdf5"
    if suffixes[-1] == CAPTURE_SUFFIX:
        return "capture"
    return "image" if suffixes[-1] in _IMAGE_SUFFIXES else ""


def _may_hold_images(path: Path) -> bool:
    return bool(_kind(path))


def _masters_win(runs: Sequence[_Run]) -> list[_Run]:
    """Without the runs whose every dataset another run reads too: data files beside a master."""
    counted: set[tuple[Path, str]] = set()
    by_reach = sorted(runs, key=lambda run: len(run.stacks), reverse=True)
    dropped = set()
    for run in by_reach:
        reads = {(stack.file.resolve(), stack.dataset) for stack in run.stacks}
        own = {read for read in reads if read[0] == run.name.resolve()}
        if reads and reads <= counted:
            dropped.add(id(run))
        elif len(reads) > len(own) or not reads & counted:
            counted |= reads
    # A master of one data file reaches no further than that file: it came first by reading
    # another file than its own.
    for run in runs:
        others = {(s.file.resolve(), s.dataset) for s in run.stacks} - {
            (run.name.resolve(), s.dataset) for s in run.stacks
        }
        if others:
            for other in runs:
                inside = {(s.file.resolve(), s.dataset) for s in other.stacks}
                if other is not run and inside and inside <= others and not _is_master(other):
                    dropped.add(id(other))
                    dropped.discard(id(run))
    return [run for run in runs if id(run) not in dropped]


def _is_master(run: _Run) -> bool:
    return any(stack.file.resolve() != run.name.resolve() for stack in run.stacks)


def _joined(runs: Sequence[_Run]) -> list[_Run]:
    """Single images of one folder that count up under one name and geometry are one series."""
    joined: list[_Run] = []
    by_name: dict[tuple[Any, ...], _Run] = {}
    for run in runs:
        if not run.images:
            joined.append(run)
            continue
        path = run.images[0][0]
        prefix, digits = _numbered_name(path)
        series = run.series
        key = (
            path.parent,
            prefix,
            series.image_size_y_px,
            series.image_size_x_px,
            series.geometry,
            tuple(sorted(series.increments_deg.items())),
        )
        if digits and key in by_name:
            by_name[key].images += run.images
            continue
        by_name[key] = run
        joined.append(run)
    return joined


def _numbered_name(path: Path) -> tuple[str, str]:
    match = re.match(r"(.*?)(\d+)(?:\.[A-Za-z]\w*)+$", path.name)
    return (match[1], match[2]) if match else (path.name, "")


def _numbered(runs: Sequence[_Run]) -> list[_Run]:
    """Runs whose files name no series get the ordinal in the call and the name of the input."""
    for ordinal, run in enumerate(runs):
        series = run.series
        run.series = replace(
            series,
            series_id=series.series_id if series.series_id >= 0 else ordinal,
            series_unique_id=series.series_unique_id or run.name.name,
        )
    return list(runs)


# -- where frames are --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where consecutive frames of a run are.

    Attributes:
        dataset: in an HDF5 file; "" in a file of one image.
        first, frames: how many from where on, along the first axis.
        in_stack: the dataset has that axis.
    """

    file: Path
    dataset: str
    first: int
    frames: int
    in_stack: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recorded:
    """What another program must know of a recorded file to find its frames.

    Attributes:
        shape, dtype: of a frame; (y, x).
        places: of its frames, in order.
        mask: file and dataset of the pixel mask, None without one.
    """

    series: Series
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    places: tuple[Place, ...]
    mask: tuple[Path, str] | None = None


def recorded(path: Path) -> Recorded:
    """Where the frames of ``path`` are, links and virtual datasets resolved.

    Raises:
        FileError: it cannot be opened, or holds no image.
    """
    if _kind(path) != "hdf5":
        pixels = _fabio_image(path)
        place = Place(file=path, dataset="", first=0, frames=1, in_stack=False)
        return Recorded(
            series=_image_header(path, 0),
            shape=(pixels.shape[0], pixels.shape[1]),
            dtype=pixels.dtype,
            places=(place,),
        )
    run = _open_hdf5(path)
    opened = [_found_in(stack) for stack in run.stacks]
    first = next((each for each in opened if each is not None), None)
    if first is None:
        raise UnreadableFile(f"{path}: none of the files that hold its images can be opened")
    places = tuple(
        Place(
            file=stack.file,
            dataset=stack.dataset if found is None else found.dataset,
            first=stack.first,
            frames=stack.frames,
            # A file that is not there is taken to be like those that are.
            in_stack=first.in_stack if found is None else found.in_stack,
        )
        for stack, found in zip(run.stacks, opened, strict=True)
    )
    mask = None
    if run.series.pixel_mask is not None:
        with _opened(path) as file:
            names = [
                f"/{detector}/{inner}pixel_mask"
                for detector in ("entry/instrument/detector", "entry_1/instrument_1/detector_1")
                for inner in ("", "detectorSpecific/")
            ]
            found = [n for n in names if getattr(_get(file, n), "shape", None) == first.shape]
            mask = (path, found[0]) if found else None
    return Recorded(
        series=run.series, shape=first.shape, dtype=first.dtype, places=places, mask=mask
    )


@dataclass(frozen=True, slots=True)
class _InFile:
    """What the file of a stack says of it; ``shape`` is an image's, (y, x)."""

    dataset: str
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    in_stack: bool


def _found_in(stack: _Stack) -> _InFile | None:
    """None where the file cannot be opened."""
    try:
        with _opened(stack.file) as file:
            dataset = open_dataset(file, stack.dataset)
            shape = int(dataset.shape[-2]), int(dataset.shape[-1])
            return _InFile(dataset.name, shape, dataset.dtype, dataset.ndim == 3)
    except (UnreadableFile, *LIBRARY_ERRORS):
        return None


# -- HDF5 --------------------------------------------------------------------------------------


def _open_hdf5(path: Path) -> _Run:
    import h5py
    import hdf5plugin  # noqa: F401 - registers the filters

    try:
        file = h5py.File(path, "r")
    except OSError as err:
        raise UnreadableFile(f"{path}: {err}; expected an HDF5 file") from err
    with file:
        stacks = _stacks(path, file)
        if not stacks:
            sibling = path.with_name(path.name.replace("_meta.", "_master."))
            hint = f"; did you mean {sibling.name}?" if sibling != path else ""
            raise NotAnImage(f"no dataset of images{hint}")
        frames = sum(stack.frames for stack in stacks)
        if frames > MOST_FRAMES:
            raise UnreadableFile(f"{path}: {frames} images; expected at most {MOST_FRAMES}")
        shape = _stack_shape(stacks)
        image_ids = None
        ids = _get(file, "entry/triage/image_id")
        if isinstance(ids, h5py.Dataset) and ids.ndim == 1 and ids.dtype.kind in "iu":
            image_ids = np.asarray(first_values(ids, frames), np.int64)
        series = _hdf5_series(file, shape, image_ids)
    return _Run(name=path, series=series, stacks=stacks, image_ids=image_ids)


def _stack_shape(stacks: Sequence[_Stack]) -> tuple[int, int]:
    """That of the first that can be opened; (0, 0) where none can."""
    found = (_found_in(stack) for stack in stacks)
    return next((each.shape for each in found if each is not None), (0, 0))


def _stacks(path: Path, file: Any) -> list[_Stack]:
    """Where the images of a file are: links first, then a virtual dataset, then known places,
    then the largest dataset that could be images."""
    import h5py

    group = file.get("entry/data")
    if isinstance(group, h5py.Group):
        links = _linked(path, group)
        if links:
            return links
    for name in _KNOWN_PATHS:
        dataset = _get(file, name)
        if isinstance(dataset, h5py.Dataset) and _is_images(dataset):
            return _in_dataset(path, dataset)
    found = [dataset for dataset in datasets(file) if _is_images(dataset)]
    if not found:
        return []
    return _in_dataset(path, max(found, key=lambda d: (d.ndim, d.size)))


def _get(file: Any, name: str) -> Any:
    try:
        return file.get(name)
    except LIBRARY_ERRORS:
        return None


def _opened(path: Path) -> Any:
    """An HDF5 file to read; a link may lead to what is none, and opening a pipe would wait."""
    import h5py

    if path.exists() and not path.is_file():
        raise UnreadableFile(f"{path} is no file; expected an HDF5 file")
    return h5py.File(path, "r")


def _is_images(dataset: Any) -> bool:
    return (
        dataset.ndim in (2, 3)
        and dataset.dtype.kind in "uif"
        and min(dataset.shape[-2:]) >= _LEAST_SIDE_PX
        and dataset.size > 0
        and dataset.name.rpartition("/")[2] not in ("pixel_mask", "flatfield", "mask")
    )


def _linked(path: Path, group: Any) -> list[_Stack]:
    """The stacks behind ``data_000001`` and so on, in that order."""
    import h5py

    stacks = []
    for name in sorted(n for n in group if re.fullmatch(r"data_\d+", n)):
        link = group.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            target = path.parent / link.filename
            inside = link.path
        else:
            target, inside = path, f"{group.name}/{name}"
        frames = 0
        try:
            with _opened(target) as file:
                dataset = open_dataset(file, inside)
                if dataset.ndim not in (2, 3):
                    continue
                frames = dataset.shape[0] if dataset.ndim == 3 else 1
        except (UnreadableFile, *LIBRARY_ERRORS):
            # EIGER masters link to more files than a short run writes; a file that is not
            # there holds no frame that anybody could name.
            continue
        stacks.append(_Stack(file=target, dataset=inside, first=0, frames=int(frames)))
    return stacks


def _in_dataset(path: Path, dataset: Any) -> list[_Stack]:
    """A dataset as stacks: itself, or what a virtual one is made of, where each image of it is
    one image of a source, and they follow each other."""
    frames = int(dataset.shape[0]) if dataset.ndim == 3 else 1
    whole = [_Stack(file=path, dataset=dataset.name, first=0, frames=frames)]
    if not dataset.is_virtual:
        return whole
    stacks = []
    end = 0
    for part in sorted(virtual_parts(dataset, path), key=lambda part: part.given.start):
        if part.given.start != end or not part.given.consecutive:
            return whole
        first = part.taken.start
        try:
            with _opened(part.file) as file:
                source = open_dataset(file, part.dataset)
                taken = part.taken.within(source.shape)
                if not (
                    taken.consecutive
                    and taken.images == part.given.images
                    and taken.pixels == part.given.pixels == math.prod(dataset.shape[-2:])
                    and (source.shape[-2:], source.dtype) == (dataset.shape[-2:], dataset.dtype)
                ):
                    return whole
        except (UnreadableFile, *LIBRARY_ERRORS):
            # Its images are faults; those of the other files keep their bytes.
            pass
        end += part.given.images
        stacks.append(
            _Stack(file=part.file, dataset=part.dataset, first=first, frames=part.given.images)
        )
    return stacks if end == frames else whole


def _read_stack(stack: _Stack) -> Iterator[dict[str, Any]]:
    """Frame fields of each image; one that cannot be read is a fault of that image alone."""
    import hdf5plugin  # noqa: F401 - registers the filters

    with contextlib.ExitStack() as opened:
        try:
            dataset = open_dataset(opened.enter_context(_opened(stack.file)), stack.dataset)
            images = opened.enter_context(SafeImages(dataset, stack.file))
            shape = (int(dataset.shape[-2]), int(dataset.shape[-1]))
            dtype = dataset.dtype
            encoding = _chunk_encoding(dataset, shape)
            chunks = opened.enter_context(_Chunks(dataset)) if encoding else None
        except (UnreadableFile, *LIBRARY_ERRORS) as err:
            for _ in range(stack.frames):
                yield _fault(f"{stack.file}: {err}")
            return
        for i in range(stack.first, stack.first + stack.frames):
            try:
                chunk = chunks.read(i) if chunks is not None else None
                if chunk is not None:
                    yield {
                        "shape": shape,
                        "dtype": dtype,
                        "encoding": encoding,
                        "payload": chunk,
                        "size_bytes": len(chunk),
                    }
                    continue
                yield _raw(images.read(i))
            except (UnreadableFile, *LIBRARY_ERRORS) as err:
                yield _fault(f"{stack.file}, frame {i}: {err}")


class _Chunks:
    """The stored chunks of a dataset whose every chunk is one frame, as they are in the file.

    h5py holds the interpreter while it reads, which stops every other thread for as long as
    the disk takes. Where a chunk lies plainly in the file, it is read without h5py.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._fd = -1
        file = dataset.file
        # Behind a user block and on other drivers offsets are not those of the file.
        if file.driver == "sec2" and file.userblock_size == 0:
            with contextlib.suppress(OSError):
                self._fd = os.open(file.filename, os.O_RDONLY)

    def __enter__(self) -> _Chunks:
        return self

    def __exit__(self, *why: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def read(self, i: int) -> bytes | None:
        """The bytes of frame ``i``; None when a filter was left out for it.

        Raises:
            OSError: they cannot be read.
        """
        at = (i, 0, 0) if self._dataset.ndim == 3 else (0, 0)
        if self._fd >= 0:
            where = self._dataset.id.get_chunk_info_by_coord(at)
            if where.byte_offset is not None:
                if where.filter_mask:
                    return None
                there = os.fstat(self._fd).st_size - where.byte_offset
                if there < where.size:
                    # Told before the reading, which would first ask for as much memory.
                    raise OSError(
                        f"{max(0, there)} bytes at {where.byte_offset}; expected {where.size}: "
                        "the file is cut short"
                    )
                return os.pread(self._fd, where.size, where.byte_offset)
        filter_mask, stored = self._dataset.id.read_direct_chunk(at)
        return None if filter_mask else bytes(stored)


def _chunk_encoding(dataset: Any, shape: tuple[int, int]) -> str:
    """How a chunk that is one frame is compressed; "" where h5py must do the reading."""
    per_frame = (1, *shape) if dataset.ndim == 3 else shape
    if dataset.chunks != per_frame:
        return ""
    filters = dataset.id.get_create_plist()
    if filters.get_nfilters() == 0:
        return "raw"
    if filters.get_nfilters() > 1:
        return ""
    code, _, options, _ = filters.get_filter(0)
    if code == _LZ4:
        return "lz4"
    if code == _BITSHUFFLE and len(options) > 4:
        return _BITSHUFFLE_KIND.get(options[4], "")
    return ""


def _fault(why: str) -> dict[str, Any]:
    return {"fault": Reason.MALFORMED, "fault_detail": why}


def _raw(image: NDArray[Any]) -> dict[str, Any]:
    """Fields of an image in memory; wide types are narrowed where no value is lost."""
    if image.ndim != 2:
        return _fault(f"an image of shape {image.shape}; expected two dimensions")
    narrowed = _narrowed(image)
    if narrowed is None:
        return {
            "fault": Reason.UNKNOWN_ENCODING,
            "fault_detail": f"pixels of {image.dtype} that fit no type we score",
        }
    pixels = np.ascontiguousarray(narrowed).astype(narrowed.dtype.newbyteorder("<"), copy=False)
    return {
        "shape": (int(pixels.shape[0]), int(pixels.shape[1])),
        "dtype": pixels.dtype,
        "encoding": "raw",
        "payload": pixels.reshape(-1).view(np.uint8).data,
        "size_bytes": int(pixels.nbytes),
    }


def _narrowed(image: NDArray[Any]) -> NDArray[Any] | None:
    if image.dtype.str[1:] in ("u1", "u2", "u4", "i2", "i4", "f4"):
        return image
    if image.dtype.kind == "f":
        # What single precision cannot hold becomes infinite, which is no count.
        with np.errstate(over="ignore"):
            return image.astype(np.float32)
    if image.dtype.kind in "iub" and image.size:
        low, high = int(image.min()), int(image.max())
        if low >= -(2**31) and high < 2**31:
            return image.astype(np.int32)
        if low >= 0 and high < 2**32:
            return image.astype(np.uint32)
    return None


def _hdf5_series(file: Any, shape: tuple[int, int], image_ids: NDArray[np.int64] | None) -> Series:
    """Header of an NXmx or EIGER file; what is not there stays unknown."""
    import h5py

    detector = next(
        (
            item
            for name in ("entry/instrument/detector", "entry_1/instrument_1/detector_1")
            if isinstance(item := _get(file, name), h5py.Group)
        ),
        None,
    )
    beam = next(
        (
            item
            for name in ("entry/instrument/beam", "entry/sample/beam", "entry_1/instrument_1")
            if isinstance(item := _get(file, name), h5py.Group)
        ),
        None,
    )
    if detector is None:
        return Series(image_size_y_px=shape[0], image_size_x_px=shape[1])
    specific = _get(detector, "detectorSpecific")
    saturation = _scalar(detector, "saturation_value")
    if math.isnan(saturation) and specific is not None:
        saturation = _scalar(specific, "countrate_correction_count_cutoff")
    pixel_x = _length_m(detector, "x_pixel_size")
    pixel_y = _length_m(detector, "y_pixel_size")
    increments_deg, starts_deg = _hdf5_angles(file, image_ids)
    return Series(
        image_size_y_px=shape[0],
        image_size_x_px=shape[1],
        saturation_value=int(saturation) if saturation > 0 else None,
        error_value=_error_value(detector),
        pixel_mask=_hdf5_mask(detector, specific, shape),
        geometry=Geometry.from_values(
            beam_center_x_px=_beam_center_px(detector, "beam_center_x", pixel_x),
            beam_center_y_px=_beam_center_px(detector, "beam_center_y", pixel_y),
            pixel_size_x_m=pixel_x,
            pixel_size_y_m=pixel_y,
            detector_distance_m=_distance_m(detector),
            incident_wavelength_angstrom=_wavelength_angstrom(beam),
        ),
        increments_deg=increments_deg,
        starts_deg=starts_deg,
        count_time_s=_scalar(detector, "count_time"),
        frame_time_s=_scalar(detector, "frame_time"),
        detector_description=_text(detector, "description"),
        detector_serial_number=_text(detector, "detector_number"),
        sensor_material=_text(detector, "sensor_material"),
        sensor_thickness_m=_length_m(detector, "sensor_thickness"),
    )


def _value(group: Any, name: str) -> Any:
    import h5py

    item = _get(group, name) if group is not None else None
    return first_value(item) if isinstance(item, h5py.Dataset) else None


def _scalar(group: Any, name: str) -> float:
    value = _value(group, name)
    return number(value.item() if isinstance(value, np.generic) else value)


def _text(group: Any, name: str) -> str:
    value = _value(group, name)
    return value.decode(errors="replace") if isinstance(value, bytes) else ""


def _unit(group: Any, name: str) -> str:
    item = _get(group, name)
    try:
        unit = item.attrs.get("units", "") if item is not None else ""
    except LIBRARY_ERRORS:
        return ""
    return unit.decode(errors="replace") if isinstance(unit, bytes) else str(unit)


_METRES = {"m": 1.0, "metre": 1.0, "meter": 1.0, "mm": 1e-3, "um": 1e-6, "micron": 1e-6, "cm": 1e-2}


def _length_m(group: Any, name: str) -> float:
    value = _scalar(group, name)
    return value if math.isnan(value) else value * _METRES.get(_unit(group, name).strip(), 1.0)


def _beam_center_px(detector: Any, name: str, pixel_m: float) -> float:
    """NXmx allows a length or pixels, told apart by the unit."""
    value = _scalar(detector, name)
    unit = _unit(detector, name).strip().lower() if not math.isnan(value) else ""
    if unit in _METRES and pixel_m > 0:
        return value * _METRES[unit] / pixel_m
    return value


def _distance_m(detector: Any) -> float:
    for name in ("detector_distance", "distance"):
        distance = _length_m(detector, name)
        if abs(distance) > 0:
            return distance
    return math.nan


def _wavelength_angstrom(beam: Any) -> float:
    for name in ("incident_wavelength", "wavelength"):
        value = _scalar(beam, name)
        if value > 0:
            unit = _unit(beam, name).strip().lower()
            return value * {"nm": 10.0, "m": 1e10}.get(unit, 1.0)
    energy = _scalar(beam, "incident_energy")
    if energy > 0:
        unit = _unit(beam, "incident_energy").strip().lower()
        return _HC_EV_ANGSTROM / (energy * (1e3 if unit == "kev" else 1.0))
    return math.nan


def _error_value(detector: Any) -> int | None:
    for name in ("error_value", "underload_value"):
        value = _scalar(detector, name)
        # NXmx's underload is the largest value that is invalid; only below zero it is an error.
        if not math.isnan(value) and (name == "error_value" or value < -1):
            return int(value)
    return None


def _hdf5_mask(detector: Any, specific: Any, shape: tuple[int, int]) -> NDArray[np.uint32] | None:
    import h5py

    for group in (detector, specific):
        mask = _get(group, "pixel_mask") if group is not None else None
        if isinstance(mask, h5py.Dataset) and mask.shape == shape and mask.dtype.kind in "ui":
            try:
                with SafeImages(mask, Path(mask.file.filename)) as images:
                    return images.read(0).astype(np.uint32)
            except (UnreadableFile, *LIBRARY_ERRORS):
                return None
    return None


def _hdf5_angles(
    file: Any, image_ids: NDArray[np.int64] | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Degrees per frame of each axis, and its angle at image 0.

    Either is told, or follows from the first angles and the numbers of their frames.
    """
    import h5py

    first_id, second_id = 0, 1
    if image_ids is not None and len(image_ids):
        first_id = int(image_ids[0])
        second_id = int(image_ids[1]) if len(image_ids) > 1 else first_id + 1
    increments, starts = {}, {}
    for place in ("entry/sample/goniometer", "entry/sample/transformations"):
        group = _get(file, place)
        if not isinstance(group, h5py.Group):
            continue
        for axis in ("omega", "phi", "chi", "kappa"):
            told = _scalar(group, f"{axis}_increment")
            start = _scalar(group, f"{axis}_start")
            item = _get(group, axis)
            angles = np.empty(0)
            if isinstance(item, h5py.Dataset) and item.ndim == 1:
                angles = first_values(item, 2)
            if angles.dtype.kind not in "iuf":
                angles = np.empty(0)
            if not math.isnan(told):
                increments[axis] = told
            elif len(angles) == 2 and second_id > first_id:
                turned = number(float(angles[1]) - float(angles[0]))
                increments[axis] = turned / (second_id - first_id)
            if len(angles):
                step = increments.get(axis, 0.0)
                starts[axis] = float(angles[0]) - (first_id * step if first_id else 0.0)
            elif not math.isnan(start):
                starts[axis] = start
    return increments, starts


# -- images by fabio ---------------------------------------------------------------------------


def _open_image(path: Path) -> _Run:
    _, digits = _numbered_name(path)
    image_id = int(digits[-15:]) if digits else 0
    return _Run(name=path, series=_image_header(path, image_id), images=[(path, image_id)])


def _quiet_fabio() -> Any:
    """fabio, told not to log what we report ourselves."""
    import fabio

    logging.getLogger("fabio").setLevel(logging.CRITICAL)
    return fabio


def _fabio_image(path: Path) -> NDArray[Any]:
    fabio = _quiet_fabio()
    try:
        with _unpacked(path) as plain:
            if plain.suffix.lower() == ".cbf":
                _check_cbf(plain)
            # Most readers make room for what a header says, before they look what there is; those
            # that tell nothing beforehand read what there is.
            with fabio.openheader(str(plain)) as header:
                shape = tuple(int(side) for side in getattr(header, "shape", ()))
            if 4 * math.prod(shape) > LARGEST_FRAME_BYTES:
                raise UnreadableFile(
                    f"{path}: an image of {shape}; expected one of at most {LARGEST_FRAME_BYTES} "
                    "bytes"
                )
            with fabio.open(str(plain)) as image:
                return np.asarray(image.data)
    except UnreadableFile:
        raise
    except Exception as err:
        # Two dozen readers, and each ends in its own way on a damaged file.
        raise UnreadableFile(f"{path}: {type(err).__name__}: {err}; expected an image") from err


def _check_cbf(path: Path) -> None:
    """See that the pixels of a CBF begin somewhere: its reader looks for that without end.

    Raises:
        UnreadableFile: they do not.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        section = content.find(b"--CIF-BINARY-FORMAT-SECTION--")
        if section < 0 or content.find(_CBF_STARTS, section) < 0:
            raise UnreadableFile(f"{path}: no binary section; expected a CBF with an image")


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """A file, unpacked where it is packed, as long as that is no larger than an image can be."""
    opener: Any = _PACKED.get(path.suffix.lower())
    if opener is None:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / path.with_suffix("").name
        left = LARGEST_FRAME_BYTES
        with opener(path, "rb") as packed, plain.open("wb") as out:
            while piece := packed.read(1 << 20):
                left -= len(piece)
                if left < 0:
                    raise UnreadableFile(
                        f"{path}: more than {LARGEST_FRAME_BYTES} bytes when unpacked; expected an "
                        "image"
                    )
                out.write(piece)
        yield plain


_SENSORS = {"silicon": "Si", "si": "Si", "cdte": "CdTe", "gaas": "GaAs"}
"""As headers of images name what NXmx calls by its formula."""


def _image_header(path: Path, image_id: int) -> Series:
    """The series of a single image, from what stands before its pixels."""
    try:
        opener: Any = _PACKED.get(path.suffix.lower(), open)
        with opener(path, "rb") as stream:
            text = stream.read(8192).decode("latin-1")
    except (OSError, EOFError, zlib.error) as err:
        raise UnreadableFile(f"{path}: {err}; expected an image") from err
    size = [
        re.search(rf"X-Binary-Size-{n}-Dimension:\s*(\d+)", text) for n in ("Second", "Fastest")
    ]
    y, x = (int(match[1]) if match else 0 for match in size)
    values = {
        name: _header_numbers(text, name)
        for name in ("Wavelength", "Detector_distance", "Beam_xy", "Pixel_size", "Count_cutoff",
                     "Angle_increment", "Start_angle", "Exposure_time")
    }  # fmt: skip
    beam = values["Beam_xy"] or [math.nan, math.nan]
    pixel = values["Pixel_size"] or [math.nan]
    cutoff = (values["Count_cutoff"] or [math.nan])[0]
    turn = (values["Angle_increment"] or [0.0])[0]
    # It is of this image, and the series counts from image 0.
    start = (values["Start_angle"] or [math.nan])[0] - image_id * turn
    material = re.search(r"#\s*(\w+) sensor, thickness", text)
    thickness_m = (_header_numbers(text, r"\w+ sensor, thickness") or [math.nan])[0]
    return Series(
        image_size_y_px=y,
        image_size_x_px=x,
        saturation_value=int(cutoff) if cutoff > 0 else None,
        geometry=Geometry.from_values(
            beam_center_x_px=beam[0],
            beam_center_y_px=beam[-1],
            pixel_size_x_m=pixel[0],
            pixel_size_y_m=pixel[-1],
            detector_distance_m=(values["Detector_distance"] or [math.nan])[0],
            incident_wavelength_angstrom=(values["Wavelength"] or [math.nan])[0],
        ),
        increments_deg={"omega": turn},
        starts_deg={} if math.isnan(start) else {"omega": start},
        sensor_material=_SENSORS.get(material[1].lower(), "") if material else "",
        sensor_thickness_m=thickness_m,
        count_time_s=(values["Exposure_time"] or [math.nan])[0],
    )


def _header_numbers(text: str, name: str) -> list[float]:
    """Numbers of a line of a PILATUS header, such as ``# Beam_xy (1231.50, 1263.50) pixels``."""
    line = re.search(rf"#\s*{name}\s+([^\r\n]*)", text)
    if line is None:
        return []
    return [float(n) for n in re.findall(r"[-+]?\d+\.?\d*(?:[eE][-+]?\d+)?", line[1])][:2]


def _read_image(path: Path) -> dict[str, Any]:
    try:
        pixels = _fabio_image(path)
    except UnreadableFile as err:
        return _fault(str(err))
    return _raw(pixels)

"""Reads HDF5 files that may say anything of themselves.

The library believes a file: a few hundred bytes can declare an image of gigabytes, a virtual
dataset that is made of itself, or a chunk whose blocks lie outside of it, and the last two end the
process. So sizes, sources and framing are looked at before anything is read through the library.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triage.errors import UnreadableFile
from triage.ingest.framing import is_framed
from triage.records import LARGEST_FRAME_BYTES

__all__ = [
    "LIBRARY_ERRORS",
    "MOST_FRAMES",
    "Along",
    "Part",
    "SafeImages",
    "datasets",
    "first_value",
    "open_dataset",
    "virtual_parts",
]

LIBRARY_ERRORS = (
    *(OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError),
    *(OverflowError, MemoryError, NotImplementedError),
)
"""What h5py raises for files that are not as they should be."""

MOST_FRAMES = 1 << 24
"""Of a run; two hours at 2 kHz. A dataset may declare any number, and hold none."""

_LARGEST_CHUNK_BYTES = 2 * LARGEST_FRAME_BYTES
_LARGEST_VALUE_BYTES = 1 << 16
_LARGEST_COLUMN_BYTES = 1 << 24
_MOST_DEEP = 32
_MOST_OBJECTS = 100_000
_MOST_CHUNKS = 1 << 14
_MOST_NESTED = 8
_MOST_OPEN = 32
"""Sources of virtual datasets at one depth; a run may have more files than a process may open."""

_BITSHUFFLE, _LZ4 = 32008, 32004
_BITSHUFFLED_WITH = {2: "bslz4", 3: "bszstd"}


def open_dataset(file: Any, name: str) -> Any:
    """The dataset called ``name``.

    Raises:
        UnreadableFile: there is none, or it is something else.
    """
    import h5py

    try:
        item = file[name]
    except LIBRARY_ERRORS as err:
        raise UnreadableFile(f"{file.filename}: {name}: {err}") from err
    if not isinstance(item, h5py.Dataset):
        raise UnreadableFile(
            f"{file.filename}: {name} is a {type(item).__name__.lower()}; expected a dataset"
        )
    return item


def datasets(file: Any) -> Iterator[Any]:
    """Every dataset that is stored in a file, each once; links to elsewhere are not followed."""
    import h5py

    seen: set[Any] = set()
    waiting = [(file["/"], 0)]
    while waiting:
        group, depth = waiting.pop(0)
        for name in group:
            if len(seen) >= _MOST_OBJECTS:
                return
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                continue
            try:
                item = group[name]
                address = h5py.h5o.get_info(item.id).addr
            except LIBRARY_ERRORS:
                continue
            if address in seen:
                continue
            seen.add(address)
            if isinstance(item, h5py.Dataset):
                yield item
            elif isinstance(item, h5py.Group) and depth < _MOST_DEEP:
                waiting.append((item, depth + 1))


def first_value(dataset: Any) -> Any:
    """The first element of a dataset, None when there is none or reading it could be costly."""
    if not dataset.size or not _is_cheap(dataset):
        return None
    try:
        return dataset[(0,) * dataset.ndim]
    except LIBRARY_ERRORS:
        return None


def first_values(dataset: Any, count: int) -> NDArray[Any]:
    """Up to so many elements of a dataset of one dimension; none when reading could be costly."""
    if not dataset.size or not _is_cheap(dataset):
        return np.empty(0)
    try:
        return np.asarray(dataset[: min(count, MOST_FRAMES)])
    except LIBRARY_ERRORS:
        return np.empty(0)


def _is_cheap(dataset: Any) -> bool:
    """Whether a dataset is a plain one of small elements in small chunks, whose filters do not
    believe lengths."""
    item, kind = dataset.dtype.itemsize, dataset.dtype.kind
    chunk = math.prod(dataset.chunks or (1,)) * item
    if kind == "V" or dataset.is_virtual or item > _LARGEST_VALUE_BYTES:
        return False
    plist = dataset.id.get_create_plist()
    filters = {plist.get_filter(n)[0] for n in range(plist.get_nfilters())}
    return chunk <= _LARGEST_COLUMN_BYTES and not filters & {_BITSHUFFLE, _LZ4}


@dataclass(frozen=True, slots=True)
class Along:
    """What a selection takes along the images: ``block`` of every ``stride``, ``count`` times.

    Attributes:
        pixels: of each image; 0 for all that it has.
        exact: False where any image from ``start`` on may be meant.
    """

    start: int
    stride: int
    count: int
    block: int
    pixels: int
    exact: bool = True

    @property
    def images(self) -> int:
        return self.count * self.block

    @property
    def consecutive(self) -> bool:
        return self.exact and (self.count == 1 or self.stride == self.block)

    def within(self, shape: tuple[int, ...]) -> Along:
        """What is taken of a dataset of this shape."""
        images = shape[0] if len(shape) == 3 else 1
        room = max(0, -(-(images - self.start) // self.stride))
        return replace(
            self, count=min(self.count, room), pixels=self.pixels or math.prod(shape[-2:])
        )

    def place(self, i: int) -> int | None:
        """Which of the images that are taken ``i`` is, from 0; None where it is none of them."""
        turn, at = divmod(i - self.start, self.stride)
        return turn * self.block + at if 0 <= turn < self.count and at < self.block else None

    def image(self, place: int) -> int:
        """The image that is taken at a place."""
        turn, at = divmod(place, self.block)
        return self.start + turn * self.stride + at


@dataclass(frozen=True, slots=True)
class Part:
    """A source of a virtual dataset.

    Attributes:
        given: the images of the virtual dataset that come from it.
        taken: the images of it that are given, in the same order.
    """

    file: Path
    dataset: str
    given: Along
    taken: Along


def virtual_parts(dataset: Any, path: Path) -> list[Part]:
    """What the virtual dataset ``dataset`` of the file ``path`` is made of, as it says itself."""
    return [
        Part(
            file=path if source.file_name == "." else path.parent / source.file_name,
            dataset=source.dset_name,
            given=_along(source.vspace).within(dataset.shape),
            taken=_along(source.src_space),
        )
        for source in dataset.virtual_sources()
    ]


def _along(space: Any) -> Along:
    from h5py import h5s

    if space.get_select_type() == h5s.SEL_ALL:
        return Along(start=0, stride=1, count=MOST_FRAMES, block=1, pixels=0)
    try:
        if space.is_regular_hyperslab():
            selected = list(zip(*space.get_regular_hyperslab(), strict=True))
            pixels = math.prod(count * block for _, _, count, block in selected[-2:])
            # Without end is said by the largest number there is.
            along = selected[0] if len(selected) == 3 else (0, 1, 1, 1)
            start, stride, count, block = (min(int(value), MOST_FRAMES) for value in along)
            # A stride may be left out where there is one block.
            return Along(start, max(stride, block, 1), count, max(block, 1), pixels)
        low, high = space.get_select_bounds()
        first, last = (int(low[0]), int(high[0])) if len(low) == 3 else (0, 0)
    except LIBRARY_ERRORS:
        first, last = 0, MOST_FRAMES
    first, last = min(first, MOST_FRAMES), min(last, MOST_FRAMES)
    return Along(first, stride=1, count=last - first + 1, block=1, pixels=0, exact=False)


class SafeImages:
    """The images of a dataset that may say anything of itself, each looked at before it is read.

    What is learnt of the dataset once, its stored chunks and its sources, is kept for the images
    that follow, so that a run costs what its file holds and not what it declares. Leave the
    context to close the files that virtual datasets led to.

    Args:
        dataset: of two dimensions, which is one image, or of three with images along the first.
        path: of the file it lies in; sources of virtual datasets are sought beside it.
    """

    def __init__(self, dataset: Any, path: Path) -> None:
        self._dataset = dataset
        self._opened = [_Opened() for _ in range(_MOST_NESTED)]
        self._images = _Images(dataset, path, self._opened)

    def __enter__(self) -> SafeImages:
        return self

    def __exit__(self, *why: object) -> None:
        for opened in self._opened:
            opened.close()

    def read(self, i: int) -> NDArray[Any]:
        """Image ``i``, (y, x), of the type of the dataset.

        Raises:
            UnreadableFile: it cannot be read, or only at any cost; the message says why. What
                else the library raises is among :data:`LIBRARY_ERRORS`.
        """
        self._images.check(i)
        return np.asarray(self._dataset[i] if self._dataset.ndim == 3 else self._dataset[()])


class _Opened(OrderedDict[tuple[Path, str], tuple[Any, "_Images"]]):
    """The sources used last at one depth of virtual datasets."""

    def source(self, part: Part, deeper: list[_Opened]) -> _Images:
        """The images of a source; raises :class:`UnreadableFile` where it has none."""
        import h5py

        key = part.file, part.dataset
        if key in self:
            self.move_to_end(key)
            return self[key][1]
        with contextlib.ExitStack() as opened:
            file = opened.enter_context(h5py.File(part.file, "r"))
            dataset = open_dataset(file, part.dataset)
            if dataset.ndim not in (2, 3):
                raise UnreadableFile(
                    f"{part.file}: {dataset.name} of shape {dataset.shape}; not images"
                )
            images = _Images(dataset, part.file, deeper)
            opened.pop_all()
        if len(self) >= _MOST_OPEN:
            self.popitem(last=False)[1][0].close()
        self[key] = file, images
        return images

    def close(self) -> None:
        while self:
            self.popitem()[1][0].close()


class _Images:
    """Looks at the images of a dataset, and keeps what holds for more than one of them."""

    def __init__(self, dataset: Any, path: Path, opened: list[_Opened]) -> None:
        self.shape: tuple[int, ...] = dataset.shape
        self.images = self.shape[0] if len(self.shape) == 3 else 1
        self._dataset = dataset
        self._path = path
        self._opened = opened  # by depth below this dataset
        self._parts: list[Part] | None = None
        self._spans = np.empty((2, 0), np.int64)
        # What was said of parts of which any image may be meant, by their number.
        self._said: dict[int, UnreadableFile | None] = {}
        # Corners of the stored chunks, by their first image.
        self._stored: dict[int, list[tuple[int, ...]]] | None = None
        # Corners of the last image's chunks: a chunk may hold several images.
        self._sound: set[tuple[int, ...]] = set()

    def check(self, i: int) -> None:
        """See that image ``i`` can be read through the library.

        Raises:
            UnreadableFile: it cannot, or only at any cost; the message says why.
        """
        dataset, path, shape = self._dataset, self._path, self.shape
        size = math.prod(shape[-2:]) * dataset.dtype.itemsize
        if len(shape) not in (2, 3) or size > LARGEST_FRAME_BYTES:
            raise UnreadableFile(
                f"{path}: {dataset.name} of shape {shape} and {dataset.dtype.str}; expected images "
                f"of at most {LARGEST_FRAME_BYTES} bytes"
            )
        if dataset.is_virtual:
            self._check_parts(i)
        elif dataset.chunks is not None:
            self._check_chunks(i)
        elif dataset.external is None and dataset.id.get_storage_size() == 0:
            raise UnreadableFile(f"{path}: {dataset.name} is declared, but nothing is stored")

    def _check_chunks(self, i: int) -> None:
        dataset, path, shape = self._dataset, self._path, self.shape
        chunk = math.prod(dataset.chunks) * dataset.dtype.itemsize
        if chunk > _LARGEST_CHUNK_BYTES:
            raise UnreadableFile(
                f"{path}: {dataset.name} in chunks of {chunk} bytes; expected at most "
                f"{_LARGEST_CHUNK_BYTES}"
            )
        firsts = (0, 0) if len(shape) == 2 else (i, 0, 0)
        ends = shape if len(shape) == 2 else (i + 1, *shape[-2:])
        places = [
            range(first // step * step, end, step)
            for first, end, step in zip(firsts, ends, dataset.chunks, strict=True)
        ]
        needed = math.prod(len(each) for each in places)
        if needed > _MOST_CHUNKS:
            raise UnreadableFile(
                f"{path}: {dataset.name} of shape {shape} in chunks of {dataset.chunks}; expected "
                f"at most {_MOST_CHUNKS} of them for an image"
            )
        corners: Iterable[tuple[int, ...]] = itertools.product(*places)
        if dataset.id.get_num_chunks() < needed:
            if self._stored is None:
                self._stored = _stored_chunks(dataset)
            corners = self._stored.get(_first_image(next(iter(corners))), ())
        self._sound = {
            corner for corner in corners if corner in self._sound or _check_chunk(dataset, corner)
        }
        if not self._sound:
            raise UnreadableFile(f"{path}: nothing is stored of image {i} of {dataset.name}")

    def _check_parts(self, i: int) -> None:
        dataset, path = self._dataset, self._path
        if not self._opened:
            raise UnreadableFile(
                f"{path}: {dataset.name} is made of virtual datasets more than {_MOST_NESTED} "
                "deep, or of itself; expected images"
            )
        if self._parts is None:
            self._parts = virtual_parts(dataset, path)
            given = [part.given for part in self._parts]
            self._spans = np.array(
                [[each.start for each in given], [each.image(each.images) for each in given]]
            )
        near = np.flatnonzero((self._spans[0] <= i) & (i < self._spans[1]))
        stored = [self._check_part(int(n), self._parts[n], i) for n in near]
        if not any(stored):
            raise UnreadableFile(f"{path}: nothing is stored of image {i} of {dataset.name}")

    def _check_part(self, n: int, part: Part, i: int) -> bool:
        """Whether there is something of image ``i`` in part ``n``; see that it can be read."""
        place = part.given.place(i)
        if place is None or not part.file.exists():
            # The library fills in what is not there, and blank frames would be made of nothing.
            return False
        if not part.file.is_file():
            raise UnreadableFile(
                f"{self._path}: {self._dataset.name} is made of {part.file}, which is no file"
            )
        source = self._opened[0].source(part, self._opened[1:])
        taken = part.taken.within(source.shape)
        if part.given.exact and taken.exact and part.given.pixels == taken.pixels:
            j = taken.image(place)
            if place >= taken.images or j >= source.images:
                return False
            source.check(j)
            return True
        if n not in self._said:
            self._said[n] = None
            try:
                for j in range(taken.start, min(taken.image(taken.images), source.images)):
                    source.check(j)
            except (UnreadableFile, *LIBRARY_ERRORS) as err:
                self._said[n] = UnreadableFile(str(err))
        wrong = self._said[n]
        if wrong is not None:
            raise wrong
        return source.images > taken.start


def _first_image(corner: tuple[int, ...]) -> int:
    return corner[0] if len(corner) == 3 else 0


def _stored_chunks(dataset: Any) -> dict[int, list[tuple[int, ...]]]:
    """Corners of the chunks that are stored, by their first image."""
    stored: dict[int, list[tuple[int, ...]]] = {}

    def one(chunk: Any) -> None:
        stored.setdefault(_first_image(chunk.chunk_offset), []).append(chunk.chunk_offset)

    dataset.id.chunk_iter(one)
    return stored


def _check_chunk(dataset: Any, corner: tuple[int, ...]) -> bool:
    """Whether a chunk is stored; see that no filter is told lies by it.

    Raises:
        UnreadableFile: it tells lies, or a filter that believes them comes with others.
    """
    where = dataset.id.get_chunk_info_by_coord(corner)
    if where.byte_offset is None:
        return False
    file_bytes = dataset.file.id.get_filesize()
    if where.size > file_bytes:
        raise UnreadableFile(
            f"{dataset.file.filename}: a chunk of {where.size} bytes in a file of {file_bytes}"
        )
    plist = dataset.id.get_create_plist()
    filters = [plist.get_filter(n) for n in range(plist.get_nfilters())]
    # A bit of the mask says that the filter of that number was left out for this chunk.
    believing = [
        f
        for n, f in enumerate(filters)
        if f[0] in (_BITSHUFFLE, _LZ4) and not where.filter_mask >> n & 1
    ]
    if not believing:
        return True
    code, _, options, _ = believing[0]
    if len(filters) > 1:
        raise UnreadableFile(
            f"{dataset.file.filename}: {dataset.name} has {len(filters)} filters; expected "
            "bitshuffle or LZ4 alone"
        )
    if code == _BITSHUFFLE:
        encoding = _BITSHUFFLED_WITH.get(options[4] if len(options) > 4 else 0, "")
    else:
        encoding = "lz4"
    item = dataset.dtype.itemsize
    size = math.prod(dataset.chunks) * item
    if encoding and not is_framed(dataset.id.read_direct_chunk(corner)[1], encoding, size, item):
        raise UnreadableFile(
            f"{dataset.file.filename}: the chunk at {corner} of {dataset.name} is no {encoding} of "
            f"{size} bytes"
        )
    return True

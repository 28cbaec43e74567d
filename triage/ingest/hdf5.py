"""Reads HDF5 files that may say anything of themselves.

The library believes a file: a few hundred bytes can declare an image of gigabytes, a virtual
dataset that is made of itself, or a chunk whose blocks lie outside of it, and the last two end the
process. So sizes, sources and framing are looked at before anything is read through the library.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
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
    "check_image",
    "datasets",
    "first_value",
    "open_dataset",
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


def check_image(dataset: Any, i: int, path: Path) -> None:
    """See that image ``i`` of a dataset in ``path`` can be read through the library.

    Args:
        dataset: of two dimensions, or of three with the images along the first.

    Raises:
        UnreadableFile: it cannot, or only at any cost; the message says why.
    """
    _check_image(dataset, i, path, 0)


def _check_image(dataset: Any, i: int, path: Path, nested: int) -> None:
    shape = dataset.shape
    size = math.prod(shape[-2:]) * dataset.dtype.itemsize
    if len(shape) not in (2, 3) or size > LARGEST_FRAME_BYTES:
        raise UnreadableFile(
            f"{path}: {dataset.name} of shape {shape} and {dataset.dtype.str}; expected images of "
            f"at most {LARGEST_FRAME_BYTES} bytes"
        )
    if dataset.is_virtual:
        _check_sources(dataset, i, path, nested)
        return
    if dataset.chunks is None:
        if dataset.external is None and dataset.id.get_storage_size() == 0:
            raise UnreadableFile(f"{path}: {dataset.name} is declared, but nothing is stored")
        return
    chunk = math.prod(dataset.chunks) * dataset.dtype.itemsize
    if chunk > _LARGEST_CHUNK_BYTES:
        raise UnreadableFile(
            f"{path}: {dataset.name} in chunks of {chunk} bytes; expected at most "
            f"{_LARGEST_CHUNK_BYTES}"
        )
    firsts = (0, 0) if len(shape) == 2 else (i, 0, 0)
    ends = shape if len(shape) == 2 else (i + 1, *shape[-2:])
    corners = [
        range(first // step * step, end, step)
        for first, end, step in zip(firsts, ends, dataset.chunks, strict=True)
    ]
    if math.prod(len(places) for places in corners) > _MOST_CHUNKS:
        raise UnreadableFile(
            f"{path}: {dataset.name} of shape {shape} in chunks of {dataset.chunks}; expected at "
            f"most {_MOST_CHUNKS} of them for an image"
        )
    stored = [False]
    if dataset.id.get_num_chunks() > 0:
        stored = [_check_chunk(dataset, corner) for corner in itertools.product(*corners)]
    if not any(stored):
        raise UnreadableFile(f"{path}: nothing is stored of image {i} of {dataset.name}")


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


def _check_sources(dataset: Any, i: int, path: Path, nested: int) -> None:
    """As :func:`check_image`, for what a virtual dataset is made of."""
    import h5py

    if nested >= _MOST_NESTED:
        raise UnreadableFile(
            f"{path}: {dataset.name} is made of virtual datasets more than {_MOST_NESTED} deep, "
            "or of itself; expected images"
        )
    found = False
    for source in dataset.virtual_sources():
        first, last = _frames_of(source.vspace, dataset.ndim)
        if not first <= i <= last:
            continue
        target = path if source.file_name == "." else path.parent / source.file_name
        if not target.exists():
            # The library fills in what is not there, and blank frames would be made of nothing.
            continue
        if not target.is_file():
            raise UnreadableFile(f"{path}: {dataset.name} is made of {target}, which is no file")
        with h5py.File(target, "r") as file:
            inner = open_dataset(file, source.dset_name)
            if inner.ndim not in (2, 3):
                raise UnreadableFile(f"{target}: {inner.name} of shape {inner.shape}; not images")
            begin, end = _frames_of(source.src_space, inner.ndim)
            count = inner.shape[0] if inner.ndim == 3 else 1
            end = min(end, count - 1)
            # One to one where as many are taken as are given; else any of them may be meant.
            same = end - begin == last - first
            for j in [begin + i - first] if same else range(begin, end + 1):
                _check_image(inner, j, target, nested + 1)
                found = True
    if not found:
        raise UnreadableFile(f"{path}: nothing is stored of image {i} of {dataset.name}")


def _frames_of(space: Any, dimensions: int) -> tuple[int, int]:
    """First and last image of a selection; all that there may be where it has no bounds."""
    if dimensions == 2:
        return 0, 0
    try:
        low, high = space.get_select_bounds()
    except (*LIBRARY_ERRORS, TypeError):
        return 0, MOST_FRAMES
    return int(low[0]), int(high[0])

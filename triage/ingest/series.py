"""What is remembered of running series: their headers, and which images were seen.

Streams are joined late, end twice or never, and emulators repeat identities; so a series is
remembered for as long as a few others have not come, and whatever happens to it.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triage.ingest.framing import is_framed
from triage.records import (
    LARGEST_FRAME_BYTES,
    LARGEST_RATIO,
    Frame,
    Geometry,
    Message,
    MessageKind,
    Reason,
    Series,
)

__all__ = [
    "SeriesBook",
    "decoded_map",
    "number",
    "plain_text",
    "unread",
    "usable_pixels",
    "whole_number",
]

_REMEMBERED = 16
_MASK_BYTES = 1 << 30
"""Of the masks of remembered series; a mask of zeros is some thousand times larger than it came.
Those of fourteen series of a 16M detector fit. The last two are remembered whatever they hold."""

_MAX_RUNS = 1 << 16

_DEAD_PIXEL = np.uint32(1 << 1)
"""Of the bits of NXmx's pixel_mask."""


@dataclass(slots=True)
class _SeenIds:
    """A set of image_ids as runs of consecutive ones: a gapless series is one run."""

    first: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)

    def add(self, image_id: int) -> bool:
        """True when it was there already."""
        if self.last and image_id == self.last[-1] + 1:
            self.last[-1] = image_id
            return False
        at = bisect_right(self.first, image_id) - 1
        if at >= 0 and image_id <= self.last[at]:
            return True
        joins_left = at >= 0 and self.last[at] == image_id - 1
        joins_right = at + 1 < len(self.first) and self.first[at + 1] == image_id + 1
        if joins_left and joins_right:
            self.last[at] = self.last.pop(at + 1)
            self.first.pop(at + 1)
        elif joins_left:
            self.last[at] = image_id
        elif joins_right:
            self.first[at + 1] = image_id
        else:
            self.first.insert(at + 1, image_id)
            self.last.insert(at + 1, image_id)
            if len(self.first) > _MAX_RUNS:
                # A stream of nothing but gaps: forget the oldest half, not the memory bound.
                del self.first[: _MAX_RUNS // 2], self.last[: _MAX_RUNS // 2]
        return False


class SeriesBook:
    """Series by identity, newest last; shared by the parsers of one stream.

    Args:
        geometry, increments_deg: those of every series whose stream tells none.
    """

    def __init__(
        self,
        *,
        geometry: Geometry | None = None,
        increments_deg: Mapping[str, float] | None = None,
    ) -> None:
        self._geometry = geometry
        self._increments_deg = increments_deg
        self._series: OrderedDict[tuple[int, str], tuple[Series, _SeenIds, set[int]]] = (
            OrderedDict()
        )
        self._inherited: set[tuple[int, str]] = set()
        self.ordinals: Iterator[int] = itertools.count()

    def start(self, series: Series, lane: int = 0, *, in_place: bool = True) -> Series:
        """Remember a series whose header came; images counted before it are forgotten.

        The header of a running series that comes on one more lane changes nothing: what it
        joins is given back. A second one on the same lane begins the series anew.

        Args:
            in_place: pixels stand in a frame as they do on the detector; else no geometry holds.
        """
        if series.geometry is None and self._geometry is not None and in_place:
            series = replace(series, geometry=self._geometry)
        if not series.increments_deg and self._increments_deg is not None:
            series = replace(series, increments_deg=self._increments_deg, rotation_told=True)
        known = self._series.get(series.key)
        if known is not None and known[0].started and series.started and lane not in known[2]:
            known[2].add(lane)
            return known[0]
        series = self._with_the_last_mask(series)
        self._series[series.key] = (series, _SeenIds(), {lane})
        self._inherited.discard(series.key)
        self._series.move_to_end(series.key)
        while len(self._series) > _REMEMBERED or self._masks_are_too_many():
            self._series.popitem(last=False)
        return series

    def _with_the_last_mask(self, series: Series) -> Series:
        """A series with the very array of the one before where their masks are equal.

        A detector sends the same mask with every series; it is held once.
        """
        mask = series.pixel_mask
        masks = (known.pixel_mask for known, _, _ in reversed(self._series.values()))
        last = next((each for each in masks if each is not None), None)
        if mask is None or last is None or not np.array_equal(mask, last):
            return series
        return replace(series, pixel_mask=last)

    def _masks_are_too_many(self) -> bool:
        masks = [series.pixel_mask for series, _, _ in self._series.values()]
        held = {id(mask): mask.nbytes for mask in masks if mask is not None}
        return len(masks) > 2 and sum(held.values()) > _MASK_BYTES

    def find(self, series_id: int, series_unique_id: str) -> Series:
        """The series of that identity; one that is not ``started`` when its header never came."""
        key = (series_id, series_unique_id)
        known = self._series.get(key)
        if known is None:
            return self.start(
                Series(series_id=series_id, series_unique_id=series_unique_id, started=False)
            )
        return known[0]

    def go_on_with(self, key: tuple[int, str], seen: Iterable[tuple[int, int]]) -> None:
        """Take a series for one whose images in these runs, (first, last), came already.

        Once one of them comes again it is a new series under an old name, and goes on unscored
        until its own header comes: the old one may not fit it.
        """
        series = self.find(*key)
        runs = sorted(seen)
        ids = _SeenIds([first for first, _ in runs], [last for _, last in runs])
        self._series[key] = (series, ids, self._series[key][2])
        self._inherited.add(key)

    def enter(
        self,
        series: Series,
        image_id: int,
        *,
        shape: tuple[int, int] = (0, 0),
        fault: Reason | None = None,
        fault_detail: str = "",
        **fields: Any,
    ) -> Frame:
        """The next frame of a series: numbered, told from a duplicate, and with a fault when
        its series does not fit it.

        Args:
            image_id: negative for none, and so is one that no int64 holds.
            fields: what else there is to say of the frame.
        """
        if image_id >= 1 << 63:
            image_id = -1
        key = series.key
        known = self._series.get(key)
        duplicate = image_id >= 0 and known is not None and known[1].add(image_id)
        if duplicate and key in self._inherited:
            series = self._begun_unseen(key)
        if fault is None:
            declared_y, declared_x = series.image_size_y_px, series.image_size_x_px
            if not series.started:
                fault = Reason.GEOMETRY_CHANGED
                fault_detail = f"no start message seen for series {series.series_id}"
            elif image_id < 0:
                # A drop that cannot be named cannot be accounted for.
                fault = Reason.MALFORMED
                fault_detail = "an image without a number that can be read"
            elif declared_y > 0 and declared_x > 0 and shape != (declared_y, declared_x):
                fault = Reason.GEOMETRY_CHANGED
                fault_detail = f"image of {shape} in a series of {(declared_y, declared_x)} (y, x)"
        return Frame(
            series=series,
            image_id=image_id,
            shape=shape,
            fault=fault,
            fault_detail=fault_detail,
            ordinal=next(self.ordinals),
            duplicate=duplicate,
            **fields,
        )

    def _begun_unseen(self, key: tuple[int, str]) -> Series:
        """A series under a name that an earlier one had, whose header never came."""
        self._inherited.discard(key)
        _, seen, lanes = self._series[key]
        series = Series(series_id=key[0], series_unique_id=key[1], started=False)
        self._series[key] = (series, seen, lanes)
        return series


def unread(parts: Sequence[Any], received_ns: int, lane: int, error: Exception) -> Message:
    """A message that a parser failed over, to go on as it came."""
    return Message(
        kind=MessageKind.MALFORMED,
        parts=tuple(parts),
        received_ns=received_ns,
        detail=f"{type(error).__name__}: {error}"[:200],
        size_bytes=sum(memoryview(part).nbytes for part in parts),
        lane=lane,
    )


def number(value: object) -> float:
    """A finite number as float, NaN for anything else: fields are sent as null, text or zero."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        as_float = float(value)
    except OverflowError:
        return math.nan
    return as_float if math.isfinite(as_float) else math.nan


def whole_number(value: object, default: int = -1) -> int:
    """An int64, or ``default`` for anything else."""
    if isinstance(value, bool):
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return value
    return default


def plain_text(value: object, most: int) -> str:
    """The first characters of a text. JSON can hold half a character, which no file can."""
    return str(value)[:most].encode("utf-8", "replace").decode()


def decoded_map(
    payload: Any, encoding: str, shape: tuple[int, int], dtype: str
) -> NDArray[Any] | None:
    """A (y, x) map of a header, such as its pixel mask, or None when the bytes are not one.

    Headers are rare, so HDF5's own filters decode what is compressed.

    Args:
        encoding: ``raw``, or ``lz4``, ``bslz4`` or ``bszstd`` with the framing of HDF5.
        dtype: pixel type on the wire, such as ``<u4``.
    """
    kind = np.dtype(dtype)
    size = shape[0] * shape[1] * kind.itemsize
    if min(shape) < 1 or size > LARGEST_FRAME_BYTES:
        return None
    data = bytes(payload)
    if encoding == "raw":
        if len(data) != size:
            return None
        return np.frombuffer(data, kind).reshape(shape).astype(kind.newbyteorder("="))
    import h5py
    import hdf5plugin

    if encoding not in LARGEST_RATIO or size > LARGEST_RATIO[encoding] * len(data):
        return None
    if not is_framed(data, encoding, size, kind.itemsize):
        return None
    if encoding == "lz4":
        options = hdf5plugin.LZ4()
    else:
        options = hdf5plugin.Bitshuffle(cname="zstd" if encoding == "bszstd" else "lz4")
    with h5py.File.in_memory() as file:
        dataset = file.create_dataset("map", shape, kind, chunks=shape, **options)
        dataset.id.write_direct_chunk((0, 0), data)
        try:
            return np.asarray(dataset[()], kind.newbyteorder("="))
        except OSError:
            return None


def usable_pixels(
    mask: NDArray[np.uint32] | None, flatfield: NDArray[Any] | None
) -> NDArray[np.uint32] | None:
    """The pixel mask of a series, (y, x) uint32, with what its flatfield says of pixels.

    A pixel whose correction is not finite and above zero counts nothing that could be corrected,
    and is marked as dead. The correction itself is not multiplied in, whatever the header says:
    where it is enabled the detector has done so before it rounded to counts, and where it is not
    the counts stay what was counted, integers with the noise of integers, which is what the
    recipe's statistics are made for; a few per cent from pixel to pixel hide no spot.

    A flatfield that would leave out most of the detector is none: emulators send zeros.
    """
    if flatfield is None:
        return mask
    dead = ~(np.isfinite(flatfield) & (flatfield > 0))
    if not dead.any() or 2 * int(dead.sum()) > dead.size:
        return mask
    if mask is None:
        mask = np.zeros(flatfield.shape, np.uint32)
    return mask | np.where(dead, _DEAD_PIXEL, np.uint32(0))

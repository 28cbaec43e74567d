"""What is remembered of running series: their headers, and which images were seen.

Streams are joined late, end twice or never, and emulators repeat identities; so a series is
remembered for as long as a few others have not come, and whatever happens to it.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triage.records import Frame, Reason, Series

__all__ = ["SeriesBook", "decoded_mask", "number", "whole_number"]

_REMEMBERED = 16
_MAX_RUNS = 1 << 16


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
    """Series by identity, newest last; shared by the parsers of one stream."""

    def __init__(self) -> None:
        self._series: OrderedDict[tuple[int, str], tuple[Series, _SeenIds, set[int]]] = (
            OrderedDict()
        )
        self._ordinals: Iterator[int] = itertools.count()

    def start(self, series: Series, lane: int = 0) -> Series:
        """Remember a series whose header came; images counted before it are forgotten.

        The header of a running series that comes on one more lane changes nothing: what it
        joins is given back. A second one on the same lane begins the series anew.
        """
        known = self._series.get(series.key)
        if known is not None and known[0].started and series.started and lane not in known[2]:
            known[2].add(lane)
            return known[0]
        self._series[series.key] = (series, _SeenIds(), {lane})
        self._series.move_to_end(series.key)
        while len(self._series) > _REMEMBERED:
            self._series.popitem(last=False)
        return series

    def find(self, series_id: int, series_unique_id: str) -> Series:
        """The series of that identity; one that is not ``started`` when its header never came."""
        key = (series_id, series_unique_id)
        known = self._series.get(key)
        if known is None:
            return self.start(
                Series(series_id=series_id, series_unique_id=series_unique_id, started=False)
            )
        return known[0]

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
            fields: what else there is to say of the frame.
        """
        known = self._series.get(series.key)
        duplicate = image_id >= 0 and known is not None and known[1].add(image_id)
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
            ordinal=next(self._ordinals),
            duplicate=duplicate,
            **fields,
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


def decoded_mask(payload: Any, encoding: str, shape: tuple[int, int]) -> NDArray[np.uint32] | None:
    """A (y, x) uint32 pixel mask from a header, or None when the bytes are not one.

    Headers are rare, so HDF5's own filters decode what is compressed.
    """
    size = shape[0] * shape[1] * 4
    if min(shape) < 1 or size > 1 << 30:
        return None
    data = bytes(payload)
    if encoding == "raw":
        if len(data) != size:
            return None
        return np.frombuffer(data, "<u4").reshape(shape).astype(np.uint32)
    import h5py
    import hdf5plugin

    if encoding not in ("bslz4", "lz4") or len(data) < 12 or size > 255 * len(data):
        return None
    options = hdf5plugin.LZ4() if encoding == "lz4" else hdf5plugin.Bitshuffle(cname="lz4")
    with h5py.File.in_memory() as file:
        dataset = file.create_dataset("mask", shape, "<u4", chunks=shape, **options)
        dataset.id.write_direct_chunk((0, 0), data)
        try:
            return np.asarray(dataset[()], np.uint32)
        except OSError:
            return None

"""The CPU backend: compiled kernels, one frame at a time, no GIL held inside.

Bitshuffled LZ4, which detectors send, is reduced to cells as it is decoded (``fused.py``). Other
encodings are decoded into a buffer that is used again, then reduced row by row. From the cells'
integers come the network's views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba as nb
import numpy as np
from numpy.typing import NDArray

from triage.backends import lz4
from triage.backends.fused import Reducer, is_fusible
from triage.backends.payload import Payload, fault, open_payload
from triage.backends.recipe import (
    ANSCOMBE,
    CLIP_SIGMA,
    SPOT_EXCESS,
    Limits,
    SeriesMaps,
    as_photons,
    bin_factor,
    check_recipe,
    limits,
    tile_corners,
)
from triage.backends.spots import SpotFinder
from triage.errors import DecodeError, TriageError
from triage.records import (
    EXPECTED_MAXIMUM,
    MOST_SPOTS,
    CloseUps,
    Frame,
    Recipe,
    Spot,
    Views,
)

__all__ = ["CpuBackend", "decode_on_host"]

_F1 = np.float32(1.0)
_F2 = np.float32(2.0)
_NO_BINS = np.empty((0, 0), np.int32)
_NO_CELLS = np.empty(0, np.int32)


class CpuBackend:
    """Decodes and reduces on the CPU; see :class:`triage.backends.Backend`.

    Args:
        recipe: how a frame becomes views.
        kernels: what reduces bitshuffled LZ4: ``c``, ``numba``, or ``auto`` for C where it was
            built. All give the same integers.
        recycle: the arrays of a call are overwritten by the next one. Fresh memory costs as much
            as reducing a small frame.

    Raises:
        ConfigError: the recipe has a bin factor of unknown noise.
        EnvironmentLacksError: ``kernels`` names what was not built.
    """

    name = "cpu"

    def __init__(self, recipe: Recipe, *, kernels: str = "auto", recycle: bool = False) -> None:
        check_recipe(recipe)
        self.recipe = recipe
        self._reducer = Reducer(kernels)
        self._recycle = recycle
        self._recycled: tuple[Views, list[tuple[int, int]]] | None = None
        self._cells: tuple[NDArray[np.uint32], NDArray[np.uint64], NDArray[np.uint16]] | None = None
        self._maps = SeriesMaps(recipe)
        self._buffer = np.empty(0, np.uint8)
        self._scratch = np.empty(0, np.uint8)
        self._finder = SpotFinder()

    @property
    def kernels(self) -> str:
        """What reduces bitshuffled LZ4 here, for reports."""
        return self._reducer.kernels

    def decode(self, frame: Frame) -> NDArray[Any]:
        """The pixels, (y, x), in the frame's dtype and native byte order; a fresh array."""
        payload = open_payload(frame)
        return self._decode_to(frame, payload, np.empty(payload.size, np.uint8))

    def prepare(self, frames: Sequence[Frame]) -> Views:
        """Overview and radial views of each frame."""
        views, extents = self._blank_views(len(frames))
        # Kept again only when every row is known to be in order.
        self._recycled = None
        errors = tuple(
            self._prepare_row(frame, views, extents, i) for i, frame in enumerate(frames)
        )
        if self._recycle:
            self._recycled = views, extents
        rows = slice(len(frames))
        return Views(
            maximum=views.maximum[rows],
            total=views.total[rows],
            count=views.count[rows],
            bin_factor=views.bin_factor[rows],
            overview=views.overview[rows],
            radial=views.radial[rows],
            has_geometry=views.has_geometry[rows],
            errors=errors,
        )

    def reduce(
        self, frame: Frame
    ) -> tuple[NDArray[np.uint32], NDArray[np.uint64], NDArray[np.uint16]]:
        """The cells of a frame: maximum, total and count as in Views, (ceil(y / k), grid) each.

        Raises:
            DecodeError: the payload is corrupt or does not match shape and dtype.
            UnsupportedEncoding: the encoding, pixel type or size is not one that is read.
        """
        payload = open_payload(frame)
        k, grid = bin_factor(self.recipe, frame), self.recipe.grid
        rows = -(-frame.shape[0] // k)
        whole = self._cells
        if whole is None:
            shape = (grid, grid)
            whole = np.empty(shape, np.uint32), np.empty(shape, np.uint64), np.empty(shape, "u2")
            if self._recycle:
                self._cells = whole
        maximum, total, count = whole[0][:rows], whole[1][:rows], whole[2][:rows]
        self._reduce_to(frame, payload, k, maximum, total, count)
        return maximum, total, count

    def close_ups(self, frames: Sequence[Frame], views: Views, rows: Sequence[int]) -> CloseUps:
        """Native crops at the strongest separate cells of each frame in ``rows``, and its spots.

        A row that has an error in ``views`` gives zeros.
        """
        r = self.recipe
        tiles = np.zeros((len(rows), r.tiles, 2, r.tile_px, r.tile_px), np.float32)
        spots = np.zeros((len(rows), MOST_SPOTS, len(Spot)), np.float32)
        for number, row in enumerate(rows):
            if views.errors[row] is not None:
                continue
            frame = frames[row]
            bounds = limits(frame.dtype, frame.series)
            invalid = self._maps.invalid(frame)
            photons = as_photons(self._decode_for_now(frame, open_payload(frame)), bounds)
            rings = self._maps.rings(frame.shape, int(views.bin_factor[row]), frame.series.geometry)
            self._finder.find(photons, invalid, bounds, views, row, rings, spots[number])
            for place, (top, left) in enumerate(tile_corners(views, row, frame.shape, r)):
                _tile(
                    photons,
                    invalid,
                    top,
                    left,
                    bounds.high,
                    bounds.error,
                    bounds.negative_is_invalid,
                    tiles[number, place],
                )
        return CloseUps(
            tiles=tiles,
            spots=spots,
            geometry=tuple(frames[row].series.geometry for row in rows),
            shape=tuple(frames[row].shape for row in rows),
        )

    def _blank_views(self, n: int) -> tuple[Views, list[tuple[int, int]]]:
        """Views of at least ``n`` rows, and how many cells (y, x) of each may not be zero."""
        if self._recycled is not None and len(self._recycled[1]) >= n:
            return self._recycled
        r = self.recipe
        views = Views(
            maximum=np.zeros((n, r.grid, r.grid), np.uint32),
            total=np.zeros((n, r.grid, r.grid), np.uint64),
            count=np.zeros((n, r.grid, r.grid), np.uint16),
            bin_factor=np.zeros(n, np.int32),
            overview=np.zeros((n, 3, r.grid, r.grid), np.float32),
            radial=np.zeros((n, 5, r.sectors, r.radial_bins), np.float32),
            has_geometry=np.zeros(n, np.bool_),
            errors=(),
        )
        return views, [(0, 0)] * n

    def _prepare_row(
        self, frame: Frame, views: Views, extents: list[tuple[int, int]], row: int
    ) -> TriageError | None:
        """Fill row ``row`` of ``views``, or give the reason why it is zero."""
        used, extents[row] = extents[row], (0, 0)
        maximum, total, count = views.maximum[row], views.total[row], views.count[row]
        overview, radial = views.overview[row], views.radial[row]
        views.bin_factor[row] = 0
        views.has_geometry[row] = False
        radial[:] = 0
        try:
            payload = open_payload(frame)
            k = bin_factor(self.recipe, frame)
            rows, columns = (-(-side // k) for side in frame.shape)
            if used != (rows, columns):
                for cells in (maximum, total, count, overview):
                    cells[..., : used[0], :] = 0
            extents[row] = (rows, columns)
            self._reduce_to(frame, payload, k, maximum[:rows], total[:rows], count[:rows])
        except TriageError as err:
            extents[row] = (0, 0)
            for cells in (maximum, total, count, overview):
                cells[:] = 0
            return err
        views.bin_factor[row] = k
        geometry = frame.series.geometry
        bins, present = _NO_BINS, _NO_CELLS
        if geometry is not None:
            views.has_geometry[row] = True
            bins, present = self._maps.radial_bins(frame.shape, k, geometry)
        _views(
            maximum, total, count, rows, columns, k, EXPECTED_MAXIMUM[k], bins, present, overview,
            radial,
        )  # fmt: skip
        return None

    def _reduce_to(
        self,
        frame: Frame,
        payload: Payload,
        k: int,
        maximum: NDArray[np.uint32],
        total: NDArray[np.uint64],
        count: NDArray[np.uint16],
    ) -> None:
        """Write the cells of a frame whole."""
        bounds = limits(frame.dtype, frame.series)
        if is_fusible(frame, payload, bounds):
            valid, valid_count = self._maps.cells(frame, k)
            code = self._reducer.reduce(
                frame, payload, k, bounds, valid, valid_count, maximum, total, count
            )
            if code:
                raise fault(code, frame)
            return
        invalid = self._maps.invalid(frame)
        photons = as_photons(self._decode_for_now(frame, payload), bounds)
        for cells in (maximum, total, count):
            cells[:] = 0
        edges, columns = _row_arrays(photons, bounds)
        _reduce(photons, invalid, k, edges, columns, maximum, total, count)

    def _decode_for_now(self, frame: Frame, payload: Payload) -> NDArray[Any]:
        """Like :meth:`decode`, in the buffer that the next frame overwrites."""
        if frame.pieces:
            # Put together a moment ago, and nobody else's.
            return payload.data.view(frame.dtype).reshape(frame.shape)
        if self._buffer.size < payload.size:
            self._buffer = np.empty(payload.size, np.uint8)
        return self._decode_to(frame, payload, self._buffer[: payload.size])

    def _decode_to(self, frame: Frame, payload: Payload, out: NDArray[np.uint8]) -> NDArray[Any]:
        # Whole words, because planes are read in words, and room for copies in whole pieces.
        block = -(-min(payload.block_bytes, payload.size) // 8) * 8 + 64
        if self._scratch.size < block:
            self._scratch = np.empty(block, np.uint8)
        return decode_on_host(frame, payload, self._scratch, out)


def decode_on_host(
    frame: Frame, payload: Payload, scratch: NDArray[np.uint8], out: NDArray[np.uint8]
) -> NDArray[Any]:
    """Decode into all of ``out``; the (y, x) pixels in it, in native byte order.

    ``scratch`` holds at least one block of ``payload``.
    """
    code = 0
    if frame.encoding == "raw":
        out[:] = payload.data
    elif frame.encoding == "bslz4":
        item = frame.dtype.itemsize
        code = lz4.decode_bslz4(payload.data, payload.at, item, payload.block_bytes, scratch, out)
    elif frame.encoding == "lz4" and frame.framed:
        code = lz4.decode_lz4(payload.data, payload.at, payload.block_bytes, out)
    elif frame.encoding == "lz4":
        written = lz4.lz4_block(payload.data, 0, payload.data.size, out, 0, out.size)
        code = 3 if written < 0 else 4 if written != out.size else 0
    else:
        _decode_by_hdf5(frame, payload, out)
    if code:
        raise fault(code, frame)
    pixels = out.view(frame.dtype).reshape(frame.shape)
    if not frame.dtype.isnative:
        pixels.byteswap(inplace=True)
        pixels = pixels.view(frame.dtype.newbyteorder("="))
    return pixels


def _row_arrays(photons: NDArray[Any], bounds: Limits) -> tuple[NDArray[Any], NDArray[Any]]:
    """(3,) bounds: highest, error and lowest value; and (4, x) columns of the same type.

    Pixels of 16 bits and fewer are summed in 32 bits, which 2^15 rows of them cannot overflow.
    """
    narrow = photons.dtype.itemsize <= 2
    kind: type[np.signedinteger[Any]] = np.int32 if narrow else np.int64
    edge = np.iinfo(kind)
    values = (bounds.high, bounds.error, 0 if bounds.negative_is_invalid else edge.min)
    clipped = [min(max(value, int(edge.min)), int(edge.max)) for value in values]
    return np.array(clipped, kind), np.empty((4, photons.shape[1]), kind)


def _decode_by_hdf5(frame: Frame, payload: Payload, out: NDArray[np.uint8]) -> None:
    """Bitshuffle-zstd through HDF5's own filter: right, and slow.

    The filter trusts the block lengths it reads, so they are checked first.
    """
    import h5py
    import hdf5plugin

    blocks = -(-payload.whole // payload.block_bytes)
    if 4 * blocks > payload.data.size:
        raise fault(1, frame)
    code = lz4.block_spans(
        payload.data,
        payload.at,
        payload.size - payload.whole,
        np.empty(blocks, np.int64),
        np.empty(blocks, np.int32),
    )
    if code:
        raise fault(code, frame)
    item = frame.dtype.itemsize
    head = payload.size.to_bytes(8, "big") + payload.block_bytes.to_bytes(4, "big")
    with h5py.File.in_memory() as file:
        dataset = file.create_dataset(
            "frame",
            (payload.size // item,),
            f"u{item}",
            chunks=(payload.size // item,),
            **hdf5plugin.Bitshuffle(cname="zstd"),
        )
        dataset.id.write_direct_chunk((0,), head + payload.data[payload.at :].tobytes())
        try:
            dataset.read_direct(out.view(f"u{item}"))
        except OSError as err:
            raise DecodeError(
                f"image {frame.image_id}, bszstd: {err}; expected shape {frame.shape} "
                f"of {frame.dtype.str}"
            ) from err


@nb.njit(nogil=True, cache=True)
def _reduce(
    pixels: NDArray[Any],
    invalid: NDArray[np.uint8],
    k: int,
    bounds: NDArray[Any],
    columns: NDArray[Any],
    maximum: NDArray[np.uint32],
    total: NDArray[np.uint64],
    count: NDArray[np.uint16],
) -> None:
    """Fill the cells; ``bounds`` and ``columns`` as :func:`_row_arrays` gives them.

    Rows are added to column accumulators first, a loop that vectorises, and folded to cells
    once per k rows.
    """
    ny, nx = pixels.shape
    high, error, low = bounds[0], bounds[1], bounds[2]
    values, best, added, valid = columns[0], columns[1], columns[2], columns[3]
    unmasked = np.zeros(nx if invalid.size == 0 else 0, np.uint8)
    for cy in range((ny + k - 1) // k):
        columns[:] = 0
        for y in range(cy * k, min(ny, cy * k + k)):
            row = pixels[y]
            bad = invalid[y] if invalid.size else unmasked
            for x in range(nx):
                values[x] = row[x]
            for x in range(nx):
                v = values[x]
                ok = (v <= high) & (v != error) & (v >= low) & (bad[x] == 0)
                v = v if ok & (v > 0) else v - v
                valid[x] += ok
                added[x] += v
                best[x] = v if v > best[x] else best[x]
        for cx in range((nx + k - 1) // k):
            largest = np.int64(0)
            sum_ = np.int64(0)
            n = np.int64(0)
            for x in range(cx * k, min(nx, cx * k + k)):
                largest = max(largest, np.int64(best[x]))
                sum_ += np.int64(added[x])
                n += np.int64(valid[x])
            maximum[cy, cx] = np.uint32(largest)
            total[cy, cx] = np.uint64(sum_)
            count[cy, cx] = np.uint16(n)


# Dividing as numpy does: the test for zero that Python asks for would keep loops from vectorising.
@nb.njit(nogil=True, cache=True, error_model="numpy")
def _views(
    maximum: NDArray[np.uint32],
    total: NDArray[np.uint64],
    count: NDArray[np.uint16],
    rows: int,
    columns: int,
    k: int,
    expected: np.float32,
    bins: NDArray[np.int32],
    present: NDArray[np.int32],
    overview: NDArray[np.float32],
    radial: NDArray[np.float32],
) -> None:
    """Overview and radial view of a frame of ``rows`` x ``columns`` cells; no bins, no radial.

    The excess of a cell is the sigma by which its maximum exceeds its other pixels, less what
    chance explains. A row is computed in loops that vectorise, then sorted into rings.
    """
    # A power of two: multiplied by its inverse is divided by it, bit for bit.
    share, half = _F1 / np.float32(k * k), (k * k) // 2
    sectors, rings = radial.shape[1], radial.shape[2]
    # By ring: the total of its cells, and in one word, so that a cell costs two additions, their
    # pixels (28 bits: a frame has fewer), those valid enough (18) and those with a spot.
    sums = np.zeros((sectors * rings, 2), np.int64)
    rest = np.empty(columns, np.float32)
    excess = np.empty(columns, np.float32)
    # The ring of each cell that counts, -1 for the others.
    counted = np.empty((rows if bins.size else 0, columns), np.int32)
    for y in range(rows):
        largest, added, valid = maximum[y], total[y], count[y]
        in_all = np.uint64(0)
        for x in range(columns):
            in_all |= added[x]
        if in_all < 2**31:
            # Narrow integers become floats many at a time; the rounding is the same.
            for x in range(columns):
                rest[x] = np.float32(np.int32(added[x]) - np.int32(largest[x]))
        else:
            for x in range(columns):
                rest[x] = np.float32(added[x] - np.uint64(largest[x]))
        for x in range(columns):
            pixels = np.int32(valid[x])
            top = np.float32(np.int32(largest[x])) if in_all < 2**31 else np.float32(largest[x])
            others = np.float32(max(int(pixels) - 1, 1))
            mean = rest[x] / others if pixels > 1 else top
            b = np.sqrt(mean + ANSCOMBE)
            e = np.float32(_F2 * (np.sqrt(top + ANSCOMBE) - b) - expected)
            excess[x] = e
            overview[0, y, x] = e / np.sqrt(_F1 + abs(e)) if pixels > 0 else np.float32(0.0)
            overview[1, y, x] = (
                (_F2 * b) / np.sqrt(_F1 + _F2 * b) if pixels > 0 else np.float32(0.0)
            )
            overview[2, y, x] = np.float32(pixels) * share
        if bins.size == 0:
            continue
        for x in range(columns):
            n = np.int64(valid[x])
            counted[y, x] = -1
            if bins[y, x] < 0 or n < half or n == 0:
                continue
            ring = sums[np.uint64(bins[y, x])]
            has_spot = excess[x] > SPOT_EXCESS
            counted[y, x] = -1 if has_spot else bins[y, x]
            ring[0] += np.int64(0) if has_spot else np.int64(added[x])
            ring[1] += (1 << 28) + (np.int64(1 << 46) if has_spot else n)
    area, half_bits, shift = float(k * k), k, 0
    while half_bits > 1:
        half_bits >>= 1
        shift += 2
    most, clipped = np.zeros(present.size, np.int64), np.zeros(present.size, np.int64)
    for place in range(present.size):
        in_ring = sums[place, 1] & ((1 << 28) - 1)
        if in_ring > 0:
            # Of a whole cell; of others a part.
            mean = float(sums[place, 0]) * area / float(in_ring)
            most[place] = np.int64(mean + CLIP_SIGMA * np.sqrt(mean + 1.0))
    for y in range(counted.shape[0]):
        for x in range(columns):
            if counted[y, x] >= 0:
                at_ring = np.uint64(counted[y, x])
                bound = most[at_ring] * np.int64(count[y, x]) >> shift
                clipped[at_ring] += min(np.int64(total[y, x]), bound)
    for place in range(present.size):
        in_ring = sums[place, 1] & ((1 << 28) - 1)
        usable = sums[place, 1] >> 28 & ((1 << 18) - 1)
        sector, at = place // rings, place % rings
        if in_ring > 0:
            radial[0, sector, at] = np.float32(sums[place, 0]) / np.float32(in_ring)
            radial[4, sector, at] = np.float32(clipped[place]) / np.float32(in_ring)
        if present[place] > 0:
            radial[1, sector, at] = np.float32(usable) / np.float32(present[place])
        if usable > 0:
            radial[2, sector, at] = np.float32(sums[place, 1] >> 46) / np.float32(usable)
        radial[3, sector, at] = np.float32(in_ring)


@nb.njit(nogil=True, cache=True)
def _tile(
    pixels: NDArray[Any],
    invalid: NDArray[np.uint8],
    top: int,
    left: int,
    high: int,
    error: int,
    negative_is_invalid: bool,
    out: NDArray[np.float32],
) -> None:
    ny, nx = pixels.shape
    size = out.shape[1]
    masked = invalid.size > 0
    for i in range(min(size, ny - top)):
        for j in range(min(size, nx - left)):
            v = np.int64(pixels[top + i, left + j])
            if v > high or v == error or (masked and invalid[top + i, left + j] != 0):
                continue
            if v < 0:
                if negative_is_invalid:
                    continue
                v = np.int64(0)
            out[0, i, j] = np.sqrt(np.float32(v))
            out[1, i, j] = _F1

"""The CPU backend: numba kernels, one frame at a time, no GIL held inside.

A frame is decoded block by block into a buffer that is used again, then reduced row by row to
cells; from the cells' integers come the network's views.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numba as nb
import numpy as np
from numpy.typing import NDArray

from triage.backends import lz4
from triage.backends.payload import Payload, fault, open_payload
from triage.backends.recipe import (
    ANSCOMBE,
    SPOT_EXCESS,
    Limits,
    SeriesMaps,
    as_photons,
    bin_factor,
    check_recipe,
    limits,
    tile_corners,
)
from triage.errors import DecodeError, TriageError
from triage.records import EXPECTED_MAXIMUM, Frame, Recipe, Views

__all__ = ["CpuBackend", "decode_on_host"]

_F1 = np.float32(1.0)
_F2 = np.float32(2.0)


class CpuBackend:
    """Decodes and reduces on the CPU; see :class:`triage.backends.Backend`."""

    name = "cpu"

    def __init__(self, recipe: Recipe) -> None:
        check_recipe(recipe)
        self.recipe = recipe
        self._maps = SeriesMaps(recipe)
        self._buffer = np.empty(0, np.uint8)
        self._scratch = np.empty(0, np.uint8)

    def decode(self, frame: Frame) -> NDArray[Any]:
        """The pixels, (y, x), in the frame's dtype and native byte order; a fresh array."""
        payload = open_payload(frame)
        return self._decode_to(frame, payload, np.empty(payload.size, np.uint8))

    def prepare(self, frames: Sequence[Frame]) -> Views:
        """Overview and radial views of each frame."""
        r = self.recipe
        n = len(frames)
        views = Views(
            maximum=np.zeros((n, r.grid, r.grid), np.uint32),
            total=np.zeros((n, r.grid, r.grid), np.uint64),
            count=np.zeros((n, r.grid, r.grid), np.uint16),
            bin_factor=np.zeros(n, np.int32),
            overview=np.zeros((n, 3, r.grid, r.grid), np.float32),
            radial=np.zeros((n, 3, r.sectors, r.radial_bins), np.float32),
            has_geometry=np.zeros(n, np.bool_),
            errors=(),
        )
        errors = tuple(self._prepare_row(frame, views, i) for i, frame in enumerate(frames))
        return dataclasses.replace(views, errors=errors)

    def tiles(
        self, frames: Sequence[Frame], views: Views, rows: Sequence[int]
    ) -> NDArray[np.float32]:
        """Native crops at the strongest separate cells of each frame in ``rows``.

        A row that has an error in ``views`` gives zeros.
        """
        r = self.recipe
        out = np.zeros((len(rows), r.tiles, 2, r.tile_px, r.tile_px), np.float32)
        for number, row in enumerate(rows):
            if views.errors[row] is not None:
                continue
            frame = frames[row]
            bounds = limits(frame.dtype, frame.series)
            invalid = self._maps.invalid(frame)
            pixels = self._decode_for_now(frame, open_payload(frame))
            photons = as_photons(pixels, bounds)
            for place, (top, left) in enumerate(tile_corners(views, row, frame.shape, r)):
                _tile(
                    photons,
                    invalid,
                    top,
                    left,
                    bounds.high,
                    bounds.error,
                    bounds.negative_is_invalid,
                    out[number, place],
                )
        return out

    def _prepare_row(self, frame: Frame, views: Views, row: int) -> TriageError | None:
        """Fill row ``row`` of ``views``, or give the reason why it stays zero."""
        try:
            payload = open_payload(frame)
            k = bin_factor(self.recipe, frame)
            invalid = self._maps.invalid(frame)
            pixels = self._decode_for_now(frame, payload)
        except TriageError as err:
            return err
        bounds = limits(frame.dtype, frame.series)
        maximum, total, count = views.maximum[row], views.total[row], views.count[row]
        views.bin_factor[row] = k
        photons = as_photons(pixels, bounds)
        edges, columns = _row_arrays(photons, bounds)
        _reduce(photons, invalid, k, edges, columns, maximum, total, count)
        expected = EXPECTED_MAXIMUM[k]
        _overview(maximum, total, count, k, expected, views.overview[row])
        geometry = frame.series.geometry
        if geometry is not None:
            views.has_geometry[row] = True
            bins = self._maps.radial_bins(frame.shape, k, geometry)
            _radial(maximum, total, count, k, expected, bins, views.radial[row])
        return None

    def _decode_for_now(self, frame: Frame, payload: Payload) -> NDArray[Any]:
        """Like :meth:`decode`, in the buffer that the next frame overwrites."""
        if self._buffer.size < payload.size:
            self._buffer = np.empty(payload.size, np.uint8)
        return self._decode_to(frame, payload, self._buffer[: payload.size])

    def _decode_to(self, frame: Frame, payload: Payload, out: NDArray[np.uint8]) -> NDArray[Any]:
        # Whole words, because planes are read in words.
        block = -(-min(payload.block_bytes, payload.size) // 8) * 8
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
    with h5py.File("frame", "w", driver="core", backing_store=False) as file:
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


@nb.njit(nogil=True, cache=True)
def _excess(m: int, s: int, n: int, expected: np.float32) -> np.float32:
    """Sigma by which a cell's maximum exceeds its other pixels, less what chance explains."""
    largest = np.float32(m)
    mean = np.float32(np.uint64(s) - np.uint64(m)) / np.float32(n - 1) if n > 1 else largest
    a = np.sqrt(largest + ANSCOMBE)
    b = np.sqrt(mean + ANSCOMBE)
    return np.float32(_F2 * (a - b) - expected)


@nb.njit(nogil=True, cache=True)
def _overview(
    maximum: NDArray[np.uint32],
    total: NDArray[np.uint64],
    count: NDArray[np.uint16],
    k: int,
    expected: np.float32,
    out: NDArray[np.float32],
) -> None:
    full = np.float32(k * k)
    for y in range(count.shape[0]):
        for x in range(count.shape[1]):
            n = int(np.int64(count[y, x]))
            if n == 0:
                continue
            e = _excess(maximum[y, x], total[y, x], n, expected)
            largest = np.float32(maximum[y, x])
            rest = np.uint64(total[y, x]) - np.uint64(maximum[y, x])
            mean = np.float32(rest) / np.float32(n - 1) if n > 1 else largest
            b = np.sqrt(mean + ANSCOMBE)
            out[0, y, x] = e / np.sqrt(_F1 + abs(e))
            out[1, y, x] = (_F2 * b) / np.sqrt(_F1 + _F2 * b)
            out[2, y, x] = np.float32(n) / full


@nb.njit(nogil=True, cache=True)
def _radial(
    maximum: NDArray[np.uint32],
    total: NDArray[np.uint64],
    count: NDArray[np.uint16],
    k: int,
    expected: np.float32,
    bins: NDArray[np.int32],
    out: NDArray[np.float32],
) -> None:
    sectors, rings = out.shape[1], out.shape[2]
    size = sectors * rings
    added = np.zeros(size, np.uint64)
    pixels = np.zeros(size, np.uint64)
    cells = np.zeros(size, np.int64)
    usable = np.zeros(size, np.int64)
    spots = np.zeros(size, np.int64)
    half = (k * k) // 2
    for y in range(count.shape[0]):
        for x in range(count.shape[1]):
            b = bins[y, x]
            if b < 0:
                continue
            cells[b] += 1
            n = int(np.int64(count[y, x]))
            if n < half or n == 0:
                continue
            usable[b] += 1
            if _excess(maximum[y, x], total[y, x], n, expected) > SPOT_EXCESS:
                spots[b] += 1
                continue
            added[b] += np.uint64(total[y, x])
            pixels[b] += np.uint64(n)
    for b in range(size):
        sector, ring = b // rings, b % rings
        if pixels[b] > 0:
            out[0, sector, ring] = np.float32(added[b]) / np.float32(pixels[b])
        if cells[b] > 0:
            out[1, sector, ring] = np.float32(usable[b]) / np.float32(cells[b])
        if usable[b] > 0:
            out[2, sector, ring] = np.float32(spots[b]) / np.float32(usable[b])


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

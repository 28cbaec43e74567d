"""The CPU backend: numba kernels, one frame at a time, no GIL held inside.

A frame is decoded block by block into a buffer that is used again, then reduced row by row to
cells; from the cells' integers come the network's views.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numba as nb
import numpy as np
from numpy.typing import NDArray

from triage.backends import lz4
from triage.backends.recipe import (
    EXPECTED_MAXIMUM,
    SPOT_EXCESS,
    Limits,
    SeriesMaps,
    checked_size_bytes,
    limits,
    tile_places,
)
from triage.errors import DecodeError, TriageError, UnsupportedEncoding
from triage.records import Frame, Recipe, Views

__all__ = ["CpuBackend"]

_F0 = np.float32(0.0)
_F1 = np.float32(1.0)
_F2 = np.float32(2.0)
_ANSCOMBE = np.float32(0.375)
"""Anscombe (1948): 2 sqrt(n + 3/8) of a Poisson count has a variance near one."""
_SPOT = np.float32(SPOT_EXCESS)


class CpuBackend:
    """Decodes and reduces on the CPU; see :class:`triage.backends.Backend`."""

    name = "cpu"

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._maps = SeriesMaps(recipe)
        self._buffer = np.empty(0, np.uint8)
        self._scratch = np.empty(0, np.uint8)
        # HDF5's filter, the slow way to zstd, is not safe to enter twice.
        self._zstd_lock = threading.Lock()

    def decode(self, frame: Frame) -> NDArray[Any]:
        """The pixels, (y, x), in the frame's dtype and native byte order; a fresh array."""
        return self._decoded(frame).copy()

    def prepare(self, frames: Sequence[Frame]) -> Views:
        """Overview and radial views of each frame."""
        r = self.recipe
        n = len(frames)
        maximum = np.zeros((n, r.grid, r.grid), np.uint32)
        total = np.zeros((n, r.grid, r.grid), np.uint64)
        count = np.zeros((n, r.grid, r.grid), np.uint16)
        overview = np.zeros((n, 3, r.grid, r.grid), np.float32)
        radial = np.zeros((n, 3, r.sectors, r.radial_bins), np.float32)
        bin_factor = np.zeros(n, np.int32)
        has_geometry = np.zeros(n, np.bool_)
        errors: list[TriageError | None] = [None] * n
        for i, frame in enumerate(frames):
            try:
                pixels = self._decoded(frame)
                invalid = self._maps.invalid(frame)
                k = self._bin_factor(frame)
            except TriageError as err:
                errors[i] = err
                continue
            bin_factor[i] = k
            values, bounds = _as_counts(pixels, limits(frame.dtype, frame.series))
            _reduce(
                values,
                invalid,
                k,
                bounds.high,
                bounds.error,
                bounds.negative_is_invalid,
                maximum[i],
                total[i],
                count[i],
            )
            expected = np.float32(EXPECTED_MAXIMUM[k])
            _overview(maximum[i], total[i], count[i], k, expected, overview[i])
            geometry = frame.series.geometry
            if geometry is not None:
                has_geometry[i] = True
                bins = self._maps.radial_bins(frame.shape, k, geometry)
                _radial(maximum[i], total[i], count[i], k, expected, bins, radial[i])
        return Views(
            maximum=maximum,
            total=total,
            count=count,
            bin_factor=bin_factor,
            overview=overview,
            radial=radial,
            has_geometry=has_geometry,
            errors=tuple(errors),
        )

    def tiles(
        self, frames: Sequence[Frame], views: Views, rows: Sequence[int]
    ) -> NDArray[np.float32]:
        """Native crops at the strongest separate cells of each frame in ``rows``."""
        r = self.recipe
        out = np.zeros((len(rows), r.tiles, 2, r.tile_px, r.tile_px), np.float32)
        for number, row in enumerate(rows):
            frame = frames[row]
            pixels = self._decoded(frame)
            values, bounds = _as_counts(pixels, limits(frame.dtype, frame.series))
            k = int(views.bin_factor[row])
            places = tile_places(views.overview[row, 0], views.count[row], k, r)
            for place, (cell_y, cell_x) in enumerate(places):
                _tile(
                    values,
                    self._maps.invalid(frame),
                    cell_y * k + k // 2 - r.tile_px // 2,
                    cell_x * k + k // 2 - r.tile_px // 2,
                    bounds.high,
                    bounds.error,
                    bounds.negative_is_invalid,
                    out[number, place],
                )
        return out

    def _bin_factor(self, frame: Frame) -> int:
        try:
            return self.recipe.bin_factor(frame.shape)
        except ValueError as err:
            raise UnsupportedEncoding(f"image {frame.image_id}: {err}") from err

    def _decoded(self, frame: Frame) -> NDArray[Any]:
        """(y, x) view of the reused buffer, native byte order."""
        payload = np.frombuffer(frame.payload, np.uint8)
        size = checked_size_bytes(frame, payload.size)
        if self._buffer.size < size:
            self._buffer = np.empty(size, np.uint8)
        out = self._buffer[:size]
        if frame.encoding == "raw":
            if payload.size != size:
                raise DecodeError(
                    f"image {frame.image_id}: {payload.size} raw bytes; expected {size} for "
                    f"shape {frame.shape} of {frame.dtype.str}"
                )
            out[:] = payload
        elif frame.encoding == "bslz4":
            self._decode_bslz4(frame, payload, out)
        elif frame.encoding == "lz4":
            self._decode_lz4(frame, payload, out)
        elif frame.encoding == "bszstd":
            with self._zstd_lock:
                out[:] = _decode_by_hdf5(frame, payload)
        else:
            raise UnsupportedEncoding(
                f"image {frame.image_id}: encoding {frame.encoding!r}; expected bslz4, lz4, "
                "bszstd or raw; the frame goes on unscored"
            )
        pixels = out.view(frame.dtype).reshape(frame.shape)
        if not frame.dtype.isnative:
            pixels = pixels.astype(frame.dtype.newbyteorder("="))
        return pixels

    def _decode_bslz4(
        self, frame: Frame, payload: NDArray[np.uint8], out: NDArray[np.uint8]
    ) -> None:
        at, block = _header(frame, payload, out.size) if frame.framed else (0, lz4.BLOCK_BYTES)
        if block % (8 * frame.dtype.itemsize):
            raise DecodeError(
                f"image {frame.image_id}: blocks of {block} bytes; expected a multiple of 8 "
                f"pixels of {frame.dtype.itemsize} bytes"
            )
        needed = min(block, out.size)
        if self._scratch.size < needed:
            self._scratch = np.empty(needed, np.uint8)
        code = lz4.decode_bslz4(payload, at, frame.dtype.itemsize, block, self._scratch, out)
        _raise_for(code, frame)

    def _decode_lz4(self, frame: Frame, payload: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
        if frame.framed:
            at, block = _header(frame, payload, out.size)
            _raise_for(lz4.decode_lz4(payload, at, block, out), frame)
            return
        written = lz4.lz4_block(payload, 0, payload.size, out, 0, out.size)
        _raise_for(3 if written < 0 else 4 if written != out.size else 0, frame)


def _header(frame: Frame, payload: NDArray[np.uint8], size: int) -> tuple[int, int]:
    """Where the blocks begin, and their size, from the 12-byte HDF5 header."""
    if payload.size < 12:
        raise DecodeError(
            f"image {frame.image_id}: {payload.size} bytes; expected at least the 12-byte header"
        )
    head = payload[:12].tobytes()
    claimed = int.from_bytes(head[:8], "big")
    block = int.from_bytes(head[8:], "big") or lz4.BLOCK_BYTES
    if claimed != size:
        raise DecodeError(
            f"image {frame.image_id}: the header claims {claimed} bytes; expected {size} for "
            f"shape {frame.shape} of {frame.dtype.str}"
        )
    if block > lz4.MAX_BLOCK_BYTES:
        raise DecodeError(
            f"image {frame.image_id}: blocks of {block} bytes; expected at most "
            f"{lz4.MAX_BLOCK_BYTES}"
        )
    return 12, block


def _raise_for(code: int, frame: Frame) -> None:
    if code:
        raise DecodeError(f"image {frame.image_id}, {frame.encoding}: {lz4.FAULTS[code]}")


def _decode_by_hdf5(frame: Frame, payload: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bitshuffle-zstd through HDF5's own filter: right, and slow."""
    import h5py
    import hdf5plugin

    if not frame.framed:
        raise UnsupportedEncoding(
            f"image {frame.image_id}: bszstd without its 12-byte header; expected one"
        )
    size = frame.shape[0] * frame.shape[1] * frame.dtype.itemsize
    _header(frame, payload, size)
    with h5py.File.in_memory() as file:
        dataset = file.create_dataset(
            "frame",
            frame.shape,
            frame.dtype,
            chunks=frame.shape,
            **hdf5plugin.Bitshuffle(cname="zstd"),
        )
        dataset.id.write_direct_chunk((0, 0), payload.tobytes())
        try:
            pixels = dataset[()]
        except OSError as err:
            raise DecodeError(f"image {frame.image_id}, bszstd: {err}") from err
    return np.ascontiguousarray(pixels).view(np.uint8).reshape(-1)


def _as_counts(pixels: NDArray[Any], bounds: Limits) -> tuple[NDArray[Any], Limits]:
    """Integers stay as they are; float photons are rounded half to even, NaN to an error value."""
    if pixels.dtype.kind != "f":
        return pixels, bounds
    error = -(2**40)
    usable = np.isfinite(pixels) & (pixels <= bounds.high)
    rounded = np.where(usable, np.rint(pixels), 0.0).astype(np.float64)
    counts = np.where(usable, np.maximum(rounded, 0.0), float(error)).astype(np.int64)
    return counts, Limits(high=bounds.high, error=error, negative_is_invalid=False)


@nb.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _reduce(
    pixels: NDArray[Any],
    invalid: NDArray[np.uint8],
    k: int,
    high: int,
    error: int,
    negative_is_invalid: bool,
    maximum: NDArray[np.uint32],
    total: NDArray[np.uint64],
    count: NDArray[np.uint16],
) -> None:
    ny, nx = pixels.shape
    masked = invalid.size > 0
    cells = (nx + k - 1) // k
    for y in range(ny):
        cy = y // k
        for cx in range(cells):
            best = np.int64(0)
            added = np.int64(0)
            n = 0
            for x in range(cx * k, min(nx, cx * k + k)):
                v = np.int64(pixels[y, x])
                if v > high or v == error or (masked and invalid[y, x] != 0):
                    continue
                if v < 0:
                    if negative_is_invalid:
                        continue
                    v = np.int64(0)
                n += 1
                added += v
                if v > best:
                    best = v
            if n:
                count[cy, cx] += np.uint16(n)
                total[cy, cx] += np.uint64(added)
                if np.uint32(best) > maximum[cy, cx]:
                    maximum[cy, cx] = np.uint32(best)


@nb.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _excess(m: int, s: int, n: int, expected: np.float32) -> np.float32:
    """Sigma by which a cell's maximum exceeds its other pixels, less what chance explains."""
    largest = np.float32(m)
    mean = np.float32(np.uint64(s) - np.uint64(m)) / np.float32(n - 1) if n > 1 else largest
    a = np.sqrt(largest + _ANSCOMBE)
    b = np.sqrt(mean + _ANSCOMBE)
    return np.float32(_F2 * (a - b) - expected)


@nb.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
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
            n = np.int64(count[y, x])
            if n == 0:
                continue
            e = _excess(maximum[y, x], total[y, x], n, expected)
            largest = np.float32(maximum[y, x])
            rest = np.uint64(total[y, x]) - np.uint64(maximum[y, x])
            mean = np.float32(rest) / np.float32(n - 1) if n > 1 else largest
            b = np.sqrt(mean + _ANSCOMBE)
            out[0, y, x] = e / np.sqrt(_F1 + abs(e))
            out[1, y, x] = (_F2 * b) / np.sqrt(_F1 + _F2 * b)
            out[2, y, x] = np.float32(n) / full


@nb.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
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
            n = np.int64(count[y, x])
            if n < half or n == 0:
                continue
            usable[b] += 1
            if _excess(maximum[y, x], total[y, x], n, expected) > _SPOT:
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


@nb.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
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
    # A window that would stand over the edge is moved inside where the frame is large enough.
    top = max(0, min(top, ny - size))
    left = max(0, min(left, nx - size))
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

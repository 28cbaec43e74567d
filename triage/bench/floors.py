"""What a stage is held against: the memory, the decompressor alone, and other people's libraries.

Each function gives a call on frame i, ready to take turns with ours. What is not installed is None
and is named in the record.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numba as nb
import numpy as np
from numpy.typing import NDArray

from triage.backends import lz4
from triage.backends.payload import open_payload
from triage.backends.recipe import limits
from triage.bench.frames import Pool, stamped
from triage.bench.measure import Call

__all__ = [
    "cbor_library",
    "dectris_decode",
    "dectris_numba_bin",
    "hdf5_numpy_bin",
    "lz4_alone",
    "memory_copy",
    "message_to_pixels",
    "warm_memory",
]


def memory_copy(sizes: list[int]) -> Call:
    """Copy so many bytes as frame i has: what touching them once each way costs."""
    source = np.zeros(max(sizes), np.uint8)
    target = np.zeros(max(sizes), np.uint8)
    return lambda i: np.copyto(target[: sizes[i]], source[: sizes[i]])


def cbor_library(pool: Pool) -> Call:
    """``cbor2.loads`` of image message i."""
    import cbor2

    messages = [stamped(t, 1, i) for i, t in enumerate(pool.templates)]
    return lambda i: cbor2.loads(messages[i])


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_DEFAULT_MMAPS = 65536


@contextmanager
def warm_memory() -> Iterator[bool]:
    """Let large buffers come from memory that this process has used before; whether they do.

    The C library of GNU gives an output of 32 MiB and more new pages on every call, whose faults
    can cost more than decoding into them.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        yield False
        return
    is_set = bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
    try:
        yield is_set
    finally:
        mallopt(_M_MMAP_MAX, _DEFAULT_MMAPS)


def dectris_decode(pool: Pool) -> Call | None:
    """dectris-compression's decoding into a buffer of its own, as its users call it."""
    try:
        from dectris.compression import decompress
    except ImportError:
        return None
    payloads = [bytes(frame.payload) for frame in pool.frames]
    size = pool.spec.bits // 8
    return lambda i: decompress(payloads[i], "bslz4", elem_size=size)


def message_to_pixels(pool: Pool) -> Call | None:
    """``cbor2.loads`` of message i, then dectris-compression on the bytes it gives."""
    try:
        from dectris.compression import decompress
    except ImportError:
        return None
    import cbor2

    messages = [stamped(t, 1, i) for i, t in enumerate(pool.templates)]

    def pixels(i: int) -> bytes:
        array = cbor2.loads(messages[i])["data"]["threshold_1"]
        algorithm, size, payload = array.value[1].value.value
        decoded: bytes = decompress(payload, algorithm, elem_size=size)
        return decoded

    return pixels


def dectris_numba_bin(pool: Pool, bin_factor: int) -> Call | None:
    """dectris-compression's decoding, then one compiled pass over the pixels.

    The pass gives what ours gives: largest, sum and number of valid pixels of each cell. What is
    valid of the mask is known beforehand, as one byte per pixel.
    """
    decode = dectris_decode(pool)
    if decode is None:
        return None
    frame = pool.frames[0]
    high = limits(frame.dtype, frame.series).high
    valid = np.ones(pool.shape, np.uint8)
    if frame.series.pixel_mask is not None:
        valid[frame.series.pixel_mask != 0] = 0
    cells = tuple(-(-side // bin_factor) for side in pool.shape)
    maximum, total = np.zeros(cells, np.uint32), np.zeros(cells, np.uint64)
    count = np.zeros(cells, np.uint16)
    columns = np.zeros((3, pool.shape[1]), np.int32 if frame.dtype.itemsize < 4 else np.int64)

    def reduced(i: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        pixels = np.frombuffer(decode(i), frame.dtype).reshape(pool.shape)  # type: ignore[call-overload]
        _bin(pixels, valid, bin_factor, columns.dtype.type(high), columns, maximum, total, count)
        return maximum, total, count

    return reduced


def hdf5_numpy_bin(pool: Pool, bin_factor: int) -> Call:
    """HDF5's own filter, then a maximum and a sum by numpy over the cells."""
    import h5py
    import hdf5plugin

    frame = pool.frames[0]
    options = hdf5plugin.Bitshuffle(cname="lz4")
    file = h5py.File.in_memory()
    data = file.create_dataset(
        "d",
        (len(pool.frames), *pool.shape),
        frame.dtype,
        chunks=(1, *pool.shape),
        **options,
    )
    for i, each in enumerate(pool.frames):
        data.id.write_direct_chunk((i, 0, 0), bytes(each.payload))
    high = limits(frame.dtype, frame.series).high
    mask = frame.series.pixel_mask
    masked = np.zeros(pool.shape, np.bool_) if mask is None else mask != 0
    k = bin_factor
    cells = tuple(-(-side // k) for side in pool.shape)
    padded = np.zeros((cells[0] * k, cells[1] * k), frame.dtype)

    def reduced(i: int) -> tuple[NDArray[Any], NDArray[Any]]:
        pixels = data[i]
        pixels[masked | (pixels > high)] = 0
        padded[: pool.shape[0], : pool.shape[1]] = pixels
        grid = padded.reshape(cells[0], k, cells[1], k)
        return grid.max((1, 3)), grid.sum((1, 3), dtype=np.uint64)

    return reduced


def lz4_alone(pool: Pool) -> tuple[Call, str]:
    """Decompress every block of frame i into one small buffer; and by whose code.

    The reference library where it can be loaded, called from compiled code so that nothing but
    its own time counts; else the product's own.
    """
    name = ctypes.util.find_library("lz4")
    spans = [_spans(frame) for frame in pool.frames]
    scratch = np.zeros(1 << 16, np.uint8)
    if name is None:
        return lambda i: _own_blocks(*spans[i], scratch), "own decoder"
    library = ctypes.CDLL(name)
    decompress = library.LZ4_decompress_safe
    decompress.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    decompress.restype = ctypes.c_int
    blocks = _library_blocks(decompress)
    library.LZ4_versionString.restype = ctypes.c_char_p
    version = library.LZ4_versionString().decode()
    return lambda i: blocks(*spans[i], scratch), f"liblz4 {version}"


def _spans(frame: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int32], int]:
    payload = open_payload(frame)
    blocks = -(-payload.whole // payload.block_bytes)
    starts, lengths = np.empty(blocks, np.int64), np.empty(blocks, np.int32)
    lz4.block_spans(payload.data, payload.at, payload.size - payload.whole, starts, lengths)
    return payload.data, starts, lengths, payload.block_bytes


@nb.njit(nogil=True)
def _own_blocks(
    data: NDArray[np.uint8],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int32],
    block_bytes: int,
    scratch: NDArray[np.uint8],
) -> int:
    written = 0
    for i in range(starts.size):
        end = starts[i] + lengths[i]
        written += lz4.lz4_block(data, starts[i], end, scratch, 0, block_bytes)
    return written


def _library_blocks(decompress: Any) -> Callable[..., int]:
    @nb.njit(nogil=True)
    def blocks(
        data: NDArray[np.uint8],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int32],
        block_bytes: int,
        scratch: NDArray[np.uint8],
    ) -> int:
        written = 0
        for i in range(starts.size):
            at = data.ctypes.data + starts[i]
            written += decompress(at, scratch.ctypes.data, lengths[i], block_bytes)
        return written

    compiled: Callable[..., int] = blocks
    return compiled


@nb.njit(nogil=True)
def _bin(
    pixels: NDArray[Any],
    valid: NDArray[np.uint8],
    k: int,
    high: Any,
    columns: NDArray[Any],
    maximum: NDArray[np.uint32],
    total: NDArray[np.uint64],
    count: NDArray[np.uint16],
) -> None:
    # Rows into column accumulators, which the compiler turns into vectors; then k at a time.
    ny, nx = pixels.shape
    best, added, number = columns[0], columns[1], columns[2]
    for cy in range((ny + k - 1) // k):
        columns[:] = 0
        for y in range(cy * k, min(ny, cy * k + k)):
            row, ok = pixels[y], valid[y]
            for x in range(nx):
                v = columns.dtype.type(row[x])
                use = (v <= high) & (ok[x] != 0)
                v = v if use else v - v
                number[x] += use
                added[x] += v
                best[x] = max(best[x], v)
        for cx in range((nx + k - 1) // k):
            m, s, n = np.int64(0), np.int64(0), np.int64(0)
            for x in range(cx * k, min(nx, cx * k + k)):
                m = max(m, np.int64(best[x]))
                s += np.int64(added[x])
                n += np.int64(number[x])
            maximum[cy, cx], total[cy, cx], count[cy, cx] = m, s, n

"""LZ4 and bitshuffle on the CPU, in numba: every read and write is checked first.

Formats: the LZ4 block format description (lz4 project); HDF5 filters 32004 (LZ4) and 32008
(bitshuffle), framed as :mod:`triage.backends.payload` tells. Bitshuffle puts bit j of byte b of
element i at bit ``i % 8`` of byte ``i // 8`` of plane ``8 b + j``; the elements left over behind
the last eight are raw.

A kernel returns 0, or a code of :data:`triage.backends.payload.FAULTS`; it never raises and holds
no GIL.
"""

from __future__ import annotations

import numba as nb
import numpy as np
from numpy.typing import NDArray

__all__ = ["block_spans", "decode_bslz4", "decode_lz4", "lz4_block"]

_CORRUPT = -1


@nb.njit(nogil=True, cache=True)
def lz4_block(
    src: NDArray[np.uint8], s: int, s_end: int, dst: NDArray[np.uint8], d: int, d_end: int
) -> int:
    """Decode one LZ4 block ``src[s:s_end]`` to ``dst[d:d_end]``; bytes written, or -1."""
    begin = d
    while s < s_end:
        token = src[s]
        s += 1
        literals = np.int64(token >> 4)
        if literals == 15:
            while True:
                if s >= s_end:
                    return _CORRUPT
                more = src[s]
                s += 1
                literals += np.int64(more)
                if more != 255:
                    break
        if literals > s_end - s or literals > d_end - d:
            return _CORRUPT
        for i in range(literals):
            dst[d + i] = src[s + i]
        s += int(literals)
        d += int(literals)
        if s == s_end:
            # The last sequence is literals alone.
            return d - begin
        if s_end - s < 2:
            return _CORRUPT
        offset = np.int64(src[s]) | (np.int64(src[s + 1]) << 8)
        s += 2
        if offset == 0 or offset > d - begin:
            return _CORRUPT
        length = np.int64(token & 15)
        if length == 15:
            while True:
                if s >= s_end:
                    return _CORRUPT
                more = src[s]
                s += 1
                length += np.int64(more)
                if more != 255:
                    break
        length += 4
        if length > d_end - d:
            return _CORRUPT
        if offset == 1:
            value = dst[d - 1]
            for i in range(length):
                dst[d + i] = value
        elif offset >= 8:
            # Runs of eight do not overlap their source, so they may be copied together.
            i = 0
            while i + 8 <= length:
                for j in range(8):
                    dst[d + i + j] = dst[d + i + j - offset]
                i += 8
            while i < length:
                dst[d + i] = dst[d + i - offset]
                i += 1
        else:
            for i in range(length):
                dst[d + i] = dst[d + i - offset]
        d += int(length)
    return _CORRUPT


@nb.njit(nogil=True, cache=True)
def _u32(src: NDArray[np.uint8], s: int) -> int:
    high = (np.int64(src[s]) << 24) | (np.int64(src[s + 1]) << 16)
    return int(high | (np.int64(src[s + 2]) << 8) | np.int64(src[s + 3]))


@nb.njit(nogil=True, cache=True)
def _unshuffle(
    planes: NDArray[np.uint8], elements: int, size: int, out: NDArray[np.uint8], at: int
) -> None:
    """Turn ``elements`` (a multiple of 8) of bit planes into elements at byte ``at``."""
    groups = elements // 8
    for b in range(size):
        base = b * 8 * groups
        used = np.uint8(0)
        for i in range(8 * groups):
            used |= planes[base + i]
        if used == 0:
            # High bytes of weak frames: whole planes are zero.
            for i in range(elements):
                out[at + i * size + b] = 0
            continue
        for g in range(groups):
            x = np.uint64(0)
            for j in range(8):
                x |= np.uint64(planes[base + j * groups + g]) << np.uint64(8 * j)
            if x != 0:
                # Transpose the 8 x 8 bits of x (Warren, Hacker's Delight, 7-3).
                t = (x ^ (x >> np.uint64(7))) & np.uint64(0x00AA00AA00AA00AA)
                x = x ^ t ^ (t << np.uint64(7))
                t = (x ^ (x >> np.uint64(14))) & np.uint64(0x0000CCCC0000CCCC)
                x = x ^ t ^ (t << np.uint64(14))
                t = (x ^ (x >> np.uint64(28))) & np.uint64(0x00000000F0F0F0F0)
                x = x ^ t ^ (t << np.uint64(28))
            o = at + g * 8 * size + b
            for j in range(8):
                out[o + j * size] = np.uint8((x >> np.uint64(8 * j)) & np.uint64(255))


@nb.njit(nogil=True, cache=True)
def decode_bslz4(
    src: NDArray[np.uint8],
    s: int,
    size: int,
    block_bytes: int,
    scratch: NDArray[np.uint8],
    out: NDArray[np.uint8],
) -> int:
    """Decode the blocks of ``src`` from byte ``s`` on into all of ``out``.

    ``size`` is the element size; ``block_bytes`` a multiple of 8 elements; ``scratch`` holds at
    least one block.
    """
    whole = (out.size // size) // 8 * 8 * size
    at = 0
    while at < whole:
        block = min(block_bytes, whole - at)
        if src.size - s < 4:
            return 1
        length = _u32(src, s)
        s += 4
        if length > src.size - s:
            return 2
        written = lz4_block(src, s, s + length, scratch, 0, block)
        if written < 0:
            return 3
        if written != block:
            return 4
        _unshuffle(scratch, block // size, size, out, at)
        s += length
        at += block
    tail = out.size - whole
    if src.size - s < tail:
        return 6
    for i in range(tail):
        out[whole + i] = src[s + i]
    return 0 if src.size - s == tail else 5


@nb.njit(nogil=True, cache=True)
def decode_lz4(src: NDArray[np.uint8], s: int, block_bytes: int, out: NDArray[np.uint8]) -> int:
    """Decode HDF5-framed LZ4 blocks from byte ``s`` on; a block of full length is stored raw."""
    at = 0
    while at < out.size:
        block = min(block_bytes, out.size - at)
        if src.size - s < 4:
            return 1
        length = _u32(src, s)
        s += 4
        if length > src.size - s:
            return 2
        if length == block:
            for i in range(block):
                out[at + i] = src[s + i]
        else:
            written = lz4_block(src, s, s + length, out, at, at + block)
            if written < 0:
                return 3
            if written != block:
                return 4
        s += length
        at += block
    return 0 if s == src.size else 5


@nb.njit(nogil=True, cache=True)
def block_spans(
    src: NDArray[np.uint8], s: int, tail: int, starts: NDArray[np.int64], lengths: NDArray[np.int32]
) -> int:
    """Find the compressed blocks: first byte and length of each, with ``tail`` bytes behind."""
    for i in range(starts.size):
        if src.size - s < 4:
            return 1
        length = _u32(src, s)
        s += 4
        if length > src.size - s:
            return 2
        starts[i] = s
        lengths[i] = length
        s += length
    if src.size - s < tail:
        return 6
    return 0 if src.size - s == tail else 5

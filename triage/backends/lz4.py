"""LZ4 and bitshuffle on the CPU, in numba: every read and write is checked first.

Formats: the LZ4 block format description (lz4 project); HDF5 filters 32004 (LZ4) and 32008
(bitshuffle), framed as :mod:`triage.backends.payload` tells. Bitshuffle puts bit j of byte b of
element i at bit ``i % 8`` of byte ``i // 8`` of plane ``8 b + j``; the elements left over behind
the last eight are raw.

A kernel returns 0, or a code of :data:`triage.backends.payload.FAULTS`; it never raises and holds
no GIL.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
from numpy.typing import NDArray

__all__ = ["block_spans", "decode_bslz4", "decode_lz4", "lz4_block", "u32"]

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
        # Unsigned indices spare numba's test for negative ones, so that copies vectorise.
        to, came = np.uint64(d), np.uint64(s)
        for i in range(np.uint64(literals)):
            dst[to + i] = src[came + i]
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
        to, came = np.uint64(d), np.uint64(d - offset)
        if offset == 1:
            value = dst[came]
            for i in range(np.uint64(length)):
                dst[to + i] = value
        else:
            for i in range(np.uint64(length)):
                dst[to + i] = dst[came + i]
        d += int(length)
    return _CORRUPT


@nb.njit(nogil=True, cache=True)
def u32(src: NDArray[np.uint8], s: int) -> int:
    """The big-endian number at byte ``s``."""
    high = (np.int64(src[s]) << 24) | (np.int64(src[s + 1]) << 16)
    return int(high | (np.int64(src[s + 2]) << 8) | np.int64(src[s + 3]))


@nb.njit(nogil=True, cache=True, inline="always")
def _swap(a: Any, b: Any, shift: Any, keep: Any) -> Any:
    """Exchange the upper bits of ``a`` with the lower bits of ``b``, in groups of 2 ``shift``."""
    t = ((a >> shift) ^ b) & keep
    return a ^ (t << shift), b ^ t


@nb.njit(nogil=True, cache=True)
def _transposed(
    a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any
) -> tuple[Any, Any, Any, Any, Any, Any, Any, Any]:
    """Transpose the 8 x 8 bits that each byte column of eight words holds.

    In words of planes, bit i of byte q of word j becomes bit j of byte q of word i (Warren,
    Hacker's Delight, 7-3, on eight matrices at once).
    """
    four, keep4 = np.uint64(4), np.uint64(0x0F0F0F0F0F0F0F0F)
    two, keep2 = np.uint64(2), np.uint64(0x3333333333333333)
    one, keep1 = np.uint64(1), np.uint64(0x5555555555555555)
    a, e = _swap(a, e, four, keep4)
    b, f = _swap(b, f, four, keep4)
    c, g = _swap(c, g, four, keep4)
    d, h = _swap(d, h, four, keep4)
    a, c = _swap(a, c, two, keep2)
    b, d = _swap(b, d, two, keep2)
    e, g = _swap(e, g, two, keep2)
    f, h = _swap(f, h, two, keep2)
    a, b = _swap(a, b, one, keep1)
    c, d = _swap(c, d, one, keep1)
    e, f = _swap(e, f, one, keep1)
    g, h = _swap(g, h, one, keep1)
    return a, b, c, d, e, f, g, h


@nb.njit(nogil=True, cache=True)
def _unshuffle(
    planes: NDArray[np.uint8], elements: int, size: int, out: NDArray[np.uint8], at: int
) -> None:
    """Turn ``elements`` (a multiple of 8) of bit planes into elements at byte ``at``."""
    groups = elements // 8
    # Words of eight groups where planes begin at a word; single groups otherwise.
    whole = groups // 8 if groups % 8 == 0 else 0
    words = planes.view(np.uint64)
    for b in range(size):
        for w in range(whole):
            p = b * 8 * whole + w
            x0, x1, x2, x3, x4, x5, x6, x7 = (
                words[p],
                words[p + whole],
                words[p + 2 * whole],
                words[p + 3 * whole],
                words[p + 4 * whole],
                words[p + 5 * whole],
                words[p + 6 * whole],
                words[p + 7 * whole],
            )
            if (x0 | x1 | x2 | x3 | x4 | x5 | x6 | x7) != 0:
                x0, x1, x2, x3, x4, x5, x6, x7 = _transposed(x0, x1, x2, x3, x4, x5, x6, x7)
            o = at + 64 * w * size + b
            for q in range(8):
                shift = np.uint64(8 * q)
                out[o] = np.uint8((x0 >> shift) & np.uint64(255))
                out[o + size] = np.uint8((x1 >> shift) & np.uint64(255))
                out[o + 2 * size] = np.uint8((x2 >> shift) & np.uint64(255))
                out[o + 3 * size] = np.uint8((x3 >> shift) & np.uint64(255))
                out[o + 4 * size] = np.uint8((x4 >> shift) & np.uint64(255))
                out[o + 5 * size] = np.uint8((x5 >> shift) & np.uint64(255))
                out[o + 6 * size] = np.uint8((x6 >> shift) & np.uint64(255))
                out[o + 7 * size] = np.uint8((x7 >> shift) & np.uint64(255))
                o += 8 * size
        for g in range(8 * whole, groups):
            o = at + g * 8 * size + b
            for i in range(8):
                value = np.int64(0)
                for j in range(8):
                    value |= ((np.int64(planes[(8 * b + j) * groups + g]) >> i) & 1) << j
                out[o + i * size] = value


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
    least one block, rounded up to 8 bytes, and is a multiple of them itself.
    """
    whole = (out.size // size) // 8 * 8 * size
    at = 0
    while at < whole:
        block = min(block_bytes, whole - at)
        if src.size - s < 4:
            return 1
        length = u32(src, s)
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
        length = u32(src, s)
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
        length = u32(src, s)
        s += 4
        if length > src.size - s:
            return 2
        starts[i] = s
        lengths[i] = length
        s += length
    if src.size - s < tail:
        return 6
    return 0 if src.size - s == tail else 5

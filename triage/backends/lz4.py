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
from llvmlite import ir
from numba import extending
from numpy.typing import NDArray

__all__ = [
    "block_spans",
    "decode_bslz4",
    "decode_lz4",
    "load8",
    "lz4_block",
    "mask32",
    "store8",
    "u32",
]

_CORRUPT = -1
_intrinsic: Any = extending.intrinsic


def _at(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """The address of a byte of a contiguous array."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


@_intrinsic  # type: ignore[untyped-decorator]
def load8(typing_context: Any, src: Any, s: Any) -> Any:
    """Eight bytes from ``src[s]`` on, the first lowest."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _at(context, builder, signature.args[0], args[0], args[1])
        word = ir.IntType(64)
        return builder.load(builder.bitcast(address, word.as_pointer()), align=1)

    return nb.uint64(src, nb.int64), build


@_intrinsic  # type: ignore[untyped-decorator]
def store8(typing_context: Any, dst: Any, d: Any, word: Any) -> Any:
    """Put eight bytes, the first lowest, to ``dst[d]`` and on."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _at(context, builder, signature.args[0], args[0], args[1])
        builder.store(args[2], builder.bitcast(address, ir.IntType(64).as_pointer()), align=1)
        return context.get_dummy_value()

    return nb.void(dst, nb.int64, nb.uint64), build


@_intrinsic  # type: ignore[untyped-decorator]
def _copy32(typing_context: Any, dst: Any, d: Any, src: Any, s: Any) -> Any:
    """Copy 32 bytes, all read before the first is written."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.IntType(8), 32).as_pointer()
        source = _at(context, builder, signature.args[2], args[2], args[3])
        target = _at(context, builder, signature.args[0], args[0], args[1])
        piece = builder.load(builder.bitcast(source, vector), align=1)
        builder.store(piece, builder.bitcast(target, vector), align=1)
        return context.get_dummy_value()

    return nb.void(dst, nb.int64, src, nb.int64), build


@_intrinsic  # type: ignore[untyped-decorator]
def mask32(typing_context: Any, dst: Any, d: Any, src: Any, s: Any, mask: Any, m: Any) -> Any:
    """Put 32 bytes of ``src``, each and that of ``mask``, to ``dst``."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.IntType(8), 32).as_pointer()
        target, source, let_through = (
            builder.bitcast(_at(context, builder, signature.args[i], args[i], args[i + 1]), vector)
            for i in (0, 2, 4)
        )
        piece = builder.and_(builder.load(source, align=1), builder.load(let_through, align=1))
        builder.store(piece, target, align=1)
        return context.get_dummy_value()

    return nb.void(dst, nb.int64, src, nb.int64, mask, nb.int64), build


_PERIODS = range(10)
"""Of offsets up to 8, with which bytes repeat in a word; 9 stands for all that are longer."""
_OF_PERIOD = np.array([(1 << 8 * min(n, 8)) - 1 for n in _PERIODS], np.uint64)
"""By period: the bytes of one, in a word."""
_REPEATED = np.array(
    [sum(1 << 8 * i for i in range(0, 8, n)) if n else 0 for n in _PERIODS[:9]] + [1], np.uint64
)
"""By period: what one is multiplied with to fill a word."""
_STEP = np.array([8 - 8 % n if n else 0 for n in _PERIODS[:9]] + [8], np.int64)
"""By period: the bytes of as many whole ones as a word holds."""


@nb.njit(nogil=True, cache=True)
def lz4_block(
    src: NDArray[np.uint8], s: Any, s_end: int, dst: NDArray[np.uint8], d: Any, d_end: int
) -> int:
    """Decode one LZ4 block ``src[s:s_end]`` to ``dst[d:d_end]``; bytes written, or -1.

    Bytes of ``dst`` behind ``d_end`` may be written too. Copies go in whole words where both
    arrays have room for them, and byte by byte at their ends.
    """
    begin = d
    # From here on a copy in pieces of 32 bytes could leave an array.
    s_last, d_last = src.size - 32, dst.size - 64
    while s < s_end:
        token = np.int64(src[s])
        s += 1
        length: Any = token >> 4
        if length == 15:
            while True:
                if s >= s_end:
                    return _CORRUPT
                more = np.int64(src[s])
                s += 1
                length += more
                if more != 255:
                    break
        if length > s_end - s or length > d_end - d:
            return _CORRUPT
        if s + length <= s_last and d + length <= d_last:
            _copy32(dst, d, src, s)
            for i in range(32, length, 32):
                _copy32(dst, d + i, src, s + i)
        else:
            for i in range(length):
                dst[d + i] = src[s + i]
        s += length
        d += length
        if s == s_end:
            # The last sequence is literals alone.
            return int(d - begin)
        if s_end - s < 2:
            return _CORRUPT
        offset = np.int64(src[s]) | (np.int64(src[s + 1]) << 8)
        s += 2
        if offset == 0 or offset > d - begin:
            return _CORRUPT
        length, came = (token & 15) + 4, d - offset
        period: Any = min(offset, 9)
        if length <= 16 and d + length <= min(d_last, d_end):
            # Most matches are short, at any offset: they take one way, without a branch on it.
            word = (load8(dst, came) & _OF_PERIOD[period]) * _REPEATED[period]
            step = _STEP[period]
            store8(dst, d, word)
            behind = load8(dst, came + 8)
            word = behind if offset > 8 else word
            store8(dst, d + step, word)
            store8(dst, d + 2 * step, word)
            d += length
            continue
        if length == 19:
            while True:
                if s >= s_end:
                    return _CORRUPT
                more = np.int64(src[s])
                s += 1
                length += more
                if more != 255:
                    break
        if length > d_end - d:
            return _CORRUPT
        stop = d + length
        if stop > d_last:
            for i in range(length):
                dst[d + i] = dst[came + i]
        elif offset >= 32:
            _copy32(dst, d, dst, came)
            for i in range(32, length, 32):
                _copy32(dst, d + i, dst, came + i)
        elif offset > 8:
            for i in range(0, length, 8):
                store8(dst, d + i, load8(dst, came + i))
        else:
            # A short period: whole ones, as many as a word holds, are stored at a time.
            word = (load8(dst, came) & _OF_PERIOD[period]) * _REPEATED[period]
            for i in range(d, stop, _STEP[period]):
                store8(dst, i, word)
        d = stop
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
    """Decode the blocks of ``src`` from byte ``s`` on to their places in ``out``.

    ``size`` is the element size; ``block_bytes`` a multiple of 8 elements; ``scratch`` holds at
    least one block, rounded up to 8 bytes, and is a multiple of them itself.
    """
    whole = (out.size // size) // 8 * 8 * size
    for number in range((whole + block_bytes - 1) // block_bytes):
        at = number * block_bytes
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

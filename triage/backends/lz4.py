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
    "load1",
    "load2",
    "load4",
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


def _loader(bits: int, kind: Any) -> Any:
    """What gives the number of so many bits from ``src[s]`` on, its first byte lowest.

    Unlike an index, ``s`` is not asked whether it counts from the end.
    """

    def load(typing_context: Any, src: Any, s: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            address = _at(context, builder, signature.args[0], args[0], args[1])
            number = builder.bitcast(address, ir.IntType(bits).as_pointer())
            return builder.zext(builder.load(number, align=1), ir.IntType(64))

        return kind(src, nb.int64), build

    return _intrinsic(load)


load1, load2, load4 = (_loader(bits, nb.int64) for bits in (8, 16, 32))
load8 = _loader(64, nb.uint64)


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
        token = load1(src, s)
        s += 1
        length: Any = token >> 4
        if length == 15:
            while True:
                if s >= s_end:
                    return _CORRUPT
                more = load1(src, s)
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
        offset = load2(src, s)
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
                more = load1(src, s)
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


_BIT_SWAPS = ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0))
"""Shifts and masks that transpose the 8 x 8 bits of a word (Warren, Hacker's Delight, 7-3)."""


def _bytes_of_64(builder: Any, planes: Any, plane_bytes: Any) -> Any:
    """64 bytes of elements, as a vector, from eight bytes of each of the planes of their bits."""
    word, index = ir.IntType(64), ir.IntType(64)
    words = ir.VectorType(word, 8)
    gathered = words(ir.Undefined)
    for j in range(8):
        address = builder.gep(planes, [builder.mul(plane_bytes, index(j))])
        one = builder.load(builder.bitcast(address, word.as_pointer()), align=1)
        gathered = builder.insert_element(gathered, one, ir.IntType(32)(j))
    # Byte q of every plane side by side: the bits of elements 8 q to 8 q + 7.
    bytes_ = builder.bitcast(gathered, ir.VectorType(ir.IntType(8), 64))
    order = [8 * j + q for q in range(8) for j in range(8)]
    x = builder.bitcast(_shuffled(builder, bytes_, bytes_, order), words)
    for shift, mask in _BIT_SWAPS:
        by, keep = words([shift] * 8), words([mask] * 8)
        t = builder.and_(builder.xor(x, builder.lshr(x, by)), keep)
        x = builder.xor(x, builder.xor(t, builder.shl(t, by)))
    return builder.bitcast(x, ir.VectorType(ir.IntType(8), 64))


def _shuffled(builder: Any, a: Any, b: Any, order: list[int]) -> Any:
    kind = ir.VectorType(ir.IntType(32), len(order))
    return builder.shuffle_vector(a, b, kind(order))


def _interleaved(builder: Any, a: Any, b: Any) -> Any:
    """Items of two vectors in turn."""
    size = a.type.count
    return _shuffled(builder, a, b, [i + side * size for i in range(size) for side in (0, 1)])


def _unshuffler(size: int) -> Any:
    """What turns 64 elements of ``size`` bytes from planes to elements."""

    def unshuffle64(
        typing_context: Any, planes: Any, plane: Any, plane_bytes: Any, out: Any, at: Any
    ) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source = _at(context, builder, signature.args[0], args[0], args[1])
            target = _at(context, builder, signature.args[3], args[3], args[4])
            of_byte = []
            for b in range(size):
                first = builder.mul(args[2], ir.IntType(64)(8 * b))
                of_byte.append(_bytes_of_64(builder, builder.gep(source, [first]), args[2]))
            if size == 1:
                elements = of_byte[0]
            elif size == 2:
                elements = _interleaved(builder, *of_byte)
            else:
                even = _interleaved(builder, of_byte[0], of_byte[2])
                odd = _interleaved(builder, of_byte[1], of_byte[3])
                elements = _interleaved(builder, even, odd)
            builder.store(elements, builder.bitcast(target, elements.type.as_pointer()), align=1)
            return context.get_dummy_value()

        whole = nb.int64
        return nb.void(planes, whole, whole, out, whole), build

    return _intrinsic(unshuffle64)


_unshuffle64_of_1, _unshuffle64_of_2, _unshuffle64_of_4 = (_unshuffler(size) for size in (1, 2, 4))


@nb.njit(nogil=True, cache=True)
def _unshuffle(
    planes: NDArray[np.uint8], elements: int, size: int, out: NDArray[np.uint8], at: int
) -> None:
    """Turn ``elements`` (a multiple of 8) of bit planes into elements at byte ``at``."""
    groups = elements // 8
    vectors = groups // 8 if size in (1, 2, 4) else 0
    if size == 1:
        for w in range(vectors):
            _unshuffle64_of_1(planes, 8 * w, groups, out, at + 64 * w)
    elif size == 2:
        for w in range(vectors):
            _unshuffle64_of_2(planes, 8 * w, groups, out, at + 128 * w)
    elif size == 4:
        for w in range(vectors):
            _unshuffle64_of_4(planes, 8 * w, groups, out, at + 256 * w)
    for g in range(8 * vectors, groups):
        for b in range(size):
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

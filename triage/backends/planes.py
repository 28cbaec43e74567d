"""The reduction of ``_reduce.c`` in numba: the same integers and faults, without a compiler.

Words of 64 pixels stand in for the wider vectors of C, in registers and not in arrays.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
from numpy.typing import NDArray

from triage.backends.lz4 import load8, lz4_block, mask32, store8, u32

__all__ = ["PROCESSOR", "reduce", "workspace_bytes"]

PROCESSOR = "numba"

BAD_PLANE = 32
PLANES = 33
_SCRATCH = 76 + PLANES
"""Words that the reduction of a band works in."""

_U = np.uint64
_ONE = np.uint64(1)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_NO_MASK = np.empty(0, np.uint8)
_BYTES = np.uint64(0x0101010101010101)
_EVEN = np.uint64(0x00FF00FF00FF00FF)
_2, _4, _8, _16 = np.uint64(2), np.uint64(4), np.uint64(8), np.uint64(16)
_55, _33 = np.uint64(0x5555555555555555), np.uint64(0x3333333333333333)
_0F, _11 = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0x1111111111111111)


def workspace_bytes(bits: int, nx: int, k: int, block_bytes: int) -> int:
    """Bytes of the workspace that :func:`reduce` needs for frames ``nx`` pixels wide."""
    plane_bytes = block_bytes // bits
    return block_bytes + 64 + 4 * plane_bytes + 8 + 8 * PLANES * _band_words(nx, k, plane_bytes)


def _band_words(nx: int, k: int, plane_bytes: int) -> int:
    return (min(k, 8) + 1) * nx // 64 + plane_bytes // 8 + 8


def reduce(
    payload: NDArray[np.uint8],
    at: int,
    bits: int,
    is_signed: bool,
    big_endian: bool,
    ny: int,
    nx: int,
    block_bytes: int,
    k: int,
    high: int,
    error: int,
    negative_is_invalid: bool,
    valid: NDArray[np.uint8] | None,
    valid_count: NDArray[np.uint16],
    workspace: NDArray[np.uint8],
    maximum: NDArray[np.uint32],
    total: NDArray[np.uint64],
    count: NDArray[np.uint16],
) -> int:
    """As ``_reduce.reduce`` of C, in the same order of arguments."""
    maximum[:] = 0
    total[:] = 0
    count[:] = valid_count
    plane_bytes = block_bytes // bits
    words = _band_words(nx, k, plane_bytes)
    planes = workspace[: 8 * PLANES * words].view(np.uint64).reshape(PLANES, words)
    behind = workspace[8 * PLANES * words :]
    spare = behind[: 4 * plane_bytes].reshape(4, plane_bytes)
    spare[3] = 255
    block = behind[4 * plane_bytes :][: block_bytes + 64]
    code: int = _reduce_frame(
        payload, at, bits, is_signed, big_endian, ny, nx, block_bytes, k, high, error,
        negative_is_invalid, _NO_MASK if valid is None else valid, block, spare, planes,
        maximum, total, count,
    )  # fmt: skip
    return code


@nb.njit(nogil=True, cache=True, inline="always")
def _add(a: Any, b: Any, c: Any) -> Any:
    """Three bits in each place: their sum and their carry."""
    half = a ^ b
    return half ^ c, (a & b) | (half & c)


@nb.njit(nogil=True, cache=True, inline="always")
def _field_ones(x: Any, field: int) -> Any:
    """Ones in each field of 8, 4 or 2 bits, in that field."""
    x = x - ((x >> _ONE) & _55)
    if field == 2:
        return x
    x = (x & _33) + ((x >> _2) & _33)
    if field == 4:
        return x
    return (x + (x >> _4)) & _0F


@nb.njit(nogil=True, cache=True, inline="always")
def _filled(x: Any, field: int) -> Any:
    """All ones in each field that has any."""
    if field == 8:
        x = x | ((x >> _4) & _0F)
        x = x | ((x >> _2) & _33)
        x = (x | (x >> _ONE)) & _BYTES
        return (x << _8) - x
    if field == 4:
        x = x | ((x >> _2) & _33)
        x = (x | (x >> _ONE)) & _11
        return (x << _4) - x
    x = (x | (x >> _ONE)) & _55
    return x | (x << _ONE)


@nb.njit(nogil=True, cache=True)
def _any_set(
    planes: NDArray[np.uint8], first: int, last: int, mask: NDArray[np.uint8], at: Any, size: int
) -> bool:
    """Whether a plane of ``size`` bytes in [first, last) has a one where mask[at:] has."""
    words = size // 8 * 8
    found = np.uint64(0)
    for plane in range(first * size, last * size, size):
        for i in range(0, words, 8):
            found |= load8(planes, plane + i) & load8(mask, at + i)
        for i in range(words, size):
            found |= np.uint64(planes[plane + i] & mask[at + i])
    return bool(found != 0)


@nb.njit(nogil=True, cache=True)
def _judge(
    planes: NDArray[np.uint8],
    bits: int,
    is_signed: bool,
    high: int,
    has_error: bool,
    error: int,
    negative_is_invalid: bool,
    mask: NDArray[np.uint8],
    bad: NDArray[np.uint8],
    keep: NDArray[np.uint8],
    equal: NDArray[np.uint8],
) -> None:
    """Which pixels are no measurement though the mask lets them through, and which count."""
    bytes_ = mask.size
    bad[:] = 0
    equal[:] = 255
    for p in range(bits - 1, -1, -1):
        plane = planes[p * bytes_ : (p + 1) * bytes_]
        # Two's complements compare like unsigned numbers once the sign is turned over.
        turn = np.uint8(255) if is_signed and p == bits - 1 else np.uint8(0)
        if ((high >> p) & 1 == 1) != (turn == 255):
            for i in range(bytes_):
                equal[i] &= plane[i] ^ turn
        else:
            for i in range(bytes_):
                one = plane[i] ^ turn
                bad[i] |= equal[i] & one
                equal[i] &= ~one
    if has_error:
        equal[:] = 255
        for p in range(bits - 1, -1, -1):
            plane = planes[p * bytes_ : (p + 1) * bytes_]
            turn = np.uint8(0) if (error >> p) & 1 == 1 else np.uint8(255)
            for i in range(bytes_):
                equal[i] &= plane[i] ^ turn
        for i in range(bytes_):
            bad[i] |= equal[i]
    sign = planes[(bits - 1) * bytes_ : bits * bytes_]
    for i in range(bytes_):
        negative = sign[i] if is_signed else np.uint8(0)
        if negative_is_invalid:
            bad[i] |= negative
        bad[i] &= mask[i]
        keep[i] = mask[i] & ~bad[i] & ~negative


@nb.njit(nogil=True, cache=True, inline="always")
def _put(
    to: NDArray[np.uint8],
    flat: NDArray[np.uint8],
    in_use: NDArray[np.bool_],
    p: int,
    behind: Any,
    planes: NDArray[np.uint8],
    plane: int,
    mask: NDArray[np.uint8],
    at: Any,
    size: int,
) -> None:
    """Put ``size`` bytes from planes[plane:], masked by mask[at:], behind what is there of p.

    ``flat`` is ``to`` in one dimension.
    """
    if not in_use[p]:
        to[p, :behind] = 0
        in_use[p] = True
    start = p * to.shape[1] + behind
    pieces = size // 32 * 32
    for i in range(0, pieces, 32):
        mask32(flat, start + i, planes, plane + i, mask, at + i)
    for i in range(pieces, size):
        flat[start + i] = planes[plane + i] & mask[at + i]


@nb.njit(nogil=True, cache=True)
def _turn_bytes(planes: NDArray[np.uint8], item: int, bytes_: int) -> None:
    """Put the planes of big-endian pixels in the order of their bits."""
    byte = 8 * bytes_
    for low in range(item // 2):
        high = item - 1 - low
        for i in range(byte):
            one = planes[low * byte + i]
            planes[low * byte + i] = planes[high * byte + i]
            planes[high * byte + i] = one


@nb.njit(nogil=True, cache=True, inline="always")
def _reduce_word(
    planes: NDArray[np.uint64],
    words: int,
    used: NDArray[np.uint64],
    n_used: int,
    row_word: NDArray[np.uint64],
    row_shift: NDArray[np.uint64],
    at: Any,
    last: Any,
    field: int,
    row: NDArray[np.uint64],
    sums: NDArray[np.uint64],
    tops: NDArray[np.uint64],
) -> int:
    """Reduce 64 pixels of each row of a band; the highest plane that has a one, or -1.

    A band has as many rows as a field has bits. ``planes`` has ``words`` of each plane, one plane
    behind the other. ``sums`` (4, 4, 2) holds sums of 16 bits, by ten planes, field of a byte,
    and even or odd byte; ``tops`` (5, 4) maxima, by byte of the value and field of a byte.
    ``row`` is scratch, with zeros behind the rows of a band.
    """
    c0 = c1 = c2 = c3 = c4 = c5 = c6 = c7 = _ALL
    highest: Any = -1
    only = _U((1 << field) - 1) * _BYTES
    fields = 8 // field
    for n in range(n_used):
        p = used[n]
        first = p * np.uint64(words) + at
        some = _U(0)
        for y in range(field):
            w, shift = first + row_word[y], row_shift[y]
            # Shifted twice, because a shift by 64 is no shift.
            word = (planes[w] >> shift) | ((planes[w + _ONE] << (np.uint64(63) - shift)) << _ONE)
            word &= last
            row[y] = word
            some |= word
        if some == 0:
            continue
        highest = max(highest, np.int64(p))
        r0, r1, r2, r3 = row[0], row[1], row[2], row[3]
        r4, r5, r6, r7 = row[4], row[5], row[6], row[7]
        # The rows are added as bits (Harley and Seal; Warren, Hacker's Delight, 5-1).
        s, a = _add(r0, r1, r2)
        t, b = _add(r3, r4, r5)
        s, c = _add(s, t, r6)
        ones, d = s ^ r7, s & r7
        s, e = _add(a, b, c)
        twos, g = s ^ d, s & d
        ones, twos = _field_ones(ones, field), _field_ones(twos, field)
        fours, eights = _field_ones(e ^ g, field), _field_ones(e & g, field)
        group = p // _U(10)
        shift = p - _U(10) * group
        for j in range(fields):
            down = np.uint64(j * field)
            number = (ones >> down) & only
            number += ((twos >> down) & only) << _ONE
            number += ((fours >> down) & only) << _2
            number += ((eights >> down) & only) << np.uint64(3)
            sums[group, j, 0] += (number & _EVEN) << shift
            sums[group, j, 1] += ((number >> _8) & _EVEN) << shift
        left = (c0 & r0) | (c1 & r1) | (c2 & r2) | (c3 & r3)
        left |= (c4 & r4) | (c5 & r5) | (c6 & r6) | (c7 & r7)
        has = _filled(left, field)
        out = ~has
        c0 &= r0 | out
        c1 &= r1 | out
        c2 &= r2 | out
        c3 &= r3 | out
        c4 &= r4 | out
        c5 &= r5 | out
        c6 &= r6 | out
        c7 &= r7 | out
        for j in range(fields):
            tops[p >> _U(3), j] |= ((has >> np.uint64(j * field)) & _BYTES) << (p & _U(7))
    return int(highest)


@nb.njit(nogil=True, cache=True, inline="always")
def _reduce_band(
    planes: NDArray[np.uint64],
    words: int,
    used: NDArray[np.uint64],
    n_used: int,
    has_bad: bool,
    row_word: NDArray[np.uint64],
    row_shift: NDArray[np.uint64],
    nx: int,
    field: int,
    per_cell: int,
    row: NDArray[np.uint64],
    sums: NDArray[np.uint64],
    tops: NDArray[np.uint64],
    maximum: NDArray[np.uint32],
    total: NDArray[np.uint64],
    count: NDArray[np.uint16],
) -> None:
    """Reduce one band into its row of cells; ``per_cell`` is the binary logarithm of k / field."""
    fields = 8 // field
    edge = _ALL if nx % 64 == 0 else (_ONE << np.uint64(nx % 64)) - _ONE
    fields_of_row = (nx + field - 1) // field
    words_of_row = (nx + 63) // 64
    only_bad = used[PLANES - 1 :]
    only_bad[0] = BAD_PLANE
    for w in range(words_of_row):
        last = edge if w == words_of_row - 1 else _ALL
        cell = w * 8 * fields
        highest = _reduce_word(
            planes, words, used, n_used, row_word, row_shift, np.uint64(w), last, field, row,
            sums, tops,
        )  # fmt: skip
        if highest >= 0:
            groups, bytes_ = highest // 10 + 1, highest // 8 + 1
            for j in range(fields):
                for byte in range(min(8, (fields_of_row - cell - j + fields - 1) // fields)):
                    cx = np.uint64((cell + byte * fields + j) >> per_cell)
                    half, shift = byte & 1, np.uint64(byte >> 1 << 4)
                    whole = (sums[0, j, half] >> shift) & np.uint64(0xFFFF)
                    for g in range(1, groups):
                        part = (sums[g, j, half] >> shift) & np.uint64(0xFFFF)
                        whole += part << np.uint64(10 * g)
                    best = (tops[0, j] >> np.uint64(8 * byte)) & np.uint64(0xFF)
                    for g in range(1, bytes_):
                        part = (tops[g, j] >> np.uint64(8 * byte)) & np.uint64(0xFF)
                        best |= part << np.uint64(8 * g)
                    total[cx] += whole
                    maximum[cx] = max(maximum[cx], np.uint32(best))
            sums[:groups] = 0
            tops[:bytes_] = 0
        if has_bad:
            _reduce_word(
                planes, words, only_bad, 1, row_word, row_shift, np.uint64(w), last, field, row,
                sums, tops,
            )  # fmt: skip
            for j in range(fields):
                for byte in range(min(8, (fields_of_row - cell - j + fields - 1) // fields)):
                    cx = np.uint64((cell + byte * fields + j) >> per_cell)
                    # The plane's number is 10 * 3 + 2: its ones weigh four in the last group.
                    part = sums[3, j, byte & 1] >> np.uint64(byte >> 1 << 4)
                    count[cx] -= np.uint16((part & np.uint64(0xFFFF)) >> _2)
            sums[:] = 0
            tops[:] = 0


@nb.njit(nogil=True, cache=True)
def _reduce_bands(
    planes: NDArray[np.uint64],
    in_use: NDArray[np.bool_],
    state: NDArray[np.int64],
    bits: int,
    ny: int,
    nx: int,
    k: int,
    scratch: NDArray[np.uint64],
    maximum: NDArray[np.uint32],
    total: NDArray[np.uint64],
    count: NDArray[np.uint16],
) -> None:
    """Reduce every band whose rows are all there; ``state`` is base, filled and next row.

    ``scratch`` are :data:`_SCRATCH` zeros, and stay zeros where they must.
    """
    field = min(k, 8)
    per_cell = 0
    while field << per_cell < k:
        per_cell += 1
    row_word, row_shift, row = scratch[:8], scratch[8:16], scratch[16:24]
    sums, tops = scratch[24:56].reshape(4, 4, 2), scratch[56:76].reshape(5, 4)
    used = scratch[76:_SCRATCH]
    flat, words = planes.reshape(planes.size), planes.shape[1]
    of_bytes = planes.view(np.uint8)
    flat_bytes = of_bytes.reshape(of_bytes.size)
    base, filled, y = state[0], state[1], state[2]
    while y < ny:
        end = min(y + field, ny)
        if filled < end * nx:
            break
        for i in range(field):
            bit = np.uint64((y + i) * nx - base)
            if y + i >= end:
                # The band at the lower edge has fewer rows: rows of zeros stand for the rest.
                bit = np.uint64((filled - base + 63) // 64 * 64)
            row_word[i], row_shift[i] = bit >> np.uint64(6), bit & np.uint64(63)
        if end - y < field:
            empty = (filled - base + 7) // 8
            for p in range(PLANES):
                if in_use[p]:
                    of_bytes[p, empty : empty + nx // 8 + 24] = 0
        n_used = 0
        for p in range(bits - 1, -1, -1):
            if in_use[p]:
                used[n_used] = p
                n_used += 1
        maximum_row, total_row, count_row = maximum[y // k], total[y // k], count[y // k]
        bad = in_use[BAD_PLANE]
        # The size of a field stands in the call, so that each is compiled for its own.
        if field == 8:
            _reduce_band(
                flat, words, used, n_used, bad, row_word, row_shift, nx, 8, per_cell, row, sums,
                tops, maximum_row, total_row, count_row,
            )  # fmt: skip
        elif field == 4:
            _reduce_band(
                flat, words, used, n_used, bad, row_word, row_shift, nx, 4, per_cell, row, sums,
                tops, maximum_row, total_row, count_row,
            )  # fmt: skip
        else:
            _reduce_band(
                flat, words, used, n_used, bad, row_word, row_shift, nx, 2, per_cell, row, sums,
                tops, maximum_row, total_row, count_row,
            )  # fmt: skip
        y = end
    if y == state[2]:
        return
    base_now = y * nx // 8 * 8
    gone, left = (base_now - base) // 8, (filled - base_now + 7) // 8
    for p in range(PLANES):
        if not in_use[p]:
            continue
        # Words from the first on: what one overwrites no later one reads. Behind the last byte
        # lies room for a word.
        start, some = p * of_bytes.shape[1], np.uint64(0)
        for i in range(start, start + left, 8):
            word = load8(flat_bytes, i + gone)
            store8(flat_bytes, i, word)
            some |= word
        in_use[p] = some != 0
    state[0], state[2] = base_now, y


@nb.njit(nogil=True, cache=True)
def _append(
    block: NDArray[np.uint8],
    bytes_: int,
    pixels: int,
    bits: int,
    is_signed: bool,
    high: int,
    has_error: bool,
    error: int,
    negative_is_invalid: bool,
    certain: int,
    judge_all: bool,
    valid: NDArray[np.uint8],
    spare: NDArray[np.uint8],
    planes: NDArray[np.uint8],
    in_use: NDArray[np.bool_],
    state: NDArray[np.int64],
) -> None:
    """Take in the planes of ``pixels`` pixels, ``bytes_`` bytes each."""
    behind = (state[1] - state[0]) // 8
    flat = planes.reshape(planes.size)
    ones = spare[3]
    # The mask of this block: where it begins in which array.
    mask, at = (valid, state[1] // 8) if valid.size else (ones, np.int64(0))
    limit, any_bad = bits, False
    while limit > 0 and not in_use[limit - 1]:
        limit -= 1
    if judge_all or limit > certain or _any_set(block, limit, bits, mask, at, bytes_):
        limit = bits
        if judge_all or _any_set(block, certain, bits, mask, at, bytes_):
            _judge(
                block, bits, is_signed, high, has_error, error, negative_is_invalid,
                mask[at : at + bytes_], spare[0], spare[1], spare[2],
            )  # fmt: skip
            any_bad = _any_set(spare[0], 0, 1, ones, 0, bytes_)
            mask, at = spare[1], np.int64(0)
    for p in range(bits):
        if p < limit and (in_use[p] or _any_set(block, p, p + 1, mask, at, bytes_)):
            _put(planes, flat, in_use, p, behind, block, p * bytes_, mask, at, bytes_)
        elif in_use[p]:
            planes[p, behind : behind + bytes_] = 0
    if any_bad:
        _put(planes, flat, in_use, BAD_PLANE, behind, spare[0], 0, ones, np.int64(0), bytes_)
    elif in_use[BAD_PLANE]:
        planes[BAD_PLANE, behind : behind + bytes_] = 0
    state[1] += pixels


@nb.njit(nogil=True, cache=True)
def _reduce_frame(
    src: NDArray[np.uint8],
    s: int,
    bits: int,
    is_signed: bool,
    big_endian: bool,
    ny: int,
    nx: int,
    block_bytes: int,
    k: int,
    high: int,
    error: int,
    negative_is_invalid: bool,
    valid: NDArray[np.uint8],
    block: NDArray[np.uint8],
    spare: NDArray[np.uint8],
    planes: NDArray[np.uint64],
    maximum: NDArray[np.uint32],
    total: NDArray[np.uint64],
    count: NDArray[np.uint16],
) -> int:
    item = bits // 8
    pixels = ny * nx
    whole = pixels // 8 * 8
    top = bits - 1 if is_signed else bits
    has_error = bool(-(1 << top) * np.int64(is_signed) <= error < (1 << top))
    certain = 0
    while high >= 0 and (2 << certain) - 1 <= high:
        certain += 1
    judge_all = bool(high < 0 or (has_error and error >= 0 and error >> certain == 0))
    in_use = np.zeros(PLANES, np.bool_)
    state = np.zeros(3, np.int64)
    scratch = np.zeros(_SCRATCH, np.uint64)
    bytes_of_planes = planes.view(np.uint8)
    for part in range(2):
        # First the blocks, then the raw pixels behind the last whole eight.
        until = whole if part == 0 else pixels
        while state[1] < until:
            n = min(block_bytes // item, until - state[1])
            if part == 0:
                if src.size - s < 4:
                    return 1
                length = u32(src, s)
                s += 4
                if length > src.size - s:
                    return 2
                written = lz4_block(src, s, s + length, block, 0, n * item)
                if written < 0:
                    return 3
                if written != n * item:
                    return 4
                s += length
            else:
                if src.size - s < n * item:
                    return 6
                block[:bits] = 0
                for i in range(n):
                    for bit in range(bits):
                        one = (src[s + i * item + bit // 8] >> (bit % 8)) & 1
                        block[bit] |= np.uint8(one << i)
                s += n * item
            bytes_ = (n + 7) // 8
            if big_endian:
                _turn_bytes(block, item, bytes_)
            _append(
                block, bytes_, n, bits, is_signed, high, has_error, error, negative_is_invalid,
                certain, judge_all, valid, spare, bytes_of_planes, in_use, state,
            )  # fmt: skip
            if state[1] >= min(state[2] + min(k, 8), ny) * nx:
                _reduce_bands(
                    planes, in_use, state, bits, ny, nx, k, scratch, maximum, total, count
                )
    return 0 if s == src.size else 5

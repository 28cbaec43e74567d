"""The reduction of ``_reduce.c`` in numba: the same integers and faults, without a compiler.

Words of 64 pixels stand in for the wider vectors of C, in registers and not in arrays.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
from numpy.typing import NDArray

from triage.backends.lz4 import lz4_block, u32

__all__ = ["PROCESSOR", "reduce", "workspace_bytes"]

PROCESSOR = "numba"

BAD_PLANE = 32
PLANES = 33

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
    workspace: NDArray[np.uint8],
    maximum: NDArray[np.uint32],
    total: NDArray[np.uint64],
    count: NDArray[np.uint16],
) -> int:
    """As ``_reduce.reduce`` of C, in the same order of arguments."""
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
def _any_set(planes: NDArray[np.uint8], mask: NDArray[np.uint8]) -> bool:
    """Whether any of the planes, which lie one behind the other, has a one where the mask has."""
    bytes_ = np.uint64(mask.size)
    found = np.uint8(0)
    for first in range(0, planes.size, mask.size):
        plane = planes[first : first + mask.size]
        for i in range(bytes_):
            found |= plane[i] & mask[i]
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


@nb.njit(nogil=True, cache=True)
def _put(
    to: NDArray[np.uint8],
    in_use: NDArray[np.bool_],
    p: int,
    at: int,
    plane: NDArray[np.uint8],
    mask: NDArray[np.uint8],
) -> None:
    """Put one plane of a block, masked, behind what is there of it."""
    if not in_use[p]:
        to[p, :at] = 0
        in_use[p] = True
    behind = to[p, at : at + mask.size]
    for i in range(np.uint64(mask.size)):
        behind[i] = plane[i] & mask[i]


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


@nb.njit(nogil=True, cache=True)
def _reduce_word(
    planes: NDArray[np.uint64],
    used: NDArray[np.int64],
    row_bit: NDArray[np.int64],
    rows: int,
    at: int,
    last: Any,
    field: int,
    row: NDArray[np.uint64],
    sums: NDArray[np.uint64],
    tops: NDArray[np.uint64],
) -> bool:
    """Reduce 64 pixels of each row of a band; whether there was a one.

    ``row`` has zeros behind ``rows``. ``sums`` (4, 4, 2) holds sums of 16 bits, by ten planes,
    field of a byte, and even or odd byte; ``tops`` (4, 4) maxima, by byte of the value and field
    of a byte.
    """
    c0 = c1 = c2 = c3 = c4 = c5 = c6 = c7 = _ALL
    found = False
    only = _U((1 << field) - 1) * _BYTES
    fields = 8 // field
    for n in range(used.size):
        p = used[n]
        plane = planes[p]
        some = _U(0)
        for y in range(rows):
            bit = row_bit[y]
            w, shift = np.uint64((bit >> 6) + at), np.uint64(bit & 63)
            # Shifted twice, because a shift by 64 is no shift.
            word = (plane[w] >> shift) | ((plane[w + _ONE] << (np.uint64(63) - shift)) << _ONE)
            word &= last
            row[y] = word
            some |= word
        if some == 0:
            continue
        found = True
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
        group, shift = p // 10, np.uint64(p % 10)
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
            tops[p >> 3, j] |= ((has >> np.uint64(j * field)) & _BYTES) << np.uint64(p & 7)
    return found


@nb.njit(nogil=True, cache=True)
def _reduce_bands(
    planes: NDArray[np.uint64],
    in_use: NDArray[np.bool_],
    state: NDArray[np.int64],
    bits: int,
    ny: int,
    nx: int,
    k: int,
    maximum: NDArray[np.uint32],
    total: NDArray[np.uint64],
    count: NDArray[np.uint16],
) -> None:
    """Reduce every band whose rows are all there; ``state`` is base, filled and next row."""
    field = min(k, 8)
    if state[1] < min(state[2] + field, ny) * nx:
        return
    fields = 8 // field
    words = (nx + 63) // 64
    edge = _ALL if nx % 64 == 0 else (_ONE << np.uint64(nx % 64)) - _ONE
    columns = (nx + k - 1) // k
    row_bit = np.empty(8, np.int64)
    used = np.empty(32, np.int64)
    row = np.zeros(8, np.uint64)
    sums, tops = np.zeros((4, 4, 2), np.uint64), np.zeros((4, 4), np.uint64)
    only_bad = np.array([BAD_PLANE])
    base, filled, y = state[0], state[1], state[2]
    while y < ny:
        end = min(y + field, ny)
        if filled < end * nx:
            break
        row[:] = 0
        for i in range(end - y):
            row_bit[i] = (y + i) * nx - base
        n_used = 0
        for p in range(bits - 1, -1, -1):
            if in_use[p]:
                used[n_used] = p
                n_used += 1
        cy = y // k
        for w in range(words):
            last = edge if w == words - 1 else _ALL
            cell = w * 8 * fields
            if _reduce_word(
                planes, used[:n_used], row_bit, end - y, w, last, field, row, sums, tops
            ):
                for i in range(8 * fields):
                    cx = (cell + i) * field // k
                    byte, j = np.uint64(i // fields), i % fields
                    if cx >= columns:
                        break
                    shift = (byte >> _ONE) << _4
                    whole, best = np.uint64(0), np.uint64(0)
                    for g in range(4):
                        part = (sums[g, j, byte & _ONE] >> shift) & np.uint64(0xFFFF)
                        whole += part << np.uint64(10 * g)
                        best |= ((tops[g, j] >> (byte << np.uint64(3))) & np.uint64(0xFF)) << (
                            np.uint64(8 * g)
                        )
                    total[cy, cx] += whole
                    maximum[cy, cx] = max(maximum[cy, cx], np.uint32(best))
                sums[:] = 0
                tops[:] = 0
            if in_use[BAD_PLANE]:
                _reduce_word(planes, only_bad, row_bit, end - y, w, last, field, row, sums, tops)
                for i in range(8 * fields):
                    cx = (cell + i) * field // k
                    byte, j = np.uint64(i // fields), i % fields
                    if cx >= columns:
                        break
                    # The plane's number is 10 * 3 + 2, so its ones weigh four in the last group.
                    part = (sums[3, j, byte & _ONE] >> ((byte >> _ONE) << _4)) & np.uint64(0xFFFF)
                    count[cy, cx] -= np.uint16(part >> _2)
                sums[:] = 0
                tops[:] = 0
        y = end
    if y == state[2]:
        return
    base_now = y * nx // 8 * 8
    gone, left = (base_now - base) // 8, (filled - base_now + 7) // 8
    bytes_ = planes.view(np.uint8)
    for p in range(PLANES):
        if not in_use[p]:
            continue
        some = np.uint8(0)
        for i in range(left):
            one = bytes_[p, gone + i]
            bytes_[p, i] = one
            some |= one
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
    at = (state[1] - state[0]) // 8
    ones = spare[3, :bytes_]
    mask = ones
    if valid.size:
        mask = valid[state[1] // 8 : state[1] // 8 + bytes_]
    limit, any_bad = bits, False
    while limit > 0 and not in_use[limit - 1]:
        limit -= 1
    bad, keep, equal = spare[0, :bytes_], spare[1, :bytes_], spare[2, :bytes_]
    if judge_all or limit > certain or _any_set(block[limit * bytes_ : bits * bytes_], mask):
        limit = bits
        if judge_all or _any_set(block[certain * bytes_ : bits * bytes_], mask):
            _judge(
                block, bits, is_signed, high, has_error, error, negative_is_invalid,
                mask, bad, keep, equal,
            )  # fmt: skip
            any_bad = _any_set(bad, ones)
            mask = keep
    for p in range(bits):
        plane = block[p * bytes_ : (p + 1) * bytes_]
        if p < limit and (in_use[p] or _any_set(plane, mask)):
            _put(planes, in_use, p, at, plane, mask)
        elif in_use[p]:
            planes[p, at : at + bytes_] = 0
    if any_bad:
        _put(planes, in_use, BAD_PLANE, at, bad, ones)
    elif in_use[BAD_PLANE]:
        planes[BAD_PLANE, at : at + bytes_] = 0
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
            _reduce_bands(planes, in_use, state, bits, ny, nx, k, maximum, total, count)
    return 0 if s == src.size else 5

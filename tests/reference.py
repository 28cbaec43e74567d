"""The slow, obvious twin of every backend: plain Python and numpy, nothing of the product.

It restates the formats and the recipe from their definitions, without checks, speed or sharing,
so that a test that compares a backend with it compares two separate readings.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

F = np.float32
EXPECTED_MAXIMUM = {2: F(1.03), 4: F(1.77), 8: F(2.37), 16: F(2.83), 32: F(3.24)}


class CorruptError(ValueError):
    """The bytes do not follow the format."""


def lz4_block(data: bytes) -> bytes:
    """One LZ4 block, decoded byte by byte."""
    out = bytearray()
    at = 0

    def take(n: int) -> bytes:
        nonlocal at
        if at + n > len(data):
            raise CorruptError("out of input")
        at += n
        return data[at - n : at]

    def long(n: int) -> int:
        if n == 15:
            while True:
                more = take(1)[0]
                n += more
                if more != 255:
                    break
        return n

    while True:
        token = take(1)[0]
        out += take(long(token >> 4))
        if at == len(data):
            return bytes(out)
        (offset,) = struct.unpack("<H", take(2))
        if not 0 < offset <= len(out):
            raise CorruptError("offset outside of what is written")
        for _ in range(long(token & 15) + 4):
            out.append(out[-offset])


def unshuffled(planes: bytes, size: int) -> bytes:
    """Bit planes back to elements of ``size`` bytes, by numpy's bit unpacking."""
    bits = np.unpackbits(np.frombuffer(planes, np.uint8), bitorder="little")
    return np.packbits(bits.reshape(8 * size, -1).T, axis=1, bitorder="little").tobytes()


def decode(
    encoding: str, payload: bytes, dtype: Any, shape: tuple[int, int], framed: bool = True
) -> np.ndarray:
    """The pixels of a frame, native byte order; ``bslz4``, ``lz4`` and ``raw``."""
    dtype = np.dtype(dtype)
    total = shape[0] * shape[1] * dtype.itemsize
    block = 8192
    if encoding == "raw":
        out = payload
    elif encoding == "lz4" and not framed:
        out = lz4_block(payload)
    else:
        if framed:
            claimed, block = struct.unpack(">QI", payload[:12])
            block = block or 8192
            payload = payload[12:]
            if claimed != total:
                raise CorruptError("wrong total")
        whole = total
        if encoding == "bslz4":
            whole = total // (8 * dtype.itemsize) * (8 * dtype.itemsize)
        out = b""
        while len(out) < whole:
            expected = min(block, whole - len(out))
            if len(payload) < 4:
                raise CorruptError("no block length")
            (length,) = struct.unpack(">I", payload[:4])
            if length > len(payload) - 4:
                raise CorruptError("block too long")
            piece, payload = payload[4 : 4 + length], payload[4 + length :]
            if encoding == "bslz4":
                piece = unshuffled(lz4_block(piece), dtype.itemsize)
            elif length != expected:
                piece = lz4_block(piece)
            if len(piece) != expected:
                raise CorruptError("wrong block size")
            out += piece
        out += payload
    if len(out) != total:
        raise CorruptError("wrong size")
    pixels = np.frombuffer(out, dtype).reshape(shape)
    return pixels.astype(dtype.newbyteorder("="))


def valid_count(
    value: Any, dtype: Any, saturation: int | None, error: int | None, masked: bool
) -> int | None:
    """The photons that a pixel counts as, or None where it is no measurement."""
    if masked:
        return None
    kind = np.dtype(dtype).kind
    if kind == "f":
        if not math.isfinite(value):
            return None
        count = round(float(value))  # Python rounds half to even
        high = 2**31 if saturation is None else min(saturation, 2**31)
        return None if count > high else max(count, 0)
    top = int(np.iinfo(dtype).max)
    count = int(value)
    high = top - 2 if saturation is None else min(saturation, top - 1)
    if count > high:
        return None
    if kind == "i":
        if error is None and count < 0:
            return None
        if error is not None and count == error:
            return None
    return max(count, 0)


@dataclass
class Cells:
    """What :func:`cells` gives: integers of every cell, and the pixels they came from."""

    maximum: np.ndarray
    total: np.ndarray
    count: np.ndarray
    photons: np.ndarray  # -1 where invalid


def cells(
    pixels: np.ndarray,
    k: int,
    grid: int,
    mask: np.ndarray | None = None,
    saturation: int | None = None,
    error: int | None = None,
) -> Cells:
    """Maximum, sum and number of the valid pixels of each k x k cell."""
    maximum = np.zeros((grid, grid), np.uint32)
    total = np.zeros((grid, grid), np.uint64)
    count = np.zeros((grid, grid), np.uint16)
    photons = np.full(pixels.shape, -1, np.int64)
    for y in range(pixels.shape[0]):
        for x in range(pixels.shape[1]):
            masked = mask is not None and (int(mask[y, x]) & 0xFFFF) != 0
            c = valid_count(pixels[y, x], pixels.dtype, saturation, error, masked)
            if c is None:
                continue
            photons[y, x] = c
            cell = y // k, x // k
            maximum[cell] = max(int(maximum[cell]), c)
            total[cell] = int(total[cell]) + c
            count[cell] += 1
    return Cells(maximum, total, count, photons)


def _numbers(c: Cells, y: int, x: int, k: int) -> tuple[np.float32, np.float32]:
    """(e, b) of one cell with valid pixels."""
    n, m, s = int(c.count[y, x]), int(c.maximum[y, x]), int(c.total[y, x])
    mu = F(s - m) / F(n - 1) if n > 1 else F(m)
    a = np.sqrt(F(m) + F(0.375))
    b = np.sqrt(mu + F(0.375))
    return F(2) * (a - b) - EXPECTED_MAXIMUM[k], b


def overview(c: Cells, k: int) -> np.ndarray:
    """(3, grid, grid) float32."""
    out = np.zeros((3, *c.count.shape), F)
    for y, x in np.argwhere(c.count):
        e, b = _numbers(c, y, x, k)
        out[0, y, x] = e / np.sqrt(F(1) + abs(e))
        out[1, y, x] = (F(2) * b) / np.sqrt(F(1) + F(2) * b)
        out[2, y, x] = F(c.count[y, x]) / F(k * k)
    return out


def radial(c: Cells, shape: tuple[int, int], k: int, geometry: Any, recipe: Any) -> np.ndarray:
    """(5, sectors, radial_bins) float32."""
    size = (recipe.sectors, recipe.radial_bins)
    added, pixels, everything, usable, spots = (np.zeros(size, object) for _ in range(5))
    kept: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for y in range(-(-shape[0] // k)):
        for x in range(-(-shape[1] // k)):
            dx = ((x + 0.5) * k - geometry.beam_center_x_px) * geometry.pixel_size_x_m
            dy = ((y + 0.5) * k - geometry.beam_center_y_px) * geometry.pixel_size_y_m
            theta = 0.5 * math.atan2(math.hypot(dx, dy), geometry.detector_distance_m)
            s = (2.0 * math.sin(theta) / geometry.incident_wavelength_angstrom) ** 2
            ring = math.floor(s / recipe.s_max_inverse_angstrom2 * recipe.radial_bins)
            if ring >= recipe.radial_bins:
                continue
            turn = math.atan2(dy, dx) / (2.0 * math.pi) % 1.0
            bin_ = min(int(turn * recipe.sectors), recipe.sectors - 1), ring
            everything[bin_] += 1
            if c.count[y, x] < k * k / 2:
                continue
            usable[bin_] += 1
            if _numbers(c, y, x, k)[0] > F(4):
                spots[bin_] += 1
                continue
            added[bin_] += int(c.total[y, x])
            pixels[bin_] += int(c.count[y, x])
            kept.setdefault(bin_, []).append((int(c.total[y, x]), int(c.count[y, x])))
    out = np.zeros((5, *size), F)
    for bin_, each in kept.items():
        whole = added[bin_] * (k * k) / pixels[bin_]
        most = math.floor(whole + 3.0 * math.sqrt(whole + 1.0))
        clipped = sum(min(counts, most * n // (k * k)) for counts, n in each)
        out[(4, *bin_)] = F(clipped) / F(pixels[bin_])
    for bin_ in np.ndindex(*size):
        if pixels[bin_]:
            out[(0, *bin_)] = F(np.uint64(added[bin_])) / F(pixels[bin_])
        if everything[bin_]:
            out[(1, *bin_)] = F(usable[bin_]) / F(everything[bin_])
        if usable[bin_]:
            out[(2, *bin_)] = F(spots[bin_]) / F(usable[bin_])
        out[(3, *bin_)] = F(pixels[bin_])
    return out


def tiles(c: Cells, k: int, recipe: Any) -> np.ndarray:
    """(tiles, 2, tile_px, tile_px) float32."""
    size = recipe.tile_px
    ranked = sorted(
        (-float(_numbers(c, y, x, k)[0]), int(y), int(x)) for y, x in np.argwhere(c.count)
    )
    taken: list[tuple[int, int]] = []
    for _, y, x in ranked:
        if len(taken) == recipe.tiles:
            break
        if all(max(abs(y - v), abs(x - u)) * k >= size for v, u in taken):
            taken.append((y, x))
    out = np.zeros((recipe.tiles, 2, size, size), F)
    ny, nx = c.photons.shape
    for number, (y, x) in enumerate(taken):
        top = max(0, min(y * k + k // 2 - size // 2, ny - size))
        left = max(0, min(x * k + k // 2 - size // 2, nx - size))
        for i in range(min(size, ny)):
            for j in range(min(size, nx)):
                v = c.photons[top + i, left + j]
                if v >= 0:
                    out[number, 0, i, j] = np.sqrt(F(v))
                    out[number, 1, i, j] = 1
    return out

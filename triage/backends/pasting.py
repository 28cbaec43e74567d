"""Puts a frame together that a detector sent by port, and turns its words into counts.

What comes out is a raw frame like any other, so every backend, the audit and the kept files see
the same pixels. Pixels of ports that did not come, and words that are no measurement, get the
value that the series or the pixel type marks as invalid: they are left out, never read as counts.

JUNGFRAU sends words of two gain bits above the 14 of its converter. With the pedestal P and the
gain G of the stage that a pixel was in, its charge is (adc - P) / G (Mozzanica et al., JINST 9
(2014) C05010; Redford et al., JINST 13 (2018) C01027).
"""

from __future__ import annotations

import math
from typing import Any

import numba as nb
import numpy as np
from numpy.typing import NDArray

from triage.errors import DecodeError, UnsupportedEncoding
from triage.records import Calibration, Frame, Piece

__all__ = ["pasted"]

_MOST_PHOTONS = np.float32(2**30)
"""Beyond this a word was not what its gain bits say."""

_NO_PACKET, _SATURATED = 0xFFFF, 0xC000
"""Receivers fill packets that were lost with ones; the last stage saturates at no signal."""


def pasted(frame: Frame) -> NDArray[Any]:
    """The frame, (y, x), in its own dtype; a fresh array.

    Raises:
        DecodeError: a piece does not fit the frame, its bytes do not fit the piece, or the
            calibration has another shape.
        UnsupportedEncoding: words without a calibration, or a width that is not read.
    """
    out = np.empty(frame.shape, frame.dtype)
    error = frame.series.error_value
    if sum(math.prod(piece.shape) for piece in frame.pieces) < math.prod(frame.shape):
        out.fill(np.iinfo(frame.dtype).max if error is None else error)
    for piece in frame.pieces:
        y, x = piece.top, piece.left
        if y < 0 or x < 0 or y + piece.shape[0] > frame.shape[0]:
            raise _misplaced(frame, piece)
        if x + piece.shape[1] > frame.shape[1]:
            raise _misplaced(frame, piece)
        target = out[y : y + piece.shape[0], x : x + piece.shape[1]]
        counts = _unpacked(frame, piece)
        if piece.flipped:
            counts = counts[::-1]
        if not piece.is_adc:
            np.copyto(target, counts, casting="same_kind")
            continue
        maps = _calibration(frame)
        here = np.s_[:, y : y + piece.shape[0], x : x + piece.shape[1]]
        _to_photons(counts, maps.pedestal[here], maps.photons_per_adu[here], error or 0, target)
    return out


def _unpacked(frame: Frame, piece: Piece) -> NDArray[Any]:
    """(y, x) counts or words of a piece in the order they were sent; a view where they can be.

    Of two pixels in a byte the first stands in the upper half; of two in three bytes the first
    has the first byte and the lower half of the second, as the package's own viewer reads them.
    """
    ny, nx = piece.shape
    data = np.frombuffer(piece.payload, np.uint8)
    if min(piece.shape) < 1 or data.size * 8 != ny * nx * piece.bits:
        raise DecodeError(
            f"image {frame.image_id}: {data.size} bytes at row {piece.top}, column {piece.left}; "
            f"expected {piece.shape} pixels (y, x) of {piece.bits} bits"
        )
    if piece.bits == 4:
        pairs = np.empty((data.size, 2), np.uint8)
        np.right_shift(data, 4, out=pairs[:, 0])
        np.bitwise_and(data, 0xF, out=pairs[:, 1])
        return pairs.reshape(ny, nx)
    if piece.bits == 12:
        threes = data.reshape(-1, 3).astype(np.uint16)
        pixels = np.empty((len(threes), 2), np.uint16)
        pixels[:, 0] = threes[:, 0] | (threes[:, 1] & 0xF) << 8
        pixels[:, 1] = threes[:, 1] >> 4 | threes[:, 2] << 4
        return pixels.reshape(ny, nx)
    if piece.bits not in (8, 16, 32):
        raise UnsupportedEncoding(
            f"image {frame.image_id}: pixels of {piece.bits} bits; expected 4, 8, 12, 16 or 32"
        )
    return data.view(f"<u{piece.bits // 8}").reshape(ny, nx)


def _calibration(frame: Frame) -> Calibration:
    maps = frame.series.calibration
    if maps is None:
        raise UnsupportedEncoding(
            f"image {frame.image_id}: words of gain and converter without pedestal and gain maps; "
            "expected [source] pedestal_file and gain_file; the frame goes on unscored"
        )
    if maps.pedestal.shape != (3, *frame.shape) or maps.photons_per_adu.shape != (3, *frame.shape):
        raise DecodeError(
            f"image {frame.image_id}: maps of {maps.pedestal.shape} and "
            f"{maps.photons_per_adu.shape}; expected {(3, *frame.shape)} (stage, y, x)"
        )
    return maps


def _misplaced(frame: Frame, piece: Piece) -> DecodeError:
    return DecodeError(
        f"image {frame.image_id}: {piece.shape} pixels at row {piece.top}, column {piece.left}; "
        f"expected them inside {frame.shape} (y, x)"
    )


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _to_photons(
    words: NDArray[np.uint16],
    pedestal: NDArray[np.float32],
    photons_per_adu: NDArray[np.float32],
    error: int,
    out: NDArray[np.int32],
) -> None:
    """Photons, rounded half to even, or ``error`` where a word is no measurement.

    Most rows are in the first stage throughout, and a loop without choices vectorises.
    """
    ny, nx = words.shape
    invalid = np.int32(error)
    for y in range(ny):
        switched = np.uint16(0)
        for x in range(nx):
            switched |= words[y, x]
        if switched < 0x4000:
            for x in range(nx):
                value = (np.float32(words[y, x]) - pedestal[0, y, x]) * photons_per_adu[0, y, x]
                fits = abs(value) < _MOST_PHOTONS
                rounded = np.rint(value if fits else np.float32(0.0))
                out[y, x] = np.int32(rounded) if fits else invalid
            continue
        for x in range(nx):
            word = words[y, x]
            gain = word >> 14
            if gain == 2 or word in (_NO_PACKET, _SATURATED):
                out[y, x] = invalid
                continue
            stage = min(gain, 2)
            adc = np.float32(word & 0x3FFF)
            value = (adc - pedestal[stage, y, x]) * photons_per_adu[stage, y, x]
            if abs(value) < _MOST_PHOTONS:
                out[y, x] = np.int32(np.rint(value))
            else:
                out[y, x] = invalid

"""Puts a frame together that a detector sent by port, and turns its words into counts.

What comes out is a raw frame like any other, so every backend, the audit and the kept files see
the same pixels. Pixels of ports that did not come, and words that are no measurement, get the
largest value of the pixel type: they are left out, never read as counts.

JUNGFRAU sends words of two gain bits above the 14 of its converter. With the pedestal P and the
gain G of the stage that a pixel was in, its charge is (adc - P) / G (Redford et al., JINST 13
(2018) C01027). Photons are 16-bit counts from zero, as counting detectors send them: noise below
zero counts as none, as it does in every frame with signed pixels.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numba as nb
import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from triage.errors import DecodeError, UnsupportedEncoding
from triage.records import Calibration, Frame, Piece

__all__ = ["pasted", "warm_up", "whole"]

_INVALID = np.uint16(65535)
_BEYOND = np.float32(65533.5)
"""What 16 bits cannot hold beside the marks of invalid pixels: no last stage reaches it at the
energies of diffraction."""

_NONE = np.float32(0.0)

_SWITCHED = 0x4000
"""Words from here on are not of the first stage."""

_NO_PACKET, _SATURATED = 0xFFFF, 0xC000
"""Receivers fill packets that were lost with ones; the last stage saturates at no signal."""


def pasted(frame: Frame) -> NDArray[Any]:
    """The frame, (y, x), in its own dtype; a fresh array.

    Raises:
        DecodeError: a piece does not fit the frame, its bytes do not fit the piece, or the
            calibration has another shape.
        UnsupportedEncoding: words without a calibration, or a width that is not read.
    """
    # All of them before anything is allocated: what came bounds what they may ask for.
    payloads = [_payload(frame, piece) for piece in frame.pieces]
    out = np.empty(frame.shape, frame.dtype)
    if sum(math.prod(piece.shape) for piece in frame.pieces) < math.prod(frame.shape):
        out.fill(np.iinfo(frame.dtype).max)
    for piece, payload in zip(frame.pieces, payloads, strict=True):
        y, x = piece.top, piece.left
        counts = _unpacked(frame, piece, payload)
        if piece.is_adc:
            maps = _calibration(frame)
            turned = 1 if not piece.flipped else -1
            _to_photons(counts, maps.pedestal, maps.photons_per_adu, y, x, turned, out)
        else:
            target = out[y : y + piece.shape[0], x : x + piece.shape[1]]
            np.copyto(target, counts[::-1] if piece.flipped else counts, casting="same_kind")
    return out


def whole(frame: Frame) -> Frame:
    """The same frame with its pixels in one payload, uncompressed, and counts.

    Raises:
        DecodeError, UnsupportedEncoding: as :func:`pasted`.
    """
    pixels = pasted(frame).reshape(-1).view(np.uint8)
    series = replace(frame.series, calibration=None)
    return structs.replace(frame, series=series, payload=pixels.data, pieces=())


def warm_up() -> None:
    """Compile what turns words into photons: a compiler at work would hold up frames."""
    words, map_ = np.zeros((1, 1), np.uint16), np.ones((3, 1, 1), np.float32)
    words.flags.writeable = False
    _to_photons(words, map_, map_, 0, 0, 1, np.zeros((1, 1), np.uint16))


def _payload(frame: Frame, piece: Piece) -> NDArray[np.uint8]:
    """The bytes of a piece that lies in the frame and has as many as it must."""
    y, x = piece.top, piece.left
    if y < 0 or x < 0 or y + piece.shape[0] > frame.shape[0]:
        raise _misplaced(frame, piece)
    if x + piece.shape[1] > frame.shape[1]:
        raise _misplaced(frame, piece)
    data = np.frombuffer(piece.payload, np.uint8)
    if min(piece.shape) < 1 or data.size * 8 != math.prod(piece.shape) * piece.bits:
        raise DecodeError(
            f"image {frame.image_id}: {data.size} bytes at row {piece.top}, column {piece.left}; "
            f"expected {piece.shape} pixels (y, x) of {piece.bits} bits"
        )
    return data


def _unpacked(frame: Frame, piece: Piece, data: NDArray[np.uint8]) -> NDArray[Any]:
    """(y, x) counts or words of a piece in the order they were sent; a view where they can be.

    Of two pixels in a byte the first stands in the upper half; of two in three bytes the first
    has the first byte and the lower half of the second, as the package's own viewer reads them.
    """
    ny, nx = piece.shape
    data.flags.writeable = False  # one type for the compiled kernel, whatever holds the bytes
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
    top: int,
    left: int,
    turned: int,
    out: NDArray[np.uint16],
) -> None:
    """Write photons, rounded half to even, or the mark of a word that is no measurement.

    ``turned`` is 1, or -1 where the rows run upwards. Maps and ``out`` are of the whole frame.
    Every pixel is taken to be in the first stage, in a loop that vectorises; then the few that
    were not are written anew.
    """
    ny, nx = words.shape
    right = left + nx
    for y in range(ny):
        row = top + (y if turned > 0 else ny - 1 - y)
        sent, photons = words[y], out[row, left:right]
        dark, per_adu = pedestal[0, row, left:right], photons_per_adu[0, row, left:right]
        switched = np.uint16(0)
        for x in range(nx):
            switched |= sent[x]
            value = (np.float32(sent[x]) - dark[x]) * per_adu[x]
            counted = np.float32(np.rint(max(value if abs(value) < _BEYOND else _NONE, _NONE)))
            photons[x] = np.uint16(counted) if abs(value) < _BEYOND else _INVALID
        if switched < _SWITCHED:
            continue
        for x in range(nx):
            word = np.int64(sent[x])
            if word < _SWITCHED:
                continue
            gain = word >> 14
            stage = 2 if gain > 2 else gain
            value = np.float32(word & 0x3FFF) - pedestal[stage, row, left + x]
            value *= photons_per_adu[stage, row, left + x]
            if gain == 2 or word in (_NO_PACKET, _SATURATED) or not abs(value) < _BEYOND:
                photons[x] = _INVALID
            else:
                photons[x] = np.uint16(np.float32(np.rint(value if value > _NONE else _NONE)))

"""What a compressed payload says of itself, checked before anything is allocated.

Framing (HDF5 filters 32004 and 32008, and both stream protocols): u64 BE bytes of the frame, u32
BE bytes of a block, then per block u32 BE compressed length and the block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from triage.backends.pasting import pasted
from triage.errors import DecodeError, UnsupportedEncoding
from triage.records import LARGEST_FRAME_BYTES, LARGEST_RATIO, Frame

__all__ = ["FAULTS", "Payload", "fault", "open_payload"]

FAULTS = {
    1: "the payload ends inside a block header",
    2: "a block claims more bytes than the payload has",
    3: "an LZ4 block is corrupt",
    4: "an LZ4 block does not give the bytes of a block",
    5: "bytes are left over behind the last block",
    6: "the raw tail is cut short",
}
"""What the codes of the decoding kernels mean; 0 is success."""

BITSHUFFLED = ("bslz4", "bszstd")
ENCODINGS = (*BITSHUFFLED, "lz4", "raw")

DEFAULT_BLOCK_BYTES = 8192
"""Where the payload names none: the default of the bitshuffle library for 1, 2 and 4 bytes."""

_HEADER_BYTES = 12
_LARGEST_BITSHUFFLE_BLOCK_BYTES = 1 << 24
_DTYPES = ("u1", "u2", "u4", "i1", "i2", "i4", "f4")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Payload:
    """A payload whose outer numbers agree with its frame.

    Attributes:
        data: the bytes, header included; a view.
        at: where the blocks begin in ``data``.
        size: decoded bytes of the frame.
        block_bytes: decoded bytes of a block, > 0; the last one may be shorter.
        whole: decoded bytes that are in blocks; ``size - whole`` bytes follow uncompressed.
    """

    data: NDArray[np.uint8]
    at: int
    size: int
    block_bytes: int
    whole: int


def open_payload(frame: Frame) -> Payload:
    """Read the outer numbers of ``frame.payload``; nothing of the frame's size is allocated.

    A frame in pieces is put together first, and its payload is the raw pixels.

    Raises:
        UnsupportedEncoding: an encoding or pixel type that is not read.
        DecodeError: sizes that contradict the frame, or that the payload cannot hold.
    """
    item = frame.dtype.itemsize
    if frame.dtype.str[1:] not in _DTYPES:
        raise UnsupportedEncoding(
            f"{_where(frame)}: pixel type {frame.dtype.str}; expected one of "
            f"{', '.join(_DTYPES)}; the frame goes on unscored"
        )
    if frame.encoding not in ENCODINGS:
        raise UnsupportedEncoding(
            f"{_where(frame)}: encoding {frame.encoding!r}; expected one of "
            f"{', '.join(ENCODINGS)}; the frame goes on unscored"
        )
    size = frame.shape[0] * frame.shape[1] * item
    if min(frame.shape) < 1 or size > LARGEST_FRAME_BYTES:
        raise DecodeError(
            f"{_where(frame)}: shape {frame.shape} of {frame.dtype.str}; "
            f"expected 1 to {LARGEST_FRAME_BYTES} bytes"
        )
    if frame.pieces:
        pixels = pasted(frame).reshape(-1).view(np.uint8)
        return Payload(data=pixels, at=0, size=size, block_bytes=size, whole=size)
    try:
        data = np.frombuffer(frame.payload, np.uint8)
    except (TypeError, ValueError, BufferError) as err:
        raise DecodeError(f"{_where(frame)}: payload is not a block of bytes: {err}") from err
    data.flags.writeable = False  # one type for the compiled kernels, whatever holds the bytes
    if data.size > 2 * LARGEST_FRAME_BYTES - 1:
        raise DecodeError(
            f"{_where(frame)}: payload of {data.size} bytes; expected less than "
            f"{2 * LARGEST_FRAME_BYTES}"
        )
    if frame.encoding == "raw":
        if data.size != size:
            raise DecodeError(
                f"{_where(frame)}: {data.size} raw bytes; expected {size} for "
                f"shape {frame.shape} of {frame.dtype.str}"
            )
        return Payload(data=data, at=0, size=size, block_bytes=size, whole=size)
    if size > LARGEST_RATIO[frame.encoding] * data.size:
        raise DecodeError(
            f"{_where(frame)}: {data.size} bytes of {frame.encoding} cannot hold "
            f"shape {frame.shape} of {frame.dtype.str} ({size} bytes)"
        )
    shuffled = frame.encoding in BITSHUFFLED
    if frame.framed:
        at, block = _HEADER_BYTES, _header_block_bytes(frame, data, size)
    else:
        at, block = 0, DEFAULT_BLOCK_BYTES if shuffled else size
    whole = size // (8 * item) * (8 * item) if shuffled else size
    if shuffled and (block % (8 * item) or block > _LARGEST_BITSHUFFLE_BLOCK_BYTES):
        raise DecodeError(
            f"{_where(frame)}: blocks of {block} bytes; expected a multiple of 8 pixels of "
            f"{item} bytes, at most {_LARGEST_BITSHUFFLE_BLOCK_BYTES}"
        )
    return Payload(data=data, at=at, size=size, block_bytes=block, whole=whole)


def fault(code: int, frame: Frame) -> DecodeError:
    """The error for a kernel's ``code``, a key of :data:`FAULTS`."""
    return DecodeError(
        f"{_where(frame)}, {frame.encoding}: {FAULTS[code]}; expected "
        f"shape {frame.shape} of {frame.dtype.str}"
    )


def _header_block_bytes(frame: Frame, data: NDArray[np.uint8], size: int) -> int:
    if data.size < _HEADER_BYTES:
        raise DecodeError(
            f"{_where(frame)}: {data.size} bytes; expected at least the {_HEADER_BYTES}-byte header"
        )
    head = data[:_HEADER_BYTES].tobytes()
    claimed = int.from_bytes(head[:8], "big")
    if claimed != size:
        raise DecodeError(
            f"{_where(frame)}: the header claims {claimed} bytes; expected {size} for "
            f"shape {frame.shape} of {frame.dtype.str}"
        )
    return int.from_bytes(head[8:], "big") or DEFAULT_BLOCK_BYTES


def _where(frame: Frame) -> str:
    if frame.file:
        return f"{frame.file} frame {frame.frame}"
    return f"image {frame.image_id}"

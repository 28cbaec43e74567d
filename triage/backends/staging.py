"""Payloads on their way to a device: behind one another in one buffer, their blocks found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor

import numba as nb
import numpy as np
from numpy.typing import NDArray

from triage.backends.lz4 import block_spans
from triage.backends.payload import Payload

__all__ = ["SPAN_BYTES", "Piece", "pieces", "shared_bytes", "spans_of"]

SPAN_BYTES = 16
"""Of a block in the kernels' table: u64 first byte, i32 length, i32 frame or -1."""

_ALIGNMENT = 16
_LEAST_TO_SHARE_BYTES = 1 << 20
"""Copies smaller than this are made where they are asked for."""


class Piece:
    """Some frames of a batch, as one buffer holds them: the table of blocks, then the bytes.

    Attributes:
        rows: the frames' numbers in the batch.
        payloads: (rows,) of each frame.
        item: bytes of a pixel.
        first_span: (rows,) of each frame in the table.
        starts: (rows + 1,) where each payload begins in the buffer, and where the last one ends.
        spans: how many blocks the table has; a frame without any has one for its raw tail.
        table: (spans, 2) int64, as it stands in the buffer; there once the buffer is filled.
        shared_bytes: that a kernel needs for the planes of the largest block.
    """

    def __init__(self, rows: Sequence[int], payloads: Mapping[int, Payload], item: int) -> None:
        self.rows = np.array(rows, np.int64)
        self.item = item
        self.payloads = [payloads[row] for row in rows]
        blocks = np.array([max(1, -(-p.whole // p.block_bytes)) for p in self.payloads], np.int64)
        self.first_span = np.cumsum(blocks) - blocks
        self.spans = int(blocks.sum())
        sizes = np.array([p.data.size for p in self.payloads], np.int64)
        sizes = -(-sizes // _ALIGNMENT) * _ALIGNMENT
        self.table = np.empty((0, 2), np.int64)
        self.starts = self.spans * SPAN_BYTES + np.append(0, np.cumsum(sizes))
        self.shared_bytes = max(shared_bytes(p, item) for p in self.payloads)

    @property
    def size_bytes(self) -> int:
        """Of the buffer."""
        return int(self.starts[-1])

    @property
    def tails(self) -> NDArray[np.int64]:
        """(rows,) where the raw tail of each frame lies in the buffer."""
        sizes = [p.data.size - (p.size - p.whole) for p in self.payloads]
        return self.starts[:-1] + np.array(sizes, np.int64)

    def fill(self, buffer: NDArray[np.uint8], pool: Executor) -> list[int]:
        """Copy the payloads into ``buffer`` and write the table.

        Returns:
            One code of :data:`triage.backends.payload.FAULTS` a frame, 0 where its blocks
            are where they should be. The blocks of another frame are marked as not to be decoded.
        """
        self.table = buffer[: self.spans * SPAN_BYTES].view(np.int64).reshape(-1, 2)
        ends = np.append(self.first_span, self.spans)

        def send(i: int) -> int:
            payload = self.payloads[i]
            return int(
                _copied(
                    payload.data,
                    payload.at,
                    payload.size - payload.whole,
                    payload.whole > 0,
                    buffer,
                    self.starts[i],
                    self.rows[i],
                    self.table[ends[i] : ends[i + 1]],
                )
            )

        share = self.size_bytes > _LEAST_TO_SHARE_BYTES
        return list((pool.map if share else map)(send, range(len(self.payloads))))


def pieces(
    rows: Sequence[int], payloads: Mapping[int, Payload], item: int, least_bytes: int
) -> list[Piece]:
    """``rows`` in order, in pieces of at least ``least_bytes`` compressed bytes but the last."""
    found: list[Piece] = []
    waiting: list[int] = []
    size = 0
    for row in rows:
        waiting.append(row)
        size += payloads[row].data.size
        if size >= least_bytes or row == rows[-1]:
            found.append(Piece(waiting, payloads, item))
            waiting, size = [], 0
    return found


def shared_bytes(payload: Payload, item: int) -> int:
    """What a kernel needs for the planes of one block: whole words, and one more at both ends."""
    pixels = min(payload.block_bytes, payload.whole) // item
    return 4 * (8 * item * -(-pixels // 32) + 2)


def spans_of(payload: Payload) -> tuple[NDArray[np.int64], int]:
    """(blocks, 2) table of one payload's blocks where it lies, as frame 0; and a code."""
    blocks = -(-payload.whole // payload.block_bytes)
    starts, lengths = np.empty(blocks, np.int64), np.empty(blocks, np.int32)
    code = block_spans(payload.data, payload.at, payload.size - payload.whole, starts, lengths)
    return np.stack([starts, lengths.astype(np.int64)], 1), int(code)


@nb.njit(nogil=True, cache=True)
def _copied(
    data: NDArray[np.uint8],
    first: int,
    tail: int,
    has_blocks: bool,
    buffer: NDArray[np.uint8],
    start: int,
    row: int,
    table: NDArray[np.int64],
) -> int:
    """Copy a payload to byte ``start`` and fill its part of the table; a code of FAULTS.

    Block by block: the length of the next one has then just come from memory with its bytes,
    and the walk costs nothing. Bytes before ``first`` are not needed.
    """
    s, code = first, 0
    for i in range(table.shape[0] if has_blocks else 0):
        if data.size - s < 4:
            code = 1
            break
        length = np.int64(0)
        for b in range(4):
            length = (length << 8) | np.int64(data[s + b])
        s += 4
        if length > data.size - s:
            code = 2
            break
        table[i, 0] = start + s
        table[i, 1] = (np.int64(row) << 32) | length
        # Unsigned indices spare numba's test for negative ones, so that the copy vectorises.
        to, came = np.uint64(start + s), np.uint64(s)
        for j in range(np.uint64(length)):
            buffer[to + j] = data[came + j]
        s += int(length)
    if code == 0 and data.size - s != tail:
        code = 6 if data.size - s < tail else 5
    if code == 0:
        buffer[start + s : start + s + tail] = data[s : s + tail]
        if not has_blocks:
            table[0, 0] = 0
            table[0, 1] = np.int64(row) << 32
    else:
        table[:, 0] = 0
        table[:, 1] = np.int64(-1) << 32
    return code

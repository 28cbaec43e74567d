"""Whether compressed bytes are framed as they must be, for decoders that believe what they read.

HDF5's filters for bitshuffle and LZ4 take the sizes that stand in a chunk for true: a chunk that
lies about them ends the process. What is not decoded by the kernels of a backend, which check
every step, is walked here first.
"""

from __future__ import annotations

from typing import Any

__all__ = ["is_framed"]

_LEAST_BLOCK_BYTES = 128
"""The smallest that bitshuffle's library makes; smaller ones would only cost time."""

_LARGEST_BLOCK_BYTES = 1 << 29


def is_framed(data: Any, encoding: str, size: int, element_bytes: int) -> bool:
    """Whether the blocks of a payload lie in it and make up ``size`` bytes, as far as lengths tell.

    Args:
        data: u64 BE bytes of the whole, u32 BE bytes of a block, then per block u32 BE compressed
            length and the block (HDF5 filters 32004 and 32008).
        encoding: ``bslz4``, ``bszstd`` or ``lz4``.
        size: decoded bytes that are expected.
        element_bytes: of a pixel; what follows the last eight of bitshuffled pixels is raw.
    """
    view = memoryview(data).cast("B")
    if view.nbytes < 12 or int.from_bytes(view[:8], "big") != size:
        return False
    block = int.from_bytes(view[8:12], "big")
    whole = size
    if encoding != "lz4":
        if block == 0:
            # The library's own choice: 8192 bytes, whole eights of elements.
            block = 8192
        if block % (8 * element_bytes):
            return False
        whole = size // (8 * element_bytes) * (8 * element_bytes)
    if not min(_LEAST_BLOCK_BYTES, size) <= block <= _LARGEST_BLOCK_BYTES:
        return False
    blocks = -(-whole // block)
    if 4 * blocks > view.nbytes - 12:
        return False
    at = 12
    for _ in range(blocks):
        if view.nbytes - at < 4:
            return False
        at += 4 + int.from_bytes(view[at : at + 4], "big")
    return at + size - whole == view.nbytes

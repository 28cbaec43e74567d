"""Planes that come as one match with the plane before, for each kind of processor's kernels."""

from __future__ import annotations

import numpy as np
import pytest

kernels = pytest.importorskip("triage.backends._reduce", reason="needs the C kernels")

PLANE_BYTES = 32
"""Of a block of 256 pixels of 16 bits."""


def block_and_planes(back: int) -> tuple[bytes, bytes]:
    """An LZ4 block and the 16 planes that it stands for: one plane of literals, eight more like
    it by one match, 200 bytes from ``back`` bytes before by a second, and literals."""
    rng = np.random.default_rng(3)
    # Few pixels have a one, so that sums of nine planes stay countable by hand.
    plane = (1 << rng.integers(0, 8, PLANE_BYTES)).astype(np.uint8).tobytes()
    ending = bytes(512 - 9 * PLANE_BYTES - 200)
    block = bytes([0xFF, PLANE_BYTES - 15]) + plane + PLANE_BYTES.to_bytes(2, "little")
    block += bytes([8 * PLANE_BYTES - 4 - 15])
    block += bytes([0x0F]) + back.to_bytes(2, "little") + bytes([200 - 4 - 15])
    block += bytes([0xF0, len(ending) - 15]) + ending
    planes = bytearray(9 * plane)
    for _ in range(200):
        planes.append(planes[-back])
    return block, bytes(planes) + ending


@pytest.mark.parametrize("back", [16, 32, 33, 70, 100, 150, 288])
@pytest.mark.parametrize("processor", kernels.PROCESSORS)
def test_a_later_match_may_reach_into_planes_alike(processor: str, back: int) -> None:
    """What is not written because it equals a plane before is there when it is asked for."""
    block, planes = block_and_planes(back)
    bits = np.unpackbits(np.frombuffer(planes, np.uint8).reshape(16, -1), axis=1, bitorder="little")
    pixels = (bits.astype(np.int64) << np.arange(16)[:, None]).sum(0).reshape(16, 16)
    valid = pixels < 65535
    cells = np.where(valid, pixels, 0).reshape(2, 8, 2, 8)
    maximum, total = np.empty((2, 2), np.uint32), np.empty((2, 2), np.uint64)
    count = np.empty((2, 2), np.uint16)
    work = np.empty(kernels.workspace_bytes(16, 16, 8, 512), np.uint8)
    payload = len(block).to_bytes(4, "big") + block
    code = kernels.reduce(
        payload, 0, 16, False, False, 16, 16, 512, 8, 65534, -1, False, None,
        np.full((2, 2), 64, np.uint16), work, maximum, total, count, processor,
    )  # fmt: skip
    assert code == 0
    assert maximum.tolist() == cells.max((1, 3)).tolist()
    assert total.tolist() == cells.sum((1, 3)).tolist()
    assert count.tolist() == valid.reshape(2, 8, 2, 8).sum((1, 3)).tolist()

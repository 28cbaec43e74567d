"""What the CPU backend keeps between calls never shows in what it gives."""

from __future__ import annotations

import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from msgspec import structs
from pictures import picture
from test_backends import GEOMETRY, frame_of, same

from triage.backends.cpu import CpuBackend
from triage.records import Frame, Recipe, Series

RECIPE = Recipe(grid=16, radial_bins=10, sectors=4, tiles=3, tile_px=12)
ARRAYS = ("maximum", "total", "count", "bin_factor", "overview", "radial", "has_geometry")


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">i4"])
def test_a_buffer_that_held_another_frame_changes_nothing(dtype: str) -> None:
    """Tiles and spots are those of the raw frame in a backend that saw no other."""
    backend = CpuBackend(RECIPE)
    other = frame_of(picture(dtype, (97, 100), 9), "bslz4", block_bytes=512)
    pixels = picture(dtype, (97, 100), 3)
    shuffled = frame_of(pixels, "bslz4", block_bytes=512)
    raw = frame_of(pixels, "raw")
    # Another frame's pixels stand in the buffer when the blocks are decoded.
    backend.close_ups([other], backend.prepare([other]), [0])
    got = backend.close_ups([shuffled], backend.prepare([shuffled]), [0])
    fresh = CpuBackend(RECIPE)
    wanted = fresh.close_ups([raw], fresh.prepare([raw]), [0])
    same(got.tiles, wanted.tiles)
    same(got.spots, wanted.spots)


def test_blocks_smaller_than_a_pixel_have_tiles_too() -> None:
    """HDF5's LZ4 may cut a frame anywhere; its tiles are those of the raw frame."""
    pixels = picture("<u2", (31, 29), 3)
    raw = frame_of(pixels, "raw")
    # Stored as they are, one byte to a block (HDF5 filter 32004).
    stored = b"".join(struct.pack(">I", 1) + bytes([byte]) for byte in raw.payload)
    payload = struct.pack(">QI", len(raw.payload), 1) + stored
    cut = structs.replace(raw, encoding="lz4", payload=payload)
    backend = CpuBackend(RECIPE)
    got = backend.close_ups([cut], backend.prepare([cut]), [0]).tiles
    same(got, backend.close_ups([raw], backend.prepare([raw]), [0]).tiles)


def test_recycled_views_are_fresh_views() -> None:
    """Large, small, corrupt, unmasked: each batch gives what a backend without memory gives."""
    mask = np.zeros((61, 45), np.uint32)
    mask[3:9, 4:40] = 8
    large = frame_of(picture("<u2", (97, 100), 2), "bslz4", Series(geometry=GEOMETRY))
    small = frame_of(picture("<u4", (31, 29), 1), "bslz4", Series(geometry=GEOMETRY))
    masked = frame_of(picture("<u2", (61, 45), 3), "bslz4", Series(pixel_mask=mask))
    floats = frame_of(picture("<f4", (5, 7), 4), "raw", Series(geometry=GEOMETRY))
    corrupt = structs.replace(large, payload=large.payload[:-20])
    batches: list[list[Frame]] = [
        [large, masked],
        [small, large],
        [corrupt, small],
        [floats, corrupt],
        [masked, floats],
        [large, large],
        [small],
        [masked, small],
    ]
    recycling = CpuBackend(RECIPE, recycle=True)
    held = recycling.prepare(batches[0])
    for batch in batches:
        got, wanted = recycling.prepare(batch), CpuBackend(RECIPE).prepare(batch)
        assert [type(e) for e in got.errors] == [type(e) for e in wanted.errors]
        for name in ARRAYS:
            same(getattr(got, name), getattr(wanted, name))
        assert np.shares_memory(got.overview, held.overview)


def test_an_error_of_another_kind_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever breaks a batch, the next one starts from zeros."""
    large = frame_of(picture("<u2", (97, 100), 2), "bslz4", Series(geometry=GEOMETRY))
    small = frame_of(picture("<u2", (31, 29), 1), "bslz4", Series(geometry=GEOMETRY))
    recycling = CpuBackend(RECIPE, recycle=True)
    recycling.prepare([large])

    def out_of_memory(frame: Frame) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("triage.backends.cpu.open_payload", out_of_memory)
        with pytest.raises(MemoryError):
            recycling.prepare([large])
    got, wanted = recycling.prepare([small]), CpuBackend(RECIPE).prepare([small])
    for name in ARRAYS:
        same(getattr(got, name), getattr(wanted, name))


def test_recycled_memory_is_that_of_the_largest_batch() -> None:
    """Batches of every length take turns in the same arrays."""
    frame = frame_of(picture("<u2", (31, 29), 1), "bslz4")
    recycling = CpuBackend(RECIPE, recycle=True)
    held = recycling.prepare([frame] * 5)
    for n in (1, 4, 2, 5, 3):
        assert np.shares_memory(recycling.prepare([frame] * n).total, held.total)


def test_threads_decode_zstd_at_the_same_time() -> None:
    """Workers that decode bitshuffle-zstd at once, as for Jungfraujoch, each get their pixels."""
    pixels = [picture("<u2", (97, 100), seed) for seed in (1, 2)]
    frames = [frame_of(each, "bszstd", block_bytes=512) for each in pixels]
    begin = threading.Barrier(2)

    def decoded(number: int) -> int:
        backend = CpuBackend(RECIPE)
        begin.wait()
        got = (backend.decode(frames[number]) for _ in range(100))
        return sum(np.array_equal(each, pixels[number]) for each in got)

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(decoded, (0, 1))) == [100, 100]

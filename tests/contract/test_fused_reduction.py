"""Cells straight from bitshuffled blocks: every backend, against the slow twin's pixels.

Values, block sizes and shapes are chosen so that cells are cut by the ends of blocks, rows end
inside of a byte, planes begin inside of a word, and pixels are left over behind the last block.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import reference
from host_cuda import KINDS, make_backend
from msgspec import structs
from pictures import encode, picture
from test_backends import GEOMETRY, same

from triage.backends import Backend, cuda, open_backend
from triage.errors import DecodeError
from triage.records import Frame, Recipe, Series

RECIPE = Recipe(grid=16, radial_bins=10, sectors=4)
INTEGERS = ("u1", "<u2", "<u4", "i1", "<i2", "<i4", ">u2", ">u4", ">i2", ">i4")
SHAPES = {
    2: [(1, 1), (1, 7), (3, 5), (31, 29), (32, 32), (32, 1)],
    4: [(61, 45), (5, 50), (64, 3)],
    8: [(97, 100), (128, 128), (127, 9)],
    16: [(250, 30), (9, 253)],
    32: [(500, 33), (33, 505)],
}


@pytest.fixture(scope="module", params=KINDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return make_backend(request.param, RECIPE)


def frame_of(pixels: np.ndarray, block_pixels: int, series: Series) -> Frame:
    return Frame(
        series=series,
        image_id=5,
        encoding="bslz4",
        dtype=pixels.dtype,
        shape=pixels.shape,
        payload=encode(pixels, "bslz4", block_pixels * pixels.dtype.itemsize),
    )


def check_cells(backend: Backend, frames: list[Frame], pixels: list[np.ndarray]) -> None:
    views = backend.prepare(frames)
    assert views.errors == (None,) * len(frames)
    for i, (frame, image) in enumerate(zip(frames, pixels, strict=True)):
        series, k = frame.series, RECIPE.bin_factor(image.shape)
        wanted = reference.cells(
            image.astype(image.dtype.newbyteorder("=")),
            k,
            RECIPE.grid,
            series.pixel_mask,
            series.saturation_value,
            series.error_value,
        )
        assert views.bin_factor[i] == k
        assert views.valid_px is None or views.valid_px[i] == wanted.count.sum(dtype=int)
        same(views.count[i], wanted.count)
        same(views.maximum[i], wanted.maximum)
        same(views.total[i], wanted.total)
        same(views.overview[i], reference.overview(wanted, k))
        if series.geometry is not None:
            same(views.radial[i], reference.radial(wanted, image.shape, k, series.geometry, RECIPE))


def some_mask(shape: tuple[int, int], seed: int) -> np.ndarray:
    """A row, a column and single pixels; bits above 15 do not count."""
    rng = np.random.default_rng(seed)
    mask = rng.choice(np.array([0] * 12 + [1, 0x8000, 0x10000], np.uint32), shape)
    mask[shape[0] // 2] = 2
    mask[:, shape[1] // 3] = 4
    return mask


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("k", sorted(SHAPES))
def test_cells_of_every_type_and_bin_factor(backend: Backend, dtype: str, k: int) -> None:
    """Shapes of each bin factor in blocks of several sizes, with mask and without."""
    frames, images = [], []
    for number, shape in enumerate(SHAPES[k]):
        assert RECIPE.bin_factor(shape) == k
        for block_pixels in (16, 104, 4096):
            mask = some_mask(shape, number) if (number + block_pixels) % 3 else None
            pixels = picture(dtype, shape, seed=number)
            frames.append(frame_of(pixels, block_pixels, Series(pixel_mask=mask)))
            images.append(pixels)
    check_cells(backend, frames, images)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize(
    "series",
    [
        Series(saturation_value=0),
        Series(saturation_value=2),
        Series(saturation_value=30, error_value=7),
        Series(saturation_value=2**70, error_value=-1),
        Series(saturation_value=-3),
        Series(saturation_value=-(2**70), error_value=-128),
        Series(error_value=-(2**31)),
        Series(error_value=-(2**15)),
        Series(error_value=2**63, geometry=GEOMETRY),
        Series(error_value=0),
    ],
    ids=lambda s: f"saturation {s.saturation_value} error {s.error_value}",
)
def test_which_values_count(backend: Backend, dtype: str, series: Series) -> None:
    """Saturation and error values in and out of the type's range, negative counts."""
    pixels = picture(dtype, (61, 45))
    mask = some_mask(pixels.shape, 1)
    frames = [
        frame_of(pixels, 200, series),
        frame_of(pixels, 4096, dataclasses.replace(series, pixel_mask=mask)),
    ]
    check_cells(backend, frames, [pixels, pixels])


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<u4", "<i4"])
def test_every_bit_of_a_value_counts(backend: Backend, dtype: str) -> None:
    """Full-range noise: every plane is in use, sums pass 32 bits."""
    info = np.iinfo(dtype)
    rng = np.random.default_rng(8)
    pixels = rng.integers(info.min, info.max, (97, 100), dtype=dtype, endpoint=True)
    for block_pixels in (8, 800, 2048):
        check_cells(backend, [frame_of(pixels, block_pixels, Series(error_value=5))], [pixels])


@pytest.mark.parametrize("block_bytes", [8192, 16384, 32768, 65536, 1 << 17])
def test_large_blocks(backend: Backend, block_bytes: int) -> None:
    """Blocks up to more than a device's shared memory, the last one partial."""
    pixels = picture("<u4", (250, 241))
    mask = some_mask(pixels.shape, 2)
    series = Series(pixel_mask=mask, geometry=GEOMETRY)
    check_cells(backend, [frame_of(pixels, block_bytes // 4, series)], [pixels])


@pytest.mark.parametrize("left_over", range(8))
def test_pixels_behind_the_last_block(backend: Backend, left_over: int) -> None:
    """One to seven raw pixels, and none; masked ones and bad values among them."""
    pixels = np.full((1, 16 + left_over), 3, "<i2")
    pixels[0, 16:] = [-1, 9, 32767, -32768, 300, 2, 4][:left_over]
    mask = np.zeros(pixels.shape, np.uint32)
    mask[0, 18:19] = 1
    check_cells(backend, [frame_of(pixels, 8, Series(pixel_mask=mask))], [pixels])
    check_cells(backend, [frame_of(pixels, 16, Series(error_value=9))], [pixels])


def test_many_frames_at_once(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many sizes, types and series in one batch, which goes to a device in many pieces."""
    monkeypatch.setattr(cuda, "_PIECE_BYTES", 6000)
    rng = np.random.default_rng(9)
    frames: list[Frame] = []
    images: list[np.ndarray] = []
    for i in range(24):
        shape = (int(rng.integers(1, 90)), int(rng.integers(1, 90)))
        pixels = picture(INTEGERS[i % len(INTEGERS)], shape, seed=i)
        mask = some_mask(shape, i) if i % 3 else None
        series = Series(series_id=i, pixel_mask=mask, geometry=GEOMETRY if i % 2 else None)
        frames.append(frame_of(pixels, int(rng.choice([8, 64, 1000, 4096])), series))
        images.append(pixels)
    check_cells(backend, frames, images)


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<i4", "<f4", ">u2"])
def test_tiles_are_the_twins_for_every_row(backend: Backend, dtype: str) -> None:
    """Of many frames in any order, bitshuffled, raw, and one that is an error: that gives zeros."""
    frames, images = [], []
    for number, shape in enumerate([(31, 29), (97, 100), (128, 64), (61, 45), (16, 16)]):
        images.append(picture(dtype, shape, seed=number))
        mask = some_mask(shape, number) if number % 2 else None
        frames.append(frame_of(images[-1], 64, Series(pixel_mask=mask)))
    frames[3] = structs.replace(frames[3], encoding="raw", payload=images[3].tobytes())
    frames[2] = damaged(frames[2], payload=frames[2].payload[:-1])
    rows = [4, 2, 0, 3, 1]
    views = backend.prepare(frames)
    found = backend.close_ups(frames, views, rows).tiles
    assert not found[1].any()
    for number, row in enumerate(rows):
        if row == 2:
            continue
        image = images[row].astype(images[row].dtype.newbyteorder("="))
        k, mask = RECIPE.bin_factor(image.shape), frames[row].series.pixel_mask
        wanted = reference.cells(image, k, RECIPE.grid, mask, None, None)
        same(found[number], reference.tiles(wanted, k, RECIPE))
    # Views of another backend give the same places.
    same(backend.close_ups(frames, open_backend("cpu", RECIPE).prepare(frames), rows).tiles, found)


def run_length(n: int) -> bytes:
    """What follows a nibble of 15 in an LZ4 length of ``n``."""
    return bytes([255] * ((n - 15) // 255) + [(n - 15) % 255])


@pytest.mark.parametrize("length", [240, 255, 256, 257, 383, 700, 1999])
def test_long_matches_of_every_offset(backend: Backend, length: int) -> None:
    """Offsets below and above a warp's bytes, at every alignment: the bytes repeat."""
    rng = np.random.default_rng(length)
    wanted, payload = b"", b""
    size = 2400
    for offset in [*range(1, 141), 163, 256, 300]:
        head = rng.bytes(offset + offset % 4)
        block = head
        while len(block) < len(head) + length:
            block += block[-offset:]
        block = block[: len(head) + length]
        last = rng.bytes(size - len(block))
        coded = b"\xff" + run_length(len(head)) if len(head) >= 15 else bytes([len(head) << 4 | 15])
        coded += head + offset.to_bytes(2, "little") + run_length(length - 4)
        coded += b"\xf0" + run_length(len(last)) + last
        payload += len(coded).to_bytes(4, "big") + coded
        wanted += block + last
    frame = Frame(
        series=Series(),
        image_id=5,
        encoding="lz4",
        dtype=np.dtype("u1"),
        shape=(len(wanted) // size, size),
        payload=len(wanted).to_bytes(8, "big") + size.to_bytes(4, "big") + payload,
    )
    assert backend.decode(frame).tobytes() == wanted


def damaged(frame: Frame, **change: Any) -> Frame:
    return structs.replace(frame, **change)


def test_a_damaged_block_spares_the_frames_beside_it(backend: Backend) -> None:
    """Whichever block is damaged, first or last, in whichever row: that row alone is an error."""
    pixels = picture("<u2", (61, 45))
    good = frame_of(pixels, 256, Series())
    payload = good.payload
    second = 16 + int.from_bytes(payload[12:16], "big")
    wrong = [
        payload[:16] + b"\xff" + payload[17:],
        payload[: second + 4] + b"\x0f" + payload[second + 5 :],
        payload[:12] + b"\0\0\0\1" + payload[13 + 3 :],
        payload + b"\0",
        payload[:-1],
    ]
    wanted = backend.prepare([good])
    for bad in wrong:
        views = backend.prepare([good, damaged(good, payload=bad), good])
        assert isinstance(views.errors[1], DecodeError)
        assert (views.errors[0], views.errors[2]) == (None, None)
        assert not views.has_geometry.any()
        for name in ("maximum", "total", "count", "bin_factor", "overview", "radial"):
            rows = getattr(views, name)
            assert not rows[1].any()
            same(rows[0], getattr(wanted, name)[0])
            same(rows[2], getattr(wanted, name)[0])

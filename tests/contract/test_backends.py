"""What every backend promises, against the slow twin in ``tests/reference.py``.

The backends are: the CPU's, CUDA's kernels compiled for the host (``cuda_host``, where g++ is),
and CUDA on a device where there is one.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import cbor2
import h5py
import numpy as np
import pytest
import reference
from host_cuda import KINDS, make_backend
from msgspec import structs
from pictures import encode, picture

from triage.backends import Backend, open_backend
from triage.errors import ConfigError, DecodeError, UnsupportedEncoding
from triage.records import Frame, Geometry, Recipe, Series

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
RECIPE = Recipe(grid=16, radial_bins=10, sectors=4, tiles=3, tile_px=12)
GEOMETRY = Geometry(
    beam_center_x_px=14.25,
    beam_center_y_px=11.75,
    pixel_size_x_m=0.002,
    pixel_size_y_m=0.0021,
    detector_distance_m=0.1,
    incident_wavelength_angstrom=1.0,
)
DTYPES = ("u1", "<u2", "<u4", "i1", "<i2", "<i4", "<f4")


@pytest.fixture(scope="module", params=KINDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return make_backend(request.param, RECIPE)


@pytest.fixture(scope="module", params=KINDS)
def full_backend(request: pytest.FixtureRequest) -> Backend:
    return make_backend(request.param, Recipe())


def frame_of(
    pixels: np.ndarray, encoding: str = "raw", series: Series | None = None, block_bytes: int = 0
) -> Frame:
    return Frame(
        series=series or Series(),
        image_id=5,
        encoding=encoding,
        dtype=pixels.dtype,
        shape=pixels.shape,
        payload=encode(pixels, encoding, block_bytes),
    )


def same(got: np.ndarray, wanted: np.ndarray) -> None:
    """Bit for bit, dtype included."""
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    assert got.tobytes() == wanted.tobytes()


# Decoding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("encoding", ["bslz4", "lz4", "bszstd", "raw"])
@pytest.mark.parametrize(
    ("shape", "block_bytes"),
    [((1, 1), 0), ((3, 5), 0), ((31, 29), 0), ((64, 64), 512), ((77, 131), 0), ((70, 61), 1024)],
)
def test_what_another_encoder_wrote_is_read(
    backend: Backend, dtype: str, encoding: str, shape: tuple[int, int], block_bytes: int
) -> None:
    """Each encoding, pixel type, odd size, short last block and raw tail comes back exactly."""
    pixels = picture(dtype, shape)
    same(backend.decode(frame_of(pixels, encoding, block_bytes=block_bytes)), pixels)


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<u4"])
@pytest.mark.parametrize("encoding", ["bslz4", "lz4"])
def test_decoding_agrees_with_the_slow_twin(backend: Backend, dtype: str, encoding: str) -> None:
    """The twin's decoder and the backend's read the same bytes the same way."""
    frame = frame_of(picture(dtype, (45, 43)), encoding, block_bytes=1024)
    same(backend.decode(frame), reference.decode(encoding, frame.payload, frame.dtype, frame.shape))


@pytest.mark.parametrize("encoding", ["bslz4", "bszstd", "lz4"])
def test_a_payload_without_header_is_read(backend: Backend, encoding: str) -> None:
    """``framed=False``: bitshuffle with 8192-byte blocks, or one bare LZ4 block."""
    pixels = picture("<u2", (100, 97))
    block = 1 << 20 if encoding == "lz4" else 8192
    frame = frame_of(pixels, encoding, block_bytes=block)
    start = 16 if encoding == "lz4" else 12
    frame = structs.replace(frame, framed=False, payload=frame.payload[start:])
    same(backend.decode(frame), pixels)


def test_block_size_zero_means_the_default(backend: Backend) -> None:
    """A header whose block size is 0 has blocks of 8192 bytes."""
    pixels = picture("<u4", (100, 97))
    frame = frame_of(pixels, "bslz4", block_bytes=8192)
    payload = frame.payload[:8] + bytes(4) + frame.payload[12:]
    same(backend.decode(structs.replace(frame, payload=payload)), pixels)


def test_lz4_stores_what_does_not_compress(backend: Backend) -> None:
    """A block whose length is its raw size is stored raw."""
    pixels = np.random.default_rng(3).integers(0, 2**16, (64, 63), dtype="u2")
    frame = frame_of(pixels, "lz4", block_bytes=4096)
    assert int.from_bytes(frame.payload[12:16], "big") == 4096
    same(backend.decode(frame), pixels)


@pytest.mark.parametrize("dtype", [">u2", ">u4", ">i2", ">i4", ">f4"])
def test_big_endian_pixels_come_out_native(backend: Backend, dtype: str) -> None:
    """Values stay, byte order is the machine's, and the payload is not touched."""
    pixels = picture(dtype, (13, 21))
    frame = frame_of(pixels)
    before = bytes(frame.payload)
    same(backend.decode(frame), pixels.astype(np.dtype(dtype).newbyteorder("=")))
    assert frame.payload == before


def test_a_decoded_frame_survives_the_next(backend: Backend) -> None:
    """Each call gives a fresh array, whatever is reused inside."""
    first, second = picture("<u2", (31, 29), 1), picture("<u2", (31, 29), 2)
    got = backend.decode(frame_of(first, "bslz4"))
    backend.decode(frame_of(second, "bslz4"))
    backend.prepare([frame_of(second, "bslz4")])
    same(got, first)


def block_frame(*blocks: bytes, pixels: int = 20) -> Frame:
    """A frame of bytes in LZ4 blocks of 20, written by hand."""
    payload = pixels.to_bytes(8, "big") + (20).to_bytes(4, "big")
    for block in blocks:
        payload += len(block).to_bytes(4, "big") + block
    return Frame(
        series=Series(),
        image_id=5,
        encoding="lz4",
        dtype=np.dtype("u1"),
        shape=(1, pixels),
        payload=payload,
    )


# 4 literals, a match of 15 bytes 4 back, 1 literal.
GOOD_BLOCK = b"\x4b" + b"abcd" + b"\x04\x00" + b"\x10" + b"z"


def test_an_lz4_block_written_by_hand(backend: Backend) -> None:
    """Literals, a match that overlaps its own output, last literals."""
    pixels = backend.decode(block_frame(GOOD_BLOCK, b"\xf0\x05" + bytes(range(20)), pixels=40))
    assert pixels.tobytes() == b"abcdabcdabcdabcdabcz" + bytes(range(20))


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(b"\xc0" + b"abcdefghijkl", id="too short"),
        pytest.param(b"\xf0\x06" + bytes(21), id="too long in literals"),
        pytest.param(b"\x4c" + b"abcd" + b"\x04\x00" + b"\x10z", id="last literal does not fit"),
        pytest.param(b"\x4f" + b"abcd" + b"\x04\x00\xff\x00", id="too long in a match"),
        pytest.param(b"\x4b" + b"abcd" + b"\x00\x00" + b"\x10z", id="offset 0"),
        pytest.param(b"\x4b" + b"abcd" + b"\x05\x00" + b"\x10z", id="offset before the block"),
        pytest.param(b"\x4c" + b"abcd" + b"\x04\x00", id="no last literals"),
        pytest.param(b"\x4b" + b"abcd" + b"\x04", id="half an offset"),
        pytest.param(b"\x4f" + b"abcd" + b"\x04\x00\xff", id="length goes on"),
        pytest.param(b"\xf0\xff", id="literal length goes on"),
        pytest.param(b"\xf0\x05" + bytes(12), id="literals missing"),
        pytest.param(b"", id="empty"),
    ],
)
def test_a_bad_lz4_block_is_refused(backend: Backend, block: bytes) -> None:
    """Alone, and behind a good block: a match may not reach into the block before."""
    for frame in (block_frame(block), block_frame(GOOD_BLOCK, block, pixels=40)):
        with pytest.raises(DecodeError):
            backend.decode(frame)


def corrupt_cases() -> list[Any]:
    """(name, changes to a good frame of 31 x 29 u2)."""
    good = frame_of(picture("<u2", (31, 29)), "bslz4", block_bytes=512)
    p = good.payload
    return [
        pytest.param({"payload": b""}, id="empty"),
        pytest.param({"payload": p[:11]}, id="half a header"),
        pytest.param({"payload": p[:14]}, id="half a block length"),
        pytest.param({"payload": p[:-1]}, id="tail cut"),
        pytest.param({"payload": p + b"\0"}, id="left over"),
        pytest.param({"payload": p[: len(p) // 2]}, id="half"),
        pytest.param({"payload": b"\0" * 7 + b"\xff" + p[8:]}, id="other total"),
        pytest.param({"payload": b"\xff" * 8 + p[8:]}, id="huge total"),
        pytest.param({"payload": p[:8] + b"\xff\xff\xff\xf0" + p[12:]}, id="huge block"),
        pytest.param({"payload": p[:8] + b"\0\0\0\x09" + p[12:]}, id="block of 9 bytes"),
        pytest.param({"payload": p[:12] + b"\xff\xff\xff\xff" + p[16:]}, id="huge length"),
        pytest.param({"payload": p[:12] + b"\0\0\0\0" + p[12:]}, id="empty block"),
        pytest.param({"shape": (31, 28)}, id="other shape"),
        pytest.param({"shape": (0, 29)}, id="no pixels"),
        pytest.param({"shape": (100_000, 100_000)}, id="absurd shape"),
        pytest.param({"dtype": np.dtype("<u4")}, id="other type"),
        pytest.param({"payload": None}, id="no bytes"),
        pytest.param({"encoding": "lz4"}, id="lz4 instead"),
        pytest.param({"encoding": "bszstd"}, id="zstd instead"),
        pytest.param({"encoding": "raw"}, id="raw instead"),
        pytest.param({"encoding": "lz4", "framed": False}, id="bare instead"),
    ]


@pytest.mark.parametrize("change", corrupt_cases())
def test_a_corrupt_payload_is_that_frames_error_alone(
    backend: Backend, change: dict[str, Any]
) -> None:
    """``decode`` raises DecodeError; ``prepare`` reports it, zeros the row, spares the others."""
    good = frame_of(picture("<u2", (31, 29)), "bslz4", block_bytes=512)
    bad = structs.replace(good, **change)
    with pytest.raises(DecodeError):
        backend.decode(bad)
    alone = backend.prepare([good])
    views = backend.prepare([good, bad, good])
    assert views.errors[0] is None
    assert views.errors[2] is None
    assert isinstance(views.errors[1], DecodeError)
    for name in ("maximum", "total", "count", "bin_factor", "overview", "radial", "has_geometry"):
        rows = getattr(views, name)
        assert not rows[1].any()
        same(rows[0], getattr(alone, name)[0])
        same(rows[2], getattr(alone, name)[0])
    assert not backend.close_ups([good, bad, good], views, [1]).tiles.any()


@pytest.mark.parametrize(
    "change",
    [{"encoding": "blosc"}, {"encoding": ""}, {"dtype": np.dtype("<f8")}, {"dtype": np.dtype("O")}],
)
def test_what_is_not_read_is_called_unsupported(backend: Backend, change: dict[str, Any]) -> None:
    """An encoding or pixel type that is not read is no decode error."""
    frame = structs.replace(frame_of(picture("<u2", (8, 8))), **change)
    with pytest.raises(UnsupportedEncoding):
        backend.decode(frame)
    assert isinstance(backend.prepare([frame]).errors[0], UnsupportedEncoding)


def test_a_frame_too_large_for_the_recipe_is_unsupported(backend: Backend) -> None:
    """More pixels than the grid holds at the largest bin factor."""
    frame = frame_of(np.zeros((1, 16 * 32 + 1), "<u2"))
    assert isinstance(backend.prepare([frame]).errors[0], UnsupportedEncoding)


def test_a_mask_of_another_shape_is_the_frames_error(backend: Backend) -> None:
    """Such a frame is reported, not scored with half a mask."""
    series = Series(pixel_mask=np.zeros((8, 9), np.uint32))
    frame = frame_of(picture("<u2", (8, 8)), series=series)
    assert isinstance(backend.prepare([frame]).errors[0], DecodeError)


def test_a_bin_factor_of_unknown_noise_is_refused() -> None:
    """A recipe with such a factor is refused when the backend is made."""
    with pytest.raises(ConfigError):
        open_backend("cpu", Recipe(bin_factors=(3,)))


# Reducing


def check_views(backend: Backend, recipe: Recipe, pixels: np.ndarray, series: Series) -> None:
    """Overview, radial view and tiles are the twin's, bit for bit."""
    frame = frame_of(pixels, "raw", series)
    k = recipe.bin_factor(pixels.shape)
    wanted = reference.cells(
        pixels.astype(pixels.dtype.newbyteorder("=")),
        k,
        recipe.grid,
        series.pixel_mask,
        series.saturation_value,
        series.error_value,
    )
    views = backend.prepare([frame])
    assert views.errors == (None,)
    assert views.bin_factor.tolist() == [k]
    same(views.count[0], wanted.count)
    same(views.maximum[0], wanted.maximum)
    same(views.total[0], wanted.total)
    same(views.overview[0], reference.overview(wanted, k))
    if series.geometry is None:
        assert not views.has_geometry[0]
        assert not views.radial.any()
    else:
        assert views.has_geometry[0]
        same(views.radial[0], reference.radial(wanted, pixels.shape, k, series.geometry, recipe))
    same(backend.close_ups([frame], views, [0]).tiles[0], reference.tiles(wanted, k, recipe))


@pytest.mark.parametrize("dtype", [*DTYPES, ">u2", ">i4", ">f4"])
@pytest.mark.parametrize("shape", [(31, 29), (1, 1), (5, 50), (61, 45), (97, 100)])
def test_views_are_the_twins(backend: Backend, dtype: str, shape: tuple[int, int]) -> None:
    """Every pixel type; shapes with partial cells, and smaller than a tile, at k = 2, 4, 8."""
    check_views(backend, RECIPE, picture(dtype, shape), Series(geometry=GEOMETRY))


@pytest.mark.parametrize("k", [2, 8, 16])
def test_light_that_is_wider_than_a_cell_is_clipped(backend: Backend, k: int) -> None:
    """A hundredth of a strong background, over nine cells: no maximum stands out, and the rings it
    lies on rise by a part of it; not where cells are clipped. The other rings are the same."""
    shape = 12 * k, 16 * k
    y, x = np.mgrid[: shape[0], : shape[1]] / k
    light = 1e4 * np.exp(-((y - 3.5) ** 2 + (x - 12.5) ** 2) / (2 * 1.5**2))
    pixels = np.random.default_rng(k).poisson(1e6 + light).astype("<u4")
    mask = np.zeros(shape, np.uint32)
    mask[5 * k // 2 : 7 * k // 2, 9 * k : 13 * k] = 1
    geometry = replace(
        GEOMETRY,
        beam_center_x_px=5.5 * k,
        beam_center_y_px=6.0 * k,
        pixel_size_x_m=0.004 / k,
        pixel_size_y_m=0.004 / k,
    )
    series = Series(geometry=geometry, pixel_mask=mask)
    check_views(backend, RECIPE, pixels, series)
    mean, share, lost, _, clipped = backend.prepare([frame_of(pixels, series=series)]).radial[0]
    assert not lost.any()
    lifted = (mean - clipped)[share > 0]
    assert lifted.max() > 500
    assert (lifted > 50).sum() < 0.5 * lifted.size
    assert np.median(lifted) < 50


@pytest.mark.parametrize("k", [16, 32])
def test_large_bin_factors(backend: Backend, k: int) -> None:
    """The larger bin factors, with the full 65534 of a uint16 in one cell."""
    pixels = picture("<u2", (16 * k - 5, 30))
    pixels[:k, :k] = 65533
    check_views(backend, RECIPE, pixels, Series(geometry=GEOMETRY))


@pytest.mark.parametrize("dtype", DTYPES)
def test_saturation_value_bounds_valid_counts(backend: Backend, dtype: str) -> None:
    """At the declared value a pixel still counts, above it not; never the type's maximum."""
    pixels = picture(dtype, (31, 29))
    for saturation in (0, 2, 30, 10**6, 2**70, -5, -(2**70)):
        check_views(backend, RECIPE, pixels, Series(saturation_value=saturation))


@pytest.mark.parametrize("dtype", ["i1", "<i2", "<i4", "<u2", "<f4"])
def test_error_value_makes_negatives_noise(backend: Backend, dtype: str) -> None:
    """Signed pixels with an error value: that value is bad, other negatives count as 0."""
    pixels = picture(dtype, (31, 29))
    for error in (-1, 1, -(2**31), 2**63, -(2**90)):
        check_views(backend, RECIPE, pixels, Series(error_value=error, geometry=GEOMETRY))


def test_only_the_low_16_bits_of_the_mask_count(backend: Backend) -> None:
    """Bits above 15 do not make a pixel bad; fully masked cells and rings give zeros."""
    rng = np.random.default_rng(5)
    mask = rng.choice(np.array([0, 0, 1, 2, 0x8000, 0x10000, 0x10001], np.uint32), (61, 45))
    mask[8:24] = 1
    series = Series(pixel_mask=mask, geometry=GEOMETRY)
    check_views(backend, RECIPE, picture("<u2", (61, 45)), series)


def test_a_frame_with_no_valid_pixel_gives_zeros(backend: Backend) -> None:
    """Nothing valid: every view is zero and no tile is taken."""
    pixels = np.full((31, 29), 65535, "<u2")
    check_views(backend, RECIPE, pixels, Series(geometry=GEOMETRY))
    assert not backend.prepare([frame_of(pixels)]).overview.any()


def test_large_counts_do_not_overflow(backend: Backend) -> None:
    """Sums past 32 bits stay exact."""
    pixels = np.full((97, 100), 2**32 - 3, "<u4")
    check_views(backend, RECIPE, pixels, Series(geometry=GEOMETRY))


def test_equal_cells_are_taken_in_row_major_order(backend: Backend) -> None:
    """A flat frame: the first tile is at the first cell, the next a tile's width on."""
    check_views(backend, RECIPE, np.ones((31, 29), "<u2"), Series())


def test_a_hand_made_frame_gives_hand_made_numbers(backend: Backend) -> None:
    """One 4 x 4 frame, k = 2, worked out by hand."""
    pixels = np.array(
        [[1, 2, 0, 0], [3, 65535, 0, 0], [65534, 65535, 9, 0], [65535, 65535, 0, 0]], "<u2"
    )
    views = backend.prepare([frame_of(pixels)])
    assert views.maximum[0, :2, :2].tolist() == [[3, 0], [0, 9]]
    assert views.total[0, :2, :2].tolist() == [[6, 0], [0, 9]]
    assert views.count[0, :2, :2].tolist() == [[3, 4], [0, 4]]
    assert views.count[0].sum() == 11
    e = 2 * (math.sqrt(3.375) - math.sqrt(1.875)) - 1.03
    assert views.overview[0, 0, 0, 0] == pytest.approx(e / math.sqrt(1 + abs(e)), abs=1e-6)
    b = math.sqrt(1.875)
    assert views.overview[0, 1, 0, 0] == pytest.approx(2 * b / math.sqrt(1 + 2 * b), abs=1e-6)
    assert views.overview[0, 2, 0, 0] == 0.75


def test_a_row_depends_on_its_frame_alone(backend: Backend) -> None:
    """Frames of different size, type and series in one batch give what each gives alone."""
    mask = np.zeros((61, 45), np.uint32)
    mask[3:9, 4:40] = 8
    frames = [
        frame_of(picture("<u2", (31, 29), 1), "bslz4", Series(geometry=GEOMETRY)),
        frame_of(picture("<i4", (97, 100), 2), "lz4", Series(error_value=-1)),
        frame_of(picture("<u2", (61, 45), 3), "bslz4", Series(pixel_mask=mask)),
        frame_of(picture("<f4", (5, 7), 4), "raw", Series(geometry=GEOMETRY)),
    ]
    together = backend.prepare(frames)
    crops = backend.close_ups(frames, together, [3, 0, 2]).tiles
    for i, frame in enumerate(frames):
        alone = backend.prepare([frame])
        for name in (
            "maximum", "total", "count", "bin_factor", "overview", "radial", "has_geometry"
        ):  # fmt: skip
            same(getattr(together, name)[i], getattr(alone, name)[0])
        if i in (3, 0, 2):
            same(crops[[3, 0, 2].index(i)], backend.close_ups([frame], alone, [0]).tiles[0])


def test_masks_of_many_series_are_not_mixed_up(backend: Backend) -> None:
    """More series than are remembered, met again in turn, each with its own mask."""
    pixels = np.ones((8, 8), "<u2")
    all_series = []
    for i in range(8):
        mask = np.zeros((8, 8), np.uint32)
        mask[i] = 1
        all_series.append(Series(series_id=i, pixel_mask=mask))
    for _ in range(2):
        for i, series in enumerate(all_series):
            count = backend.prepare([frame_of(pixels, series=series)]).count[0]
            assert count[i // 2, :4].tolist() == [2, 2, 2, 2]
            assert count.sum() == 56


def test_no_frames_give_no_rows(backend: Backend) -> None:
    """An empty batch is a batch."""
    views = backend.prepare([])
    assert views.errors == ()
    assert views.overview.shape == (0, 3, 16, 16)
    assert backend.close_ups([], views, []).tiles.shape == (0, 3, 2, 12, 12)


# Recorded bytes


def vendor_channels(folder: str, name: str) -> dict[str, Frame]:
    """The frames of a recorded stream v2 image message, by channel."""
    path = SHARED / "samples" / folder / name
    if not path.exists():
        pytest.skip("needs ../shared/samples")
    message = cbor2.loads(path.read_bytes())
    frames = {}
    for channel, array in message["data"].items():
        shape, typed = array.value
        algorithm, item, payload = typed.value.value
        dtype = {64: "u1", 69: "<u2", 70: "<u4"}[typed.tag]
        assert item in (0, np.dtype(dtype).itemsize)
        frames[channel] = Frame(
            series=Series(),
            image_id=message["image_id"],
            channel=channel,
            encoding=algorithm,
            dtype=np.dtype(dtype),
            shape=tuple(shape),
            payload=payload,
        )
    return frames


@pytest.mark.shared
@pytest.mark.parametrize(
    ("vector", "sums", "n_max_of_difference"),
    [
        ("bslz4_16bit/000001", (909218, 908375, 305475), 194490),
        ("bslz4_16bit/000002", (909218, 908375, 305467), 194494),
        ("bslz4_32bit/000001", (7414309, 7402644, 2469022), 254697),
        ("bslz4_32bit/000002", (7414309, 7402644, 2469020), 254679),
        ("bslz4_8bit/000001", (908237, 909435, 304003), 194994),
        ("bslz4_8bit/000002", (908237, 909435, 304006), 194978),
        ("lz4_16bit/000001", (909298, 909365, 304536), 194742),
        ("lz4_16bit/000002", (909298, 909365, 304514), 194705),
        ("lz4_8bit/000001", (909336, 908359, 304928), 194519),
        ("lz4_8bit/000002", (909336, 908359, 304945), 194529),
    ],
)
def test_recorded_stream2_frames(
    full_backend: Backend, vector: str, sums: tuple[int, int, int], n_max_of_difference: int
) -> None:
    """A vendor's recording gives the published sums and numbers of maximum pixels."""
    frames = vendor_channels("stream2_dectris", f"r500k_bm_{vector}.cbor")
    for channel, wanted in zip(("threshold_1", "threshold_2", "difference"), sums, strict=True):
        frame = frames[channel]
        pixels = full_backend.decode(frame)
        top = np.iinfo(pixels.dtype).max
        assert int(pixels[pixels < top - 1].sum(dtype=np.uint64)) == wanted
        views = full_backend.prepare([frame])
        below = pixels[pixels <= top - 2]
        assert int(views.total.sum()) == int(below.sum(dtype=np.uint64))
        assert int(views.count.sum(dtype=np.int64)) == below.size
        if channel == "difference":
            assert int((pixels == top).sum()) == n_max_of_difference


@pytest.mark.shared
def test_recorded_16m_frame(full_backend: Backend) -> None:
    """An EIGER2 16M message: the published number of maximum pixels and largest valid count."""
    frame = vendor_channels("stream2_tickit", "image.cbor")["threshold_1"]
    pixels = full_backend.decode(frame)
    assert pixels.shape == (4362, 4148)
    assert int((pixels == 65535).sum()) == 1253075
    assert int(full_backend.prepare([frame]).maximum.max()) == 6504


@pytest.mark.shared
def test_recorded_stream1_frame(full_backend: Backend) -> None:
    """A real EIGER 4M blob, 2 pixels of it behind the last block."""
    path = SHARED / "samples" / "stream1_odin" / "streamfile_12"
    if not path.exists():
        pytest.skip("needs ../shared/samples")
    frame = Frame(
        series=Series(),
        image_id=1,
        encoding="bslz4",
        dtype=np.dtype("<u2"),
        shape=(2167, 2070),
        payload=path.read_bytes(),
    )
    pixels = full_backend.decode(frame)
    values, counts = np.unique(pixels, return_counts=True)
    assert dict(zip(values[:5].tolist(), counts[:5].tolist(), strict=True)) == {
        0: 2710437, 1: 27260, 2: 1071099, 3: 852, 4: 312773
    }  # fmt: skip
    assert int(counts[values == 65535].sum()) == 251297
    assert int(full_backend.prepare([frame]).total.sum()) == 4609824


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "encoding", "total", "maximum"),
    [
        ("eiger1_testmode10_2datafiles_4images_bslz4", "bslz4", 2511479273, 65535),
        ("eiger1_testmode10_2datafiles_4images_lz4", "lz4", 2511479273, 65535),
        ("eiger2_simread7_2datafiles_4images_bslz4", "bslz4", 3648540, 7),
        ("eiger2_simread7_2datafiles_4images_bslz4_uint8", "bslz4", 3648540, 7),
        ("eiger2_simread7_2datafiles_4images_bslz4_uint32", "bslz4", 21891240, 42),
        ("eiger2_simread7_2datafiles_4images_lz4", "lz4", 3648540, 7),
    ],
)
def test_recorded_file_chunks(
    full_backend: Backend, name: str, encoding: str, total: int, maximum: int
) -> None:
    """Chunks of detector-written files give the published sum and maximum."""
    path = SHARED / "samples" / "dectris_h5" / f"{name}_data_000001.h5"
    if not path.exists():
        pytest.skip("needs ../shared/samples")
    with h5py.File(path) as file:
        dataset = file["entry/data/data"]
        frame = Frame(
            series=Series(),
            image_id=0,
            encoding=encoding,
            dtype=dataset.dtype,
            shape=dataset.shape[1:],
            payload=dataset.id.read_direct_chunk((0, 0, 0))[1],
        )
    pixels = full_backend.decode(frame)
    assert int(pixels.sum(dtype=np.uint64)) == total
    assert int(pixels.max()) == maximum

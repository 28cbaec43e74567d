"""Every backend against the slow twin: the same numbers, bit for bit."""

from __future__ import annotations

from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest
import reference
from numpy.typing import NDArray

from triage.backends import open_backend
from triage.errors import DecodeError, UnsupportedEncoding
from triage.records import Frame, Geometry, Recipe, Series

GEOMETRY = Geometry(
    beam_center_x_px=61.5,
    beam_center_y_px=40.25,
    pixel_size_x_m=172e-6,
    pixel_size_y_m=172e-6,
    detector_distance_m=0.02,
    incident_wavelength_angstrom=1.0,
)
OPTIONS = {
    "bslz4": hdf5plugin.Bitshuffle(cname="lz4"),
    "bszstd": hdf5plugin.Bitshuffle(cname="zstd"),
    "lz4": hdf5plugin.LZ4(),
}


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def backend(request: pytest.FixtureRequest) -> Any:
    from triage.backends import cuda

    if request.param == "cuda" and (why_not := cuda.unavailable()):
        pytest.skip(f"backend cuda: {why_not}")
    return open_backend(request.param)


def encoded(image: NDArray[Any], encoding: str) -> bytes:
    """What HDF5's own filters make of an image."""
    if encoding == "raw":
        return image.tobytes()
    with h5py.File.in_memory() as file:
        data = file.create_dataset("d", data=image, chunks=image.shape, **OPTIONS[encoding])
        return bytes(data.id.read_direct_chunk((0, 0))[1])


def make_frame(image: NDArray[Any], encoding: str = "bslz4", **series: Any) -> Frame:
    return Frame(
        series=Series(series_id=1, **series),
        image_id=0,
        encoding=encoding,
        dtype=image.dtype,
        shape=image.shape,
        payload=encoded(image, encoding),
    )


def picture(dtype: str, shape: tuple[int, int], seed: int = 0) -> NDArray[Any]:
    """Weak background, bright spots, and every special value of the type."""
    rng = np.random.default_rng(seed)
    image = rng.poisson(0.8, shape).astype(dtype)
    top = 3e4 if dtype == "float32" else np.iinfo(dtype).max
    for value in (top, top - 1, top - 2, top // 3, 17):
        for _ in range(5):
            image[int(rng.integers(shape[0])), int(rng.integers(shape[1]))] = value
    if dtype in ("int16", "int32"):
        for value in (-1, -2, np.iinfo(dtype).min):
            image[int(rng.integers(shape[0])), int(rng.integers(shape[1]))] = value
    if dtype == "float32":
        image += rng.normal(0, 0.3, shape).astype(np.float32)
        image[3, 4], image[5, 6], image[7, 8] = np.nan, np.inf, -np.inf
    return image


TYPES = ["uint8", "uint16", "uint32", "int16", "int32", "float32"]


@pytest.mark.parametrize("encoding", ["bslz4", "lz4", "bszstd", "raw"])
@pytest.mark.parametrize("dtype", TYPES)
def test_what_hdf5_compressed_comes_back_bit_for_bit(
    backend: Any, dtype: str, encoding: str
) -> None:
    """Odd sizes, several blocks, a partial last block and a raw tail."""
    for shape in ((1, 1), (3, 5), (67, 129), (128, 257)):
        rng = np.random.default_rng(1)
        image = (rng.poisson(2.0, shape) * rng.integers(1, 100, shape)).astype(dtype)
        decoded = backend.decode(make_frame(image, encoding))
        assert decoded.dtype == image.dtype
        assert decoded.tobytes() == image.tobytes()


def test_payloads_without_header_decode_as_emulators_send_them(backend: Any) -> None:
    """bslz4 without its 12 bytes has blocks of 8192; lz4 without header is one block."""
    image = picture("uint16", (90, 131))
    payload = encoded(image, "bslz4")[12:]
    frame = Frame(
        series=Series(), image_id=0, encoding="bslz4", framed=False, dtype=image.dtype,
        shape=image.shape, payload=payload,
    )  # fmt: skip
    assert np.array_equal(backend.decode(frame), image)
    # 250 zero bytes as LZ4: one literal, then a match of 244 at offset 1, then five literals.
    block = bytes([0x1F, 0, 1, 0, 225, 0x50, 0, 0, 0, 0, 0])
    assert reference.lz4_block(block) == bytes(250)
    bare = Frame(
        series=Series(), image_id=0, encoding="lz4", framed=False, dtype=np.dtype("u1"),
        shape=(10, 25), payload=block,
    )  # fmt: skip
    assert not backend.decode(bare).any()


@pytest.mark.parametrize("saturation_value", [None, 40])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_views_equal_the_slow_twin(
    backend: Any, dtype: str, masked: bool, saturation_value: int | None
) -> None:
    """Integers and float channels are the twin's bits, for sizes that divide and do not."""
    recipe = Recipe()
    for shape in ((66, 129), (640, 100), (701, 33)):
        image = picture(dtype, shape, seed=shape[0])
        mask = None
        if masked:
            rng = np.random.default_rng(5)
            mask = rng.choice([0, 1, 2, 1 << 16], shape, p=[0.7, 0.1, 0.1, 0.1]).astype(np.uint32)
        frame = make_frame(
            image, pixel_mask=mask, saturation_value=saturation_value, geometry=GEOMETRY
        )
        views = backend.prepare([frame])
        assert views.errors == (None,)
        k = recipe.bin_factor(shape)
        valid, counts = reference.valid_counts(image, mask, saturation_value, None)
        maximum, total, count = reference.cells(valid, counts, k, recipe.grid)
        assert views.bin_factor[0] == k
        assert np.array_equal(views.maximum[0], maximum)
        assert np.array_equal(views.total[0], total)
        assert np.array_equal(views.count[0], count)
        expected = reference.overview(maximum, total, count, k)
        assert views.overview[0].tobytes() == expected.tobytes()


def test_signed_noise_counts_as_zero_where_an_error_value_is_named(backend: Any) -> None:
    """Jungfraujoch: -3 is noise, the error value is no pixel. PILATUS: negative is no pixel."""
    image = np.array([[-3, 5], [-32768, 2]], np.int16)
    with_error = backend.prepare([make_frame(image, error_value=-32768)])
    without = backend.prepare([make_frame(image)])
    assert (with_error.count[0, 0, 0], with_error.total[0, 0, 0]) == (3, 7)
    assert (without.count[0, 0, 0], without.total[0, 0, 0]) == (2, 7)


def test_rings_follow_braggs_law(backend: Any) -> None:
    """Light in one cell appears in the bin and sector that Bragg's law gives, nowhere else."""
    recipe = Recipe()
    for y, x in ((10, 100), (50, 20), (70, 90)):
        image = np.zeros((80, 128), np.uint16)
        # Spread over its cell, so that it is background and not a spot.
        image[y // 2 * 2 : y // 2 * 2 + 2, x // 2 * 2 : x // 2 * 2 + 2] = 50
        radial = backend.prepare([make_frame(image, geometry=GEOMETRY)]).radial[0]
        sector, ring = reference.ring_of_pixel(x // 2 * 2 + 1, y // 2 * 2 + 1, GEOMETRY, recipe)
        assert list(zip(*np.nonzero(radial[0]), strict=True)) == [(sector, ring)]


def test_without_geometry_there_are_no_rings(backend: Any) -> None:
    """The radial view is zero and says so."""
    views = backend.prepare([make_frame(picture("uint16", (64, 64)))])
    assert not views.has_geometry[0]
    assert not views.radial.any()


def test_tiles_show_native_pixels_round_the_strongest_cells(backend: Any) -> None:
    """Two spots far apart are the first two tiles, strongest first, in square roots of counts."""
    image = np.zeros((400, 600), np.uint16)
    image[100, 200], image[300, 480] = 900, 400
    image[0, 0] = 65535
    frame = make_frame(image)
    views = backend.prepare([frame])
    tiles = backend.tiles([frame], views, [0])
    assert tiles.shape == (1, 8, 2, 64, 64)
    # k = 2: the cell of (100, 200) is centred on (101, 201); the window begins 32 before.
    assert tiles[0, 0, 0, 100 - 69, 200 - 169] == 30.0
    assert tiles[0, 1, 0, 300 - 269, 480 - 449] == 20.0
    assert (tiles[0, :2, 0] > 0).sum() == 2
    assert (tiles[0, 0, 1] == 1).all()


def test_a_bad_frame_leaves_its_neighbours_alone(backend: Any) -> None:
    """Errors stand beside the frames they concern; the others equal a batch without it."""
    good = make_frame(picture("uint16", (64, 70)), geometry=GEOMETRY)
    bad = Frame(
        series=Series(), image_id=1, encoding="bslz4", dtype=np.dtype("<u2"), shape=(64, 70),
        payload=b"\x00" * 30,
    )  # fmt: skip
    odd = Frame(series=Series(), image_id=2, encoding="trpx", shape=(8, 8), payload=bytes(128))
    alone = backend.prepare([good])
    views = backend.prepare([bad, good, odd])
    assert isinstance(views.errors[0], DecodeError)
    assert views.errors[1] is None
    assert isinstance(views.errors[2], UnsupportedEncoding)
    assert views.overview[1].tobytes() == alone.overview[0].tobytes()
    assert views.radial[1].tobytes() == alone.radial[0].tobytes()
    assert not views.overview[0].any()


def test_a_small_message_cannot_ask_for_much_memory(backend: Any) -> None:
    """1 kB that declares 10 GB, and a header that disagrees with the shape, are refused."""
    for shape in ((50_000, 100_000), (20_000, 20_000)):
        frame = Frame(
            series=Series(), image_id=0, encoding="bslz4", shape=shape, payload=bytes(1000)
        )
        with pytest.raises(DecodeError):
            backend.decode(frame)
    image = picture("uint16", (64, 70))
    frame = Frame(
        series=Series(), image_id=0, encoding="bslz4", dtype=image.dtype, shape=(64, 71),
        payload=encoded(image, "bslz4"),
    )  # fmt: skip
    with pytest.raises(DecodeError, match="claims"):
        backend.decode(frame)


@pytest.mark.parametrize("encoding", ["bslz4", "lz4"])
def test_corrupted_payloads_are_errors_and_write_nothing_outside(encoding: str) -> None:
    """Thousands of mutated payloads decode or fail; bytes round the output never change."""
    from triage.backends import lz4

    rng = np.random.default_rng(7)
    image = picture("uint16", (40, 51))
    good = np.frombuffer(encoded(image, encoding), np.uint8)
    size, margin = image.nbytes, 64
    failures = 0
    for _ in range(4000):
        payload = good.copy()
        for _ in range(int(rng.integers(1, 6))):
            payload[int(rng.integers(12, payload.size))] = rng.integers(256)
        if rng.random() < 0.3:
            payload = payload[: int(rng.integers(12, payload.size))].copy()
        space = np.full(size + 2 * margin, 0xAB, np.uint8)
        scratch = np.full(8192 + 2 * margin, 0xCD, np.uint8)
        out = space[margin:-margin]
        if encoding == "bslz4":
            inner = scratch[margin:-margin]
            code = lz4.decode_bslz4(payload, 12, 2, 8192, inner, out)
        else:
            code = lz4.decode_lz4(payload, 12, int.from_bytes(good[8:12].tobytes(), "big"), out)
        failures += code != 0
        assert code == 0 or code in lz4.FAULTS
        assert (space[:margin] == 0xAB).all()
        assert (space[-margin:] == 0xAB).all()
        assert (scratch[:margin] == 0xCD).all()
        assert (scratch[-margin:] == 0xCD).all()
    assert failures > 1000

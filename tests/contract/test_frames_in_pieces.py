"""A frame in pieces is to every backend what the same frame in one payload is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from host_cuda import KINDS, make_backend
from msgspec import structs
from pictures import picture

from triage.backends import Backend
from triage.errors import DecodeError, UnsupportedEncoding
from triage.records import Calibration, Frame, Piece, Recipe, Series

RECIPE = Recipe(grid=16, radial_bins=10, sectors=4, tiles=3, tile_px=12)
SHAPE = (40, 56)


@pytest.fixture(scope="module", params=KINDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return make_backend(request.param, RECIPE)


def whole_of(pixels: np.ndarray, series: Series) -> Frame:
    return Frame(
        series=series,
        image_id=0,
        encoding="raw",
        framed=False,
        dtype=pixels.dtype,
        shape=SHAPE,
        payload=pixels.tobytes(),
    )


def in_pieces(pixels: np.ndarray, series: Series, *, is_adc: bool = False) -> Frame:
    """Four quarters, the lower ones upside down."""
    half = SHAPE[0] // 2, SHAPE[1] // 2
    pieces = []
    for top in (0, half[0]):
        for left in (0, half[1]):
            part = pixels[top : top + half[0], left : left + half[1]]
            pieces.append(
                Piece(
                    payload=(part[::-1] if top else part).tobytes(),
                    top=top,
                    left=left,
                    shape=half,
                    bits=8 * pixels.dtype.itemsize,
                    flipped=top > 0,
                    is_adc=is_adc,
                )
            )
    return structs.replace(whole_of(pixels, series), payload=b"", pieces=tuple(pieces))


def same(backend: Backend, found: Frame, wanted: Frame) -> None:
    """Pixels, cells, views and tiles, bit for bit; a sound neighbour in the batch too."""
    assert backend.decode(found).tobytes() == backend.decode(wanted).tobytes()
    views, expected = backend.prepare([found, wanted]), backend.prepare([wanted, wanted])
    assert views.errors == (None, None)
    for name in ("maximum", "total", "count", "overview", "radial"):
        assert getattr(views, name).tobytes() == getattr(expected, name).tobytes(), name
    tiles = backend.close_ups([found, wanted], views, [0, 1]).tiles
    assert tiles.tobytes() == backend.close_ups([wanted, wanted], expected, [0, 1]).tiles.tobytes()


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<u4"])
def test_pieces_give_what_one_payload_gives(backend: Backend, dtype: str) -> None:
    """Decoded, prepared and cut into tiles, rows turned where they ran upwards."""
    pixels = picture(dtype, SHAPE)
    series = Series(pixel_mask=(np.arange(pixels.size) % 7 == 0).reshape(SHAPE).astype(np.uint32))
    same(backend, in_pieces(pixels, series), whole_of(pixels, series))


def test_words_give_what_their_photons_give(backend: Backend) -> None:
    """Pedestal 1000 and ten units for a photon, in every stage alike."""
    photons = np.minimum(picture("<u2", SHAPE), 1000).astype(np.uint16)
    maps = Calibration(
        pedestal=np.full((3, *SHAPE), 1000.0, np.float32),
        photons_per_adu=np.full((3, *SHAPE), 0.1, np.float32),
    )
    words = (1000 + 10 * photons).astype(np.uint16)
    words[::3] |= 1 << 14
    series = Series(calibration=maps)
    same(backend, in_pieces(words, series, is_adc=True), whole_of(photons, series))


def test_a_piece_that_is_missing_is_left_out(backend: Backend) -> None:
    """Its pixels are the largest value, which is no count."""
    pixels = picture("<u2", SHAPE)
    series = Series()
    three = in_pieces(pixels, series)
    three = structs.replace(three, pieces=three.pieces[:3])
    pixels[SHAPE[0] // 2 :, SHAPE[1] // 2 :] = 65535
    same(backend, three, whole_of(pixels, series))


def test_a_frame_that_cannot_be_put_together_harms_no_other(backend: Backend) -> None:
    """Its row has the error, the next frame its views."""
    pixels = picture("<u2", SHAPE)
    series = Series()
    sound = whole_of(pixels, series)
    words = in_pieces(pixels, series, is_adc=True)
    short = structs.replace(
        in_pieces(pixels, series),
        pieces=(dataclasses.replace(words.pieces[0], is_adc=False, payload=b"short"),),
    )
    views = backend.prepare([words, sound, short])
    assert isinstance(views.errors[0], UnsupportedEncoding)
    assert views.errors[1] is None
    assert isinstance(views.errors[2], DecodeError)
    expected = backend.prepare([sound])
    assert views.maximum[1].tobytes() == expected.maximum[0].tobytes()
    assert not views.maximum[0].any()

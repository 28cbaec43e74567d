"""Messages that real detectors and third-party emulators sent, through the parsers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triage.backends import open_backend
from triage.ingest.stream1 import Stream1Parser
from triage.ingest.stream2 import Stream2Parser
from triage.records import Message, Reason

pytestmark = pytest.mark.shared

# Sum of all pixels below the maximum - 1, and pixels at the maximum, per channel and image:
# the figures of ../shared/samples/README.md.
DECTRIS: dict[str, Any] = {
    "bslz4_16bit": (
        "bslz4",
        "<u2",
        {1: ((909218, 0), (908375, 0), (305475, 194490)),
         2: ((909218, 0), (908375, 0), (305467, 194494))},
    ),
    "bslz4_32bit": (
        "bslz4",
        "<u4",
        {1: ((7414309, None), (7402644, None), (2469022, 254697)),
         2: ((7414309, None), (7402644, None), (2469020, 254679))},
    ),
    "bslz4_8bit": (
        "bslz4",
        "|u1",
        {1: ((908237, None), (909435, None), (304003, 194994)),
         2: ((908237, None), (909435, None), (304006, 194978))},
    ),
    "lz4_16bit": (
        "lz4",
        "<u2",
        {1: ((909298, None), (909365, None), (304536, 194742)),
         2: ((909298, None), (909365, None), (304514, 194705))},
    ),
    "lz4_8bit": (
        "lz4",
        "|u1",
        {1: ((909336, None), (908359, None), (304928, 194519)),
         2: ((909336, None), (908359, None), (304945, 194529))},
    ),
}  # fmt: skip
CHANNELS = ("threshold_1", "threshold_2", "difference")


def figures(message: Message) -> tuple[int, int]:
    assert message.frame is not None
    pixels = open_backend("cpu").decode(message.frame)
    top = int(np.iinfo(pixels.dtype).max)
    return int(pixels[pixels < top - 1].sum(dtype=np.int64)), int((pixels == top).sum())


@pytest.mark.parametrize("channel", range(3))
@pytest.mark.parametrize("name", DECTRIS)
def test_vendor_images_decode_to_the_vendors_numbers(shared: Path, name: str, channel: int) -> None:
    """Every channel of both images: shape, pixel type, encoding, sum and masked pixels."""
    encoding, dtype, images = DECTRIS[name]
    folder = shared / "samples" / "stream2_dectris" / f"r500k_bm_{name}"
    parser = Stream2Parser(CHANNELS[channel])
    for number, expected in images.items():
        data = (folder / f"{number:06d}.cbor").read_bytes()
        message = parser.parse([data], 0)
        frame = message.frame
        assert message.kind == "image"
        assert frame is not None
        assert (frame.channel, frame.shape) == (CHANNELS[channel], (514, 1030))
        assert (frame.encoding, frame.dtype.str) == (encoding, dtype)
        assert isinstance(frame.payload, memoryview)
        assert frame.payload.obj is data, "the payload was copied"
        total, masked = figures(message)
        assert total == expected[channel][0]
        assert expected[channel][1] in (None, masked)


def test_a_vendor_image_without_its_start_is_kept_with_the_reason(shared: Path) -> None:
    """The vendor's start messages are not held: the images count as joined late."""
    path = shared / "samples" / "stream2_dectris" / "r500k_bm_bslz4_16bit" / "000001.cbor"
    frame = Stream2Parser().parse([path.read_bytes()], 0).frame
    assert frame is not None
    assert frame.fault is Reason.GEOMETRY_CHANGED
    assert not frame.series.started


def test_every_vendor_end_parses(shared: Path) -> None:
    """Six end messages, 32 bit LZ4 among them."""
    ends = sorted((shared / "samples" / "stream2_dectris").glob("*/000011.cbor"))
    assert len(ends) == 6
    for path in ends:
        message = Stream2Parser().parse([path.read_bytes()], 0)
        assert message.kind == "end"
        assert message.series is not None
        assert len(message.series.series_unique_id) == 26


def test_tickit_v2_series(shared: Path) -> None:
    """No magic on the start, stub masks, one channel streamed: all of it is used."""
    folder = shared / "samples" / "stream2_tickit"
    parser = Stream2Parser()
    start, image, end = (
        parser.parse([(folder / f"{name}.cbor").read_bytes()], 0)
        for name in ("start", "image", "end")
    )
    assert (start.kind, image.kind, end.kind) == ("start", "image", "end")
    assert start.series is not None
    assert start.series.pixel_mask is None
    assert image.frame is not None
    assert image.frame.shape == (4362, 4148)
    pixels = open_backend("cpu").decode(image.frame)
    assert int((pixels == 65535).sum()) == 1253075
    assert int(pixels[pixels < 65534].max()) == 6504


def odin(shared: Path, *numbers: int) -> list[bytes]:
    folder = shared / "samples" / "stream1_odin"
    return [(folder / f"streamfile_{n}").read_bytes() for n in numbers]


def test_odin_v1_series(shared: Path) -> None:
    """Header with all details and appendix, three images, end with a newline."""
    parser = Stream1Parser()
    # Parts 4 and 6, flatfield and mask, are not held: empty ones stand for them.
    first = odin(shared, 1, 2, 3)
    header = [*first, b"", *odin(shared, 5), b"", *odin(shared, 7, 8, 9)]
    start = parser.parse(header, 0)
    assert start.kind == "start"
    assert start.series is not None
    assert (start.series.image_size_y_px, start.series.image_size_x_px) == (2167, 2070)
    for begin in (10, 14, 18):
        message = parser.parse(odin(shared, begin, begin + 1, begin + 2, begin + 3), 0)
        assert message.frame is not None
        assert message.frame.fault is None
        pixels = open_backend("cpu").decode(message.frame)
        assert pixels.shape == (2167, 2070)
        assert int((pixels == 65535).sum()) == 251297
        assert int(pixels[pixels < 65534].sum(dtype=np.int64)) == 4609824
        histogram = [int((pixels == v).sum()) for v in range(5)]
        assert histogram == [2710437, 27260, 1071099, 852, 312773]
    assert parser.parse(odin(shared, 22), 0).kind == "end"


def test_tickit_v1_blob(shared: Path) -> None:
    """EIGER2 16M: pixels at the maximum and the sum of the others."""
    blob = (shared / "samples" / "stream1_tickit" / "frame_sample.bin").read_bytes()
    parts = [
        b'{"htype": "dimage-1.0", "series": 1, "frame": 0, "hash": ""}',
        json.dumps(
            {
                "htype": "dimage_d-1.0",
                "shape": [4148, 4362],
                "type": "uint16",
                "encoding": "bs16-lz4<",
            }
        ).encode(),
        blob,
    ]
    message = Stream1Parser().parse(parts, 0)
    assert figures(message) == (9876, 1253074)


def read_zcap(path: Path) -> list[list[bytes]]:
    data, at, messages = path.read_bytes(), 0, []
    while at < len(data):
        (count,) = struct.unpack_from("<I", data, at)
        at += 4
        parts = []
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", data, at)
            at += 8
            parts.append(data[at : at + length])
            at += length
        messages.append(parts)
    return messages


def test_libertem_capture_is_survived(shared: Path) -> None:
    """Header and configuration apart, zeroed blob headers: frame i is constant i."""
    parser = Stream1Parser()
    folder = shared / "samples" / "third_party_captures"
    messages = [
        parser.parse(parts, 0) for parts in read_zcap(folder / "libertem_mock_v1_3frames.zcap")
    ]
    frames = [m.frame for m in messages if m.frame is not None]
    assert [m.kind.value for m in messages if m.frame is None][-1] == "end"
    assert len(frames) == 3
    for i, frame in enumerate(frames):
        assert frame.fault is None
        assert (open_backend("cpu").decode(frame) == i).all()


def test_eiger_simulator_capture_is_survived(shared: Path) -> None:
    """No blob header, an empty hash: four frames of the shape they declare."""
    parser = Stream1Parser()
    folder = shared / "samples" / "third_party_captures"
    messages = [
        parser.parse(parts, 0) for parts in read_zcap(folder / "eigersim_0.5.1_v1_4frames.zcap")
    ]
    frames = [m.frame for m in messages if m.frame is not None]
    assert len(frames) == 4
    for frame in frames:
        assert open_backend("cpu").decode(frame).shape == frame.shape

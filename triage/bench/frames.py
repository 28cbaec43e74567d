"""Frames to measure on: seeded, compressed once, held in memory, the same on every machine.

A frame is what an EIGER records: Poisson counts that fall with the radius, one ring, some three
hundred sharp spots where a crystal diffracts, gaps between modules and dead pixels with every bit
set. What is measured depends on how well a frame compresses, so the count level is a parameter.
Frames come as the messages that a detector sends and go through the product's own parser.
"""

from __future__ import annotations

import functools
import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cbor2
import numpy as np
from numpy.typing import NDArray

from triage.errors import ConfigError
from triage.ingest.stream2 import Stream2Parser
from triage.records import Frame

__all__ = [
    "LEVELS",
    "SIZES",
    "Pool",
    "PoolSpec",
    "encoded",
    "end_message",
    "image_number_at",
    "image_template",
    "made_pool",
    "stamped",
]

SIZES = {
    "0.1M": (320, 320),
    "0.5M": (514, 1030),
    "1M": (1065, 1030),
    "4M": (2167, 2070),
    "16M": (4371, 4150),
}
"""Shapes (y, x): whole modules of 514 x 1030 with gaps of 37 and 10 between; 0.1M is a region."""

LEVELS = {"weak": (0.5, 0.02), "typ": (3.0, 0.5), "strong": (12.0, 2.0)}
"""Counts per pixel at the beam and at the farthest corner."""

_MODULE, _GAP = (514, 1030), (37, 10)
_RING_OVER_CENTRE = 0.25
"""Height of the ring as a share of the level at the beam: 0.75 counts at ``typ``."""
_SPOTS = 300
_DEAD_SHARE = 1e-4
_SERIES_MARK, _IMAGE_MARK = 0xFEDCBA97, 0xFEDCBA98
"""Stand in a message where a number goes; wide enough that CBOR gives them four bytes."""
_UNIQUE_ID = "01BENCH0000000000000000000"
_TAGS = {8: 64, 16: 69, 32: 70}
_DATE = "2026-01-01T00:00:00.000+00:00"
_CLOCK_HZ = 50_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpec:
    """Which frames.

    Attributes:
        size: a key of :data:`SIZES`.
        bits: 8, 16 or 32 per pixel.
        level: a key of :data:`LEVELS`.
        hit_every: one frame in so many has spots: 2, or 10 for a run of 90 % blanks.
        count: distinct frames.
        seed: of everything random.
    """

    size: str
    bits: int = 16
    level: str = "typ"
    hit_every: int = 2
    count: int = 10
    seed: int = 20260101

    @property
    def name(self) -> str:
        """Such as ``4M u16 typ``."""
        return f"{self.size} u{self.bits} {self.level}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pool:
    """The frames of a specification, in the forms that a benchmark asks for.

    Attributes:
        start: the start message, mask and geometry in it.
        templates: one image message per frame; :func:`stamped` numbers them.
        frames: the same, parsed: payload still compressed.
        sha256: over the mask and all payloads.
    """

    spec: PoolSpec
    start: bytes
    templates: tuple[bytes, ...]
    frames: tuple[Frame, ...]
    sha256: str

    @property
    def shape(self) -> tuple[int, int]:
        """(y, x)."""
        return SIZES[self.spec.size]

    @property
    def described(self) -> dict[str, Any]:
        """What a record says of its input."""
        payload = sum(len(frame.payload) for frame in self.frames) / len(self.frames)
        pixels = math.prod(self.shape)
        return {
            "frames": len(self.frames),
            "shape": list(self.shape),
            "bits": self.spec.bits,
            "level": self.spec.level,
            "hit_every": self.spec.hit_every,
            "seed": self.spec.seed,
            "payload_bytes": round(payload),
            "compression": round(pixels * self.spec.bits / 8 / payload, 2),
            "sha256": self.sha256,
        }


@functools.lru_cache(maxsize=16)
def made_pool(spec: PoolSpec) -> Pool:
    """The frames of ``spec``; kept in memory for the next who asks.

    Raises:
        ConfigError: a size, level or depth that is not known.
    """
    if spec.size not in SIZES or spec.level not in LEVELS or spec.bits not in _TAGS:
        raise ConfigError(
            f"frames {spec.name}: expected a size of {', '.join(SIZES)}, a level of "
            f"{', '.join(LEVELS)} and 8, 16 or 32 bits"
        )
    shape = SIZES[spec.size]
    rng = np.random.default_rng(spec.seed)
    mask = _pixel_mask(shape, rng)
    beam = (0.5 * shape[1] + 7.3, 0.5 * shape[0] - 4.6)
    rate = _background(shape, beam, *LEVELS[spec.level])
    digest = hashlib.sha256(mask.tobytes())
    templates = []
    for i in range(spec.count):
        image = _drawn(rate, mask, spec.bits, rng, spots=_SPOTS if i % spec.hit_every == 0 else 0)
        payload = encoded(image)
        digest.update(payload)
        templates.append(image_template(image.shape, spec.bits, payload))
    start = _start_message(shape, spec.bits, beam, mask)
    parser = Stream2Parser()
    parser.parse([stamped(start, 1)], 0)
    messages = [parser.parse([stamped(t, 1, i)], 0) for i, t in enumerate(templates)]
    return Pool(
        spec=spec,
        start=start,
        templates=tuple(templates),
        frames=tuple(m.frame for m in messages if m.frame is not None),
        sha256=digest.hexdigest(),
    )


def stamped(template: bytes, series_id: int, image_id: int | None = None) -> bytes:
    """A message with its numbers filled in."""
    out = bytearray(template)
    struct.pack_into(">I", out, template.index(_SERIES_MARK.to_bytes(4, "big")), series_id)
    if image_id is not None:
        struct.pack_into(">I", out, image_number_at(template), image_id)
    return bytes(out)


def image_number_at(template: bytes) -> int:
    """Where the four bytes of the image's number stand."""
    return template.index(_IMAGE_MARK.to_bytes(4, "big"))


def encoded(image: NDArray[Any]) -> bytes:
    """Bitshuffle-LZ4 with HDF5 framing and blocks of 8 KiB, as HDF5's own filter makes it."""
    import h5py
    import hdf5plugin

    options = hdf5plugin.Bitshuffle(nelems=8192 // image.itemsize, cname="lz4")
    with h5py.File.in_memory() as file:
        dataset = file.create_dataset("d", data=image, chunks=image.shape, **options)
        return bytes(dataset.id.read_direct_chunk((0, 0))[1])


def _pixel_mask(shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.uint32]:
    """NXmx bits: 1 in a gap, 2 on a dead pixel."""
    gaps = [
        np.arange(side) % (module + gap) >= module
        for side, module, gap in zip(shape, _MODULE, _GAP, strict=True)
    ]
    mask = np.zeros(shape, np.uint32)
    mask[rng.random(shape) < _DEAD_SHARE] = 2
    mask[gaps[0], :] = 1
    mask[:, gaps[1]] = 1
    return mask


def _background(
    shape: tuple[int, int], beam: tuple[float, float], centre: float, corner: float
) -> NDArray[np.float64]:
    """Expected counts: ``centre`` at the beam, falling by the same share per pixel to
    ``corner``, and a ring."""
    y, x = np.indices(shape, np.float32)
    radius = np.hypot(x - beam[0], y - beam[1])
    farthest = float(radius.max())
    rate = centre * (corner / centre) ** (radius / farthest)
    width = max(2.0, 0.004 * farthest)
    ring = np.exp(-0.5 * ((radius - 0.4 * farthest) / width) ** 2)
    return np.asarray(rate + _RING_OVER_CENTRE * centre * ring, np.float64)


def _drawn(
    rate: NDArray[np.float64],
    mask: NDArray[np.uint32],
    bits: int,
    rng: np.random.Generator,
    spots: int,
) -> NDArray[Any]:
    counts = rng.poisson(rate)
    margin = 4
    for _ in range(spots):
        y = rng.uniform(margin, rate.shape[0] - margin)
        x = rng.uniform(margin, rate.shape[1] - margin)
        total = 60.0 + rng.exponential(300.0)
        top, left = int(y) - 3, int(x) - 3
        dy = np.arange(top, top + 7) + 0.5 - y
        dx = np.arange(left, left + 7) + 0.5 - x
        # Sharp: a standard deviation of 0.7 pixels.
        shape_ = np.exp(-(dy[:, None] ** 2 + dx[None, :] ** 2) / (2 * 0.7**2))
        counts[top : top + 7, left : left + 7] += rng.poisson(total * shape_ / (2 * np.pi * 0.7**2))
    dtype = np.dtype(f"<u{bits // 8}")
    top_value = int(np.iinfo(dtype).max)
    image = np.minimum(counts, top_value - 2).astype(dtype)
    image[mask != 0] = top_value
    return image


def _tagged(shape: Sequence[int], bits: int, payload: bytes) -> cbor2.CBORTag:
    content = cbor2.CBORTag(56500, ["bslz4", bits // 8, payload])
    return cbor2.CBORTag(40, [list(shape), cbor2.CBORTag(_TAGS[bits], content)])


def _start_message(
    shape: tuple[int, int], bits: int, beam: tuple[float, float], mask: NDArray[np.uint32]
) -> bytes:
    pixel_m = 75e-6
    # 2.0 angstrom at the nearer edge with 1.0 angstrom: tan(2 theta) = half side / distance.
    distance_m = 0.5 * min(shape) * pixel_m / math.tan(2.0 * math.asin(0.25))
    return cbor2.dumps(
        cbor2.CBORTag(
            55799,
            {
                "type": "start",
                "series_id": _SERIES_MARK,
                "series_unique_id": _UNIQUE_ID,
                "arm_date": cbor2.CBORTag(0, _DATE),
                "beam_center_x": beam[0],
                "beam_center_y": beam[1],
                "channels": ["threshold_1"],
                "count_time": 0.001,
                "detector_description": "Synthetic EIGER",
                "detector_serial_number": "B-00-0000",
                "detector_translation": [0.0, 0.0, distance_m],
                "frame_time": 0.001,
                "goniometer": {"omega": {"start": 0.0, "increment": 0.0}},
                "image_dtype": f"uint{bits}",
                "image_size_x": shape[1],
                "image_size_y": shape[0],
                "incident_wavelength": 1.0,
                "number_of_images": 1_000_000_000,
                "pixel_mask_enabled": True,
                "pixel_mask": {"threshold_1": _tagged(shape, 32, encoded(mask))},
                "pixel_size_x": pixel_m,
                "pixel_size_y": pixel_m,
                "saturation_value": 2**bits - 3,
                "sensor_material": "Si",
                "sensor_thickness": 4.5e-4,
            },
        )
    )


def image_template(shape: tuple[int, ...], bits: int, payload: bytes) -> bytes:
    """An image message round ``payload``, its numbers still to be :func:`stamped`."""
    ticks = _CLOCK_HZ // 1000
    return cbor2.dumps(
        cbor2.CBORTag(
            55799,
            {
                "type": "image",
                "series_id": _SERIES_MARK,
                "series_unique_id": _UNIQUE_ID,
                "image_id": _IMAGE_MARK,
                "real_time": [ticks, _CLOCK_HZ],
                "series_date": cbor2.CBORTag(0, _DATE),
                "start_time": [0, _CLOCK_HZ],
                "stop_time": [ticks, _CLOCK_HZ],
                "data": {"threshold_1": _tagged(shape, bits, payload)},
            },
        )
    )


def end_message(series_id: int) -> bytes:
    """The end of a series."""
    fields = {"type": "end", "series_id": series_id, "series_unique_id": _UNIQUE_ID}
    return cbor2.dumps(cbor2.CBORTag(55799, fields))

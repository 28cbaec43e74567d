"""Frames ready to send: simulated or recorded, compressed once, with their truth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["SimFrame", "StreamInfo", "compressed", "recorded_frames", "simulated_frames"]

_BITSHUFFLE, _LZ4 = 32008, 32004


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SimFrame:
    """One image as it goes on the wire.

    Attributes:
        payload: bytes in ``encoding``: bslz4 and lz4 with HDF5 framing, or raw.
        shape: (y, x).
        truth: labels that travel beside the image.
    """

    payload: bytes
    encoding: str
    dtype: np.dtype[Any]
    shape: tuple[int, int]
    truth: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StreamInfo:
    """What the start message says of the experiment. Lengths in metre unless named."""

    series_id: int = 1
    series_unique_id: str = "01J000000000000000000000AA"
    number_of_images: int = 0
    shape: tuple[int, int] = (0, 0)
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype("<u2"))
    channels: tuple[str, ...] = ("threshold_1",)
    beam_center_x_px: float = 0.0
    beam_center_y_px: float = 0.0
    pixel_size_x_m: float = 75e-6
    pixel_size_y_m: float = 75e-6
    detector_distance_m: float = 0.0
    incident_wavelength_angstrom: float = 1.0
    count_time_s: float = 0.01
    saturation_value: int = 65533
    error_value: int | None = None
    omega_increment_deg: float = 0.0
    pixel_mask: NDArray[np.uint32] | None = None


def compressed(image: NDArray[Any], encoding: str) -> bytes:
    """The chunk that HDF5's own filter makes of an image; ``raw`` for its plain bytes."""
    if encoding == "raw":
        return image.astype(image.dtype.newbyteorder("<")).tobytes()
    import h5py
    import hdf5plugin

    options = {
        "bslz4": hdf5plugin.Bitshuffle(cname="lz4"),
        "bszstd": hdf5plugin.Bitshuffle(cname="zstd"),
        "lz4": hdf5plugin.LZ4(),
    }[encoding]
    with h5py.File.in_memory() as file:
        dataset = file.create_dataset("d", data=image, chunks=image.shape, **options)
        return bytes(dataset.id.read_direct_chunk((0, 0))[1])


def simulated_frames(
    *,
    shape: tuple[int, int],
    count: int,
    seed: int,
    blank_share: float,
    encoding: str = "bslz4",
    signed: bool = False,
) -> tuple[StreamInfo, list[SimFrame]]:
    """Frames of an EIGER-like detector at one geometry, and what its start message says.

    Args:
        signed: int32 pixels, the lowest value where there is no count, as Jungfraujoch sends.
    """
    from simulators.diffraction import Camera, draw_spec, geometry_of, render

    camera = Camera(family="eiger", shape=shape, pixel_m=75e-6, module=(514, 1030), gap=(37, 10))
    rng = np.random.default_rng(seed)
    base = draw_spec(rng, camera=camera)
    wavelength = 1.0
    distance = 0.5 * max(shape) * camera.pixel_m / math.tan(2 * math.asin(wavelength / 4.0))
    beam = (0.5 * shape[1] + 7.3, 0.5 * shape[0] - 4.6)
    background = float(np.exp(rng.uniform(np.log(0.1), np.log(1.0))))
    frames = []
    mask = None
    error = int(np.iinfo(np.int32).min)
    for _ in range(count):
        drawn = draw_spec(rng, camera=camera, blank_share=blank_share, between_share=0.05)
        spec = replace(
            drawn,
            wavelength_angstrom=wavelength,
            distance_m=distance,
            beam_px=beam,
            beamstop_px=25.0,
            arm_rad=1.57,
            shadow=0.0,
            mean_background=drawn.mean_background if drawn.kind == "dark" else background,
        )
        rendered = render(spec)
        mask = rendered.mask
        image = rendered.image
        if signed:
            image = np.where(image > camera.saturation_value, error, image.astype(np.int64))
            image = image.astype("<i4")
        frames.append(
            SimFrame(
                payload=compressed(image, encoding),
                encoding=encoding,
                dtype=image.dtype,
                shape=shape,
                truth=rendered.truth,
            )
        )
    geometry = geometry_of(replace(base, wavelength_angstrom=wavelength, distance_m=distance))
    info = StreamInfo(
        shape=shape,
        dtype=np.dtype("<i4") if signed else camera.dtype,
        beam_center_x_px=beam[0],
        beam_center_y_px=beam[1],
        pixel_size_x_m=geometry["pixel_size_x_m"],
        pixel_size_y_m=geometry["pixel_size_y_m"],
        detector_distance_m=distance,
        incident_wavelength_angstrom=wavelength,
        saturation_value=camera.saturation_value,
        error_value=error if signed else None,
        pixel_mask=mask,
    )
    return info, frames


def recorded_frames(paths: Sequence[Path], count: int) -> tuple[StreamInfo, list[SimFrame]]:
    """Up to ``count`` frames of recorded files, their compressed bytes as stored where they can
    travel as they are.

    Raises:
        ValueError: no frames, or frames of several shapes: one series has one shape.
    """
    frames: list[SimFrame] = []
    for path in paths:
        read = _hdf5_frames if path.suffix in (".h5", ".cxi", ".nxs") else _other_frames
        for frame in read(path):
            if len(frames) == count:
                break
            frames.append(frame)
    shapes = {frame.shape for frame in frames}
    if len(shapes) != 1:
        raise ValueError(
            f"{len(frames)} frames of shapes {sorted(shapes)} in {', '.join(map(str, paths))}; "
            "expected one shape"
        )
    first = frames[0]
    top = 2**31 if first.dtype.kind != "u" else int(np.iinfo(first.dtype).max) - 2
    info = StreamInfo(
        shape=first.shape, dtype=first.dtype, detector_distance_m=0.0, saturation_value=top
    )
    return info, frames


def _hdf5_frames(path: Path) -> Iterator[SimFrame]:
    import h5py
    import hdf5plugin  # noqa: F401 - registers the filters

    with h5py.File(path) as file:
        found: list[Any] = []

        def visit(name: str, item: object) -> None:
            if isinstance(item, h5py.Dataset) and item.ndim in (2, 3) and item.size > 10_000:
                found.append(item)

        file.visititems(visit)
        if not found:
            raise ValueError(f"{path}: no images; expected a dataset of two or three dimensions")
        dataset = max(found, key=lambda d: d.size)
        for i in range(dataset.shape[0] if dataset.ndim == 3 else 1):
            yield _hdf5_frame(dataset, i)


def _hdf5_frame(dataset: Any, i: int) -> SimFrame:
    shape = (int(dataset.shape[-2]), int(dataset.shape[-1]))
    per_frame = dataset.ndim == 3 and dataset.chunks == (1, *shape)
    filters = dataset.id.get_create_plist()
    if per_frame and filters.get_nfilters() == 1:
        code, _, options, _ = filters.get_filter(0)
        encoding = "lz4" if code == _LZ4 else ""
        if code == _BITSHUFFLE and len(options) > 4 and options[4] == 2:
            encoding = "bslz4"
        if encoding:
            payload = bytes(dataset.id.read_direct_chunk((i, 0, 0))[1])
            return SimFrame(payload=payload, encoding=encoding, dtype=dataset.dtype, shape=shape)
    image = dataset[i] if dataset.ndim == 3 else dataset[()]
    return SimFrame(
        payload=compressed(image, "bslz4"), encoding="bslz4", dtype=image.dtype, shape=shape
    )


def _other_frames(path: Path) -> Iterator[SimFrame]:
    import fabio

    with fabio.open(str(path)) as opened:
        image = np.ascontiguousarray(opened.data)
    yield SimFrame(
        payload=compressed(image, "bslz4"),
        encoding="bslz4",
        dtype=image.dtype,
        shape=(image.shape[0], image.shape[1]),
    )

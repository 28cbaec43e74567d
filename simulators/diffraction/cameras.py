"""Detector families: sizes, pixels, gaps and faults."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["CAMERAS", "Camera", "module_gaps"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Camera:
    """One detector.

    Attributes:
        family: eiger, pilatus, jungfrau or ccd.
        shape: (y, x).
        pixel_m: pitch.
        module: (y, x) active pixels of a module, (0, 0) = no gaps.
        gap: (y, x) pixels between modules.
        weight: how often it is drawn.
        held_out: kept out of the training preset.
    """

    family: str
    shape: tuple[int, int]
    pixel_m: float
    module: tuple[int, int] = (0, 0)
    gap: tuple[int, int] = (0, 0)
    weight: float = 1.0
    held_out: bool = False

    @property
    def dtype(self) -> np.dtype[np.int32] | np.dtype[np.uint16]:
        """PILATUS writes int32 with negative gaps, the others uint16."""
        return np.dtype(np.int32) if self.family == "pilatus" else np.dtype(np.uint16)

    @property
    def saturation_value(self) -> int:
        """Largest count that is a measurement."""
        return {"pilatus": 1_048_500, "ccd": 65_000}.get(self.family, 65_533)


_EIGER = {"pixel_m": 75e-6, "module": (514, 1030), "gap": (37, 10)}
_PILATUS = {"pixel_m": 172e-6, "module": (195, 487), "gap": (17, 7)}

CAMERAS: tuple[Camera, ...] = (
    Camera(family="eiger", shape=(514, 1030), weight=3.0, **_EIGER),  # type: ignore[arg-type]
    Camera(family="eiger", shape=(1065, 1030), weight=3.0, **_EIGER),  # type: ignore[arg-type]
    Camera(family="eiger", shape=(2167, 2070), weight=0.9, **_EIGER),  # type: ignore[arg-type]
    Camera(family="eiger", shape=(3269, 3110), weight=0.8, **_EIGER),  # type: ignore[arg-type]
    Camera(family="pilatus", shape=(619, 487), weight=2.0, **_PILATUS),  # type: ignore[arg-type]
    Camera(family="pilatus", shape=(1043, 981), weight=3.0, **_PILATUS),  # type: ignore[arg-type]
    Camera(family="pilatus", shape=(2527, 2463), weight=0.9, **_PILATUS),  # type: ignore[arg-type]
    Camera(
        family="jungfrau",
        shape=(512, 1024),
        pixel_m=75e-6,
        module=(256, 256),
        gap=(2, 2),
        weight=2.0,
    ),
    Camera(family="ccd", shape=(1152, 1152), pixel_m=102e-6, weight=1.2),
    Camera(family="ccd", shape=(960, 960), pixel_m=177e-6, weight=1.2),
    Camera(family="ccd", shape=(1536, 1536), pixel_m=102.6e-6, weight=0.6),
    Camera(
        family="eiger",
        shape=(1028, 1062),
        held_out=True,
        pixel_m=75e-6,
        module=(512, 1028),
        gap=(4, 6),
        weight=3.0,
    ),
    Camera(
        family="pilatus",
        shape=(1679, 1475),
        held_out=True,
        weight=2.0,
        **_PILATUS,  # type: ignore[arg-type]
    ),
    Camera(
        family="jungfrau",
        shape=(1064, 1030),
        pixel_m=75e-6,
        module=(514, 1030),
        gap=(36, 0),
        weight=2.0,
        held_out=True,
    ),
    Camera(family="ccd", shape=(1024, 1024), pixel_m=160e-6, weight=2.0, held_out=True),
)


@functools.lru_cache(maxsize=4)
def module_gaps(camera: Camera) -> NDArray[np.bool_]:
    """(y, x) True between modules; shared, so not to be written to."""
    gaps = np.zeros(camera.shape, np.bool_)
    for axis in (0, 1):
        active, gap = camera.module[axis], camera.gap[axis]
        if active == 0 or gap == 0:
            continue
        position = np.arange(camera.shape[axis]) % (active + gap) >= active
        gaps |= position[:, None] if axis == 0 else position[None, :]
    gaps.flags.writeable = False
    return gaps

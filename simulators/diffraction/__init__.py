"""A seeded forward model of diffraction frames, with the truth of what is visible on them."""

from __future__ import annotations

from simulators.diffraction.cameras import CAMERAS, Camera
from simulators.diffraction.frames import FrameSpec, Rendered, draw_camera, draw_spec, render
from simulators.diffraction.recipes import Recipe, load_recipe
from simulators.diffraction.shards import GEOMETRY_NAMES, LABEL_NAMES, geometry_of, write_shards

__all__ = [
    "CAMERAS",
    "GEOMETRY_NAMES",
    "LABEL_NAMES",
    "Camera",
    "FrameSpec",
    "Recipe",
    "Rendered",
    "draw_camera",
    "draw_spec",
    "geometry_of",
    "load_recipe",
    "render",
    "write_shards",
]

"""Labelled shards: HDF5 files of simulated frames, for training and testing.

A shard holds frames of one detector::

    /data                 (N, y, x) one frame a chunk, bitshuffle-LZ4
    /mask                 (y, x) uint32, NXmx bits
    /geometry/<name>      (N,) float64, names and units as in NXmx-minded programs
    /labels/<name>        (N,) float32, NaN = undefined for that frame
    /nominal/<name>       (N,) float32, what was put in
    /reflections/<name>   (R,) float32, those of all frames, frame by frame; names and units as in
                          ``truth.REFLECTION``
    /reflections/first    (N + 1,) int64, where those of each frame begin
    attributes            seed, recipe, family, saturation_value, version

Each shard is drawn from (seed, recipe, shard number) alone, so it is the same whoever makes it,
and a finished shard is not made again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulators.diffraction.frames import FrameSpec, draw_camera, draw_spec, render
from simulators.diffraction.recipes import Recipe, load_recipe
from simulators.diffraction.truth import REFLECTION

__all__ = ["GEOMETRY_NAMES", "LABEL_NAMES", "VERSION", "geometry_of", "write_shards"]

VERSION = 8
"""Changes whenever the same seed gives other frames."""

LABEL_NAMES = (
    "blank",
    "ice",
    "bad_ice",
    "multilattice",
    "mosaicity_deg",
    "quality",
    "n_lattices",
    "d_vis_angstrom",
    "n_visible",
    "median_snr",
    "quality_margin",
    "mosaicity_measurable",
    "ice_snr",
)
GEOMETRY_NAMES = (
    "beam_center_x_px",
    "beam_center_y_px",
    "pixel_size_x_m",
    "pixel_size_y_m",
    "detector_distance_m",
    "incident_wavelength_angstrom",
)


def geometry_of(spec: FrameSpec) -> dict[str, float]:
    """The geometry of a frame under the names of :data:`GEOMETRY_NAMES`."""
    return {
        "beam_center_x_px": spec.beam_px[0],
        "beam_center_y_px": spec.beam_px[1],
        "pixel_size_x_m": spec.camera.pixel_m,
        "pixel_size_y_m": spec.camera.pixel_m,
        "detector_distance_m": spec.distance_m,
        "incident_wavelength_angstrom": spec.wavelength_angstrom,
    }


def write_shards(
    out: Path,
    *,
    frames: int | None = None,
    seed: int | None = None,
    workers: int = 1,
    recipe: Recipe | None = None,
    frames_per_shard: int = 32,
    progress: bool = True,
) -> None:
    """Write ``frames`` labelled frames into ``out``; shards that are there are left alone.

    Args:
        frames: as many as the recipe says unless given; ``seed`` likewise.
        recipe: what is drawn from; the shipped ``train`` without one.
        workers: processes; the result does not depend on it.

    Raises:
        ValueError: ``out`` holds shards of another seed or recipe.
    """
    recipe = recipe or load_recipe("train")
    frames = recipe.frames if frames is None else frames
    seed = recipe.seed if seed is None else seed
    out.mkdir(parents=True, exist_ok=True)
    _claim(
        out,
        {
            "version": VERSION,
            "seed": seed,
            "recipe": recipe.name,
            "recipe_fingerprint": recipe.fingerprint,
            "frames": frames_per_shard,
        },
    )
    sizes = [frames_per_shard] * (frames // frames_per_shard)
    if frames % frames_per_shard:
        sizes.append(frames % frames_per_shard)
    jobs = [
        (out / f"shard_{number:05d}.h5", seed, recipe, number, size)
        for number, size in enumerate(sizes)
        if not (out / f"shard_{number:05d}.h5").exists()
    ]
    done = sum(sizes) - sum(job[4] for job in jobs)
    if workers <= 1:
        for job in jobs:
            _write_shard(*job)
            done += job[4]
            _say(progress, done, sum(sizes))
        return
    with ProcessPoolExecutor(workers) as pool:
        waiting = {pool.submit(_write_shard, *job): job for job in jobs}
        for future in as_completed(waiting):
            future.result()
            done += waiting[future][4]
            _say(progress, done, sum(sizes))


def _claim(out: Path, meant: dict[str, object]) -> None:
    path = out / "manifest.json"
    if path.exists():
        found = json.loads(path.read_text())
        if found != meant:
            raise ValueError(
                f"{out}: holds shards made with {found}, asked for {meant}; "
                "expected the same; choose another folder"
            )
    else:
        path.write_text(json.dumps(meant) + "\n")


def _say(progress: bool, done: int, total: int) -> None:
    if progress:
        end = "\n" if done == total else "\r"
        print(f"{done}/{total} frames", end=end, flush=True)


def _write_shard(path: Path, seed: int, recipe: Recipe, number: int, frames: int) -> None:
    import h5py
    import hdf5plugin

    rng = np.random.default_rng([VERSION, seed, int(recipe.fingerprint, 16), number])
    camera = draw_camera(rng, held_out=recipe.who["held_out"])
    known_dead = rng.random(camera.shape) < (10.0 ** rng.uniform(-6.0, -4.0))
    labels = {name: np.full(frames, math.nan, np.float32) for name in LABEL_NAMES}
    geometry = {name: np.empty(frames) for name in GEOMETRY_NAMES}
    nominal: dict[str, list[float]] = {}
    listed: list[NDArray[Any]] = []
    part = path.with_suffix(".part")
    with h5py.File(part, "w") as shard:
        data = shard.create_dataset(
            "data",
            (frames, *camera.shape),
            camera.dtype,
            chunks=(1, *camera.shape),
            **hdf5plugin.Bitshuffle(cname="lz4"),
        )
        for i in range(frames):
            spec = draw_spec(rng, camera=camera, recipe=recipe)
            rendered = render(spec, known_dead)
            data[i] = rendered.image
            for name in LABEL_NAMES:
                labels[name][i] = rendered.truth.get(name, math.nan)
            listed.append(rendered.reflections)
            for name, value in geometry_of(spec).items():
                geometry[name][i] = value
            for name, value in rendered.nominal.items():
                nominal.setdefault(name, []).append(value)
        shard["mask"] = rendered.mask
        for name in LABEL_NAMES:
            shard[f"labels/{name}"] = labels[name]
        for name in GEOMETRY_NAMES:
            shard[f"geometry/{name}"] = geometry[name]
        for name, values in nominal.items():
            shard[f"nominal/{name}"] = np.array(values, np.float32)
        _write_reflections(shard, listed)
        shard.attrs.update(
            seed=seed,
            recipe=recipe.name,
            family=camera.family,
            saturation_value=camera.saturation_value,
            version=VERSION,
        )
    part.replace(path)


def _write_reflections(shard: Any, listed: Sequence[NDArray[Any]]) -> None:
    """Into an open shard, those of each of its frames."""
    first = np.concatenate([[0], np.cumsum([len(each) for each in listed])])
    shard["reflections/first"] = first.astype(np.int64)
    all_of_them = np.concatenate(listed)
    for name in REFLECTION.names or ():
        shard[f"reflections/{name}"] = all_of_them[name].astype(np.float32)

"""How cost grows with work: pixels, and the bytes that hold them.

A stage whose cost is a line through the origin in its work wastes nothing on large frames and
nothing on small ones. Cost is fitted as a fixed part, a part per pixel and a part per payload byte,
by least squares in relative error, over sizes, levels and depths; the residual says how far the
worst kind of frame lies off. The exponent of cost in pixels, at one level, says the same in one
number: 1 is proportional.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from triage.bench import Options, ours
from triage.bench.frames import PoolSpec, made_pool
from triage.bench.measure import alternate
from triage.bench.record import Result

__all__ = ["Fit", "exponent", "fitted", "run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Seconds = fixed + per_px * pixels + per_byte * payload bytes; worst residual as a share."""

    fixed_s: float
    per_px_s: float
    per_byte_s: float
    worst: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One kind of frame and what a stage took for it."""

    spec: PoolSpec
    pixels: int
    payload_bytes: float
    seconds: float


def run(options: Options) -> Result:
    """Integers alone, and message to verdict, on every kind of frame."""
    subject = ours.opened()
    costs: dict[str, list[Cost]] = {"reduce": [], "prepare": [], "decision": []}
    rows: list[dict[str, Any]] = []
    inputs: dict[str, Any] = {}
    for spec in _specs(options.sizes):
        options.say(spec.name)
        pool = made_pool(spec)
        inputs[spec.name] = pool.described
        frames = pool.frames
        samples = alternate(
            {
                "reduce": ours.reduce_integers(pool, ours.kernels(subject.recipe)),
                "prepare": ours.prepare(pool, subject),
                "decision": ours.decide(pool, subject),
            },
            len(frames),
            budget_s=options.seconds,
            clock=time.process_time,
        )
        pixels = math.prod(pool.shape)
        payload = sum(len(frame.payload) for frame in frames) / len(frames)
        row: dict[str, Any] = {"frames": spec.name, "pixels": pixels, "payload_bytes": payload}
        for name, each in samples.items():
            seconds = each.median_s
            costs[name].append(
                Cost(spec=spec, pixels=pixels, payload_bytes=payload, seconds=seconds)
            )
            row[f"{name}_ms"] = seconds * 1e3
        row["reduce_ns_per_px"] = samples["reduce"].median_s / pixels * 1e9
        rows.append(row)
    figures: dict[str, float] = {}
    fits: list[dict[str, Any]] = []
    for name, found in costs.items():
        fit = fitted(found)
        typical = [c for c in found if c.spec.bits == 16 and c.spec.level == "typ"]
        figures[f"{name}_exponent_in_pixels"] = exponent(typical)
        figures[f"{name}_worst_residual"] = fit.worst
        fits.append(
            {
                "stage": name,
                "fixed_us": fit.fixed_s * 1e6,
                "ns_per_px": fit.per_px_s * 1e9,
                "ns_per_payload_byte": fit.per_byte_s * 1e9,
                "worst_residual": fit.worst,
                "exponent": figures[f"{name}_exponent_in_pixels"],
            }
        )
    return Result(
        figures=figures,
        tables={"cost": rows, "fits": fits},
        notes={
            "fit": "seconds = fixed + a * pixels + b * payload bytes, parts not below zero, least "
            "squares of the relative error; residual: largest relative error of any kind of frame",
            "exponent": "slope of log cost over log pixels at 16 bit, typ",
            "why below 1": "the network sees at most 320 x 320 cells whatever the frame, so the "
            "cost of a decision grows more slowly than pixels; and small frames are cut into "
            "smaller cells (2 pixels a side at 0.1M, 4 at 0.5M and 1M, 8 at 4M, 16 at 16M), which "
            "cost more per pixel",
        },
        input=inputs,
    )


def fitted(costs: list[Cost]) -> Fit:
    """The three parts, none below zero, that fit best in relative error."""
    seconds = np.array([c.seconds for c in costs])
    work = np.array([[1.0, c.pixels, c.payload_bytes] for c in costs]) / seconds[:, None]
    best: tuple[float, np.ndarray[Any, Any]] | None = None
    # Few unknowns: every choice of those that are not zero is tried.
    for chosen in ([0, 1, 2], [0, 1], [0, 2], [1, 2], [0], [1], [2]):
        found = np.zeros(3)
        scale = work[:, chosen].max(0)
        found[chosen] = np.linalg.lstsq(work[:, chosen] / scale, np.ones(len(costs)))[0] / scale
        if (found < 0).any():
            continue
        error = float(((work @ found - 1.0) ** 2).sum())
        if best is None or error < best[0]:
            best = error, found
    parts = np.zeros(3) if best is None else best[1]
    worst = float(np.abs(work @ parts - 1.0).max())
    return Fit(
        fixed_s=float(parts[0]), per_px_s=float(parts[1]), per_byte_s=float(parts[2]), worst=worst
    )


def exponent(costs: list[Cost]) -> float:
    """Slope of log cost over log pixels; NaN with fewer than two sizes."""
    if len({c.pixels for c in costs}) < 2:
        return math.nan
    x = np.log([c.pixels for c in costs])
    y = np.log([c.seconds for c in costs])
    return float(np.polyfit(x, y, 1)[0])


def _specs(sizes: tuple[str, ...]) -> Iterator[PoolSpec]:
    for size in sizes or ("0.1M", "0.5M", "1M", "4M", "16M"):
        count = 2 if size == "16M" else 4
        yield PoolSpec(size=size, count=count)
        if size in ("1M", "4M"):
            yield PoolSpec(size=size, level="weak", count=count)
            yield PoolSpec(size=size, level="strong", count=count)
            yield PoolSpec(size=size, bits=32, count=count)
            yield PoolSpec(size=size, bits=8, count=count)

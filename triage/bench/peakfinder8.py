"""Runs OM's peakfinder8 on frames it is told of; a program of its own, for another environment.

    PEER/bin/python triage/bench/peakfinder8.py FRAMES.npz

FRAMES.npz holds ``frames`` (n, y, x) float32, ``mask`` (y, x) int8, 1 where valid, and ``centre``
(x, y) in pixels. The first line printed says what runs; then each line read is ``INDEX MODE`` with
MODE ``fast`` or ``full``, and is answered by one JSON line: CPU seconds and peaks found. OM is
under the GPL: it is installed apart (``benchmarks/peers_env.sh``), and nothing of triage is
imported here.

Frames come as float32, which is what the finder works on, so that making them is not counted.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import metadata
from typing import Any

import numpy as np

PEAKS = {"most": 2048, "adc": 10.0, "snr": 5.0, "least_px": 1, "most_px": 200, "background_px": 3}
"""Thresholds usual for EIGER frames: 10 counts, five sigma, one to two hundred pixels."""

PIXELS_PER_RADIUS = 100
"""OM's own default: so many pixels of each radius give the statistics of the fast mode."""


def main() -> None:
    """Answer lines until the input ends."""
    # OM was written for NumPy 1, where this name stood for float64.
    setattr(np, "float_", np.float64)  # noqa: B010
    from om.algorithms._crystallography import peakfinder_8  # type: ignore[import-not-found]

    with np.load(sys.argv[1]) as stored:
        frames, mask, centre = stored["frames"], stored["mask"], stored["centre"]
    y, x = np.indices(mask.shape)
    radius = np.hypot(x + 0.5 - centre[0], y + 0.5 - centre[1]).astype(np.float32)
    index, radii = sampled(radius)

    def found(i: int, fast: int) -> Any:
        return peakfinder_8(
            PEAKS["most"],
            frames[i],
            mask,
            radius,
            index.size,
            index,
            radii,
            fast,
            mask.shape[1],
            mask.shape[0],
            1,
            1,
            PEAKS["adc"],
            PEAKS["snr"],
            PEAKS["least_px"],
            PEAKS["most_px"],
            PEAKS["background_px"],
        )

    say({"finder": f"peakfinder8 of ondamonitor {metadata.version('ondamonitor')}"})
    for line in sys.stdin:
        i, mode = line.split()
        began = time.thread_time()
        peaks = found(int(i), int(mode == "fast"))
        say({"cpu_s": time.thread_time() - began, "peaks": len(peaks[0])})


def sampled(radius: Any) -> tuple[Any, Any]:
    """Pixels, and their radii, that stand for all of the same radius in the fast mode."""
    rng = np.random.default_rng(0)
    whole = np.rint(radius).astype(np.int32).ravel()
    order = rng.permutation(whole.size)
    order = order[np.argsort(whole[order], kind="stable")]
    first = np.concatenate([[0], np.cumsum(np.bincount(whole))[:-1]])
    rank = np.arange(whole.size) - first[whole[order]]
    index = order[rank < PIXELS_PER_RADIUS].astype(np.int32)
    return index, whole[index]


def say(document: dict[str, Any]) -> None:
    """One line, at once."""
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

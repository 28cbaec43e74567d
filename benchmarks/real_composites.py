"""Real frames made harder or given exact labels: dose series, ice rings, two lattices.

    python benchmarks/real_composites.py ../shared/real --record benchmarks/records/composites.json

* dose: strong hits thinned binomially, which is what a shorter exposure records. The spot finder
  of the audit counts what is left; a frame with ten spots or more should be kept.
* ice: rings of hexagonal ice added as Poisson counts to the frame's own smooth profile.
* lattices: one thaumatin hit plus another turned by a quarter about the beam, against one hit plus
  a frame without a crystal, so that the background tells nothing.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triage.audit.finder import crystal_spots, find_spots
from triage.backends import open_backend
from triage.backends.recipe import measured
from triage.ingest.files import read_frame
from triage.machine import machine, versions
from triage.nets.model import load_model
from triage.nets.scorer import Scorer
from triage.records import HIT_SPOTS, Frame, Geometry, Scores, Series
from triage.training.figures import auroc, auroc_interval

DOSES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
CONTRASTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
ICE = ((3.90, 1.0), (3.67, 0.8), (3.44, 0.9), (2.67, 0.3), (2.25, 0.5), (2.07, 0.4))
RING_WIDTH_PER_ANGSTROM = 0.003
STRONG = (
    *(f"thau_3_2_00{n:02d}.cbf.bz2" for n in (3, 5, 7, 9, 11, 13)),
    "eiger2_16M_roi4M_gridscan_5291452_044.h5",
    "eiger4M_hdf5plugin_bitshuffle.h5",
    "jungfrau_module5_conv_6frames.h5",
)
BLANK = tuple(f"thau_3_2_00{n}.cbf.bz2" for n in (17, 19))
LATTICE_SIDE_PX = 2300


class Judge:
    """Backend and model; scores counts that come from nowhere but here."""

    def __init__(self, model_path: Path | None) -> None:
        model = load_model(model_path)
        self.card = model.card
        self._backend = open_backend("cpu", model.card.recipe)
        self._scorer = Scorer(model)
        self._scorer.warm_up()

    def read(self, path: Path) -> tuple[NDArray[np.int64], NDArray[np.bool_], Geometry | None]:
        """Counts, validity and geometry of the first frame of a file."""
        frame = read_frame(path)
        counts, valid = measured(frame, self._backend.decode(frame))
        return np.where(valid, counts, 0).astype(np.int64), valid, frame.series.geometry

    def scores(
        self, counts: NDArray[np.int64], valid: NDArray[np.bool_], geometry: Geometry | None
    ) -> Scores:
        """Both exits."""
        pixels = np.minimum(counts, 2**31).astype(np.uint32)
        series = Series(pixel_mask=(~valid).astype(np.uint32), geometry=geometry)
        frame = Frame(
            series=series,
            image_id=0,
            dtype=pixels.dtype,
            shape=pixels.shape,
            payload=pixels.tobytes(),
        )
        views = self._backend.prepare([frame])
        close_ups = self._backend.close_ups([frame], views, [0])
        return self._scorer.full(views, close_ups, [0], self._scorer.fast(views))[0]


def dose_series(judge: Judge, folder: Path) -> dict[str, Any]:
    """p_blank and spots left by dose; hits lost while ten spots are still found."""
    threshold = judge.card.thresholds["p_blank_veto"]
    rng = np.random.default_rng(1)
    rows, lost, hits = [], 0, 0
    for name in STRONG:
        counts, valid, geometry = judge.read(folder / name)
        for dose in DOSES:
            thin = counts if dose == 1.0 else rng.binomial(np.minimum(counts, 2**31), dose)
            spots = crystal_spots(find_spots(thin, valid), thin.shape, geometry)
            p_blank = judge.scores(thin, valid, geometry).p_blank
            vetoed = p_blank >= threshold
            hits += spots >= HIT_SPOTS
            lost += bool(vetoed and spots >= HIT_SPOTS)
            rows.append({"file": name, "dose": dose, "spots": spots, "p_blank": p_blank})
            print(f"{name[:36]:<38} dose {dose:<6} {spots:>5} spots  p_blank {p_blank:.4f}")
    return {"rows": rows, "with_ten_spots": hits, "of_these_vetoed": lost}


def with_ice(
    counts: NDArray[np.int64],
    valid: NDArray[np.bool_],
    geometry: Geometry,
    contrast: float,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Counts with rings of so many times the frame's own radial median added."""
    y, x = np.indices(counts.shape)
    q = geometry.inverse_d(x + 0.5, y + 0.5)
    shell = np.minimum((q / 0.004).astype(int), 400)
    level = np.bincount(shell[valid], counts[valid], 401) / np.maximum(
        np.bincount(shell[valid], minlength=401), 1
    )
    # A shell's mean carries the spots in it; the least of three neighbours does so less.
    level = np.minimum(np.minimum(level, np.roll(level, 3)), np.roll(level, -3))
    rate = np.zeros(counts.shape)
    for d, strength in ICE:
        rate += strength * np.exp(-0.5 * ((q - 1.0 / d) / RING_WIDTH_PER_ANGSTROM) ** 2)
    return counts + np.where(valid, rng.poisson(contrast * rate * level[shell]), 0)


def ice_series(judge: Judge, folder: Path) -> dict[str, Any]:
    """p_ice by contrast on frames without a crystal and on hits."""
    rng = np.random.default_rng(2)
    rows = []
    for kind, names in (("blank", BLANK), ("hit", STRONG[:6])):
        for name in names:
            counts, valid, geometry = judge.read(folder / name)
            if geometry is None:
                continue
            for contrast in CONTRASTS:
                iced = with_ice(counts, valid, geometry, contrast, rng)
                p_ice = judge.scores(iced, valid, geometry).p_ice
                rows.append({"file": name, "kind": kind, "contrast": contrast, "p_ice": p_ice})
    table = {}
    for kind in ("blank", "hit"):
        for contrast in CONTRASTS:
            found = [r["p_ice"] for r in rows if (r["kind"], r["contrast"]) == (kind, contrast)]
            table[f"{kind} {contrast:g}"] = {
                "frames": len(found),
                "called_ice": sum(p >= 0.5 for p in found),
                "p_ice_median": float(np.median(found)),
            }
            print(f"ice {contrast:>5.0%} on {kind:<6} {table[f'{kind} {contrast:g}']}")
    return {"rows": rows, "by_contrast": table}


def lattice_pairs(judge: Judge, folder: Path) -> dict[str, Any]:
    """AUROC of p_multilattice between two lattices and one lattice plus background."""
    hits = [squared(judge, folder / name) for name in STRONG[:6]]
    blanks = [squared(judge, folder / name) for name in BLANK]
    scores, positive = [], []
    for i, (counts, valid, geometry) in enumerate(hits):
        others = [(j, hits[j]) for j in range(len(hits)) if j != i]
        for _, (other, other_valid, _) in others:
            both = counts + np.rot90(other)
            ok = valid & np.rot90(other_valid)
            scores.append(judge.scores(both, ok, geometry).p_multilattice)
            positive.append(True)
        for other, other_valid, _ in blanks:
            both, ok = counts + np.rot90(other), valid & np.rot90(other_valid)
            scores.append(judge.scores(both, ok, geometry).p_multilattice)
            positive.append(False)
    values, yes = np.array(scores), np.array(positive)
    found = {
        "two_lattices": int(yes.sum()),
        "one_lattice": int((~yes).sum()),
        "auroc": auroc(values, yes),
        "auroc_interval_95": auroc_interval(values, yes),
    }
    print("lattices", found)
    return found


def squared(
    judge: Judge, path: Path
) -> tuple[NDArray[np.int64], NDArray[np.bool_], Geometry | None]:
    """A square about the beam, so that a quarter turn keeps the geometry."""
    counts, valid, geometry = judge.read(path)
    assert geometry is not None
    half = LATTICE_SIDE_PX // 2
    y, x = round(geometry.beam_center_y_px), round(geometry.beam_center_x_px)
    part = np.s_[y - half : y + half, x - half : x + half]
    moved = replace(
        geometry,
        beam_center_x_px=geometry.beam_center_x_px - (x - half),
        beam_center_y_px=geometry.beam_center_y_px - (y - half),
    )
    return counts[part], valid[part], moved


def main() -> None:
    """Score, print, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("frames", type=Path)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--model", type=Path)
    arguments = parser.parse_args()
    judge = Judge(arguments.model)
    record = {
        "name": "real_composites",
        "command": "python benchmarks/real_composites.py ../shared/real",
        "model_id": judge.card.model_id,
        "dose": dose_series(judge, arguments.frames),
        "ice": ice_series(judge, arguments.frames),
        "lattices": lattice_pairs(judge, arguments.frames),
        "machine": machine(),
        "versions": versions(),
    }
    if arguments.record:
        arguments.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

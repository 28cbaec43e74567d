"""A model on real frames that it never saw, and on what can be made of them exactly.

Few public frames have labels, so they are counted by source. More is made of them by what is
exact on counts: a shorter exposure is a binomial draw, a second crystal the sum of two frames,
and a ring of ice further Poisson counts. The gallery is a folder with a ``manifest.csv`` of one
row per frame: file, kind, label, and the geometry where it is known.
"""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from triage.audit.finder import crystal_spots, find_spots
from triage.backends import open_backend
from triage.backends.recipe import measured
from triage.binomial import clopper_pearson
from triage.errors import UnreadableFile
from triage.ingest.files import Files
from triage.nets.model import Model
from triage.nets.scorer import Scorer
from triage.policy import Policy
from triage.records import HIT_SPOTS, Frame, Geometry, Scores, Series, Verdict
from triage.training.answers import both_exits
from triage.training.figures import auroc, auroc_interval, bootstrap_interval, kendall_tau_b
from triage.training.ice_lines import ice_lines
from triage.training.powder import POWDERS, fit_rings

__all__ = [
    "DOSES",
    "IcePlaces",
    "Manifested",
    "alarm_threshold",
    "ice_curve",
    "ice_places",
    "real_figures",
    "source_of",
    "turned",
    "with_rings",
]

HITS = ("mx_hit", "xfel_hit")
DOSES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
CONTRASTS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
FALSE_ALARMS = 0.01
"""Share of frames without ice that may be called ice where the recall is read off."""

_ICE = ((3.90, 1.0), (3.67, 0.8), (3.44, 0.9), (2.67, 0.3), (2.25, 0.5), (2.07, 0.4))
"""d [angstrom] and height of the rings of hexagonal ice, beside the highest."""
_RING_WIDTHS = (0.002, 0.006)
"""Sigma, 1/angstrom; from about four pixels of a large detector up."""
_SHELL = 0.004
"""Of the radial background, 1/angstrom."""
_SECTORS = 24
_DRAWS = 10
"""How often each real frame is thinned and turned anew for the curve of ice."""
_CALLED = 0.5
_BIG = 2**31


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Manifested:
    """A real frame with its line of the manifest.

    Attributes:
        geometry: of the file, or else of the manifest; None where neither knows it.
    """

    frame: Frame
    line: Mapping[str, str]
    geometry: Geometry | None

    @property
    def name(self) -> str:
        return self.line["file"]

    @property
    def source(self) -> str:
        """Frames of one experiment belong to one source."""
        return source_of(self.name)


def source_of(file: str) -> str:
    """A file's name without endings and running numbers."""
    stem = file.partition(".")[0]
    return re.sub(r"([_-]?\d+)+$", "", stem) or stem


class _Judge:
    """Backend and model; scores frames as they are served, and counts that come from here."""

    def __init__(self, model: Model) -> None:
        self.card = model.card
        self.policy = Policy(p_blank_veto=model.card.thresholds["p_blank_veto"])
        self._backend = open_backend("cpu", model.card.recipe)
        self._scorer = Scorer(model)
        self._scorer.warm_up()

    def of(self, frame: Frame) -> Scores:
        """Both exits of a frame."""
        return both_exits(self._backend, self._scorer, [frame])[0][0]

    def counts(self, frame: Frame) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Counts, 0 where not valid, and validity."""
        counts, valid = measured(frame, self._backend.decode(frame))
        return np.where(valid, counts, 0).astype(np.int64), valid

    def of_counts(
        self, counts: NDArray[np.int64], valid: NDArray[np.bool_], geometry: Geometry | None
    ) -> Scores:
        """Both exits of counts."""
        pixels = np.minimum(counts, _BIG).astype(np.uint32)
        series = Series(pixel_mask=(~valid).astype(np.uint32), geometry=geometry)
        return self.of(
            Frame(
                series=series,
                image_id=0,
                dtype=pixels.dtype,
                shape=(pixels.shape[0], pixels.shape[1]),
                payload=pixels.tobytes(),
            )
        )


def real_figures(
    model: Model, folder: Path, *, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """All figures of a gallery of real frames; see the module's description.

    Raises:
        UnreadableFile: the folder has no ``manifest.csv``.
    """
    judge = _Judge(model)
    frames = list(_frames(folder))
    say(f"{len(frames)} real frames: verdicts")
    rows = [_judged(judge, each) for each in frames]
    say("lines of ice that frames show themselves")
    own = _own_ice(judge, frames)
    showing = {row["file"] for row in own if row["there"]}
    found: dict[str, Any] = {
        "frames": len(rows),
        "threshold": judge.policy.p_blank_veto,
        "rows": rows,
        "sources": _by_source(rows),
        "kept": {kind: _kept(rows, kind) for kind in (*HITS, "smallmol_hit")},
        "weak_kept": _kept([row for row in rows if row["label"] == "weak"], HITS),
        "blank_sources": _blank_sources(rows),
        "scan": _scan(rows),
        "own_ice": own,
        "false_ice": _false_ice(rows, showing),
    }
    vetoed = list(found["blank_sources"].values())
    if vetoed:
        found["worst_blank_source"] = min(vetoed, key=lambda row: row["share"])
    say("powder rings")
    found["powder"] = _powders(judge, frames)
    say("dose series")
    found["dose"] = _dose(judge, [each for each in frames if _is_strong(each)], say)
    say("rings of ice on real frames")
    found["ice"] = _ice(judge, frames, showing, say)
    say("pairs of lattices")
    found["lattices"] = _lattices(judge, frames)
    return found


def _frames(folder: Path) -> Iterable[Manifested]:
    """The gallery's frames with their lines, file by file."""
    try:
        with (folder / "manifest.csv").open() as lines:
            manifest = list(csv.DictReader(lines))
    except OSError as err:
        raise UnreadableFile(
            f"{folder}: {err.strerror} (manifest.csv); expected a folder of real frames with a "
            "manifest.csv that labels them"
        ) from err
    lines_of: dict[str, list[dict[str, str]]] = defaultdict(list)
    for line in manifest:
        lines_of[line["file"]].append(line)
    for name, of_file in lines_of.items():
        source = Files([folder / name])
        try:
            number = 0
            while not source.exhausted:
                for message in source.receive(0):
                    if message.frame is None or number >= len(of_file):
                        continue
                    frame, line = message.frame, of_file[number]
                    number += 1
                    geometry = frame.series.geometry or _geometry_of(line)
                    yield Manifested(frame=frame, line=line, geometry=geometry)
        finally:
            source.close()


def _geometry_of(line: Mapping[str, str]) -> Geometry | None:
    """What the manifest knows; None unless all of it."""
    wanted = ("beam_x", "beam_y", "pixel_mm", "distance_mm", "wavelength_A")
    try:
        x, y, pixel, distance, wavelength = (float(line[name]) for name in wanted)
    except (KeyError, ValueError):
        return None
    return Geometry.from_values(
        beam_center_x_px=x,
        beam_center_y_px=y,
        pixel_size_x_m=1e-3 * pixel,
        pixel_size_y_m=1e-3 * pixel,
        detector_distance_m=1e-3 * distance,
        incident_wavelength_angstrom=wavelength,
    )


# -- verdicts --------------------------------------------------------------------------------------


def _judged(judge: _Judge, each: Manifested) -> dict[str, Any]:
    """One frame's scores and verdict, with and without the rule that keeps rotation sweeps."""
    frame = each.frame
    scores = judge.of(frame)
    verdict, reason = judge.policy.judge(frame, scores)
    p_ice = scores.p_ice
    if frame.series.geometry is None and each.geometry is not None:
        placed = structs.replace(frame, series=replace(frame.series, geometry=each.geometry))
        p_ice = judge.of(placed).p_ice
    return {
        "file": each.name,
        "source": each.source,
        "kind": each.line["kind"],
        "label": each.line["label"],
        "vetoed": verdict is Verdict.VETO,
        "reason": reason.value,
        "vetoed_by_score": scores.p_blank >= judge.policy.p_blank_veto and not scores.ood,
        "p_blank": scores.p_blank,
        "p_ice": p_ice,
        "p_multilattice": scores.p_multilattice,
        "quality": scores.quality,
        "mosaicity_deg": scores.mosaicity_deg,
        "d_vis_angstrom": scores.d_vis_angstrom,
        "ood": scores.ood,
        "spots": each.line.get("n_spots_auto", ""),
    }


def _by_source(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[(row["source"], row["kind"], row["label"])].append(row)
    return [
        {
            "source": source,
            "kind": kind,
            "label": label,
            "frames": len(members),
            "vetoed": sum(row["vetoed"] for row in members),
            "vetoed_by_score": sum(row["vetoed_by_score"] for row in members),
            "out_of_distribution": sum(row["ood"] for row in members),
            "p_blank_median": float(np.median([row["p_blank"] for row in members])),
            "p_blank_max": float(max(row["p_blank"] for row in members)),
        }
        for (source, kind, label), members in groups.items()
    ]


def _kept(rows: Sequence[Mapping[str, Any]], kinds: str | Sequence[str]) -> dict[str, Any]:
    """Hits that the score alone keeps, whatever other rules would do."""
    asked = [row for row in rows if row["kind"] in ((kinds,) if isinstance(kinds, str) else kinds)]
    kept = sum(not row["vetoed_by_score"] for row in asked)
    return {
        "frames": len(asked),
        "kept": kept,
        "share": kept / len(asked) if asked else None,
        "share_interval_95": list(clopper_pearson(kept, len(asked))),
        "lost": [row["file"] for row in asked if row["vetoed_by_score"]],
    }


def _blank_sources(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        if row["label"] == "blank":
            groups[row["source"]].append(bool(row["vetoed_by_score"]))
    return {
        source: {
            "source": source,
            "frames": len(vetoed),
            "vetoed": sum(vetoed),
            "share": sum(vetoed) / len(vetoed),
            "share_interval_95": list(clopper_pearson(sum(vetoed), len(vetoed))),
        }
        for source, vetoed in groups.items()
    }


def _scan(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Quality against the manifest's spots along a scan over one crystal: the source with most
    grades whose frames have spots counted."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["spots"] and row["label"] in ("blank", "weak", "good", "strong"):
            groups[row["source"]].append(row)
    if not groups:
        return {"frames": 0}
    source, members = max(groups.items(), key=lambda item: len({r["label"] for r in item[1]}))
    quality = np.array([row["quality"] for row in members])
    spots = np.array([float(row["spots"]) for row in members])
    # No grade is the worst one: below all of frames with spots.
    quality = np.where(np.isfinite(quality), quality, -1.0)
    return {
        "source": source,
        "frames": len(members),
        "quality": quality.tolist(),
        "spots": spots.tolist(),
        "tau_b": kendall_tau_b(quality, spots),
        "tau_b_interval_95": bootstrap_interval(kendall_tau_b, quality, spots),
    }


def _own_ice(judge: _Judge, frames: Sequence[Manifested]) -> list[dict[str, Any]]:
    """Which frames show ice whatever a person or the model says of them."""
    rows = []
    for each in frames:
        if each.geometry is None:
            continue
        counts, valid = judge.counts(each.frame)
        found = (
            ice_lines(counts, valid, each.geometry) if _shows_ice(each.geometry, valid) else None
        )
        if found is not None:
            rows.append(
                {
                    "file": each.name,
                    "kind": each.line["kind"],
                    "label": each.line.get("ice", ""),
                    "sigma": found.sigma,
                    "moved_lines_as_high_share": found.as_high,
                    "sigma_of_lines": [None if math.isnan(v) else v for v in found.of_lines],
                    "there": found.are_there,
                }
            )
    return rows


def _false_ice(rows: Sequence[Mapping[str, Any]], showing: Collection[str]) -> dict[str, Any]:
    """Frames without ice that are called ice; those that show it themselves are told apart."""
    asked = [row for row in rows if math.isfinite(row["p_ice"])]
    without = [row for row in asked if row["file"] not in showing]
    called = [row["file"] for row in without if row["p_ice"] >= _CALLED]
    return {
        "frames": len(without),
        "called": len(called),
        "called_interval_95": list(clopper_pearson(len(called), len(without))),
        "files": called,
        "showing_ice": [
            {"file": row["file"], "p_ice": row["p_ice"]} for row in asked if row["file"] in showing
        ],
    }


_POWDER_SETTINGS = {
    # Pixel [m] and wavelength [angstrom], from the files' own headers and the manifest's notes.
    "agbe": (70.7e-6, 1.6083),
    "ceo2": (172e-6, 0.4133),
}


def _powders(judge: _Judge, frames: Sequence[Manifested]) -> dict[str, Any]:
    """Rings of something else must not be called ice, once the frame has a geometry."""
    rows = []
    for each in frames:
        name = next((key for key in POWDERS if each.name.startswith(key)), None)
        if name is None:
            continue
        counts, valid = judge.counts(each.frame)
        pixel_m, wavelength = _POWDER_SETTINGS[name]
        fitted = fit_rings(
            counts.astype(np.float64),
            valid,
            POWDERS[name],
            pixel_m=pixel_m,
            wavelength_angstrom=wavelength,
        )
        series = replace(each.frame.series, geometry=fitted.geometry)
        scores = judge.of(structs.replace(each.frame, series=series))
        inverse_d = fitted.geometry.inverse_d(
            np.array([0.0, counts.shape[1]]), np.array([0.0, counts.shape[0]])
        )
        rows.append(
            {
                "file": each.name,
                "powder": POWDERS[name].name,
                "agreement": fitted.agreement,
                "distance_m": fitted.geometry.detector_distance_m,
                "beam_center_px": [
                    fitted.geometry.beam_center_x_px,
                    fitted.geometry.beam_center_y_px,
                ],
                "d_at_corner_angstrom": float(1.0 / inverse_d.max()),
                "p_ice": scores.p_ice,
                "p_blank": scores.p_blank,
                "called_ice": bool(scores.p_ice >= 0.5),
            }
        )
    return {"rows": rows, "called_ice": sum(row["called_ice"] for row in rows) if rows else None}


# -- what is made of real frames -------------------------------------------------------------------


def _is_strong(each: Manifested) -> bool:
    return each.line["kind"] in HITS and each.line["label"] in ("good", "strong")


def _thinned(counts: NDArray[np.int64], dose: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """What so much shorter an exposure would have recorded."""
    if dose >= 1.0:
        return counts
    thin: NDArray[np.int64] = rng.binomial(np.minimum(counts, _BIG), dose)
    return thin


def _dose(
    judge: _Judge, frames: Sequence[Manifested], say: Callable[[str], None]
) -> dict[str, Any]:
    """Strong hits thinned; a frame on which ten spots are still found should be kept."""
    rng = np.random.default_rng(1)
    rows: list[dict[str, Any]] = []
    monotone = []
    taken: set[str] = set()
    for each in frames:
        # Frames of one file repeat each other.
        if each.name in taken:
            continue
        taken.add(each.name)
        counts, valid = judge.counts(each.frame)
        quality = []
        for dose in DOSES:
            thin = _thinned(counts, dose, rng)
            spots = crystal_spots(find_spots(thin, valid), thin.shape, each.geometry)
            scores = judge.of_counts(thin, valid, each.geometry)
            quality.append(scores.quality)
            rows.append(
                {
                    "file": each.name,
                    "dose": dose,
                    "spots": spots,
                    "p_blank": scores.p_blank,
                    "quality": scores.quality,
                    "d_vis_angstrom": scores.d_vis_angstrom,
                    "vetoed": scores.p_blank >= judge.policy.p_blank_veto and not scores.ood,
                }
            )
        monotone.append(kendall_tau_b(np.array(quality), np.array(DOSES)))
        say(f"dose series of {each.name}")
    shown = [row for row in rows if row["spots"] >= HIT_SPOTS]
    lost = sum(row["vetoed"] for row in shown)
    by_dose = {}
    for dose in DOSES:
        here = [row for row in rows if row["dose"] == dose]
        full = {row["file"]: row["d_vis_angstrom"] for row in rows if row["dose"] == 1.0}
        by_dose[f"{dose:g}"] = {
            "frames": len(here),
            "with_ten_spots": sum(row["spots"] >= HIT_SPOTS for row in here),
            "kept": sum(not row["vetoed"] for row in here),
            "quality_median": _median([row["quality"] for row in here]),
            "d_vis_over_full_dose": _median(
                [row["d_vis_angstrom"] / full[row["file"]] for row in here]
            ),
        }
    return {
        "rows": rows,
        "by_dose": by_dose,
        "with_ten_spots": len(shown),
        "of_these_vetoed": lost,
        "of_these_vetoed_interval_95": list(clopper_pearson(lost, len(shown))),
        "quality_against_dose_tau_b_median": _median(monotone),
    }


def _median(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return float(np.median(known)) if known else math.nan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IcePlaces:
    """Pixels of a frame on which rings of hexagonal ice may lie.

    Attributes:
        flat: (n,) their places in the flattened frame.
        inverse_d: (n,) 1/angstrom.
        level: (n,) counts of the frame's smooth background.
    """

    flat: NDArray[np.int64]
    inverse_d: NDArray[np.float64]
    level: NDArray[np.float64]


def ice_places(
    counts: NDArray[np.int64], valid: NDArray[np.bool_], geometry: Geometry
) -> IcePlaces:
    """Where rings of ice lie on a frame, and how bright it is there.

    The background of a shell is the median over sectors of their means: spots stand in few of
    them.
    """
    y, x = _places(counts.shape)
    inverse_d = geometry.inverse_d(x + 0.5, y + 0.5)
    near = np.zeros(counts.shape, np.bool_)
    for d, _ in _ICE:
        near |= np.abs(inverse_d - 1.0 / d) < 5.0 * _RING_WIDTHS[1]
    chosen = near & valid
    level = _background(counts, valid, geometry, inverse_d)
    return IcePlaces(flat=np.flatnonzero(chosen), inverse_d=inverse_d[chosen], level=level[chosen])


def with_rings(
    counts: NDArray[np.int64],
    places: IcePlaces,
    contrast: float,
    width: float,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Counts with rings of hexagonal ice as further Poisson counts.

    Args:
        contrast: of the highest ring over the background.
        width: sigma of a ring in 1/angstrom.
    """
    rate = np.zeros(places.flat.size)
    for d, height in _ICE:
        rate += height * np.exp(-0.5 * ((places.inverse_d - 1.0 / d) / width) ** 2)
    iced = counts.copy()
    iced.reshape(-1)[places.flat] += rng.poisson(contrast * rate * places.level)
    return iced


def _places(shape: tuple[int, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(y, x) of the upper left corner of each pixel, in pixels."""
    y, x = np.meshgrid(np.arange(float(shape[0])), np.arange(float(shape[1])), indexing="ij")
    return y, x


def _background(
    counts: NDArray[np.int64],
    valid: NDArray[np.bool_],
    geometry: Geometry,
    inverse_d: NDArray[np.float64],
) -> NDArray[np.float64]:
    """(y, x) counts per pixel of the smooth background."""
    y, x = _places(counts.shape)
    angle = np.arctan2(y + 0.5 - geometry.beam_center_y_px, x + 0.5 - geometry.beam_center_x_px)
    sector = ((angle / (2.0 * math.pi) + 0.5) * _SECTORS).astype(np.int64) % _SECTORS
    shell = (inverse_d / _SHELL).astype(np.int64)
    shells = int(shell.max()) + 1
    place = shell * _SECTORS + sector
    cells = shells * _SECTORS
    pixels = np.bincount(place[valid], minlength=cells).reshape(shells, _SECTORS)
    total = np.bincount(place[valid], counts[valid], cells).reshape(shells, _SECTORS)
    mean = np.where(pixels >= 8, total / np.maximum(pixels, 1), math.nan)
    seen = np.isfinite(mean).any(1)
    level = np.zeros(shells)
    level[seen] = np.nanmedian(mean[seen], axis=1)
    around: NDArray[np.float64] = level[shell]
    return around


def alarm_threshold(without: NDArray[np.float64], share: float) -> float:
    """The lowest threshold that at most ``share`` of the frames without it reach."""
    ordered = np.sort(without)[::-1]
    return float(np.nextafter(ordered[min(int(share * ordered.size), ordered.size - 1)], 2.0))


def _ice(
    judge: _Judge,
    frames: Sequence[Manifested],
    showing: Collection[str],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """p_ice by contrast on frames without a crystal and on hits, each drawn several times.

    A frame that shows ice before any is added is no frame without ice. It is drawn all the same,
    and what the figures would be with it is told beside them.
    """
    rng = np.random.default_rng(2)
    rows: list[dict[str, Any]] = []
    for each in frames:
        kind = "blank" if each.line["label"] == "blank" else "hit"
        if each.geometry is None or (kind == "hit" and each.line["kind"] not in HITS):
            continue
        counts, valid = judge.counts(each.frame)
        if not _shows_ice(each.geometry, valid):
            continue
        places = ice_places(counts, valid, each.geometry)
        for draw in range(_DRAWS):
            dose = float(rng.uniform(0.7, 1.0))
            thin = _thinned(counts, dose, rng)
            width = float(np.exp(rng.uniform(*np.log(_RING_WIDTHS))))
            turn = int(rng.integers(8))
            # All contrasts of a few draws; of the others only those that are asked for.
            chosen = CONTRASTS if draw < 2 else (0.1 if kind == "blank" else 0.2,)
            for contrast in (0.0, *chosen):
                # The background is fainter by the dose, and so is what is added to it.
                iced = with_rings(thin, places, contrast * dose, width, rng) if contrast else thin
                placed, ok, geometry = turned(iced, valid, each.geometry, turn)
                rows.append(
                    {
                        "file": each.name,
                        "kind": kind,
                        "contrast": contrast,
                        "p_ice": judge.of_counts(placed, ok, geometry).p_ice,
                    }
                )
        say(f"rings of ice on {each.name}")
    found = ice_curve([row for row in rows if row["file"] not in showing])
    left_out = sorted({row["file"] for row in rows} & set(showing))
    if left_out:
        found["left_out"] = left_out
        found["with_those_left_out"] = ice_curve(rows)
    return {"rows": rows} | found


def ice_curve(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Recall by contrast at the threshold that few frames without ice reach.

    Args:
        rows: ``kind`` blank or hit, ``contrast`` of the rings, 0 without any, and ``p_ice``.

    Returns:
        Nothing where no frame is without ice, or one has no answer.
    """
    none = np.array([row["p_ice"] for row in rows if not row["contrast"]])
    if not none.size or not np.isfinite(none).all():
        return {}
    threshold = alarm_threshold(none, FALSE_ALARMS)
    found: dict[str, Any] = {
        "false_alarms": FALSE_ALARMS,
        "threshold": threshold,
        "without_ice": int(none.size),
        "called_at_half_without_ice": int((none >= _CALLED).sum()),
        "by_contrast": {},
    }
    for kind in ("blank", "hit"):
        for contrast in CONTRASTS:
            p = np.array(
                [r["p_ice"] for r in rows if (r["kind"], r["contrast"]) == (kind, contrast)]
            )
            if not p.size:
                continue
            called = int((p >= threshold).sum())
            found["by_contrast"][f"{kind} {contrast:g}"] = {
                "frames": int(p.size),
                "recall": called / p.size,
                "recall_interval_95": list(clopper_pearson(called, p.size)),
                "recall_at_half": float((p >= _CALLED).mean()),
                "p_ice_median": float(np.median(p)),
            }
    for title, key in (("blank_10", "blank 0.1"), ("hit_20", "hit 0.2")):
        found[title] = found["by_contrast"].get(key, {})
    return found


def _shows_ice(geometry: Geometry, valid: NDArray[np.bool_]) -> bool:
    """Whether the first three rings lie on the frame, and its geometry is that of a plane."""
    y, x = _places(valid.shape)
    reach = geometry.inverse_d(x[valid] + 0.5, y[valid] + 0.5).max()
    half_m = 0.5 * max(valid.shape) * geometry.pixel_size_y_m
    # The distance of a detector that is curved around the sample is shorter than any plane's.
    plane = half_m < 3.0 * geometry.detector_distance_m
    return bool(plane and reach > 1.0 / 3.44 + 3.0 * _RING_WIDTHS[1])


def turned(
    counts: NDArray[np.int64], valid: NDArray[np.bool_], geometry: Geometry, turn: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_], Geometry]:
    """One of the eight turns and mirrors of a frame, its beam centre with it."""
    x, y = geometry.beam_center_x_px, geometry.beam_center_y_px
    wide, high = geometry.pixel_size_x_m, geometry.pixel_size_y_m
    if turn >= 4:
        counts, valid = counts[:, ::-1], valid[:, ::-1]
        x = counts.shape[1] - x
    for _ in range(turn % 4):
        # np.rot90 takes the last column to the first row.
        x, y = y, counts.shape[1] - x
        counts, valid = np.rot90(counts), np.rot90(valid)
        wide, high = high, wide
    moved = replace(
        geometry,
        beam_center_x_px=x,
        beam_center_y_px=y,
        pixel_size_x_m=wide,
        pixel_size_y_m=high,
    )
    return np.ascontiguousarray(counts), np.ascontiguousarray(valid), moved


def _lattices(judge: _Judge, frames: Sequence[Manifested]) -> dict[str, Any]:
    """AUROC of p_multilattice between two lattices and one lattice on as much background.

    Of one experiment with several hits of a single lattice and frames beside the crystal: a hit
    plus another hit turned by a quarter about the beam, against the same hit plus the turned sum
    of two empty frames, thinned to the other hit's background.
    """
    usable = [each for each in frames if each.geometry is not None]
    hits = [e for e in usable if _is_strong(e) and e.line["multilattice"] == "0"]
    sources = [e.source for e in hits]
    if not sources:
        return {}
    source = max(set(sources), key=sources.count)
    hits = [each for each in hits if each.source == source]
    blanks = [e for e in usable if e.source == source and e.line["label"] == "blank"]
    if len(hits) < 2 or not blanks:
        return {}
    rng = np.random.default_rng(3)
    cut = [_squared(judge, each) for each in (*hits, *blanks)]
    side = min(len(counts) for counts, *_ in cut)
    cut = [_centred(*each, side) for each in cut]
    crystals, empty = cut[: len(hits)], cut[len(hits) :]
    background = np.sum([counts for counts, *_ in empty], axis=0)
    clear = np.logical_and.reduce([valid for _, valid, _ in empty])
    scores, positive = [], []
    for i, (counts, valid, geometry) in enumerate(crystals):
        for j, (other, other_valid, _) in enumerate(crystals):
            if i == j:
                continue
            both = valid & np.rot90(other_valid)
            scores.append(judge.of_counts(counts + np.rot90(other), both, geometry).p_multilattice)
            positive.append(True)
            # Medians are what spots do not move; their ratio is that of the backgrounds.
            share = _typical(other, other_valid) / _typical(background, clear)
            beside = _thinned(background, min(1.0, share), rng)
            both = valid & np.rot90(clear)
            scores.append(judge.of_counts(counts + np.rot90(beside), both, geometry).p_multilattice)
            positive.append(False)
    values, yes = np.array(scores), np.array(positive)
    values = np.where(np.isfinite(values), values, np.where(yes, -1.0, 2.0))
    return {
        "source": source,
        "two_lattices": int(yes.sum()),
        "one_lattice": int((~yes).sum()),
        "auroc": auroc(values, yes),
        "auroc_interval_95": auroc_interval(values, yes),
        "p_two_median": float(np.median(values[yes])),
        "p_one_median": float(np.median(values[~yes])),
        "two": values[yes].tolist(),
        "one": values[~yes].tolist(),
    }


def _typical(counts: NDArray[np.int64], valid: NDArray[np.bool_]) -> float:
    """Trimmed mean, as medians of small counts are whole numbers."""
    values = counts[valid]
    top = np.quantile(values, 0.95)
    return float(values[values <= top].mean())


def _squared(
    judge: _Judge, each: Manifested
) -> tuple[NDArray[np.int64], NDArray[np.bool_], Geometry]:
    """The largest square about the beam, so that a quarter turn keeps the geometry."""
    counts, valid = judge.counts(each.frame)
    geometry = each.geometry
    if geometry is None:
        raise UnreadableFile(f"{each.name}: no geometry; expected one in the file or the manifest")
    y, x = round(geometry.beam_center_y_px), round(geometry.beam_center_x_px)
    half = min(y, x, counts.shape[0] - y, counts.shape[1] - x)
    part = np.s_[y - half : y + half, x - half : x + half]
    moved = replace(
        geometry,
        beam_center_x_px=geometry.beam_center_x_px - (x - half),
        beam_center_y_px=geometry.beam_center_y_px - (y - half),
    )
    return counts[part], valid[part], moved


def _centred(
    counts: NDArray[np.int64], valid: NDArray[np.bool_], geometry: Geometry, side: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_], Geometry]:
    """The middle of a square."""
    off = (len(counts) - side) // 2
    part = np.s_[off : off + side, off : off + side]
    moved = replace(
        geometry,
        beam_center_x_px=geometry.beam_center_x_px - off,
        beam_center_y_px=geometry.beam_center_y_px - off,
    )
    return counts[part], valid[part], moved

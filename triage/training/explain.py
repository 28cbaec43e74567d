"""Why one frame got its verdict: which cells spoke against blank, and where the full exit looked.

The veto is explained by leaving out: the blank logit is computed again without each candidate in
turn, and what it gains is that cell's evidence for a crystal. A head of the full exit is
explained by Grad-CAM (Selvaraju et al. 2017) on the last convolutions of the overview.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triage.backends import Backend
from triage.backends.recipe import tile_corners
from triage.errors import ConfigError
from triage.nets.model import Model
from triage.nets.scorer import Scorer, occupied_cells
from triage.nets.spot_features import spot_features
from triage.nets.spot_marks import spot_marks
from triage.nets.triagenet import Features, TriageNet
from triage.records import Frame, Scores, Spot

__all__ = ["Explanation", "candidate_evidence", "explain", "grad_cam"]

_AT_ONCE = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Explanation:
    """What is known of one frame's verdict.

    Attributes:
        scores: of both exits.
        is_rotation: part of a sweep, which is kept whatever the score.
        threshold: ``p_blank`` from which a frame is vetoed.
        p_blank_of_fast_exit: what the fast exit says by itself.
        sure: from there on its word stands; below, the full exit decides.
        p_blank_without_candidates: by the fast exit, with no cell looked at by itself.
        cell_px: pixels per cell side.
        level: (Y, X) photons per pixel by cell, NaN where nothing is valid.
        cell_y, cell_x: (n,) the cells looked at, strongest evidence first.
        evidence: (n,) by how much the blank logit rises without the cell: > 0 speaks for a crystal.
        spot_y_px, spot_x_px: (n,) centres of the listed spots, surest first.
        spot_log_odds: (n,) that each of them is a reflection of a crystal.
        tile_px: (tiles, 2) y, x of the upper left pixel of each native tile, and ``tile_side_px``.
        head: name of the head that ``attention`` explains.
        attention: (Y, X) Grad-CAM of that head, 0..1; zeros of a model without convolutions.
        inverse_d2: (bins,) middle of each bin of the radial view, 1/angstrom^2.
        radial: (bins,) photons per pixel, mean over sectors, NaN where nothing is valid; only
            meaningful with ``has_geometry``.
        feature_maps: by stage (channels, y, x) of the overview's convolutions; without them the
            maps that the fast exit reads.
    """

    scores: Scores
    is_rotation: bool
    threshold: float
    p_blank_of_fast_exit: float
    sure: float
    p_blank_without_candidates: float
    cell_px: int
    level: NDArray[np.float64]
    cell_y: NDArray[np.int64]
    cell_x: NDArray[np.int64]
    evidence: NDArray[np.float64]
    spot_y_px: NDArray[np.float32]
    spot_x_px: NDArray[np.float32]
    spot_log_odds: NDArray[np.float32]
    tile_px: NDArray[np.int64]
    tile_side_px: int
    head: str
    attention: NDArray[np.float64]
    has_geometry: bool
    inverse_d2: NDArray[np.float64]
    radial: NDArray[np.float64]
    feature_maps: dict[str, NDArray[np.float32]]

    @property
    def vetoed(self) -> bool:
        """By the score alone, before rotation rule, mode and audit."""
        return self.scores.p_blank >= self.threshold

    def as_text(self) -> str:
        """What a person at the beamline wants to read first."""
        p = self.scores.p_blank
        verdict = "veto" if self.vetoed else "keep"
        other = "above" if self.vetoed else "at or below"
        strong = int((self.evidence > 0).sum())
        ice = f"{self.scores.p_ice:.3f}" if math.isfinite(self.scores.p_ice) else "not scored"
        d_vis = self.scores.d_vis_angstrom
        seen = (
            f"visible to {d_vis:.1f} angstrom" if math.isfinite(d_vis) else "resolution not known"
        )
        return (
            f"verdict {verdict}: p_blank {p:.4g}, threshold {self.threshold:.4f}; "
            f"a threshold {other} {p:.4g} would have changed it\n"
            + ("rotation frames are kept whatever their score\n" if self.is_rotation else "")
            + f"{self._who_decided()}; {len(self.evidence)} cells were looked at one by one, "
            f"{strong} of them speak for a crystal; without these cells, the fast exit would say "
            f"{self.p_blank_without_candidates:.4g}\n"
            f"{len(self.spot_log_odds)} spots are listed, {int((self.spot_log_odds > 0).sum())} of "
            "them look like a crystal's\n"
            f"ice {ice}, multilattice {self.scores.p_multilattice:.3f}, mosaicity "
            f"{self.scores.mosaicity_deg:.2f} deg, quality {self.scores.quality:.1f}, "
            f"lattices {self.scores.n_lattices:.1f}, {seen}"
        )

    def _who_decided(self) -> str:
        fast = f"the fast exit says {self.p_blank_of_fast_exit:.4g}"
        if not self.sure:
            return fast
        believed = f"{fast} and is believed from {self.sure:.4f} on"
        if self.p_blank_of_fast_exit >= self.sure:
            return believed
        return f"{believed}, so the full exit decided"


def explain(
    model: Model, backend: Backend, frame: Frame, head: str = "multilattice"
) -> Explanation:
    """The explanation of one frame.

    Raises:
        ConfigError: no head of the full exit has that name.
        DecodeError, UnsupportedEncoding: the frame cannot be prepared.
    """
    full = [h for h in model.card.heads if h.exit == "full"]
    known = [h.name for h in full if not h.answers]
    if head not in known:
        raise ConfigError(f"head {head!r}: expected one of {', '.join(known)}")
    views = backend.prepare([frame])
    if views.errors[0] is not None:
        raise views.errors[0]
    close_ups = backend.close_ups([frame], views, [0])
    scorer = Scorer(model)
    fast = scorer.fast(views)
    scores = scorer.full(views, close_ups, [0], fast)[0]
    y, x = occupied_cells(views.count[0])
    k = int(views.bin_factor[0])
    net, judge = model.net, model.net.judge.fixed()
    # Not in inference mode: what is made there cannot be part of Grad-CAM's gradient.
    with torch.no_grad():
        features = net.features(
            torch.from_numpy(views.overview[:, :, :y, :x].copy()),
            torch.from_numpy(views.radial),
            torch.tensor([float(k)]),
        )
    temperature, bias = model.card.calibration.get("blank", (1.0, 0.0))
    at, gain, bare = candidate_evidence(net, features)
    if net.convolutions:
        attention, maps = grad_cam(
            net,
            features,
            torch.from_numpy(close_ups.tiles),
            torch.from_numpy(spot_features(close_ups, judge, model.card.spot_features)),
            head,
        )
    else:
        attention = np.zeros((y, x))
        maps = {"maps": features.evidence.planes[0].numpy()}
    corners = np.asarray(tile_corners(views, 0, frame.shape, model.card.recipe), np.int64)
    count = views.count[0, :y, :x].astype(np.float64)
    total = views.total[0, :y, :x].astype(np.float64)
    radial = views.radial[0].astype(np.float64)
    seen = radial[1] > 0
    recipe = model.card.recipe
    bins = recipe.radial_bins
    listed = close_ups.spots[0]
    spots = listed[listed[:, Spot.VALID] != 0]
    odds = judge.log_odds(spot_marks(listed, close_ups.geometry[0], frame.shape))
    with np.errstate(invalid="ignore", divide="ignore"):
        return Explanation(
            scores=scores,
            is_rotation=frame.series.is_rotation,
            threshold=model.card.thresholds["p_blank_veto"],
            p_blank_of_fast_exit=fast[0].p_blank,
            sure=model.card.p_blank_sure,
            p_blank_without_candidates=1.0 / (1.0 + math.exp(-(bare / temperature + bias))),
            cell_px=k,
            level=np.where(count > 0, total / count, np.nan),
            cell_y=at // x,
            cell_x=at % x,
            evidence=gain,
            spot_y_px=spots[:, Spot.Y_PX],
            spot_x_px=spots[:, Spot.X_PX],
            spot_log_odds=odds[listed[:, Spot.VALID] != 0],
            tile_px=corners.reshape(-1, 2),
            tile_side_px=recipe.tile_px,
            head=head,
            attention=attention,
            has_geometry=bool(views.has_geometry[0]),
            inverse_d2=(np.arange(bins) + 0.5) / bins * recipe.s_max_inverse_angstrom2,
            radial=(radial[0] * seen).sum(0) / seen.sum(0),
            feature_maps=maps,
        )


def candidate_evidence(
    net: TriageNet, features: Features
) -> tuple[NDArray[np.int64], NDArray[np.float64], float]:
    """What each candidate of one frame does to the blank logit.

    Returns:
        (n,) flat cell of each candidate, (n,) by how much the logit rises without it, both with
        the largest rise first, and the logit without any candidate.
    """
    found = features.evidence
    cells, rings = found.candidates[0], net.rings(features.ring_planes)
    used = torch.nonzero(cells.abs().sum(1) > 0)[:, 0]

    def logits(candidates: Tensor) -> Tensor:
        n = len(candidates)
        answers = net.members(features.counts.expand(n, -1), candidates, rings.expand(n, -1))
        return answers["blank"].mean(1)[:, 0]

    with torch.inference_mode():
        whole = float(logits(cells[None])[0])
        bare = float(logits(torch.zeros_like(cells)[None])[0])
        rises = []
        for part in torch.split(used, _AT_ONCE):
            without = cells.repeat(len(part), 1, 1)
            without[torch.arange(len(part)), part] = 0.0
            rises.append(logits(without).double() - whole)
        rise = torch.cat(rises).numpy() if rises else np.zeros(0)
        at = found.places[0][used].numpy()
    order = np.argsort(-rise, kind="stable")
    return at[order], rise[order], bare


def grad_cam(
    net: TriageNet, features: Features, tiles: Tensor, spots: Tensor, head: str
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float32]]]:
    """Where on the overview one head of the full exit looked: (Y, X) 0..1, and the stages' maps.

    The positive part of the last feature maps, each weighted by the mean of its gradient.
    """
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
            kept[name] = output

        return hook

    handles = [net.block.register_forward_hook(keep("block"))]
    handles += [
        stage.register_forward_hook(keep(f"stage {i + 1}")) for i, stage in enumerate(net.stages)
    ]
    try:
        with torch.enable_grad():
            raw = net.full(features, tiles, spots)[head]
            (gradient,) = torch.autograd.grad(raw.sum(), kept["block"])
    finally:
        for handle in handles:
            handle.remove()
    weights = gradient.mean((2, 3), keepdim=True)
    cam = torch.relu((weights * kept["block"].detach()).sum(1, keepdim=True))
    size = features.share.shape[2:]
    whole = torch.nn.functional.interpolate(cam, size, mode="nearest")[0, 0].double()
    top = float(whole.max())
    maps = {name: tensor.detach()[0].numpy() for name, tensor in kept.items()}
    return (whole / top if top > 0 else whole).numpy(), maps

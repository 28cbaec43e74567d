"""What each head learns: its labels, how much each frame counts, and its loss.

Labels may be missing (NaN): a head learns only from frames where its label is defined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from torch import Tensor

from triage.nets.model import BLANK_BY_SPOTS
from triage.nets.triagenet import Beside, Head
from triage.records import HIT_SPOTS
from triage.training.batches import QUALITY_STEPS, labels_of, levels_of
from triage.training.dataset import Example

__all__ = ["HEADS", "class_weights", "drawing_shares", "head_loss", "targets"]

_ALL_BUT_KINDS = ("counts", "rings", "seen", "spots")
_CRYSTAL = ("seen", "spots")
"""What is asked of a crystal is told by its spots; of detector and background it would learn what
went with them in the training set."""
HEADS = (
    Head(name="blank", kind="binary", exit="fast"),
    Head(name="ice", kind="binary", exit="fast"),
    Head(name="bad_ice", kind="binary", exit="fast"),
    # That there is no crystal is the second level of quality, which other layers have learned from
    # the same spots; the fast exit has not read them.
    Head(
        name=BLANK_BY_SPOTS,
        kind="binary",
        exit="full",
        answers="blank",
        beside=(Beside("quality", 1), Beside("blank")),
    ),
    # Rings are one sign of ice, grains among the spots another.
    Head(
        name="ice_by_spots",
        kind="binary",
        exit="full",
        answers="ice",
        beside=(Beside("ice"),),
        reads=_ALL_BUT_KINDS,
    ),
    Head(
        name="bad_ice_by_spots",
        kind="binary",
        exit="full",
        answers="bad_ice",
        beside=(Beside("bad_ice"),),
        reads=_ALL_BUT_KINDS,
    ),
    Head(name="multilattice", kind="binary", exit="full", reads=_CRYSTAL),
    Head(
        name="mosaicity_deg",
        kind="regression",
        exit="full",
        unit="deg",
        transform="log",
        reads=_CRYSTAL,
    ),
    Head(
        name="quality",
        kind="ordinal",
        exit="full",
        levels=1 + len(QUALITY_STEPS),
        steps=QUALITY_STEPS,
    ),
    Head(name="n_lattices", kind="ordinal", exit="full", levels=4, first=1.0, reads=_CRYSTAL),
    Head(
        name="d_vis_angstrom",
        kind="regression",
        exit="full",
        unit="angstrom",
        transform="inverse_square",
        reads=_CRYSTAL,
    ),
)

_MARGIN_WEIGHT = 0.3
"""Of frames so near a bound between grades that either would do."""

_SPOT_STEPS = (1, HIT_SPOTS, 31, 201)
"""Visible spots that divide frames into strata: blank, few, weak, ordinary and strong."""
_WEAK, _WEAK_BOOST = 2, 1.5
"""Weak hits are what a veto loses, so they are drawn more often than others of their number."""

_CLASS_WEIGHTS = (0.3, 3.0)
"""Least and most: a label that hardly occurs would else be learned by heart."""
_HIT_OVER_BLANK = 5.0
"""To blank by spots: what it says is used where one hit in a thousand is lost, and there it is to
be right of the hits."""


def targets(examples: Sequence[Example], head: Head) -> tuple[Tensor, Tensor]:
    """Labels and weights (N,) of a head; weight 0 where there is nothing to learn.

    A frame with a few visible spots is neither blank nor hit for the figures, but some of its
    crystal is there: to both blank heads it is part of a hit, the more spots the larger. Mosaicity
    is learned where it can be measured.
    """
    labels = levels_of(examples, head)
    weights = np.isfinite(labels).astype(np.float64)
    if head.label == "blank":
        visible = np.nan_to_num(labels_of(examples, "n_visible"))
        part = ~np.isfinite(labels) & (visible > 0)
        weights[part] = np.minimum(1.0, visible[part] / HIT_SPOTS)
        labels[part] = 0.0
    elif head.name == "quality":
        weights[labels_of(examples, "quality_margin") == 1.0] *= _MARGIN_WEIGHT
    elif head.name == "mosaicity_deg":
        weights[labels_of(examples, "mosaicity_measurable") == 0.0] = 0.0
    if head.kind == "ordinal":
        # A blank frame has no lattice to count.
        weights[(labels < head.first) | (labels > head.first + head.levels - 1)] = 0.0
    return torch.from_numpy(np.nan_to_num(labels)).float(), torch.from_numpy(weights).float()


def drawing_shares(examples: Sequence[Example]) -> NDArray[np.float64]:
    """(N,) how often each frame is drawn in an epoch; the sum is 1.

    Half way between frames as they are and strata of equal size: spots by ice.
    """
    visible = np.nan_to_num(labels_of(examples, "n_visible"))
    spots = np.digitize(visible, _SPOT_STEPS)
    stratum = 2 * spots + (labels_of(examples, "ice") == 1.0)
    shares = np.bincount(stratum)[stratum].astype(np.float64) ** -0.5
    shares[spots == _WEAK] *= _WEAK_BOOST
    drawn: NDArray[np.float64] = shares / shares.sum()
    return drawn


def class_weights(
    head: Head, labels: Tensor, weights: Tensor, shares: NDArray[np.float64]
) -> Tensor:
    """``weights`` (N,) times what makes the classes of a head count alike, given how often drawn;
    the hits of blank by spots count for more.

    Those of ordinal heads stay as they are: the rare are their ends, and to weigh them moves the
    bounds between all.
    """
    if head.kind != "binary":
        return weights
    mass = weights.double() * torch.from_numpy(shares)
    classes = (labels - head.first).round().long().clamp(0, head.levels - 1)
    per_class = torch.zeros(head.levels, dtype=torch.float64).index_add_(0, classes, mass)
    present = per_class > 0
    if not present.any():
        return weights
    factor = per_class.sum() / (present.sum() * per_class.clamp(min=1e-12))
    factor = factor.clamp(*_CLASS_WEIGHTS)
    if head.name == BLANK_BY_SPOTS:
        factor[0] *= _HIT_OVER_BLANK
    return weights * factor[classes].float()


def head_loss(head: Head, raw: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean loss of one head over frames whose label is known.

    Binary and cumulative (ordinal) heads: cross entropy. Regressions: Huber loss on the
    transformed quantity, as the tails of simulated labels are long.

    Args:
        raw: (n, head.outputs).
        labels: (n,).
        weights: (n,); None counts each frame once.
    """
    loss = _losses(head, raw, labels)
    return loss.mean() if weights is None else (loss * weights).mean()


def _losses(head: Head, raw: Tensor, labels: Tensor) -> Tensor:
    """(n,) of each frame."""
    if head.kind == "binary":
        return nnf.binary_cross_entropy_with_logits(raw[:, 0], labels, reduction="none")
    if head.kind == "ordinal":
        steps = torch.arange(1, head.levels, device=raw.device) + head.first - 0.5
        above = (labels[:, None] > steps).float()
        return nnf.binary_cross_entropy_with_logits(raw, above, reduction="none").mean(1)
    if head.transform == "log":
        labels = labels.clamp(min=1e-3).log()
    elif head.transform == "inverse_square":
        scale: Any = 10.0  # of 1/d^2, which is some tenths
        return nnf.smooth_l1_loss(
            raw[:, 0] * scale, labels.clamp(min=0.5).pow(-2) * scale, reduction="none"
        )
    return nnf.smooth_l1_loss(raw[:, 0], labels, reduction="none")

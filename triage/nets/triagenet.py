"""The network: one small model with two exits.

* fast exit (every frame): what stands out in the overview, and the rings -> blank, ice;
* full exit (frames that go on, or of which the fast exit is not sure): the list of spots,
  convolutions over the overview, native tiles, and the above -> the other heads, and blank once
  more.

The fast exit asks how many cells look like a spot, and how far a cell stands out is a matter of
noise, not of learning. So its maps are fixed, in units of noise. What is learned is the answer to
two readings of them: how many cells exceed each of several thresholds, and, of the 512 cells that
stand out most, how many look like a spot to a small network that sees one cell and the ring of
eight around it. Ten spots are a hit whether the frame is small or large, and a detector the
training never showed is no other world. The maps (:func:`_maps`):

* ``maximum``: by how many sigma a cell's brightest pixel exceeds its others;
* ``whole``: by how many sigma the cell's sum exceeds the background around it, spots left out;
* ``rest``: the same without the brightest pixel. A spot lifts it, a hot pixel does not;
* ``both``: the smaller of maximum and rest;
* ``blob``: by how much ``whole`` or ``rest`` exceeds the better of two opposite neighbours, in
  the worst of four directions, at one cell's distance and at two. A ring, a shadow's edge, a row
  of large pixels and a cosmic ray run along some direction; a spot does not.

Sigma is Poisson's, then scaled twice: by the scatter of the whole frame, which is steady, and by
that of the cells around, which also holds on a CCD, where a pedestal and a gain of several counts
per photon make the noise another in the dark corners than under the water ring.

Other choices:

* no normalisation over a batch: its statistics shift between detectors;
* several small networks read the same numbers and their mean answers: less is left to the luck
  of one;
* activations outside the frame are set to zero after each stage, so padding changes nothing;
* the radial view is flattened and not pooled, because ice is a matter of where a ring lies;
* how spots lie to each other, over hundreds of pixels, and how wide each is, in tenths of one, is
  no matter for convolutions: it is computed (``spot_features.py``). The heads of the full exit read
  these numbers as ranks among the hits (:class:`_Ranks`): many have long tails, and what tells one
  lattice from two may lie within a hundredth of a standard deviation;
* each head of the full exit has layers of its own, and reads only what bears on it: what it need
  not read it learns by heart, detector by detector. Rings are learned once more, beside the spots:
  some of what the fast exit knows of them it knows by heart;
* what is one spot and what another is learned from the spots one by one (:class:`_Kinds`): how many
  there are of each kind is the same in whatever order they come (Zaheer et al., Deep Sets, NeurIPS
  2017);
* which spots are a crystal's is learned before all else, from the reflections that a simulator
  knows (``judge``): from that a list of spots learns more than from the answers for whole frames,
  of which there are few;
* blank by spots shares nothing that is learned with another head. What has learned apart errs
  apart: the card joins its logit with those of quality and of the fast exit, and a frame is dropped
  by what the three say.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from torch import Tensor, nn

from triage.nets.model import BLANK_BY_SPOTS
from triage.nets.spot_features import SPOT_FEATURES
from triage.nets.spot_judge import InCompany, SpotJudge
from triage.nets.spot_marks import MARKED, SPOT_MARKS
from triage.records import EXPECTED_MAXIMUM

__all__ = [
    "CANDIDATES",
    "CONTEXT",
    "COUNTS",
    "FULL_MEMBERS",
    "LEAST",
    "LEAST_DETERMINANT",
    "LOCAL_REACH",
    "LOOKS",
    "MAPS",
    "MEMBERS",
    "NEAR_REACH",
    "PEAKS",
    "READABLE",
    "RINGS",
    "RING_PLANES",
    "RING_WIDTHS",
    "SIGMA_SCALE",
    "SPOT_RANGE",
    "THRESHOLDS",
    "Beside",
    "Evidence",
    "Features",
    "Head",
    "JudgeLayers",
    "TriageNet",
    "around_and_own",
    "evidence",
]

_STAGES = (16, 32, 48, 64)
_DETECTORS = 8
MAPS = 11
THRESHOLDS = (0.6, 0.9, 1.2, 1.5, 1.8, 2.2, 2.7, 3.5, 5.0)
"""Compressed sigma e / sqrt(1 + e): about 0.8, 1.4, 2.1, 2.9, 4.0, 5.7, 8.2, 13 and 26 sigma."""
NEAR_REACH = 4
"""Cells to each side that make a cell's background."""
LOCAL_REACH = 8
"""Cells to each side that make its local noise."""
_ABSOLUTE = 0.8
"""Mean absolute deviation of a normal variable, in sigma."""
CONTEXT = 6
"""Brightness, bin factor and size of the frame, and its scatter in three maps over Poisson's: the
last of the counts. By its scatter a frame full of strong spots is told from a noisy detector."""
COUNTS = MAPS * len(THRESHOLDS) + CONTEXT
CANDIDATES = 512
"""Cells that are looked at one by one; a frame with more is a hit several times over."""
PEAKS = (0, 4, 6, 9)
"""Maps whose best says how far a cell stands out: both maxima, and both blobs at one cell."""
_AROUND = (0, 3, 7)
"""Maps of which a candidate's neighbours are seen too: maximum, whole and local rest."""
LEAST = 0.8
"""What a candidate has at least, compressed sigma; one with 0.2 more counts in full."""
_CANDIDATE = MAPS + 1 + 9 * len(_AROUND)
LOOKS = 12
MEMBERS = 4
"""Small networks of a panel, and of blank by spots."""
FULL_MEMBERS = 3
"""Networks of the full exit's other heads."""
RINGS = 64
RING_WIDTHS = ((0, 4), (1, 5), (3, 8))
"""Rings of one, three and seven bins: bins to each side that are the ring, and that are looked at.
Those between make the continuum."""
RING_PLANES = 6 + 6 * len(RING_WIDTHS)
"""Numbers of each bin of the radial view by which rings are told."""
LEAST_DETERMINANT = 1e-3
"""Of the moments of the bins to both sides: with less a parabola would be made up."""
SIGMA_SCALE = 0.4
"""Of a ring's compressed sigma, which is some tens at most, beside numbers of about one."""
_TILE_FEATURES = 48
_OWN = 96
"""Width of the first layer of a head of the full exit."""
_KINDS = 32
"""Kinds of spot that a network tells apart."""
_KIND_WIDTH = 64
_JUDGE_WIDTH, _JUDGE_LOOKS, _JUDGE_GROUPS = 96, 2, 4
"""Looks at the whole list, and groups of each."""
SPOT_RANGE = 6.0
"""Standard deviations to which blank by spots holds the numbers of a list of spots."""
_KNOTS = 17
"""Quantiles between which ranks are linear."""
READABLE = ("counts", "rings", "seen", "spots", "kinds")
"""Parts that a head of the full exit can read, in this order: what the fast exit counted, rings of
the radial view, what convolutions saw (none without them), the numbers of the list of spots, and
its spots by kind."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evidence:
    """What stands out in an overview. Nothing here is learned; the first axis is the frame.

    Attributes:
        planes: (N, 12, Y, X) the maps and the overview's mean, zero outside the frame.
        counts: (N, 105) cells of each map above each threshold, on a log scale, and the context:
            brightness, bin factor and size of the frame, its scatter over Poisson's.
        candidates: (N, 512, 39) the cells that stand out most: their 12 planes, and three of the
            maps in the 3 x 3 cells around; zeros where there are fewer.
        places: (N, 512) which cell each candidate is, y * X + x.
    """

    planes: Tensor
    counts: Tensor
    candidates: Tensor
    places: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Features:
    """What both exits look at; the first axis of each is the frame.

    Attributes:
        evidence: of the overview.
        share: (N, 1, Y, X) valid share of each cell.
        counts: (N, 105) the evidence's, standardised.
        ring_planes: (N, 24, bins) of the radial view.
    """

    evidence: Evidence
    share: Tensor
    counts: Tensor
    ring_planes: Tensor


@dataclass(frozen=True, slots=True)
class Beside:
    """An answer that stands beside a head's own.

    Attributes:
        head: whose it is, of the same exit or the fast one.
        step: where that is an ordinal head, which of its cumulative answers; that it does not lie
            above that level is what stands beside.
    """

    head: str
    step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """One output, as data.

    Attributes:
        name: column or label name.
        kind: ``binary`` (one logit), ``ordinal`` (``levels - 1`` cumulative logits, lowest
            level ``first``) or ``regression`` (of ``transform`` of the quantity).
        exit: ``fast`` or ``full``.
        unit: of a regression.
        transform: ``log`` or ``inverse_square``.
        answers: the label that it answers where another head has that name.
        beside: what else is asked of the same label; each one's logit is added to its own, with a
            weight from the card.
        steps: what each level of an ordinal head adds to its value; 1 without them. Levels that
            lie closer than the grades are told apart without being called.
        reads: of the full exit, which of :data:`READABLE`.
    """

    name: str
    kind: str
    exit: str
    levels: int = 2
    first: float = 0.0
    unit: str = ""
    transform: str = ""
    answers: str = ""
    beside: tuple[Beside, ...] = ()
    steps: tuple[float, ...] = ()
    reads: tuple[str, ...] = READABLE

    @property
    def label(self) -> str:
        """The label that it answers."""
        return self.answers or self.name

    @property
    def highest(self) -> float:
        """The highest value of an ordinal head."""
        return self.first + (sum(self.steps) if self.steps else self.levels - 1.0)

    @property
    def outputs(self) -> int:
        """Numbers the network gives for this head."""
        return self.levels - 1 if self.kind == "ordinal" else 1


class _Stage(nn.Module):
    """Halves the resolution: convolution, ReLU, zero outside the frame."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, stride=2, padding=1)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        return nnf.relu(self.conv(x)) * inside


class _Block(nn.Module):
    """Residual pair of convolutions at one resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        inner = nnf.relu(self.first(x)) * inside
        out: Tensor = (x + self.second(inner)) * inside
        return out


class _RingLayers(nn.Module):
    """Planes of a radial view (N, RING_PLANES, bins) -> (N, 64)."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(RING_PLANES, 24, 5, padding=2)
        self.second = nn.Conv1d(24, 24, 5, stride=2, padding=2)
        self.third = nn.Conv1d(24, 12, 5, stride=2, padding=2)
        self.flat = nn.Linear(12 * (bins // 4), RINGS)

    def forward(self, planes: Tensor) -> Tensor:
        x = nnf.relu(self.first(planes))
        x = nnf.relu(self.second(x))
        x = nnf.relu(self.third(x))
        return nnf.relu(self.flat(x.flatten(1)))


class _Rings(_RingLayers):
    """Radial view (N, 5, sectors, bins): rings against a smooth continuum, and layers over them.

    What a ring is told by is computed, in two ways. By the logarithm of the mean over that of the
    bins around: what stands out, and by what ratio, wherever it comes from. And by what a parabola
    through the bins to both sides of a ring leaves over (:func:`_over_parabola`), in units of its
    standard error, for rings of several widths: of the mean, and of the mean of clipped cells,
    which the spots of a crystal disturb less. A ring of ten sigma may be a hundredth of the
    background, less than the background bends within a few bins.
    """

    def __init__(self, bins: int) -> None:
        super().__init__(bins)
        for number, (core, reach) in enumerate(RING_WIDTHS):
            self.register_buffer(f"powers_{number}", _powers(core, reach, bins), persistent=False)

    def planes(self, radial: Tensor) -> Tensor:
        """What the layers read, (N, RING_PLANES, bins); nothing here is learned."""
        valid = (radial[:, 1] > 0.3).float()  # (N, sectors, bins)
        level = torch.log(radial[:, 0] + 1e-3)
        smooth = _moving_mean(level, valid)
        ratio = ((level - smooth) * valid).clamp(-2.0, 3.0)
        sectors = valid.sum(1).clamp(min=1.0)  # (N, bins)
        mean = ratio.sum(1) / sectors
        spread = (((ratio - mean[:, None]) * valid).square().sum(1) / sectors + 1e-6).sqrt()
        # A faint ring is one that all sectors agree on.
        agreed = _compressed(mean * sectors.sqrt() / spread)
        excluded = (radial[:, 2] * valid).sum(1) / sectors
        brightest = ratio.amax(1)
        x = torch.stack(
            [4.0 * mean, 4.0 * spread, valid.mean(1), 4.0 * excluded, 2.0 * brightest, agreed], 1
        )  # (N, 6, bins)
        pixels = radial[:, 3] * valid
        return torch.cat([x, *(self._in_sigma(radial[:, i], pixels) for i in (0, 4))], 1)

    def _in_sigma(self, mean: Tensor, pixels: Tensor) -> Tensor:
        """For each width sigma, disagreement of the sectors, and ratio: (N, 9, bins).

        Sigma is in units of the frame's own noise, as the narrowest rings have it.
        """
        of_widths = [
            _of_all_sectors(*_over_parabola(mean, pixels, self.get_buffer(f"powers_{number}")))
            for number in range(len(RING_WIDTHS))
        ]
        _, disagreement, _, sectors = of_widths[0]
        scatter = _scatter(disagreement, sectors)[:, None]
        found = []
        for sigma, disagreement, ratio, _ in of_widths:
            found += [
                SIGMA_SCALE * _compressed(sigma / scatter.sqrt()),
                torch.log1p(disagreement / scatter),
                (4.0 * ratio).clamp(-4.0, 8.0),
            ]
        return torch.stack(found, 1)


def _powers(core: int, reach: int, bins: int) -> Tensor:
    """(bins, 8 bins): by what a row of bins is multiplied for eight moments of the window of each.

    Of the bins to both sides of the core the moments 0..2 and of those in it the sum, which counts
    need too; then of the sides the moments 3 and 4, of the core 1 and 2. A bin's place in the
    window runs from -1 to 1.
    """
    at = torch.arange(bins, dtype=torch.float64)
    away = at[:, None] - at
    beside = ((away.abs() > core) & (away.abs() <= reach)).double()
    inside = (away.abs() <= core).double()
    place = away / reach
    sides = [place**power * beside for power in range(5)]
    cores = [place**power * inside for power in range(3)]
    return torch.cat([*sides[:3], cores[0], *sides[3:], *cores[1:]], 1).float()


def _over_parabola(mean: Tensor, pixels: Tensor, powers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By how much a core of bins exceeds the parabola through the bins to both sides of it.

    Pixels weigh alike in the parabola. The noise is Poisson's of the mean of the whole window,
    which is known better than that of any bin, and never 0.

    Args:
        mean, pixels: (N, sectors, bins) counts per pixel, and pixels that count; 0 pixels where
            none do.
        powers: of :func:`_powers`.

    Returns:
        (N, sectors, bins) each: the excess in counts per pixel; 1 over its variance, both 0 where
        the core or too much of the sides is unseen; and the mean of the window.
    """
    # Moments of the pixels and, with y and core, of the counts.
    s0, s1, s2, c0, s3, s4, c1, c2 = (pixels @ powers).chunk(8, 2)
    y0, y1, y2, core = ((mean * pixels) @ powers[:, : 4 * mean.shape[2]]).chunk(4, 2)
    beside, inside = s0.clamp(min=1e-9), c0.clamp(min=1e-9)
    a1, a2, a3, a4 = (each / beside for each in (s1, s2, s3, s4))
    c1, c2 = c1 / inside, c2 / inside
    # The adjugate of the matrix ((1, a1, a2), (a1, a2, a3), (a2, a3, a4)).
    m00, m01, m02 = a2 * a4 - a3 * a3, a2 * a3 - a1 * a4, a1 * a3 - a2 * a2
    m11, m12, m22 = a4 - a2 * a2, a1 * a2 - a3, a2 - a1 * a1
    determinant = m00 + a1 * m01 + a2 * m02
    unseen = (determinant <= LEAST_DETERMINANT) | (s0 <= 0) | (c0 <= 0)
    determinant = determinant.masked_fill(unseen, 1.0)
    g0 = (m00 + m01 * c1 + m02 * c2) / determinant
    g1 = (m01 + m11 * c1 + m12 * c2) / determinant
    g2 = (m02 + m12 * c1 + m22 * c2) / determinant
    excess = core / inside - (g0 * y0 + g1 * y1 + g2 * y2) / beside
    level = (y0 + core + 1.0) / (s0 + c0 + 1.0)
    leverage = ((g0 + g1 * c1 + g2 * c2) / beside).clamp(min=0.0)
    variance = level * (1.0 / inside + leverage)
    return (
        excess.masked_fill(unseen, 0.0),
        (1.0 / variance.clamp(min=1e-20)).masked_fill(unseen, 0.0),
        level.masked_fill(unseen, 0.0),
    )


def _of_all_sectors(
    excess: Tensor, weight: Tensor, level: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The excess of a ring from that of its sectors, which weigh by 1 over their variance.

    (N, sectors, bins) each -> (N, bins) each: excess in sigma; chi2 of the sectors' disagreement,
    1 if noise alone makes it; excess over the continuum; and how many sectors are seen.
    """
    sectors = (weight > 0).sum(1).float()
    weights = weight.sum(1).clamp(min=1e-20)
    together = (weight * excess).sum(1)
    away = excess - (together / weights)[:, None]
    disagreement = (weight * away.square()).sum(1) / (sectors - 1.0).clamp(min=1.0)
    ratio = together / (weight * level).sum(1).clamp(min=1e-20)
    return together / weights.sqrt(), disagreement, ratio, sectors


def _scatter(disagreement: Tensor, sectors: Tensor) -> Tensor:
    """(N,): variance of the sectors over Poisson's, from the median of the bins; at least 1.

    On a CCD, whose gain is several counts per photon, it is several. The median of chi2 / f with
    seven degrees of freedom is 1 / 1.1; a shadow's edge or crystals disturb some bins, not most.
    (N, bins) each.
    """
    seen = sectors >= 2
    ordered = disagreement.masked_fill(~seen, torch.inf).sort(1).values
    middle = (seen.sum(1, keepdim=True) - 1).clamp(min=0) // 2
    median = ordered.gather(1, middle)[:, 0].masked_fill(~seen.any(1), 0.0)
    return (1.1 * median).clamp(min=1.0)


def _moving_mean(level: Tensor, valid: Tensor, reach: int = 12) -> Tensor:
    """Mean of the valid neighbours within ``reach`` bins: (N, sectors, bins) -> the same."""
    width = 2 * reach + 1
    above = nnf.avg_pool1d(level * valid, width, stride=1, padding=reach)
    below = nnf.avg_pool1d(valid, width, stride=1, padding=reach)
    return above / below.clamp(min=1e-3)


def _compressed(e: Tensor) -> Tensor:
    """c = e / sqrt(1 + |e|): linear near zero, a square root far out."""
    return e / (1.0 + e.abs()).sqrt()


def _expanded(c: Tensor) -> Tensor:
    """The e of :func:`_compressed`."""
    square = c.square()
    return 0.5 * torch.sign(c) * (square + (square.square() + 4.0 * square).sqrt())


def _box(x: Tensor, reach: int) -> Tensor:
    """Sum over a square of 2 reach + 1 cells, zeros beyond the edge: (N, 1, Y, X).

    By sums of sums: a window twice as wide is one addition more.
    """
    for axis in (2, 3):
        x = _window_sum(x, 2 * reach + 1, axis)
    return x


def _window_sum(x: Tensor, width: int, axis: int) -> Tensor:
    """Sum over an odd window along one axis."""
    reach, size = width // 2, x.shape[axis]
    run = nnf.pad(x, (reach, reach, 0, 0) if axis == 3 else (0, 0, reach, reach))
    # ``run`` holds the sums over windows of ``length``; every width starts with one.
    total, done, length = run.narrow(axis, 0, size), 1, 1
    while done < width:
        kept = run.shape[axis] - length
        run = run.narrow(axis, 0, kept) + run.narrow(axis, length, kept)
        length *= 2
        if width & length:
            total = total + run.narrow(axis, done, size)
            done += length
    return total


def _in_own_noise(sigma: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Sigma in units of the frame's own scatter where that is larger than Poisson's.

    (N, 1, Y, X) -> the same, and the scatter over Poisson's on a log scale, (N,).
    """
    cells = inside.sum((2, 3), keepdim=True).clamp(min=1.0)
    middle = (sigma.clamp(-3.0, 6.0) * inside).sum((2, 3), keepdim=True) / cells
    middle = middle.clamp(min=0.0)
    away = (sigma - middle).abs() * inside
    scatter = away.clamp(max=6.0).sum((2, 3), keepdim=True) / cells
    over_poisson = torch.log(away.clamp(max=100.0).sum((1, 2, 3)) / cells.flatten() + 0.1)
    return (sigma - middle) / (scatter / _ABSOLUTE).clamp(min=1.0) * inside, over_poisson


def _in_local_noise(sigma: Tensor, inside: Tensor, cells: Tensor) -> Tensor:
    """Sigma in units of the scatter of the 17 x 17 cells around: (N, 1, Y, X) -> the same.

    Args:
        cells: (N, 1, Y, X) how many of those lie inside the frame, at least 1.
    """
    scatter = _box(sigma.abs().clamp(max=6.0) * inside, LOCAL_REACH) / cells
    return sigma / (scatter / _ABSOLUTE).clamp(min=0.25) * inside


def _over_opposite_neighbours(sigma: Tensor, distance: int) -> Tensor:
    """``sigma`` over the better of two opposite neighbours, in the worst of four directions."""
    height, width = sigma.shape[2:]
    padded = nnf.pad(sigma, (distance,) * 4)

    def beside(dy: int, dx: int) -> Tensor:
        return padded.narrow(2, distance + dy, height).narrow(3, distance + dx, width)

    worst = torch.maximum(beside(0, -distance), beside(0, distance))
    for dy, dx in ((distance, 0), (distance, distance), (distance, -distance)):
        worst = torch.maximum(worst, torch.maximum(beside(dy, dx), beside(-dy, -dx)))
    return sigma - worst


def _expected_maximum(bin_factor: Tensor) -> Tensor:
    """Sigma by which chance puts the brightest pixel over the cell: (N, 1, 1, 1)."""
    # By comparison and not from a table: a table would have to be copied to the device on every
    # call, and a CUDA graph captures no such copy.
    k = bin_factor.view(-1, 1, 1, 1)
    chosen = [(k == factor) * float(sigma) for factor, sigma in EXPECTED_MAXIMUM.items()]
    return torch.stack(chosen).sum(0)


def _maps(overview: Tensor, bin_factor: Tensor) -> tuple[Tensor, Tensor]:
    """The maps of the module's description, compressed: (N, 11, Y, X), zero outside the frame.

    And the scatter (N, 3) of maximum, rest and whole over Poisson's, on a log scale.

    The cell's integers come back from the overview: channel 1 is the compressed
    u = 2 sqrt(mean + 3/8) of the cell without its brightest pixel, channel 0 the excess of the
    brightest pixel on that scale, less what chance explains.
    """
    share = overview[:, 2:3]
    inside = (share > 0).float()
    pixels = share * bin_factor.view(-1, 1, 1, 1).square()
    others = (pixels - 1.0).clamp(min=0.0)
    excess = _expanded(overview[:, :1])
    u = _expanded(overview[:, 1:2])
    dimmer = ((0.5 * u).square() - 0.375).clamp(min=0.0) * others * inside
    brightest = (0.5 * (excess + _expected_maximum(bin_factor) + u)).square() - 0.375
    total = dimmer + brightest.clamp(min=0.0) * inside

    area = _box(pixels, NEAR_REACH).clamp(min=1e-3)
    mean = _box(total, NEAR_REACH) / area
    # Once more without what stands out, so that a spot does not hide its neighbour or itself.
    ordinary = torch.minimum(total, mean * pixels + 3.0 * (mean * pixels + 0.5).sqrt())
    mean = _box(ordinary, NEAR_REACH) / area
    whole = _over_expected(total, mean * pixels) * inside
    rest = _over_expected(dimmer, mean * others) * inside

    cells = _box(inside, LOCAL_REACH).clamp(min=1.0)
    scaled = [_in_own_noise(sigma, inside) for sigma in (excess, rest, whole)]
    own, scatter = [each[0] for each in scaled], torch.stack([each[1] for each in scaled], 1)
    local = [_in_local_noise(sigma, inside, cells) for sigma in (excess, rest)]
    maps = [
        own[0],
        own[1],
        torch.minimum(own[0], own[1]),
        own[2],
        *(_over_opposite_neighbours(own[2], distance) for distance in (1, 2)),
        local[0],
        local[1],
        torch.minimum(local[0], local[1]),
        *(_over_opposite_neighbours(local[1], distance) for distance in (1, 2)),
    ]
    return _compressed(torch.cat(maps, 1)) * inside, scatter


def _over_expected(counts: Tensor, expected: Tensor) -> Tensor:
    """Sigma by which Poisson counts exceed what is expected (Anscombe)."""
    return 2.0 * ((counts + 0.375).sqrt() - (expected + 0.375).sqrt())


def _counts(planes: Tensor, share: Tensor, bin_factor: Tensor, scatter: Tensor) -> Tensor:
    """How many cells of each map stand out, and what kind of frame it is: (N, 105).

    Steps are soft, half a unit wide, so that a cell on a threshold does not flip the score.
    """
    counts = [
        (planes[:, i] - (threshold - 0.25)).clamp_(0.0, 0.5).sum((1, 2))
        for i in range(MAPS)
        for threshold in THRESHOLDS
    ]
    cells = (share > 0).float().sum((1, 2, 3)).clamp(min=1.0)
    brightness = planes[:, MAPS].sum((1, 2)) / cells
    how_many = torch.stack([torch.log1p(2.0 * c) for c in counts], 1)
    context = torch.stack([brightness, bin_factor.log(), cells.log()], 1)
    return torch.cat([how_many, context, scatter], 1)


def _candidates(planes: Tensor) -> tuple[Tensor, Tensor]:
    """The cells that stand out most, with what is around them, and where they are.

    (N, 12, Y, X) -> (N, 512, 39), (N, 512).
    """
    height, width = planes.shape[2:]
    peak = planes[:, PEAKS].amax(1).flatten(1)
    score, at = peak.topk(min(CANDIDATES, height * width), dim=1)  # (N, K)
    return around_and_own(planes, at) * (score > LEAST)[:, :, None], at


def around_and_own(planes: Tensor, at: Tensor) -> Tensor:
    """All planes of the cells ``at`` (N, K), and of some the 3 x 3 cells around: (N, K, 39)."""
    n, width = planes.shape[0], planes.shape[3]
    own = planes.flatten(2).gather(2, at[:, None].expand(-1, planes.shape[1], -1))
    padded = nnf.pad(planes[:, _AROUND], (1, 1, 1, 1)).flatten(2)
    row = width + 2
    corner = at // width * row + at % width
    side = torch.arange(3, device=at.device)
    offsets = (side[:, None] * row + side).flatten()
    places = (corner[:, :, None] + offsets).flatten(1)  # (N, K * 9)
    around = padded.gather(2, places[:, None].expand(-1, len(_AROUND), -1))
    around = around.view(n, len(_AROUND), -1, 9).transpose(1, 2).flatten(2)  # (N, K, 27)
    return torch.cat([own.transpose(1, 2), around], 2)


def evidence(overview: Tensor, bin_factor: Tensor) -> Evidence:
    """What stands out, in units of noise.

    Args:
        overview: (N, 3, Y, X) float32, Y and X multiples of 32, zero outside the frame.
        bin_factor: (N,) float32, pixels per cell side.
    """
    share = overview[:, 2:3]
    level = overview[:, 1:2] * (share > 0)
    maps, scatter = _maps(overview, bin_factor)
    planes = torch.cat([maps, level], 1)
    candidates, places = _candidates(planes)
    return Evidence(
        planes=planes,
        counts=_counts(planes, share, bin_factor, scatter),
        candidates=candidates,
        places=places,
    )


class _Kinds(nn.Module):
    """Spots counted by learned kinds: marks (N, MARKED, M) -> (N, 2 * _KINDS)."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = nn.Sequential(
            nn.Linear(len(SPOT_MARKS), _KIND_WIDTH),
            nn.ReLU(),
            nn.Linear(_KIND_WIDTH, _KIND_WIDTH),
            nn.ReLU(),
            nn.Linear(_KIND_WIDTH, _KIND_WIDTH),
            nn.ReLU(),
            nn.Linear(_KIND_WIDTH, _KINDS),
        )

    def forward(self, marks: Tensor) -> Tensor:
        # The cube counts the sure ones alone.
        if self.training:
            # Half of the rows are no spots, and need not be learned from.
            there = marks[:, :, -1] > 0
            kinds = torch.sigmoid(self.kind(marks[there]))
            frame = there.nonzero()[:, 0]
            none = kinds.new_zeros((len(marks), _KINDS))
            counted = [none.index_add(0, frame, each) for each in (kinds, kinds.pow(3))]
        else:
            kinds = torch.sigmoid(self.kind(marks)) * marks[:, :, -1:]
            counted = [kinds.sum(1), kinds.pow(3).sum(1)]
        return torch.log1p(torch.cat(counted, 1))


class _InCompany(nn.Module):
    """What :class:`InCompany` is learned as."""

    def __init__(self) -> None:
        super().__init__()
        width, groups = _JUDGE_WIDTH, _JUDGE_GROUPS
        self.groups = nn.Linear(width, groups)
        self.own = nn.Linear(width, width)
        self.whole = nn.Linear(groups * (width + 1), width, bias=False)

    def forward(self, inner: Tensor, there: Tensor, frame: Tensor, frames: int) -> Tensor:
        share = torch.sigmoid(self.groups(inner)) * there  # (n, G)
        size = share.new_zeros((frames, share.shape[1])).index_add(0, frame, share)
        # Group by group, or it is a number for each group, spot and frame.
        means = [
            inner.new_zeros((frames, inner.shape[1])).index_add(0, frame, inner * each[:, None])
            / (total + 1.0)[:, None]
            for each, total in zip(share.unbind(1), size.unbind(1), strict=True)
        ]
        whole: Tensor = self.whole(torch.cat([*means, torch.log1p(size)], 1))
        out: Tensor = self.own(inner) + whole[frame]
        return out

    def fixed(self) -> InCompany:
        return InCompany(
            groups=_arrays(self.groups),
            own=_arrays(self.own),
            whole=self.whole.weight.detach().cpu().numpy().copy(),
        )


class JudgeLayers(nn.Module):
    """What :class:`SpotJudge` is learned as.

    Until it is learned it takes every spot for a crystal's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(len(SPOT_MARKS), _JUDGE_WIDTH)
        self.second = nn.Linear(_JUDGE_WIDTH, _JUDGE_WIDTH)
        self.company = nn.ModuleList(_InCompany() for _ in range(_JUDGE_LOOKS))
        self.last = nn.Linear(_JUDGE_WIDTH, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.ones_(self.last.bias)

    def forward(self, marks: Tensor, frame: Tensor, frames: int) -> Tensor:
        """(n,) log odds of the spots of several frames.

        Args:
            marks: (n, M).
            frame: (n,) which of so many ``frames`` each spot is of.
        """
        inner = nnf.relu(self.second(nnf.relu(self.first(marks))))
        for layer in self.company:
            inner = nnf.relu(layer(inner, marks[:, -1:], frame, frames))
        answer: Tensor = self.last(inner)
        return answer[:, 0]

    def fixed(self) -> SpotJudge:
        """The judge as it now is."""
        layers = [_arrays(each) for each in (self.first, self.second, self.last)]
        return SpotJudge(
            weights=tuple(weight for weight, _ in layers),
            biases=tuple(bias for _, bias in layers),
            company=tuple(cast("_InCompany", each).fixed() for each in self.company),
        )


def _arrays(layer: nn.Linear) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Copies of a layer's weights and biases."""
    weight, bias = (each.detach().cpu().numpy().copy() for each in layer.parameters())
    return weight, bias


class _Ranks(nn.Module):
    """Numbers (N, F) as their ranks among those of known frames, of variance one: (N, F).

    Linear between quantiles, and held between the lowest and the highest. Until they are learned
    they are the numbers themselves, held to six.
    """

    knots: Tensor
    ranks: Tensor

    def __init__(self, numbers: int) -> None:
        super().__init__()
        even = torch.linspace(-SPOT_RANGE, SPOT_RANGE, _KNOTS).expand(numbers, -1)
        self.register_buffer("knots", even.clone())
        self.register_buffer("ranks", even.clone())

    def learn(self, numbers: Tensor) -> None:
        """Take the ranks of those (n, F)."""
        shares = np.linspace(0.0, 1.0, _KNOTS)
        quantiles = np.quantile(numbers.cpu().numpy().astype(np.float64), shares, axis=0).T
        for row, each in enumerate(quantiles.astype(np.float32)):
            knots = np.unique(each)
            # The middle of those that are equal.
            before, after = (np.searchsorted(each, knots, side) for side in ("left", "right"))
            ranks = math.sqrt(12.0) * ((before + after - 1) / (2.0 * (_KNOTS - 1)) - 0.5)
            left = (0, _KNOTS - len(knots))
            self.knots[row] = torch.from_numpy(np.pad(knots, left, mode="edge"))
            self.ranks[row] = torch.from_numpy(np.pad(ranks, left, mode="edge"))

    def forward(self, numbers: Tensor) -> Tensor:
        held = numbers.T.contiguous()  # (F, N)
        above = torch.searchsorted(self.knots, held).clamp(1, _KNOTS - 1)
        (low, high), (lowest, highest) = (
            (each.gather(1, above - 1), each.gather(1, above)) for each in (self.knots, self.ranks)
        )
        # Behind the last knot that differs the ranks are equal, whatever the part.
        part = ((held - low) / (high - low).clamp(min=1e-30)).clamp(0.0, 1.0)
        return (lowest + part * (highest - lowest)).T

    def steps(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """The same as a sum: knots (F, K), one over how far the next is, and by how much ranks rise
        until there (0 where none is); the lowest ranks are the first of ``ranks``."""
        knots, ranks = (each.cpu().numpy() for each in (self.knots, self.ranks))
        apart = np.diff(knots, axis=1)
        steepness = 1.0 / np.where(apart > 0.0, apart, 1.0)
        return knots[:, :-1], steepness.astype(np.float32), np.diff(ranks, axis=1)


class _Answer(nn.Module):
    """One head of the full exit: what it reads (N, width) -> (N, outputs)."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, _OWN)
        self.forget = nn.Dropout(0.2)
        self.second = nn.Linear(_OWN, _OWN // 2)
        self.last = nn.Linear(_OWN // 2, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.forget(nnf.relu(self.first(x)))
        answer: Tensor = self.last(nnf.relu(self.second(x)))
        return answer


class _FullMember(nn.Module):
    """One network of the full exit: its answer (N, outputs) to each head.

    Args:
        widths: of the parts that it is given, by name; :data:`READABLE` but those that each
            member learns for itself, ``rings`` and ``kinds``.
        bins: of the radial view.
    """

    def __init__(self, widths: Mapping[str, int], heads: Sequence[Head], bins: int) -> None:
        super().__init__()
        self.reads = {head.name: head.reads for head in heads}
        parts = {part for head in heads for part in head.reads}
        self.rings = _RingLayers(bins) if "rings" in parts else None
        self.forget = nn.Dropout(0.2)
        self.kinds = _Kinds() if "kinds" in parts else None
        widths = {**widths, "rings": RINGS, "kinds": 2 * _KINDS}
        self.outs = nn.ModuleDict(
            {
                head.name: _Answer(sum(widths.get(part, 0) for part in head.reads), head.outputs)
                for head in heads
            }
        )

    def forward(
        self, parts: Mapping[str, Tensor], ring_planes: Tensor, marks: Tensor
    ) -> dict[str, Tensor]:
        """
        Args:
            parts: what there is to read, each (N, width).
            ring_planes: (N, RING_PLANES, bins).
            marks: (N, MARKED, M).
        """
        if self.rings is not None:
            parts = {**parts, "rings": self.forget(self.rings(ring_planes))}
        if self.kinds is not None:
            parts = {**parts, "kinds": self.kinds(marks)}
        return {
            name: out(torch.cat([parts[part] for part in self.reads[name] if part in parts], 1))
            for name, out in self.outs.items()
        }


def _answer(width: int, outputs: int) -> nn.Sequential:
    """The last layers of a member: (N, width) -> (N, outputs)."""
    return nn.Sequential(
        nn.Linear(width, 64),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, outputs),
    )


class _SpotMember(nn.Module):
    """One small network of blank by spots: (N, width) and marks -> (N, outputs)."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.kinds = _Kinds()
        self.answer = _answer(width + 2 * _KINDS, outputs)

    def forward(self, x: Tensor, marks: Tensor) -> Tensor:
        answer: Tensor = self.answer(torch.cat([x, self.kinds(marks)], 1))
        return answer


class _Member(nn.Module):
    """One small network of a panel: (N, width) and, if it looks, candidates -> (N, outputs)."""

    def __init__(self, width: int, outputs: int, *, looks: bool) -> None:
        super().__init__()
        self.look: nn.Module | None = None
        if looks:
            self.look = nn.Sequential(
                nn.Linear(_CANDIDATE + CONTEXT, 32), nn.ReLU(), nn.Linear(32, LOOKS), nn.Sigmoid()
            )
            width += 2 * LOOKS
        self.answer = _answer(width, outputs)

    def forward(self, x: Tensor, candidates: Tensor, context: Tensor) -> Tensor:
        if self.look is not None:
            # Soft at the lower end, so that a cell on the bound does not flip the score.
            weight = ((candidates[:, :, PEAKS].amax(2) - LEAST) / 0.2).clamp(0.0, 1.0)
            context = context[:, None].expand(-1, candidates.shape[1], -1)
            seen = self.look(torch.cat([candidates, context], 2)) * weight[:, :, None]
            # The cube counts the sure ones alone.
            x = torch.cat([x, torch.log1p(seen.sum(1)), torch.log1p(seen.pow(3).sum(1))], 1)
        answer: Tensor = self.answer(x)
        return answer


class TriageNet(nn.Module):
    """Two exits over three views; the heads are given as data.

    Args:
        heads: every head, of either exit.
        radial_bins: bins of the radial view, a multiple of 4.
        spot_features: numbers of a whole list of spots.
        convolutions: whether the full exit also looks at the overview and at tiles.
    """

    counts_mean: Tensor
    counts_scale: Tensor
    unusual: Tensor
    spots_mean: Tensor
    spots_scale: Tensor

    def __init__(
        self,
        heads: Sequence[Head],
        *,
        radial_bins: int,
        spot_features: int = len(SPOT_FEATURES),
        convolutions: bool = True,
    ) -> None:
        super().__init__()
        self.heads = tuple(heads)
        self.convolutions = convolutions
        self.register_buffer("counts_mean", torch.zeros(COUNTS))
        self.register_buffer("counts_scale", torch.ones(COUNTS))
        self.register_buffer("unusual", torch.zeros(COUNTS, COUNTS))
        self.register_buffer("spots_mean", torch.zeros(spot_features))
        self.register_buffer("spots_scale", torch.ones(spot_features))
        self.among_hits = _Ranks(spot_features)
        self.rings = _Rings(radial_bins)
        self.forget = nn.Dropout(0.2)
        self.panels = nn.ModuleDict()
        self.judge = JudgeLayers()
        parts = {"counts": COUNTS, "spots": spot_features}
        if convolutions:
            through = itertools.pairwise((MAPS + 2, *_STAGES))
            self.stages = nn.ModuleList(_Stage(a, b) for a, b in through)
            self.block = _Block(_STAGES[-1])
            self.fine_detectors = nn.Conv2d(_STAGES[1], _DETECTORS, 1)
            self.coarse_detectors = nn.Conv2d(_STAGES[-1], _DETECTORS, 1)
            self.tile_stages = nn.ModuleList(
                [
                    nn.Conv2d(2, 16, 3, stride=2, padding=1),
                    nn.Conv2d(16, 32, 3, stride=2, padding=1),
                    nn.Conv2d(32, _TILE_FEATURES, 3, stride=2, padding=1),
                ]
            )
            parts["seen"] = 2 * _STAGES[-1] + 2 * _DETECTORS + 4 * _TILE_FEATURES
        for head in self.heads:
            if head.exit == "fast":
                # Blank must not depend on geometry, which may be missing: no rings for it.
                blank = head.name == "blank"
                width = COUNTS if blank else CONTEXT + RINGS
                self.panels[head.name] = nn.ModuleList(
                    _Member(width, head.outputs, looks=blank) for _ in range(MEMBERS)
                )
        self.full_members = nn.ModuleList(
            _FullMember(parts, self.full_heads, radial_bins) for _ in range(FULL_MEMBERS)
        )
        self._begin()
        self.by_spots = nn.ModuleList(
            _SpotMember(COUNTS + spot_features, head.outputs)
            for head in self.heads
            if head.name == BLANK_BY_SPOTS
            for _ in range(MEMBERS)
        )

    def _begin(self) -> None:
        """Weights of the full exit to begin with: as much signal behind a layer as before it.

        Source: He et al., Delving Deep into Rectifiers, ICCV 2015. With torch's own beginning,
        made for other nonlinearities, each layer here lets a sixth of the variance through, and
        the convolutions are silent before they have learned anything.
        """
        parts: list[nn.Module] = [self.full_members]
        if self.convolutions:
            parts += [self.stages, self.block, self.tile_stages]
        for part in parts:
            for layer in part.modules():
                if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
        # A residual begins as nothing, and an answer as its bias.
        if self.convolutions:
            nn.init.zeros_(self.block.second.weight)
        for member in self.full_members:
            for answer in cast("_FullMember", member).outs.values():
                nn.init.normal_(cast("_Answer", answer).last.weight, std=0.01)

    @property
    def full_heads(self) -> tuple[Head, ...]:
        """The heads of the full exit but blank by spots, which stands by itself."""
        return tuple(
            head for head in self.heads if head.exit == "full" and head.name != BLANK_BY_SPOTS
        )

    @property
    def spots_width(self) -> int:
        """S: numbers in which ``spot_features`` gives a list of spots."""
        return self.spots_mean.numel() + MARKED * len(SPOT_MARKS)

    @property
    def first_filters(self) -> Tensor:
        """(16, 13, 3, 3) weights of the first convolution over the overview."""
        return cast("_Stage", self.stages[0]).conv.weight.detach()

    def standardise(self, counts: Tensor) -> None:
        """Set mean and scale of the counts from those (N, 105) of a training set."""
        self.counts_mean.copy_(counts.mean(0))
        self.counts_scale.copy_(counts.std(0, correction=0) + 1e-2)

    def standardise_spots(self, spots: Tensor, hits: Tensor) -> None:
        """Set mean and scale of the lists' numbers from the spots (N, S) of a training set, and
        their ranks from those of its hits (N,)."""
        whole = spots[:, : self.spots_mean.numel()]
        self.spots_mean.copy_(whole.mean(0))
        self.spots_scale.copy_(whole.std(0, correction=0) + 1e-2)
        if hits.any():
            self.among_hits.learn(whole[hits])

    def _parted(self, spots: Tensor) -> tuple[Tensor, Tensor]:
        """Lists of spots (N, S) as numbers of the whole (N, F) and marks (N, MARKED, M)."""
        whole = self.spots_mean.numel()
        return spots[:, :whole], spots[:, whole:].reshape(-1, MARKED, len(SPOT_MARKS))

    def standardised(self, counts: Tensor) -> Tensor:
        """Counts as the learned part reads them."""
        return (counts - self.counts_mean) / self.counts_scale

    def features(self, overview: Tensor, radial: Tensor, bin_factor: Tensor) -> Features:
        """What both exits look at.

        Args:
            overview: (N, 3, Y, X) float32, Y and X multiples of 32, zero outside the frame.
            radial: (N, 5, sectors, bins) float32.
            bin_factor: (N,) float32, pixels per cell side.
        """
        return self.features_of(evidence(overview, bin_factor), overview[:, 2:3], radial)

    def features_of(self, found: Evidence, share: Tensor, radial: Tensor) -> Features:
        """The same from evidence that was computed elsewhere, and share (N, 1, Y, X)."""
        return Features(
            evidence=found,
            share=share,
            counts=self.standardised(found.counts),
            ring_planes=self.rings.planes(radial),
        )

    def members(self, counts: Tensor, candidates: Tensor, rings: Tensor) -> dict[str, Tensor]:
        """Raw outputs (N, members, head.outputs) of the fast exit, each member's own.

        Args:
            counts: (N, 105) standardised.
            candidates: (N, 512, 39) float32.
            rings: (N, 64).
        """
        context = counts[:, -CONTEXT:]
        answers = {}
        for name, panel in self.panels.items():
            x = counts if name == "blank" else torch.cat([context, self.forget(rings)], 1)
            members = cast("nn.ModuleList", panel)
            answers[name] = torch.stack([m(x, candidates, context) for m in members], 1)
        return answers

    def bound_the_usual(self, counts: Tensor, share: float) -> None:
        """Learn from the counts (N, 105) of a training set which frames are unlike it.

        A frame lies as far from the set as its counts do from their mean, in units of their
        covariance (Mahalanobis), which is drawn a tenth of the way to that of independent counts.

        Args:
            share: of the set, so much is to be called unusual.
        """
        counts = self.standardised(counts).double()
        around = counts - counts.mean(0)
        covariance = around.T @ around / len(counts)
        own = torch.eye(COUNTS, dtype=torch.float64, device=counts.device)
        whitening = torch.linalg.cholesky(torch.linalg.inv(0.9 * covariance + 0.1 * own))
        distances = (counts @ whitening).square().sum(1)
        at = min(len(counts) - 1, int((1.0 - share) * len(counts)))
        bound = distances.sort().values[at]
        self.unusual.copy_(whitening / bound.sqrt())

    def strangeness(self, counts: Tensor) -> Tensor:
        """How unlike the training set frames are (N, 1), from standardised counts; above 1 they are
        further away than all but a stated share of it."""
        return (counts @ self.unusual).square().sum(1, keepdim=True)

    def fast(self, features: Features) -> dict[str, Tensor]:
        """Raw outputs (N, head.outputs) of the fast exit.

        Beside the heads: ``members``, (N, members) each one's answer to blank, and ``strangeness``.
        """
        found = features.evidence
        rings = self.rings(features.ring_planes)
        answers = self.members(features.counts, found.candidates, rings)
        beside = {"members": answers["blank"][:, :, 0]} if "blank" in answers else {}
        return {name: raw.mean(1) for name, raw in answers.items()} | {
            **beside,
            "strangeness": self.strangeness(features.counts),
        }

    def full(self, features: Features, tiles: Tensor, spots: Tensor) -> dict[str, Tensor]:
        """Raw outputs (N, head.outputs) of the full exit.

        Args:
            tiles: (N, tiles, 2, P, P) float32: square root of counts, validity.
            spots: (N, S) float32, as ``spot_features`` gives them.
        """
        seen = self.seen(features, tiles) if self.convolutions else None
        return self.full_answers(features.counts, features.ring_planes, spots, seen)

    def full_answers(
        self, counts: Tensor, ring_planes: Tensor, spots: Tensor, seen: Tensor | None
    ) -> dict[str, Tensor]:
        """The same from what the convolutions saw, None without them.

        Args:
            counts: (N, 105) standardised.
            ring_planes: (N, 24, bins), see :meth:`_Rings.planes`.
            spots: (N, S) float32, as ``spot_features`` gives them.
            seen: (N, 336).
        """
        each = self.members_of_full(counts, ring_planes, spots, seen)
        answers = {name: raw.mean(1) for name, raw in each.items()}
        if self.by_spots:
            answers[BLANK_BY_SPOTS] = self.blank_members(counts, spots).mean(1)
        return answers

    def members_of_full(
        self, counts: Tensor, ring_planes: Tensor, spots: Tensor, seen: Tensor | None
    ) -> dict[str, Tensor]:
        """Raw outputs (N, members, head.outputs) of the full heads, each member's own; of the same
        as :meth:`full_answers`."""
        whole, marks = self._parted(spots)
        parts = {"counts": counts, "spots": self.among_hits(whole)}
        if seen is not None:
            parts["seen"] = seen
        found = [member(parts, ring_planes, marks) for member in self.full_members]
        return {
            head.name: torch.stack([each[head.name] for each in found], 1)
            for head in self.full_heads
        }

    def blank_members(self, counts: Tensor, spots: Tensor) -> Tensor:
        """Raw outputs (N, members, 1) of blank by spots, each member's own.

        Args:
            counts: (N, 105) standardised.
            spots: (N, S) float32, as ``spot_features`` gives them.
        """
        whole, marks = self._parted(spots)
        scaled = (whole - self.spots_mean) / self.spots_scale
        x = torch.cat([counts, scaled.clamp(-SPOT_RANGE, SPOT_RANGE)], 1)
        return torch.stack([each(x, marks) for each in self.by_spots], 1)

    def seen(self, features: Features, tiles: Tensor) -> Tensor:
        """What the convolutions say of overview and tiles: (N, 336)."""
        n, places = tiles.shape[:2]
        x = tiles.flatten(0, 1)  # (N * tiles, 2, P, P)
        used = (x[:, 1].amax((1, 2)) > 0).float().view(n, places, 1)
        for conv in self.tile_stages:
            x = nnf.relu(conv(x))
        per_tile = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1).view(n, places, -1)
        per_tile = per_tile * used
        mean = per_tile.sum(1) / used.sum(1).clamp(min=1.0)
        return torch.cat([self._convolved(features), mean, per_tile.amax(1)], 1)

    def _convolved(self, features: Features) -> Tensor:
        """The overview, convolved and pooled: (N, 2 * 64 + 16)."""
        share = features.share
        x = torch.cat([features.evidence.planes, share], 1)
        inside = (share > 0).float()
        fine = x
        for number, stage in enumerate(self.stages):
            share = nnf.avg_pool2d(share, 2)
            inside = (share > 0).float()
            x = stage(x, inside)
            if number == 1:
                fine = self._count(self.fine_detectors(x), inside)
        x = self.block(x, inside)  # (N, 64, Y/16, X/16)
        weight = share.sum((2, 3)).clamp(min=1e-6)
        mean = (x * share).sum((2, 3)) / weight
        largest = (x - 1e4 * (1.0 - inside)).amax((2, 3)).clamp(min=-1e3)
        coarse = self._count(self.coarse_detectors(x), inside)
        return torch.cat([mean, largest, fine, coarse], 1)

    @staticmethod
    def _count(evidence: Tensor, inside: Tensor) -> Tensor:
        """How many places answer, on a log scale: (N, detectors)."""
        return torch.log1p((torch.sigmoid(4.0 * evidence - 5.0) * inside).sum((2, 3)))

"""The network: one small model with two exits.

* fast exit (every frame): overview and radial view -> blank, ice; about 0.1 GMAC at 320 x 320;
* full exit (frames that go on): the same features and native tiles -> the other heads.

Notable choices:

* no normalisation: statistics of a batch shift between detectors, and normalising the channels
  of a place hides how far a spot stands out, which is the question. The input is in units of
  noise already;
* a fourth input channel, made here from the first three: by how many sigma the mean of a cell,
  its brightest pixel left out, exceeds that of the cells around. A spot lifts it, a hot pixel
  does not;
* activations outside the frame are set to zero after each stage, so padding changes nothing;
* besides mean and maximum, pooling *counts*: cells above fixed thresholds, and the sums of learned
  soft detectors over places. Ten spots are a hit whether the frame is small or large;
* the radial view is flattened and not pooled, because ice is a matter of where a ring lies.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

__all__ = ["Head", "TriageNet"]

_STAGES = (16, 32, 48, 64)
_DETECTORS = 8
_THRESHOLDS = (0.8, 1.2, 1.6, 2.0, 2.5, 3.5)
"""Compressed sigma e / sqrt(1 + e): about 1.2, 2.1, 3.3, 4.8, 7.2 and 13 sigma."""
_RING_FEATURES = 64
_TILE_FEATURES = 48


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
    """

    name: str
    kind: str
    exit: str
    levels: int = 2
    first: float = 0.0
    unit: str = ""
    transform: str = ""

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


class _Rings(nn.Module):
    """Radial view (N, 3, sectors, bins) -> (N, 64): rings against a smooth continuum."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(5, 24, 5, padding=2)
        self.second = nn.Conv1d(24, 24, 5, stride=2, padding=2)
        self.third = nn.Conv1d(24, 12, 5, stride=2, padding=2)
        self.flat = nn.Linear(12 * (bins // 4), _RING_FEATURES)

    def forward(self, radial: Tensor) -> Tensor:
        valid = (radial[:, 1] > 0.3).float()  # (N, sectors, bins)
        level = torch.log(radial[:, 0] + 1e-3)
        smooth = _moving_mean(level, valid)
        ratio = ((level - smooth) * valid).clamp(-2.0, 3.0)
        sectors = valid.sum(1).clamp(min=1.0)  # (N, bins)
        mean = ratio.sum(1) / sectors
        spread = (((ratio - mean[:, None]) * valid).square().sum(1) / sectors + 1e-6).sqrt()
        excluded = (radial[:, 2] * valid).sum(1) / sectors
        brightest = ratio.amax(1)
        x = torch.stack(
            [4.0 * mean, 4.0 * spread, valid.mean(1), 4.0 * excluded, 2.0 * brightest], 1
        )  # (N, 5, bins)
        x = nnf.relu(self.first(x))
        x = nnf.relu(self.second(x))
        x = nnf.relu(self.third(x))
        return nnf.relu(self.flat(x.flatten(1)))


def _moving_mean(level: Tensor, valid: Tensor, reach: int = 12) -> Tensor:
    """Mean of the valid neighbours within ``reach`` bins: (N, sectors, bins) -> the same."""
    width = 2 * reach + 1
    above = nnf.avg_pool1d(level * valid, width, stride=1, padding=reach)
    below = nnf.avg_pool1d(valid, width, stride=1, padding=reach)
    return above / below.clamp(min=1e-3)


def _mean_excess(overview: Tensor, bin_factor: Tensor) -> Tensor:
    """Sigma of each cell's mean over its neighbours': (N, 1, Y, X).

    Channel 1 is u / sqrt(1 + u) with u = 2 sqrt(mean + 3/8), which has a variance of one over
    the cell's pixels. The neighbours are the valid cells of a 7 x 7 square.
    """
    inside = (overview[:, 2:3] > 0).float()
    c = overview[:, 1:2]
    u = 0.5 * (c.square() + (c.square().square() + 4.0 * c.square()).sqrt())
    around = nnf.avg_pool2d(u * inside, 7, stride=1, padding=3)
    share = nnf.avg_pool2d(inside, 7, stride=1, padding=3)
    pixels = overview[:, 2:3] * bin_factor.view(-1, 1, 1, 1).square()
    return (u - around / share.clamp(min=1e-3)) * pixels.sqrt() * inside


def _expanded(c: Tensor) -> Tensor:
    """e of c = e / sqrt(1 + |e|)."""
    square = c.square()
    return 0.5 * torch.sign(c) * (square + (square.square() + 4.0 * square).sqrt())


def _in_own_noise(sigma: Tensor, inside: Tensor) -> Tensor:
    """Sigma in units of the frame's own scatter where that is larger than Poisson's, compressed.

    A CCD's counts are several units per photon, so all of its cells stand out; what matters is
    which stand out from the others. (N, 1, Y, X) -> the same.
    """
    cells = inside.sum((2, 3), keepdim=True).clamp(min=1.0)
    middle = (sigma.clamp(-3.0, 6.0) * inside).sum((2, 3), keepdim=True) / cells
    middle = middle.clamp(min=0.0)
    scatter = ((sigma - middle).abs().clamp(max=6.0) * inside).sum((2, 3), keepdim=True) / cells
    # The mean absolute deviation of a normal variable is 0.8 of its sigma.
    own = (sigma - middle) / (scatter / 0.8).clamp(min=1.0) * inside
    return own / (1.0 + own.abs()).sqrt()


def _cells_above(x: Tensor, bin_factor: Tensor) -> Tensor:
    """How many cells stand out, on a log scale, and what kind of frame it is: (N, 3 T + 2).

    Counted where the maximum stands out, where the mean does, and where both do: the last are
    spots, the first alone hot pixels. Steps are soft, so that a cell on a threshold does not
    flip the score.
    """
    inside = (x[:, 2] > 0).float()
    both = torch.minimum(x[:, 0], x[:, 3])
    counts = [
        (torch.sigmoid(8.0 * (values - threshold)) * inside).sum((1, 2))
        for values in (x[:, 0], x[:, 3], both)
        for threshold in _THRESHOLDS
    ]
    cells = inside.sum((1, 2)).clamp(min=1.0)
    brightness = (x[:, 1] * inside).sum((1, 2)) / cells
    return torch.stack([*(torch.log1p(c) for c in counts), brightness, bin_factor.log()], 1)


class TriageNet(nn.Module):
    """Two exits over three views; the heads are given as data.

    Args:
        heads: every head, of either exit.
        radial_bins: bins of the radial view, a multiple of 4.
    """

    def __init__(self, heads: Sequence[Head], *, radial_bins: int) -> None:
        super().__init__()
        self.heads = tuple(heads)
        widths = (4, *_STAGES)
        self.stages = nn.ModuleList(_Stage(a, b) for a, b in itertools.pairwise(widths))
        self.block = _Block(_STAGES[-1])
        self.fine_detectors = nn.Conv2d(_STAGES[1], _DETECTORS, 1)
        self.coarse_detectors = nn.Conv2d(_STAGES[-1], _DETECTORS, 1)
        self.rings = _Rings(radial_bins)
        shared = 2 * _STAGES[-1] + 2 * _DETECTORS + 3 * len(_THRESHOLDS) + 2
        self.tile_stages = nn.ModuleList(
            [
                nn.Conv2d(2, 16, 3, stride=2, padding=1),
                nn.Conv2d(16, 32, 3, stride=2, padding=1),
                nn.Conv2d(32, _TILE_FEATURES, 3, stride=2, padding=1),
            ]
        )
        self.trunk = nn.Sequential(
            nn.Linear(shared + _RING_FEATURES + 4 * _TILE_FEATURES, 128), nn.ReLU()
        )
        self.fast_trunks = nn.ModuleDict()
        self.outs = nn.ModuleDict()
        for head in self.heads:
            if head.exit == "fast":
                # Blank must not depend on geometry, which may be missing: no rings for it.
                width = shared + (_RING_FEATURES if head.name != "blank" else 0)
                self.fast_trunks[head.name] = nn.Sequential(nn.Linear(width, 64), nn.ReLU())
                self.outs[head.name] = nn.Linear(64, head.outputs)
            else:
                self.outs[head.name] = nn.Linear(128, head.outputs)

    def features(
        self, overview: Tensor, radial: Tensor, bin_factor: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Pooled features of overview and rings: (N, shared), (N, 64).

        Args:
            overview: (N, 3, Y, X) float32, Y and X multiples of 32, zero outside the frame.
            radial: (N, 3, sectors, bins) float32.
            bin_factor: (N,) float32, pixels per cell side.
        """
        share = overview[:, 2:3]
        inside = (share > 0).float()
        x = torch.cat(
            [
                _in_own_noise(_expanded(overview[:, :1]), inside),
                overview[:, 1:],
                _in_own_noise(_mean_excess(overview, bin_factor), inside),
            ],
            1,
        )
        cells = _cells_above(x, bin_factor)
        fine = cells
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
        return torch.cat([mean, largest, cells, fine, coarse], 1), self.rings(radial)

    @staticmethod
    def _count(evidence: Tensor, inside: Tensor) -> Tensor:
        """How many places answer, on a log scale: (N, detectors)."""
        return torch.log1p((torch.sigmoid(4.0 * evidence - 5.0) * inside).sum((2, 3)))

    def fast(self, shared: Tensor, rings: Tensor) -> dict[str, Tensor]:
        """Raw outputs (N, head.outputs) of the fast exit."""
        out = {}
        for head in self.heads:
            if head.exit == "fast":
                x = shared if head.name == "blank" else torch.cat([shared, rings], 1)
                out[head.name] = self.outs[head.name](self.fast_trunks[head.name](x))
        return out

    def full(self, shared: Tensor, rings: Tensor, tiles: Tensor) -> dict[str, Tensor]:
        """Raw outputs of the full exit.

        Args:
            tiles: (N, tiles, 2, P, P) float32: square root of counts, validity.
        """
        n, places = tiles.shape[:2]
        x = tiles.flatten(0, 1)  # (N * tiles, 2, P, P)
        used = (x[:, 1].amax((1, 2)) > 0).float().view(n, places, 1)
        for conv in self.tile_stages:
            x = nnf.relu(conv(x))
        per_tile = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1).view(n, places, -1)
        per_tile = per_tile * used
        mean = per_tile.sum(1) / used.sum(1).clamp(min=1.0)
        x = self.trunk(torch.cat([shared, rings, mean, per_tile.amax(1)], 1))
        return {h.name: self.outs[h.name](x) for h in self.heads if h.exit == "full"}

    def forward(
        self, overview: Tensor, radial: Tensor, bin_factor: Tensor, tiles: Tensor
    ) -> Mapping[str, Tensor]:
        """Both exits at once, for training."""
        shared, rings = self.features(overview, radial, bin_factor)
        return {**self.fast(shared, rings), **self.full(shared, rings, tiles)}

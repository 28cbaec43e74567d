"""The learned part of the fast exit on a CPU: the numbers of ``TriageNet.fast``, compiled.

``TriageNet`` is the description and runs on any device; this is what a CPU runs on every frame.
The 512 candidates of a frame pass four small networks of 39 numbers each, and for matrices of
that size calling a library costs as much as the arithmetic, so here one frame is a few calls.
There are two programs of them: ``_fast_exit.c``, in vectors, where it was built, and its twin
below. All agree to rounding, and a NaN that comes in comes out.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numba as nb
import numpy as np
from numpy.typing import NDArray

from triage.nets.triagenet import (
    CONTEXT,
    LEAST,
    LEAST_DETERMINANT,
    LOOKS,
    MEMBERS,
    PEAKS,
    RING_WIDTHS,
    RINGS,
    SIGMA_SCALE,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from triage.nets.triagenet import TriageNet

__all__ = ["LANES", "FastAnswer", "FastExit", "ring_planes"]

_Floats = NDArray[np.float32]

_compiled: Any
try:
    _compiled = importlib.import_module("triage.nets._fast_exit")
except ImportError:
    _compiled = None

LANES: tuple[int, ...] = (*(_compiled.LANES if _compiled else ()), 0)
"""Widths of vector that this processor has a compiled program for, widest first; 0 is the twin."""

_ROWS = 8
"""Rows that one pass of the twin's product adds up; weights are padded with zeros to a multiple."""
_PADDED = 16
"""Outputs of the compiled program's narrow layers, likewise."""
_REACH = 12
"""Bins to each side that make the continuum of the radial view."""
_PEAKS = np.array(PEAKS)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FastAnswer:
    """What the fast exit says of one frame, and what it hands to the full exit.

    Attributes:
        raw: (head.outputs,) float32 by head; beside them ``members``, each one's answer to blank,
            and ``strangeness``.
        counts: (105,) float32, standardised.
    """

    raw: dict[str, _Floats]
    counts: _Floats


class FastExit:
    """The weights of a network's fast exit, laid out for this module's kernels.

    A call writes to nothing that another one reads: any number of threads may share one.

    Args:
        lanes: one of :data:`LANES`.
    """

    def __init__(self, net: TriageNet, *, lanes: int = LANES[0]) -> None:
        self._lanes = lanes
        self._mean, self._scale = _values(net.counts_mean), _values(net.counts_scale)
        rings = net.rings
        convolutions = [_convolution(each) for each in (rings.first, rings.second, rings.third)]
        flat, flat_bias = _values(rings.flat.weight), _values(rings.flat.bias)
        self._answers: dict[str, tuple[Any, ...]] = {}
        self._looks: dict[str, tuple[Any, ...]] = {}
        for name, panel in net.panels.items():
            members = [cast("Any", member) for member in cast("nn.ModuleList", panel)]
            self._answers[name] = tuple(
                each for layer in (0, 3, 5) for each in _stacked([m.answer[layer] for m in members])
            )
            if members[0].look is not None:
                first, bias = _stacked([m.look[0] for m in members])
                own, context = first[:, :, :-CONTEXT], first[:, :, -CONTEXT:].copy()
                self._looks[name] = (own, context, bias, *_stacked([m.look[2] for m in members]))
        self._unusual = _values(net.unusual)
        self._outputs = {name: each[-1].shape[1] for name, each in self._answers.items()}
        if lanes:
            # Inputs first, so that a vector holds the weights of several outputs.
            convolutions = [(_turned(w), bias) for w, bias in convolutions]
            flat = _turned(flat)
            for name, (a, b, c, d, e, f) in self._answers.items():
                last = _padded(_turned(e), _PADDED), _padded(f, _PADDED)
                self._answers[name] = (_turned(a), b, _turned(c), d, *last)
            for name, (a, b, c, d, e) in self._looks.items():
                self._looks[name] = (
                    _turned(a), b, c, _padded(_turned(d), _PADDED), _padded(e, _PADDED)
                )  # fmt: skip
        else:
            convolutions = [(_padded(w, _ROWS), bias) for w, bias in convolutions]
            for name, (a, *others) in self._looks.items():
                self._looks[name] = (_padded(a, _ROWS), *others)
        # Of the heads whose members look, each one's answer counts by itself.
        self._alone = {
            name: [tuple(each[m : m + 1] for each in self._answers[name]) for m in range(MEMBERS)]
            for name in self._looks
        }
        self._rings: tuple[Any, ...] = (
            *(each for pair in convolutions for each in pair), flat, flat_bias
        )  # fmt: skip

    def __call__(self, counts: _Floats, candidates: _Floats, radial: _Floats) -> FastAnswer:
        """The answer for one frame.

        Args:
            counts: (105,) float32, the evidence's.
            candidates: (K, 39) float32, contiguous.
            radial: (5, sectors, bins) float32, contiguous.
        """
        counts = (counts - self._mean) / self._scale
        last = counts[-CONTEXT:]
        rings = self._rings_of(radial)
        raw = {}
        for name in self._answers:
            if name in self._looks:
                seen = self._seen(name, candidates, last)
                alone = [
                    self._answer(name, counts, seen[m : m + 1], weights)
                    for m, weights in enumerate(self._alone[name])
                ]
                raw["members"] = np.concatenate(alone)
                raw[name] = np.mean(alone, 0)
            else:
                raw[name] = self._answer(name, last, rings[None], self._answers[name])
        away = counts @ self._unusual
        raw["strangeness"] = np.array([away @ away])
        return FastAnswer(raw=raw, counts=counts)

    def _rings_of(self, radial: _Floats) -> _Floats:
        if not self._lanes:
            return _rings(radial, *self._rings)
        rings = np.empty(RINGS, np.float32)
        _compiled.rings(radial, *self._rings, rings, radial.shape[1], self._lanes)
        return rings

    def _seen(self, name: str, candidates: _Floats, last: _Floats) -> _Floats:
        """(members, 24): how many candidates each look says yes to, and how many surely."""
        looks = self._looks[name]
        if not self._lanes:
            return _seen(candidates, last, _PEAKS, LEAST, *looks)
        seen = np.empty((len(looks[0]), 2 * LOOKS), np.float32)
        _compiled.seen(candidates, last, *looks, seen, LEAST, self._lanes)
        return seen

    def _answer(
        self, name: str, known: _Floats, more: _Floats, weights: tuple[Any, ...]
    ) -> _Floats:
        """(head.outputs,): mean over the members; ``more`` has a row for each, or one for all."""
        if not self._lanes:
            return _answer(known, more, *weights)
        mean = np.empty(self._outputs[name], np.float32)
        _compiled.answer(known, more, *weights, mean, self._lanes)
        return mean


def _values(tensor: torch.Tensor) -> _Floats:
    values: _Floats = tensor.detach().float().cpu().contiguous().numpy()
    return values


def _stacked(layers: list[Any]) -> tuple[_Floats, _Floats]:
    """Weights (members, outputs, inputs) and biases (members, outputs) of linear layers."""
    return (
        np.stack([_values(layer.weight) for layer in layers]),
        np.stack([_values(layer.bias) for layer in layers]),
    )


def _convolution(layer: nn.Conv1d) -> tuple[_Floats, _Floats]:
    """Weights (outputs, inputs * taps) and biases (outputs,)."""
    weight = _values(layer.weight)
    return weight.reshape(weight.shape[0], -1), _values(cast("torch.Tensor", layer.bias))


def _turned(weights: _Floats) -> _Floats:
    """With the last two axes in each other's place."""
    return weights.swapaxes(-1, -2).copy()


def _padded(weights: _Floats, multiple: int) -> _Floats:
    """With zeros on the last axis up to a multiple."""
    missing = -weights.shape[-1] % multiple
    return np.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, missing)])


_FAST: Any = {"reassoc", "contract", "nsz"}
"""No flag that would lose a NaN. For the same reason bounds are compared so that one passes."""


@nb.njit(cache=True, nogil=True, fastmath=_FAST)
def _product(
    weights: NDArray[np.float32], rows: NDArray[np.float32], first: float, out: NDArray[np.float32]
) -> None:
    # out[k] = first + sum over r of weights[r] rows[r, k]; the rows are a multiple of eight.
    for k in range(out.size):
        out[k] = first
    for r in range(0, rows.shape[0], 8):
        a, b, c, d = weights[r], weights[r + 1], weights[r + 2], weights[r + 3]
        e, f, g, h = weights[r + 4], weights[r + 5], weights[r + 6], weights[r + 7]
        ra, rb, rc, rd = rows[r], rows[r + 1], rows[r + 2], rows[r + 3]
        re, rf, rg, rh = rows[r + 4], rows[r + 5], rows[r + 6], rows[r + 7]
        for k in range(out.size):
            out[k] += (
                a * ra[k] + b * rb[k] + c * rc[k] + d * rd[k]
                + e * re[k] + f * rf[k] + g * rg[k] + h * rh[k]
            )  # fmt: skip


@nb.njit(cache=True, nogil=True, fastmath=_FAST)
def _rectify(x: NDArray[np.float32]) -> None:
    for i in range(x.size):
        x[i] = np.float32(0.0) if x[i] < 0 else x[i]


@nb.njit(cache=True, nogil=True, fastmath=_FAST)
def _sigmoid(x: NDArray[np.float32]) -> None:
    # exp(y) = 2^n exp(r) with |r| <= ln 2 / 2 and the Taylor polynomial of degree 7, whose rest
    # is below half a unit in the last place. Written out so that it runs on vectors.
    f = np.float32
    power = np.empty(x.size, np.int32)
    for i in range(x.size):
        y = -x[i]
        y = f(-87.0) if y < f(-87.0) else y
        y = f(87.0) if y > f(87.0) else y
        n = np.floor(y * f(1.4426950408889634) + f(0.5))
        # ln 2 in two parts: the first has few bits, and n times it is exact.
        r = (y - n * f(0.693359375)) + n * f(2.12194440e-4)
        p = f(1.0 / 5040.0)
        p = p * r + f(1.0 / 720.0)
        p = p * r + f(1.0 / 120.0)
        p = p * r + f(1.0 / 24.0)
        p = p * r + f(1.0 / 6.0)
        p = p * r + f(0.5)
        p = p * r + f(1.0)
        x[i] = p * r + f(1.0)
        power[i] = (np.int32(n) + np.int32(127)) << np.int32(23)
    scale = power.view(np.float32)
    for i in range(x.size):
        x[i] = f(1.0) / (f(1.0) + x[i] * scale[i])


@nb.njit(cache=True, nogil=True, fastmath=_FAST)
def _seen(
    candidates: NDArray[np.float32],
    last: NDArray[np.float32],
    peaks: NDArray[np.int64],
    least: float,
    own: NDArray[np.float32],
    context: NDArray[np.float32],
    bias: NDArray[np.float32],
    second: NDArray[np.float32],
    second_bias: NDArray[np.float32],
) -> NDArray[np.float32]:
    # (members, 2 looks).
    f = np.float32
    number, width = candidates.shape
    members, hidden_size, rows_size = own.shape
    looks = second.shape[1]
    rows = np.zeros((rows_size, number), f)
    for k in range(number):
        for j in range(width):
            rows[j, k] = candidates[k, j]
    weight = np.empty(number, f)
    for k in range(number):
        peak = rows[peaks[0], k]
        for j in peaks[1:]:
            peak = rows[j, k] if rows[j, k] > peak else peak
        w = (peak - f(least)) / f(0.2)
        w = f(0.0) if w < 0 else w
        weight[k] = f(1.0) if w > 1 else w
    hidden = np.empty((hidden_size, number), f)
    yes = np.empty(number, f)
    out = np.empty((members, 2 * looks), f)
    for m in range(members):
        for h in range(hidden_size):
            first = bias[m, h]
            for j in range(last.size):
                first += context[m, h, j] * last[j]
            _product(own[m, h], rows, first, hidden[h])
        _rectify(hidden.ravel())
        for o in range(looks):
            _product(second[m, o], hidden, second_bias[m, o], yes)
            _sigmoid(yes)
            total, sure = f(0.0), f(0.0)
            for k in range(number):
                one = yes[k] * weight[k]
                total += one
                sure += one * one * one
            out[m, o], out[m, looks + o] = np.log1p(total), np.log1p(sure)
    return out


@nb.njit(cache=True, nogil=True, fastmath=_FAST)
def _linear(
    x: NDArray[np.float32], weights: NDArray[np.float32], bias: NDArray[np.float32]
) -> NDArray[np.float32]:
    out = np.empty(bias.size, np.float32)
    for o in range(bias.size):
        total = bias[o]
        for i in range(x.size):
            total += weights[o, i] * x[i]
        out[o] = total
    return out


@nb.njit(cache=True, nogil=True, fastmath=_FAST)
def _answer(
    known: NDArray[np.float32],
    more: NDArray[np.float32],
    first: NDArray[np.float32],
    first_bias: NDArray[np.float32],
    second: NDArray[np.float32],
    second_bias: NDArray[np.float32],
    third: NDArray[np.float32],
    third_bias: NDArray[np.float32],
) -> NDArray[np.float32]:
    members = first.shape[0]
    mean = np.zeros(third.shape[1], np.float32)
    x = np.empty(first.shape[2], np.float32)
    x[: known.size] = known
    for m in range(members):
        x[known.size :] = more[m % more.shape[0]]
        h = _linear(x, first[m], first_bias[m])
        _rectify(h)
        h = _linear(h, second[m], second_bias[m])
        _rectify(h)
        mean += _linear(h, third[m], third_bias[m])
    return mean / np.float32(members)


@nb.njit(cache=True, nogil=True, fastmath=_FAST)
def _convolved(
    x: NDArray[np.float32], weights: NDArray[np.float32], bias: NDArray[np.float32], stride: int
) -> NDArray[np.float32]:
    # Five taps, two zeros beyond each end, rectified: (channels, bins) -> (outputs, bins / stride).
    channels, bins = x.shape
    size = bins // stride
    rows = np.zeros((weights.shape[1], size), np.float32)
    for c in range(channels):
        for tap in range(5):
            row, before = rows[5 * c + tap], 2 - tap
            first = (before + stride - 1) // stride if before > 0 else 0
            for i in range(first, min(size, (bins - 1 + before) // stride + 1)):
                row[i] = x[c, i * stride - before]
    out = np.empty((bias.size, size), np.float32)
    for o in range(bias.size):
        _product(weights[o], rows, bias[o], out[o])
    _rectify(out.ravel())
    return out


@nb.njit(cache=True, nogil=True, fastmath=_FAST)
def _over_parabola(
    mean: NDArray[np.float32], pixels: NDArray[np.float32], core: int, reach: int
) -> NDArray[np.float32]:
    # (3, bins) of one sector: excess, 1 over its variance and mean of the window, as the
    # description's function of that name.
    f = np.float32
    bins = mean.size
    found = np.zeros((3, bins), f)
    counts = mean * pixels
    # Of the bins beside the core five moments of the pixels and three of the counts; of those in
    # it three and one. Bin by bin in the inner loops, so that they run on vectors.
    sums = np.zeros((12, bins), f)
    for j in range(-reach, reach + 1):
        x = f(j) / f(reach)
        xx, first, last = x * x, max(0, -j), min(bins, bins - j)
        there, rows = pixels[first + j : last + j], sums[:, first:last]
        of = counts[first + j : last + j]
        if abs(j) <= core:
            for i in range(last - first):
                rows[8, i] += there[i]
                rows[9, i] += there[i] * x
                rows[10, i] += there[i] * xx
                rows[11, i] += of[i]
        else:
            for i in range(last - first):
                rows[0, i] += there[i]
                rows[1, i] += there[i] * x
                rows[2, i] += there[i] * xx
                rows[3, i] += there[i] * (xx * x)
                rows[4, i] += there[i] * (xx * xx)
                rows[5, i] += of[i]
                rows[6, i] += of[i] * x
                rows[7, i] += of[i] * xx
    for i in range(bins):
        beside, a1, a2, a3, a4 = sums[0, i], sums[1, i], sums[2, i], sums[3, i], sums[4, i]
        y0, y1, y2 = sums[5, i], sums[6, i], sums[7, i]
        inside, c1, c2, core_counts = sums[8, i], sums[9, i], sums[10, i], sums[11, i]
        if beside <= 0 or inside <= 0:
            continue
        level = (y0 + core_counts + f(1.0)) / (beside + inside + f(1.0))
        beside = f(1e-9) if beside < f(1e-9) else beside
        inside = f(1e-9) if inside < f(1e-9) else inside
        a1, a2, a3, a4 = a1 / beside, a2 / beside, a3 / beside, a4 / beside
        c1, c2 = c1 / inside, c2 / inside
        m00, m01, m02 = a2 * a4 - a3 * a3, a2 * a3 - a1 * a4, a1 * a3 - a2 * a2
        m11, m12, m22 = a4 - a2 * a2, a1 * a2 - a3, a2 - a1 * a1
        determinant = m00 + a1 * m01 + a2 * m02
        if determinant <= f(LEAST_DETERMINANT):
            continue
        g0 = (m00 + m01 * c1 + m02 * c2) / determinant
        g1 = (m01 + m11 * c1 + m12 * c2) / determinant
        g2 = (m02 + m12 * c1 + m22 * c2) / determinant
        leverage = (g0 + g1 * c1 + g2 * c2) / beside
        leverage = f(0.0) if leverage < 0 else leverage
        variance = level * (f(1.0) / inside + leverage)
        variance = f(1e-20) if variance < f(1e-20) else variance
        found[0, i] = core_counts / inside - (g0 * y0 + g1 * y1 + g2 * y2) / beside
        found[1, i] = f(1.0) / variance
        found[2, i] = level
    return found


@nb.njit(cache=True, nogil=True, fastmath=_FAST)
def _in_sigma(
    mean: NDArray[np.float32], pixels: NDArray[np.float32], out: NDArray[np.float32]
) -> None:
    # (9, bins) of all sectors, as the description's method of that name.
    f = np.float32
    sectors, bins = mean.shape
    scatter = f(1.0)
    found = np.empty((sectors, 3, bins), f)
    together, disagreement = np.empty(bins, f), np.empty(bins, f)
    weights, under = np.empty(bins, f), np.empty(bins, f)
    for number in range(len(RING_WIDTHS)):
        core, reach = RING_WIDTHS[number]
        for s in range(sectors):
            found[s] = _over_parabola(mean[s], pixels[s], core, reach)
        seen_twice = np.zeros(bins, np.bool_)
        for i in range(bins):
            there, total, summed, level = f(0.0), f(0.0), f(0.0), f(0.0)
            for s in range(sectors):
                there += f(1.0) if found[s, 1, i] > 0 else f(0.0)
                total += found[s, 1, i]
                summed += found[s, 1, i] * found[s, 0, i]
                level += found[s, 1, i] * found[s, 2, i]
            weights[i] = f(1e-20) if total < f(1e-20) else total
            under[i] = f(1e-20) if level < f(1e-20) else level
            together[i] = summed
            chi2 = f(0.0)
            for s in range(sectors):
                away = found[s, 0, i] - summed / weights[i]
                chi2 += found[s, 1, i] * away * away
            disagreement[i] = chi2 / (there - f(1.0) if there > 2 else f(1.0))
            seen_twice[i] = there >= 2
        if number == 0 and seen_twice.any():
            ordered = np.sort(disagreement[seen_twice])
            median = f(1.1) * ordered[(ordered.size - 1) // 2]
            scatter = f(1.0) if median < 1 else median
        for i in range(bins):
            sigma = together[i] / np.sqrt(weights[i]) / np.sqrt(scatter)
            ratio = f(4.0) * together[i] / under[i]
            ratio = f(-4.0) if ratio < f(-4.0) else ratio
            out[3 * number, i] = f(SIGMA_SCALE) * sigma / np.sqrt(f(1.0) + abs(sigma))
            out[3 * number + 1, i] = np.log1p(disagreement[i] / scatter)
            out[3 * number + 2, i] = f(8.0) if ratio > f(8.0) else ratio


@nb.njit(cache=True, nogil=True, fastmath=_FAST)
def _rings(
    radial: NDArray[np.float32],
    first: NDArray[np.float32],
    first_bias: NDArray[np.float32],
    second: NDArray[np.float32],
    second_bias: NDArray[np.float32],
    third: NDArray[np.float32],
    third_bias: NDArray[np.float32],
    flat: NDArray[np.float32],
    flat_bias: NDArray[np.float32],
) -> NDArray[np.float32]:
    # (64,) from the radial view, as ``TriageNet.rings`` describes.
    x = ring_planes(radial)
    x = _convolved(x, first, first_bias, 1)
    x = _convolved(x, second, second_bias, 2)
    x = _convolved(x, third, third_bias, 2)
    rings = _linear(x.ravel(), flat, flat_bias)
    _rectify(rings)
    return rings


@nb.njit(cache=True, nogil=True, fastmath=_FAST)
def ring_planes(radial: NDArray[np.float32]) -> NDArray[np.float32]:
    """(RING_PLANES, bins) float32 of a radial view (5, sectors, bins) float32: by what rings are
    told, as ``TriageNet.rings`` describes."""
    f = np.float32
    _, sectors, bins = radial.shape
    reach = _REACH
    ratio = np.zeros((sectors, bins), f)
    valid = np.zeros((sectors, bins), f)
    for s in range(sectors):
        for i in range(bins):
            valid[s, i] = f(1.0) if radial[1, s, i] > f(0.3) else f(0.0)
            ratio[s, i] = np.log(radial[0, s, i] + f(1e-3)) * valid[s, i]
        level, near = 0.0, 0.0
        smooth = np.empty(bins, f)
        for i in range(-reach, bins):
            if i + reach < bins:
                level += ratio[s, i + reach]
                near += valid[s, i + reach]
            if i - reach - 1 >= 0:
                level -= ratio[s, i - reach - 1]
                near -= valid[s, i - reach - 1]
            if i >= 0:
                smooth[i] = level / max(near, 1e-3 * (2 * reach + 1))
        for i in range(bins):
            r = ratio[s, i] - smooth[i] * valid[s, i]
            r = f(-2.0) if r < f(-2.0) else r
            ratio[s, i] = f(3.0) if r > f(3.0) else r
    x, pixels = np.empty((6 + 6 * len(RING_WIDTHS), bins), f), radial[3] * valid
    _in_sigma(radial[0], pixels, x[6 : 6 + 3 * len(RING_WIDTHS)])
    _in_sigma(radial[4], pixels, x[6 + 3 * len(RING_WIDTHS) :])
    for i in range(bins):
        there, total, excluded = f(0.0), f(0.0), f(0.0)
        brightest = ratio[0, i]
        for s in range(sectors):
            there += valid[s, i]
            total += ratio[s, i]
            excluded += radial[2, s, i] * valid[s, i]
            brightest = ratio[s, i] if ratio[s, i] > brightest else brightest
        seen = there if there > 1 else f(1.0)
        mean = total / seen
        square = f(0.0)
        for s in range(sectors):
            away = (ratio[s, i] - mean) * valid[s, i]
            square += away * away
        spread = np.sqrt(square / seen + f(1e-6))
        agreed = mean * np.sqrt(seen) / spread
        x[0, i], x[1, i], x[2, i] = f(4.0) * mean, f(4.0) * spread, there / f(sectors)
        x[3, i], x[4, i] = f(4.0) * excluded / seen, f(2.0) * brightest
        x[5, i] = agreed / np.sqrt(f(1.0) + abs(agreed))
    return x

"""What turns raw outputs into probabilities, fitted on frames the weights were not learned from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from torch import Tensor

from triage.nets.triagenet import Head
from triage.training.batches import levels_of
from triage.training.dataset import Example

__all__ = ["calibrated"]


def calibrated(
    heads: Sequence[Head],
    outputs: Mapping[str, NDArray[np.float64]],
    examples: Sequence[Example],
) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """Temperature and bias of every binary and ordinal head with labels of both kinds.

    Of an ordinal head's cumulative answers one pair serves all. A head that answers what another
    one has answered is fitted beside it.

    Args:
        heads: those of the fast exit first.

    Returns:
        The pairs by head, and by those that have another beside them the weight of its logit.
    """
    found: dict[str, tuple[float, float]] = {}
    weights: dict[str, float] = {}
    for head in heads:
        if head.kind == "regression":
            continue
        labels, raw = levels_of(examples, head), outputs[head.name]
        known = np.isfinite(labels) & np.isfinite(raw).all(1)
        if head.kind == "ordinal":
            known &= (labels >= head.first) & (labels <= head.first + head.levels - 1)
        steps = np.arange(1, head.outputs + 1) + head.first - 0.5
        above = (labels[known, None] > steps).astype(np.float64)
        if np.unique(above).size != 2:
            continue
        if head.answers in found:
            temperature, bias = found[head.answers]
            beside = outputs[head.answers][known, 0] / temperature + bias
            found[head.name], weights[head.name] = _fitted(raw[known, 0], above[:, 0], beside)
        else:
            found[head.name], _ = _fitted(raw[known].ravel(), above.ravel())
    return found, weights


def _fitted(
    logits: NDArray[np.float64],
    labels: NDArray[np.float64],
    beside: NDArray[np.float64] | None = None,
) -> tuple[tuple[float, float], float]:
    """Temperature, bias and weight that make sigmoid(logit / t + b + w beside) fit best."""
    x, y = torch.from_numpy(logits), torch.from_numpy(labels)
    other = torch.zeros_like(x) if beside is None else torch.from_numpy(beside)
    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scale, bias, weight], max_iter=100)

    def closure() -> Tensor:
        optimizer.zero_grad()
        # What speaks for a label in one exit never speaks against it in both.
        logit = x * torch.exp(-scale) + bias + other * weight.clamp(min=0.0)
        loss = nnf.binary_cross_entropy_with_logits(logit, y)
        loss = loss + 1e-3 * (scale**2 + bias**2)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    fitted = float(torch.exp(scale.detach())), float(bias.detach())
    return fitted, 0.0 if beside is None else max(0.0, float(weight.detach()))

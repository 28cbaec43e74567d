"""What turns raw outputs into probabilities, fitted on frames the weights were not learned from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from torch import Tensor

from triage.nets.triagenet import Head
from triage.training.batches import labels_of
from triage.training.dataset import Example

__all__ = ["calibrated"]


def calibrated(
    heads: Sequence[Head],
    outputs: Mapping[str, NDArray[np.float64]],
    examples: Sequence[Example],
) -> dict[str, tuple[float, float]]:
    """Temperature and bias of every binary and ordinal head with labels of both kinds.

    Of an ordinal head's cumulative answers one pair serves all.
    """
    found = {}
    for head in heads:
        if head.kind == "regression":
            continue
        labels, raw = labels_of(examples, head.name), outputs[head.name]
        known = np.isfinite(labels) & np.isfinite(raw).all(1)
        if head.kind == "ordinal":
            known &= (labels >= head.first) & (labels <= head.first + head.levels - 1)
        steps = np.arange(1, head.outputs + 1) + head.first - 0.5
        above = labels[known, None] > steps
        if np.unique(above).size == 2:
            found[head.name] = _temperature(raw[known].ravel(), above.ravel().astype(np.float64))
    return found


def _temperature(logits: NDArray[np.float64], labels: NDArray[np.float64]) -> tuple[float, float]:
    """Temperature and bias that make sigmoid(logit / t + b) fit the labels best."""
    x, y = torch.from_numpy(logits), torch.from_numpy(labels)
    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scale, bias], max_iter=100)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nnf.binary_cross_entropy_with_logits(x * torch.exp(-scale) + bias, y)
        loss = loss + 1e-3 * (scale**2 + bias**2)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return float(torch.exp(scale.detach())), float(bias.detach())

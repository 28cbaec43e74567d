"""What turns raw outputs into probabilities, fitted on frames the weights were not learned from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from torch import Tensor

from triage.nets.model import MOST_WEIGHT
from triage.nets.scorer import said_beside
from triage.nets.triagenet import Head
from triage.training.batches import levels_of
from triage.training.dataset import Example

__all__ = ["calibrated"]


def calibrated(
    heads: Sequence[Head],
    outputs: Mapping[str, NDArray[np.float64]],
    examples: Sequence[Example],
) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, ...]]]:
    """Temperature and bias of every binary and ordinal head with labels of both kinds.

    Of an ordinal head's cumulative answers one pair serves all. A head that has others beside it
    is fitted with them, once they are.

    Returns:
        The pairs by head, and by those that have others beside them the weights of their logits,
        in the order of ``Head.beside``; 0 for one that could not be fitted itself.
    """
    found: dict[str, tuple[float, float]] = {}
    weights: dict[str, tuple[float, ...]] = {}
    by_name = {head.name: head for head in heads}
    for head in sorted(heads, key=lambda head: bool(head.beside)):
        if head.kind == "regression":
            continue
        labels, raw = levels_of(examples, head), outputs[head.name]
        known = np.isfinite(labels) & np.isfinite(raw).all(1)
        others = [each for each in head.beside if each.head in found]
        for each in others:
            known &= np.isfinite(outputs[each.head]).all(1)
        if head.kind == "ordinal":
            known &= (labels >= head.first) & (labels <= head.first + head.levels - 1)
        steps = np.arange(1, head.outputs + 1) + head.first - 0.5
        above = (labels[known, None] > steps).astype(np.float64)
        if np.unique(above).size != 2:
            continue
        if head.beside:
            columns = [
                said_beside(by_name[each.head], each.step, outputs[each.head][known], found)
                for each in others
            ]
            said = np.stack(columns, 1) if columns else None
            found[head.name], fitted = _fitted(raw[known, 0], above[:, 0], said)
            of_others = dict(zip(others, fitted, strict=True))
            weights[head.name] = tuple(of_others.get(each, 0.0) for each in head.beside)
        else:
            found[head.name], _ = _fitted(raw[known].ravel(), above.ravel())
    return found, weights


def _fitted(
    logits: NDArray[np.float64],
    labels: NDArray[np.float64],
    beside: NDArray[np.float64] | None = None,
) -> tuple[tuple[float, float], tuple[float, ...]]:
    """Temperature, bias and weights that make sigmoid(logit / t + b + w . beside) fit best.

    Args:
        beside: (n, others), those logits; without them there are no weights.
    """
    x, y = torch.from_numpy(logits), torch.from_numpy(labels)
    others = x.new_zeros((len(x), 0)) if beside is None else torch.from_numpy(beside)
    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    weights = torch.zeros(others.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scale, bias, weights], max_iter=100)

    def closure() -> Tensor:
        optimizer.zero_grad()
        # What speaks for a label beside it never speaks against it in both.
        logit = x * torch.exp(-scale) + bias + others @ weights.clamp(0.0, MOST_WEIGHT)
        loss = nnf.binary_cross_entropy_with_logits(logit, y)
        loss = loss + 1e-3 * (scale**2 + bias**2)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    fitted = float(torch.exp(scale.detach())), float(bias.detach())
    return fitted, tuple(weights.detach().clamp(0.0, MOST_WEIGHT).tolist())

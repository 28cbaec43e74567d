"""Training by several processes, as torchrun starts them; one that was started alone is all of it.

Each process holds a part of the frames and every weight. After each step their gradients are
averaged, so weights stay the same everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Processes"]

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those of one training.

    Attributes:
        rank: its number, from 0; the first one writes files and speaks.
        number: how many there are.
        device: where its weights and frames lie.
    """

    rank: int = 0
    number: int = 1
    device: torch.device = _CPU

    @classmethod
    def joined(cls) -> Processes:
        """As the environment of torchrun says: NCCL where each process has a CUDA device."""
        cuda = torch.cuda.is_available()
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls(device=torch.device("cuda") if cuda else _CPU)
        device = _CPU
        if cuda:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def leave(self) -> None:
        """End the connection to the others."""
        if self.number > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this one writes and speaks."""
        return self.rank == 0

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite ``tensors`` everywhere with those of the first process."""
        if self.number > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def average(self, parameters: Sequence[Tensor]) -> None:
        """Average the gradients; a process that has none adds zeros."""
        if self.number == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        dist.all_reduce(flat)
        flat /= self.number
        at = 0
        for parameter in parameters:
            grad = parameter.grad
            if grad is not None:
                grad.copy_(flat[at : at + grad.numel()].view_as(grad))
                at += grad.numel()

    def total(self, value: int) -> int:
        """Sum over the processes."""
        if self.number == 1:
            return value
        tensor = torch.tensor([value], device=self.device)
        dist.all_reduce(tensor)
        return int(tensor.item())

    def from_first(self, value: float) -> float:
        """What the first process says."""
        if self.number == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(tensor, 0)
        return float(tensor.item())

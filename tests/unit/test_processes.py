"""Training by several processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os

import torch
from triage.training.processes import Processes

processes = Processes.joined()
weight = torch.nn.Parameter(torch.full((2,), float(processes.rank)))
processes.share([weight.data])
# The first has no gradient, the second one of 4: the average is 2.
if processes.rank == 1:
    weight.grad = torch.full((2,), 4.0)
processes.average([weight])
said = [*weight.tolist(), *weight.grad.tolist(), processes.total(processes.rank + 1),
        processes.from_first(float(processes.rank + 7))]
# In one piece: both write to one pipe.
os.write(1, f"SAID {processes.rank} {said}\\n".encode())
processes.leave()
"""


def test_two_processes_share_weights_and_average_gradients(tmp_path: Path) -> None:
    """Under torchrun with gloo: weights of the first, mean gradient, sum, and the first's word."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    answer = subprocess.run(
        [*command, str(program)], capture_output=True, text=True, check=False, timeout=280
    )
    assert answer.returncode == 0, answer.stderr
    lines = sorted(line for line in answer.stdout.splitlines() if line.startswith("SAID"))
    assert lines == [f"SAID {rank} [0.0, 0.0, 2.0, 2.0, 3, 7.0]" for rank in (0, 1)]

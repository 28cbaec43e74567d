"""``triage train``: labelled shards in, a model with a card out."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["train"]


def train(
    shards: Annotated[Path, typer.Argument(help="Folder of labelled shards.")],
    out: Annotated[Path, typer.Option(help="Folder for weights.safetensors and card.json.")],
    test: Annotated[
        Path | None, typer.Option(help="Shards of other crystals and detectors, used once.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 12,
    seed: Annotated[int, typer.Option()] = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    name: Annotated[str, typer.Option(help="First part of the model_id.")] = "triagenet",
) -> None:
    """Train, calibrate, set the veto threshold, and validate on --test.

    Interrupted runs resume from the last finished epoch in --out.
    """
    from triage.training.train import train as run_training

    model_id = run_training(
        shards,
        out,
        test=test,
        epochs=epochs,
        seed=seed,
        batch_size=batch_size,
        threads=threads,
        name=name,
        command=shlex.join(["triage", *sys.argv[1:]]),
        say=print,
    )
    print(f"{model_id}: {out / 'card.json'}")

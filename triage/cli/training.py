"""``triage train``, ``evaluate``, ``quantize`` and ``explain``: a model, its worth, its reasons."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from triage.errors import ConfigError

__all__ = ["evaluate", "explain", "quantize", "train"]


def train(
    shards: Annotated[Path, typer.Argument(help="Folder of labelled shards.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for weights.safetensors and card.json.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Shards for temperatures and threshold; without them every fifth training shard."
        ),
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help="Shards of other crystals and detectors, used once.")
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option("--from", help="Model folder whose weights to begin with, where they fit."),
    ] = None,
    search: Annotated[
        int, typer.Option(min=0, help="Trials of other settings first, by Optuna.")
    ] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Most passes of the full exit.")] = 60,
    fast_epochs: Annotated[int, typer.Option(min=1, help="Most passes of the fast exit.")] = 40,
    convolution_epochs: Annotated[
        int,
        typer.Option(
            min=0,
            help="Passes of convolutions over overview and tiles, minutes each; 0 = none of them.",
        ),
    ] = 0,
    copies: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Turned, shifted, thinned ... copies of whole frames, for each frame so many on "
            "average; preparing them takes about twice as long as frames.",
        ),
    ] = 0.0,
    learning_rate: Annotated[float, typer.Option(min=1e-6)] = 2e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Frames a step, of each process.")] = 64,
    seed: Annotated[int, typer.Option()] = 0,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    name: Annotated[str, typer.Option(help="First part of the model_id.")] = "triagenet",
    describe: Annotated[
        bool, typer.Option("--describe", help="Say what the shards hold, and train nothing.")
    ] = False,
) -> None:
    """Train, calibrate, set the veto threshold, and validate on --test.

    Interrupted runs resume from the last finished epoch in --out. Each exit stops when its figure
    gets no better. Under torchrun (torchrun --nproc-per-node 2 -m triage train ...) the processes
    share the frames.
    """
    if describe:
        from triage.training.dataset import shard_paths
        from triage.training.describe import described

        print(described(shard_paths(shards)))
        return
    if out is None:
        raise ConfigError("--out is missing: expected the folder for the model, or --describe")
    from triage.training.train import Settings
    from triage.training.train import train as run_training

    model_id = run_training(
        shards,
        out,
        settings=Settings(
            epochs=epochs,
            fast_epochs=fast_epochs,
            convolution_epochs=convolution_epochs,
            copies=copies,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
        ),
        calibration=calibration,
        test=test,
        start=start,
        search=search,
        threads=threads,
        name=name,
        command=shlex.join(["triage", *sys.argv[1:]]),
        say=print,
    )
    if model_id:
        print(f"{model_id}: {out / 'card.json'}")


def evaluate(
    out: Annotated[Path, typer.Option(help="Folder for report.md, report.json and pictures.")],
    shards: Annotated[
        Path | None, typer.Argument(help="Labelled shards that no training saw.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Model folder; without it the included model.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Other shards on which thresholds are fixed; else the model's are used."),
    ] = None,
    real: Annotated[
        Path | None, typer.Option(help="Folder of real frames with a manifest.csv.")
    ] = None,
    baselines_from: Annotated[
        Path | None, typer.Option(help="Shards that the baselines learn from.")
    ] = None,
    baseline_shards: Annotated[
        int, typer.Option(min=0, help="Shards that the baselines answer for, drawn at random.")
    ] = 64,
    record: Annotated[
        Path | None, typer.Option(help="Also write the report's JSON into this file.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Figures with intervals, by stratum and head, beside baselines on the same frames.

    Interrupted runs go on where they stopped: answers are kept in --out.
    """
    if shards is None and real is None:
        raise ConfigError("nothing to judge by: expected labelled shards, --real, or both")
    from triage.nets.model import load_model
    from triage.training.evaluate import evaluate as run_evaluation

    run_evaluation(
        load_model(model),
        shards,
        out,
        calibration=calibration,
        real=real,
        baselines_from=baselines_from,
        baseline_shards=baseline_shards,
        threads=threads,
        command=shlex.join(["triage", *sys.argv[1:]]),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if record is not None:
        record.write_bytes((out / "report.json").read_bytes())
    print((out / "report.md").read_text(), end="")


def quantize(
    shards: Annotated[Path, typer.Argument(help="Labelled shards that it is not judged by.")],
    model: Annotated[Path, typer.Option(help="Model folder; the result is written into it.")],
    frames: Annotated[int, typer.Option(min=1, help="Frames to calibrate with.")] = 256,
) -> None:
    """Write the full exit in 8-bit integers, which OpenVINO runs faster, beside the weights."""
    from triage.nets.model import load_model
    from triage.training.quantise import quantise

    quantise(
        load_model(model, quantised=False),
        shards,
        model,
        frames=frames,
        command=shlex.join(["triage", *sys.argv[1:]]),
        say=lambda line: print(line, file=sys.stderr),
    )
    print(f"{model / 'int8.json'}")


def explain(
    file: Annotated[Path, typer.Argument(help="Recorded run or image.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures and explanation.txt.")],
    frame: Annotated[int, typer.Option(min=0, help="Frame in the file, from 0.")] = 0,
    model: Annotated[
        Path | None, typer.Option(help="Model folder; without it the included model.")
    ] = None,
    head: Annotated[
        str, typer.Option(help="Head of the full exit whose attention is drawn.")
    ] = "multilattice",
) -> None:
    """Why a frame got its verdict: cells that spoke for a crystal, tiles, rings, attention."""
    from triage.backends import open_backend
    from triage.ingest.files import read_frame
    from triage.nets.model import load_model
    from triage.training.explain import explain as explained
    from triage.training.pictures import draw_explanation, draw_feature_maps, draw_filters

    loaded = load_model(model)
    backend = open_backend("cpu", loaded.card.recipe)
    answer = explained(loaded, backend, read_frame(file, frame), head)
    out.mkdir(parents=True, exist_ok=True)
    draw_explanation(out / "frame.png", f"{file.name}, frame {frame}", answer)
    draw_feature_maps(out / "feature_maps.png", answer.feature_maps)
    if loaded.net.convolutions:
        draw_filters(out / "filters.png", loaded.net.first_filters.numpy())
    text = answer.as_text()
    (out / "explanation.txt").write_text(text + "\n")
    print(text)

"""``triage replay``: recorded runs through the same pipeline."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from triage.errors import UnreadableFile

if TYPE_CHECKING:
    from triage.ingest import Reader

__all__ = ["replay"]


def replay(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="NXmx/EIGER master or data files, CXI, CBF, TIFF, captures (.zcap), or folders."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for table, report and kept frames.")],
    config: Annotated[Path | None, typer.Option("--config", "-c", help="TOML file.")] = None,
    mode: Annotated[str | None, typer.Option(help="shadow (default) or enforce.")] = None,
    write_kept: Annotated[
        bool, typer.Option(help="Write the frames that the policy keeps as NXmx files.")
    ] = False,
    all_heads: Annotated[
        bool, typer.Option(help="Score every head on every frame, blank ones too.")
    ] = False,
    channel: Annotated[str | None, typer.Option(help="Channel to score, where several.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting as section.key=value; may be repeated."),
    ] = None,
    quiet: Annotated[bool, typer.Option(help="No progress.")] = False,
) -> None:
    """Score recorded runs: decisions.parquet with a row per frame, and report.json.

    The recorded files are only read. Exit code 3 when a file or frame could not be read.
    """
    from rich.console import Console

    from triage.cli.assembly import (
        opened_brain,
        opened_doors,
        opened_outputs,
        pipeline_options,
        run_to_end,
        show_summary,
        write_report,
    )
    from triage.cli.settings import parsed_overrides
    from triage.config import load_settings
    from triage.ingest import open_reader
    from triage.ingest.capture import Capture
    from triage.ingest.files import Files
    from triage.metrics import Metrics
    from triage.pipeline import Pipeline

    overrides = parsed_overrides(set_ or [])
    overrides["output.directory"] = str(out)
    # Recorded runs go nowhere but into files, whatever a beamline's configuration says.
    overrides |= {"forward.endpoint": "", "forward.tee": False}
    if mode is not None:
        overrides["policy.mode"] = mode
    if write_kept:
        overrides["output.write_kept"] = True
    if all_heads:
        overrides["policy.all_heads"] = True
    if channel is not None:
        overrides["source.channel"] = channel
    settings = load_settings(config, overrides)
    console = Console(stderr=True)
    metrics = Metrics()

    def reader(capture: Capture) -> Reader:
        protocol = capture.read_as(settings.source.protocol)
        return open_reader(settings, protocol, capture.lanes)

    source = Files(runs, reader=reader)
    try:
        brain = opened_brain(settings, metrics)
        with (
            opened_doors(settings) as doors,
            opened_outputs(settings, brain, metrics, live=False, doors=doors) as outputs,
        ):
            pipeline = Pipeline(
                source,
                brain.deciders,
                outputs,
                pipeline_options(settings, brain, live=False),
                metrics,
                model_id=brain.model_id,
            )
            elapsed_s = run_to_end(pipeline, console, quiet=quiet, total_frames=source.total_frames)
    finally:
        source.close()
    show_summary(pipeline, brain, elapsed_s, console)
    path = write_report(
        out,
        pipeline,
        brain,
        elapsed_s,
        {
            "directory": os.getcwd(),
            "inputs": [str(run) for run in runs],
            "skipped": [{"file": str(f), "why": why} for f, why in source.skipped],
            "unreadable": [{"file": str(f), "why": why} for f, why in source.unreadable],
        },
    )
    for file, why in source.unreadable:
        console.print(f"[red]not readable:[/red] {file}: {why}", highlight=False, soft_wrap=True)
    if source.skipped:
        console.print(f"skipped {len(source.skipped)} files that are no images (see the report)")
    console.print(f"table: {out / 'decisions.parquet'}", highlight=False, soft_wrap=True)
    console.print(f"report: {path}", highlight=False, soft_wrap=True)
    totals = pipeline.ledger.totals()
    if not totals.received:
        raise UnreadableFile(
            f"{', '.join(str(run) for run in runs)}: no image found; expected NXmx or EIGER files, "
            f"CXI, CBF, TIFF, captures or what else fabio reads; {path} lists what was skipped"
        )
    unreadable = totals.by_reason.get("malformed", 0)
    if source.unreadable or unreadable or not totals.balanced or pipeline.sink_errors:
        raise typer.Exit(3)

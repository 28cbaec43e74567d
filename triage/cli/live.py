"""``triage run``: live, from the detector's socket to the writer's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["run"]


def run(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="TOML file; see deploy/triage.toml.")
    ] = None,
    endpoint: Annotated[str | None, typer.Option(help="Detector stream to read.")] = None,
    forward: Annotated[str | None, typer.Option(help="Where kept messages go (PUSH).")] = None,
    mode: Annotated[str | None, typer.Option(help="shadow or enforce.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for table, report, journal.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting as section.key=value; may be repeated."),
    ] = None,
    quiet: Annotated[bool, typer.Option(help="No progress.")] = False,
) -> None:
    """Subscribe, decide, forward and publish until stopped.

    Ctrl-C or SIGTERM drains and reports; a second one stops at once.
    """
    from rich.console import Console

    from triage.cli.assembly import (
        opened_brain,
        opened_outputs,
        pipeline_options,
        run_to_end,
        show_summary,
        write_report,
    )
    from triage.cli.settings import parsed_overrides
    from triage.config import load_settings
    from triage.ingest import open_source
    from triage.metrics import Metrics
    from triage.pipeline import Pipeline

    overrides = parsed_overrides(set_ or [])
    for key, value in (
        ("source.endpoint", endpoint),
        ("forward.endpoint", forward),
        ("policy.mode", mode),
        ("output.directory", str(out) if out else None),
    ):
        if value is not None:
            overrides[key] = value
    settings = load_settings(config, overrides)
    console = Console(stderr=True)
    metrics = Metrics()
    brain = opened_brain(settings, metrics)
    with opened_outputs(settings, brain, metrics, live=True) as outputs:
        source = open_source(settings, metrics)
        server = metrics.serve(settings.metrics.host, settings.metrics.port)
        try:
            pipeline = Pipeline(
                source,
                brain.deciders,
                outputs,
                pipeline_options(settings, brain, live=True),
                metrics,
                model_id=brain.model_id,
            )
            console.print(
                f"triage: {settings.source.socket} {source.endpoint} -> {brain.mode}, model "
                f"{brain.model_id} -> {settings.forward.endpoint or 'no forwarder'}",
                highlight=False,
                soft_wrap=True,
            )
            if not settings.forward.endpoint:
                console.print(
                    r"note: without \[forward] endpoint nothing is sent on"
                    + (
                        ", and a pull socket takes these messages away from any other reader"
                        if settings.source.socket == "pull"
                        else ""
                    ),
                    highlight=False,
                    soft_wrap=True,
                )
            elapsed_s = run_to_end(pipeline, console, quiet=quiet)
        finally:
            server.close()
            source.close()
    show_summary(pipeline, brain, elapsed_s, console)
    if settings.output.directory:
        path = write_report(Path(settings.output.directory), pipeline, brain, elapsed_s)
        console.print(f"report: {path}", highlight=False, soft_wrap=True)
    totals = pipeline.ledger.totals()
    if not totals.balanced or totals.missing or pipeline.sink_errors:
        raise typer.Exit(3)

"""``triage export``: the decisions in the form of the next program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["export"]


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or its decisions.parquet.")],
    to: Annotated[str, typer.Option(help="crystfel, dials, xds, csv or nexus.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write into; without it the run's own.")
    ] = None,
) -> None:
    """Write lists and exclusions by verdict: kept.lst, exclude.phil, XDS ranges, CSV, NeXus."""
    from triage.sinks.exports import export as exported

    folder = out or (run if run.is_dir() else run.parent)
    for path in exported(run, to, folder):
        print(path)

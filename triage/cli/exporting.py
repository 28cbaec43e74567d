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
    """Write what the next program reads: kept.lst, exclude.phil, XDS ranges, CSV or NeXus.

    CrystFEL gets the kept events; DIALS and XDS get the images of sweeps that look blank.
    """
    from triage.sinks.exports import export as exported

    folder = out or (run if run.is_dir() else run.parent)
    for path in exported(run, to, folder):
        print(path)

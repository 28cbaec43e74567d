"""``triage export``: the decisions in the form of the next program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["export"]


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or its decisions.parquet.")],
    to: Annotated[str, typer.Option(help="crystfel, dials, xds, trains, csv or nexus.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write into; without it the run's own.")
    ] = None,
) -> None:
    """Write what the next program reads: events with a geometry file for CrystFEL, exclusions for
    DIALS and XDS, frame patterns of trains, CSV or NeXus.

    CrystFEL gets the kept events; DIALS and XDS get the images of sweeps that look blank. 'trains'
    is HDF5 with trainId, nFrame and dataFramePattern of what came over a Karabo bridge; it is not
    the candidate frame list of European XFEL. The table of a run that was killed is put together
    from its parts.
    """
    from triage.ingest.files import recorded
    from triage.sinks.exports import export as exported

    folder = out or (run if run.is_dir() else run.parent)
    for path in exported(run, to, folder, recorded):
        print(path)

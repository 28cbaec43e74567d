"""The command ``triage``: parses, builds, calls, and maps errors to exit codes.

Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 finished with lost or unreadable
frames, 4 environment, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from triage import __version__
from triage.cli import (
    bench,
    control,
    demo,
    doctor,
    exporting,
    glimpse,
    live,
    record,
    recorded,
    settings,
    training,
)
from triage.errors import ConfigError, EnvironmentLacksError, ModelError, TriageError

__all__ = ["app", "main"]

app = typer.Typer(
    name="triage",
    help="In-line triage of X-ray diffraction frames between detector and file writer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"braggtriage {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks and debug log.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show version."),
    ] = False,
) -> None:
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )


app.command("demo")(demo.demo)
app.command("run")(live.run)
app.command("replay")(recorded.replay)
app.command("record")(record.record)
app.command("export")(exporting.export)
app.command("train")(training.train)
app.command("evaluate")(training.evaluate)
app.command("quantize")(training.quantize)
app.command("explain")(training.explain)
app.command("doctor")(doctor.doctor)
app.command("glimpse")(glimpse.glimpse)
app.command("ctl")(control.ctl)
app.command("keygen")(control.keygen)
app.add_typer(bench.app, name="bench")
app.add_typer(settings.app, name="config")


def main() -> None:
    """Run the command line; ends the process."""
    # Set for DIALS and others that bring their own HDF5. With it, hdf5plugin leaves its filters
    # to HDF5's loader, which cannot load them into h5py's copy of the library.
    os.environ.pop("HDF5_PLUGIN_PATH", None)
    try:
        app()
    except TriageError as err:
        if "--debug" in sys.argv:
            raise
        print(f"triage: {err}", file=sys.stderr)
        if isinstance(err, ConfigError):
            sys.exit(2)
        sys.exit(4 if isinstance(err, EnvironmentLacksError | ModelError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)

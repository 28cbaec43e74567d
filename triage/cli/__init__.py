"""The command ``triage``: parses, builds, calls, and maps errors to exit codes.

Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 finished with lost or unreadable
frames, 4 environment, 130 interrupted.
"""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
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

_WITHOUT_COMPILED_CODE = ("config", "ctl", "keygen")

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
    context: typer.Context,
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
    if context.invoked_subcommand not in _WITHOUT_COMPILED_CODE:
        _keep_compiled_code()


def _keep_compiled_code() -> None:
    """Give compilers a folder for this process where they have none; they do not run without.

    Numba looks for one in NUMBA_CACHE_DIR, beside the code and in the user's cache, CuPy in
    CUPY_CACHE_DIR or in the user's home. A service often may write to none of them.
    """
    home = Path(os.path.expanduser("~"))
    beside = Path(__file__).parents[1] / "backends"
    places = {"NUMBA_CACHE_DIR": [beside, Path(os.environ.get("XDG_CACHE_HOME", home / ".cache"))]}
    if importlib.util.find_spec("cupy") is not None:
        places["CUPY_CACHE_DIR"] = [home / ".cupy"]
    for name, others in places.items():
        named = [Path(os.environ[name])] if os.environ.get(name) else []
        if any(_may_write(place) for place in named or others):
            continue
        folder = tempfile.mkdtemp(prefix="triage-compiled-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ[name] = folder
        logging.getLogger(__name__).warning(
            "compiled code is not kept, and every start takes a minute: cannot write to %s; "
            "set %s to a folder that this user may write to",
            ", ".join(str(place) for place in named or others),
            name,
        )


def _may_write(folder: Path) -> bool:
    """Whether files can be made in a folder, which may have to be made."""
    # Of a folder behind one that may not be looked into pathlib raises where os.path says no.
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


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

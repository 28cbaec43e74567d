"""``triage bench``: what a frame costs here, beside floors, goals and other programs."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triage.errors import ConfigError

if TYPE_CHECKING:
    from triage.bench.record import Record

__all__ = ["app"]

app = typer.Typer(help="Measure cost per frame; records, tables, plots.", no_args_is_help=True)

_WIDTH = 150
"""Characters of a table where there is no terminal."""

_AsJson = Annotated[
    bool, typer.Option("--json", help="End the output with the record as one JSON line.")
]
_RecordTo = Annotated[Path | None, typer.Option("--record", help="Write the record to this file.")]
_Seconds = Annotated[
    float, typer.Option(min=0.0, help="Seconds for each comparison; more makes figures steadier.")
]
_Sizes = Annotated[
    list[str] | None, typer.Option("--size", help="0.1M, 0.5M, 1M, 4M or 16M; may be repeated.")
]
_PeerPython = Annotated[
    Path | None,
    typer.Option(
        envvar="TRIAGE_PEER_PYTHON",
        help="Interpreter of the environment that benchmarks/peers_env.sh makes.",
    ),
]


@app.command("stages")
def stages(
    as_json: _AsJson = False,
    record: _RecordTo = None,
    seconds: _Seconds = 4.0,
    size: _Sizes = None,
) -> None:
    """Each stage alone, beside the floor it stands on."""
    _run("stages", as_json, record, seconds=seconds, sizes=tuple(size or ()))


@app.command("goals")
def goals(
    as_json: _AsJson = False,
    record: _RecordTo = None,
    seconds: _Seconds = 6.0,
    peer_python: _PeerPython = None,
) -> None:
    """The ratios this program is held to; some minutes."""
    _run("goals", as_json, record, seconds=seconds, peer_python=peer_python)


@app.command("live")
def live(
    as_json: _AsJson = False,
    record: _RecordTo = None,
    size: _Sizes = None,
    minutes: Annotated[
        float, typer.Option(min=0.0, help="Go on this long at half the rate, watching memory.")
    ] = 0.0,
) -> None:
    """A detector process over loopback, faster until frames are late."""
    _run("live", as_json, record, sizes=tuple(size or ()), minutes=minutes)


@app.command("messages")
def messages(
    as_json: _AsJson = False,
    record: _RecordTo = None,
    seconds: _Seconds = 4.0,
    size: _Sizes = None,
) -> None:
    """What a message costs, whatever is in it."""
    _run("messages", as_json, record, seconds=seconds, sizes=tuple(size or ()))


@app.command("peers")
def peers(
    as_json: _AsJson = False,
    record: _RecordTo = None,
    seconds: _Seconds = 4.0,
    size: _Sizes = None,
    peer_python: _PeerPython = None,
) -> None:
    """Spot finders of other projects on the same frames."""
    _run(
        "peers", as_json, record, seconds=seconds, sizes=tuple(size or ()), peer_python=peer_python
    )


def _run(name: str, as_json: bool, record: Path | None, **options: Any) -> None:
    from rich.console import Console

    from triage.bench import Options, run_bench

    found = run_bench(name, Options(**options), shlex.join(["triage", *sys.argv[1:]]))
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    _show(found, console)
    if record is not None:
        try:
            record.write_text(found.as_json(indent=1) + "\n", encoding="utf-8")
        except OSError as err:
            raise ConfigError(
                f"--record {record}: {err.strerror}; expected a file that can be written"
            ) from err
    if as_json:
        print(found.as_json())


def _show(found: Record, console: Any) -> None:
    """Every table of a record, then its figures, and what is absent."""
    from rich.table import Table

    for title, rows in found.tables.items():
        if not rows:
            continue
        table = Table(title=title, title_justify="left")
        for column in rows[0]:
            numbers = all(isinstance(row[column], int | float | None) for row in rows)
            table.add_column(column, justify="right" if numbers else "left")
        for row in rows:
            table.add_row(*(_cell(value) for value in row.values()))
        console.print(table)
    figures = Table(title=f"{found.name}: figures", title_justify="left")
    for column in ("figure", "value", "quartiles"):
        figures.add_column(column, justify="left" if column == "figure" else "right")
    for name, value in found.figures.items():
        quartiles = found.spread.get(name)
        figures.add_row(name, _cell(value), _cell(quartiles[:2]) if quartiles else "")
    console.print(figures)
    for what, why in found.absent.items():
        console.print(f"absent: {what}: {why}", highlight=False, soft_wrap=True)
    for what, note in found.notes.items():
        console.print(f"{what}: {note}", highlight=False, soft_wrap=True)
    console.print(
        f"{found.machine['processor']}, {found.machine['cores']} cores, load "
        f"{_cell(found.load.get('before'))} to {_cell(found.load.get('after'))}, "
        f"{found.elapsed_s:.0f} s",
        highlight=False,
        soft_wrap=True,
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return " to ".join(_cell(each) for each in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)

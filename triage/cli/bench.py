"""``triage bench``: what a frame costs here, beside floors, goals and other programs."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triage.errors import ConfigError, EnvironmentLacksError

if TYPE_CHECKING:
    from rich.console import Console

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


@app.command("work")
def work(
    as_json: _AsJson = False,
    record: _RecordTo = None,
    seconds: _Seconds = 3.0,
    size: _Sizes = None,
) -> None:
    """How cost grows with pixels and with bytes."""
    _run("work", as_json, record, seconds=seconds, sizes=tuple(size or ()))


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


@app.command("soak")
def soak(
    as_json: _AsJson = False,
    record: _RecordTo = None,
    size: Annotated[str, typer.Option("--size", help="0.1M, 0.5M, 1M, 4M or 16M.")] = "4M",
    minutes: Annotated[float, typer.Option(min=0.1, help="How long.")] = 30.0,
    rate: Annotated[
        float, typer.Option(min=0.0, help="Images per second; 0 for 3/4 of the highest.")
    ] = 0.0,
) -> None:
    """Minutes near the highest rate that loses nothing, enforcing; SIGTERM ends it early."""
    _run("soak", as_json, record, sizes=(size,), minutes=minutes, rate_hz=rate)


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


@app.command("gpu")
def gpu(
    as_json: _AsJson = False,
    record: _RecordTo = None,
    seconds: _Seconds = 4.0,
    size: _Sizes = None,
) -> None:
    """One device: from compressed bytes to scores."""
    _run("gpu", as_json, record, seconds=seconds, sizes=tuple(size or ()))


@app.command("compare")
def compare(
    before: Annotated[Path, typer.Argument(help="Record to hold the other to.")],
    after: Annotated[Path, typer.Argument(help="Record of a later run.")],
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Share by which a figure may be worse.")
    ] = 0.1,
    fail: Annotated[bool, typer.Option("--fail", help="Exit 1 when any figure is worse.")] = False,
    as_json: _AsJson = False,
) -> None:
    """Figures of two records side by side."""
    import json
    from dataclasses import asdict

    from rich.table import Table

    from triage.bench.record import compared, read_record

    rows = compared(read_record(before), read_record(after), tolerance)
    table = Table(title=f"{before.name} -> {after.name}", title_justify="left")
    for column in ("figure", "before", "after", "ratio", ""):
        table.add_column(column, justify="left" if column in ("figure", "") else "right")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        mark = "worse" if row.worse else ""
        table.add_row(row.figure, _cell(row.a), _cell(row.b), ratio, mark)
    _console().print(table)
    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
    if fail and any(row.worse for row in rows):
        raise typer.Exit(1)


@app.command("table")
def table(
    documents: Annotated[list[Path], typer.Argument(help="Documents with marked tables.")],
    check: Annotated[
        bool,
        typer.Option("--check", help="Write nothing; exit 1 when a table is not its record's."),
    ] = False,
) -> None:
    """Write the tables that a document marks, from the records it names."""
    from triage.bench.tables import filled_in

    stale = False
    for document in documents:
        try:
            text = document.read_text(encoding="utf-8")
            made = filled_in(text, document.parent)
            if made != text and not check:
                document.write_text(made, encoding="utf-8")
        except OSError as err:
            raise ConfigError(f"{document}: {err.strerror}; expected a document") from err
        if made != text:
            stale = True
            print(f"{document}: {'not as its records say' if check else 'written'}")
    if check and stale:
        raise typer.Exit(1)


@app.command("plot")
def plot(
    records: Annotated[list[Path], typer.Argument(help="Records of goals or stages.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")],
) -> None:
    """Draw what records hold: figures over their goals, stages over their floors."""
    from triage.bench.record import read_record

    try:
        from triage.bench.pictures import draw
    except ImportError as err:
        raise EnvironmentLacksError(
            f"bench plot: {err}; pip install 'braggtriage[train]' brings matplotlib"
        ) from err
    out.mkdir(parents=True, exist_ok=True)
    for record in records:
        print(draw(read_record(record), out))


def _run(name: str, as_json: bool, record: Path | None, **options: Any) -> None:
    from triage.bench import Options, run_bench

    found = run_bench(name, Options(**options, say=_say), shlex.join(["triage", *sys.argv[1:]]))
    _show(found, _console())
    if record is not None:
        try:
            record.write_text(found.as_json(indent=1) + "\n", encoding="utf-8")
        except OSError as err:
            raise ConfigError(
                f"--record {record}: {err.strerror}; expected a file that can be written"
            ) from err
    if as_json:
        print(found.as_json())


def _say(what: str) -> None:
    if sys.stderr.isatty():
        print(f"measuring {what}", file=sys.stderr)


def _console() -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def _show(found: Record, console: Console) -> None:
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

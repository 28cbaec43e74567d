"""``triage glimpse``: what is on that stream."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["glimpse"]


def glimpse(
    endpoint: Annotated[str, typer.Argument(help="Such as tcp://127.0.0.1:31001.")],
    socket: Annotated[
        str | None,
        typer.Option(
            help="sub, or pull: which takes messages away from the writer. Karabo: req, too. "
            "Default: sub; Karabo: as configured."
        ),
    ] = None,
    take: Annotated[
        bool, typer.Option("--take", help="With pull: nothing else reads this stream now.")
    ] = False,
    messages: Annotated[int, typer.Option(min=1, help="Stop after so many.")] = 10,
    seconds: Annotated[float, typer.Option(min=0.1, help="Stop after so long.")] = 10.0,
    channel: Annotated[str | None, typer.Option(help="Channel to look at.")] = None,
    protocol: Annotated[
        str | None, typer.Option(help="As \\[source] protocol; auto tells DECTRIS' two apart.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="TOML file; its \\[source] is used.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting as section.key=value; may be repeated."),
    ] = None,
) -> None:
    """Print what a stream carries: kinds, series, shapes, encodings, sizes, rate."""
    from triage.cli.settings import listening_settings, parsed_overrides
    from triage.cli.site import kind_of_source
    from triage.errors import ConfigError
    from triage.ingest import open_source
    from triage.metrics import Metrics

    overrides = {**parsed_overrides(set_ or []), "source.endpoint": endpoint}
    for key, value in (("source.protocol", protocol), ("source.channel", channel)):
        if value is not None:
            overrides[key] = value
    settings = listening_settings(config, overrides, socket)
    if kind_of_source(settings) == "pull" and not take:
        raise ConfigError(
            "glimpse with a PULL socket takes messages away from the program that reads this "
            "stream, the start of a series among them, without which it cannot read the frames; "
            "expected --take with it, when nothing else reads the stream now"
        )
    source = open_source(settings, Metrics())
    began = time.monotonic()
    seen = 0
    seen_bytes = 0
    try:
        while seen < messages and time.monotonic() - began < seconds:
            for message in source.receive(100):
                seen += 1
                seen_bytes += message.size_bytes
                # Names come from the wire: none may steer the terminal.
                line = _line(message)
                typer.echo("".join(c if c.isprintable() else "?" for c in line))
                if seen == messages:
                    break
    finally:
        source.close()
    elapsed_s = time.monotonic() - began
    typer.echo(
        f"{seen} messages, {seen_bytes / 1e6:.1f} MB in {elapsed_s:.1f} s"
        + (
            ""
            if seen
            else "; nothing came: is the detector armed? One that sends by PUSH is read with "
            "--socket pull --take"
        )
    )
    if not seen:
        raise typer.Exit(1)


def _line(message: object) -> str:
    from triage.records import Message

    if not isinstance(message, Message):
        return ""
    parts = len(message.parts) + sum(len(more) for more in message.followed_by)
    head = f"{message.kind.value:<9} {parts} parts {message.size_bytes:>9} bytes"
    frame, series = message.frame, message.series
    if frame is not None:
        return (
            f"{head}  series {frame.series.series_id} image {frame.image_id} "
            f"{frame.channel or '-'} {frame.shape[0]}x{frame.shape[1]} {frame.dtype.str} "
            f"{frame.encoding} {frame.fault.value if frame.fault else ''} {frame.fault_detail}"
        )
    if series is not None:
        geometry = "with geometry" if series.geometry else "no geometry"
        return (
            f"{head}  series {series.series_id} {series.series_unique_id} "
            f"{series.image_size_y_px}x{series.image_size_x_px} "
            f"channels {','.join(series.channels) or '-'} {geometry}"
        )
    return f"{head}  {message.detail}"

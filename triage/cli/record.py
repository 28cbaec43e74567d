"""``triage record``: a stream into a capture file, message by message as it comes."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from triage.ingest import LiveSource
    from triage.ingest.capture import Recorder
    from triage.records import Message

__all__ = ["record"]

_POLL_MS = 100
_SAY_EVERY_S = 2.0


def record(
    endpoint: Annotated[str, typer.Argument(help="Such as tcp://127.0.0.1:31001.")],
    file: Annotated[Path, typer.Argument(help="Capture to be made, such as run.zcap.")],
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="TOML file; its \\[source] is used.")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help="auto, stream2, stream1, jungfraujoch, slsdetector or karabo."),
    ] = None,
    socket: Annotated[
        str | None,
        typer.Option(
            help="sub, or pull: which takes messages away from the writer. Karabo: req, too. "
            "Default: sub; Karabo: as configured."
        ),
    ] = None,
    messages: Annotated[int, typer.Option(min=0, help="Stop after so many; 0: do not.")] = 0,
    series: Annotated[int, typer.Option(min=0, help="Stop after so many ends; 0: do not.")] = 0,
    seconds: Annotated[float, typer.Option(min=0.0, help="Stop after so long; 0: do not.")] = 0.0,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting as section.key=value; may be repeated."),
    ] = None,
    quiet: Annotated[bool, typer.Option(help="No progress.")] = False,
) -> None:
    """Write every message of a stream into FILE until Ctrl-C, as it came.

    `triage replay FILE --out DIR` decides its frames, `triage-sim play FILE` sends them once
    more. Exit code 1 when nothing came, 3 when the disk was full.
    """
    from triage.cli.settings import listening_settings, parsed_overrides
    from triage.cli.site import kind_of_source
    from triage.ingest import open_source
    from triage.ingest.capture import Recorder
    from triage.metrics import Metrics

    overrides = parsed_overrides(set_ or [])
    overrides["source.endpoint"] = endpoint
    if protocol is not None:
        overrides["source.protocol"] = protocol
    settings = listening_settings(config, overrides, socket)
    if kind_of_source(settings) == "pull":
        typer.echo(
            "WARNING: a PULL socket takes these messages away from the program that reads this "
            "stream, the start of a series among them, without which it cannot read the frames; "
            "'triage-sim play' sends them once more",
            err=True,
        )
    # The file comes first: a socket takes messages, which a failing start would lose.
    # An SLS frame holds the messages of several ports; which port is in the messages.
    one_lane = settings.source.protocol == "slsdetector"
    lanes = 1 if one_lane else settings.source.endpoint.count(",") + 1
    recorder = Recorder(file, protocol=settings.source.protocol, lanes=lanes)
    try:
        source = open_source(settings, Metrics())
        try:
            full = _recorded(source, recorder, messages, series, seconds, quiet=quiet)
        finally:
            source.close()
    finally:
        recorder.close()
    typer.echo(f"{recorder.messages} messages, {recorder.size_bytes / 1e6:.1f} MB: {file}")
    if full:
        typer.echo(f"triage: capture {file}: {full}; it holds what came before", err=True)
        raise typer.Exit(3)
    if not recorder.messages:
        # Nothing of worth is there, and the name would be taken.
        recorder.discard()
        typer.echo(
            "nothing came: is the detector armed? One that sends by PUSH is read with "
            "--socket pull",
            err=True,
        )
        raise typer.Exit(1)


def _recorded(
    source: LiveSource,
    recorder: Recorder,
    messages: int,
    series: int,
    seconds: float,
    *,
    quiet: bool,
) -> str:
    """Record until one of the bounds, or a signal; why it could not be written, or ""."""
    from triage.ingest import HoldingSource
    from triage.records import MessageKind

    stopped = False

    def on_signal(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True

    previous = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    began = said = time.monotonic()
    over = _Series()
    try:
        while not stopped and not (seconds and time.monotonic() - began >= seconds):
            for message in source.receive(_POLL_MS):
                if series and over.ended >= series and message.kind is not MessageKind.END:
                    return ""
                try:
                    _write(recorder, message)
                except OSError as err:
                    return str(err.strerror)
                over.see(message)
                if messages and recorder.messages >= messages:
                    return ""
            if series and over.ended >= series:
                return ""
            if not quiet and time.monotonic() - said >= _SAY_EVERY_S:
                said = time.monotonic()
                typer.echo(
                    f"{recorder.messages} messages, {recorder.size_bytes / 1e6:.1f} MB, "
                    f"{over.ended} series ended",
                    err=True,
                )
        # Parts that wait for others, and ends that wait for other sockets, came too.
        try:
            for message in source.flush() if isinstance(source, HoldingSource) else ():
                _write(recorder, message)
        except OSError as err:
            return str(err.strerror)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return ""


class _Series:
    """How many series have ended: those that end on several sockets, or twice, once."""

    def __init__(self) -> None:
        self.ended = 0
        self._runs = False

    def see(self, message: Message) -> None:
        if message.kind == "end":
            self.ended += self._runs
        if message.kind in ("start", "image", "end"):
            self._runs = message.kind != "end"


def _write(recorder: Recorder, message: Message) -> None:
    for parts in (message.parts, *message.followed_by):
        if parts:
            recorder.write(parts, message.received_ns, message.lane if recorder.lanes > 1 else 0)

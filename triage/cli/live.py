"""``triage run``: live, from the detector's socket to the writer's."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from triage.config import Settings

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

    Ctrl-C or SIGTERM drains and reports; a second one stops at once. SIGHUP reads the settings
    anew and applies what may change in a run; 'triage ctl' asks and tells through \\[control].
    """
    from rich.console import Console

    from triage.cli.logs import said_beside
    from triage.cli.settings import parsed_overrides
    from triage.config import load_settings

    overrides = parsed_overrides(set_ or [])
    for key, value in (
        ("source.endpoint", endpoint),
        ("forward.endpoint", forward),
        ("policy.mode", mode),
        ("output.directory", str(out) if out else None),
    ):
        if value is not None:
            overrides[key] = value
    with said_beside() as shown, contextlib.ExitStack() as ends:
        settings = load_settings(config, overrides)
        set_level = _level_setter()
        if set_level is not None:
            set_level(settings.log.level)
        _run(
            settings,
            lambda: load_settings(config, overrides),
            Console(file=shown),
            set_level,
            ends,
            quiet=quiet,
        )


def _run(
    settings: Settings,
    read: Callable[[], Settings],
    console: Console,
    set_level: Callable[[str], None] | None,
    ends: contextlib.ExitStack,
    *,
    quiet: bool,
) -> None:
    from triage.audit import Audit
    from triage.cli.assembly import (
        Signals,
        opened_brain,
        opened_doors,
        opened_outputs,
        pipeline_options,
        run_to_end,
        show_summary,
        write_report,
    )
    from triage.cli.site import kind_of_source
    from triage.control import Control
    from triage.errors import TriageError
    from triage.ingest import ConnectedSource, PortedSource, open_source
    from triage.machine import keep_large_blocks_apart
    from triage.metrics import Metrics
    from triage.operation import Operation, Run
    from triage.pipeline import Pipeline
    from triage.sinks.folder import note_policy
    from triage.sinks.forwarder import Forwarder
    from triage.sinks.orders import SHADOW, StandingOrders
    from triage.systemd import Notifier

    notifier = Notifier()
    notifier.status("starting: the model is loaded")
    keep_large_blocks_apart()
    metrics = Metrics()
    brain = opened_brain(settings, metrics)
    failure: TriageError | None = None
    elapsed_s = 0.0
    with (
        opened_doors(settings) as doors,
        opened_outputs(settings, brain, metrics, live=True, doors=doors) as outputs,
        metrics.serve(settings.metrics.host, settings.metrics.port),
        contextlib.ExitStack() as stack,
    ):
        stack.callback(notifier.close)
        orders = note = None
        if settings.output.directory and outputs.ledger is not None:
            directory, ledger = Path(settings.output.directory), outputs.ledger
            orders = StandingOrders(directory)
            if SHADOW in orders.standing:
                brain.hold_shadow(metrics)
            note = partial(note_policy, directory, run_id=ledger.run_id)
            note(asdict(brain.policy), goes_on_with=ledger.goes_on_with)
        # The source comes last: its socket takes messages, which a failing start would lose, and
        # so would a signal that ends the process.
        signals = Signals(hangup=True)
        ends.callback(signals.let_go)
        source = open_source(
            settings, metrics, context=doors.plain if settings.source.bind else None
        )
        try:
            pipeline = Pipeline(
                source,
                brain.deciders,
                outputs,
                pipeline_options(settings, brain, live=True),
                metrics,
                model_id=brain.model_id,
            )
            operation = Operation(
                pipeline,
                Run(
                    settings=settings,
                    read=read,
                    p_blank_veto=brain.thresholds["p_blank_veto"],
                    model_id=brain.model_id,
                    audit=outputs.audit if isinstance(outputs.audit, Audit) else None,
                    doorkeeper=doors.doorkeeper,
                    detectors=source.connected if isinstance(source, ConnectedSource) else None,
                    writers=(
                        outputs.forwarder.connected
                        if isinstance(outputs.forwarder, Forwarder)
                        else None
                    ),
                    ports=((lambda: source.trouble) if isinstance(source, PortedSource) else None),
                    level=set_level,
                    orders=orders,
                    note_policy=note,
                ),
                notifier,
            )
            if settings.control.endpoint:
                control = Control(
                    settings.control.endpoint,
                    operation,
                    context=doors.keyed,
                    doorkeeper=doors.doorkeeper,
                )
                stack.callback(control.close)
                console.print(f"control: {control.endpoint}", highlight=False, soft_wrap=True)
            kind = kind_of_source(settings)
            console.print(
                f"triage: {kind} {source.endpoint} -> {brain.policy.mode}, model "
                f"{brain.model_id} -> {settings.forward.endpoint or 'no forwarder'}",
                highlight=False,
                soft_wrap=True,
            )
            if not settings.forward.endpoint:
                console.print(
                    r"note: without \[forward] endpoint nothing is sent on"
                    + (
                        ", and a pull socket takes these messages away from any other reader"
                        if kind == "pull"
                        else ""
                    ),
                    highlight=False,
                    soft_wrap=True,
                )
            began_s = time.monotonic()
            try:
                run_to_end(
                    pipeline,
                    console,
                    quiet=quiet,
                    operation=operation,
                    ends=ends,
                    signals=signals,
                )
            except TriageError as err:
                failure = err
            elapsed_s = time.monotonic() - began_s
        finally:
            source.close()
    show_summary(pipeline, brain, elapsed_s, console)
    if settings.output.directory:
        crystfel, kept = outputs.crystfel, outputs.kept
        path = write_report(
            Path(settings.output.directory),
            pipeline,
            brain,
            elapsed_s,
            {
                "crystfel": asdict(crystfel.report()) if crystfel is not None else None,
                "kept_as_messages": kept.as_messages if kept is not None else 0,
            },
        )
        console.print(f"report: {path}", highlight=False, soft_wrap=True)
    if failure is not None:
        raise failure
    totals = pipeline.ledger.totals()
    if not totals.balanced or totals.missing or pipeline.sink_errors:
        raise typer.Exit(3)


def _level_setter() -> Callable[[str], None] | None:
    """Sets the level of our own log; None where --debug has set it."""
    if logging.getLogger().level == logging.DEBUG:
        return None
    return lambda level: logging.getLogger("triage").setLevel(level.upper())

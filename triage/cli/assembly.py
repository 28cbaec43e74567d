"""Builds a run from settings: what ``run``, ``replay`` and ``demo`` have in common.

Heavy imports happen inside the functions, so that ``triage --help`` stays quick.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import platform
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import structs

from triage import __version__
from triage.errors import ConfigError, TriageError

if TYPE_CHECKING:
    import zmq
    from rich.console import Console

    from triage.annotation import Annotator
    from triage.audit import Audit
    from triage.audit.drift import Drift
    from triage.backends import Backend
    from triage.config import Settings
    from triage.metrics import Metrics
    from triage.nets.model import Card
    from triage.operation import Operation
    from triage.pipeline import Decider, Outputs, Pipeline, PipelineOptions
    from triage.policy import Policy
    from triage.records import DriftReport, Frame, SeriesReport
    from triage.sinks.crystfel import CrystfelEndpoint
    from triage.sinks.publisher import HelloMessage
    from triage.sockets import Doorkeeper

__all__ = [
    "Brain",
    "Doors",
    "Signals",
    "opened_brain",
    "opened_doors",
    "opened_outputs",
    "pipeline_options",
    "run_to_end",
    "show_summary",
    "write_report",
]

log = logging.getLogger(__name__)

_BATCH_PX = 1 << 20
"""Pixels that a CPU reduces in the time that some calls from Python take."""

_TURN_S = 0.2
"""How soon the main thread answers a signal, and how often it looks at a run."""

_SLOW_START_S = 5.0
"""What was compiled before is loaded in less."""

_CLOSE_S = 60.0
"""How long the end of a live run waits until a file is closed; hours of rows take seconds."""

_ZSTD_ZEROS = bytes.fromhex("28b52ffd60001f03000100")
"""8192 zeros as zstd stores them (RFC 8878): one block of a repeated byte."""

_DOUBTFUL_FALSE_VETO = 0.02
"""Upper end of the 95 % interval above which a model's validation is weak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Brain:
    """The deciders of a run, one per worker, and what must be said about them.

    Attributes:
        thresholds: the model's own, for settings that name none.
        mode: the one that the run began with.
    """

    deciders: Sequence[Decider]
    model_id: str
    recipe_fingerprint: str
    thresholds: Mapping[str, float]
    mode: str
    on_device: bool
    drift: Drift | None = None

    @property
    def policy(self) -> Policy:
        """What decides, the same for every worker."""
        return self.deciders[0].policy

    def hold_shadow(self, metrics: Metrics) -> None:
        """Drop nothing, whatever mode is set; before the run begins."""
        for decider in self.deciders:
            decider.policy = replace(decider.policy, mode="shadow")
        metrics.model(self.model_id, self.policy.policy_id, self.policy.mode)

    def hello(self) -> HelloMessage:
        """The greeting published at each start and to each new subscriber."""
        from triage.sinks.publisher import HelloMessage

        return HelloMessage(
            version=__version__,
            model_id=self.model_id,
            recipe_fingerprint=self.recipe_fingerprint,
            policy_id=self.policy.policy_id,
            mode="enforce" if self.policy.mode == "enforce" else "shadow",
            thresholds={"p_blank_veto": self.policy.p_blank_veto},
        )


def opened_brain(settings: Settings, metrics: Metrics) -> Brain:
    """Backends, model and policy, warmed up: a backend and a scorer for each worker.

    Raises:
        ConfigError: enforce with a model whose card holds no validation.
        ModelError: the model cannot be loaded.
        EnvironmentLacksError: the backend cannot run here.
    """
    from triage.backends import open_backend
    from triage.nets.device_scorer import scorer_for
    from triage.nets.model import load_model
    from triage.pipeline import Decider
    from triage.policy import Policy

    model = load_model(Path(settings.model.path) if settings.model.path else None)
    card = model.card
    if settings.policy.mode == "enforce" and not card.validation:
        raise ConfigError(
            f"[policy] mode = 'enforce' with model {card.model_id}: its card holds no "
            "'validation'; expected counts, threshold and false-veto rate; "
            "run in shadow mode, or use a model that was validated"
        )
    threshold = settings.policy.p_blank_veto
    if threshold is None:
        threshold = card.thresholds["p_blank_veto"]
    worst = list(card.validation.get("false_veto_interval_95", [0.0, 1.0]))[-1]
    if settings.policy.mode == "enforce" and worst > _DOUBTFUL_FALSE_VETO:
        log.warning(
            "model %s: its validation allows that %.1f %% of hits are vetoed; expected at most "
            "%.0f %%; read the card before frames are dropped by it",
            card.model_id,
            100.0 * worst,
            100.0 * _DOUBTFUL_FALSE_VETO,
        )
    policy = Policy(
        mode=settings.policy.mode,
        p_blank_veto=threshold,
        audit_fraction=settings.policy.audit_fraction,
        all_heads=settings.policy.all_heads,
    )
    backends = [open_backend(settings.backend.kind, card.recipe, recycle=True)]
    on_device = backends[0].name != "cpu"
    for _ in range(1, _workers(settings, on_device=on_device)):
        backends.append(open_backend(settings.backend.kind, card.recipe, recycle=True))
    drift = _watched_drift(card, metrics)
    deciders = []
    with _told_when_slow(_SLOW_START_S):
        if settings.source.gain_file:
            from triage.backends.pasting import warm_up

            warm_up()
        # With a device too: spots are looked for on the host.
        _warm_up(backends[0], settings.source.protocol)
        first = scorer_for(model, settings.model.runtime, on_device=on_device)
        for number, backend in enumerate(backends):
            scorer = first.clone() if number else first
            scorer.warm_up()
            deciders.append(Decider(backend, scorer, policy, metrics, drift=drift))
    metrics.model(card.model_id, policy.policy_id, policy.mode)
    return Brain(
        deciders=deciders,
        on_device=on_device,
        model_id=card.model_id,
        recipe_fingerprint=card.recipe.fingerprint,
        thresholds={"p_blank_veto": card.thresholds["p_blank_veto"]},
        mode=policy.mode,
        drift=drift,
    )


@contextlib.contextmanager
def _told_when_slow(after_s: float) -> Iterator[None]:
    """Say why nothing happens when what is done here takes longer."""
    timer = threading.Timer(
        after_s,
        log.warning,
        ("compiling for this machine, which takes about a minute at the first start of a version",),
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _watched_drift(card: Card, metrics: Metrics) -> Drift | None:
    """The watch for drift; None for a model whose card does not say what it was made with.

    Raises:
        ModelError: a card whose reference has another form.
    """
    from triage.audit.drift import Drift
    from triage.errors import ModelError

    if not card.reference:
        return None
    try:
        return Drift(card.reference, card.thresholds["p_blank_veto"], metrics)
    except (KeyError, TypeError, ValueError) as err:
        raise ModelError(
            f"model {card.model_id}: the card's 'reference' is not one: {err!r}; expected what "
            "'triage train' writes; remove it to go without a watch for drift"
        ) from err


def _warm_up(backend: Backend, protocol: str) -> None:
    """Compile what reads frames, once on a machine: a compiler at work would hold up frames."""
    for frame in _warm_up_frames(protocol):
        backend.close_ups([frame], backend.prepare([frame]), [0])


def _warm_up_frames(protocol: str) -> list[Frame]:
    """A frame of zeros of every kind that is commonly sent by ``[source] protocol``."""
    import numpy as np

    kinds = ["u1", "<u2", "<u4"]
    if protocol == "jungfraujoch":
        kinds += ["<i2", "<i4"]
    frames = _empty_frames(kinds)
    zeros = [np.zeros((64, 64), kind) for kind in kinds]
    if protocol == "karabo":
        # The pixels of trains are not compressed.
        zeros += [np.zeros((64, 64), kind) for kind in ("<f4", "<i2")]
    frames += [
        structs.replace(frames[0], encoding="raw", dtype=image.dtype, payload=image)
        for image in zeros
    ]
    size = frames[1].shape[0] * frames[1].shape[1] * frames[1].dtype.itemsize
    head = size.to_bytes(8, "big") + size.to_bytes(4, "big")
    # One block each: stored as it is, and of zeros as zstd repeats them.
    stored = size.to_bytes(4, "big") + bytes(size)
    frames.append(structs.replace(frames[1], encoding="lz4", payload=head + stored))
    if protocol == "jungfraujoch":
        repeated = len(_ZSTD_ZEROS).to_bytes(4, "big") + _ZSTD_ZEROS
        frames.append(structs.replace(frames[1], encoding="bszstd", payload=head + repeated))
    return frames


def _empty_frames(kinds: Sequence[str]) -> list[Frame]:
    """A compressed frame of zeros of each type."""
    import numpy as np

    from triage.records import WARM_UP_GEOMETRY, Frame, Series

    return [
        Frame(
            series=Series(geometry=WARM_UP_GEOMETRY),
            image_id=0,
            encoding="bslz4",
            dtype=np.dtype(kind),
            shape=(64, 64),
            payload=_empty_chunk(64 * 64 * np.dtype(kind).itemsize),
        )
        for kind in kinds
    ]


def _empty_chunk(size_bytes: int) -> bytes:
    """Zeros as a bitshuffled LZ4 chunk, each block of 8192 bytes or less as one literal run."""
    chunk = size_bytes.to_bytes(8, "big") + (8192).to_bytes(4, "big")
    for first in range(0, size_bytes, 8192):
        literals = min(8192, size_bytes - first)
        more, last = divmod(literals - 15, 255)
        block = b"\xf0" + more * b"\xff" + bytes([last]) + bytes(literals)
        chunk += len(block).to_bytes(4, "big") + block
    return chunk


def _workers(settings: Settings, *, on_device: bool) -> int:
    """Threads that decide: on a CPU one for each core that this process may use."""
    if settings.compute.workers:
        return settings.compute.workers
    if on_device:
        # A worker waits for the scores of its batch; meanwhile the other one sends the next.
        return 2
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pipeline_options(settings: Settings, brain: Brain, *, live: bool) -> PipelineOptions:
    """How the pipeline of a run goes about its frames.

    On a CPU a fuller batch costs no less per frame, so it does not wait, and holds small frames
    only, for which a call costs as much as a frame.
    """
    from triage.pipeline import PipelineOptions

    pipeline = settings.pipeline
    return PipelineOptions(
        live=live,
        deadline_ns=pipeline.deadline_ms * 1_000_000,
        # Half of the byte budget is the line's; a quarter is for what ZeroMQ holds before it, an
        # eighth for what it holds behind, and one for what waits for a disk.
        queue_bytes=pipeline.queue_bytes // 2,
        batch_size=pipeline.batch_size,
        batch_px=0 if brain.on_device else _BATCH_PX,
        batch_wait_ns=int(pipeline.batch_wait_ms * 1_000_000) if brain.on_device else 0,
        tee=live and settings.forward.tee,
    )


@contextlib.contextmanager
def opened_outputs(
    settings: Settings,
    brain: Brain,
    metrics: Metrics,
    *,
    live: bool,
    doors: Doors | None = None,
) -> Iterator[Outputs]:
    """Every sink that the settings ask for, and the audit, closed at the end.

    Args:
        doors: who may connect, see :func:`opened_doors`; None for everybody who gets there.

    Raises:
        ConfigError: enforce without a folder for the decision journal; an address that cannot
            be used.
    """
    from triage.cli.books import opened_books
    from triage.ingest.capture import Recorder
    from triage.pipeline import Outputs
    from triage.sinks.forwarder import Forwarder
    from triage.sinks.journal import Journal
    from triage.sinks.nxmx import KeptWriter
    from triage.sinks.publisher import Publisher
    from triage.sinks.table import DecisionTable

    directory = Path(settings.output.directory) if settings.output.directory else None
    if directory is None and settings.policy.mode == "enforce":
        raise ConfigError(
            "[output] directory = '': expected a folder when [policy] mode = 'enforce', because "
            "every drop is written to its decision journal before the frame is let go"
        )
    if directory is None and settings.output.write_kept:
        raise ConfigError("[output] write_kept = true: expected [output] directory with it")
    with contextlib.ExitStack() as stack:
        forwarder = annotator = publisher = journal = table = kept = books = None
        if directory is not None:
            books = stack.enter_context(opened_books(settings, directory, live=live))
        if settings.forward.endpoint:
            forwarder = Forwarder(
                settings.forward.endpoint,
                bind=settings.forward.bind,
                distribute=settings.forward.distribute,
                writer_timeout_s=settings.forward.writer_timeout_s,
                held_bytes=settings.pipeline.queue_bytes // 8,
                message_bytes=settings.source.message_bytes,
                metrics=metrics,
                given=books.given() if books else (),
                context=doors.plain if doors and settings.forward.bind else None,
            )
            stack.callback(forwarder.close)
            if books is not None:
                stack.callback(books.forwarder_closes)
            annotator = _annotator(settings)
        if settings.publish.endpoint:
            publisher = Publisher(
                settings.publish.endpoint,
                brain.hello,
                context=doors.keyed if doors else None,
                doorkeeper=doors.doorkeeper if doors else None,
            )
            stack.callback(publisher.close)
        if directory is not None and books is not None:
            metrics.continued(books.ledger.totals())
            if brain.mode == "enforce":
                journal = Journal(
                    directory / "journal.jsonl",
                    books.folder.run_id,
                    fsync=settings.output.fsync,
                )
                stack.callback(_closed_in_time, "decision journal", journal.close, live)
            table = DecisionTable(directory / "decisions.parquet", books.folder.run_id)
            stack.callback(_closed_in_time, "decision table", table.close, live)
            if settings.output.write_kept:
                from triage.backends.pasting import whole

                kept = KeptWriter(
                    directory,
                    about={
                        "version": __version__,
                        "mode": brain.mode,
                        "model_id": brain.model_id,
                        "recipe_fingerprint": brain.recipe_fingerprint,
                    },
                    whole=whole,
                    sensor=(
                        settings.geometry.sensor_material,
                        settings.geometry.sensor_thickness_m,
                    ),
                    open_messages=partial(
                        Recorder,
                        protocol=settings.source.protocol,
                        lanes=_lanes(settings),
                    ),
                )
                kept.recover()
        crystfel = None
        if live and settings.crystfel.endpoint:
            crystfel = _opened_crystfel(
                settings, metrics, directory, context=doors.plain if doors else None
            )
            stack.callback(crystfel.close)
        audit = None
        if settings.policy.audit_fraction > 0:
            audit = _opened_audit(settings, metrics, live=live)
            stack.callback(audit.close)
        yield Outputs(
            forwarder=forwarder,
            annotator=annotator,
            publisher=publisher,
            journal=journal,
            table=table,
            kept=kept,
            crystfel=crystfel,
            audit=audit,
            ledger=books.ledger if books else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Doors:
    """The contexts of sockets that others connect to; None where everybody may.

    Attributes:
        keyed: of the publisher and the control socket.
        plain: of sockets that bind for detectors and writers, which know no keys.
        doorkeeper: of ``keyed``, when it asks for keys.
    """

    keyed: zmq.Context[Any] | None = None
    plain: zmq.Context[Any] | None = None
    doorkeeper: Doorkeeper | None = None


@contextlib.contextmanager
def opened_doors(settings: Settings) -> Iterator[Doors]:
    """Who may connect, as ``[security]`` says; to be closed after every socket behind it.

    Raises:
        ConfigError: a key file that is not right.
    """
    security = settings.security
    if not (security.server_key_file or security.allowed_addresses):
        yield Doors()
        return
    import ipaddress

    from triage.sockets import Doorkeeper, authorized_keys, key_pair

    networks = [
        ipaddress.ip_network(address.strip(), strict=False)
        for address in security.allowed_addresses
    ]
    with contextlib.ExitStack() as stack:
        keyed = plain = None
        if security.server_key_file:
            keyed = Doorkeeper(
                key_pair(Path(security.server_key_file)),
                authorized_keys(Path(security.authorized_keys)),
                networks,
            )
            stack.callback(keyed.close)
        if networks:
            plain = Doorkeeper(None, networks=networks, io_threads=settings.source.io_threads)
            stack.callback(plain.close)
        asked = keyed or plain
        yield Doors(
            keyed=asked.context if asked else None,
            plain=plain.context if plain else None,
            doorkeeper=keyed,
        )


def _annotator(settings: Settings) -> Annotator | None:
    """What writes decisions into messages, None where they go on as they came."""
    verdicts = settings.forward.verdict == "user_data"
    placeholders = settings.forward.vetoed == "placeholder"
    if not (verdicts or placeholders):
        return None
    from triage.annotation import Annotator

    return Annotator(verdicts=verdicts, placeholders=placeholders)


def _closed_in_time(what: str, close: Callable[[], None], live: bool) -> None:
    """Close a file; the end of a live run does not wait for a disk that hangs.

    Raises:
        TriageError: what closing raised.
    """
    failed: list[TriageError] = []

    def closing() -> None:
        try:
            close()
        except TriageError as err:
            failed.append(err)

    thread = threading.Thread(target=closing, name=what, daemon=True)
    thread.start()
    thread.join(_CLOSE_S if live else None)
    if thread.is_alive():
        log.error("%s: its disk takes nothing for %.0f s; it is left as it is", what, _CLOSE_S)
    for err in failed:
        raise err


def _opened_audit(settings: Settings, metrics: Metrics, *, live: bool) -> Audit:
    """The audit, with a decoder of its own: it runs beside the one that prepares frames."""
    import numpy as np

    from triage.audit import Audit
    from triage.audit.finder import find_spots
    from triage.backends import open_backend
    from triage.backends.recipe import measured

    decoder = open_backend("cpu")
    # Compiled before the run: a compiler at work would hold up the frames. With a spot, for arrays
    # of none are of another type.
    for frame in _empty_frames(("u1", "<u2", "<u4")):
        decoder.decode(frame)
    counts = np.zeros((64, 64), np.uint16)
    counts[30:33, 30:33] = 100
    find_spots(counts, np.ones(counts.shape, np.bool_))
    return Audit(
        lambda frame: measured(frame, decoder.decode(frame)),
        limit=settings.policy.audit_limit,
        metrics=metrics,
        patient=not live,
    )


def _lanes(settings: Settings) -> int:
    """Sockets that a message can say it came on."""
    if settings.source.protocol == "slsdetector":
        return 1
    return settings.source.endpoint.count(",") + 1


def _opened_crystfel(
    settings: Settings,
    metrics: Metrics,
    directory: Path | None,
    *,
    context: zmq.Context[Any] | None,
) -> CrystfelEndpoint:
    """The endpoint for CrystFEL: a decoder of its own, and the audit's finder for its peaks."""
    import numpy as np

    from triage.audit.finder import find_spots
    from triage.backends import open_backend
    from triage.backends.recipe import measured
    from triage.sinks.crystfel import CrystfelEndpoint, Looked

    decoder = open_backend("cpu")

    def look(frame: Frame) -> Looked:
        pixels = decoder.decode(frame)
        counts, valid = measured(frame, pixels)
        spots = find_spots(counts, valid) if settings.crystfel.peaks else nothing
        return Looked(
            pixels=pixels, valid=valid, x_px=spots.x_px, y_px=spots.y_px, photons=spots.photons
        )

    # Compiled before the run: a compiler at work would hold up the frames.
    nothing = find_spots(np.zeros((64, 64), np.uint16), np.ones((64, 64), np.bool_))
    return CrystfelEndpoint(
        settings.crystfel.endpoint,
        look,
        directory=directory,
        queue_bytes=settings.crystfel.queue_bytes,
        threads=settings.crystfel.threads,
        metrics=metrics,
        context=context,
    )


class Signals:
    """Signals that came since they were caught: SIGINT, SIGTERM, and SIGHUP where that is meant.

    A handler comes between any two steps of the main thread, whatever locks it holds, so that it
    does nothing but take note. To be made in the main thread.
    """

    def __init__(self, *, hangup: bool = False) -> None:
        self.came: deque[int] = deque()
        numbers = [signal.SIGINT, signal.SIGTERM] + [signal.SIGHUP] * hangup
        self.previous = {number: signal.signal(number, self._note) for number in numbers}

    def _note(self, number: int, frame: object) -> None:
        self.came.append(number)

    def let_go(self) -> None:
        """Put back what handled them before; may be called twice."""
        _restore(self.previous)


def run_to_end(
    pipeline: Pipeline,
    console: Console,
    *,
    quiet: bool,
    total_frames: int | None = None,
    operation: Operation | None = None,
    ends: contextlib.ExitStack | None = None,
    signals: Signals | None = None,
) -> float:
    """Run a pipeline while showing progress; the seconds it took.

    SIGINT and SIGTERM drain it, a second one gives up on what is not released yet. Where there is
    an operation, SIGHUP reloads, unless progress is shown on a terminal: that has hung up then, and
    the run drains.

    Args:
        ends: what closes when the outputs are closed and the report is written, which takes as
            long as the writer needs for what ZeroMQ holds. Until then the first signal that asks
            a run to stop that has stopped already changes nothing, and SIGHUP never does.
        signals: caught before the source was opened; what came since then counts.

    Raises:
        TriageError: what broke a thread of the pipeline.
    """
    from rich.live import Live

    if signals is None:
        signals = Signals(hangup=operation is not None)
    asked, previous = signals.came, signals.previous
    stops = 0

    def turn() -> None:
        nonlocal stops
        while asked:
            number = asked.popleft()
            if number == signal.SIGHUP and operation is not None:
                if not console.is_terminal:
                    operation.reload_for_signal()
                    continue
                console.file = io.StringIO()  # nobody reads any more, and a write would fail
            stops += 1
            if stops == 1:
                # Not stop(): a drain that an operator asked for must not be abandoned by this.
                pipeline.drain()
                console.print("draining; a second signal gives up on what is not released")
            else:
                pipeline.stop()
        if operation is not None:
            operation.tick()
        else:
            pipeline.watch()

    runner = threading.Thread(target=pipeline.run, name="pipeline", daemon=True)
    began = time.monotonic()
    try:
        runner.start()
        if quiet or not console.is_terminal:
            _wait_with_log_lines(pipeline, runner, console, quiet, total_frames, turn)
        else:
            with Live(console=console, refresh_per_second=4, transient=True) as live:
                while runner.is_alive():
                    runner.join(_TURN_S)
                    turn()
                    live.update(_progress_line(pipeline, began, total_frames))
        turn()
    finally:
        if ends is None:
            _restore(previous)
        else:
            ends.callback(_restore, previous)
            at_end = _ignored_once(previous, asked_before=stops > 0)
            for number in previous:
                signal.signal(number, at_end)
    failure = pipeline.failure
    if isinstance(failure, TriageError):
        raise failure
    if failure is not None:
        raise TriageError(
            f"{type(failure).__name__}: {failure}; see the log, and 'triage --debug run'"
        ) from failure
    return time.monotonic() - began


_Handlers = dict[signal.Signals, Any]


def _restore(handlers: _Handlers) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _ignored_once(previous: _Handlers, *, asked_before: bool) -> Callable[[int, object], None]:
    """What handles a signal while outputs are closed: the second that asks to stop ends it all."""
    asked = [asked_before]

    def on_signal(number: int, frame: object) -> None:
        if number == signal.SIGHUP:
            return
        if asked[0]:
            _restore(previous)
            signal.raise_signal(number)
        asked[0] = True

    return on_signal


def _wait_with_log_lines(
    pipeline: Pipeline,
    runner: threading.Thread,
    console: Console,
    quiet: bool,
    total_frames: int | None,
    turn: Callable[[], None],
) -> None:
    """Not on a terminal: a line every ten seconds, for a log."""
    began = said = time.monotonic()
    while runner.is_alive():
        runner.join(_TURN_S)
        turn()
        if not quiet and time.monotonic() - said >= 10 and runner.is_alive():
            said = time.monotonic()
            console.print(_progress_line(pipeline, began, total_frames), highlight=False)


def _progress_line(pipeline: Pipeline, began_s: float, total_frames: int | None) -> str:
    state = pipeline.snapshot()
    totals = state.totals
    decided = totals.kept + totals.vetoed
    rate_hz = decided / max(time.monotonic() - began_s, 1e-9)
    of = f"/{total_frames}" if total_frames else ""
    troubles = f" ({', '.join(state.troubles)})" if state.troubles else ""
    return (
        f"{state.state}{troubles}  {decided}{of} frames  {rate_hz:.0f} Hz  "
        + (
            f"kept {totals.kept / decided:.1%}  p50 {state.latency_p50_us / 1000:.1f} ms  "
            f"p99 {state.latency_p99_us / 1000:.1f} ms  "
            if decided
            else "nothing came yet  "
        )
        + f"queued {state.queue_frames}  lost {totals.missing}"
    )


def write_report(
    directory: Path,
    pipeline: Pipeline,
    brain: Brain,
    elapsed_s: float,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """``report.json`` beside the table: ledger, reasons, model, thresholds, times."""
    from triage.sinks.folder import policies_before

    snapshot = pipeline.snapshot()
    run_id = pipeline.ledger.run_id
    policies = policies_before(directory, run_id)
    policies += [{"run_id": run_id, **asdict(policy)} for policy in pipeline.policies]
    document = {
        "version": __version__,
        "run_id": run_id,
        "mode": brain.policy.mode,
        "model_id": brain.model_id,
        "recipe_fingerprint": brain.recipe_fingerprint,
        "policy_id": brain.policy.policy_id,
        "thresholds": {"p_blank_veto": brain.policy.p_blank_veto},
        "policies": policies,
        "machine": {"python": platform.python_version(), "system": platform.platform()},
        "elapsed_s": round(elapsed_s, 3),
        "latency_us": {
            "p50": _or_none(snapshot.latency_p50_us),
            "p99": _or_none(snapshot.latency_p99_us),
        },
        "totals": _ledger_fields(snapshot.totals),
        "series": [_ledger_fields(report) for report in pipeline.ledger.reports()],
        "audit": asdict(pipeline.audit_report) if pipeline.audit_report is not None else None,
        "drift": _drift_fields(brain.drift.report()) if brain.drift is not None else None,
        "sink_errors": list(pipeline.sink_errors),
        **(extra or {}),
    }
    path = directory / "report.json"
    try:
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(document, indent=2) + "\n")
        part.replace(path)
    except OSError as err:
        raise TriageError(f"report {path}: {err.strerror}; expected a writable folder") from err
    return path


def _or_none(value: float, digits: int = 1) -> float | None:
    return round(value, digits) if value == value else None


def _drift_fields(report: DriftReport) -> dict[str, Any]:
    return {
        "frames": report.frames,
        "quantities": {
            q.quantity: {
                "distance": _or_none(q.distance, 4),
                "strange_share": _or_none(q.strange_share, 4),
                "limit": round(q.limit, 4),
                "drifted": q.drifted,
            }
            for q in report.quantities
        },
    }


def _ledger_fields(report: SeriesReport) -> dict[str, Any]:
    return {**asdict(report), "balanced": report.balanced}


def show_summary(pipeline: Pipeline, brain: Brain, elapsed_s: float, console: Console) -> None:
    """The ledger of the run, as a table."""
    from rich.table import Table

    totals = pipeline.ledger.totals()
    snapshot = pipeline.snapshot()
    table = Table(title=f"{brain.policy.mode} mode, model {brain.model_id}", title_justify="left")
    table.add_column("frames")
    table.add_column("count", justify="right")
    table.add_column("")
    share = totals.vetoed / max(1, totals.kept + totals.vetoed)
    went = "forwarded" if pipeline.sends_on else "not dropped"
    rows = [
        ("received", totals.received, f"in {elapsed_s:.1f} s"),
        (went, totals.forwarded, _counts(totals.by_override)),
        ("dropped", totals.dropped, ""),
        ("undecided", totals.undecided, ""),
        ("missing", totals.missing, "gaps in image_id"),
        ("verdict keep", totals.kept, _counts(totals.by_reason)),
        ("verdict veto", totals.vetoed, f"{share:.1%}"),
    ]
    for name, count, remark in rows:
        table.add_row(name, str(count), remark)
    console.print(table)
    if totals.duplicates or totals.malformed or totals.control:
        console.print(
            f"duplicates {totals.duplicates}, malformed messages {totals.malformed}, "
            f"control messages {totals.control}"
        )
    balance = f"{totals.received} received = {totals.forwarded} {went} + {totals.dropped} dropped"
    if totals.balanced:
        console.print(f"[green]ledger balanced:[/green] {balance}", highlight=False)
    else:
        console.print(
            f"[bold red]LEDGER DOES NOT BALANCE:[/bold red] {balance} + "
            f"{totals.undecided} undecided",
            highlight=False,
        )
    if totals.restarts:
        console.print(
            f"[bold red]STARTED ANEW[/bold red] {totals.restarts} times while a series ran: at "
            f"most {totals.in_doubt} of the frames that were forwarded did not reach the writer",
            highlight=False,
        )
    if (audit := pipeline.audit_report) is not None and audit.audited:
        gate = "; [bold red]GATE OPEN, nothing is dropped[/bold red]" if audit.gate_open else ""
        console.print(
            f"audit: {audit.hits} of {audit.audited} sampled vetoes look like hits "
            f"({audit.hit_share_low:.1%} to {audit.hit_share_high:.1%}){gate}",
            highlight=False,
        )
    if brain.drift is not None:
        for q in brain.drift.report().quantities:
            if q.drifted:
                console.print(
                    f"[red]drift:[/red] {q.quantity} of {q.strange_share:.0%} of the frames looked "
                    f"at is unlike what the model was made with (limit {q.limit:.0%})",
                    highlight=False,
                )
    if snapshot.latency_p50_us == snapshot.latency_p50_us:
        console.print(
            f"latency p50 {snapshot.latency_p50_us / 1000:.1f} ms, "
            f"p99 {snapshot.latency_p99_us / 1000:.1f} ms (last frames)",
            highlight=False,
        )
    for line in pipeline.sink_errors[:5]:
        console.print(f"[red]{line}[/red]", highlight=False)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))

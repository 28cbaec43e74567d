"""A live run as its operator, systemd and Prometheus see it.

:meth:`Operation.tick` is called several times a second by a thread that does nothing else: it
looks for troubles that show in counts only, and tells systemd that the run makes progress while
every stage does. A stage that waits for frames or for the writer makes progress. What hangs does
not, and is then ended from outside; where only the workers hang, frames still go on unscored, so
the run drains first and loses none.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic_ns
from typing import Any

from triage import __version__
from triage.audit import Audit
from triage.config import Settings
from triage.control import State
from triage.errors import ConfigError, TriageError
from triage.health import Health, Trouble
from triage.pipeline import Pipeline, Snapshot
from triage.policy import Policy
from triage.sinks.folder import utc_now
from triage.sinks.orders import GATE_OPEN, SHADOW, StandingOrders
from triage.sockets import Doorkeeper, authorized_keys
from triage.systemd import Notifier

__all__ = ["LIVE_KEYS", "Operation", "Run"]

log = logging.getLogger(__name__)

LIVE_KEYS = frozenset(
    {
        "policy.mode",
        "policy.p_blank_veto",
        "policy.audit_fraction",
        "policy.audit_limit",
        "policy.all_heads",
        "log.level",
    }
)
"""Settings that a reload may change; ``policy.mode`` only from enforce to shadow."""

_ALONE_NS = 5_000_000_000
"""How long nobody may be connected before that is said: connections are made in less."""

_HUNG_S = 30.0
"""Without life for so long a stage hangs, where no service manager says another figure."""

_READ_S = 5.0
"""How long a reload waits for its files: they may be on a network drive that is lost."""

_STATUS_NS = 1_000_000_000
_SERIES_SHOWN = 8
_DETAIL_CHARS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What an operation works on.

    Attributes:
        settings: those in force.
        read: reads the settings anew, from the file and variables that they came from.
        p_blank_veto: the model's own threshold, for settings that name none.
        model_id: the model that decides.
        audit: None when the run was started without one.
        doorkeeper: of the sockets that ask for keys; None for plain ones.
        detectors, writers: how many sockets of the source and of the forwarder have a peer now,
            and how many there are; None where that is not known.
        ports: which ports of the source are silent, "" for none; None for a source without.
        level: sets the level of the log; None where a flag has set it.
        orders: what stopped all drops before, and where it is written down that something does;
            None for a run without a folder. A policy that keeps to them decides already.
        note_policy: writes down the fields of a policy that decides from then on.
    """

    settings: Settings
    read: Callable[[], Settings]
    p_blank_veto: float
    model_id: str
    audit: Audit | None = None
    doorkeeper: Doorkeeper | None = None
    detectors: Callable[[], tuple[int, int]] | None = None
    writers: Callable[[], tuple[int, int]] | None = None
    ports: Callable[[], str] | None = None
    level: Callable[[str], None] | None = None
    orders: StandingOrders | None = None
    note_policy: Callable[[Mapping[str, Any]], None] | None = None


class _Link:
    """Whether somebody is at the other end of the source, or of the forwarder."""

    def __init__(
        self,
        connected: Callable[[], tuple[int, int]],
        trouble: Trouble,
        who: str,
        endpoint: str,
        now_ns: int,
    ) -> None:
        self._connected = connected
        self._trouble = trouble
        self._who = who
        self._endpoint = endpoint
        self._alone_since_ns = now_ns
        self._was_connected = False

    def look(self, health: Health, now_ns: int) -> None:
        connected, sockets = self._connected()
        self._was_connected = self._was_connected or connected > 0
        if connected == sockets:
            self._alone_since_ns = now_ns
            health.clear(self._trouble)
        elif now_ns - self._alone_since_ns >= _ALONE_NS:
            at = f"at {self._endpoint}"
            if connected:
                detail = f"{sockets - connected} of {sockets} sockets {at} have no {self._who}"
            elif self._was_connected:
                detail = f"the {self._who}'s connection {at} is gone"
            else:
                detail = (
                    f"no {self._who} has connected {at}: is it the right host and port, and is "
                    "anything switched on there?"
                )
            health.add(self._trouble, detail)


class Operation:
    """Watches a pipeline, and changes what may be changed while it runs."""

    def __init__(
        self,
        pipeline: Pipeline,
        run: Run,
        notifier: Notifier,
        clock: Callable[[], int] = monotonic_ns,
    ) -> None:
        self._pipeline = pipeline
        self._run = run
        self._settings = run.settings
        self._notifier = notifier
        self._clock = clock
        self._reloading = threading.Lock()
        # Not held while files are read: who asks for no more drops must not wait for them.
        self._changing = threading.Lock()
        self._writing = threading.Lock()
        self._standing = dict(run.orders.standing) if run.orders is not None else {}
        for order in self._standing:
            self._show(order)
        self._reading: threading.Thread | None = None
        self._began_ns = clock()
        self._pinged_ns = self._told_ns = 0
        self._ready_told = self._stopping_told = False
        source, forward = run.settings.source.endpoint, run.settings.forward.endpoint
        self._links = [
            _Link(connected, trouble, who, endpoint, self._began_ns)
            for connected, trouble, who, endpoint in (
                (run.detectors, Trouble.NO_DETECTOR, "detector", source),
                (run.writers, Trouble.NO_WRITER, "writer", forward),
            )
            if connected is not None
        ]

    # -- watching ------------------------------------------------------------------------------

    def tick(self) -> None:
        """Look, and tell; quick enough to be called often."""
        now_ns, notifier = self._clock(), self._notifier
        self._pipeline.watch()
        for link in self._links:
            link.look(self._pipeline.health, now_ns)
        if self._run.ports is not None:
            if silent := self._run.ports():
                self._pipeline.health.add(Trouble.PORT_SILENT, silent)
            else:
                self._pipeline.health.clear(Trouble.PORT_SILENT)
        state = self._pipeline.health.state
        if state != "starting" and not self._ready_told:
            self._ready_told = True
            notifier.ready()
        if state in ("draining", "stopped") and not self._stopping_told:
            self._stopping_told = True
            notifier.stopping()
        if self._pipeline.audit_opened and GATE_OPEN not in self._standing:
            self._standing[GATE_OPEN] = _given("the audit found that hits are being vetoed")
            self._write_down()
        self._mind_progress(now_ns)
        if now_ns - self._told_ns >= _STATUS_NS:
            self._told_ns = now_ns
            notifier.status(self.status(self._pipeline.snapshot()))

    def _mind_progress(self, now_ns: int) -> None:
        patience_s = self._notifier.watchdog_s or _HUNG_S
        hung = self._pipeline.hung(round(patience_s * 1e9))
        health = self._pipeline.health
        if "compute" in hung:
            detail = f"no worker has come back with scores for {patience_s:g} s"
            health.add(Trouble.WORKERS_HUNG, detail)
            if self._notifier.supervised:
                # Started anew, it scores again; without a supervisor it is better than nothing.
                self._pipeline.give_up(TriageError(f"{detail}; drained, to be started anew"))
        else:
            health.clear(Trouble.WORKERS_HUNG)
        held_up = [stage for stage in hung if stage != "compute"]
        if held_up:
            log.error("no life in %s for %g s", " and ".join(held_up), patience_s)
        elif now_ns - self._pinged_ns >= patience_s * 1e9 / 4:
            self._pinged_ns = now_ns
            self._notifier.watchdog()

    def status(self, snapshot: Snapshot) -> str:
        """One line for people: state, what is wrong, the ledger."""
        totals = snapshot.totals
        went = "forwarded" if self._pipeline.sends_on else "not dropped"
        return (
            f"{snapshot.state}{_in_brackets(self._pipeline.health.troubles)}, "
            f"{self._pipeline.policy.mode}: {totals.received} received, {totals.forwarded} "
            f"{went}, {totals.dropped} dropped, {totals.missing} missing"
        )

    # -- what an operator may ask --------------------------------------------------------------

    def state(self) -> State:
        """What the run does, for the control socket."""
        pipeline, policy = self._pipeline, self._pipeline.policy
        snapshot = pipeline.snapshot()
        totals = snapshot.totals
        return State(
            version=__version__,
            state=snapshot.state,  # type: ignore[arg-type]
            degraded={
                name: detail[:_DETAIL_CHARS] for name, detail in pipeline.health.troubles.items()
            },
            series=[
                f"{series_id} {unique_id}".strip()[:_DETAIL_CHARS]
                for series_id, unique_id in pipeline.health.series[:_SERIES_SHOWN]
            ],
            mode=policy.mode,  # type: ignore[arg-type]
            gate_open=pipeline.gate_open,
            model_id=self._run.model_id,
            policy_id=policy.policy_id,
            p_blank_veto=policy.p_blank_veto,
            audit_fraction=policy.audit_fraction,
            audit_limit=self._settings.policy.audit_limit,
            all_heads=policy.all_heads,
            log_level=self._settings.log.level,
            uptime_s=round((self._clock() - self._began_ns) * 1e-9, 3),
            received=totals.received,
            forwarded=totals.forwarded,
            dropped=totals.dropped,
            undecided=totals.undecided,
            missing=totals.missing,
            malformed=totals.malformed,
            queue_frames=snapshot.queue_frames,
            queue_bytes=snapshot.queue_bytes,
            latency_p50_us=_or_none(snapshot.latency_p50_us),
            latency_p99_us=_or_none(snapshot.latency_p99_us),
        )

    def reload(self) -> list[str]:
        """Read the settings anew and apply what changed; the keys that did.

        Everything is checked before anything changes.

        Raises:
            ConfigError: the settings are not right, or one changed that needs a restart; nothing
                has changed then.
            TriageError: they could not be read in time; nothing has changed then.
        """
        with self._reloading:
            new, clients = self._read_in_time()
            with self._changing:
                return self._apply(new, clients)

    def _read_in_time(self) -> tuple[Settings, frozenset[bytes] | None]:
        """The settings as they are written now, and who may connect by them."""
        found: list[tuple[Settings, frozenset[bytes] | None] | Exception] = []

        def read() -> None:
            try:
                new = self._run.read()
                clients = None
                if self._run.doorkeeper is not None and new.security.authorized_keys:
                    clients = authorized_keys(Path(new.security.authorized_keys))
                found.append((new, clients))
            except Exception as err:  # noqa: BLE001 - raised below, where it was asked for
                found.append(err)

        if self._reading is None or not self._reading.is_alive():
            self._reading = threading.Thread(target=read, name="settings", daemon=True)
            self._reading.start()
            self._reading.join(_READ_S)
        if not found:
            raise TriageError(
                f"reload: the settings could not be read in {_READ_S:g} s, so nothing was changed; "
                "is the drive there that they are on?"
            )
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    def _apply(self, new: Settings, clients: frozenset[bytes] | None) -> list[str]:
        changed = _changed(self._settings, new)
        self._refuse(changed, new)
        policy = self._policy_of(new)
        if policy != self._pipeline.policy:
            self._decide_by(policy)
        if self._run.audit is not None:
            self._run.audit.set_limit(new.policy.audit_limit)
        if self._run.level is not None:
            self._run.level(new.log.level)
        keeper = self._run.doorkeeper
        if keeper is not None and clients is not None and (gone := keeper.let_in(clients)):
            log.warning("%d keys may connect no more; everybody is to connect anew", gone)
        self._settings = new
        log.warning("reloaded: %s", ", ".join(changed) or "nothing has changed")
        return changed

    def _refuse(self, changed: list[str], new: Settings) -> None:
        fixed = [key for key in changed if key not in LIVE_KEYS]
        if new.policy.mode == "enforce" and self._settings.policy.mode == "shadow":
            fixed.append("policy.mode (shadow to enforce)")
        if new.policy.audit_fraction > 0 and self._run.audit is None:
            fixed.append("policy.audit_fraction (this run was started without an audit)")
        if fixed:
            raise ConfigError(
                f"reload: {', '.join(fixed)}: this cannot change while triage runs, so nothing "
                f"was changed; expected changes of {', '.join(sorted(LIVE_KEYS))} only, or a "
                "restart"
            )

    def _policy_of(self, new: Settings) -> Policy:
        threshold = new.policy.p_blank_veto
        return Policy(
            mode="shadow" if SHADOW in self._standing else new.policy.mode,
            p_blank_veto=self._run.p_blank_veto if threshold is None else threshold,
            audit_fraction=new.policy.audit_fraction,
            all_heads=new.policy.all_heads,
        )

    def reload_for_signal(self) -> None:
        """Reload in a thread of its own: a file on a lost network drive must not stop the tick."""
        threading.Thread(target=self._reload_and_say, name="reload", daemon=True).start()

    def _reload_and_say(self) -> None:
        self._notifier.reloading()
        try:
            self.reload()
        except TriageError as err:
            log.error("%s; the settings stay as they were", err)
        finally:
            self._notifier.ready()

    def shadow(self) -> None:
        """Drop nothing from here on, in this run and those after it; see :meth:`resume`.

        Raises:
            TriageError: nothing is dropped, and it could not be written down.
        """
        with self._changing:
            policy = self._pipeline.policy
            if policy.mode != "shadow":
                self._decide_by(replace(policy, mode="shadow"))
            self._order(SHADOW)

    def open_gate(self) -> None:
        """Forward every veto as ``gate_open`` from here on, in this run and those after it; see
        :meth:`resume`.

        Raises:
            TriageError: nothing is dropped, and it could not be written down.
        """
        with self._changing:
            self._order(GATE_OPEN)

    def resume(self) -> None:
        """Take back :meth:`shadow` and :meth:`open_gate`: what is set holds again.

        What the audit of a run before this one found is taken back with them.

        Raises:
            ConfigError: the audit of this run found harm.
            TriageError: it could not be written down; nothing has changed then.
        """
        with self._changing:
            if self._pipeline.audit_opened:
                raise ConfigError(
                    "resume: the audit of this run found that hits are being vetoed, so nothing "
                    "was changed; expected another threshold or model, triage started anew, and "
                    "then 'resume'"
                )
            before, self._standing = self._standing, {}
            if why := self._write_down(_READ_S):
                self._standing = before
                self._write_down()
                raise TriageError(f"resume: nothing was changed, drops stay stopped: {why}")
            policy = self._pipeline.policy
            if policy.mode != self._settings.policy.mode:
                self._decide_by(replace(policy, mode=self._settings.policy.mode))
            self._pipeline.let_gate_go()
            self._pipeline.health.clear(Trouble.SHADOW_HELD)

    def _decide_by(self, policy: Policy) -> None:
        self._pipeline.apply(policy)
        if (note := self._run.note_policy) is not None:
            # In a thread of its own, because a disk may hang.
            threading.Thread(
                target=note, args=(asdict(policy),), name="policy", daemon=True
            ).start()

    def _order(self, order: str) -> None:
        self._standing.setdefault(order, _given("an operator asked that nothing be dropped"))
        self._show(order)
        if why := self._write_down(_READ_S):
            raise TriageError(
                f"nothing is dropped any more, but a run that is started anew will drop: {why}; "
                "set [policy] mode = 'shadow' in its settings"
            )

    def _show(self, order: str) -> None:
        why = f"{self._standing[order]}; 'triage ctl ENDPOINT resume' takes it back"
        if self._run.orders is not None:
            why += f", or {self._run.orders.path} removed while triage is stopped"
        if order == SHADOW:
            self._pipeline.health.add(Trouble.SHADOW_HELD, why)
        else:
            self._pipeline.hold_gate_open(why)

    def _write_down(self, wait_s: float = 0.0) -> str:
        """Keep what stands now for the next run; why that was not done in time, or "".

        In a thread of its own, because a disk may hang.
        """
        orders = self._run.orders
        if orders is None:
            return ""
        failed: list[str] = []

        def write() -> None:
            with self._writing:
                try:
                    orders.write(dict(self._standing))
                    while self._standing != orders.standing:
                        orders.write(dict(self._standing))  # it changed meanwhile
                except OSError as err:
                    failed.append(f"{orders.path}: {err.strerror}")
                    log.error("%s: what stopped the drops is not kept for the next run", failed[0])

        thread = threading.Thread(target=write, name="orders", daemon=True)
        thread.start()
        thread.join(wait_s)
        if thread.is_alive() and wait_s:
            return f"{orders.path}: its disk takes nothing for {wait_s:g} s"
        return failed[0] if failed else ""

    def drain(self) -> None:
        """Take no more input, release what was received, and end."""
        self._pipeline.drain()


def _given(why: str) -> str:
    return f"{why} ({utc_now()})"


def _changed(old: Settings, new: Settings) -> list[str]:
    """Keys whose values differ, ``section.name``."""
    before, after = old.model_dump(), new.model_dump()
    return [
        f"{section}.{name}"
        for section, values in after.items()
        for name, value in values.items()
        if value != before[section][name]
    ]


def _in_brackets(troubles: dict[str, str]) -> str:
    details = "; ".join(f"{name}: {detail}" for name, detail in troubles.items())
    return f" ({details[:_DETAIL_CHARS]})" if details else ""


def _or_none(value: float) -> float | None:
    return round(value, 1) if math.isfinite(value) else None

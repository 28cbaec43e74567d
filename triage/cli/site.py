"""What the doctor asks of the settings that a site deploys, before a run depends on them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triage.config import Settings

__all__ = ["Finding", "kind_of_source", "site_findings"]

_CONNECT_S = 2.0
_ROOM_BYTES = 10_000_000_000
_AUDIT_BYTES = 256 << 20
_PROCESS_BYTES = 1 << 30
"""What a process takes beside the frames it holds: libraries, model, a frame in each worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the doctor: ``state`` is ok, note or fail; ``remedy`` says the next step.

    ``exit_code`` is that of a failure: the one that ``triage run`` would end with.
    """

    subject: str
    state: str
    found: str
    remedy: str = ""
    exit_code: int = 4


def site_findings(settings: Settings, file: Path) -> Iterator[Finding]:
    """What is right and wrong with settings on this machine."""
    yield _decides(settings)
    yield _keys(settings)
    yield _exposure(settings)
    yield from _source(settings)
    yield from _ports(settings)
    yield from _peers(settings)
    yield _output(settings)
    yield from _orders(settings)
    yield _memory(settings)
    yield _service(file)


def _decides(settings: Settings) -> Finding:
    from triage.backends import cuda
    from triage.errors import TriageError
    from triage.nets.model import load_model

    path, mode = settings.model.path, settings.policy.mode
    try:
        card = load_model(Path(path) if path else None).card
    except TriageError as err:
        return Finding(
            subject="policy", state="fail", found=str(err), remedy="set [model] path to a model"
        )
    if mode == "enforce" and not card.validation:
        return Finding(
            subject="policy",
            state="fail",
            found=f"enforce with {card.model_id}, whose card holds no validation",
            remedy="run in shadow mode, or use a model that was validated",
            exit_code=2,
        )
    if settings.backend.kind == "cuda" and (lacks := cuda.unavailable()) is not None:
        return Finding(
            subject="policy",
            state="fail",
            found=f"[backend] kind = 'cuda': {lacks}",
            remedy="install the extra 'gpu', or set 'auto'",
        )
    return Finding(subject="policy", state="ok", found=f"{mode} with {card.model_id}")


def _keys(settings: Settings) -> Finding:
    from triage.errors import ConfigError
    from triage.sockets import authorized_keys, key_pair

    security = settings.security
    if not security.server_key_file:
        return Finding(subject="keys", state="ok", found="none are asked for")
    try:
        key_pair(Path(security.server_key_file))
        clients = len(authorized_keys(Path(security.authorized_keys)))
    except ConfigError as err:
        return Finding(
            subject="keys",
            state="fail",
            found=str(err),
            remedy="see 'triage keygen'",
            exit_code=2,
        )
    return Finding(
        subject="keys",
        state="ok" if clients else "note",
        found=f"{security.server_key_file}; {clients} may connect",
        remedy="" if clients else "put their NAME.key into [security] authorized_keys",
    )


def _exposure(settings: Settings) -> Finding:
    from triage.config import is_loopback

    security, keyed = settings.security, bool(settings.security.server_key_file)
    sockets = [
        ("[publish]", settings.publish.endpoint, keyed),
        ("[control]", settings.control.endpoint, keyed),
        ("[crystfel]", settings.crystfel.endpoint, False),
        ("[metrics]", (settings.metrics.host or "*") * bool(settings.metrics.port), False),
        ("[source]", settings.source.endpoint * settings.source.bind, False),
        ("[forward]", settings.forward.endpoint * settings.forward.bind, False),
    ]
    narrowed = "" if security.allowed_addresses else " from any address"
    found = [
        f"{name} {address}{narrowed if name != '[metrics]' else ' from any address'}"
        for name, address, has_keys in sockets
        if address and not has_keys and not all(map(is_loopback, address.split(",")))
    ]
    return Finding(
        subject="exposure",
        state="note" if found else "ok",
        found=("without keys: " + "; ".join(found)) if found else "only this machine, or with keys",
        remedy="narrow [security] allowed_addresses, and the firewall" if found else "",
    )


def _source(settings: Settings) -> Iterator[Finding]:
    """Whether the source and the sockets can be made; no connection is waited for."""
    import zmq

    from triage.errors import TriageError
    from triage.ingest import open_reader

    wrong = []
    try:
        named = _source_addresses(settings)
        open_reader(settings, settings.source.protocol, len(named))
    except TriageError as err:
        wrong.append(str(err))
        named = []
    if settings.source.bind:
        named = []
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    # No message comes to a PAIR, whatever is at the other end.
    probe = context.socket(zmq.PAIR)
    writers = [] if settings.forward.bind else settings.forward.endpoint.split(",")
    for section, found in (("[source]", named), ("[forward]", writers)):
        for address in filter(None, map(str.strip, found)):
            try:
                probe.connect(address)
            except zmq.ZMQError as err:
                wrong.append(f"{section} endpoint = {address!r}: {err}")
    probe.close(linger=0)
    context.term()
    if wrong:
        yield Finding(
            subject="settings",
            state="fail",
            found="; ".join(wrong),
            remedy="expected addresses such as tcp://127.0.0.1:31001, and files that are there",
            exit_code=2,
        )


def _source_addresses(settings: Settings) -> list[str]:
    """Those of all sockets of the source.

    Raises:
        ConfigError: an address that none can be.
    """
    from triage.config import addresses
    from triage.ingest.slsdetector import port_addresses

    endpoint = settings.source.endpoint
    is_sls = settings.source.protocol == "slsdetector"
    return port_addresses(endpoint) if is_sls else addresses(endpoint)


def _ports(settings: Settings) -> Iterator[Finding]:
    """Whether what is to be bound is free."""
    wanted = [
        ("[publish]", settings.publish.endpoint),
        ("[control]", settings.control.endpoint),
        ("[crystfel]", settings.crystfel.endpoint),
        ("[source]", settings.source.endpoint if settings.source.bind else ""),
        ("[forward]", settings.forward.endpoint if settings.forward.bind else ""),
    ]
    places = [
        (name, host_and_port)
        for name, endpoint in wanted
        for address in endpoint.split(",")
        if (host_and_port := _tcp(address.strip())) is not None
    ]
    if settings.metrics.port:
        places.append(("[metrics]", (settings.metrics.host, settings.metrics.port)))
    taken = [f"{name} {host}:{port}" for name, (host, port) in places if not _is_free(host, port)]
    if taken and _runs(settings):
        yield Finding(
            subject="ports",
            state="note",
            found="cannot be bound now: " + ", ".join(taken),
            remedy="triage runs with this [output] directory already, and may hold them",
        )
    elif taken:
        yield Finding(
            subject="ports",
            state="fail",
            found="cannot be bound now: " + ", ".join(taken),
            remedy="is triage running already? Else free them or choose others",
            exit_code=2,
        )
    elif places:
        yield Finding(subject="ports", state="ok", found=f"{len(places)} to bind, all free")


def _runs(settings: Settings) -> bool:
    """Whether a process holds the folder of these settings."""
    from triage.sinks.folder import is_held

    return bool(settings.output.directory) and is_held(Path(settings.output.directory))


def _tcp(endpoint: str) -> tuple[str, int] | None:
    """Host and port of an address, None where there is no one port."""
    transport, _, rest = endpoint.partition("://")
    host, _, port = rest.rpartition(":")
    if transport != "tcp" or not port.isdecimal():
        return None
    host = host.rpartition(";")[2].strip("[]")
    return ("" if host == "*" else host), int(port)


def _is_free(host: str, port: int) -> bool:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError:
        return False
    return True


_FITTING = {
    "pull": ("PUSH",),
    "sub": ("PUB", "XPUB"),
    "req": ("REP", "ROUTER"),
    "push": ("PULL",),
}
"""By our kind of socket the kinds that it talks with."""

_MUTE = "mute"


def kind_of_source(settings: Settings) -> str:
    """Our kind of socket, as the settings name it for the protocol."""
    if settings.source.protocol == "karabo":
        return settings.source.karabo_socket
    return "sub" if settings.source.protocol == "slsdetector" else settings.source.socket


def _peers(settings: Settings) -> Iterator[Finding]:
    """Whether what listens where triage is to connect is what it needs; no message is taken."""
    from triage.errors import ConfigError

    source, forward = settings.source, settings.forward
    try:
        streams = _source_addresses(settings)
    except ConfigError:
        streams = []  # said of the settings
    for subject, section, named, bind, kind, who in (
        ("detector", "[source]", streams, source.bind, kind_of_source(settings), "stream"),
        ("writer", "[forward]", forward.endpoint.split(","), forward.bind, "push", "writer"),
    ):
        places = [] if bind else [_tcp(address.strip()) for address in named]
        found = {f"{place[0]}:{place[1]}": _kind_at(*place) for place in places if place}
        silent = [where for where, peer in found.items() if peer is None]
        mute = [where for where, peer in found.items() if peer == _MUTE]
        wrong = [
            f"{where} {peer}"
            for where, peer in found.items()
            if peer and peer not in (*_FITTING[kind], _MUTE)
        ]
        if wrong:
            yield Finding(
                subject=subject,
                state="fail",
                found=f"a {kind.upper()} socket gets nothing to or from {', '.join(wrong)}",
                remedy=f"expected {' or '.join(_FITTING[kind])} there: is {section} right?",
                exit_code=2,
            )
        elif silent:
            yield Finding(
                subject=subject,
                state="note",
                found=f"nobody listens at {', '.join(silent)}",
                remedy=f"is {section} endpoint right, and the {who} enabled?",
            )
        elif mute:
            yield Finding(
                subject=subject,
                state="note",
                found=f"what listens at {', '.join(mute)} says nothing for {_CONNECT_S:g} s",
                remedy=f"expected {' or '.join(_FITTING[kind])} of ZeroMQ: does the {who} hang?",
            )
        elif any(places):
            peers = ", ".join(f"{where} {peer or 'with keys'}" for where, peer in found.items())
            yield Finding(subject=subject, state="ok", found=peers)


def _kind_at(host: str, port: int) -> str | None:
    """The kind of ZeroMQ socket at an address, "" for one that asks for keys, None for none."""
    from triage.sockets import peer_type

    try:
        with socket.create_connection((host, port), _CONNECT_S):
            pass
    except OSError:
        return None
    try:
        return peer_type(host, port, _CONNECT_S) or ""
    except TimeoutError:
        return _MUTE
    except OSError:
        return "which is no ZeroMQ socket"


def _output(settings: Settings) -> Finding:
    if not settings.output.directory:
        needed = settings.policy.mode == "enforce" or settings.output.write_kept
        state = "fail" if needed else "ok"
        return Finding(
            subject="output",
            state=state,
            found="nothing is written down",
            remedy="set [output] directory: enforce and write_kept need it"
            if state == "fail"
            else "",
            exit_code=2,
        )
    directory = Path(settings.output.directory).absolute()
    there = next(place for place in (directory, *directory.parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        return Finding(
            subject="output",
            state="fail",
            found=f"{there} cannot be written",
            remedy="choose another [output] directory, or give it to the user that runs triage",
            exit_code=2,
        )
    free = shutil.disk_usage(there).free
    return Finding(
        subject="output",
        state="ok" if free > _ROOM_BYTES else "note",
        found=f"{free / 1e9:.0f} GB free for {directory}",
        remedy="" if free > _ROOM_BYTES else "a full disk stops drops and kept frames: make room",
    )


def _orders(settings: Settings) -> Iterator[Finding]:
    """What stops all drops of the next run in this folder."""
    from triage.sinks.orders import orders_in

    if settings.output.directory and (found := orders_in(Path(settings.output.directory))):
        yield Finding(
            subject="orders",
            state="note",
            found="nothing will be dropped: " + "; ".join(found.values()),
            remedy="'triage ctl ENDPOINT resume' takes it back, or override.json removed there "
            "while triage is stopped",
        )


def _memory(settings: Settings) -> Finding:
    """The most that may be held, against what the machine has."""
    budget, largest = settings.pipeline.queue_bytes, settings.source.message_bytes
    sockets = settings.source.endpoint.count(",") + 1
    writers = settings.forward.endpoint.count(",") + 1
    received = max(budget // 4, 4 * largest * sockets)
    forwarded = max(budget // 8, 4 * largest * writers) if settings.forward.endpoint else 0
    written = budget // 8 if settings.output.directory else 0
    held = budget // 2 + received + forwarded + written + _PROCESS_BYTES
    held += settings.crystfel.queue_bytes if settings.crystfel.endpoint else 0
    held += _AUDIT_BYTES if settings.policy.audit_fraction else 0
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = f"at most {held / 1e9:.1f} GB of {total / 1e9:.1f} GB, {budget // 2 // largest} of the"
    found += " largest messages in line"
    if held > total:
        return Finding(
            subject="memory",
            state="fail",
            found=found,
            remedy="lower [pipeline] queue_bytes: before it is full the system ends the process",
        )
    few = budget // 2 // largest < 16
    return Finding(
        subject="memory",
        state="note" if few else "ok",
        found=found,
        remedy="raise [pipeline] queue_bytes: a short stall of the writer fills it" if few else "",
    )


def _service(file: Path) -> Finding:
    """Whether the unit that would run these settings is watched."""
    unit, program = f"triage@{file.stem}.service", shutil.which("systemctl")
    values: dict[str, str] = {}
    if program is not None:
        try:
            done = subprocess.run(
                [program, "show", unit, "-p", "LoadState", "-p", "Type", "-p", "WatchdogUSec"],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
            pairs = (line.partition("=") for line in done.stdout.splitlines())
            values = {key: value for key, _, value in pairs}
        except (OSError, subprocess.TimeoutExpired):
            pass
    if values.get("LoadState") != "loaded":
        return Finding(
            subject="service",
            state="note",
            found=f"{unit} is not known to a service manager here",
            remedy="install deploy/triage@.service: a process that hangs is then started anew",
        )
    watched = values.get("WatchdogUSec", "0") not in ("0", "infinity", "")
    notifies = values.get("Type", "").startswith("notify")
    return Finding(
        subject="service",
        state="ok" if watched and notifies else "note",
        found=f"{unit}: Type={values.get('Type')}, WatchdogSec={values.get('WatchdogUSec')}",
        remedy="" if watched and notifies else "use Type and WatchdogSec of deploy/triage@.service",
    )

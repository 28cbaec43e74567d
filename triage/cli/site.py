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

__all__ = ["Finding", "site_findings"]

_CONNECT_S = 2.0
_ROOM_BYTES = 10_000_000_000
_AUDIT_BYTES = 256 << 20
_PROCESS_BYTES = 1 << 30
"""What a process takes beside the frames it holds: libraries, model, a frame in each worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the doctor: ``state`` is ok, note or fail; ``remedy`` says the next step."""

    subject: str
    state: str
    found: str
    remedy: str = ""


def site_findings(settings: Settings, file: Path) -> Iterator[Finding]:
    """What is right and wrong with settings on this machine."""
    yield _decides(settings)
    yield _keys(settings)
    yield _exposure(settings)
    yield from _ports(settings)
    yield from _peers(settings)
    yield _output(settings)
    yield _memory(settings)
    yield _service(file)


def _decides(settings: Settings) -> Finding:
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
        return Finding(subject="keys", state="fail", found=str(err), remedy="see 'triage keygen'")
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
    if taken:
        yield Finding(
            subject="ports",
            state="note",
            found="cannot be bound now: " + ", ".join(taken),
            remedy="is triage running already? Else free them or choose others",
        )
    elif places:
        yield Finding(subject="ports", state="ok", found=f"{len(places)} to bind, all free")


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


def _peers(settings: Settings) -> Iterator[Finding]:
    """Whether somebody listens where triage is to connect: a connection of TCP takes no message."""
    for subject, section, endpoint, bind, who in (
        ("detector", "[source]", settings.source.endpoint, settings.source.bind, "stream"),
        ("writer", "[forward]", settings.forward.endpoint, settings.forward.bind, "writer"),
    ):
        places = [] if bind else [_tcp(address.strip()) for address in endpoint.split(",")]
        silent = [f"{place[0]}:{place[1]}" for place in places if place and not _answers(*place)]
        if silent:
            yield Finding(
                subject=subject,
                state="note",
                found=f"nobody listens at {', '.join(silent)}",
                remedy=f"is {section} endpoint right, and the {who} enabled?",
            )
        elif any(places):
            yield Finding(subject=subject, state="ok", found=f"something listens at {endpoint}")


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), _CONNECT_S):
            return True
    except OSError:
        return False


def _output(settings: Settings) -> Finding:
    if not settings.output.directory:
        state = "fail" if settings.policy.mode == "enforce" else "ok"
        return Finding(
            subject="output",
            state=state,
            found="nothing is written down",
            remedy="set [output] directory: enforce needs its journal" if state == "fail" else "",
        )
    directory = Path(settings.output.directory).absolute()
    there = next(place for place in (directory, *directory.parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        return Finding(
            subject="output",
            state="fail",
            found=f"{there} cannot be written",
            remedy="choose another [output] directory, or give it to the user that runs triage",
        )
    free = shutil.disk_usage(there).free
    return Finding(
        subject="output",
        state="ok" if free > _ROOM_BYTES else "note",
        found=f"{free / 1e9:.0f} GB free for {directory}",
        remedy="" if free > _ROOM_BYTES else "a full disk stops drops and kept frames: make room",
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

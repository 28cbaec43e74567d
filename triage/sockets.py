"""What the sockets share that others may connect to: who may, who is there, and with what keys.

Keys are CURVE pairs in ZeroMQ's certificate format, as ``triage keygen`` and pyzmq write them. A
socket that is made by a :class:`Doorkeeper`'s context asks it about everybody who connects; one
connection costs one question, a message nothing.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import re
import socket as tcp
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import zmq
import zmq.auth
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from triage.errors import ConfigError

__all__ = [
    "Connections",
    "Doorkeeper",
    "authorized_keys",
    "key_pair",
    "open_client",
    "peer_type",
    "public_key",
    "write_key_pair",
]

log = logging.getLogger(__name__)

_ZAP = "inproc://zeromq.zap.01"
_POLL_MS = 200
_REFUSALS_SAID = 100
"""A stranger that tries again and again must not fill the log."""

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def write_key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """Make ``NAME.key``, which may be told, and ``NAME.key_secret``, which only its owner reads.

    Raises:
        ConfigError: one of the files exists, or the folder cannot be written.
    """
    public, secret = (key.decode() for key in zmq.curve_keypair())
    told, kept = folder / f"{name}.key", folder / f"{name}.key_secret"
    head = "#   ZeroMQ CURVE {} certificate of braggtriage\n\nmetadata\ncurve\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if told.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(told))
        for path, mode, text in (
            (kept, 0o600, f'    public-key = "{public}"\n    secret-key = "{secret}"\n'),
            (told, 0o644, f'    public-key = "{public}"\n'),
        ):
            kind = "secret" if path is kept else "public"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with os.fdopen(os.open(path, flags, mode), "w", encoding="ascii") as file:
                file.write(head.format(kind) + text)
    except OSError as err:
        raise ConfigError(
            f"key file {err.filename}: {err.strerror}; expected a folder that can be written "
            "and a name that is free"
        ) from err
    return told, kept


def key_pair(path: Path) -> tuple[bytes, bytes]:
    """The public and the secret key of a secret key file.

    Raises:
        ConfigError: it cannot be read, holds no secret key, or others may read or change it.
    """
    try:
        mode = path.stat().st_mode
    except OSError as err:
        raise ConfigError(f"key file {path}: {err.strerror}; 'triage keygen' makes one") from err
    public, secret = _certificate(path)
    if secret is None:
        raise ConfigError(
            f"key file {path}: holds no secret key, only a public one; expected the "
            "NAME.key_secret that 'triage keygen' wrote beside it"
        )
    if mode & 0o027:
        raise ConfigError(
            f"key file {path}: mode {mode & 0o777:03o} lets others read or change a secret; "
            f"expected 600 or 640: chmod 600 {path}"
        )
    return public, secret


def public_key(path: Path) -> bytes:
    """The public key of a key file, in Z85.

    Raises:
        ConfigError: it cannot be read or holds none.
    """
    return _certificate(path)[0]


def _certificate(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as err:
        raise ConfigError(
            f"key file {path}: {getattr(err, 'strerror', None) or err}; expected a ZeroMQ "
            "certificate; 'triage keygen' makes one"
        ) from err
    for key in (public, secret):
        if key is not None and _raw(key) is None:
            raise ConfigError(f"key file {path}: expected keys of 40 characters in Z85")
    return public, secret


def _raw(key: bytes) -> bytes | None:
    """The 32 bytes of a key in Z85; None for what is no key."""
    if len(key) != 40:
        return None
    try:
        raw = z85.decode(key)
    except (ValueError, KeyError, OverflowError):
        return None
    return raw if len(raw) == 32 else None


def authorized_keys(place: Path) -> frozenset[bytes]:
    """The public keys, 32 bytes each, of those who may connect.

    Args:
        place: folder with ``*.key`` files, or a file with a key in each line; what follows the
            key in its line, and lines that begin with #, are for people.

    Raises:
        ConfigError: it cannot be read, or something in it is no key.
    """
    found: set[bytes] = set()
    try:
        if place.is_dir():
            keys = [(path, public_key(path)) for path in sorted(place.glob("*.key"))]
        else:
            lines = place.read_text(encoding="ascii").splitlines()
            keys = [
                (place, line.split()[0].encode())
                for line in lines
                if line.strip() and not line.startswith("#")
            ]
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(
            f"[security] authorized_keys {place}: {getattr(err, 'strerror', None) or err}; "
            "expected a folder of .key files or a file with a key in each line"
        ) from err
    for path, key in keys:
        raw = _raw(key)
        if raw is None:
            raise ConfigError(
                f"[security] authorized_keys {path}: {key.decode('ascii', 'replace')[:60]!r} is no "
                "key; expected 40 characters in Z85, as in NAME.key"
            )
        found.add(raw)
    return frozenset(found)


class Doorkeeper:
    """Answers, in a thread of its own, who may connect to the sockets of its context.

    Args:
        keys: the server's key pair; every socket of the context then speaks CURVE, and only those
            in ``clients`` are let in. None for plain sockets.
        clients: public keys of those who may connect, 32 bytes each.
        networks: addresses or networks from which anybody may connect; empty for all. Peers on
            this machine that come without an address are not asked for one.
        io_threads: of ZeroMQ, for the sockets of the context.

    Attributes:
        revoked: how often keys were taken off the list. libzmq asks when a connection is made and
            cannot end one: a socket is opened anew then by whoever has it.
    """

    def __init__(
        self,
        keys: tuple[bytes, bytes] | None,
        clients: frozenset[bytes] = frozenset(),
        networks: Sequence[_Network] = (),
        *,
        io_threads: int = 1,
    ) -> None:
        self.clients = clients
        self.networks = tuple(networks)
        self.refused = 0
        self.revoked = 0
        self._monitors: list[zmq.Socket[bytes]] = []
        self._watched = 0
        self._lock = threading.Lock()
        self._speaks_curve = keys is not None
        self.context: zmq.Context[Any] = zmq.Context(io_threads)
        self._socket = self.context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(_ZAP)
        # What is set on the context holds for every socket made from it, from here on.
        self.context.setsockopt(zmq.ZAP_DOMAIN, b"triage")
        if keys is not None:
            self.context.setsockopt(zmq.CURVE_SERVER, 1)
            self.context.setsockopt(zmq.CURVE_SECRETKEY, keys[1])
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="doorkeeper", daemon=True)
        self._thread.start()

    def let_in(self, clients: frozenset[bytes]) -> int:
        """Ask another list from here on; how many keys of the one before are not on it."""
        gone = len(self.clients - clients)
        self.clients = clients
        self.revoked += bool(gone)
        return gone

    def watch(self, socket: zmq.Socket[bytes]) -> None:
        """Say who is refused before there is a question: one who comes without a key."""
        with self._lock:
            self._watched += 1
            address = f"inproc://handshakes-{id(self)}-{self._watched}"
            # A client without keys sees that ours are asked for, and may be gone before its own
            # greeting was read: then there is no detail.
            failed = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            socket.monitor(address, failed | zmq.EVENT_MONITOR_STOPPED)
            monitor: zmq.Socket[bytes] = self.context.socket(zmq.PAIR)
            monitor.setsockopt(zmq.RCVHWM, 0)
            monitor.setsockopt(zmq.LINGER, 0)
            monitor.connect(address)
            self._monitors.append(monitor)

    def _work(self) -> None:
        while not self._closing.is_set():
            if self._socket.poll(_POLL_MS):
                request = self._socket.recv_multipart()
                self._socket.send_multipart(self._answer(request))
            with self._lock:
                self._monitors = [each for each in self._monitors if self._told_by(each)]

    def _told_by(self, monitor: zmq.Socket[bytes]) -> bool:
        """Say what a monitor tells; False when its socket is closed."""
        while monitor.poll(0):
            event = parse_monitor_message(monitor.recv_multipart())
            if event["event"] == zmq.EVENT_MONITOR_STOPPED:
                monitor.close()
                return False
            place = event["endpoint"].decode("ascii", "replace")
            why = "it has no key, is no ZeroMQ socket, or hung up"
            self._refuse(f"a connection at {place}", why)
        return True

    def _refuse(self, what: str, why: str) -> None:
        self.refused += 1
        if self.refused <= _REFUSALS_SAID:
            log.warning("refused %s: %s", what, why)

    def _answer(self, request: Sequence[bytes]) -> list[bytes]:
        """The reply of ZAP 1.0 (ZeroMQ RFC 27) to one request."""
        if len(request) < 6 or request[0] != b"1.0":
            return [b"1.0", request[1] if len(request) > 1 else b"", b"500", b"malformed", b"", b""]
        address, mechanism = request[3].decode("ascii", "replace"), request[5]
        key = request[6] if len(request) > 6 else b""
        why = self._refusal(address, mechanism, key)
        if why:
            self._refuse(f"a connection from {address or 'this machine'}", why)
            return [b"1.0", request[1], b"400", b"refused", b"", b""]
        return [b"1.0", request[1], b"200", b"OK", b"", b""]

    def _refusal(self, address: str, mechanism: bytes, key: bytes) -> str:
        if self.networks and not _is_within(address, self.networks):
            return "its address is not among [security] allowed_addresses"
        if not self._speaks_curve:
            return "" if mechanism == b"NULL" else "expected no keys"
        if mechanism != b"CURVE":
            return "it has no key"
        if key not in self.clients:
            shown = z85.encode(key).decode() if len(key) == 32 else "?"
            return f"its key {shown} is not among [security] authorized_keys"
        return ""

    def close(self) -> None:
        """Answer no more, and wait for the sockets of the context to be closed."""
        self._closing.set()
        self._thread.join()
        for monitor in self._monitors:
            monitor.close()
        self._socket.close()
        self.context.term()


def _is_within(address: str, networks: Iterable[_Network]) -> bool:
    try:
        found = ipaddress.ip_address(re.sub(r"%.*$", "", address))
    except ValueError:
        return True  # ipc and inproc: there is no address, and the file's mode decides
    plain = getattr(found, "ipv4_mapped", None) or found
    return any(plain in network for network in networks)


def open_client(
    context: zmq.Context[Any], kind: int, keys: tuple[bytes, bytes] | None, server: bytes | None
) -> zmq.Socket[bytes]:
    """A socket that connects to one of ours, with keys where both are given."""
    socket: zmq.Socket[bytes] = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    if keys is not None and server is not None:
        socket.setsockopt(zmq.CURVE_SERVERKEY, server)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys[0])
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys[1])
    return socket


_GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
"""Of ZMTP 3.0 (ZeroMQ RFC 23): signature, version, no security, no server."""

_VERSION_BYTES = 12
_COMMAND = 0x04


def peer_type(host: str, port: int, timeout_s: float) -> str | None:
    """The kind of ZeroMQ socket that listens at an address, such as ``PUSH``.

    Only the greeting is exchanged: the peer takes this for a connection that was not finished,
    and sends no message on it.

    Returns:
        None for what greets as a ZeroMQ socket and asks for keys.

    Raises:
        OSError: nothing listens there, or it does not answer as a ZeroMQ socket would in time.
    """
    until_s = time.monotonic() + timeout_s
    with tcp.create_connection((host, port), timeout_s) as connection:

        def read(size: int) -> bytes:
            got = b""
            while len(got) < size:
                connection.settimeout(max(0.001, until_s - time.monotonic()))
                piece = connection.recv(size - len(got))
                if not piece:
                    raise ConnectionAbortedError(errno.ECONNABORTED, "it hung up")
                got += piece
            return got

        # The rest is said once the peer has said how it is secured: it hangs up on a wrong answer.
        connection.sendall(_GREETING[:_VERSION_BYTES])
        greeting = read(len(_GREETING))
        if greeting[0] != 0xFF or greeting[9] != 0x7F or greeting[10] < 3:
            raise ConnectionAbortedError(errno.EPROTO, "it does not speak ZMTP 3")
        if greeting[12:32].rstrip(b"\0") != b"NULL":
            return None
        connection.sendall(_GREETING[_VERSION_BYTES:])
        flags, size = read(2)
        body = read(size)
        if flags != _COMMAND or body[:6] != b"\x05READY":
            raise ConnectionAbortedError(errno.EPROTO, "it does not say what kind of socket it is")
        return _properties(body[6:]).get("socket-type", "")


def _properties(text: bytes) -> dict[str, str]:
    """Of a READY command: names, which have no case, and values."""
    found = {}
    while text:
        name, text = text[1 : 1 + text[0]], text[1 + text[0] :]
        size = int.from_bytes(text[:4], "big")
        found[name.decode("ascii", "replace").lower()] = text[4 : 4 + size].decode(
            "ascii", "replace"
        )
        text = text[4 + size :]
    return found


class Connections:
    """Knows which sockets have a peer; ``watch`` before they connect or bind.

    :meth:`connected` is called from one thread, which need not be the one that uses the sockets.
    """

    def __init__(self) -> None:
        self._sockets: list[zmq.Socket[bytes]] = []
        self._monitors: list[zmq.Socket[bytes]] = []
        self._peers: list[set[int]] = []
        # A monitor that is closed by one thread while another looks at it ends the process.
        self._lock = threading.Lock()

    def watch(self, socket: zmq.Socket[bytes]) -> None:
        """Look at one more socket."""
        address = f"inproc://connections-{id(self)}-{len(self._monitors)}"
        socket.monitor(address, zmq.EVENT_CONNECTED | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        monitor: zmq.Socket[bytes] = socket.context.socket(zmq.PAIR)
        # ZeroMQ's own thread tells the events, and would stand still if they found no room.
        monitor.setsockopt(zmq.RCVHWM, 0)
        monitor.setsockopt(zmq.LINGER, 0)
        monitor.connect(address)
        self._sockets.append(socket)
        self._monitors.append(monitor)
        self._peers.append(set())

    def connected(self) -> tuple[int, int]:
        """How many sockets have a peer now, and how many there are."""
        with self._lock:
            for monitor, peers in zip(self._monitors, self._peers, strict=True):
                while not monitor.closed and monitor.poll(0):
                    event = parse_monitor_message(monitor.recv_multipart())
                    # The value is the connection's file descriptor.
                    if event["event"] == zmq.EVENT_DISCONNECTED:
                        peers.discard(event["value"])
                    else:
                        peers.add(event["value"])
            return sum(bool(peers) for peers in self._peers), len(self._peers)

    def close(self) -> None:
        """Watch no more; before the sockets are closed. May be called twice."""
        with self._lock:
            for socket, monitor in zip(self._sockets, self._monitors, strict=True):
                if not (monitor.closed or socket.closed):
                    socket.disable_monitor()
                monitor.close()

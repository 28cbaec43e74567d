"""The control socket: an operator asks a running triage what it does, or tells it.

REP, one JSON object in, one out; ``docs/schema/control-v1.json`` describes both. It is served by
a thread of its own and reaches the frames only through what :class:`Operated` offers, so a
request, whatever it holds, cannot hold up the stream.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Literal, Protocol

import msgspec
import zmq

from triage.errors import ConfigError, TriageError
from triage.sockets import Doorkeeper, open_client

__all__ = ["COMMANDS", "Answer", "Control", "Operated", "Request", "State", "ask", "schema"]

log = logging.getLogger(__name__)

_REQUEST_BYTES = 4096
_TEXT_CHARS = 500
_POLL_MS = 100


class Request(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What an operator asks.

    ``state`` changes nothing. ``reload`` reads the settings anew. ``shadow`` and ``open_gate``
    stop all drops at once, in this run and those after it, until ``resume`` takes them back.
    ``drain`` ends the run as SIGTERM does.
    """

    v: Literal[1]
    type: Literal["state", "reload", "shadow", "open_gate", "resume", "drain"]


COMMANDS = ("state", "reload", "shadow", "open_gate", "resume", "drain")


class State(msgspec.Struct, kw_only=True):
    """What a run does. Counts are those of the whole run; null = nothing measured yet."""

    version: str
    state: Literal["starting", "ready", "armed", "degraded", "draining", "stopped"]
    degraded: dict[str, str]
    series: list[str]
    mode: Literal["shadow", "enforce"]
    gate_open: bool
    model_id: str
    policy_id: str
    p_blank_veto: float
    audit_fraction: float
    audit_limit: float
    all_heads: bool
    log_level: str
    uptime_s: float
    received: int
    forwarded: int
    dropped: int
    undecided: int
    missing: int
    malformed: int
    queue_frames: int
    queue_bytes: int
    latency_p50_us: float | None
    latency_p99_us: float | None


class Answer(msgspec.Struct, kw_only=True):
    """What comes back: ``ok`` and the state after it, or why it was refused or not done whole.

    ``changed`` names the settings that a reload changed.
    """

    v: Literal[1] = 1
    type: str
    ok: bool
    error: str = ""
    changed: list[str] = []
    state: State | None = None


class Operated(Protocol):
    """What a run lets an operator do; ``triage.operation.Operation`` is one."""

    def state(self) -> State: ...

    def reload(self) -> list[str]: ...

    def shadow(self) -> None: ...

    def open_gate(self) -> None: ...

    def resume(self) -> None: ...

    def drain(self) -> None: ...


def schema() -> dict[str, Any]:
    """The JSON Schema of requests and answers."""
    references, definitions = msgspec.json.schema_components(
        (Request, Answer), ref_template="#/$defs/{name}"
    )
    return {"oneOf": list(references), "$defs": definitions}


def ask(
    endpoint: str,
    command: str,
    *,
    timeout_s: float,
    keys: tuple[bytes, bytes] | None = None,
    server: bytes | None = None,
) -> bytes:
    """Send one request to a running triage; the answer as it came.

    Args:
        keys: the client's key pair, where the socket asks for keys.
        server: the public key of the running triage, with it.

    Raises:
        ConfigError: an address that cannot be used.
        TriageError: no answer in time.
    """
    context: zmq.Context[Any] = zmq.Context()
    socket = open_client(context, zmq.REQ, keys, server)
    try:
        socket.connect(endpoint)
        socket.send(msgspec.json.encode(Request(v=1, type=command)))  # type: ignore[arg-type]
        if not socket.poll(round(timeout_s * 1000)):
            raise TriageError(
                f"{endpoint}: no answer in {timeout_s:g} s; is triage running with this [control] "
                "endpoint, and is your key among its [security] authorized_keys?"
            )
        return socket.recv()
    except zmq.ZMQError as err:
        raise ConfigError(
            f"{endpoint}: {err}; expected an address such as tcp://127.0.0.1:31005"
        ) from err
    finally:
        socket.close()
        context.term()


class Control:
    """Serves requests at an address until closed.

    Args:
        endpoint: where to bind, ``tcp://127.0.0.1:*`` for any free port.
        context: of the sockets that ask for keys; None for a plain one.
        doorkeeper: of the context; when keys were taken off its list, everybody must connect anew.

    Raises:
        ConfigError: the address cannot be bound.
    """

    def __init__(
        self,
        endpoint: str,
        operated: Operated,
        *,
        context: zmq.Context[Any] | None = None,
        doorkeeper: Doorkeeper | None = None,
    ) -> None:
        self._operated = operated
        self._actions: dict[str, Callable[[], list[str] | None]] = {
            "state": lambda: None,
            "reload": operated.reload,
            "shadow": operated.shadow,
            "open_gate": operated.open_gate,
            "resume": operated.resume,
            "drain": operated.drain,
        }
        self._own_context = context is None
        self._context: zmq.Context[Any] = context or zmq.Context()
        self._doorkeeper = doorkeeper
        self._revoked = doorkeeper.revoked if doorkeeper is not None else 0
        self._socket = self._made()
        self._closing = threading.Event()
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as err:
            self._release()
            raise ConfigError(
                f"[control] endpoint = {endpoint!r}: {err}; expected a free address to bind"
            ) from err
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._thread = threading.Thread(target=self._serve, name="control", daemon=True)
        self._thread.start()

    def _made(self) -> zmq.Socket[bytes]:
        made: zmq.Socket[bytes] = self._context.socket(zmq.REP)
        made.setsockopt(zmq.LINGER, 500)
        # Whoever sends more is disconnected before it takes memory here.
        made.setsockopt(zmq.MAXMSGSIZE, 16 * _REQUEST_BYTES)
        if self._doorkeeper is not None:
            self._doorkeeper.watch(made)
        return made

    def _open_anew(self, revoked: int) -> None:
        """Bind a new socket at the same address; whoever was connected is asked for a key again."""
        self._socket.close()
        self._socket = self._made()
        while not self._closing.is_set():
            try:
                self._socket.bind(self.endpoint)
            except zmq.ZMQError:
                self._closing.wait(_POLL_MS * 1e-3)  # the old one is not closed whole yet
            else:
                self._revoked = revoked
                return

    def _serve(self) -> None:
        while not self._closing.is_set():
            if self._doorkeeper is not None and self._doorkeeper.revoked != self._revoked:
                self._open_anew(self._doorkeeper.revoked)
            if self._socket.poll(_POLL_MS):
                parts = self._socket.recv_multipart()
                answer = msgspec.json.encode(self._answer(parts))
                try:
                    self._socket.send(answer, zmq.NOBLOCK)
                except zmq.ZMQError as err:
                    log.warning("control: an answer could not be sent: %s", err)

    def _answer(self, parts: list[bytes]) -> Answer:
        try:
            request = _parsed(parts)
        except msgspec.MsgspecError as err:
            return Answer(
                ok=False,
                type="malformed",
                error=f'{err}; expected one JSON object such as {{"v":1,"type":"state"}} with '
                f"one of the types {', '.join(COMMANDS)}"[:_TEXT_CHARS],
            )
        try:
            changed = self._actions[request.type]()
            if request.type != "state":
                log.warning("control: %s, as an operator asked", request.type)
            state = self._operated.state()
        except TriageError as err:
            log.error("control: %s, as an operator asked: %s", request.type, err)
            return Answer(ok=False, type=request.type, error=str(err)[:_TEXT_CHARS])
        except Exception as err:  # the socket must outlive any one request
            log.exception("control: %s failed", request.type)
            return Answer(ok=False, type=request.type, error=f"{type(err).__name__}: see the log")
        return Answer(ok=True, type=request.type, changed=changed or [], state=state)

    def close(self) -> None:
        """Answer no more; may be called twice."""
        self._closing.set()
        self._thread.join(5.0)
        self._release()

    def _release(self) -> None:
        self._socket.close()
        if self._own_context:
            self._context.term()


_decoder = msgspec.json.Decoder(Request)


def _parsed(parts: list[bytes]) -> Request:
    if len(parts) != 1:
        raise msgspec.ValidationError(f"{len(parts)} parts came")
    if len(parts[0]) > _REQUEST_BYTES:
        raise msgspec.ValidationError(f"{len(parts[0])} bytes came, at most {_REQUEST_BYTES} go")
    return _decoder.decode(parts[0])

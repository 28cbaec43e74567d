"""Decisions on the wire: XPUB, topic then JSON, for anyone who listens.

A publisher may lose messages, so a missing decision means keep; the forwarder acts on a veto,
never a listener. Nothing here waits: a slow listener loses messages, not frames.
"""

from __future__ import annotations

import contextlib
from collections import Counter as Tally
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec
import zmq

from triage.errors import ConfigError
from triage.records import Decision, SeriesReport
from triage.sockets import Doorkeeper

__all__ = ["DecisionMessage", "HelloMessage", "Publisher", "SeriesReportMessage", "schema"]

_SEND_HWM = 10_000
"""Decisions a slow listener may lag behind: some seconds at full rate, about 5 MB."""

_TOPIC_BYTES = 4096

_HEARD_AT_ONCE = 1000
"""Subscriptions that are looked at before frames go on: who sends more and more holds up none."""


class DecisionMessage(msgspec.Struct, kw_only=True):
    """Topic ``decision/1/<series_id>/``. Fields as in ``decisions.parquet``; null = not scored."""

    v: int = 1
    type: Literal["decision"] = "decision"
    series_id: int
    series_unique_id: str
    image_id: int
    file: str
    frame: int
    verdict: Literal["keep", "veto"]
    reason: str
    forwarded: bool
    override: Literal["", "shadow", "audit", "gate_open"]
    p_blank: float | None
    p_ice: float | None
    p_bad_ice: float | None
    p_multilattice: float | None
    quality: float | None
    n_lattices: float | None
    mosaicity_deg: float | None
    d_vis_angstrom: float | None
    uncertainty: float | None
    ood: bool
    model_id: str
    policy_id: str
    latency_us: float | None


class HelloMessage(msgspec.Struct, kw_only=True):
    """Topic ``hello/1/``, at each start, to each new subscriber, and when what it says changes.

    With ``gate_open`` nothing is dropped, whatever the mode.
    """

    v: int = 1
    type: Literal["hello"] = "hello"
    version: str
    model_id: str
    recipe_fingerprint: str
    policy_id: str
    mode: Literal["shadow", "enforce"]
    thresholds: dict[str, float]
    gate_open: bool = False


class SeriesReportMessage(msgspec.Struct, kw_only=True):
    """Topic ``series_report/1/<series_id>/``: the ledger of a series at its end."""

    v: int = 1
    type: Literal["series_report"] = "series_report"
    series_id: int
    series_unique_id: str
    received: int
    forwarded: int
    dropped: int
    undecided: int
    missing: int
    duplicates: int
    control: int
    malformed: int
    kept: int
    vetoed: int
    balanced: bool
    by_reason: dict[str, int]
    by_override: dict[str, int]
    in_doubt: int
    restarts: int


def schema() -> dict[str, Any]:
    """The JSON Schema of everything published."""
    messages = (DecisionMessage, HelloMessage, SeriesReportMessage)
    references, definitions = msgspec.json.schema_components(
        messages, ref_template="#/$defs/{name}"
    )
    return {"oneOf": list(references), "$defs": definitions}


def decision_message(decision: Decision) -> DecisionMessage:
    """The wire form of one decision; the encoder writes what is not finite as null."""
    scores = decision.scores
    return DecisionMessage(
        series_id=decision.series_id,
        series_unique_id=decision.series_unique_id,
        image_id=decision.image_id,
        file=decision.file,
        frame=decision.frame,
        verdict=decision.verdict.value,
        reason=decision.reason.value,
        forwarded=decision.forwarded,
        override=decision.override.value,
        p_blank=scores.p_blank,
        p_ice=scores.p_ice,
        p_bad_ice=scores.p_bad_ice,
        p_multilattice=scores.p_multilattice,
        quality=scores.quality,
        n_lattices=scores.n_lattices,
        mosaicity_deg=scores.mosaicity_deg,
        d_vis_angstrom=scores.d_vis_angstrom,
        uncertainty=scores.uncertainty,
        ood=scores.ood,
        model_id=decision.model_id,
        policy_id=decision.policy_id,
        latency_us=decision.latency_us,
    )


class Publisher:
    """An XPUB socket. Used from one thread.

    Args:
        endpoint: where to bind, ``tcp://127.0.0.1:*`` for any free port.
        hello: makes the greeting, asked for anew each time it is sent.
        doorkeeper: of the context; when keys were taken off its list, everybody must connect anew.

    Attributes:
        gate_open: told in the greeting.
    """

    def __init__(
        self,
        endpoint: str,
        hello: Callable[[], HelloMessage],
        *,
        context: zmq.Context[Any] | None = None,
        doorkeeper: Doorkeeper | None = None,
    ) -> None:
        self._hello = hello
        self._doorkeeper = doorkeeper
        self._revoked = doorkeeper.revoked if doorkeeper is not None else 0
        self.gate_open = False
        # A score may be a numpy scalar.
        self._encoder = msgspec.json.Encoder(enc_hook=float)
        self._own_context = context is None
        self._context = context or zmq.Context()
        self._socket = self._made()
        self._listeners: Tally[bytes] = Tally()
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as err:
            self.close()
            raise ConfigError(
                f"[publish] endpoint = {endpoint!r}: {err}; expected a free address to bind"
            ) from err
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _made(self) -> zmq.Socket[bytes]:
        made: zmq.Socket[bytes] = self._context.socket(zmq.XPUB)
        made.setsockopt(zmq.SNDHWM, _SEND_HWM)
        made.setsockopt(zmq.LINGER, 500)
        # What comes in are names of topics.
        made.setsockopt(zmq.MAXMSGSIZE, _TOPIC_BYTES)
        # Every subscription and its end is told, also of a repeated topic: each newcomer is
        # greeted, and while nobody listens nothing need be put into words.
        made.setsockopt(zmq.XPUB_VERBOSER, 1)
        if self._doorkeeper is not None:
            self._doorkeeper.watch(made)
        return made

    def _open_anew(self, revoked: int) -> None:
        """Bind a new socket at the same address; whoever listened is asked for a key again.

        While the old one is not closed whole the address is taken: then the next call tries.
        """
        self._socket.close()
        self._socket = self._made()
        self._listeners.clear()
        with contextlib.suppress(zmq.ZMQError):
            self._socket.bind(self.endpoint)
            self._revoked = revoked

    def greet_newcomers(self) -> None:
        """Send hello once when anyone has subscribed since the last call."""
        if self._doorkeeper is not None and self._doorkeeper.revoked != self._revoked:
            self._open_anew(self._doorkeeper.revoked)
        newcomer = False
        for _ in range(_HEARD_AT_ONCE):
            if not int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                break
            said = self._socket.recv_multipart(zmq.NOBLOCK)
            # An XSUB may say anything, and end subscriptions that it never had.
            if len(said) != 1 or said[0][:1] not in (b"\0", b"\1"):
                continue
            topic, came = said[0][1:], said[0][:1] == b"\1"
            newcomer = newcomer or came
            count = self._listeners[topic] + (1 if came else -1)
            if count > 0:
                self._listeners[topic] = count
            else:
                self._listeners.pop(topic, None)
        if newcomer:
            self.hello()

    def hello(self) -> None:
        """Say who decides, with what model, thresholds and mode, and whether the gate is open."""
        self._send(b"hello/1/", msgspec.structs.replace(self._hello(), gate_open=self.gate_open))

    def tell(self, decisions: Sequence[Decision]) -> None:
        """Tell decisions, one message each."""
        if not self._listeners:
            return
        for decision in decisions:
            self._send(b"decision/1/%d/" % decision.series_id, decision_message(decision))

    def series_report(self, report: SeriesReport) -> None:
        """Tell the ledger of a series."""
        message = SeriesReportMessage(
            series_id=report.series_id,
            series_unique_id=report.series_unique_id,
            received=report.received,
            forwarded=report.forwarded,
            dropped=report.dropped,
            undecided=report.undecided,
            missing=report.missing,
            duplicates=report.duplicates,
            control=report.control,
            malformed=report.malformed,
            kept=report.kept,
            vetoed=report.vetoed,
            balanced=report.balanced,
            by_reason=dict(report.by_reason),
            by_override=dict(report.by_override),
            in_doubt=report.in_doubt,
            restarts=report.restarts,
        )
        self._send(b"series_report/1/%d/" % report.series_id, message)

    def _send(self, topic: bytes, message: msgspec.Struct) -> None:
        body = self._encoder.encode(message)
        # An XPUB takes everything, and leaves out listeners that have no room.
        self._socket.send(topic, zmq.SNDMORE | zmq.NOBLOCK)
        self._socket.send(body, zmq.NOBLOCK)

    def close(self) -> None:
        """Close the socket; may be called twice."""
        self._socket.close()
        if self._own_context:
            self._context.term()

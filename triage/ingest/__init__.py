"""Sources: where frames come from, live or recorded.

A source turns bytes into :class:`triage.records.Message` and keeps the pixels compressed. It
knows nothing of scores or verdicts. Its one invariant: every image message received becomes
exactly one ``Message`` of kind ``image``, whatever is wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from triage.errors import ConfigError
from triage.records import Message

if TYPE_CHECKING:
    from triage.config import Settings
    from triage.metrics import Metrics

__all__ = ["HoldingSource", "LiveSource", "Source", "open_source"]


class Source(Protocol):
    """What the pipeline reads. ``subscriber.Subscriber`` and ``files.Files`` are two of them."""

    def receive(self, timeout_ms: int) -> list[Message]:
        """Messages in arrival order, at most a few; empty when ``timeout_ms`` passed."""
        ...

    @property
    def exhausted(self) -> bool:
        """True when nothing more can come; a live source never is."""
        ...

    def close(self) -> None:
        """Release sockets or files; may be called twice."""
        ...


class LiveSource(Source, Protocol):
    """A source that reads sockets."""

    @property
    def endpoint(self) -> str:
        """The addresses it reads, separated by commas; wildcards resolved."""
        ...


@runtime_checkable
class HoldingSource(Protocol):
    """A source that keeps messages back until what belongs to them has come."""

    def flush(self) -> list[Message]:
        """What is kept back, as it stands; asked for when no more is read."""
        ...


def open_source(settings: Settings, metrics: Metrics) -> LiveSource:
    """The live source that ``[source] protocol`` names, connected.

    Raises:
        ConfigError: an address or kind of socket that cannot be used; enforce with a source
            that is only a tap.
    """
    return _OPENERS[settings.source.protocol](settings, metrics)


def _subscriber(settings: Settings, metrics: Metrics) -> LiveSource:
    from triage.ingest.subscriber import Subscriber

    source = settings.source
    return Subscriber(
        source.endpoint,
        socket=source.socket,
        bind=source.bind,
        protocol=source.protocol,
        channel=source.channel,
        queue_bytes=settings.pipeline.queue_bytes,
        message_bytes=source.message_bytes,
        io_threads=source.io_threads,
    )


def _karabo(settings: Settings, metrics: Metrics) -> LiveSource:
    from triage.ingest.karabo import KaraboBridge

    source = settings.source
    if settings.policy.mode == "enforce":
        raise ConfigError(
            "[policy] mode = 'enforce' with [source] protocol = 'karabo': a bridge is a tap beside "
            "the facility's recorder, so nothing can be dropped here; expected mode = 'shadow'"
        )
    if source.bind or "," in source.endpoint:
        raise ConfigError(
            f"[source] endpoint = {source.endpoint!r}, bind = {source.bind}: expected the one "
            "address of a bridge to connect to, when protocol = 'karabo'"
        )
    return KaraboBridge(
        source.endpoint,
        socket=source.karabo_socket,
        source=source.karabo_source,
        path=source.karabo_path,
        order=source.karabo_order,
        metrics=metrics,
    )


_OPENERS: Mapping[str, Callable[[Settings, Metrics], LiveSource]] = {
    "auto": _subscriber,
    "stream2": _subscriber,
    "stream1": _subscriber,
    "jungfraujoch": _subscriber,
    "karabo": _karabo,
}
"""By protocol; each imports its source when it is asked for."""

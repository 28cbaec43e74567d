"""Sources: where frames come from, live or recorded.

A source turns bytes into :class:`triage.records.Message` and keeps the pixels compressed. It
knows nothing of scores or verdicts. Its one invariant: every image message received becomes
exactly one ``Message`` of kind ``image``, whatever is wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from triage.errors import ConfigError
from triage.records import Begun, Message

if TYPE_CHECKING:
    import zmq

    from triage.config import Settings
    from triage.ingest.series import SeriesBook
    from triage.ingest.slsdetector import SlsAssembler
    from triage.metrics import Metrics

__all__ = [
    "KNOWN_PROTOCOLS",
    "ConnectedSource",
    "ContinuingSource",
    "HoldingSource",
    "LiveSource",
    "PortedSource",
    "Reader",
    "Source",
    "open_reader",
    "open_source",
]


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


@runtime_checkable
class ConnectedSource(Protocol):
    """A source that can tell who is connected to it."""

    def connected(self) -> tuple[int, int]:
        """How many sockets have a peer now, and how many there are; asked by one thread, any."""
        ...


@runtime_checkable
class PortedSource(Protocol):
    """A source that puts its frames together from several ports."""

    @property
    def trouble(self) -> str:
        """Which ports are silent while others send, "" while none is; asked by any thread."""
        ...


@runtime_checkable
class ContinuingSource(Protocol):
    """A source that can go on with series whose beginning an earlier process received."""

    def go_on_with(self, series: Sequence[Begun]) -> None:
        """Know them; before the first call of ``receive``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """What a live source does with the messages of its sockets, for messages that come elsewise.

    Attributes:
        take: what can go on now that a message has come: (parts, received_ns, lane).
        due: what has waited long enough at a time in ns.
        flush: what is kept back, as it stands, when no more comes.
    """

    take: Callable[[Sequence[Any], int, int], Sequence[Message]]
    due: Callable[[int], Sequence[Message]]
    flush: Callable[[], Sequence[Message]]


def open_reader(settings: Settings, protocol: str, lanes: int) -> Reader:
    """What reads the messages of ``lanes`` sockets of a protocol as :func:`open_source` would.

    Raises:
        ConfigError: no such protocol.
    """
    if protocol == "karabo":
        from triage.ingest.karabo import TrainParser

        source = settings.source
        trains = TrainParser(
            source=source.karabo_source,
            path=source.karabo_path,
            order=source.karabo_order,
            book=_series_book(settings),
        )
        return Reader(
            take=lambda parts, received_ns, lane: trains.parse(parts, received_ns),
            due=lambda now_ns: (),
            flush=lambda: trains.ended(0),
        )
    if protocol == "slsdetector":
        modules = _assembler(settings)(lanes)
        return Reader(take=modules.take, due=modules.due, flush=modules.flush)
    from triage.ingest.dectris import PROTOCOLS, DectrisStream

    if protocol not in PROTOCOLS:
        raise ConfigError(f"protocol {protocol!r}; expected one of {', '.join(KNOWN_PROTOCOLS)}")
    stream = DectrisStream(
        lanes, _series_book(settings), protocol=protocol, channel=settings.source.channel
    )
    return Reader(take=stream.take, due=lambda now_ns: (), flush=lambda: ())


def open_source(
    settings: Settings, metrics: Metrics, *, context: zmq.Context[Any] | None = None
) -> LiveSource:
    """The live source that ``[source] protocol`` names, connected.

    Args:
        context: of its sockets; None for one of its own.

    Raises:
        ConfigError: an address or kind of socket that cannot be used.
    """
    return _OPENERS[settings.source.protocol](settings, metrics, context)


def _subscriber(
    settings: Settings, metrics: Metrics, context: zmq.Context[Any] | None
) -> LiveSource:
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
        context=context,
        book=_series_book(settings),
    )


def _series_book(settings: Settings) -> SeriesBook:
    """An empty book that knows what the settings tell of the experiment."""
    from triage.ingest.series import SeriesBook
    from triage.records import Geometry

    told = settings.geometry
    return SeriesBook(
        geometry=Geometry.from_values(
            beam_center_x_px=told.beam_center_x_px,
            beam_center_y_px=told.beam_center_y_px,
            pixel_size_x_m=told.pixel_size_m,
            pixel_size_y_m=told.pixel_size_m,
            detector_distance_m=told.detector_distance_m,
            incident_wavelength_angstrom=told.incident_wavelength_angstrom,
        ),
        increments_deg=(
            {"omega": told.rotation_increment_deg}
            if told.rotation_increment_deg is not None
            else None
        ),
    )


def _slsdetector(
    settings: Settings, metrics: Metrics, context: zmq.Context[Any] | None
) -> LiveSource:
    from triage.ingest.slsdetector import SlsReceivers

    source = settings.source
    return SlsReceivers(
        source.endpoint,
        _assembler(settings),
        queue_bytes=settings.pipeline.queue_bytes,
        message_bytes=source.message_bytes,
        io_threads=source.io_threads,
        context=context,
        metrics=metrics,
        wait_ns=source.part_wait_ms * 1_000_000,
    )


def _assembler(settings: Settings) -> Callable[[int], SlsAssembler]:
    """What makes the assembler of a number of sockets, with the maps that the settings name."""
    from triage.ingest.calibration import load_maps
    from triage.ingest.slsdetector import SlsAssembler

    source = settings.source
    maps = None
    if source.pedestal_file:
        maps = load_maps(
            Path(source.pedestal_file),
            Path(source.gain_file),
            settings.geometry.incident_wavelength_angstrom,
        )
    return lambda lanes: SlsAssembler(
        lanes,
        _series_book(settings),
        maps=maps,
        gap_px=(source.module_gap_y_px, source.module_gap_x_px),
        wait_ns=source.part_wait_ms * 1_000_000,
        held_bytes=settings.pipeline.queue_bytes // 8,
    )


def _karabo(settings: Settings, metrics: Metrics, context: zmq.Context[Any] | None) -> LiveSource:
    from triage.ingest.karabo import KaraboBridge

    source = settings.source
    return KaraboBridge(
        source.endpoint,
        socket=source.karabo_socket,
        source=source.karabo_source,
        path=source.karabo_path,
        order=source.karabo_order,
        context=context,
        book=_series_book(settings),
        metrics=metrics,
    )


_OPENERS: Mapping[str, Callable[[Settings, Metrics, zmq.Context[Any] | None], LiveSource]] = {
    "auto": _subscriber,
    "stream2": _subscriber,
    "stream1": _subscriber,
    "jungfraujoch": _subscriber,
    "karabo": _karabo,
    "slsdetector": _slsdetector,
}
"""By protocol; each imports its source when it is asked for."""

KNOWN_PROTOCOLS = tuple(_OPENERS)

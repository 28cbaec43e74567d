"""What a run finds of the run before it in its folder, and how it goes on with that."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triage.config import Settings
    from triage.ledger import Ledger
    from triage.ledger.state import Handed, Lasting, LedgerState, Recovered
    from triage.records import Begun
    from triage.sinks.folder import RunFolder

__all__ = ["Books", "opened_books"]

log = logging.getLogger(__name__)

_LINGER_S = 29.0
"""The forwarder waits 30 s for its writers at the end; one that waited so long gave up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Earlier:
    """What is gone on with.

    Attributes:
        run_id: of the run before; "" when there is nothing of one.
        died: it did not end in order.
        series: its series that it did not report, or that may still be running.
        begun: those that may still be running, for the source.
        set_aside: why its state could not be read, "" when it could or there was none.
    """

    run_id: str = ""
    died: bool = False
    series: Sequence[Lasting] = ()
    begun: Sequence[Begun] = ()
    set_aside: str = ""

    def said(self) -> list[str]:
        """For an operator: nothing when there is nothing to say."""
        lines = [f"books of the run before: {self.set_aside}"] if self.set_aside else []
        if self.died:
            lines.append(f"run {self.run_id} did not end in order; its books are gone on with")
        for series in self.series:
            if self.died or not series.over:
                lines.append(_said_of(series))
        return lines


def _said_of(series: Lasting) -> str:
    account = series.account
    name = f"series {series.key[0]} {series.key[1]}".rstrip()
    text = (
        f"{name}: {account.received} received, {account.forwarded} forwarded, "
        f"{account.dropped} dropped, {account.received - account.forwarded - account.dropped} "
        f"undecided, {account.missing} missing so far"
    )
    if series.in_doubt:
        text += f"; at most {len(series.in_doubt)} of them did not reach the writer"
    if series.start_in_doubt:
        text += "; its start message may not have reached the writer"
    return text


@dataclass(slots=True, kw_only=True)
class Books:
    """The counts of a run, and where they outlive it; left behind every sink.

    Attributes:
        state: None where it could not be made; then nothing is gone on with after a kill.
    """

    folder: RunFolder
    ledger: Ledger
    state: LedgerState | None = None
    _closing_s: float = field(default_factory=time.monotonic)

    def forwarder_closes(self) -> None:
        """The forwarder is about to be closed."""
        self._closing_s = time.monotonic()

    def given(self) -> list[Handed]:
        """For each writer what notes the messages that ZeroMQ is given."""
        if self.state is None:
            return []
        return [self.state.handed(writer) for writer in range(self.state.writers)]

    def __enter__(self) -> Books:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.state is not None:
            in_time = time.monotonic() - self._closing_s < _LINGER_S
            self.state.close(sent=kind is None and in_time)


@contextlib.contextmanager
def opened_books(settings: Settings, directory: Path, *, live: bool) -> Iterator[Books]:
    """Take the folder of a run, and, live, go on with the books of the run before in it.

    Raises:
        ConfigError: another process writes into the folder.
    """
    from triage.ledger import Ledger
    from triage.sinks.folder import RunFolder

    folder = RunFolder(directory)
    try:
        with (
            _continued(settings, folder)
            if live
            else Books(folder=folder, ledger=Ledger(run_id=folder.run_id)) as books
        ):
            yield books
    finally:
        folder.close()


def _continued(settings: Settings, folder: RunFolder) -> Books:
    from triage.ledger import Ledger
    from triage.ledger.state import LedgerState
    from triage.sinks.folder import state_folder
    from triage.sinks.forwarder import high_water_marks

    earlier = _Earlier()
    try:
        place = state_folder(folder.path, settings.output.state_directory, is_new=folder.is_new)
        earlier = _found(place, folder)
        state = LedgerState(
            place,
            run_id=folder.run_id,
            marks=high_water_marks(
                settings.forward.endpoint,
                settings.pipeline.queue_bytes // 8,
                settings.source.message_bytes,
            ),
            earlier=earlier.series,
        )
    except OSError as err:
        log.error(
            "state of the ledger: %s; the run goes on, and begins anew if it is killed: set "
            "[output] state_directory to a folder that can be written",
            err,
        )
        state = None
    unreported = {s.key: s.account for s in earlier.series if earlier.died}
    reported = {s.key: s.account for s in earlier.series if not earlier.died}
    for line in earlier.said():
        log.warning(line)
    ledger = Ledger(
        state,
        earlier=unreported,
        resting=reported,
        begun=earlier.begun,
        run_id=folder.run_id,
        goes_on_with=earlier.run_id if earlier.series else "",
    )
    return Books(folder=folder, ledger=ledger, state=state)


def _found(place: Path, folder: RunFolder) -> _Earlier:
    """What the run before left in ``place``."""
    from triage.ledger.state import StateError, begun, recovered
    from triage.sinks.journal import dropped_by

    try:
        before = recovered(place)
    except StateError as err:
        aside = place / "ledger.state.broken"
        with contextlib.suppress(OSError):
            (place / "ledger.state").replace(aside)
        why = f"{err}; set aside as {aside.name}, counting begins anew"
        log.error("state of the ledger: %s", why)
        return _Earlier(set_aside=why)
    if before is None:
        return _Earlier()
    dropped = dropped_by(folder.path / "journal.jsonl", before.run_id)
    for series in before.series:
        series.settle(dropped)
    open_series = [each for each in before.series if not (before.ended and each.over)]
    if not before.ended:
        folder.note_recovery([_noted(each, before, folder.run_id) for each in open_series])
    return _Earlier(
        run_id=before.run_id,
        died=not before.ended,
        series=open_series,
        begun=[begun(place, each) for each in open_series if not each.over],
    )


def _noted(series: Lasting, before: Recovered, run_id: str) -> dict[str, Any]:
    from triage.ledger.state import ranges

    return {
        "run_id": run_id,
        "died": before.run_id,
        "series_id": series.key[0],
        "series_unique_id": series.key[1],
        "received": series.account.received,
        "forwarded": series.account.forwarded,
        "dropped": series.account.dropped,
        "undecided": ranges(image_id for _, image_id in series.waiting),
        "in_doubt": ranges(image_id for _, image_id in series.in_doubt),
        "start_in_doubt": series.start_in_doubt,
    }

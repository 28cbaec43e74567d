"""The counts that must balance: received = forwarded + dropped + undecided.

The ledger is told of every image message once when it is received and once when it is
released. It is kept by the pipeline under one lock and read by anyone.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from triage.records import (
    Decision,
    Frame,
    Message,
    MessageKind,
    Override,
    Reason,
    Series,
    SeriesReport,
    Verdict,
)

__all__ = ["Ledger"]

_NO_SERIES = (-1, "")


@dataclass(slots=True)
class _Account:
    """What is known of one series so far."""

    received: int = 0
    forwarded: int = 0
    dropped: int = 0
    duplicates: int = 0
    control: int = 0
    malformed: int = 0
    kept: int = 0
    vetoed: int = 0
    numbered: int = 0
    first_expected: int | None = None
    last_seen: int = -1
    by_reason: Counter[Reason] = field(default_factory=Counter)
    by_override: Counter[Override] = field(default_factory=Counter)
    started: bool = False
    ended: bool = False

    @property
    def missing(self) -> int:
        if self.first_expected is None:
            return 0
        return max(0, self.last_seen - self.first_expected + 1 - self.numbered)


class Ledger:
    """Counts by series, in the order in which the series were first heard of."""

    def __init__(self) -> None:
        self._accounts: dict[tuple[int, str], _Account] = {}
        self._current = _NO_SERIES
        self._lock = threading.Lock()

    def received(self, messages: Iterable[Message]) -> None:
        """Enter messages in the order received.

        ``image`` counts as received; a live series begins at image 0.
        """
        with self._lock:
            for message in messages:
                if message.frame is not None:
                    self._receive_frame(message.frame)
                else:
                    self._receive_other(message)

    def _receive_other(self, message: Message) -> None:
        kind, series = message.kind, message.series
        if kind is MessageKind.START and series is not None:
            self._current = series.key
            self._account(series.key).started = True
        elif kind is MessageKind.END and series is not None:
            self._account(series.key)
        elif kind is MessageKind.MALFORMED:
            self._account(self._current).malformed += 1
        else:
            self._account(self._current).control += 1

    def _receive_frame(self, frame: Frame) -> None:
        account = self._account(frame.series.key)
        account.received += 1
        if frame.duplicate:
            account.duplicates += 1
            return
        if frame.image_id < 0:
            return
        account.numbered += 1
        if account.first_expected is None:
            # A detector counts from 0. Recorded runs and streams joined late begin anywhere.
            live_from_start = frame.series.started and frame.frame < 0
            account.first_expected = 0 if live_from_start else frame.image_id
        elif frame.image_id < account.first_expected:
            account.first_expected = frame.image_id
        if frame.image_id > account.last_seen:
            account.last_seen = frame.image_id

    def released(self, decisions: Iterable[Decision]) -> None:
        """Enter what was done with frames."""
        with self._lock:
            for decision in decisions:
                account = self._account((decision.series_id, decision.series_unique_id))
                if decision.forwarded:
                    account.forwarded += 1
                else:
                    account.dropped += 1
                if decision.verdict is Verdict.KEEP:
                    account.kept += 1
                else:
                    account.vetoed += 1
                account.by_reason[decision.reason] += 1
                if decision.override is not Override.NONE:
                    account.by_override[decision.override] += 1

    def ended(self, series: Series) -> SeriesReport:
        """Close a series; a second end gives the same report again."""
        with self._lock:
            self._account(series.key).ended = True
        return self.report(series.key)

    def report(self, key: tuple[int, str]) -> SeriesReport:
        """The state of one series now."""
        with self._lock:
            a = self._account(key)
            return SeriesReport(
                series_id=key[0],
                series_unique_id=key[1],
                received=a.received,
                forwarded=a.forwarded,
                dropped=a.dropped,
                undecided=a.received - a.forwarded - a.dropped,
                missing=a.missing,
                duplicates=a.duplicates,
                control=a.control,
                malformed=a.malformed,
                kept=a.kept,
                vetoed=a.vetoed,
                by_reason={reason.value: n for reason, n in a.by_reason.items()},
                by_override={why.value: n for why, n in a.by_override.items()},
                ended=a.ended,
            )

    def reports(self) -> list[SeriesReport]:
        """The state of every series, first heard of first."""
        with self._lock:
            keys = list(self._accounts)
        return [self.report(key) for key in keys]

    def totals(self) -> SeriesReport:
        """All series together, under the identity (-1, "")."""
        reports = self.reports()
        reasons: Counter[str] = Counter()
        overrides: Counter[str] = Counter()
        for report in reports:
            reasons.update(report.by_reason)
            overrides.update(report.by_override)

        def add(name: str) -> int:
            return sum(int(getattr(report, name)) for report in reports)

        return SeriesReport(
            series_id=-1,
            series_unique_id="",
            received=add("received"),
            forwarded=add("forwarded"),
            dropped=add("dropped"),
            undecided=add("undecided"),
            missing=add("missing"),
            duplicates=add("duplicates"),
            control=add("control"),
            malformed=add("malformed"),
            kept=add("kept"),
            vetoed=add("vetoed"),
            by_reason=dict(reasons),
            by_override=dict(overrides),
            ended=all(report.ended for report in reports),
        )

    def _account(self, key: tuple[int, str]) -> _Account:
        account = self._accounts.get(key)
        if account is None:
            account = self._accounts[key] = _Account()
        return account

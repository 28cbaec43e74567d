"""The counts that must balance: received = forwarded + dropped + undecided.

The ledger is told of every image message once when it is received and once when it is
released. It is kept by the pipeline under one lock and read by anyone. What it counts is kept in
``state.LedgerState`` too, where there is one, and outlives the process there.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Protocol

from triage.ledger.account import Account, totalled
from triage.records import (
    Begun,
    Decision,
    Frame,
    Message,
    MessageKind,
    Override,
    Series,
    SeriesReport,
    Verdict,
)

__all__ = ["Ledger", "LedgerStore"]

_NO_SERIES = (-1, "")


class LedgerStore(Protocol):
    """Where the counts outlive the process; ``state.LedgerState`` is one.

    It is told after the counts have changed, under the ledger's lock.
    """

    def received(
        self, messages: Sequence[Message], accounts: Mapping[tuple[int, str], Account]
    ) -> None: ...

    def released(
        self,
        decisions: Sequence[Decision],
        accounts: Mapping[tuple[int, str], Account],
        *,
        in_order: bool,
    ) -> None: ...

    def ended(self, key: tuple[int, str], account: Account) -> None: ...


class Ledger:
    """Counts by series, in the order in which the series were first heard of.

    A detector that arms again under an identity that it has used goes on with the same account.

    Args:
        store: told of everything; None for counts that end with the process.
        earlier: what an earlier process counted of series that it did not report, in order.
        resting: the same of series that it reported; they count from when they are heard of.
        begun: series of either kind that may still be running, for the source.
        run_id: of this run in its folder.
        goes_on_with: the run whose series these are; "" for none.
    """

    def __init__(
        self,
        store: LedgerStore | None = None,
        *,
        earlier: Mapping[tuple[int, str], Account] | None = None,
        resting: Mapping[tuple[int, str], Account] | None = None,
        begun: Sequence[Begun] = (),
        run_id: str = "",
        goes_on_with: str = "",
    ) -> None:
        self.begun = tuple(begun)
        self.run_id = run_id
        self.goes_on_with = goes_on_with
        self._store = store
        self._accounts: dict[tuple[int, str], Account] = dict(earlier or {})
        self._resting = dict(resting or {})
        # Series that are over are summed once: a run of months has very many.
        self._open = dict.fromkeys(self._accounts)
        self._over: set[tuple[int, str]] = set()
        self._total_over = totalled(())
        self._arms: dict[tuple[int, str], weakref.ref[Series]] = {}
        running = [key for key, account in self._accounts.items() if not account.ended]
        self._current = running[-1] if running else _NO_SERIES
        self._lock = threading.Lock()

    def received(self, messages: Sequence[Message]) -> None:
        """Enter messages in the order received.

        ``image`` counts as received; a live series begins at image 0.
        """
        with self._lock:
            for message in messages:
                if message.frame is not None:
                    self._receive_frame(message.frame)
                else:
                    self._receive_other(message)
            if self._store is not None:
                self._store.received(messages, self._accounts)

    def _receive_other(self, message: Message) -> None:
        kind, series = message.kind, message.series
        if kind is MessageKind.START and series is not None:
            self._current = series.key
            account, arm = self._account(series.key), self._arms.get(series.key)
            if arm is None or arm() is not series:
                # The header of a series that comes on one more socket is the same object.
                self._arms[series.key] = weakref.ref(series)
                if account.started:
                    account.arm_again()
            account.started = True
        elif kind is MessageKind.END and series is not None:
            self._account(series.key).end_comes(series.key)
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
        if account.first_expected < 0:
            # A detector counts from 0. Recorded runs and streams joined late begin anywhere.
            live_from_start = frame.series.started and frame.frame < 0
            account.first_expected = 0 if live_from_start else frame.image_id
        elif frame.image_id < account.first_expected:
            account.first_expected = frame.image_id
        if frame.image_id > account.last_seen:
            account.last_seen = frame.image_id

    def released(self, decisions: Sequence[Decision], *, in_order: bool = True) -> None:
        """Enter what was done with frames.

        Args:
            in_order: they are the oldest ones of their series that were not released yet.
        """
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
            if self._store is not None:
                self._store.released(decisions, self._accounts, in_order=in_order)

    def next_end(self, key: tuple[int, str]) -> SeriesReport:
        """What :meth:`ended` will give for the end message that stands first in line."""
        with self._lock:
            return self._account(key).report_at_end(key)

    def ended(self, series: Series) -> SeriesReport:
        """An end message goes on: the series as it was when that came; of a second one the same.

        A detector that has armed again since under the same identity goes on with the account.
        """
        with self._lock:
            account = self._account(series.key)
            report = account.report_at_end(series.key)
            if account.end_passes():
                self._close(series.key, account)
        return report

    def left(self, series: Series) -> SeriesReport:
        """Close a series that its detector has left without an end message."""
        with self._lock:
            account = self._account(series.key)
            self._close(series.key, account)
            return account.report(series.key)

    def _close(self, key: tuple[int, str], account: Account) -> None:
        account.ended = True
        if self._store is not None:
            self._store.ended(key, account)

    def report(self, key: tuple[int, str]) -> SeriesReport:
        """The state of one series now."""
        with self._lock:
            account = self._accounts.get(key)
            return (account if account is not None else self._account(key)).report(key)

    def reports(self) -> list[SeriesReport]:
        """The state of every series, first heard of first."""
        with self._lock:
            return [account.report(key) for key, account in self._accounts.items()]

    def totals(self) -> SeriesReport:
        """All series together, under the identity (-1, "")."""
        with self._lock:
            reports = [self._accounts[key].report(key) for key in self._open]
            over = [report for report in reports if report.ended and report.balanced]
            self._total_over = totalled((self._total_over, *over))
            for report in over:
                key = report.series_id, report.series_unique_id
                del self._open[key]
                self._over.add(key)
            going_on = [report for report in reports if not (report.ended and report.balanced)]
            return totalled((self._total_over, *going_on))

    def _account(self, key: tuple[int, str]) -> Account:
        account = self._accounts.get(key)
        if account is None:
            account = self._resting.pop(key) if key in self._resting else Account()
            self._accounts[key] = account
            self._open[key] = None
        elif key in self._over:
            # It is heard of again: all are summed anew.
            self._over.clear()
            self._open = dict.fromkeys(self._accounts)
            self._total_over = totalled(())
        return account

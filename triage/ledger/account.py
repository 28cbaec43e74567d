"""What the ledger counts of one series."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

from triage.records import Override, Reason, SeriesReport

__all__ = ["COUNTS", "Account", "totalled"]

_MOST = 2**63 - 1
"""What is missing may be more than an int64 holds, because senders choose the image_ids; then it
is said to be as many as that."""

_PLAIN = (
    *("received", "forwarded", "dropped", "duplicates", "control", "malformed"),
    *("kept", "vetoed", "numbered", "first_expected", "last_seen", "missing_before"),
    *("lost", "in_doubt", "restarts", "started", "ended"),
)
_plain = attrgetter(*_PLAIN)
_REASONS = tuple(Reason)
_OVERRIDES = tuple(why for why in Override if why is not Override.NONE)

COUNTS = (
    *_PLAIN,
    *(f"reason {reason.value}" for reason in Reason),
    *(f"override {why.value}" for why in _OVERRIDES),
)
"""Names of the numbers that :meth:`Account.numbers` gives, in order."""


@dataclass(slots=True)
class Account:
    """What is known of one series so far.

    Attributes:
        numbered: image_ids seen since the detector armed last, each once.
        first_expected, last_seen: bounds of the image_ids that there should be; -1 for none.
        missing_before: gaps of earlier arms under the same identity.
        lost: received, and undecided when a process died that had them.
        in_doubt, restarts: as in :class:`triage.records.SeriesReport`.
        arms: how often the detector armed again while this process had the series.
        ends: for each end message that stands in line ``arms`` and the report when it came; this
            and ``arms`` are no :data:`COUNTS`.
    """

    received: int = 0
    forwarded: int = 0
    dropped: int = 0
    duplicates: int = 0
    control: int = 0
    malformed: int = 0
    kept: int = 0
    vetoed: int = 0
    numbered: int = 0
    first_expected: int = -1
    last_seen: int = -1
    missing_before: int = 0
    lost: int = 0
    in_doubt: int = 0
    restarts: int = 0
    started: bool = False
    ended: bool = False
    by_reason: Counter[Reason] = field(default_factory=Counter)
    by_override: Counter[Override] = field(default_factory=Counter)
    arms: int = 0
    ends: deque[tuple[int, SeriesReport]] = field(default_factory=deque)

    @property
    def missing(self) -> int:
        """Gaps in image_id."""
        if self.first_expected < 0:
            return self.missing_before
        gaps = max(0, self.last_seen - self.first_expected + 1 - self.numbered)
        return min(_MOST, self.missing_before + gaps)

    def arm_again(self) -> None:
        """The detector counts from 0 anew."""
        self.missing_before = self.missing
        self.numbered, self.first_expected, self.last_seen = 0, -1, -1
        self.ended = False
        self.arms += 1

    def end_comes(self, key: tuple[int, str]) -> None:
        """An end message joins the line; what comes behind it is not of what it ends."""
        self.ends.append((self.arms, self.report(key)))

    def report_at_end(self, key: tuple[int, str]) -> SeriesReport:
        """The account as it is at the end message that stands first in line.

        All that came before it was released, and nothing behind it; only a tee that has no room
        releases frames out of their order.
        """
        report = replace(self.report(key), ended=True)
        if not self.ends:
            return report
        _, at_end = self.ends[0]
        released = self.forwarded + self.dropped
        received = max(at_end.received, released)
        return replace(
            report,
            received=received,
            undecided=received - released,
            duplicates=at_end.duplicates,
            control=at_end.control,
            malformed=at_end.malformed,
            missing=at_end.missing,
        )

    def end_passes(self) -> bool:
        """The end message that stands first in line goes on; whether the series is over with it,
        and was not armed again."""
        return not self.ends or self.ends.popleft()[0] == self.arms

    @property
    def waiting(self) -> int:
        """Frames received and not yet released that this process has."""
        return self.received - self.forwarded - self.dropped - self.lost

    def report(self, key: tuple[int, str]) -> SeriesReport:
        """The account as others see it."""
        return SeriesReport(
            series_id=key[0],
            series_unique_id=key[1],
            received=self.received,
            forwarded=self.forwarded,
            dropped=self.dropped,
            undecided=self.received - self.forwarded - self.dropped,
            missing=self.missing,
            duplicates=self.duplicates,
            control=self.control,
            malformed=self.malformed,
            kept=self.kept,
            vetoed=self.vetoed,
            by_reason={reason.value: n for reason, n in self.by_reason.items() if n},
            by_override={why.value: n for why, n in self.by_override.items() if n},
            ended=self.ended,
            in_doubt=self.in_doubt,
            restarts=self.restarts,
        )

    def numbers(self) -> list[int]:
        """Everything, as integers in the order of :data:`COUNTS`."""
        by_reason, by_override = self.by_reason.get, self.by_override.get
        return [
            *_plain(self),
            *[by_reason(reason, 0) for reason in _REASONS],
            *[by_override(why, 0) for why in _OVERRIDES],
        ]

    @classmethod
    def of_numbers(cls, numbers: Sequence[int]) -> Account:
        """The account that gave these :meth:`numbers`."""
        account = cls()
        for name, value in zip(_PLAIN, numbers, strict=False):
            setattr(account, name, bool(value) if name in ("started", "ended") else value)
        rest = numbers[len(_PLAIN) :]
        for reason, value in zip(Reason, rest, strict=False):
            account.by_reason[reason] = value
        for why, value in zip(_OVERRIDES, rest[len(Reason) :], strict=True):
            account.by_override[why] = value
        return account


def totalled(reports: Sequence[SeriesReport]) -> SeriesReport:
    """All series together, under the identity (-1, "")."""
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
        missing=min(_MOST, add("missing")),
        duplicates=add("duplicates"),
        control=add("control"),
        malformed=add("malformed"),
        kept=add("kept"),
        vetoed=add("vetoed"),
        by_reason=dict(reasons),
        by_override=dict(overrides),
        ended=all(report.ended for report in reports),
        in_doubt=add("in_doubt"),
        restarts=max((report.restarts for report in reports), default=0),
    )

"""What the ledger counts of one series."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from triage.records import Override, Reason, SeriesReport

__all__ = ["COUNTS", "Account", "totalled"]

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

    @property
    def missing(self) -> int:
        """Gaps in image_id."""
        if self.first_expected < 0:
            return self.missing_before
        gaps = max(0, self.last_seen - self.first_expected + 1 - self.numbered)
        return self.missing_before + gaps

    def arm_again(self) -> None:
        """The detector counts from 0 anew."""
        self.missing_before = self.missing
        self.numbered, self.first_expected, self.last_seen = 0, -1, -1
        self.ended = False

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
        missing=add("missing"),
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

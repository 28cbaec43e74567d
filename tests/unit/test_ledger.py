from __future__ import annotations

import random

from decided import decided

from triage.ledger import Ledger
from triage.ledger.account import totalled
from triage.records import (
    Decision,
    Frame,
    Message,
    MessageKind,
    Series,
)

LIVE = Series(series_id=7, series_unique_id="A")


def image(image_id: int, series: Series = LIVE, **fields: object) -> Message:
    frame = Frame(series=series, image_id=image_id, **fields)  # type: ignore[arg-type]
    return Message(kind=MessageKind.IMAGE, frame=frame)


def decision(image_id: int, *, forwarded: bool, series: Series = LIVE) -> Decision:
    frame = Frame(series=series, image_id=image_id)
    return decided(frame, forwarded=forwarded)


def test_the_ledger_balances_only_when_every_frame_was_released() -> None:
    """received = forwarded + dropped + undecided at every moment."""
    ledger = Ledger()
    for image_id in range(3):
        ledger.received([image(image_id)])
    ledger.released([decision(0, forwarded=True)])
    ledger.released([decision(1, forwarded=False)])
    report = ledger.report(LIVE.key)
    assert (report.received, report.forwarded, report.dropped, report.undecided) == (3, 1, 1, 1)
    assert not report.balanced
    ledger.released([decision(2, forwarded=True)])
    assert ledger.ended(LIVE).balanced


def test_gaps_count_from_image_0_of_a_series_whose_start_was_seen() -> None:
    """Images 2, 3 and 6 of a live series: 0, 1, 4 and 5 are missing."""
    ledger = Ledger()
    for image_id in (2, 3, 6):
        ledger.received([image(image_id)])
    assert ledger.report(LIVE.key).missing == 4


def test_gaps_count_from_the_first_image_seen_when_joined_late() -> None:
    """Joined at image 5: only 6 is missing."""
    late = Series(series_id=8, started=False)
    ledger = Ledger()
    for image_id in (5, 7):
        ledger.received([image(image_id, late)])
    assert ledger.report(late.key).missing == 1


def test_an_image_out_of_order_is_not_missing() -> None:
    """What fills a gap later takes it back."""
    ledger = Ledger()
    for image_id in (0, 2, 1):
        ledger.received([image(image_id)])
    assert ledger.report(LIVE.key).missing == 0


def test_duplicates_are_received_again_and_do_not_hide_gaps() -> None:
    """Image 0 twice, then 2: three received, one duplicate, one missing."""
    ledger = Ledger()
    ledger.received([image(0)])
    ledger.received([image(0, duplicate=True)])
    ledger.received([image(2)])
    report = ledger.report(LIVE.key)
    assert (report.received, report.duplicates, report.missing) == (3, 1, 1)


def test_other_messages_belong_to_the_series_that_is_running() -> None:
    """Control and malformed messages are counted where an operator looks for them."""
    ledger = Ledger()
    ledger.received([Message(kind=MessageKind.START, series=LIVE)])
    ledger.received([Message(kind=MessageKind.CONTROL)])
    ledger.received([Message(kind=MessageKind.MALFORMED)])
    report = ledger.report(LIVE.key)
    assert (report.received, report.control, report.malformed) == (0, 1, 1)


def test_totals_add_up_the_series() -> None:
    """Two series, three frames."""
    ledger = Ledger()
    other = Series(series_id=9)
    ledger.received([image(0)])
    ledger.received([image(0, other)])
    ledger.received([image(1, other)])
    ledger.released([decision(0, forwarded=False)])
    totals = ledger.totals()
    assert (totals.received, totals.dropped, totals.undecided) == (3, 1, 2)
    assert totals.by_reason == {"score": 1}


def test_totals_stay_the_sum_of_all_series_whatever_is_asked_between() -> None:
    """Series end, are heard of again, arm again; totals are asked for at any moment."""
    rng = random.Random(4)
    ledger = Ledger()
    series = [Series(series_id=i, series_unique_id=str(i % 3)) for i in range(6)]
    for _ in range(600):
        one, image_id = rng.choice(series), rng.randrange(20)
        action = rng.randrange(6)
        if action == 0:
            ledger.received([Message(kind=MessageKind.START, series=one)])
        elif action == 1:
            ledger.received([Message(kind=MessageKind.END, series=one)])
            ledger.ended(one)
        elif action == 2:
            ledger.received([Message(kind=MessageKind.MALFORMED)])
        else:
            ledger.received([image(image_id, one)])
            ledger.released([decision(image_id, forwarded=rng.random() < 0.5, series=one)])
        if rng.random() < 0.3:
            assert ledger.totals() == totalled(ledger.reports())
    assert ledger.totals().received > 250


def test_an_identity_used_again_does_not_hide_gaps() -> None:
    """Images 0 to 3 twice, the second time without 2: one is missing, nothing is a duplicate."""
    ledger = Ledger()
    for ids in ((0, 1, 2, 3), (0, 1, 3)):
        series = Series(series_id=9)
        start = Message(kind=MessageKind.START, series=series)
        images = [
            Message(kind=MessageKind.IMAGE, frame=Frame(series=series, image_id=i)) for i in ids
        ]
        ledger.received([start, *images])
    report = ledger.report((9, ""))
    assert (report.received, report.missing, report.duplicates) == (7, 1, 0)


def test_a_header_on_one_more_socket_begins_nothing_anew() -> None:
    """The same series is started twice, an image between: no gap is made up or forgotten."""
    ledger, series = Ledger(), Series(series_id=9)
    start = Message(kind=MessageKind.START, series=series)
    images = [
        Message(kind=MessageKind.IMAGE, frame=Frame(series=series, image_id=i)) for i in (0, 1, 3)
    ]
    ledger.received([start, images[0], start, *images[1:]])
    assert ledger.report((9, "")).missing == 1


def test_an_end_tells_of_what_came_before_it() -> None:
    """The detector has armed again under the same identity, and an image of it stands in line
    still, when the first end is told: that series balances, and runs."""
    ledger = Ledger()
    first, second = Series(series_id=9), Series(series_id=9)
    messages = [
        Message(kind=MessageKind.START, series=first),
        image(0, first),
        image(2, first),
        Message(kind=MessageKind.END, series=first),
        Message(kind=MessageKind.START, series=second),
        Message(kind=MessageKind.MALFORMED),
        image(0, second),
        image(3, second),
        Message(kind=MessageKind.END, series=second),
    ]
    ledger.received(messages)
    ledger.released([decision(n, forwarded=True, series=first) for n in (0, 2)])
    assert ledger.next_end(first.key) == ledger.ended(first)
    assert not ledger.report(first.key).ended
    ledger.released([decision(n, forwarded=True, series=second) for n in (0, 3)])
    report = ledger.ended(second)
    assert (report.received, report.missing, report.malformed) == (4, 3, 1)
    assert report.balanced
    assert report.ended


def test_what_is_told_at_an_end_is_of_then() -> None:
    """As above: two images, one missing, nothing undecided."""
    ledger = Ledger()
    first, second = Series(series_id=9), Series(series_id=9)
    ledger.received([Message(kind=MessageKind.START, series=first), image(0, first)])
    ledger.received([image(2, first), Message(kind=MessageKind.END, series=first)])
    ledger.received([Message(kind=MessageKind.START, series=second), image(5, second)])
    ledger.released([decision(n, forwarded=True, series=first) for n in (0, 2)])
    report = ledger.ended(first)
    assert (report.received, report.forwarded, report.undecided) == (2, 2, 0)
    assert (report.missing, report.balanced, report.ended) == (1, True, True)

"""The state file: what it says after a process was gone, and what becomes of a broken one."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from decided import decided

from triage.ledger import Ledger
from triage.ledger.state import LedgerState, StateError, begun, ranges, recovered
from triage.records import (
    Decision,
    Frame,
    Message,
    MessageKind,
    Reason,
    Series,
)

LIVE = Series(series_id=7, series_unique_id="01ABC")


def image(
    ordinal: int, image_id: int | None = None, series: Series = LIVE, **fields: Any
) -> Message:
    frame = Frame(
        series=series,
        image_id=ordinal if image_id is None else image_id,
        ordinal=ordinal,
        **fields,
    )
    return Message(kind=MessageKind.IMAGE, frame=frame, size_bytes=9000)


def start(
    series: Series = LIVE, lane: int = 0, parts: tuple[bytes, ...] = (b"{}", b"mask")
) -> Message:
    return Message(kind=MessageKind.START, series=series, lane=lane, parts=parts)


def decision(ordinal: int, *, forwarded: bool = True, series: Series = LIVE) -> Decision:
    frame = Frame(series=series, image_id=ordinal, ordinal=ordinal)
    return decided(frame, forwarded=forwarded)


def opened(folder: Path, **options: Any) -> tuple[LedgerState, Ledger]:
    state = LedgerState(folder, run_id="R1", **{"frames": 64, "slots": 3, "seen": 256, **options})
    return state, Ledger(state)


def test_frames_received_and_not_released_are_named(tmp_path: Path) -> None:
    """Ten came, two of them twice or without a number; four were released: the other six wait."""
    _, ledger = opened(tmp_path)
    ledger.received([start(), *(image(i) for i in range(8))])
    ledger.received([image(8, 3, duplicate=True), image(9, -1)])
    ledger.released([decision(0), decision(1, forwarded=False), decision(2), decision(3)])
    before = recovered(tmp_path)
    assert before is not None
    assert (before.run_id, before.ended) == ("R1", False)
    (series,) = before.series
    assert series.key == LIVE.key
    assert series.waiting == [(4, 4), (5, 5), (6, 6), (7, 7), (8, 3), (9, -1)]
    assert series.seen == [(0, 7)]
    account = series.account
    assert (account.received, account.forwarded, account.dropped) == (10, 3, 1)
    assert (account.duplicates, account.missing, account.by_reason[Reason.SCORE]) == (1, 0, 4)


def test_the_largest_numbers_do_not_end_a_run(tmp_path: Path) -> None:
    """A detector that arms again and again, and counts to the largest number: more is missing
    than fits, and that is what is said, in the file too."""
    _, ledger = opened(tmp_path)
    for arm in range(3):
        series = Series(series_id=7, series_unique_id="01ABC")
        ledger.received([start(series), image(arm, 2**63 - 1, series)])
        ledger.released([decision(arm, series=series)])
    before = recovered(tmp_path)
    assert before is not None
    assert before.series[0].account.missing == 2**63 - 1
    assert ledger.totals().missing == 2**63 - 1


def test_what_stands_in_the_journal_was_dropped(tmp_path: Path) -> None:
    """Of three that wait one is on record; the other two were lost with the process."""
    _, ledger = opened(tmp_path)
    ledger.received([start(), *(image(i) for i in range(3))])
    before = recovered(tmp_path)
    assert before is not None
    (series,) = before.series
    series.settle({1: Reason.SCORE})
    report = series.account.report(series.key)
    assert (report.received, report.forwarded, report.dropped, report.undecided) == (3, 0, 1, 2)
    assert (report.vetoed, report.by_reason, report.restarts) == (1, {"score": 1}, 1)
    assert not report.balanced
    assert series.waiting == [(0, 0), (2, 2)]


def test_a_run_goes_on_with_the_counts_of_the_one_that_died(tmp_path: Path) -> None:
    """Gaps, duplicates and losses are those of the whole series, over three processes."""
    _, ledger = opened(tmp_path)
    ledger.received([start(), image(0), image(1), image(2)])
    ledger.released([decision(0)])
    for first in (5, 9):
        before = recovered(tmp_path)
        assert before is not None
        for series in before.series:
            series.settle({})
        state = LedgerState(tmp_path, run_id="R", earlier=before.series, frames=64, seen=256)
        ledger = Ledger(state, earlier={s.key: s.account for s in before.series})
        ledger.received([image(0, first), image(1, first + 1)])
        ledger.released([decision(0), decision(1)])
    report = ledger.ended(LIVE)
    # 0 1 2 | 5 6 | 9 10: 3, 4, 7 and 8 never came; 1 and 2 were never decided.
    assert (report.received, report.missing, report.undecided) == (7, 4, 2)
    assert (report.forwarded, report.restarts, report.ended) == (5, 2, True)


def test_the_start_message_is_there_with_its_lanes_and_images(tmp_path: Path) -> None:
    """What a source needs to know the series as if it had received its start itself."""
    parts = (b'{"htype": "dheader-1.0"}', b"", bytes(range(256)))
    _, ledger = opened(tmp_path)
    ledger.received([start(parts=parts), start(lane=2, parts=parts), image(0), image(1, 5)])
    before = recovered(tmp_path)
    assert before is not None
    found = begun(tmp_path, before.series[0])
    assert (found.key, found.start, found.lanes) == (LIVE.key, parts, (0, 2))
    assert found.seen == ((0, 0), (5, 5))


def test_a_second_start_on_a_lane_forgets_which_images_came(tmp_path: Path) -> None:
    """As the source does: emulators repeat identities."""
    _, ledger = opened(tmp_path)
    ledger.received([start(), image(0), image(1)])
    ledger.received([start(), image(2, 1)])
    before = recovered(tmp_path)
    assert before is not None
    assert before.series[0].seen == [(1, 1)]


def test_a_series_that_another_replaced_is_over(tmp_path: Path) -> None:
    """A start without the end of the one before: that one is not gone on with."""
    _, ledger = opened(tmp_path)
    other = Series(series_id=8)
    ledger.received([start(), image(0), start(other), image(1, 0, other)])
    before = recovered(tmp_path)
    assert before is not None
    assert [(s.key, s.over) for s in before.series] == [(LIVE.key, True), (other.key, False)]


def test_a_run_that_ended_in_order_has_nothing_in_doubt(tmp_path: Path) -> None:
    """Its series rests until something of it is heard; with none running the file is gone."""
    state, ledger = opened(tmp_path, marks=[4])
    given = state.handed(0)
    ledger.received([start(), image(0)])
    given.handing(image(0))
    given.handed()
    ledger.released([decision(0)])
    state.close(sent=True)
    before = recovered(tmp_path)
    assert before is not None
    assert before.ended
    assert before.series[0].in_doubt == []

    state, ledger = opened(tmp_path)
    ledger.received([start(), image(0)])
    ledger.released([decision(0)])
    ledger.ended(LIVE)
    state.close(sent=True)
    assert recovered(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_series_at_rest_is_reported_once_something_of_it_comes() -> None:
    """An orderly second run for another series is not mixed with the first."""
    earlier = Ledger()
    earlier.received([start(), image(0)])
    earlier.released([decision(0)])
    account = earlier._accounts[LIVE.key]
    other = Series(series_id=8)
    ledger = Ledger(resting={LIVE.key: account})
    ledger.received([start(other), image(0, 0, other)])
    assert [report.series_id for report in ledger.reports()] == [8]
    ledger.received([image(1, 1)])
    assert [(r.series_id, r.received) for r in ledger.reports()] == [(8, 1), (7, 2)]


@pytest.mark.parametrize("mark", [4, 20])
def test_what_zeromq_may_hold_is_in_doubt(tmp_path: Path, mark: int) -> None:
    """Up to the high-water mark, one that is being sent, and one that was about to be given."""
    state, ledger = opened(tmp_path, marks=[mark])
    given = state.handed(0)
    ledger.received([start(), *(image(i) for i in range(60))])
    for i in range(60):
        given.handing(image(i))
        given.handed()
    ledger.released([decision(i) for i in range(60)])
    before = recovered(tmp_path)
    assert before is not None
    assert [i for _, i in before.series[0].in_doubt] == list(range(59, 58 - mark, -1))[: mark + 1]
    given.handing(image(60))
    before = recovered(tmp_path)
    assert before is not None
    assert before.series[0].in_doubt[0] == (60, 60)
    assert len(before.series[0].in_doubt) == mark + 2


def test_what_was_given_before_the_books_knew_is_in_doubt(tmp_path: Path) -> None:
    """Killed in the middle of a turn: the first two were released, 50 more were handed on, of
    which ZeroMQ holds five at most, and the last eight were not."""
    state, ledger = opened(tmp_path, marks=[4, 4])
    writers = [state.handed(0), state.handed(1)]
    ledger.received([start(), *(image(i) for i in range(60))])
    ledger.released([decision(0), decision(1)])
    for i in range(52):
        writers[i % 2].handing(image(i))
        writers[i % 2].handed()
    before = recovered(tmp_path)
    assert before is not None
    (series,) = before.series
    assert sorted(i for _, i in series.in_doubt) == list(range(2, 52))
    assert [i for _, i in series.waiting] == list(range(2, 60))


def test_small_messages_share_what_is_on_its_way_to_the_kernel(tmp_path: Path) -> None:
    """8 KiB of 100-byte messages are 82 of them, beside the high-water mark."""
    state, ledger = opened(tmp_path, marks=[4], frames=1024, seen=1024)
    given = state.handed(0)
    ledger.received([start(), *(image(i) for i in range(500))])
    for i in range(500):
        small = Message(kind=MessageKind.IMAGE, frame=image(i).frame, size_bytes=100)
        given.handing(small)
        given.handed()
    ledger.released([decision(i) for i in range(500)])
    before = recovered(tmp_path)
    assert before is not None
    assert len(before.series[0].in_doubt) == 4 + 82


def test_a_start_message_in_doubt_is_told(tmp_path: Path) -> None:
    """A writer that never heard of the series can do nothing with its images."""
    state, ledger = opened(tmp_path, marks=[4])
    given = state.handed(0)
    ledger.received([start()])
    given.handing(start())
    given.handed()
    before = recovered(tmp_path)
    assert before is not None
    assert before.series[0].start_in_doubt
    assert before.series[0].in_doubt == []


def test_more_series_than_places_lose_the_oldest_that_is_over(tmp_path: Path) -> None:
    """Three places; of four series the first that ended is forgotten, with its start message."""
    _, ledger = opened(tmp_path)
    series = [Series(series_id=i) for i in range(4)]
    for each in series:
        ledger.received([start(each), image(each.series_id, 200, each)])
        ledger.released([decision(each.series_id, series=each)])
    before = recovered(tmp_path)
    assert before is not None
    assert [s.key[0] for s in before.series] == [1, 2, 3]
    assert before.series[2].seen == [(200, 200)]
    assert len(list(tmp_path.glob("start-*.zcap"))) == 3


def test_more_frames_than_the_ring_holds_are_counted_still(tmp_path: Path) -> None:
    """100 wait, 64 have a place: all are undecided, the newest have names."""
    _, ledger = opened(tmp_path)
    ledger.received([start(), *(image(i) for i in range(100))])
    before = recovered(tmp_path)
    assert before is not None
    (series,) = before.series
    assert [i for _, i in series.waiting] == list(range(36, 100))
    assert series.seen == [(0, 99)]
    series.settle({})
    assert series.account.report(series.key).undecided == 100


def test_frames_that_a_tee_handed_on_unseen_are_not_undecided(tmp_path: Path) -> None:
    """They are released before older ones that still wait."""
    _, ledger = opened(tmp_path)
    ledger.received([start(), image(0), image(1), image(2), image(3)])
    ledger.released([decision(2), decision(3)], in_order=False)
    before = recovered(tmp_path)
    assert before is not None
    assert before.series[0].waiting == [(0, 0), (1, 1)]


def test_the_newest_whole_account_counts(tmp_path: Path) -> None:
    """Whichever of its two places was being written is passed over."""
    _, ledger = opened(tmp_path)
    ledger.received([start(), image(0)])
    ledger.received([image(1)])
    path = tmp_path / "ledger.state"
    whole = path.read_bytes()
    received = []
    for place in (4096 + 512, 4096 + 1280):
        torn = bytearray(whole)
        torn[place + 60 : place + 64] = b"torn"
        path.write_bytes(torn)
        before = recovered(tmp_path)
        assert before is not None
        received.append(before.series[0].account.received)
    assert sorted(received) == [1, 2]


def test_a_frame_that_no_account_counts_was_not_received(tmp_path: Path) -> None:
    """Killed between ring and account: its number is a gap like that of one that never came."""
    state, ledger = opened(tmp_path)
    ledger.received([start(), image(0)])
    account = ledger._accounts[LIVE.key]
    state._commit = lambda slot, account: None  # type: ignore[method-assign]
    state.received([image(1)], {LIVE.key: account})
    before = recovered(tmp_path)
    assert before is not None
    assert before.series[0].waiting == [(0, 0)]
    assert before.series[0].account.received == 1


def broken_header(path: Path, **changes: Any) -> None:
    data = bytearray(path.read_bytes())
    magic, version, size, _ = struct.unpack_from("<8sIII", data)
    about = {**json.loads(data[20 : 20 + size]), **changes}
    text = json.dumps(about).encode()
    data[20 : 20 + len(text)] = text
    struct.pack_into("<8sIII", data, 0, magic, version, len(text), zlib.crc32(text))
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("empty", "0 bytes"),
        ("cut off", "bytes; expected"),
        ("other magic", "begins with"),
        ("other version", "of version 9"),
        ("torn header", "not whole"),
        ("other counts", "counts other things"),
        ("no layout", "header is not one"),
    ],
)
def test_a_broken_file_says_what_is_wrong(tmp_path: Path, what: str, says: str) -> None:
    """Never numbers from something that is no whole file of this version."""
    state, ledger = opened(tmp_path)
    ledger.received([start(), image(0)])
    path, data = state.path, bytearray(state.path.read_bytes())
    if what == "empty":
        path.write_bytes(b"")
    elif what == "cut off":
        path.write_bytes(data[:-1])
    elif what == "other magic":
        path.write_bytes(b"\x89HDF" + data[4:])
    elif what == "other version":
        path.write_bytes(data[:8] + struct.pack("<I", 9) + data[12:])
    elif what == "torn header":
        path.write_bytes(data[:40] + b"\0" + data[41:])
    elif what == "other counts":
        broken_header(path, counts=["received"])
    else:
        broken_header(path, marks=None)
    with pytest.raises(StateError, match=says):
        recovered(tmp_path)


def test_another_user_s_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of the system is a place where anybody may put files."""
    opened(tmp_path)
    monkeypatch.setattr("os.geteuid", lambda: 4711)
    with pytest.raises(StateError, match="another user"):
        recovered(tmp_path)


def test_a_start_message_that_is_not_whole_is_none(tmp_path: Path) -> None:
    """Then the frames go on unscored, as in a series that was joined late."""
    _, ledger = opened(tmp_path)
    ledger.received([start(), image(0)])
    before = recovered(tmp_path)
    assert before is not None
    (path,) = tmp_path.glob("start-*.zcap")
    path.write_bytes(path.read_bytes()[:-1])
    assert begun(tmp_path, before.series[0]).start == ()
    path.unlink()
    assert begun(tmp_path, before.series[0]).start == ()


def test_a_file_system_without_room_is_told_before_anything_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page without a place would end the process in the middle of a run; what was there from
    the run before stays."""
    _, ledger = opened(tmp_path)
    ledger.received([start(), image(0)])

    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        opened(tmp_path)
    assert not (tmp_path / "ledger.state.new").exists()
    before = recovered(tmp_path)
    assert before is not None
    assert before.series[0].account.received == 1


def test_runs_of_numbers() -> None:
    """Consecutive ones are one run; order and repeats do not matter."""
    assert ranges([5, 1, 2, 3, 9, 2]) == [(1, 3), (5, 5), (9, 9)]
    assert ranges([]) == []

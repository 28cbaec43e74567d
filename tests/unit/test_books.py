"""What a run makes of the books of the run before it in its folder."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from pathlib import Path

import pytest
from decided import decided

from triage.cli.books import Books, opened_books
from triage.config import Settings, load_settings
from triage.records import (
    Decision,
    Frame,
    Message,
    MessageKind,
    Series,
)
from triage.sinks.journal import Journal

A, B = Series(series_id=1, series_unique_id="A"), Series(series_id=2, series_unique_id="B")


class Abandoned(Exception):
    """Ends a block as a kill would: nothing is said to be in order."""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(
        None,
        {
            "output.directory": str(tmp_path / "out"),
            "output.state_directory": str(tmp_path / "state"),
            "forward.endpoint": "tcp://127.0.0.1:1",
        },
    )


def opened(settings: Settings) -> contextlib.AbstractContextManager[Books]:
    return opened_books(settings, Path(settings.output.directory), live=True)


def run(books: Books, series: Series, first: int, count: int, *, released: int) -> list[Decision]:
    """Receive images, and release so many of them; the decisions on all."""
    frames = [
        Frame(series=series, image_id=first + i, ordinal=first + i, received_ns=1)
        for i in range(count)
    ]
    books.ledger.received([Message(kind=MessageKind.IMAGE, frame=frame) for frame in frames])
    decisions = [decided(frame, forwarded=False) for frame in frames]
    books.ledger.released(decisions[:released])
    return decisions


def begin(books: Books, series: Series) -> None:
    books.ledger.received([Message(kind=MessageKind.START, series=series, parts=(b"start",))])


def test_a_second_run_for_a_new_series_has_nothing_of_the_first(settings: Settings) -> None:
    """Neither in its counts nor in what it tells its source."""
    with opened(settings) as books:
        begin(books, A)
        run(books, A, 0, 3, released=3)
        books.ledger.ended(A)
        first = books.ledger.run_id
    with opened(settings) as books:
        assert books.ledger.run_id not in ("", first)
        assert books.ledger.reports() == []
        assert books.ledger.begun == ()
        begin(books, B)
        run(books, B, 0, 2, released=2)
        assert [(r.series_id, r.received) for r in books.ledger.reports()] == [(2, 2)]
    assert not (Path(settings.output.directory) / "recoveries.jsonl").exists()


def test_books_go_with_the_folder_that_they_were_of(settings: Settings) -> None:
    """Who deletes the folder of a killed run begins anew, under the same name too."""
    with contextlib.suppress(Abandoned), opened(settings) as books:
        begin(books, A)
        run(books, A, 0, 5, released=3)
        raise Abandoned
    shutil.rmtree(settings.output.directory)
    with opened(settings) as books:
        assert books.ledger.reports() == []
        assert books.ledger.begun == ()


def test_a_killed_run_whose_lock_was_deleted_is_gone_on_with(settings: Settings) -> None:
    """It looks like one that was left over; what lies beside it says that a run was here."""
    with contextlib.suppress(Abandoned), opened(settings) as books:
        begin(books, A)
        run(books, A, 0, 5, released=3)
        raise Abandoned
    (Path(settings.output.directory) / "journal.jsonl").write_text("")
    (Path(settings.output.directory) / "triage.lock").unlink()
    with opened(settings) as books:
        assert [begun.key for begun in books.ledger.begun] == [A.key]


def test_books_of_a_folder_that_was_not_mounted_can_be_put_back(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """An empty folder begins anew; what was noted is put aside, and the log says where."""
    directory = Path(settings.output.directory)
    with contextlib.suppress(Abandoned), opened(settings) as books:
        begin(books, A)
        run(books, A, 0, 5, released=3)
        raise Abandoned
    directory.rename(directory.with_name("unmounted"))
    with opened(settings) as books:
        assert books.ledger.begun == ()
    (aside,) = Path(settings.output.state_directory).glob("*.before")
    assert str(aside) in caplog.text
    shutil.rmtree(directory)
    directory.with_name("unmounted").rename(directory)
    (directory / "journal.jsonl").write_text("")
    place = aside.with_suffix("")
    shutil.rmtree(place)
    aside.rename(place)
    with opened(settings) as books:
        assert [begun.key for begun in books.ledger.begun] == [A.key]


def test_a_series_in_which_a_run_was_stopped_goes_on_in_the_next(settings: Settings) -> None:
    """Stopped in order: nothing is lost; images 5 and 6 came while nobody was there."""
    with opened(settings) as books:
        begin(books, A)
        run(books, A, 0, 5, released=5)
    with opened(settings) as books:
        (begun,) = books.ledger.begun
        assert (begun.key, begun.start, begun.seen) == (A.key, (b"start",), ((0, 4),))
        assert books.ledger.reports() == []
        run(books, A, 7, 2, released=2)
        report = books.ledger.ended(A)
    assert (report.received, report.dropped, report.undecided, report.missing) == (7, 7, 0, 2)
    assert (report.in_doubt, report.restarts, report.balanced) == (0, 1, True)


def test_a_run_that_died_is_told_of_and_written_down(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """Six came, two were booked as dropped, a third stands in the journal, three are lost."""
    out = Path(settings.output.directory)
    with contextlib.suppress(Abandoned), opened(settings) as books:
        died = books.ledger.run_id
        journal = Journal(out / "journal.jsonl", died)
        begin(books, A)
        decisions = run(books, A, 0, 6, released=2)
        journal.dropped(decisions[:3])
        journal.close()
        raise Abandoned
    with caplog.at_level(logging.WARNING), opened(settings) as books:
        (report,) = books.ledger.reports()
        now = books.ledger.run_id
    assert (report.received, report.dropped, report.undecided) == (6, 3, 3)
    assert not report.balanced
    (line,) = [json.loads(text) for text in (out / "recoveries.jsonl").read_text().splitlines()]
    assert (line["run_id"], line["died"], line["series_id"]) == (now, died, 1)
    assert (line["undecided"], line["dropped"]) == ([[3, 5]], 3)
    assert f"run {died} did not end in order" in caplog.text
    assert "6 received, 0 forwarded, 3 dropped, 3 undecided" in caplog.text


def test_a_start_that_failed_leaves_nothing_to_go_on_with(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """A setting that is found wrong before anything came is no run that died."""
    with contextlib.suppress(Abandoned), opened(settings):
        raise Abandoned
    with opened(settings) as books:
        assert books.ledger.reports() == []
    assert not caplog.records
    assert not (Path(settings.output.directory) / "recoveries.jsonl").exists()


def test_a_broken_state_is_set_aside_and_said(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes on with empty books, and what was there can be looked at."""
    with contextlib.suppress(Abandoned), opened(settings) as books:
        begin(books, A)
        raise Abandoned
    (path,) = Path(settings.output.state_directory).glob("*/ledger.state")
    path.write_bytes(b"nonsense")
    with opened(settings) as books:
        assert books.ledger.reports() == []
        begin(books, B)
        run(books, B, 0, 1, released=1)
    assert path.with_name("ledger.state.broken").read_bytes() == b"nonsense"
    assert "8 bytes; expected" in caplog.text
    assert "counting begins anew" in caplog.text


def test_without_a_place_for_the_state_the_run_goes_on(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Counted as ever; only a kill would be forgotten."""
    (tmp_path / "state").write_text("a file")
    with opened(settings) as books:
        begin(books, A)
        run(books, A, 0, 2, released=2)
        assert books.ledger.report(A.key).balanced
        assert books.given() == []
    assert "state_directory" in caplog.text

"""Our process is killed a hundred times in a stream; every image is accounted for."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from kill_rig import (
    PATIENCE_S,
    Writer,
    Zygote,
    accounted,
    kill_again_and_again,
    opened_detector,
)

from triage.ledger.state import recovered
from triage.sinks.folder import state_folder

FRAMES, KILLS = 10_000, 100


@pytest.mark.timeout(200)
def test_what_a_slow_writer_has_not_taken_is_undecided_or_in_doubt(tmp_path: Path) -> None:
    """Line and ZeroMQ are full when the process is killed: each image that they held is named."""
    writer, state = Writer(small=True), tmp_path / "state"
    began = time.monotonic()

    def take_nothing() -> None:
        writer.takes.clear()
        books_folder = state_folder(tmp_path / "out", str(state))
        due = time.monotonic() + PATIENCE_S
        while (books := recovered(books_folder)) is None or len(books.series[-1].waiting) < 20:
            assert time.monotonic() < due
            time.sleep(0.01)

    with opened_detector(frames=4000, rate_hz=1500.0, side_px=90) as (detector, endpoint):
        zygote = Zygote(
            endpoint,
            writer.endpoint,
            tmp_path / "out",
            state,
            queue_bytes=1 << 20,
            message_bytes=1 << 14,
        )
        try:
            counts = kill_again_and_again(
                zygote,
                writer,
                detector,
                frames=4000,
                kills=8,
                seed=5,
                until=0.3,
                before=take_nothing,
                after=writer.takes.set,
            )
        finally:
            zygote.close()
            writer.close()
    account = accounted(tmp_path / "out", writer, *counts, time.monotonic() - began)
    assert account.wrong() == [], account.report
    assert len(account.undecided) >= 20
    lost = set(account.in_doubt) - set(account.at_writer) - set(account.undecided)
    assert lost, "ZeroMQ held nothing: the test shows nothing"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_hundred_kills_lose_no_image_that_is_not_accounted_for(tmp_path: Path) -> None:
    """Images at the writer, drops in the journal, and those named undecided, in doubt or counted
    as missing are together those sent; none is both dropped and at the writer."""
    writer = Writer()
    began = time.monotonic()
    with opened_detector(frames=FRAMES, rate_hz=1500.0, side_px=90) as (detector, endpoint):
        zygote = Zygote(endpoint, writer.endpoint, tmp_path / "out", tmp_path / "state")
        try:
            sent, kills, at_start = kill_again_and_again(
                zygote, writer, detector, frames=FRAMES, kills=KILLS, seed=11
            )
        finally:
            zygote.close()
            writer.close()
    account = accounted(tmp_path / "out", writer, sent, kills, at_start, time.monotonic() - began)
    assert sent == FRAMES
    assert account.wrong() == [], account.report
    # The header is known again after each restart: nothing goes on for want of it.
    assert "geometry_changed" not in account.report["by_reason"], account.report
    assert account.report["restarts"] > KILLS // 2

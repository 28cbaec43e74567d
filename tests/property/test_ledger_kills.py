"""Ledgers over any number of killed processes, against a twin that keeps every frame in a list."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from decided import decided
from hypothesis import given, settings
from hypothesis import strategies as st

from triage.ledger import Ledger
from triage.ledger.state import LedgerState, StateError, ranges, recovered
from triage.records import (
    Frame,
    Message,
    MessageKind,
    Series,
)

MARK = 4
SERIES = (Series(series_id=1, series_unique_id="one"), Series(series_id=2))


class Killed(Exception):
    """The process is gone."""


@dataclass
class Twin:
    """What an all-knowing witness writes down; by series, each image_id once."""

    received: list[tuple[int, int]] = field(default_factory=list)
    forwarded: list[tuple[int, int]] = field(default_factory=list)
    dropped: list[tuple[int, int]] = field(default_factory=list)
    undecided: list[tuple[int, int]] = field(default_factory=list)
    handed: list[tuple[int, int]] = field(default_factory=list)


class Process:
    """Receives and releases as the pipeline does, and dies between any two stores."""

    def __init__(self, folder: Path, twin: Twin) -> None:
        before = recovered(folder)
        series = before.series if before is not None else []
        self.in_doubt = [(s.key[0], i) for s in series for _, i in s.in_doubt]
        self.waited = [(s.key[0], i) for s in series for _, i in s.waiting]
        self.seen = {s.key[0]: s.seen for s in series}
        for each in series:
            each.settle({})
        self.state = LedgerState(
            folder, run_id="R", marks=[MARK], earlier=series, frames=256, slots=4, seen=1024
        )
        self.ledger = Ledger(self.state, earlier={s.key: s.account for s in series})
        self.given = self.state.handed(0)
        self.twin = twin
        self.line: list[Frame] = []
        self.ordinal = 0

    def start(self, number: int) -> None:
        self.ledger.received(
            [Message(kind=MessageKind.START, series=SERIES[number], parts=(b"start",), lane=number)]
        )

    def receive(self, frames: list[tuple[int, int]]) -> None:
        messages = []
        for number, image_id in frames:
            frame = Frame(series=SERIES[number], image_id=image_id, ordinal=self.ordinal)
            self.ordinal += 1
            self.line.append(frame)
            self.twin.received.append((SERIES[number].series_id, image_id))
            messages.append(Message(kind=MessageKind.IMAGE, frame=frame, size_bytes=9000))
        self.ledger.received(messages)

    def release(self, count: int, veto: bool, dies_after: int) -> None:
        """Hand over up to ``count`` frames, then enter them in the books; may die in between."""
        heads, decisions = self.line[:count], []
        for done, frame in enumerate(heads):
            if done == dies_after:
                # Handed over and in no book: undecided, and with ZeroMQ or about to be.
                raise Killed
            name = (frame.series.series_id, frame.image_id)
            forwarded = not (veto and frame.image_id % 2)
            if forwarded:
                message = Message(kind=MessageKind.IMAGE, frame=frame, size_bytes=9000)
                self.given.handing(message)
                self.given.handed()
                self.twin.handed.append(name)
            decisions.append((frame, forwarded))
        self.ledger.released(
            [decided(frame, forwarded=forwarded) for frame, forwarded in decisions]
        )
        for frame, forwarded in decisions:
            where = self.twin.forwarded if forwarded else self.twin.dropped
            where.append((frame.series.series_id, frame.image_id))
        del self.line[:count]

    def die(self) -> None:
        """What it had and had not decided is lost."""
        self.twin.undecided += [(f.series.series_id, f.image_id) for f in self.line]


@settings(max_examples=60)
@given(
    damage=st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=24))),
    cut=st.integers(0, 1 << 20),
)
def test_a_damaged_state_is_read_or_refused(damage: list[tuple[int, bytes]], cut: int) -> None:
    """Whatever bytes it holds: an error of our own or a result, and soon."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = Process(folder, Twin())
        process.start(0)
        process.receive([(0, i) for i in range(9)])
        process.release(4, True, -1)
        path = folder / "ledger.state"
        data = bytearray(path.read_bytes())
        for at, noise in damage:
            at %= len(data)
            data[at : at + len(noise)] = noise[: len(data) - at]
        if not cut % 5:
            del data[cut % len(data) :]
        path.write_bytes(data)
        with contextlib.suppress(StateError):
            before = recovered(folder)
            assert before is not None
            for series in before.series:
                series.settle({})


_steps = st.one_of(
    st.tuples(st.just("receive"), st.lists(st.sampled_from([0, 0, 0, 1]), max_size=12)),
    st.tuples(st.just("skip"), st.integers(1, 4)),
    st.tuples(st.just("release"), st.integers(1, 9)),
    st.tuples(st.just("veto"), st.integers(1, 9)),
    st.tuples(st.just("kill"), st.none()),
    st.tuples(st.just("kill in release"), st.integers(0, 8)),
)


@settings(max_examples=120)
@given(steps=st.lists(_steps, max_size=40))
def test_any_interleaving_of_kills_gives_the_witness_s_ledger(
    steps: list[tuple[str, object]],
) -> None:
    """Counts, gaps and the names of lost frames; what was really handed over last is in doubt."""
    twin = Twin()
    next_id = [0, 0]
    kills = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = Process(folder, twin)
        for number in range(2):
            process.start(number)
        for what, argument in steps:
            handed = len(twin.handed)
            try:
                if what == "receive":
                    frames = []
                    for number in argument:  # type: ignore[attr-defined]
                        frames.append((number, next_id[number]))
                        next_id[number] += 1
                    process.receive(frames)
                elif what == "skip":
                    next_id[0] += argument  # type: ignore[operator]
                elif what in ("release", "veto"):
                    process.release(argument, what == "veto", -1)  # type: ignore[arg-type]
                elif what == "kill in release":
                    process.release(9, False, argument)  # type: ignore[arg-type]
                else:
                    raise Killed
            except Killed:
                kills += 1
                process.die()
                dead = process
                process = Process(folder, twin)
                lost = [(f.series.series_id, f.image_id) for f in dead.line]
                assert sorted(process.waited) == sorted(lost)
                for series in SERIES:
                    mine = [i for s, i in twin.received if s == series.series_id]
                    assert process.seen[series.series_id] == ranges(mine)
                # Nothing that ZeroMQ may have held is left out.
                last = twin.handed[-(MARK + 1) :]
                assert set(twin.handed[handed:][-(MARK + 1) :]) <= set(process.in_doubt)
                assert set(process.in_doubt) <= set(last) | set(twin.received)
        for series in SERIES:
            report = process.ledger.report(series.key)
            mine = series.series_id
            received = [i for s, i in twin.received if s == mine]
            assert report.received == len(received)
            assert report.forwarded == sum(s == mine for s, _ in twin.forwarded)
            assert report.dropped == sum(s == mine for s, _ in twin.dropped)
            waiting = sum(f.series.series_id == mine for f in process.line)
            lost = sum(s == mine for s, _ in twin.undecided)
            assert report.undecided == lost + waiting
            # Series that began at image 0: what lies below the last one and never came.
            expected = max(received, default=-1) + 1 - len(received) if received else 0
            assert report.missing == expected
            assert report.restarts == kills

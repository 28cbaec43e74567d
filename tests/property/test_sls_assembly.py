"""Whatever ports lose, delay or repeat: every message leaves once, and frames leave in order."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from triage.ingest.slsdetector import SlsAssembler
from triage.records import Message, MessageKind, Reason

MS = 1_000_000
WAIT = 100 * MS

END = json.dumps({"jsonversion": 5, "data": 0, "frameNumber": 0, "fileIndex": 0}).encode()


def part(
    port: int, acquisition: int, index: int, *, restart: bool, ports: int
) -> tuple[bytes, ...]:
    """One port's part; numbers go on over acquisitions, or begin at 1 again in each."""
    first = 1 if restart else 1 + 100 * acquisition
    told = {
        "data": 1,
        "fileIndex": acquisition,
        "frameNumber": first + index,
        "frameIndex": index,
        "detshape": [1, ports],
        "shape": [2, 1],
        "bitmode": 16,
        "row": port,
        "column": 0,
        "detType": 1,
    }  # fmt: skip
    return json.dumps(told).encode(), bytes([port, acquisition, index, 0])


FATES = st.sampled_from(["sent", "sent", "sent", "sent", "lost", "twice"])


@st.composite
def streams(draw: Any) -> tuple[int, list[list[tuple[bytes, ...]]], list[tuple[int, int]]]:
    """Ports, what each sends in order, and a schedule of (port or -1 for time, ms)."""
    ports = draw(st.integers(1, 3))
    restart = draw(st.booleans())
    lines: list[list[tuple[bytes, ...]]] = []
    for port in range(ports):
        line: list[tuple[bytes, ...]] = []
        for acquisition in range(draw(st.integers(1, 3)) if port == 0 else 3):
            for index in range(4):
                fate = draw(FATES)
                whole = part(port, acquisition, index, restart=restart, ports=ports)
                line += [whole] * {"sent": 1, "lost": 0, "twice": 2}[fate]
            line += [(END,)] * {"sent": 1, "lost": 0, "twice": 2}[draw(FATES)]
        lines.append(line)
    schedule = draw(
        st.lists(st.tuples(st.integers(-1, ports - 1), st.integers(0, 3000)), max_size=60)
    )
    return ports, lines, schedule


@settings(max_examples=300, deadline=None)
@given(streams(), st.sampled_from([1 << 30, 600]))
def test_every_message_leaves_once_and_frames_in_order(stream: Any, held_bytes: int) -> None:
    """Over any interleaving of the ports and any passing of time."""
    ports, lines, schedule = stream
    assembler = SlsAssembler(ports, wait_ns=WAIT, held_bytes=held_bytes)
    came: Counter[tuple[bytes, ...]] = Counter()
    out: list[Message] = []
    now = 0
    left = [list(line) for line in lines]

    def take(port: int) -> None:
        whole = left[port].pop(0)
        came[whole] += 1
        out.extend(assembler.take(whole, now, port))

    for port, ms in schedule:
        if port < 0:
            now += ms * MS
            out.extend(assembler.due(now))
            due = assembler.due_ns
            assert due is None or due > now
        elif left[port]:
            take(port)
    for port in range(ports):
        while left[port]:
            take(port)
    out += assembler.flush()
    assert assembler.due_ns is None

    went = Counter(m.parts for m in out if m.parts)
    went.update(more for m in out for more in m.followed_by)
    assert went == came

    running: dict[Any, int] = {}
    over: set[Any] = set()
    for message in out:
        if message.kind is MessageKind.START:
            assert message.series is not None
            assert message.series.key not in running
            running[message.series.key] = -1
        elif message.kind is MessageKind.END and message.series is not None:
            assert message.series.key in running
            over.add(message.series.key)
        elif message.frame is not None:
            frame = message.frame
            key = frame.series.key
            assert key in running
            assert key not in over
            assert frame.image_id > running[key]
            running[key] = frame.image_id
            assert not frame.duplicate
            # Far fewer frames than tell a dead port from a late one.
            whole = len(frame.pieces) == ports
            assert frame.fault is (None if whole else Reason.MALFORMED)
            assert len(frame.pieces) == 1 + len(message.followed_by)
            # All parts of a frame are of the same exposure.
            told = {bytes(piece.payload)[1:3] for piece in frame.pieces}
            assert len(told) == 1


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 12), st.randoms(use_true_random=False))
def test_nothing_is_lost_or_split_where_no_port_loses_anything(
    ports: int, frames: int, random: Any
) -> None:
    """Ports that lag in any way, without time passing: every frame is whole, every series ends."""
    lines = [
        [
            *(part(port, a, i, restart=True, ports=ports) for a in range(2) for i in range(frames)),
        ]
        for port in range(ports)
    ]
    for line in lines:
        line.insert(frames, (END,))
        line.append((END,))
    assembler = SlsAssembler(ports, wait_ns=WAIT)
    out: list[Message] = []
    while any(lines):
        port = random.choice([n for n, line in enumerate(lines) if line])
        out += assembler.take(lines[port].pop(0), 0, port)
    kinds = [m.kind.value for m in out]
    assert kinds == ["start", *["image"] * frames, "end"] * 2
    assert all(len(m.followed_by) == ports - 1 for m in out if m.kind is not MessageKind.START)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["silent", "silent", "lossy", "heard"]),
            st.integers(1, 130),
            st.sampled_from([1, 90, 101, 4000]),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_frames_are_decided_without_a_port_once_it_is_silent_for_good(spans: Any) -> None:
    """Only after 10 s in which more than 100 frames in a row came without a word of it; counted
    here from what was sent alone, over ends of series."""
    assembler = SlsAssembler(2, wait_ns=WAIT)
    out: list[Message] = []
    expected: list[bool] = []
    now, number = 0, 0
    silent: list[int] = []
    for acquisition, (kind, frames, ms) in enumerate(spans):
        for index in range(frames):
            now += ms * MS
            number += 1
            heard = kind == "heard" or (kind == "lossy" and index % 2 == 0)
            silent = [] if heard else [*silent, now]
            expected.append(heard or (len(silent) > 100 and now - silent[0] >= 10_000 * MS))
            for port in (1, 0) if heard else (0,):
                told = json.loads(part(port, acquisition, index, restart=False, ports=2)[0])
                told |= {"frameNumber": number}
                out += assembler.take((json.dumps(told).encode(), bytes(4)), now, port)
            now += 101 * MS
            out += assembler.due(now)
        for port in (0, 1):
            out += assembler.take((END,), now, port)
    out += assembler.flush()
    assert [m.frame.fault is None for m in out if m.frame is not None] == expected


@settings(max_examples=60, deadline=None)
@given(
    stalls=st.lists(st.tuples(st.integers(0, 35), st.integers(0, 3000)), min_size=1, max_size=3),
    ports=st.integers(2, 3),
    restart=st.booleans(),
)
def test_ports_that_stall_over_the_end_of_a_series_begin_none_anew(
    stalls: list[tuple[int, int]], ports: int, restart: bool
) -> None:
    """A port sends from one moment on later than the others, by any time: what comes of it too
    late is no frame of its own."""
    events = []
    for port in range(ports):
        for acquisition in range(3):
            for index in range(13):
                place = 13 * acquisition + index
                late_ms = sum(ms for first, ms in stalls if port == 1 and place >= first)
                whole = part(port, acquisition, index, restart=restart, ports=ports)
                events.append((10 * place + late_ms, port, whole if index < 12 else (END,)))
    assembler = SlsAssembler(ports, wait_ns=WAIT)
    out: list[Message] = []
    for ms, port, whole in sorted(events, key=lambda event: event[0]):
        while assembler.due_ns is not None and assembler.due_ns <= ms * MS:
            out += assembler.due(assembler.due_ns)
        out += assembler.take(whole, ms * MS, port)
    out += assembler.flush()
    images = Counter(m.frame.series.series_id for m in out if m.frame is not None)
    assert images == {0: 12, 1: 12, 2: 12}
    starts = [m.series.key for m in out if m.kind is MessageKind.START and m.series is not None]
    assert [key[0] for key in starts] == [0, 1, 2]
    assert sum(m.kind is MessageKind.END for m in out) == 3

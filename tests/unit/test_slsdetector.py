"""SLS receivers: parts put together by frame number, words turned into photons by hand values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from simulators.detectors.slsdetector import Layout, SlsFaults, SlsMaps, acquisition
from triage.backends import open_backend
from triage.backends.pasting import whole
from triage.backends.recipe import measured
from triage.errors import ConfigError, DecodeError, TriageError
from triage.ingest.calibration import Maps, load_maps
from triage.ingest.series import SeriesBook
from triage.ingest.slsdetector import SlsAssembler, port_addresses
from triage.records import Begun, Calibration, Frame, Geometry, Message, Piece, Reason, Series
from triage.sinks.nxmx import KeptWriter

MS = 1_000_000
WAIT = 100 * MS

HEADER = (
    '{"jsonversion":5, "bitmode":16, "fileIndex":7, "detshape":[1, 2], "shape":[4, 2], '
    '"size":16, "acqIndex":101, "frameIndex":0, "progress":10, "fname":"/data/run", "data":1, '
    '"completeImage":1, "frameNumber":101, "expLength":0, "packetNumber":1, "detSpec1":0, '
    '"timestamp":0, "modId":0, "row":0, "column":0, "detSpec2":0, "detSpec3":0, "detSpec4":0, '
    '"detType":1, "version":2, "flipRows":0, "quad":0, "rx_roi":[-1, -1, -1, -1]}\n'
)
"""As the package writes it: EIGER, two ports of 4 x 2 pixels, one above the other."""

END = HEADER.replace('"data":1', '"data":0').replace('"fileIndex":7', '"fileIndex":0').encode()


def part(number: int, row: int, pixels: Any = None, /, **changed: Any) -> tuple[bytes, bytes]:
    """A port's message of one frame; the first frame is number 101."""
    told = json.loads(HEADER)
    told |= {"frameNumber": number, "acqIndex": number, "frameIndex": number - 101, "row": row}
    told |= changed
    told = {key: value for key, value in told.items() if value is not None}
    blob = np.full((2, 4), abs(number) + row, "<u2") if pixels is None else pixels
    return json.dumps(told).encode() + b"\n", np.asarray(blob).tobytes()


def summary(messages: Sequence[Message]) -> list[Any]:
    """Images by image_id and number of parts, all else by kind."""
    return [
        (m.frame.image_id, 1 + len(m.followed_by)) if m.frame else m.kind.value for m in messages
    ]


def fed(assembler: SlsAssembler, *parts: Any, at_ns: int = 0) -> list[Message]:
    """What comes of (lane, parts) in order."""
    return [m for lane, whole in parts for m in assembler.take(whole, at_ns, lane)]


# -- frames from parts -----------------------------------------------------------------------------


def test_a_frame_is_one_message_that_holds_every_port_s_message() -> None:
    """Parts of one frameNumber are one image; what is forwarded is all of them, as they came."""
    assembler = SlsAssembler(2)
    low, high = part(101, 0), part(101, 1)
    messages = fed(assembler, (1, high), (0, low))
    assert summary(messages) == ["start", (0, 2)]
    image = messages[1]
    assert (image.parts, image.followed_by) == (high, (low,))
    assert image.size_bytes == sum(map(len, (*low, *high)))
    assert image.frame is not None
    assert image.frame.fault is None
    assert image.frame.series.key == (7, "/data/run@101")
    pixels = open_backend("cpu").decode(image.frame)
    assert pixels.tolist() == [[101] * 4] * 2 + [[102] * 4] * 2


def test_flipped_rows_of_eiger_are_turned() -> None:
    """``flipRows`` 1: the part's first row is its lowest."""
    rows = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], "<u2")
    assembler = SlsAssembler(2)
    messages = fed(assembler, (0, part(101, 0, rows)), (1, part(101, 1, rows, flipRows=1)))
    assert messages[1].frame is not None
    pixels = open_backend("cpu").decode(messages[1].frame)
    assert pixels.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [5, 6, 7, 8], [1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("bits", "blob", "expected"),
    [
        (4, bytes([0x12, 0x34, 0x56, 0x78]), [[1, 2, 3, 4], [5, 6, 7, 8]]),
        (8, bytes([1, 2, 3, 4, 5, 6, 7, 255]), [[1, 2, 3, 4], [5, 6, 7, 255]]),
        (12, bytes([0x23, 0x61, 0x45] * 4), [[0x123, 0x456] * 2] * 2),
        (32, np.array([1, 2, 3, 70000] * 2, "<u4").tobytes(), [[1, 2, 3, 70000]] * 2),
    ],
)
def test_every_bit_mode_is_read(bits: int, blob: bytes, expected: list[list[int]]) -> None:
    """4 bits: the first pixel in the upper half of a byte; 12: low bits first."""
    whole = part(101, 0, np.frombuffer(blob, np.uint8), bitmode=bits, detshape=[1, 1])
    messages = fed(SlsAssembler(1), (0, whole))
    assert messages[1].frame is not None
    assert messages[1].frame.fault is None
    assert open_backend("cpu").decode(messages[1].frame).tolist() == expected


@pytest.mark.parametrize(
    ("bits", "blob", "valid"),
    [
        (4, bytes([0xEF] * 4), [True, False] * 4),
        (8, bytes([254, 255] * 4), [True, False] * 4),
        (12, bytes([0xFE, 0xFF, 0xFF] * 4), [True, False] * 4),
        (16, np.array([4, 65535] * 4, "<u2").tobytes(), [True, False] * 4),
    ],
)
def test_pixels_of_lost_packets_are_no_counts(bits: int, blob: bytes, valid: list[bool]) -> None:
    """Receivers fill what was lost with ones; the largest value of any width is left out."""
    whole = part(101, 0, np.frombuffer(blob, np.uint8), bitmode=bits, detshape=[1, 1])
    messages = fed(SlsAssembler(1), (0, whole))
    frame = messages[1].frame
    assert frame is not None
    assert measured(frame, open_backend("cpu").decode(frame))[1].reshape(-1).tolist() == valid


def test_a_number_that_does_not_fit_is_none() -> None:
    """Counted from an origin far below 0, the largest frame number has no image_id."""
    assembler, dark = SlsAssembler(), np.zeros((2, 4), "<u2")
    first, last = (
        fed(assembler, (0, part(number, 0, dark, detshape=[1, 1], frameIndex=index)))
        for number, index in ((5, 2**63 - 1), (2**63 - 1, -1))
    )
    assert [m.frame.image_id for m in first if m.frame is not None] == [2**63 - 1]
    assert [m.frame.image_id for m in last if m.frame is not None] == [-1]


def test_a_part_that_was_lost_costs_no_time() -> None:
    """A port that sent a later frame has passed the earlier one, which goes on without it."""
    assembler = SlsAssembler(2)
    messages = fed(assembler, (0, part(101, 0)), (0, part(102, 0)), (1, part(102, 1)))
    assert summary(messages) == ["start", (0, 1), (1, 2)]
    frame = messages[1].frame
    assert frame is not None
    pixels = open_backend("cpu").decode(frame)
    assert pixels.tolist() == [[101] * 4] * 2 + [[65535] * 4] * 2
    valid = measured(frame, pixels)[1]
    assert valid[:2].all()
    assert not valid[2:].any()


def test_parts_lost_on_every_port_in_turn_cost_no_time() -> None:
    """No frame is ever complete, and none waits: each port is known to have gone on."""
    assembler = SlsAssembler(2)
    parts = [(n % 2, part(n, n % 2)) for n in range(101, 107)]
    assert summary(fed(assembler, *parts)) == ["start", *((n, 1) for n in range(5))]


def test_a_frame_with_a_lost_part_goes_on_unscored() -> None:
    """What nobody has seen may hold the spots; a part of which packets were lost has been seen."""
    assembler = SlsAssembler(2)
    messages = fed(assembler, (0, part(101, 0)), (0, part(102, 0)))
    messages += fed(assembler, (1, part(102, 1, completeImage=0)))
    lost, seen = (m.frame for m in messages if m.frame is not None)
    assert lost.fault is Reason.MALFORMED
    assert lost.fault_detail == (
        "1 of 2 parts did not come, that of port (1, 0) (row, column) among them"
    )
    assert seen.fault is None


def test_a_port_that_is_dead_for_good_is_like_a_masked_module() -> None:
    """After 10 s and 100 frames without it the others decide, in later series too; as soon as it
    is heard a loss is a loss again. Which port it is can be asked meanwhile."""
    assembler = SlsAssembler(2, wait_ns=WAIT)
    faults = []
    assert assembler.trouble == ""
    for n in range(104):
        at_ns = n * WAIT
        messages = fed(assembler, (0, part(101 + n, 0)), at_ns=at_ns)
        messages += assembler.due(at_ns + WAIT)
        faults += [m.frame.fault for m in messages if m.frame is not None]
    assert faults == [Reason.MALFORMED] * 100 + [None] * 4
    fed(assembler, (0, (END,)), (1, (END,)), at_ns=105 * WAIT)
    fed(assembler, (0, part(300, 0, fileIndex=8, frameIndex=0)), at_ns=106 * WAIT)
    (frame,) = (m.frame for m in assembler.due(107 * WAIT) if m.frame is not None)
    assert (frame.series.series_id, frame.fault) == (8, None)
    assert assembler.trouble.startswith("1 ports (row, column) are silent: (1, 0);")
    fed(assembler, (1, part(301, 1, fileIndex=8, frameIndex=1)), at_ns=108 * WAIT)
    assert assembler.trouble == ""
    messages = fed(assembler, (0, part(302, 0, fileIndex=8, frameIndex=2)), at_ns=108 * WAIT)
    messages += assembler.due(109 * WAIT)
    assert {m.frame.fault for m in messages if m.frame is not None} == {Reason.MALFORMED}


def test_a_silent_port_is_waited_for_once() -> None:
    """The first frame waits its time; later ones go at once; the port is back when it is heard."""
    assembler = SlsAssembler(2, wait_ns=WAIT)
    assert fed(assembler, (0, part(101, 0))) == []
    assert assembler.due_ns == WAIT
    assert assembler.due(WAIT - 1) == []
    assert summary(assembler.due(WAIT)) == ["start", (0, 1)]
    assert summary(fed(assembler, (0, part(102, 0)))) == [(1, 1)]
    both = fed(assembler, (1, part(103, 1)), (0, part(103, 0)))
    assert summary(both) == [(2, 2)]
    assert fed(assembler, (0, part(104, 0))) == []


def test_a_part_that_comes_after_its_frame_goes_on_as_control() -> None:
    """What is late is lost to the frame, not to the writer."""
    assembler = SlsAssembler(2, wait_ns=WAIT)
    fed(assembler, (0, part(101, 0)))
    assembler.due(WAIT)
    late = part(101, 1)
    (message,) = fed(assembler, (1, late))
    assert (message.kind.value, message.parts) == ("control", late)
    assert "late" in message.detail


def test_a_part_that_comes_twice_goes_on_as_control() -> None:
    """The first of two is the frame's."""
    assembler = SlsAssembler(2)
    messages = fed(assembler, (0, part(101, 0)), (0, part(101, 0)), (1, part(101, 1)))
    assert summary(messages) == ["control", "start", (0, 2)]


def test_frames_go_on_in_order_whatever_the_ports_lag() -> None:
    """A port three frames behind: each frame goes when it is whole, in order."""
    images = [np.full((4, 4), n, np.uint16) for n in range(8)]
    layout = Layout(detector="eiger", ports=(2, 1))
    assembler = SlsAssembler(2)
    sent = acquisition(images, layout, faults=SlsFaults(skew=3))
    messages = fed(assembler, *((port, parts) for _, port, parts in sent))
    assert summary(messages) == ["start", *((n, 2) for n in range(8)), "end"]


def test_what_waits_is_bounded_by_bytes() -> None:
    """Beyond the budget the oldest frame goes on as it stands."""
    size = sum(map(len, part(101, 0)))
    assembler = SlsAssembler(2, held_bytes=3 * size)
    messages = fed(assembler, *((0, part(n, 0)) for n in range(101, 106)))
    assert summary(messages) == ["start", (0, 1), (1, 1)]


def test_what_waits_is_bounded_by_number() -> None:
    """A detector of 1024 ports of which one sends: 256 frames wait for the others, no more."""
    assembler = SlsAssembler(1)
    parts = [part(101 + n, 0, detshape=[32, 32]) for n in range(258)]
    assert summary(fed(assembler, *((0, one) for one in parts))) == ["start", (0, 1), (1, 1)]


def test_everything_that_waits_is_given_out_at_the_end_of_a_run() -> None:
    """Neither parts nor end messages stay behind."""
    assembler = SlsAssembler(2)
    fed(assembler, (0, part(101, 0)), (0, part(102, 0)), (0, (END,)))
    messages = assembler.flush()
    assert summary(messages) == ["start", (0, 1), (1, 1), "end"]
    assert messages[-1].parts == (END,)
    assert assembler.flush() == []


def test_gaps_between_modules_are_left_out() -> None:
    """Four ports of 512 x 512: two modules, one above the other; the gap is no count. Maps fit
    with the gap and without."""
    image = np.arange(1024 * 1024, dtype=np.uint32).reshape(1024, 1024) % 5000
    maps = SlsMaps.drawn((1024, 1024), 12.4, seed=1)
    layout = Layout(detector="jungfrau", ports=(2, 2))
    sent = [(port, parts) for _, port, parts in acquisition([image], layout, maps=maps)]
    gapped = (
        np.insert(maps.pedestal, [512] * 36, 0.0, axis=1),
        np.insert(maps.gain, [512] * 36, 1.0, axis=1),
    )
    for pedestal, gain in ((maps.pedestal, maps.gain), gapped):
        assembler = SlsAssembler(4, maps=Maps(pedestal, gain, 12.4), gap_px=(36, 8))
        frame = fed(assembler, *sent)[1].frame
        assert frame is not None
        assert frame.fault is None
        assert frame.shape == (1060, 1024)
        pixels = open_backend("cpu").decode(frame)
        assert (pixels[512:548] == 65535).all()
        assert np.abs(np.delete(pixels, np.s_[512:548], axis=0) - image.astype(int)).max() <= 1


# -- series ----------------------------------------------------------------------------------------


def test_a_series_ends_when_every_port_has_said_so() -> None:
    """The end holds the end message of each port, behind every frame."""
    assembler = SlsAssembler(2)
    fed(assembler, (0, part(101, 0)), (1, part(101, 1)))
    assert fed(assembler, (0, (END,))) == []
    messages = fed(assembler, (0, part(99, 0, fileIndex=8)), (1, (END,)))
    assert summary(messages)[0] == "end"
    assert (messages[0].parts, messages[0].followed_by) == ((END,), ((END,),))
    assert messages[0].series is not None
    assert messages[0].series.series_id == 7


def test_an_end_that_never_comes_is_given_up_after_silence() -> None:
    """Two seconds without a word of the port, counted from its last one."""
    assembler = SlsAssembler(2, wait_ns=WAIT)
    fed(assembler, (0, part(101, 0)), (1, part(101, 1)))
    fed(assembler, (0, (END,)), at_ns=10 * MS)
    assert assembler.due_ns == 2010 * MS
    fed(assembler, (1, part(102, 1)), at_ns=1900 * MS)
    assert assembler.due(2010 * MS) == []
    assert assembler.due_ns == 4010 * MS
    assert summary(assembler.due(4010 * MS)) == ["end"]


def test_frames_of_the_next_series_do_not_wait_long_for_an_end() -> None:
    """A port dies after its last part, and the others begin anew: their first frame waits as long
    as for a part. A port that still sends is waited for."""
    assembler = SlsAssembler(2, wait_ns=WAIT)
    fed(assembler, (0, part(101, 0)), (1, part(101, 1)))
    fed(assembler, (0, (END,)), at_ns=1 * MS)
    fed(assembler, (0, part(500, 0, fileIndex=8, frameIndex=0)), at_ns=5 * MS)
    assert assembler.due_ns == 105 * MS
    fed(assembler, (1, part(102, 1)), at_ns=50 * MS)
    assert assembler.due(105 * MS) == []
    assert assembler.due_ns == 205 * MS
    assert summary(assembler.due(205 * MS)) == ["end", "start", (0, 1)]


def test_a_part_that_comes_after_its_series_goes_on_as_control() -> None:
    """A port that is not waited for any more begins no series of its own."""
    assembler = SlsAssembler(2, wait_ns=WAIT)
    fed(assembler, (0, part(101, 0)), (1, part(101, 1)), (0, part(102, 0)), (0, (END,)))
    assert summary(assembler.due(WAIT)) == [(1, 1), "end"]
    messages = fed(assembler, (1, part(102, 1)), (1, (END,)), at_ns=WAIT)
    assert summary(messages) == ["control", "control"]
    assert (assembler.incomplete, assembler.late) == (1, 1)


def test_every_socket_s_end_ends_a_series_of_which_a_port_was_never_heard() -> None:
    """All of that port's parts were lost: its end counts, so nobody waits for it."""
    assembler = SlsAssembler(2)
    fed(assembler, (0, part(101, 0)))
    assert summary(fed(assembler, (1, (END,)))) == ["control"]
    assert summary(fed(assembler, (0, (END,)))) == ["start", (0, 1), "end"]


def test_ports_that_share_a_socket_end_one_by_one() -> None:
    """A capture, or a proxy: an end message names no port, so they are counted."""
    assembler = SlsAssembler(1)
    fed(assembler, (0, part(101, 0)), (0, part(101, 1)))
    assert fed(assembler, (0, (END,))) == []
    assert summary(fed(assembler, (0, part(102, 0)), (0, part(102, 1)))) == [(1, 2)]
    assert summary(fed(assembler, (0, (END,)))) == ["end"]


def test_a_run_that_stops_says_no_end_of_a_series_that_runs() -> None:
    """The ledger must not take it for ended."""
    assembler = SlsAssembler(2)
    fed(assembler, (0, part(101, 0)))
    assert summary(assembler.flush()) == ["start", (0, 1)]


def test_two_acquisitions_at_most_wait_for_a_port() -> None:
    """One port goes on and on, the other says nothing: the oldest is given up."""
    assembler = SlsAssembler(2)
    numbers = [(0, part(100 * n, 0, fileIndex=n, frameIndex=0)) for n in (7, 8, 9)]
    assert fed(assembler, *numbers[:2]) == []
    assert summary(fed(assembler, numbers[2])) == ["start", (0, 1), "end"]


def test_a_slow_detector_is_not_taken_for_an_ended_one() -> None:
    """Without any end message the series goes on after any pause."""
    assembler = SlsAssembler(1)
    alone = {"detshape": [1, 1]}
    fed(assembler, (0, part(101, 0, **alone)))
    assert assembler.due(10**12) == []
    assert summary(fed(assembler, (0, part(102, 0, **alone)), at_ns=10**12)) == [(1, 1)]


def test_an_acquisition_begun_anew_ends_the_one_before() -> None:
    """Every end message was lost: another file index says that it is over."""
    assembler = SlsAssembler(2)
    first = fed(assembler, (0, part(101, 0)), (1, part(101, 1)))
    second = fed(
        assembler,
        (0, part(500, 0, fileIndex=8, frameIndex=0)),
        (1, part(500, 1, fileIndex=8, frameIndex=0)),
    )
    assert summary(first) == ["start", (0, 2)]
    assert summary(second) == ["end", "start", (0, 2)]
    assert second[0].parts == ()


def test_frame_indices_that_begin_again_begin_a_series() -> None:
    """Same file index and name: the index restarts while the number goes on."""
    assembler = SlsAssembler(1)
    alone = {"detshape": [1, 1]}
    messages = fed(
        assembler,
        (0, part(101, 0, **alone)),
        (0, part(102, 0, **alone)),
        (0, part(103, 0, frameIndex=0, **alone)),
    )
    assert summary(messages) == ["start", (0, 1), (1, 1), "end", "start", (0, 1)]
    keys = [m.series.key for m in messages if m.kind == "start" and m.series is not None]
    assert keys == [(7, "/data/run@101"), (7, "/data/run@103")]


@pytest.mark.parametrize("name", ["/data/run@101", "/data/run@101#3"])
def test_a_series_goes_on_after_a_restart_of_ours(name: str) -> None:
    """What an earlier process began does not begin again; the next acquisition does."""
    assembler = SlsAssembler(1)
    assembler.go_on_with([Begun(key=(7, name), seen=((0, 2),))])
    alone = {"detshape": [1, 1]}
    messages = fed(assembler, *((0, part(n, 0, **alone)) for n in (104, 105)), (0, (END,)))
    assert summary(messages) == [(3, 1), (4, 1), "end"]
    frame = messages[0].frame
    assert frame is not None
    assert frame.series.key == (7, name)
    assert frame.fault is None
    assert not frame.duplicate
    assert summary(fed(assembler, (0, part(101, 0, **alone)))) == ["start", (0, 1)]


def test_an_acquisition_begun_anew_after_a_restart_is_another_series() -> None:
    """Same file index, name and numbers as the one that an earlier process saw begin."""
    assembler = SlsAssembler(1)
    name = "/data/run@101"
    assembler.go_on_with([Begun(key=(7, n), seen=((0, 9),)) for n in (name, f"{name}#2")])
    alone = {"detshape": [1, 1]}
    messages = fed(assembler, *((0, part(n, 0, **alone)) for n in (101, 102)))
    assert summary(messages) == ["start", (0, 1), (1, 1)]
    frames = [m.frame for m in messages if m.frame is not None]
    assert [(f.series.series_unique_id, f.fault, f.duplicate) for f in frames] == [
        (f"{name}#3", None, False)
    ] * 2


def test_a_series_that_repeats_every_identity_gets_one_of_its_own() -> None:
    """Numbers and indices both begin again, after an end."""
    assembler = SlsAssembler(1)
    again = [(0, part(101, 0, detshape=[1, 1])), (0, (END,))] * 2
    messages = fed(assembler, *again)
    assert summary(messages) == ["start", (0, 1), "end"] * 2
    ids = [m.series.series_unique_id for m in messages if m.kind == "start" and m.series]
    assert ids == ["/data/run@101", "/data/run@101#2"]


def test_a_port_that_joined_late_counts_from_the_same_frame() -> None:
    """Each port counts frameIndex from its own first frame; image_id from the earliest."""
    assembler = SlsAssembler(2)
    messages = fed(
        assembler,
        (0, part(101, 0)),
        (0, part(102, 0, frameIndex=1)),
        (1, part(102, 1, frameIndex=0)),
    )
    assert summary(messages) == ["start", (0, 1), (1, 2)]
    messages = fed(
        SlsAssembler(2),
        (1, part(102, 1, frameIndex=0)),
        (0, part(102, 0, frameIndex=1)),
    )
    assert summary(messages) == ["start", (1, 2)]


def test_numbers_that_go_back_begin_a_series() -> None:
    """Where no frameIndex is told."""
    alone = {"detshape": [1, 1], "frameIndex": None}
    parts = [(0, part(number, 0, **alone)) for number in (101, 102, 101)]
    messages = fed(SlsAssembler(1), *parts)
    assert summary(messages) == ["start", (0, 1), (1, 1), "end", "start", (0, 1)]


def test_an_end_of_no_series_goes_on() -> None:
    """An end message before any frame, or a second one, is control."""
    assembler = SlsAssembler(2)
    assert summary(fed(assembler, (0, (END,)))) == ["control"]
    fed(assembler, (0, part(101, 0)), (1, part(101, 1)), (0, (END,)))
    assert summary(fed(assembler, (0, (END,)))) == ["control"]


def test_what_the_stream_does_not_tell_comes_from_the_settings() -> None:
    """Geometry and rotation of the book's defaults are the series'."""
    geometry = Geometry(
        beam_center_x_px=2.0,
        beam_center_y_px=2.0,
        pixel_size_x_m=75e-6,
        pixel_size_y_m=75e-6,
        detector_distance_m=0.1,
        incident_wavelength_angstrom=1.0,
    )
    book = SeriesBook(geometry=geometry, increments_deg={"omega": 0.1})
    messages = fed(SlsAssembler(1, book), (0, part(101, 0, detshape=[1, 1])))
    series = messages[0].series
    assert series is not None
    assert series.geometry == geometry
    assert series.is_rotation
    told = book.start(Series(series_id=1, increments_deg={"omega": 0.0}))
    assert not told.is_rotation


# -- what is wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "blob", "reason", "why"),
    [
        ({"bitmode": 32}, None, Reason.MALFORMED, "16 bytes"),
        ({"bitmode": 64}, np.zeros(64, np.uint8), Reason.UNKNOWN_ENCODING, "bitmode 64"),
        ({"detType": 3}, None, Reason.UNKNOWN_ENCODING, "pedestal_file"),
        ({"detType": 6}, None, Reason.UNKNOWN_ENCODING, "detType 6"),
        ({"row": 9}, None, Reason.MALFORMED, "outside"),
        ({"row": -1}, None, Reason.MALFORMED, "outside"),
    ],
)
def test_a_part_that_cannot_be_read_leaves_its_frame_unscored(
    changed: dict[str, Any], blob: Any, reason: Reason, why: str
) -> None:
    """It is still a frame, received and forwarded, with the reason."""
    assembler = SlsAssembler(1, wait_ns=WAIT)
    messages = fed(assembler, (0, part(101, 0, blob, **{"detshape": [1, 1], **changed})))
    messages += assembler.due(WAIT)
    assert summary(messages) == ["start", (0, 1)]
    frame = messages[1].frame
    assert frame is not None
    assert frame.fault is reason
    assert why in frame.fault_detail


def test_ports_that_contradict_each_other_leave_the_frame_unscored() -> None:
    """One port sends 8 bits, the other 16."""
    other = part(101, 1, np.zeros((2, 4), np.uint8), bitmode=8)
    messages = fed(SlsAssembler(2), (0, part(101, 0)), (1, other))
    frame = messages[1].frame
    assert frame is not None
    assert frame.fault is Reason.MALFORMED


def test_another_size_of_image_in_one_series_is_kept_unscored() -> None:
    """The declared size is that of the first frame."""
    alone = {"detshape": [1, 1]}
    small = part(102, 0, np.zeros((1, 4), "<u2"), shape=[4, 1], **alone)
    messages = fed(SlsAssembler(1), (0, part(101, 0, **alone)), (0, small))
    frame = messages[-1].frame
    assert frame is not None
    assert frame.fault is Reason.GEOMETRY_CHANGED


@pytest.mark.parametrize(
    "wrong",
    [
        (b"", b"x"),
        (b"{", b"x"),
        (b"[1]", b"x"),
        (b'{"a":' * 5000, b"x"),
        (HEADER.encode() + b" " * (1 << 17), bytes(16)),
        part(-1, 0, acqIndex=None, frameIndex=None),
        part(101, 0, shape=[0, 4]),
        part(101, 0, shape="4x2"),
        part(101, 0, shape=[True, 2]),
        part(101, 0, detshape=[100000, 100000]),
        part(101, 0, detshape=[1024, 2]),
        part(101, 0, detshape=[1000, 1], shape=[60000, 2]),
        (*part(101, 0), b"more"),
        (part(101, 0)[0],),
    ],
)
def test_what_is_no_part_is_malformed_and_harms_nothing(wrong: tuple[bytes, ...]) -> None:
    """It goes on; the frame that runs is completed all the same."""
    assembler = SlsAssembler(2)
    messages = fed(assembler, (0, part(101, 0)), (0, wrong), (1, part(101, 1)))
    assert summary(messages) == ["malformed", "start", (0, 2)]
    assert messages[0].parts == wrong


def test_optional_fields_may_be_missing() -> None:
    """A frame number, a shape and the pixels are enough for a detector of one port."""
    told = b'{"frameNumber":5, "shape":[4, 2]}'
    messages = SlsAssembler(1).take((told, np.arange(8, dtype="<u2").tobytes()), 0)
    frame = messages[1].frame
    assert frame is not None
    assert frame.fault is None
    assert open_backend("cpu").decode(frame).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_half_a_character_in_a_file_name_harms_nothing() -> None:
    """JSON can hold a lone surrogate; tables, journals and listeners take UTF-8."""
    message = SlsAssembler(1).take(part(101, 0, fname="\ud800x", detshape=[1, 1]), 0)[1]
    assert message.frame is not None
    assert message.frame.series.series_unique_id == "?x@101"


def test_other_kinds_of_message_go_on() -> None:
    """The package's frame synchronizer speaks of ``htype``."""
    messages = SlsAssembler(1).take((b'{"htype":"series_end"}\n',), 0)
    assert summary(messages) == ["control"]


_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.lists(st.integers(-3, 2**33), max_size=3),
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(100, 104),
            st.integers(0, 1),
            st.dictionaries(st.sampled_from(sorted(json.loads(HEADER))), _VALUES, max_size=2),
            st.integers(0, 40),
        ),
        max_size=12,
    )
)
def test_whatever_headers_say_nothing_is_lost(sent: list[Any]) -> None:
    """Every message sent leaves exactly once, as it came, and no decoder breaks on it."""
    assembler = SlsAssembler(2, wait_ns=WAIT)
    backend = open_backend("cpu")
    messages: list[Message] = []
    came = []
    for number, row, changed, size in sent:
        whole = part(number, row, np.zeros(size, np.uint8), **changed)
        came.append(whole)
        messages += assembler.take(whole, 0, row)
    messages += assembler.due(WAIT)
    messages += assembler.flush()
    left = [m for m in messages if m.parts] + [
        Message(kind=m.kind, parts=more) for m in messages for more in m.followed_by
    ]
    assert sorted(m.parts for m in left) == sorted(came)
    for message in messages:
        frame = message.frame
        if frame is not None and frame.fault is None and max(frame.shape) <= 1000:
            views = backend.prepare([frame])
            assert views.errors[0] is None


# -- words into photons ----------------------------------------------------------------------------


def calibration(shape: tuple[int, int]) -> Calibration:
    """Pedestals 3000, 15000, 15000; 500, -20 and -2 ADU for a photon."""
    pedestal = np.array([3000.0, 15000.0, 15000.0], np.float32)
    per_adu = 1.0 / np.array([500.0, -20.0, -2.0], np.float32)
    whole = np.ones((3, *shape), np.float32)
    return Calibration(
        pedestal=whole * pedestal[:, None, None], photons_per_adu=whole * per_adu[:, None, None]
    )


def jungfrau(words: Any, maps: Calibration | None = None) -> Frame:
    """A frame of one piece of words."""
    array = np.asarray(words, "<u2")
    series = Series(calibration=maps or calibration(array.shape))
    piece = Piece(payload=array.tobytes(), top=0, left=0, shape=array.shape, is_adc=True)
    return Frame(
        series=series,
        image_id=0,
        encoding="raw",
        framed=False,
        dtype=np.dtype(np.uint16),
        shape=array.shape,
        pieces=(piece,),
    )


ERROR = 65535


@pytest.mark.parametrize(
    ("word", "photons"),
    [
        (3000, 0),
        (3500, 1),
        (3000 + 749, 1),  # 1.498
        (3000 + 750, 2),  # 1.5, half to even
        (3000 + 1250, 2),  # 2.5, half to even
        (2900, 0),  # -0.2
        (2000, 0),  # -2: noise below zero
        (0x3FFF, 27),  # 26.766
        (1 << 14 | 14000, 50),
        (1 << 14 | 15000, 0),
        (3 << 14 | 5000, 5000),
        (3 << 14 | 15001, 0),  # -0.5, half to even
        (2 << 14 | 5000, ERROR),
        (0xFFFF, ERROR),
        (0xC000, ERROR),
    ],
)
@pytest.mark.parametrize("neighbour", [3000, 1 << 14 | 15000])
def test_words_become_photons(word: int, photons: int, neighbour: int) -> None:
    """By stage, whichever loop a row takes; two gain bits of 10, ones and full scale are errors."""
    pixels = open_backend("cpu").decode(jungfrau([[word, neighbour]]))
    assert pixels.tolist() == [[photons, 0]]


def test_photons_agree_with_a_slow_twin() -> None:
    """Random words and maps, some pixels not calibrated: the same as float32 arithmetic in numpy
    one pixel at a time."""
    rng = np.random.default_rng(5)
    shape = (24, 40)
    words = rng.integers(0, 1 << 16, shape).astype(np.uint16)
    words[::2] &= 0x3FFF
    gain = rng.normal(1.0, 0.1, (3, *shape)) * np.array([40.0, -1.4, -0.1])[:, None, None]
    gain[:, 3, 4] = 0.0
    gain[0, 6, 7] = np.nan
    pedestal = rng.normal(3000, 50, (3, *shape))
    found = Maps(pedestal, gain, 12.4).fitting(shape, np.arange(24), np.arange(40))
    assert found is not None
    pixels = open_backend("cpu").decode(jungfrau(words, found))
    expected = np.full(shape, ERROR, np.int64)
    for y in range(shape[0]):
        for x in range(shape[1]):
            word = int(words[y, x])
            stage = {0: 0, 1: 1, 3: 2}.get(word >> 14)
            if stage is None or word in (0xFFFF, 0xC000):
                continue
            g = np.float32(gain[stage, y, x]) * np.float32(12.4)
            if not np.isfinite(g) or g == 0:
                continue
            adu = np.float32(word & 0x3FFF) - np.float32(pedestal[stage, y, x])
            photons = round(float(adu * (np.float32(1.0) / g)))
            expected[y, x] = max(photons, 0) if abs(photons) <= 65533 else ERROR
    np.testing.assert_array_equal(pixels, expected)


def test_the_twin_s_photons_come_back() -> None:
    """From photons to words of three stages over the wire to photons: exact up to what the
    converter's steps allow."""
    photons = np.random.default_rng(2).poisson(3.0, (8, 16))
    photons[1, 1], photons[6, 3], photons[7, 7] = 700, 9000, 100_000
    maps = SlsMaps.drawn((8, 16), 12.4, seed=3)
    words = maps.words(photons)
    assert {int(word) >> 14 for word in words.reshape(-1)} == {0, 1, 3}
    assembler = SlsAssembler(2, maps=Maps(maps.pedestal, maps.gain, 12.4))
    sent = acquisition([photons], Layout(ports=(2, 1)), maps=maps)
    messages = fed(assembler, *((port, parts) for _, port, parts in sent))
    frame = messages[1].frame
    assert frame is not None
    pixels = open_backend("cpu").decode(frame)
    assert pixels[7, 7] == ERROR
    near = np.abs(pixels.astype(np.int64) - photons) <= np.where(photons > 1000, 1, 0)
    assert np.argwhere(~near).tolist() == [[7, 7]]


def test_photons_reach_the_views_and_the_spot_finder_alike() -> None:
    """The overview counts photons; noise below zero counts as none; errors are left out."""
    frame = jungfrau([[3500, 2000, 0xFFFF, 1 << 14 | 14000]])
    backend = open_backend("cpu")
    views = backend.prepare([frame])
    assert views.errors == (None,)
    assert int(views.total[0].sum()) == 1 + 0 + 50
    assert int(views.count[0].sum()) == 3
    counts, valid = measured(frame, backend.decode(frame))
    assert valid.tolist() == [[True, True, False, True]]
    assert counts[0, [0, 1, 3]].tolist() == [1, 0, 50]


def test_kept_files_hold_photons(tmp_path: Path) -> None:
    """A frame that came in parts is one image of the NXmx file; one that cannot be put together
    is an error of the writer alone."""
    writer = KeptWriter(tmp_path, whole=whole)
    frame = jungfrau([[3500, 3 << 14 | 5000], [0xFFFF, 3000]])
    writer.write(frame)
    with pytest.raises(TriageError, match="pedestal_file"):
        writer.write(structs.replace(frame, series=Series()))
    master, *_ = writer.close()
    with h5py.File(master) as file:
        assert file["entry/data/data"][0].tolist() == [[1, 5000], [65535, 0]]


def test_maps_of_another_shape_are_an_error_of_the_frame() -> None:
    """Never read past the maps."""
    with pytest.raises(DecodeError, match=r"expected \(3, 1, 2\)"):
        open_backend("cpu").decode(jungfrau([[3000, 3000]], calibration((1, 3))))


@pytest.mark.parametrize("place", [(1, 0), (0, 1), (-1, 0), (0, -1)])
def test_a_piece_outside_its_frame_is_an_error(place: tuple[int, int]) -> None:
    """Never written outside."""
    frame = jungfrau([[3000, 3000]])
    piece = Piece(payload=bytes(4), top=place[0], left=place[1], shape=(1, 2), is_adc=True)
    outside = structs.replace(frame, pieces=(piece,))
    with pytest.raises(DecodeError, match="inside"):
        open_backend("cpu").decode(outside)


# -- maps from files, addresses --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["h5", "npz", "npy"])
def test_maps_are_read_from_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    """Two files, or one with both by name; ADU per keV and the wavelength give photons."""
    pedestal = np.full((3, 2, 4), 100.0, np.float32)
    gain = np.full((3, 2, 4), 10.0, np.float32)
    gain[1, 0, 0] = 0.0
    files = tmp_path / f"maps.{kind}", tmp_path / f"maps.{kind}"
    if kind == "h5":
        with h5py.File(files[0], "w") as file:
            file["calibration/pedestal"], file["calibration/gain_map"] = pedestal, gain
    elif kind == "npz":
        np.savez(files[0], pedestal=pedestal, gain=gain)
    else:
        files = tmp_path / "a.npy", tmp_path / "b.npy"
        np.save(files[0], pedestal)
        np.save(files[1], gain)
    maps = load_maps(files[0], files[1], 12.398419843320026)  # 1 keV
    found = maps.fitting((2, 4), np.arange(2), np.arange(4))
    assert found is not None
    assert found.pedestal[2, 1, 3] == 100.0
    assert found.photons_per_adu[0, 0, 0] == pytest.approx(0.1)
    assert np.isnan(found.photons_per_adu[1, 0, 0])
    assert maps.fitting((4, 4), np.arange(4), np.arange(4)) is None
    assert "expected (3, 4, 4)" in maps.why_not


def test_what_lies_beside_a_map_is_not_read(tmp_path: Path) -> None:
    """A file with the dark frames that the pedestal was made from: a terabyte is no memory."""
    path = tmp_path / "maps.h5"
    with h5py.File(path, "w") as file:
        file["pedestal"], file["gain"] = np.ones((2, 3, 2, 4), np.float32)
        file.create_dataset("dark", (10**6, 512, 1024), "u2", chunks=(1, 512, 1024))
    assert load_maps(path, path, 1.0).fitting((2, 4), np.arange(2), np.arange(4)) is not None


def test_maps_that_cannot_be_used_are_a_fault_of_the_settings(tmp_path: Path) -> None:
    """Each message names the file or key and what was expected."""
    good, bad, pickled = tmp_path / "good.npy", tmp_path / "bad.npy", tmp_path / "pickled.npy"
    np.save(good, np.ones((3, 2, 2)))
    np.save(bad, np.ones((2, 2, 2)))
    np.save(pickled, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError, match="incident_wavelength_angstrom"):
        load_maps(good, good, 0.0)
    with pytest.raises(ConfigError, match=r"gain_file.*\(3, y, x\)"):
        load_maps(good, bad, 1.0)
    with pytest.raises(ConfigError, match="pedestal_file"):
        load_maps(tmp_path / "none.h5", good, 1.0)
    with pytest.raises(ConfigError, match="pedestal_file"):
        load_maps(pickled, good, 1.0)


def test_a_range_of_ports_names_each() -> None:
    """Ranges and single addresses may be mixed."""
    assert port_addresses("tcp://a:30001-30003, tcp://b:40000") == [
        "tcp://a:30001",
        "tcp://a:30002",
        "tcp://a:30003",
        "tcp://b:40000",
    ]


@pytest.mark.parametrize("wrong", ["", "tcp://a:5-4", "tcp://a:0-4", "tcp://a:1-2,tcp://a:2"])
def test_addresses_that_make_no_sense_are_refused(wrong: str) -> None:
    """Before any socket is opened."""
    with pytest.raises(ConfigError):
        port_addresses(wrong)


# -- PSI's older family ----------------------------------------------------------------------------


def test_whole_frames_of_the_array_family_are_read() -> None:
    """``array-1.0``: shape from slow to fast, either endianness; numbers that go back begin a
    series."""

    def array(number: int, order: str) -> tuple[bytes, bytes]:
        told = {
            "htype": "array-1.0",
            "shape": [1, 2, 3],
            "type": "uint16",
            "frame": number,
            "endianness": {"<": "little", ">": "big"}[order],
        }
        return json.dumps(told).encode(), np.arange(6, dtype=f"{order}u2").tobytes()

    assembler = SlsAssembler(1)
    messages = fed(assembler, (0, array(0, "<")), (0, array(1, ">")), (0, array(0, "<")))
    assert summary(messages) == ["start", (0, 1), (1, 1), "end", "start", (0, 1)]
    frames = [m.frame for m in messages if m.frame is not None]
    for frame in frames:
        assert open_backend("cpu").decode(frame).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert frames[0].series.key != frames[2].series.key

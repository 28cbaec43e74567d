"""Captures: what was on the wire, in a file, and decided again from there."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from simulators.detectors.detector import series_messages
from simulators.detectors.frames import SimFrame, StreamInfo, compressed
from triage.backends import open_backend
from triage.errors import ConfigError, UnreadableFile
from triage.ingest.capture import Capture, Captured, Recorder
from triage.ingest.files import Files
from triage.records import Message

IMAGES = [np.random.default_rng(n).poisson(1.0, (70, 90)).astype(np.uint16) for n in range(3)]
FRAMES = [
    SimFrame(payload=compressed(i, "bslz4"), encoding="bslz4", dtype=i.dtype, shape=i.shape)
    for i in IMAGES
]
INFO = StreamInfo(shape=IMAGES[0].shape, number_of_images=3, series_id=12)


def recorded(path: Path, protocol: str, **options: object) -> list[tuple[bytes, ...]]:
    """A series of three images in a capture; its messages."""
    sent = [
        tuple(bytes(part) for part in message.parts)
        for message in series_messages(INFO, FRAMES, protocol=protocol, **options)  # type: ignore[arg-type]
    ]
    recorder = Recorder(path, protocol="auto")
    for number, parts in enumerate(sent):
        recorder.write(parts, 1000 * number)
    recorder.close()
    return sent


def read(*paths: Path) -> tuple[list[Message], Files]:
    source = Files(paths)
    messages: list[Message] = []
    while not source.exhausted:
        messages += source.receive(0)
    source.close()
    return messages, source


def test_the_bytes_are_laid_out_as_other_programs_expect(tmp_path: Path) -> None:
    """Number of parts in four bytes, each length in eight, little-endian; nothing else."""
    recorder = Recorder(tmp_path / "a.zcap", protocol="stream1", lanes=2)
    recorder.write([b"abc", b""], 7)
    recorder.write([memoryview(b"xy")], 9, 1)
    recorder.close()
    expected = b"\x02\0\0\0" + b"\x03" + 7 * b"\0" + b"abc" + 8 * b"\0"
    expected += b"\x01\0\0\0" + b"\x02" + 7 * b"\0" + b"xy"
    assert (tmp_path / "a.zcap").read_bytes() == expected
    lines = (tmp_path / "a.zcap.index").read_text().splitlines()
    assert json.loads(lines[0]) == {"format": 1, "protocol": "stream1", "lanes": 2}
    assert lines[1:] == ["7 0", "9 1"]
    assert recorder.messages == 2
    assert recorder.size_bytes == len(expected)


def test_what_was_recorded_is_read(tmp_path: Path) -> None:
    """Parts, times and lanes of every message, as often as asked for."""
    recorder = Recorder(tmp_path / "a.zcap", protocol="stream2", lanes=3)
    many = [bytes([n]) for n in range(200)] * 6  # more pieces than one system call takes
    written = [((b"a", b"b" * 100_000), 5, 0), (tuple(many), 6, 2), ((b"",), 7, 1)]
    for parts, received_ns, lane in written:
        recorder.write(parts, received_ns, lane)
    recorder.close()
    capture = Capture(tmp_path / "a.zcap")
    assert (capture.protocol, capture.lanes) == ("stream2", 3)
    for _ in range(2):
        found = [(c.parts, c.received_ns, c.lane) for c in capture.messages()]
        assert found == written
        assert capture.cut_short == ""


def test_a_capture_is_never_overwritten(tmp_path: Path) -> None:
    """A second recording of the same name is refused, and the first one whole."""
    recorded(tmp_path / "a.zcap", "stream2")
    before = (tmp_path / "a.zcap").read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        Recorder(tmp_path / "a.zcap", protocol="auto")
    assert (tmp_path / "a.zcap").read_bytes() == before


def test_a_message_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path: Path) -> None:
    """The third message is too large for what is left: an error; those before and after it are
    whole, each with its own time."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.zcap"
    recorder = Recorder(path, protocol="auto")
    recorder.write([b"a" * 1000], 0)
    recorder.write([b"b" * 1000], 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            recorder.write([b"c" * 1000, b"d" * 5000], 2)
        recorder.write([b"e" * 1000], 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    recorder.close()
    capture = Capture(path)
    assert [(c.parts[0][:1], len(c.parts[0]), c.received_ns) for c in capture.messages()] == [
        (b"a", 1000, 0),
        (b"b", 1000, 1),
        (b"e", 1000, 3),
    ]
    assert (capture.cut_short, recorder.messages) == ("", 3)


def test_a_message_of_which_the_index_has_no_room_leaves_nothing(tmp_path: Path) -> None:
    """Messages without content: their times fill the disk before they do."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.zcap"
    recorder = Recorder(path, protocol="auto")
    long_time_ns = 10**300
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        for _ in range(3):
            recorder.write([], long_time_ns)
        with pytest.raises(OSError, match="No space"):
            recorder.write([], long_time_ns)
        recorder.write([], 7)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    recorder.close()
    lines = (tmp_path / "a.zcap.index").read_text().splitlines()
    assert lines[1:] == [f"{long_time_ns} 0"] * 3 + ["7 0"]
    assert path.stat().st_size == 4 * 4


def test_what_is_recorded_can_be_read_at_once(tmp_path: Path) -> None:
    """A process that is killed leaves every message, with protocol, time and lane."""
    recorder = Recorder(tmp_path / "a.zcap", protocol="karabo", lanes=2)
    assert Capture(tmp_path / "a.zcap").protocol == "karabo"
    recorder.write([b"a"], 5, 1)
    (found,) = Capture(tmp_path / "a.zcap").messages()
    recorder.close()
    assert (found.parts, found.received_ns, found.lane) == ((b"a",), 5, 1)


@pytest.mark.parametrize("protocol", ["stream2", "stream1"])
def test_a_capture_is_decided_like_the_stream(tmp_path: Path, protocol: str) -> None:
    """Series, ids, pixels, mask and geometry as live; file and place in it beside them."""
    path = tmp_path / "a.zcap"
    recorded(path, protocol, header_detail="all")
    messages, source = read(path)
    assert source.total_frames is None
    assert source.unreadable == []
    assert [m.kind.value for m in messages] == ["start", "image", "image", "image", "end"]
    assert all(m.parts == () for m in messages)
    frames = [m.frame for m in messages if m.frame is not None]
    assert [(f.series.series_id, f.image_id) for f in frames] == [(12, 0), (12, 1), (12, 2)]
    assert [(f.file, f.frame) for f in frames] == [(str(path), 0), (str(path), 1), (str(path), 2)]
    backend = open_backend("cpu")
    for frame, image in zip(frames, IMAGES, strict=True):
        assert frame.fault is None
        np.testing.assert_array_equal(backend.decode(frame), image)


def test_arrival_numbers_are_unique_over_all_inputs(tmp_path: Path) -> None:
    """Two captures and an image in one call: no two frames have the same ordinal."""
    import fabio

    recorded(tmp_path / "a.zcap", "stream2")
    recorded(tmp_path / "b.zcap", "stream1")
    fabio.tifimage.TifImage(data=IMAGES[0]).write(str(tmp_path / "c.tif"))
    messages, _ = read(tmp_path / "a.zcap", tmp_path / "c.tif", tmp_path / "b.zcap")
    ordinals = [m.frame.ordinal for m in messages if m.frame is not None]
    assert sorted(ordinals) == list(range(7))


@pytest.mark.parametrize("lost", [1, 3, 40, 1000])
def test_a_capture_cut_short_gives_what_it_holds(tmp_path: Path, lost: int) -> None:
    """The end is missing: whole messages before it are decided, and the file is named."""
    path = tmp_path / "a.zcap"
    sent = recorded(path, "stream2")
    data = path.read_bytes()
    path.write_bytes(data[:-lost])
    sizes = [4 + sum(8 + len(part) for part in parts) for parts in sent]
    whole = sum(1 for n in range(len(sizes)) if sum(sizes[: n + 1]) <= len(data) - lost)
    messages, source = read(path)
    assert len(messages) == whole
    assert [file for file, _ in source.unreadable] == [path]


@pytest.mark.parametrize(
    "tail",
    [
        pytest.param(struct.pack("<IQ", 1, 10 << 30) + b"abc", id="10 GB in three bytes"),
        pytest.param(struct.pack("<I", 2**32 - 1), id="four billion parts"),
        pytest.param(struct.pack("<I", 0), id="no parts"),
        pytest.param(b"\x01\0", id="half a number"),
    ],
)
def test_lengths_that_lie_are_not_believed(tmp_path: Path, tail: bytes) -> None:
    """What cannot be is not allocated: the reading stops there and says so."""
    path = tmp_path / "a.zcap"
    path.write_bytes(struct.pack("<IQ", 1, 2) + b"ab" + tail)
    capture = Capture(path)
    assert [c.parts for c in capture.messages()] == [(b"ab",)]
    assert capture.cut_short


@pytest.mark.parametrize(
    "index",
    ["", "{}", '{"format": 2, "protocol": "auto", "lanes": 1}',
     '{"format": 1, "protocol": "auto", "lanes": 1000000000}', "[" * 100_000],
)  # fmt: skip
def test_an_index_of_another_form_is_refused(tmp_path: Path, index: str) -> None:
    """And the message says that the capture can be read without it."""
    path = tmp_path / "a.zcap"
    path.write_bytes(b"")
    (tmp_path / "a.zcap.index").write_text(index)
    with pytest.raises(UnreadableFile, match="without that file"):
        Capture(path)


def test_an_index_that_ends_early_costs_no_message(tmp_path: Path) -> None:
    """Killed between file and index: the last messages are read, their times unknown."""
    path = tmp_path / "a.zcap"
    sent = recorded(path, "stream2")
    index = tmp_path / "a.zcap.index"
    index.write_text("".join(line + "\n" for line in index.read_text().splitlines()[:3]) + "x")
    found: list[Captured] = list(Capture(path).messages())
    assert [c.parts for c in found] == sent
    assert [c.received_ns for c in found] == [0, 1000, 0, 0, 0]


@pytest.mark.shared
def test_captures_of_other_programs_are_read(shared: Path) -> None:
    """libertem's mock and eiger-simulator, recorded elsewhere: shapes and pixels of the README."""
    folder = shared / "samples" / "third_party_captures"
    backend = open_backend("cpu")
    messages, _ = read(folder / "libertem_mock_v1_3frames.zcap")
    frames = [m.frame for m in messages if m.frame is not None]
    assert [f.image_id for f in frames] == [0, 1, 2]
    assert all((backend.decode(f) == i).all() for i, f in enumerate(frames))
    messages, _ = read(folder / "eigersim_0.5.1_v1_4frames.zcap")
    frames = [m.frame for m in messages if m.frame is not None]
    assert [f.image_id for f in frames] == [0, 1, 2, 3]
    assert messages[-1].kind == "end"


@pytest.mark.parametrize(
    ("recorded_as", "named", "expected"),
    [
        ("slsdetector", "auto", "slsdetector"),
        ("slsdetector", "stream2", "slsdetector"),
        ("karabo", "slsdetector", "karabo"),
        ("stream1", "stream2", "stream1"),
        ("auto", "stream2", "stream2"),
        ("auto", "slsdetector", "auto"),
        (None, "slsdetector", "slsdetector"),
        (None, "auto", "auto"),
    ],
)
def test_a_capture_is_read_as_what_it_was_recorded(
    tmp_path: Path, recorded_as: str | None, named: str, expected: str
) -> None:
    """Whatever a beamline's configuration names for what comes live."""
    recorder = Recorder(tmp_path / "a.zcap", protocol=recorded_as or "auto")
    recorder.close()
    if recorded_as is None:
        (tmp_path / "a.zcap.index").unlink()
    assert Capture(tmp_path / "a.zcap").read_as(named) == expected


def test_a_protocol_that_nobody_knows_spoils_no_other_input(tmp_path: Path) -> None:
    """One row for the capture, and every frame of the next."""
    recorder = Recorder(tmp_path / "a.zcap", protocol="stream3")
    recorder.write([b"x"], 0)
    recorder.close()
    recorded(tmp_path / "b.zcap", "stream2")
    messages, source = read(tmp_path / "a.zcap", tmp_path / "b.zcap")
    assert [path.name for path, _ in source.unreadable] == ["a.zcap"]
    assert "stream3" in source.unreadable[0][1]
    frames = [m.frame for m in messages if m.frame is not None]
    assert [f.frame for f in frames] == [-1, 0, 1, 2]

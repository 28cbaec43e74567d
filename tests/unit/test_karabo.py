"""Trains of a Karabo bridge: identity, layout, what is scored, and a bridge that says nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from numpy.typing import NDArray

from triage.backends import open_backend
from triage.config import load_settings
from triage.errors import ConfigError
from triage.ingest.karabo import KaraboBridge, TrainParser
from triage.ledger import Ledger
from triage.metrics import Metrics
from triage.records import Frame, Message, Reason

SOURCE = "DET/A:xtdf"
TID = 1_500_000_000
pack = msgspec.msgpack.encode


def values(train_id: object = TID, source: str = SOURCE) -> list[bytes]:
    """Header and plain values of a source."""
    metadata = {} if train_id is None else {"timestamp.tid": train_id}
    return [
        pack({"source": source, "content": "msgpack", "metadata": metadata}),
        pack({"state": "ON"}),
    ]


def array(
    data: NDArray[Any], path: str = "image.data", source: str = SOURCE, **header: Any
) -> list[bytes]:
    told = {
        "source": source, "content": "array", "path": path, "dtype": str(data.dtype),
        "shape": data.shape,
    }  # fmt: skip
    return [pack(told | header), data.tobytes()]


def train(data: NDArray[Any], train_id: object = TID, **header: Any) -> list[bytes]:
    return [*values(train_id), *array(data, **header)]


def frames_of(messages: Sequence[Message]) -> list[Frame]:
    return [message.frame for message in messages if message.frame is not None]


def kinds(messages: Sequence[Message]) -> list[str]:
    return [message.kind.value for message in messages]


def pixels_of(frame: Frame) -> NDArray[Any]:
    return open_backend("cpu").decode(frame)


IMAGES = np.arange(3 * 4 * 5, dtype=np.uint16).reshape(3, 4, 5)


def test_image_id_counts_on_from_the_first_train() -> None:
    """(train - first train) * frames per train + place; a train that did not come is missing."""
    parser, ledger = TrainParser(), Ledger()
    messages = [m for t in (0, 1, 3) for m in parser.parse(train(IMAGES, TID + t), 1)]
    assert kinds(messages) == ["start"] + ["image"] * 9
    assert [f.image_id for f in frames_of(messages)] == [0, 1, 2, 3, 4, 5, 9, 10, 11]
    assert {f.series.key for f in frames_of(messages)} == {(TID, f"3x {SOURCE} image.data")}
    ledger.received(messages)
    assert ledger.totals().missing == 3
    assert [np.array_equal(pixels_of(f), IMAGES[f.image_id % 3]) for f in frames_of(messages)]


def test_a_train_with_id_0_does_not_break_a_series() -> None:
    """Its frames go on unscored, and the next train counts on from the first."""
    parser = TrainParser()
    messages = [m for t in (TID, 0, TID + 1) for m in parser.parse(train(IMAGES, t), 1)]
    assert kinds(messages) == ["start"] + ["image"] * 9
    assert [f.image_id for f in frames_of(messages)] == [0, 1, 2, -1, -1, -1, 3, 4, 5]


def test_a_train_that_comes_again_is_a_duplicate() -> None:
    """Same train, same ids, flagged."""
    parser = TrainParser()
    parser.parse(train(IMAGES), 1)
    again = frames_of(parser.parse(train(IMAGES), 2))
    assert [(f.image_id, f.duplicate) for f in again] == [(0, True), (1, True), (2, True)]


@pytest.mark.parametrize(
    ("data", "train_id"),
    [
        (IMAGES[:2], TID + 1),
        (IMAGES.astype(np.float32), TID + 1),
        (IMAGES.reshape(3, 5, 4), TID + 1),
        (IMAGES, TID - 1),
    ],
    ids=["frames", "type", "shape", "earlier"],
)
def test_another_layout_is_another_series(data: NDArray[Any], train_id: int) -> None:
    """Frames per train, pixel type or shape change, or trains begin anew: end, then start."""
    parser = TrainParser()
    parser.parse(train(IMAGES), 1)
    messages = parser.parse(train(data, train_id), 2)
    assert kinds(messages)[:3] == ["end", "start", "image"]
    first, second = messages[0].series, messages[1].series
    assert first is not None
    assert second is not None
    assert (first.series_id, second.series_id) == (TID, train_id)
    assert [f.image_id for f in frames_of(messages)] == list(range(len(data)))


def test_modules_are_laid_out_as_square_as_may_be() -> None:
    """Four modules of 2 x 3 in two rows of two: 4 x 6, not 8 x 3 or 2 x 12."""
    data = np.arange(2 * 4 * 2 * 3, dtype=np.uint16).reshape(2, 4, 2, 3)
    frames = frames_of(TrainParser().parse(train(data), 1))
    assert [f.shape for f in frames] == [(4, 6), (4, 6)]
    for pulse, frame in enumerate(frames):
        a, b, c, d = data[pulse]
        assert np.array_equal(pixels_of(frame), np.block([[a, b], [c, d]]))


@pytest.mark.parametrize("modules", [1, 4])
def test_online_order_gives_the_same_frames(modules: int) -> None:
    """(modules, x, y, pulses) holds what (pulses, modules, y, x) does."""
    data = np.arange(3 * modules * 2 * 5, dtype=np.float32).reshape(3, modules, 2, 5)
    online = np.ascontiguousarray(data.transpose(1, 3, 2, 0))
    if modules == 1:
        data, online = data[:, 0], online[0]
    expected = frames_of(TrainParser().parse(train(data), 1))
    found = frames_of(TrainParser(order="online").parse(train(online), 1))
    assert [f.image_id for f in found] == [0, 1, 2]
    for frame, twin in zip(found, expected, strict=True):
        assert np.array_equal(pixels_of(frame), pixels_of(twin))


def test_two_dimensions_are_one_frame() -> None:
    """A camera's picture, where nothing has more dimensions."""
    (frame,) = frames_of(TrainParser().parse(train(IMAGES[0]), 1))
    assert np.array_equal(pixels_of(frame), IMAGES[0])


def test_the_array_that_is_scored() -> None:
    """The named one; else the first of three dimensions or more, else the first of two."""
    other, picture = IMAGES + np.uint16(1), IMAGES[0] + np.uint16(7)
    parts = [
        *values(source="B"), *array(picture, "p", "B"), *array(np.arange(9), "flat", "B"),
        *values(), *array(IMAGES), *array(other, "image.gain"),
    ]  # fmt: skip
    for wanted, expected in (
        (("", ""), IMAGES[0]),
        (("", "image.gain"), other[0]),
        ((SOURCE, ""), IMAGES[0]),
        (("B", ""), picture),
        (("B", "p"), picture),
    ):
        frames = frames_of(TrainParser(*wanted).parse(parts, 1))
        assert np.array_equal(pixels_of(frames[0]), expected), wanted
    for absent in (("C", ""), ("B", "image.data")):
        (message,) = TrainParser(*absent).parse(parts, 1)
        assert message.kind == "control"
        assert SOURCE in message.detail
        assert list(message.parts) == parts


def test_the_train_goes_on_whole_with_its_first_frame() -> None:
    """All parts once, and every byte in memory counted once: copies too, where there are some."""
    for data, order, copies in (
        (IMAGES, "file", 0),
        (IMAGES, "online", 1),
        (IMAGES.reshape(3, 2, 2, 5), "file", 1),
    ):
        parts = train(data)
        messages = TrainParser(order=order).parse(parts, 1)
        carried = [list(m.parts) for m in messages if m.parts]
        assert carried == [parts]
        assert messages[1].parts
        held = sum(map(len, parts)) + copies * data.nbytes
        assert sum(m.size_bytes for m in messages) == held


def test_protocol_1_is_one_document() -> None:
    """Arrays as msgpack-numpy writes them, keys as bytes."""
    packed = {
        b"nd": True, b"type": b"<u2", b"kind": b"", b"shape": IMAGES.shape,
        b"data": IMAGES.tobytes(),
    }  # fmt: skip
    document = {SOURCE: {"image.data": packed, "metadata": {"timestamp.tid": TID}}}
    messages = TrainParser().parse([pack(document)], 1)
    assert [f.image_id for f in frames_of(messages)] == [0, 1, 2]
    assert np.array_equal(pixels_of(frames_of(messages)[2]), IMAGES[2])


def test_nan_is_left_out() -> None:
    """The calibration's NaN, and infinity, are no measurements; 0.4 is 0 photons, 1.5 is 2."""
    image = np.full((1, 4, 6), 0.4, np.float32)
    image[0, 1, 1] = np.nan
    image[0, 2, 2] = np.inf
    image[0, 3, 3] = 1.5
    (frame,) = frames_of(TrainParser().parse(train(image), 1))
    views = open_backend("cpu").prepare([frame])
    assert views.errors == (None,)
    assert int(views.count.sum()) == 22
    assert int(views.total.sum()) == 2


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", ">u2", "<f4", "uint8", "int32"])
def test_pixel_types_that_are_read(dtype: str) -> None:
    """By numpy's names and by its codes, either byte order."""
    data = IMAGES.astype(dtype)
    frames = frames_of(TrainParser().parse(train(data, dtype=dtype), 1))
    assert [f.fault for f in frames] == [None] * 3
    assert np.array_equal(pixels_of(frames[1]), IMAGES[1])


@pytest.mark.parametrize("dtype", ["object", "O", "|O", "complex64", "bool", "V8", "f1", 7, None])
def test_pixels_that_are_no_numbers_go_on_unscored(dtype: object) -> None:
    """Nothing is unpickled, nothing guessed; the train is one image with the reason."""
    parser = TrainParser()
    messages = parser.parse(train(IMAGES, dtype=dtype), 1)
    (frame,) = frames_of(messages)
    assert frame.fault is Reason.UNKNOWN_ENCODING
    assert [m for m in messages if m.parts]
    assert [f.fault for f in frames_of(parser.parse(train(IMAGES, TID + 1), 2))] == [None] * 3


@pytest.mark.parametrize(
    "shape",
    [
        (3, 4, 6), (3, 4, -5), (0, 4, 5), (3, 4, 5.0), (2**40, 2**40, 2**40), (60,) * 9,
        (60_000, 1, 1), (1, 2000, 30, 1),
    ],
)  # fmt: skip
def test_shapes_that_lie_go_on_unscored(shape: tuple[Any, ...]) -> None:
    """What does not agree with the bytes that are there."""
    data = np.zeros(60_000, np.uint8) if math.prod(shape) == 60_000 else IMAGES
    (frame,) = frames_of(TrainParser(path="image.data").parse(train(data, shape=shape), 1))
    assert frame.fault is Reason.MALFORMED


@pytest.mark.parametrize("train_id", [0, None, -4, 2**63, 1.5, True, "1500000000"])
def test_trains_without_an_id_go_on_unscored(train_id: object) -> None:
    """Each frame is counted; the next train that has an id is unharmed."""
    parser = TrainParser()
    frames = frames_of(parser.parse(train(IMAGES, train_id), 1))
    assert [(f.image_id, f.fault) for f in frames] == [(-1, Reason.MALFORMED)] * 3
    frames = frames_of(parser.parse(train(IMAGES), 2))
    assert [(f.image_id, f.fault) for f in frames] == [(0, None), (1, None), (2, None)]


class Silence:
    """A bridge that lets requests go unanswered."""

    def __init__(self) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.RCVTIMEO, 20_000)
        self.socket.bind("tcp://127.0.0.1:*")
        self.now_ns = 1
        self.metrics = Metrics()
        self.source = KaraboBridge(
            self.socket.getsockopt_string(zmq.LAST_ENDPOINT),
            metrics=self.metrics,
            clock=lambda: self.now_ns,
        )

    def resets(self) -> float:
        value = self.metrics.registry.get_sample_value("triage_source_resets_total")
        assert value is not None
        return value

    def close(self) -> None:
        self.source.close()
        self.context.destroy(linger=0)


@pytest.fixture
def silence() -> Iterator[Silence]:
    bridge = Silence()
    yield bridge
    bridge.close()


def test_a_silent_bridge_is_asked_anew(silence: Silence) -> None:
    """After ten seconds a new socket asks; what it is answered is read, and it is counted."""
    assert silence.source.receive(1) == []
    first = silence.socket.recv_multipart()
    assert first[1:] == [b"", b"next"]
    silence.now_ns += 9_900_000_000
    assert silence.source.receive(1) == []
    assert silence.resets() == 0
    silence.now_ns += 200_000_000
    assert silence.source.receive(1) == []
    assert silence.resets() == 1
    second = silence.socket.recv_multipart()
    assert second[0] != first[0]
    silence.socket.send_multipart([*second[:2], *train(IMAGES)])
    until = time.monotonic() + 20
    messages: list[Message] = []
    while not messages and time.monotonic() < until:
        messages = silence.source.receive(100)
    assert len(frames_of(messages)) == 3
    silence.source.receive(1)
    assert silence.socket.recv_multipart()[0] == second[0]


def test_a_bridge_that_is_not_read_is_not_asked(silence: Silence) -> None:
    """Back-pressure: one request is under way at a time, the next with the next reading."""
    silence.source.receive(1)
    envelope = silence.socket.recv_multipart()[:2]
    silence.socket.send_multipart([*envelope, *train(IMAGES)])
    until = time.monotonic() + 20
    while not silence.source.receive(100) and time.monotonic() < until:
        pass
    assert not silence.socket.poll(50)
    silence.source.receive(1)
    assert silence.socket.poll(20_000)


def test_it_knows_whether_a_bridge_is_there(silence: Silence) -> None:
    """Connected, also over the socket that asks anew, and gone."""

    def until(peers: tuple[int, int]) -> bool:
        limit_s = time.monotonic() + 20
        while silence.source.connected() != peers and time.monotonic() < limit_s:
            silence.source.receive(10)
        return silence.source.connected() == peers

    assert silence.source.connected() == (0, 1)
    assert until((1, 1))
    silence.now_ns += 11_000_000_000
    silence.source.receive(1)
    assert silence.resets() == 1
    assert until((1, 1))
    silence.socket.close()
    assert until((0, 1))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"policy.mode": "enforce"}, "mode = 'enforce' with .* 'karabo': expected 'shadow'"),
        ({"forward.verdict": "user_data"}, "as it came"),
        ({"source.bind": True}, "bind = True"),
        ({"source.endpoint": "tcp://127.0.0.1:1,tcp://127.0.0.1:2"}, "one address"),
    ],
)
def test_settings_that_do_not_fit_a_bridge(overrides: dict[str, Any], said: str) -> None:
    """Refused when the settings are read, with what was expected."""
    with pytest.raises(ConfigError, match=said):
        load_settings(overrides={"source.protocol": "karabo", **overrides})

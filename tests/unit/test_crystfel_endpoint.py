"""The endpoint for CrystFEL: who gets which frame, what is sent of it, and what is counted."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from triage.errors import ConfigError, DecodeError
from triage.records import Decision, Frame, Geometry, Override, Reason, Scores, Series, Verdict
from triage.sinks.crystfel import CrystfelEndpoint, CrystfelReport, Looked, file_geometry

GEOMETRY = Geometry(
    beam_center_x_px=60.5,
    beam_center_y_px=50.25,
    pixel_size_x_m=75e-6,
    pixel_size_y_m=150e-6,
    detector_distance_m=0.125,
    incident_wavelength_angstrom=2.0,
)
SERIES = Series(series_id=7, series_unique_id="u", geometry=GEOMETRY)
PIXELS = np.array([[1, 2, 3], [4, 5, 65535]], np.uint16)


class Looker:
    """Counts what was decoded; image 13 cannot be."""

    def __init__(self) -> None:
        self.images: list[int] = []
        self.pixels: np.ndarray[Any, Any] = PIXELS
        self.hold = threading.Event()
        self.hold.set()

    def __call__(self, frame: Frame) -> Looked:
        self.images.append(frame.image_id)
        self.hold.wait(30)
        if frame.image_id == 13:
            raise DecodeError("no")
        valid = self.pixels != 65535
        spots = np.array([0.5, 2.25]), np.array([0.5, 1.75]), np.array([7.0, 9.0])
        return Looked(
            pixels=self.pixels, valid=valid, x_px=spots[0], y_px=spots[1], photons=spots[2]
        )


class Asker:
    """A program that asks: REQ, as indexamajig has it."""

    def __init__(self, endpoint: str) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.REQ)
        self._socket.connect(endpoint)

    def ask(self) -> None:
        self._socket.send(b"next")

    def answer(self, timeout_s: float = 20.0) -> dict[str, Any] | None:
        if not self._socket.poll(int(1000 * timeout_s)):
            return None
        found = msgspec.msgpack.decode(self._socket.recv())
        assert isinstance(found, dict)
        return found

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
def looker() -> Looker:
    return Looker()


@pytest.fixture
def endpoint(looker: Looker, tmp_path: Path) -> Iterator[CrystfelEndpoint]:
    opened = CrystfelEndpoint("tcp://127.0.0.1:*", looker, directory=tmp_path, queue_bytes=3000)
    yield opened
    looker.hold.set()
    opened.close()


@pytest.fixture
def asker(endpoint: CrystfelEndpoint) -> Iterator[Asker]:
    connected = Asker(endpoint.endpoint)
    yield connected
    connected.close()


def offer(endpoint: CrystfelEndpoint, image_id: int, verdict: Verdict = Verdict.KEEP) -> None:
    frame = Frame(series=SERIES, image_id=image_id, shape=(2, 3), size_bytes=1000)
    decision = Decision(
        series_id=7, series_unique_id="u", image_id=image_id, file="", frame=-1, ordinal=0,
        verdict=verdict, reason=Reason.SCORE, forwarded=True, override=Override.NONE,
        scores=Scores(p_blank=0.125), model_id="m", policy_id="p", latency_us=1.0,
    )  # fmt: skip
    endpoint.offer([frame], [decision])


def until(condition: Callable[[], bool]) -> None:
    limit_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit_s
        threading.Event().wait(0.01)


def test_a_frame_is_one_map_that_crystfel_can_read(
    endpoint: CrystfelEndpoint, asker: Asker, looker: Looker
) -> None:
    """int32 little-endian, [slow, fast], the masked pixel as -2147483648; peaks half a pixel
    less than from the corner, as floats; eV and mm: 12398.42 / 2 and 125."""
    asker.ask()
    offer(endpoint, 5)
    found = asker.answer()
    assert found is not None
    data = found.pop("detector_data")
    assert (data["type"], data["shape"]) == ("<i4", [2, 3])
    assert np.frombuffer(data["data"], "<i4").tolist() == [1, 2, 3, 4, 5, -(2**31)]
    peaks = {"fs": [0.0, 1.75], "ss": [0.0, 1.25], "intensity": [7.0, 9.0]}
    assert found.pop("peak_list") == peaks
    assert found["beam_energy"] == pytest.approx(6199.21, abs=0.01)
    assert found["detector_distance"] == pytest.approx(125.0)
    assert (found["series_id"], found["series_unique_id"], found["image_id"]) == (7, "u", 5)
    assert found["p_blank"] == 0.125
    assert np.isnan(found["p_ice"])


@pytest.mark.parametrize(
    ("pixels", "kind", "expected"),
    [
        (np.array([[1.5, 65535.0]], np.float32), "<f4", [1.5, np.nan]),
        (np.array([[2**32 - 2, 7]], np.uint32), "<i4", [2**31 - 1, 7]),
        (np.array([[-3, 65535]], np.int32), "<i4", [-3, -(2**31)]),
    ],
)
def test_every_pixel_type_becomes_one_that_crystfel_knows(
    endpoint: CrystfelEndpoint,
    asker: Asker,
    looker: Looker,
    pixels: np.ndarray[Any, Any],
    kind: str,
    expected: list[float],
) -> None:
    """Only <i4 and <f4; what does not fit is the largest that does."""
    looker.pixels = pixels
    asker.ask()
    offer(endpoint, 1)
    found = asker.answer()
    assert found is not None
    data = found["detector_data"]
    assert data["type"] == kind
    sent = np.frombuffer(data["data"], kind).astype(float)
    assert np.array_equal(sent, expected, equal_nan=True)


def test_no_key_begins_another(endpoint: CrystfelEndpoint, asker: Asker) -> None:
    """CrystFEL compares as many bytes as the received key has: 'image' would be 'image_id'."""
    asker.ask()
    offer(endpoint, 5)
    found = asker.answer()
    assert found is not None
    for level in (found, found["detector_data"], found["peak_list"]):
        keys = sorted(level)
        assert not [(a, b) for a in keys for b in keys if a != b and b.startswith(a)]


def test_nothing_is_decoded_until_somebody_asks(
    endpoint: CrystfelEndpoint, asker: Asker, looker: Looker
) -> None:
    """Each request decodes one frame; the newest 3,000 bytes wait, older ones are counted."""
    for image_id in range(5):
        offer(endpoint, image_id)
    offer(endpoint, 99, Verdict.VETO)
    assert endpoint.report() == CrystfelReport(offered=5, displaced=2)
    assert looker.images == []
    asker.ask()
    found = asker.answer()
    assert found is not None
    assert found["image_id"] == 2
    assert looker.images == [2]
    for image_id in (3, 4):
        asker.ask()
        found = asker.answer()
        assert found is not None
        assert found["image_id"] == image_id


def test_a_frame_that_cannot_be_decoded_is_counted_and_the_next_one_sent(
    endpoint: CrystfelEndpoint, asker: Asker
) -> None:
    """The request is answered all the same."""
    asker.ask()
    offer(endpoint, 13)
    offer(endpoint, 14)
    found = asker.answer()
    assert found is not None
    assert found["image_id"] == 14
    until(lambda: endpoint.report().served == 1)
    assert endpoint.report() == CrystfelReport(offered=2, served=1, unreadable=1)


def test_a_worker_that_died_does_not_take_its_frame_along(
    endpoint: CrystfelEndpoint, asker: Asker, looker: Looker
) -> None:
    """Its frame goes to the next one that asks."""
    looker.hold.clear()
    dead = Asker(endpoint.endpoint)
    dead.ask()
    offer(endpoint, 4)
    until(lambda: looker.images == [4])
    dead.close()
    asker.ask()
    # The other end's death is known when a new request comes over a later connection.
    until(lambda: len(endpoint._waiting) == 2)
    looker.hold.set()
    found = asker.answer()
    assert found is not None
    assert found["image_id"] == 4
    assert looker.images == [4]


def test_who_asks_and_does_not_read_gets_no_memory_and_no_frames(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of twelve frames asked for at once, each more than the network holds, most are still there
    for one that reads."""
    monkeypatch.setattr("triage.sinks.crystfel._END_S", 0.0)
    nothing = np.zeros(0)
    looked = Looked(
        pixels=np.zeros((1500, 1500), np.uint16),
        valid=np.ones((1500, 1500), np.bool_),
        x_px=nothing,
        y_px=nothing,
        photons=nothing,
    )
    endpoint = CrystfelEndpoint("tcp://127.0.0.1:*", lambda frame: looked, queue_bytes=1 << 20)
    context: zmq.Context[Any] = zmq.Context()
    greedy = context.socket(zmq.DEALER)
    greedy.setsockopt(zmq.RCVHWM, 1)
    greedy.connect(endpoint.endpoint)
    for _ in range(12):
        greedy.send_multipart([b"", b"next"])
    until(lambda: len(endpoint._waiting) == 12)
    for image_id in range(12):
        offer(endpoint, image_id)
    until(lambda: not endpoint._waiting)
    served = endpoint.report().served
    assert 1 <= served <= 6
    reader = Asker(endpoint.endpoint)
    reader.ask()
    found = reader.answer()
    assert found is not None
    assert found["image_id"] == served
    reader.close()
    greedy.close(linger=0)
    context.term()
    endpoint.close()


def test_what_is_left_is_sent_at_the_end_and_the_rest_counted(
    looker: Looker, tmp_path: Path
) -> None:
    """Who still asks is answered; nobody asks: nothing is waited for."""
    endpoint = CrystfelEndpoint("tcp://127.0.0.1:*", looker)
    asker = Asker(endpoint.endpoint)
    looker.hold.clear()
    asker.ask()
    offer(endpoint, 1)
    until(lambda: looker.images == [1])
    looker.hold.set()
    endpoint.close()
    assert asker.answer() is not None
    asker.close()
    assert endpoint.report() == CrystfelReport(offered=1, served=1)
    unasked = CrystfelEndpoint("tcp://127.0.0.1:*", looker)
    offer(unasked, 1)
    offer(unasked, 2)
    began_s = time.monotonic()
    unasked.close()
    assert time.monotonic() - began_s < 5
    assert unasked.report() == CrystfelReport(offered=2, left=2)
    unasked.close()


def test_geometry_is_written_for_each_series(endpoint: CrystfelEndpoint, tmp_path: Path) -> None:
    """One panel, seen along the beam: fast to the right, which is -x, slow down, which is -y."""
    described = Series(series_id=3, geometry=GEOMETRY, image_size_x_px=1030, image_size_y_px=1065)
    endpoint.series_started(Series(series_id=2))
    endpoint.series_started(described)
    path = tmp_path / "crystfel_3.geom"
    until(lambda: path.exists() and path.stat().st_size > 0)
    lines = dict(re.findall(r"^([\w/]+) = (.*)$", path.read_text(), re.M))
    assert lines["photon_energy"] == "beam_energy eV"
    assert lines["clen"] == "detector_distance mm"
    assert (lines["data"], lines["peak_list"]) == ("detector_data", "peak_list")
    assert lines["flag_equal"] == "-2147483648"
    assert float(lines["res"]) == pytest.approx(1 / 75e-6, rel=1e-6)
    assert (lines["p0/max_fs"], lines["p0/max_ss"]) == ("1029", "1064")
    assert (lines["p0/fs"], lines["p0/ss"]) == ("-1.0x +0.0y", "+0.0x -2y")
    assert (float(lines["p0/corner_x"]), float(lines["p0/corner_y"])) == (60.5, 100.5)
    assert [p.name for p in tmp_path.iterdir()] == ["crystfel_3.geom"]


def test_geometry_for_files_says_what_is_no_measurement() -> None:
    """A stack along the first axis, its mask; above the saturation value or at the largest of an
    unsigned type, below 0 of a signed one, or the value that marks errors."""

    def lines(**options: Any) -> dict[str, str]:
        text = file_geometry(GEOMETRY, (8, 9), **options)
        return dict(re.findall(r"^([\w/]+) = (.*)$", text, re.M))

    stack = lines(dtype=np.dtype("<u2"), dataset="/a/b", mask=(Path("/x/m.h5"), "/m"))
    assert (stack["data"], stack["dim0"], stack["dim1"], stack["dim2"]) == ("/a/b", "%", "ss", "fs")
    assert (stack["wavelength"], stack["clen"]) == ("2 A", "0.125 m")
    assert (stack["mask0_file"], stack["mask0_data"]) == ("/x/m.h5", "/m")
    assert stack["mask0_badbits"] == "0xffff"
    assert stack["flag_morethan"] == "65534"
    single = lines(dtype=np.dtype("<u4"), dataset="/a", in_stack=False, saturation_value=60000)
    assert "dim0" not in single
    assert single["flag_morethan"] == "60000"
    image = lines(dtype=np.dtype("<i4"))
    assert "data" not in image
    assert (image["flag_lessthan"], "flag_morethan" in image) == ("0", False)
    signed = lines(dtype=np.dtype("<i2"), error_value=-32768)
    assert (signed["flag_equal"], "flag_lessthan" in signed) == ("-32768", False)


def test_an_address_in_use_is_a_configuration_error(
    endpoint: CrystfelEndpoint, looker: Looker
) -> None:
    """It names the setting."""
    with pytest.raises(ConfigError, match=r"\[crystfel\] endpoint"):
        CrystfelEndpoint(endpoint.endpoint, looker)

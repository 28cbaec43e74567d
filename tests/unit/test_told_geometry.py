"""What a stream does not tell of the experiment comes from [geometry]; what it tells, counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from simulators.detectors import karabo, stream1
from simulators.detectors.detector import series_messages
from simulators.detectors.frames import SimFrame, StreamInfo
from simulators.detectors.slsdetector import Layout, acquisition
from triage.config import load_settings
from triage.ingest import open_reader
from triage.records import Series

IMAGE = np.ones((32, 32), np.uint16)
FRAME = SimFrame(payload=IMAGE.tobytes(), encoding="raw", dtype=IMAGE.dtype, shape=IMAGE.shape)
TOLD = StreamInfo(
    shape=IMAGE.shape,
    number_of_images=1,
    beam_center_x_px=9.0,
    beam_center_y_px=8.0,
    detector_distance_m=0.3,
    incident_wavelength_angstrom=2.0,
)
UNTOLD = StreamInfo(shape=IMAGE.shape, number_of_images=1)


def sent(protocol: str, info: StreamInfo) -> list[tuple[int, Any]]:
    if protocol == "slsdetector":
        layout = Layout(detector="eiger", ports=(2, 1))
        return [(port, parts) for _, port, parts in acquisition([IMAGE], layout)]
    if protocol == "karabo":
        train = karabo.Train(train_id=karabo.FIRST_TRAIN, pixels=IMAGE[None].astype(np.float32))
        return [(0, karabo.train_parts(train, version="2.2"))]
    return [(0, message.parts) for message in series_messages(info, [FRAME], protocol=protocol)]


def series_of(protocol: str, info: StreamInfo, **geometry: float) -> Series:
    """The series of the one frame that is sent, with these settings."""
    settings = load_settings(
        overrides={f"geometry.{name}": value for name, value in geometry.items()}
    )
    reader = open_reader(settings, protocol, 2)
    messages = [m for lane, parts in sent(protocol, info) for m in reader.take(parts, 0, lane)]
    (frame,) = (m.frame for m in [*messages, *reader.flush()] if m.frame is not None)
    return frame.series


ALL = {
    "beam_center_x_px": 16.5,
    "beam_center_y_px": 15.5,
    "pixel_size_m": 75e-6,
    "detector_distance_m": 0.25,
    "incident_wavelength_angstrom": 1.5,
}
every_protocol = pytest.mark.parametrize(
    "protocol", ["slsdetector", "karabo", "stream2", "stream1"]
)


@every_protocol
def test_settings_tell_what_the_stream_does_not(protocol: str) -> None:
    """Every value, in its unit; x and y not exchanged."""
    geometry = series_of(protocol, UNTOLD, **ALL).geometry
    assert geometry is not None
    assert (geometry.beam_center_x_px, geometry.beam_center_y_px) == (16.5, 15.5)
    assert geometry.pixel_size_x_m == geometry.pixel_size_y_m == np.float32(75e-6)
    assert geometry.detector_distance_m == 0.25
    assert geometry.incident_wavelength_angstrom == 1.5


@every_protocol
def test_without_all_of_it_there_is_no_geometry(protocol: str) -> None:
    """Ice is then not scored; the frame is."""
    assert series_of(protocol, UNTOLD).geometry is None
    assert series_of(protocol, UNTOLD, **{**ALL, "detector_distance_m": 0.0}).geometry is None


@pytest.mark.parametrize("protocol", ["stream2", "stream1"])
def test_what_the_stream_tells_is_not_overruled(protocol: str) -> None:
    """A start message with a geometry of its own."""
    geometry = series_of(protocol, TOLD, **ALL).geometry
    assert geometry is not None
    assert geometry.detector_distance_m == np.float32(0.3)


@pytest.mark.parametrize("protocol", ["slsdetector", "karabo"])
def test_a_sweep_can_be_told(protocol: str) -> None:
    """Streams without a goniometer: a rotation that is set is never thinned."""
    assert series_of(protocol, UNTOLD, rotation_increment_deg=0.1).is_rotation
    assert not series_of(protocol, UNTOLD).is_rotation


def test_a_header_that_says_nothing_leaves_a_sweep_open() -> None:
    """Stream V1, header_detail none: kept like a sweep until the settings say what it is."""

    def read(detail: str, **told: float) -> Series:
        header = stream1.header_parts(TOLD, header_detail=detail)
        settings = load_settings(overrides={f"geometry.{k}": v for k, v in told.items()})
        (message,) = open_reader(settings, "stream1", 1).take(header, 0, 0)
        assert message.series is not None
        return message.series

    assert read("none").is_rotation
    assert not read("none", rotation_increment_deg=0.0).is_rotation
    assert read("none", rotation_increment_deg=0.1).is_rotation
    assert not read("basic").is_rotation


@pytest.mark.parametrize("modules", [1, 2])
def test_modules_whose_places_nobody_knows_have_no_geometry(modules: int) -> None:
    """They are laid out side by side: a ring about the told centre would be none."""
    settings = load_settings(overrides={f"geometry.{name}": value for name, value in ALL.items()})
    pixels = np.zeros((3, modules, 8, 16), np.float32)
    parts = karabo.train_parts(karabo.Train(train_id=karabo.FIRST_TRAIN, pixels=pixels))
    frames = [m.frame for m in open_reader(settings, "karabo", 1).take(parts, 0, 0) if m.frame]
    assert [frame.series.geometry is None for frame in frames] == [modules > 1] * 3

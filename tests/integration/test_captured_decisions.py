"""A stream of each protocol as it comes, from its capture, and played from it: decided alike."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from simulators.detectors.detector import Detector
from simulators.detectors.frames import SimFrame, StreamInfo, compressed
from simulators.detectors.karabo import FIRST_TRAIN, Bridge, Train
from simulators.detectors.slsdetector import Layout, Receivers, SlsFaults, SlsMaps, acquisition
from triage.backends import open_backend
from triage.cli import app
from triage.config import Settings, load_settings
from triage.ingest import Source, open_reader, open_source
from triage.ingest.capture import Capture
from triage.ingest.files import Files
from triage.metrics import Metrics
from triage.pipeline import Decider, Outputs, Pipeline, PipelineOptions
from triage.policy import Policy
from triage.records import NOT_SCORED, Decision, Scores, Views

DEADLINE_S = 60.0
SHAPE = (64, 48)
RNG = np.random.default_rng(21)
IMAGES = [RNG.poisson(1.0, SHAPE).astype(np.uint16) for _ in range(8)]
for n in (1, 4, 6):
    IMAGES[n][10 + n, 20] = 90
LAYOUT = Layout(detector="eiger", ports=(2, 1))
MAPS = SlsMaps.drawn(SHAPE, 12.398419843320026, seed=8)


class Sums:
    """Scores that tell pixels apart: each hangs on every count of a frame."""

    def fast(self, views: Views) -> list[Scores]:
        return [
            NOT_SCORED
            if error is not None
            else Scores(
                p_blank=float(views.maximum[i].max() < 50),
                uncertainty=float(views.total[i].sum() % 9973),
            )
            for i, error in enumerate(views.errors)
        ]

    def full(self, views: Views, tiles: Any, rows: Any, scores: list[Scores]) -> list[Scores]:
        return scores


@dataclass(frozen=True, kw_only=True)
class Case:
    """A sender, and what is set to read it.

    Attributes:
        opened: gives (endpoint, send, close).
        images: that come.
        played: what is set besides to read it when it is played, by kind of socket.
    """

    opened: Callable[[], tuple[str, Callable[[], object], Callable[[], None]]]
    images: int
    options: Sequence[str] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    play: str = "push"
    played: dict[str, Any] = field(default_factory=dict)
    lanes: int = 1


def detector(protocol: str, lanes: int = 1, **options: Any) -> Case:
    dtype = np.dtype("<i4") if protocol == "jungfraujoch" else np.dtype("<u2")
    frames = [
        SimFrame(
            payload=compressed(image.astype(dtype), "bslz4"),
            encoding="bslz4",
            dtype=dtype,
            shape=SHAPE,
        )
        for image in IMAGES
    ]

    def opened() -> tuple[str, Callable[[], object], Callable[[], None]]:
        sender = Detector(",".join(["tcp://127.0.0.1:*"] * lanes))
        info = StreamInfo(shape=SHAPE, dtype=dtype, number_of_images=8, series_id=4)

        def send() -> None:
            assert sender.wait_for_peer(DEADLINE_S)
            sender.run(info, frames, series=2, protocol=protocol, **options)

        return sender.endpoint, send, sender.close

    return Case(
        opened=opened,
        images=16 - 2 * len(options.get("faults", {})),
        options=("--series", "2", "--socket", "pull"),
        settings={"source.protocol": protocol},
        lanes=lanes,
    )


def receivers(layout: Layout, settings: dict[str, Any] | None = None, **options: Any) -> Case:
    def opened() -> tuple[str, Callable[[], object], Callable[[], None]]:
        sender = Receivers(ports=layout.ports[0] * layout.ports[1])

        def send() -> None:
            assert sender.wait_for_peer(DEADLINE_S)
            for index in (1, 2):
                first = 1 + 8 * (index - 1)
                sender.send(
                    acquisition(IMAGES, layout, file_index=index, first_number=first, **options)
                )

        return ",".join(sender.endpoints), send, sender.close

    return Case(
        opened=opened,
        images=16,
        options=("--series", "2"),
        settings={"source.protocol": "slsdetector", **(settings or {})},
        play="pub",
    )


def bridge(version: str, **options: Any) -> Case:
    pixels = np.stack(IMAGES).astype(np.float32)

    def opened() -> tuple[str, Callable[[], object], Callable[[], None]]:
        sender = Bridge(socket="rep")
        trains = [Train(train_id=FIRST_TRAIN + n, pixels=np.roll(pixels, n, 0)) for n in range(3)]
        return sender.endpoint, lambda: sender.run(trains, version=version), sender.close

    return Case(
        opened=opened,
        images=24,
        options=("--messages", "3"),
        settings={"source.protocol": "karabo"},
        played={"source.karabo_socket": "pull"},
    )


CASES = {
    "stream2": detector("stream2", faults={3: "gap"}),
    "stream1": detector("stream1", header_detail="all"),
    "jungfraujoch, two sockets": detector("jungfraujoch", lanes=2, images_per_file=2),
    "eiger": receivers(LAYOUT, faults=SlsFaults(skew=3)),
    "eiger, parts lost": receivers(
        LAYOUT, faults=SlsFaults(lost=frozenset({(2, 0), (4, 1)}), incomplete=frozenset({(5, 1)}))
    ),
    "eiger, port dead": receivers(LAYOUT, faults=SlsFaults(dead=frozenset({1}))),
    "jungfrau": receivers(Layout(ports=(2, 1)), {"geometry.incident_wavelength_angstrom": 1.0}),
    "karabo 2.2": bridge("2.2"),
    "karabo 1.0": bridge("1.0"),
}


def decided(source: Source, images: int) -> list[tuple[Any, ...]]:
    """What is decided of so many images, by series and number: sockets are read in any order."""
    policy = Policy(mode="enforce", p_blank_veto=0.5, audit_fraction=0.2)
    metrics = Metrics()
    pipeline = Pipeline(
        source,
        Decider(open_backend("cpu"), Sums(), policy, metrics),
        Outputs(),
        PipelineOptions(live=False),
        metrics,
    )
    decisions: list[Decision] = []
    until = time.monotonic() + DEADLINE_S
    while len(decisions) < images and not source.exhausted and time.monotonic() < until:
        decisions += pipeline.step()
    return sorted(
        (
            d.series_id,
            d.series_unique_id,
            d.image_id,
            d.verdict,
            d.reason,
            d.detail,
            d.duplicate,
            str(d.scores),
        )
        for d in decisions
    )


def sent_to(case: Case, reader: Callable[[str], Any]) -> Any:
    """What a reader makes of the stream at the address it is given."""
    endpoint, send, close = case.opened()
    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        return reader(endpoint)
    finally:
        thread.join(DEADLINE_S)
        close()


def live(settings: Settings, images: int) -> list[tuple[Any, ...]]:
    source = open_source(settings, Metrics())
    try:
        return decided(source, images)
    finally:
        source.close()


@pytest.mark.parametrize("name", CASES)
def test_a_capture_is_decided_as_the_stream_was(tmp_path: Path, name: str) -> None:
    """Series, numbers, verdicts, reasons and scores of every image: live, replayed, and live once
    more from the capture that is played."""
    case = CASES[name]
    overrides = dict(case.settings)
    if name == "jungfrau":
        MAPS.save(tmp_path / "maps.npz")
        overrides["source.pedestal_file"] = overrides["source.gain_file"] = str(
            tmp_path / "maps.npz"
        )
        opened = receivers(Layout(ports=(2, 1)), maps=MAPS).opened
        case = Case(**{**vars(case), "opened": opened})
    came = sent_to(
        case,
        lambda endpoint: live(
            load_settings(overrides={**overrides, "source.endpoint": endpoint}), case.images
        ),
    )
    assert len(came) == case.images
    assert len({row[3] for row in came}) == (1 if "dead" in name else 2)

    file = tmp_path / "run.zcap"
    sets = [f"--set={key}={value}" for key, value in overrides.items()]
    result = sent_to(
        case,
        lambda endpoint: CliRunner().invoke(
            app, ["record", endpoint, str(file), *case.options, *sets, "--seconds", "60"]
        ),
    )
    assert result.exit_code == 0, result.output

    def reader(capture: Capture) -> Any:
        return open_reader(load_settings(overrides=overrides), capture.protocol, capture.lanes)

    assert decided(Files([file], reader=reader), case.images) == came

    playing = Detector(",".join(["tcp://127.0.0.1:*"] * case.lanes), socket=case.play, waits=True)
    thread = threading.Thread(
        target=lambda: playing.wait_for_peer(DEADLINE_S) and playing.play(file, rate_hz=0.0),
        daemon=True,
    )
    thread.start()
    told = {**overrides, **case.played, "source.endpoint": playing.endpoint}
    try:
        assert live(load_settings(overrides=told), case.images) == came
    finally:
        thread.join(DEADLINE_S)
        playing.close(0.0)

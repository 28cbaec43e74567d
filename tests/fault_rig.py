"""Detector, triage and writer joined by real sockets, and the account of what went through.

What was sent, what the writer saw and what the journal says are written down apart, and compared
byte for byte: nothing here asks the pipeline what it did, except where a column says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import zmq

from simulators.detectors.detector import series_messages
from simulators.detectors.frames import SimFrame, StreamInfo, compressed
from simulators.detectors.slsdetector import Layout, SlsFaults, acquisition
from triage.backends import open_backend
from triage.cli.assembly import Brain, opened_outputs, pipeline_options
from triage.config import load_settings
from triage.ingest import open_source
from triage.metrics import Metrics
from triage.pipeline import Decider, Outputs, Pipeline
from triage.policy import Policy
from triage.records import NOT_SCORED, Scores, Views

__all__ = ["BLANK", "HIT", "SHAPE", "Account", "Journey", "Rig", "picture", "wait_for"]

SHAPE = (70, 90)
"""Rows and columns of most frames: no multiple of eight pixels, so that a rest stays raw."""

PATIENCE_S = 90.0
"""After so long a rig gives up; nothing that works takes a second of it."""

_SPOT_COUNTS = 40
"""In one pixel of a frame that must be kept, and never in one that may be dropped."""


def picture(
    dtype: str = "<u2", shape: tuple[int, int] = SHAPE, *, spot: bool, seed: int = 3
) -> np.ndarray:
    """Weak background, with or without the one spot that the scorer of a rig looks for."""
    image = np.random.default_rng(seed).poisson(1.0, shape).astype(dtype)
    if spot:
        image[shape[0] // 2, shape[1] // 3] = _SPOT_COUNTS
    return image


def sim_frame(image: np.ndarray, encoding: str = "bslz4") -> SimFrame:
    """An image as it goes on the wire."""
    return SimFrame(
        payload=compressed(image, encoding),
        encoding=encoding,
        dtype=image.dtype,
        shape=(image.shape[0], image.shape[1]),
    )


HIT, BLANK = sim_frame(picture(spot=True)), sim_frame(picture(spot=False))
SIGNED_HIT, SIGNED_BLANK = (sim_frame(picture("<i4", spot=spot)) for spot in (True, False))


def wait_for(what: str, condition: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
    """Look until it is so.

    Raises:
        TimeoutError: it is not.
    """
    until_s = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until_s:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.002)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Journey:
    """One message that a detector sent: a start, image, end, junk, control, or a further part
    of an image.

    Attributes:
        may_drop: a sound image of a started series without a spot: the only kind of message
            that a score may veto.
        stolen: another reader took it from the socket.
        lane: the detector's socket that it goes to.
    """

    kind: str
    parts: tuple[bytes, ...]
    series_id: int = -1
    image_id: int = -1
    may_drop: bool = False
    stolen: bool = False
    lane: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What became of every image sent. Counts are of image messages.

    Attributes:
        sent: that the detector's socket took.
        forwarded: that the writer saw, equal byte for byte to one sent, in the order sent.
        dropped: in the journal.
        missing: gaps in the image numbers, as the ledger counts them: images that another reader
            took, or that the detector never sent.
        gone_with_writer: handed to ZeroMQ, and lost with the connection of a writer that died.
        undecided: received and neither forwarded nor dropped, as the ledger counts them.
        dropped_without_veto: drops of messages that no score may veto; must be 0.
        balanced: every image that reached triage was forwarded, dropped or is gone with the
            writer, one by one and none twice; and the ledger says so too.
        next_series: ``scored``: the series after the fault was decided by scores, nothing of it
            lost; ``unscored``: nothing lost, and kept whole; else what is wrong.
        reasons: decisions other than by score, by reason.
    """

    fault: str = ""
    what: str = ""
    sent: int
    forwarded: int
    dropped: int
    missing: int
    gone_with_writer: int
    undecided: int
    dropped_without_veto: int
    balanced: bool
    next_series: str
    reasons: dict[str, int] = field(default_factory=dict)
    remarks: dict[str, int] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """For a record: reasons and remarks in one cell."""
        told = {**self.reasons, **self.remarks}
        reasons = ", ".join(f"{name} {count}" for name, count in sorted(told.items()))
        row = {**asdict(self), "reasons": reasons, "balanced": "yes" if self.balanced else "no"}
        del row["remarks"]
        return row


class Clock:
    """The monotonic clock, which may be stepped."""

    def __init__(self) -> None:
        self.offset_ns = 0

    def __call__(self) -> int:
        return time.monotonic_ns() + self.offset_ns


class Scorer:
    """A frame without its spot is blank; ``before`` is called with the views of each batch, and
    what it returns, unless None, is what this returns."""

    def __init__(self) -> None:
        self.before: Callable[[Views], list[Scores] | None] = lambda views: None
        self.before_full: Callable[[], None] = lambda: None

    def fast(self, views: Views) -> list[Scores]:
        instead = self.before(views)
        if instead is not None:
            return instead
        return [
            NOT_SCORED if error is not None else Scores(p_blank=float(top.max() < _SPOT_COUNTS))
            for top, error in zip(views.maximum, views.errors, strict=True)
        ]

    def full(self, views: Views, tiles: Any, rows: Any, scores: list[Scores]) -> list[Scores]:
        self.before_full()
        return scores


class FaultyBackend:
    """The CPU backend; ``before_prepare`` is called before it prepares frames."""

    def __init__(self) -> None:
        self.before_prepare: Callable[[], None] = lambda: None

    def twin(self) -> Any:
        """A backend for one worker."""
        backend = open_backend("cpu")
        prepare = backend.prepare

        def prepared(frames: Any) -> Views:
            self.before_prepare()
            return prepare(frames)

        backend.prepare = prepared  # type: ignore[method-assign]
        return backend


class Writer:
    """A PULL socket that knows nothing of triage: takes messages, stalls, dies and comes back."""

    def __init__(self, context: zmq.Context[Any]) -> None:
        self._context = context
        self.messages: list[tuple[bytes, ...]] = []
        self._taking = threading.Event()
        self._stop = threading.Event()
        self._last = False
        self.endpoint = ""
        self.come("tcp://127.0.0.1:*")

    def come(self, endpoint: str = "") -> None:
        """Bind and take what comes."""
        socket = self._context.socket(zmq.PULL)
        # Small, so that a stall is felt after a few messages.
        socket.setsockopt(zmq.RCVHWM, 1)
        socket.setsockopt(zmq.RCVBUF, 16384)
        # A port that was just left is free again after a moment.
        until_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                socket.bind(endpoint or self.endpoint)
                break
            except zmq.ZMQError:
                if time.monotonic() > until_s:
                    raise
                time.sleep(0.01)
        self.endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._stop.clear()
        self._taking.set()
        self._thread = threading.Thread(target=self._take, args=(socket,), name="writer")
        self._thread.start()

    def _take(self, socket: zmq.Socket[Any]) -> None:
        while not self._stop.is_set():
            if self._taking.wait(0.02) and socket.poll(20):
                self.messages.append(tuple(socket.recv_multipart()))
        while self._last and socket.poll(100):
            self.messages.append(tuple(socket.recv_multipart()))
        socket.close(linger=0)

    def stall(self) -> None:
        """Take no more, and stay connected."""
        self._taking.clear()

    def go_on(self) -> None:
        """Take again."""
        self._taking.set()

    def die(self) -> None:
        """Close the connection; what is on its way is lost."""
        self._stop.set()
        self._thread.join()

    def end(self) -> None:
        """Take what is on its way, then close."""
        self.go_on()
        self._last = True
        self.die()


class Rig:
    """A detector's socket, the assembled product with a scorer that knows the truth, a writer.

    The pipeline, source and sinks are those of ``triage run``, put together by the same code;
    only the network is replaced, and the clock may be stepped.

    Args:
        folder: for journal and table.
        protocol: what the detector speaks.
        lanes: sockets of the detector.
        real_time: a stall lasts as long as it says; else the clock is stepped instead.
        settings: as for ``--set``.
        change: takes the outputs and gives those to use instead.
        wrap: the same for each decider.
        before_joining: called when the detector is there and triage is not.
        hold: constants of the product set to other values, by full name.
        publish_over: ``tcp``, or ``ipc``, which has small buffers.

    Attributes:
        early: what ``before_joining`` leaves for later.
        remarks: numbers that belong into the account.
    """

    def __init__(
        self,
        folder: Path,
        *,
        protocol: str = "stream2",
        lanes: int = 1,
        real_time: bool = False,
        settings: dict[str, Any] | None = None,
        change: Callable[[Outputs], Outputs] = lambda outputs: outputs,
        workers: int = 2,
        wrap: Callable[[Any], Any] = lambda decider: decider,
        before_joining: Callable[[Rig], None] = lambda rig: None,
        hold: Mapping[str, Any] | None = None,
        publish_over: str = "tcp",
    ) -> None:
        self.folder = folder
        self.protocol = protocol
        self.real_time = real_time
        self.clock = Clock()
        self.scorer = Scorer()
        self.backend = FaultyBackend()
        self.sent: list[Journey] = []
        self.early: list[Journey] = []
        self.remarks: dict[str, int] = {}
        self._next_series_id = 1
        self._stack = contextlib.ExitStack()
        for name, value in (hold or {}).items():
            self._stack.enter_context(mock.patch(name, value))
        self.context: zmq.Context[Any] = zmq.Context()
        publishes = protocol == "slsdetector" or (settings or {}).get("source.socket") == "sub"
        self.detectors: list[zmq.Socket[bytes]] = []
        for _ in range(lanes):
            opened = self.context.socket(zmq.XPUB if publishes else zmq.PUSH)
            # A PUB socket loses what goes beyond its mark, a PUSH socket waits.
            opened.setsockopt(zmq.SNDHWM, 10_000 if publishes else 2)
            opened.bind("tcp://127.0.0.1:*")
            self.detectors.append(opened)
        self.detector = self.detectors[0]
        self.detector_endpoint = ",".join(
            opened.getsockopt_string(zmq.LAST_ENDPOINT) for opened in self.detectors
        )
        self.writer = Writer(self.context)
        self.settings = load_settings(
            None,
            {
                "source.endpoint": self.detector_endpoint,
                "source.protocol": "auto" if protocol.startswith("stream") else protocol,
                "forward.endpoint": self.writer.endpoint,
                "publish.endpoint": (
                    f"ipc://{folder}/decisions" if publish_over == "ipc" else "tcp://127.0.0.1:*"
                ),
                "output.directory": str(folder),
                "output.state_directory": str(folder / "state"),
                "policy.mode": "enforce",
                "policy.audit_fraction": 0.0,
                # Out of sight: a slow machine must not decide a test.
                "pipeline.deadline_ms": 600_000,
                **(settings or {}),
            },
        )
        self.metrics = Metrics()
        policy = Policy(
            mode=self.settings.policy.mode,
            p_blank_veto=0.5,
            audit_fraction=self.settings.policy.audit_fraction,
        )
        brain = Brain(
            deciders=[
                wrap(Decider(self.backend.twin(), self.scorer, policy, self.metrics, self.clock))
                for _ in range(workers)
            ],
            model_id="spot",
            recipe_fingerprint="0" * 16,
            thresholds={"p_blank_veto": 0.5},
            mode=policy.mode,
            on_device=False,
        )
        outputs = self._stack.enter_context(
            opened_outputs(self.settings, brain, self.metrics, live=True)
        )
        self.outputs = change(outputs)
        before_joining(self)
        self.source = open_source(self.settings, self.metrics)
        self.source._clock = self.clock  # type: ignore[attr-defined]
        self.pipeline = Pipeline(
            self.source,
            brain.deciders,
            self.outputs,
            pipeline_options(self.settings, brain, live=True),
            self.metrics,
            model_id=brain.model_id,
            clock=self.clock,
        )
        self._stopped = False
        self._runner = threading.Thread(target=self.pipeline.run, name="pipeline")
        self._runner.start()
        for opened in self.detectors if publishes else ():
            if not opened.poll(round(PATIENCE_S * 1000)):
                raise TimeoutError("triage does not subscribe")

    # -- the detector --------------------------------------------------------------------------

    def info(self, images: int, **fields: Any) -> StreamInfo:
        """A new series of the detector."""
        series_id, self._next_series_id = self._next_series_id, self._next_series_id + 1
        values = {
            "series_id": series_id,
            "series_unique_id": f"01J{series_id:023d}",
            "number_of_images": images,
            "shape": SHAPE,
            **fields,
        }
        return StreamInfo(**values)

    def messages(
        self,
        info: StreamInfo,
        *,
        frames: Sequence[SimFrame] = (HIT, BLANK),
        faults: dict[int, str] | None = None,
        may_drop: Callable[[int], bool] = lambda image_id: image_id % 2 == 1,
        **options: Any,
    ) -> list[Journey]:
        """A series as the twin of the detector sends it: even images have a spot.

        Args:
            may_drop: by image_id, False for images with a spot, and for what is not sound.
        """
        if self.protocol == "jungfraujoch":
            # Signed pixels, one value of them for bad ones.
            signed = {id(HIT): SIGNED_HIT, id(BLANK): SIGNED_BLANK}
            frames = [signed.get(id(frame), frame) for frame in frames]
            info = replace(info, dtype=np.dtype("<i4"), error_value=-(2**31))
            options.setdefault("lanes", len(self.detectors))
            options.setdefault("images_per_file", 3)
        made = series_messages(info, frames, protocol=self.protocol, faults=faults, **options)
        return [
            Journey(
                kind=sent.kind,
                parts=tuple(sent.parts),
                series_id=info.series_id,
                image_id=sent.image_id,
                may_drop=sent.kind == "image" and may_drop(sent.image_id),
                lane=sent.lane,
            )
            for sent in made
        ]

    def acquisition(
        self, images: int, *, blank: Callable[[int], bool] = lambda i: i % 2 == 1, **faults: Any
    ) -> list[Journey]:
        """A series of EIGER half modules, one above the other, as their receivers send it.

        Args:
            blank: which images have no spot.
            faults: of :class:`simulators.detectors.slsdetector.SlsFaults`.
        """
        series_id = self.info(images).series_id
        made = acquisition(
            [picture(spot=not blank(i)) for i in range(images)],
            Layout(detector="eiger", ports=(len(self.detectors), 1)),
            faults=SlsFaults(**faults),
            file_index=series_id,
        )
        seen: set[int] = set()
        journeys = []
        for frame, port, parts in made:
            kind = "end" if frame < 0 else "part" if frame in seen else "image"
            seen.add(frame)
            journeys.append(
                Journey(
                    kind=kind,
                    parts=parts,
                    series_id=series_id,
                    image_id=frame,
                    may_drop=frame >= 0 and blank(frame),
                    lane=port,
                )
            )
        return journeys

    def send(self, messages: Iterable[Journey], seconds: float = PATIENCE_S) -> None:
        """Send, waiting for the socket as a detector does.

        Raises:
            TimeoutError: the socket takes no more.
        """
        for message in messages:
            if not self.try_send(message, seconds):
                raise TimeoutError(f"the detector's socket took nothing for {seconds:g} s")

    def try_send(self, message: Journey, seconds: float) -> bool:
        """Send one message; False when the socket does not take it in time."""
        detector = self.detectors[message.lane]
        if not detector.poll(round(seconds * 1000), zmq.POLLOUT):
            return False
        detector.send_multipart(message.parts)
        self.sent.append(message)
        return True

    def series(self, images: int = 20, **options: Any) -> StreamInfo:
        """Send one whole series."""
        info = self.info(images)
        self.send(self.messages(info, **options))
        return info

    # -- waiting -------------------------------------------------------------------------------

    def pass_time(self, seconds: float) -> None:
        """Let time go by: in truth, or on the clock of triage."""
        if self.real_time:
            time.sleep(seconds)
        else:
            self.clock.offset_ns += round(seconds * 1e9)

    def step_clock(self, seconds: float) -> None:
        """Let only the clock of triage go by."""
        self.clock.offset_ns += round(seconds * 1e9)

    def received(self) -> int:
        """Image messages that reached the ledger."""
        return self.pipeline.ledger.totals().received

    def unjudged(self) -> int:
        """Images in line that no worker has judged."""
        line = self.pipeline._line
        with line.lock:
            return sum(entry.awaits for entry in line.entries)

    def await_received(self) -> None:
        """Until every image sent, and not stolen, has been received."""
        count = sum(m.kind == "image" and not m.stolen for m in self.sent)
        wait_for(f"{count} images received", lambda: self.received() >= count)

    def await_released(self) -> None:
        """Until everything received was forwarded or dropped."""
        self.await_received()
        wait_for("all to be released", lambda: self.pipeline.ledger.totals().undecided == 0)

    # -- the account ---------------------------------------------------------------------------

    def account(self, *, gone_with_writer: bool = False) -> Account:
        """Send one more series, stop everything, and count."""
        if self.protocol == "slsdetector":
            following = self.acquisition(20)
            self.send(following)
            self.await_released()
        else:
            following = self.messages(self.info(20))
            self.send(following)
            last = following[-1].parts
            wait_for("the end of the next series", lambda: last in self.writer.messages)
        self.close()
        return self.counted(following, gone_with_writer=gone_with_writer)

    def counted(
        self,
        following: Sequence[Journey] = (),
        *,
        gone_with_writer: bool = False,
        abandoned: bool = False,
    ) -> Account:
        """The account of a run that has ended.

        Args:
            abandoned: what was received may be undecided, and is with nobody.

        Raises:
            AssertionError: the writer saw something that was not sent, or in another order.
        """
        seen = list(self.writer.messages)
        arrived = [message for message in self.sent if not message.stolen]
        reached = _matched(arrived, seen)
        drops = Counter(self.journal_ids())
        images_reached = {
            (m.series_id, m.image_id) for m in arrived if m.kind == "image" and id(m) in reached
        }
        gone: list[Journey] = []
        unscored = 0
        for message in arrived:
            if id(message) in reached:
                continue
            key = (message.series_id, message.image_id)
            if message.kind == "part" and key not in images_reached:
                # It went where the frame went that it is a part of.
                continue
            if message.kind == "image" and drops[key] > 0:
                drops[key] -= 1
                unscored += not message.may_drop
            else:
                gone.append(message)
        totals = self.pipeline.ledger.totals()
        images = [m for m in self.sent if m.kind == "image"]
        images_gone = sum(m.kind == "image" for m in gone)
        forwarded = sum(id(m) in reached for m in images)
        dropped = sum(Counter(self.journal_ids()).values())
        stolen = sum(m.stolen for m in images)
        balanced = (
            totals.received == totals.forwarded + totals.dropped + totals.undecided
            and (abandoned or totals.undecided == 0)
            and not any(drops.values())
            and (gone_with_writer or abandoned or not gone)
            and totals.received == len(images) - stolen
            and len(images) == forwarded + dropped + images_gone + stolen
        )
        return Account(
            sent=len(images),
            forwarded=forwarded,
            dropped=dropped,
            missing=totals.missing,
            gone_with_writer=images_gone - totals.undecided,
            undecided=totals.undecided,
            dropped_without_veto=unscored + sum(drops.values()),
            balanced=balanced,
            next_series=_fate(following, reached, totals.balanced) if following else "",
            reasons={
                reason: count for reason, count in totals.by_reason.items() if reason != "score"
            },
            remarks=dict(self.remarks),
        )

    def journal_ids(self) -> list[tuple[int, int]]:
        """(series_id, image_id) of each drop that stands in the journal."""
        path = self.folder / "journal.jsonl"
        return journal_ids(path.read_bytes()) if path.is_file() else []

    def stop(self) -> None:
        """As a signal does; a second time too."""
        self._stopped = True
        self.pipeline.stop()

    def close(self) -> None:
        """Drain, stop, close; may be called twice."""
        if not self._stopped:
            self.stop()
        self._runner.join(PATIENCE_S)
        if self._runner.is_alive():
            self.stop()
            self._runner.join(PATIENCE_S)
        self.source.close()
        self._stack.close()
        self.writer.end()
        for detector in self.detectors:
            detector.close(linger=0)
        self.context.destroy(linger=0)

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def journal_ids(journal: bytes) -> list[tuple[int, int]]:
    """(series_id, image_id) of each drop that was not withdrawn."""
    drops: Counter[tuple[int, int]] = Counter()
    for line in journal.splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            drops[entry["series_id"], entry["image_id"]] += -1 if entry.get("withdrawn") else 1
    return list(drops.elements())


def _matched(sent: Sequence[Journey], seen: Sequence[tuple[bytes, ...]]) -> set[int]:
    """Which messages were seen; what was seen must be some of what was sent, in order.

    Messages of several sockets may overtake each other, those of one socket may not.
    """
    reached: set[int] = set()
    at = dict.fromkeys((message.lane for message in sent), 0)
    lanes = {lane: [m for m in sent if m.lane == lane] for lane in at}
    for parts in seen:
        # Ends on several sockets are alike: this is the one before which nothing is left out.
        best: tuple[int, int, int] | None = None
        for lane, messages in lanes.items():
            for i in range(at[lane], len(messages)):
                if messages[i].parts == parts:
                    left_out = sum(not m.may_drop for m in messages[at[lane] : i])
                    best = min(best or (left_out, i, lane), (left_out, i, lane))
                    break
        if best is None:
            raise AssertionError(f"the writer saw {parts[0][:60]!r}..., not sent, or not then")
        _, i, lane = best
        reached.add(id(lanes[lane][i]))
        at[lane] = i + 1
    return reached


def _fate(following: Sequence[Journey], reached: set[int], balanced: bool) -> str:
    """What became of the series after the fault."""
    if not balanced:
        return "ledger does not balance"
    if lost := [m for m in following if id(m) not in reached and not m.may_drop]:
        return f"{len(lost)} messages lost"
    kept = sum(id(m) in reached for m in following if m.may_drop)
    if kept == 0:
        return "scored"
    return "unscored" if kept == sum(m.may_drop for m in following) else f"{kept} kept unscored"


@contextlib.contextmanager
def swapped(path: Path, other: int) -> Iterator[None]:
    """Let everything that this process writes to an open file go to another descriptor."""
    descriptors = [
        int(link.name)
        for link in Path("/proc/self/fd").iterdir()
        if os.path.realpath(link) == str(path.resolve())
    ]
    if not descriptors:
        raise FileNotFoundError(f"{path} is not open")
    saved = [(number, os.dup(number)) for number in descriptors]
    for number in descriptors:
        os.dup2(other, number)
    os.close(other)
    try:
        yield
    finally:
        for number, copy in saved:
            os.dup2(copy, number)
            os.close(copy)


@contextlib.contextmanager
def limited_files(size_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond a size: writes end short, then fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def resident_bytes() -> int:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")

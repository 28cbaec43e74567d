"""Kept frames for CrystFEL: ``indexamajig --zmq-input=ADDRESS --zmq-request=next`` asks, we answer.

Each request gets one frame as one MessagePack map, in the form that CrystFEL 0.12 reads with
``--data-format=msgpack --peaks=msgpack``. Frames wait here still compressed and are decoded when
somebody asks, on threads of this endpoint's own: the way of the frames only appends to a list.

Nothing tells ``indexamajig`` that a run is over: it goes on waiting until it gets SIGINT, and does
not ask again when its request was lost, so the next run needs it started anew.

What is masked has the value -2147483648 (NaN where pixels are floating point); the geometry file
that is written at the start of each series flags it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

from triage.errors import ConfigError, TriageError
from triage.records import SCORE_NAMES, Decision, Frame, Geometry, Series, Verdict

__all__ = [
    "MASKED",
    "CrystfelEndpoint",
    "CrystfelReport",
    "Looked",
    "file_geometry",
    "live_geometry",
]

log = logging.getLogger(__name__)

MASKED = -(2**31)
"""Value of a pixel that is no measurement, where pixels are integers; exact as a float too."""

_HC_EV_ANGSTROM = 12398.419843320026
_REQUEST_BYTES = 1024
"""Largest request that is read; ``next`` has four."""
_MOST_WAITING = 4096
"""Requests that may wait at a time; a worker has one."""
_POLL_MS = 200
_END_S = 10.0
"""How long the end of a run goes on answering programs that are still asking."""
_CORNER = 0.5
"""CrystFEL adds half a pixel to peaks that it is told; ours count from the outer corner."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Looked:
    """A decoded frame and what was found in it.

    Attributes:
        pixels: (y, x) of any integer or float type.
        valid: (y, x) True where a pixel is a measurement.
        x_px, y_px: (n,) peaks, pixels from the outer corner.
        photons: (n,) their counts over the background.
    """

    pixels: NDArray[Any]
    valid: NDArray[np.bool_]
    x_px: NDArray[np.float64]
    y_px: NDArray[np.float64]
    photons: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class CrystfelReport:
    """What became of the frames that the policy keeps.

    Attributes:
        offered: frames that came; the sum of the others, once the endpoint is closed.
        served: sent to a program that asked.
        displaced: given up for newer ones, because nobody fetched them in time.
        unreadable: could not be decoded.
        left: still waiting at the end of the run.
    """

    offered: int = 0
    served: int = 0
    displaced: int = 0
    unreadable: int = 0
    left: int = 0


class CrystfelMetrics(Protocol):
    """Where the counts are shown; ``triage.metrics.Metrics`` is one."""

    def crystfel(self, counts: Mapping[str, int]) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    frame: Frame
    decision: Decision


class CrystfelEndpoint:
    """Answers requests with kept frames, each frame once.

    Args:
        endpoint: address to bind.
        look: decodes a frame and finds its peaks; called from ``threads`` threads at a time.
        directory: where a geometry file is written for each series, None for nowhere.
        queue_bytes: bytes of messages that may wait here; of more the oldest is given up.
        threads: frames that are decoded at a time.
        context: of the socket that others connect to; without it everybody may.

    Raises:
        ConfigError: the address cannot be bound.
    """

    def __init__(
        self,
        endpoint: str,
        look: Callable[[Frame], Looked],
        *,
        directory: Path | None = None,
        queue_bytes: int = 256 << 20,
        threads: int = 1,
        metrics: CrystfelMetrics | None = None,
        context: zmq.Context[Any] | None = None,
    ) -> None:
        self._look = look
        self._directory = directory
        self._queue_bytes = queue_bytes
        self._threads = threads
        self._metrics = metrics
        self._lock = threading.Lock()
        self._frames: deque[_Kept] = deque()
        self._frame_bytes = 0
        self._series: deque[Series] = deque()
        self._described: set[tuple[int, str]] = set()
        self._counts = dict.fromkeys(CrystfelReport.__dataclass_fields__, 0)
        self._closing = False
        self._told = True
        self._context: zmq.Context[Any] = zmq.Context()
        # A socket that knows who asked: a worker that died while its frame was decoded must not
        # take the frame with it.
        self._socket = (context or self._context).socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _REQUEST_BYTES)
        # Whoever asks again before it has read its answer gets no decoded frames into ZeroMQ.
        self._socket.setsockopt(zmq.SNDHWM, 1)
        self._socket.setsockopt(zmq.LINGER, 1000)  # for answers on their way
        self._wake_out = self._context.socket(zmq.PAIR)
        self._wake_in = self._context.socket(zmq.PAIR)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as err:
            for socket in (self._socket, self._wake_out, self._wake_in):
                socket.close(linger=0)
            self._context.term()
            raise ConfigError(
                f"[crystfel] endpoint = {endpoint!r}: {err}; expected a free address to bind, "
                "such as tcp://127.0.0.1:31004"
            ) from err
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._wake_in.bind("inproc://wake")
        self._wake_out.connect("inproc://wake")
        self._waiting: deque[bytes] = deque()
        self._ready: deque[tuple[_Kept, bytes]] = deque()
        self._done: deque[tuple[_Kept, Future[bytes]]] = deque()
        self._decoding = 0
        self._asked_s = -math.inf
        self._thread = threading.Thread(target=self._serve, name="crystfel", daemon=True)
        self._thread.start()

    def series_started(self, series: Series) -> None:
        """A series begins: its geometry file is written."""
        with self._lock:
            self._series.append(series)
        self._wake()

    def offer(self, frames: Sequence[Frame], decisions: Sequence[Decision]) -> None:
        """Take the frames that the policy keeps, whatever the mode is; never waits."""
        kept = [
            _Kept(frame, decision)
            for frame, decision in zip(frames, decisions, strict=True)
            if decision.verdict is Verdict.KEEP
        ]
        if not kept:
            return
        with self._lock:
            self._counts["offered"] += len(kept)
            self._frames += kept
            self._frame_bytes += sum(each.frame.size_bytes for each in kept)
            while self._frame_bytes > self._queue_bytes and self._frames:
                self._frame_bytes -= self._frames.popleft().frame.size_bytes
                self._counts["displaced"] += 1
        self._wake()

    def report(self) -> CrystfelReport:
        """The counts now."""
        with self._lock:
            return CrystfelReport(**self._counts)

    def close(self) -> None:
        """Answer who still asks for what is left, at most ten seconds; may be called twice."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._wake()
        self._thread.join()
        self._wake_out.close(linger=0)
        self._context.term()

    def _wake(self) -> None:
        # One wake-up is enough, however many frames came since the last one was seen. The lock
        # also keeps the socket to one thread at a time.
        with self._lock:
            if self._told and not self._wake_out.closed:
                self._told = False
                self._wake_out.send(b"")

    # -- the endpoint's own thread -------------------------------------------------------------

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_in, zmq.POLLIN)
        shown: dict[str, int] = {}
        until_s = math.inf
        with ThreadPoolExecutor(self._threads, "crystfel-look") as pool:
            while time.monotonic() < until_s:
                events = dict(poller.poll(_POLL_MS))
                if self._wake_in in events:
                    self._wake_in.recv()
                    with self._lock:
                        self._told = True
                if self._socket in events:
                    self._take_requests()
                self._describe()
                self._collect()
                self._answer()
                self._decode(pool)
                with self._lock:
                    counts, closing = dict(self._counts), self._closing
                    left = len(self._frames) + len(self._ready) + self._decoding
                if self._metrics is not None and counts != shown:
                    self._metrics.crystfel(counts)
                    shown = counts
                if closing:
                    until_s = min(until_s, time.monotonic() + _END_S)
                    asking = self._waiting or time.monotonic() - self._asked_s < _END_S
                    if not left or not asking:
                        break
            with self._lock:
                self._counts["left"] = len(self._frames) + len(self._ready) + self._decoding
                self._frames.clear()
                counts = dict(self._counts)
            if self._metrics is not None:
                self._metrics.crystfel(counts)
        self._socket.close()
        self._wake_in.close(linger=0)

    def _take_requests(self) -> None:
        while True:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            # REQ puts an empty part before what it asks.
            if len(parts) == 3 and not parts[1] and len(self._waiting) < _MOST_WAITING:
                self._waiting.append(parts[0])
                self._asked_s = time.monotonic()

    def _describe(self) -> None:
        """Write the geometry of series that began."""
        while self._series:
            with self._lock:
                series = self._series.popleft()
            if self._directory is None or series.key in self._described:
                continue
            self._described.add(series.key)
            shape = (series.image_size_y_px, series.image_size_x_px)
            if series.geometry is None or min(shape) < 1:
                log.warning(
                    "series %d: its header has no whole geometry; no file for CrystFEL is written",
                    series.series_id,
                )
                continue
            path = self._directory / f"crystfel_{max(0, series.series_id)}.geom"
            try:
                path.write_text(live_geometry(series.geometry, shape), encoding="utf-8")
                log.info("geometry for CrystFEL: %s", path)
            except OSError as err:
                log.error("geometry file %s: %s", path, err.strerror)

    def _decode(self, pool: ThreadPoolExecutor) -> None:
        """Begin with as many frames as are asked for and not yet on their way."""
        while len(self._ready) + self._decoding < len(self._waiting):
            if self._decoding >= self._threads:
                return
            with self._lock:
                if not self._frames:
                    return
                kept = self._frames.popleft()
                self._frame_bytes -= kept.frame.size_bytes
            self._decoding += 1
            future = pool.submit(self._message, kept)
            future.add_done_callback(partial(self._decoded, kept))

    def _message(self, kept: _Kept) -> bytes:
        return message(kept.frame, kept.decision, self._look(kept.frame))

    def _decoded(self, kept: _Kept, future: Future[bytes]) -> None:
        self._done.append((kept, future))
        self._wake()

    def _collect(self) -> None:
        while self._done:
            kept, future = self._done.popleft()
            self._decoding -= 1
            try:
                self._ready.append((kept, future.result()))
            except Exception as err:  # the endpoint must outlive any one frame
                with self._lock:
                    self._counts["unreadable"] += 1
                if not isinstance(err, TriageError):
                    log.exception("crystfel: image %d could not be prepared", kept.frame.image_id)

    def _answer(self) -> None:
        while self._ready and self._waiting:
            _, body = self._ready[0]
            if self._sent(self._waiting.popleft(), body):
                self._ready.popleft()
                with self._lock:
                    self._counts["served"] += 1

    def _sent(self, asker: bytes, body: bytes) -> bool:
        try:
            self._socket.send_multipart([asker, b"", body], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError:
            return False  # it is gone, or takes nothing; the next one gets the frame
        return True


def message(frame: Frame, decision: Decision, looked: Looked) -> bytes:
    """One frame as CrystFEL reads it.

    No key is the beginning of another: CrystFEL compares as many bytes as the received key has.
    Integers go as little-endian int32, floating point as float32: it reads no other type.
    """
    valid = looked.valid
    if looked.pixels.dtype.kind == "f":
        pixels, kind = np.where(valid, looked.pixels, np.nan).astype("<f4"), "<f4"
    else:
        highest = min(int(np.iinfo(looked.pixels.dtype).max), 2**31 - 1)
        pixels, kind = np.minimum(looked.pixels, highest).astype("<i4"), "<i4"
        pixels[~valid] = MASKED
    fields: dict[str, Any] = {
        "detector_data": {"type": kind, "shape": list(pixels.shape), "data": pixels.tobytes()},
        "peak_list": {
            # Lists of floats: CrystFEL takes whatever it finds for a double.
            "fs": (looked.x_px - _CORNER).astype(float).tolist(),
            "ss": (looked.y_px - _CORNER).astype(float).tolist(),
            "intensity": looked.photons.astype(float).tolist(),
        },
        "series_id": decision.series_id,
        "series_unique_id": decision.series_unique_id,
        "image_id": decision.image_id,
        "model_id": decision.model_id,
    }
    fields |= {name: float(getattr(decision.scores, name)) for name in SCORE_NAMES}
    geometry = frame.series.geometry
    if geometry is not None:
        fields["beam_energy"] = _HC_EV_ANGSTROM / geometry.incident_wavelength_angstrom
        fields["detector_distance"] = 1e3 * geometry.detector_distance_m
    return msgspec.msgpack.encode(fields)


def live_geometry(geometry: Geometry, shape: tuple[int, int]) -> str:
    """A geometry file for what :class:`CrystfelEndpoint` sends of frames of ``shape`` (y, x)."""
    return _lines(
        "; indexamajig --zmq-input=ADDRESS --zmq-request=next --data-format=msgpack \\",
        ";             --peaks=msgpack -g THIS_FILE -o OUT.stream -j CORES",
        "; It does not see the end of a run: stop it with SIGINT.",
        "photon_energy = beam_energy eV",
        "clen = detector_distance mm",
        "peak_list = peak_list",
        "data = detector_data",
        f"flag_equal = {MASKED}",
        *_panel(geometry, shape),
    )


def file_geometry(
    geometry: Geometry,
    shape: tuple[int, int],
    *,
    dtype: np.dtype[Any],
    dataset: str = "",
    in_stack: bool = True,
    mask: tuple[Path, str] | None = None,
    saturation_value: int | None = None,
    error_value: int | None = None,
) -> str:
    """A geometry file for recorded frames of ``shape`` (y, x).

    Args:
        dtype: of their pixels. Of unsigned ones the largest value is no measurement, of signed
            ones nothing below 0 is unless ``error_value`` says which.
        dataset: where they are in an HDF5 file; "" for files of one image.
        in_stack: the dataset holds many, along its first axis.
        mask: file and dataset of the mask, NXmx bits, 0 = good.
        saturation_value: largest valid count.
    """
    lines = [
        f"wavelength = {geometry.incident_wavelength_angstrom:.8g} A",
        f"clen = {geometry.detector_distance_m:.8g} m",
    ]
    if dataset:
        lines.append(f"data = {dataset}")
    if dataset and in_stack:
        lines += ["dim0 = %", "dim1 = ss", "dim2 = fs"]
    if mask is not None:
        lines += [
            f"mask0_file = {mask[0]}",
            f"mask0_data = {mask[1]}",
            "mask0_goodbits = 0x0",
            "mask0_badbits = 0xffff",
        ]
    highest = saturation_value
    if dtype.kind == "u":
        largest = int(np.iinfo(dtype).max) - 1
        highest = largest if highest is None else min(highest, largest)
    elif error_value is None:
        lines.append("flag_lessthan = 0")
    if error_value is not None:
        lines.append(f"flag_equal = {error_value}")
    if highest is not None:
        lines.append(f"flag_morethan = {highest}")
    return _lines(*lines, *_panel(geometry, shape))


def _panel(geometry: Geometry, shape: tuple[int, int]) -> tuple[str, ...]:
    """One flat panel at right angles to the beam.

    Seen along the beam, the fast axis points right and the slow axis down: against x and y of
    CrystFEL's laboratory.
    """
    pixel_m = geometry.pixel_size_x_m
    slow = geometry.pixel_size_y_m / pixel_m
    return (
        "adu_per_photon = 1",
        f"res = {1.0 / pixel_m:.8g}",
        "p0/min_fs = 0",
        f"p0/max_fs = {shape[1] - 1}",
        "p0/min_ss = 0",
        f"p0/max_ss = {shape[0] - 1}",
        "p0/fs = -1.0x +0.0y",
        f"p0/ss = +0.0x {-slow:.8g}y",
        f"p0/corner_x = {geometry.beam_center_x_px:.8g}",
        f"p0/corner_y = {geometry.beam_center_y_px * slow:.8g}",
    )


def _lines(*lines: str) -> str:
    return "".join(line + "\n" for line in lines)

"""The detector: binds its sockets, waits for their readers, sends series at a set rate."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zmq

from simulators.detectors import jungfraujoch, stream1, stream2
from simulators.detectors.capture import captured
from simulators.detectors.faults import Sent, with_faults
from simulators.detectors.frames import SimFrame, StreamInfo

__all__ = ["Detector", "Totals", "series_messages"]

_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def series_messages(
    info: StreamInfo,
    frames: Sequence[SimFrame],
    *,
    protocol: str = "stream2",
    header_detail: str = "basic",
    faults: Mapping[int, str] | None = None,
    appendix: bool = False,
    lanes: int = 1,
    images_per_file: int = 1000,
) -> Iterator[Sent]:
    """One series: start, ``info.number_of_images`` images cycling through ``frames``, end.

    Args:
        lanes, images_per_file: sockets, and how many images in a row go to one; Jungfraujoch.
    """

    def image(frame: SimFrame, image_id: int) -> Sent:
        if protocol == "jungfraujoch":
            return jungfraujoch.image(
                info, frame, image_id, lane=image_id // images_per_file % lanes
            )
        if protocol == "stream2":
            parts: Sequence[bytes] = [stream2.image_message(info, frame, image_id)]
        else:
            truth = dict(frame.truth) if appendix else None
            parts = stream1.image_parts(info, frame, image_id, truth)
        return Sent(kind="image", parts=tuple(parts), image_id=image_id)

    def plain() -> Iterator[Sent]:
        v2 = protocol == "stream2"
        start: Sequence[bytes] = (
            [stream2.start_message(info, header_detail=header_detail)]
            if v2
            else stream1.header_parts(info, header_detail=header_detail)
        )
        yield Sent(kind="start", parts=tuple(start))
        for image_id in range(info.number_of_images):
            yield image(frames[image_id % len(frames)], image_id)
        end = [stream2.end_message(info)] if v2 else stream1.end_parts(info)
        yield Sent(kind="end", parts=tuple(end))

    def resized(image_id: int) -> Sent:
        small = np.zeros((64, 64), info.dtype)
        frame = SimFrame(payload=small.tobytes(), encoding="raw", dtype=small.dtype, shape=(64, 64))
        return image(frame, image_id)

    messages = plain()
    if protocol == "jungfraujoch":
        messages = jungfraujoch.series(
            info,
            frames,
            lanes=lanes,
            images_per_file=images_per_file,
            header_detail=header_detail,
        )
    return with_faults(messages, faults or {}, resized)


def unique_id(series_id: int, seed: int) -> str:
    """A 26-character identifier in the alphabet of ULIDs, the same for the same arguments."""
    rng = np.random.default_rng([seed, series_id])
    return "01" + "".join(_CROCKFORD[int(i)] for i in rng.integers(32, size=24))


@dataclass(slots=True)
class Totals:
    """What was sent."""

    messages: int = 0
    images: int = 0
    series: int = 0
    size_bytes: int = 0


class Detector:
    """PUSH (or XPUB) sockets that play a detector; most have one.

    Args:
        bind: address; ``tcp://127.0.0.1:*`` for any free port. Several are separated by commas.
        socket: ``push`` or ``pub``.
        waits: a ``pub`` socket waits for a reader that is slow, where a detector's would drop.
    """

    def __init__(
        self, bind: str = "tcp://127.0.0.1:*", *, socket: str = "push", waits: bool = False
    ) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._is_pub = socket != "push"
        self._sockets: list[zmq.Socket[bytes]] = []
        self._monitors: list[zmq.Socket[bytes]] = []
        for address in bind.split(","):
            opened = self._context.socket(zmq.XPUB if self._is_pub else zmq.PUSH)
            opened.setsockopt(zmq.SNDHWM, 64)
            if self._is_pub:
                opened.setsockopt(zmq.XPUB_NODROP, waits)
            self._monitors.append(opened.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED))
            opened.bind(address)
            self._sockets.append(opened)
        self.endpoint = ",".join(s.getsockopt_string(zmq.LAST_ENDPOINT) for s in self._sockets)

    def wait_for_peer(self, seconds: float) -> bool:
        """True once a reader is connected to each socket (PUB: has subscribed)."""
        until = time.monotonic() + seconds
        return all(
            waiting.poll(round(max(0.0, until - time.monotonic()) * 1000))
            for waiting in (self._sockets if self._is_pub else self._monitors)
        )

    def run(
        self,
        info: StreamInfo,
        frames: Sequence[SimFrame],
        *,
        series: int = 1,
        rate_hz: float = 0.0,
        record: Path | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        **options: Any,
    ) -> Totals:
        """Send ``series`` arms of ``info.number_of_images`` each; see :func:`series_messages`.

        Args:
            rate_hz: images per second, 0 for as fast as they are taken.
            record: every message sent, as a capture file.
        """
        totals = Totals()
        capture = record.open("wb") if record is not None else None
        try:
            began = clock()
            for number in range(series):
                series_id = info.series_id + number
                armed = replace(
                    info, series_id=series_id, series_unique_id=unique_id(series_id, seed)
                )
                totals.series += 1
                lanes = len(self._sockets)
                for sent in series_messages(armed, frames, lanes=lanes, **options):
                    if sent.kind == "image" and rate_hz > 0:
                        due = began + totals.images / rate_hz
                        if (left := due - clock()) > 0:
                            sleep(left)
                    self._send(sent, capture, totals)
        finally:
            if capture is not None:
                capture.close()
        return totals

    def play(
        self,
        path: Path,
        *,
        rate_hz: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> Totals:
        """Send the messages of a capture; ``images`` and ``series`` are not counted.

        Args:
            rate_hz: messages per second, 0 for as fast as they are taken, None for their own
                times.

        Raises:
            ValueError: the capture ends within a message.
        """
        totals = Totals()
        began, first_ns = clock(), None
        for parts, time_ns, lane in captured(path):
            first_ns = time_ns if first_ns is None else first_ns
            after_s = (time_ns - first_ns) * 1e-9
            if rate_hz is not None:
                after_s = totals.messages / rate_hz if rate_hz else 0.0
            if (left := began + after_s - clock()) > 0:
                sleep(left)
            self._send(Sent(kind="captured", parts=tuple(parts), lane=lane), None, totals)
        return totals

    def _send(self, sent: Sent, capture: BinaryIO | None, totals: Totals) -> None:
        if capture is not None:
            capture.write(struct.pack("<I", len(sent.parts)))
            for part in sent.parts:
                capture.write(struct.pack("<Q", len(part)))
                capture.write(part)
            capture.flush()
        self._sockets[sent.lane].send_multipart(sent.parts)
        totals.messages += 1
        totals.images += sent.kind == "image"
        totals.size_bytes += sum(len(part) for part in sent.parts)

    def close(self, linger_s: float = 30.0) -> None:
        """Wait until the reader has everything, at most ``linger_s``."""
        for opened, monitor in zip(self._sockets, self._monitors, strict=True):
            opened.disable_monitor()
            monitor.close()
            opened.close(linger=round(linger_s * 1000))
        self._context.term()

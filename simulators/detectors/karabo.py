"""A Karabo bridge as European XFEL runs it: trains of many frames, over REP, PUB or PUSH.

Protocol 2.2 sends pairs of parts, a MessagePack header and what it announces; 1.0 one MessagePack
document in which an array is a map with the keys that msgpack-numpy gives it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

from simulators.detectors.detector import Totals
from simulators.detectors.frames import SimFrame, StreamInfo

__all__ = ["FAULTS", "FIRST_TRAIN", "Bridge", "Train", "stack", "train_parts"]

DETECTOR = "SPB_DET_AGIPD1M-1/CAL/APPEND_CORRECTED"
_PATH = "image.data"
_MONITOR = "SA1_XTD2_XGM/XGM/DOOCS"
_EPOCH_S = 1_700_000_000

FIRST_TRAIN = 1_400_000_000
"""Train ids count at 10 Hz since years ago, so none is small."""

FAULTS = ("truncated", "wrong_dtype", "no_array", "gap", "duplicate", "garbage", "silent")
"""What becomes of one train: an array cut in half, pixels that are no numbers, no detector, not
sent, sent twice, an error text before it, and no answer to one request before it (REP)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Train:
    """One train.

    Attributes:
        pixels: (pulses, y, x) or (pulses, modules, y, x); ``online`` turns the axes round.
    """

    train_id: int
    pixels: NDArray[Any]
    online: bool = False
    source: str = DETECTOR


def stack(
    info: StreamInfo, frames: Sequence[SimFrame], *, pulses: int, modules: int = 1
) -> NDArray[np.float32]:
    """Calibrated photons of a train, (pulses, y, x) or (pulses, modules, y / modules, x) float32.

    NaN where the detector has no pixel, as the calibration leaves it.

    Raises:
        ValueError: rows that do not divide by modules, or frames that are compressed.
    """
    if any(frame.encoding != "raw" for frame in frames) or info.shape[0] % modules:
        raise ValueError(
            f"{info.shape[0]} rows for {modules} modules; expected raw frames, and rows that divide"
        )
    images = [np.frombuffer(f.payload, f.dtype).reshape(f.shape).astype(np.float32) for f in frames]
    if info.pixel_mask is not None:
        for image in images:
            image[info.pixel_mask != 0] = np.nan
    train = np.stack([images[i % len(images)] for i in range(pulses)])  # (pulses, y, x)
    if modules > 1:
        train = train.reshape(pulses, modules, -1, info.shape[1])  # (pulses, modules, y, x)
    return train


def train_parts(train: Train, *, version: str = "2.2", fault: str = "") -> list[bytes]:
    """One train as ZeroMQ parts; the detector comes between two sources without images."""
    pixels = train.pixels
    if train.online:
        # (modules, x, y, pulses): what the calibration pipeline sends without turning it round.
        axes = (1, 3, 2, 0) if pixels.ndim == 4 else (2, 1, 0)
        pixels = np.ascontiguousarray(pixels.transpose(axes))
    pulses = np.arange(len(train.pixels), dtype=np.uint64)
    sources: dict[str, dict[str, Any]] = {
        _MONITOR: {"data.intensityTD": np.ones(len(pulses), np.float32), "state": "ON"},
        train.source: {
            "image.pulseId": pulses,
            _PATH: pixels,
            "image.passport": ["SPB_DET_AGIPD1M-1/CAL/OFFSET_CORR_Q1M1"],
        },
        "SPB_XTD9_SHUTTER": {"open": True},
    }
    if fault == "no_array":
        del sources[train.source]
    if version == "1.0":
        return [_document(sources, train.train_id)]
    parts: list[bytes] = []
    for source, values in sources.items():
        plain = {path: v for path, v in values.items() if not isinstance(v, np.ndarray)}
        header = {"source": source, "content": "msgpack", "metadata": _metadata(source, train)}
        parts += [msgspec.msgpack.encode(header), msgspec.msgpack.encode(plain)]
        for path, array in values.items():
            if isinstance(array, np.ndarray):
                parts += _array_parts(source, path, array, fault if path == _PATH else "")
    return parts


def _array_parts(source: str, path: str, array: NDArray[Any], fault: str) -> list[bytes]:
    header = {
        "source": source,
        "content": "array",
        "path": path,
        "dtype": "object" if fault == "wrong_dtype" else str(array.dtype),
        "shape": array.shape,
    }
    data = array.tobytes()
    if fault == "truncated":
        data = data[: len(data) // 2]
    return [msgspec.msgpack.encode(header), data]


def _metadata(source: str, train: Train) -> dict[str, Any]:
    seconds = _EPOCH_S + train.train_id // 10
    return {
        "source": source,
        "timestamp": seconds + train.train_id % 10 / 10,
        "timestamp.sec": str(seconds),
        "timestamp.frac": f"{train.train_id % 10}" + "0" * 17,
        "timestamp.tid": train.train_id,
    }


def _document(sources: Mapping[str, Mapping[str, Any]], train_id: int) -> bytes:
    def packed(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        return {
            b"nd": True,
            b"type": value.dtype.str,
            b"kind": b"",
            b"shape": value.shape,
            b"data": value.tobytes(),
        }

    return msgspec.msgpack.encode(
        {
            source: {
                **{path: packed(value) for path, value in values.items()},
                "metadata": {"source": source, "timestamp.tid": train_id},
            }
            for source, values in sources.items()
        }
    )


class Bridge:
    """The socket of a bridge.

    Args:
        bind: address; ``tcp://127.0.0.1:*`` for any free port.
        socket: ``rep`` answers each request with a train, ``pub`` and ``push`` send them.
    """

    def __init__(self, bind: str = "tcp://127.0.0.1:*", *, socket: str = "rep") -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        # A ROUTER answers as REP does, and can leave a request without an answer.
        kinds = {"rep": zmq.ROUTER, "pub": zmq.XPUB, "push": zmq.PUSH}
        self._kind = kinds[socket]
        self._socket = self._context.socket(self._kind)
        self._socket.setsockopt(zmq.SNDHWM, 2)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._socket.bind(bind)
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def wait_for_peer(self, seconds: float) -> bool:
        """True once a client is connected (PUB: has subscribed)."""
        waiting = self._socket if self._kind == zmq.XPUB else self._monitor
        return bool(waiting.poll(round(seconds * 1000)))

    def run(
        self,
        trains: Sequence[Train],
        *,
        rate_hz: float = 0.0,
        version: str = "2.2",
        faults: Mapping[int, str] | None = None,
        patience_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> Totals:
        """Send trains, one after the other.

        Args:
            rate_hz: trains per second, 0 for as fast as they are taken.
            faults: place in ``trains`` -> name in :data:`FAULTS`.
            patience_s: how long to wait for a request.

        Raises:
            TimeoutError: nobody asked for so long.
        """
        totals = Totals(series=1)
        began = clock()
        for place, train in enumerate(trains):
            if rate_hz > 0 and (left := began + place / rate_hz - clock()) > 0:
                sleep(left)
            fault = (faults or {}).get(place, "")
            if fault == "gap":
                continue
            if fault == "garbage":
                self._send([b"\xc1no train"], totals, patience_s)
            if fault == "silent" and self._kind == zmq.ROUTER:
                self._request(patience_s)
            parts = train_parts(train, version=version, fault=fault)
            for _ in range(2 if fault == "duplicate" else 1):
                self._send(parts, totals, patience_s)
                totals.images += len(train.pixels) * (fault != "no_array")
        return totals

    def _request(self, patience_s: float) -> list[bytes]:
        """The envelope to answer the next request in."""
        if not self._socket.poll(round(patience_s * 1000)):
            raise TimeoutError(f"no request within {patience_s:g} s")
        return self._socket.recv_multipart()[:-1]

    def _send(self, parts: Sequence[bytes], totals: Totals, patience_s: float) -> None:
        envelope = self._request(patience_s) if self._kind == zmq.ROUTER else []
        self._socket.send_multipart([*envelope, *parts])
        totals.messages += 1
        totals.size_bytes += sum(len(part) for part in parts)

    def close(self, linger_s: float = 30.0) -> None:
        """Wait until the clients have everything, at most ``linger_s``."""
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close(linger=round(linger_s * 1000))
        self._context.term()

"""A twin of slsDetectorPackage receivers: a PUB socket and a part of the image per port.

Each part is a JSON header, keys in the package's order, and raw pixels; at the end of an
acquisition every port sends a header with ``data`` 0 and zeros. EIGER's odd port rows run upwards
(``flipRows``). JUNGFRAU words are made from photons by pedestal and gain maps of known values,
each pixel in the first stage that can hold its signal.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray

__all__ = ["Layout", "Receivers", "SlsFaults", "SlsMaps", "acquisition", "packed"]

_EIGER, _JUNGFRAU = 1, 3
_FULL_SCALE = 0x3FFF
_SATURATED = 0xC000
_HEADROOM_ADU = 300
_PACKET_BYTES = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a detector is cut into ports.

    Attributes:
        detector: ``jungfrau`` or ``eiger``.
        ports: rows and columns of ports.
        bits: of a pixel on the wire, 4, 8, 12, 16 or 32.
    """

    detector: str = "jungfrau"
    ports: tuple[int, int] = (2, 1)
    bits: int = 16

    def shape(self, image: NDArray[Any]) -> tuple[int, int]:
        """(y, x) of one port's part.

        Raises:
            ValueError: the image cannot be cut so.
        """
        (y, x), (rows, columns) = image.shape, self.ports
        if y % rows or x % columns or x // columns % 2:
            raise ValueError(
                f"image of {(y, x)} (y, x) for {self.ports} ports; expected parts of one size "
                "with an even number of columns"
            )
        return y // rows, x // columns


@dataclass(frozen=True, slots=True, kw_only=True)
class SlsFaults:
    """What goes wrong, by place of the frame in its acquisition and by port.

    Attributes:
        lost: (frame, port) whose part is not sent.
        incomplete: (frame, port) whose last packet was lost: ones, and ``completeImage`` 0.
        dead: ports that send nothing at all.
        endless: ports that send no end of acquisition.
        skew: by how many frames the last port lags behind the first, those between evenly.
    """

    lost: frozenset[tuple[int, int]] = frozenset()
    incomplete: frozenset[tuple[int, int]] = frozenset()
    dead: frozenset[int] = frozenset()
    endless: frozenset[int] = frozenset()
    skew: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SlsMaps:
    """Pedestal in ADU and gain in ADU per keV, (3, y, x) float32 by gain stage."""

    pedestal: NDArray[np.float32]
    gain: NDArray[np.float32]
    energy_kev: float

    @classmethod
    def drawn(cls, shape: tuple[int, int], energy_kev: float, seed: int) -> SlsMaps:
        """Maps such as those of a calibrated module; the same for the same arguments."""
        rng = np.random.default_rng(seed)
        typical = ((3000.0, 41.5), (15000.0, -1.39), (15000.0, -0.11))
        pedestal = [rng.normal(level, 60.0, shape) for level, _ in typical]
        gain = [slope * rng.normal(1.0, 0.02, shape) for _, slope in typical]
        return cls(
            pedestal=np.array(pedestal, np.float32),
            gain=np.array(gain, np.float32),
            energy_kev=energy_kev,
        )

    def words(self, photons: NDArray[Any]) -> NDArray[np.uint16]:
        """What the converter reads of ``photons`` (y, x), a fresh array; what no stage holds is
        read as the last one saturated."""
        adu = np.rint(self.pedestal + photons * (self.gain * self.energy_kev)).astype(np.int64)
        fits = (adu >= 0) & (adu <= _FULL_SCALE)
        fits[:2] &= (adu[:2] > _HEADROOM_ADU) & (adu[:2] < _FULL_SCALE - _HEADROOM_ADU)
        stage = fits.argmax(axis=0)
        chosen = np.take_along_axis(adu, stage[None], axis=0)[0]
        bits = np.array([0, 1, 3], np.uint16)[stage]
        words = bits << 14 | (chosen & _FULL_SCALE).astype(np.uint16)
        saturated: NDArray[np.uint16] = np.where(fits.any(axis=0), words, _SATURATED)
        return saturated.astype(np.uint16)

    def save(self, path: Path) -> None:
        """Both maps in one ``.npz`` file."""
        with path.open("wb") as file:
            np.savez(file, pedestal=self.pedestal, gain=self.gain)


def packed(pixels: NDArray[Any], bits: int) -> bytes:
    """Pixels as they travel: little-endian; of 4 bits the first in the upper half of a byte,
    of 12 bits two in three bytes, low bits first. What does not fit is the largest value."""
    most = 2**bits - 1
    masked = pixels == np.iinfo(pixels.dtype).max
    pixels = np.where(masked, most, np.minimum(pixels, most))
    if bits == 4:
        flat = pixels.astype(np.uint8).reshape(-1, 2)
        return (flat[:, 0] << 4 | flat[:, 1] & 0xF).astype(np.uint8).tobytes()
    if bits == 12:
        first, second = pixels.astype(np.uint16).reshape(-1, 2).T
        threes = np.stack([first & 0xFF, first >> 8 | (second & 0xF) << 4, second >> 4], axis=1)
        return threes.astype(np.uint8).tobytes()
    return pixels.astype(f"<u{bits // 8}").tobytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Acquisition:
    file_index: int
    first_number: int
    name: str
    frames: int
    additional: dict[str, str] = field(default_factory=dict)


def _header(
    layout: Layout,
    run: _Acquisition,
    frame: int,
    port: int,
    shape: tuple[int, int],
    size: int,
    *,
    complete: bool,
) -> bytes:
    rows, columns = layout.ports
    row, column = divmod(port, columns)
    is_eiger = layout.detector == "eiger"
    packets = max(1, size // _PACKET_BYTES)
    number = run.first_number + frame
    told: dict[str, Any] = {
        "jsonversion": 5,
        "bitmode": layout.bits,
        "fileIndex": run.file_index,
        "detshape": [columns, rows],
        "shape": [shape[1], shape[0]],
        "size": size,
        "acqIndex": number,
        "frameIndex": frame,
        "progress": round(100.0 * (frame + 1) / run.frames, 4),
        "fname": run.name,
        "data": 1,
        "completeImage": int(complete),
        "frameNumber": number,
        "expLength": 0,
        "packetNumber": packets - (not complete),
        "detSpec1": 0,
        "timestamp": 10_000 * frame,
        "modId": port,
        "row": row,
        "column": column,
        "detSpec2": 0,
        "detSpec3": 0,
        "detSpec4": 0,
        "detType": _EIGER if is_eiger else _JUNGFRAU,
        "version": 2,
        "flipRows": int(is_eiger and row % 2 == 1),
        "quad": 0,
    }
    if run.additional:
        told["addJsonHeader"] = run.additional
    told["rx_roi"] = [-1, -1, -1, -1]
    return json.dumps(told, separators=(", ", ":")).encode() + b"\n"


def _end() -> bytes:
    names = "jsonversion bitmode fileIndex detshape shape size acqIndex frameIndex progress fname"
    names += " data completeImage frameNumber expLength packetNumber detSpec1 timestamp modId row"
    names += " column detSpec2 detSpec3 detSpec4 detType version flipRows quad rx_roi"
    told: dict[str, Any] = dict.fromkeys(names.split(), 0)
    told |= {"jsonversion": 5, "detshape": [0, 0], "shape": [0, 0], "fname": ""}
    told["rx_roi"] = [0, 0, 0, 0]
    return json.dumps(told, separators=(", ", ":")).encode() + b"\n"


def acquisition(
    images: Sequence[NDArray[Any]],
    layout: Layout,
    *,
    frames: int | None = None,
    maps: SlsMaps | None = None,
    faults: SlsFaults | None = None,
    file_index: int = 0,
    first_number: int = 1,
    additional: dict[str, str] | None = None,
) -> Iterator[tuple[int, int, tuple[bytes, ...]]]:
    """(frame, port, ZeroMQ parts) of one acquisition in the order they are sent; an end of a
    port has the frame -1.

    Args:
        images: counts, or photons where there are ``maps``; cycled through.
        frames: how many are sent, all ``images`` once where not told.
    """
    faults = faults or SlsFaults()
    count = len(images) if frames is None else frames
    run = _Acquisition(
        file_index=file_index,
        first_number=first_number,
        name="/data/run",
        frames=count,
        additional=additional or {},
    )
    rows, columns = layout.ports
    ports = [port for port in range(rows * columns) if port not in faults.dead]
    lag = {port: faults.skew * port // max(1, rows * columns - 1) for port in ports}
    # Before anything is sent: what takes time must not hold up the rate.
    cut = [_cut(image, layout, maps) for image in images]
    shape = layout.shape(images[0])
    for turn in range(count + faults.skew):
        for port in ports:
            frame = turn - lag[port]
            if not 0 <= frame < count or (frame, port) in faults.lost:
                continue
            pixels = cut[frame % len(cut)][port]
            complete = (frame, port) not in faults.incomplete
            if not complete:
                last = min(_PACKET_BYTES, len(pixels) // 2)
                pixels = pixels[:-last] + b"\xff" * last
            header = _header(layout, run, frame, port, shape, len(pixels), complete=complete)
            yield frame, port, (header, pixels)
    for port in ports:
        if port not in faults.endless:
            yield -1, port, (_end(),)


def _cut(image: NDArray[Any], layout: Layout, maps: SlsMaps | None) -> list[bytes]:
    """The bytes of each port, row by row of ports."""
    whole = image if maps is None else maps.words(image)
    ny, nx = layout.shape(whole)
    parts = []
    for row in range(layout.ports[0]):
        for column in range(layout.ports[1]):
            part = whole[row * ny : row * ny + ny, column * nx : column * nx + nx]
            if layout.detector == "eiger" and row % 2:
                part = part[::-1]
            parts.append(packed(part, layout.bits))
    return parts


class Receivers:
    """A bound XPUB socket for each port.

    Args:
        bind: address of the first port; the others count up from it, or take any free port each
            where it ends in ``*``.
        ports: how many.
    """

    def __init__(self, bind: str = "tcp://127.0.0.1:*", *, ports: int) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []
        head, _, last = bind.rpartition(":")
        for n in range(ports):
            socket = self._context.socket(zmq.XPUB)
            self._sockets.append(socket)
            # A publisher drops what is above its mark; a twin that loses is told to.
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.bind(bind if last == "*" else f"{head}:{int(last) + n}")
        self.endpoints = [socket.getsockopt_string(zmq.LAST_ENDPOINT) for socket in self._sockets]

    def wait_for_peer(self, seconds: float) -> bool:
        """True once a reader has subscribed to every port."""
        until = time.monotonic() + seconds
        return all(
            socket.poll(max(0, round(1000 * (until - time.monotonic()))))
            for socket in self._sockets
        )

    def send(
        self,
        messages: Iterator[tuple[int, int, tuple[bytes, ...]]],
        *,
        rate_hz: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> tuple[int, int]:
        """Send what :func:`acquisition` gives; how many messages and bytes that was."""
        began, count, size = clock(), 0, 0
        for frame, port, parts in messages:
            if frame >= 0 and rate_hz > 0 and (left := began + frame / rate_hz - clock()) > 0:
                sleep(left)
            self._sockets[port].send_multipart(parts)
            count += 1
            size += sum(map(len, parts))
        return count, size

    def close(self, linger_s: float = 30.0) -> None:
        """Wait until readers have everything, at most ``linger_s``."""
        for socket in self._sockets:
            socket.close(linger=round(linger_s * 1000))
        self._context.term()

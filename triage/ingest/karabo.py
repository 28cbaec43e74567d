"""Trains of the Karabo bridge (European XFEL): ZeroMQ multipart with MessagePack headers.

A message is one train: every source's values, and arrays that hold one image per X-ray pulse. The
array that is scored is cut into frames; the train itself goes on whole, with the message of its
first frame. Nothing here unpickles. Protocols 1.0 (one MessagePack document) and 2.2 (pairs of
header and payload) are told apart by the number of parts.

Identity: a series lasts as long as the array keeps its source, path, shape and pixel type. Its
``series_id`` is the train id of its first train, its ``series_unique_id`` the number of frames per
train, source and path; ``image_id`` is (train id - series_id) * frames per train + place in the
train. So ids are unique and rise, a train that did not come is ``missing`` with all its frames,
and train and pulse can be had from ``series_id`` and ``image_id``. Trains without an id go on
unscored.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

from triage.errors import ConfigError, MalformedMessage, UnsupportedEncoding, WireError
from triage.ingest.series import SeriesBook, unread
from triage.metrics import Metrics
from triage.records import LARGEST_MESSAGE_BYTES, Message, MessageKind, Reason, Series
from triage.sockets import Connections

__all__ = ["KaraboBridge", "TrainParser"]

log = logging.getLogger(__name__)

_SOCKETS = {"req": zmq.REQ, "sub": zmq.SUB, "pull": zmq.PULL}
_ORDERS = ("file", "online")

_ANSWER_NS = 10_000_000_000
"""A bridge that says nothing for so long is asked anew. Trains of a gigabyte take a second."""

_TRAINS_HELD = 2
"""Trains that ZeroMQ may hold: they are hundreds of megabytes each, and come ten times a second."""

_ROWS_AT_ONCE = 8
"""Rows of a module whose axes are turned round at a time. Their pulses then stay in the cache,
which takes a sixth of the time of all at once."""

_MAX_HEADER_BYTES = 1 << 20
_MAX_FRAMES = 1 << 13
"""A train has at most 2,700 pulses; an array with more frames than this is no stack of images."""

_MAX_MODULES = 1 << 10
"""Detectors have 16 modules, or 256 tiles of them."""

_PIXEL_TYPE = re.compile(
    r"(?P<order>[<>=|]?)(?:(?P<short>[uif][1248])|(?P<kind>uint|int|float)(?P<bits>8|16|32|64))"
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Array:
    """One array of a train, as its header describes it; nothing is checked yet."""

    source: str
    path: str
    dtype: object
    shape: object
    data: Any

    @property
    def dimensions(self) -> int:
        return len(self.shape) if isinstance(self.shape, list | tuple) else 0


class TrainParser:
    """Turns trains into :class:`triage.records.Message`; never raises on what it is sent.

    Args:
        source: whose array is scored; "" for any.
        path: which of its arrays; "" for the first with three dimensions or more, else the
            first with two.
        order: ``file`` for arrays (pulses, modules, y, x) or (pulses, y, x), ``online`` for
            (modules, x, y, pulses) or (x, y, pulses), which have to be copied to be read.
    """

    def __init__(
        self,
        source: str = "",
        path: str = "",
        order: str = "file",
        book: SeriesBook | None = None,
    ) -> None:
        self._source = source
        self._path = path
        self._online = order == "online"
        self._book = book or SeriesBook()
        self._series: Series | None = None
        self._layout: tuple[Any, ...] = ()

    def parse(self, parts: Sequence[Any], received_ns: int) -> list[Message]:
        """What one ZeroMQ message says: a message for each frame, the first with all parts.

        Where a series begins or ends with it, messages without parts stand before them. A
        train without the array that is looked for is one message of kind ``control``.
        """
        size = sum(memoryview(part).nbytes for part in parts)
        arrays, trains, fault = _read(parts)
        array = self._chosen(arrays)
        if array is None:
            names = sorted({found.source for found in arrays} | trains.keys())
            return [
                Message(
                    kind=MessageKind.MALFORMED if fault else MessageKind.CONTROL,
                    parts=tuple(parts),
                    received_ns=received_ns,
                    size_bytes=size,
                    detail=(fault or f"a train without the array, of {', '.join(names)}")[:200],
                )
            ]
        train = trains.get(array.source, next(iter(trains.values()), -1))
        try:
            dtype, shape, modules, pieces = _frames(array, online=self._online)
        except WireError as err:
            unknown = isinstance(err, UnsupportedEncoding)
            series = self._series
            if series is None:
                series = self._book.find(-1, f"{array.source} {array.path}"[:200])
            frame = self._book.enter(
                series,
                -1,
                fault=Reason.UNKNOWN_ENCODING if unknown else Reason.MALFORMED,
                fault_detail=f"{array.source} {array.path}: {err}"[:300],
                received_ns=received_ns,
                size_bytes=size,
            )
            return [
                Message(
                    kind=MessageKind.IMAGE,
                    parts=tuple(parts),
                    received_ns=received_ns,
                    frame=frame,
                    size_bytes=size,
                )
            ]
        messages = self._turned(array, train, dtype, shape, modules, len(pieces), received_ns)
        series = self._series
        if series is None:
            return messages
        first = (train - series.series_id) * len(pieces) if train >= 0 else -1
        rest = size - sum(piece.nbytes for piece in pieces)
        if pieces[0].obj is not memoryview(array.data).obj or len(parts) == 1:
            # Frames that had to be copied are held beside what was received.
            rest = size
        for i, piece in enumerate(pieces):
            frame = self._book.enter(
                series,
                first + i if first >= 0 else -1,
                shape=shape,
                channel=array.path,
                dtype=dtype,
                framed=False,
                payload=piece,
                received_ns=received_ns,
                size_bytes=piece.nbytes,
            )
            messages.append(
                Message(
                    kind=MessageKind.IMAGE,
                    parts=() if i else tuple(parts),
                    received_ns=received_ns,
                    frame=frame,
                    size_bytes=piece.nbytes + (0 if i else rest),
                )
            )
        return messages

    def ended(self, received_ns: int) -> list[Message]:
        """The end of the series that runs, when no more trains are read."""
        series, self._series = self._series, None
        if series is None:
            return []
        return [Message(kind=MessageKind.END, series=series, received_ns=received_ns)]

    def _chosen(self, arrays: Sequence[_Array]) -> _Array | None:
        fitting = [
            array
            for array in arrays
            if (not self._source or array.source == self._source)
            and (not self._path or array.path == self._path)
        ]
        if self._path:
            return fitting[0] if fitting else None
        for least in (3, 2):
            for array in fitting:
                if array.dimensions >= least:
                    return array
        return None

    def _turned(
        self,
        array: _Array,
        train: int,
        dtype: np.dtype[Any],
        shape: tuple[int, int],
        modules: int,
        count: int,
        received_ns: int,
    ) -> list[Message]:
        """The end of the last series and the start of the next, where this train begins one."""
        layout = (array.source, array.path, dtype, shape, modules, count)
        if self._series is not None and layout == self._layout:
            first = self._series.series_id
            # Without a train id nothing says that a series is another one.
            if train < 0 or 0 <= first <= train < first + 2**62 // count:
                return []
        messages = self.ended(received_ns)
        self._layout = layout
        self._series = self._book.start(
            Series(
                series_id=train,
                series_unique_id=f"{count}x {array.source} {array.path}"[:200],
                image_size_y_px=shape[0],
                image_size_x_px=shape[1],
                channels=(array.path,),
                detector_description=array.source[:256],
            ),
            # Where modules really stand is not in the stream: rings would be looked for in vain.
            in_place=modules == 1,
        )
        messages.append(
            Message(kind=MessageKind.START, series=self._series, received_ns=received_ns)
        )
        return messages


class KaraboBridge:
    """A live source: a bridge of European XFEL, asked for trains or listened to.

    It is a tap: the facility's recorder runs beside it. A REQ socket asks for the next train
    when there is room for it, so what is not asked for in time is ``missing`` here and nowhere
    else. A bridge that does not answer, or answers a socket that it has forgotten, would leave a
    REQ socket waiting for good: after ten seconds the socket is closed and a new one asks again.

    Args:
        endpoint: the bridge's address.
        socket: ``req``, ``sub`` or ``pull``, the counterpart of the bridge's REP, PUB or PUSH.
        source, path, order, book: see :class:`TrainParser`.
        answer_ns: how long a bridge may take to answer.

    Raises:
        ConfigError: an address or kind of socket that cannot be used.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        socket: str = "req",
        source: str = "",
        path: str = "",
        order: str = "file",
        book: SeriesBook | None = None,
        metrics: Metrics | None = None,
        answer_ns: int = _ANSWER_NS,
        clock: Callable[[], int] = time.monotonic_ns,
        context: zmq.Context[Any] | None = None,
    ) -> None:
        if socket not in _SOCKETS or order not in _ORDERS:
            raise ConfigError(
                f"[source] karabo_socket = {socket!r}, karabo_order = {order!r}; expected one of "
                f"{', '.join(_SOCKETS)}, and one of {', '.join(_ORDERS)}"
            )
        self._parser = TrainParser(source, path, order, book)
        self._kind = _SOCKETS[socket]
        self._metrics = metrics
        self._answer_ns = answer_ns
        self._clock = clock
        self._asked_ns = 0
        self._silent = False
        self._own_context = context is None
        self._context = context or zmq.Context()
        self.endpoint = endpoint
        self._peers = (0, 1)
        self._socket = self._opened()

    def _opened(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(self._kind)
        self._connections = Connections()
        self._connections.watch(socket)
        socket.setsockopt(zmq.RCVHWM, _TRAINS_HELD)
        socket.setsockopt(zmq.MAXMSGSIZE, LARGEST_MESSAGE_BYTES)
        socket.setsockopt(zmq.LINGER, 0)
        if self._kind == zmq.SUB:
            socket.setsockopt(zmq.SUBSCRIBE, b"")
        try:
            socket.connect(self.endpoint)
        except zmq.ZMQError as err:
            self._connections.close()
            socket.close()
            if self._own_context:
                self._context.term()
            raise ConfigError(
                f"[source] endpoint = {self.endpoint!r}: {err}; expected the address of a bridge "
                "such as tcp://127.0.0.1:45000"
            ) from err
        return socket

    def receive(self, timeout_ms: int) -> list[Message]:
        """The frames of the next train, waiting for it up to ``timeout_ms``."""
        if self._kind == zmq.REQ and not self._asked_ns:
            self._ask()
        some = self._socket.poll(timeout_ms)
        self._peers = self._connections.connected()
        if not some:
            if self._asked_ns and self._clock() - self._asked_ns >= self._answer_ns:
                self._ask_anew()
            return []
        parts = self._socket.recv_multipart(copy=False)
        received_ns = self._clock()
        self._asked_ns = 0
        if self._silent:
            self._silent = False
            log.warning("the bridge at %s answers again", self.endpoint)
        try:
            return self._parser.parse(parts, received_ns)
        except Exception as err:  # fail open: the train goes on as it came
            log.exception("a train could not be read")
            return [unread(parts, received_ns, 0, err)]

    def _ask(self) -> None:
        try:
            self._socket.send(b"next", zmq.NOBLOCK)
        except zmq.Again:
            return
        self._asked_ns = self._clock()

    def _ask_anew(self) -> None:
        """Only a new socket can ask again where an answer is owed."""
        if not self._silent:
            self._silent = True
            log.warning(
                "the bridge at %s has not answered for %g s; it is asked again until it does",
                self.endpoint,
                self._answer_ns * 1e-9,
            )
        if self._metrics is not None:
            self._metrics.source_reset()
        self._connections.close()
        self._socket.close()
        self._socket = self._opened()
        self._ask()

    def flush(self) -> list[Message]:
        """The end of the series that runs: a bridge never says that there are no more trains."""
        return self._parser.ended(self._clock())

    def connected(self) -> tuple[int, int]:
        """How many sockets had a peer when they were last read, and how many there are."""
        return self._peers

    @property
    def exhausted(self) -> bool:
        """Never: a bridge may go on at any time."""
        return False

    def close(self) -> None:
        """Close the socket; may be called twice."""
        self._connections.close()
        self._socket.close()
        if self._own_context:
            self._context.term()


def _read(parts: Sequence[Any]) -> tuple[list[_Array], dict[str, int], str]:
    """Arrays of a train in order, train ids by source, and what could not be read of it."""
    if len(parts) == 1:
        return _read_document(parts[0])
    arrays: list[_Array] = []
    trains: dict[str, int] = {}
    fault = f"{len(parts)} parts; expected pairs of header and payload" if len(parts) % 2 else ""
    for header, payload in zip(parts[::2], parts[1::2], strict=False):
        try:
            fields = _document(header, _MAX_HEADER_BYTES)
        except MalformedMessage as err:
            fault = fault or str(err)
            continue
        source, content = fields.get("source"), fields.get("content")
        if not isinstance(source, str):
            fault = fault or "a header without a source"
        elif content == "msgpack":
            _note_train(trains, source, fields.get("metadata"))
        elif content in ("array", "ImageData"):
            arrays.append(
                _Array(
                    source=source[:256],
                    path=str(fields.get("path", ""))[:256],
                    dtype=fields.get("dtype"),
                    shape=fields.get("shape"),
                    data=payload,
                )
            )
    return arrays, trains, fault


def _read_document(part: Any) -> tuple[list[_Array], dict[str, int], str]:
    """As :func:`_read`, of protocol 1.0; arrays are maps with the keys of msgpack-numpy."""
    arrays: list[_Array] = []
    trains: dict[str, int] = {}
    try:
        document = _document(part, memoryview(part).nbytes)
    except MalformedMessage as err:
        return arrays, trains, str(err)
    for source, values in document.items():
        if not isinstance(source, str) or not isinstance(values, dict):
            continue
        _note_train(trains, source, values.get("metadata"))
        for path, value in values.items():
            if isinstance(value, dict) and value.get(b"nd") is True:
                dtype = value.get(b"type")
                arrays.append(
                    _Array(
                        source=source[:256],
                        path=str(path)[:256],
                        dtype=dtype.decode("latin-1") if isinstance(dtype, bytes) else dtype,
                        shape=value.get(b"shape"),
                        data=value.get(b"data"),
                    )
                )
    return arrays, trains, "" if trains or arrays else "a document without sources"


def _document(part: Any, most_bytes: int) -> Mapping[Any, Any]:
    view = memoryview(part)
    if view.nbytes > most_bytes:
        raise MalformedMessage(f"a header of {view.nbytes} bytes; expected at most {most_bytes}")
    try:
        document = msgspec.msgpack.decode(view)
    except (ValueError, RecursionError) as err:
        raise MalformedMessage(f"not MessagePack: {str(err)[:80]}") from err
    if not isinstance(document, dict):
        raise MalformedMessage(f"MessagePack {type(document).__name__}; expected a map")
    return document


def _note_train(trains: dict[str, int], source: str, metadata: object) -> None:
    train = metadata.get("timestamp.tid") if isinstance(metadata, dict) else None
    # A device that hears no timing system says 0.
    if isinstance(train, int) and not isinstance(train, bool) and 0 < train < 2**62:
        trains[source[:256]] = train


def _frames(
    array: _Array, *, online: bool
) -> tuple[np.dtype[Any], tuple[int, int], int, list[memoryview]]:
    """Pixel type, shape (y, x), number of modules and the bytes of each frame.

    Raises:
        MalformedMessage: the bytes are not what the header says.
        UnsupportedEncoding: pixels that are no numbers.
    """
    dtype = _pixel_type(array.dtype)
    shape = array.shape
    if not (
        isinstance(shape, list | tuple)
        and 2 <= len(shape) <= 6
        and all(type(n) is int and 0 < n < 2**31 for n in shape)
    ):
        raise MalformedMessage(f"shape {str(shape)[:60]}; expected 2 to 6 numbers above 0")
    try:
        data = memoryview(array.data).cast("B")
    except TypeError as err:
        raise MalformedMessage(f"an array without bytes: {err}") from err
    if math.prod(shape) * dtype.itemsize != data.nbytes:
        raise MalformedMessage(f"{data.nbytes} bytes; expected {tuple(shape)} of {dtype.str}")
    axes = tuple(shape)
    if len(axes) == 2:
        axes = (*axes, 1) if online else (1, *axes)
    count = axes[-1] if online else axes[0]
    if count > _MAX_FRAMES:
        raise MalformedMessage(f"{count} frames in a train; expected at most {_MAX_FRAMES}")
    pixels = np.frombuffer(data, dtype)
    if online:
        pixels = pixels.reshape(-1, *axes[-3:]).transpose(3, 0, 2, 1)
    else:
        pixels = pixels.reshape(count, -1, *axes[-2:])
    _, modules, y, x = pixels.shape
    if modules > _MAX_MODULES:
        raise MalformedMessage(f"{modules} modules; expected at most {_MAX_MODULES}")
    if online or modules > 1:
        rows = _module_rows(modules, y, x)
        data = _laid_out(pixels, rows).data.cast("B")
        y, x = rows * y, modules // rows * x
    size = y * x * dtype.itemsize
    return dtype, (y, x), modules, [data[i * size : (i + 1) * size] for i in range(count)]


def _laid_out(pixels: NDArray[Any], rows: int) -> NDArray[Any]:
    """Frames one after the other in memory from (pulses, modules, y, x), modules in ``rows``."""
    count, modules, y, x = pixels.shape
    tiles = pixels.reshape(count, rows, modules // rows, y, x).swapaxes(2, 3)
    if pixels.flags.c_contiguous:
        return np.ascontiguousarray(tiles)
    out = np.empty(tiles.shape, pixels.dtype)
    for row, column in np.ndindex(rows, modules // rows):
        for top in range(0, y, _ROWS_AT_ONCE):
            some = slice(top, top + _ROWS_AT_ONCE)
            out[:, row, some, column] = tiles[:, row, some, column]
    return out


def _module_rows(modules: int, y: int, x: int) -> int:
    """Rows in which modules are laid out, as many in each, for the squarest frame.

    Where they really stand is not in the stream. A frame that is as square as may be is binned
    least, and spots are as large in it wherever their module stands.
    """
    divisors = [rows for rows in range(1, modules + 1) if modules % rows == 0]
    return min(divisors, key=lambda rows: max(rows * y, modules // rows * x))


def _pixel_type(name: object) -> np.dtype[Any]:
    found = _PIXEL_TYPE.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        raise UnsupportedEncoding(f"pixel type {str(name)[:32]!r}; expected such as uint16 or <f4")
    text = found["short"]
    if text is None:
        text = f"{found['kind'][0]}{int(found['bits']) // 8}"
    if text == "f1":
        raise UnsupportedEncoding(f"pixel type {name!r}; expected such as uint16 or <f4")
    return np.dtype((">" if found["order"] == ">" else "<") + text)

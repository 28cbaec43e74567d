"""What is fuzzed, and what must hold whatever comes: one target for each way in.

A target gives sound inputs to begin with, changes one a little, and checks one: it raises where a
promise is broken. The tests run some hundred inputs of each, benchmarks/fuzz.py as many as it has
time for. Inputs are bytes, so that one can be kept as a file and run again.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import random
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import cbor2
import fuzz_grammar as grammar
import numpy as np
from fuzz_base import Target, need
from fuzz_config import ConfigTarget
from fuzz_files import NxmxTarget
from fuzz_sources import KaraboTarget, SlsTarget
from pictures import encode, picture

from simulators.detectors import stream1, stream2
from simulators.detectors.frames import SimFrame, StreamInfo, compressed

__all__ = ["TARGETS", "Target"]


# -- streams -------------------------------------------------------------------------------------

_SHAPE = (13, 22)
_OPENS = re.compile(rb'"d(image|header|series_end)-')
_AFTER = 987_654_321
"""Series of the sound messages that follow each input."""

_MASK = (np.random.default_rng(5).random(_SHAPE) < 0.1).astype(np.uint32)


def _info(series_id: int, **fields: Any) -> StreamInfo:
    known: dict[str, Any] = {
        "shape": _SHAPE,
        "number_of_images": 3,
        "beam_center_x_px": 9.5,
        "beam_center_y_px": 6.0,
        "detector_distance_m": 0.1,
        "pixel_mask": _MASK,
    }
    return StreamInfo(series_id=series_id, **known | fields)


def _sim_frame(encoding: str, dtype: str, shape: tuple[int, int] = _SHAPE) -> SimFrame:
    pixels = picture(dtype, shape)
    return SimFrame(
        payload=compressed(pixels, encoding),
        encoding=encoding,
        dtype=pixels.dtype,
        shape=shape,
        truth={"n_visible": 3.0} if encoding == "raw" else {},
    )


_KINDS = (
    *(("bslz4", "<u2"), ("bslz4", "u1"), ("bslz4", "<u4"), ("bslz4", "<i4"), ("lz4", "<u2")),
    *(("lz4", "<i2"), ("raw", "<u2"), ("raw", "<f4"), ("bszstd", "<u4")),
)


class _Stream(Target):
    """Messages of a detector, then two that must be read as if nothing had been.

    No message raises; each keeps its parts as they came; it is an image exactly where an
    independent reader says so; what is not faulty can be prepared for the network; and with a
    verdict written into it, it is the same image still.
    """

    _protocol = ""

    def __init__(self) -> None:
        from triage.annotation import Annotator
        from triage.backends import open_backend
        from triage.errors import WireError
        from triage.ingest.dectris import DectrisStream
        from triage.ingest.series import SeriesBook
        from triage.records import Recipe

        # Named here, so that they are imported when coverage is looked for.
        self._stream_of, self._book_of = DectrisStream, SeriesBook
        self._backend = open_backend("cpu", Recipe(grid=16), recycle=True)
        self._no_place = WireError
        self._annotator = Annotator(verdicts=True, placeholders=True)
        self._spare = [grammar.read_capture(seed) for seed in self.seeds]
        sound = picture("<u2", _SHAPE).astype(np.int64)
        counted = (sound <= 65533) & (_MASK == 0)
        self._after_sum = int(sound[counted].sum())

    def _stream(self) -> Any:
        return self._stream_of(1, self._book_of(), protocol=self._protocol)

    def _expected(self, parts: Sequence[bytes]) -> str:
        """The kind that a message must be of; "" where nothing is claimed."""
        raise NotImplementedError

    def _after(self) -> tuple[Sequence[bytes], Sequence[bytes]]:
        raise NotImplementedError

    def changed(self, data: bytes, rng: random.Random) -> bytes:
        return grammar.changed_capture(data, rng, self._changed_part, self._spare)

    def _changed_part(self, part: bytes, number: int, rng: random.Random) -> bytes:
        raise NotImplementedError

    def check(self, data: bytes) -> None:
        stream = self._stream()
        for parts in grammar.read_capture(data):
            self._check_messages(stream, parts)
        start, image = self._after()
        self._check_messages(stream, start)
        (found,) = self._check_messages(stream, image)
        need(found.frame is not None and found.frame.fault is None, "the next image is harmed")
        views = self._backend.prepare([found.frame])
        need(views.errors[0] is None, "the next image does not decode")
        need(int(views.total.sum()) == self._after_sum, "the next image has other pixels")

    def _check_messages(self, stream: Any, parts: Sequence[bytes]) -> Any:
        messages = stream.take(list(parts), 1)
        came = [bytes(part) for message in messages for part in message.parts]
        need(came == list(parts), "parts are not as they came")
        if len(messages) == 1:
            expected, kind = self._expected(parts), messages[0].kind.value
            need(expected in ("", kind), f"{kind}; an independent reader says {expected}")
        for message in messages:
            self._check_message(message)
        return messages

    def _check_message(self, message: Any) -> None:
        kind, parts = message.kind.value, message.parts
        need(message.size_bytes == sum(map(len, parts)), "another size than came")
        need((message.frame is not None) == (kind == "image"), "a frame without an image")
        frame = message.frame
        if frame is not None:
            need(frame.series is not None, "a frame without a series")
            need(bool(frame.fault_detail) == (frame.fault is not None), "a fault without reason")
            if frame.fault is None:
                need(min(frame.shape) > 0, "a sound frame without pixels")
                views = self._backend.prepare([frame])
                need(np.isfinite(views.overview).all(), "views that are no numbers")
            self._check_annotated(message)

    def _check_annotated(self, message: Any) -> None:
        from decided import decided

        from triage.records import Override, Verdict

        frame = message.frame
        decision = decided(frame, verdict=Verdict.VETO, override=Override.SHADOW, policy_id="p")
        with contextlib.suppress(self._no_place):
            self._annotator.placeholder(message, decision)
        parts = self._annotator.kept(message, decision).parts
        if any(_OPENS.search(bytes(part)) for part in message.parts[1:]):
            # One part more, and this may be read as two messages that came joined.
            return
        (again,) = self._stream().take(parts, 1)
        found = again.frame
        need(found is not None, f"no image once its verdict is in it, but {again.kind.value}")
        need(found.image_id == frame.image_id, "another image_id once its verdict is in it")
        if frame.fault is None:
            same = (found.shape, found.dtype, found.encoding, found.framed)
            need(same == (frame.shape, frame.dtype, frame.encoding, frame.framed), "another form")
            need(bytes(found.payload) == bytes(frame.payload), "another payload")


class CborTarget(_Stream):
    """Stream V2 and Jungfraujoch: the walk, compiled and not, and the parser behind it."""

    modules = ("triage.ingest", "triage.backends.payload", "triage.annotation")
    _protocol = "stream2"

    def __init__(self) -> None:
        info = _info(12, channels=("threshold_1", "difference"))
        one = _info(12)
        self.seeds = [
            *(
                grammar.write_capture(
                    [
                        [stream2.start_message(one, header_detail="all" if all_ else "basic")],
                        [stream2.image_message(one, _sim_frame(*kind), 0)],
                        [stream2.image_message(one, _sim_frame(*kind), 1, [1, "\N{BLUE HEART}"])],
                        [stream2.end_message(one)],
                    ]
                )
                for all_, kind in enumerate(_KINDS)
            ),
            grammar.write_capture(
                [
                    [stream2.start_message(info)],
                    [stream2.image_message(info, _sim_frame("bslz4", "<u2"), 2**33)],
                ]
            ),
            grammar.write_capture([[self._jungfraujoch_start()], *self._jungfraujoch_rest()]),
        ]
        self._start = [stream2.start_message(_info(_AFTER), header_detail="all")]
        self._image = [stream2.image_message(_info(_AFTER), _sim_frame("bslz4", "<u2"), 5)]
        super().__init__()
        from triage.errors import MalformedMessage
        from triage.ingest.cbor import Tagged, read_map, read_map_in_python

        self._malformed, self._tagged = MalformedMessage, Tagged
        self._readers = (read_map, read_map_in_python)

    @staticmethod
    def _jungfraujoch_start() -> bytes:
        fields = cbor2.loads(stream2.start_message(_info(40))[3:])
        del fields["arm_date"]
        fields |= {
            "channels": ["default"], "error_value": -(2**31), "saturation_value": 2**31 - 1,
            "magic_number": 2, "detector_translation": 0.25, "detector_distance": 0.25,
            "user_data": {"user": {"a": [1, None]}},
        }  # fmt: skip
        return b"\xd9\xd9\xf7" + cbor2.dumps(fields)

    @staticmethod
    def _jungfraujoch_rest() -> list[list[bytes]]:
        frame = _sim_frame("bslz4", "<i4")
        message = stream2.image_message(_info(40, channels=("default",)), frame, 3)
        fields = cbor2.loads(message[3:])
        del fields["series_date"]
        spots = [{"x": 1.5, "y": 2.5, "I": 30.0}]
        fields |= {"spots": spots, "packets_expected": 128, "xfel_pulse_id": 2**40}
        calibration = {"type": "calibration", "pedestal": b"\0" * 64}
        return [
            [b"\xd9\xd9\xf7" + cbor2.dumps(fields)],
            [cbor2.dumps(calibration)],
            [cbor2.dumps({"type": "metadata", "images": [{"number": 3}]})],
            [cbor2.dumps({"type": "end", "series_id": 40, "max_image_number": 4})],
        ]

    def _after(self) -> tuple[Sequence[bytes], Sequence[bytes]]:
        return self._start, self._image

    def _changed_part(self, part: bytes, number: int, rng: random.Random) -> bytes:
        return grammar.changed_cbor(part, rng)

    def _check_messages(self, stream: Any, parts: Sequence[bytes]) -> Any:
        first, second = (self._outcome(read, parts[0]) for read in self._readers)
        need(first == second, f"read as {first!r:.200} when compiled, else {second!r:.200}")
        return super()._check_messages(stream, parts)

    def _outcome(self, read: Callable[..., None], message: bytes) -> Any:
        fields: dict[Any, Any] = {}
        error = ""
        try:
            read(memoryview(message), fields)
        except self._malformed as err:
            error = str(err)
        return self._plain(fields), error

    def _plain(self, value: Any) -> Any:
        if isinstance(value, memoryview):
            return ("bytes", bytes(value))
        if isinstance(value, self._tagged):
            return ("tag", value.tag, self._plain(value.value))
        if isinstance(value, dict):
            return [(str(key), self._plain(item)) for key, item in value.items()]
        if isinstance(value, list):
            return [self._plain(item) for item in value]
        if isinstance(value, float) and math.isnan(value):
            return "nan"
        return (type(value).__name__, value)

    def _expected(self, parts: Sequence[bytes]) -> str:
        message = parts[0]
        try:
            tree = grammar.read_cbor(message)
            fields = cbor2.loads(message[3:] if message[:3] == b"\xd9\xd9\xf7" else message)
        except (ValueError, cbor2.CBORDecodeError, RecursionError, OverflowError, TypeError):
            return ""
        usual = all(n.value in grammar.TAGS for n in tree.nodes() if n.major == 6)
        if tree.major != 5 or not usual or _depth(tree) > 30:
            return ""
        if not all(key.major == 3 for key in tree.items[::2]):
            return ""
        kind = fields.get("type")
        if not isinstance(kind, str):
            # A date is a text to us.
            return "" if isinstance(kind, datetime) else "malformed"
        return kind if kind in ("start", "image", "end") else "control"


def _depth(tree: grammar.Node) -> int:
    deepest, waiting = 0, [(tree, 0)]
    while waiting:
        node, depth = waiting.pop()
        deepest = max(deepest, depth)
        waiting += [(item, depth + 1) for item in node.items]
    return deepest


class JsonTarget(_Stream):
    """Stream V1: headers of every detail, blobs with and without their header, appendices."""

    modules = ("triage.ingest", "triage.backends.payload", "triage.annotation")
    _protocol = "stream1"

    def __init__(self) -> None:
        info = _info(12)
        captures = []
        for number, (encoding, dtype) in enumerate(_KINDS):
            if encoding == "bszstd":
                continue
            detail = ("basic", "all", "none")[number % 3]
            frame = _sim_frame(encoding, dtype)
            images = [stream1.image_parts(info, frame, i, {"a": 1} if i else None) for i in (0, 1)]
            if number % 4 == 1:
                images[1][2] = bytes(12) + images[1][2][12:]
            header = stream1.header_parts(info, header_detail=detail)
            captures.append([header, *images, stream1.end_parts(info)])
        split = stream1.header_parts(info)
        image = stream1.image_parts(info, _sim_frame("bslz4", "<u2"), 0)
        captures.append([split[:1], split[1:], image])
        self.seeds = [grammar.write_capture(each) for each in captures]
        self._start = stream1.header_parts(_info(_AFTER), header_detail="all")
        self._image = stream1.image_parts(_info(_AFTER), _sim_frame("bslz4", "<u2"), 5)
        super().__init__()

    def _after(self) -> tuple[Sequence[bytes], Sequence[bytes]]:
        return self._start, self._image

    def _changed_part(self, part: bytes, number: int, rng: random.Random) -> bytes:
        if part[:1] in (b"{", b"["):
            return grammar.changed_json(part, rng)
        return grammar.changed_payload(part, rng)

    def _expected(self, parts: Sequence[bytes]) -> str:
        try:
            first = json.loads(parts[0])
        except (ValueError, RecursionError):
            return "malformed"
        htype = first.get("htype") if isinstance(first, dict) else None
        if not isinstance(first, dict) or _json_depth(first) > 32:
            return "malformed"
        if isinstance(htype, str) and htype.startswith("dimage-") and htype.count("-") == 1:
            return "image"
        return ""


def _json_depth(document: Any) -> int:
    """How many objects and arrays stand in each other."""
    deep, level = 0, [document]
    while level := [each for each in level if isinstance(each, dict | list)]:
        deep += 1
        level = [
            inner for each in level for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return deep


# -- compressed payloads -------------------------------------------------------------------------


class ChunkTarget(Target):
    """A payload through decode and reduce: the slow decoder's pixels, or an error of the frame.

    An input is a byte for the encoding, one for the pixel type, two for the sides, one for what is
    framed, and the payload.
    """

    modules = ("triage.backends.payload", "reference")

    _ENCODINGS = ("bslz4", "lz4", "raw", "bszstd")
    _DTYPES = ("u1", "<u2", "<u4", ">u2", "<i2", "<i4", "<f4")

    def __init__(self) -> None:
        from triage.backends import open_backend
        from triage.backends.cpu import CpuBackend
        from triage.errors import DecodeError, UnsupportedEncoding
        from triage.records import Frame, Recipe, Series

        # Here and not above, so that its coverage leads the search too.
        self._twin = importlib.import_module("reference")
        recipe = Recipe(grid=16)
        self._backends = [open_backend("cpu", recipe), CpuBackend(recipe, kernels="numba")]
        self._refused = (DecodeError, UnsupportedEncoding)
        self._frame, self._series = Frame, Series()
        self.seeds = []
        for e, encoding in enumerate(self._ENCODINGS):
            for d, dtype in enumerate(self._DTYPES):
                for shape in ((13, 22), (3, 5)):
                    pixels = picture(dtype, shape)
                    payload = encode(pixels, encoding, 64 if encoding != "raw" else 0)
                    self.seeds.append(bytes([e, d, *shape, 1]) + payload)
        flat = np.zeros((64, 64), "<u2")
        self.seeds.append(bytes([0, 1, 64, 64, 1]) + encode(flat, "bslz4"))
        bare = encode(picture("<u2", (13, 22)), "lz4", 1 << 20)[16:]
        self.seeds.append(bytes([1, 1, 13, 22, 0]) + bare)

    def changed(self, data: bytes, rng: random.Random) -> bytes:
        head, payload = bytearray(data[:5].ljust(5, b"\0")), data[5:]
        if rng.randrange(8) == 0:
            at = rng.randrange(5)
            head[at] = rng.choice([head[at] + rng.randint(-2, 2), rng.randrange(256)]) % 256
        else:
            payload = grammar.changed_payload(payload, rng)
        return bytes(head) + payload

    def check(self, data: bytes) -> None:
        if len(data) < 5:
            return
        encoding = self._ENCODINGS[data[0] % len(self._ENCODINGS)]
        dtype = np.dtype(self._DTYPES[data[1] % len(self._DTYPES)])
        shape, framed, payload = (data[2], data[3]), bool(data[4] & 1), data[5:]
        frame = self._frame(
            series=self._series,
            image_id=0,
            encoding=encoding,
            dtype=dtype,
            shape=shape,
            payload=payload,
            framed=framed,
        )
        wanted = self._wanted(encoding, payload, dtype, shape, framed)
        cells = []
        for backend in self._backends:
            found = None
            with contextlib.suppress(self._refused):
                found = backend.decode(frame)
            views = backend.prepare([frame])
            need((views.errors[0] is None) == (found is not None), "decode and reduce disagree")
            if isinstance(wanted, np.ndarray):
                need(found is not None, "refused; the slow decoder reads it")
                need(found.tobytes() == wanted.tobytes(), "other pixels than the slow decoder's")
            elif wanted == "corrupt":
                need(found is None, "accepted; the slow decoder calls it corrupt")
            if found is not None:
                need(found.shape == shape and found.dtype.isnative, "another shape or type")
            cells.append((views.maximum.tobytes(), views.total.tobytes(), views.count.tobytes()))
        need(cells[0] == cells[1], "the kernels disagree")

    def _wanted(
        self, encoding: str, payload: bytes, dtype: Any, shape: tuple[int, int], framed: bool
    ) -> Any:
        """The twin's pixels, "corrupt", or None where it says nothing."""
        if encoding == "bszstd" or min(shape) < 1:
            return None
        size = shape[0] * shape[1] * dtype.itemsize
        block = int.from_bytes(payload[8:12], "big") if framed else 8192
        # The slow decoder checks no bounds of its own.
        if encoding != "raw" and size > 255 * len(payload):
            return None
        if encoding == "bslz4" and (block % (8 * dtype.itemsize) or block > 1 << 24):
            return None
        try:
            return self._twin.decode(encoding, payload, dtype, shape, framed)
        except (ValueError, struct.error):
            return "corrupt"


TARGETS: Mapping[str, type[Target]] = {
    "cbor": CborTarget,
    "json": JsonTarget,
    "chunk": ChunkTarget,
    "nxmx": NxmxTarget,
    "config": ConfigTarget,
    "sls": SlsTarget,
    "karabo": KaraboTarget,
}

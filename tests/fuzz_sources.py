"""Messages of SLS receivers and of the Karabo bridge that are almost right."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import fuzz_grammar as grammar
import msgspec
import numpy as np
from fuzz_base import Target, need
from pictures import picture

from simulators.detectors import karabo, slsdetector

__all__ = ["KaraboTarget", "SlsTarget"]

_SHAPE = (16, 24)
_SECOND_NS = 1_000_000_000


class _Source(Target):
    """Nothing raises, whatever came goes on once and as it came, and what follows is sound."""

    def __init__(self) -> None:
        from triage.backends import open_backend
        from triage.records import Recipe

        self._backend = open_backend("cpu", Recipe(grid=16), recycle=True)
        self._spare = [grammar.read_capture(seed) for seed in self.seeds]

    def changed(self, data: bytes, rng: random.Random) -> bytes:
        return grammar.changed_capture(data, rng, self._changed_part, self._spare)

    def _changed_part(self, part: bytes, number: int, rng: random.Random) -> bytes:
        raise NotImplementedError

    def _sums(self, messages: Iterable[Any]) -> list[int]:
        """The sum of each image's counts, -1 where it is faulty."""
        sums = []
        for message in messages:
            frame = message.frame
            need((frame is not None) == (message.kind.value == "image"), "an image and no frame")
            if frame is None:
                continue
            need(bool(frame.fault_detail) == (frame.fault is not None), "a fault without reason")
            views = self._backend.prepare([frame]) if frame.fault is None else None
            sound = views is not None and views.errors[0] is None
            sums.append(int(views.total.sum()) if views is not None and sound else -1)
        return sums


def _parts(message: Any) -> list[tuple[bytes, ...]]:
    held = [message.parts, *message.followed_by]
    return [tuple(bytes(part) for part in parts) for parts in held if parts]


class SlsTarget(_Source):
    """Headers of two ports and their pixels, assembled by frame number."""

    modules = ("triage.ingest", "triage.backends.payload")

    def __init__(self) -> None:
        layouts = [
            slsdetector.Layout(detector="eiger", ports=(1, 2), bits=bits) for bits in (16, 32, 8, 4)
        ]
        images = [picture("<u4", _SHAPE, seed=seed) for seed in range(3)]
        images = [np.where(image > 60000, 65535, image).astype("<u4") for image in images]
        self.seeds = [
            grammar.write_capture([parts for _, _, parts in self._sent(images, layout)])
            for layout in layouts
        ]
        self._after = [
            (port, parts)
            for _, port, parts in slsdetector.acquisition(
                images[:2], layouts[0], file_index=777, first_number=1
            )
        ]
        self._sum = [int(image[image <= 65533].astype(np.int64).sum()) for image in images[:2]]
        super().__init__()
        from triage.ingest.series import SeriesBook
        from triage.ingest.slsdetector import SlsAssembler

        self._new = lambda: SlsAssembler(2, SeriesBook())

    @staticmethod
    def _sent(images: Any, layout: Any) -> Any:
        return slsdetector.acquisition(images, layout)

    def _changed_part(self, part: bytes, number: int, rng: random.Random) -> bytes:
        if part[:1] == b"{":
            return grammar.changed_json(part, rng)
        return grammar.changed_bytes(part, rng)

    def check(self, data: bytes) -> None:
        assembler = self._new()
        came = grammar.read_capture(data)
        went: list[Any] = []
        for number, parts in enumerate(came):
            went += assembler.take(parts, number * 1000, number % 2)
        went += assembler.due(100 * _SECOND_NS)
        went += assembler.flush()
        self._sums(went)
        sent = Counter(tuple(parts) for parts in came)
        need(Counter(p for m in went for p in _parts(m)) == sent, "not what came went on")
        after: list[Any] = []
        for port, parts in self._after:
            after += assembler.take(parts, 200 * _SECOND_NS, port)
        after += assembler.due(400 * _SECOND_NS)
        after += assembler.flush()
        sums = self._sums(m for m in after if m.kind.value == "image")
        need(sums == self._sum, f"the next series gives {sums}; expected {self._sum}")


class KaraboTarget(_Source):
    """Trains of both protocols: headers of MessagePack, and arrays of several shapes."""

    modules = ("triage.ingest", "triage.backends.payload")

    def __init__(self) -> None:
        pixels = np.stack([picture("<u2", _SHAPE, seed=seed) for seed in range(3)])
        trains: list[Sequence[Sequence[bytes]]] = []
        for number, stack in enumerate((pixels, pixels.astype(np.float32), pixels[:, None])):
            trains.append(
                [
                    karabo.train_parts(
                        karabo.Train(train_id=karabo.FIRST_TRAIN + i, pixels=stack),
                        version="1.0" if number == 1 else "2.2",
                    )
                    for i in range(2)
                ]
            )
        self.seeds = [grammar.write_capture(each) for each in trains]
        after = karabo.Train(train_id=karabo.FIRST_TRAIN + 500, pixels=pixels, source="AFTER/X")
        self._after = karabo.train_parts(after)
        self._sum = [int(image[image <= 65533].astype(np.int64).sum()) for image in pixels]
        super().__init__()
        from triage.ingest.karabo import TrainParser
        from triage.ingest.series import SeriesBook

        self._new = lambda: TrainParser(book=SeriesBook())

    def _changed_part(self, part: bytes, number: int, rng: random.Random) -> bytes:
        if rng.randrange(4) == 0 or len(part) > 4000:
            return grammar.changed_bytes(part, rng)
        try:
            document = msgspec.msgpack.decode(part)
            if not isinstance(document, dict):
                return grammar.changed_bytes(part, rng)
            return msgspec.msgpack.encode(grammar.changed_document(document, rng))
        except (ValueError, TypeError, RecursionError, OverflowError):
            return grammar.changed_bytes(part, rng)

    def check(self, data: bytes) -> None:
        parser = self._new()
        for parts in [*grammar.read_capture(data), self._after]:
            messages = parser.parse(parts, 1)
            held = [p for m in messages for p in _parts(m)]
            need(held == [tuple(parts)], "a train is not as it came, or not once")
            sums = self._sums(messages)
        need(sums == self._sum, f"the next train gives {sums}; expected {self._sum}")
        parser.ended(2)

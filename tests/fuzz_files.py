"""Recorded runs that are almost right."""

from __future__ import annotations

import json
import random
import re
import tempfile
from pathlib import Path
from typing import Any

import hdf5_recipes
from fuzz_base import Target, need

__all__ = ["NxmxTarget"]


class NxmxTarget(Target):
    """Recorded runs: masters, links, virtual datasets, headers, and chunks that tell lies.

    An input is JSON: by file name, the steps that make it. A run is read to its end without an
    error; it has as many images as were told beforehand; a sound run after it is read as ever.
    """

    modules = ("triage.ingest", "triage.backends.payload")

    def __init__(self) -> None:
        from triage.backends import open_backend
        from triage.ingest.files import Files
        from triage.records import Recipe

        self._files = Files
        self._backend = open_backend("cpu", Recipe(grid=16), recycle=True)
        self.seeds = [json.dumps(each).encode() for each in hdf5_recipes.runs()]
        self._folder = tempfile.TemporaryDirectory()
        self._sound = Path(self._folder.name) / "sound"
        self._sound.mkdir()
        _build(hdf5_recipes.runs()[0], self._sound)
        self._sums = self._read(self._sound, whole=True)

    def close(self) -> None:
        self._folder.cleanup()

    def changed(self, data: bytes, rng: random.Random) -> bytes:
        try:
            document = json.loads(data)
        except ValueError:
            return rng.choice(self.seeds)
        try:
            for _ in range(rng.choice([1, 1, 2, 3])):
                document = hdf5_recipes.changed(document, rng)
            return json.dumps(document).encode()
        except (RecursionError, ValueError):
            return rng.choice(self.seeds)

    def check(self, data: bytes) -> None:
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            return
        with tempfile.TemporaryDirectory(dir=self._folder.name) as folder:
            _build(document, Path(folder))
            self._read(Path(folder), whole=False)
        need(self._read(self._sound, whole=True) == self._sums, "a sound run reads otherwise")

    def _read(self, folder: Path, *, whole: bool) -> list[int]:
        """The sum of each image's counts, -1 where it is faulty."""
        source = self._files([folder])
        told = source.total_frames
        sums: list[int] = []
        kinds: list[str] = []
        try:
            while not source.exhausted and (whole or len(kinds) < 300):
                for message in source.receive(0):
                    kinds.append(message.kind.value)
                    frame = message.frame
                    need((frame is not None) == (kinds[-1] == "image"), "an image without a frame")
                    if frame is None:
                        continue
                    if frame.fault is not None:
                        need(frame.fault_detail, "a fault without a reason")
                        sums.append(-1)
                        continue
                    views = self._backend.prepare([frame])
                    sums.append(int(views.total.sum()) if views.errors[0] is None else -1)
            if source.exhausted:
                need(len(sums) == told, f"{len(sums)} images; {told} were told")
                need(kinds.count("start") == kinds.count("end"), "a run without an end")
        finally:
            source.close()
        return sums


def _build(document: Any, folder: Path) -> None:
    """Write the HDF5 files that a document describes; what it asks for in vain is left out."""
    for name, steps in document.items() if isinstance(document, dict) else ():
        if re.fullmatch(r"[a-z0-9_]{1,40}\.h5", name) and isinstance(steps, list):
            hdf5_recipes.build(folder / name, steps[:60])

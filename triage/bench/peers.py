"""Spot finders that people use today, on the same frames as ours.

* peakfinder8, of CrystFEL, OM and others, from the compiled module of OM (GPL), which runs as a
  program of its own in an environment of its own and takes turns with ours frame by frame;
* DIALS, as the system's package: ``dials.find_spots`` on a file of the same frames. It reads a file
  and finds spots on many frames, so its cost per frame is taken from runs over few and many.

Ours decides whether a frame is blank; they list spots. What is compared is what each needs from a
message, or a file, to its answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs

from triage.bench import Options, floors, ours
from triage.bench.frames import Pool, PoolSpec, made_pool
from triage.bench.measure import Samples, SelfTimed, alternate, ratio
from triage.bench.record import Result
from triage.errors import EnvironmentLacksError

__all__ = ["Dials", "PeakFinder", "opened_peak_finder", "run", "why_no_peak_finder"]

_START_S = 120.0
_DIALS_FRAMES = (4, 16)
_DIALS_ROUNDS = 3


class PeakFinder:
    """peakfinder8 in its own process; made by :func:`opened_peak_finder`."""

    def __init__(self, process: subprocess.Popen[str], version: str) -> None:
        self._process = process
        self.version = version
        self.peaks: dict[tuple[int, str], int] = {}

    def seconds(self, i: int, mode: str) -> float:
        """CPU seconds for frame i; mode ``fast`` or ``full``.

        Raises:
            EnvironmentLacksError: the process ended.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise EnvironmentLacksError("bench peers: the finder has no pipes")
        try:
            stdin.write(f"{i} {mode}\n")
            stdin.flush()
            answer = json.loads(stdout.readline())
        except (OSError, ValueError) as err:
            raise EnvironmentLacksError(f"bench peers: peakfinder8 ended: {err}") from err
        self.peaks[i, mode] = answer["peaks"]
        return float(answer["cpu_s"])

    def timed(self, mode: str) -> SelfTimed:
        """For :func:`triage.bench.measure.alternate`."""
        return SelfTimed(lambda i: self.seconds(i, mode))


def why_no_peak_finder(python: Path | None) -> str:
    """Why peakfinder8 cannot be run; "" where it can."""
    if python is None:
        return (
            "no environment given; benchmarks/peers_env.sh FOLDER makes one, then "
            "--peer-python FOLDER/bin/python or TRIAGE_PEER_PYTHON"
        )
    if not python.exists():
        return f"{python}: no such interpreter; benchmarks/peers_env.sh makes one"
    return ""


@contextlib.contextmanager
def opened_peak_finder(python: Path, pool: Pool) -> Iterator[PeakFinder]:
    """Hand the decoded frames of a pool to a peakfinder8 process.

    Raises:
        EnvironmentLacksError: it does not start.
    """
    script = Path(__file__).with_name("peakfinder8.py")
    with tempfile.TemporaryDirectory(prefix="triage-bench-") as folder:
        file = Path(folder) / "frames.npz"
        np.savez(file, **_decoded(pool))
        process = subprocess.Popen(
            [str(python), str(script), str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_foreign_environment(),
        )
        try:
            first = process.stdout.readline() if process.stdout is not None else ""
            if not first:
                _, why = process.communicate()
                last = why.strip().splitlines()[-1:] or ["it said nothing"]
                raise EnvironmentLacksError(
                    f"bench peers: {python} cannot run peakfinder8: {last[0]}; "
                    "benchmarks/peers_env.sh makes an environment that can"
                )
            yield PeakFinder(process, json.loads(first)["finder"])
        finally:
            process.kill()
            process.communicate()


class Dials:
    """``dials.find_spots`` on a file of some frames of a pool."""

    def __init__(self, folder: Path, pool: Pool) -> None:
        self._folder = folder
        self._pool = pool
        self.found = 0

    @staticmethod
    def why_not() -> str:
        """Why DIALS cannot be run; "" where it can."""
        if shutil.which("dials.find_spots") is None:
            return "dials.find_spots is not on the path; apt-get install dials"
        return ""

    def prepare(self) -> None:
        """Write the frames as NXmx, once for few and once for many, and import them.

        Raises:
            EnvironmentLacksError: DIALS does not read them.
        """
        for frames in _DIALS_FRAMES:
            place = self._folder / str(frames)
            place.mkdir()
            master = written_run(place, self._pool, frames)
            self._run(place, "dials.import", str(master))

    def seconds_per_frame(self) -> float:
        """CPU seconds that each frame beyond the first few adds."""
        few, many = (self._find(frames) for frames in _DIALS_FRAMES)
        return (many - few) / (_DIALS_FRAMES[1] - _DIALS_FRAMES[0])

    def _find(self, frames: int) -> float:
        place = self._folder / str(frames)
        before = os.times()
        said = self._run(place, "dials.find_spots", "imported.expt", "nproc=1")
        after = os.times()
        saved = re.findall(r"Saved (\d+) reflections", said)
        self.found = int(saved[-1]) if saved else 0
        spent = after.children_user - before.children_user
        return spent + after.children_system - before.children_system

    def _run(self, place: Path, *command: str) -> str:
        import hdf5plugin

        environment = _foreign_environment()
        environment["HDF5_PLUGIN_PATH"] = hdf5plugin.PLUGIN_PATH
        environment["PATH"] = "/usr/bin:/bin"
        answer = subprocess.run(
            command,
            cwd=place,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if answer.returncode:
            last = answer.stdout.strip().splitlines()[-1:] or [""]
            raise EnvironmentLacksError(f"bench peers: {command[0]}: {last[0]}")
        return answer.stdout


def run(options: Options) -> Result:
    """Ours and each peer, from message or file to answer, for each size."""
    subject = ours.opened()
    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    spread: dict[str, list[float]] = {}
    absent: dict[str, str] = {}
    notes = {
        "ours": "message to verdict: parse, reduce, fast exit, policy",
        "peakfinder8": "cbor2.loads, dectris-compression, then the finder on float32 pixels",
        "dials.find_spots": "from a file of the same frames, one process; start-up left out by "
        f"runs over {_DIALS_FRAMES[0]} and {_DIALS_FRAMES[1]} frames",
        "pyFAI": "its peak finder is meant for GPUs and is not compared on a CPU",
    }
    inputs: dict[str, Any] = {}
    for size in options.sizes or ("1M", "4M"):
        options.say(f"{size}: ours and peakfinder8, then DIALS")
        pool = made_pool(PoolSpec(size=size, count=4))
        inputs[pool.spec.name] = pool.described
        samples, peaks, why = _with_peak_finder(pool, subject, options)
        if why:
            absent["peakfinder8"] = why
        dials_s, spots, why = _with_dials(pool)
        if why:
            absent["dials.find_spots"] = why
        ours_s = samples["ours"].median_s
        rows.append(_row(size, "ours", ours_s, ours_s, ""))
        for mode in ("fast", "full"):
            if mode in samples:
                name = f"peakfinder8 {mode}"
                found = ratio(samples["ours"], samples[mode])
                rows.append(_row(size, name, samples[mode].median_s, ours_s, peaks[mode]))
                key = f"decision_{size.lower()}_over_peakfinder8_{mode}".replace(".", "")
                figures[key] = found.value
                spread[key] = [found.low, found.high, found.rounds]
        if dials_s:
            rows.append(_row(size, "dials.find_spots", dials_s, ours_s, spots))
            key = f"decision_{size.lower()}_over_dials".replace(".", "")
            figures[key] = ours_s / dials_s
    return Result(
        figures=figures,
        spread=spread,
        tables={"peers": rows},
        absent=absent,
        notes=notes,
        input=inputs,
    )


def chains_to_verdict(
    pool: Pool, subject: ours.Ours, finder: PeakFinder, budget_s: float, modes: tuple[str, ...]
) -> dict[str, Samples]:
    """``ours``, and per mode cbor2 + dectris + peakfinder8, taking turns.

    Raises:
        EnvironmentLacksError: dectris-compression is not installed.
    """
    library = floors.message_to_pixels(pool)
    if library is None:
        raise EnvironmentLacksError(
            "dectris-compression is not installed; pip install 'braggtriage[bench]'"
        )
    samples = alternate(
        {
            "ours": ours.decide(pool, subject),
            "library": library,
            **{mode: finder.timed(mode) for mode in modes},
        },
        len(pool.frames),
        budget_s=budget_s,
        clock=time.process_time,
    )
    before = samples["library"]
    return {"ours": samples["ours"], **{mode: before + samples[mode] for mode in modes}}


def written_run(folder: Path, pool: Pool, frames: int) -> Path:
    """A pool's frames, in turn, as one recorded run; its master file."""
    from triage.sinks.nxmx import KeptWriter

    writer = KeptWriter(folder)
    first = pool.frames[0].series
    writer.start(first)
    for i in range(frames):
        writer.write(structs.replace(pool.frames[i % len(pool.frames)], image_id=i), None)
    master: Path = writer.close()[0]
    return master


def _with_peak_finder(
    pool: Pool, subject: ours.Ours, options: Options
) -> tuple[dict[str, Samples], dict[str, str], str]:
    """Samples, what was found by mode, and why there is no finder."""
    why = why_no_peak_finder(options.peer_python)
    if not why and options.peer_python is not None:
        try:
            with opened_peak_finder(options.peer_python, pool) as finder:
                modes = ("fast", "full")
                samples = chains_to_verdict(pool, subject, finder, 3 * options.seconds, modes)
                return samples, {mode: _peaks(finder, pool, mode) for mode in modes}, ""
        except EnvironmentLacksError as err:
            why = str(err)
    alone = alternate(
        {"ours": ours.decide(pool, subject)},
        len(pool.frames),
        budget_s=options.seconds,
        clock=time.process_time,
    )
    return alone, {}, why


def _with_dials(pool: Pool) -> tuple[float, str, str]:
    """CPU seconds per frame, what was found, and why there is no figure."""
    why = Dials.why_not()
    if not why:
        with tempfile.TemporaryDirectory(prefix="triage-bench-") as folder:
            dials = Dials(Path(folder), pool)
            try:
                dials.prepare()
                seconds = [dials.seconds_per_frame() for _ in range(_DIALS_ROUNDS)]
                found = f"{dials.found} spots on {_DIALS_FRAMES[1]} frames"
                return float(np.median(seconds)), found, ""
            except EnvironmentLacksError as err:
                why = str(err)
    return 0.0, "", why


def _peaks(finder: PeakFinder, pool: Pool, mode: str) -> str:
    by_kind: dict[str, list[int]] = {"hit": [], "blank": []}
    for (i, of_mode), found in finder.peaks.items():
        if of_mode == mode:
            by_kind["blank" if i % pool.spec.hit_every else "hit"].append(found)
    return ", ".join(f"{np.mean(n):.0f} peaks on a {kind}" for kind, n in by_kind.items() if n)


def _row(size: str, who: str, seconds: float, ours_s: float, found: str) -> dict[str, Any]:
    return {
        "size": size,
        "who": who,
        "ms": seconds * 1e3,
        "times_ours": seconds / ours_s,
        "found": found,
    }


def _decoded(pool: Pool) -> dict[str, Any]:
    """What ``peakfinder8.py`` reads."""
    from triage.backends.cpu import CpuBackend
    from triage.records import Recipe

    backend = CpuBackend(Recipe())
    frames = np.stack([backend.decode(frame).astype(np.float32) for frame in pool.frames])
    series = pool.frames[0].series
    mask = np.ones(pool.shape, np.int8)
    if series.pixel_mask is not None:
        mask[series.pixel_mask != 0] = 0
    centre = (0.5 * pool.shape[1], 0.5 * pool.shape[0])
    if series.geometry is not None:
        centre = (series.geometry.beam_center_x_px, series.geometry.beam_center_y_px)
    return {"frames": frames, "mask": mask, "centre": np.array(centre)}


def _foreign_environment() -> dict[str, str]:
    """Ours must not leak into another Python."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))}
    return {**kept, "OMP_NUM_THREADS": "1"}

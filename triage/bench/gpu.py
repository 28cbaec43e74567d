"""One device: from compressed bytes in host memory to cells and to decisions, by several designs.

The designs differ in where a frame is decoded and what crosses the bus:

* ``fused``: compressed bytes cross; blocks are reduced where they are decoded (the backend).
* ``apart``: compressed bytes cross; frames are decoded to the device's memory, then reduced.
* ``nvcomp``: the same with nvCOMP's LZ4, our kernels behind it.
* ``nvcomp_bits``: the same, with bits put together by nvCOMP as well.
* ``cpu``: frames are reduced on the host, by as many threads as may run; views cross.

Each must give the CPU's numbers bit for bit before it is timed. Times are by the wall clock, the
designs taking turns, and end when the host holds what it asked for.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from triage.backends import Backend, cuda
from triage.backends.cpu import CpuBackend
from triage.backends.cuda import CudaBackend
from triage.bench import Options
from triage.bench.frames import Pool, PoolSpec, made_pool
from triage.bench.measure import Call, Samples, alternate
from triage.bench.nvcomp import ByNvcomp, installed
from triage.bench.record import Result
from triage.errors import DeviceError, EnvironmentLacksError
from triage.nets.device_scorer import scorer_for, unavailable
from triage.nets.model import load_model
from triage.nets.scorer import Scorer
from triage.policy import Policy
from triage.records import Frame, Recipe, Views

__all__ = ["run"]

_COUNT = 8
"""Distinct frames, sent again and again."""
_SETS = (
    PoolSpec(size="4M", level="typ", count=_COUNT),
    PoolSpec(size="4M", level="weak", count=_COUNT),
    PoolSpec(size="4M", level="strong", count=_COUNT),
    PoolSpec(size="4M", bits=32, level="typ", count=_COUNT),
    PoolSpec(size="4M", bits=8, level="typ", count=_COUNT),
    PoolSpec(size="16M", level="typ", count=4),
)
_BATCHES = {"4M": (1, 4, 16, 64), "16M": (1, 4, 16)}
"""Frames in a batch; the designs are compared at the one before the last."""
_OTHER_BATCHES = (1, 4, 16)
_WORKERS = (1, 2)
_LATENCY_HZ = 2000.0
_LATENCY_BATCH = 16
_MOST_HOST_THREADS = 8
"""Host threads of the design ``cpu``: as many cores as a device may have beside it."""
_ARRAYS = ("maximum", "total", "count", "bin_factor", "overview", "radial", "has_geometry")


class _Reducer(Protocol):
    """One design: some frames to views."""

    def prepare(self, frames: Sequence[Frame]) -> Views: ...


@dataclass(slots=True, eq=False)
class _Findings:
    figures: dict[str, float] = field(default_factory=dict)
    spread: dict[str, Sequence[float]] = field(default_factory=dict)
    tables: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    input: dict[str, Any] = field(default_factory=dict)

    def rate(self, name: str, samples: Samples, frames: int) -> float:
        """Keep the frames per second of calls that do ``frames`` frames each."""
        low, high = samples.quartiles_s
        self.figures[name] = frames / samples.median_s
        self.spread[name] = [frames / high, frames / low, samples.rounds]
        return self.figures[name]


class _Apart(CudaBackend):
    """The CUDA backend without the fused kernel."""

    def _is_fused(self, frame: Frame, payload: Any) -> bool:
        return False


class _Observed(CudaBackend):
    """The CUDA backend, and what can be seen of it from outside."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._events: list[tuple[Any, Any]] = []

    def _reduce_piece(self, *arguments: Any) -> None:
        stream = self._cupy.cuda.get_current_stream()
        began = stream.record()
        super()._reduce_piece(*arguments)
        self._events.append((began, stream.record()))

    def kernel_s(self) -> float:
        """Seconds that the kernels of what was prepared and read took; then forgotten."""
        elapsed = self._cupy.cuda.get_elapsed_time
        spent = sum(elapsed(began, ended) for began, ended in self._events)
        self._events.clear()
        return float(spent) * 1e-3

    def describe(self) -> dict[str, Any]:
        """The device: name, memory, processors, shared memory and driver."""
        runtime = self._cupy.cuda.runtime
        found = runtime.getDeviceProperties(self._cupy.cuda.Device().id)
        return {
            "name": found["name"].decode(),
            "memory_bytes": int(found["totalGlobalMem"]),
            "processors": int(found["multiProcessorCount"]),
            "shared_bytes_per_block": self._shared_bytes,
            "driver": int(runtime.driverGetVersion()),
        }

    def bus(self, size_bytes: int) -> tuple[NDArray[np.uint8], Callable[[], object]]:
        """Pinned memory, and a call that copies it to the device and waits."""
        slot = self._slots[0]
        with self._guarded("opening the bus"):
            pinned = slot.host(size_bytes)

        def send() -> None:
            with self._guarded("sending"):
                slot.send(size_bytes)
                slot.host(size_bytes)

        return pinned, send

    def send(self, *arrays: NDArray[Any]) -> None:
        """Copy arrays to the device and wait."""
        with self._guarded("sending"):
            for array in arrays:
                self._cupy.asarray(array)
            self._stream.synchronize()


class _OnHost:
    """The design ``cpu``: each frame by one of several threads, its views sent."""

    def __init__(self, device: _Observed, threads: int) -> None:
        self._device = device
        self._pool = ThreadPoolExecutor(threads)
        self._own = threading.local()

    def prepare(self, frames: Sequence[Frame]) -> Views:
        views = list(self._pool.map(self._prepare, frames))
        joined: dict[str, Any] = {
            name: np.concatenate([getattr(each, name) for each in views]) for name in _ARRAYS
        }
        self._device.send(joined["overview"], joined["radial"])
        return Views(**joined, errors=tuple(e for each in views for e in each.errors))

    def _prepare(self, frame: Frame) -> Views:
        if not hasattr(self._own, "backend"):
            self._own.backend = CpuBackend(self._device.recipe)
        backend: CpuBackend = self._own.backend
        return backend.prepare([frame])


def run(options: Options) -> Result:
    """Measure on the current device.

    Raises:
        EnvironmentLacksError: there is none.
        DeviceError: the backend does not give the CPU's numbers.
    """
    why_not = cuda.unavailable()
    if why_not is not None:
        raise EnvironmentLacksError(
            f"bench gpu: {why_not}; expected a machine with an NVIDIA GPU and the extra 'gpu'"
        )
    return measured(options)


def measured(options: Options) -> Result:
    """The same without asking whether there is a device."""
    model = load_model()
    recipe = model.card.recipe
    sizes = options.sizes or tuple(dict.fromkeys(spec.size for spec in _SETS))
    known = {spec.size for spec in _SETS}
    specs = [spec for spec in _SETS if spec.size in sizes]
    specs += [PoolSpec(size=size, count=_COUNT) for size in sizes if size not in known]
    findings = _Findings()
    backend = _Observed(recipe)
    findings.input["device"] = backend.describe()
    _floors(findings, backend, options.seconds)
    for spec in specs:
        pool = made_pool(spec)
        findings.input[spec.name] = pool.described
        with _designs(recipe, pool, findings) as designs:
            _compare(findings, pool, designs, options.seconds)
        _batches(findings, pool, recipe, options.seconds)
        _decoding(findings, pool, backend, options.seconds)
        scorers = [scorer_for(model, "auto", on_device=True) for _ in _WORKERS]
        for scorer in scorers:
            scorer.warm_up()
        policy = Policy(p_blank_veto=model.card.thresholds["p_blank_veto"], audit_fraction=0.0)
        _decisions(findings, pool, recipe, scorers, policy, options.seconds)
    return Result(
        figures=findings.figures,
        spread=findings.spread,
        tables=findings.tables,
        absent=findings.absent,
        notes=findings.notes,
        input=findings.input,
    )


def _label(spec: PoolSpec) -> str:
    level = "" if spec.level == "typ" else f"_{spec.level}"
    return f"{spec.size.lower()}_u{spec.bits}{level}".replace(".", "_")


def _some(pool: Pool, n: int) -> list[Frame]:
    """``n`` frames, the pool's again and again."""
    return [pool.frames[i % len(pool.frames)] for i in range(n)]


def _sizes_of_batches(pool: Pool) -> tuple[int, ...]:
    return _BATCHES.get(pool.spec.size, _OTHER_BATCHES)


def _timed(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Samples]:
    """Wall seconds of each call, in turns."""
    return alternate(
        {name: _ignoring_frame(call) for name, call in calls.items()},
        1,
        budget_s=seconds,
        clock=time.perf_counter,
    )


def _ignoring_frame(call: Callable[[], object]) -> Call:
    return lambda _: call()


def _floors(findings: _Findings, backend: _Observed, seconds: float) -> None:
    """What the way cannot do without: a copy to pinned memory, and the bus."""
    size = 64 << 20
    source = np.ones(size, np.uint8)
    pinned, send = backend.bus(size)
    samples = _timed({"copy": lambda: np.copyto(pinned, source), "bus": send}, seconds)
    findings.figures["floor_copy_gb_per_s"] = size / samples["copy"].median_s * 1e-9
    findings.figures["floor_bus_gb_per_s"] = size / samples["bus"].median_s * 1e-9


@contextmanager
def _designs(recipe: Recipe, pool: Pool, findings: _Findings) -> Iterator[dict[str, _Reducer]]:
    """The designs that run here and give the CPU's numbers."""
    threads = min(_MOST_HOST_THREADS, os.cpu_count() or 1)
    host = _OnHost(_Observed(recipe), threads)
    findings.notes["design cpu"] = f"{threads} host threads"
    designs: dict[str, _Reducer] = {
        "fused": CudaBackend(recipe),
        "apart": _Apart(recipe),
        "cpu": host,
    }
    try:
        library = installed()
    except EnvironmentLacksError as err:
        findings.absent["nvcomp"] = str(err)
    else:
        designs["nvcomp"] = ByNvcomp(recipe, library, unshuffles=False)
        if library.unshuffles and ByNvcomp.can_unshuffle(pool.frames):
            designs["nvcomp_bits"] = ByNvcomp(recipe, library, unshuffles=True)
    wanted = CpuBackend(recipe).prepare(pool.frames)
    right: dict[str, _Reducer] = {}
    for name, design in designs.items():
        try:
            wrong = _differing(design.prepare(pool.frames), wanted)
        except (EnvironmentLacksError, DeviceError) as err:
            if name == "fused":
                raise
            findings.absent[f"{name}, {pool.spec.name}"] = str(err)
            continue
        if not wrong:
            right[name] = design
        elif name == "fused":
            raise DeviceError(
                f"bench gpu, {pool.spec.name}: {', '.join(wrong)} of the device are not the CPU's; "
                "expected the same bits; nothing it gives is to be used: report this device"
            )
        else:
            findings.absent[f"{name}, {pool.spec.name}"] = (
                f"its {', '.join(wrong)} are not the CPU's"
            )
    yield right
    host._pool.shutdown()


def _differing(views: Views, wanted: Views) -> list[str]:
    """Names of what is not the same, bit for bit."""
    names = [n for n in _ARRAYS if getattr(views, n).tobytes() != getattr(wanted, n).tobytes()]
    return names + ["errors"] * (any(views.errors) or any(wanted.errors))


def _reduced(design: _Reducer, frames: Sequence[Frame]) -> None:
    """From payloads to views, waited for: errors come with the last kernel."""
    errors = [error for error in design.prepare(frames).errors if error is not None]
    if errors:
        raise errors[0]


def _compare(
    findings: _Findings, pool: Pool, designs: Mapping[str, _Reducer], seconds: float
) -> None:
    """Frames per second to views, of each design on the same batch."""
    label, batch = _label(pool.spec), _sizes_of_batches(pool)[-2]
    frames = _some(pool, batch)
    calls = {name: partial(_reduced, design, frames) for name, design in designs.items()}
    rows: list[Mapping[str, Any]] = []
    samples = _timed(calls, seconds)
    for name, each in samples.items():
        rate = findings.rate(f"reduced_{label}_{name}_per_s", each, batch)
        rows.append({"design": name, "frames/s": rate, "over fused": rate_over(each, samples)})
    findings.tables[f"{pool.spec.name}: designs, batches of {batch}"] = rows


def rate_over(samples: Samples, all_samples: Mapping[str, Samples]) -> float:
    """How many times the fused design's rate."""
    return all_samples["fused"].median_s / samples.median_s


def _batches(findings: _Findings, pool: Pool, recipe: Recipe, seconds: float) -> None:
    """The fused design by batch size, by one worker and by two; and the kernel alone."""
    label = _label(pool.spec)
    workers = [CudaBackend(recipe) for _ in range(max(_WORKERS))]
    observed = _Observed(recipe)
    rows: list[Mapping[str, Any]] = []
    with ThreadPoolExecutor(len(workers)) as threads:
        for batch in _sizes_of_batches(pool):
            frames = _some(pool, batch)
            calls: dict[str, Callable[[], object]] = {}
            for n in _WORKERS:
                calls[f"{n}"] = _together(threads, workers[:n], partial(_reduced, frames=frames))
            samples = _timed(calls, seconds / len(_sizes_of_batches(pool)))
            row: dict[str, Any] = {"batch": batch}
            for n in _WORKERS:
                name = f"reduced_{label}_batch{batch}_workers{n}_per_s"
                row[f"frames/s, workers {n}"] = findings.rate(name, samples[f"{n}"], n * batch)
            row["ms a batch"] = samples["1"].median_s * 1e3
            spent = []
            for _ in range(5):
                _reduced(observed, frames)
                spent.append(observed.kernel_s() / batch)
            row["kernel us a frame"] = float(np.median(spent)) * 1e6
            findings.figures[f"kernel_{label}_batch{batch}_us"] = row["kernel us a frame"]
            rows.append(row)
    findings.tables[f"{pool.spec.name}: fused, to views"] = rows


def _together(
    threads: ThreadPoolExecutor, workers: Sequence[Any], work: Callable[[Any], object]
) -> Callable[[], object]:
    """A call that has every worker do its work at the same time."""
    return lambda: list(threads.map(work, workers))


def _decoding(findings: _Findings, pool: Pool, backend: CudaBackend, seconds: float) -> None:
    """Decoding to the host's memory and reducing, device over one core, bytes compared first."""
    label, host = _label(pool.spec), CpuBackend(backend.recipe)
    for frame in pool.frames[:2]:
        if backend.decode(frame).tobytes() != host.decode(frame).tobytes():
            raise DeviceError(
                f"bench gpu, {pool.spec.name}: pixels of the device are not the CPU's; expected "
                "the same bytes; nothing it gives is to be used: report this device"
            )
    frame = pool.frames[0]
    both: dict[str, Backend] = {"device": backend, "cpu": host}
    samples = _timed({n: partial(b.decode, frame) for n, b in both.items()}, seconds)
    findings.figures[f"decode_{label}_over_cpu"] = (
        samples["device"].median_s / samples["cpu"].median_s
    )
    frames = _some(pool, _sizes_of_batches(pool)[-2])
    samples = _timed({n: partial(_reduced, b, frames) for n, b in both.items()}, seconds)
    findings.figures[f"reduce_{label}_over_cpu"] = (
        samples["device"].median_s / samples["cpu"].median_s
    )


def _decisions(
    findings: _Findings,
    pool: Pool,
    recipe: Recipe,
    scorers: Sequence[Scorer],
    policy: Policy,
    seconds: float,
) -> None:
    """From payloads to verdicts of the fast exit, and how late they are at a given rate."""
    label = _label(pool.spec)
    if unavailable() is not None:
        findings.absent["scores on the device"] = str(unavailable())
    findings.notes["scores"] = scorers[0].runtime
    workers = [(CudaBackend(recipe), scorer) for scorer in scorers]

    def decided(worker: tuple[CudaBackend, Scorer], frames: Sequence[Frame]) -> None:
        backend, scorer = worker
        scores = scorer.fast(backend.prepare(frames))
        for frame, score in zip(frames, scores, strict=True):
            if not math.isfinite(score.p_blank):
                raise DeviceError(f"bench gpu: image {frame.image_id} got no score")
            policy.judge(frame, score)

    rows: list[Mapping[str, Any]] = []
    with ThreadPoolExecutor(len(workers)) as threads:
        for batch in _sizes_of_batches(pool):
            frames = _some(pool, batch)
            calls = {
                f"{n}": _together(threads, workers[:n], partial(decided, frames=frames))
                for n in _WORKERS
            }
            samples = _timed(calls, seconds / len(_sizes_of_batches(pool)))
            row: dict[str, Any] = {"batch": batch}
            for n in _WORKERS:
                name = f"decided_{label}_batch{batch}_workers{n}_per_s"
                row[f"frames/s, workers {n}"] = findings.rate(name, samples[f"{n}"], n * batch)
            rows.append(row)
    findings.tables[f"{pool.spec.name}: fused, to decisions"] = rows
    if pool.spec.bits == 16 and pool.spec.level == "typ":
        latencies = _latencies(
            lambda frames: decided(workers[0], frames), pool.frames, _LATENCY_HZ, seconds
        )
        for share in (50, 99):
            name = f"latency_{label}_{_LATENCY_HZ:.0f}hz_p{share}_ms"
            findings.figures[name] = float(np.percentile(latencies, share)) * 1e3


def _latencies(
    decide: Callable[[Sequence[Frame]], None],
    frames: Sequence[Frame],
    hz: float,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Seconds from the arrival of each frame to its verdict, frames arriving at ``hz``.

    Frames arrive whether or not the last ones are done; what waits goes into the next batch.
    """
    total = max(1, round(hz * seconds))
    waiting: deque[int] = deque()
    latencies: list[float] = []
    began, arrived = clock(), 0
    while len(latencies) < total:
        due = min(total, int((clock() - began) * hz) + 1)
        waiting.extend(range(arrived, due))
        arrived = due
        if not waiting:
            continue
        batch = [waiting.popleft() for _ in range(min(_LATENCY_BATCH, len(waiting)))]
        decide([frames[i % len(frames)] for i in batch])
        done = clock() - began
        latencies += [done - i / hz for i in batch]
    return latencies

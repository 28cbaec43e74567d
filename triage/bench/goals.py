"""The ratios that this program is held to, measured in one run of a few minutes.

Every ratio is of medians over rounds in which both sides took turns on the same frames. What is
not installed is absent and named. The integers that ``reduce`` gives are the shipped recipe's:
masked maximum, exact sum and valid count of every cell.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from triage.bench import Options, floors, ours, peers
from triage.bench.chain import PLAIN_SETTINGS
from triage.bench.frames import Pool, PoolSpec, made_pool
from triage.bench.measure import Call, Ratio, Samples, alternate, ratio
from triage.bench.messages import climbed, kept_up
from triage.bench.record import Result
from triage.errors import EnvironmentLacksError, TriageError
from triage.machine import machine

__all__ = ["GOALS", "Goal", "run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A figure, what it means, and what it is held to; a rate is held from below."""

    meaning: str
    must: float
    stretch: float
    at_least: bool = False

    def is_met(self, value: float) -> bool:
        """Whether the figure is as good as it must be."""
        return value >= self.must if self.at_least else value <= self.must


_REDUCE = "fused maximum, sum and count over dectris-compression's decoding alone"

GOALS = {
    "reduce_4m_u16_over_dectris": Goal(meaning=f"{_REDUCE}, 4M", must=0.75, stretch=0.5),
    "reduce_16m_u16_over_dectris": Goal(meaning=f"{_REDUCE}, 16M", must=0.75, stretch=0.5),
    "reduce_4m_u16_weak_over_dectris": Goal(meaning=f"{_REDUCE}, weak", must=0.9, stretch=0.65),
    "reduce_4m_u16_strong_over_dectris": Goal(meaning=f"{_REDUCE}, strong", must=0.9, stretch=0.65),
    "reduce_4m_u32_over_dectris": Goal(meaning=f"{_REDUCE}, 32 bit", must=0.6, stretch=0.4),
    "reduce_numba_4m_over_dectris_numba_bin": Goal(
        meaning="the same without a compiler, over dectris-compression and a pass in numba",
        must=0.64,
        stretch=0.5,
    ),
    "parse_4m_over_cbor2": Goal(
        meaning="message to frame over cbor2.loads, 4M", must=0.05, stretch=0.02
    ),
    "net_over_torch_eager": Goal(
        meaning="the deployed network over the same in torch, eager, float32",
        must=0.33,
        stretch=0.2,
    ),
    "decision_4m_over_dectris": Goal(
        meaning="message to verdict over cbor2 and dectris-compression alone, 4M",
        must=1.1,
        stretch=0.8,
    ),
    "decision_16m_over_dectris": Goal(
        meaning="message to verdict over cbor2 and dectris-compression alone, 16M",
        must=0.75,
        stretch=0.5,
    ),
    "decision_4m_over_peakfinder8": Goal(
        meaning="message to verdict over cbor2, dectris-compression and peakfinder8 (fast)",
        must=0.1,
        stretch=0.05,
    ),
    "two_workers_inflation": Goal(
        meaning="CPU per frame, two workers at a time over one", must=1.15, stretch=1.05
    ),
    "replay_4m_efficiency": Goal(
        meaning="replay's frames/s times the stages' CPU per frame, over cores",
        must=0.8,
        stretch=0.9,
        at_least=True,
    ),
    "small_frames_per_s": Goal(
        meaning="0.1M frames: 2 / CPU seconds of the triage process per message",
        must=2500.0,
        stretch=5000.0,
        at_least=True,
    ),
}
"""By figure."""

_MIX = 10
"""One frame in ten has spots: 90 % blanks."""

_REPLAYED_FRAMES = (200, 1200)
_REPLAYS = 3
_CORES = 2


@dataclass(slots=True)
class _Findings:
    """What the parts of a run have found so far."""

    seconds: float
    ratios: dict[str, Ratio] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    beside: list[dict[str, Any]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)

    def pool(self, spec: PoolSpec) -> Pool:
        pool = made_pool(spec)
        kind = f"{spec.name}, 1 hit in {spec.hit_every}"
        self.inputs[kind] = pool.described
        return pool

    def add(self, name: str, found: Ratio) -> None:
        if name in GOALS:
            self.ratios[name] = found
        self.tell(name, found.value, [found.low, found.high])

    def tell(self, name: str, value: float, quartiles: list[float] | None = None) -> None:
        """A figure that stands beside the goals."""
        self.beside.append({"figure": name, "value": value, "quartiles": quartiles})

    def turns(
        self,
        what: str,
        candidates: Mapping[str, Call],
        share: float = 1.0,
        *,
        frames: int,
        clock: Callable[[], float] = time.thread_time,
    ) -> dict[str, Samples]:
        """Few candidates taking turns: what else runs between them empties their caches."""
        samples = alternate(candidates, frames, budget_s=share * self.seconds, clock=clock)
        self.tell_ms(what, samples)
        return samples

    def tell_ms(self, what: str, samples: Mapping[str, Samples]) -> None:
        for name, each in samples.items():
            low, high = each.quartiles_s
            self.tell(f"{what}: {name}, ms", each.median_s * 1e3, [low * 1e3, high * 1e3])


def run(options: Options) -> Result:
    """Measure every goal."""
    findings = _Findings(seconds=options.seconds)
    subject = ours.opened()
    parts: dict[str, Callable[[], None]] = {
        "reduce": lambda: _reduce(findings, subject),
        "parse": lambda: _parse(findings),
        "network": lambda: _network(findings, subject),
        "decision": lambda: _decision(findings, subject),
        "peakfinder8": lambda: _peak_finder(findings, subject, options.peer_python),
        "two workers": lambda: _two_workers(findings),
        "replay": lambda: _replay(findings, subject),
        "small frames": lambda: _small_frames(findings),
    }
    _fresh_memory(findings, subject)
    with floors.warm_memory() as is_warm:
        for number, (name, part) in enumerate(parts.items(), 1):
            options.say(f"{number} of {len(parts)}: {name}")
            part()
    findings.notes["memory"] = (
        "large buffers come from memory that was used before, for both sides; with the C "
        "library's defaults a fresh output of 32 MiB and more is new pages on every call, which "
        "is the figure with fresh memory beside the goals"
        if is_warm
        else "as the C library gives it: outputs of 32 MiB and more are new pages on every call"
    )
    figures = {name: each.value for name, each in findings.ratios.items()} | findings.values
    return Result(
        figures={name: figures[name] for name in GOALS if name in figures},
        spread={name: [each.low, each.high, each.rounds] for name, each in findings.ratios.items()},
        tables={
            "goals": [_row(name, figures.get(name)) for name in GOALS],
            "beside the goals": findings.beside,
        },
        absent=findings.absent,
        notes={
            "kernels": ours.kernels(subject.recipe).kernels,
            "network": subject.scorer.runtime,
            **findings.notes,
        },
        input=findings.inputs,
    )


def _row(name: str, value: float | None) -> dict[str, Any]:
    goal = GOALS[name]
    met = "absent" if value is None else "yes" if goal.is_met(value) else "no"
    return {
        "figure": name,
        "value": value,
        "must": goal.must,
        "stretch": goal.stretch,
        "met": met,
        "meaning": goal.meaning,
    }


def _reduce(findings: _Findings, subject: ours.Ours) -> None:
    """Integers alone against decoding alone, and numba against decoding with a pass in numba."""
    best, plain = ours.kernels(subject.recipe), ours.kernels(subject.recipe, "numba")
    for name, spec in (
        ("4m_u16", PoolSpec(size="4M", count=4)),
        ("16m_u16", PoolSpec(size="16M", count=2)),
        ("4m_u16_weak", PoolSpec(size="4M", level="weak", count=4)),
        ("4m_u16_strong", PoolSpec(size="4M", level="strong", count=4)),
        ("4m_u32", PoolSpec(size="4M", bits=32, count=4)),
    ):
        pool = findings.pool(spec)
        k = subject.recipe.bin_factor(pool.shape)
        lz4, lz4_by = floors.lz4_alone(pool)
        findings.notes["lz4 alone"] = lz4_by
        reduce, in_numba = (ours.reduce_integers(pool, each) for each in (best, plain))
        n = len(pool.frames)
        pair = {"reduce": reduce, "LZ4 alone": lz4}
        found = findings.turns(spec.name, pair, 0.5, frames=n)
        findings.add(f"reduce_{name}_over_lz4", ratio(found["reduce"], found["LZ4 alone"]))
        decode, with_pass = floors.dectris_decode(pool), floors.dectris_numba_bin(pool, k)
        if decode is None or with_pass is None:
            findings.absent["dectris-compression"] = (
                "not installed; pip install 'braggtriage[bench]' builds it with a C compiler"
            )
            continue
        pair = {"reduce": reduce, "dectris": decode}
        found = findings.turns(spec.name, pair, frames=n)
        findings.add(f"reduce_{name}_over_dectris", ratio(found["reduce"], found["dectris"]))
        pair = {"reduce, numba": in_numba, "dectris": decode}
        found = findings.turns(spec.name, pair, 0.5, frames=n)
        findings.add(
            f"reduce_numba_{name}_over_dectris", ratio(found["reduce, numba"], found["dectris"])
        )
        pair = {"reduce, numba": in_numba, "dectris + numba bin": with_pass}
        found = findings.turns(spec.name, pair, frames=n)
        findings.add(
            f"reduce_numba_{name.removesuffix('_u16')}_over_dectris_numba_bin",
            ratio(found["reduce, numba"], found["dectris + numba bin"]),
        )


def _fresh_memory(findings: _Findings, subject: ours.Ours) -> None:
    """The 16M ratio as a plain process has it, where most of decoding is page faults."""
    pool = findings.pool(PoolSpec(size="16M", count=2))
    decode = floors.dectris_decode(pool)
    if decode is None:
        return
    pair = {
        "reduce": ours.reduce_integers(pool, ours.kernels(subject.recipe)),
        "dectris, fresh memory": decode,
    }
    found = findings.turns("16M u16 typ", pair, 0.5, frames=len(pool.frames))
    findings.add(
        "reduce_16m_u16_over_dectris_in_fresh_memory",
        ratio(found["reduce"], found["dectris, fresh memory"]),
    )


def _parse(findings: _Findings) -> None:
    for size in ("1M", "4M", "16M"):
        pool = findings.pool(PoolSpec(size=size, count=2 if size == "16M" else 4))
        pair = {"parse": ours.parse(pool), "cbor2": floors.cbor_library(pool)}
        samples = findings.turns(size, pair, 0.5, frames=len(pool.frames))
        findings.add(f"parse_{size.lower()}_over_cbor2", ratio(samples["parse"], samples["cbor2"]))


def _network(findings: _Findings, subject: ours.Ours) -> None:
    """Both exits as a run of 90 % blanks needs them: the full one for what is kept."""
    pool = findings.pool(PoolSpec(size="4M", hit_every=_MIX, count=_MIX))
    views = ours.prepared(subject.recipe, pool.frames)
    both: dict[str, Call] = {}
    fast_only: dict[str, Call] = {}
    for name, runtime in (("deployed", "auto"), ("torch", "torch")):
        scorer = ours.opened(runtime).scorer
        tiles = [
            subject.backend.close_ups([frame], v, [0])
            for frame, v in zip(pool.frames, views, strict=True)
        ]
        wanted = [
            ours.wants_full_exit(subject, frame, scorer.fast(v)[0])
            for frame, v in zip(pool.frames, views, strict=True)
        ]

        def scored(i: int, scorer: Any = scorer, tiles: Any = tiles, wanted: Any = wanted) -> Any:
            scores = scorer.fast(views[i])
            return scorer.full(views[i], tiles[i], [0], scores) if wanted[i] else scores

        def fast(i: int, scorer: Any = scorer) -> Any:
            return scorer.fast(views[i])

        both[name], fast_only[name] = scored, fast
        findings.notes["full exits"] = (
            f"{sum(wanted)} of {len(wanted)} frames of the mix, with p_blank_veto "
            f"{ours.VETO_FROM}: those that are kept, and those below the card's p_blank_sure of "
            f"{subject.model.card.p_blank_sure:.4f}"
        )
    process = time.process_time
    samples = findings.turns("network, 4M mix", both, frames=_MIX, clock=process)
    findings.add("net_over_torch_eager", ratio(samples["deployed"], samples["torch"]))
    samples = findings.turns("network, 4M mix, fast exit", fast_only, frames=_MIX, clock=process)
    findings.add("net_fast_exit_over_torch_eager", ratio(samples["deployed"], samples["torch"]))


def _decision(findings: _Findings, subject: ours.Ours) -> None:
    for size in ("4M", "16M"):
        pool = findings.pool(PoolSpec(size=size, hit_every=_MIX, count=_MIX))
        library = floors.message_to_pixels(pool)
        if library is None:
            return
        for way, call in (
            ("decision", ours.decide(pool, subject)),
            ("decision by fast exit", ours.decide_by_fast_exit(pool, subject)),
        ):
            samples = findings.turns(
                f"{size} mix",
                {way: call, "cbor2 + dectris": library},
                1.5,
                frames=_MIX,
                clock=time.process_time,
            )
            name = way.replace("decision", f"decision_{size.lower()}").replace(" ", "_")
            found = ratio(samples[way], samples["cbor2 + dectris"])
            findings.add(f"{name}_over_dectris", found)


def _peak_finder(findings: _Findings, subject: ours.Ours, python: Path | None) -> None:
    why = peers.why_no_peak_finder(python)
    if not why and python is not None:
        pool = findings.pool(PoolSpec(size="4M", hit_every=_MIX, count=_MIX))
        try:
            with peers.opened_peak_finder(python, pool) as finder:
                samples = peers.chains_to_verdict(
                    pool, subject, finder, 2 * findings.seconds, ("fast",)
                )
                findings.notes["peakfinder8"] = finder.version
        except EnvironmentLacksError as err:
            why = str(err)
        else:
            findings.tell_ms("4M mix, cbor2 + dectris + peakfinder8", samples)
            findings.add("decision_4m_over_peakfinder8", ratio(samples["ours"], samples["fast"]))
    if why:
        findings.absent["peakfinder8"] = why


def _two_workers(findings: _Findings) -> None:
    """CPU per frame of a thread that decides alone, and beside another one that does the same."""
    pool = findings.pool(PoolSpec(size="4M", hit_every=_MIX, count=_MIX))
    workers = [ours.decide(pool, ours.opened()) for _ in range(_CORES)]
    for worker in workers:
        for i in range(len(pool.frames)):
            worker(i)
    frames = len(pool.frames)
    ratios: list[float] = []
    until_s = time.monotonic() + 2 * findings.seconds
    while len(ratios) < 6 or time.monotonic() < until_s:
        # Who goes first changes, because the machine may be slowing down or speeding up.
        sides = [workers[:1], workers]
        if len(ratios) % 2:
            sides.reverse()
        spent = {len(side): float(np.mean(_at_once(side, frames))) for side in sides}
        ratios.append(spent[_CORES] / spent[1])
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    findings.add(
        "two_workers_inflation",
        Ratio(value=float(middle), low=float(low), high=float(high), rounds=len(ratios)),
    )


def _at_once(workers: list[Call], frames: int) -> list[float]:
    """CPU seconds per frame of each worker, all of them at work on all frames at a time."""
    begin = threading.Barrier(len(workers))
    spent: list[float] = []

    def work(worker: Call) -> None:
        begin.wait()
        began = time.thread_time()
        for i in range(frames):
            worker(i)
        spent.append((time.thread_time() - began) / frames)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return spent


def _replay(findings: _Findings, subject: ours.Ours) -> None:
    """``triage replay`` of 90 % blanks, against its stages timed alone on the same frames.

    The stages are timed before and after each replay, because the machine drifts.
    """
    pool = findings.pool(PoolSpec(size="4M", hit_every=_MIX, count=_MIX))
    few, many = _REPLAYED_FRAMES
    cores = min(_CORES, machine()["cores"])
    with tempfile.TemporaryDirectory(prefix="triage-bench-") as folder:
        masters = {}
        for frames in _REPLAYED_FRAMES:
            place = Path(folder) / str(frames)
            place.mkdir()
            masters[frames] = peers.written_run(place, pool, frames)
        out = Path(folder) / "out"
        # Once before, so that files are in memory and kernels are compiled.
        short_s = min(_replayed(masters[few], out)["cpu_s"] for _ in range(3))
        _replayed(masters[many], out)
        decide = ours.decide_frames(ours.recorded_frames(masters[many], _MIX), subject)
        stages = [_replay_stages_s(findings, masters[few], decide)]
        runs = []
        for _ in range(_REPLAYS):
            runs.append(_replayed(masters[many], out))
            stages.append(_replay_stages_s(findings, masters[few], decide))
    rates_hz = [many / run["elapsed_s"] for run in runs]
    beside_s = [0.5 * (stages[i] + stages[i + 1]) for i in range(_REPLAYS)]
    found = [hz * seconds / cores for hz, seconds in zip(rates_hz, beside_s, strict=True)]
    findings.add(
        "replay_4m_efficiency",
        Ratio(value=float(np.median(found)), low=min(found), high=max(found), rounds=_REPLAYS),
    )
    cpu_s = [(run["cpu_s"] - short_s) / (many - few) for run in runs]
    findings.tell("replay 4M, frames/s", float(np.median(rates_hz)), [min(rates_hz), max(rates_hz)])
    findings.tell(
        "replay 4M, CPU ms per frame of the process, start-up left out",
        float(np.median(cpu_s)) * 1e3,
    )
    findings.tell(
        "replay 4M, CPU ms per frame of its stages alone", float(np.median(beside_s)) * 1e3
    )
    findings.notes["replay"] = (
        f"{many} frames, decisions to a table, {', '.join(PLAIN_SETTINGS)}; {cores} cores; median "
        f"and extremes of {_REPLAYS} runs by wall time, which neighbours on the machine lengthen"
    )


def _replayed(master: Path, out: Path) -> dict[str, Any]:
    """The report of one replay, and ``cpu_s``, the CPU seconds of its process."""
    command = [sys.executable, "-m", "triage", "replay", str(master), "--out", str(out), "--quiet"]
    for setting in PLAIN_SETTINGS:
        command += ["--set", setting]
    before = os.times()
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    after = os.times()
    if answer.returncode:
        last = answer.stderr.strip().splitlines()[-1:] or [""]
        raise EnvironmentLacksError(f"bench goals: triage replay failed: {last[0]}")
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    reasons = report["totals"]["by_reason"]
    if set(reasons) != {"score"}:
        raise TriageError(f"bench goals: triage replay decided by {reasons}; expected scores alone")
    report["cpu_s"] = after.children_user - before.children_user
    report["cpu_s"] += after.children_system - before.children_system
    return report


def _replay_stages_s(findings: _Findings, master: Path, decide: Call) -> float:
    """CPU seconds per frame: read, then decide, each alone."""
    began = time.process_time()
    frames_read = ours.read_through(master)
    reading_s = (time.process_time() - began) / frames_read
    samples = alternate(
        {"decide": decide}, _MIX, budget_s=findings.seconds / 2, clock=time.process_time
    )
    return reading_s + samples["decide"].median_s


def _small_frames(findings: _Findings) -> None:
    """A live chain of small frames at climbing rates; the highest that is on time counts."""
    spec = PoolSpec(size="0.1M", hit_every=_MIX, count=2 * _MIX)
    findings.pool(spec)
    for what, writer, scored in (
        ("scored and forwarded", True, True),
        ("scored, not forwarded", False, True),
        ("bare: forwarded unscored", True, False),
    ):
        try:
            series = list(climbed(spec, writer=writer, scored=scored))
        except EnvironmentLacksError as err:
            findings.absent["small frames"] = str(err)
            return
        complete = [each for each in series if kept_up(each, scored=scored)]
        if not complete:
            findings.absent[f"small frames, {what}"] = (
                f"late already at {series[0].rate_hz:.0f} Hz: {dict(series[0].by_reason)}"
            )
            continue
        best = complete[-1]
        findings.tell(
            f"small frames, {what}: CPU ms per message at {best.rate_hz:.0f} Hz",
            best.cpu_s / best.images * 1e3,
        )
        per_s = _CORES * best.images / best.cpu_s
        findings.tell(f"small frames, {what}: 2 / CPU seconds per message", per_s)
        if scored and writer:
            findings.values["small_frames_per_s"] = per_s
    findings.notes["small frames"] = (
        "a triage run process that scores every frame, publishes its decision to a listener and "
        f"forwards it to a writer, {', '.join(PLAIN_SETTINGS)}; at the highest rate of a ladder "
        "at which no frame was late"
    )

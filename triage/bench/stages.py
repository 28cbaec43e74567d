"""Each stage of a frame's way alone, beside the floor it stands on.

A floor is what the stage cannot do without, done by the fastest code at hand that does only that:
the decompressor without anything after it, a copy of the bytes that are written, the matrix
product with as many multiply-adds. What lies between a stage and its floor is stated with it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import zmq

from triage.bench import Options, floors, ours
from triage.bench.frames import Pool, PoolSpec, image_template, made_pool, stamped
from triage.bench.measure import Call, Samples, alternate
from triage.bench.record import Result
from triage.nets.evidence import evidence_on_cpu
from triage.nets.scorer import occupied_cells
from triage.records import Decision, Frame, Override, Reason, Scores, Verdict, Views
from triage.sinks.publisher import HelloMessage, Publisher, decision_message

__all__ = ["STAGES", "Stage", "batch_rows", "run", "timed_stages"]

_OTHERS = (
    "lz4",
    "copy of the frame",
    "cbor2",
    "dectris",
    "dectris + numba bin",
    "hdf5plugin + numpy bin",
)
"""Rows for what is not ours."""

_SUBSCRIBED_S = 5.0
"""How long a subscription over loopback may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage's floor, and what keeps the stage above it."""

    floor: str
    in_the_way: str


STAGES = {
    "walk": Stage(
        floor="cbor2.loads of the message without its pixels",
        in_the_way="the frame's record and the book of series are Python, a fixed cost whatever "
        "the size of the frame",
    ),
    "decode": Stage(
        floor="LZ4 alone",
        in_the_way="bits are transposed to pixels and a whole frame is written to memory; only "
        "the audit asks for that",
    ),
    "reduce": Stage(
        floor="LZ4 alone",
        in_the_way="after each block its planes are masked, counted and searched; small cells of "
        "small frames add a cost per cell; LZ4's short copies, which wait for each other, are the "
        "rest",
    ),
    "prepare": Stage(
        floor="LZ4 alone",
        in_the_way="reduce, then square roots for every cell of the overview and sums per ring, "
        "which depend on the grid and not on the frame",
    ),
    "maps": Stage(
        floor="one copy of the maps",
        in_the_way="eleven maps are made in several passes: sums over windows, scatter, square "
        "roots and thresholds, where a copy is one pass",
    ),
    "fast_exit": Stage(
        floor="one copy of the maps, and its multiply-adds as one matrix product",
        in_the_way="maps, then candidates that are found, ordered and gathered, then small "
        "layers, each a call of its own",
    ),
    "close_ups": Stage(
        floor="LZ4 alone",
        in_the_way="the frame is decoded whole, cells are ordered, and spots are measured one "
        "after the other",
    ),
    "full_exit": Stage(
        floor="its multiply-adds as one float32 matrix product",
        in_the_way="convolutions with few channels fill vectors badly, and what lies between them "
        "moves memory",
    ),
    "policy": Stage(floor="one Python call", in_the_way="a few Python comparisons"),
    "publish": Stage(
        floor="msgspec alone",
        in_the_way="a record is built per decision, and two parts are handed to libzmq",
    ),
}
"""By name, in the order of a frame's way."""


def run(options: Options) -> Result:
    """Time every stage on each kind of frame, and batches of several sizes."""
    subject = ours.opened()
    figures: dict[str, float] = {}
    spread: dict[str, list[float]] = {}
    rows: list[dict[str, Any]] = []
    batches: list[dict[str, Any]] = []
    inputs: dict[str, Any] = {}
    absent: dict[str, str] = {}
    lz4_by = ""
    for spec in _specs(options.sizes):
        options.say(spec.name)
        pool = made_pool(spec)
        inputs[spec.name] = pool.described
        samples, lz4_by = timed_stages(pool, subject, options.seconds)
        for row in _rows(spec, samples):
            rows.append(row)
            name = _figure_name(row["stage"], spec)
            figures[f"{name}_ms"] = row["ms"]
            spread[f"{name}_ms"] = _spread_ms(samples[row["stage"]])
            if row["over_floor"] is not None:
                figures[f"{name}_over_floor"] = row["over_floor"]
        if "dectris" not in samples:
            absent["dectris-compression"] = "not installed; pip install 'braggtriage[bench]'"
        if spec.bits == 16 and spec.level == "typ":
            batches += batch_rows(pool, subject, options.seconds)
    return Result(
        figures=figures,
        spread=spread,
        tables={
            "stages": rows,
            "batches": batches,
            "what stands between a stage and its floor": [
                {"stage": name, "floor": stage.floor, "in_the_way": stage.in_the_way}
                for name, stage in STAGES.items()
            ],
        },
        absent=absent,
        notes={
            "clock": "CPU time of the process, medians; all candidates take turns on each frame",
            "lz4": f"LZ4 alone: {lz4_by}, every block into one small buffer",
        },
        input=inputs,
    )


def timed_stages(pool: Pool, subject: ours.Ours, seconds: float) -> tuple[dict[str, Samples], str]:
    """Stages and floors of one pool in turns, and whose LZ4 the floor is."""
    views = ours.prepared(subject.recipe, pool.frames)
    lz4, lz4_by = floors.lz4_alone(pool)
    k = int(views[0].bin_factor[0])
    plane_bytes = [12 * 4 * math.prod(occupied_cells(v.count[0])) for v in views]
    copy_planes = floors.memory_copy(plane_bytes)
    fast, full = ours.multiply_adds(subject.model, views[0])
    decision = _decision(pool)
    frames = len(pool.frames)
    with _listened_to(subject) as publisher:
        candidates: dict[str, Call | None] = {
            "walk": ours.parse(pool),
            "envelope": _envelope(pool),
            "cbor2": floors.cbor_library(pool),
            "lz4": lz4,
            "decode": lambda i: subject.backend.decode(pool.frames[i]),
            "dectris": floors.dectris_decode(pool),
            "reduce": ours.reduce_integers(pool, ours.kernels(subject.recipe)),
            "prepare": lambda i: subject.backend.prepare([pool.frames[i]]),
            "dectris + numba bin": floors.dectris_numba_bin(pool, k),
            "copy of the frame": floors.memory_copy(
                [math.prod(pool.shape) * pool.spec.bits // 8] * frames
            ),
            "maps": _maps(views, k),
            "copy of the maps": copy_planes,
            "fast_exit": lambda i: subject.scorer.fast(views[i]),
            "product fast": _product(fast),
            "close_ups": lambda i: subject.backend.close_ups([pool.frames[i]], views[i], [0]),
            "full_exit": _full(subject, pool, views),
            "product full": _product(full),
            "policy": _policy(subject, pool),
            "call": lambda i: None,
        }
        present = {name: call for name, call in candidates.items() if call is not None}
        samples = alternate(present, frames, budget_s=seconds, clock=time.process_time)
        # By this thread's clock: the listener is a thread of the same process.
        samples |= alternate(
            {
                "publish": lambda i: publisher.tell([decision]),
                "msgspec": _encoded(decision),
            },
            frames,
            budget_s=seconds / 4,
        )
        slow = {
            "reduce": candidates["reduce"],
            "hdf5plugin + numpy bin": floors.hdf5_numpy_bin(pool, k),
        }
        few = alternate(
            {name: call for name, call in slow.items() if call is not None},
            min(frames, 2),
            budget_s=seconds / 4,
            clock=time.process_time,
        )
    samples["hdf5plugin + numpy bin"] = few["hdf5plugin + numpy bin"]
    return samples, lz4_by


def batch_rows(pool: Pool, subject: ours.Ours, seconds: float) -> list[dict[str, Any]]:
    """CPU per frame of reduce and fast exit, by frames per call."""
    rows = []
    for size in (1, 2, 4, 8, 16):
        batch = [pool.frames[i % len(pool.frames)] for i in range(size)]
        calls = _batch_calls(subject, batch)
        samples = alternate(calls, 1, budget_s=seconds / 4, clock=time.process_time)
        rows.append(
            {
                "frames": pool.spec.name,
                "batch": size,
                **{f"{name}_ms": each.median_s / size * 1e3 for name, each in samples.items()},
            }
        )
    return rows


def _batch_calls(subject: ours.Ours, batch: list[Frame]) -> dict[str, Call]:
    views = subject.backend.prepare(batch)
    return {
        "prepare": lambda i: subject.backend.prepare(batch),
        "fast_exit": lambda i: subject.scorer.fast(views),
    }


def _specs(sizes: tuple[str, ...]) -> Iterator[PoolSpec]:
    """16 bit of every size, and every depth and level at 4M."""
    for size in sizes or ("0.1M", "0.5M", "1M", "4M", "16M"):
        yield PoolSpec(size=size, count=2 if size == "16M" else 4)
        if size == "4M":
            for bits, level in ((8, "typ"), (32, "typ"), (16, "weak"), (16, "strong")):
                yield PoolSpec(size=size, bits=bits, level=level, count=4)


def _rows(spec: PoolSpec, samples: Mapping[str, Samples]) -> Iterator[dict[str, Any]]:
    ms = {name: each.median_s * 1e3 for name, each in samples.items()}
    floor_ms = {
        "walk": ms["envelope"],
        "decode": ms["lz4"],
        "reduce": ms["lz4"],
        "prepare": ms["lz4"],
        "maps": ms["copy of the maps"],
        "fast_exit": ms["copy of the maps"] + ms["product fast"],
        "close_ups": ms["lz4"],
        "full_exit": ms["product full"],
        "policy": ms["call"],
        "publish": ms["msgspec"],
    }
    for name, stage in STAGES.items():
        low, high = samples[name].quartiles_s
        yield {
            "frames": spec.name,
            "stage": name,
            "ms": ms[name],
            "quartiles_ms": [low * 1e3, high * 1e3],
            "floor": stage.floor,
            "floor_ms": floor_ms[name],
            "over_floor": ms[name] / floor_ms[name],
        }
    for name in _OTHERS:
        if name in ms:
            low, high = samples[name].quartiles_s
            yield {
                "frames": spec.name,
                "stage": name,
                "ms": ms[name],
                "quartiles_ms": [low * 1e3, high * 1e3],
                "floor": "",
                "floor_ms": None,
                "over_floor": None,
            }


def _figure_name(stage: str, spec: PoolSpec) -> str:
    words = f"{stage} {spec.name}".lower().replace("+", " ").replace(".", "")
    return "_".join(words.split())


def _spread_ms(samples: Samples) -> list[float]:
    low, high = samples.quartiles_s
    return [low * 1e3, high * 1e3, samples.rounds]


def _envelope(pool: Pool) -> Call:
    """cbor2 on the message's envelope: the same items round no pixels."""
    import cbor2

    envelope = stamped(image_template(pool.shape, pool.spec.bits, b""), 1, 0)
    return lambda i: cbor2.loads(envelope)


def _maps(views: list[Views], k: int) -> Call:
    overviews = []
    for each in views:
        y, x = occupied_cells(each.count[0])
        overviews.append(np.ascontiguousarray(each.overview[0, :, :y, :x]))
    return lambda i: evidence_on_cpu(overviews[i], k)


def _full(subject: ours.Ours, pool: Pool, views: list[Views]) -> Call:
    """The full exit, which needs the fast exit's features of the same batch."""
    scored = []
    for i, each in enumerate(views):
        close_ups = subject.backend.close_ups([pool.frames[i]], each, [0])
        # A scorer keeps what it found in one batch only.
        scorer = subject.scorer.clone()
        scored.append((scorer, each, close_ups, scorer.fast(each)))

    def full(i: int) -> object:
        scorer, each, close_ups, scores = scored[i]
        return scorer.full(each, close_ups, [0], scores)

    return full


def _product(multiply_adds: int) -> Call:
    side = 256
    columns = max(1, round(multiply_adds / side**2))
    a = np.ones((side, side), np.float32)
    b = np.ones((side, columns), np.float32)
    out = np.empty((side, columns), np.float32)
    return lambda i: np.matmul(a, b, out=out)


def _policy(subject: ours.Ours, pool: Pool) -> Call:
    scores = Scores(p_blank=0.5)

    def judged(i: int) -> object:
        verdict, _ = subject.policy.judge(pool.frames[i], scores)
        return subject.policy.wants_full_exit(verdict, audited=False)

    return judged


def _decision(pool: Pool) -> Decision:
    return Decision(
        series_id=1,
        series_unique_id=pool.frames[0].series.series_unique_id,
        image_id=1,
        file="",
        frame=-1,
        ordinal=1,
        verdict=Verdict.VETO,
        reason=Reason.SCORE,
        forwarded=True,
        override=Override.SHADOW,
        scores=Scores(p_blank=0.99, p_ice=0.01, uncertainty=0.05),
        model_id="model",
        policy_id="policy",
        latency_us=1234.5,
        decided_ns=1,
    )


def _encoded(decision: Decision) -> Call:
    import msgspec

    encoder, message = msgspec.json.Encoder(), decision_message(decision)
    return lambda i: encoder.encode(message)


@contextmanager
def _listened_to(subject: ours.Ours) -> Iterator[Publisher]:
    """A publisher with one listener, which reads in a thread of its own."""

    def hello() -> HelloMessage:
        return HelloMessage(
            version="",
            model_id=subject.model.card.model_id,
            recipe_fingerprint="",
            policy_id=subject.policy.policy_id,
            mode="shadow",
            thresholds={},
        )

    greeted, stop = threading.Event(), threading.Event()
    publisher = Publisher("tcp://127.0.0.1:*", hello)
    context: zmq.Context[Any] = zmq.Context()
    listener = context.socket(zmq.SUB)
    listener.setsockopt(zmq.SUBSCRIBE, b"")
    listener.connect(publisher.endpoint)

    def read() -> None:
        while not stop.is_set():
            if listener.poll(100):
                listener.recv_multipart()
                greeted.set()

    reader = threading.Thread(target=read, name="listener")
    reader.start()
    try:
        until_s = time.monotonic() + _SUBSCRIBED_S
        while not greeted.wait(0.01) and time.monotonic() < until_s:
            publisher.greet_newcomers()
        yield publisher
    finally:
        stop.set()
        reader.join()
        listener.close()
        context.term()
        publisher.close()

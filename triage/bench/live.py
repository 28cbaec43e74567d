"""A detector process over loopback, faster and faster until frames are late.

Detector, triage and the listener that hears the decisions share the cores, so the rates are those
of this machine with its detector on board. Then the latencies at half the highest rate that was
on time, and, when asked for, minutes of it with memory looked at throughout.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triage.bench import Options, ours
from triage.bench.chain import Chain, Series, opened_chain
from triage.bench.frames import PoolSpec, made_pool
from triage.bench.record import Result

__all__ = ["FIRST_HZ", "climb", "run"]

FIRST_HZ = {"0.1M": 250.0, "0.5M": 100.0, "1M": 50.0, "4M": 20.0, "16M": 5.0}
"""Where a climb begins, by size."""

_STEP = 1.25
_STEP_S = 4.0
_HALF_RATE_S = 20.0
_MEMORY_EVERY_S = 1.0
_SETTINGS = (f"policy.p_blank_veto={ours.VETO_FROM}",)


def run(options: Options) -> Result:
    """Climb, then stay at half the rate, for each size."""
    figures: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    inputs: dict[str, Any] = {}
    for size in options.sizes or ("1M", "4M"):
        spec = PoolSpec(size=size, hit_every=10, count=10)
        inputs[spec.name] = made_pool(spec).described
        key = size.lower().replace(".", "")
        options.say(f"{size}: starting a detector and triage")
        with opened_chain(spec, _SETTINGS, writer=True) as chain:
            chain.send(math.ceil(FIRST_HZ[size]), FIRST_HZ[size])
            climbed = []
            for each in climb(chain, FIRST_HZ[size]):
                climbed.append(each)
                options.say(f"{size}: {each.rate_hz:.0f} Hz, p99 {each.latency_ms(0.99):.1f} ms")
            rows += [_row(size, "climb", each) for each in climbed]
            best = max((each.rate_hz for each in climbed if each.is_on_time), default=0.0)
            figures[f"live_{key}_on_time_hz"] = best
            if not best:
                continue
            options.say(f"{size}: half of {best:.0f} Hz")
            # What the last steps left undone must not be counted here.
            _steady(chain, FIRST_HZ[size], _STEP_S)
            half = _steady(chain, best / 2, _HALF_RATE_S)
            rows.append(_row(size, "half rate", half))
            figures[f"live_{key}_half_rate_p50_ms"] = half.latency_ms(0.5)
            figures[f"live_{key}_half_rate_p99_ms"] = half.latency_ms(0.99)
            figures[f"live_{key}_half_rate_cpu_ms"] = half.cpu_s / half.images * 1e3
            if options.minutes:
                with _watched(chain) as resident:
                    long = _steady(chain, best / 2, 60.0 * options.minutes)
                rows.append(_row(size, f"{options.minutes:g} minutes", long))
                figures |= _endurance(key, long, resident)
    return Result(
        figures=figures,
        tables={"live": rows},
        notes={
            "chain": "detector process, triage run in shadow mode with a writer and a listener, "
            "tcp over loopback, all on the same cores; audit as shipped; 90 % blanks; "
            f"p_blank_veto {ours.VETO_FROM}",
            "latency": "from handing a message to the detector's socket to hearing its decision",
            "on time": "every frame sent when due, decided by its score, none lost",
        },
        input=inputs,
    )


def climb(chain: Chain, rate_hz: float) -> Iterator[Series]:
    """Series at rates a quarter apart; ends after two in a row that were not on time."""
    missed = 0
    while missed < 2:
        series = _steady(chain, rate_hz, _STEP_S)
        yield series
        missed = 0 if series.is_on_time else missed + 1
        rate_hz *= _STEP


def _steady(chain: Chain, rate_hz: float, seconds: float) -> Series:
    return chain.send(max(1, round(rate_hz * seconds)), rate_hz)


@contextmanager
def _watched(chain: Chain) -> Iterator[list[int]]:
    """Resident memory of the triage process, looked at once a second."""
    resident: list[int] = [chain.resident_bytes]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_MEMORY_EVERY_S):
            resident.append(chain.resident_bytes)

    thread = threading.Thread(target=watch, name="memory")
    thread.start()
    try:
        yield resident
    finally:
        stop.set()
        thread.join()


def _endurance(key: str, series: Series, resident: list[int]) -> dict[str, float]:
    """Loss, latency, and how memory at the end compares with memory after the first tenth."""
    tenth = max(1, len(resident) // 10)
    early, late = max(resident[: 2 * tenth]), max(resident[-tenth:])
    return {
        f"live_{key}_long_lost": float(series.lost),
        f"live_{key}_long_unscored": float(series.images - series.scored),
        f"live_{key}_long_p99_ms": series.latency_ms(0.99),
        f"live_{key}_long_memory_end_over_begin": late / early,
        f"live_{key}_long_memory_largest_bytes": float(max(resident)),
    }


def _row(size: str, what: str, series: Series) -> dict[str, Any]:
    return {
        "size": size,
        "what": what,
        "rate_hz": series.rate_hz,
        "images": series.images,
        "scored": series.scored,
        "lost": series.lost,
        "vetoed": series.vetoed,
        "p50_ms": series.latency_ms(0.5),
        "p99_ms": series.latency_ms(0.99),
        "cpu_ms": series.cpu_s / series.images * 1e3,
        "on_time": "yes" if series.is_on_time else "no",
    }

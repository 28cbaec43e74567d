"""Minutes near the highest rate that loses nothing, in enforce mode, everything counted twice.

A detector process, ``triage run`` with journal and table, a writer and a listener share the
cores. After the climb the rate must hold for a while, or a lower one is tried. Then series at
three quarters of it follow each other until the time is over or SIGTERM comes; what was measured
until then is the result. What triage says at the end is compared with what the writer counted,
with the lines of the journal and with the rows of the table.
"""

from __future__ import annotations

import json
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from triage.bench import Options, ours
from triage.bench.chain import Chain, Series, opened_chain
from triage.bench.frames import PoolSpec, made_pool
from triage.bench.live import FIRST_HZ, climb
from triage.bench.record import Result

__all__ = ["Trend", "run", "trend"]

_SIZE = "4M"
_SERIES_S = 20.0
_HOLD_S = 20.0
_STEP_DOWN = 0.9
_SHARE = 0.75
"""Of the highest rate: what others do on the machine takes the rest, at some moment of the run."""
_LOOK_EVERY_S = 1.0
_WRITER_S = 10.0
"""The writer may be so much behind the ledger of the last series."""
_BLOCKS = 10
_WARM_UP = 0.1
"""Share of the run after which memory has found its level: caches, buffers, first row groups."""

_T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}
"""Quantiles of Student's t by degrees of freedom (any table)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """A straight line through the medians of up to ten equal stretches of a run.

    Attributes:
        slope, half_width: per minute, with the half width of its 95 % interval.
        share: change over the whole run, by the line, over the median.
    """

    slope: float
    half_width: float
    share: float

    @property
    def is_flat(self) -> bool:
        """No change that stands out of the noise, or one of less than a hundredth."""
        return abs(self.slope) <= self.half_width or abs(self.share) < 0.01


def trend(minutes: Sequence[float], values: Sequence[float]) -> Trend:
    """The trend of samples over time; NaN with fewer than three stretches.

    Medians of stretches, because neighbouring samples are not independent.
    """
    blocks = min(_BLOCKS, len(values))
    if blocks < 3:
        return Trend(slope=math.nan, half_width=math.nan, share=math.nan)
    x = np.array([float(np.mean(part)) for part in np.array_split(minutes, blocks)])
    y = np.array([float(np.median(part)) for part in np.array_split(values, blocks)])
    centred = x - x.mean()
    spread = float((centred**2).sum())
    slope = float((centred * y).sum()) / spread
    residual = y - y.mean() - slope * centred
    error = math.sqrt(float((residual**2).sum()) / (blocks - 2) / spread)
    return Trend(
        slope=slope,
        half_width=_T_975[blocks - 2] * error,
        share=slope * (minutes[-1] - minutes[0]) / max(float(np.median(values)), 1e-9),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """The triage process at one moment."""

    minute: float
    resident_bytes: int
    files: int
    threads: int


def run(options: Options) -> Result:
    """Climb and hold unless a rate is given, then series after series for ``options.minutes``."""
    size = (options.sizes or (_SIZE,))[0]
    spec = PoolSpec(size=size, hit_every=10, count=10)
    with tempfile.TemporaryDirectory(prefix="triage-soak-") as folder, _until_told() as stop:
        settings = (
            f"policy.p_blank_veto={ours.VETO_FROM}",
            "policy.mode=enforce",
            f"output.directory={folder}",
        )
        with opened_chain(spec, settings, writer=True) as chain:
            chain.send(math.ceil(FIRST_HZ[size]), FIRST_HZ[size])
            highest_hz = math.nan if options.rate_hz else _highest(chain, size, options, stop)
            rate_hz = options.rate_hz or _SHARE * highest_hz
            rows, looks = _soak(chain, rate_hz, options, stop)
            until_s = time.monotonic() + _WRITER_S
            while chain.forwarded_messages < chain.told_messages and time.monotonic() < until_s:
                time.sleep(0.01)
            missed = chain.told_messages - chain.forwarded_messages
        books = _books(Path(folder))
        all_series = chain.forwarded_messages
    return Result(
        figures=_figures(rate_hz, rows, looks)
        | ({"soak_highest_hz": highest_hz} if highest_hz == highest_hz else {})
        | {
            "soak_writer_missed": float(missed),
            "soak_books_differ": float(abs(books["forwarded_and_control"] - all_series)),
            "soak_journal_differs": float(abs(books["dropped"] - books["journal_lines"])),
            "soak_table_differs": float(abs(books["received"] - books["table_rows"])),
        },
        tables={
            "soak": rows,
            "process": [
                {
                    "minute": look.minute,
                    "resident_mb": look.resident_bytes / 1e6,
                    "files": look.files,
                    "threads": look.threads,
                }
                for look in looks[:: max(1, len(looks) // 120)]
            ],
            "books": [books],
        },
        notes={
            "chain": "detector process, triage run in enforce mode with journal, table, audit as "
            "shipped, a writer and a listener, tcp over loopback, all on the same cores; 90 % "
            f"blanks; p_blank_veto {ours.VETO_FROM}",
            "rate": f"{_SHARE:g} of the highest of a climb at which every frame was sent when due "
            f"and scored, and that held for {_HOLD_S:.0f} s"
            if not options.rate_hz
            else "as asked for",
            "slope": "of a line through the medians of ten stretches, first tenth left out; noise "
            "is the half width of its 95 % interval",
            "counted twice": "writer_missed: messages triage says it forwarded, less those the "
            "writer counted, climb and all; journal_differs: drops less lines of the journal; "
            "table_differs: frames received less rows of the table; books_differ: messages that "
            "the report at the end says were forwarded, less those the writer counted",
        },
        input={spec.name: made_pool(spec).described},
    )


@contextmanager
def _until_told() -> Iterator[threading.Event]:
    """Set by SIGTERM and SIGINT, which then end the run in order."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def tell(number: int, frame: FrameType | None) -> None:
        told.set()

    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, tell) for number in numbers}
    try:
        yield told
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _highest(chain: Chain, size: str, options: Options, stop: threading.Event) -> float:
    """The highest rate of a climb, or a tenth lower each time until it holds."""
    best = FIRST_HZ[size]
    for each in climb(chain, FIRST_HZ[size]):
        options.say(f"{size}: {each.rate_hz:.0f} Hz, p99 {each.latency_ms(0.99):.1f} ms")
        if each.is_on_time:
            best = max(best, each.rate_hz)
        if stop.is_set():
            return best
    while not stop.is_set():
        held = _send(chain, best, _HOLD_S)
        options.say(f"{size}: {best:.0f} Hz {'holds' if held.is_on_time else 'does not hold'}")
        if held.is_on_time:
            break
        best *= _STEP_DOWN
    return best


def _send(chain: Chain, rate_hz: float, seconds: float) -> Series:
    return chain.send(max(1, round(rate_hz * seconds)), rate_hz)


def _soak(
    chain: Chain, rate_hz: float, options: Options, stop: threading.Event
) -> tuple[list[dict[str, Any]], list[_Look]]:
    rows: list[dict[str, Any]] = []
    began_s = time.monotonic()
    until_s = began_s + 60.0 * (options.minutes or 1.0)
    with _watched(chain, began_s) as looks:
        while not stop.is_set() and (left_s := until_s - time.monotonic()) > 0:
            series = _send(chain, rate_hz, min(_SERIES_S, max(left_s, 1.0)))
            rows.append(_row((time.monotonic() - began_s) / 60.0, series))
            options.say(
                f"minute {rows[-1]['minute']:.1f}: lost {series.lost}, unscored "
                f"{series.images - series.scored}, p99 {series.latency_ms(0.99):.1f} ms, "
                f"{looks[-1].resident_bytes / 1e6:.0f} MB"
            )
    return rows, looks


@contextmanager
def _watched(chain: Chain, began_s: float) -> Iterator[list[_Look]]:
    """The process, looked at once a second."""

    def look() -> _Look:
        return _Look(
            minute=(time.monotonic() - began_s) / 60.0,
            resident_bytes=chain.resident_bytes,
            files=chain.open_files,
            threads=chain.threads,
        )

    looks = [look()]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_LOOK_EVERY_S):
            looks.append(look())

    thread = threading.Thread(target=watch, name="soak")
    thread.start()
    try:
        yield looks
    finally:
        stop.set()
        thread.join()


def _row(minute: float, series: Series) -> dict[str, Any]:
    return {
        "minute": minute,
        "images": series.images,
        "rate_hz": series.rate_hz,
        "behind_s": series.behind_s,
        "scored": series.scored,
        "forwarded": series.forwarded,
        "dropped": series.dropped,
        "missing": series.missing,
        "lost": series.lost,
        "balanced": "yes" if series.balanced else "no",
        "p50_ms": series.latency_ms(0.5),
        "p99_ms": series.latency_ms(0.99),
        "cpu_ms": series.cpu_s / series.images * 1e3,
    }


def _figures(
    rate_hz: float, rows: Sequence[dict[str, Any]], looks: Sequence[_Look]
) -> dict[str, float]:
    settled = [look for look in looks if look.minute >= _WARM_UP * looks[-1].minute]
    minutes = [look.minute for look in settled]
    later = [row for row in rows if row["minute"] >= _WARM_UP * rows[-1]["minute"]] if rows else []
    at = [row["minute"] for row in later]
    memory = trend(minutes, [float(look.resident_bytes) for look in settled])
    p50, p99 = (trend(at, [row[name] for row in later]) for name in ("p50_ms", "p99_ms"))
    images = sum(row["images"] for row in rows)

    def median(name: str) -> float:
        return float(np.median([row[name] for row in later])) if later else math.nan

    return {
        "soak_rate_hz": rate_hz,
        "soak_minutes": looks[-1].minute,
        "soak_images": float(images),
        "soak_series": float(len(rows)),
        "soak_lost": float(sum(row["lost"] for row in rows)),
        "soak_missing": float(sum(row["missing"] for row in rows)),
        "soak_unscored": float(images - sum(row["scored"] for row in rows)),
        "soak_unbalanced_series": float(sum(row["balanced"] == "no" for row in rows)),
        "soak_memory_mb": float(np.median([look.resident_bytes for look in settled])) / 1e6,
        "soak_memory_slope_mb_per_min": memory.slope / 1e6,
        "soak_memory_slope_noise_mb_per_min": memory.half_width / 1e6,
        "soak_memory_change_share": memory.share,
        "soak_memory_not_flat": float(not memory.is_flat),
        "soak_p50_ms": median("p50_ms"),
        "soak_p50_slope_ms_per_min": p50.slope,
        "soak_p50_slope_noise_ms_per_min": p50.half_width,
        "soak_p99_ms": median("p99_ms"),
        "soak_p99_slope_ms_per_min": p99.slope,
        "soak_p99_slope_noise_ms_per_min": p99.half_width,
        "soak_p99_not_flat": float(not p99.is_flat),
        "soak_files_least": float(min(look.files for look in settled)),
        "soak_files_most": float(max(look.files for look in settled)),
        "soak_threads_least": float(min(look.threads for look in settled)),
        "soak_threads_most": float(max(look.threads for look in settled)),
    }


def _books(folder: Path) -> dict[str, Any]:
    """What triage wrote down, once it has ended."""
    import pyarrow.parquet as pq

    report = json.loads((folder / "report.json").read_text())
    totals = report["totals"]
    lines = (folder / "journal.jsonl").read_bytes().splitlines()
    withdrawn = sum(b'"withdrawn":true' in line for line in lines)
    drops = sum(b'"reason"' in line for line in lines) - withdrawn
    series = len(report["series"])
    return {
        "series": series,
        "received": totals["received"],
        "forwarded": totals["forwarded"],
        "forwarded_and_control": totals["forwarded"] + 2 * series,
        "dropped": totals["dropped"],
        "missing": totals["missing"],
        "undecided": totals["undecided"],
        "journal_lines": drops,
        "table_rows": pq.read_metadata(folder / "decisions.parquet").num_rows,
        "sink_errors": len(report["sink_errors"]),
        "bytes_written": sum(os.path.getsize(path) for path in folder.iterdir()),
    }

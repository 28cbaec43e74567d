"""Measures this program against floors, against its own work, and against other programs.

Every benchmark gives a :class:`triage.bench.record.Record`: figures by name, the spread behind
them, the frames they were measured on, machine, versions and command. Ratios are taken within one
run, the candidates in turns; times alone say more of the machine than of the program.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from triage.errors import ConfigError

if TYPE_CHECKING:
    from triage.bench.record import Record

__all__ = ["BENCHES", "Bench", "Options", "run_bench"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A benchmark by name: ``module`` has ``run(options) -> triage.bench.record.Result``."""

    module: str
    purpose: str


BENCHES = {
    "stages": Bench(
        module="triage.bench.stages", purpose="Each stage alone, beside the floor it stands on."
    ),
    "work": Bench(module="triage.bench.work", purpose="How cost grows with pixels and with bytes."),
    "goals": Bench(
        module="triage.bench.goals", purpose="The ratios this program is held to; minutes."
    ),
    "live": Bench(
        module="triage.bench.live", purpose="A detector process over loopback, rate climbing."
    ),
    "soak": Bench(
        module="triage.bench.soak", purpose="Minutes near the highest rate, counted twice."
    ),
    "messages": Bench(
        module="triage.bench.messages", purpose="What a message costs, whatever is in it."
    ),
    "peers": Bench(
        module="triage.bench.peers", purpose="Spot finders of other projects on the same frames."
    ),
    "gpu": Bench(module="triage.bench.gpu", purpose="One device: from compressed bytes to scores."),
}
"""What ``triage bench NAME`` knows."""


def _say_nothing(_: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a benchmark may be asked for.

    Attributes:
        seconds: wall seconds for each comparison, least rounds aside.
        sizes: keys of ``triage.bench.frames.SIZES``; empty for the benchmark's own choice.
        peer_python: interpreter of the environment that ``benchmarks/peers_env.sh`` makes.
        minutes: how long ``live`` runs at half the rate it found, and ``soak`` at three quarters.
        rate_hz: for ``soak``, instead of one that it looks for.
        say: told what is being measured, for a person who waits.
    """

    seconds: float = 4.0
    sizes: tuple[str, ...] = ()
    peer_python: Path | None = None
    minutes: float = 0.0
    rate_hz: float = 0.0
    say: Callable[[str], None] = _say_nothing


def run_bench(name: str, options: Options, command: str) -> Record:
    """Run one benchmark.

    Raises:
        ConfigError: no benchmark of that name.
        EnvironmentLacksError: what it measures is not on this machine.
    """
    from triage.bench.measure import load_average
    from triage.bench.record import Record
    from triage.machine import machine, versions

    if name not in BENCHES:
        raise ConfigError(f"bench {name}: expected one of {', '.join(BENCHES)}")
    before, began = load_average(), time.monotonic()
    result = importlib.import_module(BENCHES[name].module).run(options)
    return Record(
        name=name,
        figures=result.figures,
        spread=result.spread,
        tables=result.tables,
        absent=result.absent,
        notes=result.notes,
        input=result.input,
        machine=machine(),
        versions=versions(),
        load={"before": before, "after": load_average()},
        elapsed_s=round(time.monotonic() - began, 1),
        command=command,
    )

"""Benchmarks run to their end and leave whole records; what they measure decides nothing here."""

from __future__ import annotations

import json
import math

import pytest
from typer.testing import CliRunner

from triage.bench import Options, run_bench
from triage.bench.chain import PLAIN_SETTINGS, opened_chain
from triage.bench.frames import PoolSpec
from triage.bench.stages import STAGES
from triage.cli import app


def test_stages_end_with_one_json_document() -> None:
    """Every stage has a time, a floor and a ratio; the last line is the record."""
    arguments = ["bench", "stages", "--size", "0.1M", "--seconds", "0", "--json"]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0, answer.output
    document = json.loads(answer.stdout.splitlines()[-1])
    assert {"name", "figures", "machine", "versions", "input", "command"} <= document.keys()
    for name in STAGES:
        for what in ("ms", "over_floor"):
            assert document["figures"][f"{name}_01m_u16_typ_{what}"] > 0
    assert all(isinstance(value, int | float) for value in document["figures"].values())
    assert len(document["input"]["0.1M u16 typ"]["sha256"]) == 64


def test_cost_against_work_is_fitted() -> None:
    """Two sizes give an exponent for each stage."""
    record = run_bench("work", Options(seconds=0.0, sizes=("0.1M", "0.5M")), "")
    for stage in ("reduce", "prepare", "decision"):
        assert math.isfinite(record.figures[f"{stage}_exponent_in_pixels"])


@pytest.mark.parametrize("writer", [False, True])
def test_a_chain_of_processes_accounts_for_every_frame(writer: bool) -> None:
    """All images are received and decided, scored after a start message and unscored without
    one, and each decision is heard of."""
    settings = (*PLAIN_SETTINGS, "pipeline.deadline_ms=60000")
    with opened_chain(PoolSpec(size="0.1M", count=4), settings, writer=writer) as chain:
        scored = chain.send(20, 100.0)
        unscored = chain.send(20, 100.0, started=False)
        assert chain.resident_bytes > 0
    assert (scored.lost, scored.scored, scored.vetoed) == (0, 20, 10)
    assert (unscored.lost, unscored.scored) == (0, 0)
    assert len(scored.latencies_ms) == len(unscored.latencies_ms) == 20
    assert (scored.latencies_ms > 0).all()


def test_a_soak_counts_everything_twice() -> None:
    """Nothing is lost, and writer, journal and table hold what the ledger says."""
    record = run_bench("soak", Options(sizes=("0.1M",), minutes=0.05, rate_hz=50.0), "")
    figures = record.figures
    assert figures["soak_images"] >= 150
    for name in ("lost", "missing", "unbalanced_series", "writer_missed", "books_differ"):
        assert figures[f"soak_{name}"] == 0
    assert figures["soak_journal_differs"] == figures["soak_table_differs"] == 0
    (books,) = record.tables["books"]
    assert books["received"] == figures["soak_images"] + 250
    assert books["journal_lines"] > 0

"""The audit in a run of its own process: vetoed hits are found out, and the report says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fabio
import numpy as np
import pytest


@pytest.fixture
def hits(tmp_path: Path) -> Path:
    """260 frames of 200 x 240 with 25 spots, elsewhere on each."""
    folder = tmp_path / "hits"
    folder.mkdir()
    for number in range(260):
        rng = np.random.default_rng(number)
        image = rng.poisson(1.0, (200, 240)).astype(np.uint16)
        for y in range(20, 200, 36):
            for x in range(24, 240, 44):
                dy, dx = rng.integers(-6, 7, 2)
                image[y + dy - 1 : y + dy + 2, x + dx - 1 : x + dx + 2] += 8
                image[y + dy, x + dx] += 40
        fabio.tifimage.TifImage(data=image).write(str(folder / f"hit_{number:04d}.tif"))
    return folder


@pytest.mark.parametrize("limit", [0.005, 1.0])
def test_vetoed_hits_open_the_gate(hits: Path, tmp_path: Path, limit: float) -> None:
    """A threshold of 0 vetoes everything; the finder sees spots on the half that is sampled."""
    settings = {
        "policy.p_blank_veto": 0.0,
        "policy.audit_fraction": 0.5,
        "policy.audit_limit": limit,
    }
    command = [sys.executable, "-m", "triage", "replay", str(hits), "--out", str(tmp_path / "out")]
    command += ["--quiet", "--mode", "enforce"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    audit, totals = report["audit"], report["totals"]
    sampled = totals["by_override"]["audit"]
    assert sampled > 100
    assert (audit["audited"], audit["skipped"], audit["unreadable"]) == (sampled, 0, 0)
    assert audit["hits"] >= 0.95 * sampled
    assert audit["gate_open"] == (limit < 1.0)
    assert ("GATE OPEN" in done.stderr) == (limit < 1.0)
    assert totals["vetoed"] == 260
    # After a hundred audited frames nothing is dropped any more.
    assert (totals["by_override"].get("gate_open", 0) > 0) == (limit < 1.0)
    assert totals["forwarded"] == sampled + totals["by_override"].get("gate_open", 0)
    assert totals["dropped"] > 50

"""``triage run`` as a process, with what [forward] asks for, between a detector and writers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback import Writer, run_chain
from strict_reader import array, strictly

FRAMES = 24


@pytest.fixture
def writers() -> Iterator[list[Writer]]:
    running = [Writer(), Writer()]
    yield running
    for writer in running:
        writer.close()


def run(tmp_path: Path, *settings: str) -> dict[str, Any]:
    """A series from ``triage-sim`` through ``triage run``; its report."""
    detector = [
        *("--frames", str(FRAMES), "--rate", "40", "--shape", "512", "512"),
        *("--blank-share", "0.7", "--seed", "5"),
    ]
    asked = ("policy.p_blank_veto=0.5", *settings)
    options = [part for setting in asked for part in ("--set", setting)]
    return run_chain(tmp_path / "out", detector, options)[0]


def test_two_writers_share_a_series_of_verdicts_and_placeholders(
    tmp_path: Path, writers: list[Writer]
) -> None:
    """Every id reaches one of them, dropped ones as placeholders; both hear start and totals."""
    endpoint = ",".join(writer.endpoint for writer in writers)
    report = run(
        tmp_path,
        f"forward.endpoint={endpoint}",
        "forward.vetoed=placeholder",
        "forward.verdict=user_data",
        "policy.mode=enforce",
        "policy.audit_fraction=0",
    )
    totals, seen, skipped = report["totals"], [], []
    for writer in writers:
        start, *images, end = [strictly(message) for (message,) in writer.messages]
        assert (start["type"], end["type"]) == ("start", "end")
        told = end["user_data"]["triage"]
        assert (told["received"], told["dropped"]) == (FRAMES, totals["dropped"])
        assert images
        for image in images:
            seen.append(image["image_id"])
            verdict = image["user_data"]["triage"]["verdict"]
            (pixels,) = (array(data) for data in image["data"].values())
            if pixels.shape == (1, 8):
                skipped.append(image["image_id"])
                assert (pixels.tobytes(), verdict) == (b"SKIPPED\0", "veto")
            else:
                assert (pixels.shape, verdict) == ((512, 512), "keep")
            assert "truth" in image["user_data"]["user_data"]
    assert sorted(seen) == list(range(FRAMES))
    journal = (tmp_path / "out" / "journal.jsonl").read_text().splitlines()
    assert sorted(skipped) == sorted(json.loads(line)["image_id"] for line in journal)
    assert len(skipped) == totals["dropped"] > 0


def test_a_tee_writes_everything_and_decides_beside(tmp_path: Path, writers: list[Writer]) -> None:
    """The writer has the series whole; the report has verdicts, and all of it forwarded."""
    writer = writers[0]
    report = run(tmp_path, f"forward.endpoint={writer.endpoint}", "forward.tee=true")
    read = [strictly(message) for (message,) in writer.messages]
    assert [m["type"] for m in read] == ["start", *["image"] * FRAMES, "end"]
    assert [m["image_id"] for m in read[1:-1]] == list(range(FRAMES))
    totals = report["totals"]
    assert (totals["received"], totals["forwarded"]) == (FRAMES, FRAMES)
    assert totals["by_override"]["shadow"] == totals["vetoed"] > 0

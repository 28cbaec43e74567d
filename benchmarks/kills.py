"""`triage run` is killed a hundred times in a stream of ten thousand frames; what became of each.

    python benchmarks/kills.py --record benchmarks/records/kills.json

Detector and writer are processes that survive; `triage run` drops frames (enforce) with the model
that comes with the package. The moments are those of the test (tests/kill_rig.py): random image
numbers, told by what the writer has seen. Exit code 1 when an image is not accounted for.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from triage.bench.measure import load_average
from triage.bench.record import Record
from triage.machine import machine, versions

HOME = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HOME), str(HOME / "tests")]

from kill_rig import (  # noqa: E402
    ENVIRONMENT,
    Account,
    Writer,
    accounted,
    kill_again_and_again,
    opened_detector,
)

PATIENCE_S = 300.0


class TriageRun:
    """Starts `triage run`, one at a time, each when the one before is gone."""

    def __init__(self, endpoint: str, writer: str, folder: Path) -> None:
        self._command = [
            *(sys.executable, "-m", "triage", "run", "--quiet", "--mode", "enforce"),
            *("--endpoint", endpoint, "--forward", writer, "--out", str(folder / "out")),
            *("--set", f"output.state_directory={folder / 'state'}"),
            *("--set", "pipeline.deadline_ms=5000", "--set", "pipeline.queue_bytes=67108864"),
            *("--set", "source.message_bytes=1048576", "--set", "metrics.port=0"),
        ]
        self._log = (folder / "log").open("w")
        self._running: subprocess.Popen[bytes] | None = None

    def start(self) -> int:
        """Start one; its process id."""
        if self._running is not None:
            self._running.wait()
        self._running = subprocess.Popen(
            self._command, cwd=HOME, env=ENVIRONMENT, stderr=self._log, stdout=self._log
        )
        return self._running.pid

    def wait(self, seconds: float) -> None:
        """Until the last one is gone."""
        if self._running is not None:
            self._running.wait(seconds)

    def close(self) -> None:
        """Whatever became of it."""
        if self._running is not None:
            self._running.kill()
            self._running.wait()
        self._log.close()


def main() -> int:
    """Kill, compare, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--rate", type=float, default=150.0, help="images per second")
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--seed", type=int, default=11)
    arguments = parser.parse_args()
    before, began_s = load_average(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="triage-kills-") as name:
        account = killed(Path(name), arguments)
    wrong = account.wrong()
    series = account.report
    record = Record(
        name="kills",
        figures={
            "sent": float(account.sent),
            "kills": float(account.kills),
            "kills_at_start": float(account.kills_at_start),
            "at_writer": float(len(account.at_writer)),
            "dropped_in_journal": float(len(account.journalled)),
            "undecided": float(series["undecided"]),
            "missing": float(series["missing"]),
            "in_doubt": float(series["in_doubt"]),
            "in_doubt_not_at_writer": float(
                len(set(account.in_doubt) - set(account.at_writer) - set(account.undecided))
            ),
            "received": float(series["received"]),
            "forwarded": float(series["forwarded"]),
            "dropped_not_in_journal": float(series["dropped"] - len(account.journalled)),
            "at_writer_and_in_journal": float(
                len(set(account.at_writer) & set(account.journalled))
            ),
            "scored_share": series["by_reason"].get("score", 0)
            / max(1, series["forwarded"] + series["dropped"]),
            "wrong": float(len(wrong)),
        },
        absent=dict.fromkeys(wrong, "not as promised"),
        notes={
            "sent": "images that the detector's socket took; each is at the writer, in the "
            "journal, named as undecided or in doubt by recoveries.jsonl, or counted as missing",
            "in_doubt": "bound on what ZeroMQ held at a kill; in_doubt_not_at_writer is what was "
            "lost in it",
            "kills_at_start": "before anything of the new process had reached the writer",
        },
        input={
            "images": f"{arguments.side} x {arguments.side} pixels simulated, half blank, "
            f"{arguments.rate:g} a second",
            "moments": f"random, seed {arguments.seed}",
        },
        machine=machine(),
        versions=versions(),
        load={"before": before, "after": load_average()},
        elapsed_s=round(time.monotonic() - began_s, 1),
        command=shlex.join(["python", "benchmarks/kills.py", *sys.argv[1:]]),
    )
    if arguments.record:
        arguments.record.write_text(record.as_json(indent=1) + "\n")
    with contextlib.suppress(BrokenPipeError):
        print(record.as_json(indent=1))
    return 1 if wrong else 0


def killed(folder: Path, arguments: argparse.Namespace) -> Account:
    """The stream, and the account of it."""
    writer, began_s = Writer(), time.monotonic()
    with opened_detector(
        frames=arguments.frames,
        rate_hz=arguments.rate,
        side_px=arguments.side,
        simulated=True,
    ) as (detector, endpoint):
        process = TriageRun(endpoint, writer.endpoint, folder)
        try:
            counts = kill_again_and_again(
                process,
                writer,
                detector,
                frames=arguments.frames,
                kills=arguments.kills,
                seed=arguments.seed,
                patience_s=PATIENCE_S,
                say=lambda line: print(line, file=sys.stderr, flush=True),
            )
        finally:
            process.close()
            writer.close()
    return accounted(folder / "out", writer, *counts, time.monotonic() - began_s)


if __name__ == "__main__":
    sys.exit(main())

"""Every fault of the catalogue, one after the other, and the table of what came of each.

    python benchmarks/fault_catalogue.py --record benchmarks/records/fault_catalogue.json
    triage bench table docs/faults.md

The faults are those of the tests (tests/fault_list.py); here a writer that stalls for 30 seconds
does so, where the tests step the clock. Names as arguments run those faults only. Exit code 1 when
anything came out otherwise than it must.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from triage.bench.measure import load_average
from triage.bench.record import Record, read_record
from triage.machine import machine, versions

HOME = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HOME), str(HOME / "tests")]

from fault_list import CATALOGUE, run_fault  # noqa: E402
from fault_rig import Account  # noqa: E402

KILLS = HOME / "benchmarks" / "records" / "kills.json"


def killed_row() -> list[dict[str, Any]]:
    """What benchmarks/kills.py found, as a row of the table; nothing without its record."""
    if not KILLS.is_file():
        return []
    record = read_record(KILLS)
    found = {name: round(value) for name, value in record.figures.items()}
    booked = found["forwarded"] + found["dropped_in_journal"] + found["undecided"]
    reached = found["at_writer"] - found["forwarded"] + found["in_doubt_not_at_writer"]
    wrong = found["wrong"] or booked + found["missing"] != found["sent"]
    account = Account(
        fault=f"killed {found['kills']} times",
        what=f"triage run is killed at moments drawn by lot and started again, while "
        f"{found['sent']} images come ({record.command}).",
        sent=found["sent"],
        forwarded=found["at_writer"],
        dropped=found["dropped_in_journal"],
        missing=found["missing"],
        gone_with_writer=found["in_doubt_not_at_writer"],
        undecided=found["undecided"],
        dropped_without_veto=found["dropped_not_in_journal"],
        balanced=not wrong,
        next_series="scored",
        remarks={"of the undecided at the writer all the same": reached},
    )
    return [
        {
            "group": "process",
            **account.row(),
            "as_expected": "no" if wrong else "yes",
            "seconds": record.elapsed_s,
        }
    ]


def main() -> int:
    """Run, print, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("faults", nargs="*", help="parts of names; all faults without any")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--step-clock", action="store_true", help="wait for nothing, as the tests")
    arguments = parser.parse_args()
    # What goes wrong is the point; what is said of it goes by.
    logging.disable(logging.CRITICAL)
    names = [
        name
        for name in CATALOGUE
        if not arguments.faults or any(part in name for part in arguments.faults)
    ]
    stopped: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(number)

    signal.signal(signal.SIGTERM, stop)
    rows: list[dict[str, Any]] = []
    wrong: dict[str, str] = {}
    before, began_s = load_average(), time.monotonic()
    for name in names:
        if stopped:
            break
        fault = CATALOGUE[name]
        at_s = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="triage-fault-") as folder:
            try:
                account = run_fault(fault, Path(folder), real_time=not arguments.step_clock)
            except (subprocess.TimeoutExpired, AssertionError, OSError) as err:
                wrong[name] = str(err)
                print(f"{name}: {err}")
                continue
        shortcomings = fault.shortcomings(account)
        if shortcomings:
            wrong[name] = "; ".join(shortcomings)
        rows.append(
            {
                "group": fault.group,
                **account.row(),
                "as_expected": "no" if shortcomings else "yes",
                "seconds": time.monotonic() - at_s,
            }
        )
        print(
            f"{name}: sent {account.sent} = forwarded {account.forwarded} + dropped "
            f"{account.dropped}, missing {account.missing}, next series {account.next_series}"
            + (f"  WRONG: {wrong[name]}" if shortcomings else ""),
            flush=True,
        )
    if not arguments.faults and not stopped:
        rows += killed_row()
    record = Record(
        name="fault_catalogue",
        figures={
            "faults": float(len(rows)),
            "faults_wrong": float(len(wrong)),
            "dropped_without_veto": float(sum(row["dropped_without_veto"] for row in rows)),
            "not_balanced": float(sum(row["balanced"] == "no" for row in rows)),
            "frames_sent": float(sum(row["sent"] for row in rows)),
        },
        tables={"faults": rows},
        absent={**wrong, **dict.fromkeys(names[len(rows) + len(wrong) :], "stopped before")},
        notes={
            "sent": "images that the detector's socket took, the healthy series after the fault "
            "among them; forwarded: that an independent socket received, byte for byte and in "
            "order; dropped: lines of the journal; missing: gaps in image numbers; "
            "dropped_without_veto: drops of images that no score may veto",
            "mode": "enforce; the scorer calls blank what has no bright pixel",
        },
        machine=machine(),
        versions=versions(),
        load={"before": before, "after": load_average()},
        elapsed_s=round(time.monotonic() - began_s, 1),
        command=shlex.join(["python", "benchmarks/fault_catalogue.py", *sys.argv[1:]]),
    )
    print(
        f"{len(rows)} faults, {len(wrong)} not as they must be, "
        f"{record.figures['dropped_without_veto']:.0f} dropped without a scored veto"
    )
    if arguments.record:
        arguments.record.write_text(record.as_json(indent=1) + "\n")
    with contextlib.suppress(BrokenPipeError):
        print(record.as_json())
    return 1 if wrong or stopped else 0


if __name__ == "__main__":
    sys.exit(main())

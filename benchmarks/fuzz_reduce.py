"""Many changed payloads against the C reduction, compiled under address and UB sanitizers.

    python benchmarks/fuzz_reduce.py --rounds 170000 --record benchmarks/records/reduce_fuzz.json

The program is tests/fuzz_reduce.c, which the tests run for some thousands of rounds. The first
fault ends it, and this, with an error. The last line of output is the record as one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from triage.machine import machine, versions

HOME = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOME / "tests"))

import reduce_fuzz  # noqa: E402


def main() -> None:
    """Compile, run every case, print, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=170_000, help="per case")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    cases, began = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "fuzz_reduce"
        reduce_fuzz.build(program, "-O2").check_returncode()
        for case in reduce_fuzz.CASES:
            done = reduce_fuzz.run(
                program,
                case,
                Path(folder),
                rounds=arguments.rounds,
                seed=arguments.seed,
                timeout_s=None,
            )
            done.check_returncode()
            rounds, accepted = reduce_fuzz.counted(done.stdout)
            dtype, shape, block_bytes, k = case
            print(f"{dtype} {shape}, blocks of {block_bytes}, k {k}: {done.stdout.strip()}")
            cases.append(
                {
                    "dtype": dtype,
                    "shape": shape,
                    "block_bytes": block_bytes,
                    "bin_factor": k,
                    "rounds": rounds,
                    "accepted": accepted,
                }
            )
    record = {
        "name": "reduce_fuzz",
        "command": f"python benchmarks/fuzz_reduce.py --rounds {arguments.rounds}",
        "figures": {
            "payloads": sum(case["rounds"] for case in cases),
            "accepted": sum(case["accepted"] for case in cases),
            "faults": 0,
        },
        "elapsed_s": round(time.monotonic() - began, 1),
        "cases": cases,
        "machine": machine(),
        "versions": versions(),
    }
    if arguments.record:
        arguments.record.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()

"""Many changed payloads against the C reduction, compiled under address and UB sanitizers.

    python benchmarks/fuzz_reduce.py --rounds 170000 --record benchmarks/records/reduce_fuzz.json

The program is tests/fuzz_reduce.c, which the tests run for some thousands of rounds. The first
fault ends it, and this, with an error. The last line of output is the record as one JSON document.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from triage.machine import machine, versions

HOME = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOME / "tests"))

from pictures import encode, picture  # noqa: E402

CASES = (
    # pixel type, shape (y, x), bytes of a block, bin factor
    ("<u2", (37, 53), 512, 4),
    ("<u2", (70, 131), 8192, 8),
    ("u1", (64, 64), 1024, 16),
    ("<u4", (45, 61), 2048, 2),
    ("<i4", (66, 129), 4096, 32),
    ("<i2", (9, 200), 128, 8),
)


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
        compile_command = [
            *("gcc", "-O2", "-g", "-std=gnu11", "-fsanitize=address,undefined"),
            *("-fno-sanitize-recover=all", "-Wno-psabi", f"-I{HOME / 'triage' / 'backends'}"),
            *(str(HOME / "tests" / "fuzz_reduce.c"), "-o", str(program)),
        ]
        subprocess.run(compile_command, check=True)
        for dtype, shape, block_bytes, k in CASES:
            pixels = picture(dtype, shape)
            payload = Path(folder) / "payload"
            payload.write_bytes(encode(pixels, "bslz4", block_bytes)[12:])
            kind = pixels.dtype
            command = [
                *(program, payload, 8 * kind.itemsize, int(kind.kind == "i"), *shape),
                *(block_bytes, k, np.iinfo(kind).max - 2, arguments.rounds, arguments.seed),
            ]
            done = subprocess.run(
                [str(word) for word in command], check=True, capture_output=True, text=True
            )
            rounds, accepted = (int(word) for word in done.stdout.split() if word.isdigit())
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

"""Verdicts on the real frames of ../shared/real, per source, against their labels.

    python benchmarks/real_frames.py ../shared/real --record benchmarks/records/real_frames.json

The frames were never trained on. The record names the command, the model, the machine and
versions; the last line of output is the same as one JSON document.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from triage.machine import machine, versions

BLANK_SOURCES = {
    "dark": "eiger4M_dark_",
    "thaumatin off crystal": "thau_3_2_001[79]",
    "vacuum": "eiger9M_vacuum_",
    "water": "water_waxs_",
    "saxs": "saxs_BSA_",
}


def main() -> None:
    """Replay, join with the manifest, print, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("frames", type=Path)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--model", default="")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "triage", "replay", str(arguments.frames)),
            *("--out", folder, "--quiet", "--all-heads"),
            *("--set", f"model.path={arguments.model}"),
        ]
        subprocess.run(command, check=True)
        rows = pq.read_table(Path(folder) / "decisions.parquet").to_pylist()
        report = json.loads((Path(folder) / "report.json").read_text())
    with (arguments.frames / "manifest.csv").open() as lines:
        manifest = list(csv.DictReader(lines))
    record = judged(rows, manifest)
    record |= {
        "name": "real_frames",
        "command": "python benchmarks/real_frames.py ../shared/real",
        "model_id": report["model_id"],
        "thresholds": report["thresholds"],
        "elapsed_s": report["elapsed_s"],
        "machine": machine(),
        "versions": versions(),
    }
    for line in record["sources"]:
        print(
            f"{line['source']:<44} {line['kind']:<14} {line['label']:<7} "
            f"{line['vetoed']:>3}/{line['frames']:<3} vetoed  p_blank {line['p_blank_median']:.3f}"
        )
    if arguments.record:
        arguments.record.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({k: v for k, v in record.items() if k != "sources"}))


def judged(rows: list[dict[str, Any]], manifest: list[dict[str, str]]) -> dict[str, Any]:
    """Counts per file and label, and the figures that say whether the veto is useful.

    ``by score`` counts leave the rotation rule aside: a sweep is kept whatever its score.
    """
    found = defaultdict(list)
    for row in rows:
        found[Path(row["file"]).name].append(row)
    for of_file in found.values():
        of_file.sort(key=lambda row: row["frame"])
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for entry in manifest:
        row = found[entry["file"]].pop(0)
        name = entry["file"]
        if name.startswith("l-cyst"):
            name = name[:9] + "_*"
        groups[(name, entry["kind"], entry["label"])].append(row)
    sources = []
    for (name, kind, label), members in groups.items():
        p_blank = sorted(row["p_blank"] for row in members)
        sources.append(
            {
                "source": name,
                "kind": kind,
                "label": label,
                "frames": len(members),
                "vetoed": sum(row["verdict"] == "veto" for row in members),
                "reasons": sorted({row["reason"] for row in members}),
                "p_blank_median": p_blank[len(p_blank) // 2],
                "p_blank_max": p_blank[-1],
            }
        )
    hits = [s for s in sources if s["kind"] in ("mx_hit", "xfel_hit")]
    import re

    blank = {}
    for source, pattern in BLANK_SOURCES.items():
        members = [s for s in sources if re.match(pattern, s["source"])]
        frames = sum(s["frames"] for s in members)
        blank[source] = sum(s["vetoed"] for s in members) / frames if frames else None
    return {
        "frames": len(rows),
        "figures": {
            "good_or_strong_hits_vetoed": sum(
                s["vetoed"] for s in hits if s["label"] in ("good", "strong")
            ),
            "weak_hits_vetoed": sum(s["vetoed"] for s in hits if s["label"] == "weak"),
            "blank_sources_mostly_vetoed": sum((share or 0) > 0.5 for share in blank.values()),
        },
        "blank_sources": blank,
        "sources": sources,
    }


if __name__ == "__main__":
    main()

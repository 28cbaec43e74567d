"""How often the audit's spot finder is wrong, on labelled shards.

    python benchmarks/audit_finder.py shards/test --record benchmarks/records/audit_finder.json

Its false hits among vetoed blank frames are what the audit shows when the network is right; its
share of found hits is what it can show when the network is wrong. Bad pixels that last from frame
to frame are left out by the audit and not here, where each frame has its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triage.binomial import clopper_pearson
from triage.machine import machine, versions
from triage.nets.model import load_model
from triage.records import HIT_SPOTS
from triage.training.answers import answers_of
from triage.training.baselines import spot_statistics
from triage.training.dataset import shard_paths, shards_made_with


def main() -> None:
    """Count, print, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--most-shards", type=int, default=120)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    paths = shard_paths(arguments.shards)[: arguments.most_shards]
    answers = answers_of(model, paths, threads=arguments.threads)
    vetoed = answers.value("blank") >= model.card.thresholds["p_blank_veto"]
    vetoed &= ~answers.ood
    called = spot_statistics(paths, threads=arguments.threads)[:, 0] >= HIT_SPOTS
    labels, visible = answers.label("blank"), answers.label("n_visible")
    blank, hit = labels == 1.0, labels == 0.0
    figures = {
        "blanks_called_hits": share(called, blank),
        "vetoed_blanks_called_hits": share(called, blank & vetoed),
        "hits_found": share(called, hit),
        "weak_hits_found": share(called, hit & (visible <= 30)),
    }
    record = {
        "name": "audit_finder",
        "command": f"python benchmarks/audit_finder.py {arguments.shards} "
        f"--most-shards {arguments.most_shards}",
        "model_id": model.card.model_id,
        "shards": shards_made_with(arguments.shards),
        "frames": len(answers),
        "figures": figures,
        "machine": machine(),
        "versions": versions(),
    }
    for name, row in figures.items():
        low, high = row["interval_95"]
        print(f"{name:<28} {row['called']:>5} of {row['frames']:<5} {low:.2%} to {high:.2%}")
    if arguments.record:
        arguments.record.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def share(called: NDArray[np.bool_], among: NDArray[np.bool_]) -> dict[str, Any]:
    """Frames called hits among some, with the interval of their share."""
    n, k = int(among.sum()), int((called & among).sum())
    return {"called": k, "frames": n, "interval_95": list(clopper_pearson(k, n))}


if __name__ == "__main__":
    main()

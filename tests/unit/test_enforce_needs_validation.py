"""A model drops frames only where its card says how often it drops hits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from triage.cli.assembly import opened_brain
from triage.config import load_settings
from triage.errors import ConfigError
from triage.metrics import Metrics
from triage.nets import model as models


def test_a_model_that_was_not_validated_drops_nothing(tmp_path: Path) -> None:
    """Enforce is refused before anything is opened; shadow is not, and tells what it would do."""
    folder = tmp_path / "model"
    shutil.copytree(Path(models.__file__).parent / "default", folder)
    card = json.loads((folder / "card.json").read_text())
    card["validation"] = {}
    (folder / "card.json").write_text(json.dumps(card))
    common = {"model.path": str(folder), "compute.workers": 1, "model.runtime": "torch"}
    with pytest.raises(ConfigError, match="validation"):
        opened_brain(load_settings(None, {**common, "policy.mode": "enforce"}), Metrics())
    assert opened_brain(load_settings(None, common), Metrics()).mode == "shadow"

"""Backend and scorer of a device behind the pipeline's decider, on this machine's memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from host_cuda import host_cuda_backend
from msgspec import structs

from triage.backends import open_backend
from triage.bench.frames import PoolSpec, made_pool
from triage.errors import DeviceError
from triage.metrics import Metrics
from triage.nets.device_scorer import DeviceScorer
from triage.nets.model import Model, load_model
from triage.nets.scorer import Scorer
from triage.pipeline import Decider, Judgement
from triage.policy import Policy
from triage.records import SCORE_NAMES, Frame, Reason, Verdict


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model()


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    """Hits and blanks, one damaged, one of an unknown encoding, one that its mask hides."""
    made = list(made_pool(PoolSpec(size="0.5M", count=6)).frames)
    made[1] = structs.replace(made[1], payload=made[1].payload[:-3])
    made[2] = structs.replace(made[2], encoding="jpeg")
    series = replace(made[3].series, pixel_mask=np.ones(made[3].shape, np.uint32))
    made[3] = structs.replace(made[3], series=series)
    return made


def policy_of(model: Model) -> Policy:
    threshold = model.card.thresholds["p_blank_veto"]
    return Policy(p_blank_veto=threshold, audit_fraction=0.0, all_heads=True)


def decided(backend: object, scorer: Scorer, model: Model, frames: list[Frame]) -> list[Judgement]:
    return Decider(backend, scorer, policy_of(model), Metrics()).decide(frames)


def test_decisions_are_those_of_the_cpu(model: Model, frames: list[Frame]) -> None:
    """Verdict, reason and detail; scores of both exits to a thousandth."""
    recipe = model.card.recipe
    found = decided(host_cuda_backend(recipe), DeviceScorer(model, "cpu"), model, frames)
    wanted = decided(open_backend("cpu", recipe), Scorer(model, "torch"), model, frames)
    assert {judgement.reason for judgement in wanted} >= {
        Reason.SCORE,
        Reason.MALFORMED,
        Reason.UNKNOWN_ENCODING,
        Reason.SCORER_ERROR,
    }
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.verdict, ours.reason, ours.detail) == (
            theirs.verdict,
            theirs.reason,
            theirs.detail,
        )
        for name in SCORE_NAMES:
            assert getattr(ours.scores, name) == pytest.approx(
                getattr(theirs.scores, name), rel=1e-3, abs=1e-4, nan_ok=True
            )


def test_a_device_lost_while_reading_keeps_the_frames(
    model: Model, frames: list[Frame], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The views are read after ``prepare`` has returned; a failure then is a lost device too."""
    backend = host_cuda_backend(model.card.recipe)

    def lost(array: object) -> None:
        raise DeviceError("lost while reading")

    monkeypatch.setattr(backend, "_read", lost)
    for judgement in decided(backend, DeviceScorer(model, "cpu"), model, frames[:1]):
        assert (judgement.verdict, judgement.reason) == (Verdict.KEEP, Reason.DEVICE_LOST)

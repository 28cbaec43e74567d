"""The scorer of a device, on torch's CPU: the same scores without the graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from host_cuda import host_cuda_backend
from msgspec import structs
from test_deployed import frame, scores_by, table

from triage.backends import open_backend
from triage.backends.cuda import CudaBackend
from triage.errors import DeviceError
from triage.nets import device_scorer
from triage.nets.device_scorer import DeviceScorer, scorer_for
from triage.nets.model import Model, load_model
from triage.nets.scorer import Scorer
from triage.records import NOT_SCORED, Frame


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model()


@pytest.fixture(scope="module")
def scorer(model: Model) -> DeviceScorer:
    made = DeviceScorer(model, "cpu")
    made.warm_up()
    return made


@pytest.fixture(scope="module")
def backend(model: Model) -> CudaBackend:
    return host_cuda_backend(model.card.recipe)


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    """More than the network takes at a time; spots, none, no geometry, and one cut short."""
    rng = np.random.default_rng(3)
    made = []
    for i in range(18):
        image = rng.poisson(0.3 + 0.1 * i, (180 + 20 * i, 200 + 9 * i)).astype(np.uint16)
        for y, x in rng.integers(4, 170, (5 * (i % 4), 2)):
            image[y : y + 2, x : x + 2] += rng.integers(4, 90, (2, 2)).astype(np.uint16)
        made.append(frame(image) if i % 5 else frame(image, geometry=None))
    made[7] = structs.replace(made[7], payload=made[7].payload[:-1])
    return made


def test_scores_are_those_of_the_cpu(
    model: Model, scorer: DeviceScorer, backend: CudaBackend, frames: list[Frame]
) -> None:
    """Views left on the device or made on the CPU: the reference's scores, NaN where it has NaN."""
    theirs = open_backend("cpu", model.card.recipe)
    cpu_views = theirs.prepare(frames)
    close_ups = theirs.close_ups(frames, cpu_views, range(len(frames)))
    wanted = table(scores_by(Scorer(model, "torch"), cpu_views, close_ups))
    assert np.isnan(wanted[7]).all()
    views = backend.prepare(frames)
    assert views.on_device is not None
    for given in (views, cpu_views):
        found = scores_by(scorer, given, close_ups)
        assert found[7] == NOT_SCORED
        np.testing.assert_allclose(table(found), wanted, rtol=1e-3, atol=1e-4)


def test_a_score_does_not_depend_on_the_frames_beside_it(
    scorer: DeviceScorer, backend: CudaBackend, frames: list[Frame]
) -> None:
    """Alone or among others: the same bits."""
    views = backend.prepare(frames)
    together = scores_by(scorer, views, backend.close_ups(frames, views, range(len(frames))))
    for i in (0, 3, 17):
        alone = backend.prepare([frames[i]])
        (score,) = scores_by(scorer, alone, backend.close_ups([frames[i]], alone, [0]))
        assert repr(score) == repr(together[i])


def test_only_some_rows_are_completed(
    scorer: DeviceScorer, backend: CudaBackend, frames: list[Frame]
) -> None:
    """Rows in any order; the others stay as the fast exit left them."""
    views = backend.prepare(frames)
    fast = scorer.fast(views)
    rows = [9, 2]
    done = scorer.full(views, backend.close_ups(frames, views, rows), rows, fast)
    for i, (before, after) in enumerate(zip(fast, done, strict=True)):
        assert (before is after) == (i not in rows)
        assert np.isfinite(after.quality) == (i in rows)


def test_no_frames_give_no_scores(scorer: DeviceScorer, backend: CudaBackend) -> None:
    """An empty batch is a batch."""
    assert scorer.fast(backend.prepare([])) == []


def test_what_the_device_reports_is_a_device_error(
    model: Model, backend: CudaBackend, frames: list[Frame], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline keeps such frames unscored and says that the device is lost."""
    broken = DeviceScorer(model, "cpu")
    broken.warm_up()

    def lost(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(device_scorer._Captured, "_run", lost)
    with pytest.raises(DeviceError, match="illegal memory access"):
        broken.fast(backend.prepare(frames[:1]))


def test_a_device_scores_only_where_torch_has_one(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never for views of the CPU, nor where the settings name a runtime."""
    monkeypatch.setattr(device_scorer, "unavailable", lambda: None)
    monkeypatch.setattr(DeviceScorer.__init__, "__defaults__", ("cpu",))
    assert scorer_for(model, "auto", on_device=True).runtime == "torch cpu"
    assert scorer_for(model, "auto", on_device=False).runtime != "torch cpu"
    assert scorer_for(model, "torch", on_device=True).runtime == "torch"
    monkeypatch.undo()
    if not torch.cuda.is_available():
        assert not isinstance(scorer_for(model, "auto", on_device=True), DeviceScorer)


@pytest.mark.gpu
def test_graphs_on_a_device_give_the_scores_of_the_cpu(model: Model, frames: list[Frame]) -> None:
    """The whole way on a device, captured graphs included."""
    why_not = device_scorer.unavailable()
    if why_not is not None:
        pytest.skip(why_not)
    cuda = open_backend("cuda", model.card.recipe)
    views = cuda.prepare(frames)
    close_ups = cuda.close_ups(frames, views, range(len(frames)))
    found = table(scores_by(DeviceScorer(model), views, close_ups))
    theirs = open_backend("cpu", model.card.recipe).prepare(frames)
    wanted = table(scores_by(Scorer(model, "torch"), theirs, close_ups))
    np.testing.assert_allclose(found, wanted, rtol=1e-2, atol=1e-3)

"""The watch for drift: what it sees of a frame, when it speaks, and when it must not."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest

from triage.audit.drift import INPUTS, Drift, inputs_of, reference_of
from triage.records import DriftReport, Frame, Scores, Series, Views

VETO = 0.9


def views_of(count: np.ndarray, total: np.ndarray, maximum: np.ndarray, k: int) -> Views:
    """Views of one frame; the floats are of no concern here."""
    grid = len(count)
    return Views(
        maximum=maximum[None].astype(np.uint32),
        total=total[None].astype(np.uint64),
        count=count[None].astype(np.uint16),
        bin_factor=np.array([k], np.int32),
        overview=np.zeros((1, 3, grid, grid), np.float32),
        radial=np.zeros((1, 5, 8, 160), np.float32),
        has_geometry=np.array([False]),
        errors=(None,),
    )


def small_views() -> Views:
    """Cells of 2 x 2 in a grid of 4: a frame of 3 x 2 cells, one of them half masked, one dead."""
    count = np.zeros((4, 4), int)
    count[:3, :2] = [[4, 4], [2, 4], [4, 0]]
    total = np.zeros((4, 4), int)
    total[:3, :2] = [[8, 0], [1, 27], [0, 0]]
    maximum = np.zeros((4, 4), int)
    maximum[:3, :2] = [[5, 0], [1, 20], [0, 0]]
    return views_of(count, total, maximum, 2)


def drift_of(seed: int = 0, **options: object) -> Drift:
    """Against 2,000 frames: inputs uniform in 0..1, a tenth of the scores unsure."""
    rng = np.random.default_rng(seed)
    p_blank = np.where(np.arange(2000) % 10 == 0, 0.5, np.where(np.arange(2000) % 2, 0.99, 0.01))
    reference = reference_of(rng.uniform(size=(2000, len(INPUTS))), p_blank, VETO)
    return Drift(reference, VETO, **options)  # type: ignore[arg-type]


def strange(report: DriftReport) -> set[str]:
    return {q.quantity for q in report.quantities if q.drifted}


def test_what_is_seen_of_a_frame() -> None:
    """18 valid pixels of 24, 36 counts, brightest pixel 20, two of five live cells without any."""
    np.testing.assert_allclose(inputs_of(small_views(), 0), [36 / 18, 18 / 24, 20.0, 2 / 5])


def test_a_frame_without_a_valid_pixel_has_no_figures() -> None:
    """NaN, and no warning of a division."""
    nothing = np.zeros((4, 4), int)
    assert np.isnan(inputs_of(views_of(nothing, nothing, nothing, 2), 0)).all()


def test_frames_like_the_cards_are_no_drift() -> None:
    """Frames drawn as the card's were, whatever their share of blanks: silence."""
    drift = drift_of()
    rng = np.random.default_rng(1)
    for i in range(1000):
        drift.add(rng.uniform(size=len(INPUTS)), 0.99 if i % 50 else 0.01)
    report = drift.report()
    assert report.frames == 1000
    assert strange(report) == set()
    by_name = {q.quantity: q for q in report.quantities}
    assert all(by_name[name].distance < 0.1 for name in INPUTS)
    # 2 % of low scores against 45 %: shown, and no drift.
    assert by_name["p_blank"].distance > 0.4


@pytest.mark.parametrize("which", range(len(INPUTS)))
def test_one_quantity_outside_is_told_apart(which: int, caplog: pytest.LogCaptureFixture) -> None:
    """A fifth of the frames far beyond the middle 99 % of one quantity: that one, said once."""
    drift = drift_of()
    rng = np.random.default_rng(2)
    with caplog.at_level(logging.WARNING):
        for i in range(300):
            inputs = rng.uniform(0.02, 0.98, size=len(INPUTS))
            if i % 5 == 0:
                inputs[which] = 2.5
            drift.add(inputs, 0.01)
    assert strange(drift.report()) == {INPUTS[which]}
    assert [INPUTS[which] in record.message for record in caplog.records] == [True]


def test_a_hair_beyond_the_cards_frames_is_no_drift() -> None:
    """Shares 0.004 over, counts a third over what any frame of the card shows, on every frame."""
    drift = drift_of()
    for _ in range(200):
        drift.add(np.array([1.33, 1.004, 1.33, 1.004]), 0.01)
    assert strange(drift.report()) == set()


def test_scores_between_hit_and_blank_are_drift() -> None:
    """Half the frames unsure where the card has a tenth; three tenths are still allowed."""
    for share, expected in ((0.5, {"p_blank"}), (0.28, set())):
        drift = drift_of()
        rng = np.random.default_rng(3)
        for i in range(500):
            drift.add(rng.uniform(0.02, 0.98, size=len(INPUTS)), 0.5 if i < 500 * share else 0.99)
        assert strange(drift.report()) == expected


def test_a_share_that_chance_explains_is_no_drift() -> None:
    """Seven frames in a hundred lie outside, where five may: that alone proves nothing; seventy
    in five hundred do."""
    drift = drift_of()
    seven = np.full(len(INPUTS), 0.5)
    seven[0] = 99.0
    for i in range(100):
        drift.add(seven if i < 7 else np.full(len(INPUTS), 0.5), 0.99)
    assert strange(drift.report()) == set()
    for i in range(500):
        drift.add(seven if i < 70 else np.full(len(INPUTS), 0.5), 0.99)
    assert strange(drift.report()) == {INPUTS[0]}


def test_few_frames_prove_nothing() -> None:
    """99 strange frames are told as figures and not as drift."""
    drift = drift_of()
    for _ in range(99):
        drift.add(np.full(len(INPUTS), 9.0), 0.5)
    assert strange(drift.report()) == set()
    assert drift.report().quantities[0].strange_share == 1.0
    assert drift.report().quantities[0].distance == 1.0


def test_one_frame_in_sixteen_is_looked_at_and_the_unscored_are_not() -> None:
    """Of 64 frames of one batch size, four; of those one has no score."""
    drift = drift_of()
    views = small_views()
    for ordinal in range(64):
        frame = Frame(series=Series(), image_id=ordinal, ordinal=ordinal)
        p_blank = math.nan if ordinal == 16 else 0.5
        drift.look([frame], views, [Scores(p_blank=p_blank)])
    assert drift.report().frames == 3


def test_a_reference_of_another_form_is_refused() -> None:
    """Fewer quantiles than the comparison is made at."""
    reference = reference_of(np.ones((10, len(INPUTS))), np.ones(10), VETO)
    reference["quantiles"][INPUTS[0]] = [0.0, 1.0]
    with pytest.raises(ValueError, match="quantiles"):
        Drift(reference, VETO)

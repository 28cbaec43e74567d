from __future__ import annotations

import math

import pytest

from triage.errors import ConfigError
from triage.policy import Policy
from triage.records import Frame, Override, Reason, Scores, Series, Verdict

STILL = Series(series_id=1)
SWEEP = Series(series_id=2, increments_deg={"omega": 0.1, "chi": 0.0})


def frame(series: Series = STILL, image_id: int = 0, fault: Reason | None = None) -> Frame:
    return Frame(series=series, image_id=image_id, fault=fault)


@pytest.mark.parametrize(
    ("p_blank", "verdict"), [(0.0, "keep"), (0.899, "keep"), (0.9, "veto"), (1.0, "veto")]
)
def test_a_frame_is_vetoed_from_the_threshold_on(p_blank: float, verdict: str) -> None:
    """p_blank at or above the threshold vetoes, anything below keeps."""
    policy = Policy(p_blank_veto=0.9)
    assert policy.judge(frame(), Scores(p_blank=p_blank)) == (Verdict(verdict), Reason.SCORE)


def test_nothing_but_a_score_vetoes() -> None:
    """A fault, a missing score, a sweep and an unfamiliar frame are kept at any p_blank, and so is
    one of which the full exit has yet to speak."""
    policy = Policy(p_blank_veto=0.5)
    blank = Scores(p_blank=1.0)
    for fault in (Reason.MALFORMED, Reason.UNKNOWN_ENCODING, Reason.GEOMETRY_CHANGED):
        assert policy.judge(frame(fault=fault), blank) == (Verdict.KEEP, fault)
    assert policy.judge(frame(), Scores(p_blank=math.nan)) == (Verdict.KEEP, Reason.SCORER_ERROR)
    assert policy.judge(frame(SWEEP), blank) == (Verdict.KEEP, Reason.ROTATION)
    unfamiliar = Scores(p_blank=1.0, ood=True)
    assert policy.judge(frame(), unfamiliar) == (Verdict.KEEP, Reason.SCORE)
    provisional = Scores(p_blank=1.0, provisional=True)
    assert policy.judge(frame(), provisional) == (Verdict.KEEP, Reason.SCORE)


@pytest.mark.parametrize(
    ("increment_deg", "sweep"), [(0.0, False), (1e-6, False), (2e-6, True), (-0.1, True)]
)
def test_a_sweep_begins_above_a_millionth_of_a_degree(increment_deg: float, sweep: bool) -> None:
    """The bound and the sign of the rotation increment."""
    assert Series(increments_deg={"phi": increment_deg}).is_rotation is sweep


def test_shadow_forwards_every_veto_and_says_so() -> None:
    """In shadow mode nothing is dropped."""
    policy = Policy(mode="shadow", audit_fraction=0.0)
    for audited in (False, True):
        assert policy.dispose(Verdict.VETO, audited=audited) == (True, Override.SHADOW)
        assert policy.dispose(Verdict.KEEP, audited=audited) == (True, Override.NONE)


def test_enforce_drops_vetoes_except_the_audit_sample() -> None:
    """The audit forwards about its fraction of vetoes, the same frames each time."""
    policy = Policy(mode="enforce", audit_fraction=0.05)
    drawn = [policy.is_audited(frame(image_id=i)) for i in range(10_000)]
    answers = [policy.dispose(Verdict.VETO, audited=audited) for audited in drawn]
    audited = answers.count((True, Override.AUDIT))
    assert answers.count((False, Override.NONE)) == 10_000 - audited
    # Binomial(10000, 0.05): mean 500, five standard deviations are 109.
    assert 391 <= audited <= 609
    assert drawn == [policy.is_audited(frame(image_id=i)) for i in range(10_000)]


@pytest.mark.parametrize(
    "settings", [{"mode": "veto"}, {"p_blank_veto": 1.3}, {"audit_fraction": -0.1}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    """A policy that cannot be meant is not made."""
    with pytest.raises(ConfigError, match="expected"):
        Policy(**settings)  # type: ignore[arg-type]

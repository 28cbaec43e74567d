"""Figures of merit and their intervals, each by hand or from a table."""

from __future__ import annotations

import math

import numpy as np
import pytest

from triage.training.figures import (
    average_precision,
    balanced_accuracy_interval,
    balancing_threshold,
    bootstrap_interval,
    calibration_error,
    kendall_tau_b,
    median_interval,
    spearman,
    spearman_interval,
    veto_threshold,
)


def test_tau_b_counts_pairs_and_leaves_ties_out_of_each_side() -> None:
    """Six pairs, five in order, one tied on the right: 5 / sqrt(6 * 5). Reversed: -1."""
    assert kendall_tau_b(np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 2, 4])) == pytest.approx(
        5 / math.sqrt(30)
    )
    assert kendall_tau_b(np.arange(5.0), -np.arange(5.0)) == -1.0
    assert math.isnan(kendall_tau_b(np.ones(3), np.arange(3.0)))


def test_calibration_error_of_a_set_made_by_hand() -> None:
    """Ten bins: three frames said 0.25 with one true, one said 0.85 and false.

    Distances 3 * |0.25 - 1/3| and 0.85, over four frames.
    """
    p = np.array([0.25, 0.25, 0.25, 0.85])
    yes = np.array([True, False, False, False])
    assert calibration_error(p, yes, bins=10) == pytest.approx((3 * (1 / 3 - 0.25) + 0.85) / 4)


def test_average_precision_is_that_of_the_positives() -> None:
    """Places 1 and 3 of three: (1/1 + 2/3) / 2. A tie with a negative shares its precision."""
    yes = np.array([True, False, True])
    assert average_precision(np.array([0.9, 0.8, 0.7]), yes) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.array([0.5, 0.5]), np.array([True, False])) == 0.5
    assert math.isnan(average_precision(np.array([0.5]), np.array([False])))


def test_balanced_accuracy_has_a_width_where_nothing_is_wrong() -> None:
    """Ten of ten both ways: each share reaches down to 0.025 ** 0.1 = 0.6915; root of both."""
    yes = np.repeat([True, False], 10)
    low, high = balanced_accuracy_interval(yes, yes)
    assert high == 1.0
    assert low == pytest.approx(1 - 0.5 * math.sqrt(2) * (1 - 0.025**0.1), abs=1e-6)
    assert balanced_accuracy_interval(yes[:10], yes[:10]) == [0.0, 1.0]


def test_the_median_lies_between_order_statistics() -> None:
    """Of ten values the second and ninth (binomial 11/1024 on each side), of six the ends."""
    assert median_interval(np.arange(10.0)[::-1]) == [1.0, 8.0]
    assert median_interval(np.arange(6.0)) == [0.0, 5.0]
    # Of 2001: 1000.5 - 0.98 * sqrt(2001) = 956.7, so the 956th from either end.
    assert median_interval(np.arange(2001.0)) == [955.0, 1045.0]


def test_the_interval_of_a_rank_correlation() -> None:
    """No correlation of 103 pairs: tanh(1.96 / 10) to both sides; ties and constants too."""
    assert spearman_interval(0.0, 103) == pytest.approx([-0.19352, 0.19352], abs=1e-4)
    assert spearman_interval(1.0, 3) == [-1.0, 1.0]
    assert math.isnan(spearman(np.ones(4), np.arange(4.0)))


def test_a_bootstrap_repeats_and_holds_a_constant() -> None:
    """The same seed gives the same interval; a figure that never varies has no width."""
    values = np.arange(20.0)
    found = bootstrap_interval(lambda x: float(x.mean()), values)
    assert found == bootstrap_interval(lambda x: float(x.mean()), values)
    # Standard error of the mean: 5.77 / sqrt(20) = 1.29.
    assert found[0] == pytest.approx(9.5 - 1.96 * 1.29, abs=0.5)
    assert bootstrap_interval(lambda x: 2.0, values) == [2.0, 2.0]


def test_the_veto_threshold_spends_what_it_can_promise() -> None:
    """A thousand hits at 0, 0.001 .. 0.999. The interval of 10 in 1000 is 0.48 % to 1.83 %, that of
    9 ends lower; that of none ends at 1 - 0.025^(1/1000) = 0.37 %."""
    p = np.append(np.arange(1000) / 1000.0, [1.0, math.nan])
    labels = np.append(np.zeros(1000), [1.0, 0.0])
    for goal, vetoed in ((0.0184, 10), (0.0182, 9), (0.0037, 0), (0.001, 0)):
        threshold = veto_threshold(p, labels, goal)
        assert ((p >= threshold) & (labels == 0.0)).sum() == vetoed
        assert threshold == pytest.approx(0.999 - vetoed / 1000)
    assert veto_threshold(np.array([0.9]), np.array([1.0]), 0.001) == 1.0


def test_a_balancing_threshold_lies_in_the_middle_of_its_gap() -> None:
    """Apart at 0.2 and 0.6; where they overlap, the cut with most right on both sides."""
    yes = np.array([False, False, True, True])
    assert balancing_threshold(np.array([0.1, 0.2, 0.6, 0.8]), yes) == pytest.approx(0.4)
    # Cuts before 0.3: (1 + 0.5) / 2; before 0.7: 0.5 and 1; the first best one is taken.
    assert balancing_threshold(np.array([0.1, 0.5, 0.3, 0.7]), yes) == pytest.approx(0.2)
    assert balancing_threshold(np.array([0.3]), np.array([True])) == 0.5

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_oreal.telemetry import grouped_interval, pass_at_1, wilson_interval
from megatron_oreal.telemetry.statistics import _student_quantile


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 1998, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_matches_published_intervals(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=6e-5)


def test_wilson_is_symmetric_and_exact_at_the_ends():
    for successes in range(8):
        low, high = wilson_interval(successes, 7)
        mirrored = wilson_interval(7 - successes, 7)
        assert (1 - high, 1 - low) == pytest.approx(mirrored, abs=1e-12)
    assert wilson_interval(0, 7).low == 0.0
    assert wilson_interval(7, 7).high == 1.0
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match=f"got {successes} of {n}"):
        wilson_interval(successes, n)


@pytest.mark.parametrize(
    ("dof", "t"), [(2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (29, 2.0452), (499, 1.9647)]
)
def test_student_quantile_matches_tables(dof, t):
    assert _student_quantile(1.959963984540054, dof) == pytest.approx(t, rel=0.01 if dof < 5 else 5e-4)


@pytest.mark.parametrize(("problems", "concentration"), [(30, 0.5), (100, 0.5), (100, 5.0)])
def test_the_grouped_interval_covers_the_truth_95_times_in_100_where_pooling_the_samples_does_not(
    problems, concentration
):
    rng = np.random.default_rng(1)
    truth, samples, trials = 0.6, 8, 1500
    grouped = pooled = 0
    for _ in range(trials):
        rates = rng.beta(truth * concentration, (1 - truth) * concentration, (problems, 1))
        correct = rng.random((problems, samples)) < rates
        low, high = grouped_interval(correct)
        grouped += low <= truth <= high
        low, high = wilson_interval(int(correct.sum()), correct.size)
        pooled += low <= truth <= high
    assert 0.935 <= grouped / trials <= 0.98
    assert pooled / trials < 0.9


def test_the_grouped_interval_contains_the_estimate_and_lies_in_0_1():
    rng = np.random.default_rng(2)
    for _ in range(300):
        shape = (int(rng.integers(2, 20)), int(rng.integers(1, 9)))
        correct = rng.random(shape) < rng.beta(0.3, 0.3, (shape[0], 1))
        low, high = grouped_interval(correct)
        assert 0.0 <= low <= pass_at_1(correct) + 1e-12
        assert pass_at_1(correct) - 1e-12 <= high <= 1.0


def test_all_solved_is_not_certainty_and_one_failure_hardly_moves_the_lower_end():
    solved = np.ones((100, 4), dtype=bool)
    one_failure = solved.copy()
    one_failure[0, 0] = False
    assert 0.95 < grouped_interval(solved).low < 0.97
    assert grouped_interval(one_failure).low == pytest.approx(grouped_interval(solved).low, abs=2e-3)
    assert grouped_interval(one_failure).high < 1.0
    assert grouped_interval(solved).high == 1.0
    assert grouped_interval(~solved).low == 0.0


def test_repeating_the_samples_of_the_same_problems_adds_no_certainty():
    rng = np.random.default_rng(3)
    correct = rng.random((50, 1)) < 0.5
    assert grouped_interval(np.repeat(correct, 16, axis=1)) == pytest.approx(grouped_interval(correct), abs=1e-12)


def test_problems_count_equally_whatever_their_number_of_samples_and_empty_ones_not_at_all():
    correct = [[True], [False] * 9, [], [True, False]]
    assert pass_at_1(correct) == pytest.approx(0.5)
    assert grouped_interval(correct) == grouped_interval([row for row in correct if row])


def test_too_little_data_says_nothing():
    assert math.isnan(pass_at_1([]))
    assert grouped_interval([]) == (0.0, 1.0)
    assert grouped_interval([[True, True]]) == (0.0, 1.0)


def test_few_problems_widen_the_interval_as_student_says():
    effective, t = 10 * 11 / 12, 2.2622  # nine degrees of freedom
    low, _ = grouped_interval(np.ones((10, 4), dtype=bool))
    assert low == pytest.approx(effective / (effective + t * t), abs=1e-4)

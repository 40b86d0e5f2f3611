from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlexit import metrics

NUMBERS = st.floats(-100, 100)


def test_iqm_is_the_mean_of_the_middle_half() -> None:
    assert metrics.iqm([100.0, 1.0, 3.0, 4.0, 8.0, 90.0, 2.0, -50.0]) == pytest.approx((2 + 3 + 4 + 8) / 4)


def test_mean_interval_of_two_values_spans_both() -> None:
    assert metrics.mean_interval([0.0, 1.0]) == (0.5, 0.0, 1.0)


def test_mean_interval_of_one_value_is_nan_and_of_none_is_all_nan() -> None:
    one = metrics.mean_interval([3.0])
    assert one.mean == 3.0
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert all(map(math.isnan, metrics.mean_interval([])))


def test_mean_interval_passes_nan_on() -> None:
    assert all(map(math.isnan, metrics.mean_interval([1.0, math.nan])))


def test_mean_interval_weighs_values() -> None:
    assert metrics.mean_interval([0.0, 1.0], weights=[3, 1]).mean == 0.25


def test_mean_interval_resamples_weights_with_their_values() -> None:
    # Apart from their values, the weights would give means between 1 and 100 other than these two.
    interval = metrics.mean_interval([1.0, 100.0], weights=[99.0, 1.0])
    assert (interval.low, interval.high) == (1.0, 100.0)


def test_mean_interval_is_near_the_normal_one_for_many_values() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, size=400)
    interval = metrics.mean_interval(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert interval.high - interval.mean == pytest.approx(half, rel=0.15)
    assert interval.mean - interval.low == pytest.approx(half, rel=0.15)


def test_mean_interval_is_the_same_in_every_call() -> None:
    values = np.random.default_rng(1).normal(size=20)
    assert metrics.mean_interval(values) == metrics.mean_interval(values)
    assert metrics.mean_interval(values, seed=1) != metrics.mean_interval(values)


def test_mean_interval_needs_a_confidence_between_0_and_1() -> None:
    with pytest.raises(ValueError, match=r"`confidence` .* got 95"):
        metrics.mean_interval([1.0, 2.0], confidence=95)


@settings(max_examples=25)
@given(st.lists(NUMBERS, min_size=2, max_size=12))
def test_an_interval_holds_the_mean_of_few_values(values: list[float]) -> None:
    interval = metrics.mean_interval(values, confidence=0.99)
    assert interval.low <= interval.mean + 1e-9
    assert interval.high >= interval.mean - 1e-9


def test_stratified_interval_resamples_within_a_game_only() -> None:
    # Within each game nothing varies; a bootstrap across games would give a wide interval.
    assert metrics.stratified_interval([[0.0, 0.0], [10.0, 10.0]]) == (5.0, 5.0, 5.0)


def test_stratified_interval_takes_any_statistic() -> None:
    interval = metrics.stratified_interval([[0.0, 2.0], [4.0, 6.0]], statistic=np.mean)
    assert interval == (3.0, 2.0, 4.0)


def test_stratified_interval_is_nan_where_a_game_has_one_value() -> None:
    interval = metrics.stratified_interval([[1.0], [2.0, 3.0]])
    assert interval.mean == pytest.approx(2.0)
    assert math.isnan(interval.low)


@pytest.mark.parametrize("strata", [[], [[1.0], []]])
def test_stratified_interval_refuses_a_game_without_values(strata: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="strata"):
        metrics.stratified_interval(strata)


def test_difference_interval_is_zero_free_for_samples_apart() -> None:
    assert metrics.difference_interval([3.0, 4.0], [0.0, 1.0]) == (3.0, 2.0, 4.0)
    assert math.isnan(metrics.difference_interval([3.0], [0.0, 1.0]).low)


def test_normalised_return_is_0_for_chance_and_1_for_the_teacher() -> None:
    assert metrics.normalised_return([-20.0, 20.0, 0.0, 30.0], -20.0, 20.0).tolist() == [0.0, 1.0, 0.5, 1.25]


def test_normalised_return_is_nan_where_the_teacher_is_no_better_than_chance() -> None:
    assert math.isnan(metrics.normalised_return(3.0, 1.0, 1.0))


def test_performance_profile_averages_over_games_not_over_runs() -> None:
    assert metrics.performance_profile([[0.5, 1.0], [0.2]], [0.0, 0.5, 1.0]).tolist() == [1.0, 0.25, 0.0]


def test_probability_of_improvement_counts_ties_half() -> None:
    assert metrics.probability_of_improvement([1.0, 2.0, 3.0], [0.0, 2.0, 2.0]) == pytest.approx(6 / 9)
    assert metrics.probability_of_improvement([1.0, 1.0], [1.0, 1.0]) == 0.5
    assert math.isnan(metrics.probability_of_improvement([], [1.0]))


@settings(max_examples=25)
@given(st.lists(NUMBERS, min_size=1, max_size=9), st.lists(NUMBERS, min_size=1, max_size=9))
def test_probabilities_of_improvement_both_ways_add_to_one(x: list[float], y: list[float]) -> None:
    there, back = metrics.probability_of_improvement(x, y), metrics.probability_of_improvement(y, x)
    assert there + back == pytest.approx(1.0)


def test_hindsight_improvability_has_the_golden_values() -> None:
    chosen = [[0, 0, 0, 0], [1, 2, 2, 2], [2, 1, 2, 1], [0, 2, 1, 0], [1, 1, 2, 2]]
    assert metrics.hindsight_improvability(chosen, [0, 2, 1, 1, 1]).tolist() == [0.0, 0.0, 1.0, 1.0]


def test_hindsight_improvability_is_nan_where_a_later_exit_errs_never() -> None:
    shares = metrics.hindsight_improvability([[1, 0], [0, 0]], [0, 0])
    assert shares[0] == 0.0
    assert math.isnan(shares[1])


def test_hindsight_improvability_of_no_rows_is_nan_after_the_first_exit() -> None:
    shares = metrics.hindsight_improvability(np.zeros((0, 3), dtype=int), np.zeros(0, dtype=int))
    assert np.isnan(shares).tolist() == [False, True, True]


def test_hindsight_improvability_refuses_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\(rows, exits\)"):
        metrics.hindsight_improvability([[1, 0]], [0, 0])


def test_area_under_curve_sorts_by_compute() -> None:
    assert metrics.area_under_curve([1.0, 0.0, 0.5], [4.0, 0.0, 4.0]) == pytest.approx(1.0 + 2.0)
    assert math.isnan(metrics.area_under_curve([0.5], [1.0]))


def test_the_calibration_error_weighs_bins_by_their_rows():
    assert metrics.expected_calibration_error([1, 3], [0.5, 0.9], [0.7, 0.8]) == pytest.approx(0.25 * 0.2 + 0.75 * 0.1)
    assert math.isnan(metrics.expected_calibration_error([], [], []))

from __future__ import annotations

import math

import pytest

from rlexit import summary
from rlexit.rows import Row
from rlexit.summary import Point
from tests.rlexit.toy_rows import PROTOCOL, episodes, latency, plain, references, row


def only(rows: list[Row], method: str, **more: object) -> Point:
    found = [point for point in summary.points(rows, **more) if point.method == method]  # type: ignore[arg-type]
    assert len(found) == 1
    return found[0]


def test_a_point_averages_its_test_episodes() -> None:
    point = only(episodes([10.0, 20.0]), "ztw")
    assert point.value == (15.0, 10.0, 20.0)
    assert point.episodes == 2
    assert point.exit_shares == (0.5, 0.0, 0.5)


def test_calibration_rows_are_never_shown() -> None:
    hidden = episodes([99.0], split="calibration", label="hidden")
    assert [point.label for point in summary.points(episodes([1.0]) + hidden)] == ["confidence@0.90"]
    assert summary.points(hidden) == []


def test_compute_is_averaged_over_decisions_not_over_episodes() -> None:
    short = row(decisions=100, relative_macs=1.0, macs_mean=8e6, exit_fractions=(0.0, 0.0, 1.0))
    long = row(decisions=300, relative_macs=0.2, macs_mean=2e6, exit_fractions=(1.0, 0.0, 0.0), episode=1)
    point = only([short, long], "ztw")
    assert point.relative_macs.mean == pytest.approx(0.4)
    assert point.macs_mean == pytest.approx(3.5e6)
    assert point.exit_shares == pytest.approx((0.75, 0.0, 0.25))


def test_returns_are_normalised_between_chance_and_teacher() -> None:
    rows = references() + episodes([0.0, 20.0])
    assert only(rows, "ztw").normalised == (0.75, 0.5, 1.0)
    assert only(rows, "teacher").normalised.mean == 1.0
    assert only(rows, "random").normalised.mean == 0.0


@pytest.mark.parametrize("missing", ["teacher", "random"])
def test_without_a_reference_returns_are_not_normalised_and_the_task_is_named(missing: str) -> None:
    rows = [each for each in references() + episodes([1.0]) if each.method != missing]
    assert math.isnan(only(rows, "ztw").normalised.mean)
    assert summary.missing_references(rows) == {"pong": [missing]}


def test_a_teacher_that_samples_is_no_scale_for_argmax() -> None:
    rows = references(actions="sampled") + episodes([1.0])
    assert only(rows, "ztw").normalised_values == ()
    assert only(rows, "teacher").normalised.mean == 1.0


def test_a_teacher_that_scores_like_chance_is_no_scale() -> None:
    rows = [*plain("teacher", [1.0, 3.0]), *plain("random", [2.0]), *episodes([5.0])]
    assert only(rows, "ztw").normalised_values == ()


def test_the_teacher_is_1_also_where_its_seeds_have_unequal_episodes() -> None:
    rows = references() + plain("teacher", [40.0] * 5, run_seed=1)
    assert only(rows, "teacher").normalised.mean == pytest.approx(1.0)


def test_accuracies_need_no_references() -> None:
    rows = episodes([0.9], metric="accuracy")
    assert summary.missing_references(rows) == {}
    assert only(rows, "ztw").normalised_values == ()


def test_seeds_are_averaged_and_the_interval_is_over_them() -> None:
    rows = episodes([0.0, 10.0]) + episodes([20.0, 20.0], run_seed=1)
    point = only(rows, "ztw")
    assert point.run_seeds == (0, 1)
    assert point.per_seed == (5.0, 20.0)
    assert point.value == (12.5, 5.0, 20.0)


def test_each_seed_counts_once_however_many_episodes_it_has() -> None:
    assert only(episodes([0.0] * 9) + episodes([10.0], run_seed=1), "ztw").value.mean == 5.0


def test_by_seed_keeps_seeds_apart() -> None:
    rows = episodes([0.0, 10.0]) + episodes([20.0, 20.0], run_seed=1)
    assert [point.value.mean for point in summary.points(rows, by_seed=True)] == [5.0, 20.0]


def test_one_episode_has_no_interval() -> None:
    assert math.isnan(only(episodes([3.0]), "ztw").value.low)


def test_uncounted_compute_stays_unknown() -> None:
    point = only(episodes([3.0, 4.0], macs_mean=math.nan, relative_macs=math.nan), "ztw")
    assert math.isnan(point.macs_mean)
    assert math.isnan(point.relative_macs.low)


def test_repeated_rows_count_once() -> None:
    assert only(references() * 2, "teacher").episodes == 2


def test_two_outcomes_of_one_episode_are_refused() -> None:
    with pytest.raises(ValueError, match=r"18 and 3 for pong ztw seed 0 .*Report the runs apart"):
        summary.points([row(), row(value=3.0)])


def test_mixed_protocols_are_refused_and_the_differing_fields_named() -> None:
    other = '{"sticky":0.0,"versions":{"ale_py":"0.11.0"}}'
    rows = [row(), row(protocol=other)]
    with pytest.raises(ValueError, match=r"'pong'.*sticky \(0.0, 0.25\); versions.ale_py .*--allow-mixed") as caught:
        summary.check_protocols(rows)
    assert "got 2" in str(caught.value)
    summary.check_protocols(rows, allow_mixed=True)
    assert len(summary.points(rows)) == 2


def test_protocols_may_differ_between_tasks_and_on_calibration_rows() -> None:
    summary.check_protocols([row(), row(task="qbert", protocol="{}"), row(split="calibration", protocol="{}")])


def test_scores_and_accuracies_of_one_task_are_never_mixed() -> None:
    with pytest.raises(ValueError, match="score and accuracy"):
        summary.check_protocols([row(), row(metric="accuracy")], allow_mixed=True)


def test_latency_is_compared_in_one_setup_with_the_smallest_batch_and_most_points() -> None:
    times = [
        latency(runtime="eager", latency_us_p50=900.0),
        latency(runtime="ort"),
        latency(runtime="ort", label="other"),
        latency(batch=32, latency_us_p50=5000.0),
    ]
    point = summary.points(episodes([1.0]), times)[0]
    assert point.latency_us_p50 == 200.0
    assert str(point.setup) == "batch 1, 1 thread, ort, a box"


def test_latency_of_another_point_task_or_seed_is_not_taken() -> None:
    times = [latency(label="other"), latency(task="qbert"), latency(run_seed=7), latency(method="sdn")]
    assert math.isnan(summary.points(episodes([1.0]), times)[0].latency_us_p50)


def test_references_come_first_and_grids_in_order_of_compute() -> None:
    grid = [row(label=name, relative_macs=macs, macs_mean=macs) for name, macs in (("dear", 0.9), ("cheap", 0.2))]
    promised = row(label="target_macs=0.1", target="target_macs=0.1", macs_mean=0.1)
    order = [point.label for point in summary.points([*grid, promised, *references()])]
    assert order == ["full", "random", "cheap", "dear", "target_macs=0.1"]


def verdict(rows: list[Row]) -> summary.Verdict:
    found = summary.verdicts(summary.points(rows))
    assert len(found) == 1
    return found[0]


def test_exits_win_where_the_interval_of_the_difference_is_above_zero() -> None:
    found = verdict(episodes([18.0, 19.0]) + plain("static", [1.0, 2.0], 0.5))
    assert found.winner == "exits"
    assert found.difference == (17.0, 16.0, 18.0)
    assert found.probability == 1.0


def test_a_better_static_network_is_told_so() -> None:
    assert verdict(episodes([1.0, 2.0]) + plain("static", [18.0, 19.0], 0.5)).winner == "static"


def test_nobody_wins_where_the_interval_holds_zero() -> None:
    assert verdict(episodes([1.0, 4.0]) + plain("static", [2.0, 3.0], 0.5)).winner == "none"


def test_nobody_wins_with_one_value_each() -> None:
    assert verdict(episodes([1.0]) + plain("static", [2.0], 0.5)).winner == "unknown"


def test_the_most_compute_within_the_budget_is_compared_not_the_best_score() -> None:
    rows = [
        *episodes([20.0, 21.0], label="cheap and lucky", macs_mean=1e6),
        *episodes([10.0, 11.0], label="fitting", macs_mean=4.0e6),
        *episodes([30.0, 31.0], label="too dear", macs_mean=4.1e6),
        *plain("static", [5.0, 6.0], 0.5),
    ]
    exits = verdict(rows).exits
    assert exits is not None
    assert exits.label == "fitting"


def test_a_calibrated_point_goes_before_a_grid_point_of_equal_compute() -> None:
    rows = [*episodes([1.0, 2.0], label="z"), *episodes([1.0, 2.0], label="a", target="target_macs=0.5")]
    exits = verdict(rows + plain("static", [5.0, 6.0], 0.5)).exits
    assert exits is not None
    assert exits.label == "a"


def test_a_fixed_exit_is_compared_only_where_nothing_decides() -> None:
    always = episodes([1.0, 2.0], label="exit 0", thresholds=(-math.inf, math.inf))
    static = plain("static", [5.0, 6.0], 0.5)
    deciding = episodes([1.0, 2.0], label="deciding", macs_mean=3e6)
    found = [verdict(rows + static).exits for rows in (always + deciding, always)]
    assert [exits.label for exits in found if exits] == ["deciding", "exit 0"]


def test_a_method_without_a_cheap_point_is_told_so() -> None:
    found = verdict(episodes([1.0, 2.0]) + plain("static", [5.0, 6.0], 0.25))
    assert found.exits is None
    assert found.winner == "unknown"


def test_exits_and_static_networks_are_compared_under_one_protocol_and_way_of_acting() -> None:
    exits = episodes([1.0, 2.0])
    for changes in ({"protocol": "{}"}, {"actions": "sampled"}, {"task": "qbert"}):
        assert summary.verdicts(summary.points(exits + plain("static", [5.0, 6.0], 0.5, **changes))) == []


def test_losing_with_far_less_compute_says_nothing_and_winning_does() -> None:
    static = plain("static", [10.0, 11.0], 0.9)
    assert verdict(episodes([1.0, 2.0]) + static).winner == "unknown"
    assert verdict(episodes([10.0, 11.0]) + static).winner == "unknown"
    assert verdict(episodes([18.0, 19.0]) + static).winner == "exits"
    nearer = episodes([1.0, 2.0], macs_mean=0.85 * 8e6, relative_macs=0.85)
    assert verdict(nearer + static).winner == "static"


def test_with_several_seeds_a_verdict_is_over_seeds() -> None:
    exits = episodes([0.0, 10.0]) + episodes([0.0, 10.0], run_seed=1)
    static = plain("static", [4.0, 4.0], 0.5) + plain("static", [4.0, 4.0], 0.5, run_seed=1)
    assert verdict(exits + static).difference == (1.0, 1.0, 1.0)


def test_the_shared_protocol_is_canonical() -> None:
    assert summary.flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}
    assert row().protocol == PROTOCOL


def test_repeated_answers_are_no_exit_but_a_share_of_their_own() -> None:
    one = row(decisions=100, exit_fractions=(0.5, 0.0, 0.1, 0.4))
    other = row(decisions=300, exit_fractions=(0.7, 0.0, 0.1, 0.2), episode=1)
    point = only([one, other], "ztw")
    assert point.exit_shares == pytest.approx((0.65, 0.0, 0.1))
    assert point.reuse_share == pytest.approx(0.25)
    assert only(episodes([1.0]), "ztw").reuse_share == 0

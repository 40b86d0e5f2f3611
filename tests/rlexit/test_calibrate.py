"""Thresholds: the exact optimum for a compute target, and a certificate that holds as often as it says."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlexit.calibrate import (
    Candidate,
    Scores,
    TargetError,
    calibrate_loss,
    calibrate_macs,
    reliability,
    score_rows,
    shared_policy,
    solve_macs,
    threshold_grid,
)
from rlexit.config import GateConfig
from rlexit.costs import CostTable, cost_table
from rlexit.exit_policy import ExitPolicy
from rlexit.network import StagedNetwork
from rlexit.runtime import run
from tests.rlexit.test_leave import leaving, plain
from tests.rlexit.toys import SCORERS, TOYS, residual, scatter

INF = math.inf


def table(*exits: int, full: int = 100) -> CostTable:
    return CostTable({}, {}, exits, full)


def scores_of(early: list[list[float]], *exits: int, rule: str = "confidence") -> Scores:
    return Scores(torch.tensor(early), table(*exits), rule)


# ---- rows as a rule sees them ----


def test_a_row_leaves_at_the_first_exit_above_the_threshold():
    scores = scores_of([[0.9, 0.1], [0.5, 0.9], [0.2, 0.3]], 20, 60, 110)
    assert scores.exits(0.5).tolist() == [0, 1, 2]
    assert scores.exits(0.9).tolist() == [2, 2, 2]
    assert scores.exits(-INF).tolist() == [0, 0, 0]
    assert scores.relative_macs(0.5) == pytest.approx((20 + 60 + 110) / 300)


@pytest.mark.parametrize("rule", SCORERS)
@pytest.mark.parametrize("name", ["cascade", "multi_scale", "carried_gate"])
def test_rows_are_scored_as_running_them_does(name, rule):
    toy = TOYS[name]
    network = toy.network()
    inputs = toy.inputs(7)
    scores = score_rows(network, rule, inputs, cost_table(network, inputs), chunk=3)
    seen = run(network, ExitPolicy(rule, (1e9, 1e9)), inputs).scores[:, :2]
    torch.testing.assert_close(scores.early, seen, rtol=0, atol=1e-5)
    assert scores.rule == rule


def test_what_is_solved_is_what_running_costs():
    toy = TOYS["cascade"]
    network = toy.network()
    inputs = toy.inputs(24)
    costs = cost_table(network, inputs)
    scores = score_rows(network, "confidence", inputs, costs)
    for target in (0.5, 0.7, 0.9):
        policy = shared_policy("confidence", solve_macs(scores, target), 3)
        relative = float(run(network, policy, inputs).macs.double().mean()) / costs.full
        assert relative <= target
        # Rows at their own threshold may fall on either side when another batch size rounds otherwise.
        assert relative == pytest.approx(scores.relative_macs(policy.thresholds[0]), abs=1e-9)


def gated() -> StagedNetwork:
    network = residual("both", GateConfig("mgl2s", bias=0.0))
    scatter(network)
    return network.eval()


@pytest.mark.parametrize(
    ("build", "rule"),
    [(gated, "confidence"), (gated, "patience"), (plain, "learned"), (lambda: leaving(cascade=True), "learned")],
)
def test_rows_are_charged_what_running_them_executes_whatever_they_skip_and_the_rule_leaves_unbuilt(build, rule):
    torch.manual_seed(3)
    network, inputs = build(), TOYS["skips"].inputs(24)
    costs = cost_table(network, inputs)
    scores = score_rows(network, rule, inputs, costs, chunk=7)
    seen = torch.unique(scores.early)
    between = ((seen[1:] + seen[:-1]) / 2).tolist()  # at its own threshold a row may fall on either side
    everybody = [] if rule == "learned" else [-INF]  # where everybody leaves no gate is asked
    for threshold in (*between[:: max(len(between) // 6, 1)], *everybody):
        executed = run(network, shared_policy(rule, threshold, network.exits), inputs).macs
        assert scores.relative_macs(threshold) == pytest.approx(float(executed.double().mean()) / costs.full, abs=1e-12)


def test_what_rows_skip_makes_room_below_the_first_exit_with_every_gate_open():
    torch.manual_seed(3)
    network, inputs = gated(), TOYS["skips"].inputs(24)
    costs = cost_table(network, inputs)
    scores = score_rows(network, "confidence", inputs, costs)
    cheapest, dearest = scores.ends
    assert cheapest < costs.exits[0] / costs.full
    assert solve_macs(scores, (cheapest + costs.exits[0] / costs.full) / 2) < INF
    spent = [scores.relative_macs(threshold) for threshold in threshold_grid(scores, 5)]
    assert spent[0] == pytest.approx(cheapest)
    assert spent[-1] == pytest.approx(dearest)
    with pytest.raises(TargetError, match="what the first exit costs"):
        solve_macs(scores, cheapest - 1e-6)


# ---- a compute target ----

ROWS = st.lists(st.tuples(*[st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.5, 0.7, 0.9, 1.0])] * 2), min_size=1, max_size=12)


@settings(max_examples=150)
@given(rows=ROWS, target=st.floats(0.2, 1.3), steps=st.tuples(st.integers(1, 60), st.integers(1, 60)))
def test_the_solved_threshold_is_the_exact_optimum(rows, target, steps):
    costs = (20, 20 + steps[0], 20 + steps[0] + steps[1])

    def spent(threshold: float) -> float:
        total = 0
        for first, second in rows:
            total += costs[0] if first > threshold else costs[1] if second > threshold else costs[2]
        return total / len(rows) / 100

    thresholds = [-INF, *sorted({score for row in rows for score in row})]
    allowed = [threshold for threshold in thresholds if spent(threshold) <= target]
    solved = solve_macs(scores_of([list(row) for row in rows], *costs), target)
    assert solved == pytest.approx(max(allowed), abs=1e-6)  # scores are float32
    assert spent(max(allowed)) == max(spent(threshold) for threshold in allowed)


def test_a_target_below_the_cheapest_exit_is_refused():
    scores = scores_of([[0.5, 0.5]], 20, 60, 110)
    for target in (0.19, 0.0, -1.0, math.nan):
        with pytest.raises(TargetError, match=r"`target_macs` must be at least 0.200, what the first exit costs, got"):
            solve_macs(scores, target)
    assert isinstance(TargetError("x"), ValueError)
    assert solve_macs(scores, 0.2) == -INF


def test_a_target_that_pays_for_everything_lets_nobody_leave():
    scores = scores_of([[0.5, 0.25], [0.75, 0.5]], 20, 60, 110)
    assert solve_macs(scores, 1.1) == 0.75
    assert solve_macs(scores, INF) == 0.75
    assert scores.relative_macs(0.75) == pytest.approx(1.1)


@settings(max_examples=50)
@given(rows=ROWS, points=st.integers(2, 9))
def test_the_grid_rises_and_its_compute_with_it(rows, points):
    scores = scores_of([list(row) for row in rows], 20, 60, 110)
    grid = threshold_grid(scores, points)
    assert grid == sorted(set(grid))
    spent = [scores.relative_macs(threshold) for threshold in grid]
    assert spent == sorted(set(spent))
    assert len(grid) <= points
    assert spent[-1] == pytest.approx(1.1)


def test_the_grid_is_evenly_spaced_in_compute_where_the_rows_allow_it():
    first = torch.linspace(0.01, 0.99, 1000)
    scores = Scores(torch.stack([first, torch.zeros(1000)], dim=1), table(20, 60, 100), "confidence")
    spent = [scores.relative_macs(threshold) for threshold in threshold_grid(scores, 5)]
    assert spent == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], abs=0.01)


def test_a_rule_that_counts_has_one_point_per_count_that_makes_a_difference():
    scores = scores_of([[0.0, 1.0], [0.0, 0.0]], 20, 60, 110, rule="patience")
    assert threshold_grid(scores, 9) == [-INF, 0.0, 1.0]


def test_one_threshold_serves_all_exits():
    policy = shared_policy("margin", 0.25, 4, "mine", {"a": 1})
    assert policy == ExitPolicy("margin", (0.25,) * 3, "mine", {"a": 1})


# ---- solve, roll out, solve again ----


def test_thresholds_are_solved_on_the_rows_that_the_policy_itself_meets():
    """An actor that leaves early meets rows of half the confidence: the first solution would spend too much."""
    met: list[ExitPolicy] = []

    def rows(policy: ExitPolicy) -> str:
        met.append(policy)
        return "full" if policy.thresholds == (INF, INF) else "early"

    def score(inputs: str) -> Scores:
        ramp = torch.linspace(0.01, 1.0, 100)
        confidences = ramp if inputs == "full" else ramp / 2
        return Scores(torch.stack([confidences, confidences], dim=1), table(20, 60, 100), "confidence")

    policy = calibrate_macs(rows, score, 3, 0.6, rounds=3)
    assert [one.thresholds for one in met[:1]] == [(INF, INF)]
    assert met[0].rule == "confidence"
    # Half of the rows leave at exit 0 and the others stay to the end: 0.5 of the ramp, then 0.25 of the halved one.
    assert [one.thresholds[0] for one in met[1:]] == pytest.approx([0.5, 0.25, 0.25])
    assert policy.thresholds == pytest.approx((0.25, 0.25))
    assert policy.rule == "confidence"
    assert policy.label == "target_macs=0.6"
    tried = policy.provenance["rounds"]
    assert [entry["relative_macs_solved"] for entry in tried] == pytest.approx([0.6, 0.6, 0.6])
    assert [entry["relative_macs_rolled_out"] for entry in tried] == pytest.approx([1.0, 0.6, 0.6])
    assert policy.provenance["relative_macs"] == pytest.approx(0.6)


def test_a_policy_that_costs_more_in_its_own_games_than_was_solved_is_asked_for_less():
    """Every game looks harder than the rows before said: the confidence of all rows falls with each round."""
    met: list[float] = []

    def score(inputs: None) -> Scores:
        met.append(0.95 ** len(met))
        ramp = torch.linspace(0.01, 1.0, 100) * met[-1]
        return Scores(torch.stack([ramp, ramp], dim=1), table(20, 60, 100), "confidence")

    policy = calibrate_macs(lambda _: None, score, 3, 0.6, rounds=4)
    spent = [entry["relative_macs_rolled_out"] for entry in policy.provenance["rounds"]]
    assert spent[0] > 0.6 >= spent[-1]
    assert policy.provenance["relative_macs"] == max(cost for cost in spent if cost <= 0.6)


def test_a_calibrated_policy_is_json_also_when_only_the_first_exit_is_affordable():
    policy = calibrate_macs(lambda _: None, lambda _: scores_of([[0.5, 0.5]], 20, 60, 110), 3, 0.2, rounds=2)
    assert policy.thresholds == (-INF, -INF)
    text = json.dumps(policy.to_json(), allow_nan=False)
    assert ExitPolicy.from_json(json.loads(text)) == policy


def test_an_impossible_target_is_refused_when_calibrating():
    with pytest.raises(TargetError, match=r"`target_macs` must be at least 0.200"):
        calibrate_macs(lambda _: None, lambda _: scores_of([[0.5, 0.5]], 20, 60, 110), 3, 0.1, rounds=1)


# ---- a bounded loss ----


def candidate(macs: float, values) -> Candidate:
    return Candidate(ExitPolicy("confidence", (macs,), f"at {macs}"), [float(value) for value in values], macs)


def certified(candidates, teacher, floor, drop, confidence) -> ExitPolicy | None:
    return calibrate_loss(candidates, [float(value) for value in teacher], floor, drop, confidence)


def test_the_cheapest_certified_candidate_is_chosen():
    generator = np.random.default_rng(0)
    teacher = 20 + generator.normal(0, 0.5, 30)
    good, fair, bad = (mean + generator.normal(0, 0.5, 30) for mean in (20.0, 19.9, 12.0))
    chosen = certified([candidate(0.4, bad), candidate(0.9, good), candidate(0.6, fair)], teacher, -20.0, 0.05, 0.95)
    assert chosen is not None
    assert chosen.thresholds == (0.6,)
    assert chosen.label == "max_return_drop=0.05"
    facts = chosen.provenance
    assert facts["mean_return"] == pytest.approx(fair.mean())
    assert facts["teacher_return"] == pytest.approx(teacher.mean())
    assert facts["relative_macs"] == 0.6
    assert facts["episodes"] == 30
    assert 0 <= facts["p_value"] <= 0.05


def test_the_first_failure_ends_the_search():
    generator = np.random.default_rng(0)
    noise = generator.normal(0, 0.5, (4, 30))
    teacher, good, bad, lucky = 20 + noise[0], 20 + noise[1], 10 + noise[2], 25 + noise[3]
    chosen = certified([candidate(0.4, lucky), candidate(0.6, bad), candidate(0.9, good)], teacher, 0.0, 0.05, 0.95)
    assert chosen is not None
    assert chosen.thresholds == (0.9,)


def test_the_loss_is_a_share_of_the_way_from_chance_to_the_teacher():
    generator = np.random.default_rng(0)
    teacher, values = (20 + generator.normal(0, 0.2, 30), 18 + generator.normal(0, 0.2, 30))
    # 2 of 20 is a tenth; 2 of 40 a twentieth. A drop of 7 % allows the second only.
    assert certified([candidate(0.5, values)], teacher, 0.0, 0.07, 0.95) is None
    assert certified([candidate(0.5, values)], teacher, -20.0, 0.07, 0.95) is not None


@pytest.mark.parametrize("episodes", [0, 1, 2])
def test_too_few_episodes_certify_nothing(episodes):
    generator = np.random.default_rng(3)
    teacher = 20 + generator.normal(0, 2.0, max(episodes, 1))
    values = 20 + generator.normal(0, 2.0, episodes)
    assert certified([candidate(0.5, values)], teacher, 0.0, 0.05, 0.95) is None


def test_no_candidate_certifies_nothing():
    assert certified([], [1.0, 2.0], 0.0, 0.05, 0.95) is None


def test_games_that_always_end_alike_are_compared_without_a_warning():
    """A Pong actor that wins every game 21:0 has no variance at all."""
    always, mostly = [21.0] * 10, [21.0] * 8 + [20.0, 19.0]
    for values, teacher in ((always, always), (always, mostly), (mostly, always)):
        assert certified([candidate(0.5, values)], teacher, -20.7, 0.05, 0.95) is not None
    worse = [10.1] * 10
    for teacher in (always, mostly):
        assert certified([candidate(0.5, worse)], teacher, -20.7, 0.05, 0.95) is None


def test_certificates_fail_no_more_often_than_they_say():
    """300 draws; the cheap candidate loses just more than is allowed, so to certify it is wrong."""
    generator = np.random.default_rng(7)
    confidence, draws, wrong, right = 0.9, 300, 0, 0
    for _ in range(draws):
        teacher = generator.normal(100.0, 10.0, 12)
        good, border = generator.normal(104.0, 10.0, 12), generator.normal(94.999, 14.0, 12)
        chosen = certified([candidate(0.8, good), candidate(0.4, border)], teacher, 0.0, 0.05, confidence)
        wrong += chosen is not None and chosen.thresholds == (0.4,)
        right += chosen is not None and chosen.thresholds == (0.8,)
    delta = 1 - confidence
    assert wrong / draws <= delta + 2 * math.sqrt(delta * (1 - delta) / draws)
    assert wrong > 0  # else the border is no border, and the test shows nothing
    assert right > 100


# ---- reliability ----


def test_reliability_counts_every_row_once_per_early_exit_and_compares_it_with_the_full_network():
    toy = TOYS["cascade"]
    network, inputs = toy.network(), toy.inputs(40)
    found = reliability(network, inputs, bins=5, chunk=7)
    answers = network(inputs).answers.detach().exp()
    for exit in range(2):
        mine = [row for row in found if row.exit == exit]
        assert sum(row.count for row in mine) == len(answers)
        confidence, chosen = answers[:, exit].max(dim=1)
        same = (chosen == answers[:, -1].argmax(dim=1)).float()
        for row in mine:
            assert row.low <= row.confidence <= row.high
            inside = (confidence > row.low) & (confidence <= row.high)
            assert row.count == int(inside.sum())
            assert row.confidence == pytest.approx(float(confidence[inside].mean()))
            assert row.agreement == pytest.approx(float(same[inside].mean()))


@pytest.mark.parametrize(("games", "certified"), [(2, False), (4, False), (5, True)])
def test_equal_games_certify_only_if_there_are_enough_of_them(games, certified):
    candidate = Candidate(shared_policy("confidence", 0.5, 3), [21.0] * games, 0.5)
    found = calibrate_loss([candidate], [21.0] * games, -21.0, 0.05, 0.95)
    assert (found is not None) is certified

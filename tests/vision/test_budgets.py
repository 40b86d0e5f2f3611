"""The reference's time budgets, by its golden values."""

from __future__ import annotations

import math

import pytest
import torch

from rlexit.exit_policy import first_exit
from rlexit.metrics import hindsight_improvability
from vision.budgets import (
    Sweep,
    batch_shares,
    batch_thresholds,
    confidence_exits,
    patience_exits,
    streaks,
    sweep_confidence,
    sweep_patience,
)

# methods/ztw.md 1.10: argmax per exit (rows are samples), labels, confidences of one_hot * (1, 2, 3, 4), costs.
CHOSEN = torch.tensor([[0, 0, 0, 0], [1, 2, 2, 2], [2, 1, 2, 1], [0, 2, 1, 0], [1, 1, 2, 2]])
LABELS = torch.tensor([0, 2, 1, 1, 1])
RIGHT = LABELS[:, None] == CHOSEN
COSTS = (10.0, 25.0, 45.0, 50.0)
CONFIDENCES = torch.tensor([0.576117, 0.786986, 0.909443, 0.964663]).expand(5, 4)


def outcome(exits: torch.Tensor) -> tuple[float, float]:
    rows = torch.arange(5)
    return float(RIGHT[rows, exits].double().mean()), float(torch.tensor(COSTS)[exits].mean())


def test_patience_has_the_golden_accuracies_and_costs():
    sweep = sweep_patience(CHOSEN, RIGHT, COSTS)
    assert sweep.accuracy.tolist() == pytest.approx([0.4, 0.8, 0.6, 0.6])
    assert sweep.cost.tolist() == pytest.approx([10, 39, 49, 50])


@pytest.mark.parametrize(
    ("threshold", "accuracy", "cost"),
    [(0.3, 0.4, 10), (0.6, 0.8, 25), (0.8, 0.6, 45), (0.95, 0.6, 50), (1.0, 0.6, 50)],
)
def test_confidence_has_the_golden_accuracies_and_costs(threshold, accuracy, cost):
    assert outcome(confidence_exits(CONFIDENCES, threshold)) == pytest.approx((accuracy, cost))


def test_hindsight_improvability_has_the_golden_values():
    assert list(hindsight_improvability(CHOSEN.numpy(), LABELS.numpy())) == pytest.approx([0, 0, 1, 1])


def test_a_budget_takes_the_most_patient_threshold_strictly_below_it():
    sweep = Sweep(torch.tensor([0.4, 0.8, 0.6]), torch.tensor([10.0, 25.0, 45.0]))
    assert math.isnan(sweep.at(10.0))  # strictly below
    assert sweep.at(45.0) == pytest.approx(0.8)
    assert sweep.at(45.1) == pytest.approx(0.6)


def test_a_softmax_that_rounds_to_1_does_not_pass_the_last_threshold():
    sure = torch.ones(3, 2)
    sweep = sweep_confidence(sure, torch.tensor([[True, False]] * 3), (1.0, 2.0), count=5)
    assert sweep.cost.tolist() == [2.0] * 5
    assert sweep.accuracy.tolist() == [0.0] * 5


def test_all_wait_where_no_two_exits_agree():
    assert patience_exits(torch.tensor([[0, 1, 0]]), 2).tolist() == [2]
    assert patience_exits(torch.tensor([[0, 1, 1]]), 2).tolist() == [2]
    assert patience_exits(torch.tensor([[0, 1, 0]]), 1).tolist() == [0]


def test_the_streak_counts_exits_that_agree():
    assert streaks(CHOSEN).tolist() == [[1, 2, 3, 4], [1, 1, 2, 3], [1, 1, 1, 1], [1, 1, 1, 1], [1, 2, 1, 2]]


@pytest.mark.parametrize("budget", [10.0, 12.0, 30.0, 49.0, 50.0, 500.0])
def test_shares_of_a_batch_are_geometric_and_cost_the_budget(budget):
    shares = batch_shares(COSTS, budget)
    assert float(shares.sum()) == pytest.approx(1)
    assert float(shares @ torch.tensor(COSTS, dtype=torch.float64)) == pytest.approx(min(budget, 50.0), rel=1e-3)
    if 11 < budget < 49:
        ratios = shares[1:] / shares[:-1]
        assert ratios.tolist() == pytest.approx([float(ratios[0])] * 3)


def test_thresholds_of_a_batch_let_the_surest_leave_in_these_shares():
    generator = torch.Generator().manual_seed(0)
    confidences = torch.rand(1000, 4, generator=generator)
    shares = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    limits = batch_thresholds(confidences, shares)
    left = first_exit(confidences[:, :3] > torch.tensor(limits))
    assert torch.bincount(left, minlength=4).tolist() == [400, 300, 200, 100]


def test_images_that_tie_leave_together_so_that_a_batch_keeps_its_budget():
    confidences = torch.rand(1000, 4, generator=torch.Generator().manual_seed(0)).mul(0.9)
    confidences[:600] = 1.0  # as a softmax that rounds to 1
    shares = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    limits = batch_thresholds(confidences, shares)
    left = first_exit(confidences[:, :3] > torch.tensor(limits))
    assert torch.bincount(left, minlength=4).tolist() == [600, 100, 200, 100]


def test_an_exit_without_a_share_is_closed_and_all_may_leave_at_the_first():
    confidences = torch.rand(10, 3, generator=torch.Generator().manual_seed(0))
    assert batch_thresholds(confidences, torch.tensor([0.0, 0.5, 0.5]))[0] == math.inf
    assert batch_thresholds(confidences, torch.tensor([1.0, 0.0, 0.0])) == [-math.inf, math.inf]

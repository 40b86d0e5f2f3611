"""What a row skips is not computed for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlexit.gates import Decision
from rlexit.units import ModuleUnit, Unit
from tests.rlexit.toys import CHANNELS, SIDE, Residual, TwoScales, Width, watched


def decide(actions, relaxed=None) -> Decision:
    action = torch.tensor(actions, dtype=torch.int64)
    weight = action.float() if relaxed is None else torch.as_tensor(relaxed)
    return Decision(action, weight, torch.zeros(len(action)), torch.zeros(len(action)))


class Triple(Unit):
    """3 x; passing by it leaves x."""

    skippable = True

    def body(self, features, decision=None):
        return {"x": features["x"] * 3}

    def skip(self, features):
        return features

    def macs(self, features, decision=None):
        return torch.full((len(features["x"]),), 5)


def test_rows_with_action_0_take_the_skip_path_and_cost_nothing():
    features = {"x": torch.tensor([[1.0], [2.0], [4.0]])}
    result, macs = Triple().execute(features, decide([1, 0, 1]))
    assert result["x"].flatten().tolist() == [3.0, 2.0, 12.0]
    assert macs.tolist() == [5, 0, 5]
    assert features["x"].flatten().tolist() == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(("actions", "rows"), [([1, 0, 1, 0, 0], 2), ([0, 0, 0], 0), ([1, 1], 2), ([], 0)])
def test_the_body_is_called_with_the_rows_that_run_it_only(actions, rows):
    torch.manual_seed(0)
    unit = Residual()
    features = torch.randn(len(actions), CHANNELS, SIDE, SIDE)
    with watched(unit) as work:
        result, macs = unit.execute(features, decide(actions))
    assert work.rows["conv"] == rows
    assert macs.tolist() == [CHANNELS * CHANNELS * 9 * SIDE * SIDE * action for action in actions]
    for row, action in enumerate(actions):
        alone = unit.body(features[row : row + 1]) if action else features[row : row + 1]
        torch.testing.assert_close(result[row : row + 1], alone, rtol=0, atol=1e-6)


def test_rows_of_the_same_width_are_computed_together_and_at_their_own_width():
    torch.manual_seed(0)
    unit = Width()
    features = torch.randn(5, CHANNELS, SIDE, SIDE)
    with watched(unit) as work:
        result, macs = unit.execute(features, decide([2, 4, 2, 1, 2]))
    per_channel = CHANNELS * 9 * SIDE * SIDE
    assert macs.tolist() == [2 * per_channel, 4 * per_channel, 2 * per_channel, per_channel, 2 * per_channel]
    assert work.calls["conv"] == 3
    assert work.macs == 11 * per_channel
    assert result[3, 1:].abs().sum() == 0
    assert result[0, 1].abs().sum() > 0


def test_without_a_gate_everything_runs():
    unit = ModuleUnit(nn.Linear(3, 2))
    result, macs = unit.execute(torch.ones(4, 3), None)
    assert result.shape == (4, 2)
    assert macs.tolist() == [6] * 4


def test_dense_training_mixes_body_and_skip_path_by_the_relaxed_weight():
    weight = torch.tensor([0.25, 1.0, 0.0], requires_grad=True)
    x = torch.tensor([[2.0], [2.0], [2.0]])
    mixed = Triple().relax({"x": x}, decide([0, 1, 0], weight))["x"]
    # 0.25 * 6 + 0.75 * 2 = 3; the slope in the weight is 6 - 2.
    assert mixed.flatten().tolist() == [3.0, 6.0, 2.0]
    mixed.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [4.0, 4.0, 4.0]


def test_a_mask_finer_than_a_row_mixes_by_the_action():
    mask = torch.ones(2, 1, SIDE, SIDE)
    unit = Residual()
    x = torch.randn(2, CHANNELS, SIDE, SIDE)
    mixed = unit.relax(x, decide([1, 0], mask))
    torch.testing.assert_close(mixed[0], unit.body(x)[0])
    assert torch.equal(mixed[1], x[1])


def test_a_unit_without_a_skip_path_says_so_when_a_row_would_skip_it():
    unit = ModuleUnit(nn.Identity())
    with pytest.raises(ValueError, match="`ModuleUnit` must have a skip path to be gated by rows"):
        unit.execute(torch.ones(2, 3), decide([1, 0]))


def test_an_unfinished_unit_says_what_is_missing():
    with pytest.raises(TypeError, match="`Unit` must implement `body`"):
        Unit()(torch.ones(1, 1))


def test_an_exit_reads_the_whole_result_or_what_tap_gives():
    x = torch.ones(2, 3)
    assert ModuleUnit(nn.Identity()).tap(x) is x
    scales = {"fine": torch.ones(1, 1), "coarse": torch.zeros(1, 1)}
    assert TwoScales().tap(scales) is scales["coarse"]
    with pytest.raises(TypeError, match="`ModuleUnit` must say by `tap` which of its features an exit reads"):
        ModuleUnit(nn.Identity()).tap((x, x))


def test_default_macs_count_one_row_and_hold_for_all():
    unit = ModuleUnit(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 2)))
    features = torch.zeros(0, 4, 8, 8)
    assert unit.macs(features).shape == (0,)
    assert unit.macs(torch.zeros(3, 4, 8, 8)).tolist() == [6 * 4 * 9 * 64 + 6 * 64 * 2] * 3

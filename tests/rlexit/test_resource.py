"""The resource loss: what pulls at a gate, and when it changes its sign."""

from __future__ import annotations

import math

import pytest
import torch

from rlexit.resource import ResourceLoss, dual_step, price_of_alpha, settled_shift


def test_the_published_alpha_is_a_price_of_nine_tenths():
    assert price_of_alpha(2e-4, 128, [4_718_592] * 35) == pytest.approx(0.896)
    assert price_of_alpha(2e-4, 128, [2.0, 1.0]) == pytest.approx(2e-4 * 128 * 1.5)


def test_the_price_pulls_at_a_straight_through_gate_by_share_times_slope():
    logits = torch.tensor([-1.0, 0.3, 2.0], requires_grad=True)
    p = logits.sigmoid()
    relaxed = (p > 0.5).float() + (p - p.detach())
    share = 0.04
    ResourceLoss("linear", 0.9)(0.5 + share * relaxed).backward()
    expected = 0.9 * share * p * (1 - p) / 3
    torch.testing.assert_close(logits.grad, expected.detach())


@pytest.mark.parametrize(
    ("mode", "mean", "sign"),
    [
        *[("linear", mean, 1.0) for mean in (0.1, 0.9)],
        *[("sign_target", 0.51, 1.0), ("sign_target", 0.49, -1.0)],
        *[("deadband", 0.53, 1.0), ("deadband", 0.51, 0.0), ("deadband", 0.49, -1.0)],
    ],
)
def test_which_way_a_mode_pushes(mode, mean, sign):
    loss = ResourceLoss(mode, 2.0, 0.5, band=0.02)
    relative = torch.full((4,), mean, requires_grad=True)
    value = loss(relative)
    value.backward()
    assert float(value.detach()) == pytest.approx(sign * 2.0 * mean)
    torch.testing.assert_close(relative.grad, torch.full((4,), sign * 2.0 / 4))


def test_a_dual_price_rises_above_its_target_and_falls_to_nothing_below():
    loss = ResourceLoss("dual", 0.0, 0.5, rate=0.1, price_max=0.03)
    loss.update(0.7)
    assert loss.price == pytest.approx(0.02)
    loss.update(0.9)
    assert loss.price == 0.03
    for _ in range(9):
        loss.update(0.4)
    assert loss.price == 0.0
    assert dual_step(1.0, 0.6, 0.5, 0.5, 9.0) == pytest.approx(1.05)


def test_other_modes_keep_their_price():
    loss = ResourceLoss("linear", 0.3)
    loss.update(0.9)
    assert loss.price == 0.3


def test_a_negative_price_and_an_unknown_mode_are_refused():
    with pytest.raises(ValueError, match="`price` must be at least 0, got -0.1. A negative price pays for compute."):
        ResourceLoss("linear", -0.1)
    with pytest.raises(ValueError, match="`cost` must be one of linear, sign_target, deadband, dual, got 'exact'"):
        ResourceLoss("exact")


@pytest.mark.parametrize("target", [0.2, 0.5, 0.9])
def test_gates_are_shifted_until_they_cost_the_target_or_a_little_less(target):
    asked: list[float] = []

    def cost(shift: float) -> float:
        asked.append(shift)
        return 1 / (1 + math.exp(shift))

    shift = settled_shift(cost, target, 13)
    assert asked[-1] == shift
    assert target - 0.001 < cost(shift) <= target


def test_a_target_that_no_shift_meets_is_told():
    with pytest.warns(RuntimeWarning, match="No shift of the gates meets a target of 0.1"):
        assert settled_shift(lambda shift: 0.3, 0.1) == 8

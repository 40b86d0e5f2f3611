"""Policy gradients of skip decisions: against exact enumeration, and on the originals' scale."""

from __future__ import annotations

import itertools

import pytest
import torch

from rlexit.gates.estimators import log_prob
from rlexit.policygradients import (
    blockdrop_reward,
    clipped_surrogate,
    leave_one_out,
    normalised,
    returns_to_go,
    self_critical_loss,
    skipnet_loss,
    skipnet_returns,
)

COSTS = torch.tensor([0.2, 0.3, 0.1])
PRICE = 0.7
LOGITS = torch.tensor([0.4, -0.2, 0.9])


def utility(paths: torch.Tensor) -> torch.Tensor:
    """(N,) of (N, 3) actions: something that no sum over gates explains, with an offset that baselines must remove."""
    return 5.0 + paths[:, 0] * paths[:, 1] - 0.5 * paths[:, 2] + 0.3 * paths[:, 1] * paths[:, 2]


def to_go(paths: torch.Tensor) -> torch.Tensor:
    return (paths * COSTS).flip(-1).cumsum(dim=-1).flip(-1)


def exact_gradient() -> torch.Tensor:
    logits = LOGITS.clone().requires_grad_()
    paths = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))
    chance = log_prob(logits.expand(8, 3), paths).sum(dim=1).exp()
    (chance * (utility(paths) - PRICE * (paths * COSTS).sum(dim=1))).sum().backward()
    assert logits.grad is not None
    return logits.grad


def estimates(count: int, paths: int, baseline: bool) -> torch.Tensor:
    """(count, 3) gradients, each from so many drawn paths of one row."""
    generator = torch.Generator().manual_seed(0)
    p = LOGITS.sigmoid()
    drawn = (torch.rand((paths, count, 3), generator=generator) < p).float()
    flat = drawn.reshape(-1, 3)
    returns = returns_to_go(utility(flat), to_go(flat), PRICE).reshape(paths, count, 3)
    advantage = leave_one_out(returns) if baseline else returns
    # d log p(g) / d logit = g - p
    return ((drawn - p) * advantage).mean(dim=0)


def test_the_gradient_of_drawn_paths_is_that_of_exact_enumeration():
    found = estimates(200_000, 4, baseline=True)
    error = 4 * found.std(dim=0) / found.shape[0] ** 0.5
    assert bool(((found.mean(dim=0) - exact_gradient()).abs() < error).all())


def test_a_baseline_of_other_paths_keeps_the_mean_and_takes_the_variance_away():
    plain, better = estimates(100_000, 4, baseline=False), estimates(100_000, 4, baseline=True)
    assert bool(((plain.mean(dim=0) - better.mean(dim=0)).abs() < 5 * plain.std(dim=0) / 100_000**0.5).all())
    assert bool((better.var(dim=0) < 0.2 * plain.var(dim=0)).all())


def test_one_path_has_no_others():
    with pytest.raises(ValueError, match="`paths` must be at least 2 for a baseline of other paths, got 1"):
        leave_one_out(torch.zeros(1, 2, 3))


def test_what_was_spent_before_a_gate_is_not_its_fault():
    returns = returns_to_go(torch.tensor([1.0]), torch.tensor([[0.6, 0.4, 0.1]]), 2.0)
    torch.testing.assert_close(returns, torch.tensor([[-0.2, 0.2, 0.8]]))


def test_advantages_are_normalised_over_rows_and_gates_together():
    found = normalised(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert float(found.mean()) == pytest.approx(0, abs=1e-6)
    assert float(found.std(unbiased=False)) == pytest.approx(1)


def test_at_ratio_one_the_surrogate_s_gradient_is_the_policy_gradient():
    logits = torch.tensor([[0.3, -0.4], [1.0, 0.2]], requires_grad=True)
    actions = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    advantage = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    new = log_prob(logits, actions)
    clipped_surrogate(new, new.detach(), advantage, 0.2).mean().backward()
    torch.testing.assert_close(logits.grad, -(advantage * (actions - logits.detach().sigmoid())) / 2)


def test_ratios_are_clipped_gate_by_gate_and_only_where_that_is_the_worse():
    old = torch.zeros(1, 4)
    new = torch.tensor([[1.5, 1.5, 0.5, 0.5]]).log()
    advantage = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    assert float(clipped_surrogate(new, old, advantage, 0.2)) == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8))


def test_permuting_rewards_across_rows_changes_the_gradient():
    actions = torch.tensor([[1, 0], [0, 1], [1, 1]])
    losses = torch.tensor([0.1, 2.0, 0.7])
    gradients = []
    for order in ([0, 1, 2], [2, 0, 1]):
        logits = torch.zeros((3, 2), requires_grad=True)
        returns = skipnet_returns(losses[order], actions, 0.1)
        skipnet_loss(losses, log_prob(logits, actions.float()), returns).backward()
        gradients.append(logits.grad)
    assert not torch.allclose(gradients[0], gradients[1], atol=1e-4)


def test_rewards_carry_no_gradient_into_the_losses_they_are_made_of():
    losses = torch.tensor([0.1, 2.0], requires_grad=True)
    assert not skipnet_returns(losses, torch.ones((2, 3), dtype=torch.int64), 0.1).requires_grad
    assert not returns_to_go(losses, torch.ones(2, 3), 0.1).requires_grad


def test_skipnet_s_returns_and_loss_are_the_original_s_on_fixed_numbers():
    losses = torch.tensor([0.5, 1.0])
    actions = torch.tensor([[1, 0, 0], [0, 1, 1]])
    returns = skipnet_returns(losses, actions, 0.3)
    # alpha / N = 0.1 per skip from the gate on.
    torch.testing.assert_close(returns, torch.tensor([[-0.3, -0.3, -0.4], [-0.9, -1.0, -1.0]]))
    log_probs = torch.full((2, 3), -0.5)
    # Cross-entropy is averaged, the other term summed: 0.75 - 0.01 * (-0.5) * (-3.9).
    assert float(skipnet_loss(losses, log_probs, returns)) == pytest.approx(0.75 - 0.01 * 0.5 * 3.9)


def test_blockdrop_s_reward_and_both_scales_of_its_loss_on_fixed_numbers():
    actions = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]])
    reward = blockdrop_reward(torch.tensor([True, True, False]), actions, 5.0)
    torch.testing.assert_close(reward, torch.tensor([1 - 1 / 16, 1 - 9 / 16, -5.0]))
    log_probs = torch.tensor([[-1.0, -2.0], [-0.5, -0.5]])
    better, greedy = torch.tensor([0.9, 0.2]), torch.tensor([0.4, 0.3])
    summed = -(0.5 * -3.0 + -0.1 * -1.0)
    assert float(self_critical_loss(log_probs, better, greedy)) == pytest.approx(summed / 2)
    assert float(self_critical_loss(log_probs, better, greedy, summed=True)) == pytest.approx(summed)
    learns = torch.tensor([False, True])
    assert float(self_critical_loss(log_probs, better, greedy, learns)) == pytest.approx(-(0.5 * -2 + -0.1 * -0.5) / 2)


def test_a_drawn_path_that_is_the_greedy_one_teaches_nothing():
    log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    self_critical_loss(log_probs, torch.tensor([0.7]), torch.tensor([0.7])).backward()
    assert torch.equal(log_probs.grad, torch.zeros(1, 2))

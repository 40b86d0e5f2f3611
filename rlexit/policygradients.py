"""Policy gradients of skip decisions as pure functions: returns, baselines, surrogates. B rows, G gates, K paths."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def returns_to_go(
    utility: Float[Tensor, " *rows"], cost_to_go: Float[Tensor, "*rows gates"], price: float
) -> Float[Tensor, "*rows gates"]:
    """G_i = U - lambda * sum_{j >= i} c_j: what follows from gate i on; what was spent before, it cannot change.

    Args:
        utility: (..., B) of the answer; no gradient flows into it.
        cost_to_go: (..., B, G) relative compute from each gate on.
        price: lambda.
    Source: Sutton and Barto 2018, section 13.3 (rewards before an action do not depend on it).
    """
    return utility.detach()[..., None] - price * cost_to_go.detach()


def leave_one_out(returns: Float[Tensor, "paths rows gates"]) -> Float[Tensor, "paths rows gates"]:
    """Each return minus the mean of the same row's other paths; the mean gradient is unchanged.

    Args:
        returns: (K, B, G), K at least 2.
    Raises:
        ValueError: there is one path only.
    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!".
    """
    paths = returns.shape[0]
    if paths < 2:
        raise ValueError(f"`paths` must be at least 2 for a baseline of other paths, got {paths}.")
    return returns - (returns.sum(dim=0, keepdim=True) - returns) / (paths - 1)


def normalised(advantage: Float[Tensor, "*rows gates"]) -> Float[Tensor, "*rows gates"]:
    """Advantages of mean 0 and deviation 1 over everything; to be done after the baseline is subtracted."""
    return (advantage - advantage.mean()) / (advantage.std(unbiased=False) + 1e-8)


def clipped_surrogate(
    new_log_prob: Float[Tensor, "*rows gates"],
    old_log_prob: Float[Tensor, "*rows gates"],
    advantage: Float[Tensor, "*rows gates"],
    clip: float,
) -> Float[Tensor, " *rows"]:
    """- sum_i min(rho_i A_i, clip(rho_i, 1 - clip, 1 + clip) A_i): a ratio per gate, because a joint one explodes.

    Args:
        new_log_prob: (..., B, G) of the actions taken, with gradient.
        old_log_prob: (..., B, G) when they were drawn.
        advantage: (..., B, G).
        clip: of every gate's ratio.
    Returns:
        (..., B) to be averaged.
    Source: Schulman et al. 2017, arXiv 1707.06347, equation 7.
    """
    ratio = (new_log_prob - old_log_prob.detach()).exp()
    advantage = advantage.detach()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).sum(dim=-1)


def skipnet_returns(
    losses: Float[Tensor, " rows"], actions: Int[Tensor, "rows gates"], alpha: float, beta: float = 1.0
) -> Float[Tensor, "rows gates"]:
    """r_i = -(beta * L - alpha / N * sum_{j >= i} (1 - g_j)): every gate's skips from there on are rewarded alike.

    Args:
        losses: (B,) cross-entropy of the path; detached here (skipnet's ImageNet code forgets to).
        actions: (B, G) 1 runs, 0 skips.
        alpha: reward for skipping everything.
        beta: 1 for CIFAR and SVHN; alpha / N for ImageNet, which makes alpha a mere scale.
    Source: Wang et al. 2018, arXiv 1711.09485, equation 6; cifar/train_rl.py:223-249.
    """
    skipped = (1 - actions).to(losses.dtype)
    to_go = skipped.flip(-1).cumsum(dim=-1).flip(-1)
    return -(beta * losses.detach()[:, None] - alpha / actions.shape[1] * to_go)


def skipnet_loss(
    losses: Float[Tensor, " rows"],
    log_probs: Float[Tensor, "rows gates"],
    returns: Float[Tensor, "rows gates"],
    weight: float = 0.01,
) -> Float[Tensor, ""]:
    """Mean cross-entropy minus weight * sum of log p_i r_i over rows and gates: at 128 rows a weight of 1.28 per row.

    Row b's log-probabilities meet row b's returns only; skipnet's ImageNet code multiplies (B,) by (B, 1), which destroys
    the credit of single rows.

    Args:
        losses: (B,) cross-entropy of the path, with gradient.
        log_probs: (B, G) of the actions taken, with gradient.
        returns: (B, G) of `skipnet_returns`.
        weight: `rl-weight`, which the paper does not mention.
    Source: skipnet, cifar/train_rl.py:223-249, under torch 0.2's `reinforce`, which sums.
    """
    return losses.mean() - weight * (log_probs * returns.detach()).sum()


def blockdrop_reward(
    right: Bool[Tensor, " rows"], actions: Int[Tensor, "rows gates"], penalty: float
) -> Float[Tensor, " rows"]:
    """1 - (share of units run)^2 where the answer is right, -penalty where it is wrong. Units, not multiply-adds.

    Args:
        right: (B,) whether the path's answer is right.
        actions: (B, G) 1 runs, 0 skips.
        penalty: gamma; 1 in the curriculum, 5 or 10 when the trunk is trained along.
    Source: Wu et al. 2018, arXiv 1711.08393, equation 3; cl_training.py:43-55.
    """
    share = actions.to(torch.float32).mean(dim=1)
    return torch.where(right, 1 - share**2, torch.full_like(share, -penalty))


def self_critical_loss(
    log_probs: Float[Tensor, "rows gates"],
    reward: Float[Tensor, " rows"],
    greedy_reward: Float[Tensor, " rows"],
    learns: Bool[Tensor, " gates"] | None = None,
    *,
    summed: bool = False,
) -> Float[Tensor, ""]:
    """-(R(drawn) - R(greedy)) * sum_i log p_i, averaged over rows: zero where the drawn path is the greedy one.

    Args:
        log_probs: (B, G) of the actions drawn, with gradient.
        reward: (B,) of the drawn path.
        greedy_reward: (B,) of the greedy path of the same row.
        learns: (G,) gates that the curriculum has reached; all by default.
        summed: sum over rows instead, as BlockDrop's finetune.py does beside an averaged cross-entropy.
    Source: Wu et al. 2018, arXiv 1711.08393, equation 5; cl_training.py:95-104, finetune.py:91-95.
    """
    kept = log_probs if learns is None else log_probs * learns.to(log_probs.dtype)
    terms = -(reward - greedy_reward).detach()[:, None] * kept
    return terms.sum() if summed else terms.sum(dim=1).mean()

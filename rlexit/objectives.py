"""Losses as pure functions, unreduced: (B, K), one number per row and exit."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def kl_divergence(
    teacher_log_probabilities: Float[Tensor, "batch outputs"],
    student_log_probabilities: Float[Tensor, "batch exits outputs"],
) -> Float[Tensor, "batch exits"]:
    """KL(teacher || exit) = sum_a p_T (log p_T - log p_exit), in nats: mode-covering behaviour cloning.

    Args:
        teacher_log_probabilities: (B, A), no gradient flows into it.
        student_log_probabilities: (B, K, A).
    Returns:
        (B, K). The reference divides by A as well (PyTorch's 'mean'); Adam hardly notices.
    Source: Wolczyk et al. 2021, arXiv 2106.05409, supplement B.4.
    """
    teacher = teacher_log_probabilities.detach()[:, None]
    # A probability of exactly 0 contributes 0, although its logarithm is -inf.
    difference = (teacher.clamp_min(-1e4) - student_log_probabilities.clamp_min(-1e4)) * teacher.exp()
    return difference.sum(dim=-1)


def softened_divergence(
    teacher_log_probabilities: Float[Tensor, "batch outputs"],
    student_log_probabilities: Float[Tensor, "batch exits outputs"],
    temperature: float,
) -> Float[Tensor, "batch exits"]:
    """T^2 KL(teacher || exit), both softened by a temperature T, in nats: what is unlikely to both teaches too.

    Args:
        teacher_log_probabilities: (B, A), no gradient flows into it; logits do as well.
        student_log_probabilities: (B, K, A); logits do as well.
        temperature: T; its square keeps the gradients as large as at 1.
    Returns:
        (B, K).
    Source: Hinton et al. 2015, arXiv 1503.02531, section 2.1.
    """
    softened = [
        (one / temperature).log_softmax(dim=-1) for one in (teacher_log_probabilities, student_log_probabilities)
    ]
    return temperature**2 * kl_divergence(*softened)


def cross_entropy(
    labels: Int[Tensor, " batch"], student_log_probabilities: Float[Tensor, "batch exits outputs"]
) -> Float[Tensor, "batch exits"]:
    """-log p_exit(label), in nats, for every exit.

    Args:
        labels: (B,) class or action index.
        student_log_probabilities: (B, K, A).
    Returns:
        (B, K).
    """
    exits = student_log_probabilities.shape[1]
    log_probabilities = student_log_probabilities.flatten(0, 1)
    return functional.nll_loss(log_probabilities, labels.repeat_interleave(exits), reduction="none").reshape(-1, exits)


def agreement(
    teacher_log_probabilities: Float[Tensor, "batch outputs"],
    student_log_probabilities: Float[Tensor, "batch exits outputs"],
) -> Float[Tensor, "batch exits"]:
    """1 where an exit's likeliest output is the teacher's, else 0; (B, K)."""
    chosen = student_log_probabilities.argmax(dim=-1)
    return (chosen == teacher_log_probabilities.argmax(dim=-1)[:, None]).float()


def hint_distance(wanted: Float[Tensor, "batch ..."], found: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """|found - wanted|^2 / mean |wanted|^2: how far features are from those of the full network, 1 for all zeros.

    Args:
        wanted: (B, ...) no gradient flows into it.
        found: (B, ...).
    Returns:
        (B,).
    Source: Romero et al. 2015 (FitNets), arXiv 1412.6550, equation 3, where features are of one shape and need no regressor.
    """
    target, given = wanted.detach().float().flatten(1), found.float().flatten(1)
    return (given - target).square().sum(dim=1) / target.square().sum(dim=1).mean()

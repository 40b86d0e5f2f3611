"""Estimators: how a hard decision lets a gradient through in training. In evaluation all of them are p > 0.5."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from rlexit.gates import Decision, Mode
from rlexit.registry import Registry

Logits = Float[Tensor, " batch *choices"]


@runtime_checkable
class Estimator(Protocol):
    """Turns logits of yes/no choices into hard values and weights for dense training.

    `stochastic`: whether training should draw (hand `forward` a generator); all can be sampled.
    """

    stochastic: bool

    def relax(self, logits: Logits, hard: Logits, noise: Logits | None) -> Logits:
        """Weights of the body in dense training, with whatever gradient the estimator gives.

        Args:
            logits: (B, ...) before the sigmoid.
            hard: (B, ...) the choices, 0 or 1.
            noise: (B, ...) logistic noise with which they were drawn; None where they were not drawn.
        """
        ...


estimators: Registry[type[Estimator]] = Registry("estimator")


def _straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    # In this order the value is exactly 0 or 1.
    return hard + (soft - soft.detach())


@estimators.register("ste_det")
@dataclass(frozen=True)
class Deterministic:
    """1[p > 0.5] forwards, the identity onto p backwards.

    Source: SkipNet's code, cifar/models.py:571 (Wang et al. 2018, arXiv 1711.09485, equation 7); used by DDI.
    """

    stochastic = False

    def relax(self, logits: Logits, hard: Logits, noise: Logits | None) -> Logits:
        """The choices, with the gradient of p."""
        return _straight_through(hard, logits.sigmoid())


@estimators.register("ste_bernoulli")
@dataclass(frozen=True)
class Bernoulli(Deterministic):
    """A draw with probability p forwards, the identity onto p backwards; p > 0.5 in evaluation.

    Source: Bengio et al. 2013, arXiv 1308.3432, section 4 (there, with the sigmoid's derivative).
    """

    stochastic = True


@estimators.register("gumbel_sigmoid")
@dataclass(frozen=True)
class GumbelSigmoid:
    """A draw with probability p forwards, the gradient of the relaxed draw sigmoid((logit + noise) / temperature).

    Args:
        temperature: > 0; small ones are nearer to hard choices and noisier.
    Source: Maddison et al. 2017, arXiv 1611.00712 (binary Concrete); Jang et al. 2017, arXiv 1611.01144.
    """

    temperature: float = 1.0
    stochastic = True

    def relax(self, logits: Logits, hard: Logits, noise: Logits | None) -> Logits:
        """The draw, with the gradient of its relaxation."""
        shifted = logits if noise is None else logits + noise
        return _straight_through(hard, (shifted / self.temperature).sigmoid())


@estimators.register("soft")
@dataclass(frozen=True)
class Soft:
    """Weights the body by p itself in training. An ablation: hard evaluation of what was trained soft collapses.

    Source: Wang et al. 2018, arXiv 1711.09485, table 3.
    """

    stochastic = False

    def relax(self, logits: Logits, hard: Logits, noise: Logits | None) -> Logits:
        """P."""
        return logits.sigmoid()


@estimators.register("reinforce")
@dataclass(frozen=True)
class Reinforce:
    """No gradient through the choice: the gate learns from the log-probability of what it drew."""

    stochastic = True

    def relax(self, logits: Logits, hard: Logits, noise: Logits | None) -> Logits:
        """The choices, without a gradient."""
        return hard


def explored(logits: Logits, bound: float) -> Logits:
    """Logits of bound * p + (1 - bound) * (1 - p), so that every choice is drawn now and then; p > 0.5 stays so.

    Args:
        logits: (B, ...) before the sigmoid.
        bound: in (0.5, 1]; 1 changes nothing, 0.8 keeps probabilities within [0.2, 0.8].
    Source: Wu et al. 2018 (BlockDrop), arXiv 1711.08393; cl_training.py:78.
    """
    if bound == 1:
        return logits
    p = logits.sigmoid()
    return torch.logit(bound * p + (1 - bound) * (1 - p))


def choose(
    logits: Logits,
    mode: Mode,
    estimator: Estimator,
    *,
    given: Float[Tensor, " batch *choices"] | None = None,
    generator: torch.Generator | None = None,
    training: bool = False,
) -> tuple[Logits, Logits]:
    """Hard yes/no choices and their weights in dense training.

    Args:
        logits: (B, ...) before the sigmoid.
        mode: greedy is p > 0.5, sample draws, replay repeats `given`.
        estimator: gives the gradient.
        given: (B, ...) the stored choices, for replay.
        generator: source of randomness, for sample.
        training: in evaluation the weights are the choices themselves, whatever the estimator.
    Returns:
        (B, ...) choices 0 or 1 without gradient, and (B, ...) weights.
    Raises:
        ValueError: replay without stored choices.
    """
    noise = None
    if mode == "replay":
        if given is None:
            raise ValueError("`given` must be the stored decision in replay, got None. Hand over what was drawn.")
        hard = given.detach().to(logits.dtype)
    elif mode == "sample":
        # The device of the generator need not be that of the logits.
        place = generator.device if generator is not None else logits.device
        uniform = torch.rand(logits.shape, generator=generator, device=place).to(logits.device)
        noise = torch.logit(uniform.clamp(1e-7, 1 - 1e-7))
        hard = (logits.detach() + noise > 0).to(logits.dtype)
    else:
        hard = (logits.detach() > 0).to(logits.dtype)
    return hard, (estimator.relax(logits, hard, noise) if training else hard)


def log_prob(logits: Logits, hard: Logits) -> Logits:
    """(B, ...) log-probability of choices 0 or 1, in nats, with gradient."""
    return -functional.softplus(torch.where(hard > 0.5, -logits, logits))


def entropy(logits: Logits) -> Logits:
    """(B, ...) -p log p - (1 - p) log(1 - p), in nats; BlockDrop's code has the first term only."""
    return functional.softplus(logits) - logits * logits.sigmoid()


def decision_of(
    logits: Float[Tensor, " batch"],
    mode: Mode,
    estimator: Estimator,
    given: Decision | None = None,
    generator: torch.Generator | None = None,
    training: bool = False,
) -> Decision:
    """One yes/no decision per row: see `choose`."""
    stored = given.action if given is not None else None
    hard, relaxed = choose(
        logits,
        mode,
        estimator,
        given=stored.to(logits.dtype) if stored is not None else None,
        generator=generator,
        training=training,
    )
    return Decision(hard.to(torch.int64), relaxed, log_prob(logits, hard), entropy(logits))

"""Entropy rule: leave when the answer is sharp."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from rlexit.rules import rules
from rlexit.state import ExitState


@rules.register("entropy")
@dataclass(frozen=True)
class EntropyRule:
    """Scores a row by the negative entropy of its answer, in [-log A, 0] nats.

    BranchyNet leaves where the entropy is below T; that is a threshold of -T here, since larger scores leave sooner.

    Source: Teerapittayanon et al. 2016, arXiv 1709.01686.
    """

    span = (-3.0, 0.0)
    needs_every_exit = False
    before_head = False

    def score(self, state: ExitState) -> Float[Tensor, " batch"]:
        """Sum of p log p, where 0 log 0 is 0."""
        log_probabilities = state.answered
        return (log_probabilities.exp() * log_probabilities.clamp_min(-1e4)).sum(dim=-1)

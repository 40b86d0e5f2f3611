"""Confidence rule: leave when the likeliest output is likely enough."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from rlexit.rules import rules
from rlexit.state import ExitState


@rules.register("confidence")
@dataclass(frozen=True)
class ConfidenceRule:
    """Scores a row by the largest probability of its answer, in [1/A, 1].

    Source: Kaya et al. 2019, arXiv 1810.07052; Wolczyk et al. 2021, arXiv 2106.05409 (strictly above the threshold).
    """

    span = (0.0, 1.0)
    needs_every_exit = False
    before_head = False

    def score(self, state: ExitState) -> Float[Tensor, " batch"]:
        """Largest probability of the answer."""
        return state.answered.amax(dim=-1).exp()

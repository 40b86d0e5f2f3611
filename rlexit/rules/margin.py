"""Margin rule: leave when the two likeliest outputs are far apart."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from rlexit.rules import rules
from rlexit.state import ExitState


@rules.register("margin")
@dataclass(frozen=True)
class MarginRule:
    """Scores a row by p(first) - p(second) of its answer, in [0, 1].

    Waits whenever two outputs tie, even if both are right. NOOP and FIRE often tie so in Atari.

    Source: breaking ties, Luo et al. 2005, JMLR 6:589 (there, for active learning).
    """

    span = (0.0, 1.0)
    needs_every_exit = False
    before_head = False

    def score(self, state: ExitState) -> Float[Tensor, " batch"]:
        """Difference of the two largest probabilities; 1 where there is only one output."""
        probabilities = state.answered.exp()
        if probabilities.shape[-1] == 1:
            return probabilities[:, 0]
        first, second = probabilities.topk(2, dim=-1).values.unbind(dim=-1)
        return first - second

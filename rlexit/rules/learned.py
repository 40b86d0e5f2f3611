"""Learned rule: leave when the network's own leave gate says so."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rlexit.rules import rules
from rlexit.state import ExitState

THRESHOLD = 0.5


@rules.register("learned")
@dataclass(frozen=True)
class LearnedRule:
    """Scores a row by the probability with which the leave gate of the exit lets it go, in [0, 1].

    The parameters are the network's (`StagedNetwork.set_leave_gates`), because they are trained and saved with it. The
    gate reads the features, not the answer: a row that goes on pays for the gate and for no head. A row that was not
    asked scores 0.
    """

    span = (0.0, 1.0)
    needs_every_exit = False
    before_head = True

    def score(self, state: ExitState) -> Float[Tensor, " batch"]:
        """p(leave) at the newest exit; raises RuntimeError where no leave gate was asked."""
        if not state.leaving:
            raise RuntimeError(
                "`learned` must score rows that a leave gate was asked for, got none. Consider them first."
            )
        decision = state.leaving[-1]
        chosen = decision.log_prob.detach().exp()
        return torch.where(decision.action > 0, chosen, 1 - chosen)

"""Patience rule: leave when enough exits in a row agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rlexit.rules import rules
from rlexit.state import ExitState


@rules.register("patience")
@dataclass(frozen=True)
class PatienceRule:
    """Scores a row by how many exits in a row, the newest included, have the same likeliest output: 1, 2, ...

    A row leaves where the score is above the threshold, so the paper's patience t is the threshold t - 1. The streak
    is read from the exits' own logits, not from ensembles, as PBEE does.

    Source: Zhou et al. 2020 (PABEE), arXiv 2006.04152; counted as in Zero Time Waste's evaluation (starts at 1).
    """

    span = (0.0, 3.0)
    needs_every_exit = True
    before_head = False

    def score(self, state: ExitState) -> Float[Tensor, " batch"]:
        """Length of the streak."""
        choices = state.logits.argmax(dim=-1)
        same = (choices == choices[:, -1:]).to(torch.int64)
        # A running product in plain multiplications: ONNX has no `cumprod`.
        going_on = same[:, -1]
        streak = going_on
        for exit in reversed(range(same.shape[1] - 1)):
            going_on = going_on * same[:, exit]
            streak = streak + going_on
        return streak.to(state.logits.dtype)

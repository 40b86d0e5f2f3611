"""Gates decide inside the network: whether a row runs a unit, how wide, or where. Here: what every gate has in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlexit.state import ExitState

Mode = Literal["greedy", "sample", "replay"]


@dataclass(frozen=True)
class Decision:
    """What a gate chose for each row.

    Args:
        action: (B,) 0 skips the unit; a positive value runs it (where the unit has several widths: which one).
        relaxed: (B,) weight of the unit's body in dense training, with gradient (straight-through), or the finer mask
            that the body itself applies: (B, C) channels, (B, 1, H, W) positions.
        log_prob: (B,) of the action, in nats.
        entropy: (B,) of the gate, in nats.
    """

    action: Int[Tensor, " batch"]
    relaxed: Float[Tensor, "batch ..."]
    log_prob: Float[Tensor, " batch"]
    entropy: Float[Tensor, " batch"]


class Gate(nn.Module):
    """Decides before a unit, row by row. A subclass implements `decide`; its own MACs are charged to every row asked."""

    def decide(
        self, state: ExitState, mode: Mode, given: Decision | None = None, generator: torch.Generator | None = None
    ) -> tuple[Decision, Any]:
        """Chooses for each row of the state.

        Args:
            state: the rows, before the unit.
            mode: greedy takes the likelier action, sample draws one, replay repeats `given` (for RL updates).
            given: the stored decision, for replay.
            generator: source of randomness, for sample.
        Returns:
            The decision, and the new `state.carry`.
        """
        raise TypeError(f"`{type(self).__name__}` must implement `decide`.")

    def macs(self, state: ExitState) -> Int[Tensor, " batch"]:
        """(B,) multiply-adds of the gate itself."""
        return torch.zeros_like(state.macs)

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
        channels: (B, C) weights of the unit's channels, likewise, where a gate decides about them beside the whole unit.
        log_prob: (B,) of the action, in nats.
        entropy: (B,) of the gate, in nats.
    """

    action: Int[Tensor, " batch"]
    relaxed: Float[Tensor, "batch ..."]
    log_prob: Float[Tensor, " batch"]
    entropy: Float[Tensor, " batch"]
    channels: Float[Tensor, "batch channels"] | None = None


class Gate(nn.Module):
    """Decides before a unit, row by row. A subclass implements `decide`; its own MACs are charged to every row asked.

    It is given the state with `features` reduced to what the unit lets a gate see (`Unit.glance`). `may_skip`: whether it
    may choose action 0, which needs a unit with a skip path. `decides`: False where it has no choice and only prepares
    what later gates read, so that its log-probability means nothing.
    """

    may_skip = True
    decides = True

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

    def macs(self, state: ExitState, decision: Decision | None = None) -> Int[Tensor, " batch"]:
        """(B,) multiply-adds of the gate itself, given what it decided; the most that it may cost without a decision."""
        return torch.zeros_like(state.macs)

    def expected_macs(self, state: ExitState, decision: Decision) -> Float[Tensor, " batch"]:
        """(B,) `macs` with whatever gradient the relaxed decision gives."""
        return self.macs(state, decision).to(torch.float32)

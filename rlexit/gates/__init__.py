"""Gates decide inside the network: whether a row runs a unit, how wide, or where. Here: what every gate has in common.

A new kind of gate is a new file here that registers a builder; the conformance tests pick it up.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlexit.config import GateConfig
from rlexit.registry import Registry
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
    what later gates read, so that its log-probability means nothing. `width`: how many channels it decides about, which
    must be as many as the unit asks for. `bound`: of exploration, the most that the probability of an action can be.
    """

    may_skip = True
    decides = True
    width = 0
    bound = 1.0

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

    def offsets(self) -> list[nn.Parameter]:
        """The parameters that add to the logits of every row alike; none by default. `shift` adds to each, by default."""
        return []

    @property
    def shifts(self) -> bool:
        """Whether the gate has a logit of its own that `shift` moves; where it is one for whole rows, `level` tells it."""
        return bool(self.offsets())

    @torch.no_grad()
    def shift(self, by: float) -> None:
        """Adds to the logit of action 1, or to those of the channels where these are all it decides, for every row.

        Action 1 runs the unit; of gates that stand elsewhere, it leaves, or computes a new answer.

        Raises:
            TypeError: the gate has no such logit.
        """
        offsets = self.offsets()
        if not offsets:
            raise TypeError(
                f"`{type(self).__name__}` must have a logit of its own to be shifted. Use gates of another kind."
            )
        for parameter in offsets:
            parameter.add_(by)

    def slopes(self) -> list[Tensor]:
        """The parameters that multiply the logits when they are multiplied together with `offsets`; none by default.

        What gates share is told by one of them.
        """
        return []

    @torch.no_grad()
    def scale(self, by: float) -> None:
        """Multiplies the logits of every row: greedy decisions stay as they are, and drawn ones come nearer to them.

        To be called for all gates of a network, because some share layers. One without logits of its own stays as it is.

        Args:
            by: positive.
        """
        for parameter in (*self.offsets(), *self.slopes()):
            parameter.mul_(by)

    def level(self, state: ExitState) -> Float[Tensor, " batch"]:
        """(B,) the logit of action 1 that `shift` moves; raises TypeError where `shift` does."""
        raise TypeError(f"`{type(self).__name__}` must have a logit of its own to be read. Use gates of another kind.")

    def macs(self, state: ExitState, decision: Decision | None = None) -> Int[Tensor, " batch"]:
        """(B,) multiply-adds of the gate itself, given what it decided; the most that it may cost without a decision."""
        return torch.zeros_like(state.macs)

    def expected_macs(self, state: ExitState, decision: Decision) -> Float[Tensor, " batch"]:
        """(B,) `macs` with whatever gradient the relaxed decision gives."""
        return self.macs(state, decision).to(torch.float32)


def opened(gate: Any, rows: int, device: torch.device | None = None) -> Decision:
    """The decision of a gate that runs everything: the unit, with all its channels; log-probability and entropy are 0.

    Args:
        gate: says how many channels there are.
        rows: B.
        device: of the rows.
    """
    ones, nothing = torch.ones(rows, device=device), torch.zeros(rows, device=device)
    channels = torch.ones((rows, gate.width), device=device) if gate.width else None
    return Decision(ones.to(torch.int64), ones, nothing, nothing, channels)


@dataclass(frozen=True)
class Site:
    """A place for a gate.

    Args:
        name: of the unit.
        channels: of the map that the unit lets a gate see.
        width: channel decisions that the unit takes (`Unit.width`).
    """

    name: str
    channels: int
    width: int = 0


# Builders of the gates of a whole network, because some share weights over depth: from the gated places in the order of
# execution, the config, and the first unit, which sees the network's inputs.
Builder = Callable[[Sequence[Site], GateConfig, Site | None], dict[str, Gate]]
gates: Registry[Builder] = Registry("gate")


def build_gates(sites: Sequence[Site], config: GateConfig, entry: Site | None = None) -> dict[str, Gate]:
    """The gates of a network, by unit name, for `StagedNetwork.set_gates`.

    Args:
        sites: gated places in the order of execution.
        config: which gates, and their settings.
        entry: the first unit, where gates that look at the input stand; `random` and `policy_net` need it.
    Raises:
        LookupError: no such kind of gate.
        ValueError: the kind does not fit the sites.
    """
    return gates[config.kind](sites, config, entry)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

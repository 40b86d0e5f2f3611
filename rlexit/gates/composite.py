"""Both granularities: the layer gate first, the channel gate only for rows that run the unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlexit.config import GateConfig, require
from rlexit.gates import Decision, Gate, Mode, Site, gates
from rlexit.state import ExitState, put, take

KIND = "mgl2s"


class CompositeGate(Gate):
    """G^L then G^C: a row that skips the unit is never shown to the channel gate in evaluation.

    In training both see every row, because the price of running the unit depends on the channels that it would keep.

    Args:
        layer: skips the unit, or not.
        channel: chooses channels; carries nothing.
    Source: Wang et al. 2020 (DDI), arXiv 1907.04523, equation 3.
    """

    def __init__(self, layer: Gate, channel: Gate) -> None:
        super().__init__()
        self.layer = layer
        self.channel = channel
        self.width = channel.width
        self.bound = min(layer.bound, channel.bound)

    def decide(
        self, state: ExitState, mode: Mode, given: Decision | None = None, generator: torch.Generator | None = None
    ) -> tuple[Decision, Any]:
        """Whether each row runs the unit, and with which channels."""
        whole, carry = self.layer.decide(state, mode, given, generator)
        runs = whole.action > 0
        if self.training or bool(runs.all()):
            fine, _ = self.channel.decide(state, mode, given, generator)
        else:
            nothing = torch.zeros(len(state), device=state.device)
            blank = torch.zeros((len(state), self.width), device=state.device)
            fine = Decision(whole.action, nothing, nothing, nothing, blank)
            index = torch.nonzero(runs).flatten()
            if len(index):
                stored = take(given, index) if given is not None else None
                part, _ = self.channel.decide(state.select(index), mode, stored, generator)
                fine = put(fine, index, part)
        decision = replace(
            whole,
            log_prob=whole.log_prob + fine.log_prob * runs,
            entropy=whole.entropy + fine.entropy * runs,
            channels=fine.channels,
        )
        return decision, carry

    def offsets(self) -> list[nn.Parameter]:
        """Of both."""
        return [*self.layer.offsets(), *self.channel.offsets()]

    def slopes(self) -> list[Tensor]:
        """Of both."""
        return [*self.layer.slopes(), *self.channel.slopes()]

    @property
    def shifts(self) -> bool:
        """Whether the layer gate has a logit of its own."""
        return self.layer.shifts

    def shift(self, by: float) -> None:
        """Moves the layer gate's."""
        self.layer.shift(by)

    def level(self, state: ExitState) -> Float[Tensor, " batch"]:
        """(B,) of the layer gate."""
        return self.layer.level(state)

    def macs(self, state: ExitState, decision: Decision | None = None) -> Int[Tensor, " batch"]:
        """(B,) the layer gate's, and the channel gate's where the unit is run."""
        fine = self.channel.macs(state)
        return self.layer.macs(state) + (fine if decision is None else fine * (decision.action > 0))

    def expected_macs(self, state: ExitState, decision: Decision) -> Float[Tensor, " batch"]:
        """(B,) the channel gate's weighed by the relaxed layer decision."""
        return self.layer.macs(state) + decision.relaxed * self.channel.macs(state)


@gates.register(KIND)
def composite_gates(sites: Sequence[Site], config: GateConfig, entry: Site | None = None) -> dict[str, Gate]:
    """The layer and channel gates that the config names, one after the other.

    Raises:
        ValueError: `layer` names gates that do not skip units alone, or `channel` gates that do not skip channels alone.
    """
    wanted = (
        ("layer", "skip units and no channels, such as lstm"),
        ("channel", "skip channels only, such as conv_channel"),
    )
    parts: list[dict[str, Gate]] = []
    for part, rule in wanted:
        kind: str = getattr(config, part)
        require(kind != KIND, f"gates.{part}", rule, kind)
        built = gates[kind](sites, config, entry)
        fits = [built[site.name].may_skip == (part == "layer") == (not built[site.name].width) for site in sites]
        require(all(fits), f"gates.{part}", rule, kind)
        parts.append(built)
    layers, channels = parts
    return {name: CompositeGate(gate, channels[name]) if name in channels else gate for name, gate in layers.items()}

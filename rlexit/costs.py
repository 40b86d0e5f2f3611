"""What a network costs: multiply-adds of every unit and head, and of leaving at every exit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from rlexit.gates import Gate
from rlexit.network import StagedNetwork
from rlexit.state import map_tensors
from rlexit.units import Unit


@dataclass(frozen=True)
class CostTable:
    """Multiply-adds of one row, every gate open.

    Args:
        units: unit name to MACs.
        heads: exit name to MACs.
        exits: MACs of leaving at each exit, all heads and gates of units before it included; leave gates, which
            only the rule `learned` asks, are not.
        full: MACs of the network without added heads and gates: what `relative_macs` is relative to.
    """

    units: dict[str, int]
    heads: dict[str, int]
    exits: tuple[int, ...]
    full: int

    def relative(self, macs: float) -> float:
        """MACs relative to the full, head-free network."""
        return macs / self.full


@torch.no_grad()
def cost_table(network: StagedNetwork, inputs: Any) -> CostTable:
    """Counts a network by passing one row of zeros through it, every gate open.

    Args:
        network: counted with all its heads.
        inputs: tree of (B, ...) tensors; only the shapes and dtypes are read.
    """
    state = network.begin(map_tensors(lambda leaf: torch.zeros_like(leaf[:1]), inputs))
    if network.reuse is not None:
        state = state.charge("reuse", network.reuse.macs(state))
    units: dict[str, int] = {}
    heads: dict[str, int] = {}
    exits: list[int] = []
    while not network.finished(state):
        name = network.unit_names[state.unit]
        if name in network.gates:
            gate: Gate = network.gates[name]  # type: ignore[assignment]
            unit: Unit = network.units[name]  # type: ignore[assignment]
            state = state.charge(name, gate.macs(replace(state, features=unit.glance(state.features))))
        before = state.macs
        state = network.advance(state)
        units[name] = int(state.macs - before)
        if network.at_exit(state):
            before = state.macs
            state = network.answer(state)
            heads[network.exit_names[state.exit - 1]] = int(state.macs - before)
            exits.append(int(state.macs))
    full = sum(units.values()) + heads[network.exit_names[-1]]
    return CostTable(units, heads, tuple(exits), full)


@torch.no_grad()
def part_macs(network: StagedNetwork, inputs: Any) -> dict[str, int]:
    """Multiply-adds of one row in every part that may run or not: what a chain of graphs is made of.

    Args:
        network: in evaluation mode.
        inputs: tree of (B, ...) tensors; only the shapes and dtypes are read.
    Returns:
        By `units.<name>`, `skips.<name>`, `gates.<name>`, `heads.<exit>`, `leave_gates.<exit>` and `reuse`.
    """
    state = network.begin(map_tensors(lambda leaf: torch.zeros_like(leaf[:1]), inputs))
    found = {"reuse": int(network.reuse.macs(state))} if network.reuse is not None else {}
    while not network.finished(state):
        name = network.unit_names[state.unit]
        unit: Any = network.units[name]
        if name in network.gates:
            gate: Any = network.gates[name]
            found[f"gates.{name}"] = int(gate.macs(replace(state, features=unit.glance(state.features))))
        if unit.skippable:
            found[f"skips.{name}"] = int(unit.skip_macs(state.features))
        before = state.macs
        state = network.advance(state)
        found[f"units.{name}"] = int(state.macs - before)
        if network.at_exit(state):
            exit, before = network.exit_names[state.exit], state.macs
            if exit in network.leave_gates:
                leave: Any = network.leave_gates[exit]
                found[f"leave_gates.{exit}"] = int(leave.macs(replace(state, features=network.tap(state))))
            state = network.answer(state)
            found[f"heads.{exit}"] = int(state.macs - before)
    return found


@torch.no_grad()
def spent_at_exits(network: StagedNetwork, inputs: Any) -> Int[Tensor, "batch exits"]:
    """(B, K) multiply-adds that each row has spent when it is answered at each exit, all heads before it included.

    Args:
        network: in evaluation mode; its gates decide greedily.
        inputs: (B, ...) raw inputs.
    """
    state = network.begin(inputs)
    found: list[Tensor] = []
    while not network.finished(state):
        state, decision = network.decide(state)
        state = network.advance(state, decision)
        if network.at_exit(state):
            state = network.answer(state)
            found.append(state.macs)
    return torch.stack(found, dim=1)


def measured_costs(network: StagedNetwork, batches: Iterable[Any]) -> CostTable:
    """A cost table whose exits cost what rows really spend on their way, on average: what they skip is not counted.

    Args:
        network: in evaluation mode.
        batches: raw inputs, one batch at least.
    """
    parts = list(batches)
    table = cost_table(network, parts[0])
    if not network.gates:
        return table
    spent = torch.cat([spent_at_exits(network, part) for part in parts])
    return replace(table, exits=tuple(round(macs) for macs in spent.double().mean(dim=0).tolist()))


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())

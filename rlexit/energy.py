"""Energy: what a pass costs where moving numbers is dearer than multiplying them; a three-level memory model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlexit.config import require
from rlexit.gates import Decision, Gate
from rlexit.network import StagedNetwork
from rlexit.state import ExitState, map_tensors
from rlexit.units import Unit


@dataclass(frozen=True)
class EnergyModel:
    """Energy per access and per multiply-add, relative to one multiply-add, and how often numbers move.

    Args:
        dram: per access to main memory.
        buffer: per access to the global buffer.
        register: per access to a register file.
        mac: per multiply-add.
        buffer_per_dram: buffer accesses for each number that comes from or goes to main memory.
        registers_per_mac: register accesses for each multiply-add.
    Raises:
        ValueError: a constant is negative or not finite.
    Source: constants as in Sze et al. 2017, arXiv 1703.09039, 65 nm; Wang et al. 2020 (DDI), arXiv 1907.04523, equation 6,
        where accesses come from a simulator. Here weights, inputs and outputs are moved once per layer.
    """

    dram: float = 200.0
    buffer: float = 6.0
    register: float = 1.0
    mac: float = 1.0
    buffer_per_dram: float = 2.0
    registers_per_mac: float = 3.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            require(0 <= value < float("inf"), f"energy.{name}", "be at least 0 and finite", value)

    def of(self, macs: float, moved: float) -> float:
        """Energy of so many multiply-adds on so many numbers moved."""
        per_number = self.dram + self.buffer * self.buffer_per_dram
        return macs * (self.mac + self.register * self.registers_per_mac) + moved * per_number

    def spelled(self) -> str:
        """The constants in one line, to be printed beside every result."""
        return ", ".join(f"{name} {value:g}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class EnergyTable:
    """Energy of one row, every gate open, by part of the network.

    Args:
        macs: part to multiply-adds.
        energy: part to energy, in multiply-adds' worth.
        full: energy of the network without added heads and gates: what `relative` is relative to.
        model: the constants.
    """

    macs: Mapping[str, int]
    energy: Mapping[str, float]
    full: float
    model: EnergyModel

    def expected(self, parts: Mapping[str, Float[Tensor, " batch"]]) -> Float[Tensor, " batch"]:
        """(B,) energy of expected multiply-adds, with their gradient: each part's scales with its executed share.

        Args:
            parts: `Trace.expected_parts`.
        Raises:
            ValueError: a part is not in the table.
        """
        strange = [name for name in parts if name not in self.macs]
        if strange or not parts:
            raise ValueError(
                f"`parts` must be those of the network that the table was made for, got {strange[:1] or 'none'}. "
                "Make a table for this network."
            )
        shares = [value * (self.energy[name] / self.macs[name]) for name, value in parts.items() if self.macs[name]]
        return torch.stack(shares).sum(dim=0)

    def relative(self, parts: Mapping[str, Float[Tensor, " batch"]]) -> Float[Tensor, " batch"]:
        """(B,) expected energy relative to the full network: what a resource loss takes in place of relative MACs."""
        return self.expected(parts) / self.full


@torch.no_grad()
def energy_table(network: StagedNetwork, inputs: Any, model: EnergyModel | None = None) -> EnergyTable:
    """Counts a network by passing one row of zeros through it, every gate open.

    Args:
        network: in evaluation mode.
        inputs: tree of (B, ...) tensors; only the shapes and dtypes are read.
        model: the constants.
    """
    model = model or EnergyModel()
    macs: dict[str, int] = {}
    moved: dict[str, int] = {}

    def note(part: str, before: ExitState, after: ExitState, numbers: list[int]) -> None:
        macs[part], moved[part] = int(after.macs - before.macs), sum(numbers)

    state = network.begin(map_tensors(lambda leaf: torch.zeros_like(leaf[:1]), inputs))
    while not network.finished(state):
        name, before = network.unit_names[state.unit], state
        unit: Unit = network.units[name]  # type: ignore[assignment]
        if name in network.gates:
            gate: Gate = network.gates[name]  # type: ignore[assignment]
            seen = replace(state, features=unit.glance(state.features))
            chosen, _ = gate.decide(seen, "greedy")
            with _moving(network) as numbers:
                _, carry = gate.decide(seen, "replay", _opened(chosen))
            charged = replace(state.charge(name, gate.macs(seen)), carry=carry)
            note(f"gates.{name}", before, charged, numbers)
            state = before = charged
        with _moving(network) as numbers:
            state = network.advance(state)
        note(f"units.{name}", before, state, numbers)
        if network.at_exit(state):
            exit = network.exit_names[state.exit]
            if exit in network.leave_gates:
                with _moving(network) as numbers:
                    asked, _ = network.consider(state)
                note(f"leave_gates.{exit}", state, asked, numbers)
            before = state
            with _moving(network) as numbers:
                state = network.answer(state)
            note(f"heads.{exit}", before, state, numbers)
    energy = {part: model.of(count, moved[part]) for part, count in macs.items()}
    own = f"heads.{network.exit_names[-1]}"
    full = sum(value for part, value in energy.items() if part.startswith("units.") or part == own)
    return EnergyTable(macs, energy, full, model)


def _opened(decision: Decision) -> Decision:
    """A decision of the same kind that runs everything, so that no part of a gate goes unasked."""
    channels = None if decision.channels is None else torch.ones_like(decision.channels)
    relaxed = torch.ones_like(decision.relaxed)
    return replace(decision, action=decision.action.clamp(min=1), relaxed=relaxed, channels=channels)


@contextmanager
def _moving(network: nn.Module) -> Iterator[list[int]]:
    """Collects how many numbers every layer with weights moves for one row: weights, inputs, outputs."""
    numbers: list[int] = []

    def moved(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        result = output[0] if isinstance(output, tuple) else output
        if result.is_meta:
            return  # counting multiply-adds moves nothing
        weights = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        numbers.append(weights + inputs[0].numel() + result.numel())

    layers = (nn.modules.conv._ConvNd, nn.Linear, nn.LSTMCell)
    handles = [part.register_forward_hook(moved) for part in network.modules() if isinstance(part, layers)]
    try:
        yield numbers
    finally:
        for handle in handles:
            handle.remove()

"""Controls: gates that know nothing of the row. What a learned gate must beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlexit.config import GateConfig, require
from rlexit.gates import Decision, Gate, Mode, Site, gates
from rlexit.gates.channel import ChannelGate
from rlexit.gates.composite import CompositeGate
from rlexit.gates.layer import LayerGate
from rlexit.gates.policy_net import EntryGate
from rlexit.state import ExitState

# Knuth's multiplicative hash and a prime, over integers below 2**31: products stay below 2**63.
_FACTOR = 2654435761 % (1 << 31)
_PRIME = (1 << 31) - 1


def _mixed(value: Int[Tensor, " *any"]) -> Int[Tensor, " *any"]:
    for _ in range(2):
        value = (value * _FACTOR + 12345) % _PRIME
        value = value ^ (value >> 15)
    return value % _PRIME


class HashGate(EntryGate):
    """Turns each input into a number, exactly and whatever the batch, so that random decisions can be repeated.

    Args:
        seed: another seed is another draw for every input.
    """

    key = "hash"

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def prepare(self, features: Tensor) -> Tensor:
        """(B,) integers; sums of integers do not depend on their order."""
        bits = features.detach().float().contiguous().flatten(1).view(torch.int32).to(torch.int64)
        places = torch.arange(bits.shape[1], device=bits.device)
        total = (_mixed(bits.abs() % _PRIME) * (_mixed(places) % 65521)).sum(dim=1) % _PRIME
        return _mixed((total + self.seed) % _PRIME)


class RandomGate(Gate):
    """Runs its unit for a given share of the rows, and keeps a given share of the channels; no parameters, no cost.

    Greedy decisions come from the hash of the input: the same row is always decided alike. Sampled ones are drawn.

    Args:
        index: of the unit among the gated ones.
        rate: share of rows that run the unit.
        width: channel decisions that the unit takes.
        channel_rate: share of channels kept.
    """

    def __init__(self, index: int, rate: float, width: int, channel_rate: float) -> None:
        super().__init__()
        self.index = index
        self.width = width
        rates = torch.tensor([rate, *[channel_rate] * width])
        self.register_buffer("rates", rates)

    rates: Tensor

    def decide(
        self, state: ExitState, mode: Mode, given: Decision | None = None, generator: torch.Generator | None = None
    ) -> tuple[Decision, Any]:
        """Decides by a number between 0 and 1; raises RuntimeError where the input was not hashed."""
        if not isinstance(state.carry, dict) or HashGate.key not in state.carry:
            raise RuntimeError("`random` must be asked after the first unit's gate, got no hash. Keep its entry gate.")
        shape = (len(state), 1 + self.width)
        if given is not None:
            parts = [given.action[:, None].float()] + ([given.channels] if given.channels is not None else [])
            chosen = (torch.cat(parts, dim=1) > 0.5).float()
        else:
            if mode == "sample":
                place = generator.device if generator is not None else state.device
                uniform = torch.rand(shape, generator=generator, device=place).to(state.device)
            else:
                places = torch.arange(shape[1], device=state.device) + self.index * 10007
                uniform = _mixed((state.carry[HashGate.key][:, None] + _mixed(places + 1)) % _PRIME) / _PRIME
            chosen = (uniform < self.rates).float()
        chance = torch.where(chosen > 0, self.rates, 1 - self.rates).clamp_min(1e-12)
        spread = -(torch.xlogy(self.rates, self.rates) + torch.xlogy(1 - self.rates, 1 - self.rates)).sum()
        channels = chosen[:, 1:] if self.width else None
        action = chosen[:, 0].to(torch.int64)
        return Decision(action, chosen[:, 0], chance.log().sum(dim=1), spread.expand(len(state)), channels), state.carry


class StaticGate(LayerGate):
    """One learned logit for all rows: static pruning of units.

    Args:
        config: estimator and first logit.
    """

    def __init__(self, config: GateConfig) -> None:
        super().__init__(config)
        self.logit = nn.Parameter(torch.tensor(config.bias))

    def offsets(self) -> list[nn.Parameter]:
        """The logit."""
        return [self.logit]

    def logits(self, state: ExitState) -> tuple[Float[Tensor, " batch"], Any]:
        """(B,) the same logit; nothing is carried."""
        return self.logit.expand(len(state)), state.carry


class StaticChannelGate(ChannelGate):
    """One learned logit per channel for all rows: static pruning of channels.

    Args:
        width: C.
        config: estimator and first logits.
    """

    def __init__(self, width: int, config: GateConfig) -> None:
        super().__init__(SameForAll(width, config.bias), width, config)

    def offsets(self) -> list[nn.Parameter]:
        """The logits."""
        return list(self.module.parameters())

    def slopes(self) -> list[Tensor]:
        """None besides."""
        return []


class SameForAll(nn.Module):
    """The same learned logits for every row.

    Args:
        width: C.
        bias: their first value.
    """

    def __init__(self, width: int, bias: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.full((width,), bias))

    def forward(self, features: Tensor) -> Tensor:
        """(B, ...) to (B, C)."""
        return self.logits.expand(len(features), -1)


@gates.register("static")
def static_gates(sites: Sequence[Site], config: GateConfig, entry: Site | None = None) -> dict[str, Gate]:
    """A learned logit per unit; where units take channel decisions, one per channel as well."""
    return {
        site.name: CompositeGate(StaticGate(config), StaticChannelGate(site.width, config))
        if site.width
        else StaticGate(config)
        for site in sites
    }


@gates.register("random")
def random_gates(sites: Sequence[Site], config: GateConfig, entry: Site | None = None) -> dict[str, Gate]:
    """A gate per site with the config's rates, after one that hashes the input."""
    advice = "Pass the first unit, whose map is the network's input."
    require(entry is not None and entry.name not in [site.name for site in sites], "entry", "be given", entry, advice)
    rates = config.rates * len(sites) if len(config.rates) == 1 else config.rates
    advice = "Give one share, or one per gated unit."
    require(len(rates) == len(sites), "gates.rates", f"have 1 or {len(sites)} shares", config.rates, advice)
    first = entry.name if entry is not None else ""
    found: dict[str, Gate] = {first: HashGate(config.seed)}
    for index, (site, rate) in enumerate(zip(sites, rates, strict=True)):
        found[site.name] = RandomGate(index, rate, site.width, config.channel_rate)
    return found

"""Channel gates: which channels of a unit a row computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlexit.config import GateConfig, require
from rlexit.gates import Decision, Gate, Mode, Site, gates
from rlexit.gates.estimators import choose, entropy, estimators, explored, log_prob
from rlexit.gates.layer import exactly, halving, last_linear, pooled_linear
from rlexit.macs import macs_per_row
from rlexit.state import ExitState


def channel_decision(
    logits: Float[Tensor, "batch channels"],
    mode: Mode,
    gate: ChannelGate,
    given: Decision | None,
    generator: torch.Generator | None,
) -> Decision:
    """Runs the unit with the chosen channels; log-probability and entropy are sums over the channels."""
    stored = given.channels if given is not None else None
    logits = explored(logits, gate.bound)
    hard, relaxed = choose(logits, mode, gate.estimator, given=stored, generator=generator, training=gate.training)
    ones = torch.ones(len(logits), device=logits.device)
    probability, spread = log_prob(logits, hard).sum(dim=1), entropy(logits).sum(dim=1)
    return Decision(ones.to(torch.int64), ones, probability, spread, relaxed)


class ChannelGate(Gate):
    """Keeps the channels whose sigmoid(logit) > 0.5; the unit itself is run.

    Args:
        module: map to (B, C) logits.
        width: C, as many as the unit takes.
        config: estimator, exploration, and whether gradients flow into the features.
    """

    may_skip = False

    def __init__(self, module: nn.Module, width: int, config: GateConfig) -> None:
        super().__init__()
        self.module = module
        self.width = width
        self.estimator = estimators[config.estimator]()
        self.bound = config.bound
        self.detach = config.detach

    def decide(
        self, state: ExitState, mode: Mode, given: Decision | None = None, generator: torch.Generator | None = None
    ) -> tuple[Decision, Any]:
        """Which channels each row computes; nothing is carried."""
        features = state.features.detach() if self.detach else state.features
        return channel_decision(exactly(self.module, features), mode, self, given, generator), state.carry

    def offsets(self) -> list[nn.Parameter]:
        """Of the last layer."""
        return [last_linear(self.module).bias]

    def slopes(self) -> list[Tensor]:
        """Of the last layer."""
        return [last_linear(self.module).weight]

    def macs(self, state: ExitState, decision: Decision | None = None) -> Int[Tensor, " batch"]:
        """(B,) multiply-adds of the small net."""
        return torch.full_like(state.macs, macs_per_row(self.module, state.features))


def _biased(module: nn.Sequential, bias: float) -> nn.Sequential:
    nn.init.constant_(last_linear(module).bias, bias)
    return module


def _wide(site: Site) -> int:
    advice = "Choose a channel mode of the unit, or gates that skip units."
    require(site.width > 0, f"sites[{site.name!r}].width", "be positive for a channel gate", site.width, advice)
    return site.width


@gates.register("conv_channel")
def conv_gates(sites: Sequence[Site], config: GateConfig, entry: Site | None = None) -> dict[str, Gate]:
    """One convolution with stride 2 and a linear layer: 12.5 % of a basic block.

    Source: Wang et al. 2020 (DDI), arXiv 1907.04523, figure 2b; batch norm and ReLU as in SkipNet's gate.
    """
    found: dict[str, Gate] = {}
    for site in sites:
        module = nn.Sequential(halving(site.channels, site.channels), pooled_linear(site.channels, _wide(site)))
        found[site.name] = ChannelGate(_biased(module, config.bias), site.width, config)
    return found


@gates.register("dense_channel")
def dense_gates(sites: Sequence[Site], config: GateConfig, entry: Site | None = None) -> dict[str, Gate]:
    """A dense layer's two convolutions, the first with stride 2 and half the outputs: 12.5 % of a dense layer.

    Source: Wang et al. 2020 (DDI), arXiv 1907.04523, figure 4b (whose caption says 11 %).
    """
    found: dict[str, Gate] = {}
    for site in sites:
        growth = _wide(site)
        module = nn.Sequential(
            nn.BatchNorm2d(site.channels),
            nn.ReLU(),
            nn.Conv2d(site.channels, 2 * growth, 1, stride=2, bias=False),
            nn.BatchNorm2d(2 * growth),
            nn.ReLU(),
            nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False),
            nn.BatchNorm2d(growth),
            nn.ReLU(),
            pooled_linear(growth, growth),
        )
        found[site.name] = ChannelGate(_biased(module, config.bias), growth, config)
    return found


@gates.register("pooled_channel")
def pooled_gates(sites: Sequence[Site], config: GateConfig, entry: Site | None = None) -> dict[str, Gate]:
    """Global average pooling and one linear layer: next to nothing, for maps on which a convolution is dear."""
    return {
        site.name: ChannelGate(_biased(pooled_linear(site.channels, _wide(site)), config.bias), site.width, config)
        for site in sites
    }

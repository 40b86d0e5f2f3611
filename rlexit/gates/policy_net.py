"""Policy net: one small network sees the input once and decides about every unit (BlockDrop)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from rlexit.config import GateConfig, require
from rlexit.gates import Decision, Gate, Mode, Site, gates
from rlexit.gates.layer import LayerGate, carried
from rlexit.macs import macs_per_row
from rlexit.state import ExitState

WIDTHS = (16, 32, 64)


class EntryGate(Gate):
    """Stands before the first unit, which always runs, and prepares what later gates read from the input."""

    may_skip = False
    decides = False
    key = ""

    def prepare(self, features: Tensor) -> Tensor:
        """(B, ...) what is carried, from the network's prepared inputs."""
        raise TypeError(f"`{type(self).__name__}` must implement `prepare`.")

    def decide(
        self, state: ExitState, mode: Mode, given: Decision | None = None, generator: torch.Generator | None = None
    ) -> tuple[Decision, Any]:
        """Lets everything pass; log-probability and entropy are 0."""
        ones = torch.ones(len(state), device=state.device)
        nothing = torch.zeros_like(ones)
        decision = Decision(ones.to(torch.int64), ones, nothing, nothing)
        return decision, carried(state, self.key, self.prepare(state.features))


class PolicyNet(nn.Module):
    """ResNet-8: a convolution, three basic blocks, pooling, a linear layer; 12.2 M multiply-adds on 3x32x32.

    Args:
        channels: of the input.
        outputs: gated units.
        bias: of the logits at first.
    Source: Wu et al. 2018 (BlockDrop), arXiv 1711.08393; models/resnet.py, whose shortcuts have no weights either.
    """

    def __init__(self, channels: int, outputs: int, bias: float) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, WIDTHS[0], 3, padding=1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU()
        )
        self.blocks = nn.ModuleList()
        for before, after in zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False):
            stride = 1 if before == after else 2
            self.blocks.append(
                nn.Sequential(
                    nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.ReLU(),
                    nn.Conv2d(after, after, 3, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                )
            )
        self.logits = nn.Linear(WIDTHS[-1], outputs)
        nn.init.constant_(self.logits.bias, bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, units) logits."""
        features = self.stem(images)
        for block in self.blocks:
            changed = block(features)
            if changed.shape != features.shape:
                features = functional.avg_pool2d(features, 2, ceil_mode=True, count_include_pad=False)
                features = functional.pad(features, (0, 0, 0, 0, 0, changed.shape[1] - features.shape[1]))
            features = functional.relu(changed + features)
        return self.logits(features.mean(dim=(2, 3)))


class PolicyNetGate(EntryGate):
    """Asks the policy net and hands its logits down the network.

    Args:
        module: inputs (B, ...) to (B, units) logits.
    """

    key = "policy"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def prepare(self, features: Tensor) -> Tensor:
        """(B, units) logits."""
        return self.module(features)

    def macs(self, state: ExitState, decision: Decision | None = None) -> Int[Tensor, " batch"]:
        """(B,) multiply-adds of the whole policy net, charged once."""
        return torch.full_like(state.macs, macs_per_row(self.module, state.features))


class ToldGate(LayerGate):
    """Decides by the logit that the policy net emitted for its unit; costs nothing more.

    Args:
        index: of the unit among the gated ones.
        config: see `LayerGate`.
    """

    def __init__(self, index: int, config: GateConfig) -> None:
        super().__init__(config)
        self.index = index

    def logits(self, state: ExitState) -> tuple[Float[Tensor, " batch"], Any]:
        """(B,) logit; raises RuntimeError where the policy net was not asked."""
        if not isinstance(state.carry, dict) or PolicyNetGate.key not in state.carry:
            raise RuntimeError("`policy_net` must be asked before the first unit, got no logits. Keep its entry gate.")
        return state.carry[PolicyNetGate.key][:, self.index], state.carry


@gates.register("policy_net")
def policy_net_gates(sites: Sequence[Site], config: GateConfig, entry: Site | None = None) -> dict[str, Gate]:
    """One policy net before the first unit, and a gate before each site that follows it."""
    advice = "Pass the first unit, whose map is the network's input."
    require(entry is not None and entry.name not in [site.name for site in sites], "entry", "be given", entry, advice)
    channels = entry.channels if entry is not None else 0
    first = entry.name if entry is not None else ""
    net = PolicyNetGate(PolicyNet(channels, len(sites), config.bias))
    return {first: net} | {site.name: ToldGate(index, config) for index, site in enumerate(sites)}

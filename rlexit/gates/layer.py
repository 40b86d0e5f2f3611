"""Layer gates: whether a row runs a unit. Recurrent over depth, or feed-forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlexit.config import GateConfig
from rlexit.gates import Decision, Gate, Mode, Site, gates
from rlexit.gates.estimators import decision_of, estimators, explored
from rlexit.macs import macs_per_row
from rlexit.state import ExitState

HIDDEN = 10


def exactly(module: Callable[..., Any], *inputs: Tensor) -> Any:
    """Runs a gate's net in full precision, whatever the units compute in.

    Under a price logits stay near 0, where bfloat16 decides otherwise than the evaluation.
    """
    with torch.autocast(inputs[0].device.type, enabled=False):
        return module(*(one.float() for one in inputs))


class LayerGate(Gate):
    """Runs the unit where sigmoid(logit) > 0.5. A subclass implements `logits` and `macs`.

    Args:
        config: estimator, exploration, and whether gradients flow into the features.
    """

    def __init__(self, config: GateConfig) -> None:
        super().__init__()
        self.estimator = estimators[config.estimator]()
        self.bound = config.bound
        self.detach = config.detach

    def logits(self, state: ExitState) -> tuple[Float[Tensor, " batch"], Any]:
        """(B,) logit of running the unit, and the new carry."""
        raise TypeError(f"`{type(self).__name__}` must implement `logits`.")

    def level(self, state: ExitState) -> Float[Tensor, " batch"]:
        """(B,) logit; nothing is carried on."""
        return self.logits(state)[0]

    def decide(
        self, state: ExitState, mode: Mode, given: Decision | None = None, generator: torch.Generator | None = None
    ) -> tuple[Decision, Any]:
        """Runs or skips the unit, row by row."""
        logits, carry = self.logits(state)
        decision = decision_of(explored(logits, self.bound), mode, self.estimator, given, generator, self.training)
        return decision, carry

    def seen(self, state: ExitState) -> Tensor:
        """What the gate reads, without a gradient where it is detached."""
        return state.features.detach() if self.detach else state.features


def carried(state: ExitState, key: str, value: Any) -> dict[str, Any]:
    """The state's carry with one gate family's part replaced."""
    return {**(state.carry or {}), key: value}


class DepthCell(nn.Module):
    """What recurrent gates share over depth: one LSTM cell and one logit.

    Args:
        bias: of the logit at first.
    """

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(HIDDEN, HIDDEN)
        self.logit = nn.Linear(HIDDEN, 1)
        nn.init.constant_(self.logit.bias, bias)

    def forward(self, embedded: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 10) embedding, hidden and cell state to (B,) logit and the new two."""
        hidden, memory = self.cell(embedded, (hidden, memory))
        return self.logit(hidden).flatten(), hidden, memory


class RecurrentGate(LayerGate):
    """Pooled features, an embedding of its own, then an LSTM shared by all gates of a network, carried along depth.

    970, 1130, 1450 multiply-adds for 16, 32, 64 channels: about 0.03 % of a basic block.

    Args:
        channels: of the map.
        core: shared; the first gate of the network registers it, so that a checkpoint holds it once.
        owner: whether this is the first gate.
        config: see `LayerGate`.
    Source: Wang et al. 2018 (SkipNet), arXiv 1711.09485; cifar/models.py:533-575 (hidden size 10, embedding with bias).
    """

    def __init__(self, channels: int, core: DepthCell, owner: bool, config: GateConfig) -> None:
        super().__init__(config)
        self.embed = nn.Linear(channels, HIDDEN)
        # The LSTM is shared, but units differ: what all rows of one have in common would else have to pass through it.
        self.offset = nn.Parameter(torch.zeros(()))
        if owner:
            self.core = core
        self._shared = (core,)  # a tuple hides it from torch, which would save it once per gate
        vector = torch.empty((1, HIDDEN), device="meta")
        self._core_macs = macs_per_row(core, vector, vector, vector)

    def logits(self, state: ExitState) -> tuple[Float[Tensor, " batch"], Any]:
        """(B,) logit; hidden and cell state start at 0 in every pass."""
        embedded = exactly(self.embed, self.seen(state).mean(dim=(2, 3), dtype=torch.float32))
        zeros = torch.zeros_like(embedded)
        hidden, memory = (state.carry or {}).get("depth", (zeros, zeros))
        logit, hidden, memory = exactly(self._shared[0], embedded, hidden, memory)
        return logit + self.offset, carried(state, "depth", (hidden, memory))

    def offsets(self) -> list[nn.Parameter]:
        """One number for the unit."""
        return [self.offset]

    def slopes(self) -> list[Tensor]:
        """The shared logit's, told by the first gate."""
        return [*self.core.logit.parameters()] if hasattr(self, "core") else []

    def macs(self, state: ExitState, decision: Decision | None = None) -> Int[Tensor, " batch"]:
        """(B,) multiply-adds of embedding, LSTM and logit."""
        return torch.full_like(state.macs, self.embed.in_features * HIDDEN + self._core_macs)


class FeedForwardGate(LayerGate):
    """A small net of its own before each unit; the logit is the difference of its two outputs.

    Args:
        module: map to (B, 2), the second being the logit of running.
        config: see `LayerGate`.
    Source: Wang et al. 2018 (SkipNet), arXiv 1711.09485; cifar/models.py:171-219 (I), 275-309 (II).
    """

    def __init__(self, module: nn.Module, config: GateConfig) -> None:
        super().__init__(config)
        self.module = module

    def logits(self, state: ExitState) -> tuple[Float[Tensor, " batch"], Any]:
        """(B,) logit; nothing is carried."""
        two = exactly(self.module, self.seen(state))
        return two[:, 1] - two[:, 0], state.carry

    def offsets(self) -> list[nn.Parameter]:
        """Of the last layer."""
        return [last_linear(self.module).bias]

    def slopes(self) -> list[Tensor]:
        """Of the last layer."""
        return [last_linear(self.module).weight]

    @torch.no_grad()
    def shift(self, by: float) -> None:
        """Moves both outputs, in opposite directions."""
        bias = last_linear(self.module).bias
        bias.add_(bias.new_tensor([-by / 2, by / 2]))

    def macs(self, state: ExitState, decision: Decision | None = None) -> Int[Tensor, " batch"]:
        """(B,) multiply-adds of the small net."""
        return torch.full_like(state.macs, macs_per_row(self.module, state.features))


def halving(channels: int, outputs: int, stride: int = 2) -> nn.Sequential:
    """3x3 convolution with a stride, batch norm, ReLU; odd sides are rounded up."""
    convolution = nn.Conv2d(channels, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def pooled_linear(channels: int, outputs: int) -> nn.Sequential:
    """Global average pooling and one linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs))


def last_linear(module: nn.Module) -> nn.Linear:
    """The last linear layer of a small net; its bias is the same for all rows."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]


def _biased(module: nn.Sequential, bias: float) -> nn.Sequential:
    with torch.no_grad():
        last_linear(module).bias.copy_(torch.tensor([-bias / 2, bias / 2]))
    return module


@gates.register("lstm")
def recurrent_gates(sites: Sequence[Site], config: GateConfig, entry: Site | None = None) -> dict[str, Gate]:
    """One LSTM over all gated units."""
    core = DepthCell(config.bias)
    return {site.name: RecurrentGate(site.channels, core, not index, config) for index, site in enumerate(sites)}


@gates.register("ff1")
def feed_forward_1(sites: Sequence[Site], config: GateConfig, entry: Site | None = None) -> dict[str, Gate]:
    """Pooling, two convolutions, a linear layer: 15.6 % of a basic block (the paper says 19 %)."""
    found: dict[str, Gate] = {}
    for site in sites:
        pool = nn.MaxPool2d(2, ceil_mode=True)
        c = site.channels
        module = nn.Sequential(pool, halving(c, c, stride=1), halving(c, c), pooled_linear(c, 2))
        found[site.name] = FeedForwardGate(_biased(module, config.bias), config)
    return found


@gates.register("ff2")
def feed_forward_2(sites: Sequence[Site], config: GateConfig, entry: Site | None = None) -> dict[str, Gate]:
    """One convolution and a linear layer: 12.5 % of a basic block."""
    return {
        site.name: FeedForwardGate(
            _biased(nn.Sequential(halving(site.channels, site.channels), pooled_linear(site.channels, 2)), config.bias),
            config,
        )
        for site in sites
    }

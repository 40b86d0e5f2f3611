"""Toy networks of every kind that the core must carry, and what hooks see of their work.

Multi-scale features, a gate with a carried state, widths per row, masks per pixel, memory across env steps, and a
residual unit that may be skipped: all go through the same `forward`, `run` and `replay`.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from rlexit.config import GateConfig, HeadConfig
from rlexit.ensembles import AdditiveEnsemble, Ensemble, GeometricEnsemble
from rlexit.exit_policy import ExitPolicy
from rlexit.gates import Decision, Gate, Mode, Site, build_gates
from rlexit.heads import Head, LinearHead, ModuleHead, PooledConvHead
from rlexit.macs import macs_per_row
from rlexit.network import StagedNetwork
from rlexit.residual import ResidualUnit
from rlexit.rules import rules
from rlexit.runtime import RunResult
from rlexit.state import ExitState
from rlexit.units import ModuleUnit, Unit

CHANNELS = 4
SIDE = 8
OUTPUTS = 5
EXITS = 3
# Rules that read an answer; the learned one reads the network's own gates (tests/rlexit/test_leave.py).
SCORERS = [name for name in rules if not rules[name].before_head]


# ---- what hooks see ----


class Work:
    """Multiply-adds, rows and calls per module, counted by hooks where the work is done."""

    def __init__(self) -> None:
        self.macs = 0
        self.rows: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()


@contextmanager
def watched(network: nn.Module) -> Iterator[Work]:
    """Counts what every module of a network really computes; the counter's own runs on meta tensors are no work."""
    work = Work()

    def hook(name: str) -> Callable[..., None]:
        def seen(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            first = inputs[0]
            while not isinstance(first, Tensor):
                first = next(iter(first.values())) if isinstance(first, dict) else first[0]
            if first.is_meta:
                return
            work.rows[name] += first.shape[0]
            work.calls[name] += 1
            if isinstance(module, nn.Conv2d):
                work.macs += output.numel() * inputs[0].shape[1] * math.prod(module.kernel_size)
            elif isinstance(module, nn.Linear):
                work.macs += output.numel() * module.in_features
            elif isinstance(module, nn.LSTMCell):
                work.macs += 4 * output[0].numel() * (module.input_size + module.hidden_size)

        return seen

    handles = [module.register_forward_hook(hook(name)) for name, module in network.named_modules()]
    try:
        yield work
    finally:
        for handle in handles:
            handle.remove()


# ---- gates ----


def pooled(features: Tensor) -> Tensor:
    """(B, C) what a gate reads of a map, of the same size for every row."""
    return functional.layer_norm(features.mean(dim=(2, 3)), (CHANNELS,))


def chosen(logits: Tensor, mode: Mode, given: Decision | None, generator: torch.Generator | None) -> Tensor:
    """(B,) index into (B, N) logits."""
    if mode == "replay":
        assert given is not None
        return given.action
    if mode == "sample" and len(logits):
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).flatten()
    return logits.argmax(dim=-1)


def decision_of(logits: Tensor, index: Tensor, action: Tensor, relaxed: Tensor) -> Decision:
    log_probabilities = logits.log_softmax(dim=-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
    return Decision(action, relaxed, log_probabilities.gather(1, index[:, None]).flatten(), entropy)


class SkipGate(Gate):
    """Runs or skips a unit by a linear layer on the pooled features; straight-through in training."""

    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Linear(CHANNELS, 2)
        nn.init.normal_(self.net.weight, std=6.0)
        self.bias = bias

    def decide(
        self, state: ExitState, mode: Mode, given: Decision | None = None, generator: torch.Generator | None = None
    ) -> tuple[Decision, Any]:
        logits = self.net(pooled(state.features))
        logits = logits + logits.new_tensor([0.0, self.bias])
        action = chosen(logits, mode, given, generator)
        weight = logits.softmax(dim=-1)[:, 1]
        return decision_of(logits, action, action, action + weight - weight.detach()), state.carry

    def macs(self, state: ExitState, decision: Decision | None = None) -> Tensor:
        return torch.full_like(state.macs, macs_per_row(self.net, pooled(state.features)))


class RecurrentGate(Gate):
    """A skip gate that remembers, within a pass, what it saw and how often it ran a unit (SkipNet's idea)."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(2 * CHANNELS, CHANNELS)
        self.out = nn.Linear(CHANNELS, 2)
        for layer in (self.cell, self.out):
            nn.init.normal_(layer.weight, std=3.0)

    def decide(
        self, state: ExitState, mode: Mode, given: Decision | None = None, generator: torch.Generator | None = None
    ) -> tuple[Decision, Any]:
        seen = pooled(state.features)
        carry = state.carry
        if carry is None:
            carry = {"hidden": torch.zeros_like(seen), "ran": torch.zeros_like(state.rows)}
        hidden = self.cell(torch.cat([seen, carry["hidden"]], dim=1)).tanh()
        logits = self.out(hidden) - torch.stack([torch.zeros_like(seen[:, 0]), 0.5 * carry["ran"]], dim=1)
        action = chosen(logits, mode, given, generator)
        weight = logits.softmax(dim=-1)[:, 1]
        decision = decision_of(logits, action, action, action + weight - weight.detach())
        return decision, {"hidden": hidden, "ran": carry["ran"] + action}

    def macs(self, state: ExitState, decision: Decision | None = None) -> Tensor:
        one = macs_per_row(self.out, state.features.new_zeros(1, CHANNELS))
        return torch.full_like(state.macs, one + macs_per_row(self.cell, state.features.new_zeros(1, 2 * CHANNELS)))


class WidthGate(Gate):
    """Chooses for each row how many channels of the next unit are computed; always at least one."""

    may_skip = False

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(CHANNELS, CHANNELS)
        nn.init.normal_(self.net.weight, std=6.0)

    def decide(
        self, state: ExitState, mode: Mode, given: Decision | None = None, generator: torch.Generator | None = None
    ) -> tuple[Decision, Any]:
        logits = self.net(pooled(state.features))
        index = given.action - 1 if given is not None else chosen(logits, mode, None, generator)
        kept = (torch.arange(CHANNELS) < index[:, None] + 1).float()
        return decision_of(logits, index, index + 1, kept), state.carry

    def macs(self, state: ExitState, decision: Decision | None = None) -> Tensor:
        return torch.full_like(state.macs, macs_per_row(self.net, pooled(state.features)))


class PixelGate(Gate):
    """Chooses positions by the sign of a 1x1 convolution; a row without any position skips the unit."""

    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Conv2d(CHANNELS, 1, 1)
        self.bias = bias

    def decide(
        self, state: ExitState, mode: Mode, given: Decision | None = None, generator: torch.Generator | None = None
    ) -> tuple[Decision, Any]:
        weight = (self.net(state.features) + self.bias).sigmoid()
        if given is not None:
            mask = (given.relaxed > 0.5).float()
        elif mode == "sample":
            # A coin per row decides whether the row is looked at at all, so that some have no position.
            coin = torch.rand((len(state), 1, 1, 1), generator=generator) < 0.7
            mask = ((torch.rand(weight.shape, generator=generator) < weight) & coin).float()
        else:
            mask = (weight > weight.new_tensor(0.5)).float()
        nothing = weight.new_zeros(len(state))
        action = mask.flatten(1).amax(dim=1).to(torch.int64) if len(state) else state.rows
        return Decision(action, mask + weight - weight.detach(), nothing, nothing), state.carry

    def macs(self, state: ExitState, decision: Decision | None = None) -> Tensor:
        return torch.full_like(state.macs, macs_per_row(self.net, state.features))


# ---- units ----


def conv(stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, 3, stride=stride, padding=1)


class Residual(Unit):
    """x + relu(conv(x)); the skip path is x."""

    skippable = True

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def body(self, features: Tensor, decision: Decision | None = None) -> Tensor:
        return features + functional.relu(self.conv(features))

    def skip(self, features: Tensor) -> Tensor:
        return features


class TwoScales(Unit):
    """Features at two scales, the coarse one fed by the fine one; an exit reads the coarse one."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.down, self.coarse = conv(), conv(stride=2), conv()

    def body(self, features: dict[str, Tensor], decision: Decision | None = None) -> dict[str, Tensor]:
        fine = functional.relu(self.fine(features["fine"]))
        return {"fine": fine, "coarse": functional.relu(self.coarse(features["coarse"]) + self.down(features["fine"]))}

    def tap(self, features: dict[str, Tensor]) -> Tensor:
        return features["coarse"]


class ToScales(Unit):
    """One image to two scales; a tuple would do as well as a dict (`Pair`)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def body(self, features: Tensor, decision: Decision | None = None) -> dict[str, Tensor]:
        return {"fine": self.conv(features), "coarse": functional.avg_pool2d(features, 2)}


class Pair(Unit):
    """Leaves the two scales as a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def body(self, features: dict[str, Tensor], decision: Decision | None = None) -> tuple[Tensor, Tensor]:
        return features["fine"], functional.relu(self.conv(features["coarse"]))

    def tap(self, features: tuple[Tensor, Tensor]) -> Tensor:
        return features[1]


class SlicedConv(nn.Conv2d):
    """A convolution that computes only its first so many output channels."""

    def forward(self, features: Tensor, width: int = CHANNELS) -> Tensor:
        bias = self.bias[:width] if self.bias is not None else None
        return functional.conv2d(features, self.weight[:width], bias, padding=1)


class Width(Unit):
    """Computes the first `decision.action` channels of each row; the others are 0."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = SlicedConv(CHANNELS, CHANNELS, 3, padding=1)

    def body(self, features: Tensor, decision: Decision | None = None) -> Tensor:
        if decision is None or not len(features):
            return functional.relu(self.conv(features))
        widths = torch.unique(decision.action).tolist()
        if len(widths) == 1:
            narrow = functional.relu(self.conv(features, widths[0]))
            return functional.pad(narrow, (0, 0, 0, 0, 0, CHANNELS - widths[0]))
        return functional.relu(self.conv(features)) * decision.relaxed[:, :, None, None]

    def macs(self, features: Tensor, decision: Decision | None = None) -> Tensor:
        per_channel = SIDE * SIDE * CHANNELS * 9
        width = torch.full((len(features),), CHANNELS) if decision is None else decision.action
        return width.to(torch.int64) * per_channel


class Pixels(Unit):
    """x + mask * relu(3x3(x)); without a gradient, only the chosen positions are computed."""

    skippable = True

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(CHANNELS * 9, CHANNELS)

    def body(self, features: Tensor, decision: Decision | None = None) -> Tensor:
        patches = functional.unfold(features, 3, padding=1).transpose(1, 2)
        if decision is None:
            return features + functional.relu(self.patch(patches)).transpose(1, 2).reshape(features.shape)
        mask = decision.relaxed.flatten(1)
        if torch.is_grad_enabled():
            found = functional.relu(self.patch(patches)) * mask[:, :, None]
        else:
            found = features.new_zeros((*mask.shape, CHANNELS))
            places = mask > 0.5
            found[places] = functional.relu(self.patch(patches[places]))
        return features + found.transpose(1, 2).reshape(features.shape)

    def skip(self, features: Tensor) -> Tensor:
        return features

    def macs(self, features: Tensor, decision: Decision | None = None) -> Tensor:
        places = torch.full((len(features),), SIDE * SIDE)
        if decision is not None:
            places = (decision.relaxed > 0.5).flatten(1).sum(dim=1)
        return places.to(torch.int64) * CHANNELS * 9 * CHANNELS


class Recall(Unit):
    """Mixes the image with what the env step before left in memory, and leaves the new memory beside the features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.cell = nn.Linear(2 * CHANNELS, CHANNELS)

    def body(self, features: dict[str, Tensor], decision: Decision | None = None) -> dict[str, Tensor]:
        fresh = functional.relu(self.conv(features["map"]))
        past = self.cell(torch.cat([fresh.mean(dim=(2, 3)), features["past"]], dim=1)).tanh()
        return {"map": fresh + past[:, :, None, None], "past": past}

    def tap(self, features: dict[str, Tensor]) -> Tensor:
        return features["map"]


class Beside(Recall):
    """Works on the map; the memory passes by."""

    def __init__(self) -> None:
        Unit.__init__(self)
        self.conv = conv()

    def body(self, features: dict[str, Tensor], decision: Decision | None = None) -> dict[str, Tensor]:
        return {"map": functional.relu(self.conv(features["map"])), "past": features["past"]}


class RememberingNetwork(StagedNetwork):
    """Carries a hidden vector from one env step to the next."""

    def begin(self, inputs: Any, memory: Any = None, path: tuple[Any, ...] = ()) -> ExitState:
        state = super().begin(inputs, memory, path)
        past = inputs.new_zeros((len(state), CHANNELS)) if memory is None else memory["past"]
        return replace(state, features={"map": state.features, "past": past})

    def remember(self, state: ExitState) -> Any:
        return {"past": state.features["past"], "exit": torch.full_like(state.rows, state.exit - 1)}


# ---- networks ----


def linear_heads(
    places: Sequence[str], shape: tuple[int, ...], cascade: bool = False, **settings: Any
) -> dict[str, Head]:
    """Linear heads with spread logits, the last one the backbone's own."""
    config = HeadConfig(kind="linear", **settings)
    found: dict[str, Head] = {}
    for place in places[:-1]:
        found[place] = LinearHead(shape, OUTPUTS, config, cascade and bool(found))
    found[places[-1]] = ModuleHead(nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), OUTPUTS)))
    return found


def spread(network: StagedNetwork) -> StagedNetwork:
    """Makes the answers of an untrained network differ, so that thresholds part the rows."""
    with torch.no_grad():
        for head in network.heads.modules():
            if isinstance(head, nn.Linear):
                head.weight.mul_(6.0)
        for weights in getattr(network.ensemble, "log_weights", []):
            weights.normal_(0.2, 0.3)
        for bias in getattr(network.ensemble, "log_bias", []):
            bias.normal_(0.0, 0.3)
    return network.eval()


MAP = (CHANNELS, SIDE, SIDE)


def staged(cascade: bool = True, ensemble: Ensemble | None = None, stop_gradient: bool = True) -> StagedNetwork:
    """Three convolutions with an exit after each; heads as in Zero Time Waste's policies."""
    config = HeadConfig(stride=2, pool=2, stop_gradient=stop_gradient)
    units = OrderedDict((f"conv{n}", ModuleUnit(nn.Sequential(conv(), nn.ReLU()))) for n in range(EXITS))
    heads: dict[str, Head] = {
        "conv0": PooledConvHead(MAP, OUTPUTS, config, False),
        "conv1": PooledConvHead(MAP, OUTPUTS, config, cascade),
        "conv2": ModuleHead(nn.Sequential(nn.Flatten(), nn.Linear(math.prod(MAP), OUTPUTS))),
    }
    return spread(StagedNetwork(units, heads, OUTPUTS, ensemble))


def cascade() -> StagedNetwork:
    return staged(ensemble=GeometricEnsemble(EXITS - 1, OUTPUTS))


def multi_scale() -> StagedNetwork:
    units = OrderedDict(split=ToScales(), scales1=TwoScales(), scales2=TwoScales(), pair=Pair())
    heads = linear_heads(("scales1", "scales2", "pair"), (CHANNELS, SIDE // 2, SIDE // 2))
    return spread(StagedNetwork(units, heads, OUTPUTS, AdditiveEnsemble(EXITS, OUTPUTS)))


def carried_gate() -> StagedNetwork:
    units = OrderedDict((f"block{n}", Residual()) for n in range(5))
    gate = RecurrentGate()
    gates = dict.fromkeys(("block1", "block2", "block3", "block4"), gate)
    return spread(StagedNetwork(units, linear_heads(("block0", "block2", "block4"), MAP), OUTPUTS, gates=gates))


def widths() -> StagedNetwork:
    units = OrderedDict((f"wide{n}", Width()) for n in range(4))
    gates = {"wide1": WidthGate(), "wide2": WidthGate(), "wide3": WidthGate()}
    return spread(StagedNetwork(units, linear_heads(("wide1", "wide2", "wide3"), MAP), OUTPUTS, gates=gates))


def pixels(bias: float = 0.0) -> StagedNetwork:
    units = OrderedDict((f"map{n}", Pixels()) for n in range(4))
    gates = {"map1": PixelGate(bias), "map2": PixelGate(bias), "map3": PixelGate(bias)}
    return spread(StagedNetwork(units, linear_heads(("map0", "map2", "map3"), MAP), OUTPUTS, gates=gates))


def memory() -> StagedNetwork:
    units = OrderedDict(recall=Recall(), map1=Beside(), map2=Beside())
    heads = linear_heads(("recall", "map1", "map2"), MAP, cascade=True)
    return spread(RememberingNetwork(units, heads, OUTPUTS))


def skips(bias: float = 0.0) -> StagedNetwork:
    units = OrderedDict((f"block{n}", Residual()) for n in range(4))
    gates = {name: SkipGate(bias) for name in ("block1", "block2", "block3")}
    heads = linear_heads(("block1", "block2", "block3"), MAP, cascade=True, layer_norm=False)
    ensemble = GeometricEnsemble(EXITS - 1, OUTPUTS)
    return spread(StagedNetwork(units, heads, OUTPUTS, ensemble, gates))


@dataclass(frozen=True)
class Toy:
    """A kind of network.

    Args:
        build: makes it, from torch's global generator.
        gated: it has gates.
        skippable: with `bias` its gates let everything pass.
        images: its inputs are uint8.
    """

    build: Callable[..., StagedNetwork]
    gated: bool = False
    skippable: bool = False
    images: bool = False

    def network(self, **settings: Any) -> StagedNetwork:
        """Always the same one, in evaluation mode."""
        torch.manual_seed(3)
        return self.build(**settings)

    def inputs(self, batch: int, seed: int = 0) -> Tensor:
        """(B, C, H, W); the first rows are the same for every batch size."""
        generator = torch.Generator().manual_seed(seed)
        shape = (32, *MAP)
        if self.images:
            return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)[:batch]
        return torch.randn(shape, generator=generator)[:batch]


TOYS = {
    "cascade": Toy(cascade, images=True),
    "multi_scale": Toy(multi_scale),
    "carried_gate": Toy(carried_gate, gated=True),
    "widths": Toy(widths, gated=True),
    "pixels": Toy(pixels, gated=True, skippable=True),
    "memory": Toy(memory),
    "skips": Toy(skips, gated=True, skippable=True),
}


def parting(network: StagedNetwork, inputs: Tensor, rule: str = "confidence") -> ExitPolicy:
    """Thresholds halfway between two rows' scores, so that about a third of the rows leaves at each exit."""
    from rlexit.runtime import replay

    scores = replay(network, ExitPolicy(rule, (math.inf,) * (network.exits - 1)), inputs).scores
    thresholds = []
    left = torch.zeros(len(inputs), dtype=torch.bool)
    for exit in range(network.exits - 1):
        column = scores[~left, exit].sort().values
        cut = len(column) - max(1, len(column) // (network.exits - exit))
        thresholds.append(float(column[cut - 1 : cut + 1].mean()))
        left |= scores[:, exit] > thresholds[-1]
    return ExitPolicy(rule, tuple(thresholds))


# ---- residual units ----


class Block(nn.Module):
    """A basic block with batch norm that has seen some numbers, so that its statistics are not the first ones."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))
        for norm in (self.bn1, self.bn2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)

    def forward(self, features: Tensor) -> Tensor:
        changed = functional.relu(self.bn1(self.conv1(features)), inplace=True)
        return functional.relu(self.bn2(self.conv2(changed)) + self.shortcut(features), inplace=True)


def residual(
    channels: str = "none", gates: GateConfig | None = None, narrow: bool = True, side: int = SIDE
) -> StagedNetwork:
    """A stem, three blocks of which the second halves the map, and exits after the last three units."""
    shapes = ((CHANNELS, CHANNELS, 1), (CHANNELS, 2 * CHANNELS, 2), (2 * CHANNELS, 2 * CHANNELS, 1))
    units: OrderedDict[str, Unit] = OrderedDict(stem=ModuleUnit(nn.Sequential(conv(), nn.ReLU())))
    sites = []
    for number, (inputs, outputs, stride) in enumerate(shapes):
        units[f"block{number}"] = ResidualUnit(Block(inputs, outputs, stride), channels, narrow=narrow)
        sites.append(Site(f"block{number}", inputs, units[f"block{number}"].width))
    half = (side + 1) // 2
    coarse = (2 * CHANNELS, half, half)
    heads: dict[str, Head] = {
        "block0": linear_heads(("x",), (CHANNELS, side, side))["x"],
        "block1": linear_heads(("x",), coarse)["x"],
        "block2": linear_heads(("x",), coarse)["x"],
    }
    network = StagedNetwork(units, heads, OUTPUTS)
    if gates is not None:
        network.set_gates(build_gates(sites, gates, Site("stem", CHANNELS)))
    return spread(network)


def executed(call: Callable[[], RunResult]) -> RunResult:
    """The call's result, whose multiply-adds are those that torch really executed: calls of modules or not."""
    call()  # what units cost is counted once per shape, on meta tensors that a counter would see
    with FlopCounterMode(display=False) as counter:
        result = call()
    assert counter.get_total_flops() == 2 * int(result.macs.sum())
    return result


def residual_channels() -> StagedNetwork:
    # All channels are computed, because hooks see modules only; test_residual.py covers those computed alone.
    network = residual("both", GateConfig("mgl2s", bias=0.0), narrow=False)
    scatter(network)
    return network


def residual_layers() -> StagedNetwork:
    network = residual("none", GateConfig("lstm", bias=0.0))
    scatter(network)
    return network


def scatter(network: StagedNetwork) -> None:
    """Spreads the gates' logits around 0, so that rows are decided differently, and units of one core too."""
    for gate in network.gates.modules():
        if isinstance(gate, (nn.Linear, nn.LSTMCell)):
            for name, value in gate.named_parameters():
                nn.init.normal_(value, std=3.0 if "weight" in name else 0.3)
    offsets = [value for name, value in network.gates.named_parameters() if name.endswith("offset")]
    for index, value in enumerate(offsets):
        nn.init.constant_(value, 0.1 if index % 2 else -0.1)


TOYS["residual_layers"] = Toy(residual_layers, gated=True)
TOYS["residual_channels"] = Toy(residual_channels, gated=True)

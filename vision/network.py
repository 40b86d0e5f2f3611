"""A backbone as a staged network: exits put on its units, and given weights put into them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlexit.checkpoint import CheckpointError
from rlexit.config import GateConfig, HeadConfig
from rlexit.ensembles import Ensemble
from rlexit.gates import Site, build_gates
from rlexit.heads import Head, ModuleHead, heads
from rlexit.network import StagedNetwork
from rlexit.registry import unknown
from rlexit.residual import ResidualUnit
from rlexit.units import ModuleUnit, Unit
from vision.backbones import Backbone, backbones
from vision.backbones.densenet import DenseUnit
from vision.config import BackboneConfig, NetworkConfig

Normalisation = tuple[Sequence[float], Sequence[float]]
CHANNELS_OF_IMAGES = 3
PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@dataclass(frozen=True)
class Gating:
    """Which gates are before which units.

    Args:
        gates: kind and settings.
        units: names; empty for all that can be skipped.
        channels: which channels of a residual block gates decide about; `none` where they decide about whole blocks.
    """

    gates: GateConfig
    units: tuple[str, ...] = ()
    channels: str = "none"


class Classifier(StagedNetwork):
    """A staged network for images: uint8, or floats in [0, 1], are normalised inside.

    Args:
        units: see `StagedNetwork`.
        exits: see `StagedNetwork`.
        outputs: classes.
        ensemble: combines the exits.
        normalisation: mean and deviation of the channels of pixels in [0, 1].
        prefixes: of every unit's tensors, and the last head's, in a plain state dict.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        units: Mapping[str, Unit],
        exits: Mapping[str, Head],
        outputs: int,
        ensemble: Ensemble | None,
        normalisation: Normalisation,
        prefixes: Mapping[str, str],
    ) -> None:
        super().__init__(units, exits, outputs, ensemble)
        self.prefixes = dict(prefixes)
        # They belong to the data set, whose config they come from: a checkpoint has weights only.
        for name, values in zip(("mean", "deviation"), normalisation, strict=True):
            self.register_buffer(name, torch.tensor(values).reshape(3, 1, 1), persistent=False)

    def prepare(self, inputs: Any) -> Any:
        """(B, 3, H, W) normalised images, channels together as the convolutions have theirs."""
        images = super().prepare(inputs).contiguous(memory_format=torch.channels_last)
        return (images - self.mean) / self.deviation

    def plain_names(self) -> dict[str, str]:
        """Names of the backbone's tensors here to what a plain state dict calls them."""
        found: dict[str, str] = {}
        for key in self.state_dict():
            for place, prefix in self.prefixes.items():
                if key.startswith(f"{place}."):
                    found[key] = prefix + key.removeprefix(f"{place}.")
        return found


def tapped(backbone: Backbone, config: NetworkConfig) -> list[str]:
    """Units with an early exit after them, in the order of execution.

    Raises:
        LookupError: a tap names no unit; names the nearest.
        ValueError: no exit is left, or the last unit is named, which has the backbone's own.
    """
    names = [block.name for block in backbone.blocks[:-1]]
    for tap in config.taps:
        if tap not in names:
            raise unknown("network.taps", tap, names)
    if config.taps:
        return [name for name in names if name in config.taps]
    counted = [block.name for block in backbone.blocks if block.counts]
    chosen = counted[config.every - 1 :: config.every]
    if not chosen:
        raise ValueError(f"`network.every` must be at most {len(counted)}, the number of blocks, got {config.every}.")
    return chosen


def classifier(
    config: BackboneConfig,
    classes: int,
    side: int,
    normalisation: Normalisation = PLAIN,
    network: NetworkConfig | None = None,
    head: HeadConfig | None = None,
    cascade: bool = False,
    ensemble: type[Ensemble] | None = None,
    gating: Gating | None = None,
) -> Classifier:
    """A freshly initialised backbone with exits and gates.

    Args:
        config: which backbone.
        classes: A.
        side: of the square images.
        normalisation: mean and deviation of the channels.
        network: where exits are; None for none but the backbone's own.
        head: how early heads are built. Where the features are no map, a linear one stands in for `pooled_conv`.
        cascade: feed each early head the logits of the one before it.
        ensemble: combines all exits, the backbone's own among them.
        gating: which gates are before which units; None for none.
    """
    backbone = backbones[config.name](config, classes, side)
    taps = tapped(backbone, network) if network is not None else []
    early = head or HeadConfig()
    units: OrderedDict[str, Unit] = OrderedDict()
    exits: dict[str, Head] = {}
    prefixes = {f"heads.{backbone.blocks[-1].name}.module": backbone.prefix}
    for block in backbone.blocks:
        module = initialised(block.module)
        if gating is not None and isinstance(module, ResidualUnit):
            module = ResidualUnit(module.module, gating.channels)
        if gating is not None and isinstance(module, DenseUnit) and gating.channels != "none":
            module.decide_channels()
        units[block.name] = module if isinstance(module, Unit) else ModuleUnit(module)
        prefixes[f"units.{block.name}.module"] = block.prefix
        if block.name in taps:
            kind = "linear" if len(block.shape) == 1 else early.kind
            exits[block.name] = heads[kind](block.shape, classes, early, cascade and bool(exits))
    exits[backbone.blocks[-1].name] = ModuleHead(backbone.head)
    combined = ensemble(len(exits), classes) if ensemble is not None else None
    made = Classifier(units, exits, classes, combined, normalisation, prefixes)
    if gating is not None:
        entry = Site(backbone.blocks[0].name, CHANNELS_OF_IMAGES)
        made.set_gates(build_gates(gate_sites(backbone, units, gating), gating.gates, entry))
    # A fifth faster on CPUs where channels lie together, trunk and heads.
    made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return made


def gate_sites(backbone: Backbone, units: Mapping[str, Unit], gating: Gating) -> list[Site]:
    """Where gates stand, in the order of execution; before the first block none does, unless a policy net decides.

    Raises:
        LookupError: a name is no unit's; names the nearest.
        ValueError: no unit can be skipped.
    """
    names = [block.name for block in backbone.blocks]
    before = dict(zip(names[1:], (block.shape[0] for block in backbone.blocks), strict=False))
    for name in gating.units:
        if name not in before:
            raise unknown("network.gated", name, before)
    able = [name for name in before if units[name].skippable]
    if able and able[0] == names[1] and gating.gates.kind != "policy_net":
        able = able[1:]
    chosen = [name for name in before if name in gating.units] if gating.units else able
    if not chosen:
        raise ValueError(
            f"`backbone` must have units that can be skipped for gates, got {len(names)} units and none. "
            "Use resnet_cifar or densenet."
        )
    return [Site(name, before[name], units[name].width) for name in chosen]


def initialised(module: nn.Module) -> nn.Module:
    """He's normal weights for convolutions; the rest as torch starts it."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    return module


def weights(network: Classifier) -> dict[str, Tensor]:
    """The backbone's tensors by their plain names, laid out as files have them; counters of batches are left out."""
    return {name: tensor.contiguous() for name, tensor in _own(network).items()}


def _own(network: Classifier) -> dict[str, Tensor]:
    state = network.state_dict()
    named = {plain: state[ours] for ours, plain in network.plain_names().items()}
    return {name: tensor for name, tensor in named.items() if not name.endswith("num_batches_tracked")}


def load_weights(network: Classifier, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copies a plain state dict into the backbone and its own head; early heads stay as they are.

    Args:
        network: of `classifier`.
        tensors: by their plain names; counters of batches may be missing.
        where: they come from, for the error.
    Raises:
        CheckpointError: a tensor is missing, of another shape, or belongs to no part.
    """
    own = _own(network)
    strange = [name for name in tensors if name not in own and not name.endswith("num_batches_tracked")]
    for name, target in own.items():
        source = tensors.get(name)
        if source is None or source.shape != target.shape:
            found = f"nothing (but {strange[0]!r})" if source is None and strange else "nothing"
            found = found if source is None else str(tuple(source.shape))
            raise CheckpointError(
                f"`{name}` in {where} must be {tuple(target.shape)}, got {found}. "
                "Set `backbone` to that of the weights, and `data` to their classes."
            )
    if strange:
        raise CheckpointError(
            f"`{strange[0]}` in {where} belongs to no part of the backbone. Set `backbone` to its own."
        )
    with torch.no_grad():
        for name, target in own.items():
            target.copy_(tensors[name])

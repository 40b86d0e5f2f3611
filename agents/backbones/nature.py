"""NatureCNN: stable-baselines3's actor as four units, with exits after any of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from agents.backbones import backbones
from rlexit.config import HeadConfig
from rlexit.ensembles import Ensemble
from rlexit.heads import Head, ModuleHead, heads
from rlexit.network import StagedNetwork
from rlexit.units import ModuleUnit, Unit

UNIT_NAMES = ("conv1", "conv2", "conv3", "fc")
FRAMES = 4
SIDE = 84


def nature_network(
    actions: int,
    taps: Sequence[str] = (),
    head: HeadConfig | None = None,
    cascade: bool = False,
    ensemble: Ensemble | None = None,
    width: float = 1.0,
) -> StagedNetwork:
    """The actor of SB3's `CnnPolicy`, freshly initialised, with exits at the given units.

    Args:
        actions: A.
        taps: units with an early exit after them, from `UNIT_NAMES` without the last.
        head: how early heads are built.
        cascade: feed each early head the logits of the one before it.
        ensemble: combines the early exits.
        width: scales all channels and the dense layer; for static networks of less compute.
    Raises:
        ValueError: a tap names no unit, or the width leaves no channel.
    Source: Mnih et al. 2015; layer sizes as in SB3's `NatureCNN`.
    """
    channels = [round(width * count) for count in (32, 64, 64, 512)]
    if min(channels) < 1:
        raise ValueError(f"`width` must leave at least one channel, got {width}.")
    for tap in taps:
        if tap not in UNIT_NAMES[:-1]:
            raise ValueError(f"`network.taps` must be of {', '.join(UNIT_NAMES[:-1])}, got {tap!r}.")
    first, second, third, dense = channels
    units: OrderedDict[str, Unit] = OrderedDict(
        conv1=ModuleUnit(nn.Sequential(nn.Conv2d(FRAMES, first, 8, stride=4), nn.ReLU(inplace=True))),
        conv2=ModuleUnit(nn.Sequential(nn.Conv2d(first, second, 4, stride=2), nn.ReLU(inplace=True))),
        conv3=ModuleUnit(nn.Sequential(nn.Conv2d(second, third, 3), nn.ReLU(inplace=True))),
        fc=ModuleUnit(nn.Sequential(nn.Flatten(), nn.Linear(third * 49, dense), nn.ReLU(inplace=True))),
    )
    shapes = {"conv1": (first, 20, 20), "conv2": (second, 9, 9), "conv3": (third, 7, 7)}
    config = head or HeadConfig()
    exits: dict[str, Head] = {}
    for name in UNIT_NAMES:
        if name in taps:
            exits[name] = heads[config.kind](shapes[name], actions, config, cascade and bool(exits))
    exits["fc"] = ModuleHead(nn.Linear(dense, actions))
    return StagedNetwork(units, exits, actions, ensemble)


def initialise(network: StagedNetwork) -> StagedNetwork:
    """Orthogonal weights and zero biases, as SB3 starts its actors; for networks that learn from scratch."""
    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.orthogonal_(module.weight, 0.01 if name.startswith("heads.") else 2**0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


def load_sb3(network: StagedNetwork, tensors: Mapping[str, Tensor]) -> None:
    """Copies an SB3 actor's weights into the backbone and its own head; the early heads stay as they are.

    Args:
        network: of `nature_network`, of width 1.
        tensors: SB3 policy state (`features_extractor.*`, `action_net.*`).
    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    layers = {
        "units.conv1.module.0": "features_extractor.cnn.0",
        "units.conv2.module.0": "features_extractor.cnn.2",
        "units.conv3.module.0": "features_extractor.cnn.4",
        "units.fc.module.1": "features_extractor.linear.0",
        "heads.fc.module": "action_net",
    }
    kinds = ("weight", "bias")
    names = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in layers.items() for kind in kinds}
    copy_tensors(network, tensors, names, "a NatureCNN teacher")


def copy_tensors(network: StagedNetwork, tensors: Mapping[str, Tensor], names: Mapping[str, str], advice: str) -> None:
    """Copies tensors of another library's into a network.

    Args:
        network: changed in place.
        tensors: by the other library's names.
        names: ours to theirs.
        advice: what to use where one does not fit.
    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    own = network.state_dict()
    with torch.no_grad():
        for ours, theirs in names.items():
            source, target = tensors.get(theirs), own[ours]
            found = "nothing" if source is None else tuple(source.shape)
            if source is None or source.shape != target.shape:
                raise ValueError(f"`{theirs}` must be {tuple(target.shape)}, got {found}. Use {advice}.")
            target.copy_(source)


@backbones.register("nature")
class Nature:
    """NatureCNN, SB3's own."""

    taps = ("conv1", "conv2")
    extractor = None
    network = staticmethod(nature_network)
    load = staticmethod(load_sb3)

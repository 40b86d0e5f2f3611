"""IMPALA-ResNet: a deeper actor of three stages with two residual blocks each, which rows may skip."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn
from torch.nn import functional

from agents.backbones import backbones
from agents.backbones.nature import FRAMES, SIDE, copy_tensors
from rlexit.config import HeadConfig
from rlexit.ensembles import Ensemble
from rlexit.gates import Decision
from rlexit.heads import Head, ModuleHead, heads
from rlexit.network import StagedNetwork
from rlexit.units import ModuleUnit, Unit

CHANNELS = (16, 32, 32)
DENSE = 256
BLOCKS = ("a", "b")


class ImpalaBlock(Unit):
    """x + conv2(relu(conv1(relu(x)))); a row that skips it is x.

    Args:
        channels: of the map.
    """

    skippable = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def body(self, features: Any, decision: Decision | None = None) -> Any:
        """The block, shortcut included."""
        inner = self.conv1(functional.relu(features))
        return features + self.conv2(functional.relu(inner))

    def skip(self, features: Any) -> Any:
        """The map as it is."""
        return features


def impala_units(width: float = 1.0) -> OrderedDict[str, Unit]:
    """`stage1`, `block1a`, `block1b`, `stage2`, ..., `fc`, freshly initialised.

    Args:
        width: scales all channels and the dense layer.
    Raises:
        ValueError: the width leaves no channel.
    """
    channels = [round(width * count) for count in CHANNELS]
    if min(channels) < 1:
        raise ValueError(f"`width` must leave at least one channel, got {width}.")
    units: OrderedDict[str, Unit] = OrderedDict()
    before, side = FRAMES, SIDE
    for stage, count in enumerate(channels, start=1):
        reduced = nn.Sequential(nn.Conv2d(before, count, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1))
        units[f"stage{stage}"] = ModuleUnit(reduced)
        for block in BLOCKS:
            units[f"block{stage}{block}"] = ImpalaBlock(count)
        before, side = count, (side + 1) // 2
    dense = nn.Linear(before * side**2, max(round(width * DENSE), 1))
    units["fc"] = ModuleUnit(nn.Sequential(nn.ReLU(), nn.Flatten(), dense, nn.ReLU()))
    return units


class ImpalaExtractor(BaseFeaturesExtractor):
    """The backbone as stable-baselines3's feature extractor; its tensors are named as the staged network's.

    Args:
        observation_space: (4, 84, 84).
    """

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, DENSE)
        self.units = nn.ModuleDict(impala_units())

    def forward(self, observations: Tensor) -> Tensor:
        """(B, 4, 84, 84) in [0, 1] to (B, 256)."""
        for unit in self.units.values():
            observations = unit(observations)
        return observations


@backbones.register("impala")
class Impala:
    """IMPALA-ResNet of 16, 32 and 32 channels: 54.23 M MACs with 18 actions, of which 68.2 % are skippable.

    Source: Espeholt et al. 2018, arXiv 1802.01561, figure 3 (right), without the LSTM.
    """

    taps = ("block1b", "block2b")
    extractor = ImpalaExtractor

    @staticmethod
    def network(
        actions: int,
        taps: Sequence[str] = (),
        head: HeadConfig | None = None,
        cascade: bool = False,
        ensemble: Ensemble | None = None,
        width: float = 1.0,
    ) -> StagedNetwork:
        """The actor with exits at the given units; see `nature_network`.

        Raises:
            ValueError: a tap names no unit, or the width leaves no channel.
        """
        units = impala_units(width)
        names = tuple(units)[:-1]
        for tap in taps:
            if tap not in names:
                raise ValueError(f"`network.taps` must be of {', '.join(names)}, got {tap!r}.")
        config = head or HeadConfig()
        exits: dict[str, Head] = {}
        side = SIDE
        for name in names:
            side = (side + 1) // 2 if name.startswith("stage") else side
            if name in taps:
                unit: Any = units[name]
                channels = (unit.conv2 if isinstance(unit, ImpalaBlock) else unit.module[0]).out_channels
                shape = (channels, side, side)
                exits[name] = heads[config.kind](shape, actions, config, cascade and bool(exits))
        last: Any = units["fc"]
        exits["fc"] = ModuleHead(nn.Linear(last.module[2].out_features, actions))
        return StagedNetwork(units, exits, actions, ensemble)

    @staticmethod
    def load(network: StagedNetwork, tensors: Mapping[str, Tensor]) -> None:
        """Copies an SB3 actor's weights into the backbone and its own head; the early heads stay as they are.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        names = {key: f"features_extractor.{key}" for key in network.state_dict() if key.startswith("units.")}
        for kind in ("weight", "bias"):
            names[f"heads.fc.module.{kind}"] = f"action_net.{kind}"
        copy_tensors(network, tensors, names, "an IMPALA teacher")

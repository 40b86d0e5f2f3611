"""DenseNet-BC for small images: every layer adds k channels to all that came before, in three blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from rlexit.config import require
from rlexit.gates import Decision
from rlexit.macs import macs_per_row
from rlexit.units import Unit
from vision.backbones import Backbone, Block, backbones, scaled
from vision.config import BackboneConfig

DEPTH = 100
GROWTH = 12
BOTTLENECK = 4
BLOCKS = 3


class DenseFeatures(NamedTuple):
    """What a dense layer leaves.

    Args:
        map: (B, C, H, W) all channels so far.
        previous: (B, k, H, W) what the newest layer added, and a skipped one repeats.
    """

    map: Tensor
    previous: Tensor


def map_of(features: Tensor | DenseFeatures) -> Tensor:
    """(B, C, H, W) all channels so far; before the first layer, the stem's."""
    return features if isinstance(features, Tensor) else features.map


class DenseLayer(nn.Module):
    """Batch norm, ReLU and 1x1 convolution to 4k channels; batch norm, ReLU and 3x3 convolution to k."""

    def __init__(self, inputs: int, growth: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, BOTTLENECK * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(BOTTLENECK * growth)
        self.conv2 = nn.Conv2d(BOTTLENECK * growth, growth, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) to the (B, k, H, W) that are new."""
        narrow = self.conv1(functional.relu(self.bn1(features), inplace=True))
        return self.dropout(self.conv2(functional.relu(self.bn2(narrow), inplace=True)))

    def few(self, features: Tensor, kept: Tensor) -> Tensor:
        """(B, C, H, W) to the (B, kept, H, W) new channels of these indices; the others are not computed."""
        narrow = functional.relu(self.bn2(self.conv1(functional.relu(self.bn1(features), inplace=True))), inplace=True)
        return functional.conv2d(narrow, self.conv2.weight.index_select(0, kept), padding=1)


class DenseUnit(Unit):
    """Adds a dense layer's channels; a row that skips it, or some of its channels, repeats those of the layer before.

    Args:
        layer: (B, C, H, W) to (B, k, H, W).
        first: of the whole network, so that there is nothing to repeat.
    Source: Wang et al. 2020, arXiv 1907.04523, figure 3.
    """

    def __init__(self, layer: DenseLayer, first: bool) -> None:
        super().__init__()
        self.module = layer
        self.skippable = not first

    def decide_channels(self) -> None:
        """Lets gates decide about every new channel; not in the first layer, which has nothing to repeat."""
        self.width = self.module.conv2.out_channels if self.skippable else 0

    def body(self, features: Any, decision: Decision | None = None) -> DenseFeatures:
        """All channels with the new ones behind them, and the new ones; without a gradient, only kept ones are computed."""
        before = map_of(features)
        if decision is None or decision.channels is None:
            new = self.module(before)
        elif torch.is_grad_enabled():
            keep = decision.channels[:, :, None, None]
            new = keep * self.module(before) + (1 - keep) * features.previous
        else:
            new = self._narrow(before, features.previous, decision.channels > 0.5)
        return DenseFeatures(torch.cat([before, new], dim=1), new)

    def _narrow(self, before: Tensor, previous: Tensor, keep: Tensor) -> Tensor:
        """Rows that keep the same channels are computed together; one that keeps none is not computed at all."""
        new = previous.clone()
        masks, group = torch.unique(keep, dim=0, return_inverse=True)
        for number, mask in enumerate(masks):
            kept, rows = torch.nonzero(mask).flatten(), torch.nonzero(group == number).flatten()
            if len(kept):
                new[rows[:, None], kept] = self.module.few(before[rows], kept)
        return new

    def macs(self, features: Any, decision: Decision | None = None) -> Int[Tensor, " batch"]:
        """(B,) of the layer with the kept channels."""
        if decision is None or decision.channels is None:
            return super().macs(features, decision)
        first, second = self._parts(features)
        kept = (decision.channels > 0.5).sum(dim=1)
        return (first + second // self.width * kept) * (kept > 0)

    def expected_macs(self, features: Any, decision: Decision | None = None) -> Float[Tensor, " batch"]:
        """(B,) with gradient in the relaxed layer and channel decisions."""
        if decision is None or decision.channels is None:
            return super().expected_macs(features, decision)
        first, second = self._parts(features)
        share = decision.channels.mean(dim=1)
        return decision.relaxed * (first * (share > 0) + second * share)

    def _parts(self, features: Any) -> tuple[int, int]:
        """Multiply-adds of both convolutions."""
        before = map_of(features)
        first = macs_per_row(self.module.conv1, before)
        return first, macs_per_row(self.module, before) - first

    def skip(self, features: Any) -> DenseFeatures:
        """All channels with the newest ones once more; raises ValueError in the first layer."""
        if not self.skippable:
            raise ValueError("`gates` must leave out the first dense layer, which has no output before it to repeat.")
        return DenseFeatures(torch.cat([features.map, features.previous], dim=1), features.previous)

    def glance(self, features: Any) -> Tensor:
        """All channels."""
        return map_of(features)

    def tap(self, features: Any) -> Tensor:
        """All channels."""
        return map_of(features)


class Transition(nn.Module):
    """Batch norm, ReLU and 1x1 convolution to half the channels; mean over 2 x 2 positions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C / 2, H / 2, W / 2)."""
        return functional.avg_pool2d(self.conv1(functional.relu(self.bn1(features), inplace=True)), 2)


class TransitionUnit(Unit):
    """A transition; the newest channels are pooled along, so that the next block's first layer has something to repeat."""

    def __init__(self, transition: Transition) -> None:
        super().__init__()
        self.module = transition

    def body(self, features: Any, decision: Decision | None = None) -> DenseFeatures:
        """Fewer and smaller maps, and the newest channels at the new size."""
        return DenseFeatures(self.module(features.map), functional.avg_pool2d(features.previous, 2))

    def tap(self, features: Any) -> Tensor:
        """All channels."""
        return map_of(features)


class DensePool(Unit):
    """Batch norm, ReLU, and the mean over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.module = nn.BatchNorm2d(channels)

    def body(self, features: Any, decision: Decision | None = None) -> Tensor:
        """(B, C) of all channels."""
        return functional.relu(self.module(map_of(features)), inplace=True).mean(dim=(2, 3))


@backbones.register("densenet")
def densenet(config: BackboneConfig, classes: int, side: int) -> Backbone:
    """DenseNet-BC, growth 12 x width, compression 0.5: three blocks of (depth - 4) / 6 layers, a layer per unit.

    State dicts are named as andreasveit/densenet-pytorch names them.

    Raises:
        ValueError: the depth is not 6n + 4, or the side of the images no multiple of 4.
    Source: Huang et al. 2017, arXiv 1608.06993, table 2.
    """
    depth = config.depth or DEPTH
    require(depth >= 10 and depth % 6 == 4, "backbone.depth", "be 6n + 4 for densenet", depth, "40 and 100 are.")
    require(side % 4 == 0, "data.side", "be a multiple of 4 for densenet", side)
    growth = scaled(GROWTH, config.width)
    channels = 2 * growth
    stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
    blocks = [Block("stem", stem, (channels, side, side), "conv1.", counts=False)]
    for number in range(1, BLOCKS + 1):
        for index in range((depth - 4) // 6):
            layer = DenseUnit(DenseLayer(channels, growth, config.dropout), first=number == 1 and index == 0)
            channels += growth
            prefix = f"block{number}.layer.{index}."
            blocks.append(Block(f"block{number}_{index}", layer, (channels, side, side), prefix))
        if number < BLOCKS:
            transition = TransitionUnit(Transition(channels, channels // 2))
            channels, side = channels // 2, side // 2
            blocks.append(
                Block(f"transition{number}", transition, (channels, side, side), f"trans{number}.", counts=False)
            )
    blocks.append(Block("pool", DensePool(channels), (channels,), "bn1.", counts=False))
    return Backbone(tuple(blocks), nn.Linear(channels, classes), "fc.")

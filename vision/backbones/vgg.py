"""VGG-16 with batch norm: thirteen convolutions, each a unit, and a small dense part."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from rlexit.config import require
from vision.backbones import Backbone, Block, backbones, scaled
from vision.config import BackboneConfig

DEPTH = 16
# Channels of the convolutions, and whether positions are halved after them.
CONVOLUTIONS = (
    *((64, False), (64, True), (128, False), (128, True), (256, False), (256, False), (256, True)),
    *((512, False), (512, False), (512, True), (512, False), (512, False), (512, True)),
)
DENSE = {32: 512, 64: 2048}


class Convolution(nn.Module):
    """3x3 convolution, batch norm, ReLU, and max pooling where positions are halved."""

    def __init__(self, inputs: int, outputs: int, halves: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.bn = nn.BatchNorm2d(outputs)
        self.halves = halves

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        changed = functional.relu(self.bn(self.conv(features)), inplace=True)
        return functional.max_pool2d(changed, 2) if self.halves else changed


class Dense(nn.Module):
    """Flattens, a linear layer, ReLU if there is one, dropout."""

    def __init__(self, inputs: int, outputs: int, dropout: float, relu: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.dropout = nn.Dropout(dropout)
        self.relu = relu

    def forward(self, features: Tensor) -> Tensor:
        """(B, ...) to (B, C)."""
        changed = self.linear(features.flatten(1))
        return self.dropout(functional.relu(changed, inplace=True) if self.relu else changed)


@backbones.register("vgg")
def vgg(config: BackboneConfig, classes: int, side: int) -> Backbone:
    """VGG-16-BN for small images; `backbone.dropout` is 0.5 in the paper.

    Raises:
        ValueError: the depth is not 16, or the side is not a multiple of 32.
    Source: Simonyan and Zisserman 2014, arXiv 1409.1556; dense part as in Zero Time Waste's code.
    """
    require(config.depth in (0, DEPTH), "backbone.depth", "be 16 for vgg", config.depth)
    require(side % 32 == 0, "data.side", "be a multiple of 32 for vgg, which halves it five times", side)
    inputs, first, blocks = 3, side, []
    for index, (channels, halves) in enumerate(CONVOLUTIONS):
        outputs = scaled(channels, config.width)
        side = side // 2 if halves else side
        name = f"conv{index + 1}"
        blocks.append(Block(name, Convolution(inputs, outputs, halves), (outputs, side, side), f"{name}."))
        inputs = outputs
    dense, last = scaled(DENSE.get(first, 2048), config.width), scaled(512 if first == 32 else 1024, config.width)
    blocks.append(Block("fc", Dense(inputs * side**2, dense, config.dropout, relu=True), (dense,), "fc."))
    blocks.append(Block("end", Dense(dense, last, config.dropout, relu=False), (last,), "end.", counts=False))
    return Backbone(tuple(blocks), nn.Linear(last, classes), "linear.")

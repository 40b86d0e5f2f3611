"""Wide ResNet: pre-activation blocks of few layers and many channels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from rlexit.config import require
from vision.backbones import Backbone, Block, GlobalPool, backbones, halved, scaled
from vision.config import BackboneConfig

DEPTH = 32
CHANNELS = (16, 32, 64)


class WideBlock(nn.Module):
    """Batch norm, ReLU and 3x3 convolution, twice, beside a shortcut; the sum is handed on as it is."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride=stride, padding=1)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride))

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        changed = self.dropout(self.conv1(functional.relu(self.bn1(features), inplace=True)))
        return self.conv2(functional.relu(self.bn2(changed), inplace=True)) + self.shortcut(features)


@backbones.register("wrn")
def wrn(config: BackboneConfig, classes: int, side: int) -> Backbone:
    """WRN-32-4 is depth 32 and width 4: three groups of (depth - 2) / 6 blocks, convolutions with bias.

    The stem keeps its 16 channels whatever the width is. In a group's first block the second convolution strides.

    Raises:
        ValueError: the depth is not 6n + 2.
    Source: Zagoruyko and Komodakis 2016, arXiv 1605.07146; sizes as in Zero Time Waste's code.
    """
    depth = config.depth or DEPTH
    require(depth >= 8 and depth % 6 == 2, "backbone.depth", "be 6n + 2 for wrn", depth, "32 is.")
    inputs = CHANNELS[0]
    blocks = [Block("stem", nn.Conv2d(3, inputs, 3, padding=1), (inputs, side, side), "conv1.", counts=False)]
    for group, channels in enumerate(CHANNELS):
        outputs = scaled(channels, config.width)
        for index in range((depth - 2) // 6):
            stride = 2 if group and not index else 1
            side = halved(side, stride)
            block = WideBlock(inputs, outputs, stride, config.dropout)
            name = f"layer{group + 1}.{index}"
            blocks.append(Block(name.replace(".", "_"), block, (outputs, side, side), f"{name}."))
            inputs = outputs
    last = GlobalPool(nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)))
    blocks.append(Block("pool", last, (inputs,), "pool.", counts=False))
    return Backbone(tuple(blocks), nn.Linear(inputs, classes), "linear.")

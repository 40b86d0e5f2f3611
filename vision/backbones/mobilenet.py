"""MobileNet v1: depthwise and pointwise convolutions in turn."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from rlexit.config import require
from vision.backbones import Backbone, Block, GlobalPool, backbones, halved, scaled
from vision.backbones.resnet_cifar import Stem
from vision.config import BackboneConfig

FIRST = 32
# Channels and stride of the blocks.
BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)),
)


class Separable(nn.Module):
    """Depthwise 3x3 and pointwise convolution, each with batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inputs, 3, stride=stride, padding=1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        changed = functional.relu(self.bn1(self.conv1(features)), inplace=True)
        return functional.relu(self.bn2(self.conv2(changed)), inplace=True)


@backbones.register("mobilenet")
def mobilenet(config: BackboneConfig, classes: int, side: int) -> Backbone:
    """MobileNet v1 for small images: its stem does not stride.

    Raises:
        ValueError: a depth is given.
    Source: Howard et al. 2017, arXiv 1704.04861; strides as in Zero Time Waste's code.
    """
    require(config.depth == 0, "backbone.depth", "be 0 for mobilenet, which has one depth only", config.depth)
    inputs = scaled(FIRST, config.width)
    blocks = [Block("stem", Stem(inputs), (inputs, side, side), "", counts=False)]
    for index, (channels, stride) in enumerate(BLOCKS):
        outputs = scaled(channels, config.width)
        side = halved(side, stride)
        blocks.append(
            Block(f"block{index}", Separable(inputs, outputs, stride), (outputs, side, side), f"layers.{index}.")
        )
        inputs = outputs
    blocks.append(Block("pool", GlobalPool(), (inputs,), "", counts=False))
    return Backbone(tuple(blocks), nn.Linear(inputs, classes), "linear.")

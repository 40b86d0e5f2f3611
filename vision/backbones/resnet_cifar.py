"""ResNet for small images: 6n + 2 layers in three groups of basic blocks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from rlexit.config import require
from rlexit.residual import ResidualUnit
from vision.backbones import Backbone, Block, GlobalPool, backbones, halved, scaled
from vision.config import BackboneConfig

DEPTH = 56
CHANNELS = (16, 32, 64)


class Stem(nn.Module):
    """3x3 convolution, batch norm, ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, C, H, W)."""
        return functional.relu(self.bn1(self.conv1(images)), inplace=True)


class SubsampledShortcut(nn.Module):
    """Option A: every other position, and zeros for the channels that are new, half of them on either side."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride)."""
        taken = features[:, :, :: self.stride, :: self.stride]
        return functional.pad(taken, (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the sum goes through a ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = SubsampledShortcut(inputs, outputs, stride)
            if shortcut == "B":
                convolution = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
                self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        changed = functional.relu(self.bn1(self.conv1(features)), inplace=True)
        return functional.relu(self.bn2(self.conv2(changed)) + self.shortcut(features), inplace=True)


@backbones.register("resnet_cifar")
def resnet_cifar(config: BackboneConfig, classes: int, side: int) -> Backbone:
    """ResNet-20, 32, 44, 56, 110, ... with a block per unit.

    State dicts are named as akamaster/pytorch_resnet_cifar10 names them.

    Raises:
        ValueError: the depth is not 6n + 2.
    Source: He et al. 2015, arXiv 1512.03385, section 4.2.
    """
    depth = config.depth or DEPTH
    require(depth >= 8 and depth % 6 == 2, "backbone.depth", "be 6n + 2 for resnet_cifar", depth, "20 and 56 are.")
    inputs = scaled(CHANNELS[0], config.width)
    blocks = [Block("stem", Stem(inputs), (inputs, side, side), "", counts=False)]
    for group, channels in enumerate(CHANNELS):
        outputs = scaled(channels, config.width)
        for index in range((depth - 2) // 6):
            stride = 2 if group and not index else 1
            side = halved(side, stride)
            block = ResidualUnit(BasicBlock(inputs, outputs, stride, config.shortcut))
            name = f"layer{group + 1}.{index}"
            blocks.append(Block(name.replace(".", "_"), block, (outputs, side, side), f"{name}."))
            inputs = outputs
    blocks.append(Block("pool", GlobalPool(), (inputs,), "", counts=False))
    return Backbone(tuple(blocks), nn.Linear(inputs, classes), "linear.")

"""ResNet-50 for large images: sixteen bottlenecks in four groups."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from rlexit.config import require
from vision.backbones import Backbone, Block, GlobalPool, backbones, halved, scaled
from vision.config import BackboneConfig

# Blocks per group, by depth.
GROUPS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
EXPANSION = 4


class LargeStem(nn.Module):
    """7x7 convolution with stride 2, batch norm, ReLU, 3x3 max pooling with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, C, H / 4, W / 4)."""
        changed = functional.relu(self.bn1(self.conv1(images)), inplace=True)
        return functional.max_pool2d(changed, 3, stride=2, padding=1)


class Bottleneck(nn.Module):
    """1x1, 3x3 (which strides) and 1x1 convolution beside a shortcut; the sum goes through a ReLU."""

    def __init__(self, inputs: int, middle: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        changed = functional.relu(self.bn1(self.conv1(features)), inplace=True)
        changed = functional.relu(self.bn2(self.conv2(changed)), inplace=True)
        return functional.relu(self.bn3(self.conv3(changed)) + self.downsample(features), inplace=True)


@backbones.register("resnet50")
def resnet50(config: BackboneConfig, classes: int, side: int) -> Backbone:
    """ResNet-50 (or 101, 152) as in torchvision, whose names its state dicts have.

    Raises:
        ValueError: no such depth, or the images are too small for it.
    Source: He et al. 2015, arXiv 1512.03385; stride in the 3x3 convolution, as torchvision's v1.5.
    """
    depth = config.depth or 50
    require(depth in GROUPS, "backbone.depth", f"be one of {', '.join(map(str, GROUPS))} for resnet50", depth)
    require(side >= 32, "data.side", "be at least 32 for resnet50", side)
    inputs = scaled(64, config.width)
    side = halved(halved(side, 2), 2)
    blocks = [Block("stem", LargeStem(inputs), (inputs, side, side), "", counts=False)]
    for group, count in enumerate(GROUPS[depth]):
        middle = scaled(64 * 2**group, config.width)
        for index in range(count):
            stride = 2 if group and not index else 1
            side = halved(side, stride)
            block = Bottleneck(inputs, middle, EXPANSION * middle, stride)
            inputs = EXPANSION * middle
            name = f"layer{group + 1}.{index}"
            blocks.append(Block(name.replace(".", "_"), block, (inputs, side, side), f"{name}."))
    blocks.append(Block("pool", GlobalPool(), (inputs,), "", counts=False))
    return Backbone(tuple(blocks), nn.Linear(inputs, classes), "fc.")

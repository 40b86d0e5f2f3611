"""Backbones of image classifiers: blocks in a row and a linear head, one file each.

A new backbone is a new file here that registers itself; the conformance tests pick it up.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from rlexit.registry import Registry
from vision.config import BackboneConfig


@dataclass(frozen=True)
class Block:
    """One piece of a backbone; becomes a unit.

    Args:
        name: of the unit; without dots.
        module: (B, ...) to (B, *shape); or a unit, where it is more than a module of one tensor: one that can be skipped,
            or whose features are several tensors. Its tensors are those of its part `module`.
        shape: of what it gives for one image, as its `tap` says where it is a unit.
        prefix: of its tensors' names in a plain state dict.
        counts: whether `network.every` counts it; the stem and the final pooling are not counted.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    prefix: str
    counts: bool = True


@dataclass(frozen=True)
class Backbone:
    """A classifier in parts.

    Args:
        blocks: in the order of execution; the last one gives what the head reads.
        head: the backbone's own.
        prefix: of the head's tensors' names in a plain state dict.
    """

    blocks: tuple[Block, ...]
    head: nn.Module
    prefix: str


# A backbone is built from its config, the number of classes, and the side of the images.
backbones: Registry[Callable[[BackboneConfig, int, int], Backbone]] = Registry("backbone")


class GlobalPool(nn.Module):
    """Mean over all positions, after `before` if there is anything."""

    def __init__(self, before: nn.Module | None = None) -> None:
        super().__init__()
        self.before = before if before is not None else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C)."""
        return self.before(features).mean(dim=(2, 3))


def scaled(channels: int, width: float) -> int:
    """So many channels at a width multiplier; one at least."""
    return max(round(width * channels), 1)


def halved(side: int, stride: int) -> int:
    """The side after a 3x3 convolution with padding 1."""
    return (side - 1) // stride + 1


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

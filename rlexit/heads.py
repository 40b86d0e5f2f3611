"""Heads: the small nets that turn features into logits at an exit, optionally fed by the exit before (cascade)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from rlexit.config import HeadConfig
from rlexit.registry import Registry

# A head is built from the shape of its features, A, its config, and whether it reads the exit before.
heads: Registry[Callable[[tuple[int, ...], int, HeadConfig, bool], Head]] = Registry("head")


class SDNPool(nn.Module):
    """Mixes adaptive max and average pooling by one learnt scalar: `mix * max + (1 - mix) * avg`.

    Args:
        side: (B, C, H, W) becomes (B, C, side, side).
    Source: Kaya et al. 2019, arXiv 1810.07052; as in Zero Time Waste's code (alpha on max, not clamped).
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.mix = nn.Parameter(torch.rand(()))

    def forward(
        self, features: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels side side"]:
        """Pools to `side` x `side`; a smaller map is repeated."""
        # Adaptive pooling on a CPU is five times as fast where channels lie together, the copy included.
        features = features.contiguous(memory_format=torch.channels_last)
        largest = functional.adaptive_max_pool2d(features, self.side)
        average = functional.adaptive_avg_pool2d(features, self.side)
        return self.mix * largest + (1 - self.mix) * average


class Head(nn.Module):
    """Logits from features. `reads_previous` says whether it must be given the logits of the exit before."""

    reads_previous = False

    def forward(self, features: Tensor, previous: Tensor | None = None) -> Tensor:
        """Features (B, ...) and raw logits (B, A) of the exit before, to raw logits (B, A)."""
        raise TypeError(f"`{type(self).__name__}` must implement `forward`.")

    def gather(self, features: Tensor) -> Tensor:
        """What `from_gathered` reads, (B, ...): the part of the work that has no weights, done once per sample.

        On a frozen backbone a head sees the same features in every epoch; the default keeps them as they are.
        """
        return features

    def from_gathered(self, gathered: Tensor, previous: Tensor | None = None) -> Tensor:
        """The logits that `forward` gives, from what `gather` kept."""
        return self(gathered, previous) if self.reads_previous else self(gathered)


class CascadeInput(nn.Module):
    """Appends the logits of the exit before to flat features; detached and normalised by default.

    Source: Wolczyk et al. 2021, arXiv 2106.05409, section 3.1 (raw logits, concatenated, no gradient back).
    """

    def __init__(self, outputs: int, layer_norm: bool, stop_gradient: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(outputs) if layer_norm else nn.Identity()
        self.stop_gradient = stop_gradient

    def forward(
        self, flat: Float[Tensor, "batch width"], previous: Float[Tensor, "batch outputs"]
    ) -> Float[Tensor, "batch joined"]:
        """(B, width) and (B, A) to (B, width + A)."""
        logits = previous.detach() if self.stop_gradient else previous
        return torch.cat([flat, self.norm(logits)], dim=1)


@heads.register("pooled_conv")
class PooledConvHead(Head):
    """3x3 convolution, ReLU, SDN pooling, one linear layer; the head of Zero Time Waste.

    Args:
        shape: (C, H, W) of the features.
        outputs: A, classes or actions.
        config: see `HeadConfig`.
        reads_previous: whether it is fed the logits of the exit before.
    Raises:
        ValueError: the features are no map, or one too small to convolve.
    """

    def __init__(self, shape: tuple[int, ...], outputs: int, config: HeadConfig, reads_previous: bool) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"`head.kind` pooled_conv must read a (C, H, W) map, got shape {shape}. Use linear there.")
        channels, height, width = shape
        self.reads_previous = reads_previous
        if config.stride and min(height, width) + 2 * config.padding < 3:
            raise ValueError(f"`head.stride` must be 0 on a map smaller than 3 x 3, got {config.stride} on {shape}.")
        if config.stride:
            mixed = max(round(config.channels * channels), 1)
            self.conv: nn.Module = nn.Conv2d(channels, mixed, 3, stride=config.stride, padding=config.padding)
            height, width = ((side + 2 * config.padding - 3) // config.stride + 1 for side in (height, width))
            channels = mixed
        else:
            self.conv = nn.Identity()
        self.map_shape = (height, width)
        self.padding = config.padding
        # Patches of a convolution that hardly strides overlap: they would be several times the map.
        self.keeps_patches = config.stride >= 3
        side = config.pool if config.upsample else min(config.pool, height, width)
        self.pool = SDNPool(side)
        self.cascade = CascadeInput(outputs, config.layer_norm, config.stop_gradient) if reads_previous else None
        self.linear = nn.Linear(channels * side**2 + (outputs if reads_previous else 0), outputs)

    def forward(self, features: Tensor, previous: Tensor | None = None) -> Tensor:
        """Features (B, C, H, W) to logits (B, A)."""
        return self._finish(self.conv(features), previous)

    def gather(self, features: Tensor) -> Tensor:
        """(B, positions, 9 C): the patches that the convolution reads, where they are no larger than the map."""
        if not (self.keeps_patches and isinstance(self.conv, nn.Conv2d)):
            return features
        patches = functional.unfold(features, 3, padding=self.padding, stride=self.conv.stride)
        return patches.transpose(1, 2).contiguous()

    def from_gathered(self, gathered: Tensor, previous: Tensor | None = None) -> Tensor:
        """Logits from patches: one matrix product, 3 times as fast as the strided convolution when training on a CPU."""
        if not (self.keeps_patches and isinstance(self.conv, nn.Conv2d)):
            return self._finish(self.conv(gathered), previous)
        mixed = functional.linear(gathered, self.conv.weight.flatten(1), self.conv.bias).transpose(1, 2)
        return self._finish(mixed.unflatten(2, self.map_shape), previous)

    def _finish(self, mixed: Tensor, previous: Tensor | None) -> Tensor:
        flat = self.pool(functional.relu(mixed)).flatten(1)
        if self.cascade is not None:
            flat = self.cascade(flat, previous)
        return self.linear(flat)


@heads.register("linear")
class LinearHead(Head):
    """One linear layer on the flattened features; for dense layers and tokens.

    Args:
        shape: (...) of the features of one row.
        outputs: A, classes or actions.
        config: see `HeadConfig`; only the cascade fields are read.
        reads_previous: whether it is fed the logits of the exit before.
    """

    def __init__(self, shape: tuple[int, ...], outputs: int, config: HeadConfig, reads_previous: bool) -> None:
        super().__init__()
        width = 1
        for side in shape:
            width *= side
        self.reads_previous = reads_previous
        self.cascade = CascadeInput(outputs, config.layer_norm, config.stop_gradient) if reads_previous else None
        self.linear = nn.Linear(width + (outputs if reads_previous else 0), outputs)

    def forward(self, features: Tensor, previous: Tensor | None = None) -> Tensor:
        """Features (B, ...) to logits (B, A)."""
        flat = features.flatten(1)
        if self.cascade is not None:
            flat = self.cascade(flat, previous)
        return self.linear(flat)


@heads.register("branch")
class BranchHead(Head):
    """Maxpools with 3x3 convolutions down to 8 x 8 or less and 64 channels, mean over positions, one linear layer.

    The earlier an exit, the more it pools: its map is fine, and the features that tell classes apart are coarse.

    Args:
        shape: (C, H, W) of the features.
        outputs: A, classes or actions.
        config: see `HeadConfig`; only the cascade fields are read.
        reads_previous: whether it is fed the logits of the exit before.
    Raises:
        ValueError: the features are no map.
    Source: Wang et al. 2020 (DDI), arXiv 1907.04523, section III-C, which leaves the layers open; these are ours.
    """

    COARSE, WIDTH = 8, 64

    def __init__(self, shape: tuple[int, ...], outputs: int, config: HeadConfig, reads_previous: bool) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"`head.kind` branch must read a (C, H, W) map, got shape {shape}. Use linear there.")
        channels, side = shape[0], max(shape[1:])
        pools = 0
        while side > self.COARSE:
            side, pools = (side + 1) // 2, pools + 1
        layers: list[nn.Module] = []
        for index in range(max(pools, 1)):
            last = index == max(pools, 1) - 1
            after = self.WIDTH if last else min(2 * channels, self.WIDTH)
            layers += [nn.MaxPool2d(2, ceil_mode=True)] if pools else []
            layers += [
                nn.Conv2d(channels, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            ]
            channels = after
        self.reads_previous = reads_previous
        self.body = nn.Sequential(*layers)
        self.cascade = CascadeInput(outputs, config.layer_norm, config.stop_gradient) if reads_previous else None
        self.linear = nn.Linear(channels + (outputs if reads_previous else 0), outputs)

    def forward(self, features: Tensor, previous: Tensor | None = None) -> Tensor:
        """Features (B, C, H, W) to logits (B, A)."""
        flat = self.body(features).mean(dim=(2, 3))
        if self.cascade is not None:
            flat = self.cascade(flat, previous)
        return self.linear(flat)


class ModuleHead(Head):
    """Any module as a head, such as the backbone's own last layer.

    Args:
        module: (B, ...) to (B, A).
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, features: Tensor, previous: Tensor | None = None) -> Tensor:
        """The module's logits."""
        return self.module(features)

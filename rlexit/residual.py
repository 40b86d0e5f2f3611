"""Gated residual units: two convolutions beside a shortcut; rows skip them, or some of their channels, for real."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from rlexit.config import require
from rlexit.gates import Decision
from rlexit.macs import macs_per_row
from rlexit.units import Unit

CHANNELS = ("none", "inner", "block_out", "both")


class ResidualUnit(Unit):
    """relu(norm2(conv2(relu(norm1(conv1(x))))) + shortcut(x)); skipped, a row is the shortcut, without the ReLU.

    The shortcut is computed once for a row whether it skips or not: a projection keeps its cost. Kept channels:
    `inner` are the first convolution's outputs, the others are 0; `block_out` are the unit's, the others are the
    shortcut's; `both` are first the inner, then the outer ones.

    Args:
        module: a block with conv1, bn1, conv2, bn2 and shortcut; its tensors keep their names.
        channels: which channels gates decide about.
        skippable: whether rows may pass the unit by.
        narrow: compute the kept channels only, row by row; otherwise all of them are computed, masked, and charged.
    Raises:
        ValueError: no such channel mode, the block lacks a part, or has convolutions whose channels cannot be chosen.
    Source: Wang et al. 2018, arXiv 1711.09485 (skip path); Wang et al. 2020 (DDI), arXiv 1907.04523, equations 1 to 3.
    """

    def __init__(self, module: nn.Module, channels: str = "none", skippable: bool = True, narrow: bool = True) -> None:
        super().__init__()
        require(channels in CHANNELS, "channels", f"be one of {', '.join(CHANNELS)}", channels)
        for part in ("conv1", "bn1", "conv2", "bn2", "shortcut"):
            require(hasattr(module, part), "module", f"have a part {part!r}", type(module).__name__)
        self.module: Any = module
        for name in ("conv1", "conv2") if channels != "none" else ():
            convolution: Any = getattr(module, name)
            plain = convolution.bias is None and convolution.groups == 1 and convolution.padding_mode == "zeros"
            rule = "have no bias, one group, dilation 1 and zero padding where channels are chosen"
            advice = 'Fold the bias into the norm, or use channels="none".'
            require(plain and set(convolution.dilation) == {1}, f"module.{name}", rule, str(convolution), advice)
        self.channels = channels
        self.skippable = skippable
        self.narrow = narrow
        block: Any = module
        self.inner: int = block.conv1.out_channels if channels in ("inner", "both") else 0
        self.width: int = self.inner + (block.conv2.out_channels if channels in ("block_out", "both") else 0)

    def body(self, features: Any, decision: Decision | None = None) -> Any:
        """(B, C, H, W) to (B, C', H', W'): every channel computed, those that are not kept masked."""
        if decision is None or decision.channels is None:
            return self.module(features)
        return self._masked(features, self.skip(features), decision.channels)

    def skip(self, features: Any) -> Any:
        """The shortcut alone."""
        return self.module.shortcut(features)

    def skip_macs(self, features: Any) -> Int[Tensor, " batch"]:
        """(B,) the projection's."""
        return self._counted(features, macs_per_row(self.module.shortcut, features))

    def macs(self, features: Any, decision: Decision | None = None) -> Int[Tensor, " batch"]:
        """(B,) of a row that runs the unit, with its channels."""
        whole = macs_per_row(self.module, features)
        if decision is None or decision.channels is None or not self.narrow:
            return self._counted(features, whole)
        first, second, shortcut = self._parts(features)
        inner, outer = self._kept((decision.channels > 0.5).to(torch.int64))
        c, k = self.module.conv1.out_channels, self.module.conv2.out_channels
        return first // c * inner * self._any(outer) + second // (c * k) * inner * outer + shortcut

    def expected_macs(self, features: Any, decision: Decision | None = None) -> Float[Tensor, " batch"]:
        """(B,) with gradient in the relaxed layer and channel decisions."""
        first, second, shortcut = self._parts(features)
        if decision is None:
            return self._counted(features, first + second + shortcut).float()
        share: Any = 1.0
        both: Any = 1.0
        if decision.channels is not None and self.narrow:
            inner, outer = self._kept(decision.channels)
            share = inner * self._any(outer) / self.module.conv1.out_channels
            both = inner * outer / (self.module.conv1.out_channels * self.module.conv2.out_channels)
        return decision.relaxed * (first * share + second * both) + shortcut

    def relax(self, features: Any, decision: Decision) -> Any:
        """Dense training: equations 1 to 3, the shortcut computed once."""
        shortcut = self.skip(features)
        ran = self._masked(features, shortcut, decision.channels)
        return torch.lerp(shortcut.to(ran.dtype), ran, decision.relaxed.reshape(-1, 1, 1, 1).to(ran.dtype))

    def execute(self, features: Any, decision: Decision | None) -> tuple[Any, Int[Tensor, " batch"]]:
        """Really runs the unit: rows that skip it and channels that are not kept are not computed."""
        if decision is None:
            return self(features), self.macs(features)
        if len(features) == 1 and decision.channels is None:  # serving, where every operator shows
            if bool(decision.action):
                return self.module(features), self.macs(features)
            return self.skip(features), self.skip_macs(features)
        runs = decision.action > 0
        index = torch.nonzero(runs).flatten()
        macs = torch.where(runs, self.macs(features, decision), self.skip_macs(features))
        everybody = len(index) == len(features)
        if everybody and decision.channels is None:
            return self(features), macs
        shortcut = self.skip(features)
        if not len(index):
            return shortcut, macs
        rows = features if everybody else features[index]
        beside = shortcut if everybody else shortcut[index]
        if decision.channels is None:
            ran = functional.relu_(self._branch(rows) + beside)
        else:
            chosen = decision.channels if everybody else decision.channels[index]
            ran = self._narrow(rows, beside, chosen > 0.5) if self.narrow else self._masked(rows, beside, chosen)
        return (ran if everybody else shortcut.clone().index_copy_(0, index, ran)), macs

    def _counted(self, features: Any, macs: int) -> Int[Tensor, " batch"]:
        return torch.full((len(features),), macs, dtype=torch.int64, device=features.device)

    def _parts(self, features: Any) -> tuple[int, int, int]:
        whole = macs_per_row(self.module, features)
        first, shortcut = macs_per_row(self.module.conv1, features), macs_per_row(self.module.shortcut, features)
        return first, whole - first - shortcut, shortcut

    def _kept(self, mask: Tensor) -> tuple[Any, Any]:
        """How many inner and outer channels each row keeps."""
        inner = mask[:, : self.inner].sum(dim=1) if self.inner else self.module.conv1.out_channels
        outer = mask[:, self.inner :].sum(dim=1) if self.width > self.inner else self.module.conv2.out_channels
        return inner, outer

    def _any(self, outer: Any) -> Any:
        # Where no channel of the result is kept, nothing reads the first convolution, and it is not computed.
        return (outer > 0).to(outer.dtype) if isinstance(outer, Tensor) else 1

    def _branch(self, features: Tensor, inner: Tensor | None = None) -> Tensor:
        block = self.module
        changed = functional.relu(block.bn1(block.conv1(features)), inplace=True)
        if inner is not None:
            changed = changed * inner[:, :, None, None]
        return block.bn2(block.conv2(changed))

    def _masked(self, features: Tensor, shortcut: Tensor, mask: Tensor | None) -> Tensor:
        inner = mask[:, : self.inner] if mask is not None and self.inner else None
        ran = functional.relu(self._branch(features, inner) + shortcut)
        if mask is None or self.width == self.inner:
            return ran
        outer = mask[:, self.inner :, None, None]
        return outer * ran + (1 - outer) * shortcut

    def _narrow(self, features: Tensor, shortcut: Tensor, keep: Tensor) -> Tensor:
        """Rows with the same channels are computed together, with the weights of these channels alone."""
        if len(keep) == 1:  # the usual case of serving: nothing to group
            return self._few(features, shortcut, keep[0])
        masks, group = torch.unique(keep, dim=0, return_inverse=True)
        if len(masks) == 1:
            return self._few(features, shortcut, masks[0])
        result = shortcut.clone()
        for number, mask in enumerate(masks):
            index = torch.nonzero(group == number).flatten()
            result.index_copy_(0, index, self._few(features[index], shortcut[index], mask))
        return result

    def _few(self, features: Tensor, shortcut: Tensor, mask: Tensor) -> Tensor:
        block = self.module
        inner = torch.nonzero(mask[: self.inner]).flatten() if self.inner else None
        outer = torch.nonzero(mask[self.inner :]).flatten() if self.width > self.inner else None
        if outer is not None and not len(outer):
            return shortcut
        second = _chosen(block.conv2.weight, outer, inner)
        if inner is not None and not len(inner):
            # No inner channel is left: the second convolution sees zeros, and its norm adds a constant.
            changed = _normed(block.bn2, shortcut.new_zeros((1, second.shape[0], 1, 1)), outer)
        else:
            first = block.conv1
            seen = functional.conv2d(features, _chosen(first.weight, inner, None), None, first.stride, first.padding)
            seen = functional.relu_(_normed(block.bn1, seen, inner))
            changed = functional.conv2d(seen, second, None, block.conv2.stride, block.conv2.padding)
            changed = _normed(block.bn2, changed, outer)
        if outer is None:
            return functional.relu_(changed + shortcut)
        return shortcut.index_copy(1, outer, functional.relu_(changed + shortcut.index_select(1, outer)))


def _chosen(weight: Tensor, outputs: Tensor | None, inputs: Tensor | None) -> Tensor:
    weight = weight if outputs is None else weight.index_select(0, outputs)
    return weight if inputs is None else weight.index_select(1, inputs)


def _normed(norm: Any, features: Tensor, chosen: Tensor | None) -> Tensor:
    """Batch norm of the chosen channels by running statistics."""
    numbers = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, variance, weight, bias = (one if chosen is None else one.index_select(0, chosen) for one in numbers)
    return functional.batch_norm(features, mean, variance, weight, bias, False, 0.0, norm.eps)

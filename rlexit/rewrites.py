"""Exact rewrites of a network for export: the same function in operators that ONNX has, and in fewer of them.

At batch 1 an operator costs a runtime 1 to 3 us however small it is, and a head has as many of them as a backbone. What is
linear is therefore folded into the weights beside it: the mix of max and average pooling and the repetition of small maps
into the head's linear layer, and the ensemble's weights as well; the division of frames by 255 into the first
convolution. Equal in real numbers; in float32 within rounding, which the parity check of `rlexit.export` measures.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from rlexit.heads import Head, PooledConvHead, SDNPool
from rlexit.network import StagedNetwork

WHITE = 255


def windows(size: tuple[int, int], side: int) -> list[list[tuple[int, int]]]:
    """Where each output of adaptive pooling begins and ends, per axis: floor(i size / n) up to ceil((i + 1) size / n)."""
    return [[(index * length // side, -(-(index + 1) * length // side)) for index in range(side)] for length in size]


class PlainOperators(TorchFunctionMode):
    """Says in plain operators, while a network is traced, what is none in ONNX or none that is served.

    Average pooling of a map whose sides are no multiples of the result's: its windows. Padding of channels by zeros:
    zeros made of channels that are there, because `Pad` can make any size out of any number.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One call of a torch function."""
        if func is functional.adaptive_avg_pool2d and isinstance(args[1], int):
            size = (int(args[0].shape[2]), int(args[0].shape[3]))
            if any(length % args[1] for length in size):
                return _averages(args[0], windows(size, args[1]))
        given = kwargs or {}
        zeros_wanted = given.get("mode", "constant") == "constant" and not given.get("value")
        if func is functional.pad and zeros_wanted and len(args[1]) == 6 and not any(args[1][:4]):
            features, (before, after) = args[0], args[1][4:]
            if min(before, after) >= 0:
                return torch.cat([*_zeros(features, before), features, *_zeros(features, after)], dim=1)
        return func(*args, **given)


def _zeros(features: Tensor, count: int) -> list[Tensor]:
    """So many channels of zeros, in parts."""
    whole, rest = divmod(count, int(features.shape[1]))
    return [features * 0] * whole + ([features[:, :rest] * 0] if rest else [])


def _averages(features: Tensor, places: list[list[tuple[int, int]]]) -> Tensor:
    """(B, C, H, W) to the average of each window."""
    for dim, axis in enumerate(places, start=2):
        parts = [features.narrow(dim, begin, end - begin).mean(dim=dim, keepdim=True) for begin, end in axis]
        features = torch.cat(parts, dim)
    return features


class WindowPool(nn.Module):
    """`SDNPool` for maps of one known size: adaptive pooling written as windows, which ONNX can say.

    Output i of n reads positions floor(i * size / n) up to ceil((i + 1) * size / n) of each side. For 5 to 4 these are
    windows of 2 at stride 1; a map that is enlarged (2 to 4) only repeats its values.

    Args:
        pool: the original.
        size: (H, W) of the map.
    """

    def __init__(self, pool: SDNPool, size: tuple[int, int]) -> None:
        super().__init__()
        self.mix = float(pool.mix.detach())
        self.windows = windows(size, pool.side)
        kernels = [{end - begin for begin, end in axis} for axis in self.windows]
        strides = [{late[0] - early[0] for early, late in pairwise(axis)} for axis in self.windows]
        self.single = all(kernel == {1} for kernel in kernels)
        self.regular = all(len(kernel) == 1 for kernel in kernels) and all(
            len(stride) <= 1 and 0 not in stride for stride in strides
        )
        self.kernel = tuple(min(kernel) for kernel in kernels)
        self.stride = tuple(max(stride, default=1) for stride in strides)

    def both(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) to the largest and the average of each window, (B, C, side, side) each."""
        if self.regular:
            return (
                functional.max_pool2d(features, self.kernel, self.stride),
                functional.avg_pool2d(features, self.kernel, self.stride),
            )
        largest = features
        for dim, axis in enumerate(self.windows, start=2):
            parts = [(begin, end - begin) for begin, end in axis]
            largest = torch.cat([largest.narrow(dim, *part).amax(dim=dim, keepdim=True) for part in parts], dim)
        return largest, _averages(features, self.windows)


class RewrittenHead(Head):
    """`PooledConvHead` for maps of one known size.

    Args:
        head: the original; left as it is.
        size: (H, W) of the map that is pooled.
    """

    def __init__(self, head: PooledConvHead, size: tuple[int, int]) -> None:
        super().__init__()
        self.reads_previous = head.reads_previous
        self.conv = copy.deepcopy(head.conv)
        self.pool = WindowPool(head.pool, size)
        self.norm = copy.deepcopy(head.cascade.norm) if head.cascade is not None else None
        weight, side = head.linear.weight.detach(), head.pool.side
        outputs = len(weight)
        channels = (weight.shape[1] - (outputs if head.reads_previous else 0)) // side**2
        pooled = weight[:, : channels * side**2]
        if self.pool.single:
            rows, columns = ([begin for begin, _ in axis] for axis in self.pool.windows)
            folded = weight.new_zeros((outputs, channels, *size))
            for down, row in enumerate(rows):
                for right, column in enumerate(columns):
                    folded[:, :, row, column] += pooled.unflatten(1, (channels, side, side))[:, :, down, right]
            pooled = folded.flatten(1)
        else:
            pooled = torch.cat([self.pool.mix * pooled, (1 - self.pool.mix) * pooled], dim=1)
        weight = torch.cat([pooled, weight[:, channels * side**2 :]], dim=1)
        self.linear = nn.Linear(weight.shape[1], outputs)
        self.linear.weight = nn.Parameter(weight)
        self.linear.bias = nn.Parameter(head.linear.bias.detach().clone())

    def parts(self, features: Tensor, previous: Tensor | None = None) -> list[Tensor]:
        """What the linear layer reads, side by side: flat pooled maps, and the exit before in a cascade."""
        mixed = functional.relu(self.conv(features))
        flat = mixed.flatten(1) if self.pool.single else torch.cat(self.pool.both(mixed), dim=1).flatten(1)
        return [flat] if self.norm is None else [flat, self.norm(previous)]

    def forward(self, features: Tensor, previous: Tensor | None = None) -> Tensor:
        """Features (B, C, H, W) to logits (B, A)."""
        return self.linear(_beside(self.parts(features, previous)))


class MixedHead(nn.Module):
    """A head and the weighted sum of its ensemble as one linear layer, which also reads the logits of earlier exits.

    Args:
        head: of the exit.
        weights: (exit + 1,) of the exits so far, as `Ensemble.as_sum` says.
        bias: (A,) added to the sum.
        keeps: whether the head's own raw logits are wanted too.
    """

    def __init__(self, head: RewrittenHead, weights: Tensor, bias: Tensor, keeps: bool) -> None:
        super().__init__()
        self.head = head
        own, start = head.linear.weight.detach(), head.linear.bias.detach()
        outputs, *earlier = len(own), *weights[:-1].tolist()
        weight = torch.cat([weights[-1] * own, *(share * torch.eye(outputs) for share in earlier)], dim=1)
        total = weights[-1] * start + bias
        self.parts = [outputs, outputs] if keeps else [outputs]
        if keeps:
            weight = torch.cat([functional.pad(own, (0, weight.shape[1] - own.shape[1])), weight])
            total = torch.cat([start, total])
        self.linear = nn.Linear(weight.shape[1], len(weight))
        self.linear.weight, self.linear.bias = nn.Parameter(weight), nn.Parameter(total)

    def forward(self, features: Tensor, earlier: Sequence[Tensor]) -> tuple[Tensor | None, Tensor]:
        """Features and the raw logits (B, A) of earlier exits, to raw logits if they are kept, and their weighted sum."""
        previous = earlier[-1] if self.head.reads_previous else None
        found = self.linear(_beside([*self.head.parts(features, previous), *earlier]))
        if len(self.parts) == 1:
            return None, found
        logits, mixed = found.split(self.parts, dim=1)
        return logits, mixed


def _beside(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


@torch.no_grad()
def rewritten(network: StagedNetwork, example: Tensor) -> StagedNetwork:
    """A copy of a network on the CPU with its heads and its first convolution rewritten; see `given_as` and `prepared`.

    Args:
        network: left as it is.
        example: (B, ...) raw inputs.
    """
    copied = copy.deepcopy(network).cpu().eval()
    sizes: dict[nn.Module, tuple[int, int]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sizes[module] = (int(inputs[0].shape[2]), int(inputs[0].shape[3]))

    pools = [module for module in copied.modules() if isinstance(module, SDNPool)]
    handles = [pool.register_forward_pre_hook(note) for pool in pools]
    copied(example)
    for handle in handles:
        handle.remove()
    for name, head in list(copied.heads.items()):
        if isinstance(head, PooledConvHead):
            copied.heads[name] = RewrittenHead(head, sizes[head.pool])
    first = _scaled(copied) if example.dtype == torch.uint8 else None
    if first is not None:
        first.weight /= WHITE
        copied.rewritten_scale = True  # type: ignore[assignment]
    return copied


def given_as(network: StagedNetwork, inputs: Tensor) -> Tensor:
    """Raw inputs as a rewritten network is given them: float32 of the same values where its weights divide them."""
    return inputs.to(torch.float32) if getattr(network, "rewritten_scale", False) else inputs


def prepared(network: StagedNetwork, inputs: Tensor) -> Tensor:
    """What the first unit of a rewritten network reads; the division of frames may be in its weights."""
    return inputs if getattr(network, "rewritten_scale", False) else network.prepare(inputs)


def newest(network: StagedNetwork, inputs: Tensor) -> Tensor:
    """The newest channel of raw inputs as the first unit's original reads it."""
    if getattr(network, "rewritten_scale", False):
        return inputs[:, -1:] / WHITE
    prepared_inputs: Tensor = network.prepare(inputs)[:, -1:]
    return prepared_inputs


def _scaled(network: StagedNetwork) -> Any:
    """The convolution that alone reads the frames, if that is what the network begins with."""
    if type(network).prepare is not StagedNetwork.prepare:
        return None
    unit: Any = network.units[network.unit_names[0]]
    module = getattr(unit, "module", None)
    first = module[0] if isinstance(module, nn.Sequential) and len(module) else module
    return first if isinstance(first, nn.Conv2d) and first.padding_mode == "zeros" else None

"""Operations as Zero Time Waste's profiler counts them: a named second counter beside MACs, and never mixed with them.

Multiplications and additions are counted apart, so an operation is about half a MAC; and a convolution in groups is counted
once per group too often, which makes MobileNet's depthwise ones, an eighth of its true work, its largest part. The
published MobileNet rows come out under this count only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlexit.costs import cost_table
from rlexit.heads import SDNPool
from rlexit.network import StagedNetwork

NOTE = (
    "It is that of the published tables: multiplications and additions apart, and convolutions in groups overrated, which "
    "makes MobileNet's depthwise ones its largest part."
)


@dataclass(frozen=True)
class ReferenceOps:
    """Operations of one row.

    Args:
        exits: of leaving at every exit, all heads before it included.
        full: of the network without early heads.
    """

    exits: tuple[int, ...]
    full: int


def operations(module: nn.Module, output: Tensor, source: Tensor) -> int:
    """Operations of one layer, as the official profiler has them; 0 for what it does not know.

    Args:
        module: the layer.
        output: (1, ...) what it gave.
        source: (1, ...) what it read.
    Source: gmum/Zero-Time-Waste, ztw_cv_original/profiler.py, with its count of groups.
    """
    count = output.numel()
    match module:
        case nn.Conv2d():
            kernel = math.prod(module.kernel_size) * module.in_channels // module.groups
            return count * (2 * kernel - 1 + (module.bias is not None)) * module.groups
        case nn.Linear():
            return (2 * module.in_features - 1) * module.out_features
        case nn.BatchNorm2d():
            return 2 * count
        case nn.ReLU():
            return count
        case SDNPool():
            reach = -(-source.shape[-1] // module.side)
            return (reach - 1) * count + reach * count
        case _:
            return 0


@torch.no_grad()
def reference_ops(network: StagedNetwork, inputs: Any) -> ReferenceOps:
    """Counts a network by passing one row through it.

    Args:
        network: in evaluation mode.
        inputs: (B, ...) raw inputs; only the shape is read.
    """
    row = torch.zeros_like(inputs[:1])
    cost_table(network, row)  # MACs of every shape are known now, so that no layer is run to count them
    seen = 0

    def add(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        nonlocal seen
        if isinstance(output, Tensor) and not output.is_meta:
            seen += operations(module, output, arguments[0])

    hooks = [part.register_forward_hook(add) for part in network.modules()]
    try:
        state = network.begin(row)
        exits: list[int] = []
        early = 0
        while not network.finished(state):
            state = network.advance(state)
            if network.at_exit(state):
                before = seen
                state = network.answer(state)
                exits.append(seen)
                early += seen - before if len(exits) < network.exits else 0
    finally:
        for hook in hooks:
            hook.remove()
    return ReferenceOps(tuple(exits), seen - early)

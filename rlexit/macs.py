"""Multiply-adds of a module on given features, counted by torch's own counter without doing the work."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from rlexit.state import leaves_of, map_tensors

_counted: weakref.WeakKeyDictionary[nn.Module, dict[Any, int]] = weakref.WeakKeyDictionary()


def _signature(tree: Any) -> str:
    return ";".join(f"{tuple(leaf.shape[1:])}{leaf.dtype}" for leaf in leaves_of(tree))


def _meta_rows(leaf: Tensor) -> Tensor:
    # Under autocast features may be of another precision than the weights; for counting they need not be.
    dtype = torch.get_default_dtype() if leaf.is_floating_point() else leaf.dtype
    # Two rows, because batch norm in training refuses a single number per channel.
    return torch.empty((2, *leaf.shape[1:]), dtype=dtype, device="meta")


def _meta(weight: Tensor) -> Tensor:
    dtype = torch.get_default_dtype() if weight.is_floating_point() else weight.dtype
    return torch.empty_like(weight, dtype=dtype, device="meta")


def macs_per_row(module: nn.Module, *inputs: Any) -> int:
    """Multiply-adds of convolutions and linear layers that `module` executes for one row.

    Norms, pooling, activations and softmax count 0, as everywhere in rlexit; they show in the latency. The module is
    run on meta tensors, so nothing is computed, and each shape is counted once.

    Args:
        module: its `forward` is counted.
        inputs: trees of (B, ...) tensors (or None); only the shapes are read.
    Returns:
        Count for one row. 1 MAC = 1 multiply-add = 2 FLOPs.
    Source: torch.utils.flop_counter, which counts 2 per multiply-add.
    """
    known = _counted.setdefault(module, {})
    # One tensor is the usual case, and this is asked before every unit of a single decision.
    lone = inputs[0] if len(inputs) == 1 else None
    key = (lone.shape[1:], lone.dtype) if isinstance(lone, Tensor) else _signature(inputs)
    if key not in known:
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        weights = {name: _meta(value) for name, value in named.items()}
        rows = tuple(map_tensors(_meta_rows, value) for value in inputs)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            functional_call(module, weights, rows)
        known[key] = counter.get_total_flops() // 4  # two rows, two FLOPs per multiply-add
    return known[key]

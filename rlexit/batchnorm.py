"""Batch statistics where gates are: frozen while something else learns, taken anew when everything is learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rlexit.costs import cost_table
from rlexit.network import StagedNetwork


def norms(module: nn.Module) -> list[_BatchNorm]:
    """The batch norms that keep running statistics."""
    found = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    return [part for part in found if part.running_mean is not None]


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Batch norms of a module use their running statistics and leave them as they are, whatever mode it is in."""
    changed = [part for part in norms(module) if part.training]
    for part in changed:
        part.eval()
    try:
        yield
    finally:
        for part in changed:
            part.train()


@torch.no_grad()
def recalibrate(network: StagedNetwork, batches: Sequence[Any]) -> None:
    """Takes the statistics of the units' batch norms anew, as means over batches, with the gates' greedy decisions.

    Rows that skip a unit do not count in it. One that no row reaches keeps what it has. Gates and heads stay as they are.

    Args:
        network: in evaluation mode afterwards.
        batches: raw inputs; a single row cannot be normalised by itself, so they should be large.
    """
    network.eval()
    # What units cost is counted once per shape, on a single row, which batch norms in training refuse.
    cost_table(network, batches[0])
    parts = norms(network.units)
    kept = [(part.momentum, part.num_batches_tracked) for part in parts]
    before = [(part.running_mean, part.running_var) for part in parts]
    for part in parts:
        part.momentum = None  # a plain mean over batches
        part.running_mean = torch.zeros_like(part.running_mean)  # type: ignore[arg-type]
        part.running_var = torch.ones_like(part.running_var)  # type: ignore[arg-type]
        part.num_batches_tracked = torch.zeros((), dtype=torch.long, device=part.running_mean.device)
        part.train()
    narrow = [unit for unit in network.units.children() if getattr(unit, "narrow", False)]
    for unit in narrow:  # computed channel by channel, a unit reads statistics and takes none
        unit.narrow = False  # type: ignore[assignment]
    for inputs in batches:
        state = network.begin(inputs)
        while not network.finished(state):
            state, decision = network.decide(state)
            state = network.advance(state, decision)
            if network.at_exit(state):
                state = network.pass_by(state)
    for part, (momentum, count), (mean, variance) in zip(parts, kept, before, strict=True):
        unseen = not int(part.num_batches_tracked)  # type: ignore[arg-type]
        part.momentum, part.num_batches_tracked = momentum, count
        if unseen:
            part.running_mean, part.running_var = mean, variance
    for unit in narrow:
        unit.narrow = True  # type: ignore[assignment]
    network.eval()

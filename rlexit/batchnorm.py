"""Batch statistics where gates are: frozen while something else learns, taken anew when everything is learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

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


class Moments:
    """What one batch norm was given over a whole pass: rows and positions of a channel count alike.

    Args:
        norm: normalises by the statistics of each call while its `track_running_stats` is off, and changes nothing.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm = norm
        self.count = 0
        self.total = torch.zeros(norm.num_features, dtype=torch.float64)
        self.squares = torch.zeros_like(self.total)

    def see(self, norm: nn.Module, given: tuple[Any, ...]) -> None:
        """A hook before each call; a channel with a single number is normalised by the statistics that stand."""
        features: Tensor = given[0]
        count = features.numel() // features.shape[1]
        norm.training = count > 1
        if features.is_meta or not count:
            return  # counting multiply-adds shows no numbers
        values = features.to(torch.float64).transpose(0, 1).flatten(1)
        self.count += count
        self.total = self.total + values.sum(dim=1).cpu()
        self.squares = self.squares + values.square().sum(dim=1).cpu()

    def settle(self) -> None:
        """Makes them the norm's running statistics; without two numbers to a channel it keeps what it has."""
        if self.count < 2:
            return
        mean = self.total / self.count
        variance = (self.squares - self.count * mean * mean) / (self.count - 1)
        self.norm.running_mean.copy_(mean)  # type: ignore[union-attr]
        self.norm.running_var.copy_(variance.clamp(min=0))  # type: ignore[union-attr]


@torch.no_grad()
def recalibrate(network: StagedNetwork, batches: Sequence[Any]) -> None:
    """Takes the statistics of the units' batch norms anew, over all rows that really run, with the gates' greedy decisions.

    Rows that skip a unit do not count in it, so batches count by the rows that run: mean and unbiased variance are those of
    all of them together. A norm that no row reaches keeps what it has. Gates and heads stay as they are.

    Args:
        network: in evaluation mode afterwards.
        batches: raw inputs. What later units see was normalised batch by batch, so they should be large.
    """
    network.eval()
    seen = [Moments(norm) for norm in norms(network.units)]
    narrow = [unit for unit in network.units.children() if getattr(unit, "narrow", False)]
    hooks = [one.norm.register_forward_pre_hook(one.see) for one in seen]
    try:
        for one in seen:
            one.norm.track_running_stats = False
        for unit in narrow:  # computed channel by channel, a unit reads statistics and calls no norm
            unit.narrow = False  # type: ignore[assignment]
        for inputs in batches:
            _pass(network, inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for one in seen:
            one.norm.track_running_stats = True
        for unit in narrow:
            unit.narrow = True  # type: ignore[assignment]
        network.eval()
    for one in seen:
        one.settle()


def _pass(network: StagedNetwork, inputs: Any) -> None:
    """Really runs all units, and no head before the last."""
    state = network.begin(inputs)
    while not network.finished(state):
        state, decision = network.decide(state)
        state = network.advance(state, decision)
        if network.at_exit(state):
            state = network.pass_by(state)

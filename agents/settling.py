"""Settling: what was learnt by drawing is made greedy, as frequent as the draws or as cheap as the target."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from agents.paths import REUSE, Batch, gate_names
from rlexit.gates.layer import DepthCell
from rlexit.network import StagedNetwork
from rlexit.resource import settled_shift

# Greedy play moves the states, so frequencies are fitted so often.
ROUNDS = 3

# Plays greedily: the rows, and their mean relative MACs.
Greedy = Callable[[], tuple[Batch, float]]


def settle(network: StagedNetwork, drawn: Batch, greedy: Greedy, target: float) -> dict[str, float]:
    """Shifts the gates' biases so that greedy decisions do what drawn ones did.

    A gate that draws with p = 0.3 everywhere opens in three of ten steps, and greedily in none.

    Args:
        network: changed in place.
        drawn: rows of drawn decisions, whose frequencies are wanted.
        greedy: plays on.
        target: relative MACs to end at; 0 for those of the frequencies.
    Returns:
        `refine/cost_settled`, and `gate/greedy_frac/*`.
    """
    for _ in range(0 if target else ROUNDS):
        now = greedy()[0].logits()
        wanted = drawn.open_shares()
        for names in alike(network, wanted):
            found = torch.cat([now.get(name, torch.zeros(0)) for name in names])
            opened = torch.cat([(drawn.gates[name].action[drawn.gates[name].asked] > 0).float() for name in names])
            if len(found):
                shift(network, names[0], -float(torch.quantile(found, 1 - float(opened.mean()))))
    if target:
        _cheapen_to(network, target, greedy)
    rows, cost = greedy()
    return {
        **{f"gate/greedy_frac/{name}": share for name, share in rows.open_shares().items()},
        "refine/cost_settled": cost,
    }


def _cheapen_to(network: StagedNetwork, target: float, greedy: Greedy) -> None:
    """Shifts all gates until greedy play costs the target, or a little less."""
    at = 0.0

    def cost(shift: float) -> float:
        nonlocal at
        _cheapen(network, shift - at)
        at = shift
        return greedy()[1]

    settled_shift(cost, target)


def _cheapen(network: StagedNetwork, by: float) -> None:
    """Moves every gate's logit towards less compute: leave, skip, repeat."""
    units, leaving = gate_names(network)
    for names in alike(network, leaving):
        shift(network, names[0], by)
    for names in alike(network, (*units, *([REUSE] if network.reuse is not None else []))):
        shift(network, names[0], -by)


def alike(network: StagedNetwork, names: Iterable[str]) -> list[list[str]]:
    """Names of gates, those together whose logits come from one layer, as recurrent gates' do."""
    groups: dict[int, list[str]] = {}
    for name in names:
        groups.setdefault(id(_last(network, name)), []).append(name)
    return list(groups.values())


def _last(network: StagedNetwork, name: str) -> nn.Linear:
    if name.startswith("gates."):
        shared = next((module for module in network.gates.modules() if isinstance(module, DepthCell)), None)
        if shared is not None:
            return shared.logit
    gate: Any = network.get_submodule(name)
    return [module for module in gate.modules() if isinstance(module, nn.Linear)][-1]


def shift(network: StagedNetwork, name: str, value: float) -> None:
    """Adds to the bias of a gate's last layer, and so to its logit."""
    bias: Tensor = _last(network, name).bias
    with torch.no_grad():
        bias.add_(value)

"""Settling: what was learnt by drawing is made greedy, as frequent as the draws or as cheap as the target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from agents.paths import REUSE, Batch, gate_names
from rlexit.network import StagedNetwork
from rlexit.resource import settled_shift

# Greedy play moves the states, so frequencies are fitted so often.
ROUNDS = 3

# Plays greedily: the rows, and their mean relative MACs.
Greedy = Callable[[], tuple[Batch, float]]


def settle(network: StagedNetwork, drawn: Batch, greedy: Greedy, target: float) -> dict[str, float]:
    """Shifts the gates' logits so that greedy decisions do what drawn ones did.

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
        for name, share in drawn.open_shares().items():
            if name in now:
                shift(network, name, -float(torch.quantile(now[name], 1 - share)))
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
    for name in leaving:
        shift(network, name, by)
    for name in (*units, *([REUSE] if network.reuse is not None else [])):
        shift(network, name, -by)


def shift(network: StagedNetwork, name: str, by: float) -> None:
    """Moves the logit of the gate of that name."""
    gate: Any = network.get_submodule(name)
    gate.shift(by)

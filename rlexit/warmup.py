"""Warm-up: new gates first learn to be open, while nothing else of the network changes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlexit.config import require
from rlexit.gates import opened
from rlexit.network import StagedNetwork

# Probability of being open at which it is enough: a small change of the features shuts none.
ENOUGH = 0.95


@dataclass(frozen=True)
class WarmedUp:
    """How a warm-up went.

    Args:
        updates: that were needed.
        open_share: of the greedy decisions on the last batch, in the end.
    """

    updates: int
    open_share: float


def warm_up(
    network: StagedNetwork,
    batches: Iterable[Any],
    *,
    learning_rate: float = 0.01,
    share: float = 1.0,
) -> WarmedUp:
    """Trains the gates alone until they run everything: a skip ratio of 0.

    New gates near one half wreck a network whose statistics fit the full one. The forward pass is replayed with every
    gate open, so features are those of the full network; the loss is minus the log-probability of being open.
    Weights, and the statistics of batch norms, of everything that is no gate are untouched.

    Args:
        network: its gates have parameters.
        batches: raw inputs; as many updates as there are batches, at most.
        learning_rate: of Adam.
        share: of open decisions at which it is enough.
    Raises:
        ValueError: the network has no gates that learn.
    Source: Wang et al. 2020 (DDI), arXiv 1907.04523, section IV; as in its authors' DFS code, whose statistics drift.
    """
    parameters = list(network.gates.parameters())
    require(bool(parameters), "network", "have gates that learn", type(network).__name__, "Leave the warm-up out.")
    others = [p for p in network.parameters() if not any(p is own for own in parameters)]
    wanted = [p.requires_grad for p in others]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    was_training = network.training
    network.eval()
    network.gates.train()
    deciding: list[Any] = [gate for gate in network.gates.values() if gate.decides]
    needed = [_explored(ENOUGH, gate.bound) for gate in deciding]
    enough = sum(needed) / len(needed)
    updates = 0
    reached: float | None = None
    inputs: Any = None
    try:
        for p in others:
            p.requires_grad_(False)
        for inputs in batches:
            certainty = _certainty(network, inputs)
            reached = _open_share(network, inputs) if float(certainty.detach()) >= enough else None
            if reached is not None and reached >= share:
                break
            optimizer.zero_grad(set_to_none=True)
            (-certainty).backward()
            optimizer.step()
            updates, reached = updates + 1, None
        if reached is None and inputs is not None:
            reached = _open_share(network, inputs)
    finally:
        for p, flag in zip(others, wanted, strict=True):
            p.requires_grad_(flag)
        network.train(was_training)
    return WarmedUp(updates, reached or 0.0)


def _explored(probability: float, bound: float) -> float:
    """Log of the probability with which a gate draws an action that it wants with `probability`."""
    return math.log(bound * probability + (1 - bound) * (1 - probability))


def _certainty(network: StagedNetwork, inputs: Any) -> Tensor:
    """Mean log-probability per decision of being open, on the features of the full network; with gradient."""
    gates: list[Any] = list(network.gates.values())
    trace = network(inputs, decisions=[opened(gate, len(inputs), inputs.device) for gate in gates])
    pairs = zip(trace.decisions, gates, strict=True)
    return torch.stack([one.log_prob / (gate.width + gate.may_skip) for one, gate in pairs if gate.decides]).mean()


@torch.no_grad()
def _open_share(network: StagedNetwork, inputs: Any) -> float:
    """Share of the greedy decisions that run a unit or keep a channel, as they will be in evaluation."""
    network.gates.eval()
    pairs = zip(network(inputs).decisions, network.gates.values(), strict=True)
    decisions = [one for one, gate in pairs if gate.decides]
    network.gates.train()
    runs = [one.action > 0 if one.channels is None else one.channels > 0.5 for one in decisions]
    return float(torch.cat([one.flatten() for one in runs]).float().mean())

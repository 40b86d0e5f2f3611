"""Warm-up: new gates first learn to be open, while nothing else of the network changes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlexit.config import require
from rlexit.gates import Decision
from rlexit.network import StagedNetwork

# Mean log-probability of being open at which it is enough: p = 0.95, where a small change of the features shuts none.
ENOUGH = math.log(0.95)


@dataclass(frozen=True)
class WarmedUp:
    """How a warm-up went.

    Args:
        updates: that were needed.
        open_share: of the greedy decisions on the last batch; 0 where the gates were never certain enough to be looked at.
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
    updates, reached = 0, 0.0
    try:
        for p in others:
            p.requires_grad_(False)
        for inputs in batches:
            certainty = _certainty(network, inputs)
            if float(certainty.detach()) >= ENOUGH:
                reached = _open_share(network, inputs)
                if reached >= share:
                    break
            optimizer.zero_grad(set_to_none=True)
            (-certainty).backward()
            optimizer.step()
            updates += 1
    finally:
        for p, flag in zip(others, wanted, strict=True):
            p.requires_grad_(flag)
        network.train(was_training)
    return WarmedUp(updates, reached)


def _certainty(network: StagedNetwork, inputs: Any) -> Tensor:
    """Mean log-probability per decision of being open, on the features of the full network; with gradient."""
    rows = len(inputs)
    ones, nothing = torch.ones(rows, device=inputs.device), torch.zeros(rows, device=inputs.device)
    widths = [int(gate.width) for gate in network.gates.values()]  # type: ignore[arg-type]
    wide = [torch.ones((rows, width), device=inputs.device) if width else None for width in widths]
    opened = [Decision(ones.to(torch.int64), ones, nothing, nothing, channels) for channels in wide]
    trace = network(inputs, decisions=opened)
    each = [decision.log_prob / (1 + width) for decision, width in zip(trace.decisions, widths, strict=True)]
    return torch.stack(each).mean()


@torch.no_grad()
def _open_share(network: StagedNetwork, inputs: Any) -> float:
    """Share of the greedy decisions that run a unit or keep a channel, as they will be in evaluation."""
    network.gates.eval()
    decisions = network(inputs).decisions
    network.gates.train()
    opened = [one.action > 0 if one.channels is None else one.channels > 0.5 for one in decisions]
    return float(torch.cat([one.flatten() for one in opened]).float().mean())

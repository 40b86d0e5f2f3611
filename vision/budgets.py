"""Accuracy at a time budget as published: Zero Time Waste's tables, and MSDNet's budgeted batches.

The tables' rule tries its thresholds on the test images themselves, so it is optimistic by construction;
`rlexit calibrate` is the honest way. It is here so that published tables can be compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlexit.exit_policy import first_exit

THRESHOLDS = 1000


@dataclass(frozen=True)
class Sweep:
    """What every threshold leads to, from the most eager one to the most patient.

    Args:
        accuracy: (T,) share of images that are told right.
        cost: (T,) mean cost of an image, in the unit of the exits' costs.
    """

    accuracy: Tensor
    cost: Tensor

    def at(self, budget: float) -> float:
        """Accuracy of the most patient threshold that costs strictly less than the budget; NaN if none does."""
        within = torch.nonzero(self.cost < budget).flatten()
        return float(self.accuracy[within[-1]]) if len(within) else math.nan


def _outcome(exits: Tensor, right: Tensor, costs: Tensor) -> tuple[float, float]:
    rows = torch.arange(len(exits))
    return float(right[rows, exits].double().mean()), float(costs[exits].double().mean())


def _swept(exits: Sequence[Tensor], right: Tensor, costs: Sequence[float]) -> Sweep:
    found = [_outcome(left, right, torch.tensor(costs, dtype=torch.float64)) for left in exits]
    accuracy, cost = torch.tensor(found, dtype=torch.float64).T
    return Sweep(accuracy, cost)


def confidence_exits(confidences: Tensor, threshold: float) -> Tensor:
    """(N,) the first exit of each row whose confidence (N, K) is above the threshold; else the last."""
    return first_exit(confidences[:, :-1] > threshold)


def patience_exits(chosen: Tensor, patience: int) -> Tensor:
    """(N,) the first exit that is the `patience`-th in a row to choose (N, K) the same; else the last."""
    return first_exit(streaks(chosen)[:, :-1] >= patience)


def streaks(chosen: Tensor) -> Tensor:
    """(N, K) how many exits in a row, each the newest, chose (N, K) the same; 1 at the first."""
    streak = torch.ones_like(chosen)
    for exit in range(1, chosen.shape[1]):
        streak[:, exit] = torch.where(chosen[:, exit] == chosen[:, exit - 1], streak[:, exit - 1] + 1, 1)
    return streak


def sweep_confidence(confidences: Tensor, right: Tensor, costs: Sequence[float], count: int = THRESHOLDS) -> Sweep:
    """Thresholds evenly spaced from the smallest confidence seen to 1.

    Args:
        confidences: (N, K) largest probability of every exit's answer.
        right: (N, K) whether that answer is right.
        costs: (K,) of leaving at every exit.
        count: of thresholds.
    Source: Wolczyk et al. 2021, arXiv 2106.05409, tables 1, 3-5; the rule as in the released notebook.
    """
    # In float64 the last threshold is exactly 1: a softmax that rounds to 1 does not pass it.
    thresholds = torch.linspace(float(confidences.min()), 1.0, count, dtype=torch.float64).tolist()
    return _swept([confidence_exits(confidences, threshold) for threshold in thresholds], right, costs)


def sweep_patience(chosen: Tensor, right: Tensor, costs: Sequence[float]) -> Sweep:
    """Patience 1 to K.

    Args:
        chosen: (N, K) class that every exit tells.
        right: (N, K) whether it is right.
        costs: (K,) of leaving at every exit.
    Source: Zhou et al. 2020, arXiv 2006.04152, counted as in Zero Time Waste's notebook.
    """
    return _swept([patience_exits(chosen, wait) for wait in range(1, chosen.shape[1] + 1)], right, costs)


def batch_shares(costs: Sequence[float], budget: float) -> Tensor:
    """(K,) shares of a batch per exit, falling or rising geometrically, whose mean cost is the budget.

    Args:
        costs: (K,) of leaving at every exit, rising.
        budget: mean cost; outside of the costs' range everybody leaves at the first or at the last exit.
    Source: Huang et al. 2018, arXiv 1703.09844, section 5; the released code tries 40 ratios, here one is solved for.
    """
    each = torch.tensor(costs, dtype=torch.float64)
    steps = torch.arange(len(each), dtype=torch.float64)
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        shares = (middle * steps).softmax(dim=0)
        low, high = (middle, high) if float(shares @ each) <= budget else (low, middle)
    return (low * steps).softmax(dim=0)


def batch_thresholds(confidences: Tensor, shares: Tensor) -> list[float]:
    """A threshold per early exit by which held-out rows leave in these shares, the surest first at every exit.

    Args:
        confidences: (N, K) of held-out rows.
        shares: (K,) summing to 1.
    Source: Huang et al. 2018, arXiv 1703.09844, section 5 and its released `adaptive_inference.py`.
    """
    rows = len(confidences)
    remaining = torch.ones(rows, dtype=torch.bool)
    found: list[float] = []
    due = 0.0
    for exit in range(confidences.shape[1] - 1):
        due += float(shares[exit]) * rows
        # What rounding took from one exit is made up for at the next.
        count = min(round(due) - (rows - int(remaining.sum())), int(remaining.sum()))
        if count <= 0:
            found.append(math.inf)
            continue
        sure = confidences[:, exit].where(remaining, -torch.inf).sort(descending=True).values
        limit = float(sure[count]) if count < int(remaining.sum()) else -math.inf
        if limit == float(sure[count - 1]):
            # Those who tie leave together, as in the released code: were all to stay, the batch would cost more.
            limit = float(torch.nextafter(sure[count], sure.new_tensor(-math.inf)))
        found.append(limit)
        remaining &= ~(confidences[:, exit] > limit)
    return found

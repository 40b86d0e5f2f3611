"""Leave gate: a small net at an exit that decides from the features whether a row leaves there."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from rlexit.gates import Decision, Gate, Mode
from rlexit.gates.estimators import decision_of, estimators
from rlexit.gates.layer import last_linear
from rlexit.macs import macs_per_row
from rlexit.state import ExitState


class LeaveGate(Gate):
    """Action 1 leaves, action 0 goes on; asked before the head, so that who goes on pays for the gate alone.

    Args:
        module: tapped features (B, ...) to one logit per row, (B,) or (B, 1).
        estimator: registered name; how training sees a gradient.
        detach: let no gradient flow into the features.
    """

    def __init__(self, module: nn.Module, estimator: str = "ste_det", detach: bool = True) -> None:
        super().__init__()
        self.module = module
        self.estimator = estimators[estimator]()
        self.detach = detach

    @classmethod
    def pooled(
        cls,
        shape: tuple[int, ...],
        pool: int = 2,
        hidden: int = 32,
        bias: float = -2.0,
        estimator: str = "ste_det",
        detach: bool = True,
    ) -> LeaveGate:
        """The usual one: average pooling, a hidden layer, a logit.

        Args:
            shape: of the tapped features of one row, (C, H, W) or (C,).
            pool: side of the pooled map, in positions.
            hidden: units of the hidden layer.
            bias: of the logit at first; -2 lets a row leave with p = 0.12.
            estimator: registered name.
            detach: let no gradient flow into the features.
        """
        return cls(PooledLogit(shape, pool, hidden, bias), estimator, detach)

    def decide(
        self, state: ExitState, mode: Mode, given: Decision | None = None, generator: torch.Generator | None = None
    ) -> tuple[Decision, Any]:
        """Whether each row wants to leave; nothing is carried."""
        return decision_of(self.level(state), mode, self.estimator, given, generator, self.training), state.carry

    def offsets(self) -> list[nn.Parameter]:
        """Of the last layer."""
        return [last_linear(self.module).bias]

    def level(self, state: ExitState) -> Float[Tensor, " batch"]:
        """(B,) the logit of leaving."""
        features = state.features.detach() if self.detach else state.features
        return self.module(features).reshape(len(state))

    def macs(self, state: ExitState, decision: Decision | None = None) -> Int[Tensor, " batch"]:
        """(B,) multiply-adds of the small net."""
        return torch.full_like(state.macs, macs_per_row(self.module, state.features))


class PooledLogit(nn.Module):
    """Average pooling, one hidden layer, one logit.

    Args:
        shape: of the features of one row, (C, H, W) or (C,).
        pool: side of the pooled map; a smaller map keeps its size.
        hidden: units of the hidden layer.
        bias: of the logit at first.
    """

    def __init__(self, shape: tuple[int, ...], pool: int, hidden: int, bias: float) -> None:
        super().__init__()
        self.side = min(pool, *shape[1:]) if len(shape) == 3 else 0
        self.hidden = nn.Linear(shape[0] * max(self.side, 1) ** 2, hidden)
        self.logit = nn.Linear(hidden, 1)
        nn.init.constant_(self.logit.bias, bias)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) or (B, C) to (B, 1)."""
        pooled = functional.adaptive_avg_pool2d(features, self.side) if self.side else features
        return self.logit(functional.relu(self.hidden(pooled.flatten(1))))

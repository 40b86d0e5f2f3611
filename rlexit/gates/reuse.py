"""Temporal reuse: before anything runs, a cheap gate decides whether the answer of the step before is good enough."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from rlexit.gates import Decision, Gate, Mode
from rlexit.gates.estimators import decision_of, estimators
from rlexit.gates.layer import last_linear
from rlexit.macs import macs_per_row
from rlexit.state import ExitState, map_tensors, put, take

Memory = dict[str, Tensor]

# A difference of pooled frames is small: a ball of two pixels in a field of sixteen.
CONTRAST = 16.0


class ReuseGate(Gate):
    """Action 0 repeats the row's last answer, action 1 computes a new one; asked on the raw inputs, before any unit.

    It sees the newest channel of the inputs, pooled, how that differs from what the last computed answer saw, and that
    answer. What it keeps across env steps (`ExitState.memory`) is a dict of (B, ...): `answer`, log-probabilities;
    `view`, the pooled channel at the last computed answer; `left`, how many more steps may repeat it. A memory of zeros
    is that of a new game: nothing may be repeated.

    Args:
        outputs: A.
        limit: steps in a row that may repeat an answer.
        side: of the pooled channel, in positions.
        hidden: units of the hidden layer.
        bias: of the logit at first; 1 computes with p = 0.73.
        estimator: registered name; how training sees a gradient.
    Raises:
        ValueError: `limit` is not positive.
    Source: learned action repeats, as in Lakshminarayanan et al. 2017, arXiv 1702.06054; here per step and charged.
    """

    def __init__(
        self, outputs: int, limit: int, side: int = 21, hidden: int = 32, bias: float = 1.0, estimator: str = "ste_det"
    ) -> None:
        super().__init__()
        if limit < 1:
            raise ValueError(
                f"`max_reuse` must be at least 1, got {limit}. Leave `reuse` out of the decisions instead."
            )
        self.outputs, self.limit, self.side = outputs, limit, side
        self.estimator = estimators[estimator]()
        # No ReLU: a few hundred steps of Adam on so many nearly constant inputs closed all 32 of them for good.
        self.net = nn.Sequential(nn.Linear(2 * side**2 + outputs + 1, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        nn.init.constant_(last_linear(self.net).bias, bias)

    def fresh(self, rows: int, device: torch.device | None = None) -> Memory:
        """The memory of so many new games."""
        return {
            "answer": torch.zeros((rows, self.outputs), device=device),
            "view": torch.zeros((rows, self.side**2), device=device),
            "left": torch.zeros(rows, dtype=torch.int64, device=device),
        }

    def view(self, inputs: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch positions"]:
        """The newest channel, pooled; no multiply-adds, as all pooling here."""
        return functional.adaptive_avg_pool2d(inputs[:, -1:], self.side).flatten(1)

    def logits(self, view: Float[Tensor, "batch positions"], memory: Memory) -> Float[Tensor, " batch"]:
        """Of computing, before the sigmoid."""
        return self.net(self.reads(view, memory)).reshape(len(view))

    def reads(self, view: Float[Tensor, "batch positions"], memory: Memory) -> Float[Tensor, "batch inputs"]:
        """What the small net sees."""
        seen = (view, CONTRAST * (view - memory["view"]), memory["answer"].exp(), memory["left"][:, None] / self.limit)
        return torch.cat(seen, dim=1)

    def decide(
        self, state: ExitState, mode: Mode, given: Decision | None = None, generator: torch.Generator | None = None
    ) -> tuple[Decision, Any]:
        """Who computes; a row that may not repeat its answer has no choice and a log-probability of 0."""
        nothing = torch.zeros(len(state), device=state.device)
        decision = Decision(torch.ones_like(state.rows), nothing + 1, nothing, nothing)
        asked = torch.nonzero(state.memory["left"] > 0).flatten()
        if len(asked):
            few, stored = state.select(asked), take(given, asked) if given is not None else None
            part = decision_of(self.level(few), mode, self.estimator, stored, generator, self.training)
            decision = put(decision, asked, part)
        return decision, state.carry

    def offsets(self) -> list[nn.Parameter]:
        """Of the last layer."""
        return [last_linear(self.net).bias]

    def level(self, state: ExitState) -> Float[Tensor, " batch"]:
        """(B,) the logit of computing."""
        return self.logits(self.view(state.features), state.memory)

    def macs(self, state: ExitState, decision: Decision | None = None) -> Int[Tensor, " batch"]:
        """(B,) multiply-adds of the small net; nothing for a row that may not repeat its answer."""
        inputs = torch.empty((1, 2 * self.side**2 + self.outputs + 1), device="meta")
        asked = torch.ones_like(state.macs) if state.memory is None else (state.memory["left"] > 0).to(torch.int64)
        return asked * macs_per_row(self.net, inputs)

    def recall(
        self,
        state: ExitState,
        mode: Mode = "greedy",
        given: Decision | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[ExitState, Decision]:
        """Asks before the first unit, and charges the rows for it.

        Returns:
            The state with the memory that each row takes along, and the decision. Rows of action 0 have their answer.
        """
        memory = self.fresh(len(state), state.device) if state.memory is None else state.memory
        state = replace(state, memory=memory)
        decision, _ = self.decide(state, mode, given, generator)
        computes = decision.action > 0
        view = torch.where(computes[:, None], self.view(state.features), memory["view"])
        left = torch.where(computes, self.limit, memory["left"] - 1)
        state = state.charge("reuse", self.macs(state, decision))
        return replace(state, memory={**memory, "view": view, "left": left}), decision

    def remember(self, state: ExitState) -> Memory:
        """The memory of a row that leaves with a computed answer."""
        return {**state.memory, "answer": state.answered}


def forget(memory: Any, rows: Int[Tensor, " rows"]) -> Any:
    """The same memory, in which the given rows are new games."""
    return map_tensors(lambda leaf: leaf.index_fill(0, rows, 0), memory)

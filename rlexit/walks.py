"""Walks: real passes through a gated network whose decisions are drawn or replayed, with what was spent before each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlexit.gates import Decision, Mode, opened
from rlexit.network import StagedNetwork


@dataclass(frozen=True)
class Walk:
    """One pass of every row to the last exit; G gates that decide.

    Args:
        answers: (B, A) log-probabilities of the last exit.
        decisions: of every gate, those that decide nothing among them; what a replay is given.
        log_probs: (B, G) of the actions taken, with gradient.
        entropies: (B, G) of the gates, with gradient.
        actions: (B, G) 0 or 1.
        before: (B, G) multiply-adds spent when each gate was asked.
        macs: (B,) spent in all, really executed.
    """

    answers: Float[Tensor, "batch outputs"]
    decisions: tuple[Decision, ...]
    log_probs: Float[Tensor, "batch gates"]
    entropies: Float[Tensor, "batch gates"]
    actions: Int[Tensor, "batch gates"]
    before: Int[Tensor, "batch gates"]
    macs: Int[Tensor, " batch"]

    @property
    def to_go(self) -> Int[Tensor, "batch gates"]:
        """(B, G) multiply-adds from each gate on, its own among them: all that its decision can still change."""
        return self.macs[:, None] - self.before


def walk(
    network: StagedNetwork,
    inputs: Any,
    mode: Mode,
    given: Sequence[Decision] | None = None,
    generator: torch.Generator | None = None,
    forced: int = 0,
) -> Walk:
    """Passes every row through the network; what a row skips is not computed, with gradient or without.

    Hard decisions let no gradient through, so the gathered pass has the dense one's gradient at less work.

    Args:
        network: in evaluation mode; early exits are passed by.
        inputs: (B, ...) raw inputs.
        mode: how gates decide.
        given: stored decisions, one per gate, for replay.
        generator: source of randomness, for sample.
        forced: so many of the first gates that decide are held open, for a curriculum: the unit is run with all its
            channels, at a log-probability of 0.
    Raises:
        ValueError: no gate of the network decides anything.
    """
    state = network.begin(inputs)
    decisions: list[Decision] = []
    asked: list[tuple[Decision, Tensor]] = []
    while not network.finished(state):
        gate = network.gates[name] if (name := network.unit_names[state.unit]) in network.gates else None
        before = state.macs
        stored = given[len(decisions)] if given is not None and gate is not None else None
        state, decision = network.decide(state, mode, stored, generator)
        if decision is not None:
            if gate is not None and gate.decides and len(asked) < forced:
                decision = opened(gate, len(state), state.device)
            decisions.append(decision)
            if gate is not None and gate.decides:
                asked.append((decision, before))
        state = network.advance(state, decision)
        if network.at_exit(state):
            last = state.exit == network.exits - 1
            state = network.answer(state) if last else network.pass_by(state)
    if not asked:
        raise ValueError(
            f"`gates` must have one that decides, got {', '.join(network.gates) or 'none'}. Use a method with gates."
        )
    return Walk(
        state.logits[:, -1].float().log_softmax(dim=-1),
        tuple(decisions),
        torch.stack([decision.log_prob.float() for decision, _ in asked], dim=1),
        torch.stack([decision.entropy.float() for decision, _ in asked], dim=1),
        torch.stack([decision.action for decision, _ in asked], dim=1),
        torch.stack([before for _, before in asked], dim=1),
        state.macs,
    )

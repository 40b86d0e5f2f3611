"""Paths through an actor: what was decided while acting, and what the present weights say of the same decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlexit.gates import Decision
from rlexit.network import StagedNetwork
from rlexit.runtime import RunResult
from rlexit.state import map_tensors, take

REUSE = "reuse"


@dataclass(frozen=True)
class Asked:
    """What one gate decided while acting.

    Args:
        action: (B,) of the rows that asked it; 1 elsewhere.
        log_prob: (B,) in nats; 0 elsewhere.
        asked: (B,) which rows did.
    """

    action: Tensor
    log_prob: Tensor
    asked: Tensor


@dataclass(frozen=True)
class Batch:
    """Rows as they were acted on; every tensor is (B, ...).

    Args:
        observations: (B, 4, 84, 84) uint8.
        memory: what the row remembered before the step; None where nothing is ever reused.
        gates: by the gate's name in the network.
        exits: (B,) where the row left; K where it repeated its answer.
        repeated: (B,) whether it did.
        actions: (B,) sent to the game.
        log_prob: (B,) of the action, given the path.
    """

    observations: Tensor
    memory: Any
    gates: dict[str, Asked]
    exits: Tensor
    repeated: Tensor
    actions: Tensor
    log_prob: Tensor

    def __len__(self) -> int:
        return len(self.actions)

    def take(self, index: Tensor) -> Batch:
        """The given rows."""
        chosen: Batch = take(self, index)
        return chosen

    @staticmethod
    def joined(parts: Sequence[Batch]) -> Batch:
        """All rows of several batches."""
        whole: Batch = map_tensors(lambda *leaves: torch.cat(leaves), parts[0], *parts[1:])
        return whole

    def open_shares(self) -> dict[str, float]:
        """By gate, the share of the rows that asked it for which it was open: runs, leaves, computes."""
        found = {name: gate.action[gate.asked] for name, gate in self.gates.items()}
        return {name: float((action > 0).float().mean()) for name, action in found.items() if len(action)}

    def logits(self) -> dict[str, Tensor]:
        """By gate, the logits of being open in the rows that asked it, read back from the log-probabilities."""
        found = {}
        for name, gate in self.gates.items():
            chosen = gate.log_prob[gate.asked].double().exp().clamp(1e-9, 1 - 1e-9)
            opened = torch.where(gate.action[gate.asked] > 0, chosen, 1 - chosen)
            if len(opened):
                found[name] = torch.logit(opened).float()
        return found

    def patience(self, network: StagedNetwork) -> Tensor:
        """(B,) how many more steps may repeat the answer; 0 where nothing is ever reused."""
        return self.memory["left"] if network.reuse is not None else torch.zeros(len(self))


@dataclass(frozen=True)
class Evaluated:
    """What the present weights say of stored decisions, with gradient.

    Args:
        answers: (B, A) log-probabilities at the end of each row's path.
        log_prob: (B,) of the stored action.
        entropy: (B,) of the answer, in nats.
        gates: decisions by gate; those of rows that did not ask it mean nothing.
    """

    answers: Tensor
    log_prob: Tensor
    entropy: Tensor
    gates: Mapping[str, Decision]


def gate_names(network: StagedNetwork) -> tuple[list[str], list[str]]:
    """Names of the gates before units and of the leave gates, in the order in which a row meets them."""
    units = [f"gates.{name}" for name in network.unit_names if name in network.gates]
    return units, [f"leave_gates.{name}" for name in network.exit_names if name in network.leave_gates]


def stored(network: StagedNetwork, observations: Tensor, memory: Any, result: RunResult, actions: Tensor) -> Batch:
    """What is kept of one env step.

    Args:
        network: that acted.
        observations: (B, 4, 84, 84) uint8.
        memory: before the step; None at the very first.
        result: of `run`.
        actions: (B,) sent to the game.
    """
    rows = len(actions)
    if network.reuse is not None and memory is None:
        memory = network.reuse.fresh(rows)
    gates: dict[str, Asked] = {}
    for names, found in zip(gate_names(network), (result.decisions, result.leaving), strict=True):
        for place, name in enumerate(names):
            action, log_prob = torch.ones(rows, dtype=torch.int64), torch.zeros(rows)
            asked = torch.zeros(rows, dtype=torch.bool)
            if place < len(found):
                where, decision = found[place]
                action[where], log_prob[where], asked[where] = decision.action, decision.log_prob, True
            gates[name] = Asked(action, log_prob, asked)
    if result.reuse is not None:
        gates[REUSE] = Asked(result.reuse.action, result.reuse.log_prob, memory["left"] > 0)
    chosen = result.answers.gather(1, actions[:, None])[:, 0]
    repeated = result.exits == network.exits
    return Batch(observations, memory, gates, result.exits, repeated, actions, chosen)


def evaluate(network: StagedNetwork, batch: Batch) -> Evaluated:
    """Replays stored decisions through the present weights; only log-probabilities are computed anew.

    Args:
        network: in evaluation mode, so that no gradient passes through a choice.
        batch: what was stored when acting.
    """
    units, leaving = gate_names(network)
    trace = network(
        batch.observations,
        decisions=[_given(batch, name) for name in units] if units else None,
        leaving=[_given(batch, name) for name in leaving] if leaving else None,
        memory=batch.memory,
    )
    rows = torch.arange(len(batch))
    answers = trace.answers[rows, batch.exits.clamp(max=network.exits - 1)]
    gates = dict(zip((*units, *leaving), (*trace.decisions, *trace.leaving), strict=True))
    if network.reuse is not None:
        answers = torch.where(batch.repeated[:, None], batch.memory["answer"], answers)
        state = network.begin(batch.observations, batch.memory)
        gates[REUSE] = network.reuse.decide(state, "replay", _given(batch, REUSE))[0]
    entropy = -(answers.exp() * answers.clamp_min(-1e4)).sum(dim=1)
    return Evaluated(answers, answers.gather(1, batch.actions[:, None])[:, 0], entropy, gates)


def _given(batch: Batch, name: str) -> Decision:
    gate = batch.gates[name]
    nothing = torch.zeros_like(gate.log_prob)
    return Decision(gate.action, gate.action.to(nothing.dtype), gate.log_prob, nothing)


def cloned(network: StagedNetwork, batch: Batch, full: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How far the greedy path's answer is from the full network's, and what it costs; gates are straight-through.

    Answers are mixed as log-probabilities, so that a gate's gradient is exactly the difference between its two ways.

    Args:
        network: in training mode.
        batch: whose states are answered anew.
        full: (B, A) log-probabilities of the full network.
    Returns:
        (B,) KL(full || gated) in nats, (B,) expected multiply-adds, and the (B,) entropies of the gates met, in nats;
        all with gradient.
    """
    trace = network(batch.observations, memory=batch.memory)
    here, answers, asked = torch.ones(len(batch)), torch.zeros_like(full), iter(trace.leaving)
    entropy = sum((decision.entropy for decision in trace.decisions), torch.zeros_like(here))
    for exit, name in enumerate(network.exit_names):
        if name in network.leave_gates:
            decision = next(asked)
            entropy = entropy + here.detach() * decision.entropy
            leaves = here * decision.relaxed
        else:
            leaves = here if exit == network.exits - 1 else torch.zeros_like(here)
        answers = answers + leaves[:, None] * trace.answers[:, exit].clamp_min(-1e4)
        here = here - leaves
    macs = trace.expected_macs
    if network.reuse is not None:
        state = network.begin(batch.observations, batch.memory)
        decision, _ = network.reuse.decide(state, "greedy")
        computes = decision.relaxed[:, None]
        answers = computes * answers + (1 - computes) * batch.memory["answer"]
        entropy = entropy + decision.entropy
        macs = decision.relaxed * macs + network.reuse.macs(state)
    return ((full - answers) * full.exp()).sum(dim=1), macs, entropy

"""Real execution: rows that leave are dropped, and nothing later is computed for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlexit.budget import run_within
from rlexit.exit_policy import ExitPolicy, first_exit, threshold_rows
from rlexit.gates import Mode
from rlexit.leaving import Doors, Record, RunResult, check_thresholds, gathered, leaving, recall
from rlexit.network import StagedNetwork
from rlexit.rules import Rule

__all__ = ["RunResult", "exits_to_build", "replay", "run"]


@torch.no_grad()
def run(
    network: StagedNetwork,
    exit_policy: ExitPolicy,
    inputs: Any,
    *,
    thresholds: Float[Tensor, "batch early"] | None = None,
    budgets: Int[Tensor, " batch"] | None = None,
    accounting: str = "reserve",
    infeasible: str = "raise",
    memory: Any = None,
    path: tuple[Any, ...] = (),
    mode: Mode = "greedy",
    generator: torch.Generator | None = None,
) -> RunResult:
    """Runs a batch, each row only as far as it must go.

    Args:
        network: in evaluation mode.
        exit_policy: rule and thresholds for all rows.
        inputs: (B, ...) raw inputs; B may be 0.
        thresholds: (B, K - 1) per row, in place of the policy's own.
        budgets: (B,) most multiply-adds that each row may cost, heads and gates included; never exceeded; the policy's own
            where it has one. Rows leave as the rule says, or when they cannot afford to go on, with the answer of the
            latest exit that they passed.
        accounting: with budgets: `reserve` builds a head where the row leaves and keeps what it costs in hand until then,
            `anytime` builds every head that is passed.
        infeasible: with budgets: what happens to a row that cannot afford the first exit: `raise`, or `violated`, which
            answers there in spite of the budget and says so.
        memory: tree of (B, ...) from the step before.
        path: a static choice for the whole call.
        mode: how gates decide. Where leave gates are sampled, their draw counts and not the threshold.
        generator: source of randomness for sampled gates.
    Raises:
        ValueError: the number of thresholds does not fit the network, one is NaN, or a budget is infeasible.
    """
    if thresholds is not None:
        check_thresholds(thresholds, (len(inputs), network.exits - 1))
        thresholds = thresholds.to(inputs.device)
    state = network.begin(inputs, memory, path)
    if budgets is None and exit_policy.budget:
        budgets = torch.full_like(state.macs, exit_policy.budget)
    if budgets is not None and network.reuse is not None:
        raise ValueError(
            "`budgets` must be given to networks that compute every answer, got one that may repeat its last. "
            "Take a method without reuse."
        )
    if budgets is not None and len(state):
        return run_within(
            network, exit_policy, state, budgets.to(state.device), thresholds, accounting, infeasible, mode, generator
        )
    doors = Doors(network, exit_policy, thresholds)
    record = Record(len(state), network.exits, state.device)
    state, recalled = recall(network, state, mode, generator, record)
    while len(state) or not record.left:
        state, decision = network.decide(state, mode, None, generator)
        if decision is not None:
            record.decisions.append((state.rows, decision))
        state = network.advance(state, decision)
        if not network.at_exit(state):
            continue
        exit = state.exit
        if exit == network.exits - 1:
            record.left.append(leaving(network, network.answer(state)))
            break
        state, score, leaves = doors.meet(state, mode, generator)
        if leaves is None:
            continue
        record.meeting(state, exit, score)
        count = int(leaves.sum())
        if count == len(state):
            record.left.append(leaving(network, state))
            break
        if count:
            record.left.append(leaving(network, state).select(torch.nonzero(leaves).flatten()))
            state = state.select(torch.nonzero(~leaves).flatten())
    result = replace(gathered(record), reuse=recalled)
    return result if budgets is None else replace(result, violated=torch.zeros_like(result.exits, dtype=torch.bool))


@torch.no_grad()
def replay(
    network: StagedNetwork,
    exit_policy: ExitPolicy,
    inputs: Any,
    *,
    thresholds: Float[Tensor, "batch early"] | None = None,
    memory: Any = None,
) -> RunResult:
    """Computes every exit and picks afterwards: acts as `run` does, saves nothing, and charges what it computed.

    Args:
        network: without gates that carry memory. A leave gate is asked for rows whose threshold there is finite.
        exit_policy: rule and thresholds for all rows.
        inputs: (B, ...) raw inputs.
        thresholds: (B, K - 1) per row, in place of the policy's own.
        memory: tree of (B, ...) from the step before.
    Raises:
        ValueError: the number of thresholds does not fit the network, or one is NaN.
    """
    rule = exit_policy.scorer
    if thresholds is not None:
        check_thresholds(thresholds, (len(inputs), network.exits - 1))
    state = network.begin(inputs, memory)
    recalled = None
    if network.reuse is not None:
        state, recalled = network.reuse.recall(state)
    limits = threshold_rows([exit_policy], network.exits) if thresholds is None else thresholds
    limits = limits.to(state.device).expand(len(state), network.exits - 1)
    scores = torch.full((len(state), network.exits), torch.nan, device=state.device)
    answers: list[Tensor] = []
    while not network.finished(state):
        state, decision = network.decide(state)
        state = network.advance(state, decision)
        if network.at_exit(state):
            early, asked = state.exit < network.exits - 1, None
            if rule.before_head and early:
                asked = limits[:, state.exit].abs() < torch.inf
                if bool(asked.any()):
                    state, _ = network.consider(state, asked=asked)
            state = network.answer(state)
            answers.append(state.answered)
            if early and asked is None:
                scores[:, state.exit - 1] = rule.score(state)
            elif asked is not None and bool(asked.any()):
                scores[:, state.exit - 1] = rule.score(state).masked_fill(~asked, torch.nan)
    exits = first_exit((scores[:, :-1] > limits) | (limits == -torch.inf))
    chosen = torch.stack(answers, dim=1)[torch.arange(len(state), device=state.device), exits]
    if recalled is not None:
        repeats = recalled.action == 0
        chosen = torch.where(repeats[:, None], state.memory["answer"], chosen)
        exits = torch.where(repeats, network.exits, exits)
        scores = scores.masked_fill(repeats[:, None], torch.nan)
    remembered = network.remember(replace(state, answer=chosen))
    return RunResult(chosen, exits, state.macs, scores, remembered, reuse=recalled)


def exits_to_build(network: StagedNetwork, rule: Rule, limits: Sequence[Any]) -> list[Any]:
    """Which early exits must be built: one bool each, or (B,) bools where the rows differ.

    An exit by which nobody may leave is built only if a later one that is built reads it.
    """
    open_exits = [limit < torch.inf for limit in limits]
    read = network.read_later(open_exits, rule.needs_every_exit)
    return [one | other for one, other in zip(open_exits, read, strict=True)]

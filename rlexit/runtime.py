"""Real execution: rows that leave are dropped, and nothing later is computed for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlexit.exit_policy import ExitPolicy, threshold_rows
from rlexit.gates import Decision, Mode
from rlexit.network import StagedNetwork
from rlexit.rules import Rule
from rlexit.state import ExitState, map_tensors, take


@dataclass(frozen=True)
class RunResult:
    """What each row was told, where it left and what it cost.

    Args:
        answers: (B, A) log-probabilities.
        exits: (B,) exit index at which the row left, from 0.
        macs: (B,) multiply-adds executed for the row, heads and gates included.
        scores: (B, K) the rule's score at each exit, NaN where none was asked for.
        memory: tree of (B, ...) to hand to the row's next step.
        decisions: per gate, the decisions of the rows that reached it, with their row indices.
        leaving: per leave gate asked, the decisions of the rows at that exit, with their row indices.
    """

    answers: Float[Tensor, "batch outputs"]
    exits: Int[Tensor, " batch"]
    macs: Int[Tensor, " batch"]
    scores: Float[Tensor, "batch exits"]
    memory: Any = None
    decisions: tuple[tuple[Int[Tensor, " _"], Decision], ...] = ()
    leaving: tuple[tuple[Int[Tensor, " _"], Decision], ...] = ()


@torch.no_grad()
def run(
    network: StagedNetwork,
    exit_policy: ExitPolicy,
    inputs: Any,
    *,
    thresholds: Float[Tensor, "batch early"] | None = None,
    budgets: Int[Tensor, " batch"] | None = None,
    steps: Sequence[int] = (),
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
        budgets: (B,) most multiply-adds that each row may cost; it leaves before it would exceed them. What a row
            cannot go below is the first exit. Every early exit is built, also one that its threshold closes.
        steps: MACs from each exit to the next (`CostTable.steps`); needed with `budgets`.
        memory: tree of (B, ...) from the step before.
        path: a static choice for the whole call.
        mode: how gates decide. Where leave gates are sampled, their draw counts and not the threshold.
        generator: source of randomness for sampled gates.
    Raises:
        ValueError: the number of thresholds does not fit the network, one is NaN, or `budgets` come without `steps`.
    """
    early = network.exits - 1
    if budgets is not None and len(steps) != early:
        raise ValueError(f"`steps` must have {early} costs where budgets are given, got {len(steps)}.")
    rule = exit_policy.scorer
    shared = threshold_rows([exit_policy], network.exits)[0].tolist()
    later: list[Any] = [True] * early
    closed = [limit == torch.inf for limit in shared]
    if thresholds is not None:
        _check(thresholds, (len(inputs), early))
        thresholds = thresholds.to(inputs.device)
        closed = (thresholds == torch.inf).all(dim=0).tolist()
    if budgets is None:
        limits = shared if thresholds is None else list(thresholds.unbind(dim=1))
        later = network.read_later([limit < torch.inf for limit in limits], rule.needs_every_exit)
    state = network.begin(inputs, memory, path)
    left: list[ExitState] = []
    chosen: list[tuple[Tensor, Decision]] = []
    asked: list[tuple[Tensor, Decision]] = []
    scores = torch.full((len(state), network.exits), torch.nan, device=state.device)
    while True:
        state, decision = network.decide(state, mode, None, generator)
        if decision is not None:
            chosen.append((state.rows, decision))
        state = network.advance(state, decision)
        if not network.at_exit(state):
            continue
        exit = state.exit
        if exit == early:
            left.append(_leaving(network, network.answer(state)))
            break
        limit = shared[exit] if thresholds is None else thresholds[state.rows, exit]
        read = later[exit][state.rows] if isinstance(later[exit], Tensor) else later[exit]
        if closed[exit] and not isinstance(read, Tensor) and not read:
            state = network.pass_by(state)
            continue
        if rule.before_head:
            state, score, leaves = _ask(network, rule, state, limit, read, mode, generator)
            if len(state.leaving) > len(asked):
                asked.append((state.rows, state.leaving[-1]))
        else:
            state, score, leaves = _score(network, rule, state, limit, read)
        scores[state.rows, exit] = score
        if budgets is not None:
            leaves = leaves | (state.macs + steps[exit] > budgets[state.rows])
        count = int(leaves.sum())
        if count == len(state):
            left.append(_leaving(network, state))
            break
        if count:
            left.append(_leaving(network, state).select(torch.nonzero(leaves).flatten()))
            state = state.select(torch.nonzero(~leaves).flatten())
    return replace(_gather(left, scores, tuple(chosen)), leaving=tuple(asked))


Limit = float | Float[Tensor, " batch"]
Flag = bool | Bool[Tensor, " batch"]
Scored = tuple[ExitState, Float[Tensor, " batch"], Bool[Tensor, " batch"]]


def _score(network: StagedNetwork, rule: Rule, state: ExitState, limit: Limit, read: Flag) -> Scored:
    """Builds the head for the rows that need it, and scores its answer: the state, (B,) scores, (B,) who leaves."""
    wanted = (limit < torch.inf) | read
    if isinstance(wanted, Tensor):
        state = network.answer_for(state, wanted)
        score = rule.score(state).masked_fill(~wanted, torch.nan)
    else:
        state = network.answer(state)
        score = rule.score(state)
    return state, score, score > limit


def _ask(
    network: StagedNetwork,
    rule: Rule,
    state: ExitState,
    limit: Limit,
    read: Flag,
    mode: Mode,
    generator: torch.Generator | None,
) -> Scored:
    """Asks the leave gate before the head, which is built for the rows that leave and where a later exit reads it."""
    leaves = _flags(state, limit == -torch.inf)
    asked = _flags(state, limit < torch.inf) & ~leaves
    score = torch.full((len(state),), torch.nan, device=state.device)
    if bool(asked.any()):
        state, decision = network.consider(state, mode, None, generator, asked)
        score = rule.score(state).masked_fill(~asked, torch.nan)
        leaves = leaves | ((decision.action > 0) if mode == "sample" else (score > limit))
    return network.answer_for(state, leaves | read), score, leaves


def _flags(state: ExitState, flag: Flag) -> Bool[Tensor, " batch"]:
    return flag if isinstance(flag, Tensor) else torch.full((len(state),), flag, device=state.device)


@torch.no_grad()
def replay(
    network: StagedNetwork,
    exit_policy: ExitPolicy,
    inputs: Any,
    *,
    thresholds: Float[Tensor, "batch early"] | None = None,
) -> RunResult:
    """Computes every exit and picks afterwards: acts as `run` does, saves nothing, and charges what it computed.

    Args:
        network: without gates that carry memory.
        exit_policy: rule and thresholds for all rows.
        inputs: (B, ...) raw inputs.
        thresholds: (B, K - 1) per row, in place of the policy's own.
    Raises:
        ValueError: the number of thresholds does not fit the network, or one is NaN.
    """
    rule = exit_policy.scorer
    if thresholds is not None:
        _check(thresholds, (len(inputs), network.exits - 1))
    state = network.begin(inputs)
    limits = threshold_rows([exit_policy], network.exits) if thresholds is None else thresholds
    limits = limits.to(state.device).expand(len(state), network.exits - 1)
    scores = torch.full((len(state), network.exits), torch.nan, device=state.device)
    answers: list[Tensor] = []
    while not network.finished(state):
        state, decision = network.decide(state)
        state = network.advance(state, decision)
        if network.at_exit(state):
            if rule.before_head and state.exit < network.exits - 1:
                state, _ = network.consider(state)
            state = network.answer(state)
            answers.append(state.answered)
            if state.exit < network.exits:
                scores[:, state.exit - 1] = rule.score(state)
    leaves = torch.cat([scores[:, :-1] > limits, torch.ones_like(scores[:, :1], dtype=torch.bool)], dim=1)
    exits = leaves.to(torch.int64).argmax(dim=1)
    chosen = torch.stack(answers, dim=1)[torch.arange(len(state), device=state.device), exits]
    return RunResult(chosen, exits, state.macs, scores, network.remember(state))


def _check(thresholds: Float[Tensor, "rows limits"], shape: tuple[int, int]) -> None:
    if thresholds.shape != shape:
        raise ValueError(
            f"`thresholds` must be {shape}, got {tuple(thresholds.shape)}. Give one per row and early exit."
        )
    if bool(thresholds.isnan().any()):
        raise ValueError("`thresholds` must be numbers, got nan. Use inf to close an exit.")


def exits_to_build(network: StagedNetwork, rule: Rule, limits: Sequence[Any]) -> list[Any]:
    """Which early exits must be built: one bool each, or (B,) bools where the rows differ.

    An exit by which nobody may leave is built only if a later one that is built reads it.
    """
    open_exits = [limit < torch.inf for limit in limits]
    read = network.read_later(open_exits, rule.needs_every_exit)
    return [one | other for one, other in zip(open_exits, read, strict=True)]


def _leaving(network: StagedNetwork, state: ExitState) -> ExitState:
    """What rows take along when they leave: their memory for the next step, and no features, which nobody reads."""
    return replace(state, memory=network.remember(state), features=None)


def _gather(left: list[ExitState], scores: Tensor, decisions: tuple[tuple[Tensor, Decision], ...]) -> RunResult:
    """Puts the rows back in the order in which they came."""
    answers = torch.cat([state.answered for state in left])
    exits = torch.cat([torch.full_like(state.rows, state.exit - 1) for state in left])
    macs = torch.cat([state.macs for state in left])
    memories = [state.memory for state in left]
    memory = map_tensors(lambda *leaves: torch.cat(leaves), memories[0], *memories[1:])
    if len(left) > 1:
        order = torch.argsort(torch.cat([state.rows for state in left]))
        answers, exits, macs, memory = take((answers, exits, macs, memory), order)
    return RunResult(answers, exits, macs, scores, memory, decisions)

"""Real execution: rows that leave are dropped, and nothing later is computed for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
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
    """

    answers: Float[Tensor, "batch outputs"]
    exits: Int[Tensor, " batch"]
    macs: Int[Tensor, " batch"]
    scores: Float[Tensor, "batch exits"]
    memory: Any = None
    decisions: tuple[tuple[Int[Tensor, " _"], Decision], ...] = ()


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
        mode: how gates decide.
        generator: source of randomness for sampled gates.
    Raises:
        ValueError: the number of thresholds does not fit the network, one is NaN, or `budgets` come without `steps`.
    """
    early = network.exits - 1
    if budgets is not None and len(steps) != early:
        raise ValueError(f"`steps` must have {early} costs where budgets are given, got {len(steps)}.")
    rule = exit_policy.scorer
    shared = threshold_rows([exit_policy], network.exits)[0].tolist()
    built: list[Any] = [True] * early
    if thresholds is not None:
        _check(thresholds, (len(inputs), early))
        thresholds = thresholds.to(inputs.device)
    if budgets is None:
        built = exits_to_build(network, rule, shared if thresholds is None else list(thresholds.unbind(dim=1)))
    state = network.begin(inputs, memory, path)
    batch = len(state)
    left: list[ExitState] = []
    chosen: list[tuple[Tensor, Decision]] = []
    scores = torch.full((batch, network.exits), torch.nan, device=state.device)
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
        if isinstance(built[exit], Tensor):
            wanted = built[exit][state.rows]
            state = network.answer_for(state, wanted)
            score = rule.score(state).masked_fill(~wanted, torch.nan)
        elif built[exit]:
            state = network.answer(state)
            score = rule.score(state)
        else:
            state = network.pass_by(state)
            continue
        scores[state.rows, exit] = score
        leaves = score > (shared[exit] if thresholds is None else thresholds[state.rows, exit])
        if budgets is not None:
            leaves = leaves | (state.macs + steps[exit] > budgets[state.rows])
        count = int(leaves.sum())
        if count == len(state):
            left.append(_leaving(network, state))
            break
        if count:
            left.append(_leaving(network, state).select(torch.nonzero(leaves).flatten()))
            state = state.select(torch.nonzero(~leaves).flatten())
    return _gather(left, scores, tuple(chosen))


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

    An exit by which nobody may leave is built only if a later one that is built reads it: a patience-like rule or an
    ensemble reads all before it, a cascaded head the one before it.
    """
    built: list[Any] = [limit < torch.inf for limit in limits]
    early = len(built)
    ensemble = network.ensemble
    # What the backbone's own exit reads is needed always; then backwards, because needing is inherited.
    reads_all = ensemble.needs_every_exit and early < ensemble.exits
    reads_previous = network.head(early).reads_previous
    for exit in reversed(range(early)):
        wanted = built[exit] | reads_all | reads_previous
        if isinstance(wanted, Tensor) and bool((wanted == wanted[:1]).all()):
            wanted = bool(wanted.any())
        built[exit] = wanted
        reads_previous = wanted & network.head(exit).reads_previous
        reads_all = reads_all | (
            wanted & (rule.needs_every_exit | (ensemble.needs_every_exit and exit < ensemble.exits))
        )
    return built


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

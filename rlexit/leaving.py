"""Leaving: what a row is told where it leaves, what it takes along, and how everybody's results come together."""

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
        exits: (B,) exit index at which the row left, from 0; K where it repeated the answer of its last step.
        macs: (B,) multiply-adds executed for the row, heads and gates included.
        scores: (B, K) the rule's score at each exit, NaN where none was asked for.
        memory: tree of (B, ...) to hand to the row's next step.
        decisions: per gate, the decisions of the rows that reached it, with their row indices.
        leaving: per leave gate asked, the decisions of the rows at that exit, with their row indices.
        reuse: of the gate before everything, for all rows; action 0 repeats. None without one.
        violated: (B,) rows that could not pass the first exit within their budget; None without budgets.
    """

    answers: Float[Tensor, "batch outputs"]
    exits: Int[Tensor, " batch"]
    macs: Int[Tensor, " batch"]
    scores: Float[Tensor, "batch exits"]
    memory: Any = None
    decisions: tuple[tuple[Int[Tensor, " _"], Decision], ...] = ()
    leaving: tuple[tuple[Int[Tensor, " _"], Decision], ...] = ()
    violated: Bool[Tensor, " batch"] | None = None
    reuse: Decision | None = None


Limit = float | Float[Tensor, " batch"]
Flag = bool | Bool[Tensor, " batch"]
Scored = tuple[ExitState, Float[Tensor, " batch"], Bool[Tensor, " batch"]]


class Doors:
    """The early exits of one call: who may leave there, who is asked, and whose head is built.

    Args:
        network: in evaluation mode.
        exit_policy: rule and thresholds for all rows.
        thresholds: (B, K - 1) per row, in place of the policy's own.
        read: whether each exit's logits are read even where nobody may leave; by default where a later one needs them.
    Raises:
        ValueError: the number of thresholds does not fit the network, or one is NaN.
    """

    def __init__(
        self,
        network: StagedNetwork,
        exit_policy: ExitPolicy,
        thresholds: Float[Tensor, "rows early"] | None,
        read: Sequence[Any] | None = None,
    ) -> None:
        self.network, self.rule, self.thresholds = network, exit_policy.scorer, thresholds
        self.shared: list[float] = threshold_rows([exit_policy], network.exits)[0].tolist()
        if thresholds is None:
            limits: list[Any] = list(self.shared)
            self.closed = [limit == torch.inf for limit in limits]
        else:
            limits = list(thresholds.unbind(dim=1))
            self.closed = [bool((limit == torch.inf).all()) for limit in limits]
        if read is None:
            read = network.read_later([limit < torch.inf for limit in limits], self.rule.needs_every_exit)
        self.read = read

    def meet(
        self, state: ExitState, mode: Mode, generator: torch.Generator | None
    ) -> tuple[ExitState, Float[Tensor, " batch"] | None, Bool[Tensor, " batch"] | None]:
        """An early exit: the state past it, (B,) scores and (B,) who leaves; None and None where it is not built."""
        exit = state.exit
        limit = self.shared[exit] if self.thresholds is None else self.thresholds[state.rows, exit]
        read = self.read[exit][state.rows] if isinstance(self.read[exit], Tensor) else self.read[exit]
        if self.closed[exit] and not isinstance(read, Tensor) and not read:
            return self.network.pass_by(state), None, None
        if self.rule.before_head:
            return _ask(self.network, self.rule, state, limit, read, mode, generator)
        return _score(self.network, self.rule, state, limit, read)


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


class Record:
    """What happens to the rows of one call until all have left.

    Args:
        rows: B.
        exits: K.
        device: of the rows.
    """

    def __init__(self, rows: int, exits: int, device: torch.device) -> None:
        self.left: list[ExitState] = []
        self.decisions: list[tuple[Tensor, Decision]] = []
        self.asked: list[tuple[Tensor, Decision]] = []
        self.scores = torch.full((rows, exits), torch.nan, device=device)

    def meeting(self, state: ExitState, exit: int, score: Tensor | None) -> None:
        """Notes the scores at an exit, and what a leave gate decided there."""
        if score is not None:
            self.scores[state.rows, exit] = score
        if len(state.leaving) > len(self.asked):
            self.asked.append((state.rows, state.leaving[-1]))


def recall(
    network: StagedNetwork, state: ExitState, mode: Mode, generator: torch.Generator | None, record: Record
) -> tuple[ExitState, Decision | None]:
    """Asks the reuse gate, if there is one, before the first unit: the rows that compute, and the decision of all rows.

    Those that repeat the answer of their last step have left.
    """
    if network.reuse is None:
        return state, None
    state, decision = network.reuse.recall(state, mode, None, generator)
    repeats = decision.action == 0
    if not bool(repeats.any()):
        return state, decision
    one = state.select(torch.nonzero(repeats).flatten())
    answer = one.memory["answer"]
    one = replace(one, features=None, logits=answer[:, None][:, :0], answer=answer, exit=network.exits + 1)
    record.left.append(one)
    return state.select(torch.nonzero(~repeats).flatten()), decision


def leaving(network: StagedNetwork, state: ExitState) -> ExitState:
    """What rows take along when they leave: their memory for the next step, and no features, which nobody reads."""
    return replace(state, memory=network.remember(state), features=None)


def gathered(record: Record) -> RunResult:
    """The results of all rows, in the order in which they came."""
    left = record.left
    answers = torch.cat([state.answered for state in left])
    exits = torch.cat([torch.full_like(state.rows, state.exit - 1) for state in left])
    macs = torch.cat([state.macs for state in left])
    memories = [state.memory for state in left]
    memory = map_tensors(lambda *leaves: torch.cat(leaves), memories[0], *memories[1:])
    if len(left) > 1:
        order = torch.argsort(torch.cat([state.rows for state in left]))
        answers, exits, macs, memory = take((answers, exits, macs, memory), order)
    return RunResult(answers, exits, macs, record.scores, memory, tuple(record.decisions), tuple(record.asked))


def check_thresholds(thresholds: Float[Tensor, "rows limits"], shape: tuple[int, int]) -> None:
    """Raises ValueError unless there is one threshold per row and early exit, and none is NaN."""
    if thresholds.shape != shape:
        raise ValueError(
            f"`thresholds` must be {shape}, got {tuple(thresholds.shape)}. Give one per row and early exit."
        )
    if bool(thresholds.isnan().any()):
        raise ValueError("`thresholds` must be numbers, got nan. Use inf to close an exit.")

"""Budget rule: each row stops before it would cost more than it may, and answers at the latest exit that it passed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlexit.config import require
from rlexit.exit_policy import ExitPolicy
from rlexit.gates import Decision, Gate, Mode
from rlexit.leaving import Doors, Record, RunResult, gathered, leaving
from rlexit.macs import macs_per_row
from rlexit.network import StagedNetwork
from rlexit.state import ExitState
from rlexit.units import Unit


@dataclass(frozen=True)
class Fallback:
    """What rows are told if they cannot go on: the latest exit that they passed.

    Args:
        reached: the rows there, before the head.
        passed: the same rows behind the exit, answered where the head was built.
        built: (B,) whether it was.
        reserve: multiply-adds of the head, kept in hand where it was not.
    """

    reached: ExitState
    passed: ExitState
    built: Bool[Tensor, " batch"]
    reserve: int

    def select(self, index: Int[Tensor, " rows"]) -> Fallback:
        """The given rows only."""
        return Fallback(self.reached.select(index), self.passed.select(index), self.built[index], self.reserve)

    @property
    def owed(self) -> Int[Tensor, " batch"]:
        """(B,) multiply-adds that answering would still cost."""
        return torch.where(self.built, 0, self.reserve)


class Purse:
    """The rows that are still running, what each may spend, and what each falls back on.

    Args:
        network: in evaluation mode.
        state: the rows before the first unit.
        budgets: (B,) multiply-adds.
        insist: whether an infeasible budget is an error.
        record: of the call.
    """

    def __init__(
        self, network: StagedNetwork, state: ExitState, budgets: Int[Tensor, " batch"], insist: bool, record: Record
    ) -> None:
        self.network, self.state, self.budgets, self.insist, self.record = network, state, budgets, insist, record
        self.fallback: Fallback | None = None
        self.violated = torch.zeros(len(state), dtype=torch.bool, device=state.device)

    def afford(self, cost: Int[Tensor, " batch"], what: str) -> bool:
        """Lets the rows go that cannot pay (B,) `cost` more and still answer; True if somebody is left, or was none.

        Raises:
            ValueError: a row has passed no exit yet, and infeasible budgets are errors.
        """
        rows = self.state.rows
        owed = self.fallback.owed if self.fallback is not None else 0
        need = self.state.macs + cost + owed
        stops = need > self.budgets[rows]
        if not bool(stops.any()):
            return True
        if self.fallback is None:
            if self.insist:
                first = int(torch.nonzero(stops).flatten()[0])
                raise ValueError(
                    f"`budgets[{int(rows[first])}]` must pay for the first exit, got {int(self.budgets[rows[first]])} "
                    f"where {what} brings the row to {int(need[first])}. Raise it, or say infeasible='violated'."
                )
            self.violated[rows[stops]] = True
            return True
        return self.leave(stops)

    def leave(self, leaves: Bool[Tensor, " batch"]) -> bool:
        """Answers for the rows that leave, at the exit on which they fall back; True if somebody is left."""
        if self.fallback is None:
            raise RuntimeError("`leave` must follow an exit, got rows before the first. Afford the first exit.")
        for built in (True, False):
            index = torch.nonzero(leaves & (self.fallback.built == built)).flatten()
            if len(index):
                kept = self.fallback.passed if built else self.fallback.reached
                going = replace(kept.select(index), macs=self.state.macs[index])
                going = going if built else self.network.answer(going)
                self.record.left.append(leaving(self.network, going))
        stay = torch.nonzero(~leaves).flatten()
        self.state, self.fallback = self.state.select(stay), self.fallback.select(stay)
        return len(stay) > 0


def run_within(
    network: StagedNetwork,
    exit_policy: ExitPolicy,
    state: ExitState,
    budgets: Int[Tensor, " batch"],
    thresholds: Float[Tensor, "batch early"] | None,
    accounting: str,
    infeasible: str,
    mode: Mode,
    generator: torch.Generator | None,
) -> RunResult:
    """`rlexit.runtime.run` with a hard budget per row: see there.

    Before a gate, a unit or a head, the row must be able to pay for it and for the answer on which it falls back; what a
    gate may cost is looked up before it is asked, what a unit costs once its gate has decided. An exit is passed only if
    its own answer could be paid: so a larger budget never leads to an earlier exit.

    Source: Wang et al. 2020 (DDI), arXiv 1907.04523, section III-C (RADI), made precise.
    """
    require(accounting in ("reserve", "anytime"), "accounting", "be reserve or anytime", accounting)
    require(infeasible in ("raise", "violated"), "infeasible", "be raise or violated", infeasible)
    require(budgets.shape == state.rows.shape, "budgets", f"have {len(state)} numbers", tuple(budgets.shape))
    early = network.exits - 1
    # Whoever runs out of budget may answer at any exit: what later heads read must be there.
    every = accounting == "anytime"
    read = [True] * early if every else network.read_later([True] * early, exit_policy.scorer.needs_every_exit)
    doors = Doors(network, exit_policy, thresholds, read)
    record = Record(len(state), network.exits, state.device)
    purse = Purse(network, state, budgets, infeasible == "raise", record)
    while True:
        if not purse.afford(_asking(network, purse.state), "asking the gate"):
            break
        purse.state, decision = network.decide(purse.state, mode, None, generator)
        if decision is not None:
            record.decisions.append((purse.state.rows, decision))
        if not purse.afford(_running(network, purse.state, decision), network.unit_names[purse.state.unit]):
            break
        decision = purse.state.decisions[-1] if decision is not None else None
        purse.state = network.advance(purse.state, decision)
        if network.at_exit(purse.state) and not _meet(network, purse, doors, mode, generator):
            break
    return replace(gathered(record), violated=purse.violated)


def _meet(network: StagedNetwork, purse: Purse, doors: Doors, mode: Mode, generator: torch.Generator | None) -> bool:
    """An exit: passed by those who can pay for its answer; True if somebody goes on."""
    exit = purse.state.exit
    head = network.head(exit)
    inputs = (network.tap(purse.state),) + ((purse.state.logits[:, -1],) if head.reads_previous else ())
    reserve = macs_per_row(head, *inputs)
    cost = torch.full_like(purse.state.macs, reserve)
    if purse.fallback is not None:
        # The head on which the row fell back so far is no longer owed once this one can be paid.
        cost = cost - purse.fallback.owed
    if not purse.afford(cost, "the first head"):
        return False
    reached = purse.state
    nobody = torch.zeros(len(reached), dtype=torch.bool, device=reached.device)
    purse.fallback = Fallback(reached, reached, nobody, reserve)
    if exit == network.exits - 1:
        return purse.leave(~nobody)
    if doors.rule.before_head and not doors.closed[exit]:
        if not purse.afford(_leave_gate(network, reached), "asking to leave"):
            return False
        reached = purse.state
    purse.state, score, leaves = doors.meet(reached, mode, generator)
    purse.record.meeting(purse.state, exit, score)
    built = ~purse.state.answered.isnan().any(dim=1)
    purse.fallback = Fallback(reached, purse.state, built, reserve)
    stops = purse.violated[purse.state.rows]
    stops = stops if leaves is None else leaves | stops
    return purse.leave(stops) if bool(stops.any()) else True


def _asking(network: StagedNetwork, state: ExitState) -> Int[Tensor, " batch"]:
    """(B,) most that the gate before the next unit may cost."""
    name = network.unit_names[state.unit]
    if name not in network.gates:
        return torch.zeros_like(state.macs)
    gate: Gate = network.gates[name]  # type: ignore[assignment]
    unit: Unit = network.units[name]  # type: ignore[assignment]
    return gate.macs(replace(state, features=unit.glance(state.features)))


def _running(network: StagedNetwork, state: ExitState, decision: Decision | None) -> Int[Tensor, " batch"]:
    """(B,) what the next unit, or its skip path, costs as decided."""
    unit: Unit = network.units[network.unit_names[state.unit]]  # type: ignore[assignment]
    macs = unit.macs(state.features, decision)
    if decision is None or not unit.skippable:
        return macs
    return torch.where(decision.action > 0, macs, unit.skip_macs(state.features))


def _leave_gate(network: StagedNetwork, state: ExitState) -> Int[Tensor, " batch"]:
    """(B,) what asking the leave gate of the exit just reached costs."""
    name = network.exit_names[state.exit]
    if name not in network.leave_gates:
        return torch.zeros_like(state.macs)
    gate: Gate = network.leave_gates[name]  # type: ignore[assignment]
    return gate.macs(replace(state, features=network.tap(state)))

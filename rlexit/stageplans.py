"""Where an export is cut into graphs: where rows may leave, and before every unit that rows may skip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlexit.ensembles import NoEnsemble
from rlexit.exit_policy import ExitPolicy
from rlexit.gatelogits import exportable, is_settled, kind_of
from rlexit.network import StagedNetwork
from rlexit.rules import Rule
from rlexit.runtime import exits_to_build


class ExportError(ValueError):
    """A network cannot be exported, or its export does not act as it does."""


@dataclass(frozen=True)
class Plan:
    """One stage: what it runs for every row that comes to it, what it reads and hands on, and how it ends.

    Args:
        units: names of its units.
        exits: indices of the exits whose heads it builds for every row.
        reads: earlier exits whose raw logits it is given.
        keeps: of its own exits, those whose raw logits a later stage reads.
        exit: where rows may leave at its end; -1 if nobody does.
        last: whether every row leaves here.
        gated: the unit that rows run or skip after this stage, whose gate is asked at its end; "" if there is none.
        asks: whether the exit's leave gate gives the score.
        apart: whether the exit's head is a graph of its own, for the rows that leave.
        head_reads: earlier exits whose raw logits that graph is given.
    """

    units: tuple[str, ...]
    exits: tuple[int, ...]
    reads: tuple[int, ...]
    keeps: tuple[int, ...]
    exit: int
    last: bool = False
    gated: str = ""
    asks: bool = False
    apart: bool = False
    head_reads: tuple[int, ...] = ()


def check_exportable(network: StagedNetwork) -> None:
    """Refuses what a chain of plain graphs cannot do.

    Raises:
        ExportError: a gate decides about more than whole units, or the network carries more than an answer from one env
            step to the next.
    """
    for name, gate in network.gates.items():
        if not exportable(gate):
            raise ExportError(
                f"`gates.kind` must be lstm, ff1, ff2 or static to be exported, got {kind_of(gate)} before {name}, which "
                "no graph can ask. Train a method with one of these, or export one with exits only."
            )
    kind = type(network)
    if kind.remember is not StagedNetwork.remember or kind.begin is not StagedNetwork.begin:
        raise ExportError(
            f"`network` must keep nothing but answers between env steps to be exported, got {kind.__name__}. "
            "Export a method without memory."
        )


def plan_stages(network: StagedNetwork, policy: ExitPolicy) -> list[Plan]:
    """Parts a network at every early exit with a threshold below infinity, before every gated unit, and at the end.

    Raises:
        ExportError: the policy is one that graphs cannot follow.
    """
    rule, early = policy.scorer, network.exits - 1
    if policy.budget:
        raise ExportError(
            f"`budget` must be 0 to be exported, got {policy.budget}: graphs do not count. Export a policy of thresholds."
        )
    if rule.before_head:
        _check_leave_gates(network, policy)
    built = [bool(one) for one in exits_to_build(network, rule, policy.thresholds)] + [True]
    plans: list[Plan] = []
    units: list[str] = []
    exits: list[int] = []
    exit = 0

    def end(at: int, last: bool = False, gated: str = "") -> None:
        asks = rule.before_head and at >= 0 and not last
        apart = asks and not _is_read(
            network, policy, rule, at, [one for one in range(at + 1, early + 1) if built[one]]
        )
        own = [one for one in exits if not (apart and one == at)]
        after = at if at >= 0 else exit - 1
        later = [index for index in range(after + 1, early + 1) if built[index]]
        before = [one for plan in plans for one in plan.exits]
        reads = tuple(one for one in before if _is_read(network, policy, rule, one, own))
        keeps = tuple(one for one in own if _is_read(network, policy, rule, one, later))
        head_reads = tuple(one for one in (*before, *own) if apart and _is_read(network, policy, rule, one, [at]))
        plans.append(Plan(tuple(units), tuple(own), reads, keeps, at, last, gated, asks, apart, head_reads))
        units.clear()
        exits.clear()

    for name in network.unit_names:
        if name in network.gates and not is_settled(network.gates[name]):
            end(-1, gated=name)
        else:
            units.append(name)
        if exit > early or network.exit_names[exit] != name:
            continue
        exits += [exit] if built[exit] else []
        if exit == early or policy.thresholds[exit] < torch.inf:
            end(exit, last=exit == early)
        exit += 1
    return plans


def _check_leave_gates(network: StagedNetwork, policy: ExitPolicy) -> None:
    for name, threshold in zip(network.exit_names[:-1], policy.thresholds, strict=True):
        if threshold == -torch.inf:
            raise ExportError(
                f"`thresholds` of the rule {policy.rule} must be above -inf to be exported, got -inf at {name}: nobody "
                "would be asked there. Export the exit itself, such as --policy 'exit 0'."
            )
        if threshold < torch.inf and name not in network.leave_gates:
            raise ExportError(
                f"`leave_gates` must have exit {name!r} for the rule {policy.rule}, got none. Close the exit by inf."
            )


def _is_read(network: StagedNetwork, policy: ExitPolicy, rule: Rule, exit: int, by: Sequence[int]) -> bool:
    """Whether the raw logits of an exit are read at one of some later ones."""
    for index in by:
        if index <= exit:
            continue
        leaves = index < network.exits - 1 and policy.thresholds[index] < torch.inf
        if (network.head(index).reads_previous and index == exit + 1) or (leaves and rule.needs_every_exit):
            return True
        if is_combined(network, index) and (leaves or index == network.exits - 1):
            return True
    return False


def is_combined(network: StagedNetwork, exit: int) -> bool:
    """Whether an ensemble makes the answer of an exit."""
    ensemble = network.ensemble
    return not isinstance(ensemble, NoEnsemble) and exit < ensemble.exits

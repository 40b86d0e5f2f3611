"""Which gated units a network can best spare: found before gates learn, so that they start near their target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlexit.costs import cost_table
from rlexit.gates import Decision
from rlexit.network import StagedNetwork
from rlexit.objectives import kl_divergence
from rlexit.state import ExitState

# Logits of the gates at the start, from the unit spared first to the one spared last: p from 0.12 to 0.88.
SPREAD = 4.0


@dataclass(frozen=True)
class Spared:
    """One step of the elimination.

    Args:
        name: of the unit that is skipped from here on.
        divergence: mean KL(full network || answer) then, in nats.
        relative_macs: of going to the end then, gates included.
    """

    name: str
    divergence: float
    relative_macs: float


@torch.no_grad()
def rank(network: StagedNetwork, inputs: Any) -> list[Spared]:
    """Takes gated units away one by one, each time the one that is missed least per multiply-add that it saves.

    Nothing is trained, and no gate is asked. What a unit is worth depends on those that are already gone, so that all that
    are left are tried anew each time; passes share what lies before the unit that is tried.

    Args:
        network: with gates that skip units; in evaluation mode afterwards.
        inputs: (B, ...) raw inputs; the answers of the full network are the measure, so no labels are needed.
    Returns:
        Every unit whose gate may skip it, the one spared first at the front.
    """
    network.eval()
    table = cost_table(network, inputs)
    gates = table.exits[-1] - sum(table.units.values()) - sum(table.heads.values())
    cost = sum(table.units.values()) + table.heads[network.exit_names[-1]] + gates
    left = [name for name, gate in network.gates.items() if gate.may_skip and gate.decides]
    gone: set[str] = set()
    found: list[Spared] = []
    wanted, before = _pass(network, network.begin(inputs), gone)
    saved = {name: _saved(network, before[name]) for name in left}
    while left:
        missed = {name: _divergence(wanted, _pass(network, before[name], {*gone, name})[0]) for name in left}
        chosen = min(left, key=lambda name: missed[name] / max(saved[name], 1))
        left.remove(chosen)
        gone.add(chosen)
        cost -= saved[chosen]
        found.append(Spared(chosen, missed[chosen], cost / table.full))
        if left:
            before = _pass(network, network.begin(inputs), gone)[1]
    return found


def start_ranked(network: StagedNetwork, spared: Sequence[Spared], target: float, bias: float) -> int:
    """Moves the gates' logits, alike until now, apart in the order in which units can be spared; 0 lies at the target.

    A price that presses on all of them alike then shuts them one by one, the one missed least first.

    Args:
        network: whose gates they are.
        spared: of `rank`.
        target: relative compute at which gates start.
        bias: of the logits until now.
    Returns:
        How many gates start shut.
    """
    shut = next((count for count, one in enumerate(spared, 1) if one.relative_macs <= target), len(spared))
    for place, one in enumerate(spared):
        gate: Any = network.gates[one.name]
        gate.shift(SPREAD * (place + 0.5 - shut) / len(spared) - bias)
    return shut


def _pass(
    network: StagedNetwork, state: ExitState, gone: set[str]
) -> tuple[Float[Tensor, "batch outputs"], dict[str, ExitState]]:
    """(B, A) log-probabilities of the last exit without the units that are gone, and the states before gated units."""
    before: dict[str, ExitState] = {}
    while not network.finished(state):
        name = network.unit_names[state.unit]
        if name in network.gates:
            before[name] = state
        state = network.advance(state, _shut(state) if name in gone else None)
        if network.at_exit(state):
            state = network.answer(state) if state.exit == network.exits - 1 else network.pass_by(state)
    return state.logits[:, -1].log_softmax(dim=-1), before


def _shut(state: ExitState) -> Decision:
    nothing = torch.zeros(len(state), device=state.device)
    return Decision(nothing.to(torch.int64), nothing, nothing, nothing)


def _saved(network: StagedNetwork, state: ExitState) -> int:
    run, skipped = network.advance(state), network.advance(state, _shut(state))
    return int(run.macs[0] - skipped.macs[0])


def _divergence(wanted: Tensor, answers: Tensor) -> float:
    return float(kl_divergence(wanted, answers[:, None]).mean())

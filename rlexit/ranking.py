"""Which gated units a network can best spare: found before gates learn, so that they start near their target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlexit.config import require
from rlexit.costs import cost_table
from rlexit.gates import Decision, opened
from rlexit.network import StagedNetwork
from rlexit.objectives import kl_divergence
from rlexit.state import ExitState

# Between the mean logits of the units spared first and last; 4 is from p = 0.12 to 0.88 where half of the gates start shut.
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
def rank(
    network: StagedNetwork, inputs: Any, told: Callable[[int, int], None] = lambda done, total: None
) -> list[Spared]:
    """Takes gated units away one by one, each time the one that is missed least per multiply-add that it saves.

    Nothing is trained, and no gate is asked. What a unit is worth depends on those that are already gone, so that all that
    are left are tried anew each time; passes share what lies before the unit that is tried.

    Args:
        network: with gates that skip units; in evaluation mode afterwards.
        inputs: (B, ...) raw inputs; the answers of the full network are the measure, so no labels are needed.
        told: how many units are gone, and of how many: at first, and after each one.
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
    told(0, len(left))
    wanted, before = _pass(network, network.begin(inputs), gone)
    saved = {name: _saved(network, name, before[name].select(torch.arange(1))) for name in left}
    while left:
        missed = {name: _divergence(wanted, _pass(network, before[name], {*gone, name})[0]) for name in left}
        chosen = min(left, key=lambda name: missed[name] / max(saved[name], 1))
        left.remove(chosen)
        gone.add(chosen)
        cost -= saved[chosen]
        found.append(Spared(chosen, missed[chosen], cost / table.full))
        told(len(found), len(saved))
        if left:
            before = _pass(network, network.begin(inputs), gone)[1]
    return found


@torch.no_grad()
def start_ranked(network: StagedNetwork, spared: Sequence[Spared], target: float, inputs: Any) -> int:
    """Moves the gates' mean logits apart in the order in which units can be spared; 0 lies at the target.

    A price that presses on all of them alike then shuts them one by one, the one missed least first.

    Args:
        network: whose gates they are; in evaluation mode afterwards.
        spared: of `rank`.
        target: relative compute at which gates start.
        inputs: (B, ...) raw inputs on which mean logits are taken.
    Returns:
        How many gates start shut.
    Raises:
        TypeError: a gate has no logit of its own.
        ValueError: not even without all of these units the network costs so little.
    """
    least = spared[-1].relative_macs
    advice = "That is what is left without every unit that gates may skip."
    require(target >= least, "target_macs", f"be at least {least:.4f}", target, advice)
    network.eval()
    shut = next(count for count, one in enumerate(spared, 1) if one.relative_macs <= target)
    wanted = {one.name: SPREAD * (place + 0.5 - shut) / len(spared) for place, one in enumerate(spared)}
    state = network.begin(inputs)
    while not network.finished(state):
        name = network.unit_names[state.unit]
        if name in wanted:
            gate: Any = network.gates[name]
            unit: Any = network.units[name]
            # A recurrent gate's logit depends on what the gates before it saw, and not on what they decided.
            gate.shift(wanted[name] - float(gate.level(replace(state, features=unit.glance(state.features))).mean()))
        state, _ = network.decide(state)
        state = network.advance(state, _shut(state) if wanted.get(name, 0.0) < 0 else None)
        state = network.pass_by(state) if network.at_exit(state) else state
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


def _saved(network: StagedNetwork, name: str, state: ExitState) -> int:
    """Multiply-adds that a row spends on a unit and its gate, over those of a row that skips it."""
    gate: Any = network.gates[name]
    unit: Any = network.units[name]
    seen = replace(state, features=unit.glance(state.features))
    run, skipped = network.advance(state).macs, network.advance(state, _shut(state)).macs
    asked, spared = gate.macs(seen, opened(gate, 1, state.device)), gate.macs(seen, _shut(state))
    return int(run + asked - skipped - spared)


def _divergence(wanted: Tensor, answers: Tensor) -> float:
    return float(kl_divergence(wanted, answers[:, None]).mean())

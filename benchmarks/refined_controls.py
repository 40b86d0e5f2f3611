"""What refined decisions are worth: the same games with blind and random reuse at the same rate, and with exits alone.

    python -m benchmarks.refined_controls runs/pong_refined --episodes 30

Prints a Markdown table: mean score with a 95 % interval over games, the normalised return, relative MACs as executed
and the share of repeated answers. Test games are those of `rlexit evaluate`; random play and the teacher are on the same.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from agents.domain import AgentsDomain
from rlexit.calibrate import refined_policy
from rlexit.costs import cost_table
from rlexit.domain import Played, Watch
from rlexit.exit_policy import ExitPolicy
from rlexit.gates import Decision
from rlexit.gates.reuse import ReuseGate
from rlexit.interrupts import StopFlag
from rlexit.metrics import mean_interval
from rlexit.network import StagedNetwork
from rlexit.session import Session, load_network, plain_teacher
from rlexit.settings import locate, resolve


class Blind(ReuseGate):
    """Repeats at a fixed rate, whatever the game shows: evenly spaced, or by a coin."""

    def __init__(self, outputs: int, rate: float, coin: bool) -> None:
        super().__init__(outputs, 1_000_000, side=1, hidden=1)
        self.rate, self.coin = rate, coin
        self.generator = torch.Generator().manual_seed(0)

    def fresh(self, rows: int, device: Any = None) -> dict[str, torch.Tensor]:
        return {**super().fresh(rows, device), "phase": torch.zeros(rows, dtype=torch.float64)}

    def decide(self, state: Any, mode: Any, given: Any = None, generator: Any = None) -> tuple[Decision, Any]:
        memory = state.memory
        due = memory["phase"] + self.rate >= 1
        if self.coin:
            due = torch.rand(len(due), generator=self.generator) < self.rate
        action = (~(due & (memory["left"] > 0))).to(torch.int64)
        nothing = torch.zeros(len(action))
        return Decision(action, action.float(), nothing, nothing), state.carry

    def macs(self, state: Any, decision: Any = None) -> torch.Tensor:
        return torch.zeros_like(state.macs)

    def recall(self, state: Any, *settings: Any, **named: Any) -> tuple[Any, Decision]:
        before = self.fresh(len(state)) if state.memory is None else state.memory
        state, decision = super().recall(replace(state, memory=before), *settings, **named)
        phase = before["phase"] + self.rate - (decision.action == 0).double()
        return replace(state, memory={**state.memory, "phase": phase.clamp(0, 1)}), decision


def with_gate(network: StagedNetwork, gate: ReuseGate | None) -> StagedNetwork:
    """A copy of a network with another reuse gate, or with none."""
    other = copy.deepcopy(network)
    other.reuse = gate
    return other.eval()


def subjects(session: Session, method: str) -> Iterator[tuple[str, StagedNetwork | None, ExitPolicy]]:
    """Name, network and exit policy of every row of the table; blind rates are those of the refined row before."""
    refined = load_network(session, method)[""]
    policy = refined_policy(refined)
    assert policy is not None
    source = load_network(session, "ztw")[""]
    teacher = plain_teacher(session).eval()
    first = ExitPolicy.always(0, refined.exits)
    yield "random", None, ExitPolicy.full(2)
    yield "teacher", teacher, ExitPolicy.full(teacher.exits)
    yield "refined", refined, policy
    yield "refined, nothing repeated", with_gate(refined, None), policy
    yield "refined heads, always exit 0", with_gate(refined, None), first
    yield "ztw, always exit 0", source, first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--method", default="refined")
    parser.add_argument("--episodes", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    place = locate(str(options.run), options.run.parent)
    session = Session(AgentsDomain(resolve(place, [])), place.root, place.seed, Console(quiet=True), StopFlag())  # type: ignore[arg-type]
    full = cost_table(plain_teacher(session), session.domain.example()).full
    floor = ceiling = 0.0

    def tell(name: str, network: StagedNetwork | None, policy: ExitPolicy) -> float:
        nonlocal floor, ceiling
        jobs = [(0, episode) for episode in range(options.episodes)]
        played: list[Played] = list(session.domain.play(network, [policy], jobs, "test", 0, Watch()))
        score = mean_interval([one.value for one in played])
        floor = score.mean if name == "random" else floor
        ceiling = score.mean if name == "teacher" else ceiling
        steps = sum(one.decisions for one in played)
        exits = np.sum([one.exits for one in played], axis=0) / steps
        repeated = float(exits[network.exits]) if network is not None and network.reuse is not None else 0.0
        if name == "random":
            scaled = "0.00"
        else:
            ends = [(value - floor) / ((ceiling - floor) or 1) for value in (score.mean, score.low, score.high)]
            scaled = "{:.3f} [{:.3f}, {:.3f}]".format(*ends)
        macs = sum(one.macs for one in played) / steps / full
        shares = " / ".join(f"{100 * share:.0f}" for share in exits[: network.exits if network else 0])
        row = f"{score.mean:.2f} [{score.low:.2f}, {score.high:.2f}] | {scaled} | {macs:.3f} | {shares}"
        sys.stdout.write(f"| {name} | {row} | {100 * repeated:.0f} | {len(played)} |\n")
        sys.stdout.flush()
        return repeated

    sys.stdout.write("| subject | score [95 %] | normalised [95 %] | relative MACs | exits % | repeated % | games |\n")
    sys.stdout.write("|---|---|---|---|---|---|---|\n")
    rate = 0.0
    for name, network, policy in subjects(session, options.method):
        found = tell(name, network, policy)
        rate = found if name == "refined" else rate
        if name == "ztw, always exit 0" and network is not None:
            refined = load_network(session, options.method)[""]
            for heads, base in (("refined heads", refined), ("ztw heads", network)):
                for kind, coin in (("evenly", False), ("at random", True)):
                    blind = with_gate(base, Blind(base.outputs, rate, coin))
                    tell(f"{heads}, exit 0, repeated {kind}", blind, policy)


if __name__ == "__main__":
    main()

"""Ranking: which units a network can best spare, found without training, and where gates then start."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlexit.config import GateConfig
from rlexit.costs import cost_table
from rlexit.exit_policy import ExitPolicy
from rlexit.gates import Decision
from rlexit.ranking import SPREAD, rank, start_ranked
from rlexit.runtime import run
from tests.rlexit.toys import MAP, residual, scatter

ROWS = torch.randn(16, *MAP, generator=torch.Generator().manual_seed(3))


def network_of(kind: str, bias: float = 1.0):
    torch.manual_seed(2)
    network = residual("inner" if kind == "mgl2s" else "none", GateConfig(kind, bias=bias))
    if kind == "static":
        for head in network.heads.values():
            torch.nn.init.normal_(head.module[-1].weight if hasattr(head, "module") else head.weight)
    else:
        scatter(network)
    return network.eval()


def answers(network):
    result = run(network, ExitPolicy.full(network.exits), ROWS)
    return result.answers, result.macs


def early(table) -> int:
    return sum(list(table.heads.values())[:-1])


def divergence(whole, changed) -> float:
    return float((whole.exp() * (whole - changed)).sum(dim=1).mean())


def test_every_unit_that_may_be_skipped_is_ranked_once():
    network = network_of("static")
    assert sorted(one.name for one in rank(network, ROWS)) == sorted(network.gates)


def test_a_ranking_tells_of_every_unit_that_goes():
    network = network_of("static")
    seen: list[tuple[int, int]] = []
    count = len(rank(network, ROWS, lambda done, units: seen.append((done, units))))
    assert seen == [(done, count) for done in range(count + 1)]


def test_a_unit_that_changes_nothing_is_spared_first_and_not_missed():
    network = network_of("static")
    block = network.units["block2"].module
    with torch.no_grad():
        block.bn2.weight.zero_()
        block.bn2.bias.zero_()
        network.units["block1"].module.bn2.bias.add_(3.0)  # what it leaves is positive, so that a ReLU keeps it
    first = rank(network, ROWS)[0]
    assert first.name == "block2"
    assert first.divergence == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["static", "lstm", "ff1", "mgl2s"])
def test_what_is_ranked_is_what_shut_gates_cost_and_answer(kind):
    network = network_of(kind)
    table = cost_table(network, ROWS)
    for gate in network.gates.values():
        gate.shift(100.0)
        for channels in gate.channel.offsets() if kind == "mgl2s" else []:
            channels.detach().add_(100.0)
    whole, macs = answers(network)
    assert float(macs[0]) / table.full == pytest.approx((table.exits[-1] - early(table)) / table.full)
    for one in rank(network, ROWS):
        network.gates[one.name].shift(-200.0)
        changed, macs = answers(network)
        assert one.relative_macs == pytest.approx(float(macs[0]) / table.full)
        assert one.divergence == pytest.approx(divergence(whole, changed), rel=1e-3, abs=1e-5)


def test_the_unit_missed_least_goes_first_whatever_was_shared_between_passes():
    network = network_of("static", bias=50.0)
    whole, _ = answers(network)
    missed = {}
    for name in network.gates:
        network.gates[name].shift(-100.0)
        changed, _ = answers(network)
        network.gates[name].shift(100.0)
        missed[name] = divergence(whole, changed)
    first = rank(network, ROWS)[0]
    assert first.divergence == pytest.approx(missed[first.name], rel=1e-4)
    saved = {name: cost_table(network, ROWS).units[name] for name in network.gates}
    assert first.name == min(missed, key=lambda name: missed[name] / saved[name])


@pytest.mark.parametrize("kind", ["static", "lstm", "ff1", "ff2", "mgl2s"])
def test_a_shift_moves_every_row_s_decision_alike(kind):
    network = network_of(kind, bias=0.0)
    for by, action in ((60.0, 1), (-120.0, 0)):
        for gate in network.gates.values():
            gate.shift(by)
        result = run(network, ExitPolicy.full(network.exits), ROWS)
        assert {int(a) for _, decision in result.decisions for a in decision.action} == {action}


@pytest.mark.parametrize("kind", ["static", "lstm", "ff1", "ff2", "mgl2s"])
def test_gates_start_in_the_order_of_the_ranking_around_the_target(kind):
    network = network_of(kind)
    spared = rank(network, ROWS)
    assert start_ranked(network, spared, spared[1].relative_macs, ROWS) == 2
    levels = mean_levels(network, shut={one.name for one in spared[:2]})
    count = len(spared)
    for place, one in enumerate(spared):
        assert levels[one.name] == pytest.approx(SPREAD * (place + 0.5 - 2) / count, abs=1e-3)


def mean_levels(network, shut) -> dict[str, float]:
    found, state = {}, network.begin(ROWS)
    while not network.finished(state):
        name = network.unit_names[state.unit]
        if name in network.gates:
            seen = replace(state, features=network.units[name].glance(state.features))
            found[name] = float(network.gates[name].level(seen).mean().detach())
        state, _ = network.decide(state)
        zeros = torch.zeros(len(state))
        state = network.advance(state, Decision(zeros.long(), zeros, zeros, zeros) if name in shut else None)
        state = network.pass_by(state) if network.at_exit(state) else state
    return found


def test_static_gates_that_start_ranked_cost_the_target():
    network = network_of("static")
    spared = rank(network, ROWS)
    start_ranked(network, spared, spared[1].relative_macs, ROWS)
    _, macs = answers(network)
    assert float(macs[0]) / cost_table(network, ROWS).full == pytest.approx(spared[1].relative_macs)


def test_gates_without_a_logit_of_their_own_cannot_start_ranked():
    network = network_of("random")
    with pytest.raises(TypeError, match="logit of its own"):
        start_ranked(network, rank(network, ROWS), 0.5, ROWS)

"""Ranking: which units a network can best spare, found without training, and where gates then start."""

from __future__ import annotations

import pytest
import torch

from rlexit.config import GateConfig
from rlexit.costs import cost_table
from rlexit.exit_policy import ExitPolicy
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


def test_every_unit_that_may_be_skipped_is_ranked_once():
    network = network_of("static")
    assert sorted(one.name for one in rank(network, ROWS)) == sorted(network.gates)


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


@pytest.mark.parametrize("kind", ["static", "lstm", "ff1"])
def test_what_is_ranked_is_what_shut_gates_cost_and_answer(kind):
    network = network_of(kind)
    spared = rank(network, ROWS)
    for count, one in enumerate(spared, 1):
        other = network_of("static", bias=50.0)
        other.load_state_dict({k: v for k, v in network.state_dict().items() if "gates" not in k}, strict=False)
        for gone in spared[:count]:
            other.gates[gone.name].shift(-100.0)
        _, macs = answers(other)
        gates = cost_table(network, ROWS).exits[-1] - cost_table(other, ROWS).exits[-1]
        assert one.relative_macs == pytest.approx(float(macs[0] + gates) / cost_table(network, ROWS).full)


def test_the_unit_missed_least_goes_first_whatever_was_shared_between_passes():
    network = network_of("static", bias=50.0)
    whole, _ = answers(network)
    missed = {}
    for name in network.gates:
        network.gates[name].shift(-100.0)
        changed, _ = answers(network)
        network.gates[name].shift(100.0)
        missed[name] = float((whole.exp() * (whole - changed)).sum(dim=1).mean())
    first = rank(network, ROWS)[0]
    assert first.divergence == pytest.approx(missed[first.name], rel=1e-4)
    saved = {name: cost_table(network, ROWS).units[name] for name in network.gates}
    assert first.name == min(missed, key=lambda name: missed[name] / saved[name])


@pytest.mark.parametrize("kind", ["static", "lstm", "ff1", "ff2", "mgl2s", "policy_net"])
def test_a_shift_moves_every_row_s_decision_alike(kind):
    network = network_of(kind, bias=0.0)
    for by, action in ((60.0, 1), (-120.0, 0)):
        for gate in network.gates.values():
            if gate.decides:
                gate.shift(by)
        decisions = run(network, ExitPolicy.full(network.exits), ROWS).decisions
        chosen = [one for (_, one), gate in zip(decisions, network.gates.values(), strict=True) if gate.decides]
        assert {int(a) for decision in chosen for a in decision.action} == {action}


def test_gates_start_in_the_order_of_the_ranking_around_the_target():
    network = network_of("static")
    spared = rank(network, ROWS)
    shut = start_ranked(network, spared, spared[1].relative_macs, bias=1.0)
    assert shut == 2
    logits = [float(network.gates[one.name].logit.detach()) for one in spared]
    assert logits == sorted(logits)
    assert [logit > 0 for logit in logits] == [False, False, *[True] * (len(logits) - 2)]
    assert logits[-1] - logits[0] == pytest.approx(SPREAD * (len(logits) - 1) / len(logits))
    _, macs = answers(network)
    assert float(macs[0]) / cost_table(network, ROWS).full == pytest.approx(spared[1].relative_macs)


def test_gates_without_a_logit_of_their_own_cannot_start_ranked():
    network = network_of("random")
    with pytest.raises(TypeError, match="no logit of its own"):
        start_ranked(network, rank(network, ROWS), 0.5, bias=1.0)

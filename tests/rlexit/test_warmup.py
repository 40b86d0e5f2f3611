"""Warm-up: gates learn to be open, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch

from rlexit.config import GateConfig
from rlexit.exit_policy import ExitPolicy
from rlexit.runtime import run
from rlexit.warmup import warm_up
from tests.rlexit.toys import CHANNELS, SIDE, residual


def batches(count: int):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((16, CHANNELS, SIDE, SIDE), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("kind", ["lstm", "ff2", "mgl2s", "static"])
def test_warm_up_opens_every_gate_with_frozen_weights_and_frozen_statistics(kind):
    torch.manual_seed(0)
    network = residual("inner" if kind == "mgl2s" else "none", GateConfig(kind, bias=-1.0)).train()
    before = copy.deepcopy(network.state_dict())
    result = warm_up(network, batches(200), learning_rate=0.05)
    assert 0 < result.updates < 200
    assert result.open_share == 1.0
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("gates.") for name in changed)
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    inputs = batches(1)[0]
    result = run(network.eval(), ExitPolicy.full(network.exits), inputs)
    network.set_gates({})
    assert torch.equal(result.answers, run(network, ExitPolicy.full(network.exits), inputs).answers)


def test_gates_that_start_open_need_no_update():
    network = residual("none", GateConfig("static", bias=4.0))
    assert warm_up(network, batches(3)).updates == 0


def test_gates_that_explore_are_open_enough_at_what_they_can_reach():
    network = residual("none", GateConfig("static", bias=4.0, bound=0.8))
    assert warm_up(network, batches(3)).updates == 0
    network = residual("none", GateConfig("static", bias=1.0, bound=0.8))
    assert 0 < warm_up(network, batches(200), learning_rate=0.1).updates < 200


def test_a_gate_that_decides_nothing_does_not_vouch_for_the_others():
    network = residual("none", GateConfig("policy_net", bias=0.0))
    with torch.no_grad():
        network.gates["stem"].module.logits.weight.zero_()
        network.gates["stem"].module.logits.bias.fill_(2.7)  # p = 0.937: enough only for a mean over four, not three
    assert warm_up(network, batches(1)).updates == 1


def test_what_is_open_is_measured_in_the_end_even_where_the_gates_are_not_certain():
    network = residual("none", GateConfig("static", bias=0.5))
    result = warm_up(network, batches(2), learning_rate=1e-4)
    assert result.updates == 2
    assert result.open_share == 1.0


def test_a_warm_up_that_is_cut_short_opens_nothing():
    network = residual("none", GateConfig("static", bias=-4.0))
    result = warm_up(network, batches(2), learning_rate=1e-4)
    assert result.updates == 2
    assert result.open_share == 0.0


def test_a_network_without_gates_that_learn_is_refused():
    with pytest.raises(ValueError, match="`network` must have gates that learn"):
        warm_up(residual(), batches(1))

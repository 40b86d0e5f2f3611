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


def test_a_warm_up_that_is_cut_short_says_what_it_has_not_checked():
    network = residual("none", GateConfig("static", bias=-4.0))
    result = warm_up(network, batches(2), learning_rate=1e-4)
    assert result.updates == 2
    assert result.open_share == 0.0


def test_a_network_without_gates_that_learn_is_refused():
    with pytest.raises(ValueError, match="`network` must have gates that learn"):
        warm_up(residual(), batches(1))

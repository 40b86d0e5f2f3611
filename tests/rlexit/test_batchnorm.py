"""Batch statistics: frozen means frozen, and recalibrated ones are those of the rows that really run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlexit.batchnorm import frozen, recalibrate
from rlexit.config import GateConfig
from rlexit.gates import Decision, Gate
from rlexit.heads import ModuleHead
from rlexit.network import StagedNetwork
from rlexit.units import ModuleUnit, Unit
from tests.rlexit.toys import TOYS, residual


class Normed(Unit):
    """norm(x), or x."""

    skippable = True

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def body(self, features: Tensor, decision: Decision | None = None) -> Tensor:
        return self.norm(features)

    def skip(self, features: Tensor) -> Tensor:
        return features


class PositiveGate(Gate):
    """Runs rows whose first feature is positive."""

    def decide(self, state: Any, mode: Any, given: Any = None, generator: Any = None) -> tuple[Decision, Any]:
        action = (state.features[:, 0] > 0).long()
        nothing = torch.zeros(len(state))
        return Decision(action, action.float(), nothing, nothing), state.carry


def network() -> StagedNetwork:
    units = {"first": Normed(), "last": ModuleUnit(nn.Identity())}
    return StagedNetwork(units, {"last": ModuleHead(nn.Linear(2, 3))}, 3, gates={"first": PositiveGate()})


def test_frozen_statistics_stay_and_modes_come_back():
    net = network().train()
    norm: Any = net.units["first"].norm
    with frozen(net.units):
        assert net.training
        net(torch.randn(8, 2) + 5)
    assert norm.training
    assert torch.equal(norm.running_mean, torch.zeros(2))
    net(torch.randn(8, 2) + 5)
    assert not torch.equal(norm.running_mean, torch.zeros(2))


def test_recalibrated_statistics_are_those_of_all_rows_that_run_however_few_of_a_batch():
    torch.manual_seed(0)
    net = network()
    # Of the second batch one row runs, far from all others: it counts as one row, and the distance is in the variance.
    batches = [torch.randn(64, 2), torch.tensor([[-1.0, 5.0], [100.0, 100.0], [-2.0, 1.0]]), torch.randn(32, 2) + 3]
    recalibrate(net, batches)
    norm: Any = net.units["first"].norm
    every = torch.cat(batches)
    running = every[every[:, 0] > 0]
    torch.testing.assert_close(norm.running_mean, running.mean(dim=0))
    torch.testing.assert_close(norm.running_var, running.var(dim=0))
    assert norm.momentum == 0.1
    assert norm.track_running_stats
    assert not net.training
    assert not norm.training


def test_a_recalibration_that_fails_leaves_everything_as_it_was():
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(RuntimeError):
        recalibrate(net, [torch.randn(8, 2) + 5, torch.randn(8, 3)])
    norm: Any = net.units["first"].norm
    assert norm.momentum == 0.1
    assert norm.track_running_stats
    assert not any(part.training for part in net.modules())
    assert not norm._forward_pre_hooks
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_units_that_compute_some_channels_only_are_recalibrated_too_and_stay_narrow():
    torch.manual_seed(0)
    net = residual("inner", GateConfig("static", bias=4.0)).eval()
    inputs = TOYS["skips"].inputs(32) + 1
    recalibrate(net, [inputs[:20], inputs[20:]])
    unit: Any = net.units["block0"]
    assert unit.narrow
    seen = unit.module.conv1(net.units["stem"](inputs)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(unit.module.bn1.running_mean, seen.mean(dim=1))
    torch.testing.assert_close(unit.module.bn1.running_var, seen.var(dim=1))


def test_a_unit_that_no_row_runs_keeps_its_statistics():
    net = network()
    norm: Any = net.units["first"].norm
    with torch.no_grad():
        norm.running_mean.fill_(7.0)
    recalibrate(net, [-torch.rand(8, 2)])
    assert torch.equal(norm.running_mean, torch.full((2,), 7.0))

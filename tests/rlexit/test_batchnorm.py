"""Batch statistics: frozen means frozen, and recalibrated ones are those of the rows that really run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlexit.batchnorm import frozen, recalibrate
from rlexit.gates import Decision, Gate
from rlexit.heads import ModuleHead
from rlexit.network import StagedNetwork
from rlexit.units import ModuleUnit, Unit


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


def test_recalibrated_statistics_are_means_over_batches_of_the_rows_that_run():
    torch.manual_seed(0)
    net = network()
    batches = [torch.randn(64, 2) for _ in range(3)]
    recalibrate(net, batches)
    norm: Any = net.units["first"].norm
    running = [batch[batch[:, 0] > 0] for batch in batches]
    torch.testing.assert_close(norm.running_mean, torch.stack([rows.mean(dim=0) for rows in running]).mean(dim=0))
    torch.testing.assert_close(norm.running_var, torch.stack([rows.var(dim=0) for rows in running]).mean(dim=0))
    assert norm.momentum == 0.1
    assert not net.training
    assert not norm.training


def test_a_unit_that_no_row_runs_keeps_its_statistics():
    net = network()
    norm: Any = net.units["first"].norm
    with torch.no_grad():
        norm.running_mean.fill_(7.0)
    recalibrate(net, [-torch.rand(8, 2)])
    assert torch.equal(norm.running_mean, torch.full((2,), 7.0))

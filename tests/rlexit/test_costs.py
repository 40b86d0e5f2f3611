"""Multiply-adds: hand numbers, and what gates, norms and odd modules count."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rlexit.costs import CostTable, cost_table, parameters
from rlexit.exit_policy import ExitPolicy
from rlexit.macs import macs_per_row
from rlexit.runtime import run
from tests.rlexit.toys import CHANNELS, SIDE, TOYS, staged, watched

CONV = CHANNELS * CHANNELS * 9 * SIDE * SIDE


def test_a_staged_network_costs_what_a_person_counts():
    table = cost_table(staged(), TOYS["cascade"].inputs(2))
    first = CHANNELS * CHANNELS * 9 * 3 * 3 + CHANNELS * 2 * 2 * 5  # stride 2 on 8 x 8 leaves 3 x 3
    second = first + 5 * 5  # the logits before are read too
    last = CHANNELS * SIDE * SIDE * 5
    assert table.units == {"conv0": CONV, "conv1": CONV, "conv2": CONV}
    assert table.heads == {"conv0": first, "conv1": second, "conv2": last}
    assert table.exits == (CONV + first, 2 * CONV + first + second, 3 * CONV + first + second + last)
    assert table.full == 3 * CONV + last
    assert table.relative(table.full / 4) == 0.25


@pytest.mark.parametrize("name", list(TOYS))
def test_the_table_is_what_a_row_costs_that_goes_all_the_way_with_every_gate_open(name):
    toy = TOYS[name]
    network = toy.network(bias=100.0) if toy.skippable else toy.network()
    inputs = toy.inputs(5)
    table = cost_table(network, inputs)
    never = ExitPolicy("confidence", (2.0,) * (network.exits - 1))
    with watched(network) as work:
        result = run(network, never, inputs)
    assert work.macs == int(result.macs.sum())
    if toy.skippable or not toy.gated:
        assert result.macs.tolist() == [table.exits[-1]] * 5
    else:
        assert int(result.macs.max()) <= table.exits[-1]


@pytest.mark.parametrize("name", list(TOYS))
def test_counting_does_no_work(name):
    toy = TOYS[name]
    network = toy.network()
    inputs = toy.inputs(7)
    with watched(network) as work:
        table = cost_table(network, inputs)
    assert work.macs <= table.exits[-1] + 1000  # one row of zeros goes through, not seven
    assert table.exits[0] < table.exits[1] < table.exits[2]


def test_norms_pooling_activations_and_softmax_count_nothing():
    module = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Softmax(dim=1))
    assert macs_per_row(module.eval(), torch.zeros(3, 4, 8, 8)) == 0


def test_grouped_and_strided_convolutions_count_what_they_do():
    assert macs_per_row(nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.zeros(1, 8, 5, 5)) == 8 * 9 * 25
    assert macs_per_row(nn.Conv2d(3, 6, 5, stride=2), torch.zeros(1, 3, 9, 9)) == 6 * 3 * 25 * 9


def test_the_batch_size_does_not_matter_and_the_shape_does():
    layer = nn.Conv2d(2, 2, 3)
    assert macs_per_row(layer, torch.zeros(0, 2, 5, 5)) == 2 * 2 * 9 * 9
    assert macs_per_row(layer, torch.zeros(64, 2, 5, 5)) == 2 * 2 * 9 * 9
    assert macs_per_row(layer, torch.zeros(1, 2, 4, 4)) == 2 * 2 * 9 * 4


class Odd(nn.Module):
    """Reads a tree, shares a weight, and keeps a buffer that is not saved."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.other = nn.Linear(3, 3)
        self.other.weight = self.one.weight
        self.register_buffer("scale", torch.ones(3), persistent=False)

    def forward(self, features: dict[str, Tensor], extra: Tensor | None = None) -> Tensor:
        total = self.one(features["a"] * self.scale) + functional.relu(self.other(features["b"]))
        return total if extra is None else total + self.one(extra)


def test_trees_shared_weights_and_unsaved_buffers_are_counted():
    odd = Odd()
    tree = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}
    assert macs_per_row(odd, tree) == 18
    assert macs_per_row(odd, tree, None) == 18
    assert macs_per_row(odd, tree, torch.zeros(2, 3)) == 27


def test_half_precision_counts_as_full_does():
    layer = nn.Conv2d(2, 2, 3)
    assert macs_per_row(layer, torch.zeros(1, 2, 5, 5, dtype=torch.bfloat16)) == 2 * 2 * 9 * 9
    assert macs_per_row(layer.to(torch.bfloat16), torch.zeros(1, 2, 6, 6, dtype=torch.bfloat16)) == 2 * 2 * 9 * 16


def test_parameters_are_counted_once():
    assert parameters(nn.Linear(3, 2)) == 8
    odd = Odd()
    assert parameters(odd) == 9 + 3 + 3


def test_relative_macs_are_against_the_head_free_network():
    assert math.isclose(CostTable({"a": 75}, {"a": 25}, (100,), 100).relative(50), 0.5)

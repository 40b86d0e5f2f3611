"""Energy: hand numbers of the memory model, and a price on it that reaches the gates."""

from __future__ import annotations

import pytest
import torch

from rlexit.config import GateConfig
from rlexit.costs import cost_table
from rlexit.energy import EnergyModel, energy_table
from tests.rlexit.toys import CHANNELS, OUTPUTS, SIDE, TOYS, residual, scatter, staged, watched


def test_energy_is_what_a_person_counts():
    network, inputs = staged(), TOYS["cascade"].inputs(2)
    table = energy_table(network, inputs)
    macs = CHANNELS * CHANNELS * 9 * SIDE * SIDE
    moved = CHANNELS * CHANNELS * 9 + CHANNELS + 2 * CHANNELS * SIDE * SIDE
    # One multiply-add and three register accesses each; every number moved once, and twice through the buffer.
    assert table.energy["units.conv1"] == macs * (1 + 3) + moved * (200 + 2 * 6)
    last = CHANNELS * SIDE * SIDE * OUTPUTS
    head = last * 4 + (last + OUTPUTS + CHANNELS * SIDE * SIDE + OUTPUTS) * 212
    assert table.energy["heads.conv2"] == head
    assert table.full == 3 * table.energy["units.conv1"] + head


def test_with_nothing_but_multiply_adds_energy_is_multiply_adds():
    only = EnergyModel(dram=0, buffer=0, register=0, mac=1)
    for name, toy in TOYS.items():
        network, inputs = toy.network(), toy.inputs(5)
        table = energy_table(network, inputs, only)
        assert table.full == cost_table(network, inputs).full, name
        trace = network(inputs)
        torch.testing.assert_close(table.expected(trace.expected_parts), trace.expected_macs)
        assert sum(table.macs.values()) == cost_table(network, inputs).exits[-1]


def test_expected_parts_sum_to_expected_macs_and_name_every_part():
    network = residual("both", GateConfig("mgl2s", bias=0.0))
    scatter(network)
    trace = network.eval()(TOYS["skips"].inputs(7))
    torch.testing.assert_close(torch.stack(list(trace.expected_parts.values())).sum(dim=0), trace.expected_macs)
    names = [f"units.{n}" for n in network.unit_names] + [f"gates.{n}" for n in network.gates]
    assert set(trace.expected_parts) == {*names, *(f"heads.{n}" for n in network.exit_names)}


def test_a_skipped_unit_saves_its_energy():
    network = residual("none", GateConfig("static", bias=4.0)).eval()
    inputs = TOYS["skips"].inputs(3)
    table = energy_table(network, inputs)
    opened = table.relative(network(inputs).expected_parts)
    with torch.no_grad():
        network.gates["block2"].logit.fill_(-4.0)
    skipped = table.relative(network(inputs).expected_parts)
    torch.testing.assert_close(opened - skipped, torch.full((3,), table.energy["units.block2"] / table.full))


def test_the_table_has_every_gate_open_where_the_gates_would_skip_everything():
    network, inputs = residual("both", GateConfig("mgl2s", bias=4.0)).eval(), TOYS["skips"].inputs(2)
    opened = energy_table(network, inputs)
    for gate in network.gates.values():
        gate.channel.module[-1][-1].bias.data.fill_(-4.0)
    with torch.no_grad():
        network.gates["block0"].layer.core.logit.bias.fill_(-100.0)
    assert not any(int(decision.action.sum()) for decision in network(inputs).decisions)
    assert energy_table(network, inputs).energy == opened.energy


def test_the_price_of_energy_reaches_the_gates_in_proportion_to_what_a_unit_takes():
    network = residual("none", GateConfig("static", bias=0.1)).train()
    inputs = TOYS["skips"].inputs(3)
    table = energy_table(network.eval(), inputs)
    network.train()
    table.expected(network(inputs).expected_parts).mean().backward()
    slope = torch.tensor(0.1).sigmoid() * (1 - torch.tensor(0.1).sigmoid())
    for name in ("block0", "block2"):  # without a projection, which a skipped row pays for all the same
        torch.testing.assert_close(network.gates[name].logit.grad, slope * table.energy[f"units.{name}"])


def test_a_table_of_another_network_is_refused():
    inputs = TOYS["skips"].inputs(2)
    table = energy_table(residual(), inputs)
    with pytest.raises(ValueError, match=r"`parts` must be those of the network .* got \['gates.block0'\]"):
        table.expected(residual("none", GateConfig("lstm"))(inputs).expected_parts)


def test_constants_are_printed_and_checked():
    assert EnergyModel().spelled().startswith("dram 200, buffer 6, register 1, mac 1")
    with pytest.raises(ValueError, match="`energy.dram` must be at least 0 and finite, got -1"):
        EnergyModel(dram=-1)


def test_counting_energy_does_one_rows_work():
    network, inputs = staged(), TOYS["cascade"].inputs(7)
    with watched(network) as work:
        energy_table(network, inputs)
    assert work.macs == cost_table(network, inputs).exits[-1]

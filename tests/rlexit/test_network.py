"""Staged networks: what is trained, what gradients reach, and what a wrong network is told."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from rlexit.ensembles import GeometricEnsemble
from rlexit.exit_policy import ExitPolicy
from rlexit.heads import LinearHead, ModuleHead
from rlexit.network import StagedNetwork
from rlexit.objectives import cross_entropy
from rlexit.runtime import replay
from rlexit.units import ModuleUnit
from tests.rlexit.toys import EXITS, MAP, OUTPUTS, TOYS, HeadConfig, SkipGate, linear_heads, skips, staged, watched

BATCHES = (0, 1, 7)


# ---- forward ----


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", list(TOYS))
def test_forward_gives_every_exit_of_every_row(name, batch):
    toy = TOYS[name]
    network = toy.network()
    trace = network(toy.inputs(batch))
    assert trace.logits.shape == (batch, EXITS, OUTPUTS)
    assert trace.answers.shape == (batch, EXITS, OUTPUTS)
    assert trace.expected_macs.shape == (batch,)
    assert len(trace.decisions) == len(network.gates)
    torch.testing.assert_close(trace.answers.exp().sum(dim=-1), torch.ones(batch, EXITS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", list(TOYS))
def test_a_row_alone_gets_what_it_gets_in_a_batch(name):
    toy = TOYS[name]
    network = toy.network()
    inputs = toy.inputs(7)
    together = network(inputs)
    for row in range(7):
        alone = network(inputs[row : row + 1])
        torch.testing.assert_close(alone.answers[0], together.answers[row], rtol=0, atol=1e-5)
        torch.testing.assert_close(alone.logits[0], together.logits[row], rtol=0, atol=1e-4)


def test_the_logits_are_those_of_the_modules_themselves():
    network = staged()
    inputs = TOYS["cascade"].inputs(4)
    logits = network(inputs).logits
    features = inputs.float() / 255
    for exit, name in enumerate(("conv0", "conv1", "conv2")):
        features = network.units[name].module(features)
        head = network.heads[name]
        expected = head(features, logits[:, exit - 1]) if head.reads_previous else head(features)
        torch.testing.assert_close(logits[:, exit], expected)


def test_a_lean_pass_computes_no_unit_that_every_row_skips_and_gives_its_gate_no_gradient():
    network = skips()
    for name, bias in (("block1", 2.0), ("block2", -2.0), ("block3", 2.0)):
        gate: Any = network.gates[name]
        nn.init.zeros_(gate.net.weight)
        nn.init.zeros_(gate.net.bias)
        gate.bias = bias
    inputs = TOYS["skips"].inputs(5)
    grown = {}
    for lean in (True, False):
        network.zero_grad(set_to_none=True)
        with watched(network) as work:
            trace = network(inputs, lean=lean)
        (trace.answers.square().sum() + trace.expected_macs.sum()).backward()
        grads = {name: network.gates[name].net.bias.grad for name in network.gates}
        grown[lean] = (
            trace,
            work.rows["units.block2"],
            {name: g is not None and bool(g.any()) for name, g in grads.items()},
        )
    (few, lean_rows, lean_grads), (every, dense_rows, dense_grads) = grown[True], grown[False]
    assert (lean_rows, dense_rows) == (0, 5)
    assert lean_grads == {"block1": True, "block2": False, "block3": True}
    assert all(dense_grads.values())
    assert torch.equal(few.answers, every.answers)
    assert torch.equal(few.expected_macs, every.expected_macs)


def test_kept_features_are_the_last_of_every_size_of_map():
    def half(channels: int, stride: int) -> ModuleUnit:
        return ModuleUnit(nn.Conv2d(channels, 4, 3, stride, padding=1))

    units = {"stem": half(3, 2), "one": half(4, 1), "two": half(4, 2), "three": half(4, 1)}
    network = StagedNetwork(units, {"three": LinearHead((4, 2, 2), 2, HeadConfig(), False)}, 2)
    inputs = torch.rand((2, 3, 8, 8))
    trace = network(inputs)
    first = units["one"](units["stem"](inputs))
    assert [tuple(kept.shape[1:]) for kept in trace.features] == [(4, 4, 4), (4, 2, 2)]
    torch.testing.assert_close(trace.features[0], first)
    torch.testing.assert_close(trace.features[1], units["three"](units["two"](first)))


def test_answers_come_from_the_ensemble_of_the_logits():
    network = staged(ensemble=GeometricEnsemble(2, OUTPUTS))
    trace = network(TOYS["cascade"].inputs(4))
    torch.testing.assert_close(trace.answers, network.combine(trace.logits))
    torch.testing.assert_close(trace.answers[:, 2], trace.logits[:, 2].log_softmax(dim=-1))
    assert (trace.answers[:, 1] - trace.logits[:, 1].log_softmax(dim=-1)).abs().max() > 1e-3


def test_images_become_numbers_between_0_and_1_and_nothing_else_is_touched():
    network = staged()
    image = torch.tensor([[0, 51, 255]], dtype=torch.uint8)
    torch.testing.assert_close(network.prepare(image), torch.tensor([[0.0, 0.2, 1.0]]))
    assert image.tolist() == [[0, 51, 255]]
    real = torch.tensor([[3.0]])
    assert network.prepare(real) is real


# ---- gradient facts ----


def gradients(stop_gradient: bool, exit: int) -> dict[str, float]:
    """Size of the gradient of exit's loss in every head."""
    torch.manual_seed(0)
    network = staged(stop_gradient=stop_gradient)
    labels = torch.tensor([0, 1, 2, 3])
    answers = network(TOYS["cascade"].inputs(4)).answers
    cross_entropy(labels, answers)[:, exit].sum().backward()
    return {
        name: sum(float(p.grad.abs().sum()) for p in head.parameters() if p.grad is not None)
        for name, head in network.heads.items()
    }


def test_with_the_gradient_stop_a_later_loss_does_not_reach_an_earlier_head():
    sizes = gradients(stop_gradient=True, exit=1)
    assert sizes["conv0"] == 0
    assert sizes["conv1"] > 0
    assert sizes["conv2"] == 0


def test_without_the_gradient_stop_a_later_loss_reaches_the_head_before():
    sizes = gradients(stop_gradient=False, exit=1)
    assert sizes["conv0"] > 1e-3
    assert sizes["conv1"] > 0


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_the_first_and_the_last_loss_reach_their_own_head_only(stop_gradient):
    first, last = gradients(stop_gradient, 0), gradients(stop_gradient, 2)
    assert first["conv0"] > 0
    assert first["conv1"] == first["conv2"] == 0
    assert last["conv2"] > 0
    assert last["conv0"] == last["conv1"] == 0


def test_the_price_of_compute_reaches_the_gates():
    network = skips()
    network(TOYS["skips"].inputs(7)).expected_macs.sum().backward()
    gate = network.gates["block1"]
    assert gate.net.weight.grad is not None
    assert gate.net.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", list(TOYS))
def test_expected_macs_of_hard_decisions_are_what_is_executed(name):
    toy = TOYS[name]
    network, inputs = toy.network(), toy.inputs(7)
    executed = replay(network, ExitPolicy.full(network.exits), inputs).macs
    torch.testing.assert_close(network(inputs).expected_macs, executed.float())


# ---- decisions ----


@pytest.mark.parametrize("name", [name for name, toy in TOYS.items() if toy.gated])
def test_replayed_decisions_give_the_same_answers(name):
    toy = TOYS[name]
    network = toy.network()
    inputs = toy.inputs(7)
    sampled = network(inputs, generator=torch.Generator().manual_seed(5))
    again = network(inputs, decisions=sampled.decisions)
    greedy = network(inputs)
    torch.testing.assert_close(again.answers, sampled.answers)
    for first, second in zip(sampled.decisions, again.decisions, strict=True):
        assert torch.equal(first.action, second.action)
        torch.testing.assert_close(first.log_prob, second.log_prob)
    assert (greedy.answers - sampled.answers).abs().max() > 1e-3


def test_decisions_are_replayed_past_units_that_have_no_gate():
    torch.manual_seed(0)
    units = OrderedDict((f"block{n}", type(skips().units["block0"])()) for n in range(4))
    network = StagedNetwork(units, linear_heads(("block0", "block3"), MAP), OUTPUTS, gates={"block1": SkipGate()})
    inputs = TOYS["skips"].inputs(7)
    sampled = network(inputs, generator=torch.Generator().manual_seed(5))
    assert len(sampled.decisions) == 1
    torch.testing.assert_close(network(inputs, decisions=sampled.decisions).answers, sampled.answers)


def test_the_generator_decides_and_nothing_else():
    network = skips()
    inputs = TOYS["skips"].inputs(7)
    torch.manual_seed(1)
    first = network(inputs, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    second = network(inputs, generator=torch.Generator().manual_seed(5))
    third = network(inputs, generator=torch.Generator().manual_seed(6))
    assert torch.equal(first.answers, second.answers)
    assert not torch.equal(first.answers, third.answers)


# ---- training heads on cached features ----


@pytest.mark.parametrize("name", list(TOYS))
def test_heads_read_from_taps_what_they_read_in_forward(name):
    toy = TOYS[name]
    network = toy.network()
    inputs = toy.inputs(7)
    with watched(network) as work:
        taps = network.taps(inputs)
    assert all(not rows for module, rows in work.rows.items() if module.startswith("heads."))
    assert all(not tap.requires_grad for tap in taps)
    torch.testing.assert_close(network.read(network.gather(taps)), network(inputs).logits)
    torch.testing.assert_close(network.read(network.gather(taps[:2])), network(inputs).logits[:, :2])


# ---- memory ----


def test_memory_is_read_at_the_begin_and_left_at_the_end():
    network = TOYS["memory"].network()
    inputs = TOYS["memory"].inputs(7)
    state = network.begin(inputs, {"past": torch.ones(7, 4)})
    assert state.memory["past"].sum() == 28
    fresh, used = network(inputs), network(inputs, memory={"past": torch.ones(7, 4)})
    assert (fresh.answers - used.answers).abs().max() > 1e-3
    assert staged().remember(replace(state, memory=5)) == 5


# ---- what a wrong network is told ----


def unit() -> ModuleUnit:
    return ModuleUnit(nn.Linear(3, 3))


def head() -> ModuleHead:
    return ModuleHead(nn.Linear(3, 2))


def test_an_exit_that_names_no_unit_is_refused():
    with pytest.raises(ValueError, match=r"`exits` and `gates` must name units, got 'b'. Units: a."):
        StagedNetwork({"a": unit()}, {"a": head(), "b": head()}, 2)
    with pytest.raises(ValueError, match="`exits` and `gates` must name units, got 'c'"):
        StagedNetwork({"a": unit()}, {"a": head()}, 2, gates={"c": SkipGate()})


def test_a_network_without_its_own_head_is_refused():
    with pytest.raises(ValueError, match=r"`exits` must have the last unit 'b', got \['a'\]. Add its head."):
        StagedNetwork({"a": unit(), "b": unit()}, {"a": head()}, 2)


def test_the_first_head_has_no_logits_to_read():
    reading = LinearHead((3,), 2, HeadConfig(kind="linear"), True)
    with pytest.raises(ValueError, match="`exits` must start with a head that reads no logits, got 'a'"):
        StagedNetwork({"a": unit(), "b": unit()}, {"a": reading, "b": head()}, 2)


def test_exits_come_in_the_order_of_the_units():
    network = StagedNetwork({"a": unit(), "b": unit()}, {"b": head(), "a": head()}, 2)
    assert network.exit_names == ("a", "b")
    assert network.exits == 2
    assert network.head(0) is network.heads["a"]

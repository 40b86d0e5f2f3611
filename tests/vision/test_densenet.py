"""DenseNet-BC: published sizes, and what a row that skips a layer repeats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from rlexit.config import GateConfig
from rlexit.costs import parameters
from rlexit.exit_policy import ExitPolicy
from rlexit.gates import Decision
from rlexit.runtime import run
from rlexit.state import ExitState
from vision.config import BackboneConfig
from vision.network import Classifier, Gating, classifier, weights

SMALL = BackboneConfig("densenet", depth=16, width=0.25)
GROWTH = 3
UNITS = [f"block{block}_{index}" for block in (1, 2, 3) for index in (0, 1)]


@pytest.fixture
def network() -> Classifier:
    torch.manual_seed(0)
    return classifier(SMALL, 5, 8).eval()


def images(rows: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (rows, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def before(network: Classifier, name: str, rows: int = 4) -> ExitState:
    """The state before a unit, everything before it run."""
    state = network.begin(images(rows))
    while network.unit_names[state.unit] != name:
        state = network.advance(state)
    return state


def deciding(*actions: int) -> Decision:
    action = torch.tensor(actions)
    return Decision(action, action.float(), torch.zeros(len(actions)), torch.zeros(len(actions)))


def test_densenet_bc_100_has_the_published_number_of_parameters():
    assert parameters(classifier(BackboneConfig("densenet"), 10, 32)) == 769_162


def test_its_tensors_have_the_names_of_plain_files():
    names = set(weights(classifier(SMALL, 5, 8)))
    assert {"conv1.weight", "block1.layer.0.bn1.weight", "block3.layer.1.conv2.weight", "trans2.conv1.weight"} < names
    assert {"bn1.running_mean", "fc.weight", "fc.bias"} < names
    assert not [name for name in names if "module" in name]


@torch.no_grad()
def test_a_skipped_layer_repeats_what_the_layer_before_added(network):
    state = before(network, "block1_1")
    after = network.advance(state, deciding(0, 1, 0, 1)).features.map
    full = network.advance(state).features.map
    assert torch.equal(after[:, :-GROWTH], state.features.map)
    for row in (0, 2):
        assert torch.equal(after[row, -GROWTH:], state.features.map[row, -GROWTH:])
    for row in (1, 3):
        torch.testing.assert_close(after[row], full[row])


@torch.no_grad()
def test_a_layer_skipped_twice_in_a_row_repeats_the_newest_that_was_computed():
    network = classifier(BackboneConfig("densenet", depth=22, width=0.25), 5, 8).eval()
    state = before(network, "block1_1", 1)
    computed = state.features.map[:, -GROWTH:]
    for _ in range(2):
        state = network.advance(state, deciding(0))
    assert torch.equal(state.features.map[:, -2 * GROWTH :], torch.cat([computed, computed], dim=1))


@torch.no_grad()
def test_after_a_transition_the_pooled_channels_of_the_block_before_are_repeated(network):
    state = before(network, "transition1", 1)
    newest = state.features.map[:, -GROWTH:]
    state = network.advance(state)
    after = network.advance(state, deciding(0)).features
    assert torch.equal(after.map[:, -GROWTH:], functional.avg_pool2d(newest, 2))
    assert torch.equal(after.previous, functional.avg_pool2d(newest, 2))
    assert torch.equal(after.map[:, :-GROWTH], state.features.map)


@torch.no_grad()
def test_skipping_every_layer_that_can_be_skipped_still_answers_and_costs_next_to_nothing(network):
    state = network.begin(images())
    while not network.finished(state):
        name = network.unit_names[state.unit]
        gated = name in UNITS[1:]
        state = network.advance(state, deciding(0, 0, 0, 0) if gated else None)
        if network.at_exit(state):
            state = network.answer(state)
    full = network.begin(images())
    while not network.finished(full):
        full = network.advance(full)
        full = network.answer(full) if network.at_exit(full) else full
    assert bool(state.answered.isfinite().all())
    assert state.macs[0] < 0.6 * full.macs[0]


def test_the_first_layer_has_nothing_to_repeat_and_says_so(network):
    state = before(network, "block1_0")
    assert not network.units["block1_0"].skippable
    with pytest.raises(ValueError, match="`gates` must leave out the first dense layer"):
        network.advance(state, deciding(0, 1, 1, 1))


@torch.no_grad()
def test_channels_that_a_row_skips_are_the_layer_s_before_and_are_not_computed(network):
    state = before(network, "block2_1")
    unit: Any = network.units["block2_1"]
    unit.decide_channels()
    keep = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    decision = replace(deciding(1, 1, 1, 0), channels=keep)
    gathered = network.advance(state, decision)
    whole, previous = network.advance(state).features.previous, state.features.previous
    ran = keep * torch.tensor([[1.0], [1.0], [1.0], [0.0]])
    mask = ran[:, :, None, None]
    torch.testing.assert_close(gathered.features.previous, mask * whole + (1 - mask) * previous, rtol=0, atol=1e-5)
    torch.testing.assert_close(gathered.features.map[:, -GROWTH:], gathered.features.previous)
    with torch.enable_grad():
        dense = network.advance(state, decision, dense=True)
    torch.testing.assert_close(dense.features.map, gathered.features.map, rtol=0, atol=1e-5)
    spent = gathered.macs - state.macs
    one, all_of_it = 12 * 16 * state.features.map.shape[1], int(network.advance(state).macs[0] - state.macs[0])
    each = (all_of_it - one) // GROWTH
    assert spent.tolist() == [one + 2 * each, 0, all_of_it, 0]
    assert unit.expected_macs(state.features, decision).tolist() == spent.tolist()


def test_the_light_gate_learns_on_densenet_s_channels():
    gating = Gating(GateConfig(kind="mgl2s", channel="dense_channel", bias=0.0), channels="inner")
    network = classifier(SMALL, 5, 8, gating=gating)
    assert list(network.gates) == UNITS[1:]
    trace = network(images(8))
    (trace.expected_macs.mean() / 1e5 + trace.logits.square().mean()).backward()
    gate: Any = network.gates["block2_0"]
    assert gate.channel.module[-1][-1].bias.grad.abs().sum() > 0
    network.eval()
    with torch.no_grad():
        answers = network(images()).answers[:, -1]
    torch.testing.assert_close(run(network, ExitPolicy.full(1), images()).answers, answers, rtol=0, atol=1e-4)

"""What skipping costs and saves, by the published counts: BlockDrop's and SkipNet's conventions against true MACs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rlexit.config import GateConfig, HeadConfig
from rlexit.costs import cost_table
from rlexit.gatelearning import legacy_cp
from rlexit.gates import Site, build_gates
from rlexit.network import StagedNetwork
from vision.config import BackboneConfig, NetworkConfig
from vision.network import Gating, classifier

RESNET_10_AT_112 = 0.236e9  # BlockDrop's policy net for ImageNet


def images(side: int = 32) -> torch.Tensor:
    return torch.zeros((1, 3, side, side), dtype=torch.uint8)


def gated(config: BackboneConfig, kind: str, channels: str = "none", **settings: str) -> StagedNetwork:
    gates = replace(GateConfig(kind=kind), **settings)  # type: ignore[arg-type]
    return classifier(config, 10, 32, gating=Gating(gates, channels=channels)).eval()


def gate_macs(network: StagedNetwork) -> int:
    table = cost_table(network, images())
    return table.exits[-1] - table.full


def test_blockdrop_s_published_operations_are_reproduced_by_counting():
    network = gated(BackboneConfig(depth=110, shortcut="A"), "policy_net")
    table = cost_table(network, images())
    assert len(network.gates) == 1 + 54  # the policy net before the stem, and a decision per block
    blocks = {name: macs for name, macs in table.units.items() if name.startswith("layer")}
    regular = blocks.pop("layer1_0")
    transitions = blocks["layer2_0"] + blocks["layer3_0"]
    rest = table.full - 52 * regular - transitions
    # 16.933 of 54 blocks, both transitions on, policy net included, two operations per multiply-add.
    macs = rest + transitions + (16.933 - 2) * regular + gate_macs(network)
    assert round(2 * macs / 1e8, 3) == 1.805


def test_blockdrop_s_published_operations_on_imagenet_are_reproduced_by_counting():
    table = cost_table(classifier(BackboneConfig("resnet50", 101), 1000, 224).eval(), images(224))
    regular = (256 * 64 + 9 * 64 * 64 + 64 * 256) * 56 * 56
    assert sum(macs == regular for macs in table.units.values()) == 29
    assert round(2 * (table.full - 8.23 * regular + RESNET_10_AT_112) / 1e10, 3) == 1.248


@pytest.mark.parametrize(("depth", "relative"), [(38, 1.128), (74, 1.127), (110, 1.126)])
def test_a_convolution_per_block_that_chooses_channels_costs_an_eighth_of_the_network(depth, relative):
    config = BackboneConfig(depth=depth, shortcut="A")
    network = gated(config, "conv_channel", "block_out")
    # The published figure has a gate before the first block as well; here that one always runs.
    first = 4_718_592 / 8 + 16 * 16
    full = cost_table(network, images()).full
    assert (full + gate_macs(network) + first) / full == pytest.approx(relative, abs=0.0011)


def test_layer_gates_cost_next_to_nothing():
    network = gated(BackboneConfig(depth=110, shortcut="A"), "lstm")
    assert len(network.gates) == 3 * 18 - 1
    assert gate_macs(network) == 18 * 970 + 18 * 1130 + 17 * 1450


def test_skipnet_s_percentage_counts_blocks_alike_and_differs_from_true_macs():
    network = gated(BackboneConfig(depth=38, shortcut="A"), "lstm")
    table = cost_table(network, images())
    for open_unit in ("layer1_1", "layer2_0"):
        legacy = legacy_cp([float(name == open_unit) for name in network.gates])
        macs = table.full - sum(table.units[name] for name in network.gates if name != open_unit)
        macs += gate_macs(network)
        assert legacy == pytest.approx(2 / 18)
        # Stem, head and gates, and a transition that is cheaper than other blocks, make the difference.
        expected = {"layer1_1": 0.1195, "layer2_0": 0.1053}[open_unit]
        assert macs / table.full == pytest.approx(expected, abs=1e-3)
    assert legacy_cp([1.0] * 17) == 1.0
    assert legacy_cp([]) == 1.0


def test_ddi_s_branches_cost_less_than_a_twentieth_of_the_backbone_each():
    taps = tuple(f"layer{group}_{index}" for group in (1, 2, 3) for index in (1, 6))
    config = BackboneConfig(depth=56, shortcut="A")
    network = classifier(config, 10, 32, network=NetworkConfig(taps=taps), head=HeadConfig(kind="branch")).eval()
    table = cost_table(network, images())
    heads = [table.heads[name] for name in taps]
    # Two poolings in the first group, one in the second, none in the third: each ends on 8 x 8 with 64 channels.
    convolutions = [9 * 16 * 32 * 16 * 16 + 9 * 32 * 64 * 64, 9 * 32 * 64 * 64, 9 * 64 * 64 * 64]
    assert heads == [macs + 640 for macs in convolutions for _ in range(2)]
    assert max(heads) < 0.05 * table.full


@torch.no_grad()
def test_densenet_s_light_gate_costs_an_eighth_of_its_layers_and_the_convolution_four_networks():
    network = classifier(BackboneConfig("densenet", 100), 10, 32).eval()
    full = cost_table(network, images()).full
    spent = dict.fromkeys(("dense_channel", "conv_channel"), 0)
    state = network.begin(images())
    while not network.finished(state):
        name = network.unit_names[state.unit]
        unit: Any = network.units[name]
        if name.startswith("block"):
            seen = replace(state, features=unit.glance(state.features))
            for kind in spent:
                site = Site(name, seen.features.shape[1], 12)
                gate = build_gates([site], GateConfig(kind=kind))[name]
                spent[kind] += int(gate.macs(seen))
        state = network.advance(state)
        state = network.answer(state) if network.at_exit(state) else state
    assert spent["dense_channel"] / full == pytest.approx(0.1093, abs=2e-4)
    assert spent["conv_channel"] / full == pytest.approx(3.89, abs=0.01)

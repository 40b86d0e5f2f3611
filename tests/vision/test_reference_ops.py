"""The official profiler's count beside MACs: published figures of base networks and exits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlexit.config import HeadConfig
from rlexit.costs import cost_table
from vision.config import BackboneConfig, NetworkConfig
from vision.network import classifier
from vision.reference_ops import operations, reference_ops

HEAD = HeadConfig(layer_norm=False, stride=1, padding=1, upsample=False)
IMAGE = torch.zeros((1, 3, 32, 32), dtype=torch.uint8)
BASES = {  # methods/ztw.md 3.3: GOps of the base, first and last exit in % of it, cascade included
    "mobilenet": (BackboneConfig("mobilenet"), 0.7504, 13.3, 231.0),
    "resnet_cifar": (BackboneConfig("resnet_cifar", depth=56), 0.2526, 6.0, 150.7),
}


@pytest.mark.parametrize("name", BASES)
def test_published_counts_of_the_official_profiler(name):
    backbone, giga, first, last = BASES[name]
    network = classifier(backbone, 10, 32, network=NetworkConfig(), head=HEAD, cascade=True).eval()
    found = reference_ops(network, IMAGE)
    assert found.full / 1e9 == pytest.approx(giga, rel=5e-3)
    assert 100 * found.exits[0] / found.full == pytest.approx(first, abs=0.3)
    assert 100 * found.exits[-1] / found.full == pytest.approx(last, rel=5e-3)


def test_mobilenet_s_first_exit_costs_an_eighth_by_one_count_and_nearly_all_by_the_other():
    network = classifier(BASES["mobilenet"][0], 10, 32, network=NetworkConfig(), head=HEAD, cascade=True).eval()
    true = cost_table(network, IMAGE)
    assert true.full == pytest.approx(46.35e6, rel=1e-3)
    assert 100 * true.exits[0] / true.full == pytest.approx(88.1, abs=0.5)
    found = reference_ops(network, IMAGE)
    assert 100 * found.exits[0] / found.full < 14


def test_groups_are_counted_once_too_often():
    rows = torch.zeros(1, 8, 4, 4)
    deep = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    assert operations(deep, deep(rows), rows) == 8 * 16 * (2 * 9 - 1) * 8
    plain = nn.Conv2d(8, 8, 1)
    assert operations(plain, plain(rows), rows) == 8 * 16 * 16
    dense = nn.Linear(5, 3)
    assert operations(dense, dense(torch.zeros(1, 5)), torch.zeros(1, 5)) == 27
    assert operations(nn.Identity(), rows, rows) == 0


def test_counting_leaves_no_hook_behind():
    network = classifier(BackboneConfig(depth=8), 4, 8, network=NetworkConfig(), head=HEAD).eval()
    small = torch.zeros((1, 3, 8, 8), dtype=torch.uint8)
    assert reference_ops(network, small) == reference_ops(network, small)
    assert not any(part._forward_hooks for part in network.modules())

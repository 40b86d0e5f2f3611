"""Walks: what is held open runs as the plain network does."""

from __future__ import annotations

import pytest
import torch

from rlexit.config import GateConfig
from rlexit.walks import walk
from tests.rlexit.toys import TOYS, residual


@pytest.mark.parametrize("kind", ["lstm", "conv_channel", "mgl2s"])
def test_gates_that_are_held_open_run_the_unit_with_all_its_channels(kind):
    torch.manual_seed(0)
    network = residual("none" if kind == "lstm" else "both", GateConfig(kind, bias=-4.0)).eval()
    inputs = TOYS["skips"].inputs(4)
    free, held = walk(network, inputs, "greedy"), walk(network, inputs, "greedy", forced=len(network.gates))
    network.set_gates({})
    plain = network(inputs).logits[:, -1].log_softmax(dim=-1)
    torch.testing.assert_close(held.answers, plain)
    assert not torch.allclose(free.answers, plain)
    assert held.log_probs.abs().max() == 0
    assert bool((held.macs > free.macs).all())

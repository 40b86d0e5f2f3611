"""Refinement along paths: what its losses are made of, and what greedy decisions are settled on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlexit.config import GateConfig
from rlexit.costs import cost_table
from rlexit.domain import Watch
from rlexit.objectives import kl_divergence
from rlexit.refine import PathRefiner
from rlexit.refine_config import RefineConfig
from rlexit.walks import walk
from tests.rlexit.toys import MAP, OUTPUTS, residual, scatter

INPUTS = torch.randn(24, *MAP, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(24) % OUTPUTS
CONFIG = RefineConfig(steps=24, trunk="trained", epochs=1, target_macs=0.0, price=0.0, entropy=0.0, paths=2)


def never(act: Any, first: int) -> Iterator[int]:
    raise LookupError("the stream was asked")


def refiner(folder: Any, config: RefineConfig, algo: str, settled_on: Any = None, bias: float = 0.3) -> PathRefiner:
    torch.manual_seed(4)
    network, original = residual("none", GateConfig("lstm", bias=bias)).eval(), residual().eval()
    scatter(network)
    full = cost_table(network, INPUTS).full
    return PathRefiner(network, original, never, config, algo, full, 0, settled_on, folder, 0, Watch())


def loss_of(made: PathRefiner) -> float:
    return made.learn(INPUTS, LABELS)[1]["loss"]


def test_the_anchor_is_softened_by_four_and_as_strong_as_at_one(tmp_path):
    made = refiner(tmp_path, CONFIG, "ppo")
    for gate in made.network.gates.values():
        gate.shift(200.0)  # drawn paths are the greedy one
    answers = walk(made.network, INPUTS, "greedy").answers
    wanted = made.original(INPUTS).logits[:, -1]
    softened = [(one / 4).log_softmax(dim=-1) for one in (wanted, answers)]
    divergence = 16 * float(kl_divergence(softened[0], softened[1][:, None]).mean().detach())
    without = loss_of(made)
    made = refiner(tmp_path, replace(CONFIG, anchor=0.5), "ppo")
    for gate in made.network.gates.values():
        gate.shift(200.0)
    assert divergence > 0.01
    assert loss_of(made) - without == pytest.approx(0.5 * divergence, rel=1e-3)


def test_the_entropies_of_a_curriculum_are_summed_over_its_gates(tmp_path):
    config = replace(CONFIG, trunk="frozen")
    made = refiner(tmp_path, config, "blockdrop")
    made.samples = made.plan.steps  # every gate is reached
    entropies = walk(made.network, INPUTS, "sample", None, torch.Generator().manual_seed(0)).entropies
    without = loss_of(made)
    made = refiner(tmp_path, replace(config, entropy=0.1), "blockdrop")
    made.samples = made.plan.steps
    assert loss_of(made) - without == pytest.approx(-0.1 * float(entropies.detach().sum(dim=1).mean()), rel=1e-3)


def test_greedy_decisions_are_settled_on_the_rows_that_are_given_and_on_no_others(tmp_path):
    config = replace(CONFIG, target_macs=0.75, price=1.0)
    made = refiner(tmp_path, config, "ppo", INPUTS)
    before = float(walk(made.network, INPUTS, "greedy").macs.double().mean()) / made.plan.full
    told = made.settle()
    spent = float(walk(made.network, INPUTS, "greedy").macs.double().mean()) / made.plan.full
    assert told["refine/cost_settled"] == pytest.approx(spent)
    assert spent <= 0.75
    assert abs(spent - before) > 0.01


def test_a_target_needs_rows_to_settle_on(tmp_path):
    with pytest.raises(ValueError, match="`settled_on` must be given with `refine.target_macs`, got None"):
        refiner(tmp_path, replace(CONFIG, target_macs=0.5, price=1.0), "ppo")

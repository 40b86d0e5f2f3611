"""The gates of an actor whose decisions are refined: where to leave, which units to skip, when to repeat an answer."""

from __future__ import annotations

import torch
from torch import Tensor

from rlexit.config import GateConfig
from rlexit.gates import Gate, Site, build_gates
from rlexit.gates.leave import LeaveGate
from rlexit.gates.reuse import ReuseGate
from rlexit.network import StagedNetwork
from rlexit.refine_config import RefineConfig
from rlexit.units import Unit

# Positions per side of the pooled maps that leave gates see, and units of their hidden layers: 0.2 % of NatureCNN.
POOL = 4
HIDDEN = 32


def add_decisions(network: StagedNetwork, example: Tensor, config: RefineConfig) -> StagedNetwork:
    """Puts fresh gates on an actor, for the decisions that the config names.

    Args:
        network: without gates; changed in place.
        example: (1, 4, 84, 84) an input; only its shape is read.
        config: which decisions, and how long an answer may be repeated.
    Raises:
        ValueError: units are to be skipped, and none has a skip path, or exits are to be decided and there is no early one.
    """
    if "exits" in config.decisions:
        shapes = [tuple(features.shape[1:]) for features in network.taps(torch.zeros_like(example))]
        early = dict(zip(network.exit_names[:-1], shapes, strict=False))
        if not early:
            raise ValueError("`network.taps` must name a unit to decide exits at, got none. Add an early exit.")
        # Even odds at first: cloning sees both ways of every row, whatever the draw.
        network.set_leave_gates({name: LeaveGate.pooled(shape, POOL, HIDDEN, 0.0) for name, shape in early.items()})
    if "units" in config.decisions:
        network.set_gates(unit_gates(network, example))
    if "reuse" in config.decisions:
        network.reuse = ReuseGate(network.outputs, config.max_reuse)
    return network


def unit_gates(network: StagedNetwork, example: Tensor) -> dict[str, Gate]:
    """Layer gates, one LSTM shared over depth, before every unit with a skip path.

    Raises:
        ValueError: no unit has one.
    """
    sites: list[Site] = []
    state = network.begin(torch.zeros_like(example))
    while not network.finished(state):
        name = network.unit_names[state.unit]
        unit: Unit = network.units[name]  # type: ignore[assignment]
        if unit.skippable:
            sites.append(Site(name, unit.glance(state.features).shape[1]))
        state = network.advance(state)
    if not sites:
        raise ValueError(
            "`refine.decisions` must not name `units` on a backbone without skip paths, got units "
            f"{', '.join(network.unit_names)}. Decide exits and reuse, or say `network.backbone: impala`."
        )
    return build_gates(sites, GateConfig(bias=1.0))

"""Classifiers with gates: how a method's gates are built, and what they and the trunk learn from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from rlexit.config import Method
from rlexit.costs import cost_table
from rlexit.domain import Batches, Watch
from rlexit.energy import energy_table
from rlexit.exit_policy import ExitPolicy
from rlexit.gating import GateTrainer
from rlexit.network import StagedNetwork
from rlexit.refine import SETTLED_ON, PathRefiner
from vision.config import VisionConfig
from vision.network import Gating

# Kinds of gates that decide about channels.
OF_CHANNELS = ("mgl2s", "conv_channel", "dense_channel", "pooled_channel")


class Classifiers(Protocol):
    """What of the domain is needed here."""

    config: VisionConfig
    device: str

    def network(self, teacher: Path, method: Method) -> StagedNetwork:
        """The frozen classifier with a method's parts."""
        ...

    def example(self) -> Tensor:
        """An input; only its shape and dtype are read."""
        ...

    def batches(self, seed: int) -> Batches:
        """Labelled training images."""
        ...

    def rows(self, network: StagedNetwork, policy: ExitPolicy, count: int, watch: Watch) -> Tensor:
        """Held-out images as they are."""
        ...


def gating_of(config: VisionConfig, method: Method) -> Gating | None:
    """The gates of a method; None if it has none."""
    if not method.gates:
        return None
    channels = config.network.channels if method.gates in OF_CHANNELS else "none"
    return Gating(replace(config.gates, kind=method.gates), config.network.gated, channels)


def learn_gates(
    domain: Classifiers, network: StagedNetwork, teacher: Path, method: Method, folder: Path, seed: int, watch: Watch
) -> dict[str, float]:
    """Trains gates and trunk from the teacher's weights; a policy net alone, by BlockDrop's curriculum.

    Args:
        domain: with its config.
        network: fresh gates on the teacher's weights; trained in place.
        teacher: folder of the original.
        method: whose gates they are.
        folder: for checkpoints and curves.
        seed: of images and draws.
        watch: stop and progress.
    Source: Wang et al. 2020 (DDI), arXiv 1907.04523; Wang et al. 2018 (SkipNet), arXiv 1711.09485, section 3.3.
    """
    config, full = domain.config.gating, cost_table(network.eval(), domain.example()).full
    batches = domain.batches(seed)
    if method.algo:
        # Penalty and weight of the entropies are those of blockdrop's cl_training.py; neither is for the stage after it.
        curriculum = replace(
            domain.config.refine, trunk="frozen", steps=config.steps, penalty=1.0, entropy=0.1, target_macs=0.0
        )
        return PathRefiner(network, None, batches, curriculum, method.algo, full, 0, None, folder, seed, watch).run()
    if not method.priced:
        config = replace(config, cost="linear", price=0.0)
    original = domain.network(teacher, Method()) if config.hint or config.distillation else None
    energy = energy_table(network, domain.example()) if config.resource == "energy" else None
    estimator = domain.config.gates.estimator
    return GateTrainer(network, original, batches, config, full, energy, estimator, folder, seed, watch).run()


def refine(
    domain: Classifiers, network: StagedNetwork, teacher: Path, method: Method, folder: Path, seed: int, watch: Watch
) -> dict[str, float]:
    """Refines gates, and the trunk along them if the config says so, by reinforcement learning; as `learn_gates`.

    Greedy decisions are settled on images of the calibration split: training shows varied ones, and use does not.
    """
    config, full = domain.config.refine, cost_table(network.eval(), domain.example()).full
    original = domain.network(teacher, Method()) if config.anchor else None
    algo, recalibrate = method.algo or config.algo, domain.config.gating.recalibrate
    batches, plain = domain.batches(seed), domain.rows(network, ExitPolicy.full(network.exits), SETTLED_ON, watch)
    return PathRefiner(network, original, batches, config, algo, full, recalibrate, plain, folder, seed, watch).run()

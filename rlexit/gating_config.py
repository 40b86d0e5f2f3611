"""Settings of learning where gates stand: labels, a price on compute, and what may change. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rlexit.config import later, require

COSTS = ("linear", "sign_target", "deadband", "dual")


@dataclass(frozen=True)
class GatingConfig:
    """How gates learn together with the network that they stand in.

    Args:
        steps: samples seen, each in one update; the warm-up is not counted.
        warm_up: samples on which the gates alone first learn to be open, everything else frozen; 0 leaves it out, for gates
            that start open by their bias.
        explore: share of the steps, the first, in which rows skip units by chance, ever more until `target_macs` is the
            share of units that are run, and no gate learns: the trunk comes to bear any path, and what a unit is worth then
            shows without training. With a target only (not where `cost` is linear), and for gates with logits of their own.
        rank: samples on which units are taken away one by one, the one missed least first, after `explore`; gates that skip
            units then start in that order, around the target (`rlexit.ranking`). 0 leaves it out, and gates start alike.
            With a target only, as `explore`.
        cost: how compute enters the loss: `linear` (price times compute), or towards `target_macs`: `dual` (the price
            rises above the target and falls below), `sign_target` (its sign flips there), `deadband` (0 around it).
        resource: what compute is counted in: `macs`, or `energy` by a three-level memory model whose constants are told.
        price: lambda, nats per full network; where a target is given, its first value.
        target_macs: mean compute of going to the end, gates included, relative to the full network; in `resource`.
        dual_rate: step of the price per update and per relative MACs above the target.
        price_max: the dual price stays in 0..price_max.
        anneal: share of the steps in which the target falls from 1 to its value; ranked gates start at it.
        learning_rate: of SGD with momentum, for the trunk and its own head.
        fresh_learning_rate: of Adam, for gates and added heads.
        input_from: share of the steps after which gates learn what rows differ in; before, only what all rows have in common
            (`Gate.offsets`), on paths that the trunk learns at once.
        peek: a unit that all rows of a batch skip is computed, so that its gate learns what it would be worth, in one update
            of so many; 1 for always.
        momentum: of SGD.
        weight_decay: L2 of the trunk.
        warmup: share of the steps in which the rates rise from nothing; they fall by a cosine.
        exits_from: share of the steps after which added exits learn too (joint loss); before, gates and trunk alone.
        hint: weight of each relative squared distance of features from the full original's: of the last at every size
            of map, and of what the last exit reads.
        distillation: weight of T^2 KL(full original || answer) beside the cross-entropy.
        temperature: T.
        batch_norm: `frozen` (the trunk keeps its statistics) or `train`.
        recalibrate: samples on which the trunk's statistics are taken anew at the end, with the gates' greedy decisions.
        precision: `bf16` or `fp32`, of convolutions and dense layers.
        collapse_after: updates in a row with all gates shut, or all open, before it is told as a collapse.
        checkpoint_buffers: collected buffers between checkpoints.
    """

    steps: int = 100_000
    warm_up: int = 0
    explore: float = 0.0
    rank: int = 0
    cost: str = "dual"
    resource: str = "macs"
    price: float = 0.0
    target_macs: float = 0.5
    dual_rate: float = 0.02
    price_max: float = 20.0
    anneal: float = 0.4
    learning_rate: float = 0.01
    fresh_learning_rate: float = 0.001
    input_from: float = 0.0
    peek: int = field(default=1, metadata=later(1))
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: float = 0.05
    exits_from: float = 0.5
    hint: float = 0.0
    distillation: float = 0.0
    temperature: float = 4.0
    batch_norm: str = "frozen"
    recalibrate: int = 0
    precision: str = "bf16"
    collapse_after: int = 100
    checkpoint_buffers: int = 25

    def __post_init__(self) -> None:
        for name in ("steps", "peek", "collapse_after", "checkpoint_buffers"):
            require(getattr(self, name) >= 1, f"gating.{name}", "be at least 1", getattr(self, name))
        require(self.cost in COSTS, "gating.cost", f"be one of {', '.join(COSTS)}", self.cost)
        require(self.resource in ("macs", "energy"), "gating.resource", "be macs or energy", self.resource)
        advice = "A negative price pays for compute."
        require(0 <= self.price < math.inf, "gating.price", "be at least 0", self.price, advice)
        for name in (
            "warm_up",
            "rank",
            "dual_rate",
            "price_max",
            "weight_decay",
            "hint",
            "distillation",
            "recalibrate",
        ):
            require(0 <= getattr(self, name) < math.inf, f"gating.{name}", "be at least 0", getattr(self, name))
        for name in ("target_macs", "learning_rate", "fresh_learning_rate", "temperature"):
            require(0 < getattr(self, name) < math.inf, f"gating.{name}", "be positive", getattr(self, name))
        for name in ("anneal", "momentum", "warmup", "input_from", "explore"):
            require(0 <= getattr(self, name) < 1, f"gating.{name}", "be in [0, 1)", getattr(self, name))
        require(0 <= self.exits_from <= 1, "gating.exits_from", "be in [0, 1]", self.exits_from)
        advice = "Units are ranked by multiply-adds."
        require(
            not self.rank or self.resource == "macs",
            "gating.rank",
            "be 0 with gating.resource energy",
            self.rank,
            advice,
        )
        require(self.batch_norm in ("frozen", "train"), "gating.batch_norm", "be frozen or train", self.batch_norm)
        require(self.precision in ("bf16", "fp32"), "gating.precision", "be bf16 or fp32", self.precision)

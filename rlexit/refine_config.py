"""Settings of refinement by reinforcement learning. Imports no torch, so that the command line answers at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rlexit.config import later, require

ALGOS = ("ppo", "skipnet", "blockdrop")
DECISIONS = ("exits", "units", "reuse")


@dataclass(frozen=True)
class RefineConfig:
    """How reinforcement learning refines decisions: task reward minus a price on compute.

    Args:
        algo: `ppo` (clipped ratios per gate), or `skipnet` and `blockdrop`, the originals' updates, for classifiers.
        decisions: what is decided: `exits` (leave or go on), `units` (skip a unit), `reuse` (the previous answer).
        steps: samples (env steps for policies) of reinforcement learning.
        clone_steps: before them, samples on which gates learn by cloning the full network, straight-through.
        clone_price: of the relative MACs while cloning, in nats.
        clone_entropy: weight of the gates' entropies while cloning; without it they become sure of small differences.
        price: lambda, reward per relative MACs; where a target is given, its first value.
        target_macs: mean compute relative to the full network that a dual variable holds; 0: the price is fixed.
        dual_rate: step of the dual variable, in price per relative MACs above the target and update; while cloning as much
            larger as that stage's price is.
        price_max: the dual variable stays in 0..price_max.
        learning_rate: of Adam, for heads and critics; for classifiers, for gates.
        gate_learning_rate: games only: of Adam, for gates.
        clone_learning_rate: of Adam, for gates while cloning.
        trunk: `frozen`, so that the full answer stays within reach, or `trained` along.
        trunk_learning_rate: classifiers only: of SGD, for a trained trunk.
        paths: classifiers only: drawn per image; each is compared with the others.
        start_entropy: `ppo` of classifiers only: mean entropy of the gates at which drawing begins, in nats; all logits are
            multiplied by one number for it. Straight-through gates need only a logit's sign and leave it near 0, where draws
            are no more than chance. 0 leaves them as they are.
        alpha: `skipnet` only: reward for skipping everything.
        penalty: `blockdrop` only: reward of a wrong answer, negated.
        n_envs: games side by side.
        n_steps: env steps per game and update.
        batch_size: of a minibatch.
        epochs: passes over each rollout.
        clip: of the probability ratios, each gate's and the action's.
        gamma: discount per env step; decisions within a step are not discounted.
        gae_lambda: of the advantages.
        entropy: weight of the actions' entropy; for classifiers, of the gates': their mean (`ppo`), or their sum
            (`blockdrop` with a frozen trunk).
        gate_entropy: games only: weight of the gates' entropies; they are to become sure.
        value: weight of the critics' losses.
        anchor: weight of KL(full network || gated) beside the policy losses; for classifiers softened by T = 4, times T^2.
        max_grad_norm: of one update.
        max_reuse: env steps in a row that may repeat an answer.
        collapse_after: updates in a row with a gate all shut or all open before it is told as a collapse.
        checkpoint_updates: updates between checkpoints.
    """

    algo: str = "ppo"
    decisions: tuple[str, ...] = ("exits", "reuse")
    steps: int = 500_000
    clone_steps: int = 50_000
    clone_price: float = 0.3
    clone_entropy: float = 0.15
    price: float = 0.02
    target_macs: float = 0.0
    dual_rate: float = 0.02
    price_max: float = 10.0
    learning_rate: float = 2.5e-4
    gate_learning_rate: float = 1e-3
    clone_learning_rate: float = 1e-3
    trunk: str = "frozen"
    trunk_learning_rate: float = 1e-4
    paths: int = 4
    start_entropy: float = field(default=0.1, metadata=later(0.0))
    alpha: float = 0.1
    penalty: float = 5.0
    n_envs: int = 8
    n_steps: int = 128
    batch_size: int = 256
    epochs: int = 4
    clip: float = 0.1
    gamma: float = 0.99
    gae_lambda: float = 0.95
    entropy: float = 0.01
    gate_entropy: float = 0.001
    value: float = 0.5
    anchor: float = 0.0
    max_grad_norm: float = 0.5
    max_reuse: int = 4
    collapse_after: int = 20
    checkpoint_updates: int = 20

    def __post_init__(self) -> None:
        require(self.algo in ALGOS, "refine.algo", f"be one of {', '.join(ALGOS)}", self.algo)
        require(
            bool(self.decisions), "refine.decisions", f"name at least one of {', '.join(DECISIONS)}", self.decisions
        )
        for name in self.decisions:
            require(name in DECISIONS, "refine.decisions", f"be of {', '.join(DECISIONS)}", name)
        counts = ("steps", "n_envs", "n_steps", "batch_size", "epochs", "max_reuse", "collapse_after")
        for name in (*counts, "checkpoint_updates"):
            require(getattr(self, name) >= 1, f"refine.{name}", "be at least 1", getattr(self, name))
        require(self.n_envs <= 1024, "refine.n_envs", "be at most 1024", self.n_envs)
        advice = "A negative price pays for compute."
        require(0 <= self.price < math.inf, "refine.price", "be at least 0", self.price, advice)
        require(2 <= self.paths <= 64, "refine.paths", "be in 2..64", self.paths)
        unsigned = (
            "clone_steps",
            "clone_price",
            "clone_entropy",
            "target_macs",
            "dual_rate",
            "price_max",
            "entropy",
            "gate_entropy",
        )
        for name in (*unsigned, "value", "anchor", "alpha", "penalty"):
            require(0 <= getattr(self, name) < math.inf, f"refine.{name}", "be at least 0", getattr(self, name))
        for name in (
            "learning_rate",
            "gate_learning_rate",
            "clone_learning_rate",
            "trunk_learning_rate",
            "clip",
            "max_grad_norm",
        ):
            require(0 < getattr(self, name) < math.inf, f"refine.{name}", "be positive", getattr(self, name))
        require(0 <= self.start_entropy <= 0.69, "refine.start_entropy", "be in [0, 0.69]", self.start_entropy)
        for name in ("gamma", "gae_lambda"):
            require(0 <= getattr(self, name) <= 1, f"refine.{name}", "be in [0, 1]", getattr(self, name))
        moves = self.price > 0 or not self.target_macs
        require(moves, "refine.price", "be positive where refine.target_macs stands", self.price, "It is what moves.")
        require(self.trunk in ("frozen", "trained"), "refine.trunk", "be frozen or trained", self.trunk)

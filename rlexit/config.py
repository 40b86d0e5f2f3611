"""Settings shared by all domains. Imports no torch, so that the command line answers at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlexit.methods import METHODS as METHODS
from rlexit.methods import Method as Method

REGIMES = ("disjoint", "mixed", "joint")
# How a hard decision lets a gradient through (`rlexit.gates.estimators`).
ESTIMATORS = ("gumbel_sigmoid", "reinforce", "soft", "ste_bernoulli", "ste_det")

# The modules of `rlexit.rules`, found without importing torch: a new rule is one new file.
RULES = tuple(sorted(path.stem for path in (Path(__file__).parent / "rules").glob("[a-z]*.py")))


# A setting with this mark changes where things lie or how fast they go, but no result, so a finished stage stays finished.
NEUTRAL = {"neutral": True}


def later(before: object) -> dict[str, object]:
    """Metadata of a setting that came later and at this value changes nothing: results made before it stay as good."""
    return {"before": before}


def require(condition: bool, name: str, rule: str, value: object, advice: str = "") -> None:
    """Raises ValueError "`name` must <rule>, got <value>. <advice>" unless the condition holds (NaN never does)."""
    if not condition:
        raise ValueError(f"`{name}` must {rule}, got {value!r}.{' ' + advice if advice else ''}")


@dataclass(frozen=True)
class HeadConfig:
    """How the head of an exit is built.

    Args:
        kind: registered head: `pooled_conv`, `linear` or `branch` (DDI's, of convolutions and poolings).
        layer_norm: in a cascade, normalise the logits of the exit before.
        stop_gradient: let no gradient flow from a head into the one before it.
        stride: of the head's 3x3 convolution; 0 leaves the convolution out.
        pool: side of the pooled map, in positions.
        upsample: pool to `pool` even where the map is smaller, as the reference does (repeated values).
        padding: of the convolution, in zeros around the map.
        channels: of the convolution, as a share of the map's; a light head has few.
    """

    kind: str = "pooled_conv"
    layer_norm: bool = True
    stop_gradient: bool = True
    stride: int = 4
    pool: int = 4
    upsample: bool = True
    padding: int = 0
    channels: float = 1.0

    def __post_init__(self) -> None:
        require(0 <= self.stride <= 64, "head.stride", "be in 0..64", self.stride, "0 leaves the convolution out.")
        require(1 <= self.pool <= 64, "head.pool", "be in 1..64", self.pool)
        require(self.padding in (0, 1), "head.padding", "be 0 or 1", self.padding)
        require(0 < self.channels <= 4, "head.channels", "be in (0, 4]", self.channels)


@dataclass(frozen=True)
class GateConfig:
    """How the gates before a network's units are built.

    Args:
        kind: registered gates: `lstm`, `ff1`, `ff2` skip units; `conv_channel`, `dense_channel`, `pooled_channel` skip
            channels; `mgl2s` both; `policy_net` sees the input once; `random` and `static` are controls.
        estimator: how a hard decision lets a gradient through in training.
        bias: of the logits at first; 3 runs a unit with p = 0.95.
        detach: let no gradient flow from a gate into the features that it sees.
        bound: draws with bound * p + (1 - bound) * (1 - p); 1 explores no further.
        layer: `mgl2s`: registered gates that skip units.
        channel: `mgl2s`: registered gates that skip channels.
        rates: `random`: share of rows that run each gated unit, or one share for all.
        channel_rate: `random`: share of channels kept, where units take channel decisions.
        seed: `random`: of the hash that turns an input into draws.
    """

    kind: str = "lstm"
    estimator: str = "ste_det"
    bias: float = 3.0
    detach: bool = True
    bound: float = 1.0
    layer: str = "lstm"
    channel: str = "conv_channel"
    rates: tuple[float, ...] = (0.5,)
    channel_rate: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        known = ", ".join(ESTIMATORS)
        require(self.estimator in ESTIMATORS, "gates.estimator", f"be one of {known}", self.estimator)
        require(math.isfinite(self.bias), "gates.bias", "be finite", self.bias)
        require(0.5 < self.bound <= 1, "gates.bound", "be in (0.5, 1]", self.bound)
        require(bool(self.rates), "gates.rates", "have at least one", self.rates)
        for rate in (*self.rates, self.channel_rate):
            require(0 <= rate <= 1, "gates.rates", "be shares in [0, 1]", rate)


@dataclass(frozen=True)
class DistillConfig:
    """How early exits learn from the frozen teacher.

    The defaults depart from the paper's code, which collects from 8 games, learns in fp32 in minibatches of 64 (128 for the
    ensembles, for which it collects another million samples) at a rate that starts at 0.01 and falls in steps; the preset
    `reference` is nearer to it and much slower.

    Args:
        steps: samples collected to train the heads (env steps for policies).
        ensemble_steps: further samples on which the ensembles are fitted.
        batch_size: of a minibatch.
        epochs: passes over each collected buffer.
        learning_rate: of Adam, at its highest.
        schedule: `cosine` (down to nothing) or `steps` (to a tenth and to a hundredth, at `decay_at`).
        warmup: share of the steps in which the rate rises from nothing. A head that starts at the full rate loses up to two
            thirds of its channels for good, because their ReLU never opens again.
        decay_at: `steps` only: shares of the steps after which the rate falls.
        label_weight: weight of the cross-entropy to the sample's label, or to the teacher's likeliest output where samples
            have none; the rest is KL(teacher || exit). Classifiers learn from labels alone: 1.
        weight_decay: L2 of whatever is trained but the ensembles.
        regime: `disjoint`: heads learn on the frozen teacher; `mixed`: the teacher's weights and the heads go on learning
            together; `joint`: the same from weights drawn afresh. Both of these learn from labels that the domain knows.
        backbone_share: `mixed` and `joint` only: of the learning rate that the backbone gets.
        reference: repeat the official code's deviations that change numbers: every environment is driven by the first
            one's action, the KL is divided by the number of outputs, ensembles are trained by Adam while acting.
        checkpoint_buffers: collected buffers between checkpoints. Games start afresh there, so that a resumed run is equal
            to an uninterrupted one; what lies further into a game than so many buffers is not seen.
        precision: of the convolutions and dense layers while training; weights, losses and everything else are fp32.
        frozen_precision: of the frozen backbone while training, and of the features that are kept of it.
        static_widths: `static` only: channel multipliers of the small networks; 0.54 costs what NatureCNN's first exit
            costs, 0.65 half of the full network.
        static_learning_rate: `static` only: in place of `learning_rate`, which is made for small heads.
    """

    steps: int = 1_000_000
    ensemble_steps: int = 40_000
    batch_size: int = 256
    epochs: int = 5
    learning_rate: float = 0.005
    schedule: str = "cosine"
    warmup: float = 0.05
    decay_at: tuple[float, float] = (0.1, 0.75)
    label_weight: float = 0.0
    weight_decay: float = 0.0
    regime: str = "disjoint"
    backbone_share: float = 0.1
    reference: bool = False
    checkpoint_buffers: int = 50
    precision: str = "bf16"
    frozen_precision: str = "fp32"
    static_widths: tuple[float, ...] = (0.54, 0.65)
    static_learning_rate: float = 0.001

    def __post_init__(self) -> None:
        for name in ("steps", "ensemble_steps", "batch_size", "epochs", "checkpoint_buffers"):
            require(getattr(self, name) >= 1, f"distill.{name}", "be at least 1", getattr(self, name))
        require(0 < self.learning_rate < 1, "distill.learning_rate", "be between 0 and 1", self.learning_rate)
        require(
            0 < self.static_learning_rate < 1, "distill.static_learning_rate", "be in (0, 1)", self.static_learning_rate
        )
        for name in ("precision", "frozen_precision"):
            require(getattr(self, name) in ("bf16", "fp32"), f"distill.{name}", "be bf16 or fp32", getattr(self, name))
        advice = "Heads cannot learn in fp32 from features in bf16."
        fits = self.frozen_precision == "fp32" or self.precision == "bf16"
        require(fits, "distill.frozen_precision", "be fp32 where distill.precision is", self.frozen_precision, advice)
        require(0 <= self.weight_decay < 1, "distill.weight_decay", "be in [0, 1)", self.weight_decay)
        require(self.regime in REGIMES, "distill.regime", f"be one of {', '.join(REGIMES)}", self.regime)
        require(0 < self.backbone_share <= 1, "distill.backbone_share", "be in (0, 1]", self.backbone_share)
        require(self.schedule in ("cosine", "steps"), "distill.schedule", "be cosine or steps", self.schedule)
        require(0 <= self.warmup < 1, "distill.warmup", "be in [0, 1)", self.warmup)
        first, second = self.decay_at
        require(0 <= first <= second <= 1, "distill.decay_at", "be two rising shares in [0, 1]", (first, second))
        require(0 <= self.label_weight <= 1, "distill.label_weight", "be in [0, 1]", self.label_weight)
        require(bool(self.static_widths), "distill.static_widths", "have at least one", self.static_widths)
        require(
            all(0 < width <= 1 for width in self.static_widths),
            "distill.static_widths",
            "be in (0, 1]",
            self.static_widths,
        )


@dataclass(frozen=True)
class CalibrateConfig:
    """How thresholds are chosen on calibration rows or episodes, which no test ever uses.

    Args:
        rule: who leaves: a registered rule, such as `confidence`, `entropy`, `margin` or `patience`.
        target_macs: mean compute relative to the full network; several make several exit policies.
        max_return_drop: largest loss of normalised return (accuracy for classifiers); several make several.
        episodes: certification episodes per candidate; for classifiers folds of the certification images.
        rounds: solve, roll out, solve again: so many times.
        candidates: operating points tried for a bounded return.
        confidence: with which a bounded return is certified.
    """

    rule: str = "confidence"
    target_macs: tuple[float, ...] = (0.5,)
    max_return_drop: tuple[float, ...] = (0.05,)
    episodes: int = 30
    rounds: int = 3
    candidates: int = 8
    confidence: float = 0.95

    def __post_init__(self) -> None:
        require(self.rule in RULES, "calibrate.rule", f"be one of {', '.join(RULES)}", self.rule)
        for value in self.target_macs:
            require(0 < value < math.inf, "calibrate.target_macs", "be positive", value)
        for value in self.max_return_drop:
            require(0 <= value < 1, "calibrate.max_return_drop", "be in [0, 1)", value)
        for name in ("episodes", "rounds", "candidates"):
            require(getattr(self, name) >= 1, f"calibrate.{name}", "be at least 1", getattr(self, name))
        require(0.5 <= self.confidence < 1, "calibrate.confidence", "be in [0.5, 1)", self.confidence)


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured on test episodes.

    Args:
        episodes: full games per operating point; for classifiers folds of the test set, each evaluated once.
        grid: operating points between the cheapest exit and the full network, evenly spaced in compute; 0 for none.
        rules: rules whose grids are measured; `patience` has one point per length.
        actions: `argmax` or `sampled`.
        execution: `real` (later units are not run) or `replay` (all exits at once).
        n_envs: games played side by side; for classifiers rows per batch.
        latency_rows: single decisions timed per operating point; 0 for none.
        latency_batches: rows of the larger batches that are timed too, on all threads.
        budgets: shares of the full network's MACs at which exits are compared on a labelled set.
        hard_budgets: labelled sets only: shares that no row may exceed; rows go on while they can afford it.
    """

    episodes: int = 30
    grid: int = 7
    rules: tuple[str, ...] = ("confidence", "patience")
    actions: str = "argmax"
    execution: str = "real"
    n_envs: int = 32
    latency_rows: int = 300
    latency_batches: tuple[int, ...] = ()
    budgets: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    hard_budgets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        require(self.episodes >= 1, "evaluate.episodes", "be at least 1", self.episodes)
        require(self.grid == 0 or self.grid >= 2, "evaluate.grid", "be 0 or at least 2", self.grid)
        for rule in self.rules:
            require(rule in RULES, "evaluate.rules", f"be of {', '.join(RULES)}", rule)
        require(self.actions in ("argmax", "sampled"), "evaluate.actions", "be argmax or sampled", self.actions)
        require(self.execution in ("real", "replay"), "evaluate.execution", "be real or replay", self.execution)
        require(1 <= self.n_envs <= 1024, "evaluate.n_envs", "be in 1..1024", self.n_envs)
        require(self.latency_rows >= 0, "evaluate.latency_rows", "be at least 0", self.latency_rows)
        for batch in self.latency_batches:
            require(2 <= batch <= 4096, "evaluate.latency_batches", "be in 2..4096", batch)
        for name in ("budgets", "hard_budgets"):
            for budget in getattr(self, name):
                require(0 < budget < math.inf, f"evaluate.{name}", "be positive", budget)
        real = not self.hard_budgets or self.execution == "real"
        require(real, "evaluate.execution", "be real where hard_budgets are measured", self.execution)


@dataclass(frozen=True, kw_only=True)
class CoreConfig:
    """The sections that every domain has.

    Args:
        domain: the package that knows the task.
        methods: what is distilled and compared, from `METHODS`.
        head: how early heads are built.
        gates: how gates before units are built, for methods that have them; their kind is the method's.
        distill: how heads learn.
        calibrate: how thresholds are chosen.
        evaluate: what is measured.
    """

    domain: str = ""
    methods: tuple[str, ...] = ("ztw", "sdn", "static")
    head: HeadConfig = field(default_factory=HeadConfig)
    gates: GateConfig = field(default_factory=GateConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def unusual(self) -> dict[str, Any]:
        """What a teacher depends on besides its own sections, where that is not the usual."""
        return {}

    def __post_init__(self) -> None:
        require(bool(self.methods), "methods", f"name at least one of {', '.join(METHODS)}", self.methods)
        for name in self.methods:
            require(name in METHODS, "methods", f"be of {', '.join(METHODS)}", name)

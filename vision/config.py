"""Settings of image classifiers: data, backbone and its training. Imports no torch, so that the command line answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from rlexit.config import NEUTRAL, CoreConfig, DistillConfig, EvaluateConfig, HeadConfig, later, require
from rlexit.gating_config import GatingConfig
from rlexit.refine_config import RefineConfig

# The modules of `vision.backbones`, found without importing torch: a new backbone is one new file.
BACKBONES = tuple(sorted(path.stem for path in (Path(__file__).parent / "backbones").glob("[a-z]*.py")))
KINDS = ("cifar10", "cifar100", "images", "toy")
RELABELS = ("", "cifar2")
BORDERS = ("black", "reflect")
CHANNELS = ("inner", "block_out", "both")
MAX_SIDE = 1024


@dataclass(frozen=True)
class DataConfig:
    """A data set, how it is split, and how training images are varied.

    Args:
        kind: `cifar10` or `cifar100` (their column names and normalisation), `images` (columns image and label: a folder
            of one folder per class in train/ and test/, or any data set of the hub's layout), or `toy` (generated).
        path: a folder, or a hub id such as `uoft-cs/cifar10`; not read for `toy`.
        side: of the square images, in pixels. 0: as they are, all alike. Otherwise larger or smaller ones are resized and
            cut around their middle.
        holdout: share of the training images that trains nothing and on which thresholds are chosen. 0 takes half of the
            test images for it, and only the other half is evaluated on: for given weights that saw all training images.
        half: which half of the test images episodes are from where `holdout` is 0; tables of budgets count both.
        long_tail: images of the most frequent class to images of the rarest, falling exponentially; 1 leaves all.
        relabel: `cifar2` makes CIFAR-10 two classes, animals and transport (with the horse, as in the paper's split).
        crop: training images are padded by so many pixels and cut at random; 0 for not.
        border: what pads them: `black`, or `reflect`, the image mirrored at its edge. Weights that learn for a few passes
            only should not see black borders on nearly every image, for the images to be classified have none.
        flip: mirror half of the training images.
        memory_gb: what the decoded images of a split may take. Training images that would take more stay as they are stored
            and are decoded batch by batch; of held-out and test images more are refused.
        workers: that decode them; 0 for one per core.
        toy_rows: images per split of the generated set.
        toy_side: their side.
        toy_classes: their classes.
    """

    kind: str = "cifar10"
    path: str = ""
    side: int = 0
    holdout: float = 0.1
    half: int = 1
    long_tail: float = 1.0
    relabel: str = ""
    crop: int = 4
    border: str = field(default="black", metadata=later("black"))
    flip: bool = True
    memory_gb: float = field(default=4.0, metadata=NEUTRAL)
    workers: int = field(default=0, metadata=NEUTRAL)
    toy_rows: int = 512
    toy_side: int = 16
    toy_classes: int = 4

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "data.kind", f"be one of {', '.join(KINDS)}", self.kind)
        require(0 <= self.side <= MAX_SIDE, "data.side", f"be in 0..{MAX_SIDE}", self.side)
        require(0 <= self.holdout <= 0.5, "data.holdout", "be in [0, 0.5]", self.holdout)
        require(self.half in (0, 1), "data.half", "be 0 or 1", self.half)
        require(1 <= self.long_tail < math.inf, "data.long_tail", "be at least 1", self.long_tail)
        require(self.relabel in RELABELS, "data.relabel", "be empty or cifar2", self.relabel)
        advice = "Its ten classes are what cifar2 sorts."
        require(not self.relabel or self.kind == "cifar10", "data.relabel", "go with kind cifar10", self.kind, advice)
        require(0 <= self.crop <= 64, "data.crop", "be in 0..64", self.crop)
        require(self.border in BORDERS, "data.border", "be black or reflect", self.border)
        require(0 < self.memory_gb <= 1024, "data.memory_gb", "be in (0, 1024]", self.memory_gb)
        require(0 <= self.workers <= 256, "data.workers", "be in 0..256", self.workers)
        require(8 <= self.toy_rows <= 1 << 20, "data.toy_rows", "be in 8..1048576", self.toy_rows)
        require(8 <= self.toy_side <= 64, "data.toy_side", "be in 8..64", self.toy_side)
        require(2 <= self.toy_classes <= 100, "data.toy_classes", "be in 2..100", self.toy_classes)


@dataclass(frozen=True)
class BackboneConfig:
    """The classifier that is trained once.

    Args:
        name: registered backbone.
        depth: of the published family (ResNet 20, 56, ...; WRN 32); 0 for the backbone's own.
        width: channel multiplier; WRN-32-4 is depth 32 and width 4, MobileNet and VGG are width 1.
        shortcut: `resnet_cifar` only: A (no parameters: subsampled and padded with zeros) or B (1x1 convolution).
        dropout: where the backbone has some, in training only.
    """

    name: str = "resnet_cifar"
    depth: int = 0
    width: float = 1.0
    shortcut: str = "B"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require(self.name in BACKBONES, "backbone.name", f"be one of {', '.join(BACKBONES)}", self.name)
        require(0 <= self.depth <= 1202, "backbone.depth", "be in 0..1202", self.depth)
        require(0 < self.width <= 16, "backbone.width", "be in (0, 16]", self.width)
        require(self.shortcut in ("A", "B"), "backbone.shortcut", "be A or B", self.shortcut)
        require(0 <= self.dropout < 1, "backbone.dropout", "be in [0, 1)", self.dropout)


@dataclass(frozen=True)
class NetworkConfig:
    """Where the classifier may be left, and what gates may leave out.

    Args:
        every: an exit after every n-th block (the stem and the final pooling are no blocks).
        taps: units with an early exit after them, in place of `every`.
        gated: units with a gate before them, for methods with gates; all that can be skipped but the first by default (a
            policy net decides about that one too).
        channels: which channels of a residual block its gates decide about, where they decide about channels: those
            between its convolutions (`inner`), its results (`block_out`), or `both`.
    """

    every: int = 1
    taps: tuple[str, ...] = ()
    gated: tuple[str, ...] = ()
    channels: str = "inner"

    def __post_init__(self) -> None:
        require(self.every >= 1, "network.every", "be at least 1", self.every)
        require(len(set(self.taps)) == len(self.taps), "network.taps", "name each unit once", self.taps)
        require(self.channels in CHANNELS, "network.channels", f"be one of {', '.join(CHANNELS)}", self.channels)


@dataclass(frozen=True)
class TrainConfig:
    """SGD of the backbone. Defaults: Zero Time Waste's for ResNet and MobileNet; VGG and WRN decay weights by 5e-4.

    Args:
        epochs: passes over the training images.
        batch_size: of a minibatch; a rest of one image is left out, because batch statistics need two.
        learning_rate: at first.
        decay_at: shares of the epochs after which the rate falls to a tenth of what it was.
        momentum: of SGD.
        weight_decay: L2, of every parameter.
        precision: `bf16` or `fp32`, of convolutions and dense layers; weights and losses are fp32.
        checkpoint_seconds: wall time between checkpoints.
    """

    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 0.1
    decay_at: tuple[float, ...] = (0.35, 0.6, 0.85)
    momentum: float = 0.9
    weight_decay: float = 1e-4
    precision: str = "bf16"
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "train.epochs", "be at least 1", self.epochs)
        require(self.batch_size >= 2, "train.batch_size", "be at least 2", self.batch_size)
        for name in ("learning_rate", "checkpoint_seconds"):
            require(0 < getattr(self, name) < math.inf, f"train.{name}", "be positive", getattr(self, name))
        rising = all(0 <= share <= 1 for share in self.decay_at) and list(self.decay_at) == sorted(self.decay_at)
        require(rising, "train.decay_at", "be rising shares in [0, 1]", self.decay_at)
        require(0 <= self.momentum < 1, "train.momentum", "be in [0, 1)", self.momentum)
        require(0 <= self.weight_decay < 1, "train.weight_decay", "be in [0, 1)", self.weight_decay)
        require(self.precision in ("bf16", "fp32"), "train.precision", "be bf16 or fp32", self.precision)


@dataclass(frozen=True)
class CollectConfig:
    """How training images reach the heads.

    Args:
        batch: images per pass through the frozen backbone.
        batches: such passes per buffer; tapped features of a whole buffer are held at once.
    """

    batch: int = 128
    batches: int = 4

    def __post_init__(self) -> None:
        require(1 <= self.batch <= 1 << 14, "collect.batch", "be in 1..16384", self.batch)
        require(1 <= self.batches <= 1024, "collect.batches", "be in 1..1024", self.batches)


def _head() -> HeadConfig:
    """The paper's head for CIFAR: 3x3 convolution of the map's own size, pooled to 4 x 4 where it is larger."""
    return HeadConfig(layer_norm=False, stride=1, padding=1, upsample=False)


def _distill() -> DistillConfig:
    """Cross-entropy to the labels, Adam, each image seen once per pass; 50 passes over CIFAR's training split."""
    return DistillConfig(
        steps=2_250_000,
        ensemble_steps=45_000,
        batch_size=128,
        epochs=1,
        learning_rate=0.001,
        label_weight=1.0,
        weight_decay=1e-4,
        static_widths=(0.5,),
        static_learning_rate=0.001,
    )


def _refine() -> RefineConfig:
    """Paths of images: PPO's clip of 0.2 per gate, one epoch where the trunk moves along, slow gates."""
    return RefineConfig(
        decisions=("units",),
        steps=50_000,
        clone_steps=0,
        price=1.0,
        target_macs=0.5,
        dual_rate=0.05,
        learning_rate=3e-4,
        trunk="trained",
        epochs=1,
        clip=0.2,
        checkpoint_updates=25,
        collapse_after=100,
    )


def _evaluate() -> EvaluateConfig:
    """The test set in ten folds, so that intervals are over images."""
    return EvaluateConfig(episodes=10, n_envs=256, latency_batches=(256,))


@dataclass(frozen=True, kw_only=True)
class VisionConfig(CoreConfig):
    """Everything about an image classifier with exits.

    Args:
        data: the data set.
        teacher: `train` one, or given weights: a file (safetensors, or a state dict that needs no unpickling), or a name
            of timm's such as `timm:resnet50.a1_in1k`.
        rivals: given weights of the same family in other depths, DEPTH=FILE, which exits are compared with at their compute.
        backbone: the classifier.
        train: its training.
        network: where it may be left.
        collect: how images reach the heads.
        gating: how gates and trunk learn together.
        refine: how decisions are refined by reinforcement learning, for methods that are.
    """

    domain: str = "vision"
    head: HeadConfig = field(default_factory=_head)
    distill: DistillConfig = field(default_factory=_distill)
    refine: RefineConfig = field(default_factory=_refine)
    evaluate: EvaluateConfig = field(default_factory=_evaluate)
    data: DataConfig = field(default_factory=DataConfig)
    teacher: str = "train"
    rivals: tuple[str, ...] = ()
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    gating: GatingConfig = field(default_factory=GatingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.domain == "vision", "domain", "be vision", self.domain)
        require(bool(self.teacher), "teacher", "be train, a file or a name of timm's", self.teacher)
        for rival in self.rivals:
            depth, _, path = rival.partition("=")
            require(depth.isdecimal() and bool(path), "rivals", "be of DEPTH=FILE", rival, "Such as 20=resnet20.pt.")
        depths = [rival.partition("=")[0] for rival in self.rivals]
        require(len(set(depths)) == len(depths), "rivals", "name each depth once", self.rivals)


CONFIG = VisionConfig

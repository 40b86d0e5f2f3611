"""Settings of Atari agents: protocol and PPO. Imports no torch, so that the command line answers at once."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlexit.config import CoreConfig, require
from rlexit.refine_config import RefineConfig

# Observations in one buffer: 28 KB each, so 7 GB at most.
MAX_BUFFER = 1 << 18
# The modules of `agents.backbones`, found without importing torch: a new backbone is one new file.
BACKBONES = tuple(sorted(path.stem for path in (Path(__file__).parent / "backbones").glob("[a-z]*.py")))
TEACHERS = ("train", "zoo", "distilled")


@dataclass(frozen=True)
class EnvConfig:
    """The protocol: rules that are part of every score.

    Args:
        game: ale-py's name, such as `ms_pacman`.
        sticky: probability that the emulator repeats the previous action, drawn at every frame.
        frame_skip: frames per env step.
        frame_stack: frames in an observation.
        noop_max: fewer than so many random no-ops at the start of a game (ale-py draws from 0 to noop_max - 1).
        max_frames: a game is cut here.
        full_action_space: all 18 actions in place of the game's own.
        fire_on_reset: press FIRE at the start, where the game has it.
        fire_after_life_loss: replace the first action after a lost life by FIRE, where the game has it.
    """

    game: str
    sticky: float = 0.1
    frame_skip: int = 4
    frame_stack: int = 4
    noop_max: int = 0
    max_frames: int = 108_000
    full_action_space: bool = False
    fire_on_reset: bool = True
    fire_after_life_loss: bool = True

    def __post_init__(self) -> None:
        require(0 <= self.sticky <= 1, "env.sticky", "be in [0, 1]", self.sticky)
        require(1 <= self.frame_skip <= 60, "env.frame_skip", "be in 1..60", self.frame_skip)
        require(self.frame_stack == 4, "env.frame_stack", "be 4, what NatureCNN reads", self.frame_stack)
        require(0 <= self.noop_max <= 1000, "env.noop_max", "be in 0..1000", self.noop_max)
        require(1 <= self.max_frames <= 10_000_000, "env.max_frames", "be in 1..10000000", self.max_frames)


@dataclass(frozen=True)
class PPOConfig:
    """PPO of stable-baselines3; names are its own. Defaults: Zero Time Waste's (10 M steps, constant schedules).

    Args:
        total_steps: env steps (1 env step = 4 frames).
        anneal: let learning rate and clip range fall linearly to 0.
        precision: of convolutions and of the wide dense layer; `bf16` is about twice as fast on a CPU that has it.
        checkpoint_seconds: wall time between checkpoints.
    """

    total_steps: int = 10_000_000
    n_envs: int = 8
    n_steps: int = 128
    batch_size: int = 256
    n_epochs: int = 4
    learning_rate: float = 2.5e-4
    clip_range: float = 0.1
    anneal: bool = False
    gamma: float = 0.99
    gae_lambda: float = 0.95
    ent_coef: float = 0.01
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    precision: str = "bf16"
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("total_steps", "n_envs", "n_steps", "batch_size", "n_epochs"):
            require(getattr(self, name) >= 1, f"train.{name}", "be at least 1", getattr(self, name))
        require(self.n_envs <= 1024, "train.n_envs", "be at most 1024", self.n_envs)
        require(self.batch_size >= 2, "train.batch_size", "be at least 2", self.batch_size)
        rollout = self.n_envs * self.n_steps
        require(rollout <= MAX_BUFFER, "train.n_steps", f"keep n_envs x n_steps at most {MAX_BUFFER}", self.n_steps)
        advice = f"n_envs x n_steps is {rollout}; choose a divisor."
        require(rollout % self.batch_size == 0, "train.batch_size", "divide the rollout", self.batch_size, advice)
        for name in ("learning_rate", "clip_range", "max_grad_norm", "checkpoint_seconds"):
            require(0 < getattr(self, name) < math.inf, f"train.{name}", "be positive", getattr(self, name))
        for name in ("gamma", "gae_lambda"):
            require(0 <= getattr(self, name) <= 1, f"train.{name}", "be in [0, 1]", getattr(self, name))
        for name in ("ent_coef", "vf_coef"):
            require(0 <= getattr(self, name) < math.inf, f"train.{name}", "be at least 0", getattr(self, name))
        require(self.precision in ("bf16", "fp32"), "train.precision", "be bf16 or fp32", self.precision)


@dataclass(frozen=True)
class NetworkConfig:
    """The actor and where it may be left.

    Args:
        backbone: `nature`, or `impala` with exits after `block1b` and `block2b`, say.
        taps: units with an early exit after them.
    """

    backbone: str = "nature"
    taps: tuple[str, ...] = ("conv1", "conv2")

    def __post_init__(self) -> None:
        require(self.backbone in BACKBONES, "network.backbone", f"be one of {', '.join(BACKBONES)}", self.backbone)
        require(len(set(self.taps)) == len(self.taps), "network.taps", "name each unit once", self.taps)


@dataclass(frozen=True)
class StudentConfig:
    """How a teacher of one architecture is distilled from one of another (`teacher: distilled`).

    Args:
        source: `zoo`, the shipped teacher, or the folder of a run's teacher, such as `runs/pong/teacher`; a NatureCNN.
        steps: env steps, half of them driven by the student, half by the source.
        batch_size: of a minibatch.
        epochs: passes over each collected buffer.
        learning_rate: of Adam, at first; a tenth and a hundredth later.
        decay_at: shares of the steps after which it falls.
    """

    source: str = "zoo"
    steps: int = 500_000
    batch_size: int = 256
    epochs: int = 2
    learning_rate: float = 5e-4
    decay_at: tuple[float, float] = (0.7, 0.9)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "epochs"):
            require(getattr(self, name) >= 1, f"student.{name}", "be at least 1", getattr(self, name))
        require(0 < self.learning_rate < 1, "student.learning_rate", "be between 0 and 1", self.learning_rate)
        require(bool(self.source), "student.source", "be zoo or a teacher's folder", self.source)


@dataclass(frozen=True)
class CollectConfig:
    """How distillation data is collected.

    Args:
        n_envs: games side by side.
        n_steps: env steps per game and buffer.
    """

    n_envs: int = 16
    n_steps: int = 128

    def __post_init__(self) -> None:
        require(1 <= self.n_envs <= 1024, "collect.n_envs", "be in 1..1024", self.n_envs)
        require(self.n_steps >= 1, "collect.n_steps", "be at least 1", self.n_steps)
        buffer = self.n_envs * self.n_steps
        require(buffer <= MAX_BUFFER, "collect.n_steps", f"keep n_envs x n_steps at most {MAX_BUFFER}", self.n_steps)


@dataclass(frozen=True, kw_only=True)
class AgentsConfig(CoreConfig):
    """Everything about an Atari policy with exits.

    Args:
        env: the protocol.
        teacher: `train` one, copy the one shipped in the `zoo`, or make one `distilled` from a NatureCNN.
        train: PPO of the teacher.
        network: actor and exits.
        collect: distillation data.
        student: how a `distilled` teacher learns.
        refine: how decisions are refined by reinforcement learning, for methods that are.
    """

    domain: str = "agents"
    env: EnvConfig
    teacher: str = "train"
    train: PPOConfig = field(default_factory=PPOConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.domain == "agents", "domain", "be agents", self.domain)
        require(self.teacher in TEACHERS, "teacher", f"be one of {', '.join(TEACHERS)}", self.teacher)
        fits = self.teacher != "zoo" or self.network.backbone == "nature"
        advice = "What is shipped is a NatureCNN: say `teacher: distilled`."
        require(fits, "network.backbone", "be nature where the teacher is zoo", self.network.backbone, advice)

    def unusual(self) -> dict[str, Any]:
        """The teacher's architecture and source, where they are not a NatureCNN of its own."""
        network = {} if self.network.backbone == "nature" else {"backbone": self.network.backbone}
        return network | ({"student": asdict(self.student)} if self.teacher == "distilled" else {})


CONFIG = AgentsConfig

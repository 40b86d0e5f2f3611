"""A toy domain for the verbs: games of sixteen steps that a tiny network plays in microseconds, on no emulator."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from rlexit import checkpoint, settings
from rlexit.config import (
    CalibrateConfig,
    CoreConfig,
    DistillConfig,
    EvaluateConfig,
    HeadConfig,
    Method,
    require,
)
from rlexit.domain import Act, Batches, Played, Split, Watch
from rlexit.ensembles import ensembles
from rlexit.exit_policy import ExitPolicy, threshold_rows
from rlexit.heads import LinearHead, ModuleHead
from rlexit.interrupts import StopFlag, Stopped
from rlexit.network import StagedNetwork
from rlexit.refine_config import RefineConfig
from rlexit.runtime import run
from rlexit.session import Session
from rlexit.units import ModuleUnit

OBSERVED, WIDE, ACTIONS = 6, 16, 4
GAMES = ("alpha", "beta")
STEPS = 16
FIRST_SEED = {"calibration": 1000, "test": 2000, "certification": 3000}


@dataclass(frozen=True)
class ToyEnv:
    """Args: game: alpha or beta."""

    game: str
    noise: float = 0.5


@dataclass(frozen=True)
class ToyTrain:
    """Args: total_steps: of pretended training."""

    total_steps: int = 40
    learning_rate: float = 0.1

    def __post_init__(self) -> None:
        require(self.total_steps >= 1, "train.total_steps", "be at least 1", self.total_steps)


@dataclass(frozen=True)
class ToyNetwork:
    """Args: taps: units with an early exit after them."""

    taps: tuple[str, ...] = ("one", "two")


@dataclass(frozen=True, kw_only=True)
class ToyConfig(CoreConfig):
    """All settings of the toy."""

    domain: str = "toy"
    env: ToyEnv
    train: ToyTrain = field(default_factory=ToyTrain)
    network: ToyNetwork = field(default_factory=ToyNetwork)
    refine: RefineConfig = field(default_factory=RefineConfig)


CONFIG = ToyConfig

# Small enough for a whole run in a second or two.
SMALL = ToyConfig(
    env=ToyEnv("alpha"),
    methods=("ztw", "static"),
    head=HeadConfig(kind="linear"),
    distill=DistillConfig(
        steps=512,
        ensemble_steps=128,
        batch_size=32,
        epochs=4,
        learning_rate=0.05,
        checkpoint_buffers=5,
        static_widths=(0.5, 0.25),
    ),
    refine=RefineConfig(steps=3),
    calibrate=CalibrateConfig(target_macs=(0.8,), max_return_drop=(0.5,), episodes=4, rounds=2, candidates=3),
    evaluate=EvaluateConfig(episodes=3, grid=3, n_envs=4, latency_rows=3),
)

YAML = """
domain: toy
env:
  game: alpha
methods: [ztw, static]
head:
  kind: linear
distill:
  steps: 512
  ensemble_steps: 128
  batch_size: 32
  epochs: 4
  learning_rate: 0.05
  checkpoint_buffers: 5
  static_widths: [0.5, 0.25]
refine:
  steps: 3
calibrate:
  {target_macs: [0.8], max_return_drop: [0.5], episodes: 4, rounds: 2, candidates: 3}
evaluate:
  {episodes: 3, grid: 3, n_envs: 4, latency_rows: 3}
"""


def layer(inputs: int, outputs: int) -> ModuleUnit:
    return ModuleUnit(nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU()))


def toy_network(
    taps: Sequence[str], head: HeadConfig, cascade: bool = False, ensemble: str = "none", width: float = 1.0
) -> StagedNetwork:
    wide = round(WIDE * width)
    units = OrderedDict(one=layer(OBSERVED, wide), two=layer(wide, wide), three=layer(wide, wide))
    exits: dict[str, Any] = {}
    for tap in taps:
        if tap not in units:
            raise ValueError(f"`network.taps` must be of {', '.join(units)}, got {tap!r}.")
        exits[tap] = LinearHead((wide,), ACTIONS, head, cascade and bool(exits))
    exits["three"] = ModuleHead(nn.Linear(wide, ACTIONS))
    return StagedNetwork(units, exits, ACTIONS, ensembles[ensemble](len(taps), ACTIONS))


def teacher_network(seed: int) -> StagedNetwork:
    """A network of many opinions: weights are large, so that its answers differ from input to input."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = toy_network((), HeadConfig())
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.mul_(4.0 if name.endswith("weight") else 0.0)
    return network.eval()


class ToyDomain:
    """Rewards agree with what the teacher of seed 0 would do; `played` and `collected` count what was really done."""

    metric = "score"

    def __init__(self, config: ToyConfig) -> None:
        if config.env.game not in GAMES:
            raise LookupError(f"`env.game` must be one of {', '.join(GAMES)}, got {config.env.game!r}.")
        self.config = config
        self.task = config.env.game
        self.played: list[tuple[Split, int, int]] = []
        self.collected = 0
        self.worlds: list[list[int | None]] = []

    def protocol(self) -> dict[str, Any]:
        return {"game": self.task, "noise": self.config.env.noise}

    def train(self, folder: Path, seed: int, watch: Watch) -> None:
        network = teacher_network(seed)
        step = checkpoint.load_facts(folder, "state")["step"] if checkpoint.exists(folder, "state") else 0
        while step < self.config.train.total_steps:
            step += 10
            checkpoint.save(folder, "state", {}, {"step": step})
            watch.progress(step, self.config.train.total_steps, {})
            if watch.stop():
                raise Stopped
        checkpoint.save(folder, "teacher", network.state_dict(), {"env": {"game": self.task}})

    def accept(self, folder: Path) -> None:
        _, facts = checkpoint.load(folder, "teacher")
        if facts["env"]["game"] != self.task:
            raise checkpoint.CheckpointError(
                f"`{folder}` holds a teacher whose env.game is {facts['env']['game']!r}, the config says {self.task!r}."
            )

    def network(self, teacher: Path, method: Method) -> StagedNetwork:
        network = toy_network(self.config.network.taps, self.config.head, method.cascade, method.ensemble)
        network.load_state_dict(checkpoint.load(teacher, "teacher")[0], strict=False)
        return network.eval()

    def refine(
        self, network: StagedNetwork, teacher: Path, method: Method, folder: Path, seed: int, watch: Watch
    ) -> dict[str, float]:
        """Pretends: one step per asked for, each of which moves the first head's bias by 0.1."""
        bias, step = network.head(0).linear.bias, 0  # type: ignore[union-attr]
        if checkpoint.exists(folder, "state"):
            tensors, facts = checkpoint.load_state(folder, "state")
            step = facts["step"]
            bias.data.copy_(tensors["bias"])
        while step < self.config.refine.steps:
            step += 1
            bias.data.add_(0.1)
            checkpoint.save(folder, "state", {"bias": bias.data}, {"step": step})
            watch.progress(step, self.config.refine.steps, {})
            if watch.stop():
                raise Stopped
        return {"cost": 0.5}

    def static_networks(self, teacher: Path) -> dict[str, StagedNetwork]:
        widths = self.config.distill.static_widths
        return {f"width {width:g}": toy_network((), self.config.head, width=width) for width in widths}

    def example(self) -> Tensor:
        return torch.zeros(1, OBSERVED)

    def blank(self, method: Method) -> StagedNetwork:
        return toy_network(self.config.network.taps, self.config.head, method.cascade)

    def adopt(self, path: Path, folder: Path) -> None:
        self.train(folder, 7 + len(path.name) + ord(path.name[0]), Watch())

    def film(self, network: StagedNetwork, policy: ExitPolicy, episode: int, steps: int, path: Path) -> list[Path]:
        made = [path.with_name(f"{path.name}.{suffix}") for suffix in ("webp", "gif")]
        for one in made:
            checkpoint.write_atomic(one, b"GIF89a\x02\x00\x02\x00" + f"{policy.label} {episode} {steps}".encode())
        return made

    def batches(self, seed: int) -> Batches:
        def collect(act: Act, first: int) -> Iterator[int]:
            # One stream from `first` on, as games that go on: a start elsewhere gives other samples.
            generator = torch.Generator().manual_seed(1_000_000 * seed + first)
            state = torch.zeros(8, OBSERVED)
            while True:
                for _ in range(4):
                    state = 0.5 * state + torch.randn(8, OBSERVED, generator=generator)
                    state[:, 0] += act(state).argmax(dim=1)
                self.collected += 32
                yield 32

        return collect

    def rows(self, network: StagedNetwork, policy: ExitPolicy, count: int, watch: Watch) -> Tensor:
        if watch.stop():
            raise Stopped
        return torch.cat([observations(FIRST_SEED["calibration"] + episode)[0] for episode in range(16)])

    @contextmanager
    def world(self, episode: int) -> Iterator[Callable[[int | None], np.ndarray]]:
        seen, at = observations(FIRST_SEED["calibration"] + episode)[0].numpy(), iter(())
        steps: list[int | None] = []
        self.worlds.append(steps)

        def step(action: int | None) -> np.ndarray:
            nonlocal at
            steps.append(action)
            at = iter(seen) if action is None else at
            found = next(at, None)
            return step(None) if found is None else found

        yield step
        steps.append(-1)

    def play(
        self,
        network: StagedNetwork | None,
        policies: Sequence[ExitPolicy],
        jobs: Sequence[tuple[int, int]],
        split: Split,
        record: int,
        watch: Watch,
    ) -> Iterator[Played]:
        for number, (policy, episode) in enumerate(jobs):
            if watch.stop():
                return
            seed = FIRST_SEED[split] + episode
            seen, wanted = observations(seed)
            self.played.append((split, policy, episode))
            if network is None:
                exits = np.array([len(seen)])
                actions = torch.from_numpy(np.random.default_rng(seed).integers(ACTIONS, size=len(seen)))
                macs, left = 0, torch.zeros(len(seen), dtype=torch.int64)
            else:
                limits = threshold_rows(policies, network.exits)[[policy] * len(seen)]
                result = run(network, policies[policy], seen, thresholds=limits)
                actions, left, macs = result.answers.argmax(dim=1), result.exits, int(result.macs.sum())
                exits = np.bincount(left.numpy(), minlength=network.exits)
            steps = {"exits": left.tolist(), "actions": actions.tolist()} if number < record else {}
            value = float((actions == wanted).sum())
            yield Played(policy, episode, seed, value, len(seen), macs, exits, steps)
            watch.progress(number + 1, len(jobs), {})


@cache
def observations(seed: int) -> tuple[Tensor, Tensor]:
    """One game's observations and the actions that are rewarded: what the teacher of seed 0 does, now and then not."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.randn(STEPS, OBSERVED, generator=generator)
    wanted = teacher_network(0)(seen).answers[:, -1].argmax(dim=1)
    spoilt = torch.rand(STEPS, generator=generator) < 0.1
    return seen, torch.where(spoilt, (wanted + 1) % ACTIONS, wanted)


def domain(config: ToyConfig) -> ToyDomain:
    return ToyDomain(config)


def register(monkeypatch: Any) -> None:
    """Makes `domain: toy` a domain like the others for the length of a test."""
    here = sys.modules[__name__]
    monkeypatch.setattr(settings, "DOMAINS", (*settings.DOMAINS, "toy"))
    for name in ("toy", "toy.config", "toy.domain"):
        monkeypatch.setitem(sys.modules, name, here)


class StopAfter(StopFlag):
    """A stop flag that becomes true, as at a signal, when it has been asked so many times."""

    def __init__(self, asked: int) -> None:
        super().__init__()
        self.left = asked

    def __call__(self) -> bool:
        self.left -= 1
        if self.left < 0:
            self.signum = 15
        return super().__call__()


def session(
    root: Path,
    config: ToyConfig = SMALL,
    *,
    seed: int = 0,
    stop: Callable[[], bool] | None = None,
    force: bool = False,
    console: Console | None = None,
) -> Session:
    return Session(domain(config), root, seed, console or Console(quiet=True), stop or StopFlag(), force)  # type: ignore[arg-type]


def changed(config: ToyConfig, section: str, **values: Any) -> ToyConfig:
    return replace(config, **{section: replace(getattr(config, section), **values)})  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }

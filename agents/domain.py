"""Atari policies as a domain: what the verbs of rlexit need to know about games."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents import envs, rollouts, teacher, zoo
from agents.actor import ExitingActor
from agents.backbones import backbone_of
from agents.backbones.nature import FRAMES, SIDE, initialise
from agents.config import AgentsConfig
from agents.decisions import add_decisions
from agents.exporters import save_sb3
from agents.importers import import_sb3
from rlexit import checkpoint
from rlexit.config import Method
from rlexit.costs import cost_table
from rlexit.domain import Act, Batches, Played, Split, Watch
from rlexit.ensembles import ensembles
from rlexit.exit_policy import ExitPolicy
from rlexit.interrupts import Stopped
from rlexit.network import StagedNetwork

# Seeds of the splits are disjoint by construction: they lie in ranges that cannot meet.
FIRST_SEED = {"calibration": 1_000_000, "test": 2_000_000, "certification": 3_000_000}
MAX_EPISODES = 1_000_000
# Held-out observations are taken from so many whole games, at first every so many steps: neighbours are nearly equal.
ROW_GAMES = 16
ROW_SPACING = 8
# More rows than these are there only if every step is taken.
FEW_ROWS = 4096


def episode_seed(split: Split, episode: int) -> int:
    """The environment seed of an episode of a split; the splits share none.

    Raises:
        ValueError: the episode's index is negative or 1,000,000 or more.
    """
    if not 0 <= episode < MAX_EPISODES:
        raise ValueError(f"`episode` must be in 0..{MAX_EPISODES - 1}, got {episode}.")
    return FIRST_SEED[split] + episode


class AgentsDomain:
    """One Atari game and its config; implements `rlexit.domain.Domain`."""

    metric = "score"
    device = "cpu"

    def __init__(self, config: AgentsConfig) -> None:
        envs.rom_md5(config.env.game)
        if config.teacher == "zoo":
            zoo.folder(config.env.game)
        self.config = config
        self.backbone = backbone_of(config.network.backbone)
        self.task = config.env.game
        self._teacher_rows: tuple[int, Tensor] | None = None

    @cached_property
    def actions(self) -> int:
        """A, the number of actions of the game under this protocol."""
        return len(self.action_meanings)

    @cached_property
    def action_meanings(self) -> list[str]:
        """Names of the actions."""
        env = envs.AtariVecEnv(self.config.env, 1, training=False)
        try:
            return list(env.action_meanings)
        finally:
            env.close()

    def protocol(self) -> dict[str, Any]:
        """The protocol block of every row."""
        return envs.protocol(self.config.env)

    def train(self, folder: Path, seed: int, watch: Watch) -> None:
        """Trains the teacher by PPO, or copies the shipped one."""
        if self.config.teacher == "zoo":
            zoo.copy(self.task, folder)
            return
        if self.config.teacher == "distilled":
            from agents.students import distill_teacher

            distill_teacher(self.config, self.actions, folder, seed, self.batches(seed), watch)
            return
        total = self.config.train.total_steps
        teacher.train(
            folder,
            self.config.env,
            self.config.train,
            seed,
            device=self.device,
            extractor=self.backbone.extractor,
            stop=watch.stop,
            progress=lambda step, facts: watch.progress(step, total, facts),
        )

    def accept(self, folder: Path) -> None:
        """Refuses a teacher of another game, protocol or network."""
        tensors, facts = checkpoint.load(folder, teacher.TEACHER)
        theirs, ours = dict(facts.get("env") or {}), asdict(self.config.env)
        for name in ours:
            if theirs.get(name) != ours[name]:
                raise checkpoint.CheckpointError(
                    f"`{folder}` holds a teacher whose env.{name} is {theirs.get(name)!r}, the config says {ours[name]!r}. "
                    "Use the config that it was made with, or another --out."
                )
        self.backbone.load(self.backbone.network(self.actions), tensors)

    def network(self, teacher_folder: Path, method: Method) -> StagedNetwork:
        """The frozen actor with fresh early heads."""
        taps = self.config.network.taps
        network = self.backbone.network(
            self.actions, taps, self.config.head, method.cascade, ensembles[method.ensemble](len(taps), self.actions)
        )
        self.backbone.load(network, checkpoint.load(teacher_folder, teacher.TEACHER)[0])
        return add_decisions(network, self.example(), self.config.refine) if method.refines else network

    def static_networks(self, teacher_folder: Path) -> dict[str, StagedNetwork]:
        """The same backbone with fewer channels."""
        widths = self.config.distill.static_widths
        return {f"width {width:g}": initialise(self.backbone.network(self.actions, width=width)) for width in widths}

    def example(self) -> Tensor:
        """(1, 4, 84, 84) uint8."""
        return torch.zeros((1, FRAMES, SIDE, SIDE), dtype=torch.uint8)

    def batches(self, seed: int) -> Batches:
        """Games driven by the student's own exits."""

        def collect(act: Act, first: int) -> Iterator[int]:
            settings = self.config.collect
            start = int(np.random.SeedSequence([seed, first]).generate_state(1)[0])
            return rollouts.collect(self.config.env, act, settings.n_envs, settings.n_steps, start)

        return collect

    def rows(self, network: StagedNetwork, policy: ExitPolicy, count: int, watch: Watch) -> Tensor:
        """(N, 4, 84, 84) uint8, at most `count` observations, spread evenly over whole calibration games."""
        # Where nobody leaves early the actor is the teacher, whatever the heads: its rows are collected once.
        whole = all(threshold == np.inf for threshold in policy.thresholds)
        if whole and self._teacher_rows is not None and self._teacher_rows[0] == count:
            return self._teacher_rows[1]
        settings = self.config.evaluate
        jobs = [rollouts.Job(0, episode, episode_seed("calibration", episode)) for episode in range(ROW_GAMES)]
        seen: list[np.ndarray] = []
        ticks, spacing = 0, ROW_SPACING if count <= FEW_ROWS else 1

        def keep(observations: np.ndarray) -> None:
            nonlocal ticks, spacing
            if ticks % spacing == 0:
                seen.append(observations.copy())
                # A game may be long: thinned whenever twice too many are held, the rows stay evenly spread over it.
                if sum(map(len, seen)) > 2 * count:
                    del seen[1::2]
                    spacing *= 2
            ticks += 1

        playing = rollouts.play(
            self.config.env,
            rollouts.exiting(network, [policy]),
            jobs,
            rollouts.outcomes(network),
            n_envs=min(settings.n_envs, ROW_GAMES),
            sampled=settings.actions == "sampled",
            stop=watch.stop,
            keep=keep,
            progress=lambda done, total: watch.progress(done, total, {}),
        )
        for _ in playing:
            pass
        if watch.stop():
            raise Stopped
        held = [row for observations in seen for row in observations]
        chosen = np.linspace(0, len(held) - 1, min(count, len(held))).astype(np.int64)
        rows = torch.from_numpy(np.stack([held[index] for index in chosen]))
        if whole:
            self._teacher_rows = count, rows
        return rows

    def play(
        self,
        network: StagedNetwork | None,
        policies: Sequence[ExitPolicy],
        jobs: Sequence[tuple[int, int]],
        split: Split,
        record: int,
        watch: Watch,
    ) -> Iterator[Played]:
        """Plays full games under one rule; without a network, uniformly at random."""
        settings = self.config.evaluate
        if network is None:
            decide, exits = rollouts.at_random(self.actions), 1
        else:
            # A copy: what else is asked of the network is asked on the CPU.
            there = network if self.device == "cpu" else copy.deepcopy(network).to(self.device)
            decide, exits = rollouts.exiting(there, policies, settings.execution), rollouts.outcomes(network)
        return rollouts.play(
            self.config.env,
            decide,
            [rollouts.Job(policy, episode, episode_seed(split, episode)) for policy, episode in jobs],
            exits,
            n_envs=settings.n_envs,
            sampled=settings.actions == "sampled" or network is None,
            record=record,
            stop=watch.stop,
            progress=lambda done, total: watch.progress(done, total, {}),
        )

    def refine(
        self, network: StagedNetwork, teacher_folder: Path, method: Method, folder: Path, seed: int, watch: Watch
    ) -> dict[str, float]:
        """Cloning with straight-through gates, then PPO on clipped reward minus priced compute.

        Raises:
            ValueError: the config asks for an algorithm that is made for classifiers.
        """
        from agents.critics import value_head_of
        from agents.refine import Refiner

        if self.config.refine.algo != "ppo":
            raise ValueError(
                f"`refine.algo` must be ppo for games, got {self.config.refine.algo}. It is for classifiers."
            )
        value_head = value_head_of(checkpoint.load(teacher_folder, teacher.TEACHER)[0])
        original = self.network(teacher_folder, Method())
        refiner = Refiner(network, original, value_head, self.config.env, self.config.refine, folder, seed, watch)
        return refiner.run()

    def film(
        self, network: StagedNetwork, policy: ExitPolicy, episode: int, steps: int, path_without_suffix: Path
    ) -> list[Path]:
        """Films the game that an evaluation plays as this test episode, exits and compute beside it."""
        from agents import video  # draws with the plots' colours: matplotlib is slow to import and rarely needed here

        full = cost_table(network, self.example()).full
        sampled = self.config.evaluate.actions == "sampled"
        seed, title = episode_seed("test", episode), f"{policy.label}, episode {episode}"
        taken = video.film(
            self.config.env, network, policy, seed, self.action_meanings, full, steps, title, sampled=sampled
        )
        return taken.save(path_without_suffix)

    def blank(self, method: Method) -> StagedNetwork:
        """The network with exits, untrained; for counting."""
        network = self.backbone.network(self.actions, self.config.network.taps, self.config.head, method.cascade)
        return add_decisions(network, self.example(), self.config.refine) if method.refines else network

    def adopt(self, path: Path, folder: Path) -> None:
        """Makes a zip of stable-baselines3 the teacher."""
        import_sb3(path, folder, self.config.env)

    def publish(self, folder: Path, path: Path) -> None:
        """Writes the teacher as a zip for `PPO.load` of stable-baselines3."""
        save_sb3(folder, self.config.env, path)

    @contextmanager
    def world(self, episode: int) -> Iterator[Callable[[int | None], np.ndarray]]:
        """One game on an emulator of its own."""
        game = envs.AtariVecEnv(self.config.env, 1, training=False, n_threads=1)

        def step(action: int | None) -> np.ndarray:
            if action is None:
                first: np.ndarray = game.reset_games([0], [episode_seed("calibration", episode)])[0]
                return first
            game.step_async(np.array([action]))
            following: np.ndarray = game.step_wait()[0][0]  # type: ignore[index]
            return following

        try:
            yield step
        finally:
            game.close()

    def predictor(self, network: StagedNetwork, policy: ExitPolicy) -> Callable[..., tuple[Any, Any]]:
        """`predict` of stable-baselines3 on the actor."""
        actor = ExitingActor(network, policy)
        return partial(actor.predict, deterministic=True)


def domain(config: AgentsConfig) -> AgentsDomain:
    """The domain of a config; what the command line asks for."""
    return AgentsDomain(config)

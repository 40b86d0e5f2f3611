"""Playing Atari with an exiting actor: many games in one batch, each row with its own thresholds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agents.config import EnvConfig
from agents.envs import borrowed
from rlexit.domain import Played
from rlexit.exit_policy import ExitPolicy, threshold_rows
from rlexit.gates.reuse import forget
from rlexit.network import StagedNetwork
from rlexit.runtime import RunResult, replay, run
from rlexit.state import map_tensors, put, take


class Job(NamedTuple):
    """One game to play: which exit policy, which episode, from which environment seed."""

    policy: int
    episode: int
    seed: int


Decide = Callable[[Tensor, np.ndarray, Any], RunResult]


def outcomes(network: StagedNetwork) -> int:
    """How a row may end: at one of the K exits, or, where answers may be repeated, with the one it had: one more."""
    return network.exits + (network.reuse is not None)


def exiting(network: StagedNetwork, policies: Sequence[ExitPolicy], execution: str = "real") -> Decide:
    """Decides with a network whose rows each follow one of several exit policies of one rule.

    Args:
        network: in evaluation mode; it decides on the device that it is on.
        policies: of one rule.
        execution: `real` does not run later units; `replay` runs all exits and picks afterwards. Both act alike.
    """
    limits = threshold_rows(policies, network.exits)
    shared = len(policies) == 1
    execute = run if execution == "real" else replay
    device = next(network.parameters()).device

    def decide(observations: Tensor, jobs: np.ndarray, memory: Any = None) -> RunResult:
        thresholds = None if shared else limits[torch.from_numpy(jobs)]
        there = map_tensors(lambda tensor: tensor.to(device), memory)
        result = execute(network, policies[0], observations.to(device), thresholds=thresholds, memory=there)
        # Games are played on the CPU, whatever decides.
        found: RunResult = map_tensors(lambda tensor: tensor.cpu(), result)
        return found

    return decide


def at_random(actions: int) -> Decide:
    """Decides uniformly; the actions themselves are drawn by each game's own generator (`sampled`)."""

    def decide(observations: Tensor, jobs: np.ndarray, memory: Any = None) -> RunResult:
        batch = len(observations)
        answers = torch.full((batch, actions), 1.0 / actions).log()
        nothing = torch.zeros(batch, dtype=torch.int64)
        return RunResult(answers, nothing, nothing, torch.full((batch, 1), torch.nan))

    return decide


def play(
    config: EnvConfig,
    decide: Decide,
    jobs: Sequence[Job],
    exits: int,
    *,
    n_envs: int = 32,
    sampled: bool = False,
    record: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
    keep: Callable[[np.ndarray], None] | None = None,
) -> Iterator[Played]:
    """Plays full games, one per job, in one batch of emulators; yields each as it ends.

    Args:
        config: the protocol.
        decide: answers and exits for (B, ...) observations, the (B,) policy index of each row and the rows' memories;
            None before anything is remembered.
        jobs: every game. A game depends on its own seed and policy only, not on its neighbours.
        exits: K, and one more where answers may be repeated (`outcomes`).
        n_envs: at most so many games side by side.
        sampled: draw actions from the answer (by the game's own generator) in place of the likeliest.
        record: the first so many jobs keep their steps; exit -1 is a repeated answer.
        progress: told (games done, games in all).
        stop: asked at every step; true ends the playing.
        keep: given the (B, ...) observations of running games at every step.
    """
    if not jobs:
        return
    # No more emulators than rounds of games keep busy: one without a game still takes its time at every step.
    rounds = -(-len(jobs) // n_envs)
    n_envs = -(-len(jobs) // rounds)
    slots = np.full(n_envs, -1)
    running: list[Played | None] = [None] * n_envs
    generators: list[np.random.Generator] = [np.random.default_rng(0)] * n_envs
    waiting = list(range(len(jobs)))[::-1]
    done = 0
    memory: Any = None  # tree of (n_envs, ...): every game has its own
    with borrowed(config, n_envs) as env:
        observations = np.zeros((n_envs, *(env.observation_space.shape or ())), dtype=np.uint8)
        while done < len(jobs) and not stop():
            free = [slot for slot in range(n_envs) if running[slot] is None][: len(waiting)]
            if free:
                observations = observations.copy()
                for slot in free:
                    slots[slot] = waiting.pop()
                    job = jobs[slots[slot]]
                    running[slot] = Played(job.policy, job.episode, job.seed, exits=np.zeros(exits, dtype=np.int64))
                    generators[slot] = np.random.default_rng(job.seed)
                memory = forget(memory, torch.tensor(free))
                seeds = np.array([jobs[slots[slot]].seed for slot in free])
                observations[free] = env.reset_games(np.array(free), seeds)
            playing = [(slot, episode) for slot, episode in enumerate(running) if episode is not None]
            active = np.array([slot for slot, _ in playing])
            batch = torch.from_numpy(observations if len(active) == n_envs else observations[active])
            places = torch.from_numpy(active)
            result = decide(batch, np.array([episode.policy for _, episode in playing]), take(memory, places))
            if result.memory is not None:
                blank = map_tensors(lambda leaf: leaf.new_zeros((n_envs, *leaf.shape[1:])), result.memory)
                memory = put(blank if memory is None else memory, places, result.memory)
            if keep is not None:
                keep(batch.numpy())
            probabilities = result.answers.exp().numpy()
            chosen = probabilities.argmax(axis=1)
            if sampled:
                chosen = np.array(
                    [draw(generators[slot], row) for slot, row in zip(active, probabilities, strict=True)]
                )
            actions = np.zeros(n_envs, dtype=np.int64)
            actions[active] = chosen
            env.step_async(actions)
            observations, rewards, dones, _ = env.step_wait()  # type: ignore[assignment]
            left, macs = result.exits.numpy(), result.macs.numpy()
            for row, (slot, episode) in enumerate(playing):
                episode.decisions += 1
                episode.macs += int(macs[row])
                episode.exits[left[row]] += 1
                episode.value += float(rewards[slot])
                if slots[slot] < record:
                    exit = -1 if result.reuse is not None and not result.reuse.action[row] else int(left[row])
                    _note(episode, exit, float(probabilities[row].max()), int(chosen[row]), float(rewards[slot]))
                if dones[slot]:
                    running[slot] = None
                    done += 1
                    progress(done, len(jobs))
                    yield episode


def collect(config: EnvConfig, act: Callable[[Tensor], Tensor], n_envs: int, n_steps: int, seed: int) -> Iterator[int]:
    """Collects buffers for distillation; every environment is driven by its own action, the likeliest of its answer.

    Args:
        config: the protocol.
        act: (B, 4, 84, 84) uint8 to (B, A) log-probabilities.
        n_envs: games side by side.
        n_steps: env steps per buffer and game.
        seed: of the games.
    Yields:
        Samples in each buffer.
    """
    with borrowed(config, n_envs) as env:
        observations = env.reset_games(np.arange(n_envs), _seeds(seed, n_envs))
        while True:
            for _ in range(n_steps):
                answers = act(torch.from_numpy(observations))
                env.step_async(answers.argmax(dim=1).numpy())
                observations = env.step_wait()[0]  # type: ignore[assignment]
            yield n_envs * n_steps


def _seeds(seed: int, count: int) -> np.ndarray:
    return np.random.SeedSequence(seed).generate_state(count).astype(np.int64) >> 2


def draw(generator: np.random.Generator, probabilities: np.ndarray) -> int:
    """Draws an action from (A,) float32 probabilities, which sum to 1 only nearly."""
    return int(
        generator.choice(len(probabilities), p=probabilities.astype(np.float64) / probabilities.sum(dtype=np.float64))
    )


def _note(episode: Played, exit: int, confidence: float, action: int, reward: float) -> None:
    for name, value in (("exits", exit), ("confidences", confidence), ("actions", action), ("rewards", reward)):
        episode.steps.setdefault(name, []).append(value)

"""Speed as ratios, both sides in one run: `python benchmarks/speed.py [training batched served ...] [--repeats 3]`.

training    our PPO against stock stable-baselines3 (`make_atari_env` + `VecFrameStack` + `CnnPolicy`), equal settings
distill     collecting + training both heads (5 epochs) against our own PPO and against the bare emulators
saving      what checkpoints cost, of PPO and of distillation
batched     real execution of a batch of 64 and 256 against the plain network in its faster memory layout
served      the same in onnxruntime: an export against the plain network, whole batches or blocks, whichever is faster
evaluation  wall time of 10 thresholds x 10 Pong games

The last three use exits distilled from the shipped Pong teacher, on frames that the exiting actor meets. Each figure is a
median over alternating repeats, with the smallest and largest. Run it with nothing beside it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecFrameStack
from torch import nn

from agents import rollouts, teacher, zoo
from agents.backbones.nature import load_sb3, nature_network
from agents.config import EnvConfig, PPOConfig
from agents.envs import AtariVecEnv
from rlexit import checkpoint, machine
from rlexit.calibrate import score_rows, shared_policy, solve_macs
from rlexit.config import DistillConfig, HeadConfig
from rlexit.costs import cost_table
from rlexit.distill import Distiller
from rlexit.ensembles import ensembles
from rlexit.exit_policy import ExitPolicy
from rlexit.export import server_of
from rlexit.network import StagedNetwork
from rlexit.runtime import run
from rlexit.serve import Server
from rlexit.students import ExitStudent

GAME = EnvConfig(game="pong")
ACTIONS = 6
ROLLOUTS = 3
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def alternate(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Measures all sides in turn, so that a busy moment of the machine hits them alike."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, measure in sides.items():
            found[name].append(measure())
    return found


def spread(values: Sequence[float], digits: int = 0) -> str:
    return f"{statistics.median(values):,.{digits}f} [{min(values):,.{digits}f} .. {max(values):,.{digits}f}]"


def steps_per_second(model: PPO, steps: int) -> float:
    """Of `learn`, after one rollout and update that are not counted."""
    model.set_logger(Logger(None, []))
    model.learn(model.n_steps * model.n_envs, reset_num_timesteps=True)
    began = time.perf_counter()
    model.learn(steps, reset_num_timesteps=False)
    return steps / (time.perf_counter() - began)


def ours(config: PPOConfig) -> float:
    env = AtariVecEnv(GAME, config.n_envs, training=True)
    try:
        return steps_per_second(teacher.build(env, config, seed=0), ROLLOUTS * config.n_envs * config.n_steps)
    finally:
        env.close()


def stock(config: PPOConfig) -> float:
    wrappers = {"noop_max": 0, "action_repeat_probability": GAME.sticky}
    env = VecFrameStack(make_atari_env("PongNoFrameskip-v4", config.n_envs, seed=0, wrapper_kwargs=wrappers), 4)
    try:
        model = PPO(
            "CnnPolicy",
            env,
            learning_rate=config.learning_rate,
            n_steps=config.n_steps,
            batch_size=config.batch_size,
            n_epochs=config.n_epochs,
            clip_range=config.clip_range,
            ent_coef=config.ent_coef,
            device="cpu",
        )
        return steps_per_second(model, ROLLOUTS * config.n_envs * config.n_steps)
    finally:
        env.close()


def training(options: argparse.Namespace) -> None:
    for name, config in (
        ("paper: 8 games, 4 epochs", PPOConfig()),
        ("fast: 16 games, 3 epochs", PPOConfig(n_envs=16, n_epochs=3)),
    ):
        found = alternate(
            {"rlexit": lambda config=config: ours(config), "SB3": lambda config=config: stock(config)}, options.repeats
        )
        ratios = [mine / theirs for mine, theirs in zip(found["rlexit"], found["SB3"], strict=True)]
        print(
            f"| training, {name} | rlexit {spread(found['rlexit'])} steps/s | SB3 {spread(found['SB3'])} steps/s "
            f"| ratio {spread(ratios, 2)} |",
            flush=True,
        )


@functools.cache
def student() -> StagedNetwork:
    """NatureCNN with the exits of Zero Time Waste and the shipped teacher's weights, not trained yet."""
    torch.manual_seed(0)
    network = nature_network(ACTIONS, ("conv1", "conv2"), HeadConfig(), True, ensembles["geometric"](2, ACTIONS))
    with tempfile.TemporaryDirectory() as folder:
        zoo.copy(GAME.game, Path(folder))
        load_sb3(network, checkpoint.load(Path(folder), teacher.TEACHER)[0])
    return network


def distilling(network: StagedNetwork, samples: int, n_envs: int = 16, game: EnvConfig = GAME) -> float:
    """Samples per second of collecting and training, after one buffer that is not counted."""
    config = DistillConfig(steps=samples, ensemble_steps=2_048)
    began: list[float] = []

    def told(done: int, total: int, facts: dict[str, float]) -> None:
        if done <= samples:
            began.append(time.perf_counter())

    def batches(act, first):
        return rollouts.collect(game, act, n_envs, 2048 // n_envs, first)

    with tempfile.TemporaryDirectory() as folder:
        Distiller(ExitStudent(network), batches, config, Path(folder), seed=0, progress=told).run()
    return (samples - samples // len(began)) / (began[-1] - began[0])


@functools.cache
def exiting() -> StagedNetwork:
    """The same after a short distillation: its exits need not be good, but they must be real."""
    network = copy.deepcopy(student())
    distilling(network, 40_960)
    return network.eval()


def distill(options: argparse.Namespace) -> None:
    sides = {
        "distill": lambda: distilling(copy.deepcopy(student()), 20_480),
        "our PPO": lambda: ours(PPOConfig()),
        "bare emulators": lambda: emulating(4_000),
    }
    found = alternate(sides, options.repeats)
    for other in list(sides)[1:]:
        ratios = [mine / theirs for mine, theirs in zip(found["distill"], found[other], strict=True)]
        print(
            f"| distill, two heads, 5 epochs | {spread(found['distill'])} samples/s | {other} {spread(found[other])} "
            f"steps/s | ratio {spread(ratios, 2)} |",
            flush=True,
        )


def emulating(steps: int, n_envs: int = 16) -> float:
    """Env steps per second of the emulators alone, at random."""
    env, draws = AtariVecEnv(GAME, n_envs, training=False), np.random.default_rng(0)
    try:
        env.seed(0)
        env.reset()
        env.step(draws.integers(ACTIONS, size=n_envs))
        began = time.perf_counter()
        for _ in range(steps // n_envs):
            env.step(draws.integers(ACTIONS, size=n_envs))
        return steps // n_envs * n_envs / (time.perf_counter() - began)
    finally:
        env.close()


def saving(options: argparse.Namespace) -> None:
    """Seconds of a checkpoint, as a share of the time from one to the next."""
    config = PPOConfig()
    env = AtariVecEnv(GAME, config.n_envs, training=True)
    model = teacher.build(env, config, seed=0)
    steps_per_second(model, config.n_envs * config.n_steps)
    env.close()
    with tempfile.TemporaryDirectory() as folder:

        def save() -> None:
            tensors, counters = teacher._state(model)
            checkpoint.save(Path(folder), teacher.STATE, tensors, {"counters": counters})

        shares = [seconds(save, 1) / config.checkpoint_seconds for _ in range(3 * options.repeats)]
    print(
        f"| saving, PPO | every {config.checkpoint_seconds:g} s | share of the time {spread(shares, 4)} |", flush=True
    )
    shares = []
    for _ in range(options.repeats):
        spent: list[float] = []
        distiller_save = Distiller._save

        def timed(self: Distiller, save=distiller_save, spent=spent) -> None:
            spent.append(seconds(lambda: save(self), 1))

        Distiller._save = timed
        try:
            # Two checkpoints and the rest of a third segment.
            samples = 2_048 * 2 * DistillConfig().checkpoint_buffers + 2_048
            began = time.perf_counter()
            distilling(copy.deepcopy(student()), samples)
            shares.append(sum(spent) / (time.perf_counter() - began))
        finally:
            Distiller._save = distiller_save
    print(f"| saving, distillation | {len(spent)} in {samples:,} samples | share {spread(shares, 4)} |", flush=True)


def seconds(call: Callable[[], object], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls


def plain(network: StagedNetwork, layout: torch.memory_format) -> Callable[[torch.Tensor], torch.Tensor]:
    """The backbone as ordinary layers on raw frames, without any of rlexit's bookkeeping."""
    layers = [copy.deepcopy(unit.module) for unit in network.units.values()]
    head = copy.deepcopy(network.head(network.exits - 1).module)
    model = nn.Sequential(*layers, head).eval().to(memory_format=layout)

    @torch.no_grad()
    def call(rows: torch.Tensor) -> torch.Tensor:
        return model(rows.to(torch.float32).div_(255).contiguous(memory_format=layout))

    return call


@functools.cache
def met() -> torch.Tensor:
    """Frames of Pong that the exiting actor meets."""
    network = exiting()
    decide = rollouts.exiting(network, [ExitPolicy.full(network.exits)])
    jobs = [rollouts.Job(0, episode, episode) for episode in range(32)]
    frames: list[np.ndarray] = []
    playing = rollouts.play(
        GAME,
        decide,
        jobs,
        network.exits,
        keep=lambda seen: frames.append(seen.copy()),
        stop=lambda: len(frames) >= 400,
    )
    list(playing)
    return torch.from_numpy(np.concatenate(frames[8::8]))


def operating(network: StagedNetwork) -> list[ExitPolicy]:
    """Mixes of exits between leaving at once and paying for all heads."""
    costs = cost_table(network, met()[:1])
    scores = score_rows(network, "confidence", met(), costs)
    return [shared_policy("confidence", solve_macs(scores, target), 3) for target in (0.4, 0.5, 0.65, 0.85, 1.04)]


def against(batch: int, relative: float, found: dict[str, list[float]], references: Sequence[str], what: str) -> None:
    """One line of a table: what `real` took, against the fastest of its references."""
    fastest = min(references, key=lambda name: statistics.median(found[name]))
    ratios = [real / full for real, full in zip(found["real"], found[fastest], strict=True)]
    efficiency = [relative / ratio for ratio in ratios]
    print(
        f"| {what}, batch {batch}, relative MACs {relative:.3f} | time / full ({fastest}) {spread(ratios, 3)} "
        f"| MACs ratio / time ratio {spread(efficiency, 2)} (at least 0.85) |",
        flush=True,
    )


def chosen(batch: int) -> torch.Tensor:
    return met()[torch.randperm(len(met()), generator=torch.Generator().manual_seed(0))[:batch]]


def batched(options: argparse.Namespace) -> None:
    network = exiting()
    full = cost_table(network, met()[:1]).full
    for batch in (64, 256):
        rows = chosen(batch)
        layouts = {name: plain(network, layout) for name, layout in LAYOUTS.items()}
        for policy in [*operating(network), ExitPolicy.full(network.exits)]:
            relative = float(run(network, policy, rows).macs.float().mean()) / full
            sides = {name: partial(seconds, partial(call, rows), options.calls) for name, call in layouts.items()}
            sides["real"] = partial(seconds, partial(run, network, policy, rows), options.calls)
            against(batch, relative, alternate(sides, 3 * options.repeats), list(layouts), "torch")


def served(options: argparse.Namespace) -> None:
    """Both sides on one thread, and dealt to all of them."""
    network, whole = exiting(), student_backbone()
    full = cost_table(network, met()[:1]).full
    policies = operating(network)
    checked = met()[:64]
    for threads in sorted({1, torch.get_num_threads()}):
        base = server_of(network, policies[0], checked, threads)
        backbone = server_of(whole, ExitPolicy.full(1), checked, threads)
        for batch in (64, 256):
            rows = chosen(batch).numpy()

            def blocks(size: int, rows: np.ndarray = rows, server: Server = backbone) -> None:
                for start in range(0, len(rows), size):
                    server.run(rows[start : start + size])

            sizes = sorted({16 * threads, 64, batch})
            for policy in policies:
                relative = float(run(network, policy, torch.from_numpy(rows)).macs.float().mean()) / full
                sides = {f"blocks of {size}": partial(seconds, partial(blocks, size), options.calls) for size in sizes}
                real = base.with_thresholds(policy.thresholds)
                sides["real"] = partial(seconds, partial(real.run, rows), options.calls)
                found = alternate(sides, 3 * options.repeats)
                against(batch, relative, found, list(sides)[:-1], f"onnxruntime, {threads} threads")


def student_backbone() -> StagedNetwork:
    """The plain full network with the weights of `exiting`."""
    network = nature_network(ACTIONS)
    own = exiting().state_dict()
    network.load_state_dict({key: own[key] for key in network.state_dict()})
    return network.eval()


def evaluation(options: argparse.Namespace) -> None:
    network = exiting()
    policies = [shared_policy("confidence", threshold, network.exits) for threshold in np.linspace(0.3, 0.99, 10)]
    jobs = [rollouts.Job(policy, episode, 3_000_000 + episode) for episode in range(10) for policy in range(10)]
    began = time.perf_counter()
    played = list(rollouts.play(GAME, rollouts.exiting(network, policies), jobs, network.exits, n_envs=32))
    wall = time.perf_counter() - began
    steps = sum(one.decisions for one in played)
    print(
        f"| evaluation, 10 thresholds x 10 games | {wall:.0f} s | {steps:,} env steps | {steps / wall:,.0f} steps/s |",
        flush=True,
    )


PARTS = {
    "training": training,
    "distill": distill,
    "saving": saving,
    "batched": batched,
    "served": served,
    "evaluation": evaluation,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--repeats", type=int, default=3, help="alternating repeats")
    parser.add_argument("--calls", type=int, default=20, help="calls per repeat in `batched`")
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    options = parser.parse_args()
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"no part {part!r}; there are {', '.join(PARTS)}")
    machine.settle(options.threads)
    print(f"# {machine.describe()}, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    for part in options.parts:
        PARTS[part](options)


if __name__ == "__main__":
    main()

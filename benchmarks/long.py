"""What takes hours: `python -m benchmarks.long curves|memory [...]`. Killed, it goes on with the same command.

curves   our PPO and stock stable-baselines3's, same settings and steps, several seeds each: scores of whole games on the way
memory   resident memory of a training or a distillation, sampled for an hour: its slope over the second half
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack

from agents import rollouts, teacher
from agents.config import EnvConfig, PPOConfig
from benchmarks.speed import ACTIONS, student
from rlexit import checkpoint, machine
from rlexit.config import DistillConfig
from rlexit.distill import Distiller
from rlexit.interrupts import Stopped
from rlexit.runlog import read_scalars
from rlexit.students import ExitStudent

CSV = "curve.csv"
MARKS = (0.25, 0.5, 0.75, 1.0)
Curve = list[tuple[int, float]]


def ours(folder: Path, config: PPOConfig, seed: int) -> Curve:
    if not checkpoint.exists(folder, teacher.TEACHER):
        teacher.train(folder, EnvConfig(game="pong"), config, seed)
    return [(step, value) for step, tag, value in read_scalars(folder) if tag == "rollout/ep_rew_mean"]


class _Keep(BaseCallback):
    """Appends the mean score at every update, and saves the model every so many."""

    def __init__(self, folder: Path, every: int) -> None:
        super().__init__()
        self.folder, self.every, self.updates = folder, every, 0

    def _on_rollout_end(self) -> None:
        games = [info["r"] for info in self.model.ep_info_buffer or ()]
        with (self.folder / CSV).open("a", newline="") as file:
            if games:
                csv.writer(file).writerow([self.num_timesteps, float(np.mean(games))])

    def _on_rollout_start(self) -> None:
        if self.updates and self.updates % self.every == 0:
            self.model.save(self.folder / "new.zip")
            (self.folder / "new.zip").replace(self.folder / "model.zip")
        self.updates += 1

    def _on_step(self) -> bool:
        return True


def stock(folder: Path, config: PPOConfig, seed: int) -> Curve:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "done").exists():
        wrappers = {"noop_max": 0, "action_repeat_probability": EnvConfig(game="pong").sticky}
        games = make_atari_env("PongNoFrameskip-v4", config.n_envs, seed=seed, wrapper_kwargs=wrappers)
        env = VecFrameStack(games, 4)
        saved = folder / "model.zip"
        if saved.exists():
            model = PPO.load(saved, env=env, device="cpu")  # our own file, of a moment ago
        else:
            rate, clip = config.learning_rate, config.clip_range
            model = PPO(
                "CnnPolicy",
                env,
                learning_rate=(lambda left: rate * left) if config.anneal else rate,
                clip_range=(lambda left: clip * left) if config.anneal else clip,
                n_steps=config.n_steps,
                batch_size=config.batch_size,
                n_epochs=config.n_epochs,
                gamma=config.gamma,
                gae_lambda=config.gae_lambda,
                ent_coef=config.ent_coef,
                vf_coef=config.vf_coef,
                max_grad_norm=config.max_grad_norm,
                seed=seed,
                device="cpu",
            )
        keep = _Keep(folder, max(100_000 // (config.n_envs * config.n_steps), 1))
        left = config.total_steps - model.num_timesteps
        model.learn(left, callback=keep, reset_num_timesteps=not saved.exists())
        env.close()
        (folder / "done").touch()
    with (folder / CSV).open() as file:
        known = {int(step): float(score) for step, score in csv.reader(file)}
    return sorted(known.items())


def curves(options: argparse.Namespace) -> None:
    config = PPOConfig(total_steps=options.steps, n_envs=16, n_epochs=3)
    sides: dict[str, Callable[[Path, PPOConfig, int], Curve]] = {"rlexit": ours, "sb3": stock}
    print("| side | seed | " + " | ".join(f"score at {mark:.0%} of {options.steps:,}" for mark in MARKS) + " |")
    last: dict[str, list[float]] = {name: [] for name in sides}
    for seed in options.seeds:
        for name, train in sides.items():
            curve = train(options.folder / name / f"s{seed}", config, seed)
            steps, scores = np.array(curve).T
            told = [float(np.interp(mark * options.steps, steps, scores)) for mark in MARKS]
            last[name].append(told[-1])
            print(f"| {name} | {seed} | " + " | ".join(f"{score:.2f}" for score in told) + " |", flush=True)
    for name, values in last.items():
        print(
            f"| {name} | mean of {len(values)} | at the end: {statistics.mean(values):.2f}, all {values} |", flush=True
        )


def resident() -> float:
    """MiB of this process."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def memory(options: argparse.Namespace) -> None:
    ends = time.monotonic() + 60 * options.minutes
    samples: list[tuple[float, float]] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(options.every):
            samples.append((time.monotonic(), resident()))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            _work(options.what, Path(scratch), lambda: time.monotonic() > ends)
        except Stopped:
            pass
        finally:
            done.set()
            thread.join()
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / f"memory_{options.what}.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("seconds", "rss_mib"), *((at - samples[0][0], size) for at, size in samples)])
    at, size = np.array(samples[len(samples) // 2 :]).T
    slope = float(np.polyfit((at - at[0]) / 3600, size, 1)[0])
    print(
        f"| memory, {options.what}, {options.minutes:g} min | {samples[0][1]:.0f} MiB at the start, {size[-1]:.0f} "
        f"at the end, largest {max(one for _, one in samples):.0f} | slope of the second half {slope:+.1f} MiB/h "
        f"({slope / size.mean():+.2%} per hour) | {path} |",
        flush=True,
    )


def _work(what: str, folder: Path, stop: Callable[[], bool]) -> None:
    if what == "train":
        config = replace(PPOConfig(), total_steps=10**9, checkpoint_seconds=60.0)
        teacher.train(folder, EnvConfig(game="pong"), config, 0, stop=stop)
        return

    def batches(act, first):
        return rollouts.collect(EnvConfig(game="pong"), act, 16, 128, first)

    config = DistillConfig(steps=10**9, ensemble_steps=2_048)
    Distiller(ExitStudent(student()), batches, config, folder, seed=0, stop=stop).run()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("curves", "memory"))
    parser.add_argument("--folder", type=Path, default=Path("runs/long"), help="state and curves")
    parser.add_argument("--steps", type=int, default=600_000, help="env steps of each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--what", choices=("train", "distill"), default="distill")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=5.0, help="seconds from sample to sample")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args(arguments)
    machine.settle(options.threads)
    print(f"# {machine.describe()}, Pong with {ACTIONS} actions", flush=True)
    {"curves": curves, "memory": memory}[options.part](options)


if __name__ == "__main__":
    main()

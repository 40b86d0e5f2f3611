"""Where PPO spends its time: `python -m benchmarks.ppo_profile`, in CPU seconds of all threads: other jobs hardly count."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from stable_baselines3.common.logger import Logger
from torch.profiler import ProfilerActivity, profile

from agents import teacher
from agents.config import EnvConfig, PPOConfig
from agents.envs import AtariVecEnv
from rlexit import machine

TOP = 12


def timed(spent: dict[str, float], name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        try:
            return call(*args, **kwargs)
        finally:
            spent[name] = spent.get(name, 0.0) + time.process_time() - began

    return wrapped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=2)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    machine.settle(options.threads)
    config = PPOConfig()
    env = AtariVecEnv(EnvConfig(game="pong"), config.n_envs, training=True)
    model = teacher.build(env, config, seed=0)
    model.set_logger(Logger(None, []))
    size = config.n_envs * config.n_steps
    model.learn(size)
    spent: dict[str, float] = {}
    env.step_wait = timed(spent, "emulators", env.step_wait)  # type: ignore[method-assign]
    model.policy.forward = timed(spent, "acting", model.policy.forward)  # type: ignore[method-assign]
    model.rollout_buffer._get_samples = timed(spent, "minibatches", model.rollout_buffer._get_samples)  # type: ignore[method-assign]
    model.train = timed(spent, "update", model.train)  # type: ignore[method-assign]
    whole = time.process_time()
    model.learn(options.rollouts * size, reset_num_timesteps=False)
    whole = time.process_time() - whole
    spent["update"] -= spent["minibatches"]
    spent["the rest"] = whole - sum(spent.values())
    print(f"# {machine.describe()}, {torch.get_num_threads()} threads; {options.rollouts} x {size} env steps")
    for name, cost in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"| {name} | {1e6 * cost / options.rollouts / size:.0f} us per env step | {cost / whole:.0%} |")
    with profile(activities=[ProfilerActivity.CPU]) as found:
        model.train()
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=TOP, max_name_column_width=40))
    env.close()


if __name__ == "__main__":
    main()

"""A run of Pong that is over in seconds: an untrained teacher, games of a few frames, two buffers of samples."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from gymnasium import spaces
from rich.console import Console
from stable_baselines3.common.policies import ActorCriticCnnPolicy

from agents.config import AgentsConfig, CollectConfig, EnvConfig
from agents.domain import domain
from rlexit import checkpoint, verbs
from rlexit.config import CalibrateConfig, DistillConfig, EvaluateConfig
from rlexit.interrupts import StopFlag
from rlexit.session import Session

ENV = EnvConfig("pong", max_frames=160)
CONFIG = AgentsConfig(
    env=ENV,
    methods=("ztw",),
    collect=CollectConfig(n_envs=2, n_steps=16),
    distill=DistillConfig(steps=64, ensemble_steps=32, batch_size=32, epochs=1),
    calibrate=CalibrateConfig(target_macs=(0.9, 0.5), max_return_drop=(), rounds=1),
    evaluate=EvaluateConfig(episodes=1, grid=0, n_envs=2, latency_rows=0),
)


def save_teacher(folder: Path, env: EnvConfig, actions: int = 6) -> Path:
    """An untrained actor in the place of a trained one."""
    torch.manual_seed(11)
    frames = spaces.Box(0, 255, (4, 84, 84), "uint8")
    policy = ActorCriticCnnPolicy(frames, spaces.Discrete(actions), lambda progress: 1e-3)
    state = policy.state_dict()
    tensors = {key: value for key, value in state.items() if not key.startswith(("pi_features_", "vf_features_"))}
    with torch.no_grad():
        tensors["action_net.weight"].normal_(0, 0.5)
    checkpoint.save(folder, "teacher", tensors, {"env": asdict(env)})
    return folder


def small_session(root: Path) -> Session:
    return Session(domain(CONFIG), root, 0, Console(quiet=True), StopFlag())


def make_run(root: Path) -> Path:
    """Everything up to calibrated exit policies; returns the folder of the method."""
    session = small_session(root)
    save_teacher(session.teacher, ENV)
    verbs.distill(session, "ztw")
    verbs.calibrate(session, "ztw")
    return session.method("ztw")

"""The teacher as a file that stable-baselines3 opens, for whoever has tools for that."""

from __future__ import annotations

import io
from dataclasses import fields
from pathlib import Path

import torch
from stable_baselines3 import PPO

from agents.config import EnvConfig, PPOConfig
from agents.envs import AtariVecEnv
from agents.teacher import TEACHER
from rlexit import checkpoint

_ALIASES = ("pi_features_extractor.", "vf_features_extractor.")


def save_sb3(folder: Path, env_config: EnvConfig, path: Path) -> None:
    """Writes the teacher of a run as a zip for stock SB3's `PPO.load`, in one rename.

    SB3 keeps the classes of a model as pickles in such a zip. Here they are SB3's and gymnasium's own; reading it back
    with `rlexit import` opens none of them.

    Args:
        folder: of the teacher.
        env_config: the protocol that it is played under.
        path: of the zip.
    Raises:
        CheckpointError: the teacher was altered, or has no tensors of SB3's `CnnPolicy`.
        OSError: the disk is full or not writable.
    """
    tensors, facts = checkpoint.load(folder, TEACHER)
    games = AtariVecEnv(env_config, 1, training=False)
    try:
        model = _model(games, facts.get("ppo"))
    finally:
        games.close()
    state = model.policy.state_dict()
    for key in state:
        alias = next((start for start in _ALIASES if key.startswith(start)), None)
        own = key if alias is None else f"features_extractor.{key.removeprefix(alias)}"
        if own not in tensors or tensors[own].shape != state[key].shape:
            raise checkpoint.CheckpointError(
                f"`{folder}` must hold SB3's `{own}` of shape {tuple(state[key].shape)}. Export a PPO teacher."
            )
        state[key] = tensors[own]
    model.policy.load_state_dict(state)
    model.num_timesteps = int(facts.get("env_steps") or 0)
    packed = io.BytesIO()
    model.save(packed)
    checkpoint.write_atomic(path, packed.getvalue())


def _model(games: AtariVecEnv, settings: object) -> PPO:
    known = {field.name for field in fields(PPOConfig)}
    given = settings if isinstance(settings, dict) else {}
    ppo = PPOConfig(**{name: value for name, value in given.items() if name in known})
    with torch.random.fork_rng():
        return PPO(
            "CnnPolicy",
            games,
            learning_rate=ppo.learning_rate,
            n_steps=ppo.n_steps,
            batch_size=ppo.n_steps,  # of the one game here; another size would be warned of
            n_epochs=ppo.n_epochs,
            gamma=ppo.gamma,
            gae_lambda=ppo.gae_lambda,
            clip_range=ppo.clip_range,
            ent_coef=ppo.ent_coef,
            vf_coef=ppo.vf_coef,
            max_grad_norm=ppo.max_grad_norm,
            device="cpu",
        )

"""The teacher: stable-baselines3's PPO on ale-py's vector environment, with resume and without pickle."""

from __future__ import annotations

import copy
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.policies import ActorCriticCnnPolicy
from stable_baselines3.common.utils import LinearSchedule
from torch import Tensor, nn
from torch.func import functional_call

from agents.config import EnvConfig, PPOConfig
from agents.envs import AtariVecEnv, protocol
from rlexit import checkpoint
from rlexit.interrupts import Diverged, Stopped
from rlexit.runlog import RunLog

STATE = "state"
TEACHER = "teacher"
WHITE = 255


class MixedPrecisionCnnPolicy(ActorCriticCnnPolicy):
    """SB3's `CnnPolicy` whose feature extractor runs in bfloat16; heads, losses and weights stay float32.

    Frames of 0 to 255 are exact in bfloat16, and the division by 255 is done to the weights that read them: the first
    convolution of the extractor. Acting reads a bfloat16 copy of the weights that is made once per rollout, where autocast
    would make one at every step. Acting and updating agree to the bit, so the first update's probability ratio is 1.
    """

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        # A fused optimiser changes weights without counting up their version.
        self.optimizer.register_step_post_hook(lambda *_: self.__dict__.pop("_copied", None))

    def extract_features(self, obs: Any, features_extractor: Any = None) -> Tensor:
        """(B, 4, 84, 84) uint8 to (B, 512) float32 features."""
        extractor = self.features_extractor if features_extractor is None else features_extractor
        frames = obs.to(torch.bfloat16)
        if not torch.is_grad_enabled():
            return self._lowered(extractor)(frames).float()
        with torch.autocast(obs.device.type, dtype=torch.bfloat16):
            name, weight = _first_weight(extractor)
            return functional_call(extractor, {name: weight / WHITE}, (frames,)).float()

    def _lowered(self, extractor: nn.Module) -> nn.Module:
        """A bfloat16 copy of the extractor, made afresh when a weight has changed."""
        weights = list(extractor.parameters())
        state = [(weight.device, weight.data_ptr(), weight._version) for weight in weights]
        known = self.__dict__.get("_copied")
        if known is None or known[0] != state:
            copied = copy.deepcopy(extractor)
            with torch.no_grad():
                _first_weight(copied)[1].div_(WHITE)
            # Not as an attribute that torch knows: it is no part of the policy's state.
            known = self.__dict__["_copied"] = state, copied.to(torch.bfloat16)
        return known[1]


def _first_weight(extractor: nn.Module) -> tuple[str, Tensor]:
    """Name and weight of the convolution that reads the frames."""
    return next((f"{name}.weight", one.weight) for name, one in extractor.named_modules() if isinstance(one, nn.Conv2d))


class _Writer(KVWriter):
    """Forwards SB3's logger to the run's log."""

    def __init__(self, log: RunLog) -> None:
        self.log = log

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        for tag, value in sorted(key_values.items()):
            if isinstance(value, (int, float, np.floating)) and "tensorboard" not in (key_excluded.get(tag) or ()):
                self.log.scalar(tag, float(value), step)

    def close(self) -> None:
        self.log.flush()


class _Keeper(BaseCallback):
    """Checks, saves and stops between two updates, the one moment when no rollout is half done."""

    def __init__(
        self,
        save: Callable[[], None],
        stop: Callable[[], bool],
        progress: Callable[[int, dict[str, float]], None],
        seconds: float,
    ) -> None:
        super().__init__()
        self.save, self.stop, self.progress, self.seconds = save, stop, progress, seconds
        self.saved_at = time.monotonic()

    def _on_rollout_start(self) -> None:
        loss = self.model.logger.name_to_value.get("train/loss", 0.0)
        finite = np.isfinite(loss) and all(bool(torch.isfinite(p).all()) for p in self.model.policy.parameters())
        if not finite:
            raise Diverged(
                f"`train/loss` became {loss} at env step {self.num_timesteps}. The last checkpoint is kept; "
                "lower `train.learning_rate` or set `train.precision` to fp32, and start over with --force."
            )
        stop = self.stop()
        if stop or time.monotonic() - self.saved_at > self.seconds:
            self.save()
            self.saved_at = time.monotonic()
        if stop:
            raise Stopped

    def _on_rollout_end(self) -> None:
        games = [info["r"] for info in self.model.ep_info_buffer or ()]
        self.progress(self.num_timesteps, {"score": float(np.mean(games))} if games else {})

    def _on_step(self) -> bool:
        return True


def build(
    env: AtariVecEnv, config: PPOConfig, seed: int, device: str = "cpu", extractor: type[Any] | None = None
) -> PPO:
    """PPO with the given settings on the given games; SB3's own NatureCNN unless a feature extractor is given."""
    policy = MixedPrecisionCnnPolicy if config.precision == "bf16" else ActorCriticCnnPolicy
    rate, clip = config.learning_rate, config.clip_range
    return PPO(
        policy,
        env,
        learning_rate=LinearSchedule(rate, 0.0, 1.0) if config.anneal else rate,
        clip_range=LinearSchedule(clip, 0.0, 1.0) if config.anneal else clip,
        n_steps=config.n_steps,
        batch_size=config.batch_size,
        n_epochs=config.n_epochs,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        ent_coef=config.ent_coef,
        vf_coef=config.vf_coef,
        max_grad_norm=config.max_grad_norm,
        policy_kwargs={"optimizer_kwargs": {"fused": True}}
        | ({} if extractor is None else {"features_extractor_class": extractor, "net_arch": []}),
        seed=seed,
        device=device,
    )


def train(
    folder: Path,
    env_config: EnvConfig,
    config: PPOConfig,
    seed: int,
    *,
    device: str = "cpu",
    extractor: type[Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, dict[str, float]], None] = lambda step, facts: None,
) -> Path:
    """Trains a teacher in `folder`, or goes on where an earlier call stopped; returns its manifest.

    Weights, optimiser, schedules, counters and random states resume exactly; the emulators start new games, because
    ale-py's vector environment cannot be saved.

    Raises:
        Stopped: `stop` answered true; the state is saved.
        Diverged: a loss or weight is NaN or infinite.
        CheckpointError: the saved state was cut or altered.
    """
    resumed = checkpoint.load_state(folder, STATE) if checkpoint.exists(folder, STATE) else None
    if resumed and resumed[1]["seed"] != seed:
        raise checkpoint.CheckpointError(
            f"`{folder}` holds a training with seed {resumed[1]['seed']}, got {seed}. Use that seed, or another --out."
        )
    step = int(resumed[1]["counters"]["num_timesteps"]) if resumed else 0
    env = AtariVecEnv(env_config, config.n_envs, training=True)
    model = build(env, config, seed, device, extractor)
    # Envs restart at a resume: their seeds must not repeat the games of the first attempt.
    env.seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0] >> 2))
    model._last_obs = None
    with RunLog(folder, resume_step=step) as log:
        model.set_logger(Logger(str(folder), [_Writer(log)]))
        if resumed:
            _restore(model, *resumed)
        facts = {"env": asdict(env_config), "ppo": asdict(config), "seed": seed, "protocol": protocol(env_config)}

        def save() -> None:
            tensors, counters = _state(model)
            checkpoint.save(folder, STATE, tensors, {"counters": counters, **facts})
            log.flush()

        keeper = _Keeper(save, stop, progress, config.checkpoint_seconds)
        try:
            # SB3 adds to the counter's goal when it goes on, so the remainder is what is asked for.
            model.learn(max(config.total_steps - step, 0), callback=keeper, reset_num_timesteps=not resumed)
        finally:
            env.close()
        keeper._on_rollout_start()
        save()
    return checkpoint.save(
        folder,
        TEACHER,
        weights(model),
        {**facts, "env_steps": model.num_timesteps, "action_meanings": env.action_meanings},
    )


def weights(model: PPO) -> dict[str, Tensor]:
    """The policy's tensors, each once: SB3 lists a shared extractor three times."""
    state = model.policy.state_dict()
    return {key: value for key, value in state.items() if not key.startswith(("pi_features_", "vf_features_"))}


def _state(model: PPO) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {f"policy.{key}": value for key, value in weights(model).items()}
    tensors |= checkpoint.pack_optimizer(model.policy.optimizer, "optimizer")
    tensors["random.torch"] = torch.get_rng_state()
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    tensors["random.numpy"] = torch.from_numpy(np.asarray(keys, dtype=np.uint32).astype(np.int64))
    counters = {
        "num_timesteps": model.num_timesteps,
        "n_updates": model._n_updates,
        "episodes": [{key: float(value) for key, value in info.items()} for info in model.ep_info_buffer or ()],
        "numpy": [kind, int(position), int(has_gauss), float(gauss)],
        "python": [random.getstate()[0], list(random.getstate()[1]), random.getstate()[2]],
    }
    return tensors, counters


def _restore(model: PPO, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    counters = facts["counters"]
    model.policy.load_state_dict(checkpoint.subset(tensors, "policy"), strict=False)
    checkpoint.unpack_optimizer(model.policy.optimizer, "optimizer", tensors)
    model.num_timesteps = counters["num_timesteps"]
    model._n_updates = counters["n_updates"]
    model.ep_info_buffer = deque(counters["episodes"], maxlen=model._stats_window_size)
    model.ep_success_buffer = deque(maxlen=model._stats_window_size)
    torch.set_rng_state(tensors["random.torch"])
    kind, position, has_gauss, gauss = counters["numpy"]
    np.random.set_state((kind, tensors["random.numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, gauss_next = counters["python"]
    random.setstate((version, tuple(words), gauss_next))

"""Import of actors that stable-baselines3 or the RL Zoo saved, from files that a stranger may have made.

One member of the zip is read, `policy.pth`; `data` and all others, where SB3 puts pickled objects, are never opened.
Nothing is extracted and nothing is inflated: SB3 and torch store their members, so a compressed one is refused.
What `policy.pth` holds is read by `rlexit.statedicts`, which runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from agents.config import EnvConfig
from agents.envs import AtariVecEnv, protocol
from agents.teacher import TEACHER
from rlexit import checkpoint
from rlexit.statedicts import ImportRefused, Reader, listed, printable

WEIGHTS = "policy.pth"
MAX_FILE_BYTES = 64 << 20
MAX_WEIGHTS_BYTES = 32 << 20
MAX_MEMBERS = 64

_OTHERS = "Only `CnnPolicy` actors of PPO and A2C can be imported; train one with SB3, or here with `rlexit train`."
_SAVE_AGAIN = "Get the file again, or save it again with SB3's `model.save`."

_OLD = "Load the model with a recent SB3 (only if you trust its maker: SB3 unpickles) and save it again."
_READER = Reader(MAX_FILE_BYTES, _SAVE_AGAIN, _OTHERS, _OLD)

_FOREIGN = (
    ("q_net", "a DQN"),
    ("quantile_net", "a QR-DQN"),
    ("lstm_", "a recurrent policy"),
    ("features_extractor.extractors.", "a multi-input policy"),
    ("log_std", "a policy with continuous actions"),
    ("actor.", "an SAC, TD3 or DDPG"),
    ("critic.", "an SAC, TD3 or DDPG"),
)
_HIDDEN = "a policy with hidden layers behind its features, `net_arch`"
_ALIASES = ("pi_features_extractor.", "vf_features_extractor.")
_SHAPES: dict[str, tuple[int | str, ...]] = {
    "features_extractor.cnn.0.weight": (32, 4, 8, 8),
    "features_extractor.cnn.0.bias": (32,),
    "features_extractor.cnn.2.weight": (64, 32, 4, 4),
    "features_extractor.cnn.2.bias": (64,),
    "features_extractor.cnn.4.weight": (64, 64, 3, 3),
    "features_extractor.cnn.4.bias": (64,),
    "features_extractor.linear.0.weight": (512, 3136),
    "features_extractor.linear.0.bias": (512,),
    "action_net.weight": ("actions", 512),
    "action_net.bias": ("actions",),
    "value_net.weight": (1, 512),
    "value_net.bias": (1,),
}


def import_sb3(path: Path, folder: Path, env_config: EnvConfig) -> Path:
    """Saves the actor in an SB3 zip as the teacher of `folder`; returns its manifest.

    What the actor was trained on is not in the weights: the game is the caller's word, as is `normalize_images`,
    which must be SB3's default (frames divided by 255).

    Args:
        path: what `model.save` of PPO or A2C wrote.
        folder: run folder of the teacher, made if missing.
        env_config: the protocol that the teacher will be played under.

    Raises:
        ImportRefused: see `read_sb3_policy`; or the game has another number of actions. Nothing is written.
        LookupError: ale-py has no such game.
        OSError: the disk is full or not writable.
    """
    tensors, digest = _read(path)
    games = AtariVecEnv(env_config, 1, training=False)
    games.close()
    meanings = games.action_meanings
    name, game = printable(str(path)), env_config.game
    actions = len(tensors["action_net.bias"])
    if actions != len(meanings):
        raise ImportRefused(
            f"`{name}` must have the {len(meanings)} actions of `{game}`, got {actions}. Name the game that it was "
            "trained on, or set `env.full_action_space` as in its training."
        )
    return checkpoint.save(
        folder,
        TEACHER,
        tensors,
        {
            "env": asdict(env_config),
            "protocol": protocol(env_config),
            "action_meanings": meanings,
            "seed": None,
            "env_steps": None,
            "source": {"kind": "sb3", "file": printable(path.name), "sha256": digest},
        },
    )


def read_sb3_policy(path: Path) -> dict[str, Tensor]:
    """The weights of a PPO or A2C `CnnPolicy` (NatureCNN, discrete actions) in an SB3 zip.

    Returns:
        SB3's state-dict keys to float32 on the CPU, each tensor once and with memory of its own.

    Raises:
        ImportRefused: the file is missing, cut, altered, too large, no such zip, or holds another kind of policy,
            other shapes, another dtype, NaN or infinity. Nothing in the file was run.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    name = f"`{printable(str(path))}`"
    data = _READER.file_bytes(path, name)
    archive, members = _READER.members(data, name, MAX_MEMBERS)
    if WEIGHTS not in members:
        raise ImportRefused(f"{name} must hold `{WEIGHTS}`, got {listed(members)}. {_SAVE_AGAIN}")
    where = f"`{WEIGHTS}` in {name}"
    size = members[WEIGHTS].file_size
    if size > MAX_WEIGHTS_BYTES:
        raise ImportRefused(f"{where} must have at most {MAX_WEIGHTS_BYTES} bytes, got {size}. {_OTHERS}")
    state = _READER.state_dict(_READER.content(archive, members[WEIGHTS], where), where)
    return _nature_actor(state, where), checkpoint.sha256(data)


def _nature_actor(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The twelve tensors of SB3's `CnnPolicy`, or a refusal that says what else this is."""
    cnn = any(key.startswith("features_extractor.") for key in state)
    for start, kind in (*_FOREIGN, ("mlp_extractor.", _HIDDEN if cnn else "an `MlpPolicy`")):
        found = next((key for key in state if key.startswith(start)), None)
        if found:
            raise ImportRefused(f"{where} is {kind} (it has `{printable(found)}`). {_OTHERS}")
    sizes: dict[str, int] = {}
    actor = {}
    for key, shape in _SHAPES.items():
        if key not in state:
            raise ImportRefused(f"{where} is no NatureCNN (it has no `{key}`). {_OTHERS}")
        _check_tensor(key, state[key], shape, sizes, where)
        actor[key] = state[key].detach().clone()
    for key, value in state.items():
        if key in actor:
            continue
        alias = next((key.removeprefix(start) for start in _ALIASES if key.startswith(start)), "")
        own = f"features_extractor.{alias}"
        if own not in actor:
            raise ImportRefused(f"{where} has `{printable(key)}`, which no NatureCNN `CnnPolicy` has. {_OTHERS}")
        _check_tensor(key, value, _SHAPES[own], sizes, where)
        if not torch.equal(value, actor[own]):
            raise ImportRefused(
                f"`{key}` of {where} differs from `{own}`: actor and critic see by nets of their own. "
                "Only `share_features_extractor=True`, SB3's default, can be imported; train so."
            )
    return actor


def _check_tensor(key: str, tensor: Tensor, shape: tuple[int | str, ...], sizes: dict[str, int], where: str) -> None:
    got = tuple(tensor.shape)
    fits = len(got) == len(shape) and all(
        size > 0 and size == (sizes.setdefault(want, size) if isinstance(want, str) else want)
        for size, want in zip(got, shape, strict=True)
    )
    if not fits:
        wanted = "(" + ", ".join(str(sizes.get(str(want), want)) for want in shape) + ")"
        raise ImportRefused(f"`{key}` of {where} must have NatureCNN's shape {wanted}, got {got}. {_OTHERS}")
    if tensor.dtype != torch.float32:
        raise ImportRefused(f"`{key}` of {where} must be float32, got {tensor.dtype}. {_SAVE_AGAIN}")
    # A view with stride 0 claims terabytes that the file does not hold.
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        raise ImportRefused(f"`{key}` of {where} must be contiguous. {_SAVE_AGAIN}")
    if not bool(torch.isfinite(tensor).all()):
        raise ImportRefused(f"`{key}` of {where} must be finite, got NaN or infinity. Take an earlier save of it.")

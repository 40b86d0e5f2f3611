"""Critics of refinement: one of the task's reward and one of compute, on the frozen teacher's features."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from torch import Tensor, nn

from rlexit.refine_config import RefineConfig


class Critics(nn.Module):
    """Values of task and of cost, kept apart so that the price may move without making them stale.

    Never deployed, so what they read is never charged: the frozen teacher's last features.

    Args:
        width: of these features.
        value_head: the teacher's own critic on them, frozen, to which the task's is a correction; or None.
        hidden: units of the hidden layer.
    """

    def __init__(self, width: int, value_head: nn.Linear | None = None, hidden: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width + 1, hidden), nn.Tanh(), nn.Linear(hidden, 2))
        last = self.net[-1]
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.register_buffer("weight", torch.zeros(width) if value_head is None else value_head.weight[0].detach())
        self.register_buffer("bias", torch.zeros(()) if value_head is None else value_head.bias[0].detach())

    def forward(self, features: Tensor, left: Tensor) -> Tensor:
        """(B, 2) discounted reward and discounted relative MACs to come.

        Args:
            features: (B, W) of the teacher.
            left: (B,) how many more steps may repeat an answer.
        """
        task = features @ self.get_buffer("weight") + self.get_buffer("bias")
        found = self.net(torch.cat([features, left[:, None].to(features.dtype)], dim=1))
        return torch.stack([task + found[:, 0], found[:, 1]], dim=1)


def value_head_of(tensors: Mapping[str, Tensor]) -> nn.Linear | None:
    """The critic of an SB3 actor's weights, or None if it is not among them."""
    weight, bias = tensors.get("value_net.weight"), tensors.get("value_net.bias")
    if weight is None or bias is None:
        return None
    layer = nn.Linear(weight.shape[1], 1)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def advantages(
    signal: np.ndarray,
    values: Tensor,
    starts: np.ndarray,
    after: Tensor,
    ended: np.ndarray,
    config: RefineConfig,
) -> tuple[Tensor, Tensor]:
    """Generalised advantages of one signal, by stable-baselines3's own buffer.

    Args:
        signal: (T, E) clipped reward, or cost, per env step.
        values: (T * E,) of the critic.
        starts: (T, E) 1 where a game began.
        after: (E,) values of the observations after the last step.
        ended: (E,) whether the last step ended the game.
        config: gamma and lambda.
    Returns:
        (T * E,) advantages and (T * E,) returns, in the order of time.
    Source: Schulman et al. 2016, arXiv 1506.02438.
    """
    steps, games = signal.shape
    nothing = spaces.Box(0, 1, (1,))
    buffer = RolloutBuffer(
        steps, nothing, spaces.Discrete(2), gae_lambda=config.gae_lambda, gamma=config.gamma, n_envs=games
    )
    buffer.rewards[:], buffer.episode_starts[:] = signal, starts
    buffer.values[:] = values.reshape(steps, games).numpy()
    buffer.compute_returns_and_advantage(after, ended)
    return torch.from_numpy(buffer.advantages).flatten(), torch.from_numpy(buffer.returns).flatten()

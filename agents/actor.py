"""An exiting actor as a stable-baselines3 policy: `predict` and `evaluate_policy` work on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor

from agents.backbones.nature import FRAMES, SIDE
from rlexit.config import METHODS
from rlexit.exit_policy import ExitPolicy
from rlexit.gates.reuse import forget
from rlexit.network import StagedNetwork
from rlexit.runtime import RunResult, run


class ExitingActor(BasePolicy):
    """Acts with a staged network under an exit policy; later units are not run for a row that left.

    Args:
        network: an actor; put into evaluation mode.
        exit_policy: rule and thresholds.
        observation_space: by default that of Atari, (4, 84, 84) uint8.
    """

    def __init__(
        self,
        network: StagedNetwork,
        exit_policy: ExitPolicy,
        observation_space: gymnasium.Space[np.ndarray] | None = None,
    ) -> None:
        space = observation_space or spaces.Box(0, 255, (FRAMES, SIDE, SIDE), np.uint8)
        super().__init__(space, spaces.Discrete(network.outputs))
        self.network = network.eval()
        self.exit_policy = exit_policy
        self.last: RunResult | None = None
        self._memory: Any = None

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Any]:
        """As in SB3; `state` is what the games remember, for networks that may repeat an answer, and is handed back."""
        starts = np.zeros(0, dtype=np.int64) if episode_start is None else np.flatnonzero(episode_start)
        self._memory = forget(state, torch.from_numpy(starts))
        actions, _ = super().predict(observation, None, episode_start, deterministic)
        return actions, self._memory

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        """(B, 4, 84, 84) to (B,) actions; exits, costs and scores of the call are kept in `last`."""
        self.last = run(self.network, self.exit_policy, observation, memory=self._memory)
        self._memory = self.last.memory
        if deterministic:
            return self.last.answers.argmax(dim=1)
        return torch.multinomial(self.last.answers.exp(), 1)[:, 0]


def load_actor(folder: Path, label: str | None = None) -> ExitingActor:
    """Loads a distilled and calibrated actor from a method's run folder, such as `runs/pong/ztw/s0`.

    Args:
        folder: holds what `distill` and `calibrate` made; its run folder is found above it.
        label: of the calibrated exit policy; the first by default.
    Raises:
        FileNotFoundError: the folder belongs to no run, or to no method of one.
        CheckpointError: a stage is missing or a file was altered; names the verb that makes it.
        LookupError: no exit policy has that label.
    """
    from rich.console import Console

    from agents.domain import AgentsDomain
    from rlexit.interrupts import StopFlag
    from rlexit.session import Session, calibrated_policy, load_network
    from rlexit.settings import locate, resolve

    place = locate(str(folder), folder)
    if not place.methods:
        raise FileNotFoundError(f"`folder` must be of a method and seed, such as ztw/s0 in a run folder, got {folder}.")
    domain = AgentsDomain(resolve(place, []))  # type: ignore[arg-type]
    session = Session(domain, place.root, place.seed, Console(quiet=True), StopFlag())
    if METHODS[place.methods[0]].static:
        raise ValueError(f"`folder` must hold a method with exits, got {folder}. Static networks have no exit policy.")
    network = load_network(session, place.methods[0])[""]
    return ExitingActor(network, calibrated_policy(session, place.methods[0], label))

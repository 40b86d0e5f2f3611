"""ale-py's vector environment as a stable-baselines3 `VecEnv`: training signal and game score kept apart."""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from agents.config import EnvConfig

_SEED_LIMIT = 2**31  # the emulator's seeds are int32, and it takes a negative one for "no seed"


def known_games() -> list[str]:
    """All games that the installed ale-py has a ROM for, sorted."""
    return sorted(roms.get_all_rom_ids())


def rom_md5(game: str) -> str:
    """MD5 of the game's ROM, as in the protocol block.

    Raises:
        LookupError: ale-py has no such game.
    """
    return hashlib.md5(_rom_path(game).read_bytes(), usedforsecurity=False).hexdigest()


def protocol(config: EnvConfig) -> dict[str, Any]:
    """The protocol block of every evaluation row: rules of the game, library version, ROM.

    Raises:
        LookupError: ale-py has no such game.
    """
    return {
        **asdict(config),
        "ale_py": importlib.metadata.version("ale-py"),
        "rom_md5": rom_md5(config.game),
        "score": "unclipped, full game",
    }


class AtariVecEnv(VecEnv):
    """A batch of B Atari games in ale-py's threads; the emulator's own frame stack, no Python wrappers.

    A lost life is reported as done (where `training`) while the game goes on: ale-py's `episodic_life` would restart
    the game, so `life_loss_info` is used, and the true end is read from the frame counters, which start over.
    `info["episode"]` appears at true ends only and holds the unclipped score `r` and the length `l` in env steps.
    The FIRE of `fire_after_life_loss` replaces an action on its way to the emulator; the caller's own array is kept.

    Args:
        config: the protocol.
        n_envs: B, number of games.
        training: clip the rewards to their sign and end episodes at a lost life. Scores are never clipped.
        n_threads: emulator threads; results do not depend on it.
        seed: game i starts from `seed + i` at the first `reset`; None: anywhere.
        picture: observe (B, 1, 210, 160, 3) colours for people to look at, of the very same games.

    Raises:
        LookupError: ale-py has no such game.
        ValueError: `seed` is not one that the emulator can take.
    Source: Bellemare et al. 2013 (ALE); Mnih et al. 2015 for the preprocessing; ale-py 0.12.1 `vector_env`. How it
        differs from SB3's `make_atari_env`: `benchmarks/atari_parity.py`.
    """

    def __init__(
        self,
        config: EnvConfig,
        n_envs: int,
        *,
        training: bool,
        n_threads: int = 2,
        seed: int | None = None,
        picture: bool = False,
    ) -> None:
        _rom_path(config.game)
        self.config = config
        self.training = training
        self._games = _emulators(config, n_envs, n_threads, picture)
        self.action_meanings = [action.name for action in self._games.ale.get_action_set()]
        self._fire = self.action_meanings.index("FIRE") if "FIRE" in self.action_meanings else None
        self.render_mode = None
        super().__init__(n_envs, self._games.single_observation_space, self._games.single_action_space)
        self._started = False
        self._stepping = False
        self._scores = np.zeros(n_envs, dtype=np.float64)
        self._lengths = np.zeros(n_envs, dtype=np.int64)
        self._first_frames = np.zeros(n_envs, dtype=np.int32)
        self._must_fire = np.zeros(n_envs, dtype=bool)
        if seed is not None:
            self.seed(seed)

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Game i starts from `seed + i` at the next `reset`; None draws one from numpy's global generator, as SB3 does.

        Raises:
            ValueError: a seed is not in [0, 2**31).
        """
        if seed is None:
            seed = int(np.random.randint(_SEED_LIMIT - self.num_envs))
        wanted = np.asarray([seed + index for index in range(self.num_envs)])
        self._seeds = [int(value) for value in _checked_seeds(wanted, self.num_envs)]
        return self._seeds

    def reset(self) -> np.ndarray:
        """Starts all games afresh, from the seeds of `seed` if it was called since the last reset.

        Returns:
            (B, stack, 84, 84) uint8; older frames of the stack are black.
        """
        seeds = None if None in self._seeds else np.asarray(self._seeds)
        self._reset_seeds()
        self._reset_options()
        return self._start(np.arange(self.num_envs), seeds)

    def reset_games(self, games: np.ndarray | Sequence[int], seeds: np.ndarray | Sequence[int]) -> np.ndarray:
        """Starts some games afresh from given seeds, as a fresh environment would; the others stand still.

        Args:
            games: (n,) distinct indices, in any order.
            seeds: (n,) a seed for each of them, in [0, 2**31).

        Returns:
            (n, stack, 84, 84) uint8, of these games in the order given.

        Raises:
            ValueError: an index is unknown or repeated, or a seed is missing or not one that the emulator can take.
            RuntimeError: some games have never been started and are not among `games`.
        """
        chosen = np.asarray(games, dtype=np.int64)
        if chosen.ndim != 1 or len(set(chosen.tolist())) < chosen.size or not _within(chosen, self.num_envs):
            raise ValueError(
                f"`games` must be distinct indices below {self.num_envs}, got {chosen.tolist()}. Name each game once."
            )
        checked = _checked_seeds(np.asarray(seeds), chosen.size)
        if not self._started and chosen.size < self.num_envs:
            raise RuntimeError("`reset_games` needs started games, got none. Call `reset` first, or name all games.")
        if chosen.size == 0:
            return np.zeros((0, *(self.observation_space.shape or ())), dtype=np.uint8)
        return self._start(chosen, checked)

    def step_async(self, actions: np.ndarray) -> None:
        """Sends (B,) actions to the emulators, which run until `step_wait`.

        Raises:
            ValueError: not one action per game, or not one of the game's actions.
            RuntimeError: no `reset` yet, or a step is under way.
        """
        if not self._started or self._stepping:
            state = "a step under way" if self._stepping else "no game"
            raise RuntimeError(f"`step_async` needs started games that stand still, got {state}. Call `reset` first.")
        actions = np.asarray(actions)
        # ale-py 0.12.1 waits for ever on an action that the game does not have.
        n_actions = len(self.action_meanings)
        if actions.shape != (self.num_envs,) or actions.dtype.kind not in "iu" or not _within(actions, n_actions):
            raise ValueError(
                f"`actions` must be {self.num_envs} integers below {n_actions}, got {actions.tolist()}. "
                f"`{self.config.game}` has {', '.join(self.action_meanings)}."
            )
        if self._fire is not None and self._must_fire.any():
            actions = np.where(self._must_fire, self._fire, actions)
        self._games.send(actions.astype(np.int64))
        self._stepping = True

    def step_wait(self) -> VecEnvStepReturn:
        """Waits for the emulators.

        Returns:
            Observations (B, stack, 84, 84) uint8, of the next game where one ended; rewards (B,) float32, signs where
            `training`; dones (B,) bool; infos, with `terminal_observation` and `TimeLimit.truncated` where done.

        Raises:
            RuntimeError: `step_async` was not called.
        """
        if not self._stepping:
            raise RuntimeError("`step_wait` needs a step under way, got none. Call `step_async` first.")
        observations, rewards, terminated, truncated, info = self._games.recv()
        self._stepping = False
        self._scores += rewards
        self._lengths += 1
        # The emulator's total at which the game began; any restart moves it, however short the game was.
        first_frames = info["frame_number"] - info["episode_frame_number"]
        ended = first_frames != self._first_frames
        lost_life = terminated & ~ended
        self._first_frames = first_frames
        self._must_fire = lost_life & self.config.fire_after_life_loss
        dones = (ended | lost_life) if self.training else ended
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for index in np.flatnonzero(dones):
            # `final_obs` is written at true ends only; at a lost life it still holds an older game's picture.
            last = info["final_obs"] if ended[index] else observations
            infos[index]["terminal_observation"] = last[index].copy()
            infos[index]["TimeLimit.truncated"] = bool(truncated[index] and not terminated[index])
        for index in np.flatnonzero(ended):
            infos[index]["episode"] = {"r": float(self._scores[index]), "l": int(self._lengths[index]), "t": 0.0}
        self._scores[ended] = 0
        self._lengths[ended] = 0
        signal = np.sign(rewards) if self.training else rewards
        return np.asarray(observations), signal.astype(np.float32), dones, infos

    @property
    def fires_next(self) -> np.ndarray:
        """(B,) bool: games that lost a life, whose next action will be FIRE in place of the one sent."""
        return self._must_fire & (self._fire is not None)

    def close(self) -> None:
        """Lets the emulators and their threads go; the environment cannot be used afterwards."""
        self._started = self._stepping = False
        if hasattr(self, "_games"):
            del self._games

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The same attribute for every game asked for; the games have no Python objects of their own."""
        if not hasattr(self, attr_name):
            raise AttributeError(
                f"`attr_name` must name an attribute of {type(self).__name__}, got {attr_name!r}. "
                "Games of one emulator pool have no Python objects of their own to ask."
            )
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Refused: games of one emulator pool cannot differ."""
        raise AttributeError(
            f"`{attr_name}` cannot be set on games of one emulator pool, got {value!r}. Build another environment."
        )

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Refused: games of one emulator pool have no methods of their own."""
        raise AttributeError(
            f"`method_name` cannot be called on games of one emulator pool, got {method_name!r}. "
            f"Call it on the {type(self).__name__}, if it has it."
        )

    def env_is_wrapped(self, wrapper_class: type, indices: VecEnvIndices = None) -> list[bool]:
        """A `Monitor` counts as present: `info["episode"]` is about full, unclipped games, as a `Monitor` inside is."""
        return [issubclass(wrapper_class, Monitor) for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[np.ndarray | None]:
        """No pictures from the vectorised emulator; `rlexit video` plays one game with colours."""
        return [None] * self.num_envs

    def _start(self, games: np.ndarray, seeds: np.ndarray | None) -> np.ndarray:
        if self._stepping:
            self._games.recv()
            self._stepping = False
        mask = np.zeros(self.num_envs, dtype=bool)
        mask[games] = True
        # ale-py matches seeds to the mask in the order of the games, and answers for all games.
        ordered = None if seeds is None else seeds[np.argsort(games)]
        observations, info = self._games.reset(seed=ordered, options=None if mask.all() else {"reset_mask": mask})
        self._started = True
        self._scores[games] = 0
        self._lengths[games] = 0
        self._must_fire[games] = False
        self._first_frames[games] = (info["frame_number"] - info["episode_frame_number"])[games]
        started: np.ndarray = observations[games]
        return started


_shelf: dict[tuple[EnvConfig, int], list[AtariVecEnv]] = {}


@contextmanager
def borrowed(config: EnvConfig, n_envs: int) -> Iterator[AtariVecEnv]:
    """An environment of full games that goes back on a shelf afterwards: to make 32 emulators takes three seconds.

    Start its games by `reset_games`: what an earlier borrower left in it is then gone.
    """
    idle = _shelf.setdefault((config, n_envs), [])
    env = idle.pop() if idle else AtariVecEnv(config, n_envs, training=False)
    sound = False
    try:
        yield env
        sound = True
    except GeneratorExit:  # nobody wants more of its games
        sound = True
        raise
    finally:
        if sound:
            idle.append(env)
        else:
            env.close()


def _emulators(config: EnvConfig, n_envs: int, n_threads: int, picture: bool) -> AtariVectorEnv:
    """The emulators of a protocol; what they show has no influence on the games."""
    colours: dict[str, Any] = {"img_height": 210, "img_width": 160, "grayscale": False, "stack_num": 1}
    return AtariVectorEnv(
        config.game,
        n_envs,
        num_threads=min(n_threads, n_envs),
        max_num_frames_per_episode=config.max_frames,
        repeat_action_probability=config.sticky,
        full_action_space=config.full_action_space,
        autoreset_mode=AutoresetMode.SAME_STEP,
        frameskip=config.frame_skip,
        noop_max=config.noop_max,
        episodic_life=False,
        life_loss_info=True,
        reward_clipping=False,
        use_fire_reset=config.fire_on_reset,
        **(colours if picture else {"stack_num": config.frame_stack}),
    )


def _rom_path(game: str) -> Path:
    games = known_games()
    if game not in games:
        bare = re.split(r"NoFrameskip|Deterministic|-v\d", game.split("/")[-1])[0].lower()
        near = difflib.get_close_matches(bare, games, n=3, cutoff=0.5)
        hint = f"Nearest: {', '.join(near)}. " if near else ""
        raise LookupError(
            f"`env.game` must be one of ale-py's games, got {game!r}. {hint}`rlexit list games` shows them all."
        )
    return Path(str(roms.get_rom_path(game)))


def _within(values: np.ndarray, limit: int) -> bool:
    return bool(((values >= 0) & (values < limit)).all())


def _checked_seeds(seeds: np.ndarray, count: int) -> np.ndarray:
    integers = seeds.dtype.kind in "iu" or seeds.size == 0
    if seeds.shape != (count,) or not integers or not _within(seeds, _SEED_LIMIT):
        raise ValueError(
            f"`seeds` must be {count} integers in [0, 2**31), one per game, got {seeds.tolist()}. Pass other seeds."
        )
    return seeds.astype(np.int32)

"""How far agents/envs.py differs from stable-baselines3's Atari wrappers, game by game.

    python -m benchmarks.atari_parity --steps 5000 --out parity.md

Both sides play the same random actions without sticky actions and no-ops. SB3's wrappers take steps of their own: FIRE
and then action 2 at the start of a game, a NOOP before them after a lost life. Ours does not, so these steps are handed
to it here ("frame offset"); every other step of the two ends at the same emulator frame and is compared. The last
column hands ALE's own grey to SB3's wrappers: what is left of a difference there is not one of grey conversion.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ale_py
import gymnasium
import numpy as np
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecTransposeImage

from agents.config import EnvConfig
from agents.envs import AtariVecEnv

PAPER_GAMES = ["air_raid", "breakout", "ms_pacman", "phoenix", "pong", "qbert", "riverraid", "seaquest"]
STACK = 4
SKIP = 4
NOOP, FIRE, SECOND = 0, 1, 2

gymnasium.register_envs(ale_py)


class AleGrey(gymnasium.ObservationWrapper[np.ndarray, int, np.ndarray]):
    """ALE's own grey screen in three equal channels: SB3's later conversion to grey then changes nothing."""

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return np.repeat(self.unwrapped.ale.getScreenGrayscale()[:, :, None], 3, axis=2)  # type: ignore[attr-defined]


@dataclass
class Parity:
    """What one comparison saw; a frame here is the newest 84 x 84 picture of an observation."""

    steps: int = 0
    ends: int = 0
    reward_differences: int = 0
    done_differences: int = 0
    frames: int = 0
    first_difference: int | None = None
    different_pixels: int = 0
    absolute_difference: int = 0
    max_difference: int = 0
    start_offset: int = 0
    life_offset: int = 0
    stack_differences: int = 0
    games: int = 0
    equal_scores: int = 0

    def compare_frames(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        """Counts the differences of two (84, 84) uint8 frames."""
        difference = np.abs(ours.astype(np.int64) - theirs)
        if self.first_difference is None and difference.any():
            self.first_difference = self.steps
        self.frames += 1
        self.different_pixels += int((difference > 0).sum())
        self.absolute_difference += int(difference.sum())
        self.max_difference = max(self.max_difference, int(difference.max()))

    @property
    def pixels(self) -> int:
        """Pixels compared."""
        return self.frames * 84 * 84


def build_theirs(game: str, *, training: bool, ale_grey: bool = False) -> VecEnv:
    """SB3's `make_atari_env` + `VecFrameStack(4)`, channels first, one game without chance."""
    name = "".join(part.capitalize() for part in game.split("_"))

    def base() -> gymnasium.Env[Any, Any]:
        env = gymnasium.make(f"ALE/{name}-v5", frameskip=1, repeat_action_probability=0.0, full_action_space=False)
        return AleGrey(env) if ale_grey else env

    wrappers = {"noop_max": 0, "terminal_on_life_loss": training, "clip_reward": training}
    return VecTransposeImage(VecFrameStack(make_atari_env(base, n_envs=1, seed=0, wrapper_kwargs=wrappers), STACK))


def build_ours(game: str, *, training: bool) -> AtariVecEnv:
    """The adapter with the same rules; FIRE is pressed by the comparison, as SB3's wrappers press it."""
    config = EnvConfig(game, sticky=0.0, noop_max=0, fire_on_reset=False, fire_after_life_loss=False)
    return AtariVecEnv(config, 1, training=training, n_threads=1, seed=0)


def restart(ours: AtariVecEnv, observation: np.ndarray, *, lost_life: bool) -> tuple[np.ndarray, int]:
    """Takes the steps that SB3's wrappers take by themselves at the start of a game or after a lost life.

    Returns:
        The observation after them, and how many there were.
    Source: stable-baselines3 2.9, `EpisodicLifeEnv.reset` and `FireResetEnv.reset`.
    """
    taken = 0

    def step(action: int) -> dict[str, Any] | None:
        nonlocal observation, taken
        stepped, _, dones, infos = ours.step(np.array([action]))
        observation = np.asarray(stepped)
        taken += 1
        return infos[0] if dones[0] else None

    def begin(after: dict[str, Any] | None) -> None:
        if after is not None and "episode" not in after:
            step(NOOP)

    begin({} if lost_life else None)
    if "FIRE" in ours.action_meanings:
        for action in (FIRE, SECOND):
            begin(step(action))
    return observation, taken


def play(game: str, steps: int, *, training: bool, ale_grey: bool = False, seed: int = 0) -> Parity:
    """Compares the two over `steps` random actions; `training`: lost lives end episodes and rewards are signs."""
    result = Parity()
    theirs, ours = build_theirs(game, training=training, ale_grey=ale_grey), build_ours(game, training=training)
    random = np.random.default_rng(seed)
    their_picture = np.asarray(theirs.reset())
    our_picture, hidden = restart(ours, ours.reset(), lost_life=False)
    result.start_offset = SKIP * hidden
    result.compare_frames(our_picture[0, -1], their_picture[0, -1])
    since_start = 0
    for _ in range(steps):
        action = random.integers(len(ours.action_meanings), size=1)
        their_observation, their_rewards, their_dones, their_infos = theirs.step(action)
        our_observation, our_rewards, our_dones, our_infos = ours.step(action)
        our_picture, their_picture = np.asarray(our_observation), np.asarray(their_observation)
        result.steps += 1
        since_start += 1
        result.reward_differences += int(our_rewards[0] != their_rewards[0])
        if our_dones[0] != their_dones[0]:
            result.done_differences += 1
            break  # two different games from here on
        if our_dones[0]:
            result.ends += 1
            since_start = 0
            lost_life = "episode" not in our_infos[0]
            if not lost_life:
                their_score = their_infos[0].get("episode", {}).get("r")
                result.games += 1
                result.equal_scores += int(our_infos[0]["episode"]["r"] == their_score)
            our_picture, hidden = restart(ours, our_picture, lost_life=lost_life)
            if lost_life:
                result.life_offset = SKIP * hidden
        result.compare_frames(our_picture[0, -1], their_picture[0, -1])
        # SB3 starts a stack of black frames after every end; ours has seen the steps between.
        if since_start >= STACK - 1:
            result.stack_differences += int(not np.array_equal(our_picture, their_picture))
    theirs.close()
    ours.close()
    return result


def row(game: str, steps: int, seed: int) -> str:
    """One line of the table: training and evaluation rules with SB3's grey, training rules with ALE's grey."""
    modes = [play(game, steps, training=training, seed=seed) for training in (True, False)]
    grey = play(game, steps, training=True, ale_grey=True, seed=seed)
    training = modes[0]
    cells = [
        game,
        " / ".join(str(mode.steps) for mode in modes),
        " / ".join(str(mode.ends) for mode in modes),
        " / ".join(str(mode.reward_differences) for mode in modes),
        " / ".join(str(mode.done_differences) for mode in modes),
        f"{sum(mode.equal_scores for mode in modes)} of {sum(mode.games for mode in modes)}",
        f"{training.start_offset} / {training.life_offset or '-'}",
        f"{100 * training.different_pixels / training.pixels:.2f} %",
        f"{training.absolute_difference / training.pixels:.4f}",
        str(training.max_difference),
        "never" if training.first_difference is None else str(training.first_difference),
        str(grey.different_pixels),
    ]
    return f"| {' | '.join(cells)} |"


HEADER = """\
| game | steps, training / evaluation | ends | rewards that differ | dones that differ | games, equal scores \
| frame offset, start / lost life | different pixels | mean abs. difference | max | first at step \
| different pixels with ALE's grey |
|---|---|---|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", nargs="+", default=PAPER_GAMES, help="ale-py's names (default: the paper's eight)")
    parser.add_argument("--steps", type=int, default=2000, help="env steps per comparison (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random actions (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    arguments = parser.parse_args()
    lines = [HEADER]
    print(HEADER)
    for game in arguments.games:
        lines.append(row(game, arguments.steps, arguments.seed))
        print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

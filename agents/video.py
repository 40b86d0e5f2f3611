"""The annotated episode of an exiting actor: where each step left, how sure it was and what it cost."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from PIL.ImageColor import getrgb

from agents.config import EnvConfig
from agents.envs import AtariVecEnv
from agents.panel import THEME, Panel, Step
from agents.rollouts import draw
from rlexit.checkpoint import write_atomic
from rlexit.exit_policy import ExitPolicy
from rlexit.network import StagedNetwork
from rlexit.runtime import run

FRAME_MS = 70  # GIF counts in hundredths of a second; 4 frames at 60 Hz are 67 ms
LAST_FRAME_MS = 2000
MAX_BYTES = 4_000_000
SCALES = (1.0, 0.75, 0.5, 0.35)
# One entry of the 256 is left for GIF's transparency: what did not change is not stored again.
MAX_COLOURS = 255
# Pillow looks up the nearest colour in cells of 4 x 4 x 4; entries nearer than two cells would be taken for each other.
COLOUR_DISTANCE = 8


@dataclass(frozen=True)
class Film:
    """One episode, or its beginning, of T steps by a network of K exits.

    Args:
        frames: T pictures of one size, with one palette.
        exits: (T,) exit index at which each step left; K where it repeated its answer.
        confidences: (T, K) the rule's score at each exit, NaN where none was computed.
        actions: (T,) what the actor chose.
        rewards: (T,) unclipped.
        relative_macs: (T,) multiply-adds of each step, the full network being 1.
    """

    frames: Sequence[Image.Image] = field(repr=False)
    exits: Int[np.ndarray, " steps"]
    confidences: Float[np.ndarray, "steps exits"]
    actions: Int[np.ndarray, " steps"]
    rewards: Float[np.ndarray, " steps"]
    relative_macs: Float[np.ndarray, " steps"]

    def save(self, path: Path, max_bytes: int = MAX_BYTES) -> list[Path]:
        """Writes an animated WebP and GIF at the games' own speed; the last frame stands for two seconds.

        Args:
            path: without suffix; its folder is made if missing.
            max_bytes: a larger file is made again in smaller sizes, down to about a third of the width.
        Returns:
            The paths of the WebP and of the GIF.
        """
        made = []
        for suffix, options in (("webp", {"lossless": True, "quality": 30, "method": 2}), ("gif", {"optimize": True})):
            for scale in SCALES:
                data = self._encoded(suffix, scale, options)
                if len(data) <= max_bytes:
                    break
            made.append(path.with_name(f"{path.name}.{suffix}"))
            write_atomic(made[-1], data)
        return made

    def _encoded(self, suffix: str, scale: float, options: dict[str, Any]) -> bytes:
        first, *others = self.frames if scale == 1 else [_scaled(frame, scale) for frame in self.frames]
        if suffix == "gif":
            # Without it, Pillow stores the palette once per frame.
            options = {**options, "palette": bytes(first.getpalette(None) or ())}
        durations = [*[FRAME_MS] * len(others), LAST_FRAME_MS]
        buffer = io.BytesIO()
        first.save(buffer, suffix, save_all=True, append_images=others, duration=durations, loop=0, **options)
        return buffer.getvalue()


def film(
    config: EnvConfig,
    network: StagedNetwork,
    policy: ExitPolicy,
    seed: int,
    action_meanings: Sequence[str],
    full_macs: int,
    max_steps: int = 450,
    title: str = "",
    *,
    sampled: bool = False,
) -> Film:
    """Plays one game as an evaluation does and draws every step of it.

    Args:
        config: the protocol.
        network: in evaluation mode.
        policy: who leaves where.
        seed: of the environment; the same game as `rollouts.play` plays from it.
        action_meanings: names of the actions.
        full_macs: of the full, head-free network.
        max_steps: the film ends here if the game does not.
        title: printed above the panel.
        sampled: draw actions from the answer in place of the likeliest.
    Raises:
        ValueError: `max_steps` is not positive.
        RuntimeError: the picture left the game that the actor plays.
    """
    if max_steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {max_steps}. Ask for some env steps.")
    steps: list[Step] = []
    for step in play(config, network, policy, seed, full_macs, sampled):
        steps.append(step)
        if len(steps) == max_steps:
            break
    names = (*network.exit_names[:-1], "full")
    panel = Panel(steps, policy, names, action_meanings, config.game.replace("_", " ").title(), title)
    palette = _palette(panel, [step.screen for step in steps[::4]])
    return Film(
        frames=[panel.draw(index).quantize(palette=palette, dither=Image.Dither.NONE) for index in range(len(steps))],
        exits=np.array([step.exit for step in steps]),
        confidences=np.stack([step.scores for step in steps]),
        actions=np.array([step.action for step in steps]),
        rewards=np.array([step.reward for step in steps]),
        relative_macs=np.array([step.relative_macs for step in steps]),
    )


def play(
    config: EnvConfig, network: StagedNetwork, policy: ExitPolicy, seed: int, full_macs: int, sampled: bool = False
) -> Iterator[Step]:
    """Plays one game to its end in two emulators side by side: one for the actor's eyes, one for people's.

    Args:
        config: the protocol.
        network: in evaluation mode.
        policy: who leaves where.
        seed: of both emulators.
        full_macs: of the full, head-free network.
        sampled: draw actions from the answer in place of the likeliest.
    Yields:
        Each step with the picture on which it was decided and the reward that followed.
    Raises:
        RuntimeError: the two emulators came to different rewards or ends.
    """
    acting = AtariVecEnv(config, 1, training=False, n_threads=1)
    shown = AtariVecEnv(config, 1, training=False, n_threads=1, picture=True)
    generator = np.random.default_rng(seed)
    try:
        observation: Any = acting.reset_games([0], [seed])
        picture: Any = shown.reset_games([0], [seed])
        ended, memory = False, None
        while not ended:
            result = run(network, policy, torch.from_numpy(observation), memory=memory)
            memory = result.memory
            probabilities = result.answers[0].exp().numpy()
            action = draw(generator, probabilities) if sampled else int(probabilities.argmax())
            forced, screen = bool(acting.fires_next[0]), picture[0, 0]
            for env in (acting, shown):
                env.step_async(np.array([action]))
            observation, rewards, ends, _ = acting.step_wait()
            picture, same_rewards, same_ends, _ = shown.step_wait()
            if (rewards, ends) != (same_rewards, same_ends):
                raise RuntimeError(
                    f"`picture` must show the game that is played, got reward {same_rewards[0]} beside {rewards[0]}. "
                    "Report this with the ale-py version."
                )
            ended = bool(ends[0])
            yield Step(
                screen=screen,
                exit=int(result.exits[0]),
                scores=result.scores[0].numpy(),
                action=action,
                probability=float(probabilities[action]),
                forced=forced,
                reward=float(rewards[0]),
                relative_macs=int(result.macs[0]) / full_macs,
            )
    finally:
        acting.close()
        shown.close()


def _palette(panel: Panel, screens: Iterable[UInt8[np.ndarray, "210 160 3"]]) -> Image.Image:
    """One palette for all frames: the panel's own colours, then the game's commonest, then the edges of the letters."""
    samples = np.linspace(0, panel.steps - 1, min(panel.steps, 16)).astype(int)
    chosen = np.array([getrgb(colour) for colour in (*THEME, *panel.colours)])
    for pictures, limit in ((map(Image.fromarray, screens), 160), (map(panel.draw, samples), MAX_COLOURS)):
        for colour in _ranked(pictures):
            if len(chosen) == limit:
                break
            if np.abs(chosen - colour).max(axis=1).min() >= COLOUR_DISTANCE:
                chosen = np.vstack([chosen, colour])
    image = Image.new("P", (1, 1))
    image.putpalette(chosen.astype(np.uint8).tobytes())
    return image


def _ranked(pictures: Iterable[Image.Image]) -> list[tuple[int, int, int]]:
    """All colours of some RGB pictures, the commonest first."""
    counts: Counter[Any] = Counter()
    for picture in pictures:
        for count, colour in picture.getcolors(picture.width * picture.height) or ():
            counts[colour] += count
    return [colour for colour, _ in counts.most_common()]


def _scaled(frame: Image.Image, scale: float) -> Image.Image:
    size = round(frame.width * scale), round(frame.height * scale)
    small = frame.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    return small.quantize(palette=frame, dither=Image.Dither.NONE)

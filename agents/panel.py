"""The picture of one step: the game, a ladder of exits, the compute, and a strip of the steps before."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageColor import getrgb
from PIL.ImageFont import FreeTypeFont

from rlexit.exit_policy import ExitPolicy
from rlexit.plots import REUSED, exit_colours

GROUND, TRACK, LINE, DIM, MID, INK = "#14161b", "#262a33", "#3a404d", "#8d94a5", "#b9bfcc", "#f0f2f6"
GAIN, LOSS = "#ffc857", "#ff6b6b"
THEME = (GROUND, TRACK, LINE, DIM, MID, INK, GAIN, LOSS)

MARGIN = 20
SCREEN_TOP, SCREEN_WIDTH, SCREEN_HEIGHT = 52, 320, 420
PANEL, PANEL_WIDTH = MARGIN + SCREEN_WIDTH + 24, 336
RIGHT, BOTTOM = PANEL + PANEL_WIDTH, SCREEN_TOP + SCREEN_HEIGHT
SIZE = (RIGHT + MARGIN, BOTTOM + 102)
LADDER_TOP, LADDER_HEIGHT, ROW_HEIGHT = SCREEN_TOP + 108, 204, 68
BADGE, BAR, BAR_WIDTH = PANEL + 22, PANEL + 124, 158
COMPUTE_TOP = SCREEN_TOP + 344
CELL, CELL_TOP, CELL_HEIGHT = 5, BOTTOM + 62, 18
CELLS = (RIGHT - MARGIN) // CELL


@dataclass(frozen=True)
class Step:
    """One step of one game.

    Args:
        screen: (210, 160, 3) what the step was decided on, in colours.
        exit: index at which it left; K where it repeated the answer of the step before.
        scores: (K,) of the rule, NaN where none was computed.
        action: index of the action chosen.
        probability: of that action.
        forced: the protocol pressed FIRE in its place, for a life was lost.
        reward: unclipped, that followed.
        relative_macs: multiply-adds executed, the full network being 1.
    """

    screen: UInt8[np.ndarray, "210 160 3"]
    exit: int
    scores: Float[np.ndarray, " exits"]
    action: int
    probability: float
    forced: bool
    reward: float
    relative_macs: float


def panel_colours(exits: int) -> list[str]:
    """The exits' colours of the plots, but for the last: nearly black on white paper, nearly white on dark ground."""
    return [*exit_colours(exits)[:-1], "#e4e7ef"]


class Panel:
    """Draws any step of an episode.

    Args:
        steps: of the episode; at least one.
        policy: gives the thresholds and the rule's name.
        names: K names of the exits.
        action_meanings: names of the actions.
        game: printed over the screen.
        title: printed over the panel.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        policy: ExitPolicy,
        names: Sequence[str],
        action_meanings: Sequence[str],
        game: str,
        title: str = "",
    ) -> None:
        self._steps, self._policy, self._names, self._game, self._title = steps, policy, names, game, title
        self._actions = [" ".join(re.findall("NOOP|FIRE|UP|DOWN|LEFT|RIGHT", name)) or name for name in action_meanings]
        self.colours = [*panel_colours(len(names)), REUSED]
        relative = np.array([step.relative_macs for step in steps])
        self._means = relative.cumsum() / np.arange(1, len(steps) + 1)
        self._longest = max(1.0, float(relative.max()))
        self._totals = np.cumsum([step.reward for step in steps])
        self._told = _spaced([step.reward for step in steps])
        self._row = min(ROW_HEIGHT, LADDER_HEIGHT // len(names))

    @property
    def steps(self) -> int:
        """T, the number of steps."""
        return len(self._steps)

    def draw(self, index: int) -> Image.Image:
        """The picture of step `index`, RGB of `SIZE`."""
        image = Image.new("RGB", SIZE, GROUND)
        draw = ImageDraw.Draw(image)
        step = self._steps[index]
        screen = Image.fromarray(step.screen).resize((SCREEN_WIDTH, SCREEN_HEIGHT), Image.Resampling.NEAREST)
        image.paste(screen, (MARGIN, SCREEN_TOP))
        self._header(draw, index)
        self._action(draw, step)
        self._ladder(draw, step)
        self._compute(draw, step, float(self._means[index]))
        self._strip(draw, index)
        return image

    def badge(self, exit: int) -> tuple[int, int, int, int]:
        """Box (left, top, right, bottom) of an exit's name; filled with its colour where the step left there."""
        middle, half = self._middle(exit), min(16, self._row // 2 - 2)
        return BADGE, middle - half, BADGE + 88, middle + half

    def bar(self, exit: int) -> tuple[int, int, int, int]:
        """Box of the bar of an exit's score."""
        middle, half = self._middle(exit), min(7, self._row // 2 - 5)
        return BAR, middle - half, BAR + BAR_WIDTH, middle + half

    def cell(self, age: int) -> tuple[int, int, int, int]:
        """Box of a step in the strip, `age` steps ago."""
        left = RIGHT - (age + 1) * CELL
        return left, CELL_TOP, left + CELL - 2, CELL_TOP + CELL_HEIGHT

    def _middle(self, exit: int) -> int:
        return LADDER_TOP + self._row * exit + self._row // 2

    def _header(self, draw: ImageDraw.ImageDraw, index: int) -> None:
        base = SCREEN_TOP - 16
        score = f"score {self._totals[index]:,.0f}"
        _text(draw, (MARGIN + SCREEN_WIDTH, base), score, 20, INK, "rs")
        room = SCREEN_WIDTH - _width(score, 20) - 12
        _text(draw, (MARGIN, base), _fitted(self._game, 20, room), 20, INK, "ls")
        count = f"step {index + 1}"
        _text(draw, (RIGHT, base), count, 14, DIM, "rs")
        room = PANEL_WIDTH - _width(f"step {len(self._steps)}", 14) - 12
        _text(draw, (PANEL, base), _fitted(self._title, 14, room), 14, MID, "ls")

    def _action(self, draw: ImageDraw.ImageDraw, step: Step) -> None:
        top = SCREEN_TOP + 4
        name = "FIRE" if step.forced else self._actions[step.action]
        told = "after a lost life" if step.forced else f"p = {step.probability:.2f}"
        _text(draw, (PANEL, top), "action", 13, DIM, "lt")
        _text(draw, (PANEL, top + 46), name, 28, INK, "ls")
        _text(draw, (RIGHT, top + 46), told, 16, MID, "rs")

    def _ladder(self, draw: ImageDraw.ImageDraw, step: Step) -> None:
        top, last = LADDER_TOP - 12, len(self._names) - 1
        _text(draw, (PANEL, top), "exit", 13, DIM, "ls")
        _text(draw, (BAR, top), self._policy.rule, 13, DIM, "ls")
        rail, ends = PANEL + 7, [self._middle(0) - self._row // 2 + 6, self._middle(last)]
        draw.line((rail, ends[0], rail, ends[1]), LINE, 2)
        if step.exit <= last:
            draw.line((rail, ends[0], rail, self._middle(step.exit)), self.colours[step.exit], 2)
        else:
            _text(draw, (RIGHT, top), "repeats its answer", 16, self.colours[step.exit], "rs")
        for exit, name in enumerate(self._names):
            self._rung(draw, step, exit, name)

    def _rung(self, draw: ImageDraw.ImageDraw, step: Step, exit: int, name: str) -> None:
        taken, reached, colour = exit == step.exit, exit <= step.exit < len(self._names), self.colours[exit]
        middle, rail = self._middle(exit), PANEL + 7
        outline = self.colours[step.exit] if reached else LINE
        draw.ellipse((rail - 5, middle - 5, rail + 5, middle + 5), colour if taken else GROUND, outline, 2)
        left, top, right, bottom = box = self.badge(exit)
        if taken:
            draw.rounded_rectangle(box, 5, colour)
        else:
            draw.rounded_rectangle(box, 5, GROUND, LINE)
            draw.rectangle((left + 6, top + 6, left + 9, bottom - 6), colour)
        ink = _ink_on(colour) if taken else MID if reached else DIM
        size = 16 if self._row >= 28 else 12
        _text(draw, ((left + right) // 2 + 4 * (not taken), middle), _fitted(name, size, 72), size, ink, "mm")
        if exit == len(self._names) - 1:
            _text(draw, (BAR, middle), "answers all that is left", 13, MID if taken else DIM, "lm")
            return
        self._bar(draw, exit, float(step.scores[exit]), taken)

    def _bar(self, draw: ImageDraw.ImageDraw, exit: int, score: float, taken: bool) -> None:
        threshold = self._policy.thresholds[exit]
        left, top, right, bottom = box = self.bar(exit)
        if threshold == math.inf and math.isnan(score):
            _text(draw, (BAR, (top + bottom) // 2), "closed", 13, DIM, "lm")
            return
        low, high = self._policy.scorer.span

        def share(value: float) -> float:
            return min(1.0, max(0.0, (value - low) / (high - low)))

        draw.rectangle(box, TRACK)
        if not math.isnan(score):
            colour = self.colours[exit] if taken else LINE
            draw.rectangle((left, top, left + round(share(score) * (right - left)), bottom), colour)
            _text(draw, (RIGHT, (top + bottom) // 2), f"{score:.2f}", 16, INK if taken else MID, "rm")
        if math.isfinite(threshold):
            place = left + round(share(threshold) * (right - left))
            draw.line((place, top - 4, place, bottom + 4), INK, 2)
        if self._row >= 48:
            told = {math.inf: "closed", -math.inf: "everybody leaves"}.get(threshold, f"leaves above {threshold:.2f}")
            _text(draw, (BAR, bottom + 16), told, 12, DIM, "ls")

    def _compute(self, draw: ImageDraw.ImageDraw, step: Step, mean: float) -> None:
        top = COMPUTE_TOP
        _text(draw, (PANEL, top), "compute", 13, DIM, "ls")
        _text(draw, (RIGHT, top), "full network = 1", 13, DIM, "rs")
        for line, (name, value, colour) in enumerate(
            (("this step", step.relative_macs, self.colours[step.exit]), ("mean so far", mean, DIM))
        ):
            middle = top + 26 + 32 * line
            _text(draw, (PANEL, middle), name, 16, MID, "lm")
            draw.rectangle((BAR, middle - 7, BAR + BAR_WIDTH, middle + 7), TRACK)
            draw.rectangle((BAR, middle - 7, BAR + round(value / self._longest * BAR_WIDTH), middle + 7), colour)
            whole = BAR + round(BAR_WIDTH / self._longest)
            draw.line((whole, middle - 11, whole, middle + 11), INK, 2)
            _text(draw, (RIGHT, middle), f"{value:.2f}", 16, INK, "rm")

    def _strip(self, draw: ImageDraw.ImageDraw, index: int) -> None:
        seen = self._steps[: index + 1]
        _text(draw, (MARGIN, BOTTOM + 28), f"exits of the last {CELLS} steps, under their rewards", 13, DIM, "ls")
        right = RIGHT
        for exit in reversed(range(len(self._names))):
            share = np.mean([step.exit == exit for step in seen])
            _text(draw, (right, BOTTOM + 28), f"{share:.0%}", 13, MID, "rs")
            draw.rectangle((right - 50, BOTTOM + 18, right - 41, BOTTOM + 27), self.colours[exit])
            right -= 64
        _text(draw, (right, BOTTOM + 28), "so far", 13, DIM, "rs")
        draw.rectangle((MARGIN, CELL_TOP, RIGHT - 2, CELL_TOP + CELL_HEIGHT), TRACK)
        for age, step in enumerate(reversed(seen[-CELLS:])):
            left, top, right, _ = box = self.cell(age)
            draw.rectangle(box, self.colours[step.exit])
            if step.reward:
                colour = GAIN if step.reward > 0 else LOSS
                draw.rectangle((left, top - 8, right, top - 4), colour)
                told = f"{step.reward:+,.0f}"
                middle, half = (left + right) // 2, _width(told, 12) // 2
                if index - age in self._told and middle - half >= MARGIN and middle + half <= RIGHT:
                    _text(draw, (middle, top - 11), told, 12, colour, "ms")


def _spaced(rewards: Sequence[float]) -> set[int]:
    """Steps whose rewards have room for a number: chosen once, so that no number comes and goes while it moves."""
    told, free = set(), -math.inf
    for index, reward in enumerate(rewards):
        half = _width(f"{reward:+,.0f}", 12) / 2 / CELL + 1
        if reward and index - half >= free:
            told.add(index)
            free = index + half
    return told


@lru_cache
def _font(size: int) -> FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, FreeTypeFont):
        raise ImportError("`pillow` must have FreeType to write on pictures, got none. Install a usual wheel.")
    return font


def _text(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, colour: str, anchor: str) -> None:
    draw.text(place, text, colour, _font(size), anchor)


def _width(text: str, size: int) -> int:
    return math.ceil(_font(size).getlength(text))


def _fitted(text: str, size: int, room: int) -> str:
    while text and _width(text, size) > room:
        text = text.rstrip("…")[:-1].rstrip() + "…" if len(text) > 1 else ""
    return text


def _ink_on(colour: str) -> str:
    return GROUND if np.dot(getrgb(colour)[:3], (0.299, 0.587, 0.114)) > 140 else INK

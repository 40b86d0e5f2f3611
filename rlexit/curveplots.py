"""Pictures of how networks were trained and how far their confidence can be trusted."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rlexit import metrics
from rlexit.plots import BLUE, GREY, INK, ORANGE, STYLE, drawn_handles, exit_colours, legend_below, new_figure, some_of
from rlexit.rows import ReliabilityRow

CURVES = (  # tags, label of the vertical and of the horizontal axis, name of a curve from the tag's group
    (re.compile(r"(rollout/ep_rew_mean|eval/return_mean)$"), "score per episode", "env steps", "{}"),
    (re.compile(r"distill/(?:kl|loss)/exit(\d+)$"), "KL or loss (nats)", "training samples", "exit {}"),
    (re.compile(r"distill/agree/exit(\d+)$"), "same answer as the teacher (share)", "training samples", "exit {}"),
    (re.compile(r"((?:train|held_out|gating|refine)/accuracy)$"), "accuracy (share of rows)", "training samples", "{}"),
    (re.compile(r"(gating/relative_cost|refine/relative_macs)$"), "compute / full network", "training samples", "{}"),
    (re.compile(r"gate/open_frac/(.+)$"), "gate open (share of rows)", "training samples", "before {}"),
)
MAX_PANELS = 4
Scalars = Sequence[tuple[int, str, float]]


def learning_curves(seeds: Sequence[Scalars], title: str = "") -> Figure | None:
    """Curves of one run over its seeds: a teacher's score or accuracy, what exits learn, what gates do.

    Args:
        seeds: (step, tag, value) triples, one list per training seed.
        title: printed above, on the left; the number of seeds is added.
    Returns:
        One panel per kind of curve that is present, thin lines for seeds and a thick one for their mean; None if
        there is nothing to draw.
    """
    panels = [(*spec[1:], found) for spec in CURVES if (found := _curves(seeds, spec[0]))]
    if not panels:
        return None
    with matplotlib.rc_context(STYLE):
        figure = new_figure(4.0)
        for axes, (label, steps, name, found) in zip(
            np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True
        ):
            colours = exit_colours(len(found) + 1) if name != "{}" else [INK, BLUE, ORANGE, GREY]
            named = some_of(len(found))
            for place, (colour, (key, curves)) in enumerate(zip(colours[: len(found)], found, strict=True)):
                _draw_curves(axes, curves, colour, name.format(key) if place in named else "")
            axes.set(xlabel=steps, ylabel=label)
            axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
            axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
        count = f"n = {len(seeds)} training seed{'' if len(seeds) == 1 else 's'}"
        figure.axes[0].set_title(f"{title}  ({count})" if title else count)
        legend_below(figure, drawn_handles(figure))
    return figure


def reliability(rows: Sequence[ReliabilityRow], title: str = "") -> Figure:
    """Confidence against agreement with the full network, over the share of rows per bin; a panel for each of some exits."""
    exits = sorted({row.exit for row in rows})
    with matplotlib.rc_context(STYLE):
        figure = new_figure(3.6)
        shown = some_of(len(exits), MAX_PANELS)
        colours = exit_colours(len(exits) + 1)
        panels = np.atleast_1d(figure.subplots(1, len(shown), sharey=True))
        for axes, place in zip(panels, shown, strict=True):
            exit, colour = exits[place], colours[place]
            lows, highs, counts, sure, agree = np.array([astuple(row)[1:] for row in rows if row.exit == exit]).T
            axes.axline((0, 0), slope=1, color=GREY, linestyle="--", linewidth=1)
            axes.bar(lows, counts / sum(counts), highs - lows, align="edge", color="#dddddd", label="share of rows")
            axes.plot(sure, agree, marker="o", color=colour, label=f"exit {exit}")
            error = metrics.expected_calibration_error(counts, sure, agree)
            axes.set(xlim=(0, 1), ylim=(0, 1.04), xlabel=f"confidence at exit {exit}\n(calibration error {error:.3f})")
        panels[0].set(ylabel="same as the full network (share)", title=title)
        legend_below(figure, drawn_handles(figure))
    return figure


def _curves(seeds: Sequence[Scalars], tags: re.Pattern[str]) -> list[tuple[str, list[NDArray[np.float64]]]]:
    """(key of the tag, one (2, steps) curve per seed that has it), keys in the order of their numbers."""
    found: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    for triples in seeds:
        curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for step, tag, value in triples:
            if (match := tags.match(tag)) and math.isfinite(value):
                curves[match[1]].append((step, value))
        for key, curve in curves.items():
            found[key].append(np.asarray(sorted(curve), dtype=float).T)
    return sorted(found.items(), key=lambda item: (len(item[0]), item[0]))


def _draw_curves(axes: Axes, curves: Sequence[NDArray[np.float64]], colour: str, label: str) -> None:
    """Thin lines for seeds and a thick one for their mean; without a label they are in no legend."""
    if len(curves) == 1:
        axes.plot(*curves[0], color=colour, label=label or None)
        return
    for steps, values in curves:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.45)
    # The mean stops where the shortest seed stops: beyond it, it would change its meaning.
    first, last = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
    grid = np.unique(np.concatenate([steps for steps, _ in curves]))
    grid = grid[(grid >= first) & (grid <= last)]
    mean = np.mean([np.interp(grid, steps, values) for steps, values in curves], axis=0)
    axes.plot(grid, mean, color=colour, linewidth=2.2, label=f"{label}, mean" if label else None)

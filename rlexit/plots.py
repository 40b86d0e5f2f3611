"""Pictures of operating points and episodes; every function returns a figure and touches no global state.

The house style: one fixed colour per method (Okabe-Ito, safe for colour-blind readers) and one marker, so that no
picture depends on colour alone; units on every axis; legends outside of the data.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, to_hex, to_rgb
from matplotlib.figure import Figure as Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray
from scipy import ndimage

from rlexit.metrics import Interval, Values
from rlexit.summary import RANDOM, RANDOM_EXIT, REFERENCES, STATIC, TEACHER, Point

INK, GREY, BLUE, GREEN, ORANGE, REUSED = "#1a1a1a", "#8c8c8c", "#0072b2", "#009e73", "#d55e00", "#d5d9e2"
METHODS = {  # name: (colour, marker)
    TEACHER: (INK, "*"),
    RANDOM: (GREY, "."),
    STATIC: (ORANGE, "s"),
    RANDOM_EXIT: ("#cc79a7", "X"),
    "sdn": ("#56b4e9", "^"),
    "ztw": (BLUE, "o"),
    "pbee": (GREEN, "D"),
    "learned": ("#e69f00", "v"),
}
SPARE = (("#882255", "P"), ("#44aa99", "<"), ("#999933", ">"), ("#332288", "h"), ("#aa4499", "p"), ("#117733", "d"))
RULE_LINES = ("-", "--", ":", "-.")
METRIC_LABELS = {"score": "score per episode (unclipped)", "accuracy": "accuracy (share of rows)"}
STYLE: dict[str, Any] = {
    **{"font.size": 11.0, "axes.titlesize": 12.0, "axes.titleweight": "bold", "axes.titlelocation": "left"},
    **{"legend.fontsize": 10.0, "xtick.labelsize": 10.0, "ytick.labelsize": 10.0, "legend.frameon": False},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#666666", "lines.linewidth": 1.8},
    **{"axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.8, "axes.axisbelow": True},
    # Names are data: a dollar in one must not start a formula. The salt makes equal figures equal files.
    **{"text.parse_math": False, "svg.hashsalt": "rlexit", "svg.fonttype": "path", "figure.facecolor": "white"},
}
MAX_NAMED = 8  # of the exits of a network, in a legend
WIDTH_INCHES = 9.0  # 900 px at the 100 px per inch of a page


def save(figure: Figure, folder: Path, name: str) -> tuple[Path, Path]:
    """Writes `<name>.svg` and `<name>.png` (150 dpi); equal figures give equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"{name}.svg", folder / f"{name}.png"
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a name in another script
        figure.savefig(paths[0], metadata={"Date": None})
        figure.savefig(paths[1], dpi=150, metadata={"Software": None})
    return paths


def pareto(points: Sequence[Point], title: str = "") -> Figure:
    """Value against compute for one task, and against measured latency in a second panel where there is any.

    One line per method and rule through its grid of thresholds; calibrated points are ringed; fixed exits are hollow.
    Error bars are 95 % intervals both ways. The random agent only sets the scale.

    Args:
        points: of one task, in one metric; at least one.
        title: printed above, on the left.
    """
    timed = any(not math.isnan(point.latency_us_p50) for point in points)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(5.0)
        panels = np.atleast_1d(figure.subplots(1, 2 if timed else 1, sharey=True))
        _pareto_panel(panels[0], points, lambda point: point.relative_macs)
        panels[0].set(xlabel="executed MACs per decision / full network", ylabel=METRIC_LABELS[points[0].metric])
        panels[0].set_title(title)
        if timed:
            _pareto_panel(panels[1], points, lambda point: Interval(point.latency_us_p50, math.nan, math.nan))
            panels[1].set_xlabel("latency p50 per decision (µs)")
        legend_below(figure, _pareto_handles(points))
    return figure


def exit_shares(points: Sequence[Point], title: str = "") -> Figure:
    """Stacked bars: where the decisions of each operating point leave."""
    shown = [point for point in points if point.exit_shares]
    colours = exit_colours(max((len(point.exit_shares) for point in shown), default=1))
    with matplotlib.rc_context(STYLE):
        figure, axes = _bars([(point.method, point.label) for point in shown], title)
        for row, point in enumerate(shown):
            left = 0.0
            for colour, share in zip((REUSED, *colours), (point.reuse_share, *point.exit_shares), strict=False):
                axes.barh(row, share, left=left, height=0.72, color=colour, edgecolor="white", linewidth=0.6)
                if share >= 0.06:
                    ink = "white" if np.dot(to_rgb(colour), (0.299, 0.587, 0.114)) < 0.55 else "black"
                    place = {"ha": "center", "va": "center_baseline"}
                    axes.text(left + share / 2, row, f"{share:.0%}", fontsize=9, color=ink, **place)
                left += share
        axes.set(xlim=(0, 1), xlabel="share of decisions")
        axes.xaxis.set_major_formatter(ticker.PercentFormatter(1.0))
        legend_below(figure, _exit_handles(colours, any(point.reuse_share for point in shown)))
    return figure


def exit_timeline(exits: Values, confidences: Values, rewards: Values, title: str = "") -> Figure:
    """One episode: score so far, the exit taken at each step, and the confidence of the answer that was acted on.

    Args:
        exits: (T,) exit index per step; -1 where the answer of the step before was repeated.
        confidences: (T,) the rule's score, mostly in [0, 1]; NaN where none was computed.
        rewards: (T,) unclipped.
        title: printed above, on the left.
    """
    taken, gained = np.asarray(exits, dtype=int), np.asarray(rewards, dtype=float)
    sure, score_so_far = np.asarray(confidences, dtype=float), np.cumsum(gained)
    steps, end = np.arange(len(taken)), max(len(taken), 1) - 0.5
    colours = exit_colours(int(taken.max(initial=0)) + 1)
    handles = _exit_handles(colours, bool((taken < 0).any()))
    with matplotlib.rc_context(STYLE):
        figure = new_figure(5.2)
        score, strip, confidence = figure.subplots(3, 1, sharex=True, height_ratios=(3, 0.8, 2))
        score.step(steps, score_so_far, where="post", color=INK)
        for sign, colour, marker, name in ((1, GREEN, "^", "reward > 0"), (-1, ORANGE, "v", "reward < 0")):
            at = np.flatnonzero(np.sign(gained) == sign)
            handles += score.plot(at, score_so_far[at], marker, color=colour, linestyle="none", label=name)
        score.set(ylabel="score so far")
        score.set_title(title)
        painted = {"cmap": ListedColormap([REUSED, *colours]), "vmin": -1.5, "vmax": len(colours) - 0.5}
        strip.imshow(taken[None], aspect="auto", interpolation="nearest", extent=(-0.5, end, 0, 1), **painted)
        strip.set_yticks([])
        strip.set_ylabel("exit", rotation=0, ha="right", va="center")
        strip.grid(visible=False)
        confidence.plot(steps, sure, ".", markersize=2.5, color="#9dbfd6", rasterized=True)
        handles += confidence.plot(steps, _running_mean(sure, 25), color=BLUE, label="mean of 25 steps")
        confidence.set(xlim=(-0.5, end), xlabel="decision (env step)", ylabel="confidence")
        if np.nanmin(sure, initial=0.0) >= 0.0 and np.nanmax(sure, initial=1.0) <= 1.0:
            confidence.set_ylim(-0.02, 1.05)
        else:
            confidence.set_ylabel("rule's score")
        figure.align_ylabels([score, confidence])
        legend_below(figure, handles)
    return figure


def aggregate(bars: Sequence[tuple[str, str, Interval]], title: str = "") -> Figure:
    """Interquartile mean over games with its interval, one line per (method, operating point, interval)."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _bars([(method, label) for method, label, _ in bars], title)
        for row, (method, _, interval) in enumerate(bars):
            colour = look_of(method, [method for method, _, _ in bars])[0]
            if not math.isnan(interval.low):
                axes.barh(row, interval.high - interval.low, left=interval.low, height=0.6, color=colour, alpha=0.3)
            axes.plot([interval.mean] * 2, [row - 0.3, row + 0.3], color=colour, linewidth=3)
        axes.axvline(1.0, color=INK, linestyle="--", linewidth=1)
        axes.axvline(0.95, color=GREY, linestyle=":", linewidth=1.2)
        axes.set_xlabel("normalised return, IQM over games (0 random, 1 teacher; dotted: 0.95)")
    return figure


def profile(taus: Values, curves: Sequence[tuple[str, str, Values]], title: str = "") -> Figure:
    """Performance profile: share of runs above a normalised return, one curve per (method, operating point, shares)."""
    drawn: dict[str, int] = defaultdict(int)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(4.4)
        axes = figure.subplots()
        for method, label, shares in curves:
            colour, line = look_of(method, [name for name, _, _ in curves])[0], RULE_LINES[drawn[method] % 4]
            axes.step(taus, shares, where="post", color=colour, linestyle=line, label=_named(method, label))
            drawn[method] += 1
        axes.axvline(0.95, color=GREY, linestyle=":", linewidth=1.2)
        axes.set_xlabel("normalised return τ (0 random, 1 teacher; dotted: 0.95)")
        axes.set(ylim=(-0.02, 1.04), ylabel="share of runs above τ, mean over games")
        axes.set_title(title)
        legend_below(figure, drawn_handles(figure))
    return figure


def look_of(method: str, methods: Sequence[str] = ()) -> tuple[str, str]:
    """Colour and marker of a method; those without fixed ones share a list by their order in `methods`."""
    unknown = sorted({name for name in (*methods, method) if name not in METHODS})
    return METHODS[method] if method in METHODS else SPARE[unknown.index(method) % len(SPARE)]


def exit_colours(count: int) -> list[str]:
    """Colours of exits 0 to count - 1: light for early, dark for late, the last one nearly black."""
    early = matplotlib.colormaps["viridis_r"](np.linspace(0.25, 0.72, max(count - 1, 1)))
    return [*map(to_hex, early[: max(count - 1, 0)]), "#2b2b3a"]


def new_figure(height: float) -> Figure:
    """An empty figure of the width of a page."""
    figure = Figure(figsize=(WIDTH_INCHES, min(height, 60.0)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _bars(names: Sequence[tuple[str, str]], title: str) -> tuple[Figure, Axes]:
    figure = new_figure(1.4 + 0.3 * max(3, len(names)))
    axes = figure.subplots()
    axes.set_yticks(range(len(names)), [_named(*name) for name in names])
    axes.set_ylim(max(len(names), 3) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_title(title)
    return figure, axes


def legend_below(figure: Figure, handles: Sequence[Any]) -> None:
    """A legend under the axes, in as many columns as fit."""
    if not handles:
        return
    lengths = [len(str(handle.get_label())) for handle in handles]
    for columns in range(min(4, len(handles)), 0, -1):
        inches = sum(0.7 + 0.075 * max(part) for part in np.array_split(lengths, columns))
        if inches <= WIDTH_INCHES or columns == 1:
            figure.legend(handles=list(handles), loc="outside lower center", ncols=columns)
            return


def _named(method: str, label: str) -> str:
    text = f"{method}  {label}".rstrip()
    text = f" {text}" if text.startswith("_") else text  # matplotlib hides labels that start with an underscore
    return text if len(text) <= 42 else f"{text[:41]}…"


def _grids(points: Sequence[Point]) -> dict[str, dict[str, list[Point]]]:
    """Method to rule to the points of its threshold grid; a network whose gates alone decide has none."""
    grids: dict[str, dict[str, list[Point]]] = defaultdict(dict)
    for point in points:
        if point.method not in REFERENCES and point.thresholds and not point.fixed and not point.target:
            grids[point.method].setdefault(point.rule, []).append(point)
    return grids


def _levels(points: Sequence[Point]) -> tuple[float | None, float | None]:
    """The teacher's mean, and what 95 % normalised return is in the metric's own unit."""
    means = {point.method: point.value.mean for point in points}
    teacher, chance = means.get(TEACHER), means.get(RANDOM)
    if teacher is None or chance is None or points[0].metric != "score":
        return teacher, None
    return teacher, chance + 0.95 * (teacher - chance)


def _pareto_panel(axes: Axes, points: Sequence[Point], cost: Callable[[Point], Interval]) -> None:
    methods = [point.method for point in points]
    for level, colour, line in zip(_levels(points), (INK, GREY), ("--", ":"), strict=True):
        if level is not None:
            axes.axhline(level, color=colour, linestyle=line, linewidth=1.2)
    for method, rules in _grids(points).items():
        for line, grid in zip(RULE_LINES * len(rules), rules.values(), strict=False):
            way = sorted((cost(point).mean, point.value.mean) for point in grid if not math.isnan(cost(point).mean))
            axes.plot(*np.reshape(way, (-1, 2)).T, color=look_of(method, methods)[0], linestyle=line, alpha=0.75)
    for point in points:
        x, y = cost(point), point.value
        if point.method == RANDOM or math.isnan(x.mean):
            continue
        colour, marker = look_of(point.method, methods)
        fill = "white" if point.method not in REFERENCES and point.fixed else colour
        shape = {"fmt": marker, "markersize": 13 if marker == "*" else 6.5, "markerfacecolor": fill}
        axes.errorbar(x.mean, y.mean, yerr=_bar(y), xerr=_bar(x), color=colour, elinewidth=1, capsize=2, **shape)
        if point.target:
            axes.plot(x.mean, y.mean, "o", markersize=14, fillstyle="none", color=INK, markeredgewidth=1.4, zorder=4)
    axes.set_xlim(left=0)


def _bar(interval: Interval) -> list[list[float]] | None:
    if math.isnan(interval.low):
        return None
    return [[max(0.0, interval.mean - interval.low)], [max(0.0, interval.high - interval.mean)]]


def _pareto_handles(points: Sequence[Point]) -> list[Line2D]:
    methods, grids, (teacher, bound) = [point.method for point in points], _grids(points), _levels(points)
    handles = []
    for method in dict.fromkeys(name for name in methods if name != RANDOM):
        colour, marker = look_of(method, methods)
        named = [(_named(method, rule), line) for rule, line in zip(grids[method], RULE_LINES * 9, strict=False)]
        for label, line in named or [(_named(method, ""), "none")]:
            handles.append(Line2D([], [], color=colour, marker=marker, linestyle=line, label=label))
    hollow: dict[str, Any] = {"marker": "o", "linestyle": "none", "fillstyle": "none", "color": INK}
    if any(point.method not in REFERENCES and point.fixed for point in points):
        handles.append(Line2D([], [], label="fixed exit", **hollow))
    if any(point.target for point in points):
        handles.append(Line2D([], [], label="calibrated on held-out data", markersize=12, **hollow))
    if teacher is not None:
        handles.append(Line2D([], [], color=INK, linestyle="--", linewidth=1.2, label="teacher's mean"))
    if bound is not None:
        handles.append(Line2D([], [], color=GREY, linestyle=":", linewidth=1.2, label="95 % normalised return"))
    return handles


def some_of(count: int, most: int = MAX_NAMED) -> list[int]:
    """Indices of at most so many of `count` things in a row, evenly spaced, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))})


def _exit_handles(colours: Sequence[str], reused: bool = False) -> list[Any]:
    last = len(colours) - 1
    names = {exit: f"exit {exit}{' (last)' if exit == last else ''}" for exit in some_of(len(colours))}
    handles = [Patch(color=REUSED, label="repeated")] if reused else []
    return handles + [Patch(color=colours[exit], label=name) for exit, name in names.items()]


def drawn_handles(figure: Figure) -> list[Any]:
    """What a legend needs of everything that was drawn with a label, each label once."""
    found: dict[Any, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values())


def _running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    known = np.isfinite(values)
    counts = ndimage.uniform_filter1d(known.astype(float), width, mode="constant")
    sums = ndimage.uniform_filter1d(np.where(known, values, 0.0), width, mode="constant")
    mean: NDArray[np.float64] = np.full(len(values), np.nan)
    np.divide(sums, counts, out=mean, where=counts > 0.5 / width)
    return mean

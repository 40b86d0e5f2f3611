"""The picture of a bench: what each way to decide takes, against what it is worth."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rlexit.bench import Dot
from rlexit.plots import GREY, INK, METRIC_LABELS, STYLE, WIDTH_INCHES, look_of

FILLS = ("full", "none", "left", "right", "top", "bottom")


def latency(dots: Sequence[Dot], metric: str, title: str = "") -> Figure:
    """Value against mean time of a decision, single and on one thread; time on a logarithmic scale.

    Args:
        dots: at least one.
        metric: of the values.
        title: printed above, on the left.
    """
    methods = [dot.method for dot in dots]
    runtimes = list(dict.fromkeys(dot.runtime for dot in dots))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 5.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for dot in dots:
            colour, marker = look_of(dot.method, methods)
            fill = FILLS[runtimes.index(dot.runtime) % len(FILLS)]
            spread = [[max(0.0, dot.value - dot.low)], [max(0.0, dot.high - dot.value)]]
            error = None if dot.low != dot.low else spread
            axes.errorbar(
                dot.mean_us, dot.value, yerr=error, fmt=marker, color=colour, fillstyle=fill, markersize=8, capsize=2
            )
        first = [dot for dot in dots if dot.runtime == runtimes[0]]
        for dot in first:
            axes.annotate(
                dot.label, (dot.mean_us, dot.value), (5, 5), textcoords="offset points", fontsize=8, color=GREY
            )
        axes.set_xscale("log")
        axes.set(xlabel="mean latency per decision (µs), batch 1, one thread", ylabel=METRIC_LABELS[metric])
        axes.set_title(title)
        handles = []
        for method in dict.fromkeys(methods):
            colour, marker = look_of(method, methods)
            handles.append(Line2D([], [], color=colour, marker=marker, linestyle="none", label=method))
        for runtime, fill in zip(runtimes, FILLS * len(runtimes), strict=False):
            handles.append(Line2D([], [], color=INK, marker="o", fillstyle=fill, linestyle="none", label=runtime))
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4))
    return figure

"""The picture of a bench: what each way to decide takes, against what it is worth."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from rlexit.bench import Dot
from rlexit.plots import GREY, METRIC_LABELS, STYLE, WIDTH_INCHES, look_of

ROW_INCHES = 1.5


def latency(dots: Sequence[Dot], metric: str, title: str = "") -> Figure:
    """Value against mean time of a decision, single and on one thread: a row per runtime, time on one logarithmic scale.

    Args:
        dots: at least one.
        metric: of the values.
        title: printed above, on the left.
    """
    methods = [dot.method for dot in dots]
    runtimes = list(dict.fromkeys(dot.runtime for dot in dots))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 1.2 + ROW_INCHES * len(runtimes)), layout="constrained")
        FigureCanvasAgg(figure)
        rows = figure.subplots(len(runtimes), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, runtime in zip(rows, runtimes, strict=True):
            shown = sorted((dot for dot in dots if dot.runtime == runtime), key=lambda dot: dot.mean_us)
            for place, dot in enumerate(shown):
                colour, marker = look_of(dot.method, methods)
                spread = [[max(0.0, dot.value - dot.low)], [max(0.0, dot.high - dot.value)]]
                error = None if dot.low != dot.low else spread
                axes.errorbar(
                    dot.mean_us, dot.value, yerr=error, fmt=marker, color=colour, markersize=8, capsize=2, elinewidth=1
                )
                axes.annotate(
                    f"{dot.label}, {dot.mean_us:,.0f} µs",
                    (dot.mean_us, dot.value),
                    (6, 5) if place % 2 else (-6, -12),  # neighbours are often nearer than their names are long
                    textcoords="offset points",
                    ha="left" if place % 2 else "right",
                    fontsize=8,
                    color=GREY,
                )
            axes.set_title(runtime, fontsize=10, fontweight="normal")
        axes = rows[-1]
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("mean latency per decision (µs), batch 1, one thread")
        figure.supylabel(METRIC_LABELS[metric], fontsize=matplotlib.rcParams["axes.labelsize"])
        figure.suptitle(title, x=0.01, ha="left")
        handles = []
        for method in dict.fromkeys(methods):
            colour, marker = look_of(method, methods)
            handles.append(Line2D([], [], color=colour, marker=marker, linestyle="none", label=method))
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4))
    return figure

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from rlexit import curveplots, plots, summary
from rlexit.metrics import Interval
from rlexit.rows import ReliabilityRow
from tests.rlexit.toy_rows import episodes, latency, references, row


def test_methods_keep_their_colours_and_unknown_ones_differ() -> None:
    assert plots.look_of("ztw", ["a", "b"]) == plots.METHODS["ztw"]
    assert plots.look_of("a", ["a", "b", "ztw"]) != plots.look_of("b", ["a", "b", "ztw"])
    assert len({colour for colour, _ in (*plots.METHODS.values(), *plots.SPARE)}) == 14


def test_pareto_draws_the_grid_in_order_of_compute_and_rings_calibrated_points() -> None:
    rows = references() + episodes([1.0, 2.0], label="t", target="target_macs=0.5")
    rows += episodes([0.0, 0.0], label="exit 0", thresholds=(-math.inf, -math.inf), relative_macs=0.1)
    for label, macs in (("b", 0.75), ("a", 0.25), ("c", 1.0)):
        rows += episodes([macs, macs], label=label, relative_macs=macs)
    figure = plots.pareto(summary.points(rows))
    assert len(figure.axes) == 1
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 3]
    assert [list(line.get_xdata()) for line in lines] == [[0.25, 0.75, 1.0]]
    assert to_hex(lines[0].get_color()) == plots.METHODS["ztw"][0]
    assert sum(line.get_fillstyle() == "none" for line in figure.axes[0].lines) == 1
    assert [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_markerfacecolor() == "white"] == [0.1]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [
        "teacher",
        "ztw  confidence",
        "fixed exit",
        "calibrated on held-out data",
        "teacher's mean",
        "95 % normalised return",
    ]


def test_pareto_has_a_second_panel_where_latency_was_measured() -> None:
    figure = plots.pareto(summary.points(episodes([1.0, 2.0]), [latency()]))
    assert [axes.get_xlabel() for axes in figure.axes][1] == "latency p50 per decision (µs)"
    assert 200.0 in [x for line in figure.axes[1].lines for x in line.get_xdata()]


def test_exit_bars_fill_the_whole_width() -> None:
    figure = plots.exit_shares(summary.points(episodes([1.0, 2.0]) + references()))
    assert sum(bar.get_width() for bar in figure.axes[0].patches) == pytest.approx(1.0)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_timeline_of_any_length_can_be_drawn(count: int, tmp_path: Path) -> None:
    figure = plots.exit_timeline(np.arange(count) % 2, np.full(count, np.nan), np.ones(count), "$")
    score = figure.axes[0].lines[0].get_ydata()
    assert list(score) == list(range(1, count + 1))
    if not count:
        assert all(path.stat().st_size for path in plots.save(figure, tmp_path, "timeline"))


def test_scores_of_a_rule_beyond_0_to_1_are_in_the_picture() -> None:
    figure = plots.exit_timeline(np.zeros(2), np.array([-3.0, 4.0]), np.zeros(2))
    low, high = figure.axes[2].get_ylim()
    assert low < -3.0
    assert high > 4.0
    assert figure.axes[2].get_ylabel() == "rule's score"


def test_a_method_that_starts_with_an_underscore_is_in_the_legend() -> None:
    figure = plots.pareto(summary.points(episodes([1.0, 2.0], method="_x")))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [" _x  confidence"]


def test_a_network_whose_gates_alone_decide_has_no_rule_in_the_legend() -> None:
    figure = plots.pareto(summary.points(episodes([1.0, 2.0], method="gated", label="gates", thresholds=())))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["gated"]


def test_learning_curves_have_thin_seeds_and_a_thick_mean_where_all_have_one() -> None:
    seeds = [[(step, "distill/kl/exit0", 1.0 + seed) for step in range(3 + seed)] for seed in range(2)]
    figure = curveplots.learning_curves(seeds, "pong")
    assert figure is not None
    lines = figure.axes[0].lines
    assert [len(line.get_xdata()) for line in lines] == [3, 4, 3]
    assert list(lines[-1].get_ydata()) == [1.5, 1.5, 1.5]
    assert "n = 2 training seeds" in figure.axes[0].get_title(loc="left")
    assert curveplots.learning_curves([[(0, "time/fps", 1.0), (0, "rollout/ep_rew_mean", math.nan)]]) is None


def test_of_many_exits_some_have_a_panel_and_a_name() -> None:
    rows = [ReliabilityRow(exit, 0.9, 1.0, 5, 0.95, 0.9) for exit in range(27)]
    figure = curveplots.reliability(rows, "many")
    assert [axes.get_xlabel().split("\n")[0][-2:] for axes in figure.axes] == [" 0", " 9", "17", "26"]
    seeds = [[(step, f"distill/loss/exit{exit}", 1.0) for step in range(3) for exit in range(27)]]
    figure = curveplots.learning_curves(seeds, "many")
    assert figure is not None
    assert len(figure.axes[0].lines) == 27
    assert len(figure.legends[0].get_texts()) == 8


def test_labels_of_panels_beside_each_other_do_not_overlap() -> None:
    figure = curveplots.reliability([ReliabilityRow(exit, 0.9, 1.0, 5, 0.95, 0.9) for exit in range(4)])
    figure.canvas.draw()
    boxes = [axes.xaxis.label.get_window_extent() for axes in figure.axes]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_a_teacher_and_gates_have_curves_too() -> None:
    teacher = curveplots.learning_curves([[(0, "train/accuracy", 0.5), (0, "held_out/accuracy", 0.4)]])
    gates = curveplots.learning_curves([[(0, "gating/relative_cost", 0.5), (0, "gate/open_frac/block2", 0.4)]])
    assert teacher is not None
    assert gates is not None
    assert [text.get_text() for text in teacher.legends[0].get_texts()] == ["train/accuracy", "held_out/accuracy"]
    assert [axes.get_ylabel() for axes in gates.axes] == ["compute / full network", "gate open (share of rows)"]


def test_every_curve_of_a_panel_is_drawn() -> None:
    tags = ["train/accuracy", "held_out/accuracy", "gating/accuracy", "refine/accuracy"]
    figure = curveplots.learning_curves([[(step, tag, 0.5) for tag in tags for step in (0, 1)]])
    assert figure is not None
    assert len({line.get_color() for line in figure.axes[0].lines}) == len(tags)


def test_aggregates_without_an_interval_can_be_drawn() -> None:
    figure = plots.aggregate([("ztw", "a", Interval(0.9, math.nan, math.nan)), ("new", "b", Interval(0.8, 0.7, 0.9))])
    assert [bar.get_width() for bar in figure.axes[0].patches] == [pytest.approx(0.2)]


def test_legends_stay_inside_the_figure() -> None:
    curves = [(f"method{k}", "a label of about forty characters width", [1.0, 0.0]) for k in range(8)]
    figure = plots.profile([0.0, 1.0], curves)
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


def test_repeated_answers_have_a_colour_of_their_own_in_bars_and_timelines() -> None:
    points = summary.points([row(exit_fractions=(0.5, 0.0, 0.1, 0.4)), *episodes([1.0], label="plain")])
    bars = plots.exit_shares(points).axes[0].patches
    widths = {(to_hex(bar.get_facecolor()), round(bar.get_width(), 3)) for bar in bars}
    assert (plots.REUSED, 0.4) in widths
    assert (plots.REUSED, 0.0) in widths
    figure = plots.exit_timeline([0, -1, 2, -1], [0.9, np.nan, 0.8, np.nan], [0.0, 1.0, 0.0, 0.0])
    strip = figure.axes[1].images[0]
    drawn = [to_hex(strip.cmap(strip.norm(value))) for value in (-1, 0, 2)]
    assert drawn == [plots.REUSED, plots.exit_colours(3)[0], plots.exit_colours(3)[2]]
    assert "repeated" in {text.get_text() for legend in figure.legends for text in legend.get_texts()}

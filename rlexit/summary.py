"""From rows to facts: operating points with intervals, normalised returns, and who wins at a given compute.

Knows no picture and no page. Calibration rows are dropped here, once, so nothing built on this module can show them.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlexit import metrics
from rlexit.metrics import NOTHING, Interval
from rlexit.rows import LatencyRow, Row
from rlexit.runfolder import flatten

TEACHER, RANDOM, STATIC, RANDOM_EXIT = "teacher", "random", "static", "random_exit"
REFERENCES = (TEACHER, RANDOM, STATIC, RANDOM_EXIT)
# Losing with less than this share of a rival's compute says nothing about who is better there; winning does.
FAR_BELOW = 0.9
SAME_MACS = 1.01  # "at the same compute" allows 1 % more, so that rounding a width does not decide who is compared


@dataclass(frozen=True)
class Setup:
    """How latencies were measured; only equal setups are compared."""

    batch: int
    threads: int
    runtime: str
    machine: str

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"batch {self.batch}, {threads}, {self.runtime}, {self.machine}"


@dataclass(frozen=True)
class Point:
    """One operating point of one method on one task, over one or several training seeds.

    `value` is the mean of the seeds' means. Its interval is over seeds where there are several, else over episodes.

    Args:
        values: the episodes' values, one tuple per seed, in the order of `run_seeds`.
        normalised: the return on the scale random = 0, teacher = 1, whose two means are taken as exact; NaN if unknown.
        relative_macs: per decision, weighted by the episodes' decisions.
        decisions_mean: per episode.
        exit_shares: share of decisions per exit; () if there are no exits.
        latency_us_p50: median time of a decision in `setup`, microseconds; NaN if not measured.
        reuse_share: of decisions that repeated the answer of the step before; what is missing in `exit_shares`.
    """

    task: str
    method: str
    label: str
    rule: str
    thresholds: tuple[float, ...]
    target: str
    execution: str
    actions: str
    metric: str
    protocol: str
    run_seeds: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]
    value: Interval
    normalised: Interval
    normalised_values: tuple[tuple[float, ...], ...]
    relative_macs: Interval
    macs_mean: float
    decisions_mean: float
    exit_shares: tuple[float, ...]
    latency_us_p50: float
    latency_us_p95: float
    setup: Setup | None
    reuse_share: float = 0.0

    @property
    def episodes(self) -> int:
        """Evaluated episodes (or sets), all seeds together."""
        return sum(map(len, self.values))

    @property
    def per_seed(self) -> tuple[float, ...]:
        """Mean value of each training seed."""
        return tuple(float(np.mean(values)) for values in self.values)

    @property
    def fixed(self) -> bool:
        """Whether nothing is decided per row: no rule, or one that always or never leaves at every exit."""
        return not self.rule or (bool(self.thresholds) and not any(map(math.isfinite, self.thresholds)))


def check_protocols(rows: Sequence[Row], allow_mixed: bool = False) -> None:
    """Refuses rows of one task that were measured in different ways.

    Raises:
        ValueError: the test rows of a task differ in protocol or metric; the message names the differing fields.
    """
    tasks: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for row in tested(rows):
        tasks[row.task].add((row.protocol, row.metric))
    for task, seen in tasks.items():
        if len({metric for _, metric in seen}) > 1:
            raise ValueError(f"`metric` of task {task!r} must be one, got score and accuracy. Report them apart.")
        if len(seen) > 1 and not allow_mixed:
            flat = [flatten(json.loads(protocol)) for protocol, _ in sorted(seen)]
            names = sorted(set().union(*flat))
            told = [
                f"{name} ({', '.join(sorted({str(block.get(name, 'not stated')) for block in flat}))})"
                for name in names
                if len({str(block.get(name)) for block in flat}) > 1
            ]
            raise ValueError(
                f"`protocol` of task {task!r} must be one, got {len(seen)} that differ in {'; '.join(told)}. "
                "Report them apart, or pass --allow-mixed."
            )


def tested(rows: Iterable[Row]) -> list[Row]:
    """The rows that may be shown: split "test"."""
    return [row for row in rows if row.split == "test"]


def outcomes(row: Row) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """Which episode of which operating point a row is, and what came of it."""
    point = (row.task, row.method, row.run_seed, row.label, row.execution, row.actions, row.protocol)
    return (*point, row.split, row.episode_seed, row.episode), (row.value, row.decisions)


def unique(rows: Iterable[Row]) -> list[Row]:
    """Drops exact repeats, such as one teacher's rows that stand in every run folder.

    Raises:
        ValueError: one episode of one operating point has two outcomes, so two different runs carry one name.
    """
    seen: dict[tuple[object, ...], Row] = {}
    for row in rows:
        key, outcome = outcomes(row)
        first = seen.setdefault(key, row)
        if outcomes(first)[1] != outcome:
            raise ValueError(
                f"`rows` must give one outcome per episode, got {first.value:g} and {row.value:g} for {row.task} "
                f"{row.method} seed {row.run_seed} {row.label!r} episode {row.episode}. "
                "Report the runs apart, or evaluate again with --force."
            )
    return list(seen.values())


def points(rows: Sequence[Row], latency: Sequence[LatencyRow] = (), by_seed: bool = False) -> list[Point]:
    """Operating points of all test rows, in the order of task, method and compute.

    Args:
        rows: any; see `unique` and `check_protocols` for what should hold.
        latency: any; per task the setup that covers most points is used.
        by_seed: one point per training seed, instead of one over all of them.
    """
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    shown = unique(tested(rows))
    for row in shown:
        seed = row.run_seed if by_seed else None
        groups[row.task, row.method, row.label, row.execution, row.actions, row.protocol, seed].append(row)
    scales = _scales(shown)
    setups = {task: latency_setup([row for row in latency if row.task == task]) for task in {row.task for row in shown}}
    return in_order(_point(group, scales, latency, setups[group[0].task]) for group in groups.values())


def in_order(made: Iterable[Point]) -> list[Point]:
    """By task and method, references first; then the threshold grids by compute, then the calibrated points."""
    rank = {method: index for index, method in enumerate(REFERENCES)}
    return sorted(
        made,
        key=lambda point: (
            (point.task, rank.get(point.method, len(rank)), point.method, bool(point.target), point.rule),
            -math.inf if math.isnan(point.macs_mean) else point.macs_mean,
            (point.label, point.execution, point.actions, point.protocol, point.run_seeds),
        ),
    )


def missing_references(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Tasks with scores that cannot be normalised, and what they lack: "teacher", "random", or both."""
    present: dict[str, set[str]] = defaultdict(set)
    for row in tested(rows):
        if row.metric == "score":
            present[row.task].add(row.method)
    lacking = {task: [name for name in (TEACHER, RANDOM) if name not in methods] for task, methods in present.items()}
    return {task: names for task, names in sorted(lacking.items()) if names}


def latency_setup(latency: Sequence[LatencyRow]) -> Setup | None:
    """The setup to compare in: smallest batch first (what an actor meets), then the one that covers most points."""
    covered: dict[Setup, set[tuple[str, str, int]]] = defaultdict(set)
    for row in latency:
        covered[setup_of(row)].add((row.method, row.label, row.run_seed))
    if not covered:
        return None
    return min(covered, key=lambda setup: (setup.batch, -len(covered[setup]), str(setup)))


def setup_of(row: LatencyRow) -> Setup:
    """The setup that a latency was measured in."""
    return Setup(row.batch, row.threads, row.runtime, row.machine)


def _scales(rows: Sequence[Row]) -> dict[tuple[str, str, str], tuple[float, float]]:
    """(task, actions, protocol) to the scores of random and teacher, where they differ; random serves both actions."""
    scores: dict[tuple[str, ...], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.metric == "score" and row.method in (TEACHER, RANDOM):
            actions = "" if row.method == RANDOM else row.actions
            scores[row.task, row.method, actions, row.protocol][row.run_seed].append(row.value)
    means = {key: float(np.mean([np.mean(values) for values in seeds.values()])) for key, seeds in scores.items()}
    return {
        (task, actions, protocol): (means[chance], mean)
        for (task, method, actions, protocol), mean in means.items()
        if method == TEACHER and means.get(chance := (task, RANDOM, "", protocol), mean) != mean
    }


def _point(
    group: list[Row],
    scales: Mapping[tuple[str, str, str], tuple[float, float]],
    latency: Sequence[LatencyRow],
    setup: Setup | None,
) -> Point:
    first = group[0]
    seeds = tuple(sorted({row.run_seed for row in group}))
    by_seed = [[row for row in group if row.run_seed == seed] for seed in seeds]
    values = tuple(tuple(row.value for row in rows) for rows in by_seed)
    # Chance is 0 on every scale, whichever way the teacher acts.
    ways = ("argmax", "sampled") if first.method == RANDOM else (first.actions,)
    scale = next((scales[key] for way in ways if (key := (first.task, way, first.protocol)) in scales), None)
    scaled: tuple[tuple[float, ...], ...] = ()
    if scale:
        scaled = tuple(tuple(map(float, metrics.normalised_return(seed, *scale))) for seed in values)
    times = [
        row
        for row in latency
        if (row.task, row.method, row.label) == (first.task, first.method, first.label)
        and row.run_seed in seeds
        and setup_of(row) == setup
    ]
    same_thresholds = len({row.thresholds for row in group}) == 1
    widths = {len(row.exit_fractions) for row in group}
    decisions = [row.decisions for row in group]
    shares: tuple[float, ...] = ()
    if len(widths) == 1 and first.exit_fractions:
        shares = tuple(map(float, np.average([row.exit_fractions for row in group], axis=0, weights=decisions)))
    exits = len(first.thresholds) + 1
    return Point(
        task=first.task,
        method=first.method,
        label=first.label,
        rule=first.rule,
        thresholds=first.thresholds if same_thresholds else (),
        target=first.target,
        execution=first.execution,
        actions=first.actions,
        metric=first.metric,
        protocol=first.protocol,
        run_seeds=seeds,
        values=values,
        value=_over_seeds(values),
        normalised=_over_seeds(scaled) if scaled else NOTHING,
        normalised_values=scaled,
        relative_macs=_compute(by_seed, "relative_macs"),
        macs_mean=_compute(by_seed, "macs_mean").mean,
        decisions_mean=float(np.mean(decisions)),
        exit_shares=shares[:exits],
        reuse_share=sum(shares[exits:]),
        latency_us_p50=float(np.mean([row.latency_us_p50 for row in times])) if times else math.nan,
        latency_us_p95=float(np.mean([row.latency_us_p95 for row in times])) if times else math.nan,
        setup=setup if times else None,
    )


def _over_seeds(values: Sequence[Sequence[float]]) -> Interval:
    return metrics.mean_interval([float(np.mean(seed)) for seed in values] if len(values) > 1 else values[0])


def _compute(by_seed: Sequence[Sequence[Row]], name: str) -> Interval:
    per_seed = [
        metrics.mean_interval([getattr(row, name) for row in rows], weights=[row.decisions for row in rows])
        for rows in by_seed
    ]
    return per_seed[0] if len(per_seed) == 1 else metrics.mean_interval([interval.mean for interval in per_seed])


@dataclass(frozen=True)
class Verdict:
    """Exits against a static network at the same compute.

    Args:
        exits: the point of `method` with most compute within the budget, so its score did not choose it; None if none.
        difference: exits minus static, in the metric.
        probability: that exits score more, ties counting half.
        winner: "exits", "static", "none" (the interval holds 0) or "unknown" (no interval, no point, or one that spends far
            less and does not win).
    """

    static: Point
    method: str
    exits: Point | None
    difference: Interval
    probability: float
    winner: str


def verdicts(shown: Sequence[Point]) -> list[Verdict]:
    """One verdict per static network and method with exits of the same task, in order of compute."""
    found: list[Verdict] = []
    for static in shown:
        if static.method != STATIC or math.isnan(static.macs_mean):
            continue
        rivals: dict[str, list[Point]] = defaultdict(list)
        for point in shown:
            if point.method not in REFERENCES and _comparable(point, static):
                rivals[point.method].append(point)
        found.extend(_verdict(static, method, rivals[method]) for method in sorted(rivals))
    return found


def _comparable(point: Point, static: Point) -> bool:
    return (point.task, point.actions, point.protocol) == (static.task, static.actions, static.protocol)


def _verdict(static: Point, method: str, rivals: Sequence[Point]) -> Verdict:
    affordable = [point for point in rivals if point.macs_mean <= static.macs_mean * SAME_MACS]
    if not affordable:
        return Verdict(static, method, None, NOTHING, math.nan, "unknown")
    affordable = [
        point for point in affordable if not point.fixed
    ] or affordable  # a fixed exit is a static network too
    # Among equals in compute a calibrated point goes first: it was promised before the test.
    exits = max(affordable, key=lambda point: (point.macs_mean, bool(point.target), point.label))
    several = len(exits.run_seeds) > 1 and len(static.run_seeds) > 1
    x, y = (
        point.per_seed if several else tuple(value for seed in point.values for value in seed)
        for point in (exits, static)
    )
    difference = metrics.difference_interval(x, y)
    if math.isnan(difference.low):
        winner = "unknown"
    elif difference.low > 0:
        winner = "exits"
    elif exits.macs_mean < FAR_BELOW * static.macs_mean:
        winner = "unknown"
    else:
        winner = "static" if difference.high < 0 else "none"
    return Verdict(static, method, exits, difference, metrics.probability_of_improvement(x, y), winner)

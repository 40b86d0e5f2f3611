"""Operating points as tables: for the terminal, for pages, and as CSV; and the words that go with them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from rlexit import summary
from rlexit.metrics import Interval
from rlexit.pages import Table
from rlexit.rows import LatencyRow, Row
from rlexit.summary import Point, Verdict

UNKNOWN = "-"
BADGES = {
    "exits": ("exits win", "good"),
    "static": ("static is better here", "bad"),
    "none": ("no clear difference", "open"),
    "unknown": ("cannot tell", "open"),
}
MAX_SHARES = 8
# What a value is of: one, several.
WHOLES = {"score": ("episode", "episodes"), "accuracy": ("part of the test set", "parts of the test set")}


def summary_rows(rows: Sequence[Row], latency: Sequence[LatencyRow] = ()) -> list[dict[str, Any]]:
    """One dictionary per (task, method, run_seed, label) of the test rows: means, 95 % intervals, compute, latency.

    Intervals are over the episodes of that one training seed. What is unknown is NaN, "" or [].
    """
    return [
        {
            "task": point.task,
            "method": point.method,
            "run_seed": point.run_seeds[0],
            "label": point.label,
            "rule": point.rule,
            "thresholds": list(point.thresholds),
            "target": point.target,
            "execution": point.execution,
            "actions": point.actions,
            "metric": point.metric,
            "episodes": point.episodes,
            "mean": point.value.mean,
            "mean_low": point.value.low,
            "mean_high": point.value.high,
            "normalised_return": point.normalised.mean,
            "normalised_low": point.normalised.low,
            "normalised_high": point.normalised.high,
            "relative_macs": point.relative_macs.mean,
            "macs_mean": point.macs_mean,
            "exit_shares": list(point.exit_shares),
            "reuse_share": point.reuse_share,
            "latency_us_p50": point.latency_us_p50,
            "latency_us_p95": point.latency_us_p95,
            "latency_setup": str(point.setup or ""),
            "protocol": point.protocol,
        }
        for point in summary.points(rows, latency, by_seed=True)
    ]


def summary_table(rows: Sequence[Mapping[str, Any]]) -> RichTable:
    """What `summary_rows` found, as a table for the terminal; what is the same in all rows stands in its title."""
    columns: dict[str, list[str]] = {
        "task": [row["task"] for row in rows],
        "execution": [row["execution"] for row in rows],
        "actions": ["" if row["method"] == summary.RANDOM else row["actions"] for row in rows],
        "seed": [str(row["run_seed"]) for row in rows],
        "method": [row["method"] for row in rows],
        "operating point": [row["label"] for row in rows],
        "value [95%]": [
            interval_text(Interval(row["mean"], row["mean_low"], row["mean_high"]), digits=_digits(row["metric"]))
            for row in rows
        ],
        "norm.": [number(row["normalised_return"]) for row in rows],
        "rel. MACs": [number(row["relative_macs"], 3) for row in rows],
        "exits %": [shares_text(row["exit_shares"]) for row in rows],
        "reuse %": [reuse_text(row["reuse_share"]) for row in rows],
        "us p50 / p95": [times_text(row["latency_us_p50"], row["latency_us_p95"]) for row in rows],
        "n": [str(row["episodes"]) for row in rows],
    }
    common = [name for name in ("task", "execution", "actions", "seed") if len(set(columns[name]) - {""}) == 1]
    title = Text(", ".join(f"{name} {max(columns.pop(name))}" for name in common))
    table = RichTable(box=None, header_style="bold", pad_edge=False, title=title, title_justify="left")
    kept = {name: cells for name, cells in columns.items() if set(cells) - {"", UNKNOWN}}
    for name in kept:
        left = name in ("task", "execution", "actions", "method", "operating point")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for line in zip(*kept.values(), strict=True):
        table.add_row(*map(Text, line))
    return table


def points_table(part: Sequence[Point], folded: str = "", per_seed: bool = True) -> Table:
    """Operating points as a table for a page; columns that say nothing are left out.

    Args:
        part: points of one metric, at least one.
        folded: title under which the table starts closed.
        per_seed: also list the mean of every training seed, where there are several.
    """
    several = per_seed and any(len(point.run_seeds) > 1 for point in part)
    columns: list[tuple[str, list[str]]] = [
        ("method", [point.method for point in part]),
        ("operating point", [point.label for point in part]),
        (f"{part[0].metric} [95%]", [interval_text(point.value, digits=_digits(point.metric)) for point in part]),
        ("normalised [95%]", [interval_text(point.normalised) for point in part]),
        ("MACs", [macs_text(point.macs_mean).removesuffix("MACs").rstrip() for point in part]),
        ("relative MACs", [number(point.relative_macs.mean, 3) for point in part]),
        ("exits %", [shares_text(point.exit_shares) for point in part]),
        ("reuse %", [reuse_text(point.reuse_share) for point in part]),
        ("latency us p50 / p95", [times_text(point.latency_us_p50, point.latency_us_p95) for point in part]),
        ("n", [count_text(point) for point in part]),
        ("per seed", [_values_text(point) if several else "" for point in part]),
    ]
    kept = [(name, cells) for name, cells in columns if set(cells) - {"", UNKNOWN} or name in ("method", "n")]
    return Table([name for name, _ in kept], list(zip(*(cells for _, cells in kept), strict=True)), folded=folded)


def _values_text(point: Point) -> str:
    return " / ".join(number(value, _digits(point.metric)) for value in point.per_seed)


def latency_table(latency: Sequence[LatencyRow]) -> Table | None:
    """Median time per row of every operating point that was timed in several setups, and against the teacher's; or None.

    A grid's points are timed one row at a time only, and are left to the full listing.
    """
    setups = sorted({summary.setup_of(row) for row in latency}, key=lambda setup: (setup.batch, str(setup)))
    cells: dict[tuple[str, str, str], dict[Any, list[float]]] = {}
    for row in latency:
        per_row = row.latency_us_p50 / row.batch
        cells.setdefault((row.task, row.method, row.label), {}).setdefault(summary.setup_of(row), []).append(per_row)
    means = {key: {setup: sum(times) / len(times) for setup, times in found.items()} for key, found in cells.items()}
    shown = {key: found for key, found in means.items() if len(found) > 1}
    if not shown:
        return None
    whole = {
        (task, setup): found[setup]
        for (task, method, _), found in means.items()
        if method == summary.TEACHER
        for setup in found
    }
    several = len({row.task for row in latency}) > 1
    header = ["method", "operating point"]
    for setup in setups:
        header += [f"us per row, {setup}", "of the teacher's"]
    lines = []
    for (task, method, label), found in shown.items():
        line = [f"{task} {method}" if several else method, label]
        for setup in setups:
            time = found.get(setup, math.nan)
            line += [number(time), number(time / whole.get((task, setup), math.nan), 3)]
        lines.append(line)
    return Table(header, lines)


def verdict_items(verdicts: Sequence[Verdict]) -> list[tuple[str, str, str]]:
    """Verdicts as items of `pages.Bullets`: badge, kind, and the sentence with its numbers.

    Methods that have nothing as cheap as a static network share a sentence.
    """
    dear: dict[Point, list[str]] = {}
    for verdict in verdicts:
        if verdict.exits is None:
            dear.setdefault(verdict.static, []).append(verdict.method)
    items = [
        (*BADGES["unknown"], f"{_budget_text(static)}: {have_text(methods)} no operating point that cheap.")
        for static, methods in dear.items()
    ]
    return items + [_verdict_item(verdict, verdict.exits) for verdict in verdicts if verdict.exits is not None]


def have_text(names: Sequence[str]) -> str:
    """Such as "ztw has", or "ztw, sdn and pbee have"."""
    return f"{', '.join(names[:-1])} and {names[-1]} have" if len(names) > 1 else f"{names[0]} has"


def _budget_text(static: Point) -> str:
    return f"at {macs_text(static.macs_mean)} per decision (static {static.label})"


def _verdict_item(verdict: Verdict, exits: Point) -> tuple[str, str, str]:
    static = verdict.static
    badge, kind = BADGES[verdict.winner]
    digits = _digits(static.metric)
    values = [number(point.value.mean, digits) for point in (exits, static)]
    text = (
        f"{_budget_text(static)}: {exits.method} {exits.label}, {macs_text(exits.macs_mean)}, reaches {values[0]}, "
        f"static {values[1]}; difference {interval_text(verdict.difference, True, digits)}"
    )
    if verdict.winner == "unknown":
        alone = math.isnan(verdict.difference.low)
        why = "one value on a side gives no interval" if alone else "it spends too little to tell who is better there"
        return badge, kind, f"{text}; {why}."
    return badge, kind, f"{text}, P(exits score more) = {verdict.probability:.2f}."


def caption(part: Sequence[Point], latency: bool = True) -> str:
    """What must stand under a picture or table of points of one metric: seeds, episodes, execution, actions, protocol."""
    seeds, counts = [len(point.run_seeds) for point in part], [point.episodes for point in part]
    said = [
        f"n = {range_text(seeds)} training seed{'s' if max(seeds) > 1 else ''}",
        f"{range_text(counts)} {WHOLES[part[0].metric][max(counts) > 1]} per point",
        *sorted({f"latency at {point.setup}" for point in part if point.setup and latency}),
        how_text(part),
    ]
    return "; ".join(said) + "."


def how_text(part: Sequence[Point] | Sequence[Row]) -> str:
    """How values came about, in one line: execution, actions and protocol."""
    if not part:
        return "execution, actions and protocol are not stated"
    protocols = {each.protocol for each in part}
    actors = [each for each in part if each.metric == "score"]
    actions = sorted({each.actions for each in actors if each.method != summary.RANDOM}) or ["random"]
    protocol = f"protocol: {_protocol_text(*protocols)}" if len(protocols) == 1 else f"{len(protocols)} protocols"
    executions = " and ".join(sorted({each.execution for each in part}))
    acting = f"{' and '.join(actions)} actions; " if actors else ""
    return f"execution {executions}; {acting}{protocol}"


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Dictionaries with equal keys as CSV; NaN is an empty cell, a list is JSON."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def number(value: float, digits: int = 2) -> str:
    """A number with as many decimals as its size deserves; `UNKNOWN` for NaN."""
    if math.isnan(value):
        return UNKNOWN
    decimals = 0 if abs(value) >= 1000 else min(1, digits) if abs(value) >= 100 else digits
    return f"{value:z,.{decimals}f}"  # z: no -0.00


def interval_text(interval: Interval, sign: bool = False, digits: int = 2) -> str:
    """Such as "3.10 [2.00, 4.20]", or the mean alone where there is no interval."""
    mean = ("+" if sign and interval.mean > 0 else "") + number(interval.mean, digits)
    low, high = number(interval.low, digits), number(interval.high, digits)
    return mean if math.isnan(interval.low) else f"{mean} [{low}, {high}]"


def _digits(metric: str) -> int:
    # A tenth of a point of accuracy matters, a hundredth of a game's score does not.
    return 4 if metric == "accuracy" else 2


def macs_text(value: float) -> str:
    """Such as "4.12 M MACs", three digits; `UNKNOWN` for NaN."""
    if math.isnan(value):
        return UNKNOWN
    scale, letter = next((pair for pair in ((1e9, "G "), (1e6, "M "), (1e3, "k ")) if value >= pair[0]), (1.0, ""))
    return f"{value / scale:.3g} {letter}MACs"


def shares_text(shares: Sequence[float]) -> str:
    """Percentages per exit, "50 / 20 / 30"; of many exits the mean one, which fits on a line."""
    if len(shares) > MAX_SHARES:
        mean = sum(exit * share for exit, share in enumerate(shares))
        return f"mean exit {mean:.1f} of 0..{len(shares) - 1}"
    return " / ".join(f"{100 * share:.0f}" for share in shares)


def reuse_text(share: float) -> str:
    """Percentage of repeated answers; nothing where none was."""
    return f"{100 * share:.0f}" if share else ""


def times_text(p50: float, p95: float) -> str:
    """Two latencies in microseconds; `UNKNOWN` if not measured."""
    return UNKNOWN if math.isnan(p50) else f"{number(p50)} / {number(p95)}"


def count_text(point: Point) -> str:
    """Episodes, or "3 x 30" for three training seeds of 30 episodes each."""
    each = range_text(map(len, point.values))
    return each if len(point.run_seeds) == 1 else f"{len(point.run_seeds)} x {each}"


def range_text(numbers: Iterable[int]) -> str:
    """Such as "30", or "10 to 30" where the numbers differ."""
    found = list(numbers)
    return str(min(found)) if min(found) == max(found) else f"{min(found)} to {max(found)}"


def _protocol_text(protocol: str) -> str:
    """The protocol's own switches in one line; versions and hashes are left to the full listing."""
    block = {name: value for name, value in json.loads(protocol).items() if not isinstance(value, (dict, list))}
    return ", ".join(f"{name} {value}" for name, value in block.items() if len(str(value)) <= 24) or "not stated"


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return json.dumps([each if math.isfinite(each) else str(each) for each in value])
    return "" if isinstance(value, float) and math.isnan(value) else value

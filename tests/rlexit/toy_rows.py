"""Made-up evaluations, small enough to check by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlexit.rows import LatencyRow, Row

PROTOCOL = '{"sticky":0.25,"versions":{"ale_py":"0.12.1"}}'


def row(**changes: Any) -> Row:
    """One episode of ztw on pong at confidence@0.90, with some fields changed."""
    made = Row(
        task="pong",
        method="ztw",
        run_seed=0,
        label="confidence@0.90",
        rule="confidence",
        thresholds=(0.9, math.inf),
        target="",
        execution="real",
        actions="argmax",
        split="test",
        episode=0,
        episode_seed=1000,
        metric="score",
        value=18.0,
        decisions=1000,
        macs_mean=4e6,
        relative_macs=0.5,
        exit_fractions=(0.5, 0.0, 0.5),
        protocol=PROTOCOL,
    )
    return replace(made, **changes)


def episodes(values: Sequence[float], **changes: Any) -> list[Row]:
    """One episode per value, at one operating point."""
    return [row(value=value, episode=k, episode_seed=1000 + k, **changes) for k, value in enumerate(values)]


def plain(method: str, values: Sequence[float], relative_macs: float = 1.0, **changes: Any) -> list[Row]:
    """Episodes of a method that decides nothing: teacher, random, static."""
    macs = {"relative_macs": relative_macs, "macs_mean": relative_macs * 8e6}
    facts = {"label": "full", "rule": "", "thresholds": (), "exit_fractions": ()}
    return episodes(values, method=method, **{**facts, **macs, **changes})


def references(**changes: Any) -> list[Row]:
    """A teacher at 20 and a random agent at -20: 40 points between 0 and 1."""
    return [
        *plain("teacher", [19.0, 21.0], **changes),
        *plain("random", [-21.0, -19.0], math.nan, **{**changes, "label": "random", "actions": "sampled"}),
    ]


def latency(**changes: Any) -> LatencyRow:
    """200 us per decision of ztw on pong at confidence@0.90, with some fields changed."""
    made = LatencyRow(
        task="pong",
        method="ztw",
        run_seed=0,
        label="confidence@0.90",
        batch=1,
        latency_us_p50=200.0,
        latency_us_p95=300.0,
        threads=1,
        runtime="ort",
        machine="a box",
    )
    return replace(made, **changes)

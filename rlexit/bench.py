"""Latency of decisions, contenders in turn, so that a machine that is busy for a while is busy for all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

WARM_UP = 20


@dataclass(frozen=True)
class Contender:
    """One way to decide.

    Args:
        method: the network: `teacher`, `static`, `ztw`, ...
        label: the operating point, as in `rlexit.rows.Row`.
        runtime: what runs it.
        call: from one (...) observation, or a batch of them, to anything.
        rows: (N, ...) observations that are timed, in this order; of batches (N, batch, ...).
        batch: rows per call.
        threads: of the runtime.
        moving: whether every call is another step of a world, whatever the row: repeats then time no row twice.
    """

    method: str
    label: str
    runtime: str
    call: Callable[[np.ndarray], object]
    rows: np.ndarray
    batch: int = 1
    threads: int = 1
    moving: bool = False


@dataclass(frozen=True)
class Timing:
    """What was measured, in microseconds per call.

    Args:
        p50: median over repeats of each repeat's median.
        p95: median over repeats of each repeat's 95th percentile.
        mean: over rows, of each row's median over repeats: what a mix of exits costs, without the machine's hiccups. Of
            steps of a world, median over repeats of each repeat's mean, because rare dear steps are no hiccups.
        low: smallest median of a repeat.
        high: largest.
    """

    p50: float
    p95: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Dot:
    """One contender that was evaluated too.

    Args:
        method: as in `rlexit.rows.Row`.
        label: as there.
        runtime: what ran it.
        mean_us: of one decision, mean over the mix of exits.
        value: mean of the metric over test episodes.
        low: lower bound of its 95 % interval; NaN where there is none.
        high: upper bound.
    """

    method: str
    label: str
    runtime: str
    mean_us: float
    value: float
    low: float
    high: float


def measure(contenders: Sequence[Contender], repeats: int) -> list[Timing]:
    """Times every row of every contender in each repeat; the order of contenders turns by one from repeat to repeat.

    Args:
        contenders: called one observation at a time, on this thread.
        repeats: at least 1.
    Returns:
        One timing per contender, in their order.
    """
    taken: list[list[np.ndarray]] = [[] for _ in contenders]
    for one in contenders:
        for row in one.rows[:WARM_UP]:
            one.call(row)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for repeat in range(repeats):
            for place in range(len(contenders)):
                index = (place + repeat) % len(contenders)
                taken[index].append(_time(contenders[index]))
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return [_timing(np.stack(times) * 1e6, one.moving) for one, times in zip(contenders, taken, strict=True)]


def _time(contender: Contender) -> np.ndarray:
    """(N,) seconds of each row."""
    call, clock = contender.call, time.perf_counter
    seconds = np.empty(len(contender.rows))
    call(contender.rows[0])  # what another contender left in the caches is not this one's business
    for index, row in enumerate(contender.rows):
        began = clock()
        call(row)
        seconds[index] = clock() - began
    return seconds


def _timing(times: np.ndarray, moving: bool) -> Timing:
    """Of (repeats, N) microseconds."""
    medians = np.median(times, axis=1)
    mean = np.median(times.mean(axis=1)) if moving else np.median(times, axis=0).mean()
    return Timing(
        p50=float(np.median(medians)),
        p95=float(np.median(np.percentile(times, 95, axis=1))),
        mean=float(mean),
        low=float(medians.min()),
        high=float(medians.max()),
    )


def mixed(exits: np.ndarray, shares: Sequence[float], count: int, seed: int = 0) -> np.ndarray:
    """(count,) indices of rows whose exits have given shares, in random order.

    Args:
        exits: (N,) where each held-out row leaves.
        shares: (K,) of the exits; what falls to an exit by which no row leaves is spread over the others.
        count: rows wanted; they repeat where there are too few.
        seed: of the draw.
    """
    generator = np.random.default_rng(seed)
    there = np.array([share * (exits == exit).any() for exit, share in enumerate(shares)])
    bounds = np.round(np.cumsum(there / there.sum()) * count).astype(int)
    wanted = np.diff(bounds, prepend=0)
    parts = []
    for exit, amount in enumerate(wanted):
        found = np.flatnonzero(exits == exit)
        if amount:
            parts.append(generator.choice(found, amount, replace=amount > len(found)))
    return generator.permutation(np.concatenate(parts))

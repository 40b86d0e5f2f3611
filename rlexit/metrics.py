"""Numbers that summarise evaluations: intervals, robust means over games, and what exits could still gain.

Pure functions on arrays. Whatever scipy has is taken from scipy; the intervals are percentile bootstraps with a fixed
seed, so that two reports over the same rows are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import integrate, stats

RESAMPLES = 2000
_CELLS_PER_BATCH = 1_000_000  # bounds the memory of a bootstrap over a large evaluated set

Statistic = Callable[..., Any]
Values = Sequence[float] | NDArray[Any]


class Interval(NamedTuple):
    """An estimate with its confidence interval; `low` and `high` are NaN where no interval can be formed."""

    mean: float
    low: float
    high: float


NOTHING = Interval(float("nan"), float("nan"), float("nan"))


def iqm(values: Values, axis: int = -1) -> Any:
    """Interquartile mean: the mean of the middle half.

    Args:
        values: any shape, at least one value along `axis`.
        axis: the axis that is averaged.
    Source: Agarwal et al. 2021, arXiv 2108.13264, section 4.3.
    """
    return stats.trim_mean(np.asarray(values, dtype=float), 0.25, axis=axis)


def mean_interval(values: Values, confidence: float = 0.95, seed: int = 0, weights: Values | None = None) -> Interval:
    """Mean with a percentile bootstrap interval over the values.

    Args:
        values: (n,) n >= 0; a NaN makes the result NaN.
        confidence: share of resamples inside the interval, in (0, 1).
        seed: of the resampling.
        weights: (n,) >= 0, such as decisions per episode; resampled together with their values.
    Returns:
        The (weighted) mean and its interval; all NaN for n = 0, a NaN interval for n = 1.
    """
    data = _flat("values", values)
    shares = np.ones_like(data) if weights is None else _flat("weights", weights)
    if shares.shape != data.shape:
        raise ValueError(f"`weights` must have one per value ({data.size}), got {shares.size}. Give both per row.")

    def weighted_mean(sample: NDArray[Any], share: NDArray[Any], axis: int = -1) -> Any:
        return (sample * share).sum(axis=axis) / share.sum(axis=axis)

    if data.size == 0 or not np.isfinite(data).all() or shares.sum() <= 0:
        return NOTHING
    return _bootstrap((data, shares), weighted_mean, confidence, seed, paired=True)


def stratified_interval(
    strata: Sequence[Values], statistic: Statistic = iqm, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """A statistic of all values, with an interval that resamples within each stratum (game), never across.

    Args:
        strata: one (n_i,) array per game.
        statistic: called with the concatenated values and `axis`.
        confidence: share of resamples inside the interval, in (0, 1).
        seed: of the resampling.
    Returns:
        The statistic and its interval; the interval is NaN where a game has one value, which cannot be resampled.
    Raises:
        ValueError: there is no stratum, or one of them is empty.
    Source: Agarwal et al. 2021, arXiv 2108.13264, section 4.2.
    """
    games = [_flat("strata", stratum) for stratum in strata]
    if not games or any(game.size == 0 for game in games):
        raise ValueError(f"`strata` must hold values for every game, got sizes {[game.size for game in games]}.")

    def pooled(*samples: NDArray[Any], axis: int = -1) -> Any:
        return statistic(np.concatenate(samples, axis=axis), axis=axis)

    return _bootstrap(tuple(games), pooled, confidence, seed)


def difference_interval(x: Values, y: Values, confidence: float = 0.95, seed: int = 0) -> Interval:
    """mean(x) - mean(y) of two independent samples with a bootstrap interval, NaN where a side has one value."""

    def difference(left: NDArray[Any], right: NDArray[Any], axis: int = -1) -> Any:
        return left.mean(axis=axis) - right.mean(axis=axis)

    samples = _flat("x", x), _flat("y", y)
    return NOTHING if min(map(len, samples)) == 0 else _bootstrap(samples, difference, confidence, seed)


def normalised_return(value: float | Values, random: float, teacher: float) -> Any:
    """(value - random) / (teacher - random): 0 acts like chance, 1 like the teacher.

    Returns:
        The shape of `value`, no unit; NaN where teacher and random score the same, for then nothing can be said.
    """
    span = teacher - random
    return (np.asarray(value, dtype=float) - random) / (span if span != 0 else float("nan"))


def performance_profile(scores: Sequence[Values], taus: Values) -> NDArray[np.float64]:
    """Share of runs that score more than tau, averaged over games.

    Args:
        scores: one (runs_i,) array of normalised returns per game; no array may be empty.
        taus: (T,) thresholds, in the unit of the scores.
    Returns:
        (T,) in [0, 1], falling.
    Source: Agarwal et al. 2021, arXiv 2108.13264, equation 1 (run-score distribution).
    """
    games = [_flat("scores", game) for game in scores]
    if not games or any(game.size == 0 for game in games):
        raise ValueError(f"`scores` must hold runs for every game, got sizes {[game.size for game in games]}.")
    grid = _flat("taus", taus)
    shares: NDArray[np.float64] = np.stack([(game[:, None] > grid).mean(axis=0) for game in games]).mean(axis=0)
    return shares


def probability_of_improvement(x: Values, y: Values) -> float:
    """Chance that a run of x scores more than a run of y, ties counting half; one game. NaN if a side is empty."""
    left, right = _flat("x", x), _flat("y", y)
    if left.size == 0 or right.size == 0:
        return float("nan")
    with np.errstate(invalid="ignore", divide="ignore"):  # the p-value, unused here, is 0/0 when all values tie
        wins = stats.mannwhitneyu(left, right, method="asymptotic").statistic
    return float(wins) / (left.size * right.size)


def hindsight_improvability(
    predictions: Sequence[Sequence[int]] | NDArray[Any], labels: Sequence[int] | NDArray[Any]
) -> NDArray[np.float64]:
    """Of the rows that exit m gets wrong, the share that an earlier exit had right; lower is better.

    Args:
        predictions: (rows, exits) chosen outputs, final exit included; for ZTW of the ensemble's answers.
        labels: (rows,) right outputs.
    Returns:
        (exits,) in [0, 1]; 0 at the first exit; NaN (0/0) at a later exit that gets nothing wrong.
    Source: Wolczyk et al. 2021, arXiv 2106.05409, section 4.1; its notebook has the same 0/0.
    """
    chosen, right = np.asarray(predictions), np.asarray(labels)
    if chosen.ndim != 2 or right.shape != chosen.shape[:1]:
        raise ValueError(
            f"`predictions` must be (rows, exits) beside (rows,) labels, got {chosen.shape} and {right.shape}."
        )
    correct = chosen == right[:, None]
    seen = np.logical_or.accumulate(correct, axis=1)
    earlier = np.concatenate([np.zeros_like(seen[:, :1]), seen[:, :-1]], axis=1)
    wrong = (~correct).sum(axis=0)
    shares = np.full(chosen.shape[1], np.nan)
    np.divide((~correct & earlier).sum(axis=0), wrong, out=shares, where=wrong > 0)
    shares[:1] = 0.0
    return shares


def expected_calibration_error(counts: Values, confidence: Values, agreement: Values) -> float:
    """Mean distance between confidence and agreement over bins, weighted by their rows; in [0, 1], NaN without rows.

    Args:
        counts: (bins,) rows in each bin.
        confidence: (bins,) mean confidence in each.
        agreement: (bins,) share of right (or teacher-like) answers in each.
    Source: Naeini et al. 2015; Guo et al. 2017, arXiv 1706.04599, equation 3.
    """
    weights, distance = _flat("counts", counts), np.abs(_flat("confidence", confidence) - _flat("agreement", agreement))
    return float(np.average(distance, weights=weights)) if weights.sum() > 0 else float("nan")


def area_under_curve(relative_macs: Values, value: Values) -> float:
    """Trapezoid area under value against compute, over the range of compute that was measured.

    Args:
        relative_macs: (n,) in any order.
        value: (n,).
    Returns:
        Area in the unit of `value`; NaN for fewer than two points. Compare only curves over the same range.
    """
    cost, height = _flat("relative_macs", relative_macs), _flat("value", value)
    if cost.shape != height.shape:
        raise ValueError(f"`value` must have one value per cost ({cost.size}), got {height.size}. Give both per point.")
    if cost.size < 2:
        return float("nan")
    order = np.argsort(cost, kind="stable")
    return float(integrate.trapezoid(height[order], cost[order]))


def _flat(name: str, values: Values) -> NDArray[np.float64]:
    data = np.asarray(values, dtype=float)
    if data.ndim != 1:
        raise ValueError(f"`{name}` must have one axis, got shape {data.shape}. Give one value per run or episode.")
    return data


def _bootstrap(
    samples: tuple[NDArray[np.float64], ...], statistic: Statistic, confidence: float, seed: int, paired: bool = False
) -> Interval:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"`confidence` must be between 0 and 1, got {confidence}. 0.95 is usual.")
    estimate = float(statistic(*samples, axis=-1))
    if min(sample.size for sample in samples) < 2 or not np.isfinite(estimate):
        return Interval(estimate, float("nan"), float("nan"))
    result = stats.bootstrap(
        samples,
        statistic,
        paired=paired,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=confidence,
        method="percentile",
        batch=max(1, _CELLS_PER_BATCH // sum(sample.size for sample in samples)),
        rng=np.random.default_rng(seed),
    )
    return Interval(estimate, float(result.confidence_interval.low), float(result.confidence_interval.high))

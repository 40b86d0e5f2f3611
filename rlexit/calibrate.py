"""Thresholds for a compute budget or a bounded loss, from held-out rows or episodes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from rlexit.costs import CostTable
from rlexit.exit_policy import ExitPolicy, first_exit
from rlexit.network import StagedNetwork
from rlexit.rows import ReliabilityRow
from rlexit.rules import rules


class TargetError(ValueError):
    """A target that no thresholds can meet."""


@dataclass(frozen=True)
class Scores:
    """Held-out rows as a rule sees them.

    Args:
        early: (N, K - 1) score of each row at each early exit.
        costs: of the network.
        rule: registered name.
        spent: (N, K) multiply-adds of each row that leaves at each exit, what it skips and what the rule does not build not
            among them; `costs.exits` for all rows where it is None.
    """

    early: Float[Tensor, "rows early"]
    costs: CostTable
    rule: str
    spent: Int[Tensor, "rows exits"] | None = None

    @property
    def macs(self) -> Float[Tensor, "rows exits"]:
        """(N, K) multiply-adds of leaving at each exit."""
        if self.spent is not None:
            return self.spent.double()
        return torch.tensor(self.costs.exits, dtype=torch.float64).expand(len(self.early), -1)

    @property
    def ends(self) -> tuple[float, float]:
        """Mean relative compute where everybody leaves at the first exit, and where nobody leaves early."""
        means = self.macs[:, [0, -1]].mean(dim=0) / self.costs.full
        return float(means[0]), float(means[1])

    def exits(self, threshold: float) -> Int[Tensor, " rows"]:
        """(N,) where each row would leave if all early exits had this threshold."""
        return first_exit(self.early > threshold)

    def relative_macs(self, threshold: float) -> float:
        """Mean compute at this threshold, relative to the full network: what a run of these rows executes."""
        macs = self.macs.gather(1, self.exits(threshold)[:, None])
        return float(macs.mean()) / self.costs.full


@torch.no_grad()
def score_rows(network: StagedNetwork, rule_name: str, inputs: Any, costs: CostTable, chunk: int = 512) -> Scores:
    """Scores held-out rows at every early exit, all exits computed.

    Args:
        network: in evaluation mode.
        rule_name: who leaves; a registered name.
        inputs: (N, ...) raw inputs.
        costs: of the network.
        chunk: rows at a time.
    """
    parts = [_scored(network, rule_name, rows) for rows in inputs.split(chunk)]
    early, spent = (torch.cat(part) for part in zip(*parts, strict=True))
    return Scores(early, costs, rule_name, spent)


def _scored(
    network: StagedNetwork, rule_name: str, inputs: Any
) -> tuple[Float[Tensor, "batch early"], Int[Tensor, "batch exits"]]:
    """Scores at the early exits, and what leaving at each exit costs each row where all early ones are open."""
    rule = rules[rule_name]()
    last = network.exits - 1
    read = network.read_later([True] * last, rule.needs_every_exit)
    state = network.begin(inputs)
    if network.reuse is not None:
        state, _ = network.reuse.recall(state)
    scores = torch.full((len(state), last), torch.nan, device=state.device)
    spent: list[Tensor] = []
    while not network.finished(state):
        state, decision = network.decide(state)
        state = network.advance(state, decision)
        if not network.at_exit(state):
            continue
        exit = state.exit
        if rule.before_head and exit < last:
            state, _ = network.consider(state)
        answered = network.answer(state)
        spent.append(answered.macs)
        if exit < last:
            scores[:, exit] = rule.score(answered)
            # Asked before the head, a row that goes on pays for the head only where a later exit reads it.
            answered = replace(answered, macs=state.macs) if rule.before_head and not read[exit] else answered
        state = answered
    return scores, torch.stack(spent, dim=1)


@torch.no_grad()
def reliability(network: StagedNetwork, inputs: Any, bins: int = 15, chunk: int = 512) -> list[ReliabilityRow]:
    """How far each exit's confidence can be trusted: agreement with the full network, by bins of confidence.

    Args:
        network: in evaluation mode.
        inputs: (N, ...) held-out raw inputs.
        bins: of equal width; empty ones are left out.
        chunk: rows at a time.
    Source: Guo et al. 2017, arXiv 1706.04599, section 2; with agreement in place of accuracy.
    """
    answers = torch.cat([network(rows).answers for rows in inputs.split(chunk)])
    confidence, chosen = answers.exp().max(dim=-1)
    agrees = (chosen == chosen[:, -1:]).double()
    found: list[ReliabilityRow] = []
    for exit in range(network.exits - 1):
        sure = confidence[:, exit].clamp(max=1.0).double()
        index = (sure * bins).ceil().long().clamp(1, bins) - 1
        for bin in torch.unique(index).tolist():
            inside = index == bin
            means = float(sure[inside].mean()), float(agrees[inside, exit].mean())
            found.append(ReliabilityRow(exit, bin / bins, (bin + 1) / bins, int(inside.sum()), *means))
    return found


def check_target(costs: CostTable, target: float) -> None:
    """Raises TargetError if a compute target is below the cheapest exit, or NaN."""
    _check(costs.exits[0] / costs.full, target)


def _check(cheapest: float, target: float) -> None:
    if not target >= cheapest:
        raise TargetError(
            f"`target_macs` must be at least {cheapest:.3f}, what the first exit costs, got {target:g}. "
            "Ask for more compute, or put an exit earlier."
        )


def solve_macs(scores: Scores, target: float) -> float:
    """The largest threshold, shared by all early exits, whose mean compute is at most the target.

    A larger threshold lets rows go on for longer, so compute never falls with it: a search over the scores that were
    seen finds the answer exactly. (Only where a head that the rule need not build is dearer than the way to the next
    exit may there be a larger one; what is returned costs what is asked for, or less.)

    Args:
        scores: of held-out rows.
        target: mean compute relative to the full network.
    Returns:
        The threshold; -inf where only leaving always at the first exit is cheap enough.
    Raises:
        TargetError: the target is below the cheapest exit, or NaN.
    """
    _check(scores.ends[0], target)
    seen = torch.unique(scores.early).tolist()
    if scores.relative_macs(seen[-1]) <= target:
        return float(seen[-1])
    low, high = -1, len(seen) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if scores.relative_macs(seen[middle]) <= target:
            low = middle
        else:
            high = middle
    return float(seen[low]) if low >= 0 else -math.inf


def threshold_grid(scores: Scores, points: int) -> list[float]:
    """Thresholds whose compute is evenly spaced from the cheapest exit to all heads and the full network."""
    cheapest, dearest = scores.ends
    seen = torch.unique(scores.early).tolist()
    if len(seen) < points:  # a rule that counts, such as patience: every threshold that makes a difference
        every = {scores.relative_macs(threshold): threshold for threshold in (*seen[::-1], -math.inf)}
        return sorted(every.values())
    levels = np.linspace(cheapest, dearest, points)
    return list(dict.fromkeys(solve_macs(scores, float(level) + 1e-9) for level in levels))


def refined_policy(network: StagedNetwork) -> ExitPolicy | None:
    """The exit policy with which a network's decisions were refined: its own gates decide, greedily; None without any."""
    if not network.leave_gates and network.reuse is None:
        return None
    rule = "learned" if network.leave_gates else "confidence"
    thresholds = tuple(0.5 if name in network.leave_gates else math.inf for name in network.exit_names[:-1])
    return ExitPolicy(rule, thresholds, "refined", {"target": "refined"})


def rules_for(network: StagedNetwork, rules: Sequence[str]) -> list[str]:
    """Those of the rules that a network can be run under: `learned` needs a leave gate at every early exit."""
    asked = len(network.leave_gates) == network.exits - 1 > 0
    return [rule for rule in rules if asked or rule != "learned"]


def shared_policy(
    rule: str, threshold: float, exits: int, label: str = "", provenance: dict[str, Any] | None = None
) -> ExitPolicy:
    """An exit policy with one threshold for all early exits, as in the papers."""
    return ExitPolicy(rule, (threshold,) * (exits - 1), label, provenance or {})


def calibrate_macs(
    rows: Callable[[ExitPolicy], Any], score: Callable[[Any], Scores], exits: int, target: float, rounds: int
) -> ExitPolicy:
    """Thresholds for a compute target: solve, roll out, solve again, because an actor's states depend on its exits.

    Args:
        rows: held-out inputs met under an exit policy (for classifiers, always the same).
        score: scores of such inputs.
        exits: K.
        target: mean compute relative to the full network.
        rounds: how often to solve and roll out.
    Returns:
        Of the policies tried the one with most compute within the target on its own states, or else the cheapest; its
        provenance holds that compute as `relative_macs`, and all rounds.
    Raises:
        TargetError: the target is below the cheapest exit.
    """
    policy = ExitPolicy.full(exits)
    aim = target
    tried: list[tuple[float, ExitPolicy]] = []
    history: list[dict[str, float]] = []
    scores = score(rows(policy))
    _check(scores.ends[0], target)
    for round in range(rounds):
        policy = shared_policy(scores.rule, solve_macs(scores, max(aim, scores.ends[0])), exits)
        solved = scores.relative_macs(policy.thresholds[0])
        scores = score(rows(policy))
        rolled_out = scores.relative_macs(policy.thresholds[0])
        history.append(
            {
                "threshold": policy.thresholds[0],
                "relative_macs_solved": solved,
                "relative_macs_rolled_out": rolled_out,
            }
        )
        tried.append((rolled_out, policy))
        # Once it is solved on states that its own exits lead to, what they still cost too much is asked for less.
        aim -= max(rolled_out - target, 0.0) if round else 0.0
    cost, policy = max(
        (one for one in tried if one[0] <= target), default=min(tried, key=lambda one: one[0]), key=_cost
    )
    label = f"target_macs={target:g}"
    spelled = [
        {key: value if math.isfinite(value) else str(value) for key, value in entry.items()} for entry in history
    ]
    provenance = {"target": label, "rounds": spelled, "relative_macs": cost}
    return ExitPolicy(policy.rule, policy.thresholds, label, provenance)


def _cost(tried: tuple[float, ExitPolicy]) -> float:
    return tried[0]


@dataclass(frozen=True)
class Candidate:
    """An exit policy and what it reached on calibration episodes.

    Args:
        policy: rule and thresholds.
        values: return of each episode (or accuracy of each fold).
        relative_macs: mean compute.
    """

    policy: ExitPolicy
    values: Sequence[float]
    relative_macs: float


def calibrate_loss(
    candidates: Sequence[Candidate], teacher: Sequence[float], floor: float, drop: float, confidence: float
) -> ExitPolicy | None:
    """The cheapest candidate whose loss of normalised return is certified to be at most `drop`.

    Candidates are tested in the order of falling compute and the first failure ends it (fixed-sequence testing), so
    the certificate holds for the one returned at the stated confidence, up to the t-test's normality.

    Args:
        candidates: in any order; those that cost as much as the full network are not tried.
        teacher: return of each of the teacher's episodes on the same seeds.
        floor: return of a random actor; 0 for accuracy.
        drop: largest loss, as a share of (teacher - floor).
        confidence: one-sided.
    Returns:
        The policy with its certificate as provenance, or None if no candidate can be certified with so many episodes.
    Source: learn then test, Angelopoulos et al. 2021, arXiv 2110.01052; fixed-sequence testing.
    """
    reference = np.asarray(teacher, dtype=float) - floor
    best: ExitPolicy | None = None
    cheaper = [candidate for candidate in candidates if candidate.relative_macs < 1]
    for candidate in sorted(cheaper, key=lambda one: -one.relative_macs):
        values = np.asarray(candidate.values, dtype=float) - floor
        p_value = _p_value(values, (1 - drop) * reference)
        if not p_value <= 1 - confidence:
            break
        provenance = {
            "target": f"max_return_drop={drop:g}",
            "episodes": len(values),
            "mean_return": float(values.mean() + floor),
            "teacher_return": float(reference.mean() + floor),
            "return_drop": float(1 - values.mean() / reference.mean()),
            "relative_macs": candidate.relative_macs,
            "p_value": p_value,
            "confidence": confidence,
        }
        label = f"max_return_drop={drop:g}"
        best = ExitPolicy(candidate.policy.rule, candidate.policy.thresholds, label, provenance)
    return best


def _p_value(values: np.ndarray, least: np.ndarray) -> float:
    """One-sided p-value of "the mean of `values` is below the mean of `least`"; Welch's t-test."""
    if len(values) < 2:
        return 1.0
    if np.ptp(values) == 0 and np.ptp(least) == 0:
        # Without any spread a t-test is blind; a sign test still says how much so many equal games can show.
        return float(0.5 ** len(values)) if values[0] >= least[0] else 1.0
    with warnings.catch_warnings():
        # One sample whose games all end alike has a variance of exactly 0, which scipy warns of and handles.
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(stats.ttest_ind(values, least, equal_var=False, alternative="greater").pvalue)

"""Exit policies: a rule and its thresholds, chosen on held-out data and saved with where they came from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlexit.rules import Rule, rules


@dataclass(frozen=True)
class ExitPolicy:
    """Who leaves where: a row leaves at exit k if its score there is above `thresholds[k]`; the last exit always answers.

    Args:
        rule: registered name.
        thresholds: K - 1 numbers. +inf: nobody leaves and the exit is not built. -inf: everybody leaves. A finite one
            that nobody passes pays for its head.
        label: what tables call it.
        provenance: how the thresholds were found: the target, and what was measured on calibration episodes.
        budget: most multiply-adds that any row may cost, never exceeded; 0 for no such bound.
    Raises:
        ValueError: a threshold is NaN, or the budget is negative.
        LookupError: no such rule.
    """

    rule: str
    thresholds: tuple[float, ...]
    label: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    budget: int = 0

    def __post_init__(self) -> None:
        rules[self.rule]
        if self.budget < 0:
            raise ValueError(f"`budget` must be at least 0, got {self.budget}. Use 0 for no bound.")
        for exit, threshold in enumerate(self.thresholds):
            if math.isnan(threshold):
                raise ValueError(f"`thresholds[{exit}]` must be a number, got nan. Use inf to close an exit.")
        if not self.label:
            spelled = ",".join(f"{value:g}" for value in dict.fromkeys(self.thresholds))
            object.__setattr__(self, "label", f"{self.rule}@{spelled}")

    @classmethod
    def full(cls, exits: int) -> ExitPolicy:
        """Nobody leaves early and no early head is built: the backbone itself."""
        return cls("confidence", (math.inf,) * (exits - 1), "full")

    @classmethod
    def always(cls, exit: int, exits: int) -> ExitPolicy:
        """Everybody leaves at one exit; earlier ones are built only if later heads read them."""
        thresholds = tuple(math.inf if early < exit else -math.inf for early in range(exits - 1))
        return cls("confidence", thresholds, f"exit {exit}" if exit < exits - 1 else "full")

    @property
    def scorer(self) -> Rule:
        """The rule itself."""
        return rules[self.rule]()

    def to_json(self) -> dict[str, Any]:
        """JSON values; infinities are spelled as strings."""
        return {
            "rule": self.rule,
            "thresholds": [value if math.isfinite(value) else str(value) for value in self.thresholds],
            "label": self.label,
            "provenance": dict(self.provenance),
            **({"budget": self.budget} if self.budget else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ExitPolicy:
        """The inverse of `to_json`; raises ValueError if a field is missing or of a wrong type."""
        try:
            thresholds = tuple(float(threshold) for threshold in value["thresholds"])
            rule, label, provenance = str(value["rule"]), str(value["label"]), dict(value["provenance"])
            budget = int(value.get("budget", 0))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"`exit policy` must have rule, thresholds, label, provenance, got {value}.") from error
        return cls(rule, thresholds, label, provenance, budget)


def first_exit(leaves: Bool[Tensor, "rows early"]) -> Int[Tensor, " rows"]:
    """(N,) where each row leaves: the first early exit of (N, K - 1) that lets it, else the last exit."""
    return torch.cat([leaves, leaves.new_ones((len(leaves), 1))], dim=1).to(torch.int64).argmax(dim=1)


def threshold_rows(policies: Sequence[ExitPolicy], exits: int) -> Float[Tensor, "rows early"]:
    """One row of thresholds per policy, so that many policies of one rule run in one batch.

    Raises:
        ValueError: a policy has not exactly K - 1 thresholds, or the rules differ.
    """
    for policy in policies:
        if len(policy.thresholds) != exits - 1:
            raise ValueError(
                f"`thresholds` must have {exits - 1} values for {exits} exits, got {len(policy.thresholds)} "
                f"in {policy.label!r}. Calibrate the exit policy for this network."
            )
    if len({policy.rule for policy in policies}) > 1:
        raise ValueError(f"`rule` must be the same within a batch, got {sorted({policy.rule for policy in policies})}.")
    return torch.tensor([policy.thresholds for policy in policies], dtype=torch.float32).reshape(
        len(policies), exits - 1
    )

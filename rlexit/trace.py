"""What a dense pass tells: every exit of every row, the decisions on the way, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from rlexit.gates import Decision


@dataclass(frozen=True)
class Trace:
    """All exits of a batch at once.

    Args:
        logits: (B, K, A) raw logits of every exit.
        answers: (B, K, A) log-probabilities after the ensemble.
        decisions: of every gate, in the order of execution.
        expected_macs: (B,) multiply-adds that the decisions lead to: units and skip paths, gates, and the heads where
            rows leave (all heads that are met, without leave gates); has a gradient in the relaxed decisions.
        leaving: decisions of the leave gates, in the order of the exits that have one.
        expected_parts: what `expected_macs` is the sum of, by part: `units.<name>`, `gates.<name>`, ...
        features: the last of every size of map, in order, and at the end what the last exit reads.
    """

    logits: Float[Tensor, "batch exits outputs"]
    answers: Float[Tensor, "batch exits outputs"]
    decisions: tuple[Decision, ...]
    expected_macs: Float[Tensor, " batch"]
    leaving: tuple[Decision, ...] = ()
    expected_parts: Mapping[str, Float[Tensor, " batch"]] = field(default_factory=dict)
    features: tuple[Float[Tensor, "batch ..."], ...] = ()

"""Resource loss: what compute costs in training, at a price, or at whatever price holds a target."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor

from rlexit.config import require
from rlexit.gating_config import COSTS

# Logits by which all gates are shifted, at most, to meet a target.
WIDEST_SHIFT = 8.0


def price_of_alpha(alpha: float, batch: int, costs: Sequence[float]) -> float:
    """The price lambda of a DDI-style alpha, whose costs are divided by the dearest and summed over batch and units.

    Args:
        alpha: weight of the summed cost.
        batch: rows summed over.
        costs: of every gated unit, any unit of measure.
    Returns:
        alpha * batch * sum(costs / max(costs)), for a loss that averages over the batch: 0.896 for 2e-4, 128, 35 equal ones.
    Source: Wang et al. 2020 (DDI), arXiv 1907.04523, section IV; units as in the authors' sibling code.
    """
    return alpha * batch * sum(cost / max(costs) for cost in costs)


class ResourceLoss:
    """lambda * mean relative compute, the price depending on the mode.

    `linear`: fixed. `sign_target`: against compute above the target, for it below. `deadband`: 0 within `band` above the
    target. `dual`: rises by `rate` per update and relative MACs above the target, falls below it, within 0..price_max.

    Args:
        mode: one of those.
        price: lambda, nats per full network; with `dual` its first value.
        target: mean relative compute; may be set anew between updates.
        rate: of the dual variable.
        price_max: of the dual variable.
        band: of `deadband`, relative compute.
    Raises:
        ValueError: unknown mode, or a negative price.
    Source: Wang et al. 2020 (DDI), arXiv 1907.04523, equation 5; E2-Train (sign) and FracTrain (dead band) by its authors.
    """

    def __init__(
        self,
        mode: str = "linear",
        price: float = 0.0,
        target: float = 1.0,
        *,
        rate: float = 0.02,
        price_max: float = 20.0,
        band: float = 0.02,
    ) -> None:
        require(mode in COSTS, "cost", f"be one of {', '.join(COSTS)}", mode)
        require(price >= 0, "price", "be at least 0", price, "A negative price pays for compute.")
        self.mode, self.price, self.target = mode, price, target
        self.rate, self.price_max, self.band = rate, price_max, band

    def __call__(self, relative: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
        """The loss of one batch.

        Args:
            relative: (B,) expected compute over that of the full network, with gradient.
        """
        mean = relative.mean()
        return self.sign(float(mean.detach())) * self.price * mean

    def sign(self, mean: float) -> float:
        """1, 0 or -1: which way the price pushes at this mean compute."""
        if self.mode == "sign_target":
            return 1.0 if mean > self.target else -1.0
        if self.mode == "deadband":
            return 1.0 if mean > self.target + self.band else 0.0 if mean >= self.target else -1.0
        return 1.0

    def update(self, mean: float) -> None:
        """Moves the dual price by what a batch cost; the others stay."""
        if self.mode == "dual":
            self.price = dual_step(self.price, mean, self.target, self.rate, self.price_max)


def settled_shift(cost: Callable[[float], float], target: float, steps: int = 7) -> float:
    """The shift of all gates' logits towards less compute with which greedy decisions cost the target, or a little less.

    A logit is a gain over a weight, so one shift of all gates is another price: what is worth most stays.

    Args:
        cost: moves the logits by so much from where they were first, and tells the mean relative compute then.
        target: mean relative compute.
        steps: bisections of -8..8.
    Returns:
        The shift; it was the last that `cost` was asked for. Where no shift meets the target, a warning says so.
    """
    low, high = -WIDEST_SHIFT, WIDEST_SHIFT
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) > target else (low, middle)
    found = cost(high)
    if high == WIDEST_SHIFT and found > target:
        warnings.warn(
            f"No shift of the gates meets a target of {target:g}: with most of them shut it costs {found:.3f}. "
            "Raise the target.",
            RuntimeWarning,
            stacklevel=2,
        )
    return high


def dual_step(price: float, mean: float, target: float, rate: float, price_max: float) -> float:
    """The next price: clip(price + rate * (mean - target), 0, price_max)."""
    return min(max(price + rate * (mean - target), 0.0), price_max)

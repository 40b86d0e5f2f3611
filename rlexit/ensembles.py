"""Ensembles: an exit's answer combined from the log-probabilities of all exits so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from rlexit.registry import Registry

ensembles: Registry[type[Ensemble]] = Registry("ensemble")

ADDITIVE_FLOOR = 1e-6


class Ensemble(nn.Module):
    """Combines exits. `needs_every_exit` says whether earlier heads must be built even where nobody may leave.

    Args:
        exits: how many exits are combined; a later one answers for itself (in policies, the teacher's own head).
        outputs: A, classes or actions.
    """

    needs_every_exit = True

    def __init__(self, exits: int, outputs: int) -> None:
        super().__init__()
        self.exits = exits
        self.outputs = outputs

    def combine(self, log_probabilities: Float[Tensor, "batch exits outputs"]) -> Float[Tensor, "batch outputs"]:
        """Answer at the newest exit.

        Args:
            log_probabilities: (B, exits so far, A) each exit's own, normalised.
        Returns:
            (B, A) log-probabilities, normalised.
        """
        raise TypeError(f"`{type(self).__name__}` must implement `combine`.")

    def from_logits(self, logits: Sequence[Float[Tensor, "batch outputs"]]) -> Float[Tensor, "batch outputs"]:
        """`combine` of raw logits, one (B, A) per exit so far: what is exported."""
        return self.combine(torch.stack(list(logits), dim=1).log_softmax(dim=-1))

    def as_sum(self, exit: int) -> tuple[Float[Tensor, " so_far"], Float[Tensor, " outputs"]] | None:
        """(exit + 1,) weights and (A,) bias, if the answer is the log-softmax of so weighted raw logits; else None."""
        return None

    def weights(self) -> list[Float[Tensor, " so_far"]]:
        """(exit + 1,) shares of the exits so far, summing to 1, for each fitted exit; empty where nothing is weighted."""
        return []

    def combine_all(
        self, log_probabilities: Float[Tensor, "batch exits outputs"]
    ) -> Float[Tensor, "batch exits outputs"]:
        """Answers at every exit, (B, K, A)."""
        count = log_probabilities.shape[1]
        return torch.stack([self.combine(log_probabilities[:, : exit + 1]) for exit in range(count)], dim=1)


@ensembles.register("none")
class NoEnsemble(Ensemble):
    """Each exit answers for itself."""

    needs_every_exit = False

    def combine(self, log_probabilities: Float[Tensor, "batch exits outputs"]) -> Float[Tensor, "batch outputs"]:
        """The newest exit's own log-probabilities."""
        return log_probabilities[:, -1]


class _Weighted(Ensemble):
    def __init__(self, exits: int, outputs: int) -> None:
        super().__init__(exits, outputs)
        self.log_weights = nn.ParameterList([nn.Parameter(0.01 * torch.randn(exit + 1)) for exit in range(exits)])
        self.log_bias = nn.ParameterList([nn.Parameter(torch.zeros(outputs)) for _ in range(exits)])

    def weights(self) -> list[Float[Tensor, " so_far"]]:
        """exp(a_m) of every exit m, in shares of their sum."""
        return [weight.detach().softmax(dim=0) for weight in self.log_weights]

    def _shares(self, exit: int) -> Float[Tensor, " so_far"]:
        """Positive weights of the exits so far at one exit."""
        return self.log_weights[exit].exp()

    def _mixed(self, shares: Tensor, log_probabilities: Tensor, log_bias: Tensor) -> Tensor:
        """Log-probabilities of one mixture (m,) or several (K, m) of (B, m, A)."""
        raise TypeError(f"`{type(self).__name__}` must implement `_mixed`.")

    def combine(self, log_probabilities: Float[Tensor, "batch exits outputs"]) -> Float[Tensor, "batch outputs"]:
        """(B, m, A) to (B, A); a later exit than those fitted answers for itself."""
        exit = int(log_probabilities.shape[1]) - 1
        if exit >= self.exits:
            return log_probabilities[:, -1]
        return self._mixed(self._shares(exit), log_probabilities, self.log_bias[exit])

    def combine_all(
        self, log_probabilities: Float[Tensor, "batch exits outputs"]
    ) -> Float[Tensor, "batch exits outputs"]:
        """Answers at every exit, (B, K, A): all exits in one product with a triangle of weights, for many exits' fits."""
        count = min(log_probabilities.shape[1], self.exits)
        if not count:
            return log_probabilities
        shares = torch.stack([functional.pad(self._shares(exit), (0, count - 1 - exit)) for exit in range(count)])
        bias = torch.stack([self.log_bias[exit] for exit in range(count)])
        mixed = self._mixed(shares, log_probabilities[:, :count], bias)
        return torch.cat([mixed, log_probabilities[:, count:]], dim=1)


@ensembles.register("geometric")
class GeometricEnsemble(_Weighted):
    """Weighted product of the exits' distributions, with a bias per output.

    `log q_m = log_softmax(1/m * sum_j exp(a_mj) * log p_j + c_m)`, j = 1..m; a from N(0, 0.01^2), c = 0.

    Source: Wolczyk et al. 2021, arXiv 2106.05409, eq. 3; weights as in its code (mean over exits, exp keeps them positive).
    """

    def _shares(self, exit: int) -> Float[Tensor, " so_far"]:
        return super()._shares(exit) / (exit + 1)

    def _mixed(self, shares: Tensor, log_probabilities: Tensor, log_bias: Tensor) -> Tensor:
        return (torch.matmul(shares, log_probabilities) + log_bias).log_softmax(dim=-1)

    def as_sum(self, exit: int) -> tuple[Float[Tensor, " so_far"], Float[Tensor, " outputs"]] | None:
        """What normalises each exit shifts all outputs alike and cancels; None at a later exit than those fitted."""
        return (self._shares(exit).detach(), self.log_bias[exit].detach()) if exit < self.exits else None

    def from_logits(self, logits: Sequence[Float[Tensor, "batch outputs"]]) -> Float[Tensor, "batch outputs"]:
        """The same in a third of the operators, as the weighted sum of `as_sum`."""
        found = self.as_sum(len(logits) - 1)
        if found is None:
            return logits[-1].log_softmax(dim=-1)
        weights, mixed = found
        for weight, own in zip(weights.tolist(), logits, strict=True):
            mixed = mixed + weight * own
        return mixed.log_softmax(dim=-1)


@ensembles.register("additive")
class AdditiveEnsemble(_Weighted):
    """Weighted sum of the exits' probabilities, with a positive bias per output (ablation).

    `q_m = normalise(sum_j exp(a_mj) * p_j + exp(c_m))`, floored at 1e-6 before the logarithm.

    Source: Wolczyk et al. 2021, arXiv 2106.05409, supplement B.2.
    """

    def _mixed(self, shares: Tensor, log_probabilities: Tensor, log_bias: Tensor) -> Tensor:
        sums = torch.matmul(shares, log_probabilities.exp()) + log_bias.exp()
        floored = sums / sums.sum(dim=-1, keepdim=True) + ADDITIVE_FLOOR
        return (floored / floored.sum(dim=-1, keepdim=True)).log()


def fit_ensemble(
    ensemble: Ensemble,
    log_probabilities: Float[Tensor, "rows exits outputs"],
    loss: Callable[[Float[Tensor, "rows exits outputs"]], Float[Tensor, "rows exits"]],
    steps: int = 100,
) -> list[float]:
    """Fits all exits' ensembles at once on cached log-probabilities, by L-BFGS on the whole set.

    The problems of the exits are independent and tiny (m + A numbers each), so their sum is fitted in one go, in
    seconds; the original trained each for 500 epochs.

    Args:
        ensemble: its parameters are changed in place; one without parameters is left alone.
        log_probabilities: (N, K, A) of the exits, from rows that are not used for calibration.
        loss: unreduced loss (N, K) of answers (N, K, A).
        steps: at most so many L-BFGS iterations.
    Returns:
        Mean loss per exit after the fit.
    """
    fitted = log_probabilities[:, : ensemble.exits]
    parameters = list(ensemble.parameters())
    if parameters:
        optimizer = torch.optim.LBFGS(parameters, max_iter=steps, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            total = loss(ensemble.combine_all(fitted)).mean(dim=0).sum()
            total.backward()
            return total

        optimizer.step(closure)
    with torch.no_grad():
        return [float(value) for value in loss(ensemble.combine_all(fitted)).mean(dim=0)]

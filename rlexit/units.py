"""Units: the pieces of a backbone. Dense for training, gathered for real: what a row skips is not computed for it."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlexit.gates import Decision
from rlexit.macs import macs_per_row
from rlexit.state import blank, leaves_of, map_tensors, take


class Unit(nn.Module):
    """One piece of the backbone. A subclass implements `body`, and `skip` if rows may pass it by.

    `body` is pure, tensors in and out, so that it can be exported, vmapped and counted. `width`: how many channels a
    gate before it decides about; 0 if it takes whole rows only.
    """

    skippable = False
    width = 0

    def body(self, features: Any, decision: Decision | None = None) -> Any:
        """The unit's work.

        Args:
            features: tree of (B, ...).
            decision: of the gate before this unit. In real execution all rows of a call share `decision.action`.
        Returns:
            Tree of (B, ...), what the next unit reads.
        """
        raise TypeError(f"`{type(self).__name__}` must implement `body`.")

    def skip(self, features: Any) -> Any:
        """The way past the unit, of the same structure as `body`'s result."""
        raise ValueError(f"`{type(self).__name__}` must have a skip path to be gated by rows. Gate another unit.")

    def skip_macs(self, features: Any) -> Int[Tensor, " batch"]:
        """(B,) multiply-adds of `skip` for each row; 0 for a skip path without weights."""
        batch, device = _batch(features)
        return torch.zeros(batch, dtype=torch.int64, device=device)

    def glance(self, features: Any) -> Tensor:
        """The part of the unit's input that a gate before it sees; the whole of it by default."""
        if not isinstance(features, Tensor):
            raise TypeError(f"`{type(self).__name__}` must say by `glance` which of its features a gate sees.")
        return features

    def tap(self, features: Any) -> Tensor:
        """The part of the unit's result that an exit after it reads; the whole of it by default."""
        if not isinstance(features, Tensor):
            raise TypeError(f"`{type(self).__name__}` must say by `tap` which of its features an exit reads.")
        return features

    def macs(self, features: Any, decision: Decision | None = None) -> Int[Tensor, " batch"]:
        """(B,) multiply-adds of `body` for each row, heads and gates not included.

        The default counts one row and holds for units whose work does not depend on the decision.
        """
        batch, device = _batch(features)
        return torch.full((batch,), macs_per_row(self, features), dtype=torch.int64, device=device)

    def expected_macs(self, features: Any, decision: Decision | None = None) -> Float[Tensor, " batch"]:
        """(B,) multiply-adds that the relaxed decision leads to, skip path included, with gradient in it.

        A mask finer than a row counts as it is, without a gradient, unless a subclass knows better.
        """
        macs = self.macs(features, decision).to(torch.float32)
        if decision is None or not self.skippable:
            return macs
        if decision.relaxed.dim() == 1:
            weight = decision.relaxed
        else:
            weight = (decision.action > 0).to(torch.float32)
        return weight * macs + (1 - weight) * self.skip_macs(features)

    def forward(self, features: Any, decision: Decision | None = None) -> Any:
        """The unit's body; skipping is `execute`'s business."""
        return self.body(features, decision)

    def execute(self, features: Any, decision: Decision | None) -> tuple[Any, Int[Tensor, " batch"]]:
        """Really runs the unit: rows are gathered by action, and those with action 0 are not computed.

        The rows meet again afterwards, because the next unit is fastest in one batch.

        Returns:
            Features, and the (B,) multiply-adds that each row cost.
        """
        if decision is None:
            return self(features), self.macs(features)
        actions = torch.unique(decision.action).tolist()
        if not actions or (len(actions) == 1 and actions[0] != 0):
            return self(features, decision), self.macs(features, decision)
        batch, device = _batch(features)
        macs = torch.zeros(batch, dtype=torch.int64, device=device)
        result = None
        for action in actions:
            index = torch.nonzero(decision.action == action).flatten()
            group, chosen = take(features, index), take(decision, index)
            if action == 0:
                output, cost = self.skip(group), self.skip_macs(group)
            else:
                output, cost = self(group, chosen), self.macs(group, chosen)
            macs[index] = cost
            if result is None:
                result = map_tensors(lambda leaf: blank(leaf, batch), output)
            map_tensors(lambda leaf, part, rows=index: leaf.index_copy_(0, rows, part), result, output)
        return result, macs

    def relax(self, features: Any, decision: Decision) -> Any:
        """Runs the unit densely for training: body and skip path mixed by the decision's weights, with gradient."""
        output = self(features, decision)
        if not self.skippable:
            return output
        if decision.relaxed.dim() == 1:
            weight = decision.relaxed
        else:
            weight = (decision.action > 0).to(decision.relaxed.dtype)

        def mix(ran: Tensor, passed: Tensor) -> Tensor:
            share = weight.reshape(-1, *(1,) * (ran.dim() - 1)).to(ran.dtype)
            return share * ran + (1 - share) * passed

        return map_tensors(mix, output, self.skip(features))


class ModuleUnit(Unit):
    """A unit that runs an ordinary module on one tensor.

    Args:
        module: (B, ...) to (B, ...).
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def body(self, features: Any, decision: Decision | None = None) -> Any:
        """The module's result."""
        return self.module(features)


def _batch(features: Any) -> tuple[int, torch.device]:
    first = leaves_of(features)[0]
    return int(first.shape[0]), first.device

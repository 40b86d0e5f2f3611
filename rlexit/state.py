"""What a batch carries from unit to unit, by row: when rows leave, everything is re-indexed together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def map_tensors(function: Callable[..., Tensor], tree: Any, *others: Any) -> Any:
    """Applies a function to every tensor of a tree of tuples, lists, dicts and dataclasses.

    Args:
        function: takes one tensor of `tree` and the tensors at the same place of `others`.
        tree: leaves that are no tensors are kept as they are.
        others: trees of the same structure.
    """
    if isinstance(tree, Tensor):
        return function(tree, *others)
    if isinstance(tree, dict):
        return {key: map_tensors(function, value, *(other[key] for other in others)) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        parts = [map_tensors(function, *values) for values in zip(tree, *others, strict=True)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    if is_dataclass(tree) and not isinstance(tree, type):
        names = [one.name for one in fields(tree)]
        changed = {n: map_tensors(function, getattr(tree, n), *(getattr(o, n) for o in others)) for n in names}
        return replace(tree, **changed)
    return tree


def leaves_of(tree: Any) -> list[Tensor]:
    """All tensors of a tree, in its order."""
    if isinstance(tree, Tensor):
        return [tree]
    if is_dataclass(tree) and not isinstance(tree, type):
        parts = [getattr(tree, one.name) for one in fields(tree)]
    else:
        parts = list(tree.values()) if isinstance(tree, dict) else list(tree) if isinstance(tree, (tuple, list)) else []
    return [leaf for part in parts for leaf in leaves_of(part)]


def take(tree: Any, index: Int[Tensor, " rows"]) -> Any:
    """The given rows of every tensor of a tree, in the order of `index`."""
    return map_tensors(lambda leaf: _rows(leaf, index), tree)


def _rows(leaf: Tensor, index: Tensor) -> Tensor:
    # `index_select` is the faster one, but moves channels apart that lie together; a convolution then moves them back.
    return leaf[index] if is_channels_last(leaf) else leaf.index_select(0, index)


def is_channels_last(leaf: Tensor) -> bool:
    """Whether a tensor is a map whose channels lie together."""
    return leaf.dim() == 4 and not leaf.is_contiguous() and leaf.is_contiguous(memory_format=torch.channels_last)


def blank(leaf: Tensor, rows: int) -> Tensor:
    """An unfilled tensor of so many rows, shaped and laid out as `leaf`."""
    layout = torch.channels_last if is_channels_last(leaf) else torch.contiguous_format
    return torch.empty((rows, *leaf.shape[1:]), dtype=leaf.dtype, device=leaf.device, memory_format=layout)


def put(tree: Any, index: Int[Tensor, " rows"], part: Any) -> Any:
    """A copy of a tree in which the given rows are replaced by those of `part`."""
    return map_tensors(lambda leaf, new: leaf.clone().index_copy_(0, index, new), tree, part)


@dataclass(frozen=True)
class Forecast:
    """What a dense pass expects of real execution, with gradient.

    Args:
        parts: (B,) multiply-adds that the relaxed decisions so far lead to, by part of the network.
        here: (B,) share of the row that has not left; it pays for what comes.
    """

    parts: dict[str, Float[Tensor, " batch"]]
    here: Float[Tensor, " batch"]


@dataclass(frozen=True)
class ExitState:
    """A group of rows on their way through a network; every tensor is (B, ...).

    Args:
        rows: (B,) index of each row in the inputs of the call.
        features: tree of (B, ...), what the next unit reads.
        logits: (B, exits so far, A) raw logits; NaN at an exit that was not built for the row.
        answer: (B, A) log-probabilities at the newest exit, after the ensemble; None before the first.
        macs: (B,) multiply-adds really executed for the row.
        decisions: one entry per gate met so far (see `rlexit.gates.Decision`).
        leaving: one entry per leave gate asked so far, action 1 where the row wants to leave.
        carry: what gates keep within a pass.
        memory: what lives across env steps; None at the start of an episode.
        path: a static choice for the whole call, such as a width.
        forecast: what relaxed decisions lead to, in dense passes; None in real execution.
        unit: the next unit.
        exit: exits met so far.
    """

    rows: Int[Tensor, " batch"]
    features: Any
    logits: Float[Tensor, "batch exits outputs"]
    answer: Float[Tensor, "batch outputs"] | None
    macs: Int[Tensor, " batch"]
    decisions: tuple[Any, ...] = ()
    leaving: tuple[Any, ...] = ()
    carry: Any = None
    memory: Any = None
    path: tuple[Any, ...] = ()
    forecast: Forecast | None = None
    unit: int = 0
    exit: int = 0

    def __len__(self) -> int:
        return int(self.rows.shape[0])

    def select(self, index: Int[Tensor, " rows"]) -> ExitState:
        """The same state for the given rows only; raises nothing and forgets nothing."""
        chosen: ExitState = take(self, index)
        return chosen

    def charge(
        self, part: str, macs: Int[Tensor, " batch"], expected: Float[Tensor, " batch"] | None = None
    ) -> ExitState:
        """The same state with more multiply-adds on every row's bill.

        Args:
            part: of the network, which did the work.
            macs: (B,) executed.
            expected: (B,) with gradient, for dense passes, which weigh it by the share that has not left; `macs` if None.
        """
        if self.forecast is None:
            return replace(self, macs=self.macs + macs)
        more = self.forecast.here * (macs if expected is None else expected)
        parts = {**self.forecast.parts, part: more}
        return replace(self, macs=self.macs + macs, forecast=replace(self.forecast, parts=parts))

    def share(self, here: Float[Tensor, " batch"]) -> ExitState:
        """The same state of a dense pass, in which this (B,) share of the row pays for what comes."""
        return self if self.forecast is None else replace(self, forecast=replace(self.forecast, here=here))

    @property
    def here(self) -> Float[Tensor, " batch"]:
        """(B,) share of the row that has not left; all of it in real execution."""
        return torch.ones(len(self), device=self.device) if self.forecast is None else self.forecast.here

    @property
    def expected_macs(self) -> Float[Tensor, " batch"]:
        """(B,) multiply-adds that the decisions lead to: those executed, or those of the forecast, with gradient."""
        if self.forecast is None:
            return self.macs.to(torch.float32)
        return sum(self.forecast.parts.values(), torch.zeros(len(self), device=self.device))

    @property
    def answered(self) -> Float[Tensor, "batch outputs"]:
        """The answer at the newest exit; raises RuntimeError before the first exit."""
        if self.answer is None:
            raise RuntimeError("`state.answer` must be asked for after an exit, got a state before the first.")
        return self.answer

    @property
    def device(self) -> torch.device:
        """Where the rows live."""
        return self.rows.device

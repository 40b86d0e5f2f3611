"""The parts of an export as modules, tensors in and tensors out, made of the network's own units, heads, gates and rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlexit.exported import MEMORY
from rlexit.gatelogits import logit_of, runs_always
from rlexit.network import StagedNetwork
from rlexit.rewrites import MixedHead, RewrittenHead, newest, prepared
from rlexit.rules import Rule
from rlexit.stageplans import Plan, is_combined
from rlexit.state import ExitState, leaves_of, map_tensors


class StageModule(nn.Module):
    """One stage, tensors in and tensors out, by the network's own units, heads, ensemble, rule and gate.

    Args:
        network: of `rewritten`.
        plan: which part.
        rule: scores the rows that may leave.
        template: tree of the features that it is given; None for raw inputs.
        after: the gated unit before it, "" if there is none.
        first: whether no gate before it carried anything.
    """

    def __init__(
        self, network: StagedNetwork, plan: Plan, rule: Rule, template: Any, after: str = "", first: bool = True
    ) -> None:
        super().__init__()
        self.network, self.plan, self.rule, self.template, self.after = network, plan, rule, template, after
        self.features: Any = None
        self.gate = logit_of(network.gates[plan.gated], first) if plan.gated else None
        self.hands = bool(plan.units) or template is None
        exit = plan.exit
        self.mixed = None
        if exit >= 0 and not plan.apart:
            head = network.head(exit)
            found = network.ensemble.as_sum(exit) if is_combined(network, exit) else None
            # A rule reads the answer, unless it compares exits.
            keeps = exit in plan.keeps or rule.needs_every_exit
            self.mixed = MixedHead(head, *found, keeps) if found and isinstance(head, RewrittenHead) else None

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Raw inputs or features, logits of `plan.reads`, what the gate before carried.

        Returns:
            Features if units changed them, logits of `plan.keeps`, answer and score where rows may leave, and what the
            gate gives.
        """
        network, plan = self.network, self.plan
        if self.template is None:
            features, given = prepared(network, inputs[0]), inputs[1:]
        else:
            features, given = _tree(self.template, inputs)
        logits = dict(zip(plan.reads, given, strict=False))
        carry = given[len(plan.reads) :]
        answer: Tensor | None = None
        tapped: Any = None
        for name in (*([self.after] if self.after else ()), *plan.units):
            unit: Any = network.units[name]
            if name != self.after:
                features = unit(features) if runs_always(network, name) else unit.skip(features)
            exit = network.exit_names.index(name) if name in network.exit_names else -1
            tapped = unit.tap(features) if exit in plan.exits or (exit == plan.exit and exit >= 0) else None
            if exit not in plan.exits:
                continue
            if self.mixed is not None and exit == plan.exit:
                own, mixed = self.mixed(tapped, [logits[index] for index in range(exit)])
                logits |= {} if own is None else {exit: own}
                answer = mixed.log_softmax(dim=-1)
            else:
                head = network.head(exit)
                logits[exit] = head(tapped, logits[exit - 1]) if head.reads_previous else head(tapped)
        self.features = features
        found = [*leaves_of(features)] if self.hands and not plan.last else []
        found += [logits[exit] for exit in plan.keeps]
        if plan.exit >= 0 and not plan.apart:
            answer = _answer(network, logits, plan.exit) if answer is None else answer
            found.append(answer)
        if plan.asks:
            leave: Any = network.leave_gates[network.exit_names[plan.exit]]
            found.append(leave.module(tapped).reshape(-1).sigmoid())
        elif answer is not None and not plan.last:
            found.append(self._score(logits, answer, plan.exit))
        if self.gate is not None:
            unit = network.units[plan.gated]
            found += self.gate(unit.glance(features), *carry)
        return tuple(found)

    def _score(self, logits: dict[int, Tensor], answer: Tensor, exit: int) -> Tensor:
        missing = torch.full_like(answer, torch.nan)
        known = torch.stack([logits.get(index, missing) for index in range(exit + 1)], dim=1)
        rows = torch.arange(answer.shape[0])
        return self.rule.score(ExitState(rows, None, known, answer, torch.zeros_like(rows), exit=exit + 1))


class BranchModule(nn.Module):
    """A way past a gated unit, from features to features.

    Args:
        unit: the network's.
        template: tree of the features.
        skips: whether it is the one of rows that do not run the unit.
    """

    def __init__(self, unit: Any, template: Any, skips: bool) -> None:
        super().__init__()
        self.unit, self.template, self.skips = unit, template, skips
        self.features: Any = None

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Features before the unit to features after it."""
        features, _ = _tree(self.template, inputs)
        self.features = self.unit.skip(features) if self.skips else self.unit.body(features)
        return tuple(leaves_of(self.features))


class HeadModule(nn.Module):
    """A head for the rows that leave, and their answer.

    Args:
        network: of `rewritten`.
        plan: of the stage before it.
        template: tree of the features after that stage.
        unit: whose features are tapped.
    """

    def __init__(self, network: StagedNetwork, plan: Plan, template: Any, unit: Any) -> None:
        super().__init__()
        self.network, self.plan, self.template, self.unit = network, plan, template, unit

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Features and logits of `plan.head_reads` to the answer."""
        features, given = _tree(self.template, inputs)
        logits, exit = dict(zip(self.plan.head_reads, given, strict=True)), self.plan.exit
        head, tapped = self.network.head(exit), self.unit.tap(features)
        logits[exit] = head(tapped, logits[exit - 1]) if head.reads_previous else head(tapped)
        return (_answer(self.network, logits, exit),)


class RecallModule(nn.Module):
    """What is done before anything: the view of the inputs, and perhaps the logit of computing an answer.

    Args:
        network: of `rewritten`, with a reuse gate.
        asks: whether the gate is asked; a row that may not repeat its answer is only looked at.
    """

    def __init__(self, network: StagedNetwork, asks: bool) -> None:
        super().__init__()
        self.network, self.asks = network, asks

    def forward(self, inputs: Tensor, *memory: Tensor) -> tuple[Tensor, ...]:
        """Raw inputs, and `answer`, `view` and `left` of the memory if the gate is asked, to view and (B, 1) logit."""
        reuse: Any = self.network.reuse
        view = reuse.view(newest(self.network, inputs))
        if not self.asks:
            return (view,)
        known = dict(zip(MEMORY, memory, strict=True))
        return (view, reuse.net(reuse.reads(view, known)))


def _tree(template: Any, inputs: Sequence[Tensor]) -> tuple[Any, tuple[Tensor, ...]]:
    """The first inputs as features, and the others."""
    left = iter(inputs)
    features = map_tensors(lambda _: next(left), template)
    return features, tuple(left)


def _answer(network: StagedNetwork, logits: dict[int, Tensor], exit: int) -> Tensor:
    if not is_combined(network, exit):
        return logits[exit].log_softmax(dim=-1)
    return network.ensemble.from_logits([logits[index] for index in range(exit + 1)])

"""A staged network: units, exits and an ensemble. `forward` trains it; `rlexit.runtime.run` runs it for real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rlexit.ensembles import Ensemble, NoEnsemble
from rlexit.gates import Decision, Gate, Mode
from rlexit.heads import Head
from rlexit.macs import macs_per_row
from rlexit.state import ExitState, put
from rlexit.units import Unit


@dataclass(frozen=True)
class Trace:
    """All exits of a batch at once.

    Args:
        logits: (B, K, A) raw logits of every exit.
        answers: (B, K, A) log-probabilities after the ensemble.
        decisions: of every gate, in the order of execution.
        expected_macs: (B,) multiply-adds of the units, weighted by the gates' relaxed decisions; has a gradient.
    """

    logits: Float[Tensor, "batch exits outputs"]
    answers: Float[Tensor, "batch exits outputs"]
    decisions: tuple[Decision, ...]
    expected_macs: Float[Tensor, " batch"]


class StagedNetwork(nn.Module):
    """Units in a row, with exits after some of them and the backbone's own head at the end.

    Args:
        units: names to units, in the order of execution.
        exits: unit names to heads; the last unit must have one, the backbone's own.
        outputs: A, classes or actions.
        ensemble: combines the exits; none by default.
        gates: unit names to gates before them; one that may choose action 0 needs a unit with a skip path.
    Raises:
        ValueError: an exit or gate names no unit, the last unit has no exit, or the first head reads logits.
    """

    def __init__(
        self,
        units: Mapping[str, Unit],
        exits: Mapping[str, Head],
        outputs: int,
        ensemble: Ensemble | None = None,
        gates: Mapping[str, Gate] | None = None,
    ) -> None:
        super().__init__()
        gates = gates or {}
        self.unit_names = tuple(units)
        for name in (*exits, *gates):
            if name not in units:
                raise ValueError(f"`exits` and `gates` must name units, got {name!r}. Units: {', '.join(units)}.")
        if self.unit_names[-1] not in exits:
            raise ValueError(
                f"`exits` must have the last unit {self.unit_names[-1]!r}, got {list(exits)}. Add its head."
            )
        self.exit_names = tuple(name for name in self.unit_names if name in exits)
        if exits[self.exit_names[0]].reads_previous:
            raise ValueError(f"`exits` must start with a head that reads no logits, got {self.exit_names[0]!r}.")
        self.units = nn.ModuleDict({name: units[name] for name in units})
        self.heads = nn.ModuleDict({name: exits[name] for name in self.exit_names})
        self.gates = nn.ModuleDict(dict(gates))
        self.ensemble: Ensemble = ensemble or NoEnsemble(len(exits), outputs)
        self.outputs = outputs

    @property
    def exits(self) -> int:
        """K, the number of exits, the backbone's own included."""
        return len(self.exit_names)

    def prepare(self, inputs: Any) -> Any:
        """What the first unit reads. By default uint8 images become float32 in [0, 1]; nothing else is touched."""
        if isinstance(inputs, Tensor) and inputs.dtype == torch.uint8:
            return inputs.to(torch.float32).div_(255)
        return inputs

    def begin(self, inputs: Any, memory: Any = None, path: tuple[Any, ...] = ()) -> ExitState:
        """The state before the first unit.

        Args:
            inputs: (B, ...) raw inputs; uint8 frames are normalised inside.
            memory: tree of (B, ...) from the step before.
            path: a static choice for the whole call.
        """
        batch, device = inputs.shape[0], inputs.device
        return ExitState(
            rows=torch.arange(batch, device=device),
            features=self.prepare(inputs),
            logits=torch.empty((batch, 0, 0), device=device),
            answer=None,
            macs=torch.zeros(batch, dtype=torch.int64, device=device),
            memory=memory,
            path=path,
        )

    def decide(
        self,
        state: ExitState,
        mode: Mode = "greedy",
        given: Decision | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[ExitState, Decision | None]:
        """Asks the gate before the next unit, if there is one, and charges the rows for it."""
        name = self.unit_names[state.unit]
        if name not in self.gates:
            return state, None
        gate: Gate = self.gates[name]  # type: ignore[assignment]
        decision, carry = gate.decide(state, mode, given, generator)
        state = replace(state, carry=carry, decisions=(*state.decisions, decision), macs=state.macs + gate.macs(state))
        return state, decision

    def advance(self, state: ExitState, decision: Decision | None = None, *, dense: bool = False) -> ExitState:
        """Runs the next unit: the only place where backbone work is done.

        Args:
            state: before the unit.
            decision: of the gate before it.
            dense: mix body and skip path with gradient, for training; otherwise skipped rows are not computed.
        """
        unit: Unit = self.units[self.unit_names[state.unit]]  # type: ignore[assignment]
        if dense and decision is not None:
            features, macs = unit.relax(state.features, decision), unit.macs(state.features, decision)
        else:
            features, macs = unit.execute(state.features, decision)
        return replace(state, features=features, macs=state.macs + macs, unit=state.unit + 1)

    def at_exit(self, state: ExitState) -> bool:
        """Whether the unit just run has an exit that is still to be answered."""
        return state.exit < self.exits and self.unit_names[state.unit - 1] == self.exit_names[state.exit]

    def finished(self, state: ExitState) -> bool:
        """Whether all units are done."""
        return state.unit == len(self.unit_names)

    def head(self, exit: int) -> Head:
        """The head of an exit."""
        head: Head = self.heads[self.exit_names[exit]]  # type: ignore[assignment]
        return head

    def answer(self, state: ExitState) -> ExitState:
        """Runs the head of the exit just reached: logits, and the answer after the ensemble."""
        head = self.head(state.exit)
        inputs = (self.tap(state), state.logits[:, -1]) if head.reads_previous else (self.tap(state),)
        logits = head(*inputs)
        every = torch.cat([state.logits, logits[:, None]], dim=1) if state.exit else logits[:, None]
        if isinstance(self.ensemble, NoEnsemble):
            answer = logits.log_softmax(dim=-1)
        else:
            answer = self.ensemble.combine(every.log_softmax(dim=-1))
        macs = state.macs + macs_per_row(head, *inputs)
        return replace(state, logits=every, answer=answer, macs=macs, exit=state.exit + 1)

    def pass_by(self, state: ExitState) -> ExitState:
        """Goes past an exit that is not built: no head runs, nothing is charged, its logits are NaN."""
        missing = torch.full((len(state), 1, self.outputs), torch.nan, device=state.device)
        every = torch.cat([state.logits, missing], dim=1) if state.exit else missing
        return replace(state, logits=every, answer=missing[:, 0], exit=state.exit + 1)

    def answer_for(self, state: ExitState, wanted: Bool[Tensor, " batch"]) -> ExitState:
        """Runs the head for the wanted rows only; the others pass by unpaid."""
        if bool(wanted.all()):
            return self.answer(state)
        passed = self.pass_by(state)
        if not bool(wanted.any()):
            return passed
        index = torch.nonzero(wanted).flatten()
        joined: ExitState = put(passed, index, self.answer(state.select(index)))
        return joined

    def tap(self, state: ExitState) -> Tensor:
        """The features that the exit just reached reads."""
        unit: Unit = self.units[self.unit_names[state.unit - 1]]  # type: ignore[assignment]
        return unit.tap(state.features)

    def remember(self, state: ExitState) -> Any:
        """The memory that a row takes to its next step when it leaves; unchanged by default."""
        return state.memory

    def gather(self, taps: Sequence[Tensor]) -> list[Tensor]:
        """The weightless part of the first heads' work on tapped features, to be done once per sample."""
        return [self.head(exit).gather(features) for exit, features in enumerate(taps)]

    def read(self, gathered: Sequence[Tensor]) -> Float[Tensor, "batch exits outputs"]:
        """Raw logits of the first exits, cascade included, from what `gather` kept; for training heads.

        Args:
            gathered: of the first exits, as many as are wanted.
        """
        logits: list[Tensor] = []
        for exit, kept in enumerate(gathered):
            logits.append(self.head(exit).from_gathered(kept, logits[-1] if logits else None))
        return torch.stack(logits, dim=1)

    def combine(self, logits: Float[Tensor, "batch exits outputs"]) -> Float[Tensor, "batch exits outputs"]:
        """Answers (B, K, A), log-probabilities after the ensemble, from raw logits (B, K, A)."""
        return self.ensemble.combine_all(logits.log_softmax(dim=-1))

    @torch.no_grad()
    def taps(self, inputs: Any) -> list[Tensor]:
        """Tapped features of every exit, without gradient and without running a head."""
        found: list[Tensor] = []
        state = self.begin(inputs)
        while not self.finished(state):
            state, decision = self.decide(state)
            state = self.advance(state, decision)
            if self.at_exit(state):
                found.append(self.tap(state))
                state = replace(state, exit=state.exit + 1)
        return found

    def forward(
        self,
        inputs: Any,
        path: tuple[Any, ...] = (),
        decisions: Sequence[Decision] | None = None,
        generator: torch.Generator | None = None,
        memory: Any = None,
    ) -> Trace:
        """Every exit of every row, dense and with gradient.

        Args:
            inputs: (B, ...) raw inputs.
            path: a static choice for the whole call.
            decisions: stored decisions to replay, one per gate.
            generator: samples the gates' decisions where given; otherwise they are greedy.
            memory: tree of (B, ...) from the step before.
        """
        state = self.begin(inputs, memory, path)
        mode: Mode = "replay" if decisions is not None else "sample" if generator is not None else "greedy"
        answers: list[Tensor] = []
        expected = torch.zeros(len(state), device=state.device)
        while not self.finished(state):
            gated = self.unit_names[state.unit] in self.gates
            given = decisions[len(state.decisions)] if decisions is not None and gated else None
            state, decision = self.decide(state, mode, given, generator)
            before = state.macs
            state = self.advance(state, decision, dense=True)
            cost = (state.macs - before).to(torch.float32)
            expected = expected + (cost * decision.relaxed if decision and decision.relaxed.dim() == 1 else cost)
            if self.at_exit(state):
                state = self.answer(state)
                answers.append(state.answered)
        return Trace(state.logits, torch.stack(answers, dim=1), state.decisions, expected)

"""A staged network: units, exits and an ensemble. `forward` trains it; `rlexit.runtime.run` runs it for real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rlexit.ensembles import Ensemble, NoEnsemble
from rlexit.gates import Decision, Gate, Mode
from rlexit.gates.reuse import ReuseGate
from rlexit.heads import Head
from rlexit.macs import macs_per_row
from rlexit.state import ExitState, Forecast, leaves_of, map_tensors, put, take
from rlexit.trace import Trace
from rlexit.units import Unit


class StagedNetwork(nn.Module):
    """Units in a row, with exits after some of them and the backbone's own head at the end.

    Args:
        units: names to units, in the order of execution.
        exits: unit names to heads; the last unit must have one, the backbone's own.
        outputs: A, classes or actions.
        ensemble: combines the exits; none by default.
        gates: unit names to gates before them; one that may choose action 0 needs a unit with a skip path.
        leave_gates: names of early exits to gates that decide there whether a row leaves; see the rule `learned`.
    Raises:
        ValueError: an exit or gate names no unit, the last unit has no exit, the first head reads logits, or a gate
            stands before a unit without a skip path.
    """

    def __init__(
        self,
        units: Mapping[str, Unit],
        exits: Mapping[str, Head],
        outputs: int,
        ensemble: Ensemble | None = None,
        gates: Mapping[str, Gate] | None = None,
        leave_gates: Mapping[str, Gate] | None = None,
    ) -> None:
        super().__init__()
        self.unit_names = tuple(units)
        for name in exits:
            self._check_name(name)
        if self.unit_names[-1] not in exits:
            raise ValueError(
                f"`exits` must have the last unit {self.unit_names[-1]!r}, got {list(exits)}. Add its head."
            )
        self.exit_names = tuple(name for name in self.unit_names if name in exits)
        if exits[self.exit_names[0]].reads_previous:
            raise ValueError(f"`exits` must start with a head that reads no logits, got {self.exit_names[0]!r}.")
        self.units = nn.ModuleDict({name: units[name] for name in units})
        self.heads = nn.ModuleDict({name: exits[name] for name in self.exit_names})
        self.set_gates(gates or {})
        self.set_leave_gates(leave_gates or {})
        self.reuse: ReuseGate | None = None
        self.ensemble: Ensemble = ensemble or NoEnsemble(len(exits), outputs)
        self.outputs = outputs

    def _check_name(self, name: str) -> None:
        if name not in self.unit_names:
            raise ValueError(f"`exits` and `gates` must name units, got {name!r}. Units: {', '.join(self.unit_names)}.")

    def set_gates(self, gates: Mapping[str, Gate]) -> None:
        """Puts gates before units, in place of those that were there.

        Args:
            gates: unit names to gates.
        Raises:
            ValueError: a name is no unit's, a gate may skip a unit that declares no skip path, or decides about other
                channels than the unit has.
        """
        for name, gate in gates.items():
            self._check_name(name)
            unit = self.units[name]
            if gate.may_skip and not unit.skippable:
                raise ValueError(
                    f"`gates[{name!r}]` must stand before a unit with a skip path, got {type(unit).__name__}. "
                    "Gate another unit, or declare a skip path."
                )
            if gate.width not in (0, unit.width):
                raise ValueError(
                    f"`gates[{name!r}]` must decide about {unit.width} channels, as its unit takes, got {gate.width}. "
                    "Build it for `Unit.width`."
                )
        self.gates = nn.ModuleDict({name: gates[name] for name in self.unit_names if name in gates})

    def set_leave_gates(self, gates: Mapping[str, Gate]) -> None:
        """Puts gates at early exits that decide there whether a row leaves, in place of those that were there.

        Args:
            gates: names of early exits to gates over {0 go on, 1 leave}, which carry nothing.
        Raises:
            ValueError: a name is no early exit's.
        """
        early = self.exit_names[:-1]
        for name in gates:
            if name not in early:
                raise ValueError(f"`leave_gates` must name early exits, got {name!r}. Early exits: {', '.join(early)}.")
        self.leave_gates = nn.ModuleDict({name: gates[name] for name in early if name in gates})

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
        lean: bool = False,
    ) -> tuple[ExitState, Decision | None]:
        """Asks the gate before the next unit, if there is one, and charges the rows for it.

        Args:
            state: before the unit.
            mode: how the gate decides.
            given: the stored decision, for replay.
            generator: source of randomness, for sample.
            lean: a decision by which no row runs the unit has no gradient.
        """
        name = self.unit_names[state.unit]
        if name not in self.gates:
            return state, None
        gate: Gate = self.gates[name]  # type: ignore[assignment]
        unit: Unit = self.units[name]  # type: ignore[assignment]
        seen = replace(state, features=unit.glance(state.features))
        decision, carry = gate.decide(seen, mode, given, generator)
        if lean and not bool(decision.relaxed.any()):
            decision = map_tensors(torch.Tensor.detach, decision)
        state = replace(state, carry=carry, decisions=(*state.decisions, decision))
        dense = gate.expected_macs(seen, decision) if state.forecast is not None else None
        return state.charge(f"gates.{name}", gate.macs(seen, decision), dense), decision

    def consider(
        self,
        state: ExitState,
        mode: Mode = "greedy",
        given: Decision | None = None,
        generator: torch.Generator | None = None,
        asked: Bool[Tensor, " batch"] | None = None,
    ) -> tuple[ExitState, Decision]:
        """Asks the leave gate of the exit just reached, before its head, and charges the rows for it.

        Args:
            state: at an exit.
            mode: how the gate decides.
            given: the stored decision, for replay.
            generator: source of randomness, for sample.
            asked: (B,) rows that are asked; the others go on for sure and pay nothing. All by default.
        Raises:
            ValueError: the exit has no leave gate.
        """
        name = self.exit_names[state.exit]
        if name not in self.leave_gates:
            raise ValueError(
                f"`leave_gates` must have exit {name!r} where a row may leave by them, got "
                f"{', '.join(self.leave_gates) or 'none'}. Train one there, or close the exit by a threshold of inf."
            )
        gate: Gate = self.leave_gates[name]  # type: ignore[assignment]
        seen = replace(state, features=self.tap(state))
        if asked is None or bool(asked.all()):
            decision, _ = gate.decide(seen, mode, given, generator)
            macs = gate.macs(seen, decision)
        else:
            nothing = torch.zeros(len(state), device=state.device)
            decision, macs = Decision(nothing.to(torch.int64), nothing, nothing, nothing), torch.zeros_like(state.macs)
            index = torch.nonzero(asked).flatten()
            if len(index):
                few = seen.select(index)
                part, _ = gate.decide(few, mode, take(given, index) if given is not None else None, generator)
                decision, macs = put(decision, index, part), macs.index_copy(0, index, gate.macs(few, part))
        return replace(state.charge(f"leave_gates.{name}", macs), leaving=(*state.leaving, decision)), decision

    def read_later(self, open_exits: Sequence[Any], needs_every_exit: bool = False) -> list[Any]:
        """Which early exits' logits a later exit reads: one bool each, or (B,) bools where the rows differ.

        A cascaded head reads the exit before it, an ensemble and a patience-like rule all before it.

        Args:
            open_exits: per early exit whether rows may leave there, or (B,) bools.
            needs_every_exit: of the rule.
        """
        early, ensemble = len(open_exits), self.ensemble
        # What the backbone's own exit reads is needed always; then backwards, because needing is inherited.
        reads_all: Any = ensemble.needs_every_exit and early < ensemble.exits
        reads_previous: Any = self.head(early).reads_previous
        found: list[Any] = []
        for exit in reversed(range(early)):
            found.append(reads_all | reads_previous)
            wanted = open_exits[exit] | found[-1]
            reads_previous = wanted & self.head(exit).reads_previous
            reads_all = reads_all | (
                wanted & (needs_every_exit | (ensemble.needs_every_exit and exit < ensemble.exits))
            )
        return found[::-1]

    def advance(self, state: ExitState, decision: Decision | None = None, *, dense: bool = False) -> ExitState:
        """Runs the next unit: the only place where backbone work is done.

        Args:
            state: before the unit.
            decision: of the gate before it.
            dense: mix body and skip path with gradient, for training; otherwise skipped rows are not computed, and what
                they cost has no gradient.
        """
        name = self.unit_names[state.unit]
        unit: Unit = self.units[name]  # type: ignore[assignment]
        if dense and decision is not None:
            features, macs = unit.relax(state.features, decision), unit.macs(state.features, decision)
            expected = unit.expected_macs(state.features, decision) if state.forecast is not None else None
        else:
            (features, macs), expected = unit.execute(state.features, decision), None
        return replace(state.charge(f"units.{name}", macs, expected), features=features, unit=state.unit + 1)

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
        macs = torch.full_like(state.macs, macs_per_row(head, *inputs))
        state = state.charge(f"heads.{self.exit_names[state.exit]}", macs)
        return replace(state, logits=every, answer=answer, exit=state.exit + 1)

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
        """The memory that a row takes to its next step when it leaves; unchanged without a `reuse` gate."""
        return state.memory if self.reuse is None else self.reuse.remember(state)

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
        leaving: Sequence[Decision] | None = None,
        lean: bool = False,
    ) -> Trace:
        """Every exit of every row, dense and with gradient.

        Args:
            inputs: (B, ...) raw inputs.
            path: a static choice for the whole call.
            decisions: stored decisions to replay, one per gate.
            generator: samples the gates' decisions where given; otherwise they are greedy.
            memory: tree of (B, ...) from the step before.
            leaving: stored decisions of the leave gates to replay, one per leave gate.
            lean: units that every row skips are not computed, so that their gates get no gradient.
        """
        state = self.begin(inputs, memory, path)
        everything = torch.ones(len(state), device=state.device)
        state = replace(state, forecast=Forecast({}, everything))
        drawn: Mode = "sample" if generator is not None else "greedy"
        answers: list[Tensor] = []
        ends: list[Tensor] = []
        while not self.finished(state):
            gated = self.unit_names[state.unit] in self.gates
            given = decisions[len(state.decisions)] if decisions is not None and gated else None
            state, decision = self.decide(state, "replay" if decisions is not None else drawn, given, generator, lean)
            before = leaves_of(state.features)[0]
            spared = lean and decision is not None and not bool(decision.relaxed.any())
            state = self.advance(state, decision, dense=not spared)
            if state.unit > 1 and before.shape[2:] != leaves_of(state.features)[0].shape[2:]:
                ends.append(before)
            if not self.at_exit(state):
                continue
            if state.exit < self.exits - 1 and self.leave_gates:
                asked = self.exit_names[state.exit] in self.leave_gates
                given = leaving[len(state.leaving)] if leaving is not None and asked else None
                state = self._answer_softly(state, "replay" if leaving is not None else drawn, given, generator)
            else:
                state = self.answer(state)
            answers.append(state.answered)
        every = torch.stack(answers, dim=1)
        parts = state.forecast.parts if state.forecast is not None else {}
        ends.append(self.tap(state))
        return Trace(state.logits, every, state.decisions, state.expected_macs, state.leaving, parts, tuple(ends))

    def _answer_softly(
        self, state: ExitState, mode: Mode, given: Decision | None, generator: torch.Generator | None
    ) -> ExitState:
        """The answer at an early exit of a dense pass in which a leave gate takes a share of the row away.

        Real execution builds the head where the row leaves, or where a later exit reads it: so it is charged here.
        """
        exit, here = state.exit, state.here
        leaves = torch.zeros_like(here)
        if self.exit_names[exit] in self.leave_gates:
            state, decision = self.consider(state, mode, given, generator)
            leaves = decision.relaxed
        read = self.read_later([name in self.leave_gates for name in self.exit_names[:-1]])[exit]
        return self.answer(state.share(here if read else here * leaves)).share(here * (1 - leaves))

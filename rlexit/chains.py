"""Runs the graphs of an export one after the other: for one row in fixed buffers, or for a batch that shrinks and parts.

After the graph of a stage rows may leave. Where a gated unit follows, those whose logit is above 0 go through the graph
that runs it, the others through the one that skips it, or through none: they keep what they have. A graph is run for no
row that does not need it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rlexit.backends import Runner, one_line, runner
from rlexit.exported import ANSWER, EXIT, LOGIT, OBSERVATION, SCORE, Port, ServeError

# What a stage hands on for so many rows fits in a core's second-level cache.
BLOCK_BYTES = 1 << 20
LEAST_BLOCK = 8
Call = Callable[[], object]


class Served(NamedTuple):
    """All that is known of a batch.

    Args:
        answers: (B, A) log-probabilities.
        exits: (B,) where each row left.
        scores: (B, K), NaN where none was asked for.
        decisions: (B, gates) 1 where the row ran the gated unit, 0 where it skipped it, -1 where nobody asked.
        macs: (B,) multiply-adds of all graphs that were run for the row.
    """

    answers: np.ndarray
    exits: np.ndarray
    scores: np.ndarray
    decisions: np.ndarray
    macs: np.ndarray

    @classmethod
    def blank(cls, rows: int, outputs: int, exits: int, gates: int) -> Served:
        """Of so many rows, before anything is known."""
        return cls(
            np.zeros((rows, outputs), dtype=np.float32),
            np.zeros(rows, dtype=np.int64),
            np.full((rows, exits), np.nan, dtype=np.float32),
            np.full((rows, gates), -1, dtype=np.int8),
            np.zeros(rows, dtype=np.int64),
        )


@dataclass(frozen=True)
class Part:
    """One graph: what it reads and gives, its bytes, and the multiply-adds of one row."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    data: bytes
    macs: int = 0


@dataclass(frozen=True)
class Stage:
    """A graph for every row that comes to it, and others for some of them.

    Args:
        part: for every row.
        exit: where rows leave after it, if their score is above `threshold`; -1 if nobody does.
        threshold: +inf where nobody leaves, -inf where everybody does.
        head: answers the rows that leave, where `part` does not.
        runs: for rows that run the gated unit after it; None if there is none.
        skips: for rows that skip it; without it they keep what they have, under the name of what `runs` gives.
        alone: for one row: the stages since the exit before it and this one in one graph; `part` where it is None.
    """

    part: Part
    exit: int
    threshold: float
    head: Part | None = None
    runs: Part | None = None
    skips: Part | None = None
    alone: Part | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """All that there are."""
        return tuple(one for one in (self.part, self.head, self.runs, self.skips, self.alone) if one is not None)


class Opened:
    """The parts of some stages, ready to run.

    Args:
        parts: of an export.
        runtime: see `rlexit.serve.load`.
    """

    def __init__(self, parts: Iterable[Part], runtime: str) -> None:
        self._runners: dict[int, Runner] = {}
        self._parts = list(parts)  # an id is one's own only as long as its object lives
        for part in self._parts:
            self._runners[id(part)] = runner(runtime, part.data, part.inputs, part.outputs)

    def bind(self, part: Part, given: dict[str, np.ndarray], found: dict[str, np.ndarray], rows: str) -> Call:
        """A part's call on given arrays; a fixed one if `rows` is one row.

        Raises:
            ServeError: the runtime refuses the arrays.
        """
        try:
            return self._runners[id(part)].bind(given, found, fixed=rows == ONE_ROW)
        except Exception as error:
            raise refused(rows, error) from error

    def call(self, part: Part, given: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> None:
        """Runs a part once."""
        call = self.bind(part, given, found, SOME_ROWS)
        try:
            call()
        except Exception as error:
            raise refused(SOME_ROWS, error) from error


ONE_ROW, SOME_ROWS = "one row", "a batch"


def refused(rows: str, error: Exception) -> ServeError:
    """What is said when a graph cannot be run."""
    return ServeError(f"`stages` must run on {rows}, got: {one_line(error)} Export again.")


class Single:
    """One row at a time, from exit to exit: every tensor between graphs has one place, bound once.

    Args:
        stages: in order.
        opened: their parts.
        places: buffers that are there already, by name; `observation` among them where something reads it before.
    """

    def __init__(self, stages: Sequence[Stage], opened: Opened, places: dict[str, np.ndarray] | None = None) -> None:
        self._opened = opened
        self._places: dict[str, np.ndarray] = dict(places or {})
        self._steps: list[tuple[Call, np.ndarray, float, Call | None]] = []
        self._told: list[tuple[np.ndarray, int]] = []
        for stage in stages:
            if stage.runs is not None:
                continue  # it is in a branch of the graph that leads to the next exit
            call = self._bind(stage.alone or stage.part, stage.exit)
            score = self._places.get(f"{SCORE}/{stage.exit}", np.ones(1, dtype=np.float32))
            head = self._bind(stage.head, stage.exit) if stage.head is not None else None
            self._steps.append((call, score, stage.threshold, head))
            self._told.append((self._places[f"{ANSWER}/{stage.exit}"][0], stage.exit))
        if OBSERVATION not in self._places:
            raise ServeError("`stages` must read an observation, got none that does. Export again.")
        self.observation = self._places[OBSERVATION][0]

    def decide(self) -> tuple[np.ndarray, int]:
        """The answer (A,) and the exit of the row in `observation`."""
        place = 0
        try:
            for call, score, threshold, head in self._steps:
                call()
                if score.item(0) > threshold:
                    if head is not None:
                        head()
                    break
                place += 1
        except Exception as error:
            raise refused(ONE_ROW, error) from error
        answer, exit = self._told[place]
        return answer, int(self._places[f"{EXIT}/{exit}"][0]) if exit < 0 else exit

    def _bind(self, part: Part, exit: int) -> Call:
        given = {port.name: self._read(port) for port in part.inputs}
        found = {port.name: buffer(port) for port in part.outputs}
        for name, place in found.items():
            known = f"{name}/{exit}" if name in (ANSWER, SCORE, EXIT) else name
            if known in self._places:  # its buffer would be freed, and written to still
                raise ServeError(f"`stages` must give every tensor once, got {name!r} again. Export again.")
            self._places[known] = place
        return self._opened.bind(part, given, found, ONE_ROW)

    def _read(self, port: Port) -> np.ndarray:
        place = self._places.get(port.name)
        if port.name == OBSERVATION and place is None:
            place = self._places.setdefault(port.name, buffer(port))
        if place is None or place.shape[1:] != port.shape or place.dtype != port.dtype:
            raise ServeError(f"`stages` must hand on what the next one reads, got no {port.name!r}. Export again.")
        return place


class Batch:
    """Many rows at a time, with buffers of its own: one for each thread.

    Args:
        stages: in order.
        opened: their parts.
    Raises:
        ServeError: a graph reads what none before it gives.
    """

    def __init__(self, stages: Sequence[Stage], opened: Opened) -> None:
        _check_chain(stages)
        self._stages, self._opened = tuple(stages), opened
        self._places: dict[tuple[int, str], np.ndarray] = {}
        # By stage: what is read after its own graph, and which column of decisions its gate has.
        self._later: list[set[str]] = []
        self._columns = np.cumsum([stage.runs is not None for stage in stages]) - 1
        for place, stage in enumerate(stages):
            ways = [way for way in (stage.runs, stage.skips) if way is not None]
            parts = [*ways, *(part for one in stages[place + 1 :] for part in one.parts if part is not one.alone)]
            self._later.append({port.name for part in parts for port in part.inputs} - {OBSERVATION})

    def run(self, observations: np.ndarray, told: Served) -> None:
        """Fills in what is known of (B, ...) observations."""
        rows = np.arange(len(observations))
        known: dict[str, np.ndarray] = {OBSERVATION: observations}
        for place, stage in enumerate(self._stages):
            if not len(rows):
                break
            rows, known = self._stage(place, rows, known, told)
            if stage.runs is not None and len(rows):
                known = self._part_ways(place, rows, known, told)

    def _stage(
        self, place: int, rows: np.ndarray, known: dict[str, np.ndarray], told: Served
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Runs a stage's own graph in blocks, and lets rows leave: the others, and what is known of them."""
        stage, later, count = self._stages[place], self._later[place], len(rows)
        last = place == len(self._stages) - 1
        handed = [port.name for port in stage.part.outputs if port.name in later or port.name == LOGIT]
        held = {port.name: self._hold(place, port, count) for port in stage.part.outputs}
        stay: list[np.ndarray] = []
        kept = 0
        told.macs[rows] += stage.part.macs
        for block in blocks(count, [port for port in stage.part.outputs if port.name in later]):
            size = block.stop - block.start
            found = {name: one[kept : kept + size] if name in handed else one[:size] for name, one in held.items()}
            given = {port.name: known[port.name][block] for port in stage.part.inputs}
            if OBSERVATION in given:
                port = next(port for port in stage.part.inputs if port.name == OBSERVATION)
                given[OBSERVATION] = self._given(port, given[OBSERVATION])
            self._opened.call(stage.part, given, found)
            part = rows[block]
            if ANSWER in found:
                told.exits[part] = stage.exit
                told.answers[part] = found[ANSWER]
            if last:
                continue
            order = np.arange(size)
            if stage.exit >= 0:
                told.scores[part, stage.exit] = found[SCORE]
                leaves = found[SCORE] > np.float32(stage.threshold)
                if stage.head is not None and leaves.any():
                    here = {name: one[block] for name, one in known.items()} | found
                    self._leave(stage, stage.head, here, np.flatnonzero(leaves), part, told)
                order = close_gaps(leaves, [found[name] for name in handed])
            stay.append(order + block.start)
            kept += len(order)
        if last:
            return rows[:0], {}
        chosen = np.concatenate(stay)
        carried = {name: one for name, one in known.items() if name in later and name not in held}
        if kept < count:
            carried = {name: one[chosen] for name, one in carried.items()}
        return rows[chosen], carried | {name: held[name][:kept] for name in handed}

    def _leave(
        self, stage: Stage, head: Part, here: dict[str, np.ndarray], index: np.ndarray, rows: np.ndarray, told: Served
    ) -> None:
        """Answers the rows of a block that leave by a head of their own."""
        answers = np.empty((len(index), told.answers.shape[1]), dtype=np.float32)
        self._opened.call(head, {port.name: here[port.name][index] for port in head.inputs}, {ANSWER: answers})
        leaving = rows[index]
        told.answers[leaving], told.exits[leaving] = answers, stage.exit
        told.macs[leaving] += head.macs

    def _part_ways(
        self, place: int, rows: np.ndarray, known: dict[str, np.ndarray], told: Served
    ) -> dict[str, np.ndarray]:
        """Runs or skips a gated unit, row by row; all rows meet again."""
        stage, count = self._stages[place], len(rows)
        chosen = known.pop(LOGIT)[:, 0] > 0
        told.decisions[rows, self._columns[place]] = chosen
        joined: dict[str, np.ndarray] = {}
        for wanted, part in ((chosen, stage.runs), (~chosen, stage.skips)):
            if part is None:
                continue
            targets = {
                port.name: known[read.name] if stage.skips is None else self._hold(place, port, count)[:count]
                for read, port in zip(part.inputs if stage.skips is None else part.outputs, part.outputs, strict=True)
            }
            joined |= targets
            index = np.flatnonzero(wanted)
            told.macs[rows[index]] += part.macs
            for block in blocks(len(index), part.outputs):
                few = index[block]
                found = {port.name: self._hold(~place, port, len(few))[: len(few)] for port in part.outputs}
                self._opened.call(part, {port.name: known[port.name][few] for port in part.inputs}, found)
                for name, target in targets.items():
                    target[few] = found[name]
        return known | joined

    def _given(self, port: Port, observations: np.ndarray) -> np.ndarray:
        """Observations as the first graph reads them."""
        if observations.dtype == port.dtype:
            return observations
        held = self._hold(-1, port, len(observations))[: len(observations)]
        np.copyto(held, observations)
        return held

    def _hold(self, place: int, port: Port, rows: int) -> np.ndarray:
        """Where a stage tells a batch what; grows to the largest batch seen."""
        held = self._places.get((place, port.name))
        if held is None or len(held) < rows:
            held = self._places[place, port.name] = np.empty((rows, *port.shape), dtype=port.dtype)
        return held


def _check_chain(stages: Sequence[Stage]) -> None:
    """Raises ServeError where a graph reads what none before it gives, or gives otherwise."""
    known = {port.name: port for port in stages[0].part.inputs if port.name == OBSERVATION}
    for stage in stages:
        for part in (stage.part, stage.head, stage.runs, stage.skips):
            for port in part.inputs if part is not None else ():
                if known.get(port.name) != port:
                    raise ServeError(f"`stages` must hand on what is read, got no {port.name!r}. Export again.")
            if part is stage.part:
                known = {name: port for name, port in known.items() if name != OBSERVATION}
                known |= {port.name: port for port in stage.part.outputs}
        if stage.runs is not None:
            known |= {port.name: port for port in stage.runs.outputs}


def blocks(rows: int, ports: Iterable[Port]) -> list[slice]:
    """Parts of a batch whose tensors of these ports fit in a core's cache."""
    bytes_of_row = sum(math.prod(port.shape) * np.dtype(port.dtype).itemsize for port in ports)
    size = max(LEAST_BLOCK, BLOCK_BYTES // bytes_of_row) if bytes_of_row else BLOCK_BYTES
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def buffer(port: Port) -> np.ndarray:
    """One row of it."""
    return np.zeros((1, *port.shape), dtype=port.dtype)


def close_gaps(leaves: np.ndarray, tensors: Sequence[np.ndarray]) -> np.ndarray:
    """Which rows stay, in the order in which the tensors hold them now: the last ones fill the places that are free.

    Args:
        leaves: (n,) bool.
        tensors: (n, ...) each, changed in place; those who stay lie at their beginning afterwards.
    """
    order = np.arange(len(leaves) - int(np.count_nonzero(leaves)))
    if 0 < len(order) < len(leaves):
        free, last = np.flatnonzero(leaves[: len(order)]), len(order) + np.flatnonzero(~leaves[len(order) :])
        for tensor in tensors:
            tensor[free] = tensor[last]
        order[free] = last
    return order

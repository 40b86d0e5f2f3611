"""Temporal reuse in an export: before anything runs, a small graph decides whether the last answer is good enough.

What `rlexit.gates.reuse` keeps in a row's memory is kept here per environment: its last answer, what it looked like then,
and how many more steps may repeat it. Zeros are a new game.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlexit.chains import ONE_ROW, Opened, Part, buffer, refused
from rlexit.exported import ANSWER, LOGIT, MEMORY, OBSERVATION, VIEW, Port, ServeError


@dataclass(frozen=True)
class Reuse:
    """The graphs of a reuse gate.

    Args:
        asks: of rows that may repeat their answer: view, and logit of computing one.
        looks: of the others: view.
        limit: steps in a row that may repeat an answer.
    """

    asks: Part
    looks: Part
    limit: int


class Recall:
    """The memory of some environments.

    Args:
        reuse: its graphs.
        opened: them, ready to run.
    """

    def __init__(self, reuse: Reuse, opened: Opened) -> None:
        self._reuse, self._opened = reuse, opened
        self._ports = {
            port.name.removeprefix("memory_"): port for port in reuse.asks.inputs if port.name != OBSERVATION
        }
        self._reads = next(port for port in reuse.looks.inputs)
        # One environment lives in fixed buffers, of which the graphs' calls know.
        self._memory = {name: buffer(self._ports[name]) for name in MEMORY}
        self.observation = buffer(self._reads)
        self._view, self._logit = buffer(self._port(VIEW)), buffer(self._port(LOGIT))
        told = {VIEW: self._view, LOGIT: self._logit}
        self._asks = opened.bind(reuse.asks, self._given(self.observation, self._memory), told, ONE_ROW)
        self._looks = opened.bind(reuse.looks, {OBSERVATION: self.observation}, {VIEW: self._view}, ONE_ROW)
        self._many: dict[str, np.ndarray] | None = None
        self._started = False

    def reset(self, rows: Sequence[int] | np.ndarray | None) -> None:
        """Forgets: all environments, or some, which begin new games."""
        if rows is None:
            for one in self._memory.values():
                one[:] = 0
            self._many, self._started = None, False
            return
        count = 1 if self._many is None else len(self._many["left"])
        given = np.asarray(rows)
        # As indices, bools would be the first two environments.
        index = np.flatnonzero(given) if given.dtype == bool else given.astype(np.int64)
        wrong = (
            len(given) != count if given.dtype == bool else len(index) and not 0 <= index.min() <= index.max() < count
        )
        if wrong:
            raise ServeError(f"`rows` must be of the {count} environments that are played, got {given.tolist()}.")
        for one in self._held(count).values():
            one[index] = 0

    def one(self) -> np.ndarray | None:
        """The answer (A,) that the row in `observation` repeats; None if it computes one, for `keep_one`."""
        self._check(1)
        try:
            if self._memory["left"].item(0) > 0:
                self._asks()
                if self._logit.item(0) <= 0:
                    self._memory["left"][0] -= 1
                    answer: np.ndarray = self._memory[ANSWER][0]
                    return answer
            else:
                self._looks()
        except Exception as error:
            raise refused(ONE_ROW, error) from error
        np.copyto(self._memory[VIEW], self._view)
        self._memory["left"][0] = self._reuse.limit
        return None

    def keep_one(self, answer: np.ndarray) -> None:
        """Remembers what was computed (A,)."""
        np.copyto(self._memory[ANSWER][0], answer)

    def many(self, observations: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of (B, ...) observations: (B,) who computes, (B, A) answers of the others, (B,) multiply-adds of asking."""
        self._check(len(observations))
        memory = self._held(len(observations))
        given = observations.astype(self._reads.dtype, copy=False)
        asked = memory["left"] > 0
        computes = np.ones(len(given), dtype=bool)
        views = np.empty_like(memory[VIEW])
        for wanted, part in ((asked, self._reuse.asks), (~asked, self._reuse.looks)):
            index = np.flatnonzero(wanted)
            if not len(index):
                continue
            found = {port.name: np.empty((len(index), *port.shape), dtype=port.dtype) for port in part.outputs}
            few = {name: one[index] for name, one in self._given(given, memory).items()}
            self._opened.call(part, {port.name: few[port.name] for port in part.inputs}, found)
            views[index] = found[VIEW]
            if LOGIT in found:
                computes[index] = found[LOGIT][:, 0] > 0
        memory[VIEW][computes] = views[computes]
        memory["left"][:] = np.where(computes, self._reuse.limit, memory["left"] - 1)
        return computes, memory[ANSWER].copy(), asked * np.int64(self._reuse.asks.macs)

    def keep(self, computes: np.ndarray, answers: np.ndarray) -> None:
        """Remembers what was computed: (n, A) answers of the (B,) rows that did."""
        self._held(len(computes))[ANSWER][computes] = answers

    def become(self, memory: dict[str, np.ndarray], rows: Sequence[int]) -> None:
        """Takes over what some environments remember elsewhere: (B, ...) each."""
        held = self._held(len(memory["left"]))
        for name in MEMORY:
            held[name][rows] = memory[name][rows]

    def _held(self, rows: int) -> dict[str, np.ndarray]:
        if rows == 1:
            return self._memory
        if self._many is None:
            self._many = {n: np.zeros((rows, *self._ports[n].shape), dtype=self._ports[n].dtype) for n in MEMORY}
        return self._many

    def _check(self, rows: int) -> None:
        """Raises ServeError where the rows cannot be the environments of the step before."""
        known = 1 if self._many is None else len(self._many["left"])
        if self._started and rows != known:
            raise ServeError(
                f"`observation` must have the {known} rows of the step before, got {rows}. Call reset() first."
            )
        self._started = True

    def _port(self, name: str) -> Port:
        return next(port for port in self._reuse.asks.outputs if port.name == name)

    @staticmethod
    def _given(observations: np.ndarray, memory: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {OBSERVATION: observations, **{f"memory_{name}": memory[name] for name in MEMORY}}

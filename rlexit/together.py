"""Several students of one frozen backbone, trained side by side: each batch passes the backbone once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from rlexit.distill import Distiller
from rlexit.domain import Act
from rlexit.interrupts import Stopped
from rlexit.students import Observed

# Of labelled samples: (inputs, labels) of each of its batches.
Buffer = list[tuple[Any, Tensor]]


class SharedSamples:
    """One stream of labelled samples, and what a frozen backbone says of its newest buffer.

    Only where labels are known: without them students act, each meets other samples, and nothing can be shared.

    Args:
        samples: buffers of (inputs, labels) from a given index on, the same for every call.
        look: passes inputs through the frozen backbone.
    """

    def __init__(self, samples: Callable[[int], Iterator[Buffer]], look: Callable[[Any], Observed]) -> None:
        self.samples, self.look = samples, look
        self.index = -1
        self.buffer: Buffer = []
        self.seen: list[Observed | None] = []
        self.source: Iterator[Buffer] = iter(())

    def __call__(self, act: Act, first: int) -> Iterator[int]:
        """Batches for one of the students (`domain.Batches`)."""
        index = first
        while True:
            if self.index != index:
                self._draw(index)
            for inputs, labels in self.buffer:
                act(inputs, labels)
            yield sum(len(labels) for _, labels in self.buffer)
            index += 1

    def _draw(self, index: int) -> None:
        if index != self.index + 1 or index == 0:
            self.source = self.samples(index)
        self.buffer, self.index = next(self.source), index
        self.seen = [None] * len(self.buffer)

    def observe(self, inputs: Any) -> Observed:
        """What the backbone says of inputs of the newest buffer; looked at once."""
        place = next(place for place, (known, _) in enumerate(self.buffer) if known is inputs)
        known = self.seen[place]
        if known is None:
            known = self.look(inputs)
            self.seen[place] = known
        return known


class _Latch:
    """An answer that is asked for once per round, so that all students stop at the same buffer."""

    def __init__(self, ask: Callable[[], bool]) -> None:
        self.ask, self.answer = ask, False

    def renew(self) -> None:
        self.answer = self.answer or self.ask()

    def __call__(self) -> bool:
        return self.answer


def train_together(distillers: Sequence[Distiller], stop: Callable[[], bool]) -> list[dict[str, float]]:
    """Trains all of them to the end, in turn and buffer by buffer; each is equal to one that is trained alone.

    Whoever is behind, as a kill between two checkpoints may leave it, catches up first.

    Args:
        distillers: whose batches and students share a `SharedSamples`.
        stop: asked once per round, in place of their own.
    Returns:
        Last values of the curves of each.
    Raises:
        Stopped: `stop` answered true.
        Diverged: a loss is NaN or infinite; the last checkpoints are healthy.
    """
    latch = _Latch(stop)
    facts: list[dict[str, float]] = [{} for _ in distillers]
    going: dict[int, Iterator[dict[str, float]]] = {}
    for index, distiller in enumerate(distillers):
        distiller.stop = latch
        distiller.start()
        going[index] = distiller.steps()
    stopped: Stopped | None = None
    while going and stopped is None:
        latch.renew()
        least = min(distillers[index].buffers for index in going)
        for index in [index for index in going if distillers[index].buffers == least]:
            # Having learnt from a buffer, a student waits there for the others before it saves and goes on.
            try:
                facts[index] = next(going[index])
            except StopIteration:
                del going[index]
            except Stopped as signal:
                stopped = signal
    if stopped is not None:
        raise stopped
    return facts

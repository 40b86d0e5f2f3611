"""Ends of a run before its end: a signal asks for a safe stop, a loss diverges."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):
    """Raised at a safe point after a signal; the state is saved."""


class Diverged(ValueError):
    """A loss or weight became NaN or infinite; the last saved state is healthy."""


class StopFlag:
    """Becomes true at the first SIGINT or SIGTERM; `signum` says which."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __call__(self) -> bool:
        """Whether a signal came."""
        return self.signum is not None


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Turns SIGINT and SIGTERM into a flag that long loops ask at safe points; a second SIGINT ends at once."""
    flag = StopFlag()

    def handle(signum: int, frame: FrameType | None) -> None:
        if flag.signum is not None:
            os._exit(128 + signum)
        flag.signum = signum

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Progress with an estimate of the time left: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_SECONDS = 30.0
MAX_FIGURES = 6


class Meter:
    """Shows how far a stage is.

    Args:
        name: of the stage.
        console: where to.
        unit: of what is counted.
    """

    def __init__(self, name: str, console: Console, unit: str = "") -> None:
        self.name, self.console, self.unit = name, console, unit
        self.shown = time.monotonic()
        # What a resumed stage had done before is no part of its speed.
        self.first: tuple[int, float] | None = None
        self.last = 0, self.shown
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def __enter__(self) -> Meter:
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description:<10}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[facts]}"),
                console=self.console,
            )
            self.bar.start()
        return self

    def __call__(self, done: int, total: int, facts: dict[str, float]) -> None:
        """Tells that `done` of `total` are done, with some figures of the moment."""
        now = time.monotonic()
        if self.first is None:
            self.first = done, now
        elif done < self.last[0]:  # a stage may pass over one set of rows after the other
            self.first = 0, self.last[1]
        self.last = done, now
        text = "  ".join(f"{name} {facts[name]:.3g}" for name in _chosen(list(facts)))
        if self.bar is not None:
            if self.task is None:
                self.task = self.bar.add_task(self.name, total=total, facts="")
            self.bar.update(self.task, completed=done, total=total, facts=text)
        elif now - self.shown > LINE_SECONDS or done >= total:
            self.shown = now
            begun, began = self.first
            rate = (done - begun) / max(now - began, 1e-9)
            left = f"eta {_spell(max(total - done, 0) / rate)}" if rate > 0 else "eta ?"
            speed = f"{rate:.0f} {self.unit}/s" if rate >= 1 else f"{rate:.2f} {self.unit}/s"
            self.console.print(
                f"{self.name:<10} {min(done / max(total, 1), 1):4.0%}  {done}/{total}  {speed}  {left}  {text}"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()


def _chosen(names: list[str]) -> list[str]:
    """As many figures as fit on a line: of a curve per exit, the first, the middle and the last exit."""
    if len(names) <= MAX_FIGURES:
        return names
    curves: dict[str, list[str]] = {}
    for name in names:
        curves.setdefault(name.rpartition("/")[0] or name, []).append(name)
    ends = [[curve[place] for place in sorted({0, len(curve) // 2, len(curve) - 1})] for curve in curves.values()]
    return [name for curve in ends for name in curve][:MAX_FIGURES]


def _spell(seconds: float) -> str:
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s"

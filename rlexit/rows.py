"""The row schema: one CSV row per episode or evaluated set, per measured latency, and per bin of confidence.

What is told of a labelled set beyond that has rows of its own in `dissection`.

Rows are all that a report needs, and the one thing that every evaluation writes. A file is appended to row by row, so a
kill can cut its last line; a line without a line end is such a cut, is skipped by readers and removed by writers.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from rlexit.checkpoint import canonical_json, write_atomic

CHOICES = {
    "execution": ("real", "replay"),
    "actions": ("argmax", "sampled"),
    "split": ("calibration", "certification", "test"),
    "metric": ("score", "accuracy"),
}
_NAMES = ("task", "method", "label", "runtime", "machine", "group", "file")
_NOT_NAN = ("value", "latency_us_p50", "latency_us_p95")


@dataclass(frozen=True)
class Record:
    """One line of a file; its fields are the columns, and are str, int, float or a tuple of floats.

    Raises:
        ValueError: a field breaks its rule; the message names it.
    """

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True)
class Row(Record):
    """One episode of an actor, or one evaluated set of a classifier, at one operating point.

    Args:
        task: game or data set, such as "pong".
        method: "teacher", "random", "static", "random_exit", or the way the exits were made ("ztw", "sdn", ...).
        run_seed: of the training or distillation.
        label: the operating point, unique within (task, method, run_seed): "confidence@0.90", "exit 0", "full".
        rule: registered name, or "" where nothing is decided.
        thresholds: one per exit that can be taken early; +inf: not built, -inf: leaves always.
        target: "" or what the thresholds were calibrated for: "target_macs=0.5", "max_return_drop=0.05".
        execution: "real" (later stages were not run) or "replay" (all exits at once).
        actions: "argmax" or "sampled".
        split: "calibration", "certification" or "test"; reports show "test" only.
        episode: index, from 0.
        episode_seed: of the environment.
        metric: "score" (unclipped, whole game) or "accuracy" (0 to 1).
        value: of the metric.
        decisions: env steps of the episode, or rows of the set; >= 1.
        macs_mean: executed MACs per decision; NaN if nobody counted.
        relative_macs: the same against the full network without heads; NaN if nobody counted.
        exit_fractions: share of decisions per exit, or () for a network without exits.
        protocol: canonical JSON object of what else the value depends on (`checkpoint.canonical_json`).
    Raises:
        ValueError: a field breaks its rule; the message names it.
    """

    task: str
    method: str
    run_seed: int
    label: str
    rule: str
    thresholds: tuple[float, ...]
    target: str
    execution: str
    actions: str
    split: str
    episode: int
    episode_seed: int
    metric: str
    value: float
    decisions: int
    macs_mean: float
    relative_macs: float
    exit_fractions: tuple[float, ...]
    protocol: str

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if any(math.isnan(threshold) for threshold in self.thresholds):
            raise ValueError("`thresholds` must not be NaN, got one. Use inf for an exit that is not built.")
        if not all(0.0 <= share <= 1.0 for share in self.exit_fractions):
            raise ValueError(f"`exit_fractions` must lie in [0, 1], got {self.exit_fractions}.")
        if self.decisions < 1:
            raise ValueError(f"`decisions` must be at least 1, got {self.decisions}.")
        if not _is_canonical_object(self.protocol):
            raise ValueError(
                f"`protocol` must be a canonical JSON object, got {self.protocol[:60]!r}. "
                "Write it with checkpoint.canonical_json."
            )


@dataclass(frozen=True)
class LatencyRow(Record):
    """Measured time of one decision (one call on `batch` rows) at one operating point, in microseconds.

    Args:
        task: as in `Row`; so are `method`, `run_seed` and `label`.
        method: see `Row`.
        run_seed: see `Row`.
        label: see `Row`.
        batch: rows per call; >= 1.
        latency_us_p50: median.
        latency_us_p95: 95th percentile.
        threads: of the runtime; >= 1.
        runtime: "eager", "ort", ...
        machine: processor or accelerator, in words.
    Raises:
        ValueError: a field breaks its rule; the message names it.
    """

    task: str
    method: str
    run_seed: int
    label: str
    batch: int
    latency_us_p50: float
    latency_us_p95: float
    threads: int
    runtime: str
    machine: str

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True)
class ReliabilityRow(Record):
    """Held-out rows whose answer at one exit had a confidence in (low, high]: how sure, and how often like the teacher.

    Args:
        exit: index of the exit.
        low: lower bound of the bin.
        high: upper bound of the bin.
        count: rows in it; >= 1.
        confidence: their mean probability of the likeliest output.
        agreement: share of them whose likeliest output is the full network's.
    Raises:
        ValueError: a field breaks its rule; the message names it.
    """

    exit: int
    low: float
    high: float
    count: int
    confidence: float
    agreement: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise ValueError(f"`count` must be at least 1, got {self.count}.")
        for name in ("low", "high", "confidence", "agreement"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"`{name}` must lie in [0, 1], got {getattr(self, name)}.")


R = TypeVar("R", bound=Record)


def write_rows(path: Path, rows: Sequence[R]) -> None:
    """Replaces the file by these rows in one step; readers see the old file or the new one.

    Raises:
        ValueError: there are no rows, or they are of two kinds.
    """
    write_atomic(path, (_line(_columns(_kind(rows))) + "".join(map(_row_line, rows))).encode())


def append_rows(path: Path, rows: Sequence[R]) -> None:
    """Adds rows and waits until the disk has them; a new file gets its header, a torn last line is removed first.

    Raises:
        ValueError: the rows are of two kinds, or the file's header is of another kind.
    """
    if not rows:
        return
    header = _line(_columns(_kind(rows)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        kept = _whole_lines(file)
        file.seek(0)
        if kept and file.readline() != header.encode():
            raise ValueError(f"`{path}` must start with {header.strip()!r}. Move it away, or write to another file.")
        file.truncate(kept)
        file.write((("" if kept else header) + "".join(map(_row_line, rows))).encode())
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """Reads an `episodes.csv`; a torn last line is skipped.

    Raises:
        ValueError: a column name or a value is wrong; the message names file, line and column.
        OSError: the file cannot be read.
    """
    return read(path, Row)


def read_latency(path: Path) -> list[LatencyRow]:
    """Reads a `latency.csv`; see `read_rows`."""
    return read(path, LatencyRow)


def read_reliability(path: Path) -> list[ReliabilityRow]:
    """Reads a `reliability.csv`; see `read_rows`."""
    return read(path, ReliabilityRow)


def _whole_lines(file: BinaryIO) -> int:
    """Bytes up to and with the last line end; reads only the end of the file."""
    size = file.seek(0, os.SEEK_END)
    window = 1 << 16
    while True:
        start = max(0, size - window)
        file.seek(start)
        end = file.read().rfind(b"\n")
        if end >= 0 or start == 0:
            return start + end + 1
        window *= 4


def _kind(rows: Sequence[R]) -> type[R]:
    kinds = {type(row) for row in rows}
    if len(kinds) != 1:
        raise ValueError(f"`rows` must be of one kind, got {sorted(kind.__name__ for kind in kinds) or 'none'}.")
    return kinds.pop()


def _columns(kind: type[Record]) -> list[str]:
    return [field.name for field in fields(kind)]


def _line(cells: Iterable[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _row_line(row: Record) -> str:
    return _line(_write_cell(getattr(row, name)) for name in _columns(type(row)))


def _write_cell(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return json.dumps([float(number) if math.isfinite(number) else str(float(number)) for number in value])
    return repr(float(value)) if isinstance(value, float) else str(value)  # NumPy's own repr is not a number


def read(path: Path, kind: type[R]) -> list[R]:
    """Reads a file of records of one kind; see `read_rows`."""
    data = path.read_bytes()
    try:
        text = data[: data.rfind(b"\n") + 1].decode()
        lines = list(_numbered(text))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"`{path}` is no CSV file in UTF-8 ({error}). Write it again.") from error
    columns = _columns(kind)
    rows = []
    for number, cells in lines:
        if number == 1 and cells != columns:
            wrong = next((pair for pair in zip(columns, cells, strict=False) if pair[0] != pair[1]), None)
            told = f"column `{wrong[0]}` must not be {wrong[1]!r}" if wrong else f"must have {len(columns)} columns"
            raise ValueError(f"`{path}` line 1 {told}, got {len(cells)} columns. Write it again.")
        if len(cells) != len(columns):
            raise ValueError(f"`{path}` line {number} must have {len(columns)} columns, got {len(cells)}.")
        if number > 1:
            rows.append(_parse(path, number, kind, dict(zip(columns, cells, strict=True))))
    return rows


def _numbered(text: str) -> Iterable[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    for cells in reader:
        yield reader.line_num, cells


def _parse(path: Path, number: int, kind: type[R], cells: dict[str, str]) -> R:
    values: dict[str, Any] = {}
    for field in fields(kind):
        try:
            values[field.name] = _READERS[str(field.type)](cells[field.name])
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"`{path}` line {number} column `{field.name}` must be {field.type}, got {cells[field.name][:60]!r}."
            ) from error
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"`{path}` line {number} column {error}") from error


def _read_tuple(text: str) -> tuple[float, ...]:
    numbers = json.loads(text)
    if not isinstance(numbers, list) or any(isinstance(number, bool) for number in numbers):
        raise ValueError("not a list of numbers")
    return tuple(float(number) for number in numbers)


_READERS: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float, "tuple[float, ...]": _read_tuple}


def _check_fields(row: Record) -> None:
    for field in fields(row):
        value = getattr(row, field.name)
        if isinstance(value, str):
            if not value.isprintable():
                raise ValueError(f"`{field.name}` must be printable text on one line, got {value[:60]!r}.")
            if not value and field.name in _NAMES:
                raise ValueError(f"`{field.name}` must not be empty. Name it.")
        if field.name in _NOT_NAN and not math.isfinite(value):
            raise ValueError(f"`{field.name}` must be finite, got {value}. Leave out what was not measured.")
        if field.name in ("macs_mean", "relative_macs") and not (math.isnan(value) or 0.0 <= value < math.inf):
            raise ValueError(f"`{field.name}` must be at least 0, or nan if nobody counted, got {value}.")


def _is_canonical_object(text: str) -> bool:
    try:
        value = json.loads(text)
        return isinstance(value, dict) and canonical_json(value) == text
    except (ValueError, RecursionError):
        return False

"""What a labelled set tells beyond episodes: every exit, compute budgets, groups of rows and pictures, as files of rows.

A domain that can take its test set apart (`domain.Dissecting`) writes these files into the `eval` folder of a method; a
report reads them and knows nothing else.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from rlexit.rows import R, Record, read, write_rows

REFERENCE, HONEST, BATCH, AREA, FIXED = "reference", "honest", "batch", "area", "fixed"
# How the thresholds of a budget were chosen, and what tables call it.
WAYS = {
    REFERENCE: "one threshold, searched on the test rows themselves, as in published tables",
    HONEST: "one threshold, chosen on held-out rows",
    BATCH: "one threshold per exit, chosen on held-out rows so that the exits' shares of a batch form a geometric series",
    AREA: "mean over budgets, thresholds chosen on held-out rows",
    FIXED: "nothing to choose",
}
# What is averaged over training seeds.
MEASURED = ("value", "improvability", "macs_mean", "relative_macs", "relative_ops", "exit_fractions")
EXITS = "exits"
MAX_FILE_NAME = 100


@dataclass(frozen=True)
class ExitRow(Record):
    """One exit of one method, where every row of the set leaves there.

    Args:
        task: as in `rows.Row`; so are `method` and `run_seed`.
        method: see `rows.Row`.
        run_seed: see `rows.Row`.
        label: of the network where a method has several, else `exits`.
        exit: index.
        group: name of the unit that the exit follows.
        value: of the metric.
        improvability: of the rows that this exit gets wrong, the share that an earlier one had right; NaN if none is wrong.
        macs_mean: of leaving there, all heads before it included.
        relative_macs: the same against the full network without heads.
        relative_ops: likewise by another counter of the domain, told in a note; NaN if it has none.
        count: rows; >= 1.
        metric: of the value.
    """

    task: str
    method: str
    run_seed: int
    label: str
    exit: int
    group: str
    value: float
    improvability: float
    macs_mean: float
    relative_macs: float
    relative_ops: float
    count: int
    metric: str


@dataclass(frozen=True)
class BudgetRow(Record):
    """What a method reaches at a compute budget.

    Args:
        task: as in `rows.Row`; so are `method` and `run_seed`.
        method: see `rows.Row`.
        run_seed: see `rows.Row`.
        label: of the network where a method has several, else `exits`.
        choice: how the thresholds were chosen, of `WAYS`.
        source: what they were chosen on, in words.
        execution: `real` or `replay`.
        budget: share of the full network's MACs that may be spent; inf for the best of all thresholds.
        value: of the metric.
        relative_macs: what was spent on the test rows.
        count: test rows; >= 1.
        metric: of the value.
    """

    task: str
    method: str
    run_seed: int
    label: str
    choice: str
    source: str
    execution: str
    budget: float
    value: float
    relative_macs: float
    count: int
    metric: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.choice not in WAYS:
            raise ValueError(f"`choice` must be one of {', '.join(WAYS)}, got {self.choice!r}.")
        if math.isnan(self.budget):
            raise ValueError("`budget` must be a number, got nan. Leave out what no threshold meets.")


@dataclass(frozen=True)
class GroupRow(Record):
    """Rows of one group, such as a class, at one operating point.

    Args:
        task: as in `rows.Row`; so are `method` and `run_seed`.
        method: see `rows.Row`.
        run_seed: see `rows.Row`.
        label: the operating point.
        group: its name.
        value: of the metric.
        relative_macs: mean of the group.
        exit_fractions: share of its rows per exit.
        count: rows; >= 1.
        metric: of the value.
    """

    task: str
    method: str
    run_seed: int
    label: str
    group: str
    value: float
    relative_macs: float
    exit_fractions: tuple[float, ...]
    count: int
    metric: str


@dataclass(frozen=True)
class PictureRow(Record):
    """A picture that lies beside the file.

    Args:
        task: as in `rows.Row`; so are `method` and `run_seed`.
        method: see `rows.Row`.
        run_seed: see `rows.Row`.
        file: plain name, ends in .png.
        alt: what it shows, for those who cannot see it.
        caption: what it shows, how it was made.
    """

    task: str
    method: str
    run_seed: int
    file: str
    alt: str
    caption: str

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = PurePath(self.file).name == self.file and len(self.file) <= MAX_FILE_NAME
        if not (plain and self.file.endswith(".png")):
            raise ValueError(f"`file` must be the plain name of a .png, got {self.file!r}.")


@dataclass(frozen=True)
class NoteRow(Record):
    """What a domain says about a column of its own, in its own words.

    Args:
        task: as in `rows.Row`; so are `method` and `run_seed`.
        method: see `rows.Row`.
        run_seed: see `rows.Row`.
        about: the column.
        text: one or more sentences.
    """

    task: str
    method: str
    run_seed: int
    about: str
    text: str


FILES: dict[type[Record], str] = {
    NoteRow: "notes.csv",
    ExitRow: "exits.csv",
    BudgetRow: "budgets.csv",
    GroupRow: "groups.csv",
    PictureRow: "pictures.csv",
}


def write(folder: Path, rows: Sequence[R]) -> None:
    """Replaces what the file of the rows' kind in `folder` says of their methods; nothing is done where there are none."""
    if rows:
        methods = {vars(row)["method"] for row in rows}
        others = [row for row in load(folder, type(rows[0])) if vars(row)["method"] not in methods]
        write_rows(folder / FILES[type(rows[0])], [*others, *rows])


def over_seeds(rows: Iterable[R]) -> list[R]:
    """The rows of all training seeds of a method as one each: what was measured is averaged.

    What some seed of a network did not measure is left out, for a mean of the others would be compared with means of all.

    Returns:
        In the order of the first seed; with the number of that one.
    """
    seeds: dict[tuple[str, ...], set[int]] = defaultdict(set)
    groups: dict[tuple[Any, ...], dict[int, R]] = defaultdict(dict)
    for row in rows:
        values = vars(row)
        place = tuple(value for name, value in values.items() if name not in (*MEASURED, "run_seed"))
        seeds[_network(row)].add(values["run_seed"])
        groups[(type(row), *place)].setdefault(values["run_seed"], row)
    return [
        _mean(list(found.values()))
        for found in groups.values()
        if found.keys() == seeds[_network(next(iter(found.values())))]
    ]


def _network(row: Record) -> tuple[str, ...]:
    return tuple(str(vars(row)[name]) for name in ("task", "method", "label"))


def _mean(rows: Sequence[R]) -> R:
    first = vars(rows[0])
    means: dict[str, Any] = {}
    for name in MEASURED:
        if name in first:
            mean = np.mean([vars(row)[name] for row in rows], axis=0)
            means[name] = tuple(mean.tolist()) if isinstance(first[name], tuple) else float(mean)
    return replace(rows[0], **means)


def load(folder: Path, kind: type[R]) -> list[R]:
    """All rows of a kind in `folder`; none where the file is missing."""
    path = folder / FILES[kind]
    return read(path, kind) if path.is_file() else []

"""What a labelled set tells beyond episodes: every exit, compute budgets, groups of rows and pictures, as files of rows.

A domain that can take its test set apart (`domain.Dissecting`) writes these files into the `eval` folder of a method; a
report reads them and knows nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from rlexit.rows import R, Record, read, write_rows

# How the thresholds of a budget were chosen, and what tables call it.
CHOICES = {
    "reference": "on the test images themselves, as published",
    "honest": "one threshold, on held-out images",
    "batch": "one threshold per exit, exits' shares falling geometrically, on held-out images",
    "area": "mean over budgets, thresholds on held-out images",
    "fixed": "nothing to choose",
}
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
        relative_ops: likewise by another, named counter of the domain; NaN if it has none.
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
        choice: how the thresholds were chosen, of `CHOICES`.
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
        if self.choice not in CHOICES:
            raise ValueError(f"`choice` must be one of {', '.join(CHOICES)}, got {self.choice!r}.")
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


FILES: dict[type[Record], str] = {
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


def load(folder: Path, kind: type[R]) -> list[R]:
    """All rows of a kind in `folder`; none where the file is missing."""
    path = folder / FILES[kind]
    return read(path, kind) if path.is_file() else []

"""What was evaluated in run folders: rows and latencies, with runs told apart that would carry one name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlexit import dissection
from rlexit.dissection import BudgetRow, ExitRow, GroupRow, NoteRow
from rlexit.resources import CONFIG
from rlexit.rows import LatencyRow, Row, read_latency, read_rows
from rlexit.summary import RANDOM, REFERENCES, TEACHER, outcomes


@dataclass(frozen=True)
class Evidence:
    """Everything measured, by folder; the names of methods are unique over the runs.

    Args:
        rows: episodes of every folder.
        latency: timed decisions of all folders; no row twice, and so are the others.
        budgets: what labelled sets tell: values at compute budgets.
        exits: every exit alone.
        groups: groups of rows.
        notes: what a domain says about columns of its own.
    """

    rows: Mapping[Path, Sequence[Row]]
    latency: Sequence[LatencyRow]
    budgets: Sequence[BudgetRow] = ()
    exits: Sequence[ExitRow] = ()
    groups: Sequence[GroupRow] = ()
    notes: Sequence[NoteRow] = ()


def gather(folders: Sequence[Path]) -> Evidence:
    """Reads evaluated folders, such as `.../pong/ztw/s0`.

    Where two runs made one method in two ways ("ztw" with other settings), its rows bear the runs' names: "ztw (pong)".
    Runs of one config are one: their seeds are put together.
    """
    rows = {folder: read_if_there(folder / "eval" / "episodes.csv", read_rows) for folder in folders}
    timed = {folder: read_if_there(folder / "eval" / "latency.csv", read_latency) for folder in folders}
    kinds = (BudgetRow, ExitRow, GroupRow, NoteRow)
    labelled = [{folder: dissection.load(folder / "eval", kind) for folder in folders} for kind in kinds]
    roots = {folder: _root(folder) for folder in folders}
    names = _names(sorted(set(roots.values())))
    # A method may stand in one kind of rows only: PBEE has no episodes where no grid was played.
    clashing = _clashing(rows, roots) | _made_twice([rows, *labelled], roots)

    def told_apart(found: Mapping[Path, Sequence[Any]]) -> list[Any]:
        # A teacher's rows may stand in several run folders.
        renamed = (_renamed(row, names[roots[folder]], clashing) for folder in folders for row in found[folder])
        return list(dict.fromkeys(renamed))

    return Evidence(
        {folder: [_renamed(row, names[roots[folder]], clashing) for row in rows[folder]] for folder in folders},
        told_apart(timed),
        *map(told_apart, labelled),
    )


def read_if_there(path: Path, reader: Callable[[Path], list[Any]]) -> list[Any]:
    """What a file of rows holds; nothing if it is not there."""
    return reader(path) if path.is_file() else []


def _clashing(rows: Mapping[Path, Sequence[Row]], roots: Mapping[Path, Path]) -> set[tuple[str, str]]:
    """(task, method) of which two runs say different things; teachers and chance must be the same ones."""
    seen: dict[tuple[object, ...], set[tuple[object, ...]]] = defaultdict(set)
    runs: dict[tuple[str, str], set[Path]] = defaultdict(set)
    unlike: set[tuple[str, str]] = set()
    for folder, part in rows.items():
        for row in part:
            if row.split != "test" or row.method in (TEACHER, RANDOM):
                continue
            key, outcome = outcomes(row)
            seen[key].add(outcome)
            runs[row.task, row.method].add(roots[folder])
            if len(seen[key]) > 1:
                unlike.add((row.task, row.method))
    return {what for what in unlike if len(runs[what]) > 1}


def _made_twice(kinds: Sequence[Mapping[Path, Sequence[Any]]], roots: Mapping[Path, Path]) -> set[tuple[str, str]]:
    """(task, method) that runs of different configs have."""
    configs: dict[tuple[str, str], set[bytes]] = defaultdict(set)
    for found in kinds:
        for folder, part in found.items():
            for what in {(row.task, row.method) for row in part}:
                if what[1] not in (TEACHER, RANDOM):
                    configs[what].add(_config(roots[folder]))
    return {what for what, of in configs.items() if len(of) > 1}


def _config(root: Path) -> bytes:
    path = root / CONFIG
    return path.read_bytes() if path.is_file() else b""


def _renamed(row: Any, name: str, clashing: set[tuple[str, str]]) -> Any:
    if (row.task, row.method) not in clashing:
        return row
    # A reference keeps its name, by which verdicts find it; its label tells the runs apart.
    if row.method in REFERENCES:
        return replace(row, label=f"{row.label} ({name})")
    return replace(row, method=f"{row.method} ({name})")


def _root(folder: Path) -> Path:
    """The run that a folder belongs to: the nearest one with a config, else the folder itself."""
    return next((path for path in (folder, *folder.parents) if (path / CONFIG).is_file()), folder)


def _names(roots: Sequence[Path]) -> dict[Path, str]:
    """The shortest ends of the paths that tell them apart."""
    for length in range(1, max((len(root.parts) for root in roots), default=1) + 1):
        names = {root: "/".join(root.parts[-length:]) for root in roots}
        if len(set(names.values())) == len(roots):
            break
    return names

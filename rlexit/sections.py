"""The part of a report that is about a labelled set: compute budgets, every exit, groups of rows, pictures."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlexit import dissection, tables
from rlexit.dissection import (
    AREA,
    BATCH,
    EXITS,
    FIXED,
    HONEST,
    REFERENCE,
    WAYS,
    BudgetRow,
    ExitRow,
    GroupRow,
    NoteRow,
    PictureRow,
    over_seeds,
)
from rlexit.evidence import Evidence
from rlexit.pages import Block, Bullets, Heading, Paragraph, Picture, Table
from rlexit.rows import Record
from rlexit.summary import FAR_BELOW, SAME_MACS, TEACHER

# A difference outside of so many standard errors is one.
SIGMAS = 1.96
# Counts that differ by more are shown side by side.
OPS_APART = 0.1
MAX_PICTURE_BYTES = 8 << 20

Item = tuple[str, str, str]


def blocks(evidence: Evidence) -> list[Block]:
    """Everything that runs tell about labelled sets; nothing where they tell nothing.

    Raises:
        ValueError: a file is damaged.
    """
    found: list[Block] = []
    of_all = [*(row.task for row in evidence.budgets), *(row.task for row in evidence.exits)]
    tasks = list(dict.fromkeys(of_all))
    for task in tasks:
        of = f": {task}" if len(tasks) > 1 else ""
        budgets = [row for row in evidence.budgets if row.task == task]
        found += _budget_blocks(of, [row for row in budgets if row.choice != FIXED])
        found += _fixed_blocks(of, budgets)
        notes = [row for row in evidence.notes if row.task == task]
        found += _exit_blocks(of, [row for row in evidence.exits if row.task == task], notes)
        found += _group_blocks(of, [row for row in evidence.groups if row.task == task])
    return found + _picture_blocks(list(evidence.rows))


def csv_files(evidence: Evidence) -> dict[str, str]:
    """File name to content: all rows of all runs, one file per kind of row."""
    kinds: dict[type[Record], Sequence[Record]] = {
        BudgetRow: evidence.budgets,
        ExitRow: evidence.exits,
        GroupRow: evidence.groups,
    }
    return {
        dissection.FILES[kind]: tables.to_csv([_plain(row) for row in rows]) for kind, rows in kinds.items() if rows
    }


def _plain(row: Record) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(row).items()}


def _name(row: BudgetRow | ExitRow | GroupRow) -> str:
    plain = isinstance(row, GroupRow) or row.label == EXITS or row.method == TEACHER
    return row.method if plain else f"{row.method} {row.label}"


def _seeds(rows: Sequence[BudgetRow | ExitRow | GroupRow]) -> list[int]:
    return sorted({row.run_seed for row in rows})


def _means_of(rows: Sequence[BudgetRow | ExitRow | GroupRow]) -> str:
    """What a caption says about seeds; nothing where there is one."""
    counts: dict[str, set[int]] = defaultdict(set)
    for row in rows:
        counts[_name(row)].add(row.run_seed)
    return (
        "" if len(_seeds(rows)) < 2 else f" Means over {tables.range_text(map(len, counts.values()))} training seeds."
    )


def percent(value: float) -> str:
    """A share as "91.53"."""
    return f"{100 * value:.2f}"


def _points(value: float) -> str:
    return f"{100 * value:+.2f}"


def _budget_blocks(of: str, rows: Sequence[BudgetRow]) -> list[Block]:
    """Values at shares of the compute, a line per method and way of choosing; seed by seed on demand."""
    if not rows:
        return []
    metric, means = rows[0].metric, over_seeds(rows)
    shares = sorted({row.budget for row in rows if row.choice != AREA})
    names = ["method", "thresholds"]
    header = [f"{100 * share:.4g} %" if share < math.inf else "max" for share in shares]
    lines = {_name(row): [one for one in means if _name(one) == _name(row)] for row in means}
    found: list[Block] = [
        Heading(f"{metric.capitalize()} at a compute budget{of}"),
        Table([*names, *header, "mean up to 100 %"], _budget_lines(lines, shares)),
        Paragraph(_budget_caption(rows), "caption"),
    ]
    seeds = _seeds(rows)
    if len(seeds) > 1:
        apart = {
            f"{name}, seed {seed}": [row for row in rows if (_name(row), row.run_seed) == (name, seed)]
            for name in lines
            for seed in seeds
        }
        table = _budget_lines(apart, shares)
        found.append(Table([*names, *header, "mean up to 100 %"], table, folded="The same, seed by seed"))
    spent = [
        [name, choice, mine[0].execution, *_cells(mine, shares, spent=True)]
        for name, of_name in lines.items()
        for choice, mine in _by_choice(of_name).items()
    ]
    title = "What was spent: multiply-adds per row, as a share of the full network's"
    found.append(Table([*names, "execution", *header], spent, names=3, folded=title))
    return found


def _by_choice(rows: Sequence[BudgetRow]) -> dict[str, list[BudgetRow]]:
    grouped: dict[str, list[BudgetRow]] = defaultdict(list)
    for row in rows:
        if row.choice != AREA:
            grouped[row.choice].append(row)
    return grouped


def _cells(rows: Sequence[BudgetRow], shares: Sequence[float], spent: bool = False) -> list[str]:
    told = {row.budget: tables.number(row.relative_macs, 3) if spent else percent(row.value) for row in rows}
    return [told.get(share, tables.UNKNOWN) for share in shares]


def _budget_lines(named: Mapping[str, Sequence[BudgetRow]], shares: Sequence[float]) -> list[list[str]]:
    lines: list[list[str]] = []
    for name, rows in named.items():
        mean = next((percent(row.value) for row in rows if row.choice == AREA), tables.UNKNOWN)
        for choice, mine in _by_choice(rows).items():
            lines.append([name, choice, *_cells(mine, shares), mean if choice == HONEST else tables.UNKNOWN])
    return lines


def _budget_caption(rows: Sequence[BudgetRow]) -> str:
    counts = tables.range_text(row.count for row in rows)
    said = [
        f"{rows[0].metric.capitalize()} in %, {counts} test rows; a budget is a share of the full network's multiply-adds, "
        f"heads included.{_means_of(rows)}"
    ]
    for choice in dict.fromkeys(row.choice for row in rows if row.choice in (REFERENCE, HONEST, BATCH)):
        sources = ", ".join(sorted({row.source for row in rows if row.choice == choice}))
        said.append(f"{choice}: {WAYS[choice]} (here {sources}).")
    said.append(
        "Reference thresholds were chosen by what they reach on the test rows, so they promise too much; max is the best of "
        "them, whatever it costs. The mean is over budgets from the first exit's to the full network's, honest thresholds."
    )
    return " ".join(said)


def _fixed_blocks(of: str, rows: Sequence[BudgetRow]) -> list[Block]:
    """Networks that every row passes to the end, and what exits reach at their compute."""
    # Seeds that were tested on other numbers of rows are no seeds of one measurement.
    groups: dict[tuple[str, int], list[BudgetRow]] = defaultdict(list)
    for row in rows:
        if row.choice == FIXED:
            # What it spends differs from seed to seed where gates decide; nobody gave it a budget.
            groups[_name(row), row.count].append(replace(row, budget=math.inf))
    if not groups:
        return []
    names = [name for name, _ in groups]
    honest = [row for row in rows if row.choice == HONEST]
    several = any(len(mine) > 1 for mine in groups.values())
    lines = []
    for (name, count), mine in groups.items():
        [mean] = over_seeds(mine)
        told = f"{name} ({count} rows)" if names.count(name) > 1 else name
        each = [" / ".join(percent(row.value) for row in mine) if len(mine) > 1 else ""] if several else []
        lines.append((mean.relative_macs, [told, tables.number(mean.relative_macs, 3), percent(mean.value), *each]))
    header = ["network", "relative MACs", f"{rows[0].metric} %", *(["seed by seed"] if several else [])]
    found: list[Block] = [
        Heading(f"Networks without early exits{of}", level=3 if honest else 2),
        Table(header, [line for _, line in sorted(lines, key=lambda pair: -pair[0])], names=1),
    ]
    against = [item for mine in groups.values() if mine[0].method != TEACHER for item in _against(mine, honest)]
    if against:
        told = (
            f"Honest thresholds, the budget with most compute within the other network's; {rows[0].metric} on the same test "
            "rows. Brackets: 95 % interval of the difference over test rows, as if the two erred independently."
        )
        title = f"Exits or a network without exits at the same compute?{of}"
        found += [Heading(title, level=3), Bullets(against), Paragraph(told, "caption")]
    return found


def _against(fixed: Sequence[BudgetRow], honest: Sequence[BudgetRow]) -> list[Item]:
    """What honest thresholds reach with the compute of one network without exits, per method.

    Args:
        fixed: that network, of every training seed; one that was trained once is compared with all seeds of a method. Where
            both were trained several times and no seed is common, nothing is said.
        honest: rows of all methods.
    """
    own = {row.run_seed: row for row in fixed}
    [mean] = over_seeds(fixed)
    named = f"{_name(mean)} has {percent(mean.value)} % at {tables.number(mean.relative_macs, 3)} of the MACs"
    found: list[Item] = []
    small: list[str] = []
    for name in dict.fromkeys(map(_name, honest)):
        mine = [row for row in honest if _name(row) == name]
        seeds = [seed for seed in _seeds(mine) if len(own) == 1 or seed in own]
        if not seeds:
            continue
        rivals = [own.get(seed, fixed[0]) for seed in seeds]
        exits = [_within(mine, seed, rival) for seed, rival in zip(seeds, rivals, strict=True)]
        pairs = [(one, rival) for one, rival in zip(exits, rivals, strict=True) if one is not None]
        if len(pairs) < len(seeds):
            small.append(name)
        else:
            found.append(_verdict(named, name, pairs))
    if small:
        found.append((*tables.BADGES["unknown"], f"{named}: {tables.have_text(small)} no budget that small."))
    return found


def _within(rows: Sequence[BudgetRow], seed: int, rival: BudgetRow) -> BudgetRow | None:
    """The row of a seed with most compute within a rival's; None if there is none."""
    most = rival.relative_macs * SAME_MACS
    affordable = [row for row in rows if row.run_seed == seed and row.relative_macs <= most]
    return max(affordable, key=lambda row: row.relative_macs, default=None)


def _verdict(named: str, name: str, pairs: Sequence[tuple[BudgetRow, BudgetRow]]) -> Item:
    """One method against one network, seed by seed and on average."""
    count = len(pairs)
    value, fixed = (sum(pair[side].value for pair in pairs) / count for side in (0, 1))
    spent, most = (sum(pair[side].relative_macs for pair in pairs) / count for side in (0, 1))
    difference = value - fixed
    # All seeds are judged by the same rows, so their number does not make this error smaller.
    rows = pairs[0]
    error = SIGMAS * math.sqrt(sum(p * (1 - p) / row.count for p, row in zip((value, fixed), rows, strict=True)))
    if difference <= error and spent < FAR_BELOW * most:
        nearest = f"the budget of {name} nearest to it spends only {tables.number(spent, 3)}"
        return (*tables.BADGES["unknown"], f"{named}: {nearest}.")
    winner = "exits" if difference > error else "static" if difference < -error else "none"
    seeds = ", ".join(_points(one.value - rival.value) for one, rival in pairs)
    text = (
        f"{named}: {name} reaches {percent(value)} % with {tables.number(spent, 3)}; difference {_points(difference)} "
        f"[{_points(difference - error)}, {_points(difference + error)}] points"
    )
    return (*tables.BADGES[winner], f"{text}; seed by seed {seeds}." if count > 1 else f"{text}.")


def _exit_blocks(of: str, rows: Sequence[ExitRow], notes: Sequence[NoteRow]) -> list[Block]:
    """The value of every exit, were all rows to leave there, and what earlier exits would have known better."""
    early = {_name(row) for row in rows if row.exit > 0}
    several = [row for row in rows if row.label == EXITS and _name(row) in early]
    if not several:
        return []
    metric, means = several[0].metric, over_seeds(several)
    names = list(dict.fromkeys(map(_name, means)))
    places = list(dict.fromkeys((row.exit, row.group) for row in means))
    by_place = {(_name(row), row.exit): row for row in means}
    apart = any(abs(row.relative_ops - row.relative_macs) > OPS_APART for row in several)
    header = ["exit", "after", *(f"{name} {what}" for name in names for what in ("MACs", f"{metric} %", "HI"))]
    header += [f"{name} ops" for name in names if apart]
    lines = []
    for exit, unit in places:
        cells = [str(exit), unit]
        for name in names:
            row = by_place.get((name, exit))
            values = (math.nan,) * 3 if row is None else (row.relative_macs, 100 * row.value, 100 * row.improvability)
            cells += [tables.number(value, digits) for value, digits in zip(values, (3, 2, 1), strict=True)]
        for name in names if apart else ():
            row = by_place.get((name, exit))
            cells.append(tables.number(math.nan if row is None else row.relative_ops, 3))
        lines.append(cells)
    told = (
        f"Every row leaves at that exit; MACs relative to the full network, heads before it included; {metric} in %, "
        f"{tables.range_text(row.count for row in several)} test rows.{_means_of(several)} HI, hindsight improvability: "
        "of the rows that the exit gets wrong, the share in % that an earlier exit had right; lower wastes less."
    )
    if apart:
        said = dict.fromkeys(note.text for note in notes if note.about == "relative_ops")
        told += " ".join((" Ops: the same as MACs by another count.", *said))
    title = f"{metric.capitalize()} of every exit{of}"
    return [Heading(title), Table(header, lines), Paragraph(told, "caption")]


def _group_blocks(of: str, rows: Sequence[GroupRow]) -> list[Block]:
    """Where the rows of every group leave, one table per method."""
    found: list[Block] = []
    means = sorted(over_seeds(rows), key=lambda row: row.relative_macs)
    for name in dict.fromkeys(map(_name, over_seeds(rows))):
        mine = [row for row in means if _name(row) == name]
        lines = [
            [
                row.group,
                percent(row.value),
                tables.number(row.relative_macs, 3),
                tables.shares_text(row.exit_fractions),
                str(row.count),
            ]
            for row in mine
        ]
        header = ("group", f"{mine[0].metric} %", "relative MACs", "exits %", "rows")
        seeds = len(_seeds([row for row in rows if _name(row) == name]))
        of_seeds = f", mean of {seeds} seeds" if seeds > 1 else ""
        folded = f"{name} at {mine[0].label}{of_seeds}: where the rows of every group leave, cheapest first"
        found.append(Table(header, lines, names=1, folded=folded))
    return [Heading(f"Exits per group of rows{of}", level=3), *found] if found else []


def _picture_blocks(folders: Sequence[Path]) -> list[Block]:
    """One picture per method of a run; other seeds would show nearly the same rows."""
    found: list[Block] = []
    shown = set()
    for folder in folders:
        for row in dissection.load(folder / "eval", PictureRow):
            if (folder.parent, row.method) in shown:
                continue
            shown.add((folder.parent, row.method))
            path = folder / "eval" / row.file
            if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_PICTURE_BYTES:
                found.append(Paragraph(f"The picture {row.file} of {row.method} is missing or too large.", "note"))
            else:
                found.append(Picture(path, row.alt, row.caption))
    return [Heading("Easy and hard rows"), *found] if found else []

"""The part of a report that is about a labelled set: compute budgets, every exit, groups of rows, pictures."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlexit import dissection, tables
from rlexit.dissection import CHOICES, BudgetRow, ExitRow, GroupRow, PictureRow
from rlexit.evidence import Evidence
from rlexit.pages import Block, Bullets, Heading, Paragraph, Picture, Table
from rlexit.rows import Record
from rlexit.summary import SAME_MACS

# A difference outside of so many standard errors is one.
SIGMAS = 1.96
# What spends less than this share of a rival's compute says nothing about who is better there.
FAR_BELOW = 0.9
# Counts that differ by more are shown side by side.
OPS_APART = 0.1
MAX_PICTURE_BYTES = 8 << 20
AREA, FIXED, HONEST = "area", "fixed", "honest"


def blocks(evidence: Evidence) -> list[Block]:
    """Everything that runs tell about labelled sets; nothing where they tell nothing.

    Raises:
        ValueError: a file is damaged.
    """
    found: list[Block] = []
    tasks = [row.task for row in evidence.budgets] + [row.task for row in evidence.exits]
    for task in dict.fromkeys(tasks):
        found += _budget_blocks(task, [row for row in evidence.budgets if row.task == task])
        found += _exit_blocks(task, [row for row in evidence.exits if row.task == task])
        found += _group_blocks(task, [row for row in evidence.groups if row.task == task])
    return found + _picture_blocks([folder / "eval" for folder in evidence.rows])


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


def _name(row: BudgetRow | ExitRow | GroupRow, seeds: bool) -> str:
    own = row.method if row.label in ("exits", "full") or isinstance(row, GroupRow) else f"{row.method} {row.label}"
    return f"{own}, seed {row.run_seed}" if seeds else own


def percent(value: float) -> str:
    """A share as "91.53"."""
    return tables.number(100 * value)


def _budget_blocks(task: str, rows: Sequence[BudgetRow]) -> list[Block]:
    """Accuracy at shares of the compute, a line per method and way of choosing, and against networks without exits."""
    if not rows:
        return []
    seeds = len({row.run_seed for row in rows if row.choice != FIXED}) > 1
    shares = sorted({row.budget for row in rows if row.choice not in (AREA, FIXED)})
    header = ["method", "thresholds", *(f"{100 * share:.4g} %" if share < math.inf else "max" for share in shares)]
    lines: list[list[str]] = []
    spent: list[list[str]] = []
    grouped: dict[tuple[str, str], list[BudgetRow]] = defaultdict(list)
    for row in rows:
        if row.choice in (AREA, FIXED):
            continue
        grouped[_name(row, seeds), f"{row.choice}: {CHOICES[row.choice]}"].append(row)
    means = {_name(row, seeds): row.value for row in rows if row.choice == AREA}
    for (name, choice), mine in grouped.items():
        by_share = {row.budget: row for row in mine}
        cells = [percent(by_share[share].value) if share in by_share else tables.UNKNOWN for share in shares]
        mean = percent(means[name]) if name in means and choice.startswith(HONEST) else tables.UNKNOWN
        lines.append([name, choice.partition(":")[0], *cells, mean])
        used = [
            tables.number(by_share[share].relative_macs, 3) if share in by_share else tables.UNKNOWN for share in shares
        ]
        spent.append([name, choice.partition(":")[0], mine[0].execution, *used])
    found: list[Block] = [
        Heading(f"Accuracy at a compute budget: {task}"),
        Table([*header, "mean up to 100 %"], lines),
        Paragraph(_budget_caption(rows), "caption"),
        Table(
            [*header[:2], "execution", *header[2:]],
            spent,
            names=3,
            folded="What was spent, relative to the full network",
        ),
    ]
    fixed = [row for row in rows if row.choice == FIXED]
    if fixed:
        told = [[_name(row, False), tables.number(row.relative_macs, 3), percent(row.value)] for row in fixed]
        found += [Table(("network without exits", "relative MACs", "accuracy %"), told, names=1)]
    against = [item for row in fixed if row.method != "teacher" for item in _against(row, rows, seeds)]
    if against:
        found += [Heading("Exits or a network without exits at the same compute?", level=3), Bullets(against)]
    return found


def _budget_caption(rows: Sequence[BudgetRow]) -> str:
    counts = tables.range_text(row.count for row in rows)
    said = [f"Accuracy in %, {counts} test rows; budgets are shares of the full network's MACs, heads included."]
    for choice in dict.fromkeys(row.choice for row in rows if row.choice in ("reference", HONEST, "batch")):
        sources = sorted({row.source for row in rows if row.choice == choice})
        said.append(f"{choice}: {CHOICES[choice]} (here {', '.join(sources)}).")
    said.append(
        "Reference thresholds were chosen by what they reach on the test rows, so they promise too much; `max` is the best "
        "of them, whatever it costs. The mean is over all budgets from the first exit's to the full network's, honest."
    )
    return " ".join(said)


def _against(fixed: BudgetRow, rows: Sequence[BudgetRow], seeds: bool) -> list[tuple[str, str, str]]:
    """What honest thresholds reach with the compute of a network without exits, per method."""
    found: list[tuple[str, str, str]] = []
    affordable: dict[str, list[BudgetRow]] = defaultdict(list)
    for row in rows:
        if row.choice == HONEST and row.relative_macs <= fixed.relative_macs * SAME_MACS:
            affordable[_name(row, seeds)].append(row)
    named = f"at {tables.number(fixed.relative_macs, 3)} of the MACs ({_name(fixed, False)}, {percent(fixed.value)} %)"
    for name in dict.fromkeys(_name(row, seeds) for row in rows if row.choice == HONEST):
        if not affordable[name]:
            found.append((*tables.BADGES["unknown"], f"{named}: {name} has no budget that small."))
            continue
        exits = max(affordable[name], key=lambda row: row.relative_macs)
        if exits.relative_macs < FAR_BELOW * fixed.relative_macs:
            nearest = tables.number(exits.relative_macs, 3)
            found.append(
                (*tables.BADGES["unknown"], f"{named}: the budget of {name} nearest to it spends only {nearest}.")
            )
            continue
        difference = exits.value - fixed.value
        error = SIGMAS * math.sqrt(sum(row.value * (1 - row.value) / row.count for row in (exits, fixed)))
        winner = "exits" if difference > error else "static" if difference < -error else "none"
        text = (
            f"{named}: {name} reaches {percent(exits.value)} % with {tables.number(exits.relative_macs, 3)}; difference "
            f"{100 * difference:+.2f} points, 95 % interval +-{percent(error)} as if the rows were others."
        )
        found.append((*tables.BADGES[winner], text))
    return found


def _exit_blocks(task: str, rows: Sequence[ExitRow]) -> list[Block]:
    """Accuracy of every exit, were all rows to leave there, and what earlier exits would have known better."""
    several = [row for row in rows if row.label == "exits"]
    if not several:
        return []
    seeds = len({row.run_seed for row in several}) > 1
    names = list(dict.fromkeys(_name(row, seeds) for row in several))
    places = list(dict.fromkeys((row.exit, row.group) for row in several))
    by_place = {(_name(row, seeds), row.exit): row for row in several}
    apart = any(abs(row.relative_ops - row.relative_macs) > OPS_APART for row in several)
    header = ["exit", "after", *(f"{name} {what}" for name in names for what in ("MACs", "%", "HI"))]
    header += [f"{name} reference ops" for name in names if apart]
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
        f"Every row leaves at that exit; MACs relative to the full network, heads before it included; accuracy in %, "
        f"{tables.range_text(row.count for row in several)} test rows. HI, hindsight improvability: of the rows that the "
        "exit gets wrong, the share in % that an earlier exit had right; lower wastes less."
    )
    if apart:
        told += " Reference ops are the published tables' count, which overrates depthwise convolutions."
    return [Heading(f"Accuracy of every exit: {task}"), Table(header, lines), Paragraph(told, "caption")]


def _group_blocks(task: str, rows: Sequence[GroupRow]) -> list[Block]:
    """Where the rows of every group leave, one table per method."""
    found: list[Block] = []
    seeds = len({row.run_seed for row in rows}) > 1
    for name in dict.fromkeys(_name(row, seeds) for row in rows):
        mine = sorted((row for row in rows if _name(row, seeds) == name), key=lambda row: row.relative_macs)
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
        header = ("class", "accuracy %", "relative MACs", "exits %", "rows")
        found.append(Table(header, lines, names=1, folded=f"{name} at {mine[0].label}: where every class leaves"))
    return [Heading(f"Exits per class: {task}", level=3), *found] if found else []


def _picture_blocks(places: Sequence[Path]) -> list[Block]:
    found: list[Block] = []
    for place in places:
        for row in dissection.load(place, PictureRow):
            path = place / row.file
            if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_PICTURE_BYTES:
                found.append(Paragraph(f"The picture {row.file} of {row.method} is missing or too large.", "note"))
            else:
                found.append(Picture(path, row.alt, row.caption))
    return [Heading("Easy and hard rows"), *found] if found else []

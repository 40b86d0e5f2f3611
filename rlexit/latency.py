"""What a bench leaves behind: `latency.csv`, `bench.json`, `latency.svg`, and a table on the console."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from rlexit import checkpoint
from rlexit.bench import Contender, Dot, Timing
from rlexit.config import METHODS
from rlexit.contenders import LOOP, ORT, PREDICT
from rlexit.machine import describe
from rlexit.rows import LatencyRow, read_rows, write_rows
from rlexit.session import Session
from rlexit.summary import points


def keep(
    session: Session,
    folder: Path,
    contenders: Sequence[Contender],
    timings: Sequence[Timing],
    facts: dict[str, Any],
    label: str,
) -> Path:
    """Writes, draws and prints what was measured.

    Args:
        session: the run.
        folder: of the bench.
        contenders: who was timed.
        timings: of each.
        facts: what `bench.json` says besides; `mix` has the shares of the exits and where they are from.
        label: of the mix.
    Returns:
        Path of `latency.csv`.
    """
    task, machine = session.domain.task, describe(session.device)
    pairs = list(zip(contenders, timings, strict=True))
    rows = [
        LatencyRow(
            *(task, one.method, session.seed, one.label, one.batch),
            *(timing.p50, timing.p95, one.threads, one.runtime, machine),
        )
        for one, timing in pairs
    ]
    by_name = {(one.runtime, one.label, one.batch): timing for one, timing in pairs}
    table = Table(
        "runtime", "batch", "method", "leaving at", "p50 µs", "p95 µs", "mean µs", "p50 of repeats", "rows/s", "x full"
    )
    measured = []
    for one, timing in pairs:
        full = by_name.get((one.runtime, "full", one.batch))
        against = f"{timing.mean / full.mean:.2f}" if full else ""
        rate = one.batch / timing.mean * 1e6
        cells = (f"{timing.p50:.1f}", f"{timing.p95:.1f}", f"{timing.mean:.1f}", f"{timing.low:.0f}..{timing.high:.0f}")
        table.add_row(one.runtime, str(one.batch), one.method, one.label, *cells, f"{rate:,.0f}", against)
        names = {"runtime": one.runtime, "method": one.method, "label": one.label, "batch": one.batch}
        measured.append({**names, "threads": one.threads, **dataclasses.asdict(timing), "rows_per_second": rate})
    session.console.print(table)
    singles = {(runtime, name): timing for (runtime, name, batch), timing in by_name.items() if batch == 1}
    ratios = _ratios(singles, facts, contenders, label)
    session.console.print(_told(ratios, facts["mix"], label))
    path = folder / "latency.csv"
    write_rows(path, rows)
    written = json.dumps({**facts, "ratios": ratios, "measured": measured}, indent=2)
    checkpoint.write_atomic(folder / "bench.json", written.encode())
    if dots := _dots(session, pairs):
        # matplotlib is slow to import, and nobody else here draws.
        from rlexit import benchplot, plots

        plots.save(benchplot.latency(dots, session.domain.metric, task), folder, "latency")
    return path


def _dots(session: Session, pairs: Sequence[tuple[Contender, Timing]]) -> list[Dot]:
    """Single decisions of what was evaluated, with what it was worth."""
    folders = [session.teacher, *(session.method(name) for name in METHODS)]
    paths = [path for folder in folders if (path := folder / "eval" / "episodes.csv").is_file()]
    worth = {
        (point.method, point.label): point.value for point in points([row for path in paths for row in read_rows(path)])
    }
    dots = []
    for one, timing in pairs:
        value = worth.get((one.method, one.label))
        if one.batch == 1 and not one.runtime.endswith(LOOP) and value is not None:
            dots.append(Dot(one.method, one.label, one.runtime, timing.mean, value.mean, value.low, value.high))
    return dots


def _told(ratios: Mapping[str, Any], mix: Mapping[str, Any], label: str) -> str:
    """One line about the mix."""
    told = f"mix        {label} ({mix['source']}): "
    if not ratios:
        return told + "not compared, for no runtime timed both it and the full network"
    told += f"{ratios['speed_up']:.2f} times the speed of the full network"
    if "predicted" in ratios:
        told += f", its exits predict {ratios['predicted']:.2f}"
    if "over_predict" in ratios:
        told += f"; {ratios['over_predict']:.1f} times that of {PREDICT}"
    return f"{told} ({ratios['runtime']}, means)"


def _ratios(
    singles: Mapping[tuple[str, str], Timing], facts: Mapping[str, Any], contenders: Sequence[Contender], label: str
) -> dict[str, Any]:
    """Speed-ups of the mix: over the full network, what its single exits predict for it, and over SB3's `predict`.

    By onnxruntime, or the first runtime that timed both the mix and the full network; nothing where none did.
    """
    runtimes = (ORT, *(one.runtime for one in contenders if not one.runtime.endswith(LOOP)))
    base = next((name for name in runtimes if {(name, "full"), (name, label)} <= singles.keys()), None)
    if base is None:
        return {}
    full, mix = singles[base, "full"].mean, singles[base, label].mean
    found: dict[str, Any] = {"runtime": base, "speed_up": full / mix}
    shares = facts["mix"]["shares"]
    names = (*(f"exit {exit}" for exit in range(len(shares) - 1)), "nothing leaves")
    if all((base, name) in singles for share, name in zip(shares, names, strict=True) if share):
        spent = sum(share * singles[base, name].mean for share, name in zip(shares, names, strict=True) if share)
        found["predicted"] = full / spent
    if (PREDICT, label) in singles:
        found["over_predict"] = singles[PREDICT, label].mean / mix
    loop = base + LOOP
    if {(loop, "full"), (loop, label)} <= singles.keys():
        found["loop"] = singles[loop, "full"].mean / singles[loop, label].mean
    return found

"""The verbs of deployment: a run's networks exported to be served, and timed against each other."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from rlexit import checkpoint
from rlexit.bench import Contender, Dot, Timing, measure, mixed
from rlexit.config import METHODS
from rlexit.contenders import LOOP, ORT, PREDICT, RUNTIMES, Absent, Entry, batched, looping, single
from rlexit.domain import Publisher
from rlexit.evaluate import method_name
from rlexit.exit_policy import ExitPolicy
from rlexit.export import export, need
from rlexit.exported import BRANCHES
from rlexit.graphs import ExportError
from rlexit.heldout import held_out
from rlexit.machine import describe
from rlexit.network import StagedNetwork
from rlexit.registry import unknown
from rlexit.rows import LatencyRow, read_rows, write_rows
from rlexit.runfolder import environment, hold
from rlexit.runtime import run
from rlexit.session import (
    POLICY,
    TEACHER,
    Session,
    calibrated_policy,
    load_network,
    made,
    plain_teacher,
    weights_hash,
)
from rlexit.summary import points

FORMATS = ("onnx", "onnx-if", "sb3")
TEACHERS = "teacher"
# What a method without exits is called, which rows leave at the end alone: `full` is the teacher.
GATES = "gates"
# An exit with this threshold is built and nobody leaves there, whatever the rule.
NOBODY = 1e30
HELD_OUT = 2000
BATCHES = (64, 256)
# Calls per batch size and repeat.
CALLS = 5


def subject(session: Session, method: str, label: str | None) -> tuple[StagedNetwork, ExitPolicy]:
    """The network of a method, and one of its operating points.

    Args:
        session: the run.
        method: one of the config's methods, or `teacher`: the plain full network.
        label: a calibrated exit policy, `exit 0`, ..., `full`; or a static network's name; `gates` for a gated network
            without exits itself. None for the first of these that there is.
    Raises:
        CheckpointError: something is missing; names the verb that makes it.
        LookupError: nothing has that label.
    """
    if method == TEACHERS:
        session.domain.accept(made(session.teacher, TEACHER, "train"))
        network = plain_teacher(session).eval()
        return network, ExitPolicy.full(network.exits)
    if method not in METHODS:
        raise unknown("--method", method, (*METHODS, TEACHERS))
    networks = load_network(session, method)
    if METHODS[method].static:
        name = label or next(iter(networks))
        if name not in networks:
            raise unknown("--policy", name, networks)
        return networks[name], replace(ExitPolicy.full(1), label=name)
    network = networks[""]
    if label in (None, GATES) and not METHODS[method].exits:
        return network, replace(ExitPolicy.full(network.exits), label=GATES)
    plain = {one.label: one for one in (ExitPolicy.always(exit, network.exits) for exit in range(network.exits))}
    return network, plain[label] if label in plain else calibrated_policy(session, method, label)


def export_method(session: Session, method: str, kind: str, label: str | None, to: Path | None, count: int) -> Path:
    """Exports one network of a run under one exit policy, checked on held-out rows.

    Args:
        session: the run.
        method: see `subject`; `sb3` always exports the teacher.
        kind: `onnx`, `onnx-if` or `sb3`.
        label: see `subject`.
        to: folder, or for `sb3` the zip; by default in the method's folder.
        count: held-out rows for the check.
    Returns:
        What was written.
    Raises:
        ExportError: it cannot be exported, or acts otherwise; nothing is written then.
    """
    if kind not in FORMATS:
        raise unknown("--format", kind, FORMATS)
    if kind == "sb3":
        return _publish(session, to)
    need(kind)
    network, policy = subject(session, method, label)
    hold(session.root)
    folder = session.teacher if method == TEACHERS else session.method(method)
    target = to or folder / "export" / (_file_name(policy.label) + ("-if" if kind == "onnx-if" else ""))
    name = "" if method == TEACHERS else weights_hash(folder, POLICY)
    facts = {
        "task": session.domain.task,
        "method": method,
        "seed": session.seed,
        "protocol": session.domain.protocol(),
        "weights": {"teacher": weights_hash(session.teacher, TEACHER), "exits": name},
    }
    rows = held_out(session, network, policy, count)
    manifest = export(network, policy, rows, target, kind, facts)
    out, parity = session.console, manifest["parity"]
    for entry in manifest["stages"]:
        parts = [entry, *(entry[name] for name in BRANCHES if name in entry)]
        size = sum(part["bytes"] for part in parts) / 1e6
        gate = f", then the gate of {entry['gate']}" if "gate" in entry else ""
        out.print(f"export     {entry['file']:<14} {size:6.2f} MB{gate}")
    cost = ", ".join(f"exit {exit} {share:.3f}" for exit, share in manifest["relative_macs"].items())
    # Some of what is counted is not run for a row that skips units, or is not asked whether it repeats its answer.
    most = " at most" if network.gates or network.reuse is not None else ""
    out.print(f"export     relative_macs{most}: {cost}")
    out.print(
        f"parity     {parity['rows']} held-out rows: {parity['actions']} other actions, {parity['exits']} other exits"
        f" (at most {parity['furthest']:.1e} from the threshold), probabilities within {parity['answers']:.1e}"
    )
    if network.gates or network.reuse is not None:
        out.print(f"parity     {parity['gates']} with other gates, {parity['macs']} at another cost")
    if network.reuse is None and parity["rows"] < count:
        out.print(f"parity     fewer rows than the {count} asked for: there are no more of them")
    return target


def _publish(session: Session, to: Path | None) -> Path:
    if not isinstance(session.domain, Publisher):
        raise ExportError(f"`--format` sb3 is for policies, got {session.domain.task}. Use --format onnx.")
    session.domain.accept(made(session.teacher, TEACHER, "train"))
    hold(session.root)
    path = to or session.teacher / "export" / f"{_file_name(session.domain.task)}.zip"
    if path.is_dir():
        raise ExportError(f"`--to` must be a file for --format sb3, got the folder `{path}`. Name a zip in it.")
    session.domain.publish(session.teacher, path)
    return path


def _file_name(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.=-]+", "_", label).strip(".") or "policy"


# ---- bench ----


def bench(
    session: Session,
    method: str,
    label: str | None,
    count: int,
    repeats: int,
    runtimes: Sequence[str] = tuple(RUNTIMES),
    batches: Sequence[int] = BATCHES,
) -> Path:
    """Times decisions: the plain network, every exit, the mix of exits that was evaluated, and small static networks.

    Single decisions run on one thread, alone and in the loop with the world where the domain has one; batches on all
    the threads that torch has.

    Args:
        session: the run.
        method: with exits.
        label: of the exit policy whose mix is timed; see `subject`.
        count: decisions per contender and repeat.
        repeats: contenders take turns so often.
        runtimes: of `RUNTIMES`; one that cannot take part is told with the reason.
        batches: rows per call, besides single ones.
    Returns:
        Path of `latency.csv`; beside it `bench.json` has means, spreads, exit shares, load and versions, and
        `latency.svg` sets latency against the metric where the run was evaluated.
    Raises:
        LookupError: a runtime is unknown.
    """
    if method == TEACHERS or (method in METHODS and METHODS[method].static):
        raise ExportError(f"`--method` must be one with exits, got {method}. Use --methods ztw.")
    for name in runtimes:
        if name not in RUNTIMES:
            raise unknown("--runtimes", name, RUNTIMES)
    network, policy = subject(session, method, label)
    hold(session.root)
    held = held_out(session, network, policy, max((HELD_OUT, *batches)))
    if network.reuse is not None:  # a row is timed by itself, as one that computes
        held = held.flatten(0, 1)
    left = np.concatenate([run(network, policy, part).exits.numpy() for part in held.split(256)])
    shares, source = _recorded_mix(session, method, policy)
    if not shares:
        shares, source = [float((left == exit).mean()) for exit in range(network.exits)], "held-out rows"
    taken = [mixed(left, shares, max(count, CALLS * size), seed=index) for index, size in enumerate((1, *batches))]
    rows = held.numpy()[taken[0][:count]]
    stacks = [
        held.numpy()[part[: CALLS * size]].reshape(CALLS, size, *held.shape[1:])
        for part, size in zip(taken[1:], batches, strict=True)
    ]
    entries = _entries(session, method, network, policy)
    absent: dict[str, str] = {}
    contenders: list[Contender] = []
    timings: list[Timing] = []
    threads, load = torch.get_num_threads(), os.getloadavg()
    with ExitStack() as worlds:

        def gather(make: Callable[[str], list[Contender]]) -> list[Contender]:
            found: list[Contender] = []
            for name in runtimes:
                try:
                    found += make(name) if name not in absent else []
                except Absent as reason:
                    absent[name] = str(reason)
            return found

        torch.set_num_threads(1)
        try:
            domain = session.domain
            alone = gather(lambda name: single(name, entries, domain, rows))
            alone += gather(lambda name: looping(name, entries, domain, rows, worlds))
            contenders, timings = [*alone], measure(alone, repeats)
            torch.set_num_threads(threads)
            for stack, size in zip(stacks, batches, strict=True):
                group = gather(partial(batched, entries=entries, domain=domain, rows=stack, size=size, threads=threads))
                contenders, timings = contenders + group, timings + measure(group, repeats)
        finally:
            torch.set_num_threads(threads)
    if not contenders:
        raise ExportError(f"`--runtimes` must name one that is here, got {absent}. Install an extra, or name others.")
    for name, reason in absent.items():
        session.console.print(f"bench      {RUNTIMES[name]}: not measured ({reason})")
    folder = session.method(method) / "bench"
    facts = {"repeats": repeats, "rows": count, "load_before": load, "load_after": os.getloadavg(), "absent": absent}
    facts |= {"mix": {"policy": policy.label, "shares": shares, "source": source}, "made": environment()}
    return _keep(session, folder, contenders, timings, facts, policy.label)


def _entries(session: Session, method: str, network: StagedNetwork, policy: ExitPolicy) -> list[Entry]:
    """The full network, the mix, every exit, and the static networks of this run and seed."""
    teacher, whole = subject(session, TEACHERS, None)
    found = [Entry(TEACHERS, "full", teacher, whole), Entry(method, policy.label, network, policy, mix=True)]
    for exit in range(network.exits if network.exits > 1 else 0):
        limits = [-math.inf if early == exit else NOBODY for early in range(network.exits - 1)]
        name = f"exit {exit}" if exit < network.exits - 1 else "nothing leaves"
        if name != policy.label:
            found.append(Entry(method, name, network, ExitPolicy(policy.rule, tuple(limits), name)))
    done = "static" in METHODS and checkpoint.exists(session.method("static"), POLICY)
    for name, small in (load_network(session, "static") if done else {}).items():
        found.append(Entry("static", name, small, ExitPolicy.full(1)))
    return found


def _recorded_mix(session: Session, method: str, policy: ExitPolicy) -> tuple[list[float], str]:
    """Shares of the exits over the decisions of all test episodes under a policy; () where none was played."""
    path = session.method(method) / "eval" / "episodes.csv"
    name = method_name(method, policy.rule)
    played = [
        row
        for row in (read_rows(path) if path.exists() else [])
        if row.split == "test" and (row.method, row.label, row.thresholds) == (name, policy.label, policy.thresholds)
    ]
    if not played:
        return [], ""
    total = sum(row.decisions for row in played)
    shares = np.sum([np.multiply(row.exit_fractions, row.decisions / total) for row in played], axis=0)
    return [float(share) for share in shares], f"{len(played)} test episodes"


def _keep(
    session: Session,
    folder: Path,
    contenders: Sequence[Contender],
    timings: Sequence[Timing],
    facts: dict[str, Any],
    label: str,
) -> Path:
    """Writes, draws and prints what was measured."""
    task, machine = session.domain.task, describe()
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
    base = ORT if (ORT, "full") in singles else contenders[0].runtime
    ratios = _ratios(singles, facts, base, label)
    told = (
        f"mix        {label} ({facts['mix']['source']}): {ratios['speed_up']:.2f} times the speed of the full network"
    )
    if "predicted" in ratios:
        told += f", its exits predict {ratios['predicted']:.2f}"
    if "over_predict" in ratios:
        told += f"; {ratios['over_predict']:.1f} times that of {PREDICT}"
    session.console.print(f"{told} ({base}, means)")
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


def _ratios(
    singles: Mapping[tuple[str, str], Timing], facts: dict[str, Any], base: str, label: str
) -> dict[str, float]:
    """Speed-ups of the mix: over the full network, what its single exits predict for it, and over SB3's `predict`."""
    full, mix = singles[base, "full"].mean, singles[base, label].mean
    found = {"speed_up": full / mix}
    shares = facts["mix"]["shares"]
    names = [*(f"exit {exit}" for exit in range(len(shares) - 1)), "nothing leaves"]
    if all((base, name) in singles for share, name in zip(shares, names, strict=True) if share):
        spent = sum(share * singles[base, name].mean for share, name in zip(shares, names, strict=True) if share)
        found["predicted"] = full / spent
    if (PREDICT, label) in singles:
        found["over_predict"] = singles[PREDICT, label].mean / mix
    loop = base + LOOP
    if (loop, label) in singles:
        found["loop"] = singles[loop, "full"].mean / singles[loop, label].mean
    return found

"""The verbs of deployment: a run's networks exported to be served, and timed against each other."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from rlexit import checkpoint
from rlexit.bench import Contender, Timing, measure, mixed
from rlexit.config import METHODS
from rlexit.contenders import RUNTIMES, Absent, Entry, Lineup, batched, exits_of, looping, single
from rlexit.domain import Publisher
from rlexit.evaluate import method_name
from rlexit.exit_policy import ExitPolicy
from rlexit.export import export, need
from rlexit.exported import BRANCHES
from rlexit.graphs import ExportError
from rlexit.heldout import WORLDS, held_out
from rlexit.latency import keep
from rlexit.network import StagedNetwork
from rlexit.registry import unknown
from rlexit.rows import read_rows
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

FORMATS = ("onnx", "onnx-if", "sb3")
TEACHERS = "teacher"
# What a method without exits is called, which rows leave at the end alone: `full` is the teacher.
GATES = "gates"
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
    # Some of what is counted is not run for a row that skips units, or is not asked whether it repeats its answer.
    varies = network.gates or network.reuse is not None
    out.print(f"export     relative_macs{' at most' if varies else ''}: {_by_exit(manifest['relative_macs'], network)}")
    if varies:
        out.print(f"export     relative_macs of the checked rows: {_by_exit(manifest['relative_macs_mean'], network)}")
    out.print(
        f"parity     {parity['rows']} held-out rows: {parity['actions']} other actions, {parity['exits']} other exits"
        f" (at most {parity['furthest']:.1e} from the threshold), probabilities within {parity['answers']:.1e}"
    )
    if varies:
        out.print(f"parity     {parity['gates']} with other gates, {parity['macs']} at another cost")
    if parity["rows"] < count:
        why = "there are no more of them" if network.reuse is None else f"whole steps of {WORLDS} games make so many"
        out.print(f"parity     fewer rows than the {count} asked for: {why}")
    return target


def _by_exit(shares: Mapping[str, float], network: StagedNetwork) -> str:
    names = {str(network.exits): "repeated"}
    return ", ".join(f"{names.get(exit, f'exit {exit}')} {share:.3f}" for exit, share in shares.items())


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
    steps = held if network.reuse is not None else None
    if steps is not None:  # outside the loop a row is timed by itself, as one that computes
        held = steps.flatten(0, 1)
    left = np.concatenate([run(network, policy, part).exits.numpy() for part in held.split(256)])
    shares, source = _recorded_mix(session, method, policy, network.exits)
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
    missing: dict[tuple[str, str, str], list[str]] = {}
    contenders: list[Contender] = []
    timings: list[Timing] = []
    threads, load = torch.get_num_threads(), os.getloadavg()
    with ExitStack() as worlds:

        def gather(make: Callable[[str], Lineup]) -> list[Contender]:
            found: list[Contender] = []
            for name in (one for one in runtimes if one not in absent):
                try:
                    lineup = make(name)
                except Absent as reason:
                    absent[name] = str(reason)
                    continue
                found += lineup.contenders
                for (owner, point), why in lineup.missing.items():
                    labels = missing.setdefault((name, owner, why), [])
                    labels += [point] if point not in labels else []
            return found

        torch.set_num_threads(1)
        try:
            domain, place = session.domain, session.device
            alone = gather(lambda name: single(name, entries, domain, rows, place))
            alone += gather(lambda name: looping(name, entries, domain, rows, worlds, place, steps))
            contenders, timings = [*alone], measure(alone, repeats)
            torch.set_num_threads(threads)
            for stack, size in zip(stacks, batches, strict=True):
                group = gather(
                    partial(
                        batched, entries=entries, domain=domain, rows=stack, size=size, threads=threads, device=place
                    )
                )
                contenders, timings = contenders + group, timings + measure(group, repeats)
        finally:
            torch.set_num_threads(threads)
    if not contenders:
        raise ExportError(f"`--runtimes` must name one that is here, got {absent}. Install an extra, or name others.")
    for name, reason in absent.items():
        session.console.print(f"bench      {RUNTIMES[name]}: not measured ({reason})")
    for (name, owner, reason), labels in missing.items():
        session.console.print(f"bench      {RUNTIMES[name]}, {owner} {', '.join(labels)}: not measured ({reason})")
    folder = session.method(method) / "bench"
    facts = {"repeats": repeats, "rows": count, "load_before": load, "load_after": os.getloadavg(), "absent": absent}
    facts["missing"] = [
        {"runtime": RUNTIMES[name], "method": owner, "labels": labels, "reason": reason}
        for (name, owner, reason), labels in missing.items()
    ]
    facts |= {"mix": {"policy": policy.label, "shares": shares, "source": source}, "made": environment()}
    return keep(session, folder, contenders, timings, facts, policy.label)


def _entries(session: Session, method: str, network: StagedNetwork, policy: ExitPolicy) -> list[Entry]:
    """The full network, the mix, every exit, and the static networks of this run and seed."""
    teacher, whole = subject(session, TEACHERS, None)
    found = [Entry(TEACHERS, "full", teacher, whole), Entry(method, policy.label, network, policy, mix=True)]
    found += exits_of(method, network, policy)
    done = "static" in METHODS and checkpoint.exists(session.method("static"), POLICY)
    for name, small in (load_network(session, "static") if done else {}).items():
        found.append(Entry("static", name, small, ExitPolicy.full(1)))
    return found


def _recorded_mix(session: Session, method: str, policy: ExitPolicy, exits: int) -> tuple[list[float], str]:
    """Shares of the exits over the decisions of all test episodes under a policy, those that repeated an answer left out.

    Nothing, and no words, where none was played.
    """
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
    source = f"{len(played)} test episodes"
    if len(shares) > exits:
        source += f", without the {shares[exits]:.0%} of decisions that repeat an answer"
        shares = shares[:exits] / shares[:exits].sum()
    return [float(share) for share in shares], source

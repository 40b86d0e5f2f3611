"""The verbs of deployment: a run's networks exported to be served, and timed against each other."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from rlexit import checkpoint
from rlexit.bench import Contender, Timing, measure, mixed
from rlexit.config import METHODS
from rlexit.domain import Publisher
from rlexit.evaluate import method_name
from rlexit.exit_policy import ExitPolicy
from rlexit.export import export, need, server_of
from rlexit.graphs import ExportError
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

FORMATS = ("onnx", "onnx-if", "sb3")
TEACHERS = "teacher"
EAGER, PREDICT, ORT = "torch eager", "sb3 predict", "onnxruntime"
# An exit with this threshold is built and nobody leaves there, whatever the rule.
NOBODY = 1e30
HELD_OUT = 2000


def subject(session: Session, method: str, label: str | None) -> tuple[StagedNetwork, ExitPolicy]:
    """The network of a method, and one of its operating points.

    Args:
        session: the run.
        method: one of the config's methods, or `teacher`: the plain full network.
        label: a calibrated exit policy, `exit 0`, ..., `full`; or a static network's name. None for the first.
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
    rows = _rows(session, network, policy, count)
    manifest = export(network, policy, rows, target, kind, facts)
    out, parity = session.console, manifest["parity"]
    for entry in manifest["stages"]:
        out.print(f"export     {entry['file']:<14} {entry['bytes'] / 1e6:6.2f} MB")
    cost = ", ".join(f"exit {exit} {share:.3f}" for exit, share in manifest["relative_macs"].items())
    out.print(f"export     relative_macs: {cost}")
    out.print(
        f"parity     {parity['rows']} held-out rows: {parity['actions']} other actions, {parity['exits']} other exits"
        f" (at most {parity['furthest']:.1e} from the threshold), probabilities within {parity['answers']:.1e}"
    )
    if parity["rows"] < count:
        out.print(f"parity     fewer rows than the {count} asked for: the calibration games were over")
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


def _rows(session: Session, network: StagedNetwork, policy: ExitPolicy, count: int) -> Tensor:
    """Held-out rows met under a policy; if its games are over too soon, others of the full network."""
    with session.watch("held-out", "rows") as watch:
        rows = session.domain.rows(network, policy, count, watch)
        if len(rows) < count:
            more = session.domain.rows(network, ExitPolicy.full(network.exits), count - len(rows), watch)
            rows = torch.cat([rows, more[: count - len(rows)]])
    return rows


# ---- bench ----


def bench(session: Session, method: str, label: str | None, count: int, repeats: int) -> Path:
    """Times single decisions on one thread: the plain network, every exit, and the mix of exits that was evaluated.

    Args:
        session: the run.
        method: with exits.
        label: of the exit policy whose mix is timed; see `subject`.
        count: decisions per contender and repeat.
        repeats: contenders take turns so often.
    Returns:
        Path of `latency.csv`; `bench.json` beside it has means, spreads, exit shares, load and versions.
    """
    if method == TEACHERS or (method in METHODS and METHODS[method].static):
        raise ExportError(f"`--method` must be one with exits, got {method}. Use --methods ztw.")
    network, policy = subject(session, method, label)
    teacher, whole = subject(session, TEACHERS, None)
    hold(session.root)
    held = _rows(session, network, policy, HELD_OUT)
    left = np.concatenate([run(network, policy, part).exits.numpy() for part in held.split(256)])
    shares, source = _recorded_mix(session, method, policy)
    if not shares:
        shares, source = [float((left == exit).mean()) for exit in range(network.exits)], "held-out rows"
    rows = held.numpy()[mixed(left, shares, count)]
    operating: dict[str, ExitPolicy] = {}
    for exit in range(network.exits):
        limits = [-math.inf if early == exit else NOBODY for early in range(network.exits - 1)]
        name = f"exit {exit}" if exit < network.exits - 1 else "nothing leaves"
        operating[name] = ExitPolicy(policy.rule, tuple(limits), name)
    operating.pop(policy.label, None)
    operating[policy.label] = policy  # the last one is that whose mix is timed
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        contenders = _eager(session, method, network, operating, teacher, whole, rows)
        if util.find_spec("onnxruntime") is not None and util.find_spec("onnx") is not None:
            contenders += _served(session, method, network, operating, teacher, whole, rows)
        else:
            session.console.print("bench      no onnxruntime rows: pip install 'rlexit[export]'")
        load = os.getloadavg()
        timings = measure(contenders, repeats)
    finally:
        torch.set_num_threads(threads)
    folder = session.method(method) / "bench"
    facts = {"repeats": repeats, "rows": count, "load_before": load, "load_after": os.getloadavg()}
    facts |= {"mix": {"policy": policy.label, "shares": shares, "source": source}, "made": environment()}
    return _keep(session, folder, contenders, timings, facts, policy.label)


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


def _eager(
    session: Session,
    method: str,
    network: StagedNetwork,
    operating: dict[str, ExitPolicy],
    teacher: StagedNetwork,
    whole: ExitPolicy,
    rows: np.ndarray,
) -> list[Contender]:
    def ask(asked: StagedNetwork, policy: ExitPolicy) -> Callable[[np.ndarray], object]:
        return lambda row: run(asked, policy, torch.from_numpy(row)[None]).answers.argmax(dim=1).item()

    found = [Contender(TEACHERS, "full", EAGER, ask(teacher, whole), rows)]
    found += [Contender(method, name, EAGER, ask(network, policy), rows) for name, policy in operating.items()]
    for name, small in _small(session).items():
        found.append(Contender("static", name, EAGER, ask(small, ExitPolicy.full(1)), rows))
    if isinstance(session.domain, Publisher):
        policy = list(operating.values())[-1]
        for which, asked, under in ((TEACHERS, teacher, whole), (method, network, policy)):
            found.append(Contender(which, under.label, PREDICT, session.domain.predictor(asked, under), rows))
    return found


def _served(
    session: Session,
    method: str,
    network: StagedNetwork,
    operating: dict[str, ExitPolicy],
    teacher: StagedNetwork,
    whole: ExitPolicy,
    rows: np.ndarray,
) -> list[Contender]:
    checked = torch.from_numpy(rows)
    found = [Contender(TEACHERS, "full", ORT, server_of(teacher, whole, checked).act, rows)]
    policy = list(operating.values())[-1]
    server = server_of(network, policy, checked)
    open_exits = {stage.exit for stage in server.stages}
    for name, point in operating.items():
        # An exit that the policy closes has no stage of its own to leave after.
        if name.startswith("exit ") and int(name[5:]) not in open_exits:
            continue
        found.append(Contender(method, name, ORT, server.with_thresholds(point.thresholds).act, rows))
    for name, small in _small(session).items():
        found.append(Contender("static", name, ORT, server_of(small, ExitPolicy.full(1), checked).act, rows))
    return found


def _small(session: Session) -> dict[str, StagedNetwork]:
    """The distilled static networks of this run and seed, if there are any."""
    done = "static" in METHODS and checkpoint.exists(session.method("static"), POLICY)
    return load_network(session, "static") if done else {}


def _keep(
    session: Session,
    folder: Path,
    contenders: Sequence[Contender],
    timings: Sequence[Timing],
    facts: dict[str, Any],
    label: str,
) -> Path:
    """Writes and prints what was measured."""
    task, machine = session.domain.task, describe()
    rows = [
        LatencyRow(task, one.method, session.seed, one.label, 1, timing.p50, timing.p95, 1, one.runtime, machine)
        for one, timing in zip(contenders, timings, strict=True)
    ]
    by_name = {(one.runtime, one.label): timing for one, timing in zip(contenders, timings, strict=True)}
    base = ORT if (ORT, "full") in by_name else EAGER
    full = by_name[base, "full"]
    table = Table("runtime", "method", "leaving at", "p50 µs", "p95 µs", "mean µs", "p50 of repeats", f"x {base} full")
    measured = []
    for one, timing in zip(contenders, timings, strict=True):
        spread = f"{timing.low:.0f}..{timing.high:.0f}"
        cells = (f"{timing.p50:.1f}", f"{timing.p95:.1f}", f"{timing.mean:.1f}", spread, f"{timing.p50 / full.p50:.2f}")
        table.add_row(one.runtime, one.method, one.label, *cells)
        names = {"runtime": one.runtime, "method": one.method, "label": one.label}
        measured.append({**names, **dataclasses.asdict(timing)})
    session.console.print(table)
    mix = {"speed_up": full.mean / by_name[base, label].mean, **_expected(by_name, facts, base)}
    told = f"mix        {label} ({facts['mix']['source']}): {mix['speed_up']:.2f} times the speed of the full network"
    if "predicted" in mix:
        told += f", its exits predict {mix['predicted']:.2f}"
    if (PREDICT, label) in by_name:
        mix["over_predict"] = by_name[PREDICT, label].mean / by_name[base, label].mean
        told += f"; {mix['over_predict']:.1f} times that of {PREDICT}"
    session.console.print(f"{told} ({base}, means)")
    path = folder / "latency.csv"
    write_rows(path, rows)
    checkpoint.write_atomic(
        folder / "bench.json", json.dumps({**facts, "ratios": mix, "measured": measured}, indent=2).encode()
    )
    return path


def _expected(by_name: dict[tuple[str, str], Timing], facts: dict[str, Any], base: str) -> dict[str, float]:
    """The speed-up that the times of the single exits predict for the mix; {} where one was not timed."""
    shares = facts["mix"]["shares"]
    names = [*(f"exit {exit}" for exit in range(len(shares) - 1)), "nothing leaves"]
    if any(share and (base, name) not in by_name for share, name in zip(shares, names, strict=True)):
        return {}
    spent = sum(share * by_name[base, name].mean for share, name in zip(shares, names, strict=True) if share)
    return {"predicted": by_name[base, "full"].mean / spent}

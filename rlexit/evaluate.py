"""Evaluation: exit policies and seeds in, one row per episode out; latency of single decisions."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlexit.checkpoint import canonical_json, write_atomic
from rlexit.config import require
from rlexit.costs import CostTable, cost_table
from rlexit.domain import Domain, Played, Progress, Split, Watch
from rlexit.exit_policy import ExitPolicy
from rlexit.interrupts import Stopped
from rlexit.machine import describe
from rlexit.network import StagedNetwork
from rlexit.rows import LatencyRow, Row, append_rows, read_rows, write_rows
from rlexit.runtime import run

# Calls per batch size: a call is long, and its median settles early.
BATCH_CALLS = 7


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Args:
        method: as tables call it.
        run_seed: of its training.
        network: None for a random actor.
        policies: operating points; labels are unique.
        full_macs: of the full, head-free network that `relative_macs` is relative to.
    """

    method: str
    run_seed: int
    network: StagedNetwork | None
    policies: Sequence[ExitPolicy]
    full_macs: int


def method_name(method: str, rule: str) -> str:
    """What a method is called under a rule: patience on SDN's exits is PBEE."""
    return "pbee" if (method, rule) == ("sdn", "patience") else method


def evaluate(
    domain: Domain, subject: Subject, episodes: int, split: Split, path: Path, steps: Path | None, watch: Watch
) -> list[Row]:
    """Plays every operating point for the same episodes and writes one row per episode to `path`.

    Rows are appended as episodes end, so a killed evaluation goes on where it was; at the end they are sorted, so the
    file is the same whatever happened in between. Several subjects may share a file.

    Args:
        domain: plays.
        subject: what is evaluated.
        episodes: per operating point, the same seeds for all.
        split: calibration or test.
        path: of the CSV file.
        steps: folder for the recorded steps of the first episode of calibrated policies, or None.
        watch: stop and progress.
    Returns:
        All rows of this split in the file.
    Raises:
        Stopped: `watch` says so; the episodes that ended are in the file.
    """
    known = read_rows(path) if path.exists() else []
    found, others = ([row for row in known if (row.split == split) is mine] for mine in (True, False))
    done = {(row.method, row.label, row.run_seed, row.episode) for row in found}
    rules = list(dict.fromkeys(policy.rule for policy in subject.policies))
    total = len(subject.policies) * episodes
    counted = sum(
        (method_name(subject.method, policy.rule), policy.label, subject.run_seed, episode) in done
        for policy in subject.policies
        for episode in range(episodes)
    )
    for rule in rules:
        policies = [policy for policy in subject.policies if policy.rule == rule]
        # Recorded games come first, so that a picture of an episode exists early.
        policies.sort(key=lambda policy: not policy.provenance)
        name = method_name(subject.method, rule)
        jobs = [
            (index, episode)
            for episode in range(episodes)
            for index, policy in enumerate(policies)
            if (name, policy.label, subject.run_seed, episode) not in done
        ]
        if not jobs:
            continue
        recorded = [episode == 0 and bool(policies[index].provenance) for index, episode in jobs]
        record = sum(recorded) if steps is not None else 0
        inner = replace(watch, progress=_shifted(watch, counted, total))
        for played in domain.play(subject.network, policies, jobs, split, record, inner):
            row = _row(domain, subject, policies[played.policy], played, split)
            # Before the row: an episode whose row is there is never played again.
            if steps is not None and played.steps:
                _save_steps(steps / f"steps_{name}_{row.label}_{played.episode}.npz", played)
            append_rows(path, [row])
            found.append(row)
            counted += 1
    if counted < total:  # a domain ends its playing early only when it is told to
        raise Stopped
    found.sort(key=lambda row: (row.task, row.method, row.run_seed, row.rule, row.label, row.episode))
    if found:
        write_rows(path, others + found)
    return found


def budgeted(domain: Domain, network: StagedNetwork) -> list[ExitPolicy]:
    """An exit policy for every hard budget of the config: rows go on while they can afford it.

    Args:
        domain: with its config.
        network: with early exits; none without.
    Raises:
        ValueError: the domain has no labelled set, or a budget does not pay for the first exit with every gate open.
    """
    shares = domain.config.evaluate.hard_budgets
    if network.exits == 1 or not shares:
        return []
    if domain.metric != "accuracy":
        raise ValueError(f"`evaluate.hard_budgets` must be of a labelled set, got {domain.task}. Leave them out.")
    costs = cost_table(network, domain.example())
    found = []
    for share in shares:
        label = f"budget={share:g}"
        # What gates let a row skip is not known beforehand, and in the middle of a set it is too late for an error.
        first = costs.relative(costs.exits[0])
        advice = "The first exit costs as much where every gate is open. Ask for more, or put an exit earlier."
        budget = int(share * costs.full)
        require(budget >= costs.exits[0], "evaluate.hard_budgets", f"be at least {first:.4g}", share, advice)
        whole = ExitPolicy.full(network.exits)
        found.append(replace(whole, label=label, provenance={"target": label}, budget=budget))
    return found


def _shifted(watch: Watch, before: int, total: int) -> Progress:
    """Progress of a part told as progress of the whole."""

    def tell(done: int, part: int, facts: dict[str, float]) -> None:
        watch.progress(before + done, total, facts)

    return tell


def _row(domain: Domain, subject: Subject, policy: ExitPolicy, played: Played, split: Split) -> Row:
    settings = domain.config.evaluate
    random = subject.network is None
    mean = played.macs / played.decisions
    fractions = tuple(float(count) / played.decisions for count in played.exits)
    return Row(
        task=domain.task,
        method=method_name(subject.method, policy.rule),
        run_seed=subject.run_seed,
        label=policy.label,
        rule="" if random else policy.rule,
        thresholds=policy.thresholds,
        target=str(policy.provenance.get("target", "")),
        execution=settings.execution,
        actions="sampled" if random else settings.actions,
        split=split,
        episode=played.episode,
        episode_seed=played.seed,
        metric=domain.metric,
        value=played.value,
        decisions=played.decisions,
        macs_mean=mean,
        relative_macs=mean / subject.full_macs,
        exit_fractions=fractions if len(fractions) > 1 else (),
        protocol=canonical_json(domain.protocol()),
    )


def _save_steps(path: Path, played: Played) -> None:
    packed = io.BytesIO()
    arrays = {name: np.asarray(values) for name, values in played.steps.items()}
    np.savez_compressed(packed, **arrays)  # type: ignore[arg-type]
    write_atomic(path, packed.getvalue())


def time_calls(call: Callable[[Tensor], object], inputs: Sequence[Tensor], warm_up: int = 20) -> tuple[float, float]:
    """Times calls; returns p50 and p95 in microseconds.

    Args:
        call: takes one of the inputs.
        inputs: each is timed once, after the first `warm_up` of them were run untimed.
        warm_up: calls before.
    """
    for rows in inputs[:warm_up]:
        call(rows)
    seconds: list[float] = []
    for rows in inputs:
        began = time.perf_counter()
        call(rows)
        seconds.append(time.perf_counter() - began)
    p50, p95 = np.percentile(seconds, [50, 95]) * 1e6
    return float(p50), float(p95)


def latencies(
    domain: Domain, subject: Subject, inputs: Tensor, count: int, batches: Sequence[int] = ()
) -> Iterator[LatencyRow]:
    """Measures single decisions of every operating point on one thread, and larger batches on all of them.

    Batches are timed for exit policies that were calibrated and where nobody leaves early, not for whole grids; the single
    decisions of a point come last.

    Args:
        domain: names the task.
        subject: with a network.
        inputs: (N, ...), from calibration seeds.
        count: of single decisions that are timed per operating point, spread over the inputs.
        batches: rows per call; one that is larger than N is left out.
    """
    network = subject.network
    if network is None:
        return
    threads = torch.get_num_threads()
    single = inputs[torch.linspace(0, len(inputs) - 1, min(count, len(inputs))).long()][:, None].unbind()
    for policy in subject.policies:
        name = method_name(subject.method, policy.rule)
        place = (domain.task, name, subject.run_seed, policy.label)
        for batch in batches if policy.provenance or all(limit == math.inf for limit in policy.thresholds) else ():
            if batch > len(inputs):
                continue
            step = len(inputs) // batch
            calls = [inputs[call % step :: step][:batch] for call in range(BATCH_CALLS)]
            p50, p95 = time_calls(partial(run, network, policy), calls, warm_up=2)
            yield LatencyRow(*place, batch, p50, p95, threads, "torch eager", describe())
        torch.set_num_threads(1)
        try:
            p50, p95 = time_calls(partial(run, network, policy), single)
        finally:
            torch.set_num_threads(threads)
        yield LatencyRow(*place, 1, p50, p95, 1, "torch eager", describe())


def exit_costs(network: StagedNetwork, costs: CostTable) -> list[tuple[str, int, float]]:
    """(exit name, MACs, relative MACs) of leaving at every exit, for the table printed before a run."""
    return [(name, macs, costs.relative(macs)) for name, macs in zip(network.exit_names, costs.exits, strict=True)]

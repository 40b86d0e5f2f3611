"""The verb distill where a method has gates: trunk and gates learn together; controls take another method's rates."""

from __future__ import annotations

from typing import Any

import torch

from rlexit import checkpoint
from rlexit.config import METHODS
from rlexit.domain import Gating, Watch
from rlexit.exit_policy import ExitPolicy
from rlexit.network import StagedNetwork
from rlexit.runtime import run
from rlexit.session import POLICY, TEACHER, Session, learnt, load_network, made, networks_of

RATE_ROWS = 2000
CHUNK = 256


def learn_gates(session: Session, method: str) -> None:
    """Trains the gates of one method together with a copy of the teacher.

    Raises:
        CheckpointError: the teacher, or the method whose rates are repeated, is missing.
        ValueError: the domain has no gates to train.
    """
    domain, kind = session.domain, METHODS[method]
    if not isinstance(domain, Gating):
        raise ValueError(
            f"`--methods` must be of exits for {domain.task}, got {method}, which has gates. Refine instead."
        )
    domain.accept(made(session.teacher, TEACHER, "train"))
    if kind.rates_of:
        made(session.method(kind.rates_of), POLICY, "distill")
    stage, folder = session.stage("distill", method), session.method(method)
    torch.manual_seed(session.seed)
    network = networks_of(session, method)[""]
    if not session.begin(stage):
        session.console.print(f"distill    done already  {folder}")
        return
    if kind.rates_of:
        source = load_network(session, kind.rates_of)[""]
        rows = domain.rows(source, ExitPolicy.full(source.exits), RATE_ROWS, Watch(session.stop))
        repeat_rates(network, open_rates(source, rows))
    with session.watch(f"distill {method}", "samples") as watch:
        facts = domain.learn_gates(network, session.teacher, kind, folder, session.seed, watch)
    tensors = {f"/{key}": value for key, value in learnt(session, network, method).items()}
    checkpoint.save(folder, POLICY, tensors, {"method": method, "seed": session.seed, "curves": facts})
    stage.finish(facts)


def open_rates(network: StagedNetwork, inputs: Any) -> dict[str, torch.Tensor]:
    """Share of rows for which each deciding gate is open, and then of each of its channels, by unit name.

    Args:
        network: in evaluation mode; asked greedily, nobody leaving early.
        inputs: (N, ...) raw inputs.
    """
    whole = ExitPolicy.full(network.exits)
    found: dict[str, list[torch.Tensor]] = {}
    for rows in inputs.split(CHUNK):
        result = run(network, whole, rows)
        for name, (_, decision) in zip(network.gates, result.decisions, strict=True):
            if network.gates[name].decides:
                parts = [(decision.action > 0).float()[:, None]]
                parts += [] if decision.channels is None else [decision.channels]
                found.setdefault(name, []).append(torch.cat(parts, dim=1))
    return {name: torch.cat(parts).mean(dim=0) for name, parts in found.items()}


def repeat_rates(network: StagedNetwork, rates: dict[str, torch.Tensor]) -> None:
    """Gives `random` gates the measured shares.

    Raises:
        ValueError: a gate has no share, or of other channels.
    """
    for name, gate in network.gates.items():
        if not gate.decides:
            continue
        if name not in rates or rates[name].shape != gate.rates.shape:
            raise ValueError(
                f"`gates` must stand where those stand whose rates they repeat, got one at {name!r} alone."
            )
        gate.load_state_dict({"rates": rates[name]})

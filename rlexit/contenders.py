"""Who takes part in `rlexit bench`: every way to run the networks of a run, alone, in batches, and in its control loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import util

import numpy as np
import torch

from rlexit.backends import EXTRAS, one_line
from rlexit.bench import Contender
from rlexit.domain import Domain, Looping, Publisher
from rlexit.exit_policy import ExitPolicy
from rlexit.export import server_of
from rlexit.graphs import ExportError
from rlexit.network import StagedNetwork
from rlexit.registry import unknown
from rlexit.runtime import run
from rlexit.serve import Server

EAGER, COMPILED, PREDICT, ORT, OPENVINO = "torch eager", "torch compiled", "sb3 predict", "onnxruntime", "openvino"
RUNTIMES = {"eager": EAGER, "compiled": COMPILED, "predict": PREDICT, "onnxruntime": ORT, "openvino": OPENVINO}
FULL, LOOP = "full", ", whole loop"
# One observation (...), or a batch of them, to an action or actions.
Decide = Callable[[np.ndarray], object]
Key = tuple[str, str]


class Absent(Exception):
    """A runtime cannot take part; the message says why."""


@dataclass(frozen=True)
class Entry:
    """A network under an exit policy: what one line of the table is about.

    Args:
        method: as in `rlexit.rows.Row`.
        label: as there; unique within a method.
        network: in evaluation mode.
        policy: how it is left.
        mix: whether it is the one whose mix of exits is timed.
    """

    method: str
    label: str
    network: StagedNetwork
    policy: ExitPolicy
    mix: bool = False

    @property
    def key(self) -> Key:
        """Method and label."""
        return self.method, self.label


def single(runtime: str, entries: Sequence[Entry], domain: Domain, rows: np.ndarray) -> list[Contender]:
    """One decision after the other.

    Args:
        runtime: of `RUNTIMES`.
        entries: what takes part; `predict` times the full network and the mix only.
        domain: the task.
        rows: (N, ...) observations.
    Raises:
        Absent: the runtime cannot take part.
    """
    shown = _shown(runtime, entries)
    deciders = _deciders(runtime, shown, domain, rows)
    return [
        Contender(one.method, one.label, RUNTIMES[runtime], decide, rows)
        for one in shown
        if (decide := deciders.get(one.key)) is not None
    ]


def batched(
    runtime: str, entries: Sequence[Entry], domain: Domain, rows: np.ndarray, size: int, threads: int
) -> list[Contender]:
    """Batches of rows: (calls, size, ...) of them; see `single`.

    Raises:
        Absent: the runtime cannot take part.
    """
    shown = _shown(runtime, entries)
    deciders = _deciders(runtime, shown, domain, rows[0], threads)
    return [
        Contender(one.method, one.label, RUNTIMES[runtime], decide, rows, size, threads)
        for one in shown
        if (decide := deciders.get(one.key)) is not None
    ]


def looping(
    runtime: str, entries: Sequence[Entry], domain: Domain, rows: np.ndarray, worlds: ExitStack
) -> list[Contender]:
    """Deciding and acting in turn, each contender in a world of its own; see `single`.

    Args:
        runtime: of `RUNTIMES`.
        entries: the full network and the mix are timed.
        domain: one without a world takes no part.
        rows: (N, ...), whose number is that of the steps.
        worlds: closes what is opened.
    Raises:
        Absent: the runtime cannot take part.
    """
    if not isinstance(domain, Looping):
        return []
    shown = [one for one in entries if one.mix or one.label == FULL]
    deciders = _deciders(runtime, shown, domain, rows)
    found = []
    for one in shown:
        if (decide := deciders.get(one.key)) is not None:
            step = worlds.enter_context(domain.world(0))
            found.append(Contender(one.method, one.label, RUNTIMES[runtime] + LOOP, _turn(decide, step), rows))
    return found


def _turn(decide: Decide, step: Callable[[int | None], np.ndarray]) -> Decide:
    observation = step(None)

    def turn(_: np.ndarray) -> object:
        nonlocal observation
        told = decide(observation)
        action = told[0] if isinstance(told, tuple) else told
        observation = step(int(np.asarray(action).item()))
        return action

    return turn


def _shown(runtime: str, entries: Sequence[Entry]) -> list[Entry]:
    if runtime not in RUNTIMES:
        raise unknown("--runtimes", runtime, RUNTIMES)
    return [one for one in entries if runtime != "predict" or one.mix or one.label == FULL]


def _deciders(
    runtime: str, entries: Sequence[Entry], domain: Domain, rows: np.ndarray, threads: int = 1
) -> Mapping[Key, Decide]:
    """How each entry decides, by method and label; an entry may be missing, such as an exit that is not built."""
    if runtime in ("eager", "compiled"):
        return _torch(entries, rows, runtime == "compiled")
    if runtime == "predict":
        if not isinstance(domain, Publisher):
            raise Absent(f"{domain.task} is nothing that SB3 asks")
        return {one.key: domain.predictor(one.network, one.policy) for one in entries}
    missing = [name for name in (RUNTIMES[runtime], "onnx") if util.find_spec(name) is None]
    if missing:
        extras = ",".join(dict.fromkeys((EXTRAS[RUNTIMES[runtime]], "export")))
        raise Absent(f"not installed: pip install 'rlexit[{extras}]'")
    return _served(entries, rows, RUNTIMES[runtime], threads)


def _torch(entries: Sequence[Entry], rows: np.ndarray, compiles: bool) -> dict[Key, Decide]:
    found: dict[Key, Decide] = {}
    ready: dict[int, StagedNetwork] = {}
    for one in entries:
        if id(one.network) not in ready:
            ready[id(one.network)] = _compiled(one.network) if compiles else one.network
        network = ready[id(one.network)]
        found[one.key] = _ask(network, one.policy, rows.ndim)
        if not compiles:
            continue
        try:
            found[one.key](rows[0])
        except Exception as error:
            # Compilers fail in many ways, each with a type of its own: no compiler, no header, an unknown operator.
            raise Absent(f"torch.compile does not work here: {one_line(error)}") from error
    return found


def _compiled(network: StagedNetwork) -> StagedNetwork:
    copied = copy.deepcopy(network)
    for module in (*copied.units.values(), *copied.heads.values()):
        module.compile()
    return copied


def _ask(network: StagedNetwork, policy: ExitPolicy, dims: int) -> Decide:
    """Decides for rows of `dims` dimensions, or for one row, which has one less."""

    def decide(rows: np.ndarray) -> object:
        single = rows.ndim < dims
        given = torch.from_numpy(rows)
        chosen = run(network, policy, given[None] if single else given).answers.argmax(dim=1)
        return chosen.item() if single else chosen.numpy()

    return decide


def _served(entries: Sequence[Entry], rows: np.ndarray, runtime: str, threads: int) -> dict[Key, Decide]:
    checked = torch.from_numpy(rows)
    servers: dict[int, Server] = {}
    found: dict[Key, Decide] = {}
    # An export has the stages of its exit policy, so that of the mix comes first.
    alone = [one for one in entries if one.network.reuse is None]
    if not alone:
        raise Absent(f"{entries[0].method} may repeat its last answer: a row by itself says nothing about its steps")
    for one in sorted(alone, key=lambda one: not one.mix):
        if id(one.network) not in servers:
            try:
                server = server_of(one.network, one.policy, checked, threads, runtime)
            except ExportError as error:  # a method that no chain of graphs can do may still be timed in torch
                raise Absent(str(error)) from error
            servers[id(one.network)] = server
            found[one.key] = server.act
            continue
        server = servers[id(one.network)]
        closed = set(range(one.network.exits)) - {stage.exit for stage in server.stages}
        # An exit that the mix's policy closes has no stage of its own to leave after.
        if not any(one.policy.thresholds[exit] == -np.inf for exit in closed):
            found[one.key] = server.with_thresholds(one.policy.thresholds).act
    return found

"""Who takes part in `rlexit bench`: every way to run the networks of a run, alone, in batches, and in its control loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import util
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

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
ON_DEVICES = ("eager", "compiled")
FULL, LOOP = "full", ", whole loop"
# An exit with this threshold is built, or its leave gate asked, and nobody leaves there; with its negative everybody does.
NOBODY = 1e30
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


class Lineup(NamedTuple):
    """Who is timed, and why others of the entries are not, by method and label."""

    contenders: list[Contender]
    missing: dict[Key, str]


def exits_of(method: str, network: StagedNetwork, policy: ExitPolicy) -> list[Entry]:
    """Every exit by itself, as the rows pay for it that leave there in a mix: earlier exits are met, and passed.

    Args:
        method: as in `rlexit.rows.Row`.
        network: in evaluation mode.
        policy: of the mix; what it closes stays closed.
    Returns:
        `exit 0`, ..., `nothing leaves`; nothing for a network without early exits, and none that is the mix itself.
    """
    found = []
    for exit in range(network.exits if network.exits > 1 else 0):
        limits = [math.inf if limit == math.inf else NOBODY for limit in policy.thresholds]
        if exit < len(limits):
            # Not -inf, which would ask no leave gate: graphs always ask it.
            limits[exit] = -NOBODY
        name = f"exit {exit}" if exit < network.exits - 1 else "nothing leaves"
        if name != policy.label:
            found.append(Entry(method, name, network, ExitPolicy(policy.rule, tuple(limits), name)))
    return found


def single(runtime: str, entries: Sequence[Entry], domain: Domain, rows: np.ndarray, device: str = "cpu") -> Lineup:
    """One decision after the other.

    Args:
        runtime: of `RUNTIMES`.
        entries: what takes part; `predict` times the full network and the mix only.
        domain: the task.
        rows: (N, ...) observations, on the CPU as whoever asks has them.
        device: that torch decides on, the way there and back included; other runtimes stay on the CPU.
    Raises:
        Absent: the runtime cannot take part.
    """
    shown = _shown(runtime, entries)
    deciders, missing = _deciders(runtime, shown, domain, rows, device=device)
    found = [
        Contender(one.method, one.label, _named(runtime, device), deciders[one.key], rows)
        for one in shown
        if one.key in deciders
    ]
    return Lineup(found, missing)


def batched(
    runtime: str,
    entries: Sequence[Entry],
    domain: Domain,
    rows: np.ndarray,
    size: int,
    threads: int,
    device: str = "cpu",
) -> Lineup:
    """Batches of rows: (calls, size, ...) of them; see `single`.

    Raises:
        Absent: the runtime cannot take part.
    """
    shown = _shown(runtime, entries)
    deciders, missing = _deciders(runtime, shown, domain, rows[0], threads, device)
    found = [
        Contender(one.method, one.label, _named(runtime, device), deciders[one.key], rows, size, threads)
        for one in shown
        if one.key in deciders
    ]
    return Lineup(found, missing)


def looping(
    runtime: str,
    entries: Sequence[Entry],
    domain: Domain,
    rows: np.ndarray,
    worlds: ExitStack,
    device: str = "cpu",
    steps: Tensor | None = None,
) -> Lineup:
    """Deciding and acting in turn, each contender in a world of its own; see `single`.

    What is remembered from step to step is, so that answers are repeated as in play. A game that ends is followed by the
    next one, whose first steps still know the last answer.

    Args:
        runtime: of `RUNTIMES`.
        entries: the full network and the mix are timed.
        domain: one without a world takes no part.
        rows: (N, ...), whose number is that of the steps.
        worlds: closes what is opened.
        device: see `single`.
        steps: (T, N, ...) steps in a row, on which graphs that may repeat answers are checked; None where none may.
    Raises:
        Absent: the runtime cannot take part.
    """
    if not isinstance(domain, Looping):
        return Lineup([], {})
    shown = [one for one in entries if one.mix or one.label == FULL]
    deciders, missing = _deciders(runtime, shown, domain, rows, device=device, loops=True, steps=steps)
    found = []
    for one in shown:
        if one.key in deciders:
            turn = _turn(deciders[one.key], worlds.enter_context(domain.world(0)))
            found.append(Contender(one.method, one.label, _named(runtime, device) + LOOP, turn, rows, moving=True))
    return Lineup(found, missing)


def _turn(decide: Decide, step: Callable[[int | None], np.ndarray]) -> Decide:
    observation = step(None)

    def turn(_: np.ndarray) -> object:
        nonlocal observation
        told = decide(observation)
        action = told[0] if isinstance(told, tuple) else told
        observation = step(int(np.asarray(action).item()))
        return action

    return turn


def _named(runtime: str, device: str) -> str:
    return f"{RUNTIMES[runtime]} ({device})" if device != "cpu" and runtime in ON_DEVICES else RUNTIMES[runtime]


def _shown(runtime: str, entries: Sequence[Entry]) -> list[Entry]:
    if runtime not in RUNTIMES:
        raise unknown("--runtimes", runtime, RUNTIMES)
    return [one for one in entries if runtime != "predict" or one.mix or one.label == FULL]


def _deciders(
    runtime: str,
    entries: Sequence[Entry],
    domain: Domain,
    rows: np.ndarray,
    threads: int = 1,
    device: str = "cpu",
    loops: bool = False,
    steps: Tensor | None = None,
) -> tuple[Mapping[Key, Decide], dict[Key, str]]:
    """How each entry decides, by method and label, and why others cannot, such as an exit that is not built.

    Whoever loops remembers from call to call what the network does.
    """
    if runtime in ON_DEVICES:
        return _torch(entries, rows, runtime == "compiled", device, loops), {}
    if runtime == "predict":
        if not isinstance(domain, Publisher):
            raise Absent(f"{domain.task} is nothing that SB3 asks")
        predictors = {one.key: domain.predictor(one.network, one.policy) for one in entries}
        return {key: _remembering(predict) if loops else predict for key, predict in predictors.items()}, {}
    missing = [name for name in (RUNTIMES[runtime], "onnx") if util.find_spec(name) is None]
    if missing:
        extras = ",".join(dict.fromkeys((EXTRAS[RUNTIMES[runtime]], "export")))
        raise Absent(f"not installed: pip install 'rlexit[{extras}]'")
    return _served(entries, rows, RUNTIMES[runtime], threads, steps)


def _remembering(predict: Callable[..., tuple[Any, Any]]) -> Decide:
    memory: Any = None

    def decide(observation: np.ndarray) -> object:
        nonlocal memory
        action, memory = predict(observation, memory)
        return action

    return decide


def _torch(entries: Sequence[Entry], rows: np.ndarray, compiles: bool, device: str, loops: bool) -> dict[Key, Decide]:
    found: dict[Key, Decide] = {}
    ready: dict[int, StagedNetwork] = {}
    for one in entries:
        if id(one.network) not in ready:
            there = one.network if device == "cpu" else copy.deepcopy(one.network).to(device)
            ready[id(one.network)] = _compiled(there) if compiles else there
        network = ready[id(one.network)]
        found[one.key] = _ask(network, one.policy, rows.ndim, device, loops)
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


def _ask(network: StagedNetwork, policy: ExitPolicy, dims: int, device: str, loops: bool) -> Decide:
    """Decides for rows of `dims` dimensions, or for one row, which has one less; waits for a device to be done."""
    memory: Any = None

    def decide(rows: np.ndarray) -> object:
        nonlocal memory
        single = rows.ndim < dims
        given = torch.from_numpy(rows).to(device)
        result = run(network, policy, given[None] if single else given, memory=memory)
        memory = result.memory if loops else None
        chosen = result.answers.argmax(dim=1).cpu()
        return chosen.item() if single else chosen.numpy()

    return decide


def _served(
    entries: Sequence[Entry], rows: np.ndarray, runtime: str, threads: int, steps: Tensor | None
) -> tuple[dict[Key, Decide], dict[Key, str]]:
    servers: dict[int, tuple[Server, str]] = {}
    found: dict[Key, Decide] = {}
    missing: dict[Key, str] = {}
    # An export has the stages of its exit policy, so that of the mix comes first.
    for one in sorted(entries, key=lambda one: not one.mix):
        if one.network.reuse is not None and steps is None:
            missing[one.key] = f"{one.method} may repeat its last answer: a row by itself says nothing about its steps"
            continue
        if id(one.network) not in servers:
            checked = torch.from_numpy(rows) if one.network.reuse is None or steps is None else steps
            try:
                servers[id(one.network)] = server_of(one.network, one.policy, checked, threads, runtime), one.label
            except ExportError as error:  # what no chain of graphs can do may still be timed in torch
                missing[one.key] = str(error)
                continue
        server, label = servers[id(one.network)]
        closed = set(range(one.network.exits)) - {stage.exit for stage in server.stages}
        if any(one.policy.thresholds[exit] < NOBODY for exit in closed):
            missing[one.key] = f"{label} closes this exit: no stage ends there"
            continue
        found[one.key] = (server if one.label == label else server.with_thresholds(one.policy.thresholds)).act
    if not found:
        raise Absent(next(iter(missing.values())))
    return found, missing

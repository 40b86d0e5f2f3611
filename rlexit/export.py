"""Exports: a folder of ONNX graphs and a manifest, written only if it acts as `rlexit.runtime.run` does.

`rlexit.serve` runs such a folder without torch. The check plays the very files through that module on held-out rows, so
what is proved is what will run. Two floating-point libraries never agree to the last bit: a row may be told otherwise
only where its score lies within `TOLERANCE` of the threshold, or its two likeliest outputs within that of each other.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlexit import backends, exported, serve
from rlexit.checkpoint import write_atomic
from rlexit.costs import cost_table
from rlexit.exit_policy import ExitPolicy
from rlexit.graphs import ANSWER, ExportError, Graph, Port, nested_graph, stage_graphs
from rlexit.network import StagedNetwork
from rlexit.runfolder import environment
from rlexit.runtime import RunResult, run

TOLERANCE = 1e-4
CHUNK = 256
SINGLES = 256


@dataclass(frozen=True)
class Parity:
    """How an export compares with the network itself.

    Args:
        rows: compared.
        answers: largest absolute difference of a probability, over rows that left at the same exit.
        actions: rows with another action.
        exits: rows with another exit.
        unexplained: those of both that no tie explains: neither a score near its threshold nor two outputs near each other.
        furthest: of the rows with another exit, the largest distance of the score to its threshold; 0 if there are none.
        tolerance: what counts as near.
    """

    rows: int
    answers: float
    actions: int
    exits: int
    unexplained: int
    furthest: float
    tolerance: float = TOLERANCE

    @property
    def holds(self) -> bool:
        """Whether every row is told the same, ties aside."""
        return self.answers <= self.tolerance and not self.unexplained

    def __str__(self) -> str:
        return (
            f"{self.rows} rows: {self.exits} with another exit (at most {self.furthest:.1e} from the threshold), "
            f"{self.actions} with another action, {self.unexplained} unexplained; probabilities within {self.answers:.1e}"
        )


def export(
    network: StagedNetwork,
    policy: ExitPolicy,
    rows: Tensor,
    folder: Path,
    kind: str,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes an export, checks it, and only then puts it in place.

    Args:
        network: in evaluation mode.
        policy: rule and thresholds.
        rows: (N, ...) held-out raw inputs, met when acting under this policy.
        folder: replaced in one rename if the check holds, else left alone.
        kind: `onnx` (a graph per stage) or `onnx-if` (one nested graph).
        facts: what the manifest says besides: task, method, provenance.
    Returns:
        The manifest.
    Raises:
        ExportError: the network cannot be exported, or the export acts otherwise; nothing is written then.
        MissingExtra: onnx or onnxruntime is not installed.
    """
    need(kind)
    if not len(rows):
        raise ExportError("`rows` must hold observations to check the export on, got none.")
    if folder.exists() and not (folder / exported.MANIFEST).is_file() and any(folder.iterdir()):
        raise ExportError(f"`{folder}` must be empty or hold an export, got other files. Give another folder.")
    graphs = stage_graphs(network, policy, rows[:1].cpu())
    files = {f"stage{number}.onnx": graph.data for number, graph in enumerate(graphs)}
    if kind == "onnx-if":
        files = {"policy.onnx": nested_graph(graphs, policy, network.outputs)}
    manifest = _manifest(network, policy, graphs, files, kind, facts, rows)
    sibling = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(sibling, ignore_errors=True)
    try:
        _write(sibling, files, manifest)
        found = compare(network, policy, serve.load(sibling), rows)
        if not found.holds:
            raise ExportError(f"`export` must act as the network does, got {found}. Nothing was written; report this.")
        manifest = {**manifest, "parity": asdict(found)}
        _write(sibling, {}, manifest)
        _put(sibling, folder)
    finally:
        shutil.rmtree(sibling, ignore_errors=True)
    return manifest


def server_of(
    network: StagedNetwork, policy: ExitPolicy, rows: Tensor, threads: int = 1, runtime: str = "onnxruntime"
) -> serve.Server:
    """An export that is never written, checked like one; for measuring.

    Args:
        network: in evaluation mode.
        policy: rule and thresholds.
        rows: (N, ...) held-out raw inputs for the check.
        threads: see `serve.load`.
        runtime: see `serve.load`.
    Raises:
        ExportError: the network cannot be exported, or the export acts otherwise.
        MissingExtra: onnx or the runtime is not installed.
    """
    need("onnx")
    graphs = stage_graphs(network, policy, rows[:1].cpu())
    stages = []
    for graph in graphs:
        exit = graph.plan.exits[-1]
        inputs, outputs = (exported.ports(_port_facts(side)) for side in (graph.inputs, graph.outputs))
        stages.append(serve.Stage(exit, serve.limit(policy.thresholds, exit), inputs, outputs, graph.data))
    server = serve.Server(_shape_facts(network, rows) | {"format": "onnx"}, stages, threads, runtime)
    found = compare(network, policy, server, rows)
    if not found.holds:
        raise ExportError(f"`export` must act as the network does, got {found}.")
    return server


def compare(network: StagedNetwork, policy: ExitPolicy, server: serve.Server, rows: Tensor) -> Parity:
    """Plays rows through a network and its export, in batches, and the first ones again one by one."""
    answers = furthest = 0.0
    actions = exits = unexplained = 0
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK].cpu()
        wanted, got = run(network, policy, chunk), server.run(chunk.numpy())
        mine, left = wanted.answers.numpy(), wanted.exits.numpy()
        moved, told = left != got.exits, mine.argmax(axis=1) != got.answers.argmax(axis=1)
        difference = np.abs(np.exp(mine) - np.exp(got.answers)).max(axis=1)
        # NaN is a difference, which a comparison would pass over.
        answers = max(answers, float(np.nan_to_num(difference[~moved], nan=np.inf).max(initial=0.0)))
        actions, exits = actions + int(told.sum()), exits + int(moved.sum())
        for row in np.flatnonzero(moved | told).tolist():
            if moved[row]:
                exit = int(min(left[row], got.exits[row]))
                distance = abs(float(wanted.scores[row, exit]) - policy.thresholds[exit])
                if policy.scorer.needs_every_exit:
                    # A rule that counts agreeing exits jumps where two outputs tie, far from any threshold.
                    distance = min(distance, _gap(network, chunk[row : row + 1], exit))
                furthest = max(furthest, distance)
            else:
                first, second = np.sort(np.exp(mine[row]))[-1:-3:-1]
                distance = float(first - second)
            unexplained += not distance <= TOLERANCE
        for row in range(min(len(chunk), SINGLES - start)):
            one = server.act(chunk[row].numpy())
            same = (one[0], one[1]) == (int(got.answers[row].argmax()), int(got.exits[row]))
            unexplained += not same and not moved[row] and not told[row] and not _is_near(wanted, policy, row)
    return Parity(len(rows), answers, actions, exits, unexplained, furthest)


def _is_near(wanted: RunResult, policy: ExitPolicy, row: int) -> bool:
    """Whether a row's score lies near a threshold, or its two likeliest outputs near each other."""
    distances = (wanted.scores[row, :-1] - torch.tensor(policy.thresholds)).abs()
    first, second = wanted.answers[row].exp().topk(2).values.tolist() if wanted.answers.shape[1] > 1 else (1.0, 0.0)
    return bool((distances <= TOLERANCE).any()) or first - second <= TOLERANCE


@torch.no_grad()
def _gap(network: StagedNetwork, row: Tensor, exit: int) -> float:
    """Smallest distance between the two likeliest outputs of any exit up to one."""
    probabilities = network(row).logits[:, : exit + 1].softmax(dim=-1)
    first, second = probabilities.topk(2, dim=-1).values.unbind(dim=-1)
    return float((first - second).min())


def need(kind: str) -> None:
    """Raises ExportError for a format that is not known, MissingExtra where its libraries are not there."""
    if kind not in exported.FORMATS:
        raise ExportError(f"`--format` must be one of {', '.join(exported.FORMATS)}, got {kind!r}.")
    backends.library("onnxruntime")
    if util.find_spec("onnx") is None:  # torch's exporter needs it too
        raise backends.MissingExtra("`onnx` is missing. Install it: pip install 'rlexit[export]'.")


def _manifest(
    network: StagedNetwork,
    policy: ExitPolicy,
    graphs: Sequence[Graph],
    files: Mapping[str, bytes],
    kind: str,
    facts: Mapping[str, Any],
    rows: Tensor,
) -> dict[str, Any]:
    costs = cost_table(network, rows[:1])
    stages = []
    units: set[str] = set()
    heads: set[int] = set()
    macs: dict[str, int] = {}
    for graph in graphs:
        units |= set(graph.plan.units)
        heads |= set(graph.plan.exits)
        spent = sum(costs.units[name] for name in units) + sum(costs.heads[network.exit_names[exit]] for exit in heads)
        macs[str(graph.plan.exits[-1])] = spent
    ports = [(graph.inputs, graph.outputs, graph.plan.exits[-1]) for graph in graphs]
    if kind == "onnx-if":
        told = (Port(ANSWER, (network.outputs,), "float32"), Port("exit", (), "int64"))
        ports = [(graphs[0].inputs, told, -1)]
    for (name, data), (inputs, outputs, exit) in zip(files.items(), ports, strict=True):
        entry = {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "exit": exit}
        stages.append({**entry, "inputs": _port_facts(inputs), "outputs": _port_facts(outputs)})
    return {
        "schema_version": exported.SCHEMA_VERSION,
        "format": kind,
        **policy.to_json(),
        **_shape_facts(network, rows),
        "preprocessing": "inside the graph, which divides by 255; frames are given as float32 where its input is",
        "answer": "log-probabilities; the likeliest output is the action, its probability the confidence",
        "macs": macs,
        "relative_macs": {exit: costs.relative(spent) for exit, spent in macs.items()},
        "stages": stages,
        **facts,
        "made": environment(),
    }


def _shape_facts(network: StagedNetwork, rows: Tensor) -> dict[str, Any]:
    observation = {"shape": list(rows.shape[1:]), "dtype": str(rows.dtype).removeprefix("torch.")}
    return {"exits": network.exits, "outputs": network.outputs, "observation": observation}


def _port_facts(ports: Sequence[Port]) -> list[dict[str, Any]]:
    return [{"name": port.name, "shape": list(port.shape), "dtype": port.dtype} for port in ports]


def _write(folder: Path, files: Mapping[str, bytes], manifest: dict[str, Any]) -> None:
    for name, data in files.items():
        write_atomic(folder / name, data)
    sealed = {**manifest, "sha256": exported.digest(manifest)}
    write_atomic(folder / exported.MANIFEST, json.dumps(sealed, indent=2, allow_nan=False).encode())


def _put(sibling: Path, folder: Path) -> None:
    """Puts a finished folder in place of an older one, which is intact until then."""
    old = sibling.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        sibling.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)

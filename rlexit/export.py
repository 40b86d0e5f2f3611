"""Exports: a folder of ONNX graphs and a manifest, written only if it acts as `rlexit.runtime.run` does.

`rlexit.serve` runs such a folder without torch. The check plays the very files through that module on held-out rows, so
what is proved is what will run (`rlexit.parity`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import util
from pathlib import Path
from typing import Any

from torch import Tensor

from rlexit import backends, exported, serve
from rlexit.checkpoint import write_atomic
from rlexit.costs import cost_table, part_macs
from rlexit.exit_policy import ExitPolicy
from rlexit.gatelogits import runs_always
from rlexit.graphs import ExportError, Graph, Port, Traced, recall_graphs, stage_graphs
from rlexit.nested import nested_graph, segment_graphs
from rlexit.network import StagedNetwork
from rlexit.parity import Parity, compare
from rlexit.runfolder import environment

__all__ = ["ExportError", "Parity", "compare", "export", "need", "server_of"]


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
        rows: (N, ...) held-out raw inputs, met when acting under this policy; (T, N, ...) steps in a row of N
            environments where the network may repeat answers.
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
    example = _example(network, rows)
    made = _graphs(network, policy, example)
    if kind == "onnx-if":
        if made[1]:
            raise ExportError("`--format` onnx-if is for networks that compute every answer. Use --format onnx.")
        nested = nested_graph(made[0], policy, network.outputs)
        files = {"policy": nested.data}
    else:
        nested, files = None, {name: traced.data for name, traced in _parts(*made[:2]).items()}
    manifest = _manifest(network, policy, made, nested, kind, facts, example)
    sibling = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(sibling, ignore_errors=True)
    try:
        _write(sibling, {f"{name}.onnx": data for name, data in files.items()}, manifest)
        found = compare(network, policy, serve.load(sibling), rows)
        if not found.holds:
            raise ExportError(f"`export` must act as the network does, got {found}. Nothing was written; report this.")
        mean = {str(exit): macs for exit, macs in found.macs_mean.items()}
        full = cost_table(network, example).full
        manifest |= {"macs_mean": mean, "relative_macs_mean": {exit: macs / full for exit, macs in mean.items()}}
        manifest |= {"parity": {name: value for name, value in asdict(found).items() if name != "macs_mean"}}
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
        rows: held-out raw inputs for the check; see `export`.
        threads: see `serve.load`.
        runtime: see `serve.load`.
    Raises:
        ExportError: the network cannot be exported, or the export acts otherwise.
        MissingExtra: onnx or the runtime is not installed.
    """
    need("onnx")
    example = _example(network, rows)
    graphs, recall, macs = _graphs(network, policy, example)
    parts: dict[str, serve.Part] = {}
    for name, traced in _parts(graphs, recall).items():
        parts[name] = serve.Part(traced.inputs, traced.outputs, traced.data, macs[name])
    stages = []
    for number, graph in enumerate(graphs):
        ways = {name: parts[f"stage{number}_{name}"] for name in graph.branches}
        exit = graph.plan.exit
        stages.append(serve.Stage(parts[f"stage{number}"], exit, serve.limit(policy.thresholds, exit), **ways))
    asks: Any = network.reuse
    reuse = serve.Reuse(parts["recall_asks"], parts["recall_looks"], asks.limit) if recall else None
    facts = _shape_facts(network, example) | {"format": "onnx", "rule": policy.rule}
    server = serve.Server(facts, stages, threads, runtime, reuse)
    found = compare(network, policy, server, rows)
    if not found.holds:
        raise ExportError(f"`export` must act as the network does, got {found}.")
    return server


Graphs = tuple[list[Graph], dict[str, Traced], dict[str, int]]


def _graphs(network: StagedNetwork, policy: ExitPolicy, example: Tensor) -> Graphs:
    """Stages, what is asked before them, and the multiply-adds of every graph by the name of its file."""
    graphs, recall = stage_graphs(network, policy, example), recall_graphs(network, example)
    for number, single in segment_graphs(graphs).items():
        graphs[number] = replace(graphs[number], branches={**graphs[number].branches, "alone": single})
    costs = part_macs(network, example)
    macs = {f"recall_{name}": costs["reuse"] if name == "asks" else 0 for name in recall}
    for number, graph in enumerate(graphs):
        plan, name = graph.plan, f"stage{number}"
        spent = [costs[f"units.{unit}" if runs_always(network, unit) else f"skips.{unit}"] for unit in plan.units]
        spent += [costs[f"heads.{network.exit_names[exit]}"] for exit in plan.exits]
        spent += [costs[f"leave_gates.{network.exit_names[plan.exit]}"]] if plan.asks else []
        spent += [costs[f"gates.{plan.gated}"]] if plan.gated else []
        macs[name] = sum(spent)
        told = {
            "head": f"heads.{network.exit_names[plan.exit]}",
            "runs": f"units.{plan.gated}",
            "skips": f"skips.{plan.gated}",
        }
        # What a row costs that goes alone depends on its way: nobody adds that up.
        macs |= {f"{name}_{way}": costs[told[way]] if way in told else 0 for way in graph.branches}
    return graphs, recall, macs


def _parts(graphs: Sequence[Graph], recall: Mapping[str, Traced]) -> dict[str, Traced]:
    """Every graph by the name of its file, without suffix."""
    found = {f"recall_{name}": traced for name, traced in recall.items()}
    for number, graph in enumerate(graphs):
        found[f"stage{number}"] = graph
        found |= {f"stage{number}_{name}": traced for name, traced in graph.branches.items()}
    return found


def _example(network: StagedNetwork, rows: Tensor) -> Tensor:
    """(1, ...) the first of the rows."""
    return (rows[0] if network.reuse is not None else rows)[:1].cpu()


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
    made: Graphs,
    nested: Traced | None,
    kind: str,
    facts: Mapping[str, Any],
    example: Tensor,
) -> dict[str, Any]:
    graphs, recall, costs = made
    # The most that a row can cost which leaves there: it runs every gated unit.
    total = costs.get("recall_asks", 0)
    macs: dict[str, int] = {}
    for number, graph in enumerate(graphs):
        total += costs[f"stage{number}"] + costs.get(f"stage{number}_runs", 0)
        if graph.plan.exit >= 0:
            macs[str(graph.plan.exit)] = total + costs.get(f"stage{number}_head", 0)
    table = cost_table(network, example)
    if nested is not None:
        stages = [{**_entry("policy", nested, 0), "exit": -1}]
    else:
        stages = [
            {
                **_entry(f"stage{number}", graph, costs[f"stage{number}"]),
                "exit": graph.plan.exit,
                **({"gate": graph.plan.gated} if graph.plan.gated else {}),
                **{
                    way: _entry(f"stage{number}_{way}", traced, costs[f"stage{number}_{way}"])
                    for way, traced in graph.branches.items()
                },
            }
            for number, graph in enumerate(graphs)
        ]
    asks: Any = network.reuse
    reuse = {name: _entry(f"recall_{name}", traced, costs[f"recall_{name}"]) for name, traced in recall.items()}
    return {
        "schema_version": exported.SCHEMA_VERSION,
        "format": kind,
        **policy.to_json(),
        **_shape_facts(network, example),
        "preprocessing": "inside the graph, which divides by 255; frames are given as float32 where its input is",
        "answer": "log-probabilities; the likeliest output is the action, its probability the confidence",
        "costs": "macs: the most that a row can cost which leaves there, with all that may be skipped or is asked; "
        "macs_mean: the mean of the rows that were checked",
        "macs": macs,
        "relative_macs": {exit: table.relative(spent) for exit, spent in macs.items()},
        "stages": stages,
        **({"reuse": {"limit": asks.limit, **reuse}} if recall else {}),
        **facts,
        "made": environment(),
    }


def _entry(name: str, traced: Traced, macs: int) -> dict[str, Any]:
    """What the manifest says of a graph."""
    return {
        "file": f"{name}.onnx",
        "bytes": len(traced.data),
        "sha256": hashlib.sha256(traced.data).hexdigest(),
        "macs": macs,
        "inputs": _port_facts(traced.inputs),
        "outputs": _port_facts(traced.outputs),
    }


def _shape_facts(network: StagedNetwork, example: Tensor) -> dict[str, Any]:
    observation = {"shape": list(example.shape[1:]), "dtype": str(example.dtype).removeprefix("torch.")}
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

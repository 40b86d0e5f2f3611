"""Several graphs of an export in one, for one row: what may not be run stands in a branch of an `If`.

One call of a runtime costs more than a small gate, and every graph that is opened by itself has memory of its own, which the
caches then have to hold. So single decisions take one graph from exit to exit, gated units in its branches
(`segment_graphs`); runtimes that take only one graph get all stages in one, each inside the one before (`nested_graph`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlexit.exit_policy import ExitPolicy
from rlexit.exported import ANSWER, EXIT, LOGIT, SCORE, Port
from rlexit.graphs import Graph, Traced
from rlexit.stageplans import ExportError

Name = Callable[[str], str]


def _parsed(data: bytes) -> Any:
    import onnx

    return onnx.load_from_string(data)


def _copied(model: Any, prefix: str, named: Name) -> tuple[list[Any], list[Any]]:
    """Nodes and tensors of a model, renamed."""
    import onnx

    nodes, tensors = [], []
    for node in model.graph.node:
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        copied.input[:], copied.output[:] = map(named, node.input), map(named, node.output)
        copied.name = prefix + node.name
        nodes.append(copied)
    for tensor in model.graph.initializer:
        copied = onnx.TensorProto()
        copied.CopyFrom(tensor)
        copied.name = named(tensor.name)
        tensors.append(copied)
    return nodes, tensors


def _constant(name: str, value: Any) -> Any:
    from onnx import helper, numpy_helper

    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value, name))


def _info(name: str, port: Port) -> Any:
    """One row of a port."""
    from onnx import helper

    kind = helper.np_dtype_to_tensor_dtype(np.dtype(port.dtype))
    return helper.make_tensor_value_info(name, kind, [1, *port.shape])


def _model(
    nodes: Sequence[Any], tensors: Sequence[Any], entering: Sequence[Any], leaving: Sequence[Any], like: Any
) -> bytes:
    import onnx
    from onnx import helper

    graph = helper.make_graph(nodes, "rlexit", entering, leaving, tensors)
    model = helper.make_model(graph, opset_imports=like.opset_import, ir_version=like.ir_version)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def segment_graphs(graphs: Sequence[Graph]) -> dict[int, Traced]:
    """The stages from one exit to the next in one graph for one row, by the number of the last; those of gated stages.

    Args:
        graphs: of `stage_graphs`.
    """
    found: dict[int, Traced] = {}
    begin = 0
    for end, graph in enumerate(graphs):
        if graph.plan.exit >= 0:
            stages = graphs[begin : end + 1]
            later = [
                port.name for one in graphs[end + 1 :] for part in (one, *one.branches.values()) for port in part.inputs
            ]
            head = graph.branches.get("head")
            later += [port.name for port in head.inputs] if head is not None else []
            if len(stages) > 1:
                found[end] = _segment(stages, set(later))
            begin = end + 1
    return found


def _segment(graphs: Sequence[Graph], later: set[str]) -> Traced:
    from onnx import helper

    made = {port.name: port for graph in graphs for port in graph.outputs}
    ports = {port.name: port for graph in graphs for part in (graph, *graph.branches.values()) for port in part.inputs}
    ports |= made
    # What a tensor is called in this graph.
    now: dict[str, str] = {}
    inputs: dict[str, Port] = {}
    nodes: list[Any] = []
    tensors: list[Any] = []

    def take(part: Traced) -> None:
        for port in part.inputs:
            if port.name not in now:
                now[port.name], inputs[port.name] = port.name, port

    def branch(number: int, way: str, part: Traced | None, runs: Traced) -> Any:
        prefix = f"stage{number}_{way}/"
        if part is None:
            pairs = list(zip(runs.inputs, runs.outputs, strict=True))
            inner = [helper.make_node("Identity", [now[read.name]], [prefix + port.name]) for read, port in pairs]
            return helper.make_graph(inner, prefix[:-1], [], [_info(prefix + port.name, port) for _, port in pairs])
        reads = {port.name: now[port.name] for port in part.inputs}
        inner, held = _copied(_parsed(part.data), prefix, lambda name: reads.get(name, prefix + name if name else name))
        outputs = [_info(prefix + port.name, port) for port in part.outputs]
        return helper.make_graph(inner, prefix[:-1], [], outputs, held)

    for number, graph in enumerate(graphs):
        take(graph)
        prefix, reads = f"stage{number}/", {port.name: now[port.name] for port in graph.inputs}

        def named(name: str, prefix: str = prefix, reads: dict[str, str] = reads) -> str:
            return reads.get(name, prefix + name if name else name)

        some, held = _copied(_parsed(graph.data), prefix, named)
        nodes, tensors = nodes + some, tensors + held
        now |= {port.name: prefix + port.name for port in graph.outputs}
        runs = graph.branches.get("runs")
        if runs is None:
            continue
        skips = graph.branches.get("skips")
        for part in (runs, *([skips] if skips is not None else [])):
            take(part)
        names = [port.name for port in runs.outputs]
        nodes.append(_constant(prefix + "nothing", np.zeros(1, dtype=np.float32)))
        # One number, of one row; openvino takes no condition of two dimensions.
        nodes.append(_constant(prefix + "flat", np.array([-1], dtype=np.int64)))
        nodes.append(helper.make_node("Reshape", [now[LOGIT], prefix + "flat"], [prefix + "level"]))
        nodes.append(helper.make_node("Greater", [prefix + "level", prefix + "nothing"], [prefix + "wanted"]))
        ways = {
            "then_branch": branch(number, "runs", runs, runs),
            "else_branch": branch(number, "skips", skips, runs),
        }
        joined = [f"stage{number}_joined/{name}" for name in names]
        nodes.append(helper.make_node("If", [prefix + "wanted"], joined, **ways))
        now |= dict(zip(names, joined, strict=True))
        ports |= {port.name: port for port in runs.outputs}
    told = [name for name in now if name in (ANSWER, SCORE) or (name in later and name not in inputs)]
    nodes += [helper.make_node("Identity", [now[name]], [name]) for name in told]
    outputs = tuple(ports[name] for name in told)
    entering = [_info(port.name, port) for port in inputs.values()]
    leaving = [_info(port.name, port) for port in outputs]
    return Traced(tuple(inputs.values()), outputs, _model(nodes, tensors, entering, leaving, _parsed(graphs[0].data)))


def nested_graph(graphs: Sequence[Graph], policy: ExitPolicy, outputs: int) -> Traced:
    """All stages in one graph for one row, with an `If` after each that holds the next one.

    Args:
        graphs: of `stage_graphs`.
        policy: whose thresholds become constants of the graph.
        outputs: A.
    Returns:
        An ONNX model from `observation` (1, ...) to `answer` (1, A) and `exit` (1,).
    Raises:
        ExportError: some of the rows take another way through a stage.
    """
    from onnx import helper

    if any(graph.branches for graph in graphs):
        raise ExportError(
            "`--format` onnx-if is for networks whose rows all run the same, got gates. Use --format onnx."
        )
    models = [_parsed(graph.data) for graph in graphs]
    told = (Port(ANSWER, (outputs,), "float32"), Port(EXIT, (), "int64"))

    def told_by(stage: int, suffix: str = "") -> list[Any]:
        return [_info(f"{port.name}_{stage}{suffix}", port) for port in told]

    def part(stage: int) -> tuple[list[Any], list[Any]]:
        """Nodes and tensors from a stage to the end; what they find is `answer_<stage>` and `exit_<stage>`."""
        plan, prefix = graphs[stage].plan, f"stage{stage}/"
        shared = {port.name for one in graphs for port in (*one.inputs, *one.outputs)} - {ANSWER, SCORE}

        def named(name: str) -> str:
            return name if name in shared or not name else prefix + name

        nodes, tensors = _copied(models[stage], prefix, named)
        answer, exit = named(ANSWER), np.array([plan.exit], dtype=np.int64)
        if plan.last:
            nodes += [helper.make_node("Identity", [answer], [f"answer_{stage}"]), _constant(f"exit_{stage}", exit)]
            return nodes, tensors
        threshold = np.array([policy.thresholds[plan.exit]], dtype=np.float32)
        nodes.append(_constant(prefix + "threshold", threshold))
        nodes.append(helper.make_node("Greater", [named(SCORE), prefix + "threshold"], [prefix + "leaves"]))
        stay = [
            helper.make_node("Identity", [answer], [f"answer_{stage}_here"]),
            _constant(f"exit_{stage}_here", exit),
        ]
        later, theirs = part(stage + 1)
        branches = {
            "then_branch": helper.make_graph(stay, f"leave{stage}", [], told_by(stage, "_here")),
            "else_branch": helper.make_graph(later, f"stage{stage + 1}", [], told_by(stage + 1), theirs),
        }
        names = [f"answer_{stage}", f"exit_{stage}"]
        nodes.append(helper.make_node("If", [prefix + "leaves"], names, **branches))
        return nodes, tensors

    nodes, tensors = part(0)
    nodes += [helper.make_node("Identity", [f"{port.name}_0"], [port.name]) for port in told]
    entering = [_info(port.name, port) for port in graphs[0].inputs]
    leaving = [_info(port.name, port) for port in told]
    return Traced(graphs[0].inputs, told, _model(nodes, tensors, entering, leaving, models[0]))

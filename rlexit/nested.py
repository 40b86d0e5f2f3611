"""All stages of an export in one graph for one row, for runtimes that take only one: an `If` after each holds the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlexit.exit_policy import ExitPolicy
from rlexit.graphs import ANSWER, SCORE, Graph, Port, Traced
from rlexit.stageplans import ExportError


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
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    if any(graph.branches for graph in graphs):
        raise ExportError(
            "`--format` onnx-if is for networks whose every row runs every unit, got gates. Use --format onnx."
        )
    models = [onnx.load_from_string(graph.data) for graph in graphs]

    def named_ports(stage: int) -> list[Any]:
        shapes = (("answer", TensorProto.FLOAT, [1, outputs]), ("exit", TensorProto.INT64, [1]))
        return [helper.make_tensor_value_info(f"{name}_{stage}", kind, shape) for name, kind, shape in shapes]

    def constant(name: str, value: Any) -> Any:
        return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value, name))

    def part(stage: int) -> tuple[list[Any], list[Any]]:
        """Nodes and tensors from a stage to the end; what they find is `answer_<stage>` and `exit_<stage>`."""
        plan, graph = graphs[stage].plan, models[stage].graph
        prefix = f"stage{stage}/"
        shared = {port.name for one in graphs for port in (*one.inputs, *one.outputs)} - {ANSWER, SCORE}

        def named(name: str) -> str:
            return name if name in shared or not name else prefix + name

        nodes, tensors = [], []
        for node in graph.node:
            copied = onnx.NodeProto()
            copied.CopyFrom(node)
            copied.input[:], copied.output[:] = map(named, node.input), map(named, node.output)
            copied.name = prefix + node.name
            nodes.append(copied)
        for tensor in graph.initializer:
            copied = onnx.TensorProto()
            copied.CopyFrom(tensor)
            copied.name = named(tensor.name)
            tensors.append(copied)
        answer, exit = named(ANSWER), np.array([plan.exit], dtype=np.int64)
        if plan.last:
            nodes += [helper.make_node("Identity", [answer], [f"answer_{stage}"]), constant(f"exit_{stage}", exit)]
            return nodes, tensors
        threshold = np.array([policy.thresholds[plan.exit]], dtype=np.float32)
        nodes.append(constant(prefix + "threshold", threshold))
        nodes.append(helper.make_node("Greater", [named(SCORE), prefix + "threshold"], [prefix + "leaves"]))
        stay = [
            helper.make_node("Identity", [answer], [f"answer_{stage}_here"]),
            constant(f"exit_{stage}_here", exit),
        ]
        here = named_ports(stage)
        for value in here:
            value.name += "_here"
        later, theirs = part(stage + 1)
        branches = {
            "then_branch": helper.make_graph(stay, f"leave{stage}", [], here),
            "else_branch": helper.make_graph(later, f"stage{stage + 1}", [], named_ports(stage + 1), theirs),
        }
        names = [f"answer_{stage}", f"exit_{stage}"]
        nodes.append(helper.make_node("If", [prefix + "leaves"], names, **branches))
        return nodes, tensors

    nodes, tensors = part(0)
    nodes += [helper.make_node("Identity", [f"{name}_0"], [name]) for name in (ANSWER, "exit")]
    port = graphs[0].inputs[0]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(port.dtype))
    entering = [helper.make_tensor_value_info(port.name, kind, [1, *port.shape])]
    leaving = named_ports(0)
    for value, name in zip(leaving, (ANSWER, "exit"), strict=True):
        value.name = name
    graph = helper.make_graph(nodes, "rlexit", entering, leaving, tensors)
    model = helper.make_model(graph, opset_imports=models[0].opset_import, ir_version=models[0].ir_version)
    onnx.checker.check_model(model)
    told = (Port(ANSWER, (outputs,), "float32"), Port("exit", (), "int64"))
    return Traced(graphs[0].inputs, told, model.SerializeToString())

"""From a staged network and an exit policy to ONNX graphs: one per stage, or all of them in one nested `If`.

Graphs are made by torch's tracing exporter. A stage is a straight line of some fifteen operators without control flow,
which tracing gets exactly right in a hundredth of a second; the exporter built on `torch.export` writes the same
operators in 5 to 10 s per stage. What comes out is compared with `rlexit.runtime.run` in either case (`rlexit.export`).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlexit.ensembles import NoEnsemble
from rlexit.exit_policy import ExitPolicy
from rlexit.network import StagedNetwork
from rlexit.rewrites import MixedHead, RewrittenHead, given_as, prepared, rewritten
from rlexit.rules import Rule
from rlexit.runtime import exits_to_build
from rlexit.state import ExitState, leaves_of, map_tensors

OPSET = 18
OBSERVATION, ANSWER, SCORE = "observation", "answer", "score"
# Traced with more than one row, so that a shape which is made from the number of rows is not taken for a constant 1.
TRACED_ROWS = 2


class ExportError(ValueError):
    """A network cannot be exported, or its export does not act as it does."""


@dataclass(frozen=True)
class Plan:
    """One stage: what it runs, reads and hands on.

    Args:
        units: names of its units.
        exits: indices of the exits whose heads it builds; rows may leave at the last of them.
        reads: earlier exits whose raw logits it is given.
        keeps: of its own exits, those whose raw logits a later stage reads.
        last: whether every row leaves here.
    """

    units: tuple[str, ...]
    exits: tuple[int, ...]
    reads: tuple[int, ...]
    keeps: tuple[int, ...]
    last: bool


@dataclass(frozen=True)
class Port:
    """A named input or output of a graph: shape of one row, and NumPy's name of its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Graph:
    """A stage as an ONNX file."""

    plan: Plan
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    data: bytes


def check_exportable(network: StagedNetwork) -> None:
    """Refuses what a chain of plain graphs cannot do.

    Raises:
        ExportError: the network has gates, or carries something from one env step to the next.
    """
    if network.gates:
        raise ExportError(
            f"`network` must have no gates to be exported, got gates before {', '.join(network.gates)}: a plain graph "
            "cannot leave out a unit. Export a method with exits only."
        )
    if network.reuse is not None:
        raise ExportError(
            "`network` must keep nothing between env steps to be exported, got one that may repeat its last answer. "
            "Export a method without `reuse`."
        )
    kind = type(network)
    if kind.remember is not StagedNetwork.remember or kind.begin is not StagedNetwork.begin:
        raise ExportError(
            f"`network` must keep nothing between env steps to be exported, got {kind.__name__}. "
            "Export a method without memory."
        )


def plan_stages(network: StagedNetwork, policy: ExitPolicy) -> list[Plan]:
    """Parts a network where rows may leave: at every early exit with a threshold below infinity, and at the end."""
    rule, early = policy.scorer, network.exits - 1
    if policy.budget:
        raise ExportError(
            f"`budget` must be 0 to be exported, got {policy.budget}: graphs do not count. Export a policy of thresholds."
        )
    if rule.before_head:
        raise ExportError(
            f"`rule` must score answers to be exported, got {policy.rule!r}, which asks the network before its heads. "
            "Calibrate another rule for the export."
        )
    built = [bool(one) for one in exits_to_build(network, rule, policy.thresholds)] + [True]
    plans: list[Plan] = []
    units: list[str] = []
    exits: list[int] = []
    exit = 0
    for name in network.unit_names:
        units.append(name)
        if exit > early or network.exit_names[exit] != name:
            continue
        exits += [exit] if built[exit] else []
        if exit == early or policy.thresholds[exit] < torch.inf:
            later = [index for index in range(exit + 1, early + 1) if built[index]]
            before = [one for plan in plans for one in plan.exits]
            reads = tuple(one for one in before if _is_read(network, policy, rule, one, exits))
            keeps = tuple(one for one in exits if _is_read(network, policy, rule, one, later))
            plans.append(Plan(tuple(units), tuple(exits), reads, keeps, exit == early))
            units, exits = [], []
        exit += 1
    return plans


def _is_read(network: StagedNetwork, policy: ExitPolicy, rule: Rule, exit: int, by: Sequence[int]) -> bool:
    """Whether the raw logits of an exit are read at one of some later ones."""
    for index in by:
        if index <= exit:
            continue
        leaves = index < network.exits - 1 and policy.thresholds[index] < torch.inf
        if (network.head(index).reads_previous and index == exit + 1) or (leaves and rule.needs_every_exit):
            return True
        if _is_combined(network, index) and (leaves or index == network.exits - 1):
            return True
    return False


def _is_combined(network: StagedNetwork, exit: int) -> bool:
    ensemble = network.ensemble
    return not isinstance(ensemble, NoEnsemble) and exit < ensemble.exits


class StageModule(nn.Module):
    """One stage, tensors in and tensors out, by the network's own units, heads, ensemble and rule.

    Args:
        network: of `rewritten`.
        plan: which part.
        rule: scores the rows that may leave.
        template: tree of the features that it is given; None for raw inputs.
    """

    def __init__(self, network: StagedNetwork, plan: Plan, rule: Rule, template: Any) -> None:
        super().__init__()
        self.network, self.plan, self.rule, self.template = network, plan, rule, template
        self.features: Any = None
        exit = plan.exits[-1]
        head, found = network.head(exit), network.ensemble.as_sum(exit) if _is_combined(network, exit) else None
        # A rule reads the answer, unless it compares exits.
        keeps = exit in plan.keeps or rule.needs_every_exit
        self.mixed = MixedHead(head, *found, keeps) if found and isinstance(head, RewrittenHead) else None

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Raw inputs or features, then logits of `plan.reads`; to features, logits of `plan.keeps`, answer and score."""
        network, plan = self.network, self.plan
        if self.template is None:
            features, given = prepared(network, inputs[0]), inputs[1:]
        else:
            leaves = iter(inputs)
            features = map_tensors(lambda _: next(leaves), self.template)
            given = tuple(leaves)
        logits = dict(zip(plan.reads, given, strict=True))
        answer: Tensor | None = None
        for name in plan.units:
            unit: Any = network.units[name]
            features = unit(features)
            exit = network.exit_names.index(name) if name in network.exit_names else -1
            if exit not in plan.exits:
                continue
            head, tapped = network.head(exit), unit.tap(features)
            if self.mixed is not None and exit == plan.exits[-1]:
                own, mixed = self.mixed(tapped, [logits[index] for index in range(exit)])
                logits |= {} if own is None else {exit: own}
                answer = mixed.log_softmax(dim=-1)
            else:
                logits[exit] = head(tapped, logits[exit - 1]) if head.reads_previous else head(tapped)
        self.features = features
        leaving = plan.exits[-1]
        answer = self._answer(logits, leaving) if answer is None else answer
        if plan.last:
            return (answer,)
        handed = (*leaves_of(features), *(logits[exit] for exit in plan.keeps))
        return (*handed, answer, self._score(logits, answer, leaving))

    def _answer(self, logits: dict[int, Tensor], exit: int) -> Tensor:
        if not _is_combined(self.network, exit):
            return logits[exit].log_softmax(dim=-1)
        return self.network.ensemble.from_logits([logits[index] for index in range(exit + 1)])

    def _score(self, logits: dict[int, Tensor], answer: Tensor, exit: int) -> Tensor:
        missing = torch.full_like(answer, torch.nan)
        known = torch.stack([logits.get(index, missing) for index in range(exit + 1)], dim=1)
        rows = torch.arange(answer.shape[0])
        return self.rule.score(ExitState(rows, None, known, answer, torch.zeros_like(rows), exit=exit + 1))


def stage_graphs(network: StagedNetwork, policy: ExitPolicy, example: Tensor) -> list[Graph]:
    """One ONNX graph per stage; the first input's and every tensor's first dimension is the number of rows.

    Frames that nothing but a convolution reads are given to the first graph as float32 from 0 to 255.

    Args:
        network: in evaluation mode.
        policy: rule, and where rows may leave.
        example: (1, ...) raw inputs of the right dtype.
    Raises:
        ExportError: the network cannot be exported.
    """
    check_exportable(network)
    features = {OBSERVATION: torch.cat([example] * TRACED_ROWS)}
    logits: dict[int, Tensor] = {}
    copied = rewritten(network, features[OBSERVATION])
    # To convert frames outside of the graph costs half as much; who fills the input can do it in passing.
    features[OBSERVATION] = given_as(copied, features[OBSERVATION])
    template: Any = None
    found: list[Graph] = []
    for plan in plan_stages(network, policy):
        module = StageModule(copied, plan, policy.scorer, template).eval()
        given = {**features, **{f"logits_{exit}": logits[exit] for exit in plan.reads}}
        with torch.no_grad():
            # Copies: a unit may change in place what it is given, and a later stage reads it still.
            results = module(*(one.clone() for one in given.values()))
        leaves = [] if plan.last else leaves_of(module.features)
        names = [f"features_{len(found)}_{index}" for index in range(len(leaves))]
        outputs = [*names, *(f"logits_{exit}" for exit in plan.keeps), ANSWER, *([] if plan.last else [SCORE])]
        data = _trace(module, tuple(one.clone() for one in given.values()), list(given), outputs)
        # The exporter leaves out an input that nothing reads, such as a scale that a last stage does not need.
        read = {name: given[name] for name in _inputs(data)}
        found.append(Graph(plan, _ports(list(read), list(read.values())), _ports(outputs, results), data))
        features = dict(zip(names, results, strict=False))
        logits |= dict(zip(plan.keeps, results[len(names) :], strict=False))
        template = module.features
    return found


def _ports(names: Sequence[str], tensors: Sequence[Tensor]) -> tuple[Port, ...]:
    return tuple(
        Port(name, tuple(int(side) for side in tensor.shape[1:]), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in zip(names, tensors, strict=True)
    )


def _inputs(data: bytes) -> list[str]:
    import onnx

    return [value.name for value in onnx.load_from_string(data).graph.input]


def _trace(module: nn.Module, inputs: tuple[Tensor, ...], names: list[str], outputs: list[str]) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                module,
                inputs,
                file,  # type: ignore[arg-type]  # this exporter writes to memory as well
                dynamo=False,
                opset_version=OPSET,
                input_names=names,
                output_names=outputs,
                dynamic_axes={name: {0: "batch"} for name in (*names, *outputs)},
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ExportError(f"`network` must be made of what ONNX can say, got: {reason}") from error
    return file.getvalue()


def nested_graph(graphs: Sequence[Graph], policy: ExitPolicy, outputs: int) -> bytes:
    """All stages in one graph for one row, with an `If` after each that holds the next one.

    Args:
        graphs: of `stage_graphs`.
        policy: whose thresholds become constants of the graph.
        outputs: A.
    Returns:
        An ONNX model from `observation` (1, ...) to `answer` (1, A) and `exit` (1,).
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    models = [onnx.load_from_string(graph.data) for graph in graphs]

    def told(stage: int) -> list[Any]:
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
        answer, exit = named(ANSWER), np.array([plan.exits[-1]], dtype=np.int64)
        if plan.last:
            nodes += [helper.make_node("Identity", [answer], [f"answer_{stage}"]), constant(f"exit_{stage}", exit)]
            return nodes, tensors
        threshold = np.array([policy.thresholds[plan.exits[-1]]], dtype=np.float32)
        nodes.append(constant(prefix + "threshold", threshold))
        nodes.append(helper.make_node("Greater", [named(SCORE), prefix + "threshold"], [prefix + "leaves"]))
        stay = [
            helper.make_node("Identity", [answer], [f"answer_{stage}_here"]),
            constant(f"exit_{stage}_here", exit),
        ]
        here = told(stage)
        for value in here:
            value.name += "_here"
        later, theirs = part(stage + 1)
        branches = {
            "then_branch": helper.make_graph(stay, f"leave{stage}", [], here),
            "else_branch": helper.make_graph(later, f"stage{stage + 1}", [], told(stage + 1), theirs),
        }
        names = [f"answer_{stage}", f"exit_{stage}"]
        nodes.append(helper.make_node("If", [prefix + "leaves"], names, **branches))
        return nodes, tensors

    nodes, tensors = part(0)
    nodes += [helper.make_node("Identity", [f"{name}_0"], [name]) for name in (ANSWER, "exit")]
    port = graphs[0].inputs[0]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(port.dtype))
    entering = [helper.make_tensor_value_info(port.name, kind, [1, *port.shape])]
    leaving = told(0)
    for value, name in zip(leaving, (ANSWER, "exit"), strict=True):
        value.name = name
    graph = helper.make_graph(nodes, "rlexit", entering, leaving, tensors)
    model = helper.make_model(graph, opset_imports=models[0].opset_import, ir_version=models[0].ir_version)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data

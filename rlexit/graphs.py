"""From a staged network and an exit policy to ONNX graphs: one per stage, and one per way past a unit that rows may skip.

Graphs are made by torch's tracing exporter. A stage is a straight line of some fifteen operators without control flow,
which tracing gets exactly right in a hundredth of a second; the exporter built on `torch.export` writes the same
operators in 5 to 10 s per stage. What comes out is compared with `rlexit.runtime.run` in either case (`rlexit.export`).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rlexit.exit_policy import ExitPolicy
from rlexit.exported import ANSWER, LOGIT, MEMORY, OBSERVATION, SCORE, VIEW, Port
from rlexit.gates.layer import RecurrentGate
from rlexit.network import StagedNetwork
from rlexit.rewrites import PlainOperators, given_as, rewritten
from rlexit.stagemodules import BranchModule, HeadModule, RecallModule, StageModule
from rlexit.stageplans import ExportError, Plan, check_exportable, plan_stages
from rlexit.state import leaves_of

__all__ = ["ExportError", "Graph", "Plan", "Port", "Traced", "check_exportable", "recall_graphs", "stage_graphs"]

OPSET = 18
# Traced with more than one row, so that a shape which is made from the number of rows is not taken for a constant 1.
TRACED_ROWS = 2


@dataclass(frozen=True)
class Traced:
    """An ONNX file and what it reads and gives."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    data: bytes


@dataclass(frozen=True)
class Graph(Traced):
    """A stage.

    Args:
        plan: which part of the network it is.
        branches: graphs for some of its rows: `head` for those that leave, where the head is apart; `runs` and `skips`
            for those that run and skip the unit after it. Without `skips` a row that skips keeps its features.
    """

    plan: Plan
    branches: Mapping[str, Traced] = field(default_factory=dict)


def stage_graphs(network: StagedNetwork, policy: ExitPolicy, example: Tensor) -> list[Graph]:
    """The ONNX graphs of every stage; the first input's and every tensor's first dimension is the number of rows.

    Frames that nothing but a convolution reads are given to the first graph as float32 from 0 to 255.

    Args:
        network: in evaluation mode.
        policy: rule, and where rows may leave.
        example: (1, ...) raw inputs of the right dtype.
    Raises:
        ExportError: the network cannot be exported.
    """
    check_exportable(network)
    copied, observation = _copied(network, example)
    features = {OBSERVATION: observation}
    logits: dict[int, Tensor] = {}
    carry: dict[str, Tensor] = {}
    template: Any = None
    after = ""
    found: list[Graph] = []
    for plan in plan_stages(network, policy):
        number = len(found)
        module = StageModule(copied, plan, policy.scorer, template, after, not carry).eval()
        recurrent = bool(plan.gated) and isinstance(copied.gates[plan.gated], RecurrentGate)
        given = {**features, **_named(logits, plan.reads), **(carry if recurrent else {})}
        results = _results(module, given)
        template = module.features
        leaves = leaves_of(template) if module.hands and not plan.last else []
        names = [f"features_{number}_{index}" for index in range(len(leaves))]
        outputs = [*names, *(f"logits_{exit}" for exit in plan.keeps)]
        outputs += [ANSWER] if plan.exit >= 0 and not plan.apart else []
        outputs += [SCORE] if plan.exit >= 0 and not plan.last else []
        if plan.gated:
            more = len(results) - len(outputs) - 1
            outputs += [LOGIT, *(f"carry_{number}_{index}" for index in range(more))]
        told = dict(zip(outputs, results, strict=True))
        stage = _traced(module, given, told)
        if names:
            features = {name: told[name] for name in names}
        logits |= {exit: told[f"logits_{exit}"] for exit in plan.keeps}
        carry = {name: told[name] for name in told if name.startswith("carry")} or carry
        branches: dict[str, Traced] = {}
        if plan.apart:
            unit = copied.units[(*([after] if after else ()), *plan.units)[-1]]
            head = HeadModule(copied, plan, template, unit).eval()
            given = {**features, **_named(logits, plan.head_reads)}
            branches["head"] = _traced(head, given, {ANSWER: _results(head, given)[0]})
        if plan.gated:
            branches, features, template = _branches(copied.units[plan.gated], number, template, features)
        after = plan.gated
        found.append(Graph(stage.inputs, stage.outputs, stage.data, plan, branches))
    return found


def _named(logits: Mapping[int, Tensor], exits: Sequence[int]) -> dict[str, Tensor]:
    return {f"logits_{exit}": logits[exit] for exit in exits}


def _branches(
    unit: Any, number: int, template: Any, features: dict[str, Tensor]
) -> tuple[dict[str, Traced], dict[str, Tensor], Any]:
    """Both ways past a gated unit, and the features after it by name and as a tree.

    They have names of their own even where a row that skips keeps what it has: no graph may give what it is given.
    """
    with torch.no_grad():
        passed = leaves_of(unit.skip(template))
    same = [one is other for one, other in zip(passed, leaves_of(template), strict=False)]
    identity = len(passed) == len(leaves_of(template)) and all(same)
    runs = BranchModule(unit, template, skips=False).eval()
    told = {f"joined_{number}_{index}": one for index, one in enumerate(_results(runs, features))}
    joined = runs.features
    branches = {"runs": _traced(runs, features, told)}
    if not identity:
        skips = BranchModule(unit, template, skips=True).eval()
        branches["skips"] = _traced(skips, features, dict(zip(told, _results(skips, features), strict=True)))
        return branches, told, joined
    if [port.name for port in branches["runs"].inputs] != list(features):
        raise ExportError(
            f"`{type(unit).__name__}` must read all of its features to be exported with a gate before it."
        )
    return branches, told, joined


def recall_graphs(network: StagedNetwork, example: Tensor) -> dict[str, Traced]:
    """What is asked before the first stage of a network that may repeat answers: `asks` and `looks`; {} for others.

    Args:
        network: in evaluation mode.
        example: (1, ...) raw inputs of the right dtype.
    """
    if network.reuse is None:
        return {}
    copied, observation = _copied(network, example)
    reuse: Any = copied.reuse
    memory = reuse.fresh(TRACED_ROWS)
    given = {OBSERVATION: observation, **{f"memory_{name}": memory[name] for name in MEMORY}}
    found = {}
    for name, names in (("asks", list(given)), ("looks", [OBSERVATION])):
        module = RecallModule(copied, name == "asks").eval()
        read = {one: given[one] for one in names}
        found[name] = _traced(module, read, dict(zip((VIEW, LOGIT), _results(module, read), strict=False)))
    return found


def _copied(network: StagedNetwork, example: Tensor) -> tuple[StagedNetwork, Tensor]:
    """The network as it is traced, and what its first graph is given."""
    observation = torch.cat([example] * TRACED_ROWS)
    copied = rewritten(network, observation)
    # To convert frames outside of the graph costs half as much; who fills the input can do it in passing.
    return copied, given_as(copied, observation)


def _results(module: nn.Module, given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad(), PlainOperators():
        # Copies: a unit may change in place what it is given, and a later stage reads it still.
        results: tuple[Tensor, ...] = module(*(one.clone() for one in given.values()))
    return results


def _traced(module: nn.Module, given: Mapping[str, Tensor], told: Mapping[str, Tensor]) -> Traced:
    data = _trace(module, tuple(one.clone() for one in given.values()), list(given), list(told))
    # The exporter leaves out an input that nothing reads, such as a scale that a last stage does not need.
    read = {name: given[name] for name in _inputs(data)}
    return Traced(_ports(read), _ports(told), data)


def _ports(tensors: Mapping[str, Tensor]) -> tuple[Port, ...]:
    return tuple(
        Port(name, tuple(int(side) for side in tensor.shape[1:]), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
    )


def _inputs(data: bytes) -> list[str]:
    import onnx

    return [value.name for value in onnx.load_from_string(data).graph.input]


def _trace(module: nn.Module, inputs: tuple[Tensor, ...], names: list[str], outputs: list[str]) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad(), PlainOperators():
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

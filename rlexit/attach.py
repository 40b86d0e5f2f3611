"""Exits on anyone's network: a module is cut at named taps into units, so that what follows an exit need not run."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from rlexit.config import HeadConfig
from rlexit.ensembles import ensembles
from rlexit.gates import Decision
from rlexit.heads import Head, ModuleHead, heads
from rlexit.network import StagedNetwork
from rlexit.registry import unknown
from rlexit.units import Unit

LAST = "rest"
PROBE = 3


class CutUnit(Unit):
    """One part of a cut module: a dict of named tensors in, those that are still needed out.

    Args:
        part: the part's graph; takes and gives tensors in the order of the next two.
        reads: names of the tensors that it takes.
        makes: names of the tensors that it gives.
        keeps: names of all tensors that are needed after it, the tapped one among them.
        tapped: name of the tensor that an exit after it reads.
    """

    def __init__(self, part: fx.GraphModule, reads: list[str], makes: list[str], keeps: list[str], tapped: str) -> None:
        super().__init__()
        self.part, self.reads, self.makes, self.keeps, self.tapped = part, reads, makes, keeps, tapped

    def body(self, features: Any, decision: Decision | None = None) -> Any:
        """Runs the part and forgets what nobody reads any more."""
        known = features if isinstance(features, dict) else {self.reads[0]: features}
        made = self.part(*(known[name] for name in self.reads))
        everything = {**known, **dict(zip(self.makes, made, strict=True))}
        return {name: everything[name] for name in self.keeps}

    def tap(self, features: Any) -> Tensor:
        """A copy of the tapped tensor: the next part may work on it in place, as `nn.ReLU(inplace=True)` does."""
        tensor: Tensor = features[self.tapped]
        return tensor.clone()


class AttachedNetwork(StagedNetwork):
    """A staged network whose first unit reads the inputs as they are: the module normalises them itself."""

    def prepare(self, inputs: Any) -> Any:
        """The inputs."""
        return inputs


def attach(
    module: nn.Module,
    taps: Sequence[str],
    example: Tensor,
    *,
    head: HeadConfig | None = None,
    cascade: bool = True,
    ensemble: str = "geometric",
) -> StagedNetwork:
    """Puts early exits into a classifier or policy that gives logits.

    The module is traced with `torch.fx` and cut after the named submodules; weights are shared with it, not copied.

    Args:
        module: (B, ...) to logits (B, A); its control flow must not depend on values.
        taps: names of submodules (as in `named_modules`) after which a row may leave, in the order of execution.
        example: (B, ...) inputs; only shapes are read, with one forward pass.
        head: how early heads are built.
        cascade: feed each early head the logits of the one before it.
        ensemble: registered name.
    Returns:
        A staged network in evaluation mode, for `ExitStudent`, `run` and everything else.
    Raises:
        LookupError: a tap names no submodule; names the nearest.
        ValueError: a tap is not called exactly once, taps are out of order, the module cannot be traced, or what it
            hands on at a tap is not of the batch's rows.
    """
    names = [name for name, _ in module.named_modules() if name]
    for tap in taps:
        if tap not in names:
            raise unknown("taps", tap, names)
    if not taps:
        raise ValueError("`taps` must name at least one submodule, got none.")
    if len({*map(unit_name, taps), LAST}) <= len(taps):
        raise ValueError(
            f"`taps` must differ where dots are read as `_`, and none may be {LAST!r}, got {', '.join(taps)}."
        )
    module = module.eval()
    try:
        traced = fx.symbolic_trace(module)
    except (fx.proxy.TraceError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"`module` must be traceable by torch.fx, got: {reason}. Write it as rlexit units.") from error
    units = _cut(traced, taps)
    shapes, outputs = _shapes(units, example)
    config = head or HeadConfig()
    exits: dict[str, Head] = {}
    for tap in taps:
        reads_previous = cascade and bool(exits)
        exits[unit_name(tap)] = heads[config.kind](shapes[unit_name(tap)], outputs, config, reads_previous)
    exits[LAST] = ModuleHead(nn.Identity())
    return AttachedNetwork(units, exits, outputs, ensembles[ensemble](len(taps), outputs)).eval()


def unit_name(tap: str) -> str:
    """The unit that ends at a tap; units must not have dots in their names."""
    return tap.replace(".", "_")


def _cut(traced: fx.GraphModule, taps: Sequence[str]) -> OrderedDict[str, Unit]:
    """Parts of the graph that end at the taps, by name."""
    # Parameters and buffers have no rows: each part fetches its own.
    nodes = [node for node in traced.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise ValueError(f"`module` must take one tensor, got {len(inputs)} arguments.")
    result = next(node for node in traced.graph.nodes if node.op == "output").args[0]
    if not isinstance(result, fx.Node):
        raise ValueError("`module` must give one tensor of logits, got several results.")
    ends = [_last_of(nodes, tap) for tap in taps]
    if ends != sorted(ends):
        raise ValueError(f"`taps` must be in the order of execution, got {', '.join(taps)}.")
    if len(set(ends)) < len(ends) or ends[-1] >= nodes.index(result):
        raise ValueError(f"`taps` must leave work between them and after the last, got {', '.join(taps)}.")
    units: OrderedDict[str, Unit] = OrderedDict()
    tapped = [nodes[end].name for end in ends] + [result.name]
    names = [unit_name(tap) for tap in taps] + [LAST]
    begin = 0
    known = [inputs[0].name]
    for name, end, tensor in zip(names, [*ends, len(nodes) - 1], tapped, strict=True):
        part, later = nodes[begin : end + 1], nodes[end + 1 :]
        needed = {source.name for node in later for source in node.all_input_nodes if source.op != "get_attr"} | {
            tensor
        }
        reads = [read for read in known if any(read == source.name for node in part for source in node.all_input_nodes)]
        makes = [node.name for node in part if node.name in needed]
        keeps = [read for read in known if read in needed] + makes
        units[name] = CutUnit(_graph(traced, part, reads, makes), reads, makes, keeps, tensor)
        begin, known = end + 1, keeps
    return units


def _last_of(nodes: list[fx.Node], tap: str) -> int:
    """Index of the node that ends a submodule's work."""
    # torch.fx marks the second call of a submodule, and what happens inside it, by `@1`.
    calls = [{str(key) for key in node.meta.get("nn_module_stack", {})} for node in nodes]
    inside = [index for index, stack in enumerate(calls) if tap in stack]
    if not inside:
        raise ValueError(f"`taps` must name submodules that do some work, got {tap!r}, which does none.")
    if any(f"{tap}@1" in stack for stack in calls):
        raise ValueError(f"`taps` must name submodules that are called once, got {tap!r}, which is called again.")
    return inside[-1]


def _graph(traced: fx.GraphModule, part: list[fx.Node], reads: list[str], makes: list[str]) -> fx.GraphModule:
    """A module of its own for some nodes; its submodules are those of the whole, not copies."""
    graph = fx.Graph()
    copies = {name: graph.placeholder(name) for name in reads}
    for node in part:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source.name not in copies:
                copies[source.name] = graph.node_copy(source)
        copies[node.name] = graph.node_copy(node, lambda source: copies[source.name])
    graph.output(tuple(copies[name] for name in makes))
    return fx.GraphModule(traced, graph)


@torch.no_grad()
def _shapes(units: OrderedDict[str, Unit], example: Tensor) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shape of one row at every tap, and the number of outputs."""
    # More than one row: a batch size that is handed on as a number would be wrong as soon as a row leaves.
    features: Any = torch.cat([example[:1]] * PROBE)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, unit in units.items():
        features = unit(features)
        for key, value in features.items():
            if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != PROBE:
                raise ValueError(
                    f"`module` must hand on tensors (B, ...) only, got `{key}` after {name!r}, which has no rows. "
                    "Compute it where it is used, or put the tap elsewhere."
                )
        shapes[name] = tuple(unit.tap(features).shape[1:])
    if len(shapes[LAST]) != 1:
        raise ValueError(f"`module` must give logits (B, A), got shape (B, {', '.join(map(str, shapes[LAST]))}).")
    return shapes, shapes[LAST][0]

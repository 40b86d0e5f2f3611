"""Networks whose rows skip units, exported: decisions, answers, exits and costs as `rlexit.runtime.run` has them."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlexit import chains, serve
from rlexit.config import GateConfig
from rlexit.exit_policy import ExitPolicy
from rlexit.export import ExportError, compare, export, server_of
from rlexit.gates import Site, build_gates
from rlexit.gates.layer import FeedForwardGate, RecurrentGate
from rlexit.graphs import stage_graphs
from rlexit.network import StagedNetwork
from rlexit.residual import ResidualUnit
from rlexit.runtime import run
from rlexit.units import ModuleUnit, Unit
from tests.rlexit.served import counted
from tests.rlexit.test_serve import reseal
from tests.rlexit.toys import (
    CHANNELS,
    EXITS,
    MAP,
    OUTPUTS,
    Block,
    conv,
    linear_heads,
    parting,
    residual,
    scatter,
    spread,
)

onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")

SEED = 7
KINDS = ("lstm", "ff1", "ff2", "static")
ROWS = torch.randn(32, *MAP, generator=torch.Generator().manual_seed(1))


def gated(kind: str) -> StagedNetwork:
    """Three blocks, the second with a convolution in its shortcut, whose gates part the rows."""
    torch.manual_seed(SEED)
    network = residual("none", GateConfig(kind, bias=0.0))
    scatter(network)
    with torch.no_grad():
        for _ in range(len(network.gates)):  # one after the other: what a gate sees depends on those before it
            for gate, logits in zip(network.gates.values(), _logits(network), strict=True):
                if isinstance(gate, FeedForwardGate):
                    linear = [layer for layer in gate.modules() if isinstance(layer, torch.nn.Linear)][-1]
                    linear.bias[1] -= logits.sort().values[15:17].mean()
                elif isinstance(gate, RecurrentGate):
                    gate.offset -= logits.sort().values[15:17].mean()
        if kind == "static":
            network.gates["block1"].logit.fill_(-1.0)
            network.gates["block2"].logit.fill_(1.0)
    return network


def _logits(network: StagedNetwork) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    state = network.begin(ROWS)
    while not network.finished(state):
        name = network.unit_names[state.unit]
        if name in network.gates:
            gate: Any = network.gates[name]
            found.append(gate.logits(replace(state, features=network.units[name].glance(state.features)))[0])
        state, decision = network.decide(state)
        state = network.advance(state, decision)
    return found


def actions_of(network: StagedNetwork, policy: ExitPolicy) -> np.ndarray:
    """(B, gates) what `run` decided, -1 where nobody asked."""
    result = run(network, policy, ROWS)
    found = np.full((len(ROWS), len(network.gates)), -1)
    for column, (rows, decision) in enumerate(result.decisions):
        found[rows.numpy(), column] = decision.action.numpy()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exits", [False, True])
def test_a_gated_network_is_served_as_it_runs(tmp_path, kind, exits):
    network = gated(kind)
    policy = parting(network, ROWS) if exits else ExitPolicy.full(EXITS)
    manifest = export(network, policy, ROWS, tmp_path / "export", "onnx", {})
    assert {manifest["parity"][name] for name in ("actions", "exits", "gates", "macs", "unexplained")} == {0}
    wanted, server = run(network, policy, ROWS), serve.load(tmp_path / "export", threads=2)
    got = server.run(ROWS.numpy())
    np.testing.assert_array_equal(got.exits, wanted.exits.numpy())
    np.testing.assert_array_equal(got.macs, wanted.macs.numpy())
    np.testing.assert_allclose(got.answers, wanted.answers.numpy(), atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(got.decisions, actions_of(network, policy)[:, : server.gates])
    if kind != "static":
        assert all({0, 1} <= set(column.tolist()) for column in got.decisions.T)
    assert len(set(got.exits.tolist())) == (EXITS if exits else 1)
    for row, observation in enumerate(ROWS.numpy()):
        assert server.act(observation)[:2] == (int(got.answers[row].argmax()), int(got.exits[row]))


def alike(exits: tuple[str, ...], kind: str) -> StagedNetwork:
    """Four blocks that all keep the features of a row that skips them."""
    torch.manual_seed(SEED)
    units: OrderedDict[str, Unit] = OrderedDict(stem=ModuleUnit(torch.nn.Sequential(conv(), torch.nn.ReLU())))
    units |= {f"block{number}": ResidualUnit(Block(CHANNELS, CHANNELS), "none") for number in range(4)}
    network = StagedNetwork(units, {name: linear_heads(("x",), MAP)["x"] for name in exits}, OUTPUTS)
    sites = [Site(name, CHANNELS, units[name].width) for name in network.unit_names[1:]]
    network.set_gates(build_gates(sites, GateConfig(kind, bias=0.0), Site("stem", CHANNELS)))
    spread(network)
    scatter(network)
    return network.eval()


@pytest.mark.parametrize("kind", ["lstm", "ff1"])
@pytest.mark.parametrize("exits", [("block0", "block1", "block2", "block3"), ("stem", "block1", "block3")])
def test_blocks_that_keep_what_a_row_has_are_served_from_exit_to_exit(tmp_path, kind, exits):
    network = alike(exits, kind)
    policy = parting(network, ROWS)
    export(network, policy, ROWS, tmp_path / "export", "onnx", {})
    wanted, server = run(network, policy, ROWS), serve.load(tmp_path / "export")
    got = server.run(ROWS.numpy())
    assert len(set(got.exits.tolist())) == len(exits)
    np.testing.assert_array_equal(got.exits, wanted.exits.numpy())
    np.testing.assert_array_equal(got.macs, wanted.macs.numpy())
    np.testing.assert_allclose(got.answers, wanted.answers.numpy(), atol=1e-4, rtol=1e-4)
    for row, observation in enumerate(ROWS.numpy()):
        assert server.act(observation)[:2] == (int(got.answers[row].argmax()), int(got.exits[row]))


def test_a_unit_that_a_row_skips_is_not_run(monkeypatch):
    calls = counted(monkeypatch)
    network = gated("lstm")
    policy = parting(network, ROWS)
    server = server_of(network, policy, ROWS)
    for row, observation in enumerate(ROWS.numpy()):
        calls.clear()
        told = server.run(observation[None])
        assert told.exits[0] == run(network, policy, ROWS).exits[row]
        gates = [stage for stage in server.stages if stage.runs is not None]
        for stage, decision in zip(gates, told.decisions[0].tolist(), strict=True):
            assert calls[stage.runs.data] == (decision == 1)
            assert calls[stage.part.data] == (decision >= 0)
            if stage.skips is not None:
                assert calls[stage.skips.data] == (decision == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_gate_adds_to_every_row_s_logit_is_served(kind):
    network, policy = gated(kind), ExitPolicy.full(EXITS)
    for gate, by in zip(network.gates.values(), (50.0, -50.0, 50.0), strict=True):
        gate.shift(by)
    server = server_of(network, policy, ROWS)
    told = server.run(ROWS.numpy())
    assert told.macs.tolist() == run(network, policy, ROWS).macs.tolist()
    assert np.unique(told.decisions, axis=0).tolist() == [[1, 0, 1][: server.gates]]


def test_a_row_that_goes_alone_takes_one_graph_from_exit_to_exit_with_gated_units_in_branches(monkeypatch):
    calls = counted(monkeypatch)
    network = gated("lstm")
    server = server_of(network, parting(network, ROWS), ROWS)
    calls.clear()
    exits = [server.act(observation).exit for observation in ROWS.numpy()]
    leads = [stage.alone or stage.part for stage in server.stages if stage.runs is None]
    assert [calls[part.data] for part in leads] == [sum(exit >= before for exit in exits) for before in range(EXITS)]
    assert sum(calls.values()) == sum(calls[part.data] for part in leads)
    for part in leads:
        nodes = onnx.load_from_string(part.data).graph.node
        ways = [way.g for node in nodes if node.op_type == "If" for way in node.attribute]
        assert len(ways) == 2
        assert sorted(sum(node.op_type == "Conv" for node in way.node) for way in ways) in ([0, 2], [1, 3])
        # Outside of the branches nothing is convolved but by the stem.
        assert sum(node.op_type == "Conv" for node in nodes) == (part is leads[0])


def test_a_plain_shortcut_needs_no_graph_and_one_with_weights_has_one():
    graphs = stage_graphs(gated("lstm"), ExitPolicy.full(EXITS), ROWS[:1])
    ways = {graph.plan.gated: tuple(graph.branches) for graph in graphs if graph.plan.gated}
    assert ways == {"block0": ("runs",), "block1": ("runs", "skips"), "block2": ("runs",)}
    assert [graph.plan.exit for graph in graphs] == [-1, -1, -1, EXITS - 1]


def test_gates_that_decide_alike_for_all_rows_are_asked_by_nobody():
    network = gated("static")
    graphs = stage_graphs(network, ExitPolicy.full(EXITS), ROWS[:1])
    assert [graph.plan.units for graph in graphs] == [("stem", "block0", "block1", "block2")]
    server = server_of(network, ExitPolicy.full(EXITS), ROWS)
    assert server.run(ROWS.numpy()).macs.tolist() == run(network, ExitPolicy.full(EXITS), ROWS).macs.tolist()


def test_stages_that_read_what_no_other_gives_are_refused():
    server = server_of(gated("lstm"), ExitPolicy.full(EXITS), ROWS)
    opened = chains.Opened([part for stage in server.stages for part in stage.parts], "onnxruntime")
    chains.Batch(server.stages, opened)
    for wrong in (server.stages[1:], server.stages[:1] + server.stages[2:]):
        with pytest.raises(serve.ServeError, match="`stages` must hand on what is read, got no"):
            chains.Batch(wrong, opened)


def test_a_tensor_that_two_graphs_give_is_refused():
    policy = parting(alike(("stem", "block1", "block3"), "ff1"), ROWS)
    server = server_of(alike(("stem", "block1", "block3"), "ff1"), policy, ROWS)
    opened = chains.Opened([part for stage in server.stages for part in stage.parts], "onnxruntime")
    with pytest.raises(serve.ServeError, match="`stages` must give every tensor once"):
        chains.Single((server.stages[0], *server.stages), opened)
    with pytest.raises(serve.ServeError, match="`stages` must read an observation"):
        chains.Single((), opened)


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_batches_of_any_size_are_parted(batch):
    network, policy = gated("lstm"), ExitPolicy.full(EXITS)
    told = server_of(network, policy, ROWS).run(ROWS[:batch].numpy())
    np.testing.assert_array_equal(told.macs, run(network, policy, ROWS[:batch]).macs.numpy())


def test_an_export_whose_gates_decide_otherwise_is_noticed():
    network, policy = gated("lstm"), ExitPolicy.full(EXITS)
    server = server_of(network, policy, ROWS)
    gate = network.gates["block0"]
    assert isinstance(gate, RecurrentGate)
    with torch.no_grad():
        gate.core.logit.bias *= -1
        gate.core.logit.weight *= -1
    found = compare(network, policy, server, ROWS)
    assert found.gates > 0
    assert not found.holds


@pytest.mark.parametrize(
    ("kind", "channels"), [("mgl2s", "both"), ("random", "none"), ("policy_net", "none"), ("conv_channel", "block_out")]
)
def test_gates_that_no_chain_of_graphs_can_ask_are_refused_by_name(kind, channels):
    network = residual(channels, GateConfig(kind))
    told = "a channel gate" if kind == "conv_channel" else kind
    with pytest.raises(ExportError, match=f"`gates.kind` must be lstm, ff1, ff2 or static .* got {told} before"):
        stage_graphs(network, ExitPolicy.full(EXITS), ROWS[:1])


def test_one_nested_graph_cannot_skip(tmp_path):
    with pytest.raises(ExportError, match="`--format` onnx-if .* got gates. Use --format onnx"):
        export(gated("lstm"), ExitPolicy.full(EXITS), ROWS, tmp_path / "export", "onnx-if", {})
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda stages: stages[0].update(exit=0),
        lambda stages: stages[1]["skips"]["outputs"][0].update(shape=[CHANNELS]),
        lambda stages: stages[0]["runs"]["outputs"][0].update(shape=[CHANNELS, 1, 1]),
        lambda stages: stages[0]["runs"].update(file="../runs.onnx"),
        lambda stages: stages[0]["outputs"].pop(),
        lambda stages: stages[-1].update(runs=stages[0]["runs"]),
        lambda stages: stages[-1].pop("alone"),
        lambda stages: stages[-1]["alone"]["outputs"][0].update(name="else"),
        lambda stages: stages[1].update(head=stages[0]["runs"]),
        lambda stages: stages[0]["runs"].update(macs=math.inf),
    ],
)
def test_a_gated_manifest_that_claims_nonsense_is_refused(tmp_path, change):
    folder = tmp_path / "export"
    export(gated("ff2"), ExitPolicy.full(EXITS), ROWS, folder, "onnx", {})
    serve.load(folder)
    with pytest.raises((serve.ServeError, ValueError)) as caught:
        reseal(folder, lambda manifest: change(manifest["stages"]))
        serve.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda stages: stages.pop(),
        lambda stages: stages[0].update(macs=-1),
        lambda stages: stages[0]["runs"].update(macs=1 << 63),
        lambda stages: stages[-1]["alone"]["outputs"][0].update(shape=[OUTPUTS + 1]),
        lambda stages: [stage.update(bytes=1 << 29) for stage in stages],
    ],
)
def test_a_gated_manifest_is_refused_before_a_graph_is_read(tmp_path, change):
    folder = tmp_path / "export"
    export(gated("ff2"), ExitPolicy.full(EXITS), ROWS, folder, "onnx", {})
    reseal(folder, lambda manifest: change(manifest["stages"]))
    for file in folder.glob("*.onnx"):
        file.unlink()
    with pytest.raises(serve.ServeError, match="no manifest of an export"):
        serve.load(folder)


def nodes_of(graph):
    """All nodes, those of branches too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes_of(attribute.g)


def test_conditions_of_branches_have_one_dimension_as_openvino_wants_them(tmp_path):
    network = gated("lstm")
    export(network, parting(network, ROWS), ROWS, tmp_path / "export", "onnx", {})
    seen = 0
    for path in (tmp_path / "export").glob("*.onnx"):
        model = onnx.shape_inference.infer_shapes(onnx.load(path))
        ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in model.graph.value_info}
        conditions = [node.input[0] for node in nodes_of(model.graph) if node.op_type == "If"]
        assert all(ranks[name] <= 1 for name in conditions)
        seen += len(conditions)
    assert seen


def test_openvino_serves_a_gated_export_too(tmp_path):
    pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    network = gated("lstm")
    export(network, parting(network, ROWS), ROWS, tmp_path / "export", "onnx", {})
    wanted, got = (
        serve.load(tmp_path / "export", runtime=name).run(ROWS.numpy()) for name in ("onnxruntime", "openvino")
    )
    np.testing.assert_array_equal(got.exits, wanted.exits)
    np.testing.assert_array_equal(got.decisions, wanted.decisions)
    np.testing.assert_allclose(got.answers, wanted.answers, atol=1e-4)

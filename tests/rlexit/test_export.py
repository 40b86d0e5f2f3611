from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from rlexit import exported, serve
from rlexit.config import HeadConfig
from rlexit.ensembles import ensembles
from rlexit.exit_policy import ExitPolicy
from rlexit.export import ExportError, compare, export
from rlexit.graphs import _trace, check_exportable, plan_stages, stage_graphs
from rlexit.heads import PooledConvHead
from rlexit.network import StagedNetwork
from rlexit.rewrites import PlainOperators, RewrittenHead
from rlexit.runtime import run
from tests.rlexit.toys import EXITS, OUTPUTS, SCORERS, TOYS, parting, staged

onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")

ROWS = TOYS["cascade"].inputs(32)


def toy(cascade: bool = True, ensemble: str = "geometric") -> StagedNetwork:
    """Exits that agree on some rows: untrained, each would have one favourite for all of them."""
    torch.manual_seed(3)
    network = staged(cascade, ensembles[ensemble](EXITS - 1, OUTPUTS))
    with torch.no_grad():
        for exit in range(EXITS):
            logits = network(ROWS).logits[:, exit]
            linear = [module for module in network.head(exit).modules() if isinstance(module, torch.nn.Linear)][-1]
            linear.bias -= logits.mean(dim=0)
    return network


def policy_of(network: StagedNetwork, rule: str) -> ExitPolicy:
    """Thresholds by which some rows leave at every exit where they can."""
    return ExitPolicy(rule, (1.0, 1.0)) if rule == "patience" else parting(network, ROWS, rule)


# ---- parity ----


@pytest.mark.parametrize("rule", SCORERS)
@pytest.mark.parametrize(("cascade", "ensemble"), [(False, "none"), (True, "geometric"), (True, "additive")])
def test_an_export_acts_as_the_network_does(tmp_path, cascade, ensemble, rule):
    network = toy(cascade, ensemble)
    policy = policy_of(network, rule)
    manifest = export(network, policy, ROWS, tmp_path / "export", "onnx", {})
    assert manifest["parity"]["rows"] == 32
    assert (manifest["parity"]["exits"], manifest["parity"]["actions"]) == (0, 0)
    server = serve.load(tmp_path / "export")
    wanted, got = run(network, policy, ROWS), server.run(ROWS.numpy())
    assert len(set(got.exits.tolist())) > 1
    np.testing.assert_array_equal(got.exits, wanted.exits.numpy())
    np.testing.assert_allclose(got.answers, wanted.answers.numpy(), atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(got.scores, wanted.scores.numpy(), atol=1e-4)


@pytest.mark.parametrize("rule", SCORERS)
def test_the_nested_graph_acts_as_the_stages_do(tmp_path, rule):
    network = toy()
    policy = policy_of(network, rule)
    export(network, policy, ROWS, tmp_path / "if", "onnx-if", {})
    server = serve.load(tmp_path / "if")
    wanted = run(network, policy, ROWS)
    actions, exits, _ = server.act(ROWS.numpy())
    np.testing.assert_array_equal(exits, wanted.exits.numpy())
    np.testing.assert_array_equal(actions, wanted.answers.argmax(dim=1).numpy())
    assert [server.act(row.numpy())[1] for row in ROWS] == wanted.exits.tolist()
    assert [path.name for path in sorted((tmp_path / "if").iterdir())] == ["manifest.json", "policy.onnx"]


def test_features_may_be_a_tree():
    network, rows = TOYS["multi_scale"].network(), TOYS["multi_scale"].inputs(16)
    graphs = stage_graphs(network, parting(network, rows), rows[:1])
    assert [len(graph.inputs) > 1 for graph in graphs] == [False, True, True]


def test_an_export_of_a_tree_acts_as_the_network_does(tmp_path):
    network, rows = TOYS["multi_scale"].network(), TOYS["multi_scale"].inputs(16)
    parity = export(network, parting(network, rows), rows, tmp_path / "export", "onnx", {})["parity"]
    assert (parity["exits"], parity["actions"], parity["unexplained"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("thresholds", "built"),
    [
        ((math.inf, math.inf), [(("conv0", "conv1", "conv2"), (2,))]),
        ((0.5, math.inf), [(("conv0",), (0,)), (("conv1", "conv2"), (2,))]),
        ((math.inf, 0.5), [(("conv0", "conv1"), (0, 1)), (("conv2",), (2,))]),
        ((-math.inf, 0.5), [(("conv0",), (0,)), (("conv1",), (1,)), (("conv2",), (2,))]),
    ],
)
def test_a_closed_exit_ends_no_stage_and_its_head_is_built_only_where_it_is_read(tmp_path, thresholds, built):
    network, policy = toy(), ExitPolicy("confidence", thresholds)
    assert [(plan.units, plan.exits) for plan in plan_stages(network, policy)] == built
    export(network, policy, ROWS, tmp_path / "export", "onnx", {})
    np.testing.assert_array_equal(
        serve.load(tmp_path / "export").run(ROWS.numpy()).exits, run(network, policy, ROWS).exits.numpy()
    )


def test_the_manifest_says_what_leaving_costs(tmp_path):
    network = toy()
    policy = parting(network, ROWS)
    manifest = export(network, policy, ROWS, tmp_path / "export", "onnx", {"task": "toy"})
    result = run(network, policy, ROWS)
    for exit in range(EXITS):
        assert manifest["macs"][str(exit)] == int(result.macs[result.exits == exit][0])
    assert manifest["task"] == "toy"
    assert manifest["rule"] == "confidence"
    assert exported.read_manifest(tmp_path / "export")["observation"] == {"shape": [4, 8, 8], "dtype": "uint8"}


@pytest.mark.parametrize("cascade", [False, True])
@pytest.mark.parametrize(
    ("size", "side"), [((5, 5), 4), ((2, 2), 4), ((4, 4), 4), ((7, 5), 4), ((3, 3), 4), ((9, 9), 3)]
)
def test_a_rewritten_head_gives_the_logits_of_the_original(size, side, cascade):
    torch.manual_seed(0)
    head = PooledConvHead((2, *size), OUTPUTS, HeadConfig(stride=0, pool=side), cascade)
    given = (torch.randn(3, 2, *size), *([torch.randn(3, OUTPUTS)] if cascade else []))
    torch.testing.assert_close(RewrittenHead(head, size)(*given), head(*given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("rule", "kept"), [("confidence", False), ("patience", True)])
def test_the_ensemble_is_part_of_the_last_linear_layer_of_its_exit(rule, kept):
    network = toy()
    graphs = stage_graphs(network, policy_of(network, rule), ROWS[:1])
    operators = [[node.op_type for node in onnx.load_from_string(graph.data).graph.node] for graph in graphs]
    assert [names.count("Gemm") for names in operators] == [1, 1, 1]
    assert "Split" in operators[0]  # a cascade reads the first head's own logits
    assert ("Split" in operators[1]) is kept
    if not kept:
        assert not {"Add", "Mul"} & {name for names in operators for name in names}


@pytest.mark.parametrize(
    "call",
    [
        lambda features: functional.adaptive_avg_pool2d(features, 3),
        lambda features: functional.adaptive_avg_pool2d(features, output_size=3),
        lambda features: functional.adaptive_avg_pool2d(features, output_size=(3, 2)),
        lambda features: functional.pad(features, (0, 0, 0, 0, 1, 2)),
        lambda features: functional.pad(features, pad=(0, 0, 0, 0, 1, 2)),
        lambda features: functional.pad(features, (0, 0, 0, 0, 4, 9)),
        lambda features: functional.pad(features, (0, 0, 0, 0, -1, 2)),
        lambda features: functional.pad(features, (0, 0, 0, 0, 1, 2), value=1.0),
        lambda features: functional.pad(features, (0, 0, 0, 0, 1, 2), "constant", 1.0),
    ],
)
def test_plain_operators_say_the_same_however_they_are_asked(call):
    features = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    with PlainOperators():
        found = call(features)
    torch.testing.assert_close(found, call(features))


def test_channels_are_padded_without_an_operator_that_makes_sizes():
    class Padded(torch.nn.Module):
        def forward(self, features):
            return functional.pad(features, (0, 0, 0, 0, 2, 7))

    rows = torch.randn(2, 3, 5, 4)
    data = _trace(Padded(), (rows,), ["rows"], ["padded"])
    assert {node.op_type for node in onnx.load_from_string(data).graph.node} <= {"Concat", "Constant", "Mul", "Slice"}


def test_frames_are_converted_outside_of_the_first_graph():
    network = toy()
    graph = stage_graphs(network, ExitPolicy.full(EXITS), ROWS[:1])[0]
    assert [(port.name, port.dtype) for port in graph.inputs] == [("observation", "float32")]
    assert "Cast" not in {node.op_type for node in onnx.load_from_string(graph.data).graph.node}


# ---- what is refused ----


@pytest.mark.parametrize("name", ["skips", "widths", "pixels", "carried_gate"])
def test_gates_that_no_graph_can_ask_are_refused(name):
    with pytest.raises(ExportError, match=r"`gates.kind` must be lstm, ff1, ff2 or static .* got .*Gate before"):
        check_exportable(TOYS[name].network())


def test_networks_with_memory_are_refused():
    with pytest.raises(ExportError, match="must keep nothing but answers between env steps"):
        check_exportable(TOYS["memory"].network())


def test_an_export_that_acts_otherwise_is_not_written(tmp_path, monkeypatch):
    network = toy()
    policy = parting(network, ROWS)
    folder = tmp_path / "export"
    export(network, policy, ROWS, folder, "onnx", {})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = TOYS["cascade"].network()
    with torch.no_grad():
        other.head(0).linear.bias += torch.tensor([9.0, 0, 0, 0, 0])
    graphs = stage_graphs(other, policy, ROWS[:1])
    monkeypatch.setattr("rlexit.export.stage_graphs", lambda *_: graphs)
    with pytest.raises(ExportError, match=r"must act as the network does, got 32 rows: \d+ with another exit"):
        export(network, policy, ROWS, folder, "onnx", {})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_row_on_the_threshold_may_be_told_otherwise_and_is_counted(tmp_path):
    network = toy()
    policy = parting(network, ROWS)
    export(network, policy, ROWS, tmp_path / "export", "onnx", {})
    scores = run(network, policy, ROWS).scores[:, 0]
    moved = ExitPolicy("confidence", (float(scores[0]) + 2e-5, policy.thresholds[1]))
    server = serve.load(tmp_path / "export", thresholds=(float(scores[0]) - 2e-5, policy.thresholds[1]))
    found = compare(network, moved, server, ROWS)
    assert (found.exits, found.unexplained) == (1, 0)
    assert 1e-5 < found.furthest < 3e-5
    assert found.holds
    far = ExitPolicy("confidence", (float(scores[0]) + 2e-2, policy.thresholds[1]))
    assert not compare(network, far, server, ROWS).holds


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("you")
    with pytest.raises(ExportError, match="must be empty or hold an export"):
        export(toy(), ExitPolicy.full(EXITS), ROWS, tmp_path / "letters", "onnx", {})
    assert (tmp_path / "letters" / "dear.txt").read_text() == "you"

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlexit import chains, exported, onnxfile, serve
from rlexit.backends import MissingExtra
from rlexit.ensembles import ensembles
from rlexit.export import export
from rlexit.exported import ServeError
from rlexit.runtime import run
from tests.rlexit.served import counted
from tests.rlexit.toys import EXITS, OUTPUTS, TOYS, parting, staged

onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")

ROWS = TOYS["cascade"].inputs(32)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    torch.manual_seed(3)
    network = staged(True, ensembles["geometric"](EXITS - 1, OUTPUTS))
    folder = tmp_path_factory.mktemp("served") / "export"
    export(network, parting(network, ROWS), ROWS, folder, "onnx", {})
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy that a test may spoil."""
    copied = tmp_path / "export"
    copied.mkdir()
    for path in made.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    return copied


def reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a manifest as whoever wrote it could: with a right hash."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    change(manifest)
    manifest["sha256"] = exported.digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def replace_graph(folder: Path, data: bytes) -> None:
    """Puts another first graph in place, with a right hash."""
    (folder / "stage0.onnx").write_bytes(data)
    reseal(folder, lambda manifest: manifest["stages"][0].update(bytes=len(data), sha256=_sha256(data)))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(ServeError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("`")
    return text


# ---- what works ----


def test_one_observation_is_told_what_its_row_in_a_batch_is_told(made):
    server = serve.load(made)
    actions, exits, confidences = server.act(ROWS.numpy())
    assert len(set(exits.tolist())) == EXITS
    for row, observation in enumerate(ROWS.numpy()):
        action, exit, confidence = server.act(observation)
        assert (action, exit) == (actions[row], exits[row])
        assert confidence == pytest.approx(confidences[row], abs=1e-6)
        assert (type(action), type(exit), type(confidence)) == (int, int, float)


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_batches_of_any_size_are_served(made, batch):
    served = serve.load(made).run(ROWS[:batch].numpy())
    assert (served.answers.shape, served.exits.shape) == ((batch, OUTPUTS), (batch,))


@pytest.mark.parametrize("batch", [1, 15, 16, 17, 32])
def test_rows_dealt_to_threads_and_blocks_are_told_what_they_are_told_in_one_piece(made, monkeypatch, batch):
    whole = serve.load(made).run(ROWS[:batch].numpy())
    monkeypatch.setattr(chains, "BLOCK_BYTES", 1)
    monkeypatch.setattr(chains, "LEAST_BLOCK", 5)
    monkeypatch.setattr(serve, "LEAST_BLOCK", 5)
    for threads in (1, 2, 3):
        server = serve.load(made, threads=threads)
        for _ in range(2):  # the buffers of the first call are used again
            parts = server.run(ROWS[:batch].numpy())
            np.testing.assert_array_equal(parts.exits, whole.exits)
            np.testing.assert_allclose(parts.answers, whole.answers, atol=1e-5)
            np.testing.assert_allclose(parts.scores, whole.scores, atol=1e-5)


def test_a_batch_leaves_the_observations_as_they_are(made):
    given = ROWS.numpy().copy()
    serve.load(made).act(given)
    np.testing.assert_array_equal(given, ROWS.numpy())


def test_openvino_serves_what_onnxruntime_serves(made):
    pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    wanted, server = serve.load(made).run(ROWS.numpy()), serve.load(made, runtime="openvino", threads=2)
    got = server.run(ROWS.numpy())
    np.testing.assert_array_equal(got.exits, wanted.exits)
    np.testing.assert_allclose(got.answers, wanted.answers, atol=1e-4)
    assert [server.act(row)[1] for row in ROWS.numpy()] == wanted.exits.tolist()


def test_another_runtime_is_named_with_what_there_is_or_its_extra(made, monkeypatch):
    assert "must be one of onnxruntime, openvino, got 'tensorrt'" in refusal(
        lambda: serve.load(made, runtime="tensorrt")
    )
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtra, match=r"pip install 'rlexit\[openvino\]'"):
        serve.load(made, runtime="openvino")


def test_other_thresholds_lead_to_other_exits(made):
    limits = {0: (-np.inf, 2.0), 1: (2.0, -np.inf), 2: (2.0, 2.0)}
    for exit, thresholds in limits.items():
        server = serve.load(made, thresholds=thresholds)
        assert set(server.act(ROWS.numpy()).exits.tolist()) == {exit}
        assert server.act(ROWS[3].numpy()).exit == exit
        assert set(server.with_thresholds(limits[0]).act(ROWS.numpy()).exits.tolist()) == {0}


def test_as_many_thresholds_as_early_exits_are_taken(made):
    server = serve.load(made)
    for limits in ((0.5,), (0.5,) * EXITS, (np.nan,) * (EXITS - 1)):
        for call in (partial(serve.load, made, thresholds=limits), partial(server.with_thresholds, limits)):
            assert f"`thresholds` must be {EXITS - 1} numbers" in refusal(call)


def test_a_later_graph_is_not_run_for_a_row_that_left(made, monkeypatch):
    calls = counted(monkeypatch)
    server = serve.load(made, thresholds=(-np.inf, 2.0))
    assert server.act(ROWS[0].numpy()).exit == 0
    assert set(server.act(ROWS.numpy()).exits.tolist()) == {0}
    later = [calls[part.data] for stage in server.stages[1:] for part in stage.parts]
    assert (calls[server.stages[0].part.data], later) == (2, [0, 0])


def test_serving_imports_neither_torch_nor_onnx(made):
    program = (
        "import sys; from pathlib import Path; import numpy as np; from rlexit import serve\n"
        f"server = serve.load(Path({str(made)!r}))\n"
        "server.act(np.zeros((4, 8, 8), dtype=np.uint8))\n"
        "found = {'torch', 'onnx', 'onnxscript', 'jaxtyping', 'stable_baselines3'} & set(sys.modules)\n"
        "sys.exit(' '.join(sorted(found)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# ---- observations that do not fit ----


@pytest.mark.parametrize(
    ("observation", "told"),
    [
        (np.zeros((4, 8, 9), dtype=np.uint8), "must be (4, 8, 8), or (B, ...) of it, got (4, 8, 9)"),
        (np.zeros((8, 8), dtype=np.uint8), "got (8, 8)"),
        (np.zeros((1, 1, 4, 8, 8), dtype=np.uint8), "got (1, 1, 4, 8, 8)"),
        (np.zeros((4, 8, 8), dtype=np.float32), "must be a NumPy array of uint8, got float32"),
        (np.zeros((4, 8, 8), dtype=np.int64), "got int64"),
    ],
)
def test_an_observation_that_does_not_fit_is_refused_in_one_line(made, observation, told):
    assert told in refusal(lambda: serve.load(made).act(observation))


def test_floats_must_be_finite(tmp_path):
    network, rows = TOYS["multi_scale"].network(), TOYS["multi_scale"].inputs(8)
    export(network, parting(network, rows), rows, tmp_path / "export", "onnx", {})
    spoilt = rows.numpy().copy()
    spoilt[2, 0, 0, 0] = np.nan
    server = serve.load(tmp_path / "export")
    assert "must be finite" in refusal(lambda: server.act(spoilt))
    assert "must be finite" in refusal(lambda: server.act(spoilt[2]))


def test_other_thresholds_must_fit(made):
    for wrong in [(0.5,), (0.5, np.nan), ()]:
        assert "must be 2 numbers" in refusal(lambda wrong=wrong: serve.load(made, thresholds=wrong))


# ---- files that are not what was written ----


@pytest.mark.parametrize("name", ["stage0.onnx", "stage2.onnx", "manifest.json"])
def test_a_changed_byte_is_noticed(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    assert "export again" in refusal(lambda: serve.load(folder)).lower()


@pytest.mark.parametrize("name", ["stage1.onnx", "manifest.json"])
def test_a_missing_or_cut_file_is_named(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:-7])
    assert name in refusal(lambda: serve.load(folder))
    (folder / name).unlink()
    assert f"{name}` is missing" in refusal(lambda: serve.load(folder))


def test_an_export_of_a_newer_rlexit_is_refused(folder):
    reseal(
        folder, lambda manifest: manifest.update(schema_version=exported.SCHEMA_VERSION + 1, stages="of another kind")
    )
    assert "Update rlexit" in refusal(lambda: serve.load(folder))


@pytest.mark.parametrize("version", [1, 2])
def test_an_export_of_an_older_rlexit_is_served(made, folder, version):
    def older(manifest: dict[str, Any]) -> None:
        manifest["schema_version"] = version
        for stage in manifest["stages"]:
            del stage["macs"]

    reseal(folder, older)
    wanted, got = serve.load(made).run(ROWS.numpy()), serve.load(folder).run(ROWS.numpy())
    for mine, theirs in zip(wanted, got, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_links_and_pipes_are_not_followed(folder, tmp_path):
    (folder / "stage0.onnx").rename(tmp_path / "elsewhere")
    (folder / "stage0.onnx").symlink_to(tmp_path / "elsewhere")
    assert "cannot be read" in refusal(lambda: serve.load(folder))
    (folder / "stage0.onnx").unlink()
    os.mkfifo(folder / "stage0.onnx")
    assert "regular file" in refusal(lambda: serve.load(folder))


@pytest.mark.parametrize(
    "change",
    [
        {"exits": 10**9},
        {"outputs": -1},
        {"outputs": True},
        {"stages": []},
        {"stages": {}},
        {"thresholds": [0.5]},
        {"thresholds": None},
        {"format": "../onnx"},
        {"observation": {"shape": [10**9, 10**9], "dtype": "uint8"}},
        {"observation": {"shape": [4, 8, 8], "dtype": "object"}},
        {"observation": {"shape": [4, -8, 8], "dtype": "uint8"}},
    ],
)
def test_a_manifest_that_claims_nonsense_is_refused(folder, change):
    reseal(folder, lambda manifest: manifest.update(change))
    refusal(lambda: serve.load(folder))


@pytest.mark.parametrize("name", ["../export/stage0.onnx", "/etc/passwd", "", "a\0b", "stage 0.onnx"])
def test_a_graph_lies_in_the_folder_under_a_plain_name(folder, name):
    reseal(folder, lambda manifest: manifest["stages"][0].update(file=name))
    assert "no manifest" in refusal(lambda: serve.load(folder))


@pytest.mark.parametrize(
    ("place", "shape"), [("inputs", [9, 8, 8]), ("outputs", [1, 1]), ("inputs", [4.0]), ("outputs", [0])]
)
def test_buffers_of_another_shape_than_the_graph_s_are_refused(folder, place, shape):
    reseal(folder, lambda manifest: manifest["stages"][1][place][0].update(shape=shape))

    def use() -> None:
        serve.load(folder, thresholds=(2.0, 2.0)).act(ROWS[0].numpy())

    refusal(use)


def test_a_graph_does_not_write_past_a_buffer_that_is_too_small_for_it(folder):
    def shrink(manifest: dict[str, Any]) -> None:
        manifest["stages"][0]["outputs"][0]["shape"] = [4, 8, 1]
        manifest["stages"][1]["inputs"][0]["shape"] = [4, 8, 1]

    reseal(folder, shrink)
    assert "must run on one row" in refusal(lambda: serve.load(folder, thresholds=(2.0, 2.0)).act(ROWS[0].numpy()))


def graph_of(*nodes: Any, tensors: tuple[Any, ...] = (), domain: str = "") -> bytes:
    helper = onnx.helper
    entering = [helper.make_tensor_value_info("observation", onnx.TensorProto.UINT8, ["batch", 4, 8, 8])]
    leaving = [helper.make_tensor_value_info("answer", onnx.TensorProto.FLOAT, ["batch", OUTPUTS])]
    graph = helper.make_graph(list(nodes), "evil", entering, leaving, list(tensors))
    opsets = [helper.make_opsetid("", 18), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets).SerializeToString()


def node(kind: str, **settings: Any) -> Any:
    return onnx.helper.make_node(kind, ["observation"], ["answer"], **settings)


def test_an_operator_that_is_not_known_is_refused(folder):
    replace_graph(folder, graph_of(node("Loop")))
    assert "must use known operators only, got 'Loop'" in refusal(lambda: serve.load(folder))


def test_an_operator_inside_a_branch_is_seen(folder):
    inner = onnx.helper.make_graph([node("Scan")], "inner", [], [])
    replace_graph(folder, graph_of(node("If", then_branch=inner, else_branch=inner)))
    assert "got 'Scan'" in refusal(lambda: serve.load(folder))


def test_operators_of_another_domain_are_refused(folder):
    for data in (graph_of(node("Relu", domain="com.evil")), graph_of(node("Relu"), domain="com.evil")):
        replace_graph(folder, data)
        assert "another domain" in refusal(lambda: serve.load(folder))


def test_external_data_is_refused(folder):
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../etc/passwd")
    constant = onnx.helper.make_node("Constant", [], ["answer"], value=tensor)
    for data in (graph_of(node("Relu"), tensors=(tensor,)), graph_of(constant)):
        replace_graph(folder, data)
        assert "external data" in refusal(lambda: serve.load(folder))


def test_functions_of_its_own_are_refused(folder):
    model = onnx.ModelProto.FromString(graph_of(node("Relu")))
    model.functions.add(name="Relu", domain="")
    replace_graph(folder, model.SerializeToString())
    assert "functions" in refusal(lambda: serve.load(folder))


def test_a_graph_that_onnxruntime_refuses_is_one_line(folder):
    replace_graph(folder, graph_of(node("Relu", alpha=3.0)))
    assert "graphs that onnxruntime runs" in refusal(lambda: serve.load(folder))


def test_a_graph_with_other_inputs_than_it_says_is_refused(folder):
    replace_graph(folder, (folder / "stage2.onnx").read_bytes())
    assert "inputs and outputs that the manifest says" in refusal(lambda: serve.load(folder))


@pytest.mark.parametrize("seed", range(20))
def test_any_bytes_are_read_or_refused(made, seed):
    generator = np.random.default_rng(seed)
    data = bytearray((made / "stage0.onnx").read_bytes()[: int(generator.integers(1, 4000))])
    for _ in range(int(generator.integers(1, 30))):
        data[generator.integers(len(data))] = generator.integers(256)
    with contextlib.suppress(onnxfile.OnnxFileError):
        assert onnxfile.operators(bytes(data)) <= onnxfile.OPERATORS


def test_without_onnxruntime_the_extra_is_named(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"pip install 'rlexit\[export\]'"):
        serve.load(made)


def test_what_is_served_is_what_the_network_does(made):
    torch.manual_seed(3)
    network = staged(True, ensembles["geometric"](EXITS - 1, OUTPUTS))
    result = run(network, parting(network, ROWS), ROWS)
    actions, exits, _ = serve.load(made).act(ROWS.numpy())
    np.testing.assert_array_equal(exits, result.exits.numpy())
    np.testing.assert_array_equal(actions, result.answers.argmax(dim=1).numpy())

"""Classifiers in onnxruntime: cascades and ensembles under every rule, from the verbs to the served answers."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from rlexit import checkpoint, contenders, deploy, serve, verbs
from rlexit.config import METHODS as KINDS
from rlexit.domain import Watch
from rlexit.exit_policy import ExitPolicy
from rlexit.export import export
from rlexit.graphs import ExportError
from rlexit.interrupts import StopFlag
from rlexit.rows import read_latency
from rlexit.rules import rules
from rlexit.runtime import run
from rlexit.session import Session, learnt, load_network
from tests.vision.small_images import SMALL
from vision.domain import domain

pytest.importorskip("onnx", reason="the extra `export` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")

METHODS = ("ztw", "sdn")
SCORED = [name for name in rules if name != "learned"]


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Session:
    root = tmp_path_factory.mktemp("runs") / "images"
    quick = replace(SMALL, methods=(*METHODS, "static"), distill=replace(SMALL.distill, steps=128, ensemble_steps=64))
    made = Session(domain(quick), root, 0, Console(quiet=True), StopFlag())
    verbs.train(made)
    for method in quick.methods:
        verbs.distill(made, method)
    verbs.calibrate(made, "ztw")
    return made


def rows_of(session: Session) -> torch.Tensor:
    network = load_network(session, "ztw")[""]
    return session.domain.rows(network, ExitPolicy.full(network.exits), 64, Watch())


@pytest.mark.parametrize("rule", SCORED)
@pytest.mark.parametrize("method", METHODS)
def test_a_classifier_is_served_as_it_runs(session, tmp_path, method, rule):
    network, rows = load_network(session, method)[""], rows_of(session)
    scores = run(network, ExitPolicy(rule, (1e30,) * (network.exits - 1)), rows).scores[:, :-1]
    middle = torch.full_like(scores[0], 1.0) if rule == "patience" else scores.quantile(0.6, dim=0)
    policy = ExitPolicy(rule, tuple(middle.tolist()))
    manifest = export(network, policy, rows, tmp_path / "export", "onnx", {})
    assert (manifest["parity"]["rows"], manifest["parity"]["unexplained"]) == (len(rows), 0)
    wanted, server = run(network, policy, rows), serve.load(tmp_path / "export", threads=2)
    got = server.run(rows.numpy())
    assert len(set(got.exits.tolist())) > 1
    np.testing.assert_array_equal(got.exits, wanted.exits.numpy())
    np.testing.assert_allclose(np.exp(got.answers), wanted.answers.exp().numpy(), atol=1e-4)
    assert [server.act(row)[1] for row in rows.numpy()[:8]] == wanted.exits[:8].tolist()


def test_the_verb_checks_every_held_out_image_once(session):
    path = deploy.export_method(session, "ztw", "onnx", None, None, 1000)
    manifest = json.loads((path / "manifest.json").read_bytes())
    held_out = len(session.domain.data.evaluated("calibration"))
    assert manifest["parity"]["rows"] == held_out
    assert manifest["observation"] == {"shape": [3, 8, 8], "dtype": "uint8"}
    assert manifest["task"] == session.domain.task


def test_bench_times_a_classifier_alone_and_in_batches_and_it_has_no_loop(session):
    path = deploy.bench(session, "ztw", None, 4, 1, ("eager", "onnxruntime"), (8,))
    found = {(row.runtime, row.method, row.batch) for row in read_latency(path)}
    for runtime in (contenders.EAGER, contenders.ORT):
        for method in ("teacher", "ztw", "static"):
            assert {(runtime, method, 1), (runtime, method, 8)} <= found
    assert not any(runtime.endswith(contenders.LOOP) for runtime, _, _ in found)


def test_a_classifier_whose_images_skip_blocks_is_exported_and_timed(session, tmp_path):
    skipping = replace(session.domain.config, methods=("layer_gates",))
    other = Session(domain(skipping), tmp_path / "gated", 0, Console(quiet=True), StopFlag())
    checkpoint.save(other.teacher, "teacher", *checkpoint.load(session.teacher, "teacher"))
    torch.manual_seed(2)
    network = other.domain.network(other.teacher, KINDS["layer_gates"])
    with torch.no_grad():
        for gate in network.gates.values():
            gate.embed.weight.normal_(std=10.0)
        next(iter(network.gates.values())).core.logit.bias.zero_()
    tensors = {f"/{key}": value for key, value in learnt(other, network, "layer_gates").items()}
    checkpoint.save(other.method("layer_gates"), "policy", tensors, {})
    assert deploy.subject(other, "layer_gates", "gates")[1] == deploy.subject(other, "layer_gates", None)[1]
    path = deploy.export_method(other, "layer_gates", "onnx", None, None, 64)
    parity = json.loads((path / "manifest.json").read_bytes())["parity"]
    assert (path.name, parity["unexplained"], parity["gates"], parity["macs"]) == ("gates", 0, 0, 0)
    decisions = serve.load(path).run(rows_of(session).numpy()).decisions
    assert {0, 1} <= set(decisions.flatten().tolist())
    table = read_latency(deploy.bench(other, "layer_gates", None, 4, 1, ("eager", "onnxruntime"), (8,)))
    found = {(row.runtime, row.method, row.label, row.batch) for row in table}
    for runtime in (contenders.EAGER, contenders.ORT):
        assert {(runtime, "teacher", "full", 1), (runtime, "layer_gates", "gates", 8)} <= found


def test_sb3_opens_no_classifier(session):
    with pytest.raises(ExportError, match="`--format` sb3 is for policies"):
        deploy.export_method(session, "ztw", "sb3", None, None, 1)


def test_exits_of_another_network_are_not_exported(session, tmp_path):
    tensors, facts = checkpoint.load(session.method("ztw"), "policy")
    name = next(iter(tensors))
    other = Session(session.domain, tmp_path / "other", 0, Console(quiet=True), StopFlag())
    checkpoint.save(other.teacher, "teacher", *checkpoint.load(session.teacher, "teacher"))
    checkpoint.save(other.method("ztw"), "policy", {**tensors, name: tensors[name].reshape(-1)[:-1]}, facts)
    with pytest.raises(checkpoint.CheckpointError, match="holds exits of another network"):
        deploy.export_method(other, "ztw", "onnx", "exit 0", None, 1)
    assert not (other.method("ztw") / "export").exists()

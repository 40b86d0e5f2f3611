"""`rlexit export` and `rlexit bench` on the toy domain, from the command line."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rlexit import bench, checkpoint, contenders, deploy, exported, serve, verbs
from rlexit.cli import main
from rlexit.domain import Watch
from rlexit.exit_policy import ExitPolicy
from rlexit.rows import Row, read_latency, write_rows
from rlexit.runtime import run
from rlexit.session import EXIT_POLICIES, Session, load_network, weights_hash
from tests.rlexit import toy_domain as toy

pytest.importorskip("onnx", reason="the extra `export` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")

LABEL = "target_macs=0.8"
Say = Callable[..., tuple[int, str, str]]


def calibrated(session: Session, method: str = "ztw") -> ExitPolicy:
    """Puts an exit policy by which some rows leave at every exit where calibration would put one."""
    folder = session.method(method)
    network = load_network(session, method)[""]
    rows = session.domain.rows(network, ExitPolicy.full(3), 1, Watch())
    scores = run(network, ExitPolicy("confidence", (2.0, 2.0)), rows).scores
    policy = ExitPolicy("confidence", tuple(scores[:, :2].median(dim=0).values.tolist()), LABEL, {"target": LABEL})
    facts = {"policies": [policy.to_json()], "missed": [], "policy": weights_hash(folder, "policy")}
    checkpoint.save(folder, EXIT_POLICIES, {}, facts)
    return policy


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "toy"
    session = toy.session(root)
    verbs.train(session)
    verbs.distill(session, "ztw")
    verbs.distill(session, "static")
    calibrated(session)
    return root


@pytest.fixture
def root(trained, tmp_path, monkeypatch) -> Path:
    """A copy of it as `runs/toy` of the working directory."""
    toy.register(monkeypatch)
    monkeypatch.chdir(tmp_path)
    for name, data in toy.files(trained).items():
        path = Path("runs/toy") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return Path("runs/toy")


@pytest.fixture
def say(root, monkeypatch, capsys) -> Say:
    def tell(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["rlexit", *words])
        code = main(words)
        out, err = capsys.readouterr()
        return code, out, err

    return tell


def refusal(answer: tuple[int, str, str]) -> str:
    code, out, err = answer
    assert code == 2, (out, err)
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    return err


# ---- export ----


def test_export_writes_what_serve_plays_as_run_does(say, root):
    code, out, err = say("export", "runs/toy", "--threads", "1", "--rows", "256")
    assert (code, err) == (0, "")
    folder = root / "ztw" / "s0" / "export" / LABEL
    assert f"export     {folder}" in out
    assert "256 held-out rows: 0 other actions, 0 other exits" in out
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "stage0.onnx",
        "stage1.onnx",
        "stage2.onnx",
    ]
    session = toy.session(root)
    network = load_network(session, "ztw")[""]
    rows = torch.cat([toy.observations(seed)[0] for seed in range(40, 60)])
    wanted = run(network, deploy.subject(session, "ztw", None)[1], rows)
    actions, exits, _ = serve.load(folder).act(rows.numpy())
    np.testing.assert_array_equal(exits, wanted.exits.numpy())
    np.testing.assert_array_equal(actions, wanted.answers.argmax(dim=1).numpy())


@pytest.mark.parametrize(
    ("words", "files"),
    [
        (("--format", "onnx-if"), {"ztw/s0/export/target_macs=0.8-if": 1}),
        (("--method", "teacher"), {"teacher/export/full": 1}),
        (("--method", "static", "--policy", "width 0.25"), {"static/s0/export/width_0.25": 1}),
        (("--policy", "exit 1", "--to", "elsewhere/it"), {"../../elsewhere/it": 2}),
        (("--policy", "full"), {"ztw/s0/export/full": 1}),
    ],
)
def test_formats_methods_and_places_can_be_chosen(say, root, words, files):
    code, _, err = say("export", "runs/toy", "--threads", "1", "--rows", "64", *words)
    assert (code, err) == (0, "")
    for place, graphs in files.items():
        manifest = exported.read_manifest(root / place)
        assert len(manifest["stages"]) == graphs
        assert manifest["task"] == "alpha"
        serve.load(root / place).act(np.zeros(toy.OBSERVED, dtype=np.float32))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--format", "onx"), "Did you mean 'onnx'?"),
        (("--method", "zwt"), "Did you mean 'ztw'?"),
        (("--method", "sdn"), "Run `rlexit distill` first."),
        (("--policy", "target_macs=0.9"), f"Did you mean '{LABEL}'?"),
        (("--method", "static", "--policy", "width 3"), "must be a known name, got 'width 3'"),
        (("--format", "sb3"), "is for policies, got alpha. Use --format onnx."),
        (("--rows", "0"), "`--rows` must be at least 1"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_nothing_is_written(say, root, words, told):
    (root / ".lock").unlink()
    before = toy.files(root)
    assert told in refusal(say("export", "runs/toy", "--threads", "1", *words))
    assert toy.files(root) == before


def test_without_a_calibrated_policy_the_verb_is_named(say, root):
    (root / "ztw" / "s0" / f"{EXIT_POLICIES}.json").unlink()
    assert "Run `rlexit calibrate` first." in refusal(say("export", "runs/toy", "--threads", "1"))


def test_without_the_extra_it_is_named(say, root, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install 'rlexit[export]'" in refusal(say("export", "runs/toy", "--threads", "1"))


# ---- bench ----


def recorded(session: Session, policy: ExitPolicy, shares: tuple[float, ...]) -> None:
    row = Row(
        "alpha", "ztw", 0, policy.label, policy.rule, policy.thresholds, policy.label, "real", "argmax", "test", 0, 2000,
        "score", 1.0, 100, 1.0, 0.5, shares, "{}",
    )  # fmt: skip
    write_rows(session.method("ztw") / "eval" / "episodes.csv", [row])


TIMED = ("bench", "runs/toy", "--threads", "1", "--rows", "8", "--repeats", "2", "--runtimes")


def test_bench_times_every_exit_and_the_recorded_mix(say, root):
    session = toy.session(root)
    recorded(session, deploy.subject(session, "ztw", None)[1], (0.75, 0.25, 0.0))
    code, out, err = say(*TIMED, "eager", "onnxruntime", "--batches", "4")
    assert (code, err) == (0, "")
    rows = read_latency(root / "ztw" / "s0" / "bench" / "latency.csv")
    found = {(row.runtime, row.method, row.label, row.batch) for row in rows}
    points = {("ztw", label) for label in ("exit 0", "exit 1", "nothing leaves", LABEL)}
    small = {("static", "width 0.5"), ("static", "width 0.25")}
    for runtime in (contenders.EAGER, contenders.ORT):
        for batch in (1, 4):
            assert {(runtime, *point, batch) for point in {("teacher", "full"), *points, *small}} <= found
        for point in (("teacher", "full"), ("ztw", LABEL)):
            assert (runtime + contenders.LOOP, *point, 1) in found
    assert {row.threads for row in rows} == {1}
    facts = json.loads((root / "ztw" / "s0" / "bench" / "bench.json").read_bytes())
    assert facts["mix"] == {"policy": LABEL, "shares": [0.75, 0.25, 0.0], "source": "1 test episodes"}
    assert "mix        target_macs=0.8 (1 test episodes):" in out
    assert {"runtime", "speed_up", "predicted", "loop"} == set(facts["ratios"])
    assert (facts["ratios"]["runtime"], facts["missing"]) == (contenders.ORT, [])
    assert all(one["rows_per_second"] > 0 for one in facts["measured"])
    assert (root / "ztw" / "s0" / "bench" / "latency.svg").read_text().startswith("<?xml")


def test_bench_says_why_a_runtime_is_not_there(say, root, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name in ("onnxruntime", "openvino") else real(name)
    )

    def fails(*_, **__):
        raise RuntimeError("no compiler\nfound")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: setattr(self, "_compiled_call_impl", fails))
    code, out, _ = say(*TIMED, "eager", "compiled", "predict", "onnxruntime", "openvino", "--batches")
    assert code == 0
    assert "onnxruntime: not measured (not installed: pip install 'rlexit[export]')" in out
    assert "openvino: not measured (not installed: pip install 'rlexit[openvino,export]')" in out
    assert "torch compiled: not measured (torch.compile does not work here: no compiler found.)" in out
    assert "sb3 predict: not measured (alpha is nothing that SB3 asks)" in out
    assert "(held-out rows)" in out
    rows = read_latency(root / "ztw" / "s0" / "bench" / "latency.csv")
    assert {row.runtime for row in rows} == {contenders.EAGER, contenders.EAGER + contenders.LOOP}
    facts = json.loads((root / "ztw" / "s0" / "bench" / "bench.json").read_bytes())
    assert set(facts["absent"]) == {"compiled", "predict", "onnxruntime", "openvino"}


@pytest.mark.slow
def test_bench_times_what_torch_compiles(say, root):
    code, out, _ = say(*TIMED, "eager", "compiled", "--batches", "4")
    assert code == 0
    rows = read_latency(root / "ztw" / "s0" / "bench" / "latency.csv")
    assert contenders.COMPILED in {row.runtime for row in rows} or "torch.compile does not work here" in out


def test_bench_says_who_is_missing_of_a_runtime_and_compares_where_the_mix_was_timed(say, root, monkeypatch):
    lineup = contenders.single

    def without_mix(name, *given):
        found = lineup(name, *given)
        if name != "onnxruntime":
            return found
        kept = [one for one in found.contenders if one.method != "ztw"]
        return contenders.Lineup(kept, {("ztw", LABEL): "no graph", ("ztw", "exit 0"): "no graph"})

    monkeypatch.setattr(deploy, "single", without_mix)
    code, out, err = say(*TIMED, "onnxruntime", "eager", "--batches")
    assert (code, err) == (0, "")
    assert f"onnxruntime, ztw {LABEL}, exit 0: not measured (no graph)" in out
    assert "(torch eager, means)" in out
    facts = json.loads((root / "ztw" / "s0" / "bench" / "bench.json").read_bytes())
    lost = {"runtime": "onnxruntime", "method": "ztw", "labels": [LABEL, "exit 0"], "reason": "no graph"}
    assert facts["missing"] == [lost]
    code, out, err = say(*TIMED, "onnxruntime", "--batches")
    assert (code, err) == (0, "")
    assert "not compared, for no runtime timed both it and the full network" in out


def test_a_recorded_mix_is_of_the_rows_that_compute(root):
    session = toy.session(root)
    policy = deploy.subject(session, "ztw", None)[1]
    recorded(session, policy, (0.2, 0.2, 0.1, 0.5))
    shares, source = deploy._recorded_mix(session, "ztw", policy, 3)
    assert shares == pytest.approx([0.4, 0.4, 0.2])
    assert source == "1 test episodes, without the 50% of decisions that repeat an answer"


def test_bench_refuses_a_runtime_that_it_does_not_know(say):
    assert "`--runtimes` must be a known name, got 'tensorrt'" in refusal(say(*TIMED, "tensorrt"))
    assert "`--batches` must be at least 1" in refusal(say(*TIMED, "eager", "--batches", "0"))


def test_each_contender_of_the_loop_acts_in_a_world_of_its_own(root):
    session = toy.session(root)
    deploy.bench(session, "ztw", None, 4, 1, ("eager",), ())
    worlds = session.domain.worlds
    assert len(worlds) == 2
    for steps in worlds:
        assert steps[0] is None
        assert steps[-1] == -1
        assert set(steps[1:-1]) <= {None, *range(toy.ACTIONS)}
        assert len(steps) > 4


def test_bench_wants_a_method_with_exits(say):
    assert "must be one with exits, got static" in refusal(say("bench", "runs/toy", "--method", "static"))


def test_a_mix_has_the_shares_asked_for():
    exits = np.array([0] * 90 + [1] * 5 + [2] * 5)
    drawn = exits[bench.mixed(exits, (0.5, 0.3, 0.2), 100)]
    assert np.bincount(drawn).tolist() == [50, 30, 20]
    assert set(exits[bench.mixed(np.zeros(4, dtype=int), (0.5, 0.3, 0.2), 10)]) == {0}


def test_rare_dear_steps_of_a_world_count_and_a_hiccup_of_a_row_does_not():
    times = np.array([[1.0, 1.0, 7.0], [7.0, 1.0, 1.0], [1.0, 7.0, 1.0]])
    assert bench._timing(times, moving=False).mean == 1
    assert bench._timing(times, moving=True).mean == 3


def test_contenders_take_turns_and_a_hiccup_moves_no_median():
    called: list[str] = []
    rows = np.zeros((3, 2))

    def contender(name: str) -> bench.Contender:
        return bench.Contender("toy", name, "none", lambda row: called.append(name), rows)

    timings = bench.measure([contender("a"), contender("b")], 2)
    assert "".join(called) == "aaabbb" + "aaaabbbb" + "bbbbaaaa"
    assert all(0 < timing.low <= timing.p50 <= timing.high < math.inf for timing in timings)

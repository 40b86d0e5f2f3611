"""Refined policies, exported: leave gates, and answers that are repeated from step to step."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from rlexit import contenders, serve
from rlexit.config import GateConfig
from rlexit.exit_policy import ExitPolicy
from rlexit.export import ExportError, compare, export, server_of
from rlexit.gates.leave import LeaveGate
from rlexit.gates.reuse import ReuseGate, forget
from rlexit.graphs import plan_stages, stage_graphs
from rlexit.rules import rules
from rlexit.runtime import run
from tests.rlexit.served import counted
from tests.rlexit.test_leave import LEARNED, leaving, plain
from tests.rlexit.test_reuse import repeating
from tests.rlexit.test_serve import reseal
from tests.rlexit.toy_domain import SMALL, domain
from tests.rlexit.toys import EXITS, MAP, OUTPUTS, TOYS, parting, residual, scatter

pytest.importorskip("onnx", reason="the extra `export` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")

ROWS = TOYS["skips"].inputs(32)
GAMES = 6
STEPS = torch.stack([TOYS["cascade"].inputs(32, seed)[:GAMES] for seed in range(12)])


# ---- leave gates ----


@pytest.mark.parametrize("build", [plain, leaving])
def test_the_learned_rule_is_served_as_it_runs(tmp_path, build):
    network = build()
    manifest = export(network, LEARNED, ROWS, tmp_path / "export", "onnx", {})
    assert {manifest["parity"][name] for name in ("actions", "exits", "macs", "unexplained")} == {0}
    wanted, got = run(network, LEARNED, ROWS), serve.load(tmp_path / "export").run(ROWS.numpy())
    assert len(set(got.exits.tolist())) == EXITS
    np.testing.assert_array_equal(got.exits, wanted.exits.numpy())
    np.testing.assert_array_equal(got.macs, wanted.macs.numpy())
    np.testing.assert_allclose(got.scores, wanted.scores.numpy(), atol=1e-4)


def test_a_head_runs_for_rows_that_leave_and_for_no_others(monkeypatch):
    calls = counted(monkeypatch)
    network = plain()
    server = server_of(network, LEARNED, ROWS)
    exits = run(network, LEARNED, ROWS).exits.tolist()
    calls.clear()
    assert [server.act(row).exit for row in ROWS.numpy()] == exits
    heads = [stage.head for stage in server.stages if stage.head is not None]
    assert [calls[head.data] for head in heads] == [exits.count(exit) for exit in range(EXITS - 1)]


def test_a_head_that_a_later_one_reads_is_built_for_all():
    plans = plan_stages(leaving(), LEARNED)
    assert [(plan.exits, plan.apart) for plan in plans] == [((0,), False), ((), True), ((2,), False)]


def test_a_learned_exit_that_asks_nobody_is_refused():
    with pytest.raises(ExportError, match="`thresholds` of the rule learned must be above -inf .* got -inf at conv0"):
        plan_stages(plain(), ExitPolicy("learned", (-math.inf, 0.5)))
    network = plain()
    network.set_leave_gates({"conv0": network.leave_gates["conv0"]})
    with pytest.raises(ExportError, match="`leave_gates` must have exit 'conv1'"):
        plan_stages(network, LEARNED)


def test_a_pooled_leave_gate_is_said_in_windows_where_its_map_is_no_multiple():
    network = TOYS["cascade"].network()
    network.set_leave_gates({name: LeaveGate.pooled(MAP, pool=3, hidden=8) for name in network.exit_names[:-1]})
    assert server_of(network, LEARNED, ROWS).exits == EXITS


# ---- repeated answers ----


@pytest.mark.parametrize("rule", ["confidence", "learned"])
def test_a_policy_that_repeats_answers_is_served_step_by_step(tmp_path, rule):
    network = repeating()
    if rule == "learned":
        network.set_leave_gates({name: LeaveGate.pooled(MAP, hidden=8) for name in network.exit_names[:-1]})
    policy = LEARNED if rule == "learned" else parting(network, STEPS[0], rule)
    manifest = export(network, policy, STEPS, tmp_path / "export", "onnx", {})
    assert manifest["parity"]["rows"] == STEPS.shape[0] * GAMES
    assert {manifest["parity"][name] for name in ("actions", "exits", "macs", "unexplained")} == {0}
    server, memory, outcomes = serve.load(tmp_path / "export", threads=2), None, set()
    for number, step in enumerate(STEPS):
        if number in (7, 9):  # two games begin anew
            anew = [1, 4]
            server.reset(anew if number == 7 else np.isin(np.arange(GAMES), anew))
            memory = forget(memory, torch.tensor(anew))
        wanted, got = run(network, policy, step, memory=memory), server.run(step.numpy())
        memory = wanted.memory
        outcomes |= set(got.exits.tolist())
        np.testing.assert_array_equal(got.exits, wanted.exits.numpy())
        np.testing.assert_array_equal(got.macs, wanted.macs.numpy())
        np.testing.assert_allclose(got.answers, wanted.answers.numpy(), atol=1e-4, rtol=1e-4)
    assert EXITS in outcomes
    assert len(outcomes) > 1


def test_one_game_is_told_what_it_is_told_among_others():
    network = repeating()
    policy = parting(network, STEPS[0])
    server = server_of(network, policy, STEPS)
    together = [server.act(step.numpy()) for step in STEPS]
    for game in range(GAMES):
        server.reset()
        for step, all_acts in zip(STEPS, together, strict=True):
            action, exit, confidence = server.act(step[game].numpy())
            assert (action, exit) == (all_acts.actions[game], all_acts.exits[game])
            assert confidence == pytest.approx(all_acts.confidences[game], abs=1e-5)


def test_no_graph_but_the_gate_runs_for_a_row_that_repeats(monkeypatch):
    calls = counted(monkeypatch)
    network = repeating(limit=2, bias=-50.0)
    server = server_of(network, ExitPolicy.always(0, EXITS), STEPS)
    calls.clear()
    exits = [server.act(step[0].numpy()).exit for step in STEPS[:6]]
    assert exits == [0, EXITS, EXITS, 0, EXITS, EXITS]
    assert calls[server.stages[0].part.data] == 2
    assert server.reuse is not None
    assert (calls[server.reuse.asks.data], calls[server.reuse.looks.data]) == (4, 2)


def test_a_reset_begins_a_new_game():
    network = repeating(bias=-50.0)
    server = server_of(network, ExitPolicy.always(0, EXITS), STEPS)
    frame = STEPS[0, 0].numpy()
    assert [server.act(frame).exit for _ in range(2)] == [0, EXITS]
    server.reset()
    assert server.act(frame).exit == 0
    server.reset([0])
    assert server.act(frame).exit == 0


def test_rows_are_the_environments_of_the_step_before_until_a_reset():
    server = server_of(repeating(), ExitPolicy.full(EXITS), STEPS)
    server.act(STEPS[0].numpy())
    for wrong in (STEPS[0, :3].numpy(), STEPS[0, 0].numpy()):
        with pytest.raises(
            serve.ServeError, match=f"must have the {GAMES} rows of the step before, got [13]. Call reset"
        ):
            server.act(wrong)
    for wrong in ([GAMES], [-1], np.ones(GAMES - 1, dtype=bool)):
        with pytest.raises(serve.ServeError, match=f"`rows` must be of the {GAMES} environments"):
            server.reset(wrong)
    server.reset()
    assert len(server.act(STEPS[0, :3].numpy()).actions) == 3


def test_an_export_that_repeats_otherwise_is_noticed():
    network, other = repeating(), repeating(bias=-50.0)
    policy = parting(network, STEPS[0])
    found = compare(other, policy, server_of(network, policy, STEPS), STEPS)
    assert found.exits > 0
    assert not found.holds


def test_skipping_leaving_and_repeating_go_together():
    torch.manual_seed(7)
    network = residual("none", GateConfig("lstm", bias=0.0))
    scatter(network)
    shapes = [tuple(features.shape[1:]) for features in network.taps(ROWS)]
    gates = {name: LeaveGate.pooled(shape) for name, shape in zip(network.exit_names[:-1], shapes, strict=False)}
    network.set_leave_gates(gates)
    network.reuse = ReuseGate(OUTPUTS, 2, side=4, hidden=8, bias=0.0)
    steps = torch.stack([TOYS["skips"].inputs(32, seed)[:GAMES] for seed in range(6)])
    limits = tuple(network_scores.median().item() for network_scores in _scores(network, steps[0]))
    server = server_of(network.eval(), ExitPolicy("learned", limits), steps)
    assert compare(network, ExitPolicy("learned", limits), server, steps).holds


def _scores(network, rows):
    return run(network, ExitPolicy("learned", (1e30,) * (EXITS - 1)), rows).scores[:, :-1].unbind(dim=1)


def test_one_nested_graph_cannot_repeat(tmp_path):
    with pytest.raises(ExportError, match="`--format` onnx-if is for"):
        export(repeating(), ExitPolicy.full(EXITS), STEPS, tmp_path / "export", "onnx-if", {})


def test_a_leave_gate_is_part_of_what_is_traced():
    names = [port.name for graph in stage_graphs(plain(), LEARNED, ROWS[:1]) for port in graph.outputs]
    assert names == ["features_0_0", "score", "features_1_0", "score", "answer"]


@pytest.mark.parametrize(
    "change",
    [
        lambda reuse: reuse.update(limit=0),
        lambda reuse: reuse.update(limit=True),
        lambda reuse: reuse["asks"]["inputs"].pop(),
        lambda reuse: reuse["looks"]["outputs"][0].update(shape=[3]),
        lambda reuse: reuse["asks"].update(file="../asks.onnx"),
    ],
)
def test_a_memory_that_claims_nonsense_is_refused(tmp_path, change):
    folder = tmp_path / "export"
    export(repeating(), ExitPolicy.always(0, EXITS), STEPS, folder, "onnx", {})
    assert json.loads((folder / "manifest.json").read_bytes())["reuse"]["limit"] == 3
    reseal(folder, lambda manifest: change(manifest["reuse"]))
    with pytest.raises(serve.ServeError, match="no manifest of an export"):
        serve.load(folder)


def test_a_bench_times_the_others_where_one_network_repeats_its_answers():
    whole, task = ExitPolicy.full(EXITS), domain(SMALL)
    entries = [
        contenders.Entry("teacher", "full", TOYS["cascade"].network(), whole),
        contenders.Entry("refined", "learned", repeating(), whole, mix=True),
    ]
    rows = TOYS["cascade"].inputs(8).numpy()
    found = contenders.single(contenders.ORT, entries, task, rows)
    assert [one.method for one in found.contenders] == ["teacher"]
    assert list(found.missing) == [("refined", "learned")]
    assert "refined may repeat its last answer" in found.missing["refined", "learned"]
    with pytest.raises(contenders.Absent, match="refined may repeat its last answer"):
        contenders.single(contenders.ORT, entries[1:], task, rows)


@pytest.mark.parametrize("rule", ["learned", "confidence"])
@pytest.mark.parametrize("closed", [None, 0, 1])
def test_the_rows_of_a_bench_are_of_the_same_work_in_every_runtime(rule, closed):
    network = plain()
    limits = LEARNED.thresholds if rule == "learned" else parting(network, ROWS, rule).thresholds
    mix = ExitPolicy(rule, tuple(math.inf if exit == closed else limit for exit, limit in enumerate(limits)), "mix")
    server = server_of(network, mix, ROWS)
    entries = contenders.exits_of("ztw", network, mix)
    assert [one.label for one in entries] == ["exit 0", "exit 1", "nothing leaves"]
    for exit, one in enumerate(entries):
        told = run(network, one.policy, ROWS)
        assert set(told.exits.tolist()) == {exit}
        if exit != closed:
            served = server.with_thresholds(one.policy.thresholds).run(ROWS.numpy())
            np.testing.assert_array_equal(served.macs, told.macs.numpy())
            np.testing.assert_array_equal(served.exits, told.exits.numpy())


def test_an_exit_that_the_mix_closes_is_missing_where_no_stage_ends():
    network, task = plain(), domain(SMALL)
    mix = ExitPolicy("learned", (math.inf, 0.5), "mix")
    entries = [contenders.Entry("ztw", "mix", network, mix, mix=True), *contenders.exits_of("ztw", network, mix)]
    found = contenders.single("onnxruntime", entries, task, ROWS.numpy())
    assert [one.label for one in found.contenders] == ["mix", "exit 1", "nothing leaves"]
    assert found.missing == {("ztw", "exit 0"): "mix closes this exit: no stage ends there"}
    assert len(contenders.single("eager", entries, task, ROWS.numpy()).contenders) == 4


def test_a_served_leave_gate_cannot_be_passed_unasked(tmp_path):
    assert [name for name in rules if rules[name].before_head] == [serve.ASKS]
    network = plain()
    export(network, LEARNED, ROWS, tmp_path / "export", "onnx", {})
    for change in (
        lambda: serve.load(tmp_path / "export", thresholds=(0.5, -math.inf)),
        lambda: serve.load(tmp_path / "export").with_thresholds((-math.inf, 0.5)),
        lambda: server_of(network, LEARNED, ROWS).with_thresholds((-math.inf, 0.5)),
    ):
        with pytest.raises(
            serve.ServeError, match="`thresholds` of the rule learned must be above -inf, got .* Give -1"
        ):
            change()
    assert set(serve.load(tmp_path / "export", thresholds=(-1, 0.5)).run(ROWS.numpy()).exits.tolist()) == {0}


def test_torch_is_timed_where_it_is_told_to_and_decides_there_as_on_the_cpu():
    """`cpu:0` stands for a device that is none of the default: weights are copied to it, rows go there and come back."""
    network, task = plain(), domain(SMALL)
    entries = [contenders.Entry("ztw", "mix", network, LEARNED, mix=True)]
    here = contenders.single("eager", entries, task, ROWS.numpy()).contenders[0]
    there = contenders.single("eager", entries, task, ROWS.numpy(), "cpu:0").contenders[0]
    assert (here.runtime, there.runtime) == ("torch eager", "torch eager (cpu:0)")
    np.testing.assert_array_equal(here.call(ROWS.numpy()), there.call(ROWS.numpy()))
    assert there.call(ROWS[0].numpy()) == here.call(ROWS[0].numpy())
    away = contenders.single("eager", entries, task, ROWS.numpy(), "meta").contenders[0]
    with pytest.raises(RuntimeError, match="meta"):
        away.call(ROWS[0].numpy())
    served = contenders.single("onnxruntime", entries, task, ROWS.numpy(), "meta").contenders[0]
    assert (served.runtime, served.call(ROWS[0].numpy())[0]) == ("onnxruntime", here.call(ROWS[0].numpy()))
    assert {one.device.type for one in network.parameters()} == {"cpu"}

"""A refined Pong policy, with leave gates and repeated answers, from the verb to the served game."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from agents.domain import domain
from rlexit import checkpoint, deploy, serve
from rlexit.config import METHODS
from rlexit.contenders import Absent, Entry, looping, single
from rlexit.exit_policy import ExitPolicy
from rlexit.heldout import steps
from rlexit.interrupts import StopFlag
from rlexit.runtime import run
from rlexit.session import EXIT_POLICIES, POLICY, Session, learnt, load_network, weights_hash
from tests.agents.small_run import CONFIG, ENV, save_teacher

pytest.importorskip("onnx", reason="the extra `export` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")

LEARNED = ExitPolicy("learned", (0.5, 0.5), "refined")
REFINED = replace(CONFIG, methods=("refined",), refine=replace(CONFIG.refine, decisions=("exits", "reuse")))


@pytest.fixture
def session(tmp_path) -> Session:
    """A run whose refined policy has opinions about everything, untrained as it is."""
    made = Session(domain(REFINED), tmp_path / "pong", 0, Console(quiet=True), StopFlag())
    save_teacher(made.teacher, ENV)
    torch.manual_seed(4)
    network = made.domain.network(made.teacher, METHODS["refined"])
    with torch.no_grad():
        network.reuse.net[-1].weight.normal_(std=6.0)
        network.reuse.net[-1].bias.zero_()
        for gate in network.leave_gates.values():
            gate.module.logit.weight.normal_(std=30.0)
    folder = made.method("refined")
    tensors = {f"/{key}": value for key, value in learnt(made, network, "refined").items()}
    checkpoint.save(folder, POLICY, tensors, {"method": "refined", "seed": 0})
    facts = {"policies": [LEARNED.to_json()], "missed": [], "policy": weights_hash(folder, POLICY)}
    checkpoint.save(folder, EXIT_POLICIES, {}, facts)
    return made


def test_a_refined_policy_is_exported_on_real_steps_and_plays_as_it_runs(session):
    path = deploy.export_method(session, "refined", "onnx", None, None, 64)
    manifest = json.loads((path / "manifest.json").read_bytes())
    assert manifest["parity"]["rows"] == 64
    assert {manifest["parity"][name] for name in ("actions", "exits", "macs", "unexplained")} == {0}
    assert {file.name for file in Path(path).glob("recall*")} == {"recall_asks.onnx", "recall_looks.onnx"}
    network, server, memory = load_network(session, "refined")[""], serve.load(path), None
    exits = set()
    with session.domain.world(3) as world:
        observation = world(None)
        for _ in range(40):
            wanted = run(network, LEARNED, torch.from_numpy(observation[None]), memory=memory)
            memory = wanted.memory
            action, exit, _ = server.act(observation)
            assert (action, exit) == (int(wanted.answers.argmax()), int(wanted.exits))
            exits.add(exit)
            observation = world(action)
    assert network.exits in exits
    assert len(exits) > 1
    server.reset()
    assert server.act(observation).exit < network.exits


@pytest.mark.parametrize("runtime", ["eager", "predict", "onnxruntime"])
def test_the_timed_loop_repeats_answers_as_the_policy_does(session, runtime):
    network = load_network(session, "refined")[""]
    held = steps(session, network, LEARNED, 64)

    def played(remembers):
        actions, exits, memory = [], [], None
        with session.domain.world(0) as world:
            observation = world(None)
            for _ in range(40):
                result = run(network, LEARNED, torch.from_numpy(observation[None]), memory=memory)
                memory = result.memory if remembers else None
                actions.append(int(result.answers.argmax()))
                exits.append(int(result.exits))
                observation = world(actions[-1])
        return actions, exits

    (wanted, exits), (always, _) = played(True), played(False)
    assert network.exits in exits
    assert wanted != always
    entry, rows = Entry("refined", "refined", network, LEARNED, mix=True), held.flatten(0, 1).numpy()
    with ExitStack() as worlds:
        [loop] = looping(runtime, [entry], session.domain, rows, worlds, steps=held).contenders
        assert [int(np.asarray(loop.call(rows[0])).item()) for _ in wanted] == wanted
    assert loop.moving
    if runtime == "onnxruntime":
        with pytest.raises(Absent, match="refined may repeat its last answer: a row by itself says nothing"):
            single(runtime, [entry], session.domain, rows)


def test_steps_follow_each_other_in_games_of_their_own(session):
    network = load_network(session, "refined")[""]
    found = steps(session, network, LEARNED, 40).numpy()
    assert found.shape == (5, 8, 4, 84, 84)
    # The newest three of four stacked frames are the oldest three of the next step.
    np.testing.assert_array_equal(found[1:, :, :3], found[:-1, :, 1:])

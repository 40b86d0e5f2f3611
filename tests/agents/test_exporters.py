"""Teachers and policies of Atari in other tools' hands: stock stable-baselines3, and onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from agents.backbones.nature import load_sb3, nature_network
from agents.domain import AgentsDomain
from agents.importers import read_sb3_policy
from rlexit import checkpoint, deploy, serve
from rlexit.checkpoint import CheckpointError
from rlexit.config import HeadConfig
from rlexit.domain import Looping, Publisher
from rlexit.ensembles import ensembles
from rlexit.exit_policy import ExitPolicy
from rlexit.export import export
from rlexit.runtime import run
from tests.agents.small_run import CONFIG, ENV, save_teacher, small_session
from tests.rlexit.toys import SCORERS

FRAMES = np.random.default_rng(0).integers(0, 256, (16, 4, 84, 84), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"), ENV)


def test_stock_sb3_opens_the_exported_teacher_and_acts_as_it_does(tmp_path, folder):
    domain = AgentsDomain(CONFIG)
    assert isinstance(domain, Publisher)
    domain.publish(folder, tmp_path / "pong.zip")
    model = PPO.load(tmp_path / "pong.zip", device="cpu")
    network = nature_network(6)
    load_sb3(network, checkpoint.load(folder, "teacher")[0])
    with torch.no_grad():
        features = model.policy.extract_features(torch.from_numpy(FRAMES))
        logits = model.policy.action_net(features)
        torch.testing.assert_close(logits, network(torch.from_numpy(FRAMES)).logits[:, -1], atol=1e-5, rtol=1e-5)
    actions, _ = model.predict(FRAMES, deterministic=True)
    np.testing.assert_array_equal(actions, logits.argmax(dim=1).numpy())


def test_an_exported_teacher_comes_back_by_import_unchanged(tmp_path, folder):
    AgentsDomain(CONFIG).publish(folder, tmp_path / "pong.zip")
    back, own = read_sb3_policy(tmp_path / "pong.zip"), checkpoint.load(folder, "teacher")[0]
    assert back.keys() == own.keys()
    assert all(torch.equal(back[key], own[key]) for key in own)


def test_a_teacher_without_sb3_s_tensors_is_not_exported(tmp_path, folder):
    tensors, facts = checkpoint.load(folder, "teacher")
    tensors.pop("value_net.bias")
    checkpoint.save(tmp_path, "teacher", tensors, facts)
    with pytest.raises(CheckpointError, match=r"must hold SB3's `value_net.bias` of shape \(1,\)"):
        AgentsDomain(CONFIG).publish(tmp_path, tmp_path / "pong.zip")
    assert not (tmp_path / "pong.zip").exists()


def test_the_verb_writes_the_zip_beside_the_teacher(tmp_path):
    session = small_session(tmp_path / "pong")
    save_teacher(session.teacher, ENV)
    path = deploy.export_method(session, "ztw", "sb3", None, None, 1)
    assert path == session.teacher / "export" / "pong.zip"
    assert read_sb3_policy(path)["action_net.bias"].shape == (6,)


@pytest.mark.parametrize("rule", SCORERS)
def test_nature_cnn_with_ztw_s_heads_is_served_as_it_runs(tmp_path, rule):
    pytest.importorskip("onnx", reason="the extra `export` is not installed")
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    torch.manual_seed(2)
    network = nature_network(6, ("conv1", "conv2"), HeadConfig(), True, ensembles["geometric"](2, 6)).eval()
    rows = torch.from_numpy(FRAMES)
    scores = run(network, ExitPolicy(rule, (1e30, 1e30)), rows).scores[:, :2]
    middle = (scores.amin(dim=0) + scores.amax(dim=0)) / 2
    policy = ExitPolicy(rule, tuple(middle.tolist()))
    manifest = export(network, policy, rows, tmp_path / "export", "onnx", {})
    assert manifest["parity"]["unexplained"] == 0
    wanted, server = run(network, policy, rows), serve.load(tmp_path / "export")
    np.testing.assert_array_equal(server.act(FRAMES)[1], wanted.exits.numpy())
    np.testing.assert_array_equal([server.act(row)[0] for row in FRAMES], wanted.answers.argmax(dim=1).numpy())


def test_a_world_is_a_calibration_game_that_goes_on_by_itself():
    domain = AgentsDomain(CONFIG)
    assert isinstance(domain, Looping)
    with domain.world(0) as step, domain.world(0) as other:
        first = step(None)
        assert (first.shape, first.dtype) == ((4, 84, 84), np.uint8)
        np.testing.assert_array_equal(first, other(None))
        for action in [0, 2, 3] * 20:  # a game of this config is over after 40 steps
            np.testing.assert_array_equal(step(action), other(action))
        assert not np.array_equal(step(2), first)

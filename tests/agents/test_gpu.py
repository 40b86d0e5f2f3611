"""What runs on a GPU where there is one; the same calls run on the CPU in every suite."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from agents import rollouts, teacher
from agents.backbones.nature import nature_network
from agents.config import EnvConfig, PPOConfig
from agents.domain import domain
from rlexit import checkpoint, verbs
from rlexit.config import HeadConfig
from rlexit.domain import Watch
from rlexit.ensembles import ensembles
from rlexit.exit_policy import ExitPolicy
from rlexit.interrupts import StopFlag
from rlexit.runtime import run
from rlexit.session import Session, load_network
from tests.agents.small_run import CONFIG

PONG = EnvConfig("pong", max_frames=160)
TINY = PPOConfig(total_steps=32, n_envs=2, n_steps=8, batch_size=16, n_epochs=1)
CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: not measured, not tested"),
    ],
)
DEVICES = ["cpu", CUDA]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_teacher_is_trained_on_a_device_and_kept_on_none(tmp_path, device, precision):
    teacher.train(tmp_path, PONG, replace(TINY, precision=precision), 0, device=device)
    tensors, facts = checkpoint.load(tmp_path, teacher.TEACHER)
    assert facts["env_steps"] == 32
    assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


@pytest.mark.parametrize("device", DEVICES)
def test_a_network_plays_on_its_device_as_it_decides_on_the_cpu(device):
    torch.manual_seed(2)
    network = nature_network(6, ("conv1", "conv2"), HeadConfig(), True, ensembles["geometric"](2, 6)).eval()
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 4, 84, 84), dtype=np.uint8))
    scores = run(network, ExitPolicy("confidence", (2.0, 2.0)), frames).scores[:, :2]
    policies = [ExitPolicy("confidence", tuple(scores.median(dim=0).values.tolist())), ExitPolicy.full(3)]
    jobs = np.array([0, 1] * 4)
    wanted = rollouts.exiting(network, policies)(frames, jobs)
    got = rollouts.exiting(network.to(device), policies)(frames, jobs)
    assert {got.answers.device.type, got.exits.device.type, got.macs.device.type} == {"cpu"}
    assert torch.equal(got.exits, wanted.exits)
    torch.testing.assert_close(got.answers, wanted.answers, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_a_domain_trains_distills_and_plays_where_it_is_told(tmp_path, monkeypatch, device):
    told: list[str] = []
    original = rollouts.exiting

    def exiting(network, *arguments):
        told.append(next(network.parameters()).device.type)
        return original(network, *arguments)

    monkeypatch.setattr(rollouts, "exiting", exiting)
    made = domain(replace(CONFIG, train=TINY))
    made.device = device
    session = Session(made, tmp_path / "pong", 0, Console(quiet=True), StopFlag(), device=device)
    verbs.train(session)
    verbs.distill(session, "ztw")
    tensors, _ = checkpoint.load(session.method("ztw"), "policy")
    assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}
    network = load_network(session, "ztw")[""]
    (played,) = made.play(network, [ExitPolicy.full(3)], [(0, 0)], "test", 0, Watch())
    assert played.decisions > 0
    assert told == [device]
    assert next(network.parameters()).device.type == "cpu"

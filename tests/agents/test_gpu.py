"""What runs on a GPU where there is one; the same calls run on the CPU in every suite."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from agents import rollouts, teacher
from agents.backbones.nature import nature_network
from agents.config import EnvConfig, PPOConfig
from rlexit import checkpoint
from rlexit.config import HeadConfig
from rlexit.ensembles import ensembles
from rlexit.exit_policy import ExitPolicy
from rlexit.runtime import run

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

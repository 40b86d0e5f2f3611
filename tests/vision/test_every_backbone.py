"""Every registered backbone from nothing to a report, on generated images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from rlexit import dissection, verbs
from rlexit.config import METHODS, EvaluateConfig
from rlexit.dissection import ExitRow
from rlexit.distill import Distiller
from rlexit.interrupts import StopFlag
from rlexit.report import write_report
from rlexit.session import Session
from rlexit.students import ExitStudent
from tests.vision.small_images import SMALL, changed
from vision.config import BACKBONES, BackboneConfig, CollectConfig, DataConfig, NetworkConfig, TrainConfig
from vision.domain import VisionDomain, domain

# The shallowest of each family, and images as small as it bears.
DEPTHS = {"resnet_cifar": 8, "wrn": 8, "densenet": 16}
SIDES = {"vgg": 32, "resnet50": 32}
TINY = replace(
    SMALL,
    methods=("sdn",),
    network=NetworkConfig(every=4),
    train=TrainConfig(epochs=1, batch_size=16),
    collect=CollectConfig(batch=16, batches=1),
    distill=replace(SMALL.distill, steps=32, ensemble_steps=16, batch_size=16),
    calibrate=replace(SMALL.calibrate, target_macs=()),
    evaluate=EvaluateConfig(episodes=2, grid=0, n_envs=24, latency_rows=0, budgets=(1.5,)),
)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_goes_from_training_to_a_report(name, tmp_path: Path):
    every = 2 if name in DEPTHS else 4
    config = replace(
        TINY,
        data=DataConfig(kind="toy", toy_rows=48, toy_side=SIDES.get(name, 16), holdout=0.4, crop=0, flip=False),
        backbone=BackboneConfig(name, depth=DEPTHS.get(name, 0), width=0.125),
        network=NetworkConfig(every=every),
        head=replace(SMALL.head, stride=0),
    )
    made = Session(domain(config), tmp_path, 0, Console(quiet=True), StopFlag())
    verbs.train(made)
    verbs.evaluate_teacher(made)
    verbs.distill(made, "sdn")
    verbs.evaluate_method(made, "sdn")
    exits = dissection.load(made.method("sdn") / "eval", ExitRow)
    assert len(exits) >= 2
    assert {row.count for row in exits} == {48}
    page = write_report([tmp_path], tmp_path / "report").read_text(encoding="utf-8")
    assert "Accuracy of every exit" in page
    assert f"toy-{name}" in page


def test_dropout_and_batch_statistics_of_the_trunk_are_frozen_while_heads_learn(tmp_path):
    config = replace(changed(SMALL, "data", toy_side=16), backbone=BackboneConfig("wrn", depth=8, dropout=0.5, width=1))
    made = VisionDomain(config)
    network = made.blank(METHODS["sdn"])
    student = ExitStudent(network)
    Distiller(student, made.batches(0), config.distill, tmp_path, 0).start()
    images = made.data.evaluated("test").pixels[:4]
    before = {key: value.clone() for key, value in network.state_dict().items() if "running" in key}
    assert before
    first, again = student.look(images), student.look(images)
    assert all(torch.equal(one, other) for one, other in zip(first[0], again[0], strict=True))
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in before.items())
    network.train()
    assert not torch.equal(student.look(images)[0][-1], student.look(images)[0][-1])  # there is dropout to freeze

"""The teacher's training: it learns, it resumes bit for bit, and it ends by a clear error."""

from __future__ import annotations

import pytest
import torch

from rlexit import checkpoint
from rlexit.domain import Watch
from rlexit.interrupts import Diverged, Stopped
from rlexit.runlog import read_scalars
from tests.vision.small_images import SMALL, changed
from vision.config import TrainConfig
from vision.domain import VisionDomain
from vision.train import STATE, TEACHER, learning_rate

BATCHES = 4 * 4  # 4 epochs of 4 batches


def stop_after(batches: int) -> Watch:
    left = [batches]

    def stop() -> bool:
        left[0] -= 1
        return left[0] == 0

    return Watch(stop)


def trained(folder, config=SMALL, seed=3, stops=()):
    for place in stops:
        with pytest.raises(Stopped):
            VisionDomain(config).train(folder, seed, stop_after(place))
    VisionDomain(config).train(folder, seed, Watch())
    return checkpoint.load(folder, TEACHER)[0], read_scalars(folder)


def test_a_teacher_learns_what_the_toy_shows(tmp_path):
    config = changed(changed(SMALL, "train", epochs=12), "backbone", width=0.5)
    _, curves = trained(tmp_path, config)
    right = [value for _, tag, value in curves if tag == "held_out/accuracy"]
    assert len(right) == 12
    assert right[-1] > 0.6  # four classes: chance is 0.25
    rates = [value for _, tag, value in curves if tag == "train/learning_rate"]
    assert rates[0] == pytest.approx(0.05)
    assert rates[-1] == pytest.approx(0.05e-3)


def test_a_training_that_was_stopped_ends_as_one_that_was_not(tmp_path):
    config = changed(changed(SMALL, "data", crop=1, flip=True), "backbone", dropout=0.3, name="wrn")
    whole, curves = trained(tmp_path / "whole", config)
    torch.manual_seed(99)
    parts, joined = trained(tmp_path / "parts", config, stops=(3, 6))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())
    assert curves == joined


def test_another_seed_is_another_teacher_and_refused_in_the_middle(tmp_path):
    first, _ = trained(tmp_path / "first")
    second, _ = trained(tmp_path / "second", seed=4)
    assert not torch.equal(first["conv1.weight"], second["conv1.weight"])
    with pytest.raises(Stopped):
        VisionDomain(SMALL).train(tmp_path / "third", 3, stop_after(2))
    with pytest.raises(checkpoint.CheckpointError, match="holds a training with seed 3, got 4"):
        VisionDomain(SMALL).train(tmp_path / "third", 4, Watch())


def test_a_loss_that_is_no_number_ends_the_training_and_leaves_the_last_state(tmp_path):
    config = changed(SMALL, "train", learning_rate=1e20, checkpoint_seconds=1e-9, precision="fp32")
    with pytest.raises(Diverged, match=r"`train/loss` became .* lower `train.learning_rate`"):
        trained(tmp_path, config)
    assert not checkpoint.exists(tmp_path, TEACHER)
    if checkpoint.exists(tmp_path, STATE):
        checkpoint.load(tmp_path, STATE)


def test_the_rate_falls_at_shares_of_the_epochs():
    config = TrainConfig(learning_rate=0.1, decay_at=(0.35, 0.6, 0.85))
    rates = [learning_rate(config, done) for done in (0, 0.34, 0.35, 0.6, 0.99)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.0001])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "`train.epochs` must be at least 1"),
        ({"batch_size": 1}, "`train.batch_size` must be at least 2"),
        ({"decay_at": (0.6, 0.3)}, "`train.decay_at` must be rising shares"),
        ({"precision": "fp8"}, "`train.precision` must be bf16 or fp32"),
        ({"momentum": 1.0}, "`train.momentum`"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)

"""The teacher: a classifier trained by SGD, resumed bit for bit."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rlexit import checkpoint
from rlexit.domain import Watch
from rlexit.interrupts import Diverged, Stopped
from rlexit.runlog import RunLog
from vision.batches import Stream
from vision.config import TrainConfig
from vision.decoding import Images
from vision.network import Classifier, weights

STATE = "state"
TEACHER = "teacher"
# Minibatches between two points of a curve.
POINT = 50
CHUNK = 512


@dataclass
class _Seen:
    """Sums since the last point of the curves."""

    loss: float = 0.0
    right: int = 0
    images: int = 0

    def add(self, losses: Tensor, right: int) -> None:
        self.loss += float(losses.sum())
        self.right += right
        self.images += len(losses)


@dataclass
class _Place:
    """How far a training has come."""

    batch: int = 0
    images: int = 0
    seen: _Seen = field(default_factory=_Seen)


def learning_rate(config: TrainConfig, done: float) -> float:
    """SGD's rate after a share `done` of all epochs: a tenth of what it was at every share of `decay_at` that was passed."""
    return config.learning_rate * 0.1 ** sum(done >= share for share in config.decay_at)


def train(
    folder: Path,
    network: Classifier,
    stream: Stream,
    held_out: Images,
    config: TrainConfig,
    seed: int,
    facts: Mapping[str, Any],
    watch: Watch,
) -> None:
    """Trains a classifier into `folder` (checkpoint `teacher`), or goes on where an earlier call stopped.

    Args:
        folder: for checkpoints and curves.
        network: freshly initialised, without early exits; trained in place.
        stream: of training images, in batches of `config.batch_size`.
        held_out: what trains nothing; its accuracy is a curve.
        config: settings.
        seed: of the run; a state of another one is refused.
        facts: JSON values that the teacher's manifest keeps.
        watch: stop and progress.
    Raises:
        Stopped: `watch` says so; the state is saved.
        Diverged: a loss is NaN or infinite; the last checkpoint is healthy.
        CheckpointError: the saved state was altered, or is of another seed.
    """
    optimizer = torch.optim.SGD(
        network.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    place = _Place()
    if checkpoint.exists(folder, STATE):
        place = _restore(folder, network, optimizer, seed)
    total = config.epochs * stream.per_epoch
    saved_at = time.monotonic()

    def save() -> None:
        tensors = {f"network.{key}": value for key, value in network.state_dict().items()}
        tensors |= checkpoint.pack_optimizer(optimizer, "optimizer")
        tensors["random"] = torch.get_rng_state()
        told = {"batch": place.batch, "images": place.images, "seen": vars(place.seen), "seed": seed}
        log.flush()
        checkpoint.save(folder, STATE, tensors, told)

    with RunLog(folder, resume_step=place.images) as log:
        while place.batch < total:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, place.batch / total)
            images, labels = stream[place.batch]
            _step(network, optimizer, images, labels, config, place)
            place.batch += 1
            place.images += len(labels)
            ends_epoch = place.batch % stream.per_epoch == 0
            if place.batch % POINT == 0 or ends_epoch:
                told = _points(log, network, held_out if ends_epoch else None, optimizer, place)
                watch.progress(place.batch, total, told)
            if place.batch == total:
                break
            stop = watch.stop()
            if stop or time.monotonic() - saved_at > config.checkpoint_seconds:
                save()
                saved_at = time.monotonic()
            if stop:
                raise Stopped
        save()
    checkpoint.save(folder, TEACHER, weights(network), {**facts, "seed": seed, "images": place.images})


def _step(
    network: Classifier, optimizer: torch.optim.SGD, images: Tensor, labels: Tensor, config: TrainConfig, place: _Place
) -> None:
    network.train()
    images, labels = (part.to(network.mean.device) for part in (images, labels))
    with torch.autocast(images.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        logits = network(images).logits[:, -1]
    losses = functional.cross_entropy(logits.float(), labels, reduction="none")
    if not bool(torch.isfinite(losses).all()):
        raise Diverged(
            f"`train/loss` became {float(losses.detach().mean())} after {place.images} images. The last checkpoint is "
            "kept; lower `train.learning_rate` or set `train.precision` to fp32, and start over with --force."
        )
    optimizer.zero_grad(set_to_none=True)
    losses.mean().backward()
    optimizer.step()
    place.seen.add(losses.detach(), int((logits.argmax(dim=1) == labels).sum()))


def _points(
    log: RunLog, network: Classifier, held_out: Images | None, optimizer: torch.optim.SGD, place: _Place
) -> dict[str, float]:
    """One point of every curve; what was summed since the last one is forgotten."""
    seen, place.seen = place.seen, _Seen()
    told = {"train/loss": seen.loss / seen.images, "train/accuracy": seen.right / seen.images}
    told["train/learning_rate"] = optimizer.param_groups[0]["lr"]
    if held_out is not None:
        told["held_out/accuracy"] = accuracy(network, held_out)
    for tag, value in told.items():
        log.scalar(tag, value, place.images)
    return {tag.replace("/", " "): value for tag, value in told.items() if tag.endswith("accuracy")}


@torch.no_grad()
def accuracy(network: Classifier, images: Images) -> float:
    """Share of images that the network's last exit gets right; the network is in evaluation mode afterwards."""
    network.eval()
    pairs = zip(images.pixels.split(CHUNK), images.labels.split(CHUNK), strict=True)
    place = network.mean.device
    right = sum(
        int((network(pixels.to(place)).logits[:, -1].argmax(dim=1).cpu() == labels).sum()) for pixels, labels in pairs
    )
    return right / len(images)


def _restore(folder: Path, network: Classifier, optimizer: torch.optim.SGD, seed: int) -> _Place:
    tensors, facts = checkpoint.load_state(folder, STATE)
    if facts["seed"] != seed:
        raise checkpoint.CheckpointError(
            f"`{folder}` holds a training with seed {facts['seed']}, got {seed}. Use that seed, or another --out."
        )
    network.load_state_dict(checkpoint.subset(tensors, "network"))
    checkpoint.unpack_optimizer(optimizer, "optimizer", tensors)
    torch.set_rng_state(tensors["random"])
    return _Place(int(facts["batch"]), int(facts["images"]), _Seen(**facts["seen"]))

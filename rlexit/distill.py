"""Distillation: early heads learn a frozen backbone's answers, or labels, on data collected by acting with every exit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlexit import checkpoint
from rlexit.config import DistillConfig
from rlexit.domain import Batches
from rlexit.ensembles import fit_ensemble
from rlexit.interrupts import Diverged, Stopped
from rlexit.objectives import agreement, cross_entropy, kl_divergence
from rlexit.runlog import RunLog
from rlexit.students import Student

STATE = "state"


@dataclass
class _Buffer:
    """What was seen since the last update: features and teacher's answers, computed once, and labels if there are any."""

    features: list[list[Tensor]]
    teacher: list[Tensor]
    labels: list[Tensor]

    def clear(self) -> None:
        self.features, self.teacher, self.labels = [], [], []

    def joined(self) -> tuple[list[Tensor], Tensor, Tensor | None]:
        features = [torch.cat(parts) for parts in zip(*self.features, strict=True)]
        return features, torch.cat(self.teacher), torch.cat(self.labels) if self.labels else None


def loss_of(config: DistillConfig) -> Callable[..., Tensor]:
    """The unreduced loss (B, K) of student answers (B, K, A) against teacher log-probabilities (B, A) and labels (B,)."""

    def loss(teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        if config.label_weight == 1 and not config.reference:
            return cross_entropy(teacher.argmax(dim=-1) if labels is None else labels, student)
        total = kl_divergence(teacher, student)
        if config.reference:
            total = total / student.shape[-1]
        if config.label_weight:
            wrong = cross_entropy(teacher.argmax(dim=-1) if labels is None else labels, student)
            total = (1 - config.label_weight) * total + config.label_weight * wrong
        return total

    return loss


def learning_rate(config: DistillConfig, done: float) -> float:
    """Adam's rate after a share `done` of all updates: it rises, then falls by a cosine or in two steps."""
    rate = config.learning_rate * min(done / config.warmup, 1.0) if config.warmup else config.learning_rate
    if config.schedule == "cosine":
        return rate * (1 + math.cos(math.pi * done)) / 2
    first, second = config.decay_at
    return rate * (1.0 if done < first else 0.1 if done < second else 0.01)


class Distiller:
    """Runs both stages, heads then ensembles, with checkpoints that resume bit for bit.

    Args:
        student: what learns.
        batches: where samples come from.
        config: settings.
        folder: for checkpoints and curves.
        seed: of exits drawn and minibatches; the domain seeds its own games.
        stop: asked between two buffers; a true answer raises Stopped, and the last checkpoint is where it goes on.
        progress: told (samples so far, samples in all, facts).
    """

    def __init__(
        self,
        student: Student,
        batches: Batches,
        config: DistillConfig,
        folder: Path,
        seed: int,
        stop: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int, dict[str, float]], None] = lambda done, total, facts: None,
    ) -> None:
        self.student, self.batches, self.config, self.folder = student, batches, config, folder
        self.stop, self.progress = stop, progress
        self.generator = torch.Generator().manual_seed(seed)
        self.loss = loss_of(config)
        self.buffer = _Buffer([], [], [])
        self.buffers = 0
        self.samples = 0
        self.newest = torch.empty(0)
        stages = {"heads": student.groups(), "ensemble": {1.0: list(student.ensemble.parameters())}}
        self.optimizers = {
            name: torch.optim.Adam(
                [{"params": parameters, "share": share} for share, parameters in groups.items()],
                lr=config.learning_rate,
                weight_decay=config.weight_decay if name == "heads" else 0.0,
                fused=True,
            )
            for name, groups in stages.items()
            if any(groups.values())
        }

    @property
    def total(self) -> int:
        """Samples of both stages."""
        return self.config.steps + (self.config.ensemble_steps if self._fits_ensemble else 0)

    @property
    def _fits_ensemble(self) -> bool:
        return bool(list(self.student.ensemble.parameters()))

    def run(self) -> dict[str, float]:
        """Trains to the end, or goes on where an earlier call stopped.

        Returns:
            Last values of the curves, by tag.
        Raises:
            Stopped: `stop` answered true.
            Diverged: a loss is NaN or infinite; the last checkpoint is healthy.
        """
        self.start()
        facts: dict[str, float] = {}
        for told in self.steps():
            facts = told
        return facts

    def start(self) -> None:
        """Makes ready to learn, and reads the last checkpoint if there is one."""
        for parameter in self.student.parameters():
            parameter.requires_grad_(False)
        for parameter in (*self.student.learners().parameters(), *self.student.ensemble.parameters()):
            parameter.requires_grad_(True)
        # A frozen backbone has frozen batch statistics too.
        self.student.eval()
        self.student.learners().train()
        if checkpoint.exists(self.folder, STATE):
            self._restore()

    def steps(self) -> Iterator[dict[str, float]]:
        """Trains buffer by buffer, so that several can be trained in turn; yields the curves' newest values."""
        with RunLog(self.folder, resume_step=self.samples) as log:
            while self.samples < self.total:
                yield from self._segment(log)
                if self.samples < self.total:
                    # Points first: a kill in between leaves points too many, which a resume drops, and none too few.
                    log.flush()
                    self._save()
                    if self.stop():
                        raise Stopped

    def _segment(self, log: RunLog) -> Iterator[dict[str, float]]:
        """Collects and learns until the next checkpoint; the fit of the ensembles is one segment."""
        facts: dict[str, float] = {}
        cached: list[tuple[Tensor, ...]] = []
        fitting = self._in_ensemble_stage and not self.config.reference
        if fitting:  # nothing else learns now
            self.student.eval()
        for count in self.batches(self._act, self.buffers):
            in_heads = not self._in_ensemble_stage
            features, teacher, labels = self.buffer.joined()
            self.buffer.clear()
            self.buffers += 1
            self.samples += count
            if fitting:
                with torch.no_grad():
                    self.newest = self._answers(features)
                    cached.append(
                        (self._ensembled(self.newest, teacher), teacher, *(() if labels is None else (labels,)))
                    )
            else:
                facts = self._update(features, teacher, labels, in_heads)
            # Whoever waits for others holds nothing large.
            del features, teacher, labels
            self._log(log, facts)
            self.progress(self.samples, self.total, facts)
            yield facts
            if self.samples >= self.total:
                break
            changes_stage = in_heads and self._in_ensemble_stage
            if not fitting and (changes_stage or self.buffers % self.config.checkpoint_buffers == 0):
                break
            if self.stop():
                # Not saved: games restart at checkpoints, and one more of them would change what follows.
                raise Stopped
        self._show_margins(log)
        if fitting:
            facts = self._fit(*(torch.cat(parts) for parts in zip(*cached, strict=True)))
            self._log(log, facts)
            yield facts

    @property
    def _in_ensemble_stage(self) -> bool:
        return self.samples >= self.config.steps

    def _show_margins(self, log: RunLog) -> None:
        """How far apart the two likeliest outputs of the newest minibatch are at every exit, as histograms."""
        top = self.newest.topk(min(2, self.newest.shape[-1]), dim=-1).values
        for exit, margins in enumerate((top[..., 0] - top[..., -1]).unbind(dim=1)):
            log.histogram(f"distill/logit_margin/exit{exit}", margins.cpu().numpy(), self.samples)

    def _log(self, log: RunLog, facts: dict[str, float]) -> None:
        for tag, value in facts.items():
            log.scalar(f"distill/{tag}", value, self.samples)

    @torch.no_grad()
    def _act(self, inputs: Any, labels: Tensor | None = None) -> Tensor:
        """Remembers what is seen; answers of a uniformly drawn exit per row, the teacher among them.

        Where labels are known nobody acts, so no head is run and the answers are the teacher's.
        """
        place = next(self.student.parameters()).device
        with torch.autocast(place.type, torch.bfloat16, enabled=self.config.frozen_precision == "bf16"):
            features, teacher = self.student.observe(inputs)
        teacher = teacher.float()
        self.buffer.features.append(features)
        self.buffer.teacher.append(teacher)
        if labels is not None:
            self.buffer.labels.append(labels.to(place))
            return teacher.cpu()
        early = self._answers(features)
        if self._in_ensemble_stage:
            early = self.student.ensemble.combine_all(self._ensembled(early, teacher))[:, : early.shape[1]]
        answers = torch.cat([early, teacher[:, None]], dim=1)
        rows = torch.arange(len(answers))
        drawn = torch.randint(answers.shape[1], (len(answers),), generator=self.generator).to(answers.device)
        if self.config.reference:
            rows = torch.zeros_like(rows)
        return answers[rows.to(place), drawn].cpu()  # games are played there

    def _answers(self, features: list[Tensor]) -> Tensor:
        """Log-probabilities of the early exits, in the precision that the features are kept in."""
        lowered = self.config.frozen_precision == "bf16"
        with torch.autocast(features[0].device.type, torch.bfloat16, enabled=lowered):
            logits = self.student.logits(features)
        return logits.float().log_softmax(dim=-1)

    def _ensembled(self, early: Tensor, teacher: Tensor) -> Tensor:
        """What the ensemble combines: the early exits, and the last one too if it has a place for it."""
        return torch.cat([early, teacher[:, None]], dim=1) if self.student.ensemble.exits > early.shape[1] else early

    def _update(
        self, features: list[Tensor], teacher: Tensor, labels: Tensor | None, in_heads: bool
    ) -> dict[str, float]:
        """Several passes over one buffer; returns the mean loss and agreement per exit before it was learnt from."""
        optimizer = self.optimizers["heads" if in_heads else "ensemble"]
        start = self.config.steps if not in_heads else 0
        length = self.config.ensemble_steps if not in_heads else self.config.steps
        for group in optimizer.param_groups:
            # In the middle of the buffer: at its ends, the first and the last one would be learnt at a rate of nothing.
            rate = learning_rate(self.config, min((self.samples - start - len(teacher) / 2) / length, 1.0))
            group["lr"] = group["share"] * rate
        seen: list[Tensor] = []
        for epoch in range(self.config.epochs):
            order = torch.randperm(len(teacher), generator=self.generator).to(teacher.device)
            for index in order.split(self.config.batch_size):
                with torch.autocast(teacher.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                    logits = self.student.logits([part[index] for part in features])
                answers = logits.float().log_softmax(dim=-1)
                self.newest = answers.detach()
                if not in_heads:
                    answers = self.student.ensemble.combine_all(self._ensembled(answers.detach(), teacher[index]))
                losses = self.loss(teacher[index], answers, None if labels is None else labels[index])
                optimizer.zero_grad(set_to_none=True)
                losses.mean(dim=0).sum().backward()
                optimizer.step()
                if epoch == 0:
                    seen.append(torch.stack([losses.detach(), agreement(teacher[index], answers.detach())]))
        losses, agreements = torch.cat(seen, dim=1).mean(dim=1)
        if not bool(torch.isfinite(losses).all()):
            raise Diverged(
                f"`distill/{self.curve}` became {losses.tolist()} after {self.samples} samples. The last checkpoint is "
                "kept; lower `distill.learning_rate` and start over with --force."
            )
        return self._facts(losses, agreements)

    def _fit(self, log_probabilities: Tensor, teacher: Tensor, labels: Tensor | None = None) -> dict[str, float]:
        """Fits the ensembles on the cached log-probabilities."""

        def loss(answers: Tensor) -> Tensor:
            return self.loss(teacher, answers, labels)

        alone = loss(log_probabilities).mean(dim=0).tolist()
        fitted = fit_ensemble(self.student.ensemble, log_probabilities, loss)
        with torch.no_grad():
            agree = agreement(teacher, self.student.ensemble.combine_all(log_probabilities)).mean(dim=0)
        facts = self._facts(torch.tensor(fitted), agree)
        for exit, weights in enumerate(self.student.ensemble.weights()):
            facts |= {
                f"ensemble_weight/exit{exit}/of{earlier}": value for earlier, value in enumerate(weights.tolist())
            }
        return facts | {f"{self.curve}_without_ensemble/exit{exit}": value for exit, value in enumerate(alone)}

    @property
    def curve(self) -> str:
        """What the loss is called: with labels in it, it is no divergence."""
        return "loss" if self.config.label_weight else "kl"

    def _facts(self, losses: Tensor, agreements: Tensor) -> dict[str, float]:
        facts = {f"{self.curve}/exit{exit}": value for exit, value in enumerate(losses.tolist())}
        return facts | {f"agree/exit{exit}": value for exit, value in enumerate(agreements.tolist())}

    def _save(self) -> None:
        tensors = {f"learners.{key}": value for key, value in self.student.learners().state_dict().items()}
        tensors |= {f"ensemble.{key}": value for key, value in self.student.ensemble.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            tensors |= checkpoint.pack_optimizer(optimizer, f"optimizer_{name}")
        tensors["random"] = self.generator.get_state()
        tensors["random_torch"] = torch.get_rng_state()  # what dropout draws from
        checkpoint.save(self.folder, STATE, tensors, {"buffers": self.buffers, "samples": self.samples})

    def _restore(self) -> None:
        tensors, facts = checkpoint.load_state(self.folder, STATE)
        self.buffers, self.samples = int(facts["buffers"]), int(facts["samples"])
        self.student.learners().load_state_dict(checkpoint.subset(tensors, "learners"))
        self.student.ensemble.load_state_dict(checkpoint.subset(tensors, "ensemble"))
        for name, optimizer in self.optimizers.items():
            checkpoint.unpack_optimizer(optimizer, f"optimizer_{name}", tensors)
        self.generator.set_state(tensors["random"])
        torch.set_rng_state(tensors["random_torch"])

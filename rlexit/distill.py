"""Distillation: early heads learn the frozen teacher's answers on data collected by acting with every exit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlexit import checkpoint
from rlexit.config import DistillConfig
from rlexit.domain import Batches
from rlexit.ensembles import Ensemble, fit_ensemble
from rlexit.interrupts import Diverged, Stopped
from rlexit.network import StagedNetwork
from rlexit.objectives import agreement, cross_entropy, kl_divergence
from rlexit.runlog import RunLog

STATE = "state"


class Student(nn.Module):
    """What learns: reads features that are computed once per sample, answers at every exit.

    `ensemble` combines the exits; the others are its own business.
    """

    ensemble: Ensemble

    def observe(self, inputs: Any) -> tuple[list[Tensor], Float[Tensor, "batch outputs"]]:
        """Without gradient: features of every early exit, and the teacher's log-probabilities."""
        raise TypeError(f"`{type(self).__name__}` must implement `observe`.")

    def logits(self, features: Sequence[Tensor]) -> Float[Tensor, "batch exits outputs"]:
        """Raw logits of the early exits, with gradient."""
        raise TypeError(f"`{type(self).__name__}` must implement `logits`.")

    def learners(self) -> nn.Module:
        """The module that is trained; everything else is frozen."""
        raise TypeError(f"`{type(self).__name__}` must implement `learners`.")


class ExitStudent(Student):
    """Early heads on a frozen backbone, taught by its own last exit.

    Args:
        network: heads and ensemble are trained in place; one with an early exit at least.
    Raises:
        ValueError: the network has no early exit.
    """

    def __init__(self, network: StagedNetwork) -> None:
        super().__init__()
        if network.exits < 2:
            raise ValueError("`network.taps` must name at least one unit to distill, got none. Add an early exit.")
        self.network = network
        self.ensemble = network.ensemble

    @torch.no_grad()
    def observe(self, inputs: Any) -> tuple[list[Tensor], Float[Tensor, "batch outputs"]]:
        """What the early heads read, and the last exit's log-probabilities."""
        *early, last = self.network.taps(inputs)
        return self.network.gather(early), self.network.head(self.network.exits - 1)(last).log_softmax(dim=-1)

    def logits(self, features: Sequence[Tensor]) -> Float[Tensor, "batch exits outputs"]:
        """Raw logits of the early exits, cascade included."""
        return self.network.read(features)

    def learners(self) -> nn.Module:
        """The early heads."""
        return nn.ModuleList(self.network.head(exit) for exit in range(self.network.exits - 1))


class StaticStudent(Student):
    """Small networks without exits, taught by the same teacher on the same kind of data; the honest baseline.

    Args:
        networks: each with one exit, trained from scratch.
        teacher: frozen.
    """

    def __init__(self, networks: Sequence[StagedNetwork], teacher: StagedNetwork, ensemble: Ensemble) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.teacher = teacher
        self.ensemble = ensemble

    @torch.no_grad()
    def observe(self, inputs: Any) -> tuple[list[Tensor], Float[Tensor, "batch outputs"]]:
        """The raw inputs themselves, and the teacher's log-probabilities."""
        return [inputs], self.teacher(inputs).answers[:, -1]

    def logits(self, features: Sequence[Tensor]) -> Float[Tensor, "batch exits outputs"]:
        """Logits of every network."""
        return torch.cat([network(features[0]).logits for network in self.networks], dim=1)

    def learners(self) -> nn.Module:
        """All networks whole."""
        return self.networks


@dataclass
class _Buffer:
    """What was seen since the last update: features and teacher's answers, computed once."""

    features: list[list[Tensor]]
    teacher: list[Tensor]

    def clear(self) -> None:
        self.features, self.teacher = [], []

    def joined(self) -> tuple[list[Tensor], Tensor]:
        return [torch.cat(parts) for parts in zip(*self.features, strict=True)], torch.cat(self.teacher)


def loss_of(config: DistillConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The unreduced loss (B, K) of student answers (B, K, A) against teacher log-probabilities (B, A)."""

    def loss(teacher: Tensor, student: Tensor) -> Tensor:
        total = kl_divergence(teacher, student)
        if config.reference:
            total = total / student.shape[-1]
        if config.label_weight:
            labels = cross_entropy(teacher.argmax(dim=-1), student)
            total = (1 - config.label_weight) * total + config.label_weight * labels
        return total

    return loss


def learning_rate(config: DistillConfig, done: float) -> float:
    """Adam's rate after a share `done` of all updates: full, then a tenth, then a hundredth."""
    first, second = config.decay_at
    return config.learning_rate * (1.0 if done < first else 0.1 if done < second else 0.01)


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
        self.buffer = _Buffer([], [])
        self.buffers = 0
        self.samples = 0
        self.newest = torch.empty(0)
        stages: dict[str, nn.Module] = {"heads": student.learners(), "ensemble": student.ensemble}
        self.optimizers = {
            name: torch.optim.Adam(module.parameters(), lr=config.learning_rate, fused=True)
            for name, module in stages.items()
            if list(module.parameters())
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
        for parameter in self.student.parameters():
            parameter.requires_grad_(False)
        for parameter in (*self.student.learners().parameters(), *self.student.ensemble.parameters()):
            parameter.requires_grad_(True)
        # A frozen backbone has frozen batch statistics too.
        self.student.eval()
        self.student.learners().train()
        if checkpoint.exists(self.folder, STATE):
            self._restore()
        facts: dict[str, float] = {}
        with RunLog(self.folder, resume_step=self.samples) as log:
            while self.samples < self.total:
                facts = self._segment(log)
                if self.samples < self.total:
                    # Points first: a kill in between leaves points too many, which a resume drops, and none too few.
                    log.flush()
                    self._save()
                    if self.stop():
                        raise Stopped
        return facts

    def _segment(self, log: RunLog) -> dict[str, float]:
        """Collects and learns until the next checkpoint; the fit of the ensembles is one segment."""
        facts: dict[str, float] = {}
        cached: list[tuple[Tensor, Tensor]] = []
        fitting = self._in_ensemble_stage and not self.config.reference
        for count in self.batches(self._act, self.buffers):
            in_heads = not self._in_ensemble_stage
            features, teacher = self.buffer.joined()
            self.buffer.clear()
            self.buffers += 1
            self.samples += count
            if fitting:
                with torch.no_grad():
                    self.newest = self.student.logits(features).log_softmax(dim=-1)
                    cached.append((self.newest, teacher))
            else:
                facts = self._update(features, teacher, in_heads)
            self._log(log, facts)
            self.progress(self.samples, self.total, facts)
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
            facts = self._fit(torch.cat([part for part, _ in cached]), torch.cat([part for _, part in cached]))
            self._log(log, facts)
        return facts

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
    def _act(self, inputs: Any) -> Tensor:
        """Answers of a uniformly drawn exit per row, the teacher among them, and remembers what was seen."""
        features, teacher = self.student.observe(inputs)
        self.buffer.features.append(features)
        self.buffer.teacher.append(teacher)
        logits = self.student.logits(features)
        if self._in_ensemble_stage:
            early = self.student.ensemble.combine_all(logits.log_softmax(dim=-1))
        else:
            early = logits.log_softmax(dim=-1)
        answers = torch.cat([early, teacher[:, None]], dim=1)
        rows = torch.arange(len(answers))
        drawn = torch.randint(answers.shape[1], (len(answers),), generator=self.generator).to(answers.device)
        if self.config.reference:
            rows = torch.zeros_like(rows)
        return answers[rows, drawn]

    def _update(self, features: list[Tensor], teacher: Tensor, in_heads: bool) -> dict[str, float]:
        """Several passes over one buffer; returns the mean loss and agreement per exit before it was learnt from."""
        optimizer = self.optimizers["heads" if in_heads else "ensemble"]
        start = self.config.steps if not in_heads else 0
        length = self.config.ensemble_steps if not in_heads else self.config.steps
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.config, (self.samples - start) / length)
        seen: list[Tensor] = []
        for epoch in range(self.config.epochs):
            order = torch.randperm(len(teacher), generator=self.generator).to(teacher.device)
            for index in order.split(self.config.batch_size):
                with torch.autocast(teacher.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                    logits = self.student.logits([part[index] for part in features])
                answers = logits.float().log_softmax(dim=-1)
                self.newest = answers.detach()
                if not in_heads:
                    answers = self.student.ensemble.combine_all(answers.detach())
                losses = self.loss(teacher[index], answers)
                optimizer.zero_grad(set_to_none=True)
                losses.mean(dim=0).sum().backward()
                optimizer.step()
                if epoch == 0:
                    seen.append(torch.stack([losses.detach(), agreement(teacher[index], answers.detach())]))
        losses, agreements = torch.cat(seen, dim=1).mean(dim=1)
        if not bool(torch.isfinite(losses).all()):
            raise Diverged(
                f"`distill/kl` became {losses.tolist()} after {self.samples} samples. The last checkpoint is kept; "
                "lower `distill.learning_rate` and start over with --force."
            )
        return _facts(losses, agreements)

    def _fit(self, log_probabilities: Tensor, teacher: Tensor) -> dict[str, float]:
        """Fits the ensembles on the cached log-probabilities."""
        alone = self.loss(teacher, log_probabilities).mean(dim=0).tolist()
        fitted = fit_ensemble(self.student.ensemble, log_probabilities, lambda answers: self.loss(teacher, answers))
        with torch.no_grad():
            agree = agreement(teacher, self.student.ensemble.combine_all(log_probabilities)).mean(dim=0)
        facts = _facts(torch.tensor(fitted), agree)
        for exit, weights in enumerate(self.student.ensemble.weights()):
            facts |= {
                f"ensemble_weight/exit{exit}/of{earlier}": value for earlier, value in enumerate(weights.tolist())
            }
        return facts | {f"kl_without_ensemble/exit{exit}": value for exit, value in enumerate(alone)}

    def _save(self) -> None:
        tensors = {f"learners.{key}": value for key, value in self.student.learners().state_dict().items()}
        tensors |= {f"ensemble.{key}": value for key, value in self.student.ensemble.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            tensors |= checkpoint.pack_optimizer(optimizer, f"optimizer_{name}")
        tensors["random"] = self.generator.get_state()
        checkpoint.save(self.folder, STATE, tensors, {"buffers": self.buffers, "samples": self.samples})

    def _restore(self) -> None:
        tensors, facts = checkpoint.load_state(self.folder, STATE)
        self.buffers, self.samples = int(facts["buffers"]), int(facts["samples"])
        self.student.learners().load_state_dict(checkpoint.subset(tensors, "learners"))
        self.student.ensemble.load_state_dict(checkpoint.subset(tensors, "ensemble"))
        for name, optimizer in self.optimizers.items():
            checkpoint.unpack_optimizer(optimizer, f"optimizer_{name}", tensors)
        self.generator.set_state(tensors["random"])


def _facts(losses: Tensor, agreements: Tensor) -> dict[str, float]:
    facts = {f"kl/exit{exit}": value for exit, value in enumerate(losses.tolist())}
    return facts | {f"agree/exit{exit}": value for exit, value in enumerate(agreements.tolist())}

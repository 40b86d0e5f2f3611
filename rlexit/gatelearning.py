"""The loop in which gates learn from labelled samples: one update per batch, checkpoints that resume bit for bit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlexit import checkpoint
from rlexit.batchnorm import recalibrate
from rlexit.collapse import CollapseWatch
from rlexit.domain import Batches, Watch
from rlexit.gates import Decision
from rlexit.interrupts import Diverged, Stopped
from rlexit.network import StagedNetwork
from rlexit.runlog import RunLog

STATE = "state"
HEALTHY = "healthy"


@dataclass(frozen=True)
class Plan:
    """How long a learner learns and when it saves.

    Args:
        steps: samples, each in one update.
        checkpoint_buffers: collected buffers between checkpoints.
        collapse_after: updates in a row with all gates shut, or all open, that are told as a collapse; 0 for never.
        recalibrate: samples on which batch statistics are taken anew at the end; 0 leaves them.
        full: multiply-adds of the head-free network, every gate open.
        section: of the config, as warnings call it.
    """

    steps: int
    checkpoint_buffers: int
    collapse_after: int
    recalibrate: int
    full: int
    section: str


def cosine(done: float, warmup: float) -> float:
    """Share of the highest rate after a share `done` of all updates: rises in `warmup`, then falls to nothing."""
    return min(done / warmup if warmup else 1.0, 1.0) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def legacy_cp(shares: Sequence[float]) -> float:
    """SkipNet's "computation percentage": (sum of the gates' open shares + 1) / (gates + 1), in [0, 1].

    Units count alike, the first block that always runs among them; stem, head, gates and projections count nothing. It is
    shown beside relative MACs so that published figures can be compared, and is never a cost here.

    Args:
        shares: of rows for which each gate is open.
    Source: skipnet, cifar/train_rl.py:369.
    """
    return (sum(shares) + 1) / (len(shares) + 1)


class GateLearner:
    """Learns a network with gates in place. A subclass implements `learn`, and `extra` and `resume` if it keeps more.

    Args:
        network: with gates; trained in place, all of it saved.
        batches: where samples come from, with labels.
        plan: how long, and when to save.
        optimizers: by name, all that are stepped.
        folder: for checkpoints and curves.
        seed: of draws; the domain seeds its own samples.
        watch: stop and progress.
    """

    def __init__(
        self,
        network: StagedNetwork,
        batches: Batches,
        plan: Plan,
        optimizers: Mapping[str, torch.optim.Optimizer],
        folder: Path,
        seed: int,
        watch: Watch,
    ) -> None:
        self.network, self.batches, self.plan, self.folder, self.watch = network, batches, plan, folder, watch
        self.optimizers = optimizers
        self.generator = torch.Generator().manual_seed(seed)
        section = plan.section
        self.collapse = CollapseWatch(
            plan.collapse_after,
            (
                f"Lower `{section}.price` or `{section}.dual_rate`, or raise `{section}.target_macs`; "
                f"`{HEALTHY}` in the run folder is the last state in which they decided.",
                f"Raise `{section}.price` or `{section}.dual_rate`, or start gates with a lower `gates.bias`.",
            ),
        )
        self.samples = self.buffers = 0
        self.facts: list[dict[str, float]] = []
        self.last: dict[str, float] = {}

    def learn(self, inputs: Any, labels: Tensor | None) -> tuple[Float[Tensor, "batch outputs"], dict[str, float]]:
        """One update.

        Returns:
            Log-probabilities of the last exit, and what is told of the update; `loss` among it.
        """
        raise TypeError(f"`{type(self).__name__}` must implement `learn`.")

    def extra(self) -> dict[str, Any]:
        """JSON values that a resume needs besides weights, moments and draws."""
        return {}

    def resume(self, extra: Mapping[str, Any]) -> None:
        """Takes back what `extra` gave."""

    def settle(self) -> dict[str, float]:
        """What is done once at the end, and told."""
        return {}

    @property
    def done(self) -> float:
        """Share of all samples that were learnt from."""
        return self.samples / self.plan.steps

    @property
    def pressed(self) -> bool:
        """Whether compute is pressed on by now, so that gates should not be all open."""
        return True

    def run(self) -> dict[str, float]:
        """Learns to the end, or goes on where an earlier call stopped.

        Returns:
            Last values of the curves, by tag.
        Raises:
            Stopped: `watch` says so; the last checkpoint is where it goes on.
            Diverged: a loss is NaN or infinite; the last checkpoint is healthy.
        """
        if checkpoint.exists(self.folder, STATE):
            self._restore()
        with RunLog(self.folder, resume_step=self.samples) as log:
            while self.samples < self.plan.steps:
                self._segment(log)
                # Points first: a kill in between leaves points too many, which a resume drops, and none too few.
                log.flush()
                self._save(STATE)
                if self.collapse.healthy:
                    self._save(HEALTHY)
            if self.plan.recalibrate:
                recalibrate(self.network, self._inputs(self.plan.recalibrate))
            settled = self.settle()
            for tag, value in settled.items():
                # A step on, so that who resumes at the end drops them before they come again.
                log.scalar(tag, value, self.samples + 1)
        self.network.eval()
        return {**self.last, **settled}

    def _segment(self, log: RunLog) -> None:
        """Learns until the next checkpoint."""
        for count in self.batches(self._act, self.buffers):
            self.buffers += 1
            self.samples += count
            told, self.facts = self.facts, []
            facts = {tag: sum(one[tag] for one in told) / len(told) for tag in told[0]}
            self.last = facts
            for tag, value in facts.items():
                log.scalar(tag, value, self.samples)
            self.watch.progress(self.samples, self.plan.steps, {k: v for k, v in facts.items() if "open_frac" not in k})
            if self.samples >= self.plan.steps or self.buffers % self.plan.checkpoint_buffers == 0:
                break
            if self.watch.stop():
                # Not saved: a domain may restart its games at checkpoints, and one more would change what follows.
                raise Stopped

    def _act(self, inputs: Any, labels: Tensor | None = None) -> Tensor:
        """One update on what the domain collected."""
        answers, facts = self.learn(inputs, labels)
        if not all(math.isfinite(value) for value in facts.values()):
            raise Diverged(
                f"`{self.plan.section}` met a loss of {facts['loss']} after {self.samples} samples. The last checkpoint "
                f"is kept; lower `{self.plan.section}.learning_rate` and start over with --force."
            )
        shares = {tag: value for tag, value in facts.items() if tag.startswith("gate/open_frac/")}
        warning = self.collapse.observe(shares, not self.pressed) if self.plan.collapse_after else None
        if warning:
            warnings.warn(warning, RuntimeWarning, stacklevel=2)
        self.facts.append(facts)
        return answers

    def shares(self, decisions: Sequence[Decision]) -> dict[str, float]:
        """Share of rows for which each gate was open, by its curve's tag, and SkipNet's percentage of them."""
        found = {
            f"gate/open_frac/{name}": float((decision.action > 0).double().mean())
            for name, decision in zip(self.network.gates, decisions, strict=True)
            if self.network.gates[name].decides
        }
        return {**found, "gate/legacy_cp": legacy_cp(list(found.values()))}

    def _inputs(self, count: int) -> list[Any]:
        """Inputs of the stream from its beginning, `count` samples or a little more."""
        kept: list[Any] = []

        def keep(inputs: Any, labels: Tensor | None = None) -> Tensor:
            kept.append(inputs)
            return torch.zeros((len(inputs), self.network.outputs))

        for _ in self.batches(keep, 0):
            if sum(map(len, kept)) >= count:
                break
        return kept

    def _save(self, name: str) -> None:
        tensors = {f"network.{key}": value for key, value in self.network.state_dict().items()}
        for key, optimizer in self.optimizers.items():
            tensors |= checkpoint.pack_optimizer(optimizer, f"optimizer_{key}")
        tensors["random"] = self.generator.get_state()
        counts = {"buffers": self.buffers, "samples": self.samples}
        streaks = {"shut": self.collapse.shut, "open": self.collapse.open}
        checkpoint.save(self.folder, name, tensors, {**counts, **streaks, "last": self.last, "extra": self.extra()})

    def _restore(self) -> None:
        tensors, facts = checkpoint.load_state(self.folder, STATE)
        self.buffers, self.samples = int(facts["buffers"]), int(facts["samples"])
        self.collapse.shut, self.collapse.open = int(facts["shut"]), int(facts["open"])
        self.last = dict(facts["last"])
        self.network.load_state_dict(checkpoint.subset(tensors, "network"))
        for key, optimizer in self.optimizers.items():
            checkpoint.unpack_optimizer(optimizer, f"optimizer_{key}", tensors)
        self.generator.set_state(tensors["random"])
        self.resume(facts["extra"])

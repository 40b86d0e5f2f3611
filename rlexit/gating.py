"""Supervised learning of gates: labels and a price on compute, through straight-through decisions, trunk along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlexit import checkpoint
from rlexit.batchnorm import frozen
from rlexit.domain import Batches, Watch
from rlexit.energy import EnergyTable
from rlexit.gatelearning import STATE, GateLearner, Plan, cosine
from rlexit.gates import Decision, opened
from rlexit.gates.estimators import estimators
from rlexit.gating_config import GatingConfig
from rlexit.network import StagedNetwork
from rlexit.objectives import cross_entropy, hint_distance, softened_divergence
from rlexit.ranking import rank, start_ranked
from rlexit.resource import ResourceLoss
from rlexit.trace import Trace
from rlexit.warmup import warm_up


class GateTrainer(GateLearner):
    """Trains gates, trunk and exits together: sum of cross-entropies, hint and divergence + lambda * relative compute.

    Where the config says so, rows first skip units by chance, then units are ranked, then gates learn from that order on.

    Samples without labels are learnt from the original's answers. It is needed then, for hints and for distillation.

    Args:
        network: with gates.
        original: the full network, frozen; or None.
        batches: where samples come from.
        config: settings.
        full: multiply-adds of the head-free network, every gate open.
        energy: prices compute in place of multiply-adds; None for these.
        estimator: registered name, of the gates.
        folder: for checkpoints and curves.
        seed: of stochastic gates.
        watch: stop and progress.
    Source: Wang et al. 2020 (DDI), arXiv 1907.04523, equations 4 and 5; without a price, SkipNet's supervised stage.
    """

    def __init__(
        self,
        network: StagedNetwork,
        original: StagedNetwork | None,
        batches: Batches,
        config: GatingConfig,
        full: int,
        energy: EnergyTable | None,
        estimator: str,
        folder: Path,
        seed: int,
        watch: Watch,
    ) -> None:
        priced = config.cost != "linear" or config.price > 0
        after = config.collapse_after if priced else 0
        plan = Plan(config.steps, config.checkpoint_buffers, after, config.recalibrate, full, "gating")
        gates: list[Any] = list(network.gates.values())
        offsets = [parameter for gate in gates for parameter in gate.offsets()]
        last = network.head(network.exits - 1)
        apart = {id(one) for one in (*offsets, *network.units.parameters(), *last.parameters())}
        early = [one for one in (*network.heads.parameters(), *network.ensemble.parameters()) if id(one) not in apart]
        seeing = [one for one in network.gates.parameters() if id(one) not in apart]
        trunk = [*network.units.parameters(), *last.parameters()]
        optimizers: dict[str, torch.optim.Optimizer] = {
            "trunk": torch.optim.SGD(
                trunk, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
            )
        }
        for name, parameters in (("heads", early), ("offsets", offsets), ("gates", seeing)):
            if parameters:
                optimizers[name] = torch.optim.Adam(parameters, lr=config.fresh_learning_rate, fused=True)
        super().__init__(network, batches, plan, optimizers, folder, seed, watch)
        self.config, self.original, self.energy = config, original, energy
        self.resource = ResourceLoss(
            config.cost, config.price, config.target_macs, rate=config.dual_rate, price_max=config.price_max
        )
        # Without a target there is nothing to start at; gates without a logit of their own cannot be moved apart.
        skipping = [gate for gate in gates if gate.may_skip and gate.decides]
        starts = config.cost != "linear" and bool(skipping) and all(gate.shifts for gate in skipping)
        self.explore, self.ranked = (config.explore, not config.rank) if starts else (0.0, True)
        self.anneal = 0.0 if starts and config.rank else config.anneal
        self.started_shut = self.updates = 0
        self.stochastic = estimators[estimator]().stochastic

    def run(self) -> dict[str, float]:
        """The warm-up if there is one, then as `GateLearner.run`."""
        fresh = not checkpoint.exists(self.folder, STATE)
        if self.config.warm_up and fresh and list(self.network.gates.parameters()):
            warm_up(self.network, self._inputs(self.config.warm_up))
        return super().run()

    @property
    def pressed(self) -> bool:
        """Whether the target has come down to its value."""
        return self.done >= max(self.anneal, self.explore)

    def extra(self) -> dict[str, Any]:
        """The price, whether units were ranked, how many gates were shut then, and the updates made."""
        told = {"ranked": self.ranked, "started_shut": self.started_shut, "updates": self.updates}
        return {"price": self.resource.price, **told}

    def resume(self, extra: Mapping[str, Any]) -> None:
        """Takes them back."""
        self.resource.price, self.ranked = float(extra["price"]), bool(extra["ranked"])
        self.started_shut, self.updates = int(extra["started_shut"]), int(extra["updates"])

    def learn(self, inputs: Any, labels: Tensor | None) -> tuple[Float[Tensor, "batch outputs"], dict[str, float]]:
        """One update of everything that learns at this time."""
        config, network = self.config, self.network
        share = cosine(self.done, config.warmup)
        fresh, deciding = config.fresh_learning_rate * share, self.done >= self.explore
        rates = {"trunk": config.learning_rate * share, "heads": fresh, "offsets": fresh * deciding}
        rates["gates"] = fresh * (deciding and self.done >= config.input_from)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[name]
        self.resource.target = 1 - (1 - config.target_macs) * min(self.done / self.anneal if self.anneal else 1, 1)
        if deciding and not self.ranked:
            self._rank()
        network.train()
        given = None if deciding else self._by_chance(inputs)
        with self._statistics(), torch.autocast(inputs.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            generator = self.generator if self.stochastic else None
            trace = network(inputs, decisions=given, generator=generator, lean=self.updates % config.peek > 0)
        self.updates += 1
        logits = trace.logits.float()
        task = self._task(inputs, labels, logits, trace)
        relative = self._compute(trace)
        price = self.resource.price
        loss = task.mean() + self.resource(relative)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for name, optimizer in self.optimizers.items():
            if rates[name]:  # at a rate of 0 Adam would still gather moments, of paths by chance
                optimizer.step()
        if deciding:
            self.resource.update(float(relative.detach().mean()))
        answers = logits.detach()[:, -1].log_softmax(dim=-1)
        facts = {"loss": float(loss.detach()), "gating/task": float(task.detach().mean())}
        macs = float(trace.expected_macs.detach().mean()) / self.plan.full
        facts |= {
            "gating/relative_cost": float(relative.detach().mean()),
            "gating/price": price,
            "gating/macs_all_exits": macs,
            "gating/shut_at_start": float(self.started_shut),
        }
        if self.energy is not None:
            facts |= {f"energy/{name}": value for name, value in asdict(self.energy.model).items()}
        if labels is not None:
            facts["gating/accuracy"] = float((answers.argmax(dim=-1) == labels).double().mean())
        return answers, facts | self.shares(trace.decisions)

    def _by_chance(self, inputs: Any) -> list[Decision]:
        """Drawn decisions of all gates: the share of units run falls to the target in the first half of the time."""
        share = 1 - (1 - self.config.target_macs) * min(2 * self.done / self.explore, 1)
        found: list[Decision] = []
        for gate in self.network.gates.values():
            decision = opened(gate, len(inputs), inputs.device)
            if gate.may_skip and gate.decides:
                drawn = torch.rand(len(inputs), generator=self.generator).to(inputs.device) < share
                decision = replace(decision, action=drawn.to(torch.int64), relaxed=drawn.to(torch.float32))
            found.append(decision)
        return found

    def _rank(self) -> None:
        """Once, before gates learn."""
        inputs = torch.cat(self._inputs(self.config.rank))[: self.config.rank]

        def told(done: int, units: int) -> None:
            self.watch.progress(self.samples, self.plan.steps, {"units_ranked": done, "of_units": units})

        self.started_shut = start_ranked(
            self.network, rank(self.network, inputs, told), self.config.target_macs, inputs
        )
        self.ranked = True

    def _compute(self, trace: Trace) -> Float[Tensor, " batch"]:
        """(B,) what a row that goes to the end costs, relative to the full network: no early head is built for it."""
        early = {f"heads.{name}" for name in self.network.exit_names[:-1]}
        parts = {name: value for name, value in trace.expected_parts.items() if name not in early}
        if self.energy is not None:
            return self.energy.relative(parts)
        return torch.stack(list(parts.values())).sum(dim=0) / self.plan.full

    def _statistics(self) -> Any:
        """Batch statistics of the trunk: frozen, or as training has them; those of gates and added heads move."""
        return frozen(self.network.units) if self.config.batch_norm == "frozen" else torch.enable_grad()

    def _task(self, inputs: Any, labels: Tensor | None, logits: Tensor, trace: Trace) -> Float[Tensor, " batch"]:
        """(B,) cross-entropies of the exits that learn at this time, and what draws the last one to the original."""
        config = self.config
        learning = logits if self.done >= config.exits_from else logits[:, -1:]
        answers = learning.log_softmax(dim=-1)
        total = torch.zeros(len(logits), device=logits.device)
        if labels is not None:
            total = cross_entropy(labels, answers).sum(dim=1)
        weight, temperature = (config.distillation, config.temperature) if labels is not None else (1.0, 1.0)
        if self.original is None or not (weight or config.hint):
            return total
        with torch.no_grad(), torch.autocast(inputs.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            wanted = self.original(inputs)
        for theirs, ours in zip(wanted.features, trace.features, strict=True) if config.hint else ():
            total = total + config.hint * hint_distance(theirs, ours)
        if weight:
            drawn = softened_divergence(wanted.logits[:, -1].float(), learning[:, -1:], temperature)
            total = total + weight * drawn[:, 0]
        return total

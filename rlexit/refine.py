"""Reinforcement learning of gates on labelled samples: utility of the answer minus a price on compute, per path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlexit import checkpoint
from rlexit.domain import Batches, Watch
from rlexit.gatelearning import STATE, GateLearner, Plan
from rlexit.network import StagedNetwork
from rlexit.objectives import cross_entropy, softened_divergence
from rlexit.policygradients import (
    blockdrop_reward,
    clipped_surrogate,
    leave_one_out,
    normalised,
    returns_to_go,
    self_critical_loss,
    skipnet_loss,
    skipnet_returns,
)
from rlexit.refine_config import RefineConfig
from rlexit.resource import dual_step, settled_shift
from rlexit.state import map_tensors
from rlexit.walks import Walk, walk

# Held-out samples on which greedy decisions are brought to the target at the end, as many at once, and bisections.
SETTLED_ON = 2048
CHUNK = 256
SETTLING = 13
# Training samples on which gates' entropies are taken at the start.
SURE_ON = 512
# Powers of two by which logits are multiplied, at most, to make gates surer or less sure.
WIDEST = 10.0
# Of the anchor, as usual where classifiers are distilled.
TEMPERATURE = 4.0


class PathRefiner(GateLearner):
    """Draws paths through a gated network and learns from what they led to; a trained trunk learns along them.

    `ppo`: several paths per image, each gate's return from there on against the mean of the image's other paths, clipped
    ratios per gate, a price that is fixed or held to a target by a dual variable, an anchor to the original network.
    `skipnet`: one path, reward without a baseline. `blockdrop`: one path against the greedy one, squared share of units.
    The network stays in evaluation mode: batch statistics under drawn gates have ruined such trainings (skipnet, issue 9).

    Args:
        network: with gates, from supervised weights.
        original: the full network, for the anchor; None without one.
        batches: where samples come from, with labels.
        config: settings.
        algo: in place of the config's.
        full: multiply-adds of the head-free network, every gate open.
        recalibrate: samples on which batch statistics are taken anew at the end.
        settled_on: (N, ...) inputs as they are met in use, not varied as in training, on which `ppo` with a target brings
            greedy decisions there at the end; None where there is no target.
        folder: for checkpoints and curves.
        seed: of drawn paths.
        watch: stop and progress.
    Source: Wang et al. 2018 (SkipNet), arXiv 1711.09485, equation 6; Wu et al. 2018 (BlockDrop), arXiv 1711.08393;
        Schulman et al. 2017 (PPO), arXiv 1707.06347; Kool et al. 2019 (leave-one-out baseline).
    """

    def __init__(
        self,
        network: StagedNetwork,
        original: StagedNetwork | None,
        batches: Batches,
        config: RefineConfig,
        algo: str,
        full: int,
        recalibrate: int,
        settled_on: Tensor | None,
        folder: Path,
        seed: int,
        watch: Watch,
    ) -> None:
        priced = algo != "ppo" or config.price > 0
        after = config.collapse_after if priced else 0
        plan = Plan(config.steps, config.checkpoint_updates, after, recalibrate, full, "refine")
        gates = {id(parameter) for parameter in network.gates.parameters()}
        trunk = [parameter for parameter in network.parameters() if id(parameter) not in gates]
        optimizers: dict[str, torch.optim.Optimizer] = {
            "gates": torch.optim.Adam(network.gates.parameters(), lr=config.learning_rate, fused=True)
        }
        for parameter in trunk:
            parameter.requires_grad_(config.trunk == "trained")
        if config.trunk == "trained":
            optimizers["trunk"] = torch.optim.SGD(trunk, lr=config.trunk_learning_rate, momentum=0.9)
        deciding: list[Any] = [gate for gate in network.gates.values() if gate.decides]
        if algo == "ppo" and config.target_macs and not all(gate.shifts for gate in deciding):
            rule, advice = "be 0, a fixed price, for gates without logits of their own", "Or use others."
            raise ValueError(f"`refine.target_macs` must {rule}, got {config.target_macs}. {advice}")
        if algo == "ppo" and config.target_macs and settled_on is None:
            raise ValueError("`settled_on` must be given with `refine.target_macs`, got None. Give held-out inputs.")
        self.deciding, self.settled_on = deciding, settled_on
        super().__init__(network, batches, plan, optimizers, folder, seed, watch)
        self.config, self.original, self.algo = config, original, algo
        self.price = config.price

    def extra(self) -> dict[str, Any]:
        """The price."""
        return {"price": self.price}

    def resume(self, extra: Mapping[str, Any]) -> None:
        """Takes the price back."""
        self.price = float(extra["price"])

    def run(self) -> dict[str, float]:
        """Makes gates surer if they are to start so, then as `GateLearner.run`."""
        if self.algo == "ppo" and self.config.start_entropy and not checkpoint.exists(self.folder, STATE):
            self._start_sure()
        return super().run()

    @torch.no_grad()
    def _start_sure(self) -> None:
        """Multiplies all logits by one number, such that gates have the mean entropy that is asked for."""
        self.network.eval()
        inputs = torch.cat(self._inputs(SURE_ON))
        low, high, at = -WIDEST, WIDEST, 0.0
        for _ in range(SETTLING):
            middle = (low + high) / 2
            for gate in self.deciding:
                gate.scale(2 ** (middle - at))
            at = middle
            unsure = float(walk(self.network, inputs, "greedy").entropies.mean()) > self.config.start_entropy
            low, high = (middle, high) if unsure else (low, middle)

    @torch.no_grad()
    def settle(self) -> dict[str, float]:
        """Shifts all gates alike until greedy paths cost the target, to which the price held drawn ones."""
        if self.algo != "ppo" or not self.config.target_macs or self.settled_on is None:
            return {}
        self.network.eval()
        many, at, found = self.settled_on.split(CHUNK), 0.0, 0.0

        def cost(shift: float) -> float:
            nonlocal at, found
            for gate in self.deciding:
                gate.shift(at - shift)
            at = shift
            macs = torch.cat([walk(self.network, inputs, "greedy").macs for inputs in many])
            found = float(macs.double().mean()) / self.plan.full
            return found

        shift = settled_shift(cost, self.config.target_macs, SETTLING)
        return {"refine/cost_settled": found, "refine/shift": shift}

    def learn(self, inputs: Any, labels: Tensor | None) -> tuple[Float[Tensor, "batch outputs"], dict[str, float]]:
        """One batch of paths, and what is learnt from it."""
        if labels is None:
            raise ValueError(
                "`labels` must be known to refine gates by what is right, got None. Give labelled samples."
            )
        self.network.eval()
        update = {"ppo": self._ppo, "skipnet": self._skipnet, "blockdrop": self._blockdrop}[self.algo]
        drawn, facts = update(inputs, labels)
        relative = float(drawn.macs.double().mean()) / self.plan.full
        if self.config.target_macs and self.algo == "ppo":
            self.price = dual_step(
                self.price, relative, self.config.target_macs, self.config.dual_rate, self.config.price_max
            )
        answers = drawn.answers.detach()[: len(labels)]
        facts |= {"refine/relative_macs": relative, "refine/price": self.price}
        facts["refine/accuracy"] = float((answers.argmax(dim=-1) == labels).double().mean())
        return answers, facts | self.shares(drawn.decisions)

    def _step(self, loss: Tensor) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [
            one for optimizer in self.optimizers.values() for g in optimizer.param_groups for one in g["params"]
        ]
        torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        for optimizer in self.optimizers.values():
            optimizer.step()

    def _ppo(self, inputs: Any, labels: Tensor) -> tuple[Walk, dict[str, float]]:
        """Several paths per image, drawn once and learnt from `epochs` times."""
        config, paths = self.config, self.config.paths
        many, known = torch.cat([inputs] * paths), torch.cat([labels] * paths)
        wanted = self._original(inputs)
        drawn = walk(self.network, many, "sample", None, self.generator)
        stored = map_tensors(lambda leaf: leaf.detach(), drawn.decisions)
        old, path, loss = drawn.log_probs.detach(), drawn, 0.0
        utility = -cross_entropy(known, drawn.answers.detach()[:, None])[:, 0]
        cost = drawn.to_go.to(torch.float32) / self.plan.full
        shape = (paths, len(labels), cost.shape[1])
        returns = returns_to_go(utility, cost, self.price).reshape(shape)
        advantage = normalised(leave_one_out(returns)).reshape(cost.shape)
        for epoch in range(config.epochs):
            if epoch:
                path = walk(self.network, many, "replay", stored)
            total = clipped_surrogate(path.log_probs, old, advantage, config.clip).mean()
            total = total - config.entropy * path.entropies.mean()
            if config.trunk == "trained":
                total = total + cross_entropy(known, path.answers[:, None]).mean()
                if wanted is not None:
                    every = torch.cat([wanted] * paths)
                    total = (
                        total + config.anchor * softened_divergence(every, path.answers[:, None], TEMPERATURE).mean()
                    )
            self._step(total)
            loss = float(total.detach())
        told = {"loss": loss, "refine/utility": float(utility.mean())}
        return drawn, told | {"refine/entropy": float(drawn.entropies.detach().mean())}

    def _skipnet(self, inputs: Any, labels: Tensor) -> tuple[Walk, dict[str, float]]:
        """One path without a baseline; the trunk learns by the path's cross-entropy."""
        drawn = walk(self.network, inputs, "sample", None, self.generator)
        losses = cross_entropy(labels, drawn.answers[:, None])[:, 0]
        returns = skipnet_returns(losses, drawn.actions, self.config.alpha)
        loss = skipnet_loss(losses, drawn.log_probs, returns)
        self._step(loss)
        return drawn, {"loss": float(loss.detach()), "refine/utility": -float(losses.detach().mean())}

    def _blockdrop(self, inputs: Any, labels: Tensor) -> tuple[Walk, dict[str, float]]:
        """One path against the greedy one; with a frozen trunk by a curriculum from the last unit backwards."""
        config = self.config
        gates = sum(bool(gate.decides) for gate in self.network.gates.children())
        # Half of the steps lead from the last gate to the first, so that early ones meet later ones that know something.
        forced = max(gates - 1 - int(2 * self.done * gates), 0) if config.trunk == "frozen" else 0
        with torch.no_grad():
            greedy = walk(self.network, inputs, "greedy", forced=forced)
        drawn = walk(self.network, inputs, "sample", None, self.generator, forced)
        rewards = [
            blockdrop_reward(path.answers.detach().argmax(dim=-1) == labels, path.actions, config.penalty)
            for path in (drawn, greedy)
        ]
        loss = self_critical_loss(drawn.log_probs, *rewards)
        if config.trunk == "trained":
            loss = loss + cross_entropy(labels, drawn.answers[:, None]).mean()
        else:
            loss = loss - config.entropy * drawn.entropies.sum(dim=1).mean()
        self._step(loss)
        return drawn, {"loss": float(loss.detach()), "refine/utility": float(rewards[0].mean())}

    @torch.no_grad()
    def _original(self, inputs: Any) -> Tensor | None:
        """(B, A) log-probabilities of the full network, where it anchors."""
        if self.original is None or not self.config.anchor:
            return None
        return self.original(inputs).logits[:, -1].float().log_softmax(dim=-1)

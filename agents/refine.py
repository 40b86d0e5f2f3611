"""Refinement of an actor's decisions: cloning with straight-through gates, then PPO on reward minus priced compute."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agents.config import EnvConfig
from agents.critics import Critics, advantages
from agents.envs import AtariVecEnv
from agents.paths import Batch, Evaluated, cloned, evaluate, stored
from agents.settling import settle
from rlexit import checkpoint
from rlexit.calibrate import refined_policy
from rlexit.collapse import CollapseWatch
from rlexit.costs import cost_table
from rlexit.domain import Watch
from rlexit.exit_policy import ExitPolicy
from rlexit.gates import Mode
from rlexit.gates.reuse import forget
from rlexit.interrupts import Diverged, Stopped
from rlexit.network import StagedNetwork
from rlexit.policygradients import clipped_surrogate
from rlexit.refine_config import RefineConfig
from rlexit.resource import dual_step
from rlexit.runlog import RunLog
from rlexit.runtime import run

STATE = "state"
HEALTHY = "healthy"


@dataclass(frozen=True)
class Rollout:
    """T env steps of E games under one network.

    Args:
        batch: T * E rows, in the order of time.
        rewards: (T, E) clipped; what compute costs is kept apart.
        costs: (T, E) relative MACs, as executed.
        starts: (T, E) 1 where a game began, as in SB3.
        last: (E, ...) the observations and memories after the last step.
        ended: (E,) whether the last step ended the game.
    """

    batch: Batch
    rewards: np.ndarray
    costs: np.ndarray
    starts: np.ndarray
    last: tuple[Tensor, Any]
    ended: np.ndarray


class Refiner:
    """Runs both stages, with checkpoints that the same command goes on from.

    Everything but the emulators resumes exactly; they start new games, because ale-py's cannot be saved. The trunk and
    the last exit stay as they are unless `trunk` is `trained`; critics and anchor read the frozen teacher, are never
    deployed and so never charged.

    Args:
        network: with gates; trained in place.
        teacher: the frozen original, whose last exit reads the features that the critics read.
        value_head: the teacher's own critic on these features, where it has one.
        env: the protocol.
        config: settings.
        folder: for checkpoints and curves.
        seed: of games and draws.
        watch: stop and progress.
    """

    def __init__(
        self,
        network: StagedNetwork,
        teacher: StagedNetwork,
        value_head: nn.Linear | None,
        env: EnvConfig,
        config: RefineConfig,
        folder: Path,
        seed: int,
        watch: Watch,
    ) -> None:
        self.network, self.teacher, self.config = network.eval(), teacher.eval(), config
        self.env_config, self.folder, self.seed, self.watch = env, folder, seed, watch
        self.policy = refined_policy(network) or ExitPolicy.full(network.exits)
        self.generator = torch.Generator().manual_seed(seed)
        example = torch.zeros((1, 4, 84, 84), dtype=torch.uint8)
        self.full_macs = cost_table(network, example).full
        width = int(teacher.taps(example)[-1].shape[1])
        self.critics = Critics(width, value_head)
        self.optimizer = torch.optim.Adam(self._groups(), fused=True)
        self.collapse = CollapseWatch(config.collapse_after)
        self.samples = self.updates = 0
        self.prices = {"clone": config.clone_price, "ppo": config.price}
        self.scores: deque[float] = deque(maxlen=100)

    def _groups(self) -> list[dict[str, Any]]:
        network, rate = self.network, self.config.learning_rate
        frozen: list[nn.Module] = [network.ensemble]
        if self.config.trunk == "frozen":
            frozen += [network.units, network.head(network.exits - 1)]
        still = {id(parameter) for module in frozen for parameter in module.parameters()}
        gates = nn.ModuleList([network.gates, network.leave_gates, *([network.reuse] if network.reuse else [])])
        deciding = {id(parameter) for parameter in gates.parameters()}
        for parameter in network.parameters():
            parameter.requires_grad_(id(parameter) not in still)
        others = [p for p in network.parameters() if id(p) not in still and id(p) not in deciding]
        return [
            {"params": list(gates.parameters()), "lr": self.config.gate_learning_rate},
            {"params": [*others, *self.critics.parameters()], "lr": rate},
        ]

    @property
    def total(self) -> int:
        """Samples of both stages."""
        return self.config.clone_steps + self.config.steps

    @property
    def stage(self) -> str:
        """`clone` or `ppo`."""
        return "clone" if self.samples < self.config.clone_steps else "ppo"

    def run(self) -> dict[str, float]:
        """Trains to the end, or goes on where an earlier call stopped.

        Returns:
            Last values of the curves, by tag.
        Raises:
            Stopped: `watch` says so; the state is saved.
            Diverged: a loss is NaN or infinite; the last checkpoint is healthy.
        """
        if checkpoint.exists(self.folder, STATE):
            self._restore()
        facts: dict[str, float] = {}
        start = int(np.random.SeedSequence([self.seed, self.samples]).generate_state(1)[0] >> 2)
        env = AtariVecEnv(self.env_config, self.config.n_envs, training=True, seed=start)
        try:
            with RunLog(self.folder, resume_step=self.samples) as log:
                rollouts = self._rollouts(env)
                while self.samples < self.total:
                    stage = self.stage
                    rollout = next(rollouts)
                    facts = self._learn(rollout, stage)
                    self.samples += len(rollout.batch)
                    self.updates += 1
                    self._tell(log, facts, stage)
                    stop = self.watch.stop()
                    if stop or self.updates % self.config.checkpoint_updates == 0 or self.samples >= self.total:
                        log.flush()
                        self._save()
                    if stop:
                        raise Stopped
                facts |= self._settle(rollouts)
                for tag, value in facts.items():
                    log.scalar(tag, value, self.samples)
        finally:
            env.close()
        return facts

    def _rollouts(self, env: AtariVecEnv) -> Iterator[Rollout]:
        """Plays on and on: drawn decisions, and drawn actions in the stage of PPO."""
        observations: Any = env.reset()
        memory: Any = None
        ended = np.ones(env.num_envs, dtype=bool)
        while True:
            steps: list[Batch] = []
            rewards, costs, starts = [], [], []
            for _ in range(self.config.n_steps):
                seen = torch.from_numpy(np.array(observations))
                mode: Mode = "greedy" if self.settling else "sample"
                result = run(self.network, self.policy, seen, memory=memory, mode=mode, generator=self.generator)
                if self.stage == "clone" or self.settling:
                    actions = result.answers.argmax(dim=1)
                else:
                    actions = torch.multinomial(result.answers.exp(), 1, generator=self.generator)[:, 0]
                steps.append(stored(self.network, seen, memory, result, actions))
                starts.append(ended.astype(np.float32))
                env.step_async(actions.numpy())
                observations, reward, ended, infos = env.step_wait()
                rewards.append(reward)
                costs.append(result.macs.numpy() / self.full_macs)
                memory = forget(result.memory, torch.from_numpy(np.flatnonzero(ended)))
                self.scores.extend(info["episode"]["r"] for info in infos if "episode" in info)
            last = torch.from_numpy(np.array(observations)), memory
            yield Rollout(Batch.joined(steps), np.stack(rewards), np.stack(costs), np.stack(starts), last, ended)

    settling = False

    def _learn(self, rollout: Rollout, stage: str) -> dict[str, float]:
        batch, config = rollout.batch, self.config
        rate = config.clone_learning_rate if stage == "clone" else config.gate_learning_rate
        self.optimizer.param_groups[0]["lr"] = rate
        features, full = self._taught(batch.observations)
        if stage == "clone":
            facts = self._clone(batch, full)
            cost = facts["refine/cost_greedy"]
        else:
            facts = self._improve(rollout, features, full)
            cost = float(rollout.costs.mean())
        facts["refine/cost"] = float(rollout.costs.mean())
        facts |= {f"gate/open_frac/{name}": share for name, share in batch.open_shares().items()}
        if config.target_macs:
            scale = config.clone_price / (config.price or 1.0) if stage == "clone" else 1.0
            step = config.dual_rate * scale
            self.prices[stage] = dual_step(self.prices[stage], cost, config.target_macs, step, config.price_max)
        return facts | {"refine/lambda": self.prices[stage]}

    @torch.no_grad()
    def _taught(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Features and log-probabilities of the frozen teacher."""
        parts = []
        for rows in observations.split(256):
            last = self.teacher.taps(rows)[-1]
            parts.append((last, self.teacher.head(self.teacher.exits - 1)(last).log_softmax(dim=-1)))
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _clone(self, batch: Batch, full: Tensor) -> dict[str, float]:
        """Several passes over a rollout: KL(full || gated) + price * cost, gates straight-through."""
        self.network.train()
        sums: list[Tensor] = []
        passes = (index for _ in range(self.config.epochs) for index in self._minibatches(len(batch)))
        for index in passes:
            divergence, macs, entropy = cloned(self.network, batch.take(index), full[index])
            cost = macs / self.full_macs
            loss = divergence + self.prices["clone"] * cost - self.config.clone_entropy * entropy
            self._step(loss.mean(), "refine/kl")
            sums.append(torch.stack([divergence.detach(), cost.detach()], dim=1))
        self.network.eval()
        kl, cost_mean = torch.cat(sums).mean(dim=0).tolist()
        return {"refine/kl": kl, "refine/cost_greedy": cost_mean}

    def _improve(self, rollout: Rollout, features: Tensor, full: Tensor) -> dict[str, float]:
        """Several passes over a rollout: clipped surrogates of gates and action, two critics."""
        config, batch = self.config, rollout.batch
        patience = batch.patience(self.network)
        with torch.no_grad():
            values = self.critics(features, patience)
            after = self._after(*rollout.last)
        signals = (rollout.rewards, rollout.costs)
        made = [
            advantages(signal, values[:, one], rollout.starts, after[:, one], rollout.ended, config)
            for one, signal in enumerate(signals)
        ]
        returns = torch.stack([one[1] for one in made], dim=1)
        advantage = made[0][0] - self.prices["ppo"] * made[1][0]
        seen: dict[str, list[float]] = {}
        for _ in range(config.epochs):
            for index in self._minibatches(len(batch)):
                now = evaluate(self.network, batch.take(index))
                parts = losses(now, batch.take(index), advantage[index], config.clip)
                wrong = (self.critics(features[index], patience[index]) - returns[index]).pow(2).mean(dim=0)
                divergence = ((full[index] - now.answers) * full[index].exp()).sum(dim=1).mean()
                loss = parts["policy"] + parts["gates"] - config.entropy * parts["entropy"]
                loss = loss - config.gate_entropy * parts["gate_entropy"]
                loss = loss + config.value * wrong.sum() + config.anchor * divergence
                self._step(loss, "refine/loss")
                told = {**parts, "value": wrong[0], "cost_value": wrong[1], "kl": divergence, "loss": loss}
                for name, value in told.items():
                    seen.setdefault(name, []).append(float(value.detach()))
        return {f"refine/{name}": float(np.mean(numbers)) for name, numbers in seen.items()}

    @torch.no_grad()
    def _after(self, observations: Tensor, memory: Any) -> Tensor:
        """(E, 2) values of the observations after a rollout."""
        features, _ = self._taught(observations)
        left = torch.zeros(len(features)) if memory is None or self.network.reuse is None else memory["left"]
        return self.critics(features, left)

    def _minibatches(self, rows: int) -> tuple[Tensor, ...]:
        return torch.randperm(rows, generator=self.generator).split(self.config.batch_size)

    def _step(self, loss: Tensor, name: str) -> None:
        if not bool(torch.isfinite(loss)):
            raise Diverged(
                f"`{name}` became {float(loss)} after {self.samples} samples. The last checkpoint is kept; "
                "lower `refine.learning_rate` and start over with --force."
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(trained, self.config.max_grad_norm)
        self.optimizer.step()

    def _tell(self, log: RunLog, facts: dict[str, float], stage: str) -> None:
        """Curves, the meter, and loudly a collapse."""
        if self.scores:
            facts["refine/score"] = float(np.mean(self.scores))
        for tag, value in facts.items():
            log.scalar(tag, value, self.samples)
        opened = {name[15:]: value for name, value in facts.items() if name.startswith("gate/open_frac/")}
        message = self.collapse.observe(opened)
        if message is not None:
            warnings.warn(f"{message} The last healthy state is kept as `{HEALTHY}`.", RuntimeWarning, stacklevel=2)
        shown = ("refine/cost", "refine/kl", "refine/lambda", "refine/score")
        told = {name.removeprefix("refine/"): facts[name] for name in shown if name in facts}
        self.watch.progress(self.samples, self.total, told)

    def _settle(self, rollouts: Iterator[Rollout]) -> dict[str, float]:
        drawn = next(rollouts).batch
        self.settling = True

        def greedy() -> tuple[Batch, float]:
            rollout = next(rollouts)
            return rollout.batch, float(rollout.costs.mean())

        found = settle(self.network, drawn, greedy, self.config.target_macs)
        self.settling = False
        return found

    def _save(self) -> None:
        tensors = {f"network.{key}": value for key, value in self.network.state_dict().items()}
        tensors |= {f"critics.{key}": value for key, value in self.critics.state_dict().items()}
        tensors |= checkpoint.pack_optimizer(self.optimizer, "optimizer")
        tensors["random"] = self.generator.get_state()
        facts = {
            "samples": self.samples,
            "updates": self.updates,
            "prices": self.prices,
            "scores": list(self.scores),
        }
        checkpoint.save(self.folder, STATE, tensors, facts)
        if self.collapse.healthy:
            checkpoint.save(self.folder, HEALTHY, tensors, facts)

    def _restore(self) -> None:
        tensors, facts = checkpoint.load_state(self.folder, STATE)
        self.samples, self.updates = int(facts["samples"]), int(facts["updates"])
        self.prices = {name: float(value) for name, value in facts["prices"].items()}
        self.scores.extend(facts["scores"])
        self.network.load_state_dict(checkpoint.subset(tensors, "network"))
        self.critics.load_state_dict(checkpoint.subset(tensors, "critics"))
        checkpoint.unpack_optimizer(self.optimizer, "optimizer", tensors)
        self.generator.set_state(tensors["random"])


def losses(now: Evaluated, batch: Batch, advantage: Tensor, clip: float) -> dict[str, Tensor]:
    """Policy losses of a minibatch: the action's and each gate's clipped surrogate with one normalised advantage.

    A gate counts in the rows that asked it, the action in the rows that computed an answer; sums are over the gates,
    means over all rows. Without gates `policy` is stable-baselines3's PPO loss.

    Args:
        now: of the present weights.
        batch: what was stored when acting.
        advantage: (B,) of reward minus priced cost.
        clip: of the ratios.
    Returns:
        `policy`, `gates`, `entropy` and `gate_entropy`, each without its weight; to be minimised, entropies aside.
    Source: Schulman et al. 2017, arXiv 1707.06347, equation 7; per gate as in the specification's section 2.6.
    """
    normal = (advantage - advantage.mean()) / (advantage.std() + 1e-8) if len(advantage) > 1 else advantage
    computed = (~batch.repeated).to(normal.dtype)
    rows = len(normal)

    def surrogate(new: Tensor, old: Tensor) -> Tensor:
        return clipped_surrogate(new[:, None], old[:, None], normal[:, None], clip)

    policy = (surrogate(now.log_prob, batch.log_prob) * computed).mean()
    gates, gate_entropy = normal.new_zeros(()), normal.new_zeros(())
    for name, decision in now.gates.items():
        before = batch.gates[name]
        asked = before.asked.to(normal.dtype)
        gates = gates + (surrogate(decision.log_prob, before.log_prob) * asked).sum() / rows
        gate_entropy = gate_entropy + (decision.entropy * asked).sum() / rows
    return {"policy": policy, "gates": gates, "entropy": (now.entropy * computed).mean(), "gate_entropy": gate_entropy}

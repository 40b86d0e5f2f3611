"""Whether an export acts as its network does: the same answers, exits, decisions and multiply-adds, row by row.

Two floating-point libraries never agree to the last bit: a row may be told otherwise only where its score lies within
`TOLERANCE` of the threshold, its gate's probability within that of a half, or its two likeliest outputs within that of
each other.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlexit import serve
from rlexit.exit_policy import ExitPolicy
from rlexit.gatelogits import is_settled
from rlexit.gates.reuse import forget
from rlexit.network import StagedNetwork
from rlexit.runtime import RunResult, run

TOLERANCE = 1e-4
CHUNK = 256
SINGLES = 256
# Steps after which a game of the comparison ends, each at another one: played ones may all be longer than that.
GAME = 17


@dataclass(frozen=True)
class Parity:
    """How an export compares with the network itself.

    Args:
        rows: compared.
        answers: largest absolute difference of a probability, over rows that left at the same exit.
        actions: rows with another action.
        exits: rows with another exit.
        gates: rows that a gate decided otherwise.
        macs: rows that cost another number of multiply-adds.
        unexplained: those of all that no tie explains.
        furthest: of the rows with another exit, the largest distance of the score to its threshold (for patience, of two
            outputs); 0 if there are none.
        macs_mean: multiply-adds of the export's rows by where they left, on average; K where they repeated an answer.
        tolerance: what counts as near.
    """

    rows: int
    answers: float
    actions: int
    exits: int
    gates: int
    macs: int
    unexplained: int
    furthest: float
    macs_mean: dict[int, float]
    tolerance: float = TOLERANCE

    @property
    def holds(self) -> bool:
        """Whether every row is told the same, ties aside."""
        return self.answers <= self.tolerance and not self.unexplained

    def __str__(self) -> str:
        return (
            f"{self.rows} rows: {self.exits} with another exit (at most {self.furthest:.1e} from the threshold), "
            f"{self.actions} with another action, {self.gates} with another gate, {self.macs} at another cost, "
            f"{self.unexplained} unexplained; probabilities within {self.answers:.1e}"
        )


@dataclass
class _Found:
    """What is counted while rows are compared."""

    rows: int = 0
    answers: float = 0.0
    actions: int = 0
    exits: int = 0
    gates: int = 0
    macs: int = 0
    unexplained: int = 0
    furthest: float = 0.0
    spent: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))

    def told(self) -> Parity:
        """All of it."""
        counted = {name: value for name, value in vars(self).items() if name != "spent"}
        return Parity(**counted, macs_mean={exit: float(np.mean(macs)) for exit, macs in sorted(self.spent.items())})


def compare(network: StagedNetwork, policy: ExitPolicy, server: serve.Server, rows: Tensor) -> Parity:
    """Plays rows through a network and its export, in batches, and the first ones again one by one.

    Args:
        network: in evaluation mode.
        policy: rule and thresholds.
        server: the export, by the same ones.
        rows: (N, ...), or, where the network may repeat answers, (T, N, ...) steps in a row of N environments.
    """
    found = _Found()
    if network.reuse is not None:
        _in_steps(network, policy, server, rows, found)
    else:
        for chunk in rows.split(CHUNK):
            chunk = chunk.cpu()
            wanted, got = run(network, policy, chunk), server.run(chunk.numpy())
            told = _compared(network, policy, chunk, wanted, got, found)
            for row in range(min(len(chunk), SINGLES - found.rows)):
                same = _acts(server, chunk[row], got.answers[row], int(got.exits[row]), found)
                found.unexplained += not (same or told[row] or _is_near(network, policy, chunk, wanted, row))
            found.rows += len(chunk)
    return found.told()


def _in_steps(network: StagedNetwork, policy: ExitPolicy, server: serve.Server, steps: Tensor, found: _Found) -> None:
    """Compares steps in a row, in which both remember; then those of the first environment alone, one by one.

    Games end at different steps, and the others of the batch go on.
    """
    memory: Any = None
    server.reset()
    for number, step in enumerate(steps):
        step = step.cpu()
        if len(ended := [row for row in range(len(step)) if number and number % GAME == row % GAME]):
            server.reset(ended)
            memory = forget(memory, torch.tensor(ended))
        wanted, got = run(network, policy, step, memory=memory), server.run(step.numpy())
        told = _compared(network, policy, step, wanted, got, found)
        memory = wanted.memory
        if told.any():
            # A tie is decided once: from here on both go the same way again.
            _hand_over(server, memory, np.flatnonzero(told).tolist())
        found.rows += len(step)
    memory = None
    server.reset()
    for number, step in enumerate(steps[:SINGLES]):
        first = step[:1].cpu()
        if number and number % GAME == 0:
            server.reset([0])
            memory = forget(memory, torch.tensor([0]))
        wanted = run(network, policy, first, memory=memory)
        memory = wanted.memory
        if not _acts(server, first[0], wanted.answers[0].numpy(), int(wanted.exits[0]), found):
            found.unexplained += not _is_near(network, policy, first, wanted, 0)
            _hand_over(server, memory, [0])
    server.reset()


def _acts(server: serve.Server, observation: Tensor, answer: np.ndarray, exit: int, found: _Found) -> bool:
    """Whether one observation by itself gets this action at this exit; notes how far their probabilities lie apart."""
    one = server.act(observation.numpy())
    if (one[0], one[1]) != (int(answer.argmax()), exit):
        return False
    difference = abs(float(one[2]) - math.exp(answer.max()))
    # NaN is a difference, which a comparison would pass over.
    found.answers = max(found.answers, math.inf if math.isnan(difference) else difference)
    return True


def _hand_over(server: serve.Server, memory: dict[str, Tensor], rows: list[int]) -> None:
    server.remember({name: value.numpy() for name, value in memory.items()}, rows)


def _compared(
    network: StagedNetwork, policy: ExitPolicy, chunk: Tensor, wanted: RunResult, got: serve.Served, found: _Found
) -> np.ndarray:
    """(B,) rows that were told otherwise; counts them, and those that no tie explains."""
    mine, left = wanted.answers.numpy(), wanted.exits.numpy()
    moved, told = left != got.exits, mine.argmax(axis=1) != got.answers.argmax(axis=1)
    repeats = np.zeros(len(left), dtype=bool)
    if wanted.reuse is not None:
        repeats = (wanted.reuse.action.numpy() == 0) != (got.exits == network.exits)
    decisions, chances = _decisions(network, wanted)
    asked = (decisions >= 0) & (got.decisions >= 0)
    parted = np.any(asked & (decisions != got.decisions), axis=1)
    charged = wanted.macs.numpy() != got.macs
    difference = np.abs(np.exp(mine) - np.exp(got.answers)).max(axis=1)
    same_way = ~moved & ~parted
    # NaN is a difference, which a comparison would pass over.
    found.answers = max(found.answers, float(np.nan_to_num(difference[same_way], nan=np.inf).max(initial=0.0)))
    found.actions, found.exits = found.actions + int(told.sum()), found.exits + int(moved.sum())
    found.gates, found.macs = found.gates + int(parted.sum()), found.macs + int(charged.sum())
    for exit in np.unique(got.exits).tolist():
        found.spent[exit] += got.macs[got.exits == exit].tolist()
    for row in np.flatnonzero(moved | told | parted | charged).tolist():
        if parted[row]:
            first = int(np.argmax(asked[row] & (decisions[row] != got.decisions[row])))
            distance = abs(chances[row, first] - 0.5)
        elif repeats[row] and wanted.reuse is not None:
            distance = abs(float(wanted.reuse.log_prob[row].exp()) - 0.5)
        elif moved[row]:
            exit = int(min(left[row], got.exits[row]))
            if policy.scorer.needs_every_exit:
                # Who counts agreeing exits jumps where two outputs tie; to be at a threshold is nothing to such a count.
                distance = _gap(network, chunk[row : row + 1], exit)
            else:
                distance = abs(float(wanted.scores[row, exit]) - policy.thresholds[exit])
            found.furthest = max(found.furthest, distance)
        elif charged[row]:
            distance = np.inf
        else:
            first_two = np.sort(np.exp(mine[row]))[-1:-3:-1]
            distance = float(first_two[0] - first_two[1])
        found.unexplained += not distance <= TOLERANCE
    return moved | told | parted


def _decisions(network: StagedNetwork, wanted: RunResult) -> tuple[np.ndarray, np.ndarray]:
    """(B, gates) of the gates that are asked in an export: 1, 0 or -1 as there, and probabilities of what was chosen."""
    names = [name for name in network.unit_names if name in network.gates]
    asked = [name for name in names if not is_settled(network.gates[name])]
    actions = np.full((len(wanted.exits), len(asked)), -1, dtype=np.int8)
    chances = np.full(actions.shape, np.nan)
    for name, (rows, decision) in zip(names, wanted.decisions, strict=False):
        if name in asked:
            column, index = asked.index(name), rows.numpy()
            actions[index, column] = (decision.action > 0).numpy()
            chances[index, column] = decision.log_prob.exp().numpy()
    return actions, chances


def _is_near(network: StagedNetwork, policy: ExitPolicy, chunk: Tensor, wanted: RunResult, row: int) -> bool:
    """Whether anything about a row nearly came out otherwise: a score, a gate, or the likeliest output."""
    if policy.scorer.needs_every_exit:
        scored = _gap(network, chunk[row : row + 1], int(wanted.exits[row])) <= TOLERANCE
    else:
        distances = (wanted.scores[row, :-1] - torch.tensor(policy.thresholds)).abs()
        scored = bool((distances <= TOLERANCE).any())
    first, second = wanted.answers[row].exp().topk(2).values.tolist() if wanted.answers.shape[1] > 1 else (1.0, 0.0)
    chances = _decisions(network, wanted)[1][row]
    gated = bool((np.abs(chances - 0.5) <= TOLERANCE).any())
    reused = wanted.reuse is not None and abs(float(wanted.reuse.log_prob[row].exp()) - 0.5) <= TOLERANCE
    return scored or first - second <= TOLERANCE or gated or reused


@torch.no_grad()
def _gap(network: StagedNetwork, row: Tensor, exit: int) -> float:
    """Smallest distance between the two likeliest outputs of any exit up to one."""
    probabilities = network(row).logits[:, : exit + 1].softmax(dim=-1)
    first, second = probabilities.topk(2, dim=-1).values.unbind(dim=-1)
    return float((first - second).min())

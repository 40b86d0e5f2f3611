"""Held-out observations of a run, on which exports are checked and benches are fed."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from rlexit.domain import Looping
from rlexit.exit_policy import ExitPolicy
from rlexit.graphs import ExportError
from rlexit.network import StagedNetwork
from rlexit.runtime import run
from rlexit.session import Session

# Games that are played side by side where steps must follow each other.
WORLDS = 8


def held_out(session: Session, network: StagedNetwork, policy: ExitPolicy, count: int) -> Tensor:
    """Held-out rows met under a policy; if its games are over too soon, others of the full network.

    Args:
        session: the run.
        network: in evaluation mode.
        policy: that acts.
        count: rows wanted.
    Returns:
        (N, ...), or (T, N, ...) steps in a row of N games where the network may repeat answers.
    """
    if network.reuse is not None:
        return steps(session, network, policy, count)
    with session.watch("held-out", "rows") as watch:
        rows = session.domain.rows(network, policy, count, watch)
        if len(rows) < count:
            more = session.domain.rows(network, ExitPolicy.full(network.exits), count - len(rows), watch)
            # A domain whose held-out rows are a fixed set has no others.
            known = set(map(_digest, rows))
            fresh = [row for row in more if _digest(row) not in known]
            rows = torch.cat([rows, torch.stack(fresh)[: count - len(rows)]]) if fresh else rows
    return rows


def _digest(row: Tensor) -> bytes:
    return hashlib.sha256(row.numpy().tobytes()).digest()


def steps(session: Session, network: StagedNetwork, policy: ExitPolicy, count: int) -> Tensor:
    """(T, N, ...) real steps in a row of N games that the network plays, about `count` in all.

    A game that ends is followed by the next one, whose first steps still know the last answer of the one before: that is
    one more way to get there.

    Raises:
        ExportError: the domain has no games.
    """
    domain = session.domain
    if not isinstance(domain, Looping):
        raise ExportError(
            f"`network` may repeat answers only where there are steps, got {domain.task}. Export another."
        )
    length = max(count // WORLDS, 1)
    with ExitStack() as stack, session.watch("held-out", "rows") as watch:
        games = [stack.enter_context(domain.world(episode)) for episode in range(min(WORLDS, count))]
        observations = np.stack([game(None) for game in games])
        found, memory = [observations.copy()], None
        while len(found) < length and not watch.stop():
            result = run(network, policy, torch.from_numpy(observations), memory=memory)
            memory, actions = result.memory, result.answers.argmax(dim=1).tolist()
            observations = np.stack([game(action) for game, action in zip(games, actions, strict=True)])
            found.append(observations)
            watch.progress(len(found) * len(games), count, {})
    return torch.from_numpy(np.stack(found))

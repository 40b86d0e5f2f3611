"""What a domain (Atari agents, vision) provides; the verbs know nothing else about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from rlexit.config import CoreConfig, Method
from rlexit.exit_policy import ExitPolicy
from rlexit.network import StagedNetwork

Split = Literal["calibration", "certification", "test"]
Progress = Callable[[int, int, dict[str, float]], None]


@runtime_checkable
class Act(Protocol):
    """What a domain calls on every sample that is to be learnt from."""

    def __call__(self, inputs: Any, labels: Tensor | None = None) -> Tensor:
        """Takes in a batch, and answers how to act on it.

        Args:
            inputs: (B, ...) raw inputs.
            labels: (B,) what is right, where that is known; nobody acts then, and the answers are the teacher's.
        Returns:
            (B, A) log-probabilities.
        """
        ...


@runtime_checkable
class Batches(Protocol):
    """Where samples come from: a domain collects one buffer after the other, driven by `act`."""

    def __call__(self, act: Act, first: int) -> Iterator[int]:
        """Yields the number of samples of each buffer, starting afresh (new games) at buffer `first`.

        A fresh start must depend on `first` only, so that a resumed run is equal.
        """
        ...


@dataclass
class Played:
    """One episode (or evaluated set) under one exit policy.

    Args:
        policy: index of the exit policy.
        episode: index of the episode.
        seed: of the environment.
        value: of the domain's metric.
        decisions: env steps, or rows of the set.
        macs: summed over the decisions, as executed.
        exits: (K,) how often each exit answered; one more, the last, where answers may be repeated.
        steps: per decision, where recorded: exits, confidences, actions, rewards.
    """

    policy: int
    episode: int
    seed: int
    value: float = 0.0
    decisions: int = 0
    macs: int = 0
    exits: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    steps: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Watch:
    """How a long call talks to its caller: `stop` is asked at safe points, `progress` is told (done, total, facts)."""

    stop: Callable[[], bool] = lambda: False
    progress: Progress = lambda done, total, facts: None


@runtime_checkable
class Domain(Protocol):
    """One task with its config.

    `task` is its name in tables, `metric` what its values are (`score` or `accuracy`).
    """

    @property
    def config(self) -> CoreConfig:
        """All settings."""
        ...

    task: str
    metric: str

    def train(self, folder: Path, seed: int, watch: Watch) -> None:
        """Makes the teacher in `folder` (checkpoint `teacher`), or goes on where an earlier call stopped."""
        ...

    def accept(self, folder: Path) -> None:
        """Raises CheckpointError unless the teacher in `folder` is one of this task, protocol and network."""
        ...

    def network(self, teacher: Path, method: Method) -> StagedNetwork:
        """The frozen teacher with a method's fresh heads, and gates if it has any; `Method()` is the plain teacher."""
        ...

    def static_networks(self, teacher: Path) -> dict[str, StagedNetwork]:
        """Fresh small networks without early exits, by name."""
        ...

    def example(self) -> Tensor:
        """(1, ...) an input; only its shape and dtype are read."""
        ...

    def batches(self, seed: int) -> Batches:
        """Where distillation samples come from."""
        ...

    def rows(self, network: StagedNetwork, policy: ExitPolicy, count: int, watch: Watch) -> Tensor:
        """(N, ...) about `count` held-out inputs met when acting under an exit policy, from calibration seeds."""
        ...

    def play(
        self,
        network: StagedNetwork | None,
        policies: Sequence[ExitPolicy],
        jobs: Sequence[tuple[int, int]],
        split: Split,
        record: int,
        watch: Watch,
    ) -> Iterator[Played]:
        """Plays (policy index, episode index) jobs on the seeds of a split; without a network, at random."""
        ...

    def blank(self, method: Method) -> StagedNetwork:
        """A method's network, untrained; for counting, and to prove the config before any work is done."""
        ...

    def adopt(self, path: Path, folder: Path) -> None:
        """Makes a file of another library the teacher in `folder`, without unpickling anything."""
        ...

    def protocol(self) -> dict[str, Any]:
        """What else a value depends on; stands in every row."""
        ...


@runtime_checkable
class Refining(Protocol):
    """What a domain has besides, if it can refine decisions by reinforcement learning."""

    def refine(
        self, network: StagedNetwork, teacher: Path, method: Method, folder: Path, seed: int, watch: Watch
    ) -> dict[str, float]:
        """Refines a network in place, or goes on where an earlier call stopped.

        Args:
            network: of a method that is refined; holds the weights it starts from.
            teacher: folder of the frozen original.
            method: that is refined.
            folder: for checkpoints and curves.
            seed: of games and draws.
            watch: stop and progress.
        Returns:
            Last values of the curves, by tag.
        Raises:
            Stopped: `watch` says so; the state is saved.
        """
        ...


@runtime_checkable
class Gating(Protocol):
    """What a domain has besides, if gates before units can learn together with its networks."""

    def learn_gates(
        self, network: StagedNetwork, teacher: Path, method: Method, folder: Path, seed: int, watch: Watch
    ) -> dict[str, float]:
        """Trains a network with fresh gates in place, or goes on where an earlier call stopped; as `Refining.refine`."""
        ...


@runtime_checkable
class Filming(Protocol):
    """What a domain has besides, if its episodes can be watched."""

    def film(
        self, network: StagedNetwork, policy: ExitPolicy, episode: int, steps: int, path_without_suffix: Path
    ) -> list[Path]:
        """Writes one test episode, or its first `steps` decisions, as animations: a WebP and a GIF, in this order."""
        ...


@runtime_checkable
class Publisher(Protocol):
    """A domain whose teachers another library opens, and whose actors can be asked as that library asks its own."""

    def publish(self, folder: Path, path: Path) -> None:
        """Writes the teacher in `folder` as a file of the other library."""
        ...

    def predictor(self, network: StagedNetwork, policy: ExitPolicy) -> Callable[..., tuple[Any, Any]]:
        """The other library's own way to decide, for comparing speed.

        Returns:
            From an observation, and what the step before remembered or None, to an action and what to remember.
        """
        ...


@runtime_checkable
class Labelled(Protocol):
    """A domain that knows what is right of every sample, so that nobody acts while heads learn."""

    def samples(self, seed: int, first: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Buffers of (inputs, labels), those that `batches(seed)` shows from buffer `first` on."""
        ...


@runtime_checkable
class Dissecting(Protocol):
    """A domain whose test rows are a fixed, labelled set, so that every exit can be asked about all of them."""

    def plain_networks(self, teacher: Path) -> dict[str, StagedNetwork]:
        """Networks without early exits that need no training: the teacher as `full`, and given smaller ones by name."""
        ...

    def given(self) -> dict[str, str]:
        """Names of the networks that were given beside the teacher, and hashes of their weights."""
        ...

    def dissect(
        self,
        networks: Mapping[str, StagedNetwork],
        method: str,
        run_seed: int,
        full_macs: int,
        folder: Path,
        watch: Watch,
    ) -> None:
        """Writes the files of `rlexit.dissection` about a method's networks into `folder`.

        Args:
            networks: one named "" with exits, or some without by name; in evaluation mode.
            method: as tables call it.
            run_seed: of its training.
            full_macs: of the full, head-free network that everything is relative to.
            folder: of the evaluation.
            watch: stop and progress.
        Raises:
            Stopped: `watch` says so; a later call starts over.
        """
        ...


@runtime_checkable
class Placed(Protocol):
    """A domain whose teachers learn and whose networks play where it is told; everything else stays on the CPU.

    `device` is torch's name of the place.
    """

    device: str


@runtime_checkable
class Looping(Protocol):
    """A domain whose actions lead to what is observed next, so that its loop of deciding and acting can be timed whole."""

    def world(self, episode: int) -> AbstractContextManager[Callable[[int | None], np.ndarray]]:
        """Opens a world: from None to the first observation (...) of a calibration episode, from an action to the next.

        Where an episode ends, the next one begins by itself.
        """
        ...

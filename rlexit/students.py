"""What distillation trains: early heads on a frozen backbone, heads and backbone together, or small networks whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlexit.ensembles import Ensemble
from rlexit.network import StagedNetwork
from rlexit.state import map_tensors

# Features of every early exit, and the teacher's (B, A) log-probabilities.
Observed = tuple[list[Tensor], Tensor]


class Student(nn.Module):
    """What learns: reads features that are computed once per sample, answers at every exit.

    `ensemble` combines the exits; the others are its own business.
    """

    ensemble: Ensemble

    def observe(self, inputs: Any) -> Observed:
        """Without gradient: features of every early exit, and the teacher's log-probabilities."""
        raise TypeError(f"`{type(self).__name__}` must implement `observe`.")

    def logits(self, features: Sequence[Tensor]) -> Float[Tensor, "batch exits outputs"]:
        """Raw logits of the early exits, with gradient."""
        raise TypeError(f"`{type(self).__name__}` must implement `logits`.")

    def learners(self) -> nn.Module:
        """The module that is trained; everything else is frozen."""
        raise TypeError(f"`{type(self).__name__}` must implement `learners`.")

    def groups(self) -> dict[float, list[nn.Parameter]]:
        """The trained parameters, by the share of the learning rate that they get."""
        return {1.0: list(self.learners().parameters())}


class ExitStudent(Student):
    """Early heads on a frozen backbone, taught by its own last exit.

    Args:
        network: heads and ensemble are trained in place; one with an early exit at least.
        observe: looks at inputs in this student's place, for several students of one backbone; see `together`.
    Raises:
        ValueError: the network has no early exit.
    """

    def __init__(self, network: StagedNetwork, observe: Callable[[Any], Observed] | None = None) -> None:
        super().__init__()
        if network.exits < 2:
            raise ValueError("`network.taps` must name at least one unit to distill, got none. Add an early exit.")
        self.network = network
        self.ensemble = network.ensemble
        self._observe = observe or self.look

    def observe(self, inputs: Any) -> Observed:
        """What the early heads read, and the last exit's log-probabilities."""
        return self._observe(inputs)

    @torch.no_grad()
    def look(self, inputs: Any) -> Observed:
        """Passes inputs through the frozen backbone; what `observe` tells."""
        *early, last = self.network.taps(_here(self.network, inputs))
        return self.network.gather(early), self.network.head(self.network.exits - 1)(last).log_softmax(dim=-1)

    def logits(self, features: Sequence[Tensor]) -> Float[Tensor, "batch exits outputs"]:
        """Raw logits of the early exits, cascade included."""
        return self.network.read(features)

    def learners(self) -> nn.Module:
        """The early heads."""
        return nn.ModuleList(self.network.head(exit) for exit in range(self.network.exits - 1))


class JointStudent(Student):
    """Backbone and heads of one network, trained together; the frozen teacher stays a network of its own.

    Args:
        network: trained in place, its last exit too.
        teacher: frozen.
        share: of the learning rate that the backbone and its own head get; the early heads get all of it.
    Source: joint and mixed regimes of Kubaty et al. 2024, arXiv 2407.14320.
    """

    def __init__(self, network: StagedNetwork, teacher: StagedNetwork, share: float) -> None:
        super().__init__()
        self.network = network
        self.teacher = teacher
        self.share = share
        self.ensemble = network.ensemble
        # The ensemble is fitted afterwards, and so is no part of what learns here.
        self.trained = nn.ModuleList([network.units, network.heads])

    @torch.no_grad()
    def observe(self, inputs: Any) -> Observed:
        """The raw inputs themselves, and the teacher's log-probabilities."""
        inputs = _here(self.teacher, inputs)
        return [inputs], _last(self.teacher, inputs)

    def logits(self, features: Sequence[Tensor]) -> Float[Tensor, "batch exits outputs"]:
        """Raw logits of all exits, the backbone's own among them."""
        return self.network(features[0]).logits

    def learners(self) -> nn.Module:
        """Backbone and heads."""
        return self.trained

    def groups(self) -> dict[float, list[nn.Parameter]]:
        """The backbone with its own head, and the early heads."""
        last = self.network.head(self.network.exits - 1)
        early = [self.network.head(exit) for exit in range(self.network.exits - 1)]
        shares = ((self.share, (self.network.units, last)), (1.0, early))
        found: dict[float, list[nn.Parameter]] = {}
        for share, modules in shares:
            found.setdefault(share, []).extend(parameter for module in modules for parameter in module.parameters())
        return found


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
    def observe(self, inputs: Any) -> Observed:
        """The raw inputs themselves, and the teacher's log-probabilities."""
        inputs = _here(self.teacher, inputs)
        return [inputs], _last(self.teacher, inputs)

    def logits(self, features: Sequence[Tensor]) -> Float[Tensor, "batch exits outputs"]:
        """Logits of every network."""
        return torch.cat([network(features[0]).logits for network in self.networks], dim=1)

    def learners(self) -> nn.Module:
        """All networks whole."""
        return self.networks


def _here(network: StagedNetwork, inputs: Any) -> Any:
    """Inputs where a network's weights are; domains collect them on the CPU."""
    place = next(network.parameters()).device
    return map_tensors(lambda leaf: leaf.to(place), inputs)


def _last(teacher: StagedNetwork, inputs: Any) -> Float[Tensor, "batch outputs"]:
    """The last exit's own log-probabilities, no early head run."""
    return teacher.head(teacher.exits - 1)(teacher.taps(inputs)[-1]).log_softmax(dim=-1)

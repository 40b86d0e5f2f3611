"""Backbones of Atari policies, each a staged network built from a teacher's tensors. A new one is a new file here."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from rlexit.config import HeadConfig
from rlexit.ensembles import Ensemble
from rlexit.network import StagedNetwork
from rlexit.registry import Registry


class Backbone(Protocol):
    """What a file here registers.

    `taps` are the usual early exits; `extractor` is what stable-baselines3 trains it as, None for its own NatureCNN.
    """

    taps: tuple[str, ...]
    extractor: type[Any] | None

    def network(
        self,
        actions: int,
        taps: Sequence[str] = (),
        head: HeadConfig | None = None,
        cascade: bool = False,
        ensemble: Ensemble | None = None,
        width: float = 1.0,
    ) -> StagedNetwork:
        """The actor, freshly initialised, with exits at the given units."""
        ...

    def load(self, network: StagedNetwork, tensors: Mapping[str, Tensor]) -> None:
        """Copies an SB3 actor's weights; raises ValueError where they are of another network."""
        ...


backbones: Registry[Any] = Registry("network.backbone")

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def backbone_of(name: str) -> Backbone:
    """A registered backbone; raises LookupError that names the nearest one."""
    found: Backbone = backbones[name]
    return found

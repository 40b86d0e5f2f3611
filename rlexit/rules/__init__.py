"""Rules decide who leaves at an exit: a score per row, and a row leaves where its score is above the threshold.

A new rule is a new file here that registers itself; the conformance tests pick it up.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from rlexit.registry import Registry
from rlexit.state import ExitState


@runtime_checkable
class Rule(Protocol):
    """Scores rows at an exit.

    `span` is the range of scores (lowest, highest), by which pictures scale them. `needs_every_exit`:
    whether heads must be built where nobody may leave, because the score reads them. `before_head`: whether the
    network's own leave gate is asked, from the features and before the head, so that who goes on pays for no head.
    """

    span: tuple[float, float]
    needs_every_exit: bool
    before_head: bool

    def score(self, state: ExitState) -> Float[Tensor, " batch"]:
        """(B,) larger leaves sooner; depends on the row itself only."""
        ...


rules: Registry[type[Rule]] = Registry("rule")

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

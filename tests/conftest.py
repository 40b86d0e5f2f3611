"""What every test shares: one thread per worker, and shapes and types of `rlexit` checked at every call."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch is imported: two xdist workers share two cores.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_variable] = "1"

import hypothesis
import jaxtyping
import pytest
import torch

# Before rlexit is imported: jaxtyping compares shapes and dtypes with the annotations, beartype the other types.
# The numeric tower lets an int stand for a float, as in typing and for mypy.
jaxtyping.install_import_hook("rlexit", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

torch.set_num_threads(1)

# A loaded machine is no failure; CI draws the same examples every time.
hypothesis.settings.register_profile("rlexit", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("rlexit")


def _settle() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def as_the_process_began() -> Iterator[None]:
    """The command line sets threads and flushes denormals for its process: not so for the next test."""
    _settle()
    yield
    _settle()


# ---- toy networks and toy worlds: import the fixtures of tests/rlexit/toys.py below this line ----

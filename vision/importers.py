"""Given weights of classifiers: safetensors, or state dicts that torch reads without unpickling code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rlexit.checkpoint import CheckpointError

SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".bin")
MAX_BYTES = 4 << 30


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name.

    A state dict may lie under the key `state_dict` or `model`, and its names may start with `module.`, as a wrapper
    for several GPUs leaves them.

    Raises:
        CheckpointError: the file is missing, of another kind, cut, or holds more than tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"`{path}` is missing.")
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"`{path}` must end in {', '.join(SUFFIXES)}. Save a plain state dict.")
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"`{path}` must have at most {MAX_BYTES >> 30} GB, got {path.stat().st_size >> 30}.")
    try:
        found: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # torch's own message advises to load without `weights_only`
        raise CheckpointError(f"`{path}` is cut, or holds more than tensors. Save a plain state dict.") from error
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"`{path}` must hold tensors by name, got {type(found).__name__}. Save a state dict.")
    return {str(name).removeprefix("module."): value for name, value in found.items()}

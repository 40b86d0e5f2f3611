"""Checkpoints: safetensors beside a hashed JSON manifest, switched atomically, never pickle.

A checkpoint is `<name>.json` (the manifest) and `<name>-<hash>.safetensors` (the tensors). The tensors are written
first under a name made from their own hash, then the manifest is replaced in one rename. Whoever reads sees the old
pair or the new pair, also after `kill -9` or a full disk in the middle of a save.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

SCHEMA_VERSION = 1
MAX_BYTES = 4 << 30
MAX_MANIFEST_BYTES = 8 << 20


class CheckpointError(ValueError):
    """A checkpoint is missing, cut, altered, or made for something else."""


def sha256(data: bytes) -> str:
    """Hex SHA-256 of some bytes."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: object) -> str:
    """JSON that is equal for equal values: sorted keys, no spaces, no NaN.

    Raises:
        ValueError: a float in `value` is NaN or infinite (spell those as strings).
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces the file at `path` in one step: sibling file, fsync, rename, fsync of the folder.

    Raises:
        OSError: the disk is full or not writable; the old file is then intact and no sibling is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sibling = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(sibling, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(sibling, path)
    except BaseException:
        sibling.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save(folder: Path, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Saves tensors and facts as the checkpoint `name` in `folder`; returns the manifest's path.

    Args:
        folder: made if missing.
        name: file stem, without a dot or slash.
        tensors: any shapes and dtypes; non-finite floats are refused, so a diverged run never replaces a healthy one.
        facts: JSON values.
    Raises:
        ValueError: a tensor holds NaN or infinity.
        OSError: the disk is full or not writable; the previous checkpoint is then intact.
    """
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"`{key}` must be finite, got NaN or infinity. The last saved checkpoint is kept.")
    data = to_safetensors({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
    digest = sha256(data)
    weights = folder / f"{name}-{digest[:12]}.safetensors"
    body = {
        "schema_version": SCHEMA_VERSION,
        "weights": {"file": weights.name, "sha256": digest, "bytes": len(data)},
        "facts": dict(facts),
    }
    manifest = json.dumps({**body, "sha256": sha256(canonical_json(body).encode())}, indent=2, allow_nan=False)
    path = folder / f"{name}.json"
    write_atomic(weights, data)
    write_atomic(path, manifest.encode())
    for stale in folder.glob(f"{name}-????????????.safetensors"):
        if stale.name != weights.name:
            stale.unlink(missing_ok=True)
    return path


def exists(folder: Path, name: str) -> bool:
    """Whether a manifest of that name is there (it may still be altered; `load` tells)."""
    return (folder / f"{name}.json").is_file()


def load_facts(folder: Path, name: str) -> dict[str, Any]:
    """Reads and verifies the manifest alone; see `load`."""
    return dict(_manifest(folder, name)["facts"])


def weights_hash(folder: Path, name: str) -> str:
    """SHA-256 of the tensors that the manifest names; see `load`."""
    return str(_manifest(folder, name)["weights"]["sha256"])


def load(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the checkpoint `name` in `folder`, every byte checked against the manifest's hashes.

    Returns:
        Tensors on the CPU, and the facts.
    Raises:
        CheckpointError: a file is missing, cut, altered, of a newer schema, or holds NaN or infinity.
    """
    manifest = _manifest(folder, name)
    entry = manifest["weights"]
    path = folder / Path(entry["file"]).name
    if not path.is_file():
        raise CheckpointError(f"`{path}` is missing. Restore it, or make the checkpoint again.")
    size = path.stat().st_size
    if size != entry["bytes"] or size > MAX_BYTES:
        raise CheckpointError(
            f"`{path}` must have {entry['bytes']} bytes, got {size}. It was cut or altered; make it again."
        )
    data = path.read_bytes()
    if sha256(data) != entry["sha256"]:
        raise CheckpointError(f"`{path}` does not match its SHA-256 in the manifest. It was altered; make it again.")
    try:
        tensors = parse_safetensors(data)
    except SafetensorError as error:
        raise CheckpointError(f"`{path}` is no safetensors file ({error}). Make it again.") from error
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"`{key}` in `{path}` holds NaN or infinity. Use another checkpoint.")
    return tensors, dict(manifest["facts"])


def load_state(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`load` for what an unfinished stage goes on from: the error of a damaged one says how to start over."""
    try:
        return load(folder, name)
    except CheckpointError as error:
        raise CheckpointError(f"{error} To start over from the beginning, delete `{folder / name}.json`.") from error


def pack_optimizer(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """An optimiser's moments and counters as named tensors; its settings belong to the config."""
    slots = optimizer.state_dict()["state"]
    return {
        f"{prefix}.{index}.{slot}": torch.as_tensor(value)
        for index, state in slots.items()
        for slot, value in state.items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `pack_optimizer`; the optimiser's settings stay."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(f"{prefix}."):
            index, slot = key[len(prefix) + 1 :].split(".")
            of = parameters[int(index)]
            # Files have no memory layout, and a fused optimiser pairs moments with weights by their place in memory.
            laid_out = torch.empty_like(of, dtype=value.dtype).copy_(value) if value.shape == of.shape else value
            state.setdefault(int(index), {})[slot] = laid_out
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def subset(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with `prefix.`, without it."""
    return {key[len(prefix) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{prefix}.")}


def _manifest(folder: Path, name: str) -> dict[str, Any]:
    path = folder / f"{name}.json"
    if not path.is_file():
        raise CheckpointError(f"`{path}` is missing.")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"`{path}` must have at most {MAX_MANIFEST_BYTES} bytes, got {path.stat().st_size}.")
    damaged = f"`{path}` is cut or no manifest of rlexit. Make the checkpoint again."
    try:
        manifest = json.loads(path.read_bytes())
        body = {key: manifest[key] for key in ("schema_version", "weights", "facts")}
        version, stated = body["schema_version"], manifest["sha256"]
        digest = sha256(canonical_json(body).encode())
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(damaged) from error
    if type(version) is int and version > SCHEMA_VERSION:
        raise CheckpointError(
            f"`{path}` has schema {version}, this rlexit reads up to {SCHEMA_VERSION}. Update rlexit."
        )
    if digest != stated:
        raise CheckpointError(f"`{path}` does not match its own SHA-256. It was altered; make the checkpoint again.")
    # A hash shows damage, not intent: whoever wrote the manifest may have written anything.
    weights, facts = body["weights"], body["facts"]
    fields = {"file": str, "sha256": str, "bytes": int}
    if type(version) is not int or version < 1 or not isinstance(facts, dict) or not isinstance(weights, dict):
        raise CheckpointError(damaged)
    if any(type(weights.get(name)) is not kind for name, kind in fields.items()):
        raise CheckpointError(damaged)
    return dict(manifest)

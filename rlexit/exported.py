"""What the folder of an export says and holds, checked before anything of it is used. Needs the standard library only.

A manifest lists the graphs with their sizes and hashes, and carries a hash of itself. Hashes show damage, not intent:
whoever wrote a manifest may have written anything, so types, ranges and names are checked as well.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# 1: frames were converted inside the graph. 2: every stage ended at an exit, and its multiply-adds were in `macs` only.
SCHEMA_VERSION = 3
BRANCHES = ("head", "runs", "skips", "alone")
MANIFEST = "manifest.json"
FORMATS = ("onnx", "onnx-if")
MAX_MANIFEST_BYTES = 1 << 20
MAX_FILE_BYTES = 512 << 20
MAX_BYTES = 1 << 30  # of all graphs: a manifest may name one large file many times
MAX_MACS = 1 << 48  # of one graph; the sum of all fits in 64 bits
MAX_STAGES = 256
MAX_VALUES = 1 << 24
DTYPES = ("uint8", "float32", "int64")
# What graphs call what they read and give; features, carried state and logits of exits have numbers in their names.
OBSERVATION, ANSWER, SCORE, LOGIT, EXIT, VIEW = "observation", "answer", "score", "logit", "exit", "view"
# What is kept from step to step where answers may be repeated; graphs read it as `memory_answer`, ...
MEMORY = (ANSWER, VIEW, "left")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_HASH = re.compile(r"[0-9a-f]{64}")


class ServeError(ValueError):
    """An export cannot be served, or an observation does not fit it; the message is one line."""


@dataclass(frozen=True)
class Port:
    """A named input or output of a graph: shape of one row, and NumPy's name of its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its own hash, in canonical JSON."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads and checks the manifest of an export.

    Raises:
        ServeError: see `load`.
    """
    path = folder / MANIFEST
    data = read_regular(path, MAX_MANIFEST_BYTES)
    try:
        manifest = json.loads(data)
        version, stated, found = manifest["schema_version"], manifest["sha256"], digest(manifest)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ServeError(f"`{path}` is cut or no manifest of an export. Export again.") from error
    if type(version) is int and version > SCHEMA_VERSION:
        raise ServeError(f"`{path}` has schema {version}, this rlexit reads up to {SCHEMA_VERSION}. Update rlexit.")
    if found != stated:
        raise ServeError(f"`{path}` does not match its own SHA-256. It was altered; export again.")
    try:
        if version < 3:
            _upgrade(manifest)
        _check_manifest(manifest)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ServeError(f"`{path}` is no manifest of an export ({error!r}). Export again.") from error
    return dict(manifest)


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a regular file, no link; raises ServeError before a byte is read."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ServeError(f"`{path}` is missing or cannot be read ({error.strerror}). Export again.") from error
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ServeError(f"`{path}` must be a regular file. Export again.")
        if found.st_size > most:
            raise ServeError(f"`{path}` must have at most {most} bytes, got {found.st_size}.")
        return file.read(most)


def ports(entries: Sequence[dict[str, Any]]) -> tuple[Port, ...]:
    """Inputs or outputs as a manifest tells them."""
    return tuple(Port(one["name"], tuple(one["shape"]), one["dtype"]) for one in entries)


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Types, ranges and names of all that `load` uses; raises ValueError, KeyError or TypeError."""
    exits, outputs, stages = manifest["exits"], manifest["outputs"], manifest["stages"]
    if manifest["format"] not in FORMATS:
        raise ValueError(f"format {str(manifest['format'])[:20]!r}")
    if type(exits) is not int or type(outputs) is not int or not (1 <= exits <= MAX_STAGES and 1 <= outputs <= 1 << 20):
        raise ValueError("exits or outputs")
    if not isinstance(stages, list) or not 1 <= len(stages) <= MAX_STAGES:
        raise ValueError("stages")
    if len([float(value) for value in manifest["thresholds"]]) != exits - 1:
        raise ValueError("thresholds")
    observed = {"name": OBSERVATION, **manifest["observation"]}
    _check_port(observed)
    nested = manifest["format"] == "onnx-if"
    for number, entry in enumerate(stages):
        _check_part(entry)
        for name in _ways(entry):
            _check_part(entry[name])
        _check_place(stages, number, exits, nested)
        _check_told(entry, nested, number == len(stages) - 1, outputs)
    for macs in manifest["macs"].values() if nested else ():
        _check_macs(macs)
    if manifest.get("reuse") is not None:
        _check_reuse(manifest)
    if sum(one["bytes"] for entry in stages for one in (entry, *(entry[name] for name in _ways(entry)))) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes")
    first = [port for port in stages[0]["inputs"] if port["name"] == OBSERVATION]
    # Frames may be given to the graph as float32 of the same values.
    if first not in ([observed], [{**observed, "dtype": "float32"}] if observed["dtype"] == "uint8" else [observed]):
        raise ValueError(OBSERVATION)


def _ways(entry: dict[str, Any]) -> list[str]:
    """Which graphs a stage has besides its own."""
    return [name for name in BRANCHES if entry.get(name) is not None]


def _check_place(stages: Sequence[dict[str, Any]], number: int, exits: int, nested: bool) -> None:
    """A stage ends where its place among the others lets it, and has the ways that such an end has."""
    entry, last = stages[number], number == len(stages) - 1
    exit, ways = entry["exit"], set(_ways(entry))
    gated = "runs" in ways
    previous = max((one["exit"] for one in stages[:number]), default=-1)
    in_order = exit == -1 if nested or gated else previous < exit < exits and last == (exit == exits - 1)
    allowed = {"runs", "skips"} if gated else {"alone"} if last else {"alone", "head"}
    if type(exit) is not int or not in_order or (gated and last) or not ways <= allowed:
        raise ValueError(EXIT)
    if gated:
        _check_gated(entry)
    elif ("alone" in ways) != (number > 0 and "runs" in _ways(stages[number - 1])):
        raise ValueError("alone")


def _check_told(entry: dict[str, Any], nested: bool, last: bool, outputs: int) -> None:
    """The graphs of a stage give what is read off them, in its shape, and a gated one gives nothing that ends a row."""
    shapes: dict[str, list[int]] = {ANSWER: [outputs], SCORE: [], EXIT: [], LOGIT: [1]}
    ways = _ways(entry)
    gated = "runs" in ways
    wanted = {EXIT} if nested else {LOGIT} if gated else {SCORE} if not last else set()
    if "head" in ways:
        _check_outputs(entry["head"], {ANSWER}, shapes)
    elif not gated:
        wanted |= {ANSWER}
    for part in (entry, *([entry["alone"]] if "alone" in ways else [])):
        _check_outputs(part, wanted, shapes)
    if gated and {ANSWER, SCORE} & {port["name"] for port in entry["outputs"]}:
        raise ValueError("outputs")


def _upgrade(manifest: dict[str, Any]) -> None:
    """Adds what stages say today to those of an older schema."""
    before = 0
    for entry in manifest["stages"]:
        spent = int(manifest["macs"][str(entry["exit"])]) if entry["exit"] >= 0 else 0
        entry["macs"], before = spent - before, spent


def _check_part(entry: dict[str, Any]) -> None:
    """One graph."""
    named = _NAME.fullmatch(entry["file"]) and _HASH.fullmatch(entry["sha256"])
    if not named or type(entry["bytes"]) is not int or not 0 <= entry["bytes"] <= MAX_FILE_BYTES:
        raise ValueError("file")
    _check_macs(entry["macs"])
    for port in (*entry["inputs"], *entry["outputs"]):
        _check_port(port)


def _check_macs(macs: Any) -> None:
    if type(macs) is not int or not 0 <= macs <= MAX_MACS:
        raise ValueError("macs")


def _check_outputs(entry: dict[str, Any], wanted: set[str], shapes: dict[str, list[int]]) -> None:
    """A graph gives each of these once, in its shape."""
    for name in wanted:
        if [port["shape"] for port in entry["outputs"] if port["name"] == name] != [shapes[name]]:
            raise ValueError(name)


def _check_gated(entry: dict[str, Any]) -> None:
    """The ways past a gated unit give the same tensors, or the one there is works in place."""
    told = entry["runs"]["outputs"]
    if entry.get("skips") is not None:
        if entry["skips"]["outputs"] != told:
            raise ValueError("skips")
        return
    read = [{**port, "name": ""} for port in entry["runs"]["inputs"]]
    if read != [{**port, "name": ""} for port in told]:
        raise ValueError("runs")


def _check_reuse(manifest: dict[str, Any]) -> None:
    """What is asked before the first stage, and the memory that it reads."""
    reuse, first = manifest["reuse"], manifest["stages"][0]["inputs"]
    if manifest["format"] != "onnx" or type(reuse["limit"]) is not int or not 1 <= reuse["limit"] <= 1 << 20:
        raise ValueError("reuse")
    for name in ("asks", "looks"):
        _check_part(reuse[name])
    read = {port["name"]: port for port in reuse["asks"]["inputs"]}
    told = {port["name"]: port for port in reuse["asks"]["outputs"]}
    if set(read) != {OBSERVATION, *(f"memory_{name}" for name in MEMORY)} or set(told) != {VIEW, LOGIT}:
        raise ValueError("asks")
    if reuse["looks"]["outputs"] != [told[VIEW]] or reuse["looks"]["inputs"] != [read[OBSERVATION]]:
        raise ValueError("looks")
    kept = [(read[f"memory_{name}"]["shape"], read[f"memory_{name}"]["dtype"]) for name in MEMORY]
    if kept != [([manifest["outputs"]], "float32"), (told[VIEW]["shape"], "float32"), ([], "int64")]:
        raise ValueError("memory")
    if told[LOGIT]["shape"] != [1] or first != [read[OBSERVATION]]:
        raise ValueError("memory")


def _check_port(port: dict[str, Any]) -> None:
    shape = port["shape"]
    if (
        not _NAME.fullmatch(port["name"])
        or port["dtype"] not in DTYPES
        or not isinstance(shape, list)
        or len(shape) > 8
    ):
        raise ValueError("name, shape or dtype")
    if any(type(side) is not int or side < 1 for side in shape) or math.prod(shape) > MAX_VALUES:
        raise ValueError("shape")

"""Runs an export with onnxruntime or openvino, on one thread, without torch: `act(observation) -> action, exit, confidence`.

    from pathlib import Path
    from rlexit import serve

    server = serve.load(Path("runs/pong/ztw/s0/export"))
    action, exit, confidence = server.act(observation)        # (4, 84, 84) uint8, or a batch (B, 4, 84, 84) of them

A folder is treated as a stranger's: sizes are bounded, every byte is hashed, files are regular ones with plain names, a
graph may hold only known arithmetic and nothing outside itself (`rlexit.onnxfile`), and the checked bytes, not the path,
go to the runtime. What stays possible is a graph that is slow, or wrong on purpose: hashes in a manifest show damage, not
intent. README has a game of Pong played from an export.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlexit import onnxfile
from rlexit.backends import Runner, one_line, runner
from rlexit.exported import MAX_FILE_BYTES, Port, ServeError, ports, read_manifest, read_regular

# What a stage hands on for so many rows fits in a core's second-level cache.
BLOCK_BYTES = 1 << 20
LEAST_BLOCK = 8


class Act(NamedTuple):
    """One decision: what to do, where the row left, and the probability of the action."""

    action: int
    exit: int
    confidence: float


class Acts(NamedTuple):
    """A batch of decisions: (B,) int64, (B,) int64, (B,) float32."""

    actions: np.ndarray
    exits: np.ndarray
    confidences: np.ndarray


class Served(NamedTuple):
    """All that is known of a batch: (B, A) log-probabilities, (B,) exits, (B, K) scores, NaN where none was asked for."""

    answers: np.ndarray
    exits: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Stage:
    """One graph of an export: rows leave after it at `exit` where their score is above `threshold`."""

    exit: int
    threshold: float
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    data: bytes


def load(
    folder: Path, *, thresholds: Sequence[float] | None = None, threads: int = 1, runtime: str = "onnxruntime"
) -> Server:
    """Opens an export after checking every byte of it.

    Args:
        folder: what `rlexit export` wrote.
        thresholds: K - 1 others; +inf: nobody leaves there, -inf: everybody. Exits that the export was made without
            (+inf in its manifest) stay closed.
        threads: that the rows of a batch are dealt to; a single decision takes one.
        runtime: `onnxruntime` or `openvino`.
    Raises:
        ServeError: a file is missing, altered, too large, newer than this rlexit, or holds what is not run.
        MissingExtra: the runtime is not installed.
    """
    manifest = read_manifest(folder)
    limits = [float(value) for value in (manifest["thresholds"] if thresholds is None else thresholds)]
    if len(limits) != manifest["exits"] - 1 or any(math.isnan(value) for value in limits):
        raise ServeError(f"`thresholds` must be {manifest['exits'] - 1} numbers, got {thresholds}.")
    if thresholds is not None and manifest["format"] == "onnx-if":
        raise ServeError("`thresholds` are inside the graph of this format. Export again with --format onnx.")
    if threads < 1:
        raise ServeError(f"`threads` must be at least 1, got {threads}.")
    return Server(manifest, [_stage(folder, one, limits) for one in manifest["stages"]], threads, runtime)


class Server:
    """An export in memory. `act` reuses its buffers, so one server serves one thread of control at a time.

    Args:
        manifest: of the export.
        stages: in order, from `load`.
        threads: see `load`.
        runtime: see `load`.
    """

    def __init__(
        self, manifest: dict[str, Any], stages: Sequence[Stage], threads: int = 1, runtime: str = "onnxruntime"
    ) -> None:
        self.manifest = manifest
        self.shape = tuple(manifest["observation"]["shape"])
        self.dtype = np.dtype(manifest["observation"]["dtype"])
        self.outputs, self.exits = int(manifest["outputs"]), int(manifest["exits"])
        self.nested = manifest["format"] == "onnx-if"
        self.stages, self.threads, self.runtime = tuple(stages), threads, runtime
        self._runners = [runner(runtime, stage.data, stage.inputs, stage.outputs) for stage in stages]
        # Rows of one: every tensor between stages has one place, bound once.
        self._buffers: dict[str, np.ndarray] = {}
        self._chain: list[tuple[Callable[[], object], np.ndarray, float]] = []
        self._told: list[tuple[np.ndarray, int]] = []
        for stage, one in zip(stages, self._runners, strict=True):
            call = self._bind(stage, one)
            score = self._buffers.get(f"score/{stage.exit}", np.ones(1, dtype=np.float32))
            self._chain.append((call, score, stage.threshold))
            self._told.append((self._buffers[f"answer/{stage.exit}"][0], stage.exit))
        self._observation = self._buffers["observation"][0]
        # Batches: what a stage hands on, and how many rows of that a core's cache holds.
        self._places: dict[tuple[int, int, str], np.ndarray] = {}
        self._workers: ThreadPoolExecutor | None = None
        self._handed: list[tuple[list[str], int]] = []
        for place, stage in enumerate(stages):
            later = {port.name for one in stages[place + 1 :] for port in one.inputs}
            ports = [port for port in stage.outputs if port.name in later]
            bytes_of_row = sum(math.prod(port.shape) * np.dtype(port.dtype).itemsize for port in ports)
            size = max(LEAST_BLOCK, BLOCK_BYTES // bytes_of_row) if bytes_of_row else BLOCK_BYTES
            self._handed.append(([port.name for port in ports], size))

    def with_thresholds(self, thresholds: Sequence[float]) -> Server:
        """The same graphs under other thresholds; see `load`."""
        stages = [replace(one, threshold=limit(thresholds, one.exit)) for one in self.stages]
        return Server(self.manifest, stages, self.threads, self.runtime)

    def act(self, observation: np.ndarray) -> Act | Acts:
        """Decides for one observation, or for a batch of them.

        Args:
            observation: (...) one row, or (B, ...).
        Raises:
            ServeError: its shape, dtype or range is not that of the export.
        """
        if self._check(observation):
            served = self.run(observation)
            actions = served.answers.argmax(axis=1)
            confidences = np.exp(np.take_along_axis(served.answers, actions[:, None], axis=1)[:, 0])
            return Acts(actions, served.exits, confidences)
        np.copyto(self._observation, observation)
        answer, exit = self._one()
        action = int(answer.argmax())
        return Act(action, exit, math.exp(answer[action]))

    def run(self, observations: np.ndarray) -> Served:
        """Everything about a batch (B, ...): a stage runs for the rows that came to it only."""
        if not self._check(observations):
            observations = observations[None]
        batch = len(observations)
        answers = np.zeros((batch, self.outputs), dtype=np.float32)
        exits = np.zeros(batch, dtype=np.int64)
        scores = np.full((batch, self.exits), np.nan, dtype=np.float32)
        if self.nested:
            for row in range(batch):
                np.copyto(self._observation, observations[row])
                answers[row], exits[row] = self._one()
            return Served(answers, exits, scores)
        observations = np.ascontiguousarray(observations)
        parts = np.array_split(np.arange(batch), min(self.threads, max(batch // LEAST_BLOCK, 1)))
        told = Served(answers, exits, scores)
        if len(parts) == 1:
            self._run_part(0, observations, told)
            return told
        # Each thread takes its rows all the way: threads that share an operator would wait for each other after each.
        self._workers = self._workers or ThreadPoolExecutor(self.threads)
        jobs = [
            self._workers.submit(
                self._run_part,
                number,
                observations[rows[0] : rows[-1] + 1],
                Served(*(one[rows[0] : rows[-1] + 1] for one in told)),
            )
            for number, rows in enumerate(parts)
        ]
        for job in jobs:
            job.result()
        return told

    def _run_part(self, number: int, observations: np.ndarray, told: Served) -> None:
        """Runs some rows of a batch; `number` is that of their thread, which has buffers of its own."""
        answers, exits, scores = told
        rows = np.arange(len(observations))
        known: dict[str, np.ndarray] = {"observation": observations}
        for place, stage in enumerate(self.stages):
            count = len(rows)
            if not count:
                break
            handed, size = self._handed[place]
            last = place == len(self.stages) - 1
            held = {port.name: self._hold(number, place, port, count) for port in stage.outputs}
            stay: list[np.ndarray] = []
            kept = 0
            for start in range(0, count, size):
                end = min(start + size, count)
                found = {
                    name: one[kept : kept + end - start] if name in handed else one[: end - start]
                    for name, one in held.items()
                }
                given = {port.name: known[port.name][start:end] for port in stage.inputs}
                if place == 0:
                    given["observation"] = self._given(number, given["observation"])
                self._call(place, given, found)
                part = rows[start:end]
                exits[part] = stage.exit
                answers[part] = found["answer"]
                if last:
                    continue
                scores[part, stage.exit] = found["score"]
                order = _close_gaps(found["score"] > np.float32(stage.threshold), [found[name] for name in handed])
                stay.append(order + start)
                kept += len(order)
            if last:
                break
            chosen = np.concatenate(stay)
            later = {port.name for one in self.stages[place + 1 :] for port in one.inputs}
            carried = {name: one[chosen] for name, one in known.items() if name in later and name != "observation"}
            known = carried | {name: held[name][:kept] for name in handed}
            rows = rows[chosen]

    def _given(self, number: int, observations: np.ndarray) -> np.ndarray:
        """Observations as the first graph reads them."""
        port = next(port for port in self.stages[0].inputs if port.name == "observation")
        if observations.dtype == port.dtype:
            return observations
        held = self._hold(number, -1, port, len(observations))[: len(observations)]
        np.copyto(held, observations)
        return held

    def _hold(self, number: int, place: int, port: Port, rows: int) -> np.ndarray:
        """Where a stage tells a batch what; grows to the largest batch seen."""
        held = self._places.get((number, place, port.name))
        if held is None or len(held) < rows:
            held = self._places[number, place, port.name] = np.empty((rows, *port.shape), dtype=port.dtype)
        return held

    def _call(self, place: int, given: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> None:
        try:
            self._runners[place].bind(given, found)()
        except Exception as error:
            raise ServeError(
                f"`stages` must run on {len(given)} inputs, got: {one_line(error)} Export again."
            ) from error

    def _one(self) -> tuple[np.ndarray, int]:
        """The answer (A,) and the exit of the row in the buffers."""
        place = 0
        try:
            for call, score, threshold in self._chain:
                call()
                if score.item(0) > threshold:
                    break
                place += 1
        except Exception as error:
            raise ServeError(f"`stages` must run on one row, got: {one_line(error)} Export again.") from error
        answer, exit = self._told[place]
        return answer, int(self._buffers["exit/-1"][0]) if self.nested else exit

    def _check(self, observation: Any) -> bool:
        """Whether it is a batch; raises ServeError for what is no observation."""
        if not isinstance(observation, np.ndarray) or observation.dtype != self.dtype:
            got = observation.dtype if isinstance(observation, np.ndarray) else type(observation).__name__
            raise ServeError(f"`observation` must be a NumPy array of {self.dtype}, got {got}. Convert it first.")
        batched = observation.shape[1:] == self.shape and observation.ndim == len(self.shape) + 1
        if not batched and observation.shape != self.shape:
            raise ServeError(f"`observation` must be {self.shape}, or (B, ...) of it, got {observation.shape}.")
        if self.dtype.kind == "f" and not np.isfinite(observation).all():
            raise ServeError("`observation` must be finite, got NaN or infinity. Leave such rows out.")
        return batched

    def _bind(self, stage: Stage, one: Runner) -> Callable[[], object]:
        given: dict[str, np.ndarray] = {}
        for port in stage.inputs:
            buffer = self._buffers.get(port.name)
            if port.name == "observation" and buffer is None:
                buffer = self._buffers.setdefault(port.name, _buffer(port))
            if buffer is None or buffer.shape[1:] != port.shape or buffer.dtype != port.dtype:
                raise ServeError(f"`stages` must hand on what the next one reads, got no {port.name!r}. Export again.")
            given[port.name] = buffer
        found = {port.name: _buffer(port) for port in stage.outputs}
        for name, buffer in found.items():
            self._buffers[f"{name}/{stage.exit}" if name in ("answer", "score", "exit") else name] = buffer
        try:
            return one.bind(given, found, fixed=True)
        except Exception as error:
            raise ServeError(f"`stages` must run on one row, got: {one_line(error)} Export again.") from error


def _buffer(port: Port) -> np.ndarray:
    return np.zeros((1, *port.shape), dtype=port.dtype)


def _close_gaps(leaves: np.ndarray, tensors: Sequence[np.ndarray]) -> np.ndarray:
    """Which rows stay, in the order in which the tensors hold them now: the last ones fill the places that are free.

    Args:
        leaves: (n,) bool.
        tensors: (n, ...) each, changed in place; those who stay lie at their beginning afterwards.
    """
    order = np.arange(len(leaves) - int(np.count_nonzero(leaves)))
    if 0 < len(order) < len(leaves):
        free, last = np.flatnonzero(leaves[: len(order)]), len(order) + np.flatnonzero(~leaves[len(order) :])
        for tensor in tensors:
            tensor[free] = tensor[last]
        order[free] = last
    return order


def limit(thresholds: Sequence[float], exit: int) -> float:
    """The threshold of an exit in float32, as torch compares it; -inf after the last one, where all rows leave."""
    return float(np.float32(thresholds[exit])) if 0 <= exit < len(thresholds) else -math.inf


def _stage(folder: Path, entry: dict[str, Any], limits: Sequence[float]) -> Stage:
    path = folder / entry["file"]
    data = read_regular(path, MAX_FILE_BYTES)
    if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ServeError(f"`{path}` does not match the size or SHA-256 in its manifest. It was altered; export again.")
    try:
        onnxfile.operators(data)
    except onnxfile.OnnxFileError as error:
        raise ServeError(f"`{path}` {error}. Serve only what `rlexit export` wrote.") from error
    exit = entry["exit"]
    return Stage(exit, limit(limits, exit), ports(entry["inputs"]), ports(entry["outputs"]), data)

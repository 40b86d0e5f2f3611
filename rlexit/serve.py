"""Runs an export with onnxruntime, on one thread and without torch: `act(observation) -> action, exit, confidence`.

    from pathlib import Path
    from rlexit import serve

    server = serve.load(Path("runs/pong/ztw/s0/export"))
    action, exit, confidence = server.act(observation)        # (4, 84, 84) uint8, or a batch (B, 4, 84, 84) of them

A folder is treated as a stranger's: sizes are bounded, every byte is hashed, files are regular ones with plain names, a
graph may hold only known arithmetic and nothing outside itself (`rlexit.onnxfile`), and the checked bytes, not the path,
go to onnxruntime. What stays possible is a graph that is slow, or wrong on purpose: hashes in a manifest show damage, not
intent. README has a game of Pong played from an export.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlexit import onnxfile
from rlexit.exported import MAX_FILE_BYTES, Port, ServeError, ports, read_manifest, read_regular


class MissingExtra(ImportError):
    """A library of an extra is not installed; the message names the extra."""


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


def runtime() -> Any:
    """The onnxruntime module; raises MissingExtra that says how to get it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("`onnxruntime` is missing. Install it: pip install 'rlexit[export]'.") from error
    return onnxruntime


def load(folder: Path, *, thresholds: Sequence[float] | None = None, threads: int = 1) -> Server:
    """Opens an export after checking every byte of it.

    Args:
        folder: what `rlexit export` wrote.
        thresholds: K - 1 others; +inf: nobody leaves there, -inf: everybody. Exits that the export was made without
            (+inf in its manifest) stay closed.
        threads: of onnxruntime, within one operator.
    Raises:
        ServeError: a file is missing, altered, too large, newer than this rlexit, or holds what is not run.
        MissingExtra: onnxruntime is not installed.
    """
    manifest = read_manifest(folder)
    limits = [float(value) for value in (manifest["thresholds"] if thresholds is None else thresholds)]
    if len(limits) != manifest["exits"] - 1 or any(math.isnan(value) for value in limits):
        raise ServeError(f"`thresholds` must be {manifest['exits'] - 1} numbers, got {thresholds}.")
    if thresholds is not None and manifest["format"] == "onnx-if":
        raise ServeError("`thresholds` are inside the graph of this format. Export again with --format onnx.")
    if threads < 1:
        raise ServeError(f"`threads` must be at least 1, got {threads}.")
    return Server(manifest, [_stage(folder, one, limits) for one in manifest["stages"]], threads)


class Server:
    """An export in memory. `act` reuses its buffers, so one server serves one thread of control at a time.

    Args:
        manifest: of the export.
        stages: in order, from `load`.
        threads: of onnxruntime.
    """

    def __init__(self, manifest: dict[str, Any], stages: Sequence[Stage], threads: int = 1) -> None:
        self.manifest = manifest
        self.shape = tuple(manifest["observation"]["shape"])
        self.dtype = np.dtype(manifest["observation"]["dtype"])
        self.outputs, self.exits = int(manifest["outputs"]), int(manifest["exits"])
        self.nested = manifest["format"] == "onnx-if"
        self.stages = tuple(stages)
        options = _options(runtime(), threads)
        self._sessions = [_session(stage, options) for stage in stages]
        # Rows of one: every tensor between stages has one place, bound once.
        self._buffers: dict[str, np.ndarray] = {}
        self._chain: list[tuple[Any, Any, np.ndarray, float]] = []
        self._told: list[tuple[np.ndarray, int]] = []
        for stage, session in zip(stages, self._sessions, strict=True):
            binding = self._bind(stage, session)
            score = self._buffers.get(f"score/{stage.exit}", np.ones(1, dtype=np.float32))
            self._chain.append((session, binding, score, stage.threshold))
            self._told.append((self._buffers[f"answer/{stage.exit}"][0], stage.exit))
        self._observation = self._buffers["observation"][0]

    def with_thresholds(self, thresholds: Sequence[float]) -> Server:
        """The same graphs under other thresholds; see `load`."""
        return Server(self.manifest, [replace(one, threshold=limit(thresholds, one.exit)) for one in self.stages])

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
        rows = np.arange(batch)
        known: dict[str, np.ndarray] = {"observation": observations}
        for stage, session in zip(self.stages, self._sessions, strict=True):
            if not len(rows):
                break
            found = _call(session, stage, known)
            last = stage is self.stages[-1]
            leaves = np.ones(len(rows), dtype=bool)
            if not last:
                scores[rows, stage.exit] = found["score"]
                leaves = found["score"] > np.float32(stage.threshold)
            answers[rows[leaves]], exits[rows[leaves]] = found["answer"][leaves], stage.exit
            if not leaves.any():
                known |= found
            elif not last:
                known = {name: value[~leaves] for name, value in (known | found).items() if name != "observation"}
                rows = rows[~leaves]
        return Served(answers, exits, scores)

    def _one(self) -> tuple[np.ndarray, int]:
        """The answer (A,) and the exit of the row in the buffers."""
        place = 0
        try:
            for session, binding, score, threshold in self._chain:
                session.run_with_iobinding(binding)
                if score.item(0) > threshold:
                    break
                place += 1
        except Exception as error:
            raise ServeError(f"`stages` must run on one row, got: {_line(error)} Export again.") from error
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

    def _bind(self, stage: Stage, session: Any) -> Any:
        binding = session.io_binding()
        for port in stage.inputs:
            buffer = self._buffers.get(port.name)
            if port.name == "observation" and buffer is None:
                buffer = self._buffers.setdefault(port.name, _buffer(port))
            if buffer is None or buffer.shape[1:] != port.shape or buffer.dtype != port.dtype:
                raise ServeError(f"`stages` must hand on what the next one reads, got no {port.name!r}. Export again.")
            binding.bind_input(port.name, "cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
        for port in stage.outputs:
            name = f"{port.name}/{stage.exit}" if port.name in ("answer", "score", "exit") else port.name
            buffer = self._buffers[name] = _buffer(port)
            binding.bind_output(port.name, "cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
        return binding


def _buffer(port: Port) -> np.ndarray:
    return np.zeros((1, *port.shape), dtype=port.dtype)


def _options(onnxruntime: Any, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4
    # Spinning threads make torch in the same process up to 50 times as slow (onnxruntime issue 13808).
    for pool in ("intra_op", "inter_op"):
        options.add_session_config_entry(f"session.{pool}.allow_spinning", "0")
    return options


def _session(stage: Stage, options: Any) -> Any:
    try:
        session = runtime().InferenceSession(stage.data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # onnxruntime has a type of its own for each of a dozen faults; their common base is Exception.
        raise ServeError(f"`stages` must be graphs that onnxruntime runs, got: {_line(error)} Export again.") from error
    for stated, real in ((stage.inputs, session.get_inputs()), (stage.outputs, session.get_outputs())):
        if [port.name for port in stated] != [port.name for port in real]:
            raise ServeError("`stages` must have the inputs and outputs that the manifest says. Export again.")
    return session


def _call(session: Any, stage: Stage, known: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [port.name for port in stage.outputs]
    try:
        found = session.run(names, {port.name: known[port.name] for port in stage.inputs})
    except Exception as error:
        raise ServeError(f"`stages` must run on {len(known)} inputs, got: {_line(error)} Export again.") from error
    return dict(zip(names, found, strict=True))


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text if text.endswith(".") else f"{text}."


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

"""Runs an export with onnxruntime or openvino, on one thread, without torch: `act(observation) -> action, exit, confidence`.

    from pathlib import Path
    from rlexit import serve

    server = serve.load(Path("runs/pong/ztw/s0/export"))
    action, exit, confidence = server.act(observation)        # (4, 84, 84) uint8, or a batch (B, 4, 84, 84) of them
    server.reset()                                             # where a game begins, if answers may be repeated

A folder is treated as a stranger's: sizes are bounded, every byte is hashed, files are regular ones with plain names, a
graph may hold only known arithmetic and nothing outside itself (`rlexit.onnxfile`), and the checked bytes, not the path,
go to the runtime. What stays possible is a graph that is slow, or wrong on purpose: hashes in a manifest show damage, not
intent. README has a game of Pong played from an export.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlexit import onnxfile
from rlexit.chains import LEAST_BLOCK, Batch, Opened, Part, Served, Single, Stage
from rlexit.exported import BRANCHES, MAX_FILE_BYTES, OBSERVATION, ServeError, ports, read_manifest, read_regular
from rlexit.recall import Recall, Reuse

__all__ = ["Act", "Acts", "Part", "Reuse", "ServeError", "Served", "Server", "Stage", "limit", "load"]


# The rule whose score is a leave gate's probability. `run` asks none where the threshold is -inf.
ASKS = "learned"


class Act(NamedTuple):
    """One decision: what to do, where the row left (K where it repeats its last answer), and the action's probability."""

    action: int
    exit: int
    confidence: float


class Acts(NamedTuple):
    """A batch of decisions: (B,) int64, (B,) int64, (B,) float32."""

    actions: np.ndarray
    exits: np.ndarray
    confidences: np.ndarray


def load(
    folder: Path, *, thresholds: Sequence[float] | None = None, threads: int = 1, runtime: str = "onnxruntime"
) -> Server:
    """Opens an export after checking every byte of it.

    Args:
        folder: what `rlexit export` wrote.
        thresholds: K - 1 others; +inf: nobody leaves there, -inf: everybody, but for the rule `learned`, whose graphs
            always ask. Exits that the export was made without (+inf in its manifest) stay closed.
        threads: that the rows of a batch are dealt to; a single decision takes one.
        runtime: `onnxruntime` or `openvino`.
    Raises:
        ServeError: a file is missing, altered, too large, newer than this rlexit, or holds what is not run; or the
            thresholds do not fit.
        MissingExtra: the runtime is not installed.
    """
    manifest = read_manifest(folder)
    told = [float(value) for value in manifest["thresholds"]]  # JSON has no infinity but as text
    limits = _limits(told if thresholds is None else thresholds, manifest)
    if thresholds is not None and manifest["format"] == "onnx-if":
        raise ServeError("`thresholds` are inside the graph of this format. Export again with --format onnx.")
    if threads < 1:
        raise ServeError(f"`threads` must be at least 1, got {threads}.")
    stages = [_stage(folder, one, limits) for one in manifest["stages"]]
    asks = manifest.get("reuse")
    reuse = None if asks is None else Reuse(_part(folder, asks["asks"]), _part(folder, asks["looks"]), asks["limit"])
    return Server(manifest, stages, threads, runtime, reuse)


class Server:
    """An export in memory. `act` reuses its buffers, so one server serves one thread of control at a time.

    Args:
        manifest: of the export.
        stages: in order, from `load`.
        threads: see `load`.
        runtime: see `load`.
        reuse: what is asked before the first stage, of an export that may repeat answers.
    """

    def __init__(
        self,
        manifest: dict[str, Any],
        stages: Sequence[Stage],
        threads: int = 1,
        runtime: str = "onnxruntime",
        reuse: Reuse | None = None,
    ) -> None:
        self.manifest = manifest
        self.shape = tuple(manifest["observation"]["shape"])
        self.dtype = np.dtype(manifest["observation"]["dtype"])
        self.outputs, self.exits = int(manifest["outputs"]), int(manifest["exits"])
        self.nested = manifest["format"] == "onnx-if"
        self.stages, self.threads, self.runtime, self.reuse = tuple(stages), threads, runtime, reuse
        self.gates = sum(stage.runs is not None for stage in stages)
        ways = () if reuse is None else (reuse.asks, reuse.looks)
        self._opened = Opened([*ways, *(part for stage in stages for part in stage.parts)], runtime)
        self._recall = None if reuse is None else Recall(reuse, self._opened)
        shared = {} if self._recall is None else {OBSERVATION: self._recall.observation}
        self._single = Single(stages, self._opened, shared)
        self._batches = [Batch(stages, self._opened) for _ in range(threads)]
        self._workers: ThreadPoolExecutor | None = None

    def with_thresholds(self, thresholds: Sequence[float]) -> Server:
        """The same graphs under other thresholds; see `load`."""
        limits = _limits(thresholds, self.manifest)
        stages = [replace(one, threshold=limit(limits, one.exit)) for one in self.stages]
        return Server(self.manifest, stages, self.threads, self.runtime, self.reuse)

    def reset(self, rows: Sequence[int] | np.ndarray | None = None) -> None:
        """Begins new games, in which no answer may be repeated: in all environments, or in some of a batch.

        Only an export that may repeat answers remembers anything; others have nothing to forget.

        Args:
            rows: their indices, or (B,) bools such as an environment's `terminated | truncated`. All by default.

        Raises:
            ServeError: there are no such rows.
        """
        if self._recall is not None:
            self._recall.reset(rows)

    def remember(self, memory: dict[str, np.ndarray], rows: Sequence[int]) -> None:
        """Takes over what some rows remember elsewhere, in an export that may repeat answers.

        Args:
            memory: (B, ...) `answer`, `view` and `left`, as `rlexit.gates.reuse` has them.
            rows: of the batch.
        """
        if self._recall is not None:
            self._recall.become(memory, rows)

    def act(self, observation: np.ndarray) -> Act | Acts:
        """Decides for one observation, or for a batch of them.

        An export that may repeat answers takes the rows of a batch for environments, the same ones in every call until
        `reset`; a repeated answer has the exit K.

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
        np.copyto(self._single.observation, observation)
        answer, exit = self._one()
        action = int(answer.argmax())
        return Act(action, exit, math.exp(answer[action]))

    def run(self, observations: np.ndarray) -> Served:
        """Everything about a batch (B, ...): a graph runs for the rows that need it only."""
        if not self._check(observations):
            observations = observations[None]
        told = Served.blank(len(observations), self.outputs, self.exits, self.gates)
        if self.nested:
            for row, observation in enumerate(observations):
                np.copyto(self._single.observation, observation)
                told.answers[row], told.exits[row] = self._one()
                told.macs[row] = self.manifest["macs"].get(str(told.exits[row]), 0)
            return told
        if self._recall is None or not len(observations):
            self._deal(np.ascontiguousarray(observations), told)
            return told
        computes, answers, macs = self._recall.many(observations)
        few = Served(*(one[computes] for one in told))
        self._deal(np.ascontiguousarray(observations[computes]), few)
        for whole, part in zip(told, few, strict=True):
            whole[computes] = part
        told.answers[~computes], told.exits[~computes] = answers[~computes], self.exits
        told.macs[:] += macs
        self._recall.keep(computes, few.answers)
        return told

    def _deal(self, observations: np.ndarray, told: Served) -> None:
        """Runs a batch on the threads there are."""
        parts = np.array_split(
            np.arange(len(observations)), min(self.threads, max(len(observations) // LEAST_BLOCK, 1))
        )
        if len(parts) == 1:
            self._batches[0].run(observations, told)
            return
        # Each thread takes its rows all the way: threads that share an operator would wait for each other after each.
        self._workers = self._workers or ThreadPoolExecutor(self.threads)
        jobs = [
            self._workers.submit(
                batch.run,
                observations[rows[0] : rows[-1] + 1],
                Served(*(one[rows[0] : rows[-1] + 1] for one in told)),
            )
            for batch, rows in zip(self._batches, parts, strict=False)
        ]
        for job in jobs:
            job.result()

    def _one(self) -> tuple[np.ndarray, int]:
        """The answer (A,) and the exit of the row in the buffers."""
        if self._recall is None:
            return self._single.decide()
        repeated = self._recall.one()
        if repeated is not None:
            return repeated, self.exits
        answer, exit = self._single.decide()
        self._recall.keep_one(answer)
        return answer, exit

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


def _limits(thresholds: Sequence[float], manifest: dict[str, Any]) -> list[float]:
    limits, exits = [float(value) for value in thresholds], int(manifest["exits"])
    if len(limits) != exits - 1 or any(math.isnan(value) for value in limits):
        raise ServeError(f"`thresholds` must be {exits - 1} numbers, got {list(thresholds)}. Give one per early exit.")
    if manifest.get("rule") == ASKS and -math.inf in limits:
        raise ServeError(
            f"`thresholds` of the rule {ASKS} must be above -inf, got {limits}: the graphs ask every row. Give -1, and "
            "everybody is asked and leaves."
        )
    return limits


def limit(thresholds: Sequence[float], exit: int) -> float:
    """The threshold of an exit in float32, as torch compares it; -inf after the last one, where all rows leave."""
    return float(np.float32(thresholds[exit])) if 0 <= exit < len(thresholds) else -math.inf


def _stage(folder: Path, entry: dict[str, Any], limits: Sequence[float]) -> Stage:
    exit = entry["exit"]
    ways = {name: _part(folder, entry[name]) for name in BRANCHES if entry.get(name) is not None}
    return Stage(_part(folder, entry), exit, limit(limits, exit), **ways)


def _part(folder: Path, entry: dict[str, Any]) -> Part:
    path = folder / entry["file"]
    data = read_regular(path, MAX_FILE_BYTES)
    if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ServeError(f"`{path}` does not match the size or SHA-256 in its manifest. It was altered; export again.")
    try:
        onnxfile.operators(data)
    except onnxfile.OnnxFileError as error:
        raise ServeError(f"`{path}` {error}. Serve only what `rlexit export` wrote.") from error
    return Part(ports(entry["inputs"]), ports(entry["outputs"]), data, entry["macs"])

"""Run folders: one artefact per stage, made once per config, resumed if unfinished, never overwritten unasked."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from rlexit import checkpoint, machine


class FolderError(ValueError):
    """A stage cannot be done here: an earlier one is missing, or the folder belongs to another config."""


def config_hash(settings: object) -> str:
    """Short hash of JSON settings; equal settings, equal hash."""
    return checkpoint.sha256(checkpoint.canonical_json(settings).encode())[:16]


class Stage:
    """One stage of a run: its folder, its settings, and whether it is done.

    Args:
        folder: of the stage.
        name: of the stage, such as `distill`.
        settings: everything that its result depends on, as JSON values.
        config: the whole resolved config, stored for the reader.
        owns: patterns of the files in the folder that the stage makes; what starting over removes.
    """

    def __init__(
        self, folder: Path, name: str, settings: dict[str, Any], config: dict[str, Any], owns: tuple[str, ...]
    ) -> None:
        self.folder, self.name, self.settings, self.config, self.owns = folder, name, settings, config, owns
        self.hash = config_hash(settings)

    @property
    def _done(self) -> Path:
        return self.folder / f"{self.name}.done.json"

    @property
    def _started(self) -> Path:
        return self.folder / f"{self.name}.run.json"

    def is_done(self) -> bool:
        """Whether the stage is finished for these settings."""
        return _read(self._done).get("hash") == self.hash

    def result(self) -> dict[str, Any]:
        """What the finished stage left; raises FolderError that names the verb if it is not finished."""
        found = _read(self._done)
        if not found:
            verb = self.name
            raise FolderError(f"`{self.folder}` must hold a finished {verb}, got none. Run `rlexit {verb}` first.")
        return dict(found["result"])

    def begin(self, force: bool = False) -> bool:
        """Opens the stage for work.

        Args:
            force: throw away what another config left there.
        Returns:
            False if it is done already and nothing is to be done.
        Raises:
            FolderError: the folder holds this stage of another config, and something that it made.
        """
        done, started = self._note(self._done, force), self._note(self._started, force)
        for found in (done, started):
            if found and found.get("hash") != self.hash:
                if not force and (done or self._made()):
                    raise FolderError(
                        f"`{self.folder}` holds {self.name} of another config{self._difference(started)}. "
                        "Use --force to start it over, or another --out."
                    )
                self.clear()
                done = started = {}
        if done and not force:
            return False
        if done:
            self.clear()
        facts = {"hash": self.hash, "settings": self.settings, "config": self.config, **environment()}
        write_json(self._started, {**facts, "attempts": int(started.get("attempts", 0)) + 1})
        return True

    def _note(self, path: Path, force: bool) -> dict[str, Any]:
        try:
            return _read(path)
        except FolderError:
            if not force:
                raise
            return {"hash": "damaged"}

    def _made(self) -> list[Path]:
        """Files of the stage, its notes apart; none where bad input ended it before it had anything to keep."""
        return [path for pattern in self.owns for path in self.folder.glob(pattern)]

    def clear(self) -> None:
        """Removes what the stage left; other stages of the folder stay."""
        # The note of what was started goes last: without it a later run would go on with what is left of the files.
        for path in (self._done, *self._made(), self._started):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def finish(self, result: dict[str, Any]) -> None:
        """Marks the stage as done."""
        write_json(self._done, {"hash": self.hash, "finished": _now(), "result": result})

    def _difference(self, started: dict[str, Any]) -> str:
        theirs = flatten(started.get("settings", {}))
        ours = flatten(self.settings)
        names = [name for name in sorted(theirs.keys() | ours.keys()) if theirs.get(name) != ours.get(name)]
        if not names:
            return ""
        name = names[0]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f" (`{name}` is {theirs.get(name)!r} there, {ours.get(name)!r} here{more})"


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted names."""
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def environment() -> dict[str, Any]:
    """Where and with what a run is made: command, code version, libraries, machine."""
    import torch

    names = ("rlexit", "torch", "stable-baselines3", "gymnasium", "ale-py", "numpy")
    versions = {name: metadata.version(name) for name in names if _installed(name)}
    return {
        "argv": sys.argv[1:],
        "time": _now(),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **versions},
        "machine": machine.describe(),
        "threads": torch.get_num_threads(),
    }


_held: dict[Path, int] = {}


def hold(root: Path) -> None:
    """Keeps other processes out of a run folder from now on; the lock dies with this process.

    Raises:
        FolderError: another process works there.
    """
    if root.resolve() in _held:
        return
    root.mkdir(parents=True, exist_ok=True)
    file = os.open(root / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise FolderError(
            f"`{root}` is being worked on by another rlexit. Wait for it, or use another --out."
        ) from error
    _held[root.resolve()] = file


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes JSON atomically."""
    checkpoint.write_atomic(path, json.dumps(value, indent=2, allow_nan=False).encode())


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise FolderError(f"`{path}` is cut or no JSON. Remove it, or use --force.") from error
    if not isinstance(value, dict):
        raise FolderError(f"`{path}` must hold a JSON object. Remove it, or use --force.")
    return value


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _commit() -> str:
    folder = Path(__file__).resolve().parent.parent
    if shutil.which("git") is None or not (folder / ".git").exists():
        return ""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=10"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

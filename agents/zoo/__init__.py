"""Teachers that come with rlexit: safetensors and a manifest per game, trained by `rlexit train`."""

from __future__ import annotations

from pathlib import Path

from rlexit import checkpoint
from rlexit.registry import unknown

TEACHER = "teacher"
CURVES = "scalars.csv"


def folder(game: str) -> Path:
    """The folder of the shipped teacher of a game; raises LookupError if there is none."""
    here = Path(__file__).resolve().parent
    if not checkpoint.exists(here / game, TEACHER):
        raise unknown("teacher: zoo", game, shipped())
    return here / game


def shipped() -> list[str]:
    """Games with a shipped teacher."""
    here = Path(__file__).resolve().parent
    return sorted(path.parent.name for path in here.glob(f"*/{TEACHER}.json"))


def copy(game: str, target: Path) -> None:
    """Copies the shipped teacher of a game and its learning curve into a run, every byte of the weights checked."""
    tensors, facts = checkpoint.load(folder(game), TEACHER)
    checkpoint.save(target, TEACHER, tensors, {**facts, "source": {"kind": "zoo", "game": game}})
    checkpoint.write_atomic(target / CURVES, (folder(game) / CURVES).read_bytes())

"""The one writer to TensorBoard: curves of a run, kept in `scalars.csv` too, and boards of pictures and points."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from rlexit.checkpoint import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

B = TypeVar("B", bound="Board")
HEADER = ("step", "tag", "value")


class Board:
    """What TensorBoard shows of one folder; a picture of files that hold the truth, and never read back.

    Args:
        folder: events go to `<folder>/tb`; made if missing.
        resume_step: points of earlier attempts after this step are hidden; 0 hides them all.
    """

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._board = SummaryWriter(str(folder / "tb"), purge_step=resume_step + 1 if resume_step else 0)

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Writes one point of a curve, if it is finite."""
        if math.isfinite(value):
            self._board.add_scalar(tag, float(value), step)

    def histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        """Writes a histogram."""
        if values.size:
            self._board.add_histogram(tag, values, step)

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Writes a matplotlib figure."""
        self._board.add_figure(tag, figure, step, close=False)

    def animation(self, tag: str, gif: bytes, height: int, width: int, step: int) -> None:
        """Writes an animated GIF as it is; no video library is needed to play it."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        summary = Summary(value=[Summary.Value(tag=tag, image=picture)])
        self._board._get_file_writer().add_summary(summary, step)

    def hyperparameters(self, settings: dict[str, object], results: dict[str, float]) -> None:
        """Writes the settings and what they led to as TensorBoard's HPARAMS row."""
        flat = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in settings.items()
        }
        self._board.add_hparams(flat, results, run_name="hparams")

    def flush(self) -> None:
        """Makes all points visible to readers."""
        self._board.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self._board.close()

    def __enter__(self: B) -> B:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RunLog(Board):
    """Appends scalars to `<folder>/scalars.csv` (the truth) and mirrors them to a board.

    Args:
        folder: made if missing.
        resume_step: rows of earlier attempts after this step are dropped from both; 0 starts afresh.
    """

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        super().__init__(folder, resume_step)
        self.path = folder / "scalars.csv"
        kept = [row for row in read_scalars(folder) if row[0] <= resume_step] if resume_step else []
        lines = [",".join(HEADER), *(f"{step},{tag},{value!r}" for step, tag, value in kept)]
        write_atomic(self.path, ("\n".join(lines) + "\n").encode())
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Writes one point of a curve; a value that is not finite goes to the CSV only."""
        self._file.write(f"{step},{tag},{float(value)!r}\n")
        super().scalar(tag, value, step)

    def flush(self) -> None:
        """Makes all points visible to readers."""
        self._file.flush()
        super().flush()

    def close(self) -> None:
        """Flushes and closes both files."""
        self._file.close()
        super().close()


def read_scalars(folder: Path) -> list[tuple[int, str, float]]:
    """Reads `scalars.csv` as (step, tag, value); a torn last line, left by a kill, is skipped."""
    path = folder / "scalars.csv"
    if not path.is_file():
        return []
    rows = []
    # A line without its end may still look like a number: 0.1 of 0.125.
    whole = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")[0]
    for row in list(csv.reader(whole.splitlines()))[1:]:
        try:
            rows.append((int(row[0]), row[1], float(row[2])))
        except (IndexError, ValueError):
            continue
    return rows

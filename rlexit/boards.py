"""What calibration and evaluation show in TensorBoard: a board per operating point, so that points can be compared there.

Boards repeat what the files of a run say; nothing reads them back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlexit import metrics
from rlexit.calibrate import Scores
from rlexit.exit_policy import ExitPolicy
from rlexit.rows import ReliabilityRow
from rlexit.runfolder import flatten
from rlexit.runlog import Board
from rlexit.summary import Point


def show_points(folder: Path, points: Sequence[Point], settings: Mapping[str, Any], step: int) -> None:
    """Writes `eval/*` of every operating point, and its row of HPARAMS.

    Args:
        folder: a board each is made below it.
        points: as a report shows them.
        settings: the resolved config, nested.
        step: samples (or env steps) that the policy was trained for.
    """
    for point in points:
        values = [value for seed in point.values for value in seed]
        results = {"eval/return_iqm": float(metrics.iqm(values)), "eval/macs_ratio": point.relative_macs.mean}
        scalars = {
            **results,
            "eval/return_mean": point.value.mean,
            "eval/length_mean": point.decisions_mean,
            "eval/macs_mean": point.macs_mean,
            "eval/latency_us_p50": point.latency_us_p50,
            **{f"eval/exit_frac/{exit}": share for exit, share in enumerate(point.exit_shares)},
            **({"eval/reuse_frac": point.reuse_share} if point.reuse_share else {}),
        }
        with Board(folder / f"{point.method} {point.label}") as board:
            for tag, value in scalars.items():
                board.scalar(tag, value, step)
            board.hyperparameters(
                {"method": point.method, "operating point": point.label, **flatten(settings)}, results
            )


def show_calibration(
    folder: Path, policies: Sequence[ExitPolicy], scores: Scores, bins: Sequence[ReliabilityRow]
) -> None:
    """Writes `calib/*` of every calibrated exit policy, and how sure each exit is.

    Args:
        folder: of the boards.
        policies: with provenance.
        scores: confidences of held-out rows.
        bins: reliability of every early exit on the same rows.
    """
    with Board(folder) as board:
        for exit in range(scores.early.shape[1]):
            board.histogram(f"eval/confidence/exit{exit}", scores.early[:, exit].cpu().numpy(), 0)
            mine = [row for row in bins if row.exit == exit]
            columns = ([getattr(row, name) for row in mine] for name in ("count", "confidence", "agreement"))
            board.scalar(f"calib/ece/exit{exit}", metrics.expected_calibration_error(*columns), 0)
    for policy in policies:
        with Board(folder / policy.label) as board:
            for exit, threshold in enumerate(policy.thresholds):
                board.scalar(f"calib/threshold/exit{exit}", threshold, 0)
            facts = policy.provenance
            if "return_drop" in facts:
                board.scalar("calib/return_drop", facts["return_drop"], 0)

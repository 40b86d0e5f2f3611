"""Curves: every point once, in the CSV and in TensorBoard, whatever was killed and resumed."""

from __future__ import annotations

import math
import time

import matplotlib.figure
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlexit.runlog import RunLog, read_scalars


def board(folder, tag: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0})
    accumulator.Reload()
    if tag not in accumulator.Tags()["scalars"]:
        return []
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def attempt(folder, resume_step: int, steps) -> None:
    """An attempt at a run: writes value = step / 4 at every step."""
    with RunLog(folder, resume_step) as log:
        for step in steps:
            log.scalar("distill/kl", step / 4, step)
        log.flush()


def test_points_stand_in_both_files(tmp_path):
    attempt(tmp_path, 0, range(1, 4))
    assert (
        tmp_path / "scalars.csv"
    ).read_text() == "step,tag,value\n1,distill/kl,0.25\n2,distill/kl,0.5\n3,distill/kl,0.75\n"
    assert read_scalars(tmp_path) == [(1, "distill/kl", 0.25), (2, "distill/kl", 0.5), (3, "distill/kl", 0.75)]
    assert board(tmp_path, "distill/kl") == [(1, 0.25), (2, 0.5), (3, 0.75)]


@pytest.mark.parametrize("resumed", [[2], [0], [3, 1], [0, 0]])
def test_a_resumed_run_has_every_step_once(tmp_path, resumed):
    """The attempt before went to step 4; the checkpoint is older than that, or there was none yet."""
    attempt(tmp_path, 0, range(1, 5))
    for start in resumed:
        time.sleep(1.05)  # event files are ordered by their second
        attempt(tmp_path, start, range(start + 1, 6))
    expected = [(step, step / 4) for step in range(1, 6)]
    assert [(step, value) for step, _, value in read_scalars(tmp_path)] == expected
    assert board(tmp_path, "distill/kl") == expected


def test_a_torn_last_line_is_skipped(tmp_path):
    attempt(tmp_path, 0, range(1, 4))
    whole = (tmp_path / "scalars.csv").read_bytes()
    for cut in range(1, len(b"3,distill/kl,0.75\n") + 1):
        (tmp_path / "scalars.csv").write_bytes(whole[:-cut])
        assert read_scalars(tmp_path) == [(1, "distill/kl", 0.25), (2, "distill/kl", 0.5)], f"{cut} bytes lost"


def test_a_torn_last_line_does_not_spoil_the_line_after_a_resume(tmp_path):
    attempt(tmp_path, 0, range(1, 4))
    path = tmp_path / "scalars.csv"
    path.write_bytes(path.read_bytes()[:-3])
    attempt(tmp_path, 3, range(4, 5))
    assert [step for step, _, _ in read_scalars(tmp_path)] == [1, 2, 4]


def test_numbers_come_back_exactly(tmp_path):
    values = [0.1, 1 / 3, 1e-30, float(np.float32(0.1)), -0.0]
    with RunLog(tmp_path) as log:
        for step, value in enumerate(values, 1):
            log.scalar("a", value, step)
    with RunLog(tmp_path, resume_step=9):
        pass
    assert [value for _, _, value in read_scalars(tmp_path)] == values


def test_values_that_are_not_finite_stand_in_the_csv_only(tmp_path):
    with RunLog(tmp_path) as log:
        log.scalar("a", math.nan, 1)
        log.scalar("a", math.inf, 2)
        log.scalar("a", 3.0, 3)
    nan, infinite, three = (value for _, _, value in read_scalars(tmp_path))
    assert math.isnan(nan)
    assert (infinite, three) == (math.inf, 3.0)
    assert board(tmp_path, "a") == [(3, 3.0)]


def test_no_file_is_no_points(tmp_path):
    assert read_scalars(tmp_path) == []


def test_pictures_histograms_and_settings_reach_tensorboard(tmp_path):
    figure = matplotlib.figure.Figure(figsize=(1, 1))
    with RunLog(tmp_path) as log:
        log.figure("curve", figure, 1)
        log.histogram("exits", np.array([0, 1, 1]), 1)
        log.histogram("nothing", np.array([]), 1)
        log.animation("game", b"GIF89a", 84, 84, 1)
        log.hyperparameters({"rate": 0.1, "taps": ("conv1",)}, {"score": 21.0})
    accumulator = EventAccumulator(str(tmp_path / "tb"))
    accumulator.Reload()
    tags = accumulator.Tags()
    assert set(tags["images"]) == {"curve", "game"}
    assert tags["histograms"] == ["exits"]
    assert (tmp_path / "tb" / "hparams").is_dir()

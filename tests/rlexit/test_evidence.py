"""Several runs in one report: what they share is shared, what they made apart is told apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from rlexit import dissection, summary
from rlexit.dissection import BudgetRow
from rlexit.evidence import gather
from rlexit.resources import CONFIG
from rlexit.rows import LatencyRow, Row, write_rows
from tests.rlexit.toy_rows import episodes, plain, references


def evaluated(
    root: Path, rows: Sequence[Row], method: str = "ztw", seed: int = 0, config: str = "domain: agents"
) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / CONFIG).write_text(config)
    folder = root / method / f"s{seed}"
    write_rows(folder / "eval" / "episodes.csv", rows)
    timed = LatencyRow("pong", method, 0, rows[0].label, 1, 100.0, 120.0, 1, "eager", "a machine")
    write_rows(folder / "eval" / "latency.csv", [timed])
    return folder


def methods(folders: Sequence[Path]) -> list[str]:
    rows = [row for found in gather(folders).rows.values() for row in found]
    return sorted({point.method for point in summary.points(rows)})


def test_two_runs_of_one_method_bear_the_names_of_their_runs(tmp_path: Path) -> None:
    one = evaluated(tmp_path / "pong", [*references(), *episodes([18.0])])
    other = evaluated(tmp_path / "pong_demo", [*references(), *episodes([3.0])])
    assert methods([one, other]) == ["random", "teacher", "ztw (pong)", "ztw (pong_demo)"]


def test_their_latencies_are_renamed_with_them(tmp_path: Path) -> None:
    one = evaluated(tmp_path / "pong", episodes([18.0]))
    other = evaluated(tmp_path / "pong_demo", episodes([3.0]))
    assert [row.method for row in gather([one, other]).latency] == ["ztw (pong)", "ztw (pong_demo)"]


def test_runs_of_one_name_are_told_apart_by_what_is_above_them(tmp_path: Path) -> None:
    one = evaluated(tmp_path / "old" / "pong", episodes([18.0]))
    other = evaluated(tmp_path / "new" / "pong", episodes([3.0]))
    assert methods([one, other]) == ["ztw (new/pong)", "ztw (old/pong)"]


def test_a_method_that_one_run_has_keeps_its_name(tmp_path: Path) -> None:
    one = evaluated(tmp_path / "pong", episodes([18.0]))
    other = evaluated(tmp_path / "pong_demo", episodes([3.0], method="sdn"), "sdn")
    assert methods([one, other]) == ["sdn", "ztw"]


def test_equal_outcomes_in_two_runs_are_one(tmp_path: Path) -> None:
    folders = [evaluated(tmp_path / name, episodes([18.0])) for name in ("pong", "copy")]
    assert methods(folders) == ["ztw"]


def test_a_static_network_keeps_its_method_by_which_verdicts_find_it(tmp_path: Path) -> None:
    one = evaluated(tmp_path / "pong", plain("static", [18.0], 0.5, label="width 0.5"), "static")
    other = evaluated(tmp_path / "pong_demo", plain("static", [3.0], 0.5, label="width 0.5"), "static")
    found = [row for rows in gather([one, other]).rows.values() for row in rows]
    assert {(row.method, row.label) for row in found} == {
        ("static", "width 0.5 (pong)"),
        ("static", "width 0.5 (pong_demo)"),
    }


def test_other_settings_are_no_other_seed_of_the_same_method(tmp_path: Path) -> None:
    one = evaluated(tmp_path / "pong", episodes([18.0]))
    other = evaluated(tmp_path / "short", episodes([3.0], run_seed=1), seed=1, config="distill: {steps: 9}")
    assert methods([one, other]) == ["ztw (pong)", "ztw (short)"]


def test_seeds_of_one_config_are_put_together_wherever_they_lie(tmp_path: Path) -> None:
    one = evaluated(tmp_path / "a" / "pong", episodes([18.0]))
    other = evaluated(tmp_path / "b" / "pong", episodes([3.0], run_seed=1), seed=1)
    assert methods([one, other]) == ["ztw"]


def test_what_labelled_sets_tell_is_renamed_with_the_rows(tmp_path: Path) -> None:
    folders = []
    for name, value in (("pong", 0.8), ("short", 0.9)):
        folders.append(evaluated(tmp_path / name, episodes([value]), config=name))
        row = BudgetRow("pong", "ztw", 0, "exits", "honest", "", "real", 0.5, value, 0.49, 10, "accuracy")
        dissection.write(folders[-1] / "eval", [row])
    assert [(row.method, row.value) for row in gather(folders).budgets] == [("ztw (pong)", 0.8), ("ztw (short)", 0.9)]


def test_a_method_without_episodes_is_renamed_too(tmp_path: Path) -> None:
    folders = []
    for name in ("pong", "short"):
        folders.append(evaluated(tmp_path / name, episodes([0.8]), config=name))
        row = BudgetRow("pong", "pbee", 0, "exits", "honest", "", "real", 0.5, 0.8, 0.49, 10, "accuracy")
        dissection.write(folders[-1] / "eval", [row])
    assert [row.method for row in gather(folders).budgets] == ["pbee (pong)", "pbee (short)"]


def test_two_teachers_of_one_game_are_still_refused(tmp_path: Path) -> None:
    one = evaluated(tmp_path / "pong", [*references(), *episodes([18.0])])
    other = evaluated(tmp_path / "pong_demo", [*plain("teacher", [1.0, 2.0]), *episodes([18.0])])
    rows = [row for found in gather([one, other]).rows.values() for row in found]
    with pytest.raises(ValueError, match="teacher"):
        summary.points(rows)

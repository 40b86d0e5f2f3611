from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlexit import rows
from rlexit.rows import Row, append_rows, read_latency, read_rows, write_rows
from tests.rlexit.toy_rows import episodes, latency, row

NAMES = st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "), min_size=1, max_size=20)
COLUMNS = (
    "task,method,run_seed,label,rule,thresholds,target,execution,actions,split,episode,episode_seed,metric,value,"
    "decisions,macs_mean,relative_macs,exit_fractions,protocol"
)


def same(left: Row, right: Row) -> bool:
    """Equal, with NaN equal to NaN."""
    return all(repr(getattr(left, field.name)) == repr(getattr(right, field.name)) for field in fields(Row))


@settings(max_examples=30)
@given(
    names=st.tuples(NAMES, NAMES, NAMES),
    value=st.floats(allow_nan=False, allow_infinity=False),
    thresholds=st.lists(st.floats(allow_nan=False), max_size=4).map(tuple),
    macs=st.one_of(st.just(math.nan), st.floats(0, 1e12)),
)
def test_rows_come_back_as_they_were_written(
    names: tuple[str, str, str], value: float, thresholds: tuple[float, ...], macs: float, tmp_path_factory: Any
) -> None:
    task, method, label = names
    written = row(task=task, method=method, label=label, value=value, thresholds=thresholds, macs_mean=macs)
    path = tmp_path_factory.mktemp("rows") / "episodes.csv"
    write_rows(path, [written, row()])
    read = read_rows(path)
    assert len(read) == 2
    assert same(read[0], written)
    assert same(read[1], row())


def test_the_columns_are_the_published_ones_in_their_order(tmp_path: Path) -> None:
    write_rows(tmp_path / "episodes.csv", [row()])
    assert (tmp_path / "episodes.csv").read_text().splitlines()[0] == COLUMNS


def test_infinite_thresholds_are_strings_in_the_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "episodes.csv", [row(thresholds=(0.5, math.inf, -math.inf))])
    assert '"[0.5, ""inf"", ""-inf""]"' in (tmp_path / "episodes.csv").read_text()


def test_numpy_numbers_are_written_as_numbers(tmp_path: Path) -> None:
    write_rows(tmp_path / "episodes.csv", [row(value=np.float64(3.5), thresholds=(np.float64(0.5),))])
    assert read_rows(tmp_path / "episodes.csv")[0].value == 3.5


def test_a_file_cut_anywhere_gives_the_rows_that_are_whole(tmp_path: Path) -> None:
    written = episodes([1.0, 2.0], label="é confidence")
    path, cut = tmp_path / "episodes.csv", tmp_path / "cut.csv"
    write_rows(path, written)
    data = path.read_bytes()
    line_ends = [end + near for end, byte in enumerate(data) if byte == ord("\n") for near in (0, 1, 2)]
    for end in sorted({*range(0, len(data), 7), *line_ends} - {len(data) + 1}):
        cut.write_bytes(data[:end])
        assert read_rows(cut) == written[: max(0, data[:end].count(b"\n") - 1)]


def test_rows_are_appended_after_a_torn_line_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "eval" / "episodes.csv"
    first, second, third = episodes([1.0, 2.0, 3.0])
    append_rows(path, [first, second])
    path.write_bytes(path.read_bytes()[:-9])
    append_rows(path, [third])
    assert read_rows(path) == [first, third]


def test_appending_to_a_torn_header_writes_it_again(tmp_path: Path) -> None:
    path = tmp_path / "episodes.csv"
    path.write_text("task,meth")
    append_rows(path, [row()])
    assert read_rows(path) == [row()]


def test_appending_finds_the_last_line_end_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "episodes.csv"
    long = row(protocol='{"note":"' + "x" * 100_000 + '"}')
    append_rows(path, [long])
    with open(path, "a") as file:
        file.write("torn" * 50_000)
    append_rows(path, [row()])
    assert read_rows(path) == [long, row()]


def test_appending_nothing_makes_no_file(tmp_path: Path) -> None:
    append_rows(tmp_path / "episodes.csv", [])
    assert not (tmp_path / "episodes.csv").exists()


def test_appending_to_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "episodes.csv"
    write_rows(path, [latency()])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="must start with"):
        append_rows(path, [row()])
    assert path.read_bytes() == before


def test_a_failed_write_leaves_the_old_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "episodes.csv"
    write_rows(path, [row()])
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        write_rows(path, episodes([5.0, 6.0]))
    assert read_rows(path) == [row()]


def test_latency_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "latency.csv"
    append_rows(path, [latency()])
    append_rows(path, [latency(batch=32, machine="a box, with a comma")])
    assert read_latency(path) == [latency(), latency(batch=32, machine="a box, with a comma")]


@pytest.mark.parametrize("write", [write_rows, append_rows])
def test_rows_of_two_kinds_are_refused(tmp_path: Path, write: Any) -> None:
    with pytest.raises(ValueError, match="LatencyRow"):
        write(tmp_path / "episodes.csv", [row(), latency()])


@pytest.mark.parametrize(
    ("column", "cell"),
    [
        ("run_seed", "zero"),
        ("thresholds", "0.5"),
        ("thresholds", "[true]"),
        ("thresholds", "[NaN]"),
        ("exit_fractions", "[2.0]"),
        ("value", "nan"),
        ("value", "high"),
        ("decisions", "0"),
        ("execution", "imagined"),
        ("split", "train"),
        ("metric", "reward"),
        ("macs_mean", "-1.0"),
        ("protocol", "{}}"),
        ("protocol", '{ "spaced": 1 }'),
        ("protocol", "[]"),
        ("task", ""),
    ],
)
def test_a_bad_value_is_named_with_file_line_and_column(tmp_path: Path, column: str, cell: str) -> None:
    path = tmp_path / "episodes.csv"
    write_rows(path, [row()])
    cells = {name: rows._write_cell(getattr(row(), name)) for name in COLUMNS.split(",")} | {column: cell}
    with open(path, "a") as file:
        file.write(rows._line(cells.values()))
    with pytest.raises(ValueError, match=rf"episodes.csv` line 3 column `{column}`"):
        read_rows(path)


def test_a_wrong_column_name_is_named(tmp_path: Path) -> None:
    path = tmp_path / "episodes.csv"
    path.write_text(COLUMNS.replace("run_seed", "seed") + "\n")
    with pytest.raises(ValueError, match=r"line 1 column `run_seed` must not be 'seed'"):
        read_rows(path)


def test_a_missing_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "episodes.csv"
    path.write_text(COLUMNS.removesuffix(",protocol") + "\n")
    with pytest.raises(ValueError, match="line 1 must have 19 columns, got 18"):
        read_rows(path)


def test_a_line_with_too_few_cells_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "episodes.csv"
    write_rows(path, [row()])
    with open(path, "a") as file:
        file.write("pong,ztw\n")
    with pytest.raises(ValueError, match="line 3 must have 19 columns, got 2"):
        read_rows(path)


@pytest.mark.parametrize("data", [b"\xff\xfe\n", b'task,"open quote\n'])
def test_a_file_that_is_no_csv_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "episodes.csv").write_bytes(data)
    with pytest.raises(ValueError, match=r"episodes.csv"):
        read_rows(tmp_path / "episodes.csv")


@pytest.mark.parametrize("name", ["two\nlines", "nul\0", "lone \ud800"])
def test_names_that_would_break_lines_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"`label` must be printable"):
        row(label=name)


def test_a_latency_needs_a_batch_and_threads() -> None:
    with pytest.raises(ValueError, match=r"`threads` must be at least 1"):
        replace(latency(), threads=0)

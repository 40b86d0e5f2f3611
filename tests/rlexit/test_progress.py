from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from rlexit import progress
from rlexit.progress import Meter


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress.time, "monotonic", made.monotonic)
    return made


@pytest.fixture
def paper() -> io.StringIO:
    return io.StringIO()


def meter(paper: io.StringIO, terminal: bool = False, unit: str = "steps") -> Meter:
    console = Console(file=paper, force_terminal=terminal, width=120, highlight=False, color_system=None)
    return Meter("train", console, unit)


def test_no_more_than_a_line_every_half_minute_where_there_is_no_terminal(clock, paper):
    with meter(paper) as tell:
        for second in range(100):
            tell(second, 1000, {})
            clock.now += 1
    lines = paper.getvalue().splitlines()
    assert len(lines) == 3
    assert all(line.startswith("train ") for line in lines)


def test_a_line_tells_share_count_speed_time_left_and_figures(clock, paper):
    with meter(paper) as tell:
        tell(0, 1000, {})
        clock.now += 50
        tell(100, 1000, {"score": 12.345})
    (line,) = paper.getvalue().splitlines()
    assert re.split(r"  +", line) == ["train", "10%", "100/1000", "2 steps/s", "eta 7 min 30 s", "score 12.3"]


def test_of_many_exits_the_first_the_middle_and_the_last_are_shown(clock, paper):
    facts = {f"{curve}/exit{exit}": float(exit) for curve in ("loss", "agree") for exit in range(27)}
    with meter(paper) as tell:
        tell(1, 1, facts)
    told = re.split(r"  +| *\n", paper.getvalue().strip())[5:]
    assert told == [f"{curve}/exit{exit} {exit}" for curve in ("loss", "agree") for exit in (0, 13, 26)]


def test_a_resumed_stage_counts_its_own_speed_only(clock, paper):
    with meter(paper) as tell:
        tell(9000, 10_000, {})
        clock.now += 100
        tell(9100, 10_000, {})
    assert "1 steps/s" in paper.getvalue()
    assert "eta 15 min 00 s" in paper.getvalue()


def test_the_time_before_the_first_word_is_no_part_of_the_speed(clock, paper):
    with meter(paper) as tell:
        clock.now += 1000
        tell(10, 100, {})
        clock.now += 40
        tell(50, 100, {})
    assert "eta 0 min 50 s" in paper.getvalue().splitlines()[-1]


def test_a_second_pass_over_something_has_a_speed_of_its_own(clock, paper):
    with meter(paper, unit="rows") as tell:
        tell(0, 512, {})
        for total in (512, 152):
            clock.now += 4
            tell(total, total, {})
    assert [re.split(r"  +", line)[3] for line in paper.getvalue().splitlines()] == ["128 rows/s", "38 rows/s"]


def test_slow_speeds_have_digits_and_long_times_have_hours(clock, paper):
    with meter(paper, unit="games") as tell:
        tell(0, 100, {})
        clock.now += 400
        tell(4, 100, {})
    assert "0.01 games/s" in paper.getvalue()
    assert "eta 2 h 40 min" in paper.getvalue()


def test_the_end_is_always_told(clock, paper):
    with meter(paper) as tell:
        tell(5, 5, {})
    assert "100%  5/5" in paper.getvalue()


def test_nothing_to_do_is_no_division_by_zero(clock, paper):
    with meter(paper) as tell:
        tell(0, 0, {})
    assert "0/0" in paper.getvalue()


def test_a_terminal_gets_a_bar_and_it_is_put_away_after_an_error(paper):
    made = meter(paper, terminal=True)
    with pytest.raises(KeyError), made as tell:
        tell(1, 4, {"score": 3.0})
        tell(2, 4, {"score": 4.0})
        raise KeyError
    assert "2/4" in paper.getvalue()
    assert "score 4" in paper.getvalue()
    assert made.bar is not None
    assert made.bar.finished or not made.bar.live.is_started

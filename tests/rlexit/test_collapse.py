"""Collapse is told once, when it has lasted, with the way out."""

from __future__ import annotations

import pytest

from rlexit.collapse import CollapseWatch


@pytest.mark.parametrize(("share", "word"), [(0.0, "shut"), (1.0, "open")])
def test_gates_that_are_all_alike_for_long_are_told_once(share, word):
    watch = CollapseWatch(3, ("way out of shut", "way out of open"))
    told = [watch.observe({"a": share, "b": share}) for _ in range(6)]
    assert [message is not None for message in told] == [False, False, True, False, False, False]
    assert f"all 2 gates were {word} for 3 updates" in str(told[2])
    assert f"way out of {word}" in str(told[2])
    assert not watch.healthy


def test_one_gate_that_decides_is_no_collapse_and_starts_the_count_anew():
    watch = CollapseWatch(2)
    assert [watch.observe({"a": 0.0, "b": share}) for share in (0.0, 0.3, 0.0, 1.0, 0.0)] == [None] * 5
    assert not watch.healthy
    assert watch.observe({"a": 0.0, "b": 0.0}) is not None
    watch.observe({"a": 0.5, "b": 0.0})
    assert watch.healthy


def test_no_gates_never_collapse():
    watch = CollapseWatch(1)
    assert watch.observe({}) is None
    assert watch.healthy

"""Parts are found by name; a wrong name is answered with the nearest one."""

from __future__ import annotations

import pytest

from rlexit.registry import Registry, unknown


@pytest.fixture
def colours():
    registry: Registry[int] = Registry("colour")
    registry.register("red")(1)
    registry.register("green")(2)
    return registry


def test_a_part_is_found_by_its_name(colours):
    assert colours["red"] == 1
    assert "green" in colours
    assert "blue" not in colours


def test_names_come_in_alphabetical_order(colours):
    assert list(colours) == ["green", "red"]


def test_the_decorator_gives_the_part_back():
    registry: Registry[object] = Registry("thing")

    @registry.register("one")
    def part() -> None:
        pass

    assert registry["one"] is part


def test_a_wrong_name_is_answered_with_the_nearest(colours):
    with pytest.raises(LookupError, match=r"`colour` must be a known name, got 'gren'. Did you mean 'green'\?"):
        colours["gren"]


def test_a_name_like_no_other_is_answered_with_all(colours):
    with pytest.raises(LookupError, match=r"got 'xyz'. Known: green, red."):
        colours["xyz"]


def test_an_empty_registry_says_that_there_is_none():
    assert str(unknown("colour", "red", [])) == "`colour` must be a known name, got 'red'. Known: none."


def test_a_name_is_registered_once(colours):
    with pytest.raises(ValueError, match="`colour` 'red' must be registered once"):
        colours.register("red")(3)
    assert colours["red"] == 1

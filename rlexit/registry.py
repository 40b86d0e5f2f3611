"""Registries: parts found by name, and a name that is not there answered with the nearest one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


def unknown(what: str, name: str, known: Iterable[str]) -> LookupError:
    """The error for a name that is not there: names the nearest valid one, or lists them all."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(names) or 'none'}."
    return LookupError(f"`{what}` must be a known name, got {name!r}. {hint}")


class Registry(Generic[T]):
    """Names to parts. A part registers itself where it is defined.

    Args:
        what: what the parts are, as an error message calls them.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._parts: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds a part under a name; raises ValueError if the name is taken."""

        def add(part: T) -> T:
            if name in self._parts:
                raise ValueError(f"`{self.what}` {name!r} must be registered once, got a second one. Rename it.")
            self._parts[name] = part
            return part

        return add

    def __getitem__(self, name: str) -> T:
        """The part of that name; raises LookupError that names the nearest one."""
        if name not in self._parts:
            raise unknown(self.what, name, self._parts)
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._parts))

    def __contains__(self, name: object) -> bool:
        return name in self._parts

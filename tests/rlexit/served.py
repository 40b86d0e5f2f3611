"""What an export's graphs really do: how often each is called."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rlexit import chains


def counted(monkeypatch: Any) -> Counter[bytes]:
    """From here on, how often a graph was run, by its bytes."""
    calls: Counter[bytes] = Counter()
    original = chains.runner

    class Counting:
        def __init__(self, name: str, data: bytes, *ports: Any) -> None:
            self.data, self.inner = data, original(name, data, *ports)

        def bind(self, *arguments: Any, **settings: Any) -> Any:
            call = self.inner.bind(*arguments, **settings)

            def run() -> object:
                calls[self.data] += 1
                return call()

            return run

    monkeypatch.setattr(chains, "runner", Counting)
    return calls

"""Collapse: gates that are all shut, or all open, decide nothing any more and seldom come back by themselves."""

from __future__ import annotations

from collections.abc import Mapping

SHUT, OPEN = 0.005, 0.995
ADVICE = ("Lower the price, or raise the target.", "Raise the price, or start gates less open.")


class CollapseWatch:
    """Counts updates in a row in which every gate was shut for all rows, or open for all.

    Args:
        after: so many of them are a collapse.
        advice: what to do about all shut, and about all open.
    """

    def __init__(self, after: int, advice: tuple[str, str] = ADVICE) -> None:
        self.after = after
        self.advice = advice
        self.shut = self.open = 0

    @property
    def healthy(self) -> bool:
        """Whether this is a state to go back to: not all shut, and not all open for so long that it is a collapse."""
        return not self.shut and (not self.after or self.open < self.after)

    def observe(self, shares: Mapping[str, float], may_be_open: bool = False) -> str | None:
        """Takes in one update.

        Args:
            shares: gate to share of rows for which it was open, in [0, 1].
            may_be_open: all open is as it should be at this time, because nothing presses on compute yet.
        Returns:
            A warning with the way out in the update that makes it a collapse, else None.
        """
        values = shares.values()
        self.shut = self.shut + 1 if values and max(values) <= SHUT else 0
        self.open = self.open + 1 if values and not may_be_open and min(values) >= OPEN else 0
        for count, word, advice in zip((self.shut, self.open), ("shut", "open"), self.advice, strict=True):
            if count == self.after:
                return f"all {len(shares)} gates were {word} for {count} updates: they have collapsed. {advice}"
        return None

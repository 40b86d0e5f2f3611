"""Words that a report explains."""

from __future__ import annotations

from rlexit.config import METHODS
from rlexit.glossary import METHOD_WORDS, glossary
from rlexit.summary import REFERENCES


def test_every_method_and_reference_has_words() -> None:
    assert {*METHODS, *REFERENCES, "pbee"} == set(METHOD_WORDS)


def test_only_what_is_used_is_explained_and_a_run_behind_a_name_does_not_matter() -> None:
    table = glossary(["teacher", "ztw (pong)", "ztw (other)", "mine"], ["full", "confidence@0.9"])
    names = [line[0] for line in table.rows]
    assert names[:2] == ["teacher", "ztw"]
    assert "confidence@T" in names
    assert "patience@T" not in names
    assert "relative MACs" in names
    assert "mine" not in names

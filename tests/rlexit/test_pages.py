from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from rlexit.pages import Block, Bullets, Code, Heading, Paragraph, Table, to_html, to_markdown


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text outside of styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.shown: list[str] = []
        self.style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attributes}))
        self.style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self.style = False

    def handle_data(self, data: str) -> None:
        if not self.style:
            self.shown.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.shown).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


MARKUP = st.text(st.sampled_from("<>b/&;\"' =!-"), max_size=12)


def blocks_of(first: str, second: str) -> list[Block]:
    return [
        Heading(first),
        Paragraph(second, "note"),
        Bullets([(f"b{first}", "good", second)]),
        Table([first, second], [[second, first]], folded=f"t{first}"),
        Code(second, folded=f"c{first}"),
    ]


@settings(max_examples=50)
@given(MARKUP, st.text() | MARKUP)
def test_no_text_becomes_markup(first: str, second: str) -> None:
    seen, expected = Page(to_html(blocks_of(first, second), first)), Page(to_html(blocks_of("x", "x"), "x"))
    assert seen.tags == expected.tags


@settings(max_examples=50)
@given(st.text(st.sampled_from("ab<>&|[](!:`*_~$\\#-+1. \n"), max_size=12))
def test_a_markdown_cell_has_no_bar_no_tag_and_no_link(text: str) -> None:
    line = to_markdown([Table([text, "n"], [])], Path()).splitlines()[0]
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3
    assert "<" not in line
    assert not re.search(r"(?<!\\)(?:\\\\)*\]\(", line)


def test_code_cannot_end_its_own_fence() -> None:
    assert to_markdown([Code("a\n````\nb")], Path()).splitlines()[0] == "`````"

"""A page as a list of blocks, rendered as Markdown and as one self-contained HTML file.

Every text is data: it is escaped in both renderings, and the HTML page forbids itself, by its content security policy,
to run scripts or to load anything.
"""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

MAX_INLINE_SVG = 400_000
_MIME = {".svg": "image/svg+xml", ".png": "image/png", ".webp": "image/webp", ".gif": "image/gif"}


@dataclass(frozen=True)
class Heading:
    """A title of level 1 (the page), 2 (listed in the page's contents) or 3."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Running text; `kind` is "text", "lead" (larger), "caption" (small) or "note" (a limit that must be seen)."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Bullets:
    """A list; each item is (badge, kind, text), kind "good", "bad" or "open"; an empty badge is left out."""

    items: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Table:
    """A table; the first `names` columns are aligned left, the rest, numbers, right. A `folded` one starts closed."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 2
    folded: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture file with what it shows; for an `.svg`, a `.png` of the same name stands in where it is large."""

    path: Path
    alt: str
    caption: str


@dataclass(frozen=True)
class Code:
    """Text that is shown as it is; a `folded` one starts closed."""

    text: str
    folded: str = ""


Block = Heading | Paragraph | Bullets | Table | Picture | Code


def to_markdown(blocks: Sequence[Block], folder: Path) -> str:
    """The blocks as GitHub-flavoured Markdown; pictures are linked relative to `folder`."""
    return "\n\n".join(_markdown(block, folder) for block in blocks) + "\n"


def to_html(blocks: Sequence[Block], title: str) -> str:
    """The blocks as one HTML page without any external resource; pictures are embedded."""
    body: list[str] = []
    contents: list[str] = []
    for block in blocks:
        if isinstance(block, Heading) and block.level == 2:
            contents.append(f'<a href="#part{len(contents)}">{html.escape(block.text)}</a>')
            body.append(f'<h2 id="part{len(contents) - 1}">{html.escape(block.text)}</h2>')
        else:
            body.append(_html(block))
    if len(contents) > 2:
        first = next((index + 1 for index, block in enumerate(blocks) if isinstance(block, Heading)), 0)
        body.insert(first, f'<nav aria-label="Contents">{"".join(contents)}</nav>')
    return _PAGE.format(title=html.escape(title), css=_CSS, body="\n".join(body))


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_escape(text)}"
        case Paragraph(text, kind):
            return f"> {_escape_start(text)}" if kind == "note" else _escape_start(text)
        case Bullets(items):
            return "\n".join(
                f"- **{_escape(badge)}**: {_escape(text)}" if badge else f"- {_escape_start(text)}"
                for badge, _, text in items
            )
        case Table(header, rows, names, folded):
            rule = ["---" if column < names else "---:" for column in range(len(header))]
            lines = [[_escape(cell) for cell in header], rule, *([_escape(cell) for cell in row] for row in rows)]
            table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
            return f"**{_escape(folded)}**\n\n{table}" if folded else table
        case Picture(path, alt, caption):
            link = quote(os.path.relpath(path.with_suffix(".png") if path.suffix == ".svg" else path, folder))
            return f"![{_escape(alt)}]({link})\n\n*{_escape(caption)}*"
        case Code(text, _):
            fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
            return f"{fence}\n{text}\n{fence}"


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text, kind):
            return f'<p class="{kind}">{html.escape(text)}</p>'
        case Bullets(items):
            told = (
                (f'<b class="badge {kind}">{html.escape(badge)}</b> ' if badge else "") + html.escape(text)
                for badge, kind, text in items
            )
            return "<ul>" + "".join(f"<li>{item}</li>" for item in told) + "</ul>"
        case Table(header, rows, names, folded):
            sides = ["name" if column < names else "number" for column in range(len(header))]
            top = "".join(
                f'<th scope="col" class="{side}">{html.escape(cell)}</th>'
                for side, cell in zip(sides, header, strict=True)
            )
            lines = "".join(
                "<tr>"
                + "".join(f'<td class="{side}">{html.escape(cell)}</td>' for side, cell in zip(sides, row, strict=True))
                + "</tr>"
                for row in rows
            )
            return _fold(
                f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>', folded
            )
        case Picture(path, alt, caption):
            return (
                f'<figure><img src="{_data_uri(path)}" alt="{html.escape(alt)}">'
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )
        case Code(text, folded):
            return _fold(f"<pre><code>{html.escape(text)}</code></pre>", folded)


def _fold(inner: str, summary: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{inner}</details>" if summary else inner


def _data_uri(path: Path) -> str:
    if path.suffix == ".svg" and path.stat().st_size > MAX_INLINE_SVG:
        path = path.with_suffix(".png")
    return f"data:{_MIME[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, also in a table cell: no markup, no link, no HTML, no formula."""
    text = re.sub(r"[\\`*|~$]|](?=[(\[:])", r"\\\g<0>", " ".join(text.split()))
    text = re.sub(r"(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])", r"\_", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _escape_start(text: str) -> str:
    """The same at the start of a block, where a list, a heading or a rule could begin."""
    return re.sub(r"^(?:(?=[-+#=])|(\d+)(?=[.)]))", r"\1\\", _escape(text))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_CSS = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #dfe3e8; --paper: #ffffff; --tint: #f5f7f9; --accent: #0072b2;
  --good: #00664a; --good-bg: #dff3ec; --bad: #9a4300; --bad-bg: #fbe9dc; --open: #4a5462; --open-bg: #e9edf1; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa6b5; --line: #333c48; --paper: #151a21;
  --tint: #1d242d; --accent: #6cbcec; --good: #7fe0bd; --good-bg: #123a2e; --bad: #ffb583; --bad-bg: #46260f;
  --open: #c3ccd8; --open-bg: #2b343f; } figure img { filter: brightness(.92); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .4em; letter-spacing: -.01em; }
h2 { font-size: 1.4rem; margin: 2.4em 0 .6em; padding-top: .8em; border-top: 1px solid var(--line); }
h3 { font-size: 1.08rem; margin: 1.9em 0 .5em; }
h1, h2, h3, p, li, figcaption { overflow-wrap: anywhere; } td { overflow-wrap: break-word; max-width: 24em; }
p { margin: .6em 0; max-width: 78ch; }
.lead { font-size: 1.08rem; color: var(--soft); }
.note { border-left: 3px solid var(--accent); background: var(--tint); padding: .45em .9em; font-size: .93rem;
  border-radius: 0 6px 6px 0; }
.caption { color: var(--soft); font-size: .86rem; max-width: none; }
nav { display: flex; flex-wrap: wrap; gap: .3em 1.1em; margin: 1em 0 0; font-size: .95rem; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
ul { padding-left: 1.1em; } li { margin: .45em 0; }
.badge { display: inline-block; padding: .05em .6em; border-radius: 1em; font-size: .82rem; font-weight: 600; }
.good { color: var(--good); background: var(--good-bg); } .bad { color: var(--bad); background: var(--bad-bg); }
.open { color: var(--open); background: var(--open-bg); }
.wide { overflow-x: auto; margin: 1em 0; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
th { font-weight: 600; color: var(--soft); border-bottom: 1.5px solid var(--line); vertical-align: bottom; }
th, td { padding: .42em .5em; } td { border-bottom: 1px solid var(--line); }
tbody tr:hover { background: var(--tint); }
.name { text-align: left; } .number { text-align: right; } td.number { white-space: nowrap; }
td:first-child, th:first-child { padding-left: 0; }
figure { margin: 1.4em 0 1.8em; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #fff;
  border: 1px solid var(--line); border-radius: 8px; }
figure img[src^="data:image/svg"] { width: 100%; padding: 8px; }
figcaption { color: var(--soft); font-size: .86rem; margin-top: .55em; }
details { margin: 1em 0; } summary { cursor: pointer; color: var(--accent); font-size: .95rem; }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 8px; padding: .8em 1em; font-size: .84rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media print { details > * { display: block; } main { max-width: none; padding: 0; } h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; } }
"""

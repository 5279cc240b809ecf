"""HTML pages that need nothing but themselves: no script, no font, no address outside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from runtime.files import atomic_write_text

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 82rem; padding: 1rem; background: #fff; color: #222;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: .2rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
body { overflow-wrap: anywhere; } table { overflow-wrap: normal; }
p, li { max-width: 48rem; } .small { color: #595959; font-size: .875rem; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th { border-bottom: 2px solid #767676; vertical-align: bottom; font-weight: 600; }
thead th { white-space: normal; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
td.text, th.text { text-align: left; } td.wrap { white-space: normal; min-width: 14rem;
  overflow-wrap: anywhere; text-align: left; }
.alarm { border-left: .4rem solid #b3261e; background: #fdecea; padding: .6rem 1rem; }
.alarm, td.alarm-cell { color: #8c1d18; } 
td.alarm-cell { background: #fdecea; font-weight: 600; text-align: left; }
.note { border-left: .4rem solid #767676; background: #f4f4f4; padding: .6rem 1rem; }
.alarm, .note { margin: 1rem 0; } .alarm p, .note p, .alarm ul, .note ul { margin: .2rem 0; }
.pictures { display: grid; gap: 1rem; 
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
figure { margin: 0; max-width: 38rem; } figure img { width: 100%; height: auto; display: block; }
figcaption { color: #595959; font-size: .875rem; }
pre { background: #f4f4f4; padding: .6rem 1rem; overflow-x: auto; font-size: .875rem; }
summary { cursor: pointer; font-weight: 600; margin: .5rem 0; }
@media (max-width: 40rem) {
  td:first-child, th:first-child { white-space: normal; max-width: 9rem; } }
"""


class Cell(str):
    """A cell's text with the class it is drawn in: alarm-cell, text, wrap."""

    kind: str

    def __new__(cls, text: str, kind: str) -> Cell:
        cell = super().__new__(cls, text)
        cell.kind = kind
        return cell


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls sideways on a narrow screen; the first column stays."""
    head = "".join(f"<th>{escape(text)}</th>" for text in headers)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    kind = f' class="{text.kind}"' if isinstance(text, Cell) else ""
    return f"<td{kind}>{escape(text)}</td>"


def box(kind: str, title: str, lines: Iterable[str]) -> str:
    """A coloured box: `kind` is alarm or note."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<div class="{kind}"><p><strong>{escape(title)}</strong></p><ul>{items}</ul></div>'


def pictures(shown: Iterable[tuple[str, str]]) -> str:
    """(data address, caption) of each picture: beside each other, or below on a phone."""
    inside = "".join(
        f'<figure><img src="{address}" alt="{escape(caption, quote=True)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
        for address, caption in shown
    )
    return f'<div class="pictures">{inside}</div>'


def details(title: str, content: str) -> str:
    """Something to unfold; it needs no script."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def code(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def write_page(path: Path, title: str, parts: Iterable[str]) -> None:
    """Write the page, in one step."""
    body = "\n".join(part for part in parts if part)
    text = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )
    atomic_write_text(path, text, durable=False)

"""Pages of documentation of which a script writes the part between two marks, and their tables."""

from __future__ import annotations

from collections.abc import Sequence

END = "<!-- end -->"


def begin(script: str) -> str:
    """The line above what ``python -m scripts.<script>`` writes; END is the one below."""
    return f"<!-- generated: python -m scripts.{script} -->"


def around(page: str, script: str) -> tuple[str, str]:
    """What stands before and after the script's part, marks and blank lines included. ValueError
    for a page without the marks."""
    before, begins, rest = page.partition(begin(script))
    _, ends, after = rest.partition(END)
    if not begins or not ends:
        raise ValueError(f"expected the lines {begin(script)} and {END} around what is generated")
    return f"{before}{begins}\n\n", f"\n\n{ends}{after}"


def renewed(page: str, script: str, text: str) -> str:
    """The page with ``text`` as the script's part."""
    before, after = around(page, script)
    return f"{before}{text}{after}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, of which the first row is the head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

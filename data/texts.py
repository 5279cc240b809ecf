"""What a source of text is: pieces that can be read independently of each other, so that the work
can be shared and continued. How it is cut into pieces depends on the source alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


class TextError(ValueError):
    """The source itself is unusable; only another source would do."""


@dataclass(frozen=True)
class Document:
    """A text and the name to report it by.

    `split` is "train" or "val" where the source itself decides, None where the hash does.  A
    document too long for memory comes in several parts, of which only the last `ends` it;
    `digest` is then the SHA-256 of the text up to the end of the part.
    """

    name: str
    text: str
    split: str | None = None
    ends: bool = True
    digest: bytes | None = None


@dataclass(frozen=True)
class Piece:
    """A stretch of a source, which can be read anew at any time, the same each time."""

    name: str
    documents: Callable[[], Iterator[Document]]


@dataclass(frozen=True)
class Texts:
    """An opened source.

    `text_bytes` is an estimate, for the disk and the progress bar.  `found` is what stood behind
    the names in the settings (the commit behind a branch), from which opening it again reads the
    same.
    """

    pieces: list[Piece]
    text_bytes: int
    found: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A source by its `settings`, JSON, which are all that decides the documents and are known
    without network; `open` takes what an earlier opening has found, or an empty dictionary."""

    settings: dict[str, Any]
    open: Callable[[dict[str, Any]], Texts]

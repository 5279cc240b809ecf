"""Where text comes from: each source turns its settings into a stream of documents.

`stdlib` is the Python standard library of the interpreter that runs this: ten megabytes of real
source code that every machine already has, enough for a first curve without any download.
`text` is the user's own files.

Which documents are kept for validation is decided by the hash of their text: the choice depends
neither on order nor on what else there is, and copies of one document never land on both sides.
A plain text file has no documents to choose from; there the last part is held out, as nanoGPT
does, so that a single file is enough.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import lzma
import os
import platform
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

from data import DataConfig

PART_BYTES = 1 << 20  # a plain text file is read in parts of about this size


@dataclass(frozen=True)
class Document:
    """A text and the name to report it by.

    `split` is "train" or "val" where the source itself decides, None where the hash does.  A
    document too long for memory comes in several parts, of which only the last `ends` it.
    """

    name: str
    text: str
    split: str | None = None
    ends: bool = True


@dataclass(frozen=True)
class Source:
    """A stream of documents that can be started anew.

    `settings`, JSON, is all that decides the documents; where it is unchanged, so are they.
    `text_bytes` is about what the documents hold, None where only reading them would tell.
    """

    settings: dict[str, Any]
    text_bytes: int | None
    documents: Callable[[], Iterator[Document]]


def open_source(config: DataConfig) -> Source:
    """The source that `data.source` names.

    Raises ValueError for an unknown name or unusable files, FileNotFoundError for missing ones.
    """
    if config.source not in SOURCES:
        near = get_close_matches(config.source, SOURCES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"data.source={config.source}: expected one of {', '.join(SOURCES)}; "
            f"did you mean {near}?"
        )
    return SOURCES[config.source](config)


# --- the standard library ---------------------------------------------------------------------

# Installed packages differ from machine to machine; tests hold files broken on purpose.
SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"
}  # fmt: skip


def _stdlib(config: DataConfig) -> Source:
    """The .py files of the running interpreter's standard library, sorted by path."""
    if config.files:
        raise ValueError(
            f"data.files={config.files} is not read by data.source=stdlib: use data=text"
        )
    root = Path(sysconfig.get_paths()["stdlib"])
    sizes: dict[str, int] = {}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        for path in (Path(folder, name) for name in files if name.endswith(".py")):
            sizes[path.relative_to(root).as_posix()] = path.stat().st_size
    if not sizes:
        raise FileNotFoundError(f"data.source=stdlib: no .py files under {root}; use data=text")
    listing = sorted(sizes.items())

    def documents() -> Iterator[Document]:
        for name, _ in listing:
            try:
                yield Document(name, (root / name).read_bytes().decode("utf-8"))
            except UnicodeDecodeError:
                continue  # a few files are in other encodings, to exercise the parser

    return Source(
        settings={
            "python": platform.python_version(),
            "files_sha256": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
        },
        text_bytes=sum(sizes.values()),
        documents=documents,
    )


# --- the user's files -------------------------------------------------------------------------

OPENERS: dict[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".xz": lzma.open}


def _text(config: DataConfig) -> Source:
    """Files, folders and glob patterns, in the order given; what one pattern finds is sorted."""
    if not config.files:
        raise ValueError("data.files is empty: name some, e.g. data.files=[book.txt,web.jsonl.xz]")
    # A file that two entries name is read once.
    paths = list(dict.fromkeys(path for entry in config.files for path in _expand(entry)))
    stats = {path: path.stat() for path in paths}
    for path, stat in stats.items():
        if stat.st_size == 0:
            raise ValueError(f"{path} is empty")
    compressed = any(_compression(path) for path in paths)

    def documents() -> Iterator[Document]:
        for path in paths:
            with _readable(path) as stream:
                yield from READERS[_kind(path)](path, stream, config)

    return Source(
        settings={
            "files": [
                {"path": str(path), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
                for path, stat in stats.items()
            ],
            "text_field": config.text_field,
        },
        text_bytes=None if compressed else sum(stat.st_size for stat in stats.values()),
        documents=documents,
    )


def _compression(path: Path) -> str:
    return path.suffix if path.suffix in OPENERS else ""


def _kind(path: Path) -> str:
    """`.jsonl` of `web.jsonl.xz`."""
    return Path(path.name.removesuffix(_compression(path))).suffix


def _expand(entry: str) -> list[Path]:
    """The files that one entry of `data.files` means, as absolute paths."""
    path = Path(entry).expanduser()
    found = [str(path)] if path.exists() else glob.glob(str(path), recursive=True)
    matches = [Path(match) for match in sorted(found)]
    if not matches:
        raise FileNotFoundError(f"data.files: {entry} not found (in {Path.cwd()})")
    files: list[Path] = []
    for match in matches:
        if match.is_dir():
            files += sorted(p for p in match.rglob("*") if p.is_file() and _kind(p) in READERS)
        elif _kind(match) in READERS:
            files.append(match)
        else:
            endings = ", ".join(READERS)
            raise ValueError(
                f"data.files: {match} is none of {endings} (each also with .gz or .xz)"
            )
    if not files:
        raise FileNotFoundError(f"data.files: no {', '.join(READERS)} files in {entry}")
    return [file.resolve() for file in files]


@contextmanager
def _readable(path: Path) -> Iterator[BinaryIO]:
    """The uncompressed bytes of a file; ValueError where they are not what its name says."""
    try:
        with OPENERS[_compression(path)](path, "rb") as stream:
            yield stream
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is not a whole {path.suffix} file ({error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}): convert it first") from error


def _read_jsonl(path: Path, stream: BinaryIO, config: DataConfig) -> Iterator[Document]:
    """One document per line, the string at the key `data.text_field`."""
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        name = f"{path.name}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON ({error})") from error
        text = row.get(config.text_field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
            raise ValueError(
                f"{path} line {number} has no text at data.text_field={config.text_field}; "
                f"it holds {keys}"
            )
        # JSON can spell half a surrogate pair, which is no character and has no UTF-8.
        yield Document(name, text.encode("utf-8", "replace").decode("utf-8"))


def _read_plain(path: Path, stream: BinaryIO, config: DataConfig) -> Iterator[Document]:
    """The file as two documents: the head for training, the last `val_fraction` for validation."""
    size = stream.seek(0, os.SEEK_END)
    border = int(size * (1 - config.val_fraction))
    stream.seek(border)
    border += _cut(stream.read(PART_BYTES), after=0)
    yield from _parts(path, stream, 0, border, "train")
    yield from _parts(path, stream, border, size, "val")


def _parts(path: Path, stream: BinaryIO, start: int, stop: int, split: str) -> Iterator[Document]:
    """Bytes [start, stop) of a file as the parts of one document.

    A part ends at a seam in its second half, so that it is tokenized as it would be in the whole.
    """
    stream.seek(start)
    rest = b""
    while start < stop:
        block = stream.read(min(PART_BYTES, stop - start))
        if not block:
            raise ValueError(f"{path} became shorter while it was read")
        start += len(block)
        rest += block
        half = len(rest) // 2
        seam = SEAM.search(rest, half)
        end = len(rest) if start == stop else seam.start() if seam else _cut(rest, after=half)
        yield Document(path.name, rest[:end].decode("utf-8"), split, ends=start == stop)
        rest = rest[end:]


# GPT-2's pattern always ends a piece between a lone line break and a visible character, so the
# tokens are the same whether or not the text is cut there.
SEAM = re.compile(rb"(?<=[^\s]\n)(?=[^\s])")


def _cut(block: bytes, after: int) -> int:
    """Where to cut a block, no earlier than `after`: at a line break, else between characters."""
    newline = block.find(b"\n", after) + 1
    if 0 < newline < len(block):
        return newline
    while after < len(block) and block[after] & 0b1100_0000 == 0b1000_0000:
        after += 1
    return after


READERS: dict[str, Callable[[Path, BinaryIO, DataConfig], Iterator[Document]]] = {
    ".txt": _read_plain,
    ".md": _read_plain,
    ".jsonl": _read_jsonl,
}

SOURCES: dict[str, Callable[[DataConfig], Source]] = {"stdlib": _stdlib, "text": _text}

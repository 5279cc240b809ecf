"""The user's own files: .txt, .md, .jsonl and .parquet, also compressed.

A plain text file is one document, whose last part is held out for validation as nanoGPT does, so
that a single file is enough; .jsonl and .parquet have one document per line or row.

Every way in which a file can be broken ends in a TextError with its name and, where there is one,
the line.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from data import DataConfig
from data.compression import COMPRESSIONS, broken_file, compression, decompressed, readable
from data.texts import Document, Piece, Source, TextError, Texts

PART_BYTES = 1 << 20  # a plain text file is read in parts of about this size
PIECE_BYTES = 1 << 27  # files are joined, or cut where they can be, to pieces of about this size
ROWS = 64  # of a table, in memory at a time
SAMPLED = 8  # files that are looked into for an estimate


@dataclass(frozen=True)
class Stretch:
    """Bytes [start, stop) of a .jsonl, row groups of a .parquet, or a whole file."""

    path: Path
    start: int = 0
    stop: int | None = None


def open_text(config: DataConfig) -> Source:
    """Files, folders and glob patterns, in the order given; what one pattern finds is sorted."""
    if not config.files:
        raise ValueError("data.files is empty: name some, e.g. data.files=[book.txt,web.jsonl.xz]")
    paths = expand(config.files, tuple(READERS), COMPRESSIONS)
    settings = {"files": file_states(paths), "text_field": config.text_field}
    return Source(settings, lambda found: _corpus(paths, config))


def file_states(paths: list[Path]) -> list[dict[str, Any]]:
    """What tells a changed file from the one that was read; TextError for an empty one."""
    states = []
    for path in paths:
        stat = path.stat()
        if stat.st_size == 0:
            raise TextError(f"{path} is empty")
        states.append({"path": str(path), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns})
    return states


def _corpus(paths: list[Path], config: DataConfig) -> Texts:
    """The files as pieces; small ones are joined."""
    pieces: list[Piece] = []
    waiting: list[Stretch] = []
    size = total = 0
    ratios = {ending: _expansion(paths, ending) for ending in {compression(p) for p in paths}}
    for path in paths:
        for stretch, stored in CUTTERS.get(kind(path), _whole)(path):
            text_bytes = int(stored * ratios[compression(path)])
            waiting.append(stretch)
            size, total = size + text_bytes, total + text_bytes
            if size >= PIECE_BYTES:
                pieces.append(_piece(waiting, config))
                waiting, size = [], 0
    if waiting:
        pieces.append(_piece(waiting, config))
    return Texts(pieces, total)


def _piece(stretches: list[Stretch], config: DataConfig) -> Piece:
    first, last = stretches[0], stretches[-1]
    name = f"{first.path}:{first.start} to {last.path}:{last.stop}"
    return Piece(name, partial(_documents, tuple(stretches), config))


def _documents(stretches: tuple[Stretch, ...], config: DataConfig) -> Iterator[Document]:
    for stretch in stretches:
        with broken_file(stretch.path):
            yield from READERS[kind(stretch.path)](stretch, config)


# --- finding files ----------------------------------------------------------------------------


def expand(entries: list[str], kinds: tuple[str, ...], compressions: tuple[str, ...]) -> list[Path]:
    """The files that the entries of `data.files` mean, as absolute paths, each once."""
    return list(dict.fromkeys(p for entry in entries for p in _expand(entry, kinds, compressions)))


def _expand(entry: str, kinds: tuple[str, ...], compressions: tuple[str, ...]) -> list[Path]:
    path = Path(entry).expanduser()
    found = [str(path)] if path.exists() else glob.glob(str(path), recursive=True)
    matches = [Path(match) for match in sorted(found)]
    if not matches:
        raise FileNotFoundError(f"data.files: {entry} not found (in {Path.cwd()})")
    files: list[Path] = []
    for match in matches:
        if match.is_dir():
            files += sorted(p for p in match.rglob("*") if p.is_file() and kind(p) in kinds)
        elif kind(match) in kinds:
            files.append(match)
        else:
            raise TextError(
                f"data.files: {match} is none of {', '.join(kinds)} (also with "
                f"{', '.join(compressions)})"
            )
    if not files:
        raise FileNotFoundError(f"data.files: no {', '.join(kinds)} files in {entry}")
    return [file.resolve() for file in files]


def kind(path: Path) -> str:
    """`.jsonl` of `web.jsonl.xz`."""
    return Path(path.name.removesuffix(compression(path))).suffix


def _expansion(paths: list[Path], ending: str) -> float:
    """About how many bytes of text a byte of the files with this ending holds, from the first
    megabyte of text of a few of them."""
    if not ending:
        return 1.0
    text = stored = 0
    for path in [p for p in paths if compression(p) == ending][:SAMPLED]:
        with broken_file(path), open(path, "rb") as file:
            text += len(decompressed(path, file).read(1 << 20))
            stored += file.tell()
    return max(1.0, text / stored)


def _whole(path: Path) -> Iterator[tuple[Stretch, int]]:
    yield Stretch(path), path.stat().st_size


def _cut_lines(path: Path) -> Iterator[tuple[Stretch, int]]:
    """An uncompressed .jsonl in stretches that end at a line break."""
    if compression(path):
        yield from _whole(path)
        return
    size = path.stat().st_size
    start = 0
    with open(path, "rb") as file:
        while start < size:
            file.seek(min(start + PIECE_BYTES, size))
            file.readline()
            yield Stretch(path, start, file.tell()), file.tell() - start
            start = file.tell()


def _cut_row_groups(path: Path) -> Iterator[tuple[Stretch, int]]:
    """A .parquet in runs of row groups."""
    with broken_file(path):
        metadata = parquet_file(path).metadata
    start = size = 0
    for stop in range(1, metadata.num_row_groups + 1):
        size += metadata.row_group(stop - 1).total_byte_size  # uncompressed
        if size >= PIECE_BYTES or stop == metadata.num_row_groups:
            yield Stretch(path, start, stop), size
            start, size = stop, 0


def download(url: str, cache: Path, name: str) -> Path:
    """The file at `url`, kept in `cache`; OSError with advice where it cannot be had."""
    from urllib.request import urlopen

    from data.shards import write_atomically

    path = cache.expanduser() / "downloads" / name
    if not path.is_file():
        try:
            with urlopen(url, timeout=60) as answer:
                content = answer.read()
        except OSError as error:
            raise OSError(
                f"cannot download {url} ({error}): without network, copy the file here and set "
                f"'data.files=[{name}]'"
            ) from error
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    return path


# --- opening them -----------------------------------------------------------------------------


def parquet_file(path: Path) -> Any:
    """A pyarrow ParquetFile; TextError where it is none."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise TextError(f"{path}: reading .parquet needs a package: pip install pyarrow") from error
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise TextError(f"{path} is not a whole .parquet file ({one_line(error)})") from error


def one_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


# --- reading them -----------------------------------------------------------------------------


def _read_jsonl(stretch: Stretch, config: DataConfig) -> Iterator[Document]:
    """One document per line, the string at the key `data.text_field`."""
    path = stretch.path
    with readable(path) as stream:
        if stretch.start:
            stream.seek(stretch.start)
        position = stretch.start
        for number, line in enumerate(stream, start=1):
            if position == stretch.stop:
                return
            position += len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                where = _line(stretch, number)
                raise TextError(f"{path} line {where} is not UTF-8 ({error.reason})") from error
            except ValueError as error:
                where = _line(stretch, number)
                raise TextError(f"{path} line {where} is not JSON ({error})") from error
            text = row.get(config.text_field) if isinstance(row, dict) else None
            if not isinstance(text, str):
                keys = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
                raise TextError(
                    f"{path} line {_line(stretch, number)} has no text at data.text_field="
                    f"{config.text_field}; it holds {keys}"
                )
            yield Document(path.name, text)


def _line(stretch: Stretch, number: int) -> int:
    """The line's number in the file; those before the stretch are counted only for an error."""
    before, left = 0, stretch.start
    with open(stretch.path, "rb") as file:
        while left:
            block = file.read(min(left, 1 << 20))
            before, left = before + block.count(b"\n"), left - len(block)
    return before + number


def _read_parquet(stretch: Stretch, config: DataConfig) -> Iterator[Document]:
    """One document per row, the string in the column `data.text_field`."""
    import pyarrow as pa

    path = stretch.path
    table = parquet_file(path)
    columns = table.schema_arrow.names
    if config.text_field not in columns:
        raise TextError(
            f"{path} has no column data.text_field={config.text_field}; it holds "
            f"{', '.join(columns)}"
        )
    stop = table.num_row_groups if stretch.stop is None else stretch.stop
    row = sum(table.metadata.row_group(i).num_rows for i in range(stretch.start))
    groups = list(range(stretch.start, stop))
    try:
        for batch in table.iter_batches(ROWS, row_groups=groups, columns=[config.text_field]):
            for text in batch.column(0).to_pylist():
                row += 1
                if not isinstance(text, str):
                    raise TextError(
                        f"{path} row {row} has no text at data.text_field={config.text_field}, "
                        f"but {text!r:.60}"
                    )
                yield Document(path.name, text)
    except (pa.ArrowInvalid, OSError) as error:
        raise TextError(f"{path} is not a whole .parquet file ({one_line(error)})") from error


def _read_plain(stretch: Stretch, config: DataConfig) -> Iterator[Document]:
    """The file as two documents: the head for training, the last `val_fraction` for validation."""
    path = stretch.path
    if compression(path):
        with readable(path) as stream:
            size = _forward(stream, None)
    else:
        size = path.stat().st_size
    border = int(size * (1 - config.val_fraction))
    with readable(path) as stream:
        _forward(stream, border)
        border += _cut(stream.read(PART_BYTES), after=0)
    with readable(path) as stream:
        lines = yield from _parts(path, stream, border, "train", lines=0)
        yield from _parts(path, stream, size - border, "val", lines)


def _forward(stream: BinaryIO, n: int | None) -> int:
    """Read over `n` bytes, or to the end, in little memory; how many there were."""
    done = 0
    while block := stream.read(PART_BYTES if n is None else min(PART_BYTES, n - done)):
        done += len(block)
    return done


def _parts(
    path: Path, stream: BinaryIO, size: int, split: str, lines: int
) -> Generator[Document, None, int]:
    """The next `size` bytes of a file as the parts of one document; returns the lines so far.

    A part ends at a seam in its second half, so that it is tokenized as it would be in the whole.
    """
    rest = b""
    digest = hashlib.sha256()
    while size > 0:
        block = stream.read(min(PART_BYTES, size))
        if not block:
            raise TextError(f"{path} became shorter while it was read")
        size -= len(block)
        rest += block
        half = len(rest) // 2
        seam = SEAM.search(rest, half)
        end = len(rest) if size == 0 else seam.start() if seam else _cut(rest, after=half)
        part, rest = rest[:end], rest[end:]
        try:
            text = part.decode("utf-8")
        except UnicodeDecodeError as error:
            line = lines + part.count(b"\n", 0, error.start) + 1
            raise TextError(
                f"{path} line {line} is not UTF-8 text ({error.reason}): convert it first"
            ) from error
        lines += part.count(b"\n")
        digest.update(part)
        yield Document(path.name, text, split, size == 0, digest.digest())
    return lines


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


READERS: dict[str, Callable[[Stretch, DataConfig], Iterator[Document]]] = {
    ".txt": _read_plain,
    ".md": _read_plain,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
CUTTERS: dict[str, Callable[[Path], Iterator[tuple[Stretch, int]]]] = {
    ".jsonl": _cut_lines,
    ".parquet": _cut_row_groups,
}

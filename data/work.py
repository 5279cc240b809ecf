"""From pieces of a source to files of ids, in parallel, so that nothing done is ever done twice.

One thread reads documents and hands them out in batches; the other threads tokenize (tiktoken
works without the interpreter's lock); the results are written in the order of the source.  About
every PART_BYTES of text the ids so far become part files, and the journal of the piece, which names
them, is replaced in one step.  A process that is killed has lost the part it was writing; the next
one reads over the documents that the journal counts and goes on.

What the parts of a piece hold, joined, depends on the piece alone: not on where they were cut, on
the number of threads, or on who wrote which.  data/assemble.py joins them to the final files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.formats import token_dtype
from data.shards import SPLITS, write_atomically
from data.sources import split_of
from data.texts import Document, Piece
from data.tokenizer import Tokenizer

PART_BYTES = 1 << 26  # characters of text between two records of what is done
BATCH_BYTES = 1 << 19  # characters of text that a thread is given at once

# What de-duplication needs of each document, or part of one: the first 16 bytes of its SHA-256, how
# much it contributes, to which split, and whether it ends there.
ENTRY = np.dtype(
    [("digest", "<u8", 2), ("tokens", "<u4"), ("bytes", "<u4"), ("val", "?"), ("ends", "?")]
)

Advance = Callable[[int, int], object]  # told (bytes of text, tokens) as they are done


@dataclass(frozen=True)
class Recipe:
    """What turns documents into ids."""

    tokenizer: Tokenizer
    val_fraction: float
    dedup: bool


@dataclass(frozen=True)
class Part:
    """A finished part: how many of its piece's documents are read up to its end, and what it holds
    of each split."""

    read: int
    tokens: dict[str, int]
    bytes: dict[str, int]
    documents: dict[str, int]
    sha256: dict[str, str]


@dataclass(frozen=True)
class Journal:
    """What is done of a piece."""

    parts: tuple[Part, ...] = ()
    done: bool = False

    @classmethod
    def load(cls, folder: Path, piece: int) -> Journal:
        path = journal_path(folder, piece)
        if not path.is_file():
            return cls()
        fields = json.loads(path.read_bytes())
        return cls(tuple(Part(**part) for part in fields["parts"]), fields["done"])

    def save(self, folder: Path, piece: int) -> None:
        write_atomically(journal_path(folder, piece), json.dumps(asdict(self)).encode())

    @property
    def read(self) -> int:
        return self.parts[-1].read if self.parts else 0


def journal_path(folder: Path, piece: int) -> Path:
    return folder / f"{piece:06d}.json"


def part_path(folder: Path, piece: int, part: int, content: str) -> Path:
    """`content`: the name of a split, or "documents" for the entries of de-duplication."""
    return folder / f"{piece:06d}_{part:05d}_{content}"


def write_pieces(
    folder: Path,
    pieces: Sequence[Piece],
    indices: Sequence[int],
    recipe: Recipe,
    threads: int,
    advance: Advance,
) -> None:
    """Prepare the unfinished ones among the pieces at `indices` into part files in `folder`.

    Memory is that of some 2 * threads batches and of the longest documents in them.
    """
    journals = {index: Journal.load(folder, index) for index in indices}
    todo = [index for index in indices if not journals[index].done]
    with ThreadPoolExecutor(threads, thread_name_prefix="tokenize") as pool:
        try:
            batches = _batches(pieces, todo, journals)
            writer: _PartWriter | None = None
            for batch, encoded in _ahead(pool, recipe, batches, depth=2 * threads + 1):
                if writer is None:
                    writer = _PartWriter(folder, batch.piece, journals, recipe)
                writer.add(encoded)
                advance(sum(encoded.bytes.values()), sum(encoded.tokens.values()))
                if batch.ends_part:
                    writer.close(batch.read, batch.ends_piece)
                    writer = None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


# --- reading ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    piece: int
    documents: list[Document]
    read: int  # documents of the piece up to the end of the batch
    ends_part: bool
    ends_piece: bool


def _batches(
    pieces: Sequence[Piece], todo: Sequence[int], journals: dict[int, Journal]
) -> Iterator[_Batch]:
    for index in todo:
        read = journals[index].read
        batch: list[Document] = []
        size = part_size = 0
        for document in islice(pieces[index].documents(), read, None):
            if size >= BATCH_BYTES:  # one behind, so that the last batch knows that it is the last
                ends_part = part_size >= PART_BYTES
                yield _Batch(index, batch, read, ends_part, False)
                batch, size, part_size = [], 0, 0 if ends_part else part_size
            batch.append(document)
            read, size = read + 1, size + len(document.text)
            part_size += len(document.text)
        yield _Batch(index, batch, read, True, True)


def _ahead(
    pool: ThreadPoolExecutor, recipe: Recipe, batches: Iterator[_Batch], depth: int
) -> Iterator[tuple[_Batch, _Encoded]]:
    """The batches in order, `depth` of them at work at a time."""
    waiting: deque[tuple[_Batch, Future[_Encoded]]] = deque()
    for batch in batches:
        waiting.append((batch, pool.submit(encode, batch.documents, recipe)))
        if len(waiting) > depth:
            batch, future = waiting.popleft()
            yield batch, future.result()
    while waiting:
        batch, future = waiting.popleft()
        yield batch, future.result()


# --- tokenizing -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Encoded:
    """A batch as ids by split, in the type in which they are stored."""

    ids: dict[str, np.ndarray]
    bytes: dict[str, int]
    documents: dict[str, int]
    entries: np.ndarray  # of ENTRY; empty unless duplicates are to be found

    @property
    def tokens(self) -> dict[str, int]:
        return {split: ids.size for split, ids in self.ids.items()}


def encode(documents: Sequence[Document], recipe: Recipe) -> _Encoded:
    """The ids of documents, each with an end of text; a document without text is left out."""
    tokenizer = recipe.tokenizer
    dtype = token_dtype(tokenizer.vocab_size)
    eot = np.array([tokenizer.eot], dtype)
    ids: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    text_bytes, ended = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    entries = []
    for document in documents:
        text = document.text
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError:
            # JSON can spell half a surrogate pair, which is no character and has no UTF-8.
            raw = text.encode("utf-8", "replace")
            text = raw.decode("utf-8")
        if not raw:
            continue
        digest = document.digest or b""
        if not digest and (recipe.dedup or document.split is None):
            digest = hashlib.sha256(raw).digest()
        split = document.split or split_of(digest, recipe.val_fraction)
        text_ids = tokenizer.encode(text)
        ids[split].append(text_ids)
        if document.ends:
            ids[split].append(eot)
        text_bytes[split] += len(raw)
        ended[split] += document.ends
        if recipe.dedup:
            key = np.frombuffer(digest[:16], "<u8")
            tokens = text_ids.size + document.ends
            entries.append((key, tokens, len(raw), split == "val", document.ends))
    return _Encoded(
        {split: _joined(parts, tokenizer, dtype) for split, parts in ids.items()},
        text_bytes,
        ended,
        np.array(entries, ENTRY),
    )


def _joined(parts: list[np.ndarray], tokenizer: Tokenizer, dtype: np.dtype[Any]) -> np.ndarray:
    if not parts:
        return np.empty(0, dtype)
    ids = np.concatenate(parts)
    # Checked before the cast, which would wrap around in silence.
    if int(ids.max()) >= tokenizer.vocab_size:
        raise ValueError(f"{tokenizer.name}: an id lies outside its {tokenizer.vocab_size}")
    return ids.astype(dtype, copy=False)


# --- writing ----------------------------------------------------------------------------------


class _PartWriter:
    """Writes one part: its files under temporary names until the part is complete and on disk."""

    def __init__(
        self, folder: Path, piece: int, journals: dict[int, Journal], recipe: Recipe
    ) -> None:
        self._folder, self._piece, self._journals = folder, piece, journals
        contents = (*SPLITS, "documents") if recipe.dedup else SPLITS
        self._paths = {
            content: part_path(folder, piece, len(journals[piece].parts), content)
            for content in contents
        }
        self._files: dict[str, BinaryIO] = {}
        self._hashes = {content: hashlib.sha256() for content in contents}
        self._tokens, self._bytes = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
        self._documents = dict.fromkeys(SPLITS, 0)

    def _temporary(self, content: str) -> Path:
        # Two processes that were given the same share by mistake write the same content.
        return self._paths[content].with_suffix(f".{os.getpid()}.tmp")

    def add(self, encoded: _Encoded) -> None:
        for split in SPLITS:
            self._write(split, encoded.ids[split])
            self._tokens[split] += encoded.tokens[split]
            self._bytes[split] += encoded.bytes[split]
            self._documents[split] += encoded.documents[split]
        if "documents" in self._paths:
            self._write("documents", encoded.entries)

    def _write(self, content: str, array: np.ndarray) -> None:
        if array.size:
            if content not in self._files:
                self._files[content] = open(self._temporary(content), "wb")  # noqa: SIM115
            raw = array.tobytes()
            self._files[content].write(raw)
            self._hashes[content].update(raw)

    def close(self, read: int, ends_piece: bool) -> None:
        """Put the files to disk under their names, and only then into the journal."""
        for content, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(self._temporary(content), self._paths[content])
        sha256 = {content: self._hashes[content].hexdigest() for content in self._files}
        part = Part(read, self._tokens, self._bytes, self._documents, sha256)
        journal = Journal((*self._journals[self._piece].parts, part), ends_piece)
        journal.save(self._folder, self._piece)
        self._journals[self._piece] = journal

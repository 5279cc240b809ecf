"""From the part files of all pieces to the files of a data set.

The parts are joined in the order of the source and cut anew every `shard_tokens` ids, so that the
result depends neither on how the work was shared nor on where it was interrupted.  Part files that
are wholly contained in finished shards are removed on the way: the disk never holds much more than
the data set itself.  A record of the finished shards lets a killed process go on from there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data.formats import token_dtype
from data.shards import SPLITS, Shard, ShardWriter, SplitInfo, write_atomically
from data.tokenizer import Tokenizer
from data.work import ENTRY, Journal, Part, part_path

BLOCK = 1 << 22  # ids copied at a time
DIGESTS = 50_000_000  # documents compared at a time, at some 60 bytes each

# The parts of a corpus in order: (piece, number within the piece, what its journal says).
Parts = list[tuple[int, int, Part]]


def finished_parts(parts_folder: Path, pieces: int) -> Parts:
    """All parts, where every piece is done; ValueError that names those which are not."""
    journals = [Journal.load(parts_folder, piece) for piece in range(pieces)]
    missing = [str(piece + 1) for piece, journal in enumerate(journals) if not journal.done]
    if missing:
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise ValueError(
            f"{len(missing)} of {pieces} pieces are not prepared yet (pieces {shown}): wait for the"
            " workers, run theirs again, or run the command without data.worker: it does the rest"
        )
    return [
        (piece, number, part)
        for piece, journal in enumerate(journals)
        for number, part in enumerate(journal.parts)
    ]


def assemble(
    parts_folder: Path,
    out: Path,
    parts: Parts,
    tokenizer: Tokenizer,
    shard_tokens: int,
    keep: list[np.ndarray] | None,
    advance: Callable[[int], object],
) -> dict[str, SplitInfo]:
    """Write the shards of both splits into `out`, or what is missing of them.

    `keep` has for each part which of its entries stay (None: all).  `advance` is told of ids.
    """
    out.mkdir(exist_ok=True)
    infos = {}
    for split in SPLITS:
        text_bytes, documents = _counts(parts_folder, parts, split, keep)
        shards = _write_split(
            parts_folder, out, parts, split, tokenizer, shard_tokens, keep, advance
        )
        tokens = sum(shard.tokens for shard in shards)
        infos[split] = SplitInfo(tokens, text_bytes, documents, tuple(shards))
    return infos


def _write_split(
    parts_folder: Path,
    out: Path,
    parts: Parts,
    split: str,
    tokenizer: Tokenizer,
    shard_tokens: int,
    keep: list[np.ndarray] | None,
    advance: Callable[[int], object],
) -> list[Shard]:
    record = parts_folder / f"{split}_shards.json"
    with ShardWriter(out, split, tokenizer.vocab_size, shard_tokens) as writer:
        if record.is_file():
            writer.shards = [Shard(**shard) for shard in json.loads(record.read_bytes())]
        recorded = len(writer.shards)
        skip = sum(shard.tokens for shard in writer.shards)
        consumed: list[tuple[Path, int]] = []  # part files, and where in the split they end
        position = 0
        for index, (piece, number, _) in enumerate(parts):
            count = _kept_tokens(parts_folder, parts, index, split, keep)
            path = part_path(parts_folder, piece, number, split)
            position += count
            consumed.append((path, position))
            if count and position > skip:
                first = max(0, skip - (position - count))
                for ids in _ids(parts_folder, parts, index, split, tokenizer, keep, first):
                    writer.append(ids)
                    advance(ids.size)
            if index == len(parts) - 1:
                writer.finish()
            if len(writer.shards) > recorded:
                recorded = len(writer.shards)
                shards = json.dumps([asdict(shard) for shard in writer.shards])
                write_atomically(record, shards.encode())
                done = sum(shard.tokens for shard in writer.shards)
                for old, _ in [entry for entry in consumed if entry[1] <= done]:
                    old.unlink(missing_ok=True)
                consumed = [entry for entry in consumed if entry[1] > done]
        return writer.shards


def _ids(
    parts_folder: Path,
    parts: Parts,
    index: int,
    split: str,
    tokenizer: Tokenizer,
    keep: list[np.ndarray] | None,
    first: int,
) -> Iterator[np.ndarray]:
    """The kept ids of a part, from the one at `first` on, block by block."""
    piece, number, part = parts[index]
    path = part_path(parts_folder, piece, number, split)
    if not path.is_file():
        raise FileNotFoundError(_damaged(path, "is missing", parts_folder))
    ids = np.fromfile(path, token_dtype(tokenizer.vocab_size))
    if hashlib.sha256(ids.data).hexdigest() != part.sha256[split]:
        raise ValueError(_damaged(path, "is not what was written", parts_folder))
    if keep is not None:
        entries = _entries(parts_folder, piece, number)
        mine = entries["val"] == (split == "val")
        ids = ids[np.repeat(keep[index][mine], entries["tokens"][mine])]
    for start in range(first, ids.size, BLOCK):
        yield ids[start : start + BLOCK]


def _damaged(path: Path, what: str, parts_folder: Path) -> str:
    return f"{path} {what}: delete {parts_folder.parent} and prepare the data again"


# --- duplicates -------------------------------------------------------------------------------


def first_of_each(parts_folder: Path, parts: Parts) -> list[np.ndarray]:
    """For each part, which of its entries belong to the first of all documents with their text.

    Where both splits have a text, the one in validation counts as the first: nothing that is
    validated on is trained on.  Documents are compared by 128 bits of their SHA-256, DIGESTS
    at a time: every further pass reads all entries once more (26 bytes per document, on disk),
    whereas memory stays the same but for one byte per document.
    """
    lengths = [_entry_count(parts_folder, piece, number) for piece, number, _ in parts]
    passes = max(1, -(-sum(lengths) // DIGESTS))
    keep = np.ones(sum(lengths), bool)
    for turn in range(passes):
        digests, vals, positions = [], [], []
        start = 0
        for (piece, number, _), length in zip(parts, lengths, strict=True):
            entries = _entries(parts_folder, piece, number)
            # A document in several parts is known by its end, which has the digest of all of it.
            chosen = entries["ends"] & (entries["digest"][:, 0] % passes == turn)
            digests.append(entries["digest"][chosen])
            vals.append(entries["val"][chosen])
            positions.append(start + np.flatnonzero(chosen))
            start += length
        digest, position = np.concatenate(digests), np.concatenate(positions)
        order = np.lexsort((position, ~np.concatenate(vals), digest[:, 1], digest[:, 0]))
        again = (digest[order[1:]] == digest[order[:-1]]).all(axis=1)
        keep[position[order[1:][again]]] = False
    borders = np.cumsum(lengths)[:-1]
    return _whole_documents(parts_folder, parts, np.split(keep, borders))


def _whole_documents(parts_folder: Path, parts: Parts, keep: list[np.ndarray]) -> list[np.ndarray]:
    """The decision on the end of a document, applied to all of its parts, from the last back."""
    out: list[np.ndarray] = []
    following = True  # the decision on the document that the present entries may belong to
    for (piece, number, _), kept in zip(reversed(parts), reversed(keep), strict=True):
        ends = np.flatnonzero(_entries(parts_folder, piece, number)["ends"])
        # The index of the first end at or after each entry; beyond the last one, the part to come.
        which = np.searchsorted(ends, np.arange(kept.size))
        decisions = np.append(kept[ends], following)
        out.append(decisions[which])
        following = bool(out[-1][0]) if kept.size else following
    return out[::-1]


def _entries(parts_folder: Path, piece: int, number: int) -> np.ndarray:
    path = part_path(parts_folder, piece, number, "documents")
    return np.fromfile(path, ENTRY) if path.is_file() else np.empty(0, ENTRY)


def _entry_count(parts_folder: Path, piece: int, number: int) -> int:
    path = part_path(parts_folder, piece, number, "documents")
    return path.stat().st_size // ENTRY.itemsize if path.is_file() else 0


def _kept_tokens(
    parts_folder: Path, parts: Parts, index: int, split: str, keep: list[np.ndarray] | None
) -> int:
    piece, number, part = parts[index]
    if keep is None:
        return part.tokens[split]
    entries = _entries(parts_folder, piece, number)
    mine = keep[index] & (entries["val"] == (split == "val"))
    return int(entries["tokens"][mine].sum())


def _counts(
    parts_folder: Path, parts: Parts, split: str, keep: list[np.ndarray] | None
) -> tuple[int, int]:
    """(bytes of text, documents) of a split."""
    if keep is None:
        return (
            sum(part.bytes[split] for _, _, part in parts),
            sum(part.documents[split] for _, _, part in parts),
        )
    text_bytes = documents = 0
    for index, (piece, number, _) in enumerate(parts):
        entries = _entries(parts_folder, piece, number)
        mine = keep[index] & (entries["val"] == (split == "val"))
        text_bytes += int(entries["bytes"][mine].sum(dtype=np.int64))
        documents += int(entries["ends"][mine].sum())
    return text_bytes, documents

"""Token ids on disk: files of raw ids, a manifest that describes them, and one flat view of both.

A prepared data set is a folder:

    manifest.json       what it is made of, and every file's size and checksum
    train_00000.bin     1024 bytes of header, then little-endian uint16 or uint32 ids
    train_00001.bin     (a new file every `shard_tokens` ids)
    val_00000.bin

The files are memory-mapped: opening 100 billion tokens costs no more than opening a thousand, and
the operating system keeps in memory the pages that are used.  The pages it keeps count toward the
process's resident size, although it gives them back as soon as anybody needs the memory: that is
the "leak" for which other trainers re-open their maps at every batch.

Truth is stated three times, in the manifest, in the header and by the file's size, and the three
must agree before one id is believed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data.formats import DTYPES, FORMATS, OWN, VERSION, Ids, Layout, read_layout, token_dtype
from data.order import validation_offsets

MANIFEST = "manifest.json"
SPLITS = ("train", "val")
OPEN_MAPS = 256  # files mapped without a second thought; each holds a file descriptor


def _expect(valid: object, what: str, value: object) -> None:
    if not valid:
        raise ValueError(f"{what} is {value!r:.100}")


def _is_count(value: object, least: int = 0) -> bool:
    return type(value) is int and value >= least


@dataclass(frozen=True)
class Shard:
    """One file of ids as the manifest describes it; `sha256` is of the ids, without the header."""

    file: str
    tokens: int
    dtype: str
    sha256: str
    format: str = OWN  # a name in data.formats.FORMATS

    def __post_init__(self) -> None:
        """A manifest never points outside its folder."""
        plain = isinstance(self.file, str) and Path(self.file).name == self.file
        _expect(plain and self.file.isprintable(), "the name of a file", self.file)
        _expect(_is_count(self.tokens, 1), f"the tokens of {self.file}", self.tokens)
        names = [dtype.name for dtype in DTYPES.values()]
        _expect(self.dtype in names, f"the dtype of {self.file}", self.dtype)
        _expect(isinstance(self.sha256, str), f"the sha256 of {self.file}", self.sha256)
        _expect(self.format in list(FORMATS), f"the format of {self.file}", self.format)


@dataclass(frozen=True)
class SplitInfo:
    """What the manifest says of one split; `bytes` counts the UTF-8 text, without end-of-texts.

    None where nobody knows: files of foreign make say nothing of their text.
    """

    tokens: int
    bytes: int | None
    documents: int | None
    shards: tuple[Shard, ...]

    def __post_init__(self) -> None:
        _expect(self.bytes is None or _is_count(self.bytes), "bytes", self.bytes)
        _expect(self.documents is None or _is_count(self.documents), "documents", self.documents)
        total = sum(shard.tokens for shard in self.shards)
        _expect(self.tokens == total, f"the sum of its shards is {total}, but tokens", self.tokens)


@dataclass(frozen=True)
class Manifest:
    """The description of a prepared data set.  `settings` is all that decided its content.

    The file holds, besides these fields, a `checksum` of them all.
    """

    name: str
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    eot: int
    settings: dict[str, Any]
    splits: dict[str, SplitInfo]
    version: int = VERSION

    def __post_init__(self) -> None:
        _expect(self.version == VERSION, "its version", self.version)
        for field in ("name", "tokenizer", "tokenizer_fingerprint"):
            _expect(isinstance(getattr(self, field), str), field, getattr(self, field))
        _expect(_is_count(self.vocab_size, 1), "vocab_size", self.vocab_size)
        _expect(_is_count(self.eot) and self.eot < self.vocab_size, "eot", self.eot)
        _expect(isinstance(self.settings, dict), "settings", self.settings)
        _expect(set(self.splits) == set(SPLITS), "the list of its splits", sorted(self.splits))
        files = [shard.file for split in self.splits.values() for shard in split.shards]
        _expect(len(set(files)) == len(files), "a file named twice: the list", sorted(files))

    def save(self, folder: Path) -> None:
        fields = asdict(self)
        text = json.dumps({**fields, "checksum": _checksum(fields)}, indent=2)
        write_atomically(folder / MANIFEST, (text + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Raises FileNotFoundError without a manifest, ValueError where it is not one of ours."""
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} not found: {folder} holds no prepared data set; run "
                "`python -m data.prepare data=... data.dir=...` or correct data.dir"
            )
        try:
            return cls._parse(json.loads(path.read_bytes()))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} is not a manifest of version {VERSION} ({type(error).__name__}: {error}): "
                "delete the folder and prepare the data again"
            ) from error

    @classmethod
    def _parse(cls, fields: dict[str, Any]) -> Manifest:
        _expect(fields["version"] == VERSION, "its version", fields["version"])
        checksum = fields.pop("checksum", None)  # manifests of the first days have none
        if checksum not in (None, _checksum(fields)):
            raise ValueError("it was changed after it was written: its checksum does not match")
        splits = {}
        for name, split in fields.pop("splits").items():
            shards = tuple(Shard(**shard) for shard in split.pop("shards"))
            splits[name] = SplitInfo(**split, shards=shards)
        return cls(**fields, splits=splits)


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


# --- writing ----------------------------------------------------------------------------------


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is, after any interruption, either absent or complete."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class ShardWriter:
    """Writes a stream of ids to `<split>_00000.bin`, `<split>_00001.bin`, ...

    Every file holds exactly `shard_tokens` ids, the last one what remains.  A file has the ending
    .tmp until it is complete and on disk; leaving the context by an error leaves it so.  The
    checksum is taken from the ids in memory, so that it also tells of a disk that did not keep
    what it was given.  `format` and `name`, of a file by its number, are for other programs.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        vocab_size: int,
        shard_tokens: int,
        *,
        format: str = OWN,
        name: Callable[[int], str] | None = None,
    ) -> None:
        self.folder, self.split, self.vocab_size = folder, split, vocab_size
        self.shard_tokens = shard_tokens
        self.dtype = token_dtype(vocab_size)
        self.shards: list[Shard] = []
        self.format = format
        self._name = name or (lambda number: f"{split}_{number:05d}.bin")
        header = FORMATS[format].header
        if header is None:
            raise ValueError(f"format {format}: such files are only read")
        self._header = header
        self._file: BinaryIO | None = None
        self._tokens = 0  # in the open file
        self._hash = hashlib.sha256()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish()
        elif self._file is not None:
            with suppress(OSError):  # on a full disk, closing fails once more
                self._file.close()

    @property
    def _path(self) -> Path:
        return self.folder / self._name(len(self.shards))

    def append(self, ids: np.ndarray) -> None:
        """Add ids, shape (n,), any integer dtype; ValueError for an id outside the vocabulary."""
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(
                f"{self._path}: an id lies outside the vocabulary of {self.vocab_size}"
            )
        ids = ids.astype(self.dtype, copy=False)
        while ids.size:
            if self._file is None:
                self._begin()
            assert self._file is not None
            part, ids = np.split(ids, [self.shard_tokens - self._tokens])
            raw = part.tobytes()
            self._file.write(raw)
            self._hash.update(raw)
            self._tokens += part.size
            if self._tokens == self.shard_tokens:
                self.finish()

    def _begin(self) -> None:
        self._file = open(f"{self._path}.tmp", "wb", buffering=1 << 20)  # noqa: SIM115
        self._file.write(bytes(len(self._header(0, self.dtype))))  # filled in at the end
        self._tokens, self._hash = 0, hashlib.sha256()

    def finish(self) -> None:
        """Complete the open file, if there is one, and put it to disk under its final name."""
        if self._file is None:
            return
        self._file.seek(0)
        self._file.write(self._header(self._tokens, self.dtype))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        path = self._path
        os.replace(f"{path}.tmp", path)
        digest = self._hash.hexdigest()
        self.shards.append(Shard(path.name, self._tokens, self.dtype.name, digest, self.format))


# --- reading ----------------------------------------------------------------------------------


class File(NamedTuple):
    """A shard whose header and size were found to be what the manifest says."""

    path: Path
    shard: Shard
    layout: Layout


def find_file(folder: Path, shard: Shard) -> File:
    """The file of a shard.  Raises ValueError or FileNotFoundError, with its name, if unfit."""
    path = folder / shard.file
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} not found, though {folder / MANIFEST} lists it: delete the folder "
            "and prepare the data again"
        )
    layout = read_layout(path, shard.format, np.dtype(shard.dtype))
    if (layout.tokens, layout.dtype.name) != (shard.tokens, shard.dtype):
        raise ValueError(
            f"{path} holds {layout.tokens} ids of {layout.dtype.name}, expected {shard.tokens} of "
            f"{shard.dtype} from {MANIFEST}: delete the folder and prepare the data again"
        )
    return File(path, shard, layout)


class Split:
    """One split of a data set, its files presented as one flat array of `len(split)` ids.

    `bytes` and `documents` are None where they are not known.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[File],
        *,
        tokenizer: str,
        vocab_size: int,
        eot: int,
        bytes: int | None,
        documents: int | None,
    ) -> None:
        self.name, self.files = name, tuple(files)
        self.tokenizer, self.vocab_size, self.eot = tokenizer, vocab_size, eot
        self.bytes, self.documents = bytes, documents
        self._starts = np.cumsum([0, *(file.shard.tokens for file in files)])
        self._ids = lru_cache(maxsize=_maps_allowed(len(files)))(self._map)

    @property
    def folder(self) -> Path:
        return self.files[0].path.parent

    @property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(file.shard for file in self.files)

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text per id, by which losses per token become losses per byte."""
        return None if self.bytes is None else self.bytes / len(self)

    def validation_offsets(self, context: int, max_tokens: int | None = None) -> np.ndarray:
        """The fixed windows of `data.order.validation_offsets`."""
        return validation_offsets(len(self), context, max_tokens)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _map(self, index: int) -> Ids:
        return Ids(self.files[index].path, self.files[index].layout)

    def read(self, offset: int, n: int) -> np.ndarray:
        """The ids [offset, offset + n), shape (n,), int64; raises what `read_rows` raises."""
        out = np.empty((1, n), np.int64)
        self.read_rows(np.array([offset]), out)
        return out[0]

    def read_rows(self, offsets: np.ndarray, out: np.ndarray) -> None:
        """Fill row i of `out`, int64 (rows, n), with the ids from `offsets[i]` on, across files
        where need be.

        Raises IndexError beyond the ends, and ValueError with the file's name where an id lies
        outside the tokenizer's vocabulary: a damaged file must not train a model in silence.
        """
        rows, n = out.shape
        if n < 0 or (rows and not 0 <= offsets.min() <= offsets.max() <= len(self) - n):
            raise IndexError(f"{n} ids from {offsets} on, of a {self.name} split of {len(self)}")
        if out.size == 0:
            return
        indices = np.searchsorted(self._starts, offsets, side="right") - 1
        places = zip(out, indices.tolist(), (offsets - self._starts[indices]).tolist(), strict=True)
        for row, index, start in places:
            part = self._ids(index).ids[start : start + n]
            row[: part.size] = part
            filled = part.size
            while filled < n:
                index += 1
                part = self._ids(index).ids[: n - filled]
                row[filled : filled + part.size] = part
                filled += part.size
        if out.max() >= self.vocab_size:
            row, column = np.argwhere(out >= self.vocab_size)[0]
            self._refuse(int(offsets[row] + column), int(out[row, column]))

    def _refuse(self, offset: int, value: int) -> None:
        file, position = self.locate(offset)
        raise ValueError(
            f"{file.path}: id {value} at position {position} is outside the {self.tokenizer} "
            f"vocabulary of {self.vocab_size}; the file is damaged or of another tokenizer"
        )

    def locate(self, offset: int) -> tuple[File, int]:
        """The file that holds the id at `offset`, and its position there."""
        index = int(np.searchsorted(self._starts, offset, side="right")) - 1
        return self.files[index], int(offset - self._starts[index])

    def announce(self, offsets: np.ndarray, n: int) -> None:
        """Have the system fetch the windows of n ids that start at `offsets`, without waiting.

        What a window holds of the next file is left to be waited for.
        """
        indices = np.searchsorted(self._starts, offsets, side="right") - 1
        starts = (offsets - self._starts[indices]).tolist()
        for index, start in zip(indices.tolist(), starts, strict=True):
            self._ids(index).announce(start, n)


def _maps_allowed(files: int) -> int:
    """How many of `files` may be mapped at a time, each of which holds a file descriptor.

    Mapping a file anew for a single window would cost a visit to a network file system, so the
    soft limit on descriptors, commonly 1024, is raised as far as the hard one lets it be.
    """
    if files <= OPEN_MAPS:
        return files
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY:
            return files
        limit = soft + files if hard == resource.RLIM_INFINITY else min(soft + files, hard)
        if limit > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    except (ImportError, ValueError, OSError):  # Windows; macOS, which has a limit of its own
        return OPEN_MAPS
    return files if limit == soft + files else min(files, max(OPEN_MAPS, limit // 4))


def load_split(folder: Path, name: str, manifest: Manifest) -> Split:
    """A split of the data set in `folder`.  Costs one small read per file."""
    info = manifest.splits[name]
    if not info.shards:
        raise ValueError(f"{folder}: its {name} split is empty")
    return Split(
        name,
        [find_file(folder, shard) for shard in info.shards],
        tokenizer=manifest.tokenizer,
        vocab_size=manifest.vocab_size,
        eot=manifest.eot,
        bytes=info.bytes,
        documents=info.documents,
    )


def open_split(folder: str | Path, split: str) -> Split:
    """The `train` or `val` split of a prepared folder; FileNotFoundError or ValueError if unfit."""
    return load_split(Path(folder), split, Manifest.load(Path(folder)))


def check_vocab(split: Split, vocab_size: int) -> None:
    """Refuse, before training, data whose tokenizer has more ids than the model has embeddings.

    The ids themselves were checked when they were written and are checked as they are read.
    """
    if split.vocab_size > vocab_size:
        raise ValueError(
            f"{split.folder} holds ids of the {split.tokenizer} tokenizer, below "
            f"{split.vocab_size}, but the model's vocabulary is {vocab_size}: set model.vocab_size "
            f"to {split.vocab_size} or more, or choose another data.tokenizer"
        )

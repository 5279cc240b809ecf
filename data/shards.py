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
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

MAGIC = b"gpt2shrd"
VERSION = 1
HEADER_BYTES = 1024
HEADER = struct.Struct("<8sIIQ")  # magic, version, dtype code (its bytes per id), number of ids
DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
OPEN_MAPS = 256  # every map holds a file descriptor, of which a process commonly has 1024


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest dtype that holds the ids of a vocabulary."""
    return DTYPES[2 if vocab_size <= 2**16 else 4]


@dataclass(frozen=True)
class Shard:
    """One file of ids as the manifest describes it; `sha256` is of the ids, without the header."""

    file: str
    tokens: int
    dtype: str
    sha256: str
    format: str = "gpt2-bench"  # a name in READERS


@dataclass(frozen=True)
class SplitInfo:
    """What the manifest says of one split; `bytes` counts the UTF-8 text, without end-of-texts."""

    tokens: int
    bytes: int
    documents: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """The description of a prepared data set.  `settings` is all that decided its content."""

    name: str
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    eot: int
    settings: dict[str, Any]
    splits: dict[str, SplitInfo]
    version: int = VERSION

    def save(self, folder: Path) -> None:
        write_atomically(folder / MANIFEST, (json.dumps(asdict(self), indent=2) + "\n").encode())

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
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a manifest of version {VERSION} ({type(error).__name__}: {error}): "
                "delete the folder and prepare the data again"
            ) from error

    @classmethod
    def _parse(cls, fields: dict[str, Any]) -> Manifest:
        if fields["version"] != VERSION:
            raise ValueError(f"its version is {fields['version']!r}")
        splits = {}
        for name, split in fields.pop("splits").items():
            shards = tuple(Shard(**shard) for shard in split.pop("shards"))
            for shard in shards:
                if (
                    Path(shard.file).name != shard.file
                ):  # a manifest never points outside its folder
                    raise ValueError(f"{shard.file!r} is not a plain file name")
            splits[name] = SplitInfo(**split, shards=shards)
            if splits[name].tokens != sum(shard.tokens for shard in shards):
                raise ValueError(f"the shards of {name} do not add up to {splits[name].tokens}")
        if set(splits) != set(SPLITS):
            raise ValueError(f"its splits are {sorted(splits)}, expected {sorted(SPLITS)}")
        return cls(**fields, splits=splits)


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
    what it was given.
    """

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_tokens: int) -> None:
        self.folder, self.split, self.vocab_size = folder, split, vocab_size
        self.shard_tokens = shard_tokens
        self.dtype = token_dtype(vocab_size)
        self.shards: list[Shard] = []
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
        return self.folder / f"{self.split}_{len(self.shards):05d}.bin"

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
        self._file.write(bytes(HEADER_BYTES))  # the count is known only at the end
        self._tokens, self._hash = 0, hashlib.sha256()

    def finish(self) -> None:
        """Complete the open file, if there is one, and put it to disk under its final name."""
        if self._file is None:
            return
        self._file.seek(0)
        self._file.write(HEADER.pack(MAGIC, VERSION, self.dtype.itemsize, self._tokens))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        path = self._path
        os.replace(f"{path}.tmp", path)
        digest = self._hash.hexdigest()
        self.shards.append(Shard(path.name, self._tokens, self.dtype.name, digest))


# --- reading ----------------------------------------------------------------------------------


def read_shard(path: Path) -> np.ndarray:
    """The ids of a file of this project's format, memory-mapped, shape (tokens,)."""
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
    if not header.startswith(MAGIC):
        raise ValueError(f"{path} is not a token file of this project: no {MAGIC!r} at its start")
    if len(header) < HEADER_BYTES:
        raise ValueError(f"{path} is truncated: {size} bytes, the header alone has {HEADER_BYTES}")
    _, version, code, tokens = HEADER.unpack_from(header)
    if version != VERSION or code not in DTYPES:
        raise ValueError(
            f"{path}: version {version} with {code} bytes per id, expected version {VERSION} "
            f"with one of {sorted(DTYPES)}"
        )
    expected = HEADER_BYTES + tokens * code
    if tokens == 0 or size != expected:
        raise ValueError(f"{path}: {size} bytes, expected {expected} for the {tokens} ids it names")
    ids = np.memmap(path, DTYPES[code], mode="r", offset=HEADER_BYTES, shape=(tokens,))
    return np.asarray(ids)  # the same memory as a plain array, whose slices cost half as much


# How the ids of one file are mapped, by the `format` that its manifest entry names.  A foreign
# format (nanoGPT's raw uint16, llm.c's 1024-byte header) is one more function here.
READERS: dict[str, Callable[[Path], np.ndarray]] = {"gpt2-bench": read_shard}


class Split:
    """One split of a data set, its shards presented as one flat array of `len(split)` ids."""

    def __init__(self, folder: Path, name: str, manifest: Manifest) -> None:
        """Checks every file's header and size, which costs one small read per file."""
        info = manifest.splits[name]
        self.folder, self.name = folder, name
        self.tokenizer, self.vocab_size = manifest.tokenizer, manifest.vocab_size
        self.eot = manifest.eot
        self.bytes, self.documents, self.shards = info.bytes, info.documents, info.shards
        self._starts = np.cumsum([0, *(shard.tokens for shard in info.shards)])
        self._ids = lru_cache(maxsize=OPEN_MAPS)(self._open)
        for index in range(len(self.shards)):
            self._open(index)

    def _open(self, index: int) -> np.ndarray:
        shard = self.shards[index]
        path = self.folder / shard.file
        if shard.format not in READERS:
            raise ValueError(f"{path}: format {shard.format!r}, expected one of {sorted(READERS)}")
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} not found, though {self.folder / MANIFEST} lists it: delete the folder "
                "and prepare the data again"
            )
        ids = READERS[shard.format](path)
        if (ids.size, ids.dtype.name) != (shard.tokens, shard.dtype):
            raise ValueError(
                f"{path} holds {ids.size} ids of {ids.dtype.name}, expected {shard.tokens} of "
                f"{shard.dtype} from {MANIFEST}: delete the folder and prepare the data again"
            )
        return ids

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, offset: int, n: int) -> np.ndarray:
        """The ids [offset, offset + n), shape (n,), int64, across files where need be.

        Raises IndexError beyond the ends, and ValueError with the file's name where an id lies
        outside the tokenizer's vocabulary: a damaged file must not train a model in silence.
        """
        if not 0 <= offset <= offset + n <= len(self):
            raise IndexError(f"ids [{offset}, {offset + n}) of a {self.name} split of {len(self)}")
        out = np.empty(n, np.int64)
        filled = 0
        index = int(np.searchsorted(self._starts, offset, side="right")) - 1
        while filled < n:
            start = offset + filled - int(self._starts[index])
            part = self._ids(index)[start : start + n - filled]
            out[filled : filled + part.size] = part
            if part.max() >= self.vocab_size:
                raise ValueError(
                    f"{self.folder / self.shards[index].file}: id {part.max()} is outside the "
                    f"{self.tokenizer} vocabulary of {self.vocab_size}; the file is damaged"
                )
            filled += part.size
            index += 1
        return out


def open_split(folder: str | Path, split: str) -> Split:
    """The `train` or `val` split of a prepared folder; FileNotFoundError or ValueError if unfit."""
    return Split(Path(folder), split, Manifest.load(Path(folder)))


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

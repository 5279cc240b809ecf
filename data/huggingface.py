"""Data sets of the Hugging Face hub, streamed through `datasets`: no copy of the text on the disk.

A piece is one of the files that the data set consists of.  `data.files` names local copies to read
in place of the hub's, through the same code; `data.name` may also be a folder laid out like a data
set of the hub, such as a clone of one.

`split_by=permutation` is nanoGPT's split: `datasets`' train_test_split(test_size=val_fraction,
seed=split_seed, shuffle=True) draws numpy's permutation of all rows and takes the first ones for
testing.  The rows are the same here; within each split they keep the order of the source, so that
it can be streamed (train_test_split leaves them in the order of the permutation).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data import DataConfig
from data.textfiles import ROWS, SAMPLED, expand, file_states, kind, one_line
from data.texts import Document, Piece, Source, TextError, Texts

# How `datasets` calls the readers of local files.
READERS = {
    ".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".arrow": "arrow"
}  # fmt: skip
COMPRESSIONS = (".gz", ".xz", ".zst")
# About how many bytes of text a stored byte holds, for files that are not here to look into.
TYPICAL_EXPANSION = {".gz": 2.8, ".xz": 4.0, ".zst": 3.2, ".parquet": 1.8}
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Published:
    """Token counts that others have published for a data set, and the settings they hold for."""

    settings: dict[str, Any]
    documents: int
    tokens: dict[str, int]
    source: str


PUBLISHED = (
    Published(
        {
            "name": "Skylion007/openwebtext", "split": "train", "split_by": "permutation",
            "val_fraction": 0.0005, "split_seed": 2357, "tokenizer": "gpt2",
        },
        documents=8_013_769,
        tokens={"train": 9_035_582_198, "val": 4_434_897},
        source="nanoGPT's data/openwebtext/readme.md",
    ),
)  # fmt: skip


def check_published(settings: dict[str, Any], documents: int, tokens: dict[str, int]) -> None:
    """ValueError where others have got other counts from the same settings.

    Local files may be a part of the corpus; they are held to the counts when they are all of it.
    """
    for known in PUBLISHED:
        if settings.get("dedup") or any(settings.get(k) != v for k, v in known.settings.items()):
            continue
        if settings.get("files") and documents != known.documents:
            continue
        if (documents, tokens) != (known.documents, known.tokens):
            raise ValueError(
                f"{documents:,} documents gave {tokens['train']:,} training and {tokens['val']:,} "
                f"validation tokens, expected {known.documents:,}, {known.tokens['train']:,} and "
                f"{known.tokens['val']:,} ({known.source}): the data set has changed or was not "
                "read whole; data.check=false takes it as it is, without preparing it again"
            )


def open_huggingface(config: DataConfig) -> Source:
    """The data set that `data.name` (and `subset`, `revision`, `split`) names."""
    settings: dict[str, Any] = {
        "name": config.name,
        "subset": config.subset,
        "revision": config.revision,
        "split": config.split,
        "val_split": config.val_split,
        "text_field": config.text_field,
    }
    files: list[Path] = []
    if config.files:
        files = expand(config.files, tuple(READERS), COMPRESSIONS)
        if len({kind(path) for path in files}) > 1:
            raise ValueError(f"data.files={config.files} are of several kinds: name files of one")
        if config.val_split:
            raise ValueError(
                "data.files with data.val_split: which files are for validation is not known; set "
                "data.val_split=null to have the documents' hashes decide"
            )
        settings["files"] = file_states(files)
    elif not config.name:
        raise ValueError(
            "data.name is empty: name a data set of the hub, e.g. data.name=roneneldan/TinyStories"
        )
    elif Path(config.name).expanduser().is_dir():
        folder = Path(config.name).expanduser().resolve()
        found = (p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
        hidden = {".git", ".cache"}
        local = (p for p in sorted(found) if not hidden & set(p.relative_to(folder).parts))
        settings["files"] = file_states(list(local))
    if config.document_start is not None:
        try:
            re.compile(config.document_start)
        except re.error as error:
            raise ValueError(
                f"data.document_start={config.document_start} is not a pattern ({error})"
            ) from error
        settings["document_start"] = config.document_start
    if config.split_by == "permutation":
        if config.val_split or config.document_start:
            raise ValueError(
                "data.split_by=permutation splits the rows of one split: it goes neither with "
                "data.val_split nor with data.document_start"
            )
        settings |= {"split_by": config.split_by, "split_seed": config.split_seed}
    return Source(settings, partial(_open, config, files))


def _open(config: DataConfig, files: list[Path], found: dict[str, Any]) -> Texts:
    hub = _Hub(config, files, found.get("commit") or config.revision)
    # What is validated on stands first, as little as it is: a mistake in it shows early.
    splits = {config.val_split: "val", config.split: "train"} if config.val_split else {
        config.split: None
    }  # fmt: skip
    pieces: list[Piece] = []
    text_bytes = 0
    for name, split in splits.items():
        stream, urls = hub.stream(name or "")
        offsets, val_rows = [0] * stream.num_shards, None
        if config.split_by == "permutation":
            rows = hub.rows(stream, urls)
            offsets = [sum(rows[:i]) for i in range(len(rows))]
            val_rows = permuted_rows(sum(rows), config.val_fraction, config.split_seed)
        for index, offset in enumerate(offsets):
            shard = stream.shard(stream.num_shards, index)
            documents = partial(_documents, hub, shard, config, split, offset, val_rows)
            pieces.append(Piece(f"{name} {index}", documents))
        text_bytes += hub.text_bytes(name or "", urls)
    return Texts(pieces, text_bytes, hub.found())


def permuted_rows(rows: int, val_fraction: float, seed: int) -> np.ndarray:
    """The rows that `datasets`' train_test_split puts into the test split, sorted, shape (n_val,).

    datasets 5.2, arrow_dataset.py: ceil(test_size * rows) of the first entries of
    numpy.random.default_rng(seed).permutation(rows).  Costs 8 bytes per row for a moment.
    """
    return np.sort(np.random.default_rng(seed).permutation(rows)[: math.ceil(val_fraction * rows)])


class _Hub:
    """A data set on the hub, in a folder or in local files, and its errors in one line each."""

    def __init__(self, config: DataConfig, files: list[Path], revision: str | None) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                f"data.source={config.source} needs a package: pip install datasets"
            ) from error
        datasets.disable_progress_bars()
        self._config, self._files = config, files
        self.what = f"data.name={config.name}" if not files else f"data.files={config.files}"
        self._local = bool(files) or Path(str(config.name)).expanduser().is_dir()
        self._commit = None if self._local else self._resolve(revision)

    def _resolve(self, revision: str | None) -> str:
        """The commit behind a branch or tag, so that what is read does not change under way."""
        from huggingface_hub import HfApi

        if revision and COMMIT.fullmatch(revision):
            return revision
        with self.errors():
            info = HfApi().dataset_info(str(self._config.name), revision=revision)
            return str(info.sha)

    def found(self) -> dict[str, Any]:
        return {"commit": self._commit} if self._commit else {}

    def _arguments(self) -> dict[str, Any]:
        config = self._config
        if self._files:
            reader = READERS[kind(self._files[0])]
            files = {config.split: [str(path) for path in self._files]}
            return {"path": reader, "data_files": files}
        name = str(config.name)
        path = str(Path(name).expanduser()) if self._local else name
        return {"path": path, "name": config.subset, "revision": self._commit}

    def stream(self, split: str) -> tuple[Any, list[str]]:
        """The documents of a split, not read yet, and the addresses of its files."""
        import datasets

        with self.errors():
            builder = datasets.load_dataset_builder(**self._arguments())
            stream = datasets.load_dataset(**self._arguments(), split=split, streaming=True)
            urls = [str(url) for url in (builder.config.data_files or {}).get(split, [])]
            self._info = builder.info
        columns = stream.column_names
        if columns is not None and self._config.text_field not in columns:
            raise TextError(
                f"{self.what} has no column data.text_field={self._config.text_field}; it holds "
                f"{', '.join(columns)}"
            )
        return stream, urls

    def rows(self, stream: Any, urls: list[str]) -> list[int]:
        """The number of rows in each piece: from the ends of .parquet files, else by reading."""
        import fsspec
        import pyarrow.parquet as pq

        def one(index: int) -> int:
            with self.errors():
                if len(urls) == stream.num_shards and urls[index].endswith(".parquet"):
                    with fsspec.open(urls[index]) as file:
                        return int(pq.read_metadata(file).num_rows)
                shard = stream.shard(stream.num_shards, index).with_format("arrow")
                return sum(len(table) for table in shard.iter(batch_size=ROWS))

        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(one, range(stream.num_shards)))

    def text_bytes(self, split: str, urls: list[str]) -> int:
        """About the size of the text: the data set's own word, or the size of its files."""
        import fsspec

        stated = (self._info.splits or {}).get(split)
        if stated is not None and stated.num_bytes:
            return int(stated.num_bytes)
        total = 0.0
        sampled = urls[:: max(1, len(urls) // SAMPLED)]
        for url in sampled:
            with self.errors():
                fs, path = fsspec.core.url_to_fs(url)
                total += fs.size(path) * TYPICAL_EXPANSION.get(Path(path).suffix, 1.0)
        return int(total * len(urls) / max(1, len(sampled)))

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Other libraries' errors, which are many, as a line with advice."""
        try:
            yield
        except (TextError, MemoryError, GeneratorExit):
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {one_line(error)}"
            for sign, kind_of_error, advice in ADVICE:
                if sign in f"{type(error).__name__}: {error}":
                    raise kind_of_error(f"{self.what}: {text}; {advice}") from error
            if self._local:
                raise TextError(f"{self.what} cannot be read ({text})") from error
            raise OSError(f"{self.what} cannot be read ({text}): {OFFLINE}") from error


OFFLINE = (
    "started again, the same command goes on from here; without network, copy its files to this "
    "machine and name them, 'data.files=[...]'"
)
# What a message of `datasets` says, the error to raise and the advice to give.
ADVICE: tuple[tuple[str, type[Exception], str], ...] = (
    ("scripts are no longer supported", ValueError, "try data.revision=refs/convert/parquet"),
    ("BuilderConfig", ValueError, "set data.subset to one of those"),
    ("Config name is missing", ValueError, "set data.subset to one of those"),
    ("Unknown split", ValueError, "set data.split and data.val_split to names of those"),
    ("Bad split", ValueError, "set data.split and data.val_split to names of those"),
)


def _documents(
    hub: _Hub,
    shard: Any,
    config: DataConfig,
    split: str | None,
    offset: int,
    val_rows: np.ndarray | None,
) -> Iterator[Document]:
    """The rows of a piece; under a permutation, row `offset` of all is the first."""
    held_out = set() if val_rows is None else set(val_rows.tolist())
    texts = _texts(hub, shard, config.text_field)
    if config.document_start is not None:
        texts = _joined(texts, re.compile(config.document_start).match)
    for row, text in enumerate(texts, start=offset):
        if val_rows is not None:
            split = "val" if row in held_out else "train"
        yield Document(hub.what, text, split)


def _texts(hub: _Hub, shard: Any, column: str) -> Iterator[str]:
    row = 0
    with hub.errors():
        for table in shard.with_format("arrow").iter(batch_size=ROWS):
            if column not in table.column_names:
                raise TextError(
                    f"{hub.what} has no column data.text_field={column}; it holds "
                    f"{', '.join(table.column_names)}"
                )
            for text in table.column(column).to_pylist():
                row += 1
                if not isinstance(text, str):
                    raise TextError(
                        f"{hub.what}: row {row} of a file has no text at data.text_field={column}, "
                        f"but {text!r:.60}"
                    )
                yield text


def _joined(texts: Iterator[str], starts: Callable[[str], object]) -> Iterator[str]:
    """Rows joined to documents, each of which begins with a row that `starts` one."""
    document: list[str] = []
    for text in texts:
        if starts(text) and document:
            yield "".join(document)
            document = []
        document.append(text)
    if document:
        yield "".join(document)

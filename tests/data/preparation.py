"""A small corpus for the tests of preparation, and what a prepared folder holds."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

from data import DataConfig
from data.shards import open_split

DOCUMENTS = [f"document {i} é" for i in range(200)]


def write_corpus(folder: Path) -> Path:
    """DOCUMENTS in three files of three kinds."""
    rows = [json.dumps({"text": text, "id": i}) for i, text in enumerate(DOCUMENTS)]
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(rows[:100]) + "\n")
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(rows[100:150]))
    with lzma.open(folder / "c.jsonl.xz", "wt") as file:
        file.write("\n\n".join(rows[150:]) + "\n")
    return folder


def small_config(tmp_path: Path) -> DataConfig:
    return DataConfig(
        source="text", files=[str(write_corpus(tmp_path / "corpus"))], val_fraction=0.1,
        shard_tokens=500, cache=str(tmp_path / "c"),
    )  # fmt: skip


def texts(folder: Path) -> dict[str, str]:
    """What the splits of a `bytes` data set say, with | for the end of a document."""
    decoded = {}
    for name in ("train", "val"):
        split = open_split(folder, name)
        ids = split.read(0, len(split))
        assert split.bytes == int((ids != 256).sum())
        assert split.documents == int((ids == 256).sum())
        ids[ids == 256] = ord("|")
        decoded[name] = bytes(ids.tolist()).decode()
    return decoded


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

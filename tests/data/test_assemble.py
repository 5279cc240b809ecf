"""Of identical documents the first is kept, wherever they stand and however the work was cut."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparation import content, texts

from data import DataConfig, assemble, textfiles, work
from data.plan import plan
from data.preparation import prepare
from data.shards import Manifest


@pytest.fixture
def rows() -> list[str]:
    """300 documents, of which about 100 differ; the duplicates lie far and near."""
    rng = np.random.default_rng(0)
    return [f"document {i} " + "x" * (i % 7) for i in rng.integers(0, 100, 300)]


@pytest.fixture
def config(tmp_path: Path, rows: list[str]) -> DataConfig:
    paths = []
    for index, part in enumerate(np.array_split(np.array(rows, object), 4)):
        paths.append(tmp_path / f"{index}.jsonl")
        paths[-1].write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return DataConfig(
        source="text", files=[str(path) for path in paths], val_fraction=0.2, shard_tokens=400,
        dedup=True, cache=str(tmp_path / "cache"),
    )  # fmt: skip


def kept(folder: Path) -> list[str]:
    return [t for split in texts(folder).values() for t in split.split("|")[:-1]]


@pytest.mark.parametrize("digests", [1, 7, 10**6])
@pytest.mark.parametrize("part", [50, 1000, 1 << 26])
def test_the_first_of_each_is_kept(
    config: DataConfig, rows: list[str], monkeypatch: pytest.MonkeyPatch, digests: int, part: int
) -> None:
    """For any size of the parts and any number of passes over the hashes."""
    monkeypatch.setattr(assemble, "DIGESTS", digests)
    monkeypatch.setattr(work, "PART_BYTES", part)
    monkeypatch.setattr(work, "BATCH_BYTES", part)
    monkeypatch.setattr(textfiles, "PIECE_BYTES", 700)
    folder = prepare(config)
    split = texts(folder)
    first = list(dict.fromkeys(rows))
    plain = texts(prepare(replace(config, dedup=False)))
    for name in ("train", "val"):
        mine = [t for t in first if f"|{t}|" in f"|{plain[name]}"]
        assert split[name] == "".join(f"{t}|" for t in mine)
    assert len(kept(folder)) == len(first) < len(rows)


def test_without_duplicates_nothing_changes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(100)))
    config = DataConfig(source="text", files=[f"{tmp_path}/a.jsonl"], val_fraction=0.3,
                        cache=str(tmp_path / "c"))  # fmt: skip
    one, two = (Manifest.load(prepare(replace(config, dedup=flag))) for flag in (False, True))
    assert one.splits == two.splits and two.settings["dedup"] is True


def test_long_documents_in_several_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of a long text goes as a whole; one that only begins alike stays as a whole."""
    monkeypatch.setattr(textfiles, "PART_BYTES", 100)
    monkeypatch.setattr(work, "BATCH_BYTES", 150)
    monkeypatch.setattr(work, "PART_BYTES", 300)
    lines = "".join(f"line {i} of a book\n" for i in range(100))
    names = {
        "a": lines,
        "b": lines[:1500] + "else\n" + lines[1500:] + "more\n",
        "c": lines,
        "d": "short\nbook\n" * 3,
        "e": lines,
    }
    for name, text in names.items():
        (tmp_path / f"{name}.txt").write_text(text)
    config = DataConfig(source="text", files=[f"{tmp_path}/*.txt"], dedup=True, val_fraction=0.1,
                        cache=str(tmp_path / "cache"))  # fmt: skip
    one = [str(tmp_path / f"{name}.txt") for name in "abd"]
    expected = texts(prepare(replace(config, files=one, dedup=False)))
    assert texts(prepare(config)) == expected


def test_what_is_validated_on_is_not_trained_on(tmp_path: Path) -> None:
    """Where a data set has a split of its own, its copies go from the training split."""
    folder = tmp_path / "data set"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["a", "b", "c", "a", "d"]}), folder / "train.parquet")
    pq.write_table(pa.table({"text": ["c", "e", "c"]}), folder / "validation.parquet")
    config = DataConfig(source="huggingface", name=str(folder), val_split="validation", dedup=True,
                        cache=str(tmp_path / "c"))  # fmt: skip
    assert texts(prepare(config)) == {"train": "a|b|d|", "val": "c|e|"}


def test_disk_holds_little_more_than_the_data(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Part files go as the shards that hold their ids are finished."""
    monkeypatch.setattr(work, "PART_BYTES", 50)
    monkeypatch.setattr(work, "BATCH_BYTES", 50)
    config = replace(config, dedup=False)
    sizes: list[int] = []
    real = assemble.write_atomically

    def measured(path: Path, raw: bytes) -> None:
        real(path, raw)
        files = (p for p in plan(config).work.rglob("*") if p.suffix in (".bin", ""))
        sizes.append(sum(p.stat().st_size for p in files if p.is_file()))

    monkeypatch.setattr(assemble, "write_atomically", measured)
    folder = prepare(config)
    total = sum(len(raw) for raw in content(folder).values())
    assert len(sizes) > 8
    assert max(sizes) < total + 2 * (400 * 2 + 1024)

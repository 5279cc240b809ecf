"""Text files of every kind become the same documents, and broken ones one clear line."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparation import DOCUMENTS, small_config, texts

from data import DataConfig, textfiles
from data.preparation import prepare
from data.shards import open_split
from data.sources import open_source
from data.texts import Document
from data.tokenizer import get_tokenizer


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return small_config(tmp_path)


def documents(config: DataConfig) -> list[Document]:
    return [d for piece in open_source(config).open({}).pieces for d in piece.documents()]


def test_folders_patterns_and_repetitions(config: DataConfig) -> None:
    """All ways to name the three files give the same documents, each once."""
    reference = texts(prepare(config))
    folder = Path(config.files[0])
    (folder / "README.pdf").write_bytes(b"not text")
    os.symlink(folder / "a.jsonl", folder.parent / "link.jsonl")
    for files in (
        [f"{folder}/*.jsonl*"],
        [f"{folder}/a.jsonl", f"{folder}/b.*", f"{folder}/?.jsonl.xz", str(folder)],
        [str(folder.parent / "link.jsonl"), str(folder)],
    ):
        assert texts(prepare(replace(config, files=files))) == reference


@pytest.mark.parametrize("size", [1, 700, 10_000])
def test_pieces_hold_every_document_once_in_order(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Files are cut at lines and row groups, and small ones joined."""
    monkeypatch.setattr(textfiles, "PIECE_BYTES", size)
    table = pa.table({"id": range(200), "text": DOCUMENTS})
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=30)
    (tmp_path / "e.jsonl").write_text(
        "\n" + "\n\n".join(json.dumps({"text": t}) for t in DOCUMENTS)
    )
    config = replace(config, files=[*config.files, f"{tmp_path}/d.parquet", f"{tmp_path}/e.jsonl"])
    assert [document.text for document in documents(config)] == DOCUMENTS * 3
    pieces = open_source(config).open({}).pieces
    assert len(pieces) > 8 or size > 1
    assert [piece.name for piece in pieces] == [p.name for p in open_source(config).open({}).pieces]


def test_zst(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    compress = zstandard.ZstdCompressor().compress
    rows = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode()
    path = tmp_path / "a.jsonl.zst"
    config = DataConfig(source="text", files=[str(path)])
    path.write_bytes(compress(rows[:1000]) + compress(rows[1000:]))  # two frames
    assert [document.text for document in documents(config)] == DOCUMENTS
    path.write_bytes(compress(rows)[:-5])
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst is not a whole \.zst file"):
        documents(config)
    path.write_bytes(b"never compressed")
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst is not a whole \.zst file"):
        documents(config)


@pytest.mark.parametrize(
    ("name", "package"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")]
)
def test_missing_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    (tmp_path / name).write_bytes(b"anything")
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ValueError, match=rf"{name}: reading .* pip install {package}"):
        documents(DataConfig(source="text", files=[str(tmp_path / name)]))


# --- plain text -------------------------------------------------------------------------------


def test_plain_text_is_split_at_a_line_break_near_its_end(tmp_path: Path) -> None:
    lines = [f"line {i:03d}\n" for i in range(100)]
    (tmp_path / "book.txt").write_text("".join(lines))
    with gzip.open(tmp_path / "book.md.gz", "wt") as file:
        file.write("".join(lines))
    for name in ("book.txt", "book.md.gz"):
        config = DataConfig(
            source="text", files=[str(tmp_path / name)], val_fraction=0.095, cache=str(tmp_path)
        )
        expected = {"train": "".join(lines[:91]) + "|", "val": "".join(lines[91:]) + "|"}
        assert texts(prepare(config)) == expected


@pytest.mark.parametrize("text", ["x" * 1000, "x" * 1000 + "\n", "é" * 501, "\n" * 99 + "ab"])
def test_text_without_line_breaks_is_split_between_characters(tmp_path: Path, text: str) -> None:
    (tmp_path / "one.txt").write_text(text)
    for fraction in (0.01, 0.0501, 0.5):
        config = DataConfig(
            source="text", files=[str(tmp_path / "one.txt")], val_fraction=fraction,
            cache=str(tmp_path),
        )  # fmt: skip
        split = texts(prepare(config))
        assert split["train"][:-1] + split["val"][:-1] == text


@pytest.mark.parametrize("part", [16, 64, 1000])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n", " "])
def test_reading_in_parts_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int, newline: str
) -> None:
    text = newline.join("é" * (i % 7) + f" word{i}" for i in range(300))
    path = tmp_path / "long.txt"
    path.write_bytes(text.encode())
    monkeypatch.setattr(textfiles, "PART_BYTES", part)
    config = DataConfig(source="text", files=[str(path)], val_fraction=0.2, cache=str(tmp_path))
    split = texts(prepare(config))
    assert split["train"].count("|") == split["val"].count("|") == 1
    assert split["train"][:-1] + split["val"][:-1] == text


def test_parts_are_tokenized_as_the_whole(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cuts lie where GPT-2's pattern cuts anyway: Shakespeare in 100 parts has the same ids."""
    try:
        gpt2 = get_tokenizer("gpt2")
    except FileNotFoundError as error:
        pytest.skip(f"no GPT-2 vocabulary on this machine: {error}")
    monkeypatch.setattr(textfiles, "PART_BYTES", 10_000)
    path = shared / "data" / "tinyshakespeare.txt"
    config = DataConfig(
        source="shakespeare", files=[str(path)], tokenizer="gpt2", val_fraction=0.1,
        cache=str(tmp_path),
    )  # fmt: skip
    folder = prepare(config)
    splits = [open_split(folder, name) for name in ("train", "val")]
    ids = [split.read(0, len(split) - 1) for split in splits]
    np.testing.assert_array_equal(np.concatenate(ids), gpt2.encode(path.read_text("utf-8")))
    assert sum(map(len, ids)) == 338_025


def test_another_shakespeare_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hamlet.txt").write_text("To be, or not to be\n" * 100)
    config = DataConfig(source="shakespeare", files=[f"{tmp_path}/hamlet.txt"], cache=str(tmp_path))
    with pytest.raises(ValueError, match=r"hamlet\.txt is not the Tiny Shakespeare"):
        prepare(config)


def test_download_without_network_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(textfiles, "SHAKESPEARE", "http://127.0.0.1:9/x", raising=False)
    monkeypatch.setattr("data.sources.SHAKESPEARE", "http://127.0.0.1:9/x")
    with pytest.raises(OSError, match=r"cannot download .*set 'data\.files=\[tinyshakespeare\.txt"):
        prepare(DataConfig(source="shakespeare", cache=str(tmp_path)))


# --- what users get wrong ---------------------------------------------------------------------

GOOD = b'{"text": "a"}\n'
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty.txt": (b"", "is empty"),
    "latin1.txt": (b"good\n" * 7 + "caf\xe9 ".encode("latin-1") * 100, "line 8 is not UTF-8"),
    "latin1.jsonl": (GOOD + b'{"text": "caf\xe9"}\n', "line 2 is not UTF-8"),
    "not.jsonl": (GOOD + b'\n{"text": \n', "line 3 is not JSON"),
    "list.jsonl": (b'["a", "b"]\n', "line 1 has no text .* it holds a list"),
    "null.jsonl": (GOOD + b'{"text": null}\n', "line 2 has no text"),
    "missing.jsonl": (GOOD * 4 + b'{"body": "a"}\n', "line 5 has no text .* it holds body"),
    "short.txt.gz": (gzip.compress(os.urandom(5000))[:3000], r"is not a whole \.gz file"),
    "plain.txt.gz": (b"this was never compressed", r"is not a whole \.gz file"),
    "plain.jsonl.xz": (b"neither was this", r"is not a whole \.xz file"),
    "short.jsonl.xz": (lzma.compress(GOOD * 5000)[:-40], r"is not a whole \.xz file"),
    "damaged.jsonl.xz": (
        lzma.compress(bytes(os.urandom(5000)))[:2000] + bytes(3000), r"is not a whole \.xz file"
    ),
    "none.parquet": (b"PAR1 and then nothing", r"is not a whole \.parquet file"),
    "table.csv": (b"a,b\n", "is none of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_unusable_files_are_named(config: DataConfig, tmp_path: Path, name: str) -> None:
    raw, message = BROKEN[name]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=rf"{name} {message}") as caught:
        prepare(replace(config, files=[str(tmp_path / name)]))
    assert len(str(caught.value).splitlines()) == 1
    cache = Path(config.cache)
    assert not cache.exists() or not list(cache.glob("text*"))  # nothing half-finished


def test_lines_are_counted_from_the_start_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the file was cut into pieces."""
    monkeypatch.setattr(textfiles, "PIECE_BYTES", 100)
    (tmp_path / "long.jsonl").write_bytes(GOOD * 1000 + b"{\n" + GOOD * 1000)
    with pytest.raises(ValueError, match=r"long\.jsonl line 1001 is not JSON"):
        documents(DataConfig(source="text", files=[str(tmp_path / "long.jsonl")]))


def test_broken_tables_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    config = DataConfig(source="text", files=[str(path)])
    rows = ["some text", *DOCUMENTS, None, "more"]
    pq.write_table(pa.table({"text": rows, "url": rows}), path, row_group_size=50)
    with pytest.raises(
        ValueError, match=r"a\.parquet row 202 has no text at data\.text_field=text"
    ):
        documents(config)
    with pytest.raises(ValueError, match=r"a\.parquet has no column .*=body; it holds text, url"):
        documents(replace(config, text_field="body"))
    raw = path.read_bytes()
    path.write_bytes(raw[:200] + bytes(300) + raw[500:])
    with pytest.raises(ValueError, match=r"a\.parquet is not a whole \.parquet file"):
        documents(config)


@pytest.mark.parametrize("entry", ["missing.txt", "*.nothing", "empty_folder"])
def test_missing_files_are_named(config: DataConfig, tmp_path: Path, entry: str) -> None:
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(FileNotFoundError, match=entry.replace("*", r"\*")):
        prepare(replace(config, files=[str(tmp_path / entry)]))

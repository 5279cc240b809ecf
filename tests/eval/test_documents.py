"""Rows come from a file, packed or not, or from the hub; what is missing is said in one line."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pytest

from eval.documents import read_documents

ROWS = [{"text": "caf\u00e9"}, {"text": "line\u2028separator"}, {"text": "third"}]


def read(file: Path | None, limit: int | None = None) -> list[dict[str, str]]:
    return read_documents(file and str(file), "user/set", "test", limit, "data_file")


def test_packed_or_not(tmp_path: Path) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    packed = {"": text, ".xz": lzma.compress(text), ".gz": gzip.compress(text)}
    for suffix, content in packed.items():
        file = tmp_path / f"rows.jsonl{suffix}"
        file.write_bytes(content)
        assert read(file) == ROWS
        assert read(file, limit=2) == ROWS[:2]
    (tmp_path / "cut.jsonl.xz").write_bytes(packed[".xz"][:-20])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.xz is not JSON lines"):
        read(tmp_path / "cut.jsonl.xz")


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="limit=0: expected a positive number"):
        read(None, limit=0)
    with pytest.raises(FileNotFoundError, match=r"rows does not exist: expected a \.jsonl"):
        read(tmp_path / "rows")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError) as error:
        read(None)
    said = str(error.value)
    assert said.startswith("the data set user/set (test) cannot be had from the hub")
    assert said.endswith("give a local file with data_file=") and "\n" not in said

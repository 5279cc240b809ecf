"""Data sets of the hub, read from local files of the same schema: the hub itself is never asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preparation import DOCUMENTS, content, texts

from data import DataConfig, huggingface
from data.compose import compose_data
from data.huggingface import PUBLISHED, check_published, permuted_rows
from data.preparation import merge, prepare, prepare_share
from data.shards import Manifest, open_split


def write_parquet(folder: Path, rows: list[str], files: int = 3) -> list[str]:
    """OpenWebText's schema: one column `text`, several files of several row groups."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, part in enumerate(np.array_split(np.array(rows, object), files)):
        path = folder / f"train-{index:05d}-of-{files:05d}.parquet"
        pq.write_table(pa.table({"text": part.tolist()}), path, row_group_size=17)
        paths.append(str(path))
    return paths


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return DataConfig(
        source="huggingface", name="Skylion007/openwebtext", split_by="permutation",
        files=write_parquet(tmp_path / "files", DOCUMENTS), tokenizer="bytes", val_fraction=0.1,
        shard_tokens=500, cache=str(tmp_path / "cache"),
    )  # fmt: skip


# --- nanoGPT's split --------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 400), st.floats(0.001, 0.9), st.integers(0, 2**32))
def test_permuted_rows_are_those_of_datasets(rows: int, fraction: float, seed: int) -> None:
    if not 0 < np.ceil(fraction * rows) < rows:
        return
    whole = datasets.Dataset.from_dict({"row": list(range(rows))})
    parts = whole.train_test_split(test_size=fraction, seed=seed, shuffle=True)
    assert permuted_rows(rows, fraction, seed).tolist() == sorted(parts["test"]["row"])


def test_openwebtext_is_split_as_nanogpt_splits_it(config: DataConfig) -> None:
    """Against datasets' own reader and split; each split in the order of the source."""
    whole = datasets.load_dataset("parquet", data_files=config.files, split="train")
    whole = whole.add_column("row", list(range(len(whole))))
    parts = whole.train_test_split(test_size=0.1, seed=2357, shuffle=True)
    expected = {
        ours: "".join(f"{text}|" for text in parts[theirs].sort("row")["text"])
        for ours, theirs in (("train", "train"), ("val", "test"))
    }
    folder = prepare(config)
    assert texts(folder) == expected
    assert Manifest.load(folder).splits["val"].documents == 20


def test_published_counts_are_those_of_the_configuration() -> None:
    """data=openwebtext is held to nanoGPT's counts, unless something that decides them differs."""
    config = compose_data(["data=openwebtext"])
    known = PUBLISHED[0]
    assert {key: getattr(config, key) for key in known.settings} == known.settings
    assert sum(known.tokens.values()) == 9_035_582_198 + 4_434_897
    found: dict[str, Any] = dict(known.settings)
    check_published(found, known.documents, known.tokens)
    wrong = {**known.tokens, "val": 4_434_896}
    with pytest.raises(
        ValueError, match=r"9,035,582,198 and 4,434,897 \(nanoGPT.*data\.check=false"
    ):
        check_published(found, known.documents, wrong)
    with pytest.raises(ValueError, match="8,013,769"):
        check_published(found, 1000, wrong)
    for change in ({"tokenizer": "bytes"}, {"dedup": True}, {"split_seed": 1}):
        check_published({**found, **change}, known.documents, wrong)
    check_published({**found, "files": ["some"]}, 1000, wrong)  # a part of it
    with pytest.raises(ValueError, match="expected"):
        check_published({**found, "files": ["all"]}, known.documents, wrong)


def test_real_openwebtext(shared: Path, tmp_path: Path) -> None:
    """The thousand documents of the sample, as .jsonl.xz and as parquet: the same tokens."""
    sample = shared / "data" / "openwebtext_sample.jsonl.xz"
    folders = []
    rows = datasets.load_dataset("json", data_files=str(sample), split="train")["text"]
    for files in ([str(sample)], write_parquet(tmp_path / "parquet", list(rows), files=4)):
        config = compose_data(["data=openwebtext", "data.val_fraction=0.005"])
        try:
            folders.append(prepare(replace(config, files=files, cache=str(tmp_path / "cache"))))
        except FileNotFoundError as error:
            pytest.skip(f"no GPT-2 vocabulary on this machine: {error}")
    infos = [Manifest.load(folder).splits for folder in folders]
    assert infos[0] == infos[1]
    assert (infos[0]["train"].documents, infos[0]["val"].documents) == (995, 5)
    assert sum(info.tokens for info in infos[0].values()) == 1_053_999 + 1000
    assert all(split.read(len(split) - 1, 1) == 50256 for split in map_splits(folders[0]))


def map_splits(folder: Path) -> list[Any]:
    return [open_split(folder, name) for name in ("train", "val")]


# --- other data sets --------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A data set laid out like one of the hub: two configurations, one with two splits."""
    folder = tmp_path / "TinyWeb"
    write_parquet(folder / "sample", DOCUMENTS[:150], files=2)
    write_parquet(folder / "sample_validation", DOCUMENTS[150:], files=1)
    write_parquet(folder / "other", ["something else"] * 5, files=1)
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: sample-10BT\n  data_files:\n"
        "  - {split: train, path: sample/*}\n  - {split: validation, path: sample_validation/*}\n"
        "- config_name: other\n  data_files:\n  - {split: train, path: other/*}\n---\n# TinyWeb\n"
    )
    return folder


@pytest.fixture
def tiny_web(repository: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(
        source="huggingface", name=str(repository), subset="sample-10BT", tokenizer="bytes",
        val_split="validation", cache=str(tmp_path / "cache"), shard_tokens=500,
    )  # fmt: skip


def test_a_split_of_its_own_is_used(tiny_web: DataConfig) -> None:
    folder = prepare(tiny_web)
    assert folder.name.startswith("TinyWeb-sample-10BT-bytes-")
    assert texts(folder) == {
        "train": "".join(f"{text}|" for text in DOCUMENTS[:150]),
        "val": "".join(f"{text}|" for text in DOCUMENTS[150:]),
    }


def test_workers_share_the_files(tiny_web: DataConfig, tmp_path: Path) -> None:
    alone = content(prepare(replace(tiny_web, dir=str(tmp_path / "alone"))))
    for index in (3, 1, 2):
        folder = prepare_share(replace(tiny_web, worker=f"{index}/3"))
    assert folder is not None and content(folder) == alone
    assert merge(tiny_web) == folder


def test_rows_are_joined_to_documents(tmp_path: Path) -> None:
    """As WikiText's lines are to articles."""
    rows = [
        "",
        " = Cat = \n",
        "",
        " A cat .\n",
        " = = Uses = = \n",
        " = Dog = \n",
        " A dog .\n",
    ] * 9
    config = DataConfig(
        source="huggingface", files=write_parquet(tmp_path / "w", [*rows[:-1], " A wolf .\n"], 1),
        document_start="^ = [^=]", val_fraction=0.5, cache=str(tmp_path / "c"),
    )  # fmt: skip
    decoded = texts(prepare(config))
    documents = sorted("".join(decoded.values()).split("|")[:-1])
    cat = " = Cat = \n A cat .\n = = Uses = = \n"
    assert documents == sorted(
        [cat] * 9 + [" = Dog = \n A dog .\n"] * 8 + [" = Dog = \n A wolf .\n"]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subset": "sample-1BT"}, "sample-1BT.*set data.subset to one of those"),
        ({"subset": None}, "set data.subset to one of those"),
        ({"split": "test", "val_split": None}, "test.*set data.split"),
        ({"val_split": "valid"}, "valid.*set data.split and data.val_split"),
        ({"text_field": "body"}, "no column data.text_field=body; it holds text"),
        ({"name": None}, "data.name is empty"),
        ({"document_start": "(", "val_split": None}, r"data.document_start=\( is not a pattern"),
        ({"split_by": "permutation"}, "goes neither with data.val_split"),
    ],
)
def test_mistakes_end_in_one_line(
    tiny_web: DataConfig, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        prepare(replace(tiny_web, **change))
    assert len(str(caught.value).splitlines()) == 1


def test_rows_without_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None, "b"]}), path)
    config = DataConfig(source="huggingface", files=[str(path)], cache=str(tmp_path / "c"))
    with pytest.raises(ValueError, match=r"row 2 of a file has no text at data\.text_field=text"):
        prepare(config)
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"data\.files=.*a\.parquet.* cannot be read"):
        prepare(config)
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="are of several kinds"):
        prepare(replace(config, files=[str(path), f"{tmp_path}/b.jsonl"]))


# --- the network ------------------------------------------------------------------------------


def test_without_network_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    config = DataConfig(source="huggingface", name="a/b", cache=str(tmp_path))
    with pytest.raises(OSError, match=r"data\.name=a/b cannot be read .*'data\.files=\[") as caught:
        prepare(config)
    assert len(str(caught.value).splitlines()) == 1


def refuse(*arguments: object, **keywords: object) -> None:
    raise ConnectionError("no route\nto the hub")


class _Info:
    sha = "0123456789" * 4


def test_the_commit_is_fixed_when_the_work_begins(
    tiny_web: DataConfig, repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The branch may move on while it is read, and a finished data set needs no network at all."""
    asked: list[str | None] = []
    opened: list[str | None] = []

    def dataset_info(self: object, name: str, revision: str | None = None) -> _Info:
        asked.append(revision)
        return _Info()

    arguments = huggingface._Hub._arguments

    def from_folder(self: Any) -> dict[str, Any]:
        opened.append(arguments(self)["revision"])
        return {"path": str(repository), "name": "sample-10BT"}

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr(huggingface._Hub, "_arguments", from_folder)
    config = replace(tiny_web, name="someone/tiny-web", revision="v1.0")
    prepare_share(replace(config, worker="1/2"))
    folder = prepare(config)
    assert asked == ["v1.0"] and set(opened) == {_Info.sha}
    manifest = Manifest.load(folder)
    assert manifest.settings["found"] == {"commit": _Info.sha}
    assert manifest.settings["revision"] == "v1.0"
    monkeypatch.setattr(huggingface, "_open", refuse)
    assert prepare(config) == folder
    assert json.loads((folder / "manifest.json").read_text())["settings"]["name"] == config.name

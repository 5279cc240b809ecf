"""A corpus is its splits, opened whatever it is made of, and reads them as its settings say."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data import DataConfig
from data.bigram import bigram_bits_per_byte
from data.corpus import KINDS, open_corpus
from data.documents import document_numbers
from data.order import create_order
from data.preparation import prepare
from data.shards import open_split


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    (tmp_path / "a.txt").write_text("".join(f"line {i} of a text\n" for i in range(400)))
    return DataConfig(source="text", files=[str(tmp_path / "a.txt")], cache=str(tmp_path / "c"))


def test_text_is_prepared_and_opened(config: DataConfig) -> None:
    corpus = open_corpus(config)
    folder = prepare(config)
    for mine, name in [(corpus.train, "train"), (corpus.val, "val")]:
        split = open_split(folder, name)
        np.testing.assert_array_equal(mine.read(0, len(mine)), split.read(0, len(split)))
    assert str(corpus) == (
        f"{len(corpus.train):,} tokens for training, {len(corpus.val):,} for validation "
        f"(bytes tokenizer), in {folder}"
    )
    assert corpus.bigram_bits_per_byte() == bigram_bits_per_byte(corpus.train, corpus.val)


def test_the_same_folder_by_its_name_alone(config: DataConfig) -> None:
    corpus = open_corpus(config)
    again = open_corpus(DataConfig(source="shards", dir=str(corpus.train.folder)))
    assert again.fingerprint == corpus.fingerprint
    assert again.train.bytes == corpus.train.bytes


def test_fingerprint_is_the_one_that_checkpoints_hold(config: DataConfig) -> None:
    """Of the shards' sha256, train then val; a change would cut every run off from its data."""
    corpus = open_corpus(config)
    shards = [shard.sha256 for split in (corpus.train, corpus.val) for shard in split.shards]
    assert corpus.fingerprint == hashlib.sha256(json.dumps(shards).encode()).hexdigest()


@pytest.mark.parametrize("sampling", ["shuffled", "random_crops", "sequential"])
def test_order_and_loader_follow_the_settings(config: DataConfig, sampling: str) -> None:
    corpus = open_corpus(replace(config, sampling=sampling, prefetch=2))
    order = corpus.order(16, 6, seed=5)
    plain = create_order(
        sampling, tokens=len(corpus.train), context=16, global_batch=6, seed=5, repeat=True
    )
    assert order.offsets(9).tolist() == plain.offsets(9).tolist()
    with corpus.loader(order, rows=slice(2, 4)) as loader:
        assert loader.prefetch == 2
        expected = [corpus.train.read(offset, 17) for offset in plain.offsets(9)[2:4].tolist()]
        assert loader.batch(9).tolist() == [row.tolist() for row in expected]


def test_documents(config: DataConfig) -> None:
    tokens = torch.tensor([[1, 256, 2, 256, 256]])
    assert open_corpus(config).documents(tokens) is None
    masked = open_corpus(replace(config, documents="masked")).documents(tokens)
    assert masked is not None
    assert torch.equal(masked, document_numbers(tokens, 256))
    assert masked.tolist() == [[0, 0, 1, 1, 2]]


def test_kinds() -> None:
    assert {"text", "stdlib", "shards", "mixture"} <= set(KINDS)

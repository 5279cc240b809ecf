"""The bigram floor equals a count by hand."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data import bigram
from data.bigram import bigram_bits_per_byte
from data.shards import SPLITS, Manifest, ShardWriter, Split, SplitInfo, open_split

EOT = 256


def write(
    folder: Path,
    texts: dict[str, list[bytes]],
    tokenizer: str = "bytes",
    shard_tokens: int = 7,
) -> list[Split]:
    splits = {}
    for name in SPLITS:
        ids = [i for text in texts[name] for i in (*text, EOT)]
        with ShardWriter(folder, name, 257, shard_tokens) as writer:
            writer.append(np.array(ids))
        shards = tuple(writer.shards)
        size = sum(map(len, texts[name]))
        splits[name] = SplitInfo(len(ids), size, len(texts[name]), shards)
    Manifest("test", tokenizer, "f", 257, EOT, {}, splits).save(folder)
    return [open_split(folder, name) for name in SPLITS]


def by_hand(train: list[bytes], val: list[bytes]) -> float:
    """One pair at a time, from the definition."""
    pairs: Counter[tuple[int, int]] = Counter()
    for text in train:
        ids = [EOT, *text, EOT]
        pairs.update(itertools.pairwise(ids))
    totals: Counter[int] = Counter()
    for (first, _), count in pairs.items():
        totals[first] += count
    bits = 0.0
    for text in val:
        ids = [EOT, *text, EOT]
        for i, j in itertools.pairwise(ids):
            bits -= math.log2((pairs[i, j] + 1) / (totals[i] + 257))
    return bits / sum(map(len, val))


TRAIN = [b"abracadabra", b"the cat sat on the mat", b"\x00\xff\xfe", b"a"]
VAL = [b"abba", b"that cat", b"z"]


@pytest.mark.parametrize("chunk", [1, 2, 5, 1 << 22])
def test_equals_a_count_by_hand(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bigram, "CHUNK", chunk)
    train, val = write(tmp_path, {"train": TRAIN, "val": VAL})
    assert bigram_bits_per_byte(train, val) == pytest.approx(by_hand(TRAIN, VAL), rel=1e-12)


def test_random_bytes_cost_eight_bits(tmp_path: Path) -> None:
    """Nothing to learn: no less than 8 bits, and little more once the table is filled."""
    rng = np.random.default_rng(0)
    texts = {name: [rng.bytes(2_000_000 if name == "train" else 20_000)] for name in SPLITS}
    train, val = write(tmp_path, texts, shard_tokens=10**7)
    bits = bigram_bits_per_byte(train, val)
    assert bits is not None and 8.0 < bits < 8.05


def test_other_tokenizers_have_no_bytes(tmp_path: Path) -> None:
    train, val = write(tmp_path, {"train": TRAIN, "val": VAL}, tokenizer="gpt2")
    assert bigram_bits_per_byte(train, val) is None

"""What was written is read back whole, across files; what is not whole is refused by name."""

from __future__ import annotations

import hashlib
import json
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import shards
from data.shards import (
    HEADER_BYTES,
    MANIFEST,
    SPLITS,
    Manifest,
    ShardWriter,
    SplitInfo,
    check_vocab,
    open_split,
    read_shard,
    token_dtype,
)


def write(folder: Path, ids: np.ndarray, shard_tokens: int = 10, vocab_size: int = 257) -> Path:
    """A data set with the same ids in both splits, written in uneven pieces."""
    splits = {}
    for split in SPLITS:
        with ShardWriter(folder, split, vocab_size, shard_tokens) as writer:
            for piece in np.array_split(ids, 3):
                writer.append(piece)
        splits[split] = SplitInfo(len(ids), len(ids), 1, tuple(writer.shards))
    Manifest(
        name="test", tokenizer="bytes", tokenizer_fingerprint="f", vocab_size=vocab_size, eot=256,
        settings={}, splits=splits,
    ).save(folder)  # fmt: skip
    return folder


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 257, 37)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(1, 61), st.data())
def test_any_window_of_any_sharding(
    tmp_path_factory: pytest.TempPathFactory, n: int, shard_tokens: int, data: st.DataObject
) -> None:
    ids = np.arange(n) * 7 % 257
    split = open_split(write(tmp_path_factory.mktemp("s"), ids, shard_tokens), "train")
    start = data.draw(st.integers(0, n))
    count = data.draw(st.integers(0, n - start))
    window = split.read(start, count)
    assert window.dtype == np.int64
    assert (len(split), len(split.shards)) == (n, -(-n // shard_tokens))
    np.testing.assert_array_equal(window, ids[start : start + count])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_ids_take_the_smallest_type(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    ids = np.array([0, vocab_size - 1])
    split = open_split(write(tmp_path, ids, vocab_size=vocab_size), "val")
    assert token_dtype(vocab_size).name == split.shards[0].dtype == dtype
    np.testing.assert_array_equal(split.read(0, 2), ids)


def test_layout_of_a_file(tmp_path: Path) -> None:
    """The format, byte by byte: others must be able to read it."""
    write(tmp_path, np.array([1, 256, 2]))
    raw = (tmp_path / "train_00000.bin").read_bytes()
    assert struct.unpack_from("<8sIIQ", raw) == (b"gpt2shrd", 1, 2, 3)
    assert raw[24:1024] == bytes(1000)
    assert raw[1024:] == b"\x01\x00\x00\x01\x02\x00"


def test_checksums_and_manifest_round_trip(tmp_path: Path, ids: np.ndarray) -> None:
    write(tmp_path, ids)
    manifest = Manifest.load(tmp_path)
    for shard in manifest.splits["train"].shards:
        content = (tmp_path / shard.file).read_bytes()[HEADER_BYTES:]
        assert shard.sha256 == hashlib.sha256(content).hexdigest()
    before = (tmp_path / MANIFEST).read_bytes()
    manifest.save(tmp_path)
    assert (tmp_path / MANIFEST).read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_reading_beyond_the_ends(tmp_path: Path, ids: np.ndarray) -> None:
    split = open_split(write(tmp_path, ids), "train")
    for offset, n in [(-1, 2), (36, 2), (38, 0), (3, -1)]:
        with pytest.raises(IndexError, match="train split of 37"):
            split.read(offset, n)


@pytest.mark.parametrize("bad", [-1, 257])
def test_writer_refuses_ids_outside_the_vocabulary(tmp_path: Path, bad: int) -> None:
    with (
        pytest.raises(ValueError, match=r"train_00000\.bin: .*vocabulary of 257"),
        ShardWriter(tmp_path, "train", 257, 10) as writer,
    ):
        writer.append(np.array([1, 2]))
        writer.append(np.array([bad]))
    assert not list(tmp_path.glob("*.bin"))  # nothing that could be taken for complete


def test_model_with_a_smaller_vocabulary_is_refused(tmp_path: Path, ids: np.ndarray) -> None:
    split = open_split(write(tmp_path, ids), "train")
    check_vocab(split, 257)
    check_vocab(split, 50_304)
    with pytest.raises(ValueError, match="below 257, but the model's vocabulary is 256"):
        check_vocab(split, 256)


# --- damage: always one error, with the file's name -------------------------------------------

SHARD = "train_00002.bin"


def test_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"manifest\.json not found.*data\.prepare"):
        open_split(tmp_path, "train")


def test_missing_shard(tmp_path: Path, ids: np.ndarray) -> None:
    write(tmp_path, ids)
    (tmp_path / SHARD).unlink()
    with pytest.raises(FileNotFoundError, match=SHARD):
        open_split(tmp_path, "train")
    open_split(tmp_path, "val")  # the other split is whole


@pytest.mark.parametrize("size", [0, 7, 500, 1024, 1025, 1043])
def test_truncated_shard(tmp_path: Path, ids: np.ndarray, size: int) -> None:
    path = write(tmp_path, ids) / SHARD
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=SHARD):
        open_split(tmp_path, "train")


def test_header_and_size_agree_but_not_with_the_manifest(tmp_path: Path, ids: np.ndarray) -> None:
    path = write(tmp_path, ids) / SHARD
    raw = path.read_bytes()
    path.write_bytes(struct.pack("<8sIIQ", b"gpt2shrd", 1, 2, 9) + raw[24:-2])
    with pytest.raises(ValueError, match=rf"{SHARD} holds 9 ids of uint16, expected 10"):
        open_split(tmp_path, "train")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ((b"\x28\x4f\x34\x01\0\0\0\0", 1, 2, 10), "not a token file"),  # llm.c's magic, 20240520
        ((b"gpt2shrd", 2, 2, 10), "version 2"),
        ((b"gpt2shrd", 1, 3, 10), "3 bytes per id"),
        ((b"gpt2shrd", 1, 4, 10), "expected 1064"),
        ((b"gpt2shrd", 1, 2, 2**63), "expected"),
        ((b"gpt2shrd", 1, 2, 0), "0 ids"),
    ],
)
def test_foreign_or_corrupt_header(
    tmp_path: Path, ids: np.ndarray, fields: tuple[bytes, int, int, int], complaint: str
) -> None:
    path = write(tmp_path, ids) / SHARD
    path.write_bytes(struct.pack("<8sIIQ", *fields) + path.read_bytes()[24:])
    with pytest.raises(ValueError, match=rf"{SHARD}.*{complaint}"):
        open_split(tmp_path, "train")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=2000))
def test_random_bytes_are_no_shard(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("f") / "random.bin"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"random\.bin"):
        read_shard(path)


def test_damaged_ids_are_noticed_when_read(tmp_path: Path, ids: np.ndarray) -> None:
    path = write(tmp_path, ids) / SHARD
    raw = bytearray(path.read_bytes())
    raw[-1] = 0xFF
    path.write_bytes(raw)
    split = open_split(tmp_path, "train")
    np.testing.assert_array_equal(split.read(0, 29), ids[:29])
    with pytest.raises(ValueError, match=rf"{SHARD}: id 65\d+ is outside the bytes vocabulary"):
        split.read(25, 5)


def _edit(folder: Path, **fields: object) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "edit",
    [
        {"version": 2},
        {"splits": {}},
        {"splits": None},
        {"surprise": 1},
        {"splits": {"train": {"shards": [{"file": "../secret"}]}}},
    ],
)
def test_manifest_of_another_kind(tmp_path: Path, ids: np.ndarray, edit: dict[str, object]) -> None:
    write(tmp_path, ids)
    _edit(tmp_path, **edit)
    with pytest.raises(ValueError, match=r"manifest\.json is not a manifest of version 1"):
        open_split(tmp_path, "train")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '{"version": 1}'])
def test_manifest_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is not a manifest"):
        open_split(tmp_path, "train")


def test_manifest_never_points_outside_its_folder(tmp_path: Path, ids: np.ndarray) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    write(inner, ids)
    manifest = json.loads((inner / MANIFEST).read_text())
    manifest["splits"]["train"]["shards"][0]["file"] = "../train_00000.bin"
    (inner / MANIFEST).write_text(json.dumps(manifest))
    (inner / "train_00000.bin").rename(tmp_path / "train_00000.bin")
    with pytest.raises(ValueError, match="not a plain file name"):
        open_split(inner, "train")


def test_more_shards_than_file_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shard is readable although only some are mapped at a time."""
    ids = np.arange(150) % 257
    write(tmp_path, ids, shard_tokens=1)
    monkeypatch.setattr(shards, "OPEN_MAPS", 8)
    in_use = len(list(Path("/dev/fd").iterdir()))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 30, hard))
    try:
        split = open_split(tmp_path, "train")
        for _ in range(2):
            np.testing.assert_array_equal(split.read(0, 150), ids)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

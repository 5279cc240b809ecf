"""What was written is read back whole, across files; what is not whole is refused by name."""

from __future__ import annotations

import gc
import hashlib
import json
import resource
import struct
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import shards
from data.formats import HEADER_BYTES, OWN, read_layout, token_dtype
from data.shards import (
    MANIFEST,
    SPLITS,
    Manifest,
    Shard,
    ShardWriter,
    SplitInfo,
    check_vocab,
    open_split,
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
        with pytest.raises((IndexError, ValueError), match=r"train split of 37|negative"):
            split.read(offset, n)
    with pytest.raises(IndexError, match="train split of 37"):
        split.read_rows(np.array([0, 36]), np.empty((2, 2), np.int64))


def test_rows_anywhere(tmp_path: Path, ids: np.ndarray) -> None:
    split = open_split(write(tmp_path, ids), "train")
    offsets = np.array([30, 0, 9, 5, 30])
    rows = np.full((5, 7), -1)
    split.announce(offsets, 7)
    split.read_rows(offsets, rows)
    np.testing.assert_array_equal(rows, ids[offsets[:, None] + np.arange(7)])


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
        read_layout(path, OWN, token_dtype(257))


def test_damaged_ids_are_noticed_when_read(tmp_path: Path, ids: np.ndarray) -> None:
    path = write(tmp_path, ids) / SHARD
    raw = bytearray(path.read_bytes())
    raw[-1] = 0xFF
    path.write_bytes(raw)
    split = open_split(tmp_path, "train")
    np.testing.assert_array_equal(split.read(0, 29), ids[:29])
    complaint = rf"{SHARD}: id 65\d+ at position 9 is outside the bytes vocabulary"
    with pytest.raises(ValueError, match=complaint):
        split.read(25, 5)


def _edit(folder: Path, **fields: object) -> None:
    """Change a manifest as one would who knows of its checksum."""
    path = folder / MANIFEST
    edited = {**json.loads(path.read_text()), **fields}
    edited.pop("checksum", None)
    path.write_text(json.dumps(edited))


def test_manifest_of_the_first_days(tmp_path: Path, ids: np.ndarray) -> None:
    """They had no checksum."""
    before = Manifest.load(write(tmp_path, ids))
    _edit(tmp_path)
    assert Manifest.load(tmp_path) == before


def test_manifest_changed_by_hand(tmp_path: Path, ids: np.ndarray) -> None:
    path = write(tmp_path, ids) / MANIFEST
    path.write_text(path.read_text().replace('"documents": 1', '"documents": 2'))
    with pytest.raises(ValueError, match=r"manifest\.json .*its checksum does not match"):
        open_split(tmp_path, "train")


def test_unknown_counts(tmp_path: Path, ids: np.ndarray) -> None:
    manifest = Manifest.load(write(tmp_path, ids))
    assert open_split(tmp_path, "val").bytes_per_token == 1.0
    splits = {
        name: SplitInfo(split.tokens, None, None, split.shards)
        for name, split in manifest.splits.items()
    }
    _edit(tmp_path, splits=json.loads(json.dumps({k: asdict(v) for k, v in splits.items()})))
    split = open_split(tmp_path, "val")
    assert (split.bytes, split.documents, split.bytes_per_token) == (None, None, None)


SHARD_0 = {"file": "train_00000.bin", "tokens": 1, "dtype": "uint16", "sha256": ""}


@pytest.mark.parametrize(
    "edit",
    [
        {"version": 2},
        {"splits": {}},
        {"splits": None},
        {"surprise": 1},
        {"eot": 257},
        {"vocab_size": "257"},
        {"vocab_size": True},
        {"settings": []},
        *(
            {"splits": {name: {"tokens": 1, "bytes": 1, "documents": 1, "shards": shards}
                        for name in SPLITS}}
            for shards in (
                [{"file": "../secret"}],
                [{**SHARD_0, "file": "../secret"}],
                [{**SHARD_0, "file": ""}],
                [{**SHARD_0, "file": 7}],
                [{**SHARD_0, "tokens": 2}],
                [{**SHARD_0, "tokens": -1}],
                [{**SHARD_0, "tokens": 1.0}],
                [{**SHARD_0, "dtype": "float16"}],
                [{**SHARD_0, "format": "pickle"}],
                [SHARD_0],  # in both splits
                [],
                {},
            )
        ),
    ],
)  # fmt: skip
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


@pytest.mark.parametrize("raisable", [True, False])
def test_more_shards_than_file_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raisable: bool
) -> None:
    """The soft limit is raised for them; where it cannot be, only some are mapped at a time."""
    ids = np.arange(150) % 257
    write(tmp_path, ids, shard_tokens=1)
    monkeypatch.setattr(shards, "OPEN_MAPS", 8)
    in_use = len(list(Path("/dev/fd").iterdir()))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 30, hard))
    if not raisable:

        def refuse(*limits: object) -> None:
            raise ValueError

        monkeypatch.setattr(resource, "setrlimit", refuse)
    try:
        split = open_split(tmp_path, "train")
        for _ in range(2):
            np.testing.assert_array_equal(split.read(0, 150), ids)
        assert (len(list(Path("/dev/fd").iterdir())) > in_use + 100) == raisable
        del split
        gc.collect()
    finally:
        monkeypatch.undo()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def make_sparse(folder: Path, files: int, tokens: int) -> None:
    """A data set of zeros that takes no room on the disk."""
    splits = {}
    for split, count in (("train", files), ("val", 1)):
        for number in range(count):
            with open(folder / f"{split}_{number:05d}.bin", "wb") as file:
                file.write(struct.pack("<8sIIQ", b"gpt2shrd", 1, 2, tokens))
                file.truncate(HEADER_BYTES + 2 * tokens)
        found = tuple(
            Shard(f"{split}_{number:05d}.bin", tokens, "uint16", "") for number in range(count)
        )
        splits[split] = SplitInfo(count * tokens, None, None, found)
    Manifest("sparse", "gpt2", "f", 50257, 50256, {}, splits).save(folder)


HUGE = """
import json, resource, sys, time
from pathlib import Path
from data.order import create_order
from data.loader import Loader
from data.shards import open_split
began = time.perf_counter()
split = open_split(sys.argv[1], "train")
order = create_order("shuffled", tokens=len(split), context=1024, global_batch=64, seed=0)
opened = time.perf_counter() - began
def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) / 1024
with Loader(split, order) as loader:
    for step in range(100):
        assert not loader.batch(step).any()
    print(json.dumps({"seconds": opened, "tokens": len(split), "mb": anonymous()}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_hundred_billion_tokens_cost_no_more_than_a_few(tmp_path: Path) -> None:
    """The time to open, and the memory that is the process's own, of 1000 files and of one."""
    found = []
    for files in (1, 1000):
        folder = tmp_path / str(files)
        folder.mkdir()
        make_sparse(folder, files, 100_000_000)
        run = subprocess.run(
            [sys.executable, "-c", HUGE, str(folder)], cwd=Path(__file__).resolve().parents[2],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        found.append(json.loads(run.stdout))
    small, huge = found
    assert huge["tokens"] == 10**11
    assert huge["seconds"] < 1.0
    assert huge["mb"] < small["mb"] + 16  # measured: 156 against 151 to 159 MB, mostly torch

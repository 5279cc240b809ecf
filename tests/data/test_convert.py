"""A conversion changes the form, never an id."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_formats import EOT, modded, nanogpt, read
from test_shards import write

from data.convert import TARGETS, convert
from data.shards import MANIFEST, Manifest, open_split

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def ids() -> np.ndarray:
    ids = np.random.default_rng(0).integers(0, EOT, 3000)
    ids[::100] = EOT
    return ids


@pytest.fixture
def source(tmp_path: Path, ids: np.ndarray) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    nanogpt(folder, ids)
    return folder


@pytest.mark.parametrize("first", TARGETS)
@pytest.mark.parametrize("second", TARGETS)
def test_round_trips_are_bit_equal(source: Path, tmp_path: Path, first: str, second: str) -> None:
    convert(source, tmp_path / "a", first, shard_tokens=700, name="fineweb")
    convert(tmp_path / "a", tmp_path / "b", second, shard_tokens=1100, name="fineweb")
    back = convert(tmp_path / "b", tmp_path / "c", "nanogpt")
    for name in ("train.bin", "val.bin"):
        assert (back / name).read_bytes() == (source / name).read_bytes()


def test_files_of_each_form(source: Path, tmp_path: Path, ids: np.ndarray) -> None:
    def files(format: str) -> list[str]:
        folder = convert(source, tmp_path / format, format, shard_tokens=1024, name="fineweb")
        return sorted(path.name for path in folder.iterdir())

    assert files("nanogpt") == ["train.bin", "val.bin"]
    train = [f"train_{number:05d}.bin" for number in range(3)]
    assert files("own") == [MANIFEST, *train, *(n.replace("train", "val") for n in train)]
    assert files("llmc") == [
        *(f"fineweb_train_{number:06d}.bin" for number in (1, 2, 3)),
        *(f"fineweb_val_{number:06d}.bin" for number in (0, 1, 2)),
    ]
    raw = (tmp_path / "llmc" / "fineweb_train_000003.bin").read_bytes()
    assert struct.unpack_from("<iii", raw) == (20240520, 1, 952) and len(raw) == 1024 + 2 * 952
    np.testing.assert_array_equal(np.frombuffer(raw, "<u2", offset=1024), ids[2048:])


def test_own_form_of_foreign_files(source: Path, tmp_path: Path) -> None:
    """Documents can be counted, their text not."""
    manifest = Manifest.load(convert(source, tmp_path / "own", "own"))
    assert (manifest.tokenizer, manifest.eot) == ("gpt2", EOT)
    assert manifest.splits["train"].documents == 30
    assert manifest.splits["train"].bytes is None
    assert read(tmp_path / "own").val.bytes_per_token is None


def test_own_to_own_keeps_what_is_known(tmp_path: Path) -> None:
    before = Manifest.load(write(tmp_path, np.arange(100) % 257))
    after = Manifest.load(convert(tmp_path, tmp_path / "out", "own", shard_tokens=64))
    assert [len(after.splits[s].shards) for s in ("train", "val")] == [2, 2]
    assert after.splits["train"].bytes == before.splits["train"].bytes == 100
    assert after.settings == {"converted_from": tmp_path.name}


@pytest.mark.parametrize("format", ["nanogpt", "llmc"])
def test_ids_of_32_bits(tmp_path: Path, format: str) -> None:
    ids = np.arange(100) * 700
    write(tmp_path, ids, shard_tokens=64, vocab_size=100_000)
    files = sorted(convert(tmp_path, tmp_path / "out", format, name="x").glob("*train*"))
    offset = {"nanogpt": 0, "llmc": 1024}[format]
    found = np.concatenate([np.fromfile(path, "<u4", offset=offset) for path in files])
    np.testing.assert_array_equal(found, ids)


def test_damage_is_refused_and_leaves_nothing(
    source: Path, tmp_path: Path, ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An id that opening a folder did not look at."""
    monkeypatch.setattr("data.foreign.LOOK_AT", 1000)
    monkeypatch.setattr("data.foreign.STRETCH", 10)
    ids[1001] = 60_000
    nanogpt(source, ids)
    monkeypatch.setattr("data.foreign.STRETCHES", 3)
    with pytest.raises(ValueError, match=r"train\.bin: id 60000 at position 1001"):
        convert(source, tmp_path / "out", "own")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_nothing_is_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out", "own")
    with pytest.raises(ValueError, match="exists and is not empty"):
        convert(source, tmp_path / "out", "own")
    with pytest.raises(ValueError, match="format=numpy: expected one of own, nanogpt, llmc"):
        convert(source, tmp_path / "more", "numpy")
    with pytest.raises(ValueError, match="expected a plain name"):
        convert(source, tmp_path / "more", "llmc", name="../x")


def test_disk_too_small(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100}))
    with pytest.raises(OSError, match=r"0\.0 GB needed, 0\.0 GB free"):
        convert(source, tmp_path / "out", "own")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data.convert", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


def test_command(tmp_path: Path, ids: np.ndarray) -> None:
    source = tmp_path / "source"
    source.mkdir()
    modded(source, ids)
    done = run(str(source), f"out={tmp_path}/out", "format=nanogpt")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "dir": f"{tmp_path}/out", "files": 2, "bytes": 12000
    }  # fmt: skip
    np.testing.assert_array_equal(np.fromfile(tmp_path / "out/train.bin", "<u2"), ids)
    for words, complaint in [
        (["format=own"], "out=DIR and format= are needed"),
        ([f"out={tmp_path}/x", "format=own", "colour=red"], "unknown setting colour"),
        ([f"out={tmp_path}/x", "format=own", "tokenizer=bytes"], "outside the vocabulary"),
    ]:
        refused = run(str(source), *words)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr.startswith("error: ") and complaint in refused.stderr


def test_own_split_is_readable_by_path(source: Path, tmp_path: Path) -> None:
    folder = convert(source, tmp_path / "own", "own", shard_tokens=500)
    split = open_split(folder, "train")
    file, position = split.locate(1234)
    assert (file.path.name, position) == ("train_00002.bin", 234)

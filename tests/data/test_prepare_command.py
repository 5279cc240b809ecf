"""`python -m data.prepare`: one table and a line of JSON, or one line of what is wrong."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from preparation import content, small_config
from system import ROOT, Outcome, module

from data import DataConfig
from data.preparation import prepare
from data.shards import open_split
from data.verify import verify


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return replace(small_config(tmp_path), dir=str(tmp_path / "out"))


def command(*words: str) -> Outcome:
    return module("data.prepare", *words, folder=ROOT)


def overrides(config: DataConfig) -> list[str]:
    return [
        "data=text", f"data.files=[{config.files[0]}]", "data.tokenizer=bytes",
        "data.val_fraction=0.1", "data.shard_tokens=500", f"data.dir={config.dir}",
    ]  # fmt: skip


def test_prepare_then_verify(config: DataConfig, tmp_path: Path) -> None:
    good = command(*overrides(config))
    assert good.code == 0, good.err
    result = json.loads(good.out.splitlines()[-1])
    assert result == {
        "dir": config.dir,
        "train_tokens": len(open_split(tmp_path / "out", "train")),
        "val_tokens": len(open_split(tmp_path / "out", "val")),
    }
    assert good.err == ""  # no progress bar where there is no terminal
    for words in (overrides(config), [str(config.dir)]):
        verified = command("verify", *words)
        assert verified.code == 0, verified.err
        assert "files are as they were written" in verified.out
        assert json.loads(verified.out.splitlines()[-1]) == result


def test_workers_then_merge(config: DataConfig, tmp_path: Path) -> None:
    early = command("merge", *overrides(config))
    assert early.code == 1 and "no worker has prepared anything yet" in early.err
    first = command(*overrides(config), "data.worker=2/2")
    assert json.loads(first.out) == {"dir": None, "worker": "2/2"}
    last = command(*overrides(config), "data.worker=1/2")
    assert json.loads(last.out.splitlines()[-1])["dir"] == config.dir
    alone = prepare(replace(config, dir=str(tmp_path / "alone")))
    assert content(tmp_path / "out") == content(alone)
    assert command("merge", *overrides(config)).code == 0  # it is there already


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=text"], "error: data.files is empty"),
        (["data=txt"], "error: .*txt"),
        (["data=text", "data.fils=[a]"], "error: .*fils"),
        (["verify", "nowhere"], "error: .*manifest.json not found"),
        (["data=huggingface"], "error: data.name is empty"),
    ],
)
def test_mistakes_end_in_one_line(words: list[str], message: str) -> None:
    run = command(*words)
    assert run.code == 1 and len(run.err.splitlines()) == 1
    assert re.match(message, run.err)


@pytest.mark.parametrize("position", [0, -2])
def test_verify_names_the_damaged_files(config: DataConfig, position: int) -> None:
    folder = prepare(config)
    assert verify(folder) == len(list(folder.glob("*.bin")))
    for name in ("train_00001.bin", "val_00000.bin"):
        raw = bytearray((folder / name).read_bytes())
        raw[position if position < 0 else 1024] ^= 1
        (folder / name).write_bytes(raw)
    with pytest.raises(ValueError, match=r"train_00001\.bin, val_00000\.bin changed after"):
        verify(folder)

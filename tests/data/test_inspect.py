"""What is shown of the data is what the trainer reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from system import Outcome, module

from data import DataConfig
from data.corpus import Corpus, open_corpus
from data.documents import document_lengths
from data.inspect import decode, lengths_line, plot_lengths, samples, step_text
from data.tokenizer import get_tokenizer

TEXTS = [f"Document {i} says: {'la ' * (i % 7)}end." for i in range(60)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("text")
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return DataConfig(source="text", files=[str(path)], cache=str(folder), val_fraction=0.2)


@pytest.fixture(scope="module")
def corpus(config: DataConfig) -> Corpus:
    return open_corpus(config)


def test_step_is_what_the_loader_gives(corpus: Corpus) -> None:
    """Step s of the metrics is the s-th update, which reads batch s - 1."""
    order = corpus.order(16, 5, seed=3)
    with corpus.loader(order) as loader:
        for step in (1, 2, 1234):
            shown = step_text(corpus, step, 16, 5, 3)
            texts = [decode(corpus.tokenizer, row) for row in loader.batch(step - 1).numpy()]
            assert [text.partition("\n")[2] for text in shown] == texts
            assert [text.split(":")[0] for text in shown] == [
                f"--- step {step}, row {row}" for row in range(5)
            ]
    assert len(step_text(corpus, 7, 16, 5, 3, rows=2)) == 2
    with pytest.raises(ValueError, match="step=0: expected 1 or more"):
        step_text(corpus, 0, 16, 5, 3)


def test_lengths_of_documents(corpus: Corpus) -> None:
    """Their text and an end-of-text each; a limit leaves out what does not end before it."""
    lengths = document_lengths(corpus.train)
    assert lengths.sum() == len(corpus.train)
    assert len(lengths) == corpus.train.documents
    assert set(lengths) <= {len(text) + 1 for text in TEXTS}
    some = document_lengths(corpus.train, 100)
    np.testing.assert_array_equal(some, lengths[: len(some)])
    assert some.sum() <= 100 < some.sum() + lengths[len(some)]
    assert lengths_line(np.array([1, 2, 30])).startswith("3 documents: 11.0 tokens on average, med")
    assert document_lengths(corpus.train, 3).size == 0


def test_ends_of_documents_are_shown() -> None:
    tokenizer = get_tokenizer("bytes")
    ids = np.array([256, *b"one", 256, *b"two", 256])
    assert decode(tokenizer, ids) == "<|endoftext|>one<|endoftext|>two<|endoftext|>"


def test_samples_are_the_same_for_the_same_seed(corpus: Corpus) -> None:
    one, same, other = (samples(corpus.train, corpus.tokenizer, 3, 40, seed) for seed in (1, 1, 2))
    assert one == same != other
    assert len(one) == 3


@pytest.mark.parametrize("lengths", [[1], [5, 5, 5], [1, 2, 3, 100_000]])
def test_picture(tmp_path: Path, lengths: list[int]) -> None:
    plot_lengths(np.array(lengths), "some", tmp_path / "new" / "lengths.png")
    assert (tmp_path / "new" / "lengths.png").read_bytes().startswith(b"\x89PNG")


def run(folder: Path, *words: str) -> Outcome:
    return module("data.inspect", *words, f"picture={folder}/lengths.png", folder=folder)


def test_command(config: DataConfig, corpus: Corpus, tmp_path: Path) -> None:
    overrides = ["data=text", f"data.files={config.files}", f"data.cache={config.cache}"]
    overrides.append("data.val_fraction=0.2")
    done = run(tmp_path, *overrides, "samples=2", "sample_tokens=30")
    last = done.result
    assert f"{len(corpus.train):,} tokens for training" in done.out
    assert "train_00000.bin" in done.out and done.out.count("\n--- ") == 2
    assert last["documents_read"] == corpus.train.documents
    assert last["picture"] == f"{tmp_path}/lengths.png" and Path(last["picture"]).exists()


def test_command_on_a_run(config: DataConfig, corpus: Corpus, tmp_path: Path) -> None:
    """All that decides a step's tokens is in the run's config.yaml."""
    from dataclasses import asdict

    from omegaconf import OmegaConf

    tree = {"seed": 9, "data": asdict(config), "model": {"context": 12}}
    OmegaConf.save(
        OmegaConf.create({**tree, "train": {"global_batch": 3}}), tmp_path / "config.yaml"
    )
    done = run(tmp_path, f"run={tmp_path}", "step=1234")
    assert done.code == 0, done.err
    for text in step_text(corpus, 1234, 12, 3, 9):
        assert text in done.out
    error = run(tmp_path, f"run={tmp_path}/nowhere", "step=1").error
    assert error.startswith(f"{tmp_path}/nowhere/config.yaml not found")

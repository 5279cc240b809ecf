"""Training from somebody else's weights begins where they ended."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from system import Command, here, metrics

from model import GPT2, GPT2Config
from model.huggingface import to_huggingface
from runtime import checkpoint

SOURCE = GPT2Config(2, 2, 32, context=48, vocab_size=257, bias=False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    torch.manual_seed(5)
    model = GPT2(SOURCE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    to_huggingface(model, folder)
    return folder


def command(corpus: Command, source: Path, run: Path, *more: str) -> Command:
    train = ["steps=2", "global_batch=4", "eval_every=2", "eval_tokens=640", "checkpoint_every=1"]
    train += ["sample_tokens=0", "device=cpu", "threads=1"]
    chosen = ["model=pretrained", f"model.init_from={source}", "logging.picture=false"]
    settings = (*chosen, *(f"train.{t}" for t in train), *corpus, f"run.dir={run}", "optim.lr=1e-9")
    return (*settings, "logging.every=1", *more)


def test_the_first_step_stands_at_the_source(corpus: Command, source: Path, tmp_path: Path) -> None:
    """At a learning rate of nothing the weights stay those of the folder, cropped and padded."""
    run = here(*command(corpus, source, tmp_path / "run", "model.context=32")).dir
    tensors, _ = checkpoint.load(run / "checkpoints" / "step_00000002")
    torch.manual_seed(5)
    for name, tensor in GPT2(SOURCE).state_dict().items():
        expected = 3 * tensor
        found = tensors[f"model.{name}"]
        rows = min(len(found), len(expected))
        torch.testing.assert_close(found[:rows], expected[:rows], rtol=0, atol=1e-6)
        assert torch.count_nonzero(found[rows:]) == 0
    assert tensors["model.transformer.wpe.weight"].shape == (32, 32)
    assert "n_layer: 2" in (run / "config.yaml").read_text()  # the run knows its shape by itself


def test_a_run_that_continues_reads_its_own_weights(
    corpus: Command, source: Path, tmp_path: Path
) -> None:
    how = ("optim.lr=1e-2", "train.steps=4")
    whole = here(*command(corpus, source, tmp_path / "whole"), *how).dir
    here(*command(corpus, source, tmp_path / "parts"), "optim.lr=1e-2")
    parts = here(
        *command(corpus, source, tmp_path / "parts"), *how, f"train.resume={tmp_path}/parts"
    ).dir
    assert metrics(parts)[-1]["train/loss"] == metrics(whole)[-1]["train/loss"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.n_layer=3", "model.n_layer is 3, but .* has 2"),
        ("model.context=64", "model.context is 64, but .* has positions for 48"),
        ("model.init_from=/nowhere", "/nowhere does not exist: expected"),
    ],
)
def test_mistakes(
    corpus: Command, source: Path, tmp_path: Path, override: str, message: str
) -> None:
    outcome = here(*command(corpus, source, tmp_path / "run"), override)
    assert re.search(message, outcome.error)
    assert not (tmp_path / "run").exists()

"""Pretrained weights as a start: what the model may choose, and what it must agree on."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from weights import TINY, batch, random_model

from model import GPT2, GPT2Config
from model.huggingface import to_huggingface
from model.init_from import complete, from_pretrained, initialize

NULLS = dict.fromkeys(
    [
        *("n_layer", "n_head", "n_embd", "context", "vocab_size"),
        *("bias", "exact_gelu", "scale_attn_by_inverse_layer_idx"),
    ]
)


@pytest.fixture
def source(tmp_path: Path) -> str:
    to_huggingface(random_model(TINY), tmp_path, eot=0)
    return str(tmp_path)


def test_the_shape_comes_from_the_source(source: str) -> None:
    settings = {"vocab_multiple": 64, "mask_padding": True, "dropout": 0.1}
    settings |= {"loss_chunks": 1, "loss_kernel": "torch"}
    filled = complete({**NULLS, **settings}, source)
    assert filled == {**asdict(TINY), **settings, "vocab_size": None}  # the tokenizer's
    chosen = complete({**NULLS, "context": 8}, source)
    assert (chosen["context"], chosen["n_layer"]) == (8, 3)


def test_nothing_is_read_that_is_not_missing() -> None:
    assert complete(asdict(TINY), "/nowhere") == asdict(TINY)
    with pytest.raises(
        ValueError, match=r"model.n_layer has no value: set it, or set model.init_from"
    ):
        complete(NULLS, None)


def test_padding_context_and_dropout_are_the_models_own(source: str) -> None:
    reference, (tokens, targets) = random_model(TINY), batch(TINY)
    model = GPT2(replace(TINY, vocab_multiple=64, dropout=0.2)).eval()
    initialize(model, source)
    torch.testing.assert_close(model(tokens, targets), reference(tokens, targets))
    assert torch.count_nonzero(model.transformer.wte.weight[TINY.vocab_size :]) == 0

    short = GPT2(replace(TINY, context=10))
    initialize(short, source)
    assert torch.equal(short(tokens[:, :10]), reference(tokens[:, :10]))


def test_any_source_as_a_model(source: str) -> None:
    assert from_pretrained(source, dropout=0.1).config == replace(TINY, dropout=0.1)


def test_rows_that_somebody_padded(tmp_path: Path) -> None:
    """A folder of 64 rows for 61 tokens: kept where the spare ones join the softmax, else zero."""
    theirs = random_model(replace(TINY, vocab_size=64))
    to_huggingface(theirs, tmp_path)
    tokens, targets = batch(TINY)
    joined = replace(TINY, vocab_multiple=64, mask_padding=False)
    model = from_pretrained(tmp_path, **asdict(joined))
    torch.testing.assert_close(model(tokens, targets), theirs(tokens, targets))
    for config in (TINY, replace(TINY, vocab_multiple=64)):
        model = from_pretrained(tmp_path, **asdict(config))
        logits = theirs(tokens)[..., : TINY.vocab_size]
        torch.testing.assert_close(model(tokens), logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 2}, "model.n_layer is 2, but .* has 3: leave it out"),
        ({"n_head": 4}, "model.n_head is 4"),
        ({"exact_gelu": True}, "model.exact_gelu is True, but .* has False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "model.scale_attn_by_inverse_layer_idx is"),
        ({"bias": False}, "model.bias is False, but .* has True"),
        ({"context": 25}, "model.context is 25, but .* has positions for 24 tokens"),
        ({"vocab_size": 257}, "has 257 tokens, but .* has 61: .*data.tokenizer"),
        ({"vocab_size": 33}, "has 33 tokens, but .* has 61"),
        ({"vocab_multiple": 64, "mask_padding": False}, "61 rows .*model.mask_padding=true"),
    ],
)
def test_disagreement_leaves_the_model_as_it_was(
    source: str, change: dict[str, Any], message: str
) -> None:
    model = GPT2(replace(TINY, **change))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        initialize(model, source)
    assert "\n" not in str(error.value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_gpt2s_own_numbers_fit_every_way_of_padding() -> None:
    """50257 rows, and what others make of them, are all GPT-2's tokens."""
    from model.pretrained import Pretrained, check_agreement

    config = GPT2Config(12, 12, 768, 1024, 50257, vocab_multiple=64)
    shape = {**asdict(config), "context": 1024}
    for rows in (50257, 50264, 50304, 50432):
        check_agreement(config, Pretrained("x", {**shape, "vocab_size": rows}, dict))
    for rows in (50256, 50258, 100277, math.inf):
        with pytest.raises(ValueError, match=r"data.tokenizer"):
            check_agreement(config, Pretrained("x", {**shape, "vocab_size": rows}, dict))

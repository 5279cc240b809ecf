"""nanoGPT's checkpoints: weights and plain values, and never anything that runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from weights import TINY, batch, random_model

from model import GPT2
from model.init_from import from_pretrained, initialize
from model.nanogpt import from_nanogpt

WTE = "transformer.wte.weight"
NANOGPT = replace(TINY, exact_gelu=True)


def checkpoint(model: GPT2, prefix: str = "_orig_mod.") -> dict[str, Any]:
    """What nanoGPT's train.py gives to torch.save, with torch.compile on."""
    config = model.config
    weights = {**model.state_dict(), "lm_head.weight": model.transformer.wte.weight.detach()}
    weights["transformer.h.0.attn.bias"] = torch.ones(config.context, config.context).tril()
    args = {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "block_size": config.context,
        "bias": config.bias,
        "vocab_size": config.vocab_size,
        "dropout": 0.2,
    }
    optimizer = torch.optim.AdamW(model.parameters())
    return {
        "model": {prefix + name: tensor for name, tensor in weights.items()},
        "optimizer": optimizer.state_dict(),
        "model_args": args,
        "iter_num": 5,
        "best_val_loss": torch.tensor(3.0),
        "config": {"dataset": "openwebtext", "learning_rate": 6e-4, "compile": True},
    }


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_checkpoint(tmp_path: Path, bias: bool, prefix: str) -> None:
    model, path = random_model(replace(NANOGPT, bias=bias)), tmp_path / "ckpt.pt"
    torch.save(checkpoint(model, prefix), path)
    read = from_nanogpt(path)
    assert read.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    drawn = GPT2(replace(model.config, vocab_multiple=64, context=12))
    initialize(drawn, str(path))
    tokens = batch(TINY)[0][:, :12]
    torch.testing.assert_close(drawn(tokens), model(tokens))


def test_a_checkpoint_of_the_mars_code(tmp_path: Path) -> None:
    model = random_model(replace(TINY, scale_attn_by_inverse_layer_idx=True))
    content = checkpoint(model)
    content["model_args"]["scale_attn_by_inverse_layer_idx"] = True
    torch.save(content, tmp_path / "ckpt.pt")
    assert from_pretrained(tmp_path / "ckpt.pt").config == model.config


def test_gpt2s_padded_vocabulary(tmp_path: Path) -> None:
    config = replace(NANOGPT, n_layer=1, n_embd=4, vocab_size=50304)
    torch.save(checkpoint(random_model(config)), tmp_path / "ckpt.pt")
    read = from_nanogpt(tmp_path / "ckpt.pt").config
    assert (read.vocab_size, read.padded_vocab_size, read.live_vocab_size) == (50257, 50304, 50304)


def change(key: str, name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content[key].update({name: value})


class Command:
    def __reduce__(self) -> Any:
        return print, ("this ran",)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.pop("model"), "is no checkpoint of nanoGPT"),
        (lambda c: c["model_args"].pop("bias"), "model_args lack bias"),
        (change("model_args", "n_kv_head", 2), "model_args have n_kv_head"),
        (lambda c: c["model"].pop("_orig_mod.transformer.ln_f.weight"), "lacks transformer.ln_f"),
        (change("model", "rotary", torch.ones(1)), "has rotary"),
        (change("model_args", "block_size", 32), r"shape \(24, 32\)"),
        (change("model", "_orig_mod.lm_head.weight", torch.ones(61, 32)), "not tied"),
        (change("config", "run", Command()), "holds more than weights"),
    ],
)
def test_refused(
    tmp_path: Path,
    spoil: Callable[[dict[str, Any]], Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = checkpoint(random_model(NANOGPT))
    spoil(content)
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=message) as error:
        from_nanogpt(tmp_path / "ckpt.pt")
    assert "\n" not in str(error.value)
    assert "this ran" not in capsys.readouterr().out


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        from_pretrained(tmp_path / "ckpt.pt")
    (tmp_path / "ckpt.pt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        from_pretrained(tmp_path / "ckpt.pt")
